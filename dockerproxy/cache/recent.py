"""The bytes that were written to a file last, for readers who keep up with it."""

from __future__ import annotations

from collections.abc import Sequence

_MIN_PIECE_SIZE = 64 * 1024  # bytes of a piece: smaller ones are read from the file, many at a time


class TailBuffer:
    """The pieces of the last two writes, by their offset in the file."""

    def __init__(self) -> None:
        self._previous_write: list[tuple[int, bytes]] = []
        self._last_write: list[tuple[int, bytes]] = []

    def add(self, offset: int, pieces: Sequence[bytes]) -> None:
        """Take `pieces`, which were written at `offset`, and forget those of the write before the last."""
        self._previous_write, self._last_write = self._last_write, []
        for piece in pieces:
            if len(piece) >= _MIN_PIECE_SIZE:
                self._last_write.append((offset, piece))
            offset += len(piece)

    def get(self, offset: int, at_most: int) -> memoryview | None:
        """Return bytes from `offset` on, at least one; None where they are not here."""
        for pieces in (self._last_write, self._previous_write):
            for start, piece in pieces:
                if start <= offset < start + len(piece):
                    return memoryview(piece)[offset - start : offset - start + at_most]
        return None

    def clear(self) -> None:
        """Forget all."""
        self._previous_write, self._last_write = [], []
