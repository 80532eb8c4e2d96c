"""The client of the cache for manifests and blobs in a fleet: it asks the owner of the content before upstream.

A member is asked as upstream would be, and serves as it serves a client: it checks access with the credential that it
is shown, joins its download, or begins one from upstream. If it fails, the next in the order is asked, at last upstream
itself. A download resumes there by Range, because `ResumableGet` sends each of its requests through here.

Blobs of clients without a credential come in the clear, because their digest proves them. Everything else comes over
TLS with the CA of the fleet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from attrs import field, frozen
from twisted.internet.defer import Deferred, TimeoutError
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.upstream import DirectResponse, RegistryClient, UpstreamResponse, WrappedResponse
from dockerproxy.errors import NotCached, RegistryError, UpstreamBroken, UpstreamError, UpstreamFailing
from dockerproxy.fleet.hop import ANSWER_FIELD, RELAY_FIELD, UPSTREAM_WORD, Hop, HopKind, HopLogin
from dockerproxy.fleet.members import Members, blob_key, repository_key
from dockerproxy.fleet.waits import Waits
from dockerproxy.http.headers import Headers
from dockerproxy.http.stream import ClientBuffers
from dockerproxy.oci.manifests import MAX_MANIFEST
from dockerproxy.oci.names import Digest, Reference, Registry, Repository
from dockerproxy.oci.routes import Kind, route
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, Credential

_NO_HEADERS = Headers()
_PASSED_FIELDS = frozenset({"accept", "range"})
_MAX_TRIES = 3  # members that may fail, each after some seconds, before upstream itself is asked
_SHORT = 64 * 1024  # bytes; a shorter response is read as a whole, so that another member can take over
_MAX_ANSWER_TIME = 150.0
"""Seconds until a member has begun a blob, or sent a manifest; an honest one reports progress for less time."""
_DISTRUST = 600.0  # seconds for which a member that sent wrong content is left alone
_UNUSABLE = frozenset({301, 302, 303, 307, 308, 429, 500, 503, 507, 508})
_MAX_RELAYS = 3  # that may fail before the next member is asked
_MAX_STARVED = 1000
_STARVED_TTL = 60.0  # seconds for which upstream is asked for content that members have failed to send
_MAX_STALLS = 2  # responses in succession that brought nothing
_NEW_LIST = 86400.0  # seconds for which an owner may be a new one

log = Logger()


@frozen
class Question:
    """A GET or HEAD of a manifest or blob that members can answer. `wait_key` is its key in `Waits`."""

    method: str
    registry: Registry
    path: str
    headers: Headers
    credential: Credential
    key: str
    wait_key: str
    kind: Kind
    reference: Reference

    @property
    def is_clear(self) -> bool:
        """Whether it may be asked without TLS."""
        return self.kind is Kind.BLOB and isinstance(self.credential, Anonymous)

    @property
    def login(self) -> HopLogin:
        if isinstance(self.credential, Anonymous):
            return HopLogin.NONE
        return HopLogin.CLIENT if isinstance(self.credential, ClientCredential) else HopLogin.CONFIGURED


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

    def note_failure(self, reason: str) -> None:
        """Leave the member alone for a while, because of `reason`."""
        if self._members.failed(self.name, reason):
            log.warn("the member {member} is not asked for a while: {reason}", member=self.name, reason=reason)

    def report_mismatch(self, digest: Digest) -> None:
        """Leave the member alone for ten minutes."""
        reason = f"it sent content that does not match {digest}"
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


class MemberClient:
    """Asks single members. `clock` is the reactor."""

    def __init__(
        self, clock: Any, members: Members, transport: MemberTransport, waits: Waits, meter: PeerMeter
    ) -> None:
        self._clock = clock
        self._members = members
        self._transport = transport
        self._waits = waits
        self._meter = meter
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
        """Return the answer of `member`, None if it has no usable one. Raise `RelayNamed`, or upstream's error."""
        try:
            return await self._ask(member, question, kind)
        except MemberFailed as failure:
            if failure.is_down:
                MemberSender(member, self._members).note_failure(str(failure))
            return None

    async def ask_owner(self, member: str, question: Question) -> UpstreamResponse | None:
        """Return the answer of `member`, or of a relay that it names; None if there is no usable one."""
        kind = HopKind.OWNER
        for _ in range(_MAX_RELAYS):
            try:
                return await self.try_ask(member, question, kind)
            except RelayNamed as named:
                relay, kind = named.member, HopKind.LAST
            is_usable = relay in self._members.names and relay != self._members.me
            if is_usable and not self._members.is_down(relay):
                with suppress(RelayNamed):  # which is none of ours, because a relay has what it is asked for
                    answer = await self.try_ask(relay, question, HopKind.RELAY)
                    if answer is not None:
                        return answer
        return None

    async def _ask(self, member: str, question: Question, kind: HopKind) -> UpstreamResponse:
        """Return the answer of `member`. Raise `MemberFailed`, `RelayNamed`, or upstream's error if it says so."""
        # The former owner sends only what it has, so that nobody waits for it.
        is_wait = kind is not HopKind.FORMER
        end_wait = self._waits.begin(question.wait_key, member) if is_wait else _end_nothing
        try:
            work = Deferred.fromCoroutine(self._get_answer(member, question, kind))
            work.addTimeout(_MAX_ANSWER_TIME, self._clock)
            answer = await work
        except TimeoutError:
            end_wait()
            raise MemberFailed(f"it has not answered within {_MAX_ANSWER_TIME:g} s, however slowly it sends") from None
        except BaseException:
            end_wait()
            raise
        if self._members.worked(member):
            log.info("the member {member} answers again", member=member)
        if isinstance(answer, BufferedResponse):
            end_wait()
            return answer
        on_end = partial(self._note_end, question.wait_key, end_wait)
        return MemberResponse(answer, MemberSender(member, self._members), self._meter, on_end)

    async def _get_answer(self, member: str, question: Question, kind: HopKind) -> UpstreamResponse:
        """Return the answer of `member`; see `_ask`."""
        try:
            response = await self._transport.ask(member, question, Hop(self._members.me, question.login, kind))
        except UpstreamError as error:
            raise MemberFailed(error.message) from None
        try:
            return await self._checked(member, question, response)
        except BaseException:
            response.abort()
            raise

    async def _checked(self, member: str, question: Question, response: UpstreamResponse) -> UpstreamResponse:
        """Return a response that is upstream's word, read as a whole if it is short."""
        word = response.headers.get(ANSWER_FIELD.lower())
        relay = response.headers.get(RELAY_FIELD.lower())
        if response.status == 307 and word is not None and relay is not None:
            await response.discard()
            raise RelayNamed(relay)
        if response.status in _UNUSABLE or word != UPSTREAM_WORD:
            await response.discard()
            raise _failure(response.status, word)
        if response.headers.get("x-cache") == "STALE":
            await response.discard()
            reason = response.headers.get("x-cache-because") or "upstream does not answer"
            raise UpstreamFailing(f"{question.registry}: {reason} (the member {member} has a stale copy)")
        is_short = response.length is not None and response.length <= _SHORT
        if question.method == "GET" and (question.kind is Kind.MANIFEST or is_short):
            return await self._read(member, question, response)
        return response

    async def _read(self, member: str, question: Question, response: UpstreamResponse) -> BufferedResponse:
        """Read a response, and check it if it is the whole content."""
        try:
            content = await response.read_all(MAX_MANIFEST)
        except UpstreamError as error:
            raise MemberFailed(error.message) from None
        self._meter.count_peer_bytes("received", len(content))
        digest = question.reference
        if response.status == 200 and isinstance(digest, Digest) and Digest.of(content, digest.algorithm) != digest:
            MemberSender(member, self._members).report_mismatch(digest)
            raise MemberFailed(f"it sent content that does not match {digest}")
        return BufferedResponse(response, MemberSender(member, self._members), content)


