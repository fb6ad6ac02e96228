"""The inverted-list index on real features: recall against rows scored, beside FAISS's own inner-product lists."""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np
import torch

from benchmarks import common
from examples import mnist
from tracin_ann import BuildConfig, InfluenceIndex, build
from tracin_ann.device import import_faiss
from tracin_ann.search import FlatIndex, IVFIndex, IVFParams, search_both
from tracin_ann.types import TopK

K = 10


def figures(found: tuple[TopK, TopK], true: tuple[np.ndarray, np.ndarray], n_rows: int) -> dict[str, float]:
    result = {}
    for name, top_k, ids in zip(("proponents", "opponents"), found, true, strict=True):
        recall = common.recalls(ids, [row.tolist() for row in top_k.ids])
        result |= {
            name: float(recall.mean()),
            f"{name}_p10": float(np.percentile(recall, 10)),
            f"{name}_scored": float(np.mean(top_k.rows_scored) / n_rows),
        }
    return result


def faiss_default(rows: np.ndarray, queries: np.ndarray, true: tuple[np.ndarray, np.ndarray]) -> list[dict]:
    """Return FAISS's `IVF256,Flat` with inner product as it comes, at several nprobe."""
    faiss = import_faiss()
    index = faiss.index_factory(rows.shape[1], "IVF256,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    sizes = np.array([index.invlists.list_size(i) for i in range(index.nlist)])
    results = []
    for nprobe in (8, 16, 32, 64):
        index.nprobe = nprobe
        result: dict[str, float | int | str] = {"index": "FAISS IVF256,Flat", "nprobe": nprobe}
        for name, sign, ids in (("proponents", 1, true[0]), ("opponents", -1, true[1])):
            _, found = index.search(sign * queries, K)
            _, keys = index.quantizer.search(sign * queries, nprobe)
            recall = common.recalls(ids, found.tolist())
            result |= {name: float(recall.mean()), f"{name}_p10": float(np.percentile(recall, 10))}
            result[f"{name}_scored"] = float((sizes[keys].sum(1) + index.nlist).mean() / len(rows))
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--dim", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mnist.train(options.data, folder, options.rows, 0)
        task = mnist.task(options.data, folder, str(options.rows))
        report = build(task, f"{folder}/index", BuildConfig(dim=options.dim, index="flat", batch_size=128))
        print(f"features: {report.rows_extracted / report.seconds:.0f} rows x checkpoints a second", flush=True)
        index = InfluenceIndex.open(f"{folder}/index", task)
        queries = index.features("query", range(options.queries))
        view = index.view()
        cpu = torch.device("cpu")
        exact = search_both(FlatIndex(view, cpu), queries, K)
        true = tuple(np.stack(top_k.ids) for top_k in exact)
        began = time.perf_counter()
        lists = IVFIndex.build(view, IVFParams(), cpu)
        built = time.perf_counter() - began
        results = []
        for alpha in (0.0, 0.1, 0.2):
            for fraction in (0.01, 0.02, 0.03, 0.05, 0.08):
                probing = lists.probing(alpha=alpha, scan_fraction=fraction)
                row = {"index": "ivf", "alpha": alpha, "scan_fraction": fraction, "build_seconds": built}
                results.append(row | figures(search_both(probing, queries, K), true, len(view)))
                print(results[-1], flush=True)
        rows = np.concatenate([block for _, block in view.blocks(8192)])
        results += faiss_default(rows, queries, true)
        print(*results[-4:], sep="\n")
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    print(common.write("ivf_mnist", settings, results))


if __name__ == "__main__":
    main()
