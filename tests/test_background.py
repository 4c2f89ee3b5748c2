"""Runs in the background: they return at once, show in their own cell only, and leave every other cell alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import LINKS, Kernel, Reply, Request
from tests.leftovers import marked

STEPS = """%%ddp --cpus 2 --bg train --out total --gather mine
import time
for step in range(5):
    print('step', step, flush=True)
    time.sleep(0.5)
total = 5
mine = rank
"""
ASLEEP = "%%ddp --cpus {ranks} --bg {name}\nimport time\nprint('{name} sleeps', flush=True)\ntime.sleep(600)"

# Interrupts are ignored: only SIGTERM or SIGKILL ends it.
STUBBORN = """%%ddp --cpus 2 --bg stubborn
import time
number = 0
while True:
    try:
        time.sleep(0.05)
        print('tick', number, flush=True)
        number += 1
    except KeyboardInterrupt:
        print('not yet', flush=True)
"""

# Seconds after a kernel's end in which everything of its runs is gone.
GONE_SECONDS = 2.0


def asleep(kernel: Kernel, name: str, ranks: int = 2) -> Request:
    """Start a run that does not end by itself; return the cell."""
    cell = kernel.begin(ASLEEP.format(name=name, ranks=ranks))
    cell.follow(lambda reply: reply.text.count(f"{name} sleeps") == ranks)
    return cell


def last_line(reply: Reply) -> str:
    return (reply.text.splitlines() or [""])[-1]


# Output, and the handle.


def test_a_run_shows_in_its_own_cell_while_others_run(kernel: Kernel) -> None:
    cell = kernel.begin(STEPS)
    assert cell.reply.text == ""  # it has returned before a rank said anything
    others = [kernel.begin("print('of the notebook')"), kernel.begin("%%ddp --cpus 2\nprint('in front')")]
    assert kernel.get("train.status") == "running"
    assert kernel.run("train.results").message == "train still runs; train.wait() waits for its end"
    others.append(kernel.begin("import time\ntime.sleep(1.5)"))
    assert cell.reply.panels  # came while that cell ran
    cell.follow(lambda reply: "done" in last_line(reply))  # and after it
    steps = sorted(f"[rank {rank}] step {step}" for rank in (0, 1) for step in range(5))
    last = "nbddp: train: 2 ranks, done; train.results has total, mine"
    assert cell.reply.lines == sorted([*steps, last])
    assert last_line(cell.reply) == last
    assert cell.reply.panels[-1]["text/plain"].startswith("nbddp: 2 ranks done in")
    assert [other.reply.lines for other in others] == [
        ["of the notebook"],
        ["[rank 0] in front", "[rank 1] in front"],
        [],
    ]
    assert not any(other.reply.panels for other in (others[0], others[2]))
    assert kernel.get("train.status, train.wait(), train.results['mine']") == (
        "done",
        {"total": 5, "mine": [0, 1]},
        [0, 1],
    )
    assert kernel.get("train.log(1, tail=2)") == "step 3\nstep 4\n"
    assert kernel.run("train.log(2)").message == "train.log(2): it has ranks 0 to 1"


def test_the_handle_shows_the_panel_wherever_it_is_displayed(kernel: Kernel) -> None:
    cell = kernel.begin("%%ddp --cpus 2 --bg train\nimport time\ntime.sleep(3)")
    early = kernel.begin("train")  # before there is a panel
    cell.follow(lambda reply: reply.panels)
    late = kernel.begin("train")
    assert late.reply.panels[0]["text/plain"].startswith("nbddp: 2 ranks, ")
    cell.follow(lambda reply: "done" in last_line(reply))
    kernel.wait_idle()
    for other in (early, late):
        shown = [content["data"]["text/plain"] for kind, content in other.reply.outputs if "display_data" in kind]
        assert len(shown) > 3
        assert shown[-1].startswith("nbddp: 2 ranks done in"), shown
        assert other.reply.text == ""
    after = kernel.ok("train")
    assert after.panels[0]["text/plain"].startswith("nbddp: 2 ranks done in")
    assert kernel.ok("print(train)").text == "<train: 2 ranks, done>\n"


def test_a_handle_of_a_quick_run_does_not_say_for_ever_that_it_runs(kernel: Kernel) -> None:
    cell = kernel.begin("%%ddp --cpus 1 --bg train\nimport time\ntime.sleep(0.5)")
    other = kernel.begin("train")
    cell.follow(lambda reply: "done" in reply.text)
    kernel.wait_idle()
    shown = other.reply.outputs[-1][1]["data"]["text/plain"]
    # On a busy machine, where ranks take seconds to start, there was a panel after all.
    assert shown == "<train: 1 rank, done>" or shown.startswith("nbddp: 1 rank done in"), shown


def test_without_a_name_the_handle_is_the_value_and_gets_one(kernel: Kernel) -> None:
    cell = kernel.begin("%%ddp --cpus 2 --bg\nif rank == 0:\n    40 + 2\n40 + 2")
    cell.follow(lambda reply: "done" in reply.text)
    # The value of the cell comes with the output.
    assert [display["text/plain"] for display in cell.reply.displays] == ["42"]
    name = re.findall(r"nbddp: (run\d+): 2 ranks, done", cell.reply.text)[0]
    assert kernel.get(f"{name}.wait(), {name}.name") == ({}, name)


def test_a_captured_cell_shows_nothing_and_the_log_has_it(kernel: Kernel) -> None:
    kernel.ok("%%capture taken\n%%ddp --cpus 1 --bg train\nprint('said')")
    assert kernel.ok("train.wait()").text == ""
    assert kernel.get("train.log(), taken.stdout") == ("said\n", "")


# How it ends.


def test_a_failure_is_raised_by_wait_as_often_as_it_is_asked(kernel: Kernel) -> None:
    cell = kernel.begin("%%ddp --cpus 2 --bg train\nif rank == 1:\n    raise ValueError('no data')")
    cell.follow(lambda reply: "wait()" in reply.text)
    assert cell.reply.text == (
        "nbddp: train: 2 ranks, failed: ValueError: no data\nnbddp: train.wait() raises it, with its traceback\n"
    )
    assert kernel.get("train.status, train.results") == ("failed", {})
    for _ in range(3):
        reply = kernel.run("train.wait()")
        assert reply.error == "ValueError"
        assert reply.failure == "rank 1 of 2 raised ValueError: no data"
        assert "----> 3     raise ValueError('no data')" in reply.traceback
    caught = (
        "import nbddp\ntry:\n    train.wait()\nexcept nbddp.RankError as error:\n    print(error.rank, type(error))"
    )
    assert kernel.ok(caught).text.startswith("1 ")
    assert kernel.ok("%%ddp --cpus 2\nprint('fine')").lines == ["[rank 0] fine", "[rank 1] fine"]


def test_a_failure_without_a_message_is_told_too(kernel: Kernel) -> None:
    cell = kernel.begin("%%ddp --cpus 1 --bg train\nassert False")
    cell.follow(lambda reply: "wait()" in reply.text)
    assert cell.reply.text.splitlines()[0] == "nbddp: train: 1 rank, failed: AssertionError"


def test_stop(kernel: Kernel) -> None:
    cell = asleep(kernel, "train")
    kernel.ok("train.stop()")
    cell.follow(lambda reply: "stopped" in last_line(reply))
    assert kernel.get("train.status, train.results") == ("stopped", {})
    reply = kernel.run("train.wait()")
    assert (reply.error, reply.message) == ("LaunchError", "train was stopped")
    assert kernel.ok("train.stop()").seconds < 5  # nothing is left to do


def test_a_stop_in_the_moment_of_the_start_is_not_lost(kernel: Kernel) -> None:
    code = "get_ipython().run_cell_magic('ddp', '--cpus 1 --bg train', 'import time; time.sleep(600)')\ntrain.stop()"
    for _ in range(3):
        assert kernel.ok(code).seconds < 20
        assert kernel.get("train.status") == "stopped"


def test_a_cell_that_catches_the_interrupt_brings_its_results(kernel: Kernel) -> None:
    cell = kernel.begin(
        "%%ddp --cpus 1 --bg train --out best\nimport time\nbest = 7\n"
        "try:\n    print('on', flush=True)\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    best += 1"
    )
    cell.follow(lambda reply: "on" in reply.text)
    kernel.ok("train.stop()")
    assert kernel.get("train.status, train.wait()") == ("done", {"best": 8})


def test_timeouts(kernel: Kernel) -> None:
    cell = kernel.begin("%%ddp --cpus 1 --bg train --timeout 1\nimport time\ntime.sleep(600)")
    assert kernel.run("train.wait(timeout=0.1)").message == "train still runs after 0.1 s"
    cell.follow(lambda reply: "failed" in reply.text)
    reply = kernel.run("train.wait()")
    assert reply.error == "RunTimeout"
    assert "on line 3 of the cell: time.sleep(600)" in reply.traceback


def test_an_interrupt_of_another_cell_does_not_touch_it(kernel: Kernel) -> None:
    asleep(kernel, "train", ranks=1)
    sleeping = "%%ddp --cpus 2\nimport time\nprint('up', flush=True)\ntime.sleep(600)"
    assert kernel.run_and(sleeping, "[rank 1] up", kernel.interrupt).error == "KeyboardInterrupt"
    assert (
        kernel.run_and("print('now', flush=True)\ntrain.wait()", "now", kernel.interrupt).error == "KeyboardInterrupt"
    )
    assert kernel.get("train.status") == "running"
    kernel.ok("train.stop()")


# Refusals come in the cell, and at once.


def test_what_cannot_run_is_refused_in_the_cell(kernel: Kernel) -> None:
    kernel.ok("def taken(): pass\nopen_file = open('/dev/null')")
    refused = {
        "%%ddp --cpus 1 --bg train\nprint(open_file)": "CaptureError: cannot send 'open_file'",
        "%%ddp --cpus 1 --bg train\nprint(": "SyntaxError: '(' was never closed",
        "%%ddp --cpus 1 --bg train --out losses\nx = 1": "UsageError: --out losses: the cell never binds 'losses'",
        "%%ddp --cpus 1 --bg taken\n1": "LaunchError: --bg taken: the notebook has a variable of that name, a func",
        "%%ddp --cpus 1 --bg 7up\n1": "UsageError: --bg 7up: that is no name",
        "%%ddp --cpus 1 --bg for\n1": "UsageError: --bg for: that is no name",
        "%%ddp --cpus 1 --bg train --keep\n1": "UsageError: --bg and --keep do not go together",
    }
    for code, message in refused.items():
        reply = kernel.run(code)
        # A UsageError is shown as a line.
        shown = f"{reply.error}: {reply.message}" if reply.error else reply.stderr
        assert message in shown, code
    assert kernel.get("'train' in globals()") is False
    assert kernel.get("callable(taken)") is True
    kernel.ok("open_file.close()")


def test_a_name_is_taken_while_its_run_lasts(kernel: Kernel) -> None:
    asleep(kernel, "train", ranks=1)
    reply = kernel.run("%%ddp --cpus 1 --bg train\n1")
    assert reply.message == "--bg train: train still runs; train.stop() ends it, or choose another name"
    kernel.ok("del train")  # it is still that run's
    assert kernel.run("%%ddp --cpus 1 --bg train\n1").error == "LaunchError"
    kernel.ok("from nbddp import _background\n_background.running['train'].stop()")
    kernel.begin("%%ddp --cpus 1 --bg train --out x\nx = 3")
    assert kernel.get("train.wait()") == {"x": 3}
    first = kernel.begin("first = train").id
    assert first
    kernel.begin("%%ddp --cpus 1 --bg train --out x\nx = 4\nprint('again')")
    assert kernel.get("train.wait(), first.results, train.log(), first.log()") == ({"x": 4}, {"x": 3}, "again\n", "")


def test_what_torch_reads_when_it_loads_cannot_change_meanwhile(kernel: Kernel) -> None:
    asleep(kernel, "train", ranks=1)
    reply = kernel.run("%%ddp --cpus 1 --env TORCH_SHOW_CPP_STACKTRACES=1 --env PYTHONHASHSEED=3\n1")
    assert reply.error == "LaunchError", reply.text
    assert "loading it anew would end train (train.stop() ends it). End that first" in reply.message
    assert kernel.get("train.status") == "running"
    kernel.ok("train.stop()")


# Beside others.


def test_several_at_once_beside_kept_ranks_and_other_cells(kernel: Kernel) -> None:
    kernel.ok("%%ddp --cpus 2 --keep\nheld = rank")
    cells = {name: asleep(kernel, name) for name in ("one", "two")}
    assert kernel.ok("%%ddp --keep\nprint('held', held)").lines == ["[rank 0] held 0", "[rank 1] held 1"]
    assert kernel.ok("%%ddp --cpus 2\nprint('front')").lines == ["[rank 0] front", "[rank 1] front"]
    status = kernel.ok("%ddp status").text
    assert re.match(r"one:\nnbddp: 2 ranks, \d+ s\n(.*\n)+two:\nnbddp: 2 ranks, \d+ s\n", status), status
    assert "held" in status  # what the kept ranks hold
    where = "ranks 0-1: on line 4 of the cell: time.sleep(600)"
    assert kernel.ok("%ddp stacks").text == f"one:\n{where}\ntwo:\n{where}\n"
    kernel.ok("two.stop()")
    assert kernel.get("one.status, two.status") == ("running", "stopped")
    kernel.ok("one.stop()\n%ddp stop")
    for name, cell in cells.items():
        cell.follow(lambda reply: "stopped" in last_line(reply))
        others = {"one", "two"} - {name}
        assert not any(other in cell.reply.text for other in others)


def test_a_run_has_the_values_that_the_notebook_had(kernel: Kernel) -> None:
    kernel.ok("import torch\nbig, small = torch.zeros(1_000_000), [0]\ndef scale(): return 2")
    kernel.begin("%%ddp --cpus 2 --bg train --gather seen\nseen = float(big.sum()), small, scale(), __name__")
    kernel.ok("big += 1; small.append(1)\ndef scale(): return 3\ndel small")
    assert kernel.get("train.wait()['seen']") == [(0.0, [0], 2, "__main__")] * 2


def test_a_flood_does_not_hold_up_other_cells(kernel: Kernel) -> None:
    flood = "%%ddp --cpus 2 --bg flood\nwhile True:\n    print('x' * 60)"
    cell = kernel.begin(flood)
    cell.follow(lambda reply: len(reply.text) > 100_000)
    for _ in range(5):
        other = kernel.ok("print('here')")
        assert other.text == "here\n"
        assert other.seconds < 5
    front = kernel.ok("%%ddp --cpus 1\nfor i in range(100): print('in front', i)")
    assert len(front.lines) == 100
    assert front.seconds < 10
    assert kernel.get("flood.status") == "running"
    kernel.ok("flood.stop()")
    cell.follow(lambda reply: "stopped" in last_line(reply))


def test_a_forked_child_leaves_it_alone(kernel: Kernel) -> None:
    asleep(kernel, "train", ranks=1)
    kernel.ok(
        "import os, weakref\n"
        "from nbddp import _background, _function\n"
        "if not (pid := os.fork()):\n"  # what nbddp does at an exit; ipykernel's own part hangs in a child
        "    try:\n"
        "        _background._end_with_kernel()\n"
        "        weakref.finalize._exitfunc()\n"
        "        _function.client.close()\n"
        "    finally:\n"
        "        os._exit(0)\n"
        "print(os.waitpid(pid, 0)[1])"
    )
    assert kernel.get("train.status") == "running"
    assert kernel.get("train.log()") == "train sleeps\n"
    kernel.ok("train.stop()")


STATE = (
    LINKS
    + """
