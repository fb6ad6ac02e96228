"""How an example is displayed: text, an image, a table or tokens (`Description`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracin_ann.errors import TaskError, problem


@dataclass(frozen=True)
class Description:
    """How an example is displayed: as text, an image, a table, tokens with scores, or several of these.

    Attributes:
        text: a description in words; commands and tables show only this.
        image: an array or tensor, H×W, 1×H×W, 3×H×W or H×W×3.
        table: names and values of a tabular row, the most important first.
        tokens: the tokens of a text.
        token_scores: one finite number per token, displayed as its shade; requires `tokens`.
    """

    text: str | None = None
    image: Any | None = None
    table: Mapping[str, Any] | None = None
    tokens: Sequence[str] | None = None
    token_scores: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check that there is one finite score per token.

        Raises:
            TaskError: the number of scores differs from that of tokens, or a score is NaN or infinite.
        """
        if self.token_scores is None:
            return
        n_tokens, n_scores = len(self.tokens or ()), len(self.token_scores)
        wrong = [score for score in self.token_scores if not math.isfinite(float(score))]
        if n_tokens != n_scores or wrong:
            raise TaskError(
                problem(
                    "Description.token_scores does not match its tokens",
                    got=f"a score {wrong[0]}" if wrong else f"{n_scores} scores for {n_tokens} tokens",
                    expected="one finite number for each of Description.tokens",
                    remedy="correct Task.describe",
                )
            )
