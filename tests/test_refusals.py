"""What cannot go to the ranks or come back: who is at fault, why, and what to do instead."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel import Kernel

# Each case: the notebook; the path that is named; its type; the reason; the advice.
REFUSED: dict[str, tuple[str, str, str, str, str]] = {
    "an open file": (
        "x = {'log': open('/dev/null', 'w')}",
        "x['log']",
        "_io.TextIOWrapper",
        "an open file stays with its process",
        "Open it inside the cell",
    ),
    "an open file for reading": ("x = open('/dev/null', 'rb')", "x", "_io.BufferedReader", "an open file", "Open it"),
    "a generator": (
        "x = (i for i in range(3))",
        "x",
        "generator",
        "what a generator has yet to do cannot be copied",
        "Make it inside the cell, or send a list",
    ),
    "a coroutine": ("async def f(): ...\nx = [f()]", "x[0]", "coroutine", "a coroutine", "Call it inside the cell"),
    "a lock": ("import threading\nclass C: pass\nx = C()\nx.lock = threading.RLock()", "x.lock", "_thread.RLock", "", ""),
    "a socket": ("import socket\nx = socket.socket()", "x", "socket.socket", "cannot pickle 'socket'", "Make it inside"),
    "a thread": ("import threading\nx = threading.Thread()", "x", "threading.Thread", "a thread runs in its process", "Start it inside the cell"),
    "an iterator over a loader": (
        "import torch\nx = [iter(torch.utils.data.DataLoader([1, 2]))]",
        "x[0]",
        "torch.utils.data.dataloader._SingleProcessDataLoaderIter",
        "an iterator over a DataLoader has workers and a position of its own",
        "Send the DataLoader, and call iter() inside the cell",
    ),
    "a process group": (
        "import torch.distributed as dist\nx = dist.ProcessGroup(0, 1)",
        "x",
        "torch.distributed.distributed_c10d.ProcessGroup",
        "a process group is a set of connections between processes",
        "Ranks have one already; make others inside the cell, with torch.distributed.new_group()",
    ),
    "a weak reference with a callback": (
        "import weakref\nclass C: pass\nc = C()\nx = weakref.ref(c, print)",
        "x",
        "weakref.ReferenceType",
        "what a weak reference calls is this process's",
        "Make it",
    ),
    "one whose reduce raises": (
        "class C:\n    def __reduce__(self): raise OSError('no such cluster')\nx = (1, C())",
        "x[1]",
        "C",
        "OSError: no such cluster",
        "Make it inside the cell",
    ),
    "one whose state raises": (
        "class C:\n    def __getstate__(self): raise KeyError('k')\nx = C()",
        "x",
        "C",
        "KeyError: 'k'",
        "Make it inside the cell",
    ),
    "one without end": (
        "class C:\n    def __reduce__(self): return C, (C(),)\nx = C()",
        "x",
        "C",
        "it is nested too deeply, or without end",
        "Make it inside the cell",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_launch(kernel: Kernel, case: str) -> None:
    notebook, path, kind, reason, advice = REFUSED[case]
    kernel.ok(f"import warnings\nwarnings.simplefilter('ignore')\n{notebook}\nbefore = x")
    reply = kernel.run("%%ddp --cpus 2\npass\nprint(x)")
    assert reply.error == "CaptureError"
    assert reply.message.startswith(
        f"cannot send '{path}' ({kind}), used on line 3 of the cell, to the ranks: {reason}"
    )
    assert advice in reply.message
    assert reply.seconds < 4
    assert kernel.get("x is before") is True


def test_the_notebooks_own_streams_are_the_ranks_own(kernel: Kernel) -> None:
    kernel.ok("import sys\nout = sys.stdout\ndef log(text, to=sys.stdout): print(text, file=to)")
    assert kernel.ok("%%ddp --cpus 1\nlog('hello', out)\nlog('you')").lines == ["hello", "you"]


def test_an_object_that_only_the_rank_cannot_build(kernel: Kernel) -> None:
    kernel.ok(
        "import os\nhere = os.getpid()\nclass Fussy:\n    def __init__(self): self.pid = os.getpid()\n"
        "    def __setstate__(self, state):\n        raise RuntimeError(f'not made for this place')\n"
        "first, fussy, last = 1, [Fussy()], 2"
    )
    reply = kernel.run("%%ddp --cpus 2\nprint(first, fussy, last)")
    assert reply.error == "RankError"
    assert "could not load 'fussy', which the cell uses: RuntimeError: not made for this place" in reply.message
    assert "in __setstate__" in reply.traceback
    assert "_pickling.py" not in reply.traceback


def test_a_cell_that_is_rebound_while_it_is_captured(kernel: Kernel) -> None:
    kernel.ok(
        "import threading, time\nclass Slow:\n    def __reduce__(self):\n        time.sleep(0.5)\n        return list, ()\n"
        "slow, value = Slow(), 'old'\n"
        "def rebind():\n    time.sleep(0.2)\n    globals()['value'] = 'new'\nthread = threading.Thread(target=rebind)\n"
    )
    reply = kernel.ok("get_ipython().run_line_magic('config', 'DDPMagics.grace = 5'); thread.start()")
    reply = kernel.ok("%%ddp --cpus 1\nprint(value, slow)")
    assert reply.text == "old []\n"
    assert kernel.get("value") == "new"
    kernel.ok("thread.join()")


def test_an_object_that_is_pickled_differently_each_time(kernel: Kernel) -> None:
    kernel.ok(
        "import itertools\ncount = itertools.count()\nclass Moody:\n    def __reduce__(self):\n"
        "        if next(count) % 2 == 0: raise ValueError('not now')\n        return list, ()\nmoody = Moody()"
    )
    reply = kernel.run("%%ddp --cpus 1\nprint(moody)")
    assert reply.error == "CaptureError"
    assert "not now" in reply.message


def test_memory_that_runs_out_while_capturing(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok("%%ddp --cpus 1\npass")
    kernel.ok(
        "class Greedy:\n    def __reduce__(self): return bytes, (b'x' * (1 << 36),)\nfine, greedy = 1, Greedy()\n"
        "import resource\nlimits = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 34, limits[1]))"
    )
    reply = kernel.run("%%ddp --cpus 1\nprint(fine, greedy)")
    kernel.ok("resource.setrlimit(resource.RLIMIT_AS, limits)")
    assert reply.error == "CaptureError"
    assert "cannot send 'greedy' (Greedy), used on line 2 of the cell, to the ranks: there is not enough memory" in (
        reply.message
    )
    assert kernel.ok("%%ddp --cpus 1\nprint(fine)").text == "1\n"


@pytest.fixture
def small_shm() -> Iterator[None]:
    """A /dev/shm as containers have it."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=70m,mode=1777", "none", "/dev/shm"],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a small /dev/shm; mounting one takes root: {mounted.stderr.strip()}")
    yield
    subprocess.run(["umount", "--lazy", "/dev/shm"], check=True)


