"""Every error that nbddp raises, and how a notebook shows it.

::

    NbddpError
    ├── OptionError       an option is unknown or cannot be (also a ValueError); nothing was launched
    ├── CaptureError      a notebook variable cannot be sent to the ranks; nothing was launched
    ├── LaunchError       no rank ever ran the cell: devices, launcher, torchrun, disk space
    ├── RunLostError      what the ranks depend on was ended by something else, and they with it
    ├── RankError         a rank raised, exited or died; the cell has failed
    ├── RunTimeout        --timeout passed (also a TimeoutError)
    ├── ResultError       the cell ran, but the names of --out could not be brought back
    └── ExportError       a cell cannot be written as a script; nothing was written

OptionError is defined beside the options, in `nbddp._options`.

An interrupted run raises a plain KeyboardInterrupt, so that "Run All" stops as it does for any cell.

Where a notebook is at fault, the message holds no process id, port, temporary path or time of day: notebook tests
compare them from run to run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

_OWN = os.path.dirname(__file__)


class NbddpError(Exception):
    """The base of nbddp's errors.

    A notebook shows the message and what came from the ranks; the frames of nbddp's own code would tell the reader
    nothing.
    """

    def __init__(self, message: str, *, details: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> None:
        """Make an error.

        Args:
            message: One sentence or two: what failed, the value given, the next step.
            details: Lines shown above the message, such as a rank's traceback.
            notes: Lines shown below it.
        """
        super().__init__(message)
        self._details = details
        self._below = notes
        # Outside IPython, the interpreter prints notes below the traceback.
        for text in (*details, *notes):
            self.add_note(text)

    @property
    def details(self) -> tuple[str, ...]:
        """Lines that belong above the message."""
        return self._details

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are unpickled by calling their type with `args`, which lack what is keyword-only.
        return _remade, (type(self), self.args, self.__dict__)

    # Whether `%debug` is to stop at the call of nbddp, instead of in the function that was called.
    _ends_at_call = False

    def _render_traceback_(self) -> list[str]:
        if self._ends_at_call:
            _cut_own_frames(self.__traceback__)
        return [*self._details, f"{type(self).__name__}: {self}", *self._below]


def _cut_own_frames(tb: TracebackType | None) -> None:
    """Cut a traceback off where it enters nbddp."""
    while tb is not None and tb.tb_next is not None:
        if os.path.dirname(tb.tb_next.tb_frame.f_code.co_filename) == _OWN:
            tb.tb_next = None
        tb = tb.tb_next


def end_at_call(error: NbddpError) -> None:
    """Leave out, of an error that is about to be raised, the frames of nbddp's own between the user's call and it."""
    error._ends_at_call = True
    error.__traceback__ = None


def _remade(kind: type[NbddpError], args: tuple[Any, ...], state: dict[str, Any]) -> NbddpError:
    error = kind.__new__(kind, *args)
    error.args = args  # which an OSError, as TimeoutError is one, does not take from there
    error.__dict__.update(state)
    return error


class CaptureError(NbddpError):
    """A name that the cell uses cannot be sent to the ranks.

    Attributes:
        name: The notebook's name for it.
        path: The dotted path from that name to the part at fault, such as ``loader.dataset.conn``.
        lines: The lines of the cell that use the name; empty if only a captured function does.
    """

    def __init__(self, message: str, *, name: str = "", path: str = "", lines: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.name = name
        self.path = path
        self.lines = lines


class LaunchError(NbddpError):
    """The ranks could not be started; nothing of the cell has run."""


class RunLostError(NbddpError):
    """The launcher or torchrun's agent was ended from outside while the ranks ran the cell; they went with it."""


class ResultError(NbddpError):
    """The cell ran to its end, but not every name that was asked for could be brought back, so none was assigned.

    Attributes:
        results: Those that could; in the error of `nbddp.launch`, by rank.
    """

    def __init__(self, message: str, *, results: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.results: dict[Any, Any] = dict(results or {})


class ExportError(NbddpError):
    """A cell cannot be written as a script; nothing has been written."""


class RankError(NbddpError):
    """A rank raised an exception, exited with a status other than 0, or was killed.

    What a rank raised is raised here as what it was: the error is of that type, with its message and attributes, and a
    `RankError` besides. Where that cannot be, it is a plain `RankError`: for exceptions that cannot be sent, and for
    those that IPython would show in a way of its own (syntax errors, exception groups), which are in `original`.

    Attributes:
        rank: The rank that failed first.
        exception: The name of the exception's type, such as ``"ValueError"``; None if the rank raised none.
        exitcode: Its exit status; negative for the number of the signal that killed it; None if it raised.
        others: What became of the other ranks, in a few words each.
        tracebacks: The traceback of each rank that raised, as text.
        original: The exception as such, if there was one that could be sent.
    """

    original: Exception | None = None

    def __init_subclass__(cls) -> None:
        """Keep what a user's exception class does with its subclasses from happening to the ones made here."""

    # The line that follows the rank's traceback, if it is not this error's own name and message.
    _headline: str | None = None

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        exception: str | None = None,
        exitcode: int | None = None,
        others: Mapping[int, str] | None = None,
        tracebacks: Mapping[int, str] | None = None,
        details: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, details=details, notes=notes)
        self.rank = rank
        self.exception = exception
        self.exitcode = exitcode
        self.others = dict(others or {})
        self.tracebacks = dict(tracebacks or {})

    def _render_traceback_(self) -> list[str]:
        lines = super()._render_traceback_()
        return lines if self._headline is None else [*self._details, self._headline, *self._below]


class RunTimeout(NbddpError, TimeoutError):  # noqa: N818  # as TimeoutError's cousins in asyncio and socket
    """The run was stopped because ``--timeout`` passed.

    Attributes:
        where: Where the ranks were, a line for each group that was at the same place.
    """

    def __init__(self, message: str, *, where: tuple[str, ...] = ()) -> None:
        super().__init__(message, notes=where)
        self.where = where
