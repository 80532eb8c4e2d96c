"""The documents of the overview, and the names that a viewer without a login cannot find out by any of them."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from attrs import define, fields
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.admin import images, layer_places
from dockerproxy.admin.local_overview import LocalOverview
from dockerproxy.admin.overview import Overview, OverviewError, OverviewSources
from dockerproxy.admin.repository_view import everybody_sees
from dockerproxy.admin.resolver import CACHED, HOSTED, StoreView
from dockerproxy.admin.summary import Figures, RepositorySummary, Summaries, SummaryQuery
from dockerproxy.admin.viewer import Viewer, label_of
from dockerproxy.cache.access import Access, public_may_read
from dockerproxy.cache.board import Board
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.daemon.history import History
from dockerproxy.daemon.metrics import Metrics
from dockerproxy.errors import BadRequest, NameUnknown, RegistryError, ServiceOverloaded
from dockerproxy.oci.names import Digest
from dockerproxy.store.daily_pulls import PullSums
from dockerproxy.store.disk_access import LocalDisk
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links, Visibility
from dockerproxy.store.records import Records
from tests.store.support.images import ManifestTree, image, index, put_image
from tests.store.support.reactor import SteppedReactor

T = TypeVar("T")

HUB = "registry-1.docker.io"
ADMIN, ANONYMOUS, USER = Viewer.administrator("root"), Viewer(), Viewer("alice", reads_hosted=True)
GUEST = Viewer(reads_hosted=True)
SECRET = "secretproject"
DOCUMENTS = ["overview", "registries", "traffic", "transfers", "budget", "images", "status"]


def platform_image(architecture: str, *layers: bytes) -> ManifestTree:
    return image(json.dumps({"os": "linux", "architecture": architecture}).encode(), *layers)


async def _no_notices(viewer: Viewer) -> Sequence[dict[str, Any]]:
    return ()


@define
class ScriptedSources:
    """The contributions of the other parts of the daemon, which a test may change."""

    status: Callable[[], Awaitable[dict[str, Any]]]
    budget: Callable[[], Awaitable[dict[str, Any]]]
    fleet: Callable[[], Mapping[str, str]] = dict
    idle_age: Callable[[], float | None] = lambda: None
    notices: Callable[[Viewer], Awaitable[Sequence[dict[str, Any]]]] = _no_notices
    problems: Callable[[], Mapping[str, str]] = dict
    pinned: Callable[[str], Collection[str]] = lambda key: ()

    def build(self) -> OverviewSources:
        """Return sources that are as this object says whenever they are asked."""
        names = [attribute.name for attribute in fields(OverviewSources)]
        return OverviewSources(**{name: partial(self._ask, name) for name in names})

    def _ask(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments)


class World:
    """Both stores in `folder`, and the overview of a daemon that has them."""

    def __init__(self, folder: Path) -> None:
        self.reactor = SteppedReactor()
        self.cache = HostedTree.from_layout(Layout(folder / "cache"))
        self.hosted = HostedTree.from_layout(Layout(folder / "registry"))
        self.records = Records(folder / "cache" / "records")
        self.access = Access(self.records, time.time)
        self.metrics = Metrics.make(2, ["docker.io", "ghcr.io"]).for_process(0)
        self.board = Board.make(2)
        self.history = History(str(folder / "history"), self.metrics, time.time)
        stores = [StoreView(CACHED, self.cache.layout), StoreView(HOSTED, self.hosted.layout)]
        disk = LocalDisk(self.reactor)
        self.sources = ScriptedSources(self._status, self._budget)
        self.load_pulls = PullSums
        self.summaries = Summaries(
            self.reactor, stores, disk, self.records, lambda: self.load_pulls(), lambda key: self.sources.pinned(key)
        )
        self.local = LocalOverview(
            self.reactor, self.metrics, self.board, self.history, self.summaries, stores, self.records, disk,
            self._usage, time.time, self.sources.build(), version="1.2.3", started=time.time(), workers=2,
        )  # fmt: skip
        self.overview = Overview(self.local.answer)

    async def _usage(self) -> tuple[int, int]:
        return 212, 256

    async def _budget(self) -> dict[str, Any]:
        limit = {
            "limit": 100,
            "remaining": 34,
            "refused_until": 0.0,
            "source": "203.0.113.7",
            "top": [SECRET],
            "new_field": SECRET,
        }
        return {"limits": [{"registry": name, **limit} for name in ("docker.io", f"{SECRET}.example")]}

    async def _status(self) -> dict[str, Any]:
        return {"operation": SECRET, "version": "1.2.3"}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.reactor.run(work)

    def get(self, resource: str, viewer: Viewer = ADMIN, **arguments: str) -> dict[str, Any]:
        return self.run(self.overview.get(resource, viewer, arguments))

    def put_cached(self, name: str, manifest: ManifestTree, *tags: str, public: bool = True) -> None:
        """Store an image of `name`, with a host, as a pull without a credential does, or one with a login."""
        put_image(self.cache, name, manifest, *tags)
        if public:
            self.access.record_grant(name, PUBLIC, time.time() - 5)
        else:
            self.make_private(name, manifest)
            self.access.record_grant(name, "own:1234", time.time() - 5)
        for tag in tags:
            self.note_tag(name, tag, manifest, public=public)

    def note_tag(self, name: str, tag: str, manifest: ManifestTree, *, public: bool) -> None:
        entry = {"digest": str(manifest.digest), "type": manifest.media_type, "checked": 1_750_000_000.0}
        known = dict(self.records.get("tag", name, tag) or {})
        self.records.put({**known, ("" if public else "private ") + "accept": entry}, "tag", name, tag)

    def make_private(self, name: str, manifest: ManifestTree) -> None:
        for part in manifest.walk():
            self.cache.links.unlink_manifest(name, part.digest)
            self.cache.links.link_manifest(name, part.digest, part.media_type, Visibility.PRIVATE)

    def walk(self) -> None:
        self.run(self.local.renew())

    def set_rows(self, rows: list[RepositorySummary]) -> None:
        """Make a walk have found these cached repositories, and none follow."""
        self.summaries._rows[CACHED] = {row.key: row for row in rows}
        self.local._next_renewal = math.inf

    def names(self, viewer: Viewer = ADMIN, **arguments: str) -> list[str]:
        return [row["name"] for row in self.get("images", viewer, **arguments)["images"]]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


NGINX = platform_image("amd64", b"nginx")
PRIVATE = platform_image("arm64", b"private")


def fill(world: World) -> None:
    """Put a public, a private and a hosted image into the stores, with a download of each kind."""
    world.put_cached(f"{HUB}/library/nginx", NGINX, "1.29")
    world.put_cached(f"ghcr.io/{SECRET}/app", PRIVATE, SECRET, public=False)
    put_image(world.hosted, "platform/base", platform_image("amd64", b"hosted"), "v1")
    part = world.board.for_process(1)
    part.add(f"{HUB}/library/nginx", Digest.of(b"nginx layer"), 10, private=False)
    part.add(f"ghcr.io/{SECRET}/app", Digest.of(b"private layer"), 10, private=True)
    part.add(f"{SECRET}.example/team/app", Digest.of(b"wildcard layer"), 10, private=True)
    world.metrics.count_request("docker.io", "blob", "HIT", 200, 1000, 0.1)
    world.history.sample()
    world.walk()


# viewers


def test_an_anonymous_viewer_finds_no_private_name_in_any_document(world: World) -> None:
    fill(world)
    hidden = [SECRET, "203.0.113.7", str(PRIVATE.digest), str(Digest.of(b"private layer")), "platform/base"]
    for resource in DOCUMENTS:
        text = json.dumps(world.get(resource, ANONYMOUS))
        assert not [name for name in hidden if name in text], resource
    for name in (f"ghcr.io/{SECRET}/app", "platform/base"):
        for resource in ("image", "manifest"):
            with pytest.raises(RegistryError) as denied:
                world.get(resource, ANONYMOUS, name=name, digest=str(PRIVATE.digest))
            with pytest.raises(RegistryError) as unknown:
                world.get(resource, ANONYMOUS, name="x" * len(name), digest=str(PRIVATE.digest))
            assert denied.value.message.replace(name, "") == unknown.value.message.replace("x" * len(name), "")
            assert (denied.value.status, denied.value.code) == (unknown.value.status, unknown.value.code)
    assert world.get("images", ANONYMOUS, q=SECRET)["count"] == 0
    assert world.get("overview", ANONYMOUS)["repositories"]["count"] == 1


def test_a_private_repository_costs_what_a_missing_one_costs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a 404 would tell which names exist: nothing depends on that but the answer."""
    fill(world)
    asked: list[tuple[str, ...]] = []
    get = Records.get

    def note(records: Records, *key: str) -> Any:
        asked.append(key)
        return get(records, *key)

    monkeypatch.setattr(Records, "get", note)
    costs = []
    for name in (f"ghcr.io/{SECRET}/app", "ghcr.io/no/such", "docker.io/no/such", "x" * 5000):
        asked.clear()
        with pytest.raises(RegistryError):
            world.get("image", ANONYMOUS, name=name)
        costs.append([key[0] for key in asked])
    assert costs[0] == costs[1] == costs[2]
    assert costs[3] == []  # no repository has that name


