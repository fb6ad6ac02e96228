"""Time per row of a complete build, compared with batched forward and backward of the same model.

The time per row is the difference between builds of two sizes, which excludes the fixed costs: start, probes and
proofs. The estimate of fidelity at the end of a build is off: its cost does not grow with the rows.
Rounds (large build, small build, plain step) are interleaved in one process; the medians are reported. A build on a CPU
uses the channels-last format for images; the plain step is timed in both formats.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.common import models
from benchmarks.common.plain_step import CPU, time_plain_step
from benchmarks.common.results import report_results
from tracin_ann import BuildConfig, build
from tracin_ann.device import resolve_device

RESULT = "features"


def time_build(name: str, n_rows: int, config: BuildConfig) -> float:
    """Return the seconds of a complete build."""
    with tempfile.TemporaryDirectory() as folder:
        task = models.make_task(name, folder, n_rows)
        start_s = time.perf_counter()
        build(task, Path(folder) / "index", config)
        return time.perf_counter() - start_s


def measure_model(name: str, options: argparse.Namespace) -> dict[str, float | str | int]:
    model, device = models.ALL_MODELS[name], resolve_device(options.device)
    size = options.batch_size or model.batch_size
    with tempfile.TemporaryDirectory() as folder:
        step = time_plain_step(model, models.make_task(name, folder, 8 * size).train_data(), size, device=device)
    batches = max(4, round(options.seconds / step / size))
    small, large = size * max(1, batches // 4), size * (batches + max(1, batches // 4))
    with tempfile.TemporaryDirectory() as folder:
        rows = models.make_task(name, folder, large - small).train_data()
    config = BuildConfig(
        dim=options.dim, batch_size=size, sketch=options.sketch, device=options.device, yardstick=False
    )
    has_images = any(p.dim() == 4 for p in model.make().parameters())  # noqa: PLR2004
    build_s, plain_s, channels_last_s = [], [], []
    for round_ in range(options.rounds + 1):
        difference = (time_build(name, large, config) - time_build(name, small, config)) / (large - small)
        step = time_plain_step(model, rows, size, device=device)
        step_last = time_plain_step(model, rows, size, channels_last=True, device=device) if has_images else step
        if round_:  # the first round is a warm-up
            build_s.append(difference)
            plain_s.append(step)
            channels_last_s.append(step_last)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.make().parameters()),
        "batch_size": size,
        "row_us": median(build_s) * 1e6,
        "plain_us": median(plain_s) * 1e6,
        "ratio": median(p / o for p, o in zip(plain_s, build_s, strict=True)),
        "rounds_ratio": [p / o for p, o in zip(plain_s, build_s, strict=True)],
        "plain_channels_last_us": median(channels_last_s) * 1e6,
        "ratio_to_channels_last": median(p / o for p, o in zip(channels_last_s, build_s, strict=True)),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=list(models.MODELS), choices=list(models.ALL_MODELS), help="models to measure"
    )
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--sketch", default="factored", help="sketch of the build")
    parser.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="seconds of plain steps that correspond to the difference between the two builds",
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument(
        "--device",
        default="cpu",
        help="device of builds and plain steps; with a GPU the result file is features_gpu.json",
    )
    parser.add_argument(
        "--batch-size", type=int, help="batch size of builds and plain steps; by default each model has its own"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = (measure_model(name, options) for name in options.models)
    device = resolve_device(options.device)
    report_results(RESULT if device == CPU else "features_gpu", vars(options), results, device)


if __name__ == "__main__":
    main()
