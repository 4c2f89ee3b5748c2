"""A thousand cells in one kernel: at the end it has, and holds, what it had after the first few."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kernel import LINKS, Kernel

CELLS = int(os.environ.get("NBDDP_CELLS", "200"))  # `make long` has a thousand

# What is loaded at first use, by nbddp, IPython and torch, is loaded by then: each kind of cell has run twice. (IPython
# keeps its history in memory, and the kernel's modules grow until the first traceback and the first display.)
WARM = 40

# Bytes per cell that a process may grow by. IPython keeps each cell's text, its code and its output, and linecache the
# text again: two to three kB in all. A leak of nbddp's, of a message or a file's content, would be more.
KERNEL_BYTES = 8_000

# And what malloc does not give back, however many cells there are: two to four MB were seen.
SLACK_BYTES = 8_000_000

# The launcher keeps nothing. What malloc does not give back makes up some hundred kB, whenever.
LAUNCHER_BYTES = 3_000_000

STATE = (
    LINKS
    + """
import collections, gc, os, re, signal, sys, threading
def state():
    # IPython's history comes and goes; results stay mapped as long as the notebook has them.
    kinds = [re.sub(":.*|run-[0-9]+", "", link) for link in links() if "sqlite" not in link]
    return {
        "descriptors": sorted(collections.Counter(kinds).items()),
        "threads": threading.active_count(),
        "handlers": [str(signal.getsignal(s)) for s in range(1, 32) if s not in (9, 19)],
        "environment": hash(frozenset(os.environ.items())),
    }
def own_objects():
    # What IPython remembers: the last error, with all that its frames hold.
    sys.last_type = sys.last_value = sys.last_traceback = sys.last_exc = None
    gc.collect()
    kinds = [f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects()]
    return {kind: n for kind, n in collections.Counter(kinds).items() if kind.startswith(("nbddp.", "socket."))}
"""
)

SETUP = """
import torch, torch.distributed as dist
from IPython.display import HTML, display
data = torch.arange(100_000.0)
def total(values):
    return values.sum()
"""

PLAIN = "%%ddp --cpus 2\nx = torch.ones(1)\ndist.all_reduce(x)\nprint(x.item())"
OUT = "%%ddp --cpus 2 --out result\nresult = total(data[rank::2]) + torch.zeros(1000)"
GATHER = "%%ddp --cpus 2 --gather part\npart = data[rank::2] * 2"
FAIL = "%%ddp --cpus 2\nraise ValueError('no data')"
ONE_FAILS = "%%ddp --cpus 2\nif rank == 1:\n    raise ValueError('no data')\ndist.barrier()"
DISPLAYS = "%%ddp --cpus 2\ndisplay(HTML('<b>here</b>'))\nprint('\\rhalf', end='')\nprint('\\rdone')\nx = rank\nx"
REFUSED = "%%ddp --cpus 2\nprint(open_file)"
HANGS = "%%ddp --cpus 2\nimport time\nprint('up', flush=True)\ntime.sleep(60)"


def run(kernel: Kernel, n: int) -> None:
    if n % 50 == 25:
        reply = kernel.run_and(HANGS, "[rank 1] up", kernel.interrupt)
        assert reply.error == "KeyboardInterrupt"
    elif n % 10 == 9:
        # Where one fails, half a second passes in case others have more to say.
        reply = kernel.run(ONE_FAILS if n % 50 == 9 else FAIL)
        assert re.fullmatch("rank [01] of 2 raised ValueError: no data", reply.failure), reply.traceback
    elif n % 10 == 4:
        assert kernel.run(REFUSED).error == "CaptureError"
    elif n % 10 == 6:
        assert len(kernel.ok(DISPLAYS).displays) == 2
    elif n % 10 in (2, 7):
        kernel.ok(OUT)
    elif n % 10 == 3:
        kernel.ok(GATHER)
    else:
        assert kernel.ok(PLAIN).lines == ["[rank 0] 2.0", "[rank 1] 2.0"]


def launcher_of(kernel: Kernel) -> psutil.Process:
    return next(p for p in psutil.Process(kernel.pid).children() if "nbddp._launcher" in " ".join(p.cmdline()))


def settled(kernel: Kernel, temp: Path) -> dict[str, Any]:
    """Return what there is once the last run is gone."""
    launcher, process = launcher_of(kernel), psutil.Process(kernel.pid)
    session = kernel.get("__import__('nbddp')._function.client.session.root")
    deadline = time.monotonic() + 10
    while launcher.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    # The logs of the last run are kept, in a folder with a name of its own.
    files = [[name.split("-")[0] for name in sorted(os.listdir(folder))] for folder in (temp, session)]
    return {
        **kernel.get("state()"),
        "files": files,
        "shared memory": os.listdir(f"/dev/shm/{os.path.basename(session)}"),
        "launcher": launcher.pid,
        "launcher's descriptors": launcher.num_fds(),
        "launcher's threads": launcher.num_threads(),
        "processes": len(process.children(recursive=True)),
        "system's threads": process.num_threads(),
    }


def own_objects(kernel: Kernel) -> dict[str, int]:
    """Return how many objects of nbddp's types the kernel holds, beside the values of cells in Out."""
    kernel.ok("%reset -f out")
    counted: dict[str, int] = kernel.get("own_objects()")
    return counted


def memory(process: psutil.Process) -> int:
    """Return what belongs to a process alone: pages that it shares with others come and go with them."""
    return int(process.memory_full_info().uss)


@pytest.mark.slow
def test_cell_after_cell_leaves_nothing(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernel = new_kernel(env={"TMPDIR": str(tmp_path)}, cwd=str(tmp_path))
    kernel.ok(STATE + SETUP + "open_file = open(os.devnull)")
    launcher = launcher_of(kernel)
    for n in range(WARM):
        run(kernel, n)
    before, objects = settled(kernel, tmp_path), own_objects(kernel)
    kernels_memory, launchers_memory = memory(psutil.Process(kernel.pid)), memory(launcher)
    for n in range(WARM, CELLS):
        run(kernel, n)
    assert settled(kernel, tmp_path) == before
    assert own_objects(kernel) == objects
    assert memory(launcher) - launchers_memory < LAUNCHER_BYTES
    assert memory(psutil.Process(kernel.pid)) - kernels_memory < KERNEL_BYTES * (CELLS - WARM) + SLACK_BYTES
