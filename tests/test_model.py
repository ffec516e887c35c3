"""The network against the known answers: logits of every head, at every boundary, in every type."""

from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import FIXTURES, fixture, goldens
from mlx.utils import tree_flatten

from cognica_mlx.backend import kernels, traces
from cognica_mlx.config import PoEConfig
from cognica_mlx.decoding.modes import make_mode
from cognica_mlx.decoding.single import decode
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel, log_op
from mlx_poe import load

TOLERANCE = 2e-4
TEXTS = {"short": 40, "long": 32}  # how many of the last positions the goldens keep


def largest_difference(ours: mx.array, answer: mx.array) -> float:
    return mx.abs(ours[:, -answer.shape[1] :] - answer).max().item()


@pytest.mark.parametrize("text", TEXTS)
def test_full_depth_matches(golden, text):
    model, answers = golden
    logits = model(answers[f"{text}.tokens"])
    assert logits.dtype == mx.float32
    assert logits.shape == (*answers[f"{text}.tokens"].shape, model.config.vocab_size)
    assert largest_difference(logits, answers[f"{text}.logits_full"]) < TOLERANCE


@pytest.mark.parametrize("text", TEXTS)
def test_every_stage_matches_alone_and_in_one_pass(golden, text):
    model, answers = golden
    tokens = answers[f"{text}.tokens"]
    together = model.forward_all_stages(tokens)
    assert len(together) == model.poe_n_stages == len(model.poe_stage_boundary_layers)
    for stage in range(len(model.config.stage_layers)):
        answer = answers[f"{text}.logits_stage_{stage}"]
        assert largest_difference(model.forward_stage(tokens, stage), answer) < TOLERANCE
        assert largest_difference(together[stage], answer) < TOLERANCE


def test_predictions_are_those_of_the_stages_and_of_the_full_model(golden):
    model, answers = golden
    tokens = answers["short.tokens"]
    *stages, full = model.predictions(tokens)
    pairs = zip(stages, model.forward_all_stages(tokens), strict=True)
    for ours, alone in [*pairs, (full, model(tokens))]:
        assert mx.array_equal(ours, alone)


@pytest.mark.parametrize("name", ["flat-d8", "gqa-logop-d8"])
def test_the_kernels_compiled_on_a_gpu_give_the_same(name, monkeypatch):
    model, answers = fixture(name)[0], goldens(name)
    monkeypatch.setattr(kernels, "compiles", lambda: True)
    for text in TEXTS:
        tokens = answers[f"{text}.tokens"]
        assert largest_difference(model(tokens), answers[f"{text}.logits_full"]) < TOLERANCE
    text = tokens[0, :20].tolist()
    for mode in ("full", "speculative"):
        decoded = decode(model, text, make_mode(model, mode), max_tokens=16)
        with traces.off():  # a trace of these kernels would outlive this test
            made = [one.token for one in decoded]
        whole = model(mx.array([[*text, *made[:-1]]]))[0, len(text) - 1 :]
        assert made == whole.argmax(-1).tolist()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["flat-d8", "gqa-logop-d8"])
def test_log_op_of_the_base_stages_matches(name, text):
    model, answers = fixture(name)[0], goldens(name)
    stages = model.forward_all_stages(answers[f"{text}.tokens"])[: len(model.config.stage_layers)]
    pooled = log_op(stages, [1 / len(stages)] * len(stages))
    assert largest_difference(pooled, answers[f"{text}.logop"]) < TOLERANCE


@pytest.mark.parametrize("name", ["stage-on-flat", "chain-on-stage"])
@pytest.mark.parametrize(("head_mode", "key"), [("base", "base"), ("specialist", "spec")])
def test_head_modes_match(name, head_mode, key):
    model, _ = load(FIXTURES / name, dtype="float32", head_mode=head_mode)
    answers = mx.load(str(FIXTURES / name / "goldens.safetensors"))
    for text in TEXTS:
        ours = model(answers[f"{text}.tokens"])
        assert largest_difference(ours, answers[f"{text}.logits_{key}"]) < TOLERANCE


def test_a_specialist_is_the_last_stage():
    model, _ = fixture("stage-on-flat")
    tokens = mx.array([[5, 6, 7]])
    assert mx.array_equal(model.forward_stage(tokens, 4), model(tokens))


def test_rows_of_a_batch_do_not_touch_each_other():
    model, _ = fixture("gqa-logop-d8")
    rows = mx.array([[1, 2, 3, 4], [9, 8, 7, 6]])
    together = model(rows)
    for i in range(2):
        assert largest_difference(together[i : i + 1], model(rows[i : i + 1])) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_stays_near(dtype):
    model, _ = load(FIXTURES / "flat-d8", dtype=dtype)
    answers = mx.load(str(FIXTURES / "flat-d8" / "goldens.safetensors"))
    logits = model(answers["short.tokens"])
    assert logits.dtype == mx.float32
    assert model.embed(answers["short.tokens"]).x.dtype == getattr(mx, dtype)
    # Logits reach 4 here and bfloat16 keeps 8 bits.
    assert largest_difference(logits, answers["short.logits_full"]) < 0.15


def test_poe_alpha_scales_the_pooled_scores():
    model, _ = fixture("gqa-logop-d8")
    sharper = PoEModel(replace(model.config, poe_alpha=1.0))
    sharper.update(model.parameters())
    tokens = mx.array([[1, 2, 3]])
    assert largest_difference(sharper(tokens), 4 * model(tokens)) < TOLERANCE


def test_building_a_model_evaluates_no_weight():
    mx.clear_cache()
    before = mx.get_active_memory()
    config = PoEConfig(n_layer=24, n_head=12, n_embd=1536, vocab_size=32768, sequence_len=2048)
    model = PoEModel(config)
    assert sum(a.size for _, a in tree_flatten(model.parameters())) > 1e9
    assert mx.get_active_memory() - before < 1e8


@pytest.mark.parametrize("stage", [-1, 4, 99])
def test_unknown_stage_is_named(stage):
    model, _ = fixture("flat-d8")
    with pytest.raises(RequestError, match=rf"stage {stage}: .* 0 to 3"):
        model.forward_stage(mx.array([[1]]), stage)
