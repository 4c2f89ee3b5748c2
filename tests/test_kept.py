"""Ranks that stay between cells: `%%ddp --keep`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.kernel import LINKS, Kernel
from tests.test_endurance import CELLS
from tests.test_machine import in_mounts

KEEP = "%%ddp --keep --cpus 2\n"


@pytest.fixture
def ranks(kernel: Kernel) -> Iterator[Kernel]:
    """The shared kernel, in which a test may keep ranks; they end with it."""
    yield kernel
    if kernel.alive():
        kernel.ok("%ddp auto off\n%ddp stop")


def pids(kernel: Kernel) -> list[int]:
    """Return the processes of the kept ranks."""
    found: list[int] = kernel.get("[s.pid for s in __import__('nbddp')._kept.current().states.values()]")
    return found


def gone(pids: list[int], seconds: float = 2.0) -> bool:
    """Tell whether none of the processes is there after so long."""
    deadline = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(runs, pids))


def runs(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kept(kernel: Kernel) -> bool:
    """Tell whether ranks are kept."""
    there: bool = kernel.get("__import__('nbddp')._kept.current() is not None")
    return there


def test_an_exception_that_lets_nothing_be_set_comes_as_it_is(ranks: Kernel) -> None:
    ranks.ok("class Stubborn(Exception):\n    def __setattr__(self, *_): raise RuntimeError('frozen')")
    assert ranks.run(f"{KEEP}raise Stubborn('s')").error == "Stubborn"
    assert ranks.ok(f"{KEEP}print('on')").lines == ["[rank 0] on", "[rank 1] on"]


@pytest.mark.parametrize("options", ["", ", keep=True"])
def test_a_function_is_called_with_what_it_is_given_each_time(ranks: Kernel, options: str) -> None:
    ranks.ok("import nbddp\ndouble, triple = (lambda x: 2 * x), (lambda x: 3 * x)")
    assert ranks.get(f"nbddp.launch(double, 20, cpus=2{options})") == [40, 40]
    assert ranks.get(f"nbddp.launch(double, 5, cpus=2{options})") == [10, 10]
    assert ranks.get(f"nbddp.launch(triple, 5, cpus=2{options})") == [15, 15]


def test_calls_of_functions_and_cells_share_the_ranks(ranks: Kernel) -> None:
    ranks.ok(f"{KEEP}import os\nhere = os.getpid()")
    calls = (
        "import nbddp, os\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    pids = nbddp.launch(os.getpid, keep=True)"
    )
    assert ranks.ok(calls).text == ""
    assert ranks.get("pids") == pids(ranks)
    assert "return value" not in ranks.ok("%ddp status").text
    assert ranks.run("nbddp.launch(os.getpid, keep=True, on=(5,))").message == "--on 5: the kept ranks are 0-1"
    assert ranks.ok("%%ddp --keep\nprint(here == os.getpid())").lines == ["[rank 0] True", "[rank 1] True"]


# What is held.


def test_the_next_cell_goes_on_in_the_same_ranks(ranks: Kernel) -> None:
    ranks.ok("offset = 10")
    ranks.ok(KEEP + "import os\nhere = os.getpid()\nx = rank + offset")
    before = pids(ranks)
    reply = ranks.ok("%%ddp --keep --out x\nassert here == os.getpid()\nx += 1\nprint(x)")
    assert reply.lines == ["[rank 0] 11", "[rank 1] 12"]
    assert ranks.get("x") == 11
    assert pids(ranks) == before
    assert ranks.ok("%ddp stop").text == "nbddp: the kept ranks have ended\n"
    assert gone(before)
    assert ranks.ok("%ddp stop").text == "nbddp: no ranks are kept\n"


def test_what_ranks_hold_wins_until_it_is_pushed(ranks: Kernel) -> None:
    ranks.ok("x = 1\ny = [1]")
    ranks.ok(KEEP + "x += 1 + rank")
    ranks.ok("x = 50")
    reply = ranks.ok("%%ddp --keep\nprint(x, y)")
    assert reply.lines == [
        "[rank 0] 2 [1]",
        "[rank 1] 3 [1]",
        "nbddp: the ranks go on with their own x; %ddp push x sends the notebook's new",
    ]
    # Said once; and of what the ranks have made of it themselves, nothing.
    assert ranks.ok("%%ddp --keep\nprint(x)").lines == ["[rank 0] 2", "[rank 1] 3"]
    ranks.ok("%ddp push x")
    assert ranks.ok("%%ddp --keep\nprint(x)").lines == ["[rank 0] 50", "[rank 1] 50"]


def test_pull(ranks: Kernel) -> None:
    ranks.ok(KEEP + "import torch\nw = torch.full((2,), float(rank))\nif rank:\n    only = 'here'")
    ranks.ok("%ddp pull w")
    assert ranks.get("w.tolist()") == [0.0, 0.0]
    ranks.ok("%ddp pull w only --rank 1")
    assert ranks.get("(w.tolist(), only)") == ([1.0, 1.0], "here")
    reply = ranks.run("%ddp pull only")
    assert reply.error == "LaunchError"
    assert reply.message.startswith("%ddp pull only: rank 0 holds no only; --rank 1 has it. It holds ")
    assert (
        "the kept ranks are 0, 1" in ranks.run("%ddp pull w --rank 2").raw + ranks.run("%ddp pull w --rank 2").message
    )
    assert ranks.ok("%%ddp --keep\nprint(w.sum().item())").lines == ["[rank 0] 0.0", "[rank 1] 2.0"]
    ranks.ok("%ddp stop")
    reply = ranks.run("%ddp pull w")
    assert reply.message == "%ddp pull w: no ranks are kept. A cell with %%ddp --keep starts them"


def test_on_some_ranks_only(ranks: Kernel) -> None:
    assert ranks.ok("%%ddp --keep --cpus 3 --on 0,2\nn = rank\nprint(n)").lines == ["[rank 0] 0", "[rank 2] 2"]
    reply = ranks.run("%%ddp --keep\nprint(n)")
    assert reply.error == "NameError"
    assert "rank 1 of 3 raised this" in reply.traceback
    # Ranks that have no part in a cell do not hold it up, and are there afterwards.
    reply = ranks.run("%%ddp --keep --on 1\nraise ValueError('alone')")
    assert (reply.error, reply.message) == ("ValueError", "alone")
    assert ranks.ok("%%ddp --keep --on 2,0\nprint(n)").lines == ["[rank 0] 0", "[rank 2] 2"]
    assert "--on 3: the kept ranks are 0-2" in ranks.run("%%ddp --keep --on 3\nprint(n)").message
    reply = ranks.ok(
        "%%ddp --keep\nimport torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\nprint(t.item())"
    )
    assert reply.lines == ["[rank 0] 3.0", "[rank 1] 3.0", "[rank 2] 3.0"]


def test_status_says_what_is_kept(ranks: Kernel) -> None:
    assert ranks.ok("%ddp status").text == "nbddp: nothing is running\n"
    ranks.ok(KEEP.replace("--keep", "--keep --idle 500") + "import torch\nw = torch.zeros(3)\nif rank: alone = 1")
    first, zero, one = ranks.ok("%ddp status").text.splitlines()
    assert first.startswith("nbddp: 2 ranks kept since ")
    assert first.endswith(", on the CPU, until there was no cell for 500 s")
    there = pids(ranks)
    assert zero.startswith(f"  rank 0  pid {there[0]}  ")
    assert "MB" in zero
    assert "w (Tensor (3,))" in zero
    assert "alone" not in zero
    assert "alone (int)" in one


def test_other_options_than_theirs_are_refused(ranks: Kernel) -> None:
    ranks.ok(KEEP + "x = 1")
    assert "--keep --cpus 4: 2 ranks are kept, on the CPU" in ranks.run("%%ddp --keep --cpus 4\nprint(x)").message
    reply = ranks.run("%%ddp --keep --gpus 4\nprint(x)")
    assert reply.error == "LaunchError"
    assert reply.message == (
        "--keep --gpus 4: 2 ranks are kept, on the CPU. Without --gpus the cell runs on them; %ddp stop ends them, "
        "with all that they hold"
    )
    assert "--env A=1" in ranks.run("%%ddp --keep --env A=1\nprint(x)").message
    assert "--backend mpi" in ranks.run("%%ddp --keep --backend mpi\nprint(x)").message
    assert ranks.ok("%%ddp --keep --gpus 2\nprint(x)").lines == ["[rank 0] 1", "[rank 1] 1"]


def test_a_plain_cell_beside_them(ranks: Kernel) -> None:
    ranks.ok("x = 'the notebook has this'")
    ranks.ok(KEEP + "x = rank")
    before = pids(ranks)
    assert ranks.ok("%%ddp --cpus 2\nprint(x)").lines == [f"[rank {r}] the notebook has this" for r in (0, 1)]
    assert ranks.ok("%%ddp --keep\nprint(x)").lines == ["[rank 0] 0", "[rank 1] 1"]
    assert pids(ranks) == before


def test_definitions_keep_their_identity(ranks: Kernel) -> None:
    ranks.ok(
        "class Mine(Exception): pass\n"
        "class Box:\n    def __init__(self, n): self.n = n\n"
        "box = Box(1)\ndef scale(n): return n * factor\nfactor = 2"
    )
    ranks.ok(KEEP + "mine = Box(5)\nassert isinstance(box, Box)\nprint(scale(3))")
    # Sent with a later cell, the object is of the class that the ranks have.
    ranks.ok("other = Box(7)")
    reply = ranks.ok(
        "%%ddp --keep --out back\nassert type(other) is type(mine) is Box\nback = Box(rank)\nprint(other.n)"
    )
    assert reply.lines == ["[rank 0] 7", "[rank 1] 7"]
    assert ranks.get("type(back) is Box")
    # A function uses the ranks' own variables.
    ranks.ok("%%ddp --keep\nfactor = 100 + rank")
    assert ranks.ok("%%ddp --keep\nprint(scale(1))").lines == ["[rank 0] 100", "[rank 1] 101"]
    reply = ranks.ok(
        "try:\n    get_ipython().run_cell_magic('ddp', '--keep', 'raise Mine(rank)')\n"
        "except Mine as e:\n    print(type(e).__name__, e.rank)"
    )
    assert "Mine 0\n" in reply.text or "Mine 1\n" in reply.text


def test_what_is_redefined_goes_when_it_is_pushed(ranks: Kernel) -> None:
    ranks.ok("def f(): return 'old'\nclass C:\n    v = 'old'")
    ranks.ok(KEEP + "print(f(), C.v)\nc = C()")
    ranks.ok("def f(): return 'new'\nclass C:\n    v = 'new'")
    reply = ranks.ok("%%ddp --keep\nprint(f(), C.v)")
    assert reply.lines == [
        "[rank 0] old old",
        "[rank 1] old old",
        "nbddp: the ranks go on with their own C, f; %ddp push C f sends the notebook's new",
    ]
    ranks.ok("%ddp push C f")
    assert ranks.ok("%%ddp --keep\nprint(f(), C.v, c.v)").lines == [f"[rank {r}] new new old" for r in (0, 1)]


# Failures.


def test_a_cell_that_fails_ends_nothing(ranks: Kernel) -> None:
    ranks.ok("import torch, torch.distributed as dist\nfrom torch.nn.parallel import DistributedDataParallel as DDP")
    ranks.ok(
        KEEP
        + "torch.manual_seed(0)\nddp = DDP(torch.nn.Linear(4, 1))\nsgd = torch.optim.SGD(ddp.parameters(), lr=0.1)\n"
        "data = torch.utils.data.TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(rank)))\n"
        "loader = torch.utils.data.DataLoader(data, batch_size=4)\n"
        "def step():\n    for x, in loader:\n        sgd.zero_grad()\n        ddp(x).square().sum().backward()\n"
        "        sgd.step()\nstep()"
    )
    before = pids(ranks)
    reply = ranks.run("%%ddp --keep\nif rank == 1:\n    raise ValueError('no data')\ndist.barrier()")
    assert (reply.error, reply.message) == ("ValueError", "no data")
    assert "rank 1 of 2 raised this" in reply.traceback
    assert "nbddp: the 2 ranks stay, with what they hold; their process group was made anew" in reply.text
    assert reply.seconds < 5
    # The other way round, in the middle of a backward pass.
    reply = ranks.run("%%ddp --keep\nif rank == 0:\n    raise KeyError('k')\nstep()")
    assert reply.error == "KeyError"
    reply = ranks.ok(
        "%%ddp --keep --gather weights\nstep()\nweights = ddp.module.weight.detach().clone()\nt = torch.ones(1)\n"
        "dist.all_reduce(t)\nprint(t.item())"
    )
    assert reply.lines == ["[rank 0] 2.0", "[rank 1] 2.0"]
    assert pids(ranks) == before
    assert ranks.get("torch.equal(*weights)"), "gradients are averaged again"


def test_sys_exit_ends_the_cell_and_no_rank(ranks: Kernel) -> None:
    ranks.ok(KEEP + "import sys\nx = 1\nsys.exit()")
    before = pids(ranks)
    reply = ranks.run("%%ddp --keep\nif rank == 1:\n    sys.exit(3)")
    assert reply.message.startswith("rank 1 of 2 exited with status 3")
    assert ranks.ok("%%ddp --keep\nprint(x)").lines == ["[rank 0] 1", "[rank 1] 1"]
    assert pids(ranks) == before


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_that_dies_between_two_cells(ranks: Kernel, signum: signal.Signals) -> None:
    ranks.ok(KEEP + "x = 1")
    before = pids(ranks)
    os.kill(before[1], signum)
    assert gone(before)
    reply = ranks.run("%%ddp --keep\nprint(x)")
    assert reply.error == "RunLostError"
    assert reply.message.startswith(f"rank 1 was killed by signal {int(signum)} ({signum.name}) between two cells")
    assert ranks.ok(KEEP + "x = 2\nprint(x)").lines == ["[rank 0] 2", "[rank 1] 2"]


def test_a_rank_that_dies_in_a_cell(ranks: Kernel) -> None:
    ranks.ok(KEEP + "import os, signal, torch.distributed as dist")
    before = pids(ranks)
    reply = ranks.run("%%ddp --keep\nif rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ndist.barrier()")
    assert reply.message.startswith("rank 1 of 2 was killed by signal 9 (SIGKILL)")
    assert "nbddp: the kept ranks are gone, and what they held with them" in reply.text
    assert gone(before)
    assert not kept(ranks)
    assert ranks.ok(KEEP + "print(1)").lines == ["[rank 0] 1", "[rank 1] 1"]


def test_a_stopped_rank_is_ended_by_an_interrupt(ranks: Kernel) -> None:
    ranks.ok(KEEP + "x = 1")
    before = pids(ranks)
    os.kill(before[1], signal.SIGSTOP)
    ranks.ok("%config DDPMagics.grace = 1")
    reply = ranks.run_and_after("%%ddp --keep\nprint(x)", 1.0, ranks.interrupt)
    ranks.ok("%config DDPMagics.grace = 5")
    assert reply.error == "KeyboardInterrupt"
    assert "rank 1: no answer: it is stopped, or the machine is very busy" in reply.traceback
    assert "nbddp: the kept ranks are gone, and what they held with them" in reply.text
    assert gone(before)


@pytest.mark.parametrize("who", ["agent", "launcher"])
@pytest.mark.parametrize("when", ["between", "in a cell"])
def test_agent_or_launcher_die(ranks: Kernel, who: str, when: str) -> None:
    ranks.ok(KEEP + "import time\nx = 1")
    before = pids(ranks)
    agent = psutil.Process(before[0]).parent()
    assert agent is not None
    victim = agent if who == "agent" else agent.parent()
    assert victim is not None
    if when == "between":
        victim.kill()
        assert gone(before)
        reply = ranks.run("%%ddp --keep\nprint(x)")
    else:
        reply = ranks.run_and("%%ddp --keep\nprint('up')\ntime.sleep(60)", "[rank 1] up", victim.kill)
    assert reply.error == "RunLostError", reply.traceback
    assert who in reply.message
    assert gone([*before, agent.pid])
    assert not kept(ranks)
    assert ranks.ok(KEEP + "print(1)").lines == ["[rank 0] 1", "[rank 1] 1"]


@pytest.mark.parametrize("how", ["killed", "restarted"])
def test_a_kernel_that_ends_leaves_nothing(new_kernel: Callable[..., Kernel], how: str) -> None:
    kernel = new_kernel()
    kernel.ok(KEEP + "import subprocess\nchild = subprocess.Popen(['sleep', '100'], start_new_session=True)")
    there = [*pids(kernel), *(p.pid for p in psutil.Process(kernel.pid).children(recursive=True))]
    if how == "killed":
        kernel.kill()
    else:
        kernel._manager.shutdown_kernel(now=False)
    assert gone(there)


# Interrupts.


def test_an_interrupt_leaves_the_ranks_what_they_hold(ranks: Kernel) -> None:
    ranks.ok(KEEP + "import time, torch.distributed as dist\nn = 0")
    before = pids(ranks)
    for code in (
        "print('up')\nwhile True:\n    n += 1",
        "n += 1\nprint('up')\ntime.sleep(60)",
        "n += 1\nprint('up')\nif rank == 0:\n    dist.barrier()\nelse:\n    time.sleep(60)",
    ):
        reply = ranks.run_and("%%ddp --keep\n" + code, "[rank 1] up", lambda: (time.sleep(0.2), ranks.interrupt()))
        assert reply.error == "KeyboardInterrupt"
        assert "of the cell" in reply.traceback
        assert "nbddp: the 2 ranks stay, with what they hold" in reply.text
        assert reply.seconds < 5
    assert ranks.ok("%%ddp --keep\nprint(n > 3)\ndist.barrier()").lines == ["[rank 0] True", "[rank 1] True"]
    assert pids(ranks) == before


def test_ranks_that_ignore_an_interrupt_are_lost_with_what_they_hold(ranks: Kernel) -> None:
    ranks.ok(KEEP + "x = 1\nimport signal, time")
    before = pids(ranks)
    ranks.ok("%config DDPMagics.grace = 1")
    reply = ranks.run_and(
        "%%ddp --keep\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('up')\ntime.sleep(60)",
        "[rank 1] up",
        ranks.interrupt,
    )
    ranks.ok("%config DDPMagics.grace = 5")
    assert reply.error == "KeyboardInterrupt"
    assert "nbddp: the kept ranks are gone, and what they held with them" in reply.text
    assert gone(before)
    assert not kept(ranks)


def test_a_second_interrupt_asks_again_and_kills_nobody_who_obeys(ranks: Kernel) -> None:
    ranks.ok(KEEP + "x = 1\nimport time")
    before = pids(ranks)

    def twice() -> None:
        ranks.interrupt()
        time.sleep(0.4)
        ranks.interrupt()

    reply = ranks.run_and(
        "%%ddp --keep\nprint('up')\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    time.sleep(60)",
        "[rank 1] up",
        twice,
    )
    assert reply.error == "KeyboardInterrupt"
    assert reply.seconds < 4
    assert ranks.ok("%%ddp --keep\nprint(x)").lines == ["[rank 0] 1", "[rank 1] 1"]
    assert pids(ranks) == before


def test_an_interrupt_while_they_are_idle_is_nothing_to_them(ranks: Kernel) -> None:
    ranks.ok(KEEP + "x = 1")
    before = pids(ranks)
    ranks.interrupt()
    reply = ranks.run_and_after("import time\ntime.sleep(20)", 0.3, ranks.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert ranks.ok("%%ddp --keep\nprint(x)").lines == ["[rank 0] 1", "[rank 1] 1"]
    assert pids(ranks) == before


def test_an_interrupt_while_names_are_loaded(ranks: Kernel) -> None:
    ranks.ok(
        "class Slow:\n    def __setstate__(self, state):\n        import time\n        print('loading', flush=True)\n"
        "        time.sleep(60)\n    def __getstate__(self):\n        return {'a': 1}\nslow = Slow()"
    )
    ranks.ok(KEEP + "x = 1")
    before = pids(ranks)
    reply = ranks.run_and("%%ddp --keep\nprint(slow)", "[rank 1] loading", ranks.interrupt)
    assert reply.error == "KeyboardInterrupt"
    assert ranks.ok("%%ddp --keep\nprint(x, 'slow' in globals())").lines == ["[rank 0] 1 False", "[rank 1] 1 False"]
    assert pids(ranks) == before


def test_timeout(ranks: Kernel) -> None:
    ranks.ok(KEEP + "x = 1\nimport time")
    reply = ranks.run("%%ddp --keep --timeout 1\ntime.sleep(60)")
    assert reply.error == "RunTimeout"
    assert "on line 2 of the cell: time.sleep(60)" in reply.traceback
    assert ranks.ok("%%ddp --keep\nprint(x)").lines == ["[rank 0] 1", "[rank 1] 1"]


# Idle time.


def test_idle_ranks_end_and_the_last_cell_that_used_them_says_so(ranks: Kernel) -> None:
    ranks.ok(KEEP + "import atexit, os\natexit.register(lambda: open('left', 'a').write('x'))")
    before = pids(ranks)
    ranks.ok("%config DDPMagics.idle = 0.6\nimport time")
    last = ranks.ask("%%ddp --keep\nx = 1")
    assert last.wait(10)
    client, printed = ranks.client, dict[str, str]()
    another = client.execute("time.sleep(1.5)\nprint('slept')")
    deadline = time.monotonic() + 20
    while "slept" not in printed.get(another, "") and time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=10)
        if message["msg_type"] == "stream":
            cell = message["parent_header"]["msg_id"]
            printed[cell] = printed.get(cell, "") + message["content"]["text"]
    line = "nbddp: the kept ranks have ended: there was no cell for 0.6 s (--idle)\n"
    assert list(printed.values()) == [line, "slept\n"]
    ranks.ok("%config DDPMagics.idle = 3600")
    assert gone(before)
    assert ranks.get("open('left').read()") == "xx", "they end as scripts do"
    reply = ranks.run("%%ddp --keep\nprint(x)")
    assert reply.error == "RunLostError"
    assert reply.message.startswith("there was no cell for 0.6 s (--idle), and the kept ranks are gone")


def test_a_stopped_launcher_holds_nothing_up(ranks: Kernel) -> None:
    ranks.ok(KEEP + "x = 1")
    before = pids(ranks)
    agent = psutil.Process(before[0]).parent()
    assert agent is not None
    launcher = agent.parent()
    assert launcher is not None
    for process in (agent, launcher):
        process.suspend()
    assert ranks.ok("%%ddp --keep\nprint(x)", timeout=10).lines == ["[rank 0] 1", "[rank 1] 1"]
    agent.resume()
    ranks.ok("%ddp stop", timeout=10)
    assert gone([*before, agent.pid])


def test_unloading_the_extension_ends_them(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok(KEEP + "x = 1")
    before = pids(kernel)
    kernel.ok("%unload_ext nbddp")
    assert gone(before)
    kernel.ok("%load_ext nbddp")
    assert kernel.ok(KEEP + "x = 2\nprint(x)").lines == ["[rank 0] 2", "[rank 1] 2"]


# What cells do.


def test_a_name_that_one_rank_holds(ranks: Kernel) -> None:
    ranks.ok(KEEP + "if rank == 1:\n    alone = 5")
    reply = ranks.run("%%ddp --keep\nprint(alone)")
    assert reply.error == "NameError"
    assert "rank 0 of 2 raised this" in reply.traceback
    assert "Only rank 1 holds 'alone'" in reply.traceback
    # Where the notebook has one, the rank that lacks it gets that, and the other keeps its own.
    ranks.ok("alone = 'of the notebook'")
    assert ranks.ok("%%ddp --keep\nprint(alone)").lines == ["[rank 0] of the notebook", "[rank 1] 5"]


def test_what_a_thread_prints_between_two_cells_is_shown_by_the_next(ranks: Kernel) -> None:
    ranks.ok(
        KEEP + "import threading\nfrom IPython.display import HTML\ndef late():\n    print('late', rank)\n"
        "    display(HTML('shown'))\n    print('more')\nthreading.Timer(0.3, late).start()"
    )
    assert "late" not in ranks.ok("import time\ntime.sleep(0.6)").text
    reply = ranks.ok("%%ddp --keep\nprint('next')")
    printed = [line for line in reply.lines if line not in ("[rank 0]", "[rank 1]")]  # the labels of displays
    assert printed == [f"[rank {r}] {text}" for r in (0, 1) for text in (f"late {r}", "more", "next")]
    assert [d["text/html"] for d in reply.displays] == ["shown", "shown"]


def test_values_displays_and_plots(ranks: Kernel) -> None:
    ranks.ok("%matplotlib inline\nimport matplotlib.pyplot as plt\nfrom IPython.display import HTML, display")
    ranks.ok(KEEP + "n = 40")
    for _ in range(2):
        reply = ranks.ok("%%ddp --keep\ndisplay(HTML('<b>here</b>'))\nplt.plot([1, 2])\nplt.show()\nn += 1\n{'n': n}")
        assert sum("text/html" in d for d in reply.displays) == 2
        assert sum("image/png" in d for d in reply.displays) == 2
    assert reply.value is not None
    assert reply.value["text/plain"] == "{'n': 42}"


def test_workers_of_a_data_loader_know_what_cells_have_defined(ranks: Kernel) -> None:
    ranks.ok("import torch\nclass Sent:\n    def __call__(self, x): return x + 1")
    ranks.ok(
        KEEP + "class Data(torch.utils.data.Dataset):\n    add = Sent()\n    def __len__(self): return 4\n"
        "    def __getitem__(self, i): return twice(self.add(i))\ndef twice(x): return 2 * x\n"
        "def total(context):\n"
        "    loader = torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context=context)\n"
        "    return sum(int(x) for x in loader)"
    )
    reply = ranks.ok("%%ddp --keep\nprint(total('fork'), total('spawn'))", timeout=90)
    assert reply.lines == ["[rank 0] 20 20", "[rank 1] 20 20"]
    # What is defined anew is what workers get.
    reply = ranks.ok("%%ddp --keep\ndef twice(x): return 3 * x\nprint(total('spawn'))", timeout=90)
    assert reply.lines == ["[rank 0] 30", "[rank 1] 30"]


def test_what_cannot_be_pickled_either_way(ranks: Kernel) -> None:
    ranks.ok("import threading\nlock = threading.Lock()")
    ranks.ok(KEEP + "x = 1\nmine = (i for i in range(3))")
    before = pids(ranks)
    assert ranks.run("%%ddp --keep\nprint(lock)").error == "CaptureError"
    reply = ranks.run("%ddp push lock")
    assert reply.error == "CaptureError"
    assert "cannot send 'lock'" in reply.message
    reply = ranks.run("%ddp pull mine x")
    assert reply.error == "ResultError"
    assert "cannot bring back 'mine' (generator)" in reply.message
    assert ranks.get("[*get_ipython().run_line_magic('ddp', 'results')]") == ["x"]
    assert ranks.run("%%ddp --keep --out mine\nmine").error == "ResultError"
    assert ranks.ok("%%ddp --keep\nprint(x, next(mine))").lines == ["[rank 0] 1 0", "[rank 1] 1 0"]
    assert pids(ranks) == before


def test_names_and_results_larger_than_shared_memory(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(command=in_mounts("mount -t tmpfs -o size=100m none /dev/shm"))
    kernel.ok("import torch, shutil\nsent = torch.arange(15_000_000)")
    kernel.ok(KEEP + "assert int(sent[-1]) == 14_999_999\nbig, small = sent * 2, torch.arange(2_000_000)")
    for _ in range(2):
        kernel.ok("%ddp pull big small --rank 1")
        assert kernel.get("int(big[-1])") == 29_999_998
        kernel.ok("%ddp push small")
        kernel.ok("del big, small")
    assert kernel.get("shutil.disk_usage('/dev/shm').used") > 15_000_000
    # What a cell was sent is gone when nobody has it any more, without a collection.
    kernel.ok("%%ddp --keep\ndel small")
    assert kernel.get("shutil.disk_usage('/dev/shm').used") < 1_000_000
    kernel.ok("%ddp stop")


def test_a_syntax_error_costs_nothing(ranks: Kernel) -> None:
    ranks.ok(KEEP + "x = 1")
    reply = ranks.run("%%ddp --keep\nx = (1")
    assert reply.error == "SyntaxError"
    assert "line 2" in reply.traceback
    assert ranks.ok("%%ddp --keep\nprint(x)").lines == ["[rank 0] 1", "[rank 1] 1"]


# %ddp auto


def test_auto_sends_what_follows_to_the_ranks(ranks: Kernel) -> None:
    mark = "nbddp: this cell runs on the kept ranks, not in the notebook (%ddp auto off)"
    assert "no ranks are kept" in ranks.run("%ddp auto on").raw + ranks.run("%ddp auto on").message
    ranks.ok("here = 'notebook'")
    ranks.ok("%ddp auto on --cpus 2")
    reply = ranks.ok("import asyncio\nx = rank\nprint(here, x)")
    assert reply.text.startswith("nbddp: ")
    assert mark in reply.lines
    assert {"[rank 0] notebook 0", "[rank 1] notebook 1"} <= set(reply.lines)
    reply = ranks.ok("await asyncio.sleep(0.01)\nx += 1\nprint(x)")
    assert reply.lines == ["[rank 0] 1", "[rank 1] 2", mark]
    # Lines are numbered as the notebook numbers them.
    reply = ranks.run("x = 1\n\nraise ValueError('third')")
    assert reply.error == "ValueError"
    assert "----> 3 raise ValueError('third')" in reply.traceback
    assert ", line 3\n" in reply.traceback
    reply = ranks.run("x = 1\ny = (2")
    assert "line 2" in reply.traceback
    assert reply.error == "SyntaxError"
    # Magics, shell commands and help are the notebook's own; with other lines, they are the cell's.
    assert ranks.ok("!echo shell").text.splitlines()[-1].strip() == "shell"
    assert "captured" not in ranks.ok("%%capture\nprint('captured')").text
    assert ranks.ok("%%writefile auto.txt\ntext").status == "ok"
    assert ranks.ok("x?").status == "ok"
    assert ranks.ok("len?").status == "ok"
    assert "1 loop" in ranks.ok("%timeit -n1 -r1 x").text
    reply = ranks.ok("y = x\n%time y += 1\n!echo from a rank\ny")
    assert reply.lines.count("[rank 0] from a rank") == 1
    assert reply.value is not None
    assert ranks.ok("%ddp status").text.startswith("nbddp: 2 ranks kept")
    assert ranks.ok("%%ddp --cpus 1\nprint('plain')").text.endswith("plain\n")
    assert ranks.ok("").text == ""
    assert ranks.ok("# only a comment").status == "ok"
    ranks.ok("%ddp auto off")
    assert ranks.ok("print(here)").text == "notebook\n"


# For long.


@pytest.mark.slow
def test_cell_after_cell_leaves_nothing(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()
    kernel.ok(
        LINKS + "import torch, torch.distributed as dist\nimport os, threading\ndef state():\n"
        # IPython's history comes and goes.
        "    return sum('sqlite' not in link for link in links()), threading.active_count()"
    )
    kernel.ok(KEEP + "import gc\nkeep = torch.ones(1)")
    there = [psutil.Process(pid) for pid in pids(kernel)]

    def cell(n: int) -> None:
        kernel.ok(f"data = torch.full((100_000,), {n}.0, dtype=torch.float64)\ndef f():\n    return data.sum() + {n}")
        kernel.ok("%ddp push data f")
        if n % 10 == 5:
            failing = "%%ddp --keep\nif rank:\n    raise ValueError('once more')\ndist.barrier()"
            assert kernel.run(failing).error == "ValueError"
        kernel.ok(f"%%ddp --keep --out total\ntotal = f()\ndist.all_reduce(total)\nassert total == {2 * n * 100_001}")
        assert kernel.get("total.item()") == 2 * n * 100_001

    def what_there_is() -> object:
        kernel.ok("import gc\ngc.collect()")
        kernel.ok("%%ddp --keep\ngc.collect()")
        session = kernel.get("__import__('nbddp')._function.client.session.root")
        files = [sorted(os.listdir(p)) for p in (session, f"/dev/shm/{os.path.basename(session)}")]
        run = next(os.path.join(session, name) for name in files[0] if name.startswith("run-"))
        return {
            "kernel": kernel.get("state()"),
            "ranks": [(p.num_fds(), p.num_threads()) for p in there],
            "files": [[name.split("-")[0] for name in names] for names in files],
            "run": sorted(name for name in os.listdir(run) if not name.startswith("store.")),
        }

    for n in range(10):
        cell(n)
    before, memory = what_there_is(), [p.memory_full_info().uss for p in there]
    for n in range(10, CELLS // 5):
        cell(n)
    assert what_there_is() == before
    for p, was in zip(there, memory, strict=True):
        assert p.memory_full_info().uss - was < 10_000_000
    assert kernel.ok("%%ddp --keep\nprint(keep.item())").lines == ["[rank 0] 1.0", "[rank 1] 1.0"]
    kernel.ok("%ddp stop")


# What could go wrong between cells.


def test_results_of_some_ranks_come_from_the_first_of_them(ranks: Kernel) -> None:
    ranks.ok(f"{KEEP}z = rank")
    ranks.ok("%%ddp --keep --on 1 --out z\nz = 77")
    assert ranks.get("z") == 77


def test_what_ranks_are_called_is_theirs(ranks: Kernel) -> None:
    ranks.ok("rank = 7")
    reply = ranks.ok(f"{KEEP}print(rank)")
    assert "nbddp: each rank has its own rank; the notebook's stays there: rank = 7" in reply.text
    assert {"[rank 0] 0", "[rank 1] 1"} <= {*reply.lines}
    assert ranks.ok("%%ddp --keep\nprint(rank)").lines == ["[rank 0] 0", "[rank 1] 1"]
    assert ranks.ok("del rank\n").status == "ok"
    assert ranks.ok("%%ddp --keep\nprint(rank)").lines == ["[rank 0] 0", "[rank 1] 1"]


def test_what_torch_reads_when_it_loads_is_no_matter_to_ranks_that_are_there(ranks: Kernel) -> None:
    ranks.ok(f"{KEEP}n = 3")
    ranks.ok("import os\nos.environ['TORCH_SHOW_CPP_STACKTRACES'] = '1'")
    try:
        assert ranks.ok("%%ddp --keep\nprint(n)").lines == ["[rank 0] 3", "[rank 1] 3"]
        assert "have ended" in ranks.ok("%ddp stop").text
    finally:
        ranks.ok("del os.environ['TORCH_SHOW_CPP_STACKTRACES']")


def test_an_interrupt_that_the_cell_catches_leaves_collectives_that_work(ranks: Kernel) -> None:
    ranks.ok("import torch, torch.distributed as dist\n")
    ranks.ok(f"{KEEP}n = 3")
    cell = (
        "%%ddp --keep\nprint('up', flush=True)\ntry:\n    while True:\n        dist.all_reduce(torch.ones(1))\n"
        "except KeyboardInterrupt:\n    pass"
    )
    reply = ranks.run_and(cell, "[rank 1] up", ranks.interrupt)
    assert reply.status == "ok", reply.traceback
    reply = ranks.ok("%%ddp --keep\nx = torch.ones(1)\ndist.all_reduce(x)\nprint(n, x.item())")
    assert reply.lines == ["[rank 0] 3 2.0", "[rank 1] 3 2.0"]


def test_a_rank_that_begins_when_another_has_failed_is_interrupted(ranks: Kernel) -> None:
    ranks.ok("import os, signal, time, torch.distributed as dist")
    ranks.ok(f"{KEEP}n = 3")
    late = pids(ranks)[1]
    os.kill(late, signal.SIGSTOP)
    request = ranks.ask("%%ddp --keep\nif rank == 0:\n    raise ValueError('no data')\ndist.barrier()")
    request.wait(1.5)
    os.kill(late, signal.SIGCONT)
    assert request.wait(20)
    assert request.reply.error == "ValueError"
    assert "the 2 ranks stay" in request.reply.text
    assert ranks.ok("%%ddp --keep\nprint(n)").lines == ["[rank 0] 3", "[rank 1] 3"]


def test_last_words_between_two_cells_are_shown(ranks: Kernel) -> None:
    last = "def last():\n    time.sleep(0.7)\n    print('disk on fire', flush=True)\n    os._exit(3)"
    start = f"{KEEP}import os, threading, time\n{last}\nif rank == 1:\n    threading.Thread(target=last).start()"
    request = ranks.begin(start)
    request.follow(lambda reply: "the kept ranks are gone" in reply.text)
    assert "[rank 1] disk on fire" in request.reply.text
    assert "rank 1 left the process with status 3 between two cells" in request.reply.text
    assert "status 3 between two cells, and the kept ranks are gone" in ranks.run("%%ddp --keep\n1").message
    ranks.ok(f"{KEEP}import atexit\natexit.register(print, 'good bye', rank)")
    assert "[rank 1] good bye 1" in ranks.ok("%ddp stop").text


def test_the_time_without_a_cell_stays_as_it_was_asked_for(ranks: Kernel) -> None:
    ranks.ok("%%ddp --keep --cpus 1 --idle 0\nb = 1")
    ranks.ok("b = 2\n%ddp push b")
    assert "until %ddp stop" in ranks.ok("%ddp status").text


def test_defaults_are_for_ranks_that_are_started(ranks: Kernel) -> None:
    ranks.ok(f"{KEEP}n = 3")
    try:
        ranks.ok("%config DDPMagics.defaults = '--cpus 3 --env A=1 --keep'")
        assert ranks.ok("%%ddp\nprint(n)").lines == ["[rank 0] 3", "[rank 1] 3"]
        assert ranks.ok("%ddp world_size").value == {"text/plain": "3"}
    finally:
        ranks.ok("%config DDPMagics.defaults = ''")


def test_what_a_dry_run_says_of_ranks_that_are_there(ranks: Kernel) -> None:
    ranks.ok("m = 1")
    ranks.ok(f"{KEEP}n = m")
    shown = ranks.ok("other = 5\nm = 2\n") and ranks.ok("%%ddp --keep --dry-run\nprint(n, m, other)").text
    assert shown.startswith("on the kept ranks; nothing is started\n")
    assert "other" in shown
    assert " m " not in shown


def test_a_cell_of_a_magics_own_is_not_sent_by_itself(ranks: Kernel) -> None:
    ranks.ok(f"{KEEP}n = 3")
    ranks.ok("%ddp auto on")
    assert "rank" not in ranks.ok("%%time\nimport os\nhere = os.getpid()").text
    assert ranks.run("%%capture caught\nprint(os.getpid() == here)").text == ""
    assert "the kept ranks" not in ranks.ok("os?").text
    assert "[rank 1] 3" in ranks.ok("print(n)").text
    ranks.ok("%ddp auto off")
    assert ranks.ok("print(here == os.getpid(), caught.stdout)").text == "True True\n\n"


def test_a_failed_cells_variables_are_not_held(ranks: Kernel) -> None:
    ranks.ok("import time, weakref")
    ranks.ok(
        f"{KEEP}import gc, weakref\nclass Big:\n    pass\nrefs = []\n"
        "def work(fails):\n    big = Big()\n    refs.append(weakref.ref(big))\n    print('up', flush=True)\n"
        "    if fails:\n        raise ValueError\n    time.sleep(60)"
    )
    assert ranks.run("%%ddp --keep\nwork(True)").error == "ValueError"
    reply = ranks.run_and("%%ddp --keep\nwork(False)", "[rank 1] up", ranks.interrupt)
    assert reply.error == "KeyboardInterrupt"
    ranks.ok("%%ddp --keep\n1")
    left = ranks.ok(
        "%%ddp --keep --gather left\ngc.collect()\nleft = bool(refs) and all(ref() is None for ref in refs)"
    )
    assert left.status == "ok"
    assert ranks.get("left") == [True, True]


def test_what_came_from_the_ranks_is_not_newer_than_theirs(ranks: Kernel) -> None:
    ranks.ok("import torch\nnet = torch.nn.Linear(1, 1)\nopt = torch.optim.SGD(net.parameters(), 0.1)")
    ranks.ok(f"{KEEP}net.weight.data += 1")
    assert ranks.ok("%ddp pull net").text == (
        "nbddp: opt still holds the parameters that net had before; what is to come back as one goes into one "
        "%ddp pull: net opt\n"
    )
    assert ranks.ok("%%ddp --keep --out net\nnet.weight.data += 1").status == "ok"
    assert "push" not in ranks.ok("%%ddp --keep\nnet").text
    ranks.ok("net = torch.nn.Linear(1, 1)")
    assert "%ddp push net" in ranks.ok("%%ddp --keep\nnet").text


def test_an_optimizer_of_the_notebooks_model_is_not_that_of_the_ranks(ranks: Kernel) -> None:
    ranks.ok("import torch\nmodel = torch.nn.Linear(2, 1)\nopt = torch.optim.SGD(model.parameters(), lr=0.1)")
    ranks.ok("%%ddp --keep --cpus 1\nmodel.train()")
    assert "nbddp: opt steps the parameters of the notebook's model" in ranks.ok("%%ddp --keep\nopt.step()").text
    ranks.ok("%ddp push model opt")
    reply = ranks.ok("%%ddp --keep\nprint(opt.param_groups[0]['params'][0] is model.weight)")
    assert reply.text == "True\n"
