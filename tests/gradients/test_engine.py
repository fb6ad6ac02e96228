"""The gradient engine: the method of each parameter and its reason, and correct gradients in later batches."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import oracle
from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task
from tracin_ann import plan
from tracin_ann.cli.build import _print_plan
from tracin_ann.errors import GradientProofError, TaskError
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.features.extractor import FeatureExtractor, FeatureOptions
from tracin_ann.gradients import factors
from tracin_ann.gradients.capture import LayerCapture
from tracin_ann.gradients.engine import GradientEngine
from tracin_ann.gradients.plan import FORWARD, LOOP, NONE, RULE, VMAP
from tracin_ann.sketch import make_sketch

CPU = torch.device("cpu")


class Positions(nn.Module):
    """Two layers over positions [B, T, 3], averaged over T; subclasses change the forward."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x))).mean(1)


def make_examples(n, t=3, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(t, 3, generator=generator) + shift, i % 4) for i in range(n)]


def make_engine(model, loss=cross_entropy):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = dict(model.named_parameters())
    return GradientEngine(model.eval(), parameters, loss, torch.utils.data.default_collate)


def collect_gradients(engine, given_examples):
    """Return all per-example gradients [B, P] of a run, in float64."""
    batch = engine.batch(range(len(given_examples)), given_examples)
    found = {}

    def start():
        found.clear()

        def sink(name, form, part):
            zeros = torch.zeros(len(batch), engine.parameters[name].numel(), dtype=torch.float64)
            found.setdefault(name, zeros)[part] += factors.materialise(form).double()

        return sink

    engine.run(batch, start)
    zeros = {name: torch.zeros(len(batch), p.numel(), dtype=torch.float64) for name, p in engine.parameters.items()}
    return torch.cat([found.get(name, zeros[name]) for name in engine.parameters], 1)


def run_batches(model, batches, loss=cross_entropy, tolerance=2e-5):
    """Run batches through one engine, compare each with the oracle, and return the methods after each batch."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    truths = [oracle.gradients(model, loss, batch) for batch in batches]
    engine, steps = make_engine(model, loss), []
    for batch, truth in zip(batches, truths, strict=True):
        error = (collect_gradients(engine, batch) - truth).norm(dim=1)
        assert (error <= tolerance * truth.norm(dim=1)).all(), (len(steps), engine.plan)
        steps.append({name: step.name for name, step in engine.plan.steps.items()})
    return steps


class Mixed(Toy):
    """Parameters of layers, a parameter outside of layers, and an unused layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.scale * torch.tanh(self.first(x)))


def test_the_plan_has_the_method_the_reason_and_the_share_of_elements(tmp_path):
    task = make_toy_task(tmp_path, Mixed())
    planned = plan(task, tmp_path / "out", CONFIG).gradients
    assert planned.names(RULE) == ("first.weight", "first.bias", "second.weight", "second.bias")
    assert planned.names(VMAP) == ("scale",)
    assert planned.names(LOOP) == ()
    assert planned.names(NONE) == ("unused.weight", "unused.bias")
    assert planned.steps["first.weight"].reason == ""
    assert planned.steps["scale"].reason == "no layer rule covers it"
    assert planned.steps["unused.bias"].reason == "no loss of the first batch depends on it"
    sizes = {RULE: 57, VMAP: 6, LOOP: 0, NONE: 6}
    assert {step: planned.share(step) for step in sizes} == {step: n / 69 for step, n in sizes.items()}


def test_a_reason_that_many_parameters_share_is_printed_once(tmp_path, capsys):
    _print_plan(plan(make_toy_task(tmp_path, Mixed()), tmp_path / "out", CONFIG), CONFIG)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line.rpartition(" (")[2] for line in shown if "unused" in line or "scale" in line] == [
        "no layer rule covers it)",
        "no loss of the first batch depends on it)",
        "as above)",
    ]


def test_the_reason_of_a_parameter_is_the_error_of_the_method_before(tmp_path):
    class Doubled(Toy):
        def forward(self, x):
            if float(x[0, 0]) > 1e9:
                return x
            return F.linear(super().forward(x), self.second.weight[:, :3])

    planned = plan(make_toy_task(tmp_path, Doubled()), tmp_path / "out", CONFIG).gradients
    assert planned.names(RULE) == ("first.weight", "first.bias", "second.bias")
    assert planned.names(LOOP) == ("second.weight",)
    assert planned.steps["second.weight"].reason.startswith(
        "vmap(grad) fails: RuntimeError: vmap: It looks like you're"
    )


