"""A server that sends two tokens, or misbehaves: `python fake_server.py KIND --host H --port P`.

KIND is `good`; `hangs` or `dies` once two requests are there at the same time; `resets` every
second connection; `trickles` comments and nothing else; `stumbles`, which breaks off in mid-reply.
Told at /clients how many there will be, it lets the first of several wait for the second.
"""

import argparse
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}


class Handler(BaseHTTPRequestHandler):
    kind = ""
    lock = threading.Condition()
    busy = posts = awaited = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b'{"data": [{"id": "fake", "poe": {"chat": true}}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._answer(json.dumps({"count": len(body["content"].split())}).encode())
            return
        if self.path == "/clients":
            Handler.awaited = self.posts + min(body, 2)
            self._answer(b"null")
            return
        with self.lock:
            Handler.busy += 1
            Handler.posts += 1
            posts = self.posts
            self.lock.notify_all()
            self.lock.wait_for(lambda: self.posts >= self.awaited)
        try:
            if self.kind != "resets" or posts % 2 == 0:
                self._reply(streamed=body.get("stream", True))
        finally:
            with self.lock:
                Handler.busy -= 1

    def _answer(self, content: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    def _reply(self, streamed: bool) -> None:
        if streamed:
            self._answer(b": wait\n\n", "text/event-stream")
        time.sleep(0.02)
        if self.busy > 1 and self.kind == "hangs":
            threading.Event().wait()
        if self.busy > 1 and self.kind == "dies":
            os._exit(1)
        while self.kind == "trickles":
            self.wfile.write(b": wait\n\n")
            time.sleep(0.05)
        if not streamed:
            choices = [{"message": {"content": "Hello, you"}}]
            content = json.dumps({"choices": choices, "usage": USAGE}).encode()
            self._answer(content[:-5] if self.kind == "stumbles" else content)
            return
        for text in ("Hello", ", you"):
            self._event({"choices": [{"delta": {"content": text}}]})
            if self.kind == "stumbles":
                return
        self._event({"choices": [], "usage": USAGE})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: object) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    Handler.kind = args.kind
    ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()
