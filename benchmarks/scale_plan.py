"""Plan of builds up to a billion rows: time, machines, memory, disk and cost, simulated with measured constants.

A build is a set of units of work, one for each partition and checkpoint. Workers take one unit after the other; a unit
of a worker that fails is computed again. One machine then builds the inverted lists, calibrates and publishes. Costs
that depend on N follow the number of operations, with factors fitted to measured sizes. `--measure` builds indexes of
growing size on this machine, fits the factors to the small ones, and predicts the others.
"""

from __future__ import annotations

import argparse
import heapq
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from torch.nn import functional as F

from benchmarks.common.markdown import Row, format_table
from benchmarks.common.results import read_results, write_results
from tracin_ann import BuildConfig, Checkpoint, Task, build
from tracin_ann.search import IVFParams
from tracin_ann.store import choose_partition_rows

RESULT = "scale_plan"
SIZES = (25_000, 50_000, 100_000, 400_000)
_FITTED = 3
"""So many of the smallest sizes determine the factors; the others are predicted."""
_CHECKPOINTS, _DIM = 3, 256
_HOUR = 3600.0
_DAY = 24 * _HOUR
_COUNTS = tuple(dict.fromkeys(round(2 ** (i / 2)) for i in range(25)))


@dataclass(frozen=True)
class Factors:
    """Factors of the costs on one machine.

    Attributes:
        start: seconds until a worker computes its first unit.
        row: seconds of the features of a row at a checkpoint, with their files.
        finish: seconds of calibration, estimate of fidelity and audit: fixed, and per row.
        lists: seconds of building lists: fixed, per row, and per comparison of a row with a centroid.
        list_bytes: bytes of lists: per row, and per list.
        query: seconds of one query in lists: fixed, and per √N.
        scan: seconds of one query by an exact scan, per row.
    """

    start: float
    row: float
    finish: tuple[float, float]
    lists: tuple[float, float, float]
    list_bytes: tuple[float, float]
    query: tuple[float, float]
    scan: float


@dataclass(frozen=True)
class Machines:
    """A cluster of equal machines with a shared file system. The defaults are assumptions.

    Attributes:
        count: number of machines, each with one worker.
        disk: bytes per second that the shared file system reads and writes for all machines.
        network: bytes per second of a machine.
        failures: failures of a worker per hour.
        restart: seconds from a failure to the first unit of the next worker.
        price: of a machine for an hour.
    """

    count: int
    disk: float = 1e9
    network: float = 1e9
    failures: float = 0.01
    restart: float = 120.0
    price: float = 0.10


