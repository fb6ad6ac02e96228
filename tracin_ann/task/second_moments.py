"""Second moments of Adam at a checkpoint: reading them by parameter name, from optimizer states or files of moments.

Adam updates an entry by −η m̂ / (√v̂ + ε), with the moving mean v of the squared gradients, the decay rate β₂, the
number of steps t and v̂ = v / (1 − β₂ᵗ) (Kingma and Ba 2015, algorithm 1).

Shapes: P entries of a parameter.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, problem
from tracin_ann.files import require_regular
from tracin_ann.task.checkpoint import Checkpoint
from tracin_ann.task.integrations.param_groups import is_optimizer_state, strip_wrappers

_DEFAULT_EPS = 1e-8
# Names under which training scripts save the state of the optimizer beside the weights.
_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optimizer_states", "optim")
# Names of parameters without weight decay in the two groups of Transformers' Trainer: of version 4.50 on, and before.
_WITHOUT_DECAY = (r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", "bias")
_N_TRAINER_GROUPS = 2
_BY_NAME = (
    "save the moments by parameter name (TracInCallback(save_moments=True)), or pass second_moments a function that "
    "returns them by name"
)


@dataclass(frozen=True)
class SecondMoment:
    """The second moment of one parameter.

    Attributes:
        value: v, of the parameter's shape.
        correction: 1 − β₂ᵗ.
        eps: ε.
    """

    value: Tensor
    correction: float
    eps: float

    def denominator(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return √v̂ + ε, [P]."""
        value_P = self.value.detach().flatten().to(device, dtype)
        return (value_P / max(self.correction, 1e-300)).sqrt_().add_(self.eps)


