"""Processes that a rank starts by "spawn" or "forkserver": DataLoader workers, ``mp.spawn``.

Such a process imports the script again, and so finds what the notebook has defined. What the cell itself has defined it
cannot find, since the cell does not run there: that goes to it by value, and back. (A plain script has the same
trouble, and no way out but to move definitions.) cloudpickle knows a class again that it has sent, so one that comes
back is the rank's own.
"""

from __future__ import annotations

import multiprocessing.reduction
import sys
import types
from collections.abc import Callable, Collection
from typing import Any

import cloudpickle


def send_by_value(known: Collection[Any]) -> None:
    """In a rank: have functions and classes of ``__main__`` go to new processes by value.

    Args:
        known: Those that a process which imports the script finds by name. They are kept alive, or another object
            could get the identity of one.
    """
    there = {id(obj): obj for obj in known}

    class ForNewProcess(multiprocessing.reduction.ForkingPickler):
        """Pickles a process object."""

        def reducer_override(self, obj: Any) -> Any:
            """Reduce by value what the new process could not find by name."""
            return _reduced(obj, lambda definition: id(definition) in there)

    def dump(obj: Any, file: Any, protocol: int | None = None) -> None:
        ForNewProcess(file, protocol).dump(obj)

    multiprocessing.reduction.dump = dump


def send_back_by_value() -> None:
    """In a spawned process: have what came by value go back by value, through queues and pipes."""

    def reducer_override(self: Any, obj: Any) -> Any:
        return _reduced(obj, _is_in_main)

    multiprocessing.reduction.ForkingPickler.reducer_override = reducer_override  # type: ignore[method-assign]


def _reduced(obj: Any, is_there: Callable[[Any], bool]) -> Any:
    if not isinstance(obj, type | types.FunctionType) or getattr(obj, "__module__", None) != "__main__":
        return NotImplemented
    return NotImplemented if is_there(obj) else (cloudpickle.loads, (cloudpickle.dumps(obj),))


def _is_in_main(obj: Any) -> bool:
    return getattr(sys.modules["__main__"], obj.__qualname__, None) is obj
