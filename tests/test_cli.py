"""The command `dockerproxy` against a running daemon. Both run in processes of their own."""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from dockerproxy import __version__, cli
from dockerproxy.admin.control import local_user_name
from dockerproxy.cache.rate_limits import RateLimits
from dockerproxy.control_client import FAILED, NOT_OURS
from dockerproxy.http.headers import Headers
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST
from dockerproxy.oci.names import Digest, Registry
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records
from tests.store.support.images import BOTH, image, put_image
from tests.twistd import twistd_command

pytestmark = pytest.mark.slow  # each test starts a daemon

ROOT = Path(__file__).parent.parent
USER = local_user_name(os.geteuid())
HUB = "registry-1.docker.io/library/ubuntu"
UBUNTU = "docker.io/library/ubuntu"  # its name as people write it


def descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data)}


def image_manifest(*layers: bytes) -> bytes:
    config, *rest = layers
    return json.dumps({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor("a/config", config),
        "layers": [descriptor("a/layer", layer) for layer in rest],
    }).encode()  # fmt: skip


def image_index(*children: bytes) -> bytes:
    manifests = [descriptor(OCI_MANIFEST, child) for child in children]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()


LAYERS = [b"config", b"base" * 1000, b"layer" * 1000]
ONE, TWO = image_manifest(*LAYERS), image_manifest(b"other config", LAYERS[1])


@define
class StoreTree:
    """A store of the daemon on disk, which the test fills without the daemon."""

    root: Path
    layout: Layout = field(init=False)
    blobs: Blobs = field(init=False)
    links: Links = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.layout = Layout(self.root)
        self.blobs, self.links = Blobs(self.layout, False), Links(self.layout, False)

    def add(self, repository: str, tag: str | None, manifest: bytes, *layers: bytes) -> Digest:
        for layer in layers:
            self.blobs.put(layer, Digest.of(layer))
            self.links.link_layer(repository, Digest.of(layer))
        self.blobs.put(manifest, Digest.of(manifest))
        self.links.link_manifest(repository, Digest.of(manifest), json.loads(manifest)["mediaType"])
        if tag is not None:
            self.links.set_tag(repository, tag, Digest.of(manifest))
        return Digest.of(manifest)

    def backdate(self) -> None:
        for entry in list(self.blobs.walk()):
            os.utime(self.layout.blob(entry.key), (entry.last_used - 7200, entry.last_used - 7200))

    @property
    def digests(self) -> set[Digest]:
        return {entry.key for entry in self.blobs.walk()}


