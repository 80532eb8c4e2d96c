"""The certificate and key that sign the leaves, as files hold them, and what makes them unfit."""

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

DAY = 86400.0
BACKDATE = 2 * DAY
"""How long before now a certificate begins, in seconds: the clocks of clients lag."""

_ENDS_SOON = 30 * DAY
_WEAKEST_RSA = 2048  # bits; less fails under OpenSSL's security level 2, which Debian's clients have

IssuerKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


class AuthorityError(Exception):
    """A certificate authority that cannot be used: one sentence for the operator, naming the setting and the file."""


@frozen
class Issuer:
    """What signs leaves. Times are seconds since the epoch."""

    key: IssuerKey = field(repr=False)
    path: tuple[x509.Certificate, ...]
    """The issuer's certificate, and those above it, each signed by the next."""
    warnings: tuple[str, ...] = ()

    @property
    def certificate(self) -> x509.Certificate:
        """The issuer's own certificate."""
        return self.path[0]

    @property
    def trusted(self) -> x509.Certificate:
        """What a client must trust: the self-signed root where the path reaches one, else the issuer."""
        return self.path[-1] if _is_self_signed(self.path[-1]) else self.certificate

    @property
    def sent(self) -> tuple[x509.Certificate, ...]:
        """What goes along with a leaf: the path without its root, which a client has already or does not believe."""
        return tuple(certificate for certificate in self.path if not _is_self_signed(certificate))

    @property
    def begins(self) -> float:
        """When all of the path has become valid."""
        return max(_validity(certificate)[0] for certificate in self.path)

    @property
    def ends(self) -> float:
        """When the first certificate of the path ends."""
        return min(_validity(certificate)[1] for certificate in self.path)

    def warned(self, sentence: str) -> Issuer:
        """Return this issuer with one more thing to tell the operator."""
        return evolve(self, warnings=(*self.warnings, sentence))


@frozen
class Source:
    """The two files, and the settings that name them: what the sentences of errors speak of."""

    certificate: Path
    certificate_setting: str
    key: Path
    key_setting: str
    if_expired: str = ""


def named_issuer(certificate_file: Path, key_file: Path, passphrase: str | None, now: float) -> Issuer:
    """Return the issuer that CA_CRT_FILE and CA_KEY_FILE name, or raise `AuthorityError`.

    The certificate file may hold a chain; its first certificate is the issuer.
    """
    issuer = load_issuer(Source(certificate_file, "CA_CRT_FILE", key_file, "CA_KEY_FILE"), passphrase, now)
    if is_exposed(key_file):
        issuer = issuer.warned(f"CA_KEY_FILE: {key_file} can be read by others than its owner")
    return issuer


def load_issuer(source: Source, passphrase: str | None, now: float) -> Issuer:
    """Return the issuer in the files of `source`, fit for use at `now`, or raise `AuthorityError`."""
    certificates = _load_certificates(source)
    key, warnings = load_key(source, passphrase)
    if _spki(certificates[0].public_key()) != _spki(key.public_key()):
        raise AuthorityError(
            f"{source.key_setting}: {source.key} is not the key of the certificate in {source.certificate}"
        )
    _require_signing(source, certificates[0])
    issuer = Issuer(key, _path(certificates), warnings)
    _require_valid(source, issuer.path, now)
    where = f"{source.certificate_setting}: {source.certificate}"
    left_out = len(certificates) - len(issuer.path)
    if left_out:
        issuer = issuer.warned(f"{where} holds certificates that are not above the first; left out: {left_out}")
    if issuer.ends - now < _ENDS_SOON:
        issuer = issuer.warned(f"{where} ends on {moment(issuer.ends):%Y-%m-%d}")
    return issuer


