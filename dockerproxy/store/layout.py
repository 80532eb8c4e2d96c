"""Where everything lies. The tree is CNCF distribution's (registry/storage/paths.go), so `registry:2` can take it over.

    ROOT
    ├── docker/registry/v2
    │   ├── blobs/ALG/HH/HEX/data                        a content; HH = the first two digits of HEX
    │   └── repositories/NAME
    │       ├── _layers/ALG/HEX/link                     the repository has this blob
    │       ├── _manifests
    │       │   ├── revisions/ALG/HEX/link               the repository has this manifest
    │       │   ├── revisions/ALG/HEX/media-type         (ours) the type it was served or pushed with
    │       │   ├── revisions/ALG/HEX/subject            (ours) what it refers to, ``-`` for nothing; see `referrers`
    │       │   └── tags/TAG
    │       │       ├── current/link                     what the tag means
    │       │       └── index/ALG/HEX/link               what it ever meant
    │       ├── _referrers/ALG/HEX/ALG-HEX               (ours) the descriptor of the second, which refers to the first
    │       └── _uploads/UUID                            a blob that is being pushed
    │           ├── data                                 what has arrived
    │           └── startedat                            when it began (RFC 3339)
    ├── ingest/ALG-HEX                                   (ours) a blob under way, to be resumed after a crash
    ├── damaged/ALG-HEX                                  (ours) what was no content of its digest; see `check`
    └── staging/                                         (ours) nameless files on their way to their place

A link holds ``alg:hex`` and no line end. In the cache NAME starts with the upstream host, ``host`` or ``host:port``.
"""

from __future__ import annotations

import re
from pathlib import Path

from attrs import field, frozen

from dockerproxy.errors import DigestInvalid, NameInvalid
from dockerproxy.oci.names import Digest, parse_tag

# What callers build from validated hosts and repository names; checked here again, for a path is made of it. A
# component can neither hide (`.`, `..`) nor be taken for one of the tree's own (`_layers`). 255: what a file name has.
_COMPONENT = r"[A-Za-z0-9\[][A-Za-z0-9._:\[\]-]{0,254}"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_MAX_REPOSITORY = 1024


@frozen
class Layout:
    """The paths below `root`, as plain strings: each request needs some, and `pathlib` takes 10 µs for one."""

    root: Path
    blobs: str = field(init=False)
    repositories: str = field(init=False)
    ingests: str = field(init=False)
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

    @staging.default
    def _staging(self) -> str:
        return f"{self.root}/staging"

    @damaged.default
    def _damaged(self) -> str:
        return f"{self.root}/damaged"

    def blob(self, digest: Digest) -> str:
        """The data file of a content."""
        return f"{self.blobs}/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}/data"

    def ingest(self, digest: Digest) -> str:
        """The file of a blob under way."""
        return f"{self.ingests}/{digest.algorithm}-{digest.hex}"

    def repository(self, repository: str) -> str:
        """The directory of a repository; raise `NameInvalid` where `repository` could lead anywhere else."""
        if len(repository) > _MAX_REPOSITORY or not _REPOSITORY.fullmatch(repository):
            raise NameInvalid(f"{repository[:300]!r} is not a repository name")
        return f"{self.repositories}/{repository}"

    def layers(self, repository: str) -> str:
        """The directory of a repository's blob links."""
        return f"{self.repository(repository)}/_layers"

    def layer(self, repository: str, digest: Digest) -> str:
        """The link by which a repository has a blob."""
        return f"{self.layers(repository)}/{digest.algorithm}/{digest.hex}/link"

    def manifest(self, repository: str, digest: Digest) -> str:
        """The link by which a repository has a manifest."""
        return f"{self._revision(repository, digest)}/link"

    def media_type(self, repository: str, digest: Digest) -> str:
        """The file that holds a manifest's media type."""
        return f"{self._revision(repository, digest)}/media-type"

    def subject(self, repository: str, digest: Digest) -> str:
        """The file that holds what a manifest refers to, and by being there says that its referrer is noted."""
        return f"{self._revision(repository, digest)}/subject"

    def referrers(self, repository: str, subject: Digest) -> str:
        """The directory of the descriptors of what refers to `subject`."""
        return f"{self.repository(repository)}/_referrers/{subject.algorithm}/{subject.hex}"

    def referrer(self, repository: str, subject: Digest, digest: Digest) -> str:
        """The file that holds the descriptor of manifest `digest`, which refers to `subject`."""
        return f"{self.referrers(repository, subject)}/{digest.algorithm}-{digest.hex}"

    def uploads(self, repository: str) -> str:
        """The directory of a repository's upload sessions."""
        return f"{self.repository(repository)}/_uploads"

    def tags(self, repository: str) -> str:
        """The directory of a repository's tags."""
        return f"{self.repository(repository)}/_manifests/tags"

    def tag(self, repository: str, tag: str) -> str:
        """The directory of a tag; raise `NameInvalid` where `tag` is none."""
        return f"{self.tags(repository)}/{parse_tag(tag)}"

    def tag_current(self, repository: str, tag: str) -> str:
        """The link to what a tag means."""
        return f"{self.tag(repository, tag)}/current/link"

    def tag_index(self, repository: str, tag: str, digest: Digest) -> str:
        """The link that remembers that a tag meant `digest` once."""
        return f"{self.tag(repository, tag)}/index/{digest.algorithm}/{digest.hex}/link"

    def revisions(self, repository: str) -> str:
        """The directory of a repository's manifest links."""
        return f"{self.repository(repository)}/_manifests/revisions"

    def _revision(self, repository: str, digest: Digest) -> str:
        return f"{self.revisions(repository)}/{digest.algorithm}/{digest.hex}"


def digest_from_names(algorithm: str, encoded: str) -> Digest | None:
    """Return the digest that two file names make, or None where they are somebody else's."""
    try:
        return Digest.parse(f"{algorithm}:{encoded}")
    except DigestInvalid:
        return None
