"""Models with layer inputs whose first dimension is not the batch: graphs, options, packed tokens, masked positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Ragged:
    """A model with its loss and its examples.

    Attributes:
        model: creates the model.
        loss: `(model, batch) -> Tensor[B]`.
        example: creates an example of a size.
        collate: examples -> batch.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    example: Callable[[int, torch.Generator], Any]
    collate: Callable[[Sequence[Any]], Any]


class GraphNet(nn.Module):
    """A graph network: the nodes of all graphs are concatenated, and the outputs are means over each graph."""

    def __init__(self, width: int = 7, layers: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(5, width)
        self.rounds = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, n_graphs: int) -> Tensor:
        hidden = torch.tanh(self.enter(nodes))
        for each in self.rounds:
            sent = torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
            hidden = hidden + torch.tanh(each(self.norm(sent)))
        size = torch.bincount(graph, minlength=n_graphs).clamp_min(1).unsqueeze(1).to(hidden)
        pooled = torch.zeros(n_graphs, hidden.shape[1]).to(hidden).index_add(0, graph, hidden) / size
        return self.head(pooled)


def graph(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    edges = torch.randint(0, size, (2, 2 * size), generator=generator)
    return torch.randn(size, 5, generator=generator), edges, size % 3


def collate_graphs(examples: Sequence[Any]) -> dict[str, Any]:
    sizes = torch.tensor([len(nodes) for nodes, _, _ in examples])
    starts = (sizes.cumsum(0) - sizes).tolist()
    return {
        "nodes": torch.cat([nodes for nodes, _, _ in examples]),
        "edges": torch.cat([edges + start for (_, edges, _), start in zip(examples, starts, strict=True)], 1),
        "graph": torch.repeat_interleave(torch.arange(len(examples)), sizes),
        "label": torch.tensor([label for *_, label in examples]),
    }


def graph_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    n_graphs = len(batch["label"])
    logits = model(batch["nodes"], batch["edges"], batch["graph"], n_graphs)
    return F.cross_entropy(logits, batch["label"], reduction="none")


class Questions(nn.Module):
    """A score of each option of a question; the options of all questions are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.words(tokens)).mean(1))).squeeze(1)


def question(size: int, generator: torch.Generator) -> tuple[Tensor, int]:
    return torch.randint(0, 11, (size, 4), generator=generator), size - 1


def collate_questions(examples: Sequence[Any]) -> tuple[Tensor, list[int], Tensor]:
    sizes = [len(options) for options, _ in examples]
    return torch.cat([options for options, _ in examples]), sizes, torch.tensor([label for _, label in examples])


def question_loss(model: nn.Module, batch: tuple[Tensor, list[int], Tensor]) -> Tensor:
    scores = torch.split(model(batch[0]), batch[1])
    return torch.stack([each.exp().mean() - each[label] for each, label in zip(scores, batch[2].tolist(), strict=True)])


class Packed(nn.Module):
    """A language model over concatenated texts, `[R]` or `[1, R]`, with attention inside each text only."""

    def __init__(self, *, row: bool = False) -> None:
        super().__init__()
        self.row = row
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(16, 8)
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor, sizes: list[int]) -> Tensor:
        places = torch.cat([torch.arange(n) for n in sizes])
        hidden = self.tokens(tokens[None] if self.row else tokens) + self.places(places)
        q, k, v = self.qkv(self.norm(hidden)).chunk(3, -1)
        text = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        mask = (text.unsqueeze(1) == text) & (torch.arange(len(text)).unsqueeze(1) >= torch.arange(len(text)))
        scores = (q @ k.mT / 8**0.5).masked_fill(~mask, -1e9)
        return self.head(hidden + scores.softmax(-1) @ v).flatten(0, -2)


def text(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 11, (size + 1,), generator=generator)


def collate_texts(examples: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    sizes = [len(each) - 1 for each in examples]
    return torch.cat([each[:-1] for each in examples]), torch.cat([each[1:] for each in examples]), sizes


def packed_loss(model: nn.Module, batch: tuple[Tensor, Tensor, list[int]]) -> Tensor:
    losses = F.cross_entropy(model(batch[0], batch[2]), batch[1], reduction="none")
    return torch.stack([each.mean() for each in torch.split(losses, batch[2])])


class Masked(nn.Module):
    """A head that runs only on the positions that a mask selects."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.words(tokens)))[chosen])


def masked(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.zeros(6, dtype=torch.bool)
    chosen[torch.randperm(6, generator=generator)[:size]] = True
    return torch.randint(0, 11, (6,), generator=generator), chosen


def masked_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    tokens, chosen = batch
    losses = F.cross_entropy(model(tokens, chosen), tokens[chosen], reduction="none")
    example = chosen.nonzero()[:, 0]
    return torch.zeros(len(tokens)).to(losses).index_add(0, example, losses)


class Albums(nn.Module):
    """Convolutions and norms over the concatenated images of all albums."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.norm, self.group = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1)
        self.head = nn.Linear(6, 1)
        self.norm.running_mean.normal_()

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.group(self.norm(self.first(images))))
        return self.head(torch.tanh(self.second(hidden)).mean((2, 3))).squeeze(1)


def album(size: int, generator: torch.Generator) -> tuple[Tensor, int]:
    return torch.randn(size, 2, 5, 6, generator=generator), size - 1


class Sorted(nn.Module):
    """Examples sorted by size between two layers, as in packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor, size: Tensor) -> Tensor:
        order = torch.argsort(size, descending=True, stable=True)
        hidden = torch.tanh(self.inner(torch.tanh(self.enter(x))[order]))
        return self.head(hidden[torch.argsort(order)])


def sized(size: int, generator: torch.Generator) -> tuple[Tensor, int, int]:
    return torch.randn(3, generator=generator), size, size % 4


def sized_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0], batch[1]), batch[2], reduction="none")


default = torch.utils.data.default_collate
CASES = {
    "graphs": Ragged(GraphNet, graph_loss, graph, collate_graphs),
    "questions": Ragged(Questions, question_loss, question, collate_questions),
    "packed": Ragged(Packed, packed_loss, text, collate_texts),
    "packed, a row": Ragged(lambda: Packed(row=True), packed_loss, text, collate_texts),
    "masked": Ragged(Masked, masked_loss, masked, default),
    "albums": Ragged(Albums, question_loss, album, collate_questions),
    "sorted": Ragged(Sorted, sized_loss, sized, default),
}


def make_case(name: str, sizes: Sequence[int], seed: int = 0) -> tuple[nn.Module, Ragged, list[Any]]:
    """Return the model of a case, the case, and examples of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CASES[name].model().eval()
    return model, CASES[name], [CASES[name].example(size, generator) for size in sizes]
