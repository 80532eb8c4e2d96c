"""A hostile pusher, who may push to the hosted registry as everybody may: uploads, documents, referrers, passwords.

Without HTPASSWD_FILE, this is any client of the network. His work must cost others neither inodes nor memory.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import pytest

from tests.e2e.harness import images
from tests.e2e.harness.http_client import BufferedResponse, basic_authorization, read_response
from tests.e2e.harness.images import TypedContent
from tests.e2e.harness.process import mount_ext4, wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import EVIL, GOOD, HostileNetwork, StartRegistryDaemon

MIB = 1024 * 1024
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
PROJECT = Path(__file__).parents[2]
DEEP = "/".join(["d"] * 30)


class Pusher:
    """A client of the hosted registry with one connection, from the loopback address `source`."""

    def __init__(self, daemon: RegistryDaemon, source: str = "127.0.0.1") -> None:
        self._connection = http.client.HTTPConnection(
            "127.0.0.1", daemon.http_port, timeout=60, source_address=(source, 0)
        )

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> BufferedResponse:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, body, fields)
        return read_response(self._connection.getresponse())

    def push_blob(self, name: str, data: bytes) -> BufferedResponse:
        digest = images.sha256_digest(data)
        return self.request("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", data)

    def push_manifest(self, name: str, reference: str, content: bytes, media_type: str) -> BufferedResponse:
        return self.request("PUT", f"/v2/{name}/manifests/{reference}", content, Content_Type=media_type)

    def start_upload(self, name: str, data: bytes) -> BufferedResponse:
        location = self.request("POST", f"/v2/{name}/blobs/uploads/").headers["location"]
        return self.request("PATCH", location, data)


def check_honest_clients(daemon: RegistryDaemon, network: HostileNetwork, name: str, **headers: str) -> None:
    """Pull a blob cold and warm, and push one."""
    data = images.random_bytes(100_000, name)
    url = f"{GOOD}/v2/{name}/blobs/{network.good.put_blob(name, data)}"
    assert [daemon.client.get(url).cache_status for _ in range(2)] == ["MISS", "HIT"]
    digest = images.sha256_digest(data)
    response = Pusher(daemon).request("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", data, **headers)
    assert response.status == 201, response


def stored_paths(daemon: RegistryDaemon) -> set[str]:
    return {str(path) for path in (daemon.state_folder / "registry").rglob("*")}


# files


def test_empty_uploads_cost_nothing(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    daemon = start_daemon()
    pushers = [Pusher(daemon) for _ in range(4)]
    check_honest_clients(daemon, network, "before")
    before = stored_paths(daemon)
    for number in range(2000):
        response = pushers[number % 4].request("POST", f"/v2/k{number}/{DEEP}/blobs/uploads/")
        assert response.status == 202
        if number % 100 == 0:  # any process continues it
            location = response.headers["location"]
            assert pushers[(number + 1) % 4].request("GET", location).status == 204
            assert pushers[(number + 2) % 4].request("PATCH", location).status == 202
            assert pushers[(number + 3) % 4].request("DELETE", location).status == 204
    assert stored_paths(daemon) == before


def test_a_client_has_a_share_of_the_unfinished_uploads(
    network: HostileNetwork, start_daemon: StartRegistryDaemon
) -> None:
    daemon = start_daemon(MAX_UPLOADS_PER_CLIENT="6", MAX_UPLOADS="40")
    hogs = [Pusher(daemon, "127.0.0.2") for _ in range(4)]
    statuses = [hogs[number % 4].start_upload(f"r{number}", b"x").status for number in range(20)]
    assert statuses == [202] * 6 + [429] * 14
    refused = hogs[0].push_blob("hog/blob", b"data")
    assert (refused.status, refused.error_code) == (429, "TOOMANYREQUESTS")
    assert "MAX_UPLOADS_PER_CLIENT" in refused.error_message
    assert int(refused.headers["retry-after"]) > 0
    check_honest_clients(daemon, network, "others")
    daemon.restart()  # the new processes count them too
    assert Pusher(daemon, "127.0.0.2").start_upload("after", b"x").status == 429
    check_honest_clients(daemon, network, "others/again")


def test_uploads_that_fail_leave_nothing(start_daemon: StartRegistryDaemon) -> None:
    daemon = start_daemon()
    pusher, wrong = Pusher(daemon), images.sha256_digest(b"something else")
    assert pusher.push_blob("exists", b"data").status == 201
    before = stored_paths(daemon)
    for number in range(20):
        name = f"k{number}/{DEEP}"
        assert pusher.request("POST", f"/v2/{name}/blobs/uploads/?digest={wrong}", b"data").status == 400
        location = pusher.start_upload(name, b"data").headers["location"]
        assert pusher.request("PUT", f"{location}?digest={wrong}").status == 400
        location = pusher.start_upload(name, b"data").headers["location"]
        assert pusher.request("DELETE", location).status == 204
        assert pusher.push_manifest(name, "1", b"{}", OCI_MANIFEST).status == 400
        assert pusher.request("POST", f"/v2/{name}/blobs/uploads/?mount={wrong}&from=exists").status == 202
    assert pusher.push_blob("/".join(["d"] * 100), b"data").status == 400
    assert stored_paths(daemon) - before <= {str(daemon.state_folder / "registry/uploads")}


@pytest.fixture
def disk_of_few_inodes(tmp_path: Path) -> Iterator[Path]:
    with mount_ext4(tmp_path / "inodes", "2G", 128_000) as folder:
        yield folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mount_ext4(tmp_path / "small", "64m") as folder:
        yield folder


def on_disk(disk: Path) -> dict[str, str]:
    return {"REGISTRY_DIR": str(disk / "registry"), "CACHE_DIR": str(disk / "cache")}


@pytest.mark.root
def test_inodes(network: HostileNetwork, start_daemon: StartRegistryDaemon, disk_of_few_inodes: Path) -> None:
    """The cache is on the same file system, and works even if pushes have used all that they may."""
    daemon = start_daemon(**on_disk(disk_of_few_inodes))
    pusher = Pusher(daemon)
    free = os.statvfs(disk_of_few_inodes).f_favail
    for number in range(2000):
        assert pusher.request("POST", f"/v2/k{number}/{DEEP}/blobs/uploads/").status == 202
    assert free - os.statvfs(disk_of_few_inodes).f_favail < 20
    filler = disk_of_few_inodes / "filler"  # other pushes, in less time
    filler.mkdir()
    subprocess.run(f"seq {free - 8000} | xargs touch", shell=True, cwd=filler, check=True)
    statuses = []
    while not statuses or statuses[-1] == 201:
        response = pusher.push_blob(f"k{len(statuses)}/{DEEP}", b"%d" % len(statuses))
        statuses.append(response.status)
    assert (statuses[-1], response.error_code) == (507, "UNAVAILABLE")
    assert "inodes are free" in response.error_message
    assert len(statuses) > 10
    assert os.statvfs(disk_of_few_inodes).f_favail > 6000
    data = images.random_bytes(100_000, "cached")
    url = f"{GOOD}/v2/app/blobs/{network.good.put_blob('app', data)}"
    assert [daemon.client.get(url).cache_status for _ in range(2)] == ["MISS", "HIT"]
    shutil.rmtree(filler)
    check_honest_clients(daemon, network, "recovered")


@pytest.mark.root
def test_a_full_disk(network: HostileNetwork, start_daemon: StartRegistryDaemon, small_disk: Path) -> None:
    daemon = start_daemon(**on_disk(small_disk))
    pusher = Pusher(daemon)
    kept = [pusher.start_upload(f"partial/{number}", bytes(8 * MIB)) for number in range(2)]
    assert [response.status for response in kept] == [202, 202]
    # Connections of their own, because the daemon closes one after it has refused its body.
    for status in (
        Pusher(daemon).start_upload("full", bytes(80 * MIB)),
        Pusher(daemon).push_blob("full", bytes(80 * MIB)),
    ):
        assert (status.status, status.error_code) == (507, "UNAVAILABLE")
        assert "full" in status.error_message
    assert len(os.listdir(small_disk / "registry/uploads")) == 2
    free = os.statvfs(small_disk)
    assert free.f_bavail * free.f_frsize > 30 * MIB
    check_honest_clients(daemon, network, "recovered")
    # If nobody has continued partial uploads for a while, they make room.
    for name in os.listdir(small_disk / "registry/uploads"):
        os.utime(small_disk / "registry/uploads" / name, (0, 0))
    large = bytes(44 * MIB)
    wait_until(lambda: Pusher(daemon).push_blob("large", large).status == 201, "the push has room")


SLOW_DISK = """
import os, time
from dockerproxy.store.hashed_append_file import HashedAppendFile
def rehash(self, algorithm=None, original=HashedAppendFile.rehash):
    while not os.path.exists({flag!r}):
        time.sleep(0.02)
    original(self, algorithm)
