"""Loading: every layout of folder and hub cache against the oracle, and a name for every fault."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiktoken
from conftest import FIXTURES, fixture
from mlx.utils import tree_flatten
from reference import Reference, read_tensors, write_checkpoint, write_delta, write_tensors

from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import CheckpointError, ConfigError, RequestError, TokenizerError
from cognica_mlx.model import PoEModel
from mlx_poe import load, stream_generate
from mlx_poe.tokenizer import Tokenizer

TOLERANCE = 2e-4
SHORT, LONG = 40, 300  # tokens; LONG lies beyond every window of a sequence_len of 256
SPECIAL = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
SPECIAL += ("python_start", "python_end", "output_start", "output_end")

SMALL: dict[str, Any] = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 64,
    "sequence_len": 256,
    "vocab_size": 301,
    "poe_every": 2,
}
OTHER_SPELLINGS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "sequence_len": "max_position_embeddings",
}
OWN_HEADS = {"per_stage_head": True, "poe_stage_layers": [2, 1, 1], "poe_every": None}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of single bytes, with the special tokens at the vocabulary's end."""
    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={f"<|{s}|>": vocab_size - 9 + i for i, s in enumerate(SPECIAL)},
    )
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))


def write_base(folder: Path, seed: int = 1, **changes: Any) -> Path:
    options = SMALL | changes
    write_checkpoint(folder, seed, **options)
    write_tokenizer(folder, options["vocab_size"])
    return folder


def write_stage(folder: Path, seed: int = 2, **changes: Any) -> Path:
    write_delta(folder, seed, **({"base": "../base", "new_layers": 1} | changes))
    write_tokenizer(folder, read_config(folder)["vocab_size"])
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    fields = json.loads((folder / "config.json").read_text())
    assert isinstance(fields, dict)
    return fields


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's config.json; None takes them away."""
    fields = read_config(folder) | changes
    kept = {key: value for key, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Edit the tensors of a folder's one safetensors file."""
    (file,) = folder.glob("*.safetensors")
    tensors = read_tensors(file)
    change(tensors)
    write_tensors(file, tensors, "bfloat16")


def some_tokens(vocab_size: int, length: int = SHORT) -> np.ndarray:
    return np.random.default_rng(length).integers(0, vocab_size, length)


def assert_equals_oracle(model: PoEModel, oracle: Reference, length: int = SHORT) -> None:
    """Full depth and every stage of the base, against plain numpy."""
    tokens = some_tokens(model.config.vocab_size, length)
    answers = oracle.predictions(tokens)
    ours = {"full": model(mx.array(tokens[None]))}
    together = model.forward_all_stages(mx.array(tokens[None]))
    assert len(together) == model.poe_n_stages
    for stage in range(len(model.config.stage_layers)):
        ours[f"stage_{stage}"] = together[stage]
    assert ours.keys() == answers.keys() - {"logop", "base", "spec"}
    for key, logits in ours.items():
        np.testing.assert_allclose(
            np.array(logits)[0], answers[key], rtol=0, atol=TOLERANCE, err_msg=key
        )


def rms_error(ours: mx.array, answer: mx.array) -> float:
    """Root mean square of the difference, as a share of the answer's own spread."""
    return float((mx.sqrt(mx.mean(mx.square(ours - answer))) / mx.std(answer)).item())


# --- bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        pytest.param({"n_layer": 12, "poe_every": 3}, SHORT, id="twelve layers"),
        pytest.param(
            {"n_layer": 7, "poe_every": None, "poe_stage_layers": [4, 2, 1]}, LONG, id="uneven"
        ),
        pytest.param({"n_layer": 5, "window_pattern": "SL"}, LONG, id="SL, a short last stage"),
        pytest.param({"n_kv_head": 2, "vocab_size": 333}, SHORT, id="grouped queries"),
        pytest.param({"n_kv_head": 1, "head_dim": 32}, SHORT, id="one kv head, wide heads"),
        pytest.param({"intermediate_size": 160}, SHORT, id="own MLP width"),
        pytest.param({**OWN_HEADS, "poe_alpha": 0.5, "n_kv_head": 2}, LONG, id="own heads"),
        pytest.param({"poe_every": None}, SHORT, id="one stage"),
        pytest.param({"rope_theta": 500.0, "n_embd": 48, "n_head": 2}, SHORT, id="own theta"),
        pytest.param({"dtype": "float32"}, SHORT, id="stored in float32"),
        pytest.param({"shards": 3}, SHORT, id="shards"),
        *(
            pytest.param({"prefix": prefix}, SHORT, id=prefix)
            for prefix in ("gpt.", "model.", "_orig_mod.", "_orig_mod.gpt.", "model._orig_mod.")
        ),
    ],
)
def test_bases_equal_the_oracle(tmp_path, changes, length):
    folder = write_base(tmp_path, seed=len(str(changes)), **changes)
    model, tokenizer = load(folder, dtype="float32")
    assert tokenizer.vocab_size == model.config.vocab_size
    assert_equals_oracle(model, Reference.from_folder(folder), length)


