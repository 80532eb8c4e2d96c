from __future__ import annotations

import json
from typing import Any

from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST, parse_manifest
from dockerproxy.oci.names import Digest
from dockerproxy.oci.referrers import index_of, referrer

SUBJECT = Digest.of(b"subject")
CONFIG = {"mediaType": "application/vnd.config", "digest": str(Digest.of(b"c")), "size": 1}


def found(media_type: str, **fields: Any) -> Any:
    content = json.dumps({"mediaType": media_type, "subject": {"digest": str(SUBJECT), "size": 9}, **fields}).encode()
    return referrer(parse_manifest(content, media_type), content, Digest.of(content))


def test_an_image_is_of_its_own_type_or_its_configs() -> None:
    own = found(OCI_MANIFEST, config=CONFIG, layers=[], artifactType="application/vnd.own")
    assert own.subject == SUBJECT
    assert own.descriptor["artifactType"] == "application/vnd.own"
    for told in ({}, {"artifactType": ""}):
        assert (
            found(OCI_MANIFEST, config=CONFIG, layers=[], **told).descriptor["artifactType"] == "application/vnd.config"
        )


def test_an_index_is_of_its_own_type_or_none() -> None:
    assert found(OCI_INDEX, manifests=[], artifactType="application/vnd.own").descriptor["artifactType"]
    assert "artifactType" not in found(OCI_INDEX, manifests=[]).descriptor


def test_annotations() -> None:
    assert found(OCI_INDEX, manifests=[], annotations={"a": "b"}).descriptor["annotations"] == {"a": "b"}
    for nothing in (None, {}, [], "x"):
        assert "annotations" not in found(OCI_INDEX, manifests=[], annotations=nothing).descriptor


def test_without_a_subject_it_refers_to_nothing() -> None:
    content = json.dumps({"mediaType": OCI_INDEX, "manifests": []}).encode()
    assert referrer(parse_manifest(content, OCI_INDEX), content, Digest.of(content)) is None


def test_the_index() -> None:
    assert json.loads(index_of([])) == {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    assert json.loads(index_of([b'{"a":1}', b'{"b":2}']))["manifests"] == [{"a": 1}, {"b": 2}]
