"""The corpus of each harness, and mutations of it that are the same in every run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).with_name("corpus")

_MAX_LENGTH = 4096
_AWKWARD = (
    *(b"\r\n", b"\r", b"\n", b"\0", b"\x1b", b"\xff", b"\xc3\xa9", b"%", b"%2f", b"%00", b"..", b"//", b"\\", b";"),
    *(b'"', b"'", b",", b":", b" ", b"\t", b"=", b"{", b"}", b"[", b"]", b"0", b"-1", b"9" * 20, b"1e999", b"NaN"),
    *(b"null", b"true", b'"\\ud800"', b"[" * 200, b"a" * 300, b"sha256:" + b"0" * 64, b"chunked", b"http://[::1"),
)


def seeds(name: str) -> list[bytes]:
    """Return the corpus of a harness: inputs that are accepted, and those that once failed."""
    return [path.read_bytes() for path in sorted((FOLDER / name).iterdir())]


def mutations(name: str, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield `count` mutations of the corpus of a harness."""
    corpus, chance = seeds(name), random.Random(f"{name} {seed}")
    for _ in range(count):
        data = chance.choice(corpus)
        for _ in range(chance.randint(1, 4)):
            data = mutate(data, chance, corpus)
        yield data


def mutate(data: bytes, chance: random.Random, corpus: list[bytes]) -> bytes:
    """Return `data` with one change."""
    start = chance.randint(0, len(data))
    end = min(len(data), start + chance.randint(0, 8))
    match chance.randrange(6):
        case 0:
            changed = data[:start] + bytes([chance.randrange(256)]) + data[end:]
        case 1:
            changed = data[:start] + data[end:]
        case 2:
            changed = data[:start] + chance.choice(_AWKWARD) + data[start:]
        case 3:
            changed = data[:start] + chance.choice(_AWKWARD) + data[end:]
        case 4:
            changed = data[:end] + data[start:]
        case _:
            other = chance.choice(corpus)
            changed = data[:start] + other[chance.randint(0, len(other)) :]
    return changed[:_MAX_LENGTH]
