"""The numbers that the examples state: wrong digits found, recall of true proponents and opponents."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common.brute_force import compute_recalls, compute_scores, find_top
from examples import digits, mnist, tabular
from paths import ROOT
from tracin_ann import BuildConfig, InfluenceIndex, QueryOptions, build
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams, search_both
from tracin_ann.search.settings import Setting

ROWS, QUERIES, K = 5000, 50, 10
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_wrong_digits_are_found_early(tmp_path: Path, seed: int) -> None:
    accuracy = digits.train(tmp_path, seed)
    assert accuracy > 0.9
    task = digits.task(str(tmp_path), str(seed))
    build(task, tmp_path / "index")
    ranking = [int(row.id) for row in InfluenceIndex.open(tmp_path / "index", task).self_influence()]
    assert sorted(ranking) == list(range(digits.N_TRAIN))
    assert digits.find_share(ranking, digits.data(seed)[2], 0.2) >= 0.95


SLOW = ("cifar10", "shakespeare", "trainer_run")
SMALL = [
    ("cifar10", "--rows=30", r"test image \d+: \w+, classified as \w+\n  proponents: \d+ \w+ \+"),
    ("mnist", "--rows=100", r"test digit 0, labelled \d\n  proponents: \d+ \(\d\), "),
    ("shakespeare", "--rows=60", r"\n\d+: .+\n  \+\d\.\d{5} +\d+: .+(.|\n)+ largest part of the first score: \w+"),
    (
        "sst2",
        "--rows=300",
        r"\ndev-1, \w+: .+\n +\+\d+\.\d{3}  train-\d+, \w+: (.|\n)+ most suspicious labels, \d+% are",
    ),
    ("trainer_run", "--rows=64", r"\ndev sentence 0, \w+: .+\n +\+\d+\.\d{4}  \w+: "),
]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in SLOW else [], id=case[0]) for case in SMALL],
)
def test_the_examples_print_answers_and_write_reports(
    name: str, rows: str, message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "trainer_run":
        pytest.importorskip("accelerate")
    importlib.import_module(f"examples.{name}").main(["--data", str(data_dir), "--out", str(tmp_path), rows])
    read_answer(capsys.readouterr().out, message)


def test_the_table_example_prints_answers_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tabular.main(["--out", str(tmp_path)])
    read_answer(capsys.readouterr().out, r"\ntumour-\d+, \w+: .+\n +\+\d+\.\d{3}  tumour-\d+, \w+: ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_the_lightning_example_prints_answers_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lightning")
    importlib.import_module("examples.lightning_run").main(["--out", str(tmp_path / "run")])
    read_answer(
        capsys.readouterr().out, r" checkpoints: step-1, .*\n\ntest digit \d+, a \d\n +\+\d+\.\d{3}  \d+, a \d\n"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_example_of_an_adapter_prints_answers_and_writes_a_report(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("peft", "transformers", "accelerate"):
        pytest.importorskip(package)
    options = ["--data", str(data_dir), "--out", str(tmp_path), "--rows=60"]
    importlib.import_module("examples.lora_run").main(options)
    read_answer(capsys.readouterr().out, r"adapter of 30,720 parameters on 60 (.|\n)+\n0: .+\n +\+\d+\.\d{4} +\d+: ")


def read_answer(printed: str, said: str) -> None:
    assert re.search(said, printed), printed
    report = re.search(r"(\S+/report\.html)$", printed, re.M)
    assert report is not None
    assert "<!doctype html" in Path(report[1]).read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("name", ["digits", "tabular", "lora_run", *(name for name, *_ in SMALL)])
def test_the_tasks_are_short(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    found = re.search(r"^# The task: .*\n(?P<task>(.*\n)*?)(?=# Its data|# Training)", text, re.M)
    assert found is not None
    assert len([line for line in found["task"].splitlines() if line.strip()]) <= 40


class Mnist:
    """A trained CNN with its index, and brute-force TracInCP over all its parameters."""

    def __init__(self, path: str, folder: Path) -> None:
        mnist.train(path, str(folder), ROWS, 0)
        self.task = mnist.task(path, str(folder), str(ROWS))
        build(self.task, folder / "index", BuildConfig(dim=1024))
        self.index = InfluenceIndex.open(folder / "index", self.task)
        self.scores = compute_scores(self.task, range(QUERIES), ROWS)

    def recall(self, options: QueryOptions) -> tuple[float, float]:
        answers = self.index.query(range(QUERIES), options=options)
        up = [[int(hit.id) for hit in answer.proponents] for answer in answers]
        down = [[int(hit.id) for hit in answer.opponents] for answer in answers]
        pairs = ((self.scores, up), (-self.scores, down))
        first, second = (float(compute_recalls(find_top(s, K), found).mean()) for s, found in pairs)
        return first, second


@pytest.fixture(scope="session")
def cnn(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Mnist:
    if not (data_dir / "mnist.npz").is_file():
        pytest.skip(f"no mnist.npz in {data_dir}")
    return Mnist(str(data_dir / "mnist.npz"), tmp_path_factory.mktemp("mnist"))


@pytest.mark.slow
@pytest.mark.xdist_group("mnist")
def test_the_stored_features_recall_true_tracin(cnn: Mnist) -> None:
    assert sum(p.numel() for p in cnn.task.model().parameters()) >= 200_000
    proponents, opponents = cnn.recall(QueryOptions(k=K))
    assert proponents >= 0.80
    assert opponents >= 0.80


@pytest.mark.slow
@pytest.mark.xdist_group("mnist")
def test_exact_rescoring_has_a_recall_close_to_one(cnn: Mnist) -> None:
    proponents, opponents = cnn.recall(QueryOptions(k=K, rerank="exact", candidates=200))
    assert proponents >= 0.99
    assert opponents >= 0.99


@pytest.mark.slow
@pytest.mark.xdist_group("mnist")
def test_inverted_lists_recall_the_scan_on_real_features(cnn: Mnist) -> None:
    view = cnn.index.view()
    queries_QF = cnn.index.features("query", range(QUERIES))
    exact = search_both(FlatIndex(view, torch.device("cpu")), queries_QF, K)
    found = search_both(
        IVFIndex.build(view, IVFParams(), torch.device("cpu")).with_settings(Setting(300, 300, 0.1)), queries_QF, K
    )
    for true, given, least in zip(exact, found, (0.95, 0.99), strict=True):
        assert compute_recalls(np.stack(true.ids), [row.tolist() for row in given.ids]).mean() >= least
        assert given.rows_scored.mean() <= 0.15 * ROWS  # with few rows, the centroids alone are about 6%


def test_files_of_torchvision_are_read(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (7, 28, 28), np.uint8), random.integers(0, 10, 7, np.uint8)
    for part in ("train", "t10k"):
        header = b"\0\0\x08\x03" + np.array([7, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + np.array([7], ">i4").tobytes() + labels.tobytes()
        )
    arrays = mnist.read(str(tmp_path))
    assert {name: array.shape for name, array in arrays.items()} == {
        "x_train": (7, 28, 28), "y_train": (7,), "x_test": (7, 28, 28), "y_test": (7,),
    }  # fmt: skip
    assert (arrays["x_test"] == pixels).all()
    assert (arrays["y_train"] == labels).all()
