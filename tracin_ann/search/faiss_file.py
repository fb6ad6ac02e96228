"""Files of FAISS indexes: written with all errors of the disk reported, and read only if their bytes are unchanged.

FAISS does not check the sizes in a file: a damaged one makes it read or write outside its memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracin_ann.device import import_faiss
from tracin_ann.errors import DamagedIndexError, attach_path, problem
from tracin_ann.files import describe_difference, file_digest, report_damage

REMEDY = "rebuild the index"


@dataclass(frozen=True)
class WrittenFile:
    """The size in bytes and the digest of a file of a search index."""

    size: int
    digest: str

    @classmethod
    def measure(cls, path: Path) -> WrittenFile:
        """Return the record of a file just written."""
        return cls(path.stat().st_size, file_digest(path))

    def check(self, path: Path) -> None:
        """Compare a file with its record.

        Raises:
            DamagedIndexError: the file is missing, or is not the one that was written.
        """
        difference = describe_difference(path, self.size, self.digest)
        if difference:
            raise DamagedIndexError(
                problem(f"{path} is damaged", got=difference, expected="the file of a build", remedy=REMEDY)
            )


def write_faiss(path: Path, index: Any) -> WrittenFile:
    """Write a FAISS index to this path; the caller renames and fsyncs."""
    faiss = import_faiss()
    # Not FAISS's own file: it reports no error if the disk is full when the last block is written.
    with attach_path(path), path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    return WrittenFile.measure(path)


def read_faiss(path: Path, written: WrittenFile) -> Any:
    """Return the FAISS index of a file.

    Raises:
        DamagedIndexError: the file is missing, or is not the one that was written.
        OSError: the system has no memory or file descriptors left.
    """
    written.check(path)
    with report_damage(path, "a file written by a build", REMEDY):
        return import_faiss().read_index(str(path))
