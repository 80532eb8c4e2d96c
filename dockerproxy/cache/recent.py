"""The bytes that were written to a file last, for readers who keep up with it."""

from __future__ import annotations

from collections.abc import Sequence

_WORTH = 64 * 1024  # bytes of a piece: smaller ones are read from the file, many at a time


class Recent:
    """The pieces of the last two writes, by their offset in the file."""

    def __init__(self) -> None:
        self._before: list[tuple[int, bytes]] = []
        self._last: list[tuple[int, bytes]] = []

    def add(self, offset: int, pieces: Sequence[bytes]) -> None:
        """Take `pieces`, which were written at `offset`, and forget those of the write before the last."""
        self._before, self._last = self._last, []
        for piece in pieces:
            if len(piece) >= _WORTH:
                self._last.append((offset, piece))
            offset += len(piece)

    def get(self, offset: int, at_most: int) -> memoryview | None:
        """Return bytes from `offset` on, at least one; None where they are not here."""
        for pieces in (self._last, self._before):
            for start, piece in pieces:
                if start <= offset < start + len(piece):
                    return memoryview(piece)[offset - start : offset - start + at_most]
        return None

    def clear(self) -> None:
        """Forget all."""
        self._before, self._last = [], []
