"""Time until a text that is typed on the command line is answered: by an open index, and by a running server.

`--data` is a folder with sst2_train.tsv and sst2_dev.tsv; the first run trains the BERT of examples/trainer_run.py with
six layers on 4,000 sentences, and builds the index in `--folder`. Every command is a new process. Each round runs each
command once, with another text, so that all medians are of the same period; the first round is not counted. Needs the
extras `transformers`, `examples` and `serve`, and accelerate.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.paths import ROOT
from benchmarks.common.results import report_results
from examples import trainer_run

RESULT = "typed_text"
LAYERS = 6
MODEL_IMPORT = "from transformers import BertForSequenceClassification"
WORDS = ("warm", "funny", "slow", "dull", "brilliant", "sad", "fine", "weak", "clever", "long", "honest", "flat")


def find_command(name: str) -> str:
    """Return the path of a command that is installed beside this Python."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise SystemExit(f"no {name} beside {sys.executable}: install the project there")
    return str(path)


def prepare(data: str, folder: Path) -> Path:
    """Train and build unless it was done before; return the directory of the index."""
    index = folder / f"{trainer_run.ROWS}-rows/index"
    if not (index / "manifest.json").exists():
        trainer_run.main(["--data", data, "--out", str(folder), "--layers", str(LAYERS)])
    return index


@contextmanager
def run_server(index: Path) -> Iterator[str]:
    """Yield the address of a server of the index."""
    command = [find_command("tracin-serve"), str(index), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline()]
            address = re.search(r"http://\S+:\d+", lines[0])
            if address is None:
                process.kill()
                raise SystemExit(f"the server did not start: {lines[0]}{process.stderr.read()}")
            yield address[0]
        finally:
            process.terminate()


def measure(index: Path, address: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the median and the shortest time of each command."""
    query = find_command("tracin-query")
    commands = {
        f'python -c "{MODEL_IMPORT}"': [sys.executable, "-c", MODEL_IMPORT],
        "tracin-query DIR --text ...": [query, str(index), "--text"],
        "tracin-query URL --text ...": [query, address, "--text"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    answers: dict[str, str] = {}
    for number in range(rounds + 1):
        text = f"a {WORDS[number % len(WORDS)]} and {WORDS[-1 - number % len(WORDS)]} film"
        for name, command in commands.items():
            words = [*command, text] if command[-1] == "--text" else command
            began = time.perf_counter()
            done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT)
            elapsed = time.perf_counter() - began
            if done.returncode:
                raise SystemExit(f"a command failed: {shlex.join(words)}\n{done.stderr}")
            answers[name] = done.stdout
            seconds[name] += [elapsed] if number else []
        of_index, of_server = list(answers.values())[1:]
        if of_index != of_server:
            raise SystemExit(f"other answers for {text!r}:\n{of_index}\n{of_server}")
    for name, values in seconds.items():
        yield {"command": name, "median_s": median(values), "fastest_s": min(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with sst2_train.tsv and sst2_dev.tsv")
    parser.add_argument("--folder", type=Path, default=Path("runs/typed-text"), help="folder of the run and the index")
    parser.add_argument("--rounds", type=int, default=11, help="number of times that each command is run")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads of each process")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    index = prepare(options.data, options.folder.resolve())
    settings = {"rounds": options.rounds, "threads": options.threads, "layers": LAYERS, "rows": trainer_run.ROWS}
    with run_server(index) as address:
        report_results(RESULT, settings, measure(index, address, options.rounds))


if __name__ == "__main__":
    main()
