"""Queries on GPUs, with CPU twins of FAISS's GPU classes: the choice of a search, and where answers come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_strategy import DIM, LISTS, ROWS, calibrated

import gpu_twins
from gpu_twins import TwinGpu
from tasks.toy import CONFIG, make_toy_task
from tracin_ann import InfluenceIndex, QueryOptions, build
from tracin_ann.scoring.strategy import choose_strategy
from tracin_ann.search import FlatIndex, GpuScan
from tracin_ann.search.calibration import Cost
from tracin_ann.search.gpu_scan import GpuRates, ScanRate
from tracin_ann.store import IndexRecord

CPU = torch.device("cpu")
FREE = ScanRate(0.0, 0.0, 0.0)


@pytest.mark.parametrize(("seconds", "chosen"), [(0.5, "exact scan"), (1.5, "inverted lists")])
def test_the_measured_rate_of_the_gpu_decides(seconds: float, chosen: str) -> None:
    """The calibration, which may be of another device, says that a scan takes 100 s and the lists 1 s."""
    record = IndexRecord("ivf", "", (), calibrated(Cost(0.0, 100.0), Cost(0.0, 1.0)), "sq8")
    rates = GpuRates(ScanRate(seconds, 0.0, 0.0), FREE, read=0.0, take=0.0)
    scan = GpuScan(FlatIndex(ROWS, CPU), (TwinGpu(0),), rates)
    strategy = choose_strategy(record, LISTS, scan, np.ones((1, DIM), np.float32), QueryOptions())
    assert strategy.how.startswith(chosen)
    assert f"exact scan {'500.0 ms' if seconds < 1 else '1.5 s'}" in strategy.how


def test_an_answer_tells_where_it_was_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_toy_task(tmp_path)
    build(task, tmp_path / "index", replace(CONFIG, yardstick=False))
    plain = InfluenceIndex.open(tmp_path / "index", task, device="cpu").query([0, 1])
    assert "scanned" not in plain[0].how
    gpu_twins.install(monkeypatch, (TwinGpu(0),))
    rates = GpuRates(ScanRate(1.0, 0.0, 0.0), FREE, read=0.0, take=0.0)
    monkeypatch.setattr("tracin_ann.search.gpu_scan.GpuScan._rates", rates)
    found = InfluenceIndex.open(tmp_path / "index", task, device="cpu").query([0, 1])
    for own, other in zip(found, plain, strict=True):
        assert own.how == f"{other.how}; scanned on cpu by FAISS, in float16 with exact scores of the candidates"
        for side in ("proponents", "opponents"):
            assert [hit.row for hit in getattr(own, side)] == [hit.row for hit in getattr(other, side)]
    assert gpu_twins.n_scans[0] == 1
