"""The stop button, at every stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.kernel import Kernel


def test_while_running_ranks_clean_up_and_say_where_they_were(kernel: Kernel) -> None:
    kernel.ok("import torch, torch.distributed as dist")
    reply = kernel.run_and(
        "%%ddp --cpus 2\nimport time; dist.barrier()\nprint('up')\ntry:\n    time.sleep(60)\n"
        "finally:\n    print('cleaned')",
        "[rank 1] up",
        lambda: (time.sleep(0.3), kernel.interrupt()),  # the other one, too
    )
    assert reply.error == "KeyboardInterrupt"
    assert "[rank 0] cleaned" in reply.text
    assert "[rank 1] cleaned" in reply.text
    assert "ranks 0-1: on line 5 of the cell: time.sleep(60)" in reply.traceback
    assert reply.seconds < 4


def test_inside_a_hung_collective(kernel: Kernel) -> None:
    kernel.ok("import torch, torch.distributed as dist\n%config DDPMagics.grace = 1")
    reply = kernel.run_and(
        "%%ddp --cpus 2\nimport time\nprint('up')\nif rank == 0:\n    dist.barrier()\nelse:\n"
        "    while True:\n        try:\n            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n            pass",
        "[rank 1] up",
        lambda: (time.sleep(0.3), kernel.interrupt()),
    )
    kernel.ok("%config DDPMagics.grace = 5")
    assert reply.error == "KeyboardInterrupt"
    assert "rank 0: waiting in barrier on line 5 of the cell: dist.barrier()" in reply.traceback
    assert "did not end" in reply.text + reply.traceback
    assert reply.seconds < 6


def test_a_collective_ends_when_the_rank_that_it_waits_for_does(kernel: Kernel) -> None:
    # The DDP object keeps the process group, and with it the connections, alive.
    kernel.ok(
        "import torch, torch.distributed as dist\nfrom torch.nn.parallel import DistributedDataParallel as DDP\n"
        "model = torch.nn.Linear(2, 2)"
    )
    reply = kernel.run_and(
        "%%ddp --cpus 2\nimport time\nddp = DDP(model)\nprint('up')\nif rank == 0:\n    dist.barrier()\ntime.sleep(60)",
        "[rank 1] up",
        lambda: (time.sleep(0.3), kernel.interrupt()),
    )
    assert reply.error == "KeyboardInterrupt"
    assert "rank 0: waiting in barrier on line 6 of the cell: dist.barrier()" in reply.traceback
    assert "terminated" not in reply.text  # nobody had to wait for the end of the grace period


def test_ranks_that_wait_for_each_other_are_freed(kernel: Kernel) -> None:
    # One step more on one rank than on the other: a backward pass that nobody answers, and a barrier that nobody joins.
    kernel.ok(
        "import torch, torch.distributed as dist\nfrom torch.nn.parallel import DistributedDataParallel as DDP\n"
        "model = torch.nn.Linear(2, 2)"
    )
    reply = kernel.run_and(
        "%%ddp --cpus 2\nddp = DDP(model)\ndist.new_group([0, 1])\nprint('up')\ntry:\n"
        "    for _ in range(3 + rank):\n        ddp(torch.ones(1, 2)).sum().backward()\n"
        "    dist.barrier(dist.new_group([0]) if rank else None)\n    import time; time.sleep(60)\n"
        "finally:\n    print('cleaned')",
        "[rank 1] up",
        lambda: (time.sleep(0.5), kernel.interrupt()),
    )
    assert reply.error == "KeyboardInterrupt"
    assert "[rank 0] cleaned" in reply.text
    assert "[rank 1] cleaned" in reply.text
    assert "terminated" not in reply.text
    assert reply.seconds < 4


def test_a_second_press_does_not_wait(kernel: Kernel) -> None:
    def twice() -> None:
        kernel.interrupt()
        time.sleep(0.3)
        kernel.interrupt()

    reply = kernel.run_and(
        "%%ddp --cpus 2\nimport time, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('up')\ntime.sleep(60)",
        "[rank 1] up",
        twice,
    )
    assert reply.error == "KeyboardInterrupt"
    assert reply.seconds < 3


def test_a_stopped_launcher_holds_nothing_up(kernel: Kernel) -> None:
    def stop() -> None:
        (launcher,) = psutil.Process(kernel.pid).children()
        launcher.suspend()

    reply = kernel.run_and(
        "%%ddp --cpus 2\nimport time\nprint('up')\ntime.sleep(60)", "[rank 1] up", lambda: (stop(), kernel.interrupt())
    )
    assert reply.error == "KeyboardInterrupt"
    assert reply.seconds < 4
    stop()
    assert kernel.ok("%%ddp --cpus 1\nprint('fine')", timeout=20).text == "fine\n"


def test_torchrun_is_not_waited_for(kernel: Kernel) -> None:
    pressed: list[float] = []
    reply = kernel.run_and(
        "%%ddp --cpus 1\nimport os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\n"
        "try:\n    print('up')\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    os._exit(3)",
        "up",
        lambda: (pressed.append(time.monotonic()), kernel.interrupt()),
    )
    assert reply.error == "KeyboardInterrupt"
    assert time.monotonic() - pressed[0] < 2.5


def test_while_capturing(kernel: Kernel) -> None:
    kernel.ok(
        "import time\nclass Slow:\n    def __reduce__(self):\n        time.sleep(30)\n"
        "        return str, ()\nslow = Slow()"
    )
    reply = kernel.run_and_after("%%ddp --cpus 2\nprint(slow)", 0.5, kernel.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert reply.seconds < 3


def test_while_the_launcher_starts(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()  # the launcher imports for some seconds
    reply = kernel.run_and_after("%%ddp --cpus 2\nprint(1)", 0.4, kernel.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert reply.seconds < 3
    assert kernel.ok("%%ddp --cpus 2\nprint('fine')").lines == ["[rank 0] fine", "[rank 1] fine"]


@pytest.mark.parametrize("delay", [0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.13])
def test_while_launching(kernel: Kernel, delay: float) -> None:
    reply = kernel.run_and_after("%%ddp --cpus 2\nimport time\ntime.sleep(60)", delay, kernel.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert reply.seconds < 4


def test_while_returning(kernel: Kernel) -> None:
    kernel.ok(
        "import time, os\nkernel_pid = os.getpid()\nclass Slow:\n    def __setstate__(self, state):\n"
        "        if os.getpid() == state['pid']:\n            time.sleep(30)\n"
        "    def __getstate__(self):\n        return {'pid': kernel_pid}\nslow = other = 'old'"
    )
    reply = kernel.run_and_after("%%ddp --cpus 2 --out other,slow\nother = 'new'\nslow = Slow()", 1.0, kernel.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert reply.seconds < 4
    assert kernel.get("(slow, other)") == ("old", "old")


def test_the_handler_is_as_before(kernel: Kernel) -> None:
    kernel.ok("import signal\nbefore = signal.getsignal(signal.SIGINT)")
    kernel.ok("%%ddp --cpus 1\npass")
    assert kernel.get("signal.getsignal(signal.SIGINT) == before") is True


def test_interrupting_the_idle_kernel_does_no_harm(kernel: Kernel) -> None:
    kernel.interrupt()
    time.sleep(0.2)
    assert kernel.ok("%%ddp --cpus 1\nprint('fine')").text == "fine\n"


def test_a_shell_command_in_a_rank_is_interrupted_too(kernel: Kernel) -> None:
    reply = kernel.run_and("%%ddp --cpus 1\nprint('up')\n!sleep 60\nprint('not reached')", "up", kernel.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert "not reached" not in reply.text
    assert reply.seconds < 4


# Of what the system would go on with after a signal whose handler allows that, as the one that writes stacks once did.
WAITS = {
    "child": "subprocess.call(['sleep', '60'])",
    "lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "pipe": "os.read(os.pipe()[0], 1)",
    "socket": "ends = socket.socketpair(); ends[0].recv(1)",
    "file lock": "files = [open(path), open(path)]; [fcntl.flock(file, fcntl.LOCK_EX) for file in files]",
}


@pytest.mark.parametrize("what", WAITS)
def test_what_a_rank_waits_for_does_not_hold_up_an_interrupt(kernel: Kernel, tmp_path: Path, what: str) -> None:
    (tmp_path / "locked").touch()
    kernel.ok(f"path = {str(tmp_path / 'locked')!r}")
    wait = WAITS[what]
    for _ in range(5):
        reply = kernel.run_and(
            "%%ddp --cpus 2\nimport fcntl, os, socket, subprocess, threading\npath\n"
            f"try:\n    print('up')\n    {wait}\nexcept KeyboardInterrupt:\n    print('saved')\n    raise",
            "rank 1] up",
            lambda: (time.sleep(0.1), kernel.interrupt()),
        )
        assert reply.error == "KeyboardInterrupt"
        assert sorted(reply.lines) == ["[rank 0] saved", "[rank 0] up", "[rank 1] saved", "[rank 1] up"]
        assert reply.seconds < 3


def test_a_display_that_is_under_way_is_not_torn(kernel: Kernel) -> None:
    reply = kernel.run_and(
        "%%ddp --cpus 1\nprint('up', flush=True)\nfrom IPython.display import display\n"
        "class Big:\n    def _repr_html_(self):\n        return 'x' * 20_000_000\n"
        "    def __repr__(self):\n        return 'big'\n"
        "try:\n    while True:\n        display(Big())\n"
        "except KeyboardInterrupt:\n    display('last')\n    raise",
        "up",
        lambda: (time.sleep(0.2), kernel.interrupt()),
    )
    assert reply.error == "KeyboardInterrupt"
    assert "'last'" in reply.text + str(reply.displays[-1])


def test_an_interrupt_that_arrives_during_a_fork_is_not_lost(kernel: Kernel) -> None:
    # Python drops a KeyboardInterrupt that comes to light in a hook around the fork.
    kernel.ok("import os, signal, torch\nx = 'old'")
    reply = kernel.run_and(
        "%%ddp --cpus 2 --out x\nimport time\nheld = []\nos.register_at_fork(before=lambda: time.sleep(0.05))\n"
        "x = 0\nprint('up', flush=True)\ntry:\n    while True:\n        if (pid := os.fork()) == 0:\n"
        "            os._exit(0)\n"
        "        os.waitpid(pid, 0)\nexcept KeyboardInterrupt:\n    x = 'caught'",
        "[rank 1] up",
        lambda: (time.sleep(0.5), kernel.interrupt()),
    )
    assert reply.status == "ok", reply.text + reply.traceback
    assert kernel.get("x") == "caught"
    assert "Exception ignored" not in reply.text


def test_interrupted_training_that_is_caught_brings_its_model_back(kernel: Kernel) -> None:
    kernel.ok("import torch\nfrom torch.utils.data import DataLoader")
    for _ in range(3):
        reply = kernel.run_and_after(
            "%%ddp --cpus 2 --out steps\nsteps = 0\ntry:\n    while True:\n"
            "        for batch in DataLoader(range(8), num_workers=2):\n            steps += 1\n"
            "except KeyboardInterrupt:\n    pass",
            2.5,
            kernel.interrupt,
        )
        assert reply.status == "ok", reply.text + reply.traceback
        assert kernel.get("steps") > 0


# The user's press, while the kernel imports torch to load results; by then its C++ part is there. Then it takes as
# long as the test says.
PRESSES = """
import os, signal, sys, time
class Presses:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.storage":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
            while not os.path.exists({go!r}):
                time.sleep(0.01)
