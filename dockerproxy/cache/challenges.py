"""Authentication challenges of upstream registries: learned from `/v2/`, stored, and rendered for clients.

Clients start with `/v2/` and follow its challenge. The challenge is stored on disk so that clients reach the cache even
if upstream is down. While upstream can be asked, clients get its own challenge, because the program that fetches the
token need not use the proxy: BuildKit has the docker command do it, while the daemon requests the content. If upstream
cannot be asked, or if a client could not log in safely at the realm, the realm is replaced by a path on the registry's
own host, at which this proxy acts as token server.

A registry may name any URL as its realm, a page of another registry too. It is believed about an intercepted host if
the two have one owner, or if a registry of that host's owner names the same realm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl, quote

from attrs import frozen
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.best_effort import try_put
from dockerproxy.cache.upstream import UpstreamAgent, error_from_response
from dockerproxy.concurrency import SingleFlight
from dockerproxy.errors import CaptivePortalSuspected, NameInvalid, RegistryError, UpstreamBroken, is_outage
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.challenge import Challenge, parse_challenges
from dockerproxy.oci.docker_hub import DOCKER_HUB
from dockerproxy.oci.names import Host, Registry
from dockerproxy.store.records import Records
from dockerproxy.upstream.credentials import belong_together
from dockerproxy.upstream.redirects import REDIRECTS, follow
from dockerproxy.upstream.refusals import is_page
from dockerproxy.upstream.urls import resolve_location, split_url

TOKEN_PATH = "/.well-known/docker-registry-proxy/token"
"""Path on a registry's host at which this proxy serves tokens for a realm on another host."""

_CHALLENGE_TTL = 3600.0
_MAX_KNOWN = 1000  # registries; wildcards of REGISTRIES cover any number
_OLD_CHALLENGE = 7 * 86400.0
# Seconds for which a realm that clients use by themselves counts as answering, or as silent.
_ANSWER_TTL = 5.0
_SILENCE_TTL = 30.0
_FOREIGN_TTL = 60.0  # seconds for which it is remembered whether a realm is foreign
_WARNING_INTERVAL = 3600.0
_MAX_REGISTRIES = 256

log = Logger()

OnChallenge = Callable[[Registry, Registry | None, list[Challenge]], None]
"""Gets a registry, the server that it redirects `/v2/` to, or None, and the challenges of that one."""

_HUB_CHALLENGE = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io"'


@frozen
class Realm:
    """A token server: its origin, and the path and query of its token endpoint.

    Clients add their parameters to the query, which may say which tenant's users the server is for.
    """

    server: Registry
    path: str
    query: str = ""

    @classmethod
    def parse(cls, url: str) -> Realm | None:
        """Return the realm at `url`; None if `url` is not an absolute URL with a valid host."""
        scheme, separator, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        if not separator:
            return None
        path, _, query = path.partition("#")[0].partition("?")
        try:
            return cls(Registry.parse(f"{scheme.lower()}://{authority}"), f"/{path}", query)
        except NameInvalid:
            return None

    def __str__(self) -> str:
        return self.url(self.query)

    def url(self, query: str) -> str:
        """Return the URL of the endpoint with another `query`."""
        return self.server.origin + self.path + (f"?{query}" if query else "")

    def has_endpoint_of(self, other: Realm | None) -> bool:
        """Return whether `other` is at the same URL, apart from the query."""
        return other is not None and (self.server, self.path) == (other.server, other.path)

    @property
    def parameters(self) -> set[tuple[str, str]]:
        """The decoded parameters of the query."""
        return {*parse_qsl(self.query, keep_blank_values=True)}

    def complete(self, query: str) -> str:
        """Return a client's `query` with the parameters of the realm's that it lacks."""
        present = {*parse_qsl(query, keep_blank_values=True)}
        missing = [part for part in self.query.split("&") if not {*parse_qsl(part, keep_blank_values=True)} <= present]
        return "&".join([*missing, *([query] if query else [])])


