"""FeatureSpec, everything that determines a feature row, and its field-by-field comparison with a task.

`FeatureSpec.check_matches` compares an index with the task and options of a command, and raises the error
"index ... was built with ..." (IndexMismatchError) if they do not match.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from tracin_ann.errors import IndexMismatchError


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
        learning_rate: η_c.
    """

    name: str
    digest: str
    learning_rate: float


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

    @property
    def rank_one(self) -> frozenset[str]:
        """Return the names of the parameters whose gradients are outer products."""
        return frozenset(p.name for p in self.parameters if p.rank_one)

    def digest(self) -> str:
        """Return a digest of all fields except the versions."""
        content = asdict(self)
        del content["versions"]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def row_digest(self, checkpoint: int) -> str:
        """Return a digest of everything that determines a row's features at a checkpoint, without N and other rows."""
        content = asdict(self)
        for name in ("versions", "train_rows", "train_data"):
            del content[name]
        content["checkpoints"] = asdict(self.checkpoints[checkpoint])
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def check_matches(self, other: FeatureSpec, where: str) -> None:
        """Compare this spec, of the index `where`, with the spec of a task or build.

        Raises:
            IndexMismatchError: a field differs; the message names the first difference and the number of others.
        """
        differences = list(self._differences(other))
        if differences:
            more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
            raise IndexMismatchError(f"index {where} was built with {differences[0]}{more}")

    def _differences(self, other: FeatureSpec) -> Iterator[str]:
        yield from _scalar_differences(self, other)
        built, current = ({p.name: p for p in spec.parameters} for spec in (self, other))
        for name in [*built, *(n for n in current if n not in built)]:
            pair = built.get(name), current.get(name)
            if pair[0] != pair[1]:
                a, b = (f"{list(p.shape)} {p.dtype}" if p else "" for p in pair)
                present = f"the task has {b}" if b else "the task does not have it"
                remedy = "restore Task.parameters and the model"
                yield _describe_difference(f"parameter {name} ({a})" if a else f"no parameter {name}", present, remedy)
        for i, checkpoints in enumerate(itertools.zip_longest(self.checkpoints, other.checkpoints)):
            yield from _checkpoint_differences(i, *checkpoints)


def _scalar_differences(built: FeatureSpec, other: FeatureSpec) -> Iterator[str]:
    sketches = (
        ("sketch", "name", "pass --sketch {}"),
        ("seed", "seed", "pass --seed {}"),
        ("dimension", "dim", "pass --dim {}"),
        ("sketch version", "version", "install the tracin_ann that built it"),
    )
    for word, attribute, remedy in sketches:
        a, b = getattr(built.sketch, attribute), getattr(other.sketch, attribute)
        if a != b:
            yield _describe_difference(f"{word} {a}", f"this command asks for {word} {b}", remedy.format(a))
    rest = (
        ("dtype", "feature type {}", "pass --dtype {}"),
        ("norms", "norms {}", "pass --norms {}"),
        ("precision", "precision {}", "pass --precision {}"),
        ("model", "a model with layers of digest {}", "restore the model's code"),
        ("train_rows", "{} training rows", "restore train_data"),
        ("train_data", "training data of digest {}", "restore train_data"),
    )
    for attribute, what, remedy in rest:
        a, b = getattr(built, attribute), getattr(other, attribute)
        if a != b:
            grown = attribute == "train_rows" and b > a
            yield _describe_difference(
                what.format(a), f"this task has {b}", "build with --append," if grown else remedy.format(a)
            )


def _checkpoint_differences(i: int, built: CheckpointSpec | None, other: CheckpointSpec | None) -> Iterator[str]:
    if built is None or other is None:
        a, b = (c.name if c else "nothing" for c in (built, other))
        remedy = "restore Task.checkpoints" if other is None else "build with --add-checkpoint,"
        yield _describe_difference(f"{a} as checkpoint {i}", f"the task has {b}", remedy)
        return
    if built.digest != other.digest:
        yield _describe_difference(
            f"checkpoint {i} ({built.name}) of digest {built.digest[:12]}",
            f"the task's {other.name} has {other.digest[:12]}",
            "restore that file",
        )
    if built.learning_rate != other.learning_rate:
        yield _describe_difference(
            f"learning rate {built.learning_rate:g} at checkpoint {i}",
            f"the task has {other.learning_rate:g}",
            "restore Task.checkpoints",
        )


def _describe_difference(built: str, other: str, remedy: str) -> str:
    return f"{built}, {other}; {remedy} or build a new index"
