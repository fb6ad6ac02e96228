"""Parts of a score: each is compared with autograd in float64, and their sum with the score."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import models
import oracle
import zoo
from paths import SUPPORT
from tasks.toy import CONFIG, RATES, Toy, cross_entropy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.analysis import explain
from tracin_ann.analysis.explanation import find_layers
from tracin_ann.cli.explain import main as explain_command
from tracin_ann.errors import IndexMismatchError, NonFiniteError, UsageError
from tracin_ann.operations.removal import remove
from tracin_ann.scoring.exact import exact_scores

SMALL = replace(CONFIG, yardstick=False)
NAMED = """
import sys
sys.path[:0] = {paths!r}
from test_explanation import make_named_task as made
def task(folder):
    return made(folder)
"""


@dataclass(frozen=True)
class Built:
    """An index, its models at the checkpoints, and the loss."""

    index: InfluenceIndex
    task: Task
    nets: list[nn.Module]
    loss: Any


def build_case(case: str, folder: Path) -> Built:
    nets = zoo.save_checkpoints(case, 0, folder)
    task = zoo.task(case, str(folder))
    build(task, folder / "index", replace(SMALL, dim=16))
    return Built(InfluenceIndex.open(folder / "index", task, device="cpu"), task, nets, models.CASES[case].loss)


def compute_true_parts(made: Built, row: Any, query: Any, losses: tuple[Any, Any]) -> dict[tuple[int, str], float]:
    """Return η_c ⟨g_p, g'_p⟩ of every checkpoint and parameter by autograd in float64."""
    found = {}
    for c, (net, rate) in enumerate(zip(made.nets, zoo.RATES, strict=True)):
        mine, theirs = (oracle.gradients(net, loss, [e])[0] for loss, e in zip(losses, (row, query), strict=True))
        at = 0
        for name, parameter in net.named_parameters():
            place = slice(at, at + parameter.numel())
            found[c, name] = rate * float(mine[place] @ theirs[place])
            at += parameter.numel()
    return found


@pytest.mark.parametrize("case", ["mlp", "gpt tied", "conv2d", "held twice", "parametrised"])
def test_every_part_equals_autograd_and_the_sum_is_the_exact_score(case: str, tmp_path: Path) -> None:
    built = build_case(case, tmp_path)
    train, queries = zoo.make_examples(case, 0)
    for side, query in (("query", 1), ("train", 6))[: 2 if case == "mlp" else 1]:
        found = explain(built.index, 4, query, side)  # type: ignore[arg-type]
        example = (queries if side == "query" else train)[query]
        true = compute_true_parts(built, train[4], example, (built.loss, built.loss))
        size = sum(map(abs, true.values()))
        assert {(p.checkpoint, p.parameter): p.contribution for p in found} == pytest.approx(
            true, rel=1e-4, abs=1e-6 * size
        )
        assert [(p.checkpoint, p.parameter) for p in found] == list(true)
        (exact,) = exact_scores(built.index.runner, (side, [query]), [4], [0, 1])[0]  # type: ignore[arg-type]
        assert found.score == pytest.approx(exact, rel=1e-5, abs=1e-6 * size)
        for parts in (found.by_checkpoint, found.by_layer, found.by_parameter):
            assert sum(parts.values()) == pytest.approx(found.score, rel=1e-12, abs=1e-12 * size)
        assert sum(abs(part.share) for part in found) == pytest.approx(1)
        assert all((part.share > 0) == (part.contribution > 0) for part in found if part.contribution)


