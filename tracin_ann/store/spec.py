"""FeatureSpec: all that determines a feature row, and the field-by-field refusal of what does not fit."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tracin_ann.errors import IndexMismatchError


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter that takes part; `rank_one`: its layer is called once an example, at one position."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rank_one: bool = False


@dataclass(frozen=True)
class CheckpointSpec:
    """A checkpoint: its file's name for people, the digest of its bytes, and η_c."""

    name: str
    digest: str
    learning_rate: float


@dataclass(frozen=True)
class SketchSpec:
    """The sketch: equal specs give equal random numbers on every device."""

    name: str
    version: int
    dim: int
    seed: int


@dataclass(frozen=True)
class FeatureSpec:
    """All that determines a feature row. `versions` is recorded and not compared: canaries judge what they do."""

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
        """Return the parameters whose gradients are outer products."""
        return frozenset(p.name for p in self.parameters if p.rank_one)

    def digest(self) -> str:
        """Return a digest of all fields but the versions."""
        content = asdict(self)
        del content["versions"]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def row_digest(self, checkpoint: int) -> str:
        """Return a digest of all that determines a row's features at a checkpoint; how many rows there are does not."""
        content = asdict(self)
        for name in ("versions", "train_rows", "train_data"):
            del content[name]
        content["checkpoints"] = asdict(self.checkpoints[checkpoint])
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    def refuse_unlike(self, asked: FeatureSpec, where: str) -> None:
        """Refuse a spec that differs from this one, the index's.

        Raises:
            IndexMismatchError: a field differs; the message names the first, and how many more do.
        """
        complaints = list(self._differences(asked))
        if complaints:
            more = f" (and {len(complaints) - 1} more differences)" if len(complaints) > 1 else ""
            raise IndexMismatchError(f"index {where} was built with {complaints[0]}{more}")

    def _differences(self, asked: FeatureSpec) -> Iterator[str]:
        yield from _scalar_differences(self, asked)
        mine, other = ({p.name: p for p in s.parameters} for s in (self, asked))
        for name in [*mine, *(n for n in other if n not in mine)]:
            if mine.get(name) != other.get(name):
                a, b = (f"{list(p.shape)} {p.dtype}" if p else "absent" for p in (mine.get(name), other.get(name)))
                remedy = "restore Task.parameters and the model"
                yield _describe_difference(f"parameter {name} ({a})", f"the task has it {b}", remedy)
        for i, (built, wanted) in enumerate(itertools.zip_longest(self.checkpoints, asked.checkpoints)):
            yield from _checkpoint_differences(i, built, wanted)


def _scalar_differences(built: FeatureSpec, asked: FeatureSpec) -> Iterator[str]:
    sketches = (
        ("sketch", "name", "pass --sketch {}"),
        ("seed", "seed", "pass --seed {}"),
        ("dimension", "dim", "pass --dim {}"),
        ("sketch version", "version", "install the tracin_ann that built it"),
    )
    for word, attribute, remedy in sketches:
        a, b = getattr(built.sketch, attribute), getattr(asked.sketch, attribute)
        if a != b:
            yield _describe_difference(f"{word} {a}", f"this command asks for {word} {b}", remedy.format(a))
    rest = (
        ("dtype", "feature type", "pass --dtype {}"),
        ("norms", "norms", "pass --norms {}"),
        ("precision", "precision", "pass --precision {}"),
        ("model", "a task whose model has layers of digest", "restore the model's code"),
        ("train_rows", "a task with train rows numbering", "restore train_data"),
        ("train_data", "a task whose train data has digest", "restore train_data"),
    )
    for attribute, word, remedy in rest:
        a, b = getattr(built, attribute), getattr(asked, attribute)
        if a != b:
            grown = attribute == "train_rows" and b > a
            yield _describe_difference(
                f"{word} {a}", f"this task has {b}", "build with --append," if grown else remedy.format(a)
            )


def _checkpoint_differences(i: int, built: CheckpointSpec | None, asked: CheckpointSpec | None) -> Iterator[str]:
    if built is None or asked is None:
        a, b = (c.name if c else "nothing" for c in (built, asked))
        remedy = "restore Task.checkpoints" if asked is None else "build with --add-checkpoint,"
        yield _describe_difference(f"{a} as checkpoint {i}", f"the task has {b}", remedy)
        return
    if built.digest != asked.digest:
        yield _describe_difference(
            f"checkpoint {i} ({built.name}) of digest {built.digest[:12]}",
            f"the task's {asked.name} has {asked.digest[:12]}",
            "restore that file",
        )
    if built.learning_rate != asked.learning_rate:
        yield _describe_difference(
            f"learning rate {built.learning_rate:g} at checkpoint {i}",
            f"the task has {asked.learning_rate:g}",
            "restore Task.checkpoints",
        )


def _describe_difference(built: str, asked: str, remedy: str) -> str:
    return f"{built}, {asked}; {remedy} or build a new index"
