"""Who may import whom: the flow of dockerproxy/__init__.py, held by reading every module's import statements.

And what no process of the daemon loads, for each has it in memory to the end.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dockerproxy"

# What each part may import of ours, beside itself. A part is a folder or module directly under dockerproxy.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "tasks": set(),
    "oci": {"errors"},
    "http": {"oci", "errors"},
    "net": {"oci", "errors"},
    "store": {"oci", "errors"},
    "upstream": {"net", "http", "oci", "errors"},
    "cache": {"store", "upstream", "net", "http", "oci", "errors"},
    "registry": {"store", "oci", "http", "errors"},
    "proxy": {"net", "http", "oci", "errors"},
    "daemon": {"http"},
    "values": {"net", "oci", "errors"},
    "settings": {"values", "net", "oci", "errors"},
    "reload": {"daemon", "registry", "settings", "oci"},
    "admin": {"cache", "registry", "proxy", "store", "http", "oci", "errors"},
    "workers": {"cache", "store", "daemon", "http", "oci"},
    "screen": set(),
    "cli": {"__init__", "screen"},  # it asks the daemon, and starts fast
}
COMPOSE = {"tap", "worker", "assembly"}  # these put the parts together and may import all of them
BEGIN = {"tap"}  # where the daemon begins
EVERYWHERE = {"tasks"}  # helpers that know of no part

# Each would be loaded with all that it needs itself: megabytes that no request has a use for.
UNUSED = {
    "importlib.resources",
    "multiprocessing",
    "sqlite3",
    "twisted.trial",
    "twisted.web.client",
    "twisted.web.http",
    "twisted.web.server",
    "unittest",
    "xml",
}

# They decide and do no I/O: no reactor, no socket and no file is in their reach.
PURE = {"oci", "errors", "net.addresses", "proxy.policy", "proxy.head", "cache.freshness", "store.eviction"}
IMPURE = {
    "twisted.internet",
    "twisted.web",
    "socket",
    "ssl",
    "OpenSSL",
    "os",
    "pathlib",
    "asyncio",
    "threading",
    "time",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path, package: Path = PACKAGE) -> str:
    """Return the module's dotted name below the package; a folder's own is the folder's."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported(source: str, name: str, is_package: bool = False) -> Iterator[str]:
    """Yield the dotted names that the module `name` of the package `dockerproxy` imports, at whatever depth.

    `from x import y` yields `x.y`: y may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["dockerproxy", *(name.split(".") if name != "__init__" else [])]
                kept = here[: len(here) - node.level + is_package]
                base = ".".join([*kept, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    return set(imported(path.read_text("utf-8"), name_of(path), path.name == "__init__.py"))


def parts_imported(path: Path) -> set[str]:
    """Return the parts that a module imports; what is no module of the package is its own, as `__version__` is."""
    found = {name.split(".")[1] for name in imports_of(path) if name.startswith("dockerproxy.")}
    parts = {entry.name.removesuffix(".py") for entry in PACKAGE.iterdir()}
    return {part if part in parts else "__init__" for part in found}


def is_within(name: str, groups: set[str]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    part = name_of(path).split(".")[0]
    if part in COMPOSE:
        return
    assert part in ALLOWED, f"say in {Path(__file__).name} what {part} may import"
    wrong = parts_imported(path) - ALLOWED[part] - EVERYWHERE - {part}
    assert not wrong, f"{name_of(path)} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", [path for path in modules() if is_within(name_of(path), PURE)], ids=name_of)
def test_pure_modules_stay_pure(path: Path) -> None:
    wrong = {name for name in imports_of(path) if is_within(name, IMPURE)}
    assert not wrong, f"{name_of(path)} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", [path for path in modules() if name_of(path) not in BEGIN], ids=name_of)
def test_only_the_beginning_of_a_process_imports_the_reactor(path: Path) -> None:
    assert "twisted.internet.reactor" not in imports_of(path)


def test_the_directions_have_no_circle() -> None:
    done: set[str] = set()
    while left := {part for part in ALLOWED if part not in done}:
        ready = {part for part in left if ALLOWED[part] <= done}
        assert ready, f"a circle within {', '.join(sorted(left))}"
        done |= ready


@pytest.mark.parametrize(
    ("source", "name", "is_package", "found"),
    [
        ("import dockerproxy.cache.flights as f", "store.blobs", False, {"dockerproxy.cache.flights"}),
        ("from dockerproxy import cache, errors", "store.blobs", False, {"dockerproxy.cache", "dockerproxy.errors"}),
        ("def f():\n    from dockerproxy.cache import x", "store.blobs", False, {"dockerproxy.cache.x"}),
        ("if TYPE_CHECKING:\n    from dockerproxy.cache import x", "store.blobs", False, {"dockerproxy.cache.x"}),
        ("from ..cache import x", "store.blobs", False, {"dockerproxy.cache.x"}),
        ("from .. import cache", "store.blobs", False, {"dockerproxy.cache"}),
        ("from .layout import x", "store.blobs", False, {"dockerproxy.store.layout.x"}),
        ("from . import layout", "store", True, {"dockerproxy.store.layout"}),
        ("from .cache import x", "settings", False, {"dockerproxy.cache.x"}),
        ("from . import cache", "__init__", True, {"dockerproxy.cache"}),
        ("from twisted.internet import reactor", "store.blobs", False, {"twisted.internet.reactor"}),
    ],
)
def test_the_reading_of_import_statements(source: str, name: str, is_package: bool, found: set[str]) -> None:
    assert set(imported(source, name, is_package)) == found


@pytest.mark.parametrize("name", sorted(BEGIN))
def test_what_a_process_loads(name: str) -> None:
    program = f"import sys, twisted.internet.reactor, dockerproxy.{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    loaded = done.stdout.split()
    assert f"dockerproxy.{name}" in loaded
    assert not {module for module in loaded if is_within(module, UNUSED)}
