"""Contract of every search backend on every device (the ids of a float64 argsort, including ties), and of its files.

Rows are small integers times powers of two, so products are exact in half precision and ties occur.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tracin_ann.device import import_faiss
from tracin_ann.errors import DamagedIndexError, NonFiniteError, UsageError
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams, SearchIndex, search_both
from tracin_ann.search.bounded_scan import BoundedScan, BoundedScanParams
from tracin_ann.search.clustering import stratified_ids, survey
from tracin_ann.search.coded_scan import CodedScan, CodedScanParams
from tracin_ann.search.graph import GraphIndex, GraphParams
from tracin_ann.search.rescored import RescoredIndex
from tracin_ann.search.settings import Setting
from tracin_ann.types import Float32, Int64, RowSource

DIM = 12
CPU = torch.device("cpu")


class Rows:
    """A `RowSource` of arrays; its blocks are read-only, like those of a mapped file."""

    def __init__(self, rows: np.ndarray, ids: np.ndarray | None = None) -> None:
        self.rows = np.asarray(rows, dtype=np.float32)
        self.ids = np.arange(len(rows), dtype=np.int64) if ids is None else np.asarray(ids, dtype=np.int64)
        self.rows.setflags(write=False)

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, block_rows: int, start: int = 0) -> Iterator[tuple[Int64, Float32]]:
        for at in range(start, len(self.rows), block_rows):
            yield self.ids[at : at + block_rows], self.rows[at : at + block_rows]

    def take(self, ids: Sequence[int] | Int64) -> Float32:
        where = {number: row for row, number in enumerate(self.ids.tolist())}
        return self.rows[[where[number] for number in np.asarray(ids).tolist()]]


def flat(source: RowSource, device: torch.device) -> SearchIndex:
    return FlatIndex(source, device, block_rows=37)


def ivf(source: RowSource, device: torch.device) -> SearchIndex:
    return IVFIndex.build(source, IVFParams(), device).with_settings(Setting(10**9, 10**9, 0.1))


def reloaded_ivf(source: RowSource, device: torch.device) -> SearchIndex:
    with tempfile.TemporaryDirectory() as directory:
        IVFIndex.build(source, IVFParams(), device).save(Path(directory))
        return IVFIndex.load(Path(directory), source, device).with_settings(Setting(10**9, 10**9, 0.1))


def sharded_ivf(source: RowSource, device: torch.device) -> SearchIndex:
    """Return an index in three files, with fewer rows than shards in some cases."""
    with tempfile.TemporaryDirectory() as directory:
        IVFIndex.build(source, IVFParams(shards=3), device).save(Path(directory))
        return IVFIndex.load(Path(directory), source, device).with_settings(Setting(10**9, 10**9, 0.1))


class AllCandidates(CodedScan):
    """An index that never scans the rows: all codes are candidates."""

    def _is_scanned(self, k: int, setting: Setting, n_rows: int) -> bool:
        return False


def codes(source: RowSource, device: torch.device) -> SearchIndex:
    return AllCandidates.build(source, CodedScanParams(), device).with_settings(Setting(10**9))


def reloaded_codes(source: RowSource, device: torch.device) -> SearchIndex:
    """Return an index with codes of fewer dimensions than the rows."""
    with tempfile.TemporaryDirectory() as directory:
        AllCandidates.build(source, CodedScanParams(width=9), device).save(Path(directory))
        return AllCandidates.load(Path(directory), source, device).with_settings(Setting(10**9))


def bounds(source: RowSource, device: torch.device) -> SearchIndex:
    return BoundedScan.build(source, BoundedScanParams(), device)


def reloaded_bounds(source: RowSource, device: torch.device) -> SearchIndex:
    """Return an index with fewer dimensions than the rows, which never scans all rows."""
    with tempfile.TemporaryDirectory() as directory:
        BoundedScan.build(source, BoundedScanParams(width=5), device).save(Path(directory))
        return BoundedScan.load(Path(directory), source, device).with_settings(Setting(10**9))


def graph(source: RowSource, device: torch.device) -> SearchIndex:
    """Beams that would score all rows are answered by an exact scan."""
    return GraphIndex.build(source, GraphParams(), device).with_settings(Setting(10**9))


def reloaded_graph(source: RowSource, device: torch.device) -> SearchIndex:
    with tempfile.TemporaryDirectory() as directory:
        GraphIndex.build(source, GraphParams(), device).save(Path(directory))
        return GraphIndex.load(Path(directory), source, device).with_settings(Setting(10**9))


Backend = Callable[[RowSource, torch.device], SearchIndex]


@pytest.fixture(
    params=[
        *(flat, ivf, reloaded_ivf, sharded_ivf, codes, reloaded_codes),
        *(bounds, reloaded_bounds, graph, reloaded_graph),
    ],
    ids=lambda backend: backend.__name__,
)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


def integers(n: int, seed: int, span: int = 4) -> Float32:
    return np.random.default_rng(seed).integers(-span, span + 1, (n, DIM)).astype(np.float32)


def heavy_tailed(n: int, seed: int) -> Float32:
    powers = np.random.default_rng(seed + 1).choice([1, 2, 4, 16], size=(n, 1), p=[0.6, 0.25, 0.1, 0.05])
    return integers(n, seed) * powers.astype(np.float32)


def normal(n: int, seed: int, dim: int = DIM) -> Float32:
    """Return rows with heavy-tailed norms in a few directions."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((12, dim))
    rows = centres[random.integers(0, 12, n)] + 0.4 * random.standard_normal((n, dim))
    return (rows * np.exp(0.7 * random.standard_normal((n, 1)))).astype(np.float32)


