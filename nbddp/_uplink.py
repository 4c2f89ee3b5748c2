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


def mark(secret: str, number: int) -> bytes:
    """Return what a rank writes to its output where its display `number` belongs."""
    return f"\x00nbddp:{secret}:{number}\x00".encode()


class Uplink:
    """The rank's connection to the kernel that waits for it, and its stdout and stderr from then on.

    Both streams go into one pipe, at the level of file descriptors: C++, NCCL and child processes are heard too, and
    everything keeps the order in which it was written. Displays go over the socket; a mark in the pipe says where each
    belongs.
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
        sys.stdout = sys.__stdout__ = _text_stream(1)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = _text_stream(2)  # type: ignore[misc]
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
                elif message["kind"] == "break off" and spot is not None and spot == _main_threads_spot():
                    _process.break_off()

    def publish(
        self, data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, Any], update: bool, value: bool
    ) -> None:
        """Have the notebook show a mime bundle after what has been printed so far."""
        with self._lock, _whole():
            flush()
            self._displays += 1
            with contextlib.suppress(OSError):  # the cell has closed descriptor 1: it is shown at the end
                os.write(1, mark(self._secret, self._displays))
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

    def begin(self) -> None:
        """Tell that the cell begins: from here on an interrupt is the cell's to handle."""
        with self._lock, _whole():
            _wire.send(self._sock, "begin")

    def report(self, **outcome: Any) -> None:
        """Tell how the cell ended."""
        with self._lock, _whole():
            _wire.send(self._sock, "report", time=time.monotonic(), **outcome)

    def end(self) -> None:
        """Tell that nothing more is to come; what is printed after this is not shown."""
        with self._lock, _whole():
            flush()
            _wire.send(self._sock, "end")


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


def _text_stream(fd: int) -> io.TextIOWrapper:
    """Return a stream that writes each line to a descriptor in one piece, and can write any string."""
    raw = open(fd, "wb", closefd=False)  # noqa: SIM115  # it lives as long as the process
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def flush() -> None:
    """Flush the streams of Python and of C."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the user may have replaced or closed them
            stream.flush()
    ctypes.CDLL(None).fflush(None)
