"""Stopping: how an interrupt reaches the run, and what is done to ranks that are to end, and when."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import FrameType
from typing import Any

# Seconds that ranks have, after an interrupt, for their `finally` and `except KeyboardInterrupt`.
GRACE_SECONDS = 5.0

# Seconds that the other ranks have, after one has failed, to fail by themselves with an error that says more than
# that they were stopped; a broken collective raises within milliseconds.
SETTLE_SECONDS = 0.15

# Seconds that a rank which has failed has to say how: torchrun ends all ranks as soon as one is gone, so those that it
# need not hear of are let live so long.
TELL_SECONDS = 4.0

# Seconds that a rank which has reported its end has for threads and exit handlers.
EXIT_SECONDS = 5.0

# Seconds after an interrupt until the connections of a rank are closed whose main thread has not moved since: two that
# wait for each other in different collectives would wait until they are killed.
BREAK_OFF_SECONDS = 1.0

# Seconds in which a rank can write its stack.
STACK_SECONDS = 0.05

# Seconds between SIGTERM and SIGKILL.
TERM_SECONDS = 0.5

# How the file names of Python's own import functions begin.
_IMPORTING = "<frozen importlib."


class Step(Enum):
    """What can be done to a rank."""

    INTERRUPT = "interrupt"  # its stack is taken; then SIGINT, if it runs the cell
    END_STARTING = "end starting"  # SIGTERM, if it does not yet run the cell
    BREAK_OFF = "break off"  # a rank that hangs in a collective gives up its connections
    TERMINATE = "terminate"  # SIGTERM, unless it has reported and is only cleaning up
    KILL_RANKS = "kill ranks"  # SIGKILL, likewise
    KILL = "kill"  # SIGKILL, to all that the run has started


@dataclass
class Ladder:
    """The steps of one stop, each due at its time (``time.monotonic``)."""

    steps: list[tuple[float, Step]]

    @classmethod
    def of_interrupt(cls, grace: float) -> Ladder:
        """The user wants the run to end: every rank gets its chance to clean up."""
        now = time.monotonic()
        steps = [(now, Step.INTERRUPT), (now + STACK_SECONDS, Step.END_STARTING)]
        steps += [(now + BREAK_OFF_SECONDS, Step.BREAK_OFF)]
        steps += [(now + grace, Step.TERMINATE), (now + grace + TERM_SECONDS, Step.KILL)]
        return cls(sorted(steps, key=lambda step: step[0]))

    @classmethod
    def of_failure(cls) -> Ladder:
        """A rank has failed: the others can only wait for it."""
        now = time.monotonic() + SETTLE_SECONDS
        return cls([(now, Step.TERMINATE), (now + TERM_SECONDS, Step.KILL_RANKS), (now + EXIT_SECONDS, Step.KILL)])

    @classmethod
    def of_failed_cell(cls, grace: float) -> Ladder:
        """A rank has failed, and all are to stay: those that wait for it are torn away from that."""
        now = time.monotonic() + SETTLE_SECONDS
        steps = [(now, Step.INTERRUPT), (now + STACK_SECONDS, Step.BREAK_OFF), (now + grace, Step.TERMINATE)]
        return cls([*steps, (now + grace + TERM_SECONDS, Step.KILL)])

    @classmethod
    def of_insistence(cls, grace: float) -> Ladder:
        """The user has interrupted again, and the ranks' state would be lost with them."""
        now = time.monotonic()
        steps = [(now, Step.INTERRUPT), (now + STACK_SECONDS, Step.BREAK_OFF), (now + grace, Step.TERMINATE)]
        return cls([*steps, (now + grace + TERM_SECONDS, Step.KILL)])

    @classmethod
    def of_impatience(cls) -> Ladder:
        """The user has interrupted again, or no rank is there yet that could clean up."""
        return cls([(time.monotonic(), Step.KILL)])

    def put_off(self, seconds: float) -> None:
        """Take all steps that remain so much later."""
        self.steps = [(at + seconds, step) for at, step in self.steps]

    def add(self, step: Step, seconds: float) -> None:
        """Take a step once more, so many seconds from now."""
        self.steps = sorted([*self.steps, (time.monotonic() + seconds, step)], key=lambda step: step[0])

    @property
    def due(self) -> float:
        """When the next step is due; infinity after the last."""
        return self.steps[0][0] if self.steps else float("inf")

    def take(self) -> Step | None:
        """Return the next step if it is due, once."""
        if self.due > time.monotonic():
            return None
        return self.steps.pop(0)[1]


class InterruptGate:
    """While it is entered, SIGINT raises nothing: it is counted, and wakes who waits for `fileno`.

    So an interrupt never tears a line of code that must not be torn. Only the main thread can be interrupted; in any
    other the gate is always open.

    Attributes:
        presses: How often the user has interrupted.
    """

    def __init__(self) -> None:
        self.presses = 0
        self._previous: Any = None

    def __enter__(self) -> InterruptGate:
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            # None: the handler was not installed from Python, and cannot be restored by it.
            signal.signal(signal.SIGINT, self._previous or signal.default_int_handler)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def fileno(self) -> int:
        """Return a descriptor that becomes readable at the first press."""
        return self._wake_read

    def _press(self, signum: int, frame: FrameType | None) -> None:
        self.presses += 1
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"i")

    def press(self) -> None:
        """Do what the user's key does; from any thread."""
        self._press(signal.SIGINT, None)

    def drain(self) -> None:
        """Take note of the presses so far; `fileno` becomes readable at the next."""
        os.read(self._wake_read, 4096)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Let an interrupt raise KeyboardInterrupt in what may safely be torn, such as pickling.

        Not in an import that this leads to: it raises when all is done, or at the next press outside of one. Modules in
        C that are half imported may end the process when they are imported again.
        """
        if not self._main:
            yield
            return
        if self.presses:
            raise KeyboardInterrupt
        handler = self._previous or signal.default_int_handler
        if callable(handler):
            handler = functools.partial(self._tear, handler, set(_callers(sys._getframe())))
        signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._press)
            # It has the frames, and this frame has it: what they hold, the user's tensors among it, would stay until
            # the garbage collector comes.
            handler = signal.SIG_DFL
        if self.presses:
            raise KeyboardInterrupt

    def _tear(
        self,
        handler: Callable[[int, FrameType | None], Any],
        outside: set[FrameType],
        signum: int,
        frame: FrameType | None,
    ) -> None:
        inside = itertools.takewhile(lambda caller: caller not in outside, _callers(frame))
        if any(caller.f_code.co_filename.startswith(_IMPORTING) for caller in inside):
            self._press(signum, frame)
        else:
            handler(signum, frame)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those that wait for it."""
    while frame is not None:
        yield frame
        frame = frame.f_back
