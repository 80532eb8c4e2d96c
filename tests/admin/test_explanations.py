from __future__ import annotations

import pytest

from dockerproxy.admin.explanations import explain


@pytest.mark.parametrize(
    ("verdict", "because", "text"),
    [
        ("REVALIDATED", "unchanged", "quay.io said that the tag has not moved (HEAD, which counts as no pull)"),
        ("MISS", "new", "it was never here before"),
        ("MISS", "evicted 2026-11-14 43d", "it was removed on 2026-11-14 to make room, last used 43 days before"),
        ("MISS", "evicted 2026-11-14 1h", "it was removed on 2026-11-14 to make room, last used 1 hour before"),
        ("MISS", "moved sha256:1d92 sha256:65e7", "the tag moved upstream, from sha256:1d92 to sha256:65e7"),
        ("MISS", "accept", "the tag was not known for the media types that this client accepts"),
        ("REVALIDATED", "unproven", "quay.io was asked whether this client may have it"),
        ("JOINED", "", "another client had begun to download it"),
        ("HIT", "", "it was here, and the client may have it"),
        ("STALE", "quay.io does not answer", "quay.io does not answer: so it is the last good response"),
        ("-", "{registry} evicted", "{registry} evicted"),
        ("other", "", ""),
    ],
)  # fmt: skip
def test_causes_in_words(verdict: str, because: str, text: str) -> None:
    assert explain(verdict, because, "quay.io") == text
