"""The event loop of one run: functions that are called when their descriptor is readable."""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable
from typing import Any


class Loop:
    """Sources (what has a `fileno`) and what to call when there is something to read."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def fileno(self) -> int:
        """Return a descriptor that is readable when one of the sources is."""
        return self._selector.fileno()  # epoll and kqueue have one

    def watch(self, source: Any, callback: Callable[[], object]) -> None:
        """Call `callback` whenever `source` is readable, in place of what was called before."""
        with contextlib.suppress(KeyError):
            self._selector.modify(source, selectors.EVENT_READ, callback)
            return
        self._selector.register(source, selectors.EVENT_READ, callback)

    def unwatch(self, source: Any) -> None:
        """Forget `source`, if it was watched."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(source)

    def step(self, until: float) -> None:
        """Wait until something is readable, at most until a time (``time.monotonic``), and call what is due."""
        timeout = None if until == float("inf") else max(0.0, until - time.monotonic())
        for key, _ in self._selector.select(timeout):
            # One callback may close what another was to read.
            if key.fd in self._selector.get_map():
                key.data()

    def close(self) -> None:
        """Forget all sources; none is closed."""
        self._selector.close()
