"""A server as users start it: a process of its own, at a free port."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Seconds after which something hangs, however busy the machine is.
PATIENCE = 300
COMPOSITION = ("--composition", "both=poe-tiny-chat:1,poe-tiny-math:2")


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that must come true."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


class RunningServer:
    """A child process, until `stop`. What it prints is in `log`."""

    def __init__(
        self,
        *flags: str,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = ("-m", "mlx_poe", "server"),
    ):
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", "0", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.log: list[str] = []
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.match(r"API +http://([^/]+):(\d+)/v1", line):
                self.host, self.port = found[1], int(found[2])
                break
        else:
            raise AssertionError("".join(self.log))
        # A full pipe would stop the server.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        self.log.extend(self.process.stderr)

    @property
    def url(self) -> str:
        """Where the page is, without the last slash."""
        return f"http://{self.host}:{self.port}"

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        status = self.process.wait(PATIENCE)
        self._reader.join()
        return status

    def connect(self) -> http.client.HTTPConnection:
        """A connection of one's own."""
        return http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """One request: its status, its body (read, if it is JSON) and headers, names in lower case.

        A body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = self.connect()
        method = method or ("GET" if data is None else "POST")
        connection.request(method, path, data, dict(headers or {}))
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        content: Any = response.read().decode()
        connection.close()
        if found.get("content-type", "").startswith("application/json"):
            content = json.loads(content)
        return response.status, content, found

    def figures(self) -> dict[str, float]:
        """What /metrics tells, by name."""
        lines = self.ask("/metrics")[1].splitlines()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
