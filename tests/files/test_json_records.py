"""JSON files are read back unchanged; a file that is not a JSON object is reported as damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracin_ann.errors import DamagedIndexError
from tracin_ann.files import read_json, write_json_atomic


def test_json_is_read_back_unchanged(tmp_path: Path) -> None:
    value = {"name": "Grüße", "list": [1, 2.5, None], "nested": {"a": True}}
    write_json_atomic(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_rejects_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "no file"),
        (b"{", "invalid JSON"),
        (b"", "invalid JSON"),
        (b"\xff\xfe", "invalid JSON"),
        (b"[1]", "a JSON list"),
    ],
)
def test_invalid_json_is_reported_as_damaged(tmp_path: Path, data: bytes | None, says: str) -> None:
    path = tmp_path / "a.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DamagedIndexError, match=rf"a\.json: got {says}.*expected a JSON.*; "):
        read_json(path)


def test_too_deeply_nested_json_is_reported_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    with pytest.raises(DamagedIndexError, match="expected a JSON object"):
        read_json(path)
