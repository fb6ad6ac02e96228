"""Progress of long work as people see it: a bar on a terminal or in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from tracin_ann.text import format_duration

if TYPE_CHECKING:
    from rich.progress import TaskID

    from tracin_ann.types import ProgressCallback

_LINE_SECONDS = 10.0
_NOTEBOOK_SECONDS = 0.2


@contextmanager
def progress_bar(unit: str = "rows") -> Iterator[ProgressCallback]:
    """Yield what `build(progress=...)`, `index.query(progress=...)` and the like take, and show what they tell it.

    A bar that is gone at the end in a terminal, a bar that stays in a notebook; elsewhere a line on stderr every ten
    seconds, so that short work prints nothing.

    Args:
        unit: of what is counted, for the rate.
    """
    console = Console(stderr=True)
    if _in_notebook():
        with _notebook(unit) as show:
            yield show
    elif console.is_terminal and not console.is_dumb_terminal:
        with _terminal(unit, console) as show:
            yield show
    else:
        yield _lines(unit)


@dataclass
class _Clock:
    """When each stage was first told of."""

    unit: str
    began: dict[str, float] = field(default_factory=dict)

    def said(self, stage: str, done: int, total: int) -> str:
        """Return how far a stage is, with its rate and the time left once it has both."""
        seconds = time.perf_counter() - self.began.setdefault(stage, time.perf_counter())
        if total <= 1 or not done or not seconds:
            return ""
        left = "" if done >= total else f", {format_duration(seconds / done * (total - done))} left"
        return f"{done:,} of {total:,}, {done / seconds:,.0f} {self.unit}/s{left}"


@contextmanager
def _terminal(unit: str, console: Console) -> Iterator[ProgressCallback]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        tasks: dict[str, tuple[TaskID, float]] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, rate=""), time.perf_counter()
            task, began = tasks[stage]
            rate = f"{done / max(time.perf_counter() - began, 1e-9):,.0f} {unit}/s" if total > 1 else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield show


def _lines(unit: str) -> ProgressCallback:
    clock = _Clock(unit)
    last = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        first = stage not in clock.began
        said = clock.said(stage, done, total)
        if first or now - last < _LINE_SECONDS:
            last = now if first else last
            return
        last = now
        sys.stderr.write(f"{stage}: {said}\n")
        sys.stderr.flush()

    return show


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def _notebook(unit: str) -> Iterator[ProgressCallback]:
    """Draw with the notebook's own means: rich's bars need ipywidgets there, and are gone from a saved notebook."""
    from IPython.display import HTML, display  # noqa: PLC0415 - optional package, imported only here

    clock = _Clock(unit)
    stages: dict[str, str] = {}
    place = display(HTML(""), display_id=True)
    drawn = 0.0

    def draw() -> None:
        nonlocal drawn
        drawn = time.perf_counter()
        place.update(HTML("<table>" + "".join(stages.values()) + "</table>"))

    def show(stage: str, done: int, total: int) -> None:
        new = stage not in stages
        bar = f"<progress value='{done}' max='{max(total, 1)}' aria-label='{escape(stage)}'></progress>"
        said = escape(clock.said(stage, done, total))
        stages[stage] = f"<tr><td>{escape(stage)}</td><td>{bar}</td><td>{said}</td></tr>"
        if new or time.perf_counter() - drawn > _NOTEBOOK_SECONDS:
            draw()

    try:
        yield show
    finally:
        draw()
