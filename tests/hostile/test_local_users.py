"""The attacker: a local user with a directory that the daemon reads, or with access to its socket."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import define

from dockerproxy.admin.control import local_user_name
from dockerproxy.oci.manifests import EMPTY_INDEX, OCI_INDEX
from dockerproxy.oci.names import Digest
from tests.e2e.harness.daemon import CLEAN_EXIT_STATUSES
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.images import build_image
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon
from tests.hostile.processes import run_command

NOBODY = 65534

IMAGE = build_image([{"hello": b"private"}])

PUBLIC = b"a blob that everybody knows"
PUBLIC_DIGEST = Digest.of(PUBLIC)


@define
class ImportedDirectory:
    """A directory that looks like a registry's, with one repository `x/y` that has one blob."""

    root: Path
    digest: Digest = PUBLIC_DIGEST

    @property
    def data(self) -> Path:
        digest = self.digest
        return self.root / "docker/registry/v2/blobs" / digest.algorithm / digest.hex[:2] / digest.hex / "data"

    @property
    def repository(self) -> Path:
        return self.root / "docker/registry/v2/repositories/x/y"

    def make(self) -> None:
        self.data.parent.mkdir(parents=True)
        self.data.write_bytes(PUBLIC)
        link = self.repository / "_layers" / self.digest.algorithm / self.digest.hex / "link"
        link.parent.mkdir(parents=True)
        link.write_text(str(self.digest))


@pytest.fixture
def directory(tmp_path: Path) -> ImportedDirectory:
    directory = ImportedDirectory(tmp_path / "stranger")
    directory.make()
    return directory


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB with 2,000 inodes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=2000", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class UnixConnection(http.client.HTTPConnection):
    """A connection to the control socket at `host`."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.host)


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryDaemon]:
    """A daemon for attacks after which it must be as before. At the end its log has no traceback."""
    daemon = RegistryDaemon(tmp_path_factory.mktemp("shared"), {"WORKERS": "1"})
    with daemon.run_and_check_log(list):
        yield daemon


def get_blob(daemon: RegistryDaemon, digest: Digest) -> tuple[int, bytes]:
    response = request_directly("GET", f"http://{daemon.http_address}/v2/x/y/blobs/{digest}")
    return response.status, response.body


def test_import_does_not_serve_what_a_link_leads_to_later(
    start_daemon: StartRegistryDaemon, directory: ImportedDirectory, tmp_path: Path
) -> None:
    """The link leads to the public blob while the import hashes it, and to the CA's key afterwards."""
    daemon = start_daemon()
    flip = tmp_path / "flip"
    public = daemon.state_folder / "cache/public"  # a file of the daemon's own user
    public.write_bytes(PUBLIC)
    flip.symlink_to(public)
    directory.data.unlink()
    directory.data.symlink_to(flip)
    result = run_command(daemon, "import", str(directory.root))
    flip.unlink()
    flip.symlink_to(daemon.state_folder / "ca/ca.key")
    assert get_blob(daemon, directory.digest)[0] == 404
    assert result.returncode == 1
    assert f"{directory.data} is a symbolic link, which is not followed" in result.stdout
    assert "0 blobs hard-linked, 0 copied" in result.stdout


@pytest.mark.root
@pytest.mark.parametrize("kind", ["bytes", "inodes"])
def test_import_leaves_room_on_the_disk(
    start_daemon: StartRegistryDaemon, directory: ImportedDirectory, small_disk: Path, kind: str
) -> None:
    """The daemon needs the rest for the cache, its records and the pushes that continue."""
    daemon = start_daemon(REGISTRY_DIR=str(small_disk / "registry"))
    if kind == "bytes":
        large = ImportedDirectory(directory.root, digest=Digest.of(bytes(62 << 20)))
        large.make()
        large.data.write_bytes(bytes(62 << 20))
    else:
        for number in range(500):  # each takes six inodes
            shutil.copytree(directory.repository, directory.repository.with_name(f"y{number}"))
    result = run_command(daemon, "import", str(directory.root))
    assert result.returncode != 0
    assert (
        f"{'MiB' if kind == 'bytes' else 'inodes'} are free, and pushes and imports leave"
        in result.stdout + result.stderr
    )
    disk = os.statvfs(small_disk)
    assert disk.f_bavail * disk.f_frsize > 3 << 20
    assert disk.f_favail > 90
    assert request_directly("GET", daemon.url + "/healthz").status == 200


