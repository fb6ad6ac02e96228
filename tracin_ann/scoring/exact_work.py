"""Whether a build measures the fidelity of a score with a curvature matrix: an estimate of the work.

The exact scores need the inverse of a matrix over all parameters (`scoring.exact_preconditioning`): gradients of the
rows of its sample, their Gram matrix or the eigenvectors of each layer, and passes over the sample for every query.
Work is counted in multiply-adds at one checkpoint. A gradient has three for each entry of the parameters if the model
uses every entry once for an example, and an inner product with a query has one.

Shapes: N training rows, M rows of the sample, Q queries, P parameter entries, R rows and C columns of a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tracin_ann.scoring.ekfac import LARGEST_SIDE
from tracin_ann.scoring.exact_preconditioning import choose_inverse
from tracin_ann.scoring.gram import count_gradients
from tracin_ann.store import ParameterSpec

_SMALL_WORK = 400 * 10**9
"""The most multiply-adds over all checkpoints that take seconds: less than a minute of a CPU core."""
_OF_GRADIENT = 3
"""Multiply-adds of a gradient for each entry of the parameters."""
_OF_FACTOR = 2
"""Those of the factor and of the diagonal of the inverse of a matrix in float64, in units of its side to the power of
three: half as many, which take twice as long as in float32."""
_OF_EIGENVECTORS = 10
"""Those of the eigenvectors of a matrix, in units of its side to the power of three."""
_BYTES = 4


@dataclass(frozen=True)
class ExactWork:
    """The work of exact scores with a curvature matrix.

    Attributes:
        parameters: of the model.
        n_checkpoints: the checkpoints with a learning rate above 0.
        n_rows: N.
        n_queries: Q.
        n_scored: rows that are scored exactly.
    """

    parameters: Sequence[ParameterSpec]
    n_checkpoints: int
    n_rows: int
    n_queries: int
    n_scored: int

    @property
    def is_small(self) -> bool:
        """Return whether it is less than the work of the features, or takes seconds.

        The second is known only if most entries of the parameters are those of layers that are called once per example:
        a model over sequences uses each entry at every position.
        """
        entries, outer = self._entries, sum(prod(p.shape) for p in self.parameters if p.rank_one)
        products = self.count_products()
        is_short = 2 * outer >= entries and self.n_checkpoints * products <= _SMALL_WORK
        return is_short or products <= _OF_GRADIENT * self.n_rows * entries

    def count_products(self) -> int:
        """Return the multiply-adds at one checkpoint."""
        entries = self._entries
        has_gram, n_sampled = choose_inverse(self.n_rows, entries)
        scored = self.n_scored * (_OF_GRADIENT + self.n_queries) * entries
        if has_gram:
            gradients = _OF_GRADIENT * entries * count_gradients(n_sampled, max(1, entries) * _BYTES)
            pairs = n_sampled**2 // 2 * sum(_count_pair(p) for p in self.parameters)
            passes = 2 * n_sampled * (_OF_GRADIENT + self.n_queries) * entries
            return scored + gradients + pairs + passes + _OF_FACTOR * n_sampled**3
        sides = [side for p in self.parameters for side in _measure_sides(p) if side <= LARGEST_SIDE]
        fit = 2 * n_sampled * (_OF_GRADIENT * entries + sum(side**2 for side in sides))
        return scored + fit + _OF_EIGENVECTORS * sum(side**3 for side in sides)

    @property
    def _entries(self) -> int:
        return sum(prod(p.shape) for p in self.parameters)


def _measure_sides(parameter: ParameterSpec) -> tuple[int, int]:
    """Return R and C."""
    return (parameter.shape[0] if parameter.shape else 1), prod(parameter.shape[1:])


def _count_pair(parameter: ParameterSpec) -> int:
    """Return the multiply-adds of the inner product of two gradients of a parameter."""
    return sum(_measure_sides(parameter)) if parameter.rank_one else prod(parameter.shape)
