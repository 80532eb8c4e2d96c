"""The sessions of the page's users, and the links that start one, in the main process.

The tables are in memory: a sign-out counts at once in all processes, and signing in works while the disk is full. A
restart ends all sessions. Only hashes of tokens are kept, so a look-up takes the same time for every wrong token.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Protocol

from attrs import frozen

from dockerproxy.bounded_dict import BoundedDict

SESSION_LIFETIME = 12 * 3600.0  # seconds
LINK_LIFETIME = 600.0
_MAX_SESSIONS = 1000
_MAX_SESSIONS_PER_USER = 20
_MAX_LINKS = 20
_TOKEN_SIZE = 32  # bytes


@frozen
class Session:
    """A signed-in user. `stamp` changes with the user's password; it is "" for one that came by a link.

    Such a user is one of this machine that may send commands to the daemon.
    """

    user: str
    stamp: str


class SessionStore(Protocol):
    """The sessions as one process of the daemon sees them. The methods raise `ServiceOverloaded` if they cannot."""

    async def start_session(self, session: Session) -> str: ...

    async def find_session(self, token: str) -> Session | None: ...

    async def end_session(self, token: str) -> None: ...

    async def use_sign_in_link(self, token: str) -> tuple[Session, str] | None: ...


class Sessions:
    """At most 1,000 sessions, 20 of them of one user; the least recently used one ends first. `clock` is monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._sessions: BoundedDict[bytes, Session] = BoundedDict(_MAX_SESSIONS, ttl=SESSION_LIFETIME, clock=clock)
        self._links: BoundedDict[bytes, str] = BoundedDict(_MAX_LINKS, ttl=LINK_LIFETIME, clock=clock)

    async def start_session(self, session: Session) -> str:
        """Start a session and return its token."""
        return self._start(session)

    async def find_session(self, token: str) -> Session | None:
        """Return the session of a token, None if there is none, or if it has ended."""
        return self._sessions.get(_hash(token))

    async def end_session(self, token: str) -> None:
        """End a session, if there is one."""
        self._sessions.pop(_hash(token))

    def make_sign_in_link(self, user: str) -> str:
        """Return the token of a link that signs one browser in as administrator. `user` is of this machine."""
        token = secrets.token_urlsafe(_TOKEN_SIZE)
        self._links[_hash(token)] = user
        return token

    async def use_sign_in_link(self, token: str) -> tuple[Session, str] | None:
        """Start a session by a link, which ends with that. Return it and its token, None if the link has ended."""
        user = self._links.get(_hash(token))
        if user is None:
            return None
        self._links.pop(_hash(token))
        session = Session(user, "")
        return session, self._start(session)

    def _start(self, session: Session) -> str:
        same_user = [key for key in list(self._sessions) if self._is_of(key, session.user)]  # the oldest use first
        for key in same_user[: max(0, len(same_user) - _MAX_SESSIONS_PER_USER + 1)]:
            self._sessions.pop(key)
        token = secrets.token_urlsafe(_TOKEN_SIZE)
        self._sessions[_hash(token)] = session
        return token

    def _is_of(self, key: bytes, user: str) -> bool:
        session = self._sessions.get(key)
        return session is not None and session.user == user


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
