"""The viewers of the page, the API and the streams of events: how many, and the names that each may read there. Pure.

The names of private repositories are secrets. A viewer that has not logged in sees only repositories that the public
may read, and everything else without its name. Every surface asks the same `Viewer`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from attrs import frozen

from dockerproxy.admin.resolver import CACHED
from dockerproxy.errors import NameInvalid
from dockerproxy.http.request import Request
from dockerproxy.oci.docker_hub import registry_label
from dockerproxy.oci.names import Host, Registry
from dockerproxy.shares import ClientShares

MAX_VIEWERS, VIEWERS_PER_CLIENT = 100, 50
"""Viewers of all processes, and of one client of a process: many people may share an address, such as that of a NAT."""

LOCAL_VIEWERS = 10
"""Viewers beyond those, on the control socket: visitors of the page cannot keep an administrator from looking on."""

RETRY_AFTER = 10
"""Seconds after which a viewer for which there is no room asks for the state, or tries again."""

OTHER_REGISTRY = "another registry"
"""The name of a registry that no setting names, such as a host that a wildcard of REGISTRIES covers."""


@frozen
class Viewer:
    """A viewer: anonymous, a user, or an administrator.

    `reads_hosted` says whether the viewer may read the hosted repositories: every user may, and everybody if reading
    needs no login.
    """

    user: str | None = None
    is_admin: bool = False
    reads_hosted: bool = False

    @classmethod
    def administrator(cls, user: str | None = None) -> Viewer:
        """Return a viewer that may see everything, such as one on the control socket."""
        return cls(user, is_admin=True, reads_hosted=True)

    def may_see(self, where: str, *, is_public: bool) -> bool:
        """Return whether the viewer may read the name of a repository.

        A cached one is public if the public may read it upstream.
        """
        if self.is_admin:
            return True
        return is_public if where == CACHED else self.reads_hosted

    def values(self) -> list[Any]:
        """Return the viewer as a list for a message to another process of the daemon."""
        return [self.user, self.is_admin, self.reads_hosted]

    @classmethod
    def parse(cls, values: Sequence[Any]) -> Viewer:
        """Return the viewer that `values` returned the values of."""
        user, is_admin, reads_hosted = values
        return cls(None if user is None else str(user), is_admin is True, reads_hosted is True)


ViewerOf = Callable[[Request], Awaitable[Viewer]]
"""Returns the viewer that sends a request. Raises `RegistryError` if it may not see the page at all."""


def label_of(repository: str, known: Collection[str]) -> str:
    """Return the label of the registry of a cached repository, given by its key, if it is `known`."""
    try:
        label = registry_label(Registry(Host.parse(repository.partition("/")[0])))
    except NameInvalid:
        return OTHER_REGISTRY
    return label if label in known else OTHER_REGISTRY


def private_name(label: str) -> str:
    """Return the name under which a viewer sees an image of the registry `label` that they may not read."""
    return f"a private image of {label}"


def live_shares() -> ClientShares:
    """Return the bound of live views of one process."""
    return ClientShares(
        "live views of the page",
        MAX_VIEWERS + LOCAL_VIEWERS,
        VIEWERS_PER_CLIENT,
        reserved=LOCAL_VIEWERS,
        retry_after=RETRY_AFTER,
    )
