"""The list of members, from the setting or from DNS."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from dockerproxy.errors import DestinationForbidden, ServiceOverloaded
from dockerproxy.fleet import directory
from dockerproxy.fleet.directory import LOOKUP_INTERVAL, Directory, FleetInvalid, Identity, check_list
from dockerproxy.fleet.members import Members
from dockerproxy.oci.names import Host

OWN = {"10.0.0.1", "10.0.0.9", "fd00::1"}


def is_own(address: Any) -> bool:
    return str(address) in OWN


def hosts(*names: str) -> tuple[Host, ...]:
    return tuple(Host.parse(name, 3128) for name in names)


def identity(address: str | None = None, own: Any = is_own) -> Identity:
    return Identity(None if address is None else Host.parse(address, 3128), frozenset({3128}), own)


class ScriptedResolver:
    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.error: Exception | None = None

    async def resolve(self, name: str, client: str = "") -> list[str]:
        if self.error is not None:
            raise self.error
        return self.addresses


def test_the_own_address_with_the_port_of_the_proxy_is_this_daemon() -> None:
    assert identity().find(hosts("10.0.0.1:80", "10.0.0.1", "10.0.0.2")) == Host("10.0.0.1", 3128)


@pytest.mark.parametrize(
    ("address", "listed", "sentence"),
    [
        (None, ("10.0.0.2", "10.0.0.3"), "FLEET has no address of this machine with the port of the proxy (3128)"),
        (None, ("10.0.0.1:80", "10.0.0.3"), "FLEET has no address of this machine with the port of the proxy (3128)"),
        (None, ("10.0.0.1", "10.0.0.9"), "more than once (10.0.0.1:3128 and 10.0.0.9:3128); set FLEET_ADDRESS"),
        ("10.0.0.4", ("10.0.0.1", "10.0.0.3"), "FLEET does not have FLEET_ADDRESS, 10.0.0.4:3128"),
    ],
    ids=["nobody", "other-port", "twice", "not-listed"],
)
def test_a_list_that_does_not_say_who_this_daemon_is_is_refused(
    address: str | None, listed: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(FleetInvalid) as raised:
        check_list(hosts(*listed), identity(address))
    assert sentence in str(raised.value)


def test_the_setting_chooses_between_several_own_addresses() -> None:
    check_list(hosts("10.0.0.1", "10.0.0.9"), identity("10.0.0.9"))


class DirectoryHarness:
    def __init__(self, *listed: str, address: str | None = None, own: Any = is_own) -> None:
        self.clock, self.resolver = Clock(), ScriptedResolver()
        self.members = Members(self.clock.seconds)
        self.changes: list[tuple[str, ...]] = []
        self.directory = Directory(
            self.clock, hosts(*listed), identity(address, own), self.resolver, self.members, self.changes.append
        )


def test_a_listed_fleet_is_used_at_once() -> None:
    harness = DirectoryHarness("10.0.0.2", "10.0.0.1")
    harness.directory.start()
    assert harness.members.names == ("10.0.0.1:3128", "10.0.0.2:3128") and harness.members.me == "10.0.0.1:3128"
    assert harness.changes == [harness.members.names]


def test_a_name_is_looked_up_again_and_the_last_good_list_is_kept() -> None:
    harness = DirectoryHarness("fleet.example:3128")
    harness.directory.start()
    assert harness.members.names == ()  # it serves alone
    harness.resolver.addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    harness.clock.advance(LOOKUP_INTERVAL)
    known = ("10.0.0.1:3128", "10.0.0.2:3128", "10.0.0.3:3128")
    assert harness.members.names == known and harness.members.me == "10.0.0.1:3128"
    harness.resolver.addresses = []
    harness.clock.advance(LOOKUP_INTERVAL)
    harness.resolver.error = ServiceOverloaded("too many look-ups")
    harness.clock.advance(LOOKUP_INTERVAL)
    assert harness.members.names == known
    harness.resolver.error, harness.resolver.addresses = None, ["10.0.0.2", "10.0.0.4"]
    harness.clock.advance(LOOKUP_INTERVAL)
    assert harness.members.names == ("10.0.0.2:3128", "10.0.0.4:3128") and harness.members.me == ""
    assert len(harness.changes) == 2


def test_a_name_that_names_this_machine_twice_keeps_the_last_list() -> None:
    harness = DirectoryHarness("fleet.example")
    harness.resolver.addresses = ["10.0.0.1", "10.0.0.2"]
    harness.directory.start()
    harness.resolver.addresses = ["10.0.0.1", "10.0.0.9"]
    harness.clock.advance(LOOKUP_INTERVAL)
    assert harness.members.names == ("10.0.0.1:3128", "10.0.0.2:3128")


def test_a_list_that_stays_the_same_is_no_change() -> None:
    harness = DirectoryHarness("fleet.example")
    harness.resolver.addresses = ["10.0.0.1", "10.0.0.2"]
    harness.directory.start()
    harness.resolver.addresses = ["10.0.0.2", "10.0.0.1"]
    harness.clock.advance(LOOKUP_INTERVAL)
    assert len(harness.changes) == 1


def test_another_list_is_used_after_a_reload() -> None:
    harness = DirectoryHarness("10.0.0.1", "10.0.0.2")
    harness.directory.start()
    harness.directory.change(hosts("10.0.0.1", "10.0.0.3"))
    assert harness.members.names == ("10.0.0.1:3128", "10.0.0.3:3128") and len(harness.changes) == 2


def test_a_name_may_become_addresses_and_the_other_way() -> None:
    harness = DirectoryHarness("fleet.example")
    harness.resolver.addresses = ["10.0.0.1", "10.0.0.2"]
    harness.directory.start()
    harness.directory.change(hosts("10.0.0.1", "10.0.0.3"))
    harness.clock.advance(3 * LOOKUP_INTERVAL)
    assert harness.members.names == ("10.0.0.1:3128", "10.0.0.3:3128")  # nobody looks the name up any more
    harness.directory.change(hosts("fleet.example"))
    assert harness.members.names == ("10.0.0.1:3128", "10.0.0.2:3128")
    assert len(harness.clock.getDelayedCalls()) == 1


def test_an_answer_for_the_name_before_counts_for_nothing() -> None:
    harness = DirectoryHarness("fleet.example")
    answer: Deferred[list[str]] = Deferred()

    async def resolve(name: str, client: str = "") -> list[str]:
        return await answer

    harness.resolver.resolve = resolve  # type: ignore[method-assign]
    harness.directory.start()
    harness.directory.change(hosts("10.0.0.1", "10.0.0.3"))
    answer.callback(["10.0.0.1", "10.0.0.9"])
    assert harness.members.names == ("10.0.0.1:3128", "10.0.0.3:3128") and harness.clock.getDelayedCalls() == []


@pytest.mark.parametrize("listed", [("10.0.0.2", "10.0.0.3"), ("10.0.0.1", "10.0.0.9")], ids=["nobody", "twice"])
def test_a_reload_refuses_a_list_that_does_not_say_who_this_daemon_is(listed: tuple[str, ...]) -> None:
    harness = DirectoryHarness("10.0.0.1", "10.0.0.2")
    with pytest.raises(FleetInvalid):
        harness.directory.check(hosts(*listed))
    harness.directory.check(hosts("fleet.example"))  # which only a look-up tells


def many(count: int) -> list[str]:
    return ["10.0.0.1", *(f"10.1.{number // 250}.{number % 250}" for number in range(count - 1))]


def test_a_thousand_members_are_allowed() -> None:
    harness = DirectoryHarness("10.0.0.1", "10.0.0.2")
    harness.directory.check(hosts(*many(1000)))
    with pytest.raises(FleetInvalid, match="FLEET has 1001 members; 1000 are allowed"):
        harness.directory.check(hosts(*many(1001)))


def test_a_name_with_too_many_addresses_keeps_the_last_list(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    for level in ("warn", "info"):
        monkeypatch.setattr(directory.log, level, lambda form, **values: lines.append(form.format(**values)))
    harness = DirectoryHarness("fleet.example")
    harness.resolver.addresses = many(1000)
    harness.directory.start()
    harness.resolver.addresses = many(1001)
    for _ in range(3):
        harness.clock.advance(LOOKUP_INTERVAL)
    assert len(harness.members.names) == 1000
    came, warned = lines  # once, and not all the names
    assert came.startswith("the fleet has 1000 members (10.0.0.1:3128 ") and len(came) < 400
    assert warned == "FLEET has 1001 members; 1000 are allowed; the last 1000 members are kept"


def test_answers_that_flap_are_followed_and_logged_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that has sent wrong content is left alone also if it was gone meanwhile."""
    harness = DirectoryHarness("fleet.example")
    harness.resolver.addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    harness.directory.start()
    harness.members.distrusted("10.0.0.2:3128", "wrong content", 600)
    for _ in range(10):
        harness.resolver.addresses = ["10.0.0.1", "10.0.0.3"]
        harness.clock.advance(LOOKUP_INTERVAL)
        assert "10.0.0.2:3128" not in harness.members.states()
        harness.resolver.addresses = ["10.0.0.3", "10.0.0.2", "10.0.0.1"]
        harness.clock.advance(LOOKUP_INTERVAL)
        assert harness.members.is_down("10.0.0.2:3128")