@dataclass(frozen=True)
class Job:
    """The rows to build an index of; `example_bytes` are read for each row and checkpoint."""

    rows: int
    checkpoints: int
    dim: int
    example_bytes: int = 3_000

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row in the feature files: float16 numbers, exponent, loss and squared norm."""
        return self.checkpoints * (2 * self.dim + 2 + 4 + 4)


@dataclass(frozen=True)
class Plan:
    """The result of a simulation.

    Attributes:
        machines: that compute features.
        features_s, lists_s, finish_s: wall seconds of the parts of a build.
        repeated: units that were computed again.
        memory: bytes of the lists, which the machine that finishes the build has in memory.
        disk: bytes of all files.
        query_s: seconds to search the lists for a query in both directions, on one machine.
        cost: machine hours times the price.
    """

    machines: int
    features_s: float
    lists_s: float
    finish_s: float
    repeated: int
    memory: float
    disk: float
    query_s: float
    cost: float

    @property
    def wall_s(self) -> float:
        """Return the wall seconds of the build."""
        return self.features_s + self.lists_s + self.finish_s


def simulate(job: Job, factors: Factors, machines: Machines, seed: int = 0) -> Plan:
    """Return the plan of a job; failures are drawn from an exponential distribution."""
    features_s, repeated = simulate_features(job, factors, machines, seed)
    n_lists = IVFParams().count_lists(job.rows)
    fixed, row, comparison = factors.lists
    lists_s = fixed + row * job.rows + comparison * count_comparisons(job.rows, n_lists)
    # The rows are read twice, and once more for the calibration.
    read_s = job.rows * job.row_bytes / min(machines.disk, machines.network)
    lists_s = max(lists_s, 2 * read_s)
    finish_s = max(factors.finish[0] + factors.finish[1] * job.rows, read_s)
    lists_bytes = factors.list_bytes[0] * job.rows + factors.list_bytes[1] * n_lists
    return Plan(
        machines=machines.count,
        features_s=features_s,
        lists_s=lists_s,
        finish_s=finish_s,
        repeated=repeated,
        memory=lists_bytes,
        disk=job.rows * job.row_bytes + lists_bytes,
        query_s=factors.query[0] + factors.query[1] * math.sqrt(job.rows),
        cost=machines.price * (machines.count * features_s + lists_s + finish_s) / _HOUR,
    )


def simulate_features(job: Job, factors: Factors, machines: Machines, seed: int) -> tuple[float, int]:
    """Return the wall seconds until all units are computed, and the number of units that were computed again."""
    random = np.random.default_rng(seed)
    partition = choose_partition_rows(job.rows)
    n_partitions = -(-job.rows // partition)
    sizes = [min(partition, job.rows - i * partition) for i in range(n_partitions)] * job.checkpoints
    bandwidth = min(machines.network, machines.disk / machines.count)
    moved = job.example_bytes + job.row_bytes / job.checkpoints
    seconds_per_row = max(factors.row, moved / bandwidth)
    free = [factors.start] * min(machines.count, len(sizes))
    next_failure = [_draw_failure(random, machines) for _ in free]
    workers = [(at, i) for i, at in enumerate(free)]
    heapq.heapify(workers)
    repeated, end = 0, 0.0
    while sizes:
        at, worker = heapq.heappop(workers)
        done = at + sizes[-1] * seconds_per_row
        if next_failure[worker] < done:
            repeated += 1
            at = max(at, next_failure[worker]) + machines.restart
            next_failure[worker] = at + _draw_failure(random, machines)
        else:
            sizes.pop()
            at = done
            end = max(end, done)
        heapq.heappush(workers, (at, worker))
    return end, repeated


def _draw_failure(random: np.random.Generator, machines: Machines) -> float:
    return float(random.exponential(_HOUR / machines.failures)) if machines.failures else math.inf


def count_comparisons(n_rows: int, n_lists: int) -> float:
    """Return the comparisons of rows with centroids to train lists and to fill them.

    There are 4·√L groups. k-means runs for 8 iterations over 16 rows per list, first for groups and then for the lists
    of each group. A row is compared with the groups and with the lists of its 3 nearest groups.
    """
    groups = 4 * math.sqrt(n_lists)
    in_group = n_lists / groups
    return 8 * 16 * n_lists * (groups + in_group) + n_rows * (groups + 3 * in_group)


def fit_lists(points: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Return the factors of building lists by (rows, seconds) of at least three sizes."""
    terms = [(1.0, n, count_comparisons(n, IVFParams().count_lists(n))) for n, _ in points]
    return _fit(terms, [seconds for _, seconds in points])  # type: ignore[return-value]


def _fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[float, ...]:
    """Return nonnegative factors of the terms for which relative errors are least."""
    matrix = np.array(terms, dtype=float) / np.array(values, dtype=float)[:, None]
    scale = matrix.max(axis=0)
    factors, _ = nnls(matrix / scale, np.ones(len(values)))
    return tuple((factors / scale).tolist())


def fit_search(n_fitted: int) -> Factors:
    """Return the factors of lists and queries by the smallest sizes of the retrieval benchmark; features are zero."""
    results = read_results("retrieval")["results"][:n_fitted]
    sizes = [result["rows"] for result in results]
    own = [result["sq8"] for result in results]
    singles = [_find_query_seconds(result) for result in results]
    bytes_per = _fit(
        [(n, o["lists"]) for n, o in zip(sizes, own, strict=True)],
        [n * o["bytes_a_row"] for n, o in zip(sizes, own, strict=True)],
    )
    query = _fit([(1.0, math.sqrt(n)) for n in sizes], singles)
    scan = _fit([(n,) for n in sizes], [o["times"]["scan of the files"]["batch"] for o in own])
    lists = fit_lists([(n, o["build_seconds"]) for n, o in zip(sizes, own, strict=True)])
    return Factors(0.0, 0.0, (0.0, 0.0), lists, bytes_per[:2], query[:2], scan[0])  # type: ignore[arg-type]


def _find_query_seconds(result: dict[str, Any]) -> float:
    """Return the seconds of a query in both directions, at a recall of .95."""
    return sum(result["sq8"]["times"][f"{side} 0.95"]["single"] for side in ("proponents", "opponents"))


@dataclass(frozen=True)
class Check:
    """A prediction beside the measurement of the same quantity, which no factor was fitted to."""

    what: str
    fitted: str
    unit: str
    predicted: float
    measured: float


