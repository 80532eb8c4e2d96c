"""`setup | sh -s -- --check` against a real daemon, on the file trees of three distributions.

The hosts are those of the set-up script's own tests: mount namespaces, in which the engine is a process that sleeps.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.admin.conftest import ClientHost, can_mount
from tests.e2e.harness import images
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.upstreams import Upstreams

# The file with all certificates that programs trust, the directory of the administrator's, and a link to the former.
STORES = {
    "debian": ("ssl/certs/ca-certificates.crt", "/usr/local/share/ca-certificates", ""),
    "alpine": ("ssl/certs/ca-certificates.crt", "/usr/local/share/ca-certificates", "ssl/cert.pem"),
    "fedora": (
        "pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
        "/etc/pki/ca-trust/source/anchors",
        "pki/tls/certs/ca-bundle.crt",
    ),
}  # fmt: skip

TREES = {
    "debian": ("debian", ["dash"], False),
    "alpine": ("alpine", ["busybox", "ash"], True),
    "fedora": ("fedora", ["bash", "--posix"], False),
    "alpine-dash": ("alpine", ["dash"], True),
    "fedora-dash": ("fedora", ["dash"], False),
}
"""The distribution, the shell, and whether busybox has all the commands."""

NAME = "docker-registry.local"


class CheckedHost:
    """A host that the real script has set up for `daemon`, whose engine has the environment that the script gave it."""

    def __init__(self, root: Path, tree: str, daemon: TwistdDaemon) -> None:
        distribution, self.shell, busybox = TREES[tree]
        self.host = ClientHost(root, distribution, busybox=busybox)
        self.host.url = daemon.url + "/"
        self.daemon = daemon
        self.script = request_directly("GET", daemon.url + "/setup").body.decode()
        bundle, anchors, link = STORES[distribution]
        self.bundle = self.host.etc / bundle
        self.bundle.parent.mkdir(parents=True, exist_ok=True)
        if link:
            (self.host.etc / link).parent.mkdir(parents=True, exist_ok=True)
            (self.host.etc / link).symlink_to(self.bundle)
        # The real commands build the file of what is in the directories.
        command = "update-ca-trust" if distribution == "fedora" else "update-ca-certificates"
        self.host.tool(command, f"echo '# others'\ncat {anchors}/*.crt >/etc/{bundle}")
        for name in () if busybox else ("getent",):
            executable = shutil.which(name)
            assert executable is not None
            (self.host.tools / name).symlink_to(executable)
        (self.host.etc / "hosts").write_text(f"127.0.0.1 localhost {NAME}\n")
        result = self.host.run(self.shell, script=self.script)
        assert result.returncode == 0, result.stderr
        assert daemon.ca_file.read_bytes() in self.bundle.read_bytes()
        self.restart_engine(self.environment)

    @property
    def environment(self) -> dict[str, str]:
        return {"HTTP_PROXY": self.host.url, "HTTPS_PROXY": self.host.url, "NO_PROXY": "localhost,127.0.0.1,::1"}

    def trust(self, *certificates: bytes) -> None:
        """Make programs on the host trust `certificates`."""
        self.bundle.write_bytes(b"".join(certificates))

    def restart_engine(self, environment: dict[str, str]) -> None:
        """Replace the engine by one with another environment."""
        active = self.host.root / "active/docker.service"
        if active.exists() and active.read_text().strip():
            os.kill(int(active.read_text()), signal.SIGKILL)
        process = subprocess.Popen(["/bin/sleep", "300"], env=environment, start_new_session=True)
        for path in (active, self.host.root / "run/docker.pid"):
            path.write_text(f"{process.pid}\n")
        self._engine = process

    def check(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the check, which must change nothing."""
        before = self.host.files()
        result = self.host.run(self.shell, "--check", *arguments, script=self.script)
        assert self.host.files() == before
        assert [call for call in self.host.calls if "restart" in call or "update" in call] == []
        return result

    def failure(self) -> str:
        """Return the sentence with which the check fails."""
        result = self.check()
        assert result.returncode == 1, result.stdout
        (line,) = result.stderr.splitlines()
        assert line.startswith("Failed: ")
        return line.removeprefix("Failed: ")

    def stop(self) -> None:
        self._engine.kill()
        self._engine.wait()
        self.host.stop()


@pytest.fixture(params=["debian", "alpine", "fedora"])
def checked(request: Any, upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path) -> Iterator[CheckedHost]:
    shell = TREES[request.param][1][0]
    if not can_mount() or shutil.which(shell) is None:
        pytest.skip(f"needs root, mount namespaces and {shell}")
    upstreams.push_to_hub("library/hello-world", "latest", images.build_small_image("hello-world"))
    (tmp_path / "host").mkdir()
    checked = CheckedHost(tmp_path / "host", request.param, start_daemon(REGISTRIES="fake.test"))
    yield checked
    checked.stop()


