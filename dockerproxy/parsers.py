"""Parsers for the values of settings.

Each parser takes a non-empty text and returns the value. It raises `ValueError` with the middle of a sentence: the
text, without parts that may be a password, and the expected format.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import unquote_to_bytes, urlsplit

from attrs import evolve

from dockerproxy.durations import parse_duration
from dockerproxy.errors import NameInvalid
from dockerproxy.net.addresses import AddressSet, HostPattern, redacted_repr
from dockerproxy.net.member_addresses import check_addresses, plain
from dockerproxy.net.public_suffix import has_names_of_everybody
from dockerproxy.net.store_location import StoreLocation
from dockerproxy.net.upstream_proxy import UpstreamProxy
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.docker_hub import canonical_host
from dockerproxy.oci.host_table import HostKey, RegistryWildcard, Wildcard
from dockerproxy.oci.names import Host, Registry

_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_MAX_PORT = 65535
_MAX_DURATION = 100 * 365 * 86400.0
_LOGIN_KEY_PATH = re.compile(r"(?:/v[12])?/?\Z")
_HELPER = re.compile(r"[A-Za-z0-9_.-]+")
_SIZE = re.compile(r"([0-9]{1,15})(?:([kmgt])(?:i?b)?)?", re.IGNORECASE)
_ENDPOINT = re.compile(r"(?!tcp6?:)[a-z][a-z0-9+-]*:\S+|tcp6?:(?:\S*=\S*|(?P<port>[0-9]{1,5})(?::\S*)?)")


def boolean(text: str) -> bool:
    """Parse true, 1, yes, on or false, 0, no, off, in any case."""
    value = _BOOLEANS.get(text.lower())
    if value is None:
        raise ValueError(f"{redacted_repr(text)} is neither true nor false")
    return value


def duration(text: str) -> float:
    """Parse ``90s``, ``10m``, ``1h30m``, ``60d`` or plain seconds. Return seconds."""
    try:
        seconds = parse_duration(text)
    except ValueError:
        raise ValueError(f"{redacted_repr(text)} is not a time such as 90s, 10m, 1h or 60d") from None
    if seconds > _MAX_DURATION:
        raise ValueError(f"{redacted_repr(text)} is a time of more than 100 years")
    return seconds


def positive_duration(text: str) -> float:
    """Parse a `duration` that is not 0."""
    seconds = duration(text)
    if seconds == 0:
        raise ValueError(
            f"{redacted_repr(text)} is not allowed; use a time greater than zero, such as 90s, 10m, 1h or 60d"
        )
    return seconds


def history(text: str) -> float:
    """Parse a `positive_duration`, or ``off``, for which it returns 0."""
    return 0.0 if text.lower() == "off" else positive_duration(text)


def size(text: str) -> int:
    """Parse ``512m``, ``32g`` or plain bytes. Return bytes. Units are powers of 1024, as in nginx."""
    match = _SIZE.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{redacted_repr(text)} is not a size such as 512m or 32g")
    return int(match[1]) << 10 * " kmgt".index((match[2] or " ").lower())


def size_or_zero(text: str) -> int:
    """Parse a `size`, or 0."""
    return 0 if text == "0" else size(text)


def integer(minimum: int, maximum: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not minimum <= int(text) <= maximum:
            raise ValueError(f"{redacted_repr(text)} is not a number from {minimum} to {maximum}")
        return int(text)

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a parser that accepts one of `choices`, in any case."""

    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"{redacted_repr(text)} is not one of {', '.join(choices)}")
        return text.lower()

    return parse


def percentage(text: str) -> int:
    """Parse ``20%`` or ``20``, from 0 to 100."""
    match = re.fullmatch(r"([0-9]{1,3})\s*%?", text)
    if match is None or int(match[1]) > 100:
        raise ValueError(f"{redacted_repr(text)} is not a percentage from 0% to 100%, such as 20%")
    return int(match[1])


