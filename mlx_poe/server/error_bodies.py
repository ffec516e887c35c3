"""Error responses in the format that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cognica_mlx.errors import PoEError, RankError
from mlx_poe.engine import EngineClosedError
from mlx_poe.generation.reply_form import FORM_OPTIONS
from mlx_poe.generation.request import MODE_OPTIONS, SAMPLING
from mlx_poe.server.wire import Json

# Fields by the names of the engine's options.
_FIELDS = {
    **{name: name for name in (*SAMPLING, *MODE_OPTIONS, *FORM_OPTIONS)},
    **{name: name for name in ("mode", "stop", "no_fallback")},
    **{"temp": "temperature", "json_schema": "response_format", "token": "prompt"},
    "certified": "mode",  # which no longer exists
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response. `param` is the field at fault, `code` a fixed word."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about}

    def response(self) -> Json:
        return Json(self.as_json(), self.status, self.headers)


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """The error for a field whose value cannot be honored."""
    return ApiError(400, f"{param}: {message}", param, code)


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as an error response. Errors that are not the request's fault become 500.

    The engine's messages begin with the name of the option at fault, if there is one.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the server is shutting down", headers={"retry-after": "10"})
    if isinstance(error, RankError):
        return ApiError(503, str(error))
    if isinstance(error, PoEError):
        name = str(error).split(maxsplit=1)[0].rstrip(":")
        return ApiError(400, str(error), _FIELDS.get(name))
    return ApiError(500, "an error inside the server; its log has the details")
