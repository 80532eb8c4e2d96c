"""The daemon is killed at random moments of pushes and deletions: nothing that it acknowledged is lost or half done."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import Factory, define
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from dockerproxy.oci.names import Digest
from dockerproxy.store.cooperative import CooperativeThread, Progress
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.scrub import Finding, Scrubber, ScrubResult
from tests.e2e.house import images, wire
from tests.e2e.house.docker_registry import DockerRegistry
from tests.e2e.house.hosting import Hosting
from tests.e2e.house.images import EVERY_MANIFEST, Content, Image
from tests.e2e.house.killing import Killed
from tests.e2e.house.process import eventually, need

TREES = 3
KILLS = 80
"""How often the daemon is killed over each of the trees; a kill takes a quarter of a second."""
WRITERS = 3
MOST = 5  # that the writers get done between the start and a kill


class Here(Clock):
    """A reactor whose threads are this one."""

    def getThreadPool(self) -> Here:
        return self

    def callInThreadWithCallback(self, done: Any, function: Any, *arguments: Any) -> None:
        try:
            result = function(*arguments)
        except Exception:
            done(False, Failure())
        else:
            done(True, result)

    def callFromThread(self, function: Any, *arguments: Any) -> None:
        function(*arguments)


def findings(root: Path) -> list[Finding]:
    """Return what `dockerproxy check` would say of the tree."""
    reactor, found, ended = Here(), list[Finding](), list[ScrubResult]()
    checker = Scrubber(reactor, Layout(root), thread=CooperativeThread(reactor, slice_length=60))
    checking = Deferred.fromCoroutine(checker.scrub(Progress(emit=found.append)))
    checking.addCallbacks(ended.append, Failure.raiseException)
    while not ended:
        assert reactor.getDelayedCalls()
        reactor.advance(1)
    return found


@define
class Writer:
    """Pushes and deletes in a repository of its own until the daemon is gone, and keeps what it was told."""

    repository: str
    port: int
    luck: random.Random
    tags: dict[str, str | None] = Factory(dict)
    """What each tag was acknowledged to mean."""
    under_way: dict[str, str | None] = Factory(dict)
    blobs: set[str] = Factory(set)
    manifests: set[str] = Factory(set)
    made: dict[str, Image] = Factory(dict)
    refused: list[str] = Factory(list)
    done: int = 0

    def work(self) -> None:
        """Go on until the connection breaks."""
        connection = wire.Straight("127.0.0.1", ("127.0.0.1", self.port), None)
        try:
            while not self.refused:
                self._act(connection)
                self.done += 1
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()

    def _act(self, connection: http.client.HTTPConnection) -> None:
        tag = f"tag{self.luck.randrange(3)}"
        meant = self.tags.get(tag)
        chance = self.luck.random()
        if meant is None or chance < 0.8:
            size = 1_000_000 if chance < 0.1 else self.luck.randrange(20, 20_000)
            self._push(connection, tag, images.small(str(self.luck.random()), size=size, layers=1))
        else:
            self.under_way = {tag: None}
            if chance < 0.9:
                self._ask(connection, 202, "DELETE", f"manifests/{tag}")
            else:
                self.manifests.discard(meant)
                self._ask(connection, 202, "DELETE", f"manifests/{meant}")
            self._acknowledged()

    def _push(self, connection: http.client.HTTPConnection, tag: str, image: Image) -> None:
        for blob in image.blobs:
            self._push_blob(connection, blob)
            self.blobs.add(blob.digest)
        self.made[image.digest] = image
        self.under_way = {tag: image.digest}
        fields = {"Content-Type": image.manifest.media_type}
        self._ask(connection, 201, "PUT", f"manifests/{tag}", image.manifest.data, fields)
        self.manifests.add(image.digest)
        self._acknowledged()

    def _push_blob(self, connection: http.client.HTTPConnection, blob: Content) -> None:
        if self.luck.random() < 0.3:
            self._ask(connection, 201, "POST", f"blobs/uploads/?digest={blob.digest}", blob.data)
            return
        target, rest = self._ask(connection, 202, "POST", "blobs/uploads/"), blob.data
        if self.luck.random() < 0.5:
            cut = self.luck.randrange(len(rest))
            target, rest = self._ask(connection, 202, "PATCH", target, rest[:cut]), rest[cut:]
        self._ask(connection, 201, "PUT", f"{target}?digest={blob.digest}", rest)

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        status: int,
        method: str,
        target: str,
        body: bytes = b"",
        fields: dict[str, str] | None = None,
    ) -> str:
        """Return the answer's Location, for the next request."""
        path = target if target.startswith("/") else f"/v2/{self.repository}/{target}"
        connection.request(method, path, body, fields or {})
        answer = wire.read(connection.getresponse())
        if answer.status != status:
            self.refused.append(f"{method} {path}: {answer}")
            raise http.client.HTTPException
        return answer.headers.get("location", "")

    def _acknowledged(self) -> None:
        self.tags.update(self.under_way)
        self.under_way = {}

    def check(self, links: Links) -> None:
        """Compare the tree with what was acknowledged; what was under way is found done, or not begun."""
        assert not self.refused
        for tag in {*self.tags, *self.under_way}:
            found = links.tag(self.repository, tag)
            meant = None if found is None else str(found)
            assert meant in (self.tags.get(tag), self.under_way.get(tag, self.tags.get(tag))), (tag, self)
            self.tags[tag] = meant
        self.under_way = {}
        for digest in self.blobs:
            assert links.has_layer(self.repository, Digest.parse(digest)), digest
        for digest in self.manifests:
            assert links.has_manifest(self.repository, Digest.parse(digest)), digest


