"""The server under way: clients that leave, are slow or too many, and signals."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SOAK, fixture
from servers import PATIENCE, RunningServer, until
from test_scheduler import models, text

from mlx_poe import stream_generate
from mlx_poe.server import request_life as serving
from mlx_poe.server.response_frame import Choice

TEXTS = "/v1/completions"
tokenizer = fixture("poe-tiny")[1]
# The evidence in docs/measured.md is from 64 clients with 12 requests each.
CLIENTS = int(os.environ.get("LOAD_CLIENTS", "6"))
REQUESTS = int(os.environ.get("LOAD_REQUESTS", "3"))
LONG = {"model": "poe-tiny", "prompt": text(40), "max_tokens": 3000, "logit_bias": {"2039": -100}}


def begin(
    server: RunningServer, body: dict[str, Any], receive_buffer: int | None = None
) -> socket.socket:
    """Send a request for completion, and read nothing yet."""
    data = json.dumps(body).encode()
    head = f"POST {TEXTS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.socket()
    connection.settimeout(PATIENCE)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((server.host, server.port))
    connection.sendall(head.encode() + data)
    return connection


def at_work(server: RunningServer) -> int:
    health = server.ask("/health")[1]
    return health["running"] + health["waiting"]


@pytest.mark.parametrize(
    ("prompt", "stream"),
    [
        (text(40), True),
        (text(12000), False),
        pytest.param(text(40), False, marks=SOAK),
        pytest.param(text(12000), True, marks=SOAK),
    ],
    ids=["replying-True", "prefill-False", "replying-False", "prefill-True"],
)
def test_a_client_that_leaves_frees_its_slot(server, stream, prompt):
    body = {**LONG, "prompt": prompt, "stream": stream}
    connections = [begin(server, body) for _ in range(10)]
    until(lambda: at_work(server) == 10)
    for connection in connections:
        connection.close()
    until(lambda: at_work(server) == 0)
    assert server.ask(TEXTS, {**LONG, "max_tokens": 2})[0] == 200


def test_a_client_that_leaves_is_counted(server):
    name = 'cognica_mlx_requests_total{endpoint="completions",outcome="gone"}'

    def gone() -> float:
        return server.figures().get(name, 0)

    before = gone()
    connection = begin(server, {**LONG, "stream": True})
    connection.recv(100)
    connection.close()
    until(lambda: gone() == before + 1)


def test_what_waits_says_that_it_is_alive(server):
    """Eight long prompts are read before a ninth begins; the first thing it sends is no token."""
    others = [begin(server, {**LONG, "prompt": text(6000, i), "stream": True}) for i in range(8)]
    until(lambda: at_work(server) == 8)
    connection = begin(server, {**LONG, "stream": True})
    head = connection.recv(4096)
    while b": waiting\n\n" not in head:
        assert b"data:" not in head
        head += connection.recv(4096)
    for one in (*others, connection):
        one.close()
    until(lambda: at_work(server) == 0)


@pytest.fixture(scope="module")
def small():
    running = RunningServer("--max-sequences", "2", "--max-queue", "1")
    yield running
    assert running.stop() == 0


def test_a_full_queue_says_when_to_come_again(small):
    held = [begin(small, LONG) for _ in range(3)]
    until(lambda: at_work(small) == 3)
    status, answer, headers = small.ask(TEXTS, {**LONG, "max_tokens": 1})
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(headers["retry-after"]) <= 60
    for connection in held:
        connection.close()
    until(lambda: small.ask(TEXTS, {**LONG, "max_tokens": 1})[0] == 200)
    status, answer, _ = small.ask(TEXTS, {**LONG, "n": 4})
    assert (status, answer["error"]["message"]) == (
        400,
        "4 sequences at once exceed the limit of 3",
    )


@SOAK
def test_what_never_fits_is_refused_with_the_numbers():
    running = RunningServer("--memory", "10000")
    status, answer, _ = running.ask(TEXTS, LONG)
    assert status == 400 and "all sequences together may take 10.0 kB" in answer["error"]["message"]
    assert running.stop() == 0


def test_the_engine_does_not_wait_for_a_reader(server):
    def made() -> float:
        return server.figures().get("cognica_mlx_completion_tokens_total", 0)

    before = made()
    connection = begin(server, {**LONG, "stream": True, "logprobs": 5, "max_tokens": 60})
    until(lambda: made() == before + 60)
    assert at_work(server) == 0
    connection.close()


class Wakeful:
    """What a `Run` needs of a loop, a frame and metrics, and the calls that wake the loop."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.counted: list[Any] = []

    def service(self) -> serving.Service:
        about: Any = SimpleNamespace(sequences=8, places=8)
        service = serving.Service(SimpleNamespace(), about, self)  # type: ignore[arg-type]
        service._loop = SimpleNamespace(  # type: ignore[assignment]
            call_soon_threadsafe=lambda *call: self.calls.append(call)
        )
        return service

    def run(self, service: serving.Service, stream: bool) -> Any:
        choice = Choice(tokenizer.eos_token_ids)
        frame = SimpleNamespace(options=SimpleNamespace(stream=stream), choices=[choice])
        frame.usage = choice.responses
        return serving.Run(service, frame, "x")  # type: ignore[arg-type]

    def first_token(self, seconds: float) -> None:
        assert seconds >= 0

    def ended(self, endpoint: str, outcome: str, seconds: float, usage: Any) -> None:
        self.counted.append((outcome, usage))

    def wake(self, service: serving.Service) -> set[Any]:
        """The sweep ends; the runs that the loop goes on with."""
        del self.calls[:]
        service.engine.delivered()
        for function, *about in self.calls:
            function(*about)
        assert len(self.calls) <= 1
        return {run for _, runs in self.calls for run in runs}


