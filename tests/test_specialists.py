"""Specialists over one base in memory, and states that pass from one to the other."""

import json
from copy import copy
from functools import cache

import mlx.core as mx
import pytest
from checkpoints import write_base, write_stage
from conftest import FIXTURES, fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from cognica_mlx.convert.conversion import prepare
from cognica_mlx.convert.quantization import scheme
from cognica_mlx.convert.sources import locate
from cognica_mlx.decoding.single import advance_through, prefill, set_depth
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import CheckpointError, PoEError, RequestError
from cognica_mlx.files.lineage import difference, some
from cognica_mlx.network.model import log_op
from cognica_mlx.network.shared_base import PatchedEmbedding, shared_stages
from cognica_mlx.pricing.costs import bytes_read
from mlx_poe import generate, load, stream_generate
from mlx_poe.commands.generate import main
from mlx_poe.loading.load import find_model
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer

TINY = json.loads((FIXTURES / "poe-tiny-goldens.json").read_text())
NAMES = ("chat", "math", "tool")


@cache
def attached() -> Specialists:
    specialists = Specialists(fixture("poe-tiny")[0])
    for name in NAMES:
        specialists.attach(name, f"poe-tiny-{name}")
    return specialists


def some_tokens(length: int, seed: int = 0) -> list[int]:
    return mx.random.randint(0, 2039, (length,), key=mx.random.key(seed)).tolist()  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_an_attached_specialist_is_the_loaded_one(name):
    model, alone = attached().use(name), fixture(f"poe-tiny-{name}")[0]
    assert model.config == alone.config
    tokens = mx.array([[2039, 2040, *some_tokens(600), 2041, 2042]])
    pairs = zip(model.forward_all_stages(tokens), alone.forward_all_stages(tokens), strict=True)
    for ours, theirs in [(model(tokens), alone(tokens)), *pairs]:
        assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"mode": "speculative"}, {"mode": "speculative", "draft_head": "base"}]
)
def test_goldens_of_every_specialist(name, options):
    model, tokenizer = attached().use(name), fixture("poe-tiny")[1]
    for case in TINY[name][: 2 if options else None]:
        expected = case["full"][:16]
        responses = stream_generate(
            model, tokenizer, case["prompt"], max_tokens=len(expected), **options
        )
        assert [r.token for r in responses] == expected


