"""A page with data of a busy server: the one of browser tests and pictures.

It has the names and numbers of no real server. The documents have the schema of `dockerproxy.admin.overview`. The page
with the documents of a real daemon is tested in `tests/e2e/test_page.py`.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Awaitable, Mapping
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred

from dockerproxy.admin.sessions import Session, Sessions
from dockerproxy.admin.viewer import Viewer
from dockerproxy.concurrency import FirstUse
from dockerproxy.errors import NameUnknown
from dockerproxy.http.request import Request
from dockerproxy.http.site import ServerTimeouts, Site
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.page.door import PageDoor
from dockerproxy.page.place import Place
from dockerproxy.page.sign_in import SignIn
from dockerproxy.page.site import BrowserPage
from dockerproxy.registry.principal import Principal
from dockerproxy.shares import ClientShares

NOW = 1_796_054_400.0  # 2026-11-30, 16:00 UTC
DAY = 86400.0
Document = dict[str, Any]

STEPS = {"1h": (10, 360), "6h": (60, 360), "24h": (300, 288), "7d": (1800, 336), "30d": (7200, 360), "1y": (86400, 365)}
PRIVATE = "ghcr.io/acme/webshop"

IMAGES = [
    # name, tags, platforms, MB, pulls, seconds since the last use, pinned
    ("docker.io/library/nginx", 14, "amd64 arm64", 1210, 18230, 120, True),
    ("docker.io/pytorch/pytorch", 3, "amd64", 21400, 412, 3, False),
    ("docker.io/library/python", 22, "amd64 arm64", 6800, 9120, 300, False),
    ("docker.io/library/postgres", 9, "amd64 arm64", 2440, 3022, 660, True),
    (PRIVATE, 61, "amd64", 12900, 5110, 60, False),
    ("quay.io/prometheus/node-exporter", 4, "amd64 arm64 s390x", 94, 7044, 1560, False),
    ("registry.k8s.io/kube-proxy", 6, "amd64 arm64", 402, 2090, 240, True),
    ("mcr.microsoft.com/dotnet/aspnet", 5, "amd64", 1020, 260, 3 * 3600, False),
    ("platform/base", 12, "amd64 arm64", 3400, 4101, 480, False),
    ("platform/ci-runner", 40, "amd64", 8800, 2233, 61, False),
    ("charts/webshop", 19, "", 3.1, 120, 2 * 3600, False),
]
REGISTRIES = [
    # name, up, problem, requests, ratio, served GB, downloaded GB, p50 ms, p95 ms, errors
    ("docker.io", True, "429 twice since 15:40; asked again from 16:20 on", 41230, 0.910, 104, 9.4, 118, 412, 3),
    ("ghcr.io", True, "", 18022, 0.871, 48, 6.2, 141, 380, 0),
    ("quay.io", False, "no answer since 14:02: connection timed out; 31 answers were served stale", 6120, 0.863, 19,
     2.6, 203, 1900, 31),
    ("registry.k8s.io", True, "", 5210, 0.971, 14, 0.4, 64, 150, 0),
    ("mcr.microsoft.com", True, "", 822, 0.833, 4.2, 0.7, 88, 240, 0),
    ("docker-registry.local", None, "", 9401, None, 26, 0, 1, 9, 0),
]  # fmt: skip
TRANSFERS = [
    ("t1", "docker.io/pytorch/pytorch", "2.9-cuda13", 3, 7, "linux/amd64", 3620, 2310, 46, 24),
    ("t2", PRIVATE, "main", 5, 6, "linux/amd64", 162, 118, 22, 3),
    ("t3", "registry.k8s.io/kube-proxy", "v1.36.2", 1, 3, "linux/arm64", 31, 9, 11, 8),
]
FINDINGS = [
    ("registry", "bad", "quay.io does not answer: connection timed out", "Since 14:02. Cached images are still "
     "served: 31 answers were stale, and 2 images could not be had.", True),
    ("budget", "warn", "Docker Hub's budget is used up in about 40 minutes", "34 of 100 pulls are left, 52 were used "
     "in the last hour. A login for auth.docker.io in AUTH_REGISTRIES raises it to 200.", False),
    ("clients", "ok", "143 hosts pulled in the last 24 hours, the last one a minute ago", "", False),
    ("disk", "ok", "The cache has 212 of 256 GB, and 1.1 TB are free", "", False),
    ("ca", "ok", "The CA certificate is valid until 2036-11-22", "", True),
    ("maintenance", "ok", "All 48,211 contents were verified 3 days ago; none is damaged", "", False),
]  # fmt: skip


def traffic(range_name: str, scale: float = 1.0, registry: str | None = None) -> Document:
    """Return a SERIES: quiet nights, a peak when images are built, busy days, and a large download."""
    step, bins = STEPS[range_name]
    start = NOW - step * bins
    draw = random.Random(7)
    served, downloaded = [], []
    for number in range(bins):
        hour = (start + number * step) / 3600 % 24
        day = 5.6e6 * math.exp(-(((hour - 13) / 4.6) ** 4)) + 3.8e6 * math.exp(-(((hour - 3) / 0.45) ** 2)) + 3.2e5
        sent = day * scale * (0.86 + 0.28 * draw.random())
        fetched = sent * (0.03 + 0.05 * draw.random()) + (2.0e6 * scale if 10.6 < hour < 11.4 else 0)
        served.append(int((sent + fetched) * step))
        downloaded.append(int(fetched * step))
    return {
        "range": range_name, "registry": registry, "step": step, "start": start,
        "served": served, "downloaded": downloaded,
        "cache": [a - b for a, b in zip(served, downloaded, strict=True)],
        "requests": [40] * bins, "errors": [0] * bins,
    }  # fmt: skip


def sums(requests: int, served: float, downloaded: float, errors: int, ratio: float | None) -> Document:
    saved = max(0, served - downloaded)
    return {"requests": requests, "served": int(served), "downloaded": int(downloaded), "saved": int(saved),
            "ratio": ratio, "errors": errors, "stale": errors}  # fmt: skip


def limit(viewer: Viewer) -> Document:
    for_everybody = {
        "registry": "docker.io", "limit": 100, "window": 21600, "remaining": 34, "seen": NOW - 60,
        "refused_until": None, "refusals": 2, "reserved": 20, "last_hour": 52, "gone_in": 2400.0, "turns": NOW + 7200,
    }  # fmt: skip
    if not viewer.is_admin:
        return for_everybody
    top = [{"repository": "library/nginx", "pulls": 31}]
    return {**for_everybody, "login": None, "source": "203.0.113.7", "since": NOW - 3600, "top": top}


def registry(row: Any, viewer: Viewer) -> Document:
    name, up, problem, requests, ratio, served, downloaded, p50, p95, errors = row
    line = traffic("24h", 0.3 + len(name) / 30)["served"][::6]
    return {
        "name": name, "kind": "hosted" if up is None else "cached", "up": up, "problem": problem,
        **sums(requests, served * 1e9, downloaded * 1e9, errors, ratio), "p50": p50 / 1000, "p95": p95 / 1000,
        "budget": limit(viewer) if name == "docker.io" else None, "sparkline": line,
    }  # fmt: skip


def transfer(row: Any, viewer: Viewer) -> Document:
    id_, name, tag, layer, layers, platform, size, done, rate, readers = row
    private = name == PRIVATE
    shown = viewer.is_admin or not private
    host = name.partition("/")[0]
    return {
        "id": id_, "registry": host, "repository": name if shown else None,
        "name": name if shown else f"a private image of {host}", "digest": "sha256:" + "ab" * 32 if shown else None,
        "size": int(size * 1e6), "done": int(done * 1e6), "rate": rate * 1e6, "readers": readers, "started": NOW - 60,
        "private": private, "tag": tag if shown else None, "layer": layer, "layers": layers, "platform": platform,
    }  # fmt: skip


def first_event(viewer: Viewer) -> Document:
    """Return the first live event."""
    return {
        "now": NOW, "first": True, "ended": [], "transfers": [transfer(row, viewer) for row in TRANSFERS],
        "registries": [{"name": row[0], "up": row[1]} for row in REGISTRIES if row[1] is not None],
        "traffic": {"served": int(96e6), "downloaded": int(79e6)},
        "cache": {"bytes": int(212e9), "limit": int(256e9)},
    }  # fmt: skip


def image(row: Any) -> Document:
    name, tags, platforms, megabytes, pulls, seconds, pinned = row
    host = name.partition("/")[0]
    hosted = "." not in host
    return {
        "name": name, "where": "hosted" if hosted else "cached", "tags": tags, "manifests": tags * 2,
        "size": int(megabytes * 1e6), "platforms": [f"linux/{platform}" for platform in platforms.split()],
        "last_used": NOW - seconds, "pulls": pulls, "pinned": pinned, "private": name == PRIVATE,
        "registry": "hosted" if hosted else host,
    }  # fmt: skip


@define(slots=False)
class DemoOverview:
    """Documents of a made-up server. `texts` replaces the names of tags, labels and repositories by others."""

    hostile: str = ""
    down: bool = True
    members: dict[str, str] = field(factory=dict)

    def fleet(self, viewer: Viewer) -> Document | None:
        if not self.members:
            return None
        members = [{"name": name, "state": state} for name, state in self.members.items()] if viewer.is_admin else []
        return {"up": 2, "down": 1, "received": int(3e9), "sent": int(5e9), "members": members}

    async def get(self, resource: str, viewer: Viewer, arguments: Mapping[str, str]) -> Document:
        rows = [row for row in REGISTRIES if self.down or row[0] != "quay.io"]
        images = [each for each in map(image, IMAGES) if viewer.is_admin or not each["private"]]
        if not viewer.reads_hosted:
            images = [each for each in images if each["where"] == "cached"]
        range_name = arguments.get("range", "24h")
        match resource:
            case "overview":
                return {
                    "version": "1", "started": NOW - 9 * DAY, "now": NOW, "workers": 4, "range": range_name,
                    "day": sums(80805, 215e9, 19.3e9, 34, 0.910),
                    "total": {**sums(10**7, 42e12, 3.8e12, 99, 0.909), "since": NOW - 300 * DAY},
                    "cache": {"bytes": int(212e9), "limit": int(256e9), "idle_age": 41 * DAY + 5},
                    "budget": [limit(viewer)],
                    "notices": [{"level": "bad", "registry": "quay.io", "text": "quay.io does not answer. "
                                 "Cached images are served; 2 could not be had.", "advice": ""}]
                    if self.down else [],
                    "transfers": [transfer(row, viewer) for row in TRANSFERS],
                    "registries": [registry(row, viewer) for row in rows],
                    "repositories": {"count": 1204, "bytes": int(251e9), "complete": True},
                }  # fmt: skip
            case "traffic":
                return traffic(range_name)
            case "registries":
                return {"range": range_name, "registries": [registry(row, viewer) for row in rows],
                        "fleet": self.fleet(viewer)}  # fmt: skip
            case "registry":
                found = [row for row in rows if row[0] == arguments["name"]]
                if not found:
                    raise NameUnknown(f"{arguments['name']} is not a registry that is served here")
                return {"registry": registry(found[0], viewer), "series": traffic(range_name, 0.4, found[0][0])}
            case "budget":
                return {"reserve": 0.2, "limits": [limit(viewer)]}
            case "images":
                words = arguments.get("q", "").lower().split()
                where = arguments.get("where", "")
                images = [each for each in images if all(word in each["name"].lower() for word in words)]
                images = [
                    each for each in images if where in ("", each["where"]) or (where == "pinned" and each["pinned"])
                ]
                if self.hostile:
                    images[0:1] = (
                        [{**images[0], "name": self.hostile[:200], "platforms": [self.hostile]}] if images else []
                    )
                count = len(images) if words or where else 1204
                return {"q": arguments.get("q", ""), "where": where, "sort": arguments.get("sort", "used"),
                        "order": arguments.get("order", "desc"), "page": 1, "pages": 1 if count < 50 else 25,
                        "count": count, "bytes": int(251e9), "complete": True, "images": images}  # fmt: skip
            case "image":
                found_images = [each for each in images if each["name"] == arguments["name"]]
                if not found_images and not self.hostile:
                    raise NameUnknown(f"there is no image {arguments['name']} here that you may see")
                shown = found_images[0] if found_images else {**images[0], "name": arguments["name"]}
                tags = [("1.29", 74, 120, True, "65e7571b"), ("1.29-alpine", 21, 540, False, "0aea2811"),
                        ("latest", 74, 840, False, "65e7571b"), ("1.27", 72, 6 * DAY, False, "1d9268e4")]  # fmt: skip
                return {"image": shown, "page": 1, "pages": 1, "count": len(tags), "tags": [
                    {"tag": self.hostile[:100] or tag, "digest": "sha256:" + digest + "ad42" * 14, "present": True,
                     "media_type": self.hostile or "application/vnd.oci.image.index.v1+json",
                     "platforms": shown["platforms"], "size": int(size * 1e6), "last_used": NOW - seconds,
                     "private": False, "checked": NOW - seconds, "pinned": pinned}
                    for tag, size, seconds, pinned, digest in tags]}  # fmt: skip
            case "manifest":
                sizes = [(29.1, True), (42.3, True), (2.2, True), (0.9, False)]
                digest = "sha256:" + "12" * 32
                return {"digest": arguments["digest"], "media_type": "application/vnd.oci.image.index.v1+json",
                    "present": True, "artifact_type": None, "platforms": [
                    {"platform": f"linux/{name}", "digest": digest, "present": name in ("amd64", "arm64")}
                    for name in ("amd64", "arm64", "arm/v7", "s390x")],
                    "layers": [{"digest": digest, "size": int(size * 1e6), "present": present}
                               for size, present in sizes], "config": "sha256:" + "56" * 32,
                    "annotations": {"org.opencontainers.image.source": self.hostile or "https://git.example/nginx",
                                    "org.opencontainers.image.version": self.hostile or "1.29.3"}}  # fmt: skip
            case "status":
                return {"version": "1", "started": NOW - 9 * DAY, "operation": None}
        raise NameUnknown("no such resource")


async def health(quick: bool, viewer: Viewer) -> Document:
    findings = [
        {"check": check, "subject": "", "level": level, "sentence": sentence, "advice": advice, "public": public}
        for check, level, sentence, advice, public in FINDINGS
        if viewer.is_admin or public
    ]
    return {"level": "bad", "at": NOW - 30, "seconds": 1.2, "findings": findings}


async def history(name: str, where: str) -> list[Document]:
    rows = [
        ("42", "10.0.4.17", "manifest", "1.29", "REVALIDATED", "docker.io said that the tag has not moved"),
        ("41", "10.0.4.17", "blob", "", "HIT", "it was in the cache"),
        ("30", "10.0.4.61", "manifest", "1.29", "STALE", "docker.io answered 429: the last good answer was served"),
        ("20", "10.0.9.2", "blob", "", "JOINED", "a download that another client had begun"),
        ("10", "10.0.9.2", "manifest", "latest", "MISS", "the tag moved upstream; one pull counted"),
    ]
    return [
        {"time": f"2026-11-30T15:58:{second}Z", "client": client, "user": None, "kind": kind, "reference": reference,
         "verdict": verdict, "status": 200, "bytes": int(74e6), "blobs": 4, "explanation": explanation}
        for second, client, kind, reference, verdict, explanation in rows
    ]  # fmt: skip


class DemoUsers:
    """Two users with the password "secret"."""

    def password_hash(self, user: str) -> bytes | None:
        return b"hash of " + user.encode() if user in ("alice", "bob") else None

    async def check_password(self, credentials: BasicCredentials, client: str) -> bool:
        return self.password_hash(credentials.user) is not None and credentials.password == "secret"


@define(eq=False)
class Demo:
    """The page, with the actions and sign-ins so far. Its clock stands still."""

    reactor: Any
    overview: DemoOverview = field(factory=DemoOverview)
    actions: list[tuple[str | None, str, str, str]] = field(factory=list)
    sign_ins: list[tuple[str, str | None, bool]] = field(factory=list)
    sessions: Sessions = field(init=False)
    sign_in: SignIn = field(init=False)
    page: PageDoor = field(init=False)
    live_requests: list[Request] = field(factory=list)
    requests: ClientShares = field(factory=lambda: ClientShares("requests for the page", 256, 128))

    def __attrs_post_init__(self) -> None:
        self.sessions = Sessions(self.reactor.seconds)
        self.sign_in = SignIn(self.sessions, self._note, DemoUsers(), administrators=frozenset({"alice"}))
        place = Place("docker-registry.local", 3128, 3129, "5E:1B:" + "0F:" * 29 + "9C")
        names = [row[0] for row in REGISTRIES[:-1]]
        page = BrowserPage(
            self.reactor,
            lambda: NOW,
            self.sign_in,
            self.overview,
            health,
            self._act,
            history,
            place,
            lambda: names,
            on_proxy_port=True,
        )
        self.page = PageDoor(FirstUse(self.reactor, lambda: page), self.sign_in, self.requests)

    def _note(self, request: Request, what: str, user: str | None, accepted: bool) -> None:
        self.sign_ins.append((what, user, accepted))

    async def _act(self, principal: Principal, action: str, name: str, where: str) -> str:
        self.actions.append((principal.user, action, name, where))
        codes = {"pin": "pinned", "unpin": "unpinned", "refresh": "asked", "remove": "removed", "gc": "collecting"}
        return codes[action]

    def handle(self, request: Request) -> Awaitable[None]:
        """Handle every request, those for live events too."""
        request.host = request.headers.get("host") or ""
        if request.path == "/api/v1/live":
            return self._live(request)
        return self.page.handle(request)

    async def _live(self, request: Request) -> None:
        viewer = await self.sign_in.viewer_of(request)
        request.start(200, [("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")], None)
        self.send(request, first_event(viewer))
        self.live_requests.append(request)
        await Deferred()  # until the viewer leaves

    def send(self, request: Request, event: Document) -> None:
        """Send one live event."""
        request.write(f"data: {json.dumps(event)}\n\n".encode())

    def broadcast(self, event: Document) -> None:
        """Send an event to all viewers."""
        self.live_requests = [request for request in self.live_requests if not request.finished]
        for request in self.live_requests:
            self.send(request, event)

    async def sign_in_as(self, user: str) -> str:
        """Return the token of a new session."""
        return await self.sessions.start_session(Session(user, self.sign_in.stamp(user) or ""))


def main() -> None:
    """Serve the page on the port of the first argument. The downloads go on once a second."""
    from twisted.internet import reactor as installed_reactor
    from twisted.internet.task import LoopingCall

    reactor: Any = installed_reactor
    reactor.seconds = time.monotonic
    demo = Demo(reactor)
    site = Site(reactor, demo.handle, timeouts=ServerTimeouts(), on_request_finished=lambda request, seconds: None)
    done = {row[0]: row[7] for row in TRANSFERS}

    def go_on() -> None:
        for id_, *_, size, _, rate, _ in TRANSFERS:
            done[id_] = min(size, done[id_] + rate)
        changes = [{"id": id_, "done": int(megabytes * 1e6)} for id_, megabytes in done.items()]
        demo.broadcast({"now": NOW, "transfers": changes, "ended": []})

    if len(sys.argv) > 2:
        LoopingCall(go_on).start(1.0, now=False)
    reactor.listenTCP(int(sys.argv[1]), site, interface="127.0.0.1")
    reactor.run()


if __name__ == "__main__":
    main()
