"""The explorer: build the index of the digits example, serve it, and open it in the browser.

`make serve`, or `python -m examples.explorer`, takes some seconds, and then serves http://127.0.0.1:8321 until Ctrl+C.
Ten percent of the labels are wrong: see Suspects.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
import webbrowser
from pathlib import Path

from examples import digits
from tracin_ann import build
from tracin_ann.cli.serve import main as serve_command


def open_when_ready(port: int) -> None:
    """Open the browser as soon as the port accepts connections, at most for half a minute."""
    for _ in range(300):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                webbrowser.open(f"http://127.0.0.1:{port}/")
                return
        time.sleep(0.1)


def build_once(task: str, runs: Path, arguments: dict[str, str]) -> Path:
    """Train the model and build the index if there is none, and return its directory."""
    index = runs / "index-seed0"
    if not (index / "manifest.json").is_file():
        digits.train(Path(arguments["runs"]), int(arguments["seed"]))
        build(task, index, arguments=arguments)
    return index


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/digits"), help="directory for checkpoints and the index"
    )
    parser.add_argument("--port", type=int, default=8321)
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    options = parser.parse_args(arguments)
    task, named = f"{Path(digits.__file__)}:task", {"runs": f"{options.runs}/seed0", "seed": "0"}
    index = build_once(task, options.runs, named)
    if not options.no_browser:
        threading.Thread(target=open_when_ready, args=(options.port,), daemon=True).start()
    words = [word for name, value in named.items() for word in ("--task-arg", f"{name}={value}")]
    serve_command([str(index), "--port", str(options.port), "--task", task, *words])


if __name__ == "__main__":
    main()
