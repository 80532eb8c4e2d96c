"""Tokens: asked for where a registry says so, shared by all who need the same, renewed before they end.

The specification is distribution's "Token Authentication Specification" (docs/spec/auth/token.md).
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from attrs import evolve, field, frozen

from dockerproxy.concurrency import SingleFlight
from dockerproxy.errors import RegistryError, TooManyRequests, Unauthorized, UpstreamBroken
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import Permit
from dockerproxy.oci.challenge import Challenge
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.credentials import Configured, Credential, Login, Logins, Own
from dockerproxy.upstream.transport import Response, Transport
from dockerproxy.upstream.urls import split_url

_MAX_TOKENS = 1024
_MAX_REGISTRIES = 256
_MAX_ANSWER = 256 * 1024
_MAX_SCOPES = 8
_TOKEN = re.compile(r"[!-~]{1,16384}")  # must fit a header field; Amazon's and Google's have 2 to 5 KiB
_SCOPE = re.compile(r"[!-~]{1,1024}")
_DEFAULT_LIFE = 60.0
_LONGEST_LIFE = 86400.0


@frozen
class Asked:
    """What a token was asked for: `login` None for one that anybody gets."""

    registry: Registry
    realm: str
    service: str | None
    scopes: tuple[str, ...]
    login: Configured | None

    @property
    def host(self) -> Host:
        """The host of the realm."""
        return split_url(self.realm)[0].host


@frozen
class Grant:
    """What to send as Authorization; `asked` None where that is no token; `reused` if it was kept from before."""

    authorization: str = field(repr=False)
    asked: Asked | None = None
    reused: bool = False


@frozen
class _Token:
    grant: Grant
    renew: float  # the time from which on another one is asked for


class Tokens:
    """Authorization for requests to registries.

    `permit` is asked for the addresses of realms that are not on the registry's own host; `clock` gives Unix time.
    """

    def __init__(
        self,
        transport: Transport,
        clock: Callable[[], float],
        permit: Permit | None,
        logins: Mapping[Host, Login],
    ) -> None:
        self._transport = transport
        self._clock = clock
        self._permit = permit
        self._logins = Logins(logins)
        self._kept: OrderedDict[Asked, _Token] = OrderedDict()  # the least recently used first
        self._challenges: OrderedDict[Registry, tuple[Challenge, ...]] = OrderedDict()
        self._asking: SingleFlight[Asked, Grant] = SingleFlight()

    def use(self, logins: Mapping[Host, Login]) -> None:
        """Show these logins from now on, and no other of ours."""
        self._logins = Logins(logins)

    # what registries ask for

    def remember(self, registry: Registry, challenges: Sequence[Challenge]) -> None:
        """Keep what `registry` asks for, so that the next request need not be refused first."""
        # The scope belongs to the request that was refused, and to no other.
        usable = tuple(_without_scope(challenge) for challenge in challenges if challenge.scheme in ("bearer", "basic"))
        if usable:
            self._challenges[registry] = usable
            self._challenges.move_to_end(registry)
            if len(self._challenges) > _MAX_REGISTRIES:
                self._challenges.popitem(last=False)

    def challenges_for(self, registry: Registry) -> tuple[Challenge, ...]:
        """Return what `registry` asked for last, none if that is not known."""
        return self._challenges.get(registry, ())

    def forget(self, registry: Registry) -> None:
        """Forget what `registry` asked for: it led nowhere."""
        self._challenges.pop(registry, None)

    def effective_login(self, registry: Registry) -> Configured | None:
        """Return the login of AUTH_REGISTRIES that is good for `registry`: its own, or that of its realm's host."""
        return self._logins.effective(registry, self._realm_host(registry))

    # what is sent

    async def authorize(
        self, registry: Registry, challenges: Sequence[Challenge], scope: str | None, credential: Credential
    ) -> str | None:
        """Return the Authorization that answers one of `challenges`, or None; raise as `grant` does."""
        grant = await self.grant(registry, challenges, scope, credential)
        return None if grant is None else grant.authorization

    async def grant(
        self,
        registry: Registry,
        challenges: Sequence[Challenge],
        scope: str | None,
        credential: Credential,
        refused: Grant | None = None,
    ) -> Grant | None:
        """Return what answers one of `challenges`, a token's `scope` being asked for, or None where nothing does.

        `refused` is what the registry did not take; it comes back where nothing better can be had. Raise
        `Unauthorized` (by the realm), `TooManyRequests`, `UpstreamBroken`, and what `Transport.request` raises.
        """
        if isinstance(credential, Own):
            return Grant(credential.authorization)
        bearer = next((one for one in challenges if one.scheme == "bearer" and "realm" in one.parameters), None)
        if bearer is not None:
            return await self._token(self._question(registry, bearer, scope, credential), refused)
        login = self._logins.shown(credential, registry.host, registry)
        if login is not None and any(challenge.scheme == "basic" for challenge in challenges):
            return Grant(login.authorization)
        return None

    def _question(self, registry: Registry, bearer: Challenge, scope: str | None, credential: Credential) -> Asked:
        realm = bearer.parameters["realm"]
        origin, _ = split_url(realm)
        if origin.scheme == "http" and registry.scheme == "https":
            raise UpstreamBroken(f"{registry}: it names a token server without TLS, {origin.host.authority}")
        # The registry's own scope too: it knows what a request really needs (a mount: the other repository).
        scopes = dict.fromkeys([*([scope] if scope else []), *bearer.parameters.get("scope", "").split()])
        wanted = tuple(one for one in scopes if _SCOPE.fullmatch(one))[:_MAX_SCOPES]
        login = self._logins.shown(credential, origin.host, registry)
        return Asked(registry, realm, bearer.parameters.get("service"), wanted, login)

    async def _token(self, asked: Asked, refused: Grant | None) -> Grant:
        if refused is not None and refused.asked == asked and not refused.reused:
            return refused
        kept = self._kept.get(asked)
        stale = kept is not None and refused is not None and kept.grant.authorization == refused.authorization
        if kept is not None and not stale and self._clock() < kept.renew:
            self._kept.move_to_end(asked)
            return evolve(kept.grant, reused=True)
        self._kept.pop(asked, None)
        return await self._asking.do(asked, lambda: self._fetch(asked))

    async def _fetch(self, asked: Asked) -> Grant:
        parameters = [] if asked.service is None else [("service", asked.service)]
        parameters += [("scope", scope) for scope in asked.scopes]
        query = urlencode(parameters, quote_via=quote)
        url = asked.realm.partition("#")[0]
        if query:
            url += ("&" if "?" in url else "?") + query
        fields = [("Accept", "application/json")]
        if asked.login is not None:
            fields.append(("Authorization", asked.login.authorization))
        permit = None if asked.host == asked.registry.host else self._permit
        response = await self._transport.request("GET", url, Headers(fields), permit=permit)
        if response.status != 200:
            await response.discard()
            raise _refusal(asked, response)
        grant, life = self._read(asked, await response.read_all(_MAX_ANSWER))
        self._keep(asked, grant, life)
        return grant

    def _read(self, asked: Asked, content: bytes) -> tuple[Grant, float]:
        """Return the token in a realm's answer and for how long it is good."""
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        found = answer.get("token") or answer.get("access_token") if isinstance(answer, dict) else None
        if not isinstance(found, str) or not _TOKEN.fullmatch(found):
            raise UpstreamBroken(f"{asked.host}: what it answers holds no token for {asked.registry}")
        return Grant(f"Bearer {found}", asked), remaining_life(answer, self._clock())

    def _keep(self, asked: Asked, grant: Grant, life: float) -> None:
        margin = min(max(life / 10, 10.0), life / 2)
        self._kept[asked] = _Token(grant, self._clock() + life - margin)
        if len(self._kept) > _MAX_TOKENS:
            self._kept.popitem(last=False)

    def _realm_host(self, registry: Registry) -> Host | None:
        for challenge in self.challenges_for(registry):
            try:
                return split_url(challenge.parameters["realm"])[0].host if challenge.scheme == "bearer" else None
            except (KeyError, RegistryError):
                continue
        return _KNOWN_REALMS.get(registry.host)


