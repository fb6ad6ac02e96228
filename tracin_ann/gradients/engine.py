"""The gradient engine: per-example gradients of a model's parameters, verified against autograd.

Each parameter uses the first of these methods that is correct for it: a layer rule, `vmap(grad)`, a loop over the
examples; a parameter with one element can also use forward mode. On 16 rows of the first batch of every checkpoint,
the engine verifies the methods: the per-example gradients of a parameter, multiplied by random weights, must sum to
autograd's gradient of the weighted losses. A parameter that fails uses the next method. Parameters that no loss depends
on are watched: if a loss of a later batch depends on one, the engine verifies again on that batch.
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
from tracin_ann.gradients.autograd import is_half_precision, plain_gradients, require_grad
from tracin_ann.gradients.capture import LayerCapture, find_broadcast_parameters, find_covered_layers
from tracin_ann.gradients.directional import DIFFERENTIATE, Derivatives
from tracin_ann.gradients.factors import Dense, Sink, convert, form_dtype
from tracin_ann.gradients.functional import derivatives_by_forward_mode, gradients_by_vmap
from tracin_ann.gradients.layouts import OUTPUTS, PARAMETERS, LayoutReader, Layouts
from tracin_ann.gradients.plan import FORWARD, LOOP, NONE, RULE, VMAP, Method, Plan
from tracin_ann.gradients.proof import (
    ProofSink,
    Truth,
    check_finite,
    describe_misplaced,
    describe_no_gradient,
    describe_nonfinite,
    describe_unstable,
    describe_unusable_loss,
    describe_unverified,
    proof_weights,
)
from tracin_ann.gradients.scales import GradientScales
from tracin_ann.task import LossFunction, batched_tensors, tensors_within

# Some parameters use forward mode before vmap(grad), others if vmap(grad) fails.
_ORDER = (RULE, FORWARD, VMAP, FORWARD, LOOP)
# Rows of the first batch that verify the methods of a checkpoint.
_VERIFIED = 16
_ATTEMPTS = 4
_LARGEST_EXPONENT = 100
_FALLBACK_ELEMENTS = 1 << 26
_CHECKED_FIRST, _CHECK_EVERY = (1, 4, 16), 64
_BY_ROWS = "its layer's rows are matched with examples in every batch, with one more backward pass"


@dataclass(frozen=True)
class Batch:
    """A batch.

    Attributes:
        ids: the positions of its rows in the data set.
        examples: the examples.
        inputs: the collated examples, on the device.
    """

    ids: tuple[int, ...]
    examples: Sequence[Any]
    inputs: Any

    def __len__(self) -> int:
        """Return B."""
        return len(self.ids)


class _PlanChangedError(Exception):
    """A batch for which the plan is not correct, with the reason; the engine has to verify again."""


class GradientEngine:
    """Computes per-example gradients of selected parameters of a model under one loss.

    Args:
        model: with a checkpoint loaded, in eval mode; none of its parameters requires a gradient.
        parameters: the selected parameters by name.
        loss: `(model, batch) -> Tensor[B]`.
        inputs: examples -> the batch that the loss takes, on the device.
        checkpoint: the checkpoint's position, for messages.
        precision: `fp32`: the model's own precision; `bf16`: forward with autocast, factors converted to float32.

    Attributes:
        find_scales: returns `scales`; after construction, None.
        n_verified: how often methods have been chosen.
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
        self.find_scales: Callable[[], GradientScales | None] = _find_none
        self.parameters = dict(parameters)
        self.checkpoint, self.n_verified = checkpoint, 0
        self._model, self._loss, self._inputs, self.precision = model, loss, inputs, precision
        nonempty = {name: p for name, p in self.parameters.items() if p.numel()}
        self._empty = frozenset(self.parameters) - set(nonempty)
        self._form_dtype = form_dtype(self.parameters.values())
        self._covered = find_covered_layers(model, nonempty)
        self._broadcast = find_broadcast_parameters(model, nonempty)
        self._plan: Plan | None = None
        self._rank_one: frozenset[str] = frozenset()
        self._fallbacks: dict[str, Method] = {}
        self._n_batches = 0
        self._layouts = Layouts()
        self._capture = LayerCapture(model, {}, {}, LayoutReader(self._layouts))

    @property
    def scales(self) -> GradientScales | None:
        """Return the scales by which `run` multiplies gradients; None: gradients are not scaled."""
        return self.find_scales()

    @property
    def plan(self) -> Plan:
        """Return the verified plan.

        Raises:
            TaskError: no batch has been verified.
        """
        if self._plan is None:
            raise TaskError("the gradients are not verified yet: run a batch first")
        return self._plan

    @property
    def reached(self) -> bool:
        """Return whether the losses of a verified batch depend on any selected parameter."""
        return any(method.name != NONE for method in self.plan.steps.values())

    def losses(self, batch: Batch) -> Tensor:
        """Return the per-example losses [B].

        Raises:
            TaskError: the loss does not return one floating-point number per example.
        """
        values = self._compute_losses(self._model, batch.inputs)
        if why := describe_unusable_loss(values, len(batch)):
            raise TaskError(why)
        return values

    def loss_values(self, batch: Batch) -> Tensor:
        """Return the per-example losses [B] without a graph.

        Gradients stay enabled during the forward, because a loss may compute gradients itself.
        """
        return self.losses(batch).detach()

    def differentiate(
        self, method: str, batch: Batch, losses: LossFunction, direction: Mapping[str, Tensor]
    ) -> Derivatives:
        """Return losses [B, T] in the model's own precision, and their derivatives along a direction, in float64.

        Args:
            method: a key of `DIFFERENTIATE`.
            batch: the examples.
            losses: `(model, batch) -> Tensor[B, T]`.
            direction: by parameter, flattened: a gradient, or a sum of gradients, as `run` passes them on.

        Raises:
            Exception: the method does not support the model; any type that PyTorch raises.
        """
        # The scale of a gradient's parameter is in the direction, and here in the derivative.
        scales = self.scales
        parts = {name: part if scales is None else scales.apply(name, part) for name, part in direction.items()}
        # Derivatives are linear in the direction: with entries of at most 1 it fits the dtype of the parameters.
        peak = torch.stack([torch.linalg.vector_norm(part, ord=torch.inf) for part in parts.values()]).max().double()
        exponent = peak.frexp().exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        factor = torch.ldexp(torch.ones_like(peak), -exponent)
        tangents = {
            name: (part * factor.to(part)).reshape(self.parameters[name].shape).to(self.parameters[name])
            for name, part in parts.items()
        }
        found = DIFFERENTIATE[method](self._model, losses, self.parameters, tangents, batch.inputs)
        return Derivatives(found.loss_BT, found.derivative_BT.double() / factor)

    def is_half_precision(self, batch: Batch) -> bool:
        """Return whether the losses of a batch are computed in half precision, whatever the parameters' dtype."""
        with self._explain_autograd_errors(batch), require_grad(self.parameters.values()):
            return is_half_precision(self.losses(batch))

    def _compute_losses(self, model: nn.Module, inputs: Any) -> Tensor:
        if self.precision == "fp32":
            return self._loss(model, inputs)
        # Without the cache: a weight that one pass casts has no gradient in the next pass.
        device = next(iter(self.parameters.values())).device
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return self._loss(model, inputs)

    def batch(self, ids: Sequence[int], examples: Sequence[Any]) -> Batch:
        """Return the batch of these examples on the device."""
        return Batch(tuple(ids), examples, self._inputs(list(examples)))

    def run(self, batch: Batch, start: Callable[[], Sink]) -> Tensor:
        """Pass the scaled gradient forms of every parameter to a sink, and return the losses [B].

        Args:
            batch: the examples.
            start: returns a new sink; called again if the batch shows that the plan has to be verified again.

        Raises:
            TaskError: the loss breaks the contract.
            NonFiniteError: a loss or gradient is NaN or infinite in a batch that had to be verified.
            GradientProofError: no method agrees with autograd.
            MisplacedRowsError: a layer's input is no longer batch first as in the verified batch.
        """
        if self._plan is None:
            self.choose_methods(self.select_rows(batch, self.loss_values(batch)))
        for attempt in range(_ATTEMPTS):
            try:
                return self._run(batch, self._convert_forms(self._scale_forms(start())))
            except _PlanChangedError as change:
                if attempt + 1 == _ATTEMPTS:
                    raise GradientProofError(describe_unstable(str(change), batch.ids)) from change
                self.choose_methods(batch)
        raise AssertionError

    def select_rows(self, batch: Batch, loss_B: Tensor) -> Batch:
        """Return a batch of the rows with the largest losses, to verify the methods.

        The gradient of a loss that is almost 0 may consist of rounding, which no method computes alike.
        """
        if len(batch) <= _VERIFIED:
            return batch
        places = sorted(loss_B.topk(_VERIFIED).indices.tolist())
        return self.batch([batch.ids[i] for i in places], [batch.examples[i] for i in places])

    def _convert_forms(self, sink: Sink) -> Sink:
        """Return a sink that converts all forms to one dtype, float32 or wider."""
        return lambda name, form, rows: sink(name, convert(form, self._form_dtype), rows)

    def _scale_forms(self, sink: Sink) -> Sink:
        return sink if self.scales is None else self.scales.wrap(sink)

    def scale(self, grad_P: Tensor) -> Tensor:
        """Return a gradient [P] of all parameters, as by `compute_alone`, scaled like those that `run` passes on."""
        if self.scales is None:
            return grad_P
        return self.scales.apply_flat(grad_P, {name: p.numel() for name, p in self.parameters.items()})

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
        checking = _is_check_due(self._n_batches)
        self._n_batches += 1
        result = self._capture.run(lambda: self.losses(batch), len(batch), sink, watched, checking=checking)
        if self._capture.misplaced:
            raise MisplacedRowsError(describe_misplaced(self._capture.misplaced, batch.ids))
        failures = self._capture.failures | {
            name: "a loss of this batch depends on it, and no earlier loss did"
            for name, reached in zip(unreached, result.watched_reached, strict=True)
            if reached
        }
        for name, why in failures.items():
            raise _PlanChangedError(f"{name}: {why}")
        return result.losses_B

    def _run_forward(self, batch: Batch, names: Sequence[str], sink: Sink) -> None:
        for name in names:
            values = derivatives_by_forward_mode(
                self._model, self._compute_losses, name, self.parameters[name], batch.inputs
            )
            if values is not None:
                sink(name, Dense(values.unsqueeze(1)), slice(0, len(batch)))

    def _run_vmap(self, batch: Batch, names: Sequence[str], sink: Sink) -> None:
        tensors = batched_tensors(batch.inputs, len(batch))
        if isinstance(tensors, str):
            raise _PlanChangedError(f"{names[0]}: {tensors}")
        chosen = {name: self.parameters[name] for name in names}
        for rows in self._row_slices(len(batch), names):
            replacements = [t[rows] for t in tensors]
            grads = gradients_by_vmap(self._model, self._compute_losses, chosen, batch.inputs, replacements)
            for name in names:
                sink(name, Dense(grads[name].reshape(rows.stop - rows.start, -1)), rows)

    def _run_loop(self, batch: Batch, names: Sequence[str], sink: Sink) -> None:
        for rows in self._row_slices(len(batch), names):
            singles = (self.batch(batch.ids[i : i + 1], batch.examples[i : i + 1]) for i in range(len(batch))[rows])
            grads = [self._compute_single(single, names) for single in singles]
            for j, name in enumerate(names):
                sink(name, Dense(torch.stack([g[j].flatten() for g in grads])), rows)

    def compute_alone(self, batch: Batch, i: int) -> tuple[Tensor, Tensor]:
        """Return the loss and the gradient [P] of one example by autograd, in a batch of one; it is not scaled."""
        single = self.batch(batch.ids[i : i + 1], batch.examples[i : i + 1])
        found = plain_gradients(lambda: self.losses(single)[0], list(self.parameters.values()))
        return found.value, torch.cat([g.flatten() for g in found.gradients])

    def compute_in_batch(self, batch: Batch, i: int) -> tuple[Tensor, Tensor]:
        """Return the loss and the gradient [P] of one example by autograd, in its batch; it is not scaled."""
        found = plain_gradients(lambda: self.losses(batch)[i], list(self.parameters.values()))
        return found.value, torch.cat([g.flatten() for g in found.gradients])

    def _compute_single(self, single: Batch, names: Sequence[str]) -> list[Tensor]:
        """Return the gradients of a batch of one by autograd."""
        return plain_gradients(lambda: self.losses(single).sum(), [self.parameters[name] for name in names]).gradients

    def _row_slices(self, batch: int, names: Sequence[str]) -> list[slice]:
        """Return slices of the batch whose materialised gradients have bounded size."""
        elements = sum(self.parameters[name].numel() for name in names)
        step = max(1, _FALLBACK_ELEMENTS // elements)
        return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]

    def choose_methods(self, batch: Batch) -> Plan:
        """Choose the first method that is correct for each parameter on this batch.

        A method that failed once is not tried again.

        Raises:
            TaskError: autograd cannot differentiate the loss.
            NonFiniteError: a loss or gradient is NaN or infinite.
            GradientProofError: no method agrees with autograd.
        """
        self.n_verified += 1
        truth = self._compute_truth(batch)
        covered = {name for names in self._covered.values() for name in names.values()} | set(self._broadcast)
        methods = {name: Method(RULE) for name in self.parameters} | self._fallbacks
        methods.update({name: Method(NONE, "no loss of the first batch depends on it") for name in truth.unreached})
        methods.update({name: Method(NONE, "it has no elements") for name in self._empty})
        self._set_methods(methods)
        self._use_next({name: "no layer rule covers it" for name in self.plan.names(RULE) if name not in covered})
        for method in _ORDER:
            failed = self._verify_rules(batch, truth) if method == RULE else self._verify(method, batch, truth)
            if failed and method == LOOP:
                raise GradientProofError(describe_unverified(failed))
            self._use_next(failed)
        by_rows = {
            name
            for path, names in self._covered.items()
            if id(self._model.get_submodule(path)) in self._layouts.by_rows
            for name in names.values()
        }
        methods = {
            name: Method(RULE, _BY_ROWS) if name in by_rows and method.name == RULE else method
            for name, method in self.plan.steps.items()
        }
        self._plan = replace(self.plan, steps=methods, rank_one=self._rank_one & set(self.plan.names(RULE)))
        return self.plan

    def _use_next(self, failed: Mapping[str, str]) -> None:
        """Let parameters use the next method, in this and every later verification."""
        following = self.plan.next_methods(failed)
        self._fallbacks.update(following)
        self._set_methods({**self.plan.steps, **following})

    def _set_methods(self, methods: Mapping[str, Method]) -> None:
        self._plan = Plan(dict(methods), {name: p.numel() for name, p in self.parameters.items()})
        # Layers of parameters that no loss depends on are captured too, to know the layouts of their inputs.
        captured = set(self._plan.names(RULE)) | set(self._plan.names(NONE))
        layers = {
            path: {attribute: name for attribute, name in attributes.items() if name in captured}
            for path, attributes in self._covered.items()
        }
        layers = {path: attributes for path, attributes in layers.items() if attributes}
        broadcast = {name: holders for name, holders in self._broadcast.items() if name in self._plan.names(RULE)}
        self._capture = LayerCapture(self._model, layers, broadcast, LayoutReader(self._layouts))

    def _compute_truth(self, batch: Batch) -> Truth:
        def weights(half: bool) -> Tensor:
            return proof_weights(len(batch), self.checkpoint, half=half)

        with self._explain_autograd_errors(batch):
            true = plain_gradients(lambda: self.losses(batch), list(self.parameters.values()), weights)
        if not all(bool(torch.isfinite(grad).all()) for grad in true.gradients):
            self._raise_nonfinite(batch)
        sums = {
            name: grad.reshape(len(grad), self.parameters[name].numel())
            for name, grad in zip(self.parameters, true.gradients, strict=True)
        }
        unreached = tuple(name for name, reached in zip(self.parameters, true.reached, strict=True) if not reached)
        return Truth(weights(true.half), sums, unreached, true.half)

    def _raise_nonfinite(self, batch: Batch) -> None:
        """Raise for the first row whose own loss or gradient is not finite; a sum that overflows has no such row."""
        check_finite(self.loss_values(batch), batch.ids, self.checkpoint)
        for i, row in enumerate(batch.ids):
            loss, grad = self.compute_alone(batch, i)
            if not bool(torch.isfinite(grad).all()):
                got = f"NaN or inf at a loss of {float(loss):.6g}"
                raise NonFiniteError(describe_nonfinite("gradient", row, self.checkpoint, got))

    @contextlib.contextmanager
    def _explain_autograd_errors(self, batch: Batch) -> Iterator[None]:
        """Convert an error of autograd to a TaskError; an error of the user's loss without autograd is unchanged.

        Raises:
            TaskError: autograd cannot differentiate the loss.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.loss_values(batch)
            raise TaskError(describe_no_gradient(first_line(error))) from error

    def _verify_rules(self, batch: Batch, truth: Truth) -> dict[str, str]:
        """Return why layer rules fail, by parameter, with the layouts for which fewest parameters fail."""
        best = self._try_layouts(self._layouts, batch, truth)

        def improve(**layouts: Any) -> _Attempt:
            other = self._try_layouts(replace(best.tried, **layouts), batch, truth)
            return other if len(other.failed) < len(best.failed) else best

        if ambiguous := best.failed_layers(best.reader.ambiguous):
            best = improve(shared=best.tried.shared | ambiguous)
        for repeated in (frozenset({OUTPUTS}), frozenset({PARAMETERS}), frozenset()):
            if best.failed and best.reader.repeated - repeated:
                best = improve(repeated=repeated)
        if batch_first := best.failed_layers(best.reader.batch_first):
            best = improve(by_rows=best.tried.by_rows | batch_first)
        self._layouts, self._rank_one = best.reader.layouts, best.rank_one
        return best.failed

    def _try_layouts(self, layouts: Layouts, batch: Batch, truth: Truth) -> _Attempt:
        self._capture.reader = LayoutReader(layouts)
        failed = self._verify(RULE, batch, truth)
        return _Attempt(failed, layouts, self._capture.reader, self._rank_one)

    def _verify(self, method: str, batch: Batch, truth: Truth) -> dict[str, str]:
        """Return why a method fails, by parameter."""
        names = self.plan.names(method)
        if not names and (method != RULE or not self.plan.names(NONE)):
            return {}
        proof = ProofSink(truth.weights_KB)
        sink = self._convert_forms(proof)
        try:
            if method == RULE:
                own = tensors_within(batch.inputs)
                self._capture.run(lambda: self.losses(batch), len(batch), sink, verifying=own)
            elif method == FORWARD:
                self._run_forward(batch, names, sink)
            elif method == VMAP:
                why = batched_tensors(batch.inputs, len(batch))
                if isinstance(why, str):
                    return dict.fromkeys(names, why)
                self._run_vmap(batch, names, sink)
            else:
                self._run_loop(batch, names, sink)
        except Exception as error:
            # A TaskError may be due to repeated outputs or parameters; otherwise it is the user's own error.
            is_repeated = method == RULE and self._capture.reader.repeated
            if (
                method == LOOP
                or isinstance(error, torch.OutOfMemoryError)
                or (isinstance(error, TaskError) and not is_repeated)
            ):
                raise
            return dict.fromkeys(names, f"{method} fails: {first_line(error)}")
        if method == RULE:
            self._rank_one = proof.rank_one
        failed = dict(self._capture.failures) if method == RULE else {}
        for name in names:
            if name not in failed and (why := truth.describe_disagreement(name, proof)):
                failed[name] = f"{method} {why}"
        return {name: why for name, why in failed.items() if name in names}


@dataclass(frozen=True)
class _Attempt:
    """The result of verifying layer rules with some layouts.

    Attributes:
        failed: why rules fail, by parameter.
        tried: the layouts.
        reader: the reader after the run.
        rank_one: parameters whose gradients are one outer product per example.
    """

    failed: dict[str, str]
    tried: Layouts
    reader: LayoutReader
    rank_one: frozenset[str]

    def failed_layers(self, by_parameter: Mapping[str, frozenset[int]]) -> frozenset[int]:
        """Return those of some layers, by parameter, whose parameters fail."""
        return frozenset(layer for name, layers in by_parameter.items() if name in self.failed for layer in layers)


def _find_none() -> None:
    """Return no scales."""


def _is_check_due(n_batches: int) -> bool:
    """Return whether the inputs of a batch, n after the verified one, are checked to be batch first."""
    return n_batches in _CHECKED_FIRST or (n_batches > 0 and n_batches % _CHECK_EVERY == 0)
