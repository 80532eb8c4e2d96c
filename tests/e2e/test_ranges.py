"""Ranges of a blob, hosted, cached and downloading, several or far ahead: beside docker-registry, and by podman."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import fake_registry, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.clients import check_output
from tests.e2e.harness.http_client import BufferedResponse, request_directly
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, RegistryDaemon, write_image_folder
from tests.e2e.harness.upstreams import FAKE, REGISTRY, Upstreams
from tests.support.multipart import split_byteranges

KIB = 1024
SIZE = 2_000_000
DATA = images.random_bytes(SIZE, "several ranges")
DIGEST = images.sha256_digest(DATA)
HOSTED = f"https://{HOSTED_REGISTRY_HOST}"


@pytest.fixture(scope="module")
def daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryDaemon]:
    registry_daemon = RegistryDaemon(tmp_path_factory.mktemp("ranges"), {**upstreams.settings, "ALLOW_PUSH": "true"})
    with registry_daemon.run_and_check_log(lambda: upstreams.secrets):
        response = registry_daemon.client.request(
            "POST", f"{HOSTED}/v2/ranges/app/blobs/uploads/?digest={DIGEST}",
            {"Content-Type": "application/octet-stream"}, DATA,
        )  # fmt: skip
        assert response.status == 201
        layer = images.TypedContent(images.OCI_LAYER, DATA)
        config = images.TypedContent(images.OCI_CONFIG, b"{}")
        upstreams.push_to_registry("ranges/app", "1", images.build_image_from_blobs(config, [layer]))
        yield registry_daemon


def read_parts(response: BufferedResponse) -> list[tuple[str, bytes]]:
    """Return the Content-Range and the bytes of each part, in their order."""
    assert response.status == 206 and "content-range" not in response.headers
    assert response.headers["content-length"] == str(len(response.body))
    parts = split_byteranges(response.headers["content-type"], response.body)
    return [(fields["content-range"], data) for fields, data in parts]


CHUNKS = [(start, start + 300) for start in range(0, SIZE, SIZE // 1000)]

REQUESTS = {
    "two": [(0, 4), (100, 104)],
    "adjacent": [(1000, 2000), (2000, 3000), (3008, 4000)],  # podman: a table of contents, and what follows it
    "descending": [(SIZE - 10, SIZE), (500_000, 900_000), (0, 100)],
    "a lazy puller's": [(SIZE - 47, SIZE), (0, 50 * KIB), (1_000_000, 1_000_000 + 4 * KIB)],
    "podman's": CHUNKS,
}


def range_field(spans: list[tuple[int, int]]) -> str:
    return "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in spans)


@pytest.mark.parametrize("name", REQUESTS)
def test_several_ranges_as_docker_registry_sends_them(upstreams: Upstreams, daemon: RegistryDaemon, name: str) -> None:
    spans = REQUESTS[name]
    expected = [(f"bytes {start}-{stop - 1}/{SIZE}", DATA[start:stop]) for start, stop in spans]
    fields = {"Range": range_field(spans)}
    path = f"/v2/ranges/app/blobs/{DIGEST}"
    directly = request_directly(
        "GET", f"https://127.0.0.1:{upstreams.registry.port}{path}", fields, ssl._create_unverified_context()
    )
    assert read_parts(directly) == expected
    for _ in range(2):  # uncached, then cached
        cached = daemon.client.request("GET", f"{REGISTRY}{path}", fields)
        assert read_parts(cached) == expected
    assert read_parts(daemon.client.request("GET", f"{HOSTED}{path}", fields)) == expected
    plain = request_directly("GET", f"http://{daemon.http_address}{path}", fields)
    assert read_parts(plain) == expected
    assert len(plain.body) < len(directly.body) + 1000


@pytest.mark.parametrize("url", [HOSTED, REGISTRY])
def test_unusual_lists_of_ranges(daemon: RegistryDaemon, url: str) -> None:
    blob = f"{url}/v2/ranges/app/blobs/{DIGEST}"

    def get(ranges: str, **headers: str) -> BufferedResponse:
        return daemon.client.get(blob, Range=f"bytes={ranges}", **headers)

    unsatisfiable = get(f"{SIZE}-,{SIZE + 5}-{SIZE + 9}")
    assert (unsatisfiable.status, unsatisfiable.headers["content-range"]) == (416, f"bytes */{SIZE}")
    one = get(f"{SIZE}-,5-9")
    assert (one.status, one.headers["content-range"], one.body) == (206, f"bytes 5-9/{SIZE}", DATA[5:10])
    overlapping = get("500-599,0-9,550-649")
    assert [field for field, _ in read_parts(overlapping)] == [f"bytes 500-649/{SIZE}", f"bytes 0-9/{SIZE}"]
    for ranges in ("0-,0-,0-", ",".join(["0-0"] * 1025)):
        assert (get(ranges).status, get(ranges).body) == (200, DATA)
    assert get("0-0,5-5", If_Range='"another"').status == 200
    assert len(read_parts(get("0-0,5-5", If_Range=f'"{DIGEST}"'))) == 2
    head = daemon.client.head(blob, Range="bytes=0-0,5-5")
    assert (head.status, head.headers["content-length"]) == (200, str(SIZE))


def test_parts_of_a_growing_file(upstreams: Upstreams, daemon: RegistryDaemon) -> None:
    """The bytes that have arrived are sent at once, in any order, but the last one only after the verification."""
    data = images.random_bytes(600_000, "growing")
    digest = upstreams.fake.put_blob("growing", data)
    gate = threading.Event()
    upstreams.fake.add_rule("GET", digest, fake_registry.pause_after(400_000, gate), times=1)
    url = f"{FAKE}/v2/growing/blobs/{digest}"
    try:
        first = daemon.client.get(url, Range="bytes=300000-399998,100-199")
        assert [part for _, part in read_parts(first)] == [data[300_000:399_999], data[100:200]]
        with daemon.client.stream("GET", url, {"Range": "bytes=0-99999,599999-599999"}) as response:
            assert response.status == 206
            assert data[:50_000] in response.read(60_000)
            gate.set()
            assert data[599_999:] + b"\r\n--" in response.read()[-60:]
    finally:
        gate.set()
    assert len(upstreams.fake.find_requests("GET", digest)) == 1
    assert daemon.client.get(url).body == data


AHEAD_SIZE = 6_000_000
FOOTER, TABLE = (AHEAD_SIZE - 51, AHEAD_SIZE), (AHEAD_SIZE - 60_000, AHEAD_SIZE - 51)
LAZY_REQUESTS = {
    "stargz": [[FOOTER], [TABLE], [(5_000_000, 5_400_000)], [(2_500_000, 2_900_000)]],
    "soci": [[(4_500_000, 5_500_000)], [(3_000_000, 4_000_000)], [(AHEAD_SIZE - 20_000, AHEAD_SIZE)]],
    "podman": [[TABLE, FOOTER], [(5_000_000, 5_000_100), (3_000_000, 3_000_100), (4_000_000, 4_000_100)]],
}


@pytest.fixture(scope="module", params=["1", "2"])
def ahead_daemon(
    request: pytest.FixtureRequest, upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RegistryDaemon]:
    settings = {**upstreams.settings, "WORKERS": request.param}
    registry_daemon = RegistryDaemon(tmp_path_factory.mktemp("ahead"), settings)
    with registry_daemon.run_and_check_log(lambda: upstreams.secrets):
        yield registry_daemon


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("puller", LAZY_REQUESTS)
def test_a_lazy_puller_does_not_wait_for_the_download(
    upstreams: Upstreams, ahead_daemon: RegistryDaemon, gate: threading.Event, puller: str
) -> None:
    """The download stands still after 200 kB. Its client gets all that it would get from the registry itself."""
    name = f"ahead/{puller}-{ahead_daemon.port}"
    data = images.random_bytes(AHEAD_SIZE, name)
    digest = upstreams.fake.put_blob(name, data)
    path = f"/v2/{name}/blobs/{digest}"
    upstreams.fake.add_rule("GET", digest, fake_registry.pause_after(200_000, gate), times=1)
    # Other clients, in each of the processes: one reads the download from its beginning.
    with ahead_daemon.client.stream("GET", FAKE + path) as whole:
        assert whole.read(100_000) == data[:100_000]
        for spans in LAZY_REQUESTS[puller]:
            for _ in range(2):
                response = ahead_daemon.client.get(FAKE + path, Range=range_field(spans))
                parts = read_parts(response) if len(spans) > 1 else [("", response.body)]
                assert [part for _, part in parts] == [data[start:stop] for start, stop in spans]
                if len(spans) == 1:
                    direct = request_directly(
                        "GET", f"https://127.0.0.1:{upstreams.fake.port}{path}", {"Range": range_field(spans)},
                        ssl._create_unverified_context(),
                    )  # fmt: skip
                    assert (response.status, response.body) == (direct.status, direct.body)
                    assert response.headers["content-range"] == direct.headers["content-range"]
        requests = upstreams.fake.find_requests("GET", digest)
        assert sum("range" not in request.headers for request in requests) == 1  # one download for all processes
        asked = sum(len(spans) for spans in LAZY_REQUESTS[puller])
        assert len(requests) <= 1 + 4 * asked  # each range once for each of two requests, and twice directly
        gate.set()
        assert whole.read() == data[100_000:]
    assert ahead_daemon.client.get(FAKE + path).body == data
    assert "sent other bytes" not in ahead_daemon.output_text


def test_two_round_trips(upstreams: Upstreams, ahead_daemon: RegistryDaemon, gate: threading.Event) -> None:
    """The first request of all is for the end: the download begins, and stands still at once."""
    name = f"ahead/trips-{ahead_daemon.port}"
    data = images.random_bytes(AHEAD_SIZE, name)
    digest = upstreams.fake.put_blob(name, data)
    url = f"{FAKE}/v2/{name}/blobs/{digest}"
    upstreams.fake.add_rule("GET", digest, fake_registry.pause_after(0, gate), times=1)
    response = ahead_daemon.client.get(url, Range="bytes=-5000")
    assert (response.status, response.body, response.cache_status) == (206, data[-5000:], "MISS")
    requests = upstreams.fake.find_requests("GET", digest)
    assert [request.headers.get("range") for request in requests] == [
        None,
        f"bytes={AHEAD_SIZE - 5000}-{AHEAD_SIZE - 1}",
    ]
    assert requests[1].sent_bytes == 5000
    gate.set()
    # The download goes on without a reader, and is whole.
    assert ahead_daemon.client.get(url).body == data
    assert len(upstreams.fake.find_requests("GET", digest)) == 2


def test_a_range_ahead_follows_redirects(
    upstreams: Upstreams, ahead_daemon: RegistryDaemon, gate: threading.Event
) -> None:
    name = f"ahead/redirected-{ahead_daemon.port}"
    data = images.random_bytes(AHEAD_SIZE, name)
    digest = upstreams.fake.put_blob(name, data)
    target = upstreams.fake.put_blob(f"cdn/{name}", data)
    upstreams.fake.add_rule(
        "GET", f"/v2/{name}/blobs/", fake_registry.redirect_to(f"/v2/cdn/{name}/blobs/{target}?X=1")
    )
    upstreams.fake.add_rule("GET", f"^/v2/cdn/{name}/blobs/", fake_registry.pause_after(0, gate), times=1)
    response = ahead_daemon.client.get(f"{FAKE}/v2/{name}/blobs/{digest}", Range="bytes=-5000")
    assert (response.status, response.body) == (206, data[-5000:])


@pytest.mark.parametrize(
    "behaviour",
    [fake_registry.ignore_range, fake_registry.respond_status(403, "DENIED"), fake_registry.truncate_after(100)],
    ids=["no ranges", "403", "breaks off"],
)
def test_a_registry_that_sends_no_range_is_waited_for(
    upstreams: Upstreams, tmp_path: Path, gate: threading.Event, behaviour: fake_registry.ResponseBehaviour
) -> None:
    daemon = RegistryDaemon(tmp_path, upstreams.settings)
    with daemon.run_and_check_log(lambda: upstreams.secrets):
        data = images.random_bytes(AHEAD_SIZE, "waits")
        digest = upstreams.fake.put_blob("ahead/waits", data)
        url = f"{FAKE}/v2/ahead/waits/blobs/{digest}"
        upstreams.fake.add_rule("GET", digest, fake_registry.pause_after(200_000, gate), times=1)
        upstreams.fake.add_rule("GET", digest, behaviour)
        with daemon.client.stream("GET", url, {"Range": "bytes=4000000-4999999"}) as response:
            assert response.status == 206
            wait_until(lambda: len(upstreams.fake.find_requests("GET", digest)) == 2, "the range is requested")
            gate.set()
            assert response.read() == data[4_000_000:5_000_000]
        assert len(upstreams.fake.find_requests("GET", digest)) == 2


def test_a_registry_that_lies_about_a_range(upstreams: Upstreams, tmp_path: Path, gate: threading.Event) -> None:
    """The client gets what the registry sends, as directly. The cache gets the blob, and the log names the registry."""
    daemon = RegistryDaemon(tmp_path, upstreams.settings)
    data = images.random_bytes(AHEAD_SIZE, "lies")
    digest = upstreams.fake.put_blob("ahead/lies", data)
    lie = images.TypedContent("application/octet-stream", bytes(AHEAD_SIZE))
    url = f"{FAKE}/v2/ahead/lies/blobs/{digest}"
    upstreams.fake.add_rule("GET", digest, fake_registry.pause_after(200_000, gate), times=1)
    upstreams.fake.add_rule(
        "GET", digest, lambda exchange, content: fake_registry.respond_normally(exchange, lie), times=1
    )
    with daemon.run_and_check_log(lambda: upstreams.secrets):
        assert daemon.client.get(url, Range="bytes=-100").body == bytes(100)
        gate.set()
        assert daemon.client.get(url).body == data
        assert f"fake.test sent other bytes for the range {AHEAD_SIZE - 100}-{AHEAD_SIZE - 1}" in daemon.output_text
        assert daemon.client.get(url, Range="bytes=-100").body == data[-100:]


def build_files(changed: int) -> dict[str, bytes]:
    """Return 40 files, `changed` of which differ. They are in no folder: podman 4.3 may write files before folders."""
    return {f"file-{index}": images.random_bytes(200_000, f"partial {index} {index < changed}") for index in range(40)}


@pytest.mark.parametrize("registry", [HOSTED_REGISTRY_HOST, "registry.test:5443"])
def test_podman_downloads_only_what_changed(
    daemon: RegistryDaemon, clients: ClientFactory, tmp_path_factory: pytest.TempPathFactory, registry: str
) -> None:
    """zstd:chunked layers with `enable_partial_images`: 2 of 40 files differ."""
    folder = tmp_path_factory.mktemp("partial")
    push_client = clients.podman(daemon)
    for tag, changed in (("1", 0), ("2", 2)):
        image = write_image_folder(images.build_image([build_files(changed)]), folder / tag)
        image_id = check_output(push_client.run("pull", f"dir:{image}")).strip()
        target = f"docker://{registry}/podman/partial:{tag}"
        check_output(push_client.run("push", "--format=oci", "--compression-format=zstd:chunked", image_id, target))
    pull_client = clients.partial_podman(daemon)
    check_output(pull_client.run("pull", f"{registry}/podman/partial:1"))
    offset = daemon.log_offset()
    check_output(pull_client.run("pull", f"{registry}/podman/partial:2"))
    entries = [entry for entry in daemon.access_log(offset) if "/blobs/" in entry.target and entry.method == "GET"]
    assert 400_000 < sum(entry.size for entry in entries) < 500_000
