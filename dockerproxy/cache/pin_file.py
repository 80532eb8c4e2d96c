"""PIN_FILE: the images that are to stay in the cache, one a line, for git and Ansible. Pure.

    # comment
    nginx:1.29
    ghcr.io/acme/webshop:main linux/amd64,linux/arm64

The platforms behind a name are those to keep. Without them they are those that were pulled here, or this machine's.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8

from attrs import frozen

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.image_names import ImageName
from dockerproxy.oci.platform_selection import ALL, Platform

MAX_PINS = 1000
"""Pinned images in all."""

_COMMENT = re.compile(r"(?:^|\s)#.*")
_MAX_PROBLEMS = 20


@frozen
class PinnedLine:
    """An image in PIN_FILE, and the platforms behind its name."""

    image: ImageName
    platforms: tuple[str, ...] = ()


@frozen
class PinFile:
    """The content of PIN_FILE, and sentences about its wrong lines, which do not count."""

    lines: tuple[PinnedLine, ...] = ()
    problems: tuple[str, ...] = ()

    @classmethod
    def parse(cls, content: bytes) -> PinFile:
        """Read the lines. The others count even if one is wrong."""
        lines: dict[ImageName, PinnedLine] = {}
        problems: list[str] = []
        for number, raw in enumerate(content.removeprefix(BOM_UTF8).splitlines(), 1):
            try:
                line = parse_line(raw.decode("utf-8"))
            except UnicodeDecodeError:
                problems.append(f"line {number} is not UTF-8 text")
            except NameInvalid as error:
                problems.append(f"line {number}: {error.message}")
            else:
                if line is not None and len(lines) < MAX_PINS:
                    lines[line.image] = line
                elif line is not None and line.image not in lines:
                    problems.append(
                        f"line {number} and all after it are left out, because {MAX_PINS} images are before"
                    )
                    break
        if len(problems) > _MAX_PROBLEMS:
            problems = [*problems[:_MAX_PROBLEMS], f"{len(problems) - _MAX_PROBLEMS} more lines are wrong"]
        return cls(tuple(lines.values()), tuple(problems))


def parse_line(text: str) -> PinnedLine | None:
    """Return the image in a line; None if it has none. Raise `NameInvalid`."""
    words = _COMMENT.sub("", text).split()
    if not words:
        return None
    if len(words) > 2:
        raise NameInvalid(f"{text.strip()[:100]!r} is more than an image and its platforms")
    return PinnedLine(ImageName.parse(words[0]), parse_platforms(words[1].split(",")) if len(words) == 2 else ())


def parse_platforms(texts: list[str]) -> tuple[str, ...]:
    """Return platforms in their usual form, or ``all`` alone. Raise `NameInvalid`."""
    if ALL in texts:
        return (ALL,)
    return tuple(dict.fromkeys(str(Platform.parse(text)) for text in texts))
