"""tracin_ann: which training examples made a prediction what it is, by TracIn, searchable with FAISS."""

from tracin_ann.answers import Answer, Hit, QueryOptions, SelfInfluence
from tracin_ann.build import BuildReport, build
from tracin_ann.config import BuildConfig
from tracin_ann.device import import_faiss
from tracin_ann.dry_run import BuildPlan, plan
from tracin_ann.errors import TracinAnnError
from tracin_ann.index import InfluenceIndex
from tracin_ann.task import Checkpoint, Description, Task

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "BuildConfig",
    "BuildPlan",
    "BuildReport",
    "Checkpoint",
    "Description",
    "Hit",
    "InfluenceIndex",
    "QueryOptions",
    "SelfInfluence",
    "Task",
    "TracinAnnError",
    "build",
    "plan",
]

import_faiss()
