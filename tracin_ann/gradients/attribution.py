"""Attribution: which example each row of a layer's call belongs to, read from gradients of weighted losses.

A layer may run on rows that are no batch: nodes of graphs, tokens of texts packed one after another, options of
questions, positions that a mask chose. Sizes do not tell whose a row is; gradients do. With the losses weighted by
w_b, the output gradient of row r is w_e(r) times the plain one, e(r) the row's example: the ratio names the example.
A row whose ratio is no example's weight gets gradients of several examples.

Of large gradients all is read from a few random projections of each row: one pass over it, and little to keep.

Shapes: B batch, R rows, C features of a row, J projections, K passes with weighted losses, L levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from tracin_ann.gradients.layers.base import Call, LayoutError

_LARGEST_WEIGHT = 4.0
_LEAST = 1e-37
# How many padded rows a row may cost before a batch's examples are arranged in more than one part.
_PADDED = 2


@dataclass(frozen=True)
class Precision:
    """What rounding leaves of a ratio.

    Attributes:
        levels: how many weights one pass tells apart.
        relative: rounding of a row's gradient, relative to its norm.
        floor: rounding relative to the largest row's norm, for rows whose gradient is all but zero.
        refuted: relative to a row's norm, what no rounding explains: the row is not the example's.
    """

    levels: int
    relative: float
    floor: float
    refuted: float

    def rounding(self, norm_R: Tensor) -> Tensor:
        """Return how far rounding may take rows' gradients of these norms from what they are, [R]."""
        return self.relative * norm_R + self.floor * norm_R.amax() if len(norm_R) else norm_R


_FULL = Precision(2048, 1e-3, 1e-5, 3e-2)
# Accelerators multiply float32 by parts of it.
_ACCELERATED = Precision(192, 1e-2, 1e-3, 1e-1)
_HALF = Precision(24, 8e-2, 1e-2, 0.4)
_PROJECTIONS = 8
_SMALL = 1 << 20
_IRRATIONAL = 2.399963


def project(grad: Tensor, n_rows: int) -> Tensor:
    """Return fixed projections of each row of an output gradient, [R, J]; what is small as it is, which is faster."""
    grad_RC = grad.reshape(n_rows, -1)
    if grad_RC.shape[1] <= _PROJECTIONS or grad_RC.numel() <= _SMALL:
        return grad_RC
    # A product with few columns is slow, its transpose is not.
    return (_projections(grad_RC.shape[1], grad.device, grad.dtype) @ grad_RC.T).T.contiguous()


