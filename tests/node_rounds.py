"""Rounds on nodes of a real Slurm: a random process of a run gets a random signal, and then nothing may be left.

As in rounds.py, whose rounds are of one machine. A round is drawn from a seed and its number alone, so that any of them
can be played again by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster import Slurm
from tests.kernel import Kernel, Request
from tests.leftovers import leftovers, marked
from tests.rounds import GRACE, Result, Round, Series, shown, wait_for

NODES = 2

# Every rank has a worker and a child in a session of its own, and says so when it has reached what the round is about.
_CELL = """%%ddp --nnodes 2 --cpus 1 --out big
import json, os, subprocess, time
import torch, torch.distributed as dist
big = None
child = subprocess.Popen(['sleep', '600'], start_new_session=True)
def reached():
    with open(os.path.join({folder!r}, f'new.{{rank}}'), 'w') as file:
        json.dump(dict(rank=os.getpid(), child=child.pid), file)
    os.rename(file.name, os.path.join({folder!r}, f'reached.{{rank}}'))
{stage}
"""

_BODIES = {
    "queued": "reached()\ntime.sleep(600)",
    "starting": "reached()\ntime.sleep(600)",
    "running": "reached()\nwhile True: time.sleep(0.001)",
    "printing": "reached()\nwhile True: print('x' * 70)",
    "collective": "reached()\nif rank:\n    dist.barrier()\nelse:\n    time.sleep(600)",
    "results": "big = torch.ones(1 << 24)\nreached()",
}

# The longest time between the beginning of a stage and the signal, in seconds.
_DELAYS = {"queued": 1.5, "starting": 6.0, "running": 1.0, "printing": 1.0, "collective": 1.0, "results": 0.5}

_VICTIMS = {
    "queued": ("kernel", "gateway", "srun", "kernel and gateway"),
    "starting": ("kernel", "gateway", "srun", "shepherd", "srun and shepherd", "node", "launcher", "slurmstepd"),
}
_ALL_VICTIMS = (
    "kernel", "gateway", "kernel and gateway", "srun", "shepherd", "srun and shepherd", "node", "launcher", "agent",
    "rank", "child", "slurmstepd",
)  # fmt: skip

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)

# Of whose death by SIGKILL the run need not end.
_NOT_NEEDED = ("child", "shepherd")

# Seconds for what is only noticed when nothing more comes: nodes and the gateway live by a lease of 15 s.
_BY_ITSELF = 28.0
# Seconds beyond the grace period that an interrupt may take: for a node, then Slurm, then its client.
_BEYOND_GRACE = 12.0
# Seconds from the prompt, or the kernel's death, until nothing is left; and where a lease must run out, or a stopped
# process be killed by Slurm (KillWait).
_GONE = 10.0
_GONE_LATE = 32.0
_AT_MOST = 60.0


@dataclass(frozen=True)
class Plan:
    """One round.

    Attributes:
        number: Its number.
        stage: When the signal is sent.
        victim: To what; or to which two, at once.
        signum: Which signal.
        delay: Seconds from the beginning of the stage to the signal.
        which: Which of several such processes, from 0 to 1.
        goes_on: Whether what was stopped is continued after a second.
    """

    number: int
    stage: str
    victim: str
    signum: signal.Signals
    delay: float
    which: float
    goes_on: bool

    @classmethod
    def draw(cls, seed: int, number: int) -> Plan:
        """Draw a round."""
        chance = random.Random(f"{seed} {number}")
        stage = chance.choice(list(_BODIES))
        victim = chance.choice(_VICTIMS.get(stage, _ALL_VICTIMS))
        # Of two at once, both are to be gone.
        signum = signal.SIGKILL if " and " in victim or victim == "slurmstepd" else chance.choice(SIGNALS)
        return cls(
            number, stage, victim, signum, chance.uniform(0, _DELAYS[stage]), chance.random(), chance.random() < 0.5
        )

    def __str__(self) -> str:
        text = f"round {self.number}: {self.stage}: {self.signum.name} to {self.victim} after {self.delay:.3f} s"
        if self.signum == signal.SIGSTOP and self.goes_on:
            text += ", then SIGCONT"
        return text

    @property
    def ends_the_run(self) -> bool:
        """Whether the cell must return, or the kernel be gone, without an interrupt."""
        if self.stage == "results":
            return self.signum != signal.SIGSTOP
        return self.signum == signal.SIGKILL and self.victim not in _NOT_NEEDED

    @property
    def may_leave_folders(self) -> bool:
        """Whether Slurm kills all that is on a node, at once: its next run then deletes the files."""
        return any(word in self.victim for word in ("srun", "slurmstepd"))


def series(temp: Path, slurm: Slurm, others: Sequence[Kernel] = ()) -> Series[Plan]:
    """Return rounds on nodes.

    Args:
        temp: This process's temporary directory, and the kernels'.
        slurm: Where the nodes are.
        others: Kernels that are none of the rounds', and stay.
    """

    def start() -> Kernel:
        kernel = Kernel(env=slurm.env)
        kernel.ok(f"%load_ext nbddp\n%config DDPMagics.grace = {GRACE}")
        return kernel

    return Series(start, lambda plan, kernel: _Round(plan, kernel, slurm, temp, others).play(), slurm.restore, others)


class _Round(Round[Plan]):
    def __init__(self, plan: Plan, kernel: Kernel, slurm: Slurm, temp: Path, others: Sequence[Kernel]) -> None:
        super().__init__(plan, kernel, temp, others)
        self._slurm = slurm
        self._holder: subprocess.Popen[bytes] | None = None

    def play(self) -> Result:
        plan, result = self._plan, self._result
        try:
            request = self._begin()
            victims = self._victims(request)
            result.how.append(f"pids {[victim.pid for victim in victims]}" if victims else "there was no such process")
            self._strike(victims)
            self._wait_for_the_end(request)
        finally:
            self._let_go()
        if plan.signum == signal.SIGSTOP and request.reply.status == "ok":
            # Nobody has missed it, and whoever stopped it lets it go on.
            for victim in victims:
                with contextlib.suppress(psutil.Error):
                    victim.send_signal(signal.SIGCONT)
        for step in (self._look_for_leftovers, self._run_another):
            if not result.problems:
                step()
        if not result.problems and self._kernel.alive() and (left := self._left(True)):
            result.problems += [f"left after the next cell: {line}" for line in left]
        return result

    def _begin(self) -> Request:
        plan = self._plan
        self._folder.mkdir(exist_ok=True)
        for path in self._folder.iterdir():
            path.unlink()
        if plan.stage == "queued":
            env = {key: value for key, value in {**os.environ, **self._slurm.env}.items() if value is not None}
            self._holder = subprocess.Popen(
                ["srun", "--quiet", f"-N{NODES}", "--exclusive", "sleep", "600"],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wait_for(lambda: [job for job in self._slurm.squeue() if job["state"] == "RUNNING"], _AT_MOST)
        request = self._kernel.ask(_CELL.format(folder=str(self._folder), stage=_BODIES[plan.stage]))
        if plan.stage not in ("queued", "starting"):
            request.wait(_AT_MOST, lambda: len(self._reached()) == NODES)
            if len(self._reached()) != NODES:
                self._result.problems.append(f"the ranks never got there: {shown(request)}")
        time.sleep(plan.delay)
        return request

    def _reached(self) -> list[dict[str, int]]:
        return [json.loads(path.read_text()) for path in sorted(self._folder.glob("reached.*"))]

    def _let_go(self) -> None:
        """End the job that had the others wait."""
        if self._holder is not None:
            self._holder.terminate()
            self._holder.wait()
            self._holder = None

    def _victims(self, request: Request) -> list[psutil.Process]:
        """Return the processes that are to get the signal; wait for those that are still to be started."""
        while True:
            over = request.wait(0.005)
            found = []
            for kind in self._plan.victim.split(" and "):
                with contextlib.suppress(psutil.Error):
                    if some := self._candidates(kind):
                        found.append(some[int(self._plan.which * len(some))])
            if len(found) == len(self._plan.victim.split(" and ")):
                return found
            if over or self._result.problems:
                return []

    def _candidates(self, kind: str) -> list[psutil.Process]:
        kernel = psutil.Process(self._kernel.pid)
        if kind == "kernel":
            return [kernel]
        if kind == "slurmstepd":
            # Each has a child that only waits to be of use.
            steps = self._slurm.steps()
            return [step for step in steps if step.ppid() not in {other.pid for other in steps}]
        if kind in ("rank", "child"):
            return [psutil.Process(one[kind]) for one in self._reached()]
        ours = [process for process in kernel.children(recursive=True) if "nbddp._gateway" in _command(process)]
        if kind == "gateway":
            return ours
        sruns = [child for gateway in ours for child in gateway.children() if child.name() == "srun"]
        sruns = [one for one in sruns if "--test-only" not in one.cmdline()]
        if kind == "srun":
            return sruns
        if kind == "shepherd":
            return [child for srun in sruns for child in srun.children()]
        nodes = [process for process in marked() if "nbddp._node" in _command(process)]
        # What it has forked has its command line.
        nodes = sorted((one for one in nodes if "nbddp._node" not in _parents(one)), key=lambda one: one.pid)
        if kind == "node":
            return nodes
        launchers = [child for node in nodes for child in node.children() if "nbddp._launcher" in _command(child)]
        if kind == "launcher":
            return launchers
        return [psutil.Process(one["rank"]).parent() for one in self._reached()]

    def _strike(self, victims: Sequence[psutil.Process]) -> None:
        plan = self._plan
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(plan.signum)
        if plan.signum == signal.SIGSTOP and (plan.goes_on or plan.victim == "kernel"):
            time.sleep(1.0)
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.send_signal(signal.SIGCONT if plan.goes_on else signal.SIGKILL)

    # (a) The cell returns, or the kernel is gone.

    def _wait_for_the_end(self, request: Request) -> None:
        plan, result = self._plan, self._result
        began = time.monotonic()
        if not self._over(request, _BY_ITSELF if plan.ends_the_run else 0.5):
            if plan.ends_the_run:
                result.problems.append(f"the cell did not return by itself in {_BY_ITSELF:.0f} s")
            began = time.monotonic()
            self._kernel.interrupt()
            result.how.append("interrupted")
            if not self._over(request, GRACE + _BEYOND_GRACE):
                over = self._over(request, _AT_MOST)
                after = f"only after {time.monotonic() - began:.1f} s" if over else f"not in {_AT_MOST:.0f} s"
                result.problems.append(f"after an interrupt the cell returned {after}: {shown(request)}")
        if self._kernel.alive():
            message = request.reply.message.partition("\n")[0][:150]
            ending = f"{request.reply.status} {request.reply.error} {message}".strip()
            result.how.append(f"{ending or 'running'} after {time.monotonic() - began:.2f} s")
            if request.reply.error not in ("", "RunLostError", "RankError", "LaunchError", "KeyboardInterrupt"):
                result.problems.append(f"an error that says too little: {request.reply.traceback}")
        else:
            result.how.append(f"the kernel was gone after {time.monotonic() - began:.2f} s")
            if "kernel" not in plan.victim:
                result.problems.append("the kernel is gone, and nobody has hit it")

    # (b) Nothing is left.

    def _look_for_leftovers(self) -> None:
        began = time.monotonic()
        late = self._plan.signum == signal.SIGSTOP or "and" in self._plan.victim or self._plan.victim == "slurmstepd"
        limit = _GONE_LATE if late else _GONE
        while (left := self._left()) and time.monotonic() < began + limit:
            time.sleep(0.05)
        self._result.how.append(f"all gone after {time.monotonic() - began:.2f} s")
        self._result.problems += [f"left after {limit:.0f} s: {line}" for line in left]

    def _left(self, after_next: bool = False) -> list[str]:
        left = leftovers(self._temp, [self._kernel, *self._others])
        if not after_next and self._plan.may_leave_folders:
            left = [line for line in left if not line.startswith((f"{self._temp}/nbddp-", "/dev/shm/nbddp-"))]
        left += [f"job {job['id']}: {job['state']} {job['name']}" for job in self._slurm.squeue()]
        return [*left, *(f"slurmstepd {process.pid}" for process in self._slurm.steps())]

    # (c) The next cell simply works.

    def _run_another(self) -> None:
        if self._kernel.alive():
            self._see_that_it_works("%%ddp --nnodes 2 --cpus 1\nprint('again')", _AT_MOST)
            wait_for(lambda: not self._left(True), _GONE)


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _parents(process: psutil.Process) -> str:
    parent = process.parent()
    return "" if parent is None else _command(parent)
