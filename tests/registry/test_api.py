"""Pulls over HTTP from a fake backend."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.errors import UpstreamBroken, UpstreamTimeout
from dockerproxy.http.request import Request
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.oci.routes import Kind, route
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.principal import Principal
from dockerproxy.registry.responses import respond_error
from tests.support.examples import examples
from tests.support.multipart import split_byteranges

SMALL = 64 * 1024
SIZES = [0, 1, 1000, SMALL - 1, SMALL, SMALL + 1, 700_000]
MANIFEST = b'{"schemaVersion":2,"config":{},"layers":[]}'
FAILURE = UpstreamBroken("connection lost")


def make_bytes(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


@pytest.fixture
def connect_api(connect_client: Any, backend: Any) -> Any:
    """Return a function that connects a client to an API that serves `backend`."""

    def make(**options: Any) -> Any:
        clock = Clock()
        api = RegistryAPI(clock)

        def handle(request: Request) -> Awaitable[None]:
            request.error_renderer = respond_error
            return api.handle(request, route(request.path), backend, Principal.of(request, "alice"))

        return connect_client(handle, clock=clock, **options)

    return make


@pytest.fixture
def client(connect_api: Any) -> Any:
    return connect_api()


def blob_path(digest: Digest) -> str:
    return f"/v2/library/busybox/blobs/{digest}"


def put_manifest(
    backend: Any,
    content: bytes = MANIFEST,
    cache_status: str = "HIT",
    media_type: str = OCI_MANIFEST,
    because: str = "",
) -> Digest:
    digest = Digest.of(content)
    response = ManifestResponse(digest, media_type, len(content), content, cache_status, because=because)
    backend.manifests |= {"latest": response, str(digest): response}
    return digest


# blobs


@pytest.mark.parametrize("size", SIZES)
def test_a_blob(client: Any, backend: Any, fake_content: Any, size: int) -> None:
    content = fake_content(make_bytes(size))
    digest = backend.put(content)
    response = client.fetch("GET", blob_path(digest))
    assert (response.status, response.body, response.complete) == (200, make_bytes(size), True)
    expected = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(size),
        "Docker-Content-Digest": str(digest),
        "Etag": f'"{digest}"',
        "Accept-Ranges": "bytes",
        "Docker-Distribution-Api-Version": "registry/2.0",
        "X-Cache": "HIT",
        "Cache-Status": "docker-registry-proxy;hit",
    }
    assert {name: response.fields(name) for name in expected} == {name: [value] for name, value in expected.items()}
    assert "Warning" not in response.headers
    assert content.close_count == 1
    assert backend.calls == [("library/busybox", digest, False)]
    assert client.finished_requests[0].cache_status == "HIT"
    assert client.finished_requests[0].bytes_sent == size


@pytest.mark.parametrize("size", SIZES)
def test_the_head_of_a_blob(client: Any, backend: Any, fake_content: Any, size: int) -> None:
    content = fake_content(make_bytes(size), errors={0: FAILURE})
    digest = backend.put(content)
    response = client.fetch("HEAD", blob_path(digest), [("Range", "bytes=0-0")])
    assert (response.status, response.headers["Content-Length"]) == (200, str(size))
    assert response.headers["Docker-Content-Digest"] == str(digest)
    assert response.headers["Accept-Ranges"] == "bytes"
    assert client.received.endswith(b"\r\n\r\n")
    assert (content.reads, content.close_count) == ([], 1)
    assert backend.calls == [("library/busybox", digest, True)]


def test_head_of_a_blob_without_content(connect_client: Any) -> None:
    digest = Digest.of(b"x")

    class HeadOnlyBackend:
        async def blob(self, name: Any, digest: Digest, *, head: bool) -> BlobResponse:
            return BlobResponse(digest, 5_000_000_000, None, "MISS")

    def handle(request: Request) -> Awaitable[None]:
        pull = RegistryAPI(Clock()).handle_pull(request, route(request.path), HeadOnlyBackend())  # type: ignore[arg-type]
        assert pull is not None
        return pull

    client = connect_client(handle)
    for _ in range(2):  # the connection stays usable
        response = client.fetch("HEAD", blob_path(digest))
        assert (response.status, response.headers["Content-Length"]) == (200, "5000000000")
        assert response.headers["X-Cache"] == "MISS"


def test_blob_of_unknown_length(connect_api: Any, backend: Any, fake_content: Any) -> None:
    for data in (b"", b"x", make_bytes(400_000)):
        content = fake_content(data, size=None)
        digest = backend.put(content)
        response = connect_api().fetch("GET", blob_path(digest), [("Range", "bytes=0-")])
        assert (response.status, response.body, response.complete) == (200, data, True)
        assert (response.headers["Transfer-Encoding"], response.headers["Content-Length"]) == ("chunked", None)
        http10_response = (
            connect_api().fetch("GET", blob_path(digest.of(data)), version="1.0")
            if backend.put(fake_content(data, size=None))
            else None
        )
        assert http10_response is not None
        assert (http10_response.status, http10_response.body, http10_response.complete) == (200, data, True)
        assert (http10_response.headers["Transfer-Encoding"], http10_response.headers["Connection"]) == (None, "close")
        assert content.close_count == 1


def test_the_head_of_a_blob_of_unknown_length(client: Any, backend: Any, fake_content: Any) -> None:
    digest = backend.put(fake_content(b"abc", size=None))
    response = client.fetch("HEAD", blob_path(digest))
    assert (response.status, response.headers["Content-Length"]) == (200, None)
    assert client.received.endswith(b"\r\n\r\n")


RANGES = {
    # Range fields for 100,000 bytes, and start and stop of the expected range
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


@pytest.mark.parametrize("range_field", RANGES)
def test_a_range(client: Any, backend: Any, fake_content: Any, range_field: str) -> None:
    start, stop = RANGES[range_field]
    content = fake_content(make_bytes(100_000))
    digest = backend.put(content)
    response = client.fetch("GET", blob_path(digest), [("Range", range_field)])
    assert (response.status, response.body, response.complete) == (206, make_bytes(100_000)[start:stop], True)
    assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/100000"
    assert response.headers["Content-Length"] == str(stop - start)
    assert response.headers["Docker-Content-Digest"] == str(digest)
    assert min(offset for offset, _ in content.reads) == start
    assert max(offset + size for offset, size in content.reads) == stop
    assert content.close_count == 1


@pytest.mark.parametrize("range_field", ["bytes=0-1,5-6,a", "bytes=0-99999,-1", "bytes=a-b", "lines=0-1", "bytes=-"])
def test_unsupported_range_gets_the_whole(client: Any, backend: Any, fake_content: Any, range_field: str) -> None:
    digest = backend.put(fake_content(make_bytes(100_000)))
    response = client.fetch("GET", blob_path(digest), [("Range", range_field)])
    assert (response.status, response.body) == (200, make_bytes(100_000))
    assert "Content-Range" not in response.headers


def read_parts(response: Any) -> list[tuple[str, bytes]]:
    """Return the Content-Range and the bytes of each part of a multipart response."""
    assert (response.status, response.complete) == (206, True)
    assert "Content-Range" not in response.headers
    assert response.headers["Content-Length"] == str(len(response.body))
    parts = split_byteranges(response.headers["Content-Type"], response.body)
    assert all("/" in fields["content-type"] and len(fields) == 2 for fields, _ in parts)
    return [(fields["content-range"], data) for fields, data in parts]


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 4), (100, 104)],
        [(0, 4), (4, 8)],  # podman counts the parts
        [(99_999, 100_000), (0, 1)],
        [(0, 40_000), (50_000, 50_001), (50_010, 90_000)],
        [(90_000, 100_000), (0, 20_000), (20_001, 20_002), (20_010, 85_000)],
        [(index * 90, index * 90 + 1) for index in range(1024)],
        [(index * 90, index * 90 + 80) for index in range(1024)],
    ],
)
def test_several_ranges(client: Any, backend: Any, fake_content: Any, spans: list[tuple[int, int]]) -> None:
    data = make_bytes(100_000)
    for _ in range(2):  # the connection stays usable
        content = fake_content(data, chunk_size=30_000)
        field = "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans)
        response = client.fetch("GET", blob_path(backend.put(content)), [("Range", field)])
        expected = [(f"bytes {start}-{stop - 1}/100000", data[start:stop]) for start, stop in spans]
        assert read_parts(response) == expected
        assert response.headers["Docker-Content-Digest"] == str(Digest.of(data))
        assert content.close_count == 1
        assert all(any(start <= offset < stop for start, stop in spans) for offset, _ in content.reads)


def test_boundary_is_random(client: Any, backend: Any, fake_content: Any) -> None:
    digest = backend.put(fake_content(make_bytes(1000)))
    boundaries = set()
    for _ in range(5):
        backend.put(fake_content(make_bytes(1000)))
        response = client.fetch("GET", blob_path(digest), [("Range", "bytes=0-0,5-5")])
        boundaries.add(response.headers["Content-Type"].partition("boundary=")[2])
    assert len(boundaries) == 5 and all(len(boundary) == 32 for boundary in boundaries)


@pytest.mark.parametrize("field", ["bytes=5-9,200000-", "bytes=200000-,5-9", "bytes=5-8,7-9", "bytes=,5-9"])
def test_one_range_that_remains_is_sent_plainly(client: Any, backend: Any, fake_content: Any, field: str) -> None:
    response = client.fetch("GET", blob_path(backend.put(fake_content(make_bytes(100_000)))), [("Range", field)])
    assert (response.status, response.headers["Content-Range"]) == (206, "bytes 5-9/100000")
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert response.body == make_bytes(100_000)[5:10]


def test_several_ranges_with_conditions(connect_api: Any, backend: Any, fake_content: Any) -> None:
    data = make_bytes(100_000)
    digest = Digest.of(data)
    for method, condition, status in [
        ("GET", ("If-Range", f'"{digest}"'), 206),
        ("GET", ("If-Range", '"something else"'), 200),
        ("GET", ("If-None-Match", f'"{digest}"'), 304),
        ("HEAD", ("If-Range", f'"{digest}"'), 200),
    ]:
        backend.put(fake_content(data))
        response = connect_api().fetch(method, blob_path(digest), [("Range", "bytes=0-3,100-103"), condition])
        assert response.status == status, condition
        if status == 200:
            assert response.headers["Content-Length"] == "100000"


@pytest.mark.parametrize(
    ("field", "fails_at", "status"),
    [
        ("bytes=0-9,100-109", 105, 502),  # a clean error, because the response has not started
        ("bytes=0-19999,30000-89999", 15_000, 206),
        ("bytes=0-19999,30000-89999", 70_000, 206),
        ("bytes=80000-99999,0-59999,60001-60001", 60_001, 206),
    ],
)
def test_several_ranges_of_a_blob_that_cannot_be_read(
    client: Any, backend: Any, fake_content: Any, field: str, fails_at: int, status: int
) -> None:
    content = fake_content(make_bytes(100_000), errors={fails_at: FAILURE})
    response = client.fetch("GET", blob_path(backend.put(content)), [("Range", field)])
    assert (response.status, response.complete, content.close_count) == (status, status == 502, 1)


def test_several_ranges_of_a_blob_that_ends_early(connect_api: Any, backend: Any, fake_content: Any) -> None:
    for field in ("bytes=0-9,99990-99999", "bytes=0-9,20000-99999,11-12", "bytes=10000-69999,99990-99999"):
        content = fake_content(make_bytes(100_000))
        digest = backend.put(content)
        content.data = content.data[:99_995]
        client = connect_api()
        response = client.fetch("GET", blob_path(digest), [("Range", field)])
        assert response.status == 502 or (not response.complete and client.transport.aborted)


def test_stalled_client_of_several_ranges(connect_api: Any, backend: Any, fake_content: Any) -> None:
    """Reading stops with the client, within a part and between parts."""
    for step in (1000, 200_000):
        content = fake_content(make_bytes(700_000))
        spans = [(start, start + step - 10) for start in range(0, 600_000, step)]
        field = "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans)
        client = connect_api()
        client.transport.window = 1000
        client.send_request("GET", blob_path(backend.put(content)), [("Range", field)])
        client.advance(1)
        assert sum(size for _, size in content.reads) <= 200_000
        client.extend_window(math.inf)
        assert [data for _, data in read_parts(client.read_response())] == [
            make_bytes(700_000)[start:stop] for start, stop in spans
        ]
        assert content.close_count == 1


@pytest.mark.parametrize("size", [1, 1000, SMALL, 100_000])
@pytest.mark.parametrize(
    "form",
    [
        "bytes={}-",
        "bytes={}-,-0",
        "bytes=9999999-,{}-9999999",
        "bytes=0-0,2-1",
        "bytes={}-9999999",
        "bytes=9999999999999999999-",
        "bytes=-0",
    ],
)
def test_unsatisfiable_range(client: Any, backend: Any, fake_content: Any, size: int, form: str) -> None:
    content = fake_content(make_bytes(size))
    digest = backend.put(content)
    response = client.fetch("GET", blob_path(digest), [("Range", form.format(size))])
    assert (response.status, response.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert json.loads(response.body)["errors"][0]["code"] == "RANGE_INVALID"
    assert (content.reads, content.close_count) == ([], 1)


def test_range_of_an_empty_blob(client: Any, backend: Any, fake_content: Any) -> None:
    response = client.fetch("GET", blob_path(backend.put(fake_content(b""))), [("Range", "bytes=0-")])
    assert (response.status, response.body, response.headers["Content-Length"]) == (200, b"", "0")


@settings(max_examples=examples(60), deadline=None)
@given(size=st.integers(0, 200_000), first=st.integers(0, 200_000), length=st.none() | st.integers(1, 200_000))
def test_any_range(connect_client: Any, fake_content: Any, size: int, first: int, length: int | None) -> None:
    content = fake_content(make_bytes(size), chunk_size=50_000)
    digest = Digest.of(content.data)

    class SingleBlobBackend:
        async def blob(self, name: Any, digest: Digest, *, head: bool) -> BlobResponse:
            return BlobResponse(digest, size, content, "HIT")

    clock = Clock()

    def handle(request: Request) -> Awaitable[None]:
        request.error_renderer = respond_error
        pull = RegistryAPI(clock).handle_pull(request, route(request.path), SingleBlobBackend())  # type: ignore[arg-type]
        assert pull is not None
        return pull

    last = "" if length is None else first + length - 1
    response = connect_client(handle, clock=clock).fetch("GET", blob_path(digest), [("Range", f"bytes={first}-{last}")])
    expected = make_bytes(size)[first : None if length is None else first + length]
    if size == 0:
        assert (response.status, response.body) == (200, b"")
    elif first >= size:
        assert response.status == 416
    else:
        assert (response.status, response.body) == (206, expected)
    assert response.complete
    assert content.close_count == 1


def test_if_range(connect_api: Any, backend: Any, fake_content: Any) -> None:
    digest = Digest.of(make_bytes(1000))
    for condition, status in [
        (f'"{digest}"', 206),
        (f'W/"{digest}"', 200),  # RFC 9110, section 13.1.5: a strong comparison
        ('"something else"', 200),
        ("Tue, 24 Nov 2026 12:00:00 GMT", 200),
    ]:
        backend.put(fake_content(make_bytes(1000)))
        fields = [("Range", "bytes=10-19"), ("If-Range", condition)]
        response = connect_api().fetch("GET", blob_path(digest), fields)
        assert (response.status, len(response.body)) == (status, 10 if status == 206 else 1000), condition


@pytest.mark.parametrize(
    ("condition", "not_modified"),
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
def test_if_none_match(connect_api: Any, backend: Any, fake_content: Any, condition: str, not_modified: bool) -> None:
    digest, manifest = Digest.of(make_bytes(1000)), put_manifest(backend)
    for method in ("GET", "HEAD"):
        for path, name in ((blob_path(digest), digest), ("/v2/library/busybox/manifests/latest", manifest)):
            backend.put(content := fake_content(make_bytes(1000)))
            client = connect_api()
            response = client.fetch(method, path, [("If-None-Match", condition.format(name)), ("Range", "bytes=0-0")])
            assert response.status == (304 if not_modified else 206 if method == "GET" else 200), (method, path)
            assert response.headers["Docker-Content-Digest"] == str(name)
            assert response.headers["Etag"] == f'"{name}"'
            assert content.close_count == ("blobs" in path)
            if not_modified:
                assert (response.body, response.headers["Content-Length"], content.reads) == (b"", None, [])
                # The client reads the next response correctly.
                backend.put(fake_content(make_bytes(1000)))
                assert client.fetch(method, path).status == 200


def test_several_if_none_match_fields_are_one_list(client: Any, backend: Any, fake_content: Any) -> None:
    digest = backend.put(fake_content(b"abc"))
    fields = [("If-None-Match", '"a"'), ("If-None-Match", f'"{digest}"')]
    assert client.fetch("GET", blob_path(digest), fields).status == 304


def test_stale_content_carries_a_warning(client: Any, backend: Any, fake_content: Any) -> None:
    backend.cache_status = "STALE"
    digest = backend.put(fake_content(b"abc"))
    put_manifest(backend, cache_status="STALE")
    for path in (blob_path(digest), "/v2/library/busybox/manifests/latest"):
        response = client.fetch("GET", path)
        assert (response.status, response.headers["X-Cache"]) == (200, "STALE")
        assert response.headers["Cache-Status"] == "docker-registry-proxy;hit;detail=stale"
        assert response.headers["Warning"].startswith('299 - "Stale: ')


def test_a_response_says_why_it_is_no_hit(client: Any, backend: Any) -> None:
    put_manifest(backend, cache_status="STALE", because="quay.io: closed\r\nX-Forged: \u20ac")
    response = client.fetch("GET", "/v2/library/busybox/manifests/latest")
    assert (response.status, response.headers["X-Cache-Because"]) == (200, "quay.io: closed??X-Forged: ?")
    assert client.finished_requests[-1].because.startswith("quay.io: closed")
    put_manifest(backend)
    assert client.fetch("GET", "/v2/library/busybox/manifests/latest").fields("X-Cache-Because") == []


# errors


@pytest.mark.parametrize("error", [FAILURE, UpstreamTimeout("timed out")])
def test_small_blob_failing_verification_is_a_clean_error(
    client: Any, backend: Any, fake_content: Any, error: Any
) -> None:
    content = fake_content(make_bytes(1000), verify_error=error)
    response = client.fetch("GET", blob_path(backend.put(content)))
    assert (response.status, response.complete) == (error.status, True)
    assert json.loads(response.body) == {"errors": [{"code": "UNAVAILABLE", "message": error.message}]}
    assert response.headers["Content-Type"] == "application/json"
    assert "Docker-Content-Digest" not in response.headers
    assert (content.reads, content.close_count) == ([], 1)


@pytest.mark.parametrize("size", [1, 1000, SMALL])
@pytest.mark.parametrize("fails_at", [0, 500])
def test_a_small_blob_that_cannot_be_read_is_a_clean_error(
    client: Any, backend: Any, fake_content: Any, size: int, fails_at: int
) -> None:
    if fails_at >= size:
        return
    content = fake_content(make_bytes(size), errors={fails_at: FAILURE})
    response = client.fetch("GET", blob_path(backend.put(content)))
    assert (response.status, response.complete, content.close_count) == (502, True, 1)
    assert json.loads(response.body)["errors"][0]["message"] == "connection lost"


def test_a_small_blob_that_ends_early_is_a_clean_error(client: Any, backend: Any, fake_content: Any) -> None:
    content = fake_content(make_bytes(1000))
    digest = backend.put(content)
    content.data = content.data[:999]
    response = client.fetch("GET", blob_path(digest))
    assert (response.status, response.complete, content.close_count) == (502, True, 1)
    assert json.loads(response.body)["errors"][0]["code"] == "UNAVAILABLE"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("size_known", [True, False])
@pytest.mark.parametrize("fails_at", [0, 1000, 300_000])
def test_a_large_blob_that_cannot_be_read_breaks_the_connection(
    client: Any, backend: Any, fake_content: Any, version: str, size_known: bool, fails_at: int
) -> None:
    content = fake_content(make_bytes(400_000), size=-1 if size_known else None, errors={fails_at: FAILURE})
    response = client.fetch("GET", blob_path(backend.put(content)), version=version)
    assert (response.status, response.complete) == (200, False)
    assert len(response.body) == fails_at
    assert client.transport.aborted
    assert content.close_count == 1
    assert b"connection lost" not in client.received


def test_a_large_blob_that_ends_early_breaks_the_connection(client: Any, backend: Any, fake_content: Any) -> None:
    content = fake_content(make_bytes(400_000))
    digest = backend.put(content)
    content.data = content.data[:399_999]
    response = client.fetch("GET", blob_path(digest))
    assert (response.complete, client.transport.aborted, content.close_count) == (False, True, 1)


def test_internal_error_aborts_the_response(
    client: Any, backend: Any, fake_content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example a disk error: an exception other than `RegistryError`."""
    monkeypatch.setattr("dockerproxy.http.channel.log.failure", lambda *_, **__: None)
    content = fake_content(make_bytes(400_000), errors={300_000: OSError(5, "Input/output error")})
    response = client.fetch("GET", blob_path(backend.put(content)))
    assert (response.complete, content.close_count) == (False, 1)


