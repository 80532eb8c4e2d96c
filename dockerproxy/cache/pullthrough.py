"""The pull-through cache: serves upstream registries, fetching content that is not cached.

All clients share one `PullThrough`. A `CachedRegistry` is one registry as seen by one client: it chooses the credential
that is used upstream for the client, and delegates to `manifests` and `blobs`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from attrs import define, evolve, field, frozen

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.blobs import CachedBlobs
from dockerproxy.cache.challenges import TOKEN_PATH, Challenges, Realm
from dockerproxy.cache.companions import Companions
from dockerproxy.cache.identity import INVALID_TOKEN, PUBLIC, Identities, LocalToken, client_authorization
from dockerproxy.cache.manifests import CachedManifests
from dockerproxy.cache.token_endpoint import ObservedResponse, TokenEndpoint, TokenRequest
from dockerproxy.cache.upstream import (
    DecodedResponse,
    DirectResponse,
    RegistryClient,
    UpstreamPrincipal,
    UpstreamRepository,
    UpstreamResponse,
    error_from_response,
    is_denial,
    is_gone,
)
from dockerproxy.errors import (
    IntermediaryRefused,
    LocalTokenRequired,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    Unauthorized,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamRefused,
    is_outage,
)
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import READ_METHODS
from dockerproxy.oci.challenge import Challenge
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.manifests import (
    EMPTY_INDEX,
    MAX_MANIFEST,
    OCI_INDEX,
    fallback_tag,
    filter_referrers,
)
from dockerproxy.oci.names import Digest, Reference, Registry, Repository
from dockerproxy.oci.referrers import ReferrersIndex, ReferrersQuery
from dockerproxy.oci.routes import LIST_KINDS, Kind, Target, is_pull_query
from dockerproxy.thread_pool import ContentParser
from dockerproxy.upstream.bytes_body import BytesBody
from dockerproxy.upstream.content_coding import can_decode, content_codings
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, Credential
from dockerproxy.upstream.registry_request import RegistryRequest
from dockerproxy.upstream.shared_logins import SharedLogins

T = TypeVar("T")


@define
class PullThrough:
    """The parts of the cache, shared by all registries and clients.

    `registries` is the live table of served registries. `logins` are the administrator's, which serve every client.
    `private_repositories` has those that denied something to a client without a login lately.
    """

    upstream: RegistryClient
    identities: Identities
    challenges: Challenges
    token_endpoint: TokenEndpoint
    manifests: CachedManifests
    companions: Companions
    blobs: CachedBlobs
    parser: ContentParser
    registries: Iterable[Registry]
    logins: SharedLogins
    private_repositories: BoundedDict[str, bool]

    def registry(self, registry: Registry, authorization: str | None, client: str = "") -> CachedRegistry:
        """Return `registry` as seen by the client at the address `client`, with its Authorization field, if any.

        Every method raises `Unauthorized` if the client's token is local and expired.
        """
        local_token = None
        if authorization is not None:
            authorization = client_authorization(authorization)
        if authorization is not None:
            local_token = self.identities.read_token(authorization)
        own_authorization = authorization if local_token is None else None
        return CachedRegistry(self, registry, own_authorization, local_token, client)

    def registry_for_realm(self, host: Registry, path: str) -> Registry | None:
        """Return a registry that has its token endpoint at `path` of `host`, if any: the one at `host` itself first.

        If several share the endpoint it does not matter which one is returned: tokens are of the realm.
        """
        if path == TOKEN_PATH:
            return host if self.challenges.realm(host) is not None else None
        endpoint = Realm(host, path)
        for registry in (host, *self.registries):
            realm = self.challenges.realm(registry)
            if realm is not None and endpoint.has_endpoint_of(realm) and self.challenges.has_endpoint(registry, realm):
                return registry
        return None

    async def token(self, registry: Registry, query: str, authorization: str | None, form: bytes | None) -> bytes:
        """Return the JSON response of the realm of `registry`, or a local token in its place.

        Only tokens for a service that a registry names in its challenge are ours to issue.
        """
        realm = self._realm_for(registry, query)
        if authorization is not None:
            authorization = client_authorization(authorization)
        request = TokenRequest(realm.complete(query), authorization, form)
        services = request.services()
        served = [one for one in {registry, *self.registries} if self.challenges.names_service(one, realm, services)]
        if not served:
            return await self.token_endpoint.forward(registry, realm, request)
        serves_all = any(self.logins.login_for(one) is not None for one in served)
        try:
            return await self.token_endpoint.token(registry, realm, request, serves_all=serves_all)
        except RegistryError as error:
            if is_outage(error) and not request.has_no_credential():
                self.challenges.warn_of_unknown_logins(registry)
            if _is_no_endpoint(error) and await self.challenges.has_moved(registry, realm):
                return self.token_endpoint.token_without_realm(error, request)
            raise

    def registry_naming(self, host: Registry, path: str) -> Registry | None:
        """Return a registry that names `path` of `host` as its realm, if it may be a page of another owner."""
        endpoint = Realm(host, path)
        for registry in self.registries:
            realm = self.challenges.realm(registry)
            if endpoint.has_endpoint_of(realm) and self.challenges.has_page_as_endpoint(registry, endpoint):
                return registry
        return None

    def realm_of_login(self, registry: Registry, request: TokenRequest) -> Realm | None:
        """Return the realm of `registry` if `request` is one by one login for a token of it, else None."""
        try:
            realm = self._realm_for(registry, request.query)
            is_login = request.client_authorization() is not None and request.has_one_credential()
            services = request.services()
        except RegistryError:  # it is forwarded as it is
            return None
        if not is_login or not realm.parameters <= {*parse_qsl(request.query, keep_blank_values=True)}:
            return None
        is_named = any(self.challenges.names_service(one, realm, services) for one in (registry, *self.registries))
        return realm if is_named else None

    def _realm_for(self, registry: Registry, query: str) -> Realm:
        """Return the realm of `registry`; of those at the same URL, the one with parameters that `query` has.

        Raise `NameUnknown` if `registry` has no realm.
        """
        realm = self.challenges.realm(registry)
        if realm is None:
            raise NameUnknown(f"{registry} has no token server")
        present = {*parse_qsl(query, keep_blank_values=True)}
        candidates = [realm, *(other for one in self.registries if (other := self.challenges.realm(one)) is not None)]
        named = [one for one in candidates if realm.has_endpoint_of(one) and one.parameters <= present]
        return max(named, key=lambda one: len(one.parameters), default=realm)


@frozen
class CachedRegistry:
    """One registry as seen by one client, which has its own credential, a local token, or neither.

    It is the backend of the HTTP API for pulls (`registry.backend.PullBackend`, `registry.upstream.UpstreamRegistry`).

    `authorization` is the client's own credential. `local_token` is the result of `Identities.read_token`.
    """

    cache: PullThrough
    registry: Registry
    authorization: str | None = field(repr=False)
    local_token: LocalToken | None
    client: str = ""

    @property
    def credential(self) -> Credential:
        """The credential used upstream: the client's own if it has one, else the configured login, else none."""
        if self.authorization is not None:
            return ClientCredential(self.authorization)
        return self.cache.logins.login_for(self.registry) or Anonymous()

    async def _prepare(self) -> None:
        """Learn what the choice of a login depends on."""
        await self.cache.challenges.ensure_known(self.registry)
        if self.cache.logins.asks_provider:
            await self._obtain_login()

    async def _obtain_login(self) -> None:
        """Get the login for the registry from a credential helper or docker's file, if the client may need it."""
        has_own_login = self.authorization is not None and not self.authorization.startswith("Bearer ")
        if not has_own_login and self.cache.logins.needs_provider(self.registry):
            is_open = not self.cache.challenges.cached(self.registry)
            await self.cache.logins.obtain(self.registry, self.client, is_open=is_open)

    def _principal(self, name: Repository, credential: Credential) -> UpstreamPrincipal:
        identity = self.cache.identities.for_credential(self.registry, name, credential)
        repository = UpstreamRepository(self.registry, name, credential)
        fallback_identity = None if self.local_token is None else self.local_token.identity_at(name)
        if (login := self._login_beside_token()) is not None:
            fallback_identity = self.cache.identities.for_credential(self.registry, name, login)
        return UpstreamPrincipal(repository, identity, fallback_identity, self.client)

    def identity_at(self, name: Repository) -> str:
        """Return the identity under which the client reads the repository `name`."""
        return self._principal(name, self.credential).identity

    def _login_beside_token(self) -> Credential | None:
        """Return the configured login if it serves the client, should its token be refused; else None.

        A token that was fetched without this proxy may be one for clients without a login, which the configured login
        serves. A login of the client's own is not replaced.
        """
        if self.authorization is None or not self.authorization.startswith("Bearer "):
            return None
        login = self.cache.logins.login_for(self.registry)
        return None if login is None or self.cache.identities.is_bound(self.authorization) else login

    # A hit pays for each coroutine, so these two are none.

    def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> Coroutine[Any, Any, ManifestResponse]:
        """Return a manifest. Raise `Unauthorized`, `UpstreamRefused`, `UpstreamError`."""
        manifests = self.cache.manifests

        def get(credential: Credential) -> Awaitable[ManifestResponse]:
            return manifests.get(self._principal(name, credential), reference, accept, head=head)

        return self._pull(name, get)

    def blob(self, name: Repository, digest: Digest, *, head: bool) -> Coroutine[Any, Any, BlobResponse]:
        """Return a blob. Raise `Unauthorized`, `UpstreamRefused`, `UpstreamError`."""
        blobs = self.cache.blobs
        method = blobs.head if head else blobs.get

        def get(credential: Credential) -> Awaitable[BlobResponse]:
            return method(self._principal(name, credential), digest)

        return self._pull(name, get)

    async def _pull(self, name: Repository, attempt: Callable[[Credential], Awaitable[T]]) -> T:
        """Return the result of `attempt` with a credential that suffices for the repository `name`."""
        self._check_token()
        if self.cache.logins.asks_provider or not self.cache.challenges.knows(self.registry):
            await self._prepare()
        if self._may_hold_public_token():
            return await self._try_as_public(name, attempt)
        credential = self.credential
        try:  # as `_try` does; a hit pays for each coroutine
            return await attempt(credential)
        except RegistryError as error:
            denial = error
        return await self._try_others(credential, attempt, denial)

    def _may_hold_public_token(self) -> bool:
        """Return whether the client's token may be one of clients without a login, from a realm that it used itself."""
        return (
            self.authorization is not None
            and self.authorization.startswith("Bearer ")
            and self.cache.challenges.has_foreign_realm(self.registry)
            and not self.cache.identities.is_bound(self.authorization)
        )

    async def _try_as_public(self, name: Repository, attempt: Callable[[Credential], Awaitable[T]]) -> T:
        """Return the result of `attempt` without the client's token if that suffices, else with it.

        Content that only unknown tokens have fetched could be served to no other client, nor in an outage.
        """
        key = f"{self.registry}/{name}"
        if key not in self.cache.private_repositories:
            try:
                return await attempt(Anonymous())
            except RegistryError as error:
                if is_denial(error, PUBLIC) or _hides_repository(error):
                    self.cache.private_repositories[key] = True
        return await self._try(self.credential, attempt)

    async def _try(self, credential: Credential, attempt: Callable[[Credential], Awaitable[T]]) -> T:
        """Return the result of `attempt` with `credential`, or as `_try_others` does with another one."""
        try:
            return await attempt(credential)
        except RegistryError as error:
            denial = error
        return await self._try_others(credential, attempt, denial)

    async def _try_others(
        self, credential: Credential, attempt: Callable[[Credential], Awaitable[T]], error: RegistryError
    ) -> T:
        """Return the result of `attempt`, which failed with `error` and `credential`, with another credential.

        If `credential` is a login of the administrator's and upstream denied access, which may be because it has ended,
        the attempt is repeated with what else the client may use, at last without a login: public images go on. A token
        that may be nobody's is not the client's only credential either.
        """
        login = self._login_beside_token()
        if not _is_denial_of(credential, error) or (self.authorization is not None and login is None):
            raise error
        if login is not None:
            return await evolve(self, authorization=None)._try(login, attempt)
        for other in await self.cache.logins.alternatives(self.registry, credential, self.client):
            try:
                return await attempt(other)
            except RegistryError as failure:
                if not _is_denial_of(other, failure):
                    raise
        raise self._explained_denial(error)

    def _explained_denial(self, error: RegistryError) -> RegistryError:
        """Return `error`, or one that names the setting if the reason for it is that its login is refused."""
        reason = self.cache.logins.reason(self.registry)
        if not reason:
            return error
        return Unauthorized(f"{reason}, and upstream denies access without a login; the administrator has to renew it")

    async def ping(self) -> None:
        """Check the client for `/v2/`. Raise `Unauthorized` if it must authenticate first."""
        self._check_token()
        if self.authorization is not None:
            await self._ping_upstream()
        elif self.local_token is None:
            await self._ping_without_login()

    async def _ping_without_login(self) -> None:
        challenges = await self.cache.challenges.get(self.registry)
        await self._prepare()
        if not self._allows_anonymous(challenges):
            has_shared_login = self.cache.logins.configured_login(self.registry) is not None
            if has_shared_login or not await self.cache.challenges.can_be_asked(self.registry):
                raise LocalTokenRequired("authentication required")
            raise Unauthorized("authentication required")

    async def _ping_upstream(self) -> None:
        """Let upstream check the client's credential. Ignore an outage, because each repository checks access again."""
        try:
            response = await self.forward("GET", Target(Kind.BASE), "/v2/", Headers())
            if response.status == 401:
                raise await error_from_response(self.registry, response)
            await response.discard()
        except RegistryError as error:
            if not is_outage(error):
                raise

    def _allows_anonymous(self, challenges: list[Challenge]) -> bool:
        """Return whether a client without a credential may continue.

        It may if upstream requires no authentication, or if it accepts Basic and there is a configured login. Schemes
        such as Negotiate beside Basic change nothing. With Bearer, a client gets a token of ours first.
        """
        schemes = {challenge.scheme for challenge in challenges}
        has_shared_login = self.cache.logins.configured_login(self.registry) is not None
        return not schemes or (has_shared_login and "basic" in schemes and "bearer" not in schemes)

    def _check_token(self) -> None:
        if self.local_token == INVALID_TOKEN:
            raise LocalTokenRequired("the token has expired")

    async def referrers(self, name: Repository, subject: Digest, query: ReferrersQuery) -> ReferrersIndex:
        """Return the referrers of `subject`, from the fallback tag if upstream has no referrers API.

        During an outage they are those that upstream has listed before.
        """
        self._check_token()
        path = f"/v2/{name}/referrers/{subject}" + (f"?{query.text}" if query.text else "")
        is_shared = self.authorization is not None or is_pull_query(query.text)
        credential = self.credential if is_shared else Anonymous()
        principal = self._principal(name, credential)
        try:
            return await self._ask_referrers(principal, subject, query, path)
        except RegistryError as error:
            stale = self.cache.companions.stale_referrers(principal, subject, error) if is_outage(error) else None
            if stale is None or query.last is not None:
                raise
        return await self._filtered_referrers(stale, query, "STALE")

    async def _ask_referrers(
        self, principal: UpstreamPrincipal, subject: Digest, query: ReferrersQuery, path: str
    ) -> ReferrersIndex:
        repository, headers = principal.repository, Headers([("accept", OCI_INDEX)])
        response = await self._request_list(
            "GET", path, name=repository.name, credential=repository.credential, headers=headers
        )
        if response.status == 200:
            filtered = "artifactType" in (response.headers.get("oci-filters-applied") or "")
            content = await response.read_all(MAX_MANIFEST)
            await self._filter_referrers(content, "")
            if not filtered and query.is_for_all and response.headers.get("link") is None:
                self.cache.companions.record_referrers(principal, subject, content)
            return ReferrersIndex(content, filtered, "PASS")
        if response.status != 404:
            raise await error_from_response(self.registry, response)
        await response.discard()  # perhaps the page of a server without the API; the tag decides
        try:
            manifest = await self.manifest(repository.name, fallback_tag(subject), [OCI_INDEX], head=False)
            content = manifest.content or EMPTY_INDEX
        except ManifestUnknown:  # remembered, because there is an outage since a moment ago
            return await self._filtered_referrers(EMPTY_INDEX, query, "STALE")
        except UpstreamRefused as error:
            if error.status != 404 or is_outage(error):  # a wall's 404 says nothing about the registry
                raise
            content = EMPTY_INDEX
        self.cache.companions.record_referrers(principal, subject, content)
        return await self._filtered_referrers(content, query, "PASS")

    async def _filtered_referrers(self, index: bytes, query: ReferrersQuery, cache_status: str) -> ReferrersIndex:
        if query.artifact_type is None:
            return ReferrersIndex(index, False, cache_status)
        return ReferrersIndex(await self._filter_referrers(index, query.artifact_type), True, cache_status)

    async def _filter_referrers(self, index: bytes, artifact_type: str) -> bytes:
        try:
            return await self.cache.parser.parse(filter_referrers, index, artifact_type, client=str(self.registry))
        except ManifestInvalid:
            raise UpstreamBroken(f"{self.registry} returned an invalid index of referrers") from None

    async def forward(
        self, method: str, target: Target, path: str, headers: Headers, body: Any = None
    ) -> UpstreamResponse:
        """Send a request for the API resource `target`. `path` is its path and query; the caller reads the body.

        Redirects of lists are followed. The configured login is shared for lists only: not for writes, upload sessions,
        or a query that is no pull's. Manifests, blobs and referrers have methods of their own.
        """
        self._check_token()
        is_list = target.kind in LIST_KINDS and method in ("GET", "HEAD")
        credential = self.credential
        if self.authorization is None and not (is_list and is_pull_query(path.partition("?")[2])):
            credential = Anonymous()
        if is_list:
            return self._decoded(
                await self._request_list(method, path, name=target.name or None, credential=credential, headers=headers)
            )
        request = RegistryRequest(
            method, self.registry, path,
            name=target.name or None, credential=credential, headers=headers, body=body, follow=False,
            actions="pull" if method in READ_METHODS else "pull,push",
        )  # fmt: skip
        return self._decoded(await self.cache.upstream.request(request))

    def _decoded(self, response: UpstreamResponse) -> UpstreamResponse:
        """Return the response without its codings, because clients get no Content-Encoding."""
        codings = content_codings(response.headers)
        return DecodedResponse(response, self.registry, codings) if codings and can_decode(codings) else response

    async def _request_list(
        self, method: str, path: str, *, name: Repository | None, credential: Credential, headers: Headers
    ) -> UpstreamResponse:
        """Send a request for a list with `credential`, or as `_try` does with another one."""
        logins = self.cache.logins

        async def send(credential: Credential) -> UpstreamResponse:
            request = RegistryRequest(
                method, self.registry, path, name=name, credential=credential, headers=headers
            )  # fmt: skip
            response = await self.cache.upstream.request(request)
            has_other = self.authorization is None or self._login_beside_token() is not None
            if response.status in (401, 403) and has_other and logins.configured_login(self.registry):
                raise await error_from_response(self.registry, response)
            return response

        return await self._try(credential, send)

    async def forward_token_request(
        self,
        registry: Registry,
        method: str,
        path: str,
        headers: Headers,
        form: bytes | None = None,
        *,
        client_connection: Hashable = None,
    ) -> UpstreamResponse:
        """Do the same as `forward_page`, and learn from the response if it is that of the realm of `registry`.

        `headers` has nothing that may be a login. `form` is the body of a POST.
        """
        request = TokenRequest(path.partition("?")[2], self.authorization, form)
        realm = self.cache.realm_of_login(registry, request)
        body = None if form is None else BytesBody(form)
        response = await self.forward_page(method, path, headers, body, client_connection=client_connection)
        if realm is None or response.status not in (200, 401, 403):
            return response
        observe = partial(self.cache.token_endpoint.observe, realm, request, response)
        return ObservedResponse(self._decoded(response), observe)

    def token_after(self, error: RegistryError, registry: Registry, query: str, form: bytes | None = None) -> bytes:
        """Return the JSON document with a local token if a token request that was forwarded failed with `error`.

        Raise `error` if it is no outage, or if the realm of `registry` has not accepted the login lately.
        """
        request = TokenRequest(query, self.authorization, form)
        realm = self.cache.realm_of_login(registry, request)
        if realm is None:
            raise error
        return self.cache.token_endpoint.token_after(error, realm, request)

    async def forward_page(
        self, method: str, path: str, headers: Headers, body: Any = None, *, client_connection: Hashable = None
    ) -> DirectResponse:
        """Send a request that is not of the API as it is, with the client's own credential or none.

        A connection that its login holds for is used for the client's connection alone. If `headers` have Upgrade, the
        status may be 101.
        """
        self._check_token()
        if self.authorization is not None:
            headers = Headers.from_lowercase([*headers, ("authorization", self.authorization)])
        return await self.cache.upstream.send(
            method, self.registry, path, headers, body, client_connection=client_connection
        )

    def request_login(self, error: RegistryError, name: Repository) -> RegistryError:
        """Return a 401 for a client without a login if `error` may be another one with a login, else `error`.

        Directly, a registry with logins answers a request without a token by its challenge, and nothing else. We have
        asked it with a token for clients without a login, or with a login of ours. containerd and oras do not begin
        with `/v2/`: they log in only if the request for the content of `name` itself gets a challenge.
        """
        if self.authorization is not None or self.local_token is not None:
            if self.authorization is not None and is_outage(error) and error.status != 429:
                self.cache.challenges.warn_of_unknown_logins(self.registry)
            return error
        challenges = self.cache.challenges.cached(self.registry)
        is_outage_now = is_outage(error) and error.status != 429 and not isinstance(error, IntermediaryRefused)
        if self._allows_anonymous(challenges):
            return error
        if is_outage_now:  # a login lets the client read what is cached
            sentence = f"only cached content of {name} can be served"
        elif _may_differ_with_login(error):
            sentence = "clients without a login are refused"
        else:
            return error
        scope = f"repository:{name}:pull"
        fields = [
            challenge.with_parameter("scope", scope) if challenge.scheme == "bearer" else challenge
            for challenge in challenges
        ]
        headers = [("WWW-Authenticate", challenge.render()) for challenge in fields]
        error_class = LocalTokenRequired if is_outage_now else Unauthorized
        return error_class(f"authentication required, because {sentence}: {error.message}", headers=headers)

    def challenge(self, error: RegistryError, *, secure: bool) -> list[tuple[str, str]]:
        """Return the WWW-Authenticate fields for a 401: those of `error`, or the stored ones of the registry."""
        fields = [value for name, value in error.headers if name.lower() == "www-authenticate"]
        if not fields:
            fields = [challenge.render() for challenge in self.cache.challenges.cached(self.registry)]
        local = isinstance(error, LocalTokenRequired)
        return self.cache.challenges.render_for(self.registry, fields, secure=secure, local=local)


def _is_no_endpoint(error: RegistryError) -> bool:
    """Return whether a token server answered `error`, by which it may say that there is none at this URL."""
    return isinstance(error, UpstreamRefused) and error.status not in (401, 403, 429)


def _may_differ_with_login(error: RegistryError) -> bool:
    """Return whether a registry that has answered `error` to a client without a login may let one with a login pull.

    It may have a rate limit for each login, and may hide private repositories.
    """
    return _hides_repository(error) or (isinstance(error, UpstreamFailing) and error.status == 429)


def _hides_repository(error: RegistryError) -> bool:
    """Return whether a registry may hide a repository by `error`. It does not if it says what it lacks in there."""
    is_own = isinstance(error, UpstreamRefused) and not isinstance(error, IntermediaryRefused)
    return is_own and error.status in (403, 404) and not is_gone(error)


def _is_denial_of(credential: Credential, error: RegistryError) -> bool:
    return is_denial(error, PUBLIC if isinstance(credential, Anonymous) else "login")
