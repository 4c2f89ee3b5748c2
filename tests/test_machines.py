"""Several machines, each started by hand; here they are two kernels, or two scripts, that meet on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbddp import _machines
from nbddp._option_line import parse
from nbddp._options import OptionError
from tests.kernel import Kernel, Request

# New interpreters, agent and ranks, import torch, on two machines at once.
SECONDS = 100.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def line(node: int, port: int, rest: str) -> str:
    return f"%%ddp --nnodes 2 --node-rank {node} --rdzv-endpoint 127.0.0.1:{port} {rest}\n"


def both(kernels: tuple[Kernel, Kernel], rest: tuple[str, str], cell: str) -> tuple[Request, Request]:
    """Ask two kernels for the same cell, as the two machines of a run."""
    port = free_port()
    first, second = (kernels[node].ask(line(node, port, rest[node]) + cell) for node in (0, 1))
    return first, second


def wait(first: Request, second: Request) -> None:
    assert first.wait(SECONDS)
    assert second.wait(SECONDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nnodes 0", "--nnodes 0: a run has at least one machine"),
        ("--nnodes 2 --node-rank 1", "by hand, each machine says which it is and where all meet, as in --nnodes 2"),
        ("--nnodes 2 --node-rank 2 --rdzv-endpoint a:1", "--node-rank 2: of --nnodes 2 machines they are numbered"),
        ("--node-rank 1", "--node-rank 1: of --nnodes 1 machines there is one, 0"),
        ("--rdzv-endpoint a", "--rdzv-endpoint a: that is not of the form HOST:PORT"),
        ("--rdzv-endpoint a:0", "with a port from 1 to 65535"),
        ("--rdzv-endpoint tcp://a:29500", "not of the form HOST:PORT"),
        ("--nnodes 2 --node-rank 0 --rdzv-endpoint a:1 --max-restarts 1", "nobody can start all ranks again"),
        ("--master-addr a", "did you mean --rdzv-endpoint?"),
        ("--num-machines 2", "did you mean --nnodes?"),
        ("--node_rank 0", "did you mean --node-rank?"),
    ],
)
def test_what_cannot_be(options: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(options)
    assert message in str(caught.value)


def test_one_machine_needs_no_endpoint() -> None:
    assert parse("--nnodes 1 --node-rank 0 --rdzv-endpoint [::1]:29500").nnodes == 1


def test_the_interface_is_the_one_that_leads_to_the_endpoint() -> None:
    assert _machines.parse_endpoint("[fe80::1%eth0]:29500") == ("fe80::1%eth0", 29500)
    assert _machines.interface_to("127.0.0.1:29500") == "lo"
    assert _machines.interface_to("no.such.host.invalid:29500") is None


def test_the_command_is_shown(kernel: Kernel) -> None:
    text = kernel.ok(line(1, 29500, "--cpus 3 --dry-run") + "pass").text
    assert text.startswith(
        "torchrun --nnodes 2 --nproc-per-node 3 --rdzv-backend static --rdzv-endpoint 127.0.0.1:29500 "
        "--rdzv-id nbddp --node-rank 1 <generated script>\n"
    )


def test_ranks_are_numbered_through_two_notebooks(new_kernel: Callable[..., Kernel]) -> None:
    kernels = new_kernel(), new_kernel()
    for node, kernel in enumerate(kernels):
        kernel.ok(f"import torch, torch.distributed as dist\nnode = {node}\nlock = __import__('threading').Lock")
    first, second = both(
        kernels,
        ("--cpus 1 --out total --gather here", "--cpus 2 --out total --gather here --ranks 2"),
        "total = torch.ones(1) * (rank + 1)\ndist.all_reduce(total)\nhere = node, rank, local_rank, world_size\n"
        "print('rank', rank, 'is here')\nimport time\ntime.sleep(2)\nrank if rank < 2 else None",
    )
    wait(first, second)
    assert (first.reply.status, second.reply.status) == ("ok", "ok"), second.reply.traceback
    # One rank has a label if it is not the only one of all; and of ranks that are not asked for nothing is shown.
    assert "[rank 0] rank 0 is here\n" in first.reply.text
    assert second.reply.text == "[rank 2] rank 2 is here\n"
    assert (first.reply.value, second.reply.value) == ({"text/plain": "0"}, None)
    assert [kernel.get("total.item(), here") for kernel in kernels] == [
        (6.0, [(0, 0, 0, 3)]),
        (6.0, [(1, 1, 0, 3), (1, 2, 1, 3)]),
    ]
    # The panel and the logs have the numbers that are shown.
    html = second.reply.panels[-1]["text/html"]
    assert "rank 1: finished" in html
    assert "%ddp log --rank 2" in html
    assert kernels[1].ok("%ddp log --rank 2").text == "rank 2 is here\n"
    assert kernels[1].run("%ddp log --rank 0").message == "%ddp log --rank 0: the last run had ranks 1 to 2"

    # And so have errors of what could not come back.
    first, second = both(kernels, ("--cpus 2", "--cpus 2 --gather x"), "x = lock() if rank == 3 else rank")
    wait(first, second)
    assert first.reply.status == "ok"
    assert "(_thread.lock): cannot pickle '_thread.lock' object on rank 3. Nothing was assigned" in second.reply.message
    assert kernels[1].get("get_ipython().run_line_magic('ddp', 'results')") == {"x": {2: 2}}


def test_an_exception_on_one_machine_ends_the_other(new_kernel: Callable[..., Kernel]) -> None:
    kernels = new_kernel(), new_kernel()
    first, second = both(
        kernels,
        ("--cpus 2", "--cpus 2"),
        "import torch.distributed as dist\ndist.barrier()\n"
        "if rank == 3:\n    raise ValueError('on the second')\ndist.barrier()\ndist.barrier()",
    )
    wait(first, second)
    assert second.reply.failure == "rank 3 of 4 raised ValueError: on the second"
    assert "[rank 3]\n" in second.reply.traceback
    assert second.reply.traceback.endswith("\nrank 2: stopped")
    assert first.reply.error == "RuntimeError", first.reply.traceback
    assert "The ranks of another machine ended first" in first.reply.traceback
    # The error itself has the numbers, too.
    code = "import sys\ne = sys.last_value"
    kernels[1].ok(code)
    assert kernels[1].get("e.rank, e.others, list(e.tracebacks)") == (3, {2: "stopped"}, [3])


def test_an_interrupt_on_one_machine_ends_the_other(new_kernel: Callable[..., Kernel]) -> None:
    kernels = new_kernel(), new_kernel()
    first, second = both(
        kernels,
        ("--cpus 1", "--cpus 2"),
        "import time, torch.distributed as dist\ndist.barrier()\nprint('up')\n"
        "if rank == 1:\n    time.sleep(100)\ndist.barrier()",
    )
    assert not second.wait(SECONDS, until=lambda: second.reply.text.count("up") == 2)
    kernels[1].interrupt()
    wait(first, second)
    assert second.reply.error == "KeyboardInterrupt"
    assert "rank 1: on line 6 of the cell: time.sleep(100)" in second.reply.traceback
    assert "rank 2: waiting in barrier on line 7 of the cell" in second.reply.traceback
    assert first.reply.error == "RuntimeError", first.reply.traceback
    assert "The ranks of another machine ended first" in first.reply.traceback
    # Nothing is left that would be in the way of a run on this machine alone.
    assert kernels[0].ok("%%ddp --cpus 1\nprint(rank)").text == "0\n"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            0,
            "this is machine 0 of 2, and waits at port {port} for machine 1. Is the same launched there, with",
        ),
        (1, "this is machine 1 of 2, and waits at 127.0.0.1:{port} for machine 0. Is the same launched there, and is"),
    ],
)
def test_a_machine_that_never_comes(kernel: Kernel, node: int, message: str) -> None:
    port = free_port()
    reply = kernel.run(line(node, port, "--cpus 1 --timeout 7") + "print('ran')")
    assert reply.error == "RunTimeout"
    assert reply.message == "the run was stopped after --timeout 7 seconds"
    assert "no rank had started yet: " + message.format(port=port) in reply.traceback
    assert "Traceback (most recent call last)" not in reply.traceback


def test_waiting_for_the_others_can_be_interrupted(kernel: Kernel) -> None:
    reply = kernel.run_and_after(line(0, free_port(), "--cpus 1") + "print('ran')", 5.0, kernel.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert "no rank had started yet: this is machine 0 of 2" in reply.traceback
    assert reply.seconds < 20


def test_a_port_that_is_taken(kernel: Kernel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        reply = kernel.run(line(0, port, "--cpus 1") + "print('ran')")
    assert reply.message == (
        f"torchrun could not start the ranks: this is machine 0 of 2, and port {port}, at which the others are to find "
        "it, is another program's. Choose another --rdzv-endpoint, on all machines"
    )


SCRIPT = """
import sys, time
import nbddp, torch, torch.distributed as dist

def work(x):
    total = x * dist.get_rank()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        time.sleep(6)  # the other machine must wait for this one, which serves the store, or the store is gone
    return dist.get_rank(), total.item()

if __name__ == "__main__":
    node, ranks, port = map(int, sys.argv[1:])
    options = nbddp.RunOptions(cpus=ranks, nnodes=2, rdzv_endpoint=f"127.0.0.1:{port}")
    print(nbddp.launch(work, torch.ones(1), options=options, node_rank=node))
"""


def test_scripts_return_what_their_own_ranks_return(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("nnodes=2, rdzv", "nnodes=2, node_rank=0, rdzv"))
    port = free_port()
    runs = [
        subprocess.Popen(
            [sys.executable, str(path), str(node), str(ranks), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for node, ranks in ((0, 1), (1, 1))
    ]
    said = [run.communicate(timeout=SECONDS) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    # The one that is done first says that it waits for the other.
    assert [out.splitlines()[-1] for out, _ in said] == ["[(0, 1.0)]", "[(1, 1.0)]"]
    assert said[1][0].startswith(
        "nbddp: this machine's ranks are done; waiting for those of the other machines. An interrupt ends the wait, "
        "and loses nothing here\n"
    )
