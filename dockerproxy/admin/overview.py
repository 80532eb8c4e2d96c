"""The state of the daemon for people and scripts: one set of JSON documents for the page, the API and the command.

    overview      everything that the first page shows          registries    traffic and state of each registry
    registry      one of them, with its traffic over time       traffic       traffic over time
    transfers     downloads under way                           budget        rate limits of registries
    images        search for repositories                       image         the tags of a repository
    manifest      the parts of an image                         status        version, and for administrators much more

The main process answers (`admin.local_overview`). All processes ask it by `Overview`, through their coordinator.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from attrs import frozen

from dockerproxy.admin.viewer import Viewer
from dockerproxy.errors import RegistryError

Document = dict[str, Any]
"""A JSON object."""

Call = Callable[[str, list[Any], Mapping[str, str]], Awaitable[Document]]
"""Asks the main process: the resource, `Viewer.values`, and the arguments. Returns what `LocalOverview.answer` does."""


@frozen
class Overview:
    """The documents, as every process gets them."""

    _call: Call

    async def get(self, resource: str, viewer: Viewer, arguments: Mapping[str, str] | None = None) -> Document:
        """Return a document. Raise `RegistryError`: an unknown name, a wrong argument, or the main process is gone."""
        answer = await self._call(resource, viewer.values(), dict(arguments or {}))
        if "error" in answer:
            raise OverviewError(answer["error"])
        document: Document = answer["document"]
        return document


class OverviewError(RegistryError):
    """The error that the main process answered with."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        headers = [(str(name), str(value)) for name, value in error.get("headers", ())]
        super().__init__(str(error["message"]), headers=headers)
        self.status, self.code = int(error["status"]), str(error["code"])


def error_answer(error: RegistryError) -> Document:
    """Return the answer of the main process that makes `Overview.get` raise the like of `error`."""
    headers = [[name, value] for name, value in error.headers if name == "Retry-After"]
    return {"error": {"status": error.status, "code": error.code, "message": error.message, "headers": headers}}


@frozen(kw_only=True)
class OverviewSources:
    """The contributions of other parts of the daemon.

    `status` and `budget` are those of the command. `fleet` returns the states of members; see `Members.states`.
    `idle_age` returns the seconds for which what last left the cache to make room had not been used. `notices` returns
    sentences about what is wrong: ``level``, ``registry`` and ``text``; and `problems` one for each registry that does
    not work, by its label. `pinned` returns the tags and digests of a cached repository that are pinned, in any thread.
    """

    status: Callable[[], Awaitable[Document]]
    fleet: Callable[[], Mapping[str, str]]
    budget: Callable[[], Awaitable[Document]]
    idle_age: Callable[[], float | None]
    notices: Callable[[Viewer], Awaitable[Sequence[Document]]]
    problems: Callable[[], Mapping[str, str]]
    pinned: Callable[[str], Collection[str]]
