"""The last run's place in docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.document import DOCUMENT, PROFILE_PLACE, RUN_PLACE, main, marks, profile_section, replaced, run_section

BEGIN, END = marks(RUN_PLACE)
RUN = {
    "machine": {"date": "2026-01-02", "rounds": "5"},
    "targets": [
        {"met": True, "cells": ["hit", "s/GB", "0.7", "nginx 1.0", "0.70", "≤ 0.8 ×", "met"]},
        {"met": False, "cells": ["start", "s", "0.7", "", "", "≤ 0.6", "MISSED"]},
    ],
    "text": "\nhit: a blob\n",
}


def test_a_run_as_markdown() -> None:
    assert run_section(RUN).splitlines() == [
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
    first = replaced(f"before\n{BEGIN}old\n{END}after\n", RUN_PLACE, "new\n")
    assert first == f"before\n{BEGIN}\nnew\n\n{END}after\n"
    assert replaced(first, RUN_PLACE, "new\n") == first


@pytest.mark.parametrize("document", ["", BEGIN, END, END + BEGIN])
def test_a_document_without_the_lines_is_left_alone(document: str) -> None:
    with pytest.raises(ValueError, match="not both there"):
        replaced(document, RUN_PLACE, "new\n")


def test_each_place_is_filled_by_itself() -> None:
    begin, end = marks(PROFILE_PLACE)
    run = f"{BEGIN}run\n{END}between\n"
    filled = replaced(f"{run}{begin}{end}", PROFILE_PLACE, profile_section({"table": "| a |"}))
    assert filled == f"{run}{begin}\n| a |\n\n{end}"


def test_ours_has_them() -> None:
    for place in (RUN_PLACE, PROFILE_PLACE):
        assert replaced(DOCUMENT.read_text(), place, "new\n")


def test_what_there_is_no_file_of_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    document, profile = tmp_path / "document.md", tmp_path / "profile.json"
    before = "".join([BEGIN, "run\n", END, *marks(PROFILE_PLACE)])
    document.write_text(before)
    profile.write_text('{"table": "| a |"}')
    argv = ["document", "--run", str(tmp_path / "none.json"), "--profile", str(profile), str(document)]
    monkeypatch.setattr("sys.argv", argv)
    main()
    assert document.read_text() == replaced(before, PROFILE_PLACE, "| a |\n")
    assert "the last run stays as it is" in capsys.readouterr().err