def test_the_loop_wakes_once_for_a_sweep_and_for_a_whole_reply_at_its_end():
    said = list(
        stream_generate(*fixture("poe-tiny"), text(20), max_tokens=4, logit_bias={2039: -100})
    )

    async def main() -> None:
        life = Wakeful()
        service = life.service()
        one, other, whole = (life.run(service, stream) for stream in (True, True, False))
        for run in (one, one, other, whole):
            run._put(0, said[0])
        assert life.wake(service) == {one, other} and life.wake(service) == set()
        assert [r for _, r in await one._take()] == [said[0]] * 2
        assert not whole._arrived.is_set()
        for response in said[1:]:
            whole._put(0, response)
        whole._put(0, None)
        assert life.wake(service) == {whole} and whole._arrived.is_set()
        await whole.collect()
        assert whole.frame.choices[0].responses == said
        other._put(0, RuntimeError("lost"))
        other._put(0, None)
        assert life.wake(service) == {other}
        with pytest.raises(RuntimeError, match="lost"):
            await other.collect()

    asyncio.run(main())


def test_a_whole_reply_that_nobody_waits_for_counts_what_was_made():
    said = list(
        stream_generate(*fixture("poe-tiny"), text(20), max_tokens=3, logit_bias={2039: -100})
    )

    async def main() -> None:
        life = Wakeful()
        service = life.service()
        run = life.run(service, False)
        run._begun, service.taken = True, 1
        run._put(0, said[0])
        run._put(0, said[1])
        run.close()
        run.close()
        assert life.counted == [("gone", said[:2])] and service.taken == 0

    asyncio.run(main())


def test_an_alarm_rings_for_a_long_block_however_many_short_ones_came_before(monkeypatch):
    clock = SimpleNamespace(now=0.0, timers=[])
    clock.time = lambda: clock.now
    clock.call_at = lambda when, *call: clock.timers.append((when, call)) or True
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    rung: list[float] = []
    alarm = serving.Alarm(10.0, lambda: rung.append(clock.now))

    def go_to(now: float) -> None:
        while due := [timer for timer in clock.timers if timer[0] <= now]:
            clock.timers.remove(due[0])
            clock.now, (function, *about) = due[0]
            function(*about)
        clock.now = now

    for now in range(25):
        go_to(now)
        with alarm:
            assert len(clock.timers) == 1
    go_to(100)
    assert not rung and not clock.timers
    with alarm:
        go_to(109)
        assert not rung
    with alarm:
        go_to(118)
        assert not rung
        go_to(150)
        assert rung == [119]


