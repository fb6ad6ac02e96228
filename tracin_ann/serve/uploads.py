"""Examples that a request brings: texts, records and pictures, which the task's `read_query` turns into examples.

A picture is decoded from bytes of a few known formats, within a number of pixels, and written again as PNG: the task
gets pixels only, and neither metadata nor a file of the client.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tracin_ann.errors import TaskError, first_line, problem
from tracin_ann.packages import import_pillow
from tracin_ann.task import Task, read_query_example, require_read_query

_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


def read_records(task: Task, records: Sequence[Mapping[str, Any]], first: int = 0) -> list[Any]:
    """Return the examples that the task makes from records, such as `{"text": "a fine film"}`.

    Args:
        task: the task.
        records: the records.
        first: the number of the first one in messages.

    Raises:
        UsageError: the task has no `read_query`.
        TaskError: it fails on a record.
    """
    require_read_query(task, "examples")
    return [read_query_example(task, record, f"record {place}") for place, record in enumerate(records, first)]


def read_picture(data: bytes, most_pixels: int) -> Any:
    """Return an uploaded picture as a `PIL.Image.Image`, from its pixels written again as PNG.

    Args:
        data: the bytes of the file.
        most_pixels: the largest number of pixels.

    Raises:
        TaskError: it is not a picture of a known format, is damaged, or has too many pixels.
        MissingPackageError: Pillow is not installed.
    """
    pillow = import_pillow("pictures")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > most_pixels:
                    raise TaskError(
                        problem(
                            "the picture is too large",
                            got=f"{width} x {height} pixels",
                            expected=f"at most {most_pixels:,} pixels",
                            remedy="make it smaller",
                        )
                    )
                image.load()
                plain = image if image.mode in ("1", "L", "LA", "RGB", "RGBA", "I;16") else image.convert("RGBA")
                written = io.BytesIO()
                plain.save(written, "PNG", compress_level=1, pnginfo=None, exif=b"", icc_profile=None)
        again = pillow.open(written, formats=("PNG",))
        again.load()
    except (MemoryError, TaskError):
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError and others, depending on which byte is damaged.
    except Exception as error:
        raise TaskError(
            problem(
                "the picture cannot be read",
                got=type(error).__name__ if isinstance(error, pillow.UnidentifiedImageError) else first_line(error),
                expected=f"a complete picture: {', '.join(_FORMATS)}",
                remedy="send another file",
            )
        ) from error
    return again


def read_picture_example(task: Task, data: bytes, most_pixels: int) -> Any:
    """Return the example that the task makes from an uploaded picture.

    Raises:
        UsageError: the task has no `read_query`.
        TaskError: the picture cannot be read, or the task fails on it.
    """
    require_read_query(task, "examples")
    return read_query_example(task, {"image": read_picture(data, most_pixels)}, "the picture")
