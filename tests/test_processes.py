"""Each process of a run, killed, crashed or stopped, at each stage; and each way in which a kernel ends."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.kernel import Kernel
from tests.test_lifecycle import launcher_of

# Every rank has DataLoader workers and a child in a session of its own.
SETUP = """
import os, subprocess, time, torch
class Data(torch.utils.data.Dataset):
    def __len__(self): return 10 ** 6
    def __getitem__(self, i): return time.sleep(0.01) or i
class Slow:
    def __init__(self): self.seconds = 0.0
    def __setstate__(self, state): time.sleep(state["seconds"])
slow = Slow()
"""
BUSY = """%%ddp --cpus {ranks}
slow
subprocess.Popen(["sleep", "1003"], start_new_session=True)
for n, batch in enumerate(torch.utils.data.DataLoader(Data(), num_workers=2)):
    if n == 2:
        print("up", flush=True)
"""


def tree(kernel: Kernel) -> list[psutil.Process]:
    """Return what descends from the kernel."""
    return psutil.Process(kernel.pid).children(recursive=True)


def process_of(kernel: Kernel, which: str) -> psutil.Process | None:
    launcher = launcher_of(kernel)
    if which == "launcher":
        return launcher
    with contextlib.suppress(psutil.Error):
        for agent in launcher.children():
            for rank in agent.children():
                if rank.name() == "nbddp-rank1":
                    return agent if which == "agent" else rank
    return None


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP], ids=lambda s: s.name)
@pytest.mark.parametrize("stage", ["starting", "running"])
@pytest.mark.parametrize("victim", ["launcher", "agent", "rank"])
def test_a_process_is_hit(kernel: Kernel, victim: str, stage: str, signum: int) -> None:
    kernel.ok("%config DDPMagics.grace = 0.5")
    kernel.ok(SETUP + ("slow.seconds = 60" if stage == "starting" else ""))
    kernel.ok("%%ddp --cpus 1\npass")
    deadline = time.monotonic() + 30
    # The agent of the cell before may be there for a moment.
    while launcher_of(kernel).children():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    request = kernel.ask(BUSY.format(ranks=2))
    while process_of(kernel, "rank") is None or (stage == "running" and "[rank 1] up" not in request.reply.text):
        assert time.monotonic() < deadline
        request.wait(0.02)
    hit = process_of(kernel, victim)
    assert hit is not None
    hit.send_signal(signum)
    began = time.monotonic()
    if not request.wait(1.5 if signum == signal.SIGSTOP else 15):
        # A stopped process ends nothing.
        assert signum == signal.SIGSTOP
        kernel.interrupt()
        began = time.monotonic()
        assert request.wait(6)
    assert time.monotonic() - began < 6
    assert request.reply.error in {"RunLostError", "RankError", "LaunchError", "KeyboardInterrupt"}, (
        request.reply.traceback
    )
    if signum != signal.SIGSTOP:
        assert victim in request.reply.message or "rank 1 of 2 was killed by signal" in request.reply.message
    kernel.ok("slow.seconds = 0.0\n%config DDPMagics.grace = 5")
    assert kernel.ok("%%ddp --cpus 2\nprint('works')").lines == ["[rank 0] works", "[rank 1] works"]


def begin(kernel: Kernel, ranks: int) -> list[psutil.Process]:
    """Have ranks at work; return all processes below the kernel."""
    kernel.ok(SETUP)
    request = kernel.ask(BUSY.format(ranks=ranks))
    deadline = time.monotonic() + 30
    while request.reply.text.count("up") < ranks:
        assert time.monotonic() < deadline
        request.wait(0.05)
    processes = tree(kernel)
    # The launcher, the agent, the ranks, two workers and a child of each.
    assert len(processes) >= 2 + ranks * 4
    return processes


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def gone(processes: list[psutil.Process], session: Path, *, within: float) -> None:
    """See that all are gone in time, and the directory of the session with them."""
    began = time.monotonic()
    # What is left of a process that nobody has taken note of is nothing.
    while (alive := [p for p in processes if is_alive(p)]) and time.monotonic() < began + within:
        time.sleep(0.02)
    assert not alive
    while (session.exists() or Path("/dev/shm", session.name).exists()) and time.monotonic() < began + within:
        time.sleep(0.02)
    assert not session.exists()
    assert not Path("/dev/shm", session.name).exists()


@pytest.mark.parametrize(
    ("how", "ranks"),
    [
        *[(how, 2) for how in ("restart", "restart at once", "os._exit", "SIGSEGV", "SIGTERM")],
        *[(how, ranks) for how in ("shutdown", "SIGKILL") for ranks in (2, 4)],
    ],
)
def test_a_kernel_ends(new_kernel: Callable[..., Kernel], how: str, ranks: int) -> None:
    kernel = new_kernel()
    session = Path(kernel.get("__import__('nbddp')._function.client.session.root"))
    if how == "os._exit":
        kernel.ok("import threading, os\nthreading.Timer(6, os._exit, (0,)).start()")
    processes = begin(kernel, ranks)
    process = psutil.Process(kernel.pid)
    match how:
        case "restart" | "restart at once":
            kernel._manager.restart_kernel(now=how.endswith("at once"))
        case "shutdown":
            kernel._manager.shutdown_kernel()
        case "SIGKILL" | "SIGSEGV" | "SIGTERM":
            process.send_signal(signal.Signals[how])
        case "os._exit":
            process.wait(15)
    if how == "SIGTERM":  # ipykernel takes its time
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(5)
    gone(processes, session, within=2)


PARENT = """
import json, sys, time
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="python3")
client.execute_interactive("%load_ext nbddp\\n" + {setup!r}, timeout=30)
seen = []
client.execute({busy!r})
while sum("up" in text for text in seen) < 2:
    message = client.get_iopub_msg(timeout=30)
    if message["msg_type"] == "stream":
        seen += [line for line in message["content"]["text"].splitlines()]
print(json.dumps(manager.provisioner.pid), flush=True)
time.sleep(1000)
"""


def test_the_kernels_parent_is_killed(private_folders: Path) -> None:
    """As when the Jupyter server is: its kernels notice that within a second, and end."""
    code = PARENT.format(setup=SETUP, busy=BUSY.format(ranks=2))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    kernel = psutil.Process(json.loads(parent.stdout.readline()))
    processes = kernel.children(recursive=True)
    (session,) = private_folders.glob(f"nbddp-{kernel.pid}-*")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    with contextlib.suppress(psutil.TimeoutExpired):
        kernel.wait(5)
    assert not is_alive(kernel)
    gone(processes, session, within=2)
