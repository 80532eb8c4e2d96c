"""What the programs of the benchmark do before anything else."""

from __future__ import annotations

import resource
import signal
import sys
from typing import NoReturn

_FILES = 8192  # descriptors: of the slow clients, and of the daemon, which has two for each


def prepare() -> None:
    """Allow this process, and those that it starts, enough open files; have SIGTERM end it so that it stops them."""
    signal.signal(signal.SIGTERM, _end)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES if most == resource.RLIM_INFINITY else min(_FILES, most), most))


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
