"""A hostile registry and its clients in any order of events: they never get content that only another registry has.

The model is that of the attacker: he knows digests and sizes, answers as he likes, and has no byte of the content.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from dockerproxy.errors import RegistryError
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Digest
from tests.cache.support.harness import HUB, OTHER, CacheHarness
from tests.cache.support.upstream import OCI_MANIFEST, ReceivedRequest, ScriptedResponse, error_response, serve_content
from tests.support.examples import examples

APP, EVILS = "private/app", "x/y"
ALICE, BOB = "Basic alice", "Basic bob"
MANIFEST = b'{"schemaVersion":2,"config":{"digest":"sha256:%b","size":1},"layers":[]}' % (b"5" * 64)
CONTENTS = {
    "large": random.Random(1).randbytes(100_000),
    "small": random.Random(2).randbytes(1000),
    "manifest": MANIFEST,
}
DIGESTS = {name: Digest.of(content) for name, content in CONTENTS.items()}


def fake(data: bytes) -> bytes:
    return b"EVIL" * (len(data) // 4) + b"E" * (len(data) % 4)


def claim(request: ReceivedRequest, data: bytes) -> ScriptedResponse:
    response = serve_content(request, OCI_MANIFEST, fake(data))
    digest = ("docker-content-digest", str(Digest.of(data)))
    response.headers = Headers([*response.headers.without("docker-content-digest"), digest])
    return response


def claim_and_break_off(request: ReceivedRequest, data: bytes) -> ScriptedResponse:
    response = ScriptedResponse(200, fake(data), sent=len(data) // 2)
    response.disconnect()
    return response


LIES = {
    "claim": claim,
    "claim, break off": claim_and_break_off,
    "empty 206": lambda request, data: ScriptedResponse(206, b"", {"content-range": f"bytes 0-0/{len(data)}"}),
    "confirm HEAD only": lambda request, data: (
        claim(request, data) if request.method == "HEAD" else error_response(404)
    ),
    "no length": lambda request, data: ScriptedResponse(200, fake(data), length=None),
    "304": lambda request, data: ScriptedResponse(304, b"", {"docker-content-digest": str(Digest.of(data))}),
    "416": lambda request, data: ScriptedResponse(416),
    "500": lambda request, data: error_response(500),
    "401": lambda request, data: error_response(401),
}

NAMES = st.sampled_from(sorted(CONTENTS))
KINDS = st.sampled_from(["blob", "manifest", "tag"])


class IsolationMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.harness = CacheHarness(Path(self.directory.name))
        self.upstream = self.harness.upstream
        self.lie = "claim"
        repository = self.upstream.repository(f"{HUB}/{APP}")
        repository.readers = {ALICE}
        for content in CONTENTS.values():
            repository.put_blob(content)
        repository.put_manifest(MANIFEST, "latest")
        self.upstream.repository(f"{OTHER}/{EVILS}")

    @initialize()
    def script(self) -> None:
        def respond(request: ReceivedRequest, data: bytes | None) -> Any:
            if request.registry == OTHER:
                reference = request.path.rpartition("/")[2]
                claimed = next((c for c in CONTENTS.values() if str(Digest.of(c)) == reference), MANIFEST)
                return LIES[self.lie](request, claimed)
            if request.requester != ALICE:
                return error_response(401)
            return error_response(404) if data is None else serve_content(request, OCI_MANIFEST, data)

        for method in ("GET", "HEAD"):
            self.upstream.on(method, "/(blobs|manifests)/", respond)

    def teardown(self) -> None:
        self.harness.assert_no_leaks()
        self.directory.cleanup()

    def ask(self, kind: str, name: str, registry: Any, repository: str, authorization: str | None, head: bool) -> bytes:
        """Return what a client gets; nothing if it is refused."""
        try:
            if kind == "blob":
                if head:
                    self.harness.run(
                        self.harness.blob(DIGESTS[name], repository, authorization, head=True, registry=registry), 60
                    )
                    return b""
                return self.harness.fetch(DIGESTS[name], repository, authorization, registry=registry)[1]
            reference = DIGESTS[name] if kind == "manifest" else "latest"
            response = self.harness.run(
                self.harness.manifest(reference, repository, authorization, head=head, registry=registry), 60
            )
            return response.content or b""
        except RegistryError:
            return b""

    @rule(kind=KINDS, name=NAMES, head=st.booleans())
    def pull_as_alice(self, kind: str, name: str, head: bool) -> None:
        content = self.ask(kind, name, HUB, APP, ALICE, head)
        assert content in (b"", MANIFEST if kind == "tag" else CONTENTS[name])

    @rule(kind=KINDS, name=NAMES, head=st.booleans(), lie=st.sampled_from(sorted(LIES)))
    def attack_with_a_registry(self, kind: str, name: str, head: bool, lie: str) -> None:
        self.lie = lie
        content = self.ask(kind, name, OTHER, EVILS, None, head)
        assert content not in CONTENTS.values(), (kind, name, lie)

    @rule(
        kind=KINDS, name=NAMES, head=st.booleans(), authorization=st.sampled_from([None, BOB]),
        repository=st.sampled_from([APP, "public/app"]),
    )  # fmt: skip
    def attack_without_access(
        self, kind: str, name: str, head: bool, authorization: str | None, repository: str
    ) -> None:
        assert self.ask(kind, name, HUB, repository, authorization, head) == b""

    @rule(name=NAMES)
    def evict(self, name: str) -> None:
        self.harness.run(self.harness.space.purge([DIGESTS[name]]))

    @rule(seconds=st.sampled_from([1, 400, 90_000]))
    def advance(self, seconds: float) -> None:
        self.harness.reactor.advance(seconds)
        self.harness.reactor.run_due_calls()

    @rule()
    def go_down(self) -> None:
        self.upstream.go_down()

    @rule()
    def come_back(self) -> None:
        self.upstream.down = None

    @rule()
    def restart(self) -> None:
        self.harness = CacheHarness(Path(self.directory.name), upstream=self.upstream)


TestIsolation = IsolationMachine.TestCase
TestIsolation.settings = settings(max_examples=examples(30), stateful_step_count=25, deadline=None)
