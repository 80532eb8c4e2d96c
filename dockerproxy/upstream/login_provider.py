"""The logins of credential helpers and of DOCKER_CONFIG_FILE. The main process provides all processes with them.

A helper's login ends (ECR's after 12 hours, GAR's after one), and the protocol does not say when. So it is asked again
at an interval, and as soon as the login is refused. The last login is kept while the helper fails.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

from attrs import define, field, frozen
from twisted.internet.defer import DeferredSemaphore
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.concurrency import SingleFlight, spawn
from dockerproxy.errors import RegistryError
from dockerproxy.oci.credentials import Login
from dockerproxy.oci.docker_hub import DOCKER_HUB
from dockerproxy.oci.host_table import HostKey, HostTable
from dockerproxy.oci.names import Host
from dockerproxy.shares import ClientShares
from dockerproxy.upstream.credential_helper import PROGRAM_PREFIX, HelperFailed
from dockerproxy.upstream.docker_config import DockerConfig

RENEWAL_INTERVAL = 600.0
"""Seconds after which a helper is asked again: a token of GAR may have a few minutes left, and helpers cache it."""

RETRY_INTERVAL = 30.0
"""Seconds until a helper is asked again that failed, has no login, or has none but the refused one."""

_MAX_REPORTED = 50  # servers of one helper in a report
_MAX_PROCESSES = 4  # helpers that run at the same time
_MAX_LOGINS = 256  # wildcards cover any number of hosts

HUB_SERVER = "https://index.docker.io/v1/"
"""Docker Hub for helpers; docker's name for it."""

log = Logger()

RunHelper = Callable[[str, str], Awaitable[Login | None]]
"""Returns the login of a helper for a server, or None. Raises `HelperFailed`."""


@frozen
class ProvidedLogin:
    """A login and the setting that it comes from."""

    login: Login
    setting: str


class LoginProvider(Protocol):
    """Logins for registries that have none in AUTH_REGISTRIES."""

    async def get_login(self, host: Host, refused: Login | None, client: str) -> ProvidedLogin | None:
        """Return the login for the registry at `host`, and another than `refused` if there is one.

        `client` is the address of the client that needs it. Never raise.
        """


@define
class _HelperLogin:
    """The last answer of a helper. `login` outlives its failures."""

    login: Login | None = field(default=None, repr=False)
    asked_at: float = float("-inf")
    is_useful: bool = False  # it has a login, and not the one that was refused
    problem: str = ""


