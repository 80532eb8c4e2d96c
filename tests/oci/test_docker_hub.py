"""The names of Docker Hub's repositories: as they are stored, as people write them, and as docker shows them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.docker_hub import short_name, shown_name, stored_name


@pytest.mark.parametrize(
    ("name", "stored", "shown", "short"),
    [
        ("nginx", "registry-1.docker.io/library/nginx", "docker.io/library/nginx", "nginx"),
        ("library/nginx", "registry-1.docker.io/library/nginx", "docker.io/library/nginx", "nginx"),
        ("grafana/grafana", "registry-1.docker.io/grafana/grafana", "docker.io/grafana/grafana", "grafana/grafana"),
        ("docker.io/nginx", "registry-1.docker.io/library/nginx", "docker.io/library/nginx", "nginx"),
        ("index.docker.io/a/b", "registry-1.docker.io/a/b", "docker.io/a/b", "a/b"),
        ("Docker.IO/nginx", "registry-1.docker.io/library/nginx", "docker.io/library/nginx", "nginx"),
        ("ghcr.io/a", "ghcr.io/a", "ghcr.io/a", "ghcr.io/a"),
        ("localhost/a", "localhost/a", "localhost/a", "localhost/a"),
        ("registry:5000/a", "registry:5000/a", "registry:5000/a", "registry:5000/a"),
        ("docker.io.example/a", "docker.io.example/a", "docker.io.example/a", "docker.io.example/a"),
    ],
)
def test_names(name: str, stored: str, shown: str, short: str) -> None:
    assert stored_name(name) == stored
    assert shown_name(stored) == shown
    assert short_name(shown) == short


@pytest.mark.parametrize("name", ["docker.io/", "ghcr.io/", ""])
def test_a_host_alone_names_nothing(name: str) -> None:
    assert stored_name(name) is None


@given(st.lists(st.from_regex(r"[a-z0-9]{1,5}", fullmatch=True), min_size=2, max_size=4).map("/".join))
def test_each_form_of_a_name_means_the_same(path: str) -> None:
    stored = f"registry-1.docker.io/{path}"
    for form in (stored, shown_name(stored), short_name(shown_name(stored))):
        if not form.startswith("localhost/"):
            assert stored_name(form) == stored
