"""The members that send a blob on in the owner's place, so that none sends too many copies. PURE.

The owner of a blob keeps the order in which members have come for it. The first FLEET_FAN_OUT get it from the owner,
and each further one from a member that came before and sends it to fewer than FLEET_FAN_OUT others. So they form a
tree, whose depth grows with the logarithm of their number. It is forgotten soon after the last one has come.

The successor, which owns the blob if the owner fails, always gets it from the owner. So it notices that at once, and
has as much of the blob as anybody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from attrs import define, field

from dockerproxy.bounded_dict import BoundedDict

TREE_TTL = 600.0
"""Seconds after the last new member for which the tree of a blob is kept."""

_MAX_TREES = 1000
_MAX_MEMBERS = 2000  # of one tree


@define
class RelayTree:
    """The members that came for one blob, in order, each with the one that sends it the blob: None is the owner."""

    _fan_out: int
    _parents: dict[str, str | None] = field(factory=dict, init=False)
    _children: Counter[str | None] = field(factory=Counter, init=False)
    _failed: set[str] = field(factory=set, init=False)

    def place(self, member: str, *, has_failed: bool, successor: str | None = None) -> str | None:
        """Return the member from which `member` gets the blob, None for the owner.

        It is the same each time, unless the last one `has_failed`, which then sends to nobody any more.
        """
        if member in self._parents:
            parent = self._parents[member]
            if not has_failed:
                return parent
            self._detach(member)
            if parent is not None and parent not in self._failed:
                self._failed.add(parent)
                self._detach(parent)
        elif len(self._parents) >= _MAX_MEMBERS:
            return None
        self._failed.discard(member)  # it asks, so it lives
        parent = None if member == successor else self._find_parent(member, successor)
        self._parents[member] = parent
        self._children[parent] += 1
        return parent

    def _find_parent(self, member: str, successor: str | None) -> str | None:
        """Return the first in the order that has room and does not get the blob from `member` itself."""
        is_reserved = successor is not None and successor not in self._parents and self._fan_out > 1
        if self._children[None] < self._fan_out - is_reserved:
            return None
        for candidate in self._parents:
            if (
                candidate != member
                and candidate not in self._failed
                and self._children[candidate] < self._fan_out
                and not self._is_below(candidate, member)
            ):
                return candidate
        return None

    def _is_below(self, name: str, ancestor: str) -> bool:
        parent = self._parents.get(name)
        while parent is not None and parent != ancestor:
            parent = self._parents.get(parent)
        return parent is not None

    def _detach(self, member: str) -> None:
        """Free the place of `member`. It keeps its rank in the order."""
        if member in self._parents:
            parent = self._parents[member]
            if self._children[parent]:
                self._children[parent] -= 1
            self._parents[member] = None


@define
class Relays:
    """The trees of the blobs that this daemon sends to members. `now` returns seconds."""

    _fan_out: int
    _now: Callable[[], float]
    _trees: BoundedDict[str, RelayTree] = field(init=False)

    @_trees.default
    def _make_trees(self) -> BoundedDict[str, RelayTree]:
        return BoundedDict(_MAX_TREES, ttl=TREE_TTL, clock=self._now)

    def place(self, key: str, member: str, *, has_failed: bool, successor: str | None = None) -> str | None:
        """Return the member from which `member` gets the blob `key`, None for this one; see `RelayTree.place`."""
        tree = self._trees.get(key)
        if tree is None:
            tree = RelayTree(self._fan_out)
        parent = tree.place(member, has_failed=has_failed, successor=successor)
        self._trees[key] = tree  # from now on for another TREE_TTL
        return parent
