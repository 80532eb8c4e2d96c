"""The HTTP proxies between us and the upstreams (UPSTREAM_PROXY, NO_PROXY), and the CONNECT request to one."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import quote

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocol, IProtocolFactory
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from dockerproxy.errors import UpstreamBroken, UpstreamError, UpstreamUnreachable
from dockerproxy.oci.names import Host

_MAX_HEAD = 16 * 1024  # bytes; nginx's limit and half of Go's net/http for such a response; real ones are below 1 KiB


class ProxyRefused(UpstreamUnreachable):
    """The upstream proxy has answered and forbids the connection, so that another one is not tried."""


class ProxyUnable(UpstreamUnreachable):
    """The upstream proxy has answered, and cannot reach the host. Another one may be able to."""


class ProxyUnreachable(UpstreamUnreachable):
    """There is no connection to the upstream proxy itself."""


@frozen
class UpstreamProxy:
    """An HTTP proxy at `host`:`port`. `authorization` is the value of Proxy-Authorization.

    `no_proxy` holds the entries of NO_PROXY: `*`; a name, which also matches all names below it; `.name`, which matches
    only the names below; an address; a network. All but `*` and networks may have a `:port`.

    If it does not answer, `others` are tried in their order, and at last a direct connection if `direct` is true.
    """

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)
    no_proxy: tuple[str, ...] = ()
    others: tuple[UpstreamProxy, ...] = ()
    direct: bool = False

    def applies_to(self, host: Host) -> bool:
        """Return whether to reach `host` through this proxy. Loopback hosts are always direct, as in Go's clients."""
        if host.name == "localhost" or (host.is_address and ip_address(host.name).is_loopback):
            return False
        return not any(_matches_no_proxy(entry, host) for entry in self.no_proxy)

    @property
    def url(self) -> str:
        """The proxy's URL, with its user and password."""
        userinfo = ""
        if self.authorization is not None:
            user, _, password = b64decode(self.authorization.removeprefix("Basic ")).partition(b":")
            userinfo = f"{quote(user, safe='')}:{quote(password, safe='')}@"
        return f"http://{userinfo}{self._authority}"

    @property
    def _authority(self) -> str:
        return Host(self.host, self.port).authority

    def _connect_request(self, host: Host, fields: Sequence[tuple[str, str]]) -> bytes:
        lines = [f"CONNECT {host.authority} HTTP/1.1", f"Host: {host.authority}"]
        lines += [f"{name}: {value}" for name, value in fields]
        if self.authorization is not None:
            lines.append(f"Proxy-Authorization: {self.authorization}")
        return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")

    def _refusal_error(self, host: Host, status: int) -> UpstreamUnreachable:
        error_class = ProxyRefused if status < 500 else ProxyUnable
        if status == 407:
            reason = "requires a (different) user name and password"
        elif status == 403:
            reason = "forbids the connection"
        elif status == 508:
            reason = "would connect through this one; the proxies in UPSTREAM_PROXY form a circle"
        else:
            reason = "refused the connection"
        return error_class(
            f"{host.authority}: the upstream proxy {self._authority} {reason} (status {status})", "proxy"
        )


def _matches_no_proxy(entry: str, host: Host) -> bool:
    if entry == "*":
        return True
    name, port = _split_port(entry.strip().lower())
    if not name or (port is not None and port != str(host.port)):
        return False
    network = _parse_network(name)
    if network is not None:
        return host.is_address and ip_address(host.name) in network
    if name.startswith((".", "*.")):
        return host.name.endswith(name.removeprefix("*"))
    return host.name == name.removesuffix(".") or host.name.endswith(f".{name}")


def _split_port(entry: str) -> tuple[str, str | None]:
    if entry.startswith("["):
        address, _, rest = entry[1:].partition("]")
        return address, rest.removeprefix(":") or None
    name, _, port = entry.partition(":")
    return (entry, None) if ":" in port else (name, port or None)  # two colons: a bare IPv6 address or network


def _parse_network(text: str) -> IPv4Network | IPv6Network | None:
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


class ConnectFactory(Factory):
    """Makes protocols that request a tunnel to `host` from `proxy` and then run a protocol of `inner` on it.

    The request has `fields` beside its own.

    `done` fires with the inner protocol once the tunnel is open, or fails with an `UpstreamError`.
    """

    noisy = False

    def __init__(
        self, proxy: UpstreamProxy, host: Host, inner: IProtocolFactory, fields: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.proxy = proxy
        self.fields = fields
        self.host = host
        self.inner = inner
        self.done: Deferred[IProtocol] = Deferred()

    def buildProtocol(self, address: Any) -> Protocol:
        return _ConnectProtocol(self, address)


class _ConnectProtocol(Protocol):
    """Sends CONNECT and, once the proxy accepted it, forwards all data to the inner protocol."""

    def __init__(self, factory: ConnectFactory, address: Any) -> None:
        self._connect_factory = factory
        self._address = address
        self._head = b""
        self._inner: IProtocol | None = None

    def connectionMade(self) -> None:
        assert self.transport is not None
        factory = self._connect_factory
        self.transport.write(factory.proxy._connect_request(factory.host, factory.fields))

    def dataReceived(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.dataReceived(data)
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n", 0, _MAX_HEAD)
        if end >= 0:
            self._handle_response(self._head[:end], self._head[end + 4 :])
        elif len(self._head) > _MAX_HEAD:
            self._fail(self._invalid_response_error())

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._inner is not None:
            self._inner.connectionLost(reason)
            return
        authority = self._connect_factory.proxy._authority
        self._fail(
            UpstreamUnreachable(
                f"{self._connect_factory.host.authority}: the upstream proxy {authority} closed the connection", "proxy"
            )
        )

    def _handle_response(self, head: bytes, rest: bytes) -> None:
        status = _parse_status(head)
        if status is None:
            self._fail(self._invalid_response_error())
        elif 100 <= status < 200 and status != 101:
            self._head = b""
            self.dataReceived(rest)
        elif 200 <= status < 300:
            self._start_inner(rest)
        else:
            self._fail(self._connect_factory.proxy._refusal_error(self._connect_factory.host, status))

    def _start_inner(self, rest: bytes) -> None:
        inner = self._connect_factory.inner.buildProtocol(self._address)
        if inner is None or self.transport is None:
            self._fail(
                UpstreamUnreachable(f"{self._connect_factory.host.authority}: the connection is no longer needed")
            )
            return
        self._head = b""
        self._inner = inner
        inner.makeConnection(self.transport)
        self._connect_factory.done.callback(inner)
        if rest:
            inner.dataReceived(rest)

    def _invalid_response_error(self) -> UpstreamError:
        return UpstreamBroken(
            f"{self._connect_factory.host.authority}: the upstream proxy {self._connect_factory.proxy._authority} "
            "did not answer CONNECT with an HTTP response; is it an HTTP proxy?"
        )

    def _fail(self, error: UpstreamError) -> None:
        if not self._connect_factory.done.called:
            self._connect_factory.done.errback(error)
        if self.transport is not None:
            self.transport.abortConnection()  # type: ignore[attr-defined]


def _parse_status(head: bytes) -> int | None:
    """Return the status in the head of an HTTP/1 response, or None if it is malformed (RFC 9112, section 4)."""
    line = head.partition(b"\r\n")[0]
    version, _, rest = line.partition(b" ")
    code = rest[:3]
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or not code.isdigit() or rest[3:4] not in (b"", b" "):
        return None
    return int(code)
