"""Names of images as people write them for docker, podman and Kubernetes, such as ``nginx:1.29``."""

from __future__ import annotations

from attrs import frozen

from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.docker_hub import DOCKER_HUB, DOCKER_HUB_ALIASES
from dockerproxy.oci.names import Digest, Host, Reference, Repository, Tag, parse_repository, parse_tag

DOCKER_IO = Host.parse("docker.io")

_HUB_NAMES = frozenset(server.host for server in (DOCKER_HUB, *DOCKER_HUB_ALIASES))
_MAX_NAME = 600  # characters: a host, a repository, a tag and a digest
_SHOWN = 100  # characters of a wrong name in an error


@frozen(order=True)
class ImageName:
    """The name of an image: the host of its registry, ``docker.io`` for Docker Hub, a repository, and a tag or digest.

    The rules are those of distribution/reference, "normalize.go": without a host it is Docker Hub, a single name there
    is in ``library/``, and the tag is ``latest``. A tag beside a digest does not count.
    """

    host: Host
    repository: Repository
    reference: Reference

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """Return the image that `text` names. Raise `NameInvalid`, with a sentence that quotes it."""
        if len(text) > _MAX_NAME:
            raise _not_an_image(text)
        name, at, encoded = text.partition("@")
        host, slash, rest = name.partition("/")
        if not slash or not ("." in host or ":" in host or host == "localhost"):
            host, rest = str(DOCKER_IO), name
        path, colon, tag = rest.partition(":")
        try:
            parsed_host = Host.parse(host)
            if parsed_host in _HUB_NAMES:
                parsed_host = DOCKER_IO
                path = path if "/" in path else f"library/{path}"
            repository = parse_repository(path)
            parsed_tag = parse_tag(tag) if colon else Tag("latest")
            return cls(parsed_host, repository, Digest.parse(encoded) if at else parsed_tag)
        except (NameInvalid, DigestInvalid):
            raise _not_an_image(text) from None

    def __str__(self) -> str:
        """Return the full name, as ``docker.io/library/nginx:1.29``."""
        separator = "@" if isinstance(self.reference, Digest) else ":"
        return f"{self.host}/{self.repository}{separator}{self.reference}"


def _not_an_image(text: str) -> NameInvalid:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return NameInvalid(f"{shown!r} is not the name of an image, such as nginx:1.29 or quay.io/org/app:v2")
