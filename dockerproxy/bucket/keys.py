"""The keys of the objects in a bucket.

The keys of blobs and repositories are those of CNCF distribution's s3 driver: the paths of `store.layout`. Ours are
beside them, and below `dockerproxy/`:

    dockerproxy/damaged/ALG-HEX      a content that did not match its digest; see `bucket_check`
    dockerproxy/catalog/NAME         empty: the repository has a manifest; NAME has `!` in place of `/`
    dockerproxy/indexed/NAME         empty: all manifests that it had were looked at for subjects
    dockerproxy/probe/…              empty: a daemon is trying whether it may write
    dockerproxy/taken-over           empty: the repositories of the registry that wrote the bucket are in the catalog

`!` sorts before all that names have, so the order of the keys is that of the components of names, and a listing of the
catalog is one of a single directory, also in stores that keep directories.
"""

from __future__ import annotations

import re
from pathlib import Path

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import MAX_REPOSITORY, Digest, Repository, parse_repository, parse_tag
from dockerproxy.store.layout import Layout, digest_from_names

_ROOT = "bucket"
PATH_PREFIX = f"{_ROOT}/"
LAYOUT = Layout(Path(_ROOT))
"""The paths of a tree in a bucket: its keys with `PATH_PREFIX` before them."""

CATALOG = "dockerproxy/catalog/"
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_IN_ORDER = dict.fromkeys(range(ord("!") + 1), '"') | {ord("/"): "!"}
TAKEN_OVER = "dockerproxy/taken-over"
PROBES = "dockerproxy/probe/"
DAMAGED = "dockerproxy/damaged/"
_INDEXED = "dockerproxy/indexed/"

BLOBS = f"{LAYOUT.blobs}/".removeprefix(PATH_PREFIX)
REPOSITORIES = f"{LAYOUT.repositories}/".removeprefix(PATH_PREFIX)


def blob_key(digest: Digest) -> str:
    """Return the key of a blob's content."""
    return _key(LAYOUT.blob(digest))


def content_of(key: str) -> Digest | None:
    """Return the digest if `key` is that of a content."""
    match key.removeprefix(BLOBS).split("/"):
        case [algorithm, part, encoded, "data"] if encoded.startswith(part):
            return digest_from_names(algorithm, encoded)
    return None


def damaged_key(digest: Digest) -> str:
    """Return the key of a content that was moved aside because it does not match its digest."""
    return f"{DAMAGED}{digest.algorithm}-{digest.hex}"


def layer_key(repository: str, digest: Digest) -> str:
    """Return the key of the link that makes a blob a part of a repository."""
    return _key(LAYOUT.layer(repository, digest))


def layers_prefix(repository: str) -> str:
    """Return the prefix of the links to a repository's blobs."""
    return f"{_key(LAYOUT.layers(repository))}/"


def revisions_prefix(repository: str) -> str:
    """Return the prefix of the links to a repository's manifests, and of the objects beside them."""
    return f"{_key(LAYOUT.revisions(repository))}/"


def manifest_key(repository: str, digest: Digest) -> str:
    """Return the key of the link that makes a manifest a part of a repository."""
    return _key(LAYOUT.manifest(repository, digest))


def media_type_key(repository: str, digest: Digest) -> str:
    """Return the key of a manifest's media type."""
    return _key(LAYOUT.media_type(repository, digest))


def subject_key(repository: str, digest: Digest) -> str:
    """Return the key of a manifest's subject, or of ``-``. It exists if the manifest is indexed."""
    return _key(LAYOUT.subject(repository, digest))


def referrers_prefix(repository: str, subject: Digest) -> str:
    """Return the prefix of the descriptors of a manifest's referrers."""
    return f"{_key(LAYOUT.referrers(repository, subject))}/"


def referrer_key(repository: str, subject: Digest, digest: Digest) -> str:
    """Return the key of the descriptor of the manifest `digest`, a referrer of `subject`."""
    return _key(LAYOUT.referrer(repository, subject, digest))


def tags_prefix(repository: str) -> str:
    """Return the prefix of a repository's tags."""
    return f"{_key(LAYOUT.tags(repository))}/"


def tag_prefix(repository: str, tag: str) -> str:
    """Return the prefix of all keys of a tag."""
    return f"{_key(LAYOUT.tag(repository, tag))}/"


def tag_key(repository: str, tag: str) -> str:
    """Return the key of the link to the manifest of a tag."""
    return _key(LAYOUT.tag_current(repository, tag))


def tag_index_key(repository: str, tag: str, digest: Digest) -> str:
    """Return the key of the link that records that a tag has had this manifest."""
    return _key(LAYOUT.tag_index(repository, tag, digest))


def orphaned_key(repository: str, tag: str) -> str:
    """Return the key that exists if the name of a tag is derived from a digest that the repository had once."""
    return _key(LAYOUT.orphaned_tag(repository, tag))


def own_prefix(repository: str) -> str:
    """Return the prefix of all keys of a repository, and of no other one."""
    return f"{_key(LAYOUT.repository(repository))}/_"


def catalog_key(repository: str) -> str:
    """Return the key that puts a repository into the catalog."""
    return f"{CATALOG}{repository.replace('/', '!')}"


def catalog_mark(last: str) -> str:
    """Return the key after which the repositories are that come after `last`, which may be any text.

    "!" is in place of the separator and before all characters of names, so names are in order component by component.
    Other characters before these, which only `last` may have, come behind the separator. The key is short ASCII.
    """
    return CATALOG + _NOT_ASCII.sub("~", last[: MAX_REPOSITORY + 1]).translate(_IN_ORDER)


def indexed_key(repository: str) -> str:
    """Return the key that exists if all manifests of a repository have a subject key."""
    return f"{_INDEXED}{repository.replace('/', '!')}"


def catalog_name(key: str) -> Repository | None:
    """Return the repository of a key of the catalog."""
    try:
        return parse_repository(key.removeprefix(CATALOG).replace("!", "/"))
    except NameInvalid:
        return None


def repository_of(key: str) -> Repository | None:
    """Return the repository that a key below `REPOSITORIES` belongs to."""
    name, separator, _ = key.removeprefix(REPOSITORIES).partition("/_")
    try:
        return parse_repository(name) if separator and key.startswith(REPOSITORIES) else None
    except NameInvalid:
        return None


def revision_of(key: str) -> tuple[Digest, str] | None:
    """Return the digest in a key of a revision, or of a link to a blob, and the name of the object at its end."""
    *_, algorithm, encoded, name = f"//{key}".split("/")
    digest = digest_from_names(algorithm, encoded)
    return None if digest is None else (digest, name)


def referrer_of(key: str) -> Digest | None:
    """Return the referrer in the key of a descriptor."""
    algorithm, _, encoded = key.rpartition("/")[2].partition("-")
    return digest_from_names(algorithm, encoded)


def tag_of(key: str) -> str | None:
    """Return the tag if `key` is the link to the manifest of a tag."""
    directory, _, name = key.rpartition("/current/")
    try:
        return parse_tag(directory.rpartition("/")[2]) if name == "link" else None
    except NameInvalid:
        return None


def _key(path: str) -> str:
    return path.removeprefix(PATH_PREFIX)
