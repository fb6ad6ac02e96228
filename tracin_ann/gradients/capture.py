"""Capture of layer inputs and output gradients in one forward and backward, without weight gradients.

During a capture, no covered parameter requires a gradient, so autograd computes no weight gradients. The outputs of
the first covered layers are the roots of the graph, so that nothing below them, and no gradient of the model's input,
is computed. The output gradient of each layer is passed to its rule when backward reaches the layer, and is then
released.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.gradients.attribution import Arrangement, WeightCode, project
from tracin_ann.gradients.autograd import HALF, nodes, other_leaves, weighted_sum
from tracin_ann.gradients.factors import Dense, Sink
from tracin_ann.gradients.layers.base import Call, LayerRule, LayoutError, widen
from tracin_ann.gradients.layers.embedding import RELATIVE_BIAS
from tracin_ann.gradients.layers.registry import find_rule
from tracin_ann.gradients.layouts import OUTPUTS, PARAMETERS, Layout, LayoutReader
from tracin_ann.gradients.lookups import find_bias_owner, follow_bias, follow_lookups
from tracin_ann.gradients.row_indexing import detect_row_indexing

Holder = tuple[nn.Module, str]
"""A module, and the attribute that holds a parameter."""


@dataclass(frozen=True)
class CaptureResult:
    """The result of a captured forward and backward, besides the gradient forms.

    Attributes:
        losses_B: the losses, detached.
        watched_reached: whether a loss depends on each watched parameter.
    """

    losses_B: Tensor
    watched_reached: tuple[bool, ...]


@dataclass(frozen=True)
class _Layer:
    """A layer whose calls are followed.

    Attributes:
        module: the layer.
        path: in the model.
        attributes: the parameters to capture, by attribute.
        bias_owner: the module that computes a relative position bias from the layer, or None.
    """

    module: nn.Module
    path: str
    attributes: Mapping[str, str]
    bias_owner: nn.Module | None = None


@contextmanager
def _replace_method(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one module in the block."""
    own = vars(module)
    before = own.get(name)
    own[name] = method
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


class _MisplacedError(LayoutError):
    """A layer's input was batch first when it was verified, and is not now."""


