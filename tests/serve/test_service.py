"""Requests that wait together share a pass, limits hold, and a request reads one generation of the index."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import numpy as np
import pytest

from explorer import N_QUERIES, N_TRAIN, build_place
from tracin_ann import InfluenceIndex, QueryOptions
from tracin_ann.errors import UnknownRowError, UsageError
from tracin_ann.serve import Service, Settings
from tracin_ann.serve.problems import BusyError, IndexChangedError
from tracin_ann.serve.work import RankSelfInfluence


@contextmanager
def open_service(place, **settings):
    service = Service(place.location, Settings(**settings))
    try:
        yield service
    finally:
        service.close()


@pytest.fixture
def own_place(tmp_path):
    return build_place(tmp_path)


@pytest.fixture
def passes(monkeypatch):
    """Return a list of the numbers of queries of each call of `InfluenceIndex.query`."""
    numbers = []
    query = InfluenceIndex.query

    def count(self, ids=(), train_ids=(), *args, **kwargs):
        numbers.append(len(ids) + len(train_ids))
        return query(self, ids, train_ids, *args, **kwargs)

    monkeypatch.setattr(InfluenceIndex, "query", count)
    return numbers


async def ask(service, row, options=None, side="query"):
    async with service.read() as reader:
        return await reader.answer(side, [row] if isinstance(row, int) else row, options)


async def ask_together(service, *questions):
    """Ask while the index is in use, so that all questions wait; return their answers or errors."""
    with service.turns.take_for_request():
        tasks = [asyncio.create_task(ask(service, *question)) for question in questions]
        await asyncio.sleep(0.05)
    return await asyncio.gather(*tasks, return_exceptions=True)


def assert_equal(answered, answers):
    assert len(answered.answers) == len(answers)
    for found, expected in zip(answered.answers, answers, strict=True):
        assert (found.query, found.side) == (expected.query, expected.side)
        assert [hit.row for hit in found.hits] == [hit.row for hit in expected.hits]
        np.testing.assert_allclose(
            [hit.score for hit in found.hits], [hit.score for hit in expected.hits], rtol=1e-5, atol=1e-6
        )


def test_requests_that_wait_share_passes(place, index, passes):
    rows = [row % N_QUERIES for row in range(40)]
    with open_service(place) as service:
        found = asyncio.run(ask_together(service, *((row,) for row in rows)))
    assert len(passes) == 3, "16 queries at a time"
    assert max(answered.fellows for answered in found) == 16
    for row, answered in zip(rows, found, strict=True):
        assert_equal(answered, index.query([row]))
        assert [line["row"] for line in answered.lines] == [row]


def test_requests_with_other_options_have_other_passes(place, index):
    options = [None, QueryOptions(k=3), QueryOptions(score="cosine"), QueryOptions(checkpoints=(1,))] * 3
    sides = ["query", "train"] * 6
    with open_service(place) as service:
        questions = [(place, *choice) for place, choice in enumerate(zip(options, sides, strict=True))]
        found = asyncio.run(ask_together(service, *questions))
    for (row, chosen, side), answered in zip(questions, found, strict=True):
        assert_equal(answered, index.query([row] if side == "query" else (), [row] if side == "train" else (), chosen))


def test_a_request_with_many_queries_is_one_pass(place, index, passes):
    rows = [*range(N_QUERIES), *range(N_QUERIES)]
    with open_service(place) as service:
        (found,) = asyncio.run(ask_together(service, (rows,)))
    assert passes == [N_QUERIES]
    assert_equal(found, index.query(rows))


def test_an_error_is_that_of_its_own_request(place, index):
    with open_service(place) as service:
        found = asyncio.run(ask_together(service, *((row,) for row in (0, 1, 99, 2, -1))))
    for row, answered in zip((0, 1, None, 2, None), found, strict=True):
        if row is None:
            assert isinstance(answered, UnknownRowError)
        else:
            assert_equal(answered, index.query([row]))


def test_a_client_that_leaves_costs_nothing(place, passes):
    async def leave(service):
        with service.turns.take_for_request():
            tasks = [asyncio.create_task(ask(service, row)) for row in range(3)]
            await asyncio.sleep(0.05)
            tasks[1].cancel()
            tasks[2].cancel()
            await asyncio.sleep(0)
        await tasks[0]
        await ask(service, 5)
        assert service._waiting == 0

    with open_service(place) as service:
        asyncio.run(leave(service))
    assert passes == [1, 1]


def test_too_many_waiting_requests_are_rejected(place):
    with open_service(place, most_waiting=3) as service:
        found = asyncio.run(ask_together(service, *((row,) for row in range(5))))
        assert [type(answered) for answered in found[3:]] == [BusyError, BusyError]
        assert asyncio.run(ask(service, 4)).answers[0].row == 4, "there is room again"


@pytest.mark.parametrize(
    ("rows", "options"),
    [([], None), ([0] * 101, None), ([0], QueryOptions(k=101)), ([0], QueryOptions(candidates=1001))],
)
def test_limits_of_queries(place, rows, options):
    with open_service(place) as service, pytest.raises(UsageError, match="no query|above the limit"):
        asyncio.run(ask(service, rows, options))


def test_a_new_generation_is_picked_up(own_place):
    async def read(service):
        async with service.read() as old:
            before = await old.answer("train", [0])
            own_place.append(5)
            async with service.read() as new:
                assert (old.generation, new.generation) == (1, 2)
                again, after = await asyncio.gather(old.answer("train", [0]), new.answer("train", [0]))
                assert await old.run(len) == N_TRAIN and await new.run(len) == N_TRAIN + 5
                with pytest.raises(IndexChangedError):
                    new.expect(old.generation)
        return before, again, after

    with open_service(own_place) as service:
        before, again, after = asyncio.run(read(service))
    assert (before.generation, again.generation, after.generation) == (1, 1, 2)
    assert again.lines == before.lines
    assert_equal(after, own_place.open().query((), [0]))


def test_a_job_ends_on_its_generation(own_place):
    async def start(service):
        with service.turns.take_for_request():
            async with service.read() as reader:
                job = reader.start_job(RankSelfInfluence(k=100))
            own_place.append(5)
        await ask(service, 0)
        return job

    with open_service(own_place) as service:
        job = asyncio.run(start(service))
        job.future.result(60)
    assert (job.state, job.generation, len(job.result.rows)) == ("done", 1, N_TRAIN)


def test_a_damaged_generation_is_not_picked_up(own_place, caplog):
    with open_service(own_place) as service:
        (own_place.directory / "manifest.json").write_text("{}")
        found = [asyncio.run(ask(service, 0)) for _ in range(3)]
    assert [answered.generation for answered in found] == [1, 1, 1]
    (warning,) = [record for record in caplog.records if "remains open" in record.message]
    assert warning.levelname == "WARNING"


def test_files_of_a_generation_remain_while_it_is_read(own_place):
    async def read(service):
        async with service.read() as reader:
            own_place.append(3)
            own_place.append(3)
            return await reader.answer("query", [1])

    with open_service(own_place) as service:
        assert asyncio.run(read(service)).generation == 1
        asyncio.run(ask(service, 1))
        own_place.append(3)
        folders = {path.name for path in own_place.directory.glob("generation-*")}
        assert folders == {"generation-000003", "generation-000004"}, "the first one was closed"


@pytest.mark.slow
def test_answers_do_not_mix_generations(own_place):
    """Every answer is that of the generation it names, while the index grows and many requests wait."""
    expected = {}

    async def keep_asking(service, place, found):
        while len(expected) < 4:
            found.append((place, await ask(service, place % N_QUERIES)))

    def grow(service):
        for generation in range(1, 5):
            index = own_place.open()
            assert index.manifest.generation == generation
            expected[generation] = list(index.query(range(N_QUERIES)))
            if generation < 4:
                own_place.append(7)

    async def run(service):
        found = []
        asking = [asyncio.create_task(keep_asking(service, place, found)) for place in range(8)]
        await asyncio.to_thread(grow, service)
        await asyncio.gather(*asking)
        found += [(place, await ask(service, place)) for place in range(N_QUERIES)]
        return found

    with open_service(own_place) as service:
        found = asyncio.run(run(service))
    assert {answered.generation for _, answered in found} >= {1, 4}
    for place, answered in found:
        assert_equal(answered, [expected[answered.generation][place % N_QUERIES]])
