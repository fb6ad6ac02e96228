"""State dicts: what a checkpoint's file holds, which part of it the model takes, and PyTorch's verdict on it."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, problem

State = Mapping[str, Any]

# Where training scripts put the weights beside an optimiser's state, epochs and the like.
_KEYS = ("model", "state_dict", "model_state_dict")
# What DDP and torch.compile put before every name of the module that they wrap.
_WRAPPERS = ("module.", "_orig_mod.")
_SHOWN = 4
_REFUSED_CLASS = re.compile(r"GLOBAL (\S+) was not an allowed global")
_SIZES = re.compile(r"size mismatch for (\S+): .*torch\.Size\((.*)\) from .* torch\.Size\((.*)\)\.")


@dataclass(frozen=True)
class _Candidate:
    """A state dict that a file may mean: the entry of the file that it is, and what is cut from its names."""

    state: State
    entry: str = ""
    cut: str = ""

    @property
    def described(self) -> str:
        """Return how it is read, in words; nothing where the file is a state_dict as it is."""
        parts = [f"from its entry {self.entry!r}"] if self.entry else []
        parts += [f"with {self.cut!r} cut from the names"] if self.cut else []
        return " ".join(parts)


def read_content(path: Path) -> Any:
    """Return what a file of torch.save or safetensors holds; nothing in it is run.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - only for such files

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            problem("a checkpoint is missing", got=f"no file {path}", expected="a file", remedy="correct the path")
        ) from error
    except Exception as error:
        refused = _REFUSED_CLASS.search(str(error))
        cause = f"an object of {refused[1]}, which weights_only=True refuses" if refused else _lines(error)[0]
        raise CheckpointError(
            problem(
                f"checkpoint {path} cannot be read",
                got=f"{type(error).__name__}: {cause}",
                expected="a state_dict of tensors, saved by torch.save or safetensors",
                remedy="save model.state_dict(), or give Task a load(model, path)",
            )
        ) from error


def fill_model(model: nn.Module, content: Any, path: str) -> str:
    """Load what a file holds into the model as `load_state_dict` does, and return how it was read, "" as it is.

    Taken is what fits: the content as it is; else the one entry of a usual name that does, or either without the
    prefixes that DDP and torch.compile put before names. The model decides: what PyTorch loads strictly fits.

    Raises:
        CheckpointError: nothing fits, or more than one entry does.
    """
    tried: list[tuple[_Candidate, list[str]]] = []
    fitting: list[_Candidate] = []
    for entry, state in _entries(content):
        for candidate in _candidates(entry, state):
            tried.append((candidate, load_strictly(model, candidate.state)))
            if not tried[-1][1]:
                fitting.append(candidate)
                break
        if fitting and not entry:
            break
    if not tried:
        raise CheckpointError(_no_state(path, content))
    if not fitting:
        candidate, complaints = min(tried, key=lambda each: len(each[1]))
        read = f", read {candidate.described}," if candidate.described else ""
        raise CheckpointError(
            problem(
                f"checkpoint {path}{read} does not match the model",
                got=join_complaints(complaints),
                expected=f"the {len(model.state_dict())} entries of the model's state_dict",
                remedy="correct Task.model or the path, or give Task a load(model, path)",
            )
        )
    if len(fitting) > 1:
        raise CheckpointError(
            problem(
                f"checkpoint {path} holds more than one state_dict that fits the model",
                got=" and ".join(repr(candidate.entry) for candidate in fitting),
                expected="one",
                remedy="give Task a load(model, path) that takes one of them",
            )
        )
    if fitting[0] is not tried[-1][0]:
        load_strictly(model, fitting[0].state)
    return fitting[0].described


def load_strictly(model: nn.Module, state: State) -> list[str]:
    """Load a state dict by `load_state_dict(strict=True)` and return what PyTorch complains of; nothing if it fits.

    A parameter on meta is assigned, others are copied into. A name that the file leaves out is no fault where the
    model ties it to one that the file has: safetensors keeps tied weights once.
    """
    own = named_tensors(model)
    options: dict[str, bool] = {"assign": True} if any(tensor.is_meta for tensor in own.values()) else {}
    try:
        model.load_state_dict(state, **options)
        return []
    # Hooks and layers of the user's raise what they like.
    except Exception as error:
        strict = error
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, **options)
    except Exception:
        return _lines(strict)
    present = {_place(own[name]) for name in state if name in own}
    missing = [name for name in missing if name not in own or _place(own[name]) not in present]
    return [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unexpected]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; tied ones under each of their names."""
    return dict(
        [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)],
    )


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's numbers lie in memory of its own as they are."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized


def join_complaints(complaints: list[str]) -> str:
    """Return the first complaints as one text, with the number of the rest."""
    more = f" and {len(complaints) - _SHOWN} more" if len(complaints) > _SHOWN else ""
    return "; ".join(complaints[:_SHOWN]) + more


def _entries(content: Any) -> Iterator[tuple[str, State]]:
    """Yield what may be a state dict, by its key: the content itself under "", and its entries of usual names."""
    if not isinstance(content, Mapping):
        return
    for entry, value in [("", content), *((key, content[key]) for key in _KEYS if key in content)]:
        if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
            yield entry, value


def _candidates(entry: str, state: State) -> Iterator[_Candidate]:
    """Yield a state dict as it is, and with one wrapper's prefix after another cut from its names."""
    cut = ""
    yield _Candidate(state, entry)
    if not all(isinstance(name, str) for name in state):
        return
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), ""):
        state = _renamed(state, prefix, "", 1)
        cut += prefix
        yield _Candidate(state, entry, cut)
    # torch.compile of single layers.
    inner = f".{_WRAPPERS[1]}"
    if any(inner in name for name in state):
        yield _Candidate(_renamed(state, inner, ".", -1), entry, cut + inner)


class _Renamed(dict[str, Any]):
    """Entries of a state dict under other names, with what the file says of its layers' versions."""

    _metadata: dict[str, Any] | None = None


def _renamed(state: State, old: str, new: str, count: int) -> _Renamed:
    renamed = _Renamed((name.replace(old, new, count), value) for name, value in state.items())
    metadata: Mapping[str, Any] | None = getattr(state, "_metadata", None)
    if metadata is not None:
        # By path of a layer, "" the whole: the wrapper's own entry comes before, and gives way to, what it wraps.
        renamed._metadata = {
            f"{path}.".replace(old, new, count).removesuffix("."): value for path, value in metadata.items()
        }
    return renamed


def _place(tensor: Tensor) -> Hashable:
    """Return what two tensors of a model have in common if they are one."""
    if is_plain(tensor) and tensor.data_ptr():
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    return id(tensor)


def _lines(error: Exception) -> list[str]:
    """Return what an error says, line by line, that of load_state_dict without its caption."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict"):
        return [_SIZES.sub(r"\1 of shape \2 instead of \3", line) for line in lines[1:]]
    return lines[:1] or [type(error).__name__]


def _no_state(path: str, content: Any) -> str:
    return problem(
        f"checkpoint {path} is no plain state_dict",
        got=f"a dict with {', '.join(map(str, list(content)[:_SHOWN]))}"
        if isinstance(content, Mapping)
        else type(content),
        expected="names mapped to tensors",
        remedy="give Task a load(model, path) that reads it",
    )
