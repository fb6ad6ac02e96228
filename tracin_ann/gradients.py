"""The ladder: every parameter's per-example gradient by a layer rule, else vmap(grad), else a loop; proven.

On the first batch of every checkpoint each parameter's per-example gradients, times random weights, must add
up to autograd's gradient of the losses so weighted; a parameter that fails falls one step down. Parameters
that no example's loss reaches are watched: should a later batch reach one, the proof is made again on that batch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracin_ann.errors import GradientProofError, NonFiniteError, TaskError
from tracin_ann.factors import Dense, Form
from tracin_ann.layers import OUTPUTS, PARAMETERS, LayerCapture, Layouts, covered_layers, covered_rows
from tracin_ann.nested import batched_tensors, rebuild, tensors_within
from tracin_ann.plan import LOOP, NONE, RULE, VMAP, Plan, Step
from tracin_ann.proof import (
    ProofSink,
    Truth,
    check_finite,
    misplaced,
    no_gradient,
    not_finite,
    proof_weights,
    unproven,
    unusable,
)
from tracin_ann.task import LossFunction

_STEPS = (RULE, VMAP, LOOP)
_FALLBACK_ELEMENTS = 1 << 26
_CHECK_EVERY = 64
_BY_ROWS = "its layer's rows are matched with examples in every batch, by one more backward"

Sink = Callable[[str, Form, slice], None]
Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


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
    """A batch showed that the plan no longer holds; prove again."""


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
        self._covered = covered_layers(model, self.parameters)
        self._plan: Plan | None = None
        self._rank_one: frozenset[str] = frozenset()
        self._fallen: dict[str, Step] = {}
        self._n_batches = 0
        self._layouts = Layouts()
        self._rows = covered_rows(model, self.parameters)
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

    def losses(self, batch: Batch) -> Tensor:
        """Return the per-example losses [B], checked for their shape."""
        with self._autocast():
            values = self._loss(self._model, batch.inputs)
        if why := unusable(values, len(batch)):
            raise TaskError(why)
        return values

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
        """
        if self._plan is None:
            self.prove(batch)
        for _ in range(1 + len(_STEPS)):
            try:
                return self._run(batch, start())
            except _PlanChangedError as change:
                cause = change.__cause__
                self.prove(batch)
        raise GradientProofError("the plan of gradients changes with every proof on one batch") from cause

    def _run(self, batch: Batch, sink: Sink) -> Tensor:
        plan = self.plan
        try:
            losses = self._run_rules(batch, sink)
            if names := plan.names(VMAP):
                self._run_vmap(batch, names, sink)
        except (_PlanChangedError, TaskError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _PlanChangedError from error
        if names := plan.names(LOOP):
            self._run_loop(batch, names, sink)
        return losses

    def _run_rules(self, batch: Batch, sink: Sink) -> Tensor:
        watched = [self.parameters[name] for name in self.plan.names(NONE)]
        checking = _is_checked(self._n_batches)
        self._n_batches += 1
        done = self._capture.run(lambda: self.losses(batch), len(batch), sink, watched, checking=checking)
        if self._capture.misplaced:
            raise GradientProofError(misplaced(self._capture.misplaced, batch.ids))
        if self._capture.failures or any(done.watched_reached):
            raise _PlanChangedError
        return done.losses_B

    def _run_vmap(self, batch: Batch, names: Sequence[str], sink: Sink) -> None:
        tensors = batched_tensors(batch.inputs, len(batch))
        if isinstance(tensors, str):
            raise _PlanChangedError
        for rows in self._slices(len(batch), names):
            grads = self._vmapped(batch.inputs, [t[rows] for t in tensors], names)
            for name in names:
                sink(name, Dense(grads[name].flatten(1)), rows)

    def _vmapped(self, inputs: Any, tensors: list[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        wrapped = _LossModule(self._model, self._loss)

        def one(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
            batch = rebuild(inputs, [t.unsqueeze(0) for t in example])
            with self._autocast():
                return functional_call(wrapped, parameters, (batch,)).squeeze(0)  # type: ignore[no-any-return]

        parameters = {f"model.{name}": self.parameters[name].detach() for name in names}
        with _registered(self._model), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            grads, _ = vmap(grad_and_value(one), in_dims=(None, *([0] * len(tensors))))(parameters, *tensors)
        return {name: grads[f"model.{name}"].detach() for name in names}

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
        grads, _ = self._autograd(lambda: self.losses(batch)[i], tuple(self.parameters))
        return self.losses(batch)[i].detach(), torch.cat([g.flatten() for g in grads])

    def _alone(self, single: Batch, names: Sequence[str] | None = None) -> list[Tensor]:
        return self._autograd(lambda: self.losses(single).sum(), names or tuple(self.parameters))[0]

    def _autograd(
        self, values: Callable[[], Tensor], names: Sequence[str], weights_KB: Tensor | None = None
    ) -> tuple[list[Tensor], list[bool]]:
        """Return autograd's gradients of a scalar, or [K, ...] of weighted sums of losses, and which are not missing.

        Zeros stand where nothing depends on a parameter.
        """
        parameters = [self.parameters[name] for name in names]
        rounds: list[tuple[Tensor | None, ...]] = []
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            value = values()
            weights = [None] if weights_KB is None else list(weights_KB.to(value))
            for k, weights_B in enumerate(weights):
                grads: tuple[Tensor | None, ...] = (None,) * len(parameters)
                if value.requires_grad:
                    more = k + 1 < len(weights)
                    grads = torch.autograd.grad(value, parameters, weights_B, retain_graph=more, allow_unused=True)
                rounds.append(grads)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        dense = [
            [torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g).detach() for g in each]
            for p, each in zip(parameters, zip(*rounds, strict=True), strict=True)
        ]
        whole = [each[0] if weights_KB is None else torch.stack(each) for each in dense]
        return whole, [grad is not None for grad in rounds[0]]

    def _slices(self, batch: int, names: Sequence[str]) -> list[slice]:
        """Return row slices whose materialised gradients stay in bounded memory."""
        entries = sum(self.parameters[name].numel() for name in names)
        step = max(1, _FALLBACK_ELEMENTS // entries)
        return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]

    def prove(self, batch: Batch) -> Plan:
        """Find and prove the highest step that serves each parameter on this batch; what fell once stays down.

        Raises:
            TaskError: the loss does not depend on any chosen parameter.
            NonFiniteError: a loss or gradient is NaN or infinite.
            GradientProofError: no step of the ladder agrees with autograd.
        """
        truth = self._truth(batch)
        covered = {name for attributes in self._covered.values() for name in attributes.values()} | set(self._rows)
        steps = {
            name: Step(RULE) if name in covered else Step(VMAP, "no layer rule covers it") for name in self.parameters
        }
        steps.update(self._fallen)
        steps.update({name: Step(NONE, "no loss of the first batch reaches it") for name in truth.unreached})
        self._adopt(steps)
        for position, name in enumerate(_STEPS):
            failed = self._rule_failures(batch, truth) if name == RULE else self._failures(name, batch, truth)
            if failed and position + 1 == len(_STEPS):
                raise GradientProofError(unproven(failed))
            self._fallen.update({p: Step(_STEPS[position + 1], why) for p, why in failed.items()})
            steps.update({p: self._fallen[p] for p in failed})
            self._adopt(steps)
        by_rows = {n for path, held in self._covered.items() if self._is_by_rows(path) for n in held.values()}
        steps.update({name: Step(RULE, _BY_ROWS) for name in self.plan.names(RULE) if name in by_rows})
        self._plan = replace(self.plan, steps=dict(steps), rank_one=self._rank_one & set(self.plan.names(RULE)))
        return self.plan

    def _is_by_rows(self, path: str) -> bool:
        return id(self._model.get_submodule(path)) in self._layouts.by_rows

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
        weights_KB = proof_weights(len(batch), self.checkpoint)
        try:
            grads, reached = self._autograd(lambda: self._checked(batch), names, weights_KB)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise TaskError(no_gradient(_first_line(error))) from error
        if not all(bool(torch.isfinite(grad).all()) for grad in grads):
            self._refuse_non_finite(batch)
        if not any(reached):
            raise TaskError(no_gradient())
        sums = {name: grad.flatten(1) for name, grad in zip(names, grads, strict=True)}
        unreached = tuple(name for name, hit in zip(names, reached, strict=True) if not hit)
        return Truth(weights_KB, sums, unreached, self.precision == "bf16")

    def _refuse_non_finite(self, batch: Batch) -> None:
        """Refuse the first row whose own loss or gradient is not finite; a sum that overflows has none."""
        check_finite(self.losses(batch), batch.ids, self.checkpoint)
        for i, row in enumerate(batch.ids):
            loss, grad = self.alone(batch, i)
            if not bool(torch.isfinite(grad).all()):
                got = f"NaN or inf at a loss of {float(loss):.6g}"
                raise NonFiniteError(not_finite("gradient", row, self.checkpoint, got))

    def _checked(self, batch: Batch) -> Tensor:
        values = self.losses(batch)
        if not values.requires_grad:
            raise TaskError(no_gradient())
        return values

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
        if not names:
            return {}
        sink = ProofSink(truth.weights_KB)
        try:
            if step == RULE:
                own = tensors_within(batch.inputs)
                self._capture.run(lambda: self.losses(batch), len(batch), sink, proving=own)
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
            return dict.fromkeys(names, f"{step} fails: {_first_line(error)}")
        if step == RULE:
            self._rank_one = sink.rank_one
        failed = dict(self._capture.failures) if step == RULE else {}
        for name in names:
            if name not in failed and (why := truth.disagreement(name, sink)):
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


class _LossModule(nn.Module):
    """The user's loss as a module, so that the parameters in all of it can be swapped."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(self.model, batch)


def _is_checked(n_batches: int) -> bool:
    """Return whether a batch, n after the proof, is checked for inputs that are no longer batch first."""
    return n_batches > 0 and (n_batches % _CHECK_EVERY == 0 or n_batches & (n_batches - 1) == 0)


class _registered:  # noqa: N801 - a context manager, named as it reads
    """Put every module's own parameters and buffers back on leaving.

    `functional_call` on a model that holds one submodule twice leaves swapped tensors behind.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        for module, parameters, buffers in self._held:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__
