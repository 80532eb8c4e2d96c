"""Notification of changes to files that other processes write (inotify(7)).

`twisted.internet.inotify` is not suitable: it knows files by their paths only, which change when an ingest is
committed, and its import runs a program to find the C library.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from zope.interface import implementer

# linux/inotify.h
_IN_MODIFY, _IN_ATTRIB, _IN_CLOSE_WRITE = 0x2, 0x4, 0x8
_IN_DELETE_SELF, _IN_MOVE_SELF, _IN_Q_OVERFLOW = 0x400, 0x800, 0x4000
_MASK = _IN_MODIFY | _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_DELETE_SELF | _IN_MOVE_SELF

_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_READ_SIZE = 64 * 1024  # bytes; the kernel merges equal events and drops those beyond 16,384 (IN_Q_OVERFLOW)

_libc = ctypes.CDLL(None, use_errno=True)


@implementer(IReadDescriptor)
class FileWatcher:
    """Watches open files for a process, and calls back if one was written, closed by its writer, renamed or deleted.

    The kernel's watch is for the file itself, whatever its name becomes. The inotify descriptor is open while there are
    watches.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._fd = -1
        self._callbacks: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, callback: Callable[[], None]) -> int:
        """Call `callback` after changes to the file of `fd`, at least once. Return the watch, for `unwatch`.

        There may be one watch of a file at a time. Raise `OSError` (no inotify, or too many descriptors or watches).
        """
        if self._fd < 0:
            self._fd = _check(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
            self._reactor.addReader(self)
        try:
            watch = _check(_libc.inotify_add_watch(self._fd, f"/proc/self/fd/{fd}".encode(), _MASK))
        except OSError:
            self._close_if_idle()
            raise
        self._callbacks[watch] = callback
        return watch

    def unwatch(self, watch: int) -> None:
        """End a watch. Its callback is not called any more."""
        del self._callbacks[watch]
        _libc.inotify_rm_watch(self._fd, watch)  # fails if the file is gone, and with it the kernel's watch
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if not self._callbacks:
            self._reactor.removeReader(self)
            fd, self._fd = self._fd, -1
            os.close(fd)

    # IReadDescriptor

    def doRead(self) -> None:
        """Read all events, and call each callback once."""
        try:
            data = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        changed: dict[int, None] = {}
        offset = 0
        while offset < len(data):
            watch, mask, _, name_length = _EVENT.unpack_from(data, offset)
            offset += _EVENT.size + name_length
            changed.update(dict.fromkeys(self._callbacks) if mask & _IN_Q_OVERFLOW else {watch: None})
        for watch in changed:
            callback = self._callbacks.get(watch)  # None if an earlier callback ended this watch
            if callback is not None:
                callback()

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return "inotify"

    def connectionLost(self, reason: object) -> None:
        """Do nothing; the descriptor has no other end."""


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
