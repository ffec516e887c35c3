"""Prompts that begin alike are read once, with the same replies, within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from conftest import SOAK, fixture
from hypothesis import given
from hypothesis import strategies as st
from test_scheduler import endless, models, response, run, task, text, tokens_of

from cognica_mlx.decoding.modes import MODES
from cognica_mlx.decoding.single import prefill
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.network.model import PoEModel
from mlx_poe import stream_generate
from mlx_poe.engine.scheduler import Scheduler
from mlx_poe.generation.prefix_tree import PrefixTree, common_start
from mlx_poe.generation.prompt_cache import LEAST, PromptCache, chat_marks
from mlx_poe.generation.request import GenerationRequest

base, tokenizer = fixture("poe-tiny")
SYSTEM = {"role": "system", "content": "You are a kind and patient teacher. " * 12}


def read(tokens: list[int], model: PoEModel = base, **options: int) -> DecodingState:
    state = DecodingState(model, **options)
    prefill(state, tokens, state.depth)
    return state


def size_of(tokens: list[int]) -> int:
    """What a text takes once it is kept."""
    cache = PromptCache(1 << 30)
    cache.put(read(tokens))
    return cache.nbytes


def replies(scheduler: Scheduler, tasks: list[GenerationRequest]) -> list[tuple[list[int], int]]:
    """Each task's tokens, and how much of its prompt was cached."""
    heard = run(scheduler, tasks)
    found = []
    for each in tasks:
        responses = heard[each]
        found.append((tokens_of(responses), responses[-1].cached_tokens))
    return found


def cold(each: GenerationRequest, mode: str = "full", **options: Any) -> list[int]:
    stream = stream_generate(
        each.model, endless, each.tokens, max_tokens=each.max_tokens, mode=mode, **options
    )
    return tokens_of(list(stream))