def test_a_name_is_found_without_a_look_at_all_repositories(world: World) -> None:
    class Rows(dict[str, RepositorySummary]):
        def values(self) -> Any:
            raise AssertionError("every repository is looked at")

    fill(world)
    world.local._next_renewal = math.inf
    world.summaries._rows = {kind: Rows(rows) for kind, rows in world.summaries._rows.items()}
    names = ("docker.io/library/nginx", f"{HUB}/library/nginx", f"ghcr.io/{SECRET}/app", "platform/base")
    for name in names:
        assert world.get("image", name=name)["image"]["name"] == name.replace(HUB, "docker.io")
    with pytest.raises(RegistryError):
        world.get("image", name="no/such")


def test_an_administrator_sees_everything(world: World) -> None:
    fill(world)
    assert set(world.names()) == {"docker.io/library/nginx", f"ghcr.io/{SECRET}/app", "platform/base"}
    rows = {row["name"]: row for row in world.get("images")["images"]}
    assert rows[f"ghcr.io/{SECRET}/app"]["private"] is True
    assert rows["docker.io/library/nginx"]["private"] is False
    assert world.get("image", name=f"ghcr.io/{SECRET}/app")["tags"][0]["tag"] == SECRET
    assert {transfer["repository"] for transfer in world.get("transfers")["transfers"]} == {
        "docker.io/library/nginx", f"ghcr.io/{SECRET}/app", f"{SECRET}.example/team/app",
    }  # fmt: skip
    assert world.get("status")["operation"] == SECRET
    assert len(world.get("budget")["limits"]) == 2


@pytest.mark.parametrize("viewer", [USER, GUEST], ids=["user", "no login needed to read"])
def test_hosted_repositories_are_seen_by_those_that_may_read_them(world: World, viewer: Viewer) -> None:
    fill(world)
    assert set(world.names(viewer)) == {"docker.io/library/nginx", "platform/base"}
    assert world.get("image", viewer, name="platform/base")["tags"][0]["platforms"] == ["linux/amd64"]
    assert SECRET not in json.dumps([world.get(resource, viewer) for resource in DOCUMENTS])


def test_a_download_of_a_private_image_has_no_name(world: World) -> None:
    fill(world)
    transfers = world.get("transfers", ANONYMOUS)["transfers"]
    assert {transfer["name"] for transfer in transfers} == {
        "docker.io/library/nginx", "a private image of ghcr.io", "a private image of another registry",
    }  # fmt: skip
    assert {transfer["digest"] for transfer in transfers} == {str(Digest.of(b"nginx layer")), None}


