"""Caches side by side: each shows what it would show by itself, whatever happens beside it."""

import itertools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from conftest import fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_mlx.backend import traces
from cognica_mlx.cache import fixed_pass
from cognica_mlx.cache import shelf as shelf_module
from cognica_mlx.cache.fixed_pass import FixedAttention, FixedPass
from cognica_mlx.cache.packed_pass import begin, in_order
from cognica_mlx.cache.shelf import APART, Shelf, arrange
from cognica_mlx.cache.stage_cache import StageCache
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.modes import make_mode
from cognica_mlx.decoding.sequence import DecodingSequence

WINDOWS = (3, 9)


class Shown:
    """A cache of two layers beside the keys that it should show, each a number of its own."""

    numbers = itertools.count(1)

    def __init__(self, slack: int = 4, windows: tuple[int, ...] = WINDOWS):
        self.cache, self.slack = StageCache(windows, slack), slack
        self.keys: list[float] = []
        self.furthest = 0

    def expected(self, window: int, count: int) -> list[float]:
        """The mean of what each of the last `count` positions sees."""
        ends = range(len(self.keys) - count + 1, len(self.keys) + 1)
        return [float(np.mean(self.keys[max(end - 1 - window, 0) : end])) for end in ends]

    def rollback(self, count: int) -> None:
        """Back by so much, if that is promised."""
        position = len(self.keys) - count
        if position >= max(self.furthest - self.slack, 0):
            self.cache.rollback(position)
            del self.keys[position:]


def run(shown: Sequence[Shown], counts: Sequence[int], commit: bool = True) -> None:
    """One pass, as a driver makes it; what it shows is checked."""
    caches = [one.cache for one in shown]
    arrange(caches, counts)
    pairs = [(shown[i], counts[i]) for i in in_order(caches)]
    for one, count in pairs:
        one.keys += [float(next(Shown.numbers) % 97) for _ in range(count)]
    windows, counts = caches[0].windows, [count for _, count in pairs]
    plan = begin([one.cache for one, _ in pairs], counts)
    fixed = isinstance(plan, FixedPass)
    attention = plan
    if fixed:
        attention = FixedAttention(plan.key, windows, plan.numbers, plan.buffers())
    rows = [start + i for start, n in zip(plan.starts, counts, strict=True) for i in range(n)]
    keys = np.zeros(plan.rows, np.float32)
    keys[rows] = [key for one, count in pairs for key in one.keys[-count:]]
    # As many texts of one position, or one text.
    shape = (-1, 1, 1, 1) if fixed else (1, 1, -1, 1)
    k, q = mx.array(keys).reshape(shape), mx.zeros((2 * len(keys),))
    q = q.reshape((-1, 2, 1, 1) if fixed else (1, 2, -1, 1))
    for window in windows:
        # Queries of zero see the mean of the visible keys; values are twice the keys.
        out = np.array(attention.attend(q, k, 2 * k, 1.0))
        out = out.reshape(-1, 2).T if fixed else out.reshape(2, -1)
        expected = [mean for one, count in pairs for mean in one.expected(window, count)]
        assert out[0, rows].tolist() == pytest.approx([2 * mean for mean in expected], rel=1e-4)
        assert (out[0, rows] == out[1, rows]).all()
    offset = attention.offset
    if isinstance(offset, mx.array):
        positions = [p for one, n in pairs for p in range(len(one.keys) - n, len(one.keys))]
        assert np.array(offset)[rows].tolist() == positions
    done = plan.done(attention.buffers()) if fixed else plan.done()
    for (one, count), part in zip(pairs, done, strict=True):
        if commit:
            one.cache.commit(part)
            one.furthest = max(one.furthest, len(one.keys))
        else:
            del one.keys[-count:]


def steps(shown: Sequence[Shown], count: int) -> None:
    """So many passes of one position each."""
    for _ in range(count):
        for one in shown:
            one.cache.next_round()
        run(shown, [1] * len(shown))


def held(shown: Sequence[Shown]) -> int:
    """Rows of the longest layer's buffers and shelves."""
    shelves = {p.shelf for one in shown if (p := one.cache.content.place)}
    alone = [one.cache for one in shown if not one.cache.content.place]
    buffers = [c.content.layers[1].keys for c in alone]
    return sum(s.layers[1][0].shape[0] * s.size for s in shelves) + sum(
        b.shape[2] for b in buffers if b is not None
    )


ACTIONS = (
    "step",
    "step",
    "step",
    "some",
    "several",
    "again",
    "back",
    "fork",
    "leave",
    "join",
    "abandon",
)


