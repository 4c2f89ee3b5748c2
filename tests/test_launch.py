"""`nbddp.launch`, in scripts and notebooks, and the start method without fork."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nbddp
from nbddp import RunOptions
from nbddp._keywords import OptionKeywords
from nbddp._option_line import option_names
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
        (
            "nbddp.launch(some_task(), cpus=1)",
            "TypeError",
            "(coroutine), which cannot be called. Pass the function its",
        ),
        ("nbddp.launch('ls', cpus=1)", "TypeError", "A command is no function: lambda: subprocess.run([...])"),
        ("nbddp.launch(numbers, cpus=1)", "TypeError", "a generator function: to call it runs"),
        (
            "nbddp.launch(functools.partial(numbers), cpus=1)",
            "TypeError",
            "a generator function: to call it runs nothing",
        ),
        ("nbddp.launch(print, gpu=2)", "OptionError", "gpu: there is no such option; did you mean gpus?"),
        ("nbddp.launch(print, nprocs=2)", "OptionError", "nprocs: there is no such option; did you mean gpus?"),
        ("nbddp.launch(print, num_machines=2)", "OptionError", "did you mean nnodes?"),
        (
            "nbddp.launch(print, zzzz=2)",
            "OptionError",
            "zzzz: there is no such option. help(nbddp.RunOptions)",
        ),
        ("nbddp.launch(print, args=(1,), cpus=1)", "OptionError", "the function's arguments stand behind it"),
        (
            "nbddp.launch(print, sep=1, cpus=1)",
            "OptionError",
            "the function's own keyword arguments go into kwargs={'sep': ...}",
        ),
        ("nbddp.launch(print, cpus='2')", "OptionError", "--cpus '2': a whole number, as in cpus=2"),
        ("nbddp.launch(print, cpus=True)", "OptionError", "--cpus True: a whole number, as in cpus=2"),
        (
            "nbddp.launch(print, cpus=1, ranks=0)",
            "OptionError",
            "--ranks 0: a list of whole numbers, as in ranks=",
        ),
        ("nbddp.launch(print, cpus=1, timeout='5')", "OptionError", "--timeout '5': a number of seconds above 0"),
        ("nbddp.launch(print, cpus=1, out='x')", "OptionError", "out: that is for cells; launch returns what the fun"),
        ("nbddp.launch(print, options={'cpus': 1})", "OptionError", "that is no nbddp.RunOptions, as in RunOptions("),
        (
            "nbddp.launch(print, options=nbddp.RunOptions(cpus=1, out=['x']))",
            "OptionError",
            "out, gather and bg are for",
        ),
        ("nbddp.RunOptions(cpus=1, gpus=1)", "OptionError", "give one of them"),
        (
            "nbddp.launch(again, cpus=1)",
            "LaunchError",
            "nbddp.launch: this process is rank 0 of a run, or was",
        ),
    ],
)
def test_what_cannot_be(kernel: Kernel, call: str, error: str, message: str) -> None:
    kernel.ok(
        "import nbddp, functools\nasync def some_task(): pass\ndef numbers(): yield 1\n"
        "def again(): return nbddp.launch(print, cpus=1)"
    )
    reply = kernel.run(call)
    assert reply.error == error
    assert message in reply.message
    # Nothing of nbddp's own inside.
    assert "_function.py" not in reply.traceback
    assert "_options.py" not in reply.traceback


def test_whatever_can_be_called(kernel: Kernel) -> None:
    kernel.ok(
        "import asyncio, functools, nbddp\n"
        "class Model:\n    def __init__(self, size=1):\n        self.size = size\n"
        "    def bigger(self, by, *, gpus=0):\n        return self.size + by + gpus\n"
        "    async def __call__(self, by):\n        await asyncio.sleep(0)\n        return self.size * by\n"
        "async def later(x):\n    await asyncio.sleep(0.01)\n    return x + 1\n"
        "def on(fn, *args, **options):\n    return nbddp.launch(fn, *args, cpus=1, **options)[0]"
    )
    assert kernel.get("on(lambda: 'lambda'), on(len, [1, 2]), on(Model, 3).size") == ("lambda", 2, 3)
    assert kernel.get("on(Model(3).bigger, 4), on(functools.partial(Model(3).bigger, gpus=5), 4)") == (7, 12)
    # Of a coroutine function the result is awaited.
    assert kernel.get("on(later, 1), on(functools.partial(later, 2)), on(Model(3), 4)") == (2, 3, 12)
    # The function's own names cannot be taken for options, whatever they are.
    assert kernel.get("on(Model(3).bigger, 1, kwargs={'gpus': 100})") == 104
    assert kernel.get("on(lambda **given: sorted(given), kwargs={'class': 1, 'options': 2, 'fn': 3})") == [
        "class",
        "fn",
        "options",
    ]
    assert kernel.get("on(dict, kwargs={'a b': 1})") == {"a b": 1}


def test_options_whole_and_by_keyword(kernel: Kernel, tmp_path: Path) -> None:
    kernel.ok(
        "import nbddp, os, torch.distributed as dist\n"
        "def who():\n    return dist.get_world_size(), os.environ.get('MODE')\n"
        "options = nbddp.RunOptions(cpus=2, env={'MODE': 'a'})"
    )
    assert kernel.get("nbddp.launch(who, options=options)") == [(2, "a"), (2, "a")]
    # One that is given by keyword wins, also over another that says the same in another way.
    assert kernel.get("nbddp.launch(who, options=options, cpus=1)") == [(1, "a")]
    kernel.ok("other = nbddp.launch(who, options=options, gpus=1, env={})")
    assert kernel.get("other") == [(1, None)]
    reply = kernel.ok("shown = nbddp.launch(who, options=options, dry_run=True)")
    assert "torchrun --nnodes 1 --nproc-per-node 2" in reply.text
    assert kernel.get("shown") == []
    path = tmp_path / "kept.py"
    kernel.ok(f"import pathlib\n_ = nbddp.launch(print, 'kept', cpus=1, keep_script=pathlib.Path({str(path)!r}))")
    assert "restore(" in path.read_text()
    reply = kernel.ok("results = nbddp.launch(print, 'seen', cpus=2, ranks=[1], plain=True)")
    assert reply.text == "[rank 1] seen\n"


def test_the_keywords_are_the_fields_of_the_options() -> None:
    fields = {one.name for one in dataclasses.fields(RunOptions)}
    assert fields - set(OptionKeywords.__annotations__) == {"out", "gather", "bg", "auto"}
    shown = inspect.signature(nbddp.launch).parameters
    assert set(OptionKeywords.__annotations__) <= set(shown)
    assert all(shown[name].default == getattr(RunOptions(), name) for name in OptionKeywords.__annotations__)
    # The magic's options are the same.
    assert {name.removeprefix("--").replace("-", "_") for name in option_names()} == (
        fields - {"init", "auto"} | {"no_init", "help"}
    )


def test_debug_stops_at_the_users_call(kernel: Kernel) -> None:
    kernel.ok("import nbddp\ndef outer():\n    mine = 'here'\n    return nbddp.launch(lambda: 1 / 0, cpus=1)")
    kernel.run("outer()")
    reply = kernel.run("%debug\n", stdin=["p mine", "w", "q"])
    assert "'here'" in reply.text
    assert "_function.py" not in reply.text
    assert "_job.py" not in reply.text


def test_the_ranks_traceback_begins_with_the_function(kernel: Kernel) -> None:
    kernel.ok("import nbddp\ndef work():\n    raise ValueError('bad')")
    reply = kernel.run("nbddp.launch(work, cpus=1)")
    assert "raise ValueError('bad')" in reply.traceback
    assert "globals()" not in reply.traceback


ELSEWHERE = """
import asyncio, threading
import nbddp

def rank():
    import torch.distributed as dist
    return dist.get_rank()

async def main():
    return nbddp.launch(rank, cpus=2), await asyncio.to_thread(nbddp.launch, rank, cpus=1)

print(asyncio.run(main()))
thread = threading.Thread(target=lambda: print(nbddp.launch(rank, cpus=2)))
thread.start()
thread.join()
nbddp.launch(rank, gpu=2)
"""


@pytest.mark.parametrize("how", ["python -c", "stdin"])
def test_without_a_file(tmp_path: Path, how: str) -> None:
    # From a task and from threads, too.
    command = [sys.executable, "-c", ELSEWHERE] if how == "python -c" else [sys.executable]
    run = subprocess.run(
        command, input=ELSEWHERE, capture_output=True, text=True, check=False, timeout=100, cwd=tmp_path
    )
    assert run.stdout == "([0, 1], [0])\n[0, 1]\n", run.stderr
    assert run.returncode == 1
    # The user's line, the call, and what was wrong.
    assert run.stderr.count("  File ") == 2
    assert "OptionError: gpu: there is no such option; did you mean gpus?" in run.stderr.splitlines()[-1]


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
    assert re.search("on line [34] of the cell", reply.traceback)  # it has just printed

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
