"""Processes that a rank starts by "spawn" or "forkserver": DataLoader workers, ``mp.spawn``.

Such a process imports the script again, and so finds what the notebook has defined. What the cell itself has defined it
cannot find, since the cell does not run there: that goes to it by value. (A plain script has the same trouble, and no
way out but to move definitions.)
"""

from __future__ import annotations

import multiprocessing.reduction
import types
from collections.abc import Collection
from typing import Any

import cloudpickle


def send_by_value(known: Collection[Any]) -> None:
    """Have functions and classes of ``__main__`` go to new processes by value.

    Args:
        known: Those that a process which imports the script finds by name.
    """
    there = {id(obj) for obj in known}
    # Kept alive, or another object could get the identity of one.
    keep = tuple(known)

    class ForNewProcess(multiprocessing.reduction.ForkingPickler):
        """Pickles a process object."""

        def reducer_override(self, obj: Any) -> Any:
            """Reduce by value what the new process could not find by name."""
            if not isinstance(obj, type | types.FunctionType) or id(obj) in there:
                return NotImplemented
            if getattr(obj, "__module__", None) != "__main__":
                return NotImplemented
            return cloudpickle.loads, (cloudpickle.dumps(obj),)

    def dump(obj: Any, file: Any, protocol: int | None = None) -> None:
        assert keep is not None
        ForNewProcess(file, protocol).dump(obj)

    multiprocessing.reduction.dump = dump
