"""What ranks say to each other, and what is left when one of them is lost: ranks are threads."""

import gc

import mlx.core as mx
import pytest
from conftest import fixture
from ranks import on_threads
from split_checks import modes, reply

from cognica_mlx.decoding.modes import make_mode
from cognica_mlx.decoding.single import advance_through, decode, prefill
from cognica_mlx.machines import link as links
from cognica_mlx.state import DecodingState

TEXT = [1 + i * 7 % 60 for i in range(40)]


@pytest.mark.parametrize("ring", [False, True])
def test_every_mode_replies_as_on_one_machine(ring):
    whole = fixture("flat-d8")[0]
    with on_threads(whole, "0|1|2|3", ring=ring) as ranks:
        for mode, options in modes(whole):
            mine = reply(ranks.model, mode, options, TEXT, 5)
            assert mine == reply(whole, mode, options, TEXT, 5), mode


def test_a_rollback_reaches_the_owner_with_the_next_pass():
    whole = fixture("flat-d8")[0]
    with on_threads(whole, "0|1,2,3") as ranks:
        state, kept = DecodingState(ranks.model), DecodingState(whole)
        prefill(state, TEXT, 3)
        state.rollback(7)
        prefill(state, [9, 8], 3)
        prefill(kept, [*TEXT[:7], 9, 8], 3)
        mine, theirs = (s.boundary(3, 7, 9).x for s in (state, kept))
        assert mx.array_equal(mine, theirs)
        assert [cache.offset for cache in ranks.owners[0].caches.values()] == [9] * 3
        del state


def test_owners_hold_nothing_of_sequences_that_have_ended():
    whole = fixture("flat-d8")[0]
    with on_threads(whole, "0|1,2|3") as ranks:
        held = []
        for i in range(60):
            state = DecodingState(ranks.model)
            prefill(state, [1 + i % 50, 5], 3)
            other = state.fork()
            prefill(other, [7], 3)
            mx.eval(other.boundary(3, 2, 3).x)  # owners have caught up
            held.append([len(owner.caches) + len(owner.given) for owner in ranks.owners])
            del state, other
        gc.collect()
        # What has ended is dropped with the next message.
        assert held[-1] == held[30]


@pytest.mark.parametrize("put", range(2, 6))
def test_a_prompt_that_is_interrupted_can_be_read_again(put, monkeypatch):
    # Whatever message it was that could not be posted, no rank waits for its other half.
    whole = fixture("flat-d8")[0]
    with on_threads(whole, "0|1|2|3", timeout=5) as ranks:
        mode, state = make_mode(ranks.model), DecodingState(ranks.model)
        first = reply(ranks.model, "full", {}, TEXT[:5], 4)
        posts, count = links.Link._put, iter(range(100))

        def interrupted(link, task):
            if next(count) == put:
                raise KeyboardInterrupt
            posts(link, task)

        monkeypatch.setattr(links.Link, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(decode(ranks.model, TEXT, mode, max_tokens=4, state=state, prefill_step_size=9))
        monkeypatch.undo()
        assert reply(ranks.model, "full", {}, TEXT, 6, state) == reply(whole, "full", {}, TEXT, 6)
        assert reply(ranks.model, "full", {}, TEXT[:5], 4) == first
        del state


def test_what_an_interrupted_message_was_to_tell_is_told_with_the_next(monkeypatch):
    whole = fixture("flat-d8")[0]
    with on_threads(whole, "0|1,2,3") as ranks:
        state = DecodingState(ranks.model)
        prefill(state, TEXT, 3)
        other = state.fork()

        def interrupted(link, task):
            raise KeyboardInterrupt

        monkeypatch.setattr(links.Link, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prefill(other, [5], 3)
        monkeypatch.undo()
        advance_through(other, 3)
        alone = DecodingState(whole)
        prefill(alone, TEXT, 3)
        prefill(alone, [5], 3)
        assert mx.array_equal(*(s.boundary(3, 40, 41).x for s in (other, alone)))
        del state, other
