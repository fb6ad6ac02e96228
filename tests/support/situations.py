"""Common models and losses that are difficult cases for gradient capture, with their rows and tolerances."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tasks.toy import cross_entropy

Rows = list[Any]
EXACT, HALF = 1e-4, 5e-2


@dataclass(frozen=True)
class Situation:
    """A model, its per-example loss and its rows.

    Attributes:
        model: creates the model.
        loss: `(model, batch) -> Tensor[B]`.
        rows: number of rows -> examples.
        tolerance: of scores, relative to the largest.
        truth: creates the same model for the float64 oracle, if the model itself cannot be cast.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    rows: Callable[[int], Rows]
    tolerance: float = EXACT
    truth: Callable[[], nn.Module] | None = None


def vectors(n: int, dtype: torch.dtype = torch.float32, **options: Any) -> Rows:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(5, generator=generator, dtype=torch.float32).to(dtype) for _ in range(n)]
    return [(x.requires_grad_(options.get("requires_grad", False)), i % 3) for i, x in enumerate(made)]


def grown_vectors(n: int) -> Rows:
    """Return rows computed from tensors that require a gradient, with one graph for all rows."""
    rows = vectors(n, requires_grad=True)
    return [(x, y) for x, (_, y) in zip(torch.stack([x for x, _ in rows]).sin(), rows, strict=True)]


def halves(n: int) -> Rows:
    return vectors(n, torch.bfloat16)


def sequences(n: int, dtype: torch.dtype = torch.float32) -> Rows:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=generator, dtype=torch.float32).to(dtype), i % 3) for i in range(n)]


def half_sequences(n: int) -> Rows:
    return sequences(n, torch.bfloat16)


def tokens(n: int) -> Rows:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 17, (6,), generator=generator) for _ in range(n)]


def images(n: int) -> Rows:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(1, 8, 8, generator=generator), i % 3) for i in range(n)]


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


class Lora(nn.Module):
    """A frozen linear layer with a trained update of rank 2, as in PEFT."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([RMSNorm(width), RMSNorm(width)])
        self.q, self.v = Lora(nn.Linear(width, width, bias=False)), Lora(nn.Linear(width, width, bias=False))
        self.k, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 12, bias=False), nn.Linear(width, 12, bias=False)
        self.down = nn.Linear(12, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A small Llama with LoRA on q and v; its blocks may use gradient checkpointing in either mode.

    Only LoRA is trained; with `whole`, the norms, the gates and the head are trained as well.
    """

    def __init__(self, reentrant: bool | None = None, *, hook: bool = True, whole: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Embedding(17, 8)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.norm, self.head = RMSNorm(8), nn.Linear(8, 17, bias=False)
        for name, parameter in self.named_parameters():
            lora = name.endswith(("down.weight", "up.weight")) and (".q." in name or ".v." in name)
            parameter.requires_grad_(lora or (whole and ".base." not in name))
        if hook:
            # Like `enable_input_require_grads` of Hugging Face.
            self.embed.register_forward_hook(require_grad)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Two(nn.Module):
    """Two branches: the input of one is data, that of the other requires a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(x)) * torch.tanh(self.right(x.clone().requires_grad_(True))))


def watched_input(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, (batch[0].detach().requires_grad_(True), batch[1]))


class Checkpointed(Toy):
    """Layers with gradient checkpointing, and a parameter without a layer rule."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant, self.scale = reentrant, nn.Parameter(torch.rand(6))

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.second(self.body(x))
        return self.second(checkpoint(self.body, x, use_reentrant=self.reentrant))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)
        self.act, self.scale = nn.PReLU(), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.attend(x, x, x, need_weights=False)[0])).mean(1) * self.scale


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class PartlyHalf(Attending):
    """Attention in bfloat16, the rest in float32 (or the other way round)."""

    def __init__(self, inner: torch.dtype = torch.bfloat16, outer: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.to(outer)
        self.attend.to(inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.attend.in_proj_weight.dtype)
        h = self.attend(x, x, x, need_weights=False)[0].to(self.head.weight.dtype)
        return self.head(self.act(h)).mean(1) * self.scale


class LoopOnly(Toy):
    """A parameter outside of layers in control flow that depends on data, which vmap does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) * self.scale
        return self.second(h if float(x.sum()) < 1e9 else 2 * h)


def in_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model, batch)


class Raw(nn.Module):
    """A model of parameters outside of layers: no call of a layer shows the dtype of its computation."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.b)


def make_critic() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Softplus(), nn.Linear(7, 1))


