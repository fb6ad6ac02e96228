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
from tracin_ann.scoring import QueryOptions
from tracin_ann.serve.pages.addresses import make_address, read_choice, read_number, read_text
from tracin_ann.serve.pages.context import Asked, Context, RowCard, Wanted
from tracin_ann.serve.pages.listing import split_pages
from tracin_ann.serve.pages.site import Reply
from tracin_ann.serve.service import Reader
from tracin_ann.serve.work import FindDuplicates, FindHubs

_HUBS, _GROUPS, _GROUP_ROWS = 50, 20, 12
"""Hubs of a page, groups of duplicates of a page, and rows of a group."""
_THRESHOLD, _K = "0.999", 10
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
    k, start = read_number(asked.given, "k", _K), read_number(asked.given, "start", 0)
    score = read_choice(asked.given, "score", ("", *SCORES), "")
    name: ScoreName | None = score or None  # type: ignore[assignment]
    options = QueryOptions(k=k, score=name)
    context.service.check_limits(0, options)

    def address_from(at: int) -> str:
        return make_address("/hubs", {"k": None if k == _K else k, "score": score, "start": at or None})

    default_score = "" if asked.is_partial else await reader.run(lambda index: index.default_score)
    address = address_from(start)
    wanted = Wanted(FindHubs(k, options=options), "Answering all queries", address)
    result, progress = await context.compute(asked, reader, wanted)
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
        k=k,
        scores=SCORES,
        score=score,
        default_score=default_score,
        limits=context.limits,
        facts=() if result is None else _list_hub_facts(result.summary),
        hubs=list(zip(cards, shown, strict=True)),
        pages=split_pages(len(found), start, _HUBS, address_from),
    )


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
        facts=() if result is None else _list_duplicate_facts(result.summary),
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


def _list_duplicate_facts(summary: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return (
        ("rows compared", f"{summary['n_rows']:,}"),
        ("groups", f"{summary['groups']:,}"),
        ("rows in groups", f"{summary['rows_in_groups']:,}"),
        *([("rows without a gradient", f"{summary['n_zero']:,}")] if summary["n_zero"] else []),
    )
