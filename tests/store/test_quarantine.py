from __future__ import annotations

from pathlib import Path

from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.quarantine import count_damaged


def test_what_was_replaced_does_not_count(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert count_damaged(layout) == 0
    one, two = Digest.of(b"1"), Digest.of(b"2")
    Path(layout.damaged).mkdir()
    for name in (f"sha256-{one.hex}", f"sha256-{one.hex}.1", f"sha256-{two.hex}", "lost+found", "sha256-"):
        (Path(layout.damaged) / name).touch()
    assert count_damaged(layout) == 2
    Blobs(layout, durable=False).put(b"1", one)
    assert count_damaged(layout) == 1