def gradient_penalty(model: nn.Module, batch: Any) -> Tensor:
    """Return the critic loss of WGAN-GP of each example, with its own sample and penalty."""
    x = batch[0].detach().requires_grad_(True)
    value = model(x)[:, 0]
    grad = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
    return value * (batch[1] - 1) + 10 * (grad.norm(dim=1) - 1).square()


def gradient_penalty_by_func(model: nn.Module, batch: Any) -> Tensor:
    grad = torch.func.grad(lambda x: model(x).sum())(batch[0])
    return model(batch[0])[:, 0] * (batch[1] - 1) + 10 * (grad.norm(dim=1) - 1).square()


def physics(model: nn.Module, batch: Any) -> Tensor:
    """Return the residual of u'' = -u at each example's point, a PINN's loss."""
    x = batch[0][:, :1].detach().requires_grad_(True)
    u = model(x.expand(-1, 5))
    first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
    return (second + u).square()[:, 0]


def forces(model: nn.Module, batch: Any) -> Tensor:
    """Return energy and force errors; the force is the negative gradient of the energy."""
    x = batch[0].detach().clone().requires_grad_(True)
    energy = model(x)[:, 0]
    force = -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
    return (energy - batch[1]).square() + (force - 0.1).square().sum(1)


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss at inputs moved along the sign of the gradient; the step itself is not differentiated."""
    x = batch[0].detach().clone().requires_grad_(True)
    step = torch.autograd.grad(cross_entropy(model, (x, batch[1])).sum(), x)[0].sign()
    return cross_entropy(model, ((x + 0.1 * step).detach(), batch[1]))


def adversarial_and_plain(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss at the inputs plus that at inputs moved along the sign of the gradient."""
    x = batch[0].detach().clone().requires_grad_(True)
    plain = cross_entropy(model, (x, batch[1]))
    step = torch.autograd.grad(plain.sum(), x, retain_graph=True)[0].sign()
    return plain + cross_entropy(model, ((x + 0.1 * step).detach(), batch[1]))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(108, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


def make_scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(Cnn())


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(Cnn().eval(), torch.randn(2, 1, 8, 8))


class PartlyScripted(nn.Module):
    def __init__(self, *, frozen: bool = False, plain: bool = False) -> None:
        super().__init__()
        self.body, self.head = Cnn() if plain else make_scripted(), nn.Linear(3, 3)
        for parameter in self.body.parameters():
            parameter.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Int8(torch.Tensor):
    """A frozen weight stored in int8 with one scale per row, as in torchao: a wrapper of two tensors."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=dtype, device=data.device)

    def __init__(self, data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.int_data, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["int_data", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, dtype: Any, size: Any, stride: Any) -> Int8:
        return cls(inner["int_data"], inner["scale"], dtype)

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantised(self) -> Tensor:
        return (self.int_data.to(self.scale.dtype) * self.scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if function in (aten.detach.default, aten.clone.default, aten.alias.default):
            held = args[0]
            return cls(function(held.int_data), function(held.scale), held.dtype)
        if function is aten._to_copy.default:
            held, dtype = args[0], kwargs.get("dtype") or args[0].dtype
            return cls(held.int_data.clone(), held.scale.to(dtype), dtype)
        if function is aten.copy_.default:
            source = args[1] if isinstance(args[1], Int8) else cls.of(args[1])
            args[0].int_data.copy_(source.int_data)
            args[0].scale.copy_(source.scale)
            return args[0]
        if function is aten.t.default:
            return args[0].dequantised().t()
        if function in (aten.mm.default, aten.addmm.default, aten.add.Tensor):
            return function(*(a.dequantised() if isinstance(a, Int8) else a for a in args))
        raise NotImplementedError(f"{function} of an int8 weight")


class Quantised(nn.Module):
    """LoRA over frozen int8 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Lora(nn.Linear(5, 6)), Lora(nn.Linear(6, 3))
        for layer in (self.first, self.second):
            layer.base.weight = nn.Parameter(Int8.of(layer.base.weight.detach()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Dequantised(Quantised):
    """The same model with dequantised weights, for the oracle."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.first, self.second):
            layer.base.weight = nn.Parameter(layer.base.weight.detach().dequantised(), requires_grad=False)


class Adaptive(nn.Module):
    """An adaptive softmax whose third cluster is projected to 8 // 16 = 0 dimensions: parameters of size 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.softmax = nn.AdaptiveLogSoftmaxWithLoss(8, 50, [5, 20])


def adaptive(model: Any, batch: Tensor) -> Tensor:
    logs = model.softmax.log_prob(model.embed(batch[:, 0]))
    return -logs.gather(1, batch[:, 1:2])[:, 0]


class Clip(Toy):
    """Cosine similarities with prototypes of the classes, scaled by a learned 0-dim parameter."""

    def __init__(self, *, branching: bool = False) -> None:
        super().__init__()
        self.prototypes, self.branching = nn.Linear(3, 3, bias=False), branching
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x: Tensor) -> Tensor:
        h = F.normalize(super().forward(x), dim=1)
        if self.branching and float(x.sum()) > 1e9:
            h = 2 * h
        return self.logit_scale.exp() * self.prototypes(h)


SITUATIONS: dict[str, Situation] = {
    "LoRA, input requires grad": Situation(Llama, next_token, tokens),
    "LoRA, checkpointing": Situation(lambda: Llama(False), next_token, tokens),
    "LoRA, reentrant checkpointing": Situation(lambda: Llama(True), next_token, tokens, truth=Llama),
    "LoRA, reentrant checkpointing, no hook": Situation(
        lambda: Llama(True, hook=False), next_token, tokens, truth=Llama
    ),
    "whole Llama, checkpointing": Situation(lambda: Llama(False, hook=False, whole=True), next_token, tokens),
    "whole Llama, reentrant checkpointing": Situation(
        lambda: Llama(True, whole=True), next_token, tokens, truth=lambda: Llama(whole=True)
    ),
    "a raw parameter, checkpointing": Situation(lambda: Checkpointed(False), cross_entropy, vectors),
    "a raw parameter, reentrant checkpointing": Situation(
        lambda: Checkpointed(True), cross_entropy, vectors, truth=lambda: Checkpointed(None)
    ),
    "one branch requires grad": Situation(Two, cross_entropy, vectors),
    "rows that require grad": Situation(Toy, cross_entropy, lambda n: vectors(n, requires_grad=True)),
    "rows that bring a graph": Situation(Toy, cross_entropy, grown_vectors),
    "the loss lets inputs require grad": Situation(Toy, watched_input, vectors),
    "attention in bfloat16": Situation(lambda: Attending().bfloat16(), cross_entropy, half_sequences, HALF),
    "attention in float16": Situation(
        lambda: Attending().half(), cross_entropy, lambda n: sequences(n, torch.float16), HALF
    ),
    "a GRU in bfloat16": Situation(lambda: Recurrent().bfloat16(), cross_entropy, half_sequences, HALF),
    "a loop in bfloat16": Situation(lambda: LoopOnly().bfloat16(), cross_entropy, halves, HALF),
    "attention alone in bfloat16": Situation(PartlyHalf, cross_entropy, sequences, HALF),
    "all but attention in bfloat16": Situation(
        lambda: PartlyHalf(torch.float32, torch.bfloat16), cross_entropy, sequences, HALF
    ),
    "bfloat16 and float64": Situation(
        lambda: PartlyHalf(torch.bfloat16, torch.float64), cross_entropy, sequences, HALF
    ),
    "autocast in the loss": Situation(Toy, in_autocast, vectors, HALF),
    "autocast in the loss, attention": Situation(Attending, in_autocast, sequences, HALF),
    "autocast in the loss, a loop": Situation(LoopOnly, in_autocast, vectors, HALF),
    "autocast in the loss, no modules": Situation(Raw, in_autocast, vectors, HALF),
    "gradient penalty": Situation(make_critic, gradient_penalty, vectors),
    "gradient penalty by torch.func": Situation(make_critic, gradient_penalty_by_func, vectors),
    "physics": Situation(make_critic, physics, vectors),
    "forces": Situation(make_critic, forces, vectors),
    "adversarial": Situation(Toy, adversarial, vectors),
    "adversarial and plain": Situation(Toy, adversarial_and_plain, vectors),
    "scripted": Situation(make_scripted, cross_entropy, images, truth=Cnn),
    "traced": Situation(traced, cross_entropy, images, truth=Cnn),
    "scripted in part": Situation(PartlyScripted, cross_entropy, images, truth=lambda: PartlyScripted(plain=True)),
    "a frozen scripted part": Situation(
        lambda: PartlyScripted(frozen=True),
        cross_entropy,
        images,
        truth=lambda: PartlyScripted(frozen=True, plain=True),
    ),
    "LoRA over int8": Situation(Quantised, cross_entropy, vectors, truth=Dequantised),
    "parameters of size 0": Situation(Adaptive, adaptive, tokens),
    "a 0-dim parameter": Situation(Clip, cross_entropy, vectors),
    "a 0-dim parameter, control flow": Situation(lambda: Clip(branching=True), cross_entropy, vectors),
}