def read_second_moments(
    checkpoint: Checkpoint, model: nn.Module, names: Sequence[str], trainable: Sequence[str]
) -> dict[str, SecondMoment]:
    """Return Adam's second moments of parameters at a checkpoint, by name.

    They are read from `Checkpoint.second_moments`: the state dict of an optimizer, alone or in an entry with a usual
    name, or moments by parameter name. A state dict numbers its parameters. Their names are those that it contains
    (`param_names`, or names instead of the numbers), or else those of the model in the order of one group, or of the
    two groups (with and without weight decay) that the Trainer of Transformers makes; every shape has to match.

    Args:
        checkpoint: the checkpoint.
        model: the model.
        names: the parameters whose moments are returned.
        trainable: the parameters that training updated, as far as it is known.

    Raises:
        CheckpointError: there are no moments, or they do not match the model.
    """
    source = checkpoint.second_moments
    if source is None:
        raise CheckpointError(
            problem(
                f"checkpoint {os.fspath(checkpoint.path)} has no second moments",
                got="a preconditioner and second_moments=None",
                expected="the state of Adam at this checkpoint",
                remedy='pass Checkpoint(path, rate, second_moments="optimizer.pt"), or build without --preconditioner',
            )
        )
    if callable(source):
        where = f"the second moments of checkpoint {os.fspath(checkpoint.path)}"
        content, metadata = source(), None
    else:
        where = f"the file of second moments {os.fspath(source)}"
        content, metadata = _read_file(Path(source))
    known = _name_moments(_find_entry(content, where), metadata, _Model(model, trainable), where)
    aliases = _list_aliases(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    moments: dict[str, SecondMoment] = {}
    for name in names:
        found = next((known[alias] for alias in aliases[name] if alias in known), None)
        if found is None or found.value.shape != shapes[name]:
            raise CheckpointError(
                problem(
                    f"{where} has no second moment of parameter {name}",
                    got="no entry" if found is None else f"shape {list(found.value.shape)}",
                    expected=f"shape {list(shapes[name])}",
                    remedy="exclude it with Task.parameters, or give it learning rate 0",
                )
            )
        if not _is_usable(found):
            raise CheckpointError(
                problem(
                    f"the second moment of parameter {name} cannot be used",
                    got=f"entries from {float(found.value.min()):g} to {float(found.value.max()):g}, ε = {found.eps:g}",
                    expected="finite entries of 0 or more after at least one step, and ε above 0",
                    remedy=f"correct {where}, or exclude the parameter with Task.parameters",
                )
            )
        moments[name] = found
    return moments


def _is_usable(moment: SecondMoment) -> bool:
    """Return whether √v̂ + ε is finite and positive in every entry."""
    denominator_P = moment.denominator(torch.float32, moment.value.device)
    return moment.correction > 0 and bool((torch.isfinite(denominator_P) & (denominator_P > 0)).all())


def digest_second_moments(moments: Mapping[str, SecondMoment]) -> str:
    """Return a digest of the names, values, corrections and ε of second moments."""
    digest = xxhash.xxh3_128()
    for name, moment in moments.items():
        digest.update(f"{name} {list(moment.value.shape)} {moment.correction!r} {moment.eps!r}".encode())
        digest.update(moment.value.detach().cpu().float().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Model:
    """The model whose parameters are numbered, and the names of those that training updated."""

    module: nn.Module
    trainable: Sequence[str]


def _read_file(path: Path) -> tuple[Any, Mapping[str, str] | None]:
    """Return the content of a file, and the metadata of a safetensors file; no code in the file is run."""
    try:
        require_regular(path)
        if path.suffix == ".safetensors":
            from safetensors import safe_open  # noqa: PLC0415 - only for such files

            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        # The file also holds the first moments, which are not read from disk.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)), None
    except Exception as error:
        missing = isinstance(error, FileNotFoundError)
        raise CheckpointError(
            problem(
                f"second moments {path} cannot be read",
                got="no file" if missing else f"{type(error).__name__}: {str(error).splitlines()[0]}",
                expected="the state of an optimizer, saved by torch.save, or moments by name, saved by safetensors",
                remedy="correct Checkpoint.second_moments",
            )
        ) from error


def _find_entry(content: Any, where: str) -> Mapping[str, Any]:
    """Return the optimizer's state dict in a content, or the content if it consists of tensors by name.

    Raises:
        CheckpointError: it contains neither, or the states of several optimizers.
    """
    if isinstance(content, Mapping) and not is_optimizer_state(content):
        content = next((content[key] for key in _KEYS if key in content and not _is_tensor(content[key])), content)
    if isinstance(content, Sequence) and len(content) == 1:
        content = content[0]
    if isinstance(content, Mapping) and content:
        if is_optimizer_state(content) or all(map(_is_tensor, content.values())):
            return content
        got = f"a mapping with {', '.join(map(str, list(content)[:4]))}"
    else:
        got = (
            f"{type(content).__name__} of {len(content)} entries"
            if isinstance(content, Mapping | Sequence)
            else repr(content)[:80]
        )
    raise CheckpointError(
        problem(
            f"{where} has no second moments",
            got=got,
            expected="the state dict of one Adam optimizer, or a tensor for each parameter name",
            remedy="correct Checkpoint.second_moments",
        )
    )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _name_moments(
    content: Mapping[str, Any], metadata: Mapping[str, str] | None, model: _Model, where: str
) -> dict[str, SecondMoment]:
    """Return second moments by name."""
    if is_optimizer_state(content):
        return _name_state(content, model, where)
    if metadata is None or "groups" not in metadata:
        # Moments by name without a description are v̂.
        return {name: SecondMoment(value, 1.0, _DEFAULT_EPS) for name, value in content.items()}
    try:
        return {
            name: SecondMoment(content[name], _compute_correction(group["beta2"], group["step"]), float(group["eps"]))
            for group in json.loads(metadata["groups"])
            for name in group["names"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            problem(
                f"{where} has unusable metadata",
                got=f"{type(error).__name__}: {error}",
                expected="groups with beta2, eps, step and the names of their parameters",
                remedy="write the file again",
            )
        ) from error


def _name_state(content: Mapping[str, Any], model: _Model, where: str) -> dict[str, SecondMoment]:
    """Return the second moments in an optimizer's state dict by name."""
    groups, state = content["param_groups"], content["state"]
    numbered = _name_numbers(groups, state, model, where)
    moments: dict[str, SecondMoment] = {}
    for group in groups:
        for number in group["params"]:
            # A parameter that has never had a gradient has no state.
            kept = state.get(number)
            if kept is None:
                continue
            # AMSGrad divides by the largest moment so far.
            value = kept.get("max_exp_avg_sq", kept.get("exp_avg_sq"))
            if not isinstance(value, Tensor) or "betas" not in group or "step" not in kept:
                raise CheckpointError(
                    problem(
                        f"{where} has no second moments",
                        got=f"{', '.join(map(str, kept)) or 'nothing'} for parameter {number}",
                        expected="exp_avg_sq and step, as Adam and AdamW have",
                        remedy="build without --preconditioner",
                    )
                )
            eps = float(group.get("eps", _DEFAULT_EPS))
            moments[numbered[number]] = SecondMoment(value, _compute_correction(group["betas"][1], kept["step"]), eps)
    return moments


def _compute_correction(beta2: Any, step: Any) -> float:
    """Return 1 − β₂ᵗ."""
    return 1.0 - math.pow(float(beta2), float(step))


def _name_numbers(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any], model: _Model, where: str
) -> dict[int, str]:
    """Return the name of each numbered parameter of an optimizer's state dict.

    Raises:
        CheckpointError: the order of the parameters is not known.
    """
    groups = [group for group in groups if group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    if all("param_names" in group for group in groups):
        given = strip_wrappers([name for group in groups for name in group["param_names"]])
        return dict(zip(numbers, given, strict=True))
    if all(isinstance(number, str) for number in numbers):
        # A state dict of torch.distributed.checkpoint has names instead of numbers.
        return dict(zip(numbers, strip_wrappers(numbers), strict=True))
    shapes = {name: parameter.shape for name, parameter in model.module.named_parameters()}
    kept = {number: own["exp_avg_sq"].shape for number, own in state.items() if _is_tensor(own.get("exp_avg_sq"))}
    sizes = [len(group["params"]) for group in groups]
    for order in _list_orders(model):
        names = [name for part in order for name in part]
        if sizes == [len(part) for part in order if part]:
            named = dict(zip(numbers, names, strict=True))
            if all(shapes[named[number]] == shape for number, shape in kept.items()):
                return named
    raise CheckpointError(
        problem(
            f"the order of the parameters in {where} is not known",
            got=f"{len(numbers)} parameters without names in {len(groups)} groups",
            expected=f"the model's {len(model.trainable)} trainable parameters in one group, or in the Trainer's two",
            remedy=_BY_NAME,
        )
    )


def _list_orders(model: _Model) -> Iterator[list[list[str]]]:
    """Yield the parameter names of each group, for the usual ways to make an optimizer."""
    every = [name for name, _ in model.module.named_parameters()]
    trainable = [name for name in every if name in set(model.trainable)]
    for chosen in (trainable, every):
        yield [chosen]
        for pattern in _WITHOUT_DECAY:
            without = {name for name in chosen if _is_without_decay(model.module, name, pattern)}
            yield [[n for n in chosen if n not in without], [n for n in chosen if n in without]]


def _is_without_decay(model: nn.Module, name: str, pattern: str) -> bool:
    """Return whether the Trainer of Transformers applies no weight decay to a parameter."""
    if re.search(pattern, name.lower() if pattern != "bias" else name):
        return True
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:n])), nn.LayerNorm) for n in range(1, len(parts)))


def _list_aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of each parameter by its first name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}
