"""The token endpoint for clients.

Requests with a credential are forwarded to the realm. Clients without one get a local token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import parse_qsl

from attrs import field, frozen
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IConsumer
from twisted.web.iweb import IBodyProducer
from zope.interface import implementer

from dockerproxy.cache.access import STALE_GRANT_TTL
from dockerproxy.cache.best_effort import try_put, try_remove
from dockerproxy.cache.challenges import Realm
from dockerproxy.cache.identity import PUBLIC, TOKEN_LIFETIME, Identities
from dockerproxy.cache.upstream import UpstreamAgent, error_from_response, is_denial
from dockerproxy.errors import BadRequest, RegistryError, UpstreamBroken, is_outage
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Host, Registry
from dockerproxy.oci.untrusted_json import JSONInvalid, parse_json
from dockerproxy.store.records import Records

_MAX_RESPONSE = 64 * 1024  # short enough to be parsed in the reactor's thread
_SAVE_INTERVAL = 300.0
_MAX_FORM_FIELDS = 50


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
        try:
            fields = dict(parse_qsl((self.form or b"").decode("utf-8", "replace"), max_num_fields=_MAX_FORM_FIELDS))
            if "username" in fields and "password" in fields:
                return BasicCredentials(fields["username"], fields["password"]).authorization
        except ValueError:
            raise BadRequest(f"the form has more than {_MAX_FORM_FIELDS} fields, or an invalid username") from None
        refresh_token = fields.get("refresh_token")
        return f"Refresh {refresh_token}" if refresh_token else None


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

    async def token(self, registry: Registry, realm: Realm, request: TokenRequest) -> bytes:
        """Return the JSON response of `realm`, or a local token. Raise the error that the realm responded with."""
        authorization = request.client_authorization()
        if authorization is None:
            return self._issue(registry, PUBLIC)
        identity = self._identities.for_authorization(authorization)
        try:
            content = await self._request_token(realm, request)
            tokens = _parse_tokens(realm, content)
        except RegistryError as error:
            if is_outage(error) and self._authenticated_recently(registry, identity):
                return self._issue(registry, identity)
            if is_denial(error):
                try_remove(self._records, "client", str(registry), identity)
            raise
        self._record_tokens(registry, identity, authorization, tokens)
        return content

    async def _request_token(self, realm: Realm, request: TokenRequest) -> bytes:
        fields = [("authorization", request.authorization)] if request.authorization is not None else []
        body = None
        if request.form is not None:
            fields.append(("content-type", "application/x-www-form-urlencoded"))
            body = _FormBody(request.form)
        response = await self._agent.request(
            "GET" if body is None else "POST",
            realm.server.origin + realm.path + (f"?{request.query}" if request.query else ""),
            Headers(fields),
            body,
            address_check=self._address_check_for(realm.server.host),
        )
        if response.status != 200:
            raise await error_from_response(realm.server, response)
        return await response.read_all(_MAX_RESPONSE)

    def _record_tokens(self, registry: Registry, identity: str, authorization: str, tokens: list[str]) -> None:
        for token in tokens:
            self._identities.bind(token, authorization)
        now = self._clock()
        if now - self._last_authenticated(registry, identity) > _SAVE_INTERVAL:
            try_put(self._records, {"at": now}, "client", str(registry), identity)

    def _authenticated_recently(self, registry: Registry, identity: str) -> bool:
        return 0 <= self._clock() - self._last_authenticated(registry, identity) < STALE_GRANT_TTL

    def _last_authenticated(self, registry: Registry, identity: str) -> float:
        at = (self._records.get("client", str(registry), identity) or {}).get("at")
        return float(at) if isinstance(at, int | float) else 0.0

    def _issue(self, registry: Registry, identity: str) -> bytes:
        now = self._clock()
        token = self._identities.issue_token(registry, identity, now)
        issued = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return json.dumps(
            {"token": token, "access_token": token, "expires_in": TOKEN_LIFETIME, "issued_at": issued}
        ).encode()


def _parse_tokens(realm: Realm, content: bytes) -> list[str]:
    """Return the tokens in a realm's response, under both of their names. Raise `UpstreamBroken` if there is none."""
    try:
        document = parse_json(content)
    except JSONInvalid:
        document = None
    candidates = [document.get(name) for name in ("token", "access_token")] if isinstance(document, dict) else []
    tokens = [token for token in candidates if isinstance(token, str) and token]
    if not tokens:
        raise UpstreamBroken(f"{realm.server} returned a response without a token")
    return tokens


@implementer(IBodyProducer)
class _FormBody:
    """A request body that is in memory."""

    def __init__(self, form: bytes) -> None:
        self.length = len(form)
        self._form = form

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        consumer.write(self._form)
        return succeed(None)

    def pauseProducing(self) -> None: ...

    def resumeProducing(self) -> None: ...

    def stopProducing(self) -> None: ...
