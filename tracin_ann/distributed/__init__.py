"""Work of several processes: a query over the shards of an index, each searched by a worker process of its own."""

from __future__ import annotations

from tracin_ann.distributed.shard_search import ShardOptions, ShardSearch, ShardTask, open_shard_search

__all__ = [
    "ShardOptions",
    "ShardSearch",
    "ShardTask",
    "open_shard_search",
]
