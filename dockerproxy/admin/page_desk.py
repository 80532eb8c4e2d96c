"""The questions of the page to the main process, besides those for documents: sessions, and administrators' actions."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from attrs import frozen

from dockerproxy.admin.overview import Document, OverviewError, error_answer
from dockerproxy.admin.sessions import Session, Sessions
from dockerproxy.concurrency import in_thread
from dockerproxy.errors import RegistryError
from dockerproxy.registry.principal import Principal

if TYPE_CHECKING:
    from dockerproxy.admin.image_actions import ImageActions
    from dockerproxy.admin.why import Explainer

_MAX_HISTORY = 20  # rows
_MAX_HISTORY_SIZE = 128 * 1024  # bytes: a message to another process may have 192 KiB, and rows have strangers' texts

Ask = Callable[[str, Sequence[Any]], Awaitable[Document]]
"""Asks the main process one of the questions of `PageDesk.answer`. All values are JSON values."""


class PageDesk:
    """Answers in the main process."""

    def __init__(self, reactor: Any, sessions: Sessions, actions: ImageActions, history: Explainer) -> None:
        self._reactor = reactor
        self._sessions = sessions
        self._actions = actions
        self._history = history

    async def answer(self, question: str, arguments: Sequence[Any]) -> Document:
        """Return ``{"value": ...}``, or the error that `PageDeskClient` raises."""
        try:
            return {"value": await self._answer(question, *arguments)}
        except RegistryError as error:
            return error_answer(error)

    async def _answer(self, question: str, *arguments: Any) -> Any:
        match question, arguments:
            case "start", (user, stamp):
                return await self._sessions.start_session(Session(user, stamp))
            case "find", (token,):
                session = await self._sessions.find_session(token)
                return None if session is None else [session.user, session.stamp]
            case "end", (token,):
                await self._sessions.end_session(token)
                return None
            case "link", (token,):
                started = await self._sessions.use_sign_in_link(token)
                return None if started is None else [started[0].user, started[1]]
            case "act", (user, address, user_agent, action, name, where):
                return await self._actions.act(Principal(user, address, user_agent), action, name, where)
            case "history", (name, where):
                return await in_thread(self._reactor, self._read_history, name, where)
        raise ValueError(f"the page asks {question!r} with {len(arguments)} arguments")

    def _read_history(self, name: str, where: str) -> list[Document]:
        """Return the last rows of the history about a repository, as many as a message has room for. Blocks."""
        rows, room = [], _MAX_HISTORY_SIZE
        for row in islice(self._history.rows(name, where), _MAX_HISTORY):
            room -= len(json.dumps(row))
            if room < 0:
                break
            rows.append(row)
        return rows


@frozen
class PageDeskClient:
    """The questions as every process asks them. They raise `RegistryError`, also if the main process is gone."""

    _ask: Ask

    async def start_session(self, session: Session) -> str:
        """Start a session and return its token."""
        return str(await self._value("start", session.user, session.stamp))

    async def find_session(self, token: str) -> Session | None:
        """Return the session of a token, None if it has none."""
        values = await self._value("find", token)
        return None if values is None else Session(*values)

    async def end_session(self, token: str) -> None:
        """End a session."""
        await self._value("end", token)

    async def use_sign_in_link(self, token: str) -> tuple[Session, str] | None:
        """Start a session by a link. Return it and its token, None if the link has ended."""
        values = await self._value("link", token)
        return None if values is None else (Session(values[0], ""), values[1])

    async def act(self, principal: Principal, action: str, name: str, where: str) -> str:
        """Do an action of an administrator; see `ImageActions.act`."""
        who = principal.user, principal.address, principal.user_agent
        return str(await self._value("act", *who, action, name, where))

    async def read_history(self, name: str, where: str) -> list[Document]:
        """Return the last requests for a repository, the newest first. They are for administrators only."""
        rows: list[Document] = await self._value("history", name, where)
        return rows

    async def _value(self, question: str, *arguments: Any) -> Any:
        answer = await self._ask(question, arguments)
        if "error" in answer:
            raise OverviewError(answer["error"])
        return answer["value"]
