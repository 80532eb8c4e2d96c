"""Requests from one member of a fleet to another: to the mirror in the clear, or through its proxy port with TLS."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen
from twisted.logger import Logger
from twisted.web.iweb import IBodyProducer

from dockerproxy.cache.upstream import UpstreamResponse
from dockerproxy.concurrency import spawn
from dockerproxy.fleet.hop import FIELD, PROOF_FIELD, Hop, HopProofs
from dockerproxy.fleet.question import Question
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import Dialer
from dockerproxy.net.upstream_proxy import UpstreamProxy
from dockerproxy.oci.names import Host
from dockerproxy.upstream.agent import Agent, Response, UpstreamTimeouts
from dockerproxy.upstream.connection import ConnectionDropped
from dockerproxy.upstream.credentials import ClientCredential
from dockerproxy.upstream.tls import ClientContext

MEMBER_PORT = 3128
"""The port of a member that FLEET gives without one: that of the proxy."""

_SEND_TIMEOUT = 60.0  # seconds for which the disk of a member may take no byte of an upload
_DEPARTURE = 60.0  # seconds after which the connections to a former member are closed

log = Logger()


@frozen
class MemberProxy(UpstreamProxy):
    """The proxy port of a member. All hosts are reached through it."""

    def applies_to(self, host: Host) -> bool:
        return True


class AddressResolver:
    """A resolver for addresses only. Members are addresses, and a member resolves the names of registries itself."""

    async def resolve(self, name: str, client: str = "") -> list[str]:
        return []


@define(eq=False)
class HTTPMemberTransport:
    """Asks members over HTTP. Each member has an agent of its own for TLS, made when it is first needed.

    A member that sends nothing for `timeout` seconds fails. `source_address` is the address to connect from, so that
    the other side recognizes this member; None for any.
    """

    _reactor: Any
    _tls: ClientContext
    _timeout: float
    _source_address: Callable[[], str | None]
    _proofs: HopProofs
    _clear: Agent = field(init=False)
    _through: dict[str, Agent] = field(factory=dict, init=False)
    _members: frozenset[str] = field(default=frozenset(), init=False)

    def __attrs_post_init__(self) -> None:
        self._clear = self._agent(None)

    async def ask(self, member: str, question: Question, hop: Hop) -> UpstreamResponse:
        """Return the response of `member`. Raise `UpstreamError`."""
        proof = self._proofs.make(hop, member, question.method, question.path)
        fields = [*question.headers, (FIELD.lower(), str(hop)), (PROOF_FIELD.lower(), proof)]
        if question.is_clear:
            url = f"http://{member}{question.path}?ns={question.registry.host}"
            return await self._clear.request(question.method, url, Headers.from_lowercase(fields), client=member)
        if isinstance(question.credential, ClientCredential):
            fields.append(("authorization", question.credential.authorization))
        agent = self._agent_through(member)
        # Over TLS also if the registry itself has none: the member answers in its place.
        url = f"https://{question.registry.host.authority}{question.path}"
        return await agent.request(question.method, url, Headers.from_lowercase(fields), client=member)

    async def send(
        self, member: str, method: str, url: str, headers: Headers, body: IBodyProducer | None = None
    ) -> Response:
        """Return the response of `member` to a request for a host that it answers for. Raise `UpstreamError`.

        The errors of `body` are raised, too.
        """
        agent = self._agent_through(member)
        # A request with a body cannot be sent again if an idle connection is closed at this moment.
        with suppress(ConnectionDropped):
            if body is None:
                return await agent.request(method, url, headers, client=member, reuse=True)
        return await agent.request(method, url, headers, body, client=member)

    def use(self, members: tuple[str, ...]) -> None:
        """Close the connections to those that are no members any more, unless they come back within a minute.

        DNS may leave out a member now and then.
        """
        self._members = frozenset(members)
        if not self._members.issuperset(self._through):
            self._reactor.callLater(_DEPARTURE, self._close_departed)

    def _close_departed(self) -> None:
        for member in set(self._through) - self._members:
            spawn(self._through.pop(member).close(), f"closing the connections to {member}")

    async def close(self) -> None:
        """Abort all connections; return once all are closed."""
        for agent in (self._clear, *self._through.values()):
            await agent.close()

    def _agent_through(self, member: str) -> Agent:
        agent = self._through.get(member)
        if agent is None:
            address = Host.parse(member, MEMBER_PORT)
            agent = self._through[member] = self._agent(MemberProxy(address.name, address.port))
        return agent

    def _agent(self, proxy: UpstreamProxy | None) -> Agent:
        dialer = Dialer(
            self._reactor, AddressResolver(), proxy=proxy, connect_timeout=self._timeout,
            source_address=self._source_address,
        )  # fmt: skip
        timeouts = UpstreamTimeouts(self._timeout, self._timeout, max(self._timeout, _SEND_TIMEOUT))
        return Agent(self._reactor, dialer, self._tls, timeouts)