def test_a_private_blob_of_a_public_repository_is_a_private_image(world: World) -> None:
    fill(world)
    world.board.for_process(1).clear()
    part = world.board.for_process(0)
    part.add(f"{HUB}/library/nginx", Digest.of(b"embargoed"), 10, private=True)
    [shown] = world.get("transfers", ANONYMOUS)["transfers"]
    assert (shown["name"], shown["digest"], shown["private"]) == ("a private image of docker.io", None, True)
    [shown] = world.get("transfers")["transfers"]
    assert (shown["name"], shown["digest"]) == ("docker.io/library/nginx", str(Digest.of(b"embargoed")))
    # A client with a login downloads a part of an image that everybody may read.
    part.clear()
    part.add(f"{HUB}/library/nginx", Digest.of(b"nginx"), 10, private=True)
    [shown] = world.get("transfers", ANONYMOUS)["transfers"]
    assert (shown["name"], shown["layer"], shown["private"]) == ("docker.io/library/nginx", 1, False)


def test_clients_of_a_private_image_are_not_counted_with_those_of_a_public_one(world: World) -> None:
    """Both download the same blob of one registry."""
    fill(world)
    world.board.for_process(1).clear()
    for number, (name, private) in enumerate([("library/nginx", False), (f"{SECRET}/app", True)]):
        entry = world.board.for_process(number).add(f"{HUB}/{name}", Digest.of(b"base"), 100, private=private)
        assert entry is not None
        entry.update(40, 100, 3)
    assert [row["readers"] for row in world.get("transfers", ANONYMOUS)["transfers"]] == [3]
    assert [row["readers"] for row in world.get("transfers")["transfers"]] == [6]


def test_a_repository_that_became_private_disappears_before_the_next_walk(world: World) -> None:
    fill(world)
    assert world.names(ANONYMOUS) == ["docker.io/library/nginx"]
    world.access.record_denial(f"{HUB}/library/nginx", PUBLIC)
    assert world.names(ANONYMOUS) == []
    with pytest.raises(RegistryError):
        world.get("image", ANONYMOUS, name="docker.io/library/nginx")
    assert "nginx" not in json.dumps(world.get("transfers", ANONYMOUS))


def test_a_repository_that_became_private_is_not_counted(world: World) -> None:
    """Neither by a search that shows another page."""
    fill(world)
    for number in range(3):
        world.put_cached(f"{HUB}/team/app{number}", platform_image("amd64", b"app %d" % number), "1")
    world.walk()
    before = world.get("images", ANONYMOUS, q="team", sort="name", per_page="1")
    world.access.record_denial(f"{HUB}/team/app2", "own:1234")  # of somebody else
    assert world.get("images", ANONYMOUS, q="team", sort="name", per_page="1")["count"] == before["count"] == 3
    world.access.record_denial(f"{HUB}/team/app2", PUBLIC)
    after = world.get("images", ANONYMOUS, q="team", sort="name", per_page="1")
    assert (after["count"], after["bytes"] < before["bytes"]) == (2, True)
    assert world.get("overview", ANONYMOUS)["repositories"]["count"] == 3
    assert world.get("images", q="team")["count"] == 3
    world.access.record_grant(f"{HUB}/team/app2", PUBLIC, time.time() + 1)
    world.walk()
    assert world.get("images", ANONYMOUS, q="team")["count"] == 3


