"""The engine's clients, which reach the nodes of a run: started, spoken to, heard, ended.

::

    send ──> stdin of the client that reaches the node          words on stderr ──> states, reasons
    take <── lines on stdout, put together to frames            its end ──────────> an explanation
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from nbddp import _engines, _process
from nbddp._frames import BEAT_SECONDS, LEASE_SECONDS, Frame, FrameError, LineReader, Message, encode
from nbddp._tasks import Tasks

# Seconds that nodes which have not said that they have ended have for that, once nothing more comes to them; and that
# their clients have then.
_CLEAR_SECONDS = 5.0
_CANCEL_SECONDS = 3.0

# Seconds that what helps a client has after the client's end.
_HELPER_SECONDS = 1.0

# Seconds that a client whose lines are torn has for its end, and that words have to come after one has ended.
_TORN_SECONDS = 1.0
_WORDS_SECONDS = 0.05

# Seconds between two looks at what is waited for: first, and at most.
_LOOK_SECONDS = (0.5, 15.0)

# How often, and how long, is waited for the engine's word on why a node has ended, in seconds.
EXPLAIN_LOOKS = 30
EXPLAIN_LOOK_SECONDS = 0.05

# Seconds after which the state says for whose first word one waits.
_TELL_SECONDS = 4.0

_READ = 1 << 18
_WORDS = 30


class NodeState:
    """What is known of a node.

    Attributes:
        number: Its number.
        hello: Its first word; empty before that.
        heard: When something last came from it (``time.monotonic``).
        gpus: How many GPUs it has, if it was asked.
        reaches: Whether it can connect to the first node.
        told: Whether it has said that it ends.
        by: What has told it to, if it was not the notebook.
        held: What it has said that may only follow from that.
        done: Whether it may end, since its agent has ended well.
        ended: Whether it has said its last word.
        silent: Whether it is given up, after a lease without a word: then it ends by its own.
        offset: What is to be added to its clock.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.hello: Message = {}
        self.heard = time.monotonic()
        self.gpus: int | None = None
        self.reaches = self.told = self.done = self.ended = self.silent = False
        self.by = ""
        self.held: list[Message] = []
        self.offset = 0.0
        # How sure that is: half of a round trip.
        self._trip = float("inf")

    @property
    def may_speak(self) -> bool:
        """Whether it may yet say that it has ended."""
        return not (self.ended or self.silent)

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
        stdout: asyncio.StreamReader | None,
        stderr: asyncio.StreamReader | None,
    ) -> None:
        assert process.stdin is not None
        assert stdout is not None
        assert stderr is not None
        self.link = link
        self.process = process
        self.stdin, self.stdout, self.stderr = process.stdin, stdout, stderr
        self.words: deque[str] = deque(maxlen=_WORDS)
        self.done = False


