"""Rounds: at a random moment of a run a random process of it gets a random signal, and then nothing may be left.

Used by ``benchmarks/stop.py``, for hundreds of them, and by a test, for a few. A round is drawn from a seed and its
number alone, so that any of them can be played again by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from tests.kernel import Kernel, Request
from tests.leftovers import leftovers, marked

_Plan = TypeVar("_Plan")

# Seconds that ranks have after an interrupt, in these rounds.
GRACE = 1

# Every rank has worker processes and a child in a session of its own; they say so when they have reached the stage
# that the round is about.
_CELL = """%%ddp --cpus {ranks} --out big
import atexit, json, os, signal, subprocess, time
import torch, torch.distributed as dist
{before}
big = None
child = subprocess.Popen(['sleep', '600'], start_new_session=True)
batches = iter(torch.utils.data.DataLoader(range(1 << 30), num_workers=2))
next(batches)
def reached(seconds=0):
    pids = dict(rank=[os.getpid()], worker=[worker.pid for worker in batches._workers], child=[child.pid])
    with open(os.path.join({folder!r}, f'new.{{rank}}'), 'w') as file:
        json.dump(pids, file)
    os.rename(file.name, os.path.join({folder!r}, f'reached.{{rank}}'))
    time.sleep(seconds)
{stage}
"""

_RUN_ON = "reached()\nfor batch in batches:\n    time.sleep(0.001)"
_BODIES = {
    "importing": _RUN_ON,
    "launching": _RUN_ON,
    "running": _RUN_ON,
    "collective": "reached()\nif rank:\n    dist.barrier()\nelse:\n    time.sleep(600)",
    "results": "big = torch.ones(1 << 25)\nreached()",
    "ending": "atexit.register(reached, 0.3)",
}

# The longest time between the beginning of a stage and the signal, in seconds: some beyond its end. The first two
# begin with the request, the others when every rank has reached them.
_DELAYS = {"importing": 2.5, "launching": 0.2, "running": 0.5, "collective": 0.5, "results": 0.3, "ending": 0.4}

_VICTIMS = {
    "importing": ("kernel", "launcher"),
    "launching": ("kernel", "launcher", "agent", "rank"),
}
_ALL_VICTIMS = ("kernel", "launcher", "agent", "rank", "worker", "child")

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSEGV, signal.SIGSTOP)

# Seconds for what torchrun or torch must notice first, and for exit handlers.
_BY_ITSELF = 6.0
# Seconds that an interrupt may take beyond the grace period; a second one, in all.
_BEYOND_GRACE = 1.0
# Seconds from the prompt, or the kernel's death, until nothing is left.
_GONE = 2.0
# The same if a process was stopped that was through: the time that NCCL may take; see nbddp._launcher.
_GONE_IF_STOPPED = 12.0
# Seconds to wait, once a round has failed, to learn how long it would have taken.
_AT_MOST = 30.0
# On a machine that does other things as well.
_SLACK = 0.5


@dataclass(frozen=True)
class Plan:
    """One round.

    Attributes:
        number: Its number.
        stage: When the signal is sent.
        victim: To what.
        signum: Which signal.
        ranks: How many ranks there are.
        delay: Seconds from the beginning of the stage to the signal.
        which: Which of several such processes, from 0 to 1.
        presses: How many interrupts the user sends to a run that does not end by itself.
        goes_on: Whether a process that was stopped is continued: a kernel at once, which is killed otherwise.
    """

    number: int
    stage: str
    victim: str
    signum: signal.Signals
    ranks: int
    delay: float
    which: float
    presses: int
    goes_on: bool

    @classmethod
    def draw(cls, seed: int, number: int) -> Plan:
        """Draw a round."""
        chance = random.Random(f"{seed} {number}")
        stage = chance.choice(list(_BODIES))
        return cls(
            number,
            stage,
            chance.choice(_VICTIMS.get(stage, _ALL_VICTIMS)),
            chance.choice(SIGNALS),
            chance.choice((2, 3)),
            chance.uniform(0, _DELAYS[stage]),
            chance.random(),
            chance.choice((1, 2)),
            chance.random() < 0.5,
        )

    def __str__(self) -> str:
        text = f"round {self.number}: {self.stage}, {self.ranks} ranks: {self.signum.name} to the {self.victim}"
        text += f" after {self.delay:.3f} s"
        if self.victim == "kernel" and self.signum == signal.SIGSTOP:
            text += f", then {'SIGCONT' if self.goes_on else 'SIGKILL'}"
        return text

    @property
    def ends_the_run(self) -> bool:
        """Whether the cell must return, or the kernel be gone, without an interrupt."""
        if self.signum == signal.SIGSTOP:
            return self.victim == "kernel" and not self.goes_on
        if self.stage in ("results", "ending"):
            return True
        match self.victim:
            case "kernel":
                return self.signum != signal.SIGINT
            case "launcher":
                # It ignores SIGINT; and if the run has not begun, another one begins it.
                return self.signum != signal.SIGINT and self.stage in ("running", "collective")
            case "agent":
                # It ignores SIGINT, as the launcher does, until torchrun has installed its handlers.
                return self.signum != signal.SIGINT or self.stage != "launching"
            case "rank":
                # In a collective, Python's handler has to wait; and a rank that is starting may be in C++, too.
                return self.signum != signal.SIGINT or self.stage == "running"
            case "worker":
                return self.stage == "running"
        return False


@dataclass
class Result:
    """What a round came to.

    Attributes:
        plan: The round.
        how: How it ended.
        problems: What must not be, a line each.
    """

    plan: Any
    how: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.plan}: {', '.join(self.how)}", *(f"    FAILED: {problem}" for problem in self.problems)]
        return "\n".join(lines)


class Series(Generic[_Plan]):
    """Rounds, one after the other; a kernel serves until it is gone.

    Args:
        start: Starts a kernel.
        play_in: Plays a round in one.
        restore: Called after a round that went wrong, or ended the kernel.
        others: Kernels that are none of the rounds', and stay.
    """

    def __init__(
        self,
        start: Callable[[], Kernel],
        play_in: Callable[[_Plan, Kernel], Result],
        restore: Callable[[], None] = lambda: None,
        others: Sequence[Kernel] = (),
    ) -> None:
        self._start = start
        self._play_in = play_in
        self._restore = restore
        self._others = others
        self._kernel: Kernel | None = None

    def close(self) -> None:
        """Shut the kernel down, if there is one."""
        if self._kernel is not None:
            self._kernel.close()
        self._kernel = None

    def play(self, plan: _Plan) -> Result:
        """Play a round."""
        if self._kernel is None:
            self._kernel = self._start()
        result = self._play_in(plan, self._kernel)
        if result.problems or not self._kernel.alive():
            # The next round must not suffer for this one.
            self.close()
            for process in marked():
                with contextlib.suppress(psutil.Error):
                    if process.ppid() not in {kernel.pid for kernel in self._others}:
                        process.kill()
            self._restore()
        return result


def series(temp: Path, others: Sequence[Kernel] = ()) -> Series[Plan]:
    """Return rounds on this machine.

    Args:
        temp: This process's temporary directory, and the kernels'.
        others: Kernels that are none of the rounds', and stay.
    """
    return Series(new_kernel, lambda plan, kernel: _Round(plan, kernel, temp, others).play(), others=others)


def new_kernel() -> Kernel:
    """Start a kernel whose launcher has run something."""
    kernel = Kernel()
    # Nobody wants the dumps of those that are to crash.
    kernel.ok("import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))")
    kernel.ok(f"%load_ext nbddp\n%config DDPMagics.grace = {GRACE}")
    kernel.ok("%%ddp --cpus 2\npass")
    # Its agent must not be taken for that of the first round.
    wait_for(lambda: (launcher := launcher_of(kernel)) is not None and not launcher.children(), _GONE)
    return kernel


def cell(stage: str, ranks: int, folder: Path, before: str = "") -> str:
    """Return a cell that goes through `stage`; its ranks leave word in `folder` when they are there."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return _CELL.format(ranks=ranks, folder=str(folder), before=before, stage=_BODIES[stage])


