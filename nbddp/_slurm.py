"""Slurm: one ``srun`` for all nodes, in a job of its own or as a step of the allocation that the notebook runs in."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nbddp import _engines
from nbddp._engines import Engine, Here, Link, how_it_ended, said
from nbddp._frames import LONG_LINE, SHORT_LINE
from nbddp._placement import Placement
from nbddp._ssh import no_interpreter, no_package

_QUEUED = re.compile(r"job (\d+) queued and waiting for resources")
_ALLOCATED = re.compile(r"job (\d+) has been allocated resources")
_BUSY = re.compile(r"Job \d+ step creation temporarily disabled|Step creation temporarily disabled|step creation still")
_CANCELLED = re.compile(r"(?:STEP|JOB) (\S+) ON \S+ CANCELLED AT \S+(?: DUE TO (.*?))? \*\*\*")
_ENDING = re.compile(r"CANCELLED AT|Job step aborted|Terminating StepId")
_NODE_FAILED = re.compile(r"Node failure on ([^\s,]+)")
_TASK_ENDED = re.compile(r"error: (\S+): tasks? (\d+)\S*: (?!Terminated|Running)(.+)")
_EXECVE = re.compile(r"slurmstepd-(\S+?): error: execve\(\):? \S+: (.+)")
_NO_MODULE = re.compile(r"No module named '?nbddp|ModuleNotFoundError: .*nbddp")
_REVOKED = re.compile(r"Job allocation \d+ has been revoked|Job has been cancelled")
_NO_CONTROLLER = re.compile(r"Unable to contact slurm controller|Socket timed out on send/recv")

# What would have srun ask for less, or something else, than its options say, inherited from the notebook's own job.
_INHERITED = (
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_DISTRIBUTION",
    "SLURM_CPUS_PER_TASK", "SLURM_CPU_BIND", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_GPU",
    "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SLURM_STEP_ID",
    "SLURM_STEPID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_EXACT", "SLURM_UNBUFFEREDIO",
    "SLURM_LABELIO", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_HOSTFILE",
)  # fmt: skip

# Options of srun with which nbddp would not find its nodes, their output or the job again, and what is to be said.
_ONE_TASK = "a node has one task, below which its ranks are; --gpus or --cpus says how many"
_THROUGH = "what ranks print comes through srun; %ddp log has it"
_OWN = {
    "-N": "--nnodes says how many nodes",
    "--nodes": "--nnodes says how many nodes",
    "-n": _ONE_TASK,
    "--ntasks": _ONE_TASK,
    "--ntasks-per-node": _ONE_TASK,
    "--multi-prog": _ONE_TASK,
    "-J": "nbddp finds the job by its name",
    "--job-name": "nbddp finds the job by its name",
    "--jobid": "a notebook that runs in a job uses that",
    **dict.fromkeys(("-o", "--output", "-e", "--error", "-i", "--input"), _THROUGH),
    **dict.fromkeys(("-l", "--label", "-u", "--unbuffered", "--pty"), _THROUGH),
    **dict.fromkeys(("-h", "--help", "--usage", "-V", "--version", "--test-only"), "there is nothing to be run then"),
}

# Reasons to wait that nothing but another request changes.
_FOR_EVER = (
    "PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints", "DependencyNeverSatisfied", "InvalidAccount",
    "InvalidQOS",
)  # fmt: skip

# A node's states in which it will take no job; a star says that it does not answer.
_UNUSABLE = re.compile(r"down|drain|fail|inval|unk|.*\*")

# Seconds that Slurm has to say whether a job could run, before it is asked whether it is there at all.
_PLACE_SECONDS = 3.0
_PING_SECONDS = 3.0


class _Machine(NamedTuple):
    """What Slurm says of one of its nodes."""

    name: str
    state: str
    cpus: int
    gpus: int
    why: str


class Slurm(Engine):
    """Nodes of a cluster."""

    title = "Slurm"
    piecemeal = True

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        # The notebook runs inside a job: on it the ranks run as a step.
        self._allocation = os.environ.get("SLURM_JOB_ID")
        self._queued: str | None = None
        # Whether Slurm can be asked for GPUs.
        self._knows_gpus = True

    # What is asked for.

    def refusal(self) -> str | None:
        """Ask Slurm whether such a job could ever run."""
        if (wrong := _not_for_us(shlex.split(self.placement.slurm))) is not None:
            return wrong
        if shutil.which("srun") is None:
            return "there is no srun on PATH. A notebook on a login node of the cluster has it"
        if self._allocation is not None:
            return self._refusal_in_allocation(self._allocation)
        answer = self._try()
        if answer is None:
            # It waits for minutes for a controller that is not there; whether there is one is known at once.
            ping = _engines.ask(["scontrol", "ping"], self._env(), _PING_SECONDS)
            if ping is not None and "UP" not in ping.stdout:
                return (
                    f"Slurm's controller does not answer ({_first_line(ping.stdout)}). Does 'sinfo' work in a terminal?"
                )
            return None  # it is busy; srun has more patience
        if answer.returncode == 0:
            return None
        machines = self._machines()
        if self.placement.gpus and machines and not any(machine.gpus for machine in machines):
            # Its nodes may have some all the same; and if they have none, the ranks run on their CPUs.
            self._knows_gpus = False
            answer = self._try() or answer
            if answer.returncode == 0:
                return None
        words = [re.sub(r"^srun: (error: )?|^allocation failure: ", "", line) for line in answer.stderr.splitlines()]
        why = self._shortage(machines) or "; ".join(word for word in words if word and word != "No error")
        return f"Slurm can never place this: {why}. Asked for: srun {shlex.join(self._asked())}"

    def _refusal_in_allocation(self, job: str) -> str | None:
        asked = self.placement
        there = int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES") or asked.nnodes)
        if asked.nnodes <= there:
            return None
        return (
            f"--nnodes {asked.nnodes}: this notebook runs in Slurm's job {job}, which has {_count(there, 'node')}. Ask "
            "for no more, or start the notebook in a larger job; after del os.environ['SLURM_JOB_ID'] runs are jobs of "
            "their own"
        )

    def _try(self) -> _engines.Answer | None:
        return _engines.ask(["srun", "--test-only", *self._asked(), "true"], self._env(), _PLACE_SECONDS)

    def _asked(self) -> list[str]:
        """Return what is asked for; what the user says wins over what nbddp does."""
        asked = self.placement
        options = [f"--job-name={asked.job}", f"--nodes={asked.nnodes}", f"--ntasks={asked.nnodes}"]
        # A node that is done first must not end the others, whatever the site's WaitTime is.
        options += ["--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=0"]
        words = shlex.split(asked.slurm)
        if self._allocation is not None:
            # Or the step would wait for the CPUs that the notebook's own step has.
            options += [f"--jobid={self._allocation}", "--overlap", "--mem=0"]
        elif not _has(words, "-c", "--cpus-per-"):
            options += [f"--cpus-per-task={asked.ranks_per_node}"]
        if asked.gpus and self._allocation is None and self._knows_gpus and not _has(words, "-G", "--gpus", "--gres"):
            options += [f"--gpus-per-node={asked.ranks_per_node}"]
        return [*options, *words]

    def _env(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in _INHERITED}

    def _machines(self) -> list[_Machine]:
        """Return the nodes of the partition that is asked for."""
        partition = self._partition()
        command = ["sinfo", "--noheader", "--all", "--Node", "--format=%P|%N|%T|%c|%G|%E"]
        answer = _engines.ask([*command, f"--partition={partition}"] if partition else command, self._env())
        machines = []
        for line in answer.stdout.splitlines() if answer is not None else ():
            of, name, state, cpus, gres, why = line.split("|", 5)
            if partition or of.endswith("*"):
                gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
                machines.append(_Machine(name, state, int(re.sub(r"\D", "", cpus) or 0), gpus, why))
        return machines

    def _partition(self) -> str:
        words = shlex.split(self.placement.slurm)
        for word, following in itertools.pairwise([*words, ""]):
            if word in ("-p", "--partition"):
                return following
            if word.startswith("--partition="):
                return word.partition("=")[2]
            if word.startswith("-p"):
                return word[2:]
        return os.environ.get("SLURM_PARTITION", "")

    def _shortage(self, machines: Sequence[_Machine]) -> str:
        """Return what there is too little of; empty if it is not nodes, CPUs or GPUs."""
        asked, words = self.placement, shlex.split(self.placement.slurm)
        partition = self._partition()
        of = f"partition {partition}" if partition else "the default partition"
        if not machines:
            return ""
        if len(machines) < asked.nnodes:
            names = ", ".join(machine.name for machine in machines[:8])
            return f"--nnodes {asked.nnodes}, and {of} has {_count(len(machines), 'node')} ({names})"
        if asked.gpus and self._knows_gpus and not _has(words, "-G", "--gpus", "--gres"):
            able = [machine for machine in machines if machine.gpus >= asked.ranks_per_node]
            if len(able) < asked.nnodes:
                most = max(machine.gpus for machine in machines)
                return (
                    f"--gpus {asked.ranks_per_node} on {_count(asked.nnodes, 'node')}, and {of} has {len(able)} with "
                    f"as many (the most is {most})"
                )
        if not _has(words, "-c", "--cpus-per-"):
            able = [machine for machine in machines if machine.cpus >= asked.ranks_per_node]
            if len(able) < asked.nnodes:
                most = max(machine.cpus for machine in machines)
                return (
                    f"{asked.ranks_per_node} ranks on a node, with a CPU each, on {_count(asked.nnodes, 'node')}, and "
                    f"{of} has {len(able)} with as many CPUs (the most is {most}); --slurm '--cpus-per-task={most}' "
                    "has ranks share them"
                )
        down = [machine for machine in machines if _UNUSABLE.match(machine.state)]
        if len(machines) - len(down) < asked.nnodes:
            states = ", ".join(
                f"{machine.name} is {machine.state}" + (f" ({machine.why})" if machine.why not in ("none", "") else "")
                for machine in down[:8]
            )
            return f"--nnodes {asked.nnodes}, and of {of}'s {_count(len(machines), 'node')} too few are up: {states}"
        return ""

    # What runs.

    def links(self, command: Sequence[str]) -> Sequence[Link]:
        """Return the one client for all nodes: it copies its stdin to each, and prints what they print."""
        whose = "step" if self._allocation is not None else "job"
        # If the gateway is killed: SIGUSR1 takes srun's job out of the queue. One that runs is passed it on, and its
        # nodes see the end of their stdin, and clear up. SIGTERM or SIGPIPE would have them killed before that; SIGINT,
        # too, since it comes once for each thread that the gateway had.
        srun = ["srun", *self._asked(), *command, whose]
        return [Link(srun, range(self.placement.nnodes), self._env(), orphaned=signal.SIGUSR1, pumped=True)]

    def hear(self, words: str) -> str | None:
        """Tell what srun says of the queue."""
        if found := _QUEUED.search(words):
            self._queued = found[1]
            return f"Slurm's job {found[1]} waits in the queue"
        if found := _ALLOCATED.search(words):
            self._queued = None
            return f"Slurm's job {found[1]} begins"
        if _BUSY.search(words):
            return "waits for a place in the notebook's allocation"
        return None

    def waiting(self) -> tuple[str, bool]:
        """Ask why the job is not there yet."""
        if (job := self._queued) is None:
            return "", False
        answer = _engines.ask(["squeue", "--noheader", f"--jobs={job}", "--states=PENDING", "--format=%r"], self._env())
        reason = "" if answer is None or answer.returncode else _first_line(answer.stdout)
        if reason in ("", "None") or self._queued is None:
            return "", False
        if reason in _FOR_EVER:
            return f"Slurm's job {job} would wait in the queue for ever: {reason}", True
        return f"Slurm's job {job} waits in the queue ({reason})", False

    def reason(self, words: Sequence[str]) -> str | None:
        """Tell what srun has said of the end of its job."""
        first = next((index for index, line in enumerate(words) if _ENDING.search(line)), len(words))
        text = "\n".join(words)
        if found := _NODE_FAILED.search(text):
            return f"a node of Slurm's job has failed ({found[1]}): sinfo -R may say why. A new run gets other nodes"
        if (found := _CANCELLED.search(text)) and found[2]:
            return _why_cancelled(found[1], found[2].lower())
        if "oom_kill" in text or "Out Of Memory" in text:
            return (
                f"Slurm ended the job for want of memory. --slurm '--mem=...' asks for more on each node{said(words)}"
            )
        # What a task of its own accord has said before the others were ended.
        if tasks := [task for line in words[:first] if (task := _TASK_ENDED.search(line))]:
            return self._how_tasks_ended(tasks, text, words)
        if self._queued is not None and _REVOKED.search(text):
            return f"Slurm's job {self._queued} was cancelled while it waited in the queue (scancel)"
        if _NO_CONTROLLER.search(text):
            return f"Slurm's controller does not answer{said(words)}. Does 'sinfo' work in a terminal?"
        return None

    def _how_tasks_ended(self, tasks: Sequence[re.Match[str]], text: str, words: Sequence[str]) -> str:
        # With srun's words for several tasks in one line, the nodes' names are in brackets.
        names = " and ".join(dict.fromkeys(f"node{t[2]} ({t[1]})" if "[" not in t[1] else t[1] for t in tasks))
        if found := _EXECVE.search(text):
            if "No such file" in found[2]:
                return f"{names}: {no_interpreter(self.placement.python)}"
            return f"{names}: {self.placement.python} cannot be run there: {found[2].lower()}"
        if _NO_MODULE.search(text):
            return f"{names}: {no_package(self.placement.python)}"
        if (how := tasks[0][3]).startswith("Exited"):
            quoted = [line for line in words if not line.startswith(("srun:", "slurmstepd"))]
            return f"{names}: nbddp's process there ended ({how.lower()}){said(quoted or words)}"
        return f"{names}: nbddp's process there was ended from outside ({how.lower()})"

    def explain(self, link: Link, status: int | None, words: Sequence[str]) -> str:
        """Tell why the job has ended."""
        if (reason := self.reason(words)) is not None:
            return reason
        if found := _CANCELLED.search("\n".join(words)):
            return f"Slurm's step {found[1]} was cancelled from outside (scancel)"
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
        # A job whose srun is gone would go on without any step; one in which a notebook lives is none of nbddp's.
        whose = job if argument == "job" else f"{job}.{step}"
        return Here(
            int(env["SLURM_PROCID"]),
            _own_address(env),
            ["scancel", whose] if job else (),
            f"{job}.{step}",
            env.get("SLURMD_NODENAME", ""),
            LONG_LINE if alone else SHORT_LINE,
            # Not every site binds a task to the CPUs that it has.
            int(env["SLURM_CPUS_ON_NODE"]) if env.get("SLURM_CPUS_ON_NODE", "").isdigit() else None,
        )


def _why_cancelled(step: str, reason: str) -> str:
    if "time limit" in reason:
        return f"Slurm ended step {step}: its time limit was reached. --slurm '--time=...' asks for more"
    if "preempt" in reason:
        return (
            f"Slurm ended step {step} to make room for another job (preemption). Another partition or QOS "
            "may have jobs that stay: --slurm '--partition=...'"
        )
    if "node fail" in reason:
        return (
            f"Slurm ended step {step}: a node has failed; sinfo -R may say which, and why. A new run gets other nodes"
        )
    return f"Slurm ended step {step}: {reason}"


def _not_for_us(words: Sequence[str]) -> str | None:
    """Return what is wrong with options that a user gives for srun."""
    before = ""
    for word in words:
        if not word.startswith("-"):
            if not before.startswith("-") or "=" in before or len(before) > 2 > before.count("-"):
                return f"--slurm: {word!r} is no option of srun's; nbddp itself says what is to be run"
        else:
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            if (why := _OWN.get(name)) is not None:
                return f"--slurm {name}: {why}. Leave it out"
        before = word
    return None


def _has(words: Sequence[str], short: str, *long: str) -> bool:
    return any(word.startswith(long) or (word.startswith(short) and not word.startswith("--")) for word in words)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


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
