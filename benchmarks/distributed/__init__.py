"""Builds by launchers, and searches over shards."""
