"""The names under which clients may address this server over plain HTTP. Pure.

A page of any site can be made to share an origin with this server: its name first resolves to the page's own server and
then to this one (DNS rebinding). The browser then lets the page read and write here, as if the page came from us. It
still sends the page's name in Host, so a name that an outsider can have is refused. An outsider cannot have an address,
which nothing resolves. TLS needs no such rule, because no certificate of ours is valid for the page's name.
"""

from __future__ import annotations

from attrs import field, frozen

from dockerproxy.errors import MisdirectedRequest, NameInvalid
from dockerproxy.net.addresses import HostPattern
from dockerproxy.oci.names import Host

# Nobody can register a name below these: RFC 6762, RFC 6761, RFC 8375, ICANN's resolution of 2024 on .internal, and
# .lan, which RFC 6762, appendix G, names for private networks.
_PRIVATE_SUFFIXES = (".local", ".localhost", ".lan", ".internal", ".home.arpa")


def is_host(text: str) -> bool:
    """Return whether `text`, a Host field, is a host name or an address, with or without a port."""
    try:
        Host.parse(text)
    except NameInvalid:
        return False
    return True


@frozen
class HostRule:
    """`names` are this server's own, in lower case. `domains` are those of the network that it belongs to.

    `allowed` is ALLOWED_HOSTS, None if that has `all`.
    """

    names: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    allowed: tuple[HostPattern, ...] | None = ()
    _suffixes: tuple[str, ...] = field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_suffixes", (*_PRIVATE_SUFFIXES, *(f".{domain}" for domain in self.domains)))

    def check(self, host: str) -> None:
        """Raise `MisdirectedRequest` if an outsider can have the name in `host`, a request's Host field.

        It is empty in requests of HTTP/1.0 without the field, which no browser sends.
        """
        if not host or self.allowed is None:
            return
        try:
            parsed = Host.parse(host)
        except NameInvalid:
            raise MisdirectedRequest("the Host field is not a host name or an address.") from None
        if not (parsed.is_address or self._is_ours(parsed.name)):
            raise MisdirectedRequest(
                f"{parsed.name} is not known as a name of this server, and any web page could use such a name to act "
                "in this network; request it by its address or one of its own names, or the administrator adds the "
                "name to ALLOWED_HOSTS."
            )

    def _is_ours(self, name: str) -> bool:
        return (
            "." not in name
            or name in self.names
            or name.endswith(self._suffixes)
            or any(pattern.matches(name) for pattern in self.allowed or ())
        )
