"""The hosted registry over HTTP, on a real disk; threads run at once, so that a test sees what came of a request."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import define
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from dockerproxy.oci.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    fallback_tag,
)
from dockerproxy.oci.names import Digest
from dockerproxy.registry import hosted as module
from dockerproxy.registry import push_manifests
from dockerproxy.registry.face import Face
from dockerproxy.registry.guard import Open
from dockerproxy.registry.hosted import Hosted
from dockerproxy.registry.own import Own
from dockerproxy.registry.push import Push
from dockerproxy.store.hosted_store import HostedStore
from dockerproxy.store.layout import Layout
from dockerproxy.store.referrers import Referrers

JSON = dict[str, Any]
NAME = "some/where"
HOUR = 3600.0


class Reactor(Clock):
    """A clock, and threads whose work is done at once."""

    def getThreadPool(self) -> Reactor:
        return self

    def callInThreadWithCallback(self, done: Any, function: Any, *args: Any, **kwargs: Any) -> None:
        try:
            result = function(*args, **kwargs)
        except Exception:
            done(False, Failure())
        else:
            done(True, result)

    def callFromThread(self, function: Any, *args: Any) -> None:
        function(*args)


@define
class Registry:
    """The hosted registry, and a client of it."""

    store: HostedStore
    visitor: Any
    connect: Callable[[], Any]

    def ask(self, method: str, target: str, body: bytes | None = None, **fields: str) -> Any:
        if self.visitor.transport.closed or self.visitor.transport.disconnecting:
            self.visitor = self.connect()
        given = [(name.replace("_", "-"), value) for name, value in fields.items()]
        return self.visitor.ask(method, target, given, body)

    def push_blob(self, data: bytes, name: str = NAME, algorithm: str = "sha256") -> Digest:
        digest = Digest.of(data, algorithm)
        answer = self.ask("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", data)
        assert answer.status == 201, answer
        return digest

    def push(self, document: JSON, reference: str = "", name: str = NAME, *, media_type: str = "") -> Digest:
        content = json.dumps(document).encode()
        digest = Digest.of(content)
        told = media_type or document["mediaType"]
        answer = self.ask("PUT", f"/v2/{name}/manifests/{reference or digest}", content, Content_Type=told)
        assert answer.status == 201, answer
        return digest

    def image(self, tag: str = "", name: str = NAME, seed: str = "", **more: Any) -> Digest:
        config, layer = f"config {seed}".encode(), f"layer {seed}".encode()
        return self.push(
            image(*(described(self.push_blob(blob, name), blob) for blob in (config, layer)), **more), tag, name
        )

    def begin(self, query: str = "", name: str = NAME) -> str:
        answer = self.ask("POST", f"/v2/{name}/blobs/uploads/{query}")
        assert (answer.status, answer.headers["Range"]) == (202, "0-0")
        return str(answer.headers["Location"])

    def referrers(self, subject: Digest, query: str = "", name: str = NAME) -> list[str]:
        answer = self.ask("GET", f"/v2/{name}/referrers/{subject}{query}")
        assert (answer.status, answer.headers["Content-Type"]) == (200, OCI_INDEX)
        document = json.loads(answer.body)
        assert (document["schemaVersion"], document["mediaType"]) == (2, OCI_INDEX)
        return [descriptor["digest"] for descriptor in document["manifests"]]


def described(digest: Digest, content: bytes, media_type: str = "application/vnd.test", **more: Any) -> JSON:
    return {"mediaType": media_type, "digest": str(digest), "size": len(content), **more}


def image(config: JSON, *layers: JSON, **more: Any) -> JSON:
    return {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": list(layers), **more}


def code(answer: Any) -> tuple[int, str]:
    return answer.status, json.loads(answer.body)["errors"][0]["code"]


@pytest.fixture
def registry(tmp_path: Path, visit: Any) -> Registry:
    reactor = Reactor()
    store = HostedStore.from_layout(Layout(tmp_path))
    own = Own(Face(reactor), Hosted(reactor, store, Push(reactor, store)), Open())

    def connect() -> Any:
        return visit(own.answer, clock=reactor)

    return Registry(store, connect(), connect)


# uploads


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_blob_in_one_request(registry: Registry, algorithm: str) -> None:
    digest = Digest.of(b"data", algorithm)
    answer = registry.ask("POST", f"/v2/{NAME}/blobs/uploads/?digest={digest}", b"data")
    assert answer.status == 201
    assert answer.headers["Location"] == f"/v2/{NAME}/blobs/{digest}"
    assert answer.headers["Docker-Content-Digest"] == str(digest)
    assert registry.ask("GET", f"/v2/{NAME}/blobs/{digest}").body == b"data"
    assert os.listdir(registry.store.layout.uploads(NAME)) == []


@pytest.mark.parametrize("query", ["", "?digest-algorithm=sha512"])
def test_a_blob_in_chunks(registry: Registry, query: str) -> None:
    location = registry.begin(query)
    for start, chunk in ((0, b"first "), (6, b"second ")):
        answer = registry.ask("PATCH", location, chunk, Content_Range=f"{start}-{start + len(chunk) - 1}")
        assert (answer.status, answer.headers["Range"]) == (202, f"0-{start + len(chunk) - 1}")
        location = answer.headers["Location"]
    told = registry.ask("GET", location)
    assert (told.status, told.headers["Range"], told.headers["Location"]) == (204, "0-12", location)
    digest = Digest.of(b"first second third", "sha512" if query else "sha256")
    answer = registry.ask("PUT", f"{location}?digest={digest}", b"third", Content_Range="13-17")
    assert (answer.status, answer.headers["Location"]) == (201, f"/v2/{NAME}/blobs/{digest}")
    assert registry.ask("GET", f"/v2/{NAME}/blobs/{digest}").body == b"first second third"
    assert code(registry.ask("GET", location)) == (404, "BLOB_UPLOAD_UNKNOWN")


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
@pytest.mark.parametrize("field", ["0-3", "3-6", "5-8", "100-103", "4-3"])
def test_a_chunk_out_of_order(registry: Registry, method: str, field: str) -> None:
    location = registry.begin()
    assert registry.ask("PATCH", location, b"1234").status == 202
    target = f"{location}?digest={Digest.of(b'12345678')}" if method == "PUT" else location
    answer = registry.ask(method, target, b"5678", Content_Range=field)
    assert code(answer) == (416, "RANGE_INVALID")
    assert (answer.headers["Range"], answer.headers["Location"]) == ("0-3", location)
    assert registry.ask("GET", location).headers["Range"] == "0-3"
    assert registry.ask("PUT", f"{location}?digest={Digest.of(b'12345678')}", b"5678").status == 201


@pytest.mark.parametrize("field", ["bytes 0-3", "x", "0-4"])
def test_a_chunk_that_contradicts_itself(registry: Registry, field: str) -> None:
    location = registry.begin()
    assert code(registry.ask("PATCH", location, b"1234", Content_Range=field)) == (400, "BLOB_UPLOAD_INVALID")
    assert registry.store.uploads.size(NAME, location.rpartition("/")[2]) == 0


def test_a_chunk_of_another_length_than_it_said_is_taken_back(registry: Registry) -> None:
    location = registry.begin()
    registry.ask("PATCH", location, b"good")
    fields = {"Content_Range": "4-9", "Transfer_Encoding": "chunked"}
    assert code(registry.ask("PATCH", location, b"3\r\nbad\r\n0\r\n\r\n", **fields)) == (400, "BLOB_UPLOAD_INVALID")
    assert registry.ask("PUT", f"{location}?digest={Digest.of(b'goodbye')}", b"bye").status == 201


def test_what_arrived_before_a_drop_counts(registry: Registry) -> None:
    location = registry.begin()
    registry.visitor.send(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nsome of it".encode())
    busy = registry.connect().ask("PATCH", location, (), b"x")
    assert code(busy) == (409, "BLOB_UPLOAD_INVALID")
    # It waits to be written with what comes next, and is not told of before.
    assert registry.connect().ask("HEAD", location).headers["Range"] == "0-0"
    registry.visitor.disconnect()
    assert registry.ask("GET", location).headers["Range"] == "0-9"
    digest = Digest.of(b"some of it and the rest")
    assert registry.ask("PUT", f"{location}?digest={digest}", b" and the rest", Content_Range="10-22").status == 201


def test_a_drop_in_a_single_post_leaves_nothing(registry: Registry) -> None:
    digest = Digest.of(b"never whole")
    head = f"POST /v2/{NAME}/blobs/uploads/?digest={digest} HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n"
    registry.visitor.send(head.encode() + b"never")
    assert len(os.listdir(registry.store.layout.uploads(NAME))) == 1
    registry.visitor.disconnect()
    assert os.listdir(registry.store.layout.uploads(NAME)) == []


@pytest.mark.parametrize("how", ["post", "put", "patch"])
def test_content_that_is_not_the_digests(registry: Registry, how: str) -> None:
    wrong = Digest.of(b"another")
    if how == "post":
        answer = registry.ask("POST", f"/v2/{NAME}/blobs/uploads/?digest={wrong}", b"data")
    else:
        location = registry.begin()
        if how == "patch":
            registry.ask("PATCH", location, b"data")
        answer = registry.ask("PUT", f"{location}?digest={wrong}", b"data" if how == "put" else b"")
    assert code(answer) == (400, "DIGEST_INVALID")
    assert os.listdir(registry.store.layout.uploads(NAME)) == []
    assert not registry.store.blobs.exists(wrong)
    assert not registry.store.links.has_layer(NAME, wrong)


@pytest.mark.parametrize("query", ["", "?digest=", "?digest=sha256:abc", "?digest=md5:" + "0" * 32])
def test_the_end_of_an_upload_needs_a_digest(registry: Registry, query: str) -> None:
    location = registry.begin()
    assert code(registry.ask("PUT", location + query, b"data")) == (400, "DIGEST_INVALID")
    assert registry.ask("GET", location).status == 204


def test_cancel(registry: Registry) -> None:
    location = registry.begin()
    assert registry.ask("DELETE", location).status == 204
    for method in ("GET", "HEAD", "PATCH", "DELETE"):
        assert registry.ask(method, location).status == 404


def test_sessions_that_are_none(registry: Registry) -> None:
    location = registry.begin()
    elsewhere = location.replace(NAME, "other/place")
    for target in (elsewhere, f"/v2/{NAME}/blobs/uploads/none", location[:-1] + "~"):
        assert code(registry.ask("PATCH", target, b"x")) == (404, "BLOB_UPLOAD_UNKNOWN")


def test_an_unregistered_algorithm(registry: Registry) -> None:
    assert code(registry.ask("POST", f"/v2/{NAME}/blobs/uploads/?digest-algorithm=md5")) == (400, "DIGEST_INVALID")


@pytest.mark.parametrize("where", ["append", "publish"])
def test_a_full_disk(registry: Registry, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The real thing is in tests/e2e; here each step of it meets the end of the disk."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    location = registry.begin()
    target, method = {"append": ("os.pwritev", "PATCH"), "publish": ("os.rename", "PUT")}[where]
    query = f"?digest={Digest.of(b'data')}" if method == "PUT" else ""
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        answer = registry.ask(method, location + query, b"data")
    assert answer.status == 507
    assert registry.ask("GET", location).status == 404
    assert registry.ask("HEAD", f"/v2/{NAME}/blobs/{Digest.of(b'data')}").status == 404
    assert os.listdir(registry.store.layout.uploads(NAME)) == []


def test_a_directory_that_may_not_be_written_to(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `registry:2` ran as another user. The client learns what it is, and our log which file."""

    def denied(path: str, *args: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", denied)
        patch.setattr("dockerproxy.registry.push.log.error", lambda form, **fields: told.append(form.format(**fields)))
        answer = registry.ask("POST", f"/v2/{NAME}/blobs/uploads/")
    assert code(answer) == (500, "UNKNOWN")
    message = json.loads(answer.body)["errors"][0]["message"]
    assert "Permission denied" in message
    assert str(registry.store.layout.root) not in message
    assert str(registry.store.layout.root) in told[0]


# mounts


def test_mount(registry: Registry) -> None:
    digest = registry.push_blob(b"shared", "from/here")
    answer = registry.ask("POST", f"/v2/{NAME}/blobs/uploads/?mount={digest}&from=from/here")
    assert (answer.status, answer.headers["Location"]) == (201, f"/v2/{NAME}/blobs/{digest}")
    assert registry.ask("GET", f"/v2/{NAME}/blobs/{digest}").body == b"shared"
    assert registry.ask("POST", f"/v2/third/blobs/uploads/?mount={digest}").status == 201
    assert registry.ask("HEAD", f"/v2/third/blobs/{digest}").status == 200


@pytest.mark.parametrize("source", ["", "&from=not/there", "&from=from/here"])
def test_a_mount_that_cannot_be_is_an_upload(registry: Registry, source: str) -> None:
    digest = registry.push_blob(b"shared", "other/place")
    registry.store.links.unlink_layer("other/place", digest)
    registry.push_blob(b"another", "from/here")
    location = registry.begin(f"?mount={digest}{source}")
    assert registry.ask("HEAD", f"/v2/{NAME}/blobs/{digest}").status == 404
    assert registry.ask("PUT", f"{location}?digest={digest}", b"shared").status == 201


def test_a_mount_of_no_digest_or_from_no_name(registry: Registry) -> None:
    assert code(registry.ask("POST", f"/v2/{NAME}/blobs/uploads/?mount=x&from=a")) == (400, "DIGEST_INVALID")
    digest = registry.push_blob(b"shared", "from/here")
    answer = registry.ask("POST", f"/v2/{NAME}/blobs/uploads/?mount={digest}&from=../x")
    assert code(answer) == (400, "NAME_INVALID")


# blobs


def test_a_blob_is_its_repositorys(registry: Registry) -> None:
    digest = registry.push_blob(b"mine", "mine/only")
    registry.push_blob(b"other")
    for method in ("GET", "HEAD", "DELETE"):
        assert registry.ask(method, f"/v2/{NAME}/blobs/{digest}").status == 404
    assert code(registry.ask("GET", f"/v2/{NAME}/blobs/{digest}")) == (404, "BLOB_UNKNOWN")
    assert code(registry.ask("GET", f"/v2/no/such/blobs/{digest}")) == (404, "NAME_UNKNOWN")


def test_delete_a_blob(registry: Registry) -> None:
    digest = registry.push_blob(b"data")
    registry.push_blob(b"data", "other/place")
    assert registry.ask("DELETE", f"/v2/{NAME}/blobs/{digest}").status == 202
    assert code(registry.ask("GET", f"/v2/{NAME}/blobs/{digest}")) == (404, "BLOB_UNKNOWN")
    assert code(registry.ask("DELETE", f"/v2/{NAME}/blobs/{digest}")) == (404, "BLOB_UNKNOWN")
    assert registry.ask("GET", f"/v2/other/place/blobs/{digest}").body == b"data"


def test_a_part_of_a_blob(registry: Registry) -> None:
    digest = registry.push_blob(b"0123456789")
    answer = registry.ask("GET", f"/v2/{NAME}/blobs/{digest}", Range="bytes=2-4")
    assert (answer.status, answer.body, answer.headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    assert "X-Cache" not in answer.headers


def aged(registry: Registry, digest: Digest) -> Path:
    """Make a content old enough to be swept, and return its file."""
    path = Path(registry.store.layout.blob(digest))
    os.utime(path, (1000, 1000))
    return path


@pytest.mark.parametrize("how", ["HEAD", "GET", "mount", "upload", "manifest", "child", "subject", "again"])
def test_what_a_push_counts_on_is_used_now(registry: Registry, how: str) -> None:
    """Garbage collection leaves alone what was used within the hour."""
    is_manifest = how in ("child", "subject", "again")
    digest = registry.image(seed="x") if is_manifest else registry.push_blob(b"config x")
    registry.push_blob(b"layer x")
    path = aged(registry, digest)
    if how in ("HEAD", "GET"):
        registry.ask(how, f"/v2/{NAME}/blobs/{digest}")
    elif how == "mount":
        registry.ask("POST", f"/v2/other/blobs/uploads/?mount={digest}&from={NAME}")
    elif how == "upload":
        registry.push_blob(b"config x")
    elif how == "manifest":
        registry.push(image(described(digest, b"config x"), described(Digest.of(b"layer x"), b"layer x")))
    elif how == "child":
        size = path.stat().st_size
        child = {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": size}
        registry.push({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [child]}, "list")
    elif how == "subject":
        registry.image(seed="signature", subject=subject_of(digest))
    else:
        registry.image("again", seed="x")
    assert path.stat().st_mtime > 10 * HOUR


# manifests


def test_push_and_pull_by_tag_and_digest(registry: Registry) -> None:
    digest = registry.image("v1.2.3.4")
    for reference in ("v1.2.3.4", str(digest)):
        for method in ("GET", "HEAD"):
            answer = registry.ask(method, f"/v2/{NAME}/manifests/{reference}")
            assert answer.status == 200
            assert answer.headers["Content-Type"] == OCI_MANIFEST
            assert answer.headers["Docker-Content-Digest"] == str(digest)
            assert Digest.of(answer.body) == digest or method == "HEAD"
    assert code(registry.ask("GET", f"/v2/{NAME}/manifests/none")) == (404, "MANIFEST_UNKNOWN")
    assert code(registry.ask("GET", f"/v2/no/such/manifests/{digest}")) == (404, "NAME_UNKNOWN")
    assert code(registry.ask("GET", f"/v2/no/such/manifests/{digest}".replace("sha256", "sha257")))[0] == 400


def test_the_answer_to_a_push(registry: Registry) -> None:
    content = json.dumps(image(described(registry.push_blob(b"c"), b"c"))).encode()
    answer = registry.ask("PUT", f"/v2/{NAME}/manifests/latest", content, Content_Type=OCI_MANIFEST + "; charset=utf-8")
    digest = Digest.of(content)
    assert (answer.status, answer.headers["Docker-Content-Digest"]) == (201, str(digest))
    assert answer.headers["Location"] == f"/v2/{NAME}/manifests/{digest}"
    assert "OCI-Subject" not in answer.headers
    assert registry.ask("GET", f"/v2/{NAME}/manifests/latest").headers["Content-Type"] == OCI_MANIFEST


def test_sha512_and_further_tags(registry: Registry) -> None:
    content = json.dumps(image(described(registry.push_blob(b"c", algorithm="sha512"), b"c"))).encode()
    digest = Digest.of(content, "sha512")
    tags = [f"t{number}" for number in range(12)]
    query = "&".join(f"tag={tag}" for tag in tags)
    answer = registry.ask("PUT", f"/v2/{NAME}/manifests/{digest}?{query}", content, Content_Type=OCI_MANIFEST)
    assert (answer.status, answer.headers["OCI-Tag"]) == (201, ", ".join(tags))
    for tag in tags:
        assert registry.ask("GET", f"/v2/{NAME}/manifests/{tag}").headers["Docker-Content-Digest"] == str(digest)
    bad = registry.ask("PUT", f"/v2/{NAME}/manifests/{digest}?tag=-x", content, Content_Type=OCI_MANIFEST)
    assert code(bad) == (400, "NAME_INVALID")


def test_a_digest_that_is_not_the_manifests(registry: Registry) -> None:
    content = json.dumps(image(described(registry.push_blob(b"c"), b"c"))).encode()
    answer = registry.ask("PUT", f"/v2/{NAME}/manifests/{Digest.of(b'x')}", content, Content_Type=OCI_MANIFEST)
    assert code(answer) == (400, "DIGEST_INVALID")


@pytest.mark.parametrize("size", [MAX_MANIFEST, MAX_MANIFEST + 1])
def test_how_long_a_manifest_may_be(registry: Registry, size: int) -> None:
    document = image(described(registry.push_blob(b"c"), b"c"), annotations={"a": ""})
    document["annotations"]["a"] = "x" * (size - len(json.dumps(document)))
    content = json.dumps(document).encode()
    assert len(content) == size
    answer = registry.ask("PUT", f"/v2/{NAME}/manifests/big", content, Content_Type=OCI_MANIFEST)
    if size <= MAX_MANIFEST:
        assert answer.status == 201
        assert registry.ask("GET", f"/v2/{NAME}/manifests/big").body == content
    else:
        assert code(answer) == (413, "SIZE_INVALID")


@pytest.mark.parametrize("media_type", ["application/vnd.unheard.of.v7+json", "text/plain", "application/x"])
def test_types_that_nobody_knows(registry: Registry, media_type: str) -> None:
    content = b"\x00 not even JSON"
    answer = registry.ask("PUT", f"/v2/{NAME}/manifests/odd", content, Content_Type=media_type)
    assert answer.status == 201
    got = registry.ask("GET", f"/v2/{NAME}/manifests/odd")
    assert (got.body, got.headers["Content-Type"]) == (content, media_type)


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"[]", b"{}", b'{"schemaVersion":2,"layers":[]}', b'{"manifests":[],"layers":[]}'],
)
@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST, "", "no media type"])
def test_what_is_no_manifest(registry: Registry, content: bytes, media_type: str) -> None:
    fields = {"Content_Type": media_type} if media_type else {}
    answer = registry.ask("PUT", f"/v2/{NAME}/manifests/bad", content, **fields)
    assert code(answer) == (400, "MANIFEST_INVALID")
    assert registry.ask("GET", f"/v2/{NAME}/manifests/bad").status == 404


