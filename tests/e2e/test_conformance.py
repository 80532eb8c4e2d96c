"""What the specification's own conformance suite asks of a registry (opencontainers/distribution-spec, `conformance/`).

The suite is a program in Go, which is not to be had everywhere. Its requests are few, and what makes them many is the
product of ways and data: so they are tables here, and each test does with one line of a table what the suite does.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import pytest
from attrs import Factory, define

from tests.e2e.house import wire
from tests.e2e.house.hosting import Hosting
from tests.e2e.house.images import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, noise
from tests.e2e.house.upstreams import Upstreams
from tests.e2e.house.wire import Answer

JSON = dict[str, Any]
OCTETS = {"Content-Type": "application/octet-stream"}
ACCEPT = {"Accept": f"{OCI_INDEX}, {OCI_MANIFEST}"}
EMPTY, EXAMPLE, OTHER_EXAMPLE = (
    "application/vnd.oci.empty.v1+json",
    "application/vnd.example.oci.conformance",
    "application/vnd.example.oci.conformance.other",
)
ALGORITHMS = ("sha256", "sha512")


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


class Registry:
    """The hosted registry, on a connection that stays open."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._connection = wire.Straight("127.0.0.1", ("127.0.0.1", port), None)

    def ask(
        self, method: str, target: str, body: bytes | None = None, fields: Mapping[str, str] | None = None
    ) -> Answer:
        """Send a request to `target`, a path or what a Location said."""
        self._connection.request(method, target, body, dict(fields or {}))
        return wire.read(self._connection.getresponse())

    def follow(self, answer: Answer) -> str:
        """Return the target that the answer's Location names."""
        parts = urlsplit(urljoin(self._base, answer.headers["location"]))
        return parts.path + (f"?{parts.query}" if parts.query else "")

    def begin(self, repository: str) -> str:
        begun = self.ask("POST", f"/v2/{repository}/blobs/uploads/")
        assert begun.status == 202, begun
        return self.follow(begun)

    def end(self, location: str, digest: str, body: bytes = b"", **fields: str) -> Answer:
        """Close an upload. `fields`: with underscores for dashes."""
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        join = "&" if "?" in location else "?"
        return self.ask("PUT", f"{location}{join}digest={digest}", body, OCTETS | named)

    def push(self, repository: str, data: bytes, algorithm: str = "sha256") -> str:
        digest = digest_of(data, algorithm)
        assert post_put(self, repository, digest, data).status == 201
        return digest


# The ways of a blob: each returns the answer that says whether it was taken.


def post_only(registry: Registry, repository: str, digest: str, data: bytes) -> Answer:
    return registry.ask("POST", f"/v2/{repository}/blobs/uploads/?digest={digest}", data, OCTETS)


def post_put(registry: Registry, repository: str, digest: str, data: bytes) -> Answer:
    return registry.end(registry.begin(repository), digest, data)


def stream(registry: Registry, repository: str, digest: str, data: bytes) -> Answer:
    patched = registry.ask("PATCH", registry.begin(repository), data, OCTETS)
    assert patched.status == 202
    return registry.end(registry.follow(patched), digest)


def chunked(
    registry: Registry, repository: str, digest: str, data: bytes, *, ends: bool = False, strays: bool = False
) -> Answer:
    """Send three chunks, the last with the PUT where that `ends` it; one that `strays` comes before each."""
    location, size = registry.begin(repository), len(data) // 3 + 1
    for start in range(0, len(data), size):
        if strays:
            location = stray(registry, location, digest, data, start, size, ends=ends)
        piece = data[start : start + size]
        field = f"{start}-{start + len(piece) - 1}"
        if ends and start + size >= len(data):
            return registry.end(location, digest, piece, Content_Range=field)
        patched = registry.ask("PATCH", location, piece, OCTETS | {"Content-Range": field})
        assert (patched.status, patched.headers["range"]) == (202, f"0-{start + len(piece) - 1}")
        location = registry.follow(patched)
    return registry.end(location, digest)


def stray(registry: Registry, location: str, digest: str, data: bytes, start: int, size: int, *, ends: bool) -> str:
    """Send a chunk that is not the next; return where to go on, as asking for the upload's state tells."""
    wrong = start + size if start + size < len(data) else 0
    piece = data[wrong : wrong + size]
    field = f"{wrong}-{wrong + len(piece) - 1}"
    if ends and wrong + size >= len(data):
        refused = registry.end(location, digest, piece, Content_Range=field)
    else:
        refused = registry.ask("PATCH", location, piece, OCTETS | {"Content-Range": field})
    assert refused.status == 416
    state = registry.ask("GET", location)
    assert (state.status, state.headers["range"]) == (204, f"0-{max(start - 1, 0)}")
    return registry.follow(state)


