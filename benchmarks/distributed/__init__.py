"""Queries and builds by several processes."""
