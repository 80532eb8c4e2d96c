"""The client of the cache for manifests and blobs in a fleet: it asks the owner of the content before upstream.

A member is asked as upstream would be, and serves as it serves a client: it checks access with the credential that it
is shown, joins its download, or begins one from upstream. If it fails, the next in the order is asked, at last upstream
itself. A download resumes there by Range, because `ResumableGet` sends each of its requests through here.

Only content counts as an answer. If a member says that upstream refuses or fails, upstream is asked, and its own word
decides: a member may be the only one that upstream does not answer, and nothing is forgotten because of it.

Blobs of clients without a credential come in the clear, because their digest proves them. Everything else comes over
TLS with the CA of the fleet.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Hashable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from attrs import field, frozen
from twisted.internet.defer import Deferred, TimeoutError
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.upstream import DirectResponse, RegistryClient, UpstreamResponse, WrappedResponse
from dockerproxy.errors import CertificateRejected, ManifestInvalid, NotCached, UpstreamBroken, UpstreamError
from dockerproxy.fleet.clocks import MemberClocks
from dockerproxy.fleet.hop import ANSWER_FIELD, OWN_WORD, RELAY_FIELD, UPSTREAM_WORD, Hop, HopKind
from dockerproxy.fleet.members import Members
from dockerproxy.fleet.question import Question, kept_fields, question_of
from dockerproxy.fleet.waits import Waits
from dockerproxy.http.headers import Headers
from dockerproxy.http.stream import ClientBuffers
from dockerproxy.oci.manifests import DOCKER_SCHEMA1_SIGNED, MAX_MANIFEST, media_type_of
from dockerproxy.oci.names import Digest, Registry
from dockerproxy.oci.routes import Kind
from dockerproxy.thread_pool import ContentParser
from dockerproxy.upstream.registry_request import RegistryRequest

MAX_PROGRESS = 30.0
"""Seconds for which a member says that it waits for upstream. After that it is asked no more, and upstream is."""

_MAX_TRIES = 3  # members that may fail, each after some seconds, before upstream itself is asked
_SHORT = 64 * 1024  # bytes; a shorter response is read as a whole, so that another member can take over
_MAX_ANSWER_TIME = MAX_PROGRESS + 10.0  # seconds until a member has begun to answer
_MAX_SHORT_TIME = 20.0  # seconds from then on until a short response, or a manifest, is here
_MAX_DISCARD_TIME = 1.0  # seconds to read a refusal, so that its connection can be used again
_DISTRUST = 600.0  # seconds for which a member that sent wrong content is left alone
_MAX_RELAYS = 3  # that may fail before the next member is asked
_MAX_STARVED = 1000
_STARVED_TTL = 60.0  # seconds for which upstream is asked for content that members have failed to send
_MAX_STALLS = 2  # responses in succession that brought nothing
_NEW_LIST = 86400.0  # seconds for which an owner may be a new one

log = Logger()

T = TypeVar("T")


class MemberTransport(Protocol):
    """Sends requests to members."""

    async def ask(self, member: str, question: Question, hop: Hop) -> UpstreamResponse:
        """Return the response of `member`, with any status. Raise `UpstreamError`."""


@frozen
class MemberSender:
    """A member that sends content. Equal ones are the same member."""

    name: str
    _members: Members = field(eq=False)

    def report_failure(self, error: UpstreamError) -> None:
        """Leave the member alone for a while, longer each time."""
        self.note_failure(error.message)

    def report_success(self) -> None:
        """Note that the member has sent all that it was asked for."""
        if self._members.worked(self.name):
            log.info("the member {member} answers again", member=self.name)

    def note_failure(self, reason: str) -> None:
        """Leave the member alone for a while, because of `reason`."""
        if self._members.failed(self.name, reason):
            log.warn("the member {member} is not asked for a while: {reason}", member=self.name, reason=reason)

    def report_other_ca(self, error: CertificateRejected) -> None:
        """Leave the member alone for ten minutes: administrators have to see to that."""
        # A member without that registry opens a tunnel to it, in which the registry's own certificate comes.
        self._distrust(
            f"{error.message}; CA_CRT_FILE and CA_KEY_FILE must be the same at all members, and so REGISTRIES"
        )

    def report_mismatch(self, digest: Digest) -> None:
        """Leave the member alone for ten minutes."""
        self._distrust(f"it sent content that does not match {digest}")

    def _distrust(self, reason: str) -> None:
        self._members.distrusted(self.name, reason, _DISTRUST)
        log.error("the member {member} is not asked for ten minutes: {reason}", member=self.name, reason=reason)


class PeerMeter(Protocol):
    """Counts the bytes between members."""

    def count_peer_bytes(self, direction: str, size: int) -> None:
        """Count `size` bytes, which were ``received`` or ``sent``."""


class RelayNamed(Exception):
    """A member sends a blob to enough others already, and names one of those."""

    def __init__(self, member: str) -> None:
        super().__init__(member)
        self.member = member


class MemberFailed(Exception):
    """A member gave no usable answer. The message is a clause that says why. If `is_down`, it is left alone."""

    def __init__(self, reason: str, *, is_down: bool = True) -> None:
        super().__init__(reason)
        self.is_down = is_down


class MemberRefused(Exception):
    """A member does not have the content, or not so that it is proven, and upstream decides.

    `reason` is a clause that says why. `is_refuted` tells by upstream's own response whether that was wrong.
    """

    def __init__(
        self,
        sender: MemberSender,
        reason: str,
        is_refuted: Callable[[UpstreamResponse], bool] = lambda response: False,
    ) -> None:
        super().__init__(reason)
        self._sender = sender
        self._reason = reason
        self._is_refuted = is_refuted

    def compare(self, response: UpstreamResponse) -> None:
        """Leave the member alone if upstream's `response` shows that it was wrong."""
        if self._is_refuted(response):
            self._sender.note_failure(f"{self._reason}, and upstream answers {response.status}")


