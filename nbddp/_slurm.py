"""Slurm: one ``srun`` for all nodes, in a job of its own or as a step of the allocation that the notebook runs in."""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Mapping, Sequence

from nbddp import _engines
from nbddp._engines import Engine, Here, Link, how_it_ended, said
from nbddp._frames import LONG_LINE, SHORT_LINE
from nbddp._placement import Placement
from nbddp._ssh import no_interpreter, no_package

_QUEUED = re.compile(r"job (\d+) queued and waiting for resources")
_ALLOCATED = re.compile(r"job (\d+) has been allocated resources")
_BUSY = re.compile(r"Job \d+ step creation temporarily disabled|Step creation temporarily disabled|step creation still")
_CANCELLED = re.compile(r"STEP (\S+) ON \S+ CANCELLED AT \S+(?: DUE TO (.*?))? \*\*\*", re.I)
_NODE_FAILED = re.compile(
    r"Node failure on (\S+)|error: .*?(\S+): .*(?:Communication connection failure|node fail)", re.I
)
_EXECVE = re.compile(r"execve\(\):? (\S+): No such file|No such file or directory")

# What would have srun ask for less, or something else, than its options say, inherited from the notebook's own job.
_INHERITED = (
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_DISTRIBUTION",
    "SLURM_CPUS_PER_TASK", "SLURM_CPU_BIND", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_GPU",
    "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_STEP_ID",
    "SLURM_STEPID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_EXACT", "SLURM_UNBUFFEREDIO",
    "SLURM_LABELIO", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_HOSTFILE",
)  # fmt: skip


class Slurm(Engine):
    """Nodes of a cluster."""

    title = "Slurm"

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        # The notebook runs inside a job: on it the ranks run as a step.
        self._allocation = os.environ.get("SLURM_JOB_ID")
        self._job: str | None = None

    def refusal(self) -> str | None:
        """Ask Slurm whether such a job could ever run."""
        asked = self.placement
        if self._allocation is not None:
            there = int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES") or asked.nnodes)
            if asked.nnodes > there:
                return (
                    f"--nnodes {asked.nnodes}: this notebook runs in Slurm's job {self._allocation}, which has "
                    f"{there} node{'s' if there > 1 else ''}. Ask for no more, or start the notebook in a larger job"
                )
            return None
        answer = _engines.ask(["srun", "--test-only", *self._asked(), "true"])
        if answer is None:
            return "Slurm does not answer, or there is no srun on PATH. Does 'sinfo' work in a terminal?"
        if answer.returncode:
            words = [line.removeprefix("srun: ").removeprefix("error: ") for line in answer.stderr.splitlines()]
            request = " ".join(self._asked())
            return f"Slurm cannot place this on its nodes: {'; '.join(words)}. Asked for: srun {request}"
        return None

    def _asked(self) -> list[str]:
        """Return what is asked for; what the user says wins over what nbddp does."""
        asked = self.placement
        options = [f"--job-name={asked.job}", f"--nodes={asked.nnodes}", f"--ntasks={asked.nnodes}"]
        options += ["--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        if self._allocation is not None:
            # Or the step would wait for the CPUs that the notebook's own step has.
            options += [f"--jobid={self._allocation}", "--overlap", "--mem=0"]
        elif "--cpus-per" not in asked.slurm and " -c" not in f" {asked.slurm}":
            options += [f"--cpus-per-task={asked.ranks_per_node}"]
        if asked.gpus and self._allocation is None and "--gpus" not in asked.slurm and "--gres" not in asked.slurm:
            options += [f"--gpus-per-node={asked.ranks_per_node}"]
        return [*options, *shlex.split(asked.slurm)]

    def links(self, command: Sequence[str]) -> Sequence[Link]:
        """Return the one client for all nodes: it copies its stdin to each, and prints what they print."""
        env = {name: value for name, value in os.environ.items() if name not in _INHERITED}
        return [Link(["srun", *self._asked(), *command, "-"], range(self.placement.nnodes), env)]

    def hear(self, words: str) -> str | None:
        """Tell what srun says of the queue."""
        if found := _QUEUED.search(words):
            self._job = found[1]
            return f"Slurm's job {found[1]} waits in the queue"
        if found := _ALLOCATED.search(words):
            self._job = found[1]
            return f"Slurm's job {found[1]} begins"
        if _BUSY.search(words):
            return "waits for a place in the notebook's allocation"
        return None

    def explain(self, link: Link, status: int, words: Sequence[str]) -> str:
        """Tell why the job has ended."""
        text = "\n".join(words)
        if found := _CANCELLED.search(text):
            reason = (found[2] or "").lower()
            if "time limit" in reason:
                return f"Slurm ended step {found[1]}: its time limit was reached. --slurm '--time=...' asks for more"
            if "preempt" in reason:
                return f"Slurm ended step {found[1]} to make room for another job (preemption)"
            if "node failure" in reason or "node fail" in reason:
                return f"Slurm ended step {found[1]}: a node has failed{_which_node(text)}"
            return f"Slurm's step {found[1]} was cancelled from outside (scancel)" + (f": {reason}" if reason else "")
        if found := _NODE_FAILED.search(text):
            return f"a node of Slurm's job has failed{_which_node(text)}{said(words)}"
        if _EXECVE.search(text):
            return f"on Slurm's nodes {no_interpreter(self.placement.python)}{said(words)}"
        if "No module named" in text and "nbddp" in text:
            return f"on Slurm's nodes {no_package(self.placement.python)}"
        return f"srun {how_it_ended(status)}{said(words)}"

    def cancel(self) -> Sequence[Sequence[str]]:
        """Cancel the job by its name, which no other has; a step ends with its srun."""
        if self._allocation is not None:
            return ()
        return [["scancel", f"--name={self.placement.job}"]]

    @staticmethod
    def here(argument: str, env: Mapping[str, str]) -> Here:
        """Return which task this is, and the address of the interface that leads to where the job was started."""
        job, step = env.get("SLURM_JOB_ID", ""), env.get("SLURM_STEP_ID", "0")
        alone = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS")) == "1"
        return Here(
            int(env["SLURM_PROCID"]),
            _own_address(env),
            ["scancel", f"{job}.{step}"] if job else (),
            f"{job}.{step}",
            LONG_LINE if alone else SHORT_LINE,
        )


def _which_node(text: str) -> str:
    names = dict.fromkeys(re.findall(r"(?:error|on) (?:Node failure on )?(\S+?)[:,]? ", text))
    del names
    found = re.search(r"Node failure on (\S+)", text)
    return f" ({found[1].rstrip(',')})" if found else ""


def _own_address(env: Mapping[str, str]) -> str | None:
    """Return this node's address on the network over which Slurm has reached it."""
    towards = env.get("SLURM_LAUNCH_NODE_IPADDR") or env.get("SLURM_SRUN_COMM_HOST")
    if not towards:
        return None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as one:
                # Nothing is sent: it only has the system choose the way.
                one.connect(address)
                return str(one.getsockname()[0])
    except OSError:
        return None
    return None
