"""The images of the pages: PNG at an address that is the digest of its pixels, in a cache of bounded size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from tracin_ann.report import digest_pixels, encode_pixels, to_pixels

BUDGET = 64 << 20
"""Bytes of the PNG files in memory."""


class LinkedImages:
    """Images by their addresses; the oldest are removed beyond the budget, until a page shows them again."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._budget, self._size = budget, 0
        self._png: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, image: Any) -> str:
        """Return the address of an image.

        Raises:
            ValueError: it does not have the shape of an image, or contains NaN or infinity.
            MissingPackageError: Pillow is not installed.
        """
        pixels = to_pixels(image)
        name = digest_pixels(pixels).hex()
        if self.find(name) is None:
            png = encode_pixels(pixels)
            with self._lock:
                self._size += len(png) - len(self._png.get(name, b""))
                self._png[name] = png
                while self._size > self._budget and len(self._png) > 1:
                    self._size -= len(self._png.popitem(last=False)[1])
        return f"/images/{name}.png"

    def find(self, name: str) -> bytes | None:
        """Return the PNG file of a digest, or None if it is not in the cache."""
        with self._lock:
            if name in self._png:
                self._png.move_to_end(name)
            return self._png.get(name)
