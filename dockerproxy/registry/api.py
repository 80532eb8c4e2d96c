"""The OCI distribution API over HTTP: which method of a backend a request is for, and how its result is sent."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import quote

from dockerproxy.errors import DigestInvalid, RangeInvalid, SizeInvalid, Unsupported
from dockerproxy.http.message import body_framing, printable_ascii
from dockerproxy.http.request import Request
from dockerproxy.oci.content import VERIFY_FIRST_SIZE, BlobResponse, ManifestResponse
from dockerproxy.oci.manifests import MAX_MANIFEST, OCI_INDEX, data_type
from dockerproxy.oci.names import Digest, Repository, Tag, parse_tag
from dockerproxy.oci.paging import NamePage, Page, next_link
from dockerproxy.oci.ranges import ByteRange, MultipartRanges, Segment, content_range, parse_ranges
from dockerproxy.oci.referrers import ReferrersQuery
from dockerproxy.oci.routes import Kind, Target, parse_query
from dockerproxy.oci.uploads import UploadParameters, UploadStatus, range_header
from dockerproxy.registry.backend import PullBackend, RegistryBackend, UploadChunk
from dockerproxy.registry.principal import Principal
from dockerproxy.registry.responses import API_VERSION, FieldList, cache_status_fields, respond_options, respond_ping
from dockerproxy.registry.streaming import WHOLE_OF_UNKNOWN_SIZE, read_segments, stream_content
from dockerproxy.shares import ClientShares

# distribution-spec 1.1, "Warnings": the code is 299, the agent "-"; clients print the text.
_STALE_WARNING = ("Warning", '299 - "Stale: the registry did not respond, so the cached copy is used"')

_BLOB_TYPE = ("Content-Type", "application/octet-stream")

_SHORT_CONTENT = 64 * 1024  # bytes of a response that the kernel accepts at once
_MAX_IN_MEMORY = 64 * 1024 * 1024  # bytes of longer responses that clients have not read yet
_MAX_ENTRIES = 10_000  # of a list per response; its Link leads to the rest


class RegistryAPI:
    """Handles requests to `/v2/`. Each (kind of target, method) has one method here, which calls one of the backend."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self.long_responses = ClientShares(
            "bytes of manifests and lists that are being sent", _MAX_IN_MEMORY, _MAX_IN_MEMORY // 2
        )
        """The contents of responses that are in memory until slow clients have read them."""

    def handle(
        self, request: Request, target: Target, backend: RegistryBackend, principal: Principal
    ) -> Awaitable[None]:
        """Return the awaitable that responds to `request` from `backend`. It raises `RegistryError`.

        Raise `Unsupported` if `target` does not support the method.
        """
        pull = self.handle_pull(request, target, backend)
        if pull is not None:
            return pull
        operation = _OPERATIONS.get(_operation_key(request, target))
        if operation is not None:
            return operation(self, request, target, backend, principal)
        methods = allowed_methods(target.kind)
        if request.method == "OPTIONS":
            return respond_options(request, methods)
        allowed = ", ".join(methods)
        raise Unsupported(f"{request.method} is not supported here; supported: {allowed}", headers=[("Allow", allowed)])

    def handle_pull(self, request: Request, target: Target, backend: PullBackend) -> Awaitable[None] | None:
        """Return the awaitable that responds to `request` if a `PullBackend` can. Return None otherwise."""
        operation = _PULL_OPERATIONS.get(_operation_key(request, target))
        return None if operation is None else operation(self, request, target, backend)

    # pulls

    async def _ping(self, request: Request, target: Target, backend: PullBackend) -> None:
        await backend.ping()
        respond_ping(request)

    async def _manifest(self, request: Request, target: Target, backend: PullBackend) -> None:
        accept, head_only = request.headers.all("accept"), request.method == "HEAD"
        manifest = await backend.manifest(target.name, target.reference, accept, head=head_only)
        request.cache_status, request.because = manifest.cache_status, manifest.because
        fields = [("Content-Type", data_type(manifest.media_type)), *_common_fields(manifest)]
        fields += manifest.rate_limit_fields
        if _is_not_modified(request, manifest.digest):
            request.respond(304, fields)
        elif manifest.content is None:
            request.start(200, fields, manifest.size)
            request.finish()
        else:
            status, content = 200, manifest.content
            ranges = _requested_ranges(request, manifest.digest, manifest.size)
            if ranges:
                segments, _ = _select_ranges(fields, ranges, manifest.size)
                status, content = 206, b"".join(_bytes_of(segment, content) for segment in segments)
            if len(content) <= _SHORT_CONTENT:  # almost always
                request.respond(status, fields, content)
            else:
                await self._respond_content(request, status, fields, content)

    async def _blob(self, request: Request, target: Target, backend: PullBackend) -> None:
        blob = await backend.blob(target.name, target.digest, head=request.method == "HEAD")
        request.cache_status, request.because = blob.cache_status, blob.because
        content = blob.content
        try:
            segments = await _start_blob(request, blob)
            del blob  # to free it: streaming to a slow client takes long, and each client has one
            if content is not None and segments is not None:
                await stream_content(request, content, segments, self._clock)
        finally:
            if content is not None:
                content.close()

    async def _referrers(self, request: Request, target: Target, backend: PullBackend) -> None:
        query = ReferrersQuery.parse(request.query)
        index = await backend.referrers(target.name, target.digest, query)
        request.cache_status = index.cache_status
        fields = [("Content-Type", OCI_INDEX), API_VERSION, *cache_status_fields(index.cache_status)]
        parameters = {}
        if index.filtered:
            fields.append(("OCI-Filters-Applied", "artifactType"))
        if query.artifact_type is not None:
            parameters["artifactType"] = query.artifact_type
        if index.last is not None:
            fields.append(next_link(f"/v2/{target.name}/referrers/{target.digest}", {**parameters, "last": index.last}))
        await self._respond_content(request, 200, fields, index.content)

    async def _respond_page(self, request: Request, path: str, page: NamePage, document: dict[str, Any]) -> None:
        fields = [("Content-Type", "application/json"), API_VERSION]
        if page.more:
            fields.append(next_link(path, {"n": str(len(page.names)), "last": page.names[-1]}))
        await self._respond_content(request, 200, fields, json.dumps(document).encode())

    async def _respond_content(self, request: Request, status: int, fields: FieldList, content: bytes) -> None:
        """Send `content`. It is in memory until the client has read it, so raise the errors of `ClientShares`."""
        if len(content) <= _SHORT_CONTENT:
            request.respond(status, fields, content)
            return
        self.long_responses.acquire(request.client, len(content))
        try:
            await request.respond_long(status, fields, content)
        finally:
            self.long_responses.release(request.client, len(content))

    # lists

    async def _catalog(self, request: Request, target: Target, backend: RegistryBackend, principal: Principal) -> None:
        page = await backend.catalog(Page.parse(request.query, _MAX_ENTRIES))
        await self._respond_page(request, "/v2/_catalog", page, {"repositories": page.names})

    async def _tags(self, request: Request, target: Target, backend: RegistryBackend, principal: Principal) -> None:
        page = await backend.tags(target.name, Page.parse(request.query, _MAX_ENTRIES))
        await self._respond_page(
            request, f"/v2/{target.name}/tags/list", page, {"name": target.name, "tags": page.names}
        )

    # manifests and deletions

    async def _put_manifest(
        self, request: Request, target: Target, backend: RegistryBackend, principal: Principal
    ) -> None:
        name, reference = target.name, target.reference
        digest = reference if isinstance(reference, Digest) else None
        tags = _tag_parameters(request.query) if isinstance(reference, Digest) else [reference]
        try:
            content = await request.read_all(MAX_MANIFEST)
        except SizeInvalid:
            raise SizeInvalid(f"the manifest is longer than {MAX_MANIFEST} bytes") from None
        media_type = (request.headers.get("content-type") or "").partition(";")[0].strip()
        manifest = await backend.put_manifest(principal, name, content, media_type, digest, tags)
        fields = _created_fields(f"/v2/{name}/manifests/{manifest.digest}", manifest.digest)
        if manifest.subject is not None:
            fields.append(("OCI-Subject", str(manifest.subject)))
        if digest is not None and tags:
            fields.append(("OCI-Tag", ", ".join(tags)))
        request.respond(201, fields)

    async def _delete_manifest(
        self, request: Request, target: Target, backend: RegistryBackend, principal: Principal
    ) -> None:
        await backend.delete_manifest(principal, target.name, target.reference)
        request.respond(202, [API_VERSION])

    async def _delete_blob(
        self, request: Request, target: Target, backend: RegistryBackend, principal: Principal
    ) -> None:
        await backend.delete_blob(principal, target.name, target.digest)
        request.respond(202, [API_VERSION, ("Docker-Content-Digest", str(target.digest))])

    # uploads

    async def _start_upload(
        self, request: Request, target: Target, backend: RegistryBackend, principal: Principal
    ) -> None:
        parameters = UploadParameters.parse(request.query)
        status = await backend.start_upload(principal, target.name, parameters, request)
        digest = parameters.mount or parameters.digest
        if status is not None:
            request.respond(202, _upload_fields(target.name, status))
        elif digest is not None:
            request.respond(201, _created_fields(f"/v2/{target.name}/blobs/{digest}", digest))

    async def _upload_status(
        self, request: Request, target: Target, backend: RegistryBackend, principal: Principal
    ) -> None:
        request.respond(204, _upload_fields(target.name, await backend.upload_status(target.name, target.session)))

    async def _upload_chunk(
        self, request: Request, target: Target, backend: RegistryBackend, principal: Principal
    ) -> None:
        try:
            status = await backend.upload_chunk(principal, target.name, target.session, _chunk(request))
        except RangeInvalid as error:
            raise await _with_position(error, target, backend) from None
        request.respond(202, _upload_fields(target.name, status))

    async def _finish_upload(
        self, request: Request, target: Target, backend: RegistryBackend, principal: Principal
    ) -> None:
        digest = UploadParameters.parse(request.query).digest
        if digest is None:
            raise DigestInvalid("the request that completes an upload needs the digest parameter")
        try:
            await backend.finish_upload(principal, target.name, target.session, _chunk(request), digest)
        except RangeInvalid as error:
            raise await _with_position(error, target, backend) from None
        request.respond(201, _created_fields(f"/v2/{target.name}/blobs/{digest}", digest))

    async def _cancel_upload(
        self, request: Request, target: Target, backend: RegistryBackend, principal: Principal
    ) -> None:
        await backend.cancel_upload(principal, target.name, target.session)
        request.respond(204, [API_VERSION])