def check_search() -> Iterator[Check]:
    """Yield the predictions for the largest size of the retrieval benchmark, by the factors of the others."""
    results = read_results("retrieval")["results"]
    factors, largest = fit_search(len(results) - 1), results[-1]
    n_rows, n_lists = largest["rows"], largest["sq8"]["lists"]
    where, fitted = f"{n_rows:,} rows", _describe_sizes(results[:-1])
    fixed, row, comparison = factors.lists
    predicted = fixed + row * n_rows + comparison * count_comparisons(n_rows, n_lists)
    yield Check(f"inverted lists of {where}", fitted, "s", predicted, largest["sq8"]["build_seconds"])
    predicted = factors.list_bytes[0] + factors.list_bytes[1] * n_lists / n_rows
    yield Check(f"bytes per row of lists, {where}", fitted, "B", predicted, largest["sq8"]["bytes_a_row"])
    predicted = factors.query[0] + factors.query[1] * math.sqrt(n_rows)
    yield Check(f"one query in lists, {where}", fitted, "s", predicted, _find_query_seconds(largest))
    measured = largest["sq8"]["times"]["scan of the files"]["batch"]
    yield Check(f"one query of a batch by a scan, {where}", fitted, "s", factors.scan * n_rows, measured)


def check_builds(builds: Sequence[dict[str, Any]]) -> Iterator[Check]:
    """Yield the predictions for complete builds: the larger ones of these, and those of the latency benchmark."""
    factors = fit_builds(builds[:_FITTED])
    fitted = _describe_sizes(builds[:_FITTED])
    own = [("MLP", b["rows"], b["features_s"], sum(b[part] for part in _PARTS)) for b in builds[_FITTED:]]
    for name, rows, features_s, seconds in own:
        plan = simulate(Job(rows, _CHECKPOINTS, _DIM, 0), factors, _THIS_MACHINE)
        yield Check(f"features of {name}, {rows:,} rows × {_CHECKPOINTS}", fitted, "s", plan.features_s, features_s)
        yield Check(f"build of {name}, {rows:,} rows × {_CHECKPOINTS}", fitted, "s", plan.wall_s, seconds)
    for case in read_results("latency")["results"]:
        if case["build_s"] is None:
            continue
        model = {"MLP": factors, "CNN": replace(factors, row=find_row_seconds("MNIST CNN"))}[case["model"]]
        job = Job(case["rows"], case["n_checkpoints"], case["dim"], 0)
        what = f"build of {case['model']}, {job.rows:,} rows × {job.checkpoints}, another day"
        source = fitted if case["model"] == "MLP" else f"{fitted}, speed benchmark"
        yield Check(what, source, "s", simulate(job, model, _THIS_MACHINE).wall_s, case["build_s"])


def _describe_sizes(results: Sequence[dict[str, Any]]) -> str:
    return f"{results[0]['rows']:,} to {results[-1]['rows']:,} rows"


_THIS_MACHINE = Machines(1, disk=math.inf, network=math.inf, failures=0.0)
_PARTS = ("start_s", "features_s", "index_s", "rest_s")


def find_row_seconds(model: str) -> float:
    """Return the seconds of the features of a row of a model in the speed benchmark."""
    results = read_results("features")["results"]
    return next(float(row["row_us"]) / 1e6 for row in results if row["model"] == model)


def fit_builds(builds: Sequence[dict[str, Any]]) -> Factors:
    """Return the factors by measured builds."""
    units = [b["rows"] * _CHECKPOINTS for b in builds]
    (row,) = _fit([(n,) for n in units], [b["features_s"] for b in builds])
    start = float(np.median([b["start_s"] for b in builds]))
    search = fit_search(len(read_results("retrieval")["results"]))
    finish = _fit([(1.0, b["rows"]) for b in builds], [b["rest_s"] for b in builds])
    return replace(search, start=start, row=row, finish=finish[:2])  # type: ignore[arg-type]


def make_task(n_rows: int, folder: Path) -> Task:
    """Return a task of an MLP with random weights over clustered points."""
    random = torch.Generator().manual_seed(0)
    cluster_N = torch.randint(0, 40, (n_rows,), generator=random)
    points = 2 * torch.randn(40, 32, generator=random)[cluster_N] + torch.randn(n_rows, 32, generator=random)
    rows = torch.utils.data.TensorDataset(points, cluster_N % 10)
    checkpoints = []
    for number in range(_CHECKPOINTS):
        torch.manual_seed(number)
        torch.save(_make_mlp().state_dict(), folder / f"{number}.pt")
        checkpoints.append(Checkpoint(str(folder / f"{number}.pt"), learning_rate=0.1))
    return Task(
        model=_make_mlp,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        train_data=lambda: rows,
        query_data=lambda: torch.utils.data.Subset(rows, range(100)),
        checkpoints=checkpoints,
    )


