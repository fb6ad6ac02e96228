"""Operations on an index besides building and querying: plan, verify, audit, repair and remove rows."""

from __future__ import annotations

from tracin_ann.operations.dry_run import BuildPlan, plan
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import Draw, audit, repair, sweep, verify

__all__ = ["BuildPlan", "Draw", "audit", "plan", "remove", "repair", "sweep", "verify"]
