"""The live view: differences once a second for all viewers of a process, and viewers that leave, or do not read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from dockerproxy.admin.api import API, ControlAPI, api_shares
from dockerproxy.admin.layer_places import LayerPlaces
from dockerproxy.admin.live import MAX_UNREAD, LiveFeed, difference
from dockerproxy.admin.ndjson import NDJSONResponse
from dockerproxy.admin.overview import Overview
from dockerproxy.admin.resolver import CACHED, StoreView
from dockerproxy.admin.viewer import LOCAL_VIEWERS, MAX_VIEWERS, Viewer, live_shares
from dockerproxy.cache.access import Access
from dockerproxy.cache.board import Board, BoardEntry
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.concurrency import FirstUse
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.errors import NameUnknown, RegistryError, ServiceOverloaded, Unauthorized
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Digest
from dockerproxy.registry.principal import Principal
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.records import Records
from tests.http.support.in_memory import InMemoryClient, InMemoryServer
from tests.store.support.images import image, put_image
from tests.store.support.reactor import SteppedReactor

NOW = 1_800_000_000.0
PUBLIC_NAME, SECRET_NAME = "ghcr.io/acme/open", "ghcr.io/acme/secret"


class World:
    """A process with a live feed. Requests with `X-Admin` are an administrator's."""

    def __init__(self, folder: Path) -> None:
        self.records = Records(folder / "records")
        self.board = Board.make(2)
        self.metrics = Metrics.make(2, ["ghcr.io"]).for_process(0)
        self.server = InMemoryServer(self.handle)
        self.clock: Clock = self.server.clock
        self.threads = SteppedReactor()
        self.store = StoreView(CACHED, Layout(folder))
        self.places = LayerPlaces(self.threads, self.store, self.records, self.clock.seconds)
        self.feed = LiveFeed(
            self.clock, self.board, self.board.for_process(0), self.metrics, self.records, self.places, self.usage,
            lambda: NOW, live_shares(),
        )  # fmt: skip
        self.live = FirstUse(self.threads, lambda: self.feed, loaded=self.feed)
        self.part = self.board.for_process(1)
        self.asked: list[str] = []
        self.viewer: Viewer | RegistryError | None = None  # of all requests from now on
        self.api = API(Overview(self.answer), self.live, self.viewer_of, api_shares())
        Access(self.records, lambda: NOW).record_grant(PUBLIC_NAME, PUBLIC, NOW - 5)

    async def usage(self) -> tuple[int, int]:
        return 10, 20

    async def answer(self, resource: str, viewer: Any, arguments: Any) -> dict[str, Any]:
        self.asked.append(resource)
        return {"document": {"resource": resource, "viewer": viewer, "arguments": dict(arguments)}}

    async def viewer_of(self, request: Request) -> Viewer:
        if isinstance(self.viewer, RegistryError):
            raise self.viewer
        if self.viewer is not None:
            return self.viewer
        if request.headers.get("x-refused"):
            raise Unauthorized("sign in")
        return Viewer.administrator() if request.headers.get("x-admin") else Viewer()

    async def handle(self, request: Request) -> None:
        await self.api.handle(request)

    def connect(self, *fields: str, path: str = "/api/v1/live", method: str = "GET", version: str = "1.1") -> View:
        client = self.server.client()
        client.send("\r\n".join([f"{method} {path} HTTP/{version}", "Host: proxy", *fields, "", ""]).encode())
        return View(client)

    def add(self, name: str, *, private: bool = False) -> BoardEntry:
        entry = self.part.add(name, Digest.of(name.encode()), 1000, private=private)
        assert entry is not None
        return entry


class View:
    """A viewer's connection."""

    def __init__(self, client: InMemoryClient) -> None:
        self.client = client

    @property
    def text(self) -> str:
        data: bytes = self.client.transport.value()
        return data.decode()

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = self.text.partition("\r\n\r\n")[2].splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    def is_open(self) -> bool:
        return not (self.client.transport.aborted or self.client.transport.disconnecting)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_viewer_gets_the_state_and_then_differences(world: World) -> None:
    entry = world.add(PUBLIC_NAME)
    view = world.connect()
    assert view.text.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream")
    [first] = view.events
    assert first["first"] is True and first["now"] == NOW
    assert [transfer["name"] for transfer in first["transfers"]] == [PUBLIC_NAME]
    entry.update(500, 1000, 24)
    world.clock.advance(1)
    second = view.events[-1]
    [transfer] = second["transfers"]
    assert transfer["done"] == 500 and transfer["readers"] == 24 and transfer["rate"] == 200
    assert "name" not in transfer and "first" not in second
    entry.remove()
    world.clock.advance(1)
    assert view.events[-1]["ended"] == [first["transfers"][0]["id"]]
    assert "completed" not in view.events[-1]
    complete = world.add(PUBLIC_NAME)
    world.clock.advance(1)
    complete.remove(is_complete=True)
    world.clock.advance(1)
    assert view.events[-1]["ended"] == view.events[-1]["completed"] != []
    count = len(view.events)
    for _ in range(10):
        world.clock.advance(1)
    assert len(view.events) == count  # nothing has changed
    for _ in range(10):
        world.clock.advance(1)
    assert ": nothing new\n\n" in view.text