import collections, gc, os, re, sys, threading
def state():
    sys.last_type = sys.last_value = sys.last_traceback = sys.last_exc = None
    gc.collect()
    kinds = [re.sub(":.*|run-[0-9]+", "", link) for link in links() if "sqlite" not in link]
    own = [f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects()]
    from nbddp._function import client
    files = [re.sub("-.*", "", name) for name in os.listdir(client.session.root)]
    things = kinds + files + [kind for kind in own if kind.startswith(("nbddp.", "socket."))]
    return dict(collections.Counter(things), threads=threading.active_count())
def grown(before):
    import time
    deadline = time.monotonic() + 10
    while True:
        more = {kind: n for kind, n in state().items() if n > before.get(kind, 0)}
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.1)
"""
)


def test_thirty_runs_leave_nothing(kernel: Kernel) -> None:
    kernel.ok(STATE)
    bodies = ("print('fine')", "raise ValueError('bad')", "import time\nprint('on')\ntime.sleep(600)")

    def three() -> None:
        for number, body in enumerate(bodies):
            kernel.begin(f"%%ddp --cpus 1 --bg train\n{body}")
            kernel.ok("train.stop()" if number == 2 else "try: train.wait()\nexcept ValueError: pass")
            kernel.ok("del train")

    three()
    three()
    before = kernel.get("state()")
    for _ in range(8):
        three()
    assert kernel.get(f"grown({before!r})") == {}


# The end of the kernel.


@pytest.fixture
def all_gone() -> Callable[[], bool]:
    """Tell whether, in time, everything is gone that has been started since."""
    others = {process.pid for process in marked()}

    def look() -> bool:
        deadline = time.monotonic() + GONE_SECONDS
        while (left := {process.pid for process in marked()} - others) and time.monotonic() < deadline:
            time.sleep(0.02)
        return not left

    return look


@pytest.fixture
def alone(all_gone: Callable[[], bool], new_kernel: Callable[..., Kernel], tmp_path: Path) -> Kernel:
    """A kernel of the test's own, in a folder of its own."""
    return new_kernel(cwd=str(tmp_path))


