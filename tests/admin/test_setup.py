"""The client set-up script: what may go into it, and how it has the system trust the proxy; see conftest."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.admin.setup import setup_script

URL = "http://docker-registry.local:3128/"


def needs(command: str) -> pytest.MarkDecorator:
    """Skip a test where there is no `command`."""
    found = shutil.which(command, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return pytest.mark.skipif(found is None, reason=f"{command} is not installed")


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
    script = setup_script(url)
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
        setup_script(url)


@given(st.text(st.sampled_from("aZ0.-_:[]'\"$`\\;&|<>(){}%~!*? \n\t/@#=\u00e9\0"), min_size=1))
def test_no_host_header_gets_its_own_commands_into_the_script(host: str) -> None:
    try:
        script = setup_script(f"http://{host}/")
    except ValueError:
        return
    (line,) = (line for line in script.splitlines() if line.startswith("proxy="))
    done = subprocess.run(["sh", "-c", f'{line}\nprintf %s "$proxy"'], capture_output=True, text=True, check=True)
    told = done.stdout
    assert told.startswith("http://")
    assert set(told) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_:[]/")
    assert script.count("\n") == setup_script(URL).count("\n")


@needs("shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", "-"], input=setup_script(URL), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_truncated_download_does_nothing(shell: list[str], tmp_path: Path) -> None:
    """All commands of the path are stand-ins that leave a trace, and the shell can reach no others."""
    script = setup_script(URL)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in (
        "id",
        "mktemp",
        "curl",
        "wget",
        "sed",
        "cat",
        "mkdir",
        "mv",
        "cp",
        "rm",
        "systemctl",
        "rc-service",
        "grep",
    ):
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


# How the system comes to trust the proxy.

RESTART = ["systemctl daemon-reload", "systemctl is-active --quiet docker.service", "systemctl restart docker.service"]
DEBIAN = "update-ca-certificates --fresh"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("host", "anchor", "update"),
    [
        ("debian", "/usr/local/share/ca-certificates/docker_registry_proxy.crt", DEBIAN),
        ("fedora", "/etc/pki/ca-trust/source/anchors/docker_registry_proxy.crt", "update-ca-trust "),
        ("arch", "/etc/ca-certificates/trust-source/anchors/docker_registry_proxy.crt", "update-ca-trust "),
    ],
    indirect=["host"],
)
def test_sets_up_once_and_undoes_it(host: Any, shell: list[str], anchor: str, update: str) -> None:
    before = host.files()
    done = host.run(shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.calls == [update, *RESTART]
    assert host.anchor.read_bytes() == host.certificate
    for path in (host.drop_in, host.anchor):
        assert path.stat().st_mode & 0o777 == 0o644
    assert done.stdout.splitlines() == [
        f"The CA certificate is now trusted: {anchor}",
        f"docker is now set up to use {host.url}: /etc/systemd/system/docker.service.d/zz-docker-registry-proxy.conf",
        "docker was restarted.",
    ]

    after = host.files()
    done = host.run(shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.calls == []
    assert host.files() == after
    assert done.stdout.splitlines() == [
        f"The CA certificate is trusted already: {anchor}",
        "docker is set up already: /etc/systemd/system/docker.service.d/zz-docker-registry-proxy.conf",
        "Nothing has changed, so nothing was restarted.",
    ]

    host.certificate = b""  # what is removed need not be fetched
    done = host.run(shell, "--remove")
    assert (done.returncode, done.stderr) == (0, "")
    assert host.calls == [update, *RESTART]
    assert host.files() == before
    assert not host.drop_in.parent.exists()
    assert done.stdout.splitlines() == [
        f"The CA certificate was removed: {anchor}",
        "docker has its former settings again, without"
        " /etc/systemd/system/docker.service.d/zz-docker-registry-proxy.conf",
        "docker was restarted.",
    ]

    done = host.run(shell, "--remove")
    assert (done.returncode, host.calls) == (0, [])
    assert done.stdout == "Nothing has changed, so nothing was restarted.\n"


@pytest.mark.parametrize("host", ["fedora", "arch"], indirect=True)
def test_a_new_certificate_takes_the_old_ones_place(host: Any, certificates: list[bytes]) -> None:
    assert host.run(["dash"]).returncode == 0
    host.certificate = certificates[1]
    done = host.run(["dash"])
    assert done.returncode == 0
    assert host.calls == ["update-ca-trust ", *RESTART]
    assert host.anchor.read_bytes() == certificates[1]
    assert "docker is set up already" in done.stdout


@needs("update-ca-certificates")
def test_debians_own_trust_store_takes_it(host: Any, certificates: list[bytes]) -> None:
    commands = "ln readlink sort find basename dirname touch chmod awk xargs uniq true ls wc"
    for name in f"update-ca-certificates {commands}".split():
        (host.tools / name).unlink(missing_ok=True)
        executable = shutil.which(name, path="/usr/sbin:/usr/bin:/bin")
        assert executable is not None, name
        (host.tools / name).symlink_to(executable)
    (host.share / "ca-certificates/other.crt").write_bytes(certificates[1])
    (host.etc / "ca-certificates.conf").write_text("other.crt\n")
    (host.etc / "ssl/certs").mkdir(parents=True)
    bundle = host.etc / "ssl/certs/ca-certificates.crt"
    done = host.run(["dash"], sbin=True)
    assert done.returncode == 0, done.stderr
    assert certificates[0] in bundle.read_bytes()
    assert certificates[1] in bundle.read_bytes()
    assert host.run(["dash"], "--remove", sbin=True).returncode == 0
    assert bundle.read_bytes() == certificates[1]
    assert list((host.etc / "ssl/certs").glob("docker*")) == []


@needs("wget")
def test_wget_serves_where_curl_is_missing(host: Any) -> None:
    (host.tools / "curl").unlink()
    executable = shutil.which("wget")
    assert executable is not None
    (host.tools / "wget").symlink_to(executable)
    done = host.run(["dash"])
    assert (done.returncode, done.stderr) == (0, "")
    assert host.anchor.read_bytes() == host.certificate


def test_without_a_way_to_fetch(host: Any) -> None:
    (host.tools / "curl").unlink()
    done = host.run(["dash"])
    assert done.returncode == 1
    assert done.stderr.startswith("Failed: neither curl nor wget is installed\n")
    assert host.calls == []


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
def test_what_is_no_certificate_changes_nothing(host: Any, shell: list[str], served: bytes) -> None:
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


@pytest.mark.parametrize("status", [0, 1])
def test_what_the_trust_store_says_is_told_where_it_fails(host: Any, status: int) -> None:
    """Debian 12's warns of its own file at every run."""
    host.tool("update-ca-certificates", f"echo warning >&2; exit {status}")
    done = host.run(["dash"])
    told = f"warning\nFailed: the system's trust store could not be updated: {DEBIAN}\n" if status else ""
    assert (done.returncode, done.stderr) == (status, told)


