"""The tokenizer's file: what is read, and files that mean harm."""

import builtins
import copyreg
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from conftest import SOAK
from hypothesis import given
from hypothesis import strategies as st
from pickles import FIELDS, Calls, short

from cognica_mlx.convert.formats import tokenizer_files
from cognica_mlx.convert.formats.tokenizer_files import read_encoding
from cognica_mlx.errors import TokenizerError
from mlx_poe.loading.tokenizer import Tokenizer

TINY = Path(__file__).parents[1] / "mlx_poe" / "models" / "poe-tiny"
REAL = (TINY / "tokenizer.pkl").read_bytes()
TOKENIZER = Tokenizer.from_folder(TINY)


def refusal(folder: Path, data: bytes) -> str:
    """The one line that reading `data` as a tokenizer file is refused with."""
    path = folder / "tokenizer.pkl"
    path.write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        read_encoding(folder)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message[len(str(path)) + 1 :]


def pickled(fields: object, maker: bytes = b"ctiktoken.core\nEncoding\n)\x81") -> bytes:
    """A protocol 3 pickle that makes an Encoding and gives it `fields`."""
    return b"\x80\x03" + maker + pickle.dumps(fields, 3)[2:-1] + b"b."


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_reads_what_tiktoken_pickles(tmp_path: Path, protocol: int) -> None:
    original = TOKENIZER.encoding
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(original, protocol))
    encoding = read_encoding(tmp_path)
    assert encoding.name == "rustbpe"
    assert encoding._pat_str == original._pat_str
    assert encoding._mergeable_ranks == original._mergeable_ranks
    assert encoding._special_tokens == original._special_tokens


