"""What the kernel sees as ranks, where they are on nodes: a connection and a pipe for each, as on its own machine."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nbddp import _wire
from nbddp._clients import NodeState
from nbddp._frames import FrameError, Message, check_name
from nbddp._incoming import Incoming
from nbddp._paths import RunDir
from nbddp._placement import Placement

# Seconds that ranks' stacks are waited for before the ranks are interrupted, and between two looks.
_STACK_SECONDS = 0.25
_STACK_LOOK_SECONDS = 0.02

# Bytes for one rank that the kernel has not taken yet, above which nothing is read from the nodes.
_BACKLOG = 16 << 20

_PIPE_SIZE = 1 << 20
_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", None)


class _Proxy:
    """The kernel's connection to a rank: its socket and its output, written in the order in which things came."""

    def __init__(self, socket_path: str, hello: Message, heard: Callable[[int, Message], None]) -> None:
        self.number: int = hello["rank"]
        # What it last said that it holds, and of its process group.
        self.idle: Message = {"held": {}, "backend": ""}
        self.waiting = 0
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[int, memoryview]] = deque()
        self._writing: int | None = None
        self._sock = _wire.connect(socket_path)
        try:
            out, self._pipe = os.pipe()
        except OSError:
            self._sock.close()
            raise
        if _F_SETPIPE_SZ is not None:
            with contextlib.suppress(OSError):  # the user's limit on pipe memory
                fcntl.fcntl(self._pipe, _F_SETPIPE_SZ, _PIPE_SIZE)
        try:
            _wire.send(self._sock, "rank", fds=[out], **hello)
        except OSError:
            self._sock.close()
            os.close(self._pipe)
            raise
        finally:
            os.close(out)
        self._sock.setblocking(False)
        os.set_blocking(self._pipe, False)
        self._inbox = _wire.Inbox(self._sock)
        self._loop.add_reader(self._sock.fileno(), self._hear)

    def output(self, data: bytes) -> None:
        """Have the kernel read what the rank has written."""
        self._put(self._pipe, data)

    def say(self, kind: str, **fields: Any) -> None:
        """Have the kernel hear what the rank says."""
        if kind == "idle":
            self.idle = {"held": fields["held"], "backend": fields["backend"]}
        self._put(self._sock.fileno(), _wire.encode(kind, **fields))

    def _put(self, fd: int, data: bytes) -> None:
        self._queue.append((fd, memoryview(data)))
        self.waiting += len(data)
        if self._writing is None:
            self._write()

    def _write(self) -> None:
        if self._writing is not None:
            self._loop.remove_writer(self._writing)
            self._writing = None
        while self._queue:
            fd, data = self._queue[0]
            try:
                written = os.write(fd, data)
            except BlockingIOError:
                self._writing = fd
                self._loop.add_writer(fd, self._write)
                return
            except OSError:  # the kernel has done with it
                written = len(data)
            self.waiting -= written
            if written == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (fd, data[written:])

    def _hear(self) -> None:
        for message in self._inbox.receive():
            self._heard(self.number, message)
        if self._inbox.closed:
            self._loop.remove_reader(self._sock.fileno())

    def close(self) -> None:
        if self._writing is not None:
            self._loop.remove_writer(self._writing)
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        os.close(self._pipe)


