"""Attribution of rows to examples: layers whose first input dimension is not the batch, and rows that several share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import oracle
import ragged
from tasks.toy import CONFIG, make_toy_task
from tracin_ann import build
from tracin_ann.errors import GradientProofError, MisplacedRowsError
from tracin_ann.gradients import factors
from tracin_ann.gradients.attribution import Arrangement, WeightCode, is_uniform
from tracin_ann.gradients.engine import GradientEngine
from tracin_ann.gradients.layers.base import Call, LayoutError
from tracin_ann.gradients.plan import RULE

SIZES = {
    "even": [4] * 8,
    "uneven": [3, 3, 3, 2, 4, 1, 5, 3],
    "a sum that hides it": [4, 4, 4, 4, 4, 3, 5, 4],
    "as many as examples": [1] * 8,
    "one long": [1, 1, 1, 1, 6, 1, 1, 1],
    "ordered": [6, 5, 4, 4, 3, 2, 1, 1],
}


def make_engine(model, case):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return GradientEngine(model, dict(model.named_parameters()), case.loss, case.collate)


def collect_gradients(engine, examples):
    """Return all per-example gradients [B, P] of a run, in float64."""
    batch, found = engine.batch(range(len(examples)), examples), {}

    def start():
        found.clear()
        for name, p in engine.parameters.items():
            found[name] = torch.zeros(len(examples), p.numel(), dtype=torch.float64)

        def sink(name, form, rows):
            found[name][rows] += factors.materialise(form).double()

        return sink

    engine.run(batch, start)
    return torch.cat(list(found.values()), 1)


def assert_matches_oracle(model, case, examples, engine=None, tolerance=1e-4):
    """Compare a batch with the oracle, relative to the largest gradient; return the engine."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    truth = oracle.gradients(model, case.loss, examples, collate=case.collate)
    engine = engine or make_engine(model, case)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    error = (collect_gradients(engine, examples) - truth).norm(dim=1).max() / truth.norm(dim=1).max()
    assert error < tolerance, engine.plan
    return engine


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ragged.CASES)
def test_rows_of_examples_of_different_sizes_use_the_rule_and_have_their_own_gradients(name, sizes):
    model, case, examples = ragged.make_case(name, SIZES[sizes])
    engine = assert_matches_oracle(model, case, examples)
    assert {step.name for step in engine.plan.steps.values()} == {RULE}
    matched = any("rows are matched with examples in every batch" in step.reason for step in engine.plan.steps.values())
    assert matched or sizes == "as many as examples"


@pytest.mark.parametrize("name", ragged.CASES)
@pytest.mark.parametrize("first", ["even", "as many as examples"])
def test_sizes_may_change_after_the_verification(name, first):
    model, case, examples = ragged.make_case(name, SIZES[first])
    engine = assert_matches_oracle(model, case, examples)
    for sizes in [[2, 2, 1, 1, 1, 1, 1, 1], *SIZES.values(), [2, 1, 1], [5]]:
        assert_matches_oracle(model, case, ragged.make_case(name, sizes, seed=1)[2], engine)
    assert {step.name for step in engine.plan.steps.values()} == {RULE}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["graphs", "questions", "albums"])
def test_rows_are_attributed_in_every_precision(name, dtype):
    sizes = [1 + (7 * i) % 5 for i in range(70)]
    model, case, examples = ragged.make_case(name, sizes)
    model.to(dtype)
    cast = [tuple(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in row) for row in examples]
    engine = assert_matches_oracle(model, case, cast, tolerance=5e-2 if dtype is torch.bfloat16 else 1e-10)
    assert {step.name for step in engine.plan.steps.values()} == {RULE}


