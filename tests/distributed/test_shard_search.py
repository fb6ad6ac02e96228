"""Queries over the shards of an index by worker processes, compared with the same index in one file and process."""

from __future__ import annotations

import csv
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from inline_workers import Inline
from shard_folder import QUERIES, ROWS, SHARDS
from tracin_ann import InfluenceIndex, ProcessLauncher, QueryOptions
from tracin_ann.cli.query import main
from tracin_ann.device import resolve_device
from tracin_ann.distributed import ShardOptions, ShardSearch, processes, shard_search
from tracin_ann.distributed.service import ServiceProcess
from tracin_ann.distributed.service_group import NoReplyError, ServiceGroup
from tracin_ann.errors import DamagedIndexError, UsageError, WorkerError
from tracin_ann.features import compatibility
from tracin_ann.results import Answer
from tracin_ann.scoring import Coverage, ranking
from tracin_ann.search import ListQuery

pytestmark = pytest.mark.xdist_group("shards")
OPTIONS = QueryOptions(k=5, search="index")
EXACT = replace(OPTIONS, rerank="exact", candidates=20)


def open_named(folder: Path, name: str, launcher: Any = None, options: ShardOptions | None = None) -> InfluenceIndex:
    """Open an index of the folder; its workers get one thread."""
    task = f"{folder}/shard_task.py:task"
    return InfluenceIndex.open(folder / name, task, device="cpu", launcher=launcher, shard_options=options)


@pytest.fixture(scope="module")
def single(folder: Path) -> InfluenceIndex:
    return open_named(folder, "single")


@pytest.fixture(scope="module")
def sharded(folder: Path) -> Iterator[InfluenceIndex]:
    with open_named(folder, "sharded", ProcessLauncher(["cpu"])) as index:
        yield index


def workers(index: InfluenceIndex) -> list[ServiceProcess]:
    search: Any = index._workers
    assert isinstance(search, ShardSearch)
    return [slot._worker for slot in search._group._slots]  # type: ignore[misc]


def kill(index: InfluenceIndex, shard: int) -> None:
    """Kill the worker of a shard, and wait until it has ended."""
    worker = workers(index)[shard]
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker._process.join()


def strip(answers: list[Answer]) -> list[Answer]:
    """Return the answers without how they were found."""
    return [replace(answer, how="", shards=(), missing_shards=()) for answer in answers]


def test_answers_are_those_of_one_file(single: InfluenceIndex, sharded: InfluenceIndex) -> None:
    expected = single.query(range(QUERIES), options=OPTIONS)
    found = sharded.query(range(QUERIES), options=OPTIONS)
    assert strip(found) == strip(expected)
    assert {(answer.shards, answer.missing_shards) for answer in found} == {((0, 1), ())}
    assert all("; 2 of 2 shards answered" in answer.how for answer in found)
    assert {answer.shards for answer in expected} == {()}
    assert max(answer.rows_scored for answer in found) < 2 * len(sharded)


def test_json_lines_name_the_shards(single: InfluenceIndex, sharded: InfluenceIndex) -> None:
    (line,) = sharded.query([0], options=OPTIONS).lines()
    assert line["shards"] == [0, 1] and "missing_shards" not in line
    (plain,) = single.query([0], options=OPTIONS).lines()
    assert line == plain | {"shards": [0, 1]}


