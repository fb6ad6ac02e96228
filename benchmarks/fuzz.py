"""Many altered files for every reader (tests/fuzz.py): `make fuzz`, a million by default; what went wrong is listed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

CHUNK = 2000


def chunk(task: tuple[str, int, int]) -> tuple[str, int, list[str]]:
    """Run some cases of one reader over an index of this process's own."""
    import fuzz  # noqa: PLC0415

    global _READERS, _FOLDER  # noqa: PLW0603
    if _READERS is None:
        _FOLDER = tempfile.TemporaryDirectory()
        _READERS = fuzz.made(Path(_FOLDER.name))
    name, start, stop = task
    return name, stop - start, fuzz.failures(name, _READERS[name], range(start, stop))


_READERS = None
_FOLDER = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--readers", nargs="+", default=None)
    options = parser.parse_args()
    from test_fuzz import NAMES  # noqa: PLC0415

    names = options.readers or NAMES
    each = -(-options.cases // len(names))
    work = [(name, at, min(at + CHUNK, each)) for at in range(0, each, CHUNK) for name in names]
    began, wrong = time.perf_counter(), []
    done = dict.fromkeys(names, 0)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for name, cases, found in pool.map(chunk, work):
            done[name] += cases
            wrong += found
            for line in found:
                print(line, flush=True)
    seconds = time.perf_counter() - began
    result = {"cases": done, "all": sum(done.values()), "seconds": seconds, "failures": wrong}
    print(common.write("fuzz", vars(options), [result]), sum(done.values()), len(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
