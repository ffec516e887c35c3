"""The oracle itself: against the goldens, and reading what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import (
    Reference,
    log_softmax,
    read_tensors,
    weight_shapes,
    write_checkpoint,
    write_delta,
    write_tensors,
)

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = ["flat-d8", "gqa-logop-d8", "stage-on-flat", "chain-on-stage"]
SMALL: dict[str, Any] = {
    "n_layer": 6,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 48,
    "sequence_len": 512,
    "vocab_size": 300,
    "poe_every": 2,
}
TOKENS = np.random.default_rng(0).integers(0, 300, 50)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("text", ["short", "long"])
def test_logits_match_the_goldens(name: str, text: str) -> None:
    golden = read_tensors(FIXTURES / name / "goldens.safetensors")
    tokens = golden[f"{text}.tokens"][0]
    found = Reference.from_folder(FIXTURES / name).predictions(tokens)
    keys = {key: f"{text}.{'' if key == 'logop' else 'logits_'}{key}" for key in found}
    if f"{text}.logop" not in golden:  # left out of the deltas' files, to keep them small
        del keys["logop"], found["logop"]
    assert {*keys.values(), f"{text}.tokens"} == {key for key in golden if key.startswith(text)}
    for key, logits in found.items():
        known = golden[keys[key]][0]
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits[-len(known) :], known, rtol=0, atol=2e-4, err_msg=key)


@pytest.mark.parametrize("name", GOLDEN)
def test_greedy_continuations_match_the_goldens(name: str) -> None:
    """Forced through the golden text, a causal model must choose each of its tokens."""
    golden = read_tensors(FIXTURES / name / "goldens.safetensors")
    model = Reference.from_folder(FIXTURES / name)
    prompt = golden["greedy.prompt"]
    for key in ["full", *(f"stage_{k}" for k in range(len(model.boundary_layers)))]:
        known = golden[f"greedy.{key}"]
        logits = model.predictions(np.concatenate([prompt, known[:-1]]))[key]
        chosen = logits[len(prompt) - 1 :].argmax(axis=-1)
        np.testing.assert_array_equal(chosen, known, err_msg=key)


def test_the_methods_name_the_predictions() -> None:
    model = Reference.from_folder(FIXTURES / "chain-on-stage")
    found = model.predictions(TOKENS)
    for key, mode in (("full", "dual"), ("base", "base"), ("spec", "specialist")):
        np.testing.assert_array_equal(model.full(TOKENS, mode), found[key])
    np.testing.assert_array_equal(model.logop(TOKENS), found["logop"])
    stages = [found[f"stage_{k}"] for k in range(4)]
    np.testing.assert_array_equal(model.boundaries(TOKENS), stages)


def test_no_position_sees_a_later_one() -> None:
    model = Reference.from_folder(FIXTURES / "gqa-logop-d8")
    np.testing.assert_allclose(model.full(TOKENS[:20]), model.full(TOKENS)[:20], atol=1e-5)


def test_parameter_counts_of_the_released_models() -> None:
    def count(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(int(np.prod(shape)) for shape in shapes.values())

    flat = {"n_layer": 24, "n_embd": 1536, "n_head": 12, "n_kv_head": 12, "head_dim": 128}
    flat |= {"vocab_size": 32768}
    stages: dict[str, Any] = {"poe_stage_layers": [12, 5, 4, 3], "per_stage_head": True}
    delta = weight_shapes(flat | {"n_layer": 28, "frozen_layers": 24})
    assert count(weight_shapes(flat)) == 1_384_122_122
    assert count(weight_shapes(flat | stages | {"n_kv_head": 6, "vocab_size": 48000})) == (
        1_507_591_082
    )
    assert (len(delta), count(delta)) == (28, 213_909_560)
    assert len(weight_shapes(flat | {"n_layer": 26, "frozen_layers": 24})) == 16


def assert_sound(model: Reference) -> None:
    """Finite logits of a sensible size, and predictors that differ from one another."""
    found = model.predictions(TOKENS)
    predictors = [*(found[f"stage_{k}"] for k in range(len(model.boundary_layers))), found["full"]]
    for i, logits in enumerate(predictors):
        assert logits.shape == (len(TOKENS), model.config["vocab_size"])
        assert np.isfinite(logits).all()
        assert 0.5 < logits.std(axis=-1).mean() < 6
        chosen = logits.argmax(axis=-1)
        assert len(set(chosen)) > len(TOKENS) // 3
        assert all((chosen != other.argmax(axis=-1)).mean() > 0.05 for other in predictors[:i])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefix": "gpt.", "shards": 3},
        {"poe_every": None, "poe_stage_layers": [3, 2, 1], "per_stage_head": True},
        {"n_layer": 7, "poe_every": 3, "head_dim": 32, "dtype": "float32", "prefix": "_orig_mod."},
        {"n_layer": 24, "n_embd": 128, "poe_every": 6, "intermediate_size": 200},
    ],
)
def test_written_checkpoints_are_sound(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "base", 1, **(SMALL | changes))
    write_delta(tmp_path / "stage", 2, base="../base", new_layers=2, prefix="model.")
    write_delta(tmp_path / "chain", 3, base="../stage", new_layers=1)
    for name, n_heads in (("base", 0), ("stage", 1), ("chain", 2)):
        model = Reference.from_folder(tmp_path / name)
        assert len(model.new_heads) == n_heads
        assert model.n_layer == json.loads((tmp_path / name / "config.json").read_text())["n_layer"]
        assert_sound(model)


def test_prefix_and_shards_leave_the_model_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "plain", 5, **SMALL)
    write_checkpoint(tmp_path / "split", 5, **SMALL, prefix="_orig_mod.gpt.", shards=2)
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "split").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    plain, split = (Reference.from_folder(tmp_path / name) for name in ("plain", "split"))
    np.testing.assert_array_equal(plain.full(TOKENS), split.full(TOKENS))


def test_poe_alpha_scales_the_pooled_scores(tmp_path: Path) -> None:
    stages = {"poe_stage_layers": [3, 2, 1], "per_stage_head": True, "poe_every": None}
    write_checkpoint(tmp_path, 6, **(SMALL | stages), poe_alpha=1.0)
    model = Reference.from_folder(tmp_path)
    summed = sum(log_softmax(z) for z in model.boundaries(TOKENS))
    np.testing.assert_allclose(model.full(TOKENS), summed, atol=1e-5)


def test_siblings_may_share_the_base(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", 7, **SMALL)
    for seed, name in enumerate(["a", "b"]):
        write_delta(tmp_path / name, seed, base="../base", new_layers=2, share_base=True)
    base, a, b = (Reference.from_folder(tmp_path / name) for name in ("base", "a", "b"))
    tokens = np.tile(TOKENS, 4)  # beyond the short window
    ours, theirs, alone = (model.boundaries(tokens) for model in (a, b, base))
    np.testing.assert_array_equal(ours, theirs)
    # The base's last layer loses its long window: the pattern decides now.
    np.testing.assert_array_equal(ours[:-1], alone[:-1])
    assert np.abs(ours[-1] - alone[-1]).max() > 0.01
    assert np.abs(a.full(TOKENS) - b.full(TOKENS)).max() > 0.1


def test_a_cycle_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", 8, **SMALL)
    write_delta(tmp_path / "a", 1, base="../base", new_layers=1)
    write_delta(tmp_path / "b", 2, base="../a", new_layers=1)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["base_model_name_or_path"] = "../b"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cycle"):
        Reference.from_folder(tmp_path / "b")


def test_written_files_open_with_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}
    write_tensors(tmp_path / "x.safetensors", values, "float32")
    for name, loaded in load_file(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(loaded, values[name])


def test_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    # Between 1 and 1 + 2**-7, bfloat16's neighbours: a tie goes to the even one.
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-9], np.float32)
    write_tensors(tmp_path / "x.safetensors", {"x": ties}, "bfloat16")
    read = read_tensors(tmp_path / "x.safetensors")["x"]
    np.testing.assert_array_equal(read, np.array([1, 1 + 2**-6, 1 + 2**-7, -1], np.float32))


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 9, **SMALL, tokenizer_from=FIXTURES / "flat-d8")
    for file in ("tokenizer.pkl", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / file).read_bytes() == (FIXTURES / "flat-d8" / file).read_bytes()
