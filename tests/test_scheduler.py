"""Many prompts in one thread: the same replies as alone, within a memory budget."""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from conftest import SOAK, fixture

from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.footprint import state_bytes
from cognica_mlx.decoding.modes import MODES
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from mlx_poe import batch_generate, stream_generate
from mlx_poe.engine.memory import memory_for_states
from mlx_poe.engine.scheduler import Scheduler
from mlx_poe.generation.prompt_cache import PromptCache
from mlx_poe.generation.request import GenerationRequest, read_request
from mlx_poe.generation.responses import GenerationResponse, is_last
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer

base, tokenizer = fixture("poe-tiny")
endless = Tokenizer(tokenizer.encoding, eos_token_ids=[])
BOUNDS = [0.3] * 3
TALK = [{"role": "user", "content": "What is the capital of Japan?"}]
STORY = "Once there was a little mouse who lived in a big house and"


@cache
def models() -> dict[str, PoEModel]:
    tiny = Specialists(base)
    for name in ("chat", "math"):
        tiny.attach(name, f"poe-tiny-{name}")
    return {
        "base": base,
        "chat": tiny.use("chat"),
        "math": tiny.use("math"),
        "both": tiny.compose(["chat", "math"], [1, 2]),
        "flat": fixture("flat-d8")[0],
    }


def text(length: int, start: int = 0) -> list[int]:
    return [2039, *((7 * i + start) % 2000 for i in range(1, length))]


def task(prompt: Any = STORY, **options: Any) -> GenerationRequest:
    model = options.pop("model", base)
    return read_request(endless, prompt, {"max_tokens": 12, **options}).on(model)


def run(
    scheduler: Scheduler, tasks: list[GenerationRequest]
) -> dict[GenerationRequest, list[GenerationResponse]]:
    """Every response to each request, run to its end."""
    heard: dict[GenerationRequest, list[GenerationResponse]] = {each: [] for each in tasks}
    for each in tasks:
        scheduler.add(each)
    while len(scheduler):
        for each, news in scheduler.step():
            heard.setdefault(each, []).append(response(news))
    return heard


def response(news: GenerationResponse | Exception) -> GenerationResponse:
    """The response that news is; an error fails the test."""
    if isinstance(news, Exception):
        raise news
    return news


def tokens_of(responses: list[GenerationResponse]) -> list[int]:
    return [response.token for response in responses]


def told(responses: list[GenerationResponse]) -> list[tuple]:
    """All that does not depend on the clock or on where the prompt's state came from."""
    return [
        (
            *(r.text, r.token, r.stage, r.from_draft, r.prompt_tokens, r.generation_tokens),
            *(r.drafted_tokens, r.fell_back, r.finish_reason, pytest.approx(r.logprob, abs=2e-4)),
        )
        for r in responses
    ]


# --- batch_generate -------------------------------------------------------------------------------

MIXED: list[tuple[Any, dict[str, Any]]] = [
    (STORY, {}),
    (STORY, {"mode": "speculative", "num_draft_tokens": 5}),
    ("The capital of France is", {"temp": 0.8, "seed": 7, "top_p": 0.9}),
    (TALK, {"model": "chat"}),
    (TALK, {"model": "math", "mode": "speculative"}),
    (TALK, {"model": "both", "mode": "speculative", "temp": 0.9, "seed": 3}),
    (text(300), {"mode": "wand", "p99_bounds": BOUNDS}),
    (text(30), {"mode": "stage", "stage": 1}),
    (STORY, {"mode": "prefix", "max_stages": 2, "repetition_penalty": 1.3}),
    (STORY, {"mode": "compose", "stages": [0, 3]}),
    ("The capital of France is", {"stop": "language"}),
    (text(640), {"max_tokens": 3, "prefill_step_size": 70}),
    (text(9) * 4, {"mode": "speculative", "draft_lookup": True, "num_draft_tokens": 0}),
    (STORY, {"temp": 1.2, "seed": 9, "min_p": 0.05, "model": "chat", "mode": "wand"}),
]


@cache
def mixed_alone(which: int) -> list[GenerationResponse]:
    """What a prompt gets alone: the same beside few and many others."""
    prompt, about = MIXED[which]
    options = {"model": "base", "max_tokens": 9, **about}
    model = models()[options.pop("model")]
    return list(stream_generate(model, tokenizer, prompt, **options))