def oracle(source: Rows, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and scores [Q, min(k, N)] by argsort in float64; ties by increasing id."""
    scores = queries.astype(np.float64) @ source.rows.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return source.ids[order], np.take_along_axis(scores, order, axis=1)


def assert_exact(index: SearchIndex, source: Rows, queries: np.ndarray, k: int) -> None:
    ids, scores = oracle(source, queries, k)
    top = index.search(queries, k)
    assert [found.tolist() for found in top.ids] == ids.tolist()
    assert [found.tolist() for found in top.scores] == scores.tolist()
    assert all(found.dtype == np.int64 for found in top.ids)
    assert all(found.dtype == np.float32 for found in top.scores)
    low_ids, low_scores = oracle(source, -queries, k)
    proponents, opponents = search_both(index, queries, k)
    assert [found.tolist() for found in proponents.ids] == ids.tolist()
    assert [found.tolist() for found in proponents.scores] == scores.tolist()
    assert [found.tolist() for found in opponents.ids] == low_ids.tolist()
    assert [found.tolist() for found in opponents.scores] == (-low_scores).tolist()


CASES = {
    "heavy tail": heavy_tailed(700, 0),
    "one row": integers(1, 1),
    "few rows": integers(9, 2),
    "duplicates": np.repeat(heavy_tailed(40, 3), 8, axis=0),
    "duplicates far apart": np.tile(heavy_tailed(40, 4), (8, 1)),
    "all rows equal": np.tile(integers(1, 5), (120, 1)),
    "all rows zero": np.zeros((90, DIM), np.float32),
    "some rows zero": heavy_tailed(200, 6) * (np.arange(200) % 3 > 0)[:, None],
    "an outlier": np.concatenate([integers(150, 7), integers(1, 8) * 2.0**13, integers(150, 9)]),
    "outliers": np.concatenate([heavy_tailed(400, 43), integers(3, 44) * 2.0**20]),
    "tiny": heavy_tailed(300, 10) * 2.0**-60,
    "huge": heavy_tailed(300, 11) * 2.0**60,
}


@pytest.mark.parametrize("k", [1, 10, 1000])
@pytest.mark.parametrize("case", CASES)
def test_results_equal_the_oracle(backend: Backend, device: torch.device, case: str, k: int) -> None:
    source = Rows(CASES[case])
    queries = np.concatenate([integers(6, 20), np.zeros((1, DIM), np.float32)])
    assert_exact(backend(source, device), source, queries, k)


def test_ids_equal_those_of_the_source(backend: Backend, device: torch.device) -> None:
    source = Rows(heavy_tailed(300, 12), ids=5_000_000_000 + 7 * np.arange(300))
    assert_exact(backend(source, device), source, integers(5, 21), 10)


def test_no_queries_give_no_results(backend: Backend, device: torch.device) -> None:
    index = backend(Rows(integers(50, 13)), device)
    for top in (
        index.search(np.zeros((0, DIM), np.float32), 5),
        *search_both(index, np.zeros((0, DIM), np.float32), 5),
    ):
        assert (top.ids, top.scores, top.rows_scored.tolist()) == ((), (), [])


def test_no_rows_give_no_results() -> None:
    source = Rows(np.zeros((0, DIM)))
    assert_exact(FlatIndex(source, torch.device("cpu")), source, integers(2, 36), 5)


def test_an_index_reports_its_kind_dimension_and_length(backend: Backend, device: torch.device) -> None:
    index = backend(Rows(integers(50, 13)), device)
    assert (index.kind, index.dim, len(index)) == (backend.__name__.split("_")[-1], DIM, 50)


def test_a_second_search_gives_the_same_results(backend: Backend, device: torch.device) -> None:
    source = Rows(heavy_tailed(300, 14))
    index = backend(source, device)
    for seed in (22, 23):
        assert_exact(index, source, integers(4, seed), 7)


@pytest.mark.parametrize(
    ("queries", "k", "error"),
    [
        (np.zeros((2, DIM), np.float32), 0, UsageError),
        (np.zeros((2, DIM + 1), np.float32), 5, UsageError),
        (np.zeros(DIM, np.float32), 5, UsageError),
        (np.full((2, DIM), np.nan, np.float32), 5, NonFiniteError),
    ],
)
def test_invalid_queries_are_rejected(backend: Backend, queries: Float32, k: int, error: type[Exception]) -> None:
    index = backend(Rows(integers(50, 15)), torch.device("cpu"))
    with pytest.raises(error):
        index.search(queries, k)
    with pytest.raises(error):
        search_both(index, queries, k)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_row_is_named(backend: Backend, poison: float) -> None:
    rows = integers(60, 16)
    rows[41, 3] = poison
    source = Rows(rows, ids=100 + np.arange(60))
    with pytest.raises(NonFiniteError, match="row 141 "):
        search_both(backend(source, torch.device("cpu")), np.abs(integers(1, 24)) + 1, 5)


def test_many_queries_are_answered_in_chunks(device: torch.device) -> None:
    source = Rows(heavy_tailed(80, 17))
    queries = integers(2100, 25)
    assert_exact(FlatIndex(source, device, block_rows=2**14), source, queries, 3)
    assert_exact(ivf(source, device), source, queries, 3)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.3, 1.0])
def test_only_allowed_rows_are_found(backend: Backend, device: torch.device, share: float) -> None:
    source = Rows(heavy_tailed(300, 40), ids=5_000_000_000 + 7 * np.arange(300))
    passing = np.random.default_rng(41).random(300) < share
    chosen, queries = Rows(source.rows[passing], source.ids[passing]), integers(5, 42)
    proponents, opponents = search_both(backend(source, device), queries, 10, source.ids[passing])
    for found, signed in ((proponents, queries), (opponents, -queries)):
        ids, scores = oracle(chosen, signed, 10)
        assert [row.tolist() for row in found.ids] == ids.tolist()
        assert [np.abs(row).tolist() for row in found.scores] == np.abs(scores).tolist()


def test_the_sample_spans_the_norms() -> None:
    source = Rows(2.0 ** np.linspace(-4, 4, 1000)[:, None] * np.ones((1000, DIM)), ids=50 + np.arange(1000))
    measured = survey(source, 300)
    sample = stratified_ids(measured, 100, seed=3)
    assert ((sample - 50) // 10).tolist() == list(range(100))
    assert sample.tolist() == stratified_ids(measured, 100, seed=3).tolist()
    assert sample.tolist() != stratified_ids(measured, 100, seed=4).tolist()
    assert stratified_ids(measured, 5000, seed=3).tolist() == source.ids.tolist()


HARMS: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    **{f"{cut} bytes short": lambda content, cut=cut: content[:-cut] for cut in (2, 7, 300)},
}


def build_ivf(source: RowSource) -> RescoredIndex:
    return IVFIndex.build(source, IVFParams(), CPU)


def build_codes(source: RowSource) -> RescoredIndex:
    return CodedScan.build(source, CodedScanParams(), CPU)


def build_graph(source: RowSource) -> RescoredIndex:
    return GraphIndex.build(source, GraphParams(width=200), CPU)


def build_bounds(source: RowSource) -> RescoredIndex:
    return BoundedScan.build(source, BoundedScanParams(), CPU)


CODED: dict[type[RescoredIndex], Callable[[RowSource], RescoredIndex]] = {
    IVFIndex: build_ivf,
    CodedScan: build_codes,
    GraphIndex: build_graph,
    BoundedScan: build_bounds,
}
FILES = [(kind, name) for kind in CODED for name in kind.FILES]
Saved = Callable[[type[RescoredIndex]], tuple[Rows, dict[str, bytes]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return rows that an index reduces, one of them an outlier, and the files of the index, by class."""

    @cache
    def save(kind: type[RescoredIndex]) -> tuple[Rows, dict[str, bytes]]:
        rows = normal(600, 17, 300)
        rows[3] *= np.float32(1e7)
        folder = tmp_path_factory.mktemp(kind.kind)
        CODED[kind](Rows(rows)).save(folder)
        return Rows(rows), {name: (folder / name).read_bytes() for name in kind.FILES}

    return save


@pytest.fixture
def wide(saved: Saved) -> tuple[Rows, dict[str, bytes]]:
    return saved(IVFIndex)


def assert_refused(
    folder: Path, source: Rows, files: Mapping[str, bytes | None], kind: type[RescoredIndex] = IVFIndex
) -> None:
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(DamagedIndexError, match="rebuild the index"):
        kind.load(folder, source, CPU)


def npz(content: bytes, **other: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **(dict(np.load(io.BytesIO(content))) | other))
    return file.getvalue()


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("dim", [DIM, 300])
def test_a_saved_index_gives_the_same_results(tmp_path: Path, kind: type[RescoredIndex], dim: int) -> None:
    rows = normal(600, 17, dim)
    rows[3] *= np.float32(1e7)
    source = Rows(rows)
    index = CODED[kind](source)
    index.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kind.FILES)
    loaded, queries = kind.load(tmp_path, source, CPU), normal(10, 18, source.dim)
    assert loaded.params == index.params
    setting = Setting(200, 200, 0.3)
    pairs = zip(
        search_both(index.with_settings(setting), queries, 10),
        search_both(loaded.with_settings(setting), queries, 10),
        strict=True,
    )
    for before, after in pairs:
        assert [ids.tolist() for ids in before.ids] == [ids.tolist() for ids in after.ids]
        assert before.rows_scored.tolist() == after.rows_scored.tolist()


