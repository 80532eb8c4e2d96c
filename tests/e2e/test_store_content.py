"""Contents that a store sends in other forms than were asked for: clients get the right bytes, or a word about it."""

from __future__ import annotations

import gzip
import http.client
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.http_client import request_directly
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.e2e.harness.seaweedfs import SeaweedFS
from tests.e2e.test_store_bad_days import StoreFront, Times, push_blob, refuse, running_behind_front

SIZE = 300_000  # more than is read as a whole before a response starts

Answer = Callable[[HTTPExchange, bytes], object]


def respond(status: int, change: Callable[[bytes], bytes] = lambda data: data, **fields: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return lambda exchange, data: exchange.respond(status, named, change(data))


def send_chunks(*parts: bytes | None) -> Answer:
    """Return an answer of chunks: None stands for the data. An empty one ends it."""

    def answer(exchange: HTTPExchange, data: bytes) -> None:
        exchange.send_head(200, {"Transfer-Encoding": "chunked"})
        for part in parts:
            exchange.send_chunk(data if part is None else part)
        exchange.close_after_response()

    return answer


def cut_off(exchange: HTTPExchange, data: bytes) -> None:
    exchange.send_head(200, {"Content-Length": str(len(data))})
    exchange.send_body(data[: len(data) // 2])
    exchange.close_after_response()


def send_early_responses(exchange: HTTPExchange, data: bytes) -> None:
    _, writer = exchange.take_over()
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n"
    writer.write(early + b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))


RIGHT: dict[str, Answer] = {
    "chunks": send_chunks(None, b""),
    "no length": lambda exchange, data: (
        exchange.send_head(200, {"Connection": "close"}), exchange.send_body(data), exchange.close_after_response()
    ),
    "a false coding": respond(200, Content_Encoding="gzip"),
    "a cut": cut_off,
    "chunks without an end": send_chunks(None),
    "a reset": lambda exchange, data: exchange.reset(),
    "a part that is the whole": respond(206, Content_Range=f"bytes 0-{SIZE - 1}/{SIZE}"),
    "early responses": send_early_responses,
}  # fmt: skip
"""Answers that clients do not notice."""

WRONG: dict[str, Answer] = {
    "other bytes": respond(200, lambda data: bytes(len(data))),
    "fewer bytes": respond(200, lambda data: data[:-1000]),
    "more bytes": respond(200, lambda data: data + b"x"),
    "no bytes": respond(200, lambda data: b""),
    "a page": respond(200, lambda data: b"<html>sign in</html>", Content_Type="text/html"),
    "an error": lambda exchange, data: refuse(exchange, 200, "InternalError"),
    "a part": respond(206, lambda data: data[:1000], Content_Range=f"bytes 0-999/{SIZE}"),
    "no content": respond(204),
    "not modified": respond(304),
    "no such range": lambda exchange, data: refuse(exchange, 416, "InvalidRange"),
    "another region": lambda exchange, data: refuse(exchange, 301, "PermanentRedirect", "use eu-9"),
    "another place": respond(307, lambda data: b"", Location="http://127.0.0.1:1/"),
    "an archive": lambda exchange, data: refuse(exchange, 403, "InvalidObjectState"),
    "a coding": respond(200, gzip.compress, Content_Encoding="gzip"),
    "endless chunks": send_chunks(*[bytes(65536)] * 50, b""),
}


@pytest.fixture(scope="module")
def place(
    seaweedfs: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[StoreFront, RegistryDaemon]]:
    with running_behind_front(seaweedfs, "odd-content", tmp_path_factory.mktemp("daemon"), "5s") as both:
        yield both


def get_blob(place: tuple[StoreFront, RegistryDaemon], data: bytes, answer: Answer | None) -> tuple[int, bytes]:
    """Return the status and the content of a blob that the store sends by `answer` once. A broken response has 0."""
    front, daemon = place
    digest = images.sha256_digest(data)

    def give(exchange: HTTPExchange) -> bool:
        assert answer is not None
        answer(exchange, data)
        return True

    is_content = lambda exchange: exchange.method == "GET" and f"/{digest.partition(':')[2]}/data" in exchange.path  # noqa: E731
    fault = Times(0 if answer is None else 1, give, only=is_content)
    front.fault = fault
    try:
        response = request_directly("GET", f"http://{daemon.http_address}/v2/odd/app/blobs/{digest}")
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        front.fault = lambda exchange: False
        assert fault.left == 0
    return response.status, response.body


@pytest.mark.parametrize("name", RIGHT)
def test_a_form_that_clients_do_not_notice(place: tuple[StoreFront, RegistryDaemon], name: str) -> None:
    data = images.random_bytes(SIZE, name)
    assert push_blob(place[1], "odd/app", data).status == 201
    assert get_blob(place, data, RIGHT[name]) == (200, data)


@pytest.mark.parametrize("name", WRONG)
def test_a_content_that_is_no_answer(place: tuple[StoreFront, RegistryDaemon], name: str) -> None:
    data = images.random_bytes(SIZE, name)
    assert push_blob(place[1], "odd/app", data).status == 201
    status, body = get_blob(place, data, WRONG[name])
    assert status in (0, 502, 503)
    if status:
        assert b"bucket" in body, body
        assert b".invalid" not in body
        assert body.startswith(b'{"errors"')
    assert get_blob(place, data, None) == (200, data), "nothing wrong is kept"