@define
class DaemonProcess:
    """A daemon with its state in `state_dir`."""

    state_dir: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.state_dir / "run/control.sock"

    @property
    def env_file(self) -> Path:
        return self.state_dir / "environment"

    @property
    def log(self) -> str:
        return (self.state_dir / "log").read_text()

    @property
    def hosted(self) -> StoreTree:
        return StoreTree(self.state_dir / "registry")

    @property
    def cached(self) -> StoreTree:
        return StoreTree(self.state_dir / "cache")

    @property
    def options(self) -> list[str]:
        return [f"--env-file={self.env_file}"] if self.env_file.exists() else []

    def launch(self) -> subprocess.Popen[bytes]:
        with (self.state_dir / "log").open("ab") as output:
            return subprocess.Popen(
                [*twistd_command(), "dockerproxy", *self.options], cwd=self.state_dir, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, env=environment(
                    STATE_DIR=str(self.state_dir), PROXY_LISTEN="tcp:0:interface=127.0.0.1",
                    REGISTRY_LISTEN="none", PATH=os.environ["PATH"],
                ),
            )  # fmt: skip

    def start(self) -> None:
        self.process = self.launch()
        deadline = time.monotonic() + 30
        while not self.is_listening():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def is_listening(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return self.socket.exists() and probe.connect_ex(str(self.socket)) == 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            # twistd exits with status 0, or kills itself with the SIGTERM that it received (Twisted 22.10 and later).
            assert self.process.wait(30) in (0, -15), self.log
            assert "Traceback" not in self.log, self.log

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run the command, check its exit status, and return its output. Include stderr if it failed."""
        completed = run_command("--socket", str(self.socket), *arguments)
        assert completed.returncode in accepted(status, arguments), (
            completed.returncode,
            completed.stdout,
            completed.stderr,
        )
        assert "Traceback" not in completed.stderr
        return completed.stdout if status in (0, 1) else completed.stdout + completed.stderr

    def json(self, *arguments: str, status: int = 0) -> Any:
        completed = run_command("--json", "--socket", str(self.socket), *arguments)
        assert completed.returncode in accepted(status, arguments), (
            completed.returncode,
            completed.stdout,
            completed.stderr,
        )
        return json.loads(completed.stdout)


def accepted(status: int, arguments: Sequence[str]) -> set[int]:
    """Return the accepted exit statuses. Whether `status` finds something bad depends on the machine and its disk."""
    return {0, 1} if status == 0 and arguments[0] == "status" else {status}


def environment(**extra: str) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "HOME": "/nonexistent", **extra}


def run_command(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dockerproxy.cli", *arguments], capture_output=True, text=True, timeout=60,
        env=environment(**extra), cwd="/", check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path_factory.mktemp("d"))
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture
def daemon(running: DaemonProcess) -> DaemonProcess:
    """Return a daemon that hosts two repositories and caches two."""
    for tree in (running.hosted, running.cached):
        for path in tree.root.glob("docker"):
            shutil.rmtree(path)
        for name in ("damaged", "records"):
            shutil.rmtree(tree.root / name, ignore_errors=True)
    hosted, cached = running.hosted, running.cached
    hosted.add("foo/bar", "v1.2.3.4", ONE, *LAYERS)
    hosted.add("foo/bar", "latest", TWO, b"other config", LAYERS[1])
    hosted.add("foo/bar/deep", "v1", TWO, b"other config", LAYERS[1])
    hosted.backdate()
    cached.add(HUB, "latest", image_index(ONE), *LAYERS)
    cached.add(HUB, None, ONE, *LAYERS)
    cached.add(HUB, "jammy", TWO, b"other config", LAYERS[1])
    cached.add("quay.io/some/thing", "v1", TWO, b"other config", LAYERS[1])
    for tag in ("latest", "jammy"):
        Records(cached.root / "records").put({"key": {"digest": "…"}}, "tag", HUB, tag)
    return running


def test_socket_permissions(daemon: DaemonProcess) -> None:
    assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o660
    assert stat.S_IMODE(daemon.socket.parent.stat().st_mode) == 0o750


def test_ls(daemon: DaemonProcess) -> None:
    text = daemon.run("ls")
    rows = [re.split(r" {2,}", line) for line in text.splitlines()]
    assert [row[:3] for row in rows[1:-1]] == [
        ["foo/bar", "hosted", "2"],
        ["foo/bar/deep", "hosted", "1"],
        [UBUNTU, "cached", "2"],
        ["quay.io/some/thing", "cached", "1"],
    ]
    assert rows[1][6] == "2 hours ago"
    assert rows[-1][0].startswith("4 repositories, ")
    for arguments, names in [
        (("--sort", "size", "--limit", "1"), [UBUNTU]),
        (("ubuntu*",), [UBUNTU]),
        (("*/thing",), ["quay.io/some/thing"]),
        (("foo/*", "--hosted", "--reverse"), ["foo/bar/deep", "foo/bar"]),
        (("docker.io/*", "--hosted"), []),
        (("*" * 1000,), ["foo/bar", "foo/bar/deep", UBUNTU, "quay.io/some/thing"]),
    ]:
        assert daemon.run("ls", "-q", *arguments).splitlines() == names
    assert "quay.io" not in daemon.run("ls", "--hosted")
    assert "foo/bar" not in daemon.run("ls", "--cached")
    repositories = daemon.json("ls")["repositories"]
    sizes = {len(content) for content in (*LAYERS, b"other config", ONE, TWO)}
    assert repositories[0]["size"] == sum(sizes)
    assert repositories[0]["where"] == "hosted"
    assert abs(time.time() - 7200 - repositories[0]["last_used"]) < 600


def test_ls_of_one_repository(daemon: DaemonProcess) -> None:
    daemon.hosted.links.remove_tag("foo/bar", "latest")
    result = daemon.json("ls", "foo/bar")
    assert [(row["tag"], row["digest"], row["media_type"]) for row in result["manifests"]] == [
        ("v1.2.3.4", str(Digest.of(ONE)), OCI_MANIFEST), (None, str(Digest.of(TWO)), OCI_MANIFEST)
    ]  # fmt: skip
    assert result["manifests"][0]["size"] == len(ONE) + sum(map(len, LAYERS))
    text = daemon.run("ls", "foo/bar")
    assert f"v1.2.3.4  {str(Digest.of(ONE))[:19]}  " in text
    assert f"-         {Digest.of(TWO)}  " in daemon.run("ls", "foo/bar", "--digests")
    latest = daemon.json("ls", "docker.io/ubuntu:latest")
    assert latest["name"] == UBUNTU
    assert [row["tag"] for row in latest["manifests"]] == ["latest"]
    assert latest["manifests"][0]["size"] == len(image_index(ONE)) + len(ONE) + sum(map(len, LAYERS))


def test_a_name_without_a_host(daemon: DaemonProcess) -> None:
    """`ubuntu` is the hosted repository, or else that of Docker Hub."""
    for name in ("ubuntu", "library/ubuntu", "docker.io/ubuntu", HUB, UBUNTU, "index.docker.io/library/ubuntu"):
        assert daemon.run("ls", "-q", name).splitlines() == [
            f"{UBUNTU}:jammy",
            f"{UBUNTU}:latest",
            f"{UBUNTU}@{Digest.of(ONE)}",
        ]
    daemon.hosted.add("ubuntu", "mine", ONE, *LAYERS)
    assert daemon.run("ls", "-q", "ubuntu") == "ubuntu:mine\n"
    assert len(daemon.run("ls", "-q", "--cached", "ubuntu").splitlines()) == 3
    assert f"removed {UBUNTU}:jammy (cached)" in daemon.run("rm", "--cached", "ubuntu:jammy")
    assert "removed ubuntu (hosted)" in daemon.run("rm", "ubuntu")
    assert f"removed {UBUNTU} (cached)" in daemon.run("rm", "ubuntu"), "links to layers hide nothing"


@pytest.mark.parametrize("command", [("ls",), ("rm",)])
def test_a_long_name_is_one_short_sentence(daemon: DaemonProcess, command: tuple[str, ...]) -> None:
    for name, status in (("n" * 1000, 4), ("n" * 10_000, 2), (f"{'a/' * 400}b:t", 4), ("foo/bar:" + "t" * 900, 2)):
        text = daemon.run(*command, name, status=status)
        assert len(text.splitlines()[-1]) < 500, text


@pytest.mark.parametrize("name", ["foo/bar:v1.2.3.4", "docker-registry.local/foo/bar:v1.2.3.4"])
def test_rm_of_a_tag(daemon: DaemonProcess, name: str) -> None:
    assert "foo/bar:v1.2.3.4" in daemon.run("rm", name)
    assert daemon.hosted.links.tags("foo/bar") == ["latest"]
    assert daemon.hosted.links.has_manifest("foo/bar", Digest.of(ONE)), "removing a tag must keep its manifest"
    assert "deleted 1 manifest" in daemon.run("gc", "--delete-untagged")
    assert daemon.hosted.digests == {Digest.of(content) for content in (TWO, b"other config", LAYERS[1])}
    assert daemon.hosted.links.tags("foo/bar/deep") == ["v1"]


def test_rm_of_a_digest_and_of_a_repository(daemon: DaemonProcess) -> None:
    result = daemon.json("rm", f"foo/bar@{Digest.of(TWO)}")
    assert result == {"removed": [
        {"where": "hosted", "name": f"foo/bar@{Digest.of(TWO)}", "tags": 1, "manifests": 1, "blobs": 0, "bytes": 0}
    ]}  # fmt: skip
    assert daemon.hosted.links.tags("foo/bar") == ["v1.2.3.4"]
    assert daemon.json("rm", "foo/bar")["removed"][0]["tags"] == 1
    daemon.run("gc")
    assert list(daemon.hosted.links.repositories()) == ["foo/bar/deep"]
    assert "foo/bar/deep" in daemon.run("ls", "--hosted")


@pytest.mark.parametrize("fault", [b"", b"sha256:12", None])
def test_a_tag_without_its_manifest(daemon: DaemonProcess, fault: bytes | None) -> None:
    path = Path(daemon.hosted.layout.tag_current("foo/bar", "latest"))
    if fault is None:
        daemon.hosted.links.unlink_manifest("foo/bar", Digest.of(TWO))
    else:
        path.write_bytes(fault)
        daemon.hosted.links.unlink_manifest("foo/bar", Digest.of(TWO))
    for arguments in (("gc",), ("check",)):
        assert "dockerproxy rm foo/bar:latest" in daemon.run(*arguments, status=1)
    daemon.run("rm", "foo/bar:latest")
    assert not path.parent.parent.exists()
    assert "no problems" in daemon.run("check")
    daemon.run("gc")


def test_rm_of_a_torn_tag_in_an_empty_repository(daemon: DaemonProcess) -> None:
    path = Path(daemon.hosted.layout.tag_current("torn/repository", "v1"))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    daemon.run("rm", "torn/repository:v2", status=4)
    daemon.run("rm", "torn/repository:v1")
    assert not path.exists()
    daemon.run("rm", "torn/repository:v1", status=4)


def test_rm_of_what_a_tag_needs(daemon: DaemonProcess) -> None:
    links, tree = daemon.hosted.links, HostedTree.from_layout(daemon.hosted.layout)
    signature = image(b"sig", b"signature", subject=BOTH)
    put_image(tree, "multi/platform", BOTH, "v1")
    put_image(tree, "multi/platform", signature)
    rows = {row["digest"]: row for row in daemon.json("ls", "multi/platform")["manifests"]}
    assert [rows[str(digest)]["needed_by"] for digest in (BOTH.digest, BOTH.children[0].digest, signature.digest)] == [
        None, "of v1", "signs v1"
    ]  # fmt: skip
    text = daemon.run("ls", "multi/platform")
    assert f"of v1     {str(BOTH.children[0].digest)[:19]}  " in text
    assert f"signs v1  {str(signature.digest)[:19]}  " in text
    name = f"multi/platform@{BOTH.children[0].digest}"
    message = daemon.run("rm", "foo/bar:latest", name, status=7)
    assert f"multi/platform:v1 needs {BOTH.children[0].digest}" in message and "--force" in message
    assert links.tags("foo/bar") == ["latest", "v1.2.3.4"], "nothing is removed if one is refused"
    daemon.run("rm", f"multi/platform@{signature.digest}")
    daemon.run("rm", "--force", name)
    assert not links.has_manifest("multi/platform", BOTH.children[0].digest)
    daemon.run("rm", f"multi/platform@{BOTH.digest}")
    daemon.run("rm", f"multi/platform@{BOTH.children[1].digest}")


def test_rm_of_cached_images(daemon: DaemonProcess) -> None:
    cached, records = daemon.cached, Records(daemon.cached.root / "records")
    removed = daemon.json("rm", f"{HUB}:latest")["removed"][0]
    # The blobs of `jammy` stay, and those of the other repository.
    assert cached.digests == {Digest.of(content) for content in (TWO, b"other config", LAYERS[1])}
    assert (removed["tags"], removed["manifests"], removed["blobs"]) == (1, 2, 4)
    assert records.get("tag", HUB, "latest") is None
    assert records.get("tag", HUB, "jammy") is not None
    daemon.run("rm", "docker.io/library/ubuntu")
    assert cached.links.tags(HUB) == []
    assert records.get("tag", HUB, "jammy") is None
    assert Digest.of(TWO) in cached.digests
    # A blob that is removed by its digest is removed from all repositories, because it may be damaged.
    daemon.run("rm", f"quay.io/some/thing@{Digest.of(LAYERS[1])}")
    assert cached.digests == {Digest.of(TWO), Digest.of(b"other config")}


def test_unknown_name_changes_nothing_and_gives_suggestions(daemon: DaemonProcess) -> None:
    before = [sorted(map(str, tree.root.rglob("*"))) for tree in (daemon.hosted, daemon.cached)]
    for arguments, suggestion in [
        (("rm", "foo/baz:v1.2.3.4"), "foo/bar:v1.2.3.4"),
        (("rm", "foo/bar:v1.2.3.5"), "foo/bar:v1.2.3.4"),
        (("rm", "foo/bar:latest", "foo/bar:v1.2.3.5"), "foo/bar:v1.2.3.4"),
        (("ls", "some/thing"), "quay.io/some/thing"),
        (("ls", "ubunut"), UBUNTU),
        (("rm", "library/ubunto:jammy"), f"{UBUNTU}:jammy"),
        (("rm", "FOO/BAR:v1.2.3.4"), "foo/bar:v1.2.3.4"),
        (("rm", "foo/bar:v1"), "foo/bar:v1.2.3.4"),
        (("ls", "https://192.0.2.1:5443/foo/bar"), "foo/bar"),
        (("rm", "--cached", "foo/bar"), ""),
        (("rm", f"foo/bar@{Digest.of(b'nothing')}"), ""),
        (("rm", "completely-different"), ""),
        (("rm", "../../etc"), ""),
    ]:
        text = daemon.run(*arguments, status=4)
        assert suggestion in text
        assert ("Did you mean" in text) == bool(suggestion), text
    assert daemon.json("rm", "foo/baz", status=4)["error"]["suggestions"][0] == "foo/bar"
    for name in ("foo/bar@sha256:12", "foo/bar:", ":tag", ""):
        daemon.run("rm", name, status=2)
    assert [sorted(map(str, tree.root.rglob("*"))) for tree in (daemon.hosted, daemon.cached)] == before


def test_ambiguous_name(daemon: DaemonProcess) -> None:
    daemon.hosted.add("quay.io/some/thing", "v1", ONE, *LAYERS)
    assert "--hosted or --cached" in daemon.run("rm", "quay.io/some/thing:v1", status=2)
    daemon.run("rm", "--hosted", "quay.io/some/thing:v1")
    assert daemon.cached.links.tags("quay.io/some/thing") == ["v1"]


def test_gc(daemon: DaemonProcess) -> None:
    daemon.hosted.links.remove_tag("foo/bar", "v1.2.3.4")
    assert "deleted 0 manifests" in daemon.run("gc")
    text = daemon.run("gc", "--delete-untagged", "--dry-run")
    assert f"manifest foo/bar {Digest.of(ONE)}" in text
    assert "would delete 1 manifest, 2 links and 3 blobs" in text
    assert Digest.of(ONE) in daemon.hosted.digests
    daemon.hosted.blobs.touch(Digest.of(LAYERS[0]))
    result = daemon.json("gc", "--delete-untagged")
    assert (result["manifests"], result["links"], result["blobs"], result["recent"]) == (1, 1, 2, 1)
    assert {item["kind"] for item in result["removed"]} == {"manifest", "link", "blob"}
    assert "kept, because used within the grace period" in daemon.run("gc", "--delete-untagged")
    daemon.run("gc", "--grace", "1m", status=2)
    daemon.run("gc", "--grace", "soon", status=2)
    Path(daemon.hosted.layout.blob(Digest.of(TWO))).write_bytes(b"{}")
    assert str(Digest.of(TWO)) in daemon.run("gc", "--delete-untagged", status=1)


def test_check(daemon: DaemonProcess) -> None:
    assert "no problems" in daemon.run("check")
    path = Path(daemon.hosted.layout.blob(Digest.of(LAYERS[2])))
    path.write_bytes(b"layer!" * 1000)
    text = daemon.run("check", status=1)
    assert f"{Digest.of(LAYERS[2])} is damaged" in text
    assert f"foo/bar: the manifest {Digest.of(ONE)} refers to {Digest.of(LAYERS[2])}, which is missing" in text
    assert not path.exists()
    assert len(os.listdir(daemon.hosted.layout.damaged)) == 1
    assert daemon.json("check", status=1)["damaged"] == 0, "the damaged blob was moved away by the previous check"
    Path(daemon.cached.layout.blob(Digest.of(LAYERS[2]))).write_bytes(b"bad")
    assert daemon.json("check", "--cached", status=1)["damaged"] == 1
    assert "no problems" in daemon.run("check", "--cached")


def test_import(daemon: DaemonProcess, tmp_path: Path) -> None:
    other = StoreTree(tmp_path / "other")
    other.add("imported", "v1", ONE, *LAYERS)
    other.add("foo/bar", "latest", ONE, *LAYERS)
    other.blobs.put(b"only there", Digest.of(b"only there"))
    other.links.link_layer("imported", Digest.of(b"only there"))
    text = daemon.run("import", str(other.root), status=1)
    assert "foo/bar:latest points to" in text and "--force" in text
    assert daemon.hosted.links.tag("imported", "v1") == Digest.of(ONE)
    assert daemon.hosted.links.tag("foo/bar", "latest") == Digest.of(TWO)
    result = daemon.json("import", "--force", str(other.root))
    assert (result["tags"], result["present"], result["findings"]) == (1, 5, [])
    assert str(tmp_path) in daemon.run("import", str(tmp_path), status=2)
    assert "own directory" in daemon.run("import", str(daemon.hosted.root), status=2)


def test_debug(daemon: DaemonProcess) -> None:
    result = daemon.json("debug")
    assert result["locks"] == {}
    main_process = result["processes"][0]
    assert (main_process["number"], main_process["downloads"]) == (0, [])
    bound = next(bound for bound in main_process["bounds"] if bound["name"] == "running name look-ups")
    assert bound == {
        "name": "running name look-ups", "used": 0, "limit": 16, "share": 6, "refused": 0, "clients": {},
    }  # fmt: skip
    text = daemon.run("debug")
    assert "main process (serving, process ID " in text
    assert "running name look-ups: 0 of 16, 6 for one client" in text


def test_status(daemon: DaemonProcess) -> None:
    result = daemon.json("status")
    assert result["operation"] is None
    assert result["shelves"]["hosted"]["directory"] == str(daemon.hosted.root)
    assert result["cache"]["limit"] == 32 * 2**30
    assert "idle" in daemon.run("status")
    assert daemon.process is not None
    assert result["version"] == __version__
    assert result["processes"][0] == {"number": 0, "state": "serving", "pid": daemon.process.pid}
    assert [port["setting"] for port in result["ports"]] == ["PROXY_LISTEN"]
    assert result["ca"]["expires"] > time.time()
    assert "REGISTRY   STATE " in daemon.run("status")
    fingerprint = result["ca"]["sha256"]
    assert re.fullmatch(r"([0-9A-F]{2}:){31}[0-9A-F]{2}", fingerprint)
    assert f"SHA-256 of the CA certificate: {fingerprint}\n" in daemon.run("status")
    assert f"the SHA-256 of the CA certificate is {fingerprint}\n" in daemon.log


def test_top(daemon: DaemonProcess) -> None:
    result = daemon.json("top", "--count", "1")
    assert (result["transfers"], set(result["traffic"])) == ([], {"served", "downloaded"})


def test_config_and_reload(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.env_file.write_text("REGISTRIES=quay.io\nCACHE_MAX_SIZE=1g\nAUTH_REGISTRIES=quay.io:me:hunter2\n")
    daemon.env_file.chmod(0o600)
    daemon.start()

    def row(name: str) -> tuple[str, str]:
        result = daemon.json("config")
        return next((row["value"], row["place"]) for row in result["settings"] if row["name"] == name)

    assert row("REGISTRIES") == ("quay.io", f"{daemon.env_file}, line 1")
    assert row("AUTH_REGISTRIES") == ("quay.io:***", f"{daemon.env_file}, line 3")
    assert row("STATE_DIR") == (str(tmp_path), "STATE_DIR")
    daemon.env_file.write_text("CACHE_MAX_SIZE=2g\nREGISTRIES=ghcr.io\n")
    text = daemon.run("reload")
    assert text == ("a restart is needed to apply CACHE_MAX_SIZE\nreloaded: serving registry-1.docker.io, ghcr.io\n")
    assert row("REGISTRIES") == ("ghcr.io", f"{daemon.env_file}, line 2")
    assert "CACHE_MAX_SIZE is 2g now; restart the daemon to apply it\n" in daemon.run("config")
    daemon.env_file.write_text("ALLOW_DELETE=perhaps\n")
    text = daemon.run("reload", status=1)
    assert text == "not reloaded, the settings are unchanged: ALLOW_DELETE: 'perhaps' is neither true nor false.\n"
    assert daemon.json("reload", status=1)["refused"].startswith("ALLOW_DELETE")
    assert row("REGISTRIES") == ("ghcr.io", f"{daemon.env_file}, line 2"), "the settings are unchanged"
    daemon.stop()
    audit = (tmp_path / "audit.jsonl").read_text()
    entries = [json.loads(line) for line in audit.splitlines()]
    results = [(entry["user"], entry["result"]) for entry in entries if entry.get("action") == "reload"]
    refused = "not reloaded: ALLOW_DELETE: 'perhaps' is neither true nor false."
    assert results == [(USER, "done"), (USER, refused), (USER, refused)]
    assert "hunter2" not in daemon.log + audit


def test_budget(daemon: DaemonProcess) -> None:
    assert daemon.run("budget") == "no registry has named a limit of pulls yet\n"
    records = Records(daemon.cached.root / "records")
    limits = RateLimits(records, time.time)
    fields = [
        ("ratelimit-limit", "100;w=21600"),
        ("ratelimit-remaining", "34;w=21600"),
        ("docker-ratelimit-source", "192.0.2.7"),
    ]
    limits.note(Registry.parse("registry-1.docker.io"), "public", "GET", 200, Headers(fields))
    assert re.fullmatch(
        r"docker\.io: 34 of 100 pulls left in 6 hours for 192\.0\.2\.7, \d seconds? ago; more by \d\d:\d\d:\d\d\n"
        r"  `dockerproxy pull` leaves 20 to clients\n",
        daemon.run("budget"),
    )
    limits.note(Registry.parse("registry-1.docker.io"), "public", "GET", 429, Headers([("Retry-After", "600")]))
    assert re.search(r"; refuses more until \d\d:\d\d:\d\d\n", daemon.run("budget"))
    assert daemon.json("budget")["limits"][0]["remaining"] == 34


def test_operations_are_exclusive_and_end_with_their_client(daemon: DaemonProcess) -> None:
    large = daemon.hosted.root / "large"
    with large.open("wb") as file:
        file.truncate(20_000_000_000)  # sparse, and large enough that `check` runs for a while
    digest = Digest.of(b"other content")
    path = Path(daemon.hosted.layout.blob(digest))
    path.parent.mkdir(parents=True)
    large.rename(path)
    argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.socket), "check"]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as checking:
        wait_for(lambda: daemon.json("status")["operation"] is not None)
        assert "check" in daemon.run("gc", status=6)
        assert f"check of {USER} running for" in daemon.run("status")
        assert daemon.json("status")["operation"]["user"] == USER
        daemon.run("ls")
        daemon.run("rm", "foo/bar:latest")
        checking.send_signal(2)
        assert checking.wait(20) == 130
        assert b"Traceback" not in checking.communicate()[1]
    wait_for(lambda: daemon.json("status")["operation"] is None)
    path.unlink()
    assert "no problems" in daemon.run("check")


def test_progress_bar_only_on_a_terminal(daemon: DaemonProcess) -> None:
    completed, terminal_output = run_with_stderr_on_terminal(
        [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.socket), "check"]
    )
    assert re.search(r"blobs: \d.*━", terminal_output), terminal_output
    assert terminal_output.endswith("\x1b[2K"), "the bar is erased"
    assert "\x1b[?25h" in terminal_output, "the cursor is visible again"
    assert b"\x1b" not in completed.stdout
    assert run_command("--socket", str(daemon.socket), "check").stderr == ""


def test_a_progress_bar() -> None:
    steps = "t.show_progress('contents', 0, None); t.show_progress('\\x1b[2J', 1, 2); t.clear_progress()"
    program = f"from dockerproxy.terminal import Terminal; t = Terminal(as_json=False); {steps}"
    _, terminal_output = run_with_stderr_on_terminal([sys.executable, "-c", program])
    assert re.search(r"blobs: 0 B .*━", terminal_output)
    assert re.search(r"\\x1b\[2J: 1 .*━.* 50 %", terminal_output), terminal_output
    assert "\x1b[2J" not in terminal_output


def run_with_stderr_on_terminal(argv: Sequence[str]) -> tuple[subprocess.CompletedProcess[bytes], str]:
    pty_master, pty_slave = pty.openpty()
    completed = subprocess.run(
        argv, env=environment(COLUMNS="80", TERM="xterm"), stdout=subprocess.PIPE, stderr=pty_slave, timeout=60,
        check=True,
    )  # fmt: skip
    os.close(pty_slave)
    output = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while chunk := os.read(pty_master, 4096):
            output += chunk
    os.close(pty_master)
    return completed, output.decode(errors="replace")


def test_broken_pipe(daemon: DaemonProcess) -> None:
    completed = subprocess.run(
        f"{sys.executable} -m dockerproxy.cli --socket {daemon.socket} ls | true; echo ${{PIPESTATUS[0]}}",
        env=environment(PATH=os.environ["PATH"]), shell=True, executable="/bin/bash", capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert (completed.stdout, completed.stderr) == ("0\n", "")


# without a daemon


@pytest.mark.parametrize(
    ("redirection", "status", "error"),
    [(">/dev/full", FAILED, "dockerproxy: the output: No space left on device\n"), (">&-", 0, ""), ("2>&-", 0, "")],
    ids=["full", "closed", "closed-errors"],
)
def test_output_that_cannot_be_written(tmp_path: Path, redirection: str, status: int, error: str) -> None:
    (tmp_path / "environment").write_text("REGISTRIES=quay.io\n")
    command = f"{sys.executable} -m dockerproxy.cli config --check {tmp_path}/environment {redirection}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (status, error)


def test_no_daemon(tmp_path: Path) -> None:
    completed = run_command("ls")
    assert completed.returncode == 3
    assert "is not running" in completed.stderr and "/run/docker-registry-proxy/control.sock" in completed.stderr
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as stale_socket:
        stale_socket.bind(str(path))
    for more in ({"RUNTIME_DIR": str(tmp_path)}, {"RUNTIME_DIRECTORY": f"{tmp_path}:/other"}):
        completed = run_command("ls", **more)
        assert completed.returncode == 3
        assert f"no process listens on {path}" in completed.stderr
    completed = run_command("--json", "--socket", str(path), "ls")
    assert "is not running" in json.loads(completed.stdout)["error"]["message"]
    (tmp_path / "file").write_text("")
    assert run_command("--socket", str(tmp_path / "file"), "ls").returncode == 3


@pytest.mark.parametrize("reply", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno"])
def test_another_program_on_the_socket(tmp_path: Path, reply: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with subprocess.Popen(
            [sys.executable, "-m", "dockerproxy.cli", "--socket", str(tmp_path / "s"), "ls"],
            env=environment(), stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            accepted, _ = server.accept()
            with accepted:
                accepted.recv(1000)
                accepted.sendall(reply)
            _, text = process.communicate(timeout=20)
        assert process.returncode == 7
        assert text == f"dockerproxy: {NOT_OURS}\n".encode()


@pytest.mark.parametrize("readable", [True, False])
def test_import_directory_hidden_from_the_daemon(tmp_path: Path, readable: bool) -> None:
    """The systemd service of the Debian package hides some directories from the daemon."""
    for part in ("blobs", "repositories"):
        (tmp_path / "docker/registry/v2" / part / "something").mkdir(parents=True)
    body = json.dumps({"error": {"code": "NOT_UNDERSTOOD", "message": "it is no registry's directory"}}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        directory = tmp_path if readable else tmp_path / "docker"
        argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(tmp_path / "s"), "import", str(directory)]
        with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True) as process:
            accepted, _ = server.accept()
            with accepted:
                request = b""
                while b'"force"' not in request:
                    request += accepted.recv(1000)
                accepted.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            _, text = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "it is no registry's directory" in text
    assert ("its service hides" in text) == readable


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_permission_denied(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 1:
            parent.chmod(0o711)
    directory = tmp_path / "run"
    directory.mkdir(mode=0o750)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "control.sock"))
        server.listen()
        arguments = ["--socket", str(directory / "control.sock"), "ls"]
        # All that the command needs is imported before, because the other user may be unable to read Python's files.
        imports = "import os, shutil, sys, dockerproxy.commands.images; from dockerproxy.cli import main"
        code = f"{imports}; os.setuid(65534); sys.exit(main({arguments}))"
        completed = subprocess.run(
            [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert completed.returncode == 5, completed.stderr
    assert "permission denied" in completed.stderr and "group root" in completed.stderr


def test_second_daemon_and_stale_socket(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.start()
    assert daemon.process is not None
    other = daemon.launch()
    assert other.wait(30) != 0
    assert f"is in use by the daemon with process ID {daemon.process.pid};" in daemon.log
    daemon.run("status")
    daemon.process.kill()
    daemon.process.wait()
    assert daemon.socket.exists()
    assert "is not running" in daemon.run("ls", status=3)
    daemon.start()
    daemon.run("status")
    daemon.stop()
    assert not daemon.socket.exists()


def test_daemon_stops_during_a_command(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.start()
    assert daemon.process is not None
    path = Path(daemon.hosted.layout.blob(Digest.of(b"other content")))
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(20_000_000_000)
    argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.socket), "check"]
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE) as checking:
        wait_for(lambda: daemon.json("status")["operation"] is not None)
        started_at = time.monotonic()
        daemon.stop()
        assert time.monotonic() - started_at < 15
        _, text = checking.communicate(timeout=20)
    assert checking.returncode == 7
    assert text == b"dockerproxy: the daemon closed the connection before it finished\n"


def operation_processes(daemon: DaemonProcess) -> list[int]:
    """Return the IDs of the processes of operations on the daemon's stores."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes().split(b"\0")
            if b"dockerproxy.operations" in arguments and str(daemon.state_dir).encode() in arguments[-2]:
                pids.append(int(path.parent.name))
    return pids


@pytest.mark.parametrize("killed", ["operation", "daemon"])
def test_crash_during_a_command(tmp_path: Path, killed: str) -> None:
    daemon = DaemonProcess(tmp_path)
    daemon.start()
    assert daemon.process is not None
    path = Path(daemon.hosted.layout.blob(Digest.of(b"somebody's")))
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(20_000_000_000)
    argv = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(daemon.socket), "check"]
    with subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True) as checking:
        wait_for(lambda: operation_processes(daemon))
        os.kill(operation_processes(daemon)[0] if killed == "operation" else daemon.process.pid, 9)
        _, text = checking.communicate(timeout=20)
    assert checking.returncode == 7
    wait_for(lambda: not operation_processes(daemon))
    if killed == "operation":
        assert text == "dockerproxy: the process of check failed (killed by signal 9); see the daemon's log\n"
        assert "check failed (killed by signal 9)" in daemon.log
        assert daemon.json("status")["operation"] is None
        daemon.stop()
    else:
        assert text == "dockerproxy: the daemon closed the connection before it finished\n"
        daemon.process.wait()


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
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == status


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the version of the Python package, which is the version in debian/changelog too."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    version = capsys.readouterr().out.strip().removeprefix("dockerproxy ")
    assert re.match(rf"\S+ \({re.escape(version)}\) ", (ROOT / "debian" / "changelog").read_text())


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