def test_what_failed_half_way_is_completed_by_the_next_run(host: Any) -> None:
    (host.root / "fails").touch()
    done = host.run(["dash"])
    told = f"Failed: the system's trust store could not be updated: {DEBIAN}\n"
    assert (done.returncode, done.stderr) == (1, told)
    host.tool("update-ca-certificates", "true")
    done = host.run(["dash"])
    assert (done.returncode, done.stderr) == (1, "Failed: docker did not restart; see: journalctl -u docker.service\n")
    (host.root / "fails").unlink()
    assert host.run(["dash"]).returncode == 0
    assert host.calls == [DEBIAN, *RESTART]
    assert host.run(["dash"]).returncode == 0
    assert host.calls == []


def test_a_removal_that_failed_half_way_is_completed_by_the_next(host: Any) -> None:
    before = host.files()
    host.run(["dash"])
    host.tool("update-ca-certificates", "true")
    (host.root / "fails").touch()
    assert host.run(["dash"], "--remove").returncode == 1
    (host.root / "fails").unlink()
    assert host.run(["dash"], "--remove").returncode == 0
    assert host.calls == RESTART
    assert host.files() == before


def test_an_unknown_system_is_told(host: Any) -> None:
    (host.share / "ca-certificates").rmdir()
    done = host.run(["dash"])
    assert done.returncode == 1
    assert done.stderr.startswith("Failed: no trust store as Debian, Alpine, Fedora or Arch have it")
    assert host.calls == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_system_that_cannot_be_written_to_is_left_alone(host: Any, shell: list[str]) -> None:
    before = host.files()
    done = host.run(shell, read_only=True)
    assert (done.returncode, done.stderr) == (1, "Failed: /etc cannot be written to; nothing was changed\n")
    assert (host.calls, host.files()) == ([], before)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_file_that_cannot_be_written_is_told(host: Any, shell: list[str]) -> None:
    """As when the disk is full; nothing half-written is left."""
    host.tool("mv", "exit 1")
    before = host.files()
    done = host.run(shell)
    told = "Failed: /usr/local/share/ca-certificates/docker_registry_proxy.crt cannot be written\n"
    assert (done.returncode, done.stderr) == (1, told)
    assert set(host.files()) - set(before) == {"lib/docker-registry-proxy-setup.unfinished"}


def test_root_is_needed(host: Any) -> None:
    done = host.run(["dash"], user="65534")
    assert done.returncode == 1
    assert done.stderr == (
        "Failed: this changes the configuration of the system, so it has to be run as root (with sudo)\n"
    )
    assert host.calls == []


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--remov", 2), ("x --remove", 2)])
def test_usage(host: Any, argument: str, status: int) -> None:
    done = host.run(["dash"], *argument.split())
    assert done.returncode == status
    told = done.stdout if status == 0 else done.stderr
    assert f"curl -fsS {host.url}setup | sudo sh -s -- --remove" in told
    assert host.calls == []
