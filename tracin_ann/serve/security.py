"""Who may connect, and what a browser may do with the pages: hosts, token, cross-site requests, headers, body sizes.

A server on a loopback address serves everybody on the machine. A page of another site cannot use it: the Host header
has to be one of the server's names, against DNS rebinding, and a request that changes something has to come from the
server's own pages, by `Sec-Fetch-Site` or `Origin`. Other sites may link to pages, but not embed them: a page can start
a job. With a token, a client presents it as `Authorization: Bearer`, or logs in once at `/login`, which sets a cookie.
Rejected clients read nothing about the index.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from http import HTTPStatus
from urllib.parse import parse_qs, quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tracin_ann.errors import TracinAnnError, problem
from tracin_ann.serve.problems import ForbiddenError, LoginError, TooLargeError, UnknownHostError, make_response
from tracin_ann.serve.settings import Settings

logger = logging.getLogger(__name__)
API = "/api/"
LOGIN = "/login"
CSRF_FIELD, CSRF_HEADER = "csrf", "X-CSRF-Token"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_KEY = secrets.token_bytes(32)
"""Signs tokens of forms; a page that was loaded before a restart has to be loaded again before it changes something."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_LOGIN_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Log in - tracin_ann</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark"></head>
<body><main><h1>Log in</h1>{note}<form method="post" action="{login}">
<label>Token <input name="token" type="password" autocomplete="current-password" autofocus required></label>
<button>Log in</button></form></main></body></html>
"""


def make_csrf(session: str) -> str:
    """Return the token of the forms of a browser session."""
    return hmac.new(_KEY, session.encode(), hashlib.sha256).hexdigest()


def is_valid_csrf(session: str, token: str) -> bool:
    """Return whether a form's token is that of the session, in a time that does not depend on the token."""
    return hmac.compare_digest(make_csrf(session).encode(), token.encode())


