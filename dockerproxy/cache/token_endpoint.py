"""The token endpoint for clients.

Requests with a credential are forwarded to the realm. Clients without one get the realm's token for such clients, which
is good without this proxy too, because another program may use it. If the realm cannot be asked, both may get a local
token. A realm may also issue tokens for other services than registries, such as notary.docker.io. Requests
for those are forwarded.

A realm on an intercepted host of another owner may be any page there, so that this proxy answers no request to it. It
forwards them as they are, and learns from the responses which logins are right (`ObservedResponse`). In an
outage those get local tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from itertools import groupby
from urllib.parse import parse_qsl, urlencode

from attrs import evolve, field, frozen

from dockerproxy.cache.access import STALE_GRANT_TTL
from dockerproxy.cache.anonymous_tokens import AnonymousTokens
from dockerproxy.cache.best_effort import try_put, try_remove
from dockerproxy.cache.challenges import Realm
from dockerproxy.cache.identity import PUBLIC, TOKEN_LIFETIME, Identities
from dockerproxy.cache.upstream import (
    UpstreamAgent,
    UpstreamResponse,
    WrappedResponse,
    error_from_response,
    is_denial,
    may_be_guard,
)
from dockerproxy.errors import (
    BadRequest,
    CaptivePortalSuspected,
    IntermediaryRefused,
    RegistryError,
    UpstreamBroken,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
    is_outage,
)
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Host, Registry, Repository
from dockerproxy.oci.routes import parse_query
from dockerproxy.oci.tokens import MAX_TOKEN_RESPONSE, TokenResponse, readable_repositories
from dockerproxy.store.records import Records
from dockerproxy.upstream.bytes_body import BytesBody
from dockerproxy.upstream.redirects import follow
from dockerproxy.upstream.refusals import is_own_refusal
from dockerproxy.upstream.urls import with_tls_at_usual_port

_SAVE_INTERVAL = 300.0
_MAX_FORM_FIELDS = 50
_MAX_ATTEMPTS = 8  # to read a response that has not ended yet

# Fields with which a client can log in (RFC 6749 and RFC 7521). Some servers ignore case.
_LOGIN_FIELDS = frozenset({
    "username", "password", "refresh_token", "access_token", "code", "assertion", "client_assertion", "client_secret",
})  # fmt: skip

# Parameters that have no influence on the token of a client without a login.
_CLIENT_PARAMETERS = frozenset({"account", "client_id", "offline_token"})


@frozen
class TokenRequest:
    """A client's request to a realm. `form` is the body of a POST (OAuth 2); None for GET."""

    query: str
    authorization: str | None = field(repr=False)
    form: bytes | None = field(default=None, repr=False)

    def client_authorization(self) -> str | None:
        """Return the client's credential in the form of an Authorization field; None if there is no credential.

        Raise `BadRequest`.
        """
        if self.authorization is not None:
            return self.authorization
        fields = dict(self._form_fields())
        try:
            if "username" in fields and "password" in fields:
                return BasicCredentials(fields["username"], fields["password"]).authorization
        except ValueError:
            raise BadRequest("the form has an invalid username") from None
        refresh_token = fields.get("refresh_token")
        return f"Refresh {refresh_token}" if refresh_token else None

    def has_one_credential(self) -> bool:
        """Return whether each token server takes `client_authorization()` from the request, and no other credential.

        Otherwise a client could log in by one credential and have the token bound to another one, which it guesses.
        Raise `BadRequest`.
        """
        names = self._login_fields()
        return names == [] if self.authorization is not None else names in (["password", "username"], ["refresh_token"])

    def has_no_credential(self) -> bool:
        """Return whether no token server takes a credential from the request. Raise `BadRequest`."""
        return self.authorization is None and self._login_fields() == []

    def anonymous_key(self) -> str:
        """Return a text for all that makes a difference for a client without a credential. Raise `BadRequest`.

        That includes the order of values with one name, and whether they are in a form: servers read them in various
        ways, and no client may choose the token that others get.
        """
        given = (pair for pair in parse_query(self.query) if pair[0] not in _CLIENT_PARAMETERS)
        pairs = [pair for pair, _ in groupby(sorted(given, key=lambda pair: pair[0]))]
        return urlencode(pairs) if self.form is None else f"{urlencode(pairs)}\n{sha256(self.form).hexdigest()}"

    def _login_fields(self) -> list[str] | None:
        """Return the names of the form's fields with credentials; None if there may be a credential elsewhere."""
        form = (self.form or b"").decode("utf-8", "replace")
        if ";" in self.query + form:  # which separates fields for some servers
            return None
        if any(name.lower() in _LOGIN_FIELDS for name, _ in parse_query(self.query)):
            return None
        return sorted(name.lower() for name, _ in self._form_fields() if name.lower() in _LOGIN_FIELDS)

    def scopes(self) -> list[str]:
        """Return the scopes for which the client requests a token. Raise `BadRequest`."""
        return self._values("scope")

    def services(self) -> set[str]:
        """Return the services for which the client requests a token: one at most, by the book. Raise `BadRequest`."""
        return {*self._values("service")} - {""}

    def _values(self, field_name: str) -> list[str]:
        pairs = parse_query(self.query) if self.form is None else self._form_fields()
        return [value for name, value in pairs if name == field_name]

    def _form_fields(self) -> list[tuple[str, str]]:
        """Return the fields of the form. Raise `BadRequest` if there are too many."""
        try:
            return parse_qsl((self.form or b"").decode("utf-8", "replace"), max_num_fields=_MAX_FORM_FIELDS)
        except ValueError:
            raise BadRequest(f"the form has more than {_MAX_FORM_FIELDS} fields") from None