def test_a_small_dev_shm(new_kernel: Callable[..., Kernel], small_shm: None) -> None:
    kernel = new_kernel()
    kernel.ok("import torch\nx = torch.ones(8 << 20)")
    # 32 MB beside a reserve of 64: on disk. And back, from each rank.
    kernel.ok("%%ddp --cpus 2 --gather y\ny = x + rank")
    assert kernel.get("[t[7].item() for t in y]") == [1.0, 2.0]
    assert list(Path("/dev/shm").glob("nbddp-*/run-*")) == []
    kernel.close()


def test_results_that_find_no_room(new_kernel: Callable[..., Kernel], small_disk: Path, small_shm: None) -> None:
    kernel = new_kernel(load=False)
    kernel.ok(f"import tempfile, torch\ntempfile.tempdir = {str(small_disk)!r}\nx, y = 'old', 'old'")
    kernel.ok("%load_ext nbddp")
    reply = kernel.run("%%ddp --cpus 1 --out x,y\nx, y = torch.ones(2 << 20), 5")
    assert reply.error == "ResultError"
    assert "cannot bring back x, y: no room for 8.4 MB of data" in reply.message
    assert kernel.get("x, y") == ("old", "old")
    kernel.close()


def test_a_rank_that_dies_while_it_writes_results(kernel: Kernel) -> None:
    kernel.ok("x = 'old'")
    reply = kernel.run(
        "%%ddp --cpus 2 --out x\nimport os\nclass Deadly:\n    def __reduce__(self): os.kill(os.getpid(), 9)\nx = Deadly()"
    )
    assert reply.message == "rank 0 of 2 was killed by signal 9 (SIGKILL)"
    assert kernel.get("x") == "old"
