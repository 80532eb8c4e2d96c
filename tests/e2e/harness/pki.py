"""The certificate authorities and server certificates of the upstream servers."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


@frozen
class Leaf:
    """A certificate and its key, as files."""

    certificate_file: Path
    key_file: Path

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate_file, self.key_file)
        return context


class UpstreamCA:
    """A certificate authority with its files in `folder`. It is made if no `key` and `certificate` are given."""

    def __init__(
        self,
        folder: Path,
        name: str,
        key: ec.EllipticCurvePrivateKey | None = None,
        certificate: x509.Certificate | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.key = key or ec.generate_private_key(ec.SECP256R1())
        self.certificate = certificate or self._make_certificate(name)
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    @classmethod
    def from_files(cls, certificate_file: Path, key_file: Path, folder: Path) -> UpstreamCA:
        """Return the authority with the certificate and key in these files, such as those of a daemon."""
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(folder, "", key, x509.load_pem_x509_certificate(certificate_file.read_bytes()))

    def _make_certificate(self, name: str) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return (
            _builder(subject, subject, self.key.public_key(), 30)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(is_ca=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def leaf(self, *names: str, valid_days: int = 20) -> Leaf:
        """Return a server certificate for `names`. It is expired if `valid_days` is negative."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        certificate = (
            _builder(subject, self.certificate.subject, key.public_key(), valid_days)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        serial = f"{certificate.serial_number:x}"
        leaf = Leaf(self._folder / f"{serial}.crt", self._folder / f"{serial}.key")
        leaf.certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        leaf.key_file.write_bytes(key_pem(key))
        return leaf

    def client_context(self) -> ssl.SSLContext:
        """Return a client's context that trusts only this authority."""
        return ssl.create_default_context(cafile=str(self.ca_file))


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid_days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 30 * _DAY)
        .not_valid_after(now + valid_days * _DAY)
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )
