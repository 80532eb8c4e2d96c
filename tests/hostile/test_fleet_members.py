"""A hostile member of a fleet, and strangers that pose as members.

A member is trusted less than a registry. These are the kinds of its attacks, each in the clear and over TLS:

- it refuses the connection, hangs up or says nothing: before the request, at CONNECT, within the handshake, after the
  request, and after each kind of byte of the answer
- its certificate is not one of the fleet's CA, or of another registry
- it sends no HTTP, a head without an end, a framing that contradicts itself
- it says that upstream refuses, fails or redirects, in its own word, in upstream's, in one that does not exist
- it sends this daemon to itself, back, round in circles, to strangers, to all members
- it sends less, more, without an end, with a coding, another range, another size, another digest, other bytes
- it claims limits, challenges, cookies and locations

A client gets the right bytes in each case but the last bytes of two: if a long blob has the right form and other bytes,
these have been sent on before the digest shows it. That pull breaks off, and the next one succeeds.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import socket

import pytest

from bench.servers import free_port
from tests.e2e.harness.fleet import MemberDaemon, hop_fields
from tests.e2e.harness.http_client import BufferedResponse, read_response, send_raw_request
from tests.hostile.members import (
    ADDRESS,
    SIZE,
    Attack,
    Hit,
    HostileFleet,
    HostileMember,
    Target,
    Tunnel,
    accept_tunnel,
    listening,
    running_fleet,
)

pytestmark = pytest.mark.slow

KINDS = ("blob", "login", "manifest")  # of content; see `Target`
TRAP = f"127.0.0.31:{free_port()}"
"""The address of a server that is no member, and no registry. Nobody may be sent there."""


def lines(*fields: str) -> str:
    return "\r\n".join(fields) + "\r\n"


HEAD = lines("HTTP/1.1 200 OK", "X-Fleet-Answer: upstream", "Content-Type: application/octet-stream")
LENGTH = f"Content-Length: {SIZE}"


def whole(hit: Hit, *fields: str, body: bytes | None = None) -> None:
    """Send an answer with the right head and other fields, and `body`, or the right one."""
    hit.answer(200, LENGTH, *fields, body=hit.data if body is None else body)


def bytes_without_end(hit: Hit) -> None:
    """Send the right answer, and more."""
    without_end(HEAD, f"{LENGTH}\r\n\r\n", piece=hit.data)(hit)


def sends(*parts: str | bytes, waits: bool = False) -> Attack:
    """Return the attack that sends `parts`, and hangs up, or `waits`."""

    def attack(hit: Hit) -> None:
        hit.send(*parts)
        if waits:
            hit.wait()

    return attack


def says(status: int, *fields: str, word: str = "upstream", body: bytes = b"{}") -> Attack:
    return lambda hit: hit.answer(status, f"Content-Length: {len(body)}", *fields, body=body, word=word)


def sends_bytes(count: int, *, waits: bool = False) -> Attack:
    """Return the attack that sends the right head and so many of the right bytes."""

    def attack(hit: Hit) -> None:
        whole(hit, body=hit.data[:count])
        if waits:
            hit.wait()

    return attack


def names_relay(name: Callable[[str], str]) -> Attack:
    """Return the attack that sends the daemon to the member that `name` returns for its own address."""

    def attack(hit: Hit) -> None:
        host, port = hit.connection.getsockname()[:2]
        target = name(f"{host}:{port}")
        hit.answer(307, f"X-Fleet-Relay: {target}", f"Location: http://{target}/", "Content-Length: 0", word="own")

    return attack


def without_end(*head: str, piece: bytes) -> Attack:
    """Return the attack that sends `piece` again and again."""

    def attack(hit: Hit) -> None:
        hit.send("".join(head))
        while True:
            hit.send(piece)

    return attack


EVIL = f"Location: http://{TRAP}/"

ATTACKS: dict[str, Attack] = {
    # hangs up or is silent after each kind of byte
    "no answer": sends(),
    "silence": sends(waits=True),
    "half a status line": sends("HTTP/1.1 2"),
    "half a status line, silence": sends("HTTP/1.1 2", waits=True),
    "a status line": sends("HTTP/1.1 200 OK\r\n"),
    "half a head": sends(HEAD),
    "a head": sends_bytes(0),
    "a head, silence": sends_bytes(0, waits=True),
    "the first byte": sends_bytes(1),
    "the first byte, silence": sends_bytes(1, waits=True),
    "half of the bytes": sends_bytes(SIZE // 2),
    "half of the bytes, silence": sends_bytes(SIZE // 2, waits=True),
    "all but the last byte": sends_bytes(SIZE - 1),
    "all but the last byte, silence": sends_bytes(SIZE - 1, waits=True),
    "an interim response, silence": sends("HTTP/1.1 102 Processing\r\n\r\n", waits=True),
    # no HTTP, and contradictory framing
    "no HTTP": sends(bytes(range(256)) * 100 + b"\r\n\r\n"),
    "HTTP/0.9": sends(b"<html>not found</html>"),
    "HTTP/3": sends("HTTP/3 200 OK\r\n\r\n"),
    "interim responses without an end": without_end(piece=b"HTTP/1.1 102 Processing\r\n\r\n" * 100),
    "a head without an end": without_end("HTTP/1.1 200 OK\r\n", piece=b"X-A: " + b"a" * 1000 + b"\r\n"),
    "a field without an end": without_end("HTTP/1.1 200 OK\r\nX-A: ", piece=b"a" * 65536),
    "two lengths": lambda hit: whole(hit, "Content-Length: 5"),
    "a negative length": sends(HEAD, "Content-Length: -1\r\n\r\n"),
    "a length of words": sends(HEAD, "Content-Length: many\r\n\r\n"),
    "length and chunks": lambda hit: whole(hit, "Transfer-Encoding: chunked"),
    "another transfer coding": sends(HEAD, "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "broken chunks": sends(HEAD, "Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    # bytes without an end
    "bytes without an end": without_end(HEAD, "Connection: close\r\n\r\n", piece=b"\0" * 65536),
    "chunks without an end": without_end(
        HEAD, "Transfer-Encoding: chunked\r\n\r\n", piece=b"10000\r\n" + b"\0" * 65536 + b"\r\n"
    ),
    "more bytes than announced, without an end": bytes_without_end,
    "a huge length, then silence": sends(HEAD, f"Content-Length: {10**17}\r\n\r\n", b"\0" * 65536, waits=True),
    "a length beyond all": sends(HEAD, f"Content-Length: {1 << 80}\r\n\r\n", b"\0" * 65536),
    "a length of some TB, bytes without an end": without_end(
        HEAD, f"Content-Length: {10**13}\r\n\r\n", piece=b"\0" * 65536
    ),
    # upstream's word
    "301 elsewhere": says(301, EVIL), "302 elsewhere": says(302, EVIL), "307 elsewhere": says(307, EVIL),
    "303 to itself": says(303, "Location: /v2/"), "308 elsewhere, own": says(308, EVIL, word="own"),
    "204": says(204, body=b""), "304": says(304, body=b""), "206 for the whole": says(206),
    "401 elsewhere": says(401, f'WWW-Authenticate: Bearer realm="http://{TRAP}/token",service="evil"'),
    "401 Basic": says(401, "WWW-Authenticate: Basic realm=evil"), "403": says(403), "404": says(404),
    "404 without an end": without_end(lines("HTTP/1.1 404 X", "X-Fleet-Answer: upstream"), "\r\n", piece=b"{" * 65536),
    "410": says(410), "416": says(416), "429 for an hour": says(429, "Retry-After: 3600"), "500": says(500),
    "502": says(502), "503 for an hour": says(503, "Retry-After: 3600"), "504": says(504), "999": says(999),
    # its own word, none, and others
    "404, own": says(404, word="own"), "508, own": says(508, word="own"), "503, own": says(503, word="own"),
    "200, own": lambda hit: hit.answer(200, LENGTH, body=hit.data, word="own"),
    "200, nobody's": lambda hit: hit.answer(200, LENGTH, body=hit.data, word=""),
    "200, of two": lambda hit: hit.answer(200, LENGTH, "X-Fleet-Answer: upstream", body=b"\1" * SIZE, word="evil"),
    "401, nobody's": says(401, word=""), "407, nobody's": says(407, "Proxy-Authenticate: Basic realm=evil", word=""),
    "a stale copy": lambda hit: whole(hit, "X-Cache: STALE", "X-Cache-Because: no"),
    # relays
    "a stranger": names_relay(lambda own: TRAP), "itself": names_relay(lambda own: own),
    "a name": names_relay(lambda own: "evil.example:80"), "nobody": names_relay(lambda own: ""),
    "lines": names_relay(lambda own: "a\r\n b"), "much": names_relay(lambda own: "a" * 8000),
    "an address in parts": names_relay(lambda own: own.replace(":", " ")),
    # content of another form
    "no content": says(200, body=b""), "no length": lambda hit: hit.answer(200, "Connection: close", body=hit.data),
    "chunks": lambda hit: hit.answer(
        200, "Transfer-Encoding: chunked", body=b"%x\r\n%s\r\n0\r\n\r\n" % (SIZE, hit.data)
    ),
    "gzip": lambda hit: whole(hit, "Content-Encoding: gzip"),
    "a coding that nobody knows": lambda hit: whole(hit, "Content-Encoding: evil"),
    "another digest": lambda hit: whole(hit, f"Docker-Content-Digest: sha256:{'0' * 64}"),
    "no digest": lambda hit: whole(hit, "Docker-Content-Digest: evil"),
    "a range that nobody asked for": lambda hit: hit.answer(
        206, LENGTH, f"Content-Range: bytes 0-{SIZE - 1}/{SIZE}", body=hit.data
    ),
    "short and other content": says(200, body=b"other"),
    # claims, with the right content
    "claims": lambda hit: whole(
        hit, "RateLimit-Remaining: 0;w=21600", "RateLimit-Limit: 1;w=21600", "Set-Cookie: a=b", EVIL, "Retry-After: 99",
        f'WWW-Authenticate: Bearer realm="http://{TRAP}/token"', "Docker-Distribution-API-Version: registry/9.0",
        "Link: </evil>; rel=next", "X-Cache: MISS", "Via: 1.1 evil", "Content-Type: text/html", "Warning: 299 - evil",
        'CDN-Loop: docker-registry-proxy;from="evil";login=none;as=owner', "OCI-Subject: evil",
        "Connection: a, b, close",
    ),
}  # fmt: skip

WRONG_BYTES: dict[str, Attack] = {
    "the first byte": lambda hit: whole(hit, body=b"x" + hit.data[1:]),
    "the last byte": lambda hit: whole(hit, body=hit.data[:-1] + b"x"),
    "all bytes": lambda hit: whole(hit, body=b"\1" * SIZE),
    "a byte more": lambda hit: hit.answer(200, f"Content-Length: {SIZE + 1}", body=hit.data + b"x"),
    "a byte less": lambda hit: hit.answer(200, f"Content-Length: {SIZE - 1}", body=hit.data[:-1]),
}
"""Attacks with content of the right form, of which the digest shows at its end only that it is wrong."""

MANY_BYTES_MORE = without_end(HEAD, f"Content-Length: {10**9}\r\n\r\n", piece=b"\0" * 65536)


def refuses_tunnel(answer: bytes, *, waits: bool = False) -> Tunnel:
    def respond(member: HostileMember, connection: socket) -> None:
        connection.sendall(answer)
        if waits:
            Hit(connection, b"", b"").wait()

    return respond


def drip_handshake(member: HostileMember, connection: socket) -> None:
    """Send a byte of a handshake now and then, so that the connection is never silent."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03")
    while True:
        connection.sendall(b"\0")
        threading.Event().wait(0.1)


