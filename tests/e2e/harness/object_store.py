"""Object stores for tests: one user, buckets, and single requests."""

from __future__ import annotations

import hashlib
import http.client
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self
from urllib.parse import urlsplit

from dockerproxy.net.store_location import StoreLocation
from tests.e2e.harness.process import BackgroundProcess

ACCESS_KEY, SECRET_KEY = "AKIDtest", "secret-of-the-store"


class ObjectStore(ABC):
    """A store on `port` of 127.0.0.1, with the user of `ACCESS_KEY`."""

    port: int

    @abstractmethod
    def start(self) -> None:
        """Start the store, and wait until it takes requests."""

    @abstractmethod
    def close(self) -> None:
        """End all processes of the store."""

    @contextmanager
    def run(self) -> Iterator[Self]:
        """Run the store for the time of the context."""
        try:
            self.start()
            yield self
        finally:
            self.close()

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

    def keys(self, bucket: str, prefix: str) -> list[str]:
        """Return the keys that begin with `prefix`, 1,000 at most."""
        from dockerproxy.bucket.s3_xml import parse_answer

        status, content = self.send(bucket, "GET", query=[("list-type", "2"), ("prefix", prefix)])
        assert status == 200, content
        return [texts["Key"] for kind, texts in parse_answer(content).items if kind == "Contents"]

    def send(
        self, bucket: str, method: str, key: str = "", body: bytes = b"", query: Sequence[tuple[str, str]] = ()
    ) -> tuple[int, bytes]:
        """Send a request, and return the status and the content of the response."""
        from dockerproxy.bucket.request_signer import RequestSigner

        url = StoreLocation.parse(self.url(bucket)).url(key, query)
        signer = RequestSigner.find_credentials(None, "us-east-1", self.credentials)
        fields = dict(signer.sign_now(method, url, [], hashlib.sha256(body).hexdigest()))
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            parts = urlsplit(url)
            connection.request(method, f"{parts.path}?{parts.query}" if parts.query else parts.path, body, fields)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def answers(self) -> bool:
        """Return whether the store takes requests."""
        try:
            return self.send("probe", "HEAD")[0] in (200, 404)
        except (OSError, http.client.HTTPException):
            return False


class KillableStore(ObjectStore):
    """A store of several processes, of which each can be killed. `start` starts those that do not run."""

    parts: Mapping[str, BackgroundProcess]

    def kill(self, names: Iterable[str]) -> None:
        """Kill the parts with these names."""
        for name in names:
            self.parts[name].kill()

    def close(self) -> None:
        self.kill(reversed(self.parts))
