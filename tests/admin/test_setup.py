"""The client set-up script: what may go into it, and what it does to a system.

It is run for real, with several shells, in a mount namespace: the directories it writes to are bound to ones of the
test, ``systemctl`` and the trust store's commands are stand-ins that note how they were called, and what it fetches
comes from a server on loopback. That needs root; without it those tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.admin.setup import systemd_script

URL = "http://docker-registry.local:3128/"

def needs(command: str) -> pytest.MarkDecorator:
    """Skip a test where there is no `command`."""
    found = shutil.which(command, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return pytest.mark.skipif(found is None, reason=f"{command} is not installed")


def can_mount() -> bool:
    trial = ["unshare", "-m", "true"]
    return os.geteuid() == 0 and subprocess.run(trial, capture_output=True, check=False).returncode == 0


namespaced = pytest.mark.skipif(not can_mount(), reason="needs root and mount namespaces")

SHELLS = [
    pytest.param(command, marks=needs(command[0])) for command in (["dash"], ["bash", "--posix"], ["busybox", "ash"])
]


# What may go into it.


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("http://docker-registry.local:3128/", "http://docker-registry.local:3128/"),
        ("http://10.1.2.3:3128/", "http://10.1.2.3:3128/"),
        ("http://Proxy.Example./", "http://proxy.example:80/"),
        ("http://[2001:DB8::1]:3128/", "'http://[2001:db8::1]:3128/'"),
    ],
)
def test_the_proxys_address(url: str, written: str) -> None:
    script = systemd_script(url)
    assert f"\nproxy={written}\n" in script
    assert "@PROXY@" not in script


@pytest.mark.parametrize(
    "url",
    [
        "", "http://", "http:///", "http://host", "http://host:3128", "https://host:3128/", "HTTP://host/", "ftp://host/",
        "http://host:3128/path", "http://host:3128//", "http://host/?x", "http://host/#x", "http://user@host/",
        "http://user:password@host/", "http://host:0/", "http://host:65536/", "http://host:/", "http://host:x/",
        "http://a b/", "http://a'b/", 'http://a"b/', "http://$(id)/", "http://`id`/", "http://a;id/", "http://a%n/",
        "http://a\\b/", "http://host\n/", "http://host/\n", "http://-host/", "http://host-/", "http://caf\u00e9/",
        "http://::1/", "http://[::1/", "http://[fe80::1%eth0]/", "http://1.2.3/", "http://" + "a" * 300 + "/",
    ],
)  # fmt: skip
def test_anything_else_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not|has no"):
        systemd_script(url)


@given(st.text(st.sampled_from("aZ0.-_:[]'\"$`\\;&|<>(){}%~!*? \n\t/@#=\u00e9\0"), min_size=1))
def test_no_host_header_gets_its_own_commands_into_the_script(host: str) -> None:
    try:
        script = systemd_script(f"http://{host}/")
    except ValueError:
        return
    (line,) = (line for line in script.splitlines() if line.startswith("proxy="))
    done = subprocess.run(["sh", "-c", f'{line}\nprintf %s "$proxy"'], capture_output=True, text=True, check=True)
    told = done.stdout
    assert told.startswith("http://")
    assert set(told) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_:[]/")
    assert script.count("\n") == systemd_script(URL).count("\n")


@needs("shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", "-"], input=systemd_script(URL), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_truncated_download_does_nothing(shell: list[str], tmp_path: Path) -> None:
    """All commands of the path are stand-ins that leave a trace, and the shell can reach no others."""
    script = systemd_script(URL)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("id", "mktemp", "curl", "wget", "sed", "cat", "mkdir", "mv", "cp", "rm", "systemctl", "grep"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} >>{tmp_path}/trace\n")
        (tools / name).chmod(0o755)
    whole = len(script.rstrip("\n"))
    lines = [index + 1 for index, character in enumerate(script[:whole]) if character == "\n"]
    environment = {"PATH": str(tools)}
    executable = shutil.which(shell[0])
    assert executable is not None
    for cut in [*lines, *range(whole - 40, whole)]:
        command = [executable, *shell[1:], "-s", "--", "--remove"]
        done = subprocess.run(command, input=script[:cut].encode(), env=environment, capture_output=True, check=False)
        assert not (tmp_path / "trace").exists(), script[:cut][-100:]
        assert done.stdout == b""
    subprocess.run(command, input=script.encode(), env=environment, capture_output=True, check=False)
    assert (tmp_path / "trace").read_text() == "id\n"  # the trap works: the whole script does start


# What it does.


class Host:
    """A system to set up: its directories, its stand-in commands, and a proxy that serves `certificate`."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root = root
        self.url = ""
        self.certificate = b""
        self.etc, self.share, self.local = root / "etc", root / "usr-share", root / "usr-local-share"
        self.tools = root / "tools"
        systemd = (self.etc / "systemd/system", root / "run/systemd/system")
        for directory in (*systemd, self.share, self.local, root / "lib"):
            directory.mkdir(parents=True)
        self.tools.mkdir()
        self.drop_in = self.etc / "systemd/system/docker.service.d/http-proxy.conf"
        self.anchor = self.local / "docker_registry_proxy.crt"
        command = "trust"
        if kind == "debian":
            (self.share / "ca-certificates").mkdir()
            self.anchor, command = self.local / "ca-certificates/docker_registry_proxy.crt", "update-ca-certificates"
        elif kind == "fedora":
            self.anchor = self.etc / "pki/ca-trust/source/anchors/docker_registry_proxy.crt"
            self.anchor.parent.mkdir(parents=True)
            command = "update-ca-trust"
        self.tool(command, f"test ! -e {root}/fails")
        answers = f"is-active) test -e {root}/active ;; restart) test ! -e {root}/fails ;;"
        self.tool("systemctl", f'case "$1" in {answers} esac')
        (root / "active").touch()
        self.saved = Path(f"{self.drop_in}.before-docker-registry-proxy")

    def tool(self, name: str, then: str) -> None:
        """Put in a command `name` that notes its call and does `then`."""
        path = self.tools / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.root}/calls\n{then}\n')
        path.chmod(0o755)

    def run(
        self, shell: list[str], *arguments: str, user: str | None = None, path: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Feed the script to `shell` on this host."""
        (self.root / "calls").write_text("")
        binds = {"etc": self.etc, "usr/share": self.share, "usr/local/share": self.local, "run": self.root / "run",
                 "var/lib": self.root / "lib"}  # fmt: skip
        mounts = "".join(f"mount --bind {here} /{there}\n" for there, here in binds.items())
        environment = ["env", f"PATH={path or f'{self.tools}:/usr/bin:/bin'}", "http_proxy=http://127.0.0.1:1/"]
        become = [] if user is None else ["setpriv", f"--reuid={user}", "--clear-groups"]
        executable = shutil.which(shell[0])
        assert executable is not None
        command = [*become, *environment, executable, *shell[1:], "-s", "--", *arguments]
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", f'set -e\n{mounts}exec "$@"', "sh", *command],
            input=systemd_script(self.url), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    @property
    def calls(self) -> list[str]:
        """How the stand-ins were called in the last run."""
        return (self.root / "calls").read_text().splitlines()

    def files(self) -> set[str]:
        """The files of the system."""
        tops = (self.etc, self.share, self.local, self.root / "lib")
        return {str(path.relative_to(self.root)) for top in tops for path in top.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two certificates such as an authority of ours has."""
    directory = tmp_path_factory.mktemp("certificates")
    made = []
    for number in "12":
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        files = ["-keyout", "key", "-out", f"{number}.crt", "-subj", f"/CN=CA {number}"]
        subprocess.run([*command, *files], cwd=directory, check=True, capture_output=True)
        made.append((directory / f"{number}.crt").read_bytes())
    return made


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path, certificates: list[bytes]) -> Iterator[Host]:
    host = Host(tmp_path, getattr(request, "param", "debian"))
    host.certificate = certificates[0]

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/ca.crt" and host.certificate else 404)
            self.end_headers()
            self.wfile.write(host.certificate)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        host.url = f"http://127.0.0.1:{server.server_port}/"
        yield host
        server.shutdown()
        thread.join()


