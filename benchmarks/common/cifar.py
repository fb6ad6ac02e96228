"""Images and labels of CIFAR-10, from the public download or from JPEGs in one file."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np


def read_cifar(data: Path, side: str) -> tuple[Callable[[int], np.ndarray], np.ndarray]:
    """Return a function that reads image i (uint8 [32, 32, 3]) and the labels, from cifar-10-batches-py or JPEGs."""
    folder = data / "cifar-10-batches-py"
    if folder.is_dir():
        names = [f"data_batch_{i}" for i in range(1, 6)] if side == "train" else ["test_batch"]
        parts = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        pixels = np.concatenate([p[b"data"] for p in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return lambda i: pixels[i], np.concatenate([p[b"labels"] for p in parts]).astype(np.int64)
    try:
        from PIL import Image  # noqa: PLC0415
    except ImportError as error:
        raise SystemExit("cifar10_jpeg.npz needs Pillow: pip install pillow") from error
    with np.load(data / "cifar10_jpeg.npz") as arrays:
        jpeg, offsets = arrays[f"jpeg_{side}"], arrays[f"offsets_{side}"]
        labels = arrays[f"y_{side}"].astype(np.int64)

    def read_image(i: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB"))

    return read_image, labels
