"""The OCI distribution API over HTTP: pulls, the same for every `RegistryBackend`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from dockerproxy.errors import UpstreamBroken
from dockerproxy.http.request import Request
from dockerproxy.oci.content import VERIFY_FIRST_SIZE, BlobResponse, Content, ManifestResponse
from dockerproxy.oci.names import Digest, Reference, Repository
from dockerproxy.oci.ranges import ByteRange, content_range, parse_range
from dockerproxy.oci.routes import Kind, Target
from dockerproxy.registry.backend import RegistryBackend
from dockerproxy.registry.responses import API_VERSION, FieldList, cache_status_fields
from dockerproxy.registry.streaming import stream_content

# distribution-spec 1.1, "Warnings": the code is 299, the agent "-"; clients print the text.
_STALE_WARNING = ("Warning", '299 - "Stale: the registry did not respond, so the cached copy is used"')


class RegistryAPI:
    """Handles requests to `/v2/`."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock

    def handle(self, request: Request, target: Target, backend: RegistryBackend) -> Awaitable[None]:
        """Respond to `request` for `target` from `backend`. Raise `RegistryError`."""
        if request.method in ("GET", "HEAD") and target.name is not None and target.reference is not None:
            if target.kind is Kind.MANIFEST:
                return self._manifest(request, target.name, target.reference, backend)
            if target.kind is Kind.BLOB and isinstance(target.reference, Digest):
                return self._blob(request, target.name, target.reference, backend)
        return backend.handle(request, target)

    async def _manifest(
        self, request: Request, name: Repository, reference: Reference, backend: RegistryBackend
    ) -> None:
        head_only = request.method == "HEAD"
        manifest = await backend.manifest(name, reference, request.headers.all("accept"), head=head_only)
        request.cache_status = manifest.cache_status
        fields = [("Content-Type", manifest.media_type), *_common_fields(manifest, manifest.cache_status)]
        if _is_not_modified(request, manifest.digest):
            request.respond(304, fields)
        elif manifest.content is None:
            request.start(200, fields, manifest.size)
            request.finish()
        else:
            byte_range = _requested_range(request, manifest.digest, manifest.size)
            if byte_range is None:
                request.respond(200, fields, manifest.content)
            else:
                fields.append(("Content-Range", content_range(byte_range, manifest.size)))
                request.respond(206, fields, manifest.content[byte_range.start : byte_range.stop])

    async def _blob(self, request: Request, name: Repository, digest: Digest, backend: RegistryBackend) -> None:
        blob = await backend.blob(name, digest, head=request.method == "HEAD")
        request.cache_status = blob.cache_status
        content = blob.content
        try:
            remaining = await _start_blob(request, blob)
            del blob  # to free it: streaming to a slow client takes long, and each client has one
            if content is not None and remaining is not None:
                await stream_content(request, content, *remaining, self._clock)
        finally:
            if content is not None:
                content.close()


async def _start_blob(request: Request, blob: BlobResponse) -> tuple[int, int | None] | None:
    """Send the head of a blob's response, and the body if it is small.

    Return the offsets at which the remaining body starts and stops. Return None if the response is complete.
    """
    fields = [("Content-Type", "application/octet-stream"), *_common_fields(blob, blob.cache_status)]
    if _is_not_modified(request, blob.digest):
        request.respond(304, fields)
        return None
    content, size = blob.content, blob.size
    if content is None:
        request.start(200, fields, size)
        request.finish()
        return None
    if size is not None and size <= VERIFY_FIRST_SIZE:
        await content.wait_verified()
    byte_range = _requested_range(request, blob.digest, size) if size is not None else None
    if byte_range is not None and size is not None:
        fields.append(("Content-Range", content_range(byte_range, size)))
    start, stop = (byte_range.start, byte_range.stop) if byte_range is not None else (0, size)
    status = 200 if byte_range is None else 206
    length = None if stop is None else stop - start
    if request.method == "HEAD":
        request.start(status, fields, length)
        request.finish()
    elif length is not None and length <= VERIFY_FIRST_SIZE:
        # Head and body in one write: one system call, and one packet for the client to wait for.
        request.respond(status, fields, await _read_exactly(content, start, length))
    else:
        request.start(status, fields, length)
        return start, stop
    return None


async def _read_exactly(content: Content, start: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        chunk = await content.read(start + len(data), length - len(data))
        if not chunk:
            raise UpstreamBroken(f"the blob ends {length - len(data)} bytes early")
        data = data + chunk if data else bytes(chunk)
    return data


def _common_fields(response: BlobResponse | ManifestResponse, cache_status: str) -> FieldList:
    fields = [
        ("Docker-Content-Digest", str(response.digest)),
        ("Etag", f'"{response.digest}"'),
        ("Accept-Ranges", "bytes"),
        API_VERSION,
        *cache_status_fields(cache_status),
    ]
    if cache_status == "STALE":
        fields.append(_STALE_WARNING)
    return fields


def _is_not_modified(request: Request, digest: Digest) -> bool:
    """Return whether the client already has this content (If-None-Match, RFC 9110, section 13.1.2)."""
    condition = request.headers.joined("if-none-match")
    if condition is None:
        return False
    etags = {tag.strip().removeprefix("W/").strip('"') for tag in condition.split(",")}
    return condition.strip() == "*" or str(digest) in etags


def _requested_range(request: Request, digest: Digest, size: int) -> ByteRange | None:
    """Return the range that the client requests, None for the whole content. Raise `RangeInvalid`."""
    if request.method != "GET":  # RFC 9110, section 14.2
        return None
    if_range = request.headers.get("if-range")
    if if_range is not None and if_range.strip('"') != str(digest):
        return None
    return parse_range(request.headers.joined("range"), size)