@settings(max_examples=40)
@given(
    actions=st.lists(
        st.tuples(st.sampled_from(("step", "step", *ACTIONS)), st.integers(0, 30)), max_size=40
    ),
    slack=st.sampled_from([(4, 4), (4, 6)]),
    step=st.sampled_from([2, 8]),
    slots=st.sampled_from([3, 16]),
    large=st.booleans(),
)
def test_each_cache_shows_what_it_would_show_alone(actions, slack, step, slots, large):
    shown = [Shown(slack[i % 2]) for i in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shelf_module, "STEP", step)
        patch.setattr(shelf_module, "SLOTS", (2, slots))
        patch.setattr(shelf_module, "LARGE", 0 if large else 1 << 20)
        run(shown, [1 + 5 * i for i in range(4)])
        for action, n in actions:
            one = shown[n % len(shown)]
            if action in ("step", "abandon"):
                run(shown, [1] * len(shown), commit=action == "step")
            elif action == "some":
                chosen = [s for i, s in enumerate(shown) if n >> i & 1] or shown
                run(chosen, [1] * len(chosen))
            elif action == "several":
                run(shown, [n if s is one and 0 < n < 2 * s.slack else 1 for s in shown])
            elif action == "back":
                one.rollback(n % 6)
            elif action == "fork":
                other, one.cache = one.cache, one.cache.fork()
                copy = Shown(one.slack)
                copy.cache, copy.keys, copy.furthest = other, list(one.keys), one.furthest
                shown.append(copy)
            elif action == "leave" and len(shown) > 2:
                shown.remove(one)
            elif action == "join" and len(shown) < 8:
                shown.append(Shown(slack[n % 2]))
                run([shown[-1]], [1 + n % 20])
            if action != "again":
                for s in shown:
                    s.cache.next_round()
            for s in shown:
                assert s.cache.offset == len(s.keys)
                place = s.cache.content.place
                assert not place or len(place.shelf.layers[0][0]) <= slots
        for s in shown:
            s.cache.leave()
            run([s], [1])


def test_caches_that_step_together_come_to_stand_together():
    shown = [Shown() for _ in range(5)]
    run(shown, [2, 3, 4, 5, 6])
    steps(shown, 3)
    places = [one.cache.content.place for one in shown]
    assert all(places) and len({place.shelf for place in places if place}) == 1
    assert sorted(place.slot for place in places if place) == [0, 1, 2, 3, 4]
    views = [a for one in shown for a in one.cache.arrays()]
    shelf = places[0].shelf  # type: ignore[union-attr]
    whole = sum(a.nbytes for pair in shelf.layers for a in pair)
    assert len(shelf) == 6 and sum(a.nbytes for a in views) == whole * 5 / 6


def test_a_slot_is_free_when_its_cache_is_gone_and_a_newcomer_takes_it():
    shown = [Shown() for _ in range(9)]
    steps(shown, 3)
    shelf = shown[0].cache.content.place.shelf  # type: ignore[union-attr]
    del shown[4]
    assert len(shelf.caches()) == 8
    shown.append(Shown())
    steps(shown, 3)
    place = shown[-1].cache.content.place
    assert place and place.shelf is shelf and place.slot == 4


def test_what_a_slot_held_before_cannot_spoil_what_comes_after():
    """A sequence of numbers that are none, and another in its place."""
    shown = [Shown() for _ in range(3)]
    steps(shown, 3)
    place = shown[1].cache.content.place
    assert place
    shelf = place.shelf
    shelf.layers = tuple(
        tuple(mx.where(mx.arange(3).reshape(3, 1, 1, 1) == place.slot, mx.nan, a) for a in pair)  # type: ignore[misc]
        for pair in shelf.layers
    )
    del place
    shown[1] = Shown()
    steps(shown, 4)
    assert shown[1].cache.content.place.shelf is shelf  # type: ignore[union-attr]


def test_shelves_hold_little_more_than_the_buffers_would(monkeypatch):
    monkeypatch.setattr(shelf_module, "STEP", 2)
    monkeypatch.setattr(shelf_module, "IDLE", 2)
    rng = np.random.default_rng(3)
    shown: list[Shown] = []
    since, most = 0, 0
    for _ in range(120):
        if len(shown) < 10 and rng.random() < 0.2:
            shown.append(Shown(8, (3, 1500)))
            run([shown[-1]], [int(rng.integers(1, 1200))])
            since = 0
        if len(shown) > 3 and rng.random() < 0.1:
            del shown[int(rng.integers(len(shown)))]
            since = 0
        if shown:
            steps(shown, 1)
        since += 1
        if since > 4:  # `IDLE`, and the passes before newcomers join
            together = [one for one in shown if one.cache.content.place]
            most = max(most, len(together))
            alone = sum(shelf_module._alone(one.cache) for one in together)
            assert held(together) <= APART * 4 / 3 * alone  # up to a third more slots than caches
            del together  # or it would keep those that are gone
    assert most > 5


