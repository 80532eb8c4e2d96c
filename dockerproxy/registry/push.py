"""Pushing to the hosted registry and deleting from it (distribution-spec 1.1, "Push" and "Content Management").

An operation runs to its end even if the client disconnects. A thread may be writing at that moment, and the bytes
received so far count if the client returns.
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
from dockerproxy.registry.push_blobs import BlobUploadHandler
from dockerproxy.registry.push_manifests import ManifestPushHandler
from dockerproxy.registry.responses import API_VERSION
from dockerproxy.store.hosted_tree import HostedTree

_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)

log = Logger()


@frozen
class PushHandler:
    """Handles the requests that write to a `HostedTree`."""

    reactor: Any
    store: HostedTree
    _blobs: BlobUploadHandler = field(init=False)
    _manifests: ManifestPushHandler = field(init=False)

    @_blobs.default
    def _default_blobs(self) -> BlobUploadHandler:
        return BlobUploadHandler(self.reactor, self.store)

    @_manifests.default
    def _default_manifests(self) -> ManifestPushHandler:
        return ManifestPushHandler(self.reactor, self.store)

    async def handle(self, request: Request, target: Target) -> bool:
        """Respond to `request` and return True. Return False if `target` does not support its method."""
        operation = self._dispatch(request, target)
        if operation is None:
            return False
        await shield(_run_operation(request, operation), f"{request.method} {request.path}")
        return True

    def _dispatch(self, request: Request, target: Target) -> Coroutine[Any, Any, None] | None:
        name, reference, session = target.name, target.reference, target.session
        match target.kind, request.method:
            case Kind.UPLOADS, "POST" if name is not None:
                return self._blobs.start(request, name)
            case Kind.UPLOAD, _ if name is not None and session is not None:
                return self._blobs.handle_session(request, name, session)
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


async def _run_operation(request: Request, operation: Coroutine[Any, Any, None]) -> None:
    """Run `operation`. Report errors to the client if it is still connected."""
    try:
        await operation
    except ClientDisconnected:
        request.abort()
    except RegistryError:
        if not request.finished:
            raise
    except OSError as error:
        log.error(
            "REGISTRY_DIR: {method} {path} failed: {reason}",
            method=request.method,
            path=request.path,
            reason=str(error),
        )
        if request.finished:
            return
        if error.errno in _DISK_FULL_ERRNOS:
            raise InsufficientStorage("the registry's disk is full") from None
        raise StorageFailed(f"the registry cannot use its disk: {error.strerror}") from None