def test_a_manifest_without_a_content_type(registry: Registry) -> None:
    content = json.dumps(image(described(registry.push_blob(b"c"), b"c"))).encode()
    assert registry.ask("PUT", f"/v2/{NAME}/manifests/1", content).status == 201
    assert registry.ask("GET", f"/v2/{NAME}/manifests/1").headers["Content-Type"] == OCI_MANIFEST


@pytest.mark.parametrize("missing", ["config", "layer", "child", "swept"])
def test_what_a_manifest_needs_has_to_be_there(registry: Registry, missing: str) -> None:
    here, gone = described(registry.push_blob(b"c"), b"c"), described(Digest.of(b"gone"), b"gone")
    registry.push_blob(b"gone", "other/place")  # which is not enough
    if missing == "swept":
        registry.push_blob(b"gone")
        registry.store.blobs.remove(Digest.of(b"gone"))
    document = {
        "config": image(gone),
        "layer": image(here, here, gone),
        "swept": image(here, gone),
        "child": {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [gone]},
    }[missing]
    content = json.dumps(document).encode()
    answer = registry.ask("PUT", f"/v2/{NAME}/manifests/1", content, Content_Type=document["mediaType"])
    assert code(answer) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert gone["digest"] in json.loads(answer.body)["errors"][0]["message"]
    assert registry.ask("GET", f"/v2/{NAME}/manifests/{Digest.of(content)}").status == 404


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ],
)
def test_layers_that_are_elsewhere(registry: Registry, media_type: str) -> None:
    foreign = described(Digest.of(b"far"), b"far", media_type, urls=["https://vendor.example/far"])
    registry.push(image(described(registry.push_blob(b"c"), b"c"), foreign), "foreign")


