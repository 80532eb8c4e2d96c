"""`python -m bench.document`: puts the last benchmark run and the last profile into docs/performance.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.performance_targets import HEADINGS

PROJECT = Path(__file__).resolve().parents[1]
DOCUMENT = PROJECT / "docs/performance.md"
RUN_FILE, PROFILE_FILE = PROJECT / ".cache/bench.json", PROJECT / ".cache/profile.json"
RUN_SECTION, PROFILE_SECTION = "last run", "profile"
"""Names of the generated sections. `section_markers` returns the lines that enclose a section in the document."""


def main() -> None:
    """Replace the generated sections of a document with the contents of the result files."""
    parser = argparse.ArgumentParser("document", description="Put the last benchmark run and profile into a document.")
    parser.add_argument(
        "--run", type=Path, default=RUN_FILE, help="the output of `python -m bench --json` (%(default)s)"
    )
    parser.add_argument(
        "--profile", type=Path, default=PROFILE_FILE, help="the output of `bench.profile` (%(default)s)"
    )
    parser.add_argument("document", type=Path, nargs="?", default=DOCUMENT)
    options = parser.parse_args()
    text = options.document.read_text()
    sections = ((RUN_SECTION, options.run, render_run), (PROFILE_SECTION, options.profile, render_profile))
    for section, file, render in sections:
        if file.exists():
            text = replace_section(text, section, render(json.loads(file.read_text())))
        else:
            print(f"document: {file} does not exist; the section {section!r} is unchanged", file=sys.stderr)
    options.document.write_text(text)


def render_run(run: Mapping[str, Any]) -> str:
    """Return a run as Markdown: the machine, the targets, and all figures as they were printed."""
    description = [f"- {name}: {value}" for name, value in run["machine"].items()]
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(target["cells"] for target in run["targets"])]
    targets = [f"| {' | '.join(row)} |" for row in rows]
    missed = sum(not target["met"] for target in run["targets"])
    count = f"{len(run['targets']) - missed} of {len(run['targets'])} targets met."
    return "\n".join([*description, "", *targets, "", count, "", "```text", run["text"].strip("\n"), "```", ""])


def render_profile(profile: Mapping[str, Any]) -> str:
    """Return a profile as Markdown."""
    return f"{profile['table']}\n"


def section_markers(section: str) -> tuple[str, str]:
    """Return the lines that begin and end `section` in the document."""
    return f"<!-- {section}: begin -->\n", f"<!-- {section}: end -->\n"


def replace_section(document: str, section: str, text: str) -> str:
    """Return `document` with `text` as the content of `section`. Raise ValueError if it has no such section."""
    begin, end = section_markers(section)
    before, _, rest = document.partition(begin)
    _, end_found, after = rest.partition(end)
    if not end_found:
        raise ValueError(f"The document lacks {begin.strip()} or, after it, {end.strip()}.")
    return f"{before}{begin}\n{text}\n{end}{after}"


if __name__ == "__main__":
    main()
