"""Referrers: the descriptor of a manifest, and the index."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.oci.referrers import ReferrersQuery, build_index, make_referrer

SUBJECT = Digest.of(b"subject")
CONFIG = {"mediaType": "application/vnd.config", "digest": str(Digest.of(b"c")), "size": 1}


def make(media_type: str, **fields: Any) -> Any:
    content = json.dumps({"mediaType": media_type, "subject": {"digest": str(SUBJECT), "size": 9}, **fields}).encode()
    return make_referrer(parse_manifest(content, media_type), Digest.of(content), len(content))


def test_artifact_type_of_an_image() -> None:
    referrer_with_type = make(OCI_MANIFEST, config=CONFIG, layers=[], artifactType="application/vnd.own")
    assert referrer_with_type.subject == SUBJECT
    assert referrer_with_type.descriptor["artifactType"] == "application/vnd.own"
    for fields in ({}, {"artifactType": ""}):
        assert (
            make(OCI_MANIFEST, config=CONFIG, layers=[], **fields).descriptor["artifactType"]
            == "application/vnd.config"
        )


def test_artifact_type_of_an_index() -> None:
    assert make(OCI_INDEX, manifests=[], artifactType="application/vnd.own").descriptor["artifactType"]
    assert "artifactType" not in make(OCI_INDEX, manifests=[]).descriptor


def test_annotations() -> None:
    assert make(OCI_INDEX, manifests=[], annotations={"a": "b"}).descriptor["annotations"] == {"a": "b"}
    for value in (None, {}, [], "x"):
        assert "annotations" not in make(OCI_INDEX, manifests=[], annotations=value).descriptor


def test_manifest_without_a_subject() -> None:
    content = json.dumps({"mediaType": OCI_INDEX, "manifests": []}).encode()
    assert make_referrer(parse_manifest(content, OCI_INDEX), Digest.of(content), len(content)) is None


def test_build_index() -> None:
    assert json.loads(build_index([])) == {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    assert json.loads(build_index([b'{"a":1}', b'{"b":2}']))["manifests"] == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("text", "artifact_type", "last"),
    [
        ("", None, None),
        ("artifactType=a%2Fb&n=5", "a/b", None),
        ("last=x&artifactType=", "", "x"),
        ("artifactType=a&artifactType=b", "a", None),
    ],
)
def test_query(text: str, artifact_type: str | None, last: str | None) -> None:
    assert ReferrersQuery.parse(text) == ReferrersQuery(text, artifact_type, last)
