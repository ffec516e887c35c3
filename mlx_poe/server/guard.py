"""Access control.

- pages of other origins may not send requests, not even if their name resolves to this machine (DNS
  rebinding): Host must be one of our names, and Origin must be our own or allowed
- if the server has a key, clients without it may only see the page and the server's health
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_poe.server.error_bodies import ApiError

# Why a request to a path, with its headers, is refused; None if it is not.
Rule = Callable[[str, Headers], ApiError | None]


class Guard:
    """Answers the requests that a rule refuses, and passes on the others."""

    def __init__(self, app: ASGIApp, rule: Rule):
        self._app, self._rule = app, rule

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = scope["type"] == "http"
        error = self._rule(scope["path"], Headers(scope=scope)) if http else None
        await (error.response() if error else self._app)(scope, receive, send)


def origin_rule(host: str, allowed: Collection[str]) -> Rule:
    """Refuses requests by Host and Origin, with 403."""
    # Clients may also use the machine's own name.
    name = socket.gethostname().lower()
    ours = {"localhost", host.lower(), name, f"{name}.local"}

    def rule(path: str, headers: Headers) -> ApiError | None:
        to, origin = headers.get("host", ""), headers.get("origin")
        # Only a browser's requests are at risk, and those always have a Host. IP addresses are
        # safe, as DNS cannot redirect them.
        named = _without_port(to)
        own = (f"http://{to.lower()}", f"https://{to.lower()}") if to else ()
        if to and not _address(named) and named.lower() not in ours:
            problem = "the Host header names a different server"
        elif origin is None or {"*", origin} & {*allowed} or origin.lower() in own:
            return None
        else:
            problem = "requests from pages of other origins are refused; see --allow-origin"
        return ApiError(403, problem, code="forbidden_origin")

    return rule


def key_rule(key: str | None, open_paths: Collection[str]) -> Rule:
    """Refuses requests without the key, if there is one, except to `open_paths`, with 401."""

    def rule(path: str, headers: Headers) -> ApiError | None:
        if not key or path in open_paths:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if kind.lower() == "bearer" and same:
            return None
        message = "this server requires a key: Authorization: Bearer KEY"
        about = {"www-authenticate": "Bearer"}
        return ApiError(401, message, code="invalid_api_key", headers=about)

    return rule


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    address = _address(host)
    return address.is_loopback if address else host.lower() == "localhost"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
