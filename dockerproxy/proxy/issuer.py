"""The CA certificate and key that sign the leaves: loading them from files, and checking that they are usable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from attrs import evolve, field, frozen
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

from dockerproxy.config_files import read_config_file

DAY = 86400.0
BACKDATE = 2 * DAY
"""Seconds by which a new certificate is backdated, because the clocks of clients may lag."""

_EXPIRY_WARNING = 30 * DAY
_MIN_RSA_BITS = 2048  # OpenSSL's security level 2, the default on Debian clients, rejects shorter keys

IssuerKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


class AuthorityError(Exception):
    """The certificate authority cannot be used. The message is one sentence that names the setting and the file."""


@frozen
class Issuer:
    """A CA key with its certificate chain. Times are in seconds since the epoch."""

    key: IssuerKey = field(repr=False)
    path: tuple[x509.Certificate, ...]
    """The issuer's certificate and the certificates above it, each signed by the next."""
    warnings: tuple[str, ...] = ()

    @property
    def certificate(self) -> x509.Certificate:
        """The issuer's own certificate."""
        return self.path[0]

    @property
    def trusted(self) -> x509.Certificate:
        """The certificate that clients must trust: the self-signed root if the path reaches one, else the issuer."""
        return self.path[-1] if is_self_signed(self.path[-1]) else self.certificate

    @property
    def sent(self) -> tuple[x509.Certificate, ...]:
        """The certificates sent with a leaf: the path without its root, which clients either have or do not trust."""
        return tuple(certificate for certificate in self.path if not is_self_signed(certificate))

    @property
    def not_before(self) -> float:
        """The time from which all certificates of the path are valid."""
        return max(validity(certificate)[0] for certificate in self.path)

    @property
    def not_after(self) -> float:
        """The time at which the first certificate of the path expires."""
        return min(validity(certificate)[1] for certificate in self.path)

    def with_warning(self, message: str) -> Issuer:
        """Return a copy of this issuer with one more warning."""
        return evolve(self, warnings=(*self.warnings, message))


@frozen
class IssuerFiles:
    """The two files, and the settings that name them in error messages."""

    certificate: Path
    certificate_setting: str
    key: Path
    key_setting: str
    expiry_hint: str = ""
    passphrase_setting: str | None = "CA_KEY_PASSPHRASE"


def load_configured_issuer(certificate_file: Path, key_file: Path, passphrase: str | None, now: float) -> Issuer:
    """Load the issuer from CA_CRT_FILE and CA_KEY_FILE. Raise `AuthorityError` if it is not usable at `now`.

    The certificate file may contain a chain; its first certificate is the issuer.
    """
    issuer = load_issuer(IssuerFiles(certificate_file, "CA_CRT_FILE", key_file, "CA_KEY_FILE"), passphrase, now)
    if is_readable_by_others(key_file):
        issuer = issuer.with_warning(f"CA_KEY_FILE: {key_file} is readable by other users; set its mode to 0600")
    return issuer


def load_issuer(files: IssuerFiles, passphrase: str | None, now: float) -> Issuer:
    """Load the issuer from `files`. Raise `AuthorityError` if it is not usable at `now`."""
    certificates = load_certificates(files)
    key, warnings = load_key(files, passphrase)
    if not public_key_matches(certificates[0], key):
        raise AuthorityError(
            f"{files.key_setting}: {files.key} is not the key of the certificate in {files.certificate}"
        )
    _check_can_sign(files, certificates[0])
    issuer = Issuer(key, build_path(certificates), warnings)
    _check_validity(files, issuer.path, now)
    prefix = f"{files.certificate_setting}: {files.certificate}"
    unused = len(certificates) - len(issuer.path)
    if unused:
        issuer = issuer.with_warning(f"{prefix} has certificates outside the chain of the first; ignored: {unused}")
    if issuer.not_after - now < _EXPIRY_WARNING:
        issuer = issuer.with_warning(f"{prefix} expires on {to_datetime(issuer.not_after):%Y-%m-%d}")
    return issuer


