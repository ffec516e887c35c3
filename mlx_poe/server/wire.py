"""JSON and server-sent events as bytes."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from cognica_mlx.files import strict_json

KEEP_ALIVE = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """JSON in ASCII, which can send back anything a client sent, even half a surrogate pair."""
    return strict_json.dumps(value, separators=(",", ":")).encode("ascii")


def event(value: Any) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body, with a newline for readers in a terminal."""
        return to_json(content) + b"\n"