class ContentClient(ABC):
    """A `RegistryClient` that asks members about some GETs and HEADs of content, and `upstream` everything else."""

    def __init__(self, upstream: RegistryClient, members: Members, client: MemberClient) -> None:
        self._upstream = upstream
        self._members = members
        self._client = client

    @abstractmethod
    async def _ask_members(self, question: Question) -> UpstreamResponse | None:
        """Return the answer of a member, None if upstream is to be asked."""

    async def request(
        self,
        method: str,
        registry: Registry,
        path: str,
        *,
        name: Repository | None,
        credential: Credential,
        headers: Headers = _NO_HEADERS,
        body: Any = None,
        actions: str = "pull",
        follow: bool = True,
    ) -> UpstreamResponse:
        """Return the response of a member or of upstream; see `UpstreamClient.request`."""
        if method in ("GET", "HEAD") and body is None:
            question = _question(method, registry, path, headers, credential)
            response = None if question is None else await self._ask_members(question)
            if response is not None:
                return response
        return await self._upstream.request(
            method, registry, path,
            name=name, credential=credential, headers=headers, body=body, actions=actions, follow=follow,
        )  # fmt: skip

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
        if self._client.is_starved(question):
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
        with suppress(RelayNamed):
            return await self._client.try_ask(former, question, HopKind.FORMER)
        return None