class Endless:
    """A run whose reply never ends."""

    def __init__(self) -> None:
        self.frame = SimpleNamespace(id="x")
        self.closed = False
        self.wishes: list[str] = []
        self.paused = asyncio.Event()

    async def stream(self) -> AsyncIterator[bytes]:
        while True:
            yield b"data: {}\n\n"

    def pause(self) -> None:
        self.wishes.append("pause")
        self.paused.set()

    def resume(self) -> None:
        if self.paused.is_set():
            self.wishes.append("resume")
        self.paused.clear()

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("leaves", [True, False], ids=["one who leaves", "one who stops reading"])
def test_a_reader_who_takes_no_more_is_dropped(monkeypatch, leaves):
    monkeypatch.setattr(serving, "SLOW_SECONDS", 0.05)
    run, sent = Endless(), 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += 1
        await asyncio.sleep(0 if sent < 50 else 600)

    async def receive() -> Any:
        while not (leaves and sent >= 50):
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    stream = serving.EventStream(run)  # type: ignore[arg-type]
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), PATIENCE))
    assert run.closed and sent == 50


def test_a_reader_who_stalls_lets_others_run_until_it_goes_on(monkeypatch):
    monkeypatch.setattr(serving, "STALLED_SECONDS", 0.01)
    run, sent = Endless(), 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += 1
        await (run.paused.wait() if sent in (20, 40) else asyncio.sleep(0))

    async def receive() -> Any:
        while sent < 50:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    stream = serving.EventStream(run)  # type: ignore[arg-type]
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), PATIENCE))
    assert run.wishes[:4] == ["pause", "resume"] * 2 and run.closed


# A server whose clients may stall for longer than any test takes, and are soon seen to.
PATIENT = """
import socket, sys
from mlx_poe.commands import server
from mlx_poe.server import request_life
from mlx_poe.server import request_life as serving

listen = socket.socket.listen

def listening(self, *args):
    self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return listen(self, *args)

request_life.SLOW_SECONDS, socket.socket.listen = 3000, listening
sys.exit(server.main(sys.argv[1:]))
"""


def test_clients_that_stop_reading_hold_nobody_up():
    running = RunningServer("--max-sequences", "2", command=("-c", PATIENT))
    body = {**LONG, "stream": True, "logprobs": 5, "max_tokens": 400}
    stalled = [begin(running, body, receive_buffer=4096) for _ in range(3)]
    until(lambda: running.figures()["cognica_mlx_paused_sequences"] == 3)
    assert at_work(running) == 0
    assert running.ask(TEXTS, {**LONG, "max_tokens": 2})[0] == 200
    said = b""
    while b"[DONE]" not in said[-100:]:
        said += stalled[0].recv(1 << 16)
    assert said.count(b'"finish_reason":"length"') == 1
    assert running.figures()["cognica_mlx_paused_sequences"] == 2
    for connection in stalled:
        connection.close()
    until(lambda: running.figures()["cognica_mlx_paused_sequences"] == 0)
    assert running.stop() == 0


