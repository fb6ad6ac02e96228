"""Correctness of concurrent queries while another process appends and removes rows.

Each answer is compared with brute force over the rows of the generation that the reader opened. The rows of each
generation that a reader saw are compared with those that the writer recorded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.paths import add_tests_to_path
from benchmarks.common.results import write_results
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.operations.removal import remove
from tracin_ann.store.exclusions import read_removed_ids
from tracin_ann.store.manifest import Manifest

add_tests_to_path()

from tasks.toy import CONFIG, RATES, Toy, make_rows, make_toy_task, save_checkpoints  # noqa: E402

RESULT = "readers"
FIRST, MOST, QUERIES, K = 400, 4000, 20, 5
QUERIES_PER_OPEN = 25


def make_task(folder: Path, size: list[Any]) -> Task:
    """Return the task with as many training rows as the only item of `size` is, or has if it is an index."""
    model = Toy()
    checkpoints = [Checkpoint(folder / "weights" / f"checkpoint{i}.pt", rate) for i, rate in enumerate(RATES)]
    data = {"train_data": lambda: make_rows(size[0] if isinstance(size[0], int) else len(size[0]))}
    return make_toy_task(folder, model, checkpoints=checkpoints, query_data=lambda: make_rows(QUERIES, seed=2), **data)


def write(folder: Path, kind: str, done: Any) -> None:
    """Append and remove rows until `done` is set, and record the rows of each generation."""
    random, n_rows = np.random.default_rng(0), FIRST
    config = replace(CONFIG, index=kind, partition_rows=256, yardstick=False, append=True)
    while not done.is_set() and n_rows < MOST:
        if random.random() < 0.5:
            n_rows += int(random.integers(1, 40))
            manifest = build(make_task(folder, [n_rows]), folder / "index", config).manifest
        else:
            manifest = remove(folder / "index", random.integers(0, n_rows, 5).tolist())
        _record(folder, manifest)


def _record(folder: Path, manifest: Manifest) -> None:
    removed = read_removed_ids(folder / "index", manifest).tolist()
    with (folder / "generations.jsonl").open("a") as file:
        file.write(json.dumps([manifest.generation, manifest.build.layout.n_rows, removed]) + "\n")


def query(folder: Path, seed: int, count: int, channel: Any) -> None:
    """Run queries one by one, reopening the index regularly, and report the number of wrong answers."""
    torch.set_num_threads(1)
    truth = np.load(folder / "truth.npy")
    random = np.random.default_rng(seed)
    seen: dict[int, tuple[int, list[int]]] = {}
    wrong, errors = 0, []
    index, allowed = None, np.zeros(0, np.int64)
    for number in range(count):
        try:
            if index is None or number % QUERIES_PER_OPEN == 0:
                size: list[Any] = [FIRST]
                index = InfluenceIndex.open(folder / "index", make_task(folder, size))
                size[0] = index
                seen[index.manifest.generation] = (len(index), index.removed.tolist())
                allowed = np.setdiff1d(np.arange(len(index)), index.removed)
            row = int(random.integers(QUERIES))
            search = "scan" if random.random() < 0.5 else "auto"
            (answer,) = index.query([row], options=QueryOptions(k=K, search=search))
        except Exception as error:  # noqa: BLE001
            errors.append(f"{type(error).__name__}: {error}"[:200])
            index = None
            continue
        score_N = truth[row, allowed]
        for hits, best in ((answer.proponents, np.sort(score_N)[::-1]), (answer.opponents, np.sort(score_N))):
            found = np.array([hit.score for hit in hits])
            correct = all(abs(truth[row, int(h.id)] - h.score) < 1e-5 and int(h.id) in allowed for h in hits)
            if search == "scan":
                correct = correct and len(found) == K and np.allclose(found, best[:K], rtol=1e-5, atol=1e-6)
            wrong += not correct
    channel.put((count, wrong, errors, seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readers", type=int, default=8, help="number of reading processes")
    parser.add_argument("--queries", type=int, default=1000, help="queries per reader")
    options = parser.parse_args()
    context, results = multiprocessing.get_context("spawn"), []
    for kind in ("flat", "ivf"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "weights").mkdir()
            torch.manual_seed(0)
            save_checkpoints(Toy(), folder / "weights")
            everything = build(make_task(folder, [MOST]), folder / "all", replace(CONFIG, yardstick=False))
            whole = InfluenceIndex.open(folder / "all", make_task(folder, [MOST]))
            features = whole.features("query", range(QUERIES)).astype(np.float64)
            np.save(folder / "truth.npy", features @ whole.view().take(range(MOST)).astype(np.float64).T)
            config = replace(CONFIG, index=kind, partition_rows=256, yardstick=False)
            _record(folder, build(make_task(folder, [FIRST]), folder / "index", config).manifest)
            channel, done = context.Queue(), context.Event()
            writer = context.Process(target=write, args=(folder, kind, done))
            readers = [
                context.Process(target=query, args=(folder, seed, options.queries, channel))
                for seed in range(options.readers)
            ]
            start_s = time.perf_counter()
            for process in (writer, *readers):
                process.start()
            answers = [channel.get() for _ in readers]
            done.set()
            for process in (writer, *readers):
                process.join()
            recorded = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
            known = {generation: (n_rows, removed) for generation, n_rows, removed in recorded}
            seen = {item for *_, generations in answers for item in generations}
            unlike = sum(known[g] != found for *_, generations in answers for g, found in generations.items())
            result = {
                "index": kind,
                "answers": sum(count for count, *_ in answers),
                "wrong": sum(wrong for _, wrong, *_ in answers),
                "errors": [error for _, _, errors, _ in answers for error in errors],
                "generations_made": len(recorded),
                "generations_seen": len(seen),
                "unlike_what_was_made": unlike,
                "seconds": time.perf_counter() - start_s,
                "rows": everything.manifest.build.layout.n_rows,
            }
            left = len(list((folder / "index").glob("generation-*")))
            print(result | {"left": left}, flush=True)
            results.append(result)
            if writer.exitcode:
                raise SystemExit("the writer failed; its traceback is printed above")
    print(write_results(RESULT, vars(options), results))


if __name__ == "__main__":
    main()
