"""A TCP server on loopback with one thread for each connection."""

from __future__ import annotations

import contextlib
import socket
import threading
from abc import ABC, abstractmethod


class ThreadedServer(ABC):
    """Listens on `port` of 127.0.0.1, and calls `serve` in a thread of its own for each connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @abstractmethod
    def serve(self, client: socket.socket) -> None:
        """Serve one connection, and close it."""

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()
