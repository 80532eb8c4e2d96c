"""Our own certificate authority: made once, kept in a directory, found there by every later start.

The directory holds ``ca.crt`` (0644), ``ca.key`` (0600) and ``ca.lock``. Each of the two is written beside its place,
synced and renamed, the key first: a process killed between them leaves a key whose certificate the next start makes.
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
from cryptography.x509.oid import NameOID

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
_MAX_HOSTNAME = 36  # what X.520's 64 characters for a common name leave
_RECREATE_HINT = "remove {files} to have a new authority made, which every client must then be told to trust"


def load_or_create_issuer(directory: Path, passphrase: str | None, now: float) -> Issuer:
    """Return the issuer kept in `directory`, made now if there is none yet, or raise `AuthorityError`.

    The key of a new one is encrypted where there is a `passphrase`. Any number of processes may call this at once, and
    get the same issuer; it blocks while another of them is making it.
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
                issuer = issuer.with_warning(f"CA_DIR: {files.key} can be read by others than its owner")
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
                f"CA_DIR: {files.certificate} is there and its key {files.key} is not: "
                f"put the key back, or {_RECREATE_HINT.format(files='ca.crt')}"
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
    # O_RDWR: over NFS only a file open for writing can be locked against others.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_atomically(path: Path, content: bytes, mode: int) -> None:
    """Put a file in place, whole and synced, at no moment more readable than `mode`. The lock is held."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)  # a killed process left it: nobody else writes while we hold the lock
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        with suppress(PermissionError):  # shared folders and FAT have modes of their own
            os.fchmod(descriptor, mode)  # the umask may have taken bits away
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    temporary.rename(path)
    _fsync_directory(path.parent)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems refuse, having nothing to sync
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
    # A serial number in the name keeps two authorities of one host apart where a trust store looks up by name.
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
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
