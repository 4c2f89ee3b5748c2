"""What a forked rank must put right to be what a new process would be.

A rank is forked from the agent, which was forked from the launcher: it inherits thread limits, random state, signal
handlers, descriptors and the parent's identity. Each step below undoes one of these; `docs/design.md` says what went
wrong without it. Under "spawn" a rank is a new process and none of this is needed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from typing import Any

from nbddp import _process

# The pid of the agent that is about to fork ranks from this process's image; None where ranks are new interpreters.
agent_pid: int | None = None

# What torchrun, the launcher and Python have handlers for in the agent.
_HANDLED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGINT", "SIGCHLD", "SIGUSR1", "SIGUSR2")
)

# While the agent forks: what was blocked before.
_blocked: set[int | signal.Signals] | None = None

# Found once, in the launcher: threadpoolctl's search of the loaded libraries takes some milliseconds.
_libraries: Any = None

# Environment that nbddp sets for the agent alone, and the user's own values of it.
agent_only: dict[str, str | None] = {}

_PR_SET_NAME = 15


def prepare() -> None:
    """Find, before any fork, the BLAS libraries whose threads the ranks will have to limit."""
    global _libraries
    import threadpoolctl

    _libraries = threadpoolctl.ThreadpoolController().select(user_api="blas")


def is_forked_rank() -> bool:
    """Tell whether this process was forked by an agent of nbddp's."""
    return agent_pid is not None and os.getpid() != agent_pid


def hold_signals_at_forks() -> None:
    """Have signals wait while the agent forks, and each rank be without its handlers from the first moment.

    A signal that came in between was lost: functions that Python calls around a fork may raise what they want, it is
    only printed. The agent then went on as if nothing had been; or a rank did, of which the agent thought that it would
    end, and waited for it while it waited for others that had.
    """
    # Of what is called around a fork, what is registered last comes first before it, and last after it.
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_signals)


def _hold() -> None:
    global _blocked
    # A rank's own children are forked with these, too.
    _blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED) if os.getpid() == agent_pid else None


def _release() -> None:
    if _blocked is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _blocked)


def repair(temp: str) -> None:
    """Make a forked rank like a new process.

    Args:
        temp: The directory for multiprocessing's sockets, in the run directory; multiprocessing itself would leave
            one behind in /tmp for each rank that is killed.
    """
    assert agent_pid is not None
    _process.die_with_parent(agent_pid)
    pipes = _descriptors()
    _environment()
    _threads()
    _random_state()
    _multiprocessing(temp, pipes)


def _signals() -> None:
    """Undo the agent's handlers in a rank.

    SIGINT ends it, too, until there is somebody to tell of a KeyboardInterrupt: the process that torch makes of a rank
    takes one for a good end, and its agent then waits for ever for what the rank has returned.
    """
    if _blocked is None:
        return
    signal.set_wakeup_fd(-1)
    for signum in _HANDLED:
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _descriptors() -> list[int]:
    """Close the sockets and event descriptors of agent and launcher; return the pipes, which multiprocessing needs."""
    pipes = []
    kinds = ("socket:", "anon_inode:[eventpoll]", "anon_inode:[eventfd]", "anon_inode:[pidfd]")
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    for name in os.listdir(folder):
        fd = int(name)
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:  # the listing's own descriptor
            continue
        if fd > 2 and target.startswith(kinds):
            os.close(fd)
        elif fd > 2 and target.startswith("pipe:"):
            pipes.append(fd)
    return pipes


def _environment() -> None:
    for name, value in agent_only.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _threads() -> None:
    """Raise the limits of a process that was started with one thread to what OMP_NUM_THREADS says now."""
    import torch

    limit = int(os.environ["OMP_NUM_THREADS"].split(",")[0])
    torch.set_num_threads(limit)
    if _libraries is not None:
        for library, variable in (("openblas", "OPENBLAS_NUM_THREADS"), ("mkl", "MKL_NUM_THREADS")):
            _libraries.select(internal_api=library).limit(limits=int(os.environ.get(variable, limit)))


def _random_state() -> None:
    """Give every rank random state of its own; forks share it, down to the last bit."""
    import torch

    torch.default_generator.seed()
    if "numpy.random" in sys.modules:
        import numpy as np

        np.random.seed()  # it is the legacy global state that was inherited
    # Python's own generator reseeds itself after a fork.


def _multiprocessing(temp: str, pipes: list[int]) -> None:
    process = multiprocessing.current_process()
    process.authkey = os.urandom(32)
    tempfile.tempdir = None
    with contextlib.suppress(FileExistsError):  # of the attempt before a restart
        os.mkdir(temp, 0o700)
    process._config["tempdir"] = temp  # type: ignore[attr-defined]  # what multiprocessing.util.get_temp_dir reads

    def forget() -> None:
        # torchrun learns of a rank's end by one of these pipes; a DataLoader worker that holds it too would keep a
        # killed rank alive in its eyes for seconds.
        for fd in pipes:
            with contextlib.suppress(OSError):
                os.close(fd)

    os.register_at_fork(after_in_child=forget)


def name_process(name: str) -> None:
    """Name this process as ``ps`` and ``top`` show it (15 characters at most)."""
    if sys.platform == "linux":
        _process._libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