@pytest.mark.parametrize("seed", range(TREES))
def test_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    need("docker-registry")
    theirs = DockerRegistry(tmp_path / "theirs", "127.0.0.1")
    hosting = Hosting(tmp_path / "ours", {"REGISTRY_DIR": str(theirs.storage)})
    luck = random.Random(seed)
    writers = [
        Writer(f"crash/of{number}", hosting.plain_port, random.Random(luck.random())) for number in range(WRITERS)
    ]
    with Killed(hosting) as daemon:
        for _ in range(KILLS):
            daemon.start()
            kill_while_busy(daemon, writers, luck.randrange(MOST), luck.uniform(0, 0.03))
            assert findings(theirs.storage) == []
            links = Links(Layout(theirs.storage), durable=True)
            for writer in writers:
                writer.check(links)
        daemon.start()
    assert "Traceback" not in hosting.text
    assert list((theirs.storage / "staging").iterdir()) == []
    assert sum(writer.done for writer in writers) >= KILLS
    served_by(theirs, writers)


def kill_while_busy(daemon: Killed, writers: Sequence[Writer], acts: int, seconds: float) -> None:
    """Kill it when so much is done, and a moment later: in the middle of something."""
    goal = sum(writer.done for writer in writers) + acts
    threads = [threading.Thread(target=writer.work) for writer in writers]
    for thread in threads:
        thread.start()
    eventually(lambda: sum(writer.done for writer in writers) >= goal, "what the writers are to get done")
    time.sleep(seconds)
    daemon.kill()
    for thread in threads:
        thread.join()


def served_by(theirs: DockerRegistry, writers: Sequence[Writer]) -> None:
    """Pull everything that was acknowledged from Debian's docker-registry over the same tree."""
    theirs.start()
    connection = wire.Straight("127.0.0.1", ("127.0.0.1", theirs.port), None)
    try:
        for writer in writers:
            tags = {tag: digest for tag, digest in writer.tags.items() if digest is not None}
            for reference, digest in [*tags.items(), *((digest, digest) for digest in writer.manifests)]:
                content = pull(connection, f"/v2/{writer.repository}/manifests/{reference}")
                assert images.sha256(content) == digest
                assert json.loads(content)["schemaVersion"] == 2
            for digest in writer.blobs:
                content = pull(connection, f"/v2/{writer.repository}/blobs/{digest}")
                assert f"sha256:{hashlib.sha256(content).hexdigest()}" == digest
    finally:
        with contextlib.suppress(OSError):
            connection.close()
        theirs.stop()


def pull(connection: http.client.HTTPConnection, target: str) -> bytes:
    connection.request("GET", target, headers={"Accept": EVERY_MANIFEST})
    answer = wire.read(connection.getresponse())
    assert answer.status == 200, (target, answer)
    return answer.body