def test_a_name_that_has_only_others_leaves_this_daemon_alone() -> None:
    harness = DirectoryHarness("fleet.example")
    harness.resolver.addresses = ["10.0.0.2", "10.0.0.3"]
    harness.directory.start()
    assert harness.members.me == "" and "me" not in harness.members.states().values()


def test_members_by_ipv6_are_found_in_each_spelling() -> None:
    harness = DirectoryHarness("fleet.example")
    harness.resolver.addresses = ["fd00::1", "fd00:0:0::2"]
    harness.directory.start()
    assert harness.members.names == ("[fd00::1]:3128", "[fd00::2]:3128") and harness.members.me == "[fd00::1]:3128"


@pytest.mark.parametrize(
    ("own", "address", "names", "me"),
    [
        ({"10.0.0.1", "fd00::1"}, None, ("10.0.0.1:3128", "10.0.0.2:3128"), "10.0.0.1:3128"),
        ({"fd00::1"}, None, ("[fd00::1]:3128", "[fd00::2]:3128"), "[fd00::1]:3128"),
        ({"10.0.0.1", "fd00::1"}, "[fd00::2]", ("[fd00::1]:3128", "[fd00::2]:3128"), "[fd00::2]:3128"),
        (set(), None, ("10.0.0.1:3128", "10.0.0.2:3128"), ""),
    ],
    ids=["both", "ipv6-only", "by-setting", "nobody"],
)
def test_a_name_with_addresses_of_both_families_is_one_fleet(
    own: set[str], address: str | None, names: tuple[str, ...], me: str
) -> None:
    """Each member of a network with both has two addresses, and connects from one."""
    harness = DirectoryHarness("fleet.example", address=address, own=lambda one: str(one) in own)
    harness.resolver.addresses = ["fd00::1", "10.0.0.1", "10.0.0.2", "fd00::2"]
    harness.directory.start()
    assert (harness.members.names, harness.members.me) == (names, me)


