"""Reading of randomly altered files by every reader of the file formats.

`make fuzz` runs it with a million cases. The failures are listed; the status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common.paths import add_tests_to_path
from benchmarks.common.results import write_results

add_tests_to_path()

RESULT = "fuzz"
CHUNK = 2000


def run_chunk(task: tuple[str, int, int]) -> tuple[str, int, list[str]]:
    """Run some cases of one reader on an index that belongs to this process."""
    import fuzz  # noqa: PLC0415

    global _READERS, _FOLDER  # noqa: PLW0603
    if _READERS is None:
        _FOLDER = tempfile.TemporaryDirectory()
        _READERS = fuzz.build_readers(Path(_FOLDER.name))
    name, start, stop = task
    return name, stop - start, fuzz.find_failures(name, _READERS[name], range(start, stop))


_READERS = None
_FOLDER = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000, help="number of altered files")
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    parser.add_argument("--readers", nargs="+", default=None, help="readers to test; by default all")
    options = parser.parse_args()
    from test_fuzz import NAMES  # noqa: PLC0415

    names = options.readers or NAMES
    each = -(-options.cases // len(names))
    work = [(name, at, min(at + CHUNK, each)) for at in range(0, each, CHUNK) for name in names]
    start_s, wrong = time.perf_counter(), []
    done = dict.fromkeys(names, 0)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for name, cases, found in pool.map(run_chunk, work):
            done[name] += cases
            wrong += found
            for line in found:
                print(line, flush=True)
    seconds = time.perf_counter() - start_s
    result = {"cases": done, "all": sum(done.values()), "seconds": seconds, "failures": wrong}
    print(write_results(RESULT, vars(options), [result]), sum(done.values()), len(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
