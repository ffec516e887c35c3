"""Reads a tokenizer file without trusting it.

- In: a folder with a `tokenizer.pkl`, a pickled `tiktoken.Encoding` (pickle protocol 3 to 5), or
  with the `tokenizer.json` of a converted model.
- Out: a `tiktoken.Encoding` built from the file's four plain fields after checking them.
- No unpickler runs: `plain_pickle` interprets the few instructions that such a file needs. Any
  other instruction, and any global but tiktoken's Encoding, is refused.
- Anything wrong with the file raises one TokenizerError that names it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tiktoken

from cognica_mlx.convert.formats import tokenizer_json
from cognica_mlx.convert.formats.plain_pickle import BYTES, INTEGERS, TEXT, Global, replay
from cognica_mlx.errors import TokenizerError, one_line
from cognica_mlx.files.git_lfs import pointer_problem

FILE_NAME = "tokenizer.pkl"
MOST_BYTES = 64 * 2**20  # 48000 tokens take half a megabyte
MOST_STEPS = 4_000_000  # and 150 thousand pickle instructions

_FIELDS = ("name", "pat_str", "mergeable_ranks", "special_tokens")
_ENCODING = frozenset({"tiktoken.core.Encoding", "tiktoken.Encoding"})
_PROBE = "Hello,  world! 12'll\r\n\n\té\u4e16\U0001f600 \n"


class _Built(NamedTuple):
    """Placeholder for the Encoding that unpickling would have made, with its fields."""

    fields: object


_BLANK = object()  # an Encoding without fields yet


def has_tokenizer(folder: Path) -> bool:
    """Whether `read_encoding` would find a file in `folder`."""
    return any((folder / name).is_file() for name in (FILE_NAME, tokenizer_json.FILE_NAME))


def read_encoding(folder: Path) -> tiktoken.Encoding:
    """The tiktoken encoding of a model's folder; runs no code from it. Raises TokenizerError."""
    path, converted = folder / FILE_NAME, folder / tokenizer_json.FILE_NAME
    if not has_tokenizer(folder):
        raise TokenizerError(
            f"{path} is missing: a model folder needs the {FILE_NAME} that was released with it,"
            f" or a converted model's {converted.name}"
        )
    used = path if path.is_file() else converted
    if problem := pointer_problem(used):
        raise TokenizerError(f"{used} {problem}")
    try:
        return _build(_pickled(path) if used == path else tokenizer_json.read_fields(converted))
    except TokenizerError as error:
        raise TokenizerError(f"{used} {error}") from error.__cause__
    except OSError as error:
        raise TokenizerError(f"{used} cannot be read: {error.strerror}") from error
    except Exception as error:  # pickletools and bad stack contents can raise anything
        raise TokenizerError(
            f"{used} is damaged or not a tokenizer ({one_line(error)}): download it again"
        ) from error


def encode_text(encoding: tiktoken.Encoding, text: str, allow_special: bool = False) -> list[int]:
    """Token ids of `text`; lone surrogates become U+FFFD, as in tiktoken."""
    with _tiktoken_errors("tiktoken cannot split this text; does it have a long run of spaces?"):
        if allow_special:
            return encoding.encode(text, allowed_special="all")
        return encoding.encode_ordinary(text)


def _pickled(path: Path) -> object:
    """The fields of the one pickled Encoding in a file."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise TokenizerError(f"is larger than {MOST_BYTES >> 20} MiB: not a tokenizer")
    made = replay(
        data,
        kind="tokenizer",
        error=TokenizerError,
        most_steps=MOST_STEPS,
        values=TEXT | BYTES | INTEGERS,
        names=_ENCODING,
        rules={"NEWOBJ": _make, "BUILD": _fill},
    )
    if len(made) != 1 or not isinstance(made[0], _Built):
        raise TokenizerError("does not hold a tiktoken Encoding and nothing else")
    return made[0].fields


def _make(what: object, args: object) -> object:
    if type(what) is not Global or args != ():
        raise ValueError("it makes something other than an Encoding")
    return _BLANK


def _fill(target: object, fields: object) -> _Built:
    if target is not _BLANK:
        raise ValueError("it sets the fields of something other than an Encoding")
    return _Built(fields)


def _build(fields: object) -> tiktoken.Encoding:
    """Check the four fields and build the encoding from them."""
    if type(fields) is str:
        raise TokenizerError(
            f"only names the public encoding {ascii(fields)[:60]}: save a tokenizer with its data"
        )
    if type(fields) is not dict or set(fields) != set(_FIELDS):
        raise TokenizerError(f"does not have exactly the fields {', '.join(_FIELDS)}")
    for field, kind in zip(_FIELDS, (str, str, dict, dict), strict=True):
        if type(fields[field]) is not kind:
            found = type(fields[field]).__name__
            raise TokenizerError(f"has a {field} of type {found}, not {kind.__name__}")
    ids: set[int] = set()
    for field, kind in (("mergeable_ranks", bytes), ("special_tokens", str)):
        for token, number in fields[field].items():
            if type(token) is not kind or not token:
                raise TokenizerError(
                    f"has a token in {field} that is not non-empty {kind.__name__}"
                )
            if type(number) is not int or number < 0:
                shown = number if type(number) is int else type(number).__name__
                raise TokenizerError(
                    f"gives {ascii(token)[:60]} in {field} the id {shown}, not a whole number >= 0"
                )
            if number in ids:
                raise TokenizerError(f"gives the id {number} to two tokens")
            ids.add(number)
    missing = [byte for byte in range(256) if bytes([byte]) not in fields["mergeable_ranks"]]
    if missing:
        raise TokenizerError(
            f"lacks {len(missing)} of the 256 single bytes, 0x{missing[0]:02x} first"
        )
    with _tiktoken_errors("has a pat_str or tokens that tiktoken rejects"):
        encoding = tiktoken.Encoding(**fields)
        probe = encoding.decode(encoding.encode_ordinary(_PROBE))
    if probe != _PROBE:
        raise TokenizerError("has a pat_str that loses part of the text")
    return encoding


@contextmanager
def _tiktoken_errors(what: str) -> Iterator[None]:
    """Convert tiktoken's errors to ours; its Rust core panics with a bare BaseException."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what} ({one_line(error)})") from error