def test_an_index_of_blobs(registry: Registry) -> None:
    """What BuildKit keeps its cache in."""
    layer = described(registry.push_blob(b"layer"), b"layer")
    registry.push({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [layer]}, "cache")


def test_delete_a_tag(registry: Registry) -> None:
    digest = registry.image("one")
    registry.image("two")
    assert registry.ask("DELETE", f"/v2/{NAME}/manifests/one").status == 202
    assert code(registry.ask("GET", f"/v2/{NAME}/manifests/one")) == (404, "MANIFEST_UNKNOWN")
    assert code(registry.ask("DELETE", f"/v2/{NAME}/manifests/one")) == (404, "MANIFEST_UNKNOWN")
    for reference in ("two", str(digest)):
        assert registry.ask("GET", f"/v2/{NAME}/manifests/{reference}").status == 200


def test_delete_a_digest_takes_its_tags(registry: Registry) -> None:
    digest = registry.image("one")
    registry.image("two")
    other = registry.image("other", seed="other")
    assert registry.ask("DELETE", f"/v2/{NAME}/manifests/{digest}").status == 202
    for reference in ("one", "two", str(digest)):
        assert code(registry.ask("GET", f"/v2/{NAME}/manifests/{reference}")) == (404, "MANIFEST_UNKNOWN")
    assert registry.ask("DELETE", f"/v2/{NAME}/manifests/{digest}").status == 404
    assert registry.ask("GET", f"/v2/{NAME}/manifests/other").headers["Docker-Content-Digest"] == str(other)
    assert json.loads(registry.ask("GET", f"/v2/{NAME}/tags/list").body)["tags"] == ["other"]


