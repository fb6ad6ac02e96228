"""Recall of the stored and of the true ranking, cost and growth of every index kind and of other libraries, by model.

Reads the rows, queries and true scores that benchmarks.retrieval.rows wrote; a size of N uses the first N rows. Recall
is measured against the exact scan of the stored rows, with scores recomputed from them. The true ten are the rows of
the ten largest TracIn scores over all parameters; their share among the first M candidates is the recall after these
are re-ranked exactly. Times are medians of interleaved rounds in one process, for both directions. A size of a model
that is measured again replaces its earlier figures in the result file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.results import describe_environment, read_results, write_results
from benchmarks.retrieval.lists import CPU, SIDES, TARGETS, First, read_rows, scan_memory, time_searches
from benchmarks.retrieval.rivals import RIVALS, is_installed
from benchmarks.retrieval.stages import set_faiss_threads
from tracin_ann.search import NAMES, FlatIndex, IndexRequest, build_index, choose_index, diagnose
from tracin_ann.store import FeatureStore
from tracin_ann.store.manifest import FEATURES, Manifest
from tracin_ann.types import Float32, Int64

RESULT = "retrieval_families"
K = 10
DEPTHS = (10, 100, 1000)
KINDS = tuple(kind for kind in NAMES if kind != "flat")
SIZES = (25_000, 50_000, 100_000, 200_000, 400_000, 1_000_000)
_ENOUGH = 0.985
"""Settings of higher cost are not measured after one with this recall."""
_TIE = 1e-6


@dataclass(frozen=True)
class Family:
    """Rows, queries [Q, F] and, where they were computed, true scores [Q', N'] of the first queries and rows."""

    name: str
    rows: First
    queries: Float32
    true: Float32 | None


@dataclass(frozen=True)
class Method:
    """A built index of the library, or one of another library.

    Attributes:
        propose: yields rounds of settings of increasing budget; its argument returns the recall of a setting.
        search: returns the ids of k rows for each query, best first, and the mean number of rows scored; its arguments
            are queries, times the sign of the direction, k and the setting.
        search_both: searches with the settings of proponents and opponents.
    """

    name: str
    is_rival: bool
    build_seconds: float
    bytes_a_row: float
    propose: Callable[[Callable[[Any], float]], Iterable[Sequence[Any]]]
    search: Callable[..., tuple[Sequence[Int64], float]]
    search_both: Callable[[Float32, int, tuple[Any, Any]], Any]


def make_own(name: str, rows: First) -> Method:
    """Build an index kind of the library."""
    with tempfile.TemporaryDirectory() as folder:
        request = IndexRequest(0, "sq8", CPU, Path(folder), ())
        start_s = time.perf_counter()
        index = build_index(name, rows, request, lambda done, total: None)
        seconds = time.perf_counter() - start_s

    def search(signed: Float32, k: int, setting: Any) -> tuple[Sequence[Int64], float]:
        top = index.with_settings(setting).search(signed, k)
        return top.ids, float(top.rows_scored.mean())

    def search_both(queries: Float32, k: int, chosen: tuple[Any, Any]) -> Any:
        return index.with_settings(*chosen).search_both(queries, k)

    return Method(name, False, seconds, index.resident_bytes / len(rows), index.propose_settings, search, search_both)


def make_rival(name: str, row_NF: Float32) -> Method:
    """Build an index of another library."""
    start_s = time.perf_counter()
    rival = RIVALS[name](row_NF)
    seconds = time.perf_counter() - start_s

    def propose(_: Callable[[Any], float]) -> Iterator[Sequence[int]]:
        yield from ([setting] for setting in rival.settings)

    def search_both(queries: Float32, k: int, chosen: tuple[Any, Any]) -> Any:
        return [rival.search(sign * queries, k, setting) for (_, sign), setting in zip(SIDES, chosen, strict=True)]

    return Method(rival.name, True, seconds, rival.bytes_a_row, propose, rival.search, search_both)


@dataclass(frozen=True)
class Truth:
    """What one direction's results are compared with.

    Attributes:
        signed_QF: the queries, times the sign of the direction.
        row_NF: the rows.
        last_Q: the tenth best inner product of a stored row with each query.
        true_QK: the ids of the true ten of the first Q' queries, or None.
    """

    signed_QF: Float32
    row_NF: Float32
    last_Q: Float32
    true_QK: Int64 | None

    def measure(self, found: Sequence[Int64]) -> dict[str, float]:
        """Return recall@10 of the stored ranking: its mean, standard error and 10th percentile; ties count as found."""
        recall_Q = np.empty(len(found))
        for at, (ids, query_F) in enumerate(zip(found, self.signed_QF, strict=True)):
            last = self.last_Q[at]
            recall_Q[at] = (self.row_NF[ids[:K]] @ query_F >= last - _TIE * abs(last)).sum() / K
        error = recall_Q.std(ddof=1) / np.sqrt(len(recall_Q))
        return {"recall": float(recall_Q.mean()), "error": float(error), "p10": float(np.percentile(recall_Q, 10))}

    def measure_true(self, search: Callable[[Float32, int], Sequence[Int64]]) -> list[float] | None:
        """Return the share of the true ten among the first candidates of a search, at each of `DEPTHS`."""
        if self.true_QK is None:
            return None
        found = search(self.signed_QF[: len(self.true_QK)], DEPTHS[-1])
        pairs = list(zip(found, self.true_QK, strict=True))
        return [float(np.mean([np.isin(true_K, ids[:depth]).mean() for ids, true_K in pairs])) for depth in DEPTHS]


def make_truths(family: Family, flat: FlatIndex, row_NF: Float32) -> dict[str, Truth]:
    """Return the truth by direction; true scores that do not cover all rows are not used."""
    top = flat.search_both(family.queries, K)
    has_true = family.true is not None and family.true.shape[1] >= len(row_NF)
    truths = {}
    for (side, sign), found in zip(SIDES, top, strict=True):
        signed_QF = np.ascontiguousarray(np.float32(sign) * family.queries)
        pairs = zip(found.ids, signed_QF, strict=True)
        last_Q = np.array([(row_NF[ids] @ query_F).min() for ids, query_F in pairs], np.float32)
        true_QK = None
        if has_true:
            scores_QN = sign * family.true[:, : len(row_NF)]
            true_QK = np.argpartition(-scores_QN, K, axis=1)[:, :K]
        truths[side] = Truth(signed_QF, row_NF, last_Q, true_QK)
    return truths


def measure_points(method: Method, truth: Truth) -> list[dict[str, Any]]:
    """Return recall and scored rows at the settings, until the recall is (nearly) complete."""

    def measure(setting: Any) -> dict[str, Any]:
        found, scored = method.search(truth.signed_QF, K, setting)
        return {"setting": setting} | truth.measure(found) | {"scored": scored}

    points: list[dict[str, Any]] = []
    for settings in method.propose(lambda setting: measure(setting)["recall"]):
        points += map(measure, settings)
        if points[-1]["recall"] > _ENOUGH:
            break
    return points


def choose_point(points: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Return the point that reaches a recall with the fewest scored rows; if none does, the one of highest recall."""
    sufficient = [point for point in points if point["recall"] >= target]
    return min(sufficient or [max(points, key=lambda p: p["recall"])], key=lambda p: p["scored"])


