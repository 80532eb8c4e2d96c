"""Tests for the CA that the daemon creates: file modes, recovery after a crash at any point, concurrent starts."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from dockerproxy.proxy.issuer import DAY, AuthorityError, Issuer
from dockerproxy.proxy.local_ca import load_or_create_issuer

PROJECT = Path(__file__).parents[2]
NOW = time.time()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def der(issuer: Issuer) -> bytes:
    return issuer.certificate.public_bytes(serialization.Encoding.DER)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)


class SimulatedKill(BaseException):
    """Simulates SIGKILL. It is a BaseException, because our code must not catch it."""


def test_root_certificate_is_a_self_signed_ca(tmp_path: Path) -> None:
    root = load_or_create_issuer(tmp_path / "ca", None, NOW).certificate
    assert isinstance(root.public_key(), ec.EllipticCurvePublicKey)
    (common_name,) = root.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert str(common_name.value).startswith("docker-registry-proxy CA (")
    assert root.issuer == root.subject
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature
    purposes = root.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert list(purposes.value) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_root_is_valid_for_ten_years(tmp_path: Path) -> None:
    issuer = load_or_create_issuer(tmp_path, None, NOW)
    assert issuer.not_before == int(NOW - 2 * DAY)
    assert issuer.not_after == int(NOW + 3650 * DAY)
    assert issuer.warnings == ()


def test_long_hostname_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "h" * 64)
    (name,) = load_or_create_issuer(tmp_path, None, NOW).certificate.subject.get_attributes_for_oid(
        x509.NameOID.COMMON_NAME
    )
    assert name.value == f"docker-registry-proxy CA ({'h' * 36})"


def test_two_authorities_of_one_host_have_different_names(tmp_path: Path) -> None:
    one, other = (load_or_create_issuer(tmp_path / name, None, NOW).certificate.subject for name in ("a", "b"))
    assert one != other


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        load_or_create_issuer(tmp_path / "state" / "ca", None, NOW)
    assert mode(tmp_path / "state" / "ca") == 0o700
    assert mode(tmp_path / "state" / "ca" / "ca.key") == 0o600
    assert mode(tmp_path / "state" / "ca" / "ca.crt") == 0o644
    assert sorted(path.name for path in (tmp_path / "state" / "ca").iterdir()) == ["ca.crt", "ca.key", "ca.lock"]


def test_the_key_is_private_from_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observations: list[tuple[str, int, int]] = []
    fchmod = os.fchmod

    def observe(descriptor: int, mode: int) -> None:
        status = os.fstat(descriptor)
        observations.append((os.readlink(f"/proc/self/fd/{descriptor}"), stat.S_IMODE(status.st_mode), status.st_size))
        fchmod(descriptor, mode)

    monkeypatch.setattr("os.fchmod", observe)
    with umask(0):
        load_or_create_issuer(tmp_path, None, NOW)
    assert observations == [(str(tmp_path / "ca.key.new"), 0o600, 0), (str(tmp_path / "ca.crt.new"), 0o644, 0)]


def test_an_existing_directory_keeps_its_mode(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    load_or_create_issuer(directory, None, NOW)
    assert mode(directory) == 0o755


def test_later_start_reuses_the_ca(tmp_path: Path) -> None:
    first = load_or_create_issuer(tmp_path, None, NOW)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert der(load_or_create_issuer(tmp_path, None, NOW + 365 * DAY)) == der(first)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_passphrase_encrypts_the_key(tmp_path: Path) -> None:
    first = load_or_create_issuer(tmp_path, "pa\u00dfwort", NOW)
    assert b"ENCRYPTED" in (tmp_path / "ca.key").read_bytes()
    assert der(load_or_create_issuer(tmp_path, "pa\u00dfwort", NOW)) == der(first)
    with pytest.raises(AuthorityError, match=r"ca\.key is encrypted, but CA_KEY_PASSPHRASE is not set"):
        load_or_create_issuer(tmp_path, None, NOW)


def test_readable_key_is_made_private(tmp_path: Path) -> None:
    load_or_create_issuer(tmp_path, None, NOW)
    (tmp_path / "ca.key").chmod(0o644)
    assert load_or_create_issuer(tmp_path, None, NOW).warnings == ()
    assert mode(tmp_path / "ca.key") == 0o600


def test_warning_if_the_key_cannot_be_made_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_or_create_issuer(tmp_path, None, NOW)
    (tmp_path / "ca.key").chmod(0o640)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    (warning,) = load_or_create_issuer(tmp_path, None, NOW).warnings
    assert warning == f"CA_DIR: {tmp_path}/ca.key is readable by other users; set its mode to 0600"


# Crashes.


@pytest.mark.parametrize("call", ["os.open", "os.fchmod", "os.fsync", "pathlib.Path.rename"])
@pytest.mark.parametrize("index", range(7))
def test_next_start_recovers_from_a_kill_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, index: int
) -> None:
    module, _, name = call.rpartition(".")
    target = Path if module == "pathlib.Path" else os
    original, calls = getattr(target, name), []

    def kill_at_index(*arguments: object, **keywords: object) -> object:
        calls.append(arguments)
        if len(calls) == index + 1:
            raise SimulatedKill
        return original(*arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(target, name, kill_at_index)
        try:
            load_or_create_issuer(tmp_path, None, NOW)
        except SimulatedKill:
            pass
    key = (tmp_path / "ca.key").read_bytes() if (tmp_path / "ca.key").exists() else None
    published = (tmp_path / "ca.crt").read_bytes() if (tmp_path / "ca.crt").exists() else None
    completed = load_or_create_issuer(tmp_path, None, NOW)
    assert key in (None, (tmp_path / "ca.key").read_bytes())
    assert published in (None, completed.certificate.public_bytes(serialization.Encoding.PEM))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.crt", "ca.key", "ca.lock"]


def test_missing_certificate_is_recreated(tmp_path: Path) -> None:
    load_or_create_issuer(tmp_path, None, NOW)
    key = (tmp_path / "ca.key").read_bytes()
    (tmp_path / "ca.crt").unlink()
    load_or_create_issuer(tmp_path, None, NOW)
    assert (tmp_path / "ca.key").read_bytes() == key


def test_missing_key_is_an_error(tmp_path: Path) -> None:
    load_or_create_issuer(tmp_path, None, NOW)
    (tmp_path / "ca.key").unlink()
    certificate = (tmp_path / "ca.crt").read_bytes()
    with pytest.raises(AuthorityError, match=r"^CA_DIR: .*/ca\.crt exists but its key .*/ca\.key is missing: "):
        load_or_create_issuer(tmp_path, None, NOW)
    assert (tmp_path / "ca.crt").read_bytes() == certificate
    assert not (tmp_path / "ca.key").exists()


# Concurrent starts.


def test_concurrent_threads_get_the_same_issuer(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        issuers = list(pool.map(lambda _: load_or_create_issuer(tmp_path / "ca", None, NOW), range(16)))
    assert len({der(issuer) for issuer in issuers}) == 1


def test_concurrent_processes_get_the_same_issuer(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom dockerproxy.proxy.local_ca import load_or_create_issuer\n"
        "print('ready', flush=True)\nsys.stdin.read()\n"
        "print(load_or_create_issuer(Path(sys.argv[1]), None, time.time()).certificate.serial_number)"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", program, str(tmp_path / "ca")]
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    serial_numbers = set()
    for process in processes:
        assert process.stdout is not None
        serial_numbers.add(process.stdout.read())
        process.stdout.close()
        assert process.wait(30) == 0
    assert len(serial_numbers) == 1


# Errors.


def test_expired_error_says_how_to_recreate(tmp_path: Path) -> None:
    load_or_create_issuer(tmp_path, None, NOW)
    with pytest.raises(AuthorityError, match=r"expired on \d{4}-\d\d-\d\d; remove ca\.crt and ca\.key to create a new"):
        load_or_create_issuer(tmp_path, None, NOW + 3651 * DAY)


def test_root_near_its_expiry_gives_a_warning(tmp_path: Path) -> None:
    load_or_create_issuer(tmp_path, None, NOW)
    (warning,) = load_or_create_issuer(tmp_path, None, NOW + 3625 * DAY).warnings
    assert warning.startswith(f"CA_DIR: {tmp_path}/ca.crt expires on ")


def test_clock_before_not_before_is_an_error(tmp_path: Path) -> None:
    load_or_create_issuer(tmp_path, None, NOW)
    with pytest.raises(AuthorityError, match=r"is not valid before .* UTC; is this machine's clock right\?"):
        load_or_create_issuer(tmp_path, None, NOW - 3 * DAY)


@pytest.mark.parametrize("content", [b"", b"\0", b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"])
def test_a_damaged_certificate_is_refused_not_replaced(tmp_path: Path, content: bytes) -> None:
    load_or_create_issuer(tmp_path, None, NOW)
    (tmp_path / "ca.crt").write_bytes(content)
    with pytest.raises(AuthorityError, match=r"^CA_DIR: .*/ca\.crt is not a valid certificate in PEM"):
        load_or_create_issuer(tmp_path, None, NOW)
    assert (tmp_path / "ca.crt").read_bytes() == content


def test_file_instead_of_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("")
    with pytest.raises(AuthorityError, match=r"^CA_DIR: .*/ca.* cannot be used: "):
        load_or_create_issuer(tmp_path / "ca", None, NOW)


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    # Use /proc, because it refuses new entries even if the tests run as root.
    with pytest.raises(AuthorityError, match=r"^CA_DIR: /proc/.* cannot be used: "):
        load_or_create_issuer(Path("/proc/self/ca"), None, NOW)
