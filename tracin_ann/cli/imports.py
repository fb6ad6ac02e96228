"""Imports of the library by a command, without garbage collection."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_collector() -> Iterator[None]:
    """Import the library in the block without garbage collection; later collections ignore what exists at its end.

    Importing torch creates about 500,000 objects that live until the process ends. Each full collection, also those at
    exit, would examine all of them and free none. In a process that has already imported torch, nothing changes.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
