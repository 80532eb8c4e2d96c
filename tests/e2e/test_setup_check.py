"""`setup | sh -s -- --check` against a real daemon, on the file trees of three distributions with their shells.

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

BUNDLES = {"debian": "ssl/certs/ca-certificates.crt", "alpine": "ssl/certs/ca-certificates.crt"}
BUNDLES["fedora"] = "pki/tls/certs/ca-bundle.crt"

SHELLS = {"debian": ["dash"], "alpine": ["busybox", "ash"], "fedora": ["bash", "--posix"]}


class CheckedHost:
    """A host that the real script has set up for `daemon`, whose engine has the environment that the script gave it."""

    def __init__(self, root: Path, distribution: str, daemon: TwistdDaemon) -> None:
        self.host = ClientHost(root, distribution)
        self.host.url = daemon.url + "/"
        self.daemon = daemon
        self.shell = SHELLS[distribution]
        self.script = request_directly("GET", daemon.url + "/setup").body.decode()
        self.bundle = self.host.etc / BUNDLES[distribution]
        self.bundle.parent.mkdir(parents=True, exist_ok=True)
        result = self.host.run(self.shell, script=self.script)
        assert result.returncode == 0, result.stderr
        self.trust(daemon.ca_file.read_bytes())
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

    def check(self) -> subprocess.CompletedProcess[str]:
        """Run the check, which must change nothing."""
        before = self.host.files()
        result = self.host.run(self.shell, "--check", script=self.script)
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


@pytest.fixture(params=sorted(BUNDLES))
def checked(request: Any, upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path) -> Iterator[CheckedHost]:
    shell = SHELLS[request.param][0]
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