# Asked about before the first request, when nothing is remembered yet.
_KNOWN_REALMS = {Host("registry-1.docker.io", 443): Host("auth.docker.io", 443)}


def remaining_life(answer: Mapping[str, Any], now: float) -> float:
    """Return the seconds for which the token in a realm's `answer`, which came at `now`, is good.

    They count from `issued_at`, which may be earlier (a server may hand out a token twice), but is not believed where
    it would mean that the token has ended or is yet to begin: then the clocks differ.
    """
    life = answer.get("expires_in")
    if isinstance(life, bool) or not isinstance(life, (int, float)) or not 0 < life < float("inf"):
        life = _DEFAULT_LIFE
    life = min(float(life), _LONGEST_LIFE)
    issued = _timestamp(answer.get("issued_at"))
    age = 0.0 if issued is None else now - issued
    return life - age if 0 < age < life else life


def _timestamp(text: object) -> float | None:
    """Return RFC 3339 `text` as Unix time, None where it is none."""
    if not isinstance(text, str):
        return None
    # Go writes nanoseconds, of which Python takes six digits.
    try:
        moment = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text[:64]))
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _without_scope(challenge: Challenge) -> Challenge:
    return evolve(challenge, parameters={key: value for key, value in challenge.parameters.items() if key != "scope"})


def _refusal(asked: Asked, response: Response) -> RegistryError:
    place, status = asked.host, response.status
    if status in (401, 403):
        who = "anonymously" if asked.login is None else "with the login of AUTH_REGISTRIES"
        return Unauthorized(f"{place} gives no token for {asked.registry} {who} (status {status})")
    if status == 429:
        retry = response.headers.get("retry-after")
        headers = [] if retry is None else [("Retry-After", retry)]
        return TooManyRequests(f"{place} limits the rate of tokens for {asked.registry}", headers=headers)
    return UpstreamBroken(f"{place} gives no token for {asked.registry} (status {status})")
