"""Ceph RGW, an object store: a monitor, a disk in a file and a gateway, of this machine or of a Debian tree.

`make ceph` makes a tree of Debian 13 in .cache/ceph. CEPH_TREE is the root directory of another one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.servers import free_port
from tests.e2e.harness.clients import THIS_MACHINE, Machine, clean_environment
from tests.e2e.harness.object_store import ACCESS_KEY, SECRET_KEY, KillableStore
from tests.e2e.harness.process import BackgroundProcess, wait_until

_MADE_TREE = Path(__file__).resolve().parents[3] / ".cache/ceph/root"
_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")


def find_machine(folder: Path) -> Machine:
    """Return the place of Ceph's programs. Skip the test with the reason if there are none."""
    if os.geteuid() != 0:
        pytest.skip("Ceph RGW: it needs root")
    tree = Path(os.environ.get("CEPH_TREE") or _MADE_TREE)
    if tree.is_dir():
        return Machine(tree, folder)
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"Ceph RGW: {', '.join(missing)} are not installed, and there is no tree {tree} (make ceph)")
    return THIS_MACHINE


def _find_classes(root: Path) -> str:
    """Return the directory of the disk's plugins. Debian's default is relative to the directory of the process."""
    return f"/{next(root.glob('usr/lib/*/rados-classes')).relative_to(root)}"


class CephRGW(KillableStore):
    """An empty cluster in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._machine = find_machine(folder)
        pytest.importorskip("botocore", reason="botocore is not installed (python3-botocore)")
        self._folder = folder
        for name in ("mon", "osd", "rgw", "run", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._cluster, self.parts = str(uuid.uuid4()), dict[str, BackgroundProcess]()
        monitor = f"127.0.0.1:{free_port()}"
        self._monitor = monitor
        self._config = folder / "ceph.conf"
        self._config.write_text(f"""\
[global]
fsid = {self._cluster}
mon host = [v2:{monitor}]
public addr = 127.0.0.1
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd objectstore = bluestore
osd memory target = 939524096
bluestore block size = 8589934592
mon allow pool size one = true
run dir = {folder}/run
log file = {folder}/log/$name.log
admin socket = {folder}/run/$name.asok
mon data = {folder}/mon
osd data = {folder}/osd
osd heartbeat grace = 60
osd class dir = {_find_classes(self._machine.tree or Path("/"))}
[osd]
keyring = {folder}/osd/keyring
[client.rgw]
keyring = {folder}/rgw/keyring
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{self.port}
rgw dns name = localhost
""")

    def start(self) -> None:
        if not self.parts:
            self._make_cluster()
        for part in self.parts.values():
            if not part.running:
                part.launch()
        self.parts["gateway"].wait_until_ready(self.answers, timeout=90)

    def _make_cluster(self) -> None:
        folder = self._folder
        every = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        monitor_keys = f"{folder}/monitor-keys"
        self._run(
            "ceph-authtool", "--create-keyring", monitor_keys, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"
        )
        self._run("ceph-authtool", "--create-keyring", f"{folder}/keyring", "--gen-key", "-n", "client.admin", *every)
        self._run("ceph-authtool", monitor_keys, "--import-keyring", f"{folder}/keyring")
        address = f"[v2:{self._monitor}]"
        self._run("monmaptool", "--create", "--addv", "a", address, "--fsid", self._cluster, f"{folder}/map")
        self._ceph_run("ceph-mon", "--mkfs", "-i", "a", "--monmap", f"{folder}/map", "--keyring", monitor_keys)
        self._launch("monitor", "ceph-mon", "-f", "-i", "a")
        self._run("ceph-authtool", "--create-keyring", f"{folder}/osd/keyring", "--gen-key", "-n", "osd.0")
        key = self._run("ceph-authtool", "-p", "-n", "osd.0", f"{folder}/osd/keyring").strip()
        secrets, disk = folder / "secrets.json", str(uuid.uuid4())
        secrets.write_text(f'{{"cephx_secret": "{key}"}}')
        self._ceph_run("ceph", "osd", "new", disk, "-i", str(secrets))
        self._ceph_run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._launch("disk", "ceph-osd", "-f", "-i", "0")
        wait_until(lambda: "1 up" in self._ceph_run("ceph", "osd", "stat"), "the disk is up", timeout=60)
        rights = ("mon", "allow rwx", "osd", "allow rwx")
        self._ceph_run("ceph", "auth", "get-or-create", "client.rgw", *rights, "-o", f"{folder}/rgw/keyring")
        self._launch("gateway", "radosgw", "-f", "-n", "client.rgw")
        self.parts["gateway"].wait_until_ready(self._accepts, timeout=90)
        user = ("--uid=test", "--display-name=test", f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
        self._ceph_run("radosgw-admin", "user", "create", *user)

    def _accepts(self) -> bool:
        try:
            return self.send("probe", "HEAD")[0] in (403, 404)
        except OSError:
            return False

    def _run(self, *argv: str) -> str:
        environment = clean_environment({"HOME": str(self._folder)})
        ended = subprocess.run(
            self._machine.command(argv), env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == 0, f"{argv}\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def _ceph_run(self, program: str, *arguments: str) -> str:
        return self._run(program, "-c", str(self._config), *arguments)

    def _launch(self, name: str, program: str, *arguments: str) -> None:
        argv: Sequence[str] = (program, "-c", str(self._config), *arguments)
        environment = clean_environment({"HOME": str(self._folder)})
        process = BackgroundProcess(
            self._machine.command(argv), self._folder / f"{program}.out", environment, self._folder
        )
        self.parts[name] = process
        process.launch()
