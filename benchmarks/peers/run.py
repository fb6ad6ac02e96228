"""Feature extraction beside one peer, in its environment: python -m benchmarks.peers.run --peer traker --out FILE.

Every case (a model, one of the peer's sides) is timed in a process of its own, in interleaved rounds of plain batched
forward and backward, ours and the peer; the peak memory of each of the three is that of a fresh process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, models
from benchmarks.peers.worker import PEERS, sides

MODELS = ("MNIST CNN", "ResNet-9", "GPT 4x128", "GPT 12x288")


def resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * 4096


def worker(options: argparse.Namespace, model: str, side: str, *more: str) -> dict[str, Any]:
    """Run one worker; killed where it takes more memory or much more time than it may."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        same = [f"--{name}={getattr(options, name)}" for name in ("dim", "threads", "seconds", "rounds", "limit")]
        command = [sys.executable, "-m", "benchmarks.peers.worker", f"--peer={options.peer}", f"--side={side}"]
        command += [f"--model={model}", f"--memory={options.memory}", f"--out={out}", *same, *more]
        process = subprocess.Popen(command)
        began = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if resident_bytes(process.pid) > options.memory * 1e9:
                    return {"failed": f"needs more than {options.memory:g} GB"}
                if time.monotonic() - began > 2 * options.limit:
                    return {"failed": f"takes more than {2 * options.limit:g} s"}
        finally:
            process.kill()
            process.wait()
        if not out.exists():
            return {"failed": f"ended with status {process.returncode}"}
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def measured(options: argparse.Namespace, model: str, side: str, known: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """Return a case's times and peaks; `known` keeps those of the plain step and of ours, which no side changes."""
    result = worker(options, model, side)
    if "failed" not in result and "skipped" not in result:
        for who in ("plain", "ours"):
            if (model, who) not in known:
                known[model, who] = worker(options, model, side, f"--alone={who}")
        peer = worker(options, model, side, "--alone=peer", f"--batch-size={result['batch_size']['peer']}")
        alone = {"plain": known[model, "plain"], "ours": known[model, "ours"], "peer": peer}
        result["peak_mb"] = {who: found.get("peak_mb", found.get("failed")) for who, found in alone.items()}
    return {"model": model, "peer": options.peer, "side": side, **result}


def environment(peer: str) -> dict[str, Any]:
    found = common.environment()
    found["versions"][peer] = version(peer)
    if peer == "bergson":
        found["versions"]["transformers"] = version("transformers")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--sides", nargs="+", help="some of the peer's sides; all by default")
    parser.add_argument("--models", nargs="+", choices=list(models.MODELS), default=list(MODELS))
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each side in a round; a batch at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a case: fewer rounds where a peer is slow")
    parser.add_argument("--memory", type=float, default=16.0, help="GB that a process may take")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = list(sides(options.peer))
    if wrong := set(options.sides or ()) - set(known):
        parser.error(f"{options.peer} has no side {sorted(wrong)}; expected some of {known}")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    content: dict[str, Any] = {"environment": environment(options.peer), "settings": settings, "results": []}
    peaks: dict[tuple[str, str], Any] = {}
    for model in options.models:
        for side in options.sides or known:
            began = time.monotonic()
            content["results"].append(measured(options, model, side, peaks))
            print(json.dumps(content["results"][-1]), f"{time.monotonic() - began:.0f} s", flush=True)
            options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
