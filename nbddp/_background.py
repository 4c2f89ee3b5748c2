"""Runs in the background (``--bg``): a thread sees each to its end, and a handle stands for it in the notebook."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbddp import _allocation, _limits
from nbddp._devices import gpus_of
from nbddp._errors import LaunchError, NbddpError
from nbddp._log_files import Logs
from nbddp._prepared import Finished, Prepared
from nbddp._screen import CellScreen, MimeBundle, NotebookScreen, screen_of
from nbddp._stop import InterruptGate

# Seconds that runs have when the kernel ends, to end by themselves and then to be killed: 2.5 after it has asked, a
# Jupyter server sends SIGTERM, and no log is saved any more.
_SHUTDOWN_SECONDS = 1.2
_KILL_SECONDS = 0.5

# Where the logs of runs go that the end of the kernel has ended.
_LOGS = "nbddp-logs"

# Cells in which a handle is displayed and goes on being updated, beside the run's own.
_MIRRORS = 8


class BackgroundRun:
    """A run that goes on while other cells run. Shows its panel where it is displayed.

    Attributes:
        name: What it is called.
    """

    def __init__(self, name: str, prepared: Prepared, screen: BackgroundScreen) -> None:
        self.name = name
        self._prepared: Prepared | None = prepared
        self._ranks = prepared.devices.ranks
        self._gpus = gpus_of(prepared.devices, prepared.launch.env)
        self._screen = screen
        self._gate = InterruptGate()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._open = self._pressed = self._ended_with_kernel = False
        assert prepared.logs is not None
        self._logs = prepared.logs
        self._pid = os.getpid()
        self._finished: Finished | None = None
        self._error: BaseException | None = None
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._follow, name=f"nbddp-{name}", daemon=True)
        # They would pile up otherwise; the session's end takes what is left, and not that of a child that was forked.
        weakref.finalize(self, _delete, self._logs, self._pid).atexit = False

    def start(self) -> None:
        """Begin. Raises LaunchError if no thread can be started."""
        running[self.name] = self
        _allocation.take(self, self.gpus, f"{self.name} ({self.name}.stop() ends it)")
        # Anew, so that it comes before the end of the session, whose logs it saves.
        atexit.unregister(_end_with_kernel)
        atexit.register(_end_with_kernel)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._forget()
            prepared, self._prepared = self._prepared, None
            if prepared is not None:
                prepared.discard()
            raise LaunchError(_limits.no_more_processes("cannot start a run in the background")) from error

    def _forget(self) -> None:
        running.pop(self.name, None)
        _allocation.release(self)

    # What its user asks.

    @property
    def status(self) -> str:
        """``"running"``, ``"done"``, ``"failed"`` or ``"stopped"``."""
        if not self._done.is_set():
            return "running"
        if self._error is None:
            return "done"
        return "stopped" if isinstance(self._error, KeyboardInterrupt) else "failed"

    @property
    def results(self) -> dict[str, Any]:
        """What ``--out`` and ``--gather`` have brought back, by name; of a run that failed, what could be had.

        Raises:
            LaunchError: It still runs.
        """
        if not self._done.is_set():
            raise LaunchError(f"{self.name} still runs; {self.name}.wait() waits for its end")
        if self._finished is not None:
            return dict(self._finished.results)
        return dict(getattr(self._error, "results", None) or {})

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the end, and return the results. An interrupt ends the wait, not the run.

        Args:
            timeout: Seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: It still runs after that time.
            Exception: What has ended the run; as a cell in the foreground would raise it.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"{self.name} still runs after {timeout:g} s")
        if self._error is not None and not isinstance(self._error, KeyboardInterrupt):
            raise self._error.with_traceback(None)
        if self._error is not None:
            raise LaunchError(f"{self.name} was stopped")
        return self.results

    def stop(self, timeout: float | None = 30.0) -> None:
        """Interrupt the run as the notebook's interrupt does, and wait for its end.

        Args:
            timeout: Seconds to wait; None for as long as it takes.
        """
        self._press()
        self._done.wait(timeout)

    @property
    def has_cell(self) -> bool:
        """Whether what it shows is shown in a cell."""
        return self._screen.has_cell

    @property
    def gpus(self) -> list[str]:
        """The GPUs that it uses, as the driver knows them."""
        return self._gpus

    def log(self, rank: int = 0, tail: int | None = None) -> str:
        """Return what a rank has printed so far, all of it or its last lines.

        Args:
            rank: The rank.
            tail: How many lines; None for all.

        Raises:
            LaunchError: There is no such rank; or there is no room for its log.
        """
        if rank not in range(self._ranks):
            has = "rank 0" if self._ranks == 1 else f"ranks 0 to {self._ranks - 1}"
            raise LaunchError(f"{self.name}.log({rank}): it has {has}")
        try:
            text = Path(self._logs.saved(rank), f"rank{rank}.log").read_text(errors="replace")
        except FileNotFoundError:  # it has not begun
            return ""
        except OSError as error:
            why = error.strerror or str(error)
            raise LaunchError(f"{self.name}.log({rank}): it cannot be written or read: {why}") from error
        return text if tail is None else "".join(text.splitlines(keepends=True)[-tail:])

    def __repr__(self) -> str:
        return f"<{self.name}: {self._headline()}>"

    def _ipython_display_(self) -> None:
        if not self._screen.mirror(repr(self)):
            sys.stdout.write(f"{self!r}\n")

    def _headline(self) -> str:
        count = "1 rank" if self._ranks == 1 else f"{self._ranks} ranks"
        if self.status == "running":
            return f"{count}, running for {time.monotonic() - self._began:.0f} s"
        error = f": {_in_short(self._error)}" if self._error is not None and self.status == "failed" else ""
        return f"{count}, {self.status}{error}"

    # The thread.

    def _press(self) -> None:
        with self._lock:
            # Of one that is about to begin, it must not be lost.
            self._pressed = True
            if self._open:
                self._gate.press()

    def _follow(self) -> None:
        # At the end nothing of the notebook's is to be held by a handle that is kept.
        prepared, self._prepared = self._prepared, None
        assert prepared is not None
        began = False
        try:
            with self._gate:
                with self._lock:
                    self._open = began = True
                    if self._pressed:
                        self._gate.press()
                self._finished = prepared.run(self._gate)
                self._show_value()
        except BaseException as error:
            # Without the frames, which hold the run and its data.
            expected = isinstance(error, NbddpError | KeyboardInterrupt)
            self._error = error.with_traceback(None) if expected else error
        finally:
            with self._lock:
                self._open = False
            if not began:
                prepared.discard()
            del prepared
            self._forget()
            self._done.set()
            with contextlib.suppress(Exception):  # the front end may be gone
                if not self._ended_with_kernel:
                    self._tell()
                self._screen.settle(repr(self))

    def _show_value(self) -> None:
        """Show the value of the cell's last expression, which no prompt waits for."""
        if self._finished is not None and self._finished.value is not None:
            with contextlib.suppress(Exception):
                self._screen.publish(*self._finished.value, {}, False)

    def _tell(self) -> None:
        """Say in the cell's own output how it has ended."""
        line = f"nbddp: {self.name}: {self._headline()}"
        if self.status == "failed":
            line += f"\nnbddp: {self.name}.wait() raises it, with its traceback"
        elif self.status == "done" and self.results:
            line += f"; {self.name}.results has {', '.join(self.results)}"
        self._screen.write(line + "\n")

    def _save_logs(self) -> str:
        """Move the logs to where they outlive the session; return a line that says where."""
        number = 1
        while os.path.exists(target := os.path.abspath(os.path.join(_LOGS, f"{self.name}-{number}"))):
            number += 1
        for elsewhere in (False, True):
            try:
                if not elsewhere:
                    os.makedirs(_LOGS, exist_ok=True)  # or a renaming would be none
                if elsewhere:  # the notebook's folder cannot be written
                    target = os.path.join(tempfile.mkdtemp(prefix="nbddp-logs-"), f"{self.name}-{number}")
                # If that is a renaming, what ranks print still goes along.
                self._logs.move(target)
            except OSError as error:
                reason = error
            else:
                return f"its logs are in {os.path.relpath(target) if not elsewhere else target}"
        return f"its logs could not be saved: {reason}"

    def end_with(self, what: str) -> str:
        """Save the logs of a run that ends with the kernel or the extension; say it in its cell, and return it."""
        line = f"nbddp: {self.name} ended with {what}; {self._save_logs()}\n"
        with contextlib.suppress(Exception):  # the front end may be gone
            self._screen.write(line)
        return line


