"""Operations on an index besides building and querying: planning, verification, audit, repair and removal of rows."""

from __future__ import annotations

from tracin_ann.operations.dry_run import BuildPlan, plan
from tracin_ann.operations.removal import remove
from tracin_ann.operations.verification import (
    AuditSample,
    Damage,
    VerificationResult,
    audit,
    remove_leftovers,
    repair,
    verify,
)

__all__ = [
    "AuditSample",
    "BuildPlan",
    "Damage",
    "VerificationResult",
    "audit",
    "plan",
    "remove",
    "remove_leftovers",
    "repair",
    "verify",
]