# lists


def test_tags_by_the_page(registry: Registry) -> None:
    for tag in ("b", "a", "C", "d"):
        registry.image(tag)
    answer = registry.ask("GET", f"/v2/{NAME}/tags/list")
    assert json.loads(answer.body) == {"name": NAME, "tags": ["C", "a", "b", "d"]}
    assert "Link" not in answer.headers
    found, target = [], f"/v2/{NAME}/tags/list?n=3"
    while target:
        answer = registry.ask("GET", target)
        found += json.loads(answer.body)["tags"]
        target = (answer.headers["Link"] or "").partition(">")[0].removeprefix("<")
    assert found == ["C", "a", "b", "d"]
    nothing = registry.ask("GET", f"/v2/{NAME}/tags/list?n=0")
    assert (json.loads(nothing.body)["tags"], nothing.headers["Link"]) == ([], None)
    assert json.loads(registry.ask("GET", f"/v2/{NAME}/tags/list?last=a").body)["tags"] == ["b", "d"]
    assert code(registry.ask("GET", f"/v2/{NAME}/tags/list?n=x")) == (400, "PAGINATION_NUMBER_INVALID")
    assert code(registry.ask("GET", "/v2/no/such/tags/list")) == (404, "NAME_UNKNOWN")


def test_a_repository_without_tags(registry: Registry) -> None:
    registry.push_blob(b"only a blob")
    assert json.loads(registry.ask("GET", f"/v2/{NAME}/tags/list").body)["tags"] == []