class Challenges:
    """The challenges of the intercepted registries.

    `intercepted` has the live servers that clients reach through this proxy. `on_challenge` is called with each
    challenge that upstream sends. `allows_client_to` returns whether clients may connect to a server through this
    proxy, and `address_check_for` the check for our own connections to a realm.
    """

    def __init__(
        self,
        agent: UpstreamAgent,
        records: Records,
        intercepted: Mapping[Host, Registry],
        on_challenge: OnChallenge,
        allows_client_to: Callable[[Registry], bool],
        address_check_for: Callable[[Host], AddressCheck | None],
        clock: Callable[[], float],
    ) -> None:
        self._agent = agent
        self._allows_client_to = allows_client_to
        self._address_check_for = address_check_for
        self._on_challenge = on_challenge
        self._records = records
        self._intercepted = intercepted
        self._clock = clock
        self._requests: SingleFlight[Registry, list[str]] = SingleFlight()
        self._known_registries: BoundedDict[Registry, bool] = BoundedDict(_MAX_KNOWN)
        # Whether the realm answered, and when that is forgotten.
        self._checks: BoundedDict[Registry, tuple[bool, float]] = BoundedDict(_MAX_KNOWN)
        self._running_checks: SingleFlight[Registry, bool] = SingleFlight()
        self._renewals: BoundedDict[Registry, bool] = BoundedDict(_MAX_REGISTRIES, ttl=_SILENCE_TTL, clock=clock)
        self._warned: BoundedDict[Registry, bool] = BoundedDict(_MAX_REGISTRIES, ttl=_WARNING_INTERVAL, clock=clock)
        self._foreign: BoundedDict[Registry, bool] = BoundedDict(_MAX_REGISTRIES, ttl=_FOREIGN_TTL, clock=clock)

    async def get(self, registry: Registry) -> list[Challenge]:
        """Return the challenges of `registry`; an empty list if it requires no authentication.

        Raise `UpstreamError` if upstream fails and no earlier challenge is stored.
        """
        fields, age = self._load(registry)
        if fields is None or not 0 <= age < _CHALLENGE_TTL:
            try:
                fields = await self._requests.do(registry, lambda: self._fetch(registry))
            except RegistryError as error:
                if fields is None or not is_outage(error):
                    raise
        return parse_challenges(fields)

    async def can_be_asked(self, registry: Registry) -> bool:
        """Return whether clients can get tokens of `registry`: because we answer for its realm, or because both answer.

        Each is asked once in _ANSWER_TTL at most, and in an outage once in _SILENCE_TTL.
        """
        realm = self.realm(registry)
        if realm is None or self.has_endpoint(registry, realm):
            return True
        answers, forgotten_at = self._checks.get(registry) or (False, 0.0)
        if not 0 < forgotten_at - self._clock() <= _SILENCE_TTL:
            answers = await self._running_checks.do(registry, lambda: self._check(registry, realm))
        return answers

    async def has_moved(self, registry: Registry, realm: Realm) -> bool:
        """Return whether `registry` names another realm than `realm` now, or none.

        It is asked once in _SILENCE_TTL at most, so that clients with wrong requests for tokens do not make us ask.
        """
        if registry not in self._renewals:
            self._renewals[registry] = True
            with suppress(RegistryError):
                await self._requests.do(registry, lambda: self._fetch(registry))
        return not realm.has_endpoint_of(self.realm(registry))

    async def _check(self, registry: Registry, realm: Realm) -> bool:
        if self._intercepted.get(realm.server.host) == realm.server and _is_safe(registry, realm):
            await self.ensure_known(realm.server)  # because it may confirm that the realm is its own
        try:
            if self._is_clients_own(registry, realm):
                await self._requests.do(registry, lambda: self._fetch(registry))
                await self._ask(self.realm(registry) or realm, self._service(registry))
            answers = True
        except RegistryError:
            answers = False
        self._checks[registry] = answers, self._clock() + (_ANSWER_TTL if answers else _SILENCE_TTL)
        return answers

    async def _ask(self, realm: Realm, service: str | None) -> None:
        """Raise the error of an outage if `realm` does not answer a request without a login."""
        query = realm.complete(f"service={quote(service)}" if service else "")
        address_check = self._address_check_for(realm.server.host)
        response = await self._agent.request("GET", realm.url(query), Headers(), address_check=address_check)
        if response.status >= 400:
            error = await error_from_response(realm.server, response)
            if is_outage(error):
                raise error
        elif is_page(response.headers):
            raise CaptivePortalSuspected(f"{realm.server} returned a web page instead of a token")
        await response.discard()

    def cached(self, registry: Registry) -> list[Challenge]:
        """Return the stored challenges of `registry`, without a request."""
        return parse_challenges(self._load(registry)[0] or [])

    def knows(self, registry: Registry) -> bool:
        """Return whether `ensure_known` has nothing to do."""
        return registry in self._known_registries

    async def ensure_known(self, registry: Registry) -> None:
        """Learn the challenges of `registry` unless they are known, because the choice of login depends on them."""
        if registry in self._known_registries:
            return
        if self._load(registry)[0] is None:
            with suppress(RegistryError):
                await self.get(registry)
                self._known_registries[registry] = True
        else:
            self._known_registries[registry] = True
            self.restore([registry])  # because another process may have learned it

    def restore(self, registries: Iterable[Registry]) -> None:
        """Call `on_challenge` with the stored challenges of `registries`."""
        for registry in registries:
            self._on_challenge(registry, self._load_target(registry), self.cached(registry))

    def realm(self, registry: Registry) -> Realm | None:
        """Return the realm in the stored Bearer challenge of `registry`; None if there is none."""
        for challenge in self.cached(registry):
            if challenge.scheme == "bearer":
                return Realm.parse(challenge.parameters.get("realm", ""))
        return None

    def names_service(self, registry: Registry, realm: Realm, services: set[str]) -> bool:
        """Return whether `registry` sends clients to `realm` for a token for `services`.

        A challenge without a service leaves it to clients which one they name. The realm's own query may name more.
        """
        own_realm = self.realm(registry)
        if own_realm is None or not own_realm.has_endpoint_of(realm):
            return False
        service = self._service(registry)
        return not service or services <= {service, *(value for name, value in realm.parameters if name == "service")}

    def has_foreign_realm(self, registry: Registry) -> bool:
        """Return whether clients of `registry` may get tokens of which this proxy learns nothing."""
        is_foreign = self._foreign.get(registry)
        if is_foreign is None:
            realm = self.realm(registry)
            is_foreign = realm is not None and not self.has_endpoint(registry, realm)
            self._foreign[registry] = is_foreign
        return is_foreign

    def warn_of_unknown_logins(self, registry: Registry) -> None:
        """Log, once in an hour, which host has to be intercepted so that logins for `registry` are known in outages.

        If it is intercepted, there is nothing to log.
        """
        realm = self.realm(registry)
        if realm is None or realm.server.host in self._intercepted or registry in self._warned:
            return
        self._warned[registry] = True
        log.warn(
            "{registry} cannot be asked, and a client with a login got nothing of it: logins are unknown here, because "
            "the token server {server} is not in REGISTRIES. If you add it there, private images that are cached can "
            "be pulled during the next outage",
            registry=str(registry),
            server=realm.server.host.authority,
        )

    def has_endpoint(self, registry: Registry, realm: Realm) -> bool:
        """Return whether requests to the URL `realm`, which `registry` names, are requests to its token server.

        The proxy then answers them itself. Clients need a realm that they reach through the proxy, and with TLS if the
        registry has TLS.
        """
        server = realm.server
        if self._intercepted.get(server.host) != server or not _is_safe(registry, realm):
            return False
        if server == registry or belong_together(server.host.name, registry.host.name):
            return True
        return any(
            realm.has_endpoint_of(self.realm(other))
            and (other == server or belong_together(server.host.name, other.host.name))
            for other in self._intercepted.values()
        )

    def has_page_as_endpoint(self, registry: Registry, realm: Realm) -> bool:
        """Return whether `realm`, which `registry` names, is on an intercepted host that does not confirm it.

        It may be any page of another owner, so that requests to it are forwarded as they are.
        """
        is_intercepted = self._intercepted.get(realm.server.host) == realm.server
        return is_intercepted and _is_safe(registry, realm) and not self.has_endpoint(registry, realm)

    def render_for(
        self, registry: Registry, fields: Iterable[str], *, secure: bool, local: bool = False
    ) -> list[tuple[str, str]]:
        """Return WWW-Authenticate fields for a client that addressed this proxy as `registry`, over TLS if `secure`.

        `local` says that the client must get its token from this proxy.
        """
        rendered = []
        for challenge in parse_challenges(fields):
            if challenge.scheme == "bearer":
                challenge = self._with_usable_realm(registry, challenge, secure, local)
            rendered.append(("WWW-Authenticate", challenge.render()))
        return rendered

    def _with_usable_realm(self, registry: Registry, challenge: Challenge, secure: bool, local: bool) -> Challenge:
        realm = Realm.parse(challenge.parameters.get("realm", ""))
        if realm is not None and (
            self.has_endpoint(registry, realm) or (not local and self._is_clients_own(registry, realm))
        ):
            return challenge
        server = Registry(registry.host, "https" if secure else "http")
        return challenge.with_parameter("realm", str(Realm(server, TOKEN_PATH, "" if realm is None else realm.query)))

    def _is_clients_own(self, registry: Registry, realm: Realm) -> bool:
        """Return whether clients of `registry` can use `realm` by themselves, and safely.

        If its server is intercepted, this proxy forwards the requests as those to any page, like a tunnel.
        """
        server = self._intercepted.get(realm.server.host)
        is_reachable = self._allows_client_to(realm.server) if server is None else server == realm.server
        return is_reachable and _is_safe(registry, realm)

    def _service(self, registry: Registry) -> str | None:
        for challenge in self.cached(registry):
            if challenge.scheme == "bearer":
                return challenge.parameters.get("service")
        return None

    def _load(self, registry: Registry) -> tuple[list[str] | None, float]:
        record = self._records.get("challenge", str(registry))
        if record is None:
            return ([_HUB_CHALLENGE], _CHALLENGE_TTL) if registry == DOCKER_HUB else (None, 0.0)
        fields, checked_at = record.get("fields"), record.get("checked")
        if not isinstance(fields, list) or not isinstance(checked_at, int | float):
            return None, 0.0
        return [str(field) for field in fields], self._clock() - checked_at

    def _load_target(self, registry: Registry) -> Registry | None:
        """Return the server that the stored challenges are of, if `registry` redirects to it."""
        target = (self._records.get("challenge", str(registry)) or {}).get("target")
        try:
            return Registry.parse(target) if isinstance(target, str) else None
        except NameInvalid:
            return None

    async def _fetch(self, registry: Registry) -> list[str]:
        url = registry.origin + "/v2/"
        response = await self._agent.request("GET", url, Headers())
        fields, target = response.headers.all("www-authenticate") if response.status == 401 else [], None
        if response.status != 401 and not 200 <= response.status < 400:
            raise await error_from_response(registry, response)
        await response.discard()
        if response.status in REDIRECTS:
            target, fields = await self._challenge_of_target(url, response.headers.get("location") or "")
        # A redirect (registry.k8s.io) may lead to a server that requires no authentication, and a page may be a static
        # registry's. Both, and a 401 without a challenge, may also be a captive portal's or a firewall's, which must
        # not replace a challenge until that is old.
        is_odd = not fields and (response.status == 401 or is_page(response.headers))
        known_fields, age = self._load(registry)
        is_elsewhere = not fields and 300 <= response.status < 400
        if known_fields and (is_odd or is_elsewhere) and 0 <= age < _OLD_CHALLENGE:
            raise UpstreamBroken(f"{registry} answered /v2/ without its challenge (status {response.status})")
        checked = 0.0 if is_odd else self._clock()  # ask again next time
        record: dict[str, Any] = {"fields": fields, "checked": checked}
        if target is not None:
            record["target"] = target.origin
        try_put(self._records, record, "challenge", str(registry))
        self._on_challenge(registry, target, parse_challenges(fields))
        return fields

    async def _challenge_of_target(self, url: str, location: str) -> tuple[Registry | None, list[str]]:
        """Follow the redirect of `url`, as docker does. Return the server that it leads to, and its Bearer challenge.

        Return None if it leads to no such challenge: each request for content shows what it needs.
        """
        try:
            location = resolve_location(url, location)
            if split_url(location)[0].scheme == "http" and url.startswith("https:"):
                return None, []
            response, followed = await follow(self._agent, "GET", location, Headers(), None, self._address_check_for)
            await response.discard()
        except RegistryError:
            return None, []
        fields = response.headers.all("www-authenticate") if response.status == 401 else []
        if not any(challenge.scheme == "bearer" for challenge in parse_challenges(fields)):
            return None, []
        return None if followed.server.origin + "/v2/" == url else followed.server, fields


def _is_safe(registry: Registry, realm: Realm) -> bool:
    """Return whether logins stay in TLS: a registry with TLS may name a realm without it."""
    return realm.server.scheme == "https" or registry.scheme == "http"
