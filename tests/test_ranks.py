"""What ranks say to each other, and what is left when one of them is lost: ranks are threads."""

import asyncio
import gc
import json
import re
from itertools import count

import mlx.core as mx
import pytest
from conftest import fixture
from ranks import Cable, Cables, Group, on_threads
from split_checks import modes, reply

from cognica_mlx.decoding.modes import last_resort, make_mode
from cognica_mlx.decoding.single import advance_through, decode, prefill
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.errors import RankError, RankLostError, RequestError
from cognica_mlx.machines import link as links
from cognica_mlx.machines.messages import FORK, Reader, Wire, encode
from cognica_mlx.pricing.pace import pace_for
from mlx_poe import batch_generate, stream_generate
from mlx_poe.engine import Engine
from mlx_poe.engine.scheduler import Scheduler
from mlx_poe.generation.request import read_request
from mlx_poe.loading import split_loading
from mlx_poe.loading.machine_costs import known_costs
from mlx_poe.loading.split_loading import _Rank
from mlx_poe.server.app import make_app
from mlx_poe.server.catalog import make_catalog
from mlx_poe.server.error_bodies import as_api_error
from mlx_poe.server.shared_fields import Limits

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
        # A pass of 2 rows and one of 9 differ in the last bits.
        assert mx.allclose(mine, theirs, rtol=1e-3, atol=1e-3)
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
        posts, calls = links.Link._put, count()

        def interrupted(link, task):
            if next(calls) == put:
                raise KeyboardInterrupt
            posts(link, task)

        monkeypatch.setattr(links.Link, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(decode(ranks.model, TEXT, mode, max_tokens=4, state=state, prefill_step_size=9))
        monkeypatch.undo()
        mine, theirs = (
            reply(ranks.model, "full", {}, TEXT, 6, state),
            reply(whole, "full", {}, TEXT, 6),
        )
        # Part of the prompt was read in other chunks, so the last bits differ.
        assert [token for token, *_ in mine] == [token for token, *_ in theirs]
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


def lose(ranks, how):
    """From now on rank 1 is silent, or its connection broken."""
    if how == "stop":
        ranks.cables.stop()
    else:
        ranks.cables.dead.add(1)


LOST = {"stop": "rank 1 has not answered for 0.2 seconds", "kill": "connection with rank 1 is lost"}


@pytest.mark.parametrize("how", LOST)
def test_a_lost_rank_is_named(how):
    with on_threads(fixture("flat-d8")[0], "0|1,2|3", timeout=0.2) as ranks:
        assert last_resort(ranks.model) is None
        steps = decode(ranks.model, TEXT, make_mode(ranks.model), max_tokens=9)
        next(steps)
        lose(ranks, how)
        with pytest.raises(RankLostError, match=LOST[how]):
            list(steps)
        ranks.cables.go_on()


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("split", ["0|1,2,3", "0,1|2,3"])
def test_with_degrade_a_batch_goes_on_with_rank_0s_stages(split, how):
    (whole, tokenizer), left = fixture("flat-d8"), split.index("|") // 2
    with on_threads(whole, split, timeout=0.2, degrade=True) as ranks:
        prompts = [[*TEXT[:n]] for n in (3, 9, 30)]
        finished = []

        def one_is_done(index, _):
            if not finished:
                lose(ranks, how)
            finished.append(index)

        per = [{"max_tokens": 3}, {"max_tokens": 30}, {"mode": "speculative", "max_tokens": 30}]
        result = batch_generate(
            ranks.model, tokenizer, prompts, per_prompt=per, finished=one_is_done
        )
        ranks.cables.go_on()
        assert ranks.link.lost
        for prompt, replies in zip(prompts[1:], result.responses[1:], strict=True):
            tokens, stages = [r.token for r in replies], [r.stage for r in replies]
            first = len(stages) - stages[::-1].index(3)  # the last token with everything there
            assert set(stages[first:]) == {left}
            rest = reply(whole, "stage", {"stage": left}, prompt + tokens[:first], 30 - first)
            assert tokens[first:] == [token for token, *_ in rest][: len(tokens) - first]


def test_costs_are_not_needed_once_a_rank_is_lost(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = fixture("flat-d8")[0]
    for degrade in (True, False):
        with on_threads(whole, "0|1,2,3", timeout=0.2, degrade=degrade) as ranks:
            lose(ranks, "kill")
            mode = make_mode(ranks.model, "speculative")
            if degrade:
                assert pace_for(ranks.model, mode, known_costs)
            else:
                with pytest.raises(RankLostError):
                    known_costs(ranks.model, mode)
    assert not list(tmp_path.rglob("*.json"))


def test_a_batch_reports_what_failed_on_the_rank():
    whole, tokenizer = fixture("poe-tiny")
    with on_threads(whole, "0|1,2,3") as ranks:
        scheduler = Scheduler()
        prompts = TEXT[:4], TEXT[:5], TEXT[:6]
        tasks = [
            read_request(tokenizer, text, {"max_tokens": 9}).on(ranks.model) for text in prompts
        ]
        scheduler.add(*tasks[:2])
        tokens, errors = [[], [], []], ["", "", ""]
        while len(scheduler):
            for task, news in scheduler.step():
                index = tasks.index(task)
                if isinstance(news, Exception):
                    errors[index] = str(news)
                else:
                    tokens[index].append(news.token)
            if len(tokens[0]) == 3 and not errors[0]:
                # As if its owner had lost the first sequence.
                scheduler._running[tasks[0]].state.caches[-1].number = 10**6
        # Not what went wrong after it, when each was tried alone.
        assert errors == ["rank 1: a sequence holds 0 of 7 positions"] * 2 + [""]
        scheduler.add(tasks[2])
        later = [news.token for _ in range(99) for _, news in scheduler.step()]
        assert later == [token for token, *_ in reply(whole, "full", {}, prompts[2], 9)]
        scheduler.close()


@pytest.mark.parametrize("degrade", [True, False])
def test_a_server_tells_that_a_rank_is_lost(degrade):
    whole, tokenizer = fixture("flat-d8")
    with (
        on_threads(whole, "0|1,2,3", timeout=0.2, degrade=degrade) as ranks,
        Engine(ranks.model, tokenizer) as engine,
    ):
        limits = Limits(10**6, 10**4, 8, 8)
        app = make_app(engine, make_catalog(engine, "base", [], []), limits, host="127.0.0.1")

        def health():
            answer = asyncio.run(app.state.server.health(None))
            return answer.status_code, json.loads(answer.body)

        assert health() == (200, {"status": "ok", "running": 0, "waiting": 0})
        first, second = (engine.submit(TEXT[:n], max_tokens=50) for n in (3, 4))
        next(iter(first))
        lose(ranks, "kill")
        if degrade:
            assert [r.stage for r in first][-1] == 0
            assert list(second)[-1].finish_reason
            assert [r.stage for r in engine.submit(TEXT[:3], max_tokens=3)] == [0] * 3
        else:
            for request in (first, second, engine.submit(TEXT[:3])):
                with pytest.raises(RankLostError) as raised:
                    list(request)
            assert as_api_error(raised.value).status == 503
        code, about = health()
        assert (code, about["status"]) == ((200, "degraded") if degrade else (503, "unavailable"))
        assert about["problem"] == str(ranks.link.lost)


def test_a_broken_connection_is_a_lost_rank(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("[ring] connection to a peer was lost")

    wire = Wire(Group(1, 3), neighbors_only=True)
    for call, work in (
        ("send", lambda: wire.send(encode([1]), 2)),
        ("recv", lambda: wire.receive(2)),
    ):
        monkeypatch.setattr(mx.distributed, call, broken)
        with pytest.raises(RankLostError, match=r"rank 2 is lost: \[ring\] connection"):
            work()


def test_numbers_of_messages_start_over_before_they_overflow():
    with on_threads(fixture("flat-d8")[0], "0|1,2,3") as ranks:
        expected = reply(ranks.model, "full", {}, TEXT, 3)
        ranks.link._numbers = count(links.NUMBERS - 2)
        assert reply(ranks.model, "full", {}, TEXT, 3) == expected


def test_nothing_is_kept_for_a_rank_that_is_lost():
    with on_threads(fixture("flat-d8")[0], "0|1,2,3", timeout=0.2, degrade=True) as ranks:
        lose(ranks, "kill")
        mode, kept = make_mode(ranks.model), []
        for _ in range(3):
            tokens = decode(
                ranks.model, TEXT, mode, max_tokens=3, last_resort=last_resort(ranks.model)
            )
            assert [token.stage for token in tokens] == [0] * 3
            del tokens
            gc.collect()
            kept.append(len(ranks.link._news[1]))
        assert kept[2] == kept[0]


def test_statuses_are_read_before_ranks_end():
    # On a ring a rank that has ended does not forward what the others answer.
    with on_threads(fixture("flat-d8")[0], "0|1|2|3", ring=True) as ranks:
        state = DecodingState(ranks.model)
        state.append(TEXT)
        advance_through(state, 3)
        assert ranks.link._unread or ranks.link._tasks.qsize()
        del state
    assert ranks.link.ended and not ranks.link._unread


def test_ranks_that_may_be_late_are_named(monkeypatch):
    # On a ring of four, rank 1 hands on the number of rank 2.
    rank, said = object.__new__(_Rank), []
    cables = Cables()
    rank.wire, rank._limit = Cable(0, 4, cables, neighbors_only=True), 0.01

    def give_up(late, limit):
        said.append((late, limit))
        hop = 1 if len(said) == 1 else 3
        Cable(hop, 4, cables, neighbors_only=True).send(mx.zeros(4).view(mx.int32), 0)

    monkeypatch.setattr(split_loading, "_give_up", give_up)
    assert rank._exchange(5.0) == [5, 0, 0, 0]
    assert said == [("rank 1 or 2", 0.01), ("rank 3", 0.01)]


def test_ranks_that_cannot_be_reached_are_no_request_error(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("[ring] Couldn't connect (error: 111)")

    monkeypatch.setattr(mx.distributed, "init", broken)
    with pytest.raises(RequestError, match="mpirun -n 2"):
        split_loading._join()
    monkeypatch.setenv(split_loading.RING_VARIABLE, "hosts.json")
    with pytest.raises(RankError, match=r"cannot be reached: \[ring\] Couldn't connect"):
        split_loading._join()


def test_a_constrained_reply_keeps_its_form_when_a_rank_is_lost():
    whole, tokenizer = fixture("poe-tiny")
    with on_threads(whole, "0|1,2,3", timeout=0.2, degrade=True) as ranks:
        words = stream_generate(
            ranks.model, tokenizer, "Once", regex=r"[a-z]{9}, [a-z]{9}\.", mode="speculative"
        )
        text, stages = "", []
        for response in words:
            text += response.text
            stages.append(response.stage)
            if len(stages) == 2:
                lose(ranks, "kill")
        assert re.fullmatch(r"[a-z]{9}, [a-z]{9}\.", text), text
        assert ranks.link.lost and stages[-1] == 0


def test_a_prompt_that_was_to_be_scored_in_full_ends_with_the_error():
    whole, tokenizer = fixture("flat-d8")
    with on_threads(whole, "0|1,2,3", timeout=0.2, degrade=True) as ranks:
        lose(ranks, "kill")
        with pytest.raises(RankLostError):
            list(stream_generate(ranks.model, tokenizer, TEXT, prompt_logprobs=True))
        assert list(stream_generate(ranks.model, tokenizer, TEXT, max_tokens=2))


def test_a_sequence_that_is_copied_twice_is_the_first_copy():
    # An interruption on rank 0 may repeat what it has said, when the copy has gone on.
    with on_threads(fixture("flat-d8")[0], "0,1,2|3") as ranks:
        state = DecodingState(ranks.model)
        prefill(state, TEXT, 3)
        other = state.fork()
        prefill(other, [5, 6], 3)
        (owner,) = ranks.owners
        numbers = other.caches[3].number, state.caches[3].number
        mx.eval(other.boundary(3, 41, 42).x)
        owner._keep_house(Reader(encode([3, FORK, *numbers])))
        assert owner.caches[numbers[0]].offset == 42
        del state, other
