"""Output of `progress_bar`: nothing for short operations, lines in a log, a bar in a notebook."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from tracin_ann import progress as module
from tracin_ann import progress_bar


def test_short_operations_without_a_terminal_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        for done in range(4):
            progress("features", done, 3)
    assert capsys.readouterr() == ("", "")


def test_long_operations_without_a_terminal_print_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0] * 8 + [20.0] * 8)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    with progress_bar("files") as progress:
        progress("reading", 0, 1000)
        times = iter([20.0] * 8)
        progress("reading", 500, 1000)
        progress("reading", 501, 1000)
    assert capsys.readouterr() == ("", "reading: 500 of 1,000, 25 files/s, 20 s left\n")


def test_a_notebook_shows_a_bar_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    here = SimpleNamespace(config={"IPKernelApp": {}})
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    vars(ipython).update(get_ipython=lambda: here, display=display)
    vars(display).update(HTML=str, display=lambda first, display_id: SimpleNamespace(update=drawn.append))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with progress_bar() as progress:
        for done in range(4):
            progress("<stage>", done, 3)
    assert "value='0'" in drawn[0]
    assert "<td>&lt;stage&gt;</td><td><progress value='3' max='3'" in drawn[-1]
    assert "3 of 3" in drawn[-1]
