"""Output for a terminal: whatever a name or a message contains, the terminal shows it and does not obey it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.terminal import print_line, print_table, printable


@given(st.text())
def test_all_text_becomes_printable_and_stays_distinct(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("library/ubuntu:22.04", "library/ubuntu:22.04"),
        ("Grüße, שלום", "Grüße, שלום"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\nc\x85d\u2028", "a\\rb\\nc\\x85d\\u2028"),
        ("gnp.\u202egpj\u2066", "gnp.\\u202egpj\\u2066"),
        ("caf\udce9", "caf\\udce9"),
        ("\x9b31m", "\\x9b31m"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("\x1b[2J")
    print_table(("A", "B"), [("\x1b[1m", "x"), ("longer name", "y\nz")])
    assert capsys.readouterr().out == "\\x1b[2J\nA            B\n\\x1b[1m      x\nlonger name  y\\nz\n"
