"""Requests to the JSON API of a running `tracin-serve`; its errors are raised as those of the library."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from uuid import uuid4

from tracin_ann import errors
from tracin_ann.errors import TracinAnnError, UsageError, problem

Json = dict[str, Any]
_API = "/api/v1"
_SECONDS = 600
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

    def get(self, path: str, parameters: Mapping[str, Any] | None = None) -> Json:
        """Return the reply to a request without a body; parameters that are None are left out."""
        return self._send(path, parameters or {}, None, "application/json")

    def post(self, path: str, content: Json) -> Json:
        """Return the reply to a request with a JSON body; its fields that are None are left out.

        Raises:
            UsageError: JSON cannot represent a value.
        """
        try:
            body = json.dumps(_drop_missing(content)).encode()
        except TypeError as error:
            expected, remedy = "text, numbers, lists and null", "convert the values, or name the directory of the index"
            raise UsageError(problem("a record has no JSON", got=error, expected=expected, remedy=remedy)) from error
        return self._send(path, {}, body, "application/json")

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
        except (KeyError, TypeError, ValueError) as error:
            what, got = f"{self.address} does not reply as expected", errors.first_line(error)
            raise TracinAnnError(problem(what, got=got, expected="a tracin-serve", remedy=_REMEDY)) from error

    def _send(self, path: str, parameters: Mapping[str, Any], body: bytes | None, kind: str) -> Json:
        query = urlencode(_drop_missing(parameters), doseq=True)
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        try:
            address = f"{self.address.rstrip('/')}{_API}/{path}" + (f"?{query}" if query else "")
            request = urllib.request.Request(address, body, headers)
            with urllib.request.build_opener(_RejectRedirects).open(request, timeout=_SECONDS) as response:
                content = response.read()
        except HTTPError as error:
            with error:
                raise self._read_error(error) from error
        except (OSError, HTTPException, ValueError) as error:
            # The address, among others, can be malformed.
            got, expected = getattr(error, "reason", None) or errors.first_line(error), "a running tracin-serve"
            what, remedy = f"cannot reach {self.address}", "start it (tracin-serve DIR), or correct the address"
            raise TracinAnnError(problem(what, got=got, expected=expected, remedy=remedy)) from error
        with self.check_reply():
            return _require_object(json.loads(content))

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
