"""Facts about members of a fleet, from their answers, and about the hosts that the cache has content of."""

from __future__ import annotations

import datetime
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dockerproxy.doctor import machine


def make_certificate(name: str) -> x509.Certificate:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    return builder.sign(key, hashes.SHA256())


class MemberStub(ThreadingHTTPServer):
    """A member that answers `/ca.crt` with `status` and `content`."""

    daemon_threads = True
    status = 200
    content = b""

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: MemberStub

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/ca.crt" else 404)
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def member() -> Iterator[MemberStub]:
    with MemberStub(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_member_has_our_ca_or_another_one(member: MemberStub) -> None:
    own, other = make_certificate("own"), make_certificate("other")
    fingerprint = own.fingerprint(hashes.SHA256()).hex(":").upper()
    for certificate in (own, other):
        member.content = certificate.public_bytes(serialization.Encoding.PEM)
        facts = machine.member_facts(member.name, fingerprint)
        assert (facts.name, facts.error, facts.has_same_ca) == (member.name, "", certificate is own)


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (200, b"<html>", "another program answers"),
        (200, b"x" * 1_000_000, "another program answers"),
        (403, b"ALLOW_CLIENTS", "it refuses /ca.crt (status 403)"),
    ],
    ids=["page", "long", "refused"],
)
def test_a_member_that_is_none(member: MemberStub, status: int, content: bytes, error: str) -> None:
    member.status, member.content = status, content
    assert machine.member_facts(member.name, "").error == error


def test_a_member_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        name = f"127.0.0.1:{listener.getsockname()[1]}"
        assert machine.member_facts(name, "").error == "no answer within 0.2 s"
    assert machine.member_facts(name, "").error == "Connection refused"


def test_hosts_are_in_the_order_of_their_use(tmp_path: Path) -> None:
    for number, name in enumerate(("quay.io", "a.pkg.dev", "ghcr.io:5000")):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (number, number))
    assert machine.used_hosts(str(tmp_path)) == ["ghcr.io:5000", "a.pkg.dev", "quay.io"]
    assert machine.used_hosts(str(tmp_path / "missing")) == []