def test_exact_scores_are_those_of_one_process(
    single: InfluenceIndex, sharded: InfluenceIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    for ids, together in (((3,), False), (range(8), True)):
        options = replace(EXACT, candidates=60)
        (expected,) = single.query(ids, options=options, together=together)
        with monkeypatch.context() as patched:
            patched.setattr(ranking, "make_exact_scorer", lambda *given: pytest.fail("scored in this process"))
            (found,) = sharded.query(ids, options=options, together=together, progress=lambda *at: seen.append(at))
        assert [hit.row for hit in found.hits] == [hit.row for hit in expected.hits]
        for hit, other in zip(found.hits, expected.hits, strict=True):
            assert hit.score == pytest.approx(other.score, rel=1e-5)
            assert hit.stored_score == other.stored_score
    assert all(stage == "exact scores" and done > 0 for stage, done, _ in seen) and seen


def test_exact_scores_of_many_rows_report_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, seen = QueryOptions(k=5, exact=True), []
    with open_named(folder, "sharded", Inline()) as index:
        (expected,) = index.query([3], options=options)
        monkeypatch.setattr(shard_search, "_EXACT_ROWS", 50)
        (found,) = index.query([3], options=options, progress=lambda *at: seen.append(at))
    assert [hit.row for hit in found.hits] == [hit.row for hit in expected.hits]
    assert [hit.score for hit in found.hits] == pytest.approx([hit.score for hit in expected.hits], rel=1e-5)
    assert seen == [("exact scores", 2 * done, 2 * ROWS) for done in range(100, ROWS + 1, 100)]


def test_examples_outside_the_index_are_scored_by_the_workers(single: InfluenceIndex, sharded: InfluenceIndex) -> None:
    examples = [single.runner.data("query")[i] for i in (4, 9, 11)]
    expected = single.query_examples(examples, EXACT, ids=[1, 2])
    found = sharded.query_examples(examples, EXACT, ids=[1, 2])
    for answer, other in zip(found, expected, strict=True):
        assert [hit.row for hit in answer.hits] == [hit.row for hit in other.hits]
        assert [hit.score for hit in answer.hits] == pytest.approx([hit.score for hit in other.hits], rel=1e-5)


def test_workers_on_other_machines_find_their_own_device(single: InfluenceIndex, folder: Path) -> None:
    launcher = Inline()
    with open_named(folder, "sharded", launcher) as index:
        (found,), (expected,) = (each.query([3], options=EXACT) for each in (index, single))
        assert [hit.row for hit in found.hits] == [hit.row for hit in expected.hits]
        assert [shard.task.options.device for shard in launcher.services] == [resolve_device()] * SHARDS


@pytest.mark.parametrize(
    ("memory_bytes", "is_local", "expected"),
    [(1001, True, 500), (1001, False, 1001), (None, True, 1000), (None, False, 2000)],
)
def test_workers_of_this_machine_share_the_memory_for_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int | None, is_local: bool, expected: int
) -> None:
    monkeypatch.setattr(compatibility, "free_memory_bytes", lambda device: 8000)
    launcher, task = Inline(is_local=is_local), f"{folder}/shard_task.py:task"
    with InfluenceIndex.open(folder / "sharded", task, device="cpu", memory_bytes=memory_bytes, launcher=launcher):
        runners = [shard.task.runner for shard in launcher.services]
        assert [runner._kept.memory_bytes for runner in runners] == [expected] * SHARDS


@pytest.mark.parametrize("name", ["sharded", "sharded-codes", "flat"])
def test_the_workers_of_an_index_that_is_not_closed_end_with_it(folder: Path, name: str) -> None:
    launcher = Inline()
    index = open_named(folder, name, launcher)
    index.query([0], options=replace(OPTIONS, search="auto"))
    gc.disable()
    try:
        assert launcher.stopped == set()
        del index
        assert launcher.stopped == {0, 1}
    finally:
        gc.enable()


def test_queries_of_a_closed_index_are_rejected(folder: Path) -> None:
    with open_named(folder, "sharded", Inline()) as index:
        pass
    with pytest.raises(UsageError, match="the index is closed: got a query, expected an open index"):
        index.query([0], options=OPTIONS)


def test_workers_use_the_devices_of_the_launcher_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(processes.ServiceProcess, "start", started.append)
    monkeypatch.setattr(processes, "resolve_device", lambda name: None)
    launcher = ProcessLauncher(["cuda:0", "cuda:1"])
    for number in range(3):
        launcher.start_service(lambda device: device, number)  # type: ignore[arg-type, return-value]
    assert (launcher.count_services(), [start() for start in started]) == (2, ["cuda:0", "cuda:1", "cuda:0"])