def describe_rows(rows: First, row_NF: Float32) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the diagnosis of the rows with quantiles of their norms over the median, and the kinds chosen by it."""
    diagnosis = diagnose(rows, np.arange(len(rows)), 0)
    choices = choose_index("auto", len(rows), rows.dim, lambda: diagnosis)
    norm_N = np.sqrt(np.einsum("nf,nf->n", row_NF, row_NF))
    quantiles = np.quantile(norm_N, [0.1, 0.9, 1.0]) / np.median(norm_N)
    norms = {f"norm_{name}": float(value) for name, value in zip(("p10", "p90", "max"), quantiles, strict=True)}
    return dataclasses.asdict(diagnosis) | norms, tuple(choice.kind for choice in choices)


def measure_method(method: Method, truths: dict[str, Truth]) -> dict[str, Any]:
    """Return the figures of an index except times: the chosen points by target and direction."""
    points = {side: measure_points(method, truth) for side, truth in truths.items()}
    figures: dict[str, Any] = {"method": method.name, "is_rival": method.is_rival}
    figures |= {"build_seconds": method.build_seconds, "bytes_a_row": method.bytes_a_row}
    for target in TARGETS:
        figures[f"at_{target}"] = {side: dict(choose_point(points[side], target)) for side in points}
    for side, point in figures[f"at_{TARGETS[0]}"].items():
        search = partial(method.search, setting=point["setting"])
        point["true"] = truths[side].measure_true(lambda q, k, search=search: search(q, k)[0])
    return figures


def measure_size(family: Family, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one number of rows."""
    rows, queries = family.rows, family.queries
    row_NF, flat = read_rows(rows), FlatIndex(rows, CPU)
    truths = make_truths(family, flat, row_NF)
    result: dict[str, Any] = {"family": family.name, "rows": len(rows), "dim": rows.dim, "queries": len(queries)}
    result["features"], result["auto"] = describe_rows(rows, row_NF)
    result["exact"] = {side: t.measure_true(lambda q, k: flat.search(q, k).ids) for side, t in truths.items()}
    result["methods"], depths = [], (K, DEPTHS[-1])
    searches: dict[str, Callable[[Float32], Any]] = {}
    for k in depths:
        searches[f"scan {k}"] = partial(scan_memory, row_NF, k=k)
    searches[f"flat {K}"] = partial(flat.search_both, k=K)
    makers: list[Callable[[], Method]] = [partial(make_own, kind, rows) for kind in options.kinds]
    if len(rows) <= options.rivals_rows:
        makers += [partial(make_rival, rival, row_NF) for rival in options.rivals if is_installed(rival)]
    for make in makers:
        method = make()
        figures = measure_method(method, truths)
        chosen = tuple(point["setting"] for point in figures[f"at_{TARGETS[0]}"].values())
        for k in depths:
            searches[f"{method.name} {k}"] = partial(method.search_both, k=k, chosen=chosen)
        result["methods"].append(figures)
        print(family.name, len(rows), json.dumps(figures, default=to_record), flush=True)
    result["times"] = time_searches(searches, queries)
    print(family.name, len(rows), result["times"], flush=True)
    return result | {"environment": describe_environment()}


