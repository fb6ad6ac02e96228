"""The digest of a file covers all of its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from tracin_ann.files import file_digest


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 7])
def test_digest_is_xxh3_128_of_all_bytes(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    assert file_digest(tmp_path / "a") == xxhash.xxh3_128_hexdigest(data)
