"""When an interrupt may raise KeyboardInterrupt in a rank's main thread.

Around the cell it must not: a rank that is torn out of its own end never returns to torchrun, which waits for it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")


def ignore() -> None:
    """Let interrupts pass from now on."""
    signal.signal(signal.SIGINT, _pass)


def interruptibly(call: Callable[[], _Result]) -> _Result | None:
    """Call something in which an interrupt raises KeyboardInterrupt; None if that is not caught inside."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return call()
        finally:
            ignore()
    except KeyboardInterrupt:
        ignore()
        return None


def _pass(*_: object) -> None:
    """Do nothing. A handler, unlike SIG_IGN, is not inherited by programs that are started."""
