"""Many queries in one process: resident memory and open files, after the first thousand and at the end."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import common
from tracin_ann import InfluenceIndex, QueryOptions, build
from tracin_ann.store.columns import RowFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from tasks.toy import CONFIG, Toy, rows, saved, toy  # noqa: E402

N = 5000
WAYS = (
    QueryOptions(search="lists"),
    QueryOptions(search="scan"),
    QueryOptions(search="lists", rows=RowFilter(where=("label=1",))),
    QueryOptions(search="lists", rerank="exact", k=3, candidates=10),
)


def now() -> dict[str, int]:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return {"resident_bytes": resident, "open_files": len(os.listdir("/proc/self/fd"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--warm", type=int, default=1000)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Toy()
    with tempfile.TemporaryDirectory() as folder:
        data = {"train_data": lambda: held, "query_data": lambda: asked}
        held, asked = rows(N), rows(200, seed=2)
        task = toy(
            Path(folder), model, checkpoints=saved(model, Path(folder)), columns=lambda r: {"label": r[1]}, **data
        )
        build(task, f"{folder}/index", replace(CONFIG, index="ivf", partition_rows=64))
        index = InfluenceIndex.open(f"{folder}/index", task)
        seen = []
        for number in range(options.queries):
            if number == options.warm:
                seen.append(now())
            index.query([number % len(asked)], options=WAYS[number % len(WAYS)])
        seen.append(now())
    growth = seen[1]["resident_bytes"] / seen[0]["resident_bytes"] - 1
    result = {"queries": options.queries, "warm": seen[0], "end": seen[1], "growth": growth}
    print(common.write("soak", vars(options), [result]), result)


if __name__ == "__main__":
    main()
