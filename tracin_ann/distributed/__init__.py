"""Work spread over processes and machines: shares of units by number, and launchers that run units on workers.

A unit is independent and idempotent: any process may compute it, and may compute it again. For a build, a unit is a
feature file (a partition of rows at a checkpoint), which its worker writes to the file system that all workers share.
"""

from __future__ import annotations

from tracin_ann.distributed.launcher import Launcher, OpenWorker, ThisProcess, Worker
from tracin_ann.distributed.processes import ProcessLauncher
from tracin_ann.distributed.ray_cluster import RayLauncher
from tracin_ann.distributed.units import Shard

__all__ = ["Launcher", "OpenWorker", "ProcessLauncher", "RayLauncher", "Shard", "ThisProcess", "Worker"]
