"""Ceph RGW, an object store: a monitor, a disk in memory and a gateway, of this machine or of a Debian tree.

CEPH_TREE is the root directory of such a tree. This makes one of Debian 13:

    tools/debian-root /var/tmp/ceph ceph-mon,ceph-osd,ceph-common,radosgw && export CEPH_TREE=/var/tmp/ceph/root
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
from tests.e2e.harness.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore
from tests.e2e.harness.process import BackgroundProcess, wait_until

_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")


def find_machine(folder: Path) -> Machine:
    """Return the place of Ceph's programs. Skip the test with the reason if there are none."""
    tree = os.environ.get("CEPH_TREE")
    if tree is not None:
        return Machine(Path(tree), folder)
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        lacks = f"{', '.join(missing)} are not installed" if missing else "it needs root"
        pytest.skip(f"Ceph RGW: {lacks}, and CEPH_TREE names no Debian tree with them")
    return THIS_MACHINE


def _find_classes(root: Path) -> str:
    """Return the directory of the disk's plugins. Debian's default is relative to the directory of the process."""
    return f"/{next(root.glob('usr/lib/*/rados-classes')).relative_to(root)}"


class CephRGW(ObjectStore):
    """An empty cluster in `folder`. `stop` and `kill` end its gateway only, because the disk is in memory."""

    def __init__(self, folder: Path) -> None:
        self._machine = find_machine(folder)
        pytest.importorskip("botocore", reason="botocore is not installed (python3-botocore)")
        self._folder = folder
        for name in ("mon", "osd", "rgw", "run", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._cluster, self._processes = str(uuid.uuid4()), list[BackgroundProcess]()
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
osd objectstore = memstore
memstore device bytes = 4294967296
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
        if self._processes:
            self._processes[-1].launch()
        else:
            self._make_cluster()
        self._processes[-1].wait_until_ready(self.answers, timeout=60)

    def stop(self) -> None:
        """End the gateway."""
        self._processes[-1].stop()

    def kill(self) -> None:
        """Kill the gateway."""
        self._processes[-1].kill()

    def close(self) -> None:
        for process in reversed(self._processes):
            process.kill()

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
        self._launch("ceph-mon", "-f", "-i", "a")
        self._run("ceph-authtool", "--create-keyring", f"{folder}/osd/keyring", "--gen-key", "-n", "osd.0")
        key = self._run("ceph-authtool", "-p", "-n", "osd.0", f"{folder}/osd/keyring").strip()
        secrets, disk = folder / "secrets.json", str(uuid.uuid4())
        secrets.write_text(f'{{"cephx_secret": "{key}"}}')
        self._ceph_run("ceph", "osd", "new", disk, "-i", str(secrets))
        self._ceph_run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._launch("ceph-osd", "-f", "-i", "0")
        wait_until(lambda: "1 up" in self._ceph_run("ceph", "osd", "stat"), "the disk is up", timeout=60)
        rights = ("mon", "allow rwx", "osd", "allow rwx")
        self._ceph_run("ceph", "auth", "get-or-create", "client.rgw", *rights, "-o", f"{folder}/rgw/keyring")
        self._launch("radosgw", "-f", "-n", "client.rgw")
        self._processes[-1].wait_until_ready(self._accepts, timeout=90)
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

    def _launch(self, program: str, *arguments: str) -> None:
        argv: Sequence[str] = (program, "-c", str(self._config), *arguments)
        environment = clean_environment({"HOME": str(self._folder)})
        process = BackgroundProcess(
            self._machine.command(argv), self._folder / f"{program}.out", environment, self._folder
        )
        self._processes.append(process)
        process.launch()
