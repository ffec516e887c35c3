"""The pickle in a PyTorch file: tensors that cannot be, and instructions that mean harm."""

import builtins
import copyreg
import gc
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pickles import Calls, number, row, short, text
from torch_views import VIEWS, expected_views, refusal

from cognica_mlx.convert.formats import torch_files
from cognica_mlx.convert.formats.torch_files import read_torch_file
from cognica_mlx.errors import CheckpointError


def storage(numel: int = 4, record: str = "0", cls: str = "torch\nFloatStorage") -> bytes:
    names = f"c{cls}\n".encode()
    return row(text("storage"), names, text(record), text("cpu"), number(numel)) + b"Q"


def tensor(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, store: bytes = storage()
) -> bytes:
    sizes = row(*map(number, shape)), row(*map(number, strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    return REBUILD + row(store, number(offset), *sizes, b"\x89", hooks) + b"R"


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
PLAIN = tensor((2, 2), (2, 1))


def state(value: bytes, key: bytes = text("w")) -> bytes:
    """A protocol 2 pickle of {key: value}."""
    return b"\x80\x02}" + key + value + b"s."


def written(folder: Path, data: bytes) -> Path:
    """A checkpoint of the pickle `data` and one storage, the float32 numbers 0 to 3."""
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
        archive.writestr("archive/data/00", b"")
    return path


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((2, 2), (2, 1), 0, [[0, 1], [2, 3]]),
        ((2, 2), (1, 2), 0, [[0, 2], [1, 3]]),
        ((3, 2), (1, 1), 0, [[0, 1], [1, 2], [2, 3]]),
        ((3,), (0,), 3, [3, 3, 3]),
        ((), (), 2, 2),
        ((1, 2), (2**90, 1), 2, [[2, 3]]),  # the stride of an axis of one means nothing
        ((2, 0), (2**90, 2**90), 2**90, [[], []]),
        ((1,) * 32, (0,) * 32, 1, None),
    ],
)
def test_handmade_views(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, expected: Any
) -> None:
    file = read_torch_file(written(tmp_path, state(tensor(shape, strides, offset))))
    assert list(file) == ["w"] and file["w"].shape == shape
    assert file["w"].read().shape == shape
    assert file["w"].read().tolist() == expected or expected is None


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (tensor((2, 2), (2, 1), 1), "'w' that exceeds its storage of 4 elements"),
        (tensor((3, 2), (2, 1)), "exceeds its storage"),
        (tensor((2, 2), (3, 2)), "exceeds its storage"),
        (tensor((), (), 4), "exceeds its storage"),
        (tensor((2, 2), (2**62, 2**62)), "exceeds its storage"),
        (tensor((2, 2), (2**63, 2**63)), "exceeds its storage"),  # 0 if sums wrapped at 2**64
        (tensor((2,), (2**64,)), "exceeds its storage"),
        (tensor((2,), (1,), 2**64 - 1), "exceeds its storage"),
        (tensor((2**16,) * 4, (0,) * 4), "would expand"),  # 2**64 elements
        (tensor((2**25,), (0,)), "would expand"),
        (tensor((2**31,), (0,)), "longer than MLX allows"),
        (tensor((0, 2**40), (1, 1)), "longer than MLX allows"),
        (tensor((2,), (-1,), 1), "not a whole number"),
        (tensor((-2,), (1,)), "not a whole number"),
        (tensor((2,), (1,), -1), "not a whole number"),
        (tensor((2, 2), (1,)), "damaged axes"),
        (tensor((1,) * 33, (0,) * 33), "damaged axes"),
        (
            REBUILD + row(storage(), b"\x89", row(), row(), b"\x89", b"N") + b"R",
            "not a whole number",
        ),
        (REBUILD + row(storage(), b"K\0", row(b"\x88"), row(b"\x88"), b"NN") + b"R", "not a whole"),
        (REBUILD + row(storage(), b"K\0", text("a"), row(), b"NN") + b"R", "'w' that is malformed"),
        (REBUILD + row(b"NK\0))NN") + b"R", "has a tensor 'w' that is malformed"),
        (REBUILD + row(PLAIN, b"K\0))NN") + b"R", "has a tensor 'w' that is malformed"),
        (REBUILD + row(storage()) + b"R", "_rebuild_tensor_v2 in an unknown way: refused"),
        (REBUILD + b")R", "in an unknown way: refused"),
        (REBUILD + b"NR", "calls something that is not a function"),
        (b"ctorch._utils\n_rebuild_parameter\n(K\1\x88NtR", "in an unknown way: refused"),
        (b"ccollections\nOrderedDict\n(}tR", "collections.OrderedDict in an unknown way"),
        (b"ctorch\nFloatStorage\n)R", "torch.FloatStorage in an unknown way"),
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, value: bytes, complaint: str) -> None:
    assert complaint in refusal(written(tmp_path, state(value)))


