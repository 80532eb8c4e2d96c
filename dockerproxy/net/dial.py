"""Connections to other servers: name resolution, address checks and Happy Eyeballs (RFC 8305).

The dialer connects only to addresses that the address check accepted, taken from the same DNS look-up. DNS rebinding
therefore gains nothing: a second look-up, which could return another address, never happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.error import ConnectError, ConnectionRefusedError, NoRouteError, TimeoutError
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from dockerproxy.errors import RegistryError, UpstreamBroken, UpstreamError, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.net.parent_circles import FIELD as CIRCLES_FIELD
from dockerproxy.net.parent_circles import ParentCircles
from dockerproxy.net.upstream_proxy import (
    ConnectFactory,
    ProxyRefused,
    ProxyUnable,
    ProxyUnreachable,
    UpstreamProxy,
)
from dockerproxy.oci.names import Host

log = Logger()

AddressCheck = Callable[[str], None]
"""Raises a `RegistryError` if connections to an address (as text) are forbidden.

It is called with the host's name instead if the upstream proxy resolves that.
"""

_PROXY_TIMEOUT = 10.0  # seconds for one of several proxies to answer
_PROXY_BACK_OFF = 30.0
_CONNECTION_ATTEMPT_DELAY = 0.25  # seconds until the next address is tried as well: RFC 8305, section 5


class SingleProtocolFactory(Factory):
    """A factory for one connection: it returns the protocol that it was made with."""

    noisy = False

    def __init__(self, protocol: IProtocol) -> None:
        self._protocol = protocol

    def buildProtocol(self, address: object) -> Any:
        return self._protocol


class Resolver(Protocol):
    """Resolves host names; see `NameResolver`."""

    async def resolve(self, name: str, client: str = "") -> list[str]:
        """Return the addresses of `name`; none if it has none. `client` is whose request needs them."""


class Dialer:
    """Makes client endpoints for hosts.

    `overrides` maps a host to the address and port to use instead of DNS; the address check and `proxy` are then
    skipped. `connect_timeout` is the limit in seconds for DNS, all attempts and the proxy's response together.
    `circles`, if given, tells proxies where requests have come from. `source_address` returns the address of this
    machine to connect from, or None for the one that the kernel chooses.
    """

    def __init__(
        self,
        reactor: Any,
        resolver: Resolver,
        *,
        overrides: Mapping[Host, tuple[str, int]] | None = None,
        ipv6: bool = True,
        proxy: UpstreamProxy | None = None,
        connect_timeout: float = 60.0,
        source_address: Callable[[], str | None] = lambda: None,
        circles: ParentCircles | None = None,
    ) -> None:
        self._reactor = reactor
        self._resolver = resolver
        self._source_address = source_address
        self._circles = circles
        self._failed_proxies: dict[UpstreamProxy, float] = {}  # until when they are tried after the others
        self._answered: dict[UpstreamProxy, float] = {}  # when they answered last, whatever that was
        self._overrides = dict(overrides or {})
        self._ipv6 = ipv6
        self._proxy = proxy
        self._connect_timeout = connect_timeout

    def endpoint(
        self, host: Host, address_check: AddressCheck | None = None, client: str = ""
    ) -> IStreamClientEndpoint:
        """Return an endpoint that connects to `host`, and only at addresses that `address_check` accepts.

        `client` is the address of the client that chose the host, for its share of look-ups. If the check rejects every
        address, connecting fails with its first error. Other failures are `UpstreamUnreachable`, `UpstreamTimeout` and
        `UpstreamBroken` (an invalid response of the upstream proxy); their messages name the host. `TooManyRequests`
        and `ServiceOverloaded` mean that too many look-ups wait.
        """
        return _Endpoint(self, host, address_check, client)

    async def connect(
        self, host: Host, address_check: AddressCheck | None, client: str, factory: IProtocolFactory
    ) -> IProtocol:
        """Connect to `host` and return the protocol that `factory` built; see `endpoint`."""
        work = Deferred.fromCoroutine(self._connect(host, address_check, client, factory))
        work.addTimeout(self._connect_timeout, self._reactor)
        try:
            return await work
        except (DeferredTimeout, TimeoutError):
            seconds = self._connect_timeout
            raise UpstreamTimeout(f"{host.authority}: timed out, not connected after {seconds:g} s") from None

    async def _connect(
        self, host: Host, address_check: AddressCheck | None, client: str, factory: IProtocolFactory
    ) -> IProtocol:
        override = self._overrides.get(host)
        if override is not None:
            return await self._dial_parallel(host, [override], factory)
        if self._proxy is not None and self._proxy.applies_to(host):
            if address_check is not None:
                address_check(host.name)
            connection = await self._connect_via_proxies(self._proxy, host, factory)
            if connection is not None:
                return connection
        addresses = filter_addresses(await self._resolve(host, client), address_check)
        return await self._dial_parallel(host, [(address, host.port) for address in addresses], factory)

    async def _connect_via_proxies(
        self, first: UpstreamProxy, host: Host, factory: IProtocolFactory
    ) -> IProtocol | None:
        """Connect through the first proxy that can. Return None if none does, and a direct connection is next.

        One that does not answer at all is tried last for _PROXY_BACK_OFF seconds. One that cannot reach `host`, or is
        silent about it while it answers others, stays the first for all other hosts: clients choose these.
        """
        if not first.others and not first.direct:
            return await self._connect_via_proxy(first, host, factory)
        now = self._reactor.seconds()
        errors: list[UpstreamError] = []
        order = sorted((first, *first.others), key=lambda proxy: self._failed_proxies.get(proxy, 0.0) > now)
        for proxy in order:
            if first.direct and self._failed_proxies.get(proxy, 0.0) > now:
                continue
            started = self._reactor.seconds()
            attempt = Deferred.fromCoroutine(self._connect_via_proxy(proxy, host, factory))
            try:
                connection = await attempt.addTimeout(_PROXY_TIMEOUT, self._reactor)
            except ProxyRefused:
                self._note_answer(proxy)
                raise
            except (DeferredTimeout, TimeoutError):
                authority = Host(proxy.host, proxy.port).authority
                errors.append(UpstreamTimeout(f"{host.authority}: the upstream proxy {authority} does not answer"))
                is_down = self._answered.get(proxy, started - 1) < started
            except UpstreamError as error:
                errors.append(error)
                is_down = isinstance(error, ProxyUnreachable | UpstreamBroken)
                if isinstance(error, ProxyUnable):
                    self._note_answer(proxy)
            else:
                self._note_answer(proxy)
                return connection
            if is_down:
                self._failed_proxies[proxy] = self._reactor.seconds() + _PROXY_BACK_OFF
                log.warn("trying the next entry of UPSTREAM_PROXY: {reason}", reason=errors[-1].message)
        if not first.direct:
            raise errors[0]
        return None

    def _note_answer(self, proxy: UpstreamProxy) -> None:
        self._answered[proxy] = self._reactor.seconds()
        self._failed_proxies.pop(proxy, None)

    async def _connect_via_proxy(self, proxy: UpstreamProxy, host: Host, factory: IProtocolFactory) -> IProtocol:
        proxy_host = Host(proxy.host, proxy.port)
        fields = [] if self._circles is None else [(CIRCLES_FIELD, self._circles.value(host))]
        connect_factory = ConnectFactory(proxy, host, factory, fields)
        try:
            addresses = await self._resolve(proxy_host, "")
            connection = await self._dial_parallel(
                proxy_host, [(address, proxy_host.port) for address in addresses], connect_factory
            )
        except UpstreamUnreachable as error:
            raise ProxyUnreachable(
                f"{host.authority}: cannot connect to the upstream proxy {error.message}", "proxy"
            ) from None
        try:
            return await connect_factory.done
        except CancelledError:
            connection.transport.abortConnection()  # type: ignore[attr-defined]
            raise

    async def _resolve(self, host: Host, client: str) -> list[str]:
        """Return the addresses of `host`, at least one, with IPv4 and IPv6 interleaved."""
        if host.is_address:
            if ":" in host.name and not self._ipv6:
                raise UpstreamUnreachable(
                    f"{host.authority}: cannot connect to an IPv6 address because DISABLE_IPV6 is set"
                )
            return [host.name]
        addresses = interleave_families(await self._resolver.resolve(host.name, client), ipv6=self._ipv6)
        if not addresses:
            raise UpstreamUnreachable(f"{host.authority}: no such name, DNS returned no address", "dns")
        return addresses

    async def _dial_parallel(
        self, host: Host, targets: Sequence[tuple[str, int]], factory: IProtocolFactory
    ) -> IProtocol:
        source = self._source_address()
        happy_eyeballs = _HappyEyeballs(self._reactor, targets, factory, self._connect_timeout, source)
        try:
            return await happy_eyeballs.start()
        except RegistryError:
            raise
        except (TimeoutError, CancelledError):
            raise
        except Exception as error:
            reason = "refused" if isinstance(error, ConnectionRefusedError) else "unreachable"
            raise UpstreamUnreachable(f"{host.authority}: {_explain(error)}", reason) from None


def filter_addresses(addresses: Iterable[str], address_check: AddressCheck | None) -> list[str]:
    """Return the addresses that `address_check` accepts. If it rejects all of them, raise its first error."""
    allowed, errors = [], []
    for address in addresses:
        try:
            if address_check is not None:
                address_check(address)
        except RegistryError as error:
            errors.append(error)
        else:
            allowed.append(address)
    if not allowed and errors:
        raise errors[0]
    return allowed


def interleave_families(addresses: Iterable[str], *, ipv6: bool) -> list[str]:
    """Return the distinct addresses, alternating between IPv4 and IPv6 (RFC 8305, section 4)."""
    families: dict[bool, list[str]] = {}  # in the order in which the resolver returned them
    for address in dict.fromkeys(addresses):
        is_ipv6 = ":" in address
        if ipv6 or not is_ipv6:
            families.setdefault(is_ipv6, []).append(address)
    longest = max((len(family) for family in families.values()), default=0)
    return [family[index] for index in range(longest) for family in families.values() if index < len(family)]


def _explain(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, NoRouteError):
        return "no route to host"
    if isinstance(error, ConnectError):
        return f"cannot connect ({error.osError or type(error).__name__})"
    return f"cannot connect ({type(error).__name__})"


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, dialer: Dialer, host: Host, address_check: AddressCheck | None, client: str) -> None:
        self._dialer = dialer
        self._host = host
        self._address_check = address_check
        self._client = client

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        work = self._dialer.connect(self._host, self._address_check, self._client, protocolFactory)
        return Deferred.fromCoroutine(work)


class _HappyEyeballs:
    """Parallel connection attempts (RFC 8305): the next begins when the last one failed or took 250 ms.

    The first attempt that succeeds cancels the others. Twisted's HostnameEndpoint does the same, but resolves the name
    itself; this class takes the addresses, because they have already been checked.
    """

    def __init__(
        self,
        reactor: Any,
        targets: Sequence[tuple[str, int]],
        factory: IProtocolFactory,
        timeout: float,
        source_address: str | None,
    ) -> None:
        self._reactor = reactor
        self._targets = list(targets)
        self._factory = factory
        self._timeout = timeout
        self._bind_address = None if source_address is None else (source_address, 0)
        self._pending: list[Deferred[IProtocol]] = []
        self._next_attempt_call: Any = None
        self._first_failure: Failure | None = None
        self._result: Deferred[IProtocol] = Deferred(lambda _: self._cancel_attempts())

    def start(self) -> Deferred[IProtocol]:
        self._start_attempt()
        return self._result

    def _start_attempt(self) -> None:
        if self._next_attempt_call is not None and self._next_attempt_call.active():
            self._next_attempt_call.cancel()
        address, port = self._targets.pop(0)
        if self._targets:
            self._next_attempt_call = self._reactor.callLater(_CONNECTION_ATTEMPT_DELAY, self._start_attempt)
        endpoint = TCP6ClientEndpoint if ":" in address else TCP4ClientEndpoint
        connector = endpoint(self._reactor, address, port, self._timeout, self._bind_address)
        attempt: Deferred[IProtocol] = connector.connect(self._factory)
        self._pending.append(attempt)
        attempt.addCallbacks(self._on_connected, self._on_failed, callbackArgs=(attempt,), errbackArgs=(attempt,))

    def _on_connected(self, protocol: IProtocol, attempt: Deferred[IProtocol]) -> None:
        self._pending.remove(attempt)
        self._cancel_attempts()
        self._result.callback(protocol)

    def _on_failed(self, failure: Failure, attempt: Deferred[IProtocol]) -> None:
        if attempt not in self._pending:
            return  # cancelled
        self._pending.remove(attempt)
        if self._first_failure is None:
            self._first_failure = failure
        if self._targets:
            self._start_attempt()
        elif not self._pending:
            self._result.errback(self._first_failure)

    def _cancel_attempts(self) -> None:
        """Cancel all pending attempts and start no more."""
        if self._next_attempt_call is not None and self._next_attempt_call.active():
            self._next_attempt_call.cancel()
        self._targets.clear()
        pending, self._pending = self._pending, []
        for attempt in pending:
            attempt.cancel()
