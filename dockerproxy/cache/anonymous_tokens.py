"""Tokens that upstream issues to clients without a credential.

All clients without one ask for the same tokens, and a whole fleet pulls at once. So a token is requested once, and
handed out while enough of its life is left, for a few minutes: a token server that has lost its key, or a registry that
refuses a token before its end, must not stay out of reach for hours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from attrs import evolve, frozen

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.concurrency import SingleFlight
from dockerproxy.oci.tokens import TokenResponse

_MAX_TOKENS = 512  # of 16 KiB at most
_MIN_REMAINING = 60.0  # seconds; distribution's specification has 60 as the least lifetime that clients may rely on

_MAX_AGE = 300.0  # seconds; the tokens of most registries have this lifetime, or an hour


@frozen
class _IssuedToken:
    response: TokenResponse
    issued_at: float  # Unix time, as the others
    renew_at: float
    ends_at: float


class AnonymousTokens:
    """The tokens that are handed out, by the request for them. `clock` returns Unix time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._issued: BoundedDict[str, _IssuedToken] = BoundedDict(_MAX_TOKENS)
        self._requests: SingleFlight[str, _IssuedToken] = SingleFlight()

    async def get(self, key: str, request: Callable[[], Awaitable[TokenResponse]]) -> TokenResponse:
        """Return the token for `key` with its remaining lifetime, by `request` unless one can be handed out.

        It is at most _MAX_AGE old, and has more than half of its lifetime left, and at least a minute, unless upstream
        issues shorter ones. Raise the error of `request`.
        """
        issued = self._issued.get(key)
        if issued is None or not issued.issued_at <= self._clock() <= issued.renew_at:
            issued = await self._requests.do(key, lambda: self._request(key, request))
        return evolve(issued.response, lifetime=issued.ends_at - self._clock())

    async def _request(self, key: str, request: Callable[[], Awaitable[TokenResponse]]) -> _IssuedToken:
        issued_at = self._clock()  # as far as we know: it may be later
        response = await request()
        ends_at = issued_at + response.lifetime
        age = min(response.lifetime - max(response.lifetime / 2, _MIN_REMAINING), _MAX_AGE)
        issued = _IssuedToken(response, issued_at, issued_at + age, ends_at)
        self._issued[key] = issued
        return issued
