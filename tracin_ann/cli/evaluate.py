"""tracin-evaluate: compare the scores of an index with retraining, and recommend one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from tracin_ann.choices import (
    DAMPED_SCORES,
    EVALUATION_PROTOCOLS,
    RETRAINING_PROTOCOLS,
    SCORES,
    EvaluationProtocol,
    ScoreName,
)
from tracin_ann.cli.command import command, directory_argument, find_given_options
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.index_options import (
    checkpoints_option,
    index_options,
    open_index,
    own_ids_option,
    resolve_positions,
)
from tracin_ann.cli.messages import format_count, print_field_notes, print_note, show_progress
from tracin_ann.cli.output import Sink, output_options
from tracin_ann.cli.parameters import IdRanges
from tracin_ann.errors import UsageError, problem

if TYPE_CHECKING:
    from tracin_ann.evaluation import Candidate, Comparison, Retraining
    from tracin_ann.index import InfluenceIndex
    from tracin_ann.types import ProgressCallback

_ALL: tuple[EvaluationProtocol, ...] = ("lds", "removal", "tail-patch")
_AUTO = "auto"


class _List(click.ParamType):  # type: ignore[type-arg]
    """Words separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the words in the given order, each once."""
        if isinstance(value, tuple):
            return value
        words = value if isinstance(value, list) else str(value).split(",")
        return tuple(dict.fromkeys(str(word).strip() for word in words))


@command(
    "tracin-evaluate runs/mnist --retrained runs/retrained --subsets 50 --seeds 3",
    "tracin-evaluate runs/mnist --retrained runs/retrained --scores fisher,gauss-newton --damping auto,1e-3,1e-2",
    "tracin-evaluate runs/mnist --retrained runs/retrained --protocol removal -k 100 --removals 16",
    "tracin-evaluate runs/mnist --protocol tail-patch -k 10",
)
@directory_argument
@click.option("--retrained", type=click.Path(), help="Folder for the losses of retrained models; it is continued.")
@click.option(
    "--protocol",
    type=click.Choice([*EVALUATION_PROTOCOLS, "all"]),
    help="all: lds, removal and tail-patch.  [default: lds; without --retrained, tail-patch]",
)
@click.option(
    "--scores",
    type=_List(),
    help="Scores to compare.  [default: tracin,cosine,fisher, and gauss-newton if the task has loss_is_nll=True]",
)
@click.option(
    "--damping",
    "dampings",
    type=_List(),
    default=_AUTO,
    show_default=True,
    help="Dampings to compare, such as auto,1e-3.",
)
@checkpoints_option
@click.option("--subsets", default=50, show_default=True, type=click.IntRange(3), help="Subsets to train on.")
@click.option("--fraction", default=0.5, show_default=True, type=float, help="Share of the rows in a subset.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Models for each subset.")
@click.option(
    "--queries", default=100, show_default=True, type=click.IntRange(1), help="Queries, spread over query_data."
)
@click.option("--ids", type=IdRanges(), help="Queries: rows of query_data, instead of --queries.")
@click.option(
    "-k", default=50, show_default=True, type=click.IntRange(1), help="Top rows of each query (removal, tail-patch)."
)
@click.option(
    "--removals", default=16, show_default=True, type=click.IntRange(1), help="Queries whose top rows are removed."
)
@own_ids_option
@output_options
@index_options
def main(directory: str, form: str | None, output: str | None, **options: Any) -> None:
    """Compare the scores of the index in DIR with what training does, and recommend one.

    lds: the rank correlation, over random subsets of the rows, of predicted losses and of losses after training on the
    subset by Task.retrain. leave-one-out: the same for subsets without one row. removal: the mean rise of a query's
    loss after training without its top k rows. tail-patch: the mean fall of its loss by one step on one of its top k
    rows, without retraining. Retrained losses are kept in the folder --retrained, and an interrupted command continues.
    """
    with pause_collector():
        from tracin_ann.evaluation import Comparison, recommend
        from tracin_ann.packages import import_scipy_stats

    import_scipy_stats()
    dampings = [_parse_damping(word) for word in options["dampings"]]
    sink = Sink.from_options(form, output)
    protocols = _choose_protocols(options)
    index = open_index(directory, options)
    measured = None
    with sink.open(Comparison.FIELDS) as write, show_progress("models") as progress:
        ids = _choose_queries(index, options)
        candidates = _list_candidates(index, options, dampings)
        for candidate in candidates:
            # A score that the index does not have is reported before models are trained.
            index.make_score(candidate.options)
        evaluation = _Evaluation(index, candidates, ids, options, progress)
        for protocol in protocols:
            comparison = evaluation.run(protocol)
            write(comparison)
            if protocol in ("lds", "leave-one-out"):
                measured = comparison
    print_field_notes([("queries", f"{len(ids):,}"), *recommend(index, measured).lines])


def _choose_protocols(options: Mapping[str, Any]) -> tuple[EvaluationProtocol, ...]:
    """Return the protocols to run.

    Raises:
        UsageError: one of them needs retrained models, and no folder is given.
    """
    default: EvaluationProtocol = "lds" if options["retrained"] else "tail-patch"
    chosen = options["protocol"] or default
    protocols: tuple[EvaluationProtocol, ...] = _ALL if chosen == "all" else (chosen,)
    if not options["retrained"] and set(protocols) & set(RETRAINING_PROTOCOLS):
        raise UsageError(
            problem(
                f"--protocol {chosen} needs retrained models",
                got="no --retrained",
                expected="a folder for their losses",
                remedy="add --retrained FOLDER, or use --protocol tail-patch",
            )
        )
    return protocols


def _choose_queries(index: InfluenceIndex, options: Mapping[str, Any]) -> tuple[int, ...]:
    if options["ids"] is None:
        return _spread(range(index.runner.n_rows("query")), options["queries"])
    if "queries" in find_given_options():
        what, expected = "queries are given twice", "--ids or --queries"
        raise UsageError(problem(what, got="--ids and --queries", expected=expected, remedy="remove one of them"))
    return resolve_positions(index, "query", options["ids"], options)


def _spread(rows: Sequence[int], n: int) -> tuple[int, ...]:
    """Return at most n of the rows, spread evenly."""
    n = min(n, len(rows))
    return tuple(rows[place * len(rows) // n] for place in range(n))


def _list_candidates(
    index: InfluenceIndex, options: Mapping[str, Any], dampings: Sequence[float | None]
) -> list[Candidate]:
    from tracin_ann.evaluation import list_candidates

    scores: Sequence[ScoreName] = options["scores"] or ()
    wrong = [score for score in scores if score not in SCORES]
    if wrong:
        got, allowed = str(wrong[0]) or "an empty name", f"some of {', '.join(SCORES)}"
        raise UsageError(problem("bad --scores", got=got, expected=allowed, remedy="change --scores"))
    if not scores:
        is_nll = index.score_maker.source.loss_is_nll
        scores = ("tracin", "cosine", "fisher", *(("gauss-newton",) if is_nll else ()))
    if "dampings" in find_given_options() and not set(scores) & set(DAMPED_SCORES):
        what, got = "--damping has no effect", f"--scores {','.join(scores)}"
        expected, remedy = f"one of {', '.join(DAMPED_SCORES)} among them", "remove --damping, or change --scores"
        raise UsageError(problem(what, got=got, expected=expected, remedy=remedy))
    return list_candidates(index, scores, dampings, options["checkpoints"])


def _parse_damping(word: str) -> float | None:
    if word == _AUTO:
        return None
    try:
        return float(word)
    except ValueError:
        got, expected = word or "nothing", "auto or numbers above 0"
        raise UsageError(problem("bad --damping", got=got, expected=expected, remedy="change --damping")) from None


@dataclass(frozen=True)
class _Evaluation:
    """What is compared, on which queries, by the options of the command."""

    index: InfluenceIndex
    candidates: Sequence[Candidate]
    ids: tuple[int, ...]
    options: Mapping[str, Any]
    progress: ProgressCallback

    def run(self, protocol: EvaluationProtocol) -> Comparison:
        """Return the results of one protocol; models that are missing are trained."""
        from tracin_ann.evaluation import compare_by_removal, compare_by_tail_patch

        k = self.options["k"]
        if protocol == "tail-patch":
            return compare_by_tail_patch(self.index, self.candidates, self.ids, k, self.progress)
        retraining, seeds = self._open(self.ids), range(self.options["seeds"])
        if protocol != "removal":
            return self._correlate(protocol, retraining, seeds)
        some = self._open(_spread(self.ids, self.options["removals"]))
        models = format_count((len(some.query_ids) * len(self.candidates) + 2) * len(seeds), "model")
        print_note(f"retraining: at most {models}", err=True)
        return compare_by_removal(self.index, self.candidates, some, k, seeds, self.progress)

    def _open(self, ids: tuple[int, ...]) -> Retraining:
        from tracin_ann.evaluation import Retraining

        return Retraining.open(self.index.runner, self.options["retrained"], ids)

    def _correlate(
        self, protocol: Literal["lds", "leave-one-out"], retraining: Retraining, seeds: Sequence[int]
    ) -> Comparison:
        from tracin_ann.evaluation import compare_by_lds, draw_leave_one_out, draw_subsets

        rows_N, n_subsets = self.index.present(), self.options["subsets"]
        if protocol == "lds":
            subsets = draw_subsets(rows_N, n_subsets, self.options["fraction"])
        else:
            subsets = draw_leave_one_out(rows_N, n_subsets)
        models = format_count(len(subsets) * len(seeds), "model")
        print_note(f"retraining: {models}, {retraining.count_missing(subsets, seeds):,} to train", err=True)
        loss_MSQ = retraining.measure(subsets, seeds, self.progress)
        return compare_by_lds(self.index, self.candidates, self.ids, subsets, loss_MSQ, protocol)
