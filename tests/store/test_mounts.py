"""Which directories are on file systems that may hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from dockerproxy.store.mounts import remote_file_system

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / {root}/nas rw,relatime shared:7 - nfs4 nas:/export rw,hard
31 30 254:0 / {root}/nas/local rw - ext4 /dev/vdb rw
32 22 0:40 / {root}/with\040space rw - vboxsf registry rw
33 22 0:41 / {root}/twice rw - ext4 /dev/vdc rw
34 33 0:42 / {root}/twice rw - fuse.sshfs host: rw
35 22 0:43 / {root}/memory rw - tmpfs tmpfs rw
36 22 0:44 / {root}/later rw master:1 propagate_from:2 - autofs map rw
37 36 0:45 / {root}/later rw - cifs //nas/x rw
38 22 0:46 / {root}/{odd} rw - 9p host rw
"""


@pytest.fixture
def mountinfo(tmp_path: Path) -> str:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTS.replace("{root}", str(tmp_path)).replace("{odd}", "\udcff"), "utf-8", "surrogateescape")
    return str(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".", None),
        ("nas", "nfs4"),
        ("nas/registry/that/is/missing", "nfs4"),
        ("nas/local/registry", None),
        ("nasal", None),
        ("with space/registry", "vboxsf"),
        ("twice", "fuse.sshfs"),
        ("memory", None),
        ("later", "cifs"),
        ("\udcff", "9p"),
        ("link/registry", "nfs4"),
    ],
)
def test_the_last_and_lowest_mount_counts(tmp_path: Path, mountinfo: str, name: str, expected: str | None) -> None:
    (tmp_path / "link").symlink_to("nas")
    path = str(tmp_path / name)
    assert remote_file_system([path], mountinfo) == (None if expected is None else (path, expected))


def test_one_remote_directory_of_a_store_is_enough(tmp_path: Path, mountinfo: str) -> None:
    paths = [str(tmp_path / name) for name in ("memory", "nas/local", "nas")]
    assert remote_file_system(paths, mountinfo) == (paths[2], "nfs4")
    assert remote_file_system(paths[:2], mountinfo) is None


def test_the_real_file_is_understood(tmp_path: Path) -> None:
    assert remote_file_system(["/proc"]) is None


def test_without_proc_all_is_local(tmp_path: Path) -> None:
    assert remote_file_system([str(tmp_path)], str(tmp_path / "missing")) is None
