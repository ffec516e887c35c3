"""The cache and the decoding state: whatever is done to them, they equal a fresh forward."""

from itertools import pairwise
from unittest.mock import Mock

import mlx.core as mx
import pytest
from conftest import GOLDENS, fixture, goldens
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_mlx.cache import stage_cache as cache_module
from cognica_mlx.cache.attention import Visible
from cognica_mlx.cache.stage_cache import StageCache
from cognica_mlx.decoding import requests
from cognica_mlx.decoding.single import carry_out, prefill, set_depth
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import RequestError, RollbackError

TOLERANCE = 1e-4


class Shown:
    """A cache of one layer beside the positions that it should show."""

    def __init__(self, window: int, slack: int):
        self.cache = StageCache([window], slack)
        self.window = window
        self.position = 0
        self.kept: list[float] = []

    def add(self, keys: list[float]) -> None:
        """Run positions through it whose keys are these numbers."""
        done, count = self.cache.begin(len(keys)), len(keys)
        k = mx.array(keys).reshape(1, 1, -1, 1)
        q = mx.zeros_like(k)
        # With queries of zero each position sees the mean of what is visible to it.
        out = done.attend(q, k, k, 1.0).reshape(-1).tolist()
        self.cache.commit(done)
        self.kept = [*self.kept[: self.position], *keys]
        for i in range(count):
            end = self.position + i + 1
            visible = self.kept[max(end - 1 - self.window, 0) : end]
            assert out[i] == pytest.approx(sum(visible) / len(visible), rel=1e-4)
        self.position += count


@settings(max_examples=50)
@given(
    window=st.integers(1, 12),
    slack=st.integers(1, 6),
    large=st.booleans(),
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "add", "back", "fork", "round"]), st.integers(1, 30)),
        max_size=40,
    ),
)
def test_cache_shows_the_window_and_rolls_back_its_slack(window, slack, large, steps):
    """Written in place or beside the buffer, in the same round or the next."""
    shown, furthest = Shown(window, slack), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "LARGE", 0 if large else 1 << 20)
        for action, count in steps:
            if action == "fork":
                abandoned, shown.cache = shown.cache, shown.cache.fork()
                done = abandoned.begin(count)
                rows = mx.full((1, 1, count, 1), 900.0)
                done.attend(rows, rows, rows, 1.0)
                abandoned.commit(done)
            elif action == "round":
                shown.cache.next_round()
            elif action == "add":
                shown.add([float(100 * furthest + p) for p in range(count)])
                furthest = max(furthest, shown.position)
                held = sum(a.nbytes for a in shown.cache.arrays())
                assert held <= 2 * 4 * (window + 2 * slack + min(64, slack))
            elif count <= shown.position and shown.position - count >= furthest - slack:
                shown.cache.rollback(shown.position - count)
                shown.position -= count
            assert shown.cache.offset == shown.position


def test_the_bound_on_a_caches_rows_includes_the_tail(monkeypatch):
    monkeypatch.setattr(cache_module, "LARGE", 0)
    shown = Shown(window=5, slack=4)
    for count in (3, 2, 2):  # all in one round
        shown.add([1.0] * count)
    held = sum(array.nbytes for array in shown.cache.arrays())
    assert held == 2 * 4 * cache_module.most_rows(5, 4, 7, row_bytes=4)


def test_cache_refuses_a_rollback_it_cannot_do_and_stays_as_it_was():
    shown = Shown(window=4, slack=2)
    for p in range(40):
        shown.add([float(p)])
    earliest = shown.cache.earliest
    with pytest.raises(RollbackError, match=f"holds positions {earliest} to 40"):
        shown.cache.rollback(earliest - 1)
    with pytest.raises(RollbackError):
        shown.cache.rollback(41)
    shown.add([40.0])


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_rollback_to_the_earliest_position_finds_every_key_it_needs(length):
    shown = Shown(window=5, slack=3)
    for start in range(0, 45, length):
        shown.add([float(p) for p in range(start, start + length)])
        if shown.cache.earliest:
            back = Shown(window=5, slack=3)
            back.cache, back.kept = shown.cache.fork(), shown.kept
            back.position = back.cache.earliest
            back.cache.rollback(back.position)
            back.add([900.0])
    assert shown.cache.earliest


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("before", [2, 20])
def test_attention_in_two_parts_is_attention_in_one(heads, length, before, monkeypatch):
    """Drafts go beside a buffer that is in use; what they see is the same."""
    n_head, n_kv_head = heads
    caches = [StageCache([10], 16) for _ in range(2)]
    outs: list[list[mx.array]] = [[], []]
    monkeypatch.setattr(cache_module, "LARGE", 0)
    for step, count in enumerate((before, 1, length, length)):
        rows = mx.random.normal((1, n_head + 2 * n_kv_head, count, 4), key=mx.random.key(step))
        q, k, v = mx.split(rows, [n_head, n_head + n_kv_head], axis=1)
        for i, cache in enumerate(caches):
            if i or step < 2:
                cache.next_round()
            done = cache.begin(count)
            outs[i].append(done.attend(q, k, v, 0.5))
            cache.commit(done)
    assert caches[0].content.spans[10].tail and not caches[1].content.spans[10].tail
    for one, other in zip(*outs, strict=True):
        assert mx.abs(one - other).max().item() < 1e-5
    for one, other in zip(caches[0].rows(), caches[1].rows(), strict=True):
        assert all(
            mx.array_equal(x[:, :, -11:], y[:, :, -11:]) for x, y in zip(one, other, strict=True)
        )


