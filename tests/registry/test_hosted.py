"""The hosted registry over HTTP, on a real disk. Thread calls run synchronously, so the result of a request is visible
at once."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from attrs import define

from dockerproxy.oci.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    fallback_tag,
)
from dockerproxy.oci.names import Digest
from dockerproxy.registry.access_control import AllowAll
from dockerproxy.registry.api import RegistryAPI
from dockerproxy.registry.hosted_app import HostedRegistryApp
from dockerproxy.registry.hosted_rules import HostedRules
from dockerproxy.store import local_hosted_store as module
from dockerproxy.store import referrers as referrers_module
from dockerproxy.store.disk_reserve import DiskReserve
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.progress import Progress
from dockerproxy.store.referrers import Referrers
from dockerproxy.store.repository_check import Finding
from dockerproxy.store.scrub import scrub
from dockerproxy.store.sweep import sweep
from dockerproxy.store.uploads import UploadLimits
from tests.registry.support.synchronous_reactor import SynchronousReactor
from tests.support.audit import make_audit_log
from tests.support.hosted import make_hosted_registry

JSON = dict[str, Any]
NAME = "some/where"
HOUR = 3600.0


@define
class RegistryHarness:
    """The hosted registry, and a client connected to it."""

    store: HostedTree
    rules: HostedRules
    client: Any
    connect: Callable[[], Any]
    recorded: list[Mapping[str, Any]]

    def request(self, method: str, target: str, body: bytes | None = None, **fields: str) -> Any:
        if self.client.transport.closed or self.client.transport.disconnecting:
            self.client = self.connect()
        headers = [(name.replace("_", "-"), value) for name, value in fields.items()]
        return self.client.fetch(method, target, headers, body)

    def push_blob(self, data: bytes, name: str = NAME, algorithm: str = "sha256") -> Digest:
        digest = Digest.of(data, algorithm)
        response = self.request("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", data)
        assert response.status == 201, response
        return digest

    def push(self, document: JSON, reference: str = "", name: str = NAME, *, media_type: str = "") -> Digest:
        content = json.dumps(document).encode()
        digest = Digest.of(content)
        content_type = media_type or document["mediaType"]
        response = self.request(
            "PUT", f"/v2/{name}/manifests/{reference or digest}", content, Content_Type=content_type
        )
        assert response.status == 201, response
        return digest

    def image(self, tag: str = "", name: str = NAME, seed: str = "", **extra: Any) -> Digest:
        config, layer = f"config {seed}".encode(), f"layer {seed}".encode()
        return self.push(
            make_image(*(make_descriptor(self.push_blob(blob, name), blob) for blob in (config, layer)), **extra),
            tag,
            name,
        )

    def start_upload(self, query: str = "", name: str = NAME) -> str:
        response = self.request("POST", f"/v2/{name}/blobs/uploads/{query}")
        assert (response.status, response.headers["Range"]) == (202, "0-0")
        return str(response.headers["Location"])

    def stored_uploads(self) -> list[str]:
        try:
            return os.listdir(self.store.layout.sessions)
        except FileNotFoundError:
            return []

    def referrers(self, subject: Digest, query: str = "", name: str = NAME) -> list[str]:
        response = self.request("GET", f"/v2/{name}/referrers/{subject}{query}")
        assert (response.status, response.headers["Content-Type"]) == (200, OCI_INDEX)
        document = json.loads(response.body)
        assert (document["schemaVersion"], document["mediaType"]) == (2, OCI_INDEX)
        return [descriptor["digest"] for descriptor in document["manifests"]]


def make_descriptor(digest: Digest, content: bytes, media_type: str = "application/vnd.test", **extra: Any) -> JSON:
    return {"mediaType": media_type, "digest": str(digest), "size": len(content), **extra}


def make_image(config: JSON, *layers: JSON, **extra: Any) -> JSON:
    return {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": list(layers), **extra}


def error_code(response: Any) -> tuple[int, str]:
    return response.status, json.loads(response.body)["errors"][0]["code"]


@pytest.fixture
def registry(tmp_path: Path, connect_client: Any) -> RegistryHarness:
    reactor = SynchronousReactor()
    store = HostedTree.from_layout(Layout(tmp_path))
    rules = HostedRules()
    audit, recorded = make_audit_log()
    backend = make_hosted_registry(reactor, store, rules, audit)
    app = HostedRegistryApp(RegistryAPI(reactor), backend, AllowAll(), audit, rules)

    def connect() -> Any:
        return connect_client(app.handle, clock=reactor)

    return RegistryHarness(store, rules, connect(), connect, recorded)


# the audit log


def test_writes_are_recorded(registry: RegistryHarness) -> None:
    config = registry.push_blob(b"{}")
    image = make_image(make_descriptor(config, b"{}"))
    response = registry.request(
        "PUT", f"/v2/{NAME}/manifests/v1", json.dumps(image).encode(), Content_Type=OCI_MANIFEST,
        User_Agent="docker/27 \u00ff" + "x" * 9000,
    )  # fmt: skip
    assert response.status == 201
    digest = response.headers["Docker-Content-Digest"]
    registry.request("GET", f"/v2/{NAME}/manifests/v1")
    registry.request("PUT", f"/v2/{NAME}/manifests/v1", b"no manifest", Content_Type=OCI_MANIFEST)
    registry.request("DELETE", f"/v2/{NAME}/manifests/v1")
    registry.request("DELETE", f"/v2/{NAME}/manifests/v1")
    registry.request("DELETE", f"/v2/{NAME}/manifests/{digest}")
    registry.request("DELETE", f"/v2/{NAME}/blobs/{config}")
    entries = [(entry["action"], entry["target"], entry["result"].partition(":")[0]) for entry in registry.recorded]
    assert entries == [
        ("push", f"{NAME}:v1", "done"),
        ("push", f"{NAME}:v1", "failed"),
        ("delete", f"{NAME}:v1", "done"),
        ("delete", f"{NAME}:v1", "failed"),
        ("delete", f"{NAME}@{digest}", "done"),
        ("delete", f"{NAME}@{config}", "done"),
    ]
    first = registry.recorded[0]
    assert (first["from"], first["detail"], len(first["user_agent"])) == ("10.1.2.3", digest, 256)


def test_what_a_rule_refuses_anybody_is_not_recorded(registry: RegistryHarness) -> None:
    """Anybody could displace the other entries."""
    registry.rules.read_only = True
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/v1").status == 405
    assert registry.recorded == []


# uploads


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_blob_in_one_request(registry: RegistryHarness, algorithm: str) -> None:
    digest = Digest.of(b"data", algorithm)
    response = registry.request("POST", f"/v2/{NAME}/blobs/uploads/?digest={digest}", b"data")
    assert response.status == 201
    assert response.headers["Location"] == f"/v2/{NAME}/blobs/{digest}"
    assert response.headers["Docker-Content-Digest"] == str(digest)
    assert registry.request("GET", f"/v2/{NAME}/blobs/{digest}").body == b"data"
    assert registry.stored_uploads() == []


@pytest.mark.parametrize("query", ["", "?digest-algorithm=sha512"])
def test_a_blob_in_chunks(registry: RegistryHarness, query: str) -> None:
    location = registry.start_upload(query)
    for start, chunk in ((0, b"first "), (6, b"second ")):
        response = registry.request("PATCH", location, chunk, Content_Range=f"{start}-{start + len(chunk) - 1}")
        assert (response.status, response.headers["Range"]) == (202, f"0-{start + len(chunk) - 1}")
        location = response.headers["Location"]
    status = registry.request("GET", location)
    assert (status.status, status.headers["Range"], status.headers["Location"]) == (204, "0-12", location)
    digest = Digest.of(b"first second third", "sha512" if query else "sha256")
    response = registry.request("PUT", f"{location}?digest={digest}", b"third", Content_Range="13-17")
    assert (response.status, response.headers["Location"]) == (201, f"/v2/{NAME}/blobs/{digest}")
    assert registry.request("GET", f"/v2/{NAME}/blobs/{digest}").body == b"first second third"
    assert error_code(registry.request("GET", location)) == (404, "BLOB_UPLOAD_UNKNOWN")


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
@pytest.mark.parametrize("field", ["0-3", "3-6", "5-8", "100-103", "4-3"])
def test_a_chunk_out_of_order(registry: RegistryHarness, method: str, field: str) -> None:
    location = registry.request("PATCH", registry.start_upload(), b"1234").headers["Location"]
    target = f"{location}?digest={Digest.of(b'12345678')}" if method == "PUT" else location
    response = registry.request(method, target, b"5678", Content_Range=field)
    assert error_code(response) == (416, "RANGE_INVALID")
    assert (response.headers["Range"], response.headers["Location"]) == ("0-3", location)
    assert registry.request("GET", location).headers["Range"] == "0-3"
    assert registry.request("PUT", f"{location}?digest={Digest.of(b'12345678')}", b"5678").status == 201


@pytest.mark.parametrize("field", ["0-3", "0-4", "4-3", "bytes 0-3/4"])
def test_the_range_of_the_last_chunk_at_the_end(registry: RegistryHarness, field: str) -> None:
    location = registry.request("PATCH", registry.start_upload(), b"1234", Content_Range="0-3").headers["Location"]
    target = f"{location}?digest={Digest.of(b'1234')}"
    assert registry.request("PUT", target, b"", Content_Range=field).status == 201


@pytest.mark.parametrize("field", ["bytes 0-3", "x", "0-4"])
def test_inconsistent_chunk(registry: RegistryHarness, field: str) -> None:
    location = registry.start_upload()
    assert error_code(registry.request("PATCH", location, b"1234", Content_Range=field)) == (400, "BLOB_UPLOAD_INVALID")
    assert registry.request("GET", location).headers["Range"] == "0-0"
    assert registry.stored_uploads() == []


def test_chunk_of_wrong_length_is_rolled_back(registry: RegistryHarness) -> None:
    location = registry.start_upload()
    registry.request("PATCH", location, b"good")
    fields = {"Content_Range": "4-9", "Transfer_Encoding": "chunked"}
    assert error_code(registry.request("PATCH", location, b"3\r\nbad\r\n0\r\n\r\n", **fields)) == (
        400,
        "BLOB_UPLOAD_INVALID",
    )
    assert registry.request("PUT", f"{location}?digest={Digest.of(b'goodbye')}", b"bye").status == 201


def test_disconnect_keeps_the_bytes_received(registry: RegistryHarness) -> None:
    location = registry.request("PATCH", registry.start_upload(), b"a ").headers["Location"]
    registry.client.send(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nsome of it".encode())
    busy = registry.connect().fetch("PATCH", location, (), b"x")
    assert error_code(busy) == (409, "BLOB_UPLOAD_INVALID")
    # The bytes are written together with the next ones, and are not reported before that.
    assert registry.connect().fetch("HEAD", location).headers["Range"] == "0-1"
    registry.client.disconnect()
    assert registry.request("GET", location).headers["Range"] == "0-11"
    digest = Digest.of(b"a some of it and the rest")
    assert registry.request("PUT", f"{location}?digest={digest}", b" and the rest", Content_Range="12-24").status == 201


def test_disconnect_during_the_first_chunk(registry: RegistryHarness) -> None:
    location = registry.start_upload()
    registry.client.send(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nsome of it".encode())
    registry.client.disconnect()
    assert registry.request("GET", location).headers["Range"] == "0-9"
    digest = Digest.of(b"some of it and the rest")
    assert registry.request("PUT", f"{location}?digest={digest}", b" and the rest", Content_Range="10-22").status == 201


def test_nothing_is_stored_before_the_first_byte(registry: RegistryHarness) -> None:
    before = list(registry.store.layout.root.rglob("*"))
    for name in ("a", "a/b", "/".join(["deep"] * 32)):
        location = registry.request("POST", f"/v2/{name}/blobs/uploads/").headers["Location"]
        assert registry.request("GET", location).headers["Range"] == "0-0"
        response = registry.request("PATCH", location, b"")
        assert (response.status, response.headers["Range"], response.headers["Location"]) == (202, "0-0", location)
        assert error_code(registry.request("PUT", f"{location}?digest={Digest.of(b'x')}")) == (400, "DIGEST_INVALID")
        location = registry.request("POST", f"/v2/{name}/blobs/uploads/").headers["Location"]
        assert registry.request("DELETE", location).status == 204
        assert error_code(registry.request("GET", location)) == (404, "BLOB_UPLOAD_UNKNOWN")
    assert list(registry.store.layout.root.rglob("*")) == before


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_an_empty_blob(registry: RegistryHarness, method: str) -> None:
    target = f"/v2/{NAME}/blobs/uploads/" if method == "POST" else registry.start_upload()
    assert registry.request(method, f"{target}?digest={Digest.of(b'')}").status == 201
    assert registry.request("GET", f"/v2/{NAME}/blobs/{Digest.of(b'')}").body == b""


@pytest.mark.parametrize("content", [b"", b"data"])
def test_a_failed_upload_leaves_no_directory(registry: RegistryHarness, content: bytes) -> None:
    for query in (f"?digest={Digest.of(b'other')}", f"?digest={Digest.of(b'other', 'sha512')}"):
        assert registry.request("POST", f"/v2/{NAME}/blobs/uploads/{query}", content).status == 400
        location = registry.request("PATCH", registry.start_upload(), content).headers["Location"]
        assert registry.request("PUT", location + query).status == 400
    location = registry.request("PATCH", registry.start_upload(), content).headers["Location"]
    assert registry.request("DELETE", location).status == 204
    assert [path.name for path in registry.store.layout.root.rglob("*")] in ([], ["uploads"])


def test_a_new_repository_has_a_bounded_depth(registry: RegistryHarness) -> None:
    name, digest = "/".join(["a"] * 33), Digest.of(b"data")
    for method, path in (
        ("POST", f"/v2/{name}/blobs/uploads/"),
        ("POST", f"/v2/{name}/blobs/uploads/?digest={digest}"),
        ("POST", f"/v2/{name}/blobs/uploads/?mount={registry.push_blob(b'data')}"),
        ("PUT", f"/v2/{name}/manifests/1"),
    ):
        response = registry.request(method, path, b"data")
        assert error_code(response) == (400, "NAME_INVALID")
        assert "32 components, not 33" in response.body.decode()
    registry.store.links.link_layer(name, digest)  # an older version had no bound
    assert registry.request("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", b"data").status == 201


def test_too_many_uploads(registry: RegistryHarness) -> None:
    registry.store.uploads.limits = UploadLimits(total=20, per_client=2)
    for _ in range(2):
        assert registry.request("PATCH", registry.start_upload(), b"x").status == 202
    location = registry.start_upload()  # which costs nothing
    response = registry.request("PATCH", location, b"x")
    assert error_code(response) == (429, "TOOMANYREQUESTS")
    assert response.headers["Retry-After"] == "60"
    assert "MAX_UPLOADS_PER_CLIENT" in response.body.decode()
    assert len(registry.stored_uploads()) == 2


def test_pushes_leave_a_reserve_on_the_disk(registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, config = registry.push_blob(b"here"), registry.push_blob(b"config")
    manifest = make_image(make_descriptor(config, b"config"))
    location = registry.request("PATCH", registry.start_upload(), b"x").headers["Location"]

    def check() -> None:
        raise OSError(errno.ENOSPC, "1.0 MiB are free, and pushes and imports leave 2.0 MiB to the daemon")

    with monkeypatch.context() as patch:
        patch.setattr(DiskReserve, "check", lambda self: check())
        for method, path, content in (
            ("POST", f"/v2/{NAME}/blobs/uploads/?digest={Digest.of(b'data')}", b"data"),
            ("PATCH", registry.start_upload(), b"data"),
            ("PATCH", location, b"data"),
            ("POST", f"/v2/other/blobs/uploads/?mount={digest}", b""),
            ("PUT", f"/v2/{NAME}/manifests/1", json.dumps(manifest).encode()),
        ):
            response = registry.request(method, path, content)
            assert (response.status, error_code(response)[1]) == (507, "UNAVAILABLE"), (method, path)
            assert "imports leave 2.0 MiB" in response.body.decode()
    assert registry.stored_uploads() == []
    assert registry.push(manifest, "1")


def test_disconnect_during_monolithic_upload_leaves_nothing(registry: RegistryHarness) -> None:
    digest = Digest.of(b"never whole")
    head = f"POST /v2/{NAME}/blobs/uploads/?digest={digest} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n"
    registry.client.send(head.encode() + bytes(600_000))
    assert len(registry.stored_uploads()) == 1
    registry.client.disconnect()
    assert registry.stored_uploads() == []


@pytest.mark.parametrize("operation", ["post", "put", "patch"])
def test_digest_mismatch(registry: RegistryHarness, operation: str) -> None:
    wrong = Digest.of(b"another")
    if operation == "post":
        response = registry.request("POST", f"/v2/{NAME}/blobs/uploads/?digest={wrong}", b"data")
    else:
        location = registry.start_upload()
        if operation == "patch":
            registry.request("PATCH", location, b"data")
        response = registry.request("PUT", f"{location}?digest={wrong}", b"data" if operation == "put" else b"")
    assert error_code(response) == (400, "DIGEST_INVALID")
    assert registry.stored_uploads() == []
    assert not registry.store.blobs.exists(wrong)
    assert not registry.store.links.has_layer(NAME, wrong)


@pytest.mark.parametrize("query", ["", "?digest=", "?digest=sha256:abc", "?digest=md5:" + "0" * 32])
def test_completing_an_upload_needs_a_digest(registry: RegistryHarness, query: str) -> None:
    location = registry.start_upload()
    assert error_code(registry.request("PUT", location + query, b"data")) == (400, "DIGEST_INVALID")
    assert registry.request("GET", location).status == 204


def test_cancel(registry: RegistryHarness) -> None:
    location = registry.start_upload()
    assert registry.request("DELETE", location).status == 204
    for method in ("GET", "HEAD", "PATCH", "DELETE"):
        assert registry.request(method, location).status == 404


def test_unknown_sessions(registry: RegistryHarness) -> None:
    location = registry.start_upload()
    other_location = location.replace(NAME, "other/place")
    for target in (other_location, f"/v2/{NAME}/blobs/uploads/none", location[:-1] + "~"):
        assert error_code(registry.request("PATCH", target, b"x")) == (404, "BLOB_UPLOAD_UNKNOWN")


def test_an_unregistered_algorithm(registry: RegistryHarness) -> None:
    assert error_code(registry.request("POST", f"/v2/{NAME}/blobs/uploads/?digest-algorithm=md5")) == (
        400,
        "DIGEST_INVALID",
    )


@pytest.mark.parametrize("step", ["append", "publish"])
def test_a_full_disk_ends_the_upload_with_507(
    registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Each step fails with ENOSPC. tests/e2e has the test with a full disk."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    location = registry.start_upload()
    target, method = {"append": ("os.pwritev", "PATCH"), "publish": ("os.rename", "PUT")}[step]
    query = f"?digest={Digest.of(b'data')}" if method == "PUT" else ""
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        response = registry.request(method, location + query, b"data")
    assert response.status == 507
    assert registry.request("GET", location).status == 404
    assert registry.request("HEAD", f"/v2/{NAME}/blobs/{Digest.of(b'data')}").status == 404
    assert registry.stored_uploads() == []


def test_an_unwritable_directory_is_logged_and_reported(
    registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example if `registry:2` ran as another user. The client gets the error, and our log also names the file."""

    def denied(path: str, *args: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    messages: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("os.mkdir", denied)
        patch.setattr(
            "dockerproxy.registry.hosted.log.error", lambda form, **fields: messages.append(form.format(**fields))
        )
        response = registry.request("POST", f"/v2/{NAME}/blobs/uploads/?digest={Digest.of(b'data')}", b"data")
    assert error_code(response) == (500, "UNKNOWN")
    message = json.loads(response.body)["errors"][0]["message"]
    assert "Permission denied" in message
    assert str(registry.store.layout.root) not in message
    assert str(registry.store.layout.root) in messages[0]


# mounts


def test_mount(registry: RegistryHarness) -> None:
    digest = registry.push_blob(b"shared", "from/here")
    response = registry.request("POST", f"/v2/{NAME}/blobs/uploads/?mount={digest}&from=from/here")
    assert (response.status, response.headers["Location"]) == (201, f"/v2/{NAME}/blobs/{digest}")
    assert registry.request("GET", f"/v2/{NAME}/blobs/{digest}").body == b"shared"
    assert registry.request("POST", f"/v2/third/blobs/uploads/?mount={digest}").status == 201
    assert registry.request("HEAD", f"/v2/third/blobs/{digest}").status == 200


@pytest.mark.parametrize("source", ["", "&from=not/there", "&from=from/here"])
def test_failed_mount_starts_an_upload(registry: RegistryHarness, source: str) -> None:
    digest = registry.push_blob(b"shared", "other/place")
    registry.store.links.unlink_layer("other/place", digest)
    registry.push_blob(b"another", "from/here")
    location = registry.start_upload(f"?mount={digest}{source}")
    assert registry.request("HEAD", f"/v2/{NAME}/blobs/{digest}").status == 404
    assert registry.request("PUT", f"{location}?digest={digest}", b"shared").status == 201


@pytest.mark.parametrize(
    "hint", ["mount=x&from=a", "mount=", "mount=sha256:00&from=from/here", "mount=md5:00", "mount=%zz", "mount",
             "from=a", "mount={}&from=", "mount={}&from=../x", "mount={}&from=A", "mount={}&from=%ff",
             "mount={}&from=%2", "mount={}&from=a:1/b", f"mount={{}}&from={'a/' * 200}b", "mount=x&digest={}"],
)  # fmt: skip
def test_a_mount_that_cannot_be_used_starts_an_upload(registry: RegistryHarness, hint: str) -> None:
    digest = registry.push_blob(b"shared", "from/here")
    location = registry.start_upload("?" + hint.format(digest))
    assert registry.request("HEAD", f"/v2/{NAME}/blobs/{digest}").status == 404
    assert registry.request("PUT", f"{location}?digest={digest}", b"shared").status == 201


def test_what_is_no_hint_is_still_checked(registry: RegistryHarness) -> None:
    digest = registry.push_blob(b"shared", "from/here")
    mount = f"?mount={digest}&from=not/there"
    for query in (f"{mount}&digest=x", f"{mount}&digest-algorithm=md5"):
        response = registry.request("POST", f"/v2/{NAME}/blobs/uploads/{query}")
        assert error_code(response) == (400, "DIGEST_INVALID")


# blobs


def test_blobs_are_per_repository(registry: RegistryHarness) -> None:
    digest = registry.push_blob(b"mine", "mine/only")
    registry.push_blob(b"other")
    for method in ("GET", "HEAD", "DELETE"):
        assert registry.request(method, f"/v2/{NAME}/blobs/{digest}").status == 404
    assert error_code(registry.request("GET", f"/v2/{NAME}/blobs/{digest}")) == (404, "BLOB_UNKNOWN")
    assert error_code(registry.request("GET", f"/v2/no/such/blobs/{digest}")) == (404, "NAME_UNKNOWN")


def test_delete_a_blob(registry: RegistryHarness) -> None:
    digest = registry.push_blob(b"data")
    registry.push_blob(b"data", "other/place")
    assert registry.request("DELETE", f"/v2/{NAME}/blobs/{digest}").status == 202
    assert error_code(registry.request("GET", f"/v2/{NAME}/blobs/{digest}")) == (404, "BLOB_UNKNOWN")
    assert error_code(registry.request("DELETE", f"/v2/{NAME}/blobs/{digest}")) == (404, "BLOB_UNKNOWN")
    assert registry.request("GET", f"/v2/other/place/blobs/{digest}").body == b"data"


def test_a_blob_by_range(registry: RegistryHarness) -> None:
    digest = registry.push_blob(b"0123456789")
    response = registry.request("GET", f"/v2/{NAME}/blobs/{digest}", Range="bytes=2-4")
    assert (response.status, response.body, response.headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    assert "X-Cache" not in response.headers and "Cache-Status" not in response.headers


def make_old(registry: RegistryHarness, digest: Digest) -> Path:
    """Make a blob old enough for garbage collection, and return its file."""
    path = Path(registry.store.layout.blob(digest))
    os.utime(path, (1000, 1000))
    return path


@pytest.mark.parametrize("operation", ["HEAD", "GET", "mount", "upload", "manifest", "child", "subject", "again"])
def test_push_touches_referenced_content(registry: RegistryHarness, operation: str) -> None:
    """Garbage collection keeps everything that was used within the hour."""
    is_manifest = operation in ("child", "subject", "again")
    digest = registry.image(seed="x") if is_manifest else registry.push_blob(b"config x")
    registry.push_blob(b"layer x")
    path = make_old(registry, digest)
    if operation in ("HEAD", "GET"):
        registry.request(operation, f"/v2/{NAME}/blobs/{digest}")
    elif operation == "mount":
        registry.request("POST", f"/v2/other/blobs/uploads/?mount={digest}&from={NAME}")
    elif operation == "upload":
        registry.push_blob(b"config x")
    elif operation == "manifest":
        registry.push(
            make_image(make_descriptor(digest, b"config x"), make_descriptor(Digest.of(b"layer x"), b"layer x"))
        )
    elif operation == "child":
        size = path.stat().st_size
        child = {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": size}
        registry.push({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [child]}, "list")
    elif operation == "subject":
        registry.image(seed="signature", subject=subject_of(digest))
    else:
        registry.image("again", seed="x")
    assert path.stat().st_mtime > 10 * HOUR


# manifests


def test_push_and_pull_by_tag_and_digest(registry: RegistryHarness) -> None:
    digest = registry.image("v1.2.3.4")
    for reference in ("v1.2.3.4", str(digest)):
        for method in ("GET", "HEAD"):
            response = registry.request(method, f"/v2/{NAME}/manifests/{reference}")
            assert response.status == 200
            assert response.headers["Content-Type"] == OCI_MANIFEST
            assert response.headers["Docker-Content-Digest"] == str(digest)
            assert Digest.of(response.body) == digest or method == "HEAD"
    assert error_code(registry.request("GET", f"/v2/{NAME}/manifests/none")) == (404, "MANIFEST_UNKNOWN")
    assert error_code(registry.request("GET", f"/v2/no/such/manifests/{digest}")) == (404, "NAME_UNKNOWN")
    assert error_code(registry.request("GET", f"/v2/no/such/manifests/{digest}".replace("sha256", "sha257")))[0] == 400


def test_push_response(registry: RegistryHarness) -> None:
    content = json.dumps(make_image(make_descriptor(registry.push_blob(b"c"), b"c"))).encode()
    response = registry.request(
        "PUT", f"/v2/{NAME}/manifests/latest", content, Content_Type=OCI_MANIFEST + "; charset=utf-8"
    )
    digest = Digest.of(content)
    assert (response.status, response.headers["Docker-Content-Digest"]) == (201, str(digest))
    assert response.headers["Location"] == f"/v2/{NAME}/manifests/{digest}"
    assert "OCI-Subject" not in response.headers
    assert registry.request("GET", f"/v2/{NAME}/manifests/latest").headers["Content-Type"] == OCI_MANIFEST


def test_sha512_and_further_tags(registry: RegistryHarness) -> None:
    content = json.dumps(make_image(make_descriptor(registry.push_blob(b"c", algorithm="sha512"), b"c"))).encode()
    digest = Digest.of(content, "sha512")
    tags = [f"t{number}" for number in range(12)]
    query = "&".join(f"tag={tag}" for tag in tags)
    response = registry.request("PUT", f"/v2/{NAME}/manifests/{digest}?{query}", content, Content_Type=OCI_MANIFEST)
    assert (response.status, response.headers["OCI-Tag"]) == (201, ", ".join(tags))
    for tag in tags:
        assert registry.request("GET", f"/v2/{NAME}/manifests/{tag}").headers["Docker-Content-Digest"] == str(digest)
    bad = registry.request("PUT", f"/v2/{NAME}/manifests/{digest}?tag=-x", content, Content_Type=OCI_MANIFEST)
    assert error_code(bad) == (400, "NAME_INVALID")


def test_manifest_digest_mismatch(registry: RegistryHarness) -> None:
    content = json.dumps(make_image(make_descriptor(registry.push_blob(b"c"), b"c"))).encode()
    response = registry.request("PUT", f"/v2/{NAME}/manifests/{Digest.of(b'x')}", content, Content_Type=OCI_MANIFEST)
    assert error_code(response) == (400, "DIGEST_INVALID")


@pytest.mark.parametrize("size", [MAX_MANIFEST, MAX_MANIFEST + 1])
def test_manifest_size_limit(registry: RegistryHarness, size: int) -> None:
    document = make_image(make_descriptor(registry.push_blob(b"c"), b"c"), annotations={"a": ""})
    document["annotations"]["a"] = "x" * (size - len(json.dumps(document)))
    content = json.dumps(document).encode()
    assert len(content) == size
    response = registry.request("PUT", f"/v2/{NAME}/manifests/big", content, Content_Type=OCI_MANIFEST)
    if size <= MAX_MANIFEST:
        assert response.status == 201
        assert registry.request("GET", f"/v2/{NAME}/manifests/big").body == content
    else:
        assert error_code(response) == (413, "SIZE_INVALID")


@pytest.mark.parametrize(
    "media_type", ["application/vnd.unheard.of.v7+json", "application/vnd.x", "application/x+json"]
)
def test_unknown_media_types(registry: RegistryHarness, media_type: str) -> None:
    content = b"\x00 not even JSON"
    response = registry.request("PUT", f"/v2/{NAME}/manifests/odd", content, Content_Type=media_type)
    assert response.status == 201
    pulled = registry.request("GET", f"/v2/{NAME}/manifests/odd")
    assert (pulled.body, pulled.headers["Content-Type"]) == (content, media_type)


@pytest.mark.parametrize("in_content", [False, True])
@pytest.mark.parametrize("media_type", ["text/html", "image/svg+xml", "Text/XML", "application/xhtml+xml", "a/b"])
def test_types_that_browsers_show_as_pages_are_not_manifests(
    registry: RegistryHarness, media_type: str, in_content: bool
) -> None:
    content = json.dumps({"mediaType": media_type, "x": "<script>alert(1)</script>"}).encode()
    fields = {} if in_content else {"Content_Type": f"{media_type}; charset=utf-8"}
    response = registry.request("PUT", f"/v2/{NAME}/manifests/page", content, **fields)
    assert error_code(response) == (400, "MANIFEST_INVALID")
    assert registry.request("GET", f"/v2/{NAME}/manifests/page").status == 404


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"[]", b"{}", b'{"schemaVersion":2,"layers":[]}', b'{"manifests":[],"layers":[]}'],
)
@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_LIST, "", "no media type"])
def test_invalid_manifest(registry: RegistryHarness, content: bytes, media_type: str) -> None:
    fields = {"Content_Type": media_type} if media_type else {}
    response = registry.request("PUT", f"/v2/{NAME}/manifests/bad", content, **fields)
    assert error_code(response) == (400, "MANIFEST_INVALID")
    assert registry.request("GET", f"/v2/{NAME}/manifests/bad").status == 404


