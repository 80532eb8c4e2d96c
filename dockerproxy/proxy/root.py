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
    IssuerKey,
    Source,
    is_exposed,
    key_usage,
    load_issuer,
    load_key,
    moment,
)

_LIFE = 3650 * DAY
_HOSTNAME_LENGTH = 36  # what X.520's 64 characters for a common name leave
_MAKE_NEW = "remove {files} to have a new authority made, which every client must then be told to trust"


def own_issuer(directory: Path, passphrase: str | None, now: float) -> Issuer:
    """Return the issuer kept in `directory`, made now if there is none yet, or raise `AuthorityError`.

    The key of a new one is encrypted where there is a `passphrase`. Any number of processes may call this at once, and
    get the same issuer; it blocks while another of them is making it.
    """
    if_expired = f"; {_MAKE_NEW.format(files='ca.crt and ca.key')}"
    source = Source(directory / "ca.crt", "CA_DIR", directory / "ca.key", "CA_DIR", if_expired)
    try:
        if not (source.key.exists() and source.certificate.exists()):
            _make(source, passphrase, now)
        issuer = load_issuer(source, passphrase, now)
        if is_exposed(source.key):
            with suppress(PermissionError):
                source.key.chmod(0o600)
            if is_exposed(source.key):
                issuer = issuer.warned(f"CA_DIR: {source.key} can be read by others than its owner")
    except OSError as error:
        raise AuthorityError(f"CA_DIR: {error.filename or directory} cannot be used: {error.strerror}") from error
    return issuer


def _make(source: Source, passphrase: str | None, now: float) -> None:
    directory = source.key.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(directory / "ca.lock"):
        if source.key.exists():
            key, _ = load_key(source, passphrase)
        elif source.certificate.exists():
            raise AuthorityError(
                f"CA_DIR: {source.certificate} is there and its key {source.key} is not: "
                f"put the key back, or {_MAKE_NEW.format(files='ca.crt')}"
            )
        else:
            key = ec.generate_private_key(ec.SECP256R1())
            _publish(source.key, _key_pem(key, passphrase), 0o600)
        if not source.certificate.exists():
            _publish(source.certificate, _root(key, now).public_bytes(serialization.Encoding.PEM), 0o644)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # O_RDWR: over NFS only a file open for writing can be locked against others.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _publish(path: Path, content: bytes, mode: int) -> None:
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
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
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


def _root(key: IssuerKey, now: float) -> x509.Certificate:
    serial = x509.random_serial_number()
    # A serial number in the name keeps two authorities of one host apart where a trust store looks up by name.
    hostname = socket.gethostname()[:_HOSTNAME_LENGTH]
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
        .not_valid_before(moment(now - BACKDATE))
        .not_valid_after(moment(now + _LIFE))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(issuer=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