@lru_cache(maxsize=64)
def _projections(n_features: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    steps = torch.arange(1, _PROJECTIONS * n_features + 1, dtype=torch.float64)
    return steps.mul_(_IRRATIONAL).cos_().view(_PROJECTIONS, n_features).to(device, dtype)


class WeightCode:
    """Weights of a batch's losses, [K, B]: example b has its own K weights, far enough apart for rounding.

    The weights are ± a geometric series, in random order. One pass is enough for 2,048 examples in float32; in half
    precision a weight is one of 24, and an example's number is written in that base.
    """

    def __init__(self, batch: int, device: torch.device, *, half: bool) -> None:
        self.batch = batch
        self.precision = _HALF if half else _FULL if device.type == "cpu" else _ACCELERATED
        n_levels = min(self.precision.levels, batch + batch % 2)
        n_passes = 1
        while n_levels**n_passes < batch:
            n_passes += 1
        one_side = np.geomspace(1 / _LARGEST_WEIGHT, _LARGEST_WEIGHT, n_levels // 2)
        levels_L = torch.from_numpy(np.concatenate([-one_side[::-1], one_side]))
        random = np.random.Generator(np.random.Philox(batch))
        number_B = torch.from_numpy(random.permutation(batch))
        place = n_levels ** torch.arange(n_passes).unsqueeze(1)
        self._base = n_levels
        self._levels_L = levels_L.to(device, torch.float32 if device.type == "mps" else torch.float64)
        self._between_l = (self._levels_L[1:] + self._levels_L[:-1]) / 2
        self._example_of = torch.argsort(number_B).to(device)
        self.weights_KB = self._levels_L[(number_B // place % n_levels).to(device)]

    def attribute(self, plain_RJ: Tensor, weighted: Sequence[Tensor], guess_R: Tensor | None = None) -> Tensor:
        """Return each row's example, int64 [R]; -1 for a row without a gradient.

        Args:
            plain_RJ: projections of the rows' gradient of Σ_b ℓ_b.
            weighted: those of Σ_b w_kb ℓ_b, [R, J], one for each pass.
            guess_R: examples that the rows may have, -1 where unknown; returned if they have them.

        Raises:
            LayoutError: some row gets gradients of several examples.
        """
        norm_R = torch.linalg.vector_norm(plain_RJ, dim=1)
        rounding_R = self.precision.rounding(norm_R)
        if guess_R is not None and not self._contradicts(plain_RJ, weighted, guess_R, rounding_R):
            return guess_R
        number_R = torch.zeros(len(plain_RJ), dtype=torch.int64, device=plain_RJ.device)
        mixed_R = torch.zeros(len(plain_RJ), dtype=torch.bool, device=plain_RJ.device)
        for k, weighted_RJ in enumerate(weighted):
            ratio_R = torch.linalg.vecdot(weighted_RJ, plain_RJ) / norm_R.square().clamp_min(_LEAST)
            digit_R = torch.bucketize(ratio_R.to(self._levels_L.dtype), self._between_l)
            mixed_R |= _differ(weighted_RJ, plain_RJ, self._levels_L[digit_R].to(plain_RJ.dtype), rounding_R)
            number_R += digit_R * self._base**k
        mixed_R |= (number_R >= self.batch) & (norm_R > rounding_R)
        if bool(mixed_R.any()):
            raise LayoutError(f"{int(mixed_R.sum())} of its {len(mixed_R)} rows get gradients of several examples")
        example_R = self._example_of[number_R.clamp_max(self.batch - 1)]
        return example_R.masked_fill(norm_R == 0, -1)

    def refutes(self, plain_RJ: Tensor, weighted: Sequence[Tensor], example_R: Tensor) -> bool:
        """Return whether some row is certainly not of the example that it is taken for; arguments as of `attribute`.

        Rows that are not finite tell nothing.
        """
        finite_R1 = torch.isfinite(plain_RJ).all(1, keepdim=True)
        for each in weighted:
            finite_R1 &= torch.isfinite(each).all(1, keepdim=True)
        plain_RJ, *weighted = (torch.where(finite_R1, each, 0) for each in (plain_RJ, *weighted))
        norm_R = torch.linalg.vector_norm(plain_RJ, dim=1)
        floor = self.precision.floor * norm_R.amax()
        return self._contradicts(plain_RJ, weighted, example_R, self.precision.refuted * norm_R + floor)

    def _contradicts(self, plain_RJ: Tensor, weighted: Sequence[Tensor], example_R: Tensor, rounding_R: Tensor) -> bool:
        weights_KR = torch.where(example_R >= 0, self.weights_KB[:, example_R], 0).to(plain_RJ.dtype)
        return any(
            bool(_differ(weighted_RJ, plain_RJ, weight_R, rounding_R).any())
            for weighted_RJ, weight_R in zip(weighted, weights_KR, strict=True)
        )


def _differ(weighted_RJ: Tensor, plain_RJ: Tensor, weight_R: Tensor, rounding_R: Tensor) -> Tensor:
    """Return which rows [R] differ from the plain ones times a weight by more than rounding; those with NaN do."""
    off_RJ = torch.addcmul(weighted_RJ, plain_RJ, weight_R.unsqueeze(1), value=-1)
    alike_R: Tensor = torch.linalg.vector_norm(off_RJ, dim=1) <= weight_R.abs() * rounding_R
    return ~alike_R


class Arrangement:
    """The rows of a call by example, for all calls whose rows are the same examples'.

    Args:
        example_R: each row's example; -1: none.
        batch: B.
    """

    def __init__(self, example_R: Tensor, batch: int) -> None:
        self.example_R, self.batch = example_R, batch
        self._by_sizes: dict[tuple[int, ...], tuple[bool, list[_Part] | None]] = {}

    def parts(self, call: Call, n_leading: int) -> Iterator[tuple[slice, Call]]:
        """Yield examples of the batch, and a call that has as many rows for each of them.

        Rows that an example has less than others are copies of some row, with no gradient.

        Args:
            call: of a layer on these rows.
            n_leading: how many leading dimensions of its input count rows.
        """
        sizes = tuple(call.input.shape[:n_leading])
        if sizes not in self._by_sizes:
            example_R = _by_first_dimension(self.example_R, sizes)
            flat = n_leading == 0 or len(example_R) != prod(sizes[:1])
            even = is_uniform(example_R, self.batch)
            self._by_sizes[sizes] = flat, None if even else list(_parts(example_R, self.batch))
        flat, parts = self._by_sizes[sizes]
        call = _reshaped(call, n_leading) if flat else call
        if parts is None:
            yield slice(0, self.batch), call
            return
        for part in parts:
            yield part.examples, part.take(call)


@dataclass(frozen=True)
class _Part:
    """Some examples of a batch: which rows they get, as many for each, and which of these are not theirs."""

    examples: slice
    row_r: Tensor
    spare_s: Tensor

    def take(self, call: Call) -> Call:
        """Return the call on these rows, those that are not the examples' own without a gradient."""
        # By index_select: indexing with brackets takes five times as long.
        x, grad = (tensor.index_select(0, self.row_r) for tensor in (call.input, call.grad_output))
        output = None if call.output is None else call.output.index_select(0, self.row_r)
        n_examples = self.examples.stop - self.examples.start
        return Call(call.module, x, grad.index_fill_(0, self.spare_s, 0), n_examples, output)


def _parts(example_R: Tensor, batch: int) -> Iterator[_Part]:
    device, example_R = example_R.device, example_R.cpu()
    kept = (example_R >= 0).nonzero()[:, 0]
    if not len(kept):
        return
    order = kept[torch.argsort(example_R[kept], stable=True)]
    counts = torch.bincount(example_R[kept], minlength=batch)
    starts = torch.cumsum(counts, 0) - counts
    for first, last in _runs(counts.tolist(), 0, batch):
        position = torch.arange(max(1, int(counts[first:last].max())))
        spare = (position >= counts[first:last, None]).flatten().nonzero()[:, 0]
        row = order[(starts[first:last, None] + position).clamp_max(len(order) - 1)]
        yield _Part(slice(first, last), row.flatten().to(device), spare.to(device))


def is_uniform(example_R: Tensor, batch: int) -> bool:
    """Return whether the rows are the batch's examples in order, as many rows for each."""
    if not len(example_R) or len(example_R) % batch:
        return False
    expected = torch.arange(batch, device=example_R.device).unsqueeze(1)
    example_Bn = example_R.view(batch, -1)
    return bool(((example_Bn == expected) | (example_Bn < 0)).all())


def _by_first_dimension(example_R: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return an example for each entry of the first dimension, where all its rows are of one example."""
    if len(sizes) < 2 or not len(example_R):  # noqa: PLR2004
        return example_R
    example_SR = example_R.view(sizes[0], -1)
    highest_S = example_SR.amax(1)
    alike = (example_SR == highest_S.unsqueeze(1)) | (example_SR < 0)
    return highest_S if bool(alike.all()) else example_R


def _reshaped(call: Call, n_leading: int) -> Call:
    """Return the call with its leading dimensions as one."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, *tensor.shape[n_leading:])

    output = None if call.output is None else rows(call.output)
    return replace(call, input=rows(call.input), grad_output=rows(call.grad_output), output=output)


def _runs(counts: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield runs of examples whose padding stays small, by halves."""
    held = counts[first:last]
    if last - first > 1 and max(held) * len(held) > _PADDED * max(1, sum(held)):
        middle = (first + last) // 2
        yield from itertools.chain(_runs(counts, first, middle), _runs(counts, middle, last))
    else:
        yield first, last
