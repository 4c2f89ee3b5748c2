"""The event loop of one run: functions that are called when their descriptor is readable, and at certain times."""

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


class Timers:
    """What is to be called at certain times, by who waits no longer than until the next of them."""

    def __init__(self) -> None:
        self._timers: list[tuple[float, Callable[[], object]]] = []

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Call `action` in so many seconds."""
        self._timers.append((time.monotonic() + seconds, action))

    def next(self) -> float:
        """Return when the next call is due (``time.monotonic``); infinity if there is none."""
        return min((at for at, _ in self._timers), default=float("inf"))

    def call_due(self) -> None:
        """Make the calls that are due."""
        now = time.monotonic()
        for timer in [timer for timer in self._timers if timer[0] <= now]:
            # A call may itself come back here, and make one of the others.
            if timer in self._timers:
                self._timers.remove(timer)
                timer[1]()
