"""What a rank raises is raised in the notebook as what it was; and a sentence on what to do about it."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path

import pytest

import nbddp
from nbddp import _advice, _raised
from tests.kernel import Kernel


def raised(kernel: Kernel, cell: str, look: str, *, ranks: int = 1) -> object:
    """Return the value of an expression about `e`, what a cell's ranks raise, caught as Exception in the notebook."""
    kernel.ok("import nbddp")
    kernel.ok(
        f"try:\n    get_ipython().run_cell_magic('ddp', '--cpus {ranks}', {cell!r})\n"
        "except Exception as error:\n    e = error\nelse:\n    e = None"
    )
    return kernel.get(look)


@pytest.mark.parametrize(
    ("statement", "kind", "look", "found"),
    [
        ("raise ValueError('bad', 3)", "ValueError", "str(e), e.args", ("('bad', 3)", ("bad", 3))),
        ("{}['key']", "KeyError", "str(e)", "'key'"),
        ("open('/nowhere/at/all')", "FileNotFoundError", "e.errno, e.filename", (2, "/nowhere/at/all")),
        ("b'\\xff'.decode()", "UnicodeDecodeError", "e.object, e.start, e.encoding", (b"\xff", 0, "utf-8")),
        ("import not_there_at_all", "ModuleNotFoundError", "e.name", "not_there_at_all"),
        ("import math\nmath.not_there", "AttributeError", "str(e)", "module 'math' has no attribute 'not_there'"),
        ("not_defined", "NameError", "str(e)", "name 'not_defined' is not defined"),
        ("import subprocess\nsubprocess.run('false', check=True)", "__import__('subprocess').CalledProcessError",
         "e.returncode, e.cmd", (1, "false")),
        ("import json\njson.loads('{')", "__import__('json').JSONDecodeError", "e.pos, e.doc", (1, "{")),
        ("e = ValueError('x')\ne.add_note('a note')\ne.more = [1]\nraise e", "ValueError",
         "e.more, e.__notes__[0]", ([1], "a note")),
        ("raise TimeoutError", "TimeoutError", "str(e)", ""),
    ],
)  # fmt: skip
def test_an_exception_is_what_it_was(kernel: Kernel, statement: str, kind: str, look: str, found: object) -> None:
    assert raised(kernel, statement, f"isinstance(e, ({kind}))") is True
    assert kernel.get(look) == found
    assert kernel.get(f"type(e).__name__ == {kind}.__name__, isinstance(e, nbddp.RankError), e.rank") == (True, True, 0)
    # It can be pickled, as it could.
    again = "__import__('pickle').loads(__import__('pickle').dumps(e))"
    assert kernel.get(f"isinstance({again}, ({kind})), {again}.rank, str({again}) == str(e)") == (True, 0, True)


def test_an_exception_class_of_the_notebook(kernel: Kernel) -> None:
    kernel.ok(
        "class OutOfData(Exception):\n    def __init__(self, shard, *, left):\n"
        "        super().__init__(f'shard {shard} is empty')\n        self.shard, self.left = shard, left"
    )
    cell = "if rank == 1:\n    raise OutOfData(7, left=0)\nimport time; time.sleep(60)"
    assert raised(kernel, cell, "isinstance(e, OutOfData), e.shard, e.left, e.rank, str(e)", ranks=2) == (
        True, 7, 0, 1, "shard 7 is empty",
    )  # fmt: skip
    reply = kernel.run(f"%%ddp --cpus 2\n{cell}")
    assert reply.error == "OutOfData"
    assert reply.message == "shard 7 is empty"


def test_an_exception_that_cannot_be_sent_keeps_its_type_and_message(kernel: Kernel) -> None:
    cell = "import threading\ne = ValueError('locked')\ne.lock = threading.Lock()\nraise e"
    assert raised(kernel, cell, "isinstance(e, ValueError), str(e), hasattr(e, 'lock')") == (True, "locked", False)