def test_a_shutdown_saves_the_logs_of_ranks_that_will_not_end(
    alone: Kernel, all_gone: Callable[[], bool], new_kernel: Callable[..., Kernel], tmp_path: Path
) -> None:
    cell = alone.begin(STUBBORN)
    cell.follow(lambda reply: reply.text.count("tick") > 20)
    other = alone.begin("1")
    alone.shut_down()
    assert all_gone()
    cell.follow(lambda reply: "ended with the kernel" in reply.text, 5)
    said = "nbddp: stubborn ended with the kernel; its logs are in nbddp-logs/stubborn-1"
    assert [line for line in cell.reply.text.splitlines() if line.startswith("nbddp: stubborn")] == [said]
    assert other.reply.text == ""
    for rank in (0, 1):
        log = (tmp_path / "nbddp-logs" / "stubborn-1" / f"rank{rank}.log").read_text()
        shown = "".join(
            line.removeprefix(f"[rank {rank}] ") + "\n"
            for line in cell.reply.text.splitlines()
            if line.startswith(f"[rank {rank}] ")
        )
        assert log.startswith(shown)
        assert log.endswith("\n")
    # A front end that restarts the kernel has stopped listening: the next one tells, once.
    following = new_kernel(load=False, cwd=str(tmp_path))
    assert following.ok("%load_ext nbddp").text == f"{said}\n"
    assert following.ok("%reload_ext nbddp").text == ""


