"""The reader of PyTorch's files: what PyTorch wrote, bit for bit, and files that mean harm.

fixtures/nanochat/ is flat-d8 and stage-on-flat as nanochat writes them. fixtures/torch/ was made
with PyTorch 2.13.0, once:

    grid = torch.arange(24.0).reshape(2, 3, 4)
    half = (torch.arange(12.0) / 8 - 1).half()
    nans = torch.tensor([0x7FC1, 0xFF81, 0x8000, 0x0001], dtype=torch.uint16).view(torch.bfloat16)
    views = {
        "plain": grid, "transposed": grid.permute(2, 0, 1), "tail": grid[1, 1:, 1::2],
        "expanded": grid[:, :1].expand(2, 5, 4), "overlapping": half.as_strided((4, 4), (2, 1), 1),
        "half": half.view(3, 4), "half.transposed": half.view(3, 4).t(), "nans": nans,
        "scalar": torch.tensor(-2.5, dtype=torch.bfloat16), "empty": torch.zeros(0, 3).half(),
        "one": grid[1:2, 2:3, 3:4], "parameter": Parameter(grid[0]),
        "step": 2**40, "loss": 0.5, "tag": "x", "none": None, "on": True,
    }
    torch.save(views, "views.pt")
    torch.save(views, "views_protocol_4.pt", pickle_protocol=4)
    torch.save(linear.state_dict(), "module.pt")  # Linear(2, 2), weight grid[0, :2, :2], bias 0
    torch.save({"a": torch._neg_view(grid)}, "negated.pt")
    torch.save({"a": grid}, "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": grid.int()}, "integers.pt")
"""

import os
import random
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, SOAK
from torch_views import VIEWS, expected_views, refusal

from cognica_mlx.convert.formats import torch_files
from cognica_mlx.convert.formats.torch_files import read_torch_file
from cognica_mlx.errors import CheckpointError

NANOCHAT = FIXTURES / "nanochat"


def bits(tensor: mx.array) -> tuple[tuple[int, ...], mx.Dtype, bytes]:
    """All that there is to a tensor, so that NaN equals NaN and 0 differs from -0."""
    unsigned = tensor.view(mx.uint32 if tensor.dtype.size == 4 else mx.uint16)
    return tensor.shape, tensor.dtype, np.array(unsigned).tobytes()


# --- what PyTorch wrote ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "exported", "prefix"),
    [
        ("base_checkpoints/d/model_000010.pt", "flat-d8/model.safetensors", "_orig_mod."),
        ("chatsft_checkpoints/stage/model_000010.pt", "stage-on-flat/delta.safetensors", ""),
    ],
)
def test_equals_the_safetensors_of_the_same_model(written: str, exported: str, prefix: str) -> None:
    file = read_torch_file(NANOCHAT / written)
    expected = mx.load(str(FIXTURES / exported))
    assert isinstance(expected, dict)
    assert set(file) == {prefix + name.removeprefix("gpt.") for name in expected}
    for name, stored in file.items():
        tensor, export = stored.read(), expected["gpt." + name.removeprefix(prefix)]
        assert tensor.shape == stored.shape == export.shape
        # Masters are float32; they were rounded to bfloat16 before, so this loses no bit.
        assert bits(tensor) == bits(export.astype(tensor.dtype))


def assert_reads_views(path: Path) -> None:
    file, expected = read_torch_file(path), expected_views()
    assert list(file) == list(expected)  # in order, and without what is no tensor
    for name, tensor in expected.items():
        assert file[name].shape == tensor.shape
        assert bits(file[name].read()) == bits(mx.contiguous(tensor))


@pytest.mark.parametrize("name", ["views.pt", "views_protocol_4.pt"])
def test_views_parameters_and_plain_values(name: str) -> None:
    assert_reads_views(FIXTURES / "torch" / name)


def test_state_dict_of_a_module_with_its_metadata() -> None:
    file = read_torch_file(FIXTURES / "torch" / "module.pt")
    assert {k: v.shape for k, v in file.items()} == {"weight": (2, 2), "bias": (2,)}
    assert file["weight"].read().tolist() == [[0, 1], [4, 5]]


def test_tensors_outlive_the_file_and_change_nothing_in_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(VIEWS.read_bytes())
    file = read_torch_file(path)
    tensors = {name: stored.read() for name, stored in file.items()}
    file["plain"].read.args[0].close()  # raises if any tensor still looked into it
    tensors["plain"] += 1
    mx.eval(tensors)
    assert path.read_bytes() == VIEWS.read_bytes()
    assert bits(tensors["half"]) == bits(expected_views()["half"])


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("legacy.pt", r"before 1\.6.* save it again with a recent PyTorch$"),
        ("negated.pt", r"extra metadata: save its clone\(\) instead$"),
        ("integers.pt", r"asks for 'torch.IntStorage': refused, nothing was run$"),
    ],
)
def test_what_pytorch_wrote_and_no_model_needs(name: str, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} .*{complaint}"):
        read_torch_file(FIXTURES / "torch" / name)


# --- the archive ----------------------------------------------------------------------------------


def repack(path: Path, change: Any = lambda name: name, **options: Any) -> Path:
    """VIEWS packed again at `path` by zipfile, its records renamed by `change` or left out."""
    with zipfile.ZipFile(VIEWS) as old, zipfile.ZipFile(path, "w", **options) as new:
        for name in old.namelist():
            if change(name):
                new.writestr(change(name), old.read(name))
    return path


