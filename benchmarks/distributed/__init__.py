"""Builds and queries by several processes and on clusters."""