@pytest.mark.parametrize(
    ("store", "complaint"),
    [
        (storage(5), "has 16 bytes in 'data/0', which its tensors do not fit"),
        (storage(3), "which its tensors do not fit"),
        (storage(0), "which its tensors do not fit"),
        (storage(2**62 + 4), "which its tensors do not fit"),  # 16 bytes if it wrapped
        (storage(2**2000), "which its tensors do not fit"),
        (storage(-4), "which its tensors do not fit"),
        (storage(4, cls="torch\nHalfStorage"), "which its tensors do not fit"),
        (storage(record="1"), "lacks its record 'data/1'"),
        (storage(record="../data.pkl"), "lacks its record 'data/../data.pkl'"),
        (storage(record="/etc/passwd"), "lacks its record 'data//etc/passwd'"),
        (storage(record="\x1b\n"), r"lacks its record 'data/\x1b\n'"),
        (storage(cls="collections\nOrderedDict"), "persistent id is not a storage's"),
        (storage(cls="torch\nDoubleStorage"), "asks for 'torch.DoubleStorage': refused"),
        (storage(cls="torch.storage\nUntypedStorage"), "asks for 'torch.storage.UntypedStorage'"),
        (row(text("module"), b"NNNN") + b"Q", "persistent id is not a storage's"),
        (text("storage") + b"Q", "persistent id is not a storage's"),
        (b")Q", "persistent id is not a storage's"),
    ],
)
def test_storages_that_cannot_be(tmp_path: Path, store: bytes, complaint: str) -> None:
    data = state(tensor((), (), store=store))
    message = refusal(written(tmp_path, data))
    assert complaint in message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_are_refused_and_nothing_runs(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "ran"
    for function, args in (
        (os.system, (f"touch {canary}",)),
        (builtins.eval, (f"open({str(canary)!r}, 'w')",)),
        (builtins.exec, (f"open({str(canary)!r}, 'w')",)),
        (builtins.open, (str(canary), "w")),
    ):
        attack = pickle.dumps(Calls(function, *args), protocol)
        message = refusal(written(tmp_path, attack))
        assert message.startswith("asks for '")
        assert message.endswith(f"{function.__name__}': refused, nothing was run")
        hidden = state(PLAIN)[:-1] + text("x") + attack[attack[:1] == b"\x80" and 2 :] + b"s."
        assert f"{function.__name__}': refused" in refusal(written(tmp_path, hidden))
        assert not canary.exists()
    pickle.loads(attack)  # the attack is real: an ordinary unpickler does create the file
    assert canary.exists()


DEEP = b")" + b"\x85" * 100_000
HOSTILE = {
    "GLOBAL": (b"cos\nsystem\n.", "asks for 'os.system': refused, nothing was run"),
    "STACK_GLOBAL": (
        short("os") + short("system") + b"\x93.",
        "asks for 'os.system': refused, nothing was run",
    ),
    "names from the memo": (
        short("system") + b"\x94" + short("os") + b"\x94h\x01h\x00\x93.",
        "asks for 'os.system'",
    ),
    "names that are no text": (b"K\x01K\x02\x93.", "asks for 'a non-name'"),
    "a name with control characters": (
        short("os") + short("\x1b[2J\nsystem") + b"\x93.",
        r"asks for 'os.\x1b[2J\nsystem'",
    ),
    "a name of a thousand letters": (b"cos\n" + b"x" * 1000 + b"\n.", "asks for 'os.xxx"),
    "eval": (b"cbuiltins\neval\n" + text("1") + b"\x85R.", "asks for 'builtins.eval'"),
    "getattr chain": (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n",
        "asks for 'builtins.getattr'",
    ),
    "dotted name": (
        short("collections") + short("OrderedDict.__init__.__globals__") + b"\x93.",
        "asks for 'collections.OrderedDict.__init__.__globals__'",
    ),
    "neighbours in torch": (
        b"ctorch.serialization\nload\n.",
        "asks for 'torch.serialization.load'",
    ),
    "INST": (b"(ios\nsystem\n.", "instruction INST"),
    "OBJ": (b"(ccollections\nOrderedDict\no.", "instruction OBJ"),
    "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
    "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92.", "instruction NEWOBJ_EX"),
    "EXT1": (b"\x82\x01.", "instruction EXT1"),
    "EXT2": (b"\x83\x01\x00.", "instruction EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00.", "instruction EXT4"),
    "PERSID": (b"P../../etc/passwd\n.", "instruction PERSID"),
    "BUILD on a global": (REBUILD + b"}b.", "sets an object's attributes: refused"),
    "BUILD on a tensor": (PLAIN + b"}b.", "sets an object's attributes: refused"),
    "BUILD on a dictionary": (b"}}b.", "sets an object's attributes: refused"),
    "BUILD with slots": (b"ccollections\nOrderedDict\n)R(N}tb.", "sets an object's attributes"),
    "REDUCE on a text": (text("os.system") + b")R.", "calls something that is not a function"),
    "REDUCE on a tuple": (text("os.system") + b"\x85)R.", "calls something that is not a function"),
    "REDUCE on a result": (
        b"ccollections\nOrderedDict\n)R)R.",
        "calls something that is not a function",
    ),
    "items set on a tensor": (PLAIN + text("x") + b"Ns.", "that is not a dictionary"),
    "items set on a global": (REBUILD + text("x") + b"Ns.", "that is not a dictionary"),
    "an odd number of items": (b"}(" + text("x") + b"u.", "that is not a dictionary"),
    "tuple as key": (b"}" + DEEP + b"Ns.", "dictionary keys that are not text"),
    "number as key": (b"}K\x01" + PLAIN + b"s.", "dictionary keys that are not text"),
    "dictionary as key": (b"}}Ns.", "dictionary keys that are not text"),
    "deep tuple as value": (b"}" + text("x") + DEEP + b"s.", "holds 'x', a tuple and not a"),
    "deep tuple as function": (DEEP + b")R.", "calls something that is not a function"),
    "deep tuple as arguments": (REBUILD + DEEP + b"R.", "in an unknown way: refused"),
    "deep tuple as storage": (DEEP + b"Q.", "persistent id is not a storage's"),
    "deep tuple as name": (DEEP + DEEP + b"\x93.", "asks for 'a non-name'"),
    "deep tuple as sizes": (
        b"}" + text("x") + REBUILD + row(storage(), b"K\0", DEEP, DEEP, b"NN") + b"Rs.",
        "has a tensor 'x' with a size or stride that is not a whole number",
    ),
    "deep dictionary": (
        b"}" + (text("x") + b"}") * 50_000 + b"s" * 50_000 + b".",
        "holds 'x', a dict and not a tensor",
    ),
    "nested dictionary": (b"}" + text("x") + state(PLAIN)[2:-1] + b"s.", "holds 'x', a dict"),
    "dictionary within itself": (b"}q\x00" + text("x") + b"h\x00s.", "holds 'x', a dict"),
    "a class as value": (b"}" + text("x") + REBUILD + b"s.", "holds 'x', a Global and not"),
    "a storage as value": (b"}" + text("x") + storage() + b"s.", "holds 'x', a Storage and"),
    "a list": (b"}" + text("x") + b"]s.", "instruction EMPTY_LIST"),
    "a name with control characters as key": (b"}" + text("\x1b\n") + b")s.", r"holds '\x1b\n'"),
    "tuple that doubles": (b")" + b"q\x00h\x00\x86" * 100 + b".", "not hold a dictionary"),
    "memo index of four billion": (b"}r\xfe\xff\xff\xff.", "holds no tensors"),
    "text of 2**63 bytes": (b"\x8d" + b"\xff" * 7 + b"\x7f.", "is damaged"),
    "frame of 2**63 bytes": (b"\x95" + b"\xff" * 7 + b"\x7f}.", "holds no tensors"),
    "long of 2**31 bytes": (b"\x8b\xff\xff\xff\x7f.", "is damaged"),
    "endless": (b"N0" * 10, "instruction POP"),
    "copies without end": (b")" + b"2" * 100, "instruction DUP"),
    "over a million instructions": (b"N" * 1_000_001, "has over 1000000 pickle instructions"),
    "empty stack": (b"\x94.", "is damaged"),
    "empty stack for a storage": (b"Q.", "is damaged"),
    "unknown memo": (b"h\x05.", "is damaged"),
    "mark missing": (b"}" + text("a") + b"u.", "is damaged"),
    "mark above the stack": (b")((tttQ.", "is damaged"),
    "mark that the stack fell under": (b"NN(\x86Nt.", "is damaged"),
    "two objects": (state(PLAIN)[2:-1] * 2 + b".", "does not leave exactly one value"),
    "only a tensor": (PLAIN + b".", "does not hold a dictionary of tensors"),
    "no tensor": (b"}" + text("step") + b"K\x01s.", "holds no tensors"),
    "no STOP": (state(PLAIN)[:-1], "is damaged"),
    "bad UTF-8": (b"\x8c\x01\xff.", "is damaged"),
    "empty": (b"", "is damaged"),
}