def test_a_manifest_without_a_content_type(registry: RegistryHarness) -> None:
    content = json.dumps(make_image(make_descriptor(registry.push_blob(b"c"), b"c"))).encode()
    assert registry.request("PUT", f"/v2/{NAME}/manifests/1", content).status == 201
    assert registry.request("GET", f"/v2/{NAME}/manifests/1").headers["Content-Type"] == OCI_MANIFEST


@pytest.mark.parametrize("missing", ["config", "layer", "child", "swept"])
def test_missing_references(registry: RegistryHarness, missing: str) -> None:
    present, absent = make_descriptor(registry.push_blob(b"c"), b"c"), make_descriptor(Digest.of(b"gone"), b"gone")
    registry.push_blob(b"gone", "other/place")  # a blob of another repository does not count
    if missing == "swept":
        registry.push_blob(b"gone")
        registry.store.blobs.remove(Digest.of(b"gone"))
    document = {
        "config": make_image(absent),
        "layer": make_image(present, present, absent),
        "swept": make_image(present, absent),
        "child": {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [absent]},
    }[missing]
    content = json.dumps(document).encode()
    response = registry.request("PUT", f"/v2/{NAME}/manifests/1", content, Content_Type=document["mediaType"])
    assert error_code(response) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert absent["digest"] in json.loads(response.body)["errors"][0]["message"]
    assert registry.request("GET", f"/v2/{NAME}/manifests/{Digest.of(content)}").status == 404


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ],
)
def test_nondistributable_layers(registry: RegistryHarness, media_type: str) -> None:
    foreign = make_descriptor(Digest.of(b"far"), b"far", media_type, urls=["https://vendor.example/far"])
    registry.push(make_image(make_descriptor(registry.push_blob(b"c"), b"c"), foreign), "foreign")