def test_an_exception_whose_message_cannot_be_had(kernel: Kernel) -> None:
    kernel.ok("class Mute(Exception):\n    def __str__(self): raise RuntimeError('no words')")
    reply = kernel.run("%%ddp --cpus 2\nraise Mute")
    assert reply.error == "Mute"
    assert reply.message == "<its __str__ raised RuntimeError>"
    assert "RuntimeError('no words')" in reply.traceback
    assert "raised this" in reply.traceback


def test_exceptions_that_ipython_shows_its_own_way_are_still_explained(kernel: Kernel) -> None:
    for cell, kind in (
        ("exec('x = = 2')", "SyntaxError"),
        ("%lsmagic_not", "UsageError"),
        ("%timeit -n", "UsageError"),
    ):
        reply = kernel.run(f"%%ddp --cpus 1\n{cell}")
        if reply.status == "ok":  # IPython only prints that there is no such magic
            assert "not found" in reply.text
            continue
        assert reply.error == "RankError"
        assert kind in reply.message


def test_classes_that_are_made_in_ways_of_their_own(kernel: Kernel) -> None:
    kernel.ok(
        "import dataclasses\nknown = {}\n"
        "class Base(Exception):\n    def __init_subclass__(cls):\n        known[cls.__name__] = cls\n"
        "class Child(Base): pass\n"
        "@dataclasses.dataclass(frozen=True)\nclass Frozen(Exception):\n    code: int\n"
        "class NotFound(KeyError, AttributeError): pass\n"
        "class Made(Exception):\n    def __new__(cls, a, *, b): return super().__new__(cls, a)\n"
        "    def __init__(self, a, *, b): self.b = b\n"
        "class Final(Exception):\n    def __init_subclass__(cls): raise TypeError('final')\n"
        "class Odd(Exception):\n    @property\n    def args(self): raise RuntimeError('no args')\n"
        "class Stubborn(Exception):\n    def __setattr__(self, *_): raise RuntimeError('frozen')"
    )
    assert raised(kernel, "raise Child('c')", "isinstance(e, Child), known['Child'] is Child, str(e)") == (
        True,
        True,
        "c",
    )
    assert raised(kernel, "raise Frozen(7)", "isinstance(e, Frozen), e.code") == (True, 7)
    assert raised(kernel, "raise NotFound('k')", "isinstance(e, NotFound), isinstance(e, KeyError)") == (True, True)
    assert raised(kernel, "raise Made(1, b=2)", "isinstance(e, Made), e.b, e.rank") == (True, 2, 0)
    assert raised(kernel, "raise Final('f')", "isinstance(e, Final), str(e)") == (True, "f")
    assert raised(kernel, "raise MemoryError", "isinstance(e, MemoryError), e.rank") == (True, 0)
    assert raised(kernel, "raise Odd(1)", "type(e).__name__") == "Odd"
    assert raised(kernel, "raise Stubborn('s')", "isinstance(e, Stubborn), str(e), e.rank") == (True, "s", 0)


def test_what_looks_like_the_loss_of_a_rank_and_is_not(kernel: Kernel) -> None:
    cell = (
        "import time\nif rank == 0:\n    raise ConnectionResetError(104, 'Connection reset by peer')\n"
        "time.sleep(0.05)\nraise RuntimeError('no data from rank 0')"
    )
    assert raised(kernel, cell, "isinstance(e, ConnectionResetError), e.rank, e.errno", ranks=2) == (True, 0, 104)
    assert raised(kernel, "raise BrokenPipeError(32, 'Broken pipe')", "sorted(e.tracebacks)", ranks=4) == [0, 1, 2, 3]


def test_an_os_error_of_a_rank_is_not_taken_for_one_of_the_notebooks(kernel: Kernel) -> None:
    cell = "raise OSError(24, 'Too many open files', '/x/y')"
    assert raised(kernel, cell, "isinstance(e, OSError), e.rank, e.filename") == (True, 0, "/x/y")