@pytest.mark.parametrize(("data", "complaint"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_and_damaged_pickles(tmp_path: Path, data: bytes, complaint: str) -> None:
    assert complaint in refusal(written(tmp_path, data))
    gc.collect()  # deep values must not overflow the stack when they go, either


def test_extension_codes_are_refused_even_when_copyreg_has_them_cached(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    attack = b"\x80\x02\x82\xf8" + text(f"touch {canary}") + b"\x85R."
    copyreg.add_extension("os", "system", 0xF8)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf8.") is os.system  # and fills the cache
        assert "instruction EXT1" in refusal(written(tmp_path, attack))
    finally:
        copyreg.remove_extension("os", "system", 0xF8)
        copyreg.clear_extension_cache()
    assert not canary.exists()


def test_a_pickle_too_large_is_not_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, state(PLAIN))
    assert read_torch_file(path)["w"].read().tolist() == [[0, 1], [2, 3]]
    monkeypatch.setattr(torch_files, "MOST_PICKLE_BYTES", 100)
    assert "bytes for 'data.pkl', which is impossible" in refusal(path)


def test_many_names_for_one_storage_are_no_bomb(tmp_path: Path) -> None:
    big = tensor((2**20,), (0,))
    many = b"\x80\x02}(" + b"".join(text(f"w{i}") + big for i in range(20)) + b"u."
    assert "would expand" in refusal(written(tmp_path, many))
    one = read_torch_file(written(tmp_path, state(big)))
    assert one["w"].read().sum().item() == 0


@given(st.binary() | st.lists(st.sampled_from([*map(bytes, zip(range(256)))])).map(b"".join))
def test_replaying_any_bytes_makes_nothing_but_plain_data(data: bytes) -> None:
    def no_storage(key: object) -> Any:
        raise CheckpointError("none here")

    try:
        made = torch_files._replay(data, no_storage)
    except Exception as error:
        assert not isinstance(error, SystemError)
    else:
        plain = (dict, tuple, str, int, float, type(None))
        assert isinstance(made, plain)


def test_nothing_is_unpickled_or_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was run")

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(builtins, "__import__", forbidden)
    names = list(read_torch_file(VIEWS))
    monkeypatch.undo()
    assert names == list(expected_views())
