"""Gradients of token ids, targets and inputs of every dtype and layout that PyTorch supports."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from test_engine import collect_gradients
from torch import nn
from torch.nn import functional as F

import oracle
from tasks.toy import CONFIG, RATES, cross_entropy, make_toy_task, save_checkpoints
from tracin_ann import BuildConfig, InfluenceIndex, Task, build
from tracin_ann.gradients.engine import GradientEngine
from tracin_ann.gradients.plan import LOOP, RULE, VMAP
from tracin_ann.scoring.exact import exact_scores
from tracin_ann.sketch import SKETCHES

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support")
WORDS, F_IN, CLASSES = 11, 7, 3


class Bag(nn.Module):
    """A mean of word embeddings with a classifier; `scaled` adds a parameter that no layer holds."""

    def __init__(self, scaled=False):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 6, padding_idx=0), nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.ones(6)) if scaled else None

    def forward(self, tokens):
        hidden = torch.tanh(self.words(tokens)).mean(1)
        return self.head(hidden if self.scale is None else hidden * self.scale)


class Counts(nn.Module):
    """Two layers over counts of words, which may be sparse."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(F_IN, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Mapped(Counts):
    """With a custom linear layer whose matrix is [in, out], as in Hugging Face's Conv1D."""

    def __init__(self):
        super().__init__()
        self.first = Transposed()


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(F_IN, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def make_texts(n, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, WORDS, (4,), generator=generator).to(dtype), i % CLASSES) for i in range(n)]