_PULL_OPERATIONS: dict[tuple[Kind, str], Callable[[RegistryAPI, Request, Target, PullBackend], Awaitable[None]]] = {
    (Kind.BASE, "GET"): RegistryAPI._ping,
    (Kind.MANIFEST, "GET"): RegistryAPI._manifest,
    (Kind.BLOB, "GET"): RegistryAPI._blob,
    (Kind.REFERRERS, "GET"): RegistryAPI._referrers,
}

_OPERATIONS: dict[
    tuple[Kind, str], Callable[[RegistryAPI, Request, Target, RegistryBackend, Principal], Awaitable[None]]
] = {
    (Kind.CATALOG, "GET"): RegistryAPI._catalog,
    (Kind.TAGS, "GET"): RegistryAPI._tags,
    (Kind.MANIFEST, "PUT"): RegistryAPI._put_manifest,
    (Kind.MANIFEST, "DELETE"): RegistryAPI._delete_manifest,
    (Kind.BLOB, "DELETE"): RegistryAPI._delete_blob,
    (Kind.UPLOADS, "POST"): RegistryAPI._start_upload,
    (Kind.UPLOAD, "GET"): RegistryAPI._upload_status,
    (Kind.UPLOAD, "PATCH"): RegistryAPI._upload_chunk,
    (Kind.UPLOAD, "PUT"): RegistryAPI._finish_upload,
    (Kind.UPLOAD, "DELETE"): RegistryAPI._cancel_upload,
}


