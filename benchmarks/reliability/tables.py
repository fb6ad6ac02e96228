"""Tables of damage, kills, concurrent readers and long use."""

from __future__ import annotations

from benchmarks.common.markdown import Row, compose, format_environment, format_table
from benchmarks.common.results import read_results


def reliability() -> str:
    """Return the results of flips, fuzzing, readers and the soak, and the cost of checksums."""
    flips, fuzz, readers, soak, checksums = map(read_results, ("flips", "fuzz", "readers", "soak", "checksums"))
    flipped, queried = flips["results"], readers["results"]
    found, missed = sum(r["found"] for r in flipped), sum(len(r["missed"]) for r in flipped)
    wrong, errors = sum(r["wrong"] for r in queried), sum(len(r["errors"]) for r in queried)
    soaked, altered = soak["results"][0], fuzz["results"][0]
    files = f"{soaked['warm']['open_files']}, then {soaked['end']['open_files']}"
    rows: list[Row] = [
        ("trial", "result"),
        ("flipped bytes", f"{found} of {sum(r['flips'] for r in flipped)} found, {missed} missed"),
        ("altered files", f"{altered['all']:,}, {len(altered['failures'])} failures"),
        (
            "answers during writes",
            f"{sum(r['answers'] for r in queried):,} over {sum(r['generations_seen'] for r in queried)} generations, "
            f"{wrong} wrong, {errors} errors",
        ),
        (
            f"{soaked['queries']:,} queries in one process",
            f"memory grows by {soaked['growth']:.1%} after the first thousand; open files: {files}",
        ),
    ]
    for row in checksums["results"]:
        rows.append((f"checksums, {row['what'].replace('ask', 'query')}", f"{row['checksums']:.2%} of the CPU time"))
    scope = (
        "complete builds, queries, removals and verification through the public functions; for altered files, each "
        "reader alone."
    )
    return compose(scope, format_table(*rows), format_environment(readers))


def kills() -> str:
    """Return the number of kills, the files that they left, what readers found, and how the commands ended."""
    content = read_results("kills")
    rows: list[Row] = [
        ("command", "without kills, s", "kills", "temporary left", "reader found none / old / new", "ends, all equal")
    ]
    for row in content["results"]:
        found = " / ".join(f"{number}" for number in row["readers_found"].values())
        counts = (str(row["kills"]), str(row["left"]["a temporary"]), found, str(row["ended_as_undisturbed"]))
        rows.append((row["command"], f"{row['seconds']:.2f}", *counts))
    scope = f"complete builds and removals through the public functions, {content['settings']['rows']:,} rows."
    return compose(scope, format_table(*rows), format_environment(content))


TABLES = (reliability, kills)
