"""The list of members: the addresses in FLEET, or those of one name, which is looked up again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Protocol

from attrs import define, field, frozen
from twisted.logger import Logger

from dockerproxy.concurrency import spawn
from dockerproxy.errors import RegistryError
from dockerproxy.fleet.members import Members
from dockerproxy.net.member_addresses import AddressesInvalid, check_addresses, plain, split_families
from dockerproxy.oci.names import Host

LOOKUP_INTERVAL = 10.0
"""Seconds between two look-ups of the name in FLEET."""

_MAX_MEMBERS = 1000
_MAX_SHOWN = 10  # names in a line of the log

log = Logger()

IsOwnAddress = Callable[[IPv4Address | IPv6Address], bool]


class FleetInvalid(ValueError):
    """FLEET and FLEET_ADDRESS do not tell which member this daemon is. The message is a sentence without its end."""


class MemberResolver(Protocol):
    """Resolves host names; see `net.resolver.NameResolver`."""

    async def resolve(self, name: str, client: str = "") -> list[str]: ...


@frozen
class Identity:
    """How this daemon finds itself in the list: by FLEET_ADDRESS, or else as an address of the machine.

    `ports` are those on which the proxy listens.
    """

    address: Host | None
    ports: frozenset[int]
    is_own_address: IsOwnAddress

    def find(self, members: Iterable[Host]) -> Host | None:
        """Return the member that this daemon is, None if it is not among them. Raise `FleetInvalid` if several are."""
        own = self._own(members)
        if len(own) > 1:
            names = " and ".join(one.authority for one in own)
            raise FleetInvalid(f"FLEET names this machine more than once ({names}); set FLEET_ADDRESS to its own entry")
        return own[0] if own else None

    def choose_family(self, members: Iterable[Host]) -> tuple[Host, ...]:
        """Return the members of one family: that in which this daemon is one of them, IPv4 if that is so for both.

        A name has addresses of both for each member if the network has. Raise `FleetInvalid` as `find` does.
        """
        families = [family for family in split_families(members) if family]
        own = [family for family in families if self._own(family)]
        return tuple((own or families or [[]])[0])

    def _own(self, members: Iterable[Host]) -> list[Host]:
        if self.address is not None:
            return [one for one in members if one == self.address]
        try:
            return [one for one in members if one.port in self.ports and self.is_own_address(ip_address(one.name))]
        except RegistryError as error:  # the kernel cannot be asked at this moment
            raise FleetInvalid(error.message) from None


def check_list(listed: tuple[Host, ...], identity: Identity) -> None:
    """Raise `FleetInvalid` if this daemon is not exactly one of the addresses `listed`."""
    if identity.find(listed) is not None:
        return
    if identity.address is not None:
        raise FleetInvalid(f"FLEET does not have FLEET_ADDRESS, {identity.address.authority}")
    ports = " or ".join(map(str, sorted(identity.ports)))
    raise FleetInvalid(
        f"FLEET has no address of this machine with the port of the proxy ({ports}); add it, or set FLEET_ADDRESS to"
        " the entry that is this daemon"
    )


@define(eq=False)
class Directory:
    """Keeps `members` up to date. `on_changed` is called with the names after each change.

    If the name in FLEET has no addresses, the last list is kept. A daemon that is not in the list serves alone, because
    the others do not count it as a member.
    """

    clock: Any
    _listed: tuple[Host, ...]
    _identity: Identity
    _resolver: MemberResolver
    _members: Members
    _on_changed: Callable[[tuple[str, ...]], object]
    _has_warned: bool = field(default=False, init=False)
    _next_look_up: Any = field(default=None, init=False)

    @property
    def name(self) -> Host | None:
        """The name that is looked up; None if FLEET has addresses."""
        return self._listed[0] if len(self._listed) == 1 and not self._listed[0].is_address else None

    def start(self) -> None:
        """Use the addresses in FLEET, or begin to look the name up."""
        if self.name is None:
            self._use(self._listed)
        else:
            spawn(self._look_up(self.name), "looking up the members of the fleet")

    def change(self, listed: tuple[Host, ...]) -> None:
        """Use another FLEET from now on. `check` it before."""
        self._listed, self._has_warned = listed, False
        self._cancel_look_up()
        self.start()

    def check(self, listed: tuple[Host, ...]) -> None:
        """Raise `FleetInvalid` if `listed` are addresses of which this daemon is not exactly one, or are too many."""
        _check_number(listed)
        if len(listed) != 1 or listed[0].is_address:
            check_list(listed, self._identity)

    async def _look_up(self, name: Host) -> None:
        try:
            addresses = await self._resolver.resolve(name.name)
        except RegistryError as error:
            addresses, reason = [], error.message
        else:
            reason = "it has no address"
        if name != self.name:  # FLEET has changed meanwhile
            return
        if addresses:
            self._use_answer([plain(Host.parse(f"[{one}]" if ":" in one else one, name.port)) for one in addresses])
        elif not self._has_warned:
            self._has_warned = True
            known = len(self._members.names)
            log.warn(
                "FLEET: {name} cannot be looked up ({reason}); {action}",
                name=name.name, reason=reason,
                action=f"the last {known} members are kept" if known else "this daemon serves alone until it can",
            )  # fmt: skip
        self._cancel_look_up()  # of a look-up that began at the same time
        self._next_look_up = self.clock.callLater(LOOKUP_INTERVAL, self.start)

    def _cancel_look_up(self) -> None:
        if self._next_look_up is not None and self._next_look_up.active():
            self._next_look_up.cancel()

    def _use_answer(self, hosts: list[Host]) -> None:
        try:
            self._use(self._identity.choose_family(hosts))
        except FleetInvalid as error:
            self._keep(error)

    def _keep(self, error: ValueError) -> None:
        if not self._has_warned:
            self._has_warned = True
            known = len(self._members.names)
            log.warn("{reason}; the last {count} members are kept", reason=str(error), count=known)

    def _use(self, hosts: tuple[Host, ...]) -> None:
        names = tuple(sorted({host.authority for host in hosts}))
        try:
            _check_number(names)
            check_addresses(hosts)
            me = self._identity.find(hosts)
        except (FleetInvalid, AddressesInvalid) as error:
            self._keep(error)
            return
        self._has_warned = False
        own_name = "" if me is None else me.authority
        before = self._members.names
        if (names, own_name) == (before, self._members.me):
            return
        self._members.use(names, own_name)
        self._on_changed(names)
        log.info(
            "the fleet has {count} members ({came} came, {left} left); this daemon is {me}",
            count=len(names), came=_shorten({*names} - {*before}), left=_shorten({*before} - {*names}),
            me=own_name or "not among them, and serves alone",
        )  # fmt: skip


def _check_number(members: Sized) -> None:
    if len(members) > _MAX_MEMBERS:
        raise FleetInvalid(f"FLEET has {len(members)} members; {_MAX_MEMBERS} are allowed")


def _shorten(names: set[str]) -> str:
    """Return some of `names` for the log."""
    shown = " ".join(sorted(names)[:_MAX_SHOWN]) or "none"
    return f"{shown} and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else shown