def test_an_index_of_blobs(registry: RegistryHarness) -> None:
    """BuildKit stores its cache in such an index."""
    layer = make_descriptor(registry.push_blob(b"layer"), b"layer")
    registry.push({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [layer]}, "cache")


def test_delete_a_tag(registry: RegistryHarness) -> None:
    digest = registry.image("one")
    registry.image("two")
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/one").status == 202
    assert error_code(registry.request("GET", f"/v2/{NAME}/manifests/one")) == (404, "MANIFEST_UNKNOWN")
    assert error_code(registry.request("DELETE", f"/v2/{NAME}/manifests/one")) == (404, "MANIFEST_UNKNOWN")
    for reference in ("two", str(digest)):
        assert registry.request("GET", f"/v2/{NAME}/manifests/{reference}").status == 200


def test_delete_a_digest_takes_its_tags(registry: RegistryHarness) -> None:
    digest = registry.image("one")
    registry.image("two")
    other = registry.image("other", seed="other")
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/{digest}").status == 202
    for reference in ("one", "two", str(digest)):
        assert error_code(registry.request("GET", f"/v2/{NAME}/manifests/{reference}")) == (404, "MANIFEST_UNKNOWN")
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/{digest}").status == 404
    assert registry.request("GET", f"/v2/{NAME}/manifests/other").headers["Docker-Content-Digest"] == str(other)
    assert json.loads(registry.request("GET", f"/v2/{NAME}/tags/list").body)["tags"] == ["other"]


