"""One run of the checks. It is loaded with all that only checks need, when somebody asks first."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, TimeoutError, gatherResults
from twisted.logger import Logger

from dockerproxy.daemon.listener_service import OpenPort
from dockerproxy.doctor import checks, machine
from dockerproxy.doctor.doctor import DoctorSettings, DoctorSources
from dockerproxy.doctor.findings import OK, WARN, Diagnosis
from dockerproxy.doctor.registries import RegistryExaminer, used_registries
from dockerproxy.errors import RegistryError, StoreRefused
from dockerproxy.oci.host_table import RegistryWildcard, Wildcard
from dockerproxy.oci.names import Host, Registry
from dockerproxy.store.write_probe import StoreState
from dockerproxy.upstream.registry_states import name_of

NETWORK_LIMIT, LOCAL_LIMIT = 15.0, 3.0
"""Seconds that a check may take."""

_MAX_ASKED = 5  # hosts of a wildcard, those that were used last
_MAX_ASKED_IN_ALL = 50  # of them, and members of FLEET

_STATE_TTL, _NETWORK_TTL = 30.0, 3600.0
"""Seconds for which the state of registries, and other findings over the network, are part of quick reports."""

log = Logger()


async def local_findings(sources: DoctorSources, settings: DoctorSettings) -> list[Diagnosis]:
    """Return the findings of the checks that ask nobody on the network. They take some seconds if a disk hangs."""
    now = sources.now()
    works = {
        "disk": _disks(sources),
        "budget": _budget(sources),
        "ca": _authority(sources, settings),
        "files": _descriptors(sources),
        "maintenance": _maintenance(sources),
    }
    findings = await _gather(sources.reactor, works, LOCAL_LIMIT)
    findings += checks.check_states(sources.states(), now)
    findings += checks.check_fleet(sources.fleet())
    findings += checks.check_evictions(sources.idle_age())
    findings += checks.check_clients(sources.refusing_clients(), now)
    findings += checks.check_settings(settings.warnings, settings.unread)
    findings += checks.check_logins(
        checks.LoginFacts(name_of(Registry.parse(login["registry"])), login["setting"], str(login["reason"]))
        for login in sources.refused_logins()
    )
    return findings


async def network_findings(sources: DoctorSources, settings: DoctorSettings) -> list[Diagnosis]:
    """Return the findings of the checks that connect to others, or resolve names."""
    works = {
        "registry": _registries(sources, settings),
        "fleet": _fleet(sources),
        "ports": _ports(sources, settings),
        "name": _name(sources, settings),
        "proxy": _proxy(sources, settings),
        "store": _store(sources, settings),
    }
    return await _gather(sources.reactor, works, NETWORK_LIMIT)


def lasting(network: Iterable[Diagnosis], age: float) -> list[Diagnosis]:
    """Return the findings over the network that still say something after `age` seconds."""
    changing = ("registry", "login", "clock", "fleet")
    return [finding for finding in network if age < (_STATE_TTL if finding.check in changing else _NETWORK_TTL)]


def merge(local: Iterable[Diagnosis], network: Iterable[Diagnosis]) -> list[Diagnosis]:
    """Return the findings of both, one for each subject: the worse one, or the one that is of now."""
    findings: dict[tuple[str, ...], Diagnosis] = {}
    for finding in (*network, *local):
        key: tuple[str, ...] = (finding.check, finding.subject)
        if finding.check not in ("registry", "login", "fleet"):
            key = (*key, finding.sentence)
        known = findings.get(key)
        if known is None or known.level == OK or finding.level != OK:
            findings[key] = finding
    return list(findings.values())


async def _gather(reactor: Any, works: Mapping[str, Awaitable[Iterable[Diagnosis]]], limit: float) -> list[Diagnosis]:
    """Return the findings of all checks. One that fails, or takes too long, is a finding itself."""

    async def run(name: str, work: Awaitable[Iterable[Diagnosis]]) -> list[Diagnosis]:
        async def await_work() -> list[Diagnosis]:
            return list(await work)

        try:
            return await Deferred.fromCoroutine(await_work()).addTimeout(limit, reactor)
        except TimeoutError:
            return [
                Diagnosis(name, "", WARN, f"the check of {name} was not finished within {limit:g} s", is_public=True)
            ]
        except RegistryError as error:
            return [Diagnosis(name, "", WARN, f"the check of {name} failed: {error.message}")]
        except Exception:
            log.failure("the check of {name} failed", name=name)
            return [Diagnosis(name, "", WARN, f"the check of {name} failed; see the log", is_public=True)]

    results = await gatherResults([Deferred.fromCoroutine(run(name, work)) for name, work in works.items()])
    return [finding for findings in results for finding in findings]


async def _disks(sources: DoctorSources) -> list[Diagnosis]:
    used, limit = sources.usage()
    probes = [Deferred.fromCoroutine(probe.probe()) for probe in sources.probes]
    facts = []
    for probe, result in zip(sources.probes, await gatherResults(probes), strict=True):
        growth = max(0, limit - used) if probe.name == "CACHE_DIR" else 0
        problem = "" if result.state is StoreState.WRITABLE else result.details or result.sentence
        work = partial(machine.disk_facts, probe.name, probe.directory, problem, growth)
        facts.append(work() if problem else await sources.threads.run(work))
    return list(checks.check_disks(facts))


async def _budget(sources: DoctorSources) -> list[Diagnosis]:
    return list(checks.check_budget(await sources.threads.run(sources.limits), sources.now()))


async def _authority(sources: DoctorSources, settings: DoctorSettings) -> list[Diagnosis]:
    authority, values = sources.authority, settings.settings
    path, setting = values.ca_key_file, "CA_KEY_FILE"
    if path is None:
        path, setting = values.ca_dir / "ca.key", "CA_DIR"
    key = await sources.threads.run(machine.readable_key, path)
    names = [registry.host.name for registry in values.intercepted if registry.scheme == "https"]
    names += [wildcard.hosts.name for wildcard in values.registry_wildcards if wildcard.scheme == "https"]
    names += values.registry_hostname
    constraints = machine.name_constraints(authority.path)
    return [
        *checks.check_authority(authority.expires_at, sources.now(), key, setting),
        *checks.check_constraints(constraints, names),
    ]


async def _descriptors(sources: DoctorSources) -> list[Diagnosis]:
    used, limit = await sources.threads.run(machine.open_descriptors, list(sources.process_ids()))
    return list(checks.check_descriptors(used, limit))


async def _maintenance(sources: DoctorSources) -> list[Diagnosis]:
    return list(checks.check_maintenance(await sources.threads.run(sources.maintenance), sources.now()))


async def _registries(sources: DoctorSources, settings: DoctorSettings) -> list[Diagnosis]:
    intercepted = {registry.host for registry in settings.settings.intercepted}
    wildcards = {wildcard.hosts for wildcard in settings.settings.registry_wildcards}
    examiner = RegistryExaminer(
        sources.reactor,
        sources.agent,
        sources.authorizer,
        sources.logins,
        sources.refused_logins,
        sources.address_check,
        sources.now,
        lambda host: host in intercepted or Wildcard.above(host) in wildcards,
    )
    listed = settings.settings.registries
    used = await sources.threads.run(partial(machine.used_hosts, sources.repositories))
    covered = used_registries(settings.settings.registry_wildcards, listed, used)
    asked = {wildcard: registries[:_MAX_ASKED] for wildcard, registries in covered.items()}
    chosen = [registry for registries in asked.values() for registry in registries][:_MAX_ASKED_IN_ALL]
    facts, logins = await examiner.examine([*listed, *chosen])
    names = {name_of(registry) for registry in chosen}
    examined = [
        checks.WildcardFacts(
            str(wildcard), len(registries), len(set(asked[wildcard]) & set(chosen)), _login_setting(settings, wildcard)
        )
        for wildcard, registries in covered.items()
    ]
    return [
        *checks.check_registries(facts),
        *checks.check_wildcards(examined),
        *checks.check_logins(logins),
        *checks.check_token_servers(facts),
        *checks.check_helpers(checks.HelperFacts(**helper) for helper in sources.helpers()),
        # Everybody may see the finding about the clock, so it names no host that only a wildcard covers.
        *checks.check_clock([one for one in facts if one.name not in names]),
    ]


def _login_setting(settings: DoctorSettings, wildcard: RegistryWildcard) -> str:
    values = settings.settings
    for setting, logins in (
        ("AUTH_REGISTRIES", values.auth_registries),
        ("CREDENTIAL_HELPERS", values.credential_helpers),
    ):
        if wildcard.hosts in logins:
            return setting
    return ""


async def _fleet(sources: DoctorSources) -> list[Diagnosis]:
    others = [name for name, state in sources.fleet().items() if state != "me"][:_MAX_ASKED_IN_ALL]
    expected = sources.authority.fingerprint
    works = [sources.threads.run(partial(machine.member_facts, name, expected)) for name in others]
    facts = await gatherResults([Deferred.fromCoroutine(_await(work)) for work in works])
    return list(checks.check_members(facts))


async def _await(work: Awaitable[checks.MemberFacts]) -> checks.MemberFacts:
    return await work


async def _store(sources: DoctorSources, settings: DoctorSettings) -> list[Diagnosis]:
    """Return whether the bucket keeps to conditions. A key that may only read cannot try that."""
    if sources.keeps_conditions is None or settings.settings.registry_read_only:
        return []
    results = await gatherResults([Deferred.fromCoroutine(probe.probe()) for probe in sources.probes])
    if any(result.state is not StoreState.WRITABLE for result in results):
        return []  # the check of the disks says what is wrong
    try:
        keeps = await sources.keeps_conditions()
    except StoreRefused:  # it takes other writes
        keeps = False
    return list(checks.check_conditions(keeps))


async def _ports(sources: DoctorSources, settings: DoctorSettings) -> list[Diagnosis]:
    ports = sources.open_ports()
    facts = await gatherResults([Deferred.fromCoroutine(_port(sources, port)) for port in ports])
    return list(checks.check_ports(facts, behind_proxy=bool(settings.settings.trusted_proxies.entries)))


async def _port(sources: DoctorSources, port: OpenPort) -> checks.PortFacts:
    return await sources.threads.run(machine.port_facts, port)


async def _name(sources: DoctorSources, settings: DoctorSettings) -> list[Diagnosis]:
    findings: list[Diagnosis] = []
    for name in settings.settings.registry_hostname:
        addresses, own = await _resolve(sources, name)
        findings += checks.check_name(name, addresses, own)
    return findings


async def _resolve(sources: DoctorSources, name: str) -> tuple[Sequence[str], Sequence[bool]]:
    addresses = await sources.resolver.resolve(name)
    return addresses, await sources.threads.run(machine.are_own, addresses)


async def _proxy(sources: DoctorSources, settings: DoctorSettings) -> list[Diagnosis]:
    first = settings.settings.upstream_proxy
    ports = {port.number for port in sources.open_ports()}
    findings: list[Diagnosis] = []
    for proxy in () if first is None else (first, *first.others):
        host = Host(proxy.host, proxy.port)
        _, own = await _resolve(sources, host.name)  # which returns an address as it is
        findings += checks.check_proxy(settings.proxy_setting, host.authority, is_own=any(own) and proxy.port in ports)
    return findings
