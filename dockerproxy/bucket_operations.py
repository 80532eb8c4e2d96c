"""The process of one long operation on the bucket of REGISTRY_STORE.

    python -m dockerproxy.bucket_operations NAME OPTIONS

It does for a bucket the work of `dockerproxy.operations`. The daemon starts it in the same way, and it sends the same
events. The settings and the credentials are those of the daemon, in its environment. It has a reactor, because the
client of the store is that of the daemon.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.main import installReactor
from twisted.python.failure import Failure

from dockerproxy.app import ThreadPools, build_connectors, build_silent_servers, open_upstream_tls
from dockerproxy.bucket.assembly import NoCredentials, boot_time, open_bucket
from dockerproxy.bucket.bucket_check import check_bucket
from dockerproxy.bucket.bucket_import import import_into_bucket
from dockerproxy.bucket.gc_collector import GCOptions, GCRefused, collect
from dockerproxy.bucket.manifest_writer import ManifestWriter
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.concurrency import use_monotonic_clock
from dockerproxy.errors import RegistryError
from dockerproxy.operations import (
    IGNORED_SIGNALS,
    Daemon,
    OperationFailed,
    default_memory_limit,
    limit_resources,
    removal_progress,
    run,
    send_finding,
    send_skipped,
)
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress

BucketOperation = Callable[..., Coroutine[Any, Any, Any]]
"""Runs an operation for the `Daemon`, with a reactor, a bucket and options. Return an attrs object for the result."""


async def collect_garbage(daemon: Daemon, reactor: Any, bucket: S3Bucket, *, list: bool = True, **options: Any) -> Any:
    """Run ``gc`` with the `options` of `GCOptions`. Send the removed items if `list` is true."""
    progress = removal_progress(daemon, is_listed=list)
    return await collect(reactor, bucket, GCOptions(**options), progress, boot_time)


async def check(daemon: Daemon, reactor: Any, bucket: S3Bucket, *, links: bool = True, sparse: bool = False) -> Any:
    """Run ``check``. With `sparse`, indexes may lack manifests. There is no check without the links of a bucket."""
    progress = Progress(daemon.report, partial(send_finding, daemon))
    return await check_bucket(reactor, bucket, progress, sparse=sparse)


async def import_directory(
    daemon: Daemon, reactor: Any, bucket: S3Bucket, *, directory: str, force: bool = False
) -> Any:
    """Run ``import``."""
    progress = Progress(daemon.report, partial(send_skipped, daemon))
    staging = Layout(Settings.from_environment(os.environ).registry_dir).staging
    writer = ManifestWriter.of(reactor, bucket, boot_time)
    await writer.view.look()
    writer.view.start()
    return await import_into_bucket(reactor, writer, Path(directory), staging, progress, force=force)


OPERATIONS: Mapping[str, BucketOperation] = {"gc": collect_garbage, "import": import_directory, "check": check}


def run_on_bucket(operation: BucketOperation, options: Mapping[str, Any], daemon: Daemon) -> Any:
    """Return the result of `operation`, which gets a reactor. Raise its errors, or `OperationFailed`."""
    reactor: Any = EPollReactor()  # type: ignore[no-untyped-call]
    installReactor(reactor)  # type: ignore[no-untyped-call]
    use_monotonic_clock(reactor)
    try:
        bucket = open_settings_bucket(reactor, Settings.from_environment(os.environ))
    except (SettingsError, NoCredentials) as error:
        raise OperationFailed("FAILED", f"REGISTRY_STORE: {error}") from None
    results: list[Any] = []

    def start() -> None:
        done: Deferred[Any] = Deferred.fromCoroutine(operation(daemon, reactor, bucket, **options))
        done.addBoth(results.append).addBoth(lambda _: reactor.stop())

    reactor.callWhenRunning(start)
    reactor.run(installSignalHandlers=False)
    (result,) = results
    if isinstance(result, Failure):
        failure = result.value
        if isinstance(failure, GCRefused):
            raise OperationFailed("BUSY" if failure.is_busy else "NOT_UNDERSTOOD", str(failure)) from None
        if isinstance(failure, RegistryError):
            raise OperationFailed("STORE", failure.message) from None
        result.raiseException()
    return result


def open_settings_bucket(reactor: Any, settings: Settings) -> S3Bucket:
    """Return the bucket of REGISTRY_STORE. Raise `SettingsError` and `NoCredentials`."""
    if settings.registry_store is None:
        raise SettingsError("it is not set")
    pools, silent_servers = ThreadPools.start(reactor, 1), build_silent_servers(reactor, settings)
    tls = open_upstream_tls(settings)
    connectors = build_connectors(reactor, settings, pools, lambda host: None, silent_servers, tls, os.urandom(32))
    return open_bucket(reactor, settings.registry_store, connectors.agent, time.time)


def main(arguments: Sequence[str]) -> None:
    """Run the operation that the command line names."""
    name, text = arguments
    for signal_number in IGNORED_SIGNALS:
        signal.signal(signal_number, signal.SIG_IGN)
    memory_limit = default_memory_limit()
    limit_resources(memory_limit)
    options = json.loads(text)
    del options["root"]
    run(Daemon(0, 1), partial(run_on_bucket, OPERATIONS[name], options), memory_limit)


if __name__ == "__main__":
    main(sys.argv[1:])
