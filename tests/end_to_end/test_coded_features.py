"""Indexes whose features are codes of 8 to 1 bits: scores, norms, growth, verification, audits, sizes, predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import oracle
from blocks import CODES
from tasks.toy import cross_entropy
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build, plan
from tracin_ann.cli.build import main as build_command
from tracin_ann.cli.info import main as info_command
from tracin_ann.errors import IndexMismatchError
from tracin_ann.operations import remove
from tracin_ann.operations.verification import AuditSample, audit, repair, restore_config, verify
from tracin_ann.store import FEATURES, Dtype, FeatureStore, measure_row_bytes, noise_ratio
from wrong_rows import alter_rows

N, QUERIES, RATES = 150, 12, (0.5, 0.125)
CONFIG = BuildConfig(
    dim=600, batch_size=25, device="cpu", index="flat", partition_rows=50, yardstick=False, norms="exact"
)


def make_rows(n: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, generator=g)
    return [(x[i], int(x[i, 0] > 0) + 2 * int(x[i, 1] > 0)) for i in range(n)]


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4))


def make_task(folder: Path, n_rows: int = N) -> Task:
    for i in range(2):
        torch.manual_seed(i)
        torch.save(make_net().state_dict(), folder / f"{i}.pt")
    return Task(
        model=make_net,
        loss=cross_entropy,
        train_data=lambda: make_rows(n_rows, 1),
        query_data=lambda: make_rows(QUERIES, 2),
        checkpoints=[Checkpoint(str(folder / f"{i}.pt"), learning_rate=rate) for i, rate in enumerate(RATES)],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


@pytest.fixture(scope="module")
def true_scores(folder: Path) -> np.ndarray:
    nets = []
    for checkpoint in make_task(folder).checkpoints:
        net = make_net()
        net.load_state_dict(torch.load(checkpoint.path, weights_only=True))
        nets.append(net)
    asked, train = (
        [oracle.gradients(net, cross_entropy, rows) for net in nets]
        for rows in (make_rows(QUERIES, 2), make_rows(N, 1))
    )
    return oracle.tracin(torch.stack(asked, 1), torch.stack(train, 1), RATES)


@pytest.fixture(scope="module", params=CODES)
def index(request: pytest.FixtureRequest, folder: Path) -> InfluenceIndex:
    out = folder / request.param
    build(make_task(folder), out, replace(CONFIG, dtype=request.param, yardstick=True))
    return InfluenceIndex.open(out, make_task(folder), device="cpu")


def dtype_of(index: InfluenceIndex) -> Dtype:
    return index.manifest.build.layout.dtype


def read_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / FEATURES).glob("*.h5"))}


def test_scores_are_those_of_the_decoded_rows(index: InfluenceIndex) -> None:
    row_NF = index.view().take(np.arange(N)).astype(np.float64)
    query_QF = index.features("query", range(QUERIES)).astype(np.float64)
    expected_QN = query_QF @ row_NF.T
    answers = index.query(range(QUERIES), options=QueryOptions(k=N))
    for expected_N, answer in zip(expected_QN, answers, strict=True):
        hits = [*answer.proponents, *answer.opponents]
        assert len(hits) == N
        np.testing.assert_allclose([hit.score for hit in hits], expected_N[[hit.row for hit in hits]], rtol=1e-4)
        assert [hit.row for hit in answer.proponents] == [i for i in np.argsort(-expected_N) if expected_N[i] > 0]


def test_scores_have_no_bias_and_their_error_bars_include_rounding(
    index: InfluenceIndex, true_scores: np.ndarray
) -> None:
    answers = index.query(range(QUERIES), options=QueryOptions(k=N))
    off, bars, true = np.array(
        [
            (hit.score - true_scores[q, hit.row], hit.error, true_scores[q, hit.row])
            for q, answer in enumerate(answers)
            for hit in (*answer.proponents, *answer.opponents)
        ]
    ).T
    slope = ((off + true) @ true) / (true @ true)
    assert abs(slope - 1) < 0.06
    assert 0.8 < np.sqrt(np.mean((off / bars) ** 2)) < 1.25
    assert index.manifest.fidelity is not None and 0.5 < index.manifest.fidelity.error_scale < 1.5


def test_self_influence_and_exact_scores_do_not_depend_on_the_codes(
    index: InfluenceIndex, folder: Path, true_scores: np.ndarray
) -> None:
    found = {row.row: row.score for row in index.self_influence()}
    exact = {row.row: row.score for row in index.self_influence(exact=True)}
    np.testing.assert_allclose([found[i] for i in range(N)], [exact[i] for i in range(N)], rtol=1e-4)
    (answer,) = index.query([3], options=QueryOptions(k=N, exact=True))
    for hit in (*answer.proponents, *answer.opponents):
        assert hit.score == pytest.approx(true_scores[3, hit.row], rel=1e-3, abs=1e-5)


def test_cosine_scores_have_no_bias(index: InfluenceIndex, true_scores: np.ndarray) -> None:
    """The mean over checkpoints of the cosines of gradients, compared with those of features in float32."""
    (answer,) = index.query([0], options=QueryOptions(k=N, score="cosine"))
    scores = np.zeros(N)
    for hit in (*answer.proponents, *answer.opponents):
        scores[hit.row] = hit.score
    plain = index.directory.parent / "plain"
    task = make_task(index.directory.parent)
    build(task, plain, replace(CONFIG, dtype="float32"))
    (other,) = InfluenceIndex.open(plain, task, device="cpu").query([0], options=QueryOptions(k=N, score="cosine"))
    expected = np.zeros(N)
    for hit in (*other.proponents, *other.opponents):
        expected[hit.row] = hit.score
    assert abs(scores @ expected / (expected @ expected) - 1) < 0.12
    assert np.corrcoef(scores, expected)[0, 1] > 0.8


def test_the_files_have_the_planned_size_and_no_damage(index: InfluenceIndex, folder: Path) -> None:
    dtype, found = dtype_of(index), verify(index.directory)
    assert not found.damage
    rows = 2 * N * (measure_row_bytes(CONFIG.dim, dtype) + 22)
    planned = plan(make_task(folder), folder / "elsewhere", replace(CONFIG, dtype=dtype))
    assert planned.disk_bytes == rows
    sizes = sum(record.size for record in index.manifest.features)
    assert rows < sizes < rows + 2 * N * 8 + 6 * 3 * 4096 + 6 * 4096
    shown = CliRunner().invoke(info_command, [str(index.directory)])
    assert shown.exit_code == 0 and f"factored, seed 0, {dtype}, exact norms" in shown.output


def test_an_audit_accepts_the_rows_and_finds_altered_ones(index: InfluenceIndex, folder: Path) -> None:
    task = make_task(folder)
    assert index.manifest.audit is not None and index.manifest.audit.largest < 5e-4
    found = audit(index.directory, AuditSample(2 * N), task)
    assert found.rows == 2 * N and not found.differences and found.largest < 5e-4
    alter_rows(index.directory, [7])
    found = audit(index.directory, AuditSample(2 * N), task)
    assert [(each.row, each.checkpoint) for each in found.differences] == [(7, 1)]
    assert found.differences[0].share == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("dtype", CODES)
def test_appended_rows_are_those_of_a_build_of_all_rows(tmp_path: Path, dtype: Dtype) -> None:
    config = replace(CONFIG, dtype=dtype, dim=100)
    build(make_task(tmp_path, 120), tmp_path / "grown", config)
    build(make_task(tmp_path), tmp_path / "grown", replace(config, append=True))
    build(make_task(tmp_path), tmp_path / "whole", config)
    whole = read_bytes(tmp_path / "whole")
    assert whole.items() <= read_bytes(tmp_path / "grown").items() and len(whole) == 6
    remove(tmp_path / "grown", [4, 60])
    assert not verify(tmp_path / "grown").damage
    index = InfluenceIndex.open(tmp_path / "grown", make_task(tmp_path), device="cpu")
    answer = index.query([0], options=QueryOptions(k=N))[0]
    assert {hit.row for hit in (*answer.proponents, *answer.opponents)} == set(range(N)) - {4, 60}


@pytest.mark.parametrize("dtype", ["int8", "int1"])
def test_damaged_files_are_found_and_rebuilt(tmp_path: Path, dtype: Dtype) -> None:
    task = make_task(tmp_path)
    manifest = build(task, tmp_path / "i", replace(CONFIG, dtype=dtype)).manifest
    assert restore_config(manifest).dtype == dtype
    before = read_bytes(tmp_path / "i")
    path = tmp_path / "i" / FEATURES / sorted(before)[1]
    content = bytearray(before[path.name])
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert [damage.path for damage in verify(tmp_path / "i").damage] == [path]
    assert repair(tmp_path / "i", task, device="cpu") is not None
    assert read_bytes(tmp_path / "i") == before and not verify(tmp_path / "i").damage


@pytest.mark.parametrize(("kind", "dtype"), [("ivf", "int1"), ("codes", "int4"), ("bounds", "int2"), ("graph", "int8")])
def test_search_indexes_are_built_from_decoded_rows(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    task = make_task(tmp_path, 600)
    config = replace(CONFIG, dtype=dtype, dim=64, index=kind, partition_rows=300)
    build(task, tmp_path / "i", config)
    assert not verify(tmp_path / "i").damage
    index = InfluenceIndex.open(tmp_path / "i", task, device="cpu")
    options = QueryOptions(k=10, search="index", rerank="stored")
    found, exact = (index.query(range(QUERIES), options=replace(options, search=how)) for how in ("index", "scan"))
    shared = [
        len({hit.row for hit in one.proponents} & {hit.row for hit in other.proponents}) / 10
        for one, other in zip(found, exact, strict=True)
    ]
    assert np.mean(shared) == 1.0 if kind == "bounds" else np.mean(shared) > 0.8


def test_an_index_keeps_its_dtype_and_a_build_with_another_one_is_rejected(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    build(task, tmp_path / "i", replace(CONFIG, dtype="int2"))
    with pytest.raises(IndexMismatchError, match="feature type int2.*--dtype int2"):
        build(task, tmp_path / "i", replace(CONFIG, dtype="int1"))


def test_a_rotation_does_not_change_the_scores_of_numbers(tmp_path: Path) -> None:
    """Codes of 8 bits differ from float32 by less than a hundredth, although their sketches are rotated."""
    task = make_task(tmp_path)
    scores = []
    for dtype in ("float32", "int8"):
        build(task, tmp_path / dtype, replace(CONFIG, dtype=dtype))
        scores.append(InfluenceIndex.open(tmp_path / dtype, task, device="cpu").score_matrix("query", range(QUERIES)))
    assert np.abs(scores[0] - scores[1]).max() < 0.01 * np.abs(scores[0]).max()


def test_the_command_accepts_the_dtypes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    Path("mine.py").write_text(
        "from pathlib import Path\nfrom test_coded_features import make_task\n\n\ndef task():\n"
        f"    return make_task(Path({str(tmp_path)!r}))\n"
    )
    words = ["--task", "mine.py:task", "--out", "made", "--dim", "64", "--dtype", "int2", "--no-yardstick"]
    made = CliRunner().invoke(build_command, words)
    assert made.exit_code == 0, made.output
    dry = CliRunner().invoke(build_command, [*words[:3], "other", *words[4:], "--dry-run"])
    assert dry.exit_code == 0 and "features as int2" in dry.output
    dry = CliRunner().invoke(build_command, [*words[:3], "other", "--dim", "auto", "--dtype", "int1", "--dry-run"])
    assert dry.exit_code == 0
    rows = [line.split("│")[0].strip() for line in dry.stdout.splitlines() if line.count("│") == 5]
    assert rows[:6] == ["float16", "float32", *CODES]
    wrong = CliRunner().invoke(build_command, [*words[:-2], "int3"])
    assert wrong.exit_code == 2 and "int3" in wrong.stderr


def test_the_table_of_dimensions_includes_the_rounding(tmp_path: Path) -> None:
    auto = BuildConfig(dim="auto", candidates=20, device="cpu", batch_size=50)
    tables = {}
    for dtype in ("float32", "int8", "int1"):
        choice = plan(make_task(tmp_path, 400), tmp_path / "other", replace(auto, dtype=dtype)).dim_choice
        assert choice is not None
        tables[dtype] = choice.table
        assert list(choice.others) == ["float16", "float32", *CODES] and choice.others[dtype] == choice.chosen
        for each, row in choice.others.items():
            assert row.size.row_bytes == 2 * measure_row_bytes(row.dim, each)
            assert row.recall >= choice.target.recall or row.dim == choice.table[-1].dim
    for one, eight, plain in zip(tables["int1"], tables["int8"], tables["float32"], strict=True):
        assert one.recall <= eight.recall + 1e-6 <= plain.recall + 0.02
        assert one.size.row_bytes == 2 * measure_row_bytes(one.dim, "int1")
    # One bit has the errors of a sketch of 2 D / π numbers, if those of the sketch follow from the norms; here they are
    # smaller than that, and those of the codes are not.
    plain = {row.dim: row.recall for row in tables["float32"]}
    for row in tables["int1"][2:]:
        assert plain[row.dim // 4] - 0.02 <= row.recall <= plain[row.dim] + 0.02


@pytest.mark.parametrize("dtype", CODES)
def test_the_curvature_has_the_trace_and_the_dimension_of_unrounded_features(tmp_path: Path, dtype: Dtype) -> None:
    task, found = make_task(tmp_path, 2000), {}
    for each in ("float32", dtype):
        build(task, tmp_path / each, replace(CONFIG, dtype=each, dim=32, partition_rows=2000))
        index = InfluenceIndex.open(tmp_path / each, task, device="cpu")
        found[each] = index.score_maker.source.load("fisher")[0]
    plain, coded = found["float32"], found[dtype]
    assert coded.trace == pytest.approx(plain.trace, rel=0.02)
    # The rounding adds the same to each eigenvalue.
    assert coded.rounding == pytest.approx((noise_ratio(dtype) - 1) * plain.trace / 32, rel=0.05)
    own = np.linalg.eigvalsh(plain.matrix_DD.astype(np.float64)) * plain.scale**2
    other = np.linalg.eigvalsh(coded.matrix_DD.astype(np.float64)) * coded.scale**2
    assert np.abs(other - coded.rounding - own).max() <= 0.5 * coded.rounding + 0.02 * own.max()
    for damping in (0.1 * plain.trace, 0.01 * plain.trace):
        with_noise = plain.effective_dimension(damping + coded.rounding)
        assert coded.effective_dimension(damping) == pytest.approx(with_noise, rel=0.1)
    again = index.score_maker.source.load("fisher")[0]
    assert again.trace == coded.trace and isinstance(index.view().store, FeatureStore)
