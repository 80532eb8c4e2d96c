"""An object store in memory, with the interface of `upstream.agent.Agent`. Tests can script its bad days."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from attrs import define, field, frozen
from twisted.internet.defer import Deferred

from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.http.headers import Headers
from dockerproxy.net.store_location import StoreLocation
from tests.cache.support.upstream import ScriptedResponse

START = datetime(2030, 1, 1, tzinfo=UTC).timestamp()
LOCATION = StoreLocation.parse("s3://images/site?endpoint=http://store.test:9000")

Fault = Callable[["StoreRequest"], "ScriptedResponse | Exception | None"]


@frozen
class StoreRequest:
    """A request that the store received."""

    method: str
    key: str
    query: dict[str, str]
    headers: Headers
    body: bytes = field(repr=False)

    def __str__(self) -> str:
        operation = next((name for name in ("uploads", "uploadId", "list-type", "delete") if name in self.query), "")
        return " ".join(filter(None, [self.method, self.key, operation]))


@define
class _Consumer:
    received: bytearray = field(factory=bytearray)

    def write(self, data: bytes) -> None:
        self.received += data


@define
class UnsignedRequests:
    """A signer that signs nothing, but notes the hash of the payload as the true one does.

    `others` is the number of times that it finds other credentials.
    """

    others: int = 0
    generation: int = 0

    async def renew(self, generation: int) -> bool:
        if self.generation == generation and self.others:
            self.others -= 1
            self.generation += 1
        return self.generation != generation

    async def sign(
        self, method: str, url: str, fields: Iterable[tuple[str, str]], payload_hash: str
    ) -> list[tuple[str, str]]:
        return [*fields, ("x-amz-content-sha256", payload_hash)]


@define(eq=False)
class FakeStore:
    """A store with one bucket, `objects` by key (with the prefix of `LOCATION`). `clock` has its time.

    A fault in `faults` answers a request in place of the store: the first that returns something is used up.
    `lists_at_once` is the size of a page.
    """

    clock: Any
    objects: dict[str, bytes] = field(factory=dict)
    written: dict[str, float] = field(factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(factory=dict)
    upload_keys: dict[str, tuple[str, float]] = field(factory=dict)
    faults: list[Fault] = field(factory=list)
    requests: list[StoreRequest] = field(factory=list)
    lists_at_once: int = 1000
    knows_conditions: bool = True
    signer: UnsignedRequests = field(factory=UnsignedRequests)

    def bucket(self) -> S3Bucket:
        return S3Bucket(self.clock, self, self.signer, LOCATION, self.now, lambda: 0.5)  # type: ignore[arg-type]

    def now(self) -> float:
        return START + self.clock.seconds()

    def keys(self) -> list[str]:
        """Return the keys without the prefix, sorted."""
        return sorted(key.removeprefix(LOCATION.prefix) for key in self.objects)

    def fail(self, fault: ScriptedResponse | Exception, times: int = 1, only: str = "") -> None:
        """Answer the next `times` requests so, or those whose text contains `only`."""
        for _ in range(times):
            self.faults.append(lambda request: fault if only in str(request) else None)

    async def request(
        self, method: str, url: str, headers: Headers, body: Any = None, *, reuse: bool = False
    ) -> ScriptedResponse:
        received = b"" if body is None else await read_body(body)
        parts = urlsplit(url)
        assert parts.path == "/images" or parts.path.startswith("/images/"), parts.path
        key = unquote(parts.path.removeprefix("/images").removeprefix("/"), errors="surrogateescape")
        query = dict(parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape"))
        request = StoreRequest(method, key.removeprefix(LOCATION.prefix), query, headers, received)
        self.requests.append(request)
        for fault in self.faults:
            answer = fault(request)
            if answer is not None:
                self.faults.remove(fault)
                if isinstance(answer, Exception):
                    raise answer
                return answer
        payload_hash = headers.get("x-amz-content-sha256")
        if payload_hash != "UNSIGNED-PAYLOAD":
            assert payload_hash == hashlib.sha256(received).hexdigest()
        return self._answer(method, key, query, headers, received)

    def _answer(self, method: str, key: str, query: dict[str, str], headers: Headers, body: bytes) -> ScriptedResponse:
        match method:
            case "HEAD" if key not in self.objects:
                return ScriptedResponse(404)
            case "HEAD":
                date = datetime.fromtimestamp(self.written[key], UTC)
                response = ScriptedResponse(200, fields={"last-modified": format_datetime(date, usegmt=True)})
                response.length = len(self.objects[key])
                return response
            case "GET" if "list-type" in query:
                return self._list(query)
            case "GET" if "uploads" in query:
                return self._list_uploads(query)
            case "GET" if key not in self.objects:
                return refusal(404, "NoSuchKey")
            case "GET":
                return self._get(self.objects[key], headers.get("range"))
            case "PUT" if "partNumber" in query:
                self.uploads[query["uploadId"]][int(query["partNumber"])] = body
                return ScriptedResponse(200, fields={"etag": f'"{hashlib.md5(body).hexdigest()}"'})
            case "PUT" if headers.get("if-none-match") == "*" and key in self.objects and self.knows_conditions:
                return refusal(412, "PreconditionFailed")
            case "PUT" if "x-amz-copy-source" in headers:
                source = unquote(headers.get("x-amz-copy-source") or "", errors="surrogateescape").removeprefix(
                    "/images/"
                )
                if source not in self.objects:
                    return refusal(404, "NoSuchKey")
                self.store(key, self.objects[source])
                return xml("CopyObjectResult", "<ETag>x</ETag>")
            case "PUT":
                self.store(key, body)
                return ScriptedResponse(200, fields={"etag": f'"{hashlib.md5(body).hexdigest()}"'})
            case "POST" if "uploads" in query:
                upload = f"upload-{len(self.upload_keys)}"
                self.uploads[upload] = {}
                self.upload_keys[upload] = key, self.now()
                return xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
            case "POST" if "uploadId" in query:
                return self._complete(key, query["uploadId"], body)
            case "POST" if "delete" in query:
                for element in ElementTree.fromstring(body).iter("Key"):
                    self._delete(element.text or "")
                return xml("DeleteResult", "")
            case "DELETE" if "uploadId" in query:
                self.uploads.pop(query["uploadId"], None)
                return ScriptedResponse(204)
            case "DELETE":
                self._delete(key)
                return ScriptedResponse(204)
        raise AssertionError(f"{method} {key} {query}")

    def store(self, key: str, content: bytes) -> None:
        self.objects[key], self.written[key] = content, self.now()

    def _delete(self, key: str) -> None:
        self.objects.pop(key, None)
        self.written.pop(key, None)

    def _get(self, content: bytes, wanted: str | None) -> ScriptedResponse:
        if wanted is None:
            return ScriptedResponse(200, content)
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        if start >= len(content):
            return refusal(416, "InvalidRange")
        fields = {"content-range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return ScriptedResponse(206, content[start:], fields)

    def _complete(self, key: str, upload: str, body: bytes) -> ScriptedResponse:
        parts = self.uploads.pop(upload, None)
        if parts is None:
            return refusal(404, "NoSuchUpload")
        numbers = [int(element.text or "") for element in ElementTree.fromstring(body).iter("PartNumber")]
        assert numbers == sorted(parts)
        self.store(key, b"".join(parts[number] for number in numbers))
        return xml("CompleteMultipartUploadResult", "<ETag>x</ETag>")

    def _list_uploads(self, query: dict[str, str]) -> ScriptedResponse:
        entries = sorted((*self.upload_keys[upload], upload) for upload in self.uploads)
        after = query.get("key-marker", ""), query.get("upload-id-marker", "")
        found = [entry for entry in entries if entry[0].startswith(query["prefix"]) and (entry[0], entry[2]) > after]
        page = found[: self.lists_at_once]
        content = "".join(
            f"<Upload><Key>{_quoted(key)}</Key><UploadId>{upload}</UploadId><Initiator><ID>o</ID></Initiator>"
            f"<Initiated>{_date(initiated)}</Initiated></Upload>"
            for key, initiated, upload in page
        )
        marker = ""
        if len(found) > len(page):
            key, _, upload = page[-1]
            marker = f"<NextKeyMarker>{_quoted(key)}</NextKeyMarker><NextUploadIdMarker>{upload}</NextUploadIdMarker>"
        return xml(
            "ListMultipartUploadsResult",
            f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(marker)).lower()}</IsTruncated>{marker}{content}",
            {"date": format_datetime(datetime.fromtimestamp(self.now(), UTC), usegmt=True)},
        )

    def _list(self, query: dict[str, str]) -> ScriptedResponse:
        prefix, delimiter = query["prefix"], query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        entries: dict[str, str] = {}
        for key in sorted(self.objects):
            if not key.startswith(prefix):
                continue
            rest = key.removeprefix(prefix)
            if delimiter and delimiter in rest:
                group = prefix + rest.partition(delimiter)[0] + delimiter
                entries[group] = f"<CommonPrefixes><Prefix>{_quoted(group)}</Prefix></CommonPrefixes>"
            else:
                entries[key] = (
                    f"<Contents><Key>{_quoted(key)}</Key><Size>{len(self.objects[key])}</Size>"
                    f"<LastModified>{_date(self.written[key])}</LastModified><Owner><ID>o</ID></Owner></Contents>"
                )
        names = [name for name in sorted(entries) if name > after]
        limit = min(self.lists_at_once, int(query.get("max-keys", 1000)))
        token = (
            f"<NextContinuationToken>{escape(names[limit - 1])}</NextContinuationToken>" if len(names) > limit else ""
        )
        content = "".join(entries[name] for name in names[:limit])
        return xml(
            "ListBucketResult",
            f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(token)).lower()}</IsTruncated>{token}{content}",
            {"date": format_datetime(datetime.fromtimestamp(self.now(), UTC), usegmt=True)},
        )


def _quoted(key: str) -> str:
    return escape(quote(key, errors="surrogateescape"))


def _date(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat().replace("+00:00", "Z")


def xml(root: str, content: str, fields: dict[str, str] | None = None) -> ScriptedResponse:
    """Return an answer as S3 sends it."""
    text = f'<?xml version="1.0"?>\n<{root} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{content}</{root}>'
    return ScriptedResponse(200, text.encode(), fields)


def refusal(status: int, code: str, message: str = "", fields: dict[str, str] | None = None) -> ScriptedResponse:
    """Return an error as S3 sends it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return ScriptedResponse(status, body, fields)


async def read_body(body: Any) -> bytes:
    """Return the bytes of the body of a request."""
    consumer = _Consumer()
    done: Deferred[None] = body.startProducing(consumer)
    await done
    assert len(consumer.received) == body.length
    return bytes(consumer.received)
