"""What the programs of the benchmark do before anything else."""

from __future__ import annotations

import resource
import signal
import sys
from typing import NoReturn

_OPEN_FILES_LIMIT = 8192  # descriptors: of the slow clients, and of the daemon, which has two for each


def configure_process() -> None:
    """Allow this process, and those that it starts, enough open files; have SIGTERM end it so that it stops them."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE,
        (_OPEN_FILES_LIMIT if hard_limit == resource.RLIM_INFINITY else min(_OPEN_FILES_LIMIT, hard_limit), hard_limit),
    )


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
