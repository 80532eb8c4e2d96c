"""The field of a request that one member of a fleet sends to another. PURE.

``CDN-Loop: docker-registry-proxy;from="10.0.0.1:3128";login=none`` (RFC 8586) says that the sender is a member, and
with which login it asks. It counts if it comes from the address of a member, with a proof that the sender has the key
of the fleet's CA: clients of a member's proxy come from its address, too. It is never handed on: its receiver asks
upstream.
It takes rights away and gives none. A stranger that sends it is a client like any other.
"""

from __future__ import annotations

import hmac
import re
from enum import Enum

from attrs import field, frozen

FIELD = "CDN-Loop"
CDN_ID = "docker-registry-proxy"

PROOF_FIELD = "X-Fleet-Proof"
"""The field beside it with the proof; see `HopProofs`."""

ANSWER_FIELD = "X-Fleet-Answer"
"""The field of a response to such a request. Without it, the other side does not count the sender as a member."""

RELAY_FIELD = "X-Fleet-Relay"
"""The field of a 307 with the member that has the content, or gets it."""

UPSTREAM_WORD, OWN_WORD = "upstream", "own"
"""Its values: the response is upstream's word, or the member's own refusal, which says nothing about the content."""

_MAX_FIELD = 1024  # characters
# RFC 8586, section 2: cdn-info = cdn-id *( OWS ";" OWS parameter ). A port makes the value of `from` a quoted-string.
_ELEMENT = re.compile(rf"{CDN_ID}((?:[ \t]*;[ \t]*[a-z]+=(?:[a-z0-9.-]+|\"[a-zA-Z0-9.:\[\]-]+\"))*)")
_PARAMETER = re.compile(r"([a-z]+)=\"?([^\";]+)\"?")


class HopLogin(Enum):
    """The login that a member uses upstream for another one."""

    NONE = "none"
    CONFIGURED = "configured"
    """The administrator's, which all members have."""
    CLIENT = "client"
    """That of the client, which is in Authorization."""


class HopKind(Enum):
    """How a member has come to ask this one."""

    OWNER = "owner"
    """It is the first in the order, or the next after others that failed."""
    RELAY = "relay"
    """The owner has sent the asking member here, because this one downloads the content itself."""
    LAST = "last"
    """The relay has failed, so the owner has to send the content itself."""
    FORMER = "former"
    """This one was the owner before, and is asked only for content that it has."""


@frozen
class Hop:
    """A request that the member `sender` sends to another one."""

    sender: str
    login: HopLogin = HopLogin.NONE
    kind: HopKind = HopKind.OWNER

    def __str__(self) -> str:
        """Return the value of the field."""
        return f'{CDN_ID};from="{self.sender}";login={self.login.value};as={self.kind.value}'


@frozen
class HopProofs:
    """Proofs that a hop is that of a member: for one receiver and one resource. `secret` is that of the fleet's CA."""

    _secret: bytes = field(repr=False)

    def make(self, hop: Hop, receiver: str, method: str, path: str) -> str:
        """Return the proof for a request to the member `receiver`."""
        return hmac.digest(self._secret, f"{hop}\n{receiver}\n{method} {path}".encode(), "sha256").hex()

    def holds(self, proof: str | None, hop: Hop, receiver: str, method: str, path: str) -> bool:
        """Return whether `proof`, which a request has, is the right one."""
        right = self.make(hop, receiver, method, path)
        return proof is not None and hmac.compare_digest(proof.encode("utf-8", "replace"), right.encode())


def parse_hop(value: str) -> Hop | None:
    """Return the hop in a field, None if it has none. Other networks may have elements of their own in it."""
    if len(value) > _MAX_FIELD or value.count(CDN_ID) != 1:
        return None
    for element in value.split(","):
        match = _ELEMENT.fullmatch(element.strip(" \t"))
        if match is None:
            continue
        pairs = _PARAMETER.findall(match[1])
        parameters = dict(pairs)
        try:
            if len(pairs) == len(parameters) and parameters.keys() == {"from", "login", "as"}:
                return Hop(parameters["from"], HopLogin(parameters["login"]), HopKind(parameters["as"]))
        except ValueError:
            return None
    return None
