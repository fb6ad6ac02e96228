"""State dicts in checkpoint files: reading a file, finding the state_dict in it, and strict loading by PyTorch."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracin_ann.errors import CheckpointError, problem

State = Mapping[str, Any]

# Names under which training scripts save the weights beside an optimiser's state, epochs and the like.
_KEYS = ("model", "state_dict", "model_state_dict")
# Prefixes that DDP and torch.compile add to every name of the module that they wrap.
_WRAPPERS = ("module.", "_orig_mod.")
_MAX_SHOWN = 4
_REJECTED_CLASS = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module \S+ is blocked)")
_SIZES = re.compile(r"size mismatch for (\S+): .*torch\.Size\((.*)\) from .* torch\.Size\((.*)\)\.")


@dataclass(frozen=True)
class _Candidate:
    """A possible state dict of a file.

    Attributes:
        state: values by name.
        entry: the entry of the file that contains it; "": the complete file.
        removed: what was removed from its names.
    """

    state: State
    entry: str = ""
    removed: str = ""

    @property
    def description(self) -> str:
        """Return in words how it is read, or "" if the file is a plain state_dict."""
        parts = [f"from its entry {self.entry!r}"] if self.entry else []
        parts += [f"with {self.removed!r} removed from the names"] if self.removed else []
        return " ".join(parts)


def read_content(path: Path, *, mapped: bool = False) -> Any:
    """Return the content of a file of torch.save or safetensors; no code in the file is run.

    Args:
        path: the file.
        mapped: map the tensors of a file of torch.save into memory, so that only those that are used are read.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - only for such files

            return load_file(path)
        # Files of PyTorch before 1.6 are no archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise CheckpointError(
            problem("a checkpoint is missing", got=f"no file {path}", expected="a file", remedy="correct the path")
        ) from error
    except Exception as error:
        rejected = _REJECTED_CLASS.search(str(error))
        cause = f"an object of {rejected[1]}, which weights_only=True rejects" if rejected else error_lines(error)[0]
        raise CheckpointError(
            problem(
                f"checkpoint {path} cannot be read",
                got=f"{type(error).__name__}: {cause}",
                expected="a state_dict of tensors, saved by torch.save or safetensors",
                remedy="save model.state_dict(), or give Task a load(model, path)",
            )
        ) from error


def fill_model(model: nn.Module, content: Any, path: str, key: str | None = None) -> str:
    """Load the content of a file into the model and return in words how it was read, "" for a plain state_dict.

    The content itself is tried first, then its entries with a usual name, each unchanged and without the prefixes that
    DDP and torch.compile add to names. What PyTorch loads strictly is used. With a key, only that entry is tried.

    Raises:
        CheckpointError: none can be loaded, more than one entry can, or there is no entry of that key.
    """
    tried: list[tuple[_Candidate, list[str]]] = []
    fitting: list[_Candidate] = []
    for entry, state in _entries(content) if key is None else [(key, select_entry(content, key, path))]:
        for candidate in _candidates(entry, state):
            tried.append((candidate, load_strictly(model, candidate.state)))
            if not tried[-1][1]:
                fitting.append(candidate)
                break
        if fitting and not entry:
            break
    if not tried:
        raise CheckpointError(_not_a_state_dict_message(path, content))
    if not fitting:
        candidate, complaints = min(tried, key=lambda each: len(each[1]))
        read = f", read {candidate.description}," if candidate.description else ""
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
                f"checkpoint {path} contains more than one state_dict that fits the model",
                got=" and ".join(repr(candidate.entry) for candidate in fitting),
                expected="one",
                remedy="give Task a load(model, path) that loads one of them",
            )
        )
    if fitting[0] is not tried[-1][0]:
        load_strictly(model, fitting[0].state)
    return fitting[0].description