def test_a_download_says_which_layer_it_is_as_soon_as_that_is_found(world: World) -> None:
    manifest = image(b"config", b"first", PUBLIC_NAME.encode())
    put_image(HostedTree.from_layout(world.store.layout), PUBLIC_NAME, manifest, "v1")
    world.records.put({"accept": {}}, "tag", PUBLIC_NAME, "v1")
    world.add(PUBLIC_NAME)
    view = world.connect()
    for _ in range(5):
        world.clock.advance(1)
    assert view.events[0]["transfers"][0]["layer"] is None
    assert len(world.threads.jobs) == 1  # it takes long, and nothing waits for it
    world.threads.run_one()
    world.clock.advance(1)
    [transfer] = view.events[-1]["transfers"]
    assert {key: transfer[key] for key in ("tag", "layer", "layers")} == {"tag": "v1", "layer": 2, "layers": 2}


def test_viewers_see_what_they_may(world: World) -> None:
    anonymous, admin = world.connect(), world.connect("X-Admin: 1")
    world.add(SECRET_NAME, private=True)
    world.add(PUBLIC_NAME)
    world.clock.advance(1)
    late = world.connect()
    world.clock.advance(1)
    assert "secret" in admin.text
    for view in (anonymous, late):
        assert "secret" not in view.text
        assert str(Digest.of(SECRET_NAME.encode())) not in view.text
        assert "a private image of ghcr.io" in view.text
        assert PUBLIC_NAME in view.text


@pytest.mark.parametrize("viewer", [
    Viewer(), Viewer("alice", reads_hosted=True), Unauthorized("sign in"), NameUnknown("PAGE=off"),
], ids=["signed out", "no administrator any more", "PAGE=users", "PAGE=off"])  # fmt: skip
def test_a_stream_ends_with_the_rights_of_its_viewer(world: World, viewer: Viewer | RegistryError) -> None:
    """A sign-out, another password, ADMIN_USERS and PAGE count for streams that are open, too."""
    view = world.connect("X-Admin: 1")
    world.clock.pump([1.0] * 2)
    world.viewer = viewer
    world.clock.pump([1.0] * 12)
    seen = len(view.text)
    assert view.text.endswith("0\r\n\r\n")
    world.add(SECRET_NAME, private=True)
    world.clock.pump([1.0] * 20)
    assert len(view.text) == seen
    assert world.feed.viewers.used == 0


@pytest.mark.parametrize("viewer", [
    Viewer.administrator(), Viewer.administrator("other"), ServiceOverloaded("busy"),
], ids=["same", "same sight", "nobody knows"])  # fmt: skip
def test_a_stream_goes_on_while_its_viewer_has_the_same_rights(world: World, viewer: Viewer | RegistryError) -> None:
    view = world.connect("X-Admin: 1")
    world.clock.pump([1.0] * 2)
    world.viewer = viewer
    world.clock.pump([1.0] * 30)
    world.add(SECRET_NAME, private=True)
    world.clock.pump([1.0] * 2)
    assert view.is_open()
    assert SECRET_NAME in view.text


def test_traffic_and_registries_are_in_the_events(world: World) -> None:
    view = world.connect()
    world.metrics.count_request("ghcr.io", "blob", "HIT", 200, 5000, 0.1)
    world.metrics.count_upstream("ghcr.io", "blob", "GET", 200, 0.1)
    world.metrics.count_received("ghcr.io", 1000)
    world.clock.advance(1)
    world.metrics.count_failure("ghcr.io", "timeout")
    world.clock.advance(1)
    states: dict[str, Any] = {}
    for event in view.events:
        states.update(event)
    assert states["registries"] == [{"name": "ghcr.io", "up": False}]
    assert view.events[1]["traffic"] == {"served": 5000, "downloaded": 1000}
    assert states["cache"] == {"bytes": 10, "limit": 20}


