"""Logins of the administrator's that serve all clients, and end."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs

from dockerproxy.cache.ended_logins import REPORT_TTL, EndedLogins
from dockerproxy.errors import RegistryError, UpstreamUnreachable
from dockerproxy.oci.credentials import BasicCredentials, IdentityToken, Login
from dockerproxy.oci.host_table import HostKey
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, Credential
from dockerproxy.upstream.login_provider import ProvidedLogin
from dockerproxy.upstream.shared_logins import FIRST_RETRY, LAST_RETRY, LOGIN_TTL, SharedLogins

QUAY, OTHER = Registry.parse("quay.io"), Registry.parse("other.example")
OLD, NEW = BasicCredentials("robot", "old-secret"), BasicCredentials("robot", "new-secret")
REFUSED = "auth.quay.io answered 401"


class Source:
    """Logins, and answers about them. With `pending`, an answer waits until the test fires it."""

    def __init__(self) -> None:
        self.logins: dict[Registry, Login] = {QUAY: OLD}
        self.answer: str | RegistryError | None = REFUSED
        self.questions: list[Login] = []
        self.provided: dict[Host, Login] = {}
        self.provider_questions: list[tuple[Host, Login | None]] = []
        self.pending: Deferred[None] | None = None

    def set_logins(self, logins: Mapping[HostKey, Login]) -> None:
        self.logins = {Registry(host): login for host, login in logins.items() if isinstance(host, Host)}

    async def get_login(self, host: Host, refused: Login | None, client: str) -> ProvidedLogin | None:
        self.provider_questions.append((host, refused))
        if self.pending is not None:
            await self.pending
        login = self.provided.get(host)
        return None if login is None else ProvidedLogin(login, "CREDENTIAL_HELPERS")

    def effective_login(self, registry: Registry) -> Login | None:
        return self.logins.get(registry)

    async def refusal(self, registry: Registry, login: Login) -> str | None:
        self.questions.append(login)
        if self.pending is not None:
            await self.pending
        if isinstance(self.answer, RegistryError):
            raise self.answer
        return self.answer


class Logins:
    def __init__(self, *, shared: bool = True) -> None:
        self.clock = Clock()
        self.source = Source()
        self.changes: list[tuple[str, str, str]] = []
        self.shared = SharedLogins(self.source, self.clock.seconds, self.record, self.source, shared=shared)

    def record(self, *change: str) -> None:
        self.changes.append(change)  # type: ignore[arg-type]

    def refuse(self, login: Credential = OLD) -> list[Credential]:
        return result_of(self.shared.alternatives(QUAY, login))


def result_of(coroutine: Coroutine[Any, Any, Any]) -> Any:
    results: list[Any] = []
    Deferred.fromCoroutine(coroutine).addCallback(results.append)
    return results[0]


@pytest.fixture
def logins() -> Logins:
    return Logins()


def test_a_refused_login_counts_as_none(logins: Logins) -> None:
    assert (logins.shared.login_for(QUAY), logins.shared.reason(QUAY)) == (OLD, "")
    assert logins.refuse() == [Anonymous()]
    assert logins.shared.login_for(QUAY) is None
    assert logins.shared.configured_login(QUAY) == OLD
    assert logins.shared.reason(QUAY) == f"the login for quay.io in AUTH_REGISTRIES is refused ({REFUSED})"
    assert logins.changes == [("quay.io", "AUTH_REGISTRIES", REFUSED)]
    assert (logins.shared.login_for(OTHER), logins.shared.reason(OTHER)) == (None, "")


def test_a_refused_repository_is_no_refused_login(logins: Logins) -> None:
    logins.source.answer = None
    for _ in range(10):
        assert logins.refuse() == [Anonymous()]
        assert logins.shared.login_for(QUAY) == OLD
    assert (len(logins.source.questions), logins.changes) == (1, [])
    logins.clock.advance(FIRST_RETRY)
    logins.source.answer = REFUSED
    logins.refuse()
    assert logins.shared.login_for(QUAY) is None


def test_an_outage_says_nothing_about_a_login(logins: Logins) -> None:
    logins.source.answer = UpstreamUnreachable("down")
    assert logins.refuse() == [Anonymous()]
    assert (logins.shared.login_for(QUAY), logins.changes) == (OLD, [])


@pytest.mark.parametrize("credential", [Anonymous(), ClientCredential("Basic x")])
def test_other_credentials_have_no_alternative(logins: Logins, credential: Credential) -> None:
    assert logins.refuse(credential) == []
    assert logins.source.questions == []


def test_it_is_tried_again_in_the_background_with_growing_delays(logins: Logins) -> None:
    logins.refuse()
    attempts = []
    for second in range(int(4 * LAST_RETRY)):
        before = len(logins.source.questions)
        for _ in range(3):  # many requests are one attempt
            assert logins.shared.login_for(QUAY) is None
        if len(logins.source.questions) > before:
            assert len(logins.source.questions) == before + 1
            attempts.append(second)
        logins.clock.advance(1)
    delays = [later - earlier for earlier, later in zip([0, *attempts], attempts, strict=False)]
    assert delays[:5] == [FIRST_RETRY, 2 * FIRST_RETRY, 4 * FIRST_RETRY, 8 * FIRST_RETRY, LAST_RETRY]
    logins.clock.advance(LAST_RETRY)
    logins.source.answer, logins.changes = None, []
    assert logins.shared.login_for(QUAY) is None  # this request does not wait
    assert logins.shared.login_for(QUAY) == OLD
    assert logins.changes == [("quay.io", "AUTH_REGISTRIES", "")]


def test_nobody_waits_for_an_attempt_and_there_is_one_at_a_time(logins: Logins) -> None:
    logins.refuse()
    logins.source.pending = Deferred()
    for _ in range(5):
        logins.clock.advance(FIRST_RETRY)
        assert logins.shared.login_for(QUAY) is None
    assert len(logins.source.questions) == 2
    logins.source.answer = None
    logins.source.pending.callback(None)
    assert logins.shared.login_for(QUAY) == OLD


def test_another_login_is_used_at_once(logins: Logins) -> None:
    logins.refuse()
    logins.source.logins[QUAY] = NEW
    assert (logins.shared.login_for(QUAY), logins.shared.reason(QUAY)) == (NEW, "")
    logins.source.logins[QUAY] = OLD
    logins.shared.configure({QUAY.host: OLD}, asks_provider=False)  # after a reload
    assert logins.shared.login_for(QUAY) == OLD


def test_logins_that_are_not_shared() -> None:
    logins = Logins(shared=False)
    assert logins.shared.login_for(QUAY) is None
    assert (logins.shared.configured_login(QUAY), logins.shared.reason(QUAY)) == (None, "")


def test_no_secret_is_printed(logins: Logins) -> None:
    logins.refuse()
    logins.refuse(IdentityToken("old-secret"))
    for value in (OLD, IdentityToken("old-secret"), logins.shared._refusals.get(QUAY)):
        assert "secret" not in repr(value)


class TestProvider:
    """Logins that the provider has: of credential helpers, or in docker's file."""

    @pytest.fixture
    def logins(self) -> Logins:
        logins = Logins()
        logins.shared.configure({QUAY.host: OLD}, asks_provider=True)
        logins.source.provided = {OTHER.host: OLD}
        return logins

    def obtain(self, logins: Logins, registry: Registry = OTHER, *, is_open: bool = False) -> None:
        if logins.shared.needs_provider(registry):
            result_of(logins.shared.obtain(registry, "10.0.0.1", is_open=is_open))

    def test_it_is_asked_only_if_there_is_no_other_login(self, logins: Logins) -> None:
        self.obtain(logins, QUAY)
        self.obtain(logins, OTHER)
        self.obtain(logins, OTHER)
        assert logins.source.provider_questions == [(OTHER.host, None)]
        assert (logins.shared.login_for(QUAY), logins.shared.login_for(OTHER)) == (OLD, OLD)
        assert logins.shared.setting(OTHER) == "CREDENTIAL_HELPERS"
        assert logins.shared.setting(QUAY) == "AUTH_REGISTRIES"

    def test_an_open_registry_needs_no_login(self, logins: Logins) -> None:
        for _ in range(3):
            self.obtain(logins, is_open=True)
            logins.clock.advance(LOGIN_TTL)
        assert (logins.source.provider_questions, logins.shared.login_for(OTHER)) == ([], None)

    def test_later_requests_do_not_wait_for_it(self, logins: Logins) -> None:
        self.obtain(logins)
        logins.clock.advance(LOGIN_TTL)
        logins.source.pending = Deferred()
        logins.source.provided = {OTHER.host: NEW}
        for _ in range(3):
            self.obtain(logins)
            assert logins.shared.login_for(OTHER) == OLD
        assert len(logins.source.provider_questions) == 2
        logins.source.pending.callback(None)
        assert logins.shared.login_for(OTHER) == NEW

    def test_requests_share_a_question(self, logins: Logins) -> None:
        logins.source.pending = Deferred()
        waiting = [Deferred.fromCoroutine(logins.shared.obtain(OTHER, "10.0.0.1", is_open=False)) for _ in range(500)]
        assert len(logins.source.provider_questions) == 1
        logins.source.pending.callback(None)
        assert all(deferred.called for deferred in waiting)
        assert logins.shared.login_for(OTHER) == OLD

    def test_a_refused_login_is_replaced(self, logins: Logins) -> None:
        self.obtain(logins)
        logins.source.provided = {OTHER.host: NEW}
        assert result_of(logins.shared.alternatives(OTHER, OLD)) == [NEW, Anonymous()]
        assert logins.source.provider_questions[-1] == (OTHER.host, OLD)
        assert (logins.shared.login_for(OTHER), logins.changes) == (NEW, [])

    def test_it_is_asked_even_if_the_login_was_accepted_a_moment_ago(self, logins: Logins) -> None:
        self.obtain(logins)
        logins.source.answer = None
        assert result_of(logins.shared.alternatives(OTHER, OLD)) == [Anonymous()]  # about a repository
        logins.source.provided = {OTHER.host: NEW}
        assert result_of(logins.shared.alternatives(OTHER, OLD)) == [NEW, Anonymous()]

    def test_a_refused_login_without_another_has_ended(self, logins: Logins) -> None:
        self.obtain(logins)
        assert result_of(logins.shared.alternatives(OTHER, OLD)) == [Anonymous()]
        assert logins.shared.login_for(OTHER) is None
        assert logins.changes == [("other.example", "CREDENTIAL_HELPERS", REFUSED)]
        logins.source.provided = {OTHER.host: NEW}
        logins.clock.advance(FIRST_RETRY)
        logins.shared.login_for(OTHER)  # another one is asked for in the background
        assert logins.shared.login_for(OTHER) == NEW
        assert logins.changes[-1] == ("other.example", "CREDENTIAL_HELPERS", "")

    def test_the_number_of_registries_is_bounded(self, logins: Logins) -> None:
        """A client can name any number of hosts that a wildcard covers."""
        registries = [Registry.parse(f"h{number}.example") for number in range(600)]
        logins.source.provided = {registry.host: OLD for registry in registries}
        for registry in registries:
            self.obtain(logins, registry)
        assert len(logins.source.logins) == 257
        self.obtain(logins, registries[0])
        assert logins.shared.login_for(registries[0]) == OLD

    def test_a_reload_asks_again(self, logins: Logins) -> None:
        self.obtain(logins)
        logins.shared.configure({}, asks_provider=True)
        assert logins.shared.login_for(OTHER) is None
        self.obtain(logins)
        assert logins.shared.login_for(OTHER) == OLD
        logins.shared.configure({}, asks_provider=False)
        self.obtain(logins)
        assert logins.shared.login_for(OTHER) is None

    def test_an_answer_of_before_a_reload_does_not_count(self, logins: Logins) -> None:
        """Its helper may have been removed, and nobody would ask again whether its login still counts."""
        old = logins.source.pending = Deferred()
        early = Deferred.fromCoroutine(logins.shared.obtain(OTHER, "10.0.0.1", is_open=False))
        logins.shared.configure({}, asks_provider=True)
        logins.source.pending = None
        logins.source.provided = {OTHER.host: NEW}
        self.obtain(logins)
        assert logins.shared.login_for(OTHER) == NEW
        logins.source.provided = {OTHER.host: OLD}
        old.callback(None)
        assert early.called
        assert logins.shared.login_for(OTHER) == NEW


