"""What each registry asks of its clients: its answer to `/v2/`, remembered, and told to our clients.

Clients begin with `/v2/` and do what its challenge says. It is remembered on disk, so that with upstream gone they get
as far as the cache. A realm on a host that is not intercepted would lead them past us (and nowhere, with upstream
gone): it is replaced by a path of the registry's own host, where we answer for the realm.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from contextlib import suppress

from attrs import frozen

from dockerproxy.cache.best_effort import try_put
from dockerproxy.cache.upstream import UpstreamAgent, error_from_response
from dockerproxy.concurrency import SingleFlight
from dockerproxy.errors import NameInvalid, RegistryError, UpstreamBroken, is_outage
from dockerproxy.http.headers import Headers
from dockerproxy.oci.challenge import Challenge, parse_challenges
from dockerproxy.oci.names import Host, Registry
from dockerproxy.store.records import Records

TOKEN_PATH = "/.well-known/docker-registry-proxy/token"
"""Where, on a registry's own host, we answer for a realm elsewhere."""

_CHALLENGE_TTL = 3600.0

_HUB = "registry-1.docker.io"
_HUB_CHALLENGE = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io"'


@frozen
class Realm:
    """A token server: its origin, and the path (without query) of its tokens."""

    server: Registry
    path: str

    @classmethod
    def parse(cls, url: str) -> Realm | None:
        """Return the realm at `url`, None where that is none that can be asked."""
        scheme, separator, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        if not separator:
            return None
        try:
            return cls(Registry.parse(f"{scheme.lower()}://{authority}"), "/" + path.partition("?")[0])
        except NameInvalid:
            return None


class Challenges:
    """The challenges of the registries that are intercepted.

    `intercepted` has the hosts under which clients reach us at the time, `learned` is told of each challenge that
    upstream makes.
    """

    def __init__(
        self,
        agent: UpstreamAgent,
        records: Records,
        intercepted: Container[Host],
        on_challenge: Callable[[Registry, list[Challenge]], None],
        clock: Callable[[], float],
    ) -> None:
        self._agent = agent
        self._on_challenge = on_challenge
        self._records = records
        self._intercepted = intercepted
        self._clock = clock
        self._requests: SingleFlight[Registry, list[str]] = SingleFlight()
        self._known_registries: set[Registry] = (
            set()
        )  # those of which it is known what they ask for: as many as are intercepted

    async def get(self, registry: Registry) -> list[Challenge]:
        """Return what `registry` asks for; nothing where it lets anyone in. Raise `UpstreamError` if it never said."""
        fields, age = self._load(registry)
        if fields is None or not 0 <= age < _CHALLENGE_TTL:
            try:
                fields = await self._requests.do(registry, lambda: self._fetch(registry))
            except RegistryError as error:
                if fields is None or not is_outage(error):
                    raise
        return parse_challenges(fields)

    def cached(self, registry: Registry) -> list[Challenge]:
        """Return what `registry` was last known to ask for, without asking."""
        return parse_challenges(self._load(registry)[0] or [])

    async def ensure_known(self, registry: Registry) -> None:
        """Find out what `registry` asks for, where that is unknown: which login is good there depends on it."""
        if registry in self._known_registries:
            return
        if self._load(registry)[0] is None:
            with suppress(RegistryError):
                await self.get(registry)
                self._known_registries.add(registry)
        else:
            self._known_registries.add(registry)
            self.restore([registry])  # it may be another process that found out

    def restore(self, registries: Iterable[Registry]) -> None:
        """Tell `learned` what is remembered of `registries` from before."""
        for registry in registries:
            self._on_challenge(registry, self.cached(registry))

    def realm(self, registry: Registry) -> Realm | None:
        """Return where `registry` was last known to send its clients for tokens."""
        for challenge in self.cached(registry):
            if challenge.scheme == "bearer":
                return Realm.parse(challenge.parameters.get("realm", ""))
        return None

    def render_for(self, registry: Registry, fields: Iterable[str], *, secure: bool) -> list[tuple[str, str]]:
        """Return WWW-Authenticate fields for a client that reached us as `registry`, over TLS if `secure`."""
        rendered = []
        for challenge in parse_challenges(fields):
            if challenge.scheme == "bearer":
                challenge = self._with_local_realm(registry, challenge, secure)
            rendered.append(("WWW-Authenticate", challenge.render()))
        return rendered

    def _with_local_realm(self, registry: Registry, challenge: Challenge, secure: bool) -> Challenge:
        realm = Realm.parse(challenge.parameters.get("realm", ""))
        if realm is not None and realm.server.host in self._intercepted:
            return challenge
        scheme = "https" if secure else "http"
        return challenge.with_parameter("realm", Registry(registry.host, scheme).origin + TOKEN_PATH)

    def _load(self, registry: Registry) -> tuple[list[str] | None, float]:
        record = self._records.get("challenge", str(registry))
        if record is None:
            return ([_HUB_CHALLENGE], _CHALLENGE_TTL) if str(registry) == _HUB else (None, 0.0)
        fields, checked_at = record.get("fields"), record.get("checked")
        if not isinstance(fields, list) or not isinstance(checked_at, int | float):
            return None, 0.0
        return [str(field) for field in fields], self._clock() - checked_at

    async def _fetch(self, registry: Registry) -> list[str]:
        response = await self._agent.request("GET", registry.origin + "/v2/", Headers())
        fields = response.headers.all("www-authenticate") if response.status == 401 else []
        # A redirect (registry.k8s.io) leads to where the content is open to all.
        if response.status != 401 and not 200 <= response.status < 400:
            raise await error_from_response(registry, response)
        await response.discard()
        if response.status == 200 and (response.headers.get("content-type") or "").lower().startswith("text/html"):
            raise UpstreamBroken(f"{registry} answers /v2/ with a web page: it is no registry")
        try_put(self._records, {"fields": fields, "checked": self._clock()}, "challenge", str(registry))
        self._on_challenge(registry, parse_challenges(fields))
        return fields