def test_all_viewers_of_a_process_share_one_sum(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    views = [world.connect() for _ in range(20)]
    sums = []
    rows = Board.rows
    monkeypatch.setattr(Board, "rows", lambda board: sums.append(1) or rows(board))
    world.clock.advance(1)
    assert len(sums) == 1
    for view in views:
        view.client.disconnect()
    for _ in range(5):
        world.clock.advance(1)
    assert len(sums) == 1
    assert not world.clock.getDelayedCalls()  # nobody looks: nothing runs


def test_a_viewer_that_does_not_read_is_dropped(world: World) -> None:
    stuck, other = world.connect(), world.connect()
    stuck.client.stop_reading()
    entries = [world.add(f"{PUBLIC_NAME}{'x' * 200}{number}") for number in range(100)]
    before = len(stuck.client.transport.value())
    for round_number in range(200):
        for entry in entries:
            entry.update(round_number, 1000, round_number)
        world.clock.advance(1)
        if not stuck.is_open():
            break
    assert stuck.client.transport.aborted
    assert len(stuck.client.transport.value()) - before <= MAX_UNREAD + 200
    assert other.is_open()
    world.clock.advance(1)
    assert world.feed.viewers.used == 1
    assert world.board.viewers == 1


def test_a_slow_viewer_that_reads_again_goes_on(world: World) -> None:
    view, entry = world.connect(), world.add(PUBLIC_NAME)
    for round_number in range(5):
        view.client.stop_reading()
        entry.update(round_number, 1000, 1)
        world.clock.advance(1)
        view.client.resume_reading()
        entry.update(round_number + 500, 1000, 1)
        world.clock.advance(1)
    assert view.is_open()
    assert view.events[-1]["transfers"][0]["done"] == 504


def test_one_client_has_a_share(world: World) -> None:
    views = [world.connect() for _ in range(60)]
    open_views = [view for view in views if view.text.startswith("HTTP/1.1 200")]
    assert len(open_views) == 50
    assert views[-1].text.startswith("HTTP/1.1 429")
    assert "Retry-After: 10" in views[-1].text and "live views of the page" in views[-1].text
    open_views[0].client.disconnect()
    assert world.connect().text.startswith("HTTP/1.1 200")


def test_a_hundred_viewers_of_all_processes_at_most(world: World) -> None:
    world.part.set_viewers(MAX_VIEWERS - 1)  # those of another process
    assert world.connect().text.startswith("HTTP/1.1 200")
    refused = world.connect()
    assert refused.text.startswith("HTTP/1.1 503")
    assert "Retry-After: 10" in refused.text and "/api/v1/overview" in refused.text
    world.board.for_process(1)  # it exits
    assert world.connect().text.startswith("HTTP/1.1 200")


def test_a_hundred_viewers_cost_little(world: World) -> None:
    world.feed.viewers.share = MAX_VIEWERS
    views = [world.connect(*(["X-Admin: 1"] if number % 2 else [])) for number in range(MAX_VIEWERS)]
    assert all(view.text.startswith("HTTP/1.1 200") for view in views)
    entries = [world.add(f"ghcr.io/acme/app{number}") for number in range(20)]
    world.clock.advance(1)
    started, seconds = time.process_time(), 20
    for second in range(seconds):
        for entry in entries:
            entry.update(second * 40, 1000, second)
        world.clock.advance(1)
    per_second = (time.process_time() - started) / seconds
    assert len(views[-1].events) >= seconds
    assert per_second < 0.03  # of a core; usually 0.002


def test_the_control_socket_has_the_same_events_as_lines(world: World) -> None:
    async def handle(request: Request) -> None:
        control = ControlAPI(Overview(world.answer), world.live)
        handler = control.handlers["GET", request.path]
        await handler(request, NDJSONResponse(request), Principal("root", "the control socket", None))

    world.server.site.handler = handle
    world.add(SECRET_NAME, private=True)
    client = world.server.client()
    client.send(b"GET /v1/live HTTP/1.1\r\nHost: x\r\n\r\n")
    line = View(client).text.partition("\r\n\r\n")[2].splitlines()[1]
    assert [transfer["name"] for transfer in json.loads(line)["transfers"]] == [SECRET_NAME]
    other = world.server.client()
    other.send(b"GET /v1/images?q=a HTTP/1.1\r\nHost: x\r\n\r\n")
    [response] = other.responses
    assert json.loads(response.body)["viewer"] == ["root", True, True]


def test_visitors_of_the_page_leave_room_for_the_command(world: World) -> None:
    """Two of them may have all live views that there are."""
    world.feed.viewers.share = MAX_VIEWERS
    for _ in range(MAX_VIEWERS):
        assert world.connect().text.startswith("HTTP/1.1 200")
    assert world.connect().text.startswith("HTTP/1.1 503")

    async def handle(request: Request) -> None:
        await world.feed.send_lines(request, Viewer.administrator())

    world.server.site.handler = handle
    commands = [world.connect() for _ in range(LOCAL_VIEWERS)]
    assert all(view.text.startswith("HTTP/1.1 200") for view in commands)
    assert world.connect().text.startswith("HTTP/1.1 5")
    commands[0].client.disconnect()
    assert world.connect().text.startswith("HTTP/1.1 200")


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("fields", [[], ["Connection: close"]], ids=["keep-alive", "close"])
def test_a_stream_ends_when_the_server_drains(world: World, version: str, fields: list[str]) -> None:
    view = world.connect(*fields, version=version)
    world.clock.advance(3)
    assert view.is_open()
    drained = world.server.site.drain()
    world.clock.advance(1)
    assert view.client.closed_cleanly
    view.client.disconnect()
    assert drained.called


def test_head_has_no_body(world: World) -> None:
    view = world.connect(method="HEAD")
    assert view.text.startswith("HTTP/1.1 200") and view.text.endswith("\r\n\r\n")
    assert world.feed.viewers.used == 0


def test_an_error_of_a_sum_does_not_end_the_stream(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    view = world.connect()
    with monkeypatch.context() as patch:
        patch.setattr(Board, "rows", lambda board: 1 / 0)
        world.clock.advance(1)
    world.add(PUBLIC_NAME)
    world.clock.advance(1)
    assert view.events[-1]["transfers"][0]["name"] == PUBLIC_NAME


# the other documents


def test_documents_are_those_of_the_main_process(world: World) -> None:
    view = world.connect(path="/api/v1/images?q=a%20b&page=2")
    [response] = view.client.responses
    assert json.loads(response.body) == {
        "resource": "images", "viewer": [None, False, False], "arguments": {"q": "a b", "page": "2"},
    }  # fmt: skip
    assert response.fields["Cache-Control"] == "no-store"


@pytest.mark.parametrize("query", ["q=%zz", "q=%ff", "q=1&q=2", "q=" + "x" * 10_000], ids=range(4))
def test_a_broken_query_is_a_400_in_json(world: World, query: str) -> None:
    [response] = world.connect(path=f"/api/v1/images?{query}").client.responses
    assert response.status == 400
    assert set(json.loads(response.body)["error"]) == {"code", "message"}
    assert world.asked == []


def test_whom_the_page_refuses_gets_nothing(world: World) -> None:
    for path in ("live", "overview"):
        [response] = world.connect("X-Refused: 1", path=f"/api/v1/{path}").client.responses
        assert response.status == 401
    assert world.asked == [] and world.feed.viewers.used == 0


def test_an_error_of_the_main_process_is_passed_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_: Any) -> dict[str, Any]:
        raise NameUnknown("there is no such thing")

    monkeypatch.setattr(world, "api", API(Overview(unknown), world.live, world.viewer_of, api_shares()))
    [response] = world.connect(path="/api/v1/nothing").client.responses
    assert response.status == 404
    assert json.loads(response.body)["error"]["message"] == "there is no such thing"


# differences

TRANSFERS = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4)


