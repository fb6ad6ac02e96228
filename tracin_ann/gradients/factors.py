"""Factor forms of the per-example gradients of one parameter, and their inner products, sums and norms.

There are four forms: `Outer` (a matrix that is a sum of outer products over positions: linear layers), `Convolution`
(see convolution_factor.py), `Rows` (scattered rows: embeddings) and `Dense` (the gradient itself: biases, norm layers,
and all parameters without a layer rule). `Scaled` multiplies one of them by a weight for each entry. A parameter of
shape (R, c1, c2, ...) is treated as a matrix [R, C] with C = c1·c2·…; P = R·C. Sketches, inner products and norms are
computed from the form. A per-example gradient is materialised only where that costs less, and then in blocks.

Shapes: B batch, T positions, R rows and C columns of the parameter, P = R·C, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tracin_ann.gradients.convolution_factor import Convolution

_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Outer:
    """grad_b = Σ_t left_bt ⊗ right_bt."""

    left_BTR: Tensor
    right_BTC: Tensor

    def __post_init__(self) -> None:
        """Check that both sides have the same examples and positions."""
        assert self.left_BTR.dim() == self.right_BTC.dim() == 3  # noqa: PLR2004
        assert self.left_BTR.shape[:2] == self.right_BTC.shape[:2]

    @property
    def shape(self) -> tuple[int, int]:
        """Return (R, C) of the parameter read as a matrix."""
        return self.left_BTR.shape[2], self.right_BTC.shape[2]

    def __getitem__(self, rows: slice | Tensor) -> Outer:
        """Return the form of some of the examples."""
        return Outer(self.left_BTR[rows], self.right_BTC[rows])


@dataclass(frozen=True)
class Rows:
    """grad_b[index_bt] += value_bt: an embedding; a position without a gradient has value zero."""

    index_BT: Tensor
    value_BTC: Tensor
    n_rows: int

    def __post_init__(self) -> None:
        """Check that the indices have the dtype that scatter and gather require."""
        assert self.index_BT.dtype is torch.int64

    @property
    def shape(self) -> tuple[int, int]:
        """Return (R, C) of the parameter read as a matrix."""
        return self.n_rows, self.value_BTC.shape[2]

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        """Return the form of some of the examples."""
        return Rows(self.index_BT[rows], self.value_BTC[rows], self.n_rows)


@dataclass(frozen=True)
class Dense:
    """The per-example gradients themselves, flattened."""

    grad_BP: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (P, 1): a flat gradient has one column."""
        return self.grad_BP.shape[1], 1

    def __getitem__(self, rows: slice | Tensor) -> Dense:
        """Return the form of some of the examples."""
        return Dense(self.grad_BP[rows])


Unscaled = Outer | Convolution | Rows | Dense