def chunked_put(registry: Registry, repository: str, digest: str, data: bytes) -> Answer:
    return chunked(registry, repository, digest, data, ends=True)


def strays(registry: Registry, repository: str, digest: str, data: bytes) -> Answer:
    return chunked(registry, repository, digest, data, strays=True)


def strays_put(registry: Registry, repository: str, digest: str, data: bytes) -> Answer:
    return chunked(registry, repository, digest, data, strays=True, ends=True)


def mounted(registry: Registry, repository: str, digest: str, data: bytes) -> Answer:
    assert post_put(registry, "conformance/other", digest, data).status == 201
    return registry.ask("POST", f"/v2/{repository}/blobs/uploads/?mount={digest}&from=conformance/other")


def mounted_from_anywhere(registry: Registry, repository: str, digest: str, data: bytes) -> Answer:
    assert post_put(registry, "conformance/other", digest, data).status == 201
    return registry.ask("POST", f"/v2/{repository}/blobs/uploads/?mount={digest}")


def mounted_in_vain(registry: Registry, repository: str, digest: str, data: bytes) -> Answer:
    begun = registry.ask("POST", f"/v2/{repository}/blobs/uploads/?mount={digest}&from=conformance/other")
    assert begun.status == 202
    return registry.end(registry.follow(begun), digest, data)


Way = Callable[[Registry, str, str, bytes], Answer]
MOUNTS: list[Way] = [mounted, mounted_from_anywhere, mounted_in_vain]
WAYS: list[Way] = [post_only, post_put, stream, chunked, chunked_put, strays, strays_put]
CHECKED: list[Way] = [post_only, post_put, stream, chunked, chunked_put]