def test_frozen_parameters_are_listed_and_below_them_there_is_no_graph(tmp_path):
    model, seen = Toy(), set()
    model.first.requires_grad_(False)

    def loss(live, batch):
        hidden = torch.tanh(live.first(batch[0]))
        seen.add(hidden.requires_grad)
        return F.cross_entropy(live.second(hidden), batch[1], reduction="none")

    planned = plan(make_toy_task(tmp_path, model, loss=loss), tmp_path / "out", CONFIG)
    assert planned.frozen == ("first.weight", "first.bias")
    assert list(planned.gradients.steps) == ["second.weight", "second.bias"]
    assert seen == {False}


class Late(Positions):
    """A layer and a parameter that only the losses of examples with a large entry depend on."""

    def __init__(self):
        super().__init__()
        self.late, self.gain = nn.Linear(5, 4), nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        out = self.head(hidden)
        return (out + self.late(hidden) * self.gain if bool((x > 2).any()) else out).mean(1)


def test_parameters_that_only_losses_of_a_later_batch_depend_on_are_correct_from_there_on():
    batches = [make_examples(4), make_examples(4, shift=3), make_examples(4), make_examples(3, shift=3, seed=1)]
    steps = run_batches(Late(), batches)
    assert [steps[0][name] for name in ("late.weight", "gain", "head.weight")] == [NONE, NONE, RULE]
    assert [steps[1][name] for name in ("late.weight", "gain", "head.weight")] == [RULE, LOOP, RULE]


def test_one_loss_of_a_batch_may_depend_on_a_parameter_that_the_others_do_not():
    def loss(model, batch):
        return torch.cat([cross_entropy(model, (x[None], y[None])) for x, y in zip(*batch, strict=True)])

    one = make_examples(4)
    one[2] = make_examples(1, shift=3)[0]
    run_batches(Late(), [make_examples(4), one, make_examples(4)], loss)


class Twice(Positions):
    """A layer whose weight is also used outside of its calls, which no layer rule covers."""

    def forward(self, x):
        return super().forward(x) + (x @ self.inner.weight.T).mean(1)[:, :4]


@pytest.mark.parametrize("row", [0, 20, 39])
def test_one_row_of_a_large_batch_with_a_loss_above_zero_verifies_the_gradients(row):
    """All gradients of the other rows are zero, and every method is correct for them."""

    def loss(model, batch):
        x, y, weight = batch
        return cross_entropy(model, (x, y)) * weight

    batch = [(*example, float(i == row)) for i, example in enumerate(make_examples(40))]
    assert run_batches(Twice(), [batch], loss)[0]["inner.weight"] == VMAP


class SequenceFirst(Positions):
    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1)))).mean(0)


class FlatSequenceFirst(Positions):
    def forward(self, x):
        batch, length = x.shape[:2]
        flat = self.head(torch.tanh(self.inner(x.transpose(0, 1).reshape(-1, 3))))
        return flat.view(length, batch, 4).mean(0)


class Changing(Positions):
    """Batch first for short inputs, sequence first for long ones."""

    def forward(self, x):
        return super().forward(x) if x.shape[1] < 4 else SequenceFirst.forward(self, x)


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (Changing, [(4, 3), (4, 5), (4, 3)]),
        (Changing, [(4, 3), (4, 4), (4, 3)]),
        (Changing, [(4, 3), (4, 8), (4, 3), (2, 4)]),
        (SequenceFirst, [(1, 4), (2, 4), (4, 4), (4, 8)]),
        (FlatSequenceFirst, [(4, 1), (4, 3), (1, 3), (2, 4)]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_layer_whose_input_has_another_layout_in_a_later_batch_keeps_its_rule(model, shapes):
    steps = run_batches(model(), [make_examples(n, t) for n, t in shapes])
    assert {step for each in steps for step in each.values()} == {RULE}


def test_a_parameter_for_which_vmap_fails_in_a_later_batch_uses_the_loop():
    class Sometimes(Positions):
        def __init__(self):
            super().__init__()
            self.raw = nn.Parameter(torch.eye(5))

        def forward(self, x):
            hidden = torch.tanh(self.inner(x)) @ self.raw
            if x.shape[1] > 3 and float(x.sum()) > -1e9:
                hidden = hidden * 2
            return self.head(hidden).mean(1)

    steps = run_batches(Sometimes(), [make_examples(4), make_examples(4, 5), make_examples(4)])
    assert [step["raw"] for step in steps] == [VMAP, LOOP, LOOP]
    assert all(step["inner.weight"] == RULE for step in steps)


def test_an_error_of_the_users_loss_in_a_later_batch_is_raised_unchanged():
    def loss(model, batch):
        if batch[0].shape[1] > 3:
            raise KeyError("the user's own")
        return cross_entropy(model, batch)

    engine = make_engine(Positions(), loss)
    collect_gradients(engine, make_examples(4))
    with pytest.raises(KeyError, match="the user's own"):
        collect_gradients(engine, make_examples(4, 5))


def in_place(self, x):
    hidden = self.inner(x)
    hidden += 1
    hidden.mul_(0.5).tanh_()
    out = self.head(hidden)
    out.sub_(1)
    return torch.relu_(out.mul_(3)).mean(1)


def under_no_grad(self, x):
    with torch.no_grad():
        shift = self.inner(x)
    return self.head(torch.tanh(self.inner(x) + shift)).mean(1)


def detached(self, x):
    return (self.head(torch.tanh(self.inner(x))) * self.head(self.inner(x).detach())).mean(1)


def through_keyword(self, x):
    return self.head(input=torch.tanh(self.inner(input=x))).mean(1)


@pytest.mark.parametrize("forward", [in_place, under_no_grad, detached, through_keyword], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (4, 1)])
def test_layer_rules_support_in_place_operations_no_grad_detach_and_keywords(forward, shape):
    model = type("Model", (Positions,), {"forward": forward})()
    assert set(run_batches(model, [make_examples(*shape), make_examples(3, 2)])[-1].values()) == {RULE}


