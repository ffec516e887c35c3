"""Loading what is missing, damaged or does not fit: a name for every fault, in one line."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import (
    assert_refused,
    change_config,
    change_tensors,
    write_base,
    write_family,
    write_stage,
    write_tokenizer,
)
from conftest import FIXTURES
from mlx_lm.utils import load_model
from pickles import Calls

from cognica_mlx.convert.conversion import prepare
from cognica_mlx.convert.quantization import scheme
from cognica_mlx.convert.sources import locate
from cognica_mlx.errors import CheckpointError, ConfigError, RequestError, TokenizerError
from mlx_poe import load
from mlx_poe.chat.saved_chat import read_chat
from mlx_poe.commands.convert import main as convert
from mlx_poe.loading.specialists import Specialists


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A base, the same in shards, and a delta, all of which load."""
    folder = tmp_path_factory.mktemp("sound")
    write_base(folder / "base")
    write_base(folder / "shards", shards=2)
    write_stage(folder / "stage")
    for name in ("base", "shards", "stage"):
        load(folder / name)
    return folder


def edited(fields: Mapping[str, Any]) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **fields)


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, change)


def cut(share: float, file: str = "model.safetensors") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(share * len(data))])

    return damage


def written(file: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 12\n"


def pointer(file: str) -> Callable[[Path], None]:
    return written(file, POINTER)


def spoiled(name: str, value: float) -> Callable[[Path], None]:
    """Set one number in the middle of a tensor."""

    def spoil(t: dict[str, np.ndarray]) -> None:
        t[name] = t[name].copy()
        t[name].flat[t[name].size // 2] = value

    return tensors(spoil)


def header_cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    file.write_bytes(file.read_bytes()[: 8 + length - 10])


def in_integers(folder: Path) -> None:
    """Relabel one tensor of bfloat16 as integers of the same width."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["dtype"] = "I16"
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


W, C = "model.safetensors", "config.json"
BASE_FAULTS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (without(C), CheckpointError, "holds no config.json"),
    "config is no JSON": (written(C, "{"), CheckpointError, f"{C} cannot be read as JSON"),
    "config is empty": (written(C, ""), CheckpointError, f"{C} cannot be read as JSON"),
    "config is a list": (written(C, "[1]"), CheckpointError, f"{C} does not hold a JSON object"),
    "config is no UTF-8": (written(C, b"\xff{}"), CheckpointError, f"{C} cannot be read"),
    "config nests deeply": (written(C, "[" * 10**5), CheckpointError, f"{C} cannot be read"),
    "config lacks n_head": (edited({"n_head": None}), ConfigError, "n_head"),
    "config lacks sequence_len": (edited({"sequence_len": None}), ConfigError, "sequence_len"),
    "n_layer is text": (edited({"n_layer": "four"}), ConfigError, "n_layer: 'four'"),
    "stages do not add up": (
        edited({"poe_every": None, "poe_stage_layers": [2, 1]}),
        ConfigError,
        "stage_layers: [2, 1] adds up to 3",
    ),
    **{
        f"{key} is {str(value)[:6]}": (edited({key: value}), ConfigError, key.removeprefix("poe_"))
        for key, value in (
            ("rope_theta", "big"),
            ("rope_theta", 10**400),
            ("poe_alpha", [1]),
            ("poe_stage_layers", 4),
            ("window_pattern", 7),
            ("head_mode", ["dual"]),
        )
    },
    **{
        f"{key} is absurd": (edited({key: 10**12}), ConfigError, f"{key}: {10**12}")
        for key in ("n_layer", "n_head", "n_embd", "vocab_size", "intermediate_size")
    },
    "more layers than tensors": (
        edited({"n_layer": 5}),
        CheckpointError,
        "lacks the tensor h.4.",
    ),
    "fewer layers than tensors": (
        edited({"n_layer": 3}),
        ConfigError,
        "reaches beyond the base's 3 layers",
    ),
    "no weights": (without(W), CheckpointError, f"holds no {W}"),
    "weights without tensors": (
        written(W, struct.pack("<Q", 2) + b"{}"),
        CheckpointError,
        f"{W} holds no tensors",
    ),
    "weights empty": (cut(0), CheckpointError, f"{W} is damaged or incomplete"),
    "weights cut at a third": (cut(1 / 3), CheckpointError, f"{W} is damaged or incomplete"),
    "weights cut at the end": (cut(0.9999), CheckpointError, f"{W} is damaged or incomplete"),
    "weights cut in the header": (header_cut, CheckpointError, f"{W} is damaged or incomplete"),
    "weights cut in the length": (written(W, b"\x10\0\0"), CheckpointError, f"{W} is damaged"),
    "weights are a web page": (written(W, "<html>" * 99), CheckpointError, f"{W} is damaged"),
    "weights are zeros": (written(W, bytes(999)), CheckpointError, f"{W} is damaged"),
    "tensor missing": (
        tensors(lambda t: t.pop("transformer.h.2.mlp.c_fc.weight")),
        CheckpointError,
        "lacks the tensor h.2.mlp.c_fc.weight",
    ),
    "value embedding missing": (
        tensors(lambda t: t.pop("value_embeds.1.weight")),
        CheckpointError,
        "lacks the tensor h.1.attn.value_embed.weight",
    ),
    "tensors unknown": (
        tensors(lambda t: t.update({"lm_head.bias": np.ones(3), "extra": np.ones(3)})),
        CheckpointError,
        "(and 1 more such problems)",
    ),
    "tensor unknown": (
        tensors(lambda t: t.update({"lm_head.bias": np.ones(3)})),
        CheckpointError,
        "holds an unknown tensor lm_head.bias",
    ),
    "tensor twice": (
        tensors(lambda t: t.update({"gpt.lm_head.weight": t["lm_head.weight"]})),
        CheckpointError,
        "two tensors are called lm_head.weight",
    ),
    "tensor of another shape": (
        tensors(lambda t: t.update({"transformer.h.0.attn.c_v.weight": np.ones((64, 32))})),
        CheckpointError,
        "has h.0.attn.c_v.weight of shape (64, 32), not (64, 64)",
    ),
    "embedding without rows": (
        tensors(lambda t: t.update({"transformer.wte.weight": np.ones(64)})),
        CheckpointError,
        "has wte.weight of shape (64,), not (320, 64)",
    ),
    "too few rows": (
        tensors(lambda t: t.update({"lm_head.weight": np.ones((300, 64))})),
        CheckpointError,
        "has lm_head.weight of shape (300, 64), not (320, 64)",
    ),
    "NaN": (
        spoiled("transformer.h.1.mlp.c_fc.weight", np.nan),
        CheckpointError,
        "h.1.mlp.c_fc.weight holds NaN or infinity",
    ),
    "infinity in a table": (
        spoiled("transformer.wte.weight", np.inf),
        CheckpointError,
        "wte.weight holds NaN or infinity",
    ),
    "minus infinity in a scalar": (
        spoiled("resid_lambdas", -np.inf),
        CheckpointError,
        "resid_lambdas holds NaN or infinity",
    ),
    **{
        f"{file} is a pointer": (pointer(file), kind, f"{file} is a Git LFS pointer")
        for file, kind in (
            (W, CheckpointError),
            (C, CheckpointError),
            ("generation_config.json", CheckpointError),
            ("tokenizer.pkl", TokenizerError),
        )
    },
    "tensor in integers": (in_integers, CheckpointError, "lm_head.weight in mlx.core.int16"),
    "no tokenizer": (without("tokenizer.pkl"), TokenizerError, "tokenizer.pkl is missing"),
    "tokenizer is cut": (cut(0.5, "tokenizer.pkl"), TokenizerError, "tokenizer.pkl is damaged"),
    "tokenizer of another model": (
        lambda folder: write_tokenizer(folder, 320),
        TokenizerError,
        "ids up to 319, but the model's vocabulary has only 301",
    ),
    **{
        f"eos is {eos}": (
            written("generation_config.json", f'{{"eos_token_id": {eos}}}'),
            CheckpointError,
            "generation_config.json: eos_token_id",
        )
        for eos in ('"</s>"', "[2, [3]]", "1.5", "true", "{}")
    },
    "generation_config is no JSON": (
        written("generation_config.json", "eos: 3"),
        CheckpointError,
        "generation_config.json cannot be read as JSON",
    ),
}


@pytest.mark.parametrize(("damage", "kind", "named"), BASE_FAULTS.values(), ids=BASE_FAULTS.keys())
def test_a_damaged_base_is_refused_by_name(sound, tmp_path, damage, kind, named):
    folder = Path(shutil.copytree(sound / "base", tmp_path / "model"))
    damage(folder)
    message = assert_refused(folder, kind, named)
    if kind is not TokenizerError:
        assert str(folder) in message


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def shard_called(name: object) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        index = json.loads(index_of(folder).read_text())
        index["weight_map"]["lm_head.weight"] = name
        index_of(folder).write_text(json.dumps(index))

    return rename


SECOND = "model-00002-of-00002.safetensors"
SHARD_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (without(SECOND), f"{SECOND} is missing"),
    "shard cut": (cut(0.7, SECOND), f"{SECOND} is damaged or incomplete"),
    "shard is a folder": (
        lambda folder: ((folder / SECOND).unlink(), (folder / SECOND).mkdir()),
        f"{SECOND} is missing",
    ),
    **{
        f"shard {name[:20]!r}": (shard_called(name), "which is not a plain file name")
        for name in ("../base/model.safetensors", "/etc/passwd", "..\\x", "a/b", "..", ".", "")
    },
    "shard of a very long name": (shard_called("x" * 999), "is damaged or incomplete"),
    "shard is a number": (shard_called(7), "/7 is missing"),
    "promise not kept": (
        written(
            "model.safetensors.index.json", json.dumps({"weight_map": {"no.such.tensor": SECOND}})
        ),
        f"lists no.such.tensor in {SECOND}",
    ),
    "shard is a pointer": (pointer(SECOND), f"{SECOND} is a Git LFS pointer"),
    "index is a pointer": (
        pointer("model.safetensors.index.json"),
        "index.json is a Git LFS pointer",
    ),
    "no weight_map": (written("model.safetensors.index.json", "{}"), "has no weight_map"),
    "weight_map a list": (
        written("model.safetensors.index.json", '{"weight_map": ["x"]}'),
        "has no weight_map",
    ),
    "weight_map empty": (
        written("model.safetensors.index.json", '{"weight_map": {}}'),
        "has no weight_map",
    ),
    "index no JSON": (written("model.safetensors.index.json", "{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize(("damage", "named"), SHARD_FAULTS.values(), ids=SHARD_FAULTS.keys())
def test_damaged_shards_are_refused_by_name(sound, tmp_path, damage, named):
    # The file that a shard's name would lead to, were it followed, is a good one.
    shutil.copytree(sound / "base", tmp_path / "base")
    folder = Path(shutil.copytree(sound / "shards", tmp_path / "model"))
    damage(folder)
    assert str(folder) in assert_refused(folder, CheckpointError, named)


def on_base(reference: str) -> Callable[[Path], None]:
    return edited({"base_model_name_or_path": reference})


def as_base_layer(t: dict[str, np.ndarray]) -> None:
    t["transformer.h.3.mlp.c_fc.weight"] = t["transformer.h.4.mlp.c_fc.weight"]


DELTA_FAULTS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no delta file": (without("delta.safetensors"), CheckpointError, "holds no delta.safetensors"),
    "delta cut": (cut(0.5, "delta.safetensors"), CheckpointError, "delta.safetensors is damaged"),
    **{
        f"lacks {name}": (
            tensors(lambda t, name=name: t.pop(name)),  # type: ignore[misc]
            CheckpointError,
            f"the delta lacks {name.removeprefix('transformer.')}",
        )
        for name in ("lm_head_stage.weight", "transformer.wte.weight", "x0_lambdas")
    },
    "delta is a pointer": (
        pointer("delta.safetensors"),
        CheckpointError,
        "delta.safetensors is a Git LFS pointer",
    ),
    "NaN in its head": (
        spoiled("lm_head_stage.weight", np.nan),
        CheckpointError,
        "model: lm_head_specialists.0.weight holds NaN or infinity",
    ),
    "infinity in its base": (
        lambda folder: spoiled("transformer.h.1.attn.c_q.weight", np.inf)(folder.parent / "base"),
        CheckpointError,
        "base: h.1.attn.c_q.weight holds NaN or infinity",
    ),
    "lacks a block's matrix": (
        tensors(lambda t: t.pop("transformer.h.4.attn.c_proj.weight")),
        CheckpointError,
        "lacks the tensor h.4.attn.c_proj.weight",
    ),
    "holds a base layer": (
        tensors(as_base_layer),
        CheckpointError,
        "a delta may not hold h.3.mlp.c_fc.weight",
    ),
    "holds a value embedding": (
        tensors(lambda t: t.update({"value_embeds.4.weight": np.ones((320, 64))})),
        CheckpointError,
        "holds an unknown tensor h.4.attn.value_embed.weight",
    ),
    "holds the shared head": (
        tensors(lambda t: t.update({"lm_head.weight": np.ones((320, 64))})),
        CheckpointError,
        "a delta may not hold lm_head.weight",
    ),
    "lambdas of another depth": (
        tensors(lambda t: t.update({"resid_lambdas": np.ones(4)})),
        CheckpointError,
        "has resid_lambdas of shape (4,), not (5,)",
    ),
    "of another width": (edited({"n_embd": 128}), ConfigError, "n_embd: 128 in the specialist"),
    "over another depth": (edited({"frozen_layers": 3}), ConfigError, "frozen_layers"),
    "of another length": (edited({"new_layers": 2}), ConfigError, "new_layers: 2"),
    "of a length in words": (edited({"new_layers": "one"}), ConfigError, "new_layers: 'one'"),
    "of absurd depth": (
        edited({"n_layer": 10**12, "new_layers": 10**12 - 4}),
        ConfigError,
        f"{10**12}",
    ),
    "its own base": (on_base("."), CheckpointError, "is circular"),
    "base missing": (on_base("../gone"), CheckpointError, "../gone: no such folder"),
    "base is a file": (on_base("config.json"), CheckpointError, "config.json"),
    "base of a user unknown": (on_base("~nobody-here/x"), CheckpointError, "~nobody-here/x"),
    "base has a NUL": (on_base("a\0b"), CheckpointError, "no such folder"),
    "base of a very long name": (on_base("x" * 9999), CheckpointError, "no such folder"),
    "base without config": (on_base(".."), CheckpointError, "holds no config.json"),
    "base is a delta alone": (
        lambda folder: (
            shutil.copytree(folder, folder / "other"),
            change_config(folder / "other", base_model_name_or_path=None, frozen_layers=None),
            on_base("other")(folder),
        ),
        CheckpointError,
        "other holds no model.safetensors",
    ),
}


@pytest.mark.parametrize(
    ("damage", "kind", "named"), DELTA_FAULTS.values(), ids=DELTA_FAULTS.keys()
)
def test_a_damaged_delta_is_refused_by_name(sound, tmp_path, damage, kind, named):
    shutil.copytree(sound / "base", tmp_path / "base")
    folder = Path(shutil.copytree(sound / "stage", tmp_path / "model"))
    damage(folder)
    message = assert_refused(folder, kind, named)
    assert str(folder) in message or str(folder.parent) in message


@pytest.mark.parametrize("way", ["lazily", "quantized", "attached", "converted", "under mlx-lm"])
def test_whatever_reads_weights_looks_for_nan(sound, tmp_path, way, capsys):
    shutil.copytree(sound / "base", tmp_path / "base")
    stage = Path(shutil.copytree(sound / "stage", tmp_path / "stage"))
    spoiled("transformer.h.4.mlp.c_fc.weight", np.nan)(stage)
    named = "h.4.mlp.c_fc.weight holds NaN"
    if way == "attached":
        with pytest.raises(CheckpointError, match=named):
            Specialists(load(sound / "base")[0]).attach("stage", stage)
    elif way == "converted":
        assert convert(["--hf-path", str(stage), "--mlx-path", str(tmp_path / "out")]) == 1
        assert named in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    elif way == "under mlx-lm":
        prepare(locate(sound / "base")).write(tmp_path / "out")
        spoiled_file(tmp_path / "out", "lm_head.weight", lambda a: a * np.inf)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN"):
            load_model(tmp_path / "out", trust_remote_code=True)
    else:
        assert_refused(
            stage, CheckpointError, named, **{"lazy": True} if way == "lazily" else {"quantize": 4}
        )


def spoiled_file(folder: Path, name: str, change: Callable[[mx.array], mx.array]) -> None:
    """Change one tensor of a converted folder."""
    arrays = mx.load(str(folder / W))
    assert isinstance(arrays, dict)
    arrays[name] = change(arrays[name])
    mx.save_safetensors(str(folder / W), arrays)


@pytest.mark.parametrize(
    ("mode", "part", "byte"),
    [
        *(("affine", "scales", None), ("affine", "biases", None), ("mxfp4", "scales", 0xFF)),
        *(("mxfp8", "scales", 0xFE), ("mxfp8", "weight", 0xFF), ("nvfp4", "scales", 0x7F)),
    ],
)
def test_packed_matrices_are_looked_at_too(sound, tmp_path, mode, part, byte):
    prepare(locate(sound / "base"), quantization=scheme(mode=mode)).write(tmp_path / "out")
    load(tmp_path / "out")

    def spoil(array: mx.array) -> mx.array:
        if byte is None:
            return array * float("inf")
        numbers = np.array(array).view(np.uint8)
        numbers[3, 1] = byte
        return mx.array(numbers.view(np.uint32) if part == "weight" else numbers)

    name = f"h.2.attn.c_v.{part}"
    spoiled_file(tmp_path / "out", name, spoil)
    assert_refused(tmp_path / "out", CheckpointError, f"{name} holds NaN or infinity")


def test_numbers_too_large_for_a_type_are_named(tmp_path):
    write_base(tmp_path / "base")
    spoiled("transformer.h.0.mlp.c_fc.weight", 1e9)(tmp_path / "base")
    load(tmp_path / "base", dtype="bfloat16")
    named = "h.0.mlp.c_fc.weight has numbers too large for float16"
    assert_refused(tmp_path / "base", RequestError, named, dtype="float16")
    with pytest.raises(RequestError, match=named):
        prepare(locate(tmp_path / "base"), dtype="float16").write(tmp_path / "out")


def test_pointers_beside_a_converted_model_are_named(tmp_path):
    folder = tmp_path / "out"
    prepare(locate(FIXTURES / "flat-d8"), draft_bits="4").write(folder)
    written("draft.safetensors", POINTER)(folder)
    assert_refused(folder, CheckpointError, "draft.safetensors is a Git LFS pointer")
    (folder / "draft.safetensors").unlink()
    written("poe_calibration.json", POINTER)(folder)
    assert "json is a Git LFS pointer" in str(load(folder)[0].calibration_problem)
    written("tokenizer.json", POINTER)(folder)
    assert_refused(folder, TokenizerError, "tokenizer.json is a Git LFS pointer")
    written("chat.safetensors", POINTER)(folder)
    with pytest.raises(CheckpointError, match=r"chat\.safetensors is a Git LFS pointer"):
        read_chat(folder / "chat.safetensors")


def test_a_missing_base_is_named_with_the_chain_so_far(tmp_path):
    write_family(tmp_path)
    shutil.rmtree(tmp_path / "base")
    message = assert_refused(tmp_path / "three", CheckpointError, "../base: no such folder")
    chain = " -> ".join(str(tmp_path / name) for name in ("three", "two", "one"))
    assert f"(chain so far: {chain})" in message


def test_a_ring_of_deltas_is_named_link_by_link(tmp_path):
    write_family(tmp_path)
    change_config(tmp_path / "one", base_model_name_or_path="../two")
    ring = " -> ".join(str(tmp_path / name) for name in ("three", "two", "one", "two"))
    assert_refused(tmp_path / "three", CheckpointError, f"is circular: {ring}")


def test_a_ring_through_a_link_is_seen(tmp_path):
    write_base(tmp_path / "base")
    folder = write_stage(tmp_path / "stage")
    (tmp_path / "alias").symlink_to(folder)
    change_config(folder, base_model_name_or_path="../alias")
    assert_refused(folder, CheckpointError, "is circular")


def test_a_base_and_a_delta_of_different_widths(tmp_path):
    write_base(tmp_path / "base")
    folder = write_stage(tmp_path / "stage")
    write_base(tmp_path / "base", n_embd=128)
    message = assert_refused(folder, ConfigError, "n_embd: 64 in the specialist, 128 in its base")
    assert str(folder) in message


def test_a_hostile_tokenizer_is_refused_and_does_not_run(tmp_path):
    folder, canary = write_base(tmp_path / "base"), tmp_path / "ran"
    attack = pickle.dumps(Calls(os.system, f"touch '{canary}'"))
    (folder / "tokenizer.pkl").write_bytes(attack)
    assert_refused(folder, TokenizerError, "system': refused, nothing was run")
    assert not canary.exists()
    pickle.loads(attack)  # the attack is real
    assert canary.exists()


NAMES = {
    "missing": ("gone", "no such folder"),
    "missing, deeper": ("/gone/away/for/good", "no such folder"),
    "a file": (str(FIXTURES / "flat-d8" / "config.json"), "is a file"),
    "no model": (str(FIXTURES), "holds no config.json"),
    "a user unknown": ("~nobody-here/model", "no such folder"),
    "NUL": ("a\0b", "no such folder"),
    "long": ("x" * 5000, "no such folder"),
    "long, with an owner": ("a/" + "x" * 5000, "no such folder"),
    "half an id": ("org/", "no such folder"),
    "three parts": ("a/b/c", "not a hub id"),
    "dots": ("org/..", "not a hub id"),
    "spaces": ("org/a b", "not a hub id"),
    "a URL": ("https://huggingface.co/org/name", "not a hub id"),
}


@pytest.mark.parametrize(("name", "named"), NAMES.values(), ids=NAMES.keys())
def test_names_that_lead_nowhere(tmp_path, monkeypatch, name, named):
    monkeypatch.chdir(tmp_path)
    message = assert_refused(name, CheckpointError, named)
    assert name in message


def test_an_empty_name_is_not_the_default_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused("", CheckpointError, "holds no config.json")


@pytest.mark.parametrize("name", ["poe-tiny", str(FIXTURES / "flat-d8")])
def test_only_hub_repositories_have_revisions(name):
    assert_refused(
        name, CheckpointError, "is a local folder, which has no revision v2", revision="v2"
    )


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("flat-d8", {"dtype": "float8"}, "dtype 'float8'"),
        ("flat-d8", {"quantize": 7}, "quantize 7"),
        ("flat-d8", {"quantize": True}, "quantize True"),
        ("flat-d8", {"head_mode": "base"}, "is not a specialist"),
        ("stage-on-flat", {"head_mode": "both"}, "head_mode 'both' is not one of dual"),
    ],
)
def test_unknown_options_are_named(name, options, named):
    assert_refused(FIXTURES / name, RequestError, named, **options)
