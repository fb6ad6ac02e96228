"""Training runs of other libraries and of plain loops: their checkpoints, learning rates and records."""

from __future__ import annotations
