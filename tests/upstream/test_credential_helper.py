"""Docker's credential helpers, run as real processes."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from dockerproxy.oci.credentials import BasicCredentials, IdentityToken
from dockerproxy.upstream.credential_helper import (
    CredentialHelpers,
    HelperFailed,
    helper_environment,
    helper_program,
    parse_answer,
)

SECRET = "s3cr3t-of-the-helper"
ANSWER = {"ServerURL": "quay.io", "Username": "AWS", "Secret": SECRET}


def test_answers() -> None:
    assert parse_answer(json.dumps(ANSWER).encode()) == BasicCredentials("AWS", SECRET)
    assert parse_answer(b'{"Username": "<token>", "Secret": "x", "More": 1}') == IdentityToken("x")
    assert parse_answer(b'{"Username": "", "Secret": ""}') is None
    assert parse_answer(b"{}") is None


@pytest.mark.parametrize(
    "output",
    [
        b"", b"null", b"[]", b'"x"', b"{", b"hello", b"\xff\xfe", b'{"Username": 1, "Secret": "x"}',
        b'{"Username": "a", "Secret": ["x"]}', b'{"Username": "a", "Secret": ""}', b'{"Username": "", "Secret": "x"}',
        b'{"Username": "a:b", "Secret": "x"}', b'{"Username": "a\\nb", "Secret": "x"}',
        b'{"Username": "a", "Secret": "x\\u0000"}', b'{"Username": "a", "Secret": "' + b"x" * 20_000 + b'"}',
        b'{"Username": "a", "Secret": "x", "Secret": "y"}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_garbage_is_an_error_without_the_secret(output: bytes) -> None:
    with pytest.raises(ValueError) as excinfo:
        parse_answer(output)
    assert "xxx" not in str(excinfo.value)


def test_environment() -> None:
    given = dict.fromkeys(
        ["PATH", "HOME", "AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CLIENT_ID", "HTTPS_PROXY",
         "AUTH_REGISTRIES", "CA_KEY_PASSPHRASE", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "LD_PRELOAD", "PYTHONPATH"],
        "x",
    )  # fmt: skip
    assert sorted(helper_environment(given)) == [
        "AWS_PROFILE", "AZURE_CLIENT_ID", "GOOGLE_APPLICATION_CREDENTIALS", "HOME", "HTTPS_PROXY", "PATH",
    ]  # fmt: skip


class CredentialHelperTests(TestCase):
    timeout = 30

    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        path = f"{self.folder.absolute()}:{os.environ['PATH']}"
        variables = {"PATH": path, "HOME": "/nowhere", "AUTH_REGISTRIES": "no"}
        self.helpers = CredentialHelpers(reactor, variables)

    def write_helper(self, text: str, name: str = "test") -> None:
        """Write a helper in Python."""
        path = self.folder / f"docker-credential-{name}"
        path.write_text(f"#!{sys.executable} -IS\nimport os, sys, time\n{text}\n")
        path.chmod(0o755)

    async def assert_fails(self, text: str, *, timeout: float = 20.0) -> str:
        with self.assertRaises(HelperFailed) as context:
            await self.helpers.run("test", "quay.io", timeout)
        self.assertIn(text, str(context.exception))
        self.assertNotIn(SECRET, str(context.exception))
        return str(context.exception)

    async def test_the_protocol(self) -> None:
        record = self.folder.absolute() / "record"
        self.write_helper(
            "import json\n"
            f"with open({str(record)!r}, 'w') as file:\n"
            "    json.dump([sys.argv[1:], sys.stdin.read(), sorted(os.environ), os.getpgid(0) == os.getpid(),"
            " sorted(map(int, os.listdir('/proc/self/fd')))], file)\n"
            f"print({json.dumps(ANSWER)!r})"
        )
        self.assertEqual(await self.helpers.run("test", "quay.io"), BasicCredentials("AWS", SECRET))
        arguments, stdin, variables, leads_group, descriptors = json.loads(record.read_text())
        self.assertEqual(descriptors, [0, 1, 2, 3, 4])  # 3 and 4 are of the record and of the list itself
        self.assertEqual((arguments, stdin, leads_group), (["get"], "quay.io\n", True))
        self.assertEqual(set(variables) - {"LC_CTYPE"}, {"PATH", "HOME"})

    async def test_no_credentials(self) -> None:
        self.write_helper("print('credentials not found in native keychain'); sys.exit(1)")
        self.assertIsNone(await self.helpers.run("test", "quay.io"))

    async def test_a_failure_has_the_helpers_reason(self) -> None:
        self.write_helper("print('ecr: no AWS credentials'); print('more'); sys.exit(3)")
        self.assertEqual(await self.assert_fails("exit status 3"), "failed (exit status 3): ecr: no AWS credentials")
        self.write_helper("print('from stderr\\x1b[0m', file=sys.stderr); print('more', file=sys.stderr); sys.exit(1)")
        await self.assert_fails("(exit status 1): from stderr[0m")
        self.write_helper(f"print({json.dumps(ANSWER)!r}); print('token={SECRET}', file=sys.stderr); sys.exit(1)")
        self.assertEqual(await self.assert_fails("exit status 1"), "failed (exit status 1)")
        self.write_helper("os.kill(os.getpid(), 9)")
        await self.assert_fails("killed by a signal")

    async def test_garbage(self) -> None:
        for text in ("print('hello')", "pass", f'print(\'{{"Secret": "{SECRET}"\')'):
            self.write_helper(text)
            await self.assert_fails("printed")

    async def test_a_flood_is_ended(self) -> None:
        self.write_helper("while True: sys.stdout.write('x' * 65536)")
        await self.assert_fails("printed more than 65536 bytes and was killed")
        self.write_helper(f"for _ in range(300): sys.stderr.write('x' * 1024)\nprint({json.dumps(ANSWER)!r})")
        self.assertEqual(await self.helpers.run("test", "quay.io"), BasicCredentials("AWS", SECRET))

    async def test_a_helper_that_hangs_is_killed_with_its_children(self) -> None:
        pid_file = self.folder.absolute() / "pids"
        self.write_helper(
            f"child = os.fork()\nif not child:\n    time.sleep(600)\n"
            f"open({str(pid_file)!r}, 'w').write(f'{{os.getpid()}} {{child}}')\ntime.sleep(600)"
        )
        run = Deferred.fromCoroutine(self.helpers.run("test", "quay.io", 1000.0))
        while not pid_file.exists() or " " not in pid_file.read_text():
            await deferLater(reactor, 0.01)
        pids = [int(text) for text in pid_file.read_text().split()]
        self.helpers.stopService()
        with self.assertRaises(HelperFailed):
            await run
        while any(is_running(pid) for pid in pids):
            await deferLater(reactor, 0.01)

    async def test_the_time_is_limited(self) -> None:
        self.write_helper("time.sleep(600)")
        await self.assert_fails("did not answer within 0.2 s and was killed", timeout=0.2)

    async def test_a_process_that_a_helper_leaves_behind_is_ended(self) -> None:
        """It has the pipes open, so their ends say nothing."""
        self.write_helper(f"if os.fork():\n    print({json.dumps(ANSWER)!r}, flush=True)\nelse:\n    time.sleep(600)")
        self.assertEqual(await self.helpers.run("test", "quay.io"), BasicCredentials("AWS", SECRET))

    async def test_a_helper_that_ignores_its_input(self) -> None:
        self.write_helper(f"os.close(0)\nprint({json.dumps(ANSWER)!r})")
        self.assertEqual(await self.helpers.run("test", "quay.io"), BasicCredentials("AWS", SECRET))

    async def test_a_program_that_is_not_there(self) -> None:
        await self.assert_fails("is not in PATH, or cannot be executed")
        self.write_helper("pass")
        path = self.folder / "docker-credential-test"
        path.chmod(stat.S_IRUSR)
        if not os.access(path, os.X_OK):
            self.assertIsNone(helper_program("test", {"PATH": str(self.folder)}))
        path.chmod(0o755)
        path.write_text("#!/no/such/interpreter\n")
        await self.assert_fails("failed (exit status 1)")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
