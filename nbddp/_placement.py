"""Where the ranks of a run on several nodes are placed: what the user asks for, as all processes of the run see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Placement:
    """The nodes of a run; crosses sockets as JSON.

    Attributes:
        engine: The name of the engine that reaches them; see `nbddp._engines`.
        nnodes: How many there are.
        ranks_per_node: How many ranks each has.
        gpus: Whether each rank is to have a GPU.
        strict: Whether nodes without any GPU are refused, instead of taking ranks on their CPUs.
        hosts: What ssh calls them.
        slurm: Options for ``srun``.
        python: The interpreter there.
        job: The name of the job.
    """

    engine: str
    nnodes: int
    ranks_per_node: int
    gpus: bool = False
    strict: bool = False
    hosts: Sequence[str] = ()
    slurm: str = ""
    python: str = ""
    job: str = ""

    @property
    def ranks(self) -> int:
        """How many ranks there are on all nodes."""
        return self.nnodes * self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """Return the number of the node that a rank is on."""
        return rank // self.ranks_per_node

    def named(self) -> str:
        """Return how many nodes there are, in words."""
        return "1 node" if self.nnodes == 1 else f"{self.nnodes} nodes"


@dataclass
class Nodes:
    """What is known in the kernel of the nodes of a run, while it lasts.

    Attributes:
        placement: What was asked for.
        stage: What they are at, before there are ranks.
        hosts: Their names, by number.
        lost: What has ended the run, if it was not its ranks.
        agent_words: What a torchrun agent on a node has said last, if it could not start its ranks.
        note: Shows a line that a node has to say.
    """

    placement: Placement
    stage: str = ""
    hosts: dict[int, str] = field(default_factory=dict)
    lost: str | None = None
    agent_words: Sequence[str] = ()
    note: Callable[[str], None] = lambda _: None

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take what the gateway says of them."""
        match message["kind"]:
            case "state":
                self.stage = message["text"]
            case "nodes":
                self.hosts = {int(number): host for number, host in message["hosts"].items()}
            case "note":
                self.note(f"nbddp: {message['text']}")
            case "agent log":
                self.agent_words = message["lines"]
            case "lost":
                self.lost = message["reason"]

    def name_of(self, rank: int) -> str:
        """Return what a rank's node is called, with its host; empty if there is only one node."""
        if self.placement.nnodes == 1:
            return ""
        return self.called(self.placement.node_of(rank))

    def called(self, node: int) -> str:
        """Return what a node is called, with its host if that is known."""
        # By the name that its user knows it by, where he has given one.
        host = self.placement.hosts[node] if self.placement.hosts else self.hosts.get(node)
        return f"node{node} ({host})" if host else f"node{node}"