@pytest.mark.parametrize(("kind", "name"), FILES)
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_is_rejected(
    tmp_path: Path, saved: Saved, kind: type[RescoredIndex], name: str, harm: str
) -> None:
    source, files = saved(kind)
    assert_refused(tmp_path, source, files | {name: HARMS[harm](files[name])}, kind)


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_file_of_other_rows_is_rejected(tmp_path: Path, saved: Saved, kind: type[RescoredIndex], name: str) -> None:
    source, files = saved(kind)
    CODED[kind](Rows(normal(700, 30, 300))).save(tmp_path)
    assert_refused(tmp_path, source, {other: files[other] for other in kind.FILES if other != name}, kind)


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize(("n", "dim"), [(599, 300), (600, 299), (600, 301)])
def test_rows_of_another_shape_are_rejected(
    tmp_path: Path, saved: Saved, kind: type[RescoredIndex], n: int, dim: int
) -> None:
    assert_refused(tmp_path, Rows(normal(n, 17, dim)), saved(kind)[1], kind)


ARRAYS = [
    *((IVFIndex, name) for name in ("basis_FR", "outliers", "group_GR", "parent_L", "group_radius_G", "radius_L")),
    (IVFIndex, "size_L"),
    *((CodedScan, name) for name in ("basis_FR", "outliers", "size_C", "factor_N")),
]


