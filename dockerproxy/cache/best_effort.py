"""Best-effort writes of metadata.

Losing an entry costs an extra upstream request but never causes a wrong response. If the disk is full or the file
system is read-only, the error is therefore logged and the request goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twisted.logger import Logger

from dockerproxy.concurrency import in_thread
from dockerproxy.store.records import Records

log = Logger()


def try_put(records: Records, value: Mapping[str, Any], *key: str) -> bool:
    """Save `value` and return whether that succeeded; log disk errors."""
    try:
        records.put(value, *key)
        return True
    except OSError as error:
        log.warn("cannot save the {kind} record of {name}: {reason}", kind=key[0], name=key[1], reason=error.strerror)
        return False


def try_remove(records: Records, *key: str) -> None:
    """Remove a record; log disk errors."""
    try:
        records.remove(*key)
    except OSError as error:
        log.warn("cannot remove the {kind} record of {name}: {reason}", kind=key[0], name=key[1], reason=error.strerror)


async def try_link(reactor: Any, write: Callable[..., None], repository: str, *arguments: Any) -> None:
    """Call `write`, which creates a link in `repository`, in a thread; log disk errors."""
    try:
        await in_thread(reactor, write, repository, *arguments)
    except OSError as error:
        log.warn(
            "cannot write a link in the repository {repository}: {reason}", repository=repository, reason=error.strerror
        )
