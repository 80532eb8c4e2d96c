"""The checks: each turns facts about the daemon, its machine or a registry into findings. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from attrs import frozen

from dockerproxy.doctor.findings import BAD, OK, WARN, Diagnosis

DAY = 86400.0

_CLOCK_WARNING, _CLOCK_ERROR = 60.0, 300.0  # seconds by which the clock may be wrong
_CA_WARNING, _CA_ERROR = 90 * DAY, 30 * DAY  # seconds to its end
_LOW_PART, _LOW_BYTES, _LOW_INODES = 0.05, 2_000_000_000, 50_000
_LOW_BUDGET = 0.1  # part of the limit
_FEW_DESCRIPTORS = 4096
_DESCRIPTORS_WARNING, _DESCRIPTORS_ERROR = 0.8, 0.95  # part of the limit
_SHORT_IDLE = DAY
_MAX_NAMED = 10  # clients in a sentence


@frozen
class RegistryFacts:
    """The answer of a registry to ``GET /v2/`` without a login, over a new connection.

    `error` says why there is no answer, without the name of the server. `offset` is our clock less that of its Date
    field, in seconds; None if that says nothing. `issuer` is the name of the CA of its certificate. `problem` is a
    clause about an answer that is not a registry's. `token_server` is that which clients reach without us, if any.
    """

    name: str
    error: str = ""
    seconds: float = 0.0
    issuer: str = ""
    problem: str = ""
    offset: float | None = None
    token_server: str = ""


@frozen
class LoginFacts:
    """Whether the login for a registry in `setting` is accepted. `refusal` and `unknown` are clauses, or empty."""

    registry: str
    setting: str
    refusal: str = ""
    unknown: str = ""


@frozen
class WildcardFacts:
    """A wildcard of REGISTRIES: how many hosts that it covers have content here, and how many of them were asked.

    `setting` has the login for it, if it is not empty.
    """

    name: str
    used: int = 0
    asked: int = 0
    setting: str = ""


@frozen
class HelperFacts:
    """A credential helper, the `program` that `setting` names for the hosts and wildcards `keys`.

    `answers` has why it failed for each server that it was asked for, an empty text if it did not.
    """

    program: str
    setting: str
    keys: tuple[str, ...]
    answers: tuple[tuple[str, str], ...] = ()


@frozen
class MemberFacts:
    """The answer of a member of FLEET to a question for its CA: `error` says why there is none."""

    name: str
    error: str = ""
    has_same_ca: bool = True


@frozen
class DiskFacts:
    """A store, whose place `setting` has: the `problem` of a write, and the room. Sizes are in bytes.

    `growth` are the bytes that the store will take beside those it has. `inodes` is 0 if the file system has no bound.
    A bucket has no `free`.
    """

    setting: str
    problem: str = ""
    free: int | None = None
    size: int = 0
    free_inodes: int = 0
    inodes: int = 0
    growth: int = 0


@frozen
class PortFacts:
    """A port of `setting`: its local `address`, and whether it answered at `outside`, an address of this machine.

    `outside` is empty if there is no such address. `error` says why it did not answer.
    """

    setting: str
    address: str
    port: int
    is_loopback: bool
    outside: str = ""
    error: str = ""


def check_registries(registries: Iterable[RegistryFacts]) -> Iterator[Diagnosis]:
    """Return whether each registry answers, and with whose certificate."""
    for facts in registries:
        name = facts.name
        if facts.error:
            sentence = f"{name} does not answer: {facts.error}"
            yield Diagnosis("registry", name, BAD, sentence, _registry_advice(facts.error, name), is_public=True)
        elif facts.problem:
            advice = "Is there a firewall or captive portal in between? Open its address in a browser here."
            yield Diagnosis("registry", name, WARN, f"{name} answers, but {facts.problem}", advice, is_public=True)
        else:
            issuer = f"; its certificate is by {facts.issuer}" if facts.issuer else ""
            sentence = f"{name} answers in {facts.seconds:.2f} s{issuer}"
            yield Diagnosis("registry", name, OK, sentence, is_public=True)


def _registry_advice(error: str, name: str) -> str:
    cached = "Cached images are still served."
    if "certificate" in error:
        return f"If a proxy of your network decrypts TLS, its CA belongs in UPSTREAM_CA_FILE. {cached}"
    if "no such name" in error:
        question = "Does this machine's name server answer"
        if name != "docker.io":  # which is served without an entry
            question += ", and is the name in REGISTRIES right"
        return f"{question}? {cached}"
    return f"Does a firewall forbid the connection, or does it need another proxy (UPSTREAM_PROXY)? {cached}"


def check_states(states: Iterable[Mapping[str, Any]], now: float) -> Iterator[Diagnosis]:
    """Return the registries that did not answer clients' requests of late (`RegistryStates.report_list`)."""
    for state in states:
        stale = f"; {_count(state['stale'], 'stale answer')}" if state["stale"] else ""
        since = f" since {format_time(state['since'])} ({format_seconds(now - state['since'])}{stale})"
        sentence = f"{state['registry']} does not answer: {state['reason']}{since}"
        advice = _registry_advice(state["reason"], state["registry"])
        yield Diagnosis("registry", state["registry"], BAD, sentence, advice, is_public=True)


