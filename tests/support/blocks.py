"""Synthetic feature blocks and headers for the tests of the store."""

from __future__ import annotations

import numpy as np

from tracin_ann.store import Dtype, FeatureBlock, StoreLayout
from tracin_ann.store.stored_rows import FileHeader

NUMBERS: list[Dtype] = ["float16", "float32"]
CODES: list[Dtype] = ["int8", "int4", "int2", "int1"]
DTYPES = [*NUMBERS, *CODES]
DIM = 5
LAYOUT = StoreLayout(n_rows=23, partition_rows=8, dim=DIM, dtype="float32", digests=("spec",) * 3)


def make_block(start: int, stop: int, *, dim: int = DIM, seed: int = 0) -> FeatureBlock:
    rng = np.random.default_rng([seed, start, stop])
    n_rows = stop - start
    return FeatureBlock(
        ids_N=np.arange(start, stop, dtype=np.int64),
        feature_ND=rng.standard_normal((n_rows, dim), dtype=np.float32),
        sqnorm_N=rng.random(n_rows),
        loss_N=rng.random(n_rows, dtype=np.float32),
    )


def make_header(block: FeatureBlock, *, dtype: Dtype = "float16", block_rows: int = 4) -> FileHeader:
    start, stop = int(block.ids_N[0]), int(block.ids_N[-1]) + 1
    return FileHeader("spec", start, stop, 2, block.feature_ND.shape[1], dtype, block_rows)