class RankProxies:
    """All ranks of a run, and its agents, which the kernel sees as one.

    Args:
        run_dir: The kernel's run directory.
        placement: The nodes.
        send: Sends a message to a node; see `nbddp._clients.Clients.send`.
        heard: Called with what the kernel says to a rank, by its number.

    Attributes:
        signalled: The ranks that have got a signal of the kernel's.
    """

    def __init__(
        self,
        run_dir: RunDir,
        placement: Placement,
        send: Callable[..., None],
        heard: Callable[[int, Message], None],
    ) -> None:
        self._run_dir = run_dir
        self._placement = placement
        self._send = send
        self._heard = heard
        self._proxies: dict[int, _Proxy] = {}
        self._agent: Any = None
        self._agents_ended = 0
        self._failures: list[tuple[int, int]] = []
        self._files = Incoming[tuple[int, int]]()
        # Where the files of a node lie here, by node and name.
        self._paths: dict[tuple[int, str], str] = {}
        # Until when the stacks of ranks are waited for that were asked for theirs; and the signals that wait for them.
        self._stacks_asked: dict[int, float] = {}
        self._signals: deque[Message] = deque()
        self.signalled: set[int] = set()

    @property
    def crowded(self) -> bool:
        """Whether the kernel leaves so much untaken that no more should come."""
        return any(proxy.waiting > _BACKLOG for proxy in self._proxies.values())

    def close(self) -> None:
        """Close all connections to the kernel."""
        for proxy in self._proxies.values():
            proxy.close()
        self._files.close()
        if self._agent is not None:
            self._agent.close()

    def of(self, node: NodeState, number: object) -> _Proxy | None:
        """Return the kernel's connection to a rank, of which only its own node speaks."""
        if not isinstance(number, int) or self._placement.node_of(number) != node.number:
            raise FrameError(f"it speaks of rank {str(number)[:80]}, which is another node's")
        return self._proxies.get(number)

    # The agents.

    def agent_began(self, at: float) -> None:
        """Take note that a node's agent runs; the first of them is told of."""
        if self._agent is None:
            self._agent = _wire.connect(self._run_dir.socket)
            self._tell_agent("agent", time=at)

    def agent_ended(self, node: NodeState, failures: Sequence[tuple[int, int]]) -> None:
        """Take note of how a node's agent has ended; of the last of them is told."""
        self._failures += [(rank, code) for rank, code in failures]
        for number, exitcode in failures:
            if (proxy := self.of(node, number)) is not None:
                proxy.say("exitcode", exitcode=exitcode)
        self._agents_ended += 1
        if self._agents_ended == self._placement.nnodes:
            self._tell_agent("agent end", failures=self._failures)

    def agents_begin_again(self) -> None:
        """Take note that all agents are started again."""
        self._agents_ended = 0

    def _tell_agent(self, kind: str, **fields: Any) -> None:
        if self._agent is not None:
            with contextlib.suppress(OSError):  # the kernel has done with the run
                _wire.send(self._agent, kind, **fields)

    # What ranks say.

    def add(self, node: NodeState, hello: Message) -> None:
        """Connect a rank to the kernel; one of its number that was there before is gone."""
        if (old := self.of(node, hello["rank"])) is not None:
            del self._proxies[old.number]
            old.close()
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):  # the kernel has done with the run
            self._proxies[hello["rank"]] = _Proxy(self._run_dir.socket, {**hello, "node": node.number}, self._heard)

    def take(self, node: NodeState, number: object, message: Message) -> None:
        """Hand on what a rank says."""
        if (proxy := self.of(node, number)) is None:
            return
        for key in ("results", "pickled"):
            if message.get(key):
                message[key] = self._paths.get((node.number, message[key]))
        # Clocks of machines differ; which failure was first must not depend on that.
        if isinstance(message.get("time"), int | float):
            message["time"] += node.offset
        if isinstance(message.get("times"), dict):
            message["times"] = {stage: at + node.offset for stage, at in message["times"].items()}
        proxy.say(message.pop("kind"), **message)

    def begin_file(self, node: NodeState, message: Message) -> None:
        """Make room for a file that a rank has written, where the kernel would have it."""
        check_name(message["name"], message["size"], to_node=False)
        self.of(node, int(message["name"].partition(".")[2]))
        path = self._run_dir.place(message["name"], message["size"])
        self._paths[node.number, message["name"]] = path
        self._files.begin((node.number, message["file"]), path, message["size"])
        if not message["size"]:
            self.piece(node, message["file"], b"")

    def piece(self, node: NodeState, number: int, data: bytes) -> None:
        """Write the next bytes of such a file."""
        self._files.piece((node.number, number), data)

    def answer_for(self, number: int, outcome: Message) -> None:
        """Answer in the place of a rank whose cell has not been sent to it after all."""
        if (proxy := self._proxies.get(number)) is not None:
            proxy.say("report", time=time.monotonic(), times={}, **outcome)
            proxy.say("idle", pickled=None, **proxy.idle)

    # Signals, and the stacks that are to be there before.

    def ask_for_stack(self, number: int) -> None:
        """Have a rank write its stack."""
        self._stacks_asked[number] = time.monotonic() + _STACK_SECONDS
        self._send(self._placement.node_of(number), "stack", rank=number)

    def take_stack(self, node: NodeState, number: int, text: str) -> None:
        """Write what faulthandler has written there to where the kernel looks for it."""
        self.of(node, number)
        with contextlib.suppress(OSError), open(self._run_dir.stacks(number), "ab") as file:
            file.write(text.encode(errors="replace"))
        self._stacks_asked.pop(number, None)
        self._pass_signals_on()

    def signal(self, message: Message) -> None:
        """Have a rank get a signal, once all stacks are there: what one does then changes where others are."""
        self._signals.append(message)
        self._pass_signals_on()

    def _pass_signals_on(self) -> None:
        now = time.monotonic()
        self._stacks_asked = {rank: until for rank, until in self._stacks_asked.items() if until > now}
        if self._stacks_asked and self._signals:
            asyncio.get_running_loop().call_later(_STACK_LOOK_SECONDS, self._pass_signals_on)
            return
        while self._signals:
            one = self._signals.popleft()
            number = one["rank"]
            self.signalled.add(number)
            node = self._placement.node_of(number)
            self._send(node, "signal", rank=number, signum=one["signum"], main=one["main"])
