"""The CA that the daemon creates for itself at its first start, in a directory of its own.

The directory contains ``ca.crt`` (0644), ``ca.key`` (0600) and ``ca.lock``. The key is written first, then the
certificate, each to a temporary file that is synced and renamed. If the process is killed in between, the next start
creates the certificate for the existing key.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dockerproxy.proxy.issuer import (
    BACKDATE,
    DAY,
    AuthorityError,
    Issuer,
    IssuerFiles,
    IssuerKey,
    is_readable_by_others,
    key_usage,
    load_issuer,
    load_key,
    to_datetime,
)

_ROOT_LIFETIME = 3650 * DAY
_MAX_HOSTNAME = 36  # because X.520 limits the common name to 64 characters
_RECREATE_HINT = "remove {files} to create a new CA, which every client must then trust"


def load_or_create_issuer(directory: Path, passphrase: str | None, now: float) -> Issuer:
    """Load the issuer from `directory`, or create it. Raise `AuthorityError` if it cannot be used.

    The key of a new issuer is encrypted if there is a `passphrase`. Several processes may call this at the same time;
    one of them creates the issuer while the others block, and all return the same one.
    """
    expiry_hint = f"; {_RECREATE_HINT.format(files='ca.crt and ca.key')}"
    files = IssuerFiles(directory / "ca.crt", "CA_DIR", directory / "ca.key", "CA_DIR", expiry_hint)
    try:
        if not (files.key.exists() and files.certificate.exists()):
            _create(files, passphrase, now)
        issuer = load_issuer(files, passphrase, now)
        if is_readable_by_others(files.key):
            with suppress(PermissionError):
                files.key.chmod(0o600)
            if is_readable_by_others(files.key):
                issuer = issuer.with_warning(f"CA_DIR: {files.key} is readable by other users; set its mode to 0600")
    except OSError as error:
        raise AuthorityError(f"CA_DIR: {error.filename or directory} cannot be used: {error.strerror}") from error
    return issuer


def _create(files: IssuerFiles, passphrase: str | None, now: float) -> None:
    directory = files.key.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _file_lock(directory / "ca.lock"):
        if files.key.exists():
            key, _ = load_key(files, passphrase)
        elif files.certificate.exists():
            raise AuthorityError(
                f"CA_DIR: {files.certificate} exists but its key {files.key} is missing: "
                f"restore the key, or {_RECREATE_HINT.format(files='ca.crt')}"
            )
        else:
            key = ec.generate_private_key(ec.SECP256R1())
            _write_atomically(files.key, _key_pem(key, passphrase), 0o600)
        if not files.certificate.exists():
            _write_atomically(
                files.certificate, _root_certificate(key, now).public_bytes(serialization.Encoding.PEM), 0o644
            )


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    # O_RDWR, because over NFS an exclusive lock requires a file that is open for writing.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, content: bytes, mode: int) -> None:
    """Create a file atomically and sync it. It never has more permissions than `mode`. The caller holds the lock."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)  # left by a killed process, because no other writes while we hold the lock
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        with suppress(PermissionError):  # shared folders and FAT do not support modes
            os.fchmod(descriptor, mode)  # because the umask may have removed bits
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    temporary.rename(path)
    _fsync_directory(path.parent)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems do not support fsync on directories
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key_pem(key: IssuerKey, passphrase: str | None) -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def _root_certificate(key: IssuerKey, now: float) -> x509.Certificate:
    serial = x509.random_serial_number()
    # The serial number in the name distinguishes two CAs of one host in trust stores that look up by name.
    hostname = socket.gethostname()[:_MAX_HOSTNAME]
    name = x509.Name([
        x509.NameAttribute(NameOID.COMMON_NAME, f"docker-registry-proxy CA ({hostname})"),
        x509.NameAttribute(NameOID.SERIAL_NUMBER, f"{serial:040x}"[:16]),
    ])  # fmt: skip
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(to_datetime(now - BACKDATE))
        .not_valid_after(to_datetime(now + _ROOT_LIFETIME))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(ca=True), critical=True)
        # Limits the CA to TLS servers. OpenSSL and Go require that each certificate of a chain allows the
        # purpose, so whoever steals the key cannot sign code, mail or client certificates for those who trust this CA.
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
