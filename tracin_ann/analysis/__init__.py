"""Analyses of an index: parts of a score, hubs, duplicate rows, mislabelled rows, and subsets of the training rows."""

from __future__ import annotations

from tracin_ann.analysis.duplicates import Duplicates, find_duplicates
from tracin_ann.analysis.explanation import Explanation, explain
from tracin_ann.analysis.hubs import Hubs, find_hubs
from tracin_ann.analysis.mislabelled import ASKED, RANKINGS, By, Suspect, Suspects, Suspicion, find_mislabelled
from tracin_ann.analysis.pairs import Pair
from tracin_ann.analysis.subset import SelectedRow, Subset, select
from tracin_ann.analysis.token_explanation import ExampleName, TokenExplanation, TokenPart

__all__ = [
    "ASKED",
    "By",
    "Duplicates",
    "ExampleName",
    "Explanation",
    "Hubs",
    "Pair",
    "RANKINGS",
    "SelectedRow",
    "Subset",
    "Suspect",
    "Suspects",
    "Suspicion",
    "TokenExplanation",
    "TokenPart",
    "explain",
    "find_duplicates",
    "find_hubs",
    "find_mislabelled",
    "select",
]
