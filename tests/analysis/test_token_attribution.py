"""Parts of a score by token: each is compared with one backward pass per position in float64, and their sum with it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.nn import functional as F

import models
import oracle
from pages import Page
from paths import SUPPORT
from tasks.toy import CONFIG, make_toy_task
from tracin_ann import Checkpoint, Description, InfluenceIndex, QueryOptions, Task, build, write_report
from tracin_ann.analysis import TokenExplanation, explain
from tracin_ann.choices import SideName
from tracin_ann.cli.explain import main as explain_command
from tracin_ann.cli.query import main as query_command
from tracin_ann.errors import TaskError, UsageError
from tracin_ann.features import RunOptions, TaskRunner
from tracin_ann.gradients import DIFFERENTIATE
from tracin_ann.results import HITS, choose_fields, match_tokens
from tracin_ann.scoring import TokenSplitter, compute_full_gradients, select_direction, tokens
from tracin_ann.scoring.exact import exact_scores

RATES = (0.3, 0.05)
N_TRAIN, N_QUERY = 12, 4
SMALL = replace(CONFIG, dim=16, yardstick=False)
IGNORED = -100
WORDS = "zero one two three four five six seven eight nine ten".split()


class Tagger(nn.Module):
    """An encoder that labels tokens; its attention reads all tokens but padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.layer(self.words(index), src_key_padding_mask=index == 0))


