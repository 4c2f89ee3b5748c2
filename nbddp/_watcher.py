"""A thread that waits on a loop whenever nobody else works with it.

To take the loop and to give it back wakes nobody: on a busy machine a cell of milliseconds would wait for a thread to
end, and then for another to start, as long as for its ranks.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Callable

from nbddp._loop import Loop

_NEVER = float("inf")


class Watcher:
    """Calls `look` whenever something of a loop is readable, or it is time.

    Who makes it has the loop in hand, until it is given.

    Args:
        loop: The loop; not closed with this.
        look: Does what is due, and returns when it is to be called again (``time.monotonic``); None if never.
        name: The thread's name.

    Raises:
        OSError: No more files can be opened.
        RuntimeError: No more threads can be started.
    """

    def __init__(self, loop: Loop, look: Callable[[], float | None], name: str) -> None:
        self._loop = loop
        self._look = look
        self._over = False
        self._sleeps_until = _NEVER
        self._in_hand = threading.Lock()
        self._in_hand.acquire()
        # Of what the loop waits for, the thread sees only that there is something, and nothing while it is taken.
        self._selector = selectors.DefaultSelector()
        try:
            self._wake = os.pipe()
        except OSError:
            self._selector.close()
            raise
        try:
            self._selector.register(self._wake[0], selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
            self._thread.start()
        except (OSError, RuntimeError):
            self._close()
            raise

    def take(self) -> None:
        """Take the loop from the thread; if it is at work, when it is done."""
        self._in_hand.acquire()
        if not self._over:
            self._selector.unregister(self._loop)

    def give(self, due: float) -> None:
        """Give the loop to the thread.

        Args:
            due: When it is to look, at the latest (``time.monotonic``).

        Raises:
            OSError: The thread cannot wait for it.
        """
        self._selector.register(self._loop, selectors.EVENT_READ)
        self._in_hand.release()
        # That a time has moved on it finds out by itself.
        if due < self._sleeps_until:
            os.write(self._wake[1], b"s")

    def end(self) -> None:
        """Have the thread end. For who has the loop in hand, or for `look`."""
        self._over = True
        if threading.current_thread() is not self._thread:
            os.write(self._wake[1], b"e")
            self._thread.join()

    def _watch(self) -> None:
        while not self._over:
            # Where the loop is taken, who gives it says when to look; and may do so from here on.
            self._sleeps_until = _NEVER
            if self._in_hand.acquire(blocking=False):
                try:
                    due = self._look()
                finally:
                    self._in_hand.release()
                self._sleeps_until = _NEVER if due is None else due
            if not self._over:
                self._sleep()
        self._close()

    def _sleep(self) -> None:
        until = self._sleeps_until
        ready = self._selector.select(None if until == _NEVER else max(0.0, until - time.monotonic()))
        if any(key.fd == self._wake[0] for key, _ in ready):
            os.read(self._wake[0], 4096)

    def _close(self) -> None:
        self._selector.close()
        for fd in self._wake:
            os.close(fd)
