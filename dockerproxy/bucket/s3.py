"""A client of one S3 bucket, over the HTTP client that the proxy has for registries.

A request that fails for a reason that may pass is sent again, with growing random pauses: all of them are idempotent.
If the store stays unavailable, the error says why, and when to try again. Nothing is remembered, so the store is back
as soon as it answers.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, unquote_plus
from xml.sax.saxutils import escape

from attrs import frozen
from twisted.internet.defer import DeferredSemaphore
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.web.iweb import IBodyProducer

from dockerproxy.bucket.file_body import FileBody
from dockerproxy.bucket.s3_xml import XMLAnswer, parse_answer
from dockerproxy.bucket.store_errors import MAX_ERROR, StoreAnswer, retry_after
from dockerproxy.concurrency import gather
from dockerproxy.errors import RegistryError, StoreRefused, StoreUnavailable, UpstreamError, UpstreamTimeout
from dockerproxy.http.headers import Headers
from dockerproxy.net.store_location import StoreLocation
from dockerproxy.oci.names import Digest
from dockerproxy.upstream.agent import Response
from dockerproxy.upstream.bytes_body import BytesBody
from dockerproxy.upstream.retry import parse_retry_after

_MIB = 1024 * 1024
PART_SIZE = 16 * _MIB
"""Bytes of a part of a blob, and of the largest blob that is sent in one request."""
_LARGE_PART_SIZE = 64 * _MIB  # of blobs of more than _LARGE_BLOB bytes
_LARGE_BLOB = 5 * 1024 * _MIB
_MAX_PARTS = 10_000  # AWS, "Amazon S3 multipart upload limits"
_PARTS_AT_ONCE = 4
_MAX_PAGE = 16 * _MIB  # bytes of a page of a listing: 1,000 keys of 1,024 bytes, each of which may be quoted
_MAX_ANSWER = 1 * _MIB
_MAX_DELETED = 1000  # keys in one request
_MAX_REQUESTS = 64  # at once; the others wait
_MAX_CREATIONS = 5  # of an object that is deleted each time
_MAX_DIGITS = 18  # of a size

_UNSIGNED = "UNSIGNED-PAYLOAD"
_NO_PAYLOAD = hashlib.sha256().hexdigest()

_PAUSES = (0.1, 0.5, 1.0, 2.0)  # seconds before each retry, of which a random half is left out
_MAX_PAUSE = 10.0  # seconds of a Retry-After that we wait ourselves, because a client is waiting, too

log = Logger()

T = TypeVar("T")


class Signer(Protocol):
    """Signs requests; `request_signer.RequestSigner` has the details."""

    generation: int

    async def renew(self, generation: int) -> bool: ...

    async def sign(
        self, method: str, url: str, fields: Iterable[tuple[str, str]], payload_hash: str
    ) -> list[tuple[str, str]]: ...


class BucketAgent(Protocol):
    """Sends single requests; `upstream.agent.Agent` has the details."""

    async def request(
        self, method: str, url: str, headers: Headers = ..., body: IBodyProducer | None = ..., *, reuse: bool = ...
    ) -> Response: ...


@frozen(slots=True)
class ListedKey:
    """An object: its key, its size in bytes, and the POSIX time when it was written, by the clock of the store.

    `age` is the seconds since then, by the same clock. A key that ends in ``/`` stands for all keys that begin with it;
    its numbers are 0.
    """

    key: str
    size: int = 0
    written: float = 0.0
    age: float = 0.0


@frozen(slots=True)
class ListedUpload:
    """An upload in parts that is not complete: its key and ID, and its age in seconds by the clock of the store."""

    key: str
    upload: str
    age: float


def part_size(size: int) -> int:
    """Return the bytes of each part of a blob of `size` bytes. There are at most 10,000 parts."""
    usual = PART_SIZE if size <= _LARGE_BLOB else _LARGE_PART_SIZE
    return max(usual, -(-size // _MAX_PARTS // _MIB) * _MIB)


class S3Bucket:
    """The objects of a bucket, by keys without the prefix of its `location`.

    Every method raises `StoreUnavailable`, its subclass `StoreRefused`, or `InsufficientStorage`. `draw` returns random
    numbers from 0 to 1.
    """

    def __init__(
        self,
        reactor: Any,
        agent: BucketAgent,
        signer: Signer,
        location: StoreLocation,
        clock: Callable[[], float],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._reactor = reactor
        self._agent = agent
        self._signer = signer
        self.location = location
        self._clock = clock
        self._draw = draw
        self._slots = DeferredSemaphore(_MAX_REQUESTS)
        self._failed = False

    async def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, or None if there is none."""
        response = await self._head(key)
        return None if response.status == 404 else response.length

    async def status(self, key: str) -> ListedKey | None:
        """Return an object as a listing has it, or None if there is none."""
        response = await self._head(key)
        if response.status == 404:
            return None
        date, written = (_parse_date(response.headers.get(name)) for name in ("date", "last-modified"))
        if written is None:
            written = self._clock() if date is None else date
        return ListedKey(key, response.length or 0, written, 0.0 if date is None else date - written)

    async def _head(self, key: str) -> Response:
        response = await self._retry(partial(self._send, "HEAD", key, accepted=(200, 404)))
        response.abort()
        if response.status == 200 and response.length is None:  # for us, that would be an object that is not there
            raise self._broken(f"does not tell the size of {key}")
        return response

    async def read_start(self, key: str, limit: int) -> bytes | None:
        """Return the first `limit` bytes of an object, which may have more, or None if there is none."""
        return await self._retry(partial(self._read_start, key, limit))

    async def get(self, key: str, limit: int) -> bytes | None:
        """Return the content of an object of at most `limit` bytes, or None if there is none."""
        return await self._retry(partial(self._get, key, limit))

    async def open(self, key: str, byte_range: str | None = None) -> Response:
        """Return the response to a GET. The caller reads or aborts its body. `byte_range` is a Range field.

        Its status is 200, 206, 404, or 416 if the object is shorter than `byte_range` begins.
        """
        if byte_range is None:
            return await self._retry(partial(self._send, "GET", key, accepted=(200, 404)))
        fields = [("Range", byte_range)]
        return await self._retry(partial(self._send, "GET", key, fields=fields, accepted=(200, 206, 404, 416)))

    async def put(self, key: str, content: bytes) -> None:
        """Store `content`, in place of an object that is there."""
        await self._put(key, content)

    async def put_file(self, key: str, fd: int, size: int, digest: Digest) -> None:
        """Store the first `size` bytes of the open file `fd`, which match `digest`."""
        if size <= PART_SIZE:
            payload_hash = digest.hex if digest.algorithm == "sha256" else _UNSIGNED
            body = partial(FileBody, self._reactor, fd, 0, size)
            await self._store("PUT", key, body=body, payload_hash=payload_hash)
        else:
            await self._put_parts(key, fd, size)

    async def create(self, key: str, content: bytes) -> bytes:
        """Store `content` unless there is an object, and return the object's content: only one of several callers wins.

        It needs a store that knows ``If-None-Match: *``.
        """
        for _ in range(_MAX_CREATIONS):
            response = await self._put(key, content, fields=[("If-None-Match", "*")], accepted=(200, 412))
            if response.status == 200:
                return content
            existing = await self.get(key, max(len(content), 64 * 1024))
            if existing is not None:  # else it was deleted meanwhile
                return existing
        raise self._broken(f"says that {key} is there, and that it is not")

    async def copy(self, key: str, copy: str) -> None:
        """Copy an object of at most 5 GiB to the key `copy`, in the store."""
        source = quote(f"/{self.location.bucket}/{self.location.prefix}{key}", safe="/-._~", errors="surrogateescape")
        await self._ask("CopyObjectResult", "PUT", copy, [], fields=[("x-amz-copy-source", source)])

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete the objects with `keys`, as far as there are any."""
        if len(keys) == 1:
            response = await self._retry(partial(self._send, "DELETE", keys[0], accepted=(200, 204, 404)))
            await response.discard()
            return
        for start in range(0, len(keys), _MAX_DELETED):
            await self._delete_all(keys[start : start + _MAX_DELETED])

    async def list_keys(
        self, prefix: str, *, delimiter: str = "", after: str = "", limit: int = 0
    ) -> AsyncIterator[ListedKey]:
        """Yield the objects with keys that begin with `prefix` and are behind `after`, a page at a time.

        With a `delimiter`, keys with the same part up to the next delimiter behind the prefix are one. `limit` is the
        number of objects of a page, if the caller needs few.
        """
        base = self.location.prefix
        query = [("list-type", "2"), ("encoding-type", "url"), ("prefix", base + prefix)]
        query += [("delimiter", delimiter)] if delimiter else []
        query += [("start-after", base + after)] if after else []
        query += [("max-keys", str(limit))] if limit else []
        token, pages = "", _Pages()
        while True:
            page = [*query, ("continuation-token", token)] if token else query
            date, answer = await self._retry(partial(self._list_page, "ListBucketResult", page))
            for kind, texts in answer.items:
                listed = self._read_entry(kind, texts, date, is_quoted="EncodingType" in answer.texts)
                if listed is not None:
                    yield listed
            token = answer.texts.get("NextContinuationToken", "")
            if not self._goes_on(answer, pages, token):
                return

    async def delete_once(self, key: str) -> None:
        """Delete an object by one request. After an error, the store may still do it at any later time."""
        try:
            response = await self._send("DELETE", key, accepted=(200, 204, 404))
        except _Refused as refusal:
            raise refusal.answer.error(self.location) from None
        await response.discard()

    async def list_uploads(self, prefix: str) -> AsyncIterator[ListedUpload]:
        """Yield the uploads in parts that are not complete, of keys that begin with `prefix`."""
        query = [("uploads", ""), ("encoding-type", "url"), ("prefix", self.location.prefix + prefix)]
        marker: list[tuple[str, str]] = []
        pages = _Pages()
        while True:
            date, answer = await self._retry(partial(self._list_page, "ListMultipartUploadsResult", [*query, *marker]))
            is_quoted = "EncodingType" in answer.texts
            for kind, texts in answer.items:
                if kind == "Upload":
                    key = unquote_key(texts.get("Key", "")) if is_quoted else texts.get("Key", "")
                    initiated = self._parse_time(texts.get("Initiated", ""))
                    age = 0.0 if date is None else date - initiated
                    yield ListedUpload(key.removeprefix(self.location.prefix), texts.get("UploadId", ""), age)
            next_key = answer.texts.get("NextKeyMarker", "")
            if not self._goes_on(answer, pages, next_key):
                return
            marker = [
                ("key-marker", unquote_key(next_key) if is_quoted else next_key),
                ("upload-id-marker", answer.texts.get("NextUploadIdMarker", "")),
            ]

    def _goes_on(self, answer: XMLAnswer, pages: _Pages, marker: str) -> bool:
        """Return whether another page follows, at `marker`. Raise `StoreUnavailable` if that cannot be.

        A list without its end would make gc delete what is needed by that.
        """
        is_truncated = answer.texts.get("IsTruncated", "").strip().lower() == "true"
        if is_truncated and not marker:
            raise self._broken("cuts a list off and does not say how it goes on")
        listed = [texts for kind, texts in answer.items if kind in ("Contents", "CommonPrefixes", "Upload")]
        if is_truncated and pages.repeat(listed[-1:] or marker):
            raise self._broken("repeats the pages of a list")
        return is_truncated

    async def abort_upload(self, key: str, upload: str) -> None:
        """Delete the parts of an upload that is not complete, if it is there."""
        abort = partial(self._send, "DELETE", key, [("uploadId", upload)], accepted=(200, 204, 404))
        response = await self._retry(abort)
        await response.discard()

    # parts

    async def _put_parts(self, key: str, fd: int, size: int) -> None:
        answer = await self._ask("InitiateMultipartUploadResult", "POST", key, [("uploads", "")])
        upload = answer.texts.get("UploadId", "")
        if not upload:
            raise self._broken("began no upload in parts")
        length = part_size(size)
        try:
            tags: list[str] = [""] * -(-size // length)
            await gather(
                (self._put_part(key, upload, number, fd, start, min(length, size - start), tags)
                for number, start in enumerate(range(0, size, length))),
                _PARTS_AT_ONCE,
            )  # fmt: skip
            await self._complete(key, upload, tags, size)
        except BaseException:
            with suppress(RegistryError):  # else gc deletes the parts a day later
                await self.abort_upload(key, upload)
            raise

    async def _put_part(
        self, key: str, upload: str, number: int, fd: int, start: int, length: int, tags: list[str]
    ) -> None:
        query = [("partNumber", str(number + 1)), ("uploadId", upload)]
        body = partial(FileBody, self._reactor, fd, start, length)
        response = await self._store("PUT", key, query, body=body, payload_hash=_UNSIGNED)
        tags[number] = response.headers.get("etag") or ""

    async def _complete(self, key: str, upload: str, tags: Sequence[str], size: int) -> None:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(tag)}</ETag></Part>"
            for number, tag in enumerate(tags, 1)
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        try:
            await self._ask("CompleteMultipartUploadResult", "POST", key, [("uploadId", upload)], body)
        except StoreRefused:
            # The first answer may have been lost, so that the upload is complete and its name forgotten.
            if await self.size(key) != size:
                raise

    # requests

    async def _put(
        self, key: str, content: bytes, fields: Sequence[tuple[str, str]] = (), accepted: Sequence[int] = (200,)
    ) -> Response:
        body, payload_hash = partial(BytesBody, content), hashlib.sha256(content).hexdigest()
        return await self._store("PUT", key, fields=fields, body=body, payload_hash=payload_hash, accepted=accepted)

    async def _store(self, method: str, key: str, *arguments: Any, **options: Any) -> Response:
        """Send a request that stores something, and return the response, which has been read."""
        response = await self._retry(partial(self._send, method, key, *arguments, **options))
        await response.discard()
        if response.status == 200 and not response.headers.get("etag"):  # something that is no object store answers
            raise self._broken(f"does not confirm {key} with an ETag")
        return response

    async def _delete_all(self, keys: Sequence[str]) -> None:
        if not all(map(str.isprintable, keys)):  # XML cannot have all characters of keys
            for key in keys:
                await self.delete([key])
            return
        objects = "".join(f"<Object><Key>{escape(self.location.prefix + key)}</Key></Object>" for key in keys)
        body = f"<Delete><Quiet>true</Quiet>{objects}</Delete>".encode()
        checksum = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        answer = await self._ask("DeleteResult", "POST", "", [("delete", "")], body, [("Content-MD5", checksum)])
        for kind, texts in answer.items:
            if kind == "Error" and texts.get("Code") != "NoSuchKey":
                raise StoreAnswer(200, texts.get("Code", ""), texts.get("Message", "")).error(self.location)

    async def _list_page(self, root: str, query: Sequence[tuple[str, str]]) -> tuple[float | None, XMLAnswer]:
        """Return the date of an answer, None if it has none, and the answer."""
        response = await self._send("GET", "", query)
        content = await response.read_all(_MAX_PAGE)
        return _parse_date(response.headers.get("date")), self._parse(root, response.status, content)

    def _read_entry(self, kind: str, texts: dict[str, str], date: float | None, *, is_quoted: bool) -> ListedKey | None:
        key = texts.get("Key" if kind == "Contents" else "Prefix", "")
        key = unquote_key(key) if is_quoted else key
        if kind not in ("Contents", "CommonPrefixes") or not key.startswith(self.location.prefix):
            return None
        key = key.removeprefix(self.location.prefix)
        if kind == "CommonPrefixes":
            return ListedKey(key)
        written = self._parse_time(texts.get("LastModified", ""))
        size = texts.get("Size", "0")
        if not size.isascii() or not size.isdigit() or len(size) > _MAX_DIGITS:
            raise self._broken("lists objects without a size")
        # Without the clock of the store, nothing is old.
        return ListedKey(key, int(size), written, 0.0 if date is None else date - written)

    def _parse_time(self, text: str) -> float:
        try:
            time = datetime.fromisoformat(text.replace("Z", "+00:00"))
            if time.tzinfo is not None:  # else it would be one of this machine's zone
                return time.timestamp()
        except (ValueError, OverflowError):
            pass
        raise self._broken("lists objects without a date")

    async def _get(self, key: str, limit: int) -> bytes | None:
        response = await self._send("GET", key, accepted=(200, 404))
        if response.status == 404:
            return None
        if response.length is not None and response.length > limit:
            response.abort()
            raise StoreRefused(
                f"{self.location} has {response.length} bytes in {key}, which should have at most {limit}",
                headers=retry_after(),
            )
        return await response.read_all(limit)

    async def _read_start(self, key: str, limit: int) -> bytes | None:
        fields = [("Range", f"bytes=0-{limit - 1}")]
        response = await self._send("GET", key, fields=fields, accepted=(200, 206, 404, 416))
        if response.status in (404, 416):  # an empty object has no first byte
            response.abort()
            return None if response.status == 404 else b""
        content = b""
        while len(content) < limit and (data := await response.read_chunk()):
            content += data
        response.abort()
        return content[:limit]

    async def _ask(
        self,
        root: str,
        method: str,
        key: str,
        query: Sequence[tuple[str, str]],
        body: bytes = b"",
        fields: Sequence[tuple[str, str]] = (),
    ) -> XMLAnswer:
        """Return the answer to a request, of which `root` is the name. It may be an error though its status is 200."""
        return await self._retry(partial(self._ask_once, root, method, key, query, body, fields))

    async def _ask_once(
        self,
        root: str,
        method: str,
        key: str,
        query: Sequence[tuple[str, str]],
        body: bytes,
        fields: Sequence[tuple[str, str]],
    ) -> XMLAnswer:
        payload_hash = hashlib.sha256(body).hexdigest()
        response = await self._send(method, key, query, fields, lambda: BytesBody(body), payload_hash)
        return self._parse(root, response.status, await response.read_all(_MAX_ANSWER))

    def _parse(self, root: str, status: int, content: bytes) -> XMLAnswer:
        try:
            answer = parse_answer(content)
        except ValueError as error:
            raise self._broken(f"sent an answer that cannot be read: {error}") from None
        if answer.error is not None:
            raise _Refused(StoreAnswer.parse(status, content), None)
        if answer.root != root:  # such as the page of a portal, which would look like an empty list
            raise self._broken(f"sent <{answer.root[:80]}> in place of <{root}>")
        return answer

    async def _retry(self, function: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `function`, which is called again after a failure that may pass."""
        pauses = iter(_PAUSES)
        while True:
            generation = self._signer.generation
            try:
                result = await function()
            except _Refused as refusal:
                if refusal.answer.is_about_credentials and await self._signer.renew(generation):
                    continue
                error, wait = refusal.answer.error(self.location), refusal.wait
                is_final = not refusal.answer.is_transient
            except UpstreamError as failure:
                # It has already cost the whole time-out.
                is_final, wait = isinstance(failure, UpstreamTimeout), None
                error = StoreUnavailable(f"{self.location} cannot be reached: {failure.message}", headers=retry_after())
            else:
                self._record_success()
                return result
            pause = next(pauses, None)
            if is_final or pause is None or (wait is not None and wait > _MAX_PAUSE):
                self._record_failure(error)
                raise error
            await deferLater(self._reactor, max(wait or 0.0, pause * (0.5 + self._draw() / 2)))

    async def _send(
        self,
        method: str,
        key: str,
        query: Sequence[tuple[str, str]] = (),
        fields: Sequence[tuple[str, str]] = (),
        body: Callable[[], IBodyProducer] | None = None,
        payload_hash: str = _NO_PAYLOAD,
        accepted: Sequence[int] = (200,),
    ) -> Response:
        """Send a request once. Raise `_Refused` and `UpstreamError`."""
        url = self.location.url(key, query)
        signed = await self._signer.sign(method, url, fields, payload_hash)
        await self._slots.acquire()
        try:
            response = await self._agent.request(
                method, url, Headers(signed), body() if body is not None else None, reuse=True
            )
        finally:
            self._slots.release()
        if response.status in accepted:
            if response.status == 404 and method != "HEAD":
                await self._check_bucket(response)
            return response
        content = b"" if method == "HEAD" else await response.read_all(MAX_ERROR)
        raise _Refused(StoreAnswer.parse(response.status, content), parse_retry_after(response.headers, self._clock()))

    async def _check_bucket(self, response: Response) -> None:
        """Read a 404, and raise `_Refused` if there is no bucket. That a key is missing is an answer."""
        answer = StoreAnswer.parse(404, await response.read_all(MAX_ERROR))
        if answer.code == "NoSuchBucket":
            raise _Refused(answer, None)

    def _broken(self, message: str) -> StoreUnavailable:
        return StoreUnavailable(f"{self.location} {message}", headers=retry_after())

    def _record_success(self) -> None:
        if self._failed:
            self._failed = False
            log.info("REGISTRY_STORE: {place} answers again", place=str(self.location))

    def _record_failure(self, error: RegistryError) -> None:
        """Log the first of several failures."""
        if not self._failed:
            self._failed = True
            log.error(
                "REGISTRY_STORE: {reason}; until then, pushes fail, and pulls get what CACHE_DIR has",
                reason=error.message,
            )


class _Refused(Exception):
    """The store refused a request, and perhaps said for how many seconds to `wait`."""

    def __init__(self, answer: StoreAnswer, wait: float | None) -> None:
        super().__init__(answer)
        self.answer = answer
        self.wait = wait


def unquote_key(text: str) -> str:
    """Return the key that a listing has quoted as a form does."""
    return unquote_plus(text, errors="surrogateescape")


class _Pages:
    """Notices that the pages of a list come again, by Brent's algorithm: it compares each with one before it."""

    def __init__(self) -> None:
        self._seen: object = None
        self._steps, self._next_seen = 0, 1

    def repeat(self, page: object) -> bool:
        """Return whether `page` was there before. It may be noticed some pages later."""
        if page == self._seen:
            return True
        self._steps += 1
        if self._steps == self._next_seen:
            self._seen, self._steps, self._next_seen = page, 0, 2 * self._next_seen
        return False


def _parse_date(text: str | None) -> float | None:
    """Return the time of a Date field."""
    try:
        date = parsedate_to_datetime((text or "")[:64])
    except (ValueError, OverflowError):
        return None
    return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
