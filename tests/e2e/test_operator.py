"""What an operator may get wrong: the daemon does not start, and says why in one sentence."""

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
from tests.e2e.house import wire
from tests.e2e.house.daemon import Proxy, RunProxy, twistd
from tests.e2e.house.upstreams import FAKE, Upstreams

WRONG = {
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
    "CA_CRT_FILE": "/nonexistent/ca.crt",
    "KEEPALIVE_TIMEOUT": "soon",
    "WORKERS": "0",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    text = _fails(tmp_path, {name: WRONG[name]})
    assert name in text


def test_a_password_is_not_in_the_complaint(tmp_path: Path) -> None:
    for entries in ("auth.docker.io:pw-operator", "registry.test:robot:pw-operator /:pw-operator2:pw-operator3"):
        text = _fails(tmp_path, {"AUTH_REGISTRIES": entries})
        assert "AUTH_REGISTRIES" in text
        assert "pw-operator" not in text


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = _fails(tmp_path, {"PROXY_LISTEN": f"tcp:{port}:interface=127.0.0.1"})
    assert str(port) in text
    assert "in use" in text


@pytest.mark.parametrize("name", ["STATE_DIR", "CACHE_DIR", "CA_DIR"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    """Permissions do not stop root; a file in the folder's place, and a file system without files, do."""
    file = tmp_path / "a-file"
    file.write_text("")
    for place, shown in ((str(file / "below"), str(file)), ("/proc/nothing/here", "/proc/nothing")):
        assert shown in _fails(tmp_path, {name: place})


def test_a_key_that_is_not_the_certificates(tmp_path: Path) -> None:
    one, other = _ca(tmp_path, "one"), _ca(tmp_path, "other")
    text = _fails(tmp_path, {"CA_CRT_FILE": str(one[0]), "CA_KEY_FILE": str(other[1])})
    assert str(one[0]) in text or str(other[1]) in text
    assert "CA_" in text or "belong" in text


def test_a_ca_that_has_ended(tmp_path: Path) -> None:
    certificate, key = _ca(tmp_path, "ended", days=-1)
    text = _fails(tmp_path, {"CA_CRT_FILE": str(certificate), "CA_KEY_FILE": str(key)})
    assert str(certificate) in text
    assert "expired" in text or "ended" in text


def test_a_ca_of_which_half_is_missing(tmp_path: Path) -> None:
    certificate, _ = _ca(tmp_path, "half")
    text = _fails(tmp_path, {"CA_CRT_FILE": str(certificate)})
    assert "CA_KEY_FILE" in text


def test_a_wrong_pass_phrase(tmp_path: Path) -> None:
    certificate, key = _ca(tmp_path, "locked", passphrase=b"open-sesame-77", algorithm="rsa")
    settings = {"CA_CRT_FILE": str(certificate), "CA_KEY_FILE": str(key)}
    assert "CA_KEY_PASSPHRASE" in _fails(tmp_path, settings)
    text = _fails(tmp_path, {**settings, "CA_KEY_PASSPHRASE": "wrong-phrase-99"})
    assert "CA_KEY_PASSPHRASE" in text
    assert "wrong-phrase-99" not in text


def test_a_certificate_that_is_no_ca(tmp_path: Path) -> None:
    certificate, key = _ca(tmp_path, "leaf", is_ca=False)
    text = _fails(tmp_path, {"CA_CRT_FILE": str(certificate), "CA_KEY_FILE": str(key)})
    assert str(certificate) in text


def test_an_env_file_that_is_not_there(tmp_path: Path) -> None:
    text = _fails(tmp_path, {}, "--env-file", str(tmp_path / "missing.env"))
    assert "missing.env" in text


# and what is right


def test_an_existing_ca_is_used(upstreams: Upstreams, run_proxy: RunProxy, tmp_path: Path) -> None:
    """An RSA key with a pass phrase, as rpardini's tool makes them."""
    certificate, key = _ca(tmp_path, "existing", passphrase=b"pw-of-the-ca", algorithm="rsa")
    proxy = run_proxy(CA_CRT_FILE=str(certificate), CA_KEY_FILE=str(key), CA_KEY_PASSPHRASE="pw-of-the-ca")
    assert proxy.ca_file.read_bytes().strip() == certificate.read_bytes().strip()
    assert proxy.client.get(f"{FAKE}/v2/").status == 200
    proxy.check_log(["pw-of-the-ca"])


def test_settings_from_a_file_and_the_environment_above_it(upstreams: Upstreams, tmp_path: Path) -> None:
    port = free_port()
    login = f"alice:{upstreams.users['alice']}"
    (tmp_path / ".env").write_text(
        "# as in the README\n"
        "REGISTRIES=basic.test registry.test:5443\n"
        f"AUTH_REGISTRIES=auth.docker.io:{login} basic.test:{login}\n"
        f"PROXY_LISTEN=tcp:{port}:interface=127.0.0.1\n"
        f'UPSTREAM_ADDRESSES="{upstreams.settings["UPSTREAM_ADDRESSES"]}"\n'
        f"UPSTREAM_CA_FILE={upstreams.authority.file}\n"
        "ALLOW_PUSH=true\n"
    )
    proxy = Proxy(tmp_path, {"ALLOW_PUSH": "false"})
    del proxy.environment["PROXY_LISTEN"]
    proxy.port = port
    proxy.argv += ["--env-file", str(tmp_path / ".env")]
    proxy.start()
    try:
        assert proxy.client.get("https://basic.test/v2/_catalog").status == 200
        assert proxy.client.ask("POST", "https://basic.test/v2/x/blobs/uploads/").status == 405
        proxy.check_log(upstreams.secrets)
    finally:
        proxy.stop()


def test_the_ca_stays_over_a_restart(run_proxy: RunProxy) -> None:
    proxy = run_proxy()
    before = wire.request("GET", proxy.url + "/ca.crt").body
    proxy.restart()
    assert wire.request("GET", proxy.url + "/ca.crt").body == before


def test_state_is_where_the_settings_say(upstreams: Upstreams, run_proxy: RunProxy, tmp_path: Path) -> None:
    places = {name: tmp_path / "elsewhere" / name for name in ("CACHE_DIR", "CA_DIR")}
    proxy = run_proxy(**{name: str(place) for name, place in places.items()})
    digest = upstreams.fake.put_blob("elsewhere", b"elsewhere")
    assert proxy.client.get(f"{FAKE}/v2/elsewhere/blobs/{digest}").status == 200
    for place in places.values():
        assert any(path.is_file() for path in place.rglob("*"))


def _fails(folder: Path, settings: Mapping[str, str], *options: str) -> str:
    """Start the daemon, which must refuse; return what it says."""
    environment = {
        **Proxy(folder / "p", {}).environment,
        "PROXY_LISTEN": f"tcp:{free_port()}:interface=127.0.0.1",
        "REGISTRY_LISTEN": f"tcp:{free_port()}:interface=127.0.0.1",
        **settings,
    }
    done = subprocess.run(
        [*twistd(), "dockerproxy", *options], env=environment, cwd=folder, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode != 0, text
    assert "Traceback" not in text, text
    assert "Unhandled" not in text, text
    return text


def _ca(
    folder: Path,
    name: str,
    *,
    days: int = 30,
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
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    files = folder / f"{name}.crt", folder / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    os.chmod(files[1], 0o600)
    return files
