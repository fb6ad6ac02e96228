"""What being right costs: CPU seconds in proofs, checks of batches and the audit, of a build of MNIST's CNN.

A proof is all of `GradientEngine.prove`, of which earlier versions had the larger part. A check is one more backward of
weighted losses, in a few batches; an audit recomputes stored rows one at a time.
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

from benchmarks import common
from examples import mnist
from tracin_ann import BuildConfig, build
from tracin_ann.features.audit import Auditor
from tracin_ann.gradients.capture import LayerCapture
from tracin_ann.gradients.engine import GradientEngine

PLACES = {
    "proofs": (GradientEngine, "prove"),
    "checks": (LayerCapture, "_weighted_backward"),
    "audit": (Auditor, "audit"),
}


class Stopwatch:
    """CPU seconds of the calling thread in methods; calls within other watched methods are not counted twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PLACES, 0.0)
        self._inside = False

    def watch(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            if self._inside:
                return method(*given, **named)
            self._inside, began = True, time.thread_time()
            try:
                return method(*given, **named)
            finally:
                self._inside = False
                self.seconds[name] += time.thread_time() - began

        return run


def measured(options: argparse.Namespace) -> dict[str, Any]:
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patched:
        mnist.train(options.data, folder, options.rows, 0)
        task = mnist.task(options.data, folder, str(options.rows))
        for name, (owner, method) in PLACES.items():
            patched.enter_context(mock.patch.object(owner, method, watch.watch(name, getattr(owner, method))))
        began = time.process_time()
        report = build(task, Path(folder) / "index", BuildConfig(dim=options.dim))
        total = time.process_time() - began
    return {
        "rows": options.rows,
        "checkpoints": len(task.checkpoints),
        "batch_size": report.manifest.build.batch_size,
        "build_cpu_s": total,
        **{f"{name}_cpu_s": seconds for name, seconds in watch.seconds.items()},
        "share": sum(watch.seconds.values()) / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the calling thread does all the arithmetic
    common.reported("proofs", {"rows": options.rows, "dim": options.dim, "threads": 1}, [measured(options)])


if __name__ == "__main__":
    main()
