"""Pulling over HTTP, from a source and content that do what the test says."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.errors import RegistryError, UpstreamBroken, UpstreamTimeout
from dockerproxy.http.request import Request
from dockerproxy.oci.contents import BlobAnswer, ManifestAnswer
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.oci.routes import Kind, route
from dockerproxy.registry.doors import refuse
from dockerproxy.registry.face import Face

SMALL = 64 * 1024
SIZES = [0, 1, 1000, SMALL - 1, SMALL, SMALL + 1, 700_000]
MANIFEST = b'{"schemaVersion":2,"config":{},"layers":[]}'
FAILURE = UpstreamBroken("it broke off")


def some(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


@pytest.fixture
def open_face(visit: Any, shelf: Any) -> Any:
    """Return a function that makes a visitor of a face that answers from `shelf`."""

    def make(**options: Any) -> Any:
        clock = Clock()
        face = Face(clock)

        async def handle(request: Request) -> None:
            try:
                await face.answer(request, route(request.path), shelf)
            except RegistryError as error:
                refuse(request, error, [])

        return visit(handle, clock=clock, **options)

    return make


@pytest.fixture
def visitor(open_face: Any) -> Any:
    return open_face()


def blob(digest: Digest) -> str:
    return f"/v2/library/busybox/blobs/{digest}"


def put_manifest(shelf: Any, content: bytes = MANIFEST, verdict: str = "HIT", media_type: str = OCI_MANIFEST) -> Digest:
    digest = Digest.of(content)
    answer = ManifestAnswer(digest, media_type, len(content), content, verdict)
    shelf.manifests |= {"latest": answer, str(digest): answer}
    return digest


# blobs


@pytest.mark.parametrize("size", SIZES)
def test_a_blob(visitor: Any, shelf: Any, text: Any, size: int) -> None:
    content = text(some(size))
    digest = shelf.put(content)
    answer = visitor.ask("GET", blob(digest))
    assert (answer.status, answer.body, answer.whole) == (200, some(size), True)
    expected = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(size),
        "Docker-Content-Digest": str(digest),
        "Etag": f'"{digest}"',
        "Accept-Ranges": "bytes",
        "Docker-Distribution-Api-Version": "registry/2.0",
        "X-Cache": "HIT",
    }
    assert {name: answer.fields(name) for name in expected} == {name: [value] for name, value in expected.items()}
    assert "Warning" not in answer.headers
    assert content.closed == 1
    assert shelf.asked == [("library/busybox", digest, False)]
    assert visitor.logged[0].verdict == "HIT"
    assert visitor.logged[0].size == size


@pytest.mark.parametrize("size", SIZES)
def test_the_head_of_a_blob(visitor: Any, shelf: Any, text: Any, size: int) -> None:
    content = text(some(size), fails={0: FAILURE})
    digest = shelf.put(content)
    answer = visitor.ask("HEAD", blob(digest), [("Range", "bytes=0-0")])
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(size))
    assert answer.headers["Docker-Content-Digest"] == str(digest)
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert visitor.received.endswith(b"\r\n\r\n")
    assert (content.asked, content.closed) == ([], 1)
    assert shelf.asked == [("library/busybox", digest, True)]


def test_the_head_of_a_blob_without_its_content(visit: Any) -> None:
    digest = Digest.of(b"x")

    class Heads:
        async def blob(self, name: Any, digest: Digest, *, head: bool) -> BlobAnswer:
            return BlobAnswer(digest, 5_000_000_000, None, "MISS")

    async def handle(request: Request) -> None:
        await Face(Clock()).answer(request, route(request.path), Heads())  # type: ignore[arg-type]

    visitor = visit(handle)
    for _ in range(2):  # and the connection goes on
        answer = visitor.ask("HEAD", blob(digest))
        assert (answer.status, answer.headers["Content-Length"]) == (200, "5000000000")
        assert answer.headers["X-Cache"] == "MISS"


def test_a_blob_under_way_of_unknown_length(open_face: Any, shelf: Any, text: Any) -> None:
    for data in (b"", b"x", some(400_000)):
        content = text(data, size=None)
        digest = shelf.put(content)
        answer = open_face().ask("GET", blob(digest), [("Range", "bytes=0-")])
        assert (answer.status, answer.body, answer.whole) == (200, data, True)
        assert (answer.headers["Transfer-Encoding"], answer.headers["Content-Length"]) == ("chunked", None)
        old = open_face().ask("GET", blob(digest.of(data)), version="1.0") if shelf.put(text(data, size=None)) else None
        assert old is not None
        assert (old.status, old.body, old.whole) == (200, data, True)
        assert (old.headers["Transfer-Encoding"], old.headers["Connection"]) == (None, "close")
        assert content.closed == 1


def test_the_head_of_a_blob_of_unknown_length(visitor: Any, shelf: Any, text: Any) -> None:
    digest = shelf.put(text(b"abc", size=None))
    answer = visitor.ask("HEAD", blob(digest))
    assert (answer.status, answer.headers["Content-Length"]) == (200, None)
    assert visitor.received.endswith(b"\r\n\r\n")


RANGES = {
    # for a content of 100,000 bytes: what is asked, and start and stop of what is answered
    "bytes=0-0": (0, 1),
    "bytes=0-": (0, 100_000),
    "bytes=500-999": (500, 1000),
    "bytes=99999-": (99_999, 100_000),
    "bytes=99990-200000": (99_990, 100_000),
    "bytes=-1": (99_999, 100_000),
    "bytes=-100000": (0, 100_000),
    "bytes=-200000": (0, 100_000),
    "bytes=10-80009": (10, 80_010),
}


@pytest.mark.parametrize("asked", RANGES)
def test_a_range(visitor: Any, shelf: Any, text: Any, asked: str) -> None:
    start, stop = RANGES[asked]
    content = text(some(100_000))
    digest = shelf.put(content)
    answer = visitor.ask("GET", blob(digest), [("Range", asked)])
    assert (answer.status, answer.body, answer.whole) == (206, some(100_000)[start:stop], True)
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/100000"
    assert answer.headers["Content-Length"] == str(stop - start)
    assert answer.headers["Docker-Content-Digest"] == str(digest)
    assert min(offset for offset, _ in content.asked) == start
    assert max(offset + size for offset, size in content.asked) == stop
    assert content.closed == 1


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "bytes=0-0, -1", "bytes=a-b", "lines=0-1", "bytes=-"])
def test_what_is_no_single_range_gets_the_whole(visitor: Any, shelf: Any, text: Any, asked: str) -> None:
    digest = shelf.put(text(some(100_000)))
    answer = visitor.ask("GET", blob(digest), [("Range", asked)])
    assert (answer.status, answer.body) == (200, some(100_000))
    assert "Content-Range" not in answer.headers


@pytest.mark.parametrize("size", [1, 1000, SMALL, 100_000])
@pytest.mark.parametrize("form", ["bytes={}-", "bytes={}-9999999", "bytes=9999999999999999999-", "bytes=-0"])
def test_a_range_that_is_not_there(visitor: Any, shelf: Any, text: Any, size: int, form: str) -> None:
    content = text(some(size))
    digest = shelf.put(content)
    answer = visitor.ask("GET", blob(digest), [("Range", form.format(size))])
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert json.loads(answer.body)["errors"][0]["code"] == "RANGE_INVALID"
    assert (content.asked, content.closed) == ([], 1)


def test_a_range_of_nothing_is_the_whole(visitor: Any, shelf: Any, text: Any) -> None:
    answer = visitor.ask("GET", blob(shelf.put(text(b""))), [("Range", "bytes=0-")])
    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "0")


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 200_000), first=st.integers(0, 200_000), length=st.none() | st.integers(1, 200_000))
def test_any_range_is_that_part_of_the_whole(visit: Any, text: Any, size: int, first: int, length: int | None) -> None:
    content = text(some(size), piece=50_000)
    digest = Digest.of(content.data)

    class One:
        async def blob(self, name: Any, digest: Digest, *, head: bool) -> BlobAnswer:
            return BlobAnswer(digest, size, content, "HIT")

    clock = Clock()

    async def handle(request: Request) -> None:
        try:
            await Face(clock).answer(request, route(request.path), One())  # type: ignore[arg-type]
        except RegistryError as error:
            refuse(request, error, [])

    last = "" if length is None else first + length - 1
    answer = visit(handle, clock=clock).ask("GET", blob(digest), [("Range", f"bytes={first}-{last}")])
    wanted = some(size)[first : None if length is None else first + length]
    if size == 0:
        assert (answer.status, answer.body) == (200, b"")
    elif first >= size:
        assert answer.status == 416
    else:
        assert (answer.status, answer.body) == (206, wanted)
    assert answer.whole
    assert content.closed == 1


def test_if_range(open_face: Any, shelf: Any, text: Any) -> None:
    digest = Digest.of(some(1000))
    for condition, status in [
        (f'"{digest}"', 206),
        (f'W/"{digest}"', 200),  # RFC 9110, section 13.1.5: a strong comparison
        ('"something else"', 200),
        ("Tue, 24 Nov 2026 12:00:00 GMT", 200),
    ]:
        shelf.put(text(some(1000)))
        fields = [("Range", "bytes=10-19"), ("If-Range", condition)]
        answer = open_face().ask("GET", blob(digest), fields)
        assert (answer.status, len(answer.body)) == (status, 10 if status == 206 else 1000), condition


@pytest.mark.parametrize(
    ("condition", "has"),
    [
        ('"{}"', True),
        ('W/"{}"', True),
        ('"a", W/"b" , "{}"', True),
        ("*", True),
        ('"a"', False),
        ('"*"', False),
        ('"sha256:{}"', False),
    ],
)
def test_if_none_match(open_face: Any, shelf: Any, text: Any, condition: str, has: bool) -> None:
    digest, manifest = Digest.of(some(1000)), put_manifest(shelf)
    for method in ("GET", "HEAD"):
        for path, name in ((blob(digest), digest), ("/v2/library/busybox/manifests/latest", manifest)):
            shelf.put(content := text(some(1000)))
            visitor = open_face()
            answer = visitor.ask(method, path, [("If-None-Match", condition.format(name)), ("Range", "bytes=0-0")])
            assert answer.status == (304 if has else 206 if method == "GET" else 200), (method, path)
            assert answer.headers["Docker-Content-Digest"] == str(name)
            assert answer.headers["Etag"] == f'"{name}"'
            assert content.closed == ("blobs" in path)
            if has:
                assert (answer.body, answer.headers["Content-Length"], content.asked) == (b"", None, [])
                # and what comes next is understood as the next answer
                shelf.put(text(some(1000)))
                assert visitor.ask(method, path).status == 200


def test_several_if_none_match_fields_are_one_list(visitor: Any, shelf: Any, text: Any) -> None:
    digest = shelf.put(text(b"abc"))
    fields = [("If-None-Match", '"a"'), ("If-None-Match", f'"{digest}"')]
    assert visitor.ask("GET", blob(digest), fields).status == 304


def test_stale_content_carries_a_warning(visitor: Any, shelf: Any, text: Any) -> None:
    shelf.verdict = "STALE"
    digest = shelf.put(text(b"abc"))
    put_manifest(shelf, verdict="STALE")
    for path in (blob(digest), "/v2/library/busybox/manifests/latest"):
        answer = visitor.ask("GET", path)
        assert (answer.status, answer.headers["X-Cache"]) == (200, "STALE")
        assert answer.headers["Warning"].startswith('299 - "Stale: ')


# what goes wrong


@pytest.mark.parametrize("error", [FAILURE, UpstreamTimeout("nothing came")])
def test_a_small_blob_that_proves_bad_is_a_clean_error(visitor: Any, shelf: Any, text: Any, error: Any) -> None:
    content = text(some(1000), bad=error)
    answer = visitor.ask("GET", blob(shelf.put(content)))
    assert (answer.status, answer.whole) == (error.status, True)
    assert json.loads(answer.body) == {"errors": [{"code": "UNAVAILABLE", "message": error.message}]}
    assert answer.headers["Content-Type"] == "application/json"
    assert "Docker-Content-Digest" not in answer.headers
    assert (content.asked, content.closed) == ([], 1)


@pytest.mark.parametrize("size", [1, 1000, SMALL])
@pytest.mark.parametrize("fails_at", [0, 500])
def test_a_small_blob_that_cannot_be_read_is_a_clean_error(
    visitor: Any, shelf: Any, text: Any, size: int, fails_at: int
) -> None:
    if fails_at >= size:
        return
    content = text(some(size), fails={fails_at: FAILURE})
    answer = visitor.ask("GET", blob(shelf.put(content)))
    assert (answer.status, answer.whole, content.closed) == (502, True, 1)
    assert json.loads(answer.body)["errors"][0]["message"] == "it broke off"


def test_a_small_blob_that_ends_early_is_a_clean_error(visitor: Any, shelf: Any, text: Any) -> None:
    content = text(some(1000))
    digest = shelf.put(content)
    content.data = content.data[:999]
    answer = visitor.ask("GET", blob(digest))
    assert (answer.status, answer.whole, content.closed) == (502, True, 1)
    assert json.loads(answer.body)["errors"][0]["code"] == "UNAVAILABLE"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("fails_at", [0, 1000, 300_000])
def test_a_large_blob_that_cannot_be_read_breaks_the_connection(
    visitor: Any, shelf: Any, text: Any, version: str, known: bool, fails_at: int
) -> None:
    content = text(some(400_000), size=-1 if known else None, fails={fails_at: FAILURE})
    answer = visitor.ask("GET", blob(shelf.put(content)), version=version)
    assert (answer.status, answer.whole) == (200, False)
    assert len(answer.body) == fails_at
    assert visitor.transport.aborted
    assert content.closed == 1
    assert b"it broke off" not in visitor.received


def test_a_large_blob_that_ends_early_breaks_the_connection(visitor: Any, shelf: Any, text: Any) -> None:
    content = text(some(400_000))
    digest = shelf.put(content)
    content.data = content.data[:399_999]
    answer = visitor.ask("GET", blob(digest))
    assert (answer.whole, visitor.transport.aborted, content.closed) == (False, True, 1)


def test_an_error_of_ours_is_no_answer_that_looks_whole(
    visitor: Any, shelf: Any, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails, say: what is no `RegistryError`."""
    monkeypatch.setattr("dockerproxy.http.channel.log.failure", lambda *_, **__: None)
    content = text(some(400_000), fails={300_000: OSError(5, "Input/output error")})
    answer = visitor.ask("GET", blob(shelf.put(content)))
    assert (answer.whole, content.closed) == (False, 1)


