"""Authorization at registries: fetches bearer tokens, caches them, and renews them before they expire.

The protocol is distribution's "Token Authentication Specification" (docs/spec/auth/token.md).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote, urlencode

from attrs import evolve, field, frozen

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.concurrency import SingleFlight
from dockerproxy.errors import (
    BadRequest,
    CaptivePortalSuspected,
    IntermediaryRefused,
    RegistryError,
    TooManyRequests,
    Unauthorized,
    UpstreamBroken,
    UpstreamError,
)
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.challenge import Challenge
from dockerproxy.oci.credentials import BasicCredentials, IdentityToken, Login
from dockerproxy.oci.docker_hub import DOCKER_HUB, DOCKER_HUB_TOKENS
from dockerproxy.oci.host_table import HostKey
from dockerproxy.oci.names import Host, Registry
from dockerproxy.oci.routes import parse_query
from dockerproxy.oci.tokens import MAX_TOKEN_RESPONSE, TokenResponse
from dockerproxy.oci.untrusted_json import JSONInvalid, parse_json
from dockerproxy.upstream.agent import Agent, Response
from dockerproxy.upstream.bytes_body import BytesBody
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, Credential, LoginTable
from dockerproxy.upstream.metered_agent import MeteredAgent
from dockerproxy.upstream.redirects import follow
from dockerproxy.upstream.refusals import is_own_refusal, is_page
from dockerproxy.upstream.urls import split_url, with_tls_at_usual_port

_MAX_TOKENS = 1024
_MAX_REGISTRIES = 256
_MAX_SCOPES = 8
_MAX_TARGETS = 8  # of the redirects of one registry
_CLIENT_ID = "docker-registry-proxy"
_OAUTH_REFUSALS = frozenset({"invalid_grant", "invalid_client", "unauthorized_client"})  # RFC 6749, section 5.2
_SCOPE_PATTERN = re.compile(r"[!-~]{1,1024}")


@frozen
class TokenKey:
    """The key of a cached token: the parameters of the request for it. `login` is None for an anonymous token.

    `front` is the registry that redirects to `registry`, if one does.
    """

    registry: Registry
    realm: str
    service: str | None
    scopes: tuple[str, ...]
    login: Login | None
    front: Registry | None = None

    @property
    def host(self) -> Host:
        """The host of the realm."""
        return split_url(self.realm)[0].host


@frozen
class Authorization:
    """The value of an Authorization field. `token_key` is None unless it is a bearer token that we fetched.

    `from_cache` says that the token was fetched for an earlier request.
    """

    value: str = field(repr=False)
    token_key: TokenKey | None = None
    from_cache: bool = False


@frozen
class _CachedToken:
    authorization: Authorization
    renew_at: float  # Unix time after which a new token is fetched


class Authorizer:
    """Provides the Authorization field for requests to registries.

    `address_check` checks the addresses of realms on other hosts than the registry's; `clock` returns Unix time.
    """

    def __init__(
        self,
        agent: Agent | MeteredAgent,
        clock: Callable[[], float],
        address_check: AddressCheck | None,
        logins: Mapping[HostKey, Login] | Mapping[Host, Login],
    ) -> None:
        self._agent = agent
        self._clock = clock
        self._address_check = address_check
        self._logins = LoginTable(logins)
        self._tokens: OrderedDict[TokenKey, _CachedToken] = OrderedDict()  # least recently used first
        self._challenges: OrderedDict[Registry, tuple[Challenge, ...]] = OrderedDict()
        self._redirects: BoundedDict[Registry, dict[Registry, Challenge]] = BoundedDict(_MAX_REGISTRIES)
        self._pinged: BoundedDict[Registry, Registry] = BoundedDict(_MAX_REGISTRIES)
        self._logins_of_targets: BoundedDict[Registry, Login] = BoundedDict(_MAX_REGISTRIES)
        self._effective_logins: dict[Registry, Login | None] = {}  # of these logins and challenges
        self._fetches: SingleFlight[TokenKey, Authorization] = SingleFlight()

    def set_logins(self, logins: Mapping[HostKey, Login] | Mapping[Host, Login]) -> None:
        """Replace the logins of AUTH_REGISTRIES."""
        self._logins = LoginTable(logins)
        self._effective_logins.clear()

    # challenges

    def add_challenges(self, registry: Registry, challenges: Sequence[Challenge]) -> None:
        """Remember the challenges of `registry`, so that the next request can be authorized at once."""
        # Drop the scope, because it applies only to the request that was refused.
        usable = tuple(_without_scope(challenge) for challenge in challenges if challenge.scheme in ("bearer", "basic"))
        if usable:
            self._effective_logins.clear()
            self._challenges[registry] = usable
            self._challenges.move_to_end(registry)
            if len(self._challenges) > _MAX_REGISTRIES:
                self._challenges.popitem(last=False)

    def challenges_for(self, registry: Registry) -> tuple[Challenge, ...]:
        """Return the latest challenges of `registry`, or an empty tuple if none are known."""
        return self._challenges.get(registry, ())

    def remove_challenges(self, registry: Registry) -> None:
        """Forget the challenges of `registry`, because its token server failed."""
        self._effective_logins.clear()
        self._challenges.pop(registry, None)

    # redirects: a front such as lscr.io leads to the registry proper, which has a challenge and a login of its own

    def add_redirect(self, registry: Registry, target: Registry, challenges: Sequence[Challenge]) -> None:
        """Remember that `registry` redirects requests to `target`, which has these `challenges`."""
        bearer = _bearer_challenge(challenges)
        if bearer is None:
            return
        targets = self._redirects.get(registry) or {}
        if target in targets or len(targets) < _MAX_TARGETS:
            self._redirects[registry] = {**targets, target: _without_scope(bearer)}
            self._effective_logins.clear()

    def set_ping_target(self, registry: Registry, target: Registry | None, challenges: Sequence[Challenge]) -> None:
        """Remember the `challenges` of `registry` itself, or of `target` if `registry` redirects `/v2/` there."""
        if target is None:
            self._pinged.pop(registry)
            self.add_challenges(registry, challenges)
        else:
            self._pinged[registry] = target
            self.add_redirect(registry, target, challenges)

    def ping_target(self, registry: Registry) -> Registry | None:
        """Return the server that `registry` redirects `/v2/` to, if any. Clients get their tokens by its challenge."""
        return self._pinged.get(registry)

    def redirect_challenges(self, registry: Registry, target: Registry) -> tuple[Challenge, ...]:
        """Return the challenge of `target` in answer to requests that `registry` redirected; empty if not known."""
        bearer = (self._redirects.get(registry) or {}).get(target)
        return () if bearer is None else (bearer,)

    def remove_redirect(self, registry: Registry, target: Registry) -> None:
        """Forget the challenge of `target`, because its token server failed."""
        targets = self._redirects.get(registry) or {}
        self._redirects[registry] = {one: bearer for one, bearer in targets.items() if one != target}

    async def get_redirect_authorization(
        self,
        registry: Registry,
        target: Registry,
        challenges: Sequence[Challenge],
        scope: str,
        credential: Credential,
        rejected_authorization: Authorization | None = None,
    ) -> Authorization | None:
        """Return a bearer token for `target`, to which `registry` redirects; None if none of `challenges` is Bearer.

        `credential` is that of the request to `registry`, and is not sent. In place of a login of ours, the login for
        `target` is used, if there is one. See `get_authorization` for the rest.
        """
        bearer = _bearer_challenge(challenges)
        if bearer is None:
            return None
        login = None
        if isinstance(credential, BasicCredentials | IdentityToken):
            login = self._logins.effective_login(target, _bearer_host(bearer))
        key = self._token_key(target, bearer, scope, login or Anonymous(), registry)
        return await self._get_token(key, rejected_authorization)

    def effective_login(self, registry: Registry) -> Login | None:
        """Return the login of AUTH_REGISTRIES for `registry`: its own, or else the login for its realm's host.

        A registry that has none and redirects has the login of its target. It is sent there only.
        """
        try:
            return self._effective_logins[registry]  # each cached request asks for it
        except KeyError:
            if len(self._effective_logins) >= _MAX_REGISTRIES:
                self._effective_logins.clear()
        login = self._logins.effective_login(registry, self._realm_host(registry))
        self._logins_of_targets.pop(registry)
        if login is None and (login := self._login_of_targets(registry)) is not None:
            self._logins_of_targets[registry] = login
        self._effective_logins[registry] = login
        return login

    def _login_of_targets(self, registry: Registry) -> Login | None:
        targets = (self._redirects.get(registry) or {}).items()
        logins = (self._logins.effective_login(target, _bearer_host(bearer)) for target, bearer in targets)
        return next((login for login in logins if login is not None), None)

    # authorization

    async def get_authorization(
        self,
        registry: Registry,
        challenges: Sequence[Challenge],
        scope: str | None,
        credential: Credential,
        rejected_authorization: Authorization | None = None,
    ) -> Authorization | None:
        """Return an authorization for one of `challenges`, or None if none of them can be answered.

        A token is fetched for `scope`, and an anonymous one for the scopes of the challenge as well.
        `rejected_authorization` is one that the registry refused; it is returned again if no other can be obtained.
        Raise `Unauthorized` if the realm refuses the token, `TooManyRequests`, `UpstreamBroken`, and the errors of
        `Agent.request`.
        """
        if isinstance(credential, ClientCredential):
            return Authorization(credential.authorization)
        if self._logins_of_targets.get(registry) == credential:
            credential = Anonymous()
        bearer = _bearer_challenge(challenges)
        if bearer is not None:
            return await self._get_token(self._token_key(registry, bearer, scope, credential), rejected_authorization)
        login = self._logins.login_for(credential, registry.host, registry)
        if isinstance(login, BasicCredentials) and _accepts_basic(challenges):
            return Authorization(login.authorization)
        return None

    async def refusal(self, registry: Registry, login: Login) -> str | None:
        """Ask `registry`, or its token server, about `login` itself and no repository.

        Return which server refuses it and how, as a clause; None if none does. Raise the errors of `Agent.request`, and
        `UpstreamBroken` or `TooManyRequests` if the server did not say. An identity token cannot be used at a registry
        without a token server, which is a refusal too.
        """
        front, (registry, challenges) = registry, self._owner_of_login(registry, login)
        bearer = _bearer_challenge(challenges)
        if bearer is not None:
            key = self._token_key(registry, bearer, None, login, None if front == registry else front)
            try:
                if key.login is not None:
                    await self._fetches.do(key, lambda: self._fetch_token(key))
            except Unauthorized as error:
                return error.message
        elif _accepts_basic(challenges):
            if isinstance(login, IdentityToken):
                return f"{registry} has no token server for an identity token"
            headers = Headers([("Authorization", login.authorization)])
            response = await self._agent.request("GET", f"{registry.origin}/v2/", headers)
            content = await response.read_all(MAX_TOKEN_RESPONSE)
            if response.status in (401, 403):
                if not is_own_refusal(response.status, response.headers, content):
                    raise UpstreamBroken(f"{registry}: something before it answered {response.status}")
                return f"{registry} answered {response.status}"
        return None

    def _owner_of_login(self, registry: Registry, login: Login) -> tuple[Registry, Sequence[Challenge]]:
        """Return the registry that `login` is for, which may be a target of `registry`, and its challenges."""
        if self._logins_of_targets.get(registry) == login:
            for target, bearer in (self._redirects.get(registry) or {}).items():
                if self._logins.effective_login(target, _bearer_host(bearer)) == login:
                    return target, (bearer,)
        return registry, self.challenges_for(registry)

    def _token_key(
        self,
        registry: Registry,
        bearer: Challenge,
        scope: str | None,
        credential: Credential,
        front: Registry | None = None,
    ) -> TokenKey:
        realm = bearer.parameters["realm"]
        origin, path = split_url(realm)
        login = self._logins.login_for(credential, origin.host, registry)
        scopes = dict.fromkeys([scope] if scope else [])
        if login is None:
            # Add the registry's scope, because it may include more than ours, such as the source repository of a mount.
            scopes |= dict.fromkeys(bearer.parameters.get("scope", "").split())
        else:
            realm = _realm_for_login(registry, origin, path)
        valid_scopes = tuple(candidate for candidate in scopes if _SCOPE_PATTERN.fullmatch(candidate))[:_MAX_SCOPES]
        return TokenKey(registry, realm, bearer.parameters.get("service"), valid_scopes, login, front)

    async def _get_token(self, key: TokenKey, rejected_authorization: Authorization | None) -> Authorization:
        if (
            rejected_authorization is not None
            and rejected_authorization.token_key == key
            and not rejected_authorization.from_cache
        ):
            return rejected_authorization
        cached = self._tokens.get(key)
        stale = (
            cached is not None
            and rejected_authorization is not None
            and cached.authorization.value == rejected_authorization.value
        )
        if cached is not None and not stale and self._clock() < cached.renew_at:
            self._tokens.move_to_end(key)
            return evolve(cached.authorization, from_cache=True)
        self._tokens.pop(key, None)
        return await self._fetches.do(key, lambda: self._fetch_token(key))

    async def _fetch_token(self, key: TokenKey) -> Authorization:
        trusted = (key.front or key.registry).host  # the administrator chose it

        def address_check_for(host: Host) -> AddressCheck | None:
            return None if host == trusted else self._address_check

        response, _ = await follow(self._agent, *_token_request(key), address_check_for)
        if response.status != 200:
            raise await _refusal_error(key, response)
        content = await response.read_all(MAX_TOKEN_RESPONSE)
        try:
            issued = TokenResponse.parse(content, self._clock())
        except ValueError:
            message = f"{key.host}: its response contains no token for {key.registry}"
            if is_page(response.headers):
                raise CaptivePortalSuspected(f"{message}; it is a web page, perhaps of a captive portal") from None
            raise UpstreamBroken(message) from None
        authorization = Authorization(f"Bearer {issued.tokens[0]}", key)
        self._store(key, authorization, issued.lifetime)
        return authorization

    def _store(self, key: TokenKey, authorization: Authorization, lifetime: float) -> None:
        margin = min(max(lifetime / 10, 10.0), lifetime / 2)
        self._tokens[key] = _CachedToken(authorization, self._clock() + lifetime - margin)
        if len(self._tokens) > _MAX_TOKENS:
            self._tokens.popitem(last=False)

    def _realm_host(self, registry: Registry) -> Host | None:
        for challenge in self.challenges_for(registry):
            try:
                return split_url(challenge.parameters["realm"])[0].host if challenge.scheme == "bearer" else None
            except (KeyError, RegistryError):
                continue
        return _DEFAULT_REALMS.get(registry.host)


# For the time before the first request, when no challenge is known yet.
_DEFAULT_REALMS = {DOCKER_HUB.host: DOCKER_HUB_TOKENS.host}


def _realm_for_login(registry: Registry, realm: Registry, path: str) -> str:
    """Return the URL of a realm to which a login of ours may go. Refuse one that asks for scopes of its own.

    A realm without TLS of a registry with TLS is taken at its host with TLS, or refused if its port is not the usual.
    """
    if realm.scheme == "http" and registry.scheme == "https":
        with_tls = with_tls_at_usual_port(realm)
        if with_tls is None:
            raise UpstreamBroken(f"{registry}: its token server {realm.host.authority} uses plain HTTP; refused")
        realm = with_tls
    try:
        has_scope = any(name == "scope" for name, _ in parse_query(path.partition("?")[2]))
    except BadRequest:
        has_scope = True
    if has_scope:
        raise UpstreamBroken(f"{registry}: the URL of its token server {realm.host.authority} has a scope; refused")
    return realm.origin + path


def _bearer_host(bearer: Challenge) -> Host | None:
    """Return the host of the realm that `bearer` names; None if it names no URL."""
    try:
        return split_url(bearer.parameters["realm"])[0].host
    except RegistryError:
        return None


def _bearer_challenge(challenges: Sequence[Challenge]) -> Challenge | None:
    return next((one for one in challenges if one.scheme == "bearer" and "realm" in one.parameters), None)


def _accepts_basic(challenges: Sequence[Challenge]) -> bool:
    return any(challenge.scheme == "basic" for challenge in challenges)


def _token_request(key: TokenKey) -> tuple[str, str, Headers, BytesBody | None]:
    """Return the method, URL, fields and body of the request for a token.

    It is a GET with Basic, or for an identity token the POST of distribution's "OAuth2 Token Authentication"
    (docs/spec/auth/oauth.md).
    """
    parameters = [] if key.service is None else [("service", key.service)]
    url = key.realm.partition("#")[0]
    fields = [("Accept", "application/json")]
    if isinstance(key.login, IdentityToken):
        parameters += [("scope", " ".join(key.scopes))] if key.scopes else []
        parameters += [("client_id", _CLIENT_ID), ("grant_type", "refresh_token"), ("refresh_token", key.login.token)]
        fields.append(("Content-Type", "application/x-www-form-urlencoded"))
        return "POST", url, Headers(fields), BytesBody(urlencode(parameters).encode())
    parameters += [("scope", scope) for scope in key.scopes]
    query = urlencode(parameters, quote_via=quote)
    if query:
        url += ("&" if "?" in url else "?") + query
    if key.login is not None:
        fields.append(("Authorization", key.login.authorization))
    return "GET", url, Headers(fields), None


def _without_scope(challenge: Challenge) -> Challenge:
    return evolve(challenge, parameters={key: value for key, value in challenge.parameters.items() if key != "scope"})


async def _refusal_error(key: TokenKey, response: Response) -> RegistryError:
    """Return the error for a response that is not a success. Read its body."""
    host, status = key.host, response.status
    try:
        content = await response.read_all(MAX_TOKEN_RESPONSE)
    except UpstreamError:
        content = b""  # too long or incomplete; the status is the token server's word all the same
    if 400 <= status < 500 and status != 429 and not is_own_refusal(status, response.headers, content):
        return IntermediaryRefused.in_our_words(
            status,
            f"{host}: no token for {key.registry}, because a firewall, a CDN or a captive portal answered in its place"
            f" (status {status})",
        )
    if status in (401, 403) or (status == 400 and _is_oauth_refusal(content)):
        login_phrase = "anonymously" if key.login is None else "with its configured login"
        return Unauthorized(f"{host} refuses a token for {key.registry} {login_phrase} (status {status})")
    if status == 429:
        retry_after = response.headers.get("retry-after")
        headers = [] if retry_after is None else [("Retry-After", retry_after)]
        return TooManyRequests(f"{host} limits the rate of tokens for {key.registry}", headers=headers)
    return UpstreamBroken(f"{host} returned no token for {key.registry} (status {status})")


def _is_oauth_refusal(content: bytes) -> bool:
    """Return whether a token server answered 400 because it does not accept the login (RFC 6749, section 5.2)."""
    try:
        document = parse_json(content)
    except JSONInvalid:
        return False
    error = document.get("error") if isinstance(document, dict) else None
    return isinstance(error, str) and error in _OAUTH_REFUSALS