def test_logs_that_cannot_go_beside_the_notebook_go_elsewhere(alone: Kernel, tmp_path: Path) -> None:
    (tmp_path / "nbddp-logs").write_text("a file")
    cell = alone.begin(ASLEEP.format(name="train", ranks=1))
    cell.follow(lambda reply: "sleeps" in reply.text)
    alone.shut_down()
    cell.follow(lambda reply: "ended with the kernel" in reply.text, 5)
    where = Path(cell.reply.text.rstrip("\n").partition("its logs are in ")[2])
    assert (where / "rank0.log").read_text() == "train sleeps\n"
    (where / "rank0.log").unlink()
    where.rmdir()
    where.parent.rmdir()


def test_a_killed_kernel_leaves_nothing(alone: Kernel, all_gone: Callable[[], bool]) -> None:
    asleep(alone, "train")
    alone.begin(STUBBORN)
    alone.kill()
    assert all_gone()


def test_unloading_ends_it_and_keeps_the_logs(alone: Kernel, all_gone: Callable[[], bool], tmp_path: Path) -> None:
    cell = asleep(alone, "train")
    reply = alone.ok("%unload_ext nbddp")
    assert all_gone()
    alone.wait_idle()
    assert last_line(cell.reply) == "nbddp: train ended with nbddp; its logs are in nbddp-logs/train-1"
    assert reply.text == ""
    assert alone.get("train.status, train.log(1)") == ("stopped", "train sleeps\n")
    assert (tmp_path / "nbddp-logs/train-1/rank0.log").read_text() == "train sleeps\n"
    alone.ok("%load_ext nbddp")
    alone.begin("%%ddp --cpus 1 --bg train --out x\nx = 1")
    assert alone.get("train.wait()") == {"x": 1}


