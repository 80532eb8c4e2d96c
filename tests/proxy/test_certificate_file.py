"""Tests for the administrator's certificates: loading, replacement, warnings, and the choice by name."""

from __future__ import annotations

import ipaddress
import os
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher

from dockerproxy.http.tls import ServerContext
from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.proxy.certificate_file import CertificateFile
from dockerproxy.proxy.issuer import DAY, AuthorityError, IssuerKey, key_usage, to_datetime
from tests.proxy.test_authority import HandshakePair

NOW = 1_800_000_000.0


def pem(key: Any, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    data: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return data


@define
class CompanyCA:
    """A company's CA: a root, an intermediate, and certificates for servers in the two files of the administrator."""

    folder: Path
    now: float = NOW
    root_key: Any = field(factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    key: Any = field(factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    root: Any = None
    intermediate: Any = None

    def __attrs_post_init__(self) -> None:
        self.root = self.sign("root", self.root_key, "root", self.root_key, 3650, ca=True)
        self.intermediate = self.sign("intermediate", self.key, "root", self.root_key, 1000, ca=True)

    @property
    def certificate_file(self) -> Path:
        return self.folder / "fullchain.pem"

    @property
    def key_file(self) -> Path:
        return self.folder / "privkey.pem"

    @property
    def root_pem(self) -> bytes:
        data: bytes = self.root.public_bytes(serialization.Encoding.PEM)
        return data

    def sign(
        self, name: str, key: IssuerKey, issuer: str, issuer_key: Any, days: float, *, ca: bool, names: Any = ()
    ) -> Any:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(to_datetime(self.now - DAY))
            .not_valid_after(to_datetime(self.now + days * DAY))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(key_usage(ca=ca), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def issue(self, *names: str, days: float = 90, key: IssuerKey | None = None) -> None:
        """Write both files, as an ACME client does."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        certificate = self.sign(
            "leaf", key, "intermediate", self.key, days, ca=False, names=[general_name(n) for n in names]
        )
        self.certificate_file.write_bytes(
            b"".join(c.public_bytes(serialization.Encoding.PEM) for c in (certificate, self.intermediate, self.root))
        )
        self.key_file.write_bytes(pem(key))

    def open(self, clock: Callable[[], float] = lambda: NOW) -> CertificateFile:
        file = CertificateFile.open(self.certificate_file, self.key_file, "REGISTRY", clock)
        assert file is not None
        return file


def general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@pytest.fixture
def company(tmp_path: Path) -> CompanyCA:
    return CompanyCA(tmp_path)


@pytest.fixture
def current_company(tmp_path: Path) -> CompanyCA:
    """A company's CA with certificates that clients accept today."""
    return CompanyCA(tmp_path, time.time())


@pytest.fixture
def log() -> Iterator[list[str]]:
    lines: list[str] = []

    def observe(event: Any) -> None:
        if event["log_namespace"].startswith("dockerproxy.proxy.certificate_file"):
            lines.append(f"{event['log_level'].name}: {event['log_format'].format(**event)}")

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


def presented(context: ServerContext, root: bytes, name: str) -> x509.Certificate:
    """Return the certificate that a client gets and verifies, by `root` alone."""
    pair = HandshakePair(context, root, name)
    pair.complete_handshake()
    der = pair.client.getpeercert(True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


@pytest.mark.parametrize("kind", ["ec", "p384", "rsa"])
def test_the_chain_is_sent(current_company: CompanyCA, kind: str) -> None:
    key: Any = {
        "ec": lambda: ec.generate_private_key(ec.SECP256R1()),
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
    }[kind]()
    current_company.issue("registry.example.com", key=key)
    leaf = presented(ServerContext(current_company.open().context), current_company.root_pem, "registry.example.com")
    assert leaf.public_key() == key.public_key()


def test_it_covers_its_names_only(company: CompanyCA) -> None:
    company.issue("Registry.example.com", "*.lab.example.com", "192.0.2.7", "2001:db8::7")
    file = company.open()
    for name in ("registry.example.com", "a.lab.example.com", "192.0.2.7", "2001:db8::7"):
        assert file.covers(name)
    for name in ("example.com", "lab.example.com", "a.b.lab.example.com", "192.0.2.8", "docker-registry.local", ""):
        assert not file.covers(name)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda c: c.certificate_file.write_bytes(b"x"),
            "REGISTRY_CRT_FILE: {crt} is not a valid certificate in PEM format",
        ),
        (lambda c: c.certificate_file.unlink(), "REGISTRY_CRT_FILE: {crt} cannot be read: No such file or directory"),
        (lambda c: c.key_file.unlink(), "REGISTRY_KEY_FILE: {key} cannot be read: No such file or directory"),
        (lambda c: c.key_file.write_bytes(b""), "REGISTRY_KEY_FILE: {key} contains no private key in PEM format"),
        (
            lambda c: c.key_file.write_bytes(pem(c.key, b"secret")),
            "REGISTRY_KEY_FILE: {key} is encrypted; it must be readable without a passphrase",
        ),
        (
            lambda c: c.key_file.write_bytes(pem(c.root_key)),
            "REGISTRY_KEY_FILE: {key} is not the key of the first certificate in {crt}",
        ),
        (
            lambda c: c.issue(),
            "REGISTRY_CRT_FILE: the certificate in {crt} has no subjectAltName; clients would refuse it",
        ),
        (
            lambda c: c.issue("a.test", key=rsa.generate_private_key(65537, 1024)),
            "REGISTRY_KEY_FILE: {key} is an RSA key of 1024 bits, but clients require 2048 or more",
        ),
    ],
)  # fmt: skip
def test_an_unusable_file_is_one_sentence_and_the_previous_one_stays(
    company: CompanyCA, log: list[str], damage: Callable[[CompanyCA], object], sentence: str
) -> None:
    company.issue("registry.example.com")
    file = company.open()
    before = file.context
    damage(company)
    expected = sentence.format(crt=company.certificate_file, key=company.key_file)
    with pytest.raises(AuthorityError) as caught:
        company.open()
    assert str(caught.value) == expected
    for _ in range(3):
        file.check()
    assert file.context is before
    if company.certificate_file.exists() and company.key_file.exists():  # else an ACME client is about to write it
        assert log == [f"error: {expected}; the previous certificate stays in use"]
    company.issue("registry.example.com", "other.example.com")
    file.check()
    assert file.covers("other.example.com")


def test_a_new_certificate_is_used(company: CompanyCA, log: list[str]) -> None:
    company.issue("registry.example.com")
    file, reactor = company.open(), Clock()
    file.watch(reactor)
    before = file.context
    reactor.advance(60)
    assert file.context is before
    company.issue("registry.example.com", days=80)
    reactor.advance(59)
    assert file.context is before
    reactor.advance(1)
    assert file.context is not before
    assert log == [
        f"info: REGISTRY_CRT_FILE: {company.certificate_file} was loaded again, it is valid until 2027-04-05"
    ]


def test_half_a_renewal_is_waited_for(company: CompanyCA, log: list[str]) -> None:
    """An ACME client writes one file after the other."""
    company.issue("registry.example.com")
    file = company.open()
    old_key = company.key_file.read_bytes()
    company.issue("registry.example.com", "new.example.com")
    new_key = company.key_file.read_bytes()
    company.key_file.write_bytes(old_key)
    file.check()
    assert not file.covers("new.example.com")
    company.key_file.write_bytes(new_key)
    os.utime(company.key_file, (NOW, NOW))
    file.check()
    assert file.covers("new.example.com")


@pytest.mark.parametrize(
    ("days", "after", "expected"),
    [
        (90, 75, []),
        (90, 77, ["warn: {crt} expires on 2027-04-15 08:00 UTC; replace it"]),
        (90, 91, ["error: {crt} expired on 2027-04-15 08:00 UTC; clients refuse it"]),
        (6, 3, []),
        (6, 5, ["warn: {crt} expires on 2027-01-21 08:00 UTC; replace it"]),
        (90, -3, ["error: {crt} is not valid before 2027-01-14 08:00 UTC; clients refuse it"]),
    ],
)
def test_warnings_about_the_end(
    company: CompanyCA, log: list[str], days: float, after: float, expected: list[str]
) -> None:
    company.issue("registry.example.com", days=days)
    now = [NOW + after * DAY]
    file = company.open(lambda: now[0])
    lines = [line.format(crt=f"REGISTRY_CRT_FILE: {company.certificate_file}") for line in expected]
    for _ in range(3):
        file.check()
        now[0] += 3600
    assert log == lines, "once a day"
    now[0] = NOW + after * DAY + DAY
    file.check()
    assert len(log) >= 2 * len(lines)


def test_no_file_without_the_settings() -> None:
    assert CertificateFile.open(None, None, "REGISTRY", lambda: NOW) is None


def test_names_that_the_file_does_not_cover_get_a_certificate_of_our_ca(
    tmp_path: Path, current_company: CompanyCA
) -> None:
    authority = CertificateAuthority.open(
        tmp_path / "ca",
        certificate_file=None,
        key_file=None,
        passphrase=None,
        clock=time.time,
    )
    current_company.issue("registry.example.com")
    file = current_company.open()
    by_company = presented(
        authority.own_context_for("registry.example.com", file), current_company.root_pem, "registry.example.com"
    )
    ours = presented(
        authority.own_context_for("docker-registry.local", file), authority.certificate_pem, "docker-registry.local"
    )
    assert by_company.issuer != ours.issuer
    with pytest.raises(ssl.SSLCertVerificationError):
        presented(
            authority.own_context_for("registry.example.com", None), current_company.root_pem, "registry.example.com"
        )


def test_openssl_verifies_the_chain(current_company: CompanyCA) -> None:
    current_company.issue("registry.example.com")
    (current_company.folder / "root.pem").write_bytes(current_company.root_pem)
    command = ["openssl", "verify", "-CAfile", "root.pem", "-untrusted", "fullchain.pem", "fullchain.pem"]
    result = subprocess.run(command, cwd=current_company.folder, capture_output=True, text=True, check=False)
    assert result.stdout == "fullchain.pem: OK\n", result.stderr