def test_a_client_that_leaves_closes_the_content(open_face: Any, shelf: Any, text: Any) -> None:
    for size in (1000, 400_000):
        for known in (True, False):
            content = text(some(size), size=-1 if known else None, waits={size // 2: Deferred()})
            visitor = open_face()
            visitor.request("GET", blob(shelf.put(content)))
            assert content.closed == 0
            visitor.disconnect()
            assert content.closed == 1, (size, known)


def test_a_client_that_leaves_while_a_verdict_is_awaited(open_face: Any, shelf: Any, text: Any) -> None:
    content = text(some(1000))
    settling: Deferred[None] = Deferred()

    async def settled() -> None:
        await settling

    content.settled = settled
    visitor = open_face()
    visitor.request("GET", blob(shelf.put(content)))
    assert (visitor.received, content.closed) == (b"", 0)  # not a byte before it is certain
    visitor.disconnect()
    assert content.closed == 1


def test_a_client_that_takes_nothing_any_more(open_face: Any, shelf: Any, text: Any) -> None:
    content = text(some(700_000))
    visitor = open_face()
    visitor.transport.room = 1000
    visitor.request("GET", blob(shelf.put(content)))
    assert len(content.asked) == 1
    visitor.take(math.inf)
    assert visitor.answer().body == some(700_000)
    assert content.closed == 1


# manifests


def test_a_manifest(visitor: Any, shelf: Any) -> None:
    digest = put_manifest(shelf, verdict="REVALIDATED")
    fields = [("Accept", OCI_INDEX), ("Accept", f"{OCI_MANIFEST};q=0.5")]
    for reference in ("latest", str(digest)):
        answer = visitor.ask("GET", f"/v2/library/busybox/manifests/{reference}", fields)
        assert (answer.status, answer.body, answer.whole) == (200, MANIFEST, True)
        expected = {
            "Content-Type": OCI_MANIFEST,
            "Content-Length": str(len(MANIFEST)),
            "Docker-Content-Digest": str(digest),
            "Etag": f'"{digest}"',
            "Accept-Ranges": "bytes",
            "Docker-Distribution-Api-Version": "registry/2.0",
            "X-Cache": "REVALIDATED",
        }
        assert {name: answer.fields(name) for name in expected} == {name: [value] for name, value in expected.items()}
    assert shelf.asked[0] == ("library/busybox", "latest", [OCI_INDEX, f"{OCI_MANIFEST};q=0.5"], False)


@pytest.mark.parametrize("with_content", [True, False])
def test_the_head_of_a_manifest(visitor: Any, shelf: Any, with_content: bool) -> None:
    digest = put_manifest(shelf)
    if not with_content:
        shelf.manifests["latest"] = ManifestAnswer(digest, OCI_MANIFEST, len(MANIFEST), None, "MISS")
    for _ in range(2):
        answer = visitor.ask("HEAD", "/v2/library/busybox/manifests/latest", [("Range", "bytes=0-")])
        assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(MANIFEST)))
        assert answer.headers["Docker-Content-Digest"] == str(digest)
        assert answer.headers["Content-Type"] == OCI_MANIFEST
    assert visitor.received.endswith(b"\r\n\r\n")
    assert shelf.asked[0][-1] is True


