"""The htpasswd file of the hosted registry, and Basic credentials."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import Clock
from twisted.trial.unittest import TestCase

from dockerproxy.concurrency import spawn
from dockerproxy.errors import TooManyRequests
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.registry import htpasswd as module
from dockerproxy.registry.htpasswd import HtpasswdError, HtpasswdFile, parse_htpasswd
from dockerproxy.thread_pool import BoundedThreadPool, PoolLimits

PATH = Path("/etc/dockerproxy/users")
CLIENT = "192.0.2.7"


def hash_password(password: bytes, rounds: int = 4, prefix: bytes = b"2b") -> str:
    return bcrypt.hashpw(password[:72], bcrypt.gensalt(rounds)).replace(b"$2b$", b"$" + prefix + b"$").decode()


def test_parse_htpasswd() -> None:
    one, two = hash_password(b"one"), hash_password(b"two", 12, b"2y")
    parsed = parse_htpasswd(f"# users\n\n  alice:{one}  \r\nbob:{two}\n", PATH)
    assert parsed == {"alice": one.encode(), "bob": two.encode()}
    assert parse_htpasswd("", PATH) == {}


@pytest.mark.parametrize(
    "line",
    [
        "alice", ":secret", "alice:", "alice:secret-in-the-clear", "alice:$apr1$aaaaaaaa$bbbbbbbbbbbbbbbbbbbbbb",
        "alice:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=", "alice:$2y$05$short", "alice:$2x$05$" + "a" * 53,
        "alice:$2b$99$" + "a" * 53, "alice:$2b$31$" + "a" * 52 + ":", "first:$2b$04$" + "a" * 53,
    ],
)  # fmt: skip
def test_broken_line_is_reported_without_its_hash(line: str) -> None:
    with pytest.raises(HtpasswdError) as caught:
        parse_htpasswd(f"first:{hash_password(b'x')}\n# a comment\n{line}\n", PATH)
    assert f"HTPASSWD_FILE: {PATH}, line 3 " in str(caught.value)
    secret = line.partition(":")[2]
    assert not secret or secret not in str(caught.value)


class HtpasswdFileTests(TestCase):
    def setUp(self) -> None:
        self.path = Path(self.mktemp())
        self.write(alice=b"wonder", bob=b"x" * 80)
        self.clock = Clock()
        self.clock.advance(1000)
        self.pool = BoundedThreadPool.start(reactor, "password checks", PoolLimits(2, 1, 20, 10))
        self.htpasswd = self.open_file()

    def open_file(self) -> HtpasswdFile:
        return HtpasswdFile(self.clock, self.pool, self.path, b"s" * 32)

    def write(self, **users: bytes) -> None:
        self.path.write_text("".join(f"{user}:{hash_password(password)}\n" for user, password in users.items()))

    def record_hash_threads(self) -> list[Any]:
        """Return a list of the threads that computed a hash. It grows with each computation."""
        threads: list[Any] = []
        original = module._matches

        def matches(*arguments: Any) -> bool:
            threads.append(threading.current_thread())
            return original(*arguments)

        self.patch(module, "_matches", matches)
        return threads

    async def test_check_password(self) -> None:
        for user, password, expected in [
            ("alice", b"wonder", True), ("alice", b"Wonder", False), ("alice", b"", False),
            ("nobody", b"wonder", False),
            ("bob", b"x" * 80, True), ("bob", b"x" * 71, False), ("", b"", False), ("alice", b"won\0der", False),
        ]:  # fmt: skip
            self.assertEqual(
                await self.htpasswd.check_password(
                    BasicCredentials(user, password.decode()), f"host of {user!r} {password!r}"
                ),
                expected,
                (user, password),
            )

    async def test_hash_is_computed_in_a_thread_and_cached(self) -> None:
        threads = self.record_hash_threads()
        for _ in range(3):
            self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))
        self.assertEqual(len(threads), 1)
        self.assertIsNot(threads[0], threading.main_thread())
        for _ in range(5):  # while it is used
            self.clock.advance(module._CACHE_SECONDS - 1)
            self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))
        self.assertEqual(len(threads), 1)
        self.clock.advance(module._CACHE_SECONDS)
        self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))
        self.assertEqual(len(threads), 2)
        for number in range(2):
            wrong = BasicCredentials("alice", f"wrong {number}")
            self.assertFalse(await self.htpasswd.check_password(wrong, CLIENT))
        self.assertEqual(len(threads), 4)

    async def test_concurrent_checks_compute_once(self) -> None:
        threads = self.record_hash_threads()
        results: list[bool] = []

        async def check() -> None:
            results.append(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))

        await gatherResults([spawn(check(), "a check") for _ in range(10)])
        self.assertEqual((results, len(threads)), ([True] * 10, 1))

    async def test_cache_holds_no_password_and_is_bounded(self) -> None:
        self.patch(module, "_MAX_CACHED", 2)
        self.htpasswd = self.open_file()
        self.write(**{f"user{number}": b"wonder" for number in range(4)})
        for number in range(4):
            self.assertTrue(await self.htpasswd.check_password(BasicCredentials(f"user{number}", "wonder"), CLIENT))
        self.assertEqual(len(self.htpasswd._verified), 2)
        self.assertNotIn("wonder", repr(vars(self.htpasswd)))

    async def test_an_unknown_user_takes_as_long_to_reject(self) -> None:
        self.path.write_text(f"alice:{hash_password(b'wonder', 9)}\nbob:{hash_password(b'x', 4)}\n")
        self.htpasswd.reload()
        durations = {}
        for user in ("alice", "nobody"):
            start = time.thread_time(), time.perf_counter()
            self.assertFalse(await self.htpasswd.check_password(BasicCredentials(user, "wrong"), CLIENT))
            durations[user] = time.perf_counter() - start[1]
        self.assertGreater(durations["nobody"], durations["alice"] / 3)

    async def test_file_is_reloaded_when_it_changes(self) -> None:
        self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))
        self.write(alice=b"new", carol=b"c")
        self.assertFalse(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))
        self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "new"), CLIENT))
        self.assertTrue(self.htpasswd.has_user("carol"))
        self.assertFalse(self.htpasswd.has_user("bob"))

    async def test_broken_file_keeps_the_previous_users(self) -> None:
        self.path.write_text("alice:in the clear\n")
        self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))
        with self.assertRaises(HtpasswdError):
            self.htpasswd.reload()
        os.unlink(self.path)
        self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))

    async def test_missing_file(self) -> None:
        with self.assertRaises(HtpasswdError) as caught:
            HtpasswdFile(self.clock, self.pool, Path("/no/such/file"), b"")
        self.assertIn("HTPASSWD_FILE: /no/such/file cannot be read", str(caught.exception))

    async def test_wrong_passwords_of_one_client_wait_and_are_refused_then(self) -> None:
        threads = self.record_hash_threads()
        wrong = [BasicCredentials("alice", f"wrong {number}") for number in range(20)]
        for credentials in wrong[:5]:
            self.assertFalse(await self.htpasswd.check_password(credentials, CLIENT))
        delayed = Deferred.fromCoroutine(self.htpasswd.check_password(wrong[5], CLIENT))
        self.assertEqual(len(threads), 5)
        self.clock.advance(0.5)
        self.assertFalse(await delayed)
        for credentials in wrong[9:11]:
            delayed = Deferred.fromCoroutine(self.htpasswd.check_password(credentials, CLIENT))
            self.clock.advance(2)
            self.assertFalse(await delayed)
        with self.assertRaises(TooManyRequests) as caught:
            await self.htpasswd.check_password(wrong[7], CLIENT)
        self.assertEqual(caught.exception.message, "too many failed logins from 192.0.2.7: try again in 4 s")
        self.assertEqual(caught.exception.headers, (("Retry-After", "4"),))
        self.assertEqual(len(threads), 8)
        self.assertFalse(await self.htpasswd.check_password(wrong[8], "192.0.2.2"))

    async def test_wrong_passwords_that_came_at_once_are_refused_too(self) -> None:
        threads = self.record_hash_threads()
        refusals: list[str] = []
        checks = [
            Deferred.fromCoroutine(self.htpasswd.check_password(BasicCredentials("alice", f"wrong {number}"), CLIENT))
            for number in range(10)
        ]
        for check in checks:
            try:
                self.assertFalse(await check)
            except TooManyRequests as error:
                refusals.append(error.message)
        self.assertEqual(refusals, ["too many failed logins from 192.0.2.7: try again in 4 s"] * 2)
        self.assertEqual((len(threads), self.pool.waiting), (8, 0))

    async def test_a_verified_login_is_not_delayed_by_failures_of_its_address(self) -> None:
        self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))
        for number in range(9):
            failing = Deferred.fromCoroutine(
                self.htpasswd.check_password(BasicCredentials("alice", f"wrong {number}"), CLIENT)
            )
            self.clock.advance(2)
            with contextlib.suppress(TooManyRequests):
                await failing
        self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))

    async def test_a_host_that_repeats_an_old_password_delays_nobody_behind_its_nat(self) -> None:
        """It repeats one login, and so guesses nothing. Other hosts of the same address log in for the first time."""
        outcomes: list[bool] = []
        self.htpasswd = HtpasswdFile(self.clock, self.pool, self.path, b"s" * 32, on_checked=outcomes.append)
        threads = self.record_hash_threads()
        old = BasicCredentials("alice", "old")
        for _ in range(100):
            self.clock.advance(module._REFUSED_SECONDS - 1)
            self.assertFalse(await self.htpasswd.check_password(old, CLIENT))
        self.assertEqual((len(threads), outcomes), (1, [False] * 100))
        self.assertTrue(await self.htpasswd.check_password(BasicCredentials("alice", "wonder"), CLIENT))
        self.assertFalse(await self.htpasswd.check_password(old, "192.0.2.8"))  # others learn nothing of it by the time
        self.assertEqual(len(threads), 3)
        self.clock.advance(module._REFUSED_SECONDS)
        self.assertFalse(await self.htpasswd.check_password(old, CLIENT))
        self.assertEqual(len(threads), 4)
        self.write(alice=b"old")
        self.assertTrue(await self.htpasswd.check_password(old, CLIENT))

    async def test_a_check_is_dropped_if_its_client_leaves_before_it_starts(self) -> None:
        threads = self.record_hash_threads()
        checks = [
            Deferred.fromCoroutine(self.htpasswd.check_password(BasicCredentials("alice", f"wrong {number}"), CLIENT))
            for number in range(4)
        ]
        for check in checks[1:]:
            check.cancel()
            check.addErrback(lambda failure: failure.trap(CancelledError))
        self.assertFalse(await checks[0])
        self.assertEqual((len(threads), self.pool.waiting), (1, 0))
