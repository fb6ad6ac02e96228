"""Share of CPU time spent in checksums, for builds and queries of the MNIST CNN."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from unittest import mock

from benchmarks.common.results import write_results
from examples import mnist
from tracin_ann import BuildConfig, InfluenceIndex, build
from tracin_ann.files import durable as files
from tracin_ann.search import construction as fill
from tracin_ann.store import feature_file, manifest
from tracin_ann.task import checkpoints

RESULT = "checksums"
FUNCTIONS = [(module, "file_digest") for module in (files, manifest, checkpoints, fill, feature_file)]
FUNCTIONS += [(feature_file, name) for name in ("checksum", "row_checksums", "block_checksums", "column_checksum")]


@contextmanager
def count_seconds() -> Iterator[Callable[[], float]]:
    """Count the CPU seconds that all threads spend in digests and block checksums."""
    spent, lock = [0.0], Lock()

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start_s = time.thread_time()
            try:
                return function(*args)
            finally:
                with lock:
                    spent[0] += time.thread_time() - start_s

        return run

    patches = [mock.patch.object(module, name, wrap(getattr(module, name))) for module, name in FUNCTIONS]
    for patch in patches:
        patch.start()
    try:
        yield lambda: spent[0]
    finally:
        for patch in patches:
            patch.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="path of mnist.npz")
    parser.add_argument("--rows", type=int, default=20_000, help="training rows")
    parser.add_argument("--queries", type=int, default=100, help="number of queries")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        mnist.train(options.data, folder, options.rows, 0)
        task = mnist.task(options.data, folder, str(options.rows))
        for kind in ("flat", "ivf"):
            config = BuildConfig(dim=1024, index=kind, yardstick=False)
            with count_seconds() as spent:
                start_s = time.process_time()
                build(task, f"{folder}/{kind}", config)
                total = time.process_time() - start_s
                results.append({"what": f"build, {kind}", "cpu_seconds": total, "checksums": spent() / total})
            with count_seconds() as spent:
                start_s = time.process_time()
                InfluenceIndex.open(f"{folder}/{kind}", task).query(range(options.queries))
                total = time.process_time() - start_s
                results.append({"what": f"open and query, {kind}", "cpu_seconds": total, "checksums": spent() / total})
            print(results[-2:], flush=True)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    print(write_results(RESULT, settings, results))


if __name__ == "__main__":
    main()
