"""Merging of the files of benchmarks.peers.run into one result file.

`python -m benchmarks.tables --table peers` prints the result file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common.paths import RESULTS

RESULT = "peers"


def merge_files(files: list[Path]) -> dict[str, Any]:
    """Return all results, and the environment and settings of each peer; later files replace equal cases."""
    runs: dict[str, Any] = {}
    results: dict[tuple[str, str], Any] = {}
    for path in files:
        content = json.loads(path.read_text())
        settings = content["settings"]
        runs.setdefault(settings["peer"], []).append({"environment": content["environment"], "settings": settings})
        for row in content["results"]:
            results[row["model"], row["side"]] = row
    applicable = [row for row in results.values() if "skipped" not in row]
    return {"runs": runs, "results": sorted(applicable, key=lambda row: row["peer"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="files of benchmarks.peers.run")
    options = parser.parse_args()
    path = RESULTS / f"{RESULT}.json"
    path.write_text(json.dumps(merge_files(options.files), indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