def test_an_exception_that_takes_long_to_send_or_to_load(kernel: Kernel) -> None:
    kernel.ok(
        "import os, time\nhere = os.getpid()\nclass Slow:\n    def __init__(self, where): self.where = where\n"
        "    def __reduce__(self):\n        time.sleep(30 if self.where == 'there' else 0)\n        return wake, ()\n"
        "def wake():\n    if os.getpid() == here: time.sleep(30)\n    return 1"
    )
    reply = kernel.run("%%ddp --cpus 2\ne = ValueError('slow')\ne.part = Slow('there')\nraise e")
    assert "ValueError: slow" in reply.traceback
    assert reply.failure == f"rank {reply.message.split()[1]} of 2 raised ValueError: slow"
    assert reply.seconds < 15
    reply = kernel.run_and_after(
        "%%ddp --cpus 2\ne = ValueError('slow')\ne.part = Slow('here')\nraise e", 3, kernel.interrupt
    )
    assert "ValueError: slow" in reply.traceback
    assert reply.seconds < 10


def test_a_message_of_many_megabytes_is_cut(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 1\nraise ValueError('x' * 50_000_000)")
    assert reply.error == "ValueError"
    assert sum(map(len, reply.traceback.splitlines())) < 200_000
    assert reply.seconds < 10


def test_every_ranks_traceback_can_be_had(kernel: Kernel) -> None:
    cell = "def fail():\n    raise ValueError(f'mine {rank}')\nfail()"
    assert raised(kernel, cell, "sorted(e.tracebacks)", ranks=2) == [0, 1]
    for rank in (0, 1):
        text = kernel.get(f"e.tracebacks[{rank}]")
        assert f"ValueError: mine {rank}" in text
        assert "\x1b" not in text
        assert "raise ValueError(f'mine {rank}')" in text
    other = kernel.get("1 - e.rank")
    assert kernel.get("e.others") == {other: f"ValueError: mine {other}"}


def test_a_very_long_traceback_is_cut(kernel: Kernel) -> None:
    kernel.ok("def deep(n):\n    if n == 0:\n        raise ValueError('bottom')\n    deep(n - 1)")
    reply = kernel.run("%%ddp --cpus 1\ndeep(700)")
    assert reply.traceback.count("deep(n - 1)") < 80
    assert "raise ValueError('bottom')" in reply.traceback
    assert "(683 frames in between are not shown)" in reply.traceback
    assert reply.seconds < 10


def test_frames_of_torch_are_folded(kernel: Kernel) -> None:
    kernel.ok(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.linear = torch.nn.Linear(2, 2)\n    def forward(self, x):\n        return self.linear(x)"
    )
    reply = kernel.run("%%ddp --cpus 1\nnet = torch.nn.parallel.DistributedDataParallel(Net())\nnet(torch.ones(1, 3))")
    assert reply.error == "RuntimeError"
    assert "----> 3 net(torch.ones(1, 3))" in reply.traceback
    assert "return self.linear(x)" in reply.traceback
    assert "skipping hidden" in reply.traceback
    assert "_wrapped_call_impl" not in reply.traceback
    # Where it was raised is shown.
    assert "F.linear(input, self.weight, self.bias)" in reply.traceback


def test_a_keyboard_interrupt_that_the_cell_raises(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 2\nimport time\nif rank == 1:\n    raise KeyboardInterrupt\ntime.sleep(60)")
    assert reply.error == "RankError"
    assert reply.message == "rank 1 of 2 was interrupted, but not by this notebook"
    assert "line 4" in reply.traceback


def test_debug_says_that_the_rank_is_gone(kernel: Kernel) -> None:
    kernel.run("%%ddp --cpus 1\n1 / 0")
    reply = kernel.run("%debug\n", stdin=["q"])
    assert "The rank has ended, its variables with it: print them in the cell" in reply.text


def test_a_breakpoint_in_a_rank(kernel: Kernel) -> None:
    for statement in ("breakpoint()", "import pdb; pdb.set_trace()"):
        reply = kernel.run(f"%%ddp --cpus 1\n{statement}\nprint('after')")
        assert reply.message.startswith("a debugger in a rank has nobody to ask. Print in the cell")


# What to do about it.


def test_advice_on_parameters_without_a_gradient(kernel: Kernel) -> None:
    kernel.ok(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)\n"
        "    def forward(self, x):\n        return self.a(x)"
    )
    reply = kernel.run(
        "%%ddp --cpus 2\nnet = torch.nn.parallel.DistributedDataParallel(Net())\n"
        "for _ in range(2):\n    net(torch.ones(1, 1)).sum().backward()"
    )
    assert "find_unused_parameters=True) looks for such parameters" in reply.traceback


def test_advice_on_different_numbers_of_batches(kernel: Kernel) -> None:
    kernel.ok("import torch, torch.distributed as dist")
    reply = kernel.run("%%ddp --cpus 2\nfor batch in range(3 + rank):\n    dist.all_reduce(torch.ones(1))")
    assert (
        "It waited for rank 0, which had finished: every rank must call the same collectives, as often."
        in reply.traceback
    )
    assert "drop_last=True" in reply.traceback


def test_the_rank_that_waits_for_one_that_has_finished_says_so_every_time(kernel: Kernel) -> None:
    kernel.ok("import torch, torch.distributed as dist\nfrom torch.nn.parallel import DistributedDataParallel as DDP")
    for _ in range(3):
        reply = kernel.run(
            "%%ddp --cpus 2\nmodel = DDP(torch.nn.Linear(2, 2))\nfor _ in range(10 if rank == 0 else 7):\n"
            "    model(torch.randn(4, 2)).sum().backward()"
        )
        assert reply.error == "RuntimeError"
        assert "It waited for rank 1, which had finished: every rank must call the same" in reply.traceback
        assert "----> 4     model(torch.randn(4, 2)).sum().backward()" in reply.traceback


def test_advice_on_an_address_in_use(kernel: Kernel) -> None:
    kernel.ok("import torch.distributed as dist")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        reply = kernel.run(f"%%ddp --cpus 1\ndist.TCPStore('127.0.0.1', {port}, is_master=True)")
    assert "nbddp gives every run a free one" in reply.traceback


def test_advice_on_devices(kernel: Kernel) -> None:
    kernel.ok("import torch")
    reply = kernel.run("%%ddp --cpus 1\ntorch.nn.Linear(2, 2, device='meta')(torch.ones(2))")
    assert "In a rank, `device` is the rank's own" in reply.traceback


def test_advice_on_a_backend_that_there_is_not(kernel: Kernel) -> None:
    # One that stands on the line is refused before; see test_options.
    reply = kernel.run(
        "%%ddp --cpus 1 --no-init\nimport torch.distributed as dist\n"
        "dist.init_process_group('mpi', rank=0, world_size=1)"
    )
    assert "without --backend, nbddp takes nccl on GPUs and gloo on the CPU" in reply.traceback


def test_advice_on_a_module_that_starts_processes(kernel: Kernel, tmp_path: Path) -> None:
    (tmp_path / "unguarded.py").write_text(
        "import multiprocessing\nprocess = multiprocessing.get_context('spawn').Process(target=print)\n"
        "process.start()\nprocess.join()\n"
    )
    kernel.ok(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})")
    reply = kernel.run("%%ddp --cpus 1\nimport runpy, subprocess, sys\n"
        f"done = subprocess.run([sys.executable, {str(tmp_path / 'unguarded.py')!r}], capture_output=True, text=True)\n"
        "raise RuntimeError(done.stderr)")  # fmt: skip
    assert "belongs under if __name__ == '__main__'" in reply.traceback


def test_advice_is_given_only_where_it_fits() -> None:
    assert _advice.on_exception("ValueError", "bad") is None
    # As torch and NCCL word them on machines with GPUs.
    assert "torch.cuda.empty_cache()" in str(_advice.on_exception("OutOfMemoryError", "CUDA out of memory. Tried to"))
    text = "Last error:\nError while creating shared memory segment /dev/shm/nccl-x (size 7340384)"
    assert "--shm-size" in str(_advice.on_exception("DistBackendError", text))


def test_errors_of_ranks_can_be_pickled_here() -> None:
    kind = _raised.class_of(OSError)
    assert kind is _raised.class_of(OSError)
    assert issubclass(kind, nbddp.RankError)
    assert issubclass(kind, OSError)
    error = nbddp.RankError("m", rank=1, tracebacks={1: "t"})
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.rank, copy.tracebacks) == (1, {1: "t"})
