"""`dockerproxy doctor`: each fault that is planted is named, and nothing else is."""

from __future__ import annotations

import datetime
import json
import resource
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon
from tests.e2e.harness.fake_registry import FakeRegistry, respond_html, respond_status
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import ACCEPT_MANIFESTS, TypedContent
from tests.e2e.harness.pki import UpstreamCA
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.upstreams import Upstreams, format_upstream_addresses


def doctor(daemon: TwistdDaemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.state_folder / "run/control.sock")]
    return subprocess.run(
        [*argv, "doctor", *arguments], env=daemon.environment, capture_output=True, text=True, timeout=60, check=False
    )


def problems(daemon: TwistdDaemon) -> dict[str, dict[str, Any]]:
    """Return the doctor's findings, by check and subject; several of one subject are numbered."""
    result = doctor(daemon, "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (1 if report["level"] == "bad" else 0), result.stderr
    found: dict[str, dict[str, Any]] = {}
    for finding in report["findings"]:
        if finding["level"] != "ok":
            name = f"{finding['check']} {finding['subject']}".strip()
            found[name if name not in found else f"{name} {len(found)}"] = finding
    return found


def test_nothing_is_wrong(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(
        REGISTRIES="registry.test:5443 basic.test fake.test",
        REGISTRY_HOSTNAME="localhost",
        CACHE_MAX_SIZE="64m",
        TRUSTED_PROXIES="127.0.0.1",  # which may reach the ports of loopback
        AUTH_REGISTRIES=f"basic.test:alice:{upstreams.users['alice']}",
    )
    assert problems(daemon) == {}
    result = doctor(daemon)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert {line[:4] for line in lines} == {"ok  "}
    assert any(line.startswith("ok    docker.io answers in ") for line in lines)
    assert any("its certificate is by the upstreams' CA" in line for line in lines)
    assert "ok    the login for basic.test in AUTH_REGISTRIES is accepted" in lines
    assert "ok    this machine's clock agrees with the registries'" in lines


def write_authority(folder: Path, *permitted: str) -> dict[str, str]:
    """Write a CA that may sign for the names `permitted` only, and return the settings with it."""
    ca = UpstreamCA(folder, "a CA with constraints")
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(name) for name in permitted]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(ca.certificate.subject)
        .issuer_name(ca.certificate.subject)
        .public_key(ca.key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=60))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.NameConstraints(names, None), critical=True)
        .sign(ca.key, hashes.SHA256())
    )
    (folder / "own.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encryption = serialization.NoEncryption()
    key = ca.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    (folder / "own.key").touch(0o600)
    (folder / "own.key").write_bytes(key)
    return {"CA_CRT_FILE": str(folder / "own.crt"), "CA_KEY_FILE": str(folder / "own.key")}


def test_clock_and_constraints(upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path) -> None:
    """All registries say that it is two hours later, and the CA, which ends soon, may not sign for one of them."""

    def respond_later(exchange: HTTPExchange, content: TypedContent | None) -> None:
        exchange.respond(200, {"Date": formatdate(time.time() + 7300, usegmt=True)}, b"{}")

    upstreams.fake.add_rule("GET", "^/v2/$", respond_later)
    addresses = dict.fromkeys(("registry-1.docker.io:443", "fake.test:443"), upstreams.fake.port)
    daemon = start_daemon(
        REGISTRIES="fake.test",
        UPSTREAM_ADDRESSES=format_upstream_addresses(addresses),
        VERIFY_SSL="false",
        REGISTRY_HOSTNAME="localhost",
        CACHE_MAX_SIZE="64m",
        TRUSTED_PROXIES="127.0.0.1",
        **write_authority(tmp_path / "own", "docker.io", "docker.com", "localhost"),
    )
    found = problems(daemon)
    assert sorted(found) == ["ca", "ca constraints", "clock"]
    assert "this machine's clock is 2 hours behind that of " in found["clock"]["sentence"]
    assert found["ca constraints"]["sentence"] == "the CA's name constraints do not permit fake.test"
    assert found["ca"]["sentence"].startswith("the CA ends on 20")


@pytest.fixture
def page() -> Iterator[FakeRegistry]:
    """Return a server that answers `/v2/` with a web page, as a captive portal does."""
    server = FakeRegistry()
    server.add_rule("GET", "^/v2/$", respond_html)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def mute() -> Iterator[int]:
    """Return a port: the kernel accepts connections to it, and nobody reads from them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_each_fault_is_named_and_nothing_else(
    upstreams: Upstreams, start_daemon: StartDaemon, page: FakeRegistry, mute: int, tmp_path: Path
) -> None:
    refused = {"selfsigned.test": 443, "expired.test": 443, "wrongname.test": 443, "closed.test": 443}
    addresses = {**upstreams.addresses, "page.test:8088": page.port, "mute.test:8089": mute}
    hosts = " ".join((*refused, "no-such-name.invalid", "http://page.test:8088", "http://mute.test:8089"))
    daemon = start_daemon(
        REGISTRIES=f"{hosts} basic.test fake.test registry.test:5443",
        UPSTREAM_ADDRESSES=format_upstream_addresses(addresses),
        PROXY_CONNECT_TIMEOUT="1s",
        PROXY_READ_TIMEOUT="1s",
        REGISTRY_HOSTNAME="no-such-host.invalid",
        CACHE_MAX_SIZE="900000g",
        AUTH_REGISTRIES="basic.test:alice:wrong",
        WORKERS="2",
    )
    own_proxy = f"http://127.0.0.1:{daemon.port}"
    daemon.stop()
    daemon.environment |= {"HTTPS_PROXY": own_proxy, "NO_PROXY": "no-such-name.invalid"}
    env_file = tmp_path / ".env"
    env_file.write_text("FROBNICATE=1\nHTTP_PROXY=http://x/\n")  # others may read the second one
    daemon.argv += ["--env-file", str(env_file)]
    daemon.start()
    # A blob that is damaged, and found.
    digest = upstreams.fake.put_blob("doctor/app", b"content that is damaged")
    url = f"https://fake.test/v2/doctor/app/blobs/{digest}"
    assert daemon.client.get(url).status == 200
    assert daemon.client.get(url).status == 200
    (data,) = (daemon.state_folder / "cache/docker").rglob("data")
    data.write_bytes(b"CONTENT that is damaged")
    argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.state_folder / "run/control.sock")]
    command = [*argv, "check", "--cached"]
    assert subprocess.run(command, env=daemon.environment, capture_output=True, timeout=60, check=False).returncode == 1
    # A registry that refuses more pulls.
    upstreams.fake.add_rule("GET", "/doctor/app/manifests/", respond_status(429, Retry_After="600"))
    upstreams.fake.add_rule("HEAD", "/doctor/app/manifests/", respond_status(429, Retry_After="600"))
    response = daemon.client.get("https://fake.test/v2/doctor/app/manifests/1", Accept=ACCEPT_MANIFESTS)
    assert response.status == 429
    # A client that was never set up.
    with socket.create_connection(("127.0.0.1", daemon.port)) as sock:
        sock.sendall(b"CONNECT fake.test:443 HTTP/1.1\r\nHost: fake.test:443\r\n\r\n")
        assert b" 200 " in sock.recv(4096)
        with pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(sock, server_hostname="fake.test")
    wait_until(lambda: "does not trust this proxy's CA" in daemon.output_text, "the client's alert arrives")
    # Files.
    (daemon.state_folder / "ca/ca.key").chmod(0o644)
    staging = daemon.state_folder / "registry/staging"
    staging.rename(staging.with_name("moved"))
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (1000, 1000))

    found = problems(daemon)
    expected = {
        "registry selfsigned.test": "does not answer: its certificate was rejected: its CA is not trusted",
        "registry expired.test": "does not answer: its certificate was rejected: it has expired",
        "registry wrongname.test": "does not answer: its certificate is for another name",
        "registry closed.test": "does not answer: connection refused",
        "registry no-such-name.invalid": "does not answer: no such name",
        "registry page.test:8088": "answers, but with a web page in place of a registry's answer",
        "registry mute.test:8089": "does not answer: ",
        "login basic.test": "the login for basic.test in AUTH_REGISTRIES is refused: basic.test answered 401",
        "budget fake.test": "fake.test refuses pulls until ",
        "disk CACHE_DIR": "CACHE_MAX_SIZE lets the cache grow by 966 TB, but CACHE_DIR has only ",
        "disk REGISTRY_DIR": "REGISTRY_DIR cannot be written: No such file or directory",
        "ca CA_DIR": "ca.key can be read by other users of this machine",
        "clients": "127.0.0.1 (",
        "name no-such-host.invalid": "no-such-host.invalid cannot be resolved on this machine",
        "proxy HTTPS_PROXY": f"HTTPS_PROXY is 127.0.0.1:{daemon.port}, which is this proxy itself",
        "files": "each process may have only 1000 files open",
        "maintenance check of the cache": "found 1 problem",
        "settings": "FROBNICATE in the environment file is no setting and has no effect",
        f"ports PROXY_LISTEN:{daemon.port}": "PROXY_LISTEN listens on 127.0.0.1 only",
        f"ports REGISTRY_LISTEN:{daemon.registry_port}": "REGISTRY_LISTEN listens on 127.0.0.1 only",
    }
    assert {name: finding["sentence"] for name, finding in found.items() if name not in expected} == {}
    for name, sentence in expected.items():
        assert name in found, name
        assert sentence in found[name]["sentence"], found[name]
        assert found[name]["advice"], name
    assert "(it is by " in found["registry selfsigned.test"]["sentence"]
    text = doctor(daemon)
    assert text.returncode == 1
    assert text.stdout.startswith("bad   ")


def sentences(daemon: TwistdDaemon) -> list[str]:
    return [finding["sentence"] for finding in json.loads(doctor(daemon, "--json").stdout)["findings"]]


def test_wildcards_are_examined_as_far_as_they_can_be(upstreams: Upstreams, start_daemon: StartDaemon) -> None:
    """Nobody knows which hosts a wildcard covers: those that have been used are asked, and the doctor says it."""
    daemon = start_daemon(
        REGISTRIES="*.wild.test fake.test",
        UPSTREAM_ADDRESSES=format_upstream_addresses({**upstreams.addresses, "a.wild.test:443": upstreams.fake.port}),
        VERIFY_SSL="false",
        CREDENTIAL_HELPERS="*.wild.test:none-such",
    )
    found = sentences(daemon)
    assert (
        "*.wild.test has not been used yet, so none of its hosts was asked, and the login for it in CREDENTIAL_HELPERS"
        " was not tried" in found
    )
    helper = "docker-credential-none-such (CREDENTIAL_HELPERS) was not asked yet, because no host of *.wild.test has"
    assert any(sentence.startswith(helper) for sentence in found)
    digest = upstreams.fake.put_blob("doctor/wild", b"of a host of the wildcard")
    assert daemon.client.get(f"https://a.wild.test/v2/doctor/wild/blobs/{digest}").status == 200
    time.sleep(2.1)  # a report counts for two seconds
    found = sentences(daemon)
    assert "*.wild.test: each host that has been used was asked (1)" in found
    assert any(sentence.startswith("a.wild.test answers in ") for sentence in found)
    # It is nobody's to know but the administrator's.
    response = request_directly("GET", f"{daemon.url}/doctor", {"Accept": "text/html"})
    assert response.status == 200 and b"wild.test" not in response.body