def test_the_base_is_untouched_and_shared():
    base, _ = load("poe-tiny", dtype="float32")
    tokens = mx.array([[2039, *some_tokens(40)]])
    before = [base(tokens), *base.forward_all_stages(tokens)]
    arrays = {id(a) for _, a in tree_flatten(base.parameters())}
    specialists = Specialists(base)
    for name in NAMES:
        specialists.attach(name, f"poe-tiny-{name}")
        mx.eval(specialists.use(name)(tokens))
        own = dict(tree_flatten(specialists.use(name).parameters()))
        new = [k for k, a in own.items() if id(a) not in arrays]
        # Two blocks of six matrices, a head, two vectors and the rows that it changed.
        assert len(new) == 16
        assert own["wte.own"].shape == (8, 128)
        assert specialists.nbytes(name) == sum(own[k].nbytes for k in new)
        assert specialists.nbytes(name) < sum(a.nbytes for a in own.values()) / 5
    specialists.detach("math")
    assert specialists.names == ("chat", "tool")
    after = [base(tokens), *base.forward_all_stages(tokens)]
    assert all(mx.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert specialists.use(None) is base
    with pytest.raises(RequestError, match="no specialist math is attached; attached: chat, tool"):
        specialists.use("math")
    with pytest.raises(RequestError, match="already attached"):
        specialists.attach("chat", "poe-tiny-chat")


def test_chains_stack_on_their_root_and_on_their_middle():
    alone = fixture("chain-on-stage")[0]
    tokens = mx.array([list(range(1, 200))])
    for lower in ("flat-d8", "stage-on-flat"):
        specialists = Specialists(fixture(lower)[0])
        model = specialists.attach("chain", FIXTURES / "chain-on-stage")
        assert model.lm_head is fixture(lower)[0].lm_head
        assert mx.array_equal(model(tokens), alone(tokens))


def test_quantised_bases_and_deltas(tmp_path):
    base, _ = load("poe-tiny", quantize=8)
    specialists = Specialists(base)
    model = specialists.attach("plain", "poe-tiny-chat")
    packed = specialists.attach("packed", "poe-tiny-chat", quantize=8)
    assert isinstance(model.wte, PatchedEmbedding)
    assert packed.h[8].mlp.c_fc.bits == 8
    assert specialists.nbytes("packed") < 0.4 * specialists.nbytes("plain")
    tokens = mx.array([[2039, 2040, 448, 274, 264, 313, 278, 1610, 63, 2041, 2042]])
    exact = fixture("poe-tiny-chat")[0](tokens)
    for one in (model, packed):
        assert mx.abs(one(tokens) - exact).max().item() < 3
    # A converted delta whose table is packed as its base's: only the rows that differ are kept.
    prepare(find_model("poe-tiny"), quantization=scheme(8)).write(tmp_path / "base")
    conversion = prepare(
        find_model("poe-tiny-chat"), quantization=scheme(8), base=locate(tmp_path / "base")
    )
    conversion.write(tmp_path / "delta")
    converted = Specialists(load(tmp_path / "base")[0]).attach("chat", tmp_path / "delta")
    assert isinstance(converted.wte, PatchedEmbedding)
    assert 1 <= len(converted.wte.rows) <= 8
    assert mx.array_equal(converted(tokens), load(tmp_path / "delta")[0](tokens))


@pytest.mark.parametrize("seed", [5, 6])
def test_a_specialist_of_another_base_is_refused(tmp_path, seed):
    write_base(tmp_path / "base", seed=1)
    write_base(tmp_path / "other", seed=seed)
    write_stage(tmp_path / "stage")
    specialists = Specialists(load(tmp_path / "other")[0])
    with pytest.raises(CheckpointError, match="not the model in memory"):
        specialists.attach("stage", tmp_path / "stage")
    for wrong in ("poe-tiny-chat", "poe-tiny", tmp_path / "nowhere"):
        with pytest.raises(PoEError):
            specialists.attach("stage", wrong)
    assert specialists.names == ()


def test_a_cast_does_not_make_another_model_but_two_percent_do():
    values = mx.random.normal((100,), key=mx.random.key(0))
    one = {"x0_lambdas": some(values)}
    for dtype in (mx.bfloat16, mx.float16):
        assert difference(one, {"x0_lambdas": some(values.astype(dtype))}) is None
    assert difference(one, {}) is None  # on another machine
    for factor in (1.02, 0.0, float("nan")):
        assert difference(one, {"x0_lambdas": factor * one["x0_lambdas"]}) == "x0_lambdas"


# States


def states_agree(state: DecodingState, tokens: list[int]) -> None:
    """The full prediction after the state's text is a fresh forward's."""
    model = state.model
    set_depth(state, model.poe_n_stages - 1)
    state.append([7])
    advance_through(state, model.poe_n_stages - 1)
    hidden = {k: state.boundary(k, len(tokens), len(tokens) + 1) for k in model.full_boundaries}
    ours, fresh = model.full_scores(hidden), model(mx.array([[*tokens, 7]]))[:, -1:]
    assert mx.abs(ours - fresh).max().item() < 1e-4
    state.rollback(len(tokens))


def test_a_prompt_runs_through_the_base_once():
    specialists, tokens = attached(), [2039, 2040, *some_tokens(900), 2041, 2042]
    state = DecodingState(specialists.use("chat"), keep_trunk=2048)
    prefill(state, tokens, 4)
    other = state.switch(specialists.use("math"))
    states_agree(other, tokens)
    # The base's stages ran the one new token, the specialist's own all.
    assert other.positions_run == [1, 1, 1, 1, len(tokens) + 1]
    states_agree(state, tokens)
    back = other.switch(specialists.use("chat"))
    states_agree(back, tokens)
    assert back.positions_run[:4] == [1, 1, 1, 1]


def test_what_is_not_alike_is_run_again():
    specialists, text = attached(), [2039, *some_tokens(100)]
    base, chat = specialists.use(None), specialists.use("chat")
    assert shared_stages(base, chat, text) == 4
    # The chat tokens' rows are the specialist's own.
    assert shared_stages(base, chat, [*text, 2041]) == 0
    assert shared_stages(chat, specialists.use("tool"), [*text, 2041]) == 4
    assert shared_stages(chat, fixture("poe-tiny-chat")[0], text) == 0
    assert shared_stages(chat, chat, text) == 5
    chain, stage = fixture("chain-on-stage")[0], fixture("stage-on-flat")[0]
    assert shared_stages(chain, stage, text) == 0
    upper = Specialists(stage).attach("chain", FIXTURES / "chain-on-stage")
    agree = mx.array_equal(upper.resid_lambdas[:10], stage.resid_lambdas)
    assert shared_stages(upper, stage, [1, 2]) in ((5, 4) if agree else (0, 1, 2, 3, 4))
    state = DecodingState(base, keep_trunk=512)
    prefill(state, [*text, 2041], 3)
    other = state.switch(chat)
    assert other.length == 0
    prefill(other, [*text, 2041], 4)
    states_agree(other, [*text, 2041])


def test_texts_longer_than_what_is_kept_are_run_again():
    specialists, tokens = attached(), [2039, 2040, *some_tokens(1500)]
    state = DecodingState(specialists.use("chat"), keep_trunk=512)
    prefill(state, tokens, 4)
    other = state.switch(specialists.use("tool"))
    states_agree(other, tokens)
    assert other.positions_run[0] > len(tokens)


def test_what_is_kept_is_bounded():
    sizes = []
    for length in (988, 2012):  # as far from a whole chunk
        state = DecodingState(attached().use("chat"), keep_trunk=600)
        prefill(state, [2039, *some_tokens(length)], 4)
        sizes.append(state.nbytes)
    assert sizes[1] < 1.05 * sizes[0]


def test_a_stage_that_lacks_positions_is_not_run():
    specialists, tokens = attached(), [2039, *some_tokens(900)]
    state = DecodingState(specialists.use("chat"), keep_trunk=300)
    prefill(state, tokens, 4)
    other = state.switch(specialists.use("tool"))
    with pytest.raises(RequestError, match="input of stage 4 has been dropped; call set_depth"):
        advance_through(other, 4)
    prefill(other, [2040], 4)
    states_agree(other, [*tokens, 2040])


@settings(max_examples=8)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 300)),
            st.tuples(st.just("advance"), st.integers(0, 4)),
            st.tuples(st.just("rollback"), st.integers(1, 100)),
            st.tuples(st.just("switch"), st.sampled_from((*NAMES, None))),
        ),
        min_size=3,
        max_size=10,
    )
)
def test_any_sequence_of_switches_stays_exact(steps):
    specialists = attached()
    state, tokens = DecodingState(specialists.use("chat"), keep_trunk=700), []
    for number, (what, value) in enumerate(steps):
        if what == "append":
            new = some_tokens(value, number)
            prefill(state, new, state.depth)
            tokens += new
        elif what == "advance":
            depth = min(value, state.model.poe_n_stages - 1)
            set_depth(state, depth)
            advance_through(state, depth)
        elif what == "rollback":
            position = max(len(tokens) - value, state.earliest_rollback)
            if position < len(tokens):
                state.rollback(position)
                del tokens[position:]
        else:
            state = state.switch(specialists.use(value))
            if not state.length:
                prefill(state, tokens, state.depth)
        assert state.tokens == tokens
    if tokens:
        states_agree(state, tokens)


