"""The client of a request that a reverse proxy passes on, as the fields of the proxy describe it. Pure.

A reverse proxy ends the client's TLS and connects to us itself. It says in X-Forwarded-For, -Proto and -Host, or in
Forwarded (RFC 7239), which client it serves. Anybody can send these fields, so they count only from TRUSTED_PROXIES.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address

from attrs import evolve, field, frozen

from dockerproxy.errors import BadRequest, NameInvalid
from dockerproxy.http.headers import Headers
from dockerproxy.net.addresses import AddressSet
from dockerproxy.oci.names import Host

_MAX_HOPS = 32  # addresses of a chain that are looked at

_PORTS = {"http": 80, "https": 443}

# A pair of a Forwarded field with the separator after it; the pair may be missing (RFC 7239, section 4; RFC 9110,
# section 5.6). Its value is a token or a quoted string.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PAIR = re.compile(rf"""[ \t]*(?:({_TOKEN})=(?:({_TOKEN})|"((?:[^"\\]|\\.)*)")[ \t]*)?(,|;|\Z)""")
_ESCAPED = re.compile(r"\\(.)")

# An address as some proxies write it, with the port of the client: 192.0.2.7:50000, [2001:db8::7]:50000.
_WITH_PORT = re.compile(r"\[([^\]]*)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")


@frozen
class ForwardedClient:
    """The client that a chain of proxies serves: its address, and how it addressed the first trusted one of them.

    `scheme` is ``http`` or ``https``. It is None if the proxy does not say it, and so is `host`.
    """

    address: str
    scheme: str | None = None
    host: str | None = None


@frozen
class TrustedProxies:
    """The reverse proxies whose fields are believed (TRUSTED_PROXIES)."""

    networks: AddressSet = field(factory=AddressSet)

    def __contains__(self, address: object) -> bool:
        try:
            return bool(self.networks.entries) and self.networks.match(str(address), exact=True) is not None
        except ValueError:  # a peer without an IP address, such as a Unix socket
            return False

    def client_of(self, peer: str, headers: Headers) -> ForwardedClient | None:
        """Return the client of a request from `peer`. Return None if that is no trusted proxy, or names no client.

        In a chain of proxies, the client is the last address that is not one of `networks`: the addresses before it are
        its own claims. The proxy has to set these fields anew, or to remove those that clients send. If it passes on
        one family of them, the two contradict each other. Then, and if a field is malformed, raise `BadRequest`.
        """
        if peer not in self:
            return None
        by_x_fields, by_forwarded = self._by_x_fields(peer, headers), self._by_forwarded(peer, headers)
        if by_x_fields is None or by_forwarded is None:
            return by_x_fields or by_forwarded
        if by_x_fields.address != by_forwarded.address or _contradict(by_x_fields, by_forwarded):
            raise BadRequest(
                "Forwarded and X-Forwarded-* describe two clients; the reverse proxy has to remove the ones that it "
                "does not set itself."
            )
        return evolve(
            by_x_fields,
            scheme=by_x_fields.scheme or by_forwarded.scheme,
            host=by_x_fields.host or by_forwarded.host,
        )

    def _by_x_fields(self, peer: str, headers: Headers) -> ForwardedClient | None:
        chain = headers.joined("x-forwarded-for")
        scheme, host = headers.joined("x-forwarded-proto"), headers.joined("x-forwarded-host")
        if chain is None and scheme is None and host is None:
            return None
        address, _ = self._walk(peer, chain.split(",") if chain is not None else [])
        # The nearest proxy has appended the last of several values.
        scheme, host = _last(scheme), _last(host)
        return ForwardedClient(address, _check_scheme(scheme), _check_host(host, scheme))

    def _by_forwarded(self, peer: str, headers: Headers) -> ForwardedClient | None:
        text = headers.joined("forwarded")
        if text is None:
            return None
        elements = list(_parse_forwarded(text))
        address, hops = self._walk(peer, [element.get("for", "") for element in elements])
        # The proxy that names the client is the one that it addressed.
        element = elements[-max(1, hops)] if elements else {}
        scheme = element.get("proto")
        return ForwardedClient(address, _check_scheme(scheme), _check_host(element.get("host"), scheme))

    def _walk(self, peer: str, chain: list[str]) -> tuple[str, int]:
        """Return the client's address, and its place in `chain`, counted from the end.

        An entry that is not an address (``unknown``, ``_hidden``) hides its client; the proxy before it counts instead.
        """
        address = peer
        for hops, text in enumerate(reversed(chain[-_MAX_HOPS:]), 1):
            parsed = _parse_address(text)
            if parsed is None:
                return address, hops
            address = parsed
            if address not in self:
                return address, hops
        return address, min(len(chain), _MAX_HOPS)


def _contradict(left: ForwardedClient, right: ForwardedClient) -> bool:
    return any(
        one is not None and other is not None and one != other
        for one, other in ((left.scheme, right.scheme), (left.host, right.host))
    )


def _last(value: str | None) -> str | None:
    return None if value is None else value.rpartition(",")[2].strip()


def _check_scheme(scheme: str | None) -> str | None:
    if scheme is not None and scheme.lower() not in _PORTS:
        raise BadRequest("the scheme in X-Forwarded-Proto or Forwarded is neither http nor https.")
    return None if scheme is None else scheme.lower()


def _check_host(host: str | None, scheme: str | None) -> str | None:
    if host is None:
        return None
    try:
        Host.parse(host, _PORTS[(scheme or "https").lower()])
    except NameInvalid:
        raise BadRequest("the host in X-Forwarded-Host or Forwarded is not a host name or an address.") from None
    return host


def _parse_address(text: str) -> str | None:
    """Return the address in an entry of a chain, with or without a port (RFC 7239, section 6), or None."""
    text = text.strip()
    match = _WITH_PORT.fullmatch(text)
    if match is not None:
        text = match[1] or match[2] or ""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return str(address if mapped is None else mapped)


def _parse_forwarded(text: str) -> Iterator[dict[str, str]]:
    """Yield the elements of a Forwarded field (RFC 7239, section 4). Raise `BadRequest` if it is malformed."""
    position, element = 0, dict[str, str]()
    while True:
        match = _PAIR.match(text, position)
        if match is None or (match[1] or "").lower() in element:
            raise BadRequest("the Forwarded field is malformed.")
        if match[1]:
            element[match[1].lower()] = _ESCAPED.sub(r"\1", match[3]) if match[2] is None else match[2]
        if match[4] != ";" and element:
            yield element
            element = {}
        if not match[4]:
            return
        position = match.end()
