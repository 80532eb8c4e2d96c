"""Output for a terminal: whatever a name or a message contains, the terminal shows it and does not obey it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy import terminal
from dockerproxy.terminal import format_count, format_seconds, print_line, print_table, printable


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0001, "0.1 ms"), (0.0123, "12 ms"), (0.0994, "99 ms"), (0.0996, "0.1 s"), (1.26, "1.3 s"), (12.5, "12 s")],
)
def test_short_times(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "process", "0 processes"),
        (1, "process", "1 process"),
        (2, "day", "2 days"),
        (2, "repository", "2 repositories"),
        (3, "tag", "3 tags"),
    ],
)
def test_plurals(number: int, noun: str, text: str) -> None:
    assert format_count(number, noun) == text


def test_a_table_on_a_terminal_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    terminal._print_rich_table(("NAME",), [("a\x1b]0;title\x07b [red]c",)])
    output = capsys.readouterr().out
    assert "\\x1b]0;title\\x07b [red]c" in output
    assert all(character.isprintable() or character == "\n" for character in output)