@pytest.mark.parametrize("max_sequences", [3, pytest.param(16, marks=SOAK)])
def test_every_prompt_gets_what_it_gets_alone(max_sequences):
    known = [{k: models()[v] if k == "model" else v for k, v in o.items()} for _, o in MIXED]
    prompts = [prompt for prompt, _ in MIXED]
    result = batch_generate(
        base, tokenizer, prompts, per_prompt=known, max_sequences=max_sequences, max_tokens=9
    )
    for i, (responses, whole) in enumerate(zip(result.responses, result.texts, strict=True)):
        alone = mixed_alone(i)
        assert told(responses) == told(alone), MIXED[i]
        assert whole == "".join(r.text for r in alone)
    counts = [len(responses) for responses in result.responses]
    stats = result.stats
    assert stats.generation_tokens == sum(counts)
    assert stats.prompt_tokens == sum(r[-1].prompt_tokens for r in result.responses)
    assert stats.prompt_tps == stats.prompt_tokens / stats.prompt_time
    assert stats.generation_tps == stats.generation_tokens / stats.generation_time
    assert stats.peak_memory > 0


def test_models_over_different_bases_in_one_batch():
    per_prompt = [{"model": models()["flat"]}, None, {"model": models()["flat"]}]
    prompts = [list(range(20)), text(20), [i % 99 for i in range(300)]]
    result = batch_generate(base, endless, prompts, per_prompt=per_prompt, max_tokens=8)
    for prompt, special, responses in zip(prompts, per_prompt, result.responses, strict=True):
        alone = stream_generate((special or {}).get("model", base), endless, prompt, max_tokens=8)
        assert tokens_of(responses) == tokens_of(list(alone))


def test_progress_and_replies_are_told_as_they_come():
    done: list[tuple[int, int]] = []
    finished: dict[int, int] = {}
    batch_generate(
        base,
        endless,
        [STORY] * 3,
        per_prompt=[{"max_tokens": n} for n in (9, 2, 5)],
        max_sequences=2,
        progress=lambda *counts: done.append(counts),
        finished=lambda i, responses: finished.update({i: len(responses)}),
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert list(finished.items()) == [(1, 2), (2, 5), (0, 9)]


def test_an_interruption_keeps_what_is_finished():
    finished: list[int] = []

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch_generate(
            base,
            endless,
            [STORY] * 6,
            max_tokens=4,
            max_sequences=2,
            progress=interrupt,
            finished=lambda i, _: finished.append(i),
        )
    assert finished == [0, 1]


@pytest.mark.parametrize(
    ("prompts", "options", "named"),
    [
        ("one text", {}, "prompts must be a list, not str"),
        (["a", ""], {}, "prompt 1: the prompt is empty"),
        (["a", [5, 2048]], {}, "prompt 1: token id 2048"),
        (["a"], {"mode": "deep"}, "prompt 0: mode 'deep'"),
        (["a"], {"per_prompt": []}, "per_prompt has 0 entries for 1"),
        (["a"], {"per_prompt": [{"temperature": 1}]}, "prompt 0: there is no option temperature"),
        (["a"], {"per_prompt": [{"model": "chat"}]}, "prompt 0: model must be a loaded model"),
        (["a"], {"max_tokens": 0}, "prompt 0: max_tokens 0"),
        (["a"], {"stop": [""]}, "prompt 0: stop: a stop string is empty"),
        (["a"], {"state": None}, "prompt 0: there is no option state"),
        (["a"], {"max_sequences": 0}, "max_sequences 0"),
        (["a"], {"memory": 1000}, "prompt 0: 2 tokens of prompt and 256 to generate"),
    ],
    ids=str,
)
def test_bad_requests_are_named_before_any_work(prompts, options, named, monkeypatch):
    monkeypatch.setattr(Scheduler, "step", None)
    with pytest.raises(RequestError, match=named):
        batch_generate(base, endless, prompts, **options)


def test_an_error_in_one_reply_is_raised_after_the_others(monkeypatch):
    real = Tokenizer.detokenizer
    made: list[int] = []

    def failing(self: Tokenizer) -> Any:
        made.append(1)
        if len(made) == 2:
            raise OSError("a broken reply")
        return real(self)

    monkeypatch.setattr(Tokenizer, "detokenizer", failing)
    finished: list[int] = []
    done: list[int] = []
    with pytest.raises(OSError, match="a broken reply"):
        batch_generate(
            base,
            endless,
            [STORY] * 3,
            max_tokens=3,
            progress=lambda count, _: done.append(count),
            finished=lambda i, _: finished.append(i),
        )
    assert finished == [0, 2] and done == [1, 2, 3]


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keep_trunk"),
    [
        *(pytest.param(*p, marks=SOAK) for p in (("base", 1024), ("chat", 0))),
        ("both", 1024),
        ("flat", 0),
    ],
)
@pytest.mark.parametrize("mode", ["full", "speculative", "stage", "wand"])
def test_no_state_is_larger_than_foretold(name, mode, keep_trunk):
    model = models()[name]
    options = {"p99_bounds": [0.3] * (model.poe_n_stages - 1)} if mode == "wand" else {}
    for length in (1, 600):
        state = DecodingState(model, keep_trunk=keep_trunk)
        count = 6
        # Refused drafts stay in memory with the token that was kept.
        drafts = 3 if mode == "speculative" else 0
        most = state_bytes(
            model,
            length + count + drafts,
            keep_trunk=keep_trunk,
            pending=256 if mode in ("stage", "wand") else 0,
            spare=count * drafts,
        )
        for _ in stream_generate(
            model, endless, [7] * length, max_tokens=count, mode=mode, state=state, **options
        ):
            assert state.nbytes <= most, (length, state.nbytes, most)


