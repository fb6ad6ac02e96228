"""Text as people read it: control characters made visible, durations and sizes."""

from __future__ import annotations

import re

# Control characters (C0, C1), line and paragraph separators, what reverses the order of text, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_control(text: str, keep: str = "") -> str:
    r"""Return a text in one line that changes no terminal and reorders nothing: ESC becomes `\x1b`.

    Args:
        text: any text.
        keep: characters that stay as they are.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text)


def escape_surrogates(text: str) -> str:
    """Return a text that UTF-8 can encode: lone surrogates become escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def escape_json(coded: str) -> str:
    """Return JSON of the same value, in which unsafe characters of its texts are JSON's own escapes."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", coded)


def format_duration(seconds: float) -> str:
    """Return seconds as people read them: 41 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004
        return f"{whole} s"
    if whole < 3600:  # noqa: PLR2004
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_size(n_bytes: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:  # noqa: PLR2004
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
