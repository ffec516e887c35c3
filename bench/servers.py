"""Servers as child processes, and clients that record when text arrives.

- in: a command line; requests as bytes
- out: replies with their times, from one client or from many in a closed loop
- every server gets the same client, the standard library's HTTP client
- no server can block a client for longer than `patience` seconds, and none outlives its block
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse
from tempfile import TemporaryFile
from typing import IO, Any

HOST = "127.0.0.1"
START_SECONDS = 600.0  # to load a model
STOP_SECONDS = 5.0
DONE = b"data: [DONE]\n\n"
# A server with a full backlog resets connections. Like OpenAI's client, retry twice.
RETRIES = (0.1, 0.5)


class ServerFailed(Exception):
    """A server died, hung, or did not send a complete reply."""


@dataclass(frozen=True)
class Reply:
    """A reply, streamed or whole: seconds until its first text and until its end, everything
    received, and how often the connection was reset before an answer."""

    first: float
    seconds: float
    received: bytes
    resets: int = 0

    @cached_property
    def text(self) -> str:
        """The whole text."""
        return "".join(map(_text, _events(self.received)))

    @cached_property
    def usage(self) -> dict[str, Any]:
        """The server's own count of tokens."""
        for event in reversed(_events(self.received)):
            if event.get("usage"):
                return dict(event["usage"])
        raise ServerFailed("sent a reply without token counts")


@dataclass(frozen=True)
class Outcome:
    """A closed loop's replies, in the order of the requests, and how long it took."""

    replies: list[Reply]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second over all clients."""
        return sum(int(one.usage["completion_tokens"]) for one in self.replies) / self.seconds


class ServerProcess:
    """A server process; as a context manager it calls `start` and `stop` itself.

    `--host` and `--port` are added to the command line `command`.
    """

    def __init__(self, name: str, command: Sequence[str]):
        self.name, self._command = name, command
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._port = 0

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether it was started and has been neither stopped nor seen to fail."""
        return self._process is not None

    def start(self) -> None:
        """Start it and wait until it answers; ServerFailed if it does not."""
        self._log = TemporaryFile()  # noqa: SIM115
        with socket.socket() as free:
            free.bind((HOST, 0))
            self._port = free.getsockname()[1]
        # The user's key is meant for the user's own server.
        environment = {k: v for k, v in os.environ.items() if k != "MLX_POE_API_KEY"}
        self._process = subprocess.Popen(
            [*self._command, "--host", HOST, "--port", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
        )
        deadline = time.monotonic() + START_SECONDS
        try:
            while self._process.poll() is None:
                with suppress(OSError, HTTPException, ServerFailed):
                    self.get("/health")
                    return
                if time.monotonic() > deadline:
                    raise ServerFailed(f"did not answer within {START_SECONDS:g} s")
                time.sleep(0.1)
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip() or "it printed nothing"
            raise ServerFailed(f"ended before it answered: {said.splitlines()[-1].strip()}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it, if it is running."""
        process, self._process = self._process, None
        if process:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._log:
            self._log.close()
            self._log = None

    def get(self, path: str, body: Any = None, patience: float = 10.0) -> Any:
        """The JSON at `path`; with a `body`, the JSON answer to a POST."""
        with closing(HTTPConnection(HOST, self._port, timeout=patience)) as connection:
            sent = None if body is None else json.dumps(body)
            connection.request("GET" if sent is None else "POST", path, sent, _HEADERS)
            return json.loads(self._checked(connection).read())

    def ask(self, path: str, body: bytes, patience: float) -> Reply:
        """The reply to a request; ServerFailed unless it is complete."""
        started = time.perf_counter()
        try:
            for resets, wait in enumerate((*RETRIES, None)):
                with closing(HTTPConnection(HOST, self._port, timeout=patience)) as connection:
                    try:
                        connection.request("POST", path, body, _HEADERS)
                        response = self._checked(connection)
                    except ConnectionError:
                        if wait is None or not self.running:
                            raise
                    else:
                        return self._read(response, started, patience, resets)
                time.sleep(wait)
        except TimeoutError:
            raise ServerFailed(f"hung: nothing for {patience:.0f} s") from None
        except (OSError, HTTPException, ValueError) as error:
            raise ServerFailed(f"broke the connection: {type(error).__name__}") from None
        raise AssertionError("the last try returns or raises")

    def _read(self, response: HTTPResponse, started: float, patience: float, resets: int) -> Reply:
        if response.headers.get_content_type() == "application/json":
            received = response.read()  # whole
            json.loads(received)
            now = time.perf_counter() - started
            return Reply(now, now, received, resets)
        first, received = None, b""
        # Do not wait for the connection to close: servers differ in when they do that.
        while not received.endswith(DONE):
            part = response.read1(65536)
            now = time.perf_counter() - started
            received += part
            if not part:
                raise ServerFailed("broke the connection in mid-reply")
            # Keep-alive comments do not count as progress.
            if now > patience:
                raise ServerFailed(f"hung: no complete reply in {patience:.0f} s")
            if first is None and any(map(_text, _events(received))):
                first = now
        return Reply(now if first is None else first, now, received, resets)

    def _checked(self, connection: HTTPConnection) -> HTTPResponse:
        response = connection.getresponse()
        if response.status != 200:
            said = response.read(300).decode(errors="replace")
            raise ServerFailed(f"answered {response.status}: {said}")
        return response


_HEADERS = {"Content-Type": "application/json"}


def closed_loop(
    server: ServerProcess, path: str, requests: Sequence[bytes], clients: int, patience: float
) -> Outcome:
    """Send the requests from `clients` clients; each waits for a reply before it sends its next
    request. If any fails, the server is stopped and ServerFailed raised."""
    waiting = deque(enumerate(requests))
    replies: dict[int, Reply] = {}
    failures: list[ServerFailed] = []

    def client() -> None:
        with suppress(IndexError):  # no requests left
            while not failures:
                i, request = waiting.popleft()
                try:
                    replies[i] = server.ask(path, request, patience)
                except ServerFailed as failure:
                    failures.append(failure)

    # Daemon threads, so that an interrupted benchmark does not wait for them.
    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.1)
            if failures:
                server.stop()  # ends all other requests too
    seconds = time.perf_counter() - started
    if failures:
        raise failures[0]
    outcome = Outcome([replies[i] for i in range(len(requests))], seconds)
    for reply in outcome.replies:
        _ = reply.usage  # parsed after the clock has stopped; fails for a reply without usage
    return outcome


def _events(received: bytes) -> list[dict[str, Any]]:
    """All complete events but the last, which is not JSON; a whole reply is one event."""
    if received.startswith(b"{"):
        return [json.loads(received)]
    whole = received[: received.rfind(b"\n\n") + 1]
    lines = [line[6:] for line in whole.split(b"\n") if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


def _text(event: dict[str, Any]) -> str:
    choice = (event.get("choices") or [{}])[0]
    said = choice.get("delta") or choice.get("message") or {}
    return choice.get("text") or said.get("content") or ""
