"""Learning rates in checkpoint files of a plain loop: from the optimizer's state dict beside the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tracin_ann.errors import CheckpointError, problem
from tracin_ann.task.integrations.param_groups import (
    Rate,
    SavedOptimizer,
    collect_rates,
    compact_rates,
    find_common_rate,
    is_optimizer_state,
    map_saved_names,
    match_names_in_order,
    read_optimizer_state,
    strip_wrappers,
)
from tracin_ann.task.state_dicts import read_content, select_entry

OPTIMIZER = "optimizer"


def check_entry(path: str | os.PathLike[str], key: str) -> None:
    """Check that a file contains a state dict under a key.

    Raises:
        CheckpointError: the file is missing or unreadable, or it does not.
    """
    select_entry(read_content(Path(path), mapped=True), key, os.fspath(path))


def read_saved_rates(
    path: str | os.PathLike[str], key: str, optimizer_key: str | None, names: Sequence[str] | None
) -> Rate:
    """Return the learning rates in the optimizer's state dict of a checkpoint file.

    Args:
        path: the file.
        key: the entry with the weights.
        optimizer_key: the entry with the optimizer's state dict; None: `optimizer`, or the only one of its form.
        names: the parameters' names in the order of the optimizer's groups; None: those in the state dict.

    Raises:
        CheckpointError: the file is missing or unreadable, it has no such entries, or the rates of groups differ and
            the names of their parameters are unknown or do not match.
    """
    where = os.fspath(path)
    content = read_content(Path(path), mapped=True)
    weights = select_entry(content, key, where)
    entry = _find_optimizer(content, optimizer_key, where)
    optimizer = read_optimizer_state(content[entry], f"entry {entry!r} of {where}")
    rate = find_common_rate([optimizer])
    if rate is not None and names is None:
        return rate
    tensors = {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
    shapes = dict(zip(strip_wrappers(list(tensors)), tensors.values(), strict=True))
    return compact_rates(collect_rates([optimizer], [_name(optimizer, names, shapes, entry, where)], ()))


def _name(
    optimizer: SavedOptimizer,
    names: Sequence[str] | None,
    shapes: Mapping[str, tuple[int, ...]],
    entry: str,
    where: str,
) -> dict[int, str]:
    if names is not None:
        return match_names_in_order(optimizer, list(names), shapes, f"entry {entry!r} of {where}")
    named = map_saved_names(optimizer)
    if named is None:
        rates = sorted({group.rate for group in optimizer.groups})
        raise CheckpointError(
            problem(
                f"the parameter groups of {where} have different learning rates",
                got=f"{', '.join(f'{rate:g}' for rate in rates)} for parameters without names",
                expected="the name of each parameter",
                remedy="pass parameter_names=[...] in the order in which the optimizer got the parameters, or make the "
                "optimizer from model.named_parameters()",
            )
        )
    return named


def _find_optimizer(content: Mapping[str, Any], key: str | None, where: str) -> str:
    """Return the key of the optimizer's state dict in a file.

    Raises:
        CheckpointError: it is missing, or there are several and none is named `optimizer`.
    """
    found = [name for name, value in content.items() if is_optimizer_state(value)]
    if key in found or (key is None and OPTIMIZER in found):
        return key or OPTIMIZER
    if key is None and len(found) == 1:
        return str(found[0])
    raise CheckpointError(
        problem(
            f"checkpoint {where} has no learning rate",
            got=f"{', '.join(map(repr, found)) if found else 'no entry'} with the state dict of an optimizer",
            expected=f"one under {key or OPTIMIZER!r}",
            remedy="pass optimizer_key=... or learning_rate=...",
        )
    )
