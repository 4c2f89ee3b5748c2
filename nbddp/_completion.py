"""What Tab offers on a ``%%ddp`` or ``%ddp`` line.

IPython asks with the text up to the cursor, and takes from what it gets the words that continue the last one. Where
nothing is offered, it completes as it would in any line: names and attributes in an expression, paths.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nbddp import _backends
from nbddp._option_line import option_names, takes_value

# What the words behind nbddp's own commands are.
_OF_LOG = ("--rank", "--tail", "--save")

_BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")

# Lines on which an assignment stands before the magic; those that begin with it have a key of their own.
ASSIGNED = re.compile(r"[^#%]+=\s*%ddp\s")


def completer(commands: Sequence[str], space: Callable[[], Iterable[str]]) -> Callable[[Any, Any], list[str]]:
    """Return a hook for IPython's ``complete_command``.

    Args:
        commands: What ``%ddp`` knows besides expressions.
        space: Returns the names that the notebook's user has given.
    """

    def complete(shell: Any, event: Any) -> list[str]:
        del shell  # IPython's hooks are called as methods
        found = re.search(r"%{1,2}ddp\s", event.text_until_cursor)
        if found is None:
            return []
        before = event.text_until_cursor[found.end() : len(event.text_until_cursor) - len(event.symbol)]
        return _offered(found[0].startswith("%%"), before, event.symbol, commands, space)

    return complete


def _offered(
    is_cell: bool, before: str, symbol: str, commands: Sequence[str], space: Callable[[], Iterable[str]]
) -> list[str]:
    """Return what can stand where the cursor is.

    Args:
        is_cell: Whether it is a ``%%ddp`` line.
        before: What stands between the magic's name and the word that is being written.
        symbol: As much of that word as there is; behind a comma or an equals sign a new one begins.
        commands: What ``%ddp`` knows besides expressions.
        space: Returns the names that the notebook's user has given.
    """
    words = before.replace("=", " ").split()
    if not is_cell and words and words[0] in commands:
        return [*_OF_LOG] if words[0] == "log" else [*space()] if words[0] in ("explain", "push", "pull") else []
    if words and before.rstrip().endswith((",", "=")):
        # Within a list, and the option stands before that.
        option = next((word for word in reversed(words) if word.startswith("-")), "")
    else:
        option = words[-1] if words else ""
    if option in _VALUES and takes_value()[option]:
        return [*_VALUES[option](space)]
    if takes_value().get(option) and option != "--bg":  # which need not have one
        return []
    if symbol.startswith("-"):
        return [*option_names()]
    if is_cell:
        return [] if symbol else [*option_names()]
    if words:
        return []
    return [*commands, *(space() if symbol else option_names())]


def _backends_here() -> list[str]:
    """Return the backends of process groups that torch has; if that is not imported here, those that it may have."""
    return _backends.available() if "torch.distributed" in sys.modules else [*_BACKENDS]


_VALUES: dict[str, Callable[[Callable[[], Iterable[str]]], Iterable[str]]] = {
    "--backend": lambda _: _backends_here(),
    "--out": lambda space: space(),
    "-o": lambda space: space(),
    "--gather": lambda space: space(),
    "--out-device": lambda _: ("cpu", "cuda:0"),
    "--ranks": lambda _: ("all", "0"),
}
