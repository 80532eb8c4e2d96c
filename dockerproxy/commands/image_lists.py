"""The images that a file names: a list, a compose file, Kubernetes manifests or a Dockerfile. The content tells which.

Names are taken as they are; the daemon checks them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

MAX_SIZE = 4 * 1024 * 1024
"""Characters of a file."""

_MAX_TEXT = 4096  # characters of a text with variables, and of their values, which may double with each line of a file

_FROM = re.compile(
    r"FROM(?:[ \t]+--\S+)*[ \t]+(?P<image>[^\s#]\S*)(?:[ \t]+AS[ \t]+(?P<stage>\S+))?[ \t]*", re.IGNORECASE
)
_ARG = re.compile(r"ARG[ \t]+(?P<name>\w+)(?:=(?P<value>.*))?", re.IGNORECASE)
_COPY = re.compile(r"(?:ONBUILD[ \t]+)?(?:COPY|ADD)[ \t]", re.IGNORECASE)
_ESCAPE = re.compile(r"#\s*escape\s*=\s*`\s*", re.IGNORECASE)
_YAML = re.compile(
    r"(?m)^[ \t]*(?:-[ \t]+)*[\"']?(?:image|services|apiVersion|kind|spec|x-[\w-]+)[\"']?[ \t]*:(?:\s|$)|^---"
)
# $NAME, ${NAME}, ${NAME:-default}, ${NAME-default}, ${NAME:?error}, ${NAME:+other}; $$ is a dollar sign.
_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<plain>\w+)|\{(?P<name>\w+)(?:(?P<operator>:?[-?+])(?P<word>[^${}]*))?\})"
)


class ListedImages(NamedTuple):
    """The names of images in a file, each once, and sentences about what could not be read."""

    images: tuple[str, ...]
    problems: tuple[str, ...]


class YAMLMissing(Exception):
    """The file is YAML, and the library that reads it is not installed."""


Variables = Mapping[str, str]


def read_images(name: str, text: str, variables: Variables) -> ListedImages:
    """Return the images in `text`, the content of the file `name`. `variables` are those of the environment.

    Raise `YAMLMissing`.
    """
    reader = _Reader(name)
    if _is_dockerfile(text):
        reader.read_dockerfile(text)
    elif _YAML.search(text):
        reader.read_yaml(text, variables)
    else:
        reader.read_list(text)
    return ListedImages(tuple(reader.images), tuple(reader.problems))


def _is_dockerfile(text: str) -> bool:
    for _, line in _logical_lines(text):
        if _FROM.fullmatch(line):
            return True
        if not _ARG.match(line):
            return False
    return False


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the instructions of a Dockerfile with the numbers of their first lines."""
    escape = "\\"
    pending, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            if not pending and _ESCAPE.fullmatch(line.strip()):
                escape = "`"
            continue
        if not pending:
            first = number
        if line.rstrip().endswith(escape):
            pending += line.rstrip()[:-1] + " "
            continue
        instruction, pending = (pending + line).strip(), ""
        if instruction:
            yield first, instruction
    if pending.strip():
        yield first, pending.strip()


