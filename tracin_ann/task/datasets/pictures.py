"""Folders of pictures as map-style data sets: a sub-folder for each class, decoded when read (`ImageFolder`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tracin_ann.errors import TaskError, first_line, problem
from tracin_ann.packages import import_pillow
from tracin_ann.task.datasets.records import Rows, Transform, check_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageFolder(Rows):
    """The pictures of a folder with one sub-folder per class: rows `(image, class index)`, sorted by path.

    Classes are sorted by name, as in torchvision. Sub-folders of a class are searched too. Names that begin with a dot
    are ignored, and files whose suffix is not that of a picture. A picture is decoded when its row is read.

    Args:
        path: of the folder.
        transform: `(image, class index)` -> example; None: the pair.
        mode: the images' mode in Pillow, such as `RGB` or `L`; None: that of the file.

    Attributes:
        classes: names of the sub-folders.
        paths: of the pictures, by row.
        labels: class indices, by row.

    Raises:
        TaskError: the folder is missing or has no pictures in sub-folders; when a row is read: a picture is damaged.
        MissingPackageError: Pillow is not installed.
    """

    def __init__(
        self, path: str | os.PathLike[str], transform: Transform | None = None, *, mode: str | None = "RGB"
    ) -> None:
        super().__init__(transform)
        import_pillow("pictures")
        folder, self._mode = Path(path), mode
        if not folder.is_dir():
            got = "a file" if folder.exists() else "no such folder"
            raise TaskError(
                problem(f"{folder} cannot be read", got=got, expected="a folder", remedy="correct the path")
            )
        self.classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and each.name[:1] != ".")
        found = [(file, label) for label, name in enumerate(self.classes) for file in _find_pictures(folder / name)]
        if not found:
            raise TaskError(
                problem(
                    f"{folder} has no pictures",
                    got=f"{len(self.classes)} sub-folders without a picture" if self.classes else "no sub-folder",
                    expected=f"a sub-folder for each class, with files such as {', '.join(IMAGE_SUFFIXES[:2])}",
                    remedy="correct the path, or move the pictures into a sub-folder for each class",
                )
            )
        self.paths, self.labels = [file for file, _ in found], [label for _, label in found]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.paths)

    def read(self, row: int) -> tuple[Any, int]:
        """Return an image and its class index.

        Raises:
            TaskError: the picture is missing or damaged.
        """
        return read_image(self.paths[row], self._mode), self.labels[row]


def _find_pictures(folder: Path) -> Iterator[Path]:
    """Yield the pictures below a folder, sorted by path; links are followed, except to a folder that was searched."""
    searched: set[str] = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        searched.add(os.path.realpath(directory))
        folders[:] = sorted(
            name for name in folders if name[:1] != "." and os.path.realpath(Path(directory, name)) not in searched
        )
        yield from (Path(directory, name) for name in sorted(files) if name[:1] != "." and is_image_file(name))


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a picture, by its suffix."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: Path, mode: str | None = None) -> Any:
    """Return a picture as a `PIL.Image.Image`, decoded, in the given mode or that of the file.

    Raises:
        TaskError: it is missing, or is not a picture, or is damaged.
        MissingPackageError: Pillow is not installed.
    """
    check_file(path)
    return decode_image(path, path, mode)


def decode_image(source: Any, name: object, mode: str | None = None) -> Any:
    """Return the picture in a file, given by its path or open; `name` is for the message."""
    pillow = import_pillow("pictures")
    try:
        with pillow.open(source) as image:
            image.load()
            return image.copy() if mode in (None, image.mode) else image.convert(mode)
    except MemoryError:
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError and others, depending on which byte is damaged.
    except Exception as error:
        raise TaskError(
            problem(
                f"the picture {name} cannot be read",
                got=first_line(error),
                expected="a complete picture of a format that Pillow reads",
                remedy="write the file again, or leave it out",
            )
        ) from error


def turn_upright(image: Any) -> Any:
    """Return an image rotated and mirrored as its EXIF data say; without such data, the image itself."""
    return import_pillow("pictures", "ImageOps").exif_transpose(image)