@pytest.mark.parametrize(
    ("name", "keep_trunk"), [pytest.param("base", 0, marks=SOAK), ("both", 1024)]
)
def test_what_is_foretold_is_close_for_texts_beyond_the_windows(name, keep_trunk):
    model, state = models()[name], DecodingState(models()[name], keep_trunk=keep_trunk)
    options = {"max_tokens": 40, "state": state}
    most = max(state.nbytes for _ in stream_generate(model, endless, text(1024), **options))
    foretold = state_bytes(model, 1024 + 40, keep_trunk=keep_trunk)
    assert most <= foretold <= 1.3 * most
    # Longer texts need no more.
    assert state_bytes(model, 10**9, keep_trunk=keep_trunk) <= 1.3 * most


def test_a_state_that_was_long_is_counted_as_such():
    state = DecodingState(base)
    list(stream_generate(base, endless, text(380), max_tokens=1, state=state))
    state.rollback(370)
    state.rollback(260)
    assert state.nbytes <= state_bytes(base, 260, start=state)
    assert state_bytes(base, 200) < state_bytes(base, 200, start=state)
    assert state_bytes(base, 260, start=DecodingState(base)) == state_bytes(base, 260)


def test_what_does_not_fit_waits_and_what_never_fits_is_refused():
    short = Scheduler().bytes_needed(task())
    scheduler = Scheduler(memory=2 * short, prompt_cache_bytes=0)
    tasks = [task() for _ in range(5)]
    most = 0
    for each in tasks:
        scheduler.add(each)
    order = []
    while len(scheduler):
        order += [each for each, news in scheduler.step() if is_last(news)]
        stats = scheduler.stats
        most = max(most, stats.running)
        assert stats.state_bytes <= 2 * short
    assert most == 2
    assert order == tasks
    large = task(text(400))
    assert short < scheduler.bytes_needed(large)
    scheduler = Scheduler(memory=short)
    with pytest.raises(RequestError, match=r"400 tokens of prompt and 12 .* MB, but .* MB: allow"):
        scheduler.add(large)
    assert not len(scheduler)