@pytest.mark.parametrize("launcher", ["ray", ["cpu", "cpu"], ProcessLauncher])
def test_what_is_no_launcher_is_rejected(launcher: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no launcher: got .*, expected an object such as ProcessLauncher"):
        InfluenceIndex.open(folder / "sharded", launcher=launcher)


def test_a_device_of_workers_that_does_not_exist_is_rejected(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no such GPU: got 'cuda:99', expected .*; use --device cpu"):
        InfluenceIndex.open(folder / "sharded", launcher=ProcessLauncher(["cuda:99"]))


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "5"])
def test_a_deadline_is_a_positive_number(deadline: Any) -> None:
    with pytest.raises(UsageError, match="bad --deadline"):
        ShardOptions(deadline)


def test_an_example_that_cannot_be_pickled_is_rejected(sharded: InfluenceIndex) -> None:
    class Label(int):
        """A class that pickle does not find."""

    row, label = sharded.runner.data("query")[4]
    with pytest.raises(UsageError, match=r"a query cannot be sent to workers.*Label.*or no workers"):
        sharded.query_examples([(row, Label(label))], EXACT)


def test_a_killed_worker_loses_no_query(single: InfluenceIndex, sharded: InfluenceIndex) -> None:
    expected = strip(single.query(range(QUERIES), options=OPTIONS))
    before = [worker.pid for worker in workers(sharded)]
    kill(sharded, 1)
    found = sharded.query(range(QUERIES), options=OPTIONS)
    assert strip(found) == expected
    assert {answer.missing_shards for answer in found} == {()}
    after = [worker.pid for worker in workers(sharded)]
    assert after[0] == before[0] and after[1] != before[1]


