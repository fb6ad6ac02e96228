"""Tables of the documents from the result files: printed, or written into the documents that are named."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import scale_tables
from benchmarks.attribution import tables as attribution
from benchmarks.distributed import tables as distributed
from benchmarks.features import tables as features
from benchmarks.fidelity import tables as fidelity
from benchmarks.labels import tables as labels
from benchmarks.peers import tables as peers
from benchmarks.reliability import tables as reliability
from benchmarks.retrieval import tables as retrieval
from benchmarks.serving import tables as serving

OUTPUT = "the documents that are named"
TOPICS = (scale_tables, features, distributed, fidelity, attribution, retrieval, reliability, serving, labels, peers)
TABLES: dict[str, Callable[[], str]] = {make.__name__: make for topic in TOPICS for make in topic.TABLES}
"""The functions that make the tables, by the name that documents use: `<!-- table: NAME -->` ... `<!-- end -->`."""

_MARK = re.compile(r"^<!-- (?:table: (?P<name>\S+)|(?P<end>end)) -->$", re.MULTILINE)


def fill_tables(text: str) -> str:
    """Return a document with the current table between each pair of marks.

    Raises:
        ValueError: a mark that names no table, or marks that do not form pairs.
    """
    parts, position, opened = [], 0, None
    for mark in _MARK.finditer(text):
        if mark["name"] is not None and opened is None:
            if mark["name"] not in TABLES:
                raise ValueError(f"unknown table: got {mark['name']!r}, expected one of {', '.join(TABLES)}")
            parts.append(f"{text[position : mark.end()]}\n{TABLES[mark['name']]()}\n")
            opened, position = mark, mark.end()
        elif mark["end"] is not None and opened is not None:
            opened, position = None, mark.start()
        else:
            raise ValueError(f"marks of tables do not form pairs: {mark[0]!r} at character {mark.start()}")
    if opened is not None:
        raise ValueError(f"marks of tables do not form pairs: {opened[0]!r} has no end mark")
    return "".join([*parts, text[position:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", nargs="*", type=Path, help="documents whose tables are filled in place")
    parser.add_argument("--table", choices=list(TABLES), help="print this table only")
    options = parser.parse_args()
    if options.table and options.documents:
        parser.error("--table prints a table; name documents or a table, not both")
    # All documents are read first, so that an error leaves every file unchanged.
    try:
        filled = {path: fill_tables(path.read_text(encoding="utf-8")) for path in options.documents}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path, text in filled.items():
        path.write_text(text, encoding="utf-8")
    if options.table:
        print(TABLES[options.table]())
    elif not options.documents:
        for name, make in TABLES.items():
            print(f"## {name}\n\n{make()}\n")


if __name__ == "__main__":
    main()
