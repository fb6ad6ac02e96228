"""Time of each step of feature extraction: reading, forward, input gradients, sketch, storing.

Each measurement runs one step more than the one before it over the same rows; the time of a step is the difference.
Rounds are interleaved; the medians are reported. PyTorch's FlopCounterMode counts the operations of matrix products,
convolutions and attention. The ratio of the counts, plain step to extraction, is the ratio of times that equal
throughput in all steps would give. With `--device`, the steps run on a GPU, and each measurement ends when its work is
done; `sketch_share` is then the part of extraction that fused kernels for sketches could reduce.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import models
from benchmarks.common.plain_step import CPU, time_plain_step
from benchmarks.common.results import report_results
from tracin_ann.device import record_event, resolve_device
from tracin_ann.features import LoadedModel, RunOptions, TaskRunner
from tracin_ann.features.autotune import TuningOptions, tune
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.sketch import make_sketch
from tracin_ann.store import FeatureBlock, FeatureStore, StoreLayout

RESULT = "budget"
Part = Callable[[], object]


def make_parts(model: LoadedModel, options: argparse.Namespace, n_rows: int, folder: str) -> dict[str, Part]:
    """Return the functions to time, by name; each runs over all rows."""
    runner, engine = model.runner, model.engine("train")
    loaded = list(runner.read("train", range(n_rows)))
    batches = [model.batch("train", each) for each in loaded]
    features = FeatureOptions(make_sketch("factored", options.dim), 0, engine.choose_methods(batches[0]).rank_one)
    extractor = FeatureExtractor(model, features)
    rows = extractor.rows("train", range(n_rows))
    store = FeatureStore(Path(folder), StoreLayout(n_rows, n_rows, options.dim, "float16", ("benchmark",)))
    block = FeatureBlock(rows.ids_N, rows.feature_ND, rows.sqnorm_N, rows.loss_N)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                engine.losses(batch)

    return {
        "reading": lambda: list(runner.read("train", range(n_rows))),
        "forward": forward,
        "factors": lambda: [engine.run(batch, lambda: lambda name, form, rows: None) for batch in batches],
        "rows": lambda: list(extractor.stream("train", loaded)),
        "storing": lambda: store.write(0, 0, block),
    }


def count_flops(run: Part) -> float:
    """Return the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def measure_model(name: str, options: argparse.Namespace) -> dict[str, object]:
    benchmarked, device = models.ALL_MODELS[name], resolve_device(options.device)
    size = benchmarked.batch_size
    n_rows = size * options.batches * (16 if "CNN" in name else 1)
    with tempfile.TemporaryDirectory() as folder:
        runner = TaskRunner(models.make_task(name, folder, n_rows), RunOptions(device, size))
        train_data = runner.data("train")
        data = [train_data[i] for i in range(n_rows)]
        with runner.model() as model:
            model.load(0)
            model.engine("train").choose_methods(next(model.batches("train", range(size))))
            features = FeatureOptions(make_sketch("factored", options.dim), 0, frozenset())
            tuning = tune(model, features, TuningOptions(size))
            timed = make_parts(model, options, n_rows, folder)
            times: dict[str, list[float]] = {part: [] for part in (*timed, "plain")}
            for round_ in range(options.rounds + 1):
                for part, run in timed.items():
                    start_s = time.perf_counter()
                    run()
                    record_event(device)()
                    if round_:  # the first round is a warm-up
                        times[part].append((time.perf_counter() - start_s) / n_rows)
                step = time_plain_step(benchmarked, data, size, device=device)
                if round_:
                    times["plain"].append(step)
            build_flops, plain_flops = (
                count_flops(timed["rows"]),
                count_flops(lambda: time_plain_step(benchmarked, data, size, device=device)),
            )
    us = {part: median(values) * 1e6 for part, values in times.items()}
    return {
        "model": name,
        "batch_size": size,
        "channels_last": tuning.channels_last,
        "plain_us": us["plain"],
        "reading_us": us["reading"],
        "forward_us": us["forward"],
        "input_gradients_us": us["factors"] - us["forward"],
        "sketch_us": us["rows"] - us["factors"],
        "sketch_share": (us["rows"] - us["factors"]) / us["rows"],
        "storing_us": us["storing"],
        "arithmetic_ratio": float(np.divide(plain_flops, build_flops)),
        "mflop_row_plain": plain_flops / n_rows / 1e6,
        "mflop_row_ours": build_flops / n_rows / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=list(models.MODELS), choices=list(models.ALL_MODELS), help="models to measure"
    )
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--batches", type=int, default=4, help="batches per round; 16 times as many for the CNN")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument(
        "--device", default="cpu", help="device of all steps; with a GPU the result file is budget_gpu.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = (measure_model(name, options) for name in options.models)
    device = resolve_device(options.device)
    report_results(RESULT if device == CPU else "budget_gpu", vars(options), results, device)


if __name__ == "__main__":
    main()