# Where there are no cells.


def test_without_a_notebook(tmp_path: Path) -> None:
    script = """
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        shell.run_line_magic("load_ext", "nbddp")
        shell.run_cell_magic("ddp", "--cpus 2 --bg train --out x", "x = 2\\nprint('said')")
        train = shell.user_ns["train"]
        print(train.wait(), train, repr(train.log(1)))
        shell.run_cell_magic("ddp", "--cpus 1 --bg", "import time\\nprint('up', flush=True)\\ntime.sleep(600)")
        run = shell.user_ns["run1"]
        while not run.log():
            pass
        print(run.status)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == ["{'x': 2} <train: 2 ranks, done> 'said\\n'", "running"]
    assert done.stderr == "nbddp: run1 ended with the kernel; its logs are in nbddp-logs/run1-1\n"
    assert (tmp_path / "nbddp-logs/run1-1/rank0.log").read_text() == "up\n"


def test_a_run_that_is_over_holds_nothing_of_the_notebooks(kernel: Kernel) -> None:
    kernel.ok("import gc, weakref\nclass Data(list):\n    pass\ndata = Data([1])\nref = weakref.ref(data)")
    kernel.begin("%%ddp --cpus 1 --bg train\nprint(data)")
    assert kernel.get("train.wait()") == {}
    assert kernel.get("train.log()") == "[1]\n"
    kernel.ok("del data, _i\nimport sys\n_ = None")
    kernel.ok("gc.collect()")
    assert kernel.get("ref() is None") is True