def pad(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    index, target = ([row[part] for row in rows] for part in range(2))
    padded = nn.utils.rnn.pad_sequence
    return padded(index, batch_first=True), padded(target, batch_first=True, padding_value=IGNORED)


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the losses of each position, divided by the number of positions with a target."""
    loss_BT = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none", ignore_index=IGNORED)
    return loss_BT / (batch[1] != IGNORED).sum(1, keepdim=True).clamp_min(1)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return token_losses(model, batch).sum(1)


def make_rows(n: int, seed: int, lowest: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Return tokens and targets of 2 to 7 positions; position 1 of each row has no target."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = (int(torch.randint(2, 8, (), generator=g)),)
        index, target = torch.randint(lowest, 11, length, generator=g), torch.randint(0, 5, length, generator=g)
        target[1] = IGNORED
        rows.append((index, target))
    return rows


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": models.TinyGPT,
    "tied gpt": lambda: models.TinyGPT(tied=True),
    "encoder": Tagger,
}


@dataclass(frozen=True)
class Case:
    """A task, and its models at the checkpoints."""

    task: Task
    nets: list[nn.Module]


def describe(row: tuple[Tensor, Tensor]) -> Description:
    return Description(text="a row", tokens=[WORDS[i] for i in row[0]])


def make_case(folder: Path, make_model: Callable[[], nn.Module], **fields: Any) -> Case:
    nets, checkpoints = [], []
    for c, rate in enumerate(RATES):
        torch.manual_seed(c)
        nets.append(make_model().eval())
        with torch.no_grad():
            for parameter in nets[-1].parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        torch.save(nets[-1].state_dict(), folder / f"{c}.pt")
        checkpoints.append(Checkpoint(folder / f"{c}.pt", rate))
    task = Task(
        model=make_model,
        loss=loss,
        train_data=lambda: make_rows(N_TRAIN, 1),
        query_data=lambda: make_rows(N_QUERY, 2),
        checkpoints=checkpoints,
        collate=pad,
        describe=describe,
        token_losses=token_losses,
    )
    return Case(replace(task, **fields), nets)


def compute_true_parts(
    net: nn.Module, losses: Any, example: Any, direction: dict[str, Tensor], collate: Any = pad
) -> np.ndarray:
    """Return ⟨∇ℓ_t, v⟩ [T] by one backward pass per position in float64."""
    net = oracle.to_double(net).eval()
    values = losses(net, collate([example]))[0]
    chosen = [dict(net.named_parameters())[name] for name in direction]
    parts = []
    for value in values:
        grads = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
        pairs = zip(grads, direction.values(), strict=True)
        parts.append(sum(float((g.flatten() * v.double().flatten()).sum()) for g, v in pairs if g is not None))
    return np.array(parts)


def compute_true_gradient(net: nn.Module, losses: Any, example: Any, collate: Any = pad) -> dict[str, Tensor]:
    net = oracle.to_double(net).eval()
    named = dict(net.named_parameters())
    grads = torch.autograd.grad(losses(net, collate([example])).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


@pytest.fixture(scope="module", params=list(MODELS))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, InfluenceIndex]:
    folder = tmp_path_factory.mktemp("tokens")
    case = make_case(folder, MODELS[request.param])
    build(case.task, folder / "index", SMALL)
    return case, InfluenceIndex.open(folder / "index", case.task, device="cpu")


def test_every_part_equals_a_backward_pass_of_its_position(built: tuple[Case, InfluenceIndex]) -> None:
    case, index = built
    train, queries = make_rows(N_TRAIN, 1), make_rows(N_QUERY, 2)
    for row, query, side in ((4, 1, "query"), (0, 3, "query"), (5, 6, "train")):
        found = explain(index, row, query, side, by="token")
        other = (queries if side == "query" else train)[query]
        assert isinstance(found, TokenExplanation)
        assert found.examples == ("row", "query")
        for example, mine, theirs in (("row", train[row], other), ("query", other, train[row])):
            true_CT = np.stack(
                [
                    rate * compute_true_parts(net, token_losses, mine, compute_true_gradient(net, token_losses, theirs))
                    for net, rate in zip(case.nets, RATES, strict=True)
                ]
            )
            size = np.abs(true_CT).sum()
            parts = {(p.position, p.checkpoint): p.contribution for p in found if p.example == example}
            assert list(parts) == [(t, c) for t in range(len(mine[0])) for c in range(len(RATES))]
            np.testing.assert_allclose([parts[t, c] for t, c in parts], true_CT.T.flatten(), atol=1e-5 * size)
            assert [parts[1, c] for c in range(len(RATES))] == [0, 0], "position 1 has no target"
            np.testing.assert_allclose(found.by_position(example), true_CT.sum(0), atol=1e-5 * size)
            assert [token for token, _ in found.by_token(example)] == [WORDS[i] for i in mine[0]]
            (score,) = exact_scores(index.runner, (side, [query]), [row], [0, 1])[0]
            assert abs(sum(found.by_position(example)) - score) <= 1e-5 * size
            assert sum(abs(p.share) for p in found if p.example == example) == pytest.approx(1)
        assert found.score == pytest.approx(explain(index, row, query, side).score, rel=1e-4)
        assert sum(found.by_checkpoint().values()) == pytest.approx(found.score)


def test_hits_have_the_parts_of_their_exact_scores_in_any_batch(
    built: tuple[Case, InfluenceIndex],
) -> None:
    case, index = built
    answers = index.query([0, 2], [3], QueryOptions(k=4, rerank="exact", tokens=True))
    alone = InfluenceIndex.open(index.directory, case.task, device="cpu", batch_size=1)
    singles = alone.query([0, 2], [3], QueryOptions(k=4, rerank="exact", tokens=True))
    for answer, single in zip(answers, singles, strict=True):
        assert answer.hits
        for hit, other in zip(answer.hits, single.hits, strict=True):
            assert hit.tokens is not None and other.tokens is not None
            size = np.abs(hit.tokens).sum()
            assert hit.row == other.row
            assert len(hit.tokens) == len(make_rows(N_TRAIN, 1)[hit.row][0])
            np.testing.assert_allclose(hit.tokens, other.tokens, atol=1e-5 * size)
            assert abs(sum(hit.tokens) - hit.score) <= 1e-5 * size
        best = answer.hits[0]
        found = explain(index, best.row, answer.members[0], answer.side, by="token")
        np.testing.assert_allclose(best.tokens, found.by_position(), atol=1e-5 * np.abs(best.tokens).sum())


@pytest.mark.parametrize(("row", "query", "side"), [(4, 1, "query"), (0, 6, "train"), (5, 5, "train")])
def test_a_score_with_a_curvature_matrix_is_split_over_both_examples(
    built: tuple[Case, InfluenceIndex], row: int, query: int, side: SideName
) -> None:
    """The parts of the query are those of its gradients along A⁻¹ of the row's gradient."""
    case, index = built
    found = explain(index, row, query, side, by="token", score="fisher", damping=0.05)
    train, queries = make_rows(N_TRAIN, 1), make_rows(N_QUERY, 2)
    mine, theirs = train[row], (queries if side == "query" else train)[query]
    true: dict[str, list[np.ndarray]] = {"row": [], "query": []}
    for net in case.nets:
        gradients = [compute_true_gradient(net, token_losses, one) for one in (*train, theirs)]
        names, sizes = list(gradients[0]), [p.numel() for p in gradients[0].values()]
        *grad_NP, query_P = (torch.cat([g.flatten() for g in each.values()]).double() for each in gradients)
        fisher = torch.stack(grad_NP).T @ torch.stack(grad_NP) / N_TRAIN
        inverse = torch.linalg.inv(fisher + 0.05 * torch.eye(len(fisher), dtype=torch.float64))
        # Without the row's own term in F, the product with it is 1 / (1 - leverage) times as large.
        factor = 1 / (1 - float(grad_NP[row] @ inverse @ grad_NP[row]) / N_TRAIN)
        root = float(query_P @ inverse @ query_P) ** 0.5
        for example, split, along_P in (("row", mine, query_P), ("query", theirs, grad_NP[row])):
            direction_P = factor * (inverse @ along_P) / root
            direction = dict(zip(names, direction_P.split(sizes), strict=True))
            true[example].append(compute_true_parts(net, token_losses, split, direction))
    for example, parts in true.items():
        size = sum(np.abs(part_T).sum() for part_T in parts)
        np.testing.assert_allclose(found.by_position(example), sum(parts), atol=2e-4 * size)  # type: ignore[arg-type]
    assert sum(found.by_position("query")) == pytest.approx(sum(found.by_position("row")), rel=1e-3)
    assert found.score == pytest.approx(explain(index, row, query, side, score="fisher", damping=0.05).score, rel=1e-3)


def test_the_progress_of_a_split_with_a_curvature_matrix_is_complete(built: tuple[Case, InfluenceIndex]) -> None:
    _, index = built
    seen: dict[str, list[tuple[int, int]]] = {}
    with InfluenceIndex.open(index.directory, index.task, device="cpu") as opened:
        progress = lambda stage, *at: seen.setdefault(stage, []).append(at)  # noqa: E731
        explain(opened, 4, 1, by="token", score="fisher", damping=0.05, progress=progress)
    assert list(seen) == ["curvature", "inverse curvature", "gradients"]
    for reports in seen.values():
        dones, totals = zip(*reports, strict=True)
        assert list(dones) == sorted(dones) and set(totals) == {dones[-1]}


def test_groups_and_contrasts_are_split_along_the_mean_gradients(built: tuple[Case, InfluenceIndex]) -> None:
    _, index = built
    options = QueryOptions(k=2, exact=True, tokens=True)
    for answers in (index.query([0, 1], options=options, together=True), index.contrast([0, 1], [2], options=options)):
        for hit in answers[0].hits:
            assert sum(hit.tokens or ()) == pytest.approx(hit.score, rel=1e-4, abs=1e-5 * np.abs(hit.tokens).sum())


def test_the_parts_of_a_stored_score_are_those_of_the_exact_score(built: tuple[Case, InfluenceIndex]) -> None:
    _, index = built
    (stored,) = index.query([1], options=QueryOptions(k=3, tokens=True, checkpoints=(1,)))
    (plain,) = index.query([1], options=QueryOptions(k=3, checkpoints=(1,)))
    assert [hit._replace(tokens=None) for hit in stored.hits] == list(plain.hits)
    for hit in stored.hits:
        (exact,) = exact_scores(index.runner, ("query", [1]), [hit.row], [1])[0]
        assert abs(sum(hit.tokens or ()) - exact) <= 1e-5 * np.abs(hit.tokens).sum()


def split(task: Task, row: int, query: int, checkpoint: int = 0) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Return the parts of a row along a query's gradient, without learning rates, and the gradient."""
    with TaskRunner(task, RunOptions(torch.device("cpu"), 4)).model("fp32") as model:
        model.load(checkpoint)
        direction = select_direction(compute_full_gradients(model, "query", [query]), 0)
        (part_T,) = TokenSplitter(model, "train").split([row], direction)
        return part_T, direction


@pytest.mark.parametrize("method", list(DIFFERENTIATE))
def test_every_method_gives_the_same_parts(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path, models.TinyGPT)
    monkeypatch.setattr(tokens, "DIFFERENTIATE", {method: DIFFERENTIATE[method]})
    part_T, direction = split(case.task, 3, 1)
    true_T = compute_true_parts(case.nets[0], token_losses, make_rows(N_TRAIN, 1)[3], direction)
    np.testing.assert_allclose(part_T, true_T, atol=1e-5 * np.abs(true_T).sum())


def distil(model: nn.Module, batch: Any) -> Tensor:
    """Return losses with targets that the model itself computes without a gradient."""
    with torch.no_grad():
        target = model(batch[0]).sigmoid()
    loss_BTV = F.binary_cross_entropy_with_logits(2 * model(batch[0]), target, reduction="none")
    return loss_BTV.sum(2) * (batch[1] != IGNORED)


class Opaque(torch.autograd.Function):
    """A function without forward mode whose backward cannot be differentiated."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, grad: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return grad * (1 - x.tanh().square())


def cap(model: nn.Module, batch: Any) -> Tensor:
    logits = Opaque.apply(model(batch[0]))
    return F.cross_entropy(logits.transpose(1, 2), batch[1], reduction="none", ignore_index=IGNORED)


@pytest.mark.parametrize(
    ("make_model", "losses", "lowest", "refused"),
    [
        (MODELS["tied gpt"], token_losses, 0, ["forward mode is not used .* do not sum"]),
        (models.TinyGPT, distil, 1, ["forward mode is not used .* do not sum"]),
        (models.TinyGPT, cap, 1, ["forward mode is not used", "two backward passes is not used"]),
    ],
    ids=["padding_idx as a token", "no_grad", "own function"],
)
def test_a_method_that_fails_or_disagrees_with_autograd_is_not_used(
    make_model: Any, losses: Any, lowest: int, refused: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(N_TRAIN, 1, lowest)
    if not lowest:
        rows[3] = (torch.tensor([0, 4, 0, 0, 6]), torch.tensor([0, IGNORED, 0, 0, 0]))
    fields = {"loss": lambda net, batch: losses(net, batch).sum(1), "token_losses": losses, "train_data": lambda: rows}
    case = make_case(tmp_path, make_model, query_data=lambda: rows[2:6], **fields)
    with caplog.at_level(logging.INFO, "tracin_ann.scoring.tokens"):
        part_T, direction = split(case.task, 3, 1)
    true_T = compute_true_parts(case.nets[0], losses, rows[3], direction)
    np.testing.assert_allclose(part_T, true_T, atol=1e-5 * np.abs(true_T).sum())
    assert len(caplog.messages) == len(refused)
    for message, pattern in zip(caplog.messages, refused, strict=True):
        assert re.search(pattern, message)


def test_learning_rates_of_parameters_scale_the_parts(tmp_path: Path) -> None:
    case = make_case(tmp_path, models.TinyGPT)
    rates = {"head.*": 0.4, "tokens.*": 0.0, "[!ht]*": 0.1}
    checkpoint = Checkpoint(tmp_path / "0.pt", rates)
    task = replace(case.task, checkpoints=[checkpoint])
    build(task, tmp_path / "index", SMALL)
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    row, query = make_rows(N_TRAIN, 1)[2], make_rows(N_QUERY, 2)[3]
    gradient = compute_true_gradient(case.nets[0], token_losses, query)
    scaled = {name: rates.get(f"{name.split('.')[0]}.*", 0.1) * grad for name, grad in gradient.items()}
    true_T = compute_true_parts(case.nets[0], token_losses, row, scaled)
    found = explain(index, 2, 3, by="token")
    np.testing.assert_allclose(found.by_position(), true_T, atol=1e-5 * np.abs(true_T).sum())


def margin_tokens(model: nn.Module, batch: Any) -> Tensor:
    has_target = batch[1] != IGNORED
    logit_BT = model(batch[0]).gather(2, batch[1].clamp_min(0).unsqueeze(2))[:, :, 0]
    return logit_BT * has_target


def margin(model: nn.Module, batch: Any) -> Tensor:
    return margin_tokens(model, batch).sum(1)


def test_a_query_loss_is_split_by_its_own_function_only(tmp_path: Path) -> None:
    case = make_case(tmp_path, models.TinyGPT, query_loss=margin)
    build(case.task, tmp_path / "index", SMALL)
    found = explain(InfluenceIndex.open(tmp_path / "index", case.task, device="cpu"), 2, 1, by="token")
    assert found.examples == ("row",)
    both = replace(case.task, query_token_losses=margin_tokens)
    index = InfluenceIndex.open(tmp_path / "index", both, device="cpu")
    split_too = explain(index, 2, 1, by="token")
    assert split_too.by_position() == found.by_position()
    true_T = sum(
        rate
        * compute_true_parts(
            net,
            margin_tokens,
            make_rows(N_QUERY, 2)[1],
            compute_true_gradient(net, token_losses, make_rows(N_TRAIN, 1)[2]),
        )
        for net, rate in zip(case.nets, RATES, strict=True)
    )
    np.testing.assert_allclose(split_too.by_position("query"), true_T, atol=1e-5 * np.abs(true_T).sum())
    # A training row as the query has the training loss.
    assert explain(index, 2, 3, "train", by="token").examples == ("row", "query")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_losses": loss}, r"does not return one loss per .*: got \(1,\) torch.float32"),
        ({"token_losses": lambda m, b: b[1]}, r"does not return one loss .*torch.int64, expected a floating-point"),
        ({"token_losses": lambda m, b: 2 * token_losses(m, b)}, "Task.token_losses does not sum to Task.loss over its"),
        ({"token_losses": lambda m, b: token_losses(m, b).detach()}, "gradients of Task.token_losses do not sum"),
        (
            {"query_loss": margin, "query_token_losses": token_losses},
            "Task.query_token_losses does not sum to Task.query_loss .* row 1 of query_data",
        ),
    ],
)
def test_losses_of_positions_that_do_not_split_the_loss_are_rejected(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = make_case(tmp_path, models.TinyGPT, **fields)
    build(case.task, tmp_path / "index", SMALL)
    with pytest.raises(TaskError, match=message) as error:
        explain(InfluenceIndex.open(tmp_path / "index", case.task, device="cpu"), 2, 1, by="token")
    assert "\n" not in str(error.value)


def test_a_task_without_losses_of_positions_is_rejected_before_the_search(tmp_path: Path) -> None:
    task = make_toy_task(tmp_path)
    build(task, tmp_path / "index", SMALL)
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    for ask in (lambda: explain(index, 0, 0, by="token"), lambda: index.query([0], options=QueryOptions(tokens=True))):
        with pytest.raises(UsageError, match="cannot be split by token: got a task without token_losses"):
            ask()
    with pytest.raises(UsageError, match="--cosine"):
        QueryOptions(tokens=True, cosine=True)
    with pytest.raises(TaskError, match="Task.token_losses is not callable"):
        replace(task, token_losses=3)  # type: ignore[arg-type]


def test_parts_are_matched_with_the_texts_of_tokens() -> None:
    assert list(match_tokens(["a", "b"], [1.0, 2.0])) == [("a", 1.0), ("b", 2.0)]
    assert list(match_tokens(["a", "b"], [1.0])) == [("a", 1.0), ("b", 0.0)]
    assert list(match_tokens(["a"], [1.0, 0.0, 3.0, 0.0])) == [("a", 1.0), ("1", 0.0), ("2", 3.0)]
    assert list(match_tokens(None, [1.0, 0.0])) == [("0", 1.0)]


NAMED = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_token_attribution import models, make_case
from tracin_ann import Task
def task(folder) -> Task:
    return make_case(Path(folder), models.TinyGPT).task
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("token-commands")
    (directory / "of_tokens.py").write_text(NAMED.format(paths=[str(SUPPORT), str(Path(__file__).parent)]))
    build(make_case(directory, models.TinyGPT).task, directory / "index", SMALL)
    return directory


@pytest.fixture(scope="module")
def index(folder: Path) -> InfluenceIndex:
    return InfluenceIndex.open(folder / "index", make_case(folder, models.TinyGPT).task, device="cpu")


def run(command: Any, folder: Path, *arguments: object) -> Result:
    words = [folder / "index", "--task", folder / "of_tokens.py:task", "--task-arg", f"folder={folder}", *arguments]
    done = CliRunner().invoke(command, [str(word) for word in (*words, "--device", "cpu")], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.stderr
    return done


def test_the_command_writes_the_parts_in_every_format(folder: Path, index: InfluenceIndex, tmp_path: Path) -> None:
    found = explain(index, 3, 2, by="token")
    words = ("--train-id", 3, "--id", 2, "--by", "token")
    lines = run(explain_command, folder, *words, "--format", "jsonl")
    assert [json.loads(line) for line in lines.stdout.splitlines()] == found.lines()
    assert f"exact score:  {found.score:+.6g} of row 3 for query 2" in lines.stderr
    table = run(explain_command, folder, *words).stdout
    for example in found.examples:
        for position, (token, part) in enumerate(found.by_token(example)):
            assert any(
                [cell.strip() for cell in line.split("│")][:3] == [str(position), token, f"{part:+.4g}"]
                for line in table.splitlines()
            )
    run(explain_command, folder, *words, "--output", tmp_path / "parts.csv")
    assert (tmp_path / "parts.csv").read_text().splitlines()[0] == ",".join(TokenExplanation.FIELDS.names)
    pd = pytest.importorskip("pandas")
    run(explain_command, folder, *words, "--output", tmp_path / "parts.parquet")
    frame = pd.read_parquet(tmp_path / "parts.parquet")
    for example in found.examples:
        assert frame[frame["example"] == example]["contribution"].sum() == pytest.approx(found.score, rel=1e-4)


def test_the_report_shades_the_tokens(folder: Path, index: InfluenceIndex, tmp_path: Path) -> None:
    run(explain_command, folder, "--train-id", 3, "--id", 2, "--by", "token", "--html", tmp_path / "pair.html")
    page, found = Page(tmp_path / "pair.html"), explain(index, 3, 2, by="token")
    shades = [attributes["title"] for tag, attributes in page.elements if tag == "mark"]
    assert shades == [f"{part:+.3g}" for example in found.examples for _, part in found.by_token(example)]
    answers = index.query([0], options=QueryOptions(k=2, tokens=True))
    page = Page(write_report(answers, tmp_path / "answers.html", index))
    shades = [attributes["title"] for tag, attributes in page.elements if tag == "mark"]
    assert shades == [f"{part:+.3g}" for hit in answers[0].hits for part in hit.tokens or ()]
    # Without descriptions of the tokens, the positions are shown, beside the text.
    plain = replace(index.task, describe=lambda row: "the text of a row")
    other = InfluenceIndex.open(index.directory, plain, device="cpu")
    page = Page(write_report(other.query([0], options=QueryOptions(k=2, tokens=True)), tmp_path / "p.html", other))
    assert [a["title"] for tag, a in page.elements if tag == "mark"] == shades
    assert "the text of a row" in page.text


def test_the_lines_of_hits_have_tokens_only_on_request(folder: Path, tmp_path: Path) -> None:
    plain = json.loads(run(query_command, folder, "--ids", 1, "-k", 2, "--format", "jsonl").stdout)
    split_line = json.loads(run(query_command, folder, "--ids", 1, "-k", 2, "--tokens", "--format", "jsonl").stdout)
    for kind in ("proponents", "opponents"):
        for hit, other in zip(split_line[kind], plain[kind], strict=True):
            assert len(hit["tokens"]) == len(make_rows(N_TRAIN, 1)[hit["row"]][0])
            assert {name: value for name, value in hit.items() if name != "tokens"} == other
    for flags, fields in (((), HITS), (("--tokens",), choose_fields(tokens=True, amounts=False))):
        run(query_command, folder, "--ids", 1, "-k", 2, *flags, "--output", tmp_path / "hits.csv")
        assert (tmp_path / "hits.csv").read_text().splitlines()[0] == ",".join(fields.names)
    shown = run(query_command, folder, "--ids", 1, "-k", 1, "--tokens").stdout
    best = split_line["proponents"][0]
    at = max(range(len(best["tokens"])), key=lambda t: abs(best["tokens"][t]))
    assert f"{WORDS[make_rows(N_TRAIN, 1)[best['row']][0][at]]} {best['tokens'][at]:+.2g}" in shown


def pad_texts(rows: list[Tensor]) -> dict[str, Tensor]:
    index = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (index > 0).long()
    return {"input_ids": index, "attention_mask": mask, "labels": index.masked_fill(mask == 0, IGNORED)}


def language_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the losses of a causal model at the target's position, or of a sequence-to-sequence model."""
    logits, labels = model(**batch).logits, batch["labels"]
    if model.config.is_encoder_decoder:
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    shifted = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
    return F.pad(shifted, (1, 0))


def make_language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "pad_token_id": 0}
    if kind == "llama":
        config = transformers.LlamaConfig(
            **sizes,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        return transformers.LlamaForCausalLM(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.T5Config(
        **sizes, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_parts_of_models_of_transformers(kind: str, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 20, (length,), generator=g) for length in (6, 3, 6, 8, 4)]
    case = make_case(
        tmp_path,
        lambda: make_language_model(kind),
        loss=lambda net, batch: language_losses(net, batch).sum(1),
        token_losses=language_losses,
        train_data=lambda: rows,
        query_data=lambda: rows[3:],
        collate=pad_texts,
        describe=None,
    )
    with TaskRunner(case.task, RunOptions(torch.device("cpu"), 4)).model("fp32") as model:
        model.load(1)
        direction = select_direction(compute_full_gradients(model, "query", [0]), 0)
        found = TokenSplitter(model, "train").split(range(len(rows)), direction)
        together = compute_full_gradients(model, "train", range(len(rows)))
    for place, (row, part_T) in enumerate(zip(rows, found, strict=True)):
        true_T = compute_true_parts(case.nets[1], language_losses, row, direction, pad_texts)
        size = np.abs(true_T).sum()
        np.testing.assert_allclose(part_T, true_T, atol=1e-5 * size)
        product = sum(float(together[name][place].double() @ v.double()) for name, v in direction.items())
        assert abs(part_T.sum() - product) <= 1e-5 * size