class TokenEndpoint:
    """Token endpoint for the realms of intercepted registries. `clock` returns POSIX time.

    `address_check_for` returns the check for connections to a realm's host. Upstream chooses the realm, so it could
    otherwise direct requests into the local network.
    """

    def __init__(
        self,
        agent: UpstreamAgent,
        identities: Identities,
        records: Records,
        address_check_for: Callable[[Host], AddressCheck | None],
        clock: Callable[[], float],
    ) -> None:
        self._agent = agent
        self._identities = identities
        self._records = records
        self._address_check_for = address_check_for
        self._clock = clock
        self._anonymous_tokens = AnonymousTokens(clock)

    async def token(
        self, registry: Registry, realm: Realm, request: TokenRequest, *, serves_all: bool = False
    ) -> bytes:
        """Return the JSON response of `realm`, the realm of `registry`, or a local token.

        `serves_all` says that a login of ours serves all clients of `registry`, which need no token of the realm. Raise
        the error that the realm responded with.
        """
        authorization = request.client_authorization()
        if authorization is None:
            return await self._anonymous_token(realm, request, serves_all)
        if not request.has_one_credential():
            return (await self._log_in(registry, realm, request))[0]
        identity = self._identities.for_authorization(str(realm), authorization)
        try:
            content, with_login = await self._log_in(registry, realm, request)
            if not with_login:
                return content  # a token of a client without a login: nobody checked this one
            issued = _parse_response(realm, content, self._clock())
        except RegistryError as error:
            return self._issue_after(error, realm, identity, request)
        self._learn(realm, identity, authorization, request, issued)
        return content

    def observe(self, realm: Realm, request: TokenRequest, response: UpstreamResponse, content: bytes) -> bool:
        """Learn from the response of `realm`, with the body `content`, to a request that was forwarded as it is.

        Return False if it is neither a token nor a refusal. `request` has to have one credential, and nothing else that
        a server could take for one.
        """
        authorization = request.client_authorization()
        if authorization is None:
            return False
        identity = self._identities.for_authorization(str(realm), authorization)
        if response.status in (401, 403):
            is_own = is_own_refusal(response.status, response.headers, content)
            refusal = (UpstreamRefused if is_own else IntermediaryRefused)(response.status, content, ())
            self._learn_failure(refusal, realm, identity)
            return True
        try:
            issued = _parse_response(realm, content, self._clock())
        except RegistryError:
            return False
        self._learn(realm, identity, authorization, request, issued)
        return True

    def token_after(self, error: RegistryError, realm: Realm, request: TokenRequest) -> bytes:
        """Return a local token for a login whose request to `realm` failed with `error`, or raise that.

        `request` is as for `observe`.
        """
        authorization = request.client_authorization()
        if authorization is None:
            raise error
        return self._issue_after(error, realm, self._identities.for_authorization(str(realm), authorization), request)

    def token_without_realm(self, error: RegistryError, request: TokenRequest) -> bytes:
        """Return a local token for a client without a login whose registry has left the realm, which answered `error`.

        Raise `error` for a client with a login: the next challenge leads it to the new realm.
        """
        if not request.has_no_credential():
            raise error
        return self._issue(PUBLIC, frozenset())

    def _learn(
        self, realm: Realm, identity: str, authorization: str, request: TokenRequest, issued: TokenResponse
    ) -> None:
        """Remember that the realm has accepted the login, and whose the tokens are."""
        self._bind(realm, authorization, request.scopes(), issued)
        now, (authenticated_at, guarded) = self._clock(), self._last_authenticated(realm, identity)
        if guarded or now - authenticated_at > _SAVE_INTERVAL:
            try_put(self._records, {"at": now}, "client", str(realm.server), identity)

    def _learn_failure(self, error: RegistryError, realm: Realm, identity: str) -> None:
        """Forget the login if the realm has refused it. Remember it if a guard may have."""
        authenticated_at, guarded = self._last_authenticated(realm, identity)
        if is_outage(error) and 0 <= self._clock() - authenticated_at < STALE_GRANT_TTL:
            if may_be_guard(error) and not guarded:
                try_put(self._records, {"at": authenticated_at, "guarded": True}, "client", str(realm.server), identity)
        elif is_denial(error, identity):
            try_remove(self._records, "client", str(realm.server), identity)

    def _issue_after(self, error: RegistryError, realm: Realm, identity: str, request: TokenRequest) -> bytes:
        """Return a local token in place of the realm's, if the client logged in a while ago. Raise `error` otherwise.

        Once a guard may have refused the login, the token only says "no login" until the realm accepts it again.
        """
        self._learn_failure(error, realm, identity)
        authenticated_at, guarded = self._last_authenticated(realm, identity)
        if is_outage(error) and 0 <= self._clock() - authenticated_at < STALE_GRANT_TTL:
            if guarded or may_be_guard(error):
                return self._issue(PUBLIC, frozenset())
            return self._issue(identity, readable_repositories(request.scopes()))
        raise error

    async def _anonymous_token(self, realm: Realm, request: TokenRequest, serves_all: bool) -> bytes:
        """Return the realm's token for clients without a credential, or a local token if there is none."""
        is_anonymous, key = request.has_no_credential(), f"{realm}\n{request.anonymous_key()}"

        async def ask() -> TokenResponse:
            content, _ = await self._request_token(realm, request)
            issued = _parse_response(realm, content, self._clock())
            for token in issued.tokens:
                self._identities.bind_public(token, str(realm), self._clock() + issued.lifetime)
            return issued

        try:
            if not is_anonymous:  # it may be a login, which only the realm knows how to read
                return (await self._request_token(realm, request))[0]
            issued = await self._anonymous_tokens.get(key, ask)
        except RegistryError as error:
            if is_outage(error) or serves_all:
                return self._issue(PUBLIC, frozenset())
            raise
        return _render_response(issued.tokens[0], issued.tokens[-1], issued.lifetime, self._clock())

    async def forward(self, registry: Registry, realm: Realm, request: TokenRequest) -> bytes:
        """Return the response of `realm` to a request for a service that is no registry of ours, or raise its error."""
        if request.client_authorization() is not None:
            return (await self._log_in(registry, realm, request))[0]
        return (await self._request_token(realm, request))[0]

    async def _log_in(self, registry: Registry, realm: Realm, request: TokenRequest) -> tuple[bytes, bool]:
        """Return the same as `_request_token`. Raise `UpstreamBroken` if the login would leave TLS.

        The client logs in to `registry`, which chose the realm. If that is without TLS, its host is tried with TLS.
        """
        if realm.server.scheme == "https" or registry.scheme == "http":
            return await self._request_token(realm, request)
        message = (
            f"{registry}: your login was not sent to its token server {realm.server.host.authority}, because that uses"
            " plain HTTP; pull without a login, or ask the registry's administrator for a token server with TLS"
        )
        server = with_tls_at_usual_port(realm.server)
        if server is None:
            raise UpstreamBroken(message)
        try:
            return await self._request_token(evolve(realm, server=server), request)
        except (UpstreamUnreachable, UpstreamTimeout):
            raise UpstreamBroken(message) from None

    async def _request_token(self, realm: Realm, request: TokenRequest) -> tuple[bytes, bool]:
        """Return the body of the realm's response, and whether the server that sent it was shown the login.

        Raise the error of a response that is no success.
        """
        fields = [("authorization", request.authorization)] if request.authorization is not None else []
        body = None
        if request.form is not None:
            fields.append(("content-type", "application/x-www-form-urlencoded"))
            body = BytesBody(request.form)
        method, url = "GET" if body is None else "POST", realm.url(request.query)
        response, followed = await follow(self._agent, method, url, Headers(fields), body, self._address_check_for)
        if response.status != 200:
            raise await error_from_response(followed.server, response)
        return await response.read_all(MAX_TOKEN_RESPONSE), followed.with_login

    def _bind(self, realm: Realm, authorization: str, scopes: list[str], issued: TokenResponse) -> None:
        """Bind the issued tokens to their client and to the repositories that it asked for and that were granted."""
        repositories = readable_repositories(scopes)
        if issued.scope is not None:
            repositories &= readable_repositories([issued.scope])
        for token in issued.tokens:
            expires_at = self._clock() + issued.lifetime
            self._identities.bind(token, str(realm), authorization, repositories, expires_at)

    def _last_authenticated(self, realm: Realm, identity: str) -> tuple[float, bool]:
        """Return when the realm accepted the login last, and whether a guard may have refused it since."""
        record = self._records.get("client", str(realm.server), identity) or {}
        at = record.get("at")
        return float(at) if isinstance(at, int | float) else 0.0, bool(record.get("guarded"))

    def _issue(self, identity: str, repositories: frozenset[Repository]) -> bytes:
        token = self._identities.issue_token(identity, repositories)
        return _render_response(token, token, TOKEN_LIFETIME, self._clock())


