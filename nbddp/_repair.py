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

# Found once, in the launcher: threadpoolctl's search of the loaded libraries takes some milliseconds.
_libraries: Any = None

# Environment that nbddp sets for the agent alone, and the user's own values of it.
agent_only: dict[str, str | None] = {}

_PR_SET_NAME = 15


class Gathering:
    """Holds the ranks back until the last of them is forked; made in the agent.

    The agent has a thread of torch's, the store's. A rank that connects to it has it look up the rank's name, under a
    lock of the C library's, and if the next rank is forked at that moment the lock stays locked in there: that rank
    waits for ever where it looks up a name itself, and all others wait for it.
    """

    def __init__(self, ranks: int) -> None:
        self._agent = os.getpid()
        self._ranks = ranks
        self._forked = 0
        # The ranks read from a pipe into which nobody writes: it ends when nobody can any more.
        self._ends: tuple[int, int] | None = None
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._begin)

    def _before(self) -> None:
        if os.getpid() == self._agent and self._ends is None:
            with contextlib.suppress(OSError):  # then they do not wait
                self._ends = os.pipe()

    def _after(self) -> None:
        if os.getpid() == self._agent:
            self._forked += 1
            # After a restart there are as many again.
            if self._forked % self._ranks == 0 and self._ends is not None:
                for end in self._ends:
                    os.close(end)
                self._ends = None

    def _begin(self) -> None:
        if os.getppid() == self._agent and self._ends is not None:
            os.close(self._ends[1])
            self._ends = self._ends[0], -1
        else:
            self._ends = None

    @property
    def waits_on(self) -> int:
        """In a rank, the descriptor that it waits on; -1 if it need not."""
        return self._ends[0] if self._ends is not None else -1

    def wait(self) -> None:
        """In a rank, wait for the others."""
        if self._ends is not None:
            os.read(self._ends[0], 1)
            os.close(self._ends[0])
            self._ends = None


# The agent's; None where ranks are new interpreters.
gathering: Gathering | None = None


def prepare() -> None:
    """Find, before any fork, the BLAS libraries whose threads the ranks will have to limit."""
    global _libraries
    import threadpoolctl

    _libraries = threadpoolctl.ThreadpoolController().select(user_api="blas")


def is_forked_rank() -> bool:
    """Tell whether this process was forked by an agent of nbddp's."""
    return agent_pid is not None and os.getpid() != agent_pid


def repair(temp: str) -> None:
    """Make a forked rank like a new process.

    Args:
        temp: The directory for multiprocessing's sockets, in the run directory; multiprocessing itself would leave
            one behind in /tmp for each rank that is killed.
    """
    assert agent_pid is not None
    _process.die_with_parent(agent_pid)
    _signals()
    pipes = _descriptors()
    _environment()
    _threads()
    _random_state()
    _multiprocessing(temp, pipes)


def _signals() -> None:
    """Undo torchrun's handlers, which raise SignalException where a cell expects KeyboardInterrupt."""
    signal.set_wakeup_fd(-1)
    for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGCHLD", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
        elif fd > 2 and target.startswith("pipe:") and (gathering is None or fd != gathering.waits_on):
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