def test_the_scores_equal_those_of_a_query(tmp_path: Path) -> None:
    index = build_case("mlp", tmp_path).index
    exact = index.query([2], options=QueryOptions(k=14, exact=True))[0]
    for hit in exact.hits[::5]:
        found = explain(index, hit.row, 2)
        assert found.score == pytest.approx(hit.score, rel=1e-5)
        assert found.stored_score == pytest.approx(hit.stored_score, rel=1e-6)
        assert found.difference == found.stored_score - found.score
    (one,) = index.query([2], options=QueryOptions(k=14, exact=True, checkpoints=(1,)))
    for hit in one.hits[:1]:
        found = explain(index, hit.row, 2, checkpoints=[1])
        assert found.score == pytest.approx(hit.score, rel=1e-5)
        assert found.by_checkpoint == {1: found.score}


def test_a_layer_is_the_module_that_owns_the_parameter() -> None:
    tied = find_layers(models.TinyGPT(tied=True))
    assert tied["tokens.weight"] == "tokens + head"
    assert tied["places"] == "(model)"
    assert tied["qkv.bias"] == "qkv"
    assert "head.weight" not in tied
    assert find_layers(models.shared_twice())["first.weight"] == "first + second"
    assert set(find_layers(models.weight_normed()).values()) == {"0", "2", "3"}
    assert set(find_layers(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))).values()) == {"(model)"}


def margin(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch[0]).gather(1, batch[1][:, None])[:, 0]


def test_a_query_loss_and_a_selection_of_parameters_are_used(tmp_path: Path) -> None:
    net = Toy()
    task = make_toy_task(tmp_path, net, query_loss=margin, parameters="second.*")
    build(task, tmp_path / "index", SMALL)
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    nets = []
    for checkpoint in task.checkpoints:
        nets.append(Toy())
        nets[-1].load_state_dict(torch.load(checkpoint.path))
    found = explain(index, 3, 1)
    rates = [c.learning_rate for c in task.checkpoints]
    grads = [
        torch.stack([oracle.gradients(n, loss, [row], ["second.weight", "second.bias"]) for n in nets], 1)
        for loss, row in ((margin, make_rows(5, seed=2)[1]), (cross_entropy, make_rows(10)[3]))
    ]
    assert found.score == pytest.approx(oracle.tracin(grads[0], grads[1], rates)[0, 0], rel=1e-5)
    assert {part.parameter for part in found} == {"second.weight", "second.bias"}
    assert list(found.by_layer) == ["second"]
    # A query that is a training row has the training loss.
    assert explain(index, 3, 3, "train").score == pytest.approx(
        oracle.tracin(grads[1], grads[1], rates)[0, 0], rel=1e-5
    )


