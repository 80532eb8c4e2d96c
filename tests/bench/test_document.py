"""The last run's place in docs/performance.md."""

from __future__ import annotations

import pytest

from bench.document import BEGIN, DOCUMENT, END, replaced, section

RUN = {
    "machine": {"date": "2026-01-02", "rounds": "5"},
    "targets": [
        {"met": True, "cells": ["hit", "s/GB", "0.7", "nginx 1.0", "0.70", "≤ 0.8 ×", "met"]},
        {"met": False, "cells": ["start", "s", "0.7", "", "", "≤ 0.6", "MISSED"]},
    ],
    "text": "\nhit: a blob\n",
}


def test_a_run_as_markdown() -> None:
    assert section(RUN).splitlines() == [
        "- date: 2026-01-02",
        "- rounds: 5",
        "",
        "| what | unit | proxy | peer | ratio | target |  |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| hit | s/GB | 0.7 | nginx 1.0 | 0.70 | ≤ 0.8 × | met |",
        "| start | s | 0.7 |  |  | ≤ 0.6 | MISSED |",
        "",
        "1 of 2 targets met.",
        "",
        "```text",
        "hit: a blob",
        "```",
    ]


def test_only_what_stands_between_the_lines_is_replaced() -> None:
    first = replaced(f"before\n{BEGIN}old\n{END}after\n", "new\n")
    assert first == f"before\n{BEGIN}\nnew\n\n{END}after\n"
    assert replaced(first, "new\n") == first


@pytest.mark.parametrize("document", ["", BEGIN, END, END + BEGIN])
def test_a_document_without_the_lines_is_left_alone(document: str) -> None:
    with pytest.raises(ValueError, match="not both there"):
        replaced(document, "new\n")


def test_ours_has_them() -> None:
    assert replaced(DOCUMENT.read_text(), "new\n")
