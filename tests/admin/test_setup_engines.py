"""The client set-up script: settings of dockerd, containerd, CRI-O and podman. conftest has the simulated host."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # runs the script in several shells

HEADER = "# Written by the set-up script of docker-registry-proxy. Another run keeps NO_PROXY and replaces the rest.\n"
NO_PROXY = "localhost,127.0.0.1,::1"
DEBIAN = "update-ca-certificates --fresh"
SHELLS = [
    ["dash"],
    ["bash", "--posix"],
    pytest.param(
        ["busybox", "ash"],
        marks=pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox is not installed"),
    ),
]
NO_ENGINE = "Neither dockerd, containerd, CRI-O nor podman is installed. Run this script again after installing one.\n"


def drop_in(url: str, no_proxy: str = NO_PROXY) -> str:
    environment = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "NO_PROXY": no_proxy}
    return f"{HEADER}[Service]\n" + "".join(f'Environment="{name}={value}"\n' for name, value in environment.items())


def restarts(*services: str) -> list[str]:
    """Return the expected calls that restart running services under systemd."""
    calls = (f"systemctl {verb} {name}.service" for name in services for verb in ("is-active --quiet", "restart"))
    return ["systemctl daemon-reload", *calls]


def test_only_installed_engines_are_configured(host: Any) -> None:
    host.uninstall("docker")
    before = host.files()
    result = host.run(["dash"])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith(NO_ENGINE)
    assert set(host.files()) - set(before) == {"usr-local-share/ca-certificates/docker_registry_proxy.crt"}
    assert host.calls == [DEBIAN, "systemctl daemon-reload"]


@pytest.mark.parametrize("shell", [["dash"], ["bash", "--posix"]])
def test_all_engines_are_configured(host: Any, shell: list[str]) -> None:
    before = host.files()
    for name in ("containerd", "crio"):
        host.install(name)
    host.tool("podman", "exit 1")
    result = host.run(shell)
    assert (result.returncode, result.stderr) == (0, "")
    for name in ("docker", "containerd", "crio"):
        path = host.etc / f"systemd/system/{name}.service.d/zz-docker-registry-proxy.conf"
        assert path.read_text() == drop_in(host.url)
    # dockerd is restarted after containerd, because it needs it
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


def test_a_later_engine_does_not_restart_the_others(host: Any) -> None:
    host.run(["dash"])
    host.install("containerd")
    result = host.run(["dash"])
    assert host.calls == restarts("containerd")
    assert "docker is already set up" in result.stdout


def test_remove_cleans_up_after_an_uninstalled_engine(host: Any) -> None:
    before = host.files()
    host.run(["dash"])
    host.uninstall("docker")
    assert host.run(["dash"], "--remove").returncode == 0
    assert host.calls == [DEBIAN, "systemctl daemon-reload"]
    assert host.files() == before


def test_an_engine_that_does_not_run_is_not_started(host: Any) -> None:
    (host.root / "active/docker.service").unlink()
    result = host.run(["dash"])
    assert result.returncode == 0
    assert "systemctl restart docker.service" not in host.calls
    assert "docker is not running" in result.stdout


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("existing", "preserved"),
    [
        ('Environment="HTTP_PROXY=http://old:1/" "NO_PROXY=.corp,127.0.0.1,*.x" "A=b"', ".corp,127.0.0.1,*.x"),
        ("Environment=NO_PROXY=a,b HTTPS_PROXY=http://old:1/", "a,b"),
        ("Environment='NO_PROXY=a, b'", "a,b"),
        ('Environment="no_proxy=10.0.0.0/8,[fd00::1]:5000"', "10.0.0.0/8,[fd00::1]:5000"),
        ('Environment="NO_PROXY=a" "no_proxy=b"', "a,b"),
        ("Environment=NO_PROXY=a\nEnvironment=NO_PROXY=b,a", "a,b"),
        ('#Environment="NO_PROXY=a"\n; Environment="NO_PROXY=b"', ""),
        ("Environment=NO_PROXY=*", ""),  # it would bypass the proxy for all hosts
        ('Environment="NO_PROXY=%h,$x,`id`,a\\b,c"', "c"),
    ],
)  # fmt: skip
def test_existing_no_proxy_is_preserved(host: Any, shell: list[str], existing: str, preserved: str) -> None:
    other = host.drop_in.with_name("http-proxy.conf")
    other.parent.mkdir(parents=True)
    other.write_text(f"[Service]\n{existing}\n")
    before = host.files()
    defaults = [name for name in NO_PROXY.split(",") if name not in preserved.split(",")]
    for _ in range(2):
        result = host.run(shell)
        assert (result.returncode, result.stderr) == (0, "")
        assert host.drop_in.read_text() == drop_in(host.url, ",".join([*filter(None, [preserved]), *defaults]))
    assert host.calls == []
    assert host.run(shell, "--remove").returncode == 0
    assert host.files() == before


def test_additions_to_no_proxy_are_preserved(host: Any) -> None:
    host.run(["dash"])
    host.drop_in.write_text(host.drop_in.read_text().replace("::1", "::1,registry.corp.example"))
    result = host.run(["dash"])
    assert "docker is already set up" in result.stdout
    assert "registry.corp.example" in host.drop_in.read_text()


@pytest.mark.parametrize("name", ["http-proxy.conf", "override.conf"])
def test_other_drop_ins_stay_and_ours_takes_precedence(host: Any, name: str) -> None:
    other = host.drop_in.with_name(name)
    other.parent.mkdir(parents=True)
    other.write_text('[Service]\nEnvironment="HTTPS_PROXY=http://old:1/" "A=b"\n')
    assert host.run(["dash"]).returncode == 0
    environment = Path(f"/proc/{(host.root / 'active/docker.service').read_text().strip()}/environ").read_text()
    assert {f"HTTPS_PROXY={host.url}", "A=b"} <= set(environment.split("\0"))
    assert host.run(["dash"], "--remove").returncode == 0
    assert list(other.parent.iterdir()) == [other]


def test_a_new_address_replaces_the_old_one(host: Any) -> None:
    for name in ("containerd", "crio"):
        host.install(name)
    host.tool("podman", "exit 1")
    assert host.run(["dash"]).returncode == 0
    old, host.url = host.url, host.url.replace("127.0.0.1", "localhost")
    result = host.run(["dash"])
    assert (result.returncode, result.stderr) == (0, "")
    assert not [text for text in host.files().values() if old in text]
    assert host.drop_in.read_text() == drop_in(host.url)
    assert host.calls == [
        *restarts("containerd", "docker", "crio"), "systemctl is-active --quiet podman.service",
    ]  # fmt: skip
    assert "The CA certificate is already trusted" in result.stdout


def test_overriding_settings_are_reported(host: Any) -> None:
    (host.etc / "default").mkdir()
    (host.etc / "default/docker").write_text("HTTPS_PROXY=http://old:1/\n")
    result = host.run(["dash"])
    assert result.returncode == 1
    assert result.stderr == (
        "Failed: docker does not use the proxy yet: HTTPS_PROXY is also set elsewhere; see: systemctl cat docker"
        " (and the files named by EnvironmentFile=)\n"
    )
    (host.etc / "docker").mkdir()
    (host.etc / "docker/daemon.json").write_text('{"proxies": {"https-proxy": "http://old:1"}}')
    assert 'remove "proxies" from /etc/docker/daemon.json' in host.run(["dash"]).stderr
    (host.etc / "default/docker").unlink()
    (host.etc / "docker/daemon.json").write_text(f'{{"proxies": {{"https-proxy": "{host.url[:-1]}"}}}}')
    assert "daemon.json" not in host.run(["dash"]).stderr


def test_unsupported_engines_are_reported(host: Any) -> None:
    (host.etc / "systemd/system/k3s.service").touch()
    result = host.run(["dash"])
    assert result.returncode == 0
    message = "because it has its own proxy and certificate settings: the engine of /etc/systemd/system/k3s.service\n"
    assert f"Not set up, {message}" in result.stdout


# OpenRC.


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("host", ["alpine"], indirect=True)
@pytest.mark.parametrize(
    "existing",
    [None, "# Options\nDOCKER_OPTS=\"--debug\"\nexport NO_PROXY='.corp.example'\n"],
    ids=["none", "existing"],
)
def test_openrc_services_are_configured(host: Any, shell: list[str], existing: str | None) -> None:
    settings = host.etc / "conf.d/docker"
    if existing is not None:
        settings.write_text(existing)
        settings.chmod(0o640)
        os.chown(settings, 0, 65534)
    before = host.files()
    result = host.run(shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert host.calls == [DEBIAN, "rc-service --quiet docker status", "rc-service docker restart"]
    assert f"docker is now set up to use {host.url}: /etc/conf.d/docker\n" in result.stdout
    output = subprocess.run(
        ["sh", "-c", f'. {settings}; echo "${{DOCKER_OPTS-}}"; env'],
        capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"},
    ).stdout.splitlines()  # fmt: skip
    assert {f"HTTP_PROXY={host.url}", f"HTTPS_PROXY={host.url}"} <= set(output)
    assert f"NO_PROXY={'.corp.example,' if existing else ''}{NO_PROXY}" in output
    assert output[0] == ("--debug" if existing else "")
    assert not (host.etc / "systemd").exists()

    status = settings.stat()
    assert (status.st_mode & 0o777, status.st_gid) == ((0o640, 65534) if existing else (0o644, 0))
    after = host.files()
    assert host.run(shell).stdout.endswith("Nothing has changed, so nothing was restarted.\n")
    assert (host.calls, host.files()) == ([], after)
    assert host.run(shell, "--remove").returncode == 0
    assert host.files() == before


@pytest.mark.parametrize("host", ["alpine"], indirect=True)
def test_missing_or_stopped_openrc_services_are_not_restarted(host: Any) -> None:
    (host.root / "active/docker.service").unlink()
    (host.tools / "containerd").symlink_to("/usr/bin/true")  # a program without a service
    result = host.run(["dash"])
    assert (result.returncode, host.calls) == (0, [DEBIAN, "rc-service --quiet docker status"])
    assert "docker is not running" in result.stdout
    assert not (host.etc / "conf.d/containerd").exists()


def test_without_systemd_and_openrc_the_environment_is_printed(host: Any) -> None:
    (host.root / "run/systemd/system").rmdir()
    host.tool("podman", "exit 1")
    result = host.run(["dash"])
    assert result.returncode == 1
    assert (
        "Neither systemd nor OpenRC is running. Restart these services with the environment below: docker\n"
        in result.stdout
    )
    assert f"HTTPS_PROXY={host.url}\n" in result.stdout
    assert host.anchor.exists()
    assert host.podman.exists()
    assert not host.drop_in.exists()
    assert host.calls == [DEBIAN]


# podman.


def test_podmans_settings_are_written(host: Any) -> None:
    host.uninstall("docker")
    host.tool("podman", "exit 1")
    host.podman.parent.parent.mkdir()
    (host.podman.parent.parent / "containers.conf").write_text('[engine]\nenv = [\n  "NO_PROXY=.corp.example",\n]\n')
    result = host.run(["dash"])
    assert (result.returncode, result.stderr) == (0, "")
    assert host.podman.read_text().startswith(HEADER)
    no_proxy = f"NO_PROXY=.corp.example,{NO_PROXY}"
    assert tomllib.loads(host.podman.read_text()) == {
        "engine": {"env": [f"HTTP_PROXY={host.url}", f"HTTPS_PROXY={host.url}", no_proxy]},
        "containers": {"http_proxy": False},
    }


@pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed")
def test_podman_connects_to_the_proxy(host: Any) -> None:
    if Path("/etc/containers").is_dir():
        shutil.copytree("/etc/containers", host.etc / "containers")
    else:
        (host.etc / "containers").mkdir()
    (host.etc / "containers/policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    host.tool("podman", "exit 1")
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host.run(["dash"])
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        host.podman.write_text(host.podman.read_text().replace(host.url, proxy))

        def respond() -> None:
            connection, _ = listener.accept()
            with connection:
                requests.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=respond, daemon=True)
        thread.start()
        storage = ["--root", "/var/lib/storage", "--runroot", "/run/storage", "--storage-driver", "vfs"]
        command = ["timeout", "20", "podman", *storage, "pull", "--quiet", "registry.test/foo/bar:1"]
        result = subprocess.run(host.enter(*command, sbin=True), capture_output=True, text=True, check=False)
        thread.join(5)
    assert requests and requests[0].startswith(b"CONNECT registry.test:443 "), result.stderr