def test_an_upload_makes_no_repository(registry: Registry) -> None:
    registry.begin()
    assert registry.ask("GET", f"/v2/{NAME}/tags/list").status == 404
    assert json.loads(registry.ask("GET", "/v2/_catalog").body) == {"repositories": []}


def test_the_catalog_by_the_page(registry: Registry) -> None:
    for name in ("b/c", "a", "b", "b/c/d"):
        registry.image(name=name)
    answer = registry.ask("GET", "/v2/_catalog?n=3")
    assert json.loads(answer.body) == {"repositories": ["a", "b", "b/c"]}
    target = answer.headers["Link"].partition(">")[0].removeprefix("<")
    assert json.loads(registry.ask("GET", target).body) == {"repositories": ["b/c/d"]}


def test_the_catalog_has_what_has_a_manifest(registry: Registry) -> None:
    digest = registry.image("v1")
    registry.push_blob(b"x", "only/a/blob")
    assert json.loads(registry.ask("GET", "/v2/_catalog").body) == {"repositories": [NAME]}
    assert registry.ask("DELETE", f"/v2/{NAME}/manifests/{digest}").status == 202
    assert json.loads(registry.ask("GET", "/v2/_catalog").body) == {"repositories": []}


# referrers


def subject_of(digest: Digest) -> JSON:
    return {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": 1}


def test_referrers(registry: Registry) -> None:
    subject = registry.image("subject")
    assert registry.referrers(subject) == []
    signature = registry.image(
        seed="signature", subject=subject_of(subject), artifactType="application/vnd.sig", annotations={"k": "ü"}
    )
    bom = registry.image(seed="bom", subject=subject_of(subject))
    listing = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "subject": subject_of(subject)}
    listed = registry.push(listing)
    document = json.loads(registry.ask("GET", f"/v2/{NAME}/referrers/{subject}").body)
    found = {descriptor["digest"]: descriptor for descriptor in document["manifests"]}
    assert set(found) == {str(signature), str(bom), str(listed)}
    size = registry.store.blobs.size(signature)
    assert found[str(signature)] == {
        "mediaType": OCI_MANIFEST, "digest": str(signature), "size": size,
        "artifactType": "application/vnd.sig", "annotations": {"k": "ü"},
    }  # fmt: skip
    assert found[str(bom)]["artifactType"] == "application/vnd.test"
    assert "artifactType" not in found[str(listed)]
    filtered = registry.ask("GET", f"/v2/{NAME}/referrers/{subject}?artifactType=application/vnd.sig")
    assert filtered.headers["OCI-Filters-Applied"] == "artifactType"
    assert [item["digest"] for item in json.loads(filtered.body)["manifests"]] == [str(signature)]
    assert registry.referrers(subject, "?artifactType=none") == []


