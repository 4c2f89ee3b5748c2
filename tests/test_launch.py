"""`nbddp.launch`, in scripts and notebooks, and the start method without fork."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import Kernel

SCRIPT = """
import functools
import nbddp, torch, torch.distributed as dist

SCALE = 10

def work(x, extra=0):
    t = torch.ones(1) * (dist.get_rank() + 1)
    dist.all_reduce(t)
    print("hello from", dist.get_rank())
    return x * SCALE + t + extra

if __name__ == "__main__":
    print([r.tolist() for r in nbddp.launch(work, torch.arange(2.0), cpus=2)])
    print([r.tolist() for r in nbddp.launch(functools.partial(work, extra=1), torch.zeros(1), cpus=2)])
    try:
        nbddp.launch(lambda: 1 / 0, cpus=2)
    except nbddp.RankError as error:
        print(error.rank in (0, 1), error.exception)
    nbddp.launch(lambda: [][1], cpus=1)
"""


def test_in_a_script(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=100)
    lines = run.stdout.splitlines()
    assert sorted(lines[:2]) == ["[rank 0] hello from 0", "[rank 1] hello from 1"]
    assert lines[2] == "[[3.0, 13.0], [3.0, 13.0]]"
    assert lines[5] == "[[4.0], [4.0]]"
    assert lines[6] == "True ZeroDivisionError"
    assert run.returncode == 1
    # Outside IPython, the rank's own traceback comes with the error.
    assert "\nIndexError: list index out of range\n[rank 0]\n" in run.stderr
    assert run.stderr.endswith("rank 0 raised this\n")
    assert "nbddp.launch(lambda: [][1], cpus=1)" in run.stderr


def test_in_a_notebook(kernel: Kernel) -> None:
    kernel.ok("import nbddp, torch\nbase = 5\ndef work(x): return base + x")
    kernel.ok("results = nbddp.launch(work, 2, cpus=2)")
    assert kernel.get("results") == [7, 7]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("nbddp.launch(print, cpus=0)", "OptionError", "a run has at least one rank"),
        ("nbddp.launch(print, cpus=1, env={'A': 1})", "OptionError", "--env A=1: names and values are strings"),
        ("nbddp.launch(__import__('threading').Lock, cpus=1)", "ResultError", "cannot bring back 'return value' ("),
        (
            "nbddp.launch(print, 1, [open('/dev/null', 'w')], cpus=1)",
            "CaptureError",
            "cannot send 'argument 1[0]' (_io.TextIOWrapper) to the ranks: an open file stays with its process. "
            "Open it inside the function",
        ),
        (
            "nbddp.launch((lambda f: lambda: f)(open('/dev/null')), cpus=1)",
            "CaptureError",
            "cannot send 'function <lambda>.<closure>.f' (",
        ),
        (
            "nbddp.launch(print(), cpus=1)",
            "TypeError",
            "fn is None (NoneType), which cannot be called. Pass the function itself and its arguments after it",
        ),
    ],
)
def test_what_cannot_be(kernel: Kernel, call: str, error: str, message: str) -> None:
    kernel.ok("import nbddp")
    reply = kernel.run(call)
    assert reply.error == error
    assert message in reply.message


def test_without_fork_it_is_slower_and_otherwise_the_same(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(env={"NBDDP_START_METHOD": "spawn"})
    kernel.ok("import torch, torch.distributed as dist\nbig = torch.ones(1 << 20)\nclass Net:\n    pass\nx = Net()")
    reply = kernel.ok(
        "%%ddp --cpus 2 --out t,y\nimport os\nt = big.sum()\ndist.all_reduce(t)\ny = x\n"
        "print('rank', rank, t.item(), os.getpid() != os.getpgid(0))\n"
        "!echo child\nt"
    )
    # A process that torchrun starts leads a group of its own.
    assert reply.lines[-2:] == ["[rank 1] child", "[rank 1] rank 1 2097152.0 False"]
    assert reply.value is not None
    assert kernel.get("t.item(), type(y) is Net") == (2097152.0, True)

    reply = kernel.run("%%ddp --cpus 2\nimport time\nif rank == 1:\n    raise ValueError('bad')\ntime.sleep(60)")
    assert reply.failure == "rank 1 of 2 raised ValueError: bad"
    assert "----> 4     raise ValueError('bad')" in reply.traceback
    assert reply.seconds < 15

    reply = kernel.run("%%ddp --cpus 2\nimport os, time\nif rank == 1:\n    os.kill(os.getpid(), 9)\ntime.sleep(60)")
    assert reply.message == "rank 1 of 2 was killed by signal 9 (SIGKILL)"

    reply = kernel.run_and("%%ddp --cpus 2\nimport time\nprint('up')\ntime.sleep(60)", "[rank 1] up", kernel.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert "on line 4 of the cell" in reply.traceback

    reply = kernel.ok(
        "%%ddp --cpus 2 --max-restarts 1\nimport os\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n    raise OSError\nprint('ok')"
    )
    assert {"[rank 0] ok", "[rank 1] ok"} <= set(reply.lines)


def test_a_start_method_that_cannot_be(kernel: Kernel) -> None:
    kernel.ok("import os\nos.environ['NBDDP_START_METHOD'] = 'thread'")
    reply = kernel.run("%%ddp --cpus 1\npass")
    kernel.ok("del os.environ['NBDDP_START_METHOD']")
    assert reply.message == "NBDDP_START_METHOD='thread': it can be 'fork' or 'spawn'"


def test_two_runs_at_once(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import threading, nbddp, time\ndef work(n):\n    import os\n    return n, int(os.environ['RANK'])\n"
        "if __name__ == '__main__':\n    got = {}\n    def one(n): got[n] = nbddp.launch(work, n, cpus=2)\n"
        "    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]\n"
        "    [t.start() for t in threads]\n    [t.join() for t in threads]\n"
        "    print(sorted(got.items()))\n"
    )
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True, timeout=100)
    assert run.stdout.strip() == str([(n, [(n, 0), (n, 1)]) for n in range(4)])


def test_a_forked_child_of_the_notebook_leaves_the_launcher_alone(kernel: Kernel) -> None:
    # What an exit handler does in a child that was forked with multiprocessing.
    kernel.ok(
        "import os, nbddp._function as f\npid = os.fork()\nif pid == 0:\n"
        "    f.client.close()\n    os._exit(0)\n_ = os.waitpid(pid, 0)"
    )
    assert kernel.ok("%%ddp --cpus 1\nprint('fine')").text == "fine\n"
    assert os.path.isdir(kernel.get("__import__('nbddp')._function.client.session.root"))


def test_files_beside_the_notebook_hide_nothing(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    for name in ("queue", "types", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('the wrong one')")
    kernel = new_kernel(load=False)
    kernel.ok(f"import os, torch\nos.chdir({str(tmp_path)!r})\n%load_ext nbddp")
    for method in ("fork", "spawn"):
        reply = kernel.ok(f"%%ddp --cpus 1 --env NBDDP_START_METHOD={method}\nprint('fine')")
        assert reply.text == "fine\n"


def test_a_terminal_shows_a_progress_bar_once(tmp_path: Path) -> None:
    cell = (
        "import time\nfor i in range(6):\n    print(f'\\rstep {i}', end='', flush=True)\n    time.sleep(0.3)\nprint()"
    )
    path = tmp_path / "session.ipy"
    path.write_text(f"%load_ext nbddp\nget_ipython().run_cell_magic('ddp', '--cpus 1', {cell!r})\n")
    run = subprocess.run(
        [sys.executable, "-m", "IPython", str(path)], capture_output=True, text=True, check=True, timeout=100
    )
    assert run.stdout.count("step") == 1
    assert "step 5" in run.stdout
