"""Integrations: tasks from the runs of training libraries and plain loops, and data sets in common formats."""

from __future__ import annotations
