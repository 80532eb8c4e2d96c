"""Facts about registries: whether they answer, with whose certificate, and whether they accept our logins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from attrs import define, evolve, field, frozen
from twisted.internet.defer import Deferred, DeferredSemaphore, TimeoutError, gatherResults

from dockerproxy.doctor.checks import LoginFacts, RegistryFacts
from dockerproxy.errors import NameInvalid, RegistryError
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.challenge import Challenge, parse_challenges
from dockerproxy.oci.credentials import Login
from dockerproxy.oci.host_table import RegistryWildcard, Wildcard
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.agent import Agent, Examination
from dockerproxy.upstream.authorizer import Authorizer
from dockerproxy.upstream.refusals import is_own_refusal, is_page
from dockerproxy.upstream.registry_states import name_of
from dockerproxy.upstream.urls import split_url

ANSWER_LIMIT = 8.0
"""Seconds for the answer of one server."""
EXAMINATION_LIMIT = 14.0
"""Seconds for all of them. A check has `run.NETWORK_LIMIT`, after which none of its findings is known."""
_MAX_PARALLEL = 64  # servers that are asked at the same time


@define(eq=False)
class _Run:
    """One examination: the reactor's time at which it ends, the names of the registries, and the token servers."""

    deadline: float
    hosts: set[str]
    asked_realms: set[Registry] = field(factory=set)
    realms: list[RegistryFacts] = field(factory=list)  # those with an error


class Logins(Protocol):
    """The administrator's logins; see `SharedLogins`."""

    def needs_provider(self, registry: Registry) -> bool: ...

    async def obtain(self, registry: Registry, client: str, *, is_open: bool) -> None: ...

    def configured_login(self, registry: Registry) -> Login | None: ...

    def setting(self, registry: Registry) -> str: ...


@frozen
class RegistryExaminer:
    """Asks registries by `agent`. `refused_logins` returns those that are known to be refused, which are not tried.

    `address_check` checks the addresses of token servers on other hosts. `now` returns POSIX time. `is_intercepted`
    returns whether clients reach a host through us.
    """

    _reactor: Any
    _agent: Agent
    _authorizer: Authorizer
    _logins: Logins
    _refused_logins: Callable[[], Iterable[Mapping[str, Any]]]
    _address_check: AddressCheck | None
    _now: Callable[[], float]
    _is_intercepted: Callable[[Host], bool] = lambda host: True

    async def examine(self, registries: Iterable[Registry]) -> tuple[list[RegistryFacts], list[LoginFacts]]:
        """Return facts about `registries`, about their token servers, and about the logins for them.

        It takes `EXAMINATION_LIMIT` seconds at most, however many of them say nothing.
        """
        registries = list(registries)
        run = _Run(self._reactor.seconds() + EXAMINATION_LIMIT, {registry.host.name for registry in registries})
        tokens = DeferredSemaphore(_MAX_PARALLEL)
        results = await gatherResults([tokens.run(self._start, registry, run) for registry in registries])
        logins = [login for _, login in results if login is not None]
        return [*(facts for facts, _ in results), *sorted(run.realms, key=lambda facts: facts.name)], logins

    def _start(self, registry: Registry, run: _Run) -> Deferred[tuple[RegistryFacts, LoginFacts | None]]:
        return Deferred.fromCoroutine(self._examine(registry, run))

    async def _examine(self, registry: Registry, run: _Run) -> tuple[RegistryFacts, LoginFacts | None]:
        limit = self._time_left(run)
        if limit <= 0:
            return RegistryFacts(name_of(registry), "it was not asked, because others took too long"), None
        examination = await self._agent.examine(registry, limit)
        facts = registry_facts(registry, examination, self._now())
        response = examination.response
        if response is None:
            return facts, None
        challenges = parse_challenges(response.headers.all("www-authenticate"))
        realm = realm_of(challenges)
        if realm is not None and not self._is_intercepted(realm.host):
            facts = evolve(facts, token_server=realm.host.authority)
        # Both at once, because a token server that says nothing keeps both waiting.
        work = Deferred.fromCoroutine(self._examine_realm(realm, run))
        login = await self._examine_login(registry, challenges, self._time_left(run))
        await work
        return facts, login

    async def _examine_realm(self, realm: Registry | None, run: _Run) -> None:
        """Add facts about a token server, unless it is one of the registries, works, or was asked before."""
        limit = self._time_left(run)
        if realm is None or realm.host.name in run.hosts or realm in run.asked_realms or limit <= 0:
            return
        run.asked_realms.add(realm)
        examination = await self._agent.examine(realm, limit, self._address_check)
        facts = registry_facts(realm, examination, self._now())
        if facts.error:
            run.realms.append(facts)

    def _time_left(self, run: _Run) -> float:
        """Return the seconds that one server has for its answer."""
        left: float = run.deadline - self._reactor.seconds()
        return min(ANSWER_LIMIT, left)

    async def _examine_login(
        self, registry: Registry, challenges: Sequence[Challenge], limit: float
    ) -> LoginFacts | None:
        if not challenges:
            return None
        if self._logins.needs_provider(registry):  # a credential helper may have it
            asked = Deferred.fromCoroutine(self._logins.obtain(registry, "", is_open=False))
            with suppress(TimeoutError):  # its own finding says that it failed
                await asked.addTimeout(max(limit, 0.0), self._reactor)
        login = self._logins.configured_login(registry)
        if login is None:
            return None
        setting = self._logins.setting(registry)
        for refused in self._refused_logins():
            if refused["registry"] == str(registry):
                return LoginFacts(name_of(registry), setting, refusal=str(refused["reason"]))
        self._authorizer.add_challenges(registry, challenges)
        work = Deferred.fromCoroutine(self._authorizer.refusal(registry, login))
        work.addTimeout(max(limit, 0.0), self._reactor)
        try:
            return LoginFacts(name_of(registry), setting, refusal=await work or "")
        except TimeoutError:
            return LoginFacts(name_of(registry), setting, unknown=f"no answer within {limit:.0f} s")
        except RegistryError as error:
            return LoginFacts(name_of(registry), setting, unknown=error.message)