@dataclass(frozen=True)
class Scaled:
    """grad_b = weight ⊙ form_b, entry by entry.

    The product of a weight and a factored gradient has no factors: it is materialised in blocks where it is used.
    """

    form: Unscaled
    weight_P: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (R, C) of the parameter read as a matrix."""
        return self.form.shape

    def __getitem__(self, rows: slice | Tensor) -> Scaled:
        """Return the form of some of the examples."""
        return Scaled(self.form[rows], self.weight_P)


Form = Unscaled | Scaled

Sink = Callable[[str, Form, slice], None]
"""A consumer of gradient forms, called with (parameter name, form, rows of the batch)."""


def batch_size(form: Form) -> int:
    """Return B."""
    if isinstance(form, Scaled):
        return batch_size(form.form)
    if isinstance(form, Outer):
        return form.left_BTR.shape[0]
    if isinstance(form, Convolution):
        return form.delta_BO.shape[0]
    return form.index_BT.shape[0] if isinstance(form, Rows) else form.grad_BP.shape[0]


def column_blocks(form: Form, elements: int = _BLOCK_ELEMENTS) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, grad [B, n]): consecutive blocks of the materialised, flattened gradients, from column `start`.

    A block has about `elements` numbers, and complete rows of the parameter.
    """
    if isinstance(form, Scaled):
        for start, block in column_blocks(form.form, elements=elements):
            yield start, block * form.weight_P[start : start + block.shape[1]]
        return
    n_rows, n_columns = form.shape
    step = max(1, elements // max(1, batch_size(form) * n_columns))
    grouped = form.as_weight() if isinstance(form, Convolution) and form.geometry.groups > 1 else None
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        if grouped is not None:
            block = grouped[:, start:stop].flatten(1)
        elif isinstance(form, Outer):
            block = torch.bmm(form.left_BTR[:, :, start:stop].transpose(1, 2), form.right_BTC).flatten(1)
        elif isinstance(form, Convolution):
            block = form.output_channels(start, stop).as_weight().flatten(1)
        elif isinstance(form, Rows):
            block = _scatter_rows(form, start, stop)
        else:
            block = form.grad_BP[:, start:stop]
        yield start * n_columns, block


def _scatter_rows(form: Rows, start: int, stop: int) -> Tensor:
    batch, _, columns = form.value_BTC.shape
    inside = (form.index_BT >= start) & (form.index_BT < stop)
    index = (form.index_BT - start).clamp(0, stop - start - 1)
    value = form.value_BTC * inside.unsqueeze(2)
    grad = value.new_zeros(batch, stop - start, columns)
    grad.scatter_add_(1, index.unsqueeze(2).expand_as(value), value)
    return grad.flatten(1)


def materialise(form: Form) -> Tensor:
    """Return the per-example gradients [B, P]."""
    return torch.cat([block for _, block in column_blocks(form)], dim=1)


def weighted_sums(form: Form, weights_KB: Tensor) -> Tensor:
    """Return weighted sums of the per-example gradients, [K, P]; large gradients are not materialised per example."""
    if isinstance(form, Scaled):
        return weighted_sums(form.form, weights_KB) * form.weight_P
    if isinstance(form, Dense):
        return weights_KB.to(form.grad_BP) @ form.grad_BP
    if isinstance(form, Convolution):
        weights_KB = weights_KB.to(form.delta_BO)
        return torch.cat([weights_KB @ block for _, block in column_blocks(form)], dim=1)
    return torch.stack([_weighted_sum(form, weights_B.view(-1, 1, 1)) for weights_B in weights_KB])


def _weighted_sum(form: Outer | Rows, weights_B11: Tensor) -> Tensor:
    if isinstance(form, Outer):
        left_BTR = form.left_BTR * weights_B11.to(form.left_BTR)
        return (left_BTR.flatten(0, 1).T @ form.right_BTC.flatten(0, 1)).flatten()
    value_BTC = form.value_BTC * weights_B11.to(form.value_BTC)
    flat = value_BTC.new_zeros(form.shape)
    flat.index_add_(0, form.index_BT.flatten(), value_BTC.flatten(0, 1))
    return flat.flatten()


def inner(form: Form, direction_QP: Tensor) -> Tensor:
    """Return the per-example inner products [B, Q] with Q flattened directions [Q, P]."""
    if isinstance(form, Scaled):
        # ⟨weight ⊙ grad, direction⟩ = ⟨grad, weight ⊙ direction⟩, without a gradient per example.
        return inner(form.form, direction_QP * form.weight_P)
    if isinstance(form, Rows):
        return _rows_inner(form, direction_QP)
    if isinstance(form, Outer) and form.left_BTR.shape[1] == 1:
        return _outer_inner(form, direction_QP)
    total = direction_QP.new_zeros(batch_size(form), direction_QP.shape[0])
    for start, block in column_blocks(form):
        total += block @ direction_QP[:, start : start + block.shape[1]].T
    return total


def inner_where(form: Form, direction_QP: Tensor, requested_BQ: Tensor) -> Tensor:
    """Return the requested per-example inner products [B, Q]; the other entries are unspecified.

    Args:
        form: of one parameter.
        direction_QP: directions of the parameter, flattened.
        requested_BQ: bool, on the CPU.
    """
    queries = requested_BQ.any(0).nonzero()[:, 0]
    total = direction_QP.new_zeros(requested_BQ.shape)
    if not len(queries):
        return total
    if isinstance(form, Outer) and form.left_BTR.shape[1] == 1:
        # The directions are large, and few examples need each of them, so directions are not copied.
        for query in queries.tolist():
            rows = requested_BQ[:, query].nonzero()[:, 0].to(total.device)
            few = Outer(form.left_BTR[rows], form.right_BTC[rows])
            total[rows, query] = _outer_inner(few, direction_QP[query : query + 1])[:, 0]
        return total
    if 2 * len(queries) > len(direction_QP):
        return inner(form, direction_QP)
    queries = queries.to(total.device)
    total[:, queries] = inner(form, direction_QP[queries])
    return total


def _outer_inner(form: Outer, direction_QP: Tensor) -> Tensor:
    """Return ⟨left_b ⊗ right_b, direction_q⟩ without the outer product."""
    left_BR, right_BC = form.left_BTR[:, 0], form.right_BTC[:, 0]
    n_rows, n_columns = form.shape
    total = direction_QP.new_zeros(len(left_BR), len(direction_QP))
    step = max(1, _BLOCK_ELEMENTS // max(1, len(left_BR) * n_rows))
    for start in range(0, len(direction_QP), step):
        direction_qRC = direction_QP[start : start + step].view(-1, n_rows, n_columns)
        product_BqR = (right_BC @ direction_qRC.flatten(0, 1).T).view(len(left_BR), -1, n_rows)
        total[:, start : start + step] = (product_BqR @ left_BR[:, :, None])[:, :, 0]
    return total


def _rows_inner(form: Rows, direction_QP: Tensor) -> Tensor:
    per_query = [(direction.view(form.shape)[form.index_BT] * form.value_BTC).sum((1, 2)) for direction in direction_QP]
    return torch.stack(per_query, dim=1)


def squared_norm(forms: Sequence[Form]) -> Tensor:
    """Return ‖Σ forms‖² of each example, [B], over the forms of one parameter, one for each use in the forward."""
    merged = _merge(forms)
    if len(merged) > 1:
        blocks = zip(*(_split_examples(form) for form in merged), strict=True)
        return torch.cat([torch.stack(parts).sum(0).square().sum(1) for parts in blocks])
    form = merged[0]
    if isinstance(form, Outer) and _is_gram_faster(form):
        return ((form.left_BTR @ form.left_BTR.mT) * (form.right_BTC @ form.right_BTC.mT)).sum((1, 2))
    if isinstance(form, Rows):
        same_row = form.index_BT.unsqueeze(2) == form.index_BT.unsqueeze(1)
        return ((form.value_BTC @ form.value_BTC.mT) * same_row).sum((1, 2))
    return torch.stack([block.square().sum(1) for _, block in column_blocks(form)]).sum(0)


def form_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype of all forms of these parameters: float64 if one of them has it, otherwise float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


def convert(form: Form, dtype: torch.dtype) -> Form:
    """Return the form in another floating-point dtype, or the form itself if it has that dtype."""
    if isinstance(form, Scaled):
        converted = convert(form.form, dtype)
        assert not isinstance(converted, Scaled)
        return form if converted is form.form else Scaled(converted, form.weight_P.to(dtype))
    values = {field.name: getattr(form, field.name) for field in fields(form)}
    floating = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if all(v.dtype == dtype for v in floating.values()):
        return form
    return replace(form, **{k: v.to(dtype) for k, v in floating.items()})  # type: ignore[arg-type]


def scale(form: Unscaled, factor: float) -> Unscaled:
    """Return the form of the gradients multiplied by a number; one factor of a product is multiplied."""
    if isinstance(form, Outer):
        left_BTR, right_BTC = form.left_BTR, form.right_BTC
        if left_BTR.numel() <= right_BTC.numel():
            return Outer(left_BTR * factor, right_BTC)
        return Outer(left_BTR, right_BTC * factor)
    if isinstance(form, Convolution):
        return replace(form, delta_BO=form.delta_BO * factor)
    if isinstance(form, Rows):
        return replace(form, value_BTC=form.value_BTC * factor)
    return Dense(form.grad_BP * factor)


def _merge(forms: Sequence[Form]) -> list[Form]:
    """Join the forms of each kind: the positions of several calls are concatenated.

    All forms of one parameter have the same weight, if any.
    """
    weights = [f.weight_P for f in forms if isinstance(f, Scaled)]
    if weights:
        assert len(weights) == len(forms)
        plain = _merge([f.form for f in forms if isinstance(f, Scaled)])
        return [Scaled(f, weights[0]) for f in plain if not isinstance(f, Scaled)]
    outer = [f for f in forms if isinstance(f, Outer)]
    rows = [f for f in forms if isinstance(f, Rows)]
    dense = [f for f in forms if isinstance(f, Dense)]
    convolutions = [f for f in forms if isinstance(f, Convolution)]
    if len(convolutions) > 1:
        dense += [Dense(f.as_weight().flatten(1)) for f in convolutions]
        convolutions = []
    merged: list[Form] = [*convolutions]
    if outer:
        merged.append(Outer(torch.cat([f.left_BTR for f in outer], 1), torch.cat([f.right_BTC for f in outer], 1)))
    if rows:
        merged.append(
            Rows(torch.cat([f.index_BT for f in rows], 1), torch.cat([f.value_BTC for f in rows], 1), rows[0].n_rows)
        )
    if dense:
        merged.append(Dense(torch.stack([f.grad_BP for f in dense]).sum(0)))
    return merged


def _split_examples(form: Form) -> Iterator[Tensor]:
    """Yield the materialised gradient of each example, so that different kinds of forms can be added."""
    for example in range(batch_size(form)):
        yield materialise(form[example : example + 1])


def _is_gram_faster(form: Outer) -> bool:
    _, positions, rows = form.left_BTR.shape
    columns = form.right_BTC.shape[2]
    return positions * (rows + columns) < rows * columns
