"""A computation in steps: several callers share it, and it goes on when one of them stops."""

from __future__ import annotations

import pytest

from tracin_ann.scoring.computation import Computation, run_steps


def count(n: int, error: BaseException | None = None):
    for step in range(n):
        if error is not None and step == n - 1:
            raise error
        yield 2
    return "result"


def test_steps_return_their_result():
    units = []
    assert run_steps(count(3), units.append) == run_steps(count(3)) == "result"
    assert units == [2, 2, 2]


def test_progress_counts_units():
    seen = []
    computation = Computation(6, count(3))
    assert computation.finish(lambda *done: seen.append(done)) == "result"
    assert seen == [(2, 6), (4, 6), (6, 6)]
    assert computation.finish(pytest.fail) == "result", "nothing is left to do"


def test_another_caller_goes_on_when_one_stops():
    computation, seen = Computation(6, count(3)), []

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        computation.finish(stop)
    assert computation.finish(lambda *done: seen.append(done)) == "result"
    assert seen == [(4, 6), (6, 6)]


def test_two_callers_take_turns():
    computation, seen = Computation(6, count(3)), []

    def join(done, total):
        seen.append(done)
        assert computation.finish(lambda done, total: seen.append(-done)) == "result"

    assert computation.finish(join) == "result"
    assert seen == [2, -4, -6]


@pytest.mark.parametrize("error", [ValueError("no row"), KeyboardInterrupt("no row")])
def test_every_caller_gets_the_error_of_a_step(error):
    computation = Computation(6, count(3, error))
    for _ in range(2):
        with pytest.raises(type(error), match="no row"):
            computation.finish()