@pytest.mark.parametrize("root", ["archive", "model_000010", "a b", "m..odel", "\u03c0"])
def test_any_root_and_unaligned_records(tmp_path: Path, root: str) -> None:
    path = tmp_path / "model.pt"
    assert_reads_views(repack(path, lambda name: name.replace("views", root, 1)))


def test_prefix_comment_and_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"\0\1\2" + VIEWS.read_bytes())
    assert_reads_views(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"from somewhere else"
    assert_reads_views(path)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 0)
    assert_reads_views(repack(path))
    assert b"PK\6\6" in path.read_bytes()


def test_missing_records(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for missing in ("data/0", "data/1"):
        repack(path, lambda name, missing=missing: name * (not name.endswith(missing)))
        assert refusal(path) == f"lacks its record '{missing}'"
    repack(path, lambda name: name * ("data.pkl" not in name))
    assert "does not hold one data.pkl" in refusal(path)
    repack(path, lambda name: name * ("byteorder" not in name))  # as before PyTorch 2.1
    assert_reads_views(path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("views/../../evil", "holds 'views/../../evil', which is outside its root"),
        ("../evil", "outside its root"),
        ("/etc/passwd", "outside its root"),
        ("views\\..\\evil", "outside its root"),
        ("other/data/0", "outside its root"),
        ("other/data.pkl", "does not hold one data.pkl"),
        ("views/data/0", "holds 'views/data/0' twice"),
        ("views/\x1b[2J/..", r"holds 'views/\x1b[2J/..', which is outside its root"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_with_strange_names(tmp_path: Path, name: str, complaint: str) -> None:
    path = repack(tmp_path / "model.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x" * 100)
    assert complaint in refusal(path)


def test_byte_order(tmp_path: Path) -> None:
    path = repack(tmp_path / "model.pt", lambda name: name * ("byteorder" not in name))
    for order, complaint in ((b"big", "little-endian byte order"), (b"x" * 17, "claims 17 bytes")):
        changed = tmp_path / "changed.pt"
        changed.write_bytes(path.read_bytes())
        with zipfile.ZipFile(changed, "a") as archive:
            archive.writestr("views/byteorder", order)
        assert complaint in refusal(changed)


def test_compressed_and_encrypted_records_are_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 2**26)
    tracemalloc.start()
    assert "compressed or encrypted" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    data = bytearray(repack(path).read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert "compressed or encrypted" in refusal(path)


def test_sizes_and_places_that_the_directory_makes_up(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    whole = repack(path).read_bytes()
    entry = whole.index(b"PK\1\2")  # of data.pkl, the first
    for at, value, complaint in (
        (20, 9, "which is impossible"),  # compressed size alone
        (24, 2**31, "which is impossible"),
        (42, 2**31, "no complete record"),
        (42, 1, "no complete record"),  # no local header there
        (42, len(whole) - 10, "no complete record"),
    ):
        data = bytearray(whole)
        data[entry + at : entry + at + 4] = value.to_bytes(4, "little")
        path.write_bytes(data)
        assert complaint in refusal(path)
    data = bytearray(whole)
    data[entry + 20 : entry + 28] = (len(whole) - 30).to_bytes(4, "little") * 2
    path.write_bytes(data)
    assert "no complete record 'data.pkl'" in refusal(path)
    data[entry + 20 : entry + 28] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(data)
    assert "claims 2147483648 bytes for 'data.pkl'" in refusal(path)


def test_directory_of_endless_entries_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = repack(tmp_path / "model.pt")
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(2000):
            archive.writestr(f"views/data/{number + 100}", b"")
    assert_reads_views(path)
    monkeypatch.setattr(torch_files, "MOST_DIRECTORY_BYTES", 50_000)
    assert "zip directory far larger" in refusal(path)


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=SOAK)])
def test_truncated_anywhere(tmp_path: Path, step: int) -> None:
    path = tmp_path / "model.pt"
    whole = VIEWS.read_bytes()
    for length in range(0, len(whole), step):
        path.write_bytes(whole[:length])
        expected = "is truncated or damaged (" if length > 1 else "is "
        assert refusal(path).startswith(expected)
    large = (NANOCHAT / "base_checkpoints" / "d" / "model_000010.pt").read_bytes()
    for length in range(0, len(large), 100_003):
        path.write_bytes(large[:length])
        refusal(path)
        path.write_bytes(large[length + 1 :])  # and cut at the front
        refusal(path)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    assert refusal(path) == "is missing or not a file"
    assert refusal(tmp_path) == "is missing or not a file"
    os.mkfifo(path)
    assert refusal(path) == "is missing or not a file"
    path.unlink()
    for data, complaint in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "install git-lfs"),
        (b"<!DOCTYPE html>", "is not a checkpoint"),
        (b"PK\5\6" + b"\0" * 18, "does not hold one data.pkl"),
        (b"PK\5\6" + b"\xff" * 18, "truncated or damaged"),
        (b"\x80\x02.", "is a bare pickle"),
    ):
        path.write_bytes(data)
        assert complaint in refusal(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # from pickletools, on old strings
@pytest.mark.parametrize("times", [100, pytest.param(2000, marks=SOAK)])
def test_damaged_bytes_give_tensors_or_a_checkpoint_error(tmp_path: Path, times: int) -> None:
    chance = random.Random(0)
    path = tmp_path / "model.pt"
    whole = repack(path).read_bytes()
    for _ in range(times):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            file = read_torch_file(path)
        except CheckpointError as error:
            assert str(error).isprintable()
            continue
        for stored in file.values():
            assert stored.read().shape == stored.shape