class Gate:
    """ASGI middleware that rejects requests that may not be served, and adds headers to all responses.

    It sets `request.state.session`, the identity of a browser, and `request.state.nonce`, of `<style>` elements.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        token = settings.token
        self._cookie = None if token is None else hmac.new(token.encode(), b"tracin_ann login", "sha256").hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        nonce, port = secrets.token_urlsafe(16), (scope.get("server") or ("", 0))[1]
        # Browsers send a cookie to all ports of a host.
        session_name, login_name = f"tracin_session_{port}", f"tracin_login_{port}"
        session = request.cookies.get(session_name)
        cookies: dict[str, str] = {}
        if session is None:
            session = secrets.token_urlsafe(16)
            if not scope["path"].startswith(API):
                cookies[session_name] = session
        request.state.session, request.state.nonce = session, nonce

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Content-Security-Policy", _POLICY.format(nonce=nonce))
                headers.setdefault("Cache-Control", "no-store")
                for name, value in cookies.items():
                    headers.append("Set-Cookie", _make_cookie(name, value))
            await send(message)

        response = self._reject(request, login_name)
        if response is None and self._cookie is not None and scope["path"] == LOGIN:
            response = await self._log_in(request, login_name, cookies)
        if response is not None:
            await response(scope, receive, send_with_headers)
        else:
            await self._run(request, self._limit_body(receive), send_with_headers)

    async def _run(self, request: Request, receive: Receive, send: Send) -> None:
        """Run the application; an unexpected exception is logged, and the response says no more than its type."""
        is_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(request.scope, receive, send_and_note)
        except Exception as error:
            logger.exception("%s %s failed", request.method, request.url.path)
            if is_started:
                raise
            what, remedy = "internal error", "read the log of tracin-serve"
            message = problem(what, got=type(error).__name__, expected="an answer", remedy=remedy)
            response = make_response(request, TracinAnnError(message), status=500)
            await response(request.scope, receive, send)

    def _reject(self, request: Request, login_name: str) -> Response | None:
        """Return the response to a request that may not be served, or None."""
        headers, hosts = request.headers, self._settings.hosts
        host = _find_host(headers.get("host", ""))
        if hosts is not None and host not in hosts:
            expected = " or ".join(sorted(hosts))
            what, remedy = "the request names another host", "open the address that tracin-serve prints"
            return make_response(request, UnknownHostError(problem(what, got=host, expected=expected, remedy=remedy)))
        if not self._has_token(request, login_name) and request.url.path != LOGIN:
            if request.method == "GET" and not request.url.path.startswith(API):
                return RedirectResponse(f"{LOGIN}?next={quote(_requested_address(request))}", HTTPStatus.SEE_OTHER)
            what, expected = "the request has no valid token", "the header Authorization: Bearer TOKEN"
            remedy = "use the token that tracin-serve was started with"
            error = LoginError(problem(what, got="none, or another one", expected=expected, remedy=remedy))
            return make_response(request, error, {"WWW-Authenticate": "Bearer"})
        if not _is_same_site(headers) and not _is_link(request):
            got = headers.get("origin") or headers.get("sec-fetch-site")
            what, remedy = "the request comes from another site", "use the pages of this server"
            return make_response(request, ForbiddenError(problem(what, got=got, expected="this site", remedy=remedy)))
        if _read_length(headers) > self._settings.upload_bytes:
            return make_response(request, self._make_size_error(_read_length(headers)))
        return None

    def _has_token(self, request: Request, login_name: str) -> bool:
        token = self._settings.token
        if token is None or self._cookie is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
        cookie = request.cookies.get(login_name, "")
        return is_bearer or hmac.compare_digest(cookie.encode(), self._cookie.encode())

    async def _log_in(self, request: Request, login_name: str, cookies: dict[str, str]) -> Response:
        """Return the form that asks for the token, or, with the right token, set the cookie and go on."""
        assert self._settings.token is not None and self._cookie is not None
        if request.method != "POST":
            return HTMLResponse(_LOGIN_PAGE.format(note="", login=_login_address(request)))
        given = await _read_token(request)
        if not hmac.compare_digest(given.encode(), self._settings.token.encode()):
            note = '<p role="alert">This is not the token that tracin-serve was started with.</p>'
            page = _LOGIN_PAGE.format(note=note, login=_login_address(request))
            return HTMLResponse(page, HTTPStatus.UNAUTHORIZED)
        cookies[login_name] = self._cookie
        return RedirectResponse(_next_address(request), HTTPStatus.SEE_OTHER)

    def _limit_body(self, receive: Receive) -> Receive:
        """Return `receive` that raises if a body of unknown length becomes too large."""
        n_bytes = 0

        async def receive_limited() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._settings.upload_bytes:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(self._make_size_error(n_bytes)))
            return message

        return receive_limited

    def _make_size_error(self, n_bytes: int) -> TooLargeError:
        most = self._settings.upload_bytes
        return TooLargeError(
            problem(
                "the request is too large",
                got=f"{n_bytes:,} bytes",
                expected=f"at most {most:,} bytes",
                remedy="send less at a time",
            )
        )


_LONGEST_LOGIN = 4096
_MOST_DIGITS = 19


async def _read_token(request: Request) -> str:
    """Return the token of the login form; "" if there is none, or the body is longer than such a form."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST_LOGIN:
            return ""
    return parse_qs(body.decode("latin-1")).get("token", [""])[-1]


def _make_cookie(name: str, value: str) -> str:
    """Return a Set-Cookie header; `value` consists of letters, digits, - and _."""
    return f"{name}={value}; Path=/; HttpOnly; SameSite=Lax"


def _find_host(header: str) -> str:
    """Return the name in a Host header, without the port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _is_same_site(headers: Headers) -> bool:
    """Return whether a request comes from a page of this server, or from no page."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site in ("same-origin", "none")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc == headers.get("host")
    except ValueError:
        return False


def _is_link(request: Request) -> bool:
    """Return whether a request reads and, as far as the browser says, loads a document and not a part of a page."""
    return request.method in _SAFE and request.headers.get("sec-fetch-dest", "document") == "document"


def _read_length(headers: Headers) -> int:
    """Return the length of the body that the headers state; 0 if they state none."""
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdecimal() and len(length) <= _MOST_DIGITS else 0


def _requested_address(request: Request) -> str:
    """Return the path and the query of a request."""
    path = quote(request.url.path, safe="/%")
    return f"{path}?{request.url.query}" if request.url.query else path


def _login_address(request: Request) -> str:
    return f"{LOGIN}?next={quote(_next_address(request))}"


def _next_address(request: Request) -> str:
    """Return the address on this server that the parameter `next` names, or `/`."""
    return own_address(request.query_params.get("next", "/"))


def own_address(address: str) -> str:
    """Return an address if it is a path of this server with a query string, or else `/`."""
    # A browser takes `//host` and `/\\host` as another host, and drops control characters.
    is_own = address.startswith("/") and address[1:2] not in ("/", "\\") and address.isascii() and address.isprintable()
    return address if is_own else "/"