def make_index(*children: Digest, **extra: Any) -> JSON:
    manifests = [{"mediaType": OCI_MANIFEST, "digest": str(child), "size": 1} for child in children]
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests, **extra}


@pytest.mark.parametrize("media_type_is_known", [True, False])
def test_what_the_index_of_a_tag_needs_is_not_deleted(registry: RegistryHarness, media_type_is_known: bool) -> None:
    child = registry.image("child", seed="child")  # a tag of its own changes nothing
    inner = registry.push(make_index(child))
    outer = registry.push(make_index(inner), "v1")
    signature = registry.image(seed="signature", subject=subject_of(outer))
    if not media_type_is_known:
        for path in registry.store.layout.root.rglob("media-type"):
            path.unlink()
    for needed in (child, inner):
        response = registry.request("DELETE", f"/v2/{NAME}/manifests/{needed}")
        assert error_code(response) == (409, "DENIED")
        assert f"{NAME}:v1 needs {needed}" in json.loads(response.body)["errors"][0]["message"]
        assert registry.request("GET", f"/v2/{NAME}/manifests/{needed}").status == 200
    assert registry.request("GET", f"/v2/{NAME}/manifests/child").status == 200
    # Neither its own tag, nor what refers to the image, nor the index itself is needed.
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/child").status == 202
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/{signature}").status == 202
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/{outer}").status == 202
    for free in (child, inner):
        assert registry.request("DELETE", f"/v2/{NAME}/manifests/{free}").status == 202


