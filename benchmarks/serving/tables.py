"""Tables of the latency and throughput of tracin-serve, and of texts that are typed on the command line."""

from __future__ import annotations

from benchmarks.common.markdown import Row, compose, format_environment, format_table
from benchmarks.common.results import read_results


def serving() -> str:
    """Return the latency and throughput of tracin-serve, and of its pages."""
    content = read_results("serving")
    settings = content["settings"]
    rows: list[Row] = [("queries", "median, ms", "95th percentile, ms", "per second", "wrong", "growth of memory")]
    pages: list[Row] = [("page", "kB", "median, ms", "95th percentile, ms")]
    for row in content["results"]:
        times = (f"{row['p50_ms']:.1f}", f"{row['p95_ms']:.1f}")
        if "bytes" in row:
            pages.append((row["way"].removeprefix("page of "), f"{row['bytes'] / 1e3:.0f}", *times))
        else:
            checked = (str(row["wrong"]), f"{row['memory_growth']:.1%}") if "wrong" in row else ("–", "–")
            rows.append((row["way"], *times, f"{row['per_second']:.0f}", *checked))
    scope = (
        f"a default index of the CNN of examples/mnist.py on {settings['rows']:,} digits, 3 checkpoints; "
        f"{settings['clients']} clients at the same time with {settings['each']} queries each, all different, over "
        f"loopback; pages by one client, {settings['pages']} loads each."
    )
    return compose(scope, format_table(*rows), format_table(*pages), format_environment(content))


def typed_text() -> str:
    """Return the time until a text that is typed on the command line is answered."""
    content = read_results("typed_text")
    settings = content["settings"]
    rows: list[Row] = [("command", "median, s", "fastest, s")]
    for row in content["results"]:
        rows.append((f"`{row['command']}`", f"{row['median_s']:.2f}", f"{row['fastest_s']:.2f}"))
    scope = (
        f"a BERT of {settings['layers']} layers on {settings['rows']:,} sentences; each command as a new process; "
        f"{settings['rounds']} rounds, each with one run of every command and another text."
    )
    return compose(scope, format_table(*rows), format_environment(content))


TABLES = (serving, typed_text)