@pytest.mark.parametrize("kind", ["FIFO", "/dev/zero", "loop"])
def test_import_check_and_gc_end_whatever_lies_there(
    start_daemon: StartRegistryDaemon, directory: ImportedDirectory, kind: str
) -> None:
    daemon = start_daemon()
    directory.data.unlink()
    if kind == "FIFO":
        os.mkfifo(directory.data)
    else:
        directory.data.symlink_to(directory.data if kind == "loop" else kind)
    result = run_command(daemon, "import", str(directory.root))
    assert result.returncode == 1
    assert str(directory.data) in result.stdout
    # The same in the daemon's own directory, which a stranger may own.
    own = ImportedDirectory(daemon.state_folder / "registry")
    own.make()
    own.data.unlink()
    if kind == "FIFO":
        os.mkfifo(own.data)
    else:
        own.data.symlink_to(own.data if kind == "loop" else kind)
    result = run_command(daemon, "check")
    assert (result.returncode, str(own.data) in result.stdout) == (1, True)
    assert run_command(daemon, "gc").returncode == 0
    assert get_blob(daemon, directory.digest)[0] == 404


def test_a_signal_ends_the_import_of_a_file_without_end(
    start_daemon: StartRegistryDaemon, directory: ImportedDirectory
) -> None:
    """A sparse file of 8 TiB takes hours to read, and no room."""
    daemon = start_daemon()
    os.truncate(directory.data, 1 << 43)
    socket_path = str(daemon.state_folder / "run/control.sock")
    command = [sys.executable, "-m", "dockerproxy.cli", "--socket", socket_path, "import", str(directory.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: "import of " in run_command(daemon, "status").stdout, "the import's start")
        assert daemon.stop(timeout=8) in CLEAN_EXIT_STATUSES
        assert "the daemon closed the connection" in process.communicate(timeout=5)[1]
    assert os.listdir(daemon.state_folder / "registry/staging") == []


@pytest.mark.parametrize("way", ["open for writing", "writable by all", "a second name"])
def test_what_the_stranger_changes_after_an_import_changes_no_blob(
    start_daemon: StartRegistryDaemon, directory: ImportedDirectory, tmp_path: Path, way: str
) -> None:
    """An upload that goes on in the imported registry has its file open; a tree given to the daemon may be writable."""
    daemon = start_daemon()
    if way == "writable by all":
        directory.data.chmod(0o666)
    elif way == "a second name":
        os.link(directory.data, tmp_path / "name")
    with directory.data.open("ab", buffering=0) if way == "open for writing" else open(os.devnull, "ab") as file:
        result = run_command(daemon, "import", str(directory.root))
        assert "0 blobs hard-linked, 1 copied" in result.stdout
        file.write(b" and more")
    with directory.data.open("ab") as file:
        file.write(b" and more")
    assert get_blob(daemon, directory.digest) == (200, PUBLIC)


def test_gc_deletes_nothing_outside_the_registry(start_daemon: StartRegistryDaemon, tmp_path: Path) -> None:
    """A directory of blobs is replaced by a link to that of another registry."""
    daemon = start_daemon()
    other, own = ImportedDirectory(tmp_path / "other"), ImportedDirectory(daemon.state_folder / "registry")
    other.make()
    os.utime(other.data, (0, 0))
    for depth in (0, 1):
        place = own.data.parents[depth]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(other.data.parents[depth])
        result = run_command(daemon, "gc", "--delete-untagged")
        assert result.returncode != 0
        assert f"{place} is a symbolic link, which is not followed" in result.stderr
        assert other.data.read_bytes() == PUBLIC
        place.unlink()
        place.parent.rmdir()


def test_a_daemon_does_not_start_on_links_that_would_change_other_files(tmp_path: Path) -> None:
    """The lock is written and truncated at each start."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    registry = tmp_path / "daemon/state/registry"
    registry.mkdir(parents=True)
    (registry / "lock").symlink_to(victim)
    daemon = RegistryDaemon(tmp_path / "daemon", {"WORKERS": "1"})
    daemon.launch()
    try:
        wait_until(lambda: not daemon.running, "the daemon's end")
    finally:
        daemon.stop()
    assert victim.read_bytes() == b"precious"
    assert f"{registry}/lock: is a symbolic link" in daemon.output_text


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/v1/collect", b'{"grace": NaN}'),
        ("/v1/collect", b'{"grace": -Infinity}'),
        ("/v1/collect", b'{"grace": 1e999}'),
        ("/v1/collect", b'{"grace": ' + b"9" * 400 + b"}"),
        ("/v1/collect", b"[" * 30_000),
        ("/v1/collect", b'{"a":' * 10_000),
        ("/v1/collect", b'{"root": "/etc"}'),
        ("/v1/remove", b'{"names": [["x"]]}'),
        ("/v1/import", b'{"directory": "/\\ud800"}'),
        ("/v1/import", b'{"directory": "/etc\\u0000"}'),
        ("/v1/check", b" " * 70_000),
    ],
)
def test_the_control_socket_answers_nonsense_with_a_sentence(
    shared_daemon: RegistryDaemon, target: str, body: bytes
) -> None:
    """A process of the daemon's group may send anything. The fixture looks for tracebacks in the log."""
    connection = UnixConnection(str(shared_daemon.state_folder / "run/control.sock"))
    connection.request("POST", target, body)
    response = connection.getresponse()
    assert response.status in (400, 413)
    assert " " in json.loads(response.read())["error"]["message"]
    connection.close()


@pytest.mark.root
def test_the_command_asks_no_socket_in_a_strangers_directory(tmp_path: Path) -> None:
    """An administrator runs the command in a directory of a user with a `var/run/control.sock`, which answers."""
    run = tmp_path / "stranger/var/run"
    run.mkdir(parents=True)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(run / "control.sock"))
        server.listen()
        server.setblocking(False)
        for path in (tmp_path / "stranger", run.parent, run, run / "control.sock"):
            os.chown(path, NOBODY, -1)
        command = [sys.executable, "-m", "dockerproxy.cli", "ls"]
        result = subprocess.run(command, cwd=tmp_path / "stranger", env=environment, capture_output=True, text=True)
        assert result.returncode == 3
        assert "control.sock was not asked, because" in result.stderr
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("kind", ["FIFO", "/dev/zero"])
def test_the_command_does_not_wait_for_a_file_beside_a_list_of_images(
    shared_daemon: RegistryDaemon, tmp_path: Path, kind: str
) -> None:
    """An administrator pulls what a stranger's compose file lists. It has variables, for which `.env` is read."""
    (tmp_path / "compose.yaml").write_text('services: {web: {image: "quay.io/team/${NAME:?}:1"}}')
    if kind == "FIFO":
        os.mkfifo(tmp_path / ".env")
    else:
        (tmp_path / ".env").symlink_to(kind)
    result = run_command(shared_daemon, "pull", "--dry-run", "--from-file", str(tmp_path / "compose.yaml"))
    assert result.returncode != 0
    assert "NAME" in result.stdout + result.stderr


