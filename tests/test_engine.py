"""Requests from any thread: the same replies as alone, and an engine that nothing brings down."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import SOAK, fixture
from test_pace import DEAR
from test_scheduler import STORY, TALK, endless, models, text, tokens_of

from cognica_mlx.errors import PoEError, RequestError
from cognica_mlx.pricing.costs import Costs
from mlx_poe import load, stream_generate
from mlx_poe.engine import Engine, EngineRequest
from mlx_poe.engine.scheduler import Scheduler

base, _ = fixture("poe-tiny")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(base, endless, max_sequences=4) as engine:
        for name in ("chat", "math"):
            engine.attach(name, f"poe-tiny-{name}")
        yield engine


def alone(prompt: Any, model: str = "base", **options: Any) -> list[int]:
    return tokens_of(list(stream_generate(models()[model], endless, prompt, **options)))


REQUESTS: list[tuple[Any, str | None, dict[str, Any]]] = [
    (STORY, None, {}),
    (STORY, "math", {"mode": "speculative", "num_draft_tokens": 5}),
    (TALK, "chat", {"temp": 0.8, "seed": 7, "top_p": 0.9}),
    (text(300), None, {"mode": "wand", "p99_bounds": [0.3] * 3}),
    (TALK, "math", {"mode": "speculative", "repetition_penalty": 1.2}),
]


def test_requests_from_several_threads_get_what_they_get_alone(engine):
    expected = [
        alone(prompt, name or "base", max_tokens=16, **options)
        for prompt, name, options in REQUESTS
    ]
    wrong: list[Any] = []

    def client(first: int) -> None:
        for i in range(len(REQUESTS)):
            prompt, name, options = REQUESTS[(first + i) % len(REQUESTS)]
            request = engine.submit(prompt, specialist=name, max_tokens=16, **options)
            got = tokens_of(list(request))
            if got != expected[(first + i) % len(REQUESTS)]:
                wrong.append((prompt, name, options, got))

    before = engine.stats
    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not wrong
    after = engine.stats
    assert after.generation_tokens - before.generation_tokens == 4 * sum(map(len, expected))
    assert (after.running, after.waiting) == (0, 0)
    assert after.cache_hits > before.cache_hits


def test_compositions(engine):
    options = {"max_tokens": 10}
    request = engine.submit(TALK, specialist=["chat", "math"], weights=[1, 2], **options)
    assert tokens_of(list(request)) == alone(TALK, "both", **options)
    for weight in range(1, 40):
        engine.submit(
            STORY, specialist=["chat", "math"], weights=[1, weight], max_tokens=1
        ).cancel()
    assert len(engine._compositions) <= 16


def test_a_second_request_finds_the_first_ones_prompt(engine):
    prompt = text(80, start=11)
    first, second = (
        list(engine.submit(prompt, specialist=name, max_tokens=4)) for name in (None, "chat")
    )
    assert (first[-1].cached_tokens, second[-1].cached_tokens) == (0, 79)
    assert tokens_of(second) == alone(prompt, "chat", max_tokens=4)


def test_text_and_responses(engine):
    assert engine.submit("The capital of France is", stop=" The").text == " Paris."
    responses = list(engine.submit(STORY, max_tokens=3))
    assert [r.finish_reason for r in responses] == [None, None, "length"]
    request = engine.submit(STORY, max_tokens=3)
    assert next(iter(request)).generation_tokens == 1
    assert [r.generation_tokens for r in request] == [2, 3]
    assert list(request) == []


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ("", {}, "the prompt is empty"),
        ([5, 2048], {}, "token id 2048"),
        (["a"], {}, "token ids"),
        ("a", {"specialist": "law"}, "no specialist law"),
        ("a", {"specialist": ["chat", "law"]}, "no specialist law"),
        ("a", {"specialist": []}, "at least one specialist"),
        ("a", {"weights": [1]}, "weights need several"),
        ("a", {"specialist": ["chat", "math"], "weights": [1]}, "weights"),
        ("a", {"mode": "deep"}, "mode 'deep'"),
        ("a", {"mode": "stage", "stage": 9}, "stage 9"),
        ("a", {"temperature": 1}, "no option temperature"),
        ("a", {"temp": -1}, "temp -1"),
        ("a", {"max_tokens": 0}, "max_tokens 0"),
        ("a", {"stop": ""}, "a stop string is empty"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_at_once(engine, prompt, options, named):
    before = engine.stats
    with pytest.raises(RequestError, match=named):
        engine.submit(prompt, **options)
    assert engine.stats == before


def test_the_end_of_a_sweep_is_told_once_after_all_its_responses():
    heard: list[Any] = []
    with Engine(base, endless) as engine:
        engine.delivered = lambda: heard.append("sweep")
        each = {"costs": None, "max_tokens": 4}
        requests = [engine.prepare(text(20, start=i), **each) for i in range(3)]
        handles = engine.start(requests, [heard.append] * 2 + [None])
        assert len(list(handles[2])) == 4
        last = engine.submit(STORY, listener=heard.append, max_tokens=10**5)
        engine.delivered = lambda: [][0]  # type: ignore[assignment]
        assert len(list(engine.submit(STORY, max_tokens=3))) == 3  # goes on all the same
        engine.delivered = lambda: heard.append("end")
        assert last
    sweeps = "".join("." if one == "sweep" else "t" for one in heard[: heard.index(None)])
    assert "t" in sweeps and "t" * 9 not in sweeps
    assert isinstance(heard[-2], PoEError) and heard[-1] == "end"


def test_a_request_can_be_cancelled(engine):
    request = engine.submit(STORY, max_tokens=100_000)
    got = []
    for response in request:
        got.append(response.token)
        if len(got) == 5:
            request.cancel()
    assert got == alone(STORY, max_tokens=5)
    request.cancel()
    waiting = [engine.submit(STORY, max_tokens=100_000) for _ in range(6)]
    threads = [threading.Thread(target=list, args=(request,)) for request in waiting]
    for thread in threads:
        thread.start()
    for request in waiting:
        request.cancel()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    # One thread's commands are obeyed in order.
    assert list(engine.submit(STORY, max_tokens=1))
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)
    assert not engine._requests


def test_a_request_can_be_paused(engine):
    request = engine.submit(STORY, max_tokens=60)
    got = [next(iter(request))]
    request.pause()
    assert tokens_of(list(engine.submit(STORY, max_tokens=3))) == alone(STORY, max_tokens=3)
    assert (engine.stats.running, engine.stats.paused) == (0, 1)
    request.resume()
    assert tokens_of([*got, *request]) == alone(STORY, max_tokens=60)
    assert engine.stats.paused == 0


def test_nobody_has_to_read_what_was_asked_for(engine):
    ignored = [engine.submit(STORY, max_tokens=30) for _ in range(4)]
    started = iter(engine.submit(STORY, max_tokens=30))
    next(started)
    assert tokens_of(list(engine.submit(STORY, max_tokens=30))) == alone(STORY, max_tokens=30)
    del ignored


def test_an_error_in_one_request_is_its_own(engine, monkeypatch):
    other = engine.submit(STORY, max_tokens=60)
    first = next(iter(other))  # it has started
    real = Scheduler._start
    calls: list[int] = []

    def failing(self: Scheduler, task: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no such state")
        real(self, task)

    monkeypatch.setattr(Scheduler, "_start", failing)
    with pytest.raises(OSError, match="no such state"):
        list(engine.submit("Once", max_tokens=3))
    assert len(list(engine.submit("Once", max_tokens=3))) == 3
    assert tokens_of([first, *other]) == alone(STORY, max_tokens=60)


def test_the_engine_outlives_an_error_that_is_nobodys(monkeypatch):
    with Engine(base, endless) as engine:
        real = Scheduler.step

        def failing(self: Scheduler) -> Any:
            monkeypatch.setattr(Scheduler, "step", real)
            raise MemoryError("out of memory")

        monkeypatch.setattr(Scheduler, "step", failing)
        with pytest.raises(MemoryError):
            list(engine.submit(STORY, max_tokens=3))
        assert tokens_of(list(engine.submit(STORY, max_tokens=3))) == alone(STORY, max_tokens=3)


def test_closing_ends_everything():
    engine = Engine(base, endless, max_sequences=1)
    requests = [engine.submit(STORY, max_tokens=100_000) for _ in range(3)]
    caught: list[BaseException] = []

    def read(request: EngineRequest) -> None:
        try:
            list(request)
        except RequestError as error:
            caught.append(error)

    threads = [threading.Thread(target=read, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    engine.close()
    engine.close()
    for thread in threads:
        thread.join(300)
    assert len(caught) == 3 and "closed" in str(caught[0])
    assert not engine._thread.is_alive()
    for call in (lambda: engine.submit("a"), lambda: engine.attach("x", "poe-tiny-chat")):
        with pytest.raises(RequestError, match="the engine is closed"):
            call()
    assert engine.stats.cache_bytes == 0


def test_memory_is_refused_with_numbers():
    with (
        Engine(base, endless, memory=1_000_000) as engine,
        pytest.raises(
            RequestError, match=r"may need .* MB, but all sequences together may take 1.0 MB"
        ),
    ):
        engine.submit(STORY)


def test_specialists_come_and_go():
    with Engine(base, endless) as engine:
        assert engine.specialists == ()
        engine.attach("chat", "poe-tiny-chat")
        assert engine.specialists == ("chat",)
        for bad in ("chat", "nowhere"):
            with pytest.raises(PoEError):
                engine.attach(
                    bad, "there/is/no/such/model" if bad == "nowhere" else "poe-tiny-chat"
                )
        running = engine.submit(TALK, specialist="chat", max_tokens=30)
        list(engine.submit(TALK, specialist="chat", max_tokens=3))
        assert engine.stats.cache_entries
        engine.detach("chat")
        assert not engine.stats.cache_entries
        assert tokens_of(list(running)) == alone(TALK, "chat", max_tokens=30)
        with pytest.raises(RequestError, match="no specialist chat"):
            engine.submit(TALK, specialist="chat")


def test_costs_decide_whether_a_mode_goes_on():
    dear = Costs((1, 8), ((1.0, 20.0),) * 4, ((1.0, 20.0),) * 4, (3,))
    with Engine(base, endless, costs=lambda *_: dear) as engine:
        paced, plain = (
            list(engine.submit(STORY, mode=mode, max_tokens=30)) for mode in ("speculative", "full")
        )
    assert paced[-1].fell_back and not plain[-1].fell_back
    assert tokens_of(paced) == tokens_of(plain)


def test_a_model_loaded_in_one_thread_is_used_in_another():
    """MLX's streams belong to threads: also what is loaded lazily, drafted from a copy, mixed, or
    sampled."""
    model, _ = load("poe-tiny", dtype="float32", lazy=True)
    with Engine(model, endless) as engine:
        engine.attach("chat", "poe-tiny-chat", quantize=8)
        for options in (
            {},
            {"temp": 0.7, "top_k": 5, "min_p": 0.1, "top_p": 0.8},
            {"mode": "speculative", "draft_bits": 4},
            {"mode": "compose"},
            {"specialist": "chat", "mode": "speculative"},
        ):
            assert len(list(engine.submit(STORY, max_tokens=8, **options))) == 8
    assert len(list(stream_generate(model, endless, STORY, max_tokens=3))) == 3


@pytest.mark.parametrize(
    "end", ["", *(pytest.param(e, marks=SOAK) for e in ("engine.close()", "raise SystemExit(0)"))]
)
def test_a_process_with_an_engine_ends_well(end):
    """Closed or not."""
    code = """
