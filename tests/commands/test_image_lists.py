"""The images that a file names, whatever kind of file it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.commands.image_lists import ListedImages, YAMLMissing, read_images

HAS_YAML = True
try:
    import yaml as _yaml  # noqa: F401
except ModuleNotFoundError:
    HAS_YAML = False
needs_yaml = pytest.mark.skipif(not HAS_YAML, reason="PyYAML, which reads YAML, is not installed")


def read(text: str, variables: Mapping[str, str] | None = None) -> ListedImages:
    return read_images("file", text, variables or {})


def test_a_list() -> None:
    images, problems = read("# all\n\nnginx:1.29\n  redis # cache\nnginx:1.29\nquay.io/a/b@sha256:1\na b\n")
    assert images == ("nginx:1.29", "redis", "quay.io/a/b@sha256:1")
    assert problems == ("file, line 7: 'a b' is more than the name of one image",)
    assert read("") == ((), ())


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("FROM nginx", ["nginx"]),
        ("from nginx as web\nFROM web\nFROM web AS other", ["nginx"]),
        ("# a\n\nARG TAG=1\nFROM nginx:$TAG\n", ["nginx:1"]),
        ("ARG TAG\nFROM nginx:${TAG:-2}", ["nginx:2"]),
        ('ARG A=1\nARG B="v${A}"\nFROM nginx:$B', ["nginx:v1"]),
        ("FROM --platform=linux/amd64 nginx:1 \\\n  AS build\nFROM scratch", ["nginx:1"]),
        ("# escape=`\nFROM `\n nginx", ["nginx"]),
        ("FROM a AS one\nCOPY --from=0 x y\nCOPY --chown=1 --from=b:1 x y\nCOPY --from=ONE x y", ["a", "b:1"]),
        ("FROM a\nRUN --mount=type=bind,from=tools:2,target=/t x", ["a", "tools:2"]),
        ("ARG A=1\nFROM a\nARG B=2\nFROM b:$A", ["a", "b:1"]),
    ],
)
def test_a_dockerfile(text: str, images: list[str]) -> None:
    assert read(text) == (tuple(images), ())


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("ARG A0=xxxxxxxx\n" + "".join(f"ARG A{n + 1}=$A{n}$A{n}\n" for n in range(60)) + "FROM $A60\nFROM b", ["b"]),
        ("FROM " + "$A" * 500_000 + "\nFROM b", ["b"]),
        ("FROM a\n" + "COPY " * 200_000, ["a"]),
        ("FROM a\nRUN " + "--mount=" * 200_000, ["a"]),
        ("FROM a\nRUN --mount=" + "from," * 200_000, ["a"]),
        ("FROM " + "--a " * 200_000, ["--a"]),
        ("FROM a\nRUN x" + " \\\n" * 200_000, ["a"]),
    ],
    ids=["values", "variables", "COPY", "mounts", "one mount", "options", "lines"],
)
def test_a_dockerfile_that_is_a_bomb(text: str, images: list[str]) -> None:
    """It is a stranger's. In another way to read it, each takes minutes, or gigabytes."""
    found, problems = read(text)
    assert list(found) == images
    assert all(len(problem) < 400 for problem in problems)


def test_variables_of_a_dockerfile_without_a_value() -> None:
    images, problems = read("ARG BASE\nFROM $BASE\nFROM nginx\nFROM ${BASE:-redis}")
    assert images == ("nginx", "redis")
    assert problems == ("file, line 2: '$BASE' is left out, because BASE has no value",)


@needs_yaml
@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("services:\n  a:\n    image: nginx\n", ["nginx"]),
        ("image: nginx", ["nginx"]),
        ("- image: a\n- {image: 'b'}\n- image: \"c\"", ["a", "b", "c"]),
        ("---\nkind: Pod\nspec:\n  containers: [{image: a}]\n---\nimage: b\n...", ["a", "b"]),
        ("image:\n  repository: nginx\n  tag: 1", []),
        ("image: null\nx: {image: ~}\ny: {image: }\nz: {image: ''}", []),
        ("x-i: &i nginx:1\nservices: {a: {image: *i}}", ["nginx:1"]),
        ("services: {a: {image: 'nginx:${V:-1}'}, b: {image: \"$${x}\"}}", ["nginx:1", "${x}"]),
        ("services: {a: {image: '${R}/app:${V-2}'}}", ["quay.io/org/app:2"]),
        ("kind: X\nimages: [a]\nimagePullPolicy: Always", []),
        ("? [image, b]\n: image\nimage: c", ["c"]),
    ],
)
def test_yaml(text: str, images: list[str]) -> None:
    assert read(text, {"R": "quay.io/org"}) == (tuple(images), ())


@needs_yaml
def test_yaml_that_is_none() -> None:
    images, problems = read("kind: Deployment\nimage: {{ .Values.image }}\n  bad")
    assert images == () and problems[0].startswith("file, line 3: this is not YAML (")
    _, problems = read("image: a:$V\n")
    assert problems == ("file, line 1: 'a:$V' is left out, because V has no value",)


@needs_yaml
def test_aliases_are_not_expanded() -> None:
    """A billion laughs."""
    lines = ["image: &a0 nginx"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert read("\n".join(lines)).images == ("nginx",)
    assert read("image: " + "[" * 500).images == ()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(YAMLMissing):
        read("services: {}")
    assert read("FROM nginx").images == ("nginx",)
    assert read("nginx").images == ("nginx",)


@given(
    st.text()
    | st.lists(st.sampled_from(["FROM ", "image: ", "\n", "a", "$", "{", "}", ":-", "*", "&", "[", "ARG ", "\\"])).map(
        "".join
    )
)
def test_any_text(text: str) -> None:
    try:
        read(text)
    except YAMLMissing:
        assert not HAS_YAML
