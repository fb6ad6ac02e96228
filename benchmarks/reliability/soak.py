"""Growth of memory and open files over many queries in one process."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.paths import add_tests_to_path
from benchmarks.common.results import write_results
from tracin_ann import InfluenceIndex, QueryOptions, build
from tracin_ann.store.columns import RowFilter

add_tests_to_path()

from tasks.toy import CONFIG, Toy, make_rows, make_toy_task, save_checkpoints  # noqa: E402

RESULT = "soak"
N = 5000
OPTIONS = (
    QueryOptions(search="lists"),
    QueryOptions(search="scan"),
    QueryOptions(search="lists", rows=RowFilter(where=("label=1",))),
    QueryOptions(search="lists", rerank="exact", k=3, candidates=10),
)


def measure_process() -> dict[str, int]:
    """Return the resident memory and the number of open files of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return {"resident_bytes": resident, "open_files": len(os.listdir("/proc/self/fd"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queries", type=int, default=10_000, help="number of queries")
    parser.add_argument("--warm", type=int, default=1000, help="queries before the first measurement")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Toy()
    with tempfile.TemporaryDirectory() as folder:
        data = {"train_data": lambda: train_rows, "query_data": lambda: query_rows}
        train_rows, query_rows = make_rows(N), make_rows(200, seed=2)
        task = make_toy_task(
            Path(folder),
            model,
            checkpoints=save_checkpoints(model, Path(folder)),
            columns=lambda r: {"label": r[1]},
            **data,
        )
        build(task, f"{folder}/index", replace(CONFIG, index="ivf", partition_rows=64))
        index = InfluenceIndex.open(f"{folder}/index", task)
        figures = []
        for number in range(options.queries):
            if number == options.warm:
                figures.append(measure_process())
            index.query([number % len(query_rows)], options=OPTIONS[number % len(OPTIONS)])
        figures.append(measure_process())
    growth = figures[1]["resident_bytes"] / figures[0]["resident_bytes"] - 1
    result = {"queries": options.queries, "warm": figures[0], "end": figures[1], "growth": growth}
    print(write_results(RESULT, vars(options), [result]), result)


if __name__ == "__main__":
    main()
