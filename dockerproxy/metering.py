"""Count and log what the server does, and respond to those who ask for the numbers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from attrs import asdict, frozen
from twisted.internet.defer import Deferred, TimeoutError

from dockerproxy import __version__
from dockerproxy.cache.rate_limits import stored_limits
from dockerproxy.concurrency import in_thread
from dockerproxy.daemon.accesslog import AccessLog
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.errors import RegistryError
from dockerproxy.http.request import Request
from dockerproxy.oci.docker_hub import registry_label
from dockerproxy.oci.names import Registry
from dockerproxy.oci.routes import kind_of
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.registry.pull_gatherer import PullGatherer
from dockerproxy.shared_services import SharedServices
from dockerproxy.shares import ClientShares
from dockerproxy.store.disk_access import DiskAccess
from dockerproxy.store.quarantine import count_damaged

_METRICS_DISK_TIMEOUT = 2.0  # seconds; Prometheus waits for 10 in all


async def handle_metrics(
    reactor: Any,
    shared: SharedServices,
    authority: CertificateAuthority,
    registry_disk: DiskAccess,
    requests: ClientShares,
    request: Request,
) -> None:
    """Respond with the metrics of all processes, in the format that the client prefers.

    `requests` bounds how many are made and sent at a time, because each takes milliseconds and its own memory. Raise
    the errors of `ClientShares`.
    """
    requests.acquire(request.client)
    try:
        used, limit = await shared.cache_space.usage()
        measured = {
            "cache_bytes": used,
            "cache_limit_bytes": limit,
            "certificate_expiry_timestamp_seconds": authority.expires_at,
        }
        if (idle := shared.tombstones.last_idle) is not None:
            measured["cache_evicted_idle_seconds"] = idle
        disks: dict[str, os.statvfs_result] = {}
        damaged: dict[str, int] = {}
        with suppress(OSError):  # the other numbers are needed most on a bad day
            disks["cached"] = await in_thread(reactor, os.statvfs, shared.state.cache.root)
            damaged["cached"] = await in_thread(reactor, count_damaged, shared.state.cache)
        hosted = Deferred.fromCoroutine(registry_disk.read(os.statvfs, shared.state.registry.root))
        with suppress(OSError, RegistryError, TimeoutError):  # it may be on a server that does not answer
            disks["hosted"] = await hosted.addTimeout(_METRICS_DISK_TIMEOUT, reactor)
        if "hosted" in disks:
            listing = Deferred.fromCoroutine(registry_disk.read(count_damaged, shared.state.registry))
            with suppress(OSError, RegistryError, TimeoutError):
                damaged["hosted"] = await listing.addTimeout(_METRICS_DISK_TIMEOUT, reactor)
        accept = request.headers.get("accept") or ""
        content_type, content = await in_thread(reactor, _render_metrics, shared, measured, disks, damaged, accept)
        fields = [("Content-Type", content_type), ("Cache-Control", "no-store")]
        await request.respond_long(200, fields, content)
    finally:
        requests.release(request.client)


def _render_metrics(
    shared: SharedServices,
    measured: Mapping[str, float],
    disks: Mapping[str, os.statvfs_result],
    damaged: Mapping[str, int],
    accept: str,
) -> tuple[str, bytes]:
    # Loaded in a thread, and only if somebody asks for metrics.
    from dockerproxy.admin.operations import OperationHistory
    from dockerproxy.daemon.exposition import (
        ANONYMOUS,
        CONFIGURED,
        damaged_gauge,
        measured_gauges,
        operation_gauge,
        rate_limit_gauges,
        render,
    )
    from dockerproxy.daemon.processes import ProcessUsage

    # A wildcard has any number of hosts, and says nothing about them to those who read the metrics.
    # If there were several logins, it is the one that was used last. Everybody may read the metrics, so it has no name.
    limits: dict[tuple[str, str], dict[str, Any]] = {}
    records, ends = shared.state.open_records(), dict[str, float]()
    with suppress(OSError):
        stored = sorted(stored_limits(records, time.time()), key=lambda limit: limit[1].seen)
        limits = {
            (registry_label(registry), ANONYMOUS if limit.login is None else CONFIGURED): asdict(limit)
            for registry, limit in stored
            if registry_label(registry) in shared.metrics.registries
        }
        ends = OperationHistory(records).last_successes()
    gauges = (
        *measured_gauges(__version__, measured, disks), *rate_limit_gauges(limits), damaged_gauge(damaged),
        operation_gauge(ends),
    )  # fmt: skip
    usage = ProcessUsage.read(shared.metrics.process_ids)
    return render(shared.metrics, gauges, accept, usage, shared.metrics.started_at)


@frozen
class RegistryMeter:
    """Counts what registries do in the metrics, by the names that people write."""

    metrics: Metrics

    def count_upstream(self, registry: Registry, path: str, method: str, status: int, seconds: float) -> None:
        self.metrics.count_upstream(registry_label(registry), kind_of(path), method, status, seconds)
        if status == 429:
            self.metrics.count_rate_limited(registry_label(registry), "registry")

    def count_failure(self, registry: Registry, reason: str) -> None:
        self.metrics.count_failure(registry_label(registry), reason)

    def count_received(self, registry: Registry, size: int) -> None:
        self.metrics.count_received(registry_label(registry), size)

    def count_token_request(self, server: Registry, method: str, status: int) -> None:
        self.metrics.count_token_request(registry_label(server), method, status)

    def count_token_failure(self, server: Registry, reason: str) -> None:
        self.metrics.count_token_failure(registry_label(server), reason)

    def count_rate_limited(self, registry: Registry) -> None:
        """Count a pull that was refused here, because `registry` refuses more."""
        self.metrics.count_rate_limited(registry_label(registry), "proxy")


_access_log = AccessLog()


def count_and_log(metrics: Metrics, pulls: PullGatherer | None, request: Request, seconds: float) -> None:
    """Count a finished request in the metrics, gather it if it is part of a pull, and log it."""
    if request.because and request.status >= 400:
        metrics.count_refusal(request.because)
    metrics.count_request(
        request.registry, request.kind, request.cache_status, request.status, request.bytes_sent, request.latency
    )
    if pulls is not None:
        pulls.note(request)
    log_access(request, seconds)


def log_access(request: Request, seconds: float) -> None:
    """Write the access log line of a finished request."""
    _access_log.record(
        request.client,
        request.method,
        request.host,
        request.path,
        request.status,
        request.bytes_sent,
        seconds,
        request.cache_status,
        request.user or request.proxy_user,
        request.user_agent,
        request.because,
    )
