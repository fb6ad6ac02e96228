"""Processes forked after a search: data loaders of the user and queries do not hang in them.

OpenMP's threads do not exist in a forked process, and a parallel region there would wait for them forever.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from tracin_ann import BuildConfig, build

PATIENCE = 120.0
# Before the fork, the threads of both libraries have started. The work of the child is large enough to use several
# threads. A child that hangs is detected by the timeout.
SCRIPT = """
import os, sys, torch
torch.set_num_threads(2)
import numpy as np
from torch.utils.data import DataLoader
from tracin_ann import InfluenceIndex, QueryOptions
from tracin_ann.device import import_faiss

faiss = import_faiss()
faiss.omp_set_num_threads(2)
rows = np.random.default_rng(0).random((20000, 64), dtype=np.float32)
index = InfluenceIndex.open(sys.argv[1])
ask = lambda: [index.query([0, 1], options=QueryOptions(search=search)) for search in ("lists", "scan")]
exhaustive = faiss.IndexFlatIP(64)
exhaustive.add(rows)
exhaustive.search(rows[:200], 5)
torch.randn(600, 600) @ torch.randn(600, 600)
expected = ask()

class Products:
    def __len__(self):
        return 8
    def __getitem__(self, i):
        exhaustive.search(rows[:200], 5)
        return torch.ones(600, 600) @ torch.full((600, 600), float(i)), index.view().take([i])

loaded = list(DataLoader(Products(), batch_size=2, num_workers=2, multiprocessing_context="fork"))
assert [float(batch[0][1, 0, 0]) for batch in loaded] == [600.0, 1800.0, 3000.0, 4200.0]
child = os.fork()
if child == 0:
    os._exit(0 if ask() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
assert faiss.omp_get_max_threads() == torch.get_num_threads() == 2
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_loaders_and_queries_do_not_hang_after_a_search(tmp_path: Path) -> None:
    folder = tmp_path / "mlp"
    folder.mkdir()
    zoo.save_checkpoints("mlp", 0, folder)
    config = BuildConfig(dim=64, index="ivf", batch_size=4, device="cpu")
    build(f"{zoo.__file__}:task", folder / "index", config, arguments={"case": "mlp", "folder": str(folder)})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "index")],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr[-2000:]