def wait_until_reached(folder: Path, ranks: int) -> bool:
    """Wait until every rank has left word; tell whether they did."""
    return bool(wait_for(lambda: len(list(folder.glob("reached.*"))) == ranks, _AT_MOST))


def launcher_of(kernel: Kernel) -> psutil.Process | None:
    """Return the kernel's launcher."""
    for process in psutil.Process(kernel.pid).children():
        with contextlib.suppress(psutil.Error):
            if "nbddp._launcher" in " ".join(process.cmdline()):
                return process
    return None


def reached(folder: Path) -> dict[str, list[int]]:
    """Return the pids of those of whom the ranks have said that they are there, by what they are."""
    pids: dict[str, list[int]] = {}
    for path in sorted(folder.glob("reached.*")):
        for kind, some in json.loads(path.read_text()).items():
            pids.setdefault(kind, []).extend(some)
    return pids


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """Wait until `condition` returns something, at most for so long; return that."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return value


class Round(Generic[_Plan]):
    """What all rounds have.

    Args:
        plan: What to do.
        kernel: Where.
        temp: This process's temporary directory, and the kernel's.
        others: Other kernels that are there, and stay.
    """

    def __init__(self, plan: _Plan, kernel: Kernel, temp: Path, others: Sequence[Kernel]) -> None:
        self._others = others
        self._plan = plan
        self._kernel = kernel
        self._folder = temp / "reached"
        self._temp = temp
        self._result = Result(plan)

    def _over(self, request: Request, seconds: float) -> bool:
        return request.wait(seconds, lambda: not self._kernel.alive()) or not self._kernel.alive()

    def _see_that_it_works(self, cell: str, seconds: float) -> None:
        """Run another cell, unless the kernel is gone."""
        request = self._kernel.ask(cell)
        over = self._over(request, seconds)
        # SIGTERM may have come so late that the kernel ends only now.
        if not over or (self._kernel.alive() and request.reply.status != "ok"):
            self._result.problems.append(f"the next cell: {shown(request)}")


class _Round(Round[Plan]):
    def play(self) -> Result:
        plan, result = self._plan, self._result
        request = self._begin()
        victim = self._victim(request)
        if victim is None:
            result.how.append("there was no such process any more")
        else:
            result.how.append(f"pid {victim.pid}")
            self._strike(victim)
        self._wait_for_the_end(request)
        steps = [self._look_for_leftovers, self._run_another]
        if plan.signum == signal.SIGSTOP and request.reply.status == "ok":
            # Nobody has missed it so far. The launcher must go on when it is needed; what else was stopped may have
            # the time that NCCL has, unless whoever stopped it lets it go on.
            if plan.victim == "launcher":
                steps.reverse()
            elif plan.goes_on and victim is not None:
                with contextlib.suppress(psutil.Error):
                    victim.send_signal(signal.SIGCONT)
        for step in steps:
            if not result.problems:
                step()
        return result

    def _begin(self) -> Request:
        plan = self._plan
        code = cell(plan.stage, plan.ranks, self._folder)
        if plan.stage == "importing":
            self._kernel.ok("%reload_ext nbddp")
        if plan.stage == "results":
            # The kernel imports it with the first tensor that comes back, and the limits are for the end of a run.
            self._kernel.ok("import torch")
        request = self._kernel.ask(code)
        started = plan.stage in ("importing", "launching")
        if not started and not wait_until_reached(self._folder, plan.ranks):
            self._result.problems.append("the ranks never got there")
        time.sleep(plan.delay)
        return request

    def _victim(self, request: Request) -> psutil.Process | None:
        """Return the process that is to get the signal; wait for one that is still to be started."""
        plan = self._plan
        while True:
            over = request.wait(0.002)
            with contextlib.suppress(psutil.Error):
                if found := self._candidates():
                    return found[int(plan.which * len(found))]
            if over or self._result.problems:
                return None

    def _candidates(self) -> list[psutil.Process]:
        kind = self._plan.victim
        if kind == "kernel":
            return [psutil.Process(self._kernel.pid)]
        found = [process] if (process := launcher_of(self._kernel)) is not None else []
        if kind in ("agent", "rank"):
            found = [child for process in found for child in process.children()]
        if kind == "rank":
            found = [child for process in found for child in process.children()]
        if kind in ("worker", "child"):
            ours = {process.pid for process in psutil.Process(self._kernel.pid).children(recursive=True)}
            found = [psutil.Process(pid) for pid in reached(self._folder)[kind] if pid in ours]
        return sorted(found, key=lambda process: process.pid)

    def _strike(self, victim: psutil.Process) -> None:
        plan = self._plan
        try:
            victim.send_signal(plan.signum)
        except psutil.NoSuchProcess:
            self._result.how.append("ended this moment")
        if plan.signum == signal.SIGSTOP and plan.victim == "kernel":
            time.sleep(0.5)
            victim.send_signal(signal.SIGCONT if plan.goes_on else signal.SIGKILL)

    # (a) The cell returns, or the kernel is gone.

    def _wait_for_the_end(self, request: Request) -> None:
        plan, problems = self._plan, self._result.problems
        began = time.monotonic()
        if not self._over(request, _BY_ITSELF + _SLACK if plan.ends_the_run else 0.5):
            if plan.ends_the_run:
                problems.append(f"the cell did not return by itself in {time.monotonic() - began:.1f} s")
            began = time.monotonic()
            self._kernel.interrupt()
            if plan.presses > 1 and not self._over(request, 0.3):
                self._kernel.interrupt()
            limit = _BEYOND_GRACE + _SLACK + (GRACE if plan.presses == 1 else 0)
            if not self._over(request, began + limit - time.monotonic()):
                presses = f"{plan.presses} interrupt{'s' * (plan.presses > 1)}"
                over = self._over(request, _AT_MOST)
                after = f"only after {time.monotonic() - began:.1f} s" if over else f"not in {_AT_MOST:.0f} s"
                problems.append(f"after {presses} the cell returned {after}")
            self._result.how.append(f"interrupted {plan.presses} times at most")
        if self._kernel.alive():
            ending = f"{request.reply.status} {request.reply.error}".strip()
            self._result.how.append(f"{ending or 'running'} after {time.monotonic() - began:.2f} s")
        else:
            self._result.how.append(f"the kernel was gone after {time.monotonic() - began:.2f} s")
            if plan.victim != "kernel":
                problems.append("the kernel is gone, and nobody has hit it")

    # (b) Nothing is left.

    def _look_for_leftovers(self) -> None:
        began = time.monotonic()
        plan = self._plan
        was_stopped = plan.signum == signal.SIGSTOP and plan.victim not in ("kernel", "launcher") and not plan.goes_on
        limit = (_GONE_IF_STOPPED if was_stopped else _GONE) + _SLACK
        while (left := self._left()) and time.monotonic() < began + limit:
            time.sleep(0.02)
        self._result.how.append(f"all gone after {time.monotonic() - began:.2f} s")
        self._result.problems += [f"left after {limit:.1f} s: {line}" for line in left]

    def _left(self) -> list[str]:
        own = f"{os.sep}nbddp-{self._kernel.pid}-"
        # In /dev/shm there are other people's things.
        return [
            ln
            for ln in leftovers(self._temp, [self._kernel, *self._others])
            if not ln.startswith("/dev/shm") or own in ln
        ]

    # (c) The next cell simply works.

    def _run_another(self) -> None:
        if self._kernel.alive():
            self._see_that_it_works("%%ddp --cpus 2\nprint('again')", _AT_MOST)
            # What is left of it must not be taken for the next round's.
            wait_for(lambda: not self._left(), _GONE_IF_STOPPED)


def shown(request: Request) -> str:
    """Return how a cell ended, and all that it has shown."""
    if request.returned_at is None:
        return f"did not return: {request.reply.text}"
    return f"{request.reply.status}: {request.reply.text}\n{request.reply.traceback}"


def private(temp: Path) -> dict[str, str]:
    """Return environment variables that give this process and its kernels a temporary directory of their own."""
    return {
        "TMPDIR": str(temp),
        "IPYTHONDIR": str(temp / "profile"),
        "JUPYTER_RUNTIME_DIR": str(temp / "runtime"),
        "NBDDP_TEST_RUN": str(os.getpid()),
    }
