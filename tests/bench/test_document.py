"""The generated sections of docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.document import (
    DOCUMENT,
    PROFILE_SECTION,
    RUN_SECTION,
    main,
    render_profile,
    render_run,
    replace_section,
    section_markers,
)

BEGIN, END = section_markers(RUN_SECTION)
RUN_DATA = {
    "machine": {"date": "2026-01-02", "rounds": "5"},
    "targets": [
        {"met": True, "cells": ["hit", "s/GB", "0.7", "nginx 1.0", "0.70", "≤ 0.8 ×", "met"]},
        {"met": False, "cells": ["start", "s", "0.7", "", "", "≤ 0.6", "MISSED"]},
    ],
    "text": "\nhit: a blob\n",
}


def test_run_is_rendered_as_markdown() -> None:
    assert render_run(RUN_DATA).splitlines() == [
        "- date: 2026-01-02",
        "- rounds: 5",
        "",
        "| target | unit | proxy | peer | ratio | bound |  |",
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


def test_only_the_section_is_replaced() -> None:
    first = replace_section(f"before\n{BEGIN}old\n{END}after\n", RUN_SECTION, "new\n")
    assert first == f"before\n{BEGIN}\nnew\n\n{END}after\n"
    assert replace_section(first, RUN_SECTION, "new\n") == first


@pytest.mark.parametrize("document", ["", BEGIN, END, END + BEGIN])
def test_missing_markers_are_an_error(document: str) -> None:
    with pytest.raises(ValueError, match="The document lacks"):
        replace_section(document, RUN_SECTION, "new\n")


def test_sections_are_independent() -> None:
    begin, end = section_markers(PROFILE_SECTION)
    run = f"{BEGIN}run\n{END}between\n"
    document = replace_section(f"{run}{begin}{end}", PROFILE_SECTION, render_profile({"table": "| a |"}))
    assert document == f"{run}{begin}\n| a |\n\n{end}"


def test_performance_document_has_markers() -> None:
    for section in (RUN_SECTION, PROFILE_SECTION):
        assert replace_section(DOCUMENT.read_text(), section, "new\n")


def test_section_without_file_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    document, profile = tmp_path / "document.md", tmp_path / "profile.json"
    before = "".join([BEGIN, "run\n", END, *section_markers(PROFILE_SECTION)])
    document.write_text(before)
    profile.write_text('{"table": "| a |"}')
    argv = ["document", "--run", str(tmp_path / "none.json"), "--profile", str(profile), str(document)]
    monkeypatch.setattr("sys.argv", argv)
    main()
    assert document.read_text() == replace_section(before, PROFILE_SECTION, "| a |\n")
    assert "none.json does not exist; the section 'last run' is unchanged" in capsys.readouterr().err
