"""Progress display of long operations: a bar on a terminal or in a notebook, lines on stderr elsewhere."""

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
    """Yield a progress callback for `build(progress=...)`, `index.query(progress=...)` and the like.

    On a terminal it shows a bar that is removed at the end, in a notebook a bar that stays. Elsewhere it writes a line
    to stderr every ten seconds, so short operations print nothing.

    Args:
        unit: name of the units that are counted, for the rate.
    """
    console = Console(stderr=True)
    if _in_notebook():
        with _show_in_notebook(unit) as show:
            yield show
    elif console.is_terminal and not console.is_dumb_terminal:
        with _show_on_terminal(unit, console) as show:
            yield show
    else:
        yield _line_writer(unit)


@dataclass
class _Clock:
    """Start times of the stages, by name."""

    unit: str
    began: dict[str, float] = field(default_factory=dict)

    def describe(self, stage: str, done: int, total: int) -> str:
        """Return the progress of a stage with its rate and remaining time, or "" while there is no rate."""
        seconds = time.perf_counter() - self.began.setdefault(stage, time.perf_counter())
        if total <= 1 or not done or not seconds:
            return ""
        left = "" if done >= total else f", {format_duration(seconds / done * (total - done))} left"
        return f"{done:,} of {total:,}, {done / seconds:,.0f} {self.unit}/s{left}"


@contextmanager
def _show_on_terminal(unit: str, console: Console) -> Iterator[ProgressCallback]:
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


def _line_writer(unit: str) -> ProgressCallback:
    """Return a callback that writes a line to stderr, at most one every ten seconds."""
    clock = _Clock(unit)
    last = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        first = stage not in clock.began
        text = clock.describe(stage, done, total)
        if first or now - last < _LINE_SECONDS:
            last = now if first else last
            return
        last = now
        sys.stderr.write(f"{stage}: {text}\n")
        sys.stderr.flush()

    return show


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def _show_in_notebook(unit: str) -> Iterator[ProgressCallback]:
    """Draw bars as HTML: the bars of rich need ipywidgets in a notebook and are not saved with it."""
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
        text = escape(clock.describe(stage, done, total))
        stages[stage] = f"<tr><td>{escape(stage)}</td><td>{bar}</td><td>{text}</td></tr>"
        if new or time.perf_counter() - drawn > _NOTEBOOK_SECONDS:
            draw()

    try:
        yield show
    finally:
        draw()
