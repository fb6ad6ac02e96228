"""Many processes ask an index while another appends to it and removes rows: every answer is one generation's, whole.

Each answer is compared with brute force over the rows that the opened generation holds, and each generation that was
seen with what the writer says it made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.operations.removal import remove
from tracin_ann.store.exclusions import read_removed_ids
from tracin_ann.store.manifest import Manifest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from tasks.toy import CONFIG, RATES, Toy, rows, saved, toy  # noqa: E402

FIRST, MOST, QUERIES, K = 400, 4000, 20, 5
REOPEN = 25


def sized(folder: Path, held: list[Any]) -> Task:
    """Return the task whose train rows are as many as what is in `held` says: a number, or an index once it is open."""
    model = Toy()
    checkpoints = [Checkpoint(folder / "weights" / f"checkpoint{i}.pt", rate) for i, rate in enumerate(RATES)]
    data = {"train_data": lambda: rows(held[0] if isinstance(held[0], int) else len(held[0]))}
    return toy(folder, model, checkpoints=checkpoints, query_data=lambda: rows(QUERIES, seed=2), **data)


def write(folder: Path, kind: str, over: Any) -> None:
    """Append and remove until told to stop, and note what each generation holds."""
    random, n_rows = np.random.default_rng(0), FIRST
    config = replace(CONFIG, index=kind, partition_rows=256, yardstick=False, append=True)
    while not over.is_set() and n_rows < MOST:
        if random.random() < 0.5:
            n_rows += int(random.integers(1, 40))
            manifest = build(sized(folder, [n_rows]), folder / "index", config).manifest
        else:
            manifest = remove(folder / "index", random.integers(0, n_rows, 5).tolist())
        _note(folder, manifest)


def _note(folder: Path, manifest: Manifest) -> None:
    held = read_removed_ids(folder / "index", manifest).tolist()
    with (folder / "made.jsonl").open("a") as file:
        file.write(json.dumps([manifest.generation, manifest.build.layout.n_rows, held]) + "\n")


def ask(folder: Path, seed: int, count: int, told: Any) -> None:
    """Ask queries one by one, opening the index anew now and then, and tell how many answers were wrong."""
    torch.set_num_threads(1)
    truth = np.load(folder / "truth.npy")
    random = np.random.default_rng(seed)
    seen: dict[int, tuple[int, list[int]]] = {}
    wrong, errors = 0, []
    index, allowed = None, np.zeros(0, np.int64)
    for number in range(count):
        try:
            if index is None or number % REOPEN == 0:
                held: list[Any] = [FIRST]
                index = InfluenceIndex.open(folder / "index", sized(folder, held))
                held[0] = index
                seen[index.manifest.generation] = (len(index), index.removed.tolist())
                allowed = np.setdiff1d(np.arange(len(index)), index.removed)
            query = int(random.integers(QUERIES))
            search = "scan" if random.random() < 0.5 else "auto"
            (answer,) = index.query([query], options=QueryOptions(k=K, search=search))
        except Exception as error:  # noqa: BLE001
            errors.append(f"{type(error).__name__}: {error}"[:200])
            index = None
            continue
        score_N = truth[query, allowed]
        for hits, best in ((answer.proponents, np.sort(score_N)[::-1]), (answer.opponents, np.sort(score_N))):
            found = np.array([hit.score for hit in hits])
            fine = all(abs(truth[query, int(h.id)] - h.score) < 1e-5 and int(h.id) in allowed for h in hits)
            if search == "scan":
                fine = fine and len(found) == K and np.allclose(found, best[:K], rtol=1e-5, atol=1e-6)
            wrong += not fine
    told.put((count, wrong, errors, seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--queries", type=int, default=1000)
    options = parser.parse_args()
    context, results = multiprocessing.get_context("spawn"), []
    for kind in ("flat", "ivf"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "weights").mkdir()
            torch.manual_seed(0)
            saved(Toy(), folder / "weights")
            everything = build(sized(folder, [MOST]), folder / "all", replace(CONFIG, yardstick=False))
            whole = InfluenceIndex.open(folder / "all", sized(folder, [MOST]))
            features = whole.features("query", range(QUERIES)).astype(np.float64)
            np.save(folder / "truth.npy", features @ whole.view().take(range(MOST)).astype(np.float64).T)
            config = replace(CONFIG, index=kind, partition_rows=256, yardstick=False)
            _note(folder, build(sized(folder, [FIRST]), folder / "index", config).manifest)
            told, over = context.Queue(), context.Event()
            writer = context.Process(target=write, args=(folder, kind, over))
            asking = [
                context.Process(target=ask, args=(folder, seed, options.queries, told))
                for seed in range(options.readers)
            ]
            began = time.perf_counter()
            for process in (writer, *asking):
                process.start()
            answers = [told.get() for _ in asking]
            over.set()
            for process in (writer, *asking):
                process.join()
            made = [json.loads(line) for line in (folder / "made.jsonl").read_text().splitlines()]
            known = {generation: (n_rows, held) for generation, n_rows, held in made}
            seen = {item for *_, generations in answers for item in generations}
            strangers = sum(known[g] != found for *_, generations in answers for g, found in generations.items())
            result = {
                "index": kind,
                "answers": sum(count for count, *_ in answers),
                "wrong": sum(wrong for _, wrong, *_ in answers),
                "errors": [error for _, _, errors, _ in answers for error in errors],
                "generations_made": len(made),
                "generations_seen": len(seen),
                "unlike_what_was_made": strangers,
                "seconds": time.perf_counter() - began,
                "rows": everything.manifest.build.layout.n_rows,
            }
            left = len(list((folder / "index").glob("generation-*")))
            print(result | {"left": left}, flush=True)
            results.append(result)
            if writer.exitcode:
                raise SystemExit("the writer failed")
    print(common.write("readers", vars(options), results))


if __name__ == "__main__":
    main()