def test_a_batch_attends_once_a_layer_and_copies_no_shelf(monkeypatch):
    """What makes it quicker than one after the other, counted."""
    model, _ = fixture("poe-tiny")
    batch, calls = Batch(), [0]
    sequences = [
        DecodingSequence(model, [2039, *range(20 + 3 * i)], make_mode(model), max_tokens=40)
        for i in range(6)
    ]
    for i, sequence in enumerate(sequences):
        batch.add(i, sequence.steps())
    attention = fixed_pass.attention

    def counted(*args):
        calls[0] += 1
        return attention(*args)

    def all_addresses() -> set[int]:
        caches = [cache for sequence in sequences for cache in sequence.state.caches]
        shelves = {cache.content.place.shelf for cache in caches if cache.content.place}
        return {address for shelf in shelves for address in addresses(shelf)}

    monkeypatch.setattr(fixed_pass, "attention", counted)
    for _ in range(12):
        batch.run()
    calls[0], before, passes = 0, all_addresses(), batch.passes
    with traces.off():
        for _ in range(5):
            batch.run()
    assert calls[0] == 5 * model.config.n_layer and batch.passes == passes + 5 * len(model.stages)
    assert all_addresses() == before and len(before) == 2 * model.config.n_layer
    batch.close()


def test_who_steps_together_sees_one_stretch_of_a_windows_length(monkeypatch):
    """However long each text is: rows that nobody needs would be most of the work."""
    shown = [Shown(slack=32) for _ in range(4)]
    run(shown, [12, 20, 45, 60])
    steps(shown, 3)
    attention, seen = fixed_pass.attention, []

    def noted(q, keys, values, scale, mask):
        seen.append((len(q), keys.shape[2]))
        return attention(q, keys, values, scale, mask)

    monkeypatch.setattr(fixed_pass, "attention", noted)
    monkeypatch.setattr(fixed_pass, "STRIDE", 4)
    steps(shown, 100)  # beyond a slot's length
    assert seen == [(4, window + 5) for window in WINDOWS] * 100


def test_whoever_leaves_can_go_back_by_its_slack():
    shown = [Shown() for _ in range(3)]
    run(shown, [1, 4, 9])
    steps(shown, 30)
    for one in shown:
        one.cache.leave()
        one.rollback(one.slack)
    run(shown, [1, 1, 1])


def test_a_newcomer_has_room_beside_one_that_has_none_left():
    shown = [Shown() for _ in range(12)]
    steps(shown, 4)
    ahead, place = shown[0], shown[0].cache.content.place
    while ahead.cache.offset < place.full:  # type: ignore[union-attr]
        steps([ahead], 1)
    del shown[5]
    shown.append(Shown())
    steps(shown[1:], 2)
    assert ahead.cache.content.place is place
    assert shown[-1].cache.content.place.shelf is place.shelf  # type: ignore[union-attr]


def test_a_fork_leaves_the_original_where_it_stands():
    shown = [Shown() for _ in range(3)]
    steps(shown, 3)
    place = shown[1].cache.content.place
    copy = shown[1].cache.fork()
    assert place and shown[1].cache.content.place is place and copy.content.place is None


def test_one_that_is_left_alone_goes_on_by_itself():
    shown = [Shown() for _ in range(2)]
    steps(shown, 3)
    assert isinstance(shown[0].cache.content.place.shelf, Shelf)  # type: ignore[union-attr]
    del shown[1]
    run(shown, [1])
    assert shown[0].cache.content.place is None


def test_who_has_to_leave_stays_away_for_longer_each_time():
    """A mode that runs single positions and several by turns would only be carried about."""
    shown = [Shown(slack=6) for _ in range(3)]
    stays: list[int] = []
    for _ in range(4):
        passes = 0
        while not shown[0].cache.content.place:
            steps(shown, 1)
            passes += 1
        stays.append(passes)
        run(shown, [2, 1, 1])
        assert shown[0].cache.content.place is None
    assert stays == [2, 3, 5, 9]  # more than 1, 2, 4, 8


