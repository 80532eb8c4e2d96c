"""Takes over a bucket that another registry has written: its repositories go into the catalog, once.

Everything else of such a bucket is used as it is, and the other registry can use it again later.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.bucket import keys
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.concurrency import gather
from dockerproxy.errors import RegistryError
from dockerproxy.oci.names import Repository

_RETRY_INTERVAL = 30.0  # seconds; the store may be down when the daemon starts
_AT_ONCE = 8

log = Logger()


async def take_over(reactor: Any, bucket: S3Bucket) -> None:
    """Put the repositories of the bucket into the catalog, unless that was done. Try again until it succeeds."""
    while True:
        try:
            if await bucket.size(keys.TAKEN_OVER) is None:
                count = await _fill_catalog(bucket)
                await bucket.put(keys.TAKEN_OVER, b"")
                log.info("{place}: took over {count} repositories", place=str(bucket.location), count=count)
            return
        except RegistryError as error:
            log.warn("the catalog of {place} is not complete: {reason}", place=bucket.location, reason=error.message)
        await deferLater(reactor, _RETRY_INTERVAL)


async def _fill_catalog(bucket: S3Bucket) -> int:
    """Write the keys of the catalog by one listing of all links. Return the number of repositories."""
    last: Repository | None = None
    found: dict[Repository, None] = {}
    async for entry in bucket.list_keys(keys.REPOSITORIES):
        if "/_manifests/revisions/" in entry.key and entry.key.endswith("/link"):
            repository = keys.repository_of(entry.key)
            if repository is not None and repository != last:
                found[repository] = None
                last = repository
    await gather((bucket.put(keys.catalog_key(repository), b"") for repository in found), _AT_ONCE)
    return len(found)
