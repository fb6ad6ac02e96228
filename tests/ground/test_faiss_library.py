"""The OpenBLAS in FAISS's package: its kernels have the processor's instructions, also on one that it does not know."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tracin_ann.device import faiss_library as module

CORE = "OPENBLAS_CORETYPE"
SCRIPT = """
import os
import threadpoolctl
from tracin_ann.device import import_faiss
import_faiss()
libraries = [each for each in threadpoolctl.threadpool_info() if each["internal_api"] == "openblas"]
print(next((each["architecture"] for each in libraries if "/faiss" in each["filepath"]), "none"))
print(os.environ.get("OPENBLAS_CORETYPE"))
"""


@pytest.mark.parametrize(
    ("vendor", "instructions", "name"),
    [
        ("GenuineIntel", "AVX512", "SKYLAKEX"),
        ("GenuineIntel", "AVX2", "HASWELL"),
        ("AuthenticAMD", "AVX512", "ZEN"),
        ("GenuineIntel", "DEFAULT", None),
        ("", "NO AVX", None),
    ],
)
def test_a_processor_is_named_while_faiss_is_imported(
    vendor: str, instructions: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CORE, raising=False)
    monkeypatch.setattr(module, "_read_vendor", lambda: vendor)
    monkeypatch.setattr(module, "_read_instructions", lambda: instructions)
    with pytest.raises(ImportError), module._name_processor():
        assert os.environ.get(CORE) == name
        raise ImportError
    assert CORE not in os.environ


def test_the_users_name_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORE, "NEHALEM")
    monkeypatch.setattr(module, "_read_vendor", lambda: "GenuineIntel")
    monkeypatch.setattr(module, "_read_instructions", lambda: "AVX512")
    with module._name_processor():
        assert os.environ[CORE] == "NEHALEM"
    assert os.environ[CORE] == "NEHALEM"


def test_kernels_have_the_instructions_of_the_processor() -> None:
    pytest.importorskip("threadpoolctl")
    if (module._read_vendor(), module._read_instructions()) not in module._CORES:
        pytest.skip("an unknown kind of processor")
    environment = {name: value for name, value in os.environ.items() if name != CORE}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    architecture, left = done.stdout.split()
    assert left == "None"
    if architecture == "none":
        pytest.skip("this FAISS has no OpenBLAS of its own")
    assert architecture in ("SkylakeX", "Cooperlake", "Haswell", "Zen")
