"""Where the ranks are: while they run, when they hang, before they have begun."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil

from tests.kernel import Kernel
from tests.test_lifecycle import launcher_of

# Asks from another thread, as a subshell does, until the answer holds some text; then interrupts the run.
ASK = """
import contextlib, io, os, signal, threading, time
def ask(sought):
    answers[:] = [""]
    while not all(text in answers[-1] for text in sought):
        time.sleep(0.3)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            get_ipython().run_line_magic("ddp", "stacks")
        answers.append(out.getvalue())
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
def ask_for(*sought):
    threading.Thread(target=ask, args=(sought,)).start()
answers = []
"""

MISSING = """%%ddp --cpus 4
import time
def load_batch():
    time.sleep(60 if rank == 1 else 0)

for step in range(3):
    load_batch()
    dist.all_reduce(torch.ones(1))
"""

EXPECTED = [
    "ranks 0, 2-3: waiting in all_reduce on line 8 of the cell: dist.all_reduce(torch.ones(1))",
    "rank 1: in load_batch on line 4 of the cell: time.sleep(60 if rank == 1 else 0) (called on line 7 of the cell)",
]


def test_stacks_while_a_cell_hangs(kernel: Kernel) -> None:
    kernel.ok("import torch, torch.distributed as dist")
    assert kernel.ok("%ddp stacks").text == "nbddp: nothing is running\n"
    kernel.ok(ASK)
    kernel.ok("ask_for('ranks 0, 2-3: waiting', 'rank 1: in load_batch')")
    reply = kernel.run(MISSING)
    assert kernel.get("answers[-1].splitlines()") == EXPECTED
    # It disturbs nobody, and the interrupt says the same in the end.
    assert reply.error == "KeyboardInterrupt"
    assert reply.traceback.splitlines()[:2] == EXPECTED


def test_places_in_other_cells_files_and_libraries(kernel: Kernel) -> None:
    kernel.ok(ASK)
    kernel.ok(
        "import torch, torch.distributed as dist, time\n\ndef deep(seconds):\n    time.sleep(seconds)\n\n"
        "class Slow(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n        return x\n"
        "    @staticmethod\n    def backward(ctx, g):\n        time.sleep(60)\n        return g"
    )
    kernel.ok("ask_for('in deep', 'in backward', 'in get')")
    kernel.run(
        "%%ddp --cpus 3\nif rank == 0:\n    deep(60)\nx = torch.ones(1, requires_grad=True)\n"
        "if rank == 1:\n    Slow.apply(x).sum().backward()\n"
        "import queue\nqueue.Queue().get()"
    )
    lines = kernel.get("answers[-1].splitlines()")
    assert lines[0].startswith("rank 0: in deep on line 4 of ")
    assert lines[0].endswith(": time.sleep(seconds) (called on line 3 of the cell)")
    assert lines[1].startswith("rank 1: in backward on line 12 of ")
    assert lines[1].endswith(": time.sleep(60) (called on line 6 of the cell)")
    assert lines[2] == "rank 2: in get (queue.py) on line 8 of the cell: queue.Queue().get()"


def test_a_rank_that_does_not_answer(kernel: Kernel) -> None:
    kernel.ok("%config DDPMagics.grace = 0.5")
    kernel.ok(ASK)

    def stop() -> None:
        rank = next(p for p in launcher_of(kernel).children(recursive=True) if p.name() == "nbddp-rank1")
        os.kill(rank.pid, signal.SIGSTOP)

    kernel.ok("ask_for('rank 0: on line', 'no answer')")
    reply = kernel.run_and("%%ddp --cpus 2\nimport time\nprint('up', flush=True)\ntime.sleep(60)", "[rank 1] up", stop)
    kernel.ok("%config DDPMagics.grace = 5")
    assert kernel.get("answers[-1].splitlines()") == [
        "rank 0: on line 4 of the cell: time.sleep(60)",
        "rank 1: no answer: it is stopped, or the machine is very busy",
    ]
    assert "rank 1: no answer: it is stopped" in reply.traceback


def test_ranks_that_do_not_begin(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("%%ddp --cpus 1\npass")
    kernel.ok(
        "import nbddp._run as run, os, time\nrun._SLOW_START_SECONDS = 1\nhere = os.getpid()\n"
        "class Slow:\n    def __init__(self): self.n = 1\n"
        "    def __setstate__(self, state):\n        time.sleep(60 if os.environ.get('RANK') == '1' else 0)\n"
        "slow = Slow()"
    )
    reply = kernel.run_and(
        "%%ddp --cpus 2\nimport torch.distributed as dist\nslow\ndist.barrier()",
        "nbddp: rank 1 has not begun",
        kernel.interrupt,
    )
    assert (
        "nbddp: rank 1 has not begun the cell after 1 s. An interrupt says what they are at; "
        "%ddp doctor looks for the cause"
    ) in reply.text
    lines = reply.traceback.splitlines()
    assert lines[0] == "rank 0: waiting in barrier on line 4 of the cell: dist.barrier()"
    assert lines[1] == "rank 1: starting, loading what the cell uses"
    assert reply.seconds < 10
    assert psutil.Process(kernel.pid).is_running()
