"""Whether the bucket can be written at this moment, and keeps to conditions."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

from dockerproxy.bucket import keys
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.errors import InsufficientStorage, StoreRefused, StoreUnavailable
from dockerproxy.store.write_probe import ProbeResult, StoreProbe, StoreState

RESULT_TTL = 10.0
"""Seconds for which a result counts, because a store may charge for requests."""

_SETTING = "REGISTRY_STORE"


def probe_bucket(reactor: Any, bucket: S3Bucket, reads_only: Callable[[], bool]) -> StoreProbe:
    """Return the probe of `bucket`. If `reads_only` returns true, the key may have no right to write.

    A store that does not answer counts as one that hangs: it does so for all nodes, and pulls get what the cache has.
    """
    key = f"{keys.PROBES}{secrets.token_hex(8)}"
    return StoreProbe(reactor, _SETTING, str(bucket.location), partial(_try, bucket, key, reads_only), ttl=RESULT_TTL)


async def _try(bucket: S3Bucket, key: str, reads_only: Callable[[], bool]) -> ProbeResult:
    try:
        if reads_only():
            await bucket.size(keys.TAKEN_OVER)
        else:
            await bucket.put(key, b"")
            await bucket.delete([key])
    except StoreRefused as error:
        return ProbeResult(StoreState.FAILED, f"{_SETTING} refuses us; see the log", f"{_SETTING}: {error.message}")
    except InsufficientStorage as error:
        return ProbeResult(StoreState.FAILED, f"{_SETTING} is full", f"{_SETTING}: {error.message}")
    except StoreUnavailable as error:
        sentence = f"{_SETTING} does not answer; until it does, pushes fail"
        return ProbeResult(StoreState.HANGS, sentence, f"{_SETTING}: {error.message}")
    return ProbeResult(StoreState.WRITABLE)


async def keeps_conditions(bucket: S3Bucket) -> bool:
    """Return whether the store lets only one of two writers create an object, which gc relies on.

    Raise `StoreUnavailable`, or `StoreRefused` if it lets nobody.
    """
    key = f"{keys.PROBES}{secrets.token_hex(8)}"
    await bucket.create(key, b"first")
    holds = await bucket.create(key, b"second") == b"first"
    await bucket.delete([key])
    return holds
