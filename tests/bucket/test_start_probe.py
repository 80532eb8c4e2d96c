"""The look at the bucket at the start, against a small store on loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("botocore", reason="botocore is not installed (python3-botocore)")

from dockerproxy.bucket import start_probe
from dockerproxy.bucket.request_signer import RequestSigner
from dockerproxy.bucket.start_probe import StartProbe
from dockerproxy.bucket.store_errors import IGNORES_CONDITIONS
from dockerproxy.errors import StoreRefused
from dockerproxy.net.store_location import StoreLocation

VARIABLES = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


LISTING = b'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>'


class SmallStore(ThreadingHTTPServer):
    """Keeps the names of objects. It may ignore If-None-Match, or refuse all."""

    def __init__(self, *, knows_conditions: bool, refusal: bytes = b"", listing: bytes = LISTING) -> None:
        super().__init__(("127.0.0.1", 0), _StoreHandler)
        self.knows_conditions, self.refusal, self.listing = knows_conditions, refusal, listing
        self.objects: set[str] = set()
        self.methods: list[str] = []


class _StoreHandler(BaseHTTPRequestHandler):
    server: SmallStore

    def do_GET(self) -> None:
        self._respond(200)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.knows_conditions and self.headers.get("If-None-Match") and self.path in self.server.objects:
            self._respond(412)
            return
        self.server.objects.add(self.path)
        self._respond(200)

    def do_DELETE(self) -> None:
        self.server.objects.discard(self.path)
        self._respond(204)

    def _respond(self, status: int) -> None:
        self.server.methods.append(self.command)
        self.send_response(403 if self.server.refusal else status)
        content = self.server.refusal or (self.server.listing if self.command == "GET" else b"")
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[SmallStore]:
    with SmallStore(**request.param) as store:
        thread = Thread(target=store.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield store
        store.shutdown()
        thread.join()


def probe(store: SmallStore, *, read_only: bool = False) -> list[str]:
    location = StoreLocation.parse(f"s3://images?endpoint=http://127.0.0.1:{store.server_port}")
    unused: Any = None
    signer = RequestSigner.find_credentials(unused, location.region, VARIABLES)
    return StartProbe(location, signer).run(read_only=read_only)


@pytest.mark.parametrize("store", [{"knows_conditions": True}], indirect=True, ids=["conditions"])
def test_a_store_that_keeps_to_conditions(store: SmallStore) -> None:
    assert probe(store) == []
    assert (store.methods, store.objects) == (["GET", "PUT", "PUT", "DELETE"], set())


@pytest.mark.parametrize("store", [{"knows_conditions": False}], indirect=True, ids=["none"])
def test_a_store_that_ignores_conditions_is_said_in_a_sentence(store: SmallStore) -> None:
    [sentence] = probe(store)
    assert sentence.startswith("the bucket images") and sentence.endswith(IGNORES_CONDITIONS)
    assert store.objects == set()


@pytest.mark.parametrize("store", [{"knows_conditions": False}], indirect=True, ids=["none"])
def test_a_key_that_may_only_read_writes_nothing(store: SmallStore) -> None:
    assert probe(store, read_only=True) == []
    assert store.methods == ["GET"]


@pytest.mark.parametrize(
    "store",
    [{"knows_conditions": True, "refusal": b"<Error><Code>AccessDenied</Code></Error>"}],
    indirect=True,
    ids=["denied"],
)
def test_a_refusal_stops_the_start(store: SmallStore) -> None:
    with pytest.raises(StoreRefused, match="AccessDenied"):
        probe(store)


@pytest.mark.parametrize("is_listening", [False, True], ids=["refused", "silent"])
def test_a_store_that_does_not_answer_stops_no_start(monkeypatch: pytest.MonkeyPatch, is_listening: bool) -> None:
    monkeypatch.setattr(start_probe, "_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        location = StoreLocation.parse(f"s3://images?endpoint=http://127.0.0.1:{server.getsockname()[1]}")
        if not is_listening:
            server.close()
        unused: Any = None
        signer = RequestSigner.find_credentials(unused, location.region, VARIABLES)
        [sentence] = StartProbe(location, signer).run(read_only=False)
    assert sentence.startswith("the bucket images at http://127.0.0.1")
    assert "does not answer" in sentence and sentence.endswith("until it does, pushes fail")


@pytest.mark.parametrize(
    "store",
    [
        {"knows_conditions": True, "listing": listing}
        for listing in (b"", b"<html>MinIO Console</html>", b'{"status": "ok"}', LISTING[:20])
    ],
    indirect=True,
    ids=["empty", "console", "json", "torn"],
)
def test_another_server_at_the_endpoint_stops_the_start(store: SmallStore) -> None:
    for read_only in (False, True):
        with pytest.raises(StoreRefused, match="not as an object store does; correct endpoint="):
            probe(store, read_only=read_only)
    assert store.methods == ["GET", "GET"], "nothing is written to it"


def test_a_proxy_whose_password_nobody_may_read_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    location = StoreLocation.parse("s3://images?endpoint=http://store.invalid:9000")
    unused: Any = None
    signer = RequestSigner.find_credentials(unused, location.region, VARIABLES)
    [sentence] = StartProbe(location, signer, [f"http://user:hunter2@127.0.0.1:{port}"]).run(read_only=False)
    assert "does not answer" in sentence and str(port) in sentence and "hunter2" not in sentence


@pytest.mark.parametrize("store", [{"knows_conditions": True}], indirect=True, ids=["conditions"])
def test_the_next_proxy_is_used_if_the_first_does_not_answer(store: SmallStore) -> None:
    """The store stands for a proxy, too: it looks at the path only."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = f"http://127.0.0.1:{server.getsockname()[1]}"
    location = StoreLocation.parse("s3://images?endpoint=http://store.invalid:9000")
    unused: Any = None
    signer = RequestSigner.find_credentials(unused, location.region, VARIABLES)
    proxies = [dead, f"http://127.0.0.1:{store.server_port}"]
    assert StartProbe(location, signer, proxies).run(read_only=False) == []
    assert store.methods == ["GET", "PUT", "PUT", "DELETE"]
    direct = StoreLocation.parse(f"s3://images?endpoint=http://127.0.0.1:{store.server_port}")
    assert StartProbe(direct, signer, [dead, None]).run(read_only=True) == []
