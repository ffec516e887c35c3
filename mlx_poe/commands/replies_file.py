"""The output of mlx_poe.generate --prompts: one line of JSON per reply.

- in: records, each with the index of its prompt and every option that decides the reply
- out: a file to resume from, where replies are appended as soon as they are finished; a pipe or
  a device gets them in the prompts' order, and is never read
- a reply made with other options is never taken for the one asked for
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.files import strict_json
from mlx_poe.evaluation.answers import key_of

# Every line that we write begins with this.
_OURS = b'{"index": '
# Longer values, such as schemas, are recorded as their hash.
_LONGEST = 200


def is_stdout(path: Path) -> bool:
    return str(path) == "-"


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a record holds them: without those that are off, and long ones as a hash."""
    plain = json.loads(json.dumps(options))
    return {
        name: value if len(json.dumps(value)) <= _LONGEST else f"hash {key_of(value)}"
        for name, value in plain.items()
        if value is not None and value is not False
    }


def finished_replies(path: Path) -> dict[int, tuple[Any, Any]]:
    """The prompts and options of the replies already in a file, by index; None for options that it
    does not have. Cuts off a torn last line.

    Raises RequestError, changing nothing, if the file contains anything else.
    """
    if is_stdout(path) or not path.is_file():
        return {}
    done, end = {}, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if line.startswith(_OURS[: len(line)]):
                    break
                raise RequestError(
                    f"the end of {path} was not written by this command; give another --output"
                )
            try:
                record = json.loads(line)
                done[record["index"]] = record["prompt"], record.get("options")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise RequestError(
                    f"{path}, line {number} was not written by this command; give another --output"
                ) from None
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return done


def has_reply(
    path: Path, index: int, finished: tuple[Any, Any] | None, prompt: Any, options: dict[str, Any]
) -> bool:
    """Whether `finished` is the reply to this prompt with these `recorded` options.

    A changed prompt has none yet. RequestError for a reply made with other options.
    """
    if finished is None or finished[0] != prompt:
        return False
    if not isinstance(finished[1], Mapping):
        raise RequestError(
            f"{path} does not say with which options its reply {index} was made, as in files of "
            "version 0.2; give another --output"
        )
    for name in {**options, **finished[1]}:
        before, now = finished[1].get(name), options.get(name)
        if before != now:
            other = f"{name} {_shown(before)}, not {_shown(now)}"
            raise RequestError(
                f"{path}: reply {index} was made with "
                f"{'another model' if name == 'model' else other}; give another --output"
            )
    return True


def _shown(value: Any) -> str:
    return "off" if value is None else json.dumps(value)


@contextmanager
def open_replies(path: Path) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """A function that writes the n-th reply. CheckpointError if the file cannot be written."""
    waiting: dict[int, Mapping[str, Any]] = {}
    following = 0
    writing = True
    try:
        with nullcontext(sys.stdout.buffer) if is_stdout(path) else path.open("ab") as file:
            writing, in_order = False, is_stdout(path) or not path.is_file()

            def write(n: int, record: Mapping[str, Any]) -> None:
                nonlocal following, writing
                waiting[n] = record
                while waiting and (not in_order or following in waiting):
                    each = waiting.pop(following if in_order else n)
                    following += 1
                    writing = True
                    # Whole and flushed, so that a kill loses none.
                    file.write(strict_json.line(each))
                    file.flush()
                    writing = False

            yield write
    except BrokenPipeError:
        raise
    except OSError as error:
        if not writing:
            raise
        name = "stdout" if is_stdout(path) else path
        raise CheckpointError(f"{name} cannot be written: {error.strerror}") from None
