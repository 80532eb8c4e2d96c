"""Manifests: their references, invalid content, and the types that a client accepts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import ManifestInvalid
from dockerproxy.oci.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    EMPTY_INDEX,
    MAX_MANIFEST,
    MEDIA_TYPE,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    accept_key,
    accept_set,
    accepts,
    data_type,
    fallback_tag,
    filter_referrers,
    media_type_of,
    parse_manifest,
)
from dockerproxy.oci.names import Digest, parse_tag

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = Descriptor(CONFIG_TYPE, Digest.of(b"config"), 6)
LAYERS = (Descriptor(LAYER_TYPE, Digest.of(b"one"), 3), Descriptor(LAYER_TYPE, Digest.of(b"two", "sha512"), 3))


def descriptor_json(descriptor: Descriptor) -> dict[str, Any]:
    return {"mediaType": descriptor.media_type, "digest": str(descriptor.digest), "size": descriptor.size}


def make_document(**fields: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, **fields}).encode()


def make_image(**fields: Any) -> bytes:
    return make_document(
        **{"config": descriptor_json(CONFIG), "layers": [descriptor_json(layer) for layer in LAYERS], **fields}
    )


def make_index(**fields: Any) -> bytes:
    return make_document(**{"manifests": [descriptor_json(CONFIG)], **fields})


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_image(media_type: str) -> None:
    expected = Manifest(media_type, CONFIG, LAYERS, artifact_type=CONFIG_TYPE)
    assert parse_manifest(make_image(), media_type) == expected
    assert parse_manifest(make_image(mediaType=media_type), media_type) == expected
    assert parse_manifest(make_image(mediaType=media_type), None) == expected
    assert parse_manifest(make_image(mediaType=media_type), media_type.upper() + " ; charset=utf-8") == expected


@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
def test_index(media_type: str) -> None:
    expected = Manifest(media_type, manifests=(CONFIG,))
    assert parse_manifest(make_index(), media_type) == expected
    assert parse_manifest(make_index(mediaType=media_type), "application/json") == expected


def test_artifact() -> None:
    parsed = parse_manifest(make_image(subject=descriptor_json(LAYERS[0]), artifactType="application/x"), OCI_MANIFEST)
    assert parsed.subject == LAYERS[0]
    assert parsed.artifact_type == "application/x"
    assert parse_manifest(make_index(artifactType="application/x"), OCI_INDEX).artifact_type == "application/x"


@pytest.mark.parametrize("media_type", [DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED])
def test_schema1(media_type: str) -> None:
    digest = Digest.of(b"layer")
    raw = json.dumps({"schemaVersion": 1, "fsLayers": [{"blobSum": str(digest)}] * 2, "signatures": []}).encode()
    assert parse_manifest(raw, media_type) == Manifest(media_type, layers=(Descriptor("", digest, None),) * 2)
    assert parse_manifest(raw, None).media_type == DOCKER_SCHEMA1_SIGNED


def test_null_is_an_empty_list() -> None:
    assert parse_manifest(make_index(manifests=None), OCI_INDEX) == Manifest(OCI_INDEX)
    assert parse_manifest(make_image(layers=None, manifests=None, subject=None), OCI_MANIFEST).layers == ()
    assert parse_manifest(EMPTY_INDEX, None) == Manifest(OCI_INDEX)


def test_unregistered_type_is_read_by_its_fields() -> None:
    parsed = parse_manifest(make_document(subject=descriptor_json(CONFIG)), "application/vnd.example+json")
    assert parsed == Manifest("application/vnd.example+json", subject=CONFIG)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (make_image(), OCI_MANIFEST),
        (make_document(layers=[]), OCI_MANIFEST),
        (make_index(), OCI_INDEX),
        (make_image(mediaType=DOCKER_MANIFEST), DOCKER_MANIFEST),
        (make_index(mediaType=DOCKER_LIST.upper()), DOCKER_LIST),
        (b'{"schemaVersion":1,"signatures":[]}', DOCKER_SCHEMA1_SIGNED),
        (b'{"schemaVersion":1}', DOCKER_SCHEMA1),
    ],
)
def test_media_type_of(raw: bytes, expected: str) -> None:
    assert media_type_of(raw) == expected


INVALID_JSON = [
    b"", b"[]", b"null", b'"a"', b"<html>", b"{", b"{}}", b"{'a':1}", b'{"manifests":[],"x":NaN}',
    b'\xff{"manifests":[]}', b'\xef\xbb\xbf{"manifests":[]}', '{"manifests":[]}'.encode("utf-16"),
    b'{"manifests":[],"manifests":[]}',
    b'{"manifests":[],"a":{"b":1,"b":2}}', b'{"manifests":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"manifests":[],"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, b'{"manifests":[],"a":' + b"9" * 5000 + b"}",
    b'{"manifests":[]}' + b" " * MAX_MANIFEST,
]  # fmt: skip


@pytest.mark.parametrize("raw", INVALID_JSON, ids=range(len(INVALID_JSON)))
def test_invalid_json(raw: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(raw, OCI_INDEX)
    with pytest.raises(ManifestInvalid):
        media_type_of(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        make_document(),
        make_document(fsLayers=[]),
        make_document(mediaType="html"),
        make_document(mediaType="a/b\r\nX: y"),
    ],
)
def test_unknown_type(raw: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        media_type_of(raw)


@pytest.mark.parametrize(
    ("raw", "media_type"),
    [
        (make_image(mediaType=DOCKER_MANIFEST), OCI_MANIFEST),
        (make_image(mediaType=5), OCI_MANIFEST),
        (make_image(), OCI_INDEX),
        (make_index(), OCI_MANIFEST),
        (make_image(manifests=[]), OCI_MANIFEST),  # CVE-2021-41190
        (make_index(layers=[]), OCI_INDEX),
        (make_index(config={}), None),
        (make_image(fsLayers=[]), DOCKER_SCHEMA1_SIGNED),
        (make_image(config=None), OCI_MANIFEST),
        (make_document(layers=[]), OCI_MANIFEST),
        (make_document(config=descriptor_json(CONFIG)), OCI_MANIFEST),
        (make_image(config="x"), OCI_MANIFEST),
        (make_image(layers={}), OCI_MANIFEST),
        (make_image(layers="x"), OCI_MANIFEST),
        (make_image(layers=["x"]), OCI_MANIFEST),
        (make_image(layers=[None]), OCI_MANIFEST),
        (make_image(layers=[{**descriptor_json(CONFIG), "digest": "sha256:00"}]), OCI_MANIFEST),
        (make_image(layers=[{**descriptor_json(CONFIG), "digest": 7}]), OCI_MANIFEST),
        (make_image(layers=[{"size": 3}]), OCI_MANIFEST),
        (make_image(layers=[{**descriptor_json(CONFIG), "size": -1}]), OCI_MANIFEST),
        (make_image(layers=[{**descriptor_json(CONFIG), "size": True}]), OCI_MANIFEST),
        (make_image(layers=[{**descriptor_json(CONFIG), "size": "3"}]), OCI_MANIFEST),
        (make_image(layers=[{**descriptor_json(CONFIG), "size": 3.0}]), OCI_MANIFEST),
        (make_image(layers=[{**descriptor_json(CONFIG), "size": 2**63}]), OCI_MANIFEST),
        (make_image(layers=[{**descriptor_json(CONFIG), "size": None}]), OCI_MANIFEST),
        (make_image(layers=[{**descriptor_json(CONFIG), "mediaType": 1}]), OCI_MANIFEST),
        (make_image(subject="x"), OCI_MANIFEST),
        (make_image(artifactType=[]), OCI_MANIFEST),
        (make_index(manifests=[[]]), OCI_INDEX),
        (b'{"schemaVersion":1,"fsLayers":[{"blobSum":"x"}]}', DOCKER_SCHEMA1),
        (b'{"schemaVersion":1,"fsLayers":["x"]}', DOCKER_SCHEMA1),
        (make_document(x=1), None),
    ],
)
def test_invalid_manifest(raw: bytes, media_type: str | None) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(raw, media_type)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "mediaType",
                    "config",
                    "layers",
                    "manifests",
                    "subject",
                    "digest",
                    "size",
                    "fsLayers",
                    "artifactType",
                    "schemaVersion",
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
)


@given(json_values, st.sampled_from([None, OCI_MANIFEST, OCI_INDEX, DOCKER_SCHEMA1, "application/x"]))
def test_any_json(value: Any, media_type: str | None) -> None:
    try:
        parse_manifest(json.dumps(value).encode(), media_type)
    except ManifestInvalid:
        pass


DOCKER = (DOCKER_MANIFEST, DOCKER_LIST, OCI_INDEX, "*/*")
types = st.sampled_from([OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*", "application/*", "text/html"])


@given(st.lists(types), st.randoms())
def test_accept_is_a_set(media_types: list[str], random: Any) -> None:
    expected = frozenset(media_types)
    assert accept_set(media_types) == accept_set([", ".join(media_types)]) == expected
    random.shuffle(media_types)
    again = accept_set([",".join(media_types).upper()])
    assert again == expected
    assert accept_key(again) == accept_key(expected)


@given(st.frozensets(types), st.frozensets(types))
def test_accept_keys_of_different_sets_differ(one: frozenset[str], other: frozenset[str]) -> None:
    assert (accept_key(one) == accept_key(other)) == (one == other)


def test_accept_key_is_a_stable_file_name() -> None:
    assert accept_key(frozenset()) == "e3b0c44298fc1c149afbf4c8996fb924"
    assert len(accept_key(frozenset(DOCKER))) == 32


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], set()),
        (["", " , "], set()),
        ([f"{OCI_INDEX};q=0.5, {DOCKER_LIST} ; q=1"], {OCI_INDEX, DOCKER_LIST}),
        ([f"{OCI_INDEX};q=0, {DOCKER_LIST};q=0.000;x=y, a/b; Q = 0.0, */*;q=0.01"], {"*/*"}),
        (['a/b;x="q=0, c/d", e/f'], {"a/b", "e/f"}),
        (["json, a/, /b, a/b/c, */b, a b/c, é/a, */json, a/*"], {"a/*"}),
    ],
)
def test_accept_set(values: list[str], expected: set[str]) -> None:
    assert accept_set(values) == expected


def test_accept_set_is_bounded() -> None:
    assert len(accept_set([f"a/{number}" for number in range(500)])) == 100


@pytest.mark.parametrize(
    ("values", "media_type", "expected"),
    [
        ([], OCI_INDEX, True),
        (["*/*"], OCI_INDEX, True),
        (["application/*"], OCI_INDEX, True),
        (["text/*"], OCI_INDEX, False),
        ([OCI_INDEX], OCI_INDEX, True),
        ([OCI_INDEX], OCI_INDEX.upper() + "; charset=utf-8", True),
        ([OCI_INDEX], OCI_MANIFEST, False),
    ],
)
def test_accepts(values: list[str], media_type: str, expected: bool) -> None:
    assert accepts(accept_set(values), media_type) is expected


@given(st.binary(), st.sampled_from(["sha256", "sha512"]))
def test_fallback_tag(raw: bytes, algorithm: str) -> None:
    digest = Digest.of(raw, algorithm)
    tag = fallback_tag(digest)
    assert tag == f"{algorithm}-{digest.hex[:64]}"
    assert parse_tag(tag) == tag


def test_filter_referrers() -> None:
    one = {**descriptor_json(CONFIG), "artifactType": "a/one", "annotations": {"k": "ä"}}
    other = {**descriptor_json(CONFIG), "artifactType": "a/other"}
    raw = make_document(
        mediaType=OCI_INDEX, manifests=[one, other, descriptor_json(CONFIG), one], annotations={"x": "y"}
    )
    filtered = json.loads(filter_referrers(raw, "a/one"))
    assert filtered == {**json.loads(raw), "manifests": [one, one]}
    assert json.loads(filter_referrers(raw, "a/none"))["manifests"] == []
    assert filter_referrers(EMPTY_INDEX, "a/one") == EMPTY_INDEX


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"manifests":{}}', b'{"manifests":[],"x":1e999}'])
def test_filter_referrers_refuses(raw: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        filter_referrers(raw, "a/one")


@pytest.mark.parametrize(
    ("content_type", "sent"),
    [
        (OCI_MANIFEST, OCI_MANIFEST),
        (DOCKER_SCHEMA1_SIGNED, DOCKER_SCHEMA1_SIGNED),
        ("application/vnd.cncf.helm.config.v1+json", "application/vnd.cncf.helm.config.v1+json"),
        ("application/vnd.example", "application/vnd.example"),
        ("application/JSON", "application/JSON"),
        ("application/json;charset=UTF-8", "application/json;charset=UTF-8"),
        ("application/vnd.a_b!c+d+json", "application/vnd.a_b!c+d+json"),
        ("application/json; charset=utf-16", "application/octet-stream"),  # encodings other than UTF-8 hide scripts
        *(
            (dangerous, "application/octet-stream")
            for dangerous in (
                "", "text/plain", "text/html", "TEXT/HTML", "text/xml", "text/javascript", "text/css",
                "text/event-stream", "image/svg+xml", "image/png", "application/xhtml+xml", "application/xml",
                "application/rss+xml",
                "application/vnd.wap.xhtml+xml", "application/vnd.mozilla.xul+XML", "application/vnd.xml",
                "application/javascript", "application/x-javascript", "application/ecmascript", "application/pdf",
                "multipart/x-mixed-replace", "multipart/related", "message/rfc822", "application/x-shockwave-flash",
                "application/json, text/html", "text/html, application/json", "application/json text/html",
                "application/json\x0b", "application/vnd.", "*/*", "json", "application/+json+xml",
            )
        ),
    ],
)  # fmt: skip
def test_nothing_is_sent_as_a_page(content_type: str, sent: str) -> None:
    assert data_type(content_type) == sent


@given(st.text())
def test_any_content_type_is_sent_as_data(text: str) -> None:
    assert data_type(text) in (text, "application/octet-stream")
    assert MEDIA_TYPE.fullmatch(data_type(text).partition(";")[0].strip())