sys.meta_path.insert(0, Presses())
"""


def test_while_the_notebook_imports_torch_for_results(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernel = new_kernel()
    kernel.ok(PRESSES.format(go=str(tmp_path / "go")))
    assert kernel.get("'torch' in sys.modules") is False
    make = "%%ddp --cpus 1 --out x\nimport torch\nx = torch.ones(3)"
    request = kernel.ask(make)
    assert request.wait(20)
    assert request.reply.error == "KeyboardInterrupt", request.reply.traceback
    assert request.reply.message == "interrupted while the results were loaded; nothing was assigned"
    assert kernel.get("['x' in globals(), 'torch.storage' in sys.modules]") == [False, False]
    (tmp_path / "go").touch()
    # torch ends a process that imports it again when it was half imported.
    kernel.ok(make)
    assert kernel.get("x.sum().item()") == 3


def test_while_the_notebook_imports_what_else_results_need(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    (tmp_path / "needed.py").write_text(
        "import os, signal\nif os.environ.get('PRESS') == str(os.getpid()):\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "class Made:\n    pass\ncomplete = True\n"
    )
    kernel = new_kernel()
    kernel.ok(f"import os, sys\nsys.path.insert(0, {str(tmp_path)!r})\nos.environ['PRESS'] = str(os.getpid())")
    reply = kernel.run("%%ddp --cpus 1 --out x\nimport needed\nx = needed.Made()")
    assert reply.error == "KeyboardInterrupt", reply.traceback
    assert kernel.get("['x' in globals(), sys.modules['needed'].complete]") == [False, True]