def test_who_writes_twice_in_a_round_leaves_a_large_shelf(monkeypatch):
    """It would be copied each time: drafts go beside a buffer of their own."""
    monkeypatch.setattr(shelf_module, "LARGE", 0)
    shown = [Shown(slack=6) for _ in range(4)]
    steps(shown, 3)
    assert all(one.cache.content.place for one in shown)
    for _ in range(3):
        steps(shown, 1)
        run(shown[:2], [1, 1])
    places = [one.cache.content.place for one in shown]
    assert places[:2] == [None, None] and all(places[2:])


def addresses(shelf: Shelf) -> list[int]:
    """Where its arrays are in memory."""
    arrays = [a for pair in shelf.layers for a in pair]
    mx.eval(arrays)
    return [np.array(a, copy=False).ctypes.data for a in arrays]


def test_a_shelf_is_not_copied_when_one_leaves_or_joins():
    shown = [Shown() for _ in range(9)]

    def step(some: Sequence[Shown]) -> None:
        """A pass of one position each, committed before it is evaluated, as drivers do."""
        caches = [one.cache for one in some]
        arrange(caches, [1] * len(caches))
        caches = [caches[i] for i in in_order(caches)]
        plan = begin(caches, [1] * len(caches))
        if isinstance(plan, FixedPass):
            attention = FixedAttention(plan.key, WINDOWS, plan.numbers, plan.buffers())
            shape = (plan.rows, 1, 1, 1)
        else:
            attention, shape = plan, (1, 1, plan.rows, 1)
        for _ in WINDOWS:
            rows = mx.zeros(shape)
            attention.attend(mx.concatenate([rows, rows], axis=1), rows, rows, 1.0)
        done = plan.done() if attention is plan else plan.done(attention.buffers())
        del attention
        for cache, part in zip(caches, done, strict=True):
            cache.commit(part)
            cache.next_round()

    for _ in range(3):
        step(shown)
    shelf = shown[0].cache.content.place.shelf  # type: ignore[union-attr]
    before = addresses(shelf)
    shown[0].cache.leave()
    step(shown[1:])
    assert addresses(shelf) == before
    for _ in range(2):
        step(shown)
    assert shown[0].cache.content.place.shelf is shelf and addresses(shelf) == before  # type: ignore[union-attr]


def test_who_comes_back_to_another_slot_stands_there_once():
    shown = [Shown() for _ in range(4)]
    steps(shown, 3)
    shelf = shown[0].cache.content.place.shelf  # type: ignore[union-attr]
    first, second = sorted(shown, key=lambda one: one.cache.content.place.slot)[:2]  # type: ignore[union-attr]
    first.cache.leave()
    second.cache.leave()
    shelf.admit(second.cache)
    assert len(shelf.caches()) == 3 and second.cache.content.place.slot == 0  # type: ignore[union-attr]
    steps(shown, 2)


def test_a_shelf_is_looked_through_twice_in_idle_passes(monkeypatch):
    """To ask all caches before each pass would be much of a small model's pass."""
    shown, asked = [Shown(slack=64) for _ in range(5)], []  # 64 passes until it is full
    steps(shown, 3)
    need = shelf_module._need
    monkeypatch.setattr(shelf_module, "_need", lambda cache: asked.append(cache) or need(cache))
    steps(shown, 4 * shelf_module.IDLE)
    assert len(asked) == 4 * 2 * len(shown)


def test_a_shelf_is_given_up_when_too_little_of_it_is_used_for_a_while(monkeypatch):
    monkeypatch.setattr(shelf_module, "IDLE", 4)
    shown = [Shown(8, (3, 1500)) for _ in range(4)]
    for one in shown:
        run([one], [600])
    steps(shown, 3)
    shelf = shown[0].cache.content.place.shelf  # type: ignore[union-attr]
    del one, shown[2:]
    steps(shown, 1)
    assert shown[0].cache.content.place.shelf is shelf  # type: ignore[union-attr]
    steps(shown, 4)
    place = shown[0].cache.content.place
    assert place and place.shelf is not shelf and len(place.shelf.layers[0][0]) == 2


def test_who_sits_out_ahead_of_the_others_keeps_its_rows():
    """A pass has a row for each slot; that of a cache that takes no part goes beyond its own."""
    shown = [Shown() for _ in range(3)]
    run(shown, [3, 4, 5])
    steps(shown, 4)
    for one in shown[:2]:
        one.rollback(2)
    steps(shown[:2], 1)
    steps(shown, 1)
