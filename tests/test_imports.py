"""The import rules of dockerproxy/__init__.py, checked by parsing the import statements of every module.

One more test checks that the daemon does not load certain modules, because every process would keep them in memory.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.source import module_docstring
from tests.support.startup_modules import UNWANTED, is_within

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dockerproxy"

# The parts of the package that each part may import, besides itself. A part is a package or module in dockerproxy.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "concurrency": set(),
    "config_files": set(),
    "bounded_dict": set(),
    "durations": set(),
    "shares": {"errors"},
    "thread_pool": {"shares"},
    "oci": {"errors"},
    "http": {"oci", "errors"},
    "net": {"oci", "errors"},
    "store": {"oci", "errors"},
    "upstream": {"net", "http", "oci", "errors"},
    "cache": {"store", "upstream", "net", "http", "oci", "errors"},
    "bucket": {"cache", "store", "upstream", "net", "http", "oci", "errors"},
    "fleet": {"cache", "store", "registry", "upstream", "net", "http", "oci", "errors"},
    "registry": {"store", "oci", "http", "errors"},
    "proxy": {"net", "http", "oci", "errors"},
    "daemon": {"http"},
    "parsers": {"durations", "net", "oci", "errors"},
    "settings": {"parsers", "net", "oci", "errors"},
    "reload": {"daemon", "registry", "settings", "upstream", "oci"},
    "admin": {"cache", "daemon", "registry", "proxy", "store", "http", "oci", "errors"},
    "doctor": {"daemon", "net", "oci", "proxy", "settings", "store", "upstream", "errors"},
    "page": {"__init__", "admin", "terminal", "registry", "http", "oci", "errors"},
    "workers": {"cache", "store", "upstream", "daemon", "http", "oci", "errors"},
    "operations": {"store"},  # a process of its own, which starts fast and takes little memory
    "terminal": set(),
    "control_client": set(),
    "config_report": {"reload", "settings"},
    "config_check": {"cache", "reload", "settings", "registry", "proxy", "upstream"},
    # They must start fast, and the daemon does the work. `config --check` works without one.
    "commands": {"config_check", "control_client", "durations", "terminal"},
    "cli": {"__init__", "commands", "control_client", "durations", "terminal"},  # it loads the command that runs
}
COMPOSITION_ROOTS = {
    "tap",
    "app",
    "metering",
    "shared_services",
    "viewing",
    "bucket_operations",
    "answers",
    "workers.process",
}  # they build the daemon and may import every part
ENTRY_POINTS = {"tap"}  # the modules that twistd loads first
ALLOWED_EVERYWHERE = {
    "concurrency",
    "config_files",
    "bounded_dict",
    "shares",
    "thread_pool",
}  # helpers that depend on no part but `errors`

# These modules, and those that say so of themselves, do no I/O. They may not import a reactor, sockets or files.
PURE_MODULES = {
    "oci", "errors", "bounded_dict", "shares", "durations", "net.addresses", "proxy.policy", "proxy.host_rule",
    "proxy.trusted_proxies", "registry.login_throttle",
    "http.connection_state", "http.headers", "http.message", "http.security_fields",
    "http.cross_origin", "upstream.http1",
    "page.charts", "page.setups", "page.views", "page.words",
    "net.store_location", "bucket.s3_xml", "bucket.store_errors",
    "upstream.retry", "upstream.urls", "cache.freshness", "store.eviction",
    "fleet.members", "fleet.hop", "fleet.relays", "net.parent_circles",
}  # fmt: skip
_IMPORTS = re.compile(r"^ *(?:from [\w.]+ )?import (?:\([^)]*\)|[\w., ]+)", re.MULTILINE)
_SAYS_PURE = re.compile(r"\bpure[.:]", re.IGNORECASE)
IO_MODULES = {
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


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """Return the dotted name of the module within the package. For an __init__.py it is the name of its directory."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported_names(source: str, name: str, is_package: bool = False) -> Iterator[str]:
    """Yield the dotted names that the module `name` of `dockerproxy` imports, also within functions and blocks.

    `from x import y` yields `x.y`, because y may be a module.
    """
    # To parse these statements alone takes a tenth of the time. ruff sees to it that each begins a line.
    for node in ast.parse("\n".join(map(str.lstrip, _IMPORTS.findall(source)))).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package_parts = ["dockerproxy", *(name.split(".") if name != "__init__" else [])]
                parent_parts = package_parts[: len(package_parts) - node.level + is_package]
                base = ".".join([*parent_parts, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def imports_of(path: Path) -> set[str]:
    return set(imported_names(path.read_text("utf-8"), module_name(path), path.name == "__init__.py"))


def imported_parts(path: Path) -> set[str]:
    """Return the parts that a module imports. A name that is not a module, such as `__version__`, is of `__init__`."""
    names = {name.split(".")[1] for name in imports_of(path) if name.startswith("dockerproxy.")}
    parts = {entry.name.removesuffix(".py") for entry in PACKAGE.iterdir()}
    return {part if part in parts else "__init__" for part in names}


def test_imports_follow_the_layers() -> None:
    checked = [path for path in modules() if module_name(path) not in COMPOSITION_ROOTS]
    parts = {path: module_name(path).split(".")[0] for path in checked}
    unknown = set(parts.values()) - set(ALLOWED)
    assert not unknown, f"add an entry for {', '.join(sorted(unknown))} to ALLOWED in {Path(__file__).name}"
    wrong = {path: imported_parts(path) - ALLOWED[part] - ALLOWED_EVERYWHERE - {part} for path, part in parts.items()}
    assert {module_name(path): names for path, names in wrong.items() if names} == {}


def is_pure(path: Path) -> bool:
    """Return whether a module is listed as pure, or says so of itself."""
    summary = module_docstring(path.read_text("utf-8")).partition("\n\n")[0]
    return is_within(module_name(path), PURE_MODULES) or _SAYS_PURE.search(summary) is not None


def test_pure_modules_stay_pure() -> None:
    pure = [path for path in modules() if is_pure(path)]
    assert len(pure) > len(PURE_MODULES)
    wrong = {path: {name for name in imports_of(path) if is_within(name, IO_MODULES)} for path in pure}
    assert {module_name(path): names for path, names in wrong.items() if names} == {}


def test_only_entry_points_import_the_reactor() -> None:
    others = [path for path in modules() if module_name(path) not in ENTRY_POINTS]
    assert [module_name(path) for path in others if "twisted.internet.reactor" in imports_of(path)] == []


def test_allowed_imports_have_no_cycle() -> None:
    checked: set[str] = set()
    while remaining := {part for part in ALLOWED if part not in checked}:
        ready = {part for part in remaining if ALLOWED[part] <= checked}
        assert ready, f"import cycle within {', '.join(sorted(remaining))}"
        checked |= ready


@pytest.mark.parametrize(
    ("source", "name", "is_package", "expected"),
    [
        ("import dockerproxy.cache.downloads as f", "store.blobs", False, {"dockerproxy.cache.downloads"}),
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
def test_imported_names(source: str, name: str, is_package: bool, expected: set[str]) -> None:
    assert set(imported_names(source, name, is_package)) == expected


def test_the_process_of_an_operation_does_not_load_twisted() -> None:
    program = "import sys, dockerproxy.operations; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert not {module for module in process.stdout.split() if is_within(module, {*UNWANTED, "twisted", "OpenSSL"})}


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS))
def test_modules_loaded_at_startup(name: str) -> None:
    program = f"import sys, twisted.internet.reactor, dockerproxy.{name}; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    loaded = process.stdout.split()
    assert f"dockerproxy.{name}" in loaded
    assert not {module for module in loaded if is_within(module, UNWANTED)}
