"""Time and memory of feature extraction compared with one peer, in the environment of that peer.

`benchmarks/peers/setup` makes the environments. Each case (a model and a side, that is, a method of the peer) is timed
in its own process, in interleaved rounds of the plain step, the library and the peer. The peak memory of each of the
three is measured in a new process. `benchmarks.peers.collect` merges the files of all peers.
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

from benchmarks.common import models
from benchmarks.common.results import describe_environment
from benchmarks.peers.worker import PEERS, load_sides

OUTPUT = "the file of --out"
MODELS = ("MNIST CNN", "ResNet-9", "GPT 4x128", "GPT 12x288")


def measure_resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * 4096


def run_worker(options: argparse.Namespace, model: str, side: str, *more: str) -> dict[str, Any]:
    """Run one worker; kill it if it exceeds the memory limit or twice the time limit."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        shared = [f"--{name}={getattr(options, name)}" for name in ("dim", "threads", "seconds", "rounds", "limit")]
        command = [sys.executable, "-m", "benchmarks.peers.worker", f"--peer={options.peer}", f"--side={side}"]
        command += [f"--model={model}", f"--memory={options.memory}", f"--out={out}", *shared, *more]
        process = subprocess.Popen(command)
        start_s = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if measure_resident_bytes(process.pid) > options.memory * 1e9:
                    return {"failed": f"needs more than {options.memory:g} GB"}
                if time.monotonic() - start_s > 2 * options.limit:
                    return {"failed": f"takes more than {2 * options.limit:g} s"}
        finally:
            process.kill()
            process.wait()
        if not out.exists():
            return {"failed": f"ended with status {process.returncode}"}
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def measure_case(
    options: argparse.Namespace, model: str, side: str, known: dict[tuple[str, str], Any]
) -> dict[str, Any]:
    """Return the times and peak memory of a case; `known` caches the memory of the plain step and of the library."""
    result = run_worker(options, model, side)
    if "failed" not in result and "skipped" not in result:
        for who in ("plain", "ours"):
            if (model, who) not in known:
                known[model, who] = run_worker(options, model, side, f"--alone={who}")
        peer = run_worker(options, model, side, "--alone=peer", f"--batch-size={result['batch_size']['peer']}")
        alone = {"plain": known[model, "plain"], "ours": known[model, "ours"], "peer": peer}
        result["peak_mb"] = {who: found.get("peak_mb", found.get("failed")) for who, found in alone.items()}
    return {"model": model, "peer": options.peer, "side": side, **result}


def describe_peer_environment(peer: str) -> dict[str, Any]:
    """Return the environment with the version of the peer."""
    found = describe_environment()
    found["versions"][peer] = version(peer)
    if peer == "bergson":
        found["versions"]["transformers"] = version("transformers")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, required=True, help="library to compare")
    parser.add_argument("--sides", nargs="+", help="sides of the peer; by default all")
    parser.add_argument(
        "--models", nargs="+", choices=list(models.MODELS), default=list(MODELS), help="models to measure"
    )
    parser.add_argument("--dim", type=int, default=1024, help="sketch dimensions per checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each side per round, at least one batch")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per case; slow peers run fewer rounds")
    parser.add_argument("--memory", type=float, default=16.0, help="memory limit of a process in GB")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = list(load_sides(options.peer))
    if wrong := set(options.sides or ()) - set(known):
        parser.error(f"{options.peer} has no side {sorted(wrong)}; expected some of {known}")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    content: dict[str, Any] = {
        "environment": describe_peer_environment(options.peer),
        "settings": settings,
        "results": [],
    }
    peaks: dict[tuple[str, str], Any] = {}
    for model in options.models:
        for side in options.sides or known:
            start_s = time.monotonic()
            content["results"].append(measure_case(options, model, side, peaks))
            print(json.dumps(content["results"][-1]), f"{time.monotonic() - start_s:.0f} s", flush=True)
            options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
