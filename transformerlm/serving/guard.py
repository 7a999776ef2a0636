"""Who may ask: the key, the host, the origin and the size of a request are checked here, before any route.

Plain ASGI around the whole application, so that no route can be forgotten and nothing stands between a route and a
client that leaves (Starlette's `BaseHTTPMiddleware` does).
"""

from __future__ import annotations

import base64
import hmac
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transformerlm.serving.errors import ApiError

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_PREFLIGHT_SECONDS = 600
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask, and how much a request may hold. `key` is None where none is needed; `hosts` are in lower case."""

    key: str | None
    hosts: frozenset[str]
    origins: frozenset[str]
    max_body_bytes: int
    is_open: Callable[[str], bool] = lambda path: False
    """Whether a path may be read without the key, since it is a file that everybody has."""

    @classmethod
    def of(
        cls,
        *,
        key: str | None,
        hosts: Sequence[str],
        origins: Sequence[str],
        max_body_bytes: int,
        is_open: Callable[[str], bool] = lambda path: False,
    ) -> Access:
        """Return the rules, with names of hosts and origins as they are compared."""
        return cls(
            is_open=is_open,
            key=key,
            hosts=frozenset(_bracketed(host.lower()) for host in hosts),
            origins=frozenset(_without_usual_port(origin.lower()) for origin in origins),
            max_body_bytes=max_body_bytes,
        )


class Guard:
    """The application behind the checks; `rejected` is told the reason of each refusal."""

    def __init__(self, app: ASGIApp, access: Access, *, rejected: Callable[[str], None] = lambda reason: None) -> None:
        self._app, self._access, self._rejected = app, access, rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_known = origin is not None and origin.lower() in self._access.origins
        began = False

        async def send_guarded(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                _add_headers(MutableHeaders(scope=message), origin if is_known else None)
            await send(message)

        try:
            self._check(headers, is_known=is_known, method=scope["method"])
            if is_known and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, send_guarded)
                return
            # The page must be there to ask for the key.
            if not (scope["method"] in ("GET", "HEAD") and self._access.is_open(scope["path"])):
                self._check_key(headers, scope["method"])
            await self._app(scope, self._limited(receive), send_guarded)
        except ApiError as error:
            if not error.was_taken:
                self._rejected(error.code or "invalid")
            if not began:
                await error.response()(scope, receive, send_guarded)
        except ClientDisconnect:
            return  # nobody is there to be answered
        except Exception as error:  # a mistake of ours: the client gets the form it knows, and no traceback
            _LOG.error("%s %s: %s: %s", scope["method"], scope["path"], type(error).__name__, error)
            _LOG.debug("traceback", exc_info=error)
            if began:
                raise
            await ApiError(500, "internal error", code="internal").response()(scope, receive, send_guarded)

    def _check(self, headers: Headers, *, is_known: bool, method: str) -> None:
        host = headers.get("host", "").lower()
        if len(headers.getlist("host")) != 1 or _without_port(host) not in self._access.hosts:
            raise ApiError(
                403, f"host {host[:80]!r} is not allowed; access.allowed_hosts names those that are", code="host"
            )
        origin = headers.get("origin")
        # Behind a proxy the page is on https and we are on http, so only names and ports are compared.
        is_own = origin is not None and origin.lower().partition("://")[2] == host
        if origin is not None and not (is_known or is_own):
            raise ApiError(
                403,
                f"origin {origin[:80]!r} is not allowed; access.allowed_origins names those that are",
                code="origin",
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._access.max_body_bytes:
            raise self._too_large()

    def _check_key(self, headers: Headers, method: str) -> None:
        """Refuse a request without the key: `Authorization: Bearer KEY`, or what a browser asks its user for."""
        if self._access.key is None or hmac.compare_digest(_key_of(headers), self._access.key.encode()):
            return
        # A browser that opens the page asks its user for a password when told to.
        is_page = method == "GET" and "text/html" in headers.get("accept", "")
        scheme = 'Basic realm="transformerlm", charset="UTF-8"' if is_page else "Bearer"
        raise ApiError(
            401,
            "expected the server's key, as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": scheme},
        )

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive`, which raises ApiError once the body is too large: not every body says its length."""
        taken = 0

        async def receive_limited() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._access.max_body_bytes:
                    raise self._too_large()
            return message

        return receive_limited

    def _too_large(self) -> ApiError:
        megabytes = self._access.max_body_bytes / 1e6
        # The rest is read and dropped until timeouts.body: most clients read no answer before they have sent all.
        return ApiError(413, f"expected a body of at most {megabytes:g} MB (limits.body_mb)", code="body_too_large")


def _key_of(headers: Headers) -> bytes:
    """Return the key that a request brings; a browser sends it as the password of any name."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:  # no base64, or not even ASCII
            return b""
    return b""


def _bracketed(host: str) -> str:
    """Return a host as it is in a URL: an address of IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and not (host.startswith("[") and host.endswith("]")) else host


def _without_usual_port(origin: str) -> str:
    """Return an origin as browsers send it, which leave out the port that its scheme has anyway."""
    return origin.removesuffix(":443" if origin.startswith("https:") else ":80")


def _add_headers(headers: MutableHeaders, origin: str | None) -> None:
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)
    if origin is not None:
        headers["Access-Control-Allow-Origin"] = origin
        headers.add_vary_header("Origin")


def _preflight(headers: Headers) -> Response:
    """Return what a browser is told that asks, for a page of another server, whether it may send a request."""
    allowed = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "authorization, content-type"),
        "Access-Control-Max-Age": str(_PREFLIGHT_SECONDS),
    }
    return Response(status_code=204, headers=allowed)
