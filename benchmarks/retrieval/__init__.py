"""Recall, speed and memory of approximate search."""
