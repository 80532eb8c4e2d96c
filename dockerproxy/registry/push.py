"""Pushing to the registry that is hosted here, and deleting from it (distribution-spec 1.1, "Push", "Content
Management").

What is begun here is brought to its end whether or not the client still listens: a thread may be writing at the moment
when it goes, and what has arrived counts when it comes back.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine
from typing import Any

from attrs import field, frozen
from twisted.logger import Logger

from dockerproxy.concurrency import in_thread, shield
from dockerproxy.errors import BlobUnknown, InsufficientStorage, RegistryError, StorageFailed
from dockerproxy.http.request import ClientDisconnected, Request
from dockerproxy.oci.names import Digest, Repository
from dockerproxy.oci.routes import Kind, Target
from dockerproxy.registry.answers import API_VERSION
from dockerproxy.registry.push_blobs import BlobPush
from dockerproxy.registry.push_manifests import ManifestPush
from dockerproxy.store.hosted_store import HostedStore

_FULL = (errno.ENOSPC, errno.EDQUOT)

log = Logger()


@frozen
class Push:
    """Answers what writes to a `HostedStore`."""

    reactor: Any
    store: HostedStore
    _blobs: BlobPush = field(init=False)
    _manifests: ManifestPush = field(init=False)

    @_blobs.default
    def _push_blobs(self) -> BlobPush:
        return BlobPush(self.reactor, self.store)

    @_manifests.default
    def _push_manifests(self) -> ManifestPush:
        return ManifestPush(self.reactor, self.store)

    async def answer(self, request: Request, target: Target) -> bool:
        """Answer `request`, and say whether that was possible: its method may be none that `target` has."""
        work = self._work(request, target)
        if work is None:
            return False
        await shield(_answered(request, work), f"{request.method} {request.path}")
        return True

    def _work(self, request: Request, target: Target) -> Coroutine[Any, Any, None] | None:
        name, reference, session = target.name, target.reference, target.session
        match target.kind, request.method:
            case Kind.UPLOADS, "POST" if name is not None:
                return self._blobs.start(request, name)
            case Kind.UPLOAD, _ if name is not None and session is not None:
                return self._blobs.go_on(request, name, session)
            case Kind.MANIFEST, "PUT" if name is not None and reference is not None:
                return self._manifests.put(request, name, reference)
            case Kind.MANIFEST, "DELETE" if name is not None and reference is not None:
                return self._manifests.delete(request, name, reference)
            case Kind.BLOB, "DELETE" if name is not None and isinstance(reference, Digest):
                return self._delete_blob(request, name, reference)
        return None

    async def _delete_blob(self, request: Request, name: Repository, digest: Digest) -> None:
        if not await in_thread(self.reactor, self.store.links.unlink_layer, name, digest):
            raise BlobUnknown(f"{name} has no blob {digest}")
        request.respond(202, [API_VERSION, ("Docker-Content-Digest", str(digest))])


async def _answered(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, whose troubles are the client's to hear of, if it is still there."""
    try:
        await work
    except ClientDisconnected:
        request.abort()
    except RegistryError:
        if not request.finished:
            raise
    except OSError as error:
        log.error(
            "REGISTRY_DIR: {method} {path} failed: {why}", method=request.method, path=request.path, why=str(error)
        )
        if request.finished:
            return
        if error.errno in _FULL:
            raise InsufficientStorage("the registry's disk is full") from None
        raise StorageFailed(f"the registry cannot use its disk: {error.strerror}") from None
