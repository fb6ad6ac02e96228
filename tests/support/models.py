"""Seeded factories of models that use every layer rule and every gradient method."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.toy import cross_entropy


@dataclass(frozen=True)
class Case:
    """A model with its loss and its examples.

    Attributes:
        model: creates the model.
        loss: `(model, batch) -> Tensor[B]`.
        example: creates an example.
        methods: the gradient methods that its parameters may use.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    example: Callable[[torch.Generator], Any]
    methods: frozenset[str]


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().flatten(1).sum(1)


def tokens(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


def vector(*shape: int) -> Callable[[torch.Generator], Any]:
    return lambda g: (torch.randn(*shape, generator=g), torch.randint(0, 4, (), generator=g))


def sequence(length: int, vocabulary: int) -> Callable[[torch.Generator], Any]:
    return lambda g: tuple(torch.randint(0, vocabulary, (length,), generator=g) for _ in range(2))


def words(length: int) -> Callable[[torch.Generator], Any]:
    return lambda g: (torch.randint(0, 11, (length,), generator=g), torch.randint(0, 4, (), generator=g))


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Tensor:
        return self.function(self, *args)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.LayerNorm(9), nn.Linear(9, 4))


def conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, groups=3, dilation=2, padding="same", padding_mode="circular"),
        nn.GroupNorm(2, 6),
        nn.Conv2d(6, 6, 2, groups=6, bias=False, padding_mode="replicate", padding=1),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 5, 3, padding="same", dilation=2),
        nn.Tanh(),
        nn.Conv1d(5, 4, 2, padding="valid"),
        nn.BatchNorm1d(4),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1)), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    )


class TinyGPT(nn.Module):
    def __init__(self, tied: bool = False, functional: bool = False) -> None:
        super().__init__()
        self.functional = functional
        self.tokens = nn.Embedding(11, 8, padding_idx=0)
        self.places = nn.Parameter(torch.randn(7, 8) * 0.1)
        self.first = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8, bias=False)
        self.rms = nn.RMSNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index) + self.places[: index.shape[1]]
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = self.rms(x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return F.linear(x, self.tokens.weight) if self.functional else self.head(x)


class Placed(nn.Module):
    """Tokens with positions that are looked up once for all examples, as a row `[1, T]` or indices `[T]`."""

    def __init__(self, places: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.placed = places
        self.tokens, self.places = nn.Embedding(11, 6), nn.Embedding(16, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, index: Tensor) -> Tensor:
        places = self.placed(self, torch.arange(index.shape[1]))
        return self.head(torch.tanh(self.norm(self.tokens(index) + places))).mean(1)


class Patches(nn.Module):
    """A class token and positions `[1, ...]`, as in vision transformers, and a bias `[1, C]`.

    `of_all`: the bias is added at every position, and not to the mean of an example.
    """

    def __init__(self, of_all: bool = False) -> None:
        super().__init__()
        self.of_all = of_all
        self.patch, self.norm, self.head = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 9, 6))
        self.bias = nn.Parameter(torch.randn(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)], 1)
        x = self.norm(x + self.places[:, : x.shape[1]])
        x = torch.tanh(x + self.bias).mean(1) if self.of_all else torch.tanh(x.mean(1) + self.bias)
        return self.head(x)


def placed_in_place(model: nn.Module, t: Tensor) -> Tensor:
    looked_up = model.places(t.unsqueeze(0))
    looked_up += 1
    return looked_up


def attention() -> nn.Module:
    return Lambda(
        lambda m, x: m.head(m.attend(x, x, x, need_weights=False)[0].mean(1)),
        attend=nn.MultiheadAttention(6, 2, batch_first=True),
        head=nn.Linear(6, 4),
    )


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(6, 2, 10, batch_first=True), nn.Flatten(), nn.LazyLinear(4))


def recurrent(kind: type[nn.Module]) -> nn.Module:
    return Lambda(lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=kind(3, 5, batch_first=True), head=nn.Linear(5, 4))


