"""From the first word of each node to the moment when all may start; and once more after a failure."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from nbddp._clients import Clients, NodeState
from nbddp._frames import PROTOCOL, Message
from nbddp._placement import Placement
from nbddp._shipping import Shipping
from nbddp._tasks import Tasks


class Assembly:
    """Brings the nodes of a run together.

    Args:
        launch: What is to be launched; see `nbddp._agent.Launch`.
        files: What the nodes need before they start: paths by name.
        nodes: The nodes, by number.
        clients: What reaches them.
        shipping: What sends them files.
        tasks: Where what goes on beside is kept.
        tell: Tells the kernel something.
        lose: Called with why the run cannot be.

    Attributes:
        attempt: How often all ranks have been started again.
        started: Whether the nodes have been told to start.
    """

    def __init__(
        self,
        launch: Message,
        files: Mapping[str, str],
        nodes: Mapping[int, NodeState],
        clients: Clients,
        shipping: Shipping,
        tasks: Tasks,
        *,
        tell: Callable[..., None],
        lose: Callable[[str], None],
    ) -> None:
        self._launch = launch
        self._placement = Placement(**launch["placement"])
        self._files = files
        self._nodes = nodes
        self._clients, self._shipping, self._tasks = clients, shipping, tasks
        self._tell, self._lose = tell, lose
        self._endpoint = ""
        self._sent = False
        self.attempt = 0
        self.started = False

    def greet(self, node: NodeState, hello: Message) -> None:
        """Take a node's first word; after the last node's, send them what they need."""
        node.hello = hello
        if (problem := _different(hello, self._launch["versions"])) is not None:
            self._lose(f"{self._clients.called(node)}: {problem}")
        elif all(other.hello for other in self._nodes.values()):
            hosts = {str(number): other.hello["host"] for number, other in self._nodes.items()}
            self._tell("nodes", hosts=hosts)
            self._tasks.spawn(self._prepare())

    async def _prepare(self) -> None:
        launch, placement, send = self._launch, self._placement, self._clients.send
        send(-1, "beat", t=time.monotonic())
        setup: dict[str, Any] = {
            name: launch[name] for name in ("env", "cwd", "umask", "max_restarts", "start_method", "mark", "run_dir")
        }
        send(
            -1,
            "launch",
            **setup,
            ranks=placement.ranks_per_node,
            nnodes=placement.nnodes,
            package=os.path.dirname(os.path.abspath(__file__)),
        )
        if placement.gpus:
            send(-1, "count")
        if placement.nnodes > 1:
            send(0, "meet")
        self._tell("state", text=f"{placement.named()} load torch")
        await self._shipping.ship(self._files)
        self._sent = True
        self.start_if_ready()

    def meet(self, endpoint: str) -> None:
        """Take note where the first node serves the store; the others look whether they reach it."""
        self._endpoint = endpoint
        if self.started:
            self._clients.send(-1, "restart", attempt=self.attempt, endpoint=endpoint)
            return
        for number in range(1, self._placement.nnodes):
            self._clients.send(number, "reach", endpoint=endpoint)

    def may_restart(self) -> bool:
        """Tell whether all ranks may be started again; on one node torchrun does that."""
        restarts = int(self._launch["max_restarts"]) if self._placement.nnodes > 1 else 0
        return self.attempt < restarts

    def restart(self) -> None:
        """Have all ranks started again."""
        self.attempt += 1
        # The keys of the attempt before would mislead agents and ranks: another store.
        self._clients.send(0, "meet")

    def start_if_ready(self) -> None:
        """Have the nodes start, once each has what it needs, reaches the first, and has said what GPUs it has."""
        placement, nodes = self._placement, self._nodes
        ready = self._sent and all(node.reaches for number, node in nodes.items() if number)
        counted = not placement.gpus or all(node.gpus is not None for node in nodes.values())
        if self.started or not (ready and counted):
            return
        gpus = placement.gpus
        few = [node for node in nodes.values() if gpus and (node.gpus or 0) < placement.ranks_per_node]
        if few and (placement.strict or any(node.gpus for node in nodes.values())):
            have = " and ".join(
                f"{self._clients.called(node)} has {node.gpus or 'no'} GPU{'' if node.gpus == 1 else 's'}"
                for node in few
            )
            self._lose(f"--gpus {placement.ranks_per_node}: {have}. --cpus runs ranks on the CPU")
            return
        if few:
            gpus = False
            what = f"there is no GPU on {placement.named()}; {placement.ranks} ranks on the CPU, over gloo"
            self._tell("note", text=what)
        self.started = True
        self._clients.send(-1, "start", endpoint=self._endpoint or None, gpus=gpus)
        self._tell("state", text="ranks start")


def _different(hello: Message, ours: Mapping[str, str]) -> str | None:
    """Return in what a node's versions differ from the notebook's so that a run cannot be; None if in nothing."""
    if hello["protocol"] != PROTOCOL or hello["nbddp"] != ours["nbddp"]:
        return (
            f"it has nbddp {hello['nbddp']}, and the notebook {ours['nbddp']} ({hello['executable']}). Install the "
            "same version on all nodes"
        )
    mine, its = ours["python"].split("."), hello["python"].split(".")
    if mine[:2] != its[:2]:
        return (
            f"it has Python {hello['python']}, and the notebook {ours['python']} ({hello['executable']}): code that is "
            "pickled by one cannot be run by the other. --python PATH names another interpreter there"
        )
    if not hello["torch"]:
        return f"{hello['executable']} has no torch"
    if _release(hello["torch"]) != _release(ours["torch"]):
        return (
            f"it has torch {hello['torch']}, and the notebook {ours['torch']} ({hello['executable']}). Install the "
            "same release on all nodes"
        )
    return None


def _release(version: str) -> str:
    return version.partition("+")[0]
