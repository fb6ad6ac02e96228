"""Who may connect, and what a browser may do with the pages: hosts, token, cross-site requests, headers.

A server on a loopback address serves everybody on the machine. A page of another site cannot use it: the Host header
has to be one of the server's names, against DNS rebinding, and a request that changes something has to come from the
server's own pages, by `Sec-Fetch-Site` or `Origin`. With a token, a client presents it as `Authorization: Bearer`, or
logs in once, which sets a cookie.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

CSRF_FIELD, CSRF_HEADER = "csrf", "X-CSRF-Token"
_KEY = secrets.token_bytes(32)
"""Signs tokens of forms; a page that was loaded before a restart has to be loaded again before it changes something."""


def make_csrf(session: str) -> str:
    """Return the token of the forms of a browser session."""
    return hmac.new(_KEY, session.encode(), hashlib.sha256).hexdigest()


def is_valid_csrf(session: str, token: str) -> bool:
    """Return whether a form's token is that of the session, in a time that does not depend on the token."""
    return hmac.compare_digest(make_csrf(session).encode(), token.encode())
