"""A rank's way to the notebook: its output in a pipe, all else in messages.

::

    stdout, stderr, C++, children --pipe-->  relay     with marks where displays belong
    begin, displays, report, end --socket->  run
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from nbddp import _process, _wire
from nbddp._paths import RunDir

# The signal on which a rank writes its Python stack to a file, also while it hangs inside a collective. A real-time
# signal: SIGUSR1 and SIGUSR2 are the user's.
STACK_SIGNAL = getattr(signal, "SIGRTMIN", 23) + 7  # 30 is SIGUSR1 on macOS, which has no others

_PIPE_SIZE = 1 << 20
_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", None)


class Uplink:
    """The rank's connection to the kernel that waits for it, and its stdout and stderr from then on.

    Both streams go into one pipe, at the level of file descriptors: C++, NCCL and child processes are heard too, and
    everything keeps the order in which it was written. What Python writes to stderr stands between marks. Displays go
    over the socket; a mark in the pipe says where each belongs.
    """

    def __init__(self, run: RunDir, secret: str) -> None:
        self._secret = secret
        self._displays = 0
        self._lock = threading.Lock()
        self._sock = _wire.connect(run.socket)
        out, into = os.pipe()
        if _F_SETPIPE_SZ is not None:
            with contextlib.suppress(OSError):  # the user's limit on pipe memory
                fcntl.fcntl(into, _F_SETPIPE_SZ, _PIPE_SIZE)
        os.dup2(into, 1)
        os.dup2(into, 2)
        os.close(into)
        # New ones: the inherited took descriptor 1 for a file.
        sys.stdout = sys.__stdout__ = _text_stream(open(1, "wb", closefd=False))  # type: ignore[misc]  # noqa: SIM115
        sys.stderr = sys.__stderr__ = _text_stream(io.BufferedWriter(_MarkedStderr(secret)))  # type: ignore[misc]
        rank = int(os.environ["RANK"])
        self._stacks = open(run.stacks(rank), "wb")  # noqa: SIM115  # faulthandler keeps its descriptor
        faulthandler.enable(self._stacks, all_threads=False)
        faulthandler.register(STACK_SIGNAL, self._stacks, all_threads=False)
        pidfd = _process.open_pidfd(os.getpid())
        fds = [out] if pidfd is None else [out, pidfd]
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        _wire.send(self._sock, "rank", fds=fds, rank=rank, pid=os.getpid(), attempt=attempt)
        for fd in fds:
            os.close(fd)
        # A worker process must not keep the connection of a dead rank open.
        os.register_at_fork(after_in_child=self._sock.close)
        threading.Thread(target=self._listen, name="nbddp", daemon=True).start()

    def _listen(self) -> None:
        """Help an interrupt through to a main thread that hangs in a collective, where Python's handler cannot run.

        Told of an interrupt, see where the main thread is; told to break off, and it has not moved, end the rank's
        side of its connections: collectives raise in the ranks that wait for it, and here when those leave; then Python
        runs its handler.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        inbox = _wire.Inbox(self._sock)
        spot = None
        while not inbox.closed:
            for message in inbox.receive():
                if message["kind"] == "interrupted":
                    spot = _main_threads_spot()
                elif message["kind"] == "look":
                    with contextlib.suppress(OSError):  # the kernel is gone
                        self._send("at", **_where())
                elif message["kind"] == "break off" and spot is not None and spot == _main_threads_spot():
                    _process.break_off()

    def publish(
        self, data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, Any], update: bool, value: bool
    ) -> None:
        """Have the notebook show a mime bundle after what has been printed so far."""
        with self._lock, _whole():
            self._mark()
            _wire.send(
                self._sock,
                "display",
                number=self._displays,
                data=data,
                metadata=metadata,
                transient=transient,
                update=update,
                value=value,
            )

    def clear(self, wait: bool) -> None:
        """Have the notebook take away what this rank has shown; with `wait`, when it shows something else."""
        with self._lock, _whole():
            self._mark()
            _wire.send(self._sock, "display", number=self._displays, value=False, clear="wait" if wait else "now")

    def begin(self, cell: str) -> None:
        """Tell that the cell begins, whose code has this file name: from here on an interrupt is its to handle."""
        global _cell
        _cell = cell
        self._send("begin")

    def _send(self, kind: str, **fields: Any) -> None:
        with self._lock, _whole():
            _wire.send(self._sock, kind, **fields)

    def _mark(self) -> None:
        """Mark the place of the next display in the output."""
        flush()
        self._displays += 1
        with contextlib.suppress(OSError):  # the cell has closed descriptor 1: it is shown at the end
            os.write(1, _wire.mark(self._secret, str(self._displays)))

    def report(self, **outcome: Any) -> None:
        """Tell how the cell ended."""
        self._send("report", time=time.monotonic(), **outcome)

    def end(self) -> None:
        """Tell that nothing more is to come; what is printed after this is not shown."""
        with self._lock, _whole():
            flush()
            _wire.send(self._sock, "end")


# The file name of the cell's code.
_cell = ""

# Where torch's collectives are: the name of the function that was called tells which one it is.
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


def _where() -> dict[str, Any]:
    """Return the collective that the main thread waits in and the line of the cell that it is at, None if neither."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = line = None
    while frame is not None and line is None:
        file = frame.f_code.co_filename
        if file.endswith(_COLLECTIVES):
            waits = frame.f_code.co_name
        elif file == _cell:
            line = frame.f_lineno
        frame = frame.f_back
    return {"waits": waits, "line": line}


def _main_threads_spot() -> tuple[Any, int] | None:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return (frame, frame.f_lasti) if frame is not None else None


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Put off an interrupt: half a message would make the next one unreadable."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _text_stream(buffer: io.BufferedWriter) -> io.TextIOWrapper:
    """Return a stream that writes each line in one piece, and can write any string."""
    return io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)


class _MarkedStderr(io.RawIOBase):
    """Descriptor 2, with marks around what is written as long as it is the pipe to the notebook."""

    def __init__(self, secret: str) -> None:
        self._before, self._after = _wire.mark(secret, "e"), _wire.mark(secret, "o")
        self._pipe = _identity(2)

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        data = bytes(data)
        # The cell, or a library, may have sent descriptor 2 elsewhere.
        whole = self._before + data + self._after if _identity(2) == self._pipe else data
        with _whole():
            view = memoryview(whole)
            while view:
                view = view[os.write(2, view) :]
        return len(data)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def flush() -> None:
    """Flush the streams of Python and of C."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the user may have replaced or closed them
            stream.flush()
    ctypes.CDLL(None).fflush(None)