def to_record(setting: Any) -> dict[str, Any]:
    """Return a setting as a JSON object."""
    return dataclasses.asdict(setting)


def open_family(name: str, folder: Path, n_queries: int) -> Family:
    """Return the rows, queries and true scores of a folder."""
    index, queries = (find_only(folder, pattern) for pattern in ("index-*", "queries*.npy"))
    true = sorted(folder.glob("true-*.npy"))
    layout = Manifest.read(index).build.layout
    view = FeatureStore(index / FEATURES, layout).view()
    query_QF = np.load(queries)[:n_queries].astype(np.float32)
    return Family(name, First(view, len(view)), query_QF, np.load(true[0], mmap_mode="r")[:n_queries] if true else None)


def find_only(folder: Path, pattern: str) -> Path:
    """Return the only path of a folder that matches a pattern."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} has {len(found)} entries {pattern}: expected one; run benchmarks.retrieval.rows")
    return found[0]


def read_earlier() -> list[dict[str, Any]]:
    """Return the results of earlier runs."""
    try:
        return list(read_results(RESULT)["results"])
    except FileNotFoundError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="+", help="models and the folders of their rows", metavar="NAME=FOLDER")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="numbers of rows; larger ones are ignored")
    parser.add_argument("--queries", type=int, default=1000, help="largest number of queries")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="index kinds to measure")
    parser.add_argument("--rivals", nargs="*", default=["faiss-ivf", "faiss-hnsw", "lorann", "rabitqlib"])
    parser.add_argument("--rivals-rows", type=int, default=100_000, help="largest number of rows for other libraries")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_faiss_threads(options.threads)
    results = read_earlier()
    settings = {key: value for key, value in vars(options).items() if key not in ("families", "rivals", "kinds")}
    for argument in options.families:
        name, _, folder = argument.partition("=")
        family = open_family(name, Path(folder), options.queries)
        for size in (size for size in options.sizes if size <= len(family.rows)):
            part = dataclasses.replace(family, rows=First(family.rows.view, size))
            results = [result for result in results if (result["family"], result["rows"]) != (name, size)]
            results.append(measure_size(part, options))
            path = write_results(RESULT, settings, json.loads(json.dumps(results, default=to_record)))
    print(path)


if __name__ == "__main__":
    main()
