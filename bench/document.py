"""`python -m bench.document`: puts the last run of the benchmark into docs/performance.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.goals import HEADINGS

PROJECT = Path(__file__).resolve().parents[1]
DOCUMENT, OUTPUT = PROJECT / "docs/performance.md", PROJECT / ".cache/bench.json"
BEGIN, END = "<!-- last run: begin -->\n", "<!-- last run: end -->\n"
"""What stands between these lines is this program's."""


def main() -> None:
    """Put what a file has into a document."""
    parser = argparse.ArgumentParser("document", description="Put a run of the benchmark into a document.")
    parser.add_argument("run", type=Path, nargs="?", default=OUTPUT, help="what `python -m bench --json` wrote")
    parser.add_argument("document", type=Path, nargs="?", default=DOCUMENT)
    options = parser.parse_args()
    document: Path = options.document
    document.write_text(replaced(document.read_text(), section(json.loads(options.run.read_text()))))


def section(run: Mapping[str, Any]) -> str:
    """Return a run as Markdown: on what it was, the targets, and all figures as they were printed."""
    about = [f"- {name}: {value}" for name, value in run["machine"].items()]
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(target["cells"] for target in run["targets"])]
    targets = [f"| {' | '.join(row)} |" for row in rows]
    missed = sum(not target["met"] for target in run["targets"])
    count = f"{len(run['targets']) - missed} of {len(run['targets'])} targets met."
    return "\n".join([*about, "", *targets, "", count, "", "```text", run["text"].strip("\n"), "```", ""])


def replaced(document: str, text: str) -> str:
    """Return `document` with `text` between the two lines. Raise ValueError where it does not have them."""
    before, _, rest = document.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{BEGIN.strip()} and {END.strip()} are not both there.")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


if __name__ == "__main__":
    main()