HashedAppendFile.rehash = rehash
"""


def test_slow_disk_jobs_of_one_client(
    network: HostileNetwork, start_daemon: StartRegistryDaemon, workers: int, tmp_path: Path
) -> None:
    """He ends uploads by another algorithm than they began with, so that each is read and hashed again."""
    code, flag = tmp_path / "code", tmp_path / "flag"
    code.mkdir()
    (code / "sitecustomize.py").write_text(SLOW_DISK.format(flag=str(flag)))
    daemon = start_daemon(PYTHONPATH=os.pathsep.join((str(code), str(PROJECT))))
    digest = "sha512:" + hashlib.sha512(b"data").hexdigest()
    starter, hogs = Pusher(daemon, "127.0.0.2"), []
    locations = [starter.start_upload(f"slow/{number}", b"data").headers["location"] for number in range(30 * workers)]
    try:
        for location in locations:
            hog = socket.create_connection(("127.0.0.1", daemon.http_port), 60, source_address=("127.0.0.2", 0))
            head = f"PUT {location}?digest={digest} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
            hog.sendall(head.encode())
            hogs.append(hog)
        check_honest_clients(daemon, network, "others")
    finally:
        flag.touch()
    for hog in hogs:
        response = http.client.HTTPResponse(hog)
        response.begin()
        assert response.status == 201
        hog.close()


# documents

BOMBS = {
    "brackets": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nested values": b'{"layers":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "objects": b'{"schemaVersion":2,"layers":[' + b'{"a":1},' * (MIB // 2 - 10) + b"1]}",
    "numbers": b'{"layers":[' + b"1," * (2 * MIB - 10) + b"1]}",
    "a huge number": b'{"schemaVersion":' + b"9" * (4 * MIB - 100) + b"}",
    "duplicates": b'{"schemaVersion":2,"schemaVersion":2}',
    "NaN": b'{"schemaVersion":NaN}',
    "a string without an end": b'{"a":"' + b'\\"' * (2 * MIB - 10),
}


def test_documents_that_are_bombs(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """A pusher gets 400 for them, and a client of a registry that sends them 502. The fixture looks for tracebacks."""
    daemon = start_daemon()
    pusher = Pusher(daemon)
    for number, content in enumerate(BOMBS.values()):
        assert pusher.push_manifest("bomb", "1", content, OCI_MANIFEST).status == 400
        assert pusher.push_manifest("bomb", "1", content, "").status == 400
        network.evil.put_manifest("bomb", f"{number}", TypedContent(OCI_MANIFEST, content))
        response = daemon.client.get(f"{EVIL}/v2/bomb/manifests/{number}", Accept=OCI_MANIFEST)
        assert response.status == 502, (response.status, list(BOMBS)[number])
    check_honest_clients(daemon, network, "others")


def test_memory_of_documents(network: HostileNetwork, start_daemon: StartRegistryDaemon, workers: int) -> None:
    """20 at once cost 858 MB when each was parsed in a thread of its own."""
    daemon = start_daemon()
    content = b'{"a":[' + b'{"a":1},' * 49_000 + b'"' + b"x" * (3 * MIB) + b'"]}'
    pushers = []
    for number in range(20):
        pusher = socket.create_connection(("127.0.0.1", daemon.http_port), timeout=60)
        head = f"PUT /v2/big/manifests/{number} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x+json\r\n"
        pusher.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[:-1])
        pushers.append(pusher)
    before = peak_memory(daemon)
    for pusher in pushers:
        pusher.sendall(content[-1:])
    for pusher in pushers:
        response = http.client.HTTPResponse(pusher)
        response.begin()
        assert response.status in (201, 429), response.read()
        pusher.close()
    assert peak_memory(daemon) - before < 250 * MIB
    check_honest_clients(daemon, network, "others")


def peak_memory(daemon: RegistryDaemon) -> int:
    return sum(_proc_number(pid, "status", "VmHWM") * 1024 for pid in process_tree(daemon.pid))


def bytes_read(daemon: RegistryDaemon) -> int:
    return sum(_proc_number(pid, "io", "rchar") for pid in process_tree(daemon.pid))


def process_tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(descendant for child in children for descendant in process_tree(int(child)))]


def _proc_number(pid: int, file: str, name: str) -> int:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# referrers


def test_a_list_of_referrers_costs_what_it_lists(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    daemon = start_daemon()
    pusher = Pusher(daemon)
    subject = {"mediaType": OCI_INDEX, "digest": images.sha256_digest(b"subject"), "size": 1}
    for number in range(6):
        document = {
            "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "subject": subject,
            "artifactType": "application/x", "annotations": {f"k{number}": "v" * (3 * MIB + MIB // 2)},
        }  # fmt: skip
        assert pusher.push_manifest("r", f"{number}", json.dumps(document).encode(), OCI_INDEX).status == 201
    path = f"/v2/r/referrers/{subject['digest']}"
    before = bytes_read(daemon)
    for _ in range(20):
        response = pusher.request("GET", f"{path}?artifactType=none")
        assert (response.status, response.json["manifests"]) == (200, [])
    assert bytes_read(daemon) - before < 4 * MIB  # 420 MiB when all of them were read
    response = pusher.request("GET", path)
    assert len(response.json["manifests"]) == 1  # the others are behind its Link
    assert "link" in response.headers


# passwords and tokens


def write_user(file: Path, user: str, password: str, rounds: int = 4) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(f"{user}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(rounds)).decode()}\n")
    temporary.replace(file)


@pytest.mark.parametrize("change", ["password", "user", "reload"])
def test_tokens_end_with_their_password(start_daemon: StartRegistryDaemon, tmp_path: Path, change: str) -> None:
    """A user without a login any more keeps the token that it was good for."""
    file = tmp_path / "htpasswd"
    write_user(file, "alice", "wonder")
    daemon = start_daemon(HTPASSWD_FILE=str(file), ANONYMOUS_PULL="true")
    pushers = [Pusher(daemon) for _ in range(4)]
    token = pushers[0].request("GET", "/v2/token", Authorization=basic_authorization("alice", "wonder")).json["token"]
    path = f"/v2/a/blobs/uploads/?digest={images.sha256_digest(b'')}"

    def statuses() -> set[int]:
        return {pusher.request("POST", path, Authorization=f"Bearer {token}").status for pusher in pushers}

    assert statuses() == {201}
    write_user(file, "bob" if change == "user" else "alice", "another")
    if change == "reload":
        log_offset = daemon.log_offset()
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: "reload" in daemon.output_text[log_offset:], "the settings are read again")
    assert statuses() == {401}
    anonymous = pushers[0].request("GET", "/v2/token").json["token"]
    assert pushers[1].request("GET", "/v2/_catalog", Authorization=f"Bearer {anonymous}").status == 200


def test_a_thousand_wrong_passwords(network: HostileNetwork, start_daemon: StartRegistryDaemon, tmp_path: Path) -> None:
    file = tmp_path / "htpasswd"
    write_user(file, "alice", "wonder", rounds=10)
    daemon = start_daemon(HTPASSWD_FILE=str(file))
    login = basic_authorization("alice", "wonder")
    for number in range(6):  # each process checks the login once
        check_honest_clients(daemon, network, f"before/{number}", Authorization=login)
    guesses = []
    for number in range(1000):
        user = "alice" if number % 2 else "mallory"
        guess = socket.create_connection(("127.0.0.1", daemon.http_port), timeout=60, source_address=("127.0.0.2", 0))
        authorization = basic_authorization(user, f"wrong {number}")
        guess.sendall(f"GET /v2/ HTTP/1.1\r\nHost: localhost\r\nAuthorization: {authorization}\r\n\r\n".encode())
        guesses.append(guess)
    check_honest_clients(daemon, network, "meanwhile", Authorization=login)
    refusals = []
    for guess in guesses[::-1][:200]:
        response = http.client.HTTPResponse(guess)
        response.begin()
        refusals.append(read_response(response))
    for guess in guesses:
        guess.close()
    assert {refusal.status for refusal in refusals} <= {401, 429}
    limited = [refusal for refusal in refusals if refusal.status == 429]
    assert limited
    for refusal in limited:
        assert "127.0.0.2" in refusal.error_message
        assert int(refusal.headers["retry-after"]) > 0