def test_generation_goes_on_after_a_switch():
    specialists, tokenizer = attached(), fixture("poe-tiny")[1]
    case = TINY["math"][0]
    chat, math = specialists.use("chat"), specialists.use("math")
    state = DecodingState(chat, keep_trunk=1024)
    generate(chat, tokenizer, case["prompt"], max_tokens=5, state=state)
    state = state.switch(math)
    count = len(case["full"])
    tokens = [
        r.token
        for r in stream_generate(math, tokenizer, case["prompt"], max_tokens=count, state=state)
    ]
    assert tokens == case["full"]
    assert state.positions_run[0] <= count + 1


# Siblings


def test_siblings_are_the_weighted_log_op_of_each_alone():
    specialists = attached()
    tokens = mx.array([[2039, 2040, *some_tokens(700), 2041, 2042]])
    model = specialists.compose(["math", "chat", "tool"], [1, 0.5, 0.5])
    alone = [specialists.use(name)(tokens) for name in ("math", "chat", "tool")]
    assert mx.abs(model(tokens) - log_op(alone, [0.5, 0.25, 0.25])).max().item() < 1e-4
    for stage, name in enumerate(("math", "chat", "tool"), start=4):
        assert mx.array_equal(model.forward_stage(tokens, stage), specialists.use(name)(tokens))
    only = specialists.compose(["math"])
    assert mx.abs(only(tokens) - log_op(alone[:1], [1])).max().item() < 1e-4


def test_siblings_decode_as_a_fresh_forward_and_run_the_base_once():
    specialists, tokenizer = attached(), fixture("poe-tiny")[1]
    model = specialists.compose(["chat", "math"], [1, 2])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of Italy?"}]
    )
    expected: list[int] = []
    for _ in range(12):
        expected.append(int(mx.argmax(model(mx.array([prompt + expected]))[0, -1]).item()))
    for options in ({}, {"mode": "speculative"}, {"mode": "speculative", "draft_head": "base"}):
        state = DecodingState(model)
        decoded = stream_generate(
            model, quiet(tokenizer), prompt, max_tokens=12, state=state, **options
        )
        assert [r.token for r in decoded] == expected
        if not options:
            assert state.positions_run == [len(prompt) + 11] * 6
    with pytest.raises(RequestError, match="no calibration"):
        generate(model, tokenizer, prompt, mode="wand")


