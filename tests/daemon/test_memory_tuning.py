"""Start-up tuning: frozen objects are not collected, and malloc keeps some of the freed memory, but not much."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest

from dockerproxy.daemon.memory_tuning import freeze_startup_objects


def test_existing_objects_are_frozen() -> None:
    existing = [object()]
    freeze_startup_objects()
    assert gc.get_freeze_count() > 1000
    assert not any(tracked is existing for tracked in gc.get_objects())
    later = [existing]
    assert any(tracked is later for tracked in gc.get_objects())


_COUNT_PAGE_FAULTS = """
import resource
from dockerproxy.daemon.memory_tuning import tune_malloc

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


def _run(program: str) -> int:
    """Return the number that `program` prints."""
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


about_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this test is about glibc's malloc")


@about_glibc
def test_freed_memory_is_reused_without_page_faults() -> None:
    def page_faults(setup: str) -> int:
        return _run(_COUNT_PAGE_FAULTS.format(setup=setup))

    assert page_faults("") > 20 * 128  # without the tuning, malloc does return memory to the kernel
    assert page_faults("tune_malloc()") < 20


_FREE_IN_THREADS = """
import re, threading
from pathlib import Path
from dockerproxy.daemon.memory_tuning import tune_malloc

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def read_manifests():
    for _ in range(8):
        b"x" * 4_000_000
    all_freed.wait()
    measured.wait()

{setup}
all_freed, measured = threading.Barrier(9), threading.Barrier(9)
before = resident()
for _ in range(8):
    threading.Thread(target=read_manifests).start()
all_freed.wait()
print(resident() - before)
measured.wait()
"""


@about_glibc
def test_waiting_threads_keep_no_freed_memory() -> None:
    def kept(setup: str) -> int:
        return _run(_FREE_IN_THREADS.format(setup=setup))

    assert kept("bytes(4 * 1024 * 1024)") > 16 * 1024  # KiB: each thread has a heap that keeps the last blocks
    assert kept("tune_malloc()") < 4 * 1024
