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
import select
import shlex
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from nbddp import _engines, _process, _wire
from nbddp._errors import NbddpError
from nbddp._frames import (
    BEAT_SECONDS,
    CHUNK,
    LEASE_SECONDS,
    PROTOCOL,
    Frame,
    FrameError,
    LineReader,
    Message,
    check_name,
    encode,
)
from nbddp._paths import RunDir, format_size, remove_session
from nbddp._placement import Placement

# Seconds that nodes have to say that all is gone, after they were told to kill, before the engine is asked to end them;
# and that its clients have then.
_KILL_SECONDS = 2.5
_CANCEL_SECONDS = 3.0

# Seconds that what helps a client has after the client's end.
_HELPER_SECONDS = 1.0

# Seconds that nodes have to end by themselves, once all ranks have reported. Longest is NCCL's clean-up.
_FINISH_SECONDS = 10.0

# Seconds that a client whose lines are torn has for its end.
_TORN_SECONDS = 1.0

# Seconds that a client, whose nodes have all said that they have ended, has for its own end.
_CLIENT_SECONDS = 5.0

# Seconds between two looks at what is waited for: first, and at most.
_LOOK_SECONDS = (0.5, 15.0)

# Seconds between two lines on how much has been sent.
_PROGRESS_SECONDS = 0.5

# How often, and how long, is waited for the engine's word on why a node has ended, in seconds.
_EXPLAIN_LOOKS = 30
_EXPLAIN_LOOK_SECONDS = 0.05

# What is held back for as many of these looks if the engine may be behind it; and what comes after that.
_HELD_LOOKS = 8
_SIGNALLED = (-signal.SIGTERM, -signal.SIGKILL)
_HELD = ("died", "agent end", "agent gone", "refused", "ended", "from")

# Seconds that ranks' stacks are waited for before the ranks are interrupted, and between two looks.
_STACK_SECONDS = 0.25
_STACK_LOOK_SECONDS = 0.02

# Seconds after which the state says for whose first word one waits.
_TELL_SECONDS = 4.0

# Bytes for one rank that the kernel has not taken yet, above which nothing is read from the nodes.
_BACKLOG = 16 << 20

_READ = 1 << 18
_PIPE_SIZE = 1 << 20
_WORDS = 30


class _Rank:
    """The kernel's connection to a rank: its socket and its output, written in the order in which things came."""

    def __init__(self, gateway: Gateway, hello: Message) -> None:
        self.number: int = hello["rank"]
        self._gateway = gateway
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[int, memoryview]] = deque()
        self.waiting = 0
        self._writing: int | None = None
        self.sock = _wire.connect(gateway.run_dir.socket)
        out, self.pipe = os.pipe()
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.fcntl(self.pipe, getattr(fcntl, "F_SETPIPE_SZ", 1031), _PIPE_SIZE)
        _wire.send(self.sock, "rank", fds=[out], **hello)
        os.close(out)
        self.sock.setblocking(False)
        os.set_blocking(self.pipe, False)
        self.inbox = _wire.Inbox(self.sock)
        self._loop.add_reader(self.sock.fileno(), self._hear)

    def output(self, data: bytes) -> None:
        """Have the kernel read what the rank has written."""
        self._put(self.pipe, data)

    def say(self, kind: str, **fields: Any) -> None:
        """Have the kernel hear what the rank says."""
        self._put(self.sock.fileno(), _wire.encode(kind, **fields))

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
                self._queue[0] = (fd, data)
                self._writing = fd
                self._loop.add_writer(fd, self._write)
                return
            except OSError:  # the kernel has done with it
                self.waiting -= len(data)
                self._queue.popleft()
                continue
            self.waiting -= written
            if written == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (fd, data[written:])

    def _hear(self) -> None:
        for message in self.inbox.receive():
            self._gateway.from_kernel(self.number, message)
        if self.inbox.closed:
            self._loop.remove_reader(self.sock.fileno())

    def close(self) -> None:
        if self._writing is not None:
            self._loop.remove_writer(self._writing)
        with contextlib.suppress(ValueError):
            self._loop.remove_reader(self.sock.fileno())
        self.sock.close()
        os.close(self.pipe)


