"""The hosted registry over a tree on disk: helpers of tests that have a reactor of their own."""

from __future__ import annotations

import time
from typing import Any

from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.hosted import HostedRegistry
from dockerproxy.registry.hosted_rules import HostedRules
from dockerproxy.store.disk_access import DiskAccess, LocalDisk
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.local_hosted_store import LocalHostedStore
from tests.support.audit import make_audit_log
from tests.support.parsers import make_parser


def make_hosted_store(reactor: Any, tree: HostedTree, disk: DiskAccess | None = None) -> LocalHostedStore:
    parser = make_parser(reactor)
    return LocalHostedStore.from_tree(reactor, disk or LocalDisk(reactor), tree, parser, b"secret", time.time)


def make_hosted_registry(
    reactor: Any, tree: HostedTree, rules: HostedRules | None = None, audit: AuditLog | None = None
) -> HostedRegistry:
    store, parser = make_hosted_store(reactor, tree), make_parser(reactor)
    return HostedRegistry(store, parser, audit or make_audit_log()[0], rules or HostedRules())
