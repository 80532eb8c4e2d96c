"""Paths of a store. The tree is CNCF distribution's (registry/storage/paths.go), so `registry:2` can use it.

    ROOT
    ├── docker/registry/v2
    │   ├── blobs/ALG/HH/HEX/data                        a blob; HH = the first two digits of HEX
    │   └── repositories/NAME
    │       ├── _layers/ALG/HEX/link                     the repository has this blob
    │       ├── _manifests
    │       │   ├── revisions/ALG/HEX/link               the repository has this manifest
    │       │   ├── revisions/ALG/HEX/media-type         (ours) the type it was served or pushed with
    │       │   ├── revisions/ALG/HEX/subject            (ours) its subject, or ``-`` if it has none; see `referrers`
    │       │   └── tags/TAG
    │       │       ├── current/link                     the manifest of the tag
    │       │       ├── orphaned                         (ours) the tag is named after a digest that is gone; see `mark`
    │       │       └── index/ALG/HEX/link               all manifests that the tag has had
    │       ├── _referrers/ALG/HEX/ALG-HEX               (ours) the descriptor of the second, a referrer of the first
    │       └── _uploads/UUID                            an upload session of another registry
    ├── uploads/UUID                                     (ours) a blob that is being pushed; see `uploads`
    ├── ingest/HOST/ALG-HEX                              (ours) a partial download, resumable after a crash
    ├── damaged/ALG-HEX                                  (ours) a blob that did not match its digest; see `scrub`
    └── staging/                                         (ours) temporary files, renamed to their final paths

A link contains ``alg:hex`` without a line end. In the cache, NAME starts with the upstream host (``host`` or
``host:port``).
"""

from __future__ import annotations

import re
from pathlib import Path

from attrs import field, frozen

from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.names import Digest, parse_tag

# Callers build repository names from validated hosts and names. They are checked again here, because paths are built
# from them. A component cannot be hidden (`.`, `..`) or match a name of the tree itself (`_layers`). A file name has at
# most 255 bytes.
_COMPONENT = r"[A-Za-z0-9\[][A-Za-z0-9._:\[\]-]{0,254}"
_HOST = re.compile(_COMPONENT)
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_MAX_REPOSITORY = 1024


@frozen(slots=True)
class IngestKey:
    """Identifies a partial download: the host of the registry that sends it, and the digest of the blob.

    Each registry has its own, because its bytes are unverified until the end.
    """

    host: str
    digest: Digest

    @classmethod
    def parse(cls, text: str) -> IngestKey:
        """Return the key written as ``host/alg:hex``, or raise `DigestInvalid`."""
        host, _, digest = text.partition("/")
        return cls(host, Digest.parse(digest))

    def __str__(self) -> str:
        return f"{self.host}/{self.digest}"