def test_a_repository_that_became_private_during_a_walk_is_not_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk has read it before, and a search has looked at the denial since."""
    fill(world)

    denied: list[str] = []

    def read_and_deny(records: Records, key: str) -> bool:
        is_public = public_may_read(records, key)
        if is_public and not denied:
            denied.append(key)
            world.access.record_denial(key, PUBLIC)
            world.summaries._search(ANONYMOUS, SummaryQuery())
        return is_public

    monkeypatch.setattr("dockerproxy.admin.summary.public_may_read", read_and_deny)
    world.walk()
    monkeypatch.undo()
    assert world.get("images", ANONYMOUS)["count"] == 0


def put_private_things(world: World) -> None:
    """Add content that only clients with a login may read, most of it to public repositories."""
    app, probe = f"{HUB}/acme/app", "ghcr.io/prober/app"
    new, child = platform_image("arm64", b"new layer"), platform_image("riscv64", b"child layer")
    for tag, manifest in (("new", new), ("listed", index(child))):
        put_image(world.cache, app, manifest, tag)
        world.make_private(app, manifest)
        world.note_tag(app, tag, manifest, public=False)
    for blob in (*new.blobs, *child.blobs, b"new layer", b"child layer"):
        world.cache.links.unlink_layer(app, Digest.of(blob))
        world.cache.links.link_layer(app, Digest.of(blob), Visibility.PRIVATE)
    old = world.cache.links.tag(app, "old")
    assert old is not None
    world.cache.links.set_tag(app, "codename", old)
    world.note_tag(app, "codename", PROBED, public=False)
    # The content that the prober names is here, but only in other repositories, or in its own for others.
    world.put_cached(f"ghcr.io/{SECRET}/app", PROBED, "v1", public=False)
    world.cache.links.link_layer(probe, Digest.of(b"probed layer"), Visibility.PRIVATE)


PROBED = platform_image("s390x", b"probed layer")


def put_public_things(world: World) -> None:
    world.put_cached(f"{HUB}/library/nginx", NGINX, "1.29")
    world.put_cached(f"{HUB}/acme/app", platform_image("amd64", b"old layer, the longest of all"), "old")
    # A manifest that names the content of others, which this repository does not have.
    world.put_cached("ghcr.io/prober/app", PROBED, "v1")
    for blob in (*PROBED.blobs, b"probed layer"):
        world.cache.links.unlink_layer("ghcr.io/prober/app", Digest.of(blob))
        world.cache.blobs.remove(Digest.of(blob))


def documents(world: World, viewer: Viewer) -> dict[str, Any]:
    """Return every document about images that the viewer can ask for."""
    found: dict[str, Any] = {"repositories": world.get("overview", viewer)["repositories"]}
    for sort in ("name", "size", "used", "pulls"):
        for where in ("", "cached", "pinned"):
            found[f"images {sort} {where}"] = world.get("images", viewer, sort=sort, where=where)
    for name in ("docker.io/library/nginx", "docker.io/acme/app", "ghcr.io/prober/app"):
        found[name] = world.get("image", viewer, name=name)
        for tag in found[name]["tags"]:
            found[f"{name}:{tag['tag']}"] = world.get("manifest", viewer, name=name, digest=tag["digest"])
    return found


def test_private_content_changes_no_figure_of_a_viewer_that_may_not_read_it(tmp_path: Path) -> None:
    """Two worlds, one of which has private content, look the same."""
    found = []
    for has_private in (False, True):
        world = World(tmp_path / str(has_private))
        put_public_things(world)
        public = {entry.key for entry in world.cache.blobs.walk()}
        if has_private:
            put_private_things(world)
        for entry in world.cache.blobs.walk():
            moment = 1_760_000_000.0 + 1000 * (entry.key not in public)
            os.utime(world.cache.layout.blob(entry.key), (moment, moment))
        pulls = {"docker.io/library/nginx": 5, "docker.io/acme/app": 3}
        total = {name: number + 10 * has_private * ("acme" in name) for name, number in pulls.items()}
        world.load_pulls = lambda total=total, pulls=pulls: PullSums(total, pulls)  # type: ignore[misc]
        pinned = {f"{HUB}/library/nginx": ["1.29"], f"{HUB}/acme/app": ["new"] if has_private else []}
        world.sources.pinned = lambda key, pinned=pinned: pinned.get(key, [])  # type: ignore[misc]
        world.walk()
        world.walk()  # an unchanged repository gets the times of its last use
        found.append((documents(world, ANONYMOUS), documents(world, ADMIN)))
    assert found[0][0] == found[1][0]
    assert all(found[0][1][name] != found[1][1][name] for name in ("docker.io/acme/app", "ghcr.io/prober/app:v1"))
    assert found[0][0]["docker.io/acme/app"]["image"]["size"] > 30


def test_figures_of_content_that_became_public_follow_within_a_minute(world: World) -> None:
    name, new = f"{HUB}/acme/app", platform_image("arm64", b"new")
    world.put_cached(name, platform_image("amd64", b"old"), "old")
    put_image(world.cache, name, new, "new")
    world.make_private(name, new)
    world.note_tag(name, "new", new, public=False)
    world.walk()
    assert world.get("images", ANONYMOUS)["images"][0]["platforms"] == ["linux/amd64"]
    world.cache.links.link_manifest(name, new.digest, new.media_type)
    world.note_tag(name, "new", new, public=True)
    world.summaries._rows[CACHED][name].read_at -= 61
    world.walk()
    [row] = world.get("images", ANONYMOUS)["images"]
    assert (row["platforms"], row["tags"]) == (["linux/amd64", "linux/arm64"], 2)


def test_a_public_repository_of_which_only_private_content_is_here_is_not_listed(world: World) -> None:
    new = platform_image("arm64", b"new")
    world.put_cached(f"{HUB}/acme/app", new, "new", public=False)
    for blob in (*new.blobs, b"new"):
        world.cache.links.unlink_layer(f"{HUB}/acme/app", Digest.of(blob))
        world.cache.links.link_layer(f"{HUB}/acme/app", Digest.of(blob), Visibility.PRIVATE)
    world.access.record_grant(f"{HUB}/acme/app", PUBLIC, time.time() - 5)
    world.walk()
    assert (world.names(ANONYMOUS), world.names(ADMIN)) == ([], ["docker.io/acme/app"])
    assert world.get("overview", ANONYMOUS)["repositories"]["count"] == 0
    with pytest.raises(RegistryError):
        world.get("image", ANONYMOUS, name="docker.io/acme/app")


@pytest.mark.parametrize(
    ("name", "reference", "expected"),
    [
        ("docker.io/acme/app", "old", True),
        ("docker.io/acme/app", str(NGINX.digest), True),
        ("docker.io/acme/app", "new", False),
        ("docker.io/acme/app", str(PRIVATE.digest), False),
        ("docker.io/acme/app", "missing", False),
        ("docker.io/acme/app", "sha256:x", False),
        ("docker.io/acme/app", "../..", False),
        ("docker.io/no/such", "old", False),
        ("no name", "old", False),
    ],
)
def test_a_pull_is_public_if_upstream_sent_its_image_to_everybody(
    world: World, name: str, reference: str, expected: bool
) -> None:
    world.put_cached(f"{HUB}/acme/app", NGINX, "old")
    put_image(world.cache, f"{HUB}/acme/app", PRIVATE, "new")
    world.make_private(f"{HUB}/acme/app", PRIVATE)
    world.note_tag(f"{HUB}/acme/app", "new", PRIVATE, public=False)
    store = StoreView(CACHED, world.cache.layout)
    assert everybody_sees(store, world.records, name, reference) is expected


def test_private_contents_of_a_public_repository_are_not_shown(world: World) -> None:
    """A repository that was public once: upstream has sent one tag to everybody, others to a login only."""
    name = f"{HUB}/acme/app"
    old, new = platform_image("amd64", b"old"), platform_image("amd64", b"new")
    world.put_cached(name, old, "old")
    put_image(world.cache, name, new, "new")
    world.make_private(name, new)
    world.note_tag(name, "new", new, public=False)
    world.cache.links.set_tag(name, "codename", old.digest)  # known content, by a name that only a login saw
    world.note_tag(name, "codename", old, public=False)
    world.walk()
    shown = "docker.io/acme/app"
    assert {tag["tag"] for tag in world.get("image", name=shown)["tags"]} == {"old", "new", "codename"}
    assert [tag["tag"] for tag in world.get("image", ANONYMOUS, name=shown)["tags"]] == ["old"]
    assert world.get("image", ANONYMOUS, name=shown)["count"] == 1
    assert world.get("manifest", ANONYMOUS, name=shown, digest=str(old.digest))["layers"]
    with pytest.raises(RegistryError):
        world.get("manifest", ANONYMOUS, name=shown, digest=str(new.digest))


def test_the_viewer_survives_the_way_to_the_main_process() -> None:
    for viewer in (ADMIN, ANONYMOUS, USER, GUEST):
        assert Viewer.parse(json.loads(json.dumps(viewer.values()))) == viewer
    assert not Viewer.parse([None, 1, "yes"]).is_admin  # only true is


@pytest.mark.parametrize(
    ("repository", "label"),
    [
        (f"{HUB}/library/nginx", "docker.io"),
        ("ghcr.io/a/b", "ghcr.io"),
        ("unlisted.example/a", "another registry"),
        ("", "another registry"),
        ("[bad/a", "another registry"),
    ],
)
def test_labels_are_those_that_settings_name(repository: str, label: str) -> None:
    assert label_of(repository, {"docker.io", "ghcr.io"}) == label


# the documents


def test_the_overview_has_sums_registries_and_downloads(world: World) -> None:
    fill(world)
    world.metrics.count_received("docker.io", 300)
    world.metrics.count_failure("ghcr.io", "timeout")
    world.history.sample()
    world.sources.problems = lambda: {"ghcr.io": "no answer since noon"}

    async def notices(viewer: Viewer) -> list[dict[str, Any]]:
        return [
            {"level": "bad", "registry": "ghcr.io", "text": "no answer since noon"},
            {"level": "bad", "registry": f"{SECRET}.example", "text": "no answer"},
        ]

    world.sources.notices = notices
    world.sources.idle_age = lambda: 41 * 86400.0
    overview = world.get("overview")
    assert overview["day"]["served"] == 1000
    assert overview["day"]["saved"] == 700
    assert overview["day"]["ratio"] == 0.7
    assert overview["total"]["since"] is not None
    assert overview["cache"] == {"bytes": 212, "limit": 256, "idle_age": 41 * 86400.0}
    rows = {row["name"]: row for row in overview["registries"]}
    assert next(iter(rows)) == "docker.io"
    assert rows["docker.io"]["budget"]["remaining"] == 34
    assert sum(rows["docker.io"]["sparkline"]) == 1000
    assert rows["ghcr.io"]["up"] is False
    assert rows["ghcr.io"]["errors"] == 1
    assert rows["hosted"]["kind"] == HOSTED
    assert rows["ghcr.io"]["problem"] == "no answer since noon"
    assert [notice["text"] for notice in overview["notices"]] == ["no answer since noon", "no answer"]
    assert [notice["registry"] for notice in world.get("overview", ANONYMOUS)["notices"]] == ["ghcr.io"]
    assert world.get("registry", name="docker.io")["series"]["served"][-1] == 1000


def test_two_processes_that_read_one_file_are_one_download(world: World) -> None:
    for number, readers in ((0, 3), (1, 4)):
        entry = world.board.for_process(number).add("ghcr.io/a/b", Digest.of(b"x"), 100, private=False)
        assert entry is not None
        entry.update(40 + number, 100, readers)
    [transfer] = world.get("transfers")["transfers"]
    assert (transfer["done"], transfer["readers"], transfer["size"]) == (41, 7, 100)


def test_the_parts_of_an_image(world: World) -> None:
    arm, amd = platform_image("arm64", b"arm layer"), platform_image("amd64", b"amd layer")
    both = index(arm, amd)
    document = json.loads(both.data)
    for entry, name in zip(document["manifests"], ("arm64", "amd64"), strict=True):
        entry["platform"] = {"os": "linux", "architecture": name}
    both = ManifestTree(both.media_type, json.dumps(document).encode(), (), (arm, amd))
    world.put_cached("ghcr.io/a/b", both, "v1")
    world.cache.blobs.remove(amd.digest)
    world.cache.blobs.remove(Digest.of(b"arm layer"))
    world.walk()
    [tag] = world.get("image", ANONYMOUS, name="ghcr.io/a/b")["tags"]
    assert tag["platforms"] == ["linux/arm64"]
    assert tag["checked"] == 1_750_000_000.0
    manifest = world.get("manifest", ANONYMOUS, name="ghcr.io/a/b", digest=str(both.digest))
    assert [(part["platform"], part["present"]) for part in manifest["platforms"]] == [
        ("linux/arm64", True), ("linux/amd64", False),
    ]  # fmt: skip
    [layer] = world.get("manifest", name="ghcr.io/a/b", digest=str(arm.digest))["layers"]
    assert layer == {"digest": str(Digest.of(b"arm layer")), "size": len(b"arm layer"), "present": False}


def test_a_blob_of_another_repository_is_not_told(world: World) -> None:
    """A manifest may name any digest. Its viewer does not learn whether another repository has that blob."""
    world.put_cached(f"ghcr.io/{SECRET}/app", platform_image("amd64", b"their layer"), "v1", public=False)
    world.put_cached("ghcr.io/prober/app", platform_image("amd64", b"their layer"), "v1")
    world.cache.links.unlink_layer("ghcr.io/prober/app", Digest.of(b"their layer"))
    world.walk()
    [tag] = world.get("image", ANONYMOUS, name="ghcr.io/prober/app")["tags"]
    [layer] = world.get("manifest", ANONYMOUS, name="ghcr.io/prober/app", digest=tag["digest"])["layers"]
    assert layer["present"] is False


def test_a_manifest_that_takes_long_to_parse_is_not_parsed(world: World) -> None:
    """Python parses 4 MiB of JSON in one go, and requests of clients would wait."""
    padding = {"annotations": {"padding": "x" * 300_000}}
    for number, small in enumerate((index(NGINX), NGINX)):
        document = {**json.loads(small.data), **padding}
        long = ManifestTree(small.media_type, json.dumps(document).encode(), small.blobs, small.children)
        put_image(world.hosted, f"team/long{number}", long, "v1")
        world.walk()
        [tag] = world.get("image", name=f"team/long{number}")["tags"]
        assert (tag["size"], tag["platforms"]) == (len(long.data), [])
        manifest = world.get("manifest", name=f"team/long{number}", digest=str(long.digest))
        assert (manifest["layers"], manifest["platforms"], manifest["annotations"]) == ([], [], {})


def test_an_image_of_millions_of_parts_is_read_in_part(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may have pulled it from a registry where anybody may push."""
    monkeypatch.setattr(images, "_MAX_OBJECTS", 20)
    manifests = [image(f"config {n}".encode(), *(f"{n} {m}".encode() for m in range(9))) for n in range(10)]
    world.put_cached("ghcr.io/acme/app", index(*manifests), "v1", "v2")
    world.walk()
    read = []
    read_references = images.read_references

    def count(*arguments: Any) -> Any:
        read.append(arguments)
        return read_references(*arguments)

    monkeypatch.setattr(images, "read_references", count)
    rows = world.get("image", name="ghcr.io/acme/app")["tags"]
    assert [row["tag"] for row in rows] == ["v1", "v2"] and rows[0]["size"] == rows[1]["size"] > 0
    assert len(read) == 2


