"""The search index of a build: its kind is chosen, inverted lists are filled, calibrated and saved."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from tracin_ann.files import atomic_path
from tracin_ann.scoring.quality import QualityMeasurement
from tracin_ann.search import Codes, IVFIndex, IVFParams, UnfinishedLists, choose_index, digest_inputs
from tracin_ann.store import FileRecord, IndexRecord, NextGeneration, record_file, select_listed_rows, write_unlisted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchIndexOptions:
    """The options of a search index.

    Attributes:
        kind: `auto`, `flat` or `ivf`.
        seed: of the samples that k-means is trained on.
        codes: how inverted lists store their rows.
        target_recall: recall@10 that inverted lists are calibrated to.
        device: where inverted lists are built.
    """

    kind: str
    seed: int
    codes: Codes
    target_recall: float
    device: torch.device


def build_search_index(
    generation: NextGeneration,
    features: Sequence[FileRecord],
    quality: QualityMeasurement,
    options: SearchIndexOptions,
) -> IndexRecord:
    """Build, calibrate and save the search index of a generation.

    An interrupted build keeps the inverted lists that it has filled and resumes with the next rows.

    Args:
        generation: whose feature files are indexed; the files of the index are written into its folder.
        features: records of the feature files: lists of other files are not resumed.
        quality: measures the recall of inverted lists.
        options: see SearchIndexOptions.
    """
    rows, removed_R = select_listed_rows(quality.store.view(), generation.removed_R), generation.removed_R
    choice = choose_index(options.kind, len(rows), rows.dim)
    logger.info("index %s: %s", choice.kind, choice.reason)
    quality.progress("index", 0, len(rows))
    if choice.kind != "ivf":
        return IndexRecord(choice.kind, choice.reason, ())
    params = IVFParams(seed=options.seed, codes=options.codes)
    key = digest_inputs(params, [asdict(record) for record in features], removed_R.tolist())
    unfinished = UnfinishedLists(generation.unfinished_index, key)
    index = IVFIndex.build(
        rows, params, options.device, unfinished, lambda done, total: quality.progress("index", done, total)
    )
    calibration = quality.recall(index, options.target_recall)
    index.save(generation.unfinished_index)
    files = []
    for name in IVFIndex.FILES:
        with atomic_path(generation.folder / name) as temporary:
            os.replace(generation.unfinished_index / name, temporary)
        files.append(record_file(generation.folder / name))
    files += write_unlisted(generation.folder, removed_R)
    return IndexRecord(choice.kind, choice.reason, tuple(files), calibration, options.codes)
