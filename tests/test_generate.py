"""Generating text: prompts of any kind, streaming, stop strings, sampling, kept states."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import PATIENCE

from cognica_mlx.decoding.modes import MODES
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.single import advance_through, prefill, set_depth
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import DELETED, RequestError, TokenizerError
from cognica_mlx.network.model import log_softmax
from mlx_poe import GenerationResponse, generate, stream_generate
from mlx_poe.generation.responses import StopStrings
from mlx_poe.loading.tokenizer import Tokenizer

PROMPT = "The capital of France is"
TALK = [{"role": "user", "content": "What is the capital of Japan?"}]
TINY = json.loads((FIXTURES / "poe-tiny-goldens.json").read_text())
BOUNDS = (4.0, 2.0, 1.0)
# Every mode, with options that make it do what it is for.
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "stage": {"stage": 1},
    "prefix": {"max_stages": 2},
    "compose": {"stages": [0, 3], "stage_weights": [0.25, 0.75]},
    "wand": {"p99_bounds": BOUNDS},
    "speculative": {"num_draft_tokens": 4},
}

model, tokenizer = fixture("poe-tiny")
endless = Tokenizer(tokenizer.encoding, eos_token_ids=[])
every_mode = pytest.mark.parametrize("mode", MODES)


def stream(prompt: Any = PROMPT, **options: Any) -> list[GenerationResponse]:
    return list(stream_generate(model, endless, prompt, **options))


def text_of(responses: list[GenerationResponse]) -> str:
    return "".join(response.text for response in responses)


def tokens_of(responses: list[GenerationResponse]) -> list[int]:
    return [response.token for response in responses]


def test_every_mode_is_tried_here():
    assert OPTIONS.keys() == MODES.keys()


# --- the stream -----------------------------------------------------------------------------------


@every_mode
def test_pieces_join_to_the_text_of_the_tokens(mode):
    responses = stream(max_tokens=16, mode=mode, **OPTIONS[mode])
    text = generate(model, endless, PROMPT, max_tokens=16, mode=mode, **OPTIONS[mode])
    assert text_of(responses) == text == endless.decode(tokens_of(responses))
    assert len(responses) == 16


@every_mode
def test_responses_tell_where_things_stand(mode):
    responses = stream(max_tokens=16, mode=mode, **OPTIONS[mode])
    assert [r.generation_tokens for r in responses] == list(range(1, 17))
    assert {r.prompt_tokens for r in responses} == {len(tokenizer.encode(PROMPT))}
    assert [r.finish_reason for r in responses] == [None] * 15 + ["length"]
    assert all(r.logprob <= 0 for r in responses)
    assert all(r.prompt_tps > 0 and r.peak_memory > 0 for r in responses)
    assert responses[0].generation_tps == 0
    assert all(r.generation_tps > 0 for r in responses[1:])
    stages = {r.stage for r in responses}
    if mode in ("wand", "speculative"):
        assert 0 in stages and stages <= {0, 1, 2, 3}
    else:
        assert stages == {{"stage": 1, "prefix": 1}.get(mode, 3)}
    drafts = sum(r.from_draft for r in responses)
    if mode == "speculative":
        assert 0 < drafts <= responses[-1].drafted_tokens
        assert all(r.stage == 0 for r in responses if r.from_draft)
    else:
        assert drafts == responses[-1].drafted_tokens == 0


def test_logprobs_are_the_full_models():
    responses = stream(max_tokens=12)
    tokens = tokenizer.encode(PROMPT)
    scores = log_softmax(model(mx.array([tokens + tokens_of(responses)])))[0, len(tokens) - 1 :]
    for response, row in zip(responses, scores, strict=False):
        assert response.token == mx.argmax(row).item()
        assert response.logprob == pytest.approx(row[response.token].item(), abs=1e-4)


@every_mode
def test_a_single_token(mode):
    (response,) = stream(max_tokens=1, mode=mode, **OPTIONS[mode])
    assert (response.finish_reason, response.generation_tokens) == ("length", 1)
    assert response.text == " Paris"


def test_half_a_character_at_the_end_is_shown_as_replaced(monkeypatch):
    emoji = endless.encode("\U0001f600", add_special_tokens=False)
    assert len(emoji) == 4  # a byte each

    def emit_emoji(*_: object, **__: object) -> Iterator[DecodedToken]:
        yield from (DecodedToken(token, -1.0, 3) for token in emoji)

    # By its name the package holds the function, not the module.
    monkeypatch.setattr(sys.modules["mlx_poe.generation.text"], "drive", emit_emoji)
    for count, pieces in ((4, ["", "", "", "\U0001f600"]), (3, ["", "", "\ufffd"])):
        assert [r.text for r in stream(max_tokens=count)] == pieces
        assert [r.text for r in stream(max_tokens=count, stop="\ufffd\ufffd")] == pieces
    (*_, last) = stream(max_tokens=3, stop="\ufffd")
    assert (last.text, last.finish_reason) == ("", "stop")


@pytest.mark.parametrize("step", [1, 3, 512])
def test_progress_is_told_chunk_by_chunk(step):
    told: list[tuple[int, int]] = []
    responses = stream(
        max_tokens=8,
        prefill_step_size=step,
        prompt_progress_callback=lambda done, total: told.append((done, total)),
    )
    total = len(tokenizer.encode(PROMPT)) - 1  # the last one is decoded, not prefilled
    assert told == [(min(done, total), total) for done in range(step, total + step, step)]
    assert tokens_of(responses) == tokens_of(stream(max_tokens=8))


# --- where it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", TINY["chat"][:1], ids=range(1))
@pytest.mark.parametrize("mode", ["full", "speculative", "wand"])
def test_generation_ends_at_an_eos_token_which_is_no_text(entry, mode):
    specialist, its_tokenizer = fixture("poe-tiny-chat")
    bounds = {"p99_bounds": [float("inf")] * 4} if mode == "wand" else {}
    responses = list(
        stream_generate(
            specialist, its_tokenizer, entry["prompt"], max_tokens=100, mode=mode, **bounds
        )
    )
    assert tokens_of(responses) == entry["full"]
    assert responses[-1].token in its_tokenizer.eos_token_ids
    assert responses[-1].finish_reason == "stop"
    assert text_of(responses) == its_tokenizer.decode(entry["full"][:-1])


def test_an_eos_token_as_the_last_one_allowed_is_a_stop():
    specialist, its_tokenizer = fixture("poe-tiny-chat")
    entry = TINY["chat"][0]
    for spare, reason in ((0, "stop"), (-1, "length")):
        count = len(entry["full"]) + spare
        responses = list(
            stream_generate(specialist, its_tokenizer, entry["prompt"], max_tokens=count)
        )
        assert len(responses) == count
        assert responses[-1].finish_reason == reason


def test_eos_token_ids_may_be_any():
    plain = stream(max_tokens=20)
    own = Tokenizer(tokenizer.encoding, eos_token_ids=[plain[6].token])
    responses = list(stream_generate(model, own, PROMPT, max_tokens=20))
    assert tokens_of(responses) == tokens_of(plain)[: len(responses)]
    assert responses[-1].token == plain[6].token
    assert text_of(responses) == text_of(plain[: len(responses) - 1])


PIECES = [tokenizer.decode([token]) for token in TINY["base"][0]["full"]]
TEXT = "".join(PIECES)  # what follows PROMPT


@pytest.mark.parametrize(
    "stop",
    [
        " Paris",  # a whole token, the first
        "language",  # within a token
        "is. The lang",  # over four tokens
        "French. Paris is the capital",
        "<|bos|>",
        TEXT[-3:],
        TEXT,
    ],
)
@pytest.mark.parametrize("mode", ["full", "speculative"])
def test_text_ends_before_a_stop_string(stop, mode):
    assert TEXT.count(stop) >= 1
    responses = stream(max_tokens=40, mode=mode, stop=stop)
    assert text_of(responses) == TEXT[: TEXT.index(stop)]
    assert responses[-1].finish_reason == "stop"
    assert {r.finish_reason for r in responses[:-1]} <= {None}
    # No token more is decoded than the stop string needs.
    needed = TEXT.index(stop) + len(stop)
    assert (
        len("".join(PIECES[: len(responses) - 1]))
        < needed
        <= len("".join(PIECES[: len(responses)]))
    )


def test_the_first_of_several_stop_strings_counts():
    late, early = "capital", " French"
    assert TEXT.index(early) < TEXT.index(late)
    for stop in ([late, early], (early, late)):
        assert text_of(stream(max_tokens=40, stop=stop)) == TEXT[: TEXT.index(early)]


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    # The text goes on otherwise after these words.
    stop = "Paris. The language of Spain"
    responses = stream(max_tokens=40, stop=stop)
    assert text_of(responses) == TEXT
    assert [r.text for r in responses[:7]] == [
        " ",
        "",
        "",
        "",
        "",
        "Paris. The language of France",
        " is",
    ]


def test_what_is_held_back_at_the_end_is_given_out():
    responses = stream(max_tokens=5, stop="language of Spain")
    assert [r.text for r in responses] == [" Paris", ".", " The", " ", "language of"]
    assert responses[-1].finish_reason == "length"
    # At an eos token as well.
    own = Tokenizer(tokenizer.encoding, eos_token_ids=[responses[4].token])
    ended = list(stream_generate(model, own, PROMPT, stop="language of Spain"))
    assert [r.text for r in ended] == [" Paris", ".", " The", " ", "language"]
    assert ended[-1].finish_reason == "stop"


def test_no_stop_strings_at_all():
    for stop in (None, [], ()):
        assert text_of(stream(max_tokens=40, stop=stop)) == TEXT


@settings(max_examples=150)
@given(
    pieces=st.lists(st.text("ab\u00e9", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_of_any_kind_in_pieces_of_any_kind(pieces, stops):
    filter_, given_out, taken = StopStrings(stops), "", ""
    for piece in pieces:
        given_out, taken = given_out + filter_.add(piece), taken + piece
        if filter_.found:
            break
        # What is held back could still become a stop string, and is no more than that.
        held = taken[len(given_out) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    else:
        given_out += filter_.rest()
    assert taken.startswith(given_out)
    assert not any(stop in given_out for stop in stops)
    if filter_.found:
        assert any(taken.startswith(stop, len(given_out)) for stop in stops)
    else:
        assert given_out == taken
    if len(stops) == 1 and filter_.found:
        assert given_out == taken[: taken.index(stops[0])]


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array, mx.array])
def test_token_ids_are_taken_as_they_are(kind):
    ids = tokenizer.encode(PROMPT)
    assert tokens_of(stream(kind(ids), max_tokens=10)) == tokens_of(stream(max_tokens=10))
    without_bos = stream(kind(ids[1:]), max_tokens=1)
    assert without_bos[0].prompt_tokens == len(ids) - 1


@pytest.mark.parametrize("text", ["good", "<|user_start|>", " a\n", "\ud800"])
def test_text_is_plain_and_gets_a_bos(text):
    bare = tokenizer.encode(text, add_special_tokens=False)
    assert stream(text, max_tokens=1)[0].prompt_tokens == 1 + len(bare)
    with_bos = [tokenizer.bos_token_id, *bare]
    assert tokens_of(stream(text, max_tokens=5)) == tokens_of(stream(with_bos, max_tokens=5))


def test_messages_are_laid_out_as_a_talk():
    specialist, its_tokenizer = fixture("poe-tiny-chat")
    ids = its_tokenizer.apply_chat_template(TALK)
    first, *_ = stream_generate(specialist, its_tokenizer, TALK, max_tokens=4)
    assert first.prompt_tokens == len(ids)
    assert generate(specialist, its_tokenizer, TALK) == generate(specialist, its_tokenizer, ids)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", [], (), np.array([], dtype=int)], ids=repr)
def test_empty_prompts(prompt):
    with pytest.raises(RequestError, match="the prompt is empty"):
        stream(prompt)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([2048], "token id 2048"),
        ([5, -1], "token id -1"),
        ([{"role": "nobody", "content": "x"}], "message 1"),
        ([*TALK, {"role": "assistant", "content": "Tokyo."}], "the last message"),
    ],
)
def test_bad_prompts(prompt, named):
    with pytest.raises(RequestError, match=named):
        stream(prompt)


@pytest.mark.parametrize(
    "prompt",
    [None, 5, {"role": "user", "content": "x"}, ["a", "b"], [None], [[5, 6]], [1.5]],
    ids=repr,
)
def test_prompts_of_no_known_kind(prompt):
    with pytest.raises((RequestError, TokenizerError)) as caught:
        stream(prompt, max_tokens=1)
    assert "prompt" in str(caught.value) or "token id" in str(caught.value)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "deep"}, "mode 'deep' is not one of full, stage"),
        ({"temperature": 1.0}, "no option temperature"),
        ({"draft_model": "x"}, "no option draft_model"),
        ({"mode": "stage", "stage": 4}, "stage 4: this model has stages 0 to 3"),
        ({"mode": "stage", "stage": -1}, "stage -1"),
        ({"mode": "prefix", "max_stages": 0}, "max_stages 0"),
        ({"mode": "prefix", "max_stages": 5}, "max_stages 5"),
        ({"mode": "compose", "stages": []}, "at least one stage"),
        ({"mode": "compose", "stages": [0, 9]}, "stage 9"),
        ({"mode": "compose", "stages": [1, 1]}, "names a stage twice"),
        ({"mode": "compose", "stages": [0, 1], "stage_weights": [1]}, "1 weights for 2 stages"),
        ({"mode": "compose", "stage_weights": [1, -1, 0, 0]}, "add up to more than 0"),
        ({"mode": "compose", "stage_weights": [float("nan")] * 4}, "add up to more than 0"),
        ({"mode": "wand", "p99_bounds": [1, 2]}, "p99_bounds: 2 given"),
        ({"mode": "wand", "p99_bounds": [1, 2, -3]}, "at least 0"),
        ({"mode": "wand", "p99_bounds": BOUNDS, "safety": -1}, "safety -1"),
        ({"mode": "wand", "p99_bounds": BOUNDS, "exit_stages": [7]}, "exit stage 7"),
        ({"mode": "speculative", "draft_stage": 4}, "draft_stage 4"),
        ({"mode": "speculative", "num_draft_tokens": 0}, "num_draft_tokens 0"),
        ({"mode": "speculative", "num_draft_tokens": 1000}, "num_draft_tokens 1000"),
        ({"draft_margin": 0.1}, "draft_margin no longer exists: use num_draft_tokens"),
        ({"draft_rank": 64}, "draft_rank no longer exists: use draft_bits"),
        ({"mode": "certified"}, "certified no longer exists: use speculative"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"max_tokens": -5}, "max_tokens -5"),
        ({"prefill_step_size": 0}, "prefill_step_size 0"),
        ({"stop": ""}, "a stop string is empty"),
        ({"stop": ["x", ""]}, "a stop string is empty"),
        ({"temp": -0.1}, "temp -0.1"),
        ({"temp": float("nan")}, "temp nan"),
        ({"temp": float("inf"), "top_k": 5}, "temp inf"),
        ({"temp": 1e-45}, "temp 1e-45"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_p": -1}, "top_p -1"),
        ({"min_p": 2}, "min_p 2"),
        ({"top_k": -1}, "top_k -1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"repetition_context_size": 0}, "repetition_context_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
        ({"temp": "hot"}, "temp takes numbers, not 'hot'"),
        ({"seed": 1.5}, "seed takes whole numbers, not 1.5"),
        ({"mode": "compose", "stages": "0,1"}, "stages takes a list of numbers, not '0,1'"),
        ({"mode": "compose", "stages": np.array(1)}, "stages takes a list of numbers, not 1"),
        ({"mode": "compose", "stages": mx.array([0.5])}, "stages takes whole numbers, not 0.5"),
        ({"mode": "wand", "p99_bounds": [None] * 3}, "p99_bounds takes numbers, not None"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_named(options, named):
    with pytest.raises(RequestError, match=named) as caught:
        stream(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array", [np.array, mx.array, lambda values: [*np.array(values)]])
def test_options_may_be_arrays(array):
    def tokens(**options: Any) -> list[int]:
        return [r.token for r in stream(max_tokens=8, **options)]

    plain = tokens(mode="compose", stages=[0, 3], stage_weights=[0.25, 0.75])
    mixed = {"stages": array([0, 3]), "stage_weights": array([0.25, 0.75])}
    assert tokens(mode="compose", **mixed) == plain
    bounds = tokens(mode="wand", p99_bounds=BOUNDS, exit_stages=[0])
    assert tokens(mode="wand", p99_bounds=array(BOUNDS), exit_stages=np.array([0])) == bounds
    assert tokens(mode="stage", stage=np.int32(1), top_k=np.uint8(3)) == tokens(
        mode="stage", stage=1, top_k=3
    )


def test_none_leaves_an_option_at_its_default():
    given = stream(max_tokens=4, temp=None, top_k=None, repetition_context_size=None, seed=None)
    assert [r.token for r in given] == [r.token for r in stream(max_tokens=4)]


VALUES: dict[str, Any] = {
    "stage": 1,
    "max_stages": 2,
    "stages": [0, 1],
    "stage_weights": [1, 1],
    "safety": 1.0,
    "p99_bounds": BOUNDS,
    "exit_stages": [0],
    "draft_stage": 0,
    "num_draft_tokens": 2,
    "draft_head": "base",
    "draft_bits": 4,
    "draft_lookup": True,
}


@every_mode
def test_options_of_another_mode_are_refused(mode):
    assert VALUES.keys() == {option for options in MODES.values() for option in options}
    for option in VALUES.keys() - set(MODES[mode]):
        owner = next(other for other, options in MODES.items() if option in options)
        with pytest.raises(RequestError, match=f"{option} belongs to mode {owner}.*not to {mode}"):
            stream(mode=mode, **{option: VALUES[option]})


def test_what_replaces_a_deleted_mode_or_option_exists():
    for name, instead in DELETED.items():
        assert name not in VALUES.keys() | MODES.keys()
        assert instead.partition(",")[0] in VALUES.keys() | MODES.keys()


# --- sampling -------------------------------------------------------------------------------------


@every_mode
def test_a_seed_makes_sampling_repeatable(mode):
    def draw(seed: int) -> list[int]:
        options = {"temp": 2.0, "seed": seed, "max_tokens": 8, "mode": mode}
        return tokens_of(stream("Once", **options, **OPTIONS[mode]))

    one, other = draw(1), draw(2)
    assert draw(1) == one != other


def test_without_a_seed_every_run_is_another():
    runs = {tuple(tokens_of(stream("Once", max_tokens=12, temp=1.5))) for _ in range(3)}
    assert len(runs) > 1


def test_every_draw_is_another():
    drawn = tokens_of(stream(max_tokens=30, temp=1000.0, seed=1))
    assert len(set(drawn)) > 20  # of 2048 tokens that are all about as likely


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_filters_that_leave_one_token_are_greedy(options):
    drawn = stream(max_tokens=20, temp=2.0, seed=3, **options)
    assert tokens_of(drawn) == tokens_of(stream(max_tokens=20))


def test_a_repetition_penalty_breaks_a_loop():
    plain = tokens_of(stream(max_tokens=80))
    same = tokens_of(stream(max_tokens=20, repetition_penalty=1.0))
    penalised = tokens_of(stream(max_tokens=80, repetition_penalty=1.3))
    assert same == plain[:20]

    def repeats(tokens: list[int]) -> int:
        runs = [tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)]
        return len(runs) - len(set(runs))

    assert repeats(plain) > 20 > repeats(penalised)


def test_the_penalty_may_look_back_on_everything():
    options = {"max_tokens": 40, "repetition_penalty": 1.3}
    all_of_it = stream(repetition_context_size=60, **options)
    assert tokens_of(all_of_it) == tokens_of(stream(repetition_context_size=10**20, **options))
    assert tokens_of(all_of_it) != tokens_of(stream(repetition_context_size=4, **options))


# --- kept states ----------------------------------------------------------------------------------


@every_mode
def test_a_kept_state_gives_the_same_text_for_less_work(mode):
    options = {"mode": mode, "max_tokens": 6, **OPTIONS[mode]}
    state = DecodingState(model)
    prompt = [token for entry in TINY["base"][:4] for token in entry["full"]]
    for turn in range(3):
        before = state.positions_run[0]
        responses = stream(prompt, state=state, **options)
        assert tokens_of(responses) == tokens_of(stream(prompt, **options))
        assert (state.positions_run[0] - before < len(prompt)) == (turn > 0)
        prompt += tokens_of(responses) + tokenizer.encode(" And so", add_special_tokens=False)


def test_only_the_new_end_of_a_prompt_is_run():
    state = DecodingState(model)
    prompt = tokenizer.encode("Once there was a little mouse who lived in a big house")
    stream(prompt, state=state, max_tokens=4)
    before = list(state.positions_run)
    longer = [*prompt[:-2], 50, 51, 52]
    stream(longer, state=state, max_tokens=1)
    assert [now - then for now, then in zip(state.positions_run, before, strict=True)] == [3] * 4


def test_a_kept_state_serves_other_prompts_and_modes():
    state = DecodingState(model)
    prompts = [PROMPT, "Once there was a", PROMPT + " Paris. The", "Once", PROMPT]
    for prompt, mode in zip(
        prompts, ["stage", "full", "wand", "speculative", "compose"], strict=True
    ):
        options = {"mode": mode, "max_tokens": 12, **OPTIONS[mode]}
        kept = stream(prompt, state=state, **options)
        assert tokens_of(kept) == tokens_of(stream(prompt, **options))


def test_a_state_of_another_model_is_refused():
    other, _ = fixture("flat-d8")
    with pytest.raises(RequestError, match="belongs to another model"):
        stream(state=DecodingState(other))


def close_early(state: DecodingState, options: Mapping[str, Any]) -> list[int]:
    running = stream_generate(model, endless, PROMPT, state=state, max_tokens=40, **options)
    taken = [next(running).token for _ in range(6)]
    running.close()
    return taken


def stop_early(state: DecodingState, options: Mapping[str, Any]) -> list[int]:
    return tokens_of(stream(state=state, max_tokens=40, stop="French", **options))


def run_out(state: DecodingState, options: Mapping[str, Any]) -> list[int]:
    return tokens_of(stream(state=state, max_tokens=7, **options))


@every_mode
@pytest.mark.parametrize("end", [close_early, stop_early, run_out])
def test_however_it_ends_the_state_holds_what_was_given_out(mode, end: Callable[..., list[int]]):
    options = {"mode": mode, **OPTIONS[mode]}
    state = DecodingState(model)
    taken = end(state, options)
    talk = tokenizer.encode(PROMPT) + taken
    assert state.tokens in (talk, talk[:-1])  # nothing has been predicted from the last one yet
    assert all(filled <= state.length for filled in state.filled)
    onward = stream(talk, state=state, max_tokens=5, **options)
    assert tokens_of(onward) == tokens_of(stream(talk, max_tokens=5, **options))


@every_mode
def test_a_state_in_use_is_refused_until_its_reply_has_ended_in_any_way(mode):
    options = {"mode": mode, "max_tokens": 12, **OPTIONS[mode]}
    state = DecodingState(model)
    running = stream_generate(model, endless, PROMPT, state=state, **options)
    tokens = [next(running).token for _ in range(3)]
    with ThreadPoolExecutor(1) as other_thread:
        for use in (
            lambda: stream("Once", state=state, **options),
            lambda: other_thread.submit(stream, PROMPT, state=state, **options).result(),
            lambda: prefill(state, [1, 2], 0),
            lambda: advance_through(state, 3),
            lambda: set_depth(state, 0),
        ):
            with pytest.raises(RequestError, match="in use by another reply"):
                use()
        tokens += [response.token for response in running]
        assert tokens == tokens_of(stream(**options))  # nobody has touched it
        abandoned = stream_generate(model, endless, "Once", state=state, **options)
        next(abandoned)
        del abandoned
        with pytest.raises(ZeroDivisionError):
            stream(state=state, prompt_progress_callback=lambda *_: 1 // 0, **options)
        again = other_thread.submit(stream, PROMPT, state=state, **options).result()
    assert tokens_of(again) == tokens


# --- threads --------------------------------------------------------------------------------------

IN_THREADS = """
import sys
from threading import Thread
from mlx_poe import generate, load
from mlx_poe.engine import Engine

