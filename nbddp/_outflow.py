"""What goes from a node to the notebook: lines on stdout, as many as it takes; whoever makes more waits for room."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from nbddp._frames import CHUNK, LineWriter

# Bytes on their way to the notebook above which ranks are not read: their pipes fill, and they wait.
_BACKLOG = 4 << 20

# Seconds between two looks for room.
_ROOM_SECONDS = 0.005


class RunOverError(Exception):
    """Nothing more is to be sent: what ended the run is the cause of all that is missing."""


class _Writer:
    """Writes to stdout from a thread of its own: whoever reads it may have stopped, and the lease must run on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._wake = threading.Condition()
        self._closed = False
        self.broken = False
        self._thread = threading.Thread(target=self._write, name="nbddp-writer", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether so much waits to be written that no more should be made."""
        return self._size > _BACKLOG

    def put(self, lines: bytes) -> None:
        """Have lines written, after those before."""
        with self._wake:
            self._lines.append(lines)
            self._size += len(lines)
            self._wake.notify()

    def close(self, seconds: float) -> None:
        """Wait until all is written, but not for longer than this."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(seconds)

    def _write(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self._wake:
                while not self._lines and not self._closed:
                    self._wake.wait()
                if not self._lines:
                    return
                data = b"".join(self._lines)
                self._lines.clear()
            view = memoryview(data)
            try:
                while view:
                    view = view[os.write(self._fd, view) :]
            except OSError:
                self.broken = True
                return
            with self._wake:
                self._size -= len(data)


class Outflow:
    """A node's way to the notebook.

    Args:
        fd: Where the lines go.
        lines: Makes them.
        meanwhile: Called again and again while something waits for room; returns whether to go on waiting.
    """

    def __init__(self, fd: int, lines: LineWriter, meanwhile: Callable[[], bool]) -> None:
        self._writer = _Writer(fd)
        self._lines = lines
        self._meanwhile = meanwhile
        self._file_numbers = 0
        # A shell's greeting may not have ended its line.
        self._writer.put(b"\n")

    @property
    def full(self) -> bool:
        """Whether so much is on its way that ranks should not be read."""
        return self._writer.full

    @property
    def broken(self) -> bool:
        """Whether nobody is there any more to read it."""
        return self._writer.broken

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message. Raises TooLongError, having sent nothing, if it is too long."""
        self._writer.put(self._lines.message(kind, **fields))

    def output(self, rank: int, data: bytes) -> None:
        """Send what a rank has written."""
        self._writer.put(self._lines.output(rank, data))

    def send_file(self, path: str) -> str | None:
        """Send a file that a rank has written, and delete it here.

        Returns:
            The name by which the other side has it; None if it could not be read.

        Raises:
            RunOverError: The run has ended meanwhile.
        """
        name = os.path.basename(path)
        try:
            file = open(path, "rb")  # noqa: SIM115  # what is done meanwhile has errors of its own
            size = os.fstat(file.fileno()).st_size
        except OSError as error:
            self._cannot_send(path, error)
            return None
        self._file_numbers += 1
        number = self._file_numbers
        self.send("file", file=number, name=name, size=size)
        with file:
            while True:
                try:
                    data = file.read(CHUNK)
                except OSError as error:
                    self._cannot_send(path, error)
                    return None
                if not data:
                    break
                if not self._wait_for_room():
                    raise RunOverError
                self._writer.put(self._lines.piece(number, data))
        with contextlib.suppress(OSError):
            os.unlink(path)
        return name

    def _cannot_send(self, path: str, error: OSError) -> None:
        self.send("note", text=f"cannot send {path}: {error.strerror}")

    def _wait_for_room(self) -> bool:
        """Wait until some of what is on its way has been taken; return False if the run has ended meanwhile."""
        while self.full and not self.broken:
            time.sleep(_ROOM_SECONDS)
            if not self._meanwhile():
                return False
        return True

    def close(self, seconds: float) -> None:
        """Wait until all is written, but not for longer than this."""
        self._writer.close(seconds if not self.broken else 0.0)
