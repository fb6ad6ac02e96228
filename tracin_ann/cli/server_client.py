"""Requests to the JSON API of a running `tracin-serve`; its errors are raised as those of the library."""

from __future__ import annotations

import ipaddress
import json
import re
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from uuid import uuid4

from tracin_ann import errors
from tracin_ann.errors import TracinAnnError, UsageError, problem

Json = dict[str, Any]
_API = "/api/v1"
_SECONDS = 600
_LONGEST_QUERY = 60_000
"""Servers allow 64 KiB or more for the address and the headers of a request."""
_TOKEN = re.compile(r"[!-~]+")
_PARTS = ("what", "got", "expected", "remedy")
_REMEDY = "correct the address, or install the same version of tracin_ann here and there"


class _RejectRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirection an error: the server that it names must not get the token."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Return no request to follow."""


@dataclass(frozen=True)
class ServerClient:
    """A running `tracin-serve`.

    Attributes:
        address: such as `http://127.0.0.1:8321`.
        token: what it wants clients to present; None: nothing.

    All methods raise the server's error, with its type, or TracinAnnError if the server cannot be reached, does not
    reply within ten minutes, or replies something else.
    """

    address: str
    token: str | None = None

    def __post_init__(self) -> None:
        """Check address and token.

        Raises:
            UsageError: one of them is malformed; the message has no secret.
        """
        expected, remedy = "http://HOST:PORT", "correct the address"
        parts = urlsplit(self.address)
        if "@" in parts.netloc:
            what = "bad address of a server"
            raise UsageError(problem(what, got="a user name in it", expected=expected, remedy="use --token"))
        try:
            # Other values of the port would be taken modulo 65,536.
            is_valid = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
        except ValueError:
            is_valid = False
        if not is_valid:
            raise UsageError(problem("bad address of a server", got=self.address, expected=expected, remedy=remedy))
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            what, got = "bad --token", "a character that a header cannot have"
            raise UsageError(problem(what, got=got, expected="printable ASCII without spaces", remedy="correct it"))

    def get(self, path: str, parameters: Mapping[str, Any] | None = None) -> Json:
        """Return the reply to a request without a body; parameters that are None are left out.

        Raises:
            UsageError: the parameters are too long for an address, or are not UTF-8.
        """
        return self._send(path, parameters or {}, None, "application/json")

    def post(self, path: str, parameters: Mapping[str, Any], content: Json) -> Json:
        """Return the reply to a request with a JSON body; its fields that are None are left out."""
        return self._send(path, parameters, json.dumps(_drop_missing(content)).encode(), "application/json")

    def upload(self, path: str, parameters: Mapping[str, Any], picture: bytes) -> Json:
        """Return the reply to a request with a picture."""
        border = uuid4().hex.encode()
        head = b'Content-Disposition: form-data; name="picture"; filename="picture"\r\n\r\n'
        body = b"".join([b"--", border, b"\r\n", head, picture, b"\r\n--", border, b"--\r\n"])
        return self._send(path, parameters, body, f"multipart/form-data; boundary={border.decode()}")

    @contextmanager
    def check_reply(self) -> Iterator[None]:
        """Report a reply that cannot be read in the block.

        Raises:
            TracinAnnError: the reply is not that of a `tracin-serve` of this version.
        """
        try:
            yield
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            what, got = f"{self.address} does not reply as expected", errors.first_line(error)
            raise TracinAnnError(problem(what, got=got, expected="a tracin-serve", remedy=_REMEDY)) from error

    def _send(self, path: str, parameters: Mapping[str, Any], body: bytes | None, kind: str) -> Json:
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        query = _encode_query(parameters)
        request = urllib.request.Request(f"{self.address.rstrip('/')}{_API}/{path}{query}", body, headers)
        handlers: list[Any] = [_RejectRedirects]
        if is_loopback(urlsplit(self.address).hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=_SECONDS) as response:
                content = response.read()
        except HTTPError as error:
            with error:
                raise self._read_error(error) from error
        except (OSError, HTTPException, ValueError) as error:
            raise self._make_connection_error(getattr(error, "reason", None) or error) from error
        with self.check_reply():
            return _require_object(json.loads(content))

    def _make_connection_error(self, reason: object) -> TracinAnnError:
        if isinstance(reason, TimeoutError):
            got, remedy = f"nothing for {_SECONDS} s", "ask again when the server has less to do"
            return TracinAnnError(problem(f"{self.address} does not reply", got=got, expected="a reply", remedy=remedy))
        got = errors.first_line(reason) if isinstance(reason, Exception) else str(reason)
        expected, remedy = "a running tracin-serve", "start it (tracin-serve DIR), or correct the address"
        return TracinAnnError(problem(f"cannot reach {self.address}", got=got, expected=expected, remedy=remedy))

    def _read_error(self, error: HTTPError) -> TracinAnnError:
        """Return the error that a response describes."""
        with self.check_reply():
            status = f"status {error.code}"
            try:
                content = _require_object(_require_object(json.loads(error.read()))["error"])
                parts = {name: str(content[name]) for name in _PARTS}
                kind = str(content["type"])
            except (OSError, HTTPException, KeyError, TypeError, ValueError) as other:
                raise ValueError(status) from other
        found = getattr(errors, kind, None)
        raised = found if isinstance(found, type) and issubclass(found, TracinAnnError) else TracinAnnError
        return raised(problem(**parts) if parts["got"] else parts["what"])


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _encode_query(parameters: Mapping[str, Any]) -> str:
    """Return the query of an address, with its question mark; "" without parameters.

    Raises:
        UsageError: it is too long, or a text is not UTF-8.
    """
    try:
        query = urlencode(_drop_missing(parameters), doseq=True)
    except UnicodeEncodeError as error:
        what, got = "an option is not UTF-8 text", ascii(error.object[error.start : error.end])
        raise UsageError(problem(what, got=got, expected="UTF-8", remedy="correct it")) from error
    if len(query) > _LONGEST_QUERY:
        got, expected = f"{len(query):,} bytes", f"at most {_LONGEST_QUERY:,}"
        remedy = "name fewer rows, select them by --where, or name the directory of the index"
        raise UsageError(problem("the options are too long for a request", got=got, expected=expected, remedy=remedy))
    return f"?{query}" if query else ""


def _require_object(content: Any) -> Json:
    """Return the content of a JSON object.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(content, dict):
        raise TypeError(f"a JSON {type(content).__name__}")
    return content


def _drop_missing(fields: Mapping[str, Any]) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
