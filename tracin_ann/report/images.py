"""The images of a page: PNG by Pillow, each distinct image once in the file, as the background of a CSS class.

With a class, a row that is a hit of many queries is embedded once, and pages open and print without a script.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tracin_ann.packages import import_pillow

EDGE = 160
"""Pixels of an image's longer edge; larger images are scaled down."""
SMALLEST_EDGE = 24
BUDGET = 36 << 20
"""Bytes of base64 of all images of a page; beyond it, images are scaled down further."""
_CHANNELS = (1, 3)
_LEVELS = 255

_logger = logging.getLogger(__name__)
Pixels = npt.NDArray[np.uint8]


class Images(Protocol):
    """The images of pages."""

    def add(self, image: Any) -> str:
        """Return the name by which templates show an image.

        Raises:
            ValueError: it does not have the shape of an image, or contains NaN or infinity.
            MissingPackageError: Pillow is not installed.
        """


class PageImages:
    """The distinct images of one page, named by their CSS classes."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._png: dict[bytes, bytes] = {}
        self._names: dict[bytes, str] = {}
        self._budget = budget
        self.note = ""

    def __len__(self) -> int:
        """Return the number of distinct images."""
        return len(self._png)

    def add(self, image: Any) -> str:
        """Return the CSS class of an image.

        Raises:
            ValueError: it does not have the shape of an image, or contains NaN or infinity.
            MissingPackageError: Pillow is not installed.
        """
        pixels = to_pixels(image)
        digest = digest_pixels(pixels)
        if digest not in self._names:
            self._png[digest] = encode_pixels(pixels)
            self._names[digest] = f"p{len(self._names)}"
        return self._names[digest]

    def css(self) -> str:
        """Return a CSS rule for each image; all are scaled down if they take more than the budget.

        `note` then informs readers of the page.
        """
        edge, coded = EDGE, self._png
        while sum(map(len, coded.values())) * 4 / 3 > self._budget and edge > SMALLEST_EDGE:
            edge = max(SMALLEST_EDGE, edge * 3 // 4)
            coded = {digest: _shrink(png, edge) for digest, png in self._png.items()}
            self.note = (
                f"Images are scaled to at most {edge} pixels to limit the size of this file ({len(self):,} images)."
            )
        if self.note:
            _logger.warning("report: %s", self.note)
        rules = (
            f".{self._names[digest]}{{background-image:url(data:image/png;base64,{base64.b64encode(png).decode()})}}"
            for digest, png in coded.items()
        )
        return "\n".join(rules)


def to_pixels(image: Any) -> Pixels:
    """Return an image as uint8, H×W or H×W×3, from an array or tensor H×W, 1×H×W, 3×H×W, H×W×1 or H×W×3.

    Integers from 0 to 255 are levels. Other values from 0 to 1 are scaled by 255; all others are scaled from the range
    of the image.

    Raises:
        ValueError: it has another shape, is empty, or contains NaN or infinity.
    """
    array = _to_array(image)
    if array.ndim == 3 and array.shape[0] in _CHANNELS:  # noqa: PLR2004
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:  # noqa: PLR2004
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS) or not array.size:  # noqa: PLR2004
        raise ValueError(f"an image of shape {' x '.join(map(str, np.shape(array)))}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("an image with NaN or infinity")
    low, high = float(values.min()), float(values.max())
    if array.dtype.kind in "iu" and low >= 0 and 1 < high <= _LEVELS:
        scaled = values
    elif low >= 0 and high <= 1:
        scaled = values * _LEVELS
    else:
        scaled = (values - low) / (high - low or 1.0) * _LEVELS
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8))


def _to_array(image: Any) -> npt.NDArray[Any]:
    # A tensor may be on an accelerator, require a gradient, or have a dtype that NumPy does not support.
    detached = getattr(image, "detach", None)
    if detached is None:
        return np.asarray(image)
    tensor = detached().cpu()
    return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)


def digest_pixels(pixels: Pixels) -> bytes:
    """Return the digest that identifies pixels, 16 bytes."""
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()


def encode_pixels(pixels: Pixels, edge: int = EDGE) -> bytes:
    """Return pixels as PNG, scaled down if the longer edge is longer than `edge` pixels.

    Raises:
        MissingPackageError: Pillow is not installed.
    """
    return _encode(import_pillow("images in reports").fromarray(pixels), edge)


def _shrink(png: bytes, edge: int) -> bytes:
    return _encode(import_pillow("images in reports").open(io.BytesIO(png)), edge)


def _encode(image: Any, edge: int) -> bytes:
    if max(image.size) > edge:
        image.thumbnail((edge, edge))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