def test_a_layer_that_is_called_under_no_grad_has_no_gradient():
    class Guarded(Positions):
        def forward(self, x):
            with torch.no_grad():
                hidden = torch.tanh(self.inner(x))
            return self.head(hidden).mean(1)

    steps = run_batches(Guarded(), [make_examples(4)])[0]
    assert {name for name, step in steps.items() if step == NONE} == {"inner.weight", "inner.bias"}


def test_a_forward_hook_of_the_user_that_changes_an_output_is_supported():
    model = Positions()
    model.inner.register_forward_hook(lambda module, args, output: 2 * output)
    steps = run_batches(model, [make_examples(4), make_examples(3)])
    assert steps[0] == {"inner.weight": VMAP, "inner.bias": VMAP, "head.weight": RULE, "head.bias": RULE}
    assert len(model.inner._forward_hooks) == 1 and not model.head._forward_hooks


def bumpy(model, batch):
    return model(batch[0]).square().sum(1).sqrt()


def build_features(batch_size, folder, **changes):
    """Return features of 9 training and 5 query rows at the second checkpoint, in batches of this size."""
    torch.manual_seed(0)
    task = make_toy_task(folder, Mixed(), query_loss=bumpy, **changes)
    options = FeatureOptions(make_sketch("factored", 128), 3, frozenset(["first.weight", "second.weight"]))
    with TaskRunner(task, RunOptions(CPU, batch_size)).model() as model:
        model.load(1)
        extractor = FeatureExtractor(model, options)
        return extractor.rows("train", range(9)), extractor.rows("query", range(5))


@pytest.fixture(scope="module")
def features_at(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    return cache(lambda batch_size: build_features(batch_size, folder))


@given(st.integers(1, 20), st.integers(1, 20))
def test_any_batch_size_gives_the_same_features(features_at, left, right):
    for one, other in zip(features_at(left), features_at(right), strict=True):
        off = np.linalg.norm(one.feature_ND - other.feature_ND, axis=1)
        assert (off <= 1e-5 * np.linalg.norm(one.feature_ND, axis=1)).all()
        np.testing.assert_allclose(one.loss_N, other.loss_N, rtol=1e-5)
        np.testing.assert_allclose(one.sqnorm_N, other.sqnorm_N, rtol=1e-4)


def test_each_side_has_its_own_loss(features_at, tmp_path):
    (train, query), plain = features_at(4), build_features(4, tmp_path, train_data=lambda: make_rows(9, seed=2))[0]
    assert train.feature_ND.shape == (9, 128) and query.feature_ND.shape == (5, 128)
    assert not np.allclose(query.feature_ND, plain.feature_ND[:5], atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]
)
def test_models_of_every_floating_dtype_are_supported(dtype, tolerance):
    torch.manual_seed(0)
    model = Mixed().to(dtype)
    data = [(x.to(dtype), y) for x, y in make_rows(6)]
    steps = run_batches(model, [data], tolerance=tolerance)[0]
    assert {steps["first.weight"], steps["scale"], steps["unused.bias"]} == {RULE, VMAP, NONE}


def test_a_model_of_two_dtypes_is_supported():
    class Two(Mixed):
        def forward(self, x):
            return self.second(self.scale.double() * torch.tanh(self.first(x)).double())

    model = Two()
    model.second.double()
    run_batches(model, [make_rows(6)])


def penalised_where_large(model, batch):
    """Return a loss with a gradient penalty in those batches that have a large entry."""
    x = batch[0].detach().requires_grad_(True)
    losses = cross_entropy(model, (x, batch[1]))
    if bool((x > 2).any()):
        grad = torch.autograd.grad(losses.sum(), x, create_graph=True)[0]
        losses = losses + grad.flatten(1).norm(dim=1)
    return losses