def test_a_subject_is_told_and_may_come_later(registry: Registry) -> None:
    content = json.dumps(
        image(described(registry.push_blob(b"c"), b"c"), subject=subject_of(Digest.of(b"later")))
    ).encode()
    answer = registry.ask("PUT", f"/v2/{NAME}/manifests/1", content, Content_Type=OCI_MANIFEST)
    assert (answer.status, answer.headers["OCI-Subject"]) == (201, str(Digest.of(b"later")))
    assert registry.referrers(Digest.of(b"later")) == [str(Digest.of(content))]
    assert registry.referrers(Digest.of(b"later"), name="other/place") == []


def test_a_referrer_that_is_deleted_and_pushed_again(registry: Registry) -> None:
    subject = registry.image("subject")
    for _ in range(2):
        signature = registry.image(seed="signature", subject=subject_of(subject))
        assert registry.referrers(subject) == [str(signature)]
        assert registry.ask("DELETE", f"/v2/{NAME}/manifests/{signature}").status == 202
        assert registry.referrers(subject) == []
    registry.image(seed="signature", subject=subject_of(subject))
    assert registry.ask("DELETE", f"/v2/{NAME}/manifests/{subject}").status == 202
    assert len(registry.referrers(subject)) == 1


def test_a_referrer_that_another_hand_removed(registry: Registry) -> None:
    subject = registry.image("subject")
    signature = registry.image(seed="signature", subject=subject_of(subject))
    assert registry.referrers(subject) == [str(signature)]
    registry.store.links.unlink_manifest(NAME, signature)
    assert registry.referrers(subject) == []


