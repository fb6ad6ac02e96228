"""Self-influence of training rows: `tracin-query --self-influence`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tracin_ann.cli.index_options import choose_score, make_row_filter
from tracin_ann.cli.messages import format_count, print_note, show_progress
from tracin_ann.cli.output import Sink, write_html

if TYPE_CHECKING:
    from tracin_ann.index import InfluenceIndex


def write_self_influence(index: InfluenceIndex, options: Mapping[str, object], sink: Sink, html: str | None) -> None:
    """Write the training rows with the largest self-influence, by the options of `tracin-query`."""
    from tracin_ann.results import RANKED

    chosen = make_row_filter(index, options)
    with sink.open(RANKED) as write, show_progress("rows") as progress:
        rows = index.self_influence(
            int(options["k"]),  # type: ignore[call-overload]
            checkpoints=options["checkpoints"],  # type: ignore[arg-type]
            exact=bool(options["exact"]),
            rows=chosen,
            score=choose_score(options) or "tracin",
            damping=options["damping"],  # type: ignore[arg-type]
            progress=progress,
        )
        write(rows)
    if len(index.skipped):
        print_note(f"skipped: {format_count(len(index.skipped), 'row')}, not finite", err=True)
    write_html(rows, html, index, options["checkpoints"])  # type: ignore[arg-type]
