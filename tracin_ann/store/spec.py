"""FeatureSpec: everything that determines a feature row; the manifest records it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter whose gradients are used.

    Attributes:
        name: in the model.
        shape: sizes.
        dtype: as `str(torch.dtype)`.
        rank_one: an example's gradient is an outer product: its layer is applied once, at one position.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rank_one: bool = False


@dataclass(frozen=True)
class CheckpointSpec:
    """A checkpoint.

    Attributes:
        name: name of its file, for messages.
        digest: digest of its bytes.
        learning_rate: η_c, the largest learning rate of the parameters whose gradients are used.
        rates: learning rates by parameter name; None: all are η_c.
        second_moments: digest of the second moments that the preconditioner uses; None without one.
    """

    name: str
    digest: str
    learning_rate: float
    rates: Mapping[str, float] | None = None
    second_moments: str | None = None

    def rate_of(self, parameter: str) -> float:
        """Return the learning rate of a parameter."""
        return self.learning_rate if self.rates is None else self.rates.get(parameter, self.learning_rate)

    def content(self) -> dict[str, Any]:
        """Return the fields as JSON values, without those that earlier versions did not have and that are not set."""
        content = asdict(self)
        return {name: value for name, value in content.items() if value is not None}


@dataclass(frozen=True)
class SketchSpec:
    """The sketch; equal specs give equal random numbers on every device.

    Attributes:
        name: kind of sketch.
        version: version of its implementation.
        dim: D.
        seed: of its random numbers.
    """

    name: str
    version: int
    dim: int
    seed: int


@dataclass(frozen=True)
class FeatureSpec:
    """Everything that determines a feature row.

    Attributes:
        model: digest of the model's layers.
        train_rows: N.
        train_data: digest of the training data.
        parameters: the parameters whose gradients are used.
        checkpoints: the checkpoints, in order.
        sketch: the sketch.
        dtype: dtype of the stored features.
        norms: how self-influence is computed: from the sketch, or exact.
        precision: precision of the gradients.
        versions: versions of libraries, recorded but not compared: canary rows reveal versions that change features.
        preconditioner: the weights of the entries of gradients, from Adam's second moments; `none`: no weights.
    """

    model: str
    train_rows: int
    train_data: str
    parameters: tuple[ParameterSpec, ...]
    checkpoints: tuple[CheckpointSpec, ...]
    sketch: SketchSpec
    dtype: str
    norms: str
    precision: str = "fp32"
    versions: Mapping[str, str] = field(default_factory=dict)
    preconditioner: str = "none"

    @property
    def rank_one(self) -> frozenset[str]:
        """Return the names of the parameters whose gradients are outer products."""
        return frozenset(p.name for p in self.parameters if p.rank_one)

    def content(self) -> dict[str, Any]:
        """Return the fields as JSON values, without those that earlier versions did not have and that are not set."""
        content = {**asdict(self), "checkpoints": [checkpoint.content() for checkpoint in self.checkpoints]}
        if self.preconditioner == "none":
            del content["preconditioner"]
        return content

    def digest(self) -> str:
        """Return a digest of all fields except the versions."""
        content = self.content()
        del content["versions"]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def row_digest(self, checkpoint: int) -> str:
        """Return a digest of everything that determines a row's features at a checkpoint, without N and other rows."""
        content = self.content()
        for name in ("versions", "train_rows", "train_data"):
            del content[name]
        content["checkpoints"] = self.checkpoints[checkpoint].content()
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
