"""Tables of the time and memory of feature extraction."""

from __future__ import annotations

from benchmarks.common.markdown import SIDES, Row, compose, format_environment, format_sides, format_table
from benchmarks.common.results import read_results


def features() -> str:
    content = read_results("features")
    rows: list[Row] = [
        ("model", "parameters", "plain step, µs/row", "build, µs/row", "plain/build", "plain channels-last/build")
    ]
    for row in content["results"]:
        costs = (f"{row['plain_us']:,.0f}", f"{row['row_us']:,.0f}", f"{row['ratio']:.2f}")
        has_images = row["plain_channels_last_us"] != row["plain_us"]
        channels_last = f"{row['ratio_to_channels_last']:.2f}" if has_images else "–"
        rows.append((row["model"], f"{row['parameters']:,}", *costs, channels_last))
    scope = (
        f"complete builds by `tracin_ann.build` with D = {content['settings']['dim']:,}; other settings are the "
        "defaults, except the batch size (equal to that of the plain step) and the estimate of fidelity (off). "
        "The plain step is batched forward and backward."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def features_summary() -> str:
    """Return the cost of a feature row without the time of each side."""
    content = read_results("features")
    rows: list[Row] = [("model", "parameters", "plain step, µs/row", "build, µs/row", "plain/build")]
    for row in content["results"]:
        costs = (f"{row['plain_us']:,.0f}", f"{row['row_us']:,.0f}", f"{row['ratio']:.2f}")
        rows.append((row["model"], f"{row['parameters']:,}", *costs))
    return format_table(*rows)


def budget() -> str:
    content = read_results("budget")
    steps = ("reading", "forward", "input_gradients", "sketch", "storing")
    rows: list[Row] = [("model", "plain step", *(step.replace("_", " ") for step in steps), "operations, plain/build")]
    for row in content["results"]:
        name = row["model"] + (", channels last" if row["channels_last"] else "")
        costs = (f"{row[f'{step}_us']:,.0f}" for step in ("plain", *steps))
        rows.append((name, *costs, f"{row['arithmetic_ratio']:.2f}"))
    scope = "the steps of feature extraction alone, in µs per row; storing runs in its own thread during a build."
    return compose(scope, format_table(*rows), format_environment(content))


def memory() -> str:
    content = read_results("memory")
    rows: list[Row] = [("model", "rows", "plain training, MB", "build, MB")]
    for row in content["results"]:
        name = row["model"].replace("cheap", "small")  # the name in earlier result files
        plain = f"{row['plain_mb']:,.0f}" if "plain_mb" in row else "–"
        rows.append((name, f"{row['rows']:,}", plain, f"{row['build_mb']:,.0f}"))
    scope = (
        'peak memory of a process that runs a complete build by `tracin_ann.build` with `index="flat"`. Other settings '
        "are the defaults, except the batch size (equal to that of plain training) and, for the small MLP, D = 64."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def precision() -> str:
    content = read_results("precision")
    rows: list[Row] = [
        ("model", "score error of bf16", "of the sketch", "recall fp32", "recall bf16", "µs/row, fp32 / bf16")
    ]
    for row in content["results"]:
        recalls = (format_sides(row[f"{side}_{p}"] for side in SIDES) for p in ("fp32", "bf16"))
        times = format_sides((row[f"row_us_{p}"] for p in ("fp32", "bf16")), ",.0f")
        rows.append((row["model"], f"{row['score_error']:.2%}", f"{row['sketch_error']:.1%}", *recalls, times))
    scope = (
        f"feature extraction alone (D = {content['settings']['dim']:,}). Recall@10 of true TracInCP for "
        "proponents / opponents; errors are relative root mean squares."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def attribution() -> str:
    content = read_results("attribution")
    rows: list[Row] = [("model", "plain step, µs", "build, µs", "plain/build", "loop, µs", "plain loop, µs")]
    for row in content["results"]:
        costs = (f"{row[key]:,.0f}" for key in ("plain_us", "row_us"))
        loops = (f"{row[key]:,.0f}" for key in ("loop_us", "plain_loop_us"))
        rows.append((row["model"], *costs, f"{row['ratio']:.2f}", *loops))
    settings = content["settings"]
    scope = (
        f"complete builds by `tracin_ann.build`, time per graph, D = {settings['dim']:,}, {settings['batch_size']} "
        "graphs per batch; other settings are the defaults. The loops process one graph at a time."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def adapters() -> str:
    """Return the time per row of extraction for adapters, and that of a training step."""
    content = read_results("adapters")
    rows: list[Row] = [
        ("adapter", "trained parameters", "training step, µs/row", "extraction, µs/row", "step/extraction")
    ]
    for row in content["results"]:
        costs = (f"{row[key]:,.0f}" for key in ("parameters", "plain_us", "row_us"))
        rows.append((row["adapter"], *costs, f"{row['ratio']:.2f}"))
    settings, result = content["settings"], content["results"][0]
    scope = (
        f"feature extraction alone, with reading of rows, D = {settings['dim']:,}, {settings['batch_size']} rows per "
        "batch; CPU times on one thread. The base is a Llama with 12 layers and "
        f"{result['base_parameters'] / 1e6:.1f} M frozen parameters; 64 tokens per row, rank {result['rank']}. The "
        "training step is forward and backward of the adapter."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def adapter_precision() -> str:
    """Return the error of exact scores over a base model in bfloat16 and int8."""
    content = read_results("adapter_precision")
    rows: list[Row] = [("base model", "score error", "largest error/largest score", "same first 10")]
    for row in content["results"]:
        shown = format_sides(row[side] for side in SIDES)
        rows.append((row["base"], f"{row['score_error']:.2%}", f"{row['largest_error']:.2%}", shown))
    scope = (
        f"exact scores alone, without a sketch, of {content['settings']['rows']:,} training rows; no index is built. "
        "The error is a relative root mean square. The last column is the share of the first ten proponents / "
        "opponents that are those of a base model in float32."
    )
    return compose(scope, format_table(*rows), format_environment(content))


def proofs() -> str:
    content = read_results("proofs")
    rows: list[Row] = [("rows × checkpoints", "build, CPU s", "proofs", "batch checks", "audit", "total")]
    for row in content["results"]:
        shares = (f"{row[f'{part}_cpu_s'] / row['build_cpu_s']:.1%}" for part in ("proofs", "checks", "audit"))
        size = f"{row['rows']:,} × {row['checkpoints']}"
        rows.append((size, f"{row['build_cpu_s']:.1f}", *shares, f"{row['share']:.1%}"))
    scope = (
        f"complete builds by `tracin_ann.build`, D = {content['settings']['dim']:,}; other settings are the defaults."
    )
    return compose(scope, format_table(*rows), format_environment(content))


TABLES = (features, features_summary, budget, memory, precision, attribution, adapters, adapter_precision, proofs)