def test_other_spellings_of_the_configuration(tmp_path):
    folder = write_base(tmp_path, n_kv_head=2)
    oracle = Reference.from_folder(folder)
    fields = read_config(folder)
    change_config(folder, **{new: fields[old] for old, new in OTHER_SPELLINGS.items()})
    change_config(folder, **dict.fromkeys(OTHER_SPELLINGS))
    assert_equals_oracle(load(folder, dtype="float32")[0], oracle)


def test_old_checkpoints_lack_lambdas_and_window_pattern(tmp_path):
    folder = write_base(tmp_path)

    def age(tensors: dict[str, np.ndarray]) -> None:
        del tensors["resid_lambdas"], tensors["x0_lambdas"]

    change_tensors(folder, age)
    change_config(folder, window_pattern=None)
    model, _ = load(folder, dtype="float32")
    assert model.config.windows == (256,) * 4
    assert model.resid_lambdas.tolist() == [1] * 4
    assert model.x0_lambdas.tolist() == [0] * 4
    assert_equals_oracle(model, Reference.from_folder(folder), LONG)


@pytest.mark.parametrize(
    "absent",
    [
        ("n_layer",),
        ("n_embd",),
        ("n_kv_head",),
        ("head_dim",),
        ("intermediate_size",),
        ("vocab_size",),
        ("per_stage_head",),
        ("n_layer", "n_embd", "n_kv_head", "head_dim", "intermediate_size", "vocab_size"),
    ],
)
def test_what_the_tensors_tell_need_not_be_configured(tmp_path, absent):
    folder = write_base(
        tmp_path, **OWN_HEADS, n_kv_head=2, head_dim=32, intermediate_size=160, vocab_size=320
    )
    whole = load(folder)[0].config
    change_config(folder, **dict.fromkeys(absent))
    assert load(folder)[0].config == whole


def test_position_tables_are_passed_over_and_padding_may_differ(tmp_path):
    folder = write_base(tmp_path)
    oracle = Reference.from_folder(folder)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["cos"] = tensors["transformer.rotary.inv_freq"] = np.ones((2, 3), np.float32)
        for name in ("transformer.wte.weight", "lm_head.weight", "value_embeds.1.weight"):
            tensors[name] = tensors[name][:301]

    change_tensors(folder, change)
    assert_equals_oracle(load(folder, dtype="float32")[0], oracle)


