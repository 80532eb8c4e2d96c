"""Tests for CAs from files: all supported formats, and an error message for every defect."""

from __future__ import annotations

import datetime
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from dockerproxy.proxy.issuer import DAY, AuthorityError, Issuer, IssuerKey, load_configured_issuer

NOW = time.time()
PEM = serialization.Encoding.PEM
FORMATS = serialization.PrivateFormat

EC_KEY = ec.generate_private_key(ec.SECP256R1())
OTHER_EC_KEY = ec.generate_private_key(ec.SECP384R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def make_certificate(
    key: Any = EC_KEY,
    *,
    subject: str = "A CA",
    issuer: tuple[str, Any] | None = None,
    ca: bool | None = True,
    cert_sign: bool | None = True,
    not_before: float = NOW - DAY,
    not_after: float = NOW + 365 * DAY,
) -> x509.Certificate:
    """Return a CA certificate for `key`, signed by the name and key `issuer` or else self-signed."""
    issuer_name, issuer_key = issuer or (subject, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime.fromtimestamp(not_before, datetime.UTC))
        .not_valid_after(datetime.datetime.fromtimestamp(not_after, datetime.UTC))
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if cert_sign is not None:
        usage = x509.KeyUsage(
            digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=cert_sign, crl_sign=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(issuer_key, None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA256())


def pem(key: Any, format: serialization.PrivateFormat = FORMATS.PKCS8, passphrase: bytes | None = None) -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return bytes(key.private_bytes(PEM, format, encryption))


class IssuerFilePair:
    """A certificate file and a key file in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.certificate, self.key = directory / "my.crt", directory / "my.key"

    def write(self, key: bytes, *certificates: x509.Certificate) -> IssuerFilePair:
        self.certificate.write_bytes(b"".join(each.public_bytes(PEM) for each in certificates))
        self.key.write_bytes(key)
        self.key.chmod(0o600)
        return self

    def load(self, passphrase: str | None = None, now: float = NOW) -> Issuer:
        return load_configured_issuer(self.certificate, self.key, passphrase, now)

    def error_message(self, passphrase: str | None = None, now: float = NOW) -> str:
        """Return the error message for these files, without the directory."""
        with pytest.raises(AuthorityError) as raised:
            self.load(passphrase, now)
        message = str(raised.value).replace(f"{self.key.parent}/", "")
        assert "\n" not in message
        if passphrase:
            assert passphrase not in message
            assert raised.value.__cause__ is None
        return message


@pytest.fixture
def files(tmp_path: Path) -> IssuerFilePair:
    return IssuerFilePair(tmp_path)


@pytest.mark.parametrize("passphrase", [None, "s3cret pa\u00df"])
@pytest.mark.parametrize("format", [FORMATS.PKCS8, FORMATS.TraditionalOpenSSL])
@pytest.mark.parametrize("key", [EC_KEY, OTHER_EC_KEY, RSA_KEY], ids=["P-256", "P-384", "RSA"])
def test_every_key_format_is_loaded(
    files: IssuerFilePair, key: IssuerKey, format: serialization.PrivateFormat, passphrase: str | None
) -> None:
    root = make_certificate(key)
    files.write(pem(key, format, None if passphrase is None else passphrase.encode()), root)
    issuer = files.load(passphrase)
    assert issuer.certificate == root
    assert issuer.trusted == root
    assert issuer.sent == ()
    assert issuer.warnings == ()
    assert issuer.key.private_numbers() == key.private_numbers()


def test_files_made_by_openssl_are_loaded(files: IssuerFilePair) -> None:
    """`openssl ecparam -genkey` writes the curve parameters before the key."""
    key, certificate = str(files.key), str(files.certificate)
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-out", key], check=True)
    assert files.key.read_bytes().startswith(b"-----BEGIN EC PARAMETERS-----")
    request = ["openssl", "req", "-x509", "-new", "-key", key, "-subj", "/C=DE/O=An Office+OU=x/CN=CA", "-days", "99"]
    subprocess.run([*request, "-out", certificate], check=True)
    assert files.load(now=time.time()).warnings == ()


def test_repr_contains_no_key(files: IssuerFilePair) -> None:
    issuer = files.write(pem(EC_KEY), make_certificate()).load()
    assert "key" not in repr(issuer).lower()


def test_without_key_usage_a_ca_may_sign(files: IssuerFilePair) -> None:
    files.write(pem(EC_KEY), make_certificate(cert_sign=None)).load()


# Chains.

ROOT = make_certificate(RSA_KEY, subject="root", not_after=NOW + 100 * DAY)
INTERMEDIATE = make_certificate(
    OTHER_EC_KEY, subject="middle", issuer=("root", RSA_KEY), not_before=NOW - 3 * DAY, not_after=NOW + 80 * DAY
)
LEAF_CA = make_certificate(EC_KEY, subject="low", issuer=("middle", OTHER_EC_KEY), not_before=NOW - 5 * DAY)


@pytest.mark.parametrize("above", [(INTERMEDIATE, ROOT), (ROOT, INTERMEDIATE)])
def test_a_chain_is_ordered_and_its_root_trusted(files: IssuerFilePair, above: tuple[x509.Certificate, ...]) -> None:
    issuer = files.write(pem(EC_KEY), LEAF_CA, *above).load()
    assert issuer.path == (LEAF_CA, INTERMEDIATE, ROOT)
    assert issuer.trusted == ROOT
    assert issuer.sent == (LEAF_CA, INTERMEDIATE)
    assert issuer.warnings == ()
    assert (issuer.not_before, issuer.not_after) == (int(NOW - DAY), int(NOW + 80 * DAY))


def test_a_chain_without_its_root_is_trusted_at_the_issuer(files: IssuerFilePair) -> None:
    issuer = files.write(pem(EC_KEY), LEAF_CA, INTERMEDIATE).load()
    assert issuer.trusted == LEAF_CA
    assert issuer.sent == (LEAF_CA, INTERMEDIATE)


def test_unrelated_certificates_are_ignored(files: IssuerFilePair) -> None:
    namesake = make_certificate(EC_KEY, subject="root")  # the right name, but it did not sign the chain
    issuer = files.write(pem(EC_KEY), LEAF_CA, INTERMEDIATE, namesake, make_certificate(subject="stranger")).load()
    assert issuer.path == (LEAF_CA, INTERMEDIATE)
    assert issuer.trusted == LEAF_CA
    (warning,) = issuer.warnings
    assert warning.endswith("my.crt has certificates outside the chain of the first; ignored: 2")


def test_an_expired_certificate_in_the_chain_is_an_error(files: IssuerFilePair) -> None:
    old = make_certificate(RSA_KEY, subject="root", not_after=NOW - 3600)
    files.write(pem(OTHER_EC_KEY), INTERMEDIATE, old)
    day = time.strftime("%Y-%m-%d", time.gmtime(NOW - 3600))
    assert files.error_message() == f"CA_CRT_FILE: the issuer 'CN=root' in my.crt expired on {day}"


# Errors.


def test_missing_certificate_file_is_an_error(files: IssuerFilePair) -> None:
    files.key.write_bytes(pem(EC_KEY))
    assert files.error_message() == "CA_CRT_FILE: my.crt cannot be read: No such file or directory"


def test_missing_key_file_is_an_error(files: IssuerFilePair) -> None:
    files.certificate.write_bytes(make_certificate().public_bytes(PEM))
    assert files.error_message() == "CA_KEY_FILE: my.key cannot be read: No such file or directory"


def test_a_directory_instead_of_a_file_is_an_error(files: IssuerFilePair) -> None:
    files.certificate.mkdir()
    assert files.error_message() == "CA_CRT_FILE: my.crt cannot be read: Is a directory"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\x30\x82" + b"\0" * 100,
        make_certificate().public_bytes(serialization.Encoding.DER),
        pem(EC_KEY),
        make_certificate().public_bytes(PEM)[:200],
        make_certificate().public_bytes(PEM).replace(b"M", b"N", 1),
    ],
    ids=["empty", "text", "binary", "DER", "a key", "cut off", "damaged"],
)
def test_invalid_certificate_file_is_an_error(files: IssuerFilePair, content: bytes) -> None:
    files.write(pem(EC_KEY))
    files.certificate.write_bytes(content)
    assert files.error_message() == "CA_CRT_FILE: my.crt is not a valid certificate in PEM format"


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", make_certificate().public_bytes(PEM), pem(EC_KEY)[:100], pem(EC_KEY).replace(b"M", b"N", 1)],
    ids=["empty", "text", "a certificate", "cut off", "damaged"],
)
@pytest.mark.parametrize("passphrase", [None, "s3cret"])
def test_invalid_key_file_is_an_error(files: IssuerFilePair, content: bytes, passphrase: str | None) -> None:
    files.write(content, make_certificate())
    assert files.error_message(passphrase) == "CA_KEY_FILE: my.key contains no private key in PEM format"


@pytest.mark.parametrize("format", [FORMATS.PKCS8, FORMATS.TraditionalOpenSSL])
@pytest.mark.parametrize("key", [EC_KEY, RSA_KEY], ids=["EC", "RSA"])
def test_encrypted_key_needs_the_right_passphrase(
    files: IssuerFilePair, key: IssuerKey, format: serialization.PrivateFormat
) -> None:
    files.write(pem(key, format, b"right"), make_certificate(key))
    for missing in (None, ""):
        assert files.error_message(missing) == "CA_KEY_FILE: my.key is encrypted, but CA_KEY_PASSPHRASE is not set"
    assert files.error_message("wr0ng") == "CA_KEY_FILE: my.key cannot be decrypted with CA_KEY_PASSPHRASE"


def test_unused_passphrase_gives_a_warning(files: IssuerFilePair) -> None:
    (warning,) = files.write(pem(EC_KEY), make_certificate()).load("s3cret").warnings
    assert warning.endswith("my.key is not encrypted, so CA_KEY_PASSPHRASE has no effect")


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP256R1()), RSA_KEY], ids=["same type", "other type"])
def test_a_key_of_another_certificate_is_an_error(files: IssuerFilePair, key: IssuerKey) -> None:
    files.write(pem(key), make_certificate(EC_KEY))
    assert files.error_message() == "CA_KEY_FILE: my.key is not the key of the certificate in my.crt"


def test_expired_certificate_is_an_error(files: IssuerFilePair) -> None:
    files.write(pem(EC_KEY), make_certificate(not_after=NOW + DAY))
    files.load(now=NOW + DAY - 5)
    assert files.error_message(now=NOW + DAY + 5).startswith("CA_CRT_FILE: the certificate in my.crt expired on ")


def test_certificate_that_is_not_yet_valid_is_an_error(files: IssuerFilePair) -> None:
    files.write(pem(EC_KEY), make_certificate(not_before=1893456000, not_after=1993456000))
    assert files.error_message() == (
        "CA_CRT_FILE: the certificate in my.crt is not valid before 2030-01-01 00:00 UTC; "
        "is this machine's clock right?"
    )


def test_certificate_near_its_expiry_gives_a_warning(files: IssuerFilePair) -> None:
    (warning,) = (
        files.write(pem(EC_KEY), make_certificate(not_after=1893456000)).load(now=1893456000 - 29 * DAY).warnings
    )
    assert warning.endswith("my.crt expires on 2030-01-01")


@pytest.mark.parametrize("ca", [False, None])
def test_certificate_without_ca_flag_is_an_error(files: IssuerFilePair, ca: bool | None) -> None:
    files.write(pem(EC_KEY), make_certificate(ca=ca))
    assert files.error_message() == "CA_CRT_FILE: the certificate in my.crt is not a CA certificate (basicConstraints)"


def test_certificate_without_key_cert_sign_is_an_error(files: IssuerFilePair) -> None:
    files.write(pem(EC_KEY), make_certificate(cert_sign=False))
    assert files.error_message() == (
        "CA_CRT_FILE: the certificate in my.crt may not sign certificates (keyUsage lacks keyCertSign)"
    )


def test_a_weak_rsa_key_is_an_error(files: IssuerFilePair) -> None:
    key = rsa.generate_private_key(65537, 1024)
    files.write(pem(key), make_certificate(key))
    assert files.error_message() == "CA_KEY_FILE: my.key is an RSA key of 1024 bits, but clients require 2048 or more"


def test_a_key_of_another_type_is_an_error(files: IssuerFilePair) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    files.write(pem(key), make_certificate(key))
    assert files.error_message() == "CA_KEY_FILE: my.key is neither an RSA nor an EC key"


# Permissions of the key file.


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_readable_key_gives_a_warning(files: IssuerFilePair, mode: int) -> None:
    files.write(pem(EC_KEY), make_certificate()).key.chmod(mode)
    (warning,) = files.load().warnings
    assert warning == f"CA_KEY_FILE: {files.key} is readable by other users; set its mode to 0600"
    assert files.key.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(
    ("mode", "is_ours", "is_our_group", "warns"),
    [
        (0o640, False, True, False),
        (0o440, False, True, False),
        (0o660, False, True, True),
        (0o644, False, True, True),
        (0o640, False, False, True),
        (0o640, True, True, True),
    ],
)
def test_a_key_of_root_may_be_readable_by_our_group(
    files: IssuerFilePair, monkeypatch: pytest.MonkeyPatch, mode: int, is_ours: bool, is_our_group: bool, warns: bool
) -> None:
    """An administrator, or Kubernetes, gives it to us like that. With mode 600 we could not read it."""
    key = files.write(pem(EC_KEY), make_certificate()).key
    key.chmod(mode)
    status = key.stat()
    monkeypatch.setattr("os.geteuid", lambda: status.st_uid if is_ours else status.st_uid + 1)
    monkeypatch.setattr("os.getegid", lambda: status.st_gid + 1)
    monkeypatch.setattr("os.getgroups", lambda: [status.st_gid] if is_our_group else [])
    assert bool(files.load().warnings) is warns


def test_systemd_credential_is_private(files: IssuerFilePair, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd grants the service's user access with an ACL. Its mask appears as the group bits: 0440."""
    files.write(pem(EC_KEY), make_certificate()).key.chmod(0o440)
    monkeypatch.setattr("os.getxattr", lambda path, name: b"\x02" if name == "system.posix_acl_access" else b"")
    assert files.load().warnings == ()