# A server that makes no token before it is told to stop, and then takes its time.
HELD = """
import sys, threading
import uvicorn
from mlx_poe.commands import server
from mlx_poe.engine.scheduler import Scheduler

told, step, shutdown = threading.Event(), Scheduler.step, uvicorn.Server.shutdown

def held(self):
    return step(self) if told.wait(0.01) else []

def stopping(self, *args, **options):
    told.set()
    return shutdown(self, *args, **options)

Scheduler.step, uvicorn.Server.shutdown, server.GRACE_SECONDS = held, stopping, 300
sys.exit(server.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SOAK)])
def test_a_signal_lets_requests_finish(number):
    running = RunningServer(command=["-c", HELD])
    answers: list[tuple[int, Any, Any]] = []
    body = {**LONG, "max_tokens": 60}
    asking = [
        threading.Thread(target=lambda: answers.append(running.ask(TEXTS, body))) for _ in range(3)
    ]
    for thread in asking:
        thread.start()
    until(lambda: at_work(running) == 3)
    assert running.stop(number) == 0
    for thread in asking:
        thread.join()
    assert [status for status, _, _ in answers] == [200] * 3
    assert all(a["usage"]["completion_tokens"] == 60 for _, a, _ in answers)
    log = "".join(running.log)
    assert "stopping: 3 sequences to finish" in log and log.endswith("stopped\n")
    assert "Traceback" not in log


def test_requests_that_take_too_long_are_ended_with_an_error():
    code = "import sys, mlx_poe.commands.server as s; s.GRACE_SECONDS = 0.2; s.main(sys.argv[1:])"
    running = RunningServer(command=["-c", code])
    streaming = begin(running, {**LONG, "stream": True, "max_tokens": 15000})
    waiting = begin(running, {**LONG, "max_tokens": 15000})
    until(lambda: at_work(running) == 2)
    assert running.stop() == 0
    for connection, expected in ((streaming, b"200 OK"), (waiting, b"503 Service Unavailable")):
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        whole = b"".join(parts)
        assert expected in whole.split(b"\r\n", 1)[0]
        assert b'"error":{"message":"the server is shutting down"' in whole
        assert b"[DONE]" not in whole
    assert "ending 2 unfinished sequences" in "".join(running.log)


# --- many at once ---------------------------------------------------------------------------------

ASKED: list[tuple[str, dict[str, Any]]] = [
    ("base", {"prompt": "Once upon a time"}),
    ("base", {"prompt": text(200), "mode": "speculative"}),
    ("base", {"prompt": "The capital of France is", "temperature": 1.3, "seed": 5}),
    ("base", {"prompt": text(31), "mode": "stage", "stage": 1, "stop": [" the", "er"]}),
    ("chat", {"prompt": "The sun", "mode": "wand", "presence_penalty": 0.5}),
    ("math", {"prompt": text(64), "mode": "speculative"}),
    ("both", {"prompt": "Tom has", "frequency_penalty": 0.7}),
    ("base", {"prompt": "In JSON:", "regex": '\\{"a": [0-9]{1,3}\\}'}),
]
NAMES = {"base": "poe-tiny", "chat": "poe-tiny-chat", "math": "poe-tiny-math", "both": "both"}


@cache
def expected(which: int) -> str:
    model, body = ASKED[which]
    options = {"temp" if name == "temperature" else name: v for name, v in body.items()}
    stream = stream_generate(models()[model], tokenizer, max_tokens=40, **options)
    return "".join(response.text for response in stream)


def ask_for(which: int) -> dict[str, Any]:
    model, about = ASKED[which]
    return {"model": NAMES[model], "max_tokens": 40, "no_park": True, **about}


def memory_of(process: int) -> int:
    """Resident bytes; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@SOAK
def test_load(server):
    """Clients in a closed loop, a fifth of them cut off in mid-stream."""
    for which in range(len(ASKED)):
        expected(which)
    # As much at once as there will ever be, so that memory is what it stays.
    with ThreadPoolExecutor(CLIENTS) as pool:
        full = [{**LONG, "prompt": text(200, i), "max_tokens": 40} for i in range(CLIENTS)]
        assert [answer[0] for answer in pool.map(partial(server.ask, TEXTS), full)] == [
            200
        ] * CLIENTS
        every = [ask_for(which) for which in range(len(ASKED))]
        assert [answer[0] for answer in pool.map(partial(server.ask, TEXTS), every)] == [200] * 8
    wrong: list[Any] = []
    finished, cut = [0] * CLIENTS, [0] * CLIENTS
    memory: list[int] = []

    def client(number: int) -> None:
        chance = random.Random(number)
        try:
            for _ in range(REQUESTS):
                memory.append(memory_of(server.process.pid))
                which = chance.randrange(len(ASKED))
                body = ask_for(which)
                if chance.random() < 0.2:
                    connection = begin(server, {**body, "stream": True})
                    connection.recv(chance.randrange(1, 3000))
                    connection.close()
                    cut[number] += 1
                    continue
                status, answer, _ = server.ask(TEXTS, body)
                if status != 200 or answer["choices"][0]["text"] != expected(which):
                    wrong.append((status, which, answer))
                finished[number] += 1
        except Exception as error:
            wrong.append(error)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    half, whole = memory[len(memory) // 2], memory_of(server.process.pid)
    print(
        f"\n{sum(finished)} finished, {sum(cut)} cut off; {half / 1e6:.0f} -> {whole / 1e6:.0f} MB"
    )
    assert not wrong[:3]
    assert min(finished) >= 1 and sum(cut)
    until(lambda: at_work(server) == 0)
    assert whole <= 1.25 * half + 30e6
