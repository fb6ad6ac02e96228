"""Conditions under which a command imports libraries: no garbage collection, threads that sleep while they wait."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WAIT_POLICY = "OMP_WAIT_POLICY"
_WAIT_SETTINGS = (_WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@contextmanager
def pause_collector() -> Iterator[None]:
    """Import the library in the block without garbage collection; later collections ignore what exists at its end.

    Importing torch creates about 500,000 objects that live until the process ends. Each full collection, also those at
    exit, would examine all of them and free none. In a process that has already imported torch, nothing changes.
    """
    if "torch" in sys.modules:
        yield
        return
    with postpone_collection():
        try:
            yield
        finally:
            gc.freeze()


@contextmanager
def postpone_collection() -> Iterator[None]:
    """Run the block without garbage collection.

    A task may import a library as large as torch: collections are 0.4 s of the 3 s in which Transformers is imported.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def wait_passively() -> Iterator[None]:
    """Import the library in the block so that its OpenMP threads sleep while they wait for each other.

    By default they spin, which saves some µs per operation. If other processes use the cores, a spinning thread delays
    the thread that it waits for: the gradients of one query of a small model then take 0.5 s instead of 0.02 s. OpenMP
    reads the setting when torch and FAISS are imported. Settings of the user take precedence.
    """
    if any(name in os.environ for name in _WAIT_SETTINGS):
        yield
        return
    os.environ[_WAIT_POLICY] = "PASSIVE"
    try:
        yield
    finally:
        del os.environ[_WAIT_POLICY]