def test_strangers_texts_are_cut(world: World) -> None:
    manifest = image(b"config", b"layer")
    document = json.loads(manifest.data)
    document["annotations"] = {f"key{number}": "<script>" * 100 for number in range(250)}
    long = ManifestTree(manifest.media_type, json.dumps(document).encode(), manifest.blobs)
    put_image(world.hosted, "team/app", long, "v1")
    world.walk()
    annotations = world.get("manifest", name="team/app", digest=str(long.digest))["annotations"]
    assert len(annotations) == 50
    assert max(map(len, annotations.values())) == 300


def places(world: World, viewer: Viewer) -> dict[str, tuple[Any, ...]]:
    """Return tag, layer, layers and platform of the downloads by their names."""
    return {
        row["name"]: (row["tag"], row["layer"], row["layers"], row["platform"])
        for row in world.get("transfers", viewer)["transfers"]
    }


def test_a_download_says_which_layer_of_which_image_it_is(world: World) -> None:
    arm, amd = platform_image("arm64", b"base", b"arm layer"), platform_image("amd64", b"base", b"amd layer")
    document = json.loads(index(arm, amd).data)
    for entry, name in zip(document["manifests"], ("arm64", "amd64"), strict=True):
        entry["platform"] = {"os": "linux", "architecture": name}
    both = ManifestTree(document["mediaType"], json.dumps(document).encode(), (), (arm, amd))
    world.put_cached("ghcr.io/a/b", both, "v1")
    part = world.board.for_process(0)
    part.add("ghcr.io/a/b", Digest.of(b"amd layer"), 9, private=False)
    for viewer in (ADMIN, ANONYMOUS):
        assert places(world, viewer) == {"ghcr.io/a/b": ("v1", 2, 2, "linux/amd64")}
    part.clear()
    part.add("ghcr.io/a/b", Digest.of(arm.blobs[0]), 9, private=False)
    assert places(world, ANONYMOUS) == {"ghcr.io/a/b": ("v1", None, 2, "linux/arm64")}
    part.clear()
    part.add("ghcr.io/a/b", Digest.of(b"of no manifest"), 9, private=False)
    assert places(world, ADMIN) == {"ghcr.io/a/b": (None, None, None, None)}