@pytest.mark.parametrize("change", ["shorter", "narrower", "deeper", "objects"])
@pytest.mark.parametrize(("kind", "array"), ARRAYS)
def test_an_altered_array_is_rejected(
    tmp_path: Path, saved: Saved, kind: type[RescoredIndex], array: str, change: str
) -> None:
    source, files = saved(kind)
    (name,) = (name for name in files if name.endswith(".npz"))
    original = np.load(io.BytesIO(files[name]))[array]
    altered = {
        "shorter": original[:-1],
        "narrower": original[..., :-1],
        "deeper": original[..., None],
        "objects": original.astype(object),
    }[change]
    assert_refused(tmp_path, source, files | {name: npz(files[name], **{array: altered})}, kind)


CHANGES: list[dict[str, object]] = [
    *({"version": version} for version in (0, 99)),
    *({"caption": "lists"}, {"rows": 599}, {"quiet_rows": 1}, {"more": 1}),
    *({"quiet_rows": "0"}, {"quiet_rows": None}, {"quiet_norm": "0"}, {"params": {"codes": "pq"}}),
]


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("change", CHANGES)
def test_an_altered_header_is_rejected(
    tmp_path: Path, saved: Saved, kind: type[RescoredIndex], change: dict[str, object]
) -> None:
    source, files = saved(kind)
    (name,) = (name for name in files if name.endswith(".json"))
    caption = json.dumps(json.loads(files[name]) | change).encode()
    assert_refused(tmp_path, source, files | {name: caption}, kind)


def test_faiss_files_of_another_kind_are_rejected(tmp_path: Path, wide: tuple[Rows, dict[str, bytes]]) -> None:
    faiss, (source, files) = import_faiss(), wide
    nearest = faiss.deserialize_index(np.frombuffer(files["ivf.faiss"], np.uint8))
    nearest.metric_type = faiss.METRIC_L2
    for other in (faiss.IndexFlatIP(256), nearest):
        assert_refused(tmp_path, source, files | {"ivf.faiss": faiss.serialize_index(other).tobytes()})


def test_an_unknown_row_in_the_lists_is_reported_when_it_is_found(
    tmp_path: Path, wide: tuple[Rows, dict[str, bytes]]
) -> None:
    source, files = wide
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "ivf.faiss").write_bytes(files["ivf.faiss"][:-8] + (10_000).to_bytes(8, "little"))
    index = IVFIndex.load(tmp_path, source, CPU).with_settings(Setting(500, 500, 0.3))
    with pytest.raises(DamagedIndexError, match="ivf.faiss contains an unknown row: got id 10000"):
        index.search(normal(50, 18, source.dim), 100)