def test_a_manifest_by_range(visitor: Any, shelf: Any) -> None:
    """containerd 2.1 asks for `bytes=0-` of manifests too."""
    put_manifest(shelf)
    size = len(MANIFEST)
    path = "/v2/library/busybox/manifests/latest"
    answer = visitor.ask("GET", path, [("Range", "bytes=0-")])
    assert (answer.status, answer.body) == (206, MANIFEST)
    assert answer.headers["Content-Range"] == f"bytes 0-{size - 1}/{size}"
    answer = visitor.ask("GET", path, [("Range", "bytes=-5")])
    assert (answer.status, answer.body) == (206, MANIFEST[-5:])
    answer = visitor.ask("GET", path, [("Range", f"bytes={size}-")])
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert visitor.ask("GET", path, [("Range", "bytes=0-1,3-4")]).status == 200


def test_the_rest_is_the_sources_own(visitor: Any, shelf: Any) -> None:
    digest = Digest.of(b"x")
    for method, path, kind in [
        ("GET", "/v2/", Kind.BASE),
        ("GET", "/v2/_catalog", Kind.CATALOG),
        ("GET", "/v2/a/tags/list", Kind.TAGS),
        ("GET", f"/v2/a/referrers/{digest}", Kind.REFERRERS),
        ("GET", "/v2/a/blobs/uploads/x", Kind.UPLOAD),
        ("POST", "/v2/a/blobs/uploads/", Kind.UPLOADS),
        ("PUT", "/v2/a/manifests/latest", Kind.MANIFEST),
        ("DELETE", f"/v2/a/blobs/{digest}", Kind.BLOB),
        ("OPTIONS", "/v2/a/manifests/latest", Kind.MANIFEST),
    ]:
        assert visitor.ask(method, path).body == b"other"
        assert (shelf.asked[-1][0], shelf.asked[-1][1].kind) == (method, kind)


def test_a_media_type_cannot_bring_in_a_field(visitor: Any, shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.http.channel.log.failure", lambda *_, **__: None)
    put_manifest(shelf, media_type="text/plain\r\nSet-Cookie: a=b")
    visitor.request("GET", "/v2/library/busybox/manifests/latest")
    assert b"Set-Cookie" not in visitor.received
