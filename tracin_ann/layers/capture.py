"""Forward and input-gradient backward with capture: what the layer rules need, and no weight gradients.

While a capture is open no covered parameter requires a gradient, so autograd never forms weight
gradients; the outputs of the first covered layers are made roots of the graph, so that nothing
below them, and no gradient of the model's input, is computed. Each layer's output gradient is
handed over as backward reaches it and dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.factors import Dense, Form
from tracin_ann.layers.base import Call, LayerRule, LayoutError, widened
from tracin_ann.layers.rules import rule_for

Sink = Callable[[str, Form], None]
# A module and the attribute of it that is a parameter.
Holder = tuple[nn.Module, str]
# A layer, the rank of its input, whether the batch is its first dimension, and whether the call is for all examples.
_Layout = tuple[int, int, bool, bool]

OUTPUTS, PARAMETERS = "outputs of layers", "parameters"


@dataclass
class Layouts:
    """What proofs found of how the batch lies in layers' inputs; one for all captures of an engine.

    A layer may be called once for all examples of a batch, as position embeddings are: on one row `[1, ...]`, or on
    indices `[T]`. Its output is then repeated for each example, so that each brings a gradient of its own; and so is
    a parameter `[1, ...]` of a model's own (a vision transformer's class token and positions).

    Attributes:
        proven: the layouts of inputs that were proven.
        repeated: what is repeated; a model that cannot take it is run as it is.
        for_all: embeddings whose indices `[T]` are for all examples, whatever T; where T is a multiple of the
            batch's size they may as well be the examples' own.
    """

    proven: set[_Layout] = field(default_factory=set)
    repeated: frozenset[str] = frozenset({OUTPUTS, PARAMETERS})
    for_all: set[int] = field(default_factory=set)


class _Root(torch.autograd.Function):
    """Make a tensor that has no graph the root of one, without a copy and open to in-place layers."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[0].new_zeros(())