def in_a_thread(work, *arguments, **options):
    found = []
    thread = Thread(target=lambda: found.append(work(*arguments, **options)))
    thread.start()
    thread.join()
    return found[0] if found else None

model, tokenizer = in_a_thread(load, "poe-tiny", dtype="float32")
sampled = {"max_tokens": 4, "temp": 1, "seed": 1}
text = in_a_thread(generate, model, tokenizer, "The sea", **sampled)
if len(sys.argv) > 1:
    assert in_a_thread(load, sys.argv[1]) is None
    # The main thread's own streams would hide what others have left.
    with Engine(model, tokenizer) as engine:
        assert engine.submit("The sea", **sampled).text == text
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_threads_that_load_and_generate_may_end_before_the_process(tmp_path, damaged):
    arguments = []
    if damaged:
        folder = shutil.copytree(FIXTURES / "flat-d8", tmp_path / "damaged")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        arguments = [str(folder)]
    child = [sys.executable, "-c", IN_THREADS, *arguments]
    done = subprocess.run(child, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


@every_mode
def test_a_reply_may_be_read_from_one_thread_after_another(mode):
    """As web frameworks do it, with all that one token hands on to the next."""
    options = {"mode": mode, "max_tokens": 6, "temp": 0.8, "seed": 3, **OPTIONS[mode]}
    options |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
    replies = [{}, {"temp": 0}, {"regex": "[a-z ]+"}]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for changed in replies:
            asked = {**options, **changed}
            reply, found = stream_generate(model, tokenizer, PROMPT, **asked), []
            while response := [one, other][len(found) % 2].submit(next, reply, None).result():
                found.append(response.token)
            assert found == tokens_of(list(stream_generate(model, tokenizer, PROMPT, **asked)))
