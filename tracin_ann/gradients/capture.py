"""Forward and input-gradient backward with capture: what the layer rules need, and no weight gradients.

While a capture is open no covered parameter requires a gradient, so autograd never forms weight
gradients; the outputs of the first covered layers are made roots of the graph, so that nothing
below them, and no gradient of the model's input, is computed. Each layer's output gradient is
handed over as backward reaches it and dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracin_ann.gradients.attribution import Arrangement, WeightCode, project
from tracin_ann.gradients.autograd import HALF, other_leaves
from tracin_ann.gradients.factors import Dense, Form
from tracin_ann.gradients.layers.base import Call, LayerRule, LayoutError, widen
from tracin_ann.gradients.layers.rules import rule_for
from tracin_ann.gradients.row_indexing import RowMoves

Sink = Callable[[str, Form, slice], None]
# A module and the attribute of it that is a parameter.
Holder = tuple[nn.Module, str]
# A layer, the rank of its input, whether its first dimension is the outermost in memory, and how the batch lies in it.
_Layout = tuple[int, int, bool, "Reading"]
Reading = Literal["batch first", "rows", "for all"]
"""How a call's input is read: its first dimension is the batch; rows of examples to be found; one for all examples."""

OUTPUTS, PARAMETERS = "outputs of layers", "parameters"


@dataclass(frozen=True)
class Layouts:
    """What proofs found of how the batch lies in layers' inputs; one for all captures of an engine.

    A layer may be called once for all examples of a batch, as position embeddings are: on one row `[1, ...]`, or on
    indices `[T]`. Its output is then repeated for each example, so that each brings a gradient of its own; and so is
    a parameter `[1, ...]` of a model's own (a vision transformer's class token and positions).

    A layer whose input's first dimension is not the batch has rows whose examples are found anew in every batch.

    Attributes:
        proven: the layouts of inputs that were proven.
        repeated: what is repeated; a model that cannot take it is run as it is.
        for_all: embeddings whose indices `[T]` are for all examples, whatever T.
        by_rows: layers whose rows' examples are found in every batch, even where there are as many as examples:
            rows were picked by index before them, or their input was not batch first in some batch.
    """

    proven: frozenset[_Layout] = frozenset()
    repeated: frozenset[str] = frozenset({OUTPUTS, PARAMETERS})
    for_all: frozenset[int] = frozenset()
    by_rows: frozenset[int] = frozenset()


