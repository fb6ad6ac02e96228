"""Time or memory of one peer and one model, in one process that benchmarks.peers.run starts.

By default, the process times the plain step, the library and the peer in interleaved rounds. With `--alone` it measures
the peak memory of one of them. The result is a JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common.plain_step import time_plain_step
from benchmarks.peers.cases import Case, NotApplicable, Side, count_entries, open_stream

OUTPUT = "the file of --out"
PEERS = ("traker", "dattri", "captum", "bergson")


def load_sides(peer: str) -> dict[str, Callable[[Case], Side]]:
    """Import the adapter of a peer, and return its sides by name."""
    return importlib.import_module(f"benchmarks.peers.adapters.{peer}").SIDES  # type: ignore[no-any-return]


def measure_peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def time_call(call: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def time_batch(side: Side, rows: list[Any], limit_s: float) -> float:
    """Return the seconds of a batch: of the first if it exceeds the limit, else the minimum over half a second."""
    first = time_call(lambda: side.run(rows))
    if first > limit_s:
        return first
    times: list[float] = []
    while sum(times) < 0.5:
        times.append(time_call(lambda: side.run(rows)))
    return min(times)


def find_best_size(side: Side, case: Case, limit_s: float) -> tuple[int, float]:
    """Return the fastest batch size that fits in memory, and its seconds per batch."""
    best: tuple[int, float] | None = None
    start_bytes = measure_peak_bytes()
    for i, size in enumerate(side.sizes):
        spent = time_batch(side, case.make_rows(size), limit_s)
        slower = best is not None and spent > limit_s / 4 and spent / size > best[1] / best[0]
        if best is None or spent / size < best[1] / best[0]:
            best = size, spent
        larger = side.sizes[min(i + 1, len(side.sizes) - 1)] / size
        too_large = start_bytes + larger * (measure_peak_bytes() - start_bytes) > case.memory
        if slower or too_large or spent * larger > 4 * limit_s:
            break
    assert best is not None
    return best


def measure_time(case: Case, make: Callable[[Case], Side], options: argparse.Namespace) -> dict[str, Any]:
    start_s = time.perf_counter()
    model, size = case.model, case.model.batch_size
    side = make(case)
    peer_size, peer_batch = find_best_size(side, case, options.limit / 20)
    step = time_plain_step(model, case.make_rows(4 * size), size)
    n_plain = size * max(2, round(options.seconds / step / size))
    n_peer = peer_size * max(1, round(options.seconds / peer_batch))
    rows = case.make_rows(max(n_plain, n_peer))
    batches = [rows[i : i + peer_size] for i in range(0, n_peer, peer_size)]
    found: dict[str, list[float]] = {"plain": [], "ours": [], "peer": []}
    with open_stream(case, n_plain) as stream:
        stream(2 * size)
        round_s = 2 * options.seconds + len(batches) * peer_batch
        n_rounds = max(1, min(options.rounds, int((options.limit - (time.perf_counter() - start_s)) / round_s)))
        for _ in range(n_rounds):
            found["plain"].append(time_plain_step(model, rows[:n_plain], size))
            found["ours"].append(time_call(lambda: stream(n_plain)) / n_plain)
            found["peer"].append(time_call(lambda: [side.run(b) for b in batches]) / n_peer)
    ratios = {
        "ours_to_plain": [p / o for p, o in zip(found["plain"], found["ours"], strict=True)],
        "peer_to_plain": [p / o for p, o in zip(found["plain"], found["peer"], strict=True)],
        "times_faster": [p / o for p, o in zip(found["peer"], found["ours"], strict=True)],
    }
    return {
        "parameters": count_entries(case.make_module().parameters()),
        "covered": side.covered,
        "dim": side.dim,
        "settings": side.settings,
        "batch_size": {"plain": size, "ours": size, "peer": peer_size},
        "rows_a_round": {"plain": n_plain, "ours": n_plain, "peer": n_peer},
        "rounds": n_rounds,
        "row_us": {name: median(values) * 1e6 for name, values in found.items()},
        "rounds_row_us": {name: [v * 1e6 for v in values] for name, values in found.items()},
        **{name: median(values) for name, values in ratios.items()},
    }


def measure_memory(case: Case, make: Callable[[Case], Side], options: argparse.Namespace) -> dict[str, Any]:
    """Run a few batches of one side, and return the peak memory of this process with its imports."""
    size = case.model.batch_size
    if options.alone == "plain":
        time_plain_step(case.model, case.make_rows(3 * size), size)
    elif options.alone == "ours":
        with open_stream(case, 3 * size) as stream:
            stream(3 * size)
    else:
        side, rows = make(case), case.make_rows(options.batch_size)
        if time_call(lambda: side.run(rows)) < options.limit / 20:
            side.run(rows)
    return {"peak_mb": measure_peak_bytes() / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, required=True, help="library to compare")
    parser.add_argument("--side", required=True, help="side of the peer")
    parser.add_argument("--model", required=True, help="model to measure")
    parser.add_argument(
        "--alone", choices=["plain", "ours", "peer"], help="measure the memory of this side instead of times"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="batch size of the peer, with --alone peer")
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each side per round, at least one batch")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per case; slow peers run fewer rounds")
    parser.add_argument("--memory", type=float, default=16.0, help="memory limit of a process in GB")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = Case(options.model, options.dim, int(options.memory * 1e9))
    measure = measure_time if options.alone is None else measure_memory
    if options.alone in ("plain", "ours"):
        make: Callable[[Case], Side] = _reject_side
    else:
        make = load_sides(options.peer)[options.side]
    try:
        result = measure(case, make, options)
    except NotApplicable as reason:
        result = {"skipped": str(reason)}
    except Exception as error:  # an error of a peer is a result
        first = (str(error).strip().splitlines() or [traceback.extract_tb(error.__traceback__)[-1].line or ""])[0]
        result = {"failed": f"{type(error).__name__}: {first[:200]}"}
    options.out.write_text(json.dumps(result))


def _reject_side(case: Case) -> Side:
    raise NotImplementedError


if __name__ == "__main__":
    main()