def _delete(logs: Logs, pid: int) -> None:
    """Delete the logs of a run whose handle is gone: not in a forked child, which has neither them nor the run."""
    if os.getpid() == pid:
        logs.delete()


class BackgroundScreen:
    """The output of the cell that started a run, and further places where its panel is shown.

    Args:
        shell: The notebook's shell.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        # None where the cell's output is captured; and in a terminal, where the line stands that the user is typing.
        self._screen = CellScreen(shell) if _in_cell(shell) else None
        # Also where it is not shown: the handle shows it when it is displayed.
        self.in_place = True
        self._lock = threading.Lock()
        self._mirrors: list[CellScreen] = []
        self._shown: MimeBundle | None = None

    @property
    def has_cell(self) -> bool:
        """Whether what is shown is shown anywhere by itself."""
        return self._screen is not None

    def mirror(self, otherwise: str) -> bool:
        """Show the panel in the cell that runs now, too, and from now on.

        Args:
            otherwise: What is shown until there is a panel.

        Returns:
            Whether something was shown, or is there already.
        """
        with self._lock:
            if not _in_cell(self._shell):
                if self._shown is not None:
                    sys.stdout.write(f"{self._shown.get('text/plain', otherwise)}\n")
                return self._shown is not None
            here = CellScreen(self._shell)
            if isinstance(self._screen, CellScreen) and here.is_cell_of(self._screen):
                return self._shown is not None
            here.panel(self._shown or {"text/plain": otherwise})
            others = [mirror for mirror in self._mirrors if not here.is_cell_of(mirror)]
            self._mirrors = [*others, here][-_MIRRORS:]
        return True

    def settle(self, otherwise: str) -> None:
        """See that where the handle is displayed it is not said to run any more; of a quick run there was no panel."""
        with self._lock:
            for mirror in self._mirrors if self._shown is None else ():
                mirror.panel({"text/plain": otherwise})
            self._mirrors = []

    def write(self, text: str) -> None:
        """Show complete lines of text."""
        if self._screen is not None:
            self._screen.write(text)

    def publish(self, data: MimeBundle, metadata: MimeBundle, transient: MimeBundle, update: bool) -> None:
        """Show a mime bundle behind the text so far."""
        if self._screen is not None:
            self._screen.publish(data, metadata, transient, update)

    def panel(self, data: MimeBundle) -> None:
        """Show a mime bundle in the place of the last one that came this way."""
        with self._lock:
            self._shown = data
            for screen in (*filter(None, (self._screen,)), *self._mirrors):
                screen.panel(data)

    def clear(self, *, wait: bool) -> None:
        """Take away all but the panel; with `wait`, when something else is shown."""
        if self._screen is not None:
            self._screen.clear(wait=wait)

    def room(self) -> int:
        """Return how many bytes of text can be shown now without some being lost."""
        return self._screen.room() if self._screen is not None else sys.maxsize


def _in_cell(shell: Any) -> bool:
    """Tell whether what is shown now goes to a cell, and can be updated there."""
    screen = screen_of(shell)
    return isinstance(screen, NotebookScreen) and screen.in_place


# What runs, by name.
running: dict[str, BackgroundRun] = {}


def name_for(asked: str, space: Mapping[str, Any]) -> str:
    """Return what a new run is to be called.

    Args:
        asked: The name that its user has chosen; empty for one of nbddp's.
        space: The notebook's variables.

    Raises:
        LaunchError: There is something else of that name.
    """
    if not asked:
        return next(f"run{number}" for number in range(1, 10_000) if f"run{number}" not in {*running, *space})
    if asked in running:
        raise LaunchError(f"--bg {asked}: {asked} still runs; {asked}.stop() ends it, or choose another name")
    if asked in space and not isinstance(space[asked], BackgroundRun):
        kind = type(space[asked]).__name__
        raise LaunchError(f"--bg {asked}: the notebook has a variable of that name, a {kind}; choose another")
    return asked


def end_all(what: str = "the kernel") -> tuple[str, str]:
    """Stop all runs; what they have printed is saved beside the notebook.

    Args:
        what: With what they end.

    Returns:
        What the user is to know, a line for each run: what cells say, and what none does.
    """
    # A child that the kernel has forked leaves its parent's runs alone.
    ending = [run for run in list(running.values()) if run._pid == os.getpid()]
    for run in ending:
        run._ended_with_kernel = True
    for seconds in (_SHUTDOWN_SECONDS, _KILL_SECONDS):
        deadline = time.monotonic() + seconds
        for run in ending:
            if not run._done.is_set():
                run._press()  # the second time, its ranks are killed
        for run in ending:
            run._done.wait(max(0.0, deadline - time.monotonic()))
    lines = [(run.has_cell, run.end_with(what)) for run in ending]
    return "".join(line for has_cell, line in lines if has_cell), "".join(line for cell, line in lines if not cell)


def _end_with_kernel() -> None:
    in_cells, elsewhere = end_all()
    # It may also be that nobody listens any more; and a front end that restarts the kernel does not.
    if in_cells:
        with contextlib.suppress(OSError):
            Path(_note()).write_text(in_cells)
    if elsewhere and sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.__stderr__.write(elsewhere)


def said_by_the_last_kernel() -> str:
    """Return, once, what the kernel before this one had to say of runs that ended with it."""
    note = Path(_note())
    with contextlib.suppress(OSError, UnicodeError):
        text = note.read_text()
        note.unlink()
        return text
    return ""


def _note() -> str:
    """Return the file by which a kernel tells the next one of the same notebook."""
    notebook = os.environ.get("JPY_SESSION_NAME", "")  # Jupyter's servers set it
    return os.path.join(_LOGS, f".ended-{zlib.crc32(notebook.encode()):08x}")


def _in_short(error: BaseException) -> str:
    """Return an exception's type, and the first line of its message if it has one."""
    try:
        message = str(error).strip().partition("\n")[0]
    except Exception:  # it is the user's
        message = ""
    name = type(error).__name__
    return f"{name}: {message}" if message else name