class Clients:
    """All clients of one run.

    Args:
        engine: The engine.
        nodes: The nodes, by number.
        tasks: Where what goes on beside is kept.
        take: Called with each frame that a node has sent.
        lose: Called with why the run cannot go on.
        state: Called with what is waited for.
        crowded: Tells whether nobody takes what comes, so that no more is to be read.

    Attributes:
        over: Set when nothing more is to be expected of any node.
    """

    def __init__(
        self,
        engine: _engines.Engine,
        nodes: Mapping[int, NodeState],
        tasks: Tasks,
        *,
        take: Callable[[NodeState, Frame], None],
        lose: Callable[[str], None],
        state: Callable[[str], None],
        crowded: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._nodes = nodes
        self._tasks = tasks
        self._take, self._lose, self._state, self._crowded = take, lose, state, crowded
        self._clients: list[_Client] = []
        self._connected = 0.0
        self.over = asyncio.Event()

    async def connect(self) -> None:
        """Start the clients.

        Raises:
            OSError: One cannot be started.
        """
        for link in self._engine.links(_engines.node_command(self._engine.placement)):
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
            streams = (pumps[0][1], pumps[1][1]) if pumps else (process.stdout, process.stderr)
            client = _Client(link, process, *streams)
            self._clients.append(client)
            self._tasks.spawn(self._read_lines(client))
            self._tasks.spawn(self._read_words(client))
        self._connected = time.monotonic()
        for node in self._nodes.values():
            node.heard = self._connected
        self._tasks.spawn(self._beat())
        self._tasks.spawn(self._watch_the_queue())

    def called(self, node: NodeState) -> str:
        """Return what users call a node, with its host once that is known."""
        name = self._engine.name(node.number)
        host = node.hello.get("host")
        return f"{name} ({host})" if host and "(" not in name else name

    # To the nodes.

    def send(self, node: int, kind: str, raw: bytes = b"", **fields: object) -> None:
        """Send a message to a node; to all with -1."""
        data = encode(kind, raw, to=node, **fields)
        for client in self._clients:
            if (node == -1 or node in client.link.nodes) and not client.done:
                with contextlib.suppress(OSError, RuntimeError):  # it has just ended
                    client.stdin.write(data)

    async def drain(self) -> None:
        """Wait until what was sent is on its way."""
        for client in self._clients:
            if not client.done:
                with contextlib.suppress(OSError, RuntimeError):
                    await client.stdin.drain()

    async def _beat(self) -> None:
        while not self.over.is_set():
            # A client that waits in a queue reads nothing.
            for node in self._nodes.values():
                if node.hello and not node.ended:
                    self.send(node.number, "beat", t=time.monotonic())
            await asyncio.sleep(BEAT_SECONDS)
            now = time.monotonic()
            self._look_for_answers(now)
            for node in self._nodes.values():
                if node.hello and not node.ended and now > node.heard + LEASE_SECONDS:
                    node.silent = True
                    self._lose(f"{self.called(node)} has not been heard of for {LEASE_SECONDS:g} s")

    # From the nodes.

    async def _read_lines(self, client: _Client) -> None:
        reader = LineReader()
        try:
            while data := await client.stdout.read(_READ):
                for number, frame in reader.feed(data):
                    if number not in client.link.nodes:
                        raise FrameError(f"a line says that it is of node {number}")
                    node = self._nodes[number]
                    node.heard = time.monotonic()
                    self._take(node, frame)
                client.words.extend(reader.strange)
                reader.strange.clear()
                while self._crowded() and not self.over.is_set():
                    await asyncio.sleep(0.01)
                    self._hear_of(client)
        except FrameError as error:
            self._tasks.spawn(self._give_up_torn(client, error))
            # A client that is not read does not end.
            while await client.stdout.read(_READ):
                pass
        status = await client.process.wait()
        await asyncio.sleep(_WORDS_SECONDS)
        client.done = True
        if not all(self._nodes[number].ended for number in client.link.nodes):
            self._lose(self._engine.explain(client.link, status, list(client.words)))
        if all(client.done for client in self._clients):
            self.over.set()  # nobody is left who could say more

    async def _give_up_torn(self, client: _Client, error: FrameError) -> None:
        # A node that is killed in the middle of a line does that; then the engine has more to say.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.process.wait(), _TORN_SECONDS)
        if (reason := self._engine.reason(list(client.words))) is not None:
            self._lose(reason)
        elif client.process.returncode is None:
            nodes = " and ".join(self.called(self._nodes[number]) for number in client.link.nodes)
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
                self._hear_of(client)
            elif words:
                client.words.append(words)

    def _hear_of(self, client: _Client) -> None:
        for number in client.link.nodes:
            self._nodes[number].heard = time.monotonic()

    # What is waited for, and why something ends.

    async def _watch_the_queue(self) -> None:
        """Show what is waited for, and do not wait for what will never be."""
        pause = _LOOK_SECONDS[0]
        while not (self.over.is_set() or all(node.hello for node in self._nodes.values())):
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LOOK_SECONDS[1])
            state, for_ever = await asyncio.to_thread(self._engine.waiting)
            if for_ever:
                self._lose(state)
                return
            if state and not self.over.is_set():
                self._state(state)

    def _look_for_answers(self, now: float) -> None:
        """Give up a node of which nothing comes at all, where an engine has one begin at once."""
        seconds = self._engine.answer_seconds
        mute = [node for node in self._nodes.values() if not node.hello]
        if seconds is None or not mute or now < self._connected + _TELL_SECONDS:
            return
        names = " and ".join(self.called(node) for node in mute)
        if now > self._connected + seconds:
            self._lose(
                f"{names} {'has' if len(mute) == 1 else 'have'} not answered within {seconds:g} s: reached, but nbddp "
                "does not begin there. A shell's start-up file may wait for something, or its disk"
            )
        else:
            self._state(f"waits for {names}")

    async def explain_soon(self, node: NodeState, by: str, needless: Callable[[], bool]) -> None:
        """Say why a node has ended that was not told to.

        Args:
            node: The node.
            by: The signal that has told it to, from outside; empty if none has.
            needless: Tells whether nobody wants to know any more.
        """
        client = next(client for client in self._clients if node.number in client.link.nodes)
        # The engine may say why, on every node but one with some delay; and who has not even been told says nothing.
        for _ in range(EXPLAIN_LOOKS):
            await asyncio.sleep(EXPLAIN_LOOK_SECONDS)
            others = [self._nodes[number] for number in client.link.nodes if not self._nodes[number].told]
            reason = self._engine.reason(list(client.words))
            if client.done or needless() or reason is not None:
                break
        if reason is not None:
            self._lose(reason)
        elif by and others and not client.done:
            silent = max(others, key=lambda other: time.monotonic() - other.heard)
            self._lose(f"{self.called(silent)} has fallen silent, and {self._engine.title} has ended the others")
        elif client.done or client.words:
            self._lose(self._engine.explain(client.link, client.process.returncode, list(client.words)))
        elif by:
            self._lose(f"{self.called(node)} was told to end from outside ({by})")
        else:
            self._lose(f"{self.called(node)} has ended by itself")

    # The end.

    async def end(self, note: Callable[[str], None]) -> None:
        """See to it that no client, and nothing behind one, is left.

        Args:
            note: Shows a line on what could not be ended.
        """
        for client in self._clients:
            if not client.done:
                with contextlib.suppress(OSError, RuntimeError):
                    client.stdin.close()
        if not self._clients:
            return
        # A client may have a process that sees to its end, and goes on for ever where it cannot, or is stopped.
        helpers = {pid for client in self._clients for pid in _process.children_of(client.process.pid)}
        pidfds = [pidfd for pid in helpers if (pidfd := _process.open_pidfd(pid)) is not None]
        polite = all(node.ended for node in self._nodes.values())
        if not (polite and await self._wait(self._engine.client_seconds)):
            await self._cancel(note)
        for pidfd in pidfds:
            if not await asyncio.to_thread(_ends, pidfd, _HELPER_SECONDS):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)

    async def _cancel(self, note: Callable[[str], None]) -> None:
        for argv in self._engine.cancel():
            if not await _run_to_the_end(argv):
                note(f"{self._engine.title} does not answer, and may go on holding the nodes: {shlex.join(argv)}")
        # Nodes that are told to end, or see the end of their stdin, clear up; those whose client is killed may not.
        clearing = any(node.hello and node.may_speak for node in self._nodes.values())
        if await self._wait(_CLEAR_SECONDS if clearing else 0.0):
            return
        for signum, seconds in ((signal.SIGTERM, _CANCEL_SECONDS), (signal.SIGKILL, 1.0)):
            for client in self._clients:
                if client.process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        client.process.send_signal(signum)
            if await self._wait(seconds):
                return

    async def _wait(self, seconds: float) -> bool:
        """Wait for the ends of all clients; tell whether all have ended."""
        waits = [asyncio.ensure_future(client.process.wait()) for client in self._clients]
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


async def _run_to_the_end(argv: Sequence[str]) -> bool:
    """Run a command that ends what is left; tell whether it has come to its end."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:  # there is no such command: nothing was started by it either
        return True
    try:
        await asyncio.wait_for(process.wait(), _CANCEL_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        return False
    return True


def _ends(pidfd: int, seconds: float) -> bool:
    """Tell whether a process ends within so many seconds."""
    # Not select, which knows numbers below 1024 only.
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