@pytest.mark.parametrize(
    ("window", "offset", "length"), [(4, 0, 9), (4, 3, 2), (4, 9, 3), (9, 2, 5)]
)
def test_mask_shows_just_the_window(window, offset, length):
    queries = mx.zeros((1, 1, length, 2))
    mask = Visible(window, offset, length).mask(queries, 1)[0, 0]
    start = offset - min(offset, window)
    for i in range(length):
        for j in range(mask.shape[1]):
            shown = 0 <= (offset + i) - (start + j) <= window
            assert mask[i, j].item() == (0 if shown else mx.finfo(mx.float32).min)


def advance(state: DecodingState, stage: int) -> None:
    """Run what is pending before `stage`."""
    carry_out(requests.advance(state, stage))


class Walk:
    """A decoding state beside the plain list of its tokens."""

    def __init__(self, name: str, **options: int):
        self.model, _ = fixture(name)
        self.state = DecodingState(self.model, **options)
        self.source = goldens(name)["long.tokens"][0].tolist() * 4
        self.tokens: list[int] = []

    def add(self, count: int) -> None:
        new = self.source[len(self.tokens) : len(self.tokens) + count]
        # After a rollback go on with other tokens than before, so that leftovers would show.
        new = [(t + len(self.state.positions_run)) % 300 for t in new]
        self.tokens += new
        self.state.append(new)

    def check(self, stage: int) -> None:
        """Fill everything up to `stage` and compare its last position with a fresh forward."""
        for k in range(stage + 1):
            advance(self.state, k)
        end = len(self.tokens)
        ours = self.model.stage_logits(stage, self.state.boundary(stage, end - 1, end))
        fresh = self.model.forward_stage(mx.array([self.tokens]), stage)[:, -1:]
        assert mx.abs(ours - fresh).max().item() < TOLERANCE
        assert self.state.tokens == self.tokens


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 9)),
        st.tuples(st.just("add"), st.integers(100, 420)),
        st.tuples(st.just("advance"), st.integers(0, 5)),
        st.tuples(st.just("back"), st.integers(1, 16)),
        st.tuples(st.just("check"), st.integers(0, 5)),
        st.tuples(st.just("fork"), st.just(0)),
    ),
    min_size=4,
    max_size=14,
)


@pytest.mark.parametrize("name", GOLDENS)
@settings(max_examples=3)
@given(steps=actions)
def test_any_walk_equals_a_fresh_forward(name, steps):
    walk = Walk(name, slack=16, max_pending=40)
    furthest = 0
    for action, amount in steps:
        stage = min(amount, walk.model.poe_n_stages - 1)
        if action == "add" and len(walk.tokens) + amount < 1000:
            walk.add(amount)
            furthest = max(furthest, len(walk.tokens))
        elif action == "advance" and walk.tokens:
            # Stages run in order: one that has nothing before it has nothing to do.
            advance(walk.state, stage)
        elif (
            action == "back"
            and furthest - 16 <= len(walk.tokens) - amount
            and len(walk.tokens) > amount
        ):
            walk.state.rollback(len(walk.tokens) - amount)
            del walk.tokens[len(walk.tokens) - amount :]
        elif action == "fork":
            abandoned, walk.state = walk.state, walk.state.fork()
            abandoned.append([1] * 30)
            advance(abandoned, 0)
        elif action == "check" and walk.tokens:
            walk.check(stage)
        filled = walk.state.filled
        assert all(a >= b for a, b in pairwise(filled))
        assert all(walk.state.pending(k) <= 40 for k in range(1, len(filled)))
    if walk.tokens:
        walk.check(walk.model.poe_n_stages - 1)


def test_each_position_runs_once_through_each_stage():
    walk = Walk("flat-d8", slack=16, max_pending=40)
    for _ in range(200):
        walk.add(3)
        advance(walk.state, 0)
    walk.check(3)
    assert walk.state.positions_run == [600] * 4
    walk.state.rollback(590)
    assert walk.state.filled == [590] * 4
    del walk.tokens[590:]
    walk.add(10)
    walk.check(3)
    assert walk.state.positions_run == [610] * 4