def test_several_threads_query(single: InfluenceIndex, sharded: InfluenceIndex) -> None:
    expected = strip(single.query(range(QUERIES), options=OPTIONS))
    found: list[list[Answer]] = []

    def query() -> None:
        found.append(strip(sharded.query(range(QUERIES), options=OPTIONS)))

    threads = [threading.Thread(target=query) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.slow
def test_a_worker_killed_during_queries_loses_none(single: InfluenceIndex, sharded: InfluenceIndex) -> None:
    expected = strip(single.query(range(QUERIES), options=OPTIONS))
    killed = threading.Event()

    def kill_soon() -> None:
        time.sleep(0.02)
        os.kill(workers(sharded)[1].pid or 0, signal.SIGKILL)
        killed.set()

    thread = threading.Thread(target=kill_soon)
    thread.start()
    while not killed.is_set():
        assert strip(sharded.query(range(QUERIES), options=OPTIONS)) == expected
    thread.join()
    assert strip(sharded.query(range(QUERIES), options=OPTIONS)) == expected


@pytest.mark.slow
def test_an_exact_query_survives_a_killed_worker(single: InfluenceIndex, sharded: InfluenceIndex) -> None:
    (expected,) = single.query([5], options=EXACT)
    kill(sharded, 0)
    (found,) = sharded.query([5], options=EXACT)
    assert [hit.row for hit in found.hits] == [hit.row for hit in expected.hits]


@pytest.mark.slow
def test_a_shard_that_hangs_is_missing_from_a_partial_answer(folder: Path) -> None:
    options = ShardOptions(deadline_s=5, allow_partial=True)
    with open_named(folder, "sharded", ProcessLauncher(["cpu"]), options) as index:
        complete = index.query(range(QUERIES), options=OPTIONS)
        os.kill(workers(index)[1].pid or 0, signal.SIGSTOP)
        partial = index.query(range(QUERIES), options=OPTIONS)
        assert {(answer.shards, answer.missing_shards) for answer in partial} == {((0,), (1,))}
        assert all("1 of 2 shards answered: partial results" in answer.how for answer in partial)
        line = partial.lines()[0]
        assert (line["shards"], line["missing_shards"]) == ([0], [1])
        lists: Any = index._loaded_index
        boundary = lists.lists.ranges[1][0]
        best = [[hit for hit in answer.hits if hit.row < boundary] for answer in complete]
        assert any(len(hits) < len(answer.hits) for hits, answer in zip(best, complete, strict=True))
        for answer, hits in zip(partial, best, strict=True):
            assert {hit.row for hit in hits} <= {hit.row for hit in answer.hits}
            assert max(hit.row for hit in answer.hits) < boundary


@pytest.mark.slow
def test_a_missing_shard_is_an_error_unless_partial_answers_are_allowed(folder: Path) -> None:
    with open_named(folder, "sharded", ProcessLauncher(["cpu"]), ShardOptions(deadline_s=5)) as index:
        os.kill(workers(index)[0].pid or 0, signal.SIGSTOP)
        with pytest.raises(WorkerError, match="worker 0 is late: got no reply in 5 s"):
            index.query([0], options=OPTIONS)


OWNER = """
import time
from tracin_ann import InfluenceIndex, ProcessLauncher

if __name__ == "__main__":
    index = InfluenceIndex.open({index!r}, {task!r}, device="cpu", launcher=ProcessLauncher(["cpu"]))
    print(*index._workers.pids, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER.format(index=f"{folder}/sharded", task=f"{folder}/shard_task.py:task"), encoding="utf-8")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == SHARDS and all(Path(f"/proc/{pid}").exists() for pid in pids)
        owner.kill()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


FORGETFUL = """
from tracin_ann import InfluenceIndex, ProcessLauncher

if __name__ == "__main__":
    index = InfluenceIndex.open({index!r}, {task!r}, device="cpu", launcher=ProcessLauncher(["cpu"]))
"""


@pytest.mark.slow
def test_a_script_that_closes_no_index_ends_silently(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text(
        FORGETFUL.format(index=f"{folder}/sharded", task=f"{folder}/shard_task.py:task"), encoding="utf-8"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie, which nobody waits for in some containers."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_the_command_marks_partial_results_in_tables(folder: Path, tmp_path: Path) -> None:
    common = [
        f"{folder}/sharded",
        "--task",
        f"{folder}/shard_task.py:task",
        "--ids",
        "0-2",
        "-k",
        "2",
        "--device",
        "cpu",
    ]
    for options, form, expected in (
        (["--search", "index", "--allow-partial", "--deadline", "60"], "csv", "False"),
        (["--exact"], "csv", ""),
        (["--exact"], "parquet", None),
    ):
        path = tmp_path / f"hits.{form}"
        arguments = [*common, *options, "--shard-workers", "--output", str(path), "--format", form]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        if form == "csv":
            with path.open(encoding="utf-8", newline="") as file:
                assert {row["partial"] for row in csv.DictReader(file)} == {expected}
        else:
            parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
            assert set(parquet.read_table(path).column("partial").to_pylist()) == {expected}


@pytest.mark.parametrize("option", [["--allow-partial"], ["--deadline", "3"], ["--ray-address", "auto"]])
def test_options_of_workers_need_workers(folder: Path, option: list[str]) -> None:
    result = CliRunner().invoke(main, [f"{folder}/sharded", "--ids", "0", *option])
    assert result.exit_code == UsageError.exit_code
    assert f"{option[0]} is for workers" in result.output


@pytest.mark.slow
def test_a_damaged_shard_is_reported_by_the_start(folder: Path, single: InfluenceIndex) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    group = ServiceGroup([partial(ServiceProcess.start, _raise_damage)], restarts=1)
    # The exception, which is kept here, refers to the worker.
    with pytest.raises(DamagedIndexError) as caught:
        group.start()
    assert {child.pid for child in multiprocessing.active_children()} <= before, caught


class Echo:
    """A service that replies with the request."""

    def run(self, request: Any) -> Any:
        return request


@pytest.mark.slow
def test_ctrl_c_does_not_end_a_worker_that_starts() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    worker = ServiceProcess.start(Echo)
    try:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        worker.open()
        assert worker.run("request") == "request"
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    finally:
        worker.stop()


def _raise_damage() -> Any:
    raise DamagedIndexError("a damaged shard")


class Silent:
    """A group whose workers do not reply, except the first ones."""

    def __init__(self, n_replies: int) -> None:
        self.n_replies = n_replies

    def ask(self, requests: list[Any], deadline_s: float | None) -> list[Any]:
        assert deadline_s == 2
        return [
            None if request is None else NoReplyError(f"no {n}") if n >= self.n_replies else ("ids", n)
            for n, request in enumerate(requests)
        ]


def search(folder: Path, n_replies: int, *, allow_partial: bool) -> ShardSearch:
    launcher, options = Inline(), ShardOptions(deadline_s=2, allow_partial=allow_partial)
    opened: Any = open_named(folder, "sharded", launcher)
    services = [shard._service for shard in launcher.services]
    return ShardSearch(Silent(n_replies), opened._loaded_index, services, options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n_replies", "allow_partial"), [(0, True), (0, False), (1, False)])
def test_missing_shards_are_an_error(folder: Path, n_replies: int, allow_partial: bool) -> None:
    query = ListQuery(np.zeros((1, 3), np.float32), 1, np.zeros((1, 1), np.int64), None)
    with pytest.raises(WorkerError, match=f"no {n_replies}"):
        search(folder, n_replies, allow_partial=allow_partial).search_files([query, query])


def test_missing_shards_of_a_partial_search_are_recorded(folder: Path) -> None:
    query = ListQuery(np.zeros((1, 3), np.float32), 1, np.zeros((1, 1), np.int64), None)
    nothing = replace(query, allowed=np.zeros(0, np.int64))
    made = search(folder, 1, allow_partial=True)
    with made.watch() as first:
        assert made.search_files([query, nothing]) == [("ids", 0)]
    with made.watch() as second:
        assert made.search_files([query, query]) == [("ids", 0)]
        # Now it would answer, but it is not asked again for the same query.
        made._group.n_replies = 2  # type: ignore[attr-defined]
        assert made.search_files([query, query]) == [("ids", 0)]
    assert first == Coverage(2, set(), True) and first.summary == "2 of 2 shards answered"
    assert second == Coverage(2, {1}, True) and second.answered == (0,)
    with made.watch() as third:
        pass
    assert (third.answered, third.summary) == ((), "")


def test_partial_answers_are_marked_in_tables(sharded: InfluenceIndex) -> None:
    answers = sharded.query([0, 1], options=OPTIONS)
    answers[1] = replace(answers[1], shards=(0,), missing_shards=(1,))
    assert "partial" in answers.fields.names
    assert {(record["query"], record["partial"]) for record in answers.records()} == {(0, False), (1, True)}


def test_options_of_workers_need_a_launcher(folder: Path) -> None:
    with pytest.raises(UsageError, match="there are no workers: got shard_options"):
        open_named(folder, "sharded", options=ShardOptions())


@pytest.mark.parametrize("option", [["--allow-partial"], ["--deadline", "3"]])
def test_options_of_searches_are_rejected_without_a_search(folder: Path, option: list[str]) -> None:
    result = CliRunner().invoke(main, [f"{folder}/sharded", "--ids", "0", "--exact", "--shard-workers", *option])
    assert result.exit_code == UsageError.exit_code
    assert f"--exact scores all training rows, without a search: got {option[0]}" in result.output


@pytest.mark.parametrize(
    "options",
    [*({"deadline_s": seconds} for seconds in (0.0, float("nan"), float("inf"), 1e10)), {"restarts": -1}],
)
def test_bad_options_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="bad"):
        ShardOptions(**options)
