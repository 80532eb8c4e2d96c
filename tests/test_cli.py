"""`dockerproxy` against a running daemon: the command and the daemon are processes of their own."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from dockerproxy import cli
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records

ROOT = Path(__file__).parent.parent
HUB = "registry-1.docker.io/library/ubuntu"


def described(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}


def image(*layers: bytes) -> bytes:
    config, *rest = layers
    return json.dumps({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described("a/config", config),
        "layers": [described("a/layer", layer) for layer in rest],
    }).encode()  # fmt: skip


def index(*children: bytes) -> bytes:
    manifests = [described(OCI_MANIFEST, child) for child in children]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()


LAYERS = [b"config", b"base" * 1000, b"layer" * 1000]
ONE, TWO = image(*LAYERS), image(b"other config", LAYERS[1])


@define
class Tree:
    """One of the daemon's stores, as it lies on the disk."""

    root: Path
    layout: Layout = field(init=False)
    blobs: Blobs = field(init=False)
    links: Links = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.layout = Layout(self.root)
        self.blobs, self.links = Blobs(self.layout, False), Links(self.layout, False)

    def keep(self, repository: str, tag: str | None, manifest: bytes, *layers: bytes) -> Digest:
        for layer in layers:
            self.blobs.put(layer, Digest.of(layer))
            self.links.link_layer(repository, Digest.of(layer))
        self.blobs.put(manifest, Digest.of(manifest))
        self.links.link_manifest(repository, Digest.of(manifest), json.loads(manifest)["mediaType"])
        if tag is not None:
            self.links.set_tag(repository, tag, Digest.of(manifest))
        return Digest.of(manifest)

    def age(self) -> None:
        for entry in list(self.blobs.walk()):
            os.utime(self.layout.blob(entry.digest), (entry.last_used - 7200, entry.last_used - 7200))

    @property
    def kept(self) -> set[Digest]:
        return {entry.digest for entry in self.blobs.walk()}


@define
class Daemon:
    """A daemon with its state below `folder`."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "run/control.sock"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def hosted(self) -> Tree:
        return Tree(self.folder / "registry")

    @property
    def cached(self) -> Tree:
        return Tree(self.folder / "cache")

    def launch(self) -> subprocess.Popen[bytes]:
        beside = Path(sys.executable).with_name("twistd")
        twistd = str(beside) if beside.exists() else shutil.which("twistd3") or "twistd"
        with (self.folder / "log").open("ab") as output:
            return subprocess.Popen(
                [twistd, "--nodaemon", "--pidfile=", "dockerproxy"], cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, env=environment(
                    STATE_DIR=str(self.folder), PROXY_LISTEN="tcp:0:interface=127.0.0.1",
                    REGISTRY_LISTEN="none", PATH=os.environ["PATH"],
                ),
            )  # fmt: skip

    def start(self) -> None:
        self.process = self.launch()
        end = time.monotonic() + 30
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < end, self.log
            time.sleep(0.05)

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return self.socket.exists() and probe.connect_ex(str(self.socket)) == 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            # twistd ends by the signal that it was asked to end by.
            assert self.process.wait(30) in (0, -15), self.log
            assert "Traceback" not in self.log, self.log

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run the command and return what it printed; its complaints too, where it fails."""
        done = command("--socket", str(self.socket), *arguments)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stdout if status in (0, 1) else done.stdout + done.stderr

    def json(self, *arguments: str, status: int = 0) -> Any:
        done = command("--json", "--socket", str(self.socket), *arguments)
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout)


def environment(**more: str) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "HOME": "/nonexistent", **more}


def command(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dockerproxy.cli", *arguments], capture_output=True, text=True, timeout=60,
        env=environment(**more), cwd="/", check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("d"))
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture
def daemon(running: Daemon) -> Daemon:
    """A daemon that hosts two repositories and caches two."""
    for tree in (running.hosted, running.cached):
        for path in tree.root.glob("docker"):
            shutil.rmtree(path)
        for name in ("damaged", "records"):
            shutil.rmtree(tree.root / name, ignore_errors=True)
    hosted, cached = running.hosted, running.cached
    hosted.keep("foo/bar", "v1.2.3.4", ONE, *LAYERS)
    hosted.keep("foo/bar", "latest", TWO, b"other config", LAYERS[1])
    hosted.keep("foo/bar/deep", "v1", TWO, b"other config", LAYERS[1])
    hosted.age()
    cached.keep(HUB, "latest", index(ONE), *LAYERS)
    cached.keep(HUB, None, ONE, *LAYERS)
    cached.keep(HUB, "jammy", TWO, b"other config", LAYERS[1])
    cached.keep("quay.io/some/thing", "v1", TWO, b"other config", LAYERS[1])
    for tag in ("latest", "jammy"):
        Records(cached.root / "records").put({"key": {"digest": "…"}}, "tag", HUB, tag)
    return running