def test_memory_is_flat_far_beyond_the_windows():
    """Run it with `-n 0 -s` for the figures that the README gives."""
    model, _ = fixture("poe-tiny")
    state, sizes = DecodingState(model), {}
    for length in range(1024, 6145, 1024):
        prefill(state, [7] * (length - 3 - state.length), model.poe_n_stages - 1)
        for _ in range(3):
            state.append([7])
            for stage in range(model.poe_n_stages):
                advance(state, stage)
        sizes[state.length] = state.nbytes
    print({length: f"{size / 1e6:.1f} MB" for length, size in sizes.items()})
    assert max(sizes.values()) <= 1.05 * sizes[1024]


def test_rollback_refuses_what_has_slid_away_and_changes_nothing():
    walk = Walk("flat-d8", slack=16, max_pending=40)
    walk.add(1400)
    walk.check(3)
    earliest = walk.state.earliest_rollback
    assert earliest <= 1400 - 16
    before = walk.state.nbytes
    with pytest.raises(RollbackError, match=f"{earliest} is the earliest"):
        walk.state.rollback(earliest - 1)
    with pytest.raises(RollbackError):
        walk.state.rollback(1401)
    assert walk.state.nbytes == before and walk.state.length == 1400
    walk.state.rollback(0)
    assert walk.state.nbytes == 0 and walk.state.tokens == []


def test_deeper_stages_stay_empty_in_a_shallow_state_and_are_refilled_on_demand():
    walk = Walk("flat-d8", slack=16, max_pending=40)
    set_depth(walk.state, 0)
    for _ in range(30):
        walk.add(25)
        advance(walk.state, 0)
    assert walk.state.filled == [750, 0, 0, 0]
    with pytest.raises(RequestError, match="set_depth"):
        advance(walk.state, 1)
    set_depth(walk.state, 3)
    walk.check(3)
    # Little enough pending is caught up from the kept activations, without a second pass.
    set_depth(walk.state, 1)
    runs = list(walk.state.positions_run)
    walk.add(30)
    walk.check(1)
    set_depth(walk.state, 3)
    walk.check(3)
    assert [a - b for a, b in zip(walk.state.positions_run, runs, strict=True)] == [30] * 4


def test_appended_tokens_may_still_be_unevaluated():
    walk = Walk("flat-d8")
    walk.add(5)
    walk.tokens.append(9)
    walk.state.append(mx.array([[4]]) + 5)
    walk.check(3)


def test_an_interruption_half_way_leaves_the_last_complete_position(monkeypatch):
    walk = Walk("flat-d8")
    walk.add(20)
    walk.check(3)
    walk.add(5)
    block = type(walk.model.h[0])
    calls, original = [], block.__call__

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(block, "__call__", interrupted)
    advance(walk.state, 0)
    with pytest.raises(KeyboardInterrupt):
        advance(walk.state, 1)
    assert walk.state.tokens == walk.tokens
    assert walk.state.filled == [25, 20, 20, 20]
    walk.check(3)


def test_an_interruption_between_an_output_and_its_keys_leaves_the_last_complete_position():
    walk = Walk("flat-d8")
    walk.add(20)
    walk.check(3)
    walk.add(5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageCache, "commit", Mock(side_effect=KeyboardInterrupt))
        advance(walk.state, 0)
    assert walk.state.filled == [20] * 4
    for _ in range(2):
        walk.check(3)
        walk.add(5)


def test_compacting_drops_what_was_rolled_back_once_it_is_enough():
    state = DecodingState(fixture("flat-d8")[0])
    prefill(state, [*range(1, 101)], 0)
    state.rollback(90)

    def held() -> int:
        return sum(len(hidden) for hidden in state.given[0].sources())

    for excess, rows in ((10, 100), (9, 90)):
        state.compact(excess)
        assert held() == rows


def test_token_arrays_do_not_pile_up():
    walk = Walk("flat-d8")
    for _ in range(300):
        walk.add(1)
    assert len(walk.state._late) <= 256
    walk.check(0)


@pytest.mark.parametrize("token", [-1, 320])
def test_ids_outside_the_vocabulary_are_named(token):
    walk = Walk("flat-d8")
    with pytest.raises(RequestError, match=f"token id {token} "):
        walk.state.append([1, token])
    assert walk.state.length == 0


def test_positions_no_longer_held_are_named():
    walk = Walk("flat-d8", slack=16)
    for _ in range(10):
        walk.add(5)
        walk.check(3)
    with pytest.raises(RequestError, match="positions 0 to 1 at stage 3"):
        walk.state.boundary(3, 0, 2)
