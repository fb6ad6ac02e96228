"""The threads of searches, each of which runs one operation of FAISS and PyTorch at a time by itself.

The threads of a process remain: the system runs new ones on one core for milliseconds, while another one is idle.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from tracin_ann.device import import_faiss


def open_threads() -> ThreadPoolExecutor:
    """Return as many threads as PyTorch uses, which all searches share; a task must not wait for another task."""
    return _start_threads(torch.get_num_threads(), os.getpid())


@functools.cache
def _start_threads(n_threads: int, process: int) -> ThreadPoolExecutor:
    # A forked process has no threads, so it starts others.
    return ThreadPoolExecutor(n_threads, f"tracin-search-{process}", use_one_thread)


def use_one_thread() -> None:
    """Set the number of OpenMP threads to 1, for parallel regions that the calling thread starts.

    FAISS and PyTorch can share one OpenMP library. PyTorch's first operation in a thread sets the number to that of
    `torch.set_num_threads`, if it was called; so it is made to do this before.
    """
    torch.get_num_threads()
    import_faiss().omp_set_num_threads(1)


@contextmanager
def one_openmp_thread() -> Iterator[None]:
    """Restrict FAISS to the calling thread: several wait for each other, for milliseconds if a core is in use."""
    faiss = import_faiss()
    n_threads = faiss.omp_get_max_threads()
    use_one_thread()
    try:
        yield
    finally:
        faiss.omp_set_num_threads(n_threads)
