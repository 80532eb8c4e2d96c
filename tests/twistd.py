"""The command line of twistd, for tests that run the daemon in a process of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def twistd_command() -> list[str]:
    """Return the command that runs `twistd` in the foreground: of this Python's environment, or else Debian's."""
    sibling = Path(sys.executable).with_name("twistd")
    return [str(sibling if sibling.exists() else shutil.which("twistd3") or "twistd"), "--nodaemon", "--pidfile="]
