"""The access log: one line and its fields for each request."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent, globalLogPublisher
from zope.interface import implementer

from dockerproxy.daemon.accesslog import AccessLog


def record_request(**changes: Any) -> LogEvent:
    """Return the one event that recording a request makes."""
    request: dict[str, Any] = {
        "client": "192.168.1.7", "method": "GET", "host": "registry-1.docker.io",
        "path": "/v2/library/ubuntu/tags/list", "status": 200, "size": 1234, "seconds": 0.12345, "cache_status": "HIT",
    }  # fmt: skip
    events: list[LogEvent] = []

    @implementer(ILogObserver)
    def observer(event: LogEvent) -> None:
        events.append(event)

    globalLogPublisher.addObserver(observer)
    try:
        AccessLog().record(**(request | changes))
    finally:
        globalLogPublisher.removeObserver(observer)
    (event,) = events
    return event


def test_an_event_has_a_line_and_fields() -> None:
    event = record_request()
    assert (
        formatEvent(event)
        == '192.168.1.7 GET registry-1.docker.io/v2/library/ubuntu/tags/list 200 1234 0.123 HIT - "-"'
    )
    assert event["log_namespace"] == "dockerproxy.access"
    assert event["log_level"] is LogLevel.info
    assert (event["client"], event["method"], event["host"]) == ("192.168.1.7", "GET", "registry-1.docker.io")
    assert (event["path"], event["status"], event["size"]) == ("/v2/library/ubuntu/tags/list", 200, 1234)
    assert (event["seconds"], event["verdict"]) == (0.12345, "HIT")
    assert (event["user"], event["user_agent"]) == (None, None)


def test_user_and_user_agent_are_in_the_event_and_the_line() -> None:
    event = record_request(user="alice", user_agent="docker/29.0 go/1.25", because="new")
    assert (event["user"], event["user_agent"]) == ("alice", "docker/29.0 go/1.25")
    assert formatEvent(event).endswith(' 200 1234 0.123 HIT alice "docker/29.0 go/1.25" new')


@pytest.mark.parametrize(
    ("user", "user_agent", "fields"),
    [
        ("", "", '- "-"'),
        ("-", "-", '- "-"'),
        ("alice smith", "a b", r'alice\x20smith "a b"'),
        ('al"ice', 'x" 200 1 0.1 HIT', r'al\x22ice "x\x22 200 1 0.1 HIT"'),
        ("a\\b", "a\\x22", r'a\x5Cb "a\x5Cx22"'),
        ("a\r\nb", "a\r\n1.2.3.4 GET /\t\x7f", r'a\x0D\x0Ab "a\x0D\x0A1.2.3.4 GET /\x09\x7F"'),
        ("caf\u00e9", "caf\u00e9", r'caf\xC3\xA9 "caf\xE9"'),  # a field of a request is a byte for each character
        ("\udc80", "\u2028", r'\xED\xB2\x80 "?"'),
    ],
    ids=["empty", "dashes", "spaces", "quotes", "backslashes", "controls", "accents", "impossible"],
)  # fmt: skip
def test_user_and_user_agent_are_escaped_as_nginx_does_it(user: str, user_agent: str, fields: str) -> None:
    assert formatEvent(record_request(user=user, user_agent=user_agent)).endswith(f" HIT {fields}")


def test_the_line_of_an_error_ends_in_its_sentence() -> None:
    event = record_request(status=502, because="quay.io:443: no such name\r\n192.0.2.1 GET forged 200 1 0.1 HIT")
    sentence = "quay.io:443: no such name\\x0d\\x0a192.0.2.1 GET forged 200 1 0.1 HIT"
    assert formatEvent(event).endswith(f' 502 1234 0.123 HIT - "-" {sentence}')
    assert event["because"] == sentence
    assert record_request()["because"] is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/blob?X-Amz-Signature=secret", "/blob"),
        ("/a\r\nforged line", "/a\\x0d\\x0aforged\\x20line"),
        ("/a\x1b[31m\x7f\x85", "/a\\x1b[31m\\x7f\\x85"),
        ("/{client.secret} {}", "/{client.secret}\\x20{}"),
        ("/caf\u00e9", "/caf\u00e9"),
        ("", ""),
    ],
)
def test_path_has_no_query_and_no_control_characters(path: str, expected: str) -> None:
    event = record_request(path=path)
    assert event["path"] == expected
    assert formatEvent(event) == f'192.168.1.7 GET registry-1.docker.io{expected} 200 1234 0.123 HIT - "-"'


_LINE = re.compile(r'(\S+ ){7}[!-~]+ "[ !#-~]*"')


@given(method=st.text(), host=st.text(), path=st.text(), user=st.text(), user_agent=st.text())
@example(method="", host="user@", path="", user="", user_agent="")
def test_any_request_is_one_line_of_nine_fields(method: str, host: str, path: str, user: str, user_agent: str) -> None:
    line = formatEvent(record_request(method=method, host=host, path=path, user=user, user_agent=user_agent))
    assert line.splitlines() == [line]
    assert _LINE.fullmatch(line)
    line.encode()


@pytest.mark.parametrize("host", ["user:s3cret@registry-1.docker.io", "s3cret@x@registry-1.docker.io"])
def test_a_login_in_the_host_is_nowhere_in_the_event(host: str) -> None:
    event = record_request(host=host)
    assert event["host"] == "registry-1.docker.io"
    assert "s3cret" not in repr(event)


def test_a_secret_in_a_query_is_nowhere_in_the_event() -> None:
    assert "s3cret" not in repr(record_request(path="/v2/?token=s3cret"))
