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
import logging
import os
import select
import selectors
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from nbddp import _process, _settings, _wire
from nbddp._paths import RunDir

# The signal on which a rank writes its Python stack to a file, also while it hangs inside a collective. A real-time
# signal: SIGUSR1 and SIGUSR2 are the user's.
STACK_SIGNAL = getattr(signal, "SIGRTMIN", 23) + 7  # 30 is SIGUSR1 on macOS, which has no others

# The same, for who only looks: it has system calls go on that it interrupts.
LOOK_SIGNAL = STACK_SIGNAL + 1 if hasattr(signal, "SIGRTMIN") else STACK_SIGNAL

_C = ctypes.CDLL(None)

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
        # Where the main thread was at the last interrupt.
        self._spot: tuple[int, int] | None = None
        # What a kept rank is asked to do.
        self._requests: deque[dict[str, Any]] = deque()
        self._lock = threading.Lock()
        self._sock = _wire.connect(run.socket)
        self._inbox = _wire.Inbox(self._sock)
        # Who reads from it has it in hand. A thread waits for it, but sees nothing while the main thread does.
        self._in_hand = threading.Lock()
        self._incoming = selectors.DefaultSelector()
        self._incoming.register(self._sock, selectors.EVENT_READ)
        out, into = os.pipe()
        if _F_SETPIPE_SZ is not None:
            with contextlib.suppress(OSError):  # the user's limit on pipe memory
                fcntl.fcntl(into, _F_SETPIPE_SZ, _PIPE_SIZE)
        os.dup2(into, 1)
        os.dup2(into, 2)
        self._pipe, self._pid = into, os.getpid()
        # New ones: the inherited took descriptor 1 for a file.
        before = sys.stderr
        raw = io.FileIO(1, "wb", closefd=False)
        raw.name = "<stdout>"
        sys.stdout = sys.__stdout__ = _text_stream(raw)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = _text_stream(_MarkedStderr(secret))  # type: ignore[misc]
        _redirect_loggers(before, sys.stderr)
        rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        local = _settings.number(os.environ)
        self._stacks = open(run.stacks(local), "wb")  # noqa: SIM115  # faulthandler keeps its descriptor
        faulthandler.enable(self._stacks, all_threads=False)
        for signum in (LOOK_SIGNAL, STACK_SIGNAL):
            faulthandler.register(signum, self._stacks, all_threads=False)
        # Before an interrupt no system call may go on: the interrupt often comes while the stack is being written, and
        # Python would hear of it only when the main thread has waited to the end: for a child, a lock, a socket.
        signal.siginterrupt(STACK_SIGNAL, True)
        pidfd = _process.open_pidfd(os.getpid())
        fds = [out] if pidfd is None else [out, pidfd]
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        _wire.send(self._sock, "rank", fds=fds, rank=rank, local=local, world=world, pid=os.getpid(), attempt=attempt)
        for fd in fds:
            os.close(fd)
        # A worker process must not keep the connection of a dead rank open.
        os.register_at_fork(after_in_child=self._sock.close)
        os.register_at_fork(after_in_child=self._incoming.close)

    def listen(self) -> None:
        """Listen for interrupts.

        Not from the start: where no thread can be started the notebook is to be told so.
        """
        threading.Thread(target=self._listen, name="nbddp", daemon=True).start()

    def _listen(self) -> None:
        """Take the notebook's messages: cells, for a rank that stays; and what helps an interrupt through.

        A main thread that hangs in a collective does not run Python's handler.
        Told of an interrupt, see where the main thread is; told to break off, and it has not moved, end the rank's
        side of its connections: collectives raise in the ranks that wait for it, and here when those leave; then Python
        runs its handler.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._inbox.closed:
            self._incoming.select()
            with self._in_hand:
                if self._incoming.select(0):
                    self._receive()

    def next_request(self) -> dict[str, Any] | None:
        """Wait for what this rank is to do next; None when the notebook is gone.

        The calling thread does so itself: what is to run at once is not to wait until another thread has woken it.
        """
        with self._in_hand:
            self._incoming.unregister(self._sock)
            try:
                while not self._requests and not self._inbox.closed:
                    self._receive()
            finally:
                self._incoming.register(self._sock, selectors.EVENT_READ)
        return self._requests.popleft() if self._requests else None

    def _receive(self) -> None:
        for message in self._inbox.receive():
            if message["kind"] == "interrupted":
                self._spot = _main_threads_spot()
            elif message["kind"] in ("cell", "regroup", "leave"):
                self._requests.append(message)
            elif message["kind"] == "look":
                with contextlib.suppress(OSError):  # the kernel is gone
                    self._send("at", **_where())
            elif message["kind"] == "break off" and self._spot is not None and self._spot == _main_threads_spot():
                _process.break_off()

    def publish(
        self, data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, Any], update: bool, value: bool
    ) -> None:
        """Have the notebook show a mime bundle after what has been printed so far."""
        if os.getpid() != self._pid:
            # A child has no connection of its own.
            print(data.get("text/plain", ""))  # noqa: T201
            return
        with self._lock, _whole():
            self._mark("u" if update else "d")
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
        if os.getpid() != self._pid:
            return
        with self._lock, _whole():
            self._mark("u")
            _wire.send(self._sock, "display", number=self._displays, value=False, clear="wait" if wait else "now")

    def begin(self, cell: str) -> None:
        """Tell that the cell begins, whose code has this file name: from here on an interrupt is its to handle."""
        global _cell
        _cell = cell
        self._send("begin")

    def _send(self, kind: str, **fields: Any) -> None:
        with self._lock, _whole():
            _wire.send(self._sock, kind, **fields)

    def _mark(self, what: str) -> None:
        """Mark the place of the next display in the output."""
        flush()
        self._displays += 1
        # Not to descriptor 1, which the cell may have closed or sent to a file.
        os.write(self._pipe, _wire.mark(self._secret, f"{what}{self._displays}"))

    def failing(self, error: BaseException) -> None:
        """Tell at once that the cell has raised: what there is to say of it, its traceback, takes its time."""
        try:
            text = str(error)
        except Exception:
            text = ""
        self._send("failing", time=time.monotonic(), exception=type(error).__name__, message=text[:1000])

    def report(self, **outcome: Any) -> None:
        """Tell how the cell ended."""
        self._send("report", time=time.monotonic(), **outcome)

    def ready(self) -> None:
        """Tell that this rank waits for its first cell."""
        self._send("ready")

    def idle(
        self,
        held: dict[str, str],
        backend: str,
        *,
        report: dict[str, Any] | None = None,
        pickled: str | None = None,
    ) -> None:
        """Tell that nothing more of this cell is to come, and what this rank holds now.

        Args:
            held: The types of the names that it holds.
            backend: That of its process group.
            report: How the cell ended, if that is not told yet: the notebook need not wake for it twice.
            pickled: Where the cell's exception is.
        """
        with self._lock, _whole():
            flush()
            told = b"" if report is None else _wire.encode("report", time=time.monotonic(), **report)
            self._sock.sendall(told + _wire.encode("idle", pickled=pickled, held=held, backend=backend))

    def regrouped(self, problem: str) -> None:
        """Tell that this rank is in the new process group, or what has kept it out."""
        self._send("regrouped", problem=problem)

    def end(self, pickled: str | None) -> None:
        """Tell that nothing more is to come, and where the exception is; what is printed after this is not shown."""
        with self._lock, _whole():
            flush()
            # A notebook with many ranks to hear reads the pipe later than this; a library's last words are not to be
            # in it by then.
            null = os.open(os.devnull, os.O_WRONLY)
            for fd in (1, 2):
                os.dup2(null, fd)
            os.close(null)
            _wire.send(self._sock, "end", pickled=pickled)


# The file name of the cell's code.
_cell = ""

# Where torch's collectives are: the name of the function that was called tells which one it is.
COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")


def _where() -> dict[str, Any]:
    """Return the collective that the main thread waits in and the line of the cell that it is at, None if neither."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = line = None
    while frame is not None and line is None:
        file = frame.f_code.co_filename
        if file.endswith(COLLECTIVES):
            waits = frame.f_code.co_name
        elif file == _cell:
            line = frame.f_lineno
        frame = frame.f_back
    return {"waits": waits, "line": line}