import mlx_poe, mlx_poe.engine
engine = mlx_poe.engine.Engine(*mlx_poe.load())
kept = engine._scheduler.cache
print(len(list(engine.submit("Once there was a little mouse who", max_tokens=5))))
request = engine.submit("Once", max_tokens=100_000)
{}
"""
    done = subprocess.run(
        [sys.executable, "-c", code.format(end)], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


def test_nothing_grows_over_many_requests(engine):
    threads = set(threading.enumerate())
    for i in range(45):
        request = engine.submit(text(12, start=i), max_tokens=2)
        if i % 3:
            assert len(list(request)) == 2
        else:
            request.cancel()
    assert list(engine.submit("a", max_tokens=1))
    assert not engine._requests and not len(engine._scheduler)
    assert engine._commands.empty()
    # Another test's may end meanwhile.
    assert set(threading.enumerate()) <= threads


def test_several_requests_start_together_or_not_at_all():
    with Engine(base, endless, memory=4_000_000) as engine:
        short = engine.prepare(STORY, max_tokens=4)
        huge = engine.prepare(text(3000), max_tokens=100_000)
        with pytest.raises(RequestError, match=r"may take 4\.0 MB"):
            engine.start([short, huge])
        assert engine.stats.running == engine.stats.waiting == 0
        both = engine.start([short, short])
        assert [tokens_of(list(one)) for one in both] == [alone(STORY, max_tokens=4)] * 2
        assert engine.stats.generation_tokens == 8


def test_a_listener_hears_all_and_one_that_fails_ends_its_request_only(engine):
    heard: list[Any] = []
    over = threading.Event()

    def listen(item: Any) -> None:
        heard.append(item)
        if item is None:
            over.set()

    def fail(item: Any) -> None:
        raise ValueError("not my day")

    engine.submit(STORY, max_tokens=500, listener=fail)
    engine.submit(STORY, max_tokens=6, listener=listen)
    assert over.wait(300)
    assert tokens_of(heard[:-1]) == alone(STORY, max_tokens=6) and heard[-1] is None
    assert tokens_of(list(engine.submit(TALK, max_tokens=3))) == alone(TALK, max_tokens=3)
    assert engine.stats.running == 0


def test_what_a_model_is(engine):
    base_info, chat, both = (engine.describe(name) for name in (None, "chat", ["chat", "math"]))
    assert (base_info.kind, base_info.stages, base_info.chats) == ("base", 4, False)
    assert (chat.kind, chat.stages, chat.chats) == ("specialist", 5, True)
    assert (both.kind, both.stages) == ("composition", 6)
    assert "wand" in chat.modes and "wand" not in both.modes and "full" in both.modes
    with pytest.raises(RequestError, match="no specialist nobody"):
        engine.describe("nobody")


def test_a_mode_that_does_not_fall_back():
    with Engine(base, endless, costs=lambda *_: DEAR) as engine:
        options = {"mode": "wand", "max_tokens": 40}
        last = list(engine.submit(STORY, **options))[-1]
        assert last.fell_back and last.parked == last.fell_back
        # With the names of version 0.2, too.
        for kept in ({"no_fallback": True}, {"no_park": True}, {"parks": False}):
            assert list(engine.submit(STORY, **kept, **options))[-1].fell_back is None
