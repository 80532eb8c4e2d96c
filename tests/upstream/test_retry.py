"""Tests for parsing Retry-After."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.http.headers import Headers
from dockerproxy.upstream.retry import MAX_RETRY_AFTER, parse_retry_after

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("99999999999999999999", MAX_RETRY_AFTER),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 60.0),
        ("Tuesday, 14-Nov-23 22:14:20 GMT", 60.0),
        ("Tue Nov 14 22:14:20 2023", 60.0),
        ("Tue, 14 Nov 2023 22:13:00 GMT", 0.0),
        ("Tue, 14 Nov 2033 22:13:00 GMT", MAX_RETRY_AFTER),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
        ("soon", None),
        ("1 Oct 8 0:25555555555555555555", None),
        ("1 Oct 2023 0:25555555555555555555", None),
        ("Tue, 14 Nov 2023 22:14:20 +999999999999", None),
        ("Tue, 14 Nov 99999999 22:14:20 GMT", None),
        ("9" * 5000, MAX_RETRY_AFTER),
        ("", None),
    ],
)
def test_parse_retry_after(value: str, seconds: float | None) -> None:
    assert parse_retry_after(Headers([("Retry-After", value)]), NOW) == seconds


def test_missing_field_is_none() -> None:
    assert parse_retry_after(Headers(), NOW) is None


dates = st.from_regex(
    r"\A([A-Z][a-z]{2}, )?[0-9]{1,25} (Jan|Feb|Oct|x) [0-9]{1,9} [0-9]{1,25}(:[0-9]{1,25}){0,3}"
    r" ?(GMT|[+-]?[0-9]{0,25})\Z"
)


@given(st.text(max_size=80) | dates)
def test_any_text_is_parsed_or_ignored(value: str) -> None:
    seconds = parse_retry_after(Headers([("retry-after", value)]), NOW)
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER
