from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import IngestKey, Layout, digest_from_names, ingest_key_from_names

DIGEST = Digest("sha256", "ab" + "0" * 62)
LAYOUT = Layout(Path("/root"))


def test_paths_of_distribution() -> None:
    v2 = "/root/docker/registry/v2"
    assert LAYOUT.blob(DIGEST) == f"{v2}/blobs/sha256/ab/{DIGEST.hex}/data"
    assert LAYOUT.layer("a/b", DIGEST) == f"{v2}/repositories/a/b/_layers/sha256/{DIGEST.hex}/link"
    assert LAYOUT.manifest("a/b", DIGEST) == f"{v2}/repositories/a/b/_manifests/revisions/sha256/{DIGEST.hex}/link"
    assert LAYOUT.tag_current("a/b", "v1") == f"{v2}/repositories/a/b/_manifests/tags/v1/current/link"
    index = f"{v2}/repositories/a/b/_manifests/tags/v1/index/sha256/{DIGEST.hex}/link"
    assert LAYOUT.tag_index("a/b", "v1", DIGEST) == index


@pytest.mark.parametrize(
    "name", ["a", "registry-1.docker.io/library/ubuntu", "host:5000/a/b_c", "[::1]:5000/a", "my_host/x"]
)
def test_accepts_hosts_and_repository_names(name: str) -> None:
    assert LAYOUT.repository(name) == f"/root/docker/registry/v2/repositories/{name}"


@pytest.mark.parametrize(
    "name",
    ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/./b", ".a", "_layers", "a/_manifests", "a\n", "a\0b", "a b",
     "é", "a" * 256, "/".join(["a"] * 513), "-a"],
)  # fmt: skip
def test_rejects_path_traversal(name: str) -> None:
    for path in (LAYOUT.repository, LAYOUT.tags, LAYOUT.layers):
        with pytest.raises(NameInvalid):
            path(name)


@given(st.text(alphabet="a_./:[\n\0", max_size=12))
def test_a_repository_stays_in_its_directory(name: str) -> None:
    try:
        path = LAYOUT.repository(name)
    except NameInvalid:
        return
    assert os.path.normpath(path) == path
    assert path.startswith(f"{LAYOUT.repositories}/")
    assert not any(component.startswith(("_", ".")) for component in name.split("/"))


@pytest.mark.parametrize("tag", ["", "..", ".a", "a/b", "a" * 129, "a\n"])
def test_rejects_invalid_tags(tag: str) -> None:
    with pytest.raises(NameInvalid):
        LAYOUT.tag("a", tag)


def test_digest_from_names() -> None:
    assert digest_from_names("sha256", DIGEST.hex) == DIGEST
    assert digest_from_names("sha256", "ab") is None
    assert digest_from_names("md5", DIGEST.hex) is None


@pytest.mark.parametrize("host", ["registry-1.docker.io", "host:5000", "[::1]:5000"])
def test_ingest_of_a_registry(host: str) -> None:
    key = IngestKey(host, DIGEST)
    assert LAYOUT.ingest(key) == f"/root/ingest/{host}/sha256-{DIGEST.hex}"
    assert IngestKey.parse(str(key)) == key
    assert ingest_key_from_names(host, f"sha256-{DIGEST.hex}") == key


@pytest.mark.parametrize("host", ["", ".", "..", "a/b", "_layers", "a\n"])
def test_ingest_rejects_path_traversal(host: str) -> None:
    with pytest.raises(NameInvalid):
        LAYOUT.ingest(IngestKey(host, DIGEST))
    assert ingest_key_from_names(host, f"sha256-{DIGEST.hex}") is None
