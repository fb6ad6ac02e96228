"""Two answers to one query side by side: by two scores, or from two indexes of the same training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tracin_ann.choices import SCORES
from tracin_ann.errors import UsageError, problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import SIDES, Examples, ExampleView, format_score, has_wide_hits
from tracin_ann.results import Answer, Hit, Id
from tracin_ann.serve.pages.addresses import QueryForm, format_ranges, make_address, read_choice
from tracin_ann.serve.pages.context import Asked, Context
from tracin_ann.serve.pages.site import Reply
from tracin_ann.serve.service import Reader

_LEAD = "The answers to the same queries by two scores, or from two indexes of the same training rows."
_KINDS: tuple[tuple[Literal["pro", "opp"], str], ...] = (("pro", "Proponents"), ("opp", "Opponents"))


@dataclass(frozen=True)
class ComparedHit:
    """A training row in one of two answers, or in both; a rank or score is "" where it is missing."""

    row: int
    id: Id
    view: ExampleView
    ranks: tuple[str, ...]
    scores: tuple[str, ...]

    @property
    def is_shared(self) -> bool:
        """Return whether both answers contain the row."""
        return all(self.ranks)


@dataclass(frozen=True)
class ComparedList:
    """The proponents or the opponents of two answers, and how many rows both contain."""

    kind: str
    heading: str
    hits: tuple[ComparedHit, ...]
    shared: str


@dataclass(frozen=True)
class Comparison:
    """Two answers to one query; `is_partial`: shards of an index did not answer."""

    name: str
    example: ExampleView
    lists: tuple[ComparedList, ...]
    is_partial: bool


async def show_comparison(context: Context, asked: Asked, reader: Reader) -> Reply:
    """Return the answers to the same queries by two scores, or from two indexes.

    Raises:
        UsageError: the other index has other training rows.
        TracinAnnError: as `Reader.answer`.
    """
    given, other = QueryForm.parse(asked.given), read_choice(asked.given, "other", ("", *SCORES), "")
    form = QueryForm(side=given.side, rows=given.rows, k=given.k, score=given.score)
    other_name = "" if context.against is None else context.against.directory.resolve().name
    against = read_choice(asked.given, "against", ("", other_name), "")
    comparisons: tuple[Comparison, ...] = ()
    is_wide = False
    if form.rows:
        first = (await reader.answer(form.side, form.rows, form.options)).answers
        second = await _answer_again(context if against else None, reader, replace(form, score=other))

        def build(index: InfluenceIndex) -> tuple[tuple[Comparison, ...], bool]:
            examples = context.make_examples(index)
            return compare_answers(examples, list(zip(first, second, strict=True))), has_wide_hits(examples, first)

        comparisons, is_wide = await reader.run(build)
    default = await reader.run(lambda index: index.default_score)
    rows = format_ranges(form.rows)
    values = {"side": form.side, "rows": rows, "score": form.score, "against": against, "other": other, "k": form.k}
    return context.page(
        "compare.html",
        reader,
        title="Compare",
        here="/compare",
        lead=_LEAD,
        layout="rows" if is_wide else "cards",
        permalink=make_address("/compare", values),
        form=form,
        rows=rows,
        scores=SCORES,
        default_score=default,
        other=other,
        other_name=other_name,
        against=against,
        limits=context.limits,
        names=(form.score or default, " ".join(filter(None, (other or "default score", against and f"of {against}")))),
        comparisons=comparisons,
    )


async def _answer_again(context: Context | None, reader: Reader, form: QueryForm) -> tuple[Answer, ...]:
    """Return the second answers: from the other index of a context, or from the same index."""
    if context is None or context.against is None:
        return (await reader.answer(form.side, form.rows, form.options)).answers
    async with context.against.read() as other:
        (n_rows, own), (n_others, others) = await reader.run(_identify_rows), await other.run(_identify_rows)
        if (n_rows, own) != (n_others, others):
            got = f"{n_others:,} rows" if n_rows != n_others else f"{n_others:,} rows with other contents"
            expected, remedy = f"the {n_rows:,} of the first index", "serve another index with --against"
            what = "the second index has other training rows"
            raise UsageError(problem(what, got=got, expected=expected, remedy=remedy))
        return (await other.answer(form.side, form.rows, form.options)).answers


def _identify_rows(index: InfluenceIndex) -> tuple[int, str]:
    """Return the number of training rows, and the digest of their contents."""
    spec = index.manifest.build.spec
    return spec.train_rows, spec.train_data


def compare_answers(examples: Examples, pairs: Sequence[tuple[Answer, Answer]]) -> tuple[Comparison, ...]:
    """Return comparisons of pairs of answers to the same queries."""
    return tuple(
        Comparison(
            f"{SIDES[one.side]} {one.query}",
            examples.view(one.side, one.members[0]),
            tuple(
                _compare_hits(examples, kind, heading, _choose(one, kind), _choose(other, kind))
                for kind, heading in _KINDS
            ),
            is_partial=bool(one.missing_shards or other.missing_shards),
        )
        for one, other in pairs
    )


def _choose(answer: Answer, kind: Literal["pro", "opp"]) -> tuple[Hit, ...]:
    return answer.proponents if kind == "pro" else answer.opponents


def _compare_hits(
    examples: Examples, kind: str, heading: str, one: Sequence[Hit], other: Sequence[Hit]
) -> ComparedList:
    """Return the hits of two lists: those of the first list by rank, then those that only the second one contains."""
    ranked = [{hit.row: (rank, hit) for rank, hit in enumerate(hits, start=1)} for hits in (one, other)]
    hits = []
    for row in dict.fromkeys(hit.row for hit in (*one, *other)):
        found = [places.get(row) for places in ranked]
        hit = next(place[1] for place in found if place)
        ranks = tuple("" if place is None else str(place[0]) for place in found)
        scores = tuple("" if place is None else format_score(place[1].score) for place in found)
        hits.append(ComparedHit(row, hit.id, examples.view("train", row), ranks, scores))
    n_shared = sum(hit.is_shared for hit in hits)
    return ComparedList(kind, heading, tuple(hits), f"{n_shared} of {max(len(one), len(other))} in both")
