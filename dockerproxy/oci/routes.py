"""Routes of the distribution API: one URL path in, one `Target` out.

    /v2/                                    BASE
    /v2/_catalog                            CATALOG
    /v2/NAME/tags/list                      TAGS
    /v2/NAME/manifests/TAG-or-DIGEST        MANIFEST
    /v2/NAME/blobs/DIGEST                   BLOB
    /v2/NAME/referrers/DIGEST               REFERRERS
    /v2/NAME/blobs/uploads/                 UPLOADS
    /v2/NAME/blobs/uploads/SESSION          UPLOAD

A repository name may itself contain the components `blobs`, `manifests` or `tags`. A path is therefore read from its
right end.

A path must mean the same to us and to every server behind us (only the hosted registry has none, see `route_hosted`).
Below `/v2/` it therefore has one spelling: no dot segment, no empty one, no backslash, no `;parameter`, and no escape
but those of visible characters that names contain.
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import lru_cache
from urllib.parse import unquote, unquote_plus

from attrs import frozen

from dockerproxy.errors import BadRequest, NameInvalid, NameUnknown, RegistryError
from dockerproxy.oci.names import Digest, Reference, Repository, Tag, parse_reference, parse_repository

_VISIBLE = re.compile(r"[!-~]*")
_AMBIGUOUS = re.compile(r"[;\\]|//")  # some servers cut off `;x`, read a backslash as a slash, or merge slashes
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")
_SESSION = re.compile(r"[A-Za-z0-9_=.~-]{1,512}")

_NO_NAME = Repository("")
_NO_REFERENCE = Tag("")

_ESCAPED_SLASH = re.compile("%2[Ff]")

_MAX_QUERY = 8192
_MAX_PARAMETERS = 100
_MAX_DECODINGS = 8

# Parameters of a pull: those of distribution-spec 1.1, and the one in the Link fields of Quay.
_PULL_PARAMETERS = frozenset({"n", "last", "artifactType", "next_page"})


class Kind(StrEnum):
    """The resources of distribution-spec 1.1, "Endpoints", and the catalog of CNCF distribution.

    A member is its label in the metrics. It hashes as a str does, which each request needs several times.
    """

    BASE = "base"
    CATALOG = "catalog"
    TAGS = "tags"
    MANIFEST = "manifest"
    BLOB = "blob"
    REFERRERS = "referrers"
    UPLOADS = "uploads"
    UPLOAD = "upload"


LIST_KINDS = frozenset({Kind.CATALOG, Kind.TAGS})
"""The kinds that list names. They are pulls, and no cache answers them."""


@frozen(slots=True)
class Target:
    """The resource that a path names.

    `name` is empty for BASE and CATALOG. `reference` belongs to MANIFEST, BLOB and REFERRERS, `session` to UPLOAD; both
    are empty for the others.
    """

    kind: Kind
    name: Repository = _NO_NAME
    reference: Reference = _NO_REFERENCE
    session: str = ""

    @property
    def digest(self) -> Digest:
        """The reference of a BLOB, of REFERRERS, or of a MANIFEST that is named by its digest."""
        if not isinstance(self.reference, Digest):
            raise ValueError(f"the reference {self.reference!r} is not a digest")
        return self.reference


def kind_of(path: str) -> str:
    """Return the kind of resource at `path`, which may have a query; "other" if it is none of the API."""
    try:
        return route(path.partition("?")[0]).kind
    except RegistryError:
        return "other"


@lru_cache(1024)  # nodes of a fleet request the same paths; a valid path has at most 3 KiB
def route(path: str) -> Target:
    """Return the target of `path` (without its query, percent-encoded as received).

    Raise `NameInvalid` or `DigestInvalid` if a name does not match the grammar, and `NameUnknown` if this API has no
    such path.
    """
    if not is_api_path(path):
        raise NameUnknown("the path is not below /v2/")
    parts = _segments(path)
    if parts[0] or parts[1] != "v2":
        raise NameInvalid("the path contains an ambiguous spelling of /v2/")
    match parts[2:]:
        case [] | [""]:
            return Target(Kind.BASE)
        case ["_catalog"]:
            return Target(Kind.CATALOG)
        case [*name, "tags", "list"]:
            return Target(Kind.TAGS, _parse_repository_parts(name))
        case [*name, "manifests", reference]:
            return Target(Kind.MANIFEST, _parse_repository_parts(name), parse_reference(reference))
        case [*name, "blobs", "uploads"] | [*name, "blobs", "uploads", ""]:
            return Target(Kind.UPLOADS, _parse_repository_parts(name))
        case [*name, "blobs", digest]:
            return Target(Kind.BLOB, _parse_repository_parts(name), Digest.parse(digest))
        case [*name, "referrers", digest]:
            return Target(Kind.REFERRERS, _parse_repository_parts(name), Digest.parse(digest))
        case [*name, "blobs", "uploads", session]:
            return Target(Kind.UPLOAD, _parse_repository_parts(name), session=_parse_session(session))
    raise NameUnknown("the distribution API has no such path")


def route_hosted(path: str) -> Target:
    """Return the target of `path` like `route`, but accept an escaped slash within a repository's name.

    Azure's clients and Portainer quote names so. A path of the hosted registry is not sent to another server, which
    might split it differently.
    """
    return route(unescape_slashes(path))


def unescape_slashes(path: str) -> str:
    """Return `path` with the escaped slashes within its repository's name as slashes."""
    if "%2" not in path:
        return path
    parts = path.split("/")
    end = -3 if parts[-3:-1] == ["blobs", "uploads"] else -2
    parts[2:end] = [_ESCAPED_SLASH.sub("/", part) for part in parts[2:end]]
    return "/".join(parts)


