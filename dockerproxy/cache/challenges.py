"""Authentication challenges of upstream registries: learned from `/v2/`, stored, and rendered for clients.

Clients start with `/v2/` and follow its challenge. The challenge is stored on disk so that clients reach the cache even
if upstream is down. A realm on a host that is not intercepted would let clients bypass the proxy, and would fail during
an outage. It is therefore replaced by a path on the registry's own host, at which this proxy acts as token server.

A registry may name any URL as its realm, a page of another registry too. It is believed about an intercepted host if
the two have one owner, or if a registry of that host's owner names the same realm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from attrs import frozen

from dockerproxy.cache.best_effort import try_put
from dockerproxy.cache.upstream import UpstreamAgent, error_from_response
from dockerproxy.concurrency import SingleFlight
from dockerproxy.errors import NameInvalid, RegistryError, UpstreamBroken, is_outage
from dockerproxy.http.headers import Headers
from dockerproxy.oci.challenge import Challenge, parse_challenges
from dockerproxy.oci.docker_hub import DOCKER_HUB
from dockerproxy.oci.names import Host, Registry
from dockerproxy.store.records import Records
from dockerproxy.upstream.credentials import belong_together
from dockerproxy.upstream.refusals import is_page

TOKEN_PATH = "/.well-known/docker-registry-proxy/token"
"""Path on a registry's host at which this proxy serves tokens for a realm on another host."""

_CHALLENGE_TTL = 3600.0
_OLD_CHALLENGE = 7 * 86400.0

_HUB_CHALLENGE = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io"'


@frozen
class Realm:
    """A token server: its origin, and the path of its token endpoint without the query."""

    server: Registry
    path: str

    @classmethod
    def parse(cls, url: str) -> Realm | None:
        """Return the realm at `url`; None if `url` is not an absolute URL with a valid host."""
        scheme, separator, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        if not separator:
            return None
        try:
            return cls(Registry.parse(f"{scheme.lower()}://{authority}"), "/" + path.partition("?")[0])
        except NameInvalid:
            return None

    def __str__(self) -> str:
        return self.server.origin + self.path


class Challenges:
    """The challenges of the intercepted registries.

    `intercepted` has the live servers that clients reach through this proxy. `on_challenge` is called with each
    challenge that upstream sends.
    """

    def __init__(
        self,
        agent: UpstreamAgent,
        records: Records,
        intercepted: Mapping[Host, Registry],
        on_challenge: Callable[[Registry, list[Challenge]], None],
        clock: Callable[[], float],
    ) -> None:
        self._agent = agent
        self._on_challenge = on_challenge
        self._records = records
        self._intercepted = intercepted
        self._clock = clock
        self._requests: SingleFlight[Registry, list[str]] = SingleFlight()
        self._known_registries: set[Registry] = set()  # bounded, because only intercepted registries are added

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

    def cached(self, registry: Registry) -> list[Challenge]:
        """Return the stored challenges of `registry`, without a request."""
        return parse_challenges(self._load(registry)[0] or [])

    async def ensure_known(self, registry: Registry) -> None:
        """Learn the challenges of `registry` unless they are known, because the choice of login depends on them."""
        if registry in self._known_registries:
            return
        if self._load(registry)[0] is None:
            with suppress(RegistryError):
                await self.get(registry)
                self._known_registries.add(registry)
        else:
            self._known_registries.add(registry)
            self.restore([registry])  # because another process may have learned it

    def restore(self, registries: Iterable[Registry]) -> None:
        """Call `on_challenge` with the stored challenges of `registries`."""
        for registry in registries:
            self._on_challenge(registry, self.cached(registry))

    def realm(self, registry: Registry) -> Realm | None:
        """Return the realm in the stored Bearer challenge of `registry`; None if there is none."""
        for challenge in self.cached(registry):
            if challenge.scheme == "bearer":
                return Realm.parse(challenge.parameters.get("realm", ""))
        return None

    def names_service(self, registry: Registry, realm: Realm, services: set[str]) -> bool:
        """Return whether `registry` sends clients to `realm` for a token for `services`.

        A challenge without a service leaves it to clients which one they name.
        """
        for challenge in self.cached(registry):
            if challenge.scheme == "bearer":
                service = challenge.parameters.get("service")
                return self.realm(registry) == realm and (not service or services <= {service})
        return False

    def has_endpoint(self, registry: Registry, realm: Realm) -> bool:
        """Return whether requests to the URL `realm`, which `registry` names, are requests to its token server.

        The proxy then answers them itself. Clients need a realm that they reach through the proxy, and with TLS if the
        registry has TLS.
        """
        server = realm.server
        if self._intercepted.get(server.host) != server or (server.scheme == "http" and registry.scheme == "https"):
            return False
        if server == registry or belong_together(server.host.name, registry.host.name):
            return True
        return any(
            self.realm(other) == realm and (other == server or belong_together(server.host.name, other.host.name))
            for other in self._intercepted.values()
        )

    def render_for(self, registry: Registry, fields: Iterable[str], *, secure: bool) -> list[tuple[str, str]]:
        """Return WWW-Authenticate fields for a client that addressed this proxy as `registry`, over TLS if `secure`."""
        rendered = []
        for challenge in parse_challenges(fields):
            if challenge.scheme == "bearer":
                challenge = self._with_local_realm(registry, challenge, secure)
            rendered.append(("WWW-Authenticate", challenge.render()))
        return rendered

    def _with_local_realm(self, registry: Registry, challenge: Challenge, secure: bool) -> Challenge:
        realm = Realm.parse(challenge.parameters.get("realm", ""))
        if realm is not None and self.has_endpoint(registry, realm):
            return challenge
        scheme = "https" if secure else "http"
        return challenge.with_parameter("realm", Registry(registry.host, scheme).origin + TOKEN_PATH)

    def _load(self, registry: Registry) -> tuple[list[str] | None, float]:
        record = self._records.get("challenge", str(registry))
        if record is None:
            return ([_HUB_CHALLENGE], _CHALLENGE_TTL) if registry == DOCKER_HUB else (None, 0.0)
        fields, checked_at = record.get("fields"), record.get("checked")
        if not isinstance(fields, list) or not isinstance(checked_at, int | float):
            return None, 0.0
        return [str(field) for field in fields], self._clock() - checked_at

    async def _fetch(self, registry: Registry) -> list[str]:
        response = await self._agent.request("GET", registry.origin + "/v2/", Headers())
        fields = response.headers.all("www-authenticate") if response.status == 401 else []
        if response.status != 401 and not 200 <= response.status < 400:
            raise await error_from_response(registry, response)
        await response.discard()
        # A redirect (registry.k8s.io) leads to a server that requires no authentication, and a page may be a static
        # registry's. Both, and a 401 without a challenge, may also be a captive portal's or a firewall's, which must
        # not replace a challenge until that is old.
        is_odd = not fields and (response.status == 401 or is_page(response.headers))
        known_fields, age = self._load(registry)
        if known_fields and (is_odd or 300 <= response.status < 400) and 0 <= age < _OLD_CHALLENGE:
            raise UpstreamBroken(f"{registry} answered /v2/ without its challenge (status {response.status})")
        checked = 0.0 if is_odd else self._clock()  # ask again next time
        try_put(self._records, {"fields": fields, "checked": checked}, "challenge", str(registry))
        self._on_challenge(registry, parse_challenges(fields))
        return fields
