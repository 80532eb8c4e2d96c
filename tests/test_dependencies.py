"""Each list of dependencies has what setup.cfg requires: those of the package, the Makefile and the tests' machines."""

import configparser
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]

# The Debian package of a project, where it is not python3-NAME.
_DEBIAN_NAMES = {"attrs": "python3-attr", "pyopenssl": "python3-openssl", "pyyaml": "python3-yaml"}


def _requirements() -> dict[str, str]:
    """Return the oldest version of each dependency, those of the extras ``s3`` and ``yaml`` included."""
    setup = configparser.ConfigParser()
    setup.read(_ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [setup["options"]["install_requires"], extras["s3"], extras["yaml"]]
    return dict(line.split(">=") for line in " ".join(lines).split())


REQUIREMENTS = _requirements()


def _debian_name(project: str) -> str:
    return _DEBIAN_NAMES.get(project, f"python3-{project.replace('_', '-')}")


@pytest.mark.parametrize("project", REQUIREMENTS)
def test_the_package_depends_on_it(project: str) -> None:
    control = (_ROOT / "debian/control").read_text()
    package = control.partition("\nPackage: ")[2]
    assert f"\n {_debian_name(project)} (>= {REQUIREMENTS[project]}),\n" in package


@pytest.mark.parametrize("project", REQUIREMENTS)
def test_the_oldest_version_is_tested(project: str) -> None:
    oldest = dict(re.findall(r"([\w-]+)==([\d.]+)", (_ROOT / "Makefile").read_text()))
    assert f"{oldest[project]}.".startswith(f"{REQUIREMENTS[project]}.")


@pytest.mark.parametrize("project", REQUIREMENTS)
def test_the_machines_can_install_it(project: str) -> None:
    machines = (_ROOT / "tests/deb/machines.sh").read_text()
    later = ",".join(re.findall(r"^LATER\+?=(.*)$", machines, re.MULTILINE)).split(",")
    assert _debian_name(project) in later