def test_the_first_thing_that_is_wrong(checked: CheckedHost) -> None:
    result = checked.check()
    assert (result.returncode, result.stderr) == (0, "")
    assert "docker uses the proxy.\n" in result.stdout
    assert "docker.io/library/hello-world can be pulled through the proxy (X-Cache: MISS).\n" in result.stdout
    assert f"{NAME} resolves.\n" in result.stdout
    assert result.stdout.endswith("All is well.\n")
    certificate = checked.daemon.ca_file.read_bytes()

    # The trust store.
    checked.trust(b"")
    assert checked.failure().startswith("the trust store does not have the proxy's CA, although ")
    anchor = checked.host.anchor.read_bytes()
    checked.host.anchor.write_bytes(b"another CA\n")
    assert checked.failure().startswith("this host trusts another CA than the proxy's, which is new: ")
    checked.host.anchor.unlink()
    sentence = checked.failure()
    assert sentence.startswith("this host does not trust the proxy's CA: ")
    assert sentence.endswith(f"; run the set-up script: curl -fsS {checked.host.url}setup | sudo sh")
    checked.host.anchor.write_bytes(anchor)
    checked.trust(certificate.replace(b"\n", b"\r\n"), b"# a comment\n")
    assert checked.check().returncode == 0

    # The engine.
    checked.restart_engine({})
    assert checked.failure() == (
        "docker does not use the proxy: it has no HTTPS_PROXY; restart docker, which has not been restarted since it"
        " was set up"
    )
    checked.restart_engine({**checked.environment, "HTTPS_PROXY": "http://127.0.0.1:1/"})
    assert checked.failure().startswith("docker uses another proxy, http://127.0.0.1:1/; restart docker")
    other_name = checked.host.url.replace("127.0.0.1", "localhost")
    checked.restart_engine({**checked.environment, "HTTPS_PROXY": other_name})
    assert checked.check().returncode == 0
    for no_proxy in ("localhost,*", ".docker.io", "io", "10.0.0.0/8, fake.test", "*.docker.io:443"):
        checked.restart_engine({**checked.environment, "NO_PROXY": no_proxy})
        assert checked.failure().startswith("NO_PROXY of docker is too wide: "), no_proxy
    for no_proxy in ("localhost,127.0.0.1,::1", "ocker.io,my-fake.test,.fake.test", "fake.test:5000", "", "[::1]:443"):
        checked.restart_engine({**checked.environment, "NO_PROXY": no_proxy})
        result = checked.check()
        assert (result.returncode, result.stderr) == (0, ""), no_proxy
    checked.restart_engine(checked.environment)

    # The proxy.
    checked.daemon.stop()
    sentence = checked.failure()
    assert sentence.startswith(f"{checked.host.url} does not answer: ")
    assert sentence.endswith("; is it running, and may this host connect to it?")


@pytest.mark.parametrize("checked", ["debian"], indirect=True)
def test_podman_and_a_host_without_curl(checked: CheckedHost) -> None:
    host = checked.host
    host.tool("podman", "exit 1")
    assert checked.failure().startswith("podman does not use the proxy: it has no HTTPS_PROXY; run the set-up script: ")
    assert host.run(checked.shell, script=checked.script).returncode == 0
    result = checked.check()
    assert (result.returncode, result.stderr) == (0, "")
    assert "podman uses the proxy.\n" in result.stdout
    settings = host.podman.read_text()
    host.podman.write_text(settings.replace("NO_PROXY=", "NO_PROXY=.docker.io,"))
    assert checked.failure().startswith("NO_PROXY of podman is too wide: ")
    host.podman.write_text(settings)
    wget = shutil.which("wget")
    if wget is not None:
        (host.tools / "curl").unlink()
        (host.tools / "wget").symlink_to(wget)
        result = checked.check()
        assert (result.returncode, result.stderr) == (0, "")
        assert "can be pulled through the proxy (X-Cache: " in result.stdout


@pytest.mark.parametrize("checked", sorted(TREES), indirect=True)
def test_names_and_exit_statuses(checked: CheckedHost) -> None:
    """0: all is well; 1: something is wrong; 2: wrong usage."""
    hosts = checked.host.etc / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    result = checked.check()
    assert (result.returncode, result.stderr) == (0, "")
    assert f"Note: {NAME} does not resolve on this host. Engines reach it through the proxy." in result.stdout
    assert "All is well.\n" in result.stdout
    for no_proxy in (NAME, ".local", "localhost,local"):
        checked.restart_engine({**checked.environment, "NO_PROXY": no_proxy})
        assert checked.failure().startswith(
            f"docker reaches {NAME} without the proxy ({no_proxy}), and that name does not resolve on this host; "
        )
    hosts.write_text(f"127.0.0.1 {NAME}\n")
    assert checked.check().returncode == 0
    for name in ("getent", "ping"):
        (checked.host.tools / name).unlink(missing_ok=True)
    assert f"Whether {NAME} resolves was not checked, because neither getent nor ping" in checked.check().stdout
    for arguments in (("--remove",), ("again",), ("--ca-sha256=" + "0" * 64,)):
        result = checked.check(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("Usage: ")
    result = checked.host.run(checked.shell, "--check", user="65534", script=checked.script)
    assert result.returncode == 1
    assert "run it as root (with sudo)" in result.stderr
    checked.daemon.stop()
    result = checked.check()
    assert result.returncode == 1
    assert f"{checked.host.url} does not answer: " in result.stderr
