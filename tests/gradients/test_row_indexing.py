"""Detection of selected rows, with and without PyTorch's compiler, and gradients of weighted sums."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from tracin_ann.gradients.autograd import weighted_sum
from tracin_ann.gradients.row_indexing import RowIndexingMode, detect_row_indexing

CASES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "sorted rows": (lambda x: x[x[:, 0].argsort()], True),
    "a mask": (lambda x: x[x[:, 0] > 0], True),
    "selected elements": (lambda x: torch.masked_select(x, x > 0), True),
    "all rows in order": (lambda x: x[torch.arange(len(x))], False),
    "columns": (lambda x: x[:, torch.tensor([1, 0])], False),
    "no selection": (lambda x: (x @ x.T).relu(), False),
}


@pytest.fixture(params=[False, True], ids=["no compiler", "compiler"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether PyTorch's compiler is imported."""
    if request.param:
        import_module("torch._dynamo")
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    return bool(request.param)


@pytest.mark.parametrize("case", CASES)
def test_selected_rows_are_detected(case: str, compiler: bool) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    select, expected = CASES[case]
    mode = detect_row_indexing([x])
    assert (type(mode) is RowIndexingMode) == compiler
    with mode:
        select(x)
    assert mode.seen == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gradient_of_a_weighted_sum_is_the_weights(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    values = (1e4 * torch.randn(1000, generator=random)).to(dtype).requires_grad_()
    weights = torch.randn(1000, generator=random).to(dtype)
    (through,) = torch.autograd.grad(weighted_sum(values * 1, weights), values)
    (true,) = torch.autograd.grad(values * 1, values, weights)
    assert torch.equal(through, true)
    assert through.dtype == dtype
