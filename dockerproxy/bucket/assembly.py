"""The composition of the hosted registry in a bucket. Only a daemon with REGISTRY_STORE imports this module."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dockerproxy.bucket.blocking_bucket import BlockingBucket, ReactorWait
from dockerproxy.bucket.bucket_hosted_store import BucketHostedStore
from dockerproxy.bucket.bucket_probe import keeps_conditions, probe_bucket
from dockerproxy.bucket.bucket_reads import BucketClient, BucketReads
from dockerproxy.bucket.bucket_tree import BucketTree, ReaderThreads
from dockerproxy.bucket.kept_answers import KeptAnswers
from dockerproxy.bucket.keys import LAYOUT as TREE_LAYOUT
from dockerproxy.bucket.request_signer import NoCredentials, RequestSigner
from dockerproxy.bucket.s3 import BucketAgent, S3Bucket
from dockerproxy.bucket.start_probe import StartProbe
from dockerproxy.cache.composition import CacheParts
from dockerproxy.cache.downloads import DownloadLimits, Downloads
from dockerproxy.cache.space import CacheSpace
from dockerproxy.errors import StoreRefused
from dockerproxy.net.store_location import StoreLocation
from dockerproxy.store.local_hosted_store import LocalUploads
from dockerproxy.store.records import Records
from dockerproxy.thread_pool import ContentParser

__all__ = [
    "TREE_LAYOUT",
    "NoCredentials",
    "StoreRefused",
    "boot_time",
    "keeps_conditions",
    "open_bucket",
    "open_store",
    "open_trees",
    "probe_bucket",
    "probe_store",
]


def probe_store(
    reactor: Any,
    location: StoreLocation,
    variables: Mapping[str, str],
    *,
    read_only: bool,
    proxies: Sequence[str | None],
    verify: str | bool,
) -> list[str]:
    """Look at the bucket before the daemon serves. Return sentences for the log. Blocks.

    The variables of botocore in `variables`, which may come from a .env file, are set for this process and those that
    it forks. Raise `NoCredentials` or `StoreRefused` if the bucket can never be used so.
    """
    for name, value in variables.items():
        if name.startswith("AWS_"):
            os.environ.setdefault(name, value)
    signer = RequestSigner.find_credentials(reactor, location.region, os.environ)
    sentences = StartProbe(location, signer, proxies, verify).run(read_only=read_only)
    if location.time_scale != 1:
        sentences.append(
            f"gc_time_scale={location.time_scale:g} is for tests: gc may delete what slow clients push; remove it"
        )
    return sentences


def open_bucket(reactor: Any, location: StoreLocation, agent: BucketAgent, clock: Any) -> S3Bucket:
    """Return the bucket, with the credentials that `probe_store` found. Raise `NoCredentials`."""
    signer = RequestSigner.find_credentials(reactor, location.region, os.environ)
    return S3Bucket(reactor, agent, signer, location, clock)


def open_store(
    reactor: Any,
    bucket: S3Bucket,
    cache: CacheParts,
    space: CacheSpace,
    records: Records,
    limits: DownloadLimits,
    uploads: LocalUploads,
    parser: ContentParser,
    own_name: Callable[[], str] | None,
) -> BucketHostedStore:
    """Return the store in `bucket`, whose blobs are read through `cache`. `own_name` is as for `BucketUploads`."""
    downloads = Downloads(reactor, BucketClient(bucket), space, cache.ingests, cache.open_readers, limits, cache.board)
    reads = BucketReads(reactor, bucket, cache.blobs, downloads, space, cache.open_readers)
    kept = KeptAnswers(reactor, records)
    store = BucketHostedStore.from_parts(reactor, bucket, reads, kept, parser, uploads, boot_time, own_name)
    reactor.callWhenRunning(store.start)
    return store


def open_trees(reactor: Any, bucket: S3Bucket) -> tuple[Callable[[], BucketTree], Callable[[], BucketTree]]:
    """Return the functions that open a `BucketTree` for threads of this process. That of the second `walks`."""
    blocking, threads = BlockingBucket(bucket, ReactorWait(reactor)), ReaderThreads.start()
    return partial(BucketTree, blocking, threads), partial(BucketTree, blocking, threads, walks=True)


def boot_time() -> float:
    """Return the seconds since the machine started, with those for which it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