def test_what_only_untagged_indexes_and_other_repositories_list_is_deleted(registry: RegistryHarness) -> None:
    child = registry.image(seed="child")
    registry.push(make_index(child))
    registry.push(make_index(registry.image(name="other/place", seed="child")), "v1", "other/place")
    registry.push(make_index(child), fallback_tag(registry.image(seed="subject")))  # a list of signatures
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/{child}").status == 202


# lists


def test_tags_pagination(registry: RegistryHarness) -> None:
    for tag in ("b", "a", "C", "B", "d"):
        registry.image(tag)
    response = registry.request("GET", f"/v2/{NAME}/tags/list")
    assert json.loads(response.body) == {"name": NAME, "tags": ["a", "B", "b", "C", "d"]}
    assert "Link" not in response.headers
    tags, target = [], f"/v2/{NAME}/tags/list?n=3"
    while target:
        response = registry.request("GET", target)
        tags += json.loads(response.body)["tags"]
        target = (response.headers["Link"] or "").partition(">")[0].removeprefix("<")
    assert tags == ["a", "B", "b", "C", "d"]
    empty_page = registry.request("GET", f"/v2/{NAME}/tags/list?n=0")
    assert (json.loads(empty_page.body)["tags"], empty_page.headers["Link"]) == ([], None)
    assert json.loads(registry.request("GET", f"/v2/{NAME}/tags/list?last=B").body)["tags"] == ["b", "C", "d"]
    assert error_code(registry.request("GET", f"/v2/{NAME}/tags/list?n=x")) == (400, "PAGINATION_NUMBER_INVALID")
    assert error_code(registry.request("GET", "/v2/no/such/tags/list")) == (404, "NAME_UNKNOWN")