def test_the_places_of_many_downloads_are_found_with_little_reading(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients choose what they download, and each repository may have fifty manifests of 256 KiB."""
    read = []
    parse_manifest = layer_places.parse_manifest

    def count(content: bytes, media_type: str | None) -> Any:
        read.append(content)
        return parse_manifest(content, media_type)

    monkeypatch.setattr(layer_places, "parse_manifest", count)
    part = world.board.for_process(0)
    for name in ("ghcr.io/a/one", "ghcr.io/a/two"):
        layers = [f"{name} layer {number}".encode() for number in range(20)]
        world.put_cached(name, image(b"config", *layers), "v1")
        for layer in layers:
            part.add(name, Digest.of(layer), 9, private=False)
    places(world, ADMIN)
    assert len(read) == 2, "one for each repository"
    monkeypatch.setattr(layer_places, "_MAX_READ", 1)
    part.clear()
    for name in ("ghcr.io/a/one", "ghcr.io/a/two"):
        part.add(name, Digest.of(b"config"), 9, private=False)
    assert set(places(world, ADMIN).values()) == {(None, None, None, None)}
    assert len(read) == 2, "there is no allowance any more"


def test_the_place_of_private_content_is_not_told(world: World) -> None:
    name = "ghcr.io/acme/app"
    old, new = platform_image("amd64", b"old"), platform_image("amd64", b"new")
    world.put_cached(name, old, "old")
    put_image(world.cache, name, new, SECRET)
    world.make_private(name, new)
    world.note_tag(name, SECRET, new, public=False)
    part = world.board.for_process(0)
    part.add(name, Digest.of(b"new"), 3, private=True)
    assert places(world, ADMIN) == {name: (SECRET, 1, 1, None)}
    assert places(world, ANONYMOUS) == {"a private image of ghcr.io": (None, None, None, None)}
    # A name that only a login saw of content that everybody may read.
    world.cache.links.remove_tag(name, "old")
    world.cache.links.set_tag(name, f"{SECRET}2", old.digest)
    world.note_tag(name, f"{SECRET}2", old, public=False)
    part.clear()
    part.add(name, Digest.of(b"old"), 3, private=False)
    assert places(world, ADMIN) == {name: (f"{SECRET}2", 1, 1, None)}
    assert places(world, ANONYMOUS) == {name: (None, 1, 1, None)}


@pytest.mark.parametrize(
    ("resource", "arguments", "status"),
    [
        ("nothing", {}, 404),
        ("../status", {}, 404),
        ("", {}, 404),
        ("traffic", {"range": "2h"}, 400),
        ("traffic", {"registry": "unlisted.example"}, 404),
        ("registry", {"name": "\0"}, 404),
        ("images", {"sort": "password"}, 400),
        ("images", {"order": "sideways"}, 400),
        ("images", {"page": "0"}, 400),
        ("images", {"page": "-1"}, 400),
        ("images", {"page": "1e3"}, 400),
        ("images", {"page": "\u0661"}, 400),
        ("images", {"page": "9" * 5000}, 400),
        ("images", {"per_page": "101"}, 400),
        ("images", {"where": "elsewhere"}, 400),
        ("images", {"q": "a\0b"}, 400),
        ("images", {"q": "x" * 10_000}, 400),
        ("image", {}, 404),
        ("image", {"name": "../../etc/passwd"}, 404),
        ("image", {"name": "\udcff"}, 404),
        ("manifest", {"name": "docker.io/library/nginx", "digest": "sha256:x"}, 404),
        ("manifest", {"name": "docker.io/library/nginx", "digest": "sha256:" + "0" * 64}, 404),
    ],
)
def test_wrong_arguments_are_refused(world: World, resource: str, arguments: dict[str, str], status: int) -> None:
    fill(world)
    for viewer in (ADMIN, ANONYMOUS):
        with pytest.raises(OverviewError) as refused:
            world.get(resource, viewer, **arguments)
        assert refused.value.status == status
        assert refused.value.message.isprintable() or "\\" in refused.value.message


def test_an_error_inside_is_no_answer_to_a_stranger(world: World) -> None:
    async def fail() -> dict[str, Any]:
        raise OSError(5, "Input/output error", f"/srv/{SECRET}")

    world.sources.budget = fail
    with pytest.raises(OverviewError) as failed:
        world.get("budget")
    assert failed.value.status == 500
    assert SECRET not in failed.value.message


def test_an_answer_that_is_too_long_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message to another process has a bound, and its connection would end."""
    monkeypatch.setattr("dockerproxy.admin.local_overview._MAX_ANSWER", 100)
    with pytest.raises(OverviewError, match="the answer is too long; ask for a smaller page"):
        world.get("overview")


def test_limits_of_logins_are_for_administrators(world: World) -> None:
    async def budget() -> dict[str, Any]:
        return {"limits": [{"registry": "docker.io", "limit": 200, "login": login} for login in (None, "deploy")]}

    world.sources.budget = budget
    assert len(world.get("budget", ADMIN)["limits"]) == 2
    assert world.get("budget", ANONYMOUS)["limits"] == [{"registry": "docker.io", "limit": 200}]


def test_every_answer_fits_into_a_message(world: World) -> None:
    """The most of everything: repositories with the longest names, tags, layers, platforms and downloads."""
    part = world.board.for_process(0)
    for number in range(256):
        part.add(f"ghcr.io/{'n' * 200}/{number}", Digest.of(b"%d" % number), 2**40, private=False)
    rows = world.summaries._rows[CACHED]
    for number in range(300):
        name = f"ghcr.io/{'n' * 240}/{number}"
        figures = Figures(platforms=("linux/" + "a" * 40,) * 16, size=2**60)
        rows[name] = RepositorySummary(CACHED, name, name, figures)
    manifest = image(b"config", *(b"layer %d" % number for number in range(300)))
    put_image(world.hosted, "team/app", ManifestTree(manifest.media_type, manifest.data))
    links = Links(world.hosted.layout, durable=False)
    for number in range(80):
        links.set_tag("team/app", f"{'t' * 120}{number}", manifest.digest)
    world.walk()
    rows.update({row.key: row for row in world.summaries._rows[CACHED].values()})
    for resource in DOCUMENTS:
        world.get(resource)
    image_document = world.get("image", name="team/app")
    assert image_document["count"] == 80
    assert image_document["pages"] == 2
    digest = image_document["tags"][0]["digest"]
    assert len(world.get("manifest", name="team/app", digest=digest)["layers"]) == 200
    for range_name in ("1h", "6h", "24h", "7d", "30d", "1y"):
        world.get("traffic", range=range_name)
        world.get("overview", range=range_name)


# the summary of repositories


def test_rows_have_sizes_tags_platforms_and_times(world: World) -> None:
    fill(world)
    row = world.get("images", q="nginx")["images"][0]
    assert row["where"] == CACHED
    assert row["registry"] == "docker.io"
    assert (row["tags"], row["manifests"], row["platforms"]) == (1, 1, ["linux/amd64"])
    assert row["size"] == sum(map(len, (NGINX.data, *NGINX.blobs)))
    assert abs(row["last_used"] - time.time()) < 60
    assert row["pulls"] is None


def test_a_walk_sees_what_has_changed(world: World) -> None:
    fill(world)
    world.put_cached(f"{HUB}/library/redis", platform_image("amd64", b"redis"), "8")
    assert "docker.io/library/redis" not in world.names()
    world.walk()
    assert "docker.io/library/redis" in world.names()
    shutil.rmtree(world.cache.layout.repository(f"{HUB}/library/redis"))
    put_image(world.hosted, "platform/base", platform_image("arm64", b"more"), "v2")
    world.walk()
    assert "docker.io/library/redis" not in world.names()
    assert world.get("images", q="platform")["images"][0]["tags"] == 2


def test_a_walk_reads_an_unchanged_repository_once_an_hour(world: World) -> None:
    fill(world)
    world.cache.blobs.remove(Digest.of(b"nginx"))
    before = world.get("images", q="nginx")["images"][0]["size"]
    world.walk()
    assert world.get("images", q="nginx")["images"][0]["size"] == before
    world.summaries._rows[CACHED][f"{HUB}/library/nginx"].read_at -= 4000
    world.walk()
    assert world.get("images", q="nginx")["images"][0]["size"] == before - len(b"nginx")


def test_repositories_of_which_nothing_is_left_are_not_listed(world: World) -> None:
    fill(world)
    for entry in list(world.cache.blobs.walk()):
        world.cache.blobs.remove(entry.key)
    for row in world.summaries._rows[CACHED].values():
        row.read_at = 0
    world.walk()
    assert world.names() == ["platform/base"]


def test_the_answer_says_that_the_first_walk_has_not_ended(world: World) -> None:
    put_image(world.hosted, "a/b", NGINX, "v1")
    answer = world.get("images")
    assert (answer["complete"], answer["count"]) == (False, 0)
    world.walk()
    assert world.get("images")["complete"] is True


def test_search_sort_and_pages(world: World) -> None:
    names = [f"ghcr.io/team-{'even' if number % 2 == 0 else 'odd'}/app{number:02}" for number in range(25)]
    world.set_rows(
        [
            RepositorySummary(CACHED, name, name, Figures(size=number, last_used=100.0 - number))
            for number, name in enumerate(names)
        ]
    )
    assert world.names(sort="size", per_page="3") == names[:-4:-1]
    assert world.names(sort="used", per_page="1") == ["ghcr.io/team-even/app00"]
    assert world.names(sort="name", q="ODD", per_page="2", page="2") == [
        "ghcr.io/team-odd/app05",
        "ghcr.io/team-odd/app07",
    ]
    answer = world.get("images", q="odd app1", sort="size", order="asc")
    assert [row["size"] for row in answer["images"]] == [11, 13, 15, 17, 19]
    assert (answer["count"], answer["bytes"], answer["pages"]) == (5, 75, 1)
    assert world.names(page="1000000") == []
    world.sources.pinned = lambda key: ["v1"] if key.endswith("app03") else []
    assert world.names(where="pinned") == ["ghcr.io/team-odd/app03"]
    assert world.names(where="hosted") == []


@given(st.text(max_size=1200))
def test_any_search_is_a_result_or_a_400(text: str) -> None:
    try:
        query = SummaryQuery.parse({"q": text})
    except BadRequest as error:
        assert error.status == 400
    else:
        assert all(word in text.lower() for word in query.words)


def test_pulls_are_shown_if_they_are_counted(world: World) -> None:
    world.load_pulls = lambda: PullSums({"docker.io/library/nginx": 18_230, "hosted/platform/base": 7})
    fill(world)
    rows = world.get("images", sort="pulls")["images"]
    assert [(row["name"], row["pulls"]) for row in rows] == [
        ("docker.io/library/nginx", 18_230), ("platform/base", 7), (f"ghcr.io/{SECRET}/app", 0),
    ]  # fmt: skip


def test_a_search_of_ten_thousand_repositories_takes_milliseconds(world: World) -> None:
    names = [f"ghcr.io/team{number % 100}/service-{number}" for number in range(10_000)]
    random.Random(1).shuffle(names)
    world.set_rows(
        [
            RepositorySummary(CACHED, name, name, figures, figures, is_public=True)
            for number, name in enumerate(names)
            for figures in [Figures(size=number + 1, last_used=float(number))]
        ]
    )
    assert world.get("images")["count"] == world.get("images", ANONYMOUS)["count"] == 10_000
    times = []
    for query in ("77", "service", "", "team5 9", "nothing at all"):
        for viewer in (ADMIN, ANONYMOUS):
            started = time.process_time()
            world.get("images", viewer, q=query)
            times.append(time.process_time() - started)
    assert sorted(times)[len(times) // 2] < 0.2  # usually 5 ms


def test_a_disk_that_fails_leaves_the_old_list(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(world)

    def fail(path: str) -> Any:
        raise OSError(5, "Input/output error", path)

    with monkeypatch.context() as patch:
        patch.setattr("dockerproxy.store.tree_reader.os.listdir", fail)
        world.walk()
    assert len(world.names()) == 3


def test_who_is_not_there_is_unknown(world: World) -> None:
    with pytest.raises(NameUnknown):
        world.run(world.local.get("image", ADMIN, {"name": "no/such"}))


class HangingDisk:
    """A network file system: `hangs` makes its functions wait, and then the reader gives up."""

    file_system = "nfs4"

    def __init__(self) -> None:
        self.hangs = False
        self.stuck: list[Any] = []

    async def read(self, function: Any, *args: Any) -> Any:
        if not self.hangs:
            return function(*args)
        thread = threading.Thread(target=function, args=(_HangingSteps(self),), daemon=True)
        thread.start()
        while not self.stuck:
            time.sleep(0.001)
        raise ServiceOverloaded("it has not answered for 30 seconds")

    run = read


class _HangingSteps:
    """Steps, the first of which lasts until the disk answers."""

    def __init__(self, disk: HangingDisk) -> None:
        self._disk = disk

    def __iter__(self) -> Any:
        self._disk.stuck.append(threading.current_thread())
        while self._disk.hangs:
            time.sleep(0.001)
        yield None


def test_a_hosted_store_that_hangs_takes_one_thread_and_the_cache_goes_on(world: World) -> None:
    fill(world)
    disk: Any = HangingDisk()
    world.summaries._disk = disk
    world.walk()
    assert "platform/base" in world.names()
    disk.hangs = True
    for number in range(3):
        world.put_cached(f"{HUB}/library/new{number}", platform_image("amd64", b"new"), "1")
        world.walk()
        assert f"docker.io/library/new{number}" in world.names()
        assert "platform/base" in world.names()
    assert len(disk.stuck) == 1
    disk.hangs = False
    disk.stuck[0].join()
    put_image(world.hosted, "platform/more", NGINX, "v1")
    world.walk()
    assert "platform/more" in world.names()


FLEET = {"10.0.0.1:3128": "me", "10.0.0.2:3128": "up", "10.0.0.3:3128": f"refused by 10.0.0.3 {'x' * 1000}"}


def test_only_administrators_see_the_addresses_of_members(world: World) -> None:
    assert world.get("registries", ANONYMOUS)["fleet"] is None
    world.sources.fleet = lambda: FLEET
    world.metrics.count_peer_bytes("received", 300)
    world.metrics.count_peer_bytes("sent", 500)
    numbers = {"up": 2, "down": 1, "received": 300, "sent": 500}
    for viewer in (ANONYMOUS, USER):
        document = world.get("registries", viewer)
        assert document["fleet"] == {**numbers, "members": []}
        assert "10.0.0" not in str(document)
    shown = world.get("registries", ADMIN)["fleet"]["members"]
    assert [member["name"] for member in shown] == ["10.0.0.3:3128", "10.0.0.1:3128", "10.0.0.2:3128"]
    assert len(shown[0]["state"]) == 300


def test_a_thousand_members_that_are_down_fit_into_an_answer(world: World) -> None:
    world.sources.fleet = lambda: {f"10.0.{number // 250}.{number % 250}:3128": "x" * 5000 for number in range(1000)}
    fleet = world.get("registries")["fleet"]
    assert (fleet["up"], fleet["down"], len(fleet["members"])) == (0, 1000, 100)
