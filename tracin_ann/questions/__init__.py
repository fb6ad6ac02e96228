"""Further questions to an index: where a score comes from, which rows are hubs, which are duplicates."""

from tracin_ann.questions.duplicates import Duplicate, Duplicates, duplicates
from tracin_ann.questions.explain import Explanation, Part, explain
from tracin_ann.questions.hubs import Hub, Hubs, hubs

__all__ = ["Duplicate", "Duplicates", "Explanation", "Hub", "Hubs", "Part", "duplicates", "explain", "hubs"]
