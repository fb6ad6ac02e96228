"""Architectures of Hugging Face models: the config of a folder, the kind of its task, and the model without weights."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from tracin_ann.errors import TaskError, problem
from tracin_ann.packages import import_transformers

Kind = Literal[
    "sequence-classification", "token-classification", "causal-lm", "seq2seq", "image-classification", "masked-lm"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# The mapping of transformers that lists the classes of each kind. The order matters: Bart's class for sequence to
# sequence is also listed as one for masked tokens.
_MAPPINGS: dict[Kind, str] = {
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}
CONFIG = "config.json"
ATTENTION = "sdpa"


def load_config(folder: str | os.PathLike[str]) -> Any:
    """Return the `PretrainedConfig` of a folder; only local files are read, and no code of the folder is run.

    Raises:
        TaskError: the folder has no config.json, it is not valid, or transformers does not know its `model_type`.
        MissingPackageError: transformers is not installed.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise TaskError(
            problem(
                f"{path} has no {CONFIG}",
                got="no such file" if path.is_dir() else "no such folder",
                expected="a folder that `save_pretrained` or the Trainer wrote",
                remedy="correct the path, or copy the file from the base model",
            )
        )
    transformers = import_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    # transformers raises errors of several types for unknown types of models and for damaged files.
    except Exception as error:
        raise TaskError(
            problem(
                f"the architecture of {path} is unknown",
                got=" ".join(str(error).split())[:160],
                expected=f"a {CONFIG} with a model_type of transformers {transformers.__version__}",
                remedy="install the version of transformers of the training run; a model whose code is in the folder "
                "needs a Task of its own",
            )
        ) from error


def find_kind(config: Any) -> Kind:
    """Return the kind of task of a config's architecture.

    Raises:
        TaskError: `architectures` is missing, or names a class of another kind.
    """
    name = _architecture(config)
    for kind in _MAPPINGS:
        if name is not None and name in _list_class_names(kind):
            return kind
    raise TaskError(_no_kind_message(name or "no architectures"))


def find_class(config: Any, kind: Kind | None = None) -> Any:
    """Return the class of a config's model: that of `architectures`, or else that of its `model_type` and a kind.

    Raises:
        TaskError: transformers has no such class.
    """
    transformers = import_transformers()
    name = _architecture(config)
    if name is not None:
        found = getattr(transformers, name, None)
        if not isinstance(found, type) or not issubclass(found, nn.Module):
            raise TaskError(
                problem(
                    "the architecture of the run is unknown",
                    got=f"{name}, which transformers {transformers.__version__} does not have",
                    expected="architectures of transformers",
                    remedy="install the version of transformers of the training run, or write a Task",
                )
            )
        return found
    if kind is None:
        raise TaskError(_no_kind_message("no architectures"))
    names = _get_mapping(kind)
    if config.model_type not in names:
        raise TaskError(_no_kind_message(f"model_type {config.model_type}, which has no class for {kind}"))
    listed = names[config.model_type]
    return getattr(transformers, listed if isinstance(listed, str) else listed[0])


def make_model_from_config(
    config: Any, dtype: torch.dtype | None = None, *, kind: Kind | None = None, attention: str = ATTENTION
) -> nn.Module:
    """Return the model of a config in eval mode, with uninitialised weights that `load_weights` fills.

    Args:
        config: the `PretrainedConfig`; it is not changed.
        dtype: of the weights; None: that of the config, in which they were saved, or else float32.
        kind: selects the class if the config has no `architectures`.
        attention: the implementation of attention: "sdpa" or "eager".

    Raises:
        TaskError: transformers has no such class.
    """
    cls = find_class(config, kind)
    config = copy.deepcopy(config)
    # Keys and values of earlier positions are for generation; a cache in training costs memory.
    config.use_cache = False
    chosen = dtype or getattr(config, "dtype", None) or torch.float32
    with import_transformers("initialization").no_init_weights():
        try:
            model: nn.Module = cls._from_config(config, dtype=chosen, attn_implementation=attention)
        except ValueError:
            # Some architectures have one implementation of attention only.
            model = cls._from_config(config, dtype=chosen, attn_implementation="eager")
    # Without the initialisation of weights, transformers does not tie them either.
    tie: Any = model.tie_weights
    tie()
    return model.eval()


def _architecture(config: Any) -> str | None:
    names = getattr(config, "architectures", None)
    return names[0] if names else None


def _get_mapping(kind: Kind) -> Any:
    return getattr(import_transformers("models.auto.modeling_auto"), _MAPPINGS[kind])


def _list_class_names(kind: Kind) -> set[str]:
    names: set[str] = set()
    for listed in _get_mapping(kind).values():
        names.update([listed] if isinstance(listed, str) else listed)
    return names


def _no_kind_message(got: str) -> str:
    return problem(
        "the kind of the run's task is unknown",
        got=got,
        expected=f"a class of transformers for {', '.join(KINDS)}",
        remedy="pass kind=, or write a Task with a loss of your own",
    )
