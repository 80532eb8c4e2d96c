"""SeaweedFS, an object store: one process with its master, volume server, filer and S3 gateway, or one for each."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bench.object_store import SeaweedCommand, find_seaweed, write_users
from bench.servers import BenchError, free_port
from tests.e2e.harness.object_store import ACCESS_KEY, SECRET_KEY, KillableStore, ObjectStore
from tests.e2e.harness.process import BackgroundProcess


def find_weed() -> str:
    """Return the path of the program. Skip the test without it."""
    pytest.importorskip("botocore", reason="botocore is not installed (python3-botocore)")
    try:
        return find_seaweed()
    except BenchError as error:
        pytest.skip(str(error))


class SeaweedFS(BackgroundProcess, ObjectStore):
    """An empty store in `folder`. Its ports stay the same after a restart."""

    def __init__(self, folder: Path) -> None:
        find_weed()
        command = SeaweedCommand.make(folder, ACCESS_KEY, SECRET_KEY, volume_size=256)
        self.port, self.filer, self.s3_config = command.port, command.filer, command.users_file
        super().__init__(command.argv, folder / "log", command.environment, folder)

    def start(self) -> None:
        self.launch()
        self.wait_until_ready(self.answers, timeout=90)

    def close(self) -> None:
        self.kill()  # it takes 20 s to stop


class SeaweedGateway(BackgroundProcess, ObjectStore):
    """A further S3 gateway of `store`, which runs, in a process of its own."""

    def __init__(self, store: SeaweedFS, folder: Path) -> None:
        folder.mkdir()
        self.port = free_port()
        argv = [
            find_weed(), f"-logdir={folder}", "s3", "-ip.bind=127.0.0.1", f"-filer={store.filer}",
            f"-port={self.port}", f"-port.grpc={free_port()}", f"-config={store.s3_config}",
            "-port.iceberg=0", "-port.lance=0",
        ]  # fmt: skip
        super().__init__(argv, folder / "log", {"PATH": os.environ["PATH"], "HOME": str(folder)}, folder)

    def start(self) -> None:
        self.launch()
        self.wait_until_ready(self.answers, timeout=60)

    def close(self) -> None:
        self.kill()  # it takes 20 s to stop


class SeaweedCluster(KillableStore):
    """An empty store in `folder` with a process for each of its parts. It syncs each object that it acknowledges.

    If `syncs_names`, its filer does so, too, by SQLite in place of LevelDB.
    """

    def __init__(self, folder: Path, *, syncs_names: bool = False) -> None:
        self._weed, self._folder = find_weed(), folder
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
        for name in ("master", "volume", "filer"):
            (folder / name).mkdir(parents=True)
        if syncs_names:
            sqlite = f'[sqlite]\nenabled = true\ndbFile = "{folder}/filer/names.db"\n'
            (folder / "filer.toml").write_text(f"[leveldb2]\nenabled = false\n{sqlite}")
        names = ("master", "volume", "filer", "s3")
        ports, grpc_ports = ({name: free_port() for name in names} for _ in range(2))
        self._master, filer = (f"127.0.0.1:{ports[name]}.{grpc_ports[name]}" for name in ("master", "filer"))
        users_file, self.port = write_users(folder, ACCESS_KEY, SECRET_KEY), ports["s3"]
        options = {
            "master": ("-peers=none", f"-mdir={folder}/master", "-telemetry=false", "-volumeSizeLimitMB=256"),
            "volume": (f"-dir={folder}/volume", "-max=300", f"-master={self._master}"),
            "filer": (f"-defaultStoreDir={folder}/filer", f"-master={self._master}"),
            "s3": (f"-filer={filer}", f"-config={users_file}", "-port.iceberg=0", "-port.lance=0"),
        }
        self.parts = {name: self._part(name, ports[name], grpc_ports[name], options[name]) for name in names}

    def _part(self, name: str, port: int, grpc_port: int, options: tuple[str, ...]) -> BackgroundProcess:
        address = ["-ip.bind=127.0.0.1", f"-port={port}", f"-port.grpc={grpc_port}"]
        if name != "s3":
            address.append("-ip=127.0.0.1")
        argv = [self._weed, f"-logdir={self._folder}", name, *address, *options]
        return BackgroundProcess(argv, self._folder / f"{name}.out", self._environment, self._folder)

    def start(self) -> None:
        for part in self.parts.values():
            if not part.running:
                part.launch()
        self.parts["s3"].wait_until_ready(self.answers, timeout=90)

    def repair(self) -> None:
        """Make the index of each volume again from its content, because only this was synced before a power cut."""
        argv = [self._weed, f"-logdir={self._folder}", "fix", f"{self._folder}/volume"]
        subprocess.run(argv, env=self._environment, timeout=60, check=True, capture_output=True)

    def make_bucket(self, bucket: str) -> str:
        """Create a bucket of which each object is synced, as docs/fleet.md has it, and return its name."""
        super().make_bucket(bucket)
        ended = subprocess.run(
            [self._weed, f"-logdir={self._folder}", "shell", f"-master={self._master}"],
            input=f"fs.configure -locationPrefix=/buckets/{bucket} -fsync -apply\n",
            env=self._environment, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert '"fsync":  true' in ended.stdout, ended.stdout + ended.stderr
        return bucket
