"""Start-up tuning: frozen objects are not collected, and freed memory causes no page faults."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest

from dockerproxy.daemon.gc_tuning import freeze_startup_objects


def test_existing_objects_are_frozen() -> None:
    existing = [object()]
    freeze_startup_objects()
    assert gc.get_freeze_count() > 1000
    assert not any(tracked is existing for tracked in gc.get_objects())
    later = [existing]
    assert any(tracked is later for tracked in gc.get_objects())


_COUNT_PAGE_FAULTS = """
import resource
from dockerproxy.daemon.gc_tuning import freeze_startup_objects

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        pieces = [bytes(bytearray(b"x") * 512 * 1024) for _ in range(8)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{setup}
faults(2)
print(faults(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this test is about glibc's malloc")
def test_freed_memory_is_reused_without_page_faults() -> None:
    def page_faults(setup: str) -> int:
        program = _COUNT_PAGE_FAULTS.format(setup=setup)
        return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    assert page_faults("") > 20 * 128  # without the tuning, malloc does return memory to the kernel
    assert page_faults("freeze_startup_objects()") < 20
