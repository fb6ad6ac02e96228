"""Further questions to an index: where a score comes from, which rows are hubs, duplicates, mislabelled, best."""

from tracin_ann.questions.duplicates import Duplicate, Duplicates, duplicates
from tracin_ann.questions.explain import Explanation, Part, explain
from tracin_ann.questions.hubs import Hub, Hubs, hubs
from tracin_ann.questions.mislabelled import Suspect, Suspects, Suspicion, mislabelled
from tracin_ann.questions.subset import Chosen, Subset, select

__all__ = [
    "Chosen",
    "Duplicate",
    "Duplicates",
    "Explanation",
    "Hub",
    "Hubs",
    "Part",
    "Subset",
    "Suspect",
    "Suspects",
    "Suspicion",
    "duplicates",
    "explain",
    "hubs",
    "mislabelled",
    "select",
]