@pytest.mark.parametrize(
    "answer",
    [["0.0.0.0"], ["10.0.0.1", "127.0.0.1"], ["::"], ["224.0.0.9", "10.0.0.1"], ["fe80::1"], ["10.0.0.1", "10.0.0.9"]],
    ids=["blocked", "loopback-beside-others", "any", "group", "link-local", "twice"],
)
def test_an_answer_that_is_no_fleet_keeps_the_last_list(answer: list[str]) -> None:
    harness = DirectoryHarness("fleet.example")
    harness.resolver.addresses = ["10.0.0.1", "10.0.0.2"]
    harness.directory.start()
    harness.resolver.addresses = answer
    harness.clock.advance(LOOKUP_INTERVAL)
    assert harness.members.names == ("10.0.0.1:3128", "10.0.0.2:3128")
    harness.resolver.addresses = ["10.0.0.1", "10.0.0.3"]
    harness.clock.advance(LOOKUP_INTERVAL)
    assert harness.members.names == ("10.0.0.1:3128", "10.0.0.3:3128")


def test_an_address_in_the_form_of_ipv6_is_that_of_ipv4() -> None:
    harness = DirectoryHarness("fleet.example")
    harness.resolver.addresses = ["::ffff:10.0.0.1", "::ffff:10.0.0.2", "10.0.0.2"]
    harness.directory.start()
    assert harness.members.names == ("10.0.0.1:3128", "10.0.0.2:3128") and harness.members.me == "10.0.0.1:3128"


def test_a_kernel_that_cannot_be_asked_for_a_moment_ends_no_look_ups() -> None:
    failures = [DestinationForbidden("cannot ask the kernel: Too many open files")]

    def own(address: Any) -> bool:
        if failures:
            raise failures.pop()
        return is_own(address)

    harness = DirectoryHarness("fleet.example", own=own)
    harness.resolver.addresses = ["10.0.0.1", "10.0.0.2"]
    harness.directory.start()
    assert harness.members.names == ()
    harness.clock.advance(LOOKUP_INTERVAL)
    assert harness.members.me == "10.0.0.1:3128"


def test_a_kernel_that_cannot_be_asked_at_the_start_is_a_sentence() -> None:
    def own(address: Any) -> bool:
        raise DestinationForbidden("cannot ask the kernel: does a sandbox forbid AF_NETLINK?")

    with pytest.raises(FleetInvalid, match="does a sandbox forbid AF_NETLINK"):
        check_list(hosts("10.0.0.1"), identity(own=own))


def test_a_reload_during_a_look_up_begins_no_second_row_of_look_ups() -> None:
    harness = DirectoryHarness("fleet.example")
    answers: list[Deferred[list[str]]] = []

    async def resolve(name: str, client: str = "") -> list[str]:
        answers.append(Deferred())
        return await answers[-1]

    harness.resolver.resolve = resolve  # type: ignore[method-assign]
    harness.directory.start()
    for _ in range(3):
        harness.directory.change(hosts("fleet.example"))
    for answer in answers:
        answer.callback(["10.0.0.1", "10.0.0.2"])
    assert len(harness.clock.getDelayedCalls()) == 1
