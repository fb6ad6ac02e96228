"""What a feature row costs: whole builds against plain batched forward and backward of the same model.

The build's cost a row is the difference of builds of two sizes, so that starting up, probing and proving do not count.
The closing measurement of fidelity is left out: it takes all rows of a small build, and no more of a large one.
Rounds of build, build, plain are interleaved in one process, and medians are reported. A build
keeps pictures with channels last on a CPU; plain training is timed in both formats.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks import common, models
from tracin_ann import BuildConfig, build
from tracin_ann.device import resolve_device

CPU = torch.device("cpu")


def plain(
    chosen: models.Model, rows: list, size: int, *, channels_last: bool = False, device: torch.device = CPU
) -> float:
    """Return the seconds a row of batched forward and backward, loading and collating included."""
    model = chosen.make().eval().to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    began = time.perf_counter()
    for start in range(0, len(rows), size):
        batch = torch.utils.data.default_collate(rows[start : start + size])
        if channels_last:
            batch[0] = batch[0].contiguous(memory_format=torch.channels_last)
        if device != CPU:
            batch = [part.to(device) for part in batch]
        model.zero_grad()
        chosen.loss(model, batch).sum().backward()
    if device != CPU:
        torch.accelerator.synchronize()
    return (time.perf_counter() - began) / len(rows)


def built(name: str, n_rows: int, config: BuildConfig) -> float:
    """Return the seconds of a whole build."""
    with tempfile.TemporaryDirectory() as folder:
        task = models.task(name, folder, n_rows)
        began = time.perf_counter()
        build(task, Path(folder) / "index", config)
        return time.perf_counter() - began


def measured(name: str, options: argparse.Namespace) -> dict[str, float | str | int]:
    chosen, device = models.MODELS[name], resolve_device(options.device)
    size = options.batch_size or chosen.batch_size
    with tempfile.TemporaryDirectory() as folder:
        step = plain(chosen, models.task(name, folder, 8 * size).train_data(), size, device=device)
    batches = max(4, round(options.seconds / step / size))
    small, large = size * max(1, batches // 4), size * (batches + max(1, batches // 4))
    with tempfile.TemporaryDirectory() as folder:
        rows = models.task(name, folder, large - small).train_data()
    config = BuildConfig(
        dim=options.dim, batch_size=size, sketch=options.sketch, device=options.device, yardstick=False
    )
    pictures = any(p.dim() == 4 for p in chosen.make().parameters())  # noqa: PLR2004
    ours, theirs, theirs_last = [], [], []
    for round_ in range(options.rounds + 1):
        difference = (built(name, large, config) - built(name, small, config)) / (large - small)
        step = plain(chosen, rows, size, device=device)
        step_last = plain(chosen, rows, size, channels_last=True, device=device) if pictures else step
        if round_:  # the first warms up
            ours.append(difference)
            theirs.append(step)
            theirs_last.append(step_last)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in chosen.make().parameters()),
        "batch_size": size,
        "row_us": median(ours) * 1e6,
        "plain_us": median(theirs) * 1e6,
        "ratio": median(p / o for p, o in zip(theirs, ours, strict=True)),
        "rounds_ratio": [p / o for p, o in zip(theirs, ours, strict=True)],
        "plain_channels_last_us": median(theirs_last) * 1e6,
        "ratio_to_channels_last": median(p / o for p, o in zip(theirs_last, ours, strict=True)),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models.MODELS), choices=list(models.MODELS))
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--sketch", default="factored")
    parser.add_argument("--seconds", type=float, default=4.0, help="of plain steps, by which the builds differ")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of both sides; the result of a GPU is written to features_gpu")
    parser.add_argument("--batch-size", type=int, help="of both sides, instead of the models' own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = (measured(name, options) for name in options.models)
    on_cpu = resolve_device(options.device) == CPU
    common.reported("features" if on_cpu else "features_gpu", vars(options), results)


if __name__ == "__main__":
    main()
