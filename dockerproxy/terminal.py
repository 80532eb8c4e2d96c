"""Output for a terminal: progress bars, tables, and formatted numbers.

`rich` draws bars and tables. It is loaded only if there is a terminal to draw on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress


class Terminal:
    """Shows progress on stderr if that is a terminal. `as_json` is true if the user asked for JSON output."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._progress: Progress | None = None
        self._phase: str | None = None

    def show_progress(self, phase: str, done: int, total: int | None) -> None:
        """Show a progress bar, or only the amount done if `total` is unknown."""
        if not sys.stderr.isatty():
            return
        if phase == "contents":
            text = f"blobs: {format_size(done)}" + ("" if total is None else f" of {format_size(total)}")
        else:
            text = f"{phase}: {done}"
        percent = f"{min(100, 100 * done // total)} %" if total else ""
        if phase != self._phase:
            self.clear_progress()
        if self._progress is None:
            self._progress, self._phase = _start_progress(), phase
            self._progress.add_task("", completed=done, total=total or None, text=printable(text), percent=percent)
        [task] = self._progress.task_ids
        self._progress.update(task, completed=done, total=total or None, text=printable(text), percent=percent)

    def clear_progress(self) -> None:
        """Erase the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._phase = None


def _start_progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    text, percent = (TextColumn(f"{{task.fields[{field}]}}", markup=False) for field in ("text", "percent"))
    # Not redirected: what replaces stderr in rich 13.3 says that it is no terminal.
    console = Console(stderr=True)
    progress = Progress(text, BarColumn(), percent, console=console, transient=True, redirect_stderr=False)
    progress.start()
    return progress


def printable(text: str) -> str:
    """Return `text` with Python's escapes for all that is not printable.

    These are control characters, escape sequences, line separators, controls of bidirectional text and lone surrogates.
    Names come from whoever may push or from a registry upstream, and could otherwise change what the terminal shows.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print one line of printable text, to stdout by default."""
    print(printable(text), file=file)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `header` and `rows` in aligned columns, on a terminal as wide as that is."""
    if sys.stdout.isatty():
        _print_rich_table(header, rows)
        return
    lines = [tuple(map(printable, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_rich_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # a `Text` is no markup
    Console(highlight=False).print(table)


def format_count(number: int, noun: str) -> str:
    """Return `number` with the singular or plural of `noun`."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number} {noun[:-1]}ies"
    return f"{number} {noun}es" if noun.endswith("s") else f"{number} {noun}s"


def format_list(words: Sequence[str]) -> str:
    """Return the words with commas, and "and" before the last."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def format_size(number: float) -> str:
    """Return a number of bytes as docker prints it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"


def format_seconds(seconds: float) -> str:
    """Return a short time, such as that of a response, with two digits or three."""
    return (
        f"{seconds * 1000:.2g} ms" if seconds < 0.0995 else f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    )


def format_window(seconds: float) -> str:
    """Return a span of time in the largest unit that divides it."""
    for noun, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length and not seconds % length:
            return format_count(int(seconds // length), noun)
    return format_count(int(seconds), "second")


def format_ago(timestamp: float | None) -> str:
    """Return the age of `timestamp` (POSIX time) with "ago", or "-" if it is None."""
    return "-" if timestamp is None else f"{format_age(timestamp)} ago"


def format_age(timestamp: float) -> str:
    """Return the time since `timestamp` (POSIX time) in its largest unit."""
    seconds = max(0.0, time.time() - timestamp)
    for noun, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return format_count(int(seconds // length), noun)
    return format_count(int(seconds), "second")
