"""Manifests: their media types, the content they refer to, and the types that a client accepts.

A manifest is always stored and sent as the bytes in which it arrived. It is parsed only to find its references.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import field, frozen

from dockerproxy.errors import DigestInvalid, ManifestInvalid
from dockerproxy.oci.lists import elements
from dockerproxy.oci.names import Digest, Tag
from dockerproxy.oci.untrusted_json import JSONInvalid, parse_json

DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"

IMAGE_TYPES = frozenset({DOCKER_MANIFEST, OCI_MANIFEST})
INDEX_TYPES = frozenset({DOCKER_LIST, OCI_INDEX})
SCHEMA1_TYPES = frozenset({DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED})

KNOWN_TYPES = IMAGE_TYPES | INDEX_TYPES | SCHEMA1_TYPES
"""The types for which `parse_manifest` checks the required fields."""

MAX_MANIFEST = 4 * 1024 * 1024  # distribution-spec 1.1, "Pushing Manifests": at least 4 MiB
EMPTY_INDEX = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}'

# Types that servers send if they do not know the real one. The content then determines it.
_GENERIC_TYPES = frozenset({"", "application/json", "application/octet-stream", "binary/octet-stream", "text/plain"})
MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,126}/[a-z0-9][a-z0-9!#$&^_.+-]{0,126}", re.IGNORECASE | re.ASCII)

# JSON of any kind, and media types of images and artifacts.
_DATA_TYPE = re.compile(
    r"application/(?:octet-stream|(?:[a-z0-9!#$&^_.+-]+\+)?json|vnd\.[a-z0-9!#$&^_.+-]+(?<!xml))"
    r"(?:[ \t]*;[ \t]*charset=\"?utf-8\"?)?",
    re.IGNORECASE | re.ASCII,
)
_MEDIA_RANGE = re.compile(rf"\*/\*|[a-z0-9][a-z0-9!#$&^_.+-]{{0,126}}/\*|{MEDIA_TYPE.pattern}")
_ZERO_QUALITY = re.compile(r";[ \t]*q[ \t]*=[ \t]*0(?:\.0*)?[ \t]*(?:;|$)", re.IGNORECASE)
_MAX_MEDIA_RANGES = 100
_NONDISTRIBUTABLE = re.compile(
    r"application/vnd\.(?:oci\.image\.layer\.nondistributable\.v1|docker\.image\.rootfs\.foreign\.diff)\b"
)

_FALLBACK_TAG = re.compile(r"((?:sha256|sha512)-[0-9a-f]{64})(?:\.[\w.-]+)?", re.ASCII)
_Document = dict[str, Any]


@frozen(slots=True)
class Descriptor:
    """A reference to a blob or manifest. If the manifest does not state them, as schema 1 never does, `media_type` is
    empty and `size` (bytes) is None."""

    media_type: str
    digest: Digest
    size: int | None


@frozen(slots=True)
class Manifest:
    """The references of a manifest: `config` and `layers` are blobs, `manifests` (of an index) are manifests.

    `artifact_type` is the type that the referrers API reports (distribution-spec 1.1, "Listing Referrers"). It is the
    manifest's own; if an image manifest has none, it is the media type of the config. `annotations` has those that are
    strings, as image-spec 1.1, "Annotations", requires.
    """

    media_type: str
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()
    manifests: tuple[Descriptor, ...] = ()
    subject: Descriptor | None = None
    artifact_type: str | None = None
    annotations: Mapping[str, str] = field(factory=dict, hash=False)


def data_type(content_type: str) -> str:
    """Return `content_type` if it is one of data, else `application/octet-stream`.

    The content of others, such as another server or whoever pushed it, is sent under our name, where it must not be a
    page or a script for any browser: no HTML, SVG or XML.
    """
    if content_type in KNOWN_TYPES or _DATA_TYPE.fullmatch(content_type):
        return content_type
    return "application/octet-stream"


def parse_manifest(content: bytes, media_type: str | None) -> Manifest:
    """Return the references in `content`, read as `media_type` (a Content-Type).

    If `media_type` is None or generic, the content determines the type. Raise `ManifestInvalid` if the content is not a
    manifest of that type.
    """
    document = _parse_object(content)
    actual_type = _essence(media_type or "")
    if actual_type in _GENERIC_TYPES:
        actual_type = _document_type(document)
    elif document.get("mediaType") not in (None, "") and _document_type(document) != actual_type:
        raise ManifestInvalid("the manifest's mediaType differs from its Content-Type")
    _check_unambiguous(document)
    if actual_type in SCHEMA1_TYPES:
        return Manifest(
            actual_type, layers=tuple(_parse_schema1_layer(layer) for layer in _get_list(document, "fsLayers"))
        )
    if actual_type in INDEX_TYPES:
        _require_fields(document, "manifests")
    elif actual_type in IMAGE_TYPES:
        _require_fields(document, "config", "layers")
    config = _get_descriptor(document, "config")
    if config is None and actual_type in IMAGE_TYPES:
        raise ManifestInvalid("the manifest has no config")
    artifact_type = _get_string(document, "artifactType") or (config.media_type if config is not None else "")
    return Manifest(
        actual_type,
        config=config,
        layers=tuple(_parse_descriptor(item) for item in _get_list(document, "layers")),
        manifests=tuple(_parse_descriptor(item) for item in _get_list(document, "manifests")),
        subject=_get_descriptor(document, "subject"),
        artifact_type=artifact_type or None,
        annotations=_get_annotations(document),
    )


def is_nondistributable(media_type: str) -> bool:
    """Return whether a layer of this type is fetched from its vendor, because nobody else may distribute it.

    A push does not include such a layer (image-spec 1.1, "Non-distributable Layers").
    """
    return _NONDISTRIBUTABLE.match(media_type) is not None


def media_type_of(content: bytes) -> str:
    """Return the media type of a manifest that came without one: its `mediaType` field, or else the type that its
    fields imply.

    Raise `ManifestInvalid` if the content is not a manifest.
    """
    return _document_type(_parse_object(content))


def _document_type(document: _Document) -> str:
    media_type = _get_string(document, "mediaType").lower()
    if media_type:
        if not MEDIA_TYPE.fullmatch(media_type):
            raise ManifestInvalid("the manifest's mediaType is not a media type")
        return media_type
    if "manifests" in document:
        return OCI_INDEX
    if "config" in document or "layers" in document:
        return OCI_MANIFEST
    if document.get("schemaVersion") == 1:
        return DOCKER_SCHEMA1_SIGNED if "signatures" in document else DOCKER_SCHEMA1
    raise ManifestInvalid("the content is not a manifest")


def _parse_object(content: bytes) -> _Document:
    """Return the JSON object in `content`. Raise `ManifestInvalid`."""
    if len(content) > MAX_MANIFEST:
        raise ManifestInvalid(f"the manifest is longer than {MAX_MANIFEST} bytes")
    try:
        document = parse_json(content)
    except JSONInvalid as error:
        raise ManifestInvalid(f"the manifest {error}") from None
    if not isinstance(document, dict):
        raise ManifestInvalid("the manifest is not a JSON object")
    return document


def _check_unambiguous(document: _Document) -> None:
    """Refuse content that some readers take for an image and others for an index (CVE-2021-41190)."""
    shapes = (("manifests",), ("config", "layers"), ("fsLayers",))
    if sum(any(document.get(name) is not None for name in shape) for shape in shapes) > 1:
        raise ManifestInvalid("the content is an image and an index at the same time")


def _require_fields(document: _Document, *names: str) -> None:
    for name in names:
        if name not in document:
            raise ManifestInvalid(f"the manifest has no {name}")


def _get_string(document: _Document, name: str) -> str:
    value = document.get(name)
    if value is not None and not isinstance(value, str):
        raise ManifestInvalid(f"{name} is not a string")
    return value or ""


def _get_list(document: _Document, name: str) -> list[Any]:
    # Go writes an empty slice as null.
    value = document.get(name)
    if value is not None and not isinstance(value, list):
        raise ManifestInvalid(f"{name} is not a list")
    return value or []


def _get_annotations(document: _Document) -> dict[str, str]:
    value = document.get("annotations")
    return {name: text for name, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}


def _get_descriptor(document: _Document, name: str) -> Descriptor | None:
    value = document.get(name)
    return None if value is None else _parse_descriptor(value)


def _parse_descriptor(value: Any) -> Descriptor:
    if not isinstance(value, dict):
        raise ManifestInvalid("a descriptor is not a JSON object")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
        raise ManifestInvalid("a descriptor has no valid size")
    return Descriptor(_get_string(value, "mediaType"), _get_digest(value, "digest"), size)


def _parse_schema1_layer(value: Any) -> Descriptor:
    if not isinstance(value, dict):
        raise ManifestInvalid("a layer is not a JSON object")
    return Descriptor("", _get_digest(value, "blobSum"), None)


def _get_digest(document: _Document, name: str) -> Digest:
    try:
        return Digest.parse(_get_string(document, name))
    except DigestInvalid as error:
        raise ManifestInvalid(error.message) from None


def _essence(media_type: str) -> str:
    return media_type.partition(";")[0].strip(" \t").lower()


def accept_set(values: Iterable[str]) -> frozenset[str]:
    """Return the media ranges of all Accept fields, lower-case and without parameters.

    Malformed ranges, ranges refused by ``q=0`` and all after the first hundred are left out.
    """
    media_ranges: set[str] = set()
    for value in values:
        for element in elements(value):
            media_range = _essence(element)
            if _MEDIA_RANGE.fullmatch(media_range) and not _ZERO_QUALITY.search(element):
                media_ranges.add(media_range)
            if len(media_ranges) == _MAX_MEDIA_RANGES:
                return frozenset(media_ranges)
    return frozenset(media_ranges)


def accepts(media_ranges: frozenset[str], media_type: str) -> bool:
    """Return whether a client that sent `media_ranges` accepts `media_type`. No media ranges accept every type."""
    essence = _essence(media_type)
    return not media_ranges or bool(media_ranges & {essence, essence.partition("/")[0] + "/*", "*/*"})


def accept_key(media_ranges: frozenset[str]) -> str:
    """Return a key for `media_ranges`: 32 hex digits, the same on every machine and in every run."""
    return hashlib.sha256("\n".join(sorted(media_ranges)).encode("ascii")).hexdigest()[:32]


def fallback_tag(digest: Digest) -> Tag:
    """Return the tag under which clients list the referrers of `digest` if a registry has no referrers API.

    A longer encoding is cut to 64 characters (distribution-spec 1.1, "Referrers Tag Schema").
    """
    return Tag(f"{digest.algorithm}-{digest.hex[:64]}")


def fallback_base(tag: str) -> str | None:
    """Return the `fallback_tag` of the digest that a tag's name is derived from. Return None if it is another name.

    Besides the tag of the referrers themselves there are those of cosign: ``.sig``, ``.att``, ``.sbom``.
    """
    match = _FALLBACK_TAG.fullmatch(tag)
    return None if match is None else match[1]


def filter_referrers(index: bytes, artifact_type: str) -> bytes:
    """Return the referrers `index` with only the descriptors of `artifact_type`. Raise `ManifestInvalid`."""
    document = _parse_object(index)
    descriptors = [item for item in _get_list(document, "manifests") if isinstance(item, dict)]
    matching = [item for item in descriptors if item.get("artifactType") == artifact_type]
    try:
        return json.dumps({**document, "manifests": matching}, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (ValueError, RecursionError):
        raise ManifestInvalid("the index contains a value that JSON cannot represent") from None