class Twisted(nn.Module):
    """A layer that gets its batch in reverse order if the first entry is large."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x):
        hidden = self.inner(x)
        if x[0, 0] > 10:
            hidden = hidden.flip(0)
        out = self.head(hidden)
        return out.flip(0) if x[0, 0] > 10 else out


def test_examples_in_another_order_than_verified_are_detected_in_a_checked_batch():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    case = ragged.Ragged(Twisted, loss, None, torch.utils.data.default_collate)
    model = Twisted().eval()
    rows = [(torch.randn(3), i % 4) for i in range(6)]
    engine = assert_matches_oracle(model, case, rows)
    twisted = [(x + 20 * (x == rows[0][0]), y) for x, y in rows]
    with pytest.raises(GradientProofError, match="layer head: the rows of its input are not the batch's examples"):
        collect_gradients(engine, twisted)


def test_a_build_that_detects_another_order_stores_no_features_and_succeeds_with_batches_of_one(tmp_path):
    model = Twisted().eval()
    data = [(torch.rand(3) + (20 if i >= 32 else 0), i % 4) for i in range(96)]
    task = make_toy_task(tmp_path, model, train_data=lambda: data, query_data=lambda: data[:4])
    config = replace(CONFIG, partition_rows=16)
    with pytest.raises(MisplacedRowsError, match="--batch-size 1"):
        build(task, tmp_path / "out", config)
    assert not list((tmp_path / "out" / "features").glob("*.h5"))
    assert build(task, tmp_path / "out", replace(config, batch_size=1)).rows_extracted == 2 * 96


def test_a_row_that_is_not_finite_does_not_fail_the_check_of_a_batch():
    def loss(model, batch):
        return model.head(model.inner(batch[0])).square().sum(1).sqrt()

    case = ragged.Ragged(Twisted, loss, None, torch.utils.data.default_collate)
    model = Twisted().eval()
    nn.init.zeros_(model.head.bias), nn.init.zeros_(model.inner.bias)
    rows = [(torch.randn(3), 0) for _ in range(6)]
    engine = assert_matches_oracle(model, case, rows)
    found = collect_gradients(engine, [*rows[:2], (torch.zeros(3), 0), *rows[3:]])
    assert torch.isfinite(found).all(1).tolist() == [True, True, False, True, True, True]


class Shared(nn.Module):
    """One row that all examples use, besides one row of each."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x):
        hidden = torch.tanh(self.inner(torch.cat([x, x.new_ones(1, 3)])))
        return self.head(hidden[:-1] + hidden[-1])


def test_a_row_that_several_examples_use_fails_the_rule_and_the_reason_names_the_layer():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    case = ragged.Ragged(Shared, loss, None, torch.utils.data.default_collate)
    model = Shared().eval()
    engine = assert_matches_oracle(model, case, [(torch.randn(3), i % 4) for i in range(6)])
    step = engine.plan.steps["inner.weight"]
    assert step.name != RULE and "layer inner: 1 of its 7 rows have gradients of several examples" in step.reason
    assert engine.plan.steps["head.weight"].name == RULE


def test_examples_that_mix_raise_with_the_name_of_the_parameter():
    def loss(model, batch):
        hidden = model.inner(batch[0])
        return F.cross_entropy(model.head(hidden + hidden.mean(0)), batch[1], reduction="none")

    case = ragged.Ragged(Shared, loss, None, torch.utils.data.default_collate)
    engine = make_engine(Shared().eval(), case)
    with pytest.raises(GradientProofError, match="inner.weight"):
        collect_gradients(engine, [(torch.randn(3), i % 4) for i in range(6)])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("batch", [2, 3, 64, 2048, 3000])
def test_a_code_identifies_every_example_within_rounding(batch, half):
    code = WeightCode(batch, torch.device("cpu"), half=half)
    generator = torch.Generator().manual_seed(batch)
    example_R = torch.randint(0, batch, (500,), generator=generator)
    plain_RC = torch.randn(500, 6, generator=generator)
    rounding = 1 + (4e-3 if half else 1e-5) * torch.randn(500, 6, generator=generator)
    weighted = [plain_RC * w[example_R].float().unsqueeze(1) * rounding for w in code.weights_KB]
    assert len(weighted) == (1 if not half and batch <= 2048 else len(weighted))
    assert torch.equal(code.attribute(plain_RC, weighted), example_R)
    plain_RC[3], weighted = 0, [each.index_fill(0, torch.tensor([3]), 0) for each in weighted]
    assert code.attribute(plain_RC, weighted)[3] == -1
    other = code.weights_KB[:, (example_R[7] + 1) % batch].float()
    for each, w in zip(weighted, other, strict=True):
        each[7] += w * torch.randn(6, generator=generator)
    plain_RC[7] += 1
    with pytest.raises(LayoutError, match="1 of its 500 rows"):
        code.attribute(plain_RC, weighted)


@pytest.mark.parametrize("counts", [[2, 2, 2], [0, 3, 1], [1, 0, 0], [9, 1, 1], [1, 1, 40]])
def test_arranged_rows_have_each_example_once_and_little_padding(counts):
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
    example_R = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))[order]
    x = torch.arange(len(order), dtype=torch.float32).unsqueeze(1) + 1
    call = Call(nn.Linear(1, 1), x, x.clone(), 3)
    total, size = torch.zeros(3), 0
    for rows, part in Arrangement(example_R, 3).parts(call, 1):
        size += len(part.input)
        total[rows] += (part.input * part.grad_output).view(part.batch, -1).sum(1)
    expected = torch.zeros(3).index_add(0, example_R, x.square()[:, 0])
    assert torch.equal(total, expected)
    assert size <= 2 * max(sum(counts), 3)


def test_rows_without_a_gradient_do_not_change_whether_an_order_is_uniform():
    assert is_uniform(torch.tensor([0, -1, 1, 1, -1, -1]), 3)
    assert not is_uniform(torch.tensor([0, 1, 0, 1, 2, 2]), 3)
