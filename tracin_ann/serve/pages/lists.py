"""The pages of hubs and of duplicates, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from tracin_ann.choices import SCORES, ScoreName
from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import Figure, make_counts_figure
from tracin_ann.scoring import QueryOptions
from tracin_ann.serve.pages.addresses import make_address, read_choice, read_number, read_text
from tracin_ann.serve.pages.context import Asked, Context, RowCard, Wanted, link_figures
from tracin_ann.serve.pages.listing import split_pages
from tracin_ann.serve.pages.site import Reply
from tracin_ann.serve.service import Reader
from tracin_ann.serve.work import FindDuplicates, FindHubs, Result

_HUBS, _GROUPS, _GROUP_ROWS = 50, 20, 12
"""Hubs of a page, groups of duplicates of a page, and rows of a group."""
_THRESHOLD, _K = "0.999", 10
_HUBS_CAPTION = "Answering all queries"
_HUBS_LEAD = "Training rows that are among the proponents or the opponents of unusually many queries."
_DUPLICATES_LEAD = (
    "Groups of training rows with nearly parallel gradients: to the model, the rows of a group are the same."
)


@dataclass(frozen=True)
class Group:
    """A group of duplicates with its first rows; `cosine` is the lowest one of a pair."""

    number: int
    size: int
    cosine: str
    cards: tuple[RowCard, ...]


async def show_hubs(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return a page of the training rows that influence unusually many queries."""
    start = read_number(asked.given, "start", 0)
    work, values = _read_hubs_form(context, asked)

    def address_from(at: int) -> str:
        return make_address("/hubs", {**values, "start": at or None})

    default_score = "" if asked.is_partial else await reader.run(lambda index: index.default_score)
    address = address_from(start)
    result, progress = await context.compute(asked, reader, Wanted(work, _HUBS_CAPTION, address))
    if progress is not None and asked.is_partial:
        return context.show_progress(reader, progress)
    found = [] if result is None else sorted(result.rows, key=lambda hub: -(hub.proponent_of + hub.opponent_of))
    shown = found[start : start + _HUBS]
    cards = await reader.run(partial(context.make_cards, [hub.row for hub in shown])) if shown else []
    return context.page(
        "hubs.html",
        reader,
        title="Hubs",
        here="/hubs",
        lead=_HUBS_LEAD,
        permalink=address,
        progress=progress,
        k=work.k,
        scores=SCORES,
        score=values["score"],
        default_score=default_score,
        limits=context.limits,
        facts=() if result is None else _list_hub_facts(result.summary),
        figures=() if result is None else link_figures(_make_hub_figures(result), "hubs", address_from(0)),
        hubs=list(zip(cards, shown, strict=True)),
        pages=split_pages(len(found), start, _HUBS, address_from),
    )


async def list_hub_figures(context: Context, asked: Asked, reader: Reader) -> tuple[Figure, ...]:
    """Return the figures of the page of hubs.

    Raises:
        UsageError: the counts are not computed yet.
    """
    work, values = _read_hubs_form(context, asked)
    wanted = Wanted(work, _HUBS_CAPTION, make_address("/hubs", values))
    result, progress = await context.compute(asked, reader, wanted)
    if result is None:
        got, remedy = "no result" if progress is None else progress.state, "load the page of hubs first"
        raise UsageError(problem("the counts are not computed yet", got=got, expected="all counts", remedy=remedy))
    return _make_hub_figures(result)


def _read_hubs_form(context: Context, asked: Asked) -> tuple[FindHubs, dict[str, object]]:
    """Return the work that the page of hubs shows, and the values of its address.

    Raises:
        UsageError: a value cannot be parsed, or is above its limit.
    """
    k, score = read_number(asked.given, "k", _K), read_choice(asked.given, "score", ("", *SCORES), "")
    name: ScoreName | None = score or None  # type: ignore[assignment]
    options = QueryOptions(k=k, score=name)
    context.service.check_limits(0, options)
    return FindHubs(k, options=options), {"k": None if k == _K else k, "score": score}


def _make_hub_figures(result: Result) -> tuple[Figure, ...]:
    summary = result.summary
    histograms = summary["proponents_histogram"], summary["opponents_histogram"]
    return (make_counts_figure(*histograms, summary["queries"], "f1-"),)


async def show_duplicates(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return a page of the groups of training rows with nearly parallel gradients.

    Raises:
        UsageError: the threshold is not a number.
    """
    given, start = read_text(asked.given, "threshold", _THRESHOLD), read_number(asked.given, "start", 0)
    try:
        threshold = float(given)
    except ValueError:
        expected, remedy = "a number above 0, at most 1", "change threshold"
        raise UsageError(problem("bad threshold", got=repr(given[:40]), expected=expected, remedy=remedy)) from None

    def address_from(at: int) -> str:
        changed = "" if given == _THRESHOLD else given
        return make_address("/duplicates", {"threshold": changed, "start": at or None})

    address = address_from(start)
    wanted = Wanted(FindDuplicates(threshold), "Comparing all training rows", address)
    result, progress = await context.compute(asked, reader, wanted)
    if progress is not None and asked.is_partial:
        return context.show_progress(reader, progress)
    rows = () if result is None else result.rows
    groups = [tuple(members) for _, members in groupby(rows, key=lambda row: row.group)]

    def build(index: InfluenceIndex) -> list[Group]:
        return [
            Group(
                members[0].group,
                members[0].size,
                f"{members[0].lowest_cosine:.6f}",
                tuple(context.make_cards([row.row for row in members[:_GROUP_ROWS]], index)),
            )
            for members in groups[start : start + _GROUPS]
        ]

    shown = await reader.run(build)
    is_wide = any(card.view.is_wide or not card.view.image for group in shown for card in group.cards)
    return context.page(
        "duplicates.html",
        reader,
        layout="rows" if is_wide else "cards",
        title="Duplicates",
        here="/duplicates",
        lead=_DUPLICATES_LEAD,
        permalink=address,
        progress=progress,
        threshold=given,
        facts=() if result is None else _list_duplicate_facts(result.summary, len(rows)),
        groups=shown,
        pages=split_pages(len(groups), start, _GROUPS, address_from),
    )


def _list_hub_facts(summary: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    most = f"{summary['proponents_largest']:,} as proponent, {summary['opponents_largest']:,} as opponent"
    return (
        ("queries", f"{summary['queries']:,}"),
        ("mean count of a row", f"{summary['proponents_expected']:.3g}"),
        ("largest count", most),
        ("skewness", f"{summary['proponents_skewness']:.3g}, {summary['opponents_skewness']:.3g}"),
        ("search", str(summary["how"])),
    )


def _list_duplicate_facts(summary: Mapping[str, Any], n_listed: int) -> tuple[tuple[str, str], ...]:
    return (
        ("rows compared", f"{summary['n_rows']:,}"),
        ("groups", f"{summary['groups']:,}"),
        ("rows in groups", f"{summary['rows_in_groups']:,}"),
        *([("rows listed", f"the first {n_listed:,}")] if n_listed < summary["rows_in_groups"] else []),
        *([("rows without a gradient", f"{summary['n_zero']:,}")] if summary["n_zero"] else []),
    )
