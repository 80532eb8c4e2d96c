from __future__ import annotations

import base64
import os
import threading
import time
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from twisted.internet import reactor
from twisted.internet.defer import gatherResults
from twisted.internet.task import Clock
from twisted.trial.unittest import TestCase

from dockerproxy.concurrency import spawn
from dockerproxy.registry import users as module
from dockerproxy.registry.users import HtpasswdError, Login, Users, parse_htpasswd, read_basic

PATH = Path("/etc/dockerproxy/users")


def hashed(password: bytes, rounds: int = 4, prefix: bytes = b"2b") -> str:
    return bcrypt.hashpw(password[:72], bcrypt.gensalt(rounds)).replace(b"$2b$", b"$" + prefix + b"$").decode()


def basic(text: bytes) -> str:
    return "Basic " + base64.b64encode(text).decode()


def test_basic() -> None:
    assert read_basic(basic(b"alice:wonder:land")) == Login("alice", b"wonder:land")
    assert read_basic(basic("ä:ö".encode())) == Login("ä", "ö".encode())
    assert read_basic(basic(b"alice:").replace("Basic", "bAsIc")) == Login("alice", b"")
    assert "wonder" not in repr(read_basic(basic(b"alice:wonder")))


@pytest.mark.parametrize(
    "field", ["", "Basic", "Basic !", "Basic " + base64.b64encode(b"nocolon").decode(), "Bearer x",
              basic(b"\xff:x"), basic(b"a:" + b"x" * 5000)],
)  # fmt: skip
def test_what_is_no_basic(field: str) -> None:
    assert read_basic(field) is None


def test_a_file_of_users() -> None:
    one, two = hashed(b"one"), hashed(b"two", 12, b"2y")
    found = parse_htpasswd(f"# users\n\n  alice:{one}  \r\nbob:{two}\n", PATH)
    assert found == {"alice": one.encode(), "bob": two.encode()}
    assert parse_htpasswd("", PATH) == {}


@pytest.mark.parametrize(
    "line",
    [
        "alice", ":secret", "alice:", "alice:secret-in-the-clear", "alice:$apr1$aaaaaaaa$bbbbbbbbbbbbbbbbbbbbbb",
        "alice:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=", "alice:$2y$05$short", "alice:$2x$05$" + "a" * 53,
        "alice:$2b$99$" + "a" * 53, "alice:$2b$31$" + "a" * 52 + ":", "first:" + hashed(b"again"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named_and_not_shown(line: str) -> None:
    with pytest.raises(HtpasswdError) as caught:
        parse_htpasswd(f"first:{hashed(b'x')}\n# a comment\n{line}\n", PATH)
    assert f"HTPASSWD_FILE: {PATH}, line 3," in str(caught.value)
    secret = line.partition(":")[2]
    assert not secret or secret not in str(caught.value)


class Checking(TestCase):
    def setUp(self) -> None:
        self.path = Path(self.mktemp())
        self.write(alice=b"wonder", bob=b"x" * 80)
        self.clock = Clock()
        self.clock.advance(1000)
        self.users = Users(reactor, self.path, b"s" * 32, self.clock.seconds)

    def write(self, **users: bytes) -> None:
        self.path.write_text("".join(f"{user}:{hashed(password)}\n" for user, password in users.items()))

    def count(self) -> list[Any]:
        """Return a list that grows with each computation, which is made where it must not hold anybody up."""
        made: list[Any] = []
        original = module._matches

        def matches(*arguments: Any) -> bool:
            made.append(threading.current_thread())
            return original(*arguments)

        self.patch(module, "_matches", matches)
        return made

    async def test_right_and_wrong(self) -> None:
        for user, password, right in [
            ("alice", b"wonder", True), ("alice", b"Wonder", False), ("alice", b"", False),
            ("nobody", b"wonder", False),
            ("bob", b"x" * 80, True), ("bob", b"x" * 71, False), ("", b"", False), ("alice", b"won\0der", False),
        ]:  # fmt: skip
            self.assertEqual(await self.users.check(Login(user, password)), right, (user, password))

    async def test_it_is_computed_in_a_thread_and_once_in_a_while(self) -> None:
        made = self.count()
        for _ in range(3):
            self.assertTrue(await self.users.check(Login("alice", b"wonder")))
        self.assertEqual(len(made), 1)
        self.assertIsNot(made[0], threading.main_thread())
        self.clock.advance(module._REMEMBERED)
        self.assertTrue(await self.users.check(Login("alice", b"wonder")))
        self.assertEqual(len(made), 2)
        for _ in range(2):
            self.assertFalse(await self.users.check(Login("alice", b"wrong")))
        self.assertEqual(len(made), 4)

    async def test_many_at_once_are_one_computation(self) -> None:
        made = self.count()
        found: list[bool] = []

        async def check() -> None:
            found.append(await self.users.check(Login("alice", b"wonder")))

        await gatherResults([spawn(check(), "a check") for _ in range(10)])
        self.assertEqual((found, len(made)), ([True] * 10, 1))

    async def test_what_is_remembered_holds_no_password_and_is_bounded(self) -> None:
        self.patch(module, "_MOST_REMEMBERED", 2)
        self.write(**{f"user{number}": b"wonder" for number in range(4)})
        for number in range(4):
            self.assertTrue(await self.users.check(Login(f"user{number}", b"wonder")))
        self.assertEqual(len(self.users._right), 2)
        self.assertNotIn("wonder", repr(vars(self.users)))

    async def test_a_user_who_does_not_exist_costs_as_much(self) -> None:
        self.path.write_text(f"alice:{hashed(b'wonder', 9)}\nbob:{hashed(b'x', 4)}\n")
        self.users.reload()
        spent = {}
        for user in ("alice", "nobody"):
            began = time.thread_time(), time.perf_counter()
            self.assertFalse(await self.users.check(Login(user, b"wrong")))
            spent[user] = time.perf_counter() - began[1]
        self.assertGreater(spent["nobody"], spent["alice"] / 3)

    async def test_the_file_is_read_again_when_it_changes(self) -> None:
        self.assertTrue(await self.users.check(Login("alice", b"wonder")))
        self.write(alice=b"new", carol=b"c")
        self.assertFalse(await self.users.check(Login("alice", b"wonder")))
        self.assertTrue(await self.users.check(Login("alice", b"new")))
        self.assertTrue(self.users.knows("carol"))
        self.assertFalse(self.users.knows("bob"))

    async def test_a_file_that_breaks_leaves_the_users_as_they_are(self) -> None:
        self.path.write_text("alice:in the clear\n")
        self.assertTrue(await self.users.check(Login("alice", b"wonder")))
        with self.assertRaises(HtpasswdError):
            self.users.reload()
        os.unlink(self.path)
        self.assertTrue(await self.users.check(Login("alice", b"wonder")))

    async def test_a_file_that_is_not_there(self) -> None:
        with self.assertRaises(HtpasswdError) as caught:
            Users(reactor, Path("/no/such/file"), b"", self.clock.seconds)
        self.assertIn("HTPASSWD_FILE: /no/such/file cannot be read", str(caught.exception))
