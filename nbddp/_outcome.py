"""From what a cell has raised in a rank to the report on it."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

# Characters of a message, or of a line of a traceback, that are sent.
_LONGEST = 20_000

# The report on a cell that was torn away from so late that nothing else is to be said of it.
INTERRUPTED: dict[str, Any] = {"outcome": "interrupted", "lines": ()}


def outcome_of(error: BaseException | None, lines: tuple[str, ...]) -> dict[str, Any]:
    """Return the report on what the cell raised, if anything."""
    match error:
        case None:
            return {"outcome": "done"}
        case SystemExit(code=None | 0):
            return {"outcome": "done"}
        case SystemExit():
            code = error.code if isinstance(error.code, int) else 1
            if not isinstance(error.code, int):
                print(error.code, file=sys.stderr)  # noqa: T201  # as the interpreter does
            return {"outcome": "exited", "code": code}
        case KeyboardInterrupt():
            return {"outcome": "interrupted", "lines": lines or tuple(_formatted(error))}
    from nbddp._group import CannotForkError

    if isinstance(error, CannotForkError):
        return {"outcome": "cannot fork", "message": str(error)}
    if not lines:
        lines = tuple(_formatted(error))
    return {
        "outcome": "raised",
        "exception": type(error).__name__,
        "message": _cut(message_of(error)),
        "lines": [_cut(line) for line in lines],
        "missing": error.name if isinstance(error, NameError) else None,
    }


def _formatted(error: BaseException) -> list[str]:
    """Return the traceback of an error on the way to the cell, without the frames of nbddp itself."""
    rendered = traceback.TracebackException.from_exception(error)
    own = os.path.dirname(__file__)
    rendered.stack = traceback.StackSummary.from_list(
        [frame for frame in rendered.stack if os.path.dirname(frame.filename) != own]
    )
    return "".join(rendered.format()).rstrip("\n").split("\n")


def _cut(text: str) -> str:
    """Return a text without its middle if it is too long to be read; the exception itself has all of it."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} … {text[-half:]}"


def message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:
        return f"<its __str__ raised {type(broken).__name__}>"


def show_sources(sources: Mapping[str, tuple[str, int | None]]) -> None:
    """Make the text of the notebook's cells known to tracebacks and to ``inspect.getsource``."""
    for name, (text, _) in sources.items():
        # Without a modification time, linecache never looks for a file of that name.
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
