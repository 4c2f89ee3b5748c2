"""The gateway: the process between a notebook and the nodes of one run.

::

    kernel ──channel: launch, finish, kill─────┐              ┌── client (srun, ssh) ── node 0 ── ranks
           <─ started, state, lost, ended ───  gateway ───────┤
           <─ a socket and a pipe for each rank ┘             └── client ── node 1 ── ranks

To the kernel it is what the launcher is for a run on its own machine, and each rank is a connection to the run's
socket, as there: so the kernel follows both in the same way. It is a process of its own since it must go on beating
while the kernel computes: its beats are what the nodes live by. Results and stacks that come from nodes are written to
the run's directory, where the kernel looks for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from nbddp import _engines, _process, _wire
from nbddp._assembly import Assembly
from nbddp._clients import EXPLAIN_LOOK_SECONDS, EXPLAIN_LOOKS, Clients, NodeState
from nbddp._errors import NbddpError
from nbddp._frames import Frame, FrameError, Message
from nbddp._outcome import INTERRUPTED
from nbddp._paths import RunDir, remove_session
from nbddp._placement import Placement
from nbddp._rank_proxies import RankProxies
from nbddp._shipping import Shipping
from nbddp._tasks import Tasks

# Seconds that nodes have to say that all is gone, after they were told to kill, before the engine is asked to end them.
_KILL_SECONDS = 2.5

# Seconds that nodes have to end by themselves, once all ranks have reported. Longest is NCCL's clean-up.
_FINISH_SECONDS = 10.0

# For how many looks something is held back, since the engine may be behind it; and what comes after that, too.
_HELD_LOOKS = 8
_SIGNALLED = (-signal.SIGTERM, -signal.SIGKILL)
_HELD = ("died", "agent end", "agent gone", "refused", "ended", "from")


class Gateway:
    """The event loop of one run's gateway.

    Args:
        channel: The kernel's channel.
        kernel: The kernel's pid.
        launch: What is to be launched; see `nbddp._agent.Launch`.
        files: What the nodes need before they start: paths by name.
    """

    def __init__(self, channel: socket.socket, kernel: int, launch: Message, files: Mapping[str, str]) -> None:
        self._channel = channel
        self._inbox = _wire.Inbox(channel)
        self._kernel = kernel
        self._pidfd = _process.open_pidfd(kernel)
        placement = Placement(**launch["placement"])
        self._placement = placement
        self._run_dir = RunDir.adopt(launch["run_dir"])
        self._engine = _engines.of(placement)
        self._nodes = {number: NodeState(number) for number in range(placement.nnodes)}
        self._tasks = Tasks(self._task_failed)
        self._clients = Clients(
            self._engine,
            self._nodes,
            self._tasks,
            take=self._take,
            lose=self._lose,
            state=self._state,
            crowded=lambda: self._ranks.crowded,
        )
        self._ranks = RankProxies(self._run_dir, placement, self._clients.send, self._hear_for_rank)
        self._shipping = Shipping(self._clients.send, self._clients.drain, self._tasks, placement.named(), self._state)
        self._assembly = Assembly(
            launch,
            files,
            self._nodes,
            self._clients,
            self._shipping,
            self._tasks,
            tell=self._tell,
            lose=self._lose,
        )
        # How the run ends: not yet, by itself, or at once.
        self._finishing = self._killing = False
        self._told_lost = False

    # The kernel.

    def _tell(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # the kernel is gone; that is seen elsewhere
            self._channel.setblocking(True)
            _wire.send(self._channel, kind, **fields)

    def _state(self, text: str) -> None:
        self._tell("state", text=text)

    def _hear_kernel(self) -> None:
        self._channel.setblocking(False)
        for message in self._inbox.receive():
            match message["kind"]:
                case "finish":
                    self._finish()
                case "kill":
                    self._kill()
                case "stack":
                    self._ranks.ask_for_stack(message["rank"])
                case "unsend":
                    if self._shipping.drop(message["rank"]):
                        self._ranks.answer_for(message["rank"], INTERRUPTED)
                case "signal":
                    self._ranks.signal(message)
        if self._inbox.closed:
            self._kernel_is_gone()

    def _kernel_is_gone(self) -> None:
        loop = asyncio.get_running_loop()
        # Both stay readable for ever.
        loop.remove_reader(self._channel.fileno())
        if self._pidfd is not None:
            loop.remove_reader(self._pidfd)
        self._kill()

    def _hear_for_rank(self, number: int, message: Message) -> None:
        """Pass on what the kernel says to a rank."""
        node, send = self._placement.node_of(number), self._clients.send
        path = message.get("closure")
        if message["kind"] != "cell" or path is None:
            send(node, "tell", rank=number, message=message)
            return
        # What it uses goes to each node once, and before the first rank is told.
        name = os.path.basename(path)
        told = {**message, "closure": name}
        self._shipping.hold(number, name, path, lambda: send(node, "tell", rank=number, message=told))

    # The run.

    async def run(self) -> None:
        """Place the nodes, see the run through, end them."""
        loop = asyncio.get_running_loop()
        self._channel.setblocking(False)
        loop.add_reader(self._channel.fileno(), self._hear_kernel)
        # A forked child of the kernel may hold its end of the socket open; its death is seen this way, too.
        if self._pidfd is not None:
            loop.add_reader(self._pidfd, self._kernel_is_gone)
        self._tell("started", pid=os.getpid())
        try:
            self._state(f"asks {self._engine.title} for {self._placement.named()}")
            refusal = await asyncio.to_thread(self._engine.refusal)
            if refusal is not None and not self._killing:
                self._tell("refused", reason=refusal)
            elif not self._killing:
                await self._clients.connect()
                await self._clients.over.wait()
        except OSError as error:
            self._tell("refused", reason=f"{self._engine.title}: {error}")
        finally:
            await self._clients.end(lambda text: self._tell("note", text=text))
            self._ranks.close()
            self._tell("ended", status=0)
            if os.getppid() != self._kernel:
                # The kernel is gone, and a launcher that would delete this need not be there.
                remove_session(os.path.dirname(self._run_dir.root))

    def _finish(self) -> None:
        """Let the nodes end by themselves; the kernel says so if it takes too long."""
        if not self._killing:
            self._finishing = True
            self._clients.send(-1, "finish", seconds=_FINISH_SECONDS)

    def _kill(self) -> None:
        """End the nodes now; which are not waited for that were given up."""
        if not self._killing:
            self._killing = True
            self._clients.send(-1, "kill")
            self._tasks.spawn(self._give_up_nodes())

    async def _give_up_nodes(self) -> None:
        _engines.ask_no_more()
        if any(node.hello and not node.ended for node in self._nodes.values()):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._clients.over.wait(), _KILL_SECONDS)
        self._clients.over.set()

    @property
    def _ending(self) -> bool:
        return self._finishing or self._killing

    def _lose(self, why: str) -> None:
        """Tell the kernel that the run is lost, once, and end it everywhere."""
        if self._ending or self._told_lost:
            return
        self._told_lost = True
        self._tell("lost" if self._assembly.started else "refused", reason=why)
        self._kill()

    def _task_failed(self, error: BaseException) -> None:
        what = f"{type(error).__name__}: {error}"
        print(what, file=sys.stderr, flush=True)  # noqa: T201  # the log, of which the kernel shows the end
        self._lose(f"the gateway to the nodes cannot go on: {what}")

    # What nodes say.

    def _take(self, node: NodeState, frame: Frame) -> None:
        try:
            if frame.kind == "O":
                if (rank := self._ranks.of(node, frame.number)) is not None:
                    rank.output(frame.data)
            elif frame.kind == "F":
                self._ranks.piece(node, frame.number, frame.data)
            else:
                self._take_message(node, frame.message)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FrameError(f"a message is not one that nodes send: {error!r}") from None
        except (OSError, NbddpError) as error:
            self._lose(f"cannot take what comes from {self._clients.called(node)}: {error}")

    def _take_message(self, node: NodeState, message: Message) -> None:
        if (node.held and message["kind"] in _HELD) or self._may_be_the_engines_doing(message):
            node.held.append(message)
            if len(node.held) == 1:
                self._tasks.spawn(self._take_held(node))
        else:
            self._take_now(node, message)

    def _may_be_the_engines_doing(self, message: Message) -> bool:
        """Tell whether something has ended in a way in which an engine ends all that is on a node, one by one."""
        if not self._engine.piecemeal or self._ending or self._told_lost:
            return False
        match message["kind"]:
            case "died":
                return message["rank"] not in self._ranks.signalled and message["exitcode"] in _SIGNALLED
            case "agent end":
                failures = message["failures"]
                return any(rank not in self._ranks.signalled and code in _SIGNALLED for rank, code in failures)
            case "agent gone":
                return message["status"] in _SIGNALLED
            case "refused":
                return self._assembly.started
        return False

    async def _take_held(self, node: NodeState) -> None:
        """Take what a node has said a moment ago, unless it was the engine; then that is what has to be told."""
        for looks in range(EXPLAIN_LOOKS + _HELD_LOOKS):
            await asyncio.sleep(EXPLAIN_LOOK_SECONDS)
            told = any(other.by for other in self._nodes.values())
            if self._ending or self._told_lost or (looks >= _HELD_LOOKS and not told):
                break
        held, node.held = node.held, []
        for message in held:
            self._take_now(node, message)

    def _take_now(self, node: NodeState, message: Message) -> None:
        called = self._clients.called(node)
        match message.pop("kind"):
            case "hello":
                self._engine.job = message["job"] or self._engine.job
                self._assembly.greet(node, message)
            case "beat":
                node.set_clock(message["t"], message["now"])
            case "refused":
                self._lose(f"{called}: {message['reason']}")
            case "note":
                self._tell("note", text=f"{called} {message['text']}")
            case "gpus":
                node.gpus = message["count"]
                self._assembly.start_if_ready()
            case "meet":
                self._assembly.meet(message["endpoint"])
            case "reached":
                node.reaches = True
                self._assembly.start_if_ready()
            case "told to end":
                node.told, node.by = True, message["by"]
                # Who it was is known in a moment, from the client's words.
                self._explain_soon(node, message["by"])
            case "ended":
                node.ended = node.told = True
                if not any(other.may_speak for other in self._nodes.values()):
                    # Why is still to be told, where it was not their own end.
                    if self._ending or not any(other.by for other in self._nodes.values()):
                        self._clients.over.set()
                elif not (self._ending or self._told_lost or node.done):
                    self._explain_soon(node, "")
            case kind:
                self._take_of_ranks(node, kind, message)

    def _explain_soon(self, node: NodeState, by: str) -> None:
        explain: Coroutine[Any, Any, None] = self._clients.explain_soon(node, by, lambda: self._ending)
        self._tasks.spawn(explain)

    def _take_of_ranks(self, node: NodeState, kind: str, message: Message) -> None:
        """Take what a node says of its agent and its ranks."""
        ranks = self._ranks
        match kind:
            case "agent":
                ranks.agent_began(message["time"] + node.offset)
            case "agent end" if message["failures"] and self._may_restart():
                if message["attempt"] == self._assembly.attempt:
                    ranks.agents_begin_again()
                    self._assembly.restart()
            case "agent end":
                ranks.agent_ended(node, message["failures"])
            case "agent gone":
                self._tell("agent log", node=node.number, lines=message["log"])
                # Others may still be sending what their ranks have made.
                node.done = message["status"] == 0
                if message["status"] < 0 and not self._may_restart():
                    how = _engines.how_it_ended(message["status"])
                    self._lose(f"torchrun's agent on {self._clients.called(node)} {how}, and its ranks with it")
            case "rank":
                ranks.add(node, message)
            case "from":
                ranks.take(node, message["rank"], message["message"])
            case "file":
                ranks.begin_file(node, message)
            case "stack":
                ranks.take_stack(node, message["rank"], message["text"])
            case "memory":
                for number, text in message["ranks"].items():
                    if (rank := ranks.of(node, int(number))) is not None:
                        rank.say("memory", text=text)
            case "died":
                if (rank := ranks.of(node, message["rank"])) is not None:
                    rank.say("died", exitcode=message["exitcode"], oom_kills=message["oom_kills"])

    def _may_restart(self) -> bool:
        return self._assembly.may_restart() and not self._ending


def main(fd: int, kernel: int) -> None:
    """Be the gateway of the run that is asked for on the channel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    channel = socket.socket(fileno=fd)
    channel.set_inheritable(False)
    inbox = _wire.Inbox(channel)
    messages: Sequence[Message] = []
    while not messages and not inbox.closed:
        messages = inbox.receive()
    if not messages:
        return
    launch = dict(messages[0])
    launch.pop("kind")
    files = launch.pop("files")

    async def see_it_through() -> None:
        await Gateway(channel, kernel, launch, files).run()

    asyncio.run(see_it_through())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