def as_state(transfers: dict[str, tuple[int, int]], up: bool, served: int) -> dict[str, Any]:
    return {
        "transfers": [{"id": name, "done": done, "readers": readers} for name, (done, readers) in transfers.items()],
        "registries": [{"name": "ghcr.io", "up": up}],
        "traffic": {"served": served},
        "cache": {},
    }


@given(st.lists(st.tuples(TRANSFERS, st.booleans(), st.integers(0, 2)), min_size=1, max_size=6))
def test_a_viewer_that_applies_all_differences_has_the_state(states: list[Any]) -> None:
    shown: dict[str, dict[str, Any]] = {}
    rest: dict[str, Any] = {}
    old = None
    for arguments in states:
        new = as_state(*arguments)
        event = difference(old, new)
        for transfer in event.get("transfers", []):
            shown[transfer["id"]] = {**shown.get(transfer["id"], {}), **transfer}
        for identifier in event.get("ended", []):
            del shown[identifier]
        rest.update({name: event[name] for name in ("registries", "traffic", "cache") if name in event})
        assert sorted(shown.values(), key=_id) == sorted(new["transfers"], key=_id)
        assert rest == {name: new[name] for name in ("registries", "traffic", "cache")}
        assert difference(new, new) == {}
        old = new


def _id(transfer: dict[str, Any]) -> str:
    return str(transfer["id"])