class _Reader:
    def __init__(self, name: str) -> None:
        self._name = name
        self.images: dict[str, None] = {}
        self.problems: list[str] = []

    def read_list(self, text: str) -> None:
        """Read one image a line. ``#`` begins a comment."""
        for number, line in enumerate(text.splitlines(), 1):
            words = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].split()
            if len(words) > 1:
                self._report(number, f"{line.strip()[:100]!r} is more than the name of one image")
            elif words:
                self.images[words[0]] = None

    # Dockerfile (docs.docker.com/reference/dockerfile)

    def read_dockerfile(self, text: str) -> None:
        arguments: dict[str, str] = {}
        stages: set[str] = {"scratch"}
        has_stage = False
        for number, line in _logical_lines(text):
            argument, base = _ARG.fullmatch(line), _FROM.fullmatch(line)
            if argument is not None and not has_stage:  # only these may be used in FROM
                if argument["value"] is not None:
                    value = self._expand(number, _unquoted(argument["value"].strip()), arguments)
                    arguments[argument["name"]] = value or ""
            elif base is not None:
                has_stage = True
                self._add_base(number, base["image"], arguments, stages)
                if base["stage"]:
                    stages.add(base["stage"].lower())
            else:
                for image in _images_used(line):
                    if not image.isdigit():
                        self._add_base(number, image, arguments, stages)

    def _add_base(self, number: int, text: str, arguments: Variables, stages: set[str]) -> None:
        image = self._expand(number, _unquoted(text), arguments)
        if image and image.lower() not in stages:
            self.images[image] = None

    def _expand(self, number: int, text: str, variables: Variables) -> str | None:
        """Return `text` with the values of its variables; None, and report it, if one has no value or that is long."""
        missing: list[str] = []
        if len(text) > _MAX_TEXT:
            self._report(number, f"{text[:100]!r} is left out, because it has more than {_MAX_TEXT} characters")
            return None
        expanded = _VARIABLE.sub(_substitute(variables, missing), text)
        if missing:
            self._report(number, f"{text[:100]!r} is left out, because {' and '.join(missing)} has no value")
            return None
        if len(expanded) > _MAX_TEXT:
            self._report(number, f"{text[:100]!r} is left out, because its value has more than {_MAX_TEXT} characters")
            return None
        return expanded

    # YAML

    def read_yaml(self, text: str, variables: Variables) -> None:
        """Read the values of all keys ``image``, in every document of the file."""
        try:
            import yaml
        except ModuleNotFoundError:
            raise YAMLMissing from None
        anchors: dict[str, Any] = {}
        parents: list[_YAMLNode] = []
        try:
            # The events of the parser, because no alias is followed in them, and no object is built.
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent):
                    self._take_value(event.start_mark.line + 1, anchors.get(event.anchor), parents, variables)
                elif isinstance(event, yaml.ScalarEvent):
                    is_text = event.implicit[0] is False or event.value.lower() not in ("", "null", "~")
                    value = event.value if is_text else None
                    if event.anchor is not None:
                        anchors[event.anchor] = value
                    self._take_value(event.start_mark.line + 1, value, parents, variables)
                elif isinstance(event, yaml.CollectionStartEvent):
                    self._take_value(event.start_mark.line + 1, None, parents, variables)
                    parents.append(_YAMLNode(isinstance(event, yaml.MappingStartEvent)))
                elif isinstance(event, yaml.CollectionEndEvent):
                    parents.pop()
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            self.problems.append(f"{self._name}{line}: this is not YAML ({error.problem})")
        except (yaml.YAMLError, RecursionError) as error:
            self.problems.append(f"{self._name}: this is not YAML ({str(error)[:200]})")

    def _take_value(self, number: int, value: str | None, parents: list[_YAMLNode], variables: Variables) -> None:
        """Take the next key or value of the innermost collection."""
        if not parents or not parents[-1].is_mapping:
            return
        node = parents[-1]
        if node.expects_key:
            node.key, node.expects_key = value, False
            return
        node.expects_key = True
        if node.key == "image" and value:
            image = self._expand(number, value, variables)
            if image:
                self.images[image] = None

    def _report(self, number: int, problem: str) -> None:
        self.problems.append(f"{self._name}, line {number}: {problem}")


class _YAMLNode:
    """A mapping or a sequence that is being read."""

    def __init__(self, is_mapping: bool) -> None:
        self.is_mapping = is_mapping
        self.expects_key = True
        self.key: str | None = None


def _images_used(line: str) -> Iterator[str]:
    """Yield the images from which an instruction takes files: ``--from`` of COPY and ADD, ``from`` in ``--mount``."""
    is_copy = _COPY.match(line) is not None
    for word in line.split():
        option, _, value = word.partition("=")
        if is_copy and option.lower() == "--from" and value:
            yield value
        elif option.lower() == "--mount":
            names = (field.partition("=") for field in value.split(","))
            yield from (image for name, _, image in names if name.lower() == "from" and image)


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _substitute(variables: Variables, missing: list[str]) -> Callable[[re.Match[str]], str]:
    def value_of(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name, operator, word = match["plain"] or match["name"], match["operator"] or "", match["word"] or ""
        value = variables.get(name)
        is_set = bool(value) if operator.startswith(":") else value is not None
        if operator.endswith("+"):
            return word if is_set else ""
        if is_set:
            return value or ""
        if operator.endswith("-"):
            return word
        missing.append(name)
        return ""

    return value_of
