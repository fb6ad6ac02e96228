"""Result files: JSON with the environment and settings of a run beside its figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.paths import RESULTS
from tracin_ann.device import device_name

Results = list[dict[str, Any]]
_CPU = torch.device("cpu")


def describe_environment(device: torch.device = _CPU) -> dict[str, Any]:
    """Return the machine, the device or its number of threads, versions and date of this run."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {_describe_processor()}",
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy", _find_faiss())},
    }


def _describe_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def _find_faiss() -> str:
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            version(name)
        except ModuleNotFoundError:
            continue
        return name
    raise SystemExit("FAISS is not installed: expected faiss-cpu or faiss-gpu")


def report_results(name: str, settings: dict[str, Any], results: Iterable[Any], device: torch.device = _CPU) -> None:
    """Print each result when it is ready, then write all of them to a result file."""
    written = []
    for result in results:
        written.append(result)
        print(result, flush=True)
    print(write_results(name, settings, written, device))


def write_results(name: str, settings: dict[str, Any], results: Any, device: torch.device = _CPU) -> Path:
    """Write a result file with its settings and environment, and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": describe_environment(device), "settings": settings, "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def read_results(name: str) -> dict[str, Any]:
    """Return the content of a result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())  # type: ignore[no-any-return]


def strip_times(manifest: bytes) -> bytes:
    """Return a manifest's content without measured times and without the digest that covers them."""
    content = json.loads(manifest)
    del content["digest"]
    calibration = content["index"]["calibration"]
    if calibration is not None:
        for name in ("scan", "index_fixed", "both_ratio", "first_use"):
            calibration.pop(name, None)
        for point in (*calibration["proponents"], *calibration["opponents"]):
            del point["seconds"]
    return json.dumps(content, sort_keys=True).encode()
