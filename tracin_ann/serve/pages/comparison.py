"""Two answers to one query side by side: by two scores, or from two indexes of the same training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tracin_ann.report import Examples, ExampleView, format_score
from tracin_ann.scoring import Answer, Hit, Id

_KINDS: tuple[tuple[Literal["pro", "opp"], str], ...] = (("pro", "Proponents"), ("opp", "Opponents"))


@dataclass(frozen=True)
class ComparedHit:
    """A training row in one of two answers, or in both; a rank or score is "" where it is missing."""

    row: int
    id: Id
    view: ExampleView
    ranks: tuple[str, str]
    scores: tuple[str, str]

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
    """Two answers to one query."""

    name: str
    example: ExampleView
    lists: tuple[ComparedList, ...]


def compare_answers(
    examples: Examples, pairs: Sequence[tuple[Answer, Answer]], names: Sequence[str]
) -> tuple[Comparison, ...]:
    """Return comparisons of pairs of answers; `names` are those of the queries."""
    return tuple(
        Comparison(
            name,
            examples.view(one.side, one.members[0]),
            tuple(
                _compare_hits(examples, kind, heading, _choose(one, kind), _choose(other, kind))
                for kind, heading in _KINDS
            ),
        )
        for (one, other), name in zip(pairs, names, strict=True)
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
        ranks, scores = (
            tuple("" if place is None else form(place) for place in found)
            for form in (lambda place: str(place[0]), lambda place: format_score(place[1].score))
        )
        hits.append(ComparedHit(row, hit.id, examples.view("train", row), ranks, scores))  # type: ignore[arg-type]
    n_shared = sum(hit.is_shared for hit in hits)
    return ComparedList(kind, heading, tuple(hits), f"{n_shared} of {max(len(one), len(other))} in both")