def _operation_key(request: Request, target: Target) -> tuple[Kind, str]:
    # HEAD is the same operation as GET; `Request` leaves out the body.
    return target.kind, "GET" if request.method == "HEAD" else request.method


def allowed_methods(kind: Kind) -> list[str]:
    """Return the methods that targets of this kind support."""
    methods = [method for key, method in (*_PULL_OPERATIONS, *_OPERATIONS) if key is kind]
    return ["GET", "HEAD", *methods[1:]] if methods[0] == "GET" else methods


def _tag_parameters(query: str) -> list[Tag]:
    """Return the tags that a push by digest asks for."""
    return list(dict.fromkeys(parse_tag(value) for name, value in parse_query(query) if name == "tag"))


def _chunk(request: Request) -> UploadChunk:
    return UploadChunk(request, request.headers.get("content-range"), body_framing(request.head))


async def _with_position(error: RangeInvalid, target: Target, backend: RegistryBackend) -> RangeInvalid:
    """Return the error of a chunk that is out of order, with the position at which the client can go on."""
    status = await backend.upload_status(target.name, target.session)
    return RangeInvalid(error.message, headers=_upload_fields(target.name, status))


def _upload_fields(name: Repository, status: UploadStatus) -> FieldList:
    return [
        API_VERSION,
        ("Location", f"/v2/{name}/blobs/uploads/{status.session}{_node_query(status)}"),
        ("Range", range_header(status.size)),
        ("Docker-Upload-UUID", status.session),
    ]


