"""Connections to other servers: names resolved, every address asked about, the first one that answers taken.

The address that a connection goes to is one that `permit` was asked about, from the same look-up: a name that means
another address a moment later (DNS rebinding) gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.error import ConnectError, ConnectionRefusedError, NoRouteError, TimeoutError
from twisted.internet.interfaces import (
    IAddress,
    IHostResolution,
    IProtocol,
    IProtocolFactory,
    IResolutionReceiver,
    IStreamClientEndpoint,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from dockerproxy.errors import RegistryError, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.net.parent import ConnectFactory, ParentProxy
from dockerproxy.oci.names import Host

Permit = Callable[[str], None]
"""Raises a `RegistryError` for an address (as text) that must not be connected to."""

_STAGGER = 0.25  # seconds before the next address is tried as well: RFC 8305, section 5, "Connection Attempt Delay"


class Dialer:
    """Makes endpoints for hosts.

    `overrides` say where to connect instead of asking DNS (neither `permit` nor `proxy` is asked then). Without `ipv6`
    only IPv4 is used. `connect_timeout` are the seconds for all of a connection: look-up, attempts, the proxy's answer.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        overrides: Mapping[Host, tuple[str, int]] | None = None,
        ipv6: bool = True,
        proxy: ParentProxy | None = None,
        connect_timeout: float = 60.0,
    ) -> None:
        self._reactor = reactor
        self._overrides = dict(overrides or {})
        self._ipv6 = ipv6
        self._proxy = proxy
        self._connect_timeout = connect_timeout

    def endpoint(self, host: Host, permit: Permit | None = None) -> IStreamClientEndpoint:
        """Return an endpoint for `host` whose connection goes only to an address that `permit` lets pass.

        It fails with what `permit` raised where that leaves no address, else with `UpstreamUnreachable`,
        `UpstreamTimeout` or `UpstreamBroken` (the parent proxy's answer), with a sentence that names the host.
        """
        return _Endpoint(self, host, permit)

    async def connect(self, host: Host, permit: Permit | None, factory: IProtocolFactory) -> IProtocol:
        """Return a connected protocol of `factory`; see `endpoint`."""
        work = Deferred.fromCoroutine(self._connect(host, permit, factory))
        work.addTimeout(self._connect_timeout, self._reactor)
        try:
            return await work
        except (DeferredTimeout, TimeoutError):
            seconds = self._connect_timeout
            raise UpstreamTimeout(f"{host.authority}: timed out, no connection in {seconds:g} s") from None

    async def _connect(self, host: Host, permit: Permit | None, factory: IProtocolFactory) -> IProtocol:
        override = self._overrides.get(host)
        if override is not None:
            return await self._race(host, [override], factory)
        if self._proxy is not None and self._proxy.serves(host):
            if permit is not None and host.is_address:
                permit(host.name)
            return await self._through(self._proxy, host, factory)
        addresses = permitted(await self._resolve(host), permit)
        return await self._race(host, [(address, host.port) for address in addresses], factory)

    async def _through(self, proxy: ParentProxy, host: Host, factory: IProtocolFactory) -> IProtocol:
        parent = Host(proxy.host, proxy.port)
        tunnel = ConnectFactory(proxy, host, factory)
        try:
            addresses = await self._resolve(parent)
            connection = await self._race(parent, [(address, parent.port) for address in addresses], tunnel)
        except UpstreamUnreachable as error:
            raise UpstreamUnreachable(f"{host.authority}: no connection to the proxy, {error.message}") from None
        try:
            return await tunnel.done
        except CancelledError:
            connection.transport.abortConnection()  # type: ignore[attr-defined]
            raise

    async def _resolve(self, host: Host) -> list[str]:
        """Return the addresses of `host`, families alternating as the resolver's first choice begins; at least one."""
        if host.is_address:
            if ":" in host.name and not self._ipv6:
                raise UpstreamUnreachable(f"{host.authority}: not connected to, DISABLE_IPV6 is set")
            return [host.name]
        receiver = _Receiver()
        types = (IPv4Address, IPv6Address) if self._ipv6 else (IPv4Address,)
        self._reactor.nameResolver.resolveHostName(receiver, host.name, portNumber=host.port, addressTypes=types)
        addresses = alternating(await receiver.complete, ipv6=self._ipv6)
        if not addresses:
            raise UpstreamUnreachable(f"{host.authority}: no such name, DNS has no address for it")
        return addresses

    async def _race(self, host: Host, targets: Sequence[tuple[str, int]], factory: IProtocolFactory) -> IProtocol:
        race = _Race(self._reactor, targets, factory, self._connect_timeout)
        try:
            return await race.start()
        except RegistryError:
            raise
        except (TimeoutError, CancelledError):
            raise
        except Exception as error:
            raise UpstreamUnreachable(f"{host.authority}: {_explain(error)}") from None


