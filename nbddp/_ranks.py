"""The ranks of a run as the notebook sees them: who has connected, what they say and print, when they die.

Torchrun's agent connects to the same socket, and says at its end how those died that could not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from nbddp import _process, _wire
from nbddp._loop import Loop
from nbddp._rank_state import RankState
from nbddp._stop import TELL_SECONDS

# More at once costs time even if there is less: the buffer is made for it.
_READ = 1 << 16

# Ranks that print line by line would wake this process for each line. So after a read that found little, their output
# is left alone for some milliseconds; their pipes hold far more than they print in that time.
_GATHER_SECONDS = 0.02
_LITTLE = 1 << 15

# Seconds that a rank has to take a message; a thread of its own waits for them.
_ASK_SECONDS = 5.0


class Listener(Protocol):
    """Who hears what ranks print and show; `nbddp._relay.Relay` is one."""

    def feed(self, rank: int, data: bytes) -> None:
        """Take what a rank wrote."""

    def display(self, rank: int, message: dict[str, Any]) -> None:
        """Take a display."""

    def restart(self, rank: int) -> None:
        """Take note that a rank is a new process."""

    def number_from(self, first: int, world: int) -> None:
        """Take note of what the ranks are called where there are several machines."""


class Ranks:
    """The ranks of a run's present attempt.

    Args:
        server: The socket, at `RunDir.socket`, on which the run's processes report.
        loop: The event loop.

    Attributes:
        states: The ranks by their number on this machine.
        attempt: How often torchrun has started them again.
        values: The values of the cell on the ranks that have one: a mime bundle and its metadata.
        times: When each stage was complete, on the rank that took longest for it (``time.monotonic``).
        agent_ended: Whether the agent has said its last.
        ready: Called with each rank that waits for its first cell.
        due: When `tick` is to be called (``time.monotonic``); infinity if there is no need.
    """

    def __init__(self, server: socket.socket, loop: Loop) -> None:
        self._server = server
        self._loop = loop
        self._relay: Listener
        self._arrived: Callable[[RankState], None]
        self._began: Callable[[RankState], None]
        self.ready: Callable[[RankState], None] = lambda _: None
        self.states: dict[int, RankState] = {}
        self.attempt = 0
        self.values: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.times: dict[str, float] = {}
        self.agent_ended = False
        # Also those of the agent, and of who has connected and not said who it is.
        self._inboxes: list[_wire.Inbox] = []
        # The outputs of all ranks, as one source of the loop.
        self._outputs = selectors.DefaultSelector()
        self.due = float("inf")
        loop.watch(server, self._accept)
        self._watch_outputs()

    def attach(
        self,
        relay: Listener,
        *,
        arrived: Callable[[RankState], None] = lambda _: None,
        began: Callable[[RankState], None] = lambda _: None,
        quick: bool = True,
    ) -> None:
        """Say who is to hear of the ranks from now on.

        Args:
            relay: Where output goes.
            arrived: Called with each rank that connects.
            began: Called with each rank that begins the cell.
            quick: Whether a cell is about to begin that may be a quick one, whose output is read at its end.
        """
        self._relay, self._arrived, self._began = relay, arrived, began
        if quick:
            self._put_off_output()
        else:
            self._watch_outputs()

    @property
    def gone(self) -> list[RankState]:
        """The ranks that ended without a word."""
        return [state for state in self.states.values() if state.died is not None]

    @property
    def all_idle(self) -> bool:
        """Whether all ranks that there are wait for a cell."""
        return all(state.idle for state in self.states.values())

    @property
    def failed(self) -> list[RankState]:
        """The ranks that failed: the first to fail first, those last that only noticed that another was gone."""
        failed = [
            (state.is_consequence, at, state.local)
            for state in self.states.values()
            if (at := state.failed_at) is not None
        ]
        return [self.states[rank] for _, _, rank in sorted(failed)]

    @property
    def first(self) -> int:
        """The number of this machine's first rank; until one has connected, 0."""
        return next((state.rank - state.local for state in self.states.values()), 0)

    @property
    def telling(self) -> list[RankState]:
        """The ranks that have failed and are about to say how: those only that there is any need to hear of."""
        needed = bool(self.failed) and self.failed[0].is_consequence
        now = time.monotonic()
        return [
            state
            for state in self.states.values()
            if state.failing
            and state.outcome is None
            and not state.ended
            and (needed or not state.is_consequence)
            and now < state.failing["time"] + TELL_SECONDS
        ]

    def close(self) -> None:
        """Close the connections, and let go of who was told of the ranks: the run, which has all that it was sent."""
        self._arrived = self._began = self.ready = lambda _: None
        self._loop.unwatch(self._outputs)
        self._outputs.close()
        for state in self.states.values():
            _close(state)
        for inbox in self._inboxes:
            inbox.close()

    def see_deaths(self) -> None:
        """Take all ranks for dead that have not said that they ended."""
        for state in list(self.states.values()):
            self._see_death(state)

    def tell(self, state: RankState, kind: str, **fields: Any) -> None:
        """Send a rank a word; see `nbddp._uplink.Uplink._listen`."""
        with contextlib.suppress(OSError):  # it is gone, or does not listen
            _wire.send(state.inbox.sock, kind, **fields)

    def ask(self, state: RankState, message: bytes) -> None:
        """Send a rank a message that may be long (`nbddp._wire.encode`)."""
        sock = state.inbox.sock
        with contextlib.suppress(OSError):  # it is gone
            try:
                sent = sock.send(message)
            except BlockingIOError:
                sent = 0
            if sent < len(message):
                sock.settimeout(_ASK_SECONDS)
                try:
                    sock.sendall(memoryview(message)[sent:])
                finally:
                    sock.setblocking(False)

    # Who connects.

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._server.accept()
                inbox = _wire.Inbox(connection)
                self._inboxes.append(inbox)
                connection.setblocking(False)
                self._loop.watch(connection, partial(self._greet, inbox))

    def _greet(self, inbox: _wire.Inbox) -> None:
        """Find out who has connected."""
        messages = inbox.receive()
        if messages and messages[0]["kind"] == "agent":
            self.times["agent forked"] = messages[0]["time"]
            self._loop.watch(inbox.sock, partial(self._hear_agent, inbox))
            self._take_from_agent(messages[1:])
        elif messages:
            state = self._add_rank(inbox, messages[0])
            self._take_from_rank(state, messages[1:])
        elif inbox.closed:
            self._loop.unwatch(inbox.sock)
            inbox.close()

    def _hear_agent(self, inbox: _wire.Inbox) -> None:
        self._take_from_agent(inbox.receive())
        if inbox.closed:
            self._loop.unwatch(inbox.sock)
            inbox.close()

    def _take_from_agent(self, messages: list[_wire.Message]) -> None:
        for message in messages:
            self.agent_ended = True
            for rank, exitcode in message["failures"]:
                if rank in self.states:
                    self.states[rank].exitcode = exitcode

    def _add_rank(self, inbox: _wire.Inbox, message: _wire.Message) -> RankState:
        rank, local, attempt = message["rank"], message["local"], message["attempt"]
        if attempt > self.attempt:
            self.attempt = attempt
            for old in self.states.values():
                self._drain(old)
                self._forget(old)
                self._relay.restart(old.local)
            self.states = {}
            self.values = {}
        if not inbox.fds:
            # Linux leaves out what finds no place, and says nothing.
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        output = inbox.fds.pop(0)
        pidfd = inbox.fds.pop(0) if inbox.fds else None
        os.set_blocking(output, False)
        state = RankState(
            rank, message["pid"], inbox, output, pidfd, local=local, world=message["world"], node=message.get("node")
        )
        self.states[local] = state
        self._relay.number_from(rank - local, message["world"])
        self._loop.watch(inbox.sock, partial(self._hear, state))
        self._outputs.register(output, selectors.EVENT_READ, state)
        if pidfd is not None:
            self._loop.watch(pidfd, partial(self._see_death, state))
        self._arrived(state)
        return state

    # What they say.

    def _hear(self, state: RankState) -> None:
        self._take_from_rank(state, state.inbox.receive())
        if state.inbox.closed:
            self._loop.unwatch(state.inbox.sock)
            # Where there is nothing better, this is how a death is seen.
            if state.pidfd is None or state.inbox.broken:
                self._see_death(state)

    def _take_from_rank(self, state: RankState, messages: list[_wire.Message]) -> None:
        for message in messages:
            match message["kind"]:
                case "begin":
                    state.in_cell, state.idle = True, False
                    self._began(state)
                case "ready":
                    state.idle = True
                    self.ready(state)
                case "display" if message["value"]:
                    self.values[state.local] = message["data"], message["metadata"]
                    self._relay.display(state.local, message)
                case "display":
                    self._relay.display(state.local, message)
                case "at":
                    state.where, state.asked = message, False
                case "failing":
                    state.failing = message
                case "report":
                    state.outcome = message
                    for stage, at in message["times"].items():
                        self.times[stage] = max(at, self.times.get(stage, at))
                case "idle":
                    state.pickled, state.held, state.backend = message["pickled"], message["held"], message["backend"]
                    # As at the end: all that the cell has printed is in the pipe.
                    self._drain(state)
                    state.ended, state.idle, state.ended_at = True, True, time.monotonic()
                case "memory":
                    state.memory = message["text"]
                case "exitcode":
                    state.exitcode = message["exitcode"]
                case "died":
                    # Of a rank on another machine, which its node has seen.
                    state.oom_kills = message["oom_kills"]
                    state.exitcode = message["exitcode"] if state.exitcode is None else state.exitcode
                    self._see_death(state)
                case "regrouped":
                    state.regrouped = message["problem"]
                case "end":
                    state.pickled = message["pickled"]
                    # It flushed before it said so: all that is its own is in the pipe. Its children may go on.
                    self._drain(state)
                    state.ended, state.ended_at = True, time.monotonic()
                    self._ignore_output(state)

    # What they print.

    def tick(self) -> None:
        """Look at the outputs again, if it is time."""
        if time.monotonic() >= self.due:
            self._watch_outputs()

    def _watch_outputs(self) -> None:
        self.due = float("inf")
        self._loop.watch(self._outputs, self._read_all)

    def _read_all(self) -> None:
        little = True
        for key, _ in self._outputs.select(0):
            # One that is read may end another: a restart takes all.
            if key.fd in self._outputs.get_map():
                little &= self._read(key.data) < _LITTLE
        if little:
            self._put_off_output()

    def _put_off_output(self) -> None:
        self._loop.unwatch(self._outputs)
        self.due = time.monotonic() + _GATHER_SECONDS

    def _ignore_output(self, state: RankState) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._outputs.unregister(state.output)

    def _read(self, state: RankState) -> int:
        """Read once from a rank's output; return how many bytes there were."""
        try:
            data = os.read(state.output, _READ)
        except BlockingIOError:
            return 0
        if not data:
            self._ignore_output(state)
            return 0
        self._relay.feed(state.local, data)
        return len(data)

    def _drain(self, state: RankState) -> None:
        while not state.ended and self._read(state):
            pass

    def _see_death(self, state: RankState) -> None:
        if state.pidfd is not None:
            self._loop.unwatch(state.pidfd)
        if state.ended and not state.idle:
            return
        state.inbox.idle = False
        while not (state.inbox.idle or state.inbox.closed or (state.ended and not state.idle)):
            self._hear(state)
        self._drain(state)
        if not state.ended or state.idle:
            state.idle = False
            state.died = state.ended_at = time.monotonic()
            state.ended = True
            # torchrun will say so, too, but later, and not of ranks that it starts again.
            if state.node is None:
                state.exitcode = _process.exit_status(state.pid)
        self._ignore_output(state)
        self._loop.unwatch(state.inbox.sock)

    def _forget(self, state: RankState) -> None:
        self._ignore_output(state)
        for source in (state.inbox.sock, state.pidfd):
            if source is not None:
                self._loop.unwatch(source)
        _close(state)


def _close(state: RankState) -> None:
    state.inbox.close()
    for fd in (state.output, state.pidfd):
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)