def test_the_socket_is_for_user_and_group(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o660
    assert stat.S_IMODE(daemon.socket.parent.stat().st_mode) == 0o750


def test_ls(daemon: Daemon) -> None:
    text = daemon.run("ls")
    rows = [re.split(r" {2,}", line) for line in text.splitlines()]
    assert [row[:4] for row in rows[1:]] == [
        ["foo/bar", "hosted", "2", "2"],
        ["foo/bar/deep", "hosted", "1", "1"],
        ["quay.io/some/thing", "cached", "1", "1"],
        [HUB, "cached", "2", "3"],
    ]
    assert rows[1][5] == "2 hours ago"
    assert "quay.io" not in daemon.run("ls", "--hosted")
    assert "foo/bar" not in daemon.run("ls", "--cached")
    found = daemon.json("ls")["repositories"]
    sizes = {len(content) for content in (*LAYERS, b"other config", ONE, TWO)}
    assert found[0]["size"] == sum(sizes)
    assert found[0]["where"] == "hosted"
    assert abs(time.time() - 7200 - found[0]["last_used"]) < 600


def test_ls_of_one(daemon: Daemon) -> None:
    daemon.hosted.links.remove_tag("foo/bar", "latest")
    found = daemon.json("ls", "foo/bar")
    assert [(row["tag"], row["digest"], row["media_type"]) for row in found["manifests"]] == [
        ("v1.2.3.4", str(Digest.of(ONE)), OCI_MANIFEST), (None, str(Digest.of(TWO)), OCI_MANIFEST)
    ]  # fmt: skip
    assert found["manifests"][0]["size"] == len(ONE) + sum(map(len, LAYERS))
    text = daemon.run("ls", "foo/bar")
    assert f"v1.2.3.4  {Digest.of(ONE)}  " in text
    assert f"-         {Digest.of(TWO)}  " in text
    latest = daemon.json("ls", "docker.io/ubuntu:latest")
    assert latest["name"] == HUB
    assert [row["tag"] for row in latest["manifests"]] == ["latest"]
    assert latest["manifests"][0]["size"] == len(index(ONE)) + len(ONE) + sum(map(len, LAYERS))


@pytest.mark.parametrize("name", ["foo/bar:v1.2.3.4", "docker-registry.local/foo/bar:v1.2.3.4"])
def test_rm_of_a_tag(daemon: Daemon, name: str) -> None:
    assert "foo/bar:v1.2.3.4" in daemon.run("rm", name)
    assert daemon.hosted.links.tags("foo/bar") == ["latest"]
    assert daemon.hosted.links.has_manifest("foo/bar", Digest.of(ONE)), "a tag is a tag"
    assert "removed 1 manifest" in daemon.run("gc", "--delete-untagged")
    assert daemon.hosted.kept == {Digest.of(content) for content in (TWO, b"other config", LAYERS[1])}
    assert daemon.hosted.links.tags("foo/bar/deep") == ["v1"]


def test_rm_of_a_digest_and_of_a_repository(daemon: Daemon) -> None:
    result = daemon.json("rm", f"foo/bar@{Digest.of(TWO)}")
    assert result == {"removed": [
        {"where": "hosted", "name": f"foo/bar@{Digest.of(TWO)}", "tags": 1, "manifests": 1, "blobs": 0, "bytes": 0}
    ]}  # fmt: skip
    assert daemon.hosted.links.tags("foo/bar") == ["v1.2.3.4"]
    assert daemon.json("rm", "foo/bar")["removed"][0]["tags"] == 1
    daemon.run("gc")
    assert list(daemon.hosted.links.repositories()) == ["foo/bar/deep"]
    assert "foo/bar/deep" in daemon.run("ls", "--hosted")


def test_rm_of_what_is_cached(daemon: Daemon) -> None:
    cached, records = daemon.cached, Records(daemon.cached.root / "records")
    removed = daemon.json("rm", f"{HUB}:latest")["removed"][0]
    # What `jammy` needs stays, and what another repository has.
    assert cached.kept == {Digest.of(content) for content in (TWO, b"other config", LAYERS[1])}
    assert (removed["tags"], removed["manifests"], removed["blobs"]) == (1, 2, 4)
    assert records.get("tag", HUB, "latest") is None
    assert records.get("tag", HUB, "jammy") is not None
    daemon.run("rm", "docker.io/library/ubuntu")
    assert cached.links.tags(HUB) == []
    assert records.get("tag", HUB, "jammy") is None
    assert Digest.of(TWO) in cached.kept
    # By its digest it goes for all: it may be damaged.
    daemon.run("rm", f"quay.io/some/thing@{Digest.of(LAYERS[1])}")
    assert cached.kept == {Digest.of(TWO), Digest.of(b"other config")}


def test_a_mistyped_name_changes_nothing_and_is_helped(daemon: Daemon) -> None:
    before = [sorted(map(str, tree.root.rglob("*"))) for tree in (daemon.hosted, daemon.cached)]
    for arguments, meant in [
        (("rm", "foo/baz:v1.2.3.4"), "foo/bar:v1.2.3.4"),
        (("rm", "foo/bar:v1.2.3.5"), "foo/bar:v1.2.3.4"),
        (("rm", "foo/bar:latest", "foo/bar:v1.2.3.5"), "foo/bar:v1.2.3.4"),
        (("ls", "some/thing"), "quay.io/some/thing"),
        (("rm", "FOO/BAR:v1.2.3.4"), "foo/bar:v1.2.3.4"),
        (("rm", "foo/bar:v1"), "foo/bar:v1.2.3.4"),
        (("ls", "https://192.0.2.1:5443/foo/bar"), "foo/bar"),
        (("rm", "--cached", "foo/bar"), ""),
        (("rm", f"foo/bar@{Digest.of(b'nothing')}"), ""),
        (("rm", "completely-different"), ""),
        (("rm", "../../etc"), ""),
    ]:
        text = daemon.run(*arguments, status=4)
        assert meant in text
        assert ("meant" in text) == bool(meant), text
    assert daemon.json("rm", "foo/baz", status=4)["error"]["suggestions"][0] == "foo/bar"
    for name in ("foo/bar@sha256:12", "foo/bar:", ":tag", ""):
        daemon.run("rm", name, status=2)
    assert [sorted(map(str, tree.root.rglob("*"))) for tree in (daemon.hosted, daemon.cached)] == before


def test_a_name_that_is_hosted_and_cached(daemon: Daemon) -> None:
    daemon.hosted.keep("quay.io/some/thing", "v1", ONE, *LAYERS)
    assert "--hosted or --cached" in daemon.run("rm", "quay.io/some/thing:v1", status=2)
    daemon.run("rm", "--hosted", "quay.io/some/thing:v1")
    assert daemon.cached.links.tags("quay.io/some/thing") == ["v1"]


def test_gc(daemon: Daemon) -> None:
    daemon.hosted.links.remove_tag("foo/bar", "v1.2.3.4")
    assert "removed 0 manifests" in daemon.run("gc")
    text = daemon.run("gc", "--delete-untagged", "--dry-run")
    assert f"manifest foo/bar {Digest.of(ONE)}" in text
    assert "would remove 1 manifest, 2 links and 3 blobs" in text
    assert Digest.of(ONE) in daemon.hosted.kept
    daemon.hosted.blobs.touch(Digest.of(LAYERS[0]))
    result = daemon.json("gc", "--delete-untagged")
    assert (result["manifests"], result["links"], result["blobs"], result["recent"]) == (1, 1, 2, 1)
    assert {thing["kind"] for thing in result["removed"]} == {"manifest", "link", "blob"}
    assert "spared" in daemon.run("gc", "--delete-untagged")
    daemon.run("gc", "--grace", "1m", status=2)
    daemon.run("gc", "--grace", "soon", status=2)
    Path(daemon.hosted.layout.blob(Digest.of(TWO))).write_bytes(b"{}")
    assert str(Digest.of(TWO)) in daemon.run("gc", "--delete-untagged", status=1)


def test_check(daemon: Daemon) -> None:
    assert "all sound" in daemon.run("check")
    path = Path(daemon.hosted.layout.blob(Digest.of(LAYERS[2])))
    path.write_bytes(b"layer!" * 1000)
    text = daemon.run("check", status=1)
    assert f"{Digest.of(LAYERS[2])} was damaged" in text
    assert f"foo/bar: the manifest {Digest.of(ONE)} lacks" in text
    assert not path.exists()
    assert len(os.listdir(daemon.hosted.layout.damaged)) == 1
    assert daemon.json("check", status=1)["damaged"] == 0, "it is out of the way"
    Path(daemon.cached.layout.blob(Digest.of(LAYERS[2]))).write_bytes(b"bad")
    assert daemon.json("check", "--cached", status=1)["damaged"] == 1
    assert "all sound" in daemon.run("check", "--cached")


def test_import(daemon: Daemon, tmp_path: Path) -> None:
    other = Tree(tmp_path / "other")
    other.keep("imported", "v1", ONE, *LAYERS)
    other.keep("foo/bar", "latest", ONE, *LAYERS)
    other.blobs.put(b"only there", Digest.of(b"only there"))
    other.links.link_layer("imported", Digest.of(b"only there"))
    text = daemon.run("import", str(other.root), status=1)
    assert "foo/bar:latest means" in text and "--force" in text
    assert daemon.hosted.links.tag("imported", "v1") == Digest.of(ONE)
    assert daemon.hosted.links.tag("foo/bar", "latest") == Digest.of(TWO)
    result = daemon.json("import", "--force", str(other.root))
    assert (result["tags"], result["present"], result["findings"]) == (1, 5, [])
    assert str(tmp_path) in daemon.run("import", str(tmp_path), status=2)
    assert "own directory" in daemon.run("import", str(daemon.hosted.root), status=2)


def test_status(daemon: Daemon) -> None:
    found = daemon.json("status")
    assert found["operation"] is None
    assert found["shelves"]["hosted"]["directory"] == str(daemon.hosted.root)
    assert found["cache"]["limit"] == 32 * 2**30
    assert "idle" in daemon.run("status")


def test_one_long_operation_at_a_time_which_ends_with_its_client(daemon: Daemon) -> None:
    large = daemon.hosted.root / "large"
    with large.open("wb") as file:
        file.truncate(20_000_000_000)  # sparse: it takes long enough to read
    digest = Digest.of(b"somebody's")
    path = Path(daemon.hosted.layout.blob(digest))
    path.parent.mkdir(parents=True)
    large.rename(path)
    argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.socket), "check"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as checking:
        wait_for(lambda: daemon.json("status")["operation"] is not None)
        assert "check" in daemon.run("gc", status=6)
        assert "at check for" in daemon.run("status")
        daemon.run("ls")
        daemon.run("rm", "foo/bar:latest")
        checking.send_signal(2)
        assert checking.wait(20) == 130
        assert b"Traceback" not in checking.communicate()[1]
    wait_for(lambda: daemon.json("status")["operation"] is None)
    path.unlink()
    assert "all sound" in daemon.run("check")


