"""The power fails: an acknowledged push stays, if the store syncs as docs/fleet.md says."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.object_store import SECRET_KEY
from tests.e2e.harness.process import mount_after_power_cut, mount_ext4
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.e2e.harness.seaweedfs import SeaweedCluster
from tests.e2e.test_bucket import check_pull, push

pytestmark = pytest.mark.slow


def test_acknowledged_pushes_stay_after_a_power_cut(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mount_ext4(disk, "1G", journal=True):
        store = SeaweedCluster(disk / "store", syncs_names=True)
        with store.run():
            settings = store.settings(store.make_bucket("power-cut"))
            subprocess.run(["sync", "--file-system", str(disk)], check=True)  # the store is older than its last pushes
            first = RegistryDaemon(tmp_path / "first", settings)
            with first.run_and_check_log(lambda: [SECRET_KEY]):
                pushed = [
                    push(first, "acme/app", f"v{number}", images.build_small_image(f"power cut {number}"))
                    for number in range(3)
                ]
                unsynced = disk / "unsynced"
                unsynced.write_bytes(b"not synced" * 1000)
                for part in store.parts.values():
                    part.send_signal(signal.SIGSTOP)
                with mount_after_power_cut(disk, tmp_path / "copy.img"):
                    store.kill(store.parts)
                    assert not unsynced.exists() or not unsynced.read_bytes(), "this was no power cut"
                    try:
                        store.repair()
                        store.start()
                        second = RegistryDaemon(tmp_path / "second", settings)
                        with second.run_and_check_log(lambda: [SECRET_KEY]):
                            for number, image in enumerate(pushed):
                                check_pull(second.http_port, "acme/app", f"v{number}", image)
                            push(second, "acme/app", "later", pushed[0])
                    finally:
                        store.close()
