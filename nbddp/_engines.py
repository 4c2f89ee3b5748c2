"""Engines: what reaches the nodes of a run. Slurm, ssh, and nodes that are only processes of this machine.

An engine is a way to have one command run on each node, with its stdin and stdout at this end. All else, what goes to
and fro, the ranks, their ends, is the same for all: `nbddp._gateway` at this end, `nbddp._node` at the other. So what a
new one has to say is short (``docs/engines.md`` has an example, ``tests/test_engines.py`` what each must pass):

- `Engine.refusal`: whether what is asked for can be had at all, before anything waits for it;
- `Engine.links`: the client commands that run the node's command, and which nodes each of them reaches;
- `Engine.hear`: what a line that such a client says means: a state to be shown, or just words;
- `Engine.waiting`: what is waited for, where a client says only that it waits;
- `Engine.reason`: what ends the nodes, as far as a client has said so;
- `Engine.explain`: why a client has ended, in a sentence with the node's name and the next step;
- `Engine.cancel`: commands that end what may be left there, whatever became of the client;
- `Engine.here`, on the node: which one this is, and its address for the others.
"""

from __future__ import annotations

import abc
import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from nbddp import _process
from nbddp._frames import LONG_LINE
from nbddp._placement import Placement

# The module of each; `nbddp._options.ENGINES` has their names.
_MODULES = {"slurm": "nbddp._slurm", "ssh": "nbddp._ssh", "local": "nbddp._engines"}

# Seconds that a question to an engine may take.
_ASK_SECONDS = 10.0

# Characters of a line of its words that are quoted.
_LONGEST_WORDS = 300

# What is being asked, by any thread; and whether nobody waits for answers any more.
_asking = threading.Lock()
_asked: set[subprocess.Popen[str]] = set()
_no_more = threading.Event()

# How a question was answered.
Answer = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Link:
    """A client that reaches nodes.

    Attributes:
        argv: Its command.
        nodes: The numbers of the nodes that get its stdin, and whose stdout is its own.
        env: Its environment; None for the notebook's.
        orphaned: The signal that it gets if the gateway dies; what runs on the nodes sees the end of its stdin.
        pumped: Whether it kills its nodes if nobody reads its output any more, so that somebody must.
    """

    argv: Sequence[str]
    nodes: Sequence[int]
    env: Mapping[str, str] | None = None
    orphaned: int = signal.SIGTERM
    pumped: bool = False


@dataclass(frozen=True)
class Here:
    """What an engine knows on a node.

    Attributes:
        number: The node's number, from 0.
        address: The address at which the other nodes reach it, if it is the first; None if there is only one.
        last: A command that ends this node's part of the job where nobody else can any more; empty if there is none.
        job: What the engine calls the job; empty if it has no name for it.
        name: What the engine calls the node; empty for its host name.
        line_limit: Bytes of a line that arrives whole.
        cores: How many cores are this node's, if not all that it sees.
    """

    number: int
    address: str | None = None
    last: Sequence[str] = ()
    job: str = ""
    name: str = ""
    line_limit: int = LONG_LINE
    cores: int | None = None


class Engine(abc.ABC):
    """What reaches the nodes of one run.

    Args:
        placement: The nodes.

    Attributes:
        title: What messages call it.
        answer_seconds: How long a node may take for its first word; None if it may have to wait in a queue.
        piecemeal: Whether it ends what is on a node one by one, so that ranks may be seen to die before it says why.
        client_seconds: How long a client, whose nodes have all said that they have ended, has for its own end.
        job: What the engine calls the job, once a node has said so; else empty.
    """

    title: ClassVar[str] = ""
    answer_seconds: ClassVar[float | None] = None
    piecemeal: ClassVar[bool] = False
    client_seconds: ClassVar[float] = 5.0

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.job = ""

    def refusal(self) -> str | None:
        """Return why the nodes cannot be had, and what to do; None if nothing speaks against it."""
        return None

    @abc.abstractmethod
    def links(self, command: Sequence[str]) -> Sequence[Link]:
        """Return the clients that run a command on each node; its last argument is to be added.

        Args:
            command: The node's command; what `here` is to be told there comes behind it.
        """

    def hear(self, words: str) -> str | None:
        """Return what state a line that a client says tells of; None if it is only to be kept."""
        return None

    def waiting(self) -> tuple[str, bool]:
        """Return what the nodes wait for, as a state to be shown, and whether they would wait for ever."""
        return "", False

    def reason(self, words: Sequence[str]) -> str | None:
        """Return what ends the nodes; None if what a client has said so far does not tell.

        Args:
            words: What it said last.
        """
        return None

    @abc.abstractmethod
    def explain(self, link: Link, status: int | None, words: Sequence[str]) -> str:
        """Return why a client has ended before its nodes have, or one of them by itself, in a sentence.

        Args:
            link: The client.
            status: Its exit status; minus a signal. None if it still runs.
            words: What it said last.
        """

    def cancel(self) -> Sequence[Sequence[str]]:
        """Return commands that end what may be left of the run on its nodes."""
        return ()

    @staticmethod
    @abc.abstractmethod
    def here(argument: str, env: Mapping[str, str]) -> Here:
        """Return what there is to know on the node.

        Args:
            argument: What `links` has put behind the command.
            env: The node's environment.
        """

    def name(self, node: int) -> str:
        """Return what users call a node."""
        return f"node{node}"


