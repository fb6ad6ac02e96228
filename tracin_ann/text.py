"""Text for display: escaped control characters, and formatted durations and sizes."""

from __future__ import annotations

import re

# Control characters (C0, C1), line and paragraph separators, bidirectional controls, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_control(text: str, keep: str = "") -> str:
    r"""Return a text with its control characters escaped, safe to print on a terminal: ESC becomes `\x1b`.

    Args:
        text: any text.
        keep: characters that are not escaped.
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode(), text)


def escape_surrogates(text: str) -> str:
    """Return a text with lone surrogates escaped, so that UTF-8 can encode it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def escape_json(coded: str) -> str:
    """Return JSON text of the same value, with the control characters in its strings replaced by JSON escapes."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", coded)


def format_duration(seconds: float) -> str:
    """Return a duration for display: 41 s, 3 min 20 s, 2 h 5 min."""
    n_seconds = round(seconds)
    if n_seconds < 60:  # noqa: PLR2004
        return f"{n_seconds} s"
    if n_seconds < 3600:  # noqa: PLR2004
        return f"{n_seconds // 60} min {n_seconds % 60} s"
    return f"{n_seconds // 3600} h {n_seconds % 3600 // 60} min"


def format_size(n_bytes: float) -> str:
    """Return a number of bytes for display: 900 bytes, 1.5 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:  # noqa: PLR2004
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
