"""Fingerprint of a task: digests of its model, data and checkpoints, for the FeatureSpec of an index."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tracin_ann.features.rates import ParameterRates
from tracin_ann.store import CheckpointSpec, ParameterSpec
from tracin_ann.task import Task, checkpoint_digest, encode_content

# How many examples the digest of the data covers.
_DIGEST_ROWS = 16
logger = logging.getLogger(__name__)


def model_digest(model: nn.Module) -> str:
    """Return a digest of the paths and classes of a model's modules; weights are not included."""
    layers = [f"{path}:{type(module).__qualname__}" for path, module in model.named_modules()]
    return hashlib.blake2b("\n".join(layers).encode(), digest_size=8).hexdigest()


def data_digest(
    data: Any, n_rows: int, collate: Callable[[list[Any]], Any] | None = None, name: str = "train_data"
) -> str:
    """Return a digest of at most 16 examples spread over the first n_rows of a data set.

    Objects that `encode_content` cannot read, even with the help of `collate`, are excluded. The digest then ends with
    the names of their types, and a warning with the name of the data set is logged.
    """
    digest = hashlib.blake2b(digest_size=8)
    unknown: set[str] = set()
    for i in sorted({round(j * (n_rows - 1) / (_DIGEST_ROWS - 1)) for j in range(_DIGEST_ROWS)}):
        content = encode_content(data[i], collate)
        unknown.update(content.unknown)
        for piece in content.pieces:
            digest.update(piece)
    if not unknown:
        return digest.hexdigest()
    names = ", ".join(sorted(unknown))
    logger.warning("rows of %s hold %s, whose content cannot be read: the digest of the data excludes it", name, names)
    return f"{digest.hexdigest()} without {names}"


def parameter_specs(parameters: Mapping[str, nn.Parameter], rank_one: frozenset[str]) -> tuple[ParameterSpec, ...]:
    """Return the specs of the selected parameters, in the model's order."""
    return tuple(ParameterSpec(name, tuple(p.shape), str(p.dtype), name in rank_one) for name, p in parameters.items())


def checkpoint_specs(
    task: Task, rates: Sequence[ParameterRates], digest_moments: Callable[[int], str | None]
) -> tuple[CheckpointSpec, ...]:
    """Return the specs of a task's checkpoints; reads the complete files.

    Args:
        task: the task.
        rates: the learning rates of the selected parameters.
        digest_moments: position of a checkpoint -> digest of its second moments; None if they are not used.
    """
    return tuple(
        CheckpointSpec(
            os.path.basename(os.fspath(checkpoint.path)),
            checkpoint_digest(checkpoint),
            own.rate,
            dict(own.by_parameter) if own.differ else None,
            digest_moments(i),
        )
        for i, (checkpoint, own) in enumerate(zip(task.checkpoints, rates, strict=True))
    )


def library_versions() -> dict[str, str]:
    """Return the versions of Python, PyTorch and NumPy, which affect features by rounding."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
