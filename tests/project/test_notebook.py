"""The notebook examples/tour.ipynb is stored without outputs and runs; its cells show tables, images and files."""

from __future__ import annotations

import re
import sys
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from paths import ROOT

PATH = ROOT / "examples" / "tour.ipynb"


class LocalKernels(AsyncKernelManager):
    """Kernels of this Python, independent of installed kernel specs; the connection uses files."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Return the outputs of each cell, by its last line."""
    folder = tmp_path_factory.mktemp("tour")
    book = nbformat.read(PATH, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        client = NotebookClient(
            book, timeout=300, kernel_manager_class=LocalKernels, resources={"metadata": {"path": folder}}
        )
        client.execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert (folder / "runs/tour/report.html").stat().st_size > 1000
    return {cell.source.splitlines()[-1]: cell.outputs for cell in cells}


def test_the_notebook_is_stored_without_outputs() -> None:
    book = nbformat.read(PATH, as_version=4)
    nbformat.validate(book)
    assert [cell for cell in book.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)] == []


@pytest.mark.slow
@pytest.mark.xdist_group("notebook")
@pytest.mark.filterwarnings("default")  # warnings of Jupyter's packages
def test_every_result_has_an_output(outputs: dict[str, list[Any]]) -> None:
    for line in ("answers", "explanation", "index.self_influence(5)", "answers.to_pandas().head()", "suspects"):
        assert "<table" in outputs[line][-1].data["text/html"]
    for line in ("answers.plot()", "explanation.plot()", "ranked.plot()"):
        assert set(outputs[line][-1].data) == {"image/png", "text/plain"}
    assert (
        "labelled 3"
        in outputs["index.query(ids=threes, together=True, options=QueryOptions(k=5))"][-1].data["text/html"]
    )
    bar = [output for cell in outputs.values() for output in cell if output.output_type == "display_data"]
    assert len(bar) == 1
    assert "<progress" in bar[0].data["text/html"]
    assert [out for cell in outputs.values() for out in cell if out.get("name") == "stderr"] == []


@pytest.mark.slow
@pytest.mark.xdist_group("notebook")
@pytest.mark.filterwarnings("default")
def test_the_notebook_finds_the_wrong_labels(outputs: dict[str, list[Any]]) -> None:
    printed = "".join(out.text for cell in outputs.values() for out in cell if out.output_type == "stream")
    assert [int(share) >= 80 for share in re.findall(r"first 10% of the rows contain (\d+)%", printed)] == [True, True]