class ObservedResponse(WrappedResponse):
    """A response to a token request that passes as it is. `observe` is called with the body before its end has passed.

    It returns False if the body is not complete yet.
    """

    def __init__(self, response: UpstreamResponse, observe: Callable[[bytes], bool]) -> None:
        self.status, self.headers, self.length = response.status, response.headers, response.length
        self._response = response
        self._observe: Callable[[bytes], bool] | None = observe
        self._content = b""
        self._attempts = 0

    async def read_chunk(self) -> bytes:
        """Return the next piece of the content; ``b""`` at the end. Raise `UpstreamError`."""
        piece = await self._response.read_chunk()
        if self._observe is not None:
            self._content += piece
            if len(self._content) > MAX_TOKEN_RESPONSE:
                self._observe, self._content = None, b""
            elif not piece or self._content.rstrip().endswith(b"}"):  # the client may use the token at once
                self._attempts += 1
                if self._observe(self._content) or self._attempts == _MAX_ATTEMPTS:
                    self._observe, self._content = None, b""
        return piece


def _render_response(token: str, access_token: str, lifetime: float, now: float) -> bytes:
    issued_at = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    document = {"token": token, "access_token": access_token, "expires_in": int(lifetime), "issued_at": issued_at}
    return json.dumps(document).encode()


def _parse_response(realm: Realm, content: bytes, now: float) -> TokenResponse:
    """Return the realm's response. Raise `UpstreamBroken` if it has no usable token."""
    try:
        return TokenResponse.parse(content, now)
    except ValueError:
        if content.lstrip().startswith(b"<"):
            raise CaptivePortalSuspected(f"{realm.server} returned a web page instead of a token") from None
        raise UpstreamBroken(f"{realm.server} returned a response without a token") from None
