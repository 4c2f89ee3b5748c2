"""One run, seen from the notebook: wait for the ranks, show what they print, stop them when that is due.

Everything happens on the thread that called. One loop waits for the ranks (their messages, their output, their
deaths), the agent, the launcher, the interrupt key and the clock. Knowing how the ranks ended, by itself and not from
torchrun, it can tell the first failure from its consequences, and need not wait for torchrun to notice.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nbddp import _process, _wire
from nbddp._agent import Launch
from nbddp._paths import RunDir
from nbddp._rank import STACK_SIGNAL
from nbddp._relay import Relay
from nbddp._stop import InterruptGate, Ladder, Step

_READ = 1 << 20

# Seconds that torchrun has to say how a rank died, and to start the ranks again, before nbddp goes on without it.
# It never starts them again after one that left with status 0.
_AGENT_SECONDS = 3.0
_RESTART_SECONDS = {"fork": 5.0, "spawn": 120.0}

# Seconds to wait for the launcher's word that all is gone; it needs milliseconds.
_END_SECONDS = 15.0


@dataclass
class RankState:
    """What is known of one rank.

    Attributes:
        rank: Its number.
        pid: Its process.
        in_cell: Whether it has begun to run the cell.
        outcome: Its report, once there is one; see `nbddp._rank._outcome`.
        ended: Whether it has said that nothing more comes, or is gone.
        died: When it was seen to be gone without having said so.
        exitcode: How torchrun says that it ended, if it died.
        stopped: Whether it was ended by nbddp.
    """

    rank: int
    pid: int
    inbox: _wire.Inbox
    output: int
    pidfd: int | None
    in_cell: bool = False
    outcome: dict[str, Any] | None = None
    ended: bool = False
    died: float | None = None
    exitcode: int | None = None
    stopped: bool = False

    @property
    def failed_at(self) -> float | None:
        """When it failed, or None if it has not."""
        if self.outcome is not None:
            return None if self.outcome["outcome"] == "done" else float(self.outcome["time"])
        return self.died if not self.stopped else None


@dataclass
class Ending:
    """How a run ended.

    Attributes:
        cause: "done", "failed", "interrupted", "timeout", or "no ranks" if none ever ran.
        ranks: The ranks of the last attempt.
        first: The rank that failed first.
        value: The mime bundle of the cell's value on rank 0, and its metadata.
        killed: Whether ranks had to be killed after an interrupt.
        agent_status: The agent's exit status, if it ended without a word.
        times: When each stage was complete, on the rank that took longest for it (``time.monotonic``).
    """

    cause: str
    ranks: dict[int, RankState]
    first: RankState | None = None
    value: tuple[dict[str, Any], dict[str, Any]] | None = None
    killed: bool = False
    agent_status: int | None = None
    times: dict[str, float] = field(default_factory=dict)


class Run:
    """Starts a run and sees it through.

    Args:
        launch: What the launcher is to start.
        server: The socket, at `RunDir.socket`, on which the run's processes report.
        channel: A channel to the launcher.
        relay: Where output goes.
        gate: Tells of interrupts.
        timeout: Seconds after which the run is stopped, or None.
        grace: Seconds that ranks have to end after an interrupt.
        wait_until_gone: Whether to return only when every process is gone: what holds a GPU's memory must be, before
            the next cell asks for it.
        say: Shows a line of nbddp's own.
    """

    def __init__(
        self,
        launch: Launch,
        server: socket.socket,
        channel: _wire.Inbox,
        relay: Relay,
        gate: InterruptGate,
        *,
        timeout: float | None,
        grace: float,
        wait_until_gone: bool,
        say: Callable[[str], None],
    ) -> None:
        self._launch = launch
        self._run_dir = RunDir.from_environment(launch.run_dir)
        self._server = server
        self._channel = channel
        self._relay = relay
        self._gate = gate
        self._deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self._grace = grace
        self._wait_until_gone = wait_until_gone
        self._say = say
        self._selector = selectors.DefaultSelector()
        self._ranks: dict[int, RankState] = {}
        self._attempt = 0
        self._value: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._ladder: Ladder | None = None
        self._cause = "done"
        self._killed = False
        self._started = False
        self._launcher_ended = False
        self._launcher_died = False
        self._times: dict[str, float] = {}
        self._agent_ended = False
        self._agent_status: int | None = None
        self._restart_by: float | None = None

    def wait(self) -> Ending:
        """Launch and wait for the end.

        However it leaves, the launcher then knows that what remains is its to end.
        """
        self._watch(self._server, self._accept)
        self._watch(self._channel.sock, self._hear_launcher)
        self._watch(self._gate, self._interrupt)
        self._channel.sock.setblocking(False)
        try:
            # A run that cannot be sent is one whose launcher died just now.
            self._times["asked"] = time.monotonic()
            with contextlib.suppress(OSError):
                self._send("launch", **vars(self._launch))
            while not self._over():
                self._step(min(self._deadline, self._ladder_due(), self._restart_by or float("inf"), self._relay.due))
            if self._cause == "done" and self._failures():
                self._cause = "failed"
            self._name_deaths()
            self._times["all reported"] = time.monotonic()
            self._let_go()
            self._relay.finish()
            return self._ending()
        finally:
            self._selector.close()
            for state in self._ranks.values():
                _close(state)

    @property
    def launcher_died(self) -> bool:
        """Whether the launcher ended before the run did."""
        return self._launcher_died

    @property
    def started(self) -> bool:
        """Whether the launcher has started the agent."""
        return self._started

    @property
    def ranks(self) -> int:
        """How many ranks the run has."""
        return self._launch.ranks

    # The loop.

    def _watch(self, source: Any, callback: Callable[[], object]) -> None:
        self._selector.register(source, selectors.EVENT_READ, callback)

    def _unwatch(self, source: Any) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(source)

    def _step(self, until: float) -> None:
        timeout = None if until == float("inf") else max(0.0, until - time.monotonic())
        for key, _ in self._selector.select(timeout):
            # One callback may close what another was to read.
            if key.fd in self._selector.get_map():
                key.data()
        self._look_at_the_clock()

    def _over(self) -> bool:
        if self._launcher_ended or self._killed:
            return True
        complete = len(self._ranks) == self._launch.ranks and all(s.ended for s in self._ranks.values())
        return complete and not self._may_restart()

    def _may_restart(self) -> bool:
        """Tell whether torchrun is about to start the ranks again."""
        return (
            self._attempt < self._launch.max_restarts
            and self._ladder is None
            and not self._agent_ended
            and bool(self._failures())
            and (self._restart_by is None or time.monotonic() < self._restart_by)
        )

    def _failures(self) -> list[RankState]:
        """Return the ranks that failed, the first to fail first."""
        failed = [(at, state.rank) for state in self._ranks.values() if (at := state.failed_at) is not None]
        return [self._ranks[rank] for _, rank in sorted(failed)]

    def _ladder_due(self) -> float:
        return self._ladder.due if self._ladder is not None else float("inf")

    def _look_at_the_clock(self) -> None:
        if time.monotonic() >= self._relay.due:
            self._relay.tick()
        if self._ladder is None and time.monotonic() >= self._deadline:
            self._stop("timeout", Ladder.of_interrupt(self._grace))
        if self._ladder is None and (failed := self._failures()):
            if self._attempt < self._launch.max_restarts and self._restart_by is None:
                self._restart_by = time.monotonic() + _RESTART_SECONDS[self._launch.start_method]
                self._say(
                    f"nbddp: rank {failed[0].rank} failed ({in_short(failed[0])}); "
                    f"restart {self._attempt + 1} of {self._launch.max_restarts}"
                )
            elif not self._may_restart():
                self._stop("failed", Ladder.of_failure())
        while self._ladder is not None and (step := self._ladder.take()) is not None:
            self._take(step)

    # Stopping.

    def _interrupt(self) -> None:
        self._gate.drain()
        if self._gate.presses > 1 or not self._ranks:
            self._stop("interrupted", Ladder.of_impatience())
        elif self._cause != "interrupted":
            self._stop("interrupted", Ladder.of_interrupt(self._grace))

    def _stop(self, cause: str, ladder: Ladder) -> None:
        self._cause = cause
        self._ladder = ladder
        # Neither is to come any more; and a time in the past would keep the loop spinning.
        self._deadline = float("inf")
        self._restart_by = None

    def _take(self, step: Step) -> None:
        alive = [state for state in self._ranks.values() if not state.ended]
        if step is Step.KILL:
            for state in alive:
                state.stopped = True
            self._killed = True
            return
        for state in alive:
            if step is Step.INTERRUPT and state.in_cell:
                # The stack first: it is written by the C-level handler, before KeyboardInterrupt unwinds it.
                _process.signal_main_thread(state.pid, state.pidfd, STACK_SIGNAL)
                _process.signal_main_thread(state.pid, state.pidfd, signal.SIGINT)
            elif state.outcome is None:
                # One that is still joining the process group has nothing to clean up, and in there, in C++, it would
                # not hear of an interrupt.
                state.stopped = True
                signum = signal.SIGKILL if step is Step.KILL_RANKS else signal.SIGTERM
                _process.send_signal(state.pid, state.pidfd, signum)
        if step is Step.TERMINATE and self._cause != "failed" and alive:
            self._say("nbddp: ranks that did not end are terminated")

    # The launcher and the agent.

    def _send(self, kind: str, **fields: Any) -> None:
        self._channel.sock.setblocking(True)
        try:
            _wire.send(self._channel.sock, kind, **fields)
        finally:
            self._channel.sock.setblocking(False)

    def _hear_launcher(self) -> None:
        for message in self._channel.receive():
            match message["kind"]:
                case "started":
                    self._started = True
                case "ended":
                    self._launcher_ended = True
                    if not self._agent_ended:
                        self._agent_status = message["status"]
                case "refused":
                    self._launcher_ended = True
        if self._channel.closed and not self._launcher_ended:
            # Killed: the kernel takes its place.
            self._launcher_ended = self._launcher_died = True
        if self._launcher_ended:
            self._unwatch(self._channel.sock)
            for state in list(self._ranks.values()):
                self._see_death(state)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._server.accept()
                connection.setblocking(False)
                inbox = _wire.Inbox(connection)
                self._watch(connection, partial(self._greet, inbox))

    def _greet(self, inbox: _wire.Inbox) -> None:
        """Find out who has connected."""
        messages = inbox.receive()
        if messages and messages[0]["kind"] == "agent":
            self._times["agent forked"] = messages[0]["time"]
            self._selector.modify(inbox.sock, selectors.EVENT_READ, partial(self._hear_agent, inbox))
            self._take_from_agent(messages[1:])
        elif messages:
            state = self._add_rank(inbox, messages[0])
            self._take_from_rank(state, messages[1:])
        elif inbox.closed:
            self._unwatch(inbox.sock)
            inbox.close()

    def _hear_agent(self, inbox: _wire.Inbox) -> None:
        self._take_from_agent(inbox.receive())
        if inbox.closed:
            self._unwatch(inbox.sock)
            inbox.close()

    def _take_from_agent(self, messages: list[_wire.Message]) -> None:
        for message in messages:
            self._agent_ended = True
            for rank, exitcode in message["failures"]:
                if rank in self._ranks:
                    self._ranks[rank].exitcode = exitcode

    # The ranks.

    def _add_rank(self, inbox: _wire.Inbox, message: _wire.Message) -> RankState:
        rank, attempt = message["rank"], message["attempt"]
        if attempt > self._attempt:
            self._attempt = attempt
            self._restart_by = None
            for old in self._ranks.values():
                self._drain(old)
                self._forget(old)
            self._ranks = {}
            self._value = None
        output = inbox.fds.pop(0)
        pidfd = inbox.fds.pop(0) if inbox.fds else None
        os.set_blocking(output, False)
        state = RankState(rank, message["pid"], inbox, output, pidfd)
        self._ranks[rank] = state
        self._selector.modify(inbox.sock, selectors.EVENT_READ, partial(self._hear, state))
        self._watch(output, partial(self._read, state))
        if pidfd is not None:
            self._watch(pidfd, partial(self._see_death, state))
        if self._ladder is not None:
            # It comes late: what the others were told already is told to it, too.
            state.stopped = True
            _process.send_signal(state.pid, pidfd, signal.SIGTERM)
        return state

    def _hear(self, state: RankState) -> None:
        self._take_from_rank(state, state.inbox.receive())
        if state.inbox.closed:
            self._unwatch(state.inbox.sock)
            if state.pidfd is None:  # where there is nothing better, this is how a death is seen
                self._see_death(state)

    def _take_from_rank(self, state: RankState, messages: list[_wire.Message]) -> None:
        for message in messages:
            match message["kind"]:
                case "begin":
                    state.in_cell = True
                case "display" if message["value"]:
                    self._value = message["data"], message["metadata"]
                case "display":
                    self._relay.display(state.rank, message)
                case "report":
                    state.outcome = message
                    for stage, at in message["times"].items():
                        self._times[stage] = max(at, self._times.get(stage, at))
                case "end":
                    # It flushed before it said so: all that is its own is in the pipe. Its children may go on.
                    self._drain(state)
                    state.ended = True
                    self._unwatch(state.output)

    def _read(self, state: RankState) -> bool:
        """Read once from a rank's output; return whether there may be more."""
        try:
            data = os.read(state.output, _READ)
        except BlockingIOError:
            return False
        if not data:
            self._unwatch(state.output)
            return False
        self._relay.feed(state.rank, data)
        return True

    def _drain(self, state: RankState) -> None:
        while not state.ended and self._read(state):
            pass

    def _see_death(self, state: RankState) -> None:
        if state.pidfd is not None:
            self._unwatch(state.pidfd)
        if state.ended:
            return
        state.inbox.idle = False
        while not (state.inbox.idle or state.inbox.closed or state.ended):
            self._hear(state)
        self._drain(state)
        if not state.ended:
            state.died = time.monotonic()
            state.ended = True
        self._unwatch(state.output)
        self._unwatch(state.inbox.sock)

    def _forget(self, state: RankState) -> None:
        for source in (state.inbox.sock, state.output, state.pidfd):
            if source is not None:
                self._unwatch(source)
        _close(state)

    # The end.

    def _name_deaths(self) -> None:
        """Wait for torchrun's word on how ranks died that said nothing."""
        deadline = time.monotonic() + _AGENT_SECONDS
        while (
            any(s.died is not None and not s.stopped and s.exitcode is None for s in self._ranks.values())
            and not (self._agent_ended or self._launcher_ended)
            and time.monotonic() < deadline
        ):
            self._step(deadline)

    def _let_go(self) -> None:
        """Tell the launcher that the run is over; see to it that all of it is gone, where that matters."""
        if self._launcher_ended:
            return
        done = self._cause == "done"
        with contextlib.suppress(OSError):
            self._send("finish" if done else "kill")
        # A launcher that is still importing will find the request taken back.
        if (done and not self._wait_until_gone) or not self._started:
            return
        deadline = time.monotonic() + _END_SECONDS
        while not self._launcher_ended and time.monotonic() < deadline:
            self._step(deadline)

    def _ending(self) -> Ending:
        cause = self._cause
        if cause in ("done", "failed") and len(self._ranks) < self._launch.ranks and not self._failures():
            cause = "no ranks"
        failed = self._failures()
        first = failed[0] if failed else None
        return Ending(cause, self._ranks, first, self._value, self._killed, self._agent_status, self._times)


def _close(state: RankState) -> None:
    state.inbox.close()
    for fd in (state.output, state.pidfd):
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)


def in_short(state: RankState) -> str:
    """Return in a few words how a rank ended."""
    outcome = state.outcome
    if outcome is None:
        return "stopped" if state.stopped else how_it_died(state.exitcode)
    match outcome["outcome"]:
        case "done":
            return "finished"
        case "raised":
            first = (outcome["message"].splitlines() or [""])[0]
            return f"{outcome['exception']}: {first}" if first else str(outcome["exception"])
        case "exited":
            return f"exited with status {outcome['code']}"
        case _:
            return str(outcome["outcome"])


def how_it_died(exitcode: int | None) -> str:
    """Return how a process ended that said nothing, from its exit status (negative: minus a signal)."""
    if exitcode is None:
        return "left before the end of the cell"
    if exitcode < 0:
        try:
            name = signal.Signals(-exitcode).name
        except ValueError:
            name = "an unknown one"
        return f"was killed by signal {-exitcode} ({name})"
    return f"left the process with status {exitcode} before the end of the cell"
