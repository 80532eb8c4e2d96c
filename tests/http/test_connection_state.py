"""The table of connection states."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.http.connection_state import READS_INPUT, TRANSITIONS, ConnectionEvent, ConnectionState, next_state

STATES, EVENTS = list(ConnectionState), list(ConnectionEvent)
WITH_RESPONSE = {ConnectionState.RESPONDING, ConnectionState.LAST_RESPONSE}


def test_every_state_is_reachable_and_can_be_lost() -> None:
    reachable = {ConnectionState.READING_HEAD}
    while new := {after for state in reachable for after in TRANSITIONS[state].values()} - reachable:
        reachable |= new
    assert reachable == set(STATES)
    assert {next_state(state, ConnectionEvent.LOST) for state in STATES} == {ConnectionState.CLOSED}


def test_every_event_occurs() -> None:
    assert {event for row in TRANSITIONS.values() for event in row} == set(EVENTS)


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_ignored_input_stays_ignored(events: list[ConnectionEvent]) -> None:
    """The start of the next request is unknown then, so a later byte could be smuggled in as one."""
    state, ignored = ConnectionState.READING_HEAD, False
    for event in events:
        if event in TRANSITIONS[state]:
            state = next_state(state, event)
        ignored = ignored or state not in READS_INPUT
        assert ignored == (state not in READS_INPUT)


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_a_request_starts_only_without_another(events: list[ConnectionEvent]) -> None:
    """Each request is followed by one end of its response, or by the loss of the connection."""
    state, pending = ConnectionState.READING_HEAD, False
    for event in events:
        if event not in TRANSITIONS[state]:
            continue
        state = next_state(state, event)
        if event is ConnectionEvent.REQUEST:
            assert not pending
        pending = state in WITH_RESPONSE


@pytest.mark.parametrize("state", [state for state in STATES if state is not ConnectionState.CLOSED])
def test_a_response_ends_only_if_there_is_one(state: ConnectionState) -> None:
    if state in WITH_RESPONSE:
        assert next_state(state, ConnectionEvent.RESPONSE_END) not in WITH_RESPONSE
    else:
        with pytest.raises(RuntimeError, match=f"RESPONSE_END in the state {state.name}"):
            next_state(state, ConnectionEvent.RESPONSE_END)


def test_nothing_reopens_a_closed_connection() -> None:
    assert set(TRANSITIONS[ConnectionState.CLOSED].values()) == {ConnectionState.CLOSED}
    with pytest.raises(RuntimeError):
        next_state(ConnectionState.CLOSED, ConnectionEvent.REQUEST)