class _MisplacedError(LayoutError):
    """A layer's input was proven to be batch first, and is not."""


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
            `{layer path: {attribute: parameter name}}`; see `find_covered_layers`.
        rows: parameters `[1, ...]` that are used for all examples; see `find_shared_rows`.
        layouts: what proofs have found so far.

    Attributes:
        layouts: the same, with what a proof added.
        failures: why parameters were not served in the last run.
        misplaced: a layer whose input was checked and is not batch first as it was proven to be, or nothing.
        repeated: what the last run repeated.
        doubtful: the embeddings by parameter whose indices `[T]` were taken for the examples' own and may be for all.
        batch_first: the layers by parameter whose input's first dimension was taken for the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Mapping[str, str]],
        rows: Mapping[str, Sequence[Holder]],
        layouts: Layouts,
    ) -> None:
        self._rows = rows
        self._layers = [(model.get_submodule(path), path, dict(attributes)) for path, attributes in layers.items()]
        self._anchor: Tensor | None = None
        self._sink: Sink | None = None
        self._batch = 0
        self.layouts = layouts
        self._moves: RowMoves | None = None
        self._checking = False
        self._half = False
        self._by_rows = False
        self._code: WeightCode | None = None
        self._weighting = self._in_loss = False
        self._codes: dict[tuple[int, torch.device, bool], WeightCode] = {}
        self._clear()

    def _clear(self) -> None:
        self.failures: dict[str, str] = {}
        self.repeated: frozenset[str] = frozenset()
        self.misplaced = ""
        self.doubtful: dict[str, frozenset[int]] = {}
        self.batch_first: dict[str, frozenset[int]] = {}
        self._half = self._by_rows = self._weighting = self._in_loss = False
        self._arrangements: dict[int, Arrangement] = {}
        self._anchor = self._code = None

    def run(
        self,
        losses: Callable[[], Tensor],
        batch: int,
        sink: Sink,
        watched: Sequence[nn.Parameter] = (),
        *,
        proving: Sequence[Tensor] | None = None,
        checking: bool = False,
    ) -> _Pass:
        """Run one forward (`losses()`) and backward, handing every gradient form to `sink`.

        One more backward, of weighted losses, is run where layers are called on rows whose examples are to be found.

        Args:
            losses: computes the per-example losses [B].
            batch: B.
            sink: called with (parameter name, form, rows of the batch), for every use of a parameter.
            watched: parameters that are thought to get no gradient.
            proving: the batch's own tensors, where the forms are held against autograd's gradients; else a layer
                whose input is laid out as in no proof fails.
            checking: find also the examples of inputs whose first dimension is taken for the batch; a layer where
                they are others fails.

        Returns:
            The detached losses, and which of the watched parameters did get a gradient.
        """
        handles = [
            module.register_forward_hook(self._hook(path, attributes), with_kwargs=True)
            for module, path, attributes in self._layers
        ]
        self._clear()
        self._sink, self._batch, self._checking = sink, batch, checking and batch > 1
        self._moves = None if proving is None else RowMoves(proving)
        try:
            for parameter in watched:
                parameter.requires_grad_(True)
            with self._rows_repeated() as leaves:
                with self._moves or nullcontext():
                    self._in_loss = True
                    values = losses()
                    self._in_loss = False
                reached = self._backward(values, watched, leaves)
        finally:
            for handle in handles:
                handle.remove()
            for parameter in watched:
                parameter.requires_grad_(False)
            self._sink = self._anchor = self._code = self._moves = None
            self._arrangements = {}
        return _Pass(values.detach(), reached)

    def _backward(
        self, values: Tensor, watched: Sequence[nn.Parameter], leaves: Mapping[str, Tensor]
    ) -> tuple[bool, ...]:
        if not values.requires_grad or (self.failures and self._moves is None):
            return (False,) * len(watched)
        inputs = [*leaves.values(), *watched]
        # The anchor, and leaves of others: layers behind an input that requires a gradient hang on that alone.
        inputs = [*other_leaves(values, inputs), *inputs]
        if self._by_rows or self._checking:
            self._weighted_backward(values, inputs)
        grads = torch.autograd.grad(values.sum(), inputs, allow_unused=True)
        own = grads[len(inputs) - len(watched) - len(leaves) :]
        assert self._sink is not None
        for name, grad in zip(leaves, own, strict=False):
            if grad is not None:
                self._sink(name, Dense(widen(grad.flatten(1))), slice(0, self._batch))
        return tuple(grad is not None for grad in own[len(leaves) :])

    def _weighted_backward(self, values: Tensor, inputs: Sequence[Tensor]) -> None:
        """Let calls see their output gradients of weighted losses, which tell whose their rows are."""
        half = self._half or values.dtype in HALF
        key = self._batch, values.device, half
        if key not in self._codes:
            self._codes[key] = WeightCode(self._batch, values.device, half=half)
        self._code = self._codes[key]
        self._weighting = True
        for weights_B in self._code.weights_KB.to(values.dtype):
            torch.autograd.grad(values, inputs, weights_B, retain_graph=True, allow_unused=True)
        self._weighting = False

    @contextmanager
    def _rows_repeated(self) -> Iterator[dict[str, Tensor]]:
        """Put `[B, ...]` in the place of every parameter `[1, ...]`, and yield them."""
        leaves: dict[str, Tensor] = {}
        if PARAMETERS not in self.layouts.repeated:
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

    def _hook(self, path: str, attributes: Mapping[str, str]) -> Callable[..., Tensor | None]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled() or not isinstance(output, Tensor):
                return None
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(x, Tensor):
                self._fail(attributes, "the layer's input is no tensor")
                return None
            if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in (x, output)):
                self._fail(attributes, "a transform of torch.func goes through the layer")
                return None
            reading = self._reading(module, x, output, attributes)
            if not self._known(module, x, reading):
                self._fail(attributes, "the layer's input is laid out as in no batch that was proven")
                return None
            x = x.detach()
            version = x._version
            if reading == "for all":
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
            self._half |= output.dtype in HALF
            rule = rule_for(module)
            assert rule is not None
            made = output.detach() if rule.wants_output(module) else None
            made_version = output._version
            n_rows = self._n_rows(rule, module, x, output, reading)
            weighted: list[Tensor] = []

            def on_gradient(grad: Tensor) -> None:
                if self._in_loss:
                    # Not the losses' gradient but one that the loss takes itself: with a graph, it is differentiated.
                    if torch.is_grad_enabled():
                        self._fail(attributes, "the loss differentiates a gradient that it takes through the layer")
                    return
                if self._weighting:
                    if n_rows:
                        weighted.append(project(widen(grad.detach()), n_rows))
                    return
                if x._version != version or (made is not None and made._version != made_version):
                    self._fail(attributes, "the layer's input or output is changed in place after its forward")
                    return
                call = Call(module, widen(x), widen(grad.detach()), self._batch, made)
                try:
                    with torch.no_grad():
                        self._deliver(rule, call, attributes, reading, weighted)
                except LayoutError as error:
                    why = f"layer {path or type(module).__name__}: {error}"
                    self._fail(attributes, why)
                    if isinstance(error, _MisplacedError):
                        self.misplaced = why

            output.register_hook(on_gradient)
            return output

        return after_forward

    def _reading(self, module: nn.Module, x: Tensor, output: Tensor, attributes: Mapping[str, str]) -> Reading:
        """Return how the batch lies in this call's input."""
        if self._batch == 1:
            return "batch first"
        if isinstance(module, nn.Embedding) and x.dim() == 1 and id(module) not in self.layouts.for_all:
            _add(self.doubtful, attributes, module)
        elif self._serves_all(module, x, output):
            return "for all"
        moved = self._moves is not None and self._moves.seen
        if moved or id(module) in self.layouts.by_rows or x.shape[:1] != (self._batch,):
            self._by_rows = True
            return "rows"
        _add(self.batch_first, attributes, module)
        return "batch first"

    def _serves_all(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        """Return whether this call serves all examples of the batch, so that its output is to be repeated."""
        if x.dim() == 0 or output.shape[:1] != x.shape[:1] or OUTPUTS not in self.layouts.repeated:
            return False
        return isinstance(module, nn.Embedding) if x.dim() == 1 else len(x) == 1

    def _repeated(self, tensor: Tensor) -> Tensor:
        """Return `[1, ...]` or `[T, ...]` as `[B, ...]` or `[B, T, ...]`."""
        return tensor.expand(self._batch, *tensor.shape[tensor.shape[0] == 1 :])

    def _known(self, module: nn.Module, x: Tensor, reading: Reading) -> bool:
        """Return whether a proof saw this layer's input in this layout; a batch of one has but one."""
        if self._batch == 1:
            return True
        outermost = x.dim() == 0 or x.layout != torch.strided or x.stride(0) == max(x.stride())
        layout = (id(module), x.dim(), outermost, reading)
        if self._moves is not None:
            by_rows = self.layouts.by_rows | {id(module)} if reading == "rows" else self.layouts.by_rows
            self.layouts = replace(self.layouts, proven=self.layouts.proven | {layout}, by_rows=by_rows)
        return layout in self.layouts.proven

    def _deliver(
        self, rule: LayerRule, call: Call, attributes: Mapping[str, str], reading: Reading, weighted: Sequence[Tensor]
    ) -> None:
        """Hand the forms of a call to the sink, its rows by example.

        Raises:
            LayoutError: the rows cannot be told apart by example, or the rule cannot read them.
        """
        assert self._sink is not None
        parts: Iterable[tuple[slice, Call]] = [(slice(0, call.batch), call)]
        if weighted:
            plain_RJ = project(call.grad_output, len(weighted[0]))
            if reading == "rows":
                parts = self._arranged(plain_RJ, weighted).parts(call, rule.n_leading(call.module, call.input))
            else:
                self._check_batch_first(plain_RJ, weighted)
        elif reading == "rows":
            raise LayoutError(f"an input of shape {list(call.input.shape)} has no rows")
        for rows, part in parts:
            for attribute, form in rule.forms(part, frozenset(attributes)).items():
                self._sink(attributes[attribute], form, rows)

    def _n_rows(self, rule: LayerRule, module: nn.Module, x: Tensor, output: Tensor, reading: Reading) -> int:
        """Return how many rows of a call are held against their examples; 0: none are, or it has none."""
        if reading != "rows":
            return self._batch if self._checking and reading == "batch first" else 0
        n_leading = rule.n_leading(module, x)
        rows = x.shape[: max(0, n_leading)]
        return prod(rows) if n_leading >= 0 and output.shape[:n_leading] == rows else 0

    def _arranged(self, plain_RJ: Tensor, weighted: Sequence[Tensor]) -> Arrangement:
        """Return a call's rows by example; most layers of a model run on the same rows.

        Raises:
            LayoutError: some row gets gradients of several examples.
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
        """Refuse an input whose first dimension is not the batch in order.

        Raises:
            _MisplacedError: another example's loss reaches some row.
        """
        assert self._code is not None
        own_B = torch.arange(len(plain_BJ), device=plain_BJ.device)
        if self._code.refutes(plain_BJ, weighted, own_B):
            raise _MisplacedError("the rows of its input are not the batch's examples in order")

    def _fail(self, attributes: Mapping[str, str], reason: str) -> None:
        self.failures.update(dict.fromkeys(attributes.values(), reason))


class _Pass:
    """What one captured forward and backward gave besides the forms."""

    def __init__(self, losses: Tensor, reached: tuple[bool, ...]) -> None:
        self.losses_B = losses
        self.watched_reached = reached


def _add(layers: dict[str, frozenset[int]], attributes: Mapping[str, str], module: nn.Module) -> None:
    """Add a layer to those of its parameters."""
    for name in attributes.values():
        layers[name] = layers.get(name, frozenset()) | {id(module)}


def find_covered_layers(model: nn.Module, names: Mapping[str, nn.Parameter]) -> dict[str, dict[str, str]]:
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
            attribute: by_identity[id(parameter)]
            for attribute, parameter in module._parameters.items()
            if attribute in rule.parameters and id(parameter) in by_identity
        }
        if attributes:
            layers[path] = attributes
    return layers


def find_shared_rows(model: nn.Module, names: Mapping[str, nn.Parameter]) -> dict[str, list[Holder]]:
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
