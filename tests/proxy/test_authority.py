"""Tests for the certificate authority: handshakes in memory, verified by two TLS stacks and `openssl verify`."""

from __future__ import annotations

import ipaddress
import ssl
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from OpenSSL import SSL

from dockerproxy.errors import NameInvalid
from dockerproxy.http.tls import ServerContext
from dockerproxy.proxy.authority import AuthorityError, CertificateAuthority
from dockerproxy.proxy.issuer import to_datetime

DAY = 86400.0
LONG_NAME = ".".join(["a" * 60] * 4)

Step = Callable[[], object]


class SteppedClock:
    """A manual clock. It starts at the real time, because TLS clients verify certificates against the real clock."""

    def __init__(self) -> None:
        self.now = float(int(time.time()))

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


def open_authority(directory: Path, clock: Callable[[], float]) -> CertificateAuthority:
    return CertificateAuthority.open(directory, certificate_file=None, key_file=None, passphrase=None, clock=clock)


@pytest.fixture
def authority(tmp_path: Path, clock: SteppedClock) -> CertificateAuthority:
    return open_authority(tmp_path, clock)


class HandshakePair:
    """A client of Python's `ssl` module and our server, connected in memory."""

    def __init__(
        self,
        context: ServerContext,
        trusted: bytes,
        name: str,
        *,
        version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        alpn: list[str] | None = None,
        client: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        if client is None:
            client = ssl.create_default_context(cadata=trusted.decode())
            client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13
            client.maximum_version = version
            if alpn:
                client.set_alpn_protocols(alpn)
        self.client_context = client
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(self._in, self._out, server_hostname=name, session=session)
        self.server = context.create_connection(None)

    def step(self, side: Callable[[], object]) -> bool:
        """Run one side, transfer its bytes, and return whether it has finished."""
        try:
            side()
        except (ssl.SSLWantReadError, SSL.WantReadError):
            return False
        finally:
            self.transfer()
        return True

    def transfer(self) -> None:
        if self._out.pending:
            self.server.bio_write(self._out.read())
        try:
            self._in.write(self.server.bio_read(1 << 20))
        except SSL.WantReadError:
            pass

    def complete_handshake(self) -> HandshakePair:
        """Complete the handshake and read the session tickets that a TLS 1.3 server sends after it."""
        done = {self.client.do_handshake: False, self.server.do_handshake: False}
        for _ in range(10):
            for side in done:
                done[side] = done[side] or self.step(side)
            if all(done.values()):
                break
        assert all(done.values()), "the handshake did not end"
        self.step(lambda: self.client.read(1))
        return self

    @property
    def leaf(self) -> x509.Certificate:
        der = self.client.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der)