def test_a_large_task_is_not_overtaken_for_ever():
    small = Scheduler().bytes_needed(task())
    large = task(text(600))
    need = Scheduler().bytes_needed(large)
    scheduler = Scheduler(memory=need + small // 2, prompt_cache_bytes=0)
    tasks = [task(), large, task(), task()]
    heard = run(scheduler, tasks)
    assert all(is_last(each[-1]) for each in heard.values())
    assert [tasks.index(each) for each in heard] == [0, 1, 2, 3]


def held(scheduler: Scheduler) -> int:
    """Bytes of all arrays that running states and kept prompts hold."""
    arrays = [a for running in scheduler._running.values() for a in running.state.arrays()]
    arrays += [a for _, kept in scheduler.cache._entries.values() for a in kept]
    return sum(array.nbytes for array in {id(array): array for array in arrays}.values())


def test_real_memory_stays_within_the_budget():
    """Sequences of many lengths and modes that come and go, with prompts that begin alike."""
    key = mx.random.key(3)
    picks = mx.random.randint(0, 10**6, (20,), key=key).tolist()
    names, modes = list(models())[:4], ["full", "speculative", "wand", "stage"]
    tasks = []
    for pick in picks:
        model = models()[names[pick % 4]]
        mode = modes[pick // 4 % 4]
        options: dict[str, Any] = {}
        if "p99_bounds" in MODES[mode]:
            options["p99_bounds"] = [0.3] * (model.poe_n_stages - 1)
        if mode == "speculative":
            options["num_draft_tokens"] = 1 + pick % 7
        prompt = text(10 + pick % 3 * 150 + pick % 11, start=pick % 3)
        tasks.append(task(prompt, model=model, mode=mode, max_tokens=1 + pick % 20, **options))
    need = max(Scheduler(keep_trunk=1024).bytes_needed(each) for each in tasks)
    scheduler = Scheduler(
        memory=4 * need, prompt_cache_bytes=need, max_sequences=6, keep_trunk=1024
    )
    for each in tasks:
        scheduler.add(each)
    most = 0
    while len(scheduler):
        for _, news in scheduler.step():
            response(news)
        stats = scheduler.stats
        assert stats.cache_bytes <= need
        assert stats.state_bytes + stats.cache_bytes <= 4 * need
        for running in scheduler._running.values():
            assert running.state.nbytes <= running.need
        most = max(most, held(scheduler))
    assert need < most <= 4 * need
    assert scheduler.stats.cache_hits > 3


def drafting(**options: Any) -> GenerationRequest:
    """A task with a rounded drafter."""
    return task(mode="speculative", draft_bits=4, **options)


def test_what_was_accepted_runs_when_a_rounded_copy_has_taken_its_share():
    probe, long = Scheduler(max_sequences=1), task(text(600))
    first, again = drafting(), drafting(num_draft_tokens=2)
    (prefix,) = first.prefixes
    memory = max(probe.bytes_needed(long), probe.bytes_needed(first) + prefix.nbytes)
    assert probe.bytes_needed(long) + prefix.nbytes > memory
    scheduler = Scheduler(max_sequences=1, memory=memory, prompt_cache_bytes=0)
    scheduler.add(first, long, again)
    replies: dict[GenerationRequest, list[GenerationResponse]] = {first: [], long: [], again: []}
    copies, before = [], prefix.arrays
    for _ in range(100):
        for each, news in scheduler.step():
            replies[each].append(response(news))
        stats = scheduler.stats
        assert stats.state_bytes + stats.copy_bytes <= memory
        copies.append(stats.copy_bytes)
    assert [len(reply) for reply in replies.values()] == [12, 12, 12]
    assert {*copies} == {0, prefix.nbytes} and copies[0] == copies[-1] > 0
    assert tokens_of(replies[first]) == tokens_of(replies[again])
    # What the copy took was free while nobody drafted with it.
    assert not {*map(id, before)} & {*map(id, prefix.arrays)}
    prefix.release()
    freed = mx.get_active_memory()
    mx.eval(prefix.arrays)
    assert mx.get_active_memory() - freed >= prefix.nbytes


def test_a_copy_is_counted_before_the_task_that_drafts_with_it_starts():
    probe = Scheduler()
    one, other = task(), drafting()
    (prefix,) = other.prefixes
    both = probe.bytes_needed(one) + probe.bytes_needed(other) + prefix.nbytes
    for memory, running in ((both - 1, 1), (both, 2)):
        scheduler = Scheduler(memory=memory, prompt_cache_bytes=0)
        scheduler.add(one, other)
        scheduler.step()
        assert scheduler.stats.running == running
        scheduler.close()


def test_a_kept_state_that_is_too_large_for_what_is_left_is_not_used():
    long, beside, short = task(text(370), max_tokens=1), task(text(9, 5)), task([*text(20), 1, 2])
    scheduler = Scheduler(max_sequences=2)
    run(scheduler, [long])
    ((kept, _),) = scheduler.cache._entries.values()
    need = scheduler.bytes_needed(short, kept)
    assert scheduler.bytes_needed(short) < need
    scheduler.memory = scheduler.bytes_needed(beside) + need - 1
    scheduler.add(beside)
    scheduler.step()
    assert scheduler.stats.cache_entries == 1
    scheduler.add(short)
    scheduler.step()
    stats = scheduler.stats
    assert (stats.running, stats.cache_hits) == (2, 0) and stats.state_bytes <= scheduler.memory


@pytest.mark.parametrize("step_size", [None, 16])
def test_a_state_from_the_cache_fits_its_promise_without_others_beside_it(step_size):
    """Activations are dropped in pieces as large as those that another task has read."""
    for first, then in (("full", "full"), ("wand", "full"), ("stage", "stage")):
        scheduler = Scheduler(max_sequences=1)
        bounds = {"p99_bounds": BOUNDS} if first == "wand" else {}
        run(scheduler, [task(text(300), mode=first, max_tokens=1, **bounds)])
        for prompt in ([*text(20), 1, 2], [*text(299), 1, *text(90)]):
            each = task(prompt, mode=then, prefill_step_size=step_size, max_tokens=8)
            scheduler.add(each)
            while len(scheduler):
                scheduler.step()
                for running in scheduler._running.values():
                    assert running.state.nbytes <= running.need
        assert scheduler.cache.hits


def test_a_short_task_that_goes_on_from_a_long_text_is_counted_with_its_buffers():
    scheduler = Scheduler()
    run(scheduler, [task(text(370), max_tokens=1)])
    short = task([*text(20), 1, 2], max_tokens=30)
    scheduler.add(short)
    scheduler.step()
    running = scheduler._running[short]
    assert running.need > scheduler.bytes_needed(short)
    assert running.state.nbytes <= running.need
    assert run(scheduler, [])  # it has a reply
    assert scheduler.cache.cached_tokens == 20


def test_rows_of_others_do_not_stay_in_memory():
    """One long sequence beside many short ones."""
    scheduler = Scheduler(max_sequences=5, keep_trunk=1024, prompt_cache_bytes=0)
    long = task(text(20), max_tokens=60)
    scheduler.add(long)
    while not scheduler._running:
        scheduler.step()
    state, most = scheduler._running[long].state, 0
    while long in scheduler._running:
        while len(scheduler) < 5:
            scheduler.add(task(text(10), max_tokens=6))
        most = max(most, state.nbytes)
        scheduler.step()
    alone = DecodingState(base, keep_trunk=1024)
    list(stream_generate(base, endless, text(20), max_tokens=60, state=alone))
    assert most <= 1.4 * alone.nbytes
    assert state.tokens == alone.tokens


def test_there_is_memory_on_this_machine():
    assert memory_for_states() > 1 << 28


# --- the life of tasks ----------------------------------------------------------------------------


def test_a_task_can_be_cancelled_wherever_it_is():
    scheduler = Scheduler(max_sequences=2)
    tasks = [task(max_tokens=20) for _ in range(4)]
    for each in tasks:
        scheduler.add(each)
    got: dict[GenerationRequest, list[int]] = {each: [] for each in tasks}
    steps = 0
    while len(scheduler):
        steps += 1
        for each, news in scheduler.step():
            got[each].append(response(news).token)
        if steps == 5:
            scheduler.cancel(tasks[0])  # running
            scheduler.cancel(tasks[3])  # waiting
            scheduler.cancel(tasks[0])  # a second time
    whole = tokens_of(list(stream_generate(base, endless, STORY, max_tokens=20)))
    assert 0 < len(got[tasks[0]]) < 20
    assert got[tasks[0]] == whole[: len(got[tasks[0]])]
    assert got[tasks[1]] == got[tasks[2]] == whole
    assert got[tasks[3]] == []


@pytest.mark.parametrize("where", ["running", "waiting", "reading"])
def test_a_paused_task_leaves_its_slot_to_others_and_goes_on_where_it_was(where):
    scheduler = Scheduler(max_sequences=1)
    prompt = text(900) if where == "reading" else STORY
    options = {"temp": 0.8, "seed": 3, "max_tokens": 16, "repetition_penalty": 1.2}
    first, other = task(prompt, **options), task(text(30, start=500))
    got: list[GenerationResponse] = []
    scheduler.add(*((other, first) if where == "waiting" else (first, other)))
    while len(got) < (5 if where == "running" else 0) or not scheduler._running:
        got += [response(news) for each, news in scheduler.step() if each is first]
    scheduler.pause(first)
    scheduler.pause(first)
    assert scheduler.stats.paused == 1
    ended = run(scheduler, [])
    assert is_last(ended[other][-1]) and not ended.get(first)
    assert scheduler.stats.state_bytes == 0 and len(scheduler) == 0
    last = task(text(40, start=900))
    scheduler.add(last)
    scheduler.resume(first)
    scheduler.resume(first)
    heard = run(scheduler, [])
    assert list(heard) == [first, last]
    got += heard[first]
    alone = stream_generate(base, endless, prompt, **options)
    assert told(got) == told(list(alone))
    # What it had read was kept.
    assert scheduler.stats.cache_hits == (where != "waiting")


def test_a_paused_task_can_be_cancelled():
    scheduler = Scheduler(max_sequences=1)
    first, other = task(), task()
    scheduler.add(first, other)
    scheduler.step()
    for each in (first, other):
        scheduler.pause(each)
        scheduler.cancel(each)
        scheduler.resume(each)
    assert (len(scheduler), scheduler.stats.paused, scheduler.step()) == (0, 0, [])


@pytest.mark.parametrize("where", [(PromptCache, "find"), (PromptCache, "put"), (Batch, "add")])
def test_an_interruption_between_two_requests_loses_no_task(where, monkeypatch):
    scheduler = Scheduler(max_sequences=2)
    tasks = [task(TALK, max_tokens=5, seed=i, temp=0.8) for i in range(4)]
    scheduler.add(*tasks)
    real, calls, updates = getattr(*where), [], []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        result = real(*args, **options)
        if len(calls) % 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(*where, interrupted)
    interruptions = 0
    for _ in range(100):
        try:
            updates += scheduler.step()
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 1 and not len(scheduler) and not scheduler.stats.running
    for i, each in enumerate(tasks):
        mine = [response(news) for other, news in updates if other is each]
        assert [is_last(news) for news in mine] == [False] * 4 + [True]
        alone = stream_generate(base, endless, TALK, max_tokens=5, seed=i, temp=0.8)
        assert tokens_of(mine) == tokens_of(list(alone))


def test_a_task_that_started_just_before_an_interruption_is_not_started_again():
    class Interrupted(deque):
        def remove(self, _):
            scheduler._waiting = deque(self)
            raise KeyboardInterrupt

    scheduler = Scheduler(max_sequences=2)
    scheduler._waiting = Interrupted()
    each = task(TALK, max_tokens=5)
    scheduler.add(each)
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    heard = run(scheduler, [])
    alone = stream_generate(base, endless, TALK, max_tokens=5)
    assert tokens_of(heard[each]) == tokens_of(list(alone))


def test_a_reply_that_ends_early_leaves_the_state_at_its_end():
    """Several tokens may come at once; those behind a stop string are not the reply's."""
    scheduler = Scheduler()
    options = {"mode": "speculative", "num_draft_tokens": 6, "max_tokens": 40}
    each = task("The capital of France is", stop=" French", **options)
    heard = run(scheduler, [each])[each]
    ((state, _),) = scheduler.cache._entries.values()
    said = [*each.tokens, *tokens_of(heard)]
    assert state.tokens in (said, said[:-1])
    assert [r.finish_reason for r in heard] == [None] * (len(heard) - 1) + ["stop"]


def test_a_mode_that_does_not_pay_falls_back_beside_others():
    dear = Costs((1, 8), ((1.0, 20.0),) * 4, ((1.0, 20.0),) * 4, (3,))
    options = {"mode": "speculative", "costs": dear, "max_tokens": 30}
    tasks = [task(**options), task(text(30)), task(mode="speculative", max_tokens=30)]
    heard = run(Scheduler(), tasks)
    left, _, unwatched = (heard[each] for each in tasks)
    assert tokens_of(left) == tokens_of(unwatched)
    assert left[-1].fell_back and "full depth" in left[-1].fell_back
    assert unwatched[-1].fell_back is None
    assert left[-1].drafted_tokens < unwatched[-1].drafted_tokens


def test_nothing_grows_over_many_requests():
    room = 3_000_000  # for fewer prompts than come
    scheduler = Scheduler(max_sequences=4, prompt_cache_bytes=room)
    sizes = []
    for i in range(60):
        run(scheduler, [task(text(12 + i % 5, start=i), max_tokens=2)])
        if i in (44, 59):
            cache = scheduler.cache
            sizes.append((len(cache), cache.nbytes, len(cache._users), mx.get_active_memory()))
        assert scheduler.cache.nbytes <= room
    assert not scheduler._running and not scheduler._waiting and not len(scheduler._batch)
    (*first, before), (*last, after) = sizes
    assert first == last and first[0] < 44
    assert after <= before + 300_000


def test_a_closed_scheduler_holds_nothing():
    scheduler = Scheduler(max_sequences=1)
    for _ in range(3):
        scheduler.add(task())
    scheduler.step()
    scheduler.close()
    assert len(scheduler) == 0 and scheduler.step() == []
    assert held(scheduler) == scheduler.cache.nbytes == 0
