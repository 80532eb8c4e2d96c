"""The requests of the OCI conformance suite (opencontainers/distribution-spec, `conformance/`), in Python.

The suite is a Go program, which is not available everywhere. It sends a few kinds of requests for many combinations of
push methods and contents. Here these are tables, and each test does the suite's steps for one row of a table.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import pytest
from attrs import Factory, define

from tests.e2e.harness import http_client
from tests.e2e.harness.bucket_fleet import running_bucket_fleet
from tests.e2e.harness.http_client import BufferedResponse
from tests.e2e.harness.images import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, random_bytes
from tests.e2e.harness.object_store import SECRET_KEY, ObjectStore
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.e2e.harness.upstreams import Upstreams

JSONObject = dict[str, Any]
OCTET_STREAM = {"Content-Type": "application/octet-stream"}
ACCEPT = {"Accept": f"{OCI_INDEX}, {OCI_MANIFEST}"}
EMPTY_TYPE, EXAMPLE_TYPE, OTHER_EXAMPLE_TYPE = (
    "application/vnd.oci.empty.v1+json",
    "application/vnd.example.oci.conformance",
    "application/vnd.example.oci.conformance.other",
)
ALGORITHMS = ("sha256", "sha512")


def compute_digest(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


class ConformanceClient:
    """A client of the hosted registry with one open connection."""

    def __init__(self, port: int) -> None:
        self._base_url = f"http://127.0.0.1:{port}"
        self._connection = http_client.DirectConnection("127.0.0.1", ("127.0.0.1", port), None)

    def request(
        self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> BufferedResponse:
        """Send a request to `target`, which is a path or the result of `location_target`."""
        self._connection.request(method, target, body, dict(headers or {}))
        return http_client.read_response(self._connection.getresponse())

    def location_target(self, response: BufferedResponse) -> str:
        """Return the path and query of the response's Location."""
        parts = urlsplit(urljoin(self._base_url, response.headers["location"]))
        return parts.path + (f"?{parts.query}" if parts.query else "")

    def start_upload(self, repository: str) -> str:
        response = self.request("POST", f"/v2/{repository}/blobs/uploads/")
        assert response.status == 202, response
        return self.location_target(response)

    def finish_upload(self, location: str, digest: str, body: bytes = b"", **fields: str) -> BufferedResponse:
        """Complete an upload. Underscores in the names of `fields` become dashes."""
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        separator = "&" if "?" in location else "?"
        return self.request("PUT", f"{location}{separator}digest={digest}", body, OCTET_STREAM | headers)

    def push_blob(self, repository: str, data: bytes, algorithm: str = "sha256") -> str:
        digest = compute_digest(data, algorithm)
        assert push_post_put(self, repository, digest, data).status == 201
        return digest


# Push methods of a blob. Each returns the response that completes the push.