def logarithm(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return losses whose gradient, but not value, is infinite where the first number of a row is 0."""
    return cross_entropy(model, batch) + (batch[0][:, :1] * model.first.weight[0, :1]).abs().sqrt().sum(1)


def test_nonfinite_gradients_and_absent_rows_are_rejected(tmp_path: Path) -> None:
    data = make_rows(10)
    data[6] = (torch.cat([torch.zeros(1), data[6][0][1:]]), 0)
    data[7] = (torch.full((5,), torch.nan), 0)
    task = make_toy_task(tmp_path, train_data=lambda: data, loss=logarithm, query_loss=cross_entropy)
    build(task, tmp_path / "index", replace(SMALL, on_nonfinite="skip"))
    remove(tmp_path / "index", [2])
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    for row in (6, 7):
        with pytest.raises(NonFiniteError, match=f"row {row} of train_data was skipped .* at checkpoint 0"):
            explain(index, row, 0)
    with pytest.raises(NonFiniteError, match=r"this row of train_data: .* row 7 at checkpoint 0"):
        explain(index, 1, 7, "train")
    with pytest.raises(UsageError, match="row 2 of train_data was removed"):
        explain(index, 2, 0)
    for row, query in ((10, 0), (-1, 0), (0, 5)):
        with pytest.raises(UsageError, match="no such row"):
            explain(index, row, query)
    with pytest.raises(UsageError, match="bad --checkpoints"):
        explain(index, 0, 0, checkpoints=[2])


def test_another_task_is_rejected(tmp_path: Path) -> None:
    net = Toy()
    checkpoints = save_checkpoints(net, tmp_path)
    build(make_toy_task(tmp_path, net, checkpoints=checkpoints), tmp_path / "index", SMALL)
    other = make_toy_task(tmp_path, net, checkpoints=checkpoints, loss=lambda m, b: 2 * cross_entropy(m, b))
    with pytest.raises(IndexMismatchError):
        explain(InfluenceIndex.open(tmp_path / "index", other, device="cpu"), 0, 0)


def make_named_task(folder: str) -> Task:
    return Task(
        model=Toy,
        loss=cross_entropy,
        train_data=lambda: [(x, y, i) for i, (x, y) in enumerate(make_rows(10))],
        query_data=lambda: [(x, y, i) for i, (x, y) in enumerate(make_rows(5, seed=2))],
        checkpoints=[Checkpoint(f"{folder}/checkpoint{i}.pt", rate) for i, rate in enumerate(RATES)],
        ids=lambda row: f"row-{row[2]}",
        describe=lambda row: f"class {row[1]}",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("explain")
    torch.manual_seed(3)
    save_checkpoints(Toy(), directory)
    (directory / "of_explain.py").write_text(NAMED.format(paths=[str(SUPPORT)]))
    build(make_named_task(str(directory)), directory / "index", SMALL)
    return directory


def run_command(folder: Path, *arguments: object) -> Result:
    words = [folder / "index", "--task", folder / "of_explain.py:task", "--task-arg", f"folder={folder}", *arguments]
    return CliRunner().invoke(explain_command, [str(word) for word in (*words, "--device", "cpu")])


def test_the_command_returns_the_result_of_the_function(folder: Path, tmp_path: Path) -> None:
    found = explain(InfluenceIndex.open(folder / "index", make_named_task(str(folder)), device="cpu"), 3, 2)
    lines = run_command(folder, "--train-id", 3, "--id", 2, "--format", "jsonl")
    assert lines.exit_code == 0, lines.stderr
    assert [json.loads(line) for line in lines.stdout.splitlines()] == found.lines()
    own = run_command(folder, "--train-id", "row-3", "--id", "row-2", "--own-ids", "--output", tmp_path / "parts.csv")
    assert own.exit_code == 0, own.stderr
    assert own.stdout == ""
    assert f"exact score:  {found.score:+.6g} of row row-3 for query row-2" in own.stderr
    assert (tmp_path / "parts.csv").read_text().count("\n") == 1 + len(found) == 9
    table = run_command(folder, "--train-id", 3, "--query-train-id", 3)
    assert [line.split()[0] for line in table.stdout.splitlines() if "│" in line] == ["first", "second", "all"]
    assert "checkpoint 1" in table.stdout
    by = run_command(folder, "--train-id", 3, "--id", 2, "--by", "parameter")
    assert "second.bias" in by.stdout
    found.plot().canvas.draw()
    assert found.to_pandas()["contribution"].sum() == pytest.approx(found.score)
    assert "<table>" in found._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train-id", 3), "none of --id, --query-train-id, --input and --text"),
        (("--train-id", 3, "--id", 0, "--query-train-id", 0), "2 queries: got --id and --query-train-id"),
        (("--train-id", "3-4", "--id", 0), "--train-id takes one row: got 2 rows"),
        (("--train-id", 3, "--id", 99), "no such row in query_data: got 99"),
        (("--train-id", "rows", "--id", "row-1", "--own-ids"), "no such id in train_data"),
    ],
)
def test_invalid_arguments_are_rejected(folder: Path, arguments: tuple[object, ...], message: str) -> None:
    refused = run_command(folder, *arguments)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert refused.stdout == ""


def test_progress_is_reported_once_per_checkpoint(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    index = InfluenceIndex.open(folder / "index", make_named_task(str(folder)), device="cpu")
    explain(index, 0, 0, "query", lambda *message: calls.append(message))
    assert calls == [("gradients", 1, 2), ("gradients", 2, 2)]