class Local(Engine):
    """Nodes that are processes of this machine: a run on several nodes as it would be, without any of them."""

    title = "local"

    def links(self, command: Sequence[str]) -> Sequence[Link]:
        """Return one client for each node: its process itself."""
        nodes = self.placement.nnodes
        return [Link([*command, f"{node}/{nodes}"], [node], self._env(node)) for node in range(nodes)]

    def _env(self, node: int) -> Mapping[str, str] | None:
        """Return a node's environment: of the GPUs of the machine it sees its part."""
        if not self.placement.visible:
            return None
        return {**os.environ, "CUDA_VISIBLE_DEVICES": self.placement.visible[node]}

    def explain(self, link: Link, status: int | None, words: Sequence[str]) -> str:
        """Return how the process ended."""
        return f"{self.name(link.nodes[0])} {how_it_ended(status)}{said(words)}"

    @staticmethod
    def here(argument: str, env: Mapping[str, str]) -> Here:
        """Return the number that stands behind the command; the nodes share this machine's cores."""
        number, nodes = map(int, argument.split("/"))
        return Here(number, "127.0.0.1", cores=_process.usable_cores() // nodes)


def of(placement: Placement) -> Engine:
    """Return the engine of a placement."""
    return kind(placement.engine)(placement)


def node_command(placement: Placement) -> list[str]:
    """Return what runs on each node, but for what the engine adds."""
    return [placement.python, "-P", "-m", "nbddp._node", placement.engine]


def kind(name: str) -> type[Engine]:
    """Return the class of an engine."""
    module = sys.modules[__name__] if name == "local" else importlib.import_module(_MODULES[name])
    found: type[Engine] = getattr(module, name.capitalize())
    return found


def how_it_ended(status: int | None) -> str:
    """Return how a process ended, from its exit status (negative: minus a signal; None: it has not)."""
    if status is None:
        return "was told to end from outside"
    if status < 0:
        try:
            return f"was killed by signal {-status} ({signal.Signals(-status).name})"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"ended with status {status}"


def said(words: Sequence[str]) -> str:
    """Return the end of a sentence that quotes what was said last."""
    # Another machine's words do not steer this one's terminal.
    printable = ("".join(c for c in one if c.isprintable())[:_LONGEST_WORDS] for one in words[-3:])
    return f". It said: {' | '.join(printable)}" if words else ""


def ask(argv: Sequence[str], env: Mapping[str, str] | None = None, seconds: float = _ASK_SECONDS) -> Answer | None:
    """Run a short command of an engine's; None if there is none of that name, or it does not answer.

    Args:
        argv: The command.
        env: Its environment; None for this process's.
        seconds: How long it may take.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**(os.environ if env is None else env), "LC_ALL": "C"},
            # Between fork and exec it only makes a system call.
            preexec_fn=_process.told_of_parents_death(os.getpid()),  # noqa: PLW1509
        )
    except OSError:
        return None
    with process:
        with _asking:
            _asked.add(process)
            if _no_more.is_set():
                process.kill()
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return None
        finally:
            with _asking:
                _asked.discard(process)
    return None if _no_more.is_set() else subprocess.CompletedProcess(argv, process.returncode, out, err)


def ask_no_more() -> None:
    """Have all that is being asked, by any thread, go unanswered at once; and what is asked from now on."""
    with _asking:
        _no_more.set()
        for process in _asked:
            process.kill()
