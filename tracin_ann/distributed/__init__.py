"""Work spread over processes and machines: shares of units by number, launchers of workers, and search over shards.

A unit is independent and idempotent: any process may compute it, and may compute it again. For a build, a unit is a
feature file (a partition of rows at a checkpoint), which its worker writes to the file system that all workers share.
For the queries of an open index, each shard has a worker that keeps it open.
"""

from __future__ import annotations

from tracin_ann.distributed.launcher import Launcher, OpenWorker, ThisProcess, Worker, describe_bad_launcher
from tracin_ann.distributed.processes import ProcessLauncher
from tracin_ann.distributed.ray_cluster import RayLauncher
from tracin_ann.distributed.service import ServiceLauncher
from tracin_ann.distributed.service_group import NoReplyError
from tracin_ann.distributed.shard_search import ShardOptions, ShardSearch, ShardTask, open_shard_search
from tracin_ann.distributed.units import Shard

__all__ = [
    "Launcher",
    "NoReplyError",
    "OpenWorker",
    "ProcessLauncher",
    "RayLauncher",
    "ServiceLauncher",
    "Shard",
    "ShardOptions",
    "ShardSearch",
    "ShardTask",
    "ThisProcess",
    "Worker",
    "describe_bad_launcher",
    "open_shard_search",
]
