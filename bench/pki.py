"""The server certificate of the benchmark's registries, and the CA that signs it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@frozen
class ServerCertificate:
    """A server's certificate, its key, and the CA that signed it, as PEM files."""

    ca_file: Path
    file: Path
    key_file: Path


def create_certificate(folder: Path, hosts: Sequence[str]) -> ServerCertificate:
    """Create a certificate for `hosts` with an EC P-256 key.

    The daemon's leaf certificates have such keys too, so that handshakes cost the same.
    """
    files = ServerCertificate(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _sign("bench CA", ca_key.public_key(), "bench CA", ca_key, x509.BasicConstraints(ca=True, path_length=0))
    names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
    certificate = _sign(hosts[0], key.public_key(), "bench CA", ca_key, names)
    files.ca_file.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    files.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files.key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


def _sign(
    name: str,
    public_key: ec.EllipticCurvePublicKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        .sign(issuer_key, hashes.SHA256())
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
