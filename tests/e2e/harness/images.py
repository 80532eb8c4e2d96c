"""Builds small images, identical in every run: schema 2, OCI, multi-platform indexes and referrers."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

ACCEPT_MANIFESTS = ", ".join((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST))


def random_bytes(size: int, seed: str) -> bytes:
    """Return `size` pseudo-random bytes, which cannot be compressed."""
    rng = random.Random(seed)
    return b"".join(rng.randbytes(min(size - start, 1 << 20)) for start in range(0, size, 1 << 20))


def sha256_digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@frozen
class TypedContent:
    """Bytes with their media type and digest."""

    media_type: str
    data: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        return sha256_digest(self.data)

    def descriptor(self, **extra: Any) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data), **extra}


@frozen
class SampleImage:
    """A manifest and everything that it references; an index has `children` and no blobs."""

    manifest: TypedContent
    blobs: tuple[TypedContent, ...] = ()
    children: tuple[SampleImage, ...] = ()

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def layers(self) -> tuple[TypedContent, ...]:
        return self.blobs[1:]

    def children_first(self) -> Iterator[SampleImage]:
        """Yield the children and then the image itself, which is the order of a push."""
        for child in self.children:
            yield from child.children_first()
        yield self


def build_image(
    layers: Sequence[Mapping[str, bytes]],
    *,
    oci: bool = True,
    architecture: str = "amd64",
    command: Sequence[str] = ("/hello",),
    subject: TypedContent | None = None,
) -> SampleImage:
    """Return an image with these files in its layers (path to content; all files are executable)."""
    layer_tars = [_make_tar(files) for files in layers]
    compressed_layers = [
        TypedContent(OCI_LAYER if oci else DOCKER_LAYER, gzip.compress(tar, mtime=0)) for tar in layer_tars
    ]
    config = TypedContent(
        OCI_CONFIG if oci else DOCKER_CONFIG,
        _encode_json(
            {
                "architecture": architecture,
                "os": "linux",
                "created": "2025-06-15T00:00:00Z",
                "config": {"Cmd": list(command)},
                "rootfs": {"type": "layers", "diff_ids": [sha256_digest(tar) for tar in layer_tars]},
                "history": [{"created": "2025-06-15T00:00:00Z", "created_by": "the tests"} for _ in layer_tars],
            }
        ),
    )
    return build_image_from_blobs(config, compressed_layers, oci=oci, subject=subject)


def build_image_from_blobs(
    config: TypedContent, layers: Sequence[TypedContent], *, oci: bool = True, subject: TypedContent | None = None
) -> SampleImage:
    """Return an image with these blobs, which may have any content."""
    media_type = OCI_MANIFEST if oci else DOCKER_MANIFEST
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": config.descriptor(),
        "layers": [layer.descriptor() for layer in layers],
    }
    if subject is not None:
        manifest["subject"] = subject.descriptor()
    return SampleImage(TypedContent(media_type, _encode_json(manifest)), (config, *layers))


def build_index(children: Mapping[str, SampleImage], *, oci: bool = True) -> SampleImage:
    """Return the index (or manifest list) of `children`, by architecture."""
    media_type = OCI_INDEX if oci else DOCKER_LIST
    manifests = [
        child.manifest.descriptor(platform={"architecture": architecture, "os": "linux"})
        for architecture, child in children.items()
    ]
    content = TypedContent(
        media_type, _encode_json({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests})
    )
    return SampleImage(content, children=tuple(children.values()))


def build_small_image(seed: str, *, oci: bool = True, size: int = 40_000, layers: int = 2) -> SampleImage:
    """Return an image that differs for each `seed`, with `layers` layers of `size` bytes."""
    return build_image(
        [{f"data/{seed}-{number}": random_bytes(size, f"{seed}/{number}")} for number in range(layers)], oci=oci
    )


def _encode_json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def _make_tar(files: Mapping[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(data), 0o755, 1_750_000_000
            tar.addfile(member, io.BytesIO(data))
    return raw.getvalue()
