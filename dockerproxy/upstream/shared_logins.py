"""The logins of the administrator's that serve clients without one, and which of them are refused at the moment.

A password is changed, a token ends. That must not take public images away: such a login counts as none until it works
again. It is tried again in the background, after a delay that grows, because a server may lock a user after many wrong
passwords. Clients do not wait for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from attrs import define, field, frozen
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.concurrency import SingleFlight, spawn
from dockerproxy.errors import RegistryError
from dockerproxy.oci.credentials import BasicCredentials, IdentityToken, Login
from dockerproxy.oci.host_table import HostKey
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.credentials import Anonymous, Credential
from dockerproxy.upstream.login_provider import LoginProvider

FIRST_RETRY = 60.0
LAST_RETRY = 900.0
"""Seconds from one attempt with a refused login to the next: at first, and after several."""

LOGIN_TTL = 60.0
"""Seconds for which a login of the provider is used, and its answer that there is none."""

_ACCEPTED_TTL = 60.0  # seconds; meanwhile a refusal is about a repository, not about the login
_MAX_REGISTRIES = 256

log = Logger()

OnLoginChanged = Callable[[str, str, str], None]
"""Gets a registry, the setting of its login, and how that is refused; or an empty text if it works again."""


class LoginRules(Protocol):
    """The rules about which login is for which registry, and what servers say about them; see `Authorizer`."""

    def set_logins(self, logins: Mapping[HostKey, Login]) -> None: ...

    def effective_login(self, registry: Registry) -> Login | None: ...

    async def refusal(self, registry: Registry, login: Login) -> str | None: ...


@define
class _Refusal:
    """A login that is refused, and when to try it again (seconds of the clock)."""

    login: Login = field(repr=False)
    reason: str
    retry_at: float
    delay: float = FIRST_RETRY


@frozen
class _ProvidedLogin:
    """The answer of the provider about a registry, its setting, and until when that counts."""

    login: Login | None = field(repr=False)
    setting: str
    ends_at: float


class SharedLogins:
    """The logins that serve clients without one. Each process has its own. `clock` is monotonic, in seconds.

    `on_change` is called if a login is refused, each time that it was tried, and if it works again. Unless `shared`,
    no login serves clients (SHARE_AUTH_REGISTRIES). If `asks_provider`, the `provider` may have the login for a
    registry that has no other one.
    """

    def __init__(
        self,
        rules: LoginRules,
        clock: Callable[[], float],
        on_change: OnLoginChanged,
        provider: LoginProvider,
        *,
        shared: bool = True,
    ) -> None:
        self._rules = rules
        self._shared = shared
        self._clock = clock
        self._on_change = on_change
        self._provider = provider
        self.asks_provider = False
        self._configured: Mapping[HostKey, Login] = {}
        self._provided: BoundedDict[Registry, _ProvidedLogin] = BoundedDict(_MAX_REGISTRIES)
        self._refusals: BoundedDict[Registry, _Refusal] = BoundedDict(_MAX_REGISTRIES)
        self._accepted: BoundedDict[Registry, Login] = BoundedDict(_MAX_REGISTRIES, ttl=_ACCEPTED_TTL, clock=clock)
        self._checks: SingleFlight[Registry, None] = SingleFlight()
        self._reloads = 0
        # To the provider, since the last reload or before.
        self._questions: SingleFlight[tuple[int, Registry, Login | None], None] = SingleFlight()

    def configure(self, logins: Mapping[HostKey, Login], *, asks_provider: bool) -> None:
        """Use `logins` (AUTH_REGISTRIES), and the provider if it has any. Forget what is known about earlier ones."""
        self._configured, self.asks_provider = logins, asks_provider and self._shared
        self._reloads += 1
        self._provided.clear()
        self._refusals.clear()
        self._accepted.clear()
        self._rules.set_logins(logins)

    # the logins

    def configured_login(self, registry: Registry) -> Login | None:
        """Return the login for `registry`, even if it is refused."""
        return self._rules.effective_login(registry) if self._shared else None

    def login_for(self, registry: Registry) -> Login | None:
        """Return the login for `registry`; None if there is none, or if it is refused."""
        login = self._rules.effective_login(registry) if self._shared else None
        if login is None or not len(self._refusals):  # each cached request asks
            return login
        refusal = self._refusal(registry, login)
        if refusal is None:
            return login
        if self._clock() >= refusal.retry_at:
            refusal.retry_at = self._clock() + refusal.delay
            spawn(self._check(registry, login), f"trying the login for {registry}")
        return None

    def setting(self, registry: Registry) -> str:
        """Return the name of the setting that has the login for `registry`."""
        provided = self._provided.get(registry)
        return "AUTH_REGISTRIES" if provided is None or provided.login is None else provided.setting

    # the provider

    def needs_provider(self, registry: Registry) -> bool:
        """Return whether `obtain` has to be called before the login for `registry` is known."""
        if not self.asks_provider:
            return False
        provided = self._provided.get(registry)
        if provided is None:
            return self._rules.effective_login(registry) is None
        return self._clock() >= provided.ends_at

    async def obtain(self, registry: Registry, client: str, *, is_open: bool) -> None:
        """Get the login for `registry` for the client at the address `client`. It waits for the first one only.

        A registry that `is_open` needs none.
        """
        known = self._provided.get(registry)
        if known is None and not is_open:
            return await self._ask_provider(registry, None, client)
        login, setting = (None, "") if known is None else (known.login, known.setting)
        self._provided[registry] = _ProvidedLogin(login, setting, self._clock() + LOGIN_TTL)
        if not is_open:
            spawn(self._ask_provider(registry, None, client), f"getting the login for {registry}")

    async def _ask_provider(self, registry: Registry, refused: Login | None, client: str) -> None:
        key = self._reloads, registry, refused
        await self._questions.do(key, lambda: self._ask_provider_now(registry, refused, client))

    async def _ask_provider_now(self, registry: Registry, refused: Login | None, client: str) -> None:
        reloads = self._reloads
        provided = await self._provider.get_login(registry.host, refused, client)
        if reloads != self._reloads:
            return  # the answer of a helper that may have been removed
        known = self._provided.get(registry)
        login, setting = (None, "") if provided is None else (provided.login, provided.setting)
        drops_another = known is None and len(self._provided) >= _MAX_REGISTRIES
        self._provided[registry] = _ProvidedLogin(login, setting, self._clock() + LOGIN_TTL)
        if login == (None if known is None else known.login) and not drops_another:
            return
        logins = {**self._configured}
        for other in list(self._provided):
            entry = self._provided.get(other)
            if entry is not None and entry.login is not None:
                logins[other.host] = entry.login
        self._rules.set_logins(logins)
        if login is not None and registry in self._refusals:
            self._refusals.pop(registry)
            self._on_change(str(registry), setting, "")

    # refused logins

    def reason(self, registry: Registry) -> str:
        """Return why the login for `registry` is not used: a clause for an error message. It is empty if it is used."""
        login = self.configured_login(registry)
        refusal = None if login is None else self._refusal(registry, login)
        if refusal is None:
            return ""
        return f"the login for {registry} in {self.setting(registry)} is refused ({refusal.reason})"

    async def alternatives(self, registry: Registry, refused: Credential, client: str = "") -> list[Credential]:
        """Return the credentials to try if `registry` denied something to `refused`. There are none for no login.

        Find out whether the provider has a new login, or else whether the login itself is refused.
        """
        if not isinstance(refused, BasicCredentials | IdentityToken):
            return []
        provided = self._provided.get(registry)
        if provided is not None and provided.login is not None:
            await self._ask_provider(registry, refused, client)
            login = self.configured_login(registry)
            if login is not None and login != refused:
                return [login, Anonymous()]
        if self._accepted.get(registry) != refused and self._refusal(registry, refused) is None:
            await self._check(registry, refused)
        return [Anonymous()]

    def _refusal(self, registry: Registry, login: Login) -> _Refusal | None:
        refusal = self._refusals.get(registry)
        return refusal if refusal is not None and refusal.login == login else None

    async def _check(self, registry: Registry, login: Login) -> None:
        await self._checks.do(registry, lambda: self._check_now(registry, login))

    async def _check_now(self, registry: Registry, login: Login) -> None:
        known = self._refusal(registry, login)
        if known is not None and self._provided.get(registry) is not None:
            await self._ask_provider(registry, login, "")
            if self.configured_login(registry) != login:
                return
        try:
            reason = await self._rules.refusal(registry, login)
        except RegistryError:
            return  # upstream did not say
        if reason is None:
            self._accepted[registry] = login
            if known is not None:
                self._refusals.pop(registry)
                self._on_change(str(registry), self.setting(registry), "")
            return
        delay = FIRST_RETRY if known is None else min(2 * known.delay, LAST_RETRY)
        self._refusals[registry] = _Refusal(login, reason, self._clock() + delay, delay)
        self._on_change(str(registry), self.setting(registry), reason)
