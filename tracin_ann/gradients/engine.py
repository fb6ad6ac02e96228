"""The ladder: every parameter's per-example gradient by a layer rule, else vmap(grad), else a loop; proven.

On the first batch of every checkpoint each parameter's per-example gradients, times random weights, must add
up to autograd's gradient of the losses so weighted; a parameter that fails falls one step down. Parameters
that no example's loss reaches are watched: should a later batch reach one, the proof is made again on that batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.choices import Precision
from tracin_ann.errors import GradientProofError, MisplacedRowsError, NonFiniteError, TaskError, first_line
from tracin_ann.gradients.autograd import PlainGradients, Weighting, is_half_precision, plain_gradients, require_grad
from tracin_ann.gradients.capture import (
    OUTPUTS,
    PARAMETERS,
    LayerCapture,
    Layouts,
    find_covered_layers,
    find_shared_rows,
)
from tracin_ann.gradients.factors import Dense, Form, convert, form_dtype
from tracin_ann.gradients.functional import derivatives_by_forward_mode, gradients_by_vmap
from tracin_ann.gradients.plan import FORWARD, LOOP, NONE, RULE, VMAP, Plan, Step
from tracin_ann.gradients.proof import (
    ProofSink,
    Truth,
    check_finite,
    describe_misplaced,
    describe_no_gradient,
    describe_nonfinite,
    describe_unproven,
    describe_unsettled,
    describe_unusable_loss,
    proof_weights,
)
from tracin_ann.task import LossFunction, batched_tensors, tensors_within

# Forward mode serves some parameters instead of vmap(grad), others where that fails.
_ROUNDS = (RULE, FORWARD, VMAP, FORWARD, LOOP)
_ATTEMPTS = 4
_FALLBACK_ELEMENTS = 1 << 26
_CHECKED_FIRST, _CHECK_EVERY = (1, 4, 16), 64
_BY_ROWS = "its layer's rows are matched with examples in every batch, by one more backward"

Sink = Callable[[str, Form, slice], None]


@dataclass(frozen=True)
class Batch:
    """A batch: its rows' positions in the data set, the examples, and what collate made of them."""

    ids: tuple[int, ...]
    examples: Sequence[Any]
    inputs: Any

    def __len__(self) -> int:
        """Return B."""
        return len(self.ids)


class _PlanChangedError(Exception):
    """A batch showed that the plan no longer holds, and why; prove again."""


