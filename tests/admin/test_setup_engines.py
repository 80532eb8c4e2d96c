"""The client set-up script: what it does to dockerd, containerd, CRI-O and podman; see conftest."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

MARK = "# Written by the set-up script of docker-registry-proxy.\n"
NEVER = "localhost,127.0.0.1,::1"
DEBIAN = "update-ca-certificates --fresh"
FOUND_NONE = "Neither dockerd, containerd, CRI-O nor podman is installed. Run this again when one is.\n"


def drop_in(url: str, no_proxy: str = NEVER) -> str:
    environment = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "NO_PROXY": no_proxy}
    return f"{MARK}[Service]\n" + "".join(f'Environment="{name}={value}"\n' for name, value in environment.items())


def restarts(*services: str) -> list[str]:
    """Return what is to be called to restart services that run under systemd."""
    calls = (f"systemctl {verb} {name}.service" for name in services for verb in ("is-active --quiet", "restart"))
    return ["systemctl daemon-reload", *calls]


def test_only_what_is_installed_is_touched(host: Any) -> None:
    host.uninstall("docker")
    before = host.files()
    done = host.run(["dash"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(FOUND_NONE)
    assert set(host.files()) - set(before) == {"usr-local-share/ca-certificates/docker_registry_proxy.crt"}
    assert host.calls == [DEBIAN, "systemctl daemon-reload"]


@pytest.mark.parametrize("shell", [["dash"], ["bash", "--posix"]])
def test_all_engines(host: Any, shell: list[str]) -> None:
    before = host.files()
    for name in ("containerd", "crio"):
        host.install(name)
    host.tool("podman", "exit 1")
    done = host.run(shell)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("docker", "containerd", "crio"):
        path = host.etc / f"systemd/system/{name}.service.d/http-proxy.conf"
        assert path.read_text() == drop_in(host.url)
    # dockerd is restarted behind containerd, on which it stands
    assert host.calls == [
        DEBIAN, *restarts("containerd", "docker", "crio"), "systemctl is-active --quiet podman.service",
    ]  # fmt: skip
    assert host.run(shell).stdout.endswith("Nothing has changed, so nothing was restarted.\n")
    assert host.calls == []
    assert host.run(shell, "--remove").returncode == 0
    assert host.calls == [
        DEBIAN, *restarts("containerd", "docker", "crio"), "systemctl is-active --quiet podman.service",
    ]  # fmt: skip
    assert host.files() == before


def test_an_engine_that_comes_later_leaves_the_others_running(host: Any) -> None:
    host.run(["dash"])
    host.install("containerd")
    done = host.run(["dash"])
    assert host.calls == restarts("containerd")
    assert "docker is set up already" in done.stdout


def test_an_engine_that_has_gone_is_forgotten_all_the_same(host: Any) -> None:
    before = host.files()
    host.run(["dash"])
    host.uninstall("docker")
    assert host.run(["dash"], "--remove").returncode == 0
    assert host.calls == [DEBIAN, "systemctl daemon-reload"]
    assert host.files() == before


def test_an_engine_that_does_not_run_is_not_started(host: Any) -> None:
    (host.root / "active/docker.service").unlink()
    done = host.run(["dash"])
    assert done.returncode == 0
    assert "systemctl restart docker.service" not in host.calls
    assert "docker is not running" in done.stdout


def test_hosts_that_were_not_proxied_stay_so(host: Any) -> None:
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


def test_removing_leaves_a_file_of_others_alone(host: Any) -> None:
    host.drop_in.parent.mkdir(parents=True)
    host.drop_in.write_text("[Service]\n")
    done = host.run(["dash"], "--remove")
    assert done.returncode == 0
    assert "Left alone" in done.stdout
    assert host.drop_in.read_text() == "[Service]\n"
    assert host.calls == []


def test_settings_that_go_before_ours_are_told(host: Any) -> None:
    shown = 'echo "Environment=HTTPS_PROXY=http://old:1/ NO_PROXY=x"'
    host.tool("systemctl", f'case "$1" in cat) test "$2" = docker.service ;; show) {shown} ;; esac')
    done = host.run(["dash"])
    assert done.returncode == 1
    assert done.stderr == (
        "Failed: docker does not use the proxy yet: another file sets HTTPS_PROXY too; see: systemctl cat docker\n"
    )
    (host.etc / "docker").mkdir()
    (host.etc / "docker/daemon.json").write_text('{"proxies": {"https-proxy": "http://old:1"}}')
    assert 'take "proxies" out of /etc/docker/daemon.json' in host.run(["dash"]).stderr


# OpenRC


@pytest.mark.parametrize("shell", [["dash"], pytest.param(["busybox", "ash"], marks=pytest.mark.skipif(
    shutil.which("busybox") is None, reason="busybox is not installed"))])  # fmt: skip
@pytest.mark.parametrize("host", ["alpine"], indirect=True)
@pytest.mark.parametrize(
    "theirs", [None, "# Options\nDOCKER_OPTS=\"--debug\"\nexport NO_PROXY='.corp.example'\n"], ids=["none", "theirs"]
)
def test_openrc(host: Any, shell: list[str], theirs: str | None) -> None:
    settings = host.etc / "conf.d/docker"
    if theirs is not None:
        settings.write_text(theirs)
    before = host.files()
    done = host.run(shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.calls == [DEBIAN, "rc-service --quiet docker status", "rc-service docker restart"]
    assert f"docker is now set up to use {host.url}: /etc/conf.d/docker\n" in done.stdout
    told = subprocess.run(
        ["sh", "-c", f'. {settings}; echo "${{DOCKER_OPTS-}}"; env'],
        capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"},
    ).stdout.splitlines()  # fmt: skip
    assert {f"HTTP_PROXY={host.url}", f"HTTPS_PROXY={host.url}"} <= set(told)
    assert f"NO_PROXY={'.corp.example,' if theirs else ''}{NEVER}" in told
    assert told[0] == ("--debug" if theirs else "")
    assert not (host.etc / "systemd").exists()

    after = host.files()
    assert host.run(shell).stdout.endswith("Nothing has changed, so nothing was restarted.\n")
    assert (host.calls, host.files()) == ([], after)
    assert host.run(shell, "--remove").returncode == 0
    assert host.files() == before


@pytest.mark.parametrize("host", ["alpine"], indirect=True)
def test_openrc_services_that_are_not_there_or_do_not_run(host: Any) -> None:
    (host.root / "active/docker.service").unlink()
    (host.tools / "containerd").symlink_to("/usr/bin/true")  # a program of another kind of installation
    done = host.run(["dash"])
    assert (done.returncode, host.calls) == (0, [DEBIAN, "rc-service --quiet docker status"])
    assert "docker is not running" in done.stdout
    assert not (host.etc / "conf.d/containerd").exists()


def test_without_systemd_and_openrc_the_rest_is_told(host: Any) -> None:
    (host.root / "run/systemd/system").rmdir()
    host.tool("podman", "exit 1")
    done = host.run(["dash"])
    assert done.returncode == 1
    assert "neither systemd nor OpenRC here. Restart yourself, with this environment: docker\n" in done.stdout
    assert f"HTTPS_PROXY={host.url}\n" in done.stdout
    assert host.anchor.exists()
    assert host.podman.exists()
    assert not host.drop_in.exists()
    assert host.calls == [DEBIAN]


# podman


def test_podmans_settings(host: Any) -> None:
    host.uninstall("docker")
    host.tool("podman", "exit 1")
    done = host.run(["dash"])
    assert (done.returncode, done.stderr) == (0, "")
    assert host.podman.read_text().startswith(MARK)
    assert tomllib.loads(host.podman.read_text()) == {
        "engine": {"env": [f"HTTP_PROXY={host.url}", f"HTTPS_PROXY={host.url}", f"NO_PROXY={NEVER}"]},
        "containers": {"http_proxy": False},
    }


@pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed")
def test_podman_itself_goes_to_the_proxy(host: Any) -> None:
    if Path("/etc/containers").is_dir():
        shutil.copytree("/etc/containers", host.etc / "containers")
    else:
        (host.etc / "containers").mkdir()
    (host.etc / "containers/policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    host.tool("podman", "exit 1")
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host.run(["dash"])
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        host.podman.write_text(host.podman.read_text().replace(host.url, proxy))

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        storage = ["--root", "/var/lib/storage", "--runroot", "/run/storage", "--storage-driver", "vfs"]
        command = ["timeout", "20", "podman", *storage, "pull", "--quiet", "registry.test/foo/bar:1"]
        done = subprocess.run(host.enter(*command, sbin=True), capture_output=True, text=True, check=False)
        thread.join(5)
    assert asked and asked[0].startswith(b"CONNECT registry.test:443 "), done.stderr