def _node_query(status: UploadStatus) -> str:
    return f"?node={quote(status.node, safe=':')}" if status.node else ""


def _created_fields(location: str, digest: Digest) -> FieldList:
    return [API_VERSION, ("Location", location), ("Docker-Content-Digest", str(digest))]


async def _start_blob(request: Request, blob: BlobResponse) -> Iterable[Segment] | None:
    """Send the head of a blob's response, and the body if it is small.

    Return the segments of the remaining body, or None if the response is complete.
    """
    fields = [_BLOB_TYPE, *_common_fields(blob)]
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
    status, length, segments = 200, size, _whole(size)
    ranges = _requested_ranges(request, blob.digest, size) if size is not None else []
    if ranges and size is not None:
        status = 206
        content.expect(ranges)
        segments, length = _select_ranges(fields, ranges, size)
    if request.method == "HEAD":
        request.start(status, fields, length)
        request.finish()
    elif length is not None and length <= VERIFY_FIRST_SIZE:
        # Head and body in one write: one system call, and one packet for the client to wait for.
        request.respond(status, fields, await read_segments(content, segments))
    else:
        request.start(status, fields, length)
        return segments
    return None


def _whole(size: int | None) -> Iterable[Segment]:
    return [WHOLE_OF_UNKNOWN_SIZE if size is None else ByteRange(0, size)]


def _select_ranges(fields: FieldList, ranges: list[ByteRange], size: int) -> tuple[Iterable[Segment], int]:
    """Return the segments and the length of a 206 response's body with `ranges` of `size` bytes, and set its `fields`.

    Several ranges become a multipart body. Nobody who pushes content can know its boundary, which is random.
    """
    if len(ranges) == 1:
        fields.append(("Content-Range", content_range(ranges[0], size)))
        return ranges, ranges[0].size
    body = MultipartRanges(ranges, size, dict(fields)["Content-Type"], secrets.token_hex(16))
    fields[:] = [("Content-Type", body.content_type), *(field for field in fields if field[0] != "Content-Type")]
    return body, body.length


def _bytes_of(segment: Segment, content: bytes) -> bytes:
    return segment if isinstance(segment, bytes) else content[segment.start : segment.stop]


def _common_fields(response: BlobResponse | ManifestResponse) -> FieldList:
    fields = [
        ("Docker-Content-Digest", str(response.digest)),
        ("Etag", f'"{response.digest}"'),
        ("Accept-Ranges", "bytes"),
        API_VERSION,
        *cache_status_fields(response.cache_status),
    ]
    if response.because:
        fields.append(("X-Cache-Because", printable_ascii(response.because)))
    if response.cache_status == "STALE":
        fields.append(_STALE_WARNING)
    return fields


def _is_not_modified(request: Request, digest: Digest) -> bool:
    """Return whether the client already has this content (If-None-Match, RFC 9110, section 13.1.2)."""
    condition = request.headers.joined("if-none-match")
    if condition is None:
        return False
    etags = {tag.strip().removeprefix("W/").strip('"') for tag in condition.split(",")}
    return condition.strip() == "*" or str(digest) in etags


def _requested_ranges(request: Request, digest: Digest, size: int) -> list[ByteRange]:
    """Return the ranges that the client requests, an empty list for the whole content. Raise `RangeInvalid`."""
    if request.method != "GET":  # RFC 9110, section 14.2
        return []
    if_range = request.headers.get("if-range")
    if if_range is not None and if_range.strip('"') != str(digest):
        return []
    return parse_ranges(request.headers.joined("range"), size)