def test_an_unexpected_error_is_a_500_in_the_form_of_the_api(
    client: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dockerproxy.http.channel.log.failure", lambda *_, **__: None)
    backend.error = OSError(5, "Input/output error")
    response = client.fetch("GET", "/v2/library/busybox/manifests/latest")
    assert (response.status, response.complete) == (500, True)
    assert json.loads(response.body) == {"errors": [{"code": "UNKNOWN", "message": "internal error"}]}


def test_disconnect_closes_the_content(connect_api: Any, backend: Any, fake_content: Any) -> None:
    for size in (1000, 400_000):
        for size_known in (True, False):
            content = fake_content(make_bytes(size), size=-1 if size_known else None, delays={size // 2: Deferred()})
            client = connect_api()
            client.send_request("GET", blob_path(backend.put(content)))
            assert content.close_count == 0
            client.disconnect()
            assert content.close_count == 1, (size, size_known)


def test_disconnect_during_verification(connect_api: Any, backend: Any, fake_content: Any) -> None:
    content = fake_content(make_bytes(1000))
    verification: Deferred[None] = Deferred()

    async def wait_verified() -> None:
        await verification

    content.wait_verified = wait_verified
    client = connect_api()
    client.send_request("GET", blob_path(backend.put(content)))
    assert (client.received, content.close_count) == (b"", 0)  # nothing is sent before the blob is verified
    client.disconnect()
    assert content.close_count == 1


def test_stalled_client(connect_api: Any, backend: Any, fake_content: Any) -> None:
    content = fake_content(make_bytes(700_000))
    client = connect_api()
    client.transport.window = 1000
    client.send_request("GET", blob_path(backend.put(content)))
    assert len(content.reads) == 1
    client.extend_window(math.inf)
    assert client.read_response().body == make_bytes(700_000)
    assert content.close_count == 1


# manifests


def test_a_manifest(client: Any, backend: Any) -> None:
    digest = put_manifest(backend, cache_status="REVALIDATED")
    fields = [("Accept", OCI_INDEX), ("Accept", f"{OCI_MANIFEST};q=0.5")]
    for reference in ("latest", str(digest)):
        response = client.fetch("GET", f"/v2/library/busybox/manifests/{reference}", fields)
        assert (response.status, response.body, response.complete) == (200, MANIFEST, True)
        expected = {
            "Content-Type": OCI_MANIFEST,
            "Content-Length": str(len(MANIFEST)),
            "Docker-Content-Digest": str(digest),
            "Etag": f'"{digest}"',
            "Accept-Ranges": "bytes",
            "Docker-Distribution-Api-Version": "registry/2.0",
            "X-Cache": "REVALIDATED",
            "Cache-Status": "docker-registry-proxy;fwd=stale",
        }
        assert {name: response.fields(name) for name in expected} == {name: [value] for name, value in expected.items()}
    assert backend.calls[0] == ("library/busybox", "latest", [OCI_INDEX, f"{OCI_MANIFEST};q=0.5"], False)


@pytest.mark.parametrize("with_content", [True, False])
def test_the_head_of_a_manifest(client: Any, backend: Any, with_content: bool) -> None:
    digest = put_manifest(backend)
    if not with_content:
        backend.manifests["latest"] = ManifestResponse(digest, OCI_MANIFEST, len(MANIFEST), None, "MISS")
    for _ in range(2):
        response = client.fetch("HEAD", "/v2/library/busybox/manifests/latest", [("Range", "bytes=0-")])
        assert (response.status, response.headers["Content-Length"]) == (200, str(len(MANIFEST)))
        assert response.headers["Docker-Content-Digest"] == str(digest)
        assert response.headers["Content-Type"] == OCI_MANIFEST
    assert client.received.endswith(b"\r\n\r\n")
    assert backend.calls[0][-1] is True


def test_a_manifest_by_range(client: Any, backend: Any) -> None:
    """containerd 2.1 asks for `bytes=0-` of manifests too."""
    put_manifest(backend)
    size = len(MANIFEST)
    path = "/v2/library/busybox/manifests/latest"
    response = client.fetch("GET", path, [("Range", "bytes=0-")])
    assert (response.status, response.body) == (206, MANIFEST)
    assert response.headers["Content-Range"] == f"bytes 0-{size - 1}/{size}"
    response = client.fetch("GET", path, [("Range", "bytes=-5")])
    assert (response.status, response.body) == (206, MANIFEST[-5:])
    response = client.fetch("GET", path, [("Range", f"bytes={size}-")])
    assert (response.status, response.headers["Content-Range"]) == (416, f"bytes */{size}")
    response = client.fetch("GET", path, [("Range", "bytes=0-1,3-4")])
    assert read_parts(response) == [(f"bytes 0-1/{size}", MANIFEST[:2]), (f"bytes 3-4/{size}", MANIFEST[3:5])]


# routes

PATHS = {
    Kind.BASE: "/v2/",
    Kind.CATALOG: "/v2/_catalog",
    Kind.TAGS: "/v2/a/tags/list",
    Kind.MANIFEST: "/v2/a/manifests/latest",
    Kind.BLOB: f"/v2/a/blobs/{Digest.of(b'x')}",
    Kind.REFERRERS: f"/v2/a/referrers/{Digest.of(b'x')}",
    Kind.UPLOADS: "/v2/a/blobs/uploads/",
    Kind.UPLOAD: f"/v2/a/blobs/uploads/session?digest={Digest.of(b'x')}",
}
OPERATIONS = {
    (Kind.BASE, "GET"): "ping",
    (Kind.CATALOG, "GET"): "catalog",
    (Kind.TAGS, "GET"): "tags",
    (Kind.MANIFEST, "GET"): "manifest",
    (Kind.MANIFEST, "PUT"): "put_manifest",
    (Kind.MANIFEST, "DELETE"): "delete_manifest",
    (Kind.BLOB, "GET"): "blob",
    (Kind.BLOB, "DELETE"): "delete_blob",
    (Kind.REFERRERS, "GET"): "referrers",
    (Kind.UPLOADS, "POST"): "start_upload",
    (Kind.UPLOAD, "GET"): "upload_status",
    (Kind.UPLOAD, "PATCH"): "upload_chunk",
    (Kind.UPLOAD, "PUT"): "finish_upload",
    (Kind.UPLOAD, "DELETE"): "cancel_upload",
}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get"]


class RecordingBackend:
    """Passes every call to `backend` and records the names of the methods."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.methods: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.methods.append(name)
            return getattr(self.backend, name)(*args, **options)

        return call


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(Kind), method=st.sampled_from(METHODS) | st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=1))
def test_each_kind_and_method_has_one_operation(
    connect_client: Any, backend: Any, fake_content: Any, kind: Kind, method: str
) -> None:
    backend.put(fake_content(b"x"))
    put_manifest(backend)
    recorder = RecordingBackend(backend)

    def handle(request: Request) -> Awaitable[None]:
        request.error_renderer = respond_error
        api = RegistryAPI(Clock())
        return api.handle(request, route(request.path), recorder, Principal.of(request, None))  # type: ignore[arg-type]

    response = connect_client(handle).fetch(method, PATHS[kind])
    operation = OPERATIONS.get((kind, "GET" if method == "HEAD" else method))
    assert recorder.methods == ([] if operation is None else [operation])
    if operation is None:
        allowed = {known_method for known_kind, known_method in OPERATIONS if known_kind is kind}
        assert response.status == (200 if method == "OPTIONS" else 405)
        assert set(response.headers["Allow"].split(", ")) == allowed | ({"HEAD"} if "GET" in allowed else set())
    else:
        assert 200 <= response.status < 300
        assert method != "HEAD" or response.body == b""


@given(kind=st.sampled_from(Kind), method=st.sampled_from(METHODS))
def test_operations_of_a_pull_backend(kind: Kind, method: str) -> None:
    """Everything else is forwarded to the upstream registry."""

    class Backend:
        async def respond(self, *args: Any, **options: Any) -> None: ...

        ping = manifest = blob = referrers = respond

    class Incoming:
        def __init__(self) -> None:
            self.method = method

    pull = RegistryAPI(Clock()).handle_pull(Incoming(), route(PATHS[kind].partition("?")[0]), Backend())  # type: ignore[arg-type]
    served = kind in (Kind.BASE, Kind.MANIFEST, Kind.BLOB, Kind.REFERRERS) and method in ("GET", "HEAD")
    assert (pull is not None) == served
    if pull is not None:
        pull.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "path", "call"),
    [
        ("PUT", PATHS[Kind.MANIFEST], "put_manifest"),
        ("DELETE", PATHS[Kind.MANIFEST], "delete_manifest"),
        ("DELETE", PATHS[Kind.BLOB], "delete_blob"),
        ("POST", PATHS[Kind.UPLOADS], "start_upload"),
        ("PATCH", PATHS[Kind.UPLOAD], "upload_chunk"),
        ("PUT", PATHS[Kind.UPLOAD], "finish_upload"),
        ("DELETE", PATHS[Kind.UPLOAD], "cancel_upload"),
    ],
)
def test_a_change_gets_the_principal(client: Any, backend: Any, method: str, path: str, call: str) -> None:
    assert client.fetch(method, path, [("User-Agent", "docker/29" + "x" * 1000)]).status < 300
    assert backend.calls[-1][0] == call
    principal = backend.calls[-1][1]
    assert (principal.user, principal.address) == ("alice", client.finished_requests[0].client)
    assert principal.user_agent.startswith("docker/29") and len(principal.user_agent) == 256


def test_media_type_cannot_inject_a_field(client: Any, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dockerproxy.http.channel.log.failure", lambda *_, **__: None)
    put_manifest(backend, media_type="text/plain\r\nSet-Cookie: a=b")
    client.send_request("GET", "/v2/library/busybox/manifests/latest")
    assert b"Set-Cookie" not in client.received