def split_registry(path: str) -> tuple[str | None, str]:
    """Return the registry that the first component below `/v2/` names, and `path` without it; None if it names none.

    It names one if it has a dot or a port, or is `localhost`, as in the reference of an image. No name of Docker Hub
    starts with such a component. Raise `NameInvalid` if it has an escape that no name needs.
    """
    if not path.startswith("/v2/"):
        return None, path
    component, _, rest = path[4:].partition("/")
    if "%" in component:
        component = _ESCAPE.sub(_decode_octet, component)
    if "." in component or ":" in component or component == "localhost":
        return component, f"/v2/{rest}"
    return None, path


def is_api_path(path: str) -> bool:
    """Return whether `path` is `/v2` or below it, as we read it or as a more liberal server may read it.

    Such a server may decode several times, ignore case, merge slashes, and resolve dot segments, backslashes and
    `;parameters`.
    """
    if path.startswith("/v2/"):
        return True
    for _ in range(_MAX_DECODINGS):
        resolved: list[str] = []
        for part in path.replace("\\", "/").split("/"):
            name = part.partition(";")[0]
            if name == "..":
                del resolved[-1:]
            elif name not in ("", "."):
                if not resolved and name in ("v2", "V2"):
                    return True  # even if a later dot segment leaves it: not every server resolves those
                resolved.append(name)
        decoded = unquote(path, "latin-1")
        if decoded == path:
            return False
        path = decoded
    return True  # nobody encodes a path that often, except to have it misread


def is_pull_query(query: str) -> bool:
    """Return whether `query` has only parameters with which this API pulls. Raise `BadRequest` if it is malformed."""
    return all(name in _PULL_PARAMETERS for name, _ in parse_query(query))


def _parse_repository_parts(parts: list[str]) -> Repository:
    return parse_repository("/".join(parts))


def _parse_session(text: str) -> str:
    if not _SESSION.fullmatch(text):
        raise NameInvalid("the upload session's identifier is malformed")
    return text


def _segments(path: str) -> list[str]:
    """Return the path's segments, decoded once.

    Refuse an escape that changes how the path is split, or that needs a second decoding, because an upstream might read
    such a path differently. Refuse dot segments, because some servers resolve them and others do not.
    """
    if not _VISIBLE.fullmatch(path):
        raise NameInvalid("the path contains characters that are not allowed in a URL")
    if "%" in path:
        path = _ESCAPE.sub(_decode_octet, path)
    if _AMBIGUOUS.search(path):
        raise NameInvalid("the path contains a backslash, a semicolon or an empty segment")
    parts = path.split("/")
    if "." in parts or ".." in parts:
        raise NameInvalid("the path contains a dot segment")
    return parts


def _decode_octet(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16)) if escape[1] else "%"
    # Names of this API consist of visible ASCII only.
    if character in "/%" or not "!" <= character <= "~":
        raise NameInvalid("the path contains a percent-encoding that no name needs")
    return character


def parse_query(query: str) -> list[tuple[str, str]]:
    """Return the decoded (name, value) pairs of `query` in order.

    Raise `BadRequest` if the query is too long, or if its escapes are broken or not UTF-8.
    """
    if len(query) > _MAX_QUERY or query.count("&") >= _MAX_PARAMETERS:
        raise BadRequest("the URL's query is too long")
    pairs = []
    for part in query.split("&"):
        if part:
            name, _, value = part.partition("=")
            pairs.append((_decode_query_text(name), _decode_query_text(value)))
    return pairs


def _decode_query_text(text: str) -> str:
    if any(escape[1] is None for escape in _ESCAPE.finditer(text)):
        raise BadRequest("the URL's query contains a broken percent-encoding")
    try:
        return unquote_plus(text, errors="strict")
    except UnicodeDecodeError:
        raise BadRequest("the URL's query is not UTF-8") from None


def pop_parameter(query: str, name: str) -> tuple[str | None, str]:
    """Return the decoded value of parameter `name` (None if it is absent) and `query` without it.

    The rest is unchanged byte for byte, because a signed URL would break otherwise. Raise `BadRequest` if the parameter
    has two different values, or as `parse_query` does for this one parameter.
    """
    if len(query) > _MAX_QUERY:
        raise BadRequest("the URL's query is too long")
    rest, values = [], set()
    for part in query.split("&"):
        key, _, value = part.partition("=")
        if unquote_plus(key) == name:
            values.add(_decode_query_text(value))
        else:
            rest.append(part)
    if len(values) > 1:
        raise BadRequest(f"the URL's query contains two different values of {name}")
    return (values.pop() if values else None), "&".join(rest)
