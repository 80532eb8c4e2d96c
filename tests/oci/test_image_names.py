"""Names of images as people write them, and the manifests of an index for platforms."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import ManifestInvalid, NameInvalid
from dockerproxy.oci.image_names import ImageName
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.oci.platform_selection import Platform, parse_index, select

SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("nginx", "docker.io/library/nginx:latest"),
        ("nginx:1.29", "docker.io/library/nginx:1.29"),
        ("bitnami/redis", "docker.io/bitnami/redis:latest"),
        ("docker.io/nginx", "docker.io/library/nginx:latest"),
        ("index.docker.io/library/nginx:1", "docker.io/library/nginx:1"),
        ("registry-1.docker.io/library/nginx:1", "docker.io/library/nginx:1"),
        ("ghcr.io/acme/web/shop:main", "ghcr.io/acme/web/shop:main"),
        ("GHCR.io/acme/x", "ghcr.io/acme/x:latest"),
        ("localhost/x:1", "localhost/x:1"),
        ("reg:5000/x", "reg:5000/x:latest"),
        ("[2001:db8::1]:5000/x", "[2001:db8::1]:5000/x:latest"),
        (f"nginx@{SHA}", f"docker.io/library/nginx@{SHA}"),
        (f"quay.io/a/b:v1@{SHA}", f"quay.io/a/b@{SHA}"),
    ],
)
def test_names(text: str, name: str) -> None:
    assert str(ImageName.parse(text)) == name
    assert ImageName.parse(name) == ImageName.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "UPPER", "a b", "nginx:", "nginx:-x", "nginx@", "nginx@sha256:abc", f"nginx:@{SHA}x", "/nginx", "a//b",
        "../etc", "quay.io/", "quay.io:99999/x",
        "http://quay.io/x", "nginx:1:2", "\x00", "x" * 700, "é", f"a@{SHA}@{SHA}", "-x",
    ],
)  # fmt: skip
def test_wrong_names(text: str) -> None:
    with pytest.raises(NameInvalid) as caught:
        ImageName.parse(text)
    assert len(caught.value.message) < 600 and "\n" not in caught.value.message


@given(st.text())
def test_any_text(text: str) -> None:
    try:
        name = ImageName.parse(text)
    except NameInvalid:
        return
    assert ImageName.parse(str(name)) == name


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", "linux/amd64"),
        ("Linux/x86_64", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm", "linux/arm"),
        ("linux/arm/v7", "linux/arm"),
        ("linux/arm/v6", "linux/arm/v6"),
        ("linux/armhf", "linux/arm"),
    ],
)
def test_platforms(text: str, platform: str) -> None:
    assert str(Platform.parse(text)) == platform


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "linux/arm/v7/x", "a b/c", "linux/" + "x" * 40])
def test_wrong_platforms(text: str) -> None:
    with pytest.raises(NameInvalid):
        Platform.parse(text)


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def index(*entries: dict[str, Any]) -> bytes:
    manifests = [
        {"mediaType": OCI_MANIFEST, "digest": digest(number), "size": 10, **entry}
        for number, entry in enumerate(entries, 1)
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()


def of(os: str, architecture: str, **fields: str) -> dict[str, Any]:
    return {"platform": {"os": os, "architecture": architecture, **fields}}


ATTESTATION = {
    **of("unknown", "unknown"),
    "annotations": {"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": digest(2)},
}
INDEX = index(of("linux", "amd64"), of("linux", "arm64", variant="v8"), ATTESTATION, of("windows", "amd64"), {})


@pytest.mark.parametrize(
    ("wanted", "options", "chosen"),
    [
        (["linux/amd64"], {}, [1]),
        (["linux/arm64", "linux/amd64", "linux/arm64"], {}, [1, 2]),
        (["linux/arm64"], {"attestations": True}, [2, 3]),
        (["linux/amd64"], {"attestations": True}, [1]),
        ([], {"every": True}, [1, 2, 4, 5]),
        ([], {"every": True, "attestations": True}, [1, 2, 4, 5, 3]),
    ],
)
def test_the_manifests_of_platforms(wanted: list[str], options: dict[str, bool], chosen: list[int]) -> None:
    selected = select(parse_index(INDEX), map(Platform.parse, wanted), **options)
    assert selected == [Digest.parse(digest(number)) for number in chosen]


def test_a_platform_that_is_missing() -> None:
    with pytest.raises(NameInvalid) as caught:
        select(parse_index(INDEX), [Platform.parse("linux/riscv64")])
    assert caught.value.message == "it has no linux/riscv64, but linux/amd64, linux/arm64, windows/amd64"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", index({"digest": "sha256:abc"}), index({"digest": 5}), b'{"manifests": 5}',
        b'{"manifests": [5]}',        index({"annotations": {"vnd.docker.reference.digest": "none"}}),
    ],
)  # fmt: skip
def test_wrong_indexes(content: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_index(content)


@pytest.mark.parametrize("platform", [5, None, [], {"os": 5}, {"os": "linux"}, {"os": [], "architecture": {}}])
def test_odd_platforms_are_none_that_anybody_wants(platform: Any) -> None:
    (entry,) = parse_index(index({"platform": platform, "annotations": None}))
    assert entry.platform not in (Platform.parse("linux/amd64"),)
