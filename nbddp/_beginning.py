"""The environment that this process began with: what is in it is this machine's, and stays here.

It is read when the package is imported. Later a title that is set (``setproctitle``) may lie where the system has it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping


def _began_with(now: Mapping[str, str], path: str = "/proc/self/environ") -> Mapping[str, str]:
    """Return the variables that this process was started with; if the system does not tell, all that there are now.

    Args:
        now: The variables that there are now.
        path: Where the system keeps those of the beginning.
    """
    try:
        with open(path, "rb") as file:
            entries = file.read().removesuffix(b"\0").split(b"\0")
    except OSError:  # no Linux
        return dict(now)
    pairs = [entry.partition(b"=") for entry in entries]
    began = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    # A title is written over the arguments, and from there over the first of these: then that is a piece, or a gap. Or
    # all is filled up. (Of the others, some may have been deleted since.)
    whole = all(name and equals for name, equals, _ in pairs) and next(iter(began)) in now
    return began if whole else dict(now)


_BEGAN_WITH = _began_with(os.environ)


def set_since() -> dict[str, str]:
    """Return the variables that have been set, or set anew, since this process began."""
    return {name: value for name, value in os.environ.items() if _BEGAN_WITH.get(name) != value}