def test_a_gradient_that_only_the_loss_of_a_later_batch_computes_is_differentiated_there():
    steps = run_batches(
        Positions(), [make_examples(4), make_examples(4, shift=3), make_examples(4)], penalised_where_large
    )
    assert set(steps[0].values()) == {RULE}
    assert steps[1]["inner.weight"] == steps[2]["inner.weight"] == LOOP


class Numbers(Positions):
    """Parameters with one element each, few or many."""

    def __init__(self, n, *, branching=False):
        super().__init__()
        self.branching = branching
        self.numbers = nn.ParameterList([nn.Parameter(torch.tensor(0.5 + i)) for i in range(n)])

    def forward(self, x):
        for number in self.numbers:
            x = torch.tanh(x * number)
        if self.branching and float(x.detach().sum()) > 1e9:
            x = 2 * x
        return super().forward(x)


@pytest.mark.parametrize(
    ("n", "branching", "step"), [(4, False, FORWARD), (4, True, FORWARD), (5, False, VMAP), (5, True, FORWARD)]
)
def test_parameters_with_one_element_need_no_backward_per_example(n, branching, step):
    steps = run_batches(Numbers(n, branching=branching), [make_examples(4), make_examples(3)])
    assert {steps[-1][f"numbers.{i}"] for i in range(n)} == {step}


def test_a_parameter_for_which_forward_mode_fails_uses_vmap():
    class Opaque(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Model(Numbers):
        def forward(self, x):
            return super().forward(Opaque.apply(x * self.numbers[0]))

    steps = run_batches(Model(1), [make_examples(4), make_examples(3)])
    assert steps[-1]["numbers.0"] == VMAP


def test_a_batch_that_fails_after_every_verification_raises_with_the_layer_and_the_cause(monkeypatch):
    run = LayerCapture.run

    def fails_unproven(self, *args, **options):
        done = run(self, *args, **options)
        if options.get("verifying") is None:
            self.failures["inner.weight"] = "the layer's input is not a tensor"
        return done

    engine = make_engine(Positions())
    monkeypatch.setattr(LayerCapture, "run", fails_unproven)
    with pytest.raises(GradientProofError) as refused:
        collect_gradients(engine, make_examples(4))
    assert str(refused.value) == (
        "the gradients of rows 0 to 3 fail after every verification: got inner.weight: the layer's input is not a "
        "tensor, expected a loss that is computed in the same way each time; change the loss, or exclude these "
        "parameters with Task.parameters; --debug shows the traceback"
    )


def test_an_error_after_every_verification_is_the_cause_of_the_raised_error(monkeypatch):
    run = LayerCapture.run

    def raises_unproven(self, *args, **options):
        if options.get("verifying") is None:
            raise RuntimeError("the kernel's own words")
        return run(self, *args, **options)

    engine = make_engine(Positions())
    monkeypatch.setattr(LayerCapture, "run", raises_unproven)
    with pytest.raises(GradientProofError, match="got RuntimeError: the kernel's own words, expected") as refused:
        collect_gradients(engine, make_examples(4))
    assert isinstance(refused.value.__cause__.__cause__, RuntimeError)


def test_a_runtime_error_of_the_users_loss_is_not_reported_as_a_missing_gradient():
    def loss(model, batch):
        if batch[0].shape[1] > 3:
            raise RuntimeError("the user's own")
        return cross_entropy(model, batch)

    engine = make_engine(Positions(), loss)
    collect_gradients(engine, make_examples(4))
    with pytest.raises(RuntimeError, match="^the user's own$"):
        collect_gradients(engine, make_examples(4, 5))


class Reentrant(torch.autograd.Function):
    """Checkpointing by a backward inside backward, as in packages other than PyTorch."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_(True)
        with torch.enable_grad():
            torch.autograd.backward(ctx.function(x), grad)
        return x.grad, None


@pytest.mark.parametrize(
    ("checkpointed", "got"),
    [
        # PyTorch's own checkpointing is replaced in a LoadedModel only.
        (lambda f, x: checkpoint(f, x, use_reentrant=True), "When use_reentrant=True, torch.utils.checkpoint is"),
        (lambda f, x: Reentrant.apply(x, f), "a backward runs inside backward, as reentrant checkpointing does"),
    ],
)
@pytest.mark.parametrize("part", [False, True])
def test_reentrant_checkpointing_that_hides_gradients_raises_with_the_remedy(checkpointed, got, part):
    class Model(Positions):
        def forward(self, x):
            x = x.detach().requires_grad_(True)
            if part:
                return self.head(torch.tanh(checkpointed(self.inner, x))).mean(1)
            return checkpointed(super().forward, x)

    with pytest.raises(TaskError) as refused:
        collect_gradients(make_engine(Model()), make_examples(4))
    assert str(refused.value).startswith(f"the loss has no gradient: got RuntimeError: {got}")
    assert str(refused.value).endswith("; use checkpointing with use_reentrant=False, or no checkpointing")
