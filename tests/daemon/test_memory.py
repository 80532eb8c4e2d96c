from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest

from dockerproxy.daemon.memory import settle_memory


def test_what_the_start_made_is_not_looked_at_again(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(gc.unfreeze)
    mine = [object()]
    settle_memory()
    assert gc.get_freeze_count() > 1000
    assert not any(known is mine for known in gc.get_objects())
    later = [mine]
    assert any(known is later for known in gc.get_objects())


_COME_AND_GO = """
import resource
from dockerproxy.daemon.memory import settle_memory

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        pieces = [bytes(bytearray(b"x") * 512 * 1024) for _ in range(8)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{settle}
faults(2)
print(faults(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc, and this is another C library")
def test_memory_that_comes_and_goes_is_not_taken_from_the_kernel_each_time() -> None:
    def faults(settle: str) -> int:
        program = _COME_AND_GO.format(settle=settle)
        return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    assert faults("") > 20 * 128  # so this has something to show
    assert faults("settle_memory()") < 20
