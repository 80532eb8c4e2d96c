"""A simulated host for the set-up script.

The real script runs with several shells in a mount namespace. The directories it writes to are bind mounts of the
test's directories. ``systemctl``, ``rc-service`` and the trust store's commands are stubs that record their calls. The
few other commands that the script needs are the real ones, and PATH has no others. A server on loopback serves the
certificate. Mount namespaces need root, so these tests are skipped without it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from twisted.logger import LogEvent, eventAsText, globalLogPublisher

from dockerproxy.admin.setup import setup_script

BUSYBOX_COMMANDS = "wget sed grep cat mkdir mv cp rm rmdir tr id mktemp base64 sha256sum head tail ping timeout"
COMMANDS = "curl sed grep cat mkdir mv cp rm rmdir tr id mktemp openssl base64 sha256sum head tail"

# A service is a sleeping process. Its environment is set by the unit's drop-ins, then by the EnvironmentFile= of
# Debian's units.
SYSTEMCTL = """PATH=/usr/bin
IFS='
'
drop_ins() { cat /etc/systemd/system/"$1".d/*.conf 2>/dev/null; }
case "$1" in
cat) test -e {root}/units/"$2" && { drop_ins "$2" || true; } ;;
is-active) test -e {root}/active/"$3" ;;
restart)
    test ! -e {root}/fails || exit
    kill $(cat {root}/active/"$2")
    variables=$(drop_ins "$2" | sed -n 's/^Environment=//p' | xargs -n 1; cat /etc/default/"${2%.service}")
    set -f
    env -i $variables sleep 60 >/dev/null 2>&1 </dev/null &
    echo $! >{root}/active/"$2"
    until grep -q sleep /proc/$!/comm; do :; done
    ;;
show) echo "MainPID=$(cat {root}/active/"$3" || echo 0)" ;;
esac 2>/dev/null"""
OPENRC = """case "$*" in
*status) test -e {root}/active/"$2".service ;;
*restart) test ! -e {root}/fails ;;
esac"""


class ClientHost:
    """A host to set up, with its directories and commands, and a proxy stub that serves `certificate`.

    `distribution` selects the trust store: ``debian``, ``fedora``, ``arch`` or ``alpine``. Alpine has OpenRC instead of
    systemd. dockerd is installed and running. If `busybox`, its applets are all the commands that there are.
    """

    def __init__(self, root: Path, distribution: str, *, busybox: bool = False) -> None:
        self.root = root
        self.url = ""
        self.certificate = b""
        self.etc, self.share, self.local = root / "etc", root / "usr-share", root / "usr-local-share"
        self.tools = root / "tools"
        for name in ("units", "active", "tools", "lib", "run", "sbin"):
            (root / name).mkdir()
        for directory in (self.etc, self.share, self.local):
            directory.mkdir()
        for name in (BUSYBOX_COMMANDS if busybox else COMMANDS).split():
            executable = shutil.which("busybox" if busybox else name)
            assert executable is not None, name
            (self.tools / name).symlink_to(executable)
        self.drop_in = self.etc / "systemd/system/docker.service.d/zz-docker-registry-proxy.conf"
        self.podman = self.etc / "containers/containers.conf.d/zz-docker-registry-proxy.conf"
        if distribution == "alpine":
            for directory in (root / "run/openrc", self.etc / "init.d", self.etc / "conf.d"):
                directory.mkdir(parents=True)
            self.tool("rc-service", OPENRC)
        else:
            for directory in (root / "run/systemd/system", self.etc / "systemd/system"):
                directory.mkdir(parents=True)
            self.tool("systemctl", SYSTEMCTL)
        if distribution in ("debian", "alpine"):
            (self.share / "ca-certificates").mkdir()
            anchors, command = self.local / "ca-certificates", "update-ca-certificates"
        elif distribution == "fedora":
            anchors, command = self.etc / "pki/ca-trust/source/anchors", "update-ca-trust"
            anchors.mkdir(parents=True)
        else:
            anchors, command = self.etc / "ca-certificates/trust-source/anchors", "update-ca-trust"
            anchors.mkdir(parents=True)
        self.anchor = anchors / "docker_registry_proxy.crt"
        self.tool(command, "test ! -e {root}/fails")
        self.install("docker")

    def tool(self, name: str, script: str) -> None:
        """Install a command `name` that records its call, then runs `script`."""
        path = self.tools / name
        path.unlink(missing_ok=True)
        path.write_text(
            f'#!/bin/sh\necho "{name} $*" >>{self.root}/calls\n{script.replace("{root}", str(self.root))}\n'
        )
        path.chmod(0o755)

    def install(self, service: str, *, running: bool = True) -> None:
        """Install a container engine as a service, and start it if `running`."""
        (self.root / f"units/{service}.service").touch()
        if (self.etc / "init.d").exists():
            (self.etc / "init.d" / service).touch()
        self.tool({"docker": "dockerd"}.get(service, service), "exit 1")
        if running:
            (self.root / f"active/{service}.service").touch()

    def uninstall(self, service: str) -> None:
        """Uninstall a container engine."""
        for path in (f"units/{service}.service", f"active/{service}.service", f"etc/init.d/{service}"):
            (self.root / path).unlink(missing_ok=True)
        (self.tools / {"docker": "dockerd"}.get(service, service)).unlink()

    def stop(self) -> None:
        """Kill the processes of all services."""
        for path in (self.root / "active").iterdir():
            if pid := path.read_text():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def enter(self, *command: str, sbin: bool = False, read_only: bool = False) -> list[str]:
        """Return a command line that runs `command` on this host, with the real /usr/sbin if `sbin`."""
        binds = {"etc": self.etc, "usr/share": self.share, "usr/local/share": self.local, "run": self.root / "run",
                 "var/lib": self.root / "lib", "usr/local/sbin": self.root / "sbin"}  # fmt: skip
        if not sbin:
            binds["usr/sbin"] = self.root / "sbin"
        mounts = "".join(f"mount --bind {source} /{target}\n" for target, source in binds.items())
        if read_only:
            mounts += "mount -o remount,bind,ro /etc\n"
        return ["unshare", "-m", "sh", "-c", f'set -e\n{mounts}exec "$@"', "sh", *command]

    def run(
        self,
        shell: list[str],
        *arguments: str,
        user: str | None = None,
        sbin: bool = False,
        read_only: bool = False,
        script: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run the script on this host, as the standard input of `shell`. `script` takes its place, if given."""
        (self.root / "calls").write_text("")
        # Only root can read pytest's directories, so other users get the real /usr/bin.
        environment = [
            "/usr/bin/env",
            f"PATH={self.tools if user is None else '/usr/bin'}",
            "http_proxy=http://127.0.0.1:1/",
        ]
        setpriv = [] if user is None else ["/usr/bin/setpriv", f"--reuid={user}", "--clear-groups"]
        executable = shutil.which(shell[0])
        assert executable is not None
        command = [*setpriv, *environment, executable, *shell[1:], "-s", "--", *arguments]
        command = self.enter(*command, sbin=sbin, read_only=read_only)
        text = script or setup_script(self.url)
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)

    @property
    def calls(self) -> list[str]:
        """The recorded calls of the last run, except those that only query."""
        lines = (self.root / "calls").read_text().splitlines()
        return [line for line in lines if not line.startswith(("systemctl cat ", "systemctl show "))]

    def files(self) -> dict[str, str]:
        """The host's files and their contents."""
        roots = (self.etc, self.share, self.local, self.root / "lib")
        paths = [path for root in roots for path in root.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): path.read_text() for path in paths}


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Return the list of formatted log lines that the test produces, with their tracebacks."""
    lines: list[str] = []

    def observe(event: LogEvent) -> None:
        lines.append(eventAsText(event))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


def can_mount() -> bool:
    command = ["unshare", "-m", "true"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two self-signed CA certificates with keys of the type that our CA uses."""
    directory = tmp_path_factory.mktemp("certificates")
    pems = []
    for number in "12":
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        files = ["-keyout", "key", "-out", f"{number}.crt", "-subj", f"/CN=CA {number}"]
        subprocess.run([*command, *files], cwd=directory, check=True, capture_output=True)
        pems.append((directory / f"{number}.crt").read_bytes())
    return pems


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path, certificates: list[bytes]) -> Iterator[ClientHost]:
    if not can_mount():
        pytest.skip("needs root and mount namespaces")
    host = ClientHost(tmp_path, getattr(request, "param", "debian"))
    host.certificate = certificates[0]

    class ProxyStub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/ca.crt" and host.certificate else 404)
            self.end_headers()
            self.wfile.write(host.certificate)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), ProxyStub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        host.url = f"http://127.0.0.1:{server.server_port}/"
        yield host
        host.stop()
        server.shutdown()
        thread.join()