def test_reads_small_and_memoized_fields(tmp_path: Path) -> None:
    token = b"ab"
    ranks = {**FIELDS["mergeable_ranks"], token: 257}
    (tmp_path / "tokenizer.pkl").write_bytes(pickled({**FIELDS, "mergeable_ranks": ranks}))
    assert read_encoding(tmp_path).encode_ordinary("ab") == [257]
    alias = pickled(FIELDS, b"ctiktoken\nEncoding\n)\x81")
    (tmp_path / "tokenizer.pkl").write_bytes(alias)
    assert read_encoding(tmp_path).n_vocab == 257


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_are_refused_and_nothing_runs(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "ran"
    for function, argument, name in (
        (os.system, f"touch {canary}", "system"),
        (builtins.eval, f"open({str(canary)!r}, 'w')", "eval"),
        (builtins.exec, f"open({str(canary)!r}, 'w')", "exec"),
        (builtins.open, str(canary), "open"),
    ):
        args = (argument, "w") if function is builtins.open else (argument,)
        attack = pickle.dumps(Calls(function, *args), protocol)
        message = refusal(tmp_path, attack)
        assert message.startswith("asks for '")
        assert message.endswith(f"{name}': refused, nothing was run")
        hidden = pickled({**FIELDS, "name": Calls(function, *args)})
        assert f"{name}': refused" in refusal(tmp_path, hidden)
        assert not canary.exists()
    pickle.loads(attack)  # the attack is real: an ordinary unpickler does create the file
    assert canary.exists()


ENCODING = b"ctiktoken.core\nEncoding\n"
DOTTED = "Encoding.__init__.__globals__"
DOUBLED: dict[str, Any] = {}
for _ in range(60):  # 2**60 dictionaries to anyone who walks it
    DOUBLED = {"a": DOUBLED, "b": DOUBLED}
HOSTILE = {
    "names from the memo": (
        b"\x80\x04" + short("system") + b"\x94" + short("os") + b"\x94h\x01h\x00\x93.",
        "asks for 'os.system': refused, nothing was run",
    ),
    "names that are no text": (b"\x80\x04K\x01K\x02\x93.", "asks for 'a non-name'"),
    "a name with control characters": (
        b"\x80\x04" + short("os") + short("\x1b[2J\nsystem") + b"\x93.",
        r"asks for 'os.\x1b[2J\nsystem'",
    ),
    "a name of a thousand letters": (b"cos\n" + b"x" * 1000 + b"\n.", "asks for 'os.xxx"),
    "old-style global": (b"cposix\nsystem\n(S'true'\ntR.", "asks for 'posix.system'"),
    "getattr chain": (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'true'\ntR.",
        "asks for 'builtins.getattr'",
    ),
    "dotted name": (
        b"\x80\x04" + short("tiktoken.core") + short(DOTTED) + b"\x93.",
        f"asks for 'tiktoken.core.{DOTTED}': refused, nothing was run",
    ),
    "dotted old-style name": (
        f"\x80\x04ctiktoken.core\n{DOTTED}\n.".encode("latin-1"),
        f"asks for 'tiktoken.core.{DOTTED}'",
    ),
    "neighbour in tiktoken.core": (
        b"ctiktoken.core\nThreadPoolExecutor\n.",
        "asks for 'tiktoken.core.ThreadPoolExecutor'",
    ),
    "INST": (b"(S'true'\nios\nsystem\n.", "instruction STRING"),
    "OBJ": (b"(" + ENCODING + b"o.", "instruction OBJ"),
    "REDUCE on Encoding": (ENCODING + b")R.", "instruction REDUCE"),
    "NEWOBJ with arguments": (ENCODING + b"K\x01\x81.", "something other than an Encoding"),
    "NEWOBJ of a text": (b"\x80\x04" + short("x") + b")\x81.", "something other than an Encoding"),
    "NEWOBJ_EX": (ENCODING + b")}\x92.", "instruction NEWOBJ_EX"),
    "BUILD on the class": (
        pickled({"__reduce__": "x"}, ENCODING),
        "fields of something other than an Encoding",
    ),
    "BUILD with slots": (pickled((None, {"__class__": "x"})), "instruction NONE"),
    "BUILD with a tuple": (pickled(({}, {"__class__": "x"})), "instruction TUPLE2"),
    "BUILD with dunder fields": (
        pickled({**FIELDS, "__class__": "x", "__reduce__": "y"}),
        "does not have exactly the fields name, pat_str",
    ),
    "BUILD twice": (pickled(FIELDS)[:-1] + b"}b.", "something other than an Encoding"),
    "items set on the class": (
        ENCODING + b"\x8c\x01xK\x01s.",
        "sets items of something that is not a dictionary",
    ),
    "items set on an instance": (ENCODING + b")\x81(\x8c\x01xK\x01u.", "not a dictionary"),
    "unhashable key": (b"}}K\x01s.", "keys that are neither text nor bytes"),
    "an odd number of items": (b"}(\x8c\x01xu.", "not a dictionary"),
    "persistent id": (b"P../../etc/passwd\n.", "instruction PERSID"),
    "binary persistent id": (b"\x80\x04" + short("x") + b"Q.", "instruction BINPERSID"),
    "EXT2": (b"\x80\x02\x83\x01\x00.", "instruction EXT2"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "instruction EXT4"),
    "memo index of four billion": (b"}r\xfe\xff\xff\xff.", "does not hold a tiktoken Encoding"),
    "text of 2**63 bytes": (b"\x8d" + b"\xff" * 7 + b"\x7f.", "is damaged"),
    "frame of 2**63 bytes": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.", "does not hold"),
    "long of 2**31 bytes": (b"\x8b\xff\xff\xff\x7f.", "is damaged"),
    "tuple that doubles": (b")" + b"q\x00h\x00\x86" * 100 + b".", "instruction TUPLE2"),
    "dictionary that doubles": (
        pickled({**FIELDS, "mergeable_ranks": DOUBLED}),
        "has a token in mergeable_ranks that is not non-empty bytes",
    ),
    "dictionary within itself": (b"}q\x00\x8c\x01ah\x00s.", "does not hold a tiktoken Encoding"),
    "empty stack": (b"\x94.", "is damaged or not a tokenizer"),
    "unknown memo": (b"h\x05.", "is damaged or not a tokenizer"),
    "mark missing": (b"}\x8c\x01au.", "is damaged or not a tokenizer"),
    "two objects": (b"}" + pickled(FIELDS), "does not hold a tiktoken Encoding and nothing else"),
    "only the class": (ENCODING + b".", "does not hold a tiktoken Encoding"),
    "no fields": (ENCODING + b")\x81.", "does not hold a tiktoken Encoding"),
    "bad UTF-8 text": (b"\x8c\x01\xff.", "is damaged"),
    "not a pickle": (b"<!DOCTYPE html><html>", "is damaged or not a tokenizer"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "empty": (b"", "is damaged or not a tokenizer"),
    "a name of a public encoding": (pickled("gpt2"), "only names the public encoding 'gpt2'"),
}


@pytest.mark.parametrize(("data", "complaint"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_and_damaged_files(tmp_path: Path, data: bytes, complaint: str) -> None:
    assert complaint in refusal(tmp_path, data)


def test_extension_codes_are_refused_even_when_copyreg_has_them_cached(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    attack = b"\x80\x02\x82\xf7" + short(f"touch {canary}") + b"\x85R."
    copyreg.add_extension("os", "system", 0xF7)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf7.") is os.system  # and fills the cache
        assert "instruction EXT1" in refusal(tmp_path, attack)
    finally:
        copyreg.remove_extension("os", "system", 0xF7)
        copyreg.clear_extension_cache()
    assert not canary.exists()


def test_truncated_at_every_hundredth_byte(tmp_path: Path) -> None:
    for length in range(0, len(REAL), 100):
        assert "is damaged" in refusal(tmp_path, REAL[:length])


@pytest.mark.parametrize("times", [200, pytest.param(3000, marks=SOAK)])
def test_damaged_bytes_give_an_encoding_or_a_tokenizer_error(tmp_path: Path, times: int) -> None:
    chance = random.Random(0)
    small = pickle.dumps(tiktoken.Encoding(**FIELDS), 4)
    path = tmp_path / "tokenizer.pkl"
    for _ in range(times):
        data = bytearray(small)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            assert isinstance(read_encoding(tmp_path), tiktoken.Encoding)
        except TokenizerError as error:
            assert "\n" not in str(error)


@given(st.binary())
def test_replaying_any_bytes_makes_nothing_but_plain_data(data: bytes) -> None:
    try:
        fields = tokenizer_files._replay(data)
    except Exception:
        return
    assert type(fields) in (str, bytes, int, dict, tuple)


def test_too_large_and_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.pkl"
    with path.open("wb") as file:
        file.truncate(tokenizer_files.MOST_BYTES + 1)
    with pytest.raises(TokenizerError, match="larger than 64 MiB"):
        read_encoding(tmp_path)
    monkeypatch.setattr(tokenizer_files, "MOST_STEPS", 1000)
    assert "over 1000 pickle instructions" in refusal(tmp_path, b"}" * 1001 + b".")


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.pkl is missing: a model folder needs"):
        read_encoding(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.pkl is missing"):
        Tokenizer.from_folder(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.pkl").mkdir()
    with pytest.raises(TokenizerError, match="is missing"):
        read_encoding(tmp_path)


RANKS = FIELDS["mergeable_ranks"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": 1}, "has a name of type int, not str"),
        ({"pat_str": b"x"}, "has a pat_str of type bytes, not str"),
        ({"mergeable_ranks": "x"}, "has a mergeable_ranks of type str, not dict"),
        ({"special_tokens": 3}, "has a special_tokens of type int, not dict"),
        ({"mergeable_ranks": {**RANKS, "ab": 300}}, "mergeable_ranks that is not non-empty bytes"),
        ({"mergeable_ranks": {**RANKS, b"": 300}}, "mergeable_ranks that is not non-empty bytes"),
        ({"special_tokens": {b"x": 300}}, "special_tokens that is not non-empty str"),
        ({"special_tokens": {"": 300}}, "special_tokens that is not non-empty str"),
        ({"mergeable_ranks": {**RANKS, b"ab": -1}}, "gives b'ab' in mergeable_ranks the id -1"),
        ({"mergeable_ranks": {**RANKS, b"ab": "1"}}, "gives b'ab' in mergeable_ranks the id str"),
        ({"special_tokens": {"x": {}}}, "gives 'x' in special_tokens the id dict"),
        ({"mergeable_ranks": {**RANKS, b"ab": 7}}, "gives the id 7 to two tokens"),
        ({"special_tokens": {"a": 300, "b": 300}}, "gives the id 300 to two tokens"),
        ({"special_tokens": {"a": 255}}, "gives the id 255 to two tokens"),
        ({"mergeable_ranks": {}}, "lacks 256 of the 256 single bytes, 0x00 first"),
        ({"mergeable_ranks": {b: i for b, i in RANKS.items() if i != 65}}, "lacks 1 of the 256"),
        ({"pat_str": "("}, "pat_str or tokens that tiktoken rejects (Parsing error"),
        ({"pat_str": "(?:a{1000}){1000}{1000}"}, "pat_str or tokens that tiktoken rejects"),
        ({"pat_str": r"((.)|..|.?.)*\2\2\2Q"}, "pat_str or tokens that tiktoken rejects"),
        ({"pat_str": ""}, "pat_str or tokens that tiktoken rejects"),
        ({"pat_str": "\ud800"}, "pat_str or tokens that tiktoken rejects"),
        ({"special_tokens": {"\ud800": 300}}, "pat_str or tokens that tiktoken rejects"),
        ({"pat_str": "l"}, "pat_str that loses part of the text"),
        ({"extra": 1}, "does not have exactly the fields"),
    ],
)
def test_fields_that_make_no_tokenizer(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    assert complaint in refusal(tmp_path, pickled({**FIELDS, **change}))


def test_a_field_short(tmp_path: Path) -> None:
    fields = {key: value for key, value in FIELDS.items() if key != "pat_str"}
    assert "does not have exactly the fields" in refusal(tmp_path, pickled(fields))
