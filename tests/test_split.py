"""Which rank gets what, and the way of messages between them: without any ranks."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import fixture
from hypothesis import given
from hypothesis import strategies as st
from ranks import Group

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.errors import RequestError, RollbackError
from cognica_mlx.machines.messages import Reader, Wire, encode, hidden_parts, read_hidden
from cognica_mlx.machines.placement import Absent, Split, balanced, parse
from cognica_mlx.machines.remote import RemoteCache, _Reached
from cognica_mlx.network.model import PoEModel


def test_a_split_is_read_as_it_is_written():
    assert parse("0|1,2,3", 2, 4).ranks == (0, 1, 1, 1)
    assert parse("0,1|2,3|4|5", 4, 4, ["math", "chat"]).stages(2) == [4]


@pytest.mark.parametrize("text", ["0|2,1,3", "0|1,2", "0|1,2,3,4", "0,|1,2,3", "|0,1,2,3", "x"])
def test_a_split_that_is_none_is_refused(text):
    with pytest.raises(RequestError, match="--split"):
        parse(text, 2, 4)


def test_a_split_for_another_number_of_machines_is_refused():
    with pytest.raises(RequestError, match="is for 3 machines, but 2 have been started"):
        parse("0|1,2|3", 2, 4)


def test_the_slower_machine_gets_less():
    config = fixture("poe-tiny")[0].config
    even = balanced(config, [1.0, 1.0]).ranks
    assert even == (0, 0, 1, 1)
    assert balanced(config, [3.0, 1.0]).ranks == (0, 1, 1, 1)
    assert balanced(config, [1.0, 4.0]).ranks == (0, 0, 0, 1)
    with pytest.raises(RequestError, match="5 machines have been started for 4 stages"):
        balanced(config, [1.0] * 5)


def test_a_split_counts_every_head_that_a_token_reads():
    # Rank 0 reads two heads for each of the four stages: nearly as much as all layers.
    config = fixture("gqa-logop-d8")[0].config
    assert balanced(config, [0.6, 1.0]).ranks == (0, 1, 1, 1)


def test_when_rank_0_is_the_slowest_in_any_case_the_others_are_balanced():
    config = fixture("gqa-logop-d8")[0].config
    assert balanced(config, [1.0, 1.0, 2.0]).ranks == (0, 1, 1, 2)


def test_specialists_have_machines_of_their_own_as_far_as_there_are_any():
    config = fixture("poe-tiny")[0].config
    names = ["math", "chat", "tool"]
    assert balanced(config, [1.0] * 4, names).ranks == (0, 0, 0, 0, 1, 2, 3)
    assert balanced(config, [1.0] * 3, names).ranks == (0, 0, 0, 0, 0, 1, 2)
    with pytest.raises(RequestError, match="5 machines"):
        balanced(config, [1.0] * 5, names)


def test_ranks_hold_their_own_and_together_everything_once():
    whole = fixture("chain-on-stage")[0]
    split = Split((0, 0, 1, 1, 2, 2))
    names = []
    for rank in range(3):
        model = PoEModel(whole.config)
        part = split.part(whole.config, rank)
        part.strip(model)
        assert [isinstance(block, Absent) for block in model.h] == [
            i // 2 not in split.stages(rank) for i in range(whole.config.n_layer)
        ]
        names += [name for name in _matrices(whole) if part.holds(name)]
    assert sorted(names) == sorted(_matrices(whole))


def _matrices(model):
    from mlx.utils import tree_flatten

    big = [name for name, a in tree_flatten(model.parameters()) if a.ndim > 1]
    return [name for name in big if not name.startswith("smear")]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("backout", [True, False])
def test_activations_arrive_as_they_were_sent(dtype, backout):
    x, x0, kept = (mx.random.normal((1, 3, 4)).astype(dtype) for _ in range(3))
    sent = Hidden(mx.array([[5, 6, 7]]), x, x0, kept if backout else None)
    numbers, arrays = hidden_parts(sent)
    message = Reader(encode([9, *numbers], arrays))
    assert message.number() == 9
    found = read_hidden(message, dtype)
    for name in ("tokens", "x", "x0"):
        assert mx.array_equal(getattr(found, name), getattr(sent, name))
    assert (found.backout is not None) == backout
    assert not backout or mx.array_equal(found.backout, kept)
    # The embedded text is one array, and arrives as one.
    numbers, arrays = hidden_parts(Hidden(sent.tokens, x, x))
    found = read_hidden(Reader(encode(numbers, arrays)), dtype)
    assert found.x is found.x0


def test_on_a_ring_messages_go_by_the_shorter_way():
    ranks = [Wire(Group(rank, 6), neighbors_only=True) for rank in range(6)]
    assert [ranks[0].next_hop(to) for to in range(1, 6)] == [1, 1, 1, 5, 5]
    assert [rank.parent() for rank in ranks[1:]] == [0, 1, 2, 5, 0]
    assert ranks[0].are_next(5, 0) and not ranks[0].are_next(1, 3)
    direct = Wire(Group(0, 6), neighbors_only=False)
    assert direct.next_hop(3) == 3 and direct.are_next(1, 4)


@given(
    windows=st.sampled_from([(4,), (4, 9), (12, 5, 12)]),
    slack=st.integers(1, 6),
    steps=st.lists(st.tuples(st.sampled_from(["run", "return", "fork"]), st.integers(0, 12))),
)
def test_a_remote_cache_goes_back_no_further_than_its_owner_can(windows, slack, steps):
    """An owner may drop a window's oldest rows once it has more than the window and the slack."""
    link = SimpleNamespace(number=lambda: 0, tell=lambda *_: None)
    cache = RemoteCache(SimpleNamespace(windows=windows, link=link, rank=1), slack)
    dropped = dict.fromkeys(windows, 0)
    for what, number in steps:
        if what == "run":
            cache.commit(_Reached(cache.offset + number))
            for window in windows:
                dropped[window] = max(dropped[window], cache.offset - window - slack)
        elif what == "fork":
            cache = cache.fork()
        needed = max(start + window if start else 0 for window, start in dropped.items())
        assert cache.earliest == needed
        if what == "return":
            there, position = cache.offset, cache.offset - number
            if needed <= position:
                cache.rollback(position)
                assert cache.offset == position
            else:
                with pytest.raises(RollbackError):
                    cache.rollback(position)
                assert cache.offset == there
