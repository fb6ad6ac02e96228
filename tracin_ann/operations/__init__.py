"""Operations on an index besides building and querying: planning, verification, audit, repair and removal of rows."""

from __future__ import annotations

from tracin_ann.operations.dry_run import BuildPlan, plan
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import Damage, Draw, VerificationResult, audit, repair, sweep, verify

__all__ = ["BuildPlan", "Damage", "Draw", "VerificationResult", "audit", "plan", "remove", "repair", "sweep", "verify"]