@pytest.mark.parametrize(
    ("eos", "expected"), [("7", {7}), ("[7, 8]", {7, 8}), ("null", set()), ("[]", set())]
)
def test_generation_defaults_add_tokens_to_stop_at(tmp_path, eos, expected):
    folder = write_base(tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    assert load(folder)[1].eos_token_ids == {292, 296} | expected  # <|bos|>, <|assistant_end|>


def test_lazy_loading_gives_the_same_model(tmp_path):
    folder = write_base(tmp_path)
    assert_equals_oracle(load(folder, dtype="float32", lazy=True)[0], Reference.from_folder(folder))


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        # Measured: 0.014, 0.0017, 0.019 and 0.32. The floor shows that the option took effect.
        ({"dtype": "bfloat16"}, 0.002, 0.03),
        ({"dtype": "float16"}, 0.0002, 0.004),
        ({"dtype": "float32", "quantize": 8}, 0.004, 0.06),
        ({"dtype": "float32", "quantize": 4}, 0.06, 0.8),
    ],
    ids=str,
)
def test_smaller_types_stay_near(tmp_path, options, least, most):
    folder = write_base(tmp_path, n_layer=6)
    tokens = mx.array(some_tokens(301)[None])
    answer = load(folder, dtype="float32")[0](tokens)
    model, _ = load(folder, **options)
    logits = model(tokens)
    assert logits.dtype == mx.float32
    assert least < rms_error(logits, answer) < most
    floats = {a.dtype for _, a in tree_flatten(model.parameters())} - {mx.uint32}
    assert floats == {getattr(mx, options["dtype"])}


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_other_bits_quantise_the_matrices_and_leave_the_gates(tmp_path, bits):
    model, _ = load(write_base(tmp_path), quantize=bits)
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
    block = model.h[1]
    matrices = [block.attn.c_q, block.attn.value_embed, block.mlp.c_fc, block.mlp.c_proj]
    for matrix in (*matrices, model.wte, model.lm_head):
        assert isinstance(matrix, nn.QuantizedLinear | nn.QuantizedEmbedding)
        assert matrix.bits == bits
    for gate in (block.attn.ve_gate, model.smear_gate):
        assert not isinstance(gate, nn.QuantizedLinear)


# --- specialists ----------------------------------------------------------------------------------


def write_family(folder: Path, share_base: bool = False, **base: Any) -> Path:
    """A base, a specialist on it and two more on top of that; the last one's folder."""
    write_base(folder / "base", **base)
    write_stage(folder / "one", 2, new_layers=2, share_base=share_base, prefix="gpt.")
    write_stage(folder / "two", 3, base="../one", prefix="_orig_mod.")
    return write_stage(folder / "three", 4, base=str(folder / "two"), share_base=share_base)


@pytest.mark.parametrize("name", ["one", "two", "three"])
@pytest.mark.parametrize("share_base", [False, True])
def test_deltas_and_chains_equal_the_oracle(tmp_path, name, share_base):
    write_family(tmp_path, share_base, n_kv_head=2)
    model, _ = load(tmp_path / name, dtype="float32")
    depth = ["base", "one", "two", "three"].index(name)
    assert model.poe_n_stages == 2 + depth
    assert model.poe_stage_boundary_layers == (1, 3, 5, 6, 7)[: 2 + depth]
    assert model.config.backout_layer == 2
    assert_equals_oracle(model, Reference.from_folder(tmp_path / name), LONG if depth == 3 else 40)


def test_a_delta_on_a_base_with_own_heads_equals_the_oracle(tmp_path):
    write_base(tmp_path / "base", **OWN_HEADS)
    folder = write_stage(tmp_path / "stage")
    model, _ = load(folder, dtype="float32")
    assert model.poe_n_stages == 4
    assert_equals_oracle(model, Reference.from_folder(folder))


def test_heads_of_a_cascade_may_be_padded_differently(tmp_path):
    write_base(tmp_path / "base")
    folder = write_stage(tmp_path / "stage")
    oracle = Reference.from_folder(folder)
    change_tensors(folder, lambda t: t.update({k: v[:301] for k, v in t.items() if len(v) == 320}))
    assert_equals_oracle(load(folder, dtype="float32")[0], oracle)


@pytest.mark.parametrize(
    ("head_mode", "key"), [("dual", "full"), ("base", "base"), ("specialist", "spec")]
)
def test_head_modes_of_a_chain_equal_the_oracle(tmp_path, head_mode, key):
    folder = write_family(tmp_path)
    tokens = some_tokens(301)
    model, _ = load(folder, dtype="float32", head_mode=head_mode)
    answer = Reference.from_folder(folder).predictions(tokens)[key]
    ours = np.array(model(mx.array(tokens[None])))[0]
    np.testing.assert_allclose(ours, answer, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "absent",
    [("n_layer",), ("new_layers",), ("frozen_layers",), ("new_layers", "frozen_layers"), "all"],
)
def test_a_delta_needs_little_configuration(tmp_path, absent):
    write_base(tmp_path / "base")
    folder = write_stage(tmp_path / "stage", new_layers=2)
    whole = load(folder)[0].config
    if absent == "all":
        absent = read_config(folder).keys() - {"base_model_name_or_path"}
    change_config(folder, **dict.fromkeys(absent))
    assert load(folder)[0].config == whole