def drop_in(url: str, no_proxy: str = "localhost,127.0.0.1,::1") -> str:
    return (
        "# Written by the set-up script of docker-registry-proxy.\n[Service]\n"
        f'Environment="HTTP_PROXY={url}"\nEnvironment="HTTPS_PROXY={url}"\nEnvironment="NO_PROXY={no_proxy}"\n'
    )


RESTART = ["systemctl daemon-reload", "systemctl is-active --quiet docker.service", "systemctl restart docker.service"]


@namespaced
@pytest.mark.parametrize("shell", SHELLS)
def test_sets_up_once_and_undoes_it(host: Host, shell: list[str]) -> None:
    before = host.files()
    done = host.run(shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.calls == ["update-ca-certificates --fresh", *RESTART]
    assert host.drop_in.read_text() == drop_in(host.url)
    assert host.anchor.read_bytes() == host.certificate
    for path in (host.drop_in, host.anchor):
        assert path.stat().st_mode & 0o777 == 0o644
    assert done.stdout.splitlines() == [
        "The CA certificate is now trusted: /usr/local/share/ca-certificates/docker_registry_proxy.crt",
        f"docker is now set up to use {host.url}: /etc/systemd/system/docker.service.d/http-proxy.conf",
        "docker was restarted.",
    ]

    done = host.run(shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.calls == []
    assert done.stdout.endswith("Nothing has changed, so docker was not restarted.\n")

    host.certificate = b""  # what is removed need not be fetched
    done = host.run(shell, "--remove")
    assert (done.returncode, done.stderr) == (0, "")
    assert host.calls == ["update-ca-certificates --fresh", *RESTART]
    assert host.files() == before
    assert not host.drop_in.parent.exists()

    done = host.run(shell, "--remove")
    assert (done.returncode, host.calls) == (0, [])


@namespaced
@pytest.mark.parametrize(
    ("host", "trusting", "forgetting"),
    [
        ("fedora", "update-ca-trust ", "update-ca-trust "),
        ("arch", "trust anchor --store ANCHOR", "trust anchor --remove ANCHOR"),
    ],
    indirect=["host"],
)
def test_other_trust_stores(host: Host, trusting: str, forgetting: str, certificates: list[bytes]) -> None:
    anchor = "/usr/local/share/docker_registry_proxy.crt"
    trusting, forgetting = trusting.replace("ANCHOR", anchor), forgetting.replace("ANCHOR", anchor)
    before = host.files()
    assert host.run(["dash"]).returncode == 0
    assert host.calls == [trusting, *RESTART]
    assert host.anchor.read_bytes() == certificates[0]
    assert host.run(["dash"]).returncode == 0
    assert host.calls == []
    host.certificate = certificates[1]
    assert host.run(["dash"]).returncode == 0
    assert host.calls == [forgetting, trusting, *RESTART]
    assert host.anchor.read_bytes() == certificates[1]
    assert host.run(["dash"], "--remove").returncode == 0
    assert host.calls == [forgetting, *RESTART]
    assert host.files() == before


@namespaced
@needs("update-ca-certificates")
def test_debians_own_trust_store_takes_it(host: Host, certificates: list[bytes]) -> None:
    (host.tools / "update-ca-certificates").unlink()
    (host.share / "ca-certificates/other.crt").write_bytes(certificates[1])
    (host.etc / "ca-certificates.conf").write_text("other.crt\n")
    (host.etc / "ssl/certs").mkdir(parents=True)
    bundle = host.etc / "ssl/certs/ca-certificates.crt"
    done = host.run(["dash"])
    assert done.returncode == 0, done.stderr
    assert certificates[0] in bundle.read_bytes()
    assert certificates[1] in bundle.read_bytes()
    assert host.run(["dash"], "--remove").returncode == 0
    assert bundle.read_bytes() == certificates[1]
    assert list((host.etc / "ssl/certs").glob("docker*")) == []


@namespaced
@needs("wget")
def test_wget_serves_where_curl_is_missing(host: Host) -> None:
    for name in "wget sed grep cat mkdir mv cp rm rmdir tr tail id mktemp openssl".split():
        executable = shutil.which(name)
        assert executable is not None
        (host.tools / name).symlink_to(executable)
    done = host.run(["dash"], path=str(host.tools))
    assert (done.returncode, done.stderr) == (0, "")
    assert host.anchor.read_bytes() == host.certificate


@namespaced
def test_without_a_way_to_fetch(host: Host) -> None:
    for name in ("id", "mktemp", "rm"):
        (host.tools / name).symlink_to(f"/usr/bin/{name}")
    done = host.run(["dash"], path=str(host.tools))
    assert (done.returncode, done.stderr) == (1, "Failed: neither curl nor wget is installed\n")
    assert host.calls == []


@namespaced
def test_a_new_certificate_restarts_docker(host: Host, certificates: list[bytes]) -> None:
    host.run(["dash"])
    host.certificate = certificates[1]
    done = host.run(["dash"])
    assert done.returncode == 0
    assert host.calls[-1] == "systemctl restart docker.service"
    assert host.anchor.read_bytes() == certificates[1]
    assert "docker is set up already" in done.stdout


@namespaced
def test_docker_that_does_not_run_is_not_started(host: Host) -> None:
    (host.root / "active").unlink()
    done = host.run(["dash"])
    assert done.returncode == 0
    assert "systemctl restart docker.service" not in host.calls
    assert "docker is not running" in done.stdout


@namespaced
def test_hosts_that_were_not_proxied_stay_so(host: Host) -> None:
    host.drop_in.parent.mkdir(parents=True)
    theirs = '[Service]\nEnvironment="HTTP_PROXY=http://old:1/" "NO_PROXY=.corp.example,127.0.0.1,*.x" "A=b"\n'
    host.drop_in.write_text(theirs)
    done = host.run(["dash"])
    assert done.returncode == 0
    assert host.drop_in.read_text() == drop_in(host.url, ".corp.example,127.0.0.1,*.x,localhost,::1")
    assert host.saved.read_text() == theirs
    assert "The file that was there is kept" in done.stdout
    assert host.run(["dash"]).returncode == 0
    assert host.calls == []
    assert host.run(["dash"], "--remove").returncode == 0
    assert host.drop_in.read_text() == theirs
    assert not host.saved.exists()


@namespaced
def test_removing_leaves_a_file_of_others_alone(host: Host) -> None:
    host.drop_in.parent.mkdir(parents=True)
    host.drop_in.write_text("[Service]\n")
    done = host.run(["dash"], "--remove")
    assert done.returncode == 0
    assert "Left alone" in done.stdout
    assert host.drop_in.read_text() == "[Service]\n"
    assert host.calls == []


@namespaced
@pytest.mark.parametrize(
    "served",
    [
        b"",
        b"<html>Sign in</html>",
        b"-----BEGIN CERTIFICATE-----\n<html>\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        b"half",
        b"twice",
        b"with a key",
    ],
)
@pytest.mark.parametrize("shell", SHELLS)
def test_what_is_no_certificate_changes_nothing(host: Host, shell: list[str], served: bytes) -> None:
    good = host.certificate
    key = b"-----BEGIN PRIVATE KEY-----\n"
    named = {b"half": good[: len(good) // 2], b"twice": good * 2, b"with a key": key + good}
    host.certificate = named.get(served, served)
    before = host.files()
    done = host.run(shell)
    assert done.returncode == 1
    wrong = "cannot be fetched" if served == b"" else "is not a certificate; nothing was changed"
    assert done.stderr.endswith(f"Failed: {host.url}ca.crt {wrong}\n")
    assert (host.calls, host.files()) == ([], before)


@namespaced
def test_what_failed_half_way_is_completed_by_the_next_run(host: Host) -> None:
    (host.root / "fails").touch()
    done = host.run(["dash"])
    assert (done.returncode, done.stderr) == (1, "Failed: the system did not take the CA certificate\n")
    host.tool("update-ca-certificates", "true")
    done = host.run(["dash"])
    assert (done.returncode, done.stderr) == (1, "Failed: docker did not restart; see: journalctl -u docker.service\n")
    (host.root / "fails").unlink()
    assert host.run(["dash"]).returncode == 0
    assert host.calls == ["update-ca-certificates --fresh", "update-ca-certificates --fresh", *RESTART]
    assert host.run(["dash"]).returncode == 0
    assert host.calls == []


@namespaced
def test_without_systemd_the_certificate_goes_in_and_the_rest_is_told(host: Host) -> None:
    (host.root / "run/systemd/system").rmdir()
    done = host.run(["busybox", "ash"] if shutil.which("busybox") else ["dash"])
    assert done.returncode == 1
    assert "There is no systemd here." in done.stdout
    assert f"HTTPS_PROXY={host.url}\n" in done.stdout
    assert "/etc/conf.d/docker" in done.stdout
    assert host.anchor.exists()
    assert not host.drop_in.exists()
    assert host.calls == ["update-ca-certificates --fresh"]


@namespaced
def test_an_unknown_system_is_told(host: Host) -> None:
    (host.share / "ca-certificates").rmdir()
    done = host.run(["dash"])
    assert done.returncode == 1
    assert done.stderr.startswith("Failed: no trust store as Debian, Alpine, Fedora or Arch have it")
    assert host.calls == []


@namespaced
def test_root_is_needed(host: Host) -> None:
    done = host.run(["dash"], user="65534")
    assert done.returncode == 1
    assert done.stderr == (
        "Failed: this changes the configuration of the system, so it has to be run as root (with sudo)\n"
    )
    assert host.calls == []


@namespaced
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--remov", 2), ("x --remove", 2)])
def test_usage(host: Host, argument: str, status: int) -> None:
    done = host.run(["dash"], *argument.split())
    assert done.returncode == status
    told = done.stdout if status == 0 else done.stderr
    assert f"curl -fsS {host.url}setup/systemd | sudo sh -s -- --remove" in told
    assert host.calls == []
