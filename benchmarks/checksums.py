"""What checksums cost: CPU seconds in them, of a build of MNIST's CNN and of opening and asking its index."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from unittest import mock

from benchmarks import common
from examples import mnist
from tracin_ann import BuildConfig, InfluenceIndex, build
from tracin_ann.files import durable as files
from tracin_ann.search import construction as fill
from tracin_ann.store import feature_file, manifest
from tracin_ann.task import checkpoints

PLACES = [(module, "file_digest") for module in (files, manifest, checkpoints, fill, feature_file)]
PLACES += [(feature_file, name) for name in ("checksum", "row_checksums", "block_checksums", "column_checksum")]


@contextmanager
def counted() -> Iterator[Callable[[], float]]:
    """Count the CPU seconds, of whatever thread, that digests and block checksums take."""
    spent, lock = [0.0], Lock()

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*given)
            finally:
                with lock:
                    spent[0] += time.thread_time() - began

        return run

    patches = [mock.patch.object(module, name, timed(getattr(module, name))) for module, name in PLACES]
    for patch in patches:
        patch.start()
    try:
        yield lambda: spent[0]
    finally:
        for patch in patches:
            patch.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        mnist.train(options.data, folder, options.rows, 0)
        task = mnist.task(options.data, folder, str(options.rows))
        for kind in ("flat", "ivf"):
            config = BuildConfig(dim=1024, index=kind, yardstick=False)
            with counted() as spent:
                began = time.process_time()
                build(task, f"{folder}/{kind}", config)
                whole = time.process_time() - began
                results.append({"what": f"build, {kind}", "cpu_seconds": whole, "checksums": spent() / whole})
            with counted() as spent:
                began = time.process_time()
                InfluenceIndex.open(f"{folder}/{kind}", task).query(range(options.queries))
                whole = time.process_time() - began
                results.append({"what": f"open and ask, {kind}", "cpu_seconds": whole, "checksums": spent() / whole})
            print(results[-2:], flush=True)
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    print(common.write("checksums", settings, results))


if __name__ == "__main__":
    main()