def test_common_start():
    for a, b, n in (([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([4], [5], 0)):
        assert common_start(a, b) == common_start(b, a) == n


TEXTS = st.lists(st.integers(0, 2), max_size=7).map(tuple)


@given(st.lists(st.tuples(TEXTS, st.integers(0, 8), st.booleans())), TEXTS, st.integers(0, 8))
def test_the_index_finds_what_a_look_at_every_text_finds(changes, wanted, least):
    """Texts that branch, end in each other and occur twice; every third or so is removed again."""
    tree: PrefixTree[int] = PrefixTree()
    kept: dict[int, tuple[tuple[int, ...], int]] = {}
    for key, (words, needs, stays) in enumerate(changes):
        tree.add(words, needs, key)
        kept[key] = words, needs
        if not stays:
            gone = next(iter(kept))
            tree.remove(kept.pop(gone)[0], gone)
    found = [*tree.alike(wanted)]
    assert [common for common, _ in found] == sorted((n for n, _ in found), reverse=True)
    common = {key: common_start(words, wanted) for key, (words, _) in kept.items()}
    useful = [(n, key) for key, n in common.items() if n >= kept[key][1]]
    assert sorted(found) == sorted(useful)
    inside = [k for k, (words, _) in kept.items() if len(words) == common[k] >= least]
    assert sorted(tree.within(wanted, least)) == inside
    nodes = [tree._root]
    for node in nodes:
        nodes += node.children.values()
        needs = [*node.items.values(), *(child.least for child in node.children.values())]
        assert node.least == min(needs, default=float("inf"))
    for key, (words, _) in kept.items():
        tree.remove(words, key)
    assert not tree._root.children and tree._root.least == float("inf")


class Kept:
    """A state as far as the cache looks at it: its text, how deep it is filled, and how far back it
    can go."""

    def __init__(self, tokens: Sequence[int], filled: Sequence[int], earliest: int):
        self.model, self.tokens, self.length = base, list(tokens), len(tokens)
        self.earliest_rollback = earliest
        self.filled = [min(count, self.length) for count in filled]

    @property
    def caches(self) -> list[Any]:
        return [SimpleNamespace(offset=count) for count in self.filled]

    def saves(self, common: int) -> int:
        return sum(
            len(stage.layers) * min(common, count)
            for stage, count in zip(base.stages, self.filled, strict=True)
        )

    def serves(self, wanted: Sequence[int]) -> tuple[int, int] | None:
        """What it saves, by the rule: runs of a position through a layer, then positions."""
        common = next(n for n in range(len(wanted), -1, -1) if self.tokens[:n] == wanted[:n])
        usable = common >= max(LEAST, self.earliest_rollback) and self.saves(common)
        return (self.saves(common), common) if usable else None

    def compact(self) -> None: ...

    def trim(self, _: Any) -> None: ...

    def arrays(self) -> list[Any]:
        return [mx.zeros(self.length)]


LONG = st.lists(st.integers(0, 1), min_size=2, max_size=5).map(lambda ends: [7] * 7 + ends)
KEPT = st.builds(
    Kept, LONG, st.lists(st.integers(0, 12), min_size=4, max_size=4), st.integers(6, 12)
)


@given(st.lists(KEPT, max_size=8), st.lists(KEPT, max_size=3), LONG, st.integers(0, 400))
def test_the_candidates_are_those_of_a_look_at_every_state(kept, running, wanted, room):
    cache = PromptCache(room)
    for state in kept:
        cache.put(state)
    assert cache.nbytes <= room
    held = [state for state, _ in cache._entries.values()]
    for state in held:  # none that another could be turned into
        for other in held:
            if state is not other and state.tokens[: other.length] == other.tokens:
                covers = all(a >= b for a, b in zip(state.filled, other.filled, strict=True))
                assert state.earliest_rollback > other.length or not covers
    found = [*cache._candidates(base, wanted, running)]
    assert all(
        (state is cache._entries[key][0]) if key is not None else (state in running)
        for _, key, state in found
    )
    got = [(state.saves(common), common) for common, _, state in found]
    assert got == sorted(filter(None, (s.serves(wanted) for s in [*held, *running])), reverse=True)
    cache.shrink(0)
    assert not len(cache) and not cache._tree._root.children


# --- hits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_hit_gives_the_tokens_of_a_cold_run(mode):
    options = {"p99_bounds": [0.3] * 3} if "p99_bounds" in MODES[mode] else {}
    prompt = text(420)
    for other in ("stage", "full"):
        scheduler = Scheduler()
        run(scheduler, [task(prompt, mode=other)])
        each = task([*prompt, 5, 6, 7], mode=mode, **options)
        ((tokens, cached),) = replies(scheduler, [each])
        assert tokens == cold(each, mode, **options)
        # What the deeper stages need has been forgotten by one that ran the first alone.
        assert cached == (0 if other == "stage" and mode != "stage" else 420)


def test_what_is_kept_is_not_part_of_what_others_still_write():
    """Or it would keep their rows in memory, and they would be copied at every pass."""
    scheduler = Scheduler()
    tasks = [task(text(20 + i), max_tokens=10 + 10 * (i > 0)) for i in range(4)]
    scheduler.add(*tasks)
    while len(scheduler.cache) < 1:
        scheduler.step()
    ((state, arrays),) = scheduler.cache._entries.values()
    assert not any(cache.content.place for cache in state.caches)
    held = {id(array) for array in state.arrays()}
    assert held == {id(array) for array in arrays} and len(scheduler) == 3


def test_the_next_turn_reads_the_new_turn_only():
    scheduler = Scheduler()
    first = task(text(40), max_tokens=20)
    ((said, cached),) = replies(scheduler, [first])
    assert cached == 0
    second = task([*first.tokens, *said, *text(10, start=3)])
    before = scheduler.stats.cached_tokens
    ((tokens, cached),) = replies(scheduler, [second])
    # The last token of a reply has not been run: nothing was predicted from it.
    assert cached == 40 + 19 == scheduler.stats.cached_tokens - before
    assert tokens == cold(second)
    assert scheduler.stats.cache_hits == 1


def test_a_sequence_that_is_still_running_serves_others():
    scheduler = Scheduler()
    long = task(text(200), max_tokens=40)
    scheduler.add(long)
    said = []
    while len(said) < 5:
        said += [response(news).token for _, news in scheduler.step()]
    other = task([*text(150), 9, 9, 9])
    assert replies(scheduler, [other]) == [(cold(other), 150)]


@pytest.mark.parametrize("more", [pytest.param(5, marks=SOAK), 30])
def test_a_sequence_beside_others_serves_what_its_copy_can_go_back_to(more):
    """Side by side they keep rows that a copy does not."""
    scheduler = Scheduler()
    scheduler.add(*(task(text(250, start=i), max_tokens=200) for i in range(2)))
    said = []
    while len(said) < 2 * more:
        said += [response(news) for _, news in scheduler.step()]
    states = [running.state for running in scheduler._running.values()]
    assert all(cache.content.place for state in states for cache in state.caches)
    assert not any(state.fork().earliest_rollback > state.earliest_rollback for state in states)
    other = task([*text(21), 9, 9, 9])
    heard = run(scheduler, [other])[other]
    assert tokens_of(heard) == cold(other)


def test_equal_prompts_at_once():
    tasks = [task(text(60), max_tokens=5) for _ in range(6)]
    need = Scheduler().bytes_needed(tasks[0])
    for memory in (need, 2 * need, None):
        scheduler = Scheduler(memory=memory, max_sequences=3, prompt_cache_bytes=need)
        found = replies(scheduler, tasks)
        assert [tokens for tokens, _ in found] == [cold(tasks[0])] * 6
        assert found[-1][1] == 59


@pytest.mark.parametrize("first", ["base", "math", "both"])
@pytest.mark.parametrize("then", ["base", "chat", "both"])
def test_what_the_base_has_read_serves_every_specialist(first, then):
    scheduler = Scheduler(keep_trunk=1024)
    prompt = text(400)
    run(scheduler, [task(prompt, model=models()[first])])
    state = next(iter(scheduler.cache._entries.values()))[0]
    each = task([*prompt, 3, 4, 5], model=models()[then])
    ((tokens, cached),) = replies(scheduler, [each])
    assert tokens == cold(each)
    assert cached == 400
    assert state.tokens[:400] == prompt  # what is kept has not moved


def test_a_specialist_that_would_need_what_is_gone_reads_again():
    scheduler = Scheduler(keep_trunk=0)
    run(scheduler, [task(text(400))])
    each = task(text(420), model=models()["chat"])
    assert replies(scheduler, [each]) == [(cold(each), 0)]


def test_tokens_that_a_specialist_embeds_anew_are_not_shared():
    scheduler = Scheduler(keep_trunk=1024)
    prompt = [2039, 2040, *text(30)[1:]]
    run(scheduler, [task(prompt)])
    each = task([*prompt, 3, 4], model=models()["chat"])
    assert replies(scheduler, [each]) == [(cold(each), 0)]


def test_a_state_that_cannot_go_back_is_of_no_use():
    cache = PromptCache(1 << 30)
    cache.put(read(text(700)))
    assert cache.find(base, text(400), 3) is None
    found = cache.find(base, [*text(600), 1, 2], 3)
    assert found and found.length == 600
    assert (cache.hits, cache.misses, cache.cached_tokens) == (1, 1, 600)


def test_the_best_of_several():
    cache = PromptCache(1 << 30)
    cache.put(read([*text(20), 1, 1, 1]))
    cache.put(read([*text(60), 1, 1, 1]))
    cache.put(read([*text(40), 1, 1, 1]))
    found = cache.find(base, text(200), 3)
    assert found and found.length == 60
    assert cache.find(base, text(LEAST), 3) is None  # not worth it


# --- chats ----------------------------------------------------------------------------------------


def talk(*said: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [SYSTEM, *({"role": roles[i % 2], "content": s} for i, s in enumerate(said))]


def test_a_system_text_is_shared_by_conversations():
    """Longer than what can be rolled back, and beyond the short windows."""
    model = models()["chat"]
    scheduler = Scheduler()
    tasks = [
        task(talk(words), model=model, max_tokens=4)
        for words in ("Tell me about the sea. " * 50, "12 plus 13?", "Why?")
    ]
    (mark,) = [m for m in tasks[0].marks if m > LEAST]
    assert mark > 128
    for each in tasks:
        ((tokens, cached),) = replies(scheduler, [each])
        assert tokens == cold(each)
        assert abs(cached - mark) < 8 if each is not tasks[0] else cached == 0


def test_another_last_question_finds_the_conversation_before_it():
    model = models()["chat"]
    scheduler = Scheduler()
    history = ("Hello! " * 40, "Good morning. " * 30)
    one, other = (
        task(talk(*history, last), model=model, max_tokens=3)
        for last in ("Why is the sea blue? " * 60, "Who are you?")
    )
    replies(scheduler, [one])
    ((tokens, cached),) = replies(scheduler, [other])
    assert tokens == cold(other)
    start = other.marks[-1]
    assert other.tokens[start] == tokenizer.token_id("<|user_start|>")
    assert start <= cached <= start + 8


def test_marks():
    assert chat_marks(tokenizer, "text", tokenizer.encode("text")) == ()
    tokens = tokenizer.apply_chat_template(talk("Hi"))
    (end,) = chat_marks(tokenizer, talk("Hi"), tokens)
    assert "teacher" in tokenizer.decode(tokens[:end])
    assert "Hi" not in tokenizer.decode(tokens[:end])


# --- bounds ---------------------------------------------------------------------------------------


def test_a_short_text_takes_the_room_of_its_own_rows():
    state = read(text(10))
    row = 2 * base.config.n_kv_head * base.config.head_dim * 4
    activations = sum(
        a.nbytes for given in state.given for h in given.sources() for a in h.arrays()
    )
    assert state.nbytes > 256 * 8 * row
    assert size_of(text(10)) <= 11 * 8 * row + activations


def test_what_was_of_no_use_for_longest_goes_first():
    texts = [text(30, start=i) for i in range(4)]
    size = size_of(texts[0])
    cache = PromptCache(3 * size)
    for tokens in texts[:3]:
        cache.put(read(tokens))
    assert len(cache) == 3 and cache.nbytes <= 3 * size
    assert cache.find(base, [*texts[0], 1], 3)
    cache.put(read(texts[3]))
    assert len(cache) == 3 and cache.nbytes <= 3 * size
    found = [cache.find(base, [*tokens, 1], 3) is not None for tokens in texts]
    assert found == [True, False, True, True]
    cache.shrink(size)
    assert len(cache) == 1
    cache.shrink(0)
    assert (len(cache), cache.nbytes, cache._users) == (0, 0, {})


def test_a_state_that_is_too_large_is_not_kept_and_drives_nothing_out():
    cache = PromptCache(size_of(text(30)) + 1000)
    cache.put(read(text(30)))
    cache.put(read(text(500, start=3)))
    assert len(cache) == 1
    cache.put(read(text(40, start=5)), room=1000)
    assert len(cache) == 1


def test_states_that_others_cover_are_not_kept_twice():
    cache = PromptCache(1 << 30)
    cache.put(read(text(40)))
    cache.put(read(text(30)))
    assert len(cache) == 1
    cache.put(read(text(50)))
    assert len(cache) == 1
    found = cache.find(base, [*text(50), 1], 3)
    assert found and found.length == 50
    # Another model's, and one that cannot come back so far, are others.
    cache.put(read(text(50), models()["chat"]))
    cache.put(read(text(700)))
    assert len(cache) == 3


def test_shared_arrays_are_counted_once():
    cache = PromptCache(1 << 30)
    state = read(text(700))
    cache.put(state.fork())
    size = cache.nbytes
    prefill(state, text(10, start=1), 3)
    shorter = cache.find(base, [*text(690), 1, 2], 3)
    assert shorter
    cache.put(shorter)  # the same buffers, rolled back
    assert cache.nbytes == size
    cache.put(state)
    assert size < cache.nbytes <= 2 * size + 100_000


def test_kept_prompts_make_room_for_those_that_run():
    each = task(text(100), max_tokens=4)
    need = Scheduler().bytes_needed(each)
    scheduler = Scheduler(memory=need + need // 2, prompt_cache_bytes=need)
    for i in range(8):
        scheduler.add(task(text(100, start=i), max_tokens=4))
        while len(scheduler):
            scheduler.step()
            stats = scheduler.stats
            assert stats.state_bytes + stats.cache_bytes <= stats.memory_bytes
        assert 0 < scheduler.stats.cache_bytes <= need


def test_a_models_states_can_be_dropped():
    cache = PromptCache(1 << 30)
    cache.put(read(text(40)))
    cache.put(read(text(40), models()["chat"]))
    cache.drop([models()["chat"]])
    assert [state.model for state, _ in cache._entries.values()] == [base]


def test_a_stream_tells_what_its_state_held():
    state = DecodingState(base)
    prompt = text(420)

    def cached(mode: str, count: int) -> int:
        options = {"mode": mode, "max_tokens": 2, "state": state}
        return list(stream_generate(base, endless, prompt[:count], **options))[-1].cached_tokens

    assert [cached("stage", 420), cached("stage", 420)] == [0, 419]
    # The deeper stages need what has been forgotten: all of it runs again.
    assert [cached("full", 420), cached("full", 410)] == [0, 409]
    assert cached("full", 30) == 0


def test_prompts_that_come_at_once_read_what_they_share_once():
    """The first reads it, at most one sweep ahead; without a cache the others wait for it once."""
    model = models()["chat"]
    system = {"role": "system", "content": "You are a kind and patient teacher. " * 30}

    def tasks() -> list[GenerationRequest]:
        said = [[system, {"role": "user", "content": f"{i} plus {i}?"}] for i in range(5)]
        return [task(one, model=model, max_tokens=3) for one in said]

    (mark,) = [m for m in tasks()[0].marks if m > 200]
    for limit, most in ((None, 0), (0, 5)):
        several = tasks()
        scheduler = Scheduler(prompt_cache_bytes=limit)
        found = replies(scheduler, several)
        assert [tokens for tokens, _ in found] == [cold(each) for each in several]
        cached = [n for _, n in found]
        assert cached[0] == 0 and sum(n < mark - LEAST for n in cached[1:]) <= most
        assert not scheduler._readers


def test_nobody_waits_for_a_reader_that_has_gone():
    model = models()["chat"]
    said = [{**SYSTEM, "content": SYSTEM["content"] * 3}, {"role": "user", "content": "Hi"}]
    scheduler = Scheduler()
    first, *others = (task(said, model=model, max_tokens=3) for _ in range(3))
    scheduler.add(first, *others)
    scheduler._admit()
    assert (scheduler.stats.running, scheduler.stats.waiting) == (1, 2)
    scheduler.cancel(first)
    scheduler._admit()  # nor for a second one
    assert (scheduler.stats.running, scheduler.stats.waiting) == (2, 0)
    assert replies(scheduler, []) == []
    assert (len(scheduler), scheduler.stats.generation_tokens) == (0, 6)


def test_a_prompt_to_be_scored_waits_for_nobody():
    model = models()["chat"]
    said = [{**SYSTEM, "content": SYSTEM["content"] * 3}, {"role": "user", "content": "Hi"}]
    scheduler = Scheduler()
    scored = task(said, model=model, max_tokens=1, prompt_logprobs=True)
    scheduler.add(task(said, model=model, max_tokens=1), scored)
    scheduler._admit()
    assert scheduler.stats.running == 2
