"""An audit log with its entries in a list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dockerproxy.registry.audit import AuditLog


def make_audit_log() -> tuple[AuditLog, list[Mapping[str, Any]]]:
    """Return an audit log, and the list of its entries, at the POSIX time 1,800,000,000."""
    entries: list[Mapping[str, Any]] = []
    return AuditLog(entries.append, lambda: 1_800_000_000.0), entries
