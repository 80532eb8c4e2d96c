"""The table of docs/clients.md: a row for each client, a column for each kind of registry, a mark for each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tests.clients.matrix import (
    COLD,
    DIRECT,
    ENGINE,
    HOSTED,
    HOSTED_OFF,
    HOSTED_PULL,
    HOSTED_PUSH,
    OFF,
    PUSH,
    WARM,
    MatrixRow,
    Verdict,
)
from tests.clients.matrix_clients import ABSENT_CLIENTS
from tests.clients.upstream_set import SOURCES

GOOD, RED, NOT_OURS, NOT_RUN = "+", "**X**", "o", " "

_STEPS = {
    **{source.key: (COLD, WARM, OFF) for source in SOURCES},
    HOSTED: (HOSTED_PUSH, HOSTED_PULL, HOSTED_OFF),
    PUSH: (PUSH,),
}
_HEADINGS = {
    "hub": "Docker Hub",
    "redirecting": "redirecting",
    "hub-private": "Docker Hub, private",
    "token": "private, tokens",
    "listed": "private, listed tokens",
    "basic": "private, Basic",
    "shared": "shared login",
    HOSTED: "hosted: push, pull, off",
    PUSH: "push",
    ENGINE: "start",
}


def render(rows: Sequence[MatrixRow], notes: Iterable[str]) -> str:
    """Return the table of `rows`, the clients that were not run, and what went wrong, as Markdown."""
    lines = [
        f"| client | version | {' | '.join(_HEADINGS[column] for column in _STEPS)} |",
        f"| --- | --- |{' --- |' * len(_STEPS)}",
    ]
    for row in rows:
        cells = [_render_cell(row, column) for column in _STEPS]
        lines.append(f"| {row.client.TITLE} | {row.version} | {' | '.join(cells)} |")
    lines += ["", *notes, "", "Not run:", ""]
    lines += [f"- {client.title}: {client.reason}" for client in ABSENT_CLIENTS]
    failures = [f"- {line}" for line in describe(rows, explained=False)]
    if failures:
        lines += ["", "Steps that failed:", "", *failures]
    return "\n".join(lines) + "\n"


def _render_cell(row: MatrixRow, column: str) -> str:
    return " ".join(_render_step(row, column, step) for step in _STEPS[column]).rstrip()


def _render_step(row: MatrixRow, column: str, step: str) -> str:
    outcome = row.outcomes.get((column, step))
    if row.is_red(column, step):
        return RED
    if outcome is None:
        return NOT_RUN
    return GOOD if outcome.verdict is Verdict.GOOD else NOT_OURS


def describe(rows: Iterable[MatrixRow], *, explained: bool = True) -> Iterator[str]:
    """Yield a line for each step that did not go well; without `explained`, not for those that cannot work."""
    for row in rows:
        for (column, step), outcome in row.outcomes.items():
            if outcome.verdict is not Verdict.GOOD and (explained or not row.needs_token_server(column, step)):
                mark = RED if row.is_red(column, step) else "directly" if step == DIRECT else NOT_OURS
                message = outcome.message.replace("|", "\\|")
                yield f"{mark}: {row.client.TITLE} {row.version}: {_HEADINGS[column]}, {step}: {message}"
