"""The attacker is a client without a login, of a repository that was public and is private now.

He gets nothing that came since. He cannot make an outage by a request on which upstream fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.harness.fake_registry import ResponseBehaviour, respond_error, respond_normally
from tests.e2e.harness.http_client import BufferedResponse, basic_authorization
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage, TypedContent, build_small_image
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.hostile.conftest import GOOD, HostileNetwork, StartRegistryDaemon

NAME = "team/app"
ALICE = basic_authorization("alice", "secret")
OLD, NEW = build_small_image("when it was public"), build_small_image("since it is private")
LARGE = "x/" + "y" * 20_000

ATTACKERS: dict[str, dict[str, str]] = {
    "anonymous": {},
    "a wrong password": {"Authorization": basic_authorization("alice", "guess")},
    "a forged token": {"Authorization": "Bearer drp.x"},
    "a token of 20 KB": {"Authorization": "Bearer " + "x" * 20_000},
    "an Accept of 20 KB": {"Accept": f"{ACCEPT_MANIFESTS}, {LARGE}"},
    "an odd Accept": {"Accept": f'{ACCEPT_MANIFESTS}, odd/type;q="\\""'},
}


def close(exchange: HTTPExchange) -> None:
    exchange.close_after_response()


def reset(exchange: HTTPExchange) -> None:
    exchange.reset()


def send_garbage(exchange: HTTPExchange) -> None:
    exchange.send_head(200, {"Content Type": "x"})
    exchange.close_after_response()


def send_500(exchange: HTTPExchange) -> None:
    respond_error(exchange, 500, "UNKNOWN")


def respond_as_a_front(fail: Callable[[HTTPExchange], None]) -> ResponseBehaviour:
    """Let only alice read. Before that, fail on a request with a large or odd field, as some front servers do."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        headers = exchange.request.headers
        if "odd/type" in headers.get("accept", "") or sum(map(len, headers.values())) > 10_000:
            fail(exchange)
        elif headers.get("authorization") == ALICE:
            respond_normally(exchange, content)
        else:
            respond_error(exchange, 401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="good"')

    return respond


def paths(image: SampleImage) -> Iterator[str]:
    yield f"/v2/{NAME}/manifests/{image.digest}"
    yield from (f"/v2/{NAME}/blobs/{blob.digest}" for blob in image.blobs)


def pull(daemon: RegistryDaemon, image: SampleImage, tag: str, headers: dict[str, str]) -> None:
    for path in (f"/v2/{NAME}/manifests/{tag}", *paths(image)):
        assert ask(daemon, path, headers).status == 200, path


def ask(daemon: RegistryDaemon, path: str, headers: dict[str, str], method: str = "GET") -> BufferedResponse:
    return daemon.client.request(method, GOOD + path, {"Accept": ACCEPT_MANIFESTS, **headers})


MakePrivate = Callable[[RegistryDaemon, Callable[[HTTPExchange], None]], None]


@pytest.fixture
def make_private(network: HostileNetwork) -> MakePrivate:
    """Return a function that lets anybody pull OLD, and then alice pull NEW of the repository that is private now."""
    network.good.put(NAME, "1", OLD)

    def make_private(daemon: RegistryDaemon, fail: Callable[[HTTPExchange], None]) -> None:
        pull(daemon, OLD, "1", {})
        network.good.put(NAME, "1", NEW)
        network.good.put(NAME, "2", NEW)
        for method in ("GET", "HEAD"):
            network.good.add_rule(method, f"/v2/{NAME}/", respond_as_a_front(fail))
        pull(daemon, NEW, "2", {"Authorization": ALICE})
        pull(daemon, NEW, "1", {"Authorization": ALICE})

    return make_private


@pytest.mark.parametrize("settings", [{}, {"ENABLE_MANIFEST_CACHE": "true"}], ids=["", "with fresh tags"])
def test_new_content(make_private: MakePrivate, start_daemon: StartRegistryDaemon, settings: dict[str, str]) -> None:
    """All of it is in the cache, and the repository was public seconds ago."""
    daemon = start_daemon(**settings)
    make_private(daemon, close)
    for path in (*paths(NEW), f"/v2/{NAME}/manifests/2"):
        response = ask(daemon, path, {})
        assert response.status == 401, (path, response)
    for kind, headers in ATTACKERS.items():
        for path in (f"/v2/{NAME}/manifests/2", next(paths(NEW))):
            for method in ("GET", "HEAD"):
                response = ask(daemon, path, headers, method)
                assert response.status in (400, 401, 403, 502), (kind, path, response)


def test_new_content_in_an_outage(
    network: HostileNetwork, make_private: MakePrivate, start_daemon: StartRegistryDaemon
) -> None:
    daemon = start_daemon()
    make_private(daemon, close)
    network.good.stop()
    for kind, headers in ATTACKERS.items():
        for path in (*paths(NEW), f"/v2/{NAME}/manifests/2"):
            response = ask(daemon, path, headers)
            assert response.status in (400, 401, 502), (kind, path, response)
    for path in paths(OLD):  # which he has had
        assert ask(daemon, path, {}).cache_status in ("HIT", "STALE"), path
    stale_tag = ask(daemon, f"/v2/{NAME}/manifests/1", {})
    assert (stale_tag.cache_status, stale_tag.body) == ("STALE", OLD.manifest.data)
    alices = ask(daemon, f"/v2/{NAME}/manifests/1", {"Authorization": ALICE})
    assert (alices.cache_status, alices.body) == ("STALE", NEW.manifest.data)


@pytest.mark.parametrize("fail", [close, reset, send_garbage, send_500])
def test_outage_on_order(
    make_private: MakePrivate, start_daemon: StartRegistryDaemon, fail: Callable[[HTTPExchange], None]
) -> None:
    """Upstream fails on the attacker's fields only. He is refused even the tag as it was while it was public."""
    daemon = start_daemon()
    make_private(daemon, fail)
    for kind in ("an Accept of 20 KB", "an odd Accept", "a token of 20 KB"):
        for method in ("GET", "HEAD"):
            response = ask(daemon, f"/v2/{NAME}/manifests/1", ATTACKERS[kind], method)
            assert response.cache_status in (None, "PASS", "MISS"), (kind, method, response)
            assert response.status in (401, 502), (kind, method, response)


def test_bad_credential_changes_nothing_for_others(network: HostileNetwork, start_daemon: StartRegistryDaemon) -> None:
    """A refused login, in each form, neither ends what the public may read nor forgets a tag."""
    network.good.put(NAME, "1", OLD)
    daemon = start_daemon()
    pull(daemon, OLD, "1", {})
    for status in (401, 403, 404):
        network.good.reset_rules()
        for method in ("GET", "HEAD"):
            network.good.add_rule(method, f"/v2/{NAME}/", refuse_credentials(status))
        for kind in ("a wrong password", "a token of 20 KB"):
            for path in (*paths(OLD), f"/v2/{NAME}/manifests/1"):
                ask(daemon, path, ATTACKERS[kind])
        pull(daemon, OLD, "1", {})
    network.good.stop()
    pull(daemon, OLD, "1", {})


def refuse_credentials(status: int) -> ResponseBehaviour:
    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        if "authorization" in exchange.request.headers:
            respond_error(exchange, status, "UNAUTHORIZED")
        else:
            respond_normally(exchange, content)

    return respond