def _main_threads_spot() -> tuple[int, int] | None:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    # Not the frame itself, which would hold the cell's variables.
    return (id(frame), frame.f_lasti) if frame is not None else None


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Put off an interrupt: half a message would make the next one unreadable."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _redirect_loggers(before: Any, after: Any) -> None:
    """Have handlers write to the new stream, such as torch's, that were made before the fork."""
    for reference in list(logging._handlerList):  # type: ignore[attr-defined]
        handler = reference()
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.stream = after


def _text_stream(raw: io.RawIOBase) -> io.TextIOWrapper:
    """Return a stream that writes each line in one piece, and can write any string."""
    stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    stream.mode = "w"  # type: ignore[misc]  # as the interpreter's own have it
    return stream


class _MarkedStderr(io.RawIOBase):
    """Descriptor 2, with marks around what is written as long as it is the pipe to the notebook."""

    def __init__(self, secret: str) -> None:
        self._before, self._after = _wire.mark(secret, "e"), _wire.mark(secret, "o")
        self._pipe = _identity(2)
        self.name = "<stderr>"

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(bytes(data))
        # The cell, or a library, may have sent descriptor 2 elsewhere.
        marked = _identity(2) == self._pipe
        # So much is written in one piece: nobody else's text gets between the marks.
        size = select.PIPE_BUF - len(self._before) - len(self._after) if marked else len(view)
        with _whole():
            for start in range(0, len(view), size):
                piece = bytes(view[start : start + size])
                rest = memoryview(self._before + piece + self._after if marked else piece)
                while rest:
                    rest = rest[os.write(2, rest) :]
        return len(view)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def flush() -> None:
    """Flush the streams of Python and of C."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the user may have replaced or closed them
            stream.flush()
    _C.fflush(None)
