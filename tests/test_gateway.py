"""The process between the kernel and nodes, when one of its ends is stuck."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import psutil
import pytest

from tests.kernel import Kernel
from tests.test_engines import SECONDS, SLEEP, processes, runs

LINE = "%%ddp --engine local --nnodes 2 --cpus 1"


def test_the_kernels_death_ends_also_nodes_that_are_stopped(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    request = kernel.ask(f"{LINE}\n{SLEEP}")
    request.follow(lambda reply: reply.text.count("begun") == 2, SECONDS)
    found = processes()
    for node in found["_node"]:
        node.send_signal(signal.SIGSTOP)
    kernel.kill()
    deadline = time.monotonic() + 20.0
    while any(map(runs, [*found["_gateway"], *found["_node"]])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline


@pytest.fixture
def stopped(new_kernel: Callable[..., Kernel]) -> tuple[Kernel, psutil.Process]:
    """A kernel with kept ranks on two nodes, and the second node's process."""
    kernel = new_kernel()
    kernel.ok(f"{LINE} --keep\nheld = rank + 7", timeout=SECONDS)
    return kernel, max(processes()["_node"], key=lambda process: process.cmdline()[-1])


def test_a_cell_that_is_still_being_sent_is_interrupted_and_the_ranks_stay(
    stopped: tuple[Kernel, psutil.Process],
) -> None:
    kernel, node = stopped
    kernel.ok("import torch\nbig = torch.ones(1 << 24)\nsmall = 3")
    node.send_signal(signal.SIGSTOP)
    try:
        reply = kernel.run_and_after("%%ddp --keep\nprint(big.sum())", 1.5, kernel.interrupt)
    finally:
        node.send_signal(signal.SIGCONT)
    assert reply.error == "KeyboardInterrupt"
    assert "gone" not in reply.text
    assert kernel.ok("%%ddp --keep\nprint(held, small)").lines == ["[node0 rank 0] 7 3", "[node1 rank 1] 8 3"]
    assert kernel.ok("%%ddp --keep\nprint(int(big.sum()))").lines == [
        f"[node{rank} rank {rank}] {1 << 24}" for rank in range(2)
    ]
    kernel.ok("%ddp stop")


def test_a_file_that_cannot_be_read_ends_the_run_with_a_word(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok(
        "import nbddp._world as w, os\nstart = w.World.start\n"
        "def without(self):\n    os.unlink(os.path.join(self.launch.run_dir, 'cell.py'))\n    start(self)\n"
        "w.World.start = without"
    )
    reply = kernel.run(f"{LINE}\n1", timeout=SECONDS)
    assert reply.error == "LaunchError"
    assert "the gateway to the nodes cannot go on: FileNotFoundError" in reply.message