def twice() -> nn.Module:
    return Lambda(
        lambda m, x: m.head(torch.tanh(m.mid(torch.tanh(m.mid(x))))), mid=nn.Linear(6, 6), head=nn.Linear(6, 4)
    )


def shared_twice() -> nn.Module:
    inner = nn.Linear(6, 6)
    return Lambda(
        lambda m, x: m.head(m.scale * m.second(torch.tanh(m.first(x)))),
        first=inner,
        second=inner,
        scale=nn.Parameter(torch.ones(6)),
        head=nn.Linear(6, 4),
    )


def weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
        nn.Tanh(),
        nn.utils.parametrizations.orthogonal(nn.Linear(5, 5)),
        nn.Linear(5, 4),
    )


def old_weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4))


def branching() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.right(x) * m.gain if float(x.sum()) > 0 else m.left(x)
        return m.head(torch.tanh(hidden))

    return Lambda(
        lambda m, x: torch.cat([forward(m, row[None]) for row in x]),
        left=nn.Linear(6, 5),
        right=nn.Linear(6, 5),
        gain=nn.Parameter(torch.ones(5)),
        head=nn.Linear(5, 4),
    )


def flattened() -> nn.Module:
    return Lambda(
        lambda m, x: m.head(torch.tanh(m.inner(x.reshape(-1, 3)))).view(len(x), -1, 4).mean(1),
        inner=nn.Linear(3, 5),
        head=nn.Linear(5, 4),
    )


def sequence_first() -> nn.Module:
    return Lambda(
        lambda m, x: m.head(torch.tanh(m.inner(x.transpose(0, 1)))).mean(0), inner=nn.Linear(3, 5), head=nn.Linear(5, 4)
    )


class OwnRMSNorm(nn.Module):
    """The norm of Hugging Face's Llama; `around`: with weights around zero, as in Gemma."""

    def __init__(self, width: int, around: bool = False) -> None:
        super().__init__()
        self.weight, self.around = nn.Parameter(torch.zeros(width) if around else torch.ones(width)), around

    def forward(self, x: Tensor) -> Tensor:
        normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return normalised * (1 + self.weight) if self.around else self.weight * normalised


class OwnLayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Conv1D(nn.Module):
    """The linear layer of Hugging Face's GPT-2, with a weight [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 2), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class OwnLinear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Bilinear(nn.Module):
    """A layer that holds a matrix and is not a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x @ self.weight)


class Gate(nn.Module):
    """A layer with the parameters of a norm layer that is not linear in its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(self.weight)


class Mixing(nn.Module):
    """A layer with the parameters of a norm layer and two inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other * self.weight


def own_norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 5), OwnRMSNorm(5), nn.Linear(5, 5), OwnRMSNorm(5, around=True), OwnLayerNorm(5), nn.Linear(5, 4)
    )


def no_norms() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.inner(x)
        return m.head(m.mixing(m.gate(hidden), torch.tanh(hidden))).mean(1)

    return Lambda(forward, inner=nn.Linear(3, 5), gate=Gate(5), mixing=Mixing(5), head=nn.Linear(5, 4))


RULE, VMAP, LOOP = "layer rule", "vmap(grad)", "loop"


def find_case(model: Callable[[], nn.Module], example: Any, *methods: str, loss: Any = cross_entropy) -> Case:
    return Case(model, loss, example, frozenset(methods))