def test_an_empty_number_of_entries_and_an_escaped_slash(registry: RegistryHarness) -> None:
    registry.image("v1")
    for name in (NAME, NAME.replace("/", "%2F"), NAME.replace("/", "%2f")):
        response = registry.request("GET", f"/v2/{name}/tags/list?n=")
        assert (response.status, json.loads(response.body)) == (200, {"name": NAME, "tags": ["v1"]})
        assert registry.request("HEAD", f"/v2/{name}/manifests/v1").status == 200
    assert json.loads(registry.request("GET", "/v2/_catalog?n=").body) == {"repositories": [NAME]}
    assert error_code(registry.request("GET", "/v2/some%252Fwhere/tags/list")) == (400, "NAME_INVALID")


def test_a_repository_without_tags(registry: RegistryHarness) -> None:
    registry.push_blob(b"only a blob")
    assert json.loads(registry.request("GET", f"/v2/{NAME}/tags/list").body)["tags"] == []


def test_an_upload_session_does_not_create_a_repository(registry: RegistryHarness) -> None:
    registry.start_upload()
    assert registry.request("GET", f"/v2/{NAME}/tags/list").status == 404
    assert json.loads(registry.request("GET", "/v2/_catalog").body) == {"repositories": []}


def test_catalog_pagination(registry: RegistryHarness) -> None:
    for name in ("b/c", "a", "b", "b/c/d"):
        registry.image(name=name)
    response = registry.request("GET", "/v2/_catalog?n=3")
    assert json.loads(response.body) == {"repositories": ["a", "b", "b/c"]}
    target = response.headers["Link"].partition(">")[0].removeprefix("<")
    assert json.loads(registry.request("GET", target).body) == {"repositories": ["b/c/d"]}


@pytest.mark.parametrize("kind", ["blob", "manifest"])
def test_a_push_replaces_damaged_content_of_the_same_size(registry: RegistryHarness, kind: str) -> None:
    content = (
        b"layer" if kind == "blob" else json.dumps(make_image(make_descriptor(registry.push_blob(b"c"), b"c"))).encode()
    )
    digest = Digest.of(content)
    for _ in range(2):
        if kind == "blob":
            registry.push_blob(content)
        else:
            registry.push(json.loads(content), "1")
        assert registry.request("GET", f"/v2/{NAME}/{kind}s/{digest}").body == content
        Path(registry.store.layout.blob(digest)).write_bytes(b"x" * len(content))


def test_a_damaged_manifest_is_not_served(registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = registry.image("1")
    path = Path(registry.store.layout.blob(digest))
    path.write_bytes(path.read_bytes().replace(b"layers", b"slayer"))
    messages: list[str] = []
    monkeypatch.setattr(
        "dockerproxy.store.local_hosted_store.log.error", lambda form, **fields: messages.append(form.format(**fields))
    )
    for reference in ("1", str(digest)):
        for method in ("GET", "HEAD"):
            assert registry.request(method, f"/v2/{NAME}/manifests/{reference}").status == 404
    assert len(messages) == 4 and str(digest) in messages[0]
    assert path.exists()  # `check` quarantines it
    registry.image("1")
    assert registry.request("GET", f"/v2/{NAME}/manifests/1").status == 200


def test_catalog_lists_repositories_with_manifests(registry: RegistryHarness) -> None:
    digest = registry.image("v1")
    registry.push_blob(b"x", "only/a/blob")
    assert json.loads(registry.request("GET", "/v2/_catalog").body) == {"repositories": [NAME]}
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/{digest}").status == 202
    assert json.loads(registry.request("GET", "/v2/_catalog").body) == {"repositories": []}


# referrers


def subject_of(digest: Digest) -> JSON:
    return {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": 1}


def test_referrers(registry: RegistryHarness) -> None:
    subject = registry.image("subject")
    assert registry.referrers(subject) == []
    signature = registry.image(
        seed="signature", subject=subject_of(subject), artifactType="application/vnd.sig", annotations={"k": "ü"}
    )
    bom = registry.image(seed="bom", subject=subject_of(subject))
    document_with_subject = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [],
        "subject": subject_of(subject),
    }
    index = registry.push(document_with_subject)
    document = json.loads(registry.request("GET", f"/v2/{NAME}/referrers/{subject}").body)
    descriptors = {descriptor["digest"]: descriptor for descriptor in document["manifests"]}
    assert set(descriptors) == {str(signature), str(bom), str(index)}
    size = registry.store.blobs.size(signature)
    assert descriptors[str(signature)] == {
        "mediaType": OCI_MANIFEST, "digest": str(signature), "size": size,
        "artifactType": "application/vnd.sig", "annotations": {"k": "ü"},
    }  # fmt: skip
    assert descriptors[str(bom)]["artifactType"] == "application/vnd.test"
    assert "artifactType" not in descriptors[str(index)]
    filtered = registry.request("GET", f"/v2/{NAME}/referrers/{subject}?artifactType=application/vnd.sig")
    assert filtered.headers["OCI-Filters-Applied"] == "artifactType"
    assert [item["digest"] for item in json.loads(filtered.body)["manifests"]] == [str(signature)]
    assert registry.referrers(subject, "?artifactType=none") == []


def test_referrers_in_an_unknown_repository(registry: RegistryHarness) -> None:
    """Nothing is remembered for a name that anyone can invent, and nothing is locked or written."""
    before = len(registry.store.referrers._complete_signatures)
    for number in range(3):
        assert registry.referrers(Digest.of(b"x"), name=f"no/such{number}") == []
    assert len(registry.store.referrers._complete_signatures) == before
    assert os.listdir(registry.store.layout.root) == []


def test_the_index_of_many_repositories_is_remembered_within_a_bound(
    registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.store.referrers._complete_signatures, "_max_entries", 2)
    subject = registry.image("subject", "a/0")
    for _ in range(2):
        for number in range(3):
            registry.push_blob(b"x", f"a/{number}")
            assert registry.referrers(subject, name=f"a/{number}") == []
    assert len(registry.store.referrers._complete_signatures) == 2


def test_subject_may_be_pushed_later(registry: RegistryHarness) -> None:
    content = json.dumps(
        make_image(make_descriptor(registry.push_blob(b"c"), b"c"), subject=subject_of(Digest.of(b"later")))
    ).encode()
    response = registry.request("PUT", f"/v2/{NAME}/manifests/1", content, Content_Type=OCI_MANIFEST)
    assert (response.status, response.headers["OCI-Subject"]) == (201, str(Digest.of(b"later")))
    assert registry.referrers(Digest.of(b"later")) == [str(Digest.of(content))]
    assert registry.referrers(Digest.of(b"later"), name="other/place") == []


def test_a_referrer_that_is_deleted_and_pushed_again(registry: RegistryHarness) -> None:
    subject = registry.image("subject")
    for _ in range(2):
        signature = registry.image(seed="signature", subject=subject_of(subject))
        assert registry.referrers(subject) == [str(signature)]
        assert registry.request("DELETE", f"/v2/{NAME}/manifests/{signature}").status == 202
        assert registry.referrers(subject) == []
    registry.image(seed="signature", subject=subject_of(subject))
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/{subject}").status == 202
    assert len(registry.referrers(subject)) == 1


def test_a_referrer_that_another_tool_removed_is_not_listed(registry: RegistryHarness) -> None:
    subject = registry.image("subject")
    signature = registry.image(seed="signature", subject=subject_of(subject))
    assert registry.referrers(subject) == [str(signature)]
    registry.store.links.unlink_manifest(NAME, signature)
    assert registry.referrers(subject) == []


def test_referrers_pagination(registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = registry.image("subject")
    pushed = [str(registry.image(seed=f"{number}", subject=subject_of(subject))) for number in range(5)]
    monkeypatch.setattr(module, "_MAX_REFERRERS_SIZE", 400)
    for query in ("", "?artifactType=application/vnd.test"):
        digests, target = [], f"/v2/{NAME}/referrers/{subject}{query}"
        while target:
            response = registry.request("GET", target)
            part = [item["digest"] for item in json.loads(response.body)["manifests"]]
            assert 1 <= len(part) <= 2
            digests += part
            target = (response.headers["Link"] or "").partition(">")[0].removeprefix("<")
        assert sorted(digests) == sorted(pushed)


def set_link_time(registry: RegistryHarness, digest: str, seconds: int) -> None:
    registry.store.links.set_manifest_time(NAME, Digest.parse(digest), seconds * 10**9)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 1, 3)])
