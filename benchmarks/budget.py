"""Where a row's time goes: forward, input gradients, sketch, reading, storing; beside plain training.

Parts are told apart by running more and more of the pipe over the same rows, rounds interleaved, medians. The
arithmetic is that of matrix products, convolutions and attention, counted by PyTorch's FlopCounterMode: its ratio,
plain to ours, is what the whole could come to if every part ran at one speed.
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

from benchmarks import common, models
from benchmarks.features import plain
from tracin_ann.features.autotune import TuningRequest, tune
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions, RowBuffer
from tracin_ann.features.passes import LoadedModel, Passes, PassOptions
from tracin_ann.sketch import make_sketch
from tracin_ann.store import FeatureBlock, FeatureStore, StoreLayout

Part = Callable[[], object]


def parts(model: LoadedModel, options: argparse.Namespace, n_rows: int, folder: str) -> dict[str, Part]:
    """Return what is timed, each over all rows."""
    passes, engine = model.passes, model.engine("train")
    read = list(passes.read("train", range(n_rows)))
    batches = [model.batch("train", each) for each in read]
    features = FeatureOptions(make_sketch("factored", options.dim), 0, engine.prove(batches[0]).rank_one)
    extractor = FeatureExtractor(model, features)
    rows = RowBuffer(n_rows, options.dim).filled(0, n_rows, extractor.stream("train", read))
    store = FeatureStore(Path(folder), StoreLayout(n_rows, n_rows, options.dim, "float16", ("benchmark",)))
    block = FeatureBlock(rows.ids_N, rows.feature_ND, rows.sqnorm_N, rows.loss_N)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                engine.losses(batch)

    return {
        "reading": lambda: list(passes.read("train", range(n_rows))),
        "forward": forward,
        "factors": lambda: [engine.run(batch, lambda: lambda name, form, rows: None) for batch in batches],
        "rows": lambda: list(extractor.stream("train", read)),
        "storing": lambda: store.write(0, 0, block),
    }


def flops(run: Part) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def measured(name: str, options: argparse.Namespace) -> dict[str, object]:
    chosen = models.MODELS[name]
    size = chosen.batch_size
    n_rows = size * options.batches * (16 if "CNN" in name else 1)
    with tempfile.TemporaryDirectory() as folder:
        passes = Passes(models.task(name, folder, n_rows), PassOptions(torch.device("cpu"), size))
        data = list(passes.data("train"))
        with passes.model() as model:
            model.load(0)
            model.engine("train").prove(next(model.batches("train", range(size))))
            features = FeatureOptions(make_sketch("factored", options.dim), 0, frozenset())
            made = tune(model, features, TuningRequest(size))
            timed = parts(model, options, n_rows, folder)
            times: dict[str, list[float]] = {part: [] for part in (*timed, "plain")}
            for round_ in range(options.rounds + 1):
                for part, run in timed.items():
                    began = time.perf_counter()
                    run()
                    if round_:  # the first warms up
                        times[part].append((time.perf_counter() - began) / n_rows)
                step = plain(chosen, data, size)
                if round_:
                    times["plain"].append(step)
            ours, theirs = flops(timed["rows"]), flops(lambda: plain(chosen, data, size))
    us = {part: median(values) * 1e6 for part, values in times.items()}
    return {
        "model": name,
        "batch_size": size,
        "channels_last": made.channels_last,
        "plain_us": us["plain"],
        "reading_us": us["reading"],
        "forward_us": us["forward"],
        "input_gradients_us": us["factors"] - us["forward"],
        "sketch_us": us["rows"] - us["factors"],
        "storing_us": us["storing"],
        "arithmetic_ratio": float(np.divide(theirs, ours)),
        "mflop_row_plain": theirs / n_rows / 1e6,
        "mflop_row_ours": ours / n_rows / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models.MODELS), choices=list(models.MODELS))
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=4, help="a round; 16 times as many of the CNN")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    common.reported("budget", vars(options), (measured(name, options) for name in options.models))


if __name__ == "__main__":
    main()