@frozen
class Layout:
    """The paths below `root`, as strings: each request needs several, and `pathlib` takes 10 µs for each."""

    root: Path
    blobs: str = field(init=False)
    repositories: str = field(init=False)
    ingests: str = field(init=False)
    sessions: str = field(init=False)
    staging: str = field(init=False)
    damaged: str = field(init=False)

    @blobs.default
    def _blobs(self) -> str:
        return f"{self.root}/docker/registry/v2/blobs"

    @repositories.default
    def _repositories(self) -> str:
        return f"{self.root}/docker/registry/v2/repositories"

    @ingests.default
    def _ingests(self) -> str:
        return f"{self.root}/ingest"

    @sessions.default
    def _sessions(self) -> str:
        return f"{self.root}/uploads"

    @staging.default
    def _staging(self) -> str:
        return f"{self.root}/staging"

    @damaged.default
    def _damaged(self) -> str:
        return f"{self.root}/damaged"

    @property
    def secret(self) -> str:
        """The secret that signs tokens and identifiers of uploads."""
        return f"{self.root}/secret"

    @property
    def anchors(self) -> tuple[str, str]:
        """The directories that an administrator may have put elsewhere, by symbolic links. There are none below."""
        return self.blobs, self.repositories

    def blob(self, digest: Digest) -> str:
        """Return the data file of a blob."""
        return f"{self.blobs}/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}/data"

    def ingest(self, key: IngestKey) -> str:
        """Return the file of an ingest. Raises `NameInvalid` if the key's host could lead elsewhere."""
        if not _HOST.fullmatch(key.host):
            raise NameInvalid(f"{key.host[:300]!r} is not a host")
        return f"{self.ingests}/{key.host}/{key.digest.algorithm}-{key.digest.hex}"

    def repository(self, repository: str) -> str:
        """Return the directory of a repository. Raises `NameInvalid` if `repository` could lead elsewhere."""
        if len(repository) > _MAX_REPOSITORY or not _REPOSITORY.fullmatch(repository):
            raise NameInvalid(f"{repository[:300]!r} is not a repository name")
        return f"{self.repositories}/{repository}"

    def layers(self, repository: str) -> str:
        """Return the directory of a repository's blob links."""
        return f"{self.repository(repository)}/_layers"

    def layer(self, repository: str, digest: Digest) -> str:
        """Return the link that makes a blob part of a repository."""
        return f"{self.layers(repository)}/{digest.algorithm}/{digest.hex}/link"

    def manifest(self, repository: str, digest: Digest) -> str:
        """Return the link that makes a manifest part of a repository."""
        return f"{self._revision(repository, digest)}/link"

    def media_type(self, repository: str, digest: Digest) -> str:
        """Return the file that contains a manifest's media type."""
        return f"{self._revision(repository, digest)}/media-type"

    def orphaned_tag(self, repository: str, tag: str) -> str:
        """Return the file that exists if the name of a tag is derived from a digest that the repository had once."""
        return f"{self.tag(repository, tag)}/orphaned"

    def subject(self, repository: str, digest: Digest) -> str:
        """Return the file that contains a manifest's subject. Its existence shows that the manifest is indexed."""
        return f"{self._revision(repository, digest)}/subject"

    def referrers(self, repository: str, subject: Digest) -> str:
        """Return the directory of the descriptors of `subject`'s referrers."""
        return f"{self.repository(repository)}/_referrers/{subject.algorithm}/{subject.hex}"

    def referrer(self, repository: str, subject: Digest, digest: Digest) -> str:
        """Return the file that contains the descriptor of the manifest `digest`, a referrer of `subject`."""
        return f"{self.referrers(repository, subject)}/{digest.algorithm}-{digest.hex}"

    def foreign_uploads(self, repository: str) -> str:
        """Return the directory in which another registry keeps a repository's upload sessions."""
        return f"{self.repository(repository)}/_uploads"

    def tags(self, repository: str) -> str:
        """Return the directory of a repository's tags."""
        return f"{self.repository(repository)}/_manifests/tags"

    def tag(self, repository: str, tag: str) -> str:
        """Return the directory of a tag. Raises `NameInvalid` if `tag` is not a valid tag."""
        return f"{self.tags(repository)}/{parse_tag(tag)}"

    def tag_current(self, repository: str, tag: str) -> str:
        """Return the link to the manifest of a tag."""
        return f"{self.tag(repository, tag)}/current/link"

    def tag_index(self, repository: str, tag: str, digest: Digest) -> str:
        """Return the link in a tag's index that records that the tag has pointed to `digest`."""
        return f"{self.tag(repository, tag)}/index/{digest.algorithm}/{digest.hex}/link"

    def revisions(self, repository: str) -> str:
        """Return the directory of a repository's manifest links."""
        return f"{self.repository(repository)}/_manifests/revisions"

    def _revision(self, repository: str, digest: Digest) -> str:
        return f"{self.revisions(repository)}/{digest.algorithm}/{digest.hex}"


def ingest_key_from_names(host: str, name: str) -> IngestKey | None:
    """Return the key of the ingest in the directory `host` with the file name `name`, or None if it is no ingest."""
    algorithm, dash, encoded = name.partition("-")
    digest = digest_from_names(algorithm, encoded) if dash else None
    return IngestKey(host, digest) if digest is not None and _HOST.fullmatch(host) else None


def digest_from_names(algorithm: str, encoded: str) -> Digest | None:
    """Return the digest that two file names form, or None if they do not form a digest."""
    try:
        return Digest.parse(f"{algorithm}:{encoded}")
    except DigestInvalid:
        return None