class TestEndedLogins:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def ended(self, clock: Clock) -> EndedLogins:
        return EndedLogins(clock.seconds)

    def test_each_change_is_logged_once(self, ended: EndedLogins, clock: Clock) -> None:
        with capturedLogs() as events:
            for _ in range(10):  # by several processes, and again after each attempt
                ended.report("quay.io", "AUTH_REGISTRIES", REFUSED)
                clock.advance(LAST_RETRY)
            assert [event["log_level"] for event in events] == [LogLevel.error]
            [login] = ended.report_list()
            assert (login["registry"], login["reason"], login["since"]) == ("quay.io", REFUSED, 0.0)
            for _ in range(3):
                ended.report("quay.io", "AUTH_REGISTRIES", "")
            assert [event["log_level"] for event in events] == [LogLevel.error, LogLevel.warn]
        assert ended.report_list() == []

    def test_a_report_ends(self, ended: EndedLogins, clock: Clock) -> None:
        """The process that reported it may be gone."""
        ended.report("quay.io", "AUTH_REGISTRIES", REFUSED)
        clock.advance(REPORT_TTL)
        assert ended.report_list() == []

    def test_the_number_of_reports_is_bounded(self, ended: EndedLogins) -> None:
        for number in range(1000):
            ended.report(f"{number}.example", "AUTH_REGISTRIES", REFUSED)
        assert len(ended.report_list()) == 256
        ended.clear()
        assert ended.report_list() == []
