"""What benchmarks share: the environment beside every result, recall, brute-force gradients, result files."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from tracin_ann.device import device_name
from tracin_ann.task.task import Task

RESULTS = Path(__file__).resolve().parent / "results"


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge a figure: machine, threads, versions, date."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {_processor()}",
        "device": device_name(torch.device("cpu")),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy", _faiss())},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def _faiss() -> str:
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            version(name)
        except ModuleNotFoundError:
            continue
        return name
    raise SystemExit("no FAISS is installed")


def reported(name: str, settings: dict[str, Any], results: Iterable[Any]) -> None:
    """Print results as they come, and write them to a result file."""
    kept = []
    for result in results:
        kept.append(result)
        print(result, flush=True)
    print(write(name, settings, kept))


def write(name: str, settings: dict[str, Any], results: Any) -> Path:
    """Write a result file with its settings and environment beside it."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), "settings": settings, "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def timeless(manifest: bytes) -> bytes:
    """Return a manifest's content without the times that a clock measured, and the digest over them."""
    said = json.loads(manifest)
    del said["digest"]
    calibration = said["index"]["calibration"]
    if calibration is not None:
        del calibration["scan"], calibration["index_fixed"]
        for point in (*calibration["proponents"], *calibration["opponents"]):
            del point["seconds"]
    return json.dumps(said, sort_keys=True).encode()


def gradients(task: Task, model: nn.Module, side: str, ids: Sequence[int], size: int = 64) -> Iterator[torch.Tensor]:
    """Yield brute-force gradients [B, P] over all parameters, by vmap(grad), independent of the library's ladder."""
    rows = task.train_data() if side == "train" else task.query_data()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    for start in range(0, len(ids), size):
        x, y = torch.utils.data.default_collate([rows[i] for i in ids[start : start + size]])
        each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
        yield torch.cat([g.flatten(1) for g in each.values()], dim=1)


def brute_force(task: Task, queries: Sequence[int], n_rows: int) -> np.ndarray:
    """Return TracInCP scores [Q, N] over all parameters and checkpoints, no projection anywhere."""
    scores = np.zeros((len(queries), n_rows))
    for checkpoint in task.checkpoints:
        model = task.model().eval()
        model.load_state_dict(torch.load(checkpoint.path, weights_only=True))
        direction = torch.cat(list(gradients(task, model, "query", queries)))
        start = 0
        for rows in gradients(task, model, "train", range(n_rows)):
            scores[:, start : start + len(rows)] += checkpoint.learning_rate * (direction @ rows.T).double().numpy()
            start += len(rows)
    return scores


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Return ids [Q, k] of the largest scores, best first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def recalls(true: np.ndarray, found: Sequence[Sequence[int]]) -> np.ndarray:
    """Return each query's share [Q] of the true ids that were found."""
    return np.array([len(set(t.tolist()) & set(f)) / len(t) for t, f in zip(true, found, strict=True)])
