"""Classification of perf samples, and a run of `make profile`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.profile import CATEGORIES, LOADS, Frame, category_shares, classify, parse_stacks, perf_record, render_table
from bench.servers import BenchError, BenchServer

_PROJECT = Path(__file__).resolve().parents[2]
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
_KERNEL = "[kernel.kallsyms]"

SCRIPT = """
\tffffffffa1 _copy_to_iter ([kernel.kallsyms])
\tffffffffa2 tcp_recvmsg_locked ([kernel.kallsyms])
\t    7f0001 __libc_recv (/usr/lib/x86_64-linux-gnu/libc.so.6)

\t    7f0002 [unknown] (/a b/site-packages/cryptography/hazmat/bindings/_rust.abi3.so)


\t    7f0003 operator new(unsigned long) (/usr/lib/libstdc++.so.6)
""".splitlines()


def test_stacks_are_parsed() -> None:
    assert list(parse_stacks(SCRIPT)) == [
        [
            ("_copy_to_iter", _KERNEL),
            ("tcp_recvmsg_locked", _KERNEL),
            ("__libc_recv", "/usr/lib/x86_64-linux-gnu/libc.so.6"),
        ],
        [("[unknown]", "/a b/site-packages/cryptography/hazmat/bindings/_rust.abi3.so")],
        [("operator new(unsigned long)", "/usr/lib/libstdc++.so.6")],
    ]
    assert list(parse_stacks([*SCRIPT[:-1], ""])) == list(parse_stacks(SCRIPT))[:2]


def kernel_stack(*symbols: str) -> list[Frame]:
    return [*((symbol, _KERNEL) for symbol in symbols), ("write", "/usr/lib/libc.so.6")]


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (kernel_stack("_copy_to_iter", "tcp_recvmsg_locked", "sock_read_iter", "vfs_read"), "kernel: receiving"),
        (kernel_stack("_copy_from_iter", "tcp_sendmsg_locked", "sock_write_iter", "vfs_write"), "kernel: sending"),
        (kernel_stack("__tcp_transmit_skb", "tcp_write_xmit", "do_tcp_setsockopt"), "kernel: sending"),
        (kernel_stack("copy_folio_from_iter_atomic", "generic_perform_write", "vfs_write"), "kernel: files"),
        (kernel_stack("do_epoll_wait"), "kernel: other"),
        ([("vfs_write", "/a/module.so"), ("tcp_sendmsg", _KERNEL)], "other"),
        ([("_PyEval_EvalFrameDefault", "/opt/python/lib/libpython3.11.so.1.0")], "interpreter"),
        ([("_PyEval_EvalFrameDefault", "/usr/bin/python3.13")], "interpreter"),
        ([("sock_recv", "/usr/lib/python3.13/lib-dynload/_socket.cpython-313-x86_64-linux-gnu.so")], "interpreter"),
        ([("SSL_read", "/opt/python/lib/site-packages/cryptography/hazmat/bindings/_rust.abi3.so")], "TLS"),
        ([("[unknown]", "/usr/lib/x86_64-linux-gnu/libcrypto.so.3")], "hashing"),
        ([("malloc", "/usr/lib/x86_64-linux-gnu/libc.so.6")], "C library"),
        ([("[unknown]", "[unknown]")], "other"),
    ],
)
def test_sample_classification(stack: list[Frame], expected: str) -> None:
    assert classify(stack) == expected


def test_shares_are_of_all_samples() -> None:
    shares = category_shares([kernel_stack("do_epoll_wait"), *[[("malloc", "libc.so.6")]] * 3])
    assert {name: share for name, share in shares.items() if share} == {"kernel: other": 0.25, "C library": 0.75}
    assert tuple(shares) == CATEGORIES
    with pytest.raises(BenchError, match="no samples"):
        category_shares([])


def test_a_table_has_a_row_for_each_load() -> None:
    head, line, row = render_table({"hit": dict.fromkeys(CATEGORIES, 0.125)}).splitlines()
    assert head.count("|") == line.count("|") == row.count("|") == len(CATEGORIES) + 2
    assert row.startswith("| hit | 12 % |")


def can_run_perf(folder: Path) -> bool:
    """Return whether perf is installed and permitted to take samples."""
    perf = shutil.which("perf", path=_PATH)
    argv = [str(perf), "record", "--quiet", "--output", str(folder / "perf.data"), "true"]
    return perf is not None and not subprocess.run(argv, capture_output=True, check=False).returncode


def test_perf_failure_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perf = tmp_path / "perf"
    perf.write_text("#!/bin/sh\necho no events here >&2\nexit 1\n")
    perf.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    server = BenchServer(["sleep", "60"], tmp_path / "server", {"PATH": _PATH}, [])
    with server, pytest.raises(BenchError, match="no events here"), perf_record(server, tmp_path / "a.perf"):
        pass


def test_profile_runs(tmp_path: Path) -> None:
    missing = [name for name in ("nginx", "gcc", "taskset") if shutil.which(name, path=_PATH) is None]
    if missing or not Path("/usr/include/openssl/ssl.h").exists():
        pytest.skip(f"{', '.join(missing) or 'libssl-dev'} is missing")
    if not can_run_perf(tmp_path):
        pytest.skip("perf is missing, or is not permitted to take samples here")
    argv = [sys.executable, "-m", "bench.profile", "--quick", "--output", str(tmp_path / "profile.json")]
    environment = {**os.environ, "PATH": _PATH, "TMPDIR": str(tmp_path)}
    result = subprocess.run(argv, cwd=_PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["table"] in result.stdout
    assert list(profile["shares"]) == list(LOADS)
    for shares in profile["shares"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["interpreter"] > 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("bench-")]