def test_a_progress_bar_on_a_terminal_only(daemon: Daemon) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.socket), "check"],
        env=environment(COLUMNS="80"), stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=True,
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert re.search(r"contents: .*\[[#.]+\] +\d+ %", shown), shown
    assert shown.endswith("\r\x1b[K")
    assert b"\x1b" not in done.stdout
    assert command("--socket", str(daemon.socket), "check").stderr == ""


def test_a_pipe_that_closes_early(daemon: Daemon) -> None:
    done = subprocess.run(
        f"{sys.executable} -m dockerproxy.cli --socket {daemon.socket} ls | true; echo ${{PIPESTATUS[0]}}",
        env=environment(PATH=os.environ["PATH"]), shell=True, executable="/bin/bash", capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


# without a daemon


def test_no_daemon(tmp_path: Path) -> None:
    done = command("ls")
    assert done.returncode == 3
    assert "does not run" in done.stderr and "/run/docker-registry-proxy/control.sock" in done.stderr
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    for more in ({"RUNTIME_DIR": str(tmp_path)}, {"RUNTIME_DIRECTORY": f"{tmp_path}:/other"}):
        done = command("ls", **more)
        assert done.returncode == 3
        assert f"nobody listens on {path}" in done.stderr
    done = command("--json", "--socket", str(path), "ls")
    assert "does not run" in json.loads(done.stdout)["error"]["message"]
    (tmp_path / "file").write_text("")
    assert command("--socket", str(tmp_path / "file"), "ls").returncode == 3


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno"])
def test_somebody_else_on_the_socket(tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        with subprocess.Popen(
            [sys.executable, "-m", "dockerproxy.cli", "--socket", str(tmp_path / "s"), "ls"],
            env=environment(), stderr=subprocess.PIPE,
        ) as asking:  # fmt: skip
            accepted, _ = other.accept()
            with accepted:
                accepted.recv(1000)
                accepted.sendall(answer)
            _, text = asking.communicate(timeout=20)
        assert asking.returncode == 7
        assert text == b"dockerproxy: what answers on the socket is not docker-registry-proxy\n"


@pytest.mark.parametrize("seen", [True, False])
def test_a_directory_that_the_daemon_does_not_see(tmp_path: Path, seen: bool) -> None:
    """The service of the package hides some from it."""
    for part in ("blobs", "repositories"):
        (tmp_path / "docker/registry/v2" / part / "something").mkdir(parents=True)
    body = json.dumps({"error": {"code": "NOT_UNDERSTOOD", "message": "it is no registry's directory"}}).encode()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        directory = tmp_path if seen else tmp_path / "docker"
        argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(tmp_path / "s"), "import", str(directory)]
        with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True) as asking:
            accepted, _ = other.accept()
            with accepted:
                asked = b""
                while b'"force"' not in asked:
                    asked += accepted.recv(1000)
                accepted.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            _, text = asking.communicate(timeout=20)
    assert asking.returncode == 2
    assert "it is no registry's directory" in text
    assert ("its service hides" in text) == seen


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_somebody_who_may_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
            parent.chmod(0o711)
    folder = tmp_path / "run"
    folder.mkdir(mode=0o750)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "control.sock"))
        listening.listen()
        arguments = ["--socket", str(folder / "control.sock"), "ls"]
        code = f"import os, sys; from dockerproxy.cli import main; os.setuid(65534); sys.exit(main({arguments}))"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 5, done.stderr
    assert "not permitted" in done.stderr and "group root" in done.stderr


