"""Recommendation of a score, its damping and checkpoints, from an evaluation or from the rules that need none.

Shapes: D sketch dimension of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracin_ann.choices import CurvatureName
from tracin_ann.evaluation.comparison import Candidate, Comparison, Result
from tracin_ann.index import InfluenceIndex
from tracin_ann.scoring import find_curvature, suggest_dim

_MOST_TIES = 4


@dataclass(frozen=True)
class Recommendation:
    """What to use, and why.

    Attributes:
        candidate: the score, its damping and checkpoints.
        lines: labels and sentences for users: the recommendation, candidates that are not distinguishable from it, and
            warnings.
    """

    candidate: Candidate
    lines: tuple[tuple[str, str], ...]


def recommend(index: InfluenceIndex, comparison: Comparison | None = None) -> Recommendation:
    """Return the candidate with the highest linear datamodeling score, or without an evaluation the rules' choice.

    Without an evaluation: `gauss-newton` if the loss is -log p of one label, else `fisher`, with the automatic damping
    and all checkpoints. Both cases warn if the sketch dimension is below three times the effective dimension
    tr K (K + λI)⁻¹, or if the number of steps is not known, from which the damping follows.

    Args:
        index: an open index.
        comparison: results with the protocol `lds` or `leave-one-out`; None: there are none.
    """
    ranked = [] if comparison is None else [result for result in comparison if result.candidate is not None]
    if not ranked:
        candidate = Candidate("gauss-newton" if index.score_maker.source.loss_is_nll else "fisher")
        lines = [("recommendation", f"{_describe(index, candidate)}, by rule and not by retraining")]
        return Recommendation(candidate, (*lines, *_warn(index, candidate)))
    best = ranked[0]
    assert best.candidate is not None
    lines = [("recommendation", f"{_describe(index, best.candidate)}: {_format_value(best)}")]
    ties = _find_ties(best, ranked[1:])
    if ties:
        named = "; ".join(_describe(index, tie.candidate) for tie in ties[:_MOST_TIES] if tie.candidate is not None)
        more = f"; {len(ties) - _MOST_TIES} more" if len(ties) > _MOST_TIES else ""
        lines.append(("no clear difference", f"{named}{more}"))
    return Recommendation(best.candidate, (*lines, *_warn(index, best.candidate)))


def _find_ties(best: Result, others: Sequence[Result]) -> list[Result]:
    """Return the results whose difference from the best is within its 95% interval."""
    assert best.estimate is not None
    return [other for other in others if other.estimate is not None and best.estimate.compare(other.estimate)[0] <= 0]


def _format_value(result: Result) -> str:
    assert result.estimate is not None
    low, high = result.estimate.interval
    return f"{result.protocol} {result.value:.3f}, 95% interval {low:.3f} to {high:.3f}"


def _describe(index: InfluenceIndex, candidate: Candidate) -> str:
    """Return a candidate in words, with the sketch dimension."""
    spec, curvature = index.manifest.build.spec, find_curvature(candidate.score)
    words = [f"--score {candidate.score}"]
    if candidate.damping is not None:
        words.append(f"--damping {candidate.damping:g}")
    elif curvature is not None:
        words.append(_describe_damping(index, candidate, curvature))
    chosen = candidate.checkpoints
    words.append(f"all {len(spec.checkpoints)} checkpoints" if chosen is None else f"checkpoints {_join(chosen)}")
    return ", ".join([*words, f"D = {spec.sketch.dim}"])


def _warn(index: InfluenceIndex, candidate: Candidate) -> list[tuple[str, str]]:
    """Return warnings about the sketch dimension and the damping."""
    curvature = find_curvature(candidate.score)
    if curvature is None:
        return []
    spec, lines = index.manifest.build.spec, []
    damping = index.score_maker.damp(curvature, candidate.damping)
    chosen = _list_checkpoints(index, candidate)
    largest = max(damping.curvatures[c].effective_dimension(damping.damping_C[c]) for c in chosen)
    suggested = suggest_dim(spec.sketch.dim, largest)
    if suggested is not None:
        lines.append(
            (
                "warning",
                f"effective dimension {largest:.0f}, more than a third of D = {spec.sketch.dim}: "
                f"a build with --dim {suggested} or more may score better",
            )
        )
    if (
        candidate.damping is None
        and curvature != "trak"
        and any(index.score_maker.steps[c] is None and spec.checkpoints[c].learning_rate > 0 for c in chosen)
    ):
        lines.append(
            (
                "warning",
                "the number of steps of the run is not known, so that the damping is a fraction of the trace: compare "
                "several --damping, or for SGD, give Checkpoint(steps=...) and build again",
            )
        )
    return lines


def _describe_damping(index: InfluenceIndex, candidate: Candidate, curvature: CurvatureName) -> str:
    """Return λ of the automatic rule, or the smallest and the largest over the checkpoints, and the rule."""
    damping = index.score_maker.damp(curvature)
    used = [damping.damping_C[c] for c in _list_checkpoints(index, candidate)]
    ends = dict.fromkeys(f"{value:.3g}" for value in (min(used), max(used)))
    return f"damping {' to '.join(ends)} ({damping.rule})"


def _list_checkpoints(index: InfluenceIndex, candidate: Candidate) -> Sequence[int]:
    """Return the positions of the checkpoints with a learning rate above 0."""
    checkpoints = index.manifest.build.spec.checkpoints
    return [c for c in index.view(candidate.checkpoints).checkpoints if checkpoints[c].learning_rate > 0]


def _join(checkpoints: Sequence[int]) -> str:
    return ",".join(map(str, checkpoints))
