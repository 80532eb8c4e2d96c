"""Process set-up that all programs of the benchmark share."""

from __future__ import annotations

import resource
import signal
import sys
from typing import NoReturn

_OPEN_FILES_LIMIT = 8192  # descriptors: the slow clients need one each, the daemon two for each of them


def configure_process() -> None:
    """Raise the limit of open files for this process and its children, and turn SIGTERM into SystemExit.

    SystemExit unwinds the context managers that stop the servers.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE,
        (_OPEN_FILES_LIMIT if hard_limit == resource.RLIM_INFINITY else min(_OPEN_FILES_LIMIT, hard_limit), hard_limit),
    )


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)
