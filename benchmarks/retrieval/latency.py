"""Time of queries through the public interface on default indexes, and of each stage, by model and number of rows.

Each case is a default build with D = 256 and 3 checkpoints. A whole query is one call of `InfluenceIndex.query` with
ids that were not used before. Its stages run in the same rounds on the same ids: features on loaded models, the search
kernel, the rows of the candidates, and their scores in memory. Results of several runs are merged into one file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.common.paths import RESULTS, ROOT
from benchmarks.common.results import describe_environment, read_results, write_results
from benchmarks.retrieval import latency_tasks, stages
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build

RESULT = "latency"
CASES = [f"{model}:{rows}" for model in latency_tasks.SUBJECTS for rows in (100_000, 400_000, 1_000_000)]
COUNTS = (1, 10, 100, 1000)
"""Numbers of queries in one call."""
TAKES = (40, 200)
_SEARCHES = ("lists", "scan")
_EXACT_COUNTS = (1, 100)
_LEAST_ROUNDS = 2
"""Rounds of a call that exceeds its share of the time; the first round is not counted."""
_MEMORY_BYTES = 1 << 30
Result = TypeVar("Result")


@dataclass
class Clock:
    """Times of calls by name. A call is repeated until it has used its share of the time."""

    seconds: float
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def is_open(self, name: str) -> bool:
        """Return whether the call may run again: by its shortest time, so that a slow moment does not end it."""
        times = self.times[name]
        return len(times) < _LEAST_ROUNDS or len(times) * min(times) < self.seconds

    def time(self, name: str, call: Callable[[], Result]) -> Result:
        """Run the call, and record its time."""
        start_s = time.perf_counter()
        result = call()
        self.times[name].append(time.perf_counter() - start_s)
        return result

    def summarise(self) -> dict[str, dict[str, float]]:
        """Return the median, the 90th percentile and the number of times of each call, without its first one."""
        return {name: summarise(times[1:]) for name, times in self.times.items() if len(times) > 1}


def summarise(times: list[float]) -> dict[str, float]:
    """Return the median, the 90th percentile and the number of some times."""
    return {"median": float(np.median(times)), "p90": float(np.percentile(times, 90)), "calls": len(times)}


@dataclass
class QueryIds:
    """Positions of queries; each is drawn once, until all have been drawn."""

    order: np.ndarray
    drawn: int = 0

    def draw(self, count: int) -> list[int]:
        places = np.arange(self.drawn, self.drawn + count) % len(self.order)
        self.drawn += count
        return self.order[places].tolist()  # type: ignore[no-any-return]


def measure_batch(parts: stages.Stages, ids: QueryIds, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return times of calls with `count` queries: whole queries, and their stages in the same rounds."""
    index, clock, plain = parts.index, Clock(options.seconds), QueryOptions()
    searches = _SEARCHES if stages.has_lists(index) else ("scan",)
    kinds = [("auto", "stored"), *((search, "stored") for search in searches)]
    kinds += [(search, "exact") for search in searches if count in _EXACT_COUNTS and options.exact]
    how, scored = "", []
    for _ in range(max(_LEAST_ROUNDS, options.rounds if count == 1 else options.rounds // 5)):
        for search, rerank in kinds:
            name = f"whole {search} {rerank}"
            if clock.is_open(name):
                chosen, queries = stages.with_search(plain, search, rerank), ids.draw(count)
                answers = clock.time(name, lambda q=queries, o=chosen: index.query(q, options=o))
                if search == "auto":
                    how = answers[0].how
                    scored += [answer.rows_scored / 2 / len(index) for answer in answers]
        queries = ids.draw(count)
        if not clock.is_open("features"):
            continue
        feature_QF = clock.time("features", lambda q=queries: parts.compute_features(q))
        for search in searches:
            if clock.is_open(f"kernel {search}"):
                # In another order, because the index keeps the reduction of the queries that it measured last.
                at = parts.choose_search(feature_QF[::-1], stages.with_search(plain, search, "stored"))
                measure_stages(parts, at, feature_QF, clock, search)
    times = clock.summarise()
    result = {"queries": count, "how": how, "found_by": stages.read_search(how), "scored": float(np.mean(scored))}
    result |= {"estimates": stages.read_estimates(how), "times": times}
    print(f"{count} queries:", {name: round(1e3 * figures["median"], 2) for name, figures in times.items()}, flush=True)
    return result | {"derived": {search: derive(times, search) for search in searches}}


def measure_stages(parts: stages.Stages, at: Any, feature_QF: np.ndarray, clock: Clock, search: str) -> None:
    """Time the search kernel, and the rows and scores of the candidates that it finds."""
    found = clock.time(f"kernel {search}", lambda: parts.search(at, feature_QF, QueryOptions().k))
    rows = clock.time(f"take {search}", lambda: parts.read_rows(found))
    clock.time(f"scores {search}", lambda: stages.score_rows(rows, feature_QF))


def derive(times: dict[str, dict[str, float]], search: str) -> dict[str, float]:
    """Return the whole query relative to its features, and to its features, search kernel and scores in memory."""
    whole, bare = times[f"whole {search} stored"]["median"], times["features"]["median"]
    figures = {"whole/features": whole / bare, "whole - 1.5 features": whole - 1.5 * bare}
    needed = bare + times[f"kernel {search}"]["median"] + times[f"scores {search}"]["median"]
    return {**figures, "whole/needed": whole / needed}


def measure_takes(index: InfluenceIndex, rounds: int) -> dict[str, dict[str, float]]:
    """Return times of `take` of random rows, other rows in each round."""
    view, random, clock = index.view(), np.random.default_rng(3), Clock(np.inf)
    for _ in range(rounds + 1):
        for count in TAKES:
            rows = random.integers(0, len(index), count)
            clock.time(str(count), lambda r=rows: view.take(r))
    return clock.summarise()


def measure_memory_read(n_bytes: int, rounds: int = 5) -> float:
    """Return the median seconds of reading this many bytes of memory, by the sum of 64-bit integers."""
    buffer, times = torch.ones(min(n_bytes, _MEMORY_BYTES) // 8, dtype=torch.int64), []
    for _ in range(rounds):
        start_s = time.perf_counter()
        for at in range(0, n_bytes, _MEMORY_BYTES):
            buffer[: (n_bytes - at) // 8].sum()
        times.append(time.perf_counter() - start_s)
    return float(np.median(times))


def read_process() -> dict[str, float]:
    """Return the memory of this process in MB: private, of mapped files, and the peak of both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    fields = {"private_mb": "RssAnon", "files_mb": "RssFile", "peak_mb": "VmHWM"}
    return {name: int(values[key].split()[0]) / 1e3 for name, key in fields.items()}


def measure_process(index: InfluenceIndex, ids: QueryIds, queries: int) -> dict[str, Any]:
    """Return the memory before and after many single queries, and the largest number of threads during them."""
    finished, most = threading.Event(), 0

    def count_threads() -> None:
        nonlocal most
        while not finished.wait(0.002):
            most = max(most, len(os.listdir("/proc/self/task")) - 1)

    counter = threading.Thread(target=count_threads)
    before = read_process()
    counter.start()
    try:
        for _ in range(queries):
            index.query(ids.draw(1))
    finally:
        finished.set()
        counter.join()
    return {"queries": queries, "before": before, "after": read_process(), "peak_threads": most}


def measure_commands(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the time and peak memory of `query.py --ids I`, and the time of a process that only imports torch."""
    commands = {"import torch": ["-c", "import torch"], "query.py": ["query.py", str(directory), "--ids"]}
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(ROOT)}
    clock, peak_kb = Clock(np.inf), 0
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for number in range(options.commands + 1):
        for name, arguments in commands.items():
            line = [sys.executable, *arguments, *([str(number)] if name == "query.py" else [])]

            def run(line: list[str] = line) -> int:
                with subprocess.Popen(line, cwd=ROOT, env=environment, **quiet) as process:
                    _, status, usage = os.wait4(process.pid, 0)
                    process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    raise SystemExit(f"{line} failed with status {process.returncode}")
                return usage.ru_maxrss

            memory_kb = clock.time(name, run)
            peak_kb = max(peak_kb, memory_kb) if name == "query.py" else peak_kb
    return {**clock.summarise(), "peak_mb": peak_kb / 1e3}


def build_index(model: str, rows: int, folder: Path) -> tuple[Path, float | None]:
    """Return a default index and the seconds of its build; None if it existed."""
    place = folder / model
    latency_tasks.prepare(model, rows, place)
    directory = place / f"index-{rows}"
    if (directory / "manifest.json").exists():
        return directory, None
    task = f"{Path(latency_tasks.__file__).relative_to(ROOT)}:task"
    arguments = {"model": model, "rows": str(rows), "folder": str(place)}
    start_s = time.perf_counter()
    build(task, directory, BuildConfig(dim=256), arguments=arguments)
    return directory, time.perf_counter() - start_s


def measure_case(model: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one index."""
    directory, build_s = build_index(model, rows, Path(options.folder))
    print(f"{model}:{rows}:", "index reused" if build_s is None else f"built in {build_s:.0f} s", flush=True)
    ids = QueryIds(np.random.default_rng(4).permutation(latency_tasks.QUERY_ROWS))
    clock = Clock(np.inf)
    index = clock.time("open", lambda: InfluenceIndex.open(directory))
    clock.time("first query", lambda: index.query(ids.draw(1)))
    first = {name: times[0] for name, times in clock.times.items()}
    result: dict[str, Any] = {"model": model, "rows": rows, **stages.describe_index(index), "build_s": build_s}
    result |= {"recall": stages.read_expected_recall(index), "first": first}
    with stages.open_stages(index) as parts:
        # All counts run once: later rounds use verified gradient engines and files in memory.
        for count in (1, min(options.counts[-1], 100)):
            index.query(ids.draw(count))
            parts.compute_features(ids.draw(count))
        result["process"] = measure_process(index, ids, options.many)
        result["batches"] = [measure_batch(parts, ids, count, options) for count in options.counts]
    result["takes"] = measure_takes(index, options.rounds)
    stored_bytes = stages.count_stored_bytes(index)
    result |= {"stored_bytes": stored_bytes, "memory_read_s": measure_memory_read(stored_bytes)}
    result["commands"] = measure_commands(directory, options)
    result["environment"] = describe_environment()
    return result


def merge(results: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results with a new one, which replaces that of the same model and number of rows."""
    by_case = {(r["model"], r["rows"]): r for r in [*results, new]}
    models = list(latency_tasks.SUBJECTS)
    return [by_case[case] for case in sorted(by_case, key=lambda case: (models.index(case[0]), case[1]))]


def read_earlier() -> Iterator[dict[str, Any]]:
    """Yield the results of earlier runs."""
    if (RESULTS / f"{RESULT}.json").exists():
        yield from read_results(RESULT)["results"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=CASES, help="cases to run, as MODEL:ROWS", metavar="MODEL:ROWS")
    parser.add_argument("--folder", help="folder of data and indexes, which are reused; default: a temporary folder")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="numbers of queries in one call")
    parser.add_argument("--rounds", type=int, default=60, help="single queries of each kind")
    parser.add_argument("--seconds", type=float, default=20, help="time after which a kind of call is not repeated")
    parser.add_argument("--many", type=int, default=500, help="queries during which memory and threads are measured")
    parser.add_argument("--commands", type=int, default=5, help="runs of query.py")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="time exact re-scoring")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--fresh", action="store_true", help="leave out the results of earlier runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stages.set_faiss_threads(options.threads)
    os.chdir(ROOT)
    results = [] if options.fresh else list(read_earlier())
    settings = {key: value for key, value in vars(options).items() if key not in ("folder", "only", "fresh")}
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = str(Path(options.folder or temporary).resolve())
        for case in options.only:
            model, _, rows = case.partition(":")
            result = measure_case(model, int(rows), options)
            print(result, flush=True)
            results = merge(results, result)
            path = write_results(RESULT, settings, results)
    print(path)


if __name__ == "__main__":
    main()
