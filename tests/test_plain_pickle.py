"""Pickles that are replayed and not unpickled: both readers refuse the same, and nothing runs."""

import builtins
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pickles import Calls

from cognica_mlx.convert.formats.tokenizer_files import read_encoding
from cognica_mlx.convert.formats.torch_files import read_torch_file
from cognica_mlx.errors import CheckpointError, PoEError, TokenizerError

# Spelled out again here, so that no slip in the module widens them unseen.
BOTH = [
    "PROTO",
    "FRAME",
    "STOP",
    "MARK",
    "MEMOIZE",
    "BINPUT",
    "LONG_BINPUT",
    "BINGET",
    "LONG_BINGET",
    "EMPTY_DICT",
    "EMPTY_TUPLE",
    "SETITEM",
    "SETITEMS",
    "GLOBAL",
    "STACK_GLOBAL",
    "BUILD",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
    "BININT",
    "BININT1",
    "BININT2",
]
ALLOWED = {
    "tokenizer": {*BOTH, *["NEWOBJ", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"]},
    "checkpoint": {
        *BOTH,
        *[
            "REDUCE",
            "BINPERSID",
            "LONG1",
            "BINFLOAT",
            "NONE",
            "NEWTRUE",
            "NEWFALSE",
            "TUPLE",
            "TUPLE1",
            "TUPLE2",
            "TUPLE3",
        ],
    },
}
ARGUMENTS = {
    "decimalnl_short": b"1\n",
    "decimalnl_long": b"1\n",
    "floatnl": b"1.5\n",
    "stringnl": b"'os'\n",
    "stringnl_noescape": b"os\n",
    "stringnl_noescape_pair": b"os\nsystem\n",
    "unicodestringnl": b"os\n",
    "string1": bytes(1),
    "string4": bytes(4),
    "bytes1": bytes(1),
    "bytes4": bytes(4),
    "bytes8": bytes(8),
    "bytearray8": bytes(8),
    "unicodestring1": bytes(1),
    "unicodestring4": bytes(4),
    "unicodestring8": bytes(8),
    "long1": bytes(1),
    "long4": bytes(4),
}


def tokenizer(folder: Path, data: bytes) -> None:
    (folder / "tokenizer.pkl").write_bytes(data)
    read_encoding(folder)


def checkpoint(folder: Path, data: bytes) -> None:
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    read_torch_file(folder / "model.pt")


READERS: list[tuple[Callable[[Path, bytes], None], type[PoEError]]] = [
    (tokenizer, TokenizerError),
    (checkpoint, CheckpointError),
]


def refusals(folder: Path, data: bytes) -> list[str]:
    """The lines with which each reader refuses the pickle `data`, without the file's path."""
    messages = []
    for read, error in READERS:
        with pytest.raises(error) as caught:
            read(folder, data)
        messages.append(str(caught.value).removeprefix(f"{folder}/").partition(" ")[2])
    return messages


def instruction(opcode: Any) -> bytes:
    """An instruction with an argument that pickletools can read."""
    if opcode.arg is None:
        return opcode.code.encode("latin-1")
    argument = ARGUMENTS.get(opcode.arg.name) or bytes(opcode.arg.n)
    return opcode.code.encode("latin-1") + argument


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0].__name__)
def test_any_instruction_that_is_not_listed_is_refused_by_name(tmp_path, reader):
    read, error = reader
    refused = [op for op in pickletools.opcodes if op.name not in ALLOWED[read.__name__]]
    assert len(refused) == len(pickletools.opcodes) - len(ALLOWED[read.__name__])
    for opcode in refused:
        complaint = f"uses the pickle instruction {opcode.name}, which no .*: refused, nothing was"
        with pytest.raises(error, match=complaint):
            read(tmp_path, b"\x80\x04" + instruction(opcode) + b".")


GLOBALS = {
    "old style": b"cos\nsystem\n",
    "new style": b"\x8c\x02os\x8c\x06system\x93",
    "from the memo": b"\x8c\x06system\x94\x8c\x02os\x94h\x01h\x00\x93",
    "dots in the name": b"\x8c\x08tiktoken\x8c\x0dcore.Encoding\x93",
    "dots in the other's name": b"\x8c\x05torch\x8c\x19_utils._rebuild_tensor_v2\x93",
    "not text": b"}}\x93",
    "another module's": b"ctorch.core\nEncoding\n",
    "no name": b"\x8c\x00\x8c\x00\x93",
}


@pytest.mark.parametrize("data", GLOBALS.values(), ids=GLOBALS.keys())
def test_both_readers_refuse_the_same_globals_in_the_same_words(tmp_path, data):
    one, other = refusals(tmp_path, data + b".")
    assert one == other
    assert one.startswith("asks for '") and one.endswith("': refused, nothing was run")


HOSTILE = {
    "INST": b"(ios\nsystem\n.",
    "OBJ": b"(}o.",
    "EXT1": b"\x82\x01.",
    "PERSID": b"Pos.system\n.",
    "POP": b"}0.",
    "DUP": b"}2.",
    "EMPTY_LIST": b"].",
    "NEXT_BUFFER": b"\x97.",
}


@pytest.mark.parametrize(("name", "data"), HOSTILE.items(), ids=HOSTILE.keys())
def test_both_readers_refuse_the_same_instructions(tmp_path, name, data):
    for message in refusals(tmp_path, data):
        assert message.startswith(f"uses the pickle instruction {name}, which no ")
        assert message.endswith(": refused, nothing was run")


def test_both_readers_run_nothing_where_an_unpickler_would(tmp_path):
    canary = tmp_path / "ran"
    for function, argument in (
        (os.system, f"touch {canary}"),
        (builtins.eval, f"open({str(canary)!r}, 'w')"),
    ):
        attack = pickle.dumps(Calls(function, argument), 4)
        one, other = refusals(tmp_path, attack)
        assert one == other and one.endswith(f"{function.__name__}': refused, nothing was run")
        assert not canary.exists()
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {canary}")))  # the attack is real
    assert canary.exists()
