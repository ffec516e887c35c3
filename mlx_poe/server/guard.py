"""Access control.

- pages of other origins may not send requests, not even if their name resolves to this machine (DNS
  rebinding): Host must be one of our names, and Origin must be our own or allowed
- if the server has a key, clients without it may only see the page and the server's health
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_poe.server.error_bodies import ApiError


class OriginGuard:
    """Refuses requests by Host and Origin."""

    def __init__(self, app: ASGIApp, host: str, allowed: Collection[str]):
        self._app, self._allowed = app, frozenset(allowed)
        # Clients may also use the machine's own name.
        name = socket.gethostname().lower()
        self._hosts = {"localhost", host.lower(), name, f"{name}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer with 403."""
        if scope["type"] == "http" and (problem := self._problem(Headers(scope=scope))):
            error = ApiError(403, problem, code="forbidden_origin")
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        # Only a browser's requests are at risk, and those always have a Host.
        if host and not self._is_ours(_without_port(host)):
            return "the Host header names a different server"
        if origin is None or "*" in self._allowed or origin in self._allowed:
            return None
        if host and origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return None
        return "requests from pages of other origins are refused; see --allow-origin"

    def _is_ours(self, name: str) -> bool:
        """Whether a Host is ours. IP addresses are safe, as DNS cannot redirect them."""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in self._hosts
        return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


class KeyGuard:
    """Refuses requests without the key, except to `open_paths`."""

    def __init__(self, app: ASGIApp, key: str | None, open_paths: Collection[str]):
        self._app, self._open = app, frozenset(open_paths)
        self._key = key.encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer with 401."""
        if scope["type"] == "http" and self._key and scope["path"] not in self._open:
            kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
            if kind.lower() != "bearer" or not same:
                message = "this server requires a key: Authorization: Bearer KEY"
                headers = {"www-authenticate": "Bearer"}
                error = ApiError(401, message, code="invalid_api_key", headers=headers)
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
