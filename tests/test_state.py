"""The cache and the decoding state: whatever is done to them, they equal a fresh forward."""

from itertools import pairwise

import mlx.core as mx
import pytest
from conftest import GOLDENS, fixture, goldens
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_mlx.cache import SlidingCache, window_mask
from cognica_mlx.errors import RequestError, RollbackError
from cognica_mlx.state import DecodingState

TOLERANCE = 1e-4


def numbered(positions: range) -> mx.array:
    """Keys (1, 1, T, 1) that carry their own position."""
    return mx.array([float(p) for p in positions]).reshape(1, 1, -1, 1)


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 12),
    slack=st.integers(1, 6),
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "back", "fork"]), st.integers(1, 30)), max_size=40
    ),
)
def test_cache_shows_the_window_and_rolls_back_its_slack(window, slack, steps):
    cache, position, furthest = SlidingCache(window, slack), 0, 0
    for action, count in steps:
        if action == "fork":
            abandoned, cache = cache, cache.fork()
            abandoned.update(numbered(range(900, 900 + count)), numbered(range(900, 900 + count)))
        elif action == "add":
            new = range(position, position + count)
            keys, values = cache.update(numbered(new), numbered(new))
            expected = list(range(position - min(position, window), position + count))
            assert keys.reshape(-1).tolist() == expected
            assert values.reshape(-1).tolist() == expected
            position += count
            furthest = max(furthest, position)
            assert sum(a.nbytes for a in cache.arrays()) <= 2 * 4 * (window + 2 * slack)
        elif count <= position and position - count >= furthest - slack:
            cache.rollback(position - count)
            position -= count
        assert cache.offset == position


def test_cache_refuses_a_rollback_it_cannot_do_and_stays_as_it_was():
    cache = SlidingCache(window=4, slack=2)
    for p in range(40):
        cache.update(numbered(range(p, p + 1)), numbered(range(p, p + 1)))
    earliest = cache.earliest
    with pytest.raises(RollbackError, match=f"reaches from {earliest} to 40"):
        cache.rollback(earliest - 1)
    with pytest.raises(RollbackError):
        cache.rollback(41)
    keys, _ = cache.update(numbered(range(40, 41)), numbered(range(40, 41)))
    assert keys.reshape(-1).tolist() == [36, 37, 38, 39, 40]


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_rollback_to_the_earliest_position_finds_every_key_it_needs(length):
    cache = SlidingCache(window=5, slack=3)
    for start in range(0, 45, length):
        new = numbered(range(start, start + length))
        cache.update(new, new)
        if cache.earliest:
            back = cache.fork()
            back.rollback(cache.earliest)
            keys, _ = back.update(numbered(range(900, 901)), numbered(range(900, 901)))
            expected = [*range(cache.earliest - 5, cache.earliest), 900]
            assert keys.reshape(-1).tolist() == expected
    assert cache.earliest


@pytest.mark.parametrize(
    ("window", "offset", "length"), [(4, 0, 9), (4, 3, 2), (4, 9, 3), (9, 2, 5)]
)
def test_mask_shows_just_the_window(window, offset, length):
    mask = window_mask(window, offset, length)
    start = offset - min(offset, window)
    if isinstance(mask, str):
        assert offset + length <= window + 1  # causal hides all that must be hidden
        return
    for i in range(length):
        for j in range(mask.shape[1]):
            assert mask[i, j].item() == (0 <= (offset + i) - (start + j) <= window)


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
            self.state.advance(k)
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
@settings(max_examples=12, deadline=None)
@given(steps=actions)
def test_any_walk_equals_a_fresh_forward(name, steps):
    walk = Walk(name, slack=16, max_pending=40)
    furthest = 0
    for action, amount in steps:
        stage = min(amount, walk.model.poe_n_stages - 1)
        if action == "add" and len(walk.tokens) + amount < 1500:
            walk.add(amount)
            furthest = max(furthest, len(walk.tokens))
        elif action == "advance" and walk.tokens:
            # Stages run in order: one that has nothing before it has nothing to do.
            walk.state.advance(stage)
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
            abandoned.advance(0)
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
        walk.state.advance(0)
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
    for length in range(1024, 10241, 512):
        state.prefill([7] * (length - 3 - state.length), model.poe_n_stages - 1)
        for _ in range(3):
            state.append([7])
            for stage in range(model.poe_n_stages):
                state.advance(stage)
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
    walk.state.set_depth(0)
    for _ in range(30):
        walk.add(25)
        walk.state.advance(0)
    assert walk.state.filled == [750, 0, 0, 0]
    with pytest.raises(RequestError, match="set_depth"):
        walk.state.advance(1)
    walk.state.set_depth(3)
    walk.check(3)
    # Little enough pending is caught up from the kept activations, without a second pass.
    walk.state.set_depth(1)
    runs = list(walk.state.positions_run)
    walk.add(30)
    walk.check(1)
    walk.state.set_depth(3)
    walk.check(3)
    assert [a - b for a, b in zip(walk.state.positions_run, runs, strict=True)] == [30] * 4


def test_appended_tokens_may_still_be_unevaluated():
    walk = Walk("flat-d8")
    walk.add(5)
    walk.tokens.append(9)
    walk.state.append(mx.array([[4]]) + 5)
    walk.check(3)


def test_an_interruption_half_way_leaves_an_empty_state(monkeypatch):
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
    walk.state.advance(0)
    with pytest.raises(KeyboardInterrupt):
        walk.state.advance(1)
    assert walk.state.length == 0 and walk.state.tokens == []
    walk.state.append(walk.tokens)
    walk.check(3)


def test_token_arrays_do_not_pile_up():
    walk = Walk("flat-d8")
    for _ in range(700):
        walk.add(1)
    assert len(walk.state._unread) <= 256
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