class MemberClient:
    """Asks single members. `clock` is the reactor. `max_blob_size` is that of a blob that the cache takes, in bytes."""

    def __init__(
        self,
        clock: Any,
        members: Members,
        transport: MemberTransport,
        waits: Waits,
        meter: PeerMeter,
        parser: ContentParser,
        max_blob_size: int,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._members = members
        self._transport = transport
        self._waits = waits
        self._meter = meter
        self._parser = parser
        self._max_blob_size = max_blob_size
        self._clocks = MemberClocks(members.now, wall_clock)
        self._stalls: BoundedDict[str, int] = BoundedDict(_MAX_STARVED, ttl=_STARVED_TTL, clock=members.now)

    def is_starved(self, question: Question) -> bool:
        """Return whether members sent nothing of it several times, perhaps because they wait for each other."""
        return (self._stalls.get(question.wait_key) or 0) >= _MAX_STALLS

    def _note_end(self, key: str, end_wait: Callable[[], None], *, has_failed: bool, received: int) -> None:
        """End a wait, and note whether the response has brought anything but the byte at which it was resumed."""
        end_wait()
        if received > 1:
            self._stalls.pop(key)
        elif has_failed:
            self._stalls[key] = (self._stalls.get(key) or 0) + 1

    async def try_ask(self, member: str, question: Question, kind: HopKind) -> UpstreamResponse | None:
        """Return the answer of `member`, None if it has no usable one. Raise `RelayNamed`, `MemberRefused`."""
        try:
            return await self._ask(member, question, kind)
        except MemberFailed as failure:
            if failure.is_down:
                MemberSender(member, self._members).note_failure(str(failure))
            return None

    async def ask_owner(self, member: str, question: Question) -> UpstreamResponse | None:
        """Return the answer of `member`, or of a relay that it names; None if there is no usable one.

        Raise `MemberRefused`.
        """
        kind = HopKind.OWNER
        for _ in range(_MAX_RELAYS):
            try:
                return await self.try_ask(member, question, kind)
            except RelayNamed as named:
                relay, kind = named.member, HopKind.LAST
            is_usable = relay in self._members.names and relay != self._members.me
            if is_usable and not self._members.is_down(relay):
                # A relay has what it is asked for, so it names none, and refuses nothing.
                with suppress(RelayNamed, MemberRefused):
                    answer = await self.try_ask(relay, question, HopKind.RELAY)
                    if answer is not None:
                        return answer
        MemberSender(member, self._members).note_failure(
            f"it has sent this daemon to others {_MAX_RELAYS} times, which do not have {question.reference}"
        )
        return None

    async def _ask(self, member: str, question: Question, kind: HopKind) -> UpstreamResponse:
        """Return the answer of `member`. Raise `MemberFailed`, `RelayNamed`, `MemberRefused`."""
        # The former owner sends only what it has, so that nobody waits for it.
        is_wait = kind is not HopKind.FORMER
        end_wait = self._waits.begin(question.wait_key, member) if is_wait else _end_nothing
        try:
            answer = await self._get_answer(member, question, kind)
        except BaseException:
            end_wait()
            raise
        sender = MemberSender(member, self._members)
        if isinstance(answer, BufferedResponse) or question.method == "HEAD":
            sender.report_success()
        if isinstance(answer, BufferedResponse):
            end_wait()
            return answer
        return MemberResponse(answer, sender, self._meter, partial(self._note_end, question.wait_key, end_wait))

    async def _get_answer(self, member: str, question: Question, kind: HopKind) -> UpstreamResponse:
        """Return the answer of `member`, read as a whole if it is short; see `_ask`."""
        request = self._transport.ask(member, question, Hop(self._members.me, question.login, kind))
        try:
            response = await self._within(_MAX_ANSWER_TIME, request, "begun to answer")
        except CertificateRejected as error:
            MemberSender(member, self._members).report_other_ca(error)
            raise MemberFailed(error.message) from None
        except UpstreamError as error:
            raise MemberFailed(error.message) from None
        self._clocks.compare(member, response.headers.get("date"))
        try:
            self._check(MemberSender(member, self._members), question, response)
            is_short = response.length is not None and response.length <= _SHORT
            if question.method == "GET" and (question.kind is Kind.MANIFEST or is_short):
                return await self._read(MemberSender(member, self._members), question, response)
            return response
        except (MemberFailed, MemberRefused, RelayNamed):
            with suppress(MemberFailed):
                await self._within(_MAX_DISCARD_TIME, response.discard(), "ended")
            raise
        except BaseException:
            response.abort()
            raise

    async def _within(self, seconds: float, work: Coroutine[Any, Any, T], done: str) -> T:
        """Return the result of `work`. Raise `MemberFailed` if it takes longer, however often a byte arrives."""
        task: Deferred[T] = Deferred.fromCoroutine(work)
        task.addTimeout(seconds, self._clock)
        try:
            return await task
        except TimeoutError:
            raise MemberFailed(f"it has not {done} within {seconds:g} s, however slowly it sends") from None

    def _check(self, sender: MemberSender, question: Question, response: UpstreamResponse) -> None:
        """Raise `MemberFailed`, `RelayNamed` or `MemberRefused` unless `response` has the content."""
        word, relay = response.headers.get(ANSWER_FIELD.lower()), response.headers.get(RELAY_FIELD.lower())
        if response.status == 307 and word == OWN_WORD and relay is not None:
            raise RelayNamed(relay)
        # A member that has another list serves this daemon as a client. The digest proves the blob all the same,
        # and nobody waits in a circle: each member asks only those that are before it in the order for this key.
        is_client_answer = word is None and question.is_clear and _is_success(response)
        if word != UPSTREAM_WORD and not is_client_answer:
            raise _failure(response.status, word)
        if response.status not in (200, 206):
            raise MemberRefused(sender, f"it said that upstream answers {response.status}", _is_success)
        if response.headers.get("x-cache") == "STALE":
            raise MemberRefused(sender, "it said that upstream does not answer", _is_success)
        if question.method == "HEAD" and response.length is None:
            raise MemberRefused(sender, "it does not know the size")
        fault = question.fault(response)
        if fault:
            raise MemberFailed(fault)
        # Nothing could be verified before clients get it, and the member could go on for as long as it likes.
        length = response.length
        if question.kind is Kind.BLOB and length is not None and length > self._max_blob_size:
            raise MemberRefused(
                sender,
                f"it said that {question.reference} has {length} bytes",
                lambda upstream: _is_success(upstream) and upstream.length != length,
            )

    async def _read(self, sender: MemberSender, question: Question, response: UpstreamResponse) -> BufferedResponse:
        """Read a response, and check it if it is the whole content."""
        try:
            content = await self._within(_MAX_SHORT_TIME, response.read_all(MAX_MANIFEST), "sent all of its answer")
        except UpstreamError as error:
            raise MemberFailed(error.message) from None
        self._meter.count_peer_bytes("received", len(content))
        if question.kind is Kind.MANIFEST:
            try:
                media_type = await self._parser.parse(media_type_of, content, client=sender.name)
            except ManifestInvalid as error:
                raise MemberFailed(f"it sent a manifest that is none: {error.message}") from None
            if media_type == DOCKER_SCHEMA1_SIGNED:  # of which the digest covers a part only
                raise MemberRefused(sender, "it sent content that its digest does not prove")
        digest = question.content_digest(response) if response.status == 200 else None
        if digest is not None and Digest.of(content, digest.algorithm) != digest:
            sender.report_mismatch(digest)
            raise MemberFailed(f"it sent content that does not match {digest}")
        return BufferedResponse(response, sender, content)


class ContentClient(ABC):
    """A `RegistryClient` that asks members about some GETs and HEADs of content, and `upstream` everything else."""

    def __init__(self, upstream: RegistryClient, members: Members, client: MemberClient) -> None:
        self._upstream = upstream
        self._members = members
        self._client = client

    @abstractmethod
    async def _ask_members(self, question: Question) -> UpstreamResponse | None:
        """Return the answer of a member, None if upstream is to be asked. Raise `MemberRefused`: the same."""

    async def request(self, request: RegistryRequest) -> UpstreamResponse:
        """Return the response of a member or of upstream; see `UpstreamClient.request`."""
        question = question_of(request)
        refusal: MemberRefused | None = None
        try:
            answer = None if question is None else await self._ask_members(question)
        except MemberRefused as refused:
            answer, refusal = None, refused
        if answer is not None:
            return answer
        response = await self._upstream.request(request)
        if refusal is not None:
            refusal.compare(response)
        return response

    async def send(
        self,
        method: str,
        registry: Registry,
        path: str,
        headers: Headers,
        body: Any = None,
        *,
        client_connection: Hashable = None,
    ) -> DirectResponse:
        """Send a request as it is; see `UpstreamClient.send`."""
        return await self._upstream.send(method, registry, path, headers, body, client_connection=client_connection)


class FleetUpstream(ContentClient):
    """The client of the cache for clients: it asks the owner of the content, and those after it if that fails."""

    async def _ask_members(self, question: Question) -> UpstreamResponse | None:
        if not self._members.me or self._client.is_starved(question):  # nobody counts a stranger as a member
            return None
        for member in self._members.ranked(question.key)[:_MAX_TRIES]:
            if member == self._members.me:
                return None
            answer = await self._client.ask_owner(member, question)
            if answer is not None:
                return answer
        return None


class OwnerUpstream(ContentClient):
    """The client for content that this daemon owns. A new owner asks the former one first, which may have it."""

    async def _ask_members(self, question: Question) -> UpstreamResponse | None:
        if not question.is_clear or question.method != "GET" or not self._members.has_changed_within(_NEW_LIST):
            return None
        former = self._members.former_owner(question.key)
        if former is None or self._client.is_starved(question):
            return None
        with suppress(RelayNamed, MemberRefused):
            return await self._client.try_ask(former, question, HopKind.FORMER)
        return None


class NoUpstream:
    """The client of a cache that serves only what it has, or is getting."""

    async def request(self, request: RegistryRequest) -> UpstreamResponse:
        raise NotCached("this member does not have it")

    async def send(self, method: str, registry: Registry, path: str, *options: Any, **more: Any) -> DirectResponse:
        raise NotCached("this member does not have it")


class OnEnd(Protocol):
    """Called once when nobody reads a response any more, with the bytes that it brought."""

    def __call__(self, *, has_failed: bool, received: int) -> None: ...


class MemberResponse(WrappedResponse):
    """The body of a member's response. `on_end` is called when nobody reads it any more.

    A member that sends nothing for FLEET_TIMEOUT has failed, by the time-outs of the transport.
    """

    def __init__(self, response: UpstreamResponse, sender: MemberSender, meter: PeerMeter, on_end: OnEnd) -> None:
        self.status, self.length, self.headers = response.status, response.length, kept_fields(response.headers)
        self.sender: MemberSender = sender
        self._response = response
        self._meter = meter
        self._on_end: OnEnd | None = on_end
        self._received = 0

    def _end(self, *, has_failed: bool = False) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(has_failed=has_failed, received=self._received)
            if self._received == self.length:
                self.sender.report_success()

    async def read_chunk(self) -> bytes:
        return b"".join(await self.read_pieces(1, 0.0))

    async def read_pieces(self, at_least: int, timeout: float) -> list[bytes]:
        try:
            pieces = await self._response.read_pieces(at_least, timeout)
        except UpstreamError as error:
            self._end(has_failed=True)
            self.sender.report_failure(error)
            raise
        if not pieces:
            self._end()
        size = sum(map(len, pieces))
        self._received += size
        self._meter.count_peer_bytes("received", size)
        return pieces

    async def read_all(self, limit: int, digest: Digest | None = None) -> bytes:
        try:
            content = await self._response.read_all(limit, digest)
            self._received += len(content)
        finally:
            self._end()
        self._meter.count_peer_bytes("received", len(content))
        return content

    async def discard(self) -> None:
        self._end()
        await self._response.discard()

    def abort(self) -> None:
        self._end()
        self._response.abort()


class BufferedResponse(UpstreamResponse):
    """A member's response that has been read."""

    def __init__(self, response: UpstreamResponse, sender: MemberSender, content: bytes) -> None:
        self.status, self.length, self.headers = response.status, len(content), kept_fields(response.headers)
        self.sender: MemberSender = sender
        self._content = content

    def limit_read_ahead(self, size: int) -> None:
        """Do nothing, because nothing is to come."""

    def count_for(self, buffers: ClientBuffers) -> None:
        """Do nothing, because the content is short."""

    async def read_chunk(self) -> bytes:
        content, self._content = self._content, b""
        return content

    async def read_pieces(self, at_least: int, timeout: float) -> list[bytes]:
        content = await self.read_chunk()
        return [content] if content else []

    async def read_all(self, limit: int, digest: Digest | None = None) -> bytes:
        content = await self.read_chunk()
        if len(content) > limit:
            raise UpstreamBroken(f"the response of a member exceeds {limit} bytes")
        return content

    async def discard(self) -> None:
        self._content = b""

    def abort(self) -> None:
        self._content = b""


def _end_nothing() -> None:
    """End no wait."""


def _is_success(response: UpstreamResponse) -> bool:
    return response.status in (200, 206)


def _failure(status: int, word: str | None) -> MemberFailed:
    """Return why a response with `status` is not upstream's word, which is `word`."""
    if word == OWN_WORD and status == 508:
        return MemberFailed("it waits for a member itself", is_down=False)
    if word == OWN_WORD and status >= 400:  # of which 429 and 503 are about all of its content
        return MemberFailed(f"it answered {status}", is_down=status in (429, 503))
    if word is None:
        return MemberFailed(
            f"it does not count this daemon as a member (status {status}); FLEET must be the same at all members, and"
            " ALLOW_CLIENTS must have their addresses"
        )
    return MemberFailed(f"it answered {status} in nobody's word")