@pytest.mark.root
@pytest.mark.parametrize("owner", [NOBODY, 0])
def test_a_strangers_list_of_images_gets_no_variables_of_others(
    shared_daemon: RegistryDaemon, tmp_path: Path, owner: int
) -> None:
    """A registry is sent the names of images. Its `.env` leads to the secrets of the administrator that pulls them."""
    compose, secrets = tmp_path / "compose.yaml", tmp_path / "secrets"
    compose.write_text('services: {web: {image: "unknown.example/${PASSPHRASE:?}:1"}}')
    os.chown(compose, owner, -1)
    secrets.write_text("PASSPHRASE=precious\n")
    (tmp_path / ".env").symlink_to(secrets)
    result = run_command(shared_daemon, "pull", "--dry-run", "--from-file", str(compose))
    assert ("precious" in result.stdout + result.stderr) == (owner == 0)


def test_names_do_not_reach_the_terminal_as_they_are(
    shared_daemon: RegistryDaemon, directory: ImportedDirectory
) -> None:
    """An imported directory has a name with an escape sequence, which a message repeats."""
    evil = directory.root / "docker/registry/v2/repositories/\x1b]0;owned\x07\u202e"
    (evil / "_layers").mkdir(parents=True)
    directory.data.unlink()
    os.rename(directory.root, f"{directory.root}\x1b[31m")
    for arguments in (["import", f"{directory.root}\x1b[31m"], ["ls", "\x1b]0;owned\x07"], ["rm", "x\u202e"]):
        result = run_command(shared_daemon, *arguments)
        assert result.returncode != 0
        assert all(line.isprintable() for line in (result.stdout + result.stderr).splitlines())
        assert all(line.isascii() for line in run_command(shared_daemon, "--json", *arguments).stdout.splitlines())