def test_referrers_by_the_page(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = registry.image("subject")
    pushed = [str(registry.image(seed=f"{number}", subject=subject_of(subject))) for number in range(5)]
    monkeypatch.setattr(module, "_MOST_REFERRERS", 400)
    for query in ("", "?artifactType=application/vnd.test"):
        found, target = [], f"/v2/{NAME}/referrers/{subject}{query}"
        while target:
            answer = registry.ask("GET", target)
            part = [item["digest"] for item in json.loads(answer.body)["manifests"]]
            assert 1 <= len(part) <= 2
            found += part
            target = (answer.headers["Link"] or "").partition(">")[0].removeprefix("<")
        assert sorted(found) == sorted(pushed)


def test_a_tree_that_another_registry_wrote(registry: Registry, tmp_path: Path, visit: Any) -> None:
    """It has no media types and no referrers: clients kept those under a fallback tag. An import may bring more."""
    subject = registry.image("subject")
    signature = registry.image(seed="signature", subject=subject_of(subject))
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        {"mediaType": OCI_MANIFEST, "digest": str(signature), "size": registry.store.blobs.size(signature)},
    ]}  # fmt: skip
    registry.push(index, fallback_tag(subject))
    forget_what_is_ours(tmp_path)
    store = HostedStore.from_layout(Layout(tmp_path))
    reactor = Reactor()
    own = Own(Face(reactor), Hosted(reactor, store, Push(reactor, store)), Open())
    fresh = Registry(store, visit(own.answer, clock=reactor), lambda: visit(own.answer, clock=reactor))
    assert fresh.ask("HEAD", f"/v2/{NAME}/manifests/subject").headers["Content-Type"] == OCI_MANIFEST
    assert fresh.ask("GET", f"/v2/{NAME}/manifests/{fallback_tag(subject)}").headers["Content-Type"] == OCI_INDEX
    assert fresh.referrers(subject) == [str(signature)]

    brought = registry.image(seed="brought", subject=subject_of(subject))
    forget_what_is_ours(tmp_path)
    assert sorted(fresh.referrers(subject)) == sorted(map(str, (signature, brought)))


