"""Texts made safe to show and to write: control characters and lone surrogates become escapes."""

from __future__ import annotations

import re

# Control characters (C0, C1), line and paragraph separators, what reverses the order of text, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    r"""Return a text in one line that changes no terminal and reorders nothing: ESC becomes `\x1b`.

    Args:
        text: any text.
        keep: characters that stay as they are.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text)


def encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: lone surrogates become escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def json_escaped(coded: str) -> str:
    """Return JSON of the same value, in which unsafe characters of its texts are JSON's own escapes."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", coded)
