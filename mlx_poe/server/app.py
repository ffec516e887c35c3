"""The server's routes.

- in: an `Engine`, the models it serves, limits, access rules
- out: an ASGI application
- no path from a request ever touches the file system: the page's files are read at startup
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cognica_mlx.convert.chat_layout import BOS, REPLY_END, TEMPLATE
from cognica_mlx.errors import PoEError
from mlx_poe.engine import Engine
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.server.catalog import Catalog, Served
from mlx_poe.server.chat_completions import read_chat
from mlx_poe.server.completions import read_completion
from mlx_poe.server.error_bodies import ApiError, as_api_error, refused
from mlx_poe.server.fields import Fields, read_object
from mlx_poe.server.guard import Guard, key_rule, origin_rule
from mlx_poe.server.metrics import CONTENT_TYPE, Metrics
from mlx_poe.server.request_life import ClientGone, Service
from mlx_poe.server.response_frame import ResponseFrame
from mlx_poe.server.shared_fields import Limits
from mlx_poe.server.wire import Json

BODY_SECONDS = 30.0
_PAGE_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_PAGE_HEADERS = {
    # Nothing from another host, nothing inline.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Read = Callable[[Fields, Served, Tokenizer], ResponseFrame]


class Server:
    def __init__(self, engine: Engine, catalog: Catalog, limits: Limits):
        self.engine, self.catalog, self.limits = engine, catalog, limits
        self.metrics = Metrics(engine)
        self.service = Service(engine, limits, self.metrics)
        self._created = int(time.time())

    async def complete(self, read: Read, request: Request) -> Response:
        body = await self._body(request)
        frame = read(body, self.catalog.named_in(body), self.engine.tokenizer)
        return await self.service.respond(frame, _NAMES[request.url.path], request.receive)

    async def models(self, request: Request) -> Response:
        data = [served.as_json(self._created) for served in self.catalog.values()]
        return Json({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        return Json(self.catalog.find(request.path_params["name"]).as_json(self._created))

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: text in `content` or `prompt` to `tokens`."""
        body = await self._body(request)
        names = [name for name in ("content", "prompt") if name in body]
        if len(names) != 1:
            raise ApiError(400, "give the text as content, or as prompt", "content")
        text = body.text(names[0]) or ""
        add = body.flag("add_special_tokens", default=True)
        special = body.flag("parse_special", default=True)
        self._about_model(body)
        encode = self.engine.tokenizer.encode
        tokens = await anyio.to_thread.run_sync(encode, text, add, special)
        return Json({"tokens": tokens, "count": len(tokens), "max_model_len": self.limits.context})

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`: `tokens` to text, as `content` and as `prompt`."""
        body = await self._body(request)
        tokens = body.required("tokens", body.items)
        self._about_model(body)
        size = self.engine.tokenizer.vocab_size
        if not all(type(token) is int and 0 <= token < size for token in tokens):
            raise refused("tokens", f"token ids are whole numbers below {size}")
        text = self.engine.tokenizer.decode(tokens)
        return Json({"content": text, "prompt": text})

    def _about_model(self, body: Fields) -> None:
        """Check an optional `model`: all served models share one tokenizer."""
        if "model" in body:
            self.catalog.named_in(body)
        body.done()

    async def tokenizer_info(self, request: Request) -> Response:
        """`GET /tokenizer_info`: what lm-eval needs to know about a remote tokenizer."""
        special = self.engine.tokenizer.special_tokens
        end = REPLY_END if any(one.info.chats for one in self.catalog.values()) else BOS
        about = {"bos_token": BOS, "eos_token": end, "pad_token": BOS}
        found = {name: token if token in special else None for name, token in about.items()}
        return Json({"tokenizer_class": "cognica-mlx", **found, "chat_template": TEMPLATE})

    async def health(self, request: Request) -> Response:
        if self.engine.closed or self.service.closing:
            return Json({"status": "shutting down"}, 503)
        stats, lost = self.engine.stats, self.engine.lost_link
        about = {"running": stats.running, "waiting": stats.waiting}
        if not lost:
            return Json({"status": "ok", **about})
        status, code = ("degraded", 200) if lost.degrade else ("unavailable", 503)
        return Json({"status": status, "problem": str(lost.lost), **about}, code)

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _body(self, request: Request) -> Fields:
        """The request's JSON. A body that is too large is still read up to a point and discarded;
        otherwise the client would not read the response."""
        limit, size = self.limits.body_bytes, 0
        parts: list[bytes] = []
        with anyio.move_on_after(BODY_SECONDS) as scope:
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > 8 * limit:
                    break
        if scope.cancelled_caught:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s")
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
        return read_object(b"".join(parts))

    async def refusal(self, request: Request, error: Exception) -> Response:
        """The response to a request that cannot be honored or has failed."""
        if isinstance(error, (ClientGone, ClientDisconnect)):
            return Response(status_code=499)
        if isinstance(error, HTTPException):
            error = _routing_error(request, error)
        problem = as_api_error(error)
        self.metrics.refused(_NAMES.get(request.url.path, "other"), problem.status)
        return problem.response()


_NAMES = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, f"there is no {ascii(request.url.path)[1:81]}", code="not_found")
    if error.status_code == 405:
        message = f"{request.method} is not allowed here"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, error.detail)


def _page() -> dict[str, Response]:
    """The page's files by their paths, read once."""
    found = {}
    for file in (files("mlx_poe.server") / "page").iterdir():
        if kind := _PAGE_KINDS.get(file.name.rpartition(".")[2]):
            path = "/" if file.name == "index.html" else f"/{file.name}"
            found[path] = Response(file.read_bytes(), media_type=kind, headers=_PAGE_HEADERS)
    return found


def make_app(
    engine: Engine,
    catalog: Catalog,
    limits: Limits,
    *,
    host: str,
    api_key: str | None = None,
    allow_origins: Sequence[str] = (),
) -> Starlette:
    """The application; its `Server` is `app.state.server`."""
    server = Server(engine, catalog, limits)
    page = _page()
    routes = [Route(path, file, methods=["GET"]) for path, file in page.items()]
    for method, path, endpoint in (
        ("POST", "/v1/chat/completions", partial(server.complete, read_chat)),
        ("POST", "/v1/completions", partial(server.complete, read_completion)),
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{name:path}", server.model),
        ("POST", "/tokenize", server.tokenize),
        ("POST", "/detokenize", server.detokenize),
        ("GET", "/tokenizer_info", server.tokenizer_info),
        ("GET", "/health", server.health),
        ("GET", "/metrics", server.metrics_text),
    ):
        routes.append(Route(path, endpoint, methods=[method]))
    middleware = [Middleware(Guard, rule=origin_rule(host, frozenset(allow_origins)))]
    if allow_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(allow_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    middleware.append(Middleware(Guard, rule=key_rule(api_key, {*page, "/health"})))
    errors = (ApiError, PoEError, HTTPException, ClientGone, ClientDisconnect, Exception)
    handlers = dict.fromkeys(errors, server.refusal)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.state.server = server
    return app
