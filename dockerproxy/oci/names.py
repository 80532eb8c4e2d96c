"""The names of the distribution API as typed values, parsed once at the edge."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from functools import lru_cache
from typing import TYPE_CHECKING, NewType

from attrs import frozen

from dockerproxy.errors import DigestInvalid, NameInvalid

if TYPE_CHECKING:
    from hashlib import _Hash

Repository = NewType("Repository", str)
"""A repository name such as ``library/ubuntu``. Only `parse_repository` creates one."""

Tag = NewType("Tag", str)
"""A tag such as ``v1.2.3.4``. Only `parse_tag` creates one."""

# distribution-spec 1.1, "Pulling manifests": the grammar of <name> and of a tag as <reference>.
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
MAX_REPOSITORY = 255  # characters, what distribution and Docker Hub accept

# image-spec 1.1, "Registered Algorithms".
ALGORITHMS = {"sha256": 64, "sha512": 128}
"""The digest algorithms, and the number of hex digits of each."""

_HASHES = {"sha256": hashlib.sha256, "sha512": hashlib.sha512}

_HEX = re.compile(r"[0-9a-f]+")

# RFC 1123 labels; underscores occur in compose service names.
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOSTNAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")

# Some resolvers, glibc's among them, read a name as an address if its last label is a number: 0x7f000001 is 127.0.0.1
# (WHATWG URL, "ends in a number").
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def parse_repository(text: str) -> Repository:
    """Return `text` as a repository name, or raise `NameInvalid`."""
    if len(text) > MAX_REPOSITORY or not _REPOSITORY.fullmatch(text):
        raise NameInvalid(f"{text[:300]!r} is not a repository name")
    return Repository(text)


def parse_tag(text: str) -> Tag:
    """Return `text` as a tag, or raise `NameInvalid`."""
    if not _TAG.fullmatch(text):
        raise NameInvalid(f"{text[:300]!r} is not a tag")
    return Tag(text)


@frozen(slots=True)
class Digest:
    """The hash that identifies a blob or manifest. `algorithm` is sha256 or sha512, `hex` the lower-case encoding."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest written in `text` (image-spec, "Digests"), or raise `DigestInvalid`."""
        algorithm, _, encoded = text.partition(":")
        if ALGORITHMS.get(algorithm) != len(encoded) or not _HEX.fullmatch(encoded):
            raise DigestInvalid(f"{text[:150]!r} is not a sha256 or sha512 digest")
        return cls(algorithm, encoded)

    @classmethod
    def of(cls, content: bytes, algorithm: str = "sha256") -> Digest:
        """Return the digest of `content`."""
        return cls(algorithm, _HASHES[algorithm](content).hexdigest())

    def hasher(self) -> _Hash:
        """Return a new hash object of this digest's algorithm."""
        return _HASHES[self.algorithm]()

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


Reference = Tag | Digest


def parse_reference(text: str) -> Reference:
    """Return the digest or tag written in `text`. A colon makes it a digest, because no tag contains one."""
    return Digest.parse(text) if ":" in text else parse_tag(text)


@frozen(cache_hash=True)
class Host:
    """A host and port, which identify a registry. `name` is lower-case; an IPv6 address has no brackets."""

    name: str
    port: int

    @classmethod
    def parse(cls, text: str, default_port: int = 443) -> Host:
        """Return the host in ``name``, ``name:port``, ``1.2.3.4:port`` or ``[::1]:port``; raise `NameInvalid`."""
        return _parse_host(text, default_port)

    @property
    def is_address(self) -> bool:
        """Whether `name` is an IP address. The last label of a host name is no number; see `_canonical_hostname`."""
        return ":" in self.name or self.name.rpartition(".")[2].isdigit()

    @property
    def authority(self) -> str:
        """``name:port``, always with the port (RFC 9112, authority-form)."""
        return f"{self._bracketed}:{self.port}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.name}]" if ":" in self.name else self.name

    def __str__(self) -> str:
        """Return the shortest form for an image reference: the port is left out if it is 443."""
        return self._bracketed if self.port == 443 else self.authority


@frozen(cache_hash=True)
class Registry:
    """An upstream registry: its host, and the `scheme` ``https`` or ``http`` to reach it."""

    host: Host
    scheme: str = "https"

    @classmethod
    def parse(cls, text: str) -> Registry:
        """Return the registry written as ``host``, ``host:port`` or ``http://host:port``, or raise `NameInvalid`."""
        scheme, separator, rest = text.partition("://")
        if not separator:
            return cls(Host.parse(text))
        if scheme not in ("http", "https"):
            raise NameInvalid(f"{text[:300]!r} has a scheme other than http or https")
        return cls(Host.parse(rest, 80 if scheme == "http" else 443), scheme)

    @property
    def origin(self) -> str:
        """The start of the registry's URLs, ``scheme://host[:port]``, without the scheme's default port."""
        bracketed = f"[{self.host.name}]" if ":" in self.host.name else self.host.name
        default = 80 if self.scheme == "http" else 443
        return f"{self.scheme}://{bracketed if self.host.port == default else self.host.authority}"

    def __str__(self) -> str:
        return str(self.host)


@lru_cache(1024)  # all clients of a fleet use the same few hosts; a valid text has at most 261 characters
def _parse_host(text: str, default_port: int) -> Host:
    name, port = _split_port(text)
    if port is None:
        number = default_port
    elif port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536:
        number = int(port)
    else:
        raise NameInvalid(f"{text[:300]!r} has no valid port")
    return Host(_canonical_hostname(name, text), number)


def _split_port(text: str) -> tuple[str, str | None]:
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        if not bracket or ":" not in name or (rest and not rest.startswith(":")):
            raise NameInvalid(f"{text[:300]!r} is not a host")
        return name, rest[1:] if rest else None
    name, colon, port = text.partition(":")
    return name, port if colon else None


def _canonical_hostname(name: str, text: str) -> str:
    address = _parse_address(name)
    if address is not None:
        return str(address)
    canonical = name.lower().removesuffix(".")
    # Lower-casing turns some non-ASCII letters into ASCII: the Kelvin sign becomes a "k".
    if not name.isascii() or not _HOSTNAME.fullmatch(canonical) or _NUMBER.fullmatch(canonical.rpartition(".")[2]):
        raise NameInvalid(f"{text[:300]!r} is not a host name")
    return canonical


def _parse_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return None
    # A zone (fe80::1%eth0) has a meaning on one machine only.
    return None if isinstance(address, ipaddress.IPv6Address) and address.scope_id else address
