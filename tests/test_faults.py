"""Bad cells and dying ranks: one clear message each, nothing lost, nothing left."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from collections.abc import Callable

import IPython
import psutil
import pytest

import nbddp
from tests.kernel import Kernel


def test_a_rank_that_raises_fails_the_cell(kernel: Kernel) -> None:
    kernel.ok("import torch.distributed as dist")
    reply = kernel.run("%%ddp --cpus 3\nx = 1\nif rank == 1:\n    raise ValueError('bad shape')\ndist.barrier()")
    assert reply.error == "ValueError"
    assert reply.message == "bad shape"
    assert reply.failure == "rank 1 of 3 raised ValueError: bad shape"
    assert "----> 4     raise ValueError('bad shape')" in reply.traceback
    assert "[rank 1]" in reply.traceback
    assert "_magic.py" not in reply.traceback
    assert "_rank.py" not in reply.traceback
    # The others could only wait; how they ended is folded into one line at the end.
    assert reply.traceback.splitlines()[-1].startswith("rank")
    assert reply.seconds < 5


def test_the_first_failure_is_the_cause(kernel: Kernel) -> None:
    kernel.ok("import time")
    reply = kernel.run("%%ddp --cpus 2\ntime.sleep(0.05 * (1 - rank))\nraise RuntimeError(f'mine {rank}')")
    assert reply.failure == "rank 1 of 2 raised RuntimeError: mine 1"
    assert "rank 0: RuntimeError: mine 0" in reply.traceback


def test_the_same_failure_everywhere_is_told_once(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 4\n1 / 0")
    assert reply.error == "ZeroDivisionError"
    assert reply.traceback.count("ZeroDivisionError: division by zero") == 1
    assert ": the same" in reply.traceback


def test_an_exception_in_a_notebook_function_shows_its_source(kernel: Kernel) -> None:
    kernel.ok("def helper(n):\n    # a comment\n    return [][n]")
    reply = kernel.run("%%ddp --cpus 1\nhelper(3)")
    assert "----> 3     return [][n]" in reply.traceback
    assert "In[" in reply.traceback
    if IPython.version_info >= (8,):  # before that, IPython itself shows the file names of cells
        assert reply.traceback.count("Cell In[") >= 2
        assert "/tmp" not in reply.traceback
    assert "----> 2 helper(3)" in reply.traceback


def test_a_syntax_error_is_found_before_launch(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 2\nx = 1\ny = = 2")
    assert reply.error == "SyntaxError"
    assert "line 3" in reply.message
    assert "y = = 2" in reply.traceback
    assert reply.seconds < 0.5


def test_sys_exit_with_a_status(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 2\nimport sys, time\nif rank == 1:\n    sys.exit(3)\ntime.sleep(60)")
    assert reply.error == "RankError"
    assert reply.message == "rank 1 of 2 exited with status 3 (sys.exit)"
    assert "rank 0: stopped" in reply.traceback
    assert reply.seconds < 10


def test_sys_exit_without_one_is_an_early_end(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 2 --out x\nimport sys\nx = 5\nprint('before')\nsys.exit()\nprint('after')")
    assert reply.lines == ["[rank 0] before", "[rank 1] before"]
    assert kernel.get("x") == 5


def test_one_rank_ends_while_another_waits_for_it(kernel: Kernel) -> None:
    kernel.ok(
        "import torch, torch.distributed as dist\nfrom torch.nn.parallel import DistributedDataParallel as DDP\n"
        "model = torch.nn.Linear(2, 2)"
    )
    body = "ddp = DDP(model)\nif rank == 1:\n    {}\ndist.all_reduce(torch.ones(1))"
    reply = kernel.run("%%ddp --cpus 2\nimport sys\n" + body.format("sys.exit()"))
    assert reply.failure.startswith("rank 0 of 2 raised RuntimeError")
    assert "It waited for rank 1, which had finished" in reply.traceback
    reply = kernel.run("%%ddp --cpus 3\n" + body.format("raise ValueError('no data')"))
    assert reply.failure == "rank 1 of 3 raised ValueError: no data"
    assert "ranks 0, 2: stopped" in reply.traceback


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by signal 9 (SIGKILL)"),
        ("os.kill(os.getpid(), 15)", "was killed by signal 15 (SIGTERM)"),
        ("import ctypes; ctypes.string_at(0)", "was killed by signal 11 (SIGSEGV)"),
        ("os.abort()", "was killed by signal 6 (SIGABRT)"),
        ("os._exit(7)", "left the process with status 7 before the end of the cell"),
    ],
)
def test_a_rank_that_dies(kernel: Kernel, code: str, how: str) -> None:
    reply = kernel.run(f"%%ddp --cpus 2\nimport os, time\nif rank == 1:\n    {code}\ntime.sleep(60)")
    assert reply.error == "RankError"
    assert reply.message == f"rank 1 of 2 {how}"
    assert "rank 0: stopped" in reply.traceback
    assert reply.seconds < 8
    if "SEGV" in how or "ABRT" in how:
        assert re.search(r"rank 1: .*on line 4 of the cell: \S+", reply.traceback)


def test_a_rank_that_dies_while_torchrun_is_too_slow_to_say_how(kernel: Kernel) -> None:
    # As on a machine that is too busy: torchrun gets nowhere, and its agent is killed in the end.
    reply = kernel.run(
        "%%ddp --cpus 2\nimport os, signal, time\nif rank == 1:\n    os.kill(os.getppid(), signal.SIGSTOP)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    )
    assert reply.error == "RankError"
    # How it died is read from the system, as long as its parent has not taken note of it.
    assert reply.message == "rank 1 of 2 was killed by signal 9 (SIGKILL)"
    assert reply.seconds < 12


def test_a_rank_that_leaves_quietly(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 2\nimport os, time\nif rank == 1:\n    os._exit(0)\ntime.sleep(60)")
    assert reply.error == "RankError"
    assert "rank 1 of 2 left" in reply.message
    assert "before the end of the cell" in reply.message
    assert reply.seconds < 10


def test_a_rank_that_ignores_sigterm_does_not_hold_up_the_failure(kernel: Kernel) -> None:
    reply = kernel.run(
        "%%ddp --cpus 2\nimport signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if rank == 1:\n    time.sleep(0.2); raise KeyError('x')\ntime.sleep(60)"
    )
    assert reply.failure == "rank 1 of 2 raised KeyError: 'x'"
    assert reply.seconds < 6


def test_output_before_a_death_is_not_lost(kernel: Kernel) -> None:
    reply = kernel.run(
        "%%ddp --cpus 1\nimport os\nprint('last', 'words', end='')\n"
        "import sys; sys.stdout.flush()\nos.kill(os.getpid(), 9)"
    )
    assert reply.text == "last words\n"


def test_a_timeout_says_where_the_ranks_were(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 2 --timeout 1\nimport time\ndef wait():\n    time.sleep(60)\nwait()")
    assert reply.error == "RunTimeout"
    assert reply.message == "the run was stopped after --timeout 1 seconds"
    assert "ranks 0-1: in wait on line 4 of the cell: time.sleep(60) (called on line 5 of the cell)" in reply.traceback
    assert 1 <= reply.seconds < 4
    assert kernel.get("issubclass(__import__('nbddp').RunTimeout, TimeoutError)") is True


def test_restarts(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2 --max-restarts 2 --out attempt\nimport os\n"
        "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "if attempt < 2 and rank == 1:\n    raise OSError('flaky')\nprint('attempt', attempt)"
    )
    assert "nbddp: rank 1 failed (OSError: flaky); restart 1 of 2" in reply.text
    assert "nbddp: rank 1 failed (OSError: flaky); restart 2 of 2" in reply.text
    assert "[rank 0] attempt 2" in reply.text
    assert kernel.get("attempt") == 2


def test_restarts_after_a_death_run_out(kernel: Kernel) -> None:
    reply = kernel.run(
        "%%ddp --cpus 2 --max-restarts 1\nimport os, time\nif rank == 0:\n    os.kill(os.getpid(), 9)\ntime.sleep(60)"
    )
    assert reply.message == "rank 0 of 2 was killed by signal 9 (SIGKILL)"
    assert "restart 1 of 1" in reply.text


def test_a_child_of_a_rank_does_not_outlive_the_run(kernel: Kernel) -> None:
    kernel.ok(
        "%%ddp --cpus 1\nimport subprocess, os\n"
        "subprocess.Popen(['sleep', '1000'])\n"
        "subprocess.Popen(['sleep', '1001'], start_new_session=True)\n"
        "if os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(1000)\n"
    )


def test_when_the_prompt_is_back_no_child_of_a_rank_is_left(kernel: Kernel) -> None:
    # It would outlive the launcher, if that were killed now; nobody looks at the launcher between cells.
    kernel.ok("%%ddp --cpus 2\nimport subprocess\nsubprocess.Popen(['sleep', '1002'], start_new_session=True)")
    assert [p.name() for p in _session_processes(kernel) if p.name() == "sleep"] == []
    kernel.ok("%%ddp --cpus 1\nimport os\nos.system('setsid sleep 1003 > /dev/null 2>&1 &')")  # the agent's by now
    assert [p.name() for p in _session_processes(kernel) if p.name() == "sleep"] == []


def test_data_loader_workers_of_a_killed_rank_are_gone(kernel: Kernel) -> None:
    kernel.ok(
        "import torch, os\nclass Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 1000\n    def __getitem__(self, i): return i"
    )
    reply = kernel.run(
        "%%ddp --cpus 2\nfor n, batch in enumerate(torch.utils.data.DataLoader(Data(), num_workers=2)):\n"
        "    if rank == 0 and n == 5:\n        os.kill(os.getpid(), 9)"
    )
    assert reply.message == "rank 0 of 2 was killed by signal 9 (SIGKILL)"


def _session_processes(kernel: Kernel) -> list[psutil.Process]:
    return psutil.Process(kernel.pid).children(recursive=True)


HANG = (
    "%%ddp --cpus 2\nimport subprocess, time\nsubprocess.Popen(['sleep', '1000'])\n"
    "subprocess.Popen(['sleep', '1001'], start_new_session=True)\nprint('up', flush=True)\ntime.sleep(1000)"
)


def test_a_killed_kernel_takes_everything_with_it(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.client.execute(HANG)
    deadline = time.monotonic() + 30
    while sum(p.name() == "sleep" for p in _session_processes(kernel)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes = _session_processes(kernel)
    kernel.kill()
    _, alive = psutil.wait_procs(processes, timeout=3)
    assert not alive


@pytest.mark.parametrize("victim", ["launcher", "agent"])
def test_a_killed_helper_ends_the_run_and_the_next_one_works(new_kernel: Callable[..., Kernel], victim: str) -> None:
    kernel = new_kernel()

    def kill() -> None:
        launcher = next(p for p in psutil.Process(kernel.pid).children() if "nbddp" in " ".join(p.cmdline()))
        target = launcher if victim == "launcher" else launcher.children()[0]
        os.kill(target.pid, signal.SIGKILL)

    reply = kernel.run_and(HANG, "up", kill)
    assert reply.error == "RunLostError"
    assert victim in reply.message
    assert kernel.ok("%%ddp --cpus 2\nprint('again')").lines == ["[rank 0] again", "[rank 1] again"]


def test_a_failed_run_assigns_nothing(kernel: Kernel) -> None:
    kernel.ok("x = 'old'")
    kernel.run("%%ddp --cpus 2 --out x\nx = 'new'\nif rank == 1:\n    raise ValueError")
    assert kernel.get("x") == "old"


def test_an_interrupt_after_a_failure_does_not_hide_it(kernel: Kernel) -> None:
    reply = kernel.run_and(
        "%%ddp --cpus 1\nimport atexit, time\natexit.register(time.sleep, 20)\n"
        "print('up', flush=True)\nraise ValueError('the reason')",
        "up",
        lambda: (time.sleep(0.5), kernel.interrupt()),
    )
    assert reply.failure == "rank 0 raised ValueError: the reason"
    assert reply.seconds < 3


def test_a_restart_waits_for_exit_handlers(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 2 --max-restarts 1\nimport atexit, os, time\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n    atexit.register(time.sleep, 6)\n    raise OSError\n"
        "print('ok')"
    )
    assert {"[rank 0] ok", "[rank 1] ok"} <= set(reply.lines)


def test_more_ranks_than_there_are_descriptors(kernel: Kernel) -> None:
    kernel.ok("import resource\nlimits = resource.getrlimit(resource.RLIMIT_NOFILE)")
    kernel.ok("resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))")
    reply = kernel.run("%%ddp --cpus 100\npass")
    kernel.ok("resource.setrlimit(resource.RLIMIT_NOFILE, limits)")
    assert reply.error == "LaunchError"
    assert reply.message.startswith("100 ranks: following them takes 424 more open files, and this process has ")
    assert " of the 400 that it may have. Close some, ask for fewer ranks, or raise the limit (ulimit -n)" in (
        reply.message
    )
    kernel.ok("%%ddp --cpus 1\npass")


def test_errors_can_be_pickled() -> None:
    errors = [
        nbddp.RankError("m", rank=2, exception="ValueError", others={0: "stopped"}, details=("d",), notes=("n",)),
        nbddp.CaptureError("m", name="x", path="x.y", lines=(1,)),
        nbddp.LaunchError("m", notes=("n",)),
        nbddp.RunLostError("m"),
        nbddp.RunTimeout("m"),
        nbddp.ResultError("m"),
    ]
    for error in errors:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert copy.args == error.args
        assert vars(copy) == vars(error)