def used_registries(
    wildcards: Iterable[RegistryWildcard], listed: Iterable[Registry], used: Iterable[str]
) -> dict[RegistryWildcard, list[Registry]]:
    """Return the registries of each wildcard among the hosts `used`, in their order. Those in `listed` are none."""
    by_hosts = {wildcard.hosts: wildcard for wildcard in wildcards}
    found: dict[RegistryWildcard, list[Registry]] = {wildcard: [] for wildcard in by_hosts.values()}
    known = {registry.host for registry in listed}
    for text in used:
        try:
            host = Host.parse(text)
        except NameInvalid:
            continue
        wildcard = by_hosts.get(Wildcard.above(host))
        if wildcard is not None and host not in known:
            found[wildcard].append(Registry(host, wildcard.scheme))
    return found


def registry_facts(registry: Registry, examination: Examination, now: float) -> RegistryFacts:
    """Return the facts about a server that answered at `now`, or did not."""
    name, response = name_of(registry), examination.response
    if response is None:
        reason = "" if examination.error is None else examination.error.message
        reason = reason.removeprefix(f"{registry.host.authority}: ")
        is_rejected = "certificate" in reason and examination.issuer
        return RegistryFacts(name, f"{reason} (it is by {examination.issuer})" if is_rejected else reason)
    headers, status = response.headers, response.status
    problem = ""
    if status >= 500:
        problem = f"with the error {status}"
    elif status >= 400 and not is_own_refusal(status, headers, examination.content):
        problem = f"something before it refuses (status {status})"
    elif status == 200 and is_page(headers):
        problem = "with a web page in place of a registry's answer"
    date = None if "age" in headers else parse_date(headers.get("date"))
    offset = None if date is None else now - examination.seconds / 2 - (date + 0.5)  # it counts whole seconds
    return RegistryFacts(name, "", examination.seconds, examination.issuer, problem, offset)


def realm_of(challenges: Iterable[Challenge]) -> Registry | None:
    """Return the server of the realm that a Bearer challenge names, or None."""
    for challenge in challenges:
        if challenge.scheme == "bearer":
            try:
                return split_url(challenge.parameters.get("realm", ""))[0]
            except (ValueError, RegistryError):
                return None
    return None


def parse_date(text: str | None) -> float | None:
    """Return the POSIX time of a Date field, or None if it has none (RFC 9110, section 5.6.7)."""
    try:
        return None if text is None else parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
