"""The logins of the administrator's that serve clients without one, and which of them are refused at the moment.

A password is changed, a token ends. That must not take public images away: such a login counts as none until it works
again. It is tried again in the background, after a delay that grows, because a server may lock a user after many wrong
passwords. Clients do not wait for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attrs import define, field
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.concurrency import SingleFlight, spawn
from dockerproxy.errors import RegistryError
from dockerproxy.oci.credentials import BasicCredentials, IdentityToken, Login
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.credentials import Anonymous, Credential

FIRST_RETRY = 60.0
LAST_RETRY = 900.0
"""Seconds from one attempt with a refused login to the next: at first, and after several."""

_ACCEPTED_TTL = 60.0  # seconds; meanwhile a refusal is about a repository, not about the login
_MAX_REGISTRIES = 256

log = Logger()

OnLoginChanged = Callable[[str, str, str], None]
"""Gets a registry, the setting of its login, and how that is refused; or an empty text if it works again."""


class LoginSource(Protocol):
    """The configured logins, and what servers say about them; see `Authorizer`."""

    def effective_login(self, registry: Registry) -> Login | None: ...

    async def refusal(self, registry: Registry, login: Login) -> str | None: ...


@define
class _Refusal:
    """A login that is refused, and when to try it again (seconds of the clock)."""

    login: Login = field(repr=False)
    reason: str
    retry_at: float
    delay: float = FIRST_RETRY


class SharedLogins:
    """The logins that serve clients without one. Each process has its own. `clock` is monotonic, in seconds.

    `on_change` is called if a login is refused, each time that it was tried, and if it works again. Unless `shared`,
    no login serves clients (SHARE_AUTH_REGISTRIES).
    """

    def __init__(
        self, source: LoginSource, clock: Callable[[], float], on_change: OnLoginChanged, *, shared: bool = True
    ) -> None:
        self._source = source
        self._shared = shared
        self._clock = clock
        self._on_change = on_change
        self._refusals: BoundedDict[Registry, _Refusal] = BoundedDict(_MAX_REGISTRIES)
        self._accepted: BoundedDict[Registry, Login] = BoundedDict(_MAX_REGISTRIES, ttl=_ACCEPTED_TTL, clock=clock)
        self._checks: SingleFlight[Registry, None] = SingleFlight()

    def configured_login(self, registry: Registry) -> Login | None:
        """Return the login for `registry`, even if it is refused."""
        return self._source.effective_login(registry) if self._shared else None

    def login_for(self, registry: Registry) -> Login | None:
        """Return the login for `registry`; None if there is none, or if it is refused."""
        login = self.configured_login(registry)
        if login is None or not len(self._refusals):  # each cached request asks
            return login
        refusal = self._refusal(registry, login)
        if refusal is None:
            return login
        if self._clock() >= refusal.retry_at:
            refusal.retry_at = self._clock() + refusal.delay
            spawn(self._check(registry, login), f"trying the login for {registry}")
        return None

    def reason(self, registry: Registry) -> str:
        """Return why the login for `registry` is not used: a clause for an error message. It is empty if it is used."""
        login = self.configured_login(registry)
        refusal = None if login is None else self._refusal(registry, login)
        if refusal is None:
            return ""
        return f"the login for {registry} in {self.setting(registry)} is refused ({refusal.reason})"

    def setting(self, registry: Registry) -> str:
        """Return the name of the setting that has the login for `registry`."""
        return "AUTH_REGISTRIES"

    async def alternatives(self, registry: Registry, refused: Credential) -> list[Credential]:
        """Return the credentials to try if `registry` denied something to `refused`. There are none for no login.

        Find out whether the login itself is refused.
        """
        if not isinstance(refused, BasicCredentials | IdentityToken):
            return []
        if self._accepted.get(registry) != refused and self._refusal(registry, refused) is None:
            await self._check(registry, refused)
        return [Anonymous()]

    def clear(self) -> None:
        """Forget everything, because the settings are new."""
        self._refusals.clear()
        self._accepted.clear()

    def _refusal(self, registry: Registry, login: Login) -> _Refusal | None:
        refusal = self._refusals.get(registry)
        return refusal if refusal is not None and refusal.login == login else None

    async def _check(self, registry: Registry, login: Login) -> None:
        await self._checks.do(registry, lambda: self._check_now(registry, login))

    async def _check_now(self, registry: Registry, login: Login) -> None:
        try:
            reason = await self._source.refusal(registry, login)
        except RegistryError:
            return  # upstream did not say
        known = self._refusal(registry, login)
        if reason is None:
            self._accepted[registry] = login
            if known is not None:
                self._refusals.pop(registry)
                self._on_change(str(registry), self.setting(registry), "")
            return
        delay = FIRST_RETRY if known is None else min(2 * known.delay, LAST_RETRY)
        self._refusals[registry] = _Refusal(login, reason, self._clock() + delay, delay)
        self._on_change(str(registry), self.setting(registry), reason)
