"""Rows with extremely large or small gradients: codes and scores of all rows stay correct."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.flawed import make_rows, make_task, read_scores
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build
from tracin_ann.store.columns import RowFilter


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("kind", ["flat", "ivf", "codes", "bounds"])
@pytest.mark.parametrize("norms", ["sketch", "exact"])
def test_extreme_rows_do_not_change_codes_or_scores_of_others(tmp_path, scale, kind, norms):
    """Scores are linear in the gradient of a row: those of a scaled row are scaled, all others do not change."""
    n, far = 1500, (3, 700, 1201)
    config = BuildConfig(dim=64, batch_size=50, device="cpu", index=kind, norms=norms, target_recall=0.8)
    indexes, queries = [], make_rows(40, 2)
    for name, scales in (("far", dict.fromkeys(far, scale)), ("near", {})):
        task = make_task(tmp_path, make_rows(n, scales=scales), queries)
        build(task, tmp_path / name, config)
        indexes.append(InfluenceIndex.open(tmp_path / name, task, device="cpu"))
    index, near = indexes

    def rescaled(found: dict[int, float]) -> dict[int, float]:
        return {row: score / scale if row in far else score for row, score in found.items()}

    for options in (
        QueryOptions(k=n),
        QueryOptions(k=n, rerank="none"),
        QueryOptions(k=n, exact=True),
        QueryOptions(k=n, cosine=True),
    ):
        found, expected = (read_scores(each, options, range(8)) for each in indexes)
        found = found if options.cosine else [rescaled(answer) for answer in found]
        for mine, other in zip(found, expected, strict=True):
            largest = max(map(abs, other.values()))
            off = np.array([abs(mine.get(row, 0) - other.get(row, 0)) / largest for row in range(n)])
            assert off.max() <= 2e-3 and np.delete(off, far).max() <= 3e-6
    # The lists find the same rows as without scaling, apart from the scaled rows.
    few = RowFilter(without=far)
    if kind == "ivf":
        calibrated = [each.manifest.index.calibration for each in indexes]
        assert all(c.fastest_point(side, 0.8) for c in calibrated for side in ("proponents", "opponents"))
        ours = [read_scores(each, QueryOptions(k=10, rows=few, search="lists"), range(40)) for each in indexes]
        truth = read_scores(near, QueryOptions(k=10, rows=few, search="scan"), range(40))
        recalls = [np.mean([len(a.keys() & b.keys()) / len(b) for a, b in zip(o, truth, strict=True)]) for o in ours]
        assert min(recalls) > 0.8 and abs(recalls[0] - recalls[1]) < 0.1
    # With a scaled row as the query, scores are scaled as well; that of the row with itself by the square.
    for options in (QueryOptions(k=n), QueryOptions(k=n, rerank="exact", candidates=n), QueryOptions(k=n, exact=True)):
        asked = [each.query(train_ids=[3], options=options)[0] for each in indexes]
        mine, other = ({int(h.id): h.score for h in (*a.proponents, *a.opponents)} for a in asked)
        mine = {row: score / scale for row, score in rescaled(mine).items()}
        largest = max(map(abs, other.values()))
        assert other[3] == pytest.approx(mine[3], rel=2e-3) and mine.keys() == other.keys()
        assert all(abs(mine[row] - other[row]) <= 2e-3 * largest for row in other)
    for exact in (False, True):
        own, plain = ({int(row.id): row.score for row in each.self_influence(exact=exact)} for each in indexes)
        own = {row: score / scale / scale if row in far else score for row, score in own.items()}
        np.testing.assert_allclose([own[row] for row in range(n)], [plain[row] for row in range(n)], rtol=1e-4)