def path(text: str) -> Path:
    """Parse the path of a file or directory. A relative path is relative to the working directory of the daemon."""
    if "\0" in text:
        raise ValueError(f"{redacted_repr(text)} is not a path")
    return Path(text).absolute()


def user_names(text: str) -> frozenset[str]:
    """Parse the names of users in an htpasswd file, separated by spaces or commas."""
    names = text.replace(",", " ").split()
    for name in names:
        user, colon, _ = name.partition(":")  # a password, or its hash, may follow
        if colon:
            raise ValueError(f"{redacted_repr(f'{user}:…')} is not the name of a user, which has no colon")
    return frozenset(names)


def regex(text: str) -> re.Pattern[str]:
    """Parse a regular expression for tags. Tags are ASCII.

    Use it with `match`, because nginx anchored it only at the start, after ``/manifests/``.
    """
    try:
        return re.compile(text, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{redacted_repr(text)} is not a regular expression ({error})") from None


def ports(text: str) -> frozenset[int]:
    """Parse port numbers and ranges (``8000-8999``), separated by spaces."""
    numbers: set[int] = set()
    for word in text.split():
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 0 < first <= last <= _MAX_PORT:
            raise ValueError(f"{redacted_repr(word)} is not a port such as 443 or a range of ports such as 8000-8999")
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def endpoints(text: str) -> tuple[str, ...]:
    """Split Twisted endpoint descriptions at spaces. Check only their form; listening finds the other errors."""
    descriptions = tuple(text.split())
    for word in descriptions:
        if word.startswith("ssl:"):
            raise ValueError(
                f"{redacted_repr(word)} cannot be used; for TLS to the proxy write tcp:PORT in PROXY_TLS_LISTEN, and "
                "REGISTRY_LISTEN has TLS already"
            )
        match = _ENDPOINT.fullmatch(word)
        if match is None or int(match["port"] or 0) > _MAX_PORT:
            raise ValueError(
                f"{redacted_repr(word)} is not an endpoint such as tcp:3128 or tcp:3128:interface=127.0.0.1"
            )
    return descriptions


def optional_endpoints(text: str) -> tuple[str, ...]:
    """Parse `endpoints`, or ``none``."""
    return () if text.lower() == "none" else endpoints(text)


def host_names(text: str) -> tuple[str, ...]:
    """Parse host names without ports, separated by spaces."""
    return tuple(dict.fromkeys(_host_name(word) for word in text.split()))


def _host_name(word: str) -> str:
    try:
        host = Host.parse(word)
    except NameInvalid:
        raise ValueError(f"{redacted_repr(word)} is not a host name") from None
    if word.endswith(f":{host.port}"):
        raise ValueError(f"{redacted_repr(word)} has a port; use the host name only")
    return host.name


def allowed_hosts(text: str) -> tuple[HostPattern, ...] | None:
    """Parse host names and patterns such as ``*.example.com``, separated by spaces. Return None for ``all``.

    Addresses are left out, because requests to an address are always allowed.
    """
    words = text.split()
    if "all" in (word.lower() for word in words):
        return None
    patterns = []
    for word in words:
        try:
            if not Host.parse(word.removeprefix("*").removeprefix(".")).is_address:
                patterns.append(HostPattern.parse(word))
        except NameInvalid:
            raise ValueError(
                f"{redacted_repr(word)} is not a host name without a port, such as proxy.example.com or *.example.com, "
                "nor the word all"
            ) from None
    return tuple(patterns)


def origins(text: str) -> tuple[str, ...]:
    """Parse origins of web pages, separated by spaces. Return them as browsers write them in Origin."""
    return tuple(dict.fromkeys(_origin(word) for word in text.split()))


def _origin(word: str) -> str:
    if word == "*":
        raise ValueError(
            "'*' is not allowed, because then every web page could read and change this registry; list the origins of "
            "the pages, such as https://ui.example.com"
        )
    try:
        scheme, separator, authority = word.removesuffix("/").partition("://")
        if not separator:
            raise NameInvalid("an origin has a scheme")
        return Registry.parse(f"{scheme.lower()}://{authority}").origin
    except NameInvalid:
        raise ValueError(
            f"{redacted_repr(word)} is not the origin of a web page, such as https://ui.example.com or "
            "http://ui.example.com:8080"
        ) from None


def registry_url(text: str) -> Registry:
    """Parse the URL of a registry, ``https://reg.example.com[:port]``, perhaps with a slash at the end."""
    scheme, separator, rest = text.partition("://")
    authority, _, path = rest.partition("/")
    try:
        if not separator:
            raise NameInvalid("a URL has a scheme")
        url = Registry.parse(f"{scheme.lower()}://{authority}")
    except NameInvalid:
        raise ValueError(
            f"{redacted_repr(text)} is not the URL of a registry, such as https://reg.example.com or "
            "https://reg.example.com:8443"
        ) from None
    if path:
        raise ValueError(
            f"{redacted_repr(text)} has a path, but clients ask for /v2/ directly below the host; write {url.origin}"
        )
    return url


def trusted_proxies(text: str) -> AddressSet:
    """Parse addresses and networks, separated by spaces, or ``none``. Raise for those that contain every address."""
    proxies = AddressSet.parse(text)
    for entry, networks in proxies.entries:
        if any(network.prefixlen == 0 for network in networks):
            raise ValueError(
                f"{redacted_repr(entry)} contains all clients, each of which could then claim any address; list the "
                "addresses of the reverse proxies, such as 127.0.0.1 or 10.0.0.5"
            )
    return AddressSet(tuple((entry, networks) for entry, networks in proxies.entries if networks))


def registries(text: str) -> tuple[Registry | RegistryWildcard, ...]:
    """Parse registries as ``host``, ``host:port`` or ``http://host:port``, separated by spaces. Remove duplicates.

    A host may be a wildcard such as ``*.pkg.dev``.
    """
    by_host: dict[HostKey, Registry | RegistryWildcard] = {}
    for word in text.split():
        try:
            registry, key = _registry(word.removesuffix("/"))
        except NameInvalid:
            raise ValueError(
                f"{_quoted_host(word)} is not a registry such as quay.io, registry.example.com:5000, "
                "http://registry.example.com:5000 or *.pkg.dev"
            ) from None
        if by_host.setdefault(key, registry) != registry:
            authority = key.authority if isinstance(key, Host) else str(key)
            raise ValueError(f"{authority!r} is given both with http:// and without")
    return tuple(by_host.values())


def _registry(word: str) -> tuple[Registry | RegistryWildcard, HostKey]:
    if "*" not in word:
        registry = Registry.parse(word)
        return registry, registry.host
    wildcard = RegistryWildcard.parse(word)
    _check_wildcard(wildcard.hosts)
    return wildcard, wildcard.hosts


def _check_wildcard(wildcard: Wildcard) -> None:
    """Raise ValueError if the hosts below `wildcard` belong to everybody."""
    if has_names_of_everybody(wildcard.suffix):
        raise ValueError(
            f"{str(wildcard)!r} is not allowed, because everybody can register a domain below {wildcard.suffix}; write "
            "more of the name, such as *.dkr.ecr.eu-west-1.amazonaws.com or *.pkg.dev"
        )


def _quoted_host(word: str) -> str:
    """Return `word` for an error message. Redact a misplaced login (``host:user:password``)."""
    scheme, separator, rest = word.rpartition("://")
    name, colon, port = rest.partition(":")
    has_login = colon and not port.isdigit() and not name.startswith("[") and "@" not in word
    return redacted_repr(f"{scheme}{separator}{name}:…" if has_login else word)


def addresses(text: str) -> Mapping[Host, Host]:
    """Parse ``host=address:port`` entries: the address to connect to for a host. The default is the host's own port."""
    overrides: dict[Host, Host] = {}
    for word in text.split():
        left, _, right = word.partition("=")
        try:
            host = Host.parse(left)
            address = Host.parse(right, host.port)
            if not address.is_address:
                raise NameInvalid("a host name cannot replace a DNS look-up")
        except NameInvalid:
            raise ValueError(
                f"{redacted_repr(word)} is not host=address:port, such as registry.test:5000=127.0.0.1:25000"
            ) from None
        if overrides.setdefault(host, address) != address:
            raise ValueError(f"{host.authority!r} is given twice, with different addresses")
    return MappingProxyType(overrides)


def fleet(text: str) -> tuple[Host, ...]:
    """Parse the addresses of members, ``10.0.0.1 10.0.0.2:3128``, or one name that has all of them.

    Members are separated by spaces. The port is 3128 if it is not given.
    """
    members: dict[Host, None] = {}
    for word in text.split():
        member = _member(word)
        if member in members:
            raise ValueError(f"{redacted_repr(word)} is given twice")
        members[member] = None
    names = [member.name for member in members if not member.is_address]
    if names and len(members) > 1:
        raise ValueError(
            f"{redacted_repr(names[0])} is a name; give either one name whose addresses are the members, or addresses"
        )
    if not names:
        check_addresses(tuple(members))
    return tuple(members)


def fleet_address(text: str) -> Host:
    """Parse the address of one member, with the port if it is not 3128."""
    member = _member(text)
    if not member.is_address:
        raise ValueError(f"{redacted_repr(text)} is a name; write the address of this daemon that FLEET has")
    return member


def _member(word: str) -> Host:
    try:
        return plain(Host.parse(word, 3128))
    except NameInvalid:
        raise ValueError(
            f"{redacted_repr(word)} is not a member such as 10.0.0.1 or 10.0.0.1:3128, nor a name that has all of them"
        ) from None


def upstream_proxy(text: str, no_proxy: str) -> UpstreamProxy | None:
    """Parse ``http://[user:password@]host[:port]``, with an optional scheme, or ``none`` for no proxy.

    Several, separated by spaces, are tried in their order. ``direct`` at the end stands for a connection without one.
    `no_proxy` is the value of NO_PROXY: entries separated by commas or spaces. See `UpstreamProxy` for their grammar.
    """
    words = text.split()
    if text.lower() in ("none", "direct"):
        return None
    direct = words[-1].lower() == "direct"
    proxies = [_one_upstream_proxy(word, no_proxy) for word in (words[:-1] if direct else words)]
    if len({(proxy.host, proxy.port) for proxy in proxies}) < len(proxies):
        raise ValueError("a proxy is given twice")
    return evolve(proxies[0], others=tuple(proxies[1:]), direct=direct)


def _one_upstream_proxy(text: str, no_proxy: str) -> UpstreamProxy:
    if text.lower() in ("none", "direct"):
        raise ValueError(f"{text!r} is not a proxy; none has to be alone, and direct has to be last")
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        userinfo, at, authority = parts.netloc.rpartition("@")
        if parts.scheme != "http" or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError
        host = Host.parse(authority, 80)
    except (ValueError, NameInvalid):
        raise ValueError(
            f"{_quoted_host(text)} is not an HTTP proxy such as http://proxy.example.com:3128, or none"
        ) from None
    authorization = f"Basic {b64encode(unquote_to_bytes(userinfo)).decode()}" if at else None
    return UpstreamProxy(host.name, host.port, authorization, tuple(no_proxy.replace(",", " ").split()))


def registry_store(text: str) -> StoreLocation | None:
    """Parse the URL of a bucket, or ``none`` for REGISTRY_DIR."""
    if text.lower() == "none":
        return None
    try:
        return StoreLocation.parse(text)
    except ValueError as error:
        raise ValueError(
            f"{error}; expected s3://BUCKET[/PREFIX][?endpoint=https://HOST:PORT&region=NAME&addressing=path], or none"
        ) from None


def logins(
    text: str, entry_delimiter: str, field_delimiter: str, known_hosts: Iterable[HostKey]
) -> Mapping[HostKey, BasicCredentials]:
    """Parse ``host:user:password`` entries. `field_delimiter` separates the three parts of an entry.

    The password is the rest of the entry and may contain delimiters of fields. Spaces around an entry are removed.
    A host may end as in the keys of docker's login file: ``https://index.docker.io/v1/``. It may be a wildcard.
    An error message shows a host only if it is in `known_hosts` (the other settings name it) or in the first entry. Any
    other entry may begin with the rest of a password that contains `entry_delimiter`.
    """
    printable_hosts = set(known_hosts)
    by_host: dict[HostKey, BasicCredentials] = {}
    entries = filter(None, (entry.strip() for entry in text.split(None if entry_delimiter == " " else entry_delimiter)))
    for position, entry in enumerate(entries, 1):
        host_text, user, password = _split_login(entry, field_delimiter)
        try:
            _, host = _registry(_LOGIN_KEY_PATH.sub("", host_text))
        except (NameInvalid, ValueError):
            raise ValueError(
                f"entry {position} does not begin with a host; expected {_login_format(field_delimiter)}"
            ) from None
        label = (
            f"entry {position} ({host})" if (user and position == 1) or host in printable_hosts else f"entry {position}"
        )
        if not user or not password:
            raise ValueError(
                f"{label} has no {'password' if user else 'user'}; expected {_login_format(field_delimiter)}"
            )
        credentials = BasicCredentials(user, password)
        if by_host.setdefault(host, credentials) != credentials:
            raise ValueError(f"{label} repeats the host of an earlier entry with another login")
    return MappingProxyType(by_host)


def credential_helpers(text: str) -> Mapping[HostKey, str]:
    """Parse ``host:helper`` entries, separated by spaces. A host is as in `logins`; the program of a helper is
    ``docker-credential-HELPER``."""
    by_host: dict[HostKey, str] = {}
    for word in text.split():
        host_text, _, helper = word.rpartition(":")
        try:
            if not _HELPER.fullmatch(helper) or helper.isdigit():
                raise NameInvalid("it names no helper")
            _, key = _registry(_LOGIN_KEY_PATH.sub("", host_text))
        except NameInvalid:
            raise ValueError(
                f"{redacted_repr(word)} is not host:helper, such as *.dkr.ecr.eu-west-1.amazonaws.com:ecr-login, where"
                " docker-credential-ecr-login is a program in PATH"
            ) from None
        host = canonical_host(key)
        if by_host.setdefault(host, helper) != helper:
            raise ValueError(f"{str(host)!r} is given twice, with different helpers")
    return MappingProxyType(by_host)


def _split_login(entry: str, field_delimiter: str) -> tuple[str, str, str]:
    """Return host, user and password. The host includes its scheme and port, if they are given."""
    scheme = next((scheme for scheme in ("https://", "http://") if entry.startswith(scheme)), "")
    rest = entry.removeprefix(scheme)
    # Skip an IPv6 address, because its colons are not delimiters.
    bracket = rest.find("]") + 1 if rest.startswith("[") else 0
    name, _, rest = rest[bracket:].partition(field_delimiter)
    user, _, password = rest.partition(field_delimiter)
    if field_delimiter == ":" and _is_port(_LOGIN_KEY_PATH.sub("", user)) and ":" in password:
        name, (user, _, password) = f"{name}:{user}", password.partition(":")
    return f"{scheme}{entry.removeprefix(scheme)[:bracket]}{name.strip()}", user, password


def _is_port(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,5}", text) is not None and 0 < int(text) <= _MAX_PORT


def _login_format(field_delimiter: str) -> str:
    return f"host{field_delimiter}user{field_delimiter}password"