def load_key(source: Source, passphrase: str | None) -> tuple[IssuerKey, tuple[str, ...]]:
    """Return the private key of `source` (PKCS #1, PKCS #8 or SEC 1 in PEM) and warnings, or raise `AuthorityError`."""
    content = _read(source.key, source.key_setting)
    where = f"{source.key_setting}: {source.key}"
    encrypted = b"ENCRYPTED" in content  # PKCS #8 has it in its label, the older forms in their Proc-Type header
    if encrypted and not passphrase:
        raise AuthorityError(f"{where} is encrypted, and CA_KEY_PASSPHRASE is not set")
    try:
        key = serialization.load_pem_private_key(content, passphrase.encode() if passphrase and encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Without the cause: nothing about a failed decryption belongs into a log.
        trouble = "cannot be decrypted with CA_KEY_PASSPHRASE" if encrypted else "holds no private key in PEM"
        raise AuthorityError(f"{where} {trouble}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise AuthorityError(f"{where} is neither an RSA nor an EC key")
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size < _WEAKEST_RSA:
        raise AuthorityError(f"{where} is an RSA key of {key.key_size} bits, and clients want {_WEAKEST_RSA} or more")
    if passphrase and not encrypted:
        return key, (f"{where} is not encrypted, so CA_KEY_PASSPHRASE has no effect",)
    return key, ()


def is_exposed(path: Path) -> bool:
    """Return whether others than the owner of `path` may read it."""
    mode = path.stat().st_mode
    # With an access list the group's bits are its mask and say nothing: systemd hands over credentials like that.
    return bool(mode & 0o007) or (bool(mode & 0o070) and not _has_access_list(path))


def extension_of(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    """Return the extension of `kind` that `certificate` has, or None."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def moment(seconds: float) -> datetime:
    """Return `seconds` since the epoch as certificates write time: UTC, whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC)


def key_usage(*, issuer: bool) -> x509.KeyUsage:
    """Return the key usage of an issuer (keyCertSign, cRLSign) or that of a TLS server (digitalSignature)."""
    return x509.KeyUsage(
        digital_signature=not issuer,
        key_cert_sign=issuer,
        crl_sign=issuer,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AuthorityError(f"{setting}: {path} cannot be read: {error.strerror}") from error


def _load_certificates(source: Source) -> list[x509.Certificate]:
    content = _read(source.certificate, source.certificate_setting)
    try:
        certificates = x509.load_pem_x509_certificates(content)
        for certificate in certificates:
            _ = certificate.extensions, certificate.public_key()  # parsed only when asked for
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        where = f"{source.certificate_setting}: {source.certificate}"
        raise AuthorityError(f"{where} is not a certificate in PEM, or not one that can be read") from error
    return certificates


def _require_signing(source: Source, issuer: x509.Certificate) -> None:
    where = f"{source.certificate_setting}: the certificate in {source.certificate}"
    constraints = extension_of(issuer, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise AuthorityError(f"{where} is not that of a CA (basicConstraints)")
    usage = extension_of(issuer, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        raise AuthorityError(f"{where} may not sign certificates (keyUsage lacks keyCertSign)")


def _require_valid(source: Source, path: Sequence[x509.Certificate], now: float) -> None:
    for certificate in path:
        begins, ends = _validity(certificate)
        which = "the certificate" if certificate is path[0] else f"the issuer {certificate.subject.rfc4514_string()!r}"
        where = f"{source.certificate_setting}: {which} in {source.certificate}"
        if now > ends:
            raise AuthorityError(f"{where} expired on {moment(ends):%Y-%m-%d}{source.if_expired}")
        if now < begins:
            began = f"{moment(begins):%Y-%m-%d %H:%M} UTC"
            raise AuthorityError(f"{where} is not valid before {began}, and this machine's clock is not there yet")


def _path(certificates: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """Return the first certificate and those above it, whatever order the file has them in."""
    path, rest = [certificates[0]], list(certificates[1:])
    while not _is_self_signed(path[-1]):
        above = next((certificate for certificate in rest if _has_issued(certificate, path[-1])), None)
        if above is None:
            break
        path.append(above)
        rest.remove(above)
    return tuple(path)


def _has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _is_self_signed(certificate: x509.Certificate) -> bool:
    return _has_issued(certificate, certificate)


def _validity(certificate: x509.Certificate) -> tuple[float, float]:
    try:
        return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    except AttributeError:  # cryptography < 42
        begin, end = certificate.not_valid_before, certificate.not_valid_after
        return begin.replace(tzinfo=UTC).timestamp(), end.replace(tzinfo=UTC).timestamp()


def _spki(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _has_access_list(path: Path) -> bool:
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except OSError:
        return False