CASES: dict[str, Case] = {
    "mlp": find_case(mlp, vector(6), RULE),
    "linear of rank 4": find_case(
        lambda: nn.Linear(3, 2),
        lambda g: (torch.randn(2, 5, 3, generator=g), torch.randn(2, 5, 2, generator=g)),
        RULE,
        loss=squared,
    ),
    "conv1d": find_case(conv1d, vector(3, 8), RULE),
    "conv2d": find_case(conv2d, vector(2, 9, 9), RULE),
    "conv3d": find_case(conv3d, vector(1, 4, 5, 4), RULE),
    "gpt": find_case(TinyGPT, sequence(7, 11), RULE, VMAP, loss=tokens),
    "gpt tied": find_case(lambda: TinyGPT(tied=True), sequence(7, 11), RULE, VMAP, loss=tokens),
    "gpt tied by F.linear": find_case(
        lambda: TinyGPT(functional=True), sequence(7, 11), RULE, VMAP, "no gradient", loss=tokens
    ),
    "places of a row": find_case(lambda: Placed(lambda m, t: m.places(t.unsqueeze(0))), words(9), RULE),
    "places of indices": find_case(lambda: Placed(lambda m, t: m.places(t)), words(9), RULE),
    "places as many as examples": find_case(lambda: Placed(lambda m, t: m.places(t)), words(6), RULE),
    "places through layers": find_case(
        lambda: Placed(lambda m, t: m.norm(torch.tanh(m.places(t.unsqueeze(0))))), words(9), RULE
    ),
    "places in place": find_case(lambda: Placed(placed_in_place), words(9), RULE),
    "places reshaped": find_case(lambda: Placed(lambda m, t: m.places(t).view(1, len(t), 6)), words(9), RULE, VMAP),
    "places of the first alone": find_case(
        lambda: Placed(lambda m, t: m.places(t.unsqueeze(0))[0]), words(9), RULE, VMAP
    ),
    "patches": find_case(Patches, vector(7, 3), RULE),
    "patches, a row for all": find_case(lambda: Patches(of_all=True), vector(7, 3), RULE, VMAP),
    "patches as many as examples": find_case(lambda: Patches(of_all=True), vector(5, 3), RULE, VMAP),
    "attention": find_case(attention, vector(5, 6), RULE, VMAP),
    "encoder": find_case(encoder, vector(5, 6), RULE, VMAP),
    "gru": find_case(lambda: recurrent(nn.GRU), vector(5, 3), RULE, LOOP),
    "lstm": find_case(lambda: recurrent(nn.LSTM), vector(5, 3), RULE, VMAP),
    "called twice": find_case(twice, vector(6), RULE),
    "held twice": find_case(shared_twice, vector(6), RULE, VMAP),
    "parametrised": find_case(weight_normed, vector(6), RULE, VMAP),
    "old weight norm": find_case(old_weight_normed, vector(6), RULE, VMAP),
    "branching": find_case(branching, vector(6), RULE, LOOP),
    "flattened positions": find_case(flattened, vector(5, 3), RULE),
    "own norms": find_case(lambda: Lambda(lambda m, x: m.inner(x).mean(1), inner=own_norms()), vector(6, 3), RULE),
    "own norms, one position": find_case(own_norms, vector(3), RULE),
    "own linear layers": find_case(
        lambda: Lambda(
            lambda m, x: m.inner(x).mean(1),
            inner=nn.Sequential(Conv1D(3, 5), nn.Tanh(), Conv1D(5, 5), nn.Tanh(), OwnLinear(5), Conv1D(5, 4)),
        ),
        vector(6, 3),
        RULE,
    ),
    "own linear layers, one position": find_case(
        lambda: nn.Sequential(Conv1D(3, 5), nn.Tanh(), OwnLinear(5), nn.Tanh(), Conv1D(5, 4)), vector(3), RULE
    ),
    "no linear layer": find_case(
        lambda: nn.Sequential(nn.Linear(3, 5), Bilinear(5), nn.Linear(5, 4)), vector(3), RULE, VMAP
    ),
    "no norms": find_case(no_norms, vector(6, 3), RULE, VMAP),
    "sequence first": find_case(sequence_first, vector(5, 3), RULE, VMAP),
}


def make_case(name: str, seed: int = 0, n: int = 6) -> tuple[nn.Module, Case, list[Any]]:
    """Return the model of a case, the case, and n examples; parameters and running statistics are random."""
    chosen = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = chosen.model().eval()
        generator = torch.Generator().manual_seed(seed + 1)
        examples = [chosen.example(generator) for _ in range(n)]
        with torch.no_grad():
            model(torch.utils.data.default_collate(examples)[0])
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
            for key, buffer in model.named_buffers():
                if buffer.is_floating_point() and "running" in key:
                    buffer.add_(torch.rand(buffer.shape))
    return model, chosen, examples
