"""The member that is asked, and the answers that count as upstream's word. Members and upstream are in memory."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from dockerproxy.cache.resumable import ResumableGet
from dockerproxy.cache.upstream import UpstreamRepository, UpstreamResponse
from dockerproxy.errors import UpstreamBroken, UpstreamTimeout, UpstreamUnreachable
from dockerproxy.fleet.hop import Hop, HopKind, HopLogin
from dockerproxy.fleet.members import Members, blob_key, repository_key
from dockerproxy.fleet.question import Question
from dockerproxy.fleet.upstream import MAX_PROGRESS, ContentClient, FleetUpstream, MemberClient, OwnerUpstream
from dockerproxy.fleet.waits import Waits
from dockerproxy.http.headers import Headers
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Digest, Registry, parse_repository
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, Credential
from dockerproxy.upstream.registry_request import RegistryRequest
from tests.cache.support.harness import result
from tests.cache.support.reactor import ManualReactor
from tests.cache.support.upstream import (
    ReceivedRequest,
    ScriptedResponse,
    ScriptedUpstream,
    respond_with,
    serve_content,
)
from tests.support.parsers import make_parser

REGISTRY = Registry.parse("registry.example")
NAME = parse_repository("library/app")
MEMBERS = ("10.0.0.1:3128", "10.0.0.2:3128", "10.0.0.3:3128", "10.0.0.4:3128")
LONG = bytes(range(256)) * 1024  # not read as a whole
MAX_BLOB = 1 << 20
MANIFEST = b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}'

Answer = Callable[[Question], Any]


class Fleet:
    """One member and its view of the others, which answer as the test says."""

    def __init__(self) -> None:
        self.reactor = ManualReactor()
        self.upstream = ScriptedUpstream(self.reactor)
        self.repository = self.upstream.repository("registry.example/library/app")
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, Hop]] = []
        self.questions: list[Question] = []
        self.bytes: dict[str, int] = {"received": 0, "sent": 0}
        self.members = Members(self.reactor.seconds)
        self.waits = Waits(self.reactor, None)
        parser = make_parser(self.reactor)
        member_client = MemberClient(self.reactor, self.members, self, self.waits, self, parser, MAX_BLOB)
        self.owner_client = OwnerUpstream(self.upstream, self.members, member_client)
        self.client: ContentClient = FleetUpstream(self.upstream, self.members, member_client)

    async def ask(self, member: str, question: Question, hop: Hop) -> UpstreamResponse:
        self.asked.append((member, hop))
        self.questions.append(question)
        response = self.answers[member](question)
        if isinstance(response, Deferred):
            response = await response
        return response  # type: ignore[no-any-return]

    def count_peer_bytes(self, direction: str, size: int) -> None:
        self.bytes[direction] += size

    def order(self, key: str) -> list[str]:
        """Make this daemon the last in the order for `key`. Return the others."""
        self.members.use(MEMBERS, "")
        *others, last = self.members.ranked(key)
        self.members.use(MEMBERS, last)
        return others

    async def get(self, path: str, method: str = "GET", credential: Credential | None = None, **fields: str) -> Any:
        headers = Headers(fields.items())
        request = RegistryRequest(
            method, REGISTRY, path, name=NAME, credential=credential or Anonymous(), headers=headers
        )  # fmt: skip
        return await self.client.request(request)

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = 0) -> Any:
        return result(Deferred.fromCoroutine(work), self.reactor, seconds)

    def blob(self, data: bytes = LONG) -> tuple[Digest, list[str]]:
        """Put a blob upstream. Return its digest, and the members before this one."""
        digest = self.repository.put_blob(data)
        return digest, self.order(blob_key(digest))


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def word(data: bytes, status: int = 200, *, by: str = "upstream", sent: int | None = None, **fields: str) -> Answer:
    """Return an answer of a member with a range of `data` as asked."""

    def answer(question: Question) -> ScriptedResponse:
        request = ReceivedRequest(question.method, REGISTRY, question.path, question.headers, Anonymous())
        response = serve_content(request, "application/octet-stream", data, sent=sent)
        response.status = response.status if status == 200 else status
        extra = [(name.replace("_", "-"), value) for name, value in fields.items()]
        response.headers = Headers([*response.headers, ("x-fleet-answer", by), *extra])
        return response

    return answer


def fail(error: Exception) -> Answer:
    def answer(question: Question) -> Any:
        raise error

    return answer


def blob_path(digest: Digest) -> str:
    return f"/v2/{NAME}/blobs/{digest}"


def read(fleet: Fleet, response: Any) -> bytes:
    return fleet.run(response.read_all(1 << 22))  # type: ignore[no-any-return]


def test_the_owner_is_asked_and_upstream_is_not(fleet: Fleet) -> None:
    digest, (owner, *_) = fleet.blob()
    fleet.answers[owner] = word(LONG)
    response = fleet.run(fleet.get(blob_path(digest)))
    assert read(fleet, response) == LONG
    assert fleet.asked == [(owner, Hop(fleet.members.me))]
    assert fleet.upstream.requests == [] and fleet.bytes["received"] == len(LONG)
    assert "x-fleet-answer" not in response.headers


def test_this_daemon_asks_upstream_for_what_it_owns(fleet: Fleet) -> None:
    digest = fleet.repository.put_blob(LONG)
    fleet.members.use(MEMBERS, "")
    fleet.members.use(MEMBERS, fleet.members.ranked(blob_key(digest))[0])
    response = fleet.run(fleet.get(blob_path(digest)))
    assert read(fleet, response) == LONG and fleet.asked == []


@pytest.mark.parametrize(
    ("credential", "login", "is_clear"),
    [
        (Anonymous(), HopLogin.NONE, True),
        (ClientCredential("Bearer token"), HopLogin.CLIENT, False),
        (BasicCredentials("user", "password"), HopLogin.CONFIGURED, False),
    ],
    ids=["public", "client", "configured"],
)
def test_only_public_blobs_go_in_the_clear(
    fleet: Fleet, credential: Credential, login: HopLogin, is_clear: bool
) -> None:
    digest, (owner, *_) = fleet.blob()
    fleet.answers[owner] = word(LONG)
    fleet.run(fleet.get(blob_path(digest), credential=credential)).abort()
    assert fleet.questions[0].is_clear is is_clear
    assert fleet.asked[0][1].login is login


def test_manifests_never_go_in_the_clear(fleet: Fleet) -> None:
    manifest = MANIFEST
    digest = fleet.repository.put_manifest(manifest, "latest")
    owner, *_ = fleet.order(repository_key(REGISTRY.host, NAME))
    fleet.answers[owner] = word(manifest)
    response = fleet.run(fleet.get(f"/v2/{NAME}/manifests/latest", accept="*/*", authorization="x", cookie="y"))
    assert read(fleet, response) == manifest and Digest.of(manifest) == digest
    [question] = fleet.questions
    assert not question.is_clear and [name for name, _ in question.headers] == ["accept"]


@pytest.mark.parametrize("path", ["/v2/library/app/tags/list", "/v2/library/app/referrers/sha256:" + "0" * 64, "/v2/"])
def test_other_requests_go_upstream(fleet: Fleet, path: str) -> None:
    fleet.members.use(MEMBERS, MEMBERS[0])
    fleet.run(fleet.get(path))
    assert fleet.asked == [] and len(fleet.upstream.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        fail(UpstreamUnreachable("refused", "refused")),
        fail(UpstreamTimeout("silent")),
        fail(UpstreamBroken("reset")),
        word(LONG, 503, by="own"),
        word(LONG, 508, by="own"),
        word(LONG, 403, by="own"),
        word(LONG, 307, by="own"),
        word(LONG, 200, by="strange"),
        lambda question: ScriptedResponse(401, b"{}"),
    ],
    ids=["refused", "silent", "reset", "503", "508", "own-403", "307", "strange", "no-member-401"],
)
def test_the_next_is_asked_if_a_member_gives_no_answer_of_upstream(fleet: Fleet, answer: Answer) -> None:
    digest, (owner, second, _) = fleet.blob()
    fleet.answers |= {owner: answer, second: word(LONG)}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert [member for member, _ in fleet.asked] == [owner, second] and fleet.upstream.requests == []


@pytest.mark.parametrize("is_public", [True, False], ids=["public", "private"])
def test_a_member_that_takes_this_one_for_a_client_sends_what_a_digest_proves(fleet: Fleet, is_public: bool) -> None:
    """It has another list. An answer to a login would tell about access, which it has not checked for a member."""
    digest, (owner, second, _) = fleet.blob()
    fleet.answers |= {owner: lambda question: ScriptedResponse(200, LONG), second: word(LONG)}
    credential = None if is_public else ClientCredential("Bearer token")
    assert read(fleet, fleet.run(fleet.get(blob_path(digest), credential=credential))) == LONG
    assert [member for member, _ in fleet.asked] == ([owner] if is_public else [owner, second])
    assert fleet.members.is_down(owner) is not is_public


def test_a_member_that_waits_for_another_one_is_not_down(fleet: Fleet) -> None:
    digest, (owner, second, _) = fleet.blob()
    fleet.answers |= {owner: word(LONG, 508, by="own"), second: word(LONG)}
    fleet.run(fleet.get(blob_path(digest))).abort()
    assert not fleet.members.is_down(owner)


def test_upstream_is_asked_after_three_members_have_failed(fleet: Fleet) -> None:
    digest, others = fleet.blob()
    fleet.answers = dict.fromkeys(others, fail(UpstreamTimeout("silent")))
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert len(fleet.asked) == 3 and len(fleet.upstream.requests) == 1
    fleet.run(fleet.get(blob_path(digest))).abort()
    assert len(fleet.asked) == 3  # they are left alone


@pytest.mark.parametrize("status", [204, 304, 401, 403, 404, 416, 429, 502, 504, 999])
def test_a_members_word_that_upstream_refuses_or_fails_is_no_answer(fleet: Fleet, status: int) -> None:
    """Upstream is asked, and no other member: most probably it is so. A member that is wrong is left alone."""
    digest, (owner, *_) = fleet.blob()
    fleet.answers[owner] = word(LONG, status, retry_after="3600", www_authenticate="Basic realm=evil")
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert len(fleet.asked) == 1 and len(fleet.upstream.requests) == 1 and fleet.members.is_down(owner)


@pytest.mark.parametrize("status", [401, 404, 502])
def test_a_member_that_is_right_about_upstream_is_not_down(fleet: Fleet, status: int) -> None:
    digest, (owner, *_) = fleet.blob()
    fleet.answers[owner] = word(LONG, status)
    fleet.upstream.on("GET", "", respond_with(status, marked="upstream"))
    response = fleet.run(fleet.get(blob_path(digest)))
    assert (response.status, response.headers.get("marked")) == (status, "upstream")
    assert not fleet.members.is_down(owner)


def test_a_stale_copy_proves_nothing(fleet: Fleet) -> None:
    digest, (owner, *_) = fleet.blob()
    fleet.answers[owner] = word(LONG, x_cache="STALE", x_cache_because="registry.example: timed out")
    fleet.upstream.go_down()
    with pytest.raises(UpstreamUnreachable):
        fleet.run(fleet.get(blob_path(digest)))
    assert not fleet.members.is_down(owner)


def test_a_short_blob_with_wrong_content_comes_from_the_next(fleet: Fleet) -> None:
    digest, (owner, second, _) = fleet.blob(b"right")
    fleet.answers |= {owner: sized(b"wrong", 5), second: word(b"right")}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == b"right"
    fleet.reactor.advance(599)
    assert fleet.members.is_down(owner)


def test_a_manifest_that_breaks_off_comes_from_the_next(fleet: Fleet) -> None:
    manifest = MANIFEST
    fleet.repository.put_manifest(manifest, "latest")
    owner, second, _ = fleet.order(repository_key(REGISTRY.host, NAME))

    def break_off(question: Question) -> ScriptedResponse:
        response: ScriptedResponse = word(manifest, sent=0)(question)
        response.send(3)
        response.disconnect()
        return response

    fleet.answers |= {owner: break_off, second: word(manifest)}
    assert read(fleet, fleet.run(fleet.get(f"/v2/{NAME}/manifests/latest"))) == manifest
    assert fleet.members.is_down(owner)


def download(fleet: Fleet, digest: Digest) -> tuple[ResumableGet, Any]:
    repository = UpstreamRepository(REGISTRY, NAME, Anonymous())
    source = ResumableGet(fleet.reactor, fleet.client, repository, digest)

    async def read_to_end() -> bytes:
        await source.open()
        data = b""
        while pieces := await source.read():
            data += b"".join(pieces)
        return data

    return source, read_to_end()


@pytest.mark.parametrize("error", [UpstreamTimeout("silent for 5 s"), UpstreamBroken("reset")], ids=["stall", "reset"])
def test_a_download_goes_on_at_the_next_member_where_it_was(fleet: Fleet, error: Exception) -> None:
    digest, (owner, second, _) = fleet.blob()

    def break_off(question: Question) -> ScriptedResponse:
        response: ScriptedResponse = word(LONG, sent=0)(question)
        response.send(100_000)
        response.disconnect(error)
        return response

    fleet.answers |= {owner: break_off, second: word(LONG)}
    source, work = download(fleet, digest)
    assert fleet.run(work, 10) == LONG
    assert source.is_from_member and fleet.questions[1].headers.get("range") == "bytes=99999-"
    assert fleet.members.is_down(owner) and not fleet.members.is_down(second)
    assert fleet.waits.member(f"{REGISTRY.host} {digest}") is None


def test_a_download_goes_on_upstream_if_the_next_is_this_daemon(fleet: Fleet) -> None:
    digest, others = fleet.blob()
    owner, *_ = others
    for other in others[1:]:
        fleet.members.failed(other, "refused")

    def break_off(question: Question) -> ScriptedResponse:
        response: ScriptedResponse = word(LONG, sent=0)(question)
        response.send(100_000)
        response.disconnect()
        return response

    fleet.answers[owner] = break_off
    _, work = download(fleet, digest)
    assert fleet.run(work, 10) == LONG
    assert [request.range for request in fleet.upstream.requests] == ["bytes=99999-"]


def test_members_that_sent_wrong_content_are_not_asked_again(fleet: Fleet) -> None:
    digest, (owner, second, _) = fleet.blob()
    fleet.answers |= {owner: sized(LONG[::-1], len(LONG)), second: word(LONG)}
    source, work = download(fleet, digest)
    assert fleet.run(work, 10) == LONG[::-1]
    source.report_mismatch()  # as `BlobDownload` does
    fleet.run(fleet.get(blob_path(digest))).abort()
    assert fleet.asked[-1][0] == second


def test_what_this_daemon_waits_for_is_known_until_the_body_has_ended(fleet: Fleet) -> None:
    digest, (owner, *_) = fleet.blob()
    fleet.answers[owner] = word(LONG, sent=0)
    response = fleet.run(fleet.get(blob_path(digest)))
    assert fleet.waits.member(f"{REGISTRY.host} {digest}") == owner
    response.abort()
    assert fleet.waits.member(f"{REGISTRY.host} {digest}") is None
    assert fleet.asked[0][1].kind is HopKind.OWNER


def named(relay: str, by: str = "own") -> Answer:
    def answer(question: Question) -> ScriptedResponse:
        fields = {"x-fleet-answer": by, "x-fleet-relay": relay, "location": "http://evil.example/"}
        return ScriptedResponse(307, b"", fields)

    return answer


def test_a_member_that_has_enough_others_names_one_of_them(fleet: Fleet) -> None:
    digest, (owner, second, third) = fleet.blob()
    fleet.answers |= {owner: named(third), third: word(LONG)}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert [(member, hop.kind) for member, hop in fleet.asked] == [(owner, HopKind.OWNER), (third, HopKind.RELAY)]
    assert second not in dict(fleet.asked)


@pytest.mark.parametrize("relay", ["evil.example:80", "10.9.9.9:3128", "", "me"])
def test_nobody_is_sent_anywhere_but_to_a_member(fleet: Fleet, relay: str) -> None:
    digest, (owner, second, _) = fleet.blob()
    fleet.answers |= {owner: named(fleet.members.me if relay == "me" else relay), second: word(LONG)}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert {member for member, _ in fleet.asked} == {owner, second}


def test_the_owner_is_asked_again_if_a_relay_fails(fleet: Fleet) -> None:
    digest, (owner, _, third) = fleet.blob()
    answers = iter([named(third), word(LONG)])
    fleet.answers |= {owner: lambda question: next(answers)(question), third: fail(UpstreamUnreachable("gone"))}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    kinds = [(member, hop.kind) for member, hop in fleet.asked]
    assert kinds == [(owner, HopKind.OWNER), (third, HopKind.RELAY), (owner, HopKind.LAST)]


def test_relays_that_name_each_other_end(fleet: Fleet) -> None:
    digest, others = fleet.blob()
    for member, other in zip(others, [*others[1:], others[0]], strict=True):
        fleet.answers[member] = named(other)
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert len(fleet.upstream.requests) == 1 and len(fleet.asked) <= 18


def own_blob(fleet: Fleet) -> tuple[Digest, str]:
    """Put a blob upstream that this daemon owns. Return its digest, and the former owner."""
    digest = fleet.repository.put_blob(LONG)
    fleet.members.use(MEMBERS, "")
    owner, former, *_ = fleet.members.ranked(blob_key(digest))
    fleet.members.use(MEMBERS, owner)
    fleet.client = fleet.owner_client
    return digest, former


def test_a_new_owner_asks_the_former_one_first(fleet: Fleet) -> None:
    digest, former = own_blob(fleet)
    fleet.answers[former] = word(LONG)
    response = fleet.run(fleet.get(blob_path(digest)))
    assert fleet.waits.member(f"{REGISTRY.host} {digest}") is None  # the former one does not wait, so nobody else does
    assert read(fleet, response) == LONG
    assert [hop.kind for _, hop in fleet.asked] == [HopKind.FORMER] and fleet.upstream.requests == []


def test_a_former_owner_without_the_blob_is_not_down(fleet: Fleet) -> None:
    digest, former = own_blob(fleet)
    fleet.answers[former] = word(LONG, 504, by="own")
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert not fleet.members.is_down(former) and len(fleet.upstream.requests) == 1


def test_an_owner_of_old_asks_nobody(fleet: Fleet) -> None:
    digest, _ = own_blob(fleet)
    fleet.reactor.advance(86400)
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert fleet.asked == []


def test_the_former_owner_is_not_asked_for_private_content(fleet: Fleet) -> None:
    digest, _ = own_blob(fleet)
    response = fleet.run(fleet.get(blob_path(digest), credential=ClientCredential("Bearer token")))
    assert read(fleet, response) == LONG and fleet.asked == []


def test_upstream_is_asked_if_members_wait_for_each_other(fleet: Fleet) -> None:
    """However it came to that: each of them answers, and sends nothing."""
    digest, others = fleet.blob()

    def stall(question: Question) -> ScriptedResponse:
        response: ScriptedResponse = word(LONG, sent=0)(question)
        response.disconnect(UpstreamTimeout("received nothing"))
        return response

    fleet.answers = dict.fromkeys(others, stall)
    _, work = download(fleet, digest)
    assert fleet.run(work, 20) == LONG
    assert len(fleet.upstream.requests) == 1 and len(fleet.asked) == 2


def test_a_member_that_never_answers_is_left(fleet: Fleet) -> None:
    """It sends a byte of the head, or an interim response, just often enough for the time-outs."""
    digest, (owner, second, _) = fleet.blob()
    fleet.answers |= {owner: lambda question: Deferred(), second: word(LONG)}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)), 200)) == LONG
    assert fleet.members.states()[owner].startswith("it has not begun to answer within 40 s")
    assert MAX_PROGRESS < 40
    assert fleet.waits.member(f"{REGISTRY.host} {digest}") is None


def test_a_manifest_that_comes_too_slowly_comes_from_the_next(fleet: Fleet) -> None:
    manifest = MANIFEST
    fleet.repository.put_manifest(manifest, "latest")
    owner, second, _ = fleet.order(repository_key(REGISTRY.host, NAME))
    slow: list[ScriptedResponse] = []

    def drip(question: Question) -> ScriptedResponse:
        response: ScriptedResponse = word(manifest, sent=1)(question)
        slow.append(response)
        return response

    fleet.answers |= {owner: drip, second: word(manifest)}
    assert read(fleet, fleet.run(fleet.get(f"/v2/{NAME}/manifests/latest"), 200)) == manifest
    assert slow[0].aborted and fleet.members.is_down(owner)


def sized(data: bytes, length: int | None, status: int = 200, **fields: str) -> Answer:
    """Return an answer with fields of its own."""
    names = {name.replace("_", "-"): value for name, value in fields.items()}
    return lambda question: ScriptedResponse(status, data, {"x-fleet-answer": "upstream", **names}, length=length)


def part(value: str, data: bytes, length: int | None = -1, status: int = 206) -> Answer:
    return sized(data, len(data) if length == -1 else length, status, content_range=value)


BLOB_FAULTS = {
    "no length": sized(LONG, None),
    "a coding": sized(LONG, len(LONG), content_encoding="gzip"),
    "another digest": sized(LONG, len(LONG), docker_content_digest=str(Digest.of(b"other"))),
    "no digest": sized(LONG, len(LONG), docker_content_digest="sha256:xyz"),
    "206 to the whole": part(f"bytes 0-{len(LONG) - 1}/{len(LONG)}", LONG),
    "multipart": part("", LONG),
}
RANGE_FAULTS = {
    "200": sized(LONG, len(LONG)),
    "no Content-Range": sized(LONG[100:], len(LONG) - 100, 206),
    "from elsewhere": part(f"bytes 0-{len(LONG) - 1}/{len(LONG)}", LONG),
    "ends before": part(f"bytes 99-{len(LONG) - 2}/{len(LONG)}", LONG[99:-1]),
    "another length": part(f"bytes 99-{len(LONG) - 1}/{len(LONG)}", LONG[99:-1]),
    "no size": part(f"bytes 99-{len(LONG) - 1}/*", LONG[99:]),
    "contradiction": part(f"bytes 99-{len(LONG) - 1}/7", LONG[99:]),
    "no numbers": part("bytes a-b/c", LONG[99:]),
    "other units": part(f"items 99-{len(LONG) - 1}/{len(LONG)}", LONG[99:]),
}


@pytest.mark.parametrize("answer", BLOB_FAULTS.values(), ids=BLOB_FAULTS)
def test_a_blob_of_another_form_comes_from_the_next(fleet: Fleet, answer: Answer) -> None:
    digest, (owner, second, _) = fleet.blob()
    fleet.answers |= {owner: answer, second: word(LONG)}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert fleet.upstream.requests == [] and fleet.members.is_down(owner)


@pytest.mark.parametrize("answer", RANGE_FAULTS.values(), ids=RANGE_FAULTS)
@pytest.mark.parametrize("asked", ["bytes=99-", f"bytes=99-{len(LONG) - 1}", "bytes=99-99999999"])
def test_a_range_of_another_form_comes_from_the_next(fleet: Fleet, answer: Answer, asked: str) -> None:
    digest, (owner, second, _) = fleet.blob()
    fleet.answers |= {owner: answer, second: word(LONG)}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest), range=asked))) == LONG[99:]
    assert fleet.upstream.requests == [] and fleet.members.is_down(owner)


def test_a_short_range_of_a_long_blob_is_served(fleet: Fleet) -> None:
    """The last byte and the first one, as a check of access asks for them."""
    digest, (owner, *_) = fleet.blob()
    fleet.answers[owner] = word(LONG)
    for asked, start, stop in (("bytes=0-0", 0, 1), (f"bytes={len(LONG) - 1}-", len(LONG) - 1, len(LONG))):
        assert read(fleet, fleet.run(fleet.get(blob_path(digest), range=asked))) == LONG[start:stop]
    assert [question.is_clear for question in fleet.questions] == [False, True]  # a part is a proof of something


@pytest.mark.parametrize("size", [len(LONG), MAX_BLOB + 1], ids=["wrong", "right"])
def test_a_blob_that_the_cache_does_not_take_comes_from_upstream(fleet: Fleet, size: int) -> None:
    """A member that announces too much could go on for ever. If upstream says the same, it only has more room."""
    data = bytes(size)
    digest, (owner, *_) = fleet.blob(data)
    fleet.answers[owner] = sized(data, MAX_BLOB + 1)
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == data
    assert len(fleet.asked) == 1 and len(fleet.upstream.requests) == 1
    assert fleet.members.is_down(owner) == (size != MAX_BLOB + 1)


def test_only_some_fields_of_a_member_count(fleet: Fleet) -> None:
    digest, (owner, *_) = fleet.blob()
    fleet.answers[owner] = word(
        LONG, ratelimit_remaining="0;w=21600", www_authenticate="Basic realm=evil", set_cookie="a=b", location="/evil",
        docker_distribution_api_version="evil", x_cache="HIT", warning="299 - evil", link="</evil>; rel=next",
    )  # fmt: skip
    response = fleet.run(fleet.get(blob_path(digest)))
    assert {name for name, _ in response.headers} == {"content-length", "content-type", "docker-content-digest"}
    assert read(fleet, response) == LONG


SIGNED = b'{"schemaVersion": 1, "fsLayers": [], "signatures": []}'
MANIFEST_FAULTS = {
    "too long": sized(b"{" * (4 << 20) + b"}", None, docker_content_digest=str(Digest.of(b""))),
    "no digest": sized(MANIFEST, len(MANIFEST)),
    "another digest": sized(MANIFEST, len(MANIFEST), docker_content_digest=str(Digest.of(b"other"))),
    "a page": word(b"<html>"),
    "nothing": word(b""),
    "another document": word(b'{"errors": []}'),
    "a list": word(b"[]"),
    "a coding": word(MANIFEST, content_encoding="gzip"),
    "no length": sized(MANIFEST, None, docker_content_digest=str(Digest.of(MANIFEST))),
}


@pytest.mark.parametrize("answer", MANIFEST_FAULTS.values(), ids=MANIFEST_FAULTS)
def test_a_tag_of_another_form_comes_from_the_next(fleet: Fleet, answer: Answer) -> None:
    fleet.repository.put_manifest(MANIFEST, "latest")
    owner, second, _ = fleet.order(repository_key(REGISTRY.host, NAME))
    fleet.answers |= {owner: answer, second: word(MANIFEST)}
    assert read(fleet, fleet.run(fleet.get(f"/v2/{NAME}/manifests/latest"))) == MANIFEST
    assert fleet.upstream.requests == [] and fleet.members.is_down(owner)


def test_the_head_of_a_tag_needs_a_digest(fleet: Fleet) -> None:
    digest = fleet.repository.put_manifest(MANIFEST, "latest")
    owner, second, _ = fleet.order(repository_key(REGISTRY.host, NAME))
    fleet.answers |= {owner: sized(b"", 100), second: word(MANIFEST)}
    response = fleet.run(fleet.get(f"/v2/{NAME}/manifests/latest", "HEAD"))
    assert response.headers.get("docker-content-digest") == str(digest) and fleet.members.is_down(owner)


def test_a_manifest_that_its_digest_does_not_prove_comes_from_upstream(fleet: Fleet) -> None:
    """The digest of a signed manifest of schema 1 is that of a part of it."""
    fleet.repository.put_manifest(SIGNED, "old")
    owner, *_ = fleet.order(repository_key(REGISTRY.host, NAME))
    fleet.answers[owner] = word(SIGNED, docker_content_digest=str(Digest.of(b"payload")))
    assert read(fleet, fleet.run(fleet.get(f"/v2/{NAME}/manifests/old"))) == SIGNED
    assert len(fleet.upstream.requests) == 1 and not fleet.members.is_down(owner)


def test_a_member_that_answers_and_never_sends_is_left_alone_longer_each_time(fleet: Fleet) -> None:
    """It answers each time, which does not make it one that works."""
    digest, (owner, *others) = fleet.blob()
    for other in others:
        fleet.members.distrusted(other, "not this one", 1e9)

    def stall(question: Question) -> ScriptedResponse:
        response: ScriptedResponse = word(LONG, sent=10)(question)
        response.disconnect(UpstreamTimeout("received nothing"))
        return response

    fleet.answers[owner] = stall
    for delay in (1, 2, 5, 10, 30, 30):
        response = fleet.run(fleet.get(blob_path(digest)))
        with pytest.raises(UpstreamTimeout):
            fleet.run(response.read_pieces(1 << 20, 0.0))
            fleet.run(response.read_pieces(1 << 20, 0.0))
        fleet.reactor.advance(delay - 0.01)
        assert fleet.members.is_down(owner), delay
        fleet.reactor.advance(0.02)
        assert not fleet.members.is_down(owner), delay
    fleet.answers[owner] = word(LONG)
    response = fleet.run(fleet.get(blob_path(digest)))
    assert fleet.members.states()[owner] != "up"  # it has only begun
    assert read(fleet, response) == LONG
    assert fleet.members.states()[owner] == "up"


def test_a_member_that_sends_others_in_circles_is_left_alone(fleet: Fleet) -> None:
    digest, (owner, second, third) = fleet.blob()
    fleet.answers |= {owner: named(third), third: word(LONG, 504, by="own"), second: word(LONG)}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert fleet.members.is_down(owner) and not fleet.members.is_down(third)


def test_a_relay_cannot_refuse(fleet: Fleet) -> None:
    digest, (owner, _, third) = fleet.blob()
    answers = iter([named(third), word(LONG)])
    fleet.answers |= {owner: lambda question: next(answers)(question), third: word(LONG, 404)}
    assert read(fleet, fleet.run(fleet.get(blob_path(digest)))) == LONG
    assert fleet.upstream.requests == []


@pytest.mark.parametrize("size", [len(LONG) - 1, len(LONG) + 1], ids=["shorter", "longer"])
def test_the_next_member_cannot_change_the_size_of_a_download(fleet: Fleet, size: int) -> None:
    digest, (owner, second, third) = fleet.blob()

    def break_off(question: Question) -> ScriptedResponse:
        response: ScriptedResponse = word(LONG, sent=0)(question)
        response.send(100_000)
        response.disconnect()
        return response

    other = LONG[:-1] if size < len(LONG) else LONG + b"x"
    fleet.answers |= {owner: break_off, second: word(other), third: word(LONG)}
    _, work = download(fleet, digest)
    assert fleet.run(work, 10) == LONG
    assert fleet.members.is_down(second) and fleet.upstream.requests == []


def test_upstreams_word_about_the_size_shows_that_a_member_was_wrong(fleet: Fleet) -> None:
    digest, others = fleet.blob()

    def claim(question: Question) -> ScriptedResponse:
        response: ScriptedResponse = word(LONG + b"x", sent=0, docker_content_digest=str(digest))(question)
        response.headers = response.headers.without("docker-content-digest")
        response.send(100_000)
        response.disconnect()
        return response

    fleet.answers = dict.fromkeys(others, claim)
    _, work = download(fleet, digest)
    with pytest.raises(UpstreamBroken, match="and then"):
        fleet.run(work, 60)
    fleet.reactor.advance(400)
    assert any(fleet.members.is_down(member) for member in others)  # for ten minutes
