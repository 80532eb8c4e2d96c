"""Identifiers of upload sessions, which need no memory and no file before the first byte arrives.

An identifier is a UUID (version 8 of RFC 9562). Keyed hashes in it say who began the session, and in which repository;
it also has the time. So the names of the sessions on disk show how many each client has, and how old they are.

A session begins as an offer: the identifier with a signature. The server stores nothing for it, and any process of the
daemon, also after a restart, recognizes it as a session without bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from attrs import frozen

from dockerproxy.oci.names import ALGORITHMS, Repository

UPLOAD_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_OFFER = re.compile(rf"({UPLOAD_ID.pattern})\.(sha[0-9]+)\.([0-9a-f]{{32}})")

_OFFER_LIFETIME = 3600.0  # seconds until the first byte must have arrived; a registry that stores offers waits for days
_CLOCK_SET_BACK = 300.0  # seconds by which an offer may seem to be from the future


@frozen
class UploadOffer:
    """A session without bytes. These are hashed with `algorithm` when they arrive."""

    upload_id: str
    algorithm: str


@frozen
class UploadIds:
    """Makes identifiers and offers, and reads them. `secret` is the same in all processes and after a restart."""

    _secret: bytes

    def make_offer(self, owner: str, repository: Repository, algorithm: str, now: float) -> str:
        """Return a new offer. `owner` stands for the client. `now` is POSIX time."""
        owner_part, repository_part = self._hash("owner", owner)[:8], self.repository_part(repository)
        variant, random = secrets.choice("89ab"), secrets.token_hex(4)
        upload_id = f"{owner_part}-{repository_part}-{variant}{random[:3]}-{int(now):08x}{random[3:7]}"
        offer = f"{upload_id}.{algorithm}"
        return f"{offer}.{self._sign(offer, repository)}"

    def read_offer(self, session: str, repository: Repository, now: float) -> UploadOffer | None:
        """Return the offer that a client sent for `repository`. Return None if it has ended, or if it is none."""
        match = _OFFER.fullmatch(session)
        if match is None or match[2] not in ALGORITHMS:
            return None
        signature = self._sign(session[: match.start(3) - 1], repository)
        age = now - started_at(match[1])
        valid = hmac.compare_digest(signature, match[3]) and -_CLOCK_SET_BACK < age < _OFFER_LIFETIME
        return UploadOffer(match[1], match[2]) if valid else None

    def is_of(self, upload_id: str, repository: Repository) -> bool:
        """Return whether a session of this identifier is one of `repository`."""
        return repository_of(upload_id) == self.repository_part(repository)

    def repository_part(self, repository: str) -> str:
        """Return what `repository_of` returns for the sessions of a repository."""
        repository_hash = self._hash("repository", repository)
        return f"{repository_hash[:4]}-8{repository_hash[4:7]}"

    def _hash(self, kind: str, text: str) -> str:
        return hmac.new(self._secret, f"upload {kind}\n{text}".encode(), hashlib.sha256).hexdigest()

    def _sign(self, offer: str, repository: Repository) -> str:
        return self._hash("offer", f"{repository}\n{offer}")[:32]


def owner_of(upload_id: str) -> str:
    """Return the part of an identifier that all sessions of a client have in common."""
    return upload_id[:8]


def repository_of(upload_id: str) -> str:
    """Return the part of an identifier that all sessions of a repository have in common."""
    return upload_id[9:18]


def started_at(upload_id: str) -> int:
    """Return the time at which a session was offered (POSIX time)."""
    return int(upload_id[24:32], 16)