def test_what_the_daemon_writes_is_its_users_alone(
    start_daemon: StartRegistryDaemon, network: HostileNetwork, tmp_path: Path
) -> None:
    """Another local user looks for private images in the state directory of a daemon that was started by hand."""
    network.good.put("private/app", "v1", IMAGE)
    previous = os.umask(0)
    try:
        daemon = start_daemon()
    finally:
        os.umask(previous)
    assert daemon.client.get(f"{GOOD}/v2/private/app/manifests/v1").status == 200
    for blob in IMAGE.layers:
        assert daemon.client.get(f"{GOOD}/v2/private/app/blobs/{blob.digest}").status == 200
    connection = http.client.HTTPConnection("127.0.0.1", daemon.http_port)
    connection.request("PUT", "/v2/a/manifests/v1", EMPTY_INDEX, {"Content-Type": OCI_INDEX})
    assert connection.getresponse().status == 201
    public = {"ca.crt", "run", "control.sock"}  # the certificate is for everybody, and the socket has a group
    for path in daemon.state_folder.rglob("*"):
        if path.name not in public:
            assert not path.lstat().st_mode & 0o077, path
    assert not daemon.state_folder.lstat().st_mode & 0o077


@pytest.mark.root
def test_the_log_says_which_user_of_the_group_gave_a_command(shared_daemon: RegistryDaemon) -> None:
    """The kernel names the user that connected (SO_PEERCRED), whatever the command claims."""
    socket_path = shared_daemon.state_folder / "run/control.sock"
    for path in (socket_path.parent, socket_path):
        os.chown(path, -1, NOBODY)
    for parent in shared_daemon.state_folder.parents:
        parent.chmod(parent.stat().st_mode | 0o011)
    shared_daemon.state_folder.chmod(0o711)
    try:
        command = f"""
import os, socket
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
connection = socket.socket(socket.AF_UNIX)
connection.connect("{socket_path}")
connection.sendall(b"POST /v1/collect HTTP/1.1\\r\\nHost: root\\r\\nUser-Agent: root\\r\\nConnection: close\\r\\n"
    b"Authorization: Basic cm9vdDo=\\r\\nContent-Length: 2\\r\\n\\r\\n{{}}")
while connection.recv(65536): pass
"""
        result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=30)
        assert (result.returncode, result.stderr) == (0, "")
    finally:
        shared_daemon.state_folder.chmod(0o700)
        for path in (socket_path.parent, socket_path):
            os.chown(path, -1, 0)
    name = local_user_name(NOBODY)
    assert f"{name} at the control socket started gc" in shared_daemon.output_text
    assert f"gc of {name} at the control socket ended" in shared_daemon.output_text


@pytest.mark.root
def test_another_user_reaches_neither_the_control_socket_nor_the_files(
    shared_daemon: RegistryDaemon, tmp_path: Path
) -> None:
    """A user without the daemon's group connects, and looks for the secrets and the images."""
    state = shared_daemon.state_folder
    for parent in state.parents:
        parent.chmod(parent.stat().st_mode | 0o011)  # so that only the daemon's own directories keep them out
    attempts = f"""
import os, pathlib, socket, sys
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
def attempt(function, *arguments):
    try:
        function(*arguments)
    except PermissionError:
        return
    sys.exit(f"{{function}} {{arguments}} succeeded")
attempt(socket.socket(socket.AF_UNIX).connect, "{state}/run/control.sock")
for name in ("cache/secret", "registry/secret", "ca/ca.key", "registry/lock"):
    attempt(pathlib.Path("{state}", name).read_bytes)
for name in ("", "cache", "registry", "cache/records", "run"):
    attempt(os.listdir, os.path.join("{state}", name))
"""
    result = subprocess.run([sys.executable, "-c", attempts], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