class LayerCapture:
    """Hooks on the layers that rules cover; open while one forward and backward run.

    Args:
        model: the model.
        layers: the parameters wanted, each with the names of the layer attributes that hold it:
            `{layer path: {attribute: parameter name}}`; see `covered_layers`.
        rows: parameters `[1, ...]` that are used for all examples; see `covered_rows`.
        layouts: what proofs have found so far; a proof adds to it.

    Attributes:
        failures: why parameters were not served in the last run.
        repeated: what the last run repeated.
        doubtful: the embeddings by parameter whose indices were taken for the examples' own and may be for all.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Mapping[str, str]],
        rows: Mapping[str, Sequence[Holder]],
        layouts: Layouts,
    ) -> None:
        self._rows = rows
        self._layers = [(model.get_submodule(path), dict(attributes)) for path, attributes in layers.items()]
        self._anchor: Tensor | None = None
        self._sink: Sink | None = None
        self._batch = 0
        self._layouts = layouts
        self._proving = False
        self.failures: dict[str, str] = {}
        self.repeated: frozenset[str] = frozenset()
        self.doubtful: dict[str, int] = {}

    def run(
        self,
        losses: Callable[[], Tensor],
        batch: int,
        sink: Sink,
        watched: Sequence[nn.Parameter] = (),
        *,
        proving: bool = False,
    ) -> _Pass:
        """Run one forward (`losses()`) and backward, handing every gradient form to `sink`.

        Args:
            losses: computes the per-example losses [B].
            batch: B.
            sink: called with (parameter name, form), once for each use of a parameter.
            watched: parameters that are thought to get no gradient.
            proving: the forms are held against autograd's gradients; else a layer whose input is laid
                out as in no proof fails.

        Returns:
            The detached losses, and which of the watched parameters did get a gradient.
        """
        handles = [
            module.register_forward_hook(self._hook(attributes), with_kwargs=True)
            for module, attributes in self._layers
        ]
        self._sink, self._batch, self._proving, self.failures = sink, batch, proving, {}
        self.repeated, self.doubtful = frozenset(), {}
        try:
            for parameter in watched:
                parameter.requires_grad_(True)
            with self._rows_repeated() as leaves:
                values = losses()
                reached = self._backward(values, watched, leaves)
        finally:
            for handle in handles:
                handle.remove()
            for parameter in watched:
                parameter.requires_grad_(False)
            self._sink = self._anchor = None
        return _Pass(values.detach(), reached)

    def _backward(
        self, values: Tensor, watched: Sequence[nn.Parameter], leaves: Mapping[str, Tensor]
    ) -> tuple[bool, ...]:
        if not values.requires_grad:
            return (False,) * len(watched)
        inputs = [*([self._anchor] if self._anchor is not None else []), *leaves.values(), *watched]
        grads = torch.autograd.grad(values.sum(), inputs, allow_unused=True)
        own = grads[len(inputs) - len(watched) - len(leaves) :]
        assert self._sink is not None
        for name, grad in zip(leaves, own, strict=False):
            if grad is not None:
                self._sink(name, Dense(widened(grad.flatten(1))))
        return tuple(grad is not None for grad in own[len(leaves) :])

    @contextmanager
    def _rows_repeated(self) -> Iterator[dict[str, Tensor]]:
        """Put `[B, ...]` in the place of every parameter `[1, ...]`, and yield them."""
        leaves: dict[str, Tensor] = {}
        if PARAMETERS not in self._layouts.repeated:
            self.failures.update(dict.fromkeys(self._rows, "the model does not take it repeated for each example"))
        else:
            self.repeated |= {PARAMETERS} if self._rows else set()
            for name, holders in self._rows.items():
                row = holders[0][0]._parameters[holders[0][1]]
                assert row is not None
                leaves[name] = nn.Parameter(row.detach().expand(self._batch, *row.shape[1:]).contiguous())
        held = [(module, name, module._parameters[name]) for at in leaves for module, name in self._rows[at]]
        try:
            for name, leaf in leaves.items():
                for module, attribute in self._rows[name]:
                    module._parameters[attribute] = leaf  # type: ignore[assignment]
            yield leaves
        finally:
            for module, attribute, parameter in held:
                module._parameters[attribute] = parameter

    def _hook(self, attributes: Mapping[str, str]) -> Callable[..., Tensor | None]:
        wanted = frozenset(attributes)

        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled() or not isinstance(output, Tensor):
                return None
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(x, Tensor):
                self._fail(attributes, "the layer's input is no tensor")
                return None
            for_all = self._for_all(module, x, output, attributes)
            if not self._known(module, x, for_all):
                self._fail(attributes, "the layer's input is laid out as in no batch that was proven")
                return None
            x = x.detach()
            version = x._version
            if for_all:
                self.repeated |= {OUTPUTS}
                # A copy, so that layers that work in place may follow.
                x, output = self._repeated(x), self._repeated(output).contiguous()
            if output._is_view():
                # In-place operations on a view drop the hooks of its grad_fn; this alias is no view.
                output = torch.ops.aten._unsafe_view(output, output.shape)
            if not output.requires_grad:
                if self._anchor is None:
                    self._anchor = torch.zeros((), device=output.device, requires_grad=True)
                output = _Root.apply(output, self._anchor)  # type: ignore[no-untyped-call]

            rule = rule_for(module)
            assert rule is not None
            made = output.detach() if rule.wants_output(module) else None
            made_version = output._version

            def on_gradient(grad: Tensor) -> None:
                if x._version != version or (made is not None and made._version != made_version):
                    self._fail(attributes, "the layer's input or output is changed in place after its forward")
                    return
                call = Call(module, widened(x), widened(grad.detach()), self._batch, made)
                self._deliver(rule, call, attributes, wanted)

            output.register_hook(on_gradient)
            return output

        return after_forward

    def _for_all(self, module: nn.Module, x: Tensor, output: Tensor, attributes: Mapping[str, str]) -> bool:
        """Return whether this call serves all examples of the batch, so that its output is to be repeated."""
        if self._batch == 1 or x.dim() == 0 or output.shape[:1] != x.shape[:1] or OUTPUTS not in self._layouts.repeated:
            return False
        if x.dim() > 1:
            return len(x) == 1
        if not isinstance(module, nn.Embedding) or id(module) in self._layouts.for_all:
            return isinstance(module, nn.Embedding)
        if len(x) % self._batch == 0:
            self.doubtful.update(dict.fromkeys(attributes.values(), id(module)))
            return False
        if self._proving:
            self._layouts.for_all.add(id(module))
        return True

    def _repeated(self, tensor: Tensor) -> Tensor:
        """Return `[1, ...]` or `[T, ...]` as `[B, ...]` or `[B, T, ...]`."""
        return tensor.expand(self._batch, *tensor.shape[tensor.shape[0] == 1 :])

    def _known(self, module: nn.Module, x: Tensor, for_all: bool) -> bool:
        """Return whether a proof saw this layer's input in this layout; a batch of one has but one."""
        if self._batch == 1:
            return True
        layout = (id(module), x.dim(), x.shape[:1] == (self._batch,), for_all)
        if self._proving:
            self._layouts.proven.add(layout)
        return layout in self._layouts.proven

    def _deliver(self, rule: LayerRule, call: Call, attributes: Mapping[str, str], wanted: frozenset[str]) -> None:
        assert self._sink is not None
        try:
            with torch.no_grad():
                forms = rule.forms(call, wanted)
        except LayoutError as error:
            self._fail(attributes, str(error))
            return
        for attribute, form in forms.items():
            self._sink(attributes[attribute], form)

    def _fail(self, attributes: Mapping[str, str], reason: str) -> None:
        self.failures.update(dict.fromkeys(attributes.values(), reason))


class _Pass:
    """What one captured forward and backward gave besides the forms."""

    def __init__(self, losses: Tensor, reached: tuple[bool, ...]) -> None:
        self.losses_B = losses
        self.watched_reached = reached


def covered_layers(model: nn.Module, names: Mapping[str, nn.Parameter]) -> dict[str, dict[str, str]]:
    """Return the layers with a rule: `{layer path: {attribute: parameter name}}`, of these parameters only.

    A tied parameter appears under every layer that holds it; a parametrised layer holds none.
    """
    by_identity = {id(parameter): name for name, parameter in names.items()}
    layers: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        rule = rule_for(module)
        if rule is None:
            continue
        attributes = {
            attribute: by_identity[id(module._parameters[attribute])]
            for attribute in rule.parameters
            if id(module._parameters.get(attribute)) in by_identity
        }
        if attributes:
            layers[path] = attributes
    return layers


def covered_rows(model: nn.Module, names: Mapping[str, nn.Parameter]) -> dict[str, list[Holder]]:
    """Return the parameters `[1, ...]` that modules of the model's own hold, each with all that hold it.

    None of a layer with a rule, or of PyTorch's: those know their parameters' shapes.
    """
    by_identity = {id(p): name for name, p in names.items() if p.dim() > 1 and len(p) == 1}
    holders: dict[str, list[Holder]] = defaultdict(list)
    others: set[str] = set()
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            name = by_identity.get(id(parameter))
            if name is not None:
                holders[name].append((module, attribute))
                if rule_for(module) is not None or type(module).__module__.startswith("torch.nn."):
                    others.add(name)
    return {name: held for name, held in holders.items() if name not in others}