def push_monolithic_post(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> BufferedResponse:
    return registry.request("POST", f"/v2/{repository}/blobs/uploads/?digest={digest}", data, OCTET_STREAM)


def push_post_put(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> BufferedResponse:
    return registry.finish_upload(registry.start_upload(repository), digest, data)


def push_streamed(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> BufferedResponse:
    response = registry.request("PATCH", registry.start_upload(repository), data, OCTET_STREAM)
    assert response.status == 202
    return registry.finish_upload(registry.location_target(response), digest)


def push_chunked(
    registry: ConformanceClient,
    repository: str,
    digest: str,
    data: bytes,
    *,
    last_chunk_in_put: bool = False,
    out_of_order: bool = False,
) -> BufferedResponse:
    """Push a blob in three chunks.

    `last_chunk_in_put` sends the last one with the PUT. `out_of_order` sends a wrong chunk before each one.
    """
    location, size = registry.start_upload(repository), len(data) // 3 + 1
    for start in range(0, len(data), size):
        if out_of_order:
            location = send_out_of_order_chunk(
                registry, location, digest, data, start, size, last_chunk_in_put=last_chunk_in_put
            )
        chunk = data[start : start + size]
        content_range = f"{start}-{start + len(chunk) - 1}"
        if last_chunk_in_put and start + size >= len(data):
            return registry.finish_upload(location, digest, chunk, Content_Range=content_range)
        response = registry.request("PATCH", location, chunk, OCTET_STREAM | {"Content-Range": content_range})
        assert (response.status, response.headers["range"]) == (202, f"0-{start + len(chunk) - 1}")
        location = registry.location_target(response)
    return registry.finish_upload(location, digest)


def send_out_of_order_chunk(
    registry: ConformanceClient,
    location: str,
    digest: str,
    data: bytes,
    start: int,
    size: int,
    *,
    last_chunk_in_put: bool,
) -> str:
    """Send a chunk that is not the next one; return the upload's location from a request for its status."""
    wrong_start = start + size if start + size < len(data) else 0
    chunk = data[wrong_start : wrong_start + size]
    content_range = f"{wrong_start}-{wrong_start + len(chunk) - 1}"
    if last_chunk_in_put and wrong_start + size >= len(data):
        rejection = registry.finish_upload(location, digest, chunk, Content_Range=content_range)
    else:
        rejection = registry.request("PATCH", location, chunk, OCTET_STREAM | {"Content-Range": content_range})
    assert rejection.status == 416
    status = registry.request("GET", location)
    assert (status.status, status.headers["range"]) == (204, f"0-{max(start - 1, 0)}")
    return registry.location_target(status)


def push_chunked_put(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> BufferedResponse:
    return push_chunked(registry, repository, digest, data, last_chunk_in_put=True)


def push_out_of_order(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> BufferedResponse:
    return push_chunked(registry, repository, digest, data, out_of_order=True)


def push_out_of_order_put(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> BufferedResponse:
    return push_chunked(registry, repository, digest, data, out_of_order=True, last_chunk_in_put=True)


def mount(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> BufferedResponse:
    assert push_post_put(registry, "conformance/other", digest, data).status == 201
    return registry.request("POST", f"/v2/{repository}/blobs/uploads/?mount={digest}&from=conformance/other")


def mount_without_source(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> BufferedResponse:
    assert push_post_put(registry, "conformance/other", digest, data).status == 201
    response = registry.request("POST", f"/v2/{repository}/blobs/uploads/?mount={digest}")
    if response.status == 202:  # a registry may not look for it: one with a bucket does not
        return registry.finish_upload(registry.location_target(response), digest, data)
    return response


def mount_unknown_blob(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> BufferedResponse:
    response = registry.request("POST", f"/v2/{repository}/blobs/uploads/?mount={digest}&from=conformance/other")
    assert response.status == 202
    return registry.finish_upload(registry.location_target(response), digest, data)


PushMethod = Callable[[ConformanceClient, str, str, bytes], BufferedResponse]
MOUNT_METHODS: list[PushMethod] = [mount, mount_without_source, mount_unknown_blob]
PUSH_METHODS: list[PushMethod] = [
    push_monolithic_post,
    push_post_put,
    push_streamed,
    push_chunked,
    push_chunked_put,
    push_out_of_order,
    push_out_of_order_put,
]
VERIFYING_METHODS: list[PushMethod] = [
    push_monolithic_post,
    push_post_put,
    push_streamed,
    push_chunked,
    push_chunked_put,
]


class ChangingConnection(ConformanceClient):
    """A client that sends each request to another node of a balancer."""

    def request(
        self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> BufferedResponse:
        self._connection.close()
        return super().request(method, target, body, headers)


@pytest.fixture(scope="module", params=["directory", "seaweedfs", "ceph", "three nodes"])
def registry(
    request: pytest.FixtureRequest, upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ConformanceClient]:
    """Return a client of a daemon with a directory or a bucket, and of three nodes with a bucket."""
    folder = tmp_path_factory.mktemp("conformance")
    with ExitStack() as stack:
        settings = upstreams.settings
        if request.param != "directory":
            store: ObjectStore = request.getfixturevalue("ceph" if request.param == "ceph" else "seaweedfs")
            settings = {**settings, **store.settings(store.make_bucket(folder.name.replace("_", "-")))}
        if request.param == "three nodes":
            fleet = stack.enter_context(running_bucket_fleet(folder, 3, settings))
            yield ChangingConnection(fleet.balancer.port)
            return
        daemon = RegistryDaemon(folder, settings)
        stack.enter_context(daemon.run_and_check_log(lambda: [*upstreams.secrets, SECRET_KEY]))
        yield ConformanceClient(daemon.http_port)


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    """Return a repository name that only this test uses."""
    return "conformance/" + hashlib.sha256(request.node.name.encode()).hexdigest()[:16]


def check_blob(registry: ConformanceClient, repository: str, digest: str, data: bytes) -> None:
    """Check HEAD, GET and DELETE of a blob."""
    target = f"/v2/{repository}/blobs/{digest}"
    for method, body in (("HEAD", b""), ("GET", data)):
        response = registry.request(method, target)
        assert (response.status, response.body) == (200, body)
        assert response.headers["content-length"] == str(len(data))
        assert response.headers["docker-content-digest"] == digest
    assert registry.request("DELETE", target).status == 202
    assert registry.request("HEAD", target).status == 404
    assert registry.request("DELETE", target).status == 404


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("push", [*PUSH_METHODS, *MOUNT_METHODS], ids=lambda push: push.__name__)
def test_push_blob(registry: ConformanceClient, repository: str, push: PushMethod, algorithm: str) -> None:
    data = random_bytes(3000 - 5, f"{push.__name__}-{algorithm}")
    digest = compute_digest(data, algorithm)
    assert registry.request("GET", f"/v2/{repository}/blobs/{digest}").status == 404
    response = push(registry, repository, digest, data)
    assert (response.status, response.headers["docker-content-digest"]) == (201, digest)
    assert registry.request("GET", registry.location_target(response)).body == data
    check_blob(registry, repository, digest, data)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("push", VERIFYING_METHODS, ids=lambda push: push.__name__)
def test_blob_with_wrong_digest(registry: ConformanceClient, repository: str, push: PushMethod, algorithm: str) -> None:
    data = random_bytes(3000, f"bad-{push.__name__}-{algorithm}")
    digest = compute_digest(data, algorithm)
    response = push(registry, repository, digest, data + b"oh no")
    assert (response.status, response.error_code) == (400, "DIGEST_INVALID")
    assert registry.request("GET", f"/v2/{repository}/blobs/{digest}").status == 404


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("push", PUSH_METHODS, ids=lambda push: push.__name__)
@pytest.mark.parametrize("data", [b"", b"{}"], ids=["empty", "empty-json"])
def test_well_known_blob(
    registry: ConformanceClient, repository: str, data: bytes, push: PushMethod, algorithm: str
) -> None:
    digest = compute_digest(data, algorithm)
    assert push(registry, repository, digest, data).status == 201
    check_blob(registry, repository, digest, data)


def test_cancelled_upload(registry: ConformanceClient, repository: str) -> None:
    location = registry.start_upload(repository)
    if isinstance(registry, ChangingConnection):  # an upload without bytes is an offer, which other nodes still take
        location = registry.location_target(registry.request("PATCH", location, b"data"))
    assert registry.request("DELETE", location).status == 204
    for method in ("GET", "PATCH", "DELETE"):
        assert registry.request(method, location).status == 404


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("byte_range", "start", "end"),
    [
        ("500-1499", 500, 1500),
        ("500-", 500, 2048),
        ("-500", 1548, 2048),
        ("2000-5000", 2000, 2048),
        ("500-0", 0, 0),
        ("5000-10000", 0, 0),
    ],
)
def test_blob_range(
    registry: ConformanceClient, repository: str, byte_range: str, start: int, end: int, algorithm: str
) -> None:
    data = random_bytes(2048, f"range-{algorithm}")
    digest = registry.push_blob(repository, data, algorithm)
    response = registry.request("GET", f"/v2/{repository}/blobs/{digest}", headers={"Range": f"bytes={byte_range}"})
    if not end:
        assert response.status == 416
        return
    assert (response.status, response.body) == (206, data[start:end])
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/2048"
    assert response.headers["content-length"] == str(end - start)


@define
class PushedContent:
    """Content that is pushed together, and the descriptors that the referrers API must return for each subject."""

    seed: str
    algorithm: str = "sha256"
    blobs: dict[str, bytes] = Factory(dict)
    manifests: dict[str, bytes] = Factory(dict)
    tags: dict[str, str] = Factory(dict)
    expected_referrers: dict[str, list[JSONObject]] = Factory(dict)

    def add_blob(self, content: bytes, media_type: str, **extra: Any) -> JSONObject:
        digest = compute_digest(content, self.algorithm)
        self.blobs[digest] = content
        return {"mediaType": media_type, "digest": digest, "size": len(content), **extra}

    def add_layer(self, *, compressed: bool = True, media_type: str | None = None) -> JSONObject:
        data = random_bytes(2000, f"{self.seed}/{len(self.blobs)}")
        default_media_type = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if compressed else "")
        return self.add_blob(gzip.compress(data, mtime=0) if compressed else data, media_type or default_media_type)

    def add_image(self, tag: str | None = None, *, layers: list[JSONObject] | None = None, **extra: Any) -> JSONObject:
        layers = [self.add_layer(), self.add_layer()] if layers is None else layers
        config_fields = {"architecture": "amd64", "os": "linux", "seed": self.seed, "n": len(self.blobs)}
        config = self.add_blob(json.dumps(config_fields).encode(), OCI_CONFIG)
        return self.add_manifest({"mediaType": OCI_MANIFEST, "config": config, "layers": layers, **extra}, tag)

    def add_artifact(self, artifact_type: str, tag: str | None = None, **extra: Any) -> JSONObject:
        content = {"config": self.add_blob(b"{}", EMPTY_TYPE), "layers": [self.add_layer(media_type=artifact_type)]}
        return self.add_manifest({"mediaType": OCI_MANIFEST, "artifactType": artifact_type, **content, **extra}, tag)

    def add_index(
        self, tag: str | None = None, *, manifests: list[JSONObject] | None = None, **extra: Any
    ) -> JSONObject:
        if manifests is None:
            manifests = [
                self.add_image() | {"platform": {"os": "linux", "architecture": name}} for name in ("amd64", "arm64")
            ]
        return self.add_manifest({"mediaType": OCI_INDEX, "manifests": manifests, **extra}, tag)

    def add_manifest(self, content: JSONObject, tag: str | None) -> JSONObject:
        data = json.dumps({"schemaVersion": 2, **content}).encode()
        digest = compute_digest(data, self.algorithm)
        self.manifests[digest] = data
        if tag is not None:
            self.tags[tag] = digest
        descriptor: JSONObject = {"mediaType": content["mediaType"], "digest": digest, "size": len(data)}
        if "subject" in content:
            referrer = dict(descriptor)
            artifact_type = content.get("artifactType") or content.get("config", {}).get("mediaType")
            if artifact_type:
                referrer["artifactType"] = artifact_type
            if "annotations" in content:
                referrer["annotations"] = content["annotations"]
            self.expected_referrers.setdefault(content["subject"]["digest"], []).append(referrer)
        return descriptor


def add_large(data: PushedContent) -> None:
    data.add_image("large", annotations={f"large-annotation-{number}": "A" * 10_000 for number in range(390)})


def add_nested(data: PushedContent) -> None:
    data.add_index("nested", manifests=[data.add_index(), data.add_index()])


def add_artifacts_of_an_image(data: PushedContent) -> None:
    subject = data.add_image("image")
    data.add_image(subject=subject)
    for number, kind in enumerate((EXAMPLE_TYPE, OTHER_EXAMPLE_TYPE)):
        annotations = {"org.opencontainers.conformance": f"hello conformance test {number}"}
        data.add_artifact(kind, f"artifact-{number}", annotations=annotations, subject=subject)


def add_artifact_of_an_index(data: PushedContent) -> None:
    subject = data.add_index("index")
    children = [data.add_artifact(EXAMPLE_TYPE), data.add_artifact(EXAMPLE_TYPE)]
    data.add_index("artifact", manifests=children, artifactType=EXAMPLE_TYPE, annotations={"a": "b"}, subject=subject)


def add_artifact_without_subject(data: PushedContent) -> None:
    subject = {"mediaType": OCI_MANIFEST, "digest": compute_digest(b"missing content"), "size": 123}
    data.add_artifact(EXAMPLE_TYPE, "artifact", subject=subject)


def add_embedded_content(data: PushedContent) -> None:
    config, layer = data.add_blob(b"{}", EMPTY_TYPE, data="e30="), data.add_layer()
    data.add_manifest(
        {"mediaType": OCI_MANIFEST, "artifactType": EXAMPLE_TYPE, "config": config, "layers": [layer]}, "data"
    )


def add_nondistributable(data: PushedContent) -> None:
    kind = "application/vnd.oci.image.layer.nondistributable.v1.tar"
    digests = [compute_digest(random_bytes(256, f"elsewhere-{number}")) for number in (1, 2)]
    foreign_layers = [
        {"mediaType": kind + end, "digest": digest, "size": 123456, "urls": [f"https://store.example.com/{digest}"]}
        for digest, end in zip(digests, ("+gzip", ""), strict=True)
    ]
    data.add_image("elsewhere", layers=[*foreign_layers, data.add_layer()])


CONTENT_CASES: dict[str, Callable[[PushedContent], object]] = {
    "image": lambda data: data.add_image("image"),
    "uncompressed": lambda data: data.add_image("image", layers=[data.add_layer(compressed=False)]),
    "large": add_large,
    "index": lambda data: data.add_index("index"),
    "nested-index": add_nested,
    "empty-index": lambda data: data.add_index("index", manifests=[]),
    "artifact": lambda data: data.add_artifact(EXAMPLE_TYPE, "artifact"),
    "artifact-index": lambda data: data.add_index(
        "index", manifests=[data.add_artifact(EXAMPLE_TYPE)], artifactType=EXAMPLE_TYPE
    ),
    "artifact-without-layers": lambda data: data.add_image(
        "a", layers=[data.add_blob(b"{}", EMPTY_TYPE)], artifactType=EXAMPLE_TYPE
    ),
    "artifacts-of-an-image": add_artifacts_of_an_image,
    "artifact-of-an-index": add_artifact_of_an_index,
    "artifact-of-nothing": add_artifact_without_subject,
    "content-in-descriptors": add_embedded_content,
    "elsewhere": add_nondistributable,
    "custom-fields": lambda data: data.add_index("index", **{"org.example.unknown": {"x": [1, None]}}),
    "no-layers": lambda data: data.add_image("image", layers=[]),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", CONTENT_CASES)
def test_push_and_pull_content(registry: ConformanceClient, repository: str, name: str, algorithm: str) -> None:
    """Push the content, list its tags, check HEAD, GET and referrers, and delete everything."""
    data = PushedContent(f"{name}-{algorithm}", algorithm)
    CONTENT_CASES[name](data)
    for blob, content in data.blobs.items():
        assert push_post_put(registry, repository, blob, content).status == 201
    push_manifests(registry, repository, data)
    check_tags(registry, repository, sorted(data.tags))
    for reference, digest in [*data.tags.items(), *((digest, digest) for digest in data.manifests)]:
        check_manifest(registry, repository, reference, digest, data.manifests[digest])
    for subject, referrers in data.expected_referrers.items():
        check_referrers(registry, repository, subject, referrers)
    delete_all(registry, repository, data)
    assert registry.request("GET", f"/v2/{repository}/tags/list").json["tags"] == []


def push_manifests(registry: ConformanceClient, repository: str, data: PushedContent) -> None:
    for digest, content in data.manifests.items():
        names = [tag for tag, tagged_digest in data.tags.items() if tagged_digest == digest]
        # A PUT by tag has a sha256 digest. Any other algorithm needs a PUT by digest, with the tags in ?tag=.
        targets = [digest, *names] if data.algorithm == "sha256" else ["&tag=".join([digest, *names])]
        for target in targets:
            media_type = json.loads(content)["mediaType"]
            path = f"/v2/{repository}/manifests/{target.replace('&', '?', 1)}"
            response = registry.request("PUT", path, content, {"Content-Type": media_type})
            assert (response.status, response.headers["docker-content-digest"]) == (201, digest), response
            assert registry.request("GET", registry.location_target(response), headers=ACCEPT).body == content
            subject = json.loads(content).get("subject")
            assert response.headers.get("oci-subject") == (subject and subject["digest"])
            if "?" in path:
                assert response.headers["oci-tag"] == ", ".join(names)


def check_tags(registry: ConformanceClient, repository: str, tags: list[str]) -> None:
    target = f"/v2/{repository}/tags/list"
    assert registry.request("GET", target).json == {"name": repository, "tags": tags}
    for count, tag in enumerate(tags, 1):
        assert registry.request("GET", f"{target}?last={tag}").json["tags"] == tags[count:]
    assert registry.request("GET", f"{target}?n=1").json["tags"] == tags[:1]
    assert registry.request("GET", f"{target}?n=0").json["tags"] == []


def check_manifest(registry: ConformanceClient, repository: str, reference: str, digest: str, content: bytes) -> None:
    for method, body in (("HEAD", b""), ("GET", content)):
        response = registry.request(method, f"/v2/{repository}/manifests/{reference}", headers=ACCEPT)
        assert (response.status, response.body) == (200, body)
        assert response.headers["docker-content-digest"] == digest
        assert response.headers["content-length"] == str(len(content))
        assert response.headers["content-type"] == json.loads(content)["mediaType"]


def check_referrers(registry: ConformanceClient, repository: str, subject: str, referrers: list[JSONObject]) -> None:
    target = f"/v2/{repository}/referrers/{subject}"
    artifact_types = {descriptor.get("artifactType") for descriptor in referrers}
    for artifact_type in (None, *artifact_types):
        response = registry.request("GET", f"{target}?artifactType={quote(artifact_type)}" if artifact_type else target)
        assert (response.status, response.headers["content-type"]) == (200, OCI_INDEX)
        assert (response.json["schemaVersion"], response.json["mediaType"]) == (2, OCI_INDEX)
        assert response.headers.get("oci-filters-applied") == (artifact_type and "artifactType")
        expected = [descriptor for descriptor in referrers if artifact_type in (None, descriptor.get("artifactType"))]
        assert sorted(response.json["manifests"], key=json.dumps) == sorted(expected, key=json.dumps)


def delete_all(registry: ConformanceClient, repository: str, data: PushedContent) -> None:
    for kind, names in (("manifests", [*data.tags, *reversed(data.manifests)]), ("blobs", [*data.blobs])):
        for name in names:
            target = f"/v2/{repository}/{kind}/{name}"
            assert registry.request("DELETE", target).status == 202
            assert registry.request("HEAD", target, headers=ACCEPT).status == 404


def test_manifest_with_wrong_digest(registry: ConformanceClient, repository: str) -> None:
    data = PushedContent("bad")
    digest = data.add_image()["digest"]
    for blob, content in data.blobs.items():
        assert push_post_put(registry, repository, blob, content).status == 201
    for reference in (digest, "sha256:baddigeststring"):
        target = f"/v2/{repository}/manifests/{reference}"
        response = registry.request("PUT", target, data.manifests[digest] + b"  ", {"Content-Type": OCI_MANIFEST})
        assert (response.status, response.error_code) == (400, "DIGEST_INVALID")
        assert registry.request("GET", target, headers=ACCEPT).status in (400, 404)


@pytest.mark.parametrize(
    "add_content", [lambda data: data.add_image("it"), lambda data: data.add_index("it")], ids=["image", "index"]
)
def test_manifest_with_missing_blobs(
    registry: ConformanceClient, repository: str, add_content: Callable[[PushedContent], JSONObject]
) -> None:
    data = PushedContent("lacking")
    digest = add_content(data)["digest"]
    content = data.manifests[digest]
    target, media_type = f"/v2/{repository}/manifests/it", json.loads(content)["mediaType"]
    response = registry.request("PUT", target, content, {"Content-Type": media_type})
    assert (response.status, response.error_code) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert registry.request("GET", target, headers=ACCEPT).status == 404


def test_missing_content(registry: ConformanceClient, repository: str) -> None:
    for reference in (compute_digest(b"not there"), "missing"):
        for method in ("HEAD", "GET", "DELETE"):
            assert registry.request(method, f"/v2/{repository}/manifests/{reference}", headers=ACCEPT).status == 404
    tags = registry.request("GET", f"/v2/{repository}/tags/list")
    assert (tags.status, tags.error_code) == (404, "NAME_UNKNOWN")
    check_referrers(registry, repository, compute_digest(b"not there"), [])


def test_version_check(registry: ConformanceClient) -> None:
    assert registry.request("GET", "/v2/").status == 200
