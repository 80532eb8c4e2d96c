"""Remote procedure calls between two processes, over a `MessageSocket`."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from inspect import isawaitable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from dockerproxy.concurrency import spawn
from dockerproxy.workers.message_socket import MessageNotSent, MessageSocket, OnDescriptor, reject_descriptor

log = Logger()

Handlers = Mapping[str, Callable[..., Any]]
"""Functions or coroutine functions by name. Their arguments and results are JSON values."""


class RemoteError(Exception):
    """The call failed in the other process, or that process is gone. The log of the other process has the details."""


class RPC:
    """This process's end of the connection. The other process may call `handlers`.

    `on_closed` is called once, when either end has been closed. See `MessageSocket` for `on_descriptor`.
    """

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        handlers: Handlers,
        *,
        on_closed: Callable[[], None],
        on_descriptor: OnDescriptor = reject_descriptor,
    ) -> None:
        self._handlers = handlers
        self._on_closed = on_closed
        self._pending: dict[int, Deferred[Any]] = {}
        self._last_call_id = 0
        self.message_socket = MessageSocket(reactor, sock, self._on_message, self._on_socket_closed, on_descriptor)

    async def call(self, name: str, *arguments: Any) -> Any:
        """Call a handler of the other process and return its result. Raise `RemoteError`."""
        if not self.message_socket.connected:
            raise RemoteError("the other process is gone")
        self._last_call_id += 1
        call_id = self._last_call_id
        result = self._pending[call_id] = Deferred(lambda _: self._discard(call_id))
        try:
            self.message_socket.send([name, call_id, *arguments])
        except MessageNotSent as error:
            self._discard(call_id)
            raise RemoteError(f"{name} was not sent: {error}") from error
        return await result

    def _discard(self, call_id: int) -> None:
        self._pending.pop(call_id, None)

    def notify(self, name: str, *arguments: Any) -> None:
        """Call a handler of the other process without waiting for a result.

        If the message cannot be sent, disconnect: the other process would otherwise never learn, for example, that a
        lock is free.
        """
        try:
            self.message_socket.send([name, 0, *arguments])
        except MessageNotSent as error:
            log.error("{name} was not sent, disconnecting: {reason}", name=name, reason=str(error))
            self.message_socket.close()

    def hint(self, name: str, *arguments: Any) -> None:
        """Like `notify`, but drop the message if the other process is behind."""
        self.message_socket.hint(name, [name, 0, *arguments])

    def _on_message(self, message: Any) -> None:
        name, call_id, *arguments = message
        if name:
            spawn(self._handle(name, call_id, arguments), f"handling the RPC {name}")
        elif (waiter := self._pending.pop(call_id, None)) is not None:
            result, failed = arguments
            waiter.callback(Failure(RemoteError(result)) if failed else result)  # type: ignore[no-untyped-call]

    async def _handle(self, name: str, call_id: int, arguments: list[Any]) -> None:
        try:
            result = self._handlers[name](*arguments)
            if isawaitable(result):
                result = await result
            reply = [result, False]
        except Exception:
            log.failure("handler of the RPC {name} failed", name=name)
            reply = [f"{name} failed", True]
        if call_id:
            self._reply(name, call_id, reply)

    def _reply(self, name: str, call_id: int, reply: list[Any]) -> None:
        try:
            self.message_socket.send(["", call_id, *reply])
        except MessageNotSent as error:
            log.error("the result of {name} was not sent: {reason}", name=name, reason=str(error))
            if not reply[1]:
                self._reply(name, call_id, [f"the result of {name} was not sent", True])
            else:
                self.message_socket.close()  # the caller would wait for ever

    def _on_socket_closed(self) -> None:
        # Call this first, because a worker exits in it. Otherwise its clients would receive an error response, which
        # they do not retry, instead of a broken connection.
        self._on_closed()
        pending, self._pending = self._pending, {}
        for waiter in pending.values():
            waiter.errback(Failure(RemoteError("the other process is gone")))  # type: ignore[no-untyped-call]