@pytest.mark.parametrize("size_limit", [400, 10**6])
def test_the_oldest_referrers_are_listed_first(
    registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...], size_limit: int
) -> None:
    subject = registry.image("subject")
    pushed = [str(registry.image(seed=f"{number}", subject=subject_of(subject))) for number in range(5)]
    for time, number in enumerate(order):
        set_link_time(registry, pushed[number], 10 ** (2 * time))
    monkeypatch.setattr(module, "_MAX_REFERRERS_SIZE", size_limit)
    expected = [pushed[number] for number in order]
    assert list_types(registry, subject, "application/vnd.test")[0] == expected
    registry.image(seed="2", subject=subject_of(subject))  # pushed again: it is not new
    registry.image(seed="2", tag="signature", subject=subject_of(subject))
    assert list_types(registry, subject, "application/vnd.test")[0] == expected


def test_a_referrer_that_is_pushed_or_deleted_between_two_pages(
    registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = registry.image("subject")
    pushed = [str(registry.image(seed=f"{number}", subject=subject_of(subject))) for number in range(4)]
    for time, digest in enumerate(pushed):
        set_link_time(registry, digest, time)
    monkeypatch.setattr(module, "_MAX_REFERRERS_SIZE", 1)
    listed, target = [], f"/v2/{NAME}/referrers/{subject}"
    while target:
        response = registry.request("GET", target)
        listed += [item["digest"] for item in json.loads(response.body)["manifests"]]
        target = (response.headers["Link"] or "").partition(">")[0].removeprefix("<")
        if len(listed) == 2:
            assert registry.request("DELETE", f"/v2/{NAME}/manifests/{pushed[1]}").status == 202
            pushed.append(str(registry.image(seed="new", subject=subject_of(subject))))
    assert listed == pushed


def test_referrers_with_the_same_time_are_all_listed(
    registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = registry.image("subject")
    pushed = [str(registry.image(seed=f"{number}", subject=subject_of(subject))) for number in range(4)]
    for digest in pushed:
        set_link_time(registry, digest, 5)
    monkeypatch.setattr(module, "_MAX_REFERRERS_SIZE", 1)
    assert list_types(registry, subject, "application/vnd.test") == (sorted(pushed), 4)


def list_types(registry: RegistryHarness, subject: Digest, artifact_type: str) -> tuple[list[str], int]:
    """Return the referrers of a type, and the number of responses that they took."""
    digests: list[str] = []
    responses = 0
    target = f"/v2/{NAME}/referrers/{subject}?artifactType={artifact_type}"
    while target:
        response = registry.request("GET", target)
        digests += [item["digest"] for item in json.loads(response.body)["manifests"]]
        target = (response.headers["Link"] or "").partition(">")[0].removeprefix("<")
        responses += 1
    return digests, responses


def test_a_list_of_one_type_does_not_read_the_others(
    registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = registry.image("subject")
    wanted = str(registry.image(seed="wanted", subject=subject_of(subject), artifactType="a/wanted"))
    for number in range(6):
        registry.image(
            seed=f"{number}", subject=subject_of(subject), artifactType=f"a/{number}", annotations={"k": "v" * 5000}
        )
    read_bytes = 0
    read = io.BufferedReader.read

    def count(path: int, *args: Any) -> Any:
        file = io.BytesIO(os.read(path, 10_000))
        os.close(path)
        return Counting(file)

    class Counting(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read_bytes
            content = read(self, size)
            read_bytes += len(content)
            return content

    monkeypatch.setattr(referrers_module, "open", lambda fd, mode: count(fd), raising=False)
    assert list_types(registry, subject, "a/wanted") == ([wanted], 1)
    assert 0 < read_bytes < 1000
    assert list_types(registry, subject, "a/none") == ([], 1)
    # A response reads a bounded number of them, and its Link leads to the others.
    monkeypatch.setattr(module, "_MAX_REFERRERS_READ", 3)
    assert list_types(registry, subject, "a/wanted") == ([wanted], 3)


def test_referrers_of_an_earlier_version(registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = registry.image("subject")
    signature = registry.image(seed="s", subject=subject_of(subject), artifactType="a/sig", annotations={"k": "ü"})
    path = Path(registry.store.layout.referrer(NAME, subject, signature))
    content = path.read_bytes()
    descriptor = content.partition(b"\n")[2]
    for artifact_type, expected in (("a/sig", [str(signature)]), ("a/other", [])):
        path.write_bytes(descriptor)
        assert list_types(registry, subject, artifact_type)[0] == expected
        assert path.read_bytes() == content
    path.write_bytes(descriptor)
    assert registry.referrers(subject) == [str(signature)]


@pytest.mark.parametrize("artifact_type", ["a\nb", "\ud800", "x" * 100_000, '"', "ü"])
def test_any_artifact_type_is_listed(registry: RegistryHarness, artifact_type: str) -> None:
    subject = registry.image("subject")
    signature = registry.image(
        seed="s", subject=subject_of(subject), artifactType=artifact_type, annotations={"k": "\udfff", "n": 5}
    )
    response = registry.request("GET", f"/v2/{NAME}/referrers/{subject}")
    (descriptor,) = json.loads(response.body)["manifests"]
    assert descriptor["digest"] == str(signature)
    assert descriptor["artifactType"] == artifact_type
    assert descriptor["annotations"] == {"k": "\udfff"}  # image-spec: annotations are strings
    for other in ("", "null", "a"):
        assert registry.referrers(subject, f"?artifactType={other}") == []
    if artifact_type in ('"', "ü"):
        assert registry.referrers(subject, f"?artifactType={quote(artifact_type)}") == [str(signature)]


def test_a_tree_without_our_metadata_is_indexed(registry: RegistryHarness, tmp_path: Path, connect_client: Any) -> None:
    """The tree of another registry has no media types and no referrers; clients kept those under a fallback tag. An
    import may add more."""
    subject = registry.image("subject")
    signature = registry.image(seed="signature", subject=subject_of(subject))
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        {"mediaType": OCI_MANIFEST, "digest": str(signature), "size": registry.store.blobs.size(signature)},
    ]}  # fmt: skip
    registry.push(index, fallback_tag(subject))
    remove_our_metadata(tmp_path)
    store = HostedTree.from_layout(Layout(tmp_path))
    reactor = SynchronousReactor()
    backend = make_hosted_registry(reactor, store)
    audit, recorded = make_audit_log()
    app = HostedRegistryApp(RegistryAPI(reactor), backend, AllowAll(), audit)
    reopened = RegistryHarness(
        store,
        HostedRules(),
        connect_client(app.handle, clock=reactor),
        lambda: connect_client(app.handle, clock=reactor),
        recorded,
    )
    assert reopened.request("HEAD", f"/v2/{NAME}/manifests/subject").headers["Content-Type"] == OCI_MANIFEST
    assert reopened.request("GET", f"/v2/{NAME}/manifests/{fallback_tag(subject)}").headers["Content-Type"] == OCI_INDEX
    assert reopened.referrers(subject) == [str(signature)]

    imported = registry.image(seed="brought", subject=subject_of(subject))
    remove_our_metadata(tmp_path)
    assert sorted(reopened.referrers(subject)) == sorted(map(str, (signature, imported)))


def remove_our_metadata(root: Path) -> None:
    for path in root.rglob("_referrers"):
        shutil.rmtree(path)
    for path in [*root.rglob("revisions/*/*/media-type"), *root.rglob("revisions/*/*/subject")]:
        path.unlink()


def test_listing_referrers_does_not_scan(registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = registry.image("subject")
    assert registry.referrers(subject) == []
    monkeypatch.setattr(Referrers, "missing", None)
    signature = registry.image(seed="signature", subject=subject_of(subject))
    assert registry.referrers(subject) == [str(signature)]
    registry.request("DELETE", f"/v2/{NAME}/manifests/{signature}")
    assert registry.referrers(subject) == []


# rules


def test_a_read_only_registry(registry: RegistryHarness) -> None:
    digest = registry.image("v1")
    session = registry.start_upload()
    registry.rules.read_only = True
    for method, path in (
        ("PUT", "manifests/v2"), ("DELETE", "manifests/v1"), ("DELETE", f"manifests/{digest}"),
        ("DELETE", f"blobs/{Digest.of(b'layer ')}"), ("POST", "blobs/uploads/"),
        ("POST", f"blobs/uploads/?mount={Digest.of(b'layer ')}"), ("PATCH", session.partition(f"{NAME}/")[2]),
        ("PUT", f"{session.partition(f'{NAME}/')[2]}?digest={digest}"), ("DELETE", session.partition(f"{NAME}/")[2]),
    ):  # fmt: skip
        response = registry.request(method, f"/v2/{NAME}/{path}", b"x")
        assert error_code(response) == (405, "UNSUPPORTED"), (method, path)
        assert "REGISTRY_READ_ONLY" in response.body.decode()
        assert response.headers["Allow"] == "GET, HEAD"
    for path in ("manifests/v1", "tags/list", f"blobs/{Digest.of(b'layer ')}", f"referrers/{digest}"):
        assert registry.request("GET", f"/v2/{NAME}/{path}").status == 200
    assert registry.request("GET", session).status == 204
    registry.rules.read_only = False
    assert registry.request("DELETE", f"/v2/{NAME}/manifests/v1").status == 202


def test_a_registry_without_deletions(registry: RegistryHarness) -> None:
    registry.rules.allow_delete = False
    digest = registry.image("v1")
    for path in ("manifests/v1", f"manifests/{digest}", f"blobs/{Digest.of(b'layer ')}", "manifests/none"):
        response = registry.request("DELETE", f"/v2/{NAME}/{path}")
        assert error_code(response) == (405, "UNSUPPORTED")
        assert "ALLOW_DELETE" in response.body.decode()
    assert registry.request("GET", f"/v2/{NAME}/manifests/v1").status == 200
    assert registry.request("DELETE", registry.start_upload()).status == 204, "the end of a push is no deletion"


def test_a_sparse_index(registry: RegistryHarness) -> None:
    here, absent = registry.image(seed="here"), Digest.of(b"another platform")
    content = json.dumps(make_index(here, absent)).encode()
    response = registry.request("PUT", f"/v2/{NAME}/manifests/v1", content, Content_Type=OCI_INDEX)
    assert error_code(response) == (404, "MANIFEST_BLOB_UNKNOWN")
    registry.rules.allow_sparse_indexes = True
    assert registry.request("PUT", f"/v2/{NAME}/manifests/v1", content, Content_Type=OCI_INDEX).status == 201
    assert registry.request("GET", f"/v2/{NAME}/manifests/v1").body == content
    assert registry.request("GET", f"/v2/{NAME}/manifests/{absent}").status == 404
    assert registry.request("GET", f"/v2/{NAME}/manifests/{here}").status == 200
    # An image needs all of its blobs.
    image_content = json.dumps(make_image(make_descriptor(absent, b"config"))).encode()
    response = registry.request("PUT", f"/v2/{NAME}/manifests/v2", image_content, Content_Type=OCI_MANIFEST)
    assert error_code(response) == (404, "MANIFEST_BLOB_UNKNOWN")
    # Neither check nor gc takes the gap for damage.
    assert [finding.kind for finding in list_findings(registry, sparse=True)] == []
    assert [finding.kind for finding in list_findings(registry, sparse=False)] == ["missing"]
    result = sweep(registry.store.layout, delete_untagged=True)
    assert (result.problems, result.manifests) == ((), 0)


def list_findings(registry: RegistryHarness, *, sparse: bool) -> list[Finding]:
    findings: list[Finding] = []
    scrub(registry.store.layout, sparse=sparse, progress=Progress(emit=findings.append))
    return findings


# other requests


@pytest.mark.parametrize("path", ["/v2/", "/v2"])
def test_ping(registry: RegistryHarness, path: str) -> None:
    response = registry.request("GET", path)
    assert (response.status, response.body) == (200, b"{}")
    assert response.headers["Docker-Distribution-Api-Version"] == "registry/2.0"


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
def test_unsupported_methods(registry: RegistryHarness, method: str, path: str, allowed: str) -> None:
    response = registry.request(method, path)
    assert error_code(response) == (405, "UNSUPPORTED")
    assert response.headers["Allow"] == allowed


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
def test_invalid_names_and_digests(
    registry: RegistryHarness, method: str, path: str, expected: tuple[int, str]
) -> None:
    assert error_code(registry.request(method, path)) == expected


def test_push_completes_after_disconnect(registry: RegistryHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the client disconnects while its manifest is stored, the push still completes."""
    monkeypatch.setattr(module, "_BATCH_SIZE", 2)
    layers = [make_descriptor(registry.push_blob(b"%d" % number), b"%d" % number) for number in range(10)]
    content = json.dumps(make_image(layers[0], *layers)).encode()
    registry.client.transport.channel.dataReceived(
        f"PUT /v2/{NAME}/manifests/left HTTP/1.1\r\nHost: x\r\nContent-Type: {OCI_MANIFEST}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    assert registry.store.links.tags(NAME) == []
    registry.client.disconnect()
    assert registry.store.links.tags(NAME) == ["left"]
