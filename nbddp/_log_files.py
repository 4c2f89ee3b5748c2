"""The logs of a run: all that its ranks have written, byte for byte, for who asks.

::

    RankOutput ──bytes──> Log ──> memory                  while it is short, and nobody has asked
                              └─> logs-…/rank0.log        from then on

To make a file for each rank, and delete it for the next cell, takes longer than all else that a quick cell on kept
ranks needs in the notebook's process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading

# Bytes of a rank's output that are held in memory.
_IN_MEMORY = 1 << 14


class Log:
    """The log of one rank.

    Args:
        logs: Where it belongs.
        number: The rank, as its file is called.

    Attributes:
        number: The same.
    """

    def __init__(self, logs: Logs, number: int) -> None:
        self._logs = logs
        self.number = number
        self._memory: bytearray | None = bytearray()
        self._fd: int | None = None
        self._closed = False

    def write(self, data: bytes) -> None:
        """Add what the rank has written; after `close` or a failure nothing is added any more.

        Raises:
            OSError: It cannot be written.
        """
        with self._logs.lock:
            if self._closed:
                return
            if self._memory is not None and len(self._memory) + len(data) <= _IN_MEMORY:
                self._memory += data
                return
            try:
                self._to_file()
                self._append(data)
            except OSError:
                self._close()
                raise

    def close(self) -> None:
        """Take note that nothing more is to come; safe to call twice."""
        with self._logs.lock:
            self._close()

    # With the lock in hand.

    def save(self) -> None:
        """See that all of it is in its file, and what is still to come will be."""
        self._to_file()
        if self._closed:
            self._close()

    def rename(self, number: int) -> None:
        """Have it belong to a rank of another number."""
        if self._memory is not None:
            self.number = number
            return
        before, self.number = self._path, number
        with contextlib.suppress(OSError):  # as it was made, then
            os.rename(before, self._path)

    @property
    def _path(self) -> str:
        return os.path.join(self._logs.folder(), f"rank{self.number}.log")

    def _to_file(self) -> None:
        if self._memory is None:
            return
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            self._append(self._memory)
        except OSError:
            os.close(self._fd)
            self._fd = None
            raise
        self._memory = None

    def _append(self, data: bytes | bytearray) -> None:
        assert self._fd is not None
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _close(self) -> None:
        self._closed = True
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Logs:
    """The logs of one run, by rank; may be asked from any thread.

    Args:
        parent: The directory in which they get a folder of their own, once they need one.

    Attributes:
        lock: Held while they are written or moved.
    """

    def __init__(self, parent: str) -> None:
        self.lock = threading.RLock()
        self._parent = parent
        self._folder: str | None = None
        self._moved = False
        self._logs: dict[int, Log] = {}

    def new(self, number: int) -> Log:
        """Begin the log of a rank; what there was of one of that number is left out: its run has begun anew."""
        with self.lock:
            if (before := self._logs.get(number)) is not None:
                before.close()
            log = self._logs[number] = Log(self, number)
            return log

    def number_from(self, first: int) -> None:
        """Name them by other numbers: the first is that of rank `first`."""
        with self.lock:
            # The last first: no file may be put in another's place.
            for number in sorted(self._logs, reverse=True):
                self._logs[number].rename(number + first)

    def folder(self) -> str:
        """Return their folder, which is made if there is none.

        Raises:
            OSError: It cannot be made.
        """
        with self.lock:
            if self._folder is None:
                self._folder = tempfile.mkdtemp(prefix="logs-", dir=self._parent)
            return self._folder

    def saved(self, number: int | None = None) -> str:
        """Return the folder in which each rank has its file, ``rank0.log`` and so on.

        Args:
            number: The rank whose file has to be there; None for all.

        Raises:
            OSError: It cannot be written; the others are there.
        """
        failure = None
        with self.lock:
            folder = self.folder()
            for log in self._logs.values():
                try:
                    log.save()
                except OSError as error:
                    failure = failure or (error if number in (None, log.number) else None)
        if failure is not None:
            raise failure
        return folder

    def move(self, target: str) -> None:
        """Move the folder to where it stays; if that is a renaming, what is still written goes along.

        Raises:
            OSError: It cannot be moved.
        """
        with self.lock:
            # What is still in memory need not find room where they are.
            if self._folder is None:
                os.makedirs(target, 0o700)
                self._folder = target
            else:
                self._folder = shutil.move(self._folder, target)
            self._moved = True
            self.saved()

    def delete(self) -> None:
        """Delete the files, unless they were moved; what is still written is not kept either."""
        with self.lock:
            while self._logs:  # which have this object, and need no garbage collector now
                self._logs.popitem()[1].close()
            if self._folder is not None and not self._moved:
                shutil.rmtree(self._folder, ignore_errors=True)
