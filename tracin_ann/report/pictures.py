"""Pictures of a page: PNG by Pillow, each distinct one once in the file, as a CSS class that any element can wear.

A class keeps a row that is the hit of a hundred queries from being embedded a hundred times, and needs no script, so
that pages print and open without one.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from tracin_ann.errors import MissingPackageError, problem

EDGE = 160
"""Pixels of a picture's longer edge at most; larger ones are scaled down."""
SMALLEST_EDGE = 24
BUDGET = 36 << 20
"""Bytes of base64 that all pictures of a page may take before they are scaled down further."""
_CHANNELS = (1, 3)
_LEVELS = 255

_logger = logging.getLogger(__name__)
Pixels = npt.NDArray[np.uint8]


class Pictures:
    """The distinct pictures of one page."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._png: dict[bytes, bytes] = {}
        self._names: dict[bytes, str] = {}
        self._budget = budget
        self.note = ""

    def __len__(self) -> int:
        """Return how many distinct pictures there are."""
        return len(self._png)

    def add(self, image: Any) -> str:
        """Return the CSS class of a picture.

        Raises:
            ValueError: it has no picture's shape, or holds NaN or infinity.
            MissingPackageError: Pillow is not installed.
        """
        pixels = as_pixels(image)
        digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()
        if digest not in self._names:
            self._png[digest] = _png(pixels, EDGE)
            self._names[digest] = f"p{len(self._names)}"
        return self._names[digest]

    def css(self) -> str:
        """Return a rule for each picture; where they take more than the budget, all in smaller pictures.

        What that does is in `note`, for people.
        """
        edge, coded = EDGE, self._png
        while sum(map(len, coded.values())) * 4 / 3 > self._budget and edge > SMALLEST_EDGE:
            edge = max(SMALLEST_EDGE, edge * 3 // 4)
            coded = {digest: _smaller(png, edge) for digest, png in self._png.items()}
            self.note = f"Pictures are scaled to {edge} pixels or fewer, so that the {len(self):,} of them stay small."
        if self.note:
            _logger.warning("report: %s", self.note)
        rules = (
            f".{self._names[digest]}{{background-image:url(data:image/png;base64,{base64.b64encode(png).decode()})}}"
            for digest, png in coded.items()
        )
        return "\n".join(rules)


def as_pixels(image: Any) -> Pixels:
    """Return a picture as uint8, H×W or H×W×3, from H×W, 1×H×W, 3×H×W, H×W×1 or H×W×3, array or tensor.

    Whole numbers from 0 to 255 are levels; a picture of other numbers in 0 to 1 is scaled from there, and any other
    from its own least and largest value.

    Raises:
        ValueError: it has another shape, is empty, or holds NaN or infinity.
    """
    array = _array(image)
    if array.ndim == 3 and array.shape[0] in _CHANNELS:  # noqa: PLR2004
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:  # noqa: PLR2004
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS) or not array.size:  # noqa: PLR2004
        raise ValueError(f"a picture of shape {' x '.join(map(str, np.shape(array)))}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a picture with NaN or infinity in it")
    low, high = float(values.min()), float(values.max())
    if array.dtype.kind in "iu" and low >= 0 and 1 < high <= _LEVELS:
        scaled = values
    elif low >= 0 and high <= 1:
        scaled = values * _LEVELS
    else:
        scaled = (values - low) / (high - low or 1.0) * _LEVELS
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8))


def _array(image: Any) -> npt.NDArray[Any]:
    # A tensor may be on an accelerator, need a gradient, or be of a kind that NumPy does not know.
    detached = getattr(image, "detach", None)
    if detached is None:
        return np.asarray(image)
    tensor = detached().cpu()
    return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)


def _png(pixels: Pixels, edge: int) -> bytes:
    return _encoded(_pillow().fromarray(pixels), edge)


def _smaller(png: bytes, edge: int) -> bytes:
    return _encoded(_pillow().open(io.BytesIO(png)), edge)


def _encoded(picture: Any, edge: int) -> bytes:
    if max(picture.size) > edge:
        picture.thumbnail((edge, edge))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _pillow() -> Any:
    try:
        from PIL import Image  # noqa: PLC0415 - optional package, imported only here
    except ImportError as error:
        raise MissingPackageError(
            problem(
                "Pillow is not installed",
                got="no module PIL",
                expected="it, for pictures in reports",
                remedy="pip install 'tracin-ann[report]'",
            )
        ) from error
    return Image