@pytest.fixture(scope="module")
def registry(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    proxy = Hosting(tmp_path_factory.mktemp("conformance"), upstreams.settings)
    with proxy.running_for(lambda: upstreams.secrets):
        yield Registry(proxy.plain_port)


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    """Return a repository of the test's own."""
    return "conformance/" + hashlib.sha256(request.node.name.encode()).hexdigest()[:16]


def check_blob(registry: Registry, repository: str, digest: str, data: bytes) -> None:
    """Look for a blob, read it, delete it."""
    target = f"/v2/{repository}/blobs/{digest}"
    for method, body in (("HEAD", b""), ("GET", data)):
        answer = registry.ask(method, target)
        assert (answer.status, answer.body) == (200, body)
        assert answer.headers["content-length"] == str(len(data))
        assert answer.headers["docker-content-digest"] == digest
    assert registry.ask("DELETE", target).status == 202
    assert registry.ask("HEAD", target).status == 404
    assert registry.ask("DELETE", target).status == 404


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("way", [*WAYS, *MOUNTS], ids=lambda way: way.__name__)
def test_a_blob(registry: Registry, repository: str, way: Way, algorithm: str) -> None:
    data = noise(3000 - 5, f"{way.__name__}-{algorithm}")
    digest = digest_of(data, algorithm)
    assert registry.ask("GET", f"/v2/{repository}/blobs/{digest}").status == 404
    pushed = way(registry, repository, digest, data)
    assert (pushed.status, pushed.headers["docker-content-digest"]) == (201, digest)
    assert registry.ask("GET", registry.follow(pushed)).body == data
    check_blob(registry, repository, digest, data)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("way", CHECKED, ids=lambda way: way.__name__)
def test_a_blob_that_is_not_what_its_digest_says(registry: Registry, repository: str, way: Way, algorithm: str) -> None:
    data = noise(3000, f"bad-{way.__name__}-{algorithm}")
    digest = digest_of(data, algorithm)
    refused = way(registry, repository, digest, data + b"oh no")
    assert (refused.status, refused.error_code) == (400, "DIGEST_INVALID")
    assert registry.ask("GET", f"/v2/{repository}/blobs/{digest}").status == 404


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("data", [b"", b"{}"], ids=["empty", "empty-json"])
def test_a_blob_that_is_well_known(registry: Registry, repository: str, data: bytes, way: Way, algorithm: str) -> None:
    digest = digest_of(data, algorithm)
    assert way(registry, repository, digest, data).status == 201
    check_blob(registry, repository, digest, data)


def test_an_upload_that_is_cancelled(registry: Registry, repository: str) -> None:
    location = registry.begin(repository)
    assert registry.ask("DELETE", location).status == 204
    for method in ("GET", "PATCH", "DELETE"):
        assert registry.ask(method, location).status == 404


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("500-1499", 500, 1500),
        ("500-", 500, 2048),
        ("-500", 1548, 2048),
        ("2000-5000", 2000, 2048),
        ("500-0", 0, 0),
        ("5000-10000", 0, 0),
    ],
)
def test_a_part_of_a_blob(
    registry: Registry, repository: str, asked: str, start: int, end: int, algorithm: str
) -> None:
    data = noise(2048, f"range-{algorithm}")
    digest = registry.push(repository, data, algorithm)
    answer = registry.ask("GET", f"/v2/{repository}/blobs/{digest}", fields={"Range": f"bytes={asked}"})
    if not end:
        assert answer.status == 416
        return
    assert (answer.status, answer.body) == (206, data[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/2048"
    assert answer.headers["content-length"] == str(end - start)


@define
class Data:
    """What is pushed together; `referrers` is what has to be told of each subject."""

    seed: str
    algorithm: str = "sha256"
    blobs: dict[str, bytes] = Factory(dict)
    manifests: dict[str, bytes] = Factory(dict)
    tags: dict[str, str] = Factory(dict)
    referrers: dict[str, list[JSON]] = Factory(dict)

    def blob(self, content: bytes, media_type: str, **more: Any) -> JSON:
        digest = digest_of(content, self.algorithm)
        self.blobs[digest] = content
        return {"mediaType": media_type, "digest": digest, "size": len(content), **more}

    def layer(self, *, packed: bool = True, media_type: str | None = None) -> JSON:
        data = noise(2000, f"{self.seed}/{len(self.blobs)}")
        usual = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if packed else "")
        return self.blob(gzip.compress(data, mtime=0) if packed else data, media_type or usual)

    def image(self, tag: str | None = None, *, layers: list[JSON] | None = None, **more: Any) -> JSON:
        layers = [self.layer(), self.layer()] if layers is None else layers
        text = {"architecture": "amd64", "os": "linux", "seed": self.seed, "n": len(self.blobs)}
        config = self.blob(json.dumps(text).encode(), OCI_CONFIG)
        return self.manifest({"mediaType": OCI_MANIFEST, "config": config, "layers": layers, **more}, tag)

    def artifact(self, artifact_type: str, tag: str | None = None, **more: Any) -> JSON:
        content = {"config": self.blob(b"{}", EMPTY), "layers": [self.layer(media_type=artifact_type)]}
        return self.manifest({"mediaType": OCI_MANIFEST, "artifactType": artifact_type, **content, **more}, tag)

    def index(self, tag: str | None = None, *, of: list[JSON] | None = None, **more: Any) -> JSON:
        if of is None:
            of = [self.image() | {"platform": {"os": "linux", "architecture": name}} for name in ("amd64", "arm64")]
        return self.manifest({"mediaType": OCI_INDEX, "manifests": of, **more}, tag)

    def manifest(self, content: JSON, tag: str | None) -> JSON:
        data = json.dumps({"schemaVersion": 2, **content}).encode()
        digest = digest_of(data, self.algorithm)
        self.manifests[digest] = data
        if tag is not None:
            self.tags[tag] = digest
        described: JSON = {"mediaType": content["mediaType"], "digest": digest, "size": len(data)}
        if "subject" in content:
            told = dict(described)
            artifact_type = content.get("artifactType") or content.get("config", {}).get("mediaType")
            if artifact_type:
                told["artifactType"] = artifact_type
            if "annotations" in content:
                told["annotations"] = content["annotations"]
            self.referrers.setdefault(content["subject"]["digest"], []).append(told)
        return described


def large(data: Data) -> None:
    data.image("large", annotations={f"large-annotation-{number}": "A" * 10_000 for number in range(390)})


def nested(data: Data) -> None:
    data.index("nested", of=[data.index(), data.index()])


def artifacts_of_an_image(data: Data) -> None:
    subject = data.image("image")
    data.image(subject=subject)
    for number, kind in enumerate((EXAMPLE, OTHER_EXAMPLE)):
        annotations = {"org.opencontainers.conformance": f"hello conformance test {number}"}
        data.artifact(kind, f"artifact-{number}", annotations=annotations, subject=subject)


def artifact_of_an_index(data: Data) -> None:
    subject = data.index("index")
    children = [data.artifact(EXAMPLE), data.artifact(EXAMPLE)]
    data.index("artifact", of=children, artifactType=EXAMPLE, annotations={"a": "b"}, subject=subject)


def artifact_of_nothing(data: Data) -> None:
    subject = {"mediaType": OCI_MANIFEST, "digest": digest_of(b"missing content"), "size": 123}
    data.artifact(EXAMPLE, "artifact", subject=subject)


def content_in_descriptors(data: Data) -> None:
    config, layer = data.blob(b"{}", EMPTY, data="e30="), data.layer()
    data.manifest({"mediaType": OCI_MANIFEST, "artifactType": EXAMPLE, "config": config, "layers": [layer]}, "data")


def elsewhere(data: Data) -> None:
    kind = "application/vnd.oci.image.layer.nondistributable.v1.tar"
    digests = [digest_of(noise(256, f"elsewhere-{number}")) for number in (1, 2)]
    away = [
        {"mediaType": kind + end, "digest": digest, "size": 123456, "urls": [f"https://store.example.com/{digest}"]}
        for digest, end in zip(digests, ("+gzip", ""), strict=True)
    ]
    data.image("elsewhere", layers=[*away, data.layer()])


DATA: dict[str, Callable[[Data], object]] = {
    "image": lambda data: data.image("image"),
    "uncompressed": lambda data: data.image("image", layers=[data.layer(packed=False)]),
    "large": large,
    "index": lambda data: data.index("index"),
    "nested-index": nested,
    "empty-index": lambda data: data.index("index", of=[]),
    "artifact": lambda data: data.artifact(EXAMPLE, "artifact"),
    "artifact-index": lambda data: data.index("index", of=[data.artifact(EXAMPLE)], artifactType=EXAMPLE),
    "artifact-without-layers": lambda data: data.image("a", layers=[data.blob(b"{}", EMPTY)], artifactType=EXAMPLE),
    "artifacts-of-an-image": artifacts_of_an_image,
    "artifact-of-an-index": artifact_of_an_index,
    "artifact-of-nothing": artifact_of_nothing,
    "content-in-descriptors": content_in_descriptors,
    "elsewhere": elsewhere,
    "custom-fields": lambda data: data.index("index", **{"org.example.unknown": {"x": [1, None]}}),
    "no-layers": lambda data: data.image("image", layers=[]),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", DATA)
def test_content(registry: Registry, repository: str, name: str, algorithm: str) -> None:
    """Push, list, look for, pull, ask for referrers, delete."""
    data = Data(f"{name}-{algorithm}", algorithm)
    DATA[name](data)
    for blob, content in data.blobs.items():
        assert post_put(registry, repository, blob, content).status == 201
    push_manifests(registry, repository, data)
    check_tags(registry, repository, sorted(data.tags))
    for reference, digest in [*data.tags.items(), *((digest, digest) for digest in data.manifests)]:
        check_manifest(registry, repository, reference, digest, data.manifests[digest])
    for subject, told in data.referrers.items():
        check_referrers(registry, repository, subject, told)
    delete(registry, repository, data)
    assert registry.ask("GET", f"/v2/{repository}/tags/list").json["tags"] == []


def push_manifests(registry: Registry, repository: str, data: Data) -> None:
    for digest, content in data.manifests.items():
        names = [tag for tag, meant in data.tags.items() if meant == digest]
        # A tag by itself makes a sha256 of what it is given; another algorithm's needs the digest, and ?tag= for tags.
        targets = [digest, *names] if data.algorithm == "sha256" else ["&tag=".join([digest, *names])]
        for target in targets:
            kind = json.loads(content)["mediaType"]
            path = f"/v2/{repository}/manifests/{target.replace('&', '?', 1)}"
            pushed = registry.ask("PUT", path, content, {"Content-Type": kind})
            assert (pushed.status, pushed.headers["docker-content-digest"]) == (201, digest), pushed
            assert registry.ask("GET", registry.follow(pushed), fields=ACCEPT).body == content
            subject = json.loads(content).get("subject")
            assert pushed.headers.get("oci-subject") == (subject and subject["digest"])
            if "?" in path:
                assert pushed.headers["oci-tag"] == ", ".join(names)


def check_tags(registry: Registry, repository: str, tags: list[str]) -> None:
    target = f"/v2/{repository}/tags/list"
    assert registry.ask("GET", target).json == {"name": repository, "tags": tags}
    for count, tag in enumerate(tags, 1):
        assert registry.ask("GET", f"{target}?last={tag}").json["tags"] == tags[count:]
    assert registry.ask("GET", f"{target}?n=1").json["tags"] == tags[:1]
    assert registry.ask("GET", f"{target}?n=0").json["tags"] == []


def check_manifest(registry: Registry, repository: str, reference: str, digest: str, content: bytes) -> None:
    for method, body in (("HEAD", b""), ("GET", content)):
        answer = registry.ask(method, f"/v2/{repository}/manifests/{reference}", fields=ACCEPT)
        assert (answer.status, answer.body) == (200, body)
        assert answer.headers["docker-content-digest"] == digest
        assert answer.headers["content-length"] == str(len(content))
        assert answer.headers["content-type"] == json.loads(content)["mediaType"]


def check_referrers(registry: Registry, repository: str, subject: str, told: list[JSON]) -> None:
    target = f"/v2/{repository}/referrers/{subject}"
    kinds = {descriptor.get("artifactType") for descriptor in told}
    for kind in (None, *kinds):
        answer = registry.ask("GET", f"{target}?artifactType={quote(kind)}" if kind else target)
        assert (answer.status, answer.headers["content-type"]) == (200, OCI_INDEX)
        assert (answer.json["schemaVersion"], answer.json["mediaType"]) == (2, OCI_INDEX)
        assert answer.headers.get("oci-filters-applied") == (kind and "artifactType")
        wanted = [descriptor for descriptor in told if kind in (None, descriptor.get("artifactType"))]
        assert sorted(answer.json["manifests"], key=json.dumps) == sorted(wanted, key=json.dumps)


def delete(registry: Registry, repository: str, data: Data) -> None:
    for kind, names in (("manifests", [*data.tags, *reversed(data.manifests)]), ("blobs", [*data.blobs])):
        for name in names:
            target = f"/v2/{repository}/{kind}/{name}"
            assert registry.ask("DELETE", target).status == 202
            assert registry.ask("HEAD", target, fields=ACCEPT).status == 404


def test_a_manifest_that_is_not_what_its_digest_says(registry: Registry, repository: str) -> None:
    data = Data("bad")
    digest = data.image()["digest"]
    for blob, content in data.blobs.items():
        assert post_put(registry, repository, blob, content).status == 201
    for reference in (digest, "sha256:baddigeststring"):
        target = f"/v2/{repository}/manifests/{reference}"
        refused = registry.ask("PUT", target, data.manifests[digest] + b"  ", {"Content-Type": OCI_MANIFEST})
        assert (refused.status, refused.error_code) == (400, "DIGEST_INVALID")
        assert registry.ask("GET", target, fields=ACCEPT).status in (400, 404)


@pytest.mark.parametrize("make", [lambda data: data.image("it"), lambda data: data.index("it")], ids=["image", "index"])
def test_a_manifest_that_lacks_what_it_needs(registry: Registry, repository: str, make: Callable[[Data], JSON]) -> None:
    data = Data("lacking")
    digest = make(data)["digest"]
    content = data.manifests[digest]
    target, kind = f"/v2/{repository}/manifests/it", json.loads(content)["mediaType"]
    refused = registry.ask("PUT", target, content, {"Content-Type": kind})
    assert (refused.status, refused.error_code) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert registry.ask("GET", target, fields=ACCEPT).status == 404


def test_what_is_not_there(registry: Registry, repository: str) -> None:
    for reference in (digest_of(b"not there"), "missing"):
        for method in ("HEAD", "GET", "DELETE"):
            assert registry.ask(method, f"/v2/{repository}/manifests/{reference}", fields=ACCEPT).status == 404
    tags = registry.ask("GET", f"/v2/{repository}/tags/list")
    assert (tags.status, tags.error_code) == (404, "NAME_UNKNOWN")
    check_referrers(registry, repository, digest_of(b"not there"), [])


def test_the_ping(registry: Registry) -> None:
    assert registry.ask("GET", "/v2/").status == 200