def load_key(files: IssuerFiles, passphrase: str | None) -> tuple[IssuerKey, tuple[str, ...]]:
    """Load the private key of `files` (PKCS #1, PKCS #8 or SEC 1 in PEM) and return it with warnings.

    Raise `AuthorityError` if the key is not usable.
    """
    content = _read(files.key, files.key_setting)
    prefix = f"{files.key_setting}: {files.key}"
    encrypted = b"ENCRYPTED" in content  # in the label of PKCS #8, in the Proc-Type header of the older formats
    if encrypted and not passphrase:
        if files.passphrase_setting is None:
            raise AuthorityError(f"{prefix} is encrypted; it must be readable without a passphrase")
        raise AuthorityError(f"{prefix} is encrypted, but {files.passphrase_setting} is not set")
    try:
        key = serialization.load_pem_private_key(content, passphrase.encode() if passphrase and encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Suppress the cause, because details of a failed decryption must not get into a log.
        problem = "cannot be decrypted with CA_KEY_PASSPHRASE" if encrypted else "contains no private key in PEM format"
        raise AuthorityError(f"{prefix} {problem}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise AuthorityError(f"{prefix} is neither an RSA nor an EC key")
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < _MIN_RSA_BITS:
        raise AuthorityError(
            f"{prefix} is an RSA key of {key.key_size} bits, but clients require {_MIN_RSA_BITS} or more"
        )
    if passphrase and not encrypted:
        return key, (f"{prefix} is not encrypted, so CA_KEY_PASSPHRASE has no effect",)
    return key, ()


def is_readable_by_others(path: Path) -> bool:
    """Return whether users can read `path` who need not: those that are neither its owner nor this daemon's user.

    A file of another owner, such as root, may be readable by a group of this daemon, which has no other way to read it.
    Kubernetes mounts Secrets like that (`fsGroup`).
    """
    status = path.stat()
    if status.st_mode & 0o007:
        return True
    # With an ACL the group bits are its mask and do not mean access by the group. systemd passes credentials like that.
    if not status.st_mode & 0o070 or _has_acl(path):
        return False
    needs_group = os.geteuid() not in (0, status.st_uid) and status.st_gid in (os.getegid(), *os.getgroups())
    return not (needs_group and status.st_mode & 0o070 == 0o040)


def get_extension(certificate: x509.Certificate, extension_type: type[_Extension]) -> _Extension | None:
    """Return the extension of type `extension_type` of `certificate`, or None."""
    try:
        return certificate.extensions.get_extension_for_class(extension_type).value
    except x509.ExtensionNotFound:
        return None


def to_datetime(seconds: float) -> datetime:
    """Convert seconds since the epoch to the precision of certificates: UTC, whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC)


def key_usage(*, ca: bool) -> x509.KeyUsage:
    """Return the key usage of an issuer (keyCertSign, cRLSign) or that of a TLS server (digitalSignature)."""
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _read(path: Path, setting: str) -> bytes:
    try:
        return read_config_file(path)[0]
    except OSError as error:
        raise AuthorityError(f"{setting}: {path} cannot be read: {error.strerror}") from error


def load_certificates(files: IssuerFiles) -> list[x509.Certificate]:
    """Return the certificates in the certificate file of `files`, at least one. Raise `AuthorityError`."""
    content = _read(files.certificate, files.certificate_setting)
    try:
        certificates = x509.load_pem_x509_certificates(content)
        for certificate in certificates:
            _ = certificate.extensions, certificate.public_key()  # parse them now, because both are parsed lazily
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        prefix = f"{files.certificate_setting}: {files.certificate}"
        raise AuthorityError(f"{prefix} is not a valid certificate in PEM format") from error
    return certificates


def _check_can_sign(files: IssuerFiles, issuer: x509.Certificate) -> None:
    prefix = f"{files.certificate_setting}: the certificate in {files.certificate}"
    constraints = get_extension(issuer, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise AuthorityError(f"{prefix} is not a CA certificate (basicConstraints)")
    usage = get_extension(issuer, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        raise AuthorityError(f"{prefix} may not sign certificates (keyUsage lacks keyCertSign)")


def _check_validity(files: IssuerFiles, path: Sequence[x509.Certificate], now: float) -> None:
    for certificate in path:
        not_before, not_after = validity(certificate)
        description = (
            "the certificate" if certificate is path[0] else f"the issuer {certificate.subject.rfc4514_string()!r}"
        )
        prefix = f"{files.certificate_setting}: {description} in {files.certificate}"
        if now > not_after:
            raise AuthorityError(f"{prefix} expired on {to_datetime(not_after):%Y-%m-%d}{files.expiry_hint}")
        if now < not_before:
            start = f"{to_datetime(not_before):%Y-%m-%d %H:%M} UTC"
            raise AuthorityError(f"{prefix} is not valid before {start}; is this machine's clock right?")


def build_path(certificates: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """Return the first certificate and the ones above it, in order. The file may have them in any order."""
    path, candidates = [certificates[0]], list(certificates[1:])
    while not is_self_signed(path[-1]):
        issuer = next((certificate for certificate in candidates if _has_issued(certificate, path[-1])), None)
        if issuer is None:
            break
        path.append(issuer)
        candidates.remove(issuer)
    return tuple(path)


def _has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Return whether `certificate` is signed by its own key, as a root is."""
    return _has_issued(certificate, certificate)


def validity(certificate: x509.Certificate) -> tuple[float, float]:
    """Return the first and the last time at which `certificate` is valid, in seconds since the epoch."""
    try:
        return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    except AttributeError:  # cryptography < 42
        not_before, not_after = certificate.not_valid_before, certificate.not_valid_after
        return not_before.replace(tzinfo=UTC).timestamp(), not_after.replace(tzinfo=UTC).timestamp()


def public_key_matches(certificate: x509.Certificate, key: IssuerKey) -> bool:
    """Return whether `key` is the private key of `certificate`."""
    return _spki(certificate.public_key()) == _spki(key.public_key())


def _spki(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _has_acl(path: Path) -> bool:
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except OSError:
        return False
