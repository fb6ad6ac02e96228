"""Curvature of the training loss at each checkpoint: second moments of the stored gradients.

K_c = (1/N) Σ_z w_z φ_z φ_zᵀ, where φ_z is the sketched gradient of the loss of row z, without √η_c. The weights w are

- `fisher`: 1, the empirical Fisher matrix;
- `gauss-newton`: p / (1 - p) with p = exp(-loss), for a loss that is -log p of one label: the gradient of the loss is
  (1 - p) times that of the margin log(p / (1 - p)), so that K is the sum of p (1 - p) times the products of the
  gradients of margins, the Gauss-Newton matrix of a logistic loss in the margin;
- `trak`: 1 / (1 - p)², products of the gradients of margins (Park et al. 2023, arXiv 2303.14186, eq. 15).

(K_c + λI)⁻¹ maps the gradient of a query to the change of the weights that lowers its loss the most for a given change
of the training loss. The damping λ_c = 1 / (η_c T) follows from the length of training: T steps of gradient descent
with the rate η fit the directions of eigenvalues above 1 / (η T), and leave the others as they were.

The rounding of features that are stored as codes adds the same to all eigenvalues of K. It is a further damping and is
not subtracted: the scores would agree no better with those of unrounded features (docs/design.md).

Shapes: N training rows, M rows of the sample, C checkpoints, D sketch dimension, Q queries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tracin_ann.choices import CurvatureName
from tracin_ann.errors import NonFiniteError, UsageError, problem
from tracin_ann.store import FeatureStore, make_text_array, noise_ratio, read_arrays, write_arrays
from tracin_ann.types import Float32, Float64, Int64

_MOST_ROWS = 65_536
"""Rows of the sample. The error of K falls as 1 / √M; it is small if M is several times the effective dimension."""
_ROWS_AT_ONCE, _NUMBERS_AT_ONCE = 8192, 1 << 23
"""Rows, and numbers of rows, that are in memory at a time."""
_TRACE_FRACTION = 5e-4
"""The least λ as a fraction of tr K."""
_LARGEST_P = 1 - 1e-4
"""Rows that are fitted better than this have the weight of this probability."""
_ROUNDING = 1e-6
"""A loss of -log p may be this far below 0."""

logger = logging.getLogger(__name__)


def suggest_dim(dim: int, effective: float) -> int | None:
    """Return the sketch dimension that suffices for an effective dimension d_λ; None if `dim` does.

    It is the least power of 2 that is at least 3 d_λ. d_λ of a small sketch is an underestimate, so that an even larger
    sketch may be needed.
    """
    return None if dim >= 3 * effective else 1 << (math.ceil(3 * effective) - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Curvature:
    """The second moment of the gradients at one checkpoint.

    Attributes:
        matrix_DD: K / `scale`², float32 [D, D], symmetric.
        scale: the largest √w ‖φ‖ of the sample, so that no square overflows; 0 if all rows are zero.
        n_rows: M, the rows that K was computed from.
        error: ‖K_1 - K_2‖ / (2 ‖K‖) in the Frobenius norm, for K_1 and K_2 of two halves of the sample: the relative
            standard error of K.
        noise_ratio: tr K divided by that of rows without the rounding of codes.
    """

    matrix_DD: Float32
    scale: float
    n_rows: int
    error: float
    noise_ratio: float = 1.0

    @cached_property
    def trace(self) -> float:
        """Return tr K, the mean of w ‖φ‖², of rows without the rounding of codes."""
        return self.scale**2 * float(np.trace(self.matrix_DD, dtype=np.float64)) / self.noise_ratio

    @property
    def rounding(self) -> float:
        """Return what the rounding of codes adds to each eigenvalue of K: it has no direction."""
        return (self.noise_ratio - 1) * self.trace / len(self.matrix_DD)

    def choose_damping(self, rate: float, steps: float | None) -> tuple[float, str]:
        """Return λ and its rule: the larger of 1 / (rate · steps) and 5e-4 · tr K; without `steps`, the latter.

        Directions whose curvature is below the first were hardly learned in a training of this length. In a long one it
        falls below the second, which agrees better with retraining there (docs/scores.md). λ is 1 if K is zero: scores
        are zero with any damping.
        """
        implied = 1 / (rate * steps) if steps is not None and rate > 0 else 0.0
        least = _TRACE_FRACTION * self.trace
        if implied > least:
            return implied, "1 / (learning rate × steps)"
        return least or 1.0, "5e-4 of the trace"

    def effective_dimension(self, damping: float) -> float:
        """Return d_λ = tr K (K + λI)⁻¹ = D - λ tr (K + λI)⁻¹, the number of directions that are not damped.

        The rounding of codes is a part of λ.
        """
        solver = self.factorise(damping)
        if solver.factor_DD is None:
            return 0.0
        return len(self.matrix_DD) - (damping + self.rounding) / self.scale**2 * solver.inverse_trace

    def factorise(self, damping: float, part: slice = slice(None)) -> Solver:
        """Return the solver with K + λI, or with the block of some of the D entries.

        Raises:
            NonFiniteError: the matrix is not positive definite in float64.
        """
        if self.scale == 0:
            return Solver(None, 1.0)
        block = torch.from_numpy(self.matrix_DD[part, part]).double()
        block.diagonal().add_(damping / self.scale**2)
        return Solver(
            factorise_damped(block, f"a damping of {damping:.3g} for a trace of {self.trace:.3g}"), self.scale
        )


def factorise_damped(matrix_DD: Tensor, description: str) -> Tensor:
    """Return the Cholesky factor of a damped curvature matrix, float64.

    Raises:
        NonFiniteError: the matrix is not positive definite; the message contains its description.
    """
    factor_DD: Tensor
    factor_DD, info = torch.linalg.cholesky_ex(matrix_DD)
    if int(info):
        what, expected = "the curvature matrix cannot be inverted", "a positive definite matrix"
        raise NonFiniteError(problem(what, got=description, expected=expected, remedy="increase --damping"))
    return factor_DD


@dataclass(frozen=True, eq=False)
class Solver:
    """Products with (K + λI)⁻¹ by the Cholesky factor of K / scale² + λ / scale², float64; None if K is zero."""

    factor_DD: Tensor | None
    scale: float

    def solve(self, vector_QD: Float64) -> Float64:
        """Return (K + λI)⁻¹ v · scale² for each vector; zero if K is zero."""
        if self.factor_DD is None:
            return np.zeros_like(vector_QD)
        solved: Float64 = torch.cholesky_solve(torch.from_numpy(vector_QD.T.copy()), self.factor_DD).T.numpy()
        return solved

    def whiten(self, vector_ND: Float32) -> Float32:
        """Return L⁻¹ v for each vector, L Lᵀ = K / scale² + λ / scale², so that norms are those of the metric."""
        if self.factor_DD is None:
            return np.zeros_like(vector_ND)
        whitened: Float32 = (torch.from_numpy(np.ascontiguousarray(vector_ND)) @ self._inverse_DD.T).numpy()
        return whitened

    @property
    def inverse_trace(self) -> float:
        """Return tr (L Lᵀ)⁻¹ = ‖L⁻¹‖²."""
        return float(self._invert().square().sum())

    @cached_property
    def _inverse_DD(self) -> Tensor:
        """L⁻¹ in float32: one matrix product for a block of rows."""
        return self._invert().float()

    def _invert(self) -> Tensor:
        assert self.factor_DD is not None
        identity = torch.eye(len(self.factor_DD), dtype=torch.float64)
        inverse_DD: Tensor = torch.linalg.solve_triangular(self.factor_DD, identity, upper=False)
        return inverse_DD


@dataclass(frozen=True)
class CurvatureSource:
    """The stored features and losses of the rows that K is computed from.

    Attributes:
        store: the stored features.
        rows_N: positions of the training rows that answers may contain, ascending.
        rates: η_c of all checkpoints.
        loss_is_nll: whether the loss is -log p of one label; None: not known.
        folder: where matrices are kept.
    """

    store: FeatureStore
    rows_N: Int64
    rates: Sequence[float]
    loss_is_nll: bool | None
    folder: Path

    def load(self, name: CurvatureName) -> list[Curvature]:
        """Return K of every checkpoint: from the file of an earlier call, or computed in one pass over the sample.

        Raises:
            UsageError: the weights need probabilities, and the losses are not -log p of one label.
            DamagedIndexError: a feature file is damaged.
        """
        path = self.folder / f"curvature-{name}.npz"
        found = self._read(path)
        if found is None:
            found = [self._compute(name, checkpoint) for checkpoint in range(len(self.rates))]
            self._write(path, found)
        return found

    def _read(self, path: Path) -> list[Curvature] | None:
        """Return the matrices of a file, or None if there is none or it is damaged or of other rows."""
        try:
            arrays = read_arrays(path)
            is_same = arrays["key"].tolist() == [self._key]
            matrix_CDD, *columns = (arrays[name] for name in ("matrix_CDD", "scale_C", "n_rows_C", "error_C"))
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - a damaged file raises errors of any type
            logger.warning("%s is computed again: %s: %s", path, type(error).__name__, error)
            return None
        n_checkpoints, dim = len(self.rates), self.store.layout.dim
        shapes = [(n_checkpoints, dim, dim), *[(n_checkpoints,)] * len(columns)]
        if not is_same or [a.shape for a in (matrix_CDD, *columns)] != shapes or matrix_CDD.dtype != np.float32:
            return None
        ratio_C = [noise_ratio(self.store.layout.dtype)] * n_checkpoints
        values = [*(column.tolist() for column in columns), ratio_C]
        return [Curvature(matrix_DD, *own) for matrix_DD, *own in zip(matrix_CDD, *values, strict=True)]

    def _write(self, path: Path, found: Sequence[Curvature]) -> None:
        """Keep the matrices for later calls, where the index can be written to."""
        arrays = {
            "key": make_text_array([self._key]),
            "matrix_CDD": np.stack([curvature.matrix_DD for curvature in found]),
            "scale_C": np.array([curvature.scale for curvature in found]),
            "n_rows_C": np.array([curvature.n_rows for curvature in found]),
            "error_C": np.array([curvature.error for curvature in found]),
        }
        try:
            write_arrays(path, arrays)
        except OSError as error:
            logger.warning("the curvature cannot be kept for later commands: %s", error)

    @property
    def _key(self) -> str:
        """Return what the matrices depend on besides the generation: format, size of the sample, rates."""
        return repr((1, _MOST_ROWS, len(self.rows_N), *self.rates))

    @cached_property
    def _sample_M(self) -> Int64:
        if len(self.rows_N) <= _MOST_ROWS:
            return self.rows_N
        chosen = np.random.default_rng(0).choice(len(self.rows_N), _MOST_ROWS, replace=False)
        return self.rows_N[np.sort(chosen)]

    def _compute(self, name: CurvatureName, checkpoint: int) -> Curvature:
        """Return K of a checkpoint."""
        dim, rate, sample_M = self.store.layout.dim, self.rates[checkpoint], self._sample_M
        empty = Curvature(np.zeros((dim, dim), np.float32), 0.0, len(sample_M), 0.0)
        if rate == 0 or not len(sample_M):
            return empty
        root_M = np.sqrt(self.weigh_rows(name, checkpoint, sample_M))
        scale = float((root_M * np.sqrt(self.store.sqnorms([checkpoint])[sample_M, 0])).max())
        if scale == 0:
            return empty
        # Rows of even and of odd places, so that their difference shows the error of the sample.
        halves = [torch.zeros(dim, dim) for _ in range(2)]
        for start, row_BD in self._blocks(checkpoint):
            root_B = root_M[start : start + len(row_BD)] / (scale * rate**0.5)
            scaled = torch.from_numpy((row_BD * root_B[:, None]).astype(np.float32))
            for parity, half_DD in enumerate(halves):
                half_DD.addmm_(scaled[parity::2].T, scaled[parity::2])
        matrix_DD = (halves[0] + halves[1]) / len(sample_M)
        difference = halves[0] / max(1, (len(sample_M) + 1) // 2) - halves[1] / max(1, len(sample_M) // 2)
        error = float(torch.linalg.norm(difference) / (2 * torch.linalg.norm(matrix_DD)).clamp(min=1e-30))
        return Curvature(matrix_DD.numpy(), scale, len(sample_M), error, noise_ratio(self.store.layout.dtype))

    def _blocks(self, checkpoint: int) -> Iterator[tuple[int, Float64]]:
        """Yield (place of the first row in the sample, stored rows [B, D] in float64) of a checkpoint."""
        view = self.store.view([checkpoint])
        # An even number, so that places in a block are even where places in the sample are.
        n_rows = max(2, min(_ROWS_AT_ONCE, _NUMBERS_AT_ONCE // view.dim) // 2 * 2)
        for start in range(0, len(self._sample_M), n_rows):
            yield start, view.take(self._sample_M[start : start + n_rows]).astype(np.float64)

    def check_losses(self, name: CurvatureName) -> None:
        """Check that the losses of all rows allow the weights; errors as of `weigh_rows`."""
        for checkpoint, rate in enumerate(self.rates):
            if rate > 0:
                self.weigh_rows(name, checkpoint, self.rows_N)

    def weigh_rows(self, name: CurvatureName, checkpoint: int, rows_M: Int64) -> Float64:
        """Return the weights w [M] of rows.

        Raises:
            UsageError: a weight needs the probability of the label, and the losses are not -log p of one label.
        """
        if name == "fisher":
            return np.ones(len(rows_M))
        loss_M = self.store.losses([checkpoint])[rows_M, 0].astype(np.float64)
        if self.loss_is_nll is False or loss_M.min(initial=0) < -_ROUNDING:
            smallest = f"a loss of {loss_M.min(initial=0):.3g} at checkpoint {checkpoint}"
            raise UsageError(
                problem(
                    f"--score {name} needs the probability of the label of each row",
                    got="a task with loss_is_nll=False" if self.loss_is_nll is False else smallest,
                    expected="a loss that is -log p of one label, which is 0 or more",
                    remedy="use --score fisher (Task.score), which accepts any loss",
                )
            )
        p_M = np.minimum(np.exp(-np.maximum(loss_M, 0)), _LARGEST_P)
        weight_M: Float64 = p_M / (1 - p_M) if name == "gauss-newton" else (1 - p_M) ** -2
        return weight_M