def permitted(addresses: Iterable[str], permit: Permit | None) -> list[str]:
    """Return those of `addresses` that `permit` lets pass; where that is none, raise what it raised first."""
    passed, refusals = [], []
    for address in addresses:
        try:
            if permit is not None:
                permit(address)
        except RegistryError as error:
            refusals.append(error)
        else:
            passed.append(address)
    if not passed and refusals:
        raise refusals[0]
    return passed


def alternating(addresses: Iterable[IAddress], *, ipv6: bool) -> list[str]:
    """Return the distinct addresses with their families in turn, as RFC 8305, section 4, asks."""
    families: dict[type, list[str]] = {}  # in the order in which the resolver brought them
    for address in addresses:
        if isinstance(address, IPv4Address) or (isinstance(address, IPv6Address) and ipv6):
            family = families.setdefault(type(address), [])
            if address.host not in family:
                family.append(address.host)
    turns = max((len(family) for family in families.values()), default=0)
    return [family[turn] for turn in range(turns) for family in families.values() if turn < len(family)]


def _explain(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, NoRouteError):
        return "no route to it"
    if isinstance(error, ConnectError):
        return f"no connection ({error.osError or type(error).__name__})"
    return f"no connection ({type(error).__name__})"


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, dialer: Dialer, host: Host, permit: Permit | None) -> None:
        self._dialer = dialer
        self._host = host
        self._permit = permit

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        return Deferred.fromCoroutine(self._dialer.connect(self._host, self._permit, protocolFactory))


@implementer(IResolutionReceiver)
class _Receiver:
    """Collects what the resolver brings."""

    def __init__(self) -> None:
        self._addresses: list[IAddress] = []
        self.complete: Deferred[list[IAddress]] = Deferred()

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        """A thread's look-up cannot be called off; whoever waits gives up alone."""

    def addressResolved(self, address: IAddress) -> None:
        self._addresses.append(address)

    def resolutionComplete(self) -> None:
        self.complete.callback(self._addresses)


class _Race:
    """Attempts to connect, each begun when the one before failed or took too long; the first to succeed ends them all.

    Twisted's HostnameEndpoint does the same behind a look-up of its own; here the addresses are given.
    """

    def __init__(
        self, reactor: Any, targets: Sequence[tuple[str, int]], factory: IProtocolFactory, timeout: float
    ) -> None:
        self._reactor = reactor
        self._targets = list(targets)
        self._factory = factory
        self._timeout = timeout
        self._pending: list[Deferred[IProtocol]] = []
        self._stagger: Any = None
        self._failure: Failure | None = None
        self._result: Deferred[IProtocol] = Deferred(lambda _: self._stop())

    def start(self) -> Deferred[IProtocol]:
        self._next()
        return self._result

    def _next(self) -> None:
        if self._stagger is not None and self._stagger.active():
            self._stagger.cancel()
        address, port = self._targets.pop(0)
        if self._targets:
            self._stagger = self._reactor.callLater(_STAGGER, self._next)
        endpoint = TCP6ClientEndpoint if ":" in address else TCP4ClientEndpoint
        attempt: Deferred[IProtocol] = endpoint(self._reactor, address, port, self._timeout).connect(self._factory)
        self._pending.append(attempt)
        attempt.addCallbacks(self._won, self._lost, callbackArgs=(attempt,), errbackArgs=(attempt,))

    def _won(self, protocol: IProtocol, attempt: Deferred[IProtocol]) -> None:
        self._pending.remove(attempt)
        self._stop()
        self._result.callback(protocol)

    def _lost(self, failure: Failure, attempt: Deferred[IProtocol]) -> None:
        if attempt not in self._pending:
            return  # called off
        self._pending.remove(attempt)
        if self._failure is None:
            self._failure = failure
        if self._targets:
            self._next()
        elif not self._pending:
            self._result.errback(self._failure)

    def _stop(self) -> None:
        """Call off whatever is under way."""
        if self._stagger is not None and self._stagger.active():
            self._stagger.cancel()
        self._targets.clear()
        pending, self._pending = self._pending, []
        for attempt in pending:
            attempt.cancel()
