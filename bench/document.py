"""`python -m bench.document`: puts the last run of the benchmark, and the last profile, into docs/performance.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.goals import HEADINGS

PROJECT = Path(__file__).resolve().parents[1]
DOCUMENT = PROJECT / "docs/performance.md"
OUTPUT, PROFILE = PROJECT / ".cache/bench.json", PROJECT / ".cache/profile.json"
RUN_PLACE, PROFILE_PLACE = "last run", "profile"
"""What stands in the document between two lines of these names (`marks`) is this program's."""


def main() -> None:
    """Put what files have into a document."""
    parser = argparse.ArgumentParser("document", description="Put the benchmark and the profile into a document.")
    parser.add_argument("--run", type=Path, default=OUTPUT, help="what `python -m bench --json` wrote (%(default)s)")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="what `bench.profile` wrote (%(default)s)")
    parser.add_argument("document", type=Path, nargs="?", default=DOCUMENT)
    options = parser.parse_args()
    text = options.document.read_text()
    places = ((RUN_PLACE, options.run, run_section), (PROFILE_PLACE, options.profile, profile_section))
    for place, file, section in places:
        if file.exists():
            text = replaced(text, place, section(json.loads(file.read_text())))
        else:
            print(f"document: the {place} stays as it is, for there is no {file}", file=sys.stderr)
    options.document.write_text(text)


def run_section(run: Mapping[str, Any]) -> str:
    """Return a run as Markdown: on what it was, the targets, and all figures as they were printed."""
    about = [f"- {name}: {value}" for name, value in run["machine"].items()]
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(target["cells"] for target in run["targets"])]
    targets = [f"| {' | '.join(row)} |" for row in rows]
    missed = sum(not target["met"] for target in run["targets"])
    count = f"{len(run['targets']) - missed} of {len(run['targets'])} targets met."
    return "\n".join([*about, "", *targets, "", count, "", "```text", run["text"].strip("\n"), "```", ""])


def profile_section(profile: Mapping[str, Any]) -> str:
    """Return a profile as Markdown."""
    return f"{profile['table']}\n"


def marks(place: str) -> tuple[str, str]:
    """Return the lines around a place in the document."""
    return f"<!-- {place}: begin -->\n", f"<!-- {place}: end -->\n"


def replaced(document: str, place: str, text: str) -> str:
    """Return `document` with `text` at `place`. Raise ValueError where it has no such place."""
    begin, end = marks(place)
    before, _, rest = document.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{begin.strip()} and {end.strip()} are not both there.")
    return f"{before}{begin}\n{text}\n{end}{after}"


if __name__ == "__main__":
    main()
