"""A report is one file with all of its results, for every type of example and every content of their text."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from images import draw_image
from pages import Page
from paths import SUPPORT
from tasks.toy import CONFIG, RATES, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, Description, InfluenceIndex, QueryOptions, Task, build, write_report
from tracin_ann.cli.query import main as query_command
from tracin_ann.errors import MissingPackageError, TaskError, UsageError
from tracin_ann.report.examples import infer_description
from tracin_ann.report.images import EDGE, PageImages, to_pixels
from tracin_ann.report.views import draw_bars
from tracin_ann.results.formats import Fields
from tracin_ann.results.lists import Answers, RankedRows, RowList

N, QUERIES = 24, 6
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


DESCRIBED: dict[str, Callable[[Any], str | Description] | None] = {
    "images": lambda row: Description(text=f"a {row[1]}", image=draw_image(row)),
    "text": lambda row: f"{row[1]} {NASTY}",
    "tokens": lambda row: Description(tokens=["so", "<b>", "good"], token_scores=[0.1, -2.0, 1.0]),
    "table": lambda row: Description(table={"<i>": NASTY, "x": float(row[0][0]), "n": row[1]}),
    "plain": None,
}


def make_task(folder: Path, kind: str) -> Task:
    paths = [folder / f"checkpoint{c}.pt" for c in range(len(RATES))]
    if not all(path.is_file() for path in paths):
        save_checkpoints(Toy(), folder)
    return make_toy_task(
        folder,
        checkpoints=[Checkpoint(path, rate) for path, rate in zip(paths, RATES, strict=True)],
        train_data=lambda: make_rows(N),
        query_data=lambda: make_rows(QUERIES, 2),
        columns=lambda row: {"label": f"<{row[1]}>"},
        describe=DESCRIBED[kind],
    )


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, InfluenceIndex]:
    folder = tmp_path_factory.mktemp("report")
    build(make_task(folder, "plain"), folder / "index", CONFIG)
    return {kind: InfluenceIndex.open(folder / "index", make_task(folder, kind), device="cpu") for kind in DESCRIBED}


def run_query(index: InfluenceIndex, **options: Any) -> Answers:
    return index.query(range(4), options=QueryOptions(**{"k": 5, **options}))


def test_a_page_contains_the_answers(indexes: dict[str, InfluenceIndex], tmp_path: Path) -> None:
    index = indexes["images"]
    answers = run_query(index)
    page = Page(write_report(answers, tmp_path / "r.html", index, "A <title>"))
    assert "A <title>" in page.texts
    hits = [hit for answer in answers for hit in answer.hits]
    assert len(page.find_class("hit")) == len(hits)
    for hit in hits:
        assert f"{abs(hit.score):.4g}" in page.text
        assert hit.error is None or f"± {hit.error:.2g}" in page.text
    assert index.manifest.quality_summary in page.text
    assert all(answer.how in page.text for answer in answers)
    parts = [a["aria-label"] or "" for _, a in page.elements if (a.get("class") or "").strip() == "cp"]
    assert parts == [
        ", ".join(f"checkpoint{c} {part:+.3g}" for c, part in enumerate(hit.by_checkpoint)) for hit in hits
    ]


def test_losses_equal_those_of_the_task_at_each_checkpoint(indexes: dict[str, InfluenceIndex], tmp_path: Path) -> None:
    index = indexes["text"]
    answers = index.query([0, 3], [7], QueryOptions(k=2))
    page = Page(write_report(answers, tmp_path / "r.html", index))
    message = [a["aria-label"] for a in page.find_class("loss")]
    wanted = []
    for side, row in (("query", 0), ("query", 3), ("train", 7)):
        found = []
        for checkpoint in index.task.checkpoints:
            model = index.task.model()
            model.load_state_dict(torch.load(checkpoint.path, weights_only=True))
            x, y = (index.task.train_data() if side == "train" else index.task.query_data())[row]
            found.append(torch.nn.functional.cross_entropy(model(x[None]), torch.tensor([y])).item())
        wanted.append(", ".join(f"checkpoint{c} {loss:+.3g}" for c, loss in enumerate(found)))
    assert message == wanted


@pytest.mark.parametrize("kind", list(DESCRIBED))
def test_every_kind_of_example_is_data_and_never_markup(
    indexes: dict[str, InfluenceIndex], tmp_path: Path, kind: str
) -> None:
    index = indexes[kind]
    for results in [run_query(index)] + [index.self_influence(4)] * (kind == "table"):
        page = Page(write_report(results, tmp_path / "r.html", index))
        tags = {tag for tag, _ in page.elements}
        assert not tags & {"img", "b>", "i>"}
        assert len(page.scripts) == 2
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
        json.loads(page.scripts[0])
    if kind in ("text", "table"):
        assert NASTY in " ".join(page.texts)
    if kind == "tokens":
        marks = [(a["title"], "n" in (a.get("class") or "")) for tag, a in page.elements if tag == "mark"]
        assert set(marks) == {("+0.1", False), ("-2", True), ("+1", False)}
        assert "<b>" in " ".join(page.texts)
        assert "(-2)" in page.text
    if kind == "plain":
        assert "(5), " in page.text


def test_a_page_refers_to_nothing_outside_of_it(indexes: dict[str, InfluenceIndex], tmp_path: Path) -> None:
    page = Page(write_report(run_query(indexes["images"]), tmp_path / "r.html", indexes["images"]))
    links = [a.get(name) or "" for _, a in page.elements for name in ("src", "href", "xlink:href", "action")]
    assert [link for link in links if link and link[0] != "#" and not link.startswith("data:")] == []
    assert all(url.startswith(("data:", "#")) for url in re.findall(r"url\(\"?([^)\"]*)", page.source))
    policy = next(a["content"] for _, a in page.elements if "Security" in (a.get("http-equiv") or ""))
    assert "default-src 'none'" in str(policy)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    known = {f"#{name}" for name in ids}
    assert {link for link in links if link.startswith("#")} <= known


def test_an_image_is_in_the_file_once(indexes: dict[str, InfluenceIndex], tmp_path: Path) -> None:
    index = indexes["images"]
    page = Page(write_report(run_query(index), tmp_path / "r.html", index))
    embedded = re.findall(
        r"^\.(p\d+)\{background-image:url\(data:image/png;base64,(.*)\)\}$", page.source, re.MULTILINE
    )
    assert len(embedded) == 3 == len({data for _, data in embedded})
    worn = [a for a in page.find_class("pic") if a.get("role") == "img"]
    assert len(worn) == len(page.find_class("hit")) + 4
    pixels = {np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).tobytes() for _, data in embedded}
    assert pixels == {draw_image((None, label)).tobytes() for label in range(3)}
    assert all(str(a["aria-label"]).startswith("image: label <") for a in worn)


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (np.array([[0, 255]], np.uint8), [[0, 255]]),
        (torch.tensor([[[0.0, 1.0]]]), [[0, 255]]),
        (torch.tensor([[[-1.0, 1.0]]]), [[0, 255]]),
        (torch.tensor([[[0.0, 0.5, 1.0]]], dtype=torch.bfloat16, requires_grad=True), [[0, 128, 255]]),
        (np.array([[0, 128]]), [[0, 128]]),
        (np.array([[False, True]]), [[0, 255]]),
        (np.array([[0, 1000]]), [[0, 255]]),
        (np.full((2, 1), 3.0), [[0], [0]]),
        (np.zeros((3, 1, 2)), np.zeros((1, 2, 3))),
        (np.zeros((1, 2, 3)), np.zeros((2, 3))),
        (np.zeros((4, 2, 3)), np.zeros((4, 2, 3))),
    ],
)
def test_pixels_of_an_image(image: Any, wanted: Any) -> None:
    assert np.array_equal(to_pixels(image), np.array(wanted))
    assert to_pixels(image).dtype == np.uint8


@pytest.mark.parametrize("image", [np.zeros(3), np.zeros((2, 2, 2)), np.zeros((0, 2)), np.array([[0.0, np.nan]])])
def test_a_page_reports_what_is_not_an_image(
    indexes: dict[str, InfluenceIndex], tmp_path: Path, image: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="an image"):
        to_pixels(image)
    index = indexes["images"]
    monkeypatch.setitem(index.task.__dict__, "describe", lambda row: Description(text="t", image=image))
    page = Page(write_report(index.self_influence(2), tmp_path / "r.html", index))
    assert "not shown: an image" in page.text


def test_images_over_the_budget_are_scaled_and_a_note_reports_it() -> None:
    random = np.random.default_rng(0)
    images = PageImages(budget=40_000)
    names = [images.add(random.integers(0, 256, (300, 200, 3), np.uint8)) for _ in range(3)]
    css = images.css()
    assert names == ["p0", "p1", "p2"]
    assert len(css) < 41_000
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in re.findall("base64,(.*?)\\)", css)]
    assert len(set(sizes)) == 1 and max(sizes[0]) < EDGE
    assert f"{max(sizes[0])} pixels" in images.note


@pytest.mark.parametrize(
    ("example", "text", "table", "image"),
    [
        ((torch.zeros(1, 4, 4), 3), None, None, True),
        ((torch.zeros(3, 4, 4), 3), None, None, True),
        ((torch.zeros(2, 4, 4), 3), "[0, 0, 0, 0, 0, 0, …] (2 x 4 x 4), 3", None, False),
        (("words", 1), "words", None, False),
        ({"age": 3, "name": "x", "when": None}, None, {"age": 3, "name": "x"}, False),
        (({"age": 3}, 1), None, {"age": 3}, False),
        ({"image": torch.zeros(1, 2, 2), "label": torch.tensor(3)}, None, {"label": torch.tensor(3)}, True),
        ((torch.tensor([1, 2]), 1), "[1, 2] (2), 1", None, False),
        (None, "None", None, False),
    ],
)
def test_descriptions_are_inferred_from_types(example: Any, text: str | None, table: Any, image: bool) -> None:
    shown = infer_description(example)
    assert (shown.text, shown.table, shown.image is not None) == (text, table, image)


@pytest.mark.parametrize("scores", [[1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_token_scores_fit_their_tokens(scores: list[float]) -> None:
    with pytest.raises(TaskError, match="token_scores"):
        Description(tokens=["a", "b"], token_scores=scores)


def test_groups_and_contrasts(indexes: dict[str, InfluenceIndex], tmp_path: Path) -> None:
    index = indexes["images"]
    group = Page(write_report(index.query([0, 1, 2], together=True), tmp_path / "g.html", index))
    assert "Mean of 3 rows" in group.text and "mean loss" in group.text
    answers = index.contrast([0, 1], [2], options=QueryOptions(k=2))
    contrast = Page(write_report(answers, tmp_path / "c.html", index))
    hit = answers[0].proponents[0]
    assert "First set: 2 rows" in contrast.text and "Second set: 1 row" in contrast.text
    assert "Favour the first set" in contrast.text
    assert f"first set {hit.of_means[0]:+.4g}".replace("-", "\N{MINUS SIGN}") in contrast.text


def test_exact_scores_and_some_checkpoints(indexes: dict[str, InfluenceIndex], tmp_path: Path) -> None:
    index = indexes["text"]
    options = {"rerank": "exact", "candidates": 8, "checkpoints": (1,)}
    answers = run_query(index, **options)
    named = Page(write_report(answers, tmp_path / "r.html", index, checkpoints=(1,)))
    assert "scores are exact" in named.text
    assert all(str(a["aria-label"]).startswith("checkpoint1 ") for a in named.find_class("cp"))
    unnamed = Page(write_report(answers, tmp_path / "r.html", index))
    assert all(str(a["aria-label"]).startswith("part 1 ") for a in unnamed.find_class("cp")) and not unnamed.find_class(
        "loss"
    )


def test_a_page_of_suspects(indexes: dict[str, InfluenceIndex], tmp_path: Path) -> None:
    index = indexes["images"]
    ranked = index.self_influence(5)
    page = Page(write_report(ranked, tmp_path / "r.html", index))
    data = json.loads(page.scripts[0])
    assert [row["row"] for row in data["rows"]] == [row.row for row in ranked]
    assert data["rows"][0] == {
        **{"rank": 1, "id": ranked[0].id, "row": ranked[0].row, "label": f"<{ranked[0].row % 3}>"},
        **{"score": ranked[0].score, "text": f"a {ranked[0].row % 3}"},
    }
    answer = index.query((), [ranked[0].row], QueryOptions(k=9, cosine=True))[0]
    first = re.search(r'<article.*?id="s0".*?</article>', page.source, re.DOTALL)
    assert first is not None
    ids = re.findall(r'class="id">(\d+)<', first[0])
    wanted = [[h.row for h in hits if h.row != ranked[0].row][:8] for hits in (answer.proponents, answer.opponents)]
    assert ids == [str(row) for row in sum(wanted, [])]


class Odd(RowList[dict[str, Any]]):
    """Results that are not training rows."""

    FIELDS = Fields((("row", "int"), ("other", "int"), ("alike", "float")))

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        return row


class Votes(Odd):
    """Suspects with a suggested label."""

    FIELDS = Fields(
        tuple(
            (name, "text") for name in ("rank", "id", "row", "label", "score", "suggested_label", "support", "hidden")
        )
    )
    DATA_ONLY = ("hidden",)


def test_other_lists_become_tables_or_suspects(indexes: dict[str, InfluenceIndex], tmp_path: Path) -> None:
    index = indexes["text"]
    pairs = Odd([{"row": None, "other": 2, "alike": 0.5}], index.describe)
    table = Page(write_report(pairs, tmp_path / "t.html", index))
    assert "0.5" in table.text and not table.find_class("item")
    record = {
        "rank": 1,
        "id": "x",
        "row": 3,
        "label": "cat",
        "score": float("nan"),
        "suggested_label": "dog",
        "support": 0.8,
    }
    record["hidden"] = "not shown"
    page = Page(write_report(Votes([record], index.describe), tmp_path / "v.html", index))
    assert "suggested label dog" in page.text and "support 0.8" in page.text and "labelled cat" in page.text
    assert "not shown" not in page.text
    assert json.loads(page.scripts[0])["rows"][0]["score"] is None
    empty = Page(write_report(RankedRows([], index.describe), tmp_path / "e.html", index))
    assert "0 training rows" in empty.text


def test_a_report_is_complete_or_absent(
    indexes: dict[str, InfluenceIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = indexes["images"]
    path = tmp_path / "r.html"
    path.write_text("before")

    def fails(row: Any) -> str:
        raise RuntimeError("describe fails")

    monkeypatch.setitem(index.task.__dict__, "describe", fails)
    with pytest.raises(RuntimeError, match="describe fails"):
        write_report(run_query(index), path, index)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "PIL"])
def test_a_missing_package_names_the_extra(
    indexes: dict[str, InfluenceIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    index = indexes["images"]
    answers = run_query(index)
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tracin-ann\[report\]'"):
        write_report(answers, tmp_path / "r.html", index)
    assert list(tmp_path.iterdir()) == []


def test_bars_leave_out_what_is_not_finite() -> None:
    chart = draw_bars([1.0, float("nan"), -0.5], ["a", "b", "c"], 1.0)
    assert chart.text == "a +1, b +nan, c -0.5"
    assert chart.positive.count("M") == chart.negative.count("M") == 1


def test_the_query_command_writes_a_page(tmp_path: Path) -> None:
    (tmp_path / "report_page_task.py").write_text(
        f"import sys\nsys.path[:0] = {[str(SUPPORT), str(Path(__file__).parent)]!r}\nfrom pathlib import Path\n"
        "from test_report import make_task\ndef task(folder):\n    return make_task(Path(folder), 'images')\n"
    )
    build(f"{tmp_path / 'report_page_task.py'}:task", tmp_path / "index", CONFIG, arguments={"folder": str(tmp_path)})
    runner, page = CliRunner(), tmp_path / "r.html"
    named = f"{tmp_path / 'report_page_task.py'}:task"
    command = [str(tmp_path / "index"), "--device", "cpu", "--task", named, "--task-arg", f"folder={tmp_path}"]
    done = runner.invoke(query_command, [*command, "--ids", "0-2", "--html", str(page)], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"report: {page}" in done.stderr
    assert len(Page(page).find_class("item")) == 3
    both = [*command, "--self-influence", "-k", "3", "--html", str(page), "--format", "jsonl"]
    done = runner.invoke(query_command, both, catch_exceptions=False)
    assert len(done.stdout.splitlines()) == 3 == len(Page(page).find_class("item"))
    nowhere = [*command, "--ids", "0", "--html", str(tmp_path / "no" / "r.html")]
    done = runner.invoke(query_command, nowhere)
    assert done.exit_code == UsageError.exit_code
    assert "the folder of the report does not exist" in done.stderr
