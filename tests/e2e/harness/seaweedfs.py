"""SeaweedFS, an object store: one process with its master, volume server, filer and S3 gateway."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.object_store import SeaweedCommand, find_seaweed
from bench.servers import BenchError, free_port
from tests.e2e.harness.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore
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
        self.wait_until_ready(self.answers, timeout=90)  # its election after a crash takes 20 s

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