class _Root(torch.autograd.Function):
    """Makes a tensor without a graph the root of one, without a copy, so that in-place layers may follow."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[0].new_zeros(())


class LayerCapture:
    """Hooks on the layers that rules cover, registered during one forward and backward.

    Args:
        model: the model.
        layers: the parameters to capture, by layer and attribute: `{layer path: {attribute: parameter name}}`; see
            `find_covered_layers`.
        broadcast: parameters `[1, ...]` that all examples use, with their modules; see `find_broadcast_parameters`.
        reader: determines the layouts of layer inputs.

    Attributes:
        reader: the same; a verification adds layouts to it.
        failures: why the rule fails, by parameter, in the last run.
        misplaced: a layer whose input was checked and is no longer batch first, or "".
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Mapping[str, str]],
        broadcast: Mapping[str, Sequence[Holder]],
        reader: LayoutReader,
    ) -> None:
        self._broadcast = broadcast
        self._layers = [
            _Layer(model.get_submodule(path), path, dict(attributes), find_bias_owner(model, path))
            for path, attributes in layers.items()
        ]
        self.reader = reader
        self._sink: Sink | None = None
        self._batch = 0
        self._is_verifying = self._is_checking = False
        self._codes: dict[tuple[int, torch.device, bool], WeightCode] = {}
        self._clear()

    def _clear(self) -> None:
        self.failures: dict[str, str] = {}
        self.misplaced = ""
        self._has_half = self._is_weighting = self._is_in_loss = False
        self._arrangements: dict[int, Arrangement] = {}
        self._anchor: Tensor | None = None
        self._code: WeightCode | None = None
        # The graph nodes of the outputs of calls on rows whose examples have to be determined.
        self._row_nodes: list[Any] = []

    def run(
        self,
        losses: Callable[[], Tensor],
        batch: int,
        sink: Sink,
        watched: Sequence[nn.Parameter] = (),
        *,
        verifying: Sequence[Tensor] | None = None,
        checking: bool = False,
    ) -> CaptureResult:
        """Run one forward (`losses()`) and backward, and pass every gradient form to `sink`.

        If a layer is called on rows whose examples have to be determined, one more backward, of weighted losses, runs.

        Args:
            losses: computes the per-example losses [B].
            batch: B.
            sink: called for every use of a parameter.
            watched: parameters that no loss is expected to depend on.
            verifying: the batch's own tensors, if the forms are compared with autograd's gradients; otherwise None, and
                a layer whose input has a layout that is not verified fails.
            checking: also determine the examples of inputs that are treated as batch first; a layer with other
                examples fails.
        """
        self._clear()
        self._sink, self._batch, self._is_checking = sink, batch, checking and batch > 1
        indexing = None if verifying is None else detect_row_indexing(verifying)
        self._is_verifying = verifying is not None
        self.reader.start(batch, indexing)
        try:
            for parameter in watched:
                parameter.requires_grad_(True)
            with self._repeat_broadcast_parameters() as leaves:
                with self._follow_layers():
                    with indexing or nullcontext():
                        self._is_in_loss = True
                        values = losses()
                        self._is_in_loss = False
                    reached = self._backward(values, watched, leaves)
        finally:
            for parameter in watched:
                parameter.requires_grad_(False)
            self._sink = self._anchor = self._code = None
            self._arrangements, self._row_nodes = {}, []
        return CaptureResult(values.detach(), reached)

    def _backward(
        self, values: Tensor, watched: Sequence[nn.Parameter], leaves: Mapping[str, Tensor]
    ) -> tuple[bool, ...]:
        """Run the backward passes, and return whether a loss depends on each watched parameter."""
        if not values.requires_grad or (self.failures and not self._is_verifying):
            return (False,) * len(watched)
        inputs = [*leaves.values(), *watched]
        # The anchor and other leaves: layers after an input that requires a gradient depend on that input only.
        inputs = [*other_leaves(values, inputs), *inputs]
        if self._is_checking or self._has_rows(values):
            self._run_weighted_backward(values, inputs)
        grads = torch.autograd.grad(values.sum(), inputs, allow_unused=True)
        own = grads[len(inputs) - len(watched) - len(leaves) :]
        assert self._sink is not None
        for name, grad in zip(leaves, own, strict=False):
            if grad is not None:
                self._sink(name, Dense(widen(grad.flatten(1))), slice(0, self._batch))
        return tuple(grad is not None for grad in own[len(leaves) :])

    def _has_rows(self, values: Tensor) -> bool:
        """Return whether the losses depend on the output of a call on rows whose examples have to be determined.

        DoRA calls the matrices of LoRA on the identity, for a norm that it detaches: no gradient reaches that call.
        """
        return bool(self._row_nodes) and not set(self._row_nodes).isdisjoint(nodes(values))

    def _run_weighted_backward(self, values: Tensor, inputs: Sequence[Tensor]) -> None:
        """Run backward from the weighted losses; the hooks collect output gradients, to determine their examples."""
        half = self._has_half or values.dtype in HALF
        key = self._batch, values.device, half
        if key not in self._codes:
            self._codes[key] = WeightCode(self._batch, values.device, half=half)
        self._code = self._codes[key]
        self._is_weighting = True
        for weights_B in self._code.weights_KB.to(values.dtype):
            torch.autograd.grad(weighted_sum(values, weights_B), inputs, retain_graph=True, allow_unused=True)
        self._is_weighting = False

    @contextmanager
    def _repeat_broadcast_parameters(self) -> Iterator[dict[str, Tensor]]:
        """Replace every broadcast parameter `[1, ...]` by a leaf `[B, ...]`, and yield the leaves by name."""
        leaves: dict[str, Tensor] = {}
        if PARAMETERS not in self.reader.layouts.repeated:
            self.failures.update(dict.fromkeys(self._broadcast, "the model fails if it is repeated for each example"))
        else:
            self.reader.repeated |= {PARAMETERS} if self._broadcast else set()
            for name, holders in self._broadcast.items():
                row = holders[0][0]._parameters[holders[0][1]]
                assert row is not None
                leaves[name] = nn.Parameter(row.detach().expand(self._batch, *row.shape[1:]).contiguous())
        originals = [
            (module, attribute, module._parameters[attribute])
            for name in leaves
            for module, attribute in self._broadcast[name]
        ]
        try:
            for name, leaf in leaves.items():
                for module, attribute in self._broadcast[name]:
                    module._parameters[attribute] = leaf  # type: ignore[assignment]
            yield leaves
        finally:
            for module, attribute, parameter in originals:
                module._parameters[attribute] = parameter

    @contextmanager
    def _follow_layers(self) -> Iterator[None]:
        """Follow the calls of all layers in the block: by hooks, or by lookups inside other functions."""
        with ExitStack() as stack:
            for layer in self._layers:
                rule = find_rule(layer.module)
                assert rule is not None
                if layer.bias_owner is not None and OUTPUTS in self.reader.layouts.repeated:
                    follow = partial(self._follow, layer, RELATIVE_BIAS, "shared")
                    stack.enter_context(
                        _replace_method(layer.bias_owner, *follow_bias(layer.bias_owner, layer.module, follow))
                    )
                elif rule.is_lookup:
                    follow = partial(self._follow, layer, rule, None)
                    stack.enter_context(_replace_method(layer.module, "forward", follow_lookups(layer.module, follow)))
                elif rule.scaled_input is not None:
                    before = self._make_input_hook(layer, rule)
                    stack.callback(rule.scaled_input(layer.module).register_forward_pre_hook(before).remove)
                else:
                    hook = self._make_hook(layer, rule)
                    handle = layer.module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def _make_input_hook(self, layer: _Layer, rule: LayerRule) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        """Return a hook of the submodule whose input is followed as the layer's output."""

        def before_forward(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args or not isinstance(args[0], Tensor):
                self._fail(layer.attributes, "the input of the layer's submodule is not a tensor")
                return None
            # An alias that is not a view: what changes it does not count as a change of the input.
            output = torch.ops.aten._unsafe_view(args[0], args[0].shape)
            return (self._follow(layer, rule, None, args[0], output), *args[1:])

        return before_forward

    def _make_hook(self, layer: _Layer, rule: LayerRule) -> Callable[..., Tensor | None]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled() or not isinstance(output, Tensor):
                return None
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(x, Tensor):
                self._fail(layer.attributes, "the layer's input is not a tensor")
                return None
            return self._follow(layer, rule, None, x, output)

        return after_forward

    def _follow(self, layer: _Layer, rule: LayerRule, layout: Layout | None, x: Tensor, output: Tensor) -> Tensor:
        """Follow a call of a layer: pass the forms of its parameters to the sink when backward reaches its output.

        Args:
            layer: the layer.
            rule: its rule.
            layout: of the input; None: it is determined.
            x: its input.
            output: its output.

        Returns:
            The output that the model continues with.
        """
        module, attributes = layer.module, layer.attributes
        if not torch.is_grad_enabled():
            return output
        if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in (x, output)):
            self._fail(attributes, "a transform of torch.func is applied to the layer")
            return output
        if layout is None:
            layout = self.reader.read(module, x, output, attributes)
        else:
            self.reader.repeated |= {OUTPUTS}
        if not self.reader.is_verified(module, x, layout):
            self._fail(attributes, "the layer's input has a layout that was in no verified batch")
            return output
        x = x.detach()
        version = x._version
        if layout == "shared":
            # A copy, so that in-place layers may follow.
            x, output = self.reader.repeat(x, x), self.reader.repeat(x, output).contiguous()
        if output._is_view():
            # In-place operations on a view drop the hooks of its grad_fn; this alias is not a view.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        if not output.requires_grad:
            if self._anchor is None:
                self._anchor = torch.zeros((), device=output.device, requires_grad=True)
            output = _Root.apply(output, self._anchor)  # type: ignore[no-untyped-call]
        self._has_half |= output.dtype in HALF
        stored = output.detach() if rule.needs_output(module) else None
        stored_version = output._version
        n_rows = self._count_rows(rule, module, x, output, layout)
        if n_rows and layout == "rows":
            self._row_nodes.append(output.grad_fn)
        weighted: list[Tensor] = []

        def on_gradient(grad: Tensor) -> None:
            if self._is_in_loss:
                # A gradient that the loss itself computes. With a graph, the loss differentiates it.
                if torch.is_grad_enabled():
                    self._fail(attributes, "the loss differentiates a gradient that it computes through the layer")
                return
            if layout == "rows":
                self.reader.keep_rows(module)
            if self._is_weighting:
                if n_rows:
                    weighted.append(project(widen(grad.detach()), n_rows))
                return
            if x._version != version or (stored is not None and stored._version != stored_version):
                self._fail(attributes, "the layer's input or output is changed in place after its forward")
                return
            call = Call(module, widen(x), widen(grad.detach()), self._batch, stored)
            try:
                with torch.no_grad():
                    self._apply_rule(rule, call, attributes, layout, weighted)
            except LayoutError as error:
                why = f"layer {layer.path or type(module).__name__}: {error}"
                self._fail(attributes, why)
                if isinstance(error, _MisplacedError):
                    self.misplaced = why

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]
        return output

    def _apply_rule(
        self, rule: LayerRule, call: Call, attributes: Mapping[str, str], layout: Layout, weighted: Sequence[Tensor]
    ) -> None:
        """Pass the gradient forms of a call to the sink, its rows arranged by example.

        Raises:
            LayoutError: the examples of rows cannot be determined, or the rule does not support the layout.
        """
        assert self._sink is not None
        parts: Iterable[tuple[slice, Call]] = [(slice(0, call.batch), call)]
        if weighted:
            plain_RJ = project(call.grad_output, len(weighted[0]))
            if layout == "rows":
                parts = self._arrange(plain_RJ, weighted).parts(call, rule.n_leading(call.module, call.input))
            else:
                self._check_batch_first(plain_RJ, weighted)
        elif layout == "rows":
            raise LayoutError(f"an input of shape {list(call.input.shape)} has no rows")
        for rows, part in parts:
            for attribute, form in rule.forms(part, frozenset(attributes)).items():
                self._sink(attributes[attribute], form, rows)

    def _count_rows(self, rule: LayerRule, module: nn.Module, x: Tensor, output: Tensor, layout: Layout) -> int:
        """Return the number of rows of a call whose examples are determined, 0 for none."""
        if layout != "rows":
            return self._batch if self._is_checking and layout == "batch first" else 0
        n_leading = rule.n_leading(module, x)
        rows = x.shape[: max(0, n_leading)]
        return prod(rows) if n_leading >= 0 and output.shape[:n_leading] == rows else 0

    def _arrange(self, plain_RJ: Tensor, weighted: Sequence[Tensor]) -> Arrangement:
        """Return the arrangement of a call's rows; it is reused, because most layers of a model have the same rows.

        Raises:
            LayoutError: a row has gradients of several examples.
        """
        assert self._code is not None
        known = self._arrangements.get(len(plain_RJ))
        guess_R = None if known is None else known.example_R
        example_R = self._code.attribute(plain_RJ, weighted, guess_R)
        if known is None or example_R is not guess_R:
            if guess_R is not None:
                example_R = torch.where(example_R < 0, guess_R, example_R)
            known = self._arrangements[len(plain_RJ)] = Arrangement(example_R, self._batch)
        return known

    def _check_batch_first(self, plain_BJ: Tensor, weighted: Sequence[Tensor]) -> None:
        """Check that the first dimension of an input is the batch, in order.

        Raises:
            _MisplacedError: a row belongs to another example.
        """
        assert self._code is not None
        own_B = torch.arange(len(plain_BJ), device=plain_BJ.device)
        if self._code.is_mismatch(plain_BJ, weighted, own_B):
            raise _MisplacedError("the rows of its input are not the batch's examples in order")

    def _fail(self, attributes: Mapping[str, str], reason: str) -> None:
        self.failures.update(dict.fromkeys(attributes.values(), reason))


