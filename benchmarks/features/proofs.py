"""CPU time of the correctness checks in a build of the MNIST CNN: proofs, batch checks and the audit.

A proof is a call of `GradientEngine.choose_methods`, which verifies gradients against autograd. A batch check runs a
second backward pass with weighted losses, in a few batches. The audit recomputes some stored rows one at a time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.common.results import report_results
from examples import mnist
from tracin_ann import BuildConfig, build
from tracin_ann.features.audit import Auditor
from tracin_ann.gradients.capture import LayerCapture
from tracin_ann.gradients.engine import GradientEngine

RESULT = "proofs"
METHODS = {
    "proofs": (GradientEngine, "choose_methods"),
    "checks": (LayerCapture, "_run_weighted_backward"),
    "audit": (Auditor, "audit"),
}


class Stopwatch:
    """CPU seconds that the calling thread spends in methods; nested calls count once, for the outer method."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(METHODS, 0.0)
        self._inside = False

    def watch(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside, start_s = True, time.thread_time()
            try:
                return method(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[name] += time.thread_time() - start_s

        return run


def measure_build(options: argparse.Namespace) -> dict[str, Any]:
    """Train the CNN, build its index, and return the CPU seconds of each check."""
    stopwatch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        mnist.train(options.data, folder, options.rows, 0)
        task = mnist.task(options.data, folder, str(options.rows))
        for name, (owner, method) in METHODS.items():
            patches.enter_context(mock.patch.object(owner, method, stopwatch.watch(name, getattr(owner, method))))
        start_s = time.process_time()
        report = build(task, Path(folder) / "index", BuildConfig(dim=options.dim))
        total = time.process_time() - start_s
    return {
        "rows": options.rows,
        "checkpoints": len(task.checkpoints),
        "batch_size": report.manifest.build.batch_size,
        "build_cpu_s": total,
        **{f"{name}_cpu_s": seconds for name, seconds in stopwatch.seconds.items()},
        "share": sum(stopwatch.seconds.values()) / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="path of mnist.npz")
    parser.add_argument("--rows", type=int, default=60_000, help="training rows")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(1)  # all computation runs in the calling thread
    report_results(RESULT, {"rows": options.rows, "dim": options.dim, "threads": 1}, [measure_build(options)])


if __name__ == "__main__":
    main()
