"""Configuration errors: the daemon does not start, and reports the reason in one sentence."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from bench.servers import free_port
from tests.e2e.harness import http_client
from tests.e2e.harness.daemon import StartDaemon, TwistdDaemon, twistd_argv
from tests.e2e.harness.upstreams import FAKE, Upstreams

INVALID_SETTINGS = {
    "CACHE_MAX_SIZE": "plenty",
    "CACHE_INACTIVE": "never",
    "REGISTRIES": "http//registry.example.com",
    "ALLOW_PUSH": "perhaps",
    "PROXY_LISTEN": "3128",
    "ALLOW_CLIENTS": "10.0.0.0/33",
    "TUNNEL_PORTS": "https",
    "UPSTREAM_ADDRESSES": "registry.example.com",
    "UPSTREAM_CA_FILE": "/nonexistent/ca.pem",
    "MANIFEST_CACHE_PRIMARY_REGEX": "(unclosed",
    "LOG_FORMAT": "xml",
    "PULL_HISTORY": "always",
    "CA_CRT_FILE": "/nonexistent/ca.crt",
    "KEEPALIVE_TIMEOUT": "soon",
    "WORKERS": "0",
    "CLIENT_MIN_RATE": "-1",
    "CREDENTIAL_HELPERS": "quay.io:/bin/sh",
    "DOCKER_CONFIG_FILE": "/nonexistent/config.json",
    "MAX_CONNECTIONS_PER_CLIENT": "none",
}


@pytest.mark.parametrize("name", INVALID_SETTINGS)
def test_invalid_setting(tmp_path: Path, name: str) -> None:
    text = startup_error(tmp_path, {name: INVALID_SETTINGS[name]})
    assert name in text


def test_password_is_not_in_the_error(tmp_path: Path) -> None:
    for entries in ("auth.docker.io:pw-operator", "registry.test:robot:pw-operator /:pw-operator2:pw-operator3"):
        text = startup_error(tmp_path, {"AUTH_REGISTRIES": entries})
        assert "AUTH_REGISTRIES" in text
        assert "pw-operator" not in text


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        text = startup_error(tmp_path, {"PROXY_LISTEN": f"tcp:{port}:interface=127.0.0.1"})
    assert str(port) in text
    assert "in use" in text


@pytest.mark.parametrize("name", ["STATE_DIR", "CACHE_DIR", "CA_DIR"])
def test_unwritable_folder(tmp_path: Path, name: str) -> None:
    """Permissions do not restrict root, so the tests use a path below a file, and one in /proc."""
    file = tmp_path / "a-file"
    file.write_text("")
    for path, expected_path in ((str(file / "below"), str(file)), ("/proc/nothing/here", "/proc/nothing")):
        assert expected_path in startup_error(tmp_path, {name: path})


def test_key_of_another_certificate(tmp_path: Path) -> None:
    ca_files, other_ca_files = make_ca_files(tmp_path, "one"), make_ca_files(tmp_path, "other")
    text = startup_error(tmp_path, {"CA_CRT_FILE": str(ca_files[0]), "CA_KEY_FILE": str(other_ca_files[1])})
    assert str(ca_files[0]) in text or str(other_ca_files[1]) in text
    assert "CA_" in text or "belong" in text


def test_expired_ca(tmp_path: Path) -> None:
    certificate, key = make_ca_files(tmp_path, "ended", valid_days=-1)
    text = startup_error(tmp_path, {"CA_CRT_FILE": str(certificate), "CA_KEY_FILE": str(key)})
    assert str(certificate) in text
    assert "expired" in text or "ended" in text


def test_ca_without_key(tmp_path: Path) -> None:
    certificate, _ = make_ca_files(tmp_path, "half")
    text = startup_error(tmp_path, {"CA_CRT_FILE": str(certificate)})
    assert "CA_KEY_FILE" in text


def test_wrong_passphrase(tmp_path: Path) -> None:
    certificate, key = make_ca_files(tmp_path, "locked", passphrase=b"open-sesame-77", algorithm="rsa")
    settings = {"CA_CRT_FILE": str(certificate), "CA_KEY_FILE": str(key)}
    assert "CA_KEY_PASSPHRASE" in startup_error(tmp_path, settings)
    text = startup_error(tmp_path, {**settings, "CA_KEY_PASSPHRASE": "wrong-phrase-99"})
    assert "CA_KEY_PASSPHRASE" in text
    assert "wrong-phrase-99" not in text


def test_certificate_without_ca_flag(tmp_path: Path) -> None:
    certificate, key = make_ca_files(tmp_path, "leaf", is_ca=False)
    text = startup_error(tmp_path, {"CA_CRT_FILE": str(certificate), "CA_KEY_FILE": str(key)})
    assert str(certificate) in text


def test_missing_env_file(tmp_path: Path) -> None:
    text = startup_error(tmp_path, {}, "--env-file", str(tmp_path / "missing.env"))
    assert "missing.env" in text


# valid settings


def test_existing_ca_is_used(upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path) -> None:
    """An RSA key with a passphrase, as rpardini/docker-registry-proxy creates it."""
    certificate, key = make_ca_files(tmp_path, "existing", passphrase=b"pw-of-the-ca", algorithm="rsa")
    daemon = start_daemon(CA_CRT_FILE=str(certificate), CA_KEY_FILE=str(key), CA_KEY_PASSPHRASE="pw-of-the-ca")
    assert daemon.ca_file.read_bytes().strip() == certificate.read_bytes().strip()
    assert daemon.client.get(f"{FAKE}/v2/").status == 200
    daemon.check_log(["pw-of-the-ca"])


def test_environment_overrides_env_file(upstreams: Upstreams, tmp_path: Path) -> None:
    port = free_port()
    login = f"alice:{upstreams.users['alice']}"
    (tmp_path / ".env").write_text(
        "# as in the README\n"
        "REGISTRIES=basic.test registry.test:5443\n"
        f"AUTH_REGISTRIES=auth.docker.io:{login} basic.test:{login}\n"
        f"PROXY_LISTEN=tcp:{port}:interface=127.0.0.1\n"
        f'UPSTREAM_ADDRESSES="{upstreams.settings["UPSTREAM_ADDRESSES"]}"\n'
        f"UPSTREAM_CA_FILE={upstreams.ca.ca_file}\n"
        "ALLOW_PUSH=true\n"
    )
    daemon = TwistdDaemon(tmp_path, {"ALLOW_PUSH": "false"})
    del daemon.environment["PROXY_LISTEN"]
    daemon.port = port
    daemon.argv += ["--env-file", str(tmp_path / ".env")]
    daemon.start()
    try:
        assert daemon.client.get("https://basic.test/v2/_catalog").status == 200
        assert daemon.client.request("POST", "https://basic.test/v2/x/blobs/uploads/").status == 405
        daemon.check_log(upstreams.secrets)
    finally:
        daemon.stop()


def test_ca_persists_over_a_restart(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    certificate_before = http_client.request_directly("GET", daemon.url + "/ca.crt").body
    daemon.restart()
    assert http_client.request_directly("GET", daemon.url + "/ca.crt").body == certificate_before


def test_cache_and_ca_directories(upstreams: Upstreams, start_daemon: StartDaemon, tmp_path: Path) -> None:
    folders = {name: tmp_path / "elsewhere" / name for name in ("CACHE_DIR", "CA_DIR")}
    daemon = start_daemon(**{name: str(folder) for name, folder in folders.items()})
    digest = upstreams.fake.put_blob("elsewhere", b"elsewhere")
    assert daemon.client.get(f"{FAKE}/v2/elsewhere/blobs/{digest}").status == 200
    for folder in folders.values():
        assert any(path.is_file() for path in folder.rglob("*"))


def startup_error(folder: Path, settings: Mapping[str, str], *options: str) -> str:
    """Start the daemon, which must fail; return its output."""
    environment = {
        **TwistdDaemon(folder / "p", {}).environment,
        "PROXY_LISTEN": f"tcp:{free_port()}:interface=127.0.0.1",
        "REGISTRY_LISTEN": f"tcp:{free_port()}:interface=127.0.0.1",
        **settings,
    }
    result = subprocess.run(
        [*twistd_argv(), "dockerproxy", *options], env=environment, cwd=folder,
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    text = result.stdout + result.stderr
    assert result.returncode != 0, text
    assert "Traceback" not in text, text
    assert "Unhandled" not in text, text
    return text


def make_ca_files(
    folder: Path,
    name: str,
    *,
    valid_days: int = 30,
    passphrase: bytes | None = None,
    algorithm: str = "ec",
    is_ca: bool = True,
) -> tuple[Path, Path]:
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = (
        rsa.generate_private_key(65537, 2048) if algorithm == "rsa" else ec.generate_private_key(ec.SECP256R1())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=valid_days))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    files = folder / f"{name}.crt", folder / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    os.chmod(files[1], 0o600)
    return files
