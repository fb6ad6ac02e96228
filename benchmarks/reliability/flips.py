"""Detection of single flipped bits in all files of an index, by `tracin-verify` and by a query.

A flip is found if verify names exactly the changed file. It is harmless if verify names no file and the answers do not
change.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.paths import add_tests_to_path
from benchmarks.common.results import write_results
from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.errors import TracinAnnError
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import verify

add_tests_to_path()

from tasks.toy import CONFIG, Toy, make_rows, make_toy_task, save_checkpoints  # noqa: E402

RESULT = "flips"


def build_index(folder: Path, kind: str) -> tuple[Path, Task]:
    """Build a small index with removed rows."""
    torch.manual_seed(0)
    model = Toy()
    data = {"train_data": lambda: make_rows(600), "query_data": lambda: make_rows(20, seed=2)}
    task = make_toy_task(
        folder, model, checkpoints=save_checkpoints(model, folder), columns=lambda row: {"label": row[1]}, **data
    )
    build(task, folder / "index", replace(CONFIG, index=kind, partition_rows=256))
    remove(folder / "index", [3, 200])
    return folder / "index", task


def query(directory: Path, task: Task) -> object:
    """Return the answers of an exact scan."""
    answers = InfluenceIndex.open(directory, task).query(range(5), options=QueryOptions(search="scan"))
    return [[(h.id, h.score) for h in (*a.proponents, *a.opponents)] for a in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flips", type=int, default=500, help="number of flips")
    options = parser.parse_args()
    results = []
    for kind in ("flat", "ivf"):
        with tempfile.TemporaryDirectory() as folder:
            index, task = build_index(Path(folder), kind)
            expected = query(index, task)
            paths = sorted(path for path in index.rglob("*") if path.is_file())
            random = np.random.default_rng(0)
            found, harmless, missed, wrong_answers = 0, [], [], []
            for case in range(options.flips // 2):
                path = paths[case % len(paths)]
                original = path.read_bytes()
                content = bytearray(original)
                content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
                path.write_bytes(content)
                named = {damage.path for damage in verify(index).damage}
                try:
                    same = query(index, task) == expected
                except TracinAnnError:
                    same = True
                if not same:
                    wrong_answers.append(str(path.relative_to(index)))
                if named == {path}:
                    found += 1
                else:
                    (harmless if not named and same else missed).append(str(path.relative_to(index)))
                path.write_bytes(original)
            result = {"index": kind, "files": len(paths), "flips": options.flips // 2, "found": found}
            # A query checks the rows that it reads, also without verify.
            result |= {"harmless": harmless, "missed": missed, "other_answers_without_verify": wrong_answers}
            print(result, flush=True)
            results.append(result)
    print(write_results(RESULT, vars(options), results))


if __name__ == "__main__":
    main()
