"""The client set-up script: its template, and the trust store. conftest describes the simulated host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.admin.setup import setup_script

pytestmark = pytest.mark.slow  # runs the script in several shells

URL = "http://docker-registry.local:3128/"


def requires_command(command: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test if `command` is not installed."""
    path = shutil.which(command, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return pytest.mark.skipif(path is None, reason=f"{command} is not installed")


SHELLS = [
    pytest.param(command, marks=requires_command(command[0]))
    for command in (["dash"], ["bash", "--posix"], ["busybox", "ash"])
]


# The template.


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://docker-registry.local:3128/", "http://docker-registry.local:3128/"),
        ("http://10.1.2.3:3128/", "http://10.1.2.3:3128/"),
        ("http://Proxy.Example./", "http://proxy.example:80/"),
        ("http://[2001:DB8::1]:3128/", "'http://[2001:db8::1]:3128/'"),
    ],
)
def test_the_script_contains_the_proxys_address(url: str, expected: str) -> None:
    script = setup_script(url)
    assert f"\nproxy={expected}\n" in script
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
def test_invalid_urls_are_rejected(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not|has no"):
        setup_script(url)


@given(st.text(st.sampled_from("aZ0.-_:[]'\"$`\\;&|<>(){}%~!*? \n\t/@#=\u00e9\0"), min_size=1))
def test_no_host_header_can_inject_commands(host: str) -> None:
    try:
        script = setup_script(f"http://{host}/")
    except ValueError:
        return
    (line,) = (line for line in script.splitlines() if line.startswith("proxy="))
    result = subprocess.run(["sh", "-c", f'{line}\nprintf %s "$proxy"'], capture_output=True, text=True, check=True)
    printed = result.stdout
    assert printed.startswith("http://")
    assert set(printed) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_:[]/")
    assert script.count("\n") == setup_script(URL).count("\n")


@requires_command("shellcheck")
def test_shellcheck_is_clean() -> None:
    result = subprocess.run(["shellcheck", "-"], input=setup_script(URL), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_truncated_download_does_nothing(shell: list[str], tmp_path: Path) -> None:
    """Every command in PATH is a stub that leaves a trace."""
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
        result = subprocess.run(command, input=script[:cut].encode(), env=environment, capture_output=True, check=False)
        assert not (tmp_path / "trace").exists(), script[:cut][-100:]
        assert result.stdout == b""
    subprocess.run(command, input=script.encode(), env=environment, capture_output=True, check=False)
    assert (tmp_path / "trace").read_text() == "id\n"  # control: the complete script does run a stub


# The trust store.

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
def test_setup_is_idempotent_and_reversible(host: Any, shell: list[str], anchor: str, update: str) -> None:
    before = host.files()
    result = host.run(shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert host.calls == [update, *RESTART]
    assert host.anchor.read_bytes() == host.certificate
    for path in (host.drop_in, host.anchor):
        assert path.stat().st_mode & 0o777 == 0o644
    assert result.stdout.splitlines() == [
        f"The CA certificate is now trusted: {anchor}",
        f"docker is now set up to use {host.url}: /etc/systemd/system/docker.service.d/zz-docker-registry-proxy.conf",
        "docker was restarted.",
    ]

    after = host.files()
    result = host.run(shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert host.calls == []
    assert host.files() == after
    assert result.stdout.splitlines() == [
        f"The CA certificate is already trusted: {anchor}",
        "docker is already set up: /etc/systemd/system/docker.service.d/zz-docker-registry-proxy.conf",
        "Nothing has changed, so nothing was restarted.",
    ]

    host.certificate = b""  # --remove needs no certificate from the proxy
    result = host.run(shell, "--remove")
    assert (result.returncode, result.stderr) == (0, "")
    assert host.calls == [update, *RESTART]
    assert host.files() == before
    assert not host.drop_in.parent.exists()
    assert result.stdout.splitlines() == [
        f"The CA certificate was removed: {anchor}",
        "The proxy settings of docker were removed: /etc/systemd/system/docker.service.d/zz-docker-registry-proxy.conf",
        "docker was restarted.",
    ]

    result = host.run(shell, "--remove")
    assert (result.returncode, host.calls) == (0, [])
    assert result.stdout == "Nothing has changed, so nothing was restarted.\n"


@pytest.mark.parametrize("host", ["fedora", "arch"], indirect=True)
def test_a_new_certificate_replaces_the_old_one(host: Any, certificates: list[bytes]) -> None:
    assert host.run(["dash"]).returncode == 0
    host.certificate = certificates[1]
    result = host.run(["dash"])
    assert result.returncode == 0
    assert host.calls == ["update-ca-trust ", *RESTART]
    assert host.anchor.read_bytes() == certificates[1]
    assert "docker is already set up" in result.stdout


@requires_command("update-ca-certificates")
def test_the_debian_trust_store_is_updated(host: Any, certificates: list[bytes]) -> None:
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
    result = host.run(["dash"], sbin=True)
    assert result.returncode == 0, result.stderr
    assert certificates[0] in bundle.read_bytes()
    assert certificates[1] in bundle.read_bytes()
    assert host.run(["dash"], "--remove", sbin=True).returncode == 0
    assert bundle.read_bytes() == certificates[1]
    assert list((host.etc / "ssl/certs").glob("docker*")) == []


@requires_command("wget")
def test_wget_is_used_if_curl_is_missing(host: Any) -> None:
    (host.tools / "curl").unlink()
    executable = shutil.which("wget")
    assert executable is not None
    (host.tools / "wget").symlink_to(executable)
    result = host.run(["dash"])
    assert (result.returncode, result.stderr) == (0, "")
    assert host.anchor.read_bytes() == host.certificate


def test_without_curl_and_wget_nothing_is_changed(host: Any) -> None:
    (host.tools / "curl").unlink()
    result = host.run(["dash"])
    assert result.returncode == 1
    assert result.stderr.startswith("Failed: neither curl nor wget is installed\n")
    assert host.calls == []


@pytest.mark.parametrize(
    "content",
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
def test_an_invalid_certificate_changes_nothing(host: Any, shell: list[str], content: bytes) -> None:
    valid = host.certificate
    key = b"-----BEGIN PRIVATE KEY-----\n"
    variants = {b"half": valid[: len(valid) // 2], b"twice": valid * 2, b"with a key": key + valid}
    host.certificate = variants.get(content, content)
    before = host.files()
    result = host.run(shell)
    assert result.returncode == 1
    url = f"{host.url}ca.crt"
    reason = f"cannot fetch {url}" if content == b"" else f"{url} is not a certificate; nothing was changed"
    assert result.stderr.endswith(f"Failed: {reason}\n")
    assert (host.calls, host.files()) == ([], before)


def fingerprint(certificate: bytes) -> str:
    """Return the fingerprint in the form in which openssl and `dockerproxy status` print it."""
    command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256"]
    output = subprocess.run(command, input=certificate, capture_output=True, check=True).stdout.decode()
    return output.strip().partition("=")[2]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("form", ["{0}", "{1}", "={0}", "={2}"])
def test_the_expected_certificate_is_installed(host: Any, shell: list[str], form: str) -> None:
    expected = fingerprint(host.certificate)
    forms = expected, expected.replace(":", "").lower(), expected.lower()
    argument = form.format(*forms)
    arguments = [f"--ca-sha256{argument}"] if argument.startswith("=") else ["--ca-sha256", argument]
    result = host.run(shell, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert host.anchor.read_bytes() == host.certificate


@pytest.mark.parametrize("shell", SHELLS)
def test_another_certificate_than_the_expected_one_changes_nothing(
    host: Any, shell: list[str], certificates: list[bytes]
) -> None:
    before = host.files()
    result = host.run(shell, "--ca-sha256", fingerprint(certificates[1]))
    found, expected = (fingerprint(certificate).replace(":", "").lower() for certificate in certificates)
    reason = f"{host.url}ca.crt is another CA certificate: its SHA-256 is {found}, not {expected}; nothing was changed"
    assert (result.returncode, result.stderr) == (1, f"Failed: {reason}\n")
    assert (host.calls, host.files()) == ([], before)


def test_a_trusted_certificate_is_compared_too(host: Any, certificates: list[bytes]) -> None:
    assert host.run(["dash"]).returncode == 0
    result = host.run(["dash"], "--ca-sha256", fingerprint(certificates[1]))
    assert result.returncode == 1
    assert "is another CA certificate" in result.stderr
    assert host.calls == []


@pytest.mark.parametrize("command", ["sha256sum", "base64"])
def test_without_the_tools_to_compare_nothing_is_changed(host: Any, command: str) -> None:
    (host.tools / command).unlink()
    before = host.files()
    result = host.run(["dash"], "--ca-sha256", fingerprint(host.certificate))
    assert result.returncode == 1
    assert "cannot compare the CA certificate" in result.stderr
    assert (host.calls, host.files()) == ([], before)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("argument", ["", "AB", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + " --remove", "x\n" + "0" * 64])
def test_a_malformed_fingerprint_changes_nothing(host: Any, shell: list[str], argument: str) -> None:
    result = host.run(shell, "--ca-sha256", argument)
    assert result.returncode == 2
    assert "expects the 64 hexadecimal digits" in result.stderr
    assert host.calls == []


@pytest.mark.parametrize("status", [0, 1])
def test_trust_store_output_is_printed_on_failure(host: Any, status: int) -> None:
    """The output of a successful run is hidden, because Debian 12's tool warns about its own file at every run."""
    host.tool("update-ca-certificates", f"echo warning >&2; exit {status}")
    result = host.run(["dash"])
    stderr = f"warning\nFailed: cannot update the system's trust store: {DEBIAN}\n" if status else ""
    assert (result.returncode, result.stderr) == (status, stderr)


def test_the_next_run_completes_a_failed_setup(host: Any) -> None:
    (host.root / "fails").touch()
    result = host.run(["dash"])
    stderr = f"Failed: cannot update the system's trust store: {DEBIAN}\n"
    assert (result.returncode, result.stderr) == (1, stderr)
    host.tool("update-ca-certificates", "true")
    result = host.run(["dash"])
    assert (result.returncode, result.stderr) == (
        1,
        "Failed: docker did not restart; see: journalctl -u docker.service\n",
    )
    (host.root / "fails").unlink()
    assert host.run(["dash"]).returncode == 0
    assert host.calls == [DEBIAN, *RESTART]
    assert host.run(["dash"]).returncode == 0
    assert host.calls == []


def test_the_next_run_completes_a_failed_removal(host: Any) -> None:
    before = host.files()
    host.run(["dash"])
    host.tool("update-ca-certificates", "true")
    (host.root / "fails").touch()
    assert host.run(["dash"], "--remove").returncode == 1
    (host.root / "fails").unlink()
    assert host.run(["dash"], "--remove").returncode == 0
    assert host.calls == RESTART
    assert host.files() == before


def test_an_unknown_system_is_reported(host: Any) -> None:
    (host.share / "ca-certificates").rmdir()
    result = host.run(["dash"])
    assert result.returncode == 1
    assert result.stderr.startswith("Failed: found no trust store of Debian, Alpine, Fedora or Arch")
    assert host.calls == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_read_only_system_is_unchanged(host: Any, shell: list[str]) -> None:
    before = host.files()
    result = host.run(shell, read_only=True)
    assert (result.returncode, result.stderr) == (1, "Failed: /etc is not writable; nothing was changed\n")
    assert (host.calls, host.files()) == ([], before)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_failed_write_is_reported(host: Any, shell: list[str]) -> None:
    """A failing write, for example on a full disk, leaves no partial file."""
    host.tool("mv", "exit 1")
    before = host.files()
    result = host.run(shell)
    stderr = "Failed: cannot write /usr/local/share/ca-certificates/docker_registry_proxy.crt\n"
    assert (result.returncode, result.stderr) == (1, stderr)
    assert set(host.files()) - set(before) == {"lib/docker-registry-proxy-setup.unfinished"}


def test_the_script_needs_root(host: Any) -> None:
    result = host.run(["dash"], user="65534")
    assert result.returncode == 1
    assert result.stderr == "Failed: this script changes the system configuration; run it as root (with sudo)\n"
    assert host.calls == []


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--remov", 2), ("x --remove", 2)])
def test_help_and_wrong_arguments_print_the_usage(host: Any, argument: str, status: int) -> None:
    result = host.run(["dash"], *argument.split())
    assert result.returncode == status
    output = result.stdout if status == 0 else result.stderr
    assert f"curl -fsS {host.url}setup | sudo sh -s -- --remove" in output
    assert host.calls == []
