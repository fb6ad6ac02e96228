"""Parts of one score by token: those of the training row's target positions, and those of the query's.

Shapes: T target positions of an example.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tracin_ann.analysis.pairs import Pair
from tracin_ann.choices import SideName
from tracin_ann.results import Describe, Fields, Record, RowList, make_token_texts, match_tokens
from tracin_ann.types import Float64

ExampleName = Literal["row", "query"]


@dataclass(frozen=True)
class TokenPart:
    """The part of a score that one target position contributes at one checkpoint.

    Attributes:
        example: the example that is split: the training `row`, or the `query`.
        position: of the token, from 0.
        token: its text from `Description.tokens`; None if the task does not describe it.
        checkpoint: position of the checkpoint.
        contribution: η_c ⟨∇ℓ_t(w_c, z), ∇ℓ(w_c, z')⟩ for position t of the example z, where z' is the other one; for a
            score with a curvature matrix, the product with the preconditioned gradient of the other one.
        share: the contribution divided by the sum of the absolute contributions of all parts of this example.
    """

    example: ExampleName
    position: int
    token: str | None
    checkpoint: int
    contribution: float
    share: float


class TokenExplanation(RowList[TokenPart]):
    """The parts of one exact score by token: of the row, then of the query, by position and then by checkpoint.

    The parts of each of the two examples sum to the score, up to rounding. Without parts of the query, the task does
    not split `query_loss` (`Task.query_token_losses`).

    Attributes:
        pair: the training row and the query.
        score: the exact score, the sum of the parts of the row.
        stored_score: the score from the stored features.
        inputs: the examples of the side `input`, if the query is one of them.
    """

    FIELDS = Fields(
        (
            ("query", "id"),
            ("query_row", "int"),
            ("side", "text"),
            ("id", "id"),
            ("row", "int"),
            ("example", "text"),
            ("position", "int"),
            ("token", "text"),
            ("checkpoint", "int"),
            ("contribution", "float"),
            ("share", "float"),
            ("score", "float"),
            ("stored_score", "float"),
        )
    )

    def __init__(
        self,
        parts: Mapping[ExampleName, Mapping[int, Float64]],
        describe: Describe,
        pair: Pair,
        stored_score: float,
        inputs: Any = None,
    ) -> None:
        """Collect the parts.

        Args:
            parts: [T] by example and checkpoint.
            describe: returns the description of a row, with its tokens.
            pair: the training row and the query.
            stored_score: the score from the stored features.
            inputs: the examples of the side `input`, if the query is one of them.
        """
        find_texts, sides = make_token_texts(describe), _list_sides(pair)
        self._texts = {example: list(find_texts(*sides[example]) or ()) for example in parts}
        super().__init__(
            [part for example, each in parts.items() for part in _list_parts(example, each, self._texts[example])],
            describe,
        )
        self.pair, self.stored_score, self.inputs = pair, stored_score, inputs
        self.score = math.fsum(part.contribution for part in self if part.example == "row")

    @property
    def difference(self) -> float:
        """Return the stored score minus the exact score."""
        return self.stored_score - self.score

    @property
    def examples(self) -> tuple[ExampleName, ...]:
        """Return the examples that are split: `row`, and `query` if the task splits the loss of queries."""
        return tuple(dict.fromkeys(part.example for part in self))

    def by_position(self, example: ExampleName = "row") -> list[float]:
        """Return the contribution of each target position of an example, over all checkpoints."""
        values: dict[int, list[float]] = defaultdict(list)
        for part in self:
            if part.example == example:
                values[part.position].append(part.contribution)
        return [math.fsum(summands) for summands in values.values()]

    def by_token(self, example: ExampleName = "row") -> list[tuple[str, float]]:
        """Return the tokens of an example with their contributions; a position without a text is its number."""
        return list(match_tokens(self._texts.get(example), self.by_position(example)))

    def by_checkpoint(self, example: ExampleName = "row") -> dict[int, float]:
        """Return the contribution of each checkpoint to the score, in the requested order."""
        values: dict[int, list[float]] = defaultdict(list)
        for part in self:
            if part.example == example:
                values[part.checkpoint].append(part.contribution)
        return {checkpoint: math.fsum(summands) for checkpoint, summands in values.items()}

    def record(self, row: TokenPart) -> Record:
        """Return a part's record."""
        return {
            "query": self.pair.query,
            "query_row": self.pair.query_row,
            "side": self.pair.side,
            "id": self.pair.id,
            "row": self.pair.row,
            "example": row.example,
            "position": row.position,
            "token": row.token,
            "checkpoint": row.checkpoint,
            "contribution": row.contribution,
            "share": row.share,
            "score": self.score,
            "stored_score": self.stored_score,
        }


def _list_sides(pair: Pair) -> dict[ExampleName, tuple[SideName, int]]:
    return {"row": ("train", pair.row), "query": (pair.side, pair.query_row)}


def _list_parts(example: ExampleName, parts: Mapping[int, Float64], texts: list[str]) -> list[TokenPart]:
    total = math.fsum(abs(value) for part_T in parts.values() for value in part_T.tolist()) or 1.0
    by_position = zip(*(part_T.tolist() for part_T in parts.values()), strict=True)
    return [
        TokenPart(example, t, texts[t] if t < len(texts) else None, checkpoint, value, value / total)
        for t, values in enumerate(by_position)
        for checkpoint, value in zip(parts, values, strict=True)
    ]