def _make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def measure_build(n_rows: int) -> dict[str, Any]:
    """Return the seconds of the parts of a build with inverted lists."""
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(n_rows, Path(folder))
        stages: list[tuple[str, float]] = []

        def note(stage: str, done: int, total: int) -> None:
            stages.append((stage, time.perf_counter()))

        began = time.perf_counter()
        build(task, Path(folder) / "index", BuildConfig(dim=_DIM, index="ivf"), progress=note)
        end = time.perf_counter()
    features = [at for stage, at in stages if stage == "features"]
    lists = [at for stage, at in stages if stage == "index"]
    parts = (features[0] - began, features[-1] - features[0], lists[-1] - lists[0])
    return {"rows": n_rows, **dict(zip(_PARTS, (*parts, end - began - sum(parts)), strict=True))}


def choose_machines(job: Job, factors: Factors, limit_s: float) -> Plan:
    """Return the plan with the fewest machines of `_COUNTS` whose features take at most a time.

    Raises:
        ValueError: there is none.
    """
    for count in _COUNTS:
        plan = simulate(job, factors, Machines(count))
        if plan.features_s <= limit_s:
            return plan
    raise ValueError(f"the features of {job} take longer than {limit_s:,.0f} s with {_COUNTS[-1]:,} machines")


def make_plans(factors: Factors, row_seconds: dict[str, float], limit_s: float) -> Iterator[dict[str, Any]]:
    """Yield the plans of the table."""
    for model, seconds in row_seconds.items():
        for rows in (10**7, 10**8, 10**9):
            for checkpoints in (1, 3, 10):
                job = Job(rows, checkpoints, _DIM)
                plan = choose_machines(job, replace(factors, row=seconds), limit_s)
                yield {"model": model, **asdict(job), **asdict(plan), "wall_s": plan.wall_s}


def format_plans(plans: Iterable[dict[str, Any]]) -> str:
    """Return a table of plans."""
    rows: list[Row] = [
        ("rows × checkpoints", "model", "machines", "features", "lists, calibration", "memory", "disk", "query", "cost")
    ]
    for plan in plans:
        rows.append(
            (
                f"10<sup>{round(math.log10(plan['rows']))}</sup> × {plan['checkpoints']}",
                plan["model"],
                f"{plan['machines']:,}",
                f"{plan['features_s'] / _HOUR:.1f} h",
                f"{(plan['lists_s'] + plan['finish_s']) / _HOUR:.1f} h",
                f"{plan['memory'] / 1e9:,.0f} GB",
                f"{plan['disk'] / 1e12:.2f} TB",
                f"{1e3 * plan['query_s']:.0f} ms",
                f"{plan['cost']:,.1f} $",
            )
        )
    return format_table(*rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="build indexes; otherwise their recorded times are used")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--days", type=float, default=1.0, help="the longest computation of features, in days")
    parser.add_argument("--row-us", type=float, help="print plans for these microseconds per row and checkpoint")
    options = parser.parse_args()
    builds = [measure_build(n) for n in sorted(options.sizes)] if options.measure else _read_builds()
    factors = fit_builds(builds)
    limit_s = options.days * _DAY
    if options.row_us is not None:
        print(format_plans(make_plans(factors, {"yours": options.row_us / 1e6}, limit_s)))
        return
    checks = [asdict(check) for check in (*check_search(), *check_builds(builds))]
    for check in checks:
        print(f"{check['what']}: predicted {check['predicted']:.4g}, measured {check['measured']:.4g} {check['unit']}")
    models = {name: find_row_seconds(name) for name in ("MNIST CNN", "GPT 4x128")}
    plans = list(make_plans(factors, models, limit_s))
    settings = {"days": options.days, "dim": _DIM, "machines": asdict(Machines(1)), "threads": torch.get_num_threads()}
    results = {"builds": builds, "factors": asdict(factors), "checks": checks, "plans": plans}
    print(write_results(RESULT, settings, results))


def _read_builds() -> list[dict[str, Any]]:
    builds: list[dict[str, Any]] = read_results(RESULT)["results"]["builds"]
    return builds


if __name__ == "__main__":
    main()
