"""Who may ask: bearer token, attempts, host and origin checks, body limits, and the headers of every answer.

Pure ASGI, around the complete app, so that no route can forget a check. There are no cookies.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.service.errors import ApiError
from cluster.service.settings import PREFIX
from cluster.service.tickets import Tickets

LONGEST_BODY = 1 << 20  # of everything but uploads
UPLOAD = f"{PREFIX}/datasets"
OPEN = f"{PREFIX}/health"
_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(slots=True)
class Attempts:
    """Wrong tokens by client: at most `limit` in `window_s`; memory is bounded."""

    limit: int = 10
    window_s: float = 60.0
    clock: Callable[[], float] = monotonic
    most_clients: int = 10_000
    _wrong: OrderedDict[str, deque[float]] = field(default_factory=OrderedDict)

    def wait_s(self, client: str) -> float:
        """Seconds until this client may try again; 0: now."""
        times = self._wrong.get(client)
        while times and times[0] <= self.clock() - self.window_s:
            times.popleft()
        return times[0] + self.window_s - self.clock() if times and len(times) >= self.limit else 0.0

    def failed(self, client: str) -> None:
        """Count a wrong token."""
        self._wrong.setdefault(client, deque()).append(self.clock())
        self._wrong.move_to_end(client)
        while len(self._wrong) > self.most_clients:
            self._wrong.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Call:
    """What the checks need of an HTTP request."""

    method: str
    path: str
    tickets: list[str]
    client: str
    headers: Headers

    @classmethod
    def of(cls, scope: Scope) -> _Call:
        """From the ASGI scope."""
        request = HTTPConnection(scope)
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        client = (scope.get("client") or ("unknown", 0))[0]
        return cls(scope.get("method", ""), scope.get("path", ""), query.get("ticket", []), client, request.headers)


class Guard:
    """The checks, around the complete app."""

    def __init__(self, app: ASGIApp, *, token_sha256: bytes | None, attempts: Attempts, tickets: Tickets) -> None:
        self._app = app
        self._token = token_sha256
        self._attempts = attempts
        self._tickets = tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        kind = scope.get("type")
        if kind != "http":
            if kind == "lifespan":
                await self._app(scope, receive, send)
            else:  # there are no web sockets
                await send({"type": "websocket.close", "code": 1000})
            return
        call = _Call.of(scope)
        sending = _with_headers(send, call.path)
        try:
            self._check_host(call.headers)
            _check_site(call.method, call.headers)
            self._check_token(call)
            limited = receive if _is_upload(call) else _limited(call.headers, receive)
        except ApiError as error:
            await error.answer()(scope, receive, sending)
            return
        await self._app(scope, limited, sending)

    def _check_host(self, headers: Headers) -> None:
        """Without a token, names that a foreign DNS server could point here are refused (DNS rebinding)."""
        if self._token is None and _hostname(headers.get("host", "")) not in ("localhost", "127.0.0.1", "::1"):
            raise ApiError(400, "bad_host", "this service answers to localhost and 127.0.0.1 only")

    def _check_token(self, call: _Call) -> None:
        if self._token is None or not call.path.startswith(f"{PREFIX}/") or call.path == OPEN:
            return
        if call.tickets and call.method == "GET" and self._tickets.redeem(call.path, call.tickets[0]):
            return
        if (wait := self._attempts.wait_s(call.client)) > 0:
            raise ApiError(
                429,
                "too_many_attempts",
                "too many wrong tokens from this address; wait a minute",
                headers={"Retry-After": str(int(wait) + 1)},
            )
        kind, _, given = call.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(sha256(given.strip()), self._token):
            return
        if given:
            self._attempts.failed(call.client)
        message = "the token is wrong" if given else "a token is needed: send Authorization: Bearer TOKEN"
        raise ApiError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})


def sha256(token: str) -> bytes:
    """The hash that is kept of a token (tokens are random and long, so that no slow hash is needed)."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _hostname(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_upload(call: _Call) -> bool:
    return call.method == "POST" and call.path == UPLOAD


def _check_site(method: str, headers: Headers) -> None:
    """A page of another site may send forms here without being asked; what changes something is refused to it."""
    if method in _SAFE:
        return
    site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
    foreign = site not in ("none", "same-origin")
    if origin is not None:
        foreign |= origin.partition("://")[2].lower() != headers.get("host", "").lower()
    if foreign:
        raise ApiError(403, "cross_site", "the request comes from another site's page")


def _limited(headers: Headers, receive: Receive) -> Receive:
    """Bodies are small but for uploads, announced or not."""
    too_large = ApiError(413, "too_large", f"the body is longer than {LONGEST_BODY} bytes")
    length = headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > LONGEST_BODY:
        raise too_large
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > LONGEST_BODY:
            raise too_large
        return message

    return limited


def _with_headers(send: Send, path: str) -> Send:
    async def sending(message: Message) -> None:
        if message.get("type") == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.update(_HEADERS)
            if path.startswith(f"{PREFIX}/"):
                headers.setdefault("Cache-Control", "no-cache" if "etag" in headers else "no-store")
        await send(message)

    return sending
