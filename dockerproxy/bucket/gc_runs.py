"""The runs of garbage collection in a bucket: their objects, their times, and the entries that they condemn.

Several nodes use a bucket at the same time, and S3 has no locks. Nodes can rely on strong reads, and on
objects that only one of several writers can create (``PUT If-None-Match: *``). A run has a number N, and these objects:

    dockerproxy/gc/runs/N.begun        created by the node that runs it, and written again each minute while it lives
    dockerproxy/gc/runs/N.condemned    the entries that the run will delete, a line each: the run is *published*
    dockerproxy/gc/runs/N.end          the run has ended: no DELETE of it is under way
    dockerproxy/gc/N/k/ENTRY           created once: ``deleting`` by the run, or ``rescued`` by a node that counts on it
    dockerproxy/gc/N/gone/ENTRY        no DELETE of this entry is under way any more

An entry is deleted as one:

    sha256:HEX              a content, with the links to it
    NAME@sha256:HEX         the link that makes a manifest or a blob a part of a repository, with the objects beside it
    NAME:TAG                a tag
    NAME@catalog            the key that puts a repository into the catalog

The run (`gc_collector`) marks, publishes what it condemns, and marks **again**. It lets off the entries that are
needed by then. It waits for the grace period, and then deletes each entry for which it can create ``deleting``. A push
(`gc_view`) writes its manifest, looks at the runs **after that**, and counts on each entry that is condemned by
creating ``rescued``. So either the second mark sees the manifest, or the push sees that the entry is condemned, and one
of them creates the object. A push that meets ``deleting`` waits for ``gone``, and writes again. So does one that finds
after the look that a part of its manifest is missing: a run may have deleted that, and may have ended by then.

A tag is written after that look, and it alone may make a manifest needed. Therefore a push always writes the link to
its manifest, also if it is there; the second mark lets off all that is younger than the grace period, and looks at ages
*before* it looks at tags; and a push ends with an error if it takes longer from the link to its tags.

A node may die or stand still at any time. A run with an old `begun` is dead, and the next one ends it. A collector
deletes nothing more if it has not written `begun` for a part of that time, or if the creation of ``deleting`` took
long. No clocks of two machines are compared: ages are those of the store, from one answer, and durations are those of
one machine, with the time for which it slept.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from hashlib import blake2b

from attrs import define, fields, frozen

from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.oci.names import Digest, Repository, Tag

GC = "dockerproxy/gc/"
RUNS = f"{GC}runs/"

RESCUED, DELETING = b"rescued", b"deleting"

MAX_ENTRIES = 100_000
"""Entries that one run condemns. Each process of a node keeps 8 bytes of each. The next run may condemn others."""
MAX_CONDEMNED = 64 * 1024 * 1024
"""Bytes of `condemned`: more than so many entries can have."""

_RUN_KEY = re.compile(r"([1-9][0-9]{0,8})\.(begun|condemned|end)")


@frozen
class Times:
    """The times of the protocol, in seconds. `scaled` makes all of them shorter; tests need that."""

    look: float = 30.0
    """A node looks at the runs so often."""
    push: float = 60.0
    """A push may take so long from the link to its manifest to its tags."""
    shortest_grace: float = 120.0
    """Longer than `push`, and than `look`: a client may rely on the answer of a node that did not know of a run yet."""
    decision: float = 30.0
    """A collector sends a DELETE at most so long after it began to create ``deleting``."""
    patience: float = 30.0
    """A push waits so long for ``gone``."""
    delete: float = 600.0
    """A DELETE that nobody got an answer to is not applied any more after this time."""
    renewal: float = 60.0
    """A collector writes `begun` so often."""
    trust: float = 300.0
    """A collector that has not written `begun` for so long deletes nothing more."""
    dead: float = 1800.0
    """A run with an older `begun` is dead. That is more than `trust`, `decision` and `delete` together."""
    keep: float = 86_400.0
    """The objects of ended runs, and unfinished uploads in parts, are deleted after this time."""

    @classmethod
    def scaled(cls, scale: float) -> Times:
        """Return the times multiplied by `scale`."""
        return cls(**{attribute.name: attribute.default * scale for attribute in fields(cls)})


@define
class Run:
    """The objects of a run. `age` is that of `begun`, in seconds by the clock of the store."""

    number: int
    age: float = float("inf")
    is_published: bool = False
    is_ended: bool = False


def begun_key(run: int) -> str:
    """Return the key of the object that a living collector writes again and again."""
    return f"{RUNS}{run}.begun"


def condemned_key(run: int) -> str:
    """Return the key of the list of the entries that a run condemns."""
    return f"{RUNS}{run}.condemned"


def end_key(run: int) -> str:
    """Return the key of the object that exists if a run has ended."""
    return f"{RUNS}{run}.end"


def run_prefix(run: int) -> str:
    """Return the prefix of the decisions of a run."""
    return f"{GC}{run}/"


def decision_key(run: int, entry: str) -> str:
    """Return the key of the object that the run, or a push, creates once."""
    return f"{GC}{run}/k/{entry.replace('/', '!')}"


def gone_key(run: int, entry: str) -> str:
    """Return the key of the object that exists if no DELETE of an entry is under way any more."""
    return f"{GC}{run}/gone/{entry.replace('/', '!')}"


def content_entry(digest: Digest | str) -> str:
    """Return the entry of a content."""
    return str(digest)


def link_entry(repository: Repository, digest: Digest | str) -> str:
    """Return the entry of the link to a manifest or a blob."""
    return f"{repository}@{digest}"


def tag_entry(repository: Repository, tag: Tag) -> str:
    """Return the entry of a tag."""
    return f"{repository}:{tag}"


def catalog_entry(repository: Repository) -> str:
    """Return the entry of the key of a repository in the catalog."""
    return f"{repository}@catalog"


async def list_runs(bucket: S3Bucket) -> list[Run]:
    """Return the runs that have objects, in their order."""
    runs: dict[int, Run] = {}
    async for entry in bucket.list_keys(RUNS):
        match = _RUN_KEY.fullmatch(entry.key.removeprefix(RUNS))
        if match is None:
            continue
        run = runs.setdefault(int(match[1]), Run(int(match[1])))
        if match[2] == "begun":
            run.age = entry.age
        elif match[2] == "condemned":
            run.is_published = True
        else:
            run.is_ended = True
    return [runs[number] for number in sorted(runs)]


@frozen
class CondemnedSet:
    """A set of entries in 8 bytes each, by their hashes. That an entry is in it by chance costs a request."""

    _hashes: array[int]

    @classmethod
    def of(cls, entries: Iterable[bytes]) -> CondemnedSet:
        """Return the set of `entries`. It takes a second for a million, so call it in a thread."""
        return cls(array("Q", sorted(map(_hash, entries))))

    @classmethod
    def parse(cls, content: bytes) -> CondemnedSet:
        """Return the set of the lines of `content`."""
        return cls.of(content.split(b"\n"))

    def __contains__(self, entry: str) -> bool:
        value = _hash(entry.encode())
        position = bisect_left(self._hashes, value)
        return position < len(self._hashes) and self._hashes[position] == value


def _hash(entry: bytes) -> int:
    return int.from_bytes(blake2b(entry, digest_size=8).digest(), "big")
