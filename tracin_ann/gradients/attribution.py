"""Attribution of rows to examples: the example of each row of a layer's call, from gradients of weighted losses.

The first dimension of a layer's input may not be the batch: nodes of graphs, tokens of packed text, options of
questions, positions that a mask selects. Sizes do not determine the example of a row; gradients do. If the losses are
weighted by w_b, the output gradient of row r is w_e(r) times the unweighted one, with e(r) the example of the row, so
the ratio identifies the example. If the ratio is not the weight of an example, the row has gradients of several.

Of large gradients, only a few random projections of each row are computed and stored.

Shapes: B batch, R rows, C features of a row, J projections, K passes with weighted losses, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from tracin_ann.gradients.layers.base import Call, LayoutError

_LARGEST_WEIGHT = 4.0
_SMALLEST_SQUARE = 1e-37
# A batch is arranged in several parts if padding would multiply the number of its rows by more than this.
_MAX_PADDING = 2


@dataclass(frozen=True)
class Tolerances:
    """Bounds of the rounding errors of a row's gradient.

    Attributes:
        levels: number of weights that one pass distinguishes.
        relative: rounding error relative to the row's norm.
        floor: rounding error relative to the largest norm of a row, for rows whose gradient is almost zero.
        mismatch: error relative to the row's norm that rounding cannot explain: the row belongs to another example.
    """

    levels: int
    relative: float
    floor: float
    mismatch: float

    def rounding(self, norm_R: Tensor) -> Tensor:
        """Return the largest rounding errors of rows with these norms, [R]."""
        return self.relative * norm_R + self.floor * norm_R.amax() if len(norm_R) else norm_R


_FULL = Tolerances(2048, 1e-3, 1e-5, 3e-2)
# Accelerators multiply float32 with reduced precision.
_ACCELERATED = Tolerances(192, 1e-2, 1e-3, 1e-1)
_HALF = Tolerances(24, 8e-2, 1e-2, 0.4)
_PROJECTIONS = 8
_SMALL_ELEMENTS = 1 << 20
_IRRATIONAL = 2.399963


def project(grad: Tensor, n_rows: int) -> Tensor:
    """Return fixed projections of each row of an output gradient, [R, J]; a small gradient is returned as [R, C]."""
    grad_RC = grad.reshape(n_rows, -1)
    if grad_RC.shape[1] <= _PROJECTIONS or grad_RC.numel() <= _SMALL_ELEMENTS:
        return grad_RC
    # A product with few columns is slower than its transpose.
    return (_projections(grad_RC.shape[1], grad.device, grad.dtype) @ grad_RC.T).T.contiguous()


@lru_cache(maxsize=64)
def _projections(n_features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    steps = torch.arange(1, _PROJECTIONS * n_features + 1, dtype=torch.float64)
    return steps.mul_(_IRRATIONAL).cos_().view(_PROJECTIONS, n_features).to(device, dtype)


class WeightCode:
    """Weights of a batch's losses, [K, B], that differ between examples by more than rounding.

    The weights are ± a geometric series in random order. One pass is enough for 2,048 examples in float32. In half
    precision there are 24 weights, and K passes encode the number of an example in base 24.
    """

    def __init__(self, batch: int, device: torch.device, *, half: bool) -> None:
        self.batch = batch
        self.tolerances = _HALF if half else _FULL if device.type == "cpu" else _ACCELERATED
        n_levels = min(self.tolerances.levels, batch + batch % 2)
        n_passes = 1
        while n_levels**n_passes < batch:
            n_passes += 1
        one_side = np.geomspace(1 / _LARGEST_WEIGHT, _LARGEST_WEIGHT, n_levels // 2)
        levels_L = torch.from_numpy(np.concatenate([-one_side[::-1], one_side]))
        random = np.random.Generator(np.random.Philox(batch))
        number_B = torch.from_numpy(random.permutation(batch))
        power = n_levels ** torch.arange(n_passes).unsqueeze(1)
        self._base = n_levels
        self._levels_L = levels_L.to(device, torch.float32 if device.type == "mps" else torch.float64)
        self._between_l = (self._levels_L[1:] + self._levels_L[:-1]) / 2
        self._example_of = torch.argsort(number_B).to(device)
        self.weights_KB = self._levels_L[(number_B // power % n_levels).to(device)]

    def attribute(self, plain_RJ: Tensor, weighted: Sequence[Tensor], guess_R: Tensor | None = None) -> Tensor:
        """Return the example of each row, int64 [R]; -1 for a row without a gradient.

        Args:
            plain_RJ: projections of the rows' gradients of Σ_b ℓ_b.
            weighted: projections of the gradients of Σ_b w_kb ℓ_b, [R, J], for each pass.
            guess_R: a possible result, -1 for unknown examples; returned if it agrees with the gradients.

        Raises:
            LayoutError: a row has gradients of several examples.
        """
        norm_R = torch.linalg.vector_norm(plain_RJ, dim=1)
        rounding_R = self.tolerances.rounding(norm_R)
        if guess_R is not None and not self._disagrees(plain_RJ, weighted, guess_R, rounding_R):
            return guess_R
        number_R = torch.zeros(len(plain_RJ), dtype=torch.int64, device=plain_RJ.device)
        mixed_R = torch.zeros(len(plain_RJ), dtype=torch.bool, device=plain_RJ.device)
        for k, weighted_RJ in enumerate(weighted):
            ratio_R = torch.linalg.vecdot(weighted_RJ, plain_RJ) / norm_R.square().clamp_min(_SMALLEST_SQUARE)
            digit_R = torch.bucketize(ratio_R.to(self._levels_L.dtype), self._between_l)
            mixed_R |= _differ(weighted_RJ, plain_RJ, self._levels_L[digit_R].to(plain_RJ.dtype), rounding_R)
            number_R += digit_R * self._base**k
        mixed_R |= (number_R >= self.batch) & (norm_R > rounding_R)
        if bool(mixed_R.any()):
            raise LayoutError(f"{int(mixed_R.sum())} of its {len(mixed_R)} rows have gradients of several examples")
        example_R = self._example_of[number_R.clamp_max(self.batch - 1)]
        return example_R.masked_fill(norm_R == 0, -1)

    def is_mismatch(self, plain_RJ: Tensor, weighted: Sequence[Tensor], example_R: Tensor) -> bool:
        """Return whether a row certainly does not belong to its assumed example; arguments as in `attribute`.

        Rows that are not finite are ignored.
        """
        finite_R1 = torch.isfinite(plain_RJ).all(1, keepdim=True)
        for each in weighted:
            finite_R1 &= torch.isfinite(each).all(1, keepdim=True)
        plain_RJ, *weighted = (torch.where(finite_R1, each, 0) for each in (plain_RJ, *weighted))
        norm_R = torch.linalg.vector_norm(plain_RJ, dim=1)
        floor = self.tolerances.floor * norm_R.amax()
        return self._disagrees(plain_RJ, weighted, example_R, self.tolerances.mismatch * norm_R + floor)

    def _disagrees(self, plain_RJ: Tensor, weighted: Sequence[Tensor], example_R: Tensor, rounding_R: Tensor) -> bool:
        weights_KR = torch.where(example_R >= 0, self.weights_KB[:, example_R], 0).to(plain_RJ.dtype)
        return any(
            bool(_differ(weighted_RJ, plain_RJ, weight_R, rounding_R).any())
            for weighted_RJ, weight_R in zip(weighted, weights_KR, strict=True)
        )


def _differ(weighted_RJ: Tensor, plain_RJ: Tensor, weight_R: Tensor, rounding_R: Tensor) -> Tensor:
    """Return which rows [R] differ from weight · plain row by more than rounding, or contain NaN."""
    difference_RJ = torch.addcmul(weighted_RJ, plain_RJ, weight_R.unsqueeze(1), value=-1)
    agree_R: Tensor = torch.linalg.vector_norm(difference_RJ, dim=1) <= weight_R.abs() * rounding_R
    return ~agree_R


class Arrangement:
    """Arranges the rows of calls by example, for all calls with the same examples of rows.

    Args:
        example_R: the example of each row, -1 for none.
        batch: B.
    """

    def __init__(self, example_R: Tensor, batch: int) -> None:
        self.example_R, self.batch = example_R, batch
        self._by_sizes: dict[tuple[int, ...], tuple[bool, list[_Part] | None]] = {}

    def parts(self, call: Call, n_leading: int) -> Iterator[tuple[slice, Call]]:
        """Yield a range of examples, and a call with the same number of rows for each of these examples.

        An example with fewer rows is padded with copies of a row whose gradient is zero.

        Args:
            call: of a layer on these rows.
            n_leading: number of leading dimensions of its input that are rows.
        """
        sizes = tuple(call.input.shape[:n_leading])
        if sizes not in self._by_sizes:
            example_R = _merge_by_first_dimension(self.example_R, sizes)
            flat = n_leading == 0 or len(example_R) != prod(sizes[:1])
            uniform = is_uniform(example_R, self.batch)
            self._by_sizes[sizes] = flat, None if uniform else list(_make_parts(example_R, self.batch))
        flat, parts = self._by_sizes[sizes]
        call = _flatten_rows(call, n_leading) if flat else call
        if parts is None:
            yield slice(0, self.batch), call
            return
        for part in parts:
            yield part.examples, part.take(call)


@dataclass(frozen=True)
class _Part:
    """A range of examples of a batch, with the same number of rows for each; some of these rows are padding."""

    examples: slice
    row_r: Tensor
    padding_s: Tensor

    def take(self, call: Call) -> Call:
        """Return the call on these rows; the gradient of padding is zero."""
        # index_select is five times as fast as indexing with brackets.
        x, grad = (tensor.index_select(0, self.row_r) for tensor in (call.input, call.grad_output))
        output = None if call.output is None else call.output.index_select(0, self.row_r)
        n_examples = self.examples.stop - self.examples.start
        return Call(call.module, x, grad.index_fill_(0, self.padding_s, 0), n_examples, output)


def _make_parts(example_R: Tensor, batch: int) -> Iterator[_Part]:
    device, example_R = example_R.device, example_R.cpu()
    row_r = (example_R >= 0).nonzero()[:, 0]
    if not len(row_r):
        return
    order = row_r[torch.argsort(example_R[row_r], stable=True)]
    counts = torch.bincount(example_R[row_r], minlength=batch)
    starts = torch.cumsum(counts, 0) - counts
    for first, last in _split_examples(counts.tolist(), 0, batch):
        position = torch.arange(max(1, int(counts[first:last].max())))
        padding = (position >= counts[first:last, None]).flatten().nonzero()[:, 0]
        row = order[(starts[first:last, None] + position).clamp_max(len(order) - 1)]
        yield _Part(slice(first, last), row.flatten().to(device), padding.to(device))


def is_uniform(example_R: Tensor, batch: int) -> bool:
    """Return whether the rows are the batch's examples in order, with the same number of rows for each."""
    if not len(example_R) or len(example_R) % batch:
        return False
    expected = torch.arange(batch, device=example_R.device).unsqueeze(1)
    example_Bn = example_R.view(batch, -1)
    return bool(((example_Bn == expected) | (example_Bn < 0)).all())


def _merge_by_first_dimension(example_R: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return one example per entry of the first dimension, if all its rows belong to one; otherwise one per row."""
    if len(sizes) < 2 or not len(example_R):  # noqa: PLR2004
        return example_R
    example_SR = example_R.view(sizes[0], -1)
    highest_S = example_SR.amax(1)
    agrees = (example_SR == highest_S.unsqueeze(1)) | (example_SR < 0)
    return highest_S if bool(agrees.all()) else example_R


def _flatten_rows(call: Call, n_leading: int) -> Call:
    """Return the call with its leading dimensions flattened to one."""

    def flatten(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, *tensor.shape[n_leading:])

    output = None if call.output is None else flatten(call.output)
    return replace(call, input=flatten(call.input), grad_output=flatten(call.grad_output), output=output)


def _split_examples(counts: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of examples, halved until each needs little padding."""
    sizes = counts[first:last]
    if last - first > 1 and max(sizes) * len(sizes) > _MAX_PADDING * max(1, sum(sizes)):
        middle = (first + last) // 2
        yield from _split_examples(counts, first, middle)
        yield from _split_examples(counts, middle, last)
    else:
        yield first, last