def load_strictly(model: nn.Module, state: State) -> list[str]:
    """Load a state dict by `load_state_dict(strict=True)` and return PyTorch's complaints; empty if it fits.

    If a parameter is on the meta device, tensors are assigned instead of copied. A name may be missing if the model
    ties it to one that is present, because safetensors saves tied weights once.
    """
    own = named_tensors(model)
    options: dict[str, bool] = {"assign": True} if any(tensor.is_meta for tensor in own.values()) else {}
    try:
        model.load_state_dict(state, **options)
        return []
    # Hooks and layers of the user may raise any exception.
    except Exception as error:
        strict = error
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, **options)
    except Exception:
        return error_lines(strict)
    present = {_storage_key(own[name]) for name in state if name in own}
    missing = [name for name in missing if name not in own or _storage_key(own[name]) not in present]
    return [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unexpected]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; tied ones under each of their names."""
    return dict(
        [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)],
    )


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is a dense `Tensor` or `Parameter`, neither quantized nor of a subclass."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized


def join_complaints(complaints: list[str]) -> str:
    """Return the first complaints in one line, with the number of the others."""
    more = f" and {len(complaints) - _MAX_SHOWN} more" if len(complaints) > _MAX_SHOWN else ""
    return "; ".join(complaints[:_MAX_SHOWN]) + more


def select_entry(content: Any, key: str, path: str) -> State:
    """Return the state dict under a key of a file's content.

    Raises:
        CheckpointError: there is none.
    """
    value = content.get(key) if isinstance(content, Mapping) else None
    if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
        return value
    raise CheckpointError(
        problem(
            f"checkpoint {path} has no state_dict under {key!r}",
            got=f"a dict with {', '.join(map(str, list(content)[:_MAX_SHOWN]))}"
            if isinstance(content, Mapping)
            else type(content),
            expected=f"a dict of tensors by name under {key!r}",
            remedy="pass the key under which the training loop saved model.state_dict()",
        )
    )


def _entries(content: Any) -> Iterator[tuple[str, State]]:
    """Yield possible state dicts by name: the content itself as "", and its entries with a usual name."""
    if not isinstance(content, Mapping):
        return
    for entry, value in [("", content), *((key, content[key]) for key in _KEYS if key in content)]:
        if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
            yield entry, value


def _candidates(entry: str, state: State) -> Iterator[_Candidate]:
    """Yield a state dict unchanged, and with the prefixes of wrappers removed from its names, one after another."""
    removed = ""
    yield _Candidate(state, entry)
    if not all(isinstance(name, str) for name in state):
        return
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), ""):
        state = _replace_in_names(state, prefix, "", 1)
        removed += prefix
        yield _Candidate(state, entry, removed)
    # Layers that were compiled one by one.
    inner = f".{_WRAPPERS[1]}"
    if any(inner in name for name in state):
        yield _Candidate(_replace_in_names(state, inner, ".", -1), entry, removed + inner)


class _RenamedState(dict[str, Any]):
    """Entries of a state dict under other names, with the versions of its layers (`_metadata`)."""

    _metadata: dict[str, Any] | None = None


def _replace_in_names(state: State, old: str, new: str, count: int) -> _RenamedState:
    renamed = _RenamedState((name.replace(old, new, count), value) for name, value in state.items())
    metadata: Mapping[str, Any] | None = getattr(state, "_metadata", None)
    if metadata is not None:
        # Keys are paths of layers, "" for the model. The wrapper's entry comes first and is replaced by that of the
        # module that it wraps.
        renamed._metadata = {
            f"{path}.".replace(old, new, count).removesuffix("."): value for path, value in metadata.items()
        }
    return renamed


def _storage_key(tensor: Tensor) -> Hashable:
    """Return a key that is equal for tied tensors of a model."""
    if is_plain(tensor) and tensor.data_ptr():
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    return id(tensor)


def error_lines(error: Exception) -> list[str]:
    """Return the lines of an error's message; for load_state_dict, without the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Error(s) in loading state_dict"):
        return [_SIZES.sub(r"\1 of shape \2 instead of \3", line) for line in lines[1:]]
    return lines[:1] or [type(error).__name__]


def _not_a_state_dict_message(path: str, content: Any) -> str:
    return problem(
        f"checkpoint {path} is not a state_dict",
        got=f"a dict with {', '.join(map(str, list(content)[:_MAX_SHOWN]))}"
        if isinstance(content, Mapping)
        else type(content),
        expected="a dict of tensors by name",
        remedy="give Task a load(model, path) that reads it",
    )
