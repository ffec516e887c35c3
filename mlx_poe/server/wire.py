"""JSON and server-sent events as bytes."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from cognica_mlx import strict_json

KEEP_ALIVE = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """ASCII, so that what a client has sent, half a surrogate pair say, can always be sent back."""
    return strict_json.dumps(value, separators=(",", ":")).encode("ascii")


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body, a line for who reads it in a terminal."""
        return to_json(content) + b"\n"