def test_wand_decodes_with_siblings_down_to_the_last_stage():
    model = attached().compose(["chat", "math"], [1, 2])
    prompt = [2039, 2040, *some_tokens(20), 2041, 2042]
    tokenizer = quiet(fixture("poe-tiny")[1])
    full = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=24)]
    for bound in (0.5, float("inf")):
        state, text = DecodingState(model), list(prompt)
        decoded = stream_generate(
            model,
            tokenizer,
            prompt,
            max_tokens=24,
            mode="wand",
            p99_bounds=[bound] * 5,
            state=state,
        )
        stages = set()
        for r in decoded:
            logits = model.forward_all_stages(mx.array([text]))
            expected = model(mx.array([text])) if r.stage == 5 else logits[r.stage]
            assert r.token == int(mx.argmax(expected[0, -1]).item())
            text.append(r.token)
            stages.add(r.stage)
        assert 5 in stages
    assert text[len(prompt) :] == full


@pytest.mark.parametrize("head_mode", ["dual", "base", "specialist"])
def test_heads_are_priced_as_they_are_read(head_mode):
    """A head of poe-tiny has 2048 * 128 float32 numbers."""
    head = 2048 * 128 * 4
    model, _ = load("poe-tiny-chat", dtype="float32", head_mode=head_mode)
    own = 2 * head if head_mode == "dual" else head
    assert bytes_read(model).heads == ((head,),) * 4 + ((own,),)
    siblings = bytes_read(attached().compose(["chat", "math"]))
    assert siblings.heads == ((head,),) * 4 + ((2 * head,),) * 2
    assert siblings.full_head() == 4 * head


def test_stages_with_other_lambdas_are_not_shared():
    base, chat = attached().use(None), attached().use("chat")
    for name in ("resid_lambdas", "x0_lambdas"):
        for layer, alike in ((0, 0), (3, 1), (7, 3)):
            other = copy(chat)
            values = chat[name].tolist()
            values[layer] += 0.01
            other[name] = mx.array(values)
            assert shared_stages(base, other, [1, 2]) == alike
            assert shared_stages(other, chat, [1, 2]) == alike
            # Only the layer's own stage is another; those after it still share passes.
            same = [a is b for a, b in zip(chat.stages, other.stages, strict=True)]
            assert same == [stage != alike for stage in range(4)] + [True]
            assert len(other.stages[alike].lambdas()) == 2
            again = copy(other)
            again[name] = mx.array(values)
            assert shared_stages(again, other, [1, 2]) == 5
        assert shared_stages(base, chat, [1, 2]) == 4


def quiet(tokenizer: Tokenizer) -> Tokenizer:
    """The same, stopping nowhere."""
    return Tokenizer(tokenizer.encoding, tokenizer.vocab_size, eos_token_ids=())


def test_a_state_passes_to_siblings_and_back():
    specialists, tokens = attached(), [2039, 2040, *some_tokens(400), 2041]
    state = DecodingState(specialists.use("chat"), keep_trunk=1024)
    prefill(state, tokens, 4)
    both = state.switch(specialists.compose(["chat", "math"]))
    states_agree(both, tokens)
    # chat is the first of the two, so its stage is known as well.
    assert both.positions_run == [1, 1, 1, 1, 1, len(tokens) + 1]
    states_agree(both.switch(specialists.use("math")), tokens)


def test_siblings_that_cannot_be():
    specialists = attached()
    for names, weights in (([], None), (["chat"], [1, 2]), (["chat", "math"], [1, -1])):
        with pytest.raises(RequestError):
            specialists.compose(names, weights)
    chain = Specialists(fixture("flat-d8")[0])
    chain.attach("chain", FIXTURES / "chain-on-stage")
    chain.attach("stage", FIXTURES / "stage-on-flat")
    with pytest.raises(RequestError, match="directly on the base"):
        chain.compose(["chain", "stage"])


def test_the_command_composes(capsys):
    argv = [
        "--specialists",
        "poe-tiny-math,poe-tiny-chat",
        "--prompt",
        "What is the capital of Italy?",
    ]
    assert main([*argv, "--weights", "1,0.5", "--max-tokens", "8"]) == 0
    assert "Rome" in capsys.readouterr().out
    assert main([*argv, "--weights", "1"]) == 2
    assert "one for each" in capsys.readouterr().err
    assert main(["--weights", "1", "--prompt", "a"]) == 2
    assert (
        main(["--specialists", "poe-tiny-chat", "--prompt", "What is the capital of Italy?"]) == 0
    )
    assert "The capital of Italy is Rome." in capsys.readouterr().out