def test_a_second_daemon_and_one_that_was_killed(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.start()
    assert daemon.process is not None
    other = daemon.launch()
    assert other.wait(30) != 0
    assert "another daemon listens there" in daemon.log
    daemon.run("status")
    daemon.process.kill()
    daemon.process.wait()
    assert daemon.socket.exists()
    assert "does not run" in daemon.run("ls", status=3)
    daemon.start()
    daemon.run("status")
    daemon.stop()
    assert not daemon.socket.exists()


def test_the_daemon_stops_in_the_midst_of_it(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.start()
    assert daemon.process is not None
    path = Path(daemon.hosted.layout.blob(Digest.of(b"somebody's")))
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(20_000_000_000)
    argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.socket), "check"]
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as checking:
        wait_for(lambda: daemon.json("status")["operation"] is not None)
        began = time.monotonic()
        daemon.stop()
        assert time.monotonic() - began < 15
        _, text = checking.communicate(timeout=20)
    assert checking.returncode == 7
    assert text == b"dockerproxy: the daemon ended in the midst of it\n"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 2),
        (["frobnicate"], 2),
        (["rm"], 2),
        (["ls", "--hosted", "--cached"], 2),
        (["--help"], 0),
        (["gc", "-h"], 0),
    ],
)
def test_usage(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == status


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the package's; and what the Debian package is called after."""
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    version = capsys.readouterr().out.strip().removeprefix("dockerproxy ")
    assert re.match(rf"\S+ \({re.escape(version)}\) ", (ROOT / "debian" / "changelog").read_text())


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