def presented_leaf(authority: CertificateAuthority, name: str) -> x509.Certificate:
    """Return the certificate that the server presents to a client without verification."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return HandshakePair(authority.context_for(name), b"", name, client=client).complete_handshake().leaf


def validity(certificate: x509.Certificate) -> tuple[float, float]:
    if hasattr(certificate, "not_valid_before_utc"):
        return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    not_before, not_after = certificate.not_valid_before, certificate.not_valid_after
    return not_before.replace(tzinfo=UTC).timestamp(), not_after.replace(tzinfo=UTC).timestamp()


def get_extension(
    certificate: x509.Certificate, extension_type: type[x509.ExtensionType]
) -> x509.Extension[x509.ExtensionType]:
    return certificate.extensions.get_extension_for_class(extension_type)


NAMES = ["registry-1.docker.io", "localhost", "my_registry.local", "10.1.2.3", "::1", "2001:db8::7", LONG_NAME]


# Verification by clients.


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_trusts_the_root_verifies_the_name(
    authority: CertificateAuthority, name: str, version: ssl.TLSVersion
) -> None:
    pair = HandshakePair(
        authority.context_for(name), authority.certificate_pem, name, version=version
    ).complete_handshake()
    assert pair.client.version() == ("TLSv1.2" if version is ssl.TLSVersion.TLSv1_2 else "TLSv1.3")
    pair.client.write(b"ping")
    pair.transfer()
    assert pair.server.recv(10) == b"ping"
    pair.server.send(b"pong")
    pair.transfer()
    assert pair.client.read(10) == b"pong"


def test_a_pyopenssl_client_verifies_the_name(authority: CertificateAuthority, tmp_path: Path) -> None:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.load_verify_locations(str(tmp_path / "ca.crt"))
    context.set_verify(SSL.VERIFY_PEER)
    client, server = SSL.Connection(context, None), authority.context_for("quay.io").create_connection(None)
    client.set_connect_state()
    for side, other in [(client, server), (server, client), (client, server), (server, client)]:
        try:
            side.do_handshake()
        except SSL.WantReadError:
            pass
        try:
            other.bio_write(side.bio_read(1 << 20))
        except SSL.WantReadError:
            pass
    client.send(b"done")
    server.bio_write(client.bio_read(1 << 20))
    assert server.recv(10) == b"done"


@pytest.mark.parametrize(
    ("server_name", "client_name"), [("quay.io", "ghcr.io"), ("10.1.2.3", "10.1.2.4"), ("io", "quay.io")]
)
def test_another_name_does_not_verify(authority: CertificateAuthority, server_name: str, client_name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        HandshakePair(authority.context_for(server_name), authority.certificate_pem, client_name).complete_handshake()


def test_another_authority_does_not_verify(
    authority: CertificateAuthority, tmp_path: Path, clock: SteppedClock
) -> None:
    other = open_authority(tmp_path / "other", clock)
    with pytest.raises(ssl.SSLCertVerificationError):
        HandshakePair(authority.context_for("quay.io"), other.certificate_pem, "quay.io").complete_handshake()


@pytest.mark.parametrize("name", NAMES)
def test_openssl_verifies_the_leaf_strictly(authority: CertificateAuthority, tmp_path: Path, name: str) -> None:
    (tmp_path / "leaf.crt").write_bytes(presented_leaf(authority, name).public_bytes(serialization.Encoding.PEM))
    check = "-verify_ip" if name[0].isdigit() or ":" in name else "-verify_hostname"
    strict = ["openssl", "verify", "-x509_strict", "-check_ss_sig", "-purpose", "sslserver"]
    command = [*strict, "-CAfile", "ca.crt", check, name, "leaf.crt"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == "leaf.crt: OK\n", result.stderr


@pytest.mark.parametrize(
    ("purpose", "usage"),
    [
        ("sslclient", x509.OID_CLIENT_AUTH),
        ("smimesign", x509.OID_EMAIL_PROTECTION),
        ("sslserver", x509.OID_SERVER_AUTH),
    ],
)
def test_the_root_vouches_for_tls_servers_only(
    authority: CertificateAuthority, tmp_path: Path, purpose: str, usage: x509.ObjectIdentifier
) -> None:
    """A thief of the key cannot sign certificates for people, mail or programs."""
    root = x509.load_pem_x509_certificate(authority.certificate_pem)
    key = serialization.load_pem_private_key((tmp_path / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    forged = (
        x509.CertificateBuilder(root.subject, x509.Name([]), key.public_key(), 1)
        .not_valid_before(to_datetime(time.time() - DAY))
        .not_valid_after(to_datetime(time.time() + DAY))
        .add_extension(x509.SubjectAlternativeName([x509.RFC822Name("ceo@example.com")]), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "forged.crt").write_bytes(forged.public_bytes(serialization.Encoding.PEM))
    command = ["openssl", "verify", "-purpose", purpose, "-CAfile", "ca.crt", "forged.crt"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.stdout == "forged.crt: OK\n") is (purpose == "sslserver"), result.stderr


def test_the_fingerprint_is_that_of_openssl(authority: CertificateAuthority, tmp_path: Path) -> None:
    command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", "ca.crt"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert output.strip().partition("=")[2] == authority.fingerprint


# The leaf.


def test_fields_of_the_leaf(authority: CertificateAuthority) -> None:
    leaf = presented_leaf(authority, "quay.io")
    root = x509.load_pem_x509_certificate(authority.certificate_pem)
    assert leaf.subject.rfc4514_string() == "CN=quay.io"
    assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
    names = get_extension(leaf, x509.SubjectAlternativeName)
    assert (names.critical, list(names.value)) == (False, [x509.DNSName("quay.io")])  # type: ignore[call-overload]
    assert get_extension(leaf, x509.ExtendedKeyUsage).value == x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH])
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_encipherment, usage.key_cert_sign) == (True, False, False)
    identifier = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert identifier == root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert identifier != leaf.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize("address", ["10.1.2.3", "2001:db8::7"])
def test_an_address_is_an_address_in_the_alternative_name(authority: CertificateAuthority, address: str) -> None:
    names = get_extension(presented_leaf(authority, address), x509.SubjectAlternativeName).value
    assert names == x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])


def test_a_long_name_is_in_the_critical_alternative_name_only(authority: CertificateAuthority) -> None:
    leaf = presented_leaf(authority, LONG_NAME)
    assert leaf.subject == x509.Name([])
    names = get_extension(leaf, x509.SubjectAlternativeName)
    assert (names.critical, names.value) == (True, x509.SubjectAlternativeName([x509.DNSName(LONG_NAME)]))


def test_common_name_of_64_characters(authority: CertificateAuthority) -> None:
    name = "a" * 60 + ".com"
    assert presented_leaf(authority, name).subject.rfc4514_string() == f"CN={name}"


def test_lifetime_of_the_leaf(authority: CertificateAuthority, clock: SteppedClock) -> None:
    assert validity(presented_leaf(authority, "quay.io")) == (clock.now - 2 * DAY, clock.now + 90 * DAY)


@pytest.mark.parametrize(
    "name", ["", "*", "*.io", "a..b", "quay.io:443", "a/b", "a b", "caf\u00e9.fr", "fe80::1%eth0", "[::1]", "1.2.3"]
)
def test_invalid_names_are_refused(authority: CertificateAuthority, name: str) -> None:
    with pytest.raises(NameInvalid):
        authority.context_for(name)


# Cache of contexts.


def test_same_context_for_every_spelling_of_a_name(authority: CertificateAuthority) -> None:
    context = authority.context_for("quay.io")
    assert authority.context_for("QUAY.io.") is context
    assert authority.context_for("ghcr.io") is not context
    assert authority.context_for("2001:db8::7") is authority.context_for("2001:DB8:0::7")


def test_leaf_is_renewed_when_a_third_of_its_lifetime_is_left(
    authority: CertificateAuthority, clock: SteppedClock
) -> None:
    context, start = authority.context_for("quay.io"), clock.now
    clock.now = start + 60 * DAY - 1
    assert authority.context_for("quay.io") is context
    clock.now = start + 60 * DAY
    renewed = authority.context_for("quay.io")
    assert renewed is not context
    assert authority.context_for("quay.io") is renewed
    assert validity(presented_leaf(authority, "quay.io")) == (clock.now - 2 * DAY, clock.now + 90 * DAY)


def test_leaf_is_renewed_if_the_clock_is_before_its_not_before(
    authority: CertificateAuthority, clock: SteppedClock
) -> None:
    clock.now += 100 * DAY
    context = authority.context_for("quay.io")
    clock.now -= 2 * DAY
    assert authority.context_for("quay.io") is context
    clock.now -= 90 * DAY
    assert authority.context_for("quay.io") is not context
    assert validity(presented_leaf(authority, "quay.io"))[0] == clock.now - 2 * DAY


def test_leaf_never_outlives_the_authority(authority: CertificateAuthority, clock: SteppedClock) -> None:
    root_not_after = validity(x509.load_pem_x509_certificate(authority.certificate_pem))[1]
    clock.now = root_not_after - 30 * DAY
    context = authority.context_for("quay.io")
    assert validity(presented_leaf(authority, "quay.io"))[1] == root_not_after
    clock.now = root_not_after - 10 * DAY - 1
    assert authority.context_for("quay.io") is context
    clock.now = root_not_after
    with pytest.raises(AuthorityError, match=r"^the CA certificate is valid from \d{4}-\d\d-\d\d to \d{4}-\d\d-\d\d, "):
        authority.context_for("quay.io")


def test_least_recently_used_context_is_evicted(authority: CertificateAuthority) -> None:
    first, second = authority.context_for("first.example"), authority.context_for("second.example")
    for number in range(998):
        authority.context_for(f"n{number}.example")
    assert authority.context_for("first.example") is first
    authority.context_for("one-more.example")
    assert authority.context_for("first.example") is first
    assert authority.context_for("second.example") is not second


def test_all_leaves_have_one_key_and_a_later_start_another(
    authority: CertificateAuthority, tmp_path: Path, clock: SteppedClock
) -> None:
    one, other = presented_leaf(authority, "a.io"), presented_leaf(authority, "b.io")
    later = presented_leaf(open_authority(tmp_path, clock), "a.io")
    assert one.public_key() == other.public_key()
    assert one.public_key() != later.public_key()
    assert len({one.serial_number, other.serial_number, later.serial_number}) == 3


# The connection.


@pytest.mark.parametrize(
    ("offered", "selected"),
    [(None, None), (["http/1.1"], "http/1.1"), (["h2", "http/1.1"], "http/1.1"), (["h2"], None)],
)
def test_alpn_selects_only_http_1_1(
    authority: CertificateAuthority, offered: list[str] | None, selected: str | None
) -> None:
    pair = HandshakePair(
        authority.context_for("quay.io"), authority.certificate_pem, "quay.io", alpn=offered
    ).complete_handshake()
    assert pair.client.selected_alpn_protocol() == selected


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_are_resumed_by_ticket(authority: CertificateAuthority, version: ssl.TLSVersion) -> None:
    context = authority.context_for("quay.io")
    first = HandshakePair(context, authority.certificate_pem, "quay.io", version=version).complete_handshake()
    session = first.client.session
    assert session is not None
    assert session.has_ticket
    assert not first.client.session_reused
    again = HandshakePair(context, b"", "quay.io", client=first.client_context, session=session).complete_handshake()
    assert again.client.session_reused


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_ticket_of_another_host_is_not_resumed(authority: CertificateAuthority, version: ssl.TLSVersion) -> None:
    """CONNECT selects the context, so the server name in the handshake makes no difference."""
    first = HandshakePair(
        authority.context_for("quay.io"), authority.certificate_pem, "quay.io", version=version
    ).complete_handshake()
    client = first.client_context
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    for server_name in ("ghcr.io", "quay.io"):
        again = HandshakePair(
            authority.context_for("ghcr.io"), b"", server_name, client=client, session=first.client.session
        ).complete_handshake()
        assert not again.client.session_reused


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_ticket_of_another_process_is_resumed(authority: CertificateAuthority, version: ssl.TLSVersion) -> None:
    """A forked process has the same ticket keys but signs its own leaves. Simulate it by dropping the signed leaf."""
    first = HandshakePair(
        authority.context_for("quay.io"), authority.certificate_pem, "quay.io", version=version
    ).complete_handshake()
    authority._leaves.clear()
    context = authority.context_for("quay.io")
    again = HandshakePair(
        context, b"", "quay.io", client=first.client_context, session=first.client.session
    ).complete_handshake()
    assert again.client.session_reused


def test_ticket_of_another_ca_is_not_resumed(tmp_path: Path, clock: SteppedClock) -> None:
    one, other = open_authority(tmp_path / "one", clock), open_authority(tmp_path / "other", clock)
    first = HandshakePair(
        one.context_for("quay.io"), one.certificate_pem + other.certificate_pem, "quay.io"
    ).complete_handshake()
    client, session = first.client_context, first.client.session
    again = HandshakePair(
        other.context_for("quay.io"), b"", "quay.io", client=client, session=session
    ).complete_handshake()
    assert not again.client.session_reused


def test_tls_1_1_is_refused(authority: CertificateAuthority) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        client.minimum_version, client.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, SSL.Error), match=r"(?i)protocol"):
        HandshakePair(authority.context_for("quay.io"), b"", "quay.io", client=client).complete_handshake()


def test_tls_1_2_ciphers_are_authenticated_and_forward_secret(authority: CertificateAuthority) -> None:
    ciphers = authority.context_for("quay.io").create_connection(None).get_cipher_list()
    for cipher in ciphers:
        assert cipher.startswith(("TLS_", "ECDHE-ECDSA-", "ECDHE-RSA-"))
        assert "GCM" in cipher or "POLY1305" in cipher


def test_contexts_forbid_renegotiation_and_compression(authority: CertificateAuthority) -> None:
    context = authority.context_for("quay.io").ticket_context
    expected = SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION
    assert context.set_options(0) & (expected | SSL.OP_NO_TICKET) == expected
    assert context.set_mode(0) & SSL.MODE_RELEASE_BUFFERS
    assert context.get_session_cache_mode() == SSL.SESS_CACHE_OFF


def test_renegotiation_is_refused(authority: CertificateAuthority) -> None:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    client, server = SSL.Connection(context, None), authority.context_for("quay.io").create_connection(None)
    client.set_connect_state()

    def exchange(*steps: Step) -> None:
        for step in steps * 3:
            try:
                step()
            except SSL.WantReadError:
                pass
            for side, other in ((client, server), (server, client)):
                try:
                    other.bio_write(side.bio_read(1 << 20))
                except SSL.WantReadError:
                    pass

    exchange(client.do_handshake, server.do_handshake)
    assert client.renegotiate()
    with pytest.raises(SSL.Error, match="no renegotiation"):
        exchange(client.do_handshake, lambda: server.recv(1), lambda: client.recv(1))
    assert server.total_renegotiations() == 0


def test_no_deprecated_call_is_made(tmp_path: Path, clock: SteppedClock) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_authority(tmp_path, clock).context_for("quay.io")


# CAs from files.


def write_chain(directory: Path, passphrase: bytes) -> tuple[Path, Path, bytes]:
    """Write an RSA issuer below a root, and its encrypted key. Return the paths of both files and the root in PEM."""
    keys = [rsa.generate_private_key(65537, 2048) for _ in range(2)]
    # String types that we do not write ourselves, and a key identifier that we do not compute this way.
    names = [
        x509.Name([x509.RelativeDistinguishedName([
            x509.NameAttribute(x509.NameOID.COMMON_NAME, text, _type=x509.name._ASN1Type.PrintableString),
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "An Office", _type=x509.name._ASN1Type.T61String),
        ])]) for text in ("Root", "Issuer")
    ]  # fmt: skip
    certificates = []
    for index in (0, 1):
        identifier = x509.SubjectKeyIdentifier(bytes([index]) * 8)
        certificates.append(
            x509.CertificateBuilder()
            .subject_name(names[index])
            .issuer_name(names[0])
            .public_key(keys[index].public_key())
            .serial_number(index + 1)
            .not_valid_before(datetime.fromtimestamp(time.time() - DAY, UTC))
            .not_valid_after(datetime.fromtimestamp(time.time() + 40 * DAY, UTC))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier(bytes(8), None, None), critical=False)
            .sign(keys[0], hashes.SHA256())
        )
    pem = serialization.Encoding.PEM
    root, issuer = (certificate.public_bytes(pem) for certificate in certificates)
    (directory / "x.crt").write_bytes(issuer + root)
    encryption = serialization.BestAvailableEncryption(passphrase)
    (directory / "x.key").write_bytes(
        keys[1].private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, encryption)
    )
    (directory / "x.key").chmod(0o600)
    return directory / "x.crt", directory / "x.key", root


def test_rsa_intermediate_signs_leaves(tmp_path: Path, clock: SteppedClock) -> None:
    certificate_file, key_file, root = write_chain(tmp_path, b"pass phrase")
    authority = CertificateAuthority.open(
        tmp_path / "unused", certificate_file=certificate_file, key_file=key_file, passphrase="pass phrase", clock=clock
    )
    assert authority.warnings == ()
    assert authority.certificate_pem == root
    assert not (tmp_path / "unused").exists()
    for name in ("quay.io", "::1"):
        leaf = HandshakePair(authority.context_for(name), root, name).complete_handshake().leaf
        issuer = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        assert validity(leaf) == validity(issuer)
        identifier = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        assert identifier == bytes([1]) * 8
        assert leaf.issuer.public_bytes() == issuer.subject.public_bytes()
        assert issuer.subject.public_bytes() in leaf.tbs_certificate_bytes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("certificate_file", "CA_CRT_FILE is /x but CA_KEY_FILE is not set; set both, or neither"),
        ("key_file", "CA_KEY_FILE is /x but CA_CRT_FILE is not set; set both, or neither"),
    ],
)
def test_one_file_without_the_other_is_an_error(
    tmp_path: Path, clock: SteppedClock, setting: str, message: str
) -> None:
    files: dict[str, Path | None] = {"certificate_file": None, "key_file": None} | {setting: Path("/x")}
    with pytest.raises(AuthorityError) as raised:
        CertificateAuthority.open(
            tmp_path,
            certificate_file=files["certificate_file"],
            key_file=files["key_file"],
            passphrase=None,
            clock=clock,
        )
    assert str(raised.value) == message


def test_repr_contains_no_key(authority: CertificateAuthority) -> None:
    assert "key" not in repr(authority).lower()
