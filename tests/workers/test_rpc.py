"""Remote procedure calls over a real socket pair."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import LogEvent
from twisted.python.failure import Failure

from dockerproxy.workers.message_socket import MAX_MESSAGE_SIZE, socketpair
from dockerproxy.workers.rpc import RPC, RemoteError
from tests.workers.descriptor_reactor import DescriptorReactor


class RPCPair:
    """A caller and a callee. The handler "later" returns when the test sets its result."""

    def __init__(self) -> None:
        self.reactor = DescriptorReactor()
        self.deferred_result: Deferred[Any] = Deferred()
        self.notifications: list[Any] = []
        handlers = {
            "sum": lambda *numbers: sum(numbers),
            "later": lambda: self.deferred_result,
            "fail": lambda: 1 // 0,
            "note": self.notifications.append,
            "uppercase": self._uppercase,
            "repeat": lambda text, count: text * count,
        }
        caller_socket, callee_socket = socketpair()
        self.on_lost = lambda: None
        self.caller = RPC(self.reactor, caller_socket, {}, on_closed=lambda: self.on_lost())
        self.callee = RPC(self.reactor, callee_socket, handlers, on_closed=lambda: None)

    async def _uppercase(self, text: str) -> str:
        return text.upper()

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Start a call. Return a list to which its result or its failure is appended."""
        outcome: list[Any] = []
        self.pending_call = Deferred.fromCoroutine(self.caller.call(name, *arguments))
        self.pending_call.addBoth(outcome.append)
        self.iterate()
        return outcome

    def iterate(self) -> None:
        for _ in range(3):
            self.reactor.iterate()


@pytest.fixture
def rpc_pair() -> Any:
    pair = RPCPair()
    yield pair
    pair.caller.message_socket.close()
    pair.callee.message_socket.close()


def test_call_returns_the_result(rpc_pair: RPCPair) -> None:
    assert rpc_pair.call("sum", 1, 2, 3) == [6]
    assert rpc_pair.call("uppercase", "a") == ["A"]


def test_results_in_any_order(rpc_pair: RPCPair) -> None:
    outcome = rpc_pair.call("later")
    assert rpc_pair.call("sum", 1) == [1]
    assert outcome == []
    rpc_pair.deferred_result.callback({"size": None})
    rpc_pair.iterate()
    assert outcome == [{"size": None}]


def test_notify_has_no_reply(rpc_pair: RPCPair) -> None:
    rpc_pair.caller.notify("note", "something")
    rpc_pair.iterate()
    assert rpc_pair.notifications == ["something"]


@pytest.mark.parametrize("name", ["fail", "unknown"])
def test_failing_and_unknown_handlers(rpc_pair: RPCPair, name: str, log_events: list[LogEvent]) -> None:
    [failure] = rpc_pair.call(name)
    assert isinstance(failure, Failure) and isinstance(failure.value, RemoteError)
    assert any("log_failure" in event for event in log_events)
    assert rpc_pair.call("sum", 1) == [1]


def test_cancelled_call(rpc_pair: RPCPair) -> None:
    outcome = rpc_pair.call("later")
    rpc_pair.pending_call.cancel()
    assert isinstance(outcome[0].value, CancelledError)
    rpc_pair.deferred_result.callback(1)
    rpc_pair.iterate()
    assert rpc_pair.call("sum", 1) == [1]


def test_call_that_is_not_sent_fails(rpc_pair: RPCPair) -> None:
    [failure] = rpc_pair.call("uppercase", "a" * MAX_MESSAGE_SIZE)
    assert isinstance(failure.value, RemoteError)
    assert rpc_pair.caller._pending == {}
    assert rpc_pair.call("sum", 1) == [1]


def test_result_that_is_not_sent_fails_the_call(rpc_pair: RPCPair, log_events: list[LogEvent]) -> None:
    [failure] = rpc_pair.call("repeat", "a", MAX_MESSAGE_SIZE)
    assert isinstance(failure.value, RemoteError)
    assert "the result of {name} was not sent: {reason}" in [event["log_format"] for event in log_events]
    assert rpc_pair.call("sum", 1) == [1]


def test_notification_that_is_not_sent_disconnects(rpc_pair: RPCPair, log_events: list[LogEvent]) -> None:
    """The other process must not wait for ever, for example for a lock."""
    rpc_pair.caller.notify("note", "a" * MAX_MESSAGE_SIZE)
    assert not rpc_pair.caller.message_socket.connected
    assert len(log_events) == 1


def test_hint_that_is_not_sent_is_dropped(rpc_pair: RPCPair) -> None:
    rpc_pair.caller.hint("note", "a" * MAX_MESSAGE_SIZE)
    rpc_pair.caller.hint("note", "small")
    rpc_pair.iterate()
    assert rpc_pair.notifications == ["small"]


def test_peer_closes(rpc_pair: RPCPair) -> None:
    outcome = rpc_pair.call("later")
    rpc_pair.callee.message_socket.close()
    rpc_pair.iterate()
    assert isinstance(outcome[0].value, RemoteError)
    assert isinstance(rpc_pair.call("sum", 1)[0].value, RemoteError)


def test_on_lost_is_called_before_pending_calls_fail(rpc_pair: RPCPair) -> None:
    # A worker exits in `on_lost`. So its clients do not receive an error response that they would not retry.
    outcome = rpc_pair.call("later")
    outcomes: list[list[Any]] = []
    rpc_pair.on_lost = lambda: outcomes.append(list(outcome))
    rpc_pair.callee.message_socket.close()
    rpc_pair.iterate()
    assert outcomes == [[]] and len(outcome) == 1
