"""The users of the hosted registry and of the proxy: files in the format of Apache's htpasswd with bcrypt."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import bcrypt
from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.concurrency import SingleFlight
from dockerproxy.config_files import read_config_file
from dockerproxy.errors import TooManyRequests
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.registry.login_throttle import LoginThrottle

_HASH = re.compile(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
_MAX_PASSWORD = 72  # bytes; bcrypt ignores the rest, and its Python library refuses longer passwords
_CACHE_SECONDS = 300.0  # seconds after its last use for which a verified login is not hashed again
_REFUSED_SECONDS = 300.0  # seconds after its last use for which a wrong login is not hashed again
_MAX_CACHED = 1000
_MAX_DELAY = 2.0  # seconds that a throttled login waits; a longer delay is refused with 429

log = Logger()


class HtpasswdError(ValueError):
    """The htpasswd file cannot be used. The message is one sentence and contains no part of a hash."""


def parse_htpasswd(text: str, path: Path, setting: str = "HTPASSWD_FILE") -> dict[str, bytes]:
    """Return the bcrypt hashes in `text`, the content of `path`, by user name.

    `setting` has the name of the file. Raise `HtpasswdError`.
    """
    users: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        user, colon, password_hash = entry.partition(":")
        location = f"{setting}: {path}, line {number}"
        if not colon or not user:
            raise HtpasswdError(f"{location} is not of the form user:hash")
        if not _HASH.fullmatch(password_hash):
            raise HtpasswdError(f"{location} has no bcrypt hash; create one with: htpasswd -B {path} USER")
        if user in users:
            raise HtpasswdError(f"{location} repeats the user of an earlier line")
        users[user] = password_hash.encode("ascii")
    return users


def check_htpasswd(path: Path, setting: str) -> None:
    """Raise `HtpasswdError` if the file at `path`, which `setting` names, cannot be used. Blocks."""
    with _named_errors(path, setting):
        parse_htpasswd(read_config_file(path)[0].decode("utf-8-sig"), path, setting)


@contextmanager
def _named_errors(path: Path, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HtpasswdError(f"{setting}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise HtpasswdError(f"{setting}: {path} is not UTF-8 text") from None


class PasswordPool(Protocol):
    """Threads for password hashes; see `BoundedThreadPool`."""

    async def run(self, function: Callable[..., Any], *args: object, client: str = "") -> Any: ...

    def refuse_waiting(self, client: str, error: Exception) -> None: ...


class HtpasswdFile:
    """Checks user names and passwords against an htpasswd file.

    The file is read again when it changes. If the new file is invalid, the previous users stay. A password is hashed in
    `pool`, because the cost in its hash decides how long that takes. Verified logins are remembered under a key made
    with `secret`, so that memory holds no password. `clock` is the reactor. Errors name the `setting` of the path.
    `on_checked` is called with the outcome of each check of a password.
    """

    def __init__(
        self,
        clock: Any,
        pool: PasswordPool,
        path: Path,
        secret: bytes,
        setting: str = "HTPASSWD_FILE",
        on_checked: Callable[[bool], object] = bool,
    ) -> None:
        self._clock = clock
        self._pool = pool
        self._path = path
        self._secret = secret
        self._setting = setting
        self._on_checked = on_checked
        self._throttle = LoginThrottle(clock.seconds)
        self._users: Mapping[str, bytes] = {}
        self._dummy_hash = b""
        self._signature: tuple[int, int, int] | None = None
        self._verified: BoundedDict[bytes, bool] = BoundedDict(_MAX_CACHED, ttl=_CACHE_SECONDS, clock=clock.seconds)
        # A host that repeats an old password guesses nothing, and the others behind its NAT must not wait for it.
        self._refused: BoundedDict[tuple[str, bytes], bool] = BoundedDict(
            _MAX_CACHED, ttl=_REFUSED_SECONDS, clock=clock.seconds
        )
        self._checks: SingleFlight[tuple[str, bytes], bool] = SingleFlight(cancel_abandoned=True)
        self.reload()

    def reload(self) -> None:
        """Read the file. If it cannot be used, raise `HtpasswdError` and keep the previous users."""
        with _named_errors(self._path, self._setting):
            content, status = read_config_file(self._path)
            self._signature = _signature(status)
            users = parse_htpasswd(content.decode("utf-8-sig"), self._path, self._setting)
        self._users = users
        self._verified.clear()
        self._refused.clear()
        # Unknown users are compared with this hash, which costs as much as the most expensive one in the file.
        rounds = max((int(hashed[4:6]) for hashed in users.values()), default=10)
        self._dummy_hash = b"$2b$%02d$" % rounds + b"." * 53

    def has_user(self, user: str) -> bool:
        """Return whether this user exists."""
        return self.password_hash(user) is not None

    def password_hash(self, user: str) -> bytes | None:
        """Return the hash of the user's password, or None if there is no such user."""
        self._reload_if_changed()
        return self._users.get(user)

    async def check_password(self, credentials: BasicCredentials, client: str) -> bool:
        """Return whether user and password are correct.

        `client` is the address that sent them. After a few wrong logins, of which each counts once, those that are not
        known wait; raise `TooManyRequests` if they would wait too long, or if too many of them wait already.
        """
        self._reload_if_changed()
        key = hmac.new(
            self._secret, f"{credentials.user}\n".encode() + credentials.password_bytes, hashlib.sha256
        ).digest()
        if self._verified.get(key):
            # Keep it while it is used: a fleet with one login behind a NAT must not wait because one host of it has
            # an old password. A change of the file forgets all.
            self._verified[key] = True
            return True
        if self._refused.get((client, key)):
            self._refused[client, key] = True
            self._on_checked(False)
            return False
        await self._delay(client)
        return await self._checks.do((client, key), lambda: self._check(credentials, key, client))

    async def _delay(self, client: str) -> None:
        error = self._refusal(client)
        if error is not None:
            raise error
        delay = self._throttle.remaining_delay(client)
        if delay:
            await deferLater(self._clock, delay)

    def _refusal(self, client: str) -> TooManyRequests | None:
        """Return the error for a login of `client` if it would have to wait too long."""
        delay = self._throttle.remaining_delay(client)
        if delay <= _MAX_DELAY:
            return None
        seconds = math.ceil(delay)
        return TooManyRequests(
            f"too many failed logins from {client}: try again in {seconds} s", headers=[("Retry-After", str(seconds))]
        )

    async def _check(self, credentials: BasicCredentials, key: bytes, client: str) -> bool:
        password_hash = self._users.get(credentials.user)
        is_match: bool = await self._pool.run(
            _matches, credentials.password_bytes, password_hash or self._dummy_hash, client=client
        )
        if not is_match or password_hash is None or self._users.get(credentials.user) != password_hash:
            self._on_checked(False)
            if password_hash == self._users.get(credentials.user):  # not if the file has changed meanwhile
                self._refused[client, key] = True
            self._throttle.record_failure(client)
            error = self._refusal(client)
            if error is not None:  # those that came before the failures were known
                self._pool.refuse_waiting(client, error)
            return False
        self._verified[key] = True
        self._on_checked(True)
        return True

    def _reload_if_changed(self) -> None:
        try:
            signature = _signature(os.stat(self._path))
        except OSError:
            return
        if signature != self._signature:
            try:
                self.reload()
            except HtpasswdError as error:
                log.error("{reason}; the previous users stay in effect", reason=str(error))


def _matches(password: bytes, password_hash: bytes) -> bool:
    try:
        return bool(bcrypt.checkpw(password[:_MAX_PASSWORD], password_hash))
    except ValueError:  # the password contains a NUL
        return False


def _signature(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
