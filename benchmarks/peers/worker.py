"""One process of the comparison: `rounds` times plain step, ours and a peer in turn; `memory` runs one side alone.

Started by benchmarks.peers.run; writes its result, a JSON object, to --out.
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

from benchmarks import features
from benchmarks.peers.cases import Case, NotApplicable, Side, count, our_stream

PEERS = ("traker", "dattri", "captum", "bergson")


def sides(peer: str) -> dict[str, Callable[[Case], Side]]:
    return importlib.import_module(f"benchmarks.peers.with_{peer}").SIDES  # type: ignore[no-any-return]


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def batch_seconds(side: Side, rows: list[Any], patience: float) -> float:
    """Return the time of a batch: the first one if that is long, else the least of what fits in half a second."""
    first = seconds(lambda: side.run(rows))
    if first > patience:
        return first
    times: list[float] = []
    while sum(times) < 0.5:
        times.append(seconds(lambda: side.run(rows)))
    return min(times)


def best_size(side: Side, case: Case, patience: float) -> tuple[int, float]:
    """Return the batch size with the highest rate among those that fit in memory, and a batch's seconds."""
    best: tuple[int, float] | None = None
    held = peak_bytes()
    for i, size in enumerate(side.sizes):
        spent = batch_seconds(side, case.rows(size), patience)
        slower = best is not None and spent > patience / 4 and spent / size > best[1] / best[0]
        if best is None or spent / size < best[1] / best[0]:
            best = size, spent
        larger = side.sizes[min(i + 1, len(side.sizes) - 1)] / size
        too_large = held + larger * (peak_bytes() - held) > case.memory
        if slower or too_large or spent * larger > 4 * patience:
            break
    assert best is not None
    return best


def timed(case: Case, make: Callable[[Case], Side], options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    chosen, size = case.chosen, case.chosen.batch_size
    side = make(case)
    peer_size, peer_batch = best_size(side, case, options.limit / 20)
    step = features.plain(chosen, case.rows(4 * size), size)
    n_plain = size * max(2, round(options.seconds / step / size))
    n_peer = peer_size * max(1, round(options.seconds / peer_batch))
    rows = case.rows(max(n_plain, n_peer))
    batches = [rows[i : i + peer_size] for i in range(0, n_peer, peer_size)]
    found: dict[str, list[float]] = {"plain": [], "ours": [], "peer": []}
    with our_stream(case, n_plain) as stream:
        stream(2 * size)
        a_round = 2 * options.seconds + len(batches) * peer_batch
        n_rounds = max(1, min(options.rounds, int((options.limit - (time.perf_counter() - began)) / a_round)))
        for _ in range(n_rounds):
            found["plain"].append(features.plain(chosen, rows[:n_plain], size))
            found["ours"].append(seconds(lambda: stream(n_plain)) / n_plain)
            found["peer"].append(seconds(lambda: [side.run(b) for b in batches]) / n_peer)
    ratios = {
        "ours_to_plain": [p / o for p, o in zip(found["plain"], found["ours"], strict=True)],
        "peer_to_plain": [p / o for p, o in zip(found["plain"], found["peer"], strict=True)],
        "times_faster": [p / o for p, o in zip(found["peer"], found["ours"], strict=True)],
    }
    return {
        "parameters": count(case.module().parameters()),
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


def memory(case: Case, make: Callable[[Case], Side], options: argparse.Namespace) -> dict[str, Any]:
    """Run a few batches of one side in this process and return its peak memory, imports included."""
    size = case.chosen.batch_size
    if options.alone == "plain":
        features.plain(case.chosen, case.rows(3 * size), size)
    elif options.alone == "ours":
        with our_stream(case, 3 * size) as stream:
            stream(3 * size)
    else:
        side, rows = make(case), case.rows(options.batch_size)
        if seconds(lambda: side.run(rows)) < options.limit / 20:
            side.run(rows)
    return {"peak_mb": peak_bytes() / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--side", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alone", choices=["plain", "ours", "peer"], help="measure this one's memory instead of time")
    parser.add_argument("--batch-size", type=int, default=16, help="of the peer, where it is alone")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--memory", type=float, default=16.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = Case(options.model, options.dim, int(options.memory * 1e9))
    measure = timed if options.alone is None else memory
    if options.alone in ("plain", "ours"):
        make: Callable[[Case], Side] = _none
    else:
        make = sides(options.peer)[options.side]
    try:
        result = measure(case, make, options)
    except NotApplicable as reason:
        result = {"skipped": str(reason)}
    except Exception as error:  # whatever a peer raises is the result
        first = (str(error).strip().splitlines() or [traceback.extract_tb(error.__traceback__)[-1].line or ""])[0]
        result = {"failed": f"{type(error).__name__}: {first[:200]}"}
    options.out.write_text(json.dumps(result))


def _none(case: Case) -> Side:
    raise NotImplementedError


if __name__ == "__main__":
    main()
