"""The converter: what it refuses, what it says, and what it holds in memory."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import tiktoken
from checkpoints import change_config, write_base, write_stage
from conftest import FIXTURES
from converting import assert_goldens, convert, tensors

from cognica_mlx.convert.conversion import Conversion, prepare
from cognica_mlx.convert.formats.tokenizer_json import write_tokenizer
from cognica_mlx.convert.sources import locate
from cognica_mlx.errors import CheckpointError, PoEError, TokenizerError
from cognica_mlx.files import safetensors_files
from mlx_poe import load
from mlx_poe.commands.convert import main


def other_seed(tmp_path: Path) -> Path:
    write_base(tmp_path / "base", seed=1)
    write_stage(tmp_path / "stage")
    return convert(write_base(tmp_path / "other", seed=9), tmp_path / "other-mlx")


def merged(tmp_path: Path) -> Path:
    write_base(tmp_path / "base", seed=1)
    write_stage(tmp_path / "stage")
    write_stage(tmp_path / "chain", base="../stage")
    shutil.rmtree(tmp_path / "stage" / "unused", ignore_errors=True)
    return convert(tmp_path / "stage", tmp_path / "merged")


@pytest.mark.parametrize(
    ("make", "source", "named"),
    [
        (other_seed, "stage", "is not the base of .*: its"),
        (merged, "chain", "merged"),
        (
            lambda p: convert(write_base(p / "stage", vocab_size=333), p / "b"),
            "stage",
            "itself a base",
        ),
    ],
)
def test_a_delta_needs_its_own_base(
    tmp_path, make: Callable[[Path], Path], source: str, named: str
):
    base = make(tmp_path)
    with pytest.raises(PoEError, match=named):
        prepare(locate(tmp_path / source), base=locate(base))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--q-bits", "4"], "needs -q"),
        (["--q-mode", "mxfp4"], "needs -q"),
        (["--q-mode", "affine"], "--q-mode needs -q"),
        (["--mlx-path", "-"], "- is no folder's name"),
        (["--q-bits-for", "head=8"], "needs -q"),
        (["-q", "--q-bits", "7"], "invalid choice"),
        (["-q", "--q-bits-for", "head"], "WHAT=BITS"),
        (["-q", "--q-bits-for", "tail=4"], "name head, embed"),
        (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "always has 4 bits"),
        (["-q", "--q-mode", "mxfp4", "--quant-predicate", "mixed_2_6"], "affine only"),
        (["--step", "5"], "no step 5"),
        (["--revision", "main"], "revision"),
        (["--base", "nowhere"], "nowhere"),
        (["--base", ""], "--base is empty"),
        (["--upload-repo", ""], "--upload-repo is empty"),
        (["--upload-repo", "a/b/c"], "--upload-repo a/b/c"),
        (["-q", "--q-bits-for", "head=0"], "q-bits 0"),
        (["-q", "--q-group-size", "0"], "q-group-size 0"),
        (["--q-group-size", "0"], "needs -q"),
        (["-q", "--q-bits", "8", "--quant-predicate", "mixed_2_6"], "leave out --q-bits"),
        (["--verify", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, capfd, flags, named):
    argv = ["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "out"), *flags]
    assert main(argv) in (1, 2)
    error = capfd.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_steps_and_tags_of_nanochat_are_named(tmp_path, capsys):
    run = shutil.copytree(FIXTURES / "nanochat", tmp_path / "run")
    base = run / "base_checkpoints" / "d"
    for kind in ("meta_{}.json", "model_{}.pt"):
        shutil.copy(base / kind.format("000010"), base / kind.format("000200"))
    (base / "model_000200.pt").write_bytes(b"a later step, damaged")
    assert_goldens(convert(base, tmp_path / "out", "--step", "10"), "flat-d8")
    target = ["--mlx-path", str(tmp_path / "other")]
    assert main(["--hf-path", str(base), *target, "--step", "11"]) == 1
    assert "it has: 10, 200" in capsys.readouterr().err
    assert main(["--hf-path", str(base.parent), *target]) == 1
    assert "it holds d: name one" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_says_it_all(tmp_path, capsys):
    argv = ["--hf-path", "poe-tiny-chat", "--mlx-path", str(tmp_path / "out"), "-q", "--dry-run"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    for text in ("16 tensors", "63 tensors", "model.safetensors", "bits per weight", "3,801,230"):
        assert text in printed
    assert not list(tmp_path.iterdir())


def test_verify_prints_every_stage(tmp_path, capsys):
    convert(FIXTURES / "gqa-logop-d8", tmp_path / "out", "--verify")
    printed = capsys.readouterr().out
    rows = [line.split("│") for line in printed.splitlines() if "->" in line and "│" in line]
    assert [row[1].strip() for row in rows] == ["0", "1", "2", "3", "full"]
    assert all(row[2].strip() == "0.00000" for row in rows)


def test_only_a_few_tensors_are_held_at_a_time(tmp_path, monkeypatch):
    """What is read has been written or dropped before the next is read."""
    alive: list[str] = []
    conversion = prepare(locate(FIXTURES / "gqa-logop-d8"))

    def watched(self: Conversion, name: str, array: mx.array) -> dict[str, mx.array]:
        alive.append(name)
        return packed(self, name, array)

    packed, written = Conversion._packed, []
    _ = conversion.layout
    monkeypatch.setattr(Conversion, "_packed", watched)
    write = safetensors_files.TensorWriter.write

    def note(self: object, name: str, array: mx.array) -> None:
        write(self, name, array)  # type: ignore[arg-type]
        written.append(name)
        assert len(alive) == len(written)

    monkeypatch.setattr(safetensors_files.TensorWriter, "write", note)
    conversion.write(tmp_path / "out")
    assert written == list(conversion.weights)


# Sources that are not what they seem


def test_a_tensor_comes_from_the_shard_that_the_index_names(tmp_path):
    base = write_base(tmp_path / "base", shards=2)
    index = base / "model.safetensors.index.json"
    first, last = sorted({*json.loads(index.read_text())["weight_map"].values()})
    held = mx.load(str(base / first))
    stale = {**mx.load(str(base / last)), **{k: mx.zeros_like(v) for k, v in held.items()}}  # type: ignore[dict-item,union-attr]
    before = load(base)[0](mx.array([[1, 2, 3]]))
    mx.save_safetensors(str(base / last), stale)
    assert mx.array_equal(load(base)[0](mx.array([[1, 2, 3]])), before)


def test_a_base_with_other_matrices_is_not_the_deltas(tmp_path):
    base = convert(FIXTURES / "flat-d8", tmp_path / "base")
    arrays = mx.load(str(base / "model.safetensors"))
    assert isinstance(arrays, dict)
    arrays["lm_head.weight"] = mx.zeros_like(arrays["lm_head.weight"])
    mx.save_safetensors(str(base / "model.safetensors"), arrays)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        prepare(locate(FIXTURES / "stage-on-flat"), base=locate(base))
    # Rounding, even to 2 bits, is no difference.
    rough = convert(FIXTURES / "flat-d8", tmp_path / "rough", "-q", "--q-bits", "2")
    prepare(locate(FIXTURES / "stage-on-flat"), base=locate(rough))


def test_what_would_not_load_is_not_written(tmp_path, capsys):
    small = shutil.copytree(FIXTURES / "flat-d8", tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    card = shutil.copytree(FIXTURES / "flat-d8", tmp_path / "card")
    (card / "README.md").write_text("---\nlicense: [\n---\n")
    bomb = shutil.copytree(FIXTURES / "flat-d8", tmp_path / "bomb")
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"a" * n: 254 + n for n in range(2, 1000)}
    encoding = tiktoken.Encoding("b", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    (bomb / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    (bomb / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    for source, named in (
        (small, "vocab_size is 300"),
        (card, "is not a valid model card"),
        (bomb, "vocab_size is 300"),
    ):
        assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
    with pytest.raises(TokenizerError, match="far too long"):
        write_tokenizer(tmp_path, encoding, chat=False)


def test_a_base_is_looked_for_beside_its_delta_only(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    change_config(write_stage(tmp_path / "stage"), base_model_name_or_path="base")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "stage", tmp_path / "elsewhere" / "stage")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="chain so far"):
        load("elsewhere/stage")


def test_names_are_not_markup(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert(FIXTURES / "flat-d8", Path("[/x]"))
    convert(FIXTURES / "stage-on-flat", Path("[red]y"), "--base", "[/x]")
    assert "[/x]" in capsys.readouterr().out
    assert_goldens(tmp_path / "[red]y", "stage-on-flat")


@pytest.mark.parametrize(
    "entry", [{"bits": 4.0, "group_size": 64.0}, {"bits": 0, "group_size": 64}]
)
def test_quantization_entries_that_are_none(tmp_path, entry):
    folder = convert(FIXTURES / "flat-d8", tmp_path / "out", "-q")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": entry}))
    with pytest.raises(CheckpointError, match="no valid quantization"):
        load(folder)


def test_rows_that_nvfp4_cannot_unpack_stay_as_they_are(tmp_path):
    base = write_base(tmp_path / "base", n_embd=48, n_head=3)
    folder = convert(base, tmp_path / "out", "-q", "--q-mode", "nvfp4")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["mode"] == "nvfp4"  # of the matrices whose rows fit
    assert "wte.scales" not in tensors(folder) and "h.0.mlp.c_proj.scales" in tensors(folder)
    assert mx.isfinite(load(folder)[0](mx.array([[1, 2, 3]]))).all()
    # An older version packed them.
    packed = mx.load(str(folder / "model.safetensors"))
    assert isinstance(packed, dict)
    parts = mx.quantize(packed["wte.weight"], 16, 4, mode="nvfp4")
    packed |= dict(zip(("wte.weight", "wte.scales"), parts, strict=True))
    mx.save_safetensors(str(folder / "model.safetensors"), packed)
    with pytest.raises(CheckpointError, match="nvfp4 for wte, whose rows have 48 numbers"):
        load(folder)