def make_counts(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(n, F_IN, generator=generator) * (torch.rand(n, F_IN, generator=generator) > 0.6)
    return [(x, i % CLASSES) for i, x in enumerate(made)]


def run_engine(model, rows, loss, collate=torch.utils.data.default_collate):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    engine = GradientEngine(model.eval(), dict(model.named_parameters()), loss, collate)
    return engine, collect_gradients(engine, rows)


def assert_matches_oracle(found, truth, tolerance=1e-5):
    assert ((found - truth).norm(dim=1) <= tolerance * truth.norm(dim=1)).all()


@pytest.mark.parametrize("step", [RULE, VMAP, LOOP])
@pytest.mark.parametrize("scaled", [False, True])
def test_int32_token_ids_are_supported_by_every_method(step, scaled, monkeypatch):
    model, rows = Bag(scaled), make_texts(5, torch.int32)
    truth = oracle.gradients(model, cross_entropy, make_texts(5, torch.int64))
    if step != RULE:
        monkeypatch.setattr("tracin_ann.gradients.engine.find_covered_layers", lambda model, names: {})
    if step == LOOP:
        monkeypatch.setattr("tracin_ann.gradients.engine.batched_tensors", lambda value, batch: "refused by the test")
    engine, found = run_engine(model, rows, cross_entropy)
    assert_matches_oracle(found, truth)
    assert engine.plan.steps["words.weight"].name == step


@pytest.mark.parametrize("sketch", SKETCHES)
def test_int32_token_ids_give_the_same_index_and_exact_scores(tmp_path, sketch):
    model = Bag()
    checkpoints = save_checkpoints(model, tmp_path)
    config = BuildConfig(dim=32, batch_size=4, device="cpu", dtype="float32", index="flat", sketch=sketch)
    views = []
    for name, dtype in (("int32", torch.int32), ("int64", torch.int64)):
        data, asked = make_texts(10, dtype), make_texts(3, dtype, seed=2)
        task = make_toy_task(
            tmp_path, model, train_data=lambda d=data: d, query_data=lambda a=asked: a, checkpoints=checkpoints
        )
        build(task, tmp_path / name, config)
        views.append(InfluenceIndex.open(tmp_path / name, task, device="cpu"))
    np.testing.assert_array_equal(views[0].view().take(range(10)), views[1].view().take(range(10)))
    expected = compute_true_scores(model, checkpoints, make_texts(3, torch.int64, seed=2), make_texts(10, torch.int64))
    scores = exact_scores(views[0].runner, ("query", range(3)), range(10), range(2))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


def compute_true_scores(model, checkpoints, queries, rows, loss=cross_entropy):
    """Return true scores [Q, N] in float64."""
    sides = ([], [])
    for checkpoint in checkpoints:
        model.load_state_dict(torch.load(checkpoint.path, weights_only=True))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for side, examples in zip(sides, (queries, rows), strict=True):
            side.append(oracle.gradients(model, loss, examples))
    return oracle.tracin(torch.stack(sides[0], 1), torch.stack(sides[1], 1), RATES)


def squared(model, batch):
    return (model(batch[0]).square().sum(1) - batch[1]).square()


def picked(model, batch):
    return -(model(batch[0]).log_softmax(1) * F.one_hot(batch[1].long(), CLASSES)).sum(1)


TARGETS = [
    (cross_entropy, torch.uint8),
    (squared, torch.int16),
    (squared, torch.uint8),
    (squared, torch.int8),
    (picked, torch.int16),
]


@pytest.mark.parametrize(("loss", "dtype"), TARGETS)
@pytest.mark.parametrize("scaled", [False, True], ids=["layer rules", "a raw parameter too"])
def test_targets_of_every_dtype_that_the_loss_accepts_are_supported(loss, dtype, scaled):
    model = Bag(scaled)
    rows = [(tokens, torch.tensor(y, dtype=dtype)) for tokens, y in make_texts(5, torch.int32)]
    truth = oracle.gradients(model, loss, rows)
    engine, found = run_engine(model, rows, loss)
    assert_matches_oracle(found, truth)
    assert engine.plan.steps["words.weight"].name == RULE
    # PyTorch's cross-entropy accepts uint8, but not under vmap, where it uses gather; one_hot reads its values.
    assert not scaled or engine.plan.steps["scale"].name == (VMAP if loss is squared else LOOP)


LAYOUTS = {
    "COO": torch.Tensor.to_sparse_coo,
    "CSR": torch.Tensor.to_sparse_csr,
    "CSC": torch.Tensor.to_sparse_csc,
}


def dense_of(example):
    return example[0] if example[0].layout is torch.strided else example[0].to_dense().reshape(F_IN)


def sparse_batch(layout):
    def collate(examples):
        return LAYOUTS[layout](torch.stack([dense_of(e) for e in examples])), torch.tensor([e[1] for e in examples])

    return collate


@pytest.mark.parametrize(
    ("made", "layout"), [*((Counts, layout) for layout in LAYOUTS), (Mapped, "COO"), (Mapped, "CSR")]
)
@pytest.mark.parametrize("size", [1, 5])
def test_sparse_inputs_use_the_rule(made, layout, size):
    model, rows = made(), make_counts(size)
    truth = oracle.gradients(model, cross_entropy, rows)
    engine, found = run_engine(model, rows, cross_entropy, sparse_batch(layout))
    assert_matches_oracle(found, truth)
    assert {step.name for step in engine.plan.steps.values()} == {RULE}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_inputs_use_the_loop_if_they_have_no_rule(layout, monkeypatch):
    monkeypatch.setattr("tracin_ann.gradients.engine.find_covered_layers", lambda model, names: {})
    model, rows = Counts(), make_counts(5)
    truth = oracle.gradients(model, cross_entropy, rows)
    engine, found = run_engine(model, rows, cross_entropy, sparse_batch(layout))
    assert_matches_oracle(found, truth)
    assert engine.plan.names(LOOP) == tuple(engine.parameters)
    assert "layout torch.sparse_" in engine.plan.steps["first.weight"].reason


def product(model, batch):
    """Return the loss of a model whose first layer is not called; its weight is multiplied with sparse rows."""
    hidden = torch.tanh(torch.sparse.mm(batch[0], model.first.weight.T) + model.first.bias)
    return F.cross_entropy(model.second(hidden), batch[1], reduction="none")


@pytest.mark.parametrize("layout", ["COO", "CSR"])
def test_sparse_products_outside_of_a_layer_are_correct(layout):
    model, rows = Counts(), make_counts(5)
    truth = oracle.gradients(model, cross_entropy, rows)
    engine, found = run_engine(model, rows, product, sparse_batch(layout))
    assert_matches_oracle(found, truth)
    assert set(engine.plan.names(LOOP)) == {"first.weight", "first.bias"}


MEASURED = BuildConfig(dim=32, device="cpu", index="flat")
READ_BY_WORKERS = replace(CONFIG, workers=1)


@dataclass
class Document:
    counts: torch.Tensor
    label: int


def make_documents(n, layout, seed=1):
    return [Document(LAYOUTS[layout](x[None]), y) for x, y in make_counts(n, seed)]


def collate_documents(examples):
    rows = torch.cat([e.counts.to_dense() for e in examples])
    layout = examples[0].counts.layout
    return Document(rows.to_sparse(layout=layout), torch.tensor([e.label for e in examples]))


def loss_of_documents(model, batch):
    return F.cross_entropy(model(batch.counts), batch.label, reduction="none")


@pytest.mark.parametrize("layout", ["COO", "CSR"])
@pytest.mark.parametrize(
    "config",
    [CONFIG, MEASURED, pytest.param(READ_BY_WORKERS, marks=pytest.mark.slow)],
    ids=["plain", "measured", "read by workers"],
)
def test_an_index_of_sparse_rows_has_the_scores_of_dense_ones(tmp_path, layout, config, monkeypatch):
    monkeypatch.setattr("torch._utils._sparse_tensors_to_validate", [])
    model = Counts()
    checkpoints = save_checkpoints(model, tmp_path)
    # Every part can be pickled, so that it can be sent to workers.
    task = Task(
        model=Counts,
        loss=loss_of_documents,
        collate=collate_documents,
        train_data=partial(make_documents, 10, layout),
        query_data=partial(make_documents, 3, layout, seed=2),
        checkpoints=checkpoints,
    )
    build(task, tmp_path / "out", config)
    assert torch._utils._sparse_tensors_to_validate == []
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    assert len(index.query(range(3))) == 3
    expected = compute_true_scores(model, checkpoints, make_counts(3, seed=2), make_counts(10))
    scores = exact_scores(index.runner, ("query", range(3)), range(10), range(2))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())
