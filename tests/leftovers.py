"""What is there that should not be: processes, sockets and files that runs have left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

from tests.kernel import Kernel

# In the environment of whoever starts kernels, set to that process's pid: whose processes they and their runs are.
MARK = "NBDDP_TEST_RUN"

# In the environment of what Slurm or sshd has started for a user: the node (see cluster.py).
NODE = "NBDDP_TEST_NODE"

# What torch, multiprocessing and nbddp would leave in a temporary directory.
_LITTER = ("nbddp-", "torchelastic_", "pytorch-errorfile-", "pymp-", "ipython-")


def leftovers(temp: Path, kernels: Iterable[Kernel]) -> list[str]:
    """Return what is there that should not be, a line each."""
    left = []
    open_kernels = {kernel.pid for kernel in kernels if kernel.alive()}
    for process in marked():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "nbddp._launcher" in command and process.ppid() in open_kernels | {os.getpid()}:
                # An idle launcher has no children, one thread, and no sockets but those to its kernel.
                left += [f"child of a launcher: {child.pid} {child.name()}" for child in process.children()]
                left += [f"launcher has {process.num_threads()} threads"] if process.num_threads() != 1 else []
            else:
                left.append(f"process {process.pid}: {process.name()} {command[:100]}")
            left += [f"{process.pid} listens at {c.laddr}" for c in process.net_connections() if c.status == "LISTEN"]
    live_sessions = tuple(f"nbddp-{pid}-" for pid in open_kernels | {os.getpid()})
    for folder in (temp, Path("/dev/shm")):
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # it goes away this moment
                if path.name.startswith(live_sessions):
                    left += [f"{p}" for p in path.iterdir() if p.name.startswith("run-")]
                elif path.name.startswith(_LITTER) and (
                    folder == temp or (path.stat().st_uid == os.getuid() and not _others(path))
                ):
                    left.append(str(path))
    return left


def marked() -> list[psutil.Process]:
    """Return the processes that descend from a launcher of this test run's, or that a cluster's node has started.

    A cluster's own daemons, slurmstepd and sshd's sessions among them, are not marked.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environ = process.environ()
            if environ.get(MARK) == str(os.getpid()) and ("NBDDP_SESSION" in environ or NODE in environ):
                found.append(process)
    return found


def _others(path: Path) -> bool:
    """Tell whether a session's directory is of a process that lives and is none of this test run's."""
    with contextlib.suppress(psutil.Error, ValueError, IndexError):
        process = psutil.Process(int(path.name.split("-")[1]))
        return os.getpid() not in [parent.pid for parent in process.parents()]
    return False
