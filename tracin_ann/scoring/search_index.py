"""The search index of a build: its kind is chosen, the index is built, calibrated and saved."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from tracin_ann.choices import CURVATURES, ScoreName
from tracin_ann.files import atomic_path
from tracin_ann.scoring.quality import QualityMeasurement
from tracin_ann.scoring.scores import Score
from tracin_ann.search import (
    Calibration,
    Codes,
    Diagnosis,
    IndexNeeds,
    IndexRequest,
    build_index,
    choose_index,
    count_shards,
    diagnose,
    list_codes,
    list_files,
)
from tracin_ann.store import FileRecord, IndexRecord, NextGeneration, record_file, select_listed_rows, write_unlisted

_LARGEST_SHARE = 0.1
_SERVE_DAMPED = ("codes", "bounds")
"""Kinds that find rows for scores with a curvature matrix; lists and graphs follow the directions in which rows
vary most."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchIndexOptions:
    """The options of a search index.

    Attributes:
        kind: one of `INDEX_KINDS`.
        seed: of the samples that the index is trained on.
        codes: how inverted lists store their rows.
        target_recall: recall@10 that the index is calibrated to.
        device: where the index is built.
        score: the default score. A coded scan and a search by bounds are calibrated for it.
        shards: number of files over which inverted lists or codes are split; other kinds have one.
    """

    kind: str
    seed: int
    codes: Codes
    target_recall: float
    device: torch.device
    score: ScoreName
    shards: int = 1


def build_search_index(
    generation: NextGeneration,
    features: Sequence[FileRecord],
    quality: QualityMeasurement,
    make_score: Callable[[ScoreName], Score],
    options: SearchIndexOptions,
) -> IndexRecord:
    """Build, calibrate and save the search index of a generation.

    With `auto`, an index that does not reach the target recall with a tenth of the rows is replaced by the next choice,
    if there is one. An interrupted build keeps the inverted lists that it has filled and resumes with the next rows.

    Args:
        generation: whose feature files are indexed; the files of the index are written into its folder.
        features: records of the feature files: lists of other files are not resumed.
        quality: measures the recall of the index.
        make_score: returns a score of the rows.
        options: see SearchIndexOptions.
    """
    rows, removed_R = select_listed_rows(quality.store.view(), generation.removed_R), generation.removed_R
    ids_N = np.setdiff1d(np.arange(quality.store.layout.n_rows, dtype=np.int64), removed_R)
    is_damped = options.score in CURVATURES

    def diagnose_rows() -> Diagnosis:
        return diagnose(rows, ids_N, options.seed)

    choices = choose_index(
        options.kind,
        len(rows),
        rows.dim,
        diagnose_rows,
        IndexNeeds(is_damped, options.target_recall, options.shards),
    )
    inputs = [asdict(record) for record in features], removed_R.tolist()
    request = IndexRequest(
        options.seed, options.codes, options.device, generation.unfinished_index, inputs, options.shards
    )
    for choice in choices:
        logger.info("index %s: %s", choice.kind, choice.reason)
        quality.progress("index", 0, len(rows))
        if choice.kind == "flat":
            return IndexRecord(choice.kind, choice.reason, (), requested=options.kind)
        index = build_index(choice.kind, rows, request, lambda done, total: quality.progress("index", done, total))
        score = make_score(options.score if is_damped and choice.kind in _SERVE_DAMPED else "tracin")
        calibration = quality.recall(index, options.target_recall, score)
        if _is_efficient(calibration, len(rows)):
            break
    generation.unfinished_index.mkdir(exist_ok=True)
    index.save(generation.unfinished_index)
    files = []
    shards = count_shards(choice.kind, options.shards)
    for name in list_files(choice.kind, shards):
        with atomic_path(generation.folder / name) as temporary:
            os.replace(generation.unfinished_index / name, temporary)
        files.append(record_file(generation.folder / name))
    files += write_unlisted(generation.folder, removed_R)
    codes = options.codes if options.codes in list_codes(choice.kind) else ""
    return IndexRecord(choice.kind, choice.reason, tuple(files), calibration, codes, options.kind, score.name, shards)


def _is_efficient(calibration: Calibration, n_rows: int) -> bool:
    """Return whether both directions reach the target recall by scoring a tenth of the rows at most."""
    points = [calibration.fastest_point(side, calibration.target) for side in ("proponents", "opponents")]
    return all(point is not None and point.scored <= _LARGEST_SHARE * n_rows for point in points)
