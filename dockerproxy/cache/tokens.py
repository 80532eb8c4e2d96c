"""The token dance as our clients dance it: with us, who ask the realm only for those who have something to show."""

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

from dockerproxy.cache.challenges import Realm
from dockerproxy.cache.identity import LIFETIME, PUBLIC, Identities
from dockerproxy.cache.notes import forget, remember
from dockerproxy.cache.origin import Exchange, is_refusal, refuse
from dockerproxy.errors import BadRequest, RegistryError, UpstreamBroken, is_outage
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import Permit
from dockerproxy.oci.challenge import basic
from dockerproxy.oci.names import Host, Registry
from dockerproxy.store.records import Records

_MAX_ANSWER = 256 * 1024
_OUTAGE = 86400.0  # seconds for which a client that proved itself is believed while the realm cannot be asked
_SAVE_EVERY = 300.0
_MAX_FIELDS = 50


@frozen
class TokenRequest:
    """What a client asks a realm: `form` is the body of a POST (OAuth 2), None for GET."""

    query: str
    authorization: str | None = field(repr=False)
    form: bytes | None = field(default=None, repr=False)

    def shown(self) -> str | None:
        """Return what the client shows, as an Authorization that stands for it; None where it shows nothing.

        Raise `BadRequest`.
        """
        if self.authorization is not None:
            return self.authorization
        try:
            fields = dict(parse_qsl((self.form or b"").decode("utf-8", "replace"), max_num_fields=_MAX_FIELDS))
            if "username" in fields and "password" in fields:
                return basic(fields["username"], fields["password"])
        except ValueError:
            raise BadRequest("the form has too many fields, or a user's name that none can be") from None
        refresh = fields.get("refresh_token")
        return f"Refresh {refresh}" if refresh else None


class TokenDesk:
    """Answers for the realms of intercepted registries; `clock` is POSIX time.

    `permits` gives what a connection to a realm's host has to be asked by: upstream chooses the realm, so it must not
    lead us into our own network.
    """

    def __init__(
        self,
        transport: Exchange,
        identities: Identities,
        records: Records,
        permits: Callable[[Host], Permit | None],
        clock: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._identities = identities
        self._records = records
        self._permits = permits
        self._clock = clock

    async def token(self, registry: Registry, realm: Realm, request: TokenRequest) -> bytes:
        """Return the JSON that `realm` answers for `registry`, or ours. Raise what the realm refuses with."""
        shown = request.shown()
        if shown is None:
            return self._ours(registry, PUBLIC)
        identity = self._identities.of_authorization(shown)
        try:
            content = await self._ask(realm, request)
            tokens = _tokens_in(realm, content)
        except RegistryError as error:
            if is_outage(error) and self._was_known(registry, identity):
                return self._ours(registry, identity)
            if is_refusal(error):
                forget(self._records, "client", str(registry), identity)
            raise
        self._note(registry, identity, shown, tokens)
        return content

    async def _ask(self, realm: Realm, request: TokenRequest) -> bytes:
        fields = [("authorization", request.authorization)] if request.authorization is not None else []
        body = None
        if request.form is not None:
            fields.append(("content-type", "application/x-www-form-urlencoded"))
            body = _FormBody(request.form)
        answer = await self._transport.request(
            "GET" if body is None else "POST",
            realm.server.origin + realm.path + (f"?{request.query}" if request.query else ""),
            Headers(fields),
            body,
            permit=self._permits(realm.server.host),
        )
        if answer.status != 200:
            raise await refuse(realm.server, answer)
        return await answer.read_all(_MAX_ANSWER)

    def _note(self, registry: Registry, identity: str, shown: str, tokens: list[str]) -> None:
        for token in tokens:
            self._identities.bind(token, shown)
        now = self._clock()
        if now - self._last_known(registry, identity) > _SAVE_EVERY:
            remember(self._records, {"at": now}, "client", str(registry), identity)

    def _was_known(self, registry: Registry, identity: str) -> bool:
        return 0 <= self._clock() - self._last_known(registry, identity) < _OUTAGE

    def _last_known(self, registry: Registry, identity: str) -> float:
        at = (self._records.get("client", str(registry), identity) or {}).get("at")
        return float(at) if isinstance(at, int | float) else 0.0

    def _ours(self, registry: Registry, identity: str) -> bytes:
        now = self._clock()
        token = self._identities.issue(registry, identity, now)
        issued = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return json.dumps({"token": token, "access_token": token, "expires_in": LIFETIME, "issued_at": issued}).encode()


def _tokens_in(realm: Realm, content: bytes) -> list[str]:
    """Return the token that a realm gave, under either of its names; raise `UpstreamBroken` where there is none."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    given = [answer.get(name) for name in ("token", "access_token")] if isinstance(answer, dict) else []
    tokens = [token for token in given if isinstance(token, str) and token]
    if not tokens:
        raise UpstreamBroken(f"{realm.server}: what it answers holds no token")
    return tokens


@implementer(IBodyProducer)
class _FormBody:
    """A small body that is here whole."""

    def __init__(self, form: bytes) -> None:
        self.length = len(form)
        self._form = form

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        consumer.write(self._form)
        return succeed(None)

    def pauseProducing(self) -> None: ...

    def resumeProducing(self) -> None: ...

    def stopProducing(self) -> None: ...