def find_covered_layers(model: nn.Module, names: Mapping[str, nn.Parameter]) -> dict[str, dict[str, str]]:
    """Return the layers with a rule, `{layer path: {attribute: parameter name}}`, restricted to these parameters.

    A tied parameter appears under every layer that holds it. The parameters of a parametrised layer do not appear.
    """
    by_identity = {id(parameter): name for name, parameter in names.items()}
    layers: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        rule = find_rule(module)
        if rule is None:
            continue
        attributes = {
            attribute: by_identity[id(parameter)]
            for attribute, parameter in rule.find_parameters(module).items()
            if id(parameter) in by_identity
        }
        if attributes:
            layers[path] = attributes
    return layers


def find_broadcast_parameters(model: nn.Module, names: Mapping[str, nn.Parameter]) -> dict[str, list[Holder]]:
    """Return the parameters `[1, ...]` that all examples may share, each with the modules that hold it.

    Parameters of PyTorch layers and of layers with a rule are not included: those layers expect the original shape.
    """
    by_identity = {id(p): name for name, p in names.items() if p.dim() > 1 and len(p) == 1}
    holders: dict[str, list[Holder]] = defaultdict(list)
    excluded: set[str] = set()
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            name = by_identity.get(id(parameter))
            if name is not None:
                holders[name].append((module, attribute))
                if find_rule(module) is not None or type(module).__module__.startswith("torch.nn."):
                    excluded.add(name)
    return {name: modules for name, modules in holders.items() if name not in excluded}
