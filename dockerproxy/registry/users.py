"""The users of the hosted registry: HTPASSWD_FILE, as Apache's htpasswd writes it with bcrypt."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bcrypt
from attrs import field, frozen
from twisted.logger import Logger

from dockerproxy.concurrency import SingleFlight, in_thread

_HASH = re.compile(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
_LONGEST_PASSWORD = 72  # bytes; bcrypt looks at no more, and its Python library refuses what is longer
_REMEMBERED = 300.0  # seconds in which a login that was right is not computed again
_MOST_REMEMBERED = 1000
_LONGEST_FIELD = 4096

log = Logger()


class HtpasswdError(ValueError):
    """A file of users that cannot be used: one sentence, without any part of a hash."""


@frozen
class Login:
    """What a client shows by Basic (RFC 7617)."""

    user: str
    password: bytes = field(repr=False)


def read_basic(authorization: str) -> Login | None:
    """Return the login in an Authorization field, None where it is not a readable Basic one."""
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic" or len(encoded) > _LONGEST_FIELD:
        return None
    try:
        user, colon, password = b64decode(encoded.strip(), validate=True).partition(b":")
        return Login(user.decode("utf-8"), password) if colon else None
    except (Base64Error, ValueError):
        return None


def parse_htpasswd(text: str, path: Path) -> dict[str, bytes]:
    """Return the bcrypt hashes in `text`, the content of `path`, by user. Raise `HtpasswdError`."""
    users: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        user, colon, hashed = entry.partition(":")
        where = f"HTPASSWD_FILE: {path}, line {number},"
        if not colon or not user:
            raise HtpasswdError(f"{where} is not user:hash")
        if not _HASH.fullmatch(hashed):
            raise HtpasswdError(f"{where} has no bcrypt hash (made by: htpasswd -B {path} USER)")
        if user in users:
            raise HtpasswdError(f"{where} names a user for the second time")
        users[user] = hashed.encode("ascii")
    return users


class Users:
    """Tells whether a login is right.

    The file is read again when it changes; a broken one leaves the users as they are. A password is checked in a
    thread, for that takes as long as whoever made the hash wanted. `secret` keys what is remembered of it, so that
    memory holds no password.
    """

    def __init__(self, reactor: Any, path: Path, secret: bytes, clock: Callable[[], float]) -> None:
        self._reactor = reactor
        self._path = path
        self._secret = secret
        self._clock = clock
        self._users: Mapping[str, bytes] = {}
        self._nobody = b""
        self._signature: tuple[int, int, int] | None = None
        self._right: OrderedDict[bytes, float] = OrderedDict()
        self._checking: SingleFlight[bytes, bool] = SingleFlight()
        self.reload()

    def reload(self) -> None:
        """Read the file. Raise `HtpasswdError` where it cannot be used; the users are then as before."""
        try:
            with self._path.open(encoding="utf-8") as file:
                self._signature = _signature(os.fstat(file.fileno()))
                users = parse_htpasswd(file.read(), self._path)
        except OSError as error:
            raise HtpasswdError(f"HTPASSWD_FILE: {self._path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise HtpasswdError(f"HTPASSWD_FILE: {self._path} is not UTF-8 text") from None
        self._users = users
        self._right.clear()
        # What a user who does not exist is compared with costs as much as the dearest of those who do.
        rounds = max((int(hashed[4:6]) for hashed in users.values()), default=10)
        self._nobody = b"$2b$%02d$" % rounds + b"." * 53

    def knows(self, user: str) -> bool:
        """Say whether there is such a user."""
        self._look()
        return user in self._users

    async def check(self, login: Login) -> bool:
        """Say whether `login` is right."""
        self._look()
        key = hmac.new(self._secret, f"{login.user}\n".encode() + login.password, hashlib.sha256).digest()
        until = self._right.get(key)
        if until is not None and self._clock() < until:
            return True
        return await self._checking.do(key, lambda: self._check(login, key))

    async def _check(self, login: Login, key: bytes) -> bool:
        hashed = self._users.get(login.user)
        right: bool = await in_thread(self._reactor, _matches, login.password, hashed or self._nobody)
        if not right or hashed is None or self._users.get(login.user) != hashed:
            return False
        self._right[key] = self._clock() + _REMEMBERED
        self._right.move_to_end(key)
        if len(self._right) > _MOST_REMEMBERED:
            self._right.popitem(last=False)
        return True

    def _look(self) -> None:
        try:
            signature = _signature(os.stat(self._path))
        except OSError:
            return
        if signature != self._signature:
            try:
                self.reload()
            except HtpasswdError as error:
                log.error("{why}; the users stay as they were", why=str(error))


def _matches(password: bytes, hashed: bytes) -> bool:
    try:
        return bool(bcrypt.checkpw(password[:_LONGEST_PASSWORD], hashed))
    except ValueError:  # a NUL in the password
        return False


def _signature(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_size, status.st_ino