# --- built-in models ------------------------------------------------------------------------------

TINY = json.loads((FIXTURES / "poe-tiny-goldens.json").read_text())


def test_the_default_model_is_poe_tiny():
    model, tokenizer = load()
    named, _ = load("poe-tiny")
    assert model.poe_n_stages == 4
    assert tokenizer.vocab_size == model.config.vocab_size == 2048
    assert model.config == named.config
    ours, theirs = tree_flatten(model.parameters()), tree_flatten(named.parameters())
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    kind = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    assert model.lm_head.weight.dtype == kind


def test_the_built_in_specialist_has_a_fifth_stage():
    model, tokenizer = load("poe-tiny-chat")
    assert model.poe_n_stages == 5
    assert model.config.specialist_layers == (2,)
    assert tokenizer.eos_token_ids == {2039, 2043}


def test_a_folder_of_that_name_comes_before_the_built_in_model(tmp_path, monkeypatch):
    write_base(tmp_path / "poe-tiny")
    monkeypatch.chdir(tmp_path)
    assert load("poe-tiny")[0].config.vocab_size == 301


@pytest.mark.parametrize("entry", TINY["base"][::3], ids=range(0, len(TINY["base"]), 3))
def test_streamed_tokens_of_the_base_are_the_goldens(entry):
    model, tokenizer = fixture("poe-tiny")
    endless = Tokenizer(tokenizer.encoding, eos_token_ids=[])  # as the goldens were made
    modes: dict[str, dict[str, Any]] = {"full": {}}
    modes |= {f"stage_{k}": {"mode": "stage", "stage": k} for k in range(4)}
    for key, options in modes.items():
        count = len(entry[key])
        stream = stream_generate(model, endless, entry["prompt"], max_tokens=count, **options)
        assert [response.token for response in stream] == entry[key]


@pytest.mark.parametrize("entry", TINY["chat"], ids=range(len(TINY["chat"])))
def test_streamed_tokens_of_the_specialist_are_the_goldens(entry):
    model, tokenizer = fixture("poe-tiny-chat")
    responses = list(stream_generate(model, tokenizer, entry["prompt"], max_tokens=60))
    assert [response.token for response in responses] == entry["full"]
    ended = entry["full"][-1] == tokenizer.token_id("<|assistant_end|>")
    assert responses[-1].finish_reason == ("stop" if ended else "length")


# --- faults ---------------------------------------------------------------------------------------


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


