"""A node's ranks: their connections, what they print and say, their deaths, stacks and memory."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import selectors
import sys
import termios
import time
from collections.abc import Callable, Sequence

from nbddp import _process, _wire
from nbddp._frames import LONGEST_MESSAGE, Message, TooLongError
from nbddp._loop import Loop, Timers
from nbddp._memory import Meter
from nbddp._node_files import SentFiles
from nbddp._outflow import Outflow, RunOverError
from nbddp._paths import RunDir, format_size
from nbddp._uplink import STACK_SIGNAL

# Seconds between two looks at the ranks' memory, and until the first.
_MEMORY_SECONDS = 2.0
_MEMORY_SOON = 0.5

# Seconds in which most ranks have written their stack, and how often is looked again.
_STACK_SECONDS = 0.01
_STACK_LOOKS = 200

# Seconds until ranks are read again: when there was no room for what they say, and when they had said little.
_FULL_SECONDS = 0.01
_LITTLE_SECONDS = 0.02

# Seconds that a rank has to take what it is told.
_TELL_SECONDS = 5.0

# Lines of a traceback that are left of one that is too long; and characters of a list of types.
_LONGEST_TRACEBACK = 200
_LONGEST_KINDS = 100

_READ = 1 << 16


class _Rank:
    """A rank of this node."""

    def __init__(self, inbox: _wire.Inbox, hello: Message) -> None:
        self.inbox = inbox
        self.number: int = hello["rank"]
        self.pid: int = hello["pid"]
        self.output = inbox.fds.pop(0)
        self.pidfd = inbox.fds.pop(0) if inbox.fds else None
        os.set_blocking(self.output, False)
        self.dead = False
        # The file of the cell that it was told to run, and may still use.
        self.closure: str | None = None
        self.stacks_sent = 0
        self.stack_asked = False

    def close(self) -> None:
        self.inbox.close()
        for fd in (self.output, self.pidfd):
            if fd is not None:
                os.close(fd)


class Ranks:
    """The ranks of one node.

    Args:
        run_dir: The run's files.
        setup: What the notebook has said of the run beforehand.
        first: The number of the node's first rank.
        loop: The node's loop.
        timers: Its timers.
        out: The way to the notebook.
        files: What the notebook has sent.
        greet_agent: Called with the connection of an agent, and what it has said.
        have_begun: Called when a rank has connected, with the number of the attempt.

    Attributes:
        meter: Reads their memory.
    """

    def __init__(
        self,
        run_dir: RunDir,
        setup: Message,
        first: int,
        loop: Loop,
        timers: Timers,
        out: Outflow,
        files: SentFiles,
        greet_agent: Callable[[_wire.Inbox, Sequence[Message]], None],
        have_begun: Callable[[int], None],
    ) -> None:
        self._run_dir = run_dir
        # What paths in stacks are called on the notebook's machine.
        own = os.path.dirname(os.path.abspath(__file__))
        names = ((run_dir.root, setup["run_dir"]), (own, setup["package"]))
        self._names = [(os.fsencode(here), os.fsencode(there)) for here, there in names]
        self._first = first
        self._loop = loop
        self._timers = timers
        self._out = out
        self._files = files
        self._greet_agent = greet_agent
        self._have_begun = have_begun
        self.meter = Meter()
        self._ranks: dict[int, _Rank] = {}
        self._outputs = selectors.DefaultSelector()
        self._memory: dict[int, str] = {}
        self._memory_at = float("inf")
        self._oom_kills = _process.oom_kills()
        self._server = _wire.listen(run_dir.socket)
        loop.watch(self._server, self._accept)
        loop.watch(self._outputs, self._read_outputs)

    def close(self) -> None:
        """Send what they have printed last."""
        for rank in self._ranks.values():
            self._drain(rank)

    # Their connections.

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._server.accept()
                inbox = _wire.Inbox(connection)
                connection.setblocking(False)
                self._loop.watch(connection, functools.partial(self._greet, inbox))

    def _greet(self, inbox: _wire.Inbox) -> None:
        messages = inbox.receive()
        if messages and messages[0]["kind"] == "agent":
            self._greet_agent(inbox, messages)
        elif messages and inbox.fds:
            self._add(_Rank(inbox, messages[0]), messages)
        elif inbox.closed:
            self._loop.unwatch(inbox.sock)
            inbox.close()

    def _add(self, rank: _Rank, messages: Sequence[Message]) -> None:
        old = self._ranks.get(rank.number)
        if old is not None:  # torchrun has started it again
            self._files.done(old.number)
            self._drain(old)
            self._forget(old)
            old.close()
        self._ranks[rank.number] = rank
        self._memory_at = min(self._memory_at, time.monotonic() + _MEMORY_SOON)
        self._out.send("rank", **{key: value for key, value in messages[0].items() if key != "kind"})
        self._loop.watch(rank.inbox.sock, functools.partial(self._hear_if_room, rank))
        self._outputs.register(rank.output, selectors.EVENT_READ, rank)
        if rank.pidfd is not None:
            self._loop.watch(rank.pidfd, functools.partial(self._see_death, rank))
        self._have_begun(messages[0]["attempt"])
        self._pass_on(rank, messages[1:])

    def _forget(self, rank: _Rank) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._outputs.unregister(rank.output)
        for source in (rank.inbox.sock, rank.pidfd):
            if source is not None:
                self._loop.unwatch(source)

    def _alive(self, number: int) -> _Rank | None:
        rank = self._ranks.get(number)
        return None if rank is None or rank.dead else rank

    # What they say.

    def _hear_if_room(self, rank: _Rank) -> None:
        """Hear a rank; while there is no room for what it says, it waits, as who prints does."""
        if not self._out.full:
            self._hear(rank)
            return
        self._loop.unwatch(rank.inbox.sock)

        def again() -> None:
            if self._alive(rank.number) is rank and not rank.inbox.closed:
                self._loop.watch(rank.inbox.sock, functools.partial(self._hear_if_room, rank))

        self._timers.after(_FULL_SECONDS, again)

    def _hear(self, rank: _Rank) -> None:
        self._pass_on(rank, rank.inbox.receive())
        if rank.inbox.closed:
            self._loop.unwatch(rank.inbox.sock)
            if rank.pidfd is None or rank.inbox.broken:
                self._see_death(rank)

    def _pass_on(self, rank: _Rank, messages: Sequence[Message]) -> None:
        for message in messages:
            if message["kind"] in ("failing", "report", "idle", "end") and rank.stack_asked:
                # With its last word the run may be over, and what it was asked before be looked at.
                self._send_stack(rank)
            if message["kind"] in ("idle", "end"):
                # All that the rank has printed is in its pipe.
                self._drain(rank)
                if rank.closure is not None:
                    self._files.done(rank.number, rank.closure)
                    rank.closure = None
            for key in ("results", "pickled"):
                if message.get(key):
                    try:
                        message[key] = self._out.send_file(message[key])
                    except RunOverError:
                        return  # a report without it would be taken for the rank's own
                    if message[key] is None and key == "results":
                        del message[key]
                        message["bad_results"][""] = "what was to come back could not be read on its node"
            try:
                self._out.send("from", rank=rank.number, message=message)
            except TooLongError as error:
                self._out.send("from", rank=rank.number, message=_shortened(message, error.size))

    def _see_death(self, rank: _Rank) -> None:
        if rank.pidfd is not None:
            self._loop.unwatch(rank.pidfd)
        rank.inbox.idle = False
        while not (rank.inbox.idle or rank.inbox.closed):
            self._hear(rank)
        if rank.dead:
            return
        self._drain(rank)
        rank.dead = True
        self._files.done(rank.number)
        # faulthandler's words on a fatal signal are in there.
        self._send_stack(rank)
        kills = _process.oom_kills() - self._oom_kills
        self._out.send("died", rank=rank.number, exitcode=_process.exit_status(rank.pid), oom_kills=kills)
        self._forget(rank)

    # What they print.

    def _read_outputs(self) -> None:
        if self._out.full:
            # Looked at again soon; the ranks' pipes hold what they print until then.
            self._read_outputs_in(_FULL_SECONDS)
            return
        little = True
        for key, _ in self._outputs.select(0):
            if key.fd in self._outputs.get_map():
                little &= self._read_output(key.data) < _READ // 2
        if little:
            # Line by line would be a message for each; see `nbddp._ranks`.
            self._read_outputs_in(_LITTLE_SECONDS)

    def _read_outputs_in(self, seconds: float) -> None:
        self._loop.unwatch(self._outputs)
        self._timers.after(seconds, lambda: self._loop.watch(self._outputs, self._read_outputs))

    def _read_output(self, rank: _Rank) -> int:
        try:
            data = os.read(rank.output, _READ)
        except BlockingIOError:
            return 0
        if not data:
            with contextlib.suppress(KeyError, ValueError):
                self._outputs.unregister(rank.output)
            return 0
        self._out.output(rank.number, data)
        return len(data)

    def _drain(self, rank: _Rank) -> None:
        """Send what is in a rank's pipe at this moment; what its children print may never come to an end."""
        with contextlib.suppress(OSError):
            left = _readable(rank.output)
            while left > 0 and not rank.dead and (taken := self._read_output(rank)):
                left -= taken

    # What they are told and asked.

    def tell(self, number: int, message: Message) -> None:
        """Hand a message of the notebook's to a rank."""
        rank = self._alive(number)
        if rank is None:
            return
        if message["kind"] == "cell":
            rank.closure = message["closure"]
            if rank.closure is not None:
                message = {**message, "closure": self._files.path(rank.closure)}
        fields = {key: value for key, value in message.items() if key != "kind"}
        rank.inbox.sock.settimeout(_TELL_SECONDS)
        with contextlib.suppress(OSError):  # it is gone, or does not listen
            _wire.send(rank.inbox.sock, message["kind"], **fields)
        rank.inbox.sock.setblocking(False)

    def signal(self, number: int, signum: int, *, main: bool) -> None:
        """Send a signal to a rank; with `main`, to its main thread."""
        if (rank := self._alive(number)) is not None:
            send = _process.signal_main_thread if main else _process.send_signal
            send(rank.pid, rank.pidfd, signum)

    def ask_for_stack(self, number: int) -> None:
        """Have a rank write its stack, which is sent when it is there."""
        if (rank := self._alive(number)) is not None:
            rank.stack_asked = True
            _process.signal_main_thread(rank.pid, rank.pidfd, STACK_SIGNAL)
            self._timers.after(_STACK_SECONDS, functools.partial(self._send_stack_soon, rank, _STACK_LOOKS))

    def _send_stack_soon(self, rank: _Rank, looks: int) -> None:
        if rank.stack_asked and not rank.dead:
            self._send_stack(rank)
            if rank.stack_asked and looks:
                self._timers.after(_STACK_SECONDS, functools.partial(self._send_stack_soon, rank, looks - 1))

    def _send_stack(self, rank: _Rank) -> None:
        """Send what faulthandler has written since; paths as the notebook's machine would have them."""
        with contextlib.suppress(OSError), open(self._run_dir.stacks(rank.number), "rb") as file:
            file.seek(rank.stacks_sent)
            text = file.read()
            if not text:
                return
            rank.stack_asked = False
            rank.stacks_sent += len(text)
            for here, there in self._names:
                text = text.replace(here, there)
            self._out.send("stack", rank=rank.number, text=text.decode(errors="replace"))

    def look_at_memory(self, now: float) -> None:
        """Tell how much memory they use, when it is time and there is something new."""
        if not self._ranks or now <= self._memory_at:
            return
        self._memory_at = now + _MEMORY_SECONDS
        local = {rank.number - self._first: rank.pid for rank in self._ranks.values() if not rank.dead}
        memory = {self._first + key: text for key, text in self.meter.read(local).items()}
        if memory != self._memory:
            self._memory = memory
            self._out.send("memory", ranks=memory)


def _readable(fd: int) -> int:
    """Return how many bytes a pipe holds."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def _shortened(message: Message, size: int) -> Message:
    """Return what can be sent in place of a message that is too long, so that it does not end the run."""
    short = dict(message)
    if message["kind"] == "display" and "data" in message:
        # In its place, which a mark in the output tells by its number; and what updates it finds it.
        kinds = ", ".join(message["data"])[:_LONGEST_KINDS]
        text = (
            f"a display of {format_size(size)} ({kinds}) is not shown: from other machines come at most "
            f"{format_size(LONGEST_MESSAGE)}. Save it to a file there, or show less"
        )
        short["data"] = {"text/plain": text}
    elif isinstance(lines := message.get("lines"), list):
        half = _LONGEST_TRACEBACK // 2
        short["lines"] = [*lines[:half], f"({len(lines) - 2 * half} lines are not shown)", *lines[-half:]]
    return short