class _Node:
    """What is known of a node."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.hello: Message = {}
        self.heard = time.monotonic()
        self.gpus: int | None = None
        # Whether it can connect to the first.
        self.reaches = False
        self.ended = False
        # Whether it has said that it ends; and whether it may, since its agent has ended well.
        self.told = False
        # What has told it to, if it was not the notebook; and what it has said that may only follow from that.
        self.by = ""
        self.held: list[Message] = []
        self.done = False
        # What is to be added to its clock, and how sure that is: half of a round trip.
        self.offset = 0.0
        self._trip = float("inf")
        self.files: dict[int, Any] = {}
        self.paths: dict[str, str] = {}

    def set_clock(self, sent: float, its: float) -> None:
        """Compare clocks: of all round trips, the shortest tells most."""
        now = time.monotonic()
        if now - sent < self._trip:
            self._trip = now - sent
            self.offset = (sent + now) / 2 - its


class _Client:
    """A client of the engine's, and the nodes behind it."""

    def __init__(
        self,
        link: _engines.Link,
        process: asyncio.subprocess.Process,
        stdout: asyncio.StreamReader,
        stderr: asyncio.StreamReader,
    ) -> None:
        self.link = link
        self.process = process
        self.stdout = stdout
        self.stderr = stderr
        self.words: deque[str] = deque(maxlen=_WORDS)
        self.done = False


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
        self._kernel = kernel
        self._launch = launch
        self._files_at_start = files
        self.placement = Placement(**launch["placement"])
        self.run_dir = RunDir.adopt(launch["run_dir"])
        self._engine = _engines.of(self.placement)
        self._nodes = {number: _Node(number) for number in range(self.placement.nnodes)}
        self._clients: list[_Client] = []
        self._ranks: dict[int, _Rank] = {}
        self._agent: socket.socket | None = None
        self._agents_ended = 0
        self._attempt = 0
        self._failures: list[tuple[int, int]] = []
        self._over = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shipped: dict[str, asyncio.Task[None]] = {}
        self._endpoint = ""
        self._connected = 0.0
        self._started = False
        self._told_lost = False
        # Until when the stacks of ranks are waited for that were asked for theirs; and the signals that wait for them.
        self._stacks_asked: dict[int, float] = {}
        self._signals: deque[Message] = deque()
        # The ranks that have got one.
        self._signalled: set[int] = set()

    # The kernel.

    def _tell(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):
            self._channel.setblocking(True)
            _wire.send(self._channel, kind, **fields)

    def _state(self, text: str) -> None:
        self._tell("state", text=text)

    def _hear_kernel(self, inbox: _wire.Inbox) -> None:
        self._channel.setblocking(False)
        for message in inbox.receive():
            match message["kind"]:
                case "finish":
                    self._begin_ending(self._finish())
                case "kill":
                    self._begin_ending(self._kill())
                case "stack":
                    number = message["rank"]
                    self._stacks_asked[number] = time.monotonic() + _STACK_SECONDS
                    self._send(self.placement.node_of(number), "stack", rank=number)
                case "signal":
                    self._signals.append(message)
                    self._pass_signals_on()
        if inbox.closed:
            self._kernel_is_gone()

    def _kernel_is_gone(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError):
            loop.remove_reader(self._channel.fileno())
        if self._ending is None or not self._over.is_set():
            self._begin_ending(self._kill())

    def from_kernel(self, number: int, message: Message) -> None:
        """Pass on what the kernel says to a rank."""
        node = self.placement.node_of(number)
        match message["kind"]:
            case "cell" if message["closure"] is not None:
                # What it uses goes to each node once, and before the first rank is told.
                path = message["closure"]
                name = os.path.basename(path)
                task = self._shipped.get(name)
                if task is None:
                    task = self._shipped[name] = self._spawn(self._ship({name: path}))
                told = {**message, "closure": name}
                task.add_done_callback(lambda _: self._send(node, "tell", rank=number, message=told))
            case _:
                self._send(node, "tell", rank=number, message=message)

    def _pass_signals_on(self) -> None:
        """Send the signals that wait, once all stacks are there: what one rank does then changes where others are."""
        now = time.monotonic()
        self._stacks_asked = {rank: until for rank, until in self._stacks_asked.items() if until > now}
        if self._stacks_asked and self._signals:
            asyncio.get_running_loop().call_later(_STACK_LOOK_SECONDS, self._pass_signals_on)
            return
        while self._signals:
            one = self._signals.popleft()
            number = one["rank"]
            self._signalled.add(number)
            node = self.placement.node_of(number)
            self._send(node, "signal", rank=number, signum=one["signum"], main=one["main"])

    # The nodes.

    def _send(self, node: int, kind: str, raw: bytes = b"", **fields: Any) -> None:
        """Send a message to a node; to all with -1."""
        data = encode(kind, raw, to=node, **fields)
        for client in self._clients:
            if (node == -1 or node in client.link.nodes) and not client.done:
                with contextlib.suppress(OSError, RuntimeError):
                    client.process.stdin.write(data)  # type: ignore[union-attr]

    async def _drain(self) -> None:
        for client in self._clients:
            if not client.done:
                with contextlib.suppress(OSError, RuntimeError):
                    await client.process.stdin.drain()  # type: ignore[union-attr]

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ship(self, files: Mapping[str, str]) -> None:
        """Send files to all nodes, each once."""
        total = sum(os.path.getsize(path) for path in files.values())
        sent, told, began = 0, time.monotonic(), time.monotonic()
        for name, path in files.items():
            with open(path, "rb") as file:
                self._send(-1, "file", name=name, size=os.path.getsize(path))
                while data := file.read(CHUNK):
                    self._send(-1, "piece", data, name=name)
                    await self._drain()
                    sent += len(data)
                    if (now := time.monotonic()) > told + _PROGRESS_SECONDS and now > began + 2 * _PROGRESS_SECONDS:
                        told = now
                        rate = format_size(int(sent / (now - began)))
                        self._state(
                            f"{format_size(sent)} of {format_size(total)} sent to {self.placement.named()}, {rate}/s"
                        )
                    if self._over.is_set():
                        return

    async def run(self) -> None:
        """Place the nodes, see the run through, end them."""
        loop = asyncio.get_running_loop()
        inbox = _wire.Inbox(self._channel)
        self._channel.setblocking(False)
        loop.add_reader(self._channel.fileno(), self._hear_kernel, inbox)
        # A forked child of the kernel may hold its end of the socket open; its death is seen this way, too.
        pidfd = _process.open_pidfd(self._kernel)
        if pidfd is not None:
            loop.add_reader(pidfd, self._kernel_is_gone)
        self._tell("started", pid=os.getpid())
        try:
            self._state(f"asks {self._engine.title} for {self.placement.named()}")
            refusal = await asyncio.to_thread(self._engine.refusal)
            if self._ending is None:
                if refusal is not None:
                    self._tell("refused", reason=refusal)
                    return
                await self._connect()
            await self._over.wait()
        except OSError as error:
            self._tell("refused", reason=f"{self._engine.title}: {error}")
        finally:
            await self._end()
            if pidfd is not None:
                loop.remove_reader(pidfd)

    async def _connect(self) -> None:
        for link in self._engine.links(_engines.node_command(self.placement)):
            pumps = [await _pump(), await _pump()] if link.pumped else []
            try:
                process = await asyncio.create_subprocess_exec(
                    *link.argv,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=pumps[0][0] if pumps else asyncio.subprocess.PIPE,
                    stderr=pumps[1][0] if pumps else asyncio.subprocess.PIPE,
                    env=None if link.env is None else dict(link.env),
                    preexec_fn=_process.told_of_parents_death(os.getpid(), link.orphaned),
                    limit=_READ,
                )
            finally:
                for fd, _ in pumps:
                    os.close(fd)
            stdout, stderr = (pumps[0][1], pumps[1][1]) if pumps else (process.stdout, process.stderr)
            assert stdout is not None
            assert stderr is not None
            client = _Client(link, process, stdout, stderr)
            self._clients.append(client)
            self._spawn(self._read_lines(client))
            self._spawn(self._read_words(client))
        self._connected = time.monotonic()
        for node in self._nodes.values():
            node.heard = self._connected
        self._spawn(self._beat())
        self._spawn(self._watch_the_queue())

    async def _watch_the_queue(self) -> None:
        """Show what is waited for, and do not wait for what will never be."""
        pause = _LOOK_SECONDS[0]
        while not (self._over.is_set() or all(node.hello for node in self._nodes.values())):
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LOOK_SECONDS[1])
            state, for_ever = await asyncio.to_thread(self._engine.waiting)
            if for_ever:
                self._lose(state)
                return
            if state and not self._over.is_set():
                self._state(state)

    async def _read_lines(self, client: _Client) -> None:
        reader = LineReader()
        try:
            while data := await client.stdout.read(_READ):
                for number, frame in reader.feed(data):
                    if number not in client.link.nodes:
                        raise FrameError(f"a line says that it is of node {number}")
                    self._take(self._nodes[number], frame)
                client.words.extend(reader.strange)
                reader.strange.clear()
                while any(rank.waiting > _BACKLOG for rank in self._ranks.values()) and not self._over.is_set():
                    await asyncio.sleep(0.01)
                    for number in client.link.nodes:
                        self._nodes[number].heard = time.monotonic()
        except FrameError as error:
            self._spawn(self._give_up_torn(client, error))
            # A client that is not read does not end.
            while await client.stdout.read(_READ):
                pass
        status = await client.process.wait()
        await asyncio.sleep(0.05)  # for the last words
        client.done = True
        if not all(self._nodes[number].ended for number in client.link.nodes):
            self._lose(self._engine.explain(client.link, status, list(client.words)))
        if all(client.done for client in self._clients):
            self._over.set()  # nobody is left who could say more

    async def _give_up_torn(self, client: _Client, error: FrameError) -> None:
        # A node that is killed in the middle of a line does that; then the engine has more to say.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.process.wait(), _TORN_SECONDS)
        if client.process.returncode is None:
            nodes = " and ".join(self._called(self._nodes[number]) for number in client.link.nodes)
            self._lose(
                f"what came from {nodes} through {self._engine.title} is not what was sent: {error}. Does something "
                "there print or read while a shell starts that is not a terminal's?"
            )

    async def _read_words(self, client: _Client) -> None:
        while True:
            try:
                line = await client.stderr.readline()
            except ValueError:  # longer than anybody would read; it is dropped
                continue
            if not line:
                return
            words = line.decode(errors="replace").strip()
            if (state := self._engine.hear(words)) is not None:
                self._state(state)
                # It is not silent: it waits.
                for number in client.link.nodes:
                    self._nodes[number].heard = time.monotonic()
            elif words:
                client.words.append(words)

    async def _beat(self) -> None:
        while not self._over.is_set():
            # A client that waits in a queue reads nothing.
            for node in self._nodes.values():
                if node.hello and not node.ended:
                    self._send(node.number, "beat", t=time.monotonic())
            await asyncio.sleep(BEAT_SECONDS)
            now = time.monotonic()
            self._look_for_answers(now)
            silent = [node for node in self._nodes.values() if node.hello and not node.ended]
            for node in silent:
                if now > node.heard + LEASE_SECONDS:
                    self._lose(f"{self._called(node)} has not been heard of for {LEASE_SECONDS:g} s")

    def _look_for_answers(self, now: float) -> None:
        """Give up a node of which nothing comes at all, where an engine has one begin at once."""
        seconds = self._engine.answer_seconds
        mute = [node for node in self._nodes.values() if not node.hello]
        if seconds is None or not mute or now < self._connected + _TELL_SECONDS:
            return
        names = " and ".join(self._called(node) for node in mute)
        if now > self._connected + seconds:
            self._lose(
                f"{names} {'has' if len(mute) == 1 else 'have'} not answered within {seconds:g} s: reached, but nbddp "
                "does not begin there. A shell's start-up file may wait for something, or its disk"
            )
        else:
            self._state(f"waits for {names}")

    def _called(self, node: _Node) -> str:
        name = self._engine.name(node.number)
        host = node.hello.get("host")
        return f"{name} ({host})" if host and "(" not in name else name

    def _lose(self, why: str) -> None:
        """Tell the kernel that the run is lost, once, and end it everywhere."""
        if self._ending is not None or self._told_lost:
            return
        self._told_lost = True
        self._tell("lost" if self._started else "refused", reason=why)
        self._begin_ending(self._kill())

    # What nodes say.

    def _take(self, node: _Node, frame: Frame) -> None:
        node.heard = time.monotonic()
        try:
            if frame.kind == "O":
                if (rank := self._rank_of(node, frame.number)) is not None:
                    rank.output(frame.data)
            elif frame.kind == "F":
                self._take_piece(node, frame.number, frame.data)
            else:
                self._take_message(node, frame.message)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FrameError(f"a message is not one that nodes send: {error!r}") from None
        except (OSError, NbddpError) as error:
            self._lose(f"cannot take what comes from {self._called(node)}: {error}")

    def _rank_of(self, node: _Node, number: int) -> _Rank | None:
        """Return the kernel's connection to a rank, of which only its own node speaks."""
        if not isinstance(number, int) or self.placement.node_of(number) != node.number:
            raise FrameError(f"it speaks of rank {str(number)[:80]}, which is another node's")
        return self._ranks.get(number)

    def _take_message(self, node: _Node, message: Message) -> None:
        if (node.held and message["kind"] in _HELD) or self._may_be_the_engines_doing(message):
            node.held.append(message)
            if len(node.held) == 1:
                self._spawn(self._take_held(node))
        else:
            self._take_now(node, message)

    def _may_be_the_engines_doing(self, message: Message) -> bool:
        """Tell whether something has ended in a way in which an engine ends all that is on a node, one by one."""
        if self._ending is not None or self._told_lost:
            return False
        match message["kind"]:
            case "died":
                return message["rank"] not in self._signalled and message["exitcode"] in _SIGNALLED
            case "agent end":
                return any(rank not in self._signalled and code in _SIGNALLED for rank, code in message["failures"])
            case "agent gone":
                return message["status"] in _SIGNALLED
            case "refused":
                return self._started
        return False

    async def _take_held(self, node: _Node) -> None:
        """Take what a node has said a moment ago, unless it was the engine; then that is what has to be told."""
        for looks in range(_EXPLAIN_LOOKS + _HELD_LOOKS):
            await asyncio.sleep(_EXPLAIN_LOOK_SECONDS)
            told = any(other.by for other in self._nodes.values())
            if self._ending is not None or self._told_lost or (looks >= _HELD_LOOKS and not told):
                break
        held, node.held = node.held, []
        for message in held:
            self._take_now(node, message)

    def _take_now(self, node: _Node, message: Message) -> None:
        match message.pop("kind"):
            case "hello":
                self._greet(node, message)
            case "beat":
                node.set_clock(message["t"], message["now"])
            case "refused":
                self._lose(f"{self._called(node)}: {message['reason']}")
            case "note":
                self._tell("note", text=f"{self._called(node)} {message['text']}")
            case "gpus":
                node.gpus = message["count"]
                self._start_if_ready()
            case "meet":
                self._endpoint = message["endpoint"]
                if self._started:
                    self._send(-1, "restart", attempt=self._attempt, endpoint=self._endpoint)
                else:
                    for number in range(1, self.placement.nnodes):
                        self._send(number, "reach", endpoint=self._endpoint)
            case "reached":
                node.reaches = True
                self._start_if_ready()
            case "told to end":
                node.told, node.by = True, message["by"]
                # Who it was is known in a moment, from the client's words.
                self._spawn(self._explain_soon(node, message["by"]))
            case "ended":
                node.ended = node.told = True
                if all(other.ended for other in self._nodes.values()):
                    # Why is still to be told, where it was not their own end.
                    if self._ending is not None or not any(other.by for other in self._nodes.values()):
                        self._over.set()
                elif self._ending is None and not self._told_lost and not node.done:
                    self._spawn(self._explain_soon(node, ""))
            case kind:
                self._take_of_ranks(node, kind, message)

    def _take_of_ranks(self, node: _Node, kind: str, message: Message) -> None:
        """Take what a node says of its agent and its ranks."""
        match kind:
            case "agent":
                self._connect_agent(message["time"] + node.offset)
            case "agent end" if message["failures"] and self._may_restart():
                if message["attempt"] == self._attempt:
                    self._attempt += 1
                    self._agents_ended = 0
                    # The keys of the attempt before would mislead agents and ranks: another store.
                    self._send(0, "meet")
            case "agent end":
                self._failures += [(rank, code) for rank, code in message["failures"]]
                for number, exitcode in message["failures"]:
                    if (rank := self._rank_of(node, number)) is not None:
                        rank.say("exitcode", exitcode=exitcode)
                self._agents_ended += 1
                if self._agents_ended == self.placement.nnodes:
                    self._tell_agent("agent end", failures=self._failures)
            case "agent gone":
                self._tell("agent log", lines=message["log"])
                # Others may still be sending what their ranks have made.
                node.done = message["status"] == 0
                if message["status"] < 0 and not self._may_restart():
                    how = _engines.how_it_ended(message["status"])
                    self._lose(f"torchrun's agent on {self._called(node)} {how}, and its ranks with it")
            case "rank":
                self._add_rank(node, message)
            case "from":
                self._take_from_rank(node, message["rank"], message["message"])
            case "file":
                self._begin_file(node, message)
            case "stack":
                self._rank_of(node, message["rank"])
                self._append_stack(message["rank"], message["text"])
                self._stacks_asked.pop(message["rank"], None)
                self._pass_signals_on()
            case "memory":
                for number, text in message["ranks"].items():
                    if (rank := self._rank_of(node, int(number))) is not None:
                        rank.say("memory", text=text)
            case "died":
                if (rank := self._rank_of(node, message["rank"])) is not None:
                    rank.say("died", exitcode=message["exitcode"], oom_kills=message["oom_kills"])

    def _may_restart(self) -> bool:
        restarts = self._launch["max_restarts"] if self.placement.nnodes > 1 else 0
        return self._attempt < restarts and self._ending is None

    async def _explain_soon(self, node: _Node, by: str) -> None:
        """Say why a node has ended that was not told to."""
        client = next(client for client in self._clients if node.number in client.link.nodes)
        # The engine may say why, on every node but one with some delay; and who has not even been told says nothing.
        for _ in range(_EXPLAIN_LOOKS):
            await asyncio.sleep(_EXPLAIN_LOOK_SECONDS)
            others = [self._nodes[number] for number in client.link.nodes if not self._nodes[number].told]
            reason = self._engine.reason(list(client.words))
            if client.done or self._ending is not None or reason is not None:
                break
        if reason is not None:
            self._lose(reason)
        elif by and others and not client.done:
            silent = max(others, key=lambda other: time.monotonic() - other.heard)
            self._lose(f"{self._called(silent)} has fallen silent, and {self._engine.title} has ended the others")
        elif client.done or client.words:
            self._lose(self._engine.explain(client.link, client.process.returncode, list(client.words)))
        elif by:
            self._lose(f"{self._called(node)} was told to end from outside ({by})")
        else:
            self._lose(f"{self._called(node)} has ended by itself")

    def _greet(self, node: _Node, hello: Message) -> None:
        node.hello = hello
        if (problem := _different(hello, self._launch["versions"])) is not None:
            self._lose(f"{self._called(node)}: {problem}")
            return
        self._engine.job = hello["job"] or self._engine.job
        if all(other.hello for other in self._nodes.values()):
            hosts = {str(number): other.hello["host"] for number, other in self._nodes.items()}
            self._tell("nodes", hosts=hosts)
            self._spawn(self._prepare())

    async def _prepare(self) -> None:
        """Send each node what it needs; then they may start."""
        launch, placement = self._launch, self.placement
        self._send(-1, "beat", t=time.monotonic())
        self._send(
            -1,
            "launch",
            env=launch["env"],
            cwd=launch["cwd"],
            umask=launch["umask"],
            ranks=placement.ranks_per_node,
            nnodes=placement.nnodes,
            max_restarts=launch["max_restarts"],
            start_method=launch["start_method"],
            mark=launch["mark"],
            run_dir=launch["run_dir"],
            package=os.path.dirname(os.path.abspath(__file__)),
        )
        if placement.gpus:
            self._send(-1, "count")
        if placement.nnodes > 1:
            self._send(0, "meet")
        self._state(f"{placement.named()} of {self._engine.title} load torch")
        await self._ship(self._files_at_start)
        self._shipped["start"] = self._spawn(asyncio.sleep(0))
        self._start_if_ready()

    def _start_if_ready(self) -> None:
        placement = self.placement
        ready = "start" in self._shipped and all(node.reaches for number, node in self._nodes.items() if number)
        counted = not placement.gpus or all(node.gpus is not None for node in self._nodes.values())
        if self._started or self._ending is not None or not (ready and counted):
            return
        gpus = placement.gpus
        if gpus:
            few = [node for node in self._nodes.values() if (node.gpus or 0) < placement.ranks_per_node]
            if few and (placement.strict or any(node.gpus for node in self._nodes.values())):
                have = " and ".join(
                    f"{self._called(node)} has {node.gpus or 'no'} GPU{'' if node.gpus == 1 else 's'}" for node in few
                )
                self._lose(f"--gpus {placement.ranks_per_node}: {have}. --cpus runs ranks on the CPU")
                return
            if few:
                gpus = False
                self._tell(
                    "note",
                    text=f"there is no GPU on {placement.named()}; {placement.ranks} ranks on the CPU, over gloo",
                )
        self._started = True
        self._send(-1, "start", endpoint=self._endpoint or None, gpus=gpus)
        self._state("ranks start")

    # Ranks.

    def _connect_agent(self, at: float) -> None:
        if self._agent is None:
            self._agent = _wire.connect(self.run_dir.socket)
            self._tell_agent("agent", time=at)

    def _tell_agent(self, kind: str, **fields: Any) -> None:
        if self._agent is not None:
            with contextlib.suppress(OSError):
                _wire.send(self._agent, kind, **fields)

    def _add_rank(self, node: _Node, hello: Message) -> None:
        if (old := self._rank_of(node, hello["rank"])) is not None:
            del self._ranks[old.number]
            old.close()
        with contextlib.suppress(OSError):  # the kernel has closed the run
            self._ranks[hello["rank"]] = _Rank(self, {**hello, "node": node.number})

    def _take_from_rank(self, node: _Node, number: int, message: Message) -> None:
        rank = self._rank_of(node, number)
        if rank is None:
            return
        for key in ("results", "pickled"):
            if message.get(key):
                message[key] = node.paths.get(message[key])
        # Clocks of machines differ; which failure was first must not depend on that.
        if isinstance(message.get("time"), int | float):
            message["time"] += node.offset
        if isinstance(message.get("times"), dict):
            message["times"] = {stage: at + node.offset for stage, at in message["times"].items()}
        rank.say(message.pop("kind"), **message)

    def _begin_file(self, node: _Node, message: Message) -> None:
        check_name(message["name"], message["size"], to_node=False)
        self._rank_of(node, int(message["name"].partition(".")[2]))
        path = self.run_dir.place(message["name"], message["size"])
        # It was deleted: what is there now is not to be followed.
        file = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: SIM115  # closed below
        node.paths[message["name"]] = path
        node.files[message["file"]] = [file, message["size"]]
        if not message["size"]:
            self._take_piece(node, message["file"], b"")

    def _take_piece(self, node: _Node, number: int, data: bytes) -> None:
        file, left = node.files[number]
        try:
            file.write(data)
            node.files[number][1] = left - len(data)
            if left <= len(data):
                file.close()
                del node.files[number]
        except OSError as error:
            self._lose(f"cannot write what comes from {self._called(node)} on this machine: {error.strerror}")

    def _append_stack(self, number: int, text: str) -> None:
        with contextlib.suppress(OSError), open(self.run_dir.stacks(number), "ab") as file:
            file.write(text.encode(errors="replace"))

    # The end.

    def _begin_ending(self, how: Any) -> None:
        if self._ending is not None and not self._ending.done():
            self._ending.cancel()
        self._ending = self._spawn(how)

    async def _finish(self) -> None:
        """Let the nodes end by themselves; the kernel says so if it takes too long."""
        self._send(-1, "finish", seconds=_FINISH_SECONDS)

    async def _kill(self) -> None:
        """End the nodes now."""
        self._send(-1, "kill")
        _engines.ask_no_more()
        if any(node.hello and not node.ended for node in self._nodes.values()):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), _KILL_SECONDS)
        self._over.set()

    async def _end(self) -> None:
        """See to it that nothing is left, then say so."""
        for client in self._clients:
            if not client.done:
                with contextlib.suppress(OSError, RuntimeError):
                    client.process.stdin.close()  # type: ignore[union-attr]
        # A client may have a process that sees to its end, and goes on for ever where it cannot.
        helpers = {pid for client in self._clients for pid in _process.children_of(client.process.pid)}
        pidfds = [pidfd for pid in helpers if (pidfd := _process.open_pidfd(pid)) is not None]
        polite = bool(self._clients) and all(node.ended for node in self._nodes.values())
        if polite:
            await self._wait_for_clients(_CLIENT_SECONDS)
        if any(client.process.returncode is None for client in self._clients) or not polite:
            await self._cancel()
        for pidfd in pidfds:
            if not select.select([pidfd], [], [], _HELPER_SECONDS)[0]:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        for rank in self._ranks.values():
            rank.close()
        self._tell("ended", status=0)
        if os.getppid() != self._kernel:
            # The kernel is gone, and a launcher that would delete this need not be there.
            remove_session(os.path.dirname(self.run_dir.root))

    async def _cancel(self) -> None:
        for argv in self._engine.cancel():
            await self._run_to_the_end(argv)
        # Nodes that are told to end, or see the end of their stdin, clear up; those whose client is killed may not.
        if await self._wait_for_clients(_CLIENT_SECONDS):
            return
        for signum, seconds in ((signal.SIGTERM, _CANCEL_SECONDS), (signal.SIGKILL, 1.0)):
            for client in self._clients:
                if client.process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        client.process.send_signal(signum)
            if await self._wait_for_clients(seconds):
                return

    async def _run_to_the_end(self, argv: Sequence[str]) -> None:
        """Run a command that ends what is left; say so if it cannot."""
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError:
            return
        try:
            await asyncio.wait_for(process.wait(), _CANCEL_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
            self._tell(
                "note",
                text=f"{self._engine.title} does not answer, and may go on holding the nodes: {shlex.join(argv)}",
            )

    async def _wait_for_clients(self, seconds: float) -> bool:
        waits = [asyncio.ensure_future(client.process.wait()) for client in self._clients]
        if not waits:
            return True
        _, pending = await asyncio.wait(waits, timeout=seconds)
        for wait in pending:
            wait.cancel()
        return not pending


async def _pump() -> tuple[int, asyncio.StreamReader]:
    """Return a pipe to write to, and what reads it: by way of a process that goes on reading if this one is killed."""
    end, fd = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", "cat; exec cat > /dev/null"), stdin=end, stdout=asyncio.subprocess.PIPE, limit=_READ
        )
    except BaseException:
        os.close(fd)
        raise
    finally:
        os.close(end)
    assert process.stdout is not None
    return fd, process.stdout


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
