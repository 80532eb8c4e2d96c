"""A request for content that members can answer, and the form that their answers must have. PURE.

A member is a daemon as this one is, so its answers have one form. Any other is a fault of the member: nobody has to
guess what is meant, as with registries.
"""

from __future__ import annotations

import re
from typing import Protocol

from attrs import frozen

from dockerproxy.errors import DigestInvalid, RegistryError
from dockerproxy.fleet.hop import HopLogin
from dockerproxy.fleet.members import blob_key, repository_key
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Digest, Reference, Registry
from dockerproxy.oci.ranges import parse_content_range
from dockerproxy.oci.routes import Kind, route
from dockerproxy.upstream.content_coding import content_codings
from dockerproxy.upstream.credentials import Anonymous, ClientCredential, Credential
from dockerproxy.upstream.registry_request import RegistryRequest

_PASSED_FIELDS = frozenset({"accept", "range"})
_KEPT_FIELDS = frozenset({"content-length", "content-range", "content-type", "docker-content-digest"})
_REST = re.compile(r"bytes=[0-9]+-")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")


class Answer(Protocol):
    """The head of a response."""

    status: int
    headers: Headers
    length: int | None


def asks_for_rest(byte_range: str | None) -> bool:
    """Return whether a Range, or none, asks for a blob to its end: not for a part, by which something is checked."""
    return byte_range is None or _REST.fullmatch(byte_range) is not None


def kept_fields(headers: Headers) -> Headers:
    """Return the fields of a member's answer that count. Its limits, challenges and cookies are not upstream's."""
    return Headers.from_lowercase([field for field in headers if field[0] in _KEPT_FIELDS])


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
        """Whether it may be asked without TLS: nothing is secret, and the digest proves all that the answer says.

        A part of a blob proves access or possession, of which a stranger in the network must not decide.
        """
        is_whole = self.method == "GET" and self.kind is Kind.BLOB and asks_for_rest(self.headers.get("range"))
        return is_whole and isinstance(self.credential, Anonymous)

    @property
    def login(self) -> HopLogin:
        if isinstance(self.credential, Anonymous):
            return HopLogin.NONE
        return HopLogin.CLIENT if isinstance(self.credential, ClientCredential) else HopLogin.CONFIGURED

    def fault(self, answer: Answer) -> str:
        """Return why `answer`, a success, is none that a member sends; `""` if it is one.

        The sentence begins with "it", the member.
        """
        if content_codings(answer.headers):
            return "it sent content with a coding"
        if answer.length is None:  # it would end when the member likes
            return "it sent content without a length"
        asked = None if self.kind is Kind.MANIFEST or self.method == "HEAD" else self.headers.get("range")
        if answer.status != (200 if asked is None else 206):
            return f"it answered {answer.status} to a request of {'the whole' if asked is None else asked}"
        try:
            digest = _digest(answer)
        except DigestInvalid:
            return "it sent an invalid digest"
        if isinstance(self.reference, Digest):
            if digest not in (None, self.reference):
                return f"it sent {digest} in place of {self.reference}"
        elif digest is None:
            return "it sent a tag without a digest"
        return "" if asked is None else _fault_of_range(asked, answer)

    def content_digest(self, answer: Answer) -> Digest:
        """Return the digest that the whole content of `answer`, which has no fault, must have."""
        digest = self.reference if isinstance(self.reference, Digest) else _digest(answer)
        assert digest is not None
        return digest


def question_of(request: RegistryRequest) -> Question | None:
    """Return the question to members; None if members are not asked for this."""
    registry, path = request.registry, request.path
    if request.method not in ("GET", "HEAD") or request.body is not None or "?" in path:
        return None
    try:
        target = route(path)
    except RegistryError:
        return None
    if target.kind not in (Kind.BLOB, Kind.MANIFEST):
        return None
    passed = Headers.from_lowercase([field for field in request.headers if field[0] in _PASSED_FIELDS])
    if target.kind is Kind.BLOB:
        key, wait_key = blob_key(target.digest), f"{registry.host} {target.digest}"
    else:
        key = wait_key = repository_key(registry.host, target.name)
    return Question(
        request.method, registry, path, passed, request.credential, key, wait_key, target.kind, target.reference
    )


def _digest(answer: Answer) -> Digest | None:
    value = answer.headers.get("docker-content-digest")
    return None if value is None else Digest.parse(value)


def _fault_of_range(asked: str, answer: Answer) -> str:
    """Return why `answer`, a 206, does not have the range `asked`; `""` if it has."""
    value = answer.headers.get("content-range") or ""
    try:
        start, stop, size = parse_content_range(value)
    except ValueError:
        return f"it sent a range with Content-Range {value[:100]!r}"
    match = _RANGE.fullmatch(asked)
    if match is None or size is None:
        return f"it sent {value} for {asked[:100]}"
    wanted_stop = min(int(match[2]) + 1, size) if match[2] else size
    if (start, stop, answer.length) != (int(match[1]), wanted_stop, stop - start):
        return f"it sent {value} with {answer.length} bytes for {asked}"
    return ""
