"""Flipped bytes over all files of an index, one at a time: what `tracin-verify` says of each, and what a query does.

A flip is found when verify names the file, and harmless when it does not and the answers are the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.errors import TracinAnnError
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import verify

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from tasks.toy import CONFIG, Toy, rows, saved, toy  # noqa: E402


def made(folder: Path, kind: str) -> tuple[Path, Task]:
    torch.manual_seed(0)
    model = Toy()
    data = {"train_data": lambda: rows(600), "query_data": lambda: rows(20, seed=2)}
    task = toy(folder, model, checkpoints=saved(model, folder), columns=lambda row: {"label": row[1]}, **data)
    build(task, folder / "index", replace(CONFIG, index=kind, partition_rows=256))
    remove(folder / "index", [3, 200])
    return folder / "index", task


def answers(directory: Path, task: Task) -> object:
    found = InfluenceIndex.open(directory, task).query(range(5), options=QueryOptions(search="scan"))
    return [[(h.id, h.score) for h in (*a.proponents, *a.opponents)] for a in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flips", type=int, default=500)
    options = parser.parse_args()
    results = []
    for kind in ("flat", "ivf"):
        with tempfile.TemporaryDirectory() as folder:
            index, task = made(Path(folder), kind)
            expected = answers(index, task)
            paths = sorted(path for path in index.rglob("*") if path.is_file())
            random = np.random.default_rng(0)
            found, harmless, missed, misled = 0, [], [], []
            for case in range(options.flips // 2):
                path = paths[case % len(paths)]
                sound = path.read_bytes()
                content = bytearray(sound)
                content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
                path.write_bytes(content)
                named = {damage.path for damage in verify(index).damage}
                try:
                    same = answers(index, task) == expected
                except TracinAnnError:
                    same = True
                if not same:
                    misled.append(str(path.relative_to(index)))
                if named == {path}:
                    found += 1
                else:
                    (harmless if not named and same else missed).append(str(path.relative_to(index)))
                path.write_bytes(sound)
            result = {"index": kind, "files": len(paths), "flips": options.flips // 2, "found": found}
            # Before verify is run: rows that are read are checked by the query itself.
            result |= {"harmless": harmless, "missed": missed, "other_answers_without_verify": misled}
            print(result, flush=True)
            results.append(result)
    print(common.write("flips", vars(options), results))


if __name__ == "__main__":
    main()