def assert_refused(folder: Path | str, kind: type[Exception], named: str, **options: Any) -> str:
    """Loading fails with this kind of error, in one line that holds `named`."""
    with pytest.raises((CheckpointError, ConfigError, TokenizerError, RequestError)) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert caught.type is kind, message
    assert named in message
    assert "\n" not in message
    return message


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
    "weights empty": (cut(0), CheckpointError, f"{W} is damaged or not whole"),
    "weights cut at a third": (cut(1 / 3), CheckpointError, f"{W} is damaged or not whole"),
    "weights cut at the end": (cut(0.9999), CheckpointError, f"{W} is damaged or not whole"),
    "weights cut in the header": (header_cut, CheckpointError, f"{W} is damaged or not whole"),
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
    "tensor in integers": (in_integers, CheckpointError, "lm_head.weight in mlx.core.int16"),
    "no tokenizer": (without("tokenizer.pkl"), TokenizerError, "tokenizer.pkl is missing"),
    "tokenizer is cut": (cut(0.5, "tokenizer.pkl"), TokenizerError, "tokenizer.pkl is damaged"),
    "tokenizer of another model": (
        lambda folder: write_tokenizer(folder, 320),
        TokenizerError,
        "ids up to 319, the model's vocabulary only 301",
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
    "shard cut": (cut(0.7, SECOND), f"{SECOND} is damaged or not whole"),
    "shard is a folder": (
        lambda folder: ((folder / SECOND).unlink(), (folder / SECOND).mkdir()),
        f"{SECOND} is missing",
    ),
    **{
        f"shard {name[:20]!r}": (shard_called(name), "which is not a plain file name")
        for name in ("../base/model.safetensors", "/etc/passwd", "..\\x", "a/b", "..", ".", "")
    },
    "shard of a very long name": (shard_called("x" * 999), "is damaged or not whole"),
    "shard is a number": (shard_called(7), "/7 is missing"),
    "promise not kept": (
        written(
            "model.safetensors.index.json", json.dumps({"weight_map": {"no.such.tensor": SECOND}})
        ),
        f"promises no.such.tensor in {SECOND}",
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
    "its own base": (on_base("."), CheckpointError, "goes in a circle"),
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


def test_a_missing_base_is_named_with_the_chain_so_far(tmp_path):
    write_family(tmp_path)
    shutil.rmtree(tmp_path / "base")
    message = assert_refused(tmp_path / "three", CheckpointError, "../base: no such folder")
    chain = " -> ".join(str(tmp_path / name) for name in ("three", "two", "one"))
    assert f"(chain walked so far: {chain})" in message


def test_a_ring_of_deltas_is_named_link_by_link(tmp_path):
    write_family(tmp_path)
    change_config(tmp_path / "one", base_model_name_or_path="../two")
    ring = " -> ".join(str(tmp_path / name) for name in ("three", "two", "one", "two"))
    assert_refused(tmp_path / "three", CheckpointError, f"goes in a circle: {ring}")


def test_a_ring_through_a_link_is_seen(tmp_path):
    write_base(tmp_path / "base")
    folder = write_stage(tmp_path / "stage")
    (tmp_path / "alias").symlink_to(folder)
    change_config(folder, base_model_name_or_path="../alias")
    assert_refused(folder, CheckpointError, "goes in a circle")


def test_a_base_and_a_delta_of_different_widths(tmp_path):
    write_base(tmp_path / "base")
    folder = write_stage(tmp_path / "stage")
    write_base(tmp_path / "base", n_embd=128)
    message = assert_refused(folder, ConfigError, "n_embd: 64 in the specialist, 128 in its base")
    assert str(folder) in message


class Harm:
    """Unpickles to a call that leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


def test_a_hostile_tokenizer_is_refused_and_does_not_run(tmp_path):
    folder, canary = write_base(tmp_path / "base"), tmp_path / "ran"
    attack = pickle.dumps(Harm(canary))
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
    assert_refused(name, CheckpointError, "a revision (v2) has no meaning", revision="v2")


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


# --- the hub --------------------------------------------------------------------------------------

COMMITS = {"main": "a1" * 20, "v0": "b2" * 20}
LOADER = """
import json, sys
import mlx.core as mx
from cognica_mlx.errors import PoEError
from mlx_poe import load
for options in json.loads(sys.argv[1]):
    try:
        model, _ = load(options.pop("name"), dtype="float32", **options)
        print(json.dumps(model(mx.array([[5, 6, 7]]))[0, -1].tolist()))
    except PoEError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def cache_repository(hub: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Lay a model folder out as huggingface_hub keeps a downloaded repository."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMITS[revision]
    for part in (snapshot, repository / "blobs", repository / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = f"{COMMITS[revision][:8]}{file.name.encode().hex()}"
        shutil.copyfile(file, repository / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    (repository / "refs" / revision).write_text(COMMITS[revision])


def load_offline(hub: Path, calls: list[dict[str, str]]) -> list[Any]:
    """What each call of `load` gives, offline; huggingface_hub reads its variables on import."""
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HOME": str(hub.parent)}
    result = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(calls)],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        cwd=hub.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Families of models under /folder, and the same in a hub cache at /hub."""
    folder = tmp_path_factory.mktemp("hub")
    write_base(folder / "base", seed=1)
    write_base(folder / "old", seed=5)
    write_stage(folder / "stage", seed=2)
    cache_repository(folder / "hub", "org/base", folder / "base")
    cache_repository(folder / "hub", "org/base", folder / "old", "v0")
    references = {"stage": "org/base", "orphan": "org/gone"}
    references |= {"escape": "../../../../../base", "absolute": str(folder / "base")}
    for name, reference in references.items():
        copy = shutil.copytree(folder / "stage", folder / f"{name}-on-hub")
        change_config(Path(copy), base_model_name_or_path=reference)
        cache_repository(folder / "hub", f"org/{name}", Path(copy))
    # Where the program is run there is another folder of the base's name.
    shutil.copytree(folder / "old", folder / "org" / "base")
    return folder


def last_logits(folder: Path) -> list[float]:
    model, _ = load(folder, dtype="float32")
    return model(mx.array([[5, 6, 7]]))[0, -1].tolist()  # type: ignore[return-value]


def test_models_come_from_the_hub_cache(hub):
    shutil.move(hub / "org", hub / "aside")
    found = load_offline(
        hub / "hub",
        [
            {"name": "org/base"},
            {"name": "org/base", "revision": "v0"},
            {"name": "org/base", "revision": COMMITS["v0"]},
            {"name": str(hub / "stage-on-hub")},
        ],
    )
    shutil.move(hub / "aside", hub / "org")
    base, old = last_logits(hub / "base"), last_logits(hub / "old")
    assert found == [base, old, old, last_logits(hub / "stage")]


def test_a_delta_from_the_hub_stands_on_the_hub_alone(hub):
    found = load_offline(
        hub / "hub",
        [{"name": f"org/{name}"} for name in ("stage", "orphan", "escape", "absolute", "base")],
    )
    assert found[0] == last_logits(hub / "stage")
    assert found[1].startswith("CheckpointError: org/gone: no such folder here, and the hub did")
    assert found[1].endswith("(chain walked so far: org/orphan)")
    for name, message in zip(("escape", "absolute"), found[2:4], strict=True):
        assert message.startswith(f"CheckpointError: org/{name} comes from the hub and names '")
        assert "as its base, which is not a hub id" in message
    assert found[4] == last_logits(hub / "old")  # a user's own folder does come first


def test_what_the_hub_cannot_give_is_one_clear_line(hub):
    wanted = [
        {"name": "org/gone"},
        {"name": "org/stage", "revision": "nope"},
        {"name": "org/-name"},
        {"name": "org/a--b"},
        {"name": "org/" + "n" * 100},
    ]
    for call, message in zip(wanted, load_offline(hub / "hub", wanted), strict=True):
        start = f"CheckpointError: {call['name']}: no such folder here, and the hub did not give"
        assert message.startswith(start)
        assert "\n" not in message


def test_errors_of_the_hubs_http_library_are_ours(monkeypatch):
    class TransportError(Exception):
        pass

    def fail(*_: object, **__: object) -> str:
        raise TransportError("Server disconnected\nwithout sending a response")

    monkeypatch.setattr("cognica_mlx.convert.sources.snapshot_download", fail)
    assert_refused("org/name", CheckpointError, "(TransportError: Server disconnected)")


def test_only_a_models_own_files_are_fetched(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    stored = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.pkl"]
    stored += ["README.md"]  # for its licence
    others = ["modeling_cognica_poe.py", "token_bytes.pt", "old/model.safetensors"]
    fetched: list[str] = []

    def fetch(name: str, revision: str | None, **patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects([*stored, *others], **patterns))
        return str(write_base(tmp_path))

    monkeypatch.setattr("cognica_mlx.convert.sources.snapshot_download", fetch)
    load("org/name")
    assert fetched == stored


def test_mlx_without_a_back_end_names_what_to_install(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: no such file')")
    for module in ("mlx_poe", "cognica_mlx.config", "cognica_mlx.convert.sources"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        last = done.stderr.splitlines()[-1]
        assert "libmlx.so: no such file" in last and "pip install 'mlx[cpu]'" in last


def test_configurations_round_trip_through_a_folder(tmp_path):
    folder = write_base(tmp_path, **OWN_HEADS, poe_alpha=0.25)
    config = load(folder)[0].config
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    assert load(folder)[0].config == config == PoEConfig.from_dict(config.to_dict())
