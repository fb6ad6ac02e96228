"""Conditions under which a command imports the library: no garbage collection, threads that sleep while they wait."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tracin_ann.packages import postpone_collection

_WAIT_POLICY = "OMP_WAIT_POLICY"
_WAIT_SETTINGS = (_WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@contextmanager
def pause_collector() -> Iterator[None]:
    """Import the library in the block without garbage collection; later collections ignore what exists at its end.

    Importing torch creates about 500,000 objects that live until the process ends. Each full collection would examine
    all of them and free none. So would those at exit; before them, all objects are frozen. In a process that has
    already imported torch, nothing changes.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.freeze()
    atexit.register(gc.freeze)
    with postpone_collection():
        yield


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