class GradientEngine:
    """Per-example gradients of a model's chosen parameters under one loss, by the proven ladder.

    Args:
        model: loaded with a checkpoint, in eval mode, none of its parameters requiring a gradient.
        parameters: the chosen ones by name.
        loss: `(model, batch) -> Tensor[B]`.
        inputs: examples -> what the loss takes, on the device.
        checkpoint: the checkpoint's position, for messages.
        precision: `fp32`: as the model computes; `bf16`: forward by autocast, factors widened to float32.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        loss: LossFunction,
        inputs: Callable[[list[Any]], Any],
        checkpoint: int = 0,
        precision: Precision = "fp32",
    ) -> None:
        self.parameters = dict(parameters)
        self.checkpoint = checkpoint
        self._model, self._loss, self._inputs, self.precision = model, loss, inputs, precision
        held = {name: p for name, p in self.parameters.items() if p.numel()}
        self._empty = frozenset(self.parameters) - set(held)
        self._form_dtype = form_dtype(self.parameters.values())
        self._covered = find_covered_layers(model, held)
        self._plan: Plan | None = None
        self._rank_one: frozenset[str] = frozenset()
        self._fallen: dict[str, Step] = {}
        self._n_batches = 0
        self._layouts = Layouts()
        self._rows = find_shared_rows(model, held)
        self._capture = LayerCapture(model, {}, {}, self._layouts)

    @property
    def plan(self) -> Plan:
        """Return the proven plan.

        Raises:
            TaskError: nothing is proven yet.
        """
        if self._plan is None:
            raise TaskError("the gradients are not proven yet: run a batch first")
        return self._plan

    @property
    def reached(self) -> bool:
        """Return whether the losses of a batch that was proven depend on any chosen parameter."""
        return any(step.name != NONE for step in self.plan.steps.values())

    def losses(self, batch: Batch) -> Tensor:
        """Return the per-example losses [B], checked for their shape."""
        values = self._values(self._model, batch.inputs)
        if why := describe_unusable_loss(values, len(batch)):
            raise TaskError(why)
        return values

    def loss_values(self, batch: Batch) -> Tensor:
        """Return the per-example losses [B] without a graph; a loss may take gradients itself."""
        return self.losses(batch).detach()

    def is_half_precision(self, batch: Batch) -> bool:
        """Return whether the losses of a batch are computed in half precision, whatever the parameters' dtype."""
        with self._followed(batch), require_grad(self.parameters.values()):
            return is_half_precision(self.losses(batch))

    def _values(self, model: nn.Module, inputs: Any) -> Tensor:
        with self._autocast():
            return self._loss(model, inputs)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        # Without the cache: a weight cast in one pass would serve the next, whose gradient it does not carry.
        device = next(iter(self.parameters.values())).device
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    def batch(self, ids: Sequence[int], examples: Sequence[Any]) -> Batch:
        """Return the batch of these examples on the device."""
        return Batch(tuple(ids), examples, self._inputs(list(examples)))

    def run(self, batch: Batch, start: Callable[[], Sink]) -> Tensor:
        """Hand every parameter's gradient forms of a batch to a sink, and return the losses [B].

        Args:
            batch: the examples.
            start: makes a fresh sink, called with (parameter name, form, rows of the batch);
                called again should the batch show that the plan must be proven anew.

        Raises:
            TaskError: the loss breaks the contract.
            NonFiniteError: a loss or gradient is NaN or infinite in a batch that had to be proven.
            GradientProofError: no step of the ladder agrees with autograd.
            MisplacedRowsError: the examples lie otherwise in a layer's input than when it was proven.
        """
        if self._plan is None:
            self.prove(batch)
        for attempt in range(_ATTEMPTS):
            try:
                return self._run(batch, self._widening(start()))
            except _PlanChangedError as change:
                if attempt + 1 == _ATTEMPTS:
                    raise GradientProofError(describe_unsettled(str(change), batch.ids)) from change
                self.prove(batch)
        raise AssertionError

    def _widening(self, sink: Sink) -> Sink:
        """Return a sink of forms in one dtype, float32 or wider, whatever step gave them and in what."""
        return lambda name, form, rows: sink(name, convert(form, self._form_dtype), rows)

    def _run(self, batch: Batch, sink: Sink) -> Tensor:
        plan = self.plan
        try:
            losses = self._run_rules(batch, sink)
            self._run_forward(batch, plan.names(FORWARD), sink)
            if names := plan.names(VMAP):
                self._run_vmap(batch, names, sink)
        except (_PlanChangedError, TaskError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _PlanChangedError(first_line(error)) from error
        if names := plan.names(LOOP):
            self._run_loop(batch, names, sink)
        return losses

    def _run_rules(self, batch: Batch, sink: Sink) -> Tensor:
        unreached = [name for name in self.plan.names(NONE) if name not in self._empty]
        watched = [self.parameters[name] for name in unreached]
        checking = _is_checked(self._n_batches)
        self._n_batches += 1
        done = self._capture.run(lambda: self.losses(batch), len(batch), sink, watched, checking=checking)
        if self._capture.misplaced:
            raise MisplacedRowsError(describe_misplaced(self._capture.misplaced, batch.ids))
        failures = self._capture.failures | {
            name: "a loss of this batch reaches it, and none before did"
            for name, reached in zip(unreached, done.watched_reached, strict=True)
            if reached
        }
        for name, why in failures.items():
            raise _PlanChangedError(f"{name}: {why}")
        return done.losses_B

    def _run_forward(self, batch: Batch, names: Sequence[str], sink: Sink) -> None:
        for name in names:
            values = derivatives_by_forward_mode(self._model, self._values, name, self.parameters[name], batch.inputs)
            if values is not None:
                sink(name, Dense(values.unsqueeze(1)), slice(0, len(batch)))

    def _run_vmap(self, batch: Batch, names: Sequence[str], sink: Sink) -> None:
        tensors = batched_tensors(batch.inputs, len(batch))
        if isinstance(tensors, str):
            raise _PlanChangedError(f"{names[0]}: {tensors}")
        chosen = {name: self.parameters[name] for name in names}
        for rows in self._slices(len(batch), names):
            grads = gradients_by_vmap(self._model, self._values, chosen, batch.inputs, [t[rows] for t in tensors])
            for name in names:
                sink(name, Dense(grads[name].reshape(rows.stop - rows.start, -1)), rows)

    def _run_loop(self, batch: Batch, names: Sequence[str], sink: Sink) -> None:
        for rows in self._slices(len(batch), names):
            singles = (self.batch(batch.ids[i : i + 1], batch.examples[i : i + 1]) for i in range(len(batch))[rows])
            grads = [self._alone(single, names) for single in singles]
            for j, name in enumerate(names):
                sink(name, Dense(torch.stack([g[j].flatten() for g in grads])), rows)

    def alone(self, batch: Batch, i: int) -> tuple[Tensor, Tensor]:
        """Return one example's loss and its whole gradient [P] by autograd, computed by itself."""
        single = self.batch(batch.ids[i : i + 1], batch.examples[i : i + 1])
        return self.losses(single)[0].detach(), torch.cat([g.flatten() for g in self._alone(single)])

    def together(self, batch: Batch, i: int) -> tuple[Tensor, Tensor]:
        """Return one example's loss and its whole gradient [P] by autograd, computed among its batch."""
        grads = self._autograd(lambda: self.losses(batch)[i], tuple(self.parameters)).of
        return self.losses(batch)[i].detach(), torch.cat([g.flatten() for g in grads])

    def _alone(self, single: Batch, names: Sequence[str] | None = None) -> list[Tensor]:
        return self._autograd(lambda: self.losses(single).sum(), names or tuple(self.parameters)).of

    def _autograd(
        self, values: Callable[[], Tensor], names: Sequence[str], weighting: Weighting | None = None
    ) -> PlainGradients:
        return plain_gradients(values, [self.parameters[name] for name in names], weighting)

    def _slices(self, batch: int, names: Sequence[str]) -> list[slice]:
        """Return row slices whose materialised gradients stay in bounded memory."""
        entries = sum(self.parameters[name].numel() for name in names)
        step = max(1, _FALLBACK_ELEMENTS // entries)
        return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]

    def prove(self, batch: Batch) -> Plan:
        """Find and prove the highest step that serves each parameter on this batch; what fell once stays down.

        Raises:
            TaskError: autograd cannot follow the loss back.
            NonFiniteError: a loss or gradient is NaN or infinite.
            GradientProofError: no step of the ladder agrees with autograd.
        """
        truth = self._truth(batch)
        covered = {name for attributes in self._covered.values() for name in attributes.values()} | set(self._rows)
        steps = {name: Step(RULE) for name in self.parameters} | self._fallen
        steps.update({name: Step(NONE, "no loss of the first batch reaches it") for name in truth.unreached})
        steps.update({name: Step(NONE, "it holds no numbers") for name in self._empty})
        self._adopt(steps)
        self._lower({name: "no layer rule covers it" for name in self.plan.names(RULE) if name not in covered})
        for step in _ROUNDS:
            failed = self._rule_failures(batch, truth) if step == RULE else self._failures(step, batch, truth)
            if failed and step == LOOP:
                raise GradientProofError(describe_unproven(failed))
            self._lower(failed)
        by_rows = {n for path, held in self._covered.items() if self._is_by_rows(path) for n in held.values()}
        steps = {n: Step(RULE, _BY_ROWS) if n in by_rows and s.name == RULE else s for n, s in self.plan.steps.items()}
        self._plan = replace(self.plan, steps=steps, rank_one=self._rank_one & set(self.plan.names(RULE)))
        return self.plan

    def _is_by_rows(self, path: str) -> bool:
        return id(self._model.get_submodule(path)) in self._layouts.by_rows

    def _lower(self, failed: Mapping[str, str]) -> None:
        """Let parameters fall one step down, and stay there."""
        lower = self.plan.lower(failed)
        self._fallen.update(lower)
        self._adopt({**self.plan.steps, **lower})

    def _adopt(self, steps: Mapping[str, Step]) -> None:
        self._plan = Plan(dict(steps), {name: p.numel() for name, p in self.parameters.items()})
        ruled = set(self._plan.names(RULE)) | set(self._plan.names(NONE))
        layers = {
            path: {attribute: name for attribute, name in attributes.items() if name in ruled}
            for path, attributes in self._covered.items()
        }
        layers = {path: held for path, held in layers.items() if held}
        rows = {name: held for name, held in self._rows.items() if name in self._plan.names(RULE)}
        self._capture = LayerCapture(self._model, layers, rows, self._layouts)

    def _truth(self, batch: Batch) -> Truth:
        names = tuple(self.parameters)

        def weights(half: bool) -> Tensor:
            return proof_weights(len(batch), self.checkpoint, half=half)

        with self._followed(batch):
            true = self._autograd(lambda: self.losses(batch), names, weights)
        if not all(bool(torch.isfinite(grad).all()) for grad in true.of):
            self._refuse_non_finite(batch)
        sums = {
            name: grad.reshape(len(grad), self.parameters[name].numel())
            for name, grad in zip(names, true.of, strict=True)
        }
        unreached = tuple(name for name, hit in zip(names, true.reached, strict=True) if not hit)
        return Truth(weights(true.half), sums, unreached, true.half)

    def _refuse_non_finite(self, batch: Batch) -> None:
        """Refuse the first row whose own loss or gradient is not finite; a sum that overflows has none."""
        check_finite(self.loss_values(batch), batch.ids, self.checkpoint)
        for i, row in enumerate(batch.ids):
            loss, grad = self.alone(batch, i)
            if not bool(torch.isfinite(grad).all()):
                got = f"NaN or inf at a loss of {float(loss):.6g}"
                raise NonFiniteError(describe_nonfinite("gradient", row, self.checkpoint, got))

    @contextlib.contextmanager
    def _followed(self, batch: Batch) -> Iterator[None]:
        """Refuse a loss that fails for autograd's sake; what fails without it is the user's own error, shown as it is.

        Raises:
            TaskError: autograd cannot follow the loss back.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.loss_values(batch)
            raise TaskError(describe_no_gradient(first_line(error))) from error

    def _rule_failures(self, batch: Batch, truth: Truth) -> dict[str, str]:
        """Return why the parameters that no rule serves fail, calls for all examples read as serves most of them."""
        best = self._attempt(self._layouts, batch, truth)

        def better(**reading: Any) -> _Attempt:
            other = self._attempt(replace(best.tried, **reading), batch, truth)
            return other if len(other.failed) < len(best.failed) else best

        if doubtful := best.layers(best.doubtful):
            best = better(for_all=best.tried.for_all | doubtful)
        for left in (frozenset({OUTPUTS}), frozenset({PARAMETERS}), frozenset()):
            if best.failed and best.repeated - left:
                best = better(repeated=left)
        if batch_first := best.layers(best.batch_first):
            best = better(by_rows=best.tried.by_rows | batch_first)
        self._layouts, self._rank_one = best.layouts, best.rank_one
        return best.failed

    def _attempt(self, layouts: Layouts, batch: Batch, truth: Truth) -> _Attempt:
        capture = self._capture
        capture.layouts = layouts
        failed = self._failures(RULE, batch, truth)
        return _Attempt(
            failed, layouts, capture.layouts, self._rank_one, capture.repeated, capture.doubtful, capture.batch_first
        )

    def _failures(self, step: str, batch: Batch, truth: Truth) -> dict[str, str]:
        """Return why each parameter that this step cannot serve fails."""
        names = self.plan.names(step)
        # Layers whose parameters no loss reaches are run as well: how their inputs are laid out is to be known.
        if not names and (step != RULE or not self.plan.names(NONE)):
            return {}
        proof = ProofSink(truth.weights_KB)
        sink = self._widening(proof)
        try:
            if step == RULE:
                own = tensors_within(batch.inputs)
                self._capture.run(lambda: self.losses(batch), len(batch), sink, proving=own)
            elif step == FORWARD:
                self._run_forward(batch, names, sink)
            elif step == VMAP:
                why = batched_tensors(batch.inputs, len(batch))
                if isinstance(why, str):
                    return dict.fromkeys(names, why)
                self._run_vmap(batch, names, sink)
            else:
                self._run_loop(batch, names, sink)
        except Exception as error:
            ours = step == RULE and self._capture.repeated
            if step == LOOP or isinstance(error, torch.OutOfMemoryError) or (isinstance(error, TaskError) and not ours):
                raise
            return dict.fromkeys(names, f"{step} fails: {first_line(error)}")
        if step == RULE:
            self._rank_one = proof.rank_one
        failed = dict(self._capture.failures) if step == RULE else {}
        for name in names:
            if name not in failed and (why := truth.disagreement(name, proof)):
                failed[name] = f"{step} {why}"
        return {name: why for name, why in failed.items() if name in names}


@dataclass(frozen=True)
class _Attempt:
    """What came of one reading of layers' inputs: why parameters fail, and the layouts before and after."""

    failed: dict[str, str]
    tried: Layouts
    layouts: Layouts
    rank_one: frozenset[str]
    repeated: frozenset[str]
    doubtful: Mapping[str, frozenset[int]]
    batch_first: Mapping[str, frozenset[int]]

    def layers(self, of: Mapping[str, frozenset[int]]) -> frozenset[int]:
        """Return those of some layers, by parameter, whose parameters fail."""
        return frozenset(layer for name, layers in of.items() if name in self.failed for layer in layers)


def _is_checked(n_batches: int) -> bool:
    """Return whether a batch, n after the proof, is checked for inputs that are no longer batch first."""
    return n_batches in _CHECKED_FIRST or (n_batches > 0 and n_batches % _CHECK_EVERY == 0)
