"""tracin_ann: find the training examples behind a model's predictions, by TracIn scores and FAISS search.

Names are imported at their first use: `import tracin_ann` alone imports neither torch nor FAISS.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracin_ann.build import BuildReport, ShardReport, build, build_shard, finish_build
    from tracin_ann.config import BuildConfig
    from tracin_ann.distributed import ProcessLauncher, RayLauncher, Shard, ShardOptions
    from tracin_ann.errors import TracinAnnError
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.operations import BuildPlan, plan
    from tracin_ann.progress import progress_bar
    from tracin_ann.report import write_report
    from tracin_ann.results import Answer, Hit, SelfInfluence
    from tracin_ann.scoring import QueryOptions
    from tracin_ann.task import (
        Checkpoint,
        Description,
        ImageFolder,
        LossFall,
        RunRecorder,
        TarShards,
        Task,
        TracInCallback,
        materialise,
        read_records,
    )

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "BuildConfig",
    "BuildPlan",
    "BuildReport",
    "Checkpoint",
    "Description",
    "Hit",
    "ImageFolder",
    "InfluenceIndex",
    "LossFall",
    "ProcessLauncher",
    "QueryOptions",
    "RayLauncher",
    "RunRecorder",
    "SelfInfluence",
    "Shard",
    "ShardOptions",
    "ShardReport",
    "TarShards",
    "Task",
    "TracInCallback",
    "TracinAnnError",
    "build",
    "build_shard",
    "finish_build",
    "materialise",
    "plan",
    "progress_bar",
    "read_records",
    "write_report",
]

# The package of each name; type checkers read the imports above.
_HOMES = {
    "build": ("BuildReport", "ShardReport", "build", "build_shard", "finish_build"),
    "config": ("BuildConfig",),
    "distributed": ("ProcessLauncher", "RayLauncher", "Shard", "ShardOptions"),
    "errors": ("TracinAnnError",),
    "index": ("InfluenceIndex",),
    "operations": ("BuildPlan", "plan"),
    "progress": ("progress_bar",),
    "report": ("write_report",),
    "results": ("Answer", "Hit", "SelfInfluence"),
    "scoring": ("QueryOptions",),
    "task": (
        "Checkpoint",
        "Description",
        "ImageFolder",
        "LossFall",
        "RunRecorder",
        "TarShards",
        "Task",
        "TracInCallback",
        "materialise",
        "read_records",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


class _Facade(ModuleType):
    """The package: `build` remains the function when the module `tracin_ann.build` is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME_OF or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Facade


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