def forget_what_is_ours(root: Path) -> None:
    for path in root.rglob("_referrers"):
        shutil.rmtree(path)
    for path in [*root.rglob("revisions/*/*/media-type"), *root.rglob("revisions/*/*/subject")]:
        path.unlink()


def test_listing_referrers_walks_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = registry.image("subject")
    assert registry.referrers(subject) == []
    monkeypatch.setattr(Referrers, "complete", None)
    signature = registry.image(seed="signature", subject=subject_of(subject))
    assert registry.referrers(subject) == [str(signature)]
    registry.ask("DELETE", f"/v2/{NAME}/manifests/{signature}")
    assert registry.referrers(subject) == []


# the rest


@pytest.mark.parametrize("path", ["/v2/", "/v2"])
def test_the_ping(registry: Registry, path: str) -> None:
    answer = registry.ask("GET", path)
    assert (answer.status, answer.body) == (200, b"{}")
    assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v2/", "GET, HEAD"),
        ("DELETE", "/v2/_catalog", "GET, HEAD"),
        ("PUT", "/v2/a/tags/list", "GET, HEAD"),
        ("POST", "/v2/a/manifests/x", "GET, HEAD, PUT, DELETE"),
        ("PUT", f"/v2/a/blobs/{Digest.of(b'')}", "GET, HEAD, DELETE"),
        ("GET", "/v2/a/blobs/uploads/", "POST"),
        ("POST", "/v2/a/blobs/uploads/x", "GET, HEAD, PATCH, PUT, DELETE"),
        ("DELETE", f"/v2/a/referrers/{Digest.of(b'')}", "GET, HEAD"),
    ],
)
def test_methods_that_a_resource_has_not(registry: Registry, method: str, path: str, allowed: str) -> None:
    answer = registry.ask(method, path)
    assert code(answer) == (405, "UNSUPPORTED")
    assert answer.headers["Allow"] == allowed


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v2/UPPER/tags/list", (400, "NAME_INVALID")),
        ("GET", "/v2/a/manifests/-x", (400, "NAME_INVALID")),
        ("GET", "/v2/a/manifests/sha256:xyz", (400, "DIGEST_INVALID")),
        ("GET", "/v2/a/blobs/latest", (400, "DIGEST_INVALID")),
        ("GET", "/v2/a/referrers/sha256:12", (400, "DIGEST_INVALID")),
        ("POST", "/v2/a//b/blobs/uploads/", (400, "NAME_INVALID")),
        ("PUT", "/v2/_layers/manifests/x", (400, "NAME_INVALID")),
        ("GET", "/v2/a", (404, "NAME_UNKNOWN")),
        ("GET", "/v2/token", (404, "NAME_UNKNOWN")),
    ],
)
def test_names_and_digests_that_are_none(registry: Registry, method: str, path: str, expected: tuple[int, str]) -> None:
    assert code(registry.ask(method, path)) == expected


def test_a_request_that_is_left_goes_on(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves while its manifest is taken in does not leave half of it."""
    monkeypatch.setattr(push_manifests, "_AT_ONCE", 2)
    layers = [described(registry.push_blob(b"%d" % number), b"%d" % number) for number in range(10)]
    content = json.dumps(image(layers[0], *layers)).encode()
    registry.visitor.transport.channel.dataReceived(
        f"PUT /v2/{NAME}/manifests/left HTTP/1.1\r\nHost: x\r\nContent-Type: {OCI_MANIFEST}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    assert registry.store.links.tags(NAME) == []
    registry.visitor.disconnect()
    assert registry.store.links.tags(NAME) == ["left"]
