"""The OCI distribution API over HTTP: pulling, the same for whichever `Source` answers."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from dockerproxy.errors import UpstreamBroken
from dockerproxy.http.request import Request
from dockerproxy.oci.contents import SMALL, BlobAnswer, Content, ManifestAnswer
from dockerproxy.oci.names import Digest, Reference, Repository
from dockerproxy.oci.ranges import Span, content_range, select
from dockerproxy.oci.routes import Kind, Target
from dockerproxy.registry.answers import API_VERSION, told
from dockerproxy.registry.senders import send
from dockerproxy.registry.source import Source

# distribution-spec 1.1, "Warnings": the code is 299, the agent "-"; clients print the text.
_STALE = ("Warning", '299 - "Stale: the registry does not answer, this is what it last said"')

Fields = list[tuple[str, str]]


class Face:
    """Answers requests to `/v2/`."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock

    def answer(self, request: Request, target: Target, source: Source) -> Awaitable[None]:
        """Answer `request`, whose path was found to mean `target`, from `source`. Raise `RegistryError`."""
        if request.method in ("GET", "HEAD") and target.name is not None and target.reference is not None:
            if target.kind is Kind.MANIFEST:
                return self._manifest(request, target.name, target.reference, source)
            if target.kind is Kind.BLOB and isinstance(target.reference, Digest):
                return self._blob(request, target.name, target.reference, source)
        return source.other(request, target)

    async def _manifest(self, request: Request, name: Repository, reference: Reference, source: Source) -> None:
        head = request.method == "HEAD"
        found = await source.manifest(name, reference, request.headers.all("accept"), head=head)
        request.cache_status = found.verdict
        fields = [("Content-Type", found.media_type), *_common(found, found.verdict)]
        if _has(request, found.digest):
            request.respond(304, fields)
        elif found.content is None:
            request.start(200, fields, found.size)
            request.finish()
        else:
            span = _span(request, found.digest, found.size)
            if span is None:
                request.respond(200, fields, found.content)
            else:
                fields.append(("Content-Range", content_range(span, found.size)))
                request.respond(206, fields, found.content[span.start : span.stop])

    async def _blob(self, request: Request, name: Repository, digest: Digest, source: Source) -> None:
        found = await source.blob(name, digest, head=request.method == "HEAD")
        request.cache_status = found.verdict
        content = found.content
        try:
            part = await _begin_blob(request, found)
            del found  # a slow client waits for what follows, and each has its own
            if content is not None and part is not None:
                await send(request, content, *part, self._clock)
        finally:
            if content is not None:
                content.close()


async def _begin_blob(request: Request, found: BlobAnswer) -> tuple[int, int | None] | None:
    """Answer for a blob, or begin to: return where what has yet to be sent starts and stops, None where that is all."""
    fields = [("Content-Type", "application/octet-stream"), *_common(found, found.verdict)]
    if _has(request, found.digest):
        request.respond(304, fields)
        return None
    content, size = found.content, found.size
    if content is None:
        request.start(200, fields, size)
        request.finish()
        return None
    if size is not None and size <= SMALL:
        await content.settled()
    span = _span(request, found.digest, size) if size is not None else None
    if span is not None and size is not None:
        fields.append(("Content-Range", content_range(span, size)))
    start, stop = (span.start, span.stop) if span is not None else (0, size)
    status = 200 if span is None else 206
    length = None if stop is None else stop - start
    if request.method == "HEAD":
        request.start(status, fields, length)
        request.finish()
    elif length is not None and length <= SMALL:
        # Head and body in one write: one system call, one packet for the client to wait for.
        request.respond(status, fields, await _read_small(content, start, length))
    else:
        request.start(status, fields, length)
        return start, stop
    return None


async def _read_small(content: Content, start: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = await content.read(start + len(data), length - len(data))
        if not piece:
            raise UpstreamBroken(f"the content ends {length - len(data)} bytes too early")
        data = data + piece if data else bytes(piece)
    return data


def _common(found: BlobAnswer | ManifestAnswer, verdict: str) -> Fields:
    fields = [
        ("Docker-Content-Digest", str(found.digest)),
        ("Etag", f'"{found.digest}"'),
        ("Accept-Ranges", "bytes"),
        API_VERSION,
        *told(verdict),
    ]
    if verdict == "STALE":
        fields.append(_STALE)
    return fields


def _has(request: Request, digest: Digest) -> bool:
    """Whether the client says that it has this content (If-None-Match, RFC 9110, section 13.1.2)."""
    condition = request.headers.joined("if-none-match")
    if condition is None:
        return False
    tags = {tag.strip().removeprefix("W/").strip('"') for tag in condition.split(",")}
    return condition.strip() == "*" or str(digest) in tags


def _span(request: Request, digest: Digest, size: int) -> Span | None:
    """Return the part that the client asks for; None for the whole. Raise `RangeInvalid`."""
    if request.method != "GET":  # RFC 9110, section 14.2
        return None
    condition = request.headers.get("if-range")
    if condition is not None and condition.strip('"') != str(digest):
        return None
    return select(request.headers.joined("range"), size)