def check_fleet(members: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Return the members of FLEET that are down. `members` has the state of each: ``me``, ``up``, or the reason."""
    for name, state in members.items():
        if state not in ("me", "up"):
            advice = "The others do its work. Does the daemon run there, with the same FLEET and the same CA?"
            yield Diagnosis("fleet", name, WARN, f"the member {name} is down: {state}", advice)
    if members and "me" not in members.values():
        advice = "Set FLEET_ADDRESS to the entry of FLEET that is this daemon, or wait until its name has this address."
        yield Diagnosis("fleet", "FLEET", WARN, "this daemon is not among the members of FLEET", advice)


def check_logins(logins: Iterable[LoginFacts]) -> Iterator[Diagnosis]:
    """Return whether the administrator's logins are accepted."""
    for login in logins:
        subject = f"the login for {login.registry} in {login.setting}"
        if login.refusal:
            advice = "Renew it there and reload. Until then, only public images can be pulled."
            yield Diagnosis("login", login.registry, BAD, f"{subject} is refused: {login.refusal}", advice)
        elif login.unknown:
            yield Diagnosis("login", login.registry, WARN, f"{subject} could not be tried: {login.unknown}")
        else:
            yield Diagnosis("login", login.registry, OK, f"{subject} is accepted")


def check_token_servers(registries: Iterable[RegistryFacts]) -> Iterator[Diagnosis]:
    """Return the registries whose token servers clients reach without us.

    That is fine for public images, so it is no warning.
    """
    for facts in registries:
        if facts.token_server:
            registry, server = facts.name, facts.token_server
            sentence = f"the token server of {registry} is {server}, which is not in REGISTRIES"
            advice = (
                f"If clients pull private images of {registry} with their own logins, add {server} to REGISTRIES: these"
                f" logins are unknown here otherwise, and get nothing while {registry} is down."
            )
            yield Diagnosis("tokens", registry, OK, sentence, advice)


def check_wildcards(wildcards: Iterable[WildcardFacts]) -> Iterator[Diagnosis]:
    """Return how far each wildcard of REGISTRIES was examined: nobody knows which hosts it covers."""
    for facts in wildcards:
        login = f", and the login for it in {facts.setting} was not tried" if facts.setting else ""
        if not facts.used:
            sentence = f"{facts.name} has not been used yet, so none of its hosts was asked{login}"
        elif facts.asked < facts.used:
            sentence = f"{facts.name}: {facts.asked} of the {facts.used} hosts that have been used were asked"
        else:
            sentence = f"{facts.name}: each host that has been used was asked ({facts.used})"
        yield Diagnosis("registry", facts.name, OK, sentence)


def check_helpers(helpers: Iterable[HelperFacts]) -> Iterator[Diagnosis]:
    """Return whether credential helpers worked. The warnings about settings are about missing ones."""
    for facts in helpers:
        program, named = facts.program, _join(facts.keys)
        failures = [(server, problem) for server, problem in facts.answers if problem]
        if failures:
            server, problem = failures[0]
            more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            advice = (
                "Run it as the daemon's user: echo HOST | docker-credential-NAME get. Its own documentation says more."
            )
            yield Diagnosis("login", program, BAD, f"{program} {problem}, for {server}{more}", advice)
        elif not facts.answers:
            sentence = f"{program} ({facts.setting}) was not asked yet, because no host of {named} has been used"
            yield Diagnosis("login", program, OK, sentence)
        else:
            yield Diagnosis(
                "login", program, OK, f"{program} works for {_join([server for server, _ in facts.answers])}"
            )


def check_members(members: Iterable[MemberFacts]) -> Iterator[Diagnosis]:
    """Return whether the other members of FLEET answer, and have the CA of this daemon."""
    for facts in members:
        if facts.error:
            advice = "The others do its work. Does the daemon run there, and may this machine connect to it?"
            yield Diagnosis(
                "fleet", facts.name, WARN, f"the member {facts.name} does not answer: {facts.error}", advice
            )
        elif not facts.has_same_ca:
            advice = "Clients that trust one of them refuse the other: copy ca.crt and ca.key from one of them to all."
            sentence = f"the member {facts.name} has another CA than this daemon"
            yield Diagnosis("fleet", facts.name, BAD, sentence, advice)
        else:
            yield Diagnosis("fleet", facts.name, OK, f"the member {facts.name} answers")


def check_clock(registries: Iterable[RegistryFacts]) -> Iterator[Diagnosis]:
    """Return whether this machine's clock is right. It is if that of any registry agrees."""
    offsets = {facts.name: facts.offset for facts in registries if facts.offset is not None}
    if not offsets:
        return
    name, offset = min(offsets.items(), key=lambda item: abs(item[1]))
    if abs(offset) <= _CLOCK_WARNING:
        yield Diagnosis("clock", "", OK, "this machine's clock agrees with the registries'", is_public=True)
        return
    others = f" and {len(offsets) - 1} more" if len(offsets) > 1 else ""
    direction = "ahead of" if offset > 0 else "behind"
    level = WARN if abs(offset) <= _CLOCK_ERROR else BAD
    sentence = f"this machine's clock is {format_seconds(abs(offset))} {direction} that of {name}{others}"
    advice = "Certificates and tokens depend on the clock: synchronise it by NTP (timedatectl set-ntp true)."
    yield Diagnosis("clock", "", level, sentence, advice, is_public=True)


def check_budget(limits: Iterable[Mapping[str, Any]], now: float) -> Iterator[Diagnosis]:
    """Return whether registries still allow pulls; `limits` are those of ``/v1/budget``."""
    for limit in limits:
        name, remaining, total = limit["registry"], limit["remaining"], limit["limit"]
        is_current = limit["window"] is None or limit["seen"] + limit["window"] > now
        advice = "Cached images are still served."
        if name == "docker.io":
            advice += " A login for auth.docker.io in AUTH_REGISTRIES raises the limit."
        if limit["refused_until"] > now:
            sentence = f"{name} refuses pulls until {format_time(limit['refused_until'])}"
            yield Diagnosis("budget", name, WARN, sentence, advice, is_public=True)
        elif remaining is not None and is_current:
            of_all = "" if total is None else f" of {total}"
            is_low = remaining == 0 or (total is not None and remaining < total * _LOW_BUDGET)
            sentence = f"{name} allows {remaining}{of_all} more pulls"
            yield Diagnosis("budget", name, WARN if is_low else OK, sentence, advice if is_low else "", is_public=True)


def check_disks(disks: Iterable[DiskFacts]) -> Iterator[Diagnosis]:
    """Return whether the stores can be written, and have room."""
    for disk in disks:
        setting, free, advice = disk.setting, disk.free, ""
        if disk.problem:
            sentence, _, advice = disk.problem.partition("; ")
            yield Diagnosis("disk", setting, BAD, sentence, advice[:1].upper() + advice[1:] + "." if advice else "")
            continue
        if free is None:
            yield Diagnosis("disk", setting, OK, f"{setting} answers")
            continue
        level, sentence = OK, f"{setting} has {format_bytes(free)} free"
        if 0 < disk.free_inodes < min(_LOW_INODES, disk.inodes * _LOW_PART):
            level, sentence = WARN, f"{setting} has only {disk.free_inodes} inodes free"
            advice = "Each blob and link takes some: delete other files there, or make a file system with more."
        elif free < min(_LOW_BYTES, disk.size * _LOW_PART):
            level, sentence = WARN, f"{setting} has only {format_bytes(free)} free"
            advice = "Free space there, or give it a larger disk."
        elif disk.growth > free:
            level = WARN
            sentence = f"CACHE_MAX_SIZE lets the cache grow by {format_bytes(disk.growth)}, but {setting} has only"
            sentence += f" {format_bytes(free)} free"
            advice = "The disk will be full before anything is evicted: lower CACHE_MAX_SIZE, or use a larger disk."
        yield Diagnosis("disk", setting, level, sentence, advice)


def check_conditions(keeps: bool) -> Iterator[Diagnosis]:
    """Return whether the bucket `keeps` to conditions."""
    setting = "REGISTRY_STORE"
    if keeps:
        yield Diagnosis("store", setting, OK, f"{setting} keeps to If-None-Match")
    else:
        sentence = f"{setting} does not keep to If-None-Match, so `dockerproxy gc` refuses to run"
        advice = "Pushes and pulls work. Use a store, or a newer version of it, that creates an object only once."
        yield Diagnosis("store", setting, WARN, sentence, advice)


def check_evictions(idle_age: float | None) -> Iterator[Diagnosis]:
    """Return whether the cache is large enough. `idle_age` are the seconds for which the last to leave was unused."""
    if idle_age is None:
        return
    sentence = f"the last blob that was removed to make room had not been used for {format_seconds(idle_age)}"
    if idle_age < _SHORT_IDLE:
        advice = "It may be needed again soon: raise CACHE_MAX_SIZE."
        yield Diagnosis("evictions", "CACHE_MAX_SIZE", WARN, sentence, advice, is_public=True)
    else:
        yield Diagnosis("evictions", "CACHE_MAX_SIZE", OK, sentence, is_public=True)


def check_authority(expires_at: float, now: float, readable_key: str, setting: str) -> Iterator[Diagnosis]:
    """Return how long the CA is valid, and whether others can read its key, the file `readable_key` then."""
    left, date = expires_at - now, datetime.fromtimestamp(expires_at, UTC).strftime("%Y-%m-%d")
    if left < _CA_WARNING:
        level = BAD if left < _CA_ERROR else WARN
        sentence = f"the CA ends on {date}" if left > 0 else f"the CA ended on {date}"
        advice = (
            "No client trusts this proxy after that: make a new CA, and run the set-up script on all clients again."
        )
        yield Diagnosis("ca", "", level, sentence, advice, is_public=True)
    else:
        yield Diagnosis("ca", "", OK, f"the CA is valid until {date}", is_public=True)
    if readable_key:
        sentence = f"{setting}: {readable_key} can be read by other users of this machine"
        advice = "Its owner alone may read it (chmod 600). Whoever has it can impersonate every site to your clients."
        yield Diagnosis("ca", setting, BAD, sentence, advice)


@frozen
class NameConstraints:
    """The names for which a CA may sign (RFC 5280, section 4.2.1.10). None permits all of a kind."""

    permitted_names: tuple[str, ...] | None = None
    excluded_names: tuple[str, ...] = ()
    permitted_networks: tuple[str, ...] | None = None
    excluded_networks: tuple[str, ...] = ()

    def permits(self, name: str) -> bool:
        """Return whether a certificate for `name`, a host, an address or a wildcard, is valid."""
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            host = name.removeprefix("*.")
            permitted = self.permitted_names is None or any(_is_within(host, entry) for entry in self.permitted_names)
            return permitted and not any(_is_within(host, entry) for entry in self.excluded_names)

        def is_in(networks: Sequence[str]) -> bool:
            return any(address in ipaddress.ip_network(network) for network in networks)

        permitted = self.permitted_networks is None or is_in(self.permitted_networks)
        return permitted and not is_in(self.excluded_networks)


def _is_within(name: str, entry: str) -> bool:
    entry = entry.lower()
    if entry.startswith("."):  # OpenSSL and Go: names below it only
        return name.endswith(entry)
    return not entry or name == entry or name.endswith(f".{entry}")


def check_constraints(constraints: Iterable[NameConstraints], names: Iterable[str]) -> Iterator[Diagnosis]:
    """Return those of `names`, of registries and this server, that the CA may not sign."""
    constraints = list(constraints)
    missing = [name for name in dict.fromkeys(names) if not all(entry.permits(name) for entry in constraints)]
    if missing:
        sentence = f"the CA's name constraints do not permit {_join(missing)}"
        advice = "No client accepts certificates for them: make a CA that permits them, or remove them from REGISTRIES."
        yield Diagnosis("ca", "constraints", BAD, sentence, advice)
    elif constraints:
        yield Diagnosis("ca", "constraints", OK, "the CA's name constraints permit all registries", is_public=True)


def check_clients(refusing: Mapping[str, float], now: float) -> Iterator[Diagnosis]:
    """Return the clients that refused our certificate, with the time at which each did last."""
    if not refusing:
        yield Diagnosis("clients", "", OK, "no client has refused this proxy's certificate in the last 24 hours")
        return
    latest = sorted(refusing.items(), key=lambda item: -item[1])
    named = _join([f"{client} ({format_seconds(now - at)} ago)" for client, at in latest])
    verb = "refuses" if len(latest) == 1 else "refuse"
    sentence = f"{named} {verb} this proxy's certificate"
    advice = "They do not trust its CA: run the set-up script on them (/setup), then run it again with --check."
    yield Diagnosis("clients", "", WARN, sentence, advice)


def check_name(name: str, addresses: Sequence[str], own: Sequence[bool]) -> Iterator[Diagnosis]:
    """Return whether the name of the hosted registry leads here. `own` says of each address whether it is ours."""
    if not addresses:
        advice = "Clients cannot find the hosted registry by it."
        if name.endswith(".local"):
            advice += " Install avahi-daemon and libnss-mdns here, with that name as the host name."
        else:
            advice += " Add it to your name server, or change REGISTRY_HOSTNAME."
        yield Diagnosis("name", name, WARN, f"{name} cannot be resolved on this machine", advice)
    elif not any(own):
        sentence = f"{name} is {', '.join(addresses[:3])}, which is no address of this machine"
        advice = "Another machine may have that name. Behind a router or in a container, this is no problem."
        yield Diagnosis("name", name, WARN, sentence, advice)
    else:
        yield Diagnosis("name", name, OK, f"{name} resolves to this machine", is_public=True)


def check_proxy(setting: str, proxy: str, *, is_own: bool) -> Iterator[Diagnosis]:
    """Return whether the `proxy` for connections to registries, in `setting`, is this daemon itself."""
    if is_own:
        sentence = f"{setting} is {proxy}, which is this proxy itself"
        advice = "Each request to a registry would come back here. Unset it for this service, or set UPSTREAM_PROXY."
        yield Diagnosis("proxy", setting, BAD, sentence, advice)
    else:
        yield Diagnosis("proxy", setting, OK, f"registries are reached through {proxy} ({setting})")


def check_descriptors(used: Sequence[int], limit: int) -> Iterator[Diagnosis]:
    """Return whether there are enough descriptors. `used` are those of each process, which may have `limit` each."""
    most = max(used, default=0)
    advice = "Raise LimitNOFILE= of the service: each client that reads a blob uses two."
    if most > limit * _DESCRIPTORS_WARNING:
        level = BAD if most > limit * _DESCRIPTORS_ERROR else WARN
        yield Diagnosis("files", "", level, f"a process has {most} of {limit} files open", advice)
    elif limit < _FEW_DESCRIPTORS:
        yield Diagnosis("files", "", WARN, f"each process may have only {limit} files open", advice)
    else:
        yield Diagnosis("files", "", OK, f"at most {most} of {limit} files are open in a process")


def check_maintenance(runs: Mapping[str, Mapping[str, Any]], now: float) -> Iterator[Diagnosis]:
    """Return the last gc and check. `runs` has the time and the problems of each, by its name."""
    for name, command in (("check", "check"), ("check of the cache", "check --cached"), ("gc", "gc")):
        run = runs.get(name)
        if run is None:
            continue
        age = format_seconds(now - run["at"])
        if run["problems"]:
            sentence = f"the last {name}, {age} ago, found {_count(run['problems'], 'problem')}"
            advice = f"`dockerproxy {command}` says which. Push or pull again what is damaged."
            yield Diagnosis("maintenance", name, BAD if name != "gc" else WARN, sentence, advice, is_public=True)
        else:
            yield Diagnosis("maintenance", name, OK, f"the last {name}, {age} ago, found no problem", is_public=True)


def check_settings(warnings: Iterable[str], unread: Sequence[str]) -> Iterator[Diagnosis]:
    """Return the warnings about settings, and the variables of the environment file that are `unread`."""
    for warning in warnings:
        yield Diagnosis("settings", "", WARN, warning.removesuffix("."))
    if unread:
        verb = "is no setting and has" if len(unread) == 1 else "are no settings and have"
        sentence = f"{_join(unread)} in the environment file {verb} no effect"
        yield Diagnosis("settings", "", WARN, sentence, "See docs/settings.md for the names.")


def check_ports(ports: Iterable[PortFacts], *, behind_proxy: bool) -> Iterator[Diagnosis]:
    """Return whether the ports answer at an address that other machines can reach.

    `behind_proxy` says that a reverse proxy is trusted, which may be on this machine.
    """
    for facts in ports:
        subject = f"{facts.setting}:{facts.port}"
        if facts.is_loopback:
            sentence = f"{facts.setting} listens on {facts.address} only, which no other machine can reach"
            advice = "" if behind_proxy else f"Remove the interface from {facts.setting}, unless that is intended."
            yield Diagnosis("ports", subject, OK if behind_proxy else WARN, sentence, advice, is_public=True)
        elif not facts.outside:
            sentence = f"port {facts.port} ({facts.setting}) was not tried: this machine has no route to others, by"
            sentence += " which its address is known"
            yield Diagnosis("ports", subject, OK, sentence, is_public=True)
        elif facts.error:
            sentence = f"port {facts.port} ({facts.setting}) does not answer at {facts.outside}: {facts.error}"
            advice = "Is it blocked by a firewall of this machine (nft list ruleset)?"
            yield Diagnosis("ports", subject, BAD, sentence, advice)
        else:
            sentence = f"port {facts.port} ({facts.setting}) answers at {facts.outside}"
            yield Diagnosis("ports", subject, OK, sentence)


# parts of sentences


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_seconds(seconds: float) -> str:
    """Return a span of time in one unit, of which there are at least two."""
    seconds = max(0, int(seconds))
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def format_time(timestamp: float) -> str:
    """Return the date and the time of day."""
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M UTC")


def format_bytes(number: float) -> str:
    """Return a number of bytes in powers of 1000, as docker does."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