class NoUpstream:
    """The client of a cache that serves only what it has, or is getting."""

    async def request(self, method: str, registry: Registry, path: str, **options: Any) -> UpstreamResponse:
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
        self.status, self.length = response.status, response.length
        self.headers = response.headers.without(ANSWER_FIELD.lower(), "x-cache", "x-cache-because")
        self.sender = sender
        self._response = response
        self._meter = meter
        self._on_end: OnEnd | None = on_end
        self._received = 0

    def _end(self, *, has_failed: bool = False) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(has_failed=has_failed, received=self._received)

    async def read_chunk(self) -> bytes:
        return b"".join(await self.read_pieces(1, 0.0))

    async def read_pieces(self, at_least: int, timeout: float) -> list[bytes]:
        try:
            pieces = await self._response.read_pieces(at_least, timeout)
        except UpstreamError as error:
            self._end(has_failed=True)
            assert self.sender is not None
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
        self.status, self.length = response.status, len(content)
        self.headers = response.headers.without(ANSWER_FIELD.lower(), "x-cache", "x-cache-because")
        self.sender: MemberSender | None = sender
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


def _question(method: str, registry: Registry, path: str, headers: Headers, credential: Credential) -> Question | None:
    """Return the question to members; None if members are not asked for this path."""
    try:
        target = route(path.partition("?")[0])
    except RegistryError:
        return None
    if target.kind not in (Kind.BLOB, Kind.MANIFEST) or "?" in path:
        return None
    passed = Headers.from_lowercase([field for field in headers if field[0] in _PASSED_FIELDS])
    if target.kind is Kind.BLOB:
        key, wait_key = blob_key(target.digest), f"{registry.host} {target.digest}"
    else:
        key = wait_key = repository_key(registry.host, target.name)
    return Question(method, registry, path, passed, credential, key, wait_key, target.kind, target.reference)


def _failure(status: int, word: str | None) -> MemberFailed:
    """Return why a response with `status` is not upstream's word, which is `word`."""
    if word is None:
        return MemberFailed(
            f"it does not count this daemon as a member (status {status}); FLEET must be the same at all members, and"
            " ALLOW_CLIENTS must have their addresses"
        )
    if status == 508:
        return MemberFailed("it waits for a member itself", is_down=False)
    return MemberFailed(f"it answered {status}", is_down=status in (429, 503))
