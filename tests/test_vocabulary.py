"""The house's rules for names and prose, as far as a program can check them."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.source import prose

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("dockerproxy", "tests", "bench") for path in (ROOT / folder).rglob("*.py"))

# A sentence names its subject first. These words begin sentences that do not.
BAD_BEGINNING = re.compile(r"\b(?:What|Whatever|Who|Whoever|Whose|Whom|Of)\b")
# Words per 1,000 words of docstrings and comments, at most; beside them, what twisted/application and h11 have.
LIMITS = {
    r"\bwhat(ever)?\b": 3.0,  # 0.0, 1.6
    r"\bwhere(ver)?\b": 3.0,  # 0.4, 2.6; mostly written in place of "if"
    r"\bwho(ever|se|m)?\b": 1.0,  # 0.4, 0.1
    r", for\b(?! example)": 0.3,  # 0.0, 0.7; in place of "because"
}


def test_no_sentence_begins_without_its_subject() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match.group()} ..."
        for path in FILES
        for line, text in prose(path)
        for match in BAD_BEGINNING.finditer(text)
        if not match.start() or text[: match.start()].endswith((". ", ": ", "? ", "! "))
    ]
    assert found == []


DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "man/*", "dockerproxy/page/templates/*", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_sentence_for_users_begins_without_its_subject(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    beginning = re.compile(rf"(?:^[\s>|*#-]*|[.?!|>]\s+){BAD_BEGINNING.pattern}.*", re.MULTILINE)
    assert [match.group() for match in beginning.finditer(text)] == []


@pytest.mark.parametrize("folder", ["dockerproxy", "tests", "bench"])
def test_prose_is_near_the_models(folder: str) -> None:
    text = " ".join(text for path in FILES if path.is_relative_to(ROOT / folder) for _, text in prose(path))
    words = len(re.findall(r"\w+", text))
    counts = {pattern: 1000 * len(re.findall(pattern, text, re.IGNORECASE)) / words for pattern in LIMITS}
    assert {pattern: count for pattern, count in counts.items() if count > LIMITS[pattern]} == {}


def test_class_names_are_unique() -> None:
    """One name means one class. Private classes (with an underscore) belong to their module."""
    places = defaultdict(list)
    for path in (path for path in FILES if path.is_relative_to(ROOT / "dockerproxy")):
        for name in re.findall(r"^class (\w+)", path.read_text("utf-8"), re.MULTILINE):
            places[name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_the_architecture_names_every_module() -> None:
    words = set(re.findall(r"\w+", (ROOT / "docs" / "architecture.md").read_text("utf-8")))
    modules = {path.stem for path in (ROOT / "dockerproxy").rglob("*.py")} - {"__init__"}
    assert modules - words == set()


def test_the_threat_model_names_every_attack() -> None:
    """SECURITY.md names each module of attacks, and none that does not exist. Networks without attacks are honest."""
    cells = re.findall(r"\| ([^|]+) \|$", (ROOT / "SECURITY.md").read_text("utf-8"), re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"(?:tests/\w+/)?test_\w+", cell)}
    attacks = {path.stem for path in (ROOT / "tests" / "hostile").glob("test_*.py")} - {"test_network"}
    assert attacks - named == set()
    paths = {name if name.startswith("tests/") else f"tests/hostile/{name}" for name in named}
    assert [path for path in sorted(paths) if not (ROOT / f"{path}.py").exists()] == []