def send_endless_head(member: HostileMember, connection: socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-A: " + b"a" * 1000 + b"\r\n")


def hang_up_after_handshake(member: HostileMember, connection: socket) -> None:
    accept_tunnel(member, connection).close()


def has_certificate(name: str) -> Tunnel:
    return lambda member, connection: accept_tunnel(member, connection, name)


TUNNELS: dict[str, Tunnel] = {
    "hangs up": refuses_tunnel(b""),
    "silence": refuses_tunnel(b"", waits=True),
    "403": refuses_tunnel(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"),
    "407": refuses_tunnel(b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=evil\r\n\r\n"),
    "no HTTP": refuses_tunnel(bytes(range(256))),
    "half a head": refuses_tunnel(b"HTTP/1.1 200 OK\r\n"),
    "a head without an end": send_endless_head,
    "no TLS": refuses_tunnel(b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"),
    "no handshake": refuses_tunnel(b"HTTP/1.1 200 OK\r\n\r\n", waits=True),
    "a slow handshake": drip_handshake,
    "hangs up after the handshake": hang_up_after_handshake,
    "another CA": has_certificate("another CA"),
    "another registry": has_certificate("another registry"),
    "expired": has_certificate("expired"),
}
"""Attacks behind CONNECT, before a request."""

NO_FAULT = frozenset({"404, own", "508, own", "claims", "more bytes than announced, without an end"})
"""Attacks after which the member is asked again: an honest one may do the same, or the right bytes were among all."""


def pull(fleet: HostileFleet, target: Target) -> str:
    """Return why a client has not got the right bytes; `""` if it has."""
    try:
        response = fleet.daemon.client.request("GET", target.url, target.headers)
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
    if response.status != 200:
        return f"{response.status} {response.body[:200]!r}"
    claimed = {"set-cookie", "www-authenticate", "location", "link", "warning", "oci-subject", "ratelimit-limit"}
    if claimed & response.headers.keys():
        return f"the client got {claimed & response.headers.keys()}"
    return "" if response.body == target.member.data else f"{len(response.body)} other bytes"


def name_target(name: str, target: Target) -> str:
    return f"{target.kind}: {name}"


def test_every_pull_ends_with_the_right_bytes(tmp_path: Path, workers: int) -> None:
    """All clients pull at the same time. The next members know nothing, so that the bytes are upstream's."""
    attacks = [(kind, name, HostileMember(attack)) for kind in KINDS for name, attack in ATTACKS.items()]
    attacks += [
        (kind, f"CONNECT, {name}", HostileMember(sends(), tunnel=tunnel))
        for kind in ("login", "manifest")
        for name, tunnel in TUNNELS.items()
    ]
    trap = HostileMember(sends(), *_split(TRAP))
    with running_fleet(tmp_path, workers, [(kind, member) for kind, _, member in attacks]) as fleet, listening([trap]):
        names = [name_target(name, target) for (_, name, _), target in zip(attacks, fleet.targets, strict=True)]
        before = fleet.daemon.resident_bytes
        with ThreadPoolExecutor(8) as pool:
            results = dict(zip(names, pool.map(lambda target: pull(fleet, target), fleet.targets), strict=True))
        assert {name: result for name, result in results.items() if result} == {}
        assert fleet.daemon.resident_bytes - before < 200 << 20
        log = fleet.daemon.output_text
        left_alone = {
            name
            for name, target in zip(names, fleet.targets, strict=True)
            if f"the member {target.member.name} is not asked for " in log
        }
        harmless = {f"{kind}: {name}" for kind in KINDS for name in NO_FAULT} | {"blob: 200, nobody's"}
        assert set(names) - left_alone == harmless
        asked = {name for name, target in zip(names, fleet.targets, strict=True) if target.member.requests}
        assert set(names) - asked == {name for name in names if ": CONNECT" in name}
        assert trap.requests == []


def _split(name: str) -> tuple[str, int]:
    host, _, port = name.rpartition(":")
    return host, int(port)


def test_wrong_content_is_never_delivered_whole(tmp_path: Path, workers: int) -> None:
    """That pull breaks off. The next one comes from elsewhere, because the member is not asked any more."""
    attacks = [(kind, name, HostileMember(attack)) for kind in KINDS for name, attack in WRONG_BYTES.items()]
    attacks.append(("blob", "many bytes more", HostileMember(MANY_BYTES_MORE)))
    members = [(kind, member) for kind, _, member in attacks]
    with running_fleet(tmp_path, workers, members, CACHE_MAX_SIZE="2g") as fleet:
        for (kind, name, _), target in zip(attacks, fleet.targets, strict=True):
            if name == "many bytes more":
                _read_some(fleet, target)
            results = [pull(fleet, target) for _ in range(2 * workers + 1)]  # each process learns it by itself
            assert "other bytes" not in " ".join(results), (kind, name, results)
            assert results[-1] == "", (kind, name, results)
            if kind == "manifest":
                assert results[0] == "", (name, results)  # because it is checked before a byte is sent on


def _read_some(fleet: HostileFleet, target: Target) -> None:
    """Be a client that leaves while its blob goes on and on. The member has to notice that."""
    with fleet.daemon.client.stream("GET", target.url, target.headers) as response:
        assert response.status == 200
        response.read(4 << 20)
    assert target.member.ended.wait(100)


def _request(daemon: MemberDaemon, source: str, port: int, path: str, fields: Mapping[str, str]) -> BufferedResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, source_address=(source, 0), timeout=20)
    try:
        connection.request("GET", path, headers=dict(fields))
        return read_response(connection.getresponse())
    finally:
        connection.close()


def test_an_address_in_a_field_makes_no_member(tmp_path: Path, workers: int) -> None:
    """The stranger is in a network of TRUSTED_PROXIES, and names the address of a member."""
    members = [("blob", HostileMember(sends()))]
    with running_fleet(tmp_path, workers, members, TRUSTED_PROXIES="127.0.0.0/8") as fleet:
        daemon = fleet.daemon
        digest = fleet.network.good.put_blob("team/app", b"public")
        hop = f'docker-registry-proxy;from="{members[0][1].name}";login=configured;as=owner'
        forwarded: list[dict[str, str]] = [
            {"X-Forwarded-For": ADDRESS}, {"Forwarded": f"for={ADDRESS}"}, {"X-Real-IP": ADDRESS},
            {"X-Forwarded-For": f"{ADDRESS}, {ADDRESS}"}, {"Client-IP": ADDRESS}, {},
        ]  # fmt: skip
        path = f"/v2/team/app/blobs/{digest}?ns=good.test"
        for port in (daemon.port, daemon.registry_port):
            for fields in forwarded:
                response = _request(daemon, "127.0.0.1", port, path, {**fields, "CDN-Loop": hop})
                assert "x-fleet-answer" not in response.headers, (port, fields)
        # The same from the address itself: the field counts there with its proof, so that the test proves something.
        assert "x-fleet-answer" not in _request(daemon, ADDRESS, daemon.port, path, {"CDN-Loop": hop}).headers
        proven = hop_fields(tmp_path / "ca", hop, daemon.name, path)
        response = _request(daemon, ADDRESS, daemon.port, path, proven)
        assert response.headers["x-fleet-answer"] == "own"  # it has no such login


HOPS = {
    "lines": 'docker-registry-proxy;from="a\r\n b";login=none;as=owner',
    "folded": 'docker-registry-proxy;from="\r\n\tX-Evil: 1";login=none;as=owner',
    "nul": 'docker-registry-proxy;from="\0";login=none;as=owner',
    "huge": 'docker-registry-proxy;from="' + "a" * 60_000 + '";login=none;as=owner',
    "many": "docker-registry-proxy;" * 2_000,
    "many fields": "\r\nCDN-Loop: ".join(["docker-registry-proxy;from=a"] * 90),
    "commas": "," * 60_000,
    "an open quote": 'docker-registry-proxy;from="127.0.0.21:1;login=none;as=owner',
    "a stranger": 'docker-registry-proxy;from="127.0.0.99:1";login=none;as=owner',
    "a name": 'docker-registry-proxy;from="localhost:1";login=none;as=owner',
    "an unknown login": 'docker-registry-proxy;from="{member}";login=root;as=owner',
    "an unknown kind": 'docker-registry-proxy;from="{member}";login=none;as=king',
    "a parameter more": 'docker-registry-proxy;from="{member}";login=none;as=owner;x=y',
    "a parameter twice": 'docker-registry-proxy;from="{member}";from="{member}";login=none;as=owner',
    "two hops": 'docker-registry-proxy;from="{member}";login=none;as=owner, docker-registry-proxy;from="b"',
}


def test_malformed_fields_make_no_member(tmp_path: Path, workers: int) -> None:
    """They come from the address of a member."""
    member = HostileMember(sends())
    with running_fleet(tmp_path, workers, [("blob", member)]) as fleet:
        digest = fleet.network.good.put_blob("team/app", b"public")
        for name, value in HOPS.items():
            field = value.replace("{member}", member.name)
            request = f"GET /v2/team/app/blobs/{digest}?ns=good.test HTTP/1.1\r\nHost: x\r\nCDN-Loop: {field}\r\n\r\n"
            response = send_raw_request(fleet.daemon.port, request.encode())
            assert response.status in (200, 400, 431), name
            assert not {"x-fleet-answer", "x-evil"} & {one.lower() for one in response.headers}, name