class LocalLoginProvider(LoginProvider):
    """The provider of the main process. `clock` is monotonic, in seconds."""

    def __init__(self, run_helper: RunHelper, clock: Callable[[], float]) -> None:
        self._run_helper = run_helper
        self._clock = clock
        self._helpers: HostTable[str] = HostTable({})
        self._config_helpers: HostTable[str] = HostTable({})
        self._config_logins: HostTable[Login] = HostTable({})
        self._default_helper: str | None = None
        self._listed: frozenset[Host] = frozenset()
        self._listed_logins: dict[tuple[str, str], _HelperLogin] = {}
        self._covered_logins: BoundedDict[tuple[str, str], _HelperLogin] = BoundedDict(_MAX_LOGINS)
        self._runs: SingleFlight[tuple[str, str], None] = SingleFlight()
        self._semaphore = DeferredSemaphore(_MAX_PROCESSES)
        # Registries wait for their helpers; a client can name any number of hosts that a wildcard covers.
        self.running = ClientShares("credential helpers that run or wait", limit=128, share=32)

    def configure(self, helpers: Mapping[HostKey, str], config: DockerConfig) -> None:
        """Use these sources. Helpers are asked again, and their last logins are kept until they answer."""
        self._helpers = HostTable(helpers)
        self._config_helpers = HostTable(config.helpers)
        self._config_logins = HostTable(config.logins)
        self._default_helper = config.default_helper
        covered = [self._covered_logins.get(key) for key in list(self._covered_logins)]
        for known in (*self._listed_logins.values(), *covered):
            if known is not None:
                known.asked_at = float("-inf")

    def prefetch(self, hosts: Iterable[Host]) -> None:
        """Get the logins for `hosts`, so that the first client need not wait, and the log says what fails.

        These are the listed registries. Hosts that a wildcard covers, which clients name, never displace their logins.
        """
        self._listed = frozenset(hosts)
        for host in self._listed:
            spawn(self.get_login(host, None, ""), f"getting the login for {host}")

    def report(self) -> list[dict[str, Any]]:
        """Return the helpers of both settings, their hosts, and what they answered for each server of late.

        The rows have ``program``, ``setting``, ``keys``, and as ``answers`` pairs of a server and a problem or ``""``.
        """
        keys: dict[tuple[str, str], list[str]] = {}
        tables = (("CREDENTIAL_HELPERS", self._helpers), ("DOCKER_CONFIG_FILE", self._config_helpers))
        for setting, table in tables:
            for key, helper in table.entries():
                keys.setdefault((helper, setting), []).append(str(key))
        if self._default_helper is not None:
            keys.setdefault((self._default_helper, "DOCKER_CONFIG_FILE"), []).append("all others")
        covered = ((key, self._covered_logins.get(key)) for key in list(self._covered_logins))
        known = [*self._listed_logins.items(), *covered]
        return [
            {
                "program": PROGRAM_PREFIX + helper,
                "setting": setting,
                "keys": tuple(sorted(names)),
                "answers": tuple(
                    (server, answer.problem)
                    for (other, server), answer in known
                    if other == helper and answer is not None and answer.asked_at != float("-inf")
                )[:_MAX_REPORTED],
            }
            for (helper, setting), names in keys.items()
        ]

    async def get_login(self, host: Host, refused: Login | None, client: str) -> ProvidedLogin | None:
        """Return the login for `host`; see `LoginProvider`. CREDENTIAL_HELPERS wins over DOCKER_CONFIG_FILE."""
        helper, setting = self._helpers.get(host), "CREDENTIAL_HELPERS"
        if helper is None:
            helper, setting = self._config_helpers.get(host, self._default_helper), "DOCKER_CONFIG_FILE"
        login = self._config_logins.get(host) if helper is None else await self._ask(helper, host, refused, client)
        return None if login is None else ProvidedLogin(login, setting)

    async def _ask(self, helper: str, host: Host, refused: Login | None, client: str) -> Login | None:
        key = helper, HUB_SERVER if host == DOCKER_HUB.host else str(host)
        logins = self._listed_logins if host in self._listed else self._covered_logins
        known = logins.get(key)
        if known is None:
            known = logins[key] = _HelperLogin()
        if self._is_due(known, refused):
            run = self._runs.do(key, lambda: self._run_if_allowed(key, known, refused, client))
            if known.login is None or known.login == refused:
                await run
            else:
                spawn(run, f"asking {PROGRAM_PREFIX}{helper}")
        return known.login

    def _is_due(self, known: _HelperLogin, refused: Login | None) -> bool:
        age = self._clock() - known.asked_at
        if not known.is_useful:
            return age >= RETRY_INTERVAL
        return known.login == refused or age >= RENEWAL_INTERVAL

    async def _run_if_allowed(
        self, key: tuple[str, str], known: _HelperLogin, refused: Login | None, client: str
    ) -> None:
        try:
            self.running.acquire(client)
        except RegistryError:
            return
        try:
            await self._run(key, known, refused)
        finally:
            self.running.release(client)

    async def _run(self, key: tuple[str, str], known: _HelperLogin, refused: Login | None) -> None:
        helper, server = key
        await self._semaphore.acquire()
        try:
            login, problem = await self._run_helper(helper, server), ""
        except HelperFailed as error:
            login, problem = None, str(error)
        finally:
            self._semaphore.release()
            known.asked_at = self._clock()
        known.is_useful = login is not None and login != refused
        if not problem:
            known.login = login
        if problem != known.problem:
            self._log(helper, server, known, problem)
        known.problem = problem

    @staticmethod
    def _log(helper: str, server: str, known: _HelperLogin, problem: str) -> None:
        names = {"program": PROGRAM_PREFIX + helper, "server": server}
        if not problem:
            log.info("{program} works again for {server}", **names)
        elif known.login is None:
            log.error("{program} {problem}; {server} is used without a login", problem=problem, **names)
        else:
            log.error("{program} {problem}; its last login for {server} is kept", problem=problem, **names)
