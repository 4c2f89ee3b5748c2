"""One run, seen from the notebook: wait for the ranks, show what they print, stop them when that is due.

Everything happens on the thread that called. One loop waits for the ranks (their messages, their output, their
deaths), the agent, the launcher, the interrupt key and the clock. Knowing how the ranks ended, by itself and not from
torchrun, it can tell the first failure from its consequences, and need not wait for torchrun to notice.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbddp import _machines
from nbddp._agent import Launch
from nbddp._memory import Meter
from nbddp._panel import Panel
from nbddp._placement import Nodes
from nbddp._rank_state import RankState, in_short, rank_list
from nbddp._relay import Relay
from nbddp._screen import Screen
from nbddp._stop import BREAK_OFF_SECONDS, SETTLE_SECONDS, STACK_SECONDS, InterruptGate, Ladder, Step
from nbddp._world import World

# Seconds that torchrun has to say how a rank died, and, after the failed ranks are gone, to start them all again,
# before nbddp goes on without it. It gives the others 30 seconds to end; it never starts anew after one that left with
# status 0.
_AGENT_SECONDS = 3.0
_RESTART_SECONDS = {"fork": 40.0, "spawn": 160.0}

# Seconds after which a line says that ranks have not begun the cell. Joining takes the first of a hundred ranks, on two
# cores, ten.
_SLOW_START_SECONDS = 30.0

# Seconds between two looks at whether ranks that have failed have said how.
_PUT_OFF_SECONDS = 0.02


@dataclass
class Ending:
    """How a run ended.

    Attributes:
        cause: "done", "failed", "interrupted", "timeout", or "no ranks" if none ever ran.
        ranks: The ranks of the last attempt.
        first: The rank that failed first.
        value: The mime bundle of the cell's value, and its metadata: that of the first rank that is shown.
        killed: Whether ranks had to be killed after an interrupt.
        stayed: Whether the ranks wait for the next cell.
        agent_status: The agent's exit status, if it ended without a word.
        refusal: Why the launcher started nothing, if it said so.
        nodes: The nodes that the ranks were on; None if they were on this machine.
        times: When each stage was complete, on the rank that took longest for it (``time.monotonic``).
    """

    cause: str
    ranks: dict[int, RankState]
    first: RankState | None = None
    value: tuple[dict[str, Any], dict[str, Any]] | None = None
    killed: bool = False
    stayed: bool = False
    agent_status: int | None = None
    refusal: str | None = None
    nodes: Nodes | None = None
    times: dict[str, float] = field(default_factory=dict)


class Run:
    """Sets a cell going on the ranks of a world and sees it through.

    Args:
        world: The ranks' processes.
        relay: Where output goes.
        screen: Where the panel is shown; None for no panel.
        meter: Reads the ranks' memory.
        gate: Tells of interrupts.
        begin: Sets the cell going.
        stay: Whether the ranks stay when the cell is over, if they can.
        plain: Whether what is shown is to be the same at every run: how long ranks take to begin is not.
        timeout: Seconds after which the run is stopped, or None.
        grace: Seconds that ranks have to end after an interrupt.
        wait_until_gone: Whether to return only when every process is gone: what holds a GPU's memory must be, before
            the next cell asks for it. So it is in any case if ranks leave processes of their own.
    """

    def __init__(
        self,
        world: World,
        relay: Relay,
        screen: Screen | None,
        meter: Meter,
        gate: InterruptGate,
        *,
        begin: Callable[[], None],
        stay: bool = False,
        plain: bool = False,
        timeout: float | None,
        grace: float,
        wait_until_gone: bool,
    ) -> None:
        self.world = world
        self._relay = relay
        self._gate = gate
        self._begin = begin
        self._stay = stay
        self._deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self._grace = grace
        self._wait_until_gone = wait_until_gone
        self._ranks = world.ranks
        self._launch = world.launch
        self._ranks.attach(relay, arrived=self._arrived, began=self._began)
        if world.nodes is not None:
            world.nodes.note = relay.say
        self.panel = Panel(self._ranks, self._launch.ranks, relay.outputs, screen, meter, world.nodes)
        # Without the others of several machines it goes nowhere.
        quiet = plain and world.launch.nnodes == 1
        self._slow_start_at = float("inf") if quiet else time.monotonic() + _SLOW_START_SECONDS
        self._announced = -1  # the attempt whose failure the user has been told of
        self._ladder: Ladder | None = None
        self._cause = "done"
        self._killed = False
        self._all_reported = False

    def wait(self) -> Ending:
        """Begin, and wait for the end.

        However it leaves, the launcher then knows that what remains is its to end, unless the ranks stay.
        """
        loop = self.world.loop
        loop.watch(self._gate, self._interrupt)
        try:
            self._begin()
            while not self._over():
                loop.step(min(self._deadline, self._ladder_due(), self._give_up_at(), self._next_look()))
                self._look_at_the_clock()
            # What comes now cannot change how the run ended.
            self._all_reported = True
            if self._cause == "done" and self._ranks.failed:
                self._cause = "failed"
            elif self._cause == "interrupted" and self._all_done():
                # The cell has caught the KeyboardInterrupt on every rank and gone on to its end, as any cell may.
                self._cause = "done"
                self._gate.presses = 0
            self._name_deaths()
            self._ranks.times["all reported"] = time.monotonic()
            stayed = self._stay and not self._killed and self._ranks.all_idle and self.world.complete
            if not stayed:
                self.world.let_go(
                    done=self._cause == "done", wait=self._wait_until_gone, say=self._relay.say, until=self._deadline
                )
            ending = self._ending(stayed)
            ending.value = self._relay.finish(self._ranks.values if ending.cause == "done" else {})
            self.panel.finish(ending.cause)
            return ending
        finally:
            self.panel.finish("lost")  # if it left by an exception
            loop.unwatch(self._gate)

    @property
    def states(self) -> dict[int, RankState]:
        """What is known of the ranks that have connected, by number; a copy."""
        return dict(sorted(self._ranks.states.items()))

    @property
    def ranks(self) -> int:
        """How many ranks the run has."""
        return self._launch.ranks

    @property
    def launch(self) -> Launch:
        """What the launcher was asked for."""
        return self._launch

    @property
    def env(self) -> Mapping[str, str]:
        """The ranks' environment."""
        return self._launch.env

    # The loop.

    def _over(self) -> bool:
        if self.world.launcher_ended or self._killed:
            return True
        ended = self.world.complete and all(state.ended for state in self._ranks.states.values())
        return ended and not self._may_restart()

    def _all_done(self) -> bool:
        asked = [state.outcome for state in self._ranks.states.values() if not state.spared]
        return self.world.complete and all(o is not None and o["outcome"] == "done" for o in asked)

    def _may_restart(self) -> bool:
        """Tell whether torchrun is about to start the ranks again."""
        return (
            self._ranks.attempt < self._launch.max_restarts
            and self._ladder is None
            and not self._ranks.agent_ended
            and bool(self._ranks.failed)
            and time.monotonic() < self._give_up_at()
        )

    def _give_up_at(self) -> float:
        """Return until when torchrun is waited for to start the ranks again (``time.monotonic``)."""
        failed = self._ranks.failed
        # A failed rank runs its exit handlers first, and they take what they take.
        if not failed or self._ladder is not None or not all(state.ended for state in failed):
            return float("inf")
        return max(state.ended_at for state in failed) + _RESTART_SECONDS[self._launch.start_method]

    def _next_look(self) -> float:
        return min(self._ranks.due, self._relay.due, self.panel.due, self._slow_start_at)

    def _ladder_due(self) -> float:
        return self._ladder.due if self._ladder is not None else float("inf")

    def _look_at_the_clock(self) -> None:
        if time.monotonic() >= self._relay.due:
            self._relay.tick()
        self._ranks.tick()
        self.panel.tick()
        if time.monotonic() >= self._slow_start_at:
            self._slow_start_at = float("inf")
            self._say_who_has_not_begun()
        if self._ladder is None and time.monotonic() >= self._deadline:
            # Without a rank there is nobody to wait for.
            self._stop("timeout", Ladder.of_interrupt(self._grace) if self._ranks.states else Ladder.of_impatience())
        if self._ladder is None and (failed := self._ranks.failed):
            attempt = self._ranks.attempt
            if attempt < self._launch.max_restarts and self._announced < attempt:
                self._announce_restart(failed[0], attempt)
            elif not self._may_restart():
                stay = self._stay and not self._ranks.gone
                self._stop("failed", Ladder.of_failed_cell(self._grace) if stay else Ladder.of_failure())
        telling = self._ranks.telling
        if self._ladder is not None and self._cause == "failed" and self._ladder.due <= time.monotonic() and telling:
            self._ladder.put_off(_PUT_OFF_SECONDS)
        while self._ladder is not None and (step := self._ladder.take()) is not None:
            self._take(step)

    def _announce_restart(self, first: RankState, attempt: int) -> None:
        """Say who has failed, and how, once that is sure: after a restart nobody can."""
        settled = time.monotonic() > (first.failed_at or 0.0) + SETTLE_SECONDS
        if first in self._ranks.telling or (first.is_consequence and not settled):
            return
        self._announced = attempt
        lines = [
            f"nbddp: rank {first.rank} failed ({in_short(first)}); restart {attempt + 1} of {self._launch.max_restarts}"
        ]
        if first.outcome is not None:
            lines += first.outcome.get("lines", ())
        self._relay.say("\n".join(lines))

    def _say_who_has_not_begun(self) -> None:
        missing = [
            self._ranks.first + local
            for local in range(self._launch.ranks)
            if (state := self._ranks.states.get(local)) is None or not (state.in_cell or state.ended)
        ]
        if missing and self._ladder is None and self._launch.nnodes > 1 and not self._ranks.states:
            self._relay.say(f"nbddp: {_machines.waiting(self._launch)}")
        elif missing and self._ladder is None and self.world.nodes is not None:
            stage = self.world.nodes.stage
            self._relay.say(f"nbddp: no rank has begun the cell after {_SLOW_START_SECONDS:g} s: {stage}")
        elif missing and self._ladder is None:
            have = "has" if len(missing) == 1 else "have"
            self._relay.say(
                f"nbddp: {rank_list(missing)} {have} not begun the cell after {_SLOW_START_SECONDS:g} s. An interrupt "
                "says what they are at; %ddp doctor looks for the cause"
            )

    # Stopping.

    def _interrupt(self) -> None:
        self._gate.drain()
        if self._all_reported:
            self.world.kill()
        elif self._cause in ("failed", "timeout"):
            # It is ending already, for a reason that the user will want to see.
            self._stop(self._cause, Ladder.of_impatience())
        elif self._gate.presses == 2 and self._stay and self._ranks.states:
            # Their state would go with them.
            self._stop("interrupted", Ladder.of_insistence(self._grace))
        elif self._gate.presses > 1 or not self._ranks.states:
            self._stop("interrupted", Ladder.of_impatience())
        elif self._cause != "interrupted":
            self._stop("interrupted", Ladder.of_interrupt(self._grace))

    def _stop(self, cause: str, ladder: Ladder) -> None:
        self._cause = cause
        self._ladder = ladder
        # It is not to come any more; and a time in the past would keep the loop spinning.
        self._deadline = float("inf")

    def _take(self, step: Step) -> None:
        alive = [state for state in self._ranks.states.values() if not state.ended]
        if step is Step.KILL:
            for state in alive:
                state.stopped = True
            self._killed = True
            return
        if step is Step.INTERRUPT:
            # The stacks first, and of all ranks: they are written by the C-level handler, before KeyboardInterrupt
            # unwinds them, or the end of an interrupted rank makes the collectives of others raise.
            for state in alive:
                self.world.take_stack(state)
        for state in alive:
            match step:
                case Step.INTERRUPT:
                    # After a failure, those that wait for the one that has failed.
                    if state.in_cell and (self._cause != "failed" or not state.failing):
                        self.world.interrupt(state)
                case Step.END_STARTING:
                    if state.in_cell and not state.interrupted:
                        self.world.interrupt(state)
                    elif state.idle and state.node is not None:
                        self.world.unsend(state)
                    elif not state.in_cell and not state.idle:
                        # It has nothing to clean up, and inside torch, in C++, it would not hear of an interrupt.
                        self._end_rank(state, signal.SIGTERM)
                case Step.BREAK_OFF:
                    if state.in_cell and state.outcome is None:
                        self._ranks.tell(state, "break off")
                case Step.TERMINATE:
                    self._end_rank(state, signal.SIGTERM)
                case Step.KILL_RANKS:
                    self._end_rank(state, signal.SIGKILL)
        if step is Step.TERMINATE and self._cause != "failed" and alive:
            self._relay.say("nbddp: ranks that did not end are terminated")

    def _end_rank(self, state: RankState, signum: int) -> None:
        """End a rank, unless it has said how it ended or, having failed by itself, is about to."""
        if state.outcome is None and state not in self._ranks.telling:
            self.world.signal(state, signum)

    def _began(self, state: RankState) -> None:
        self.panel.begin()
        stopping = self._cause == "interrupted" or (self._stay and self._ladder is not None)
        if stopping and not state.interrupted:
            # It had been told to begin, and had not yet, when all were interrupted.
            self.world.interrupt(state)
            if self._ladder is not None:
                # By the time that this reaches it, it may wait for the others, which have broken off already.
                self._ladder.add(Step.BREAK_OFF, STACK_SECONDS if self._cause == "failed" else BREAK_OFF_SECONDS)

    def _arrived(self, state: RankState) -> None:
        """Tell a rank that has just connected what the others were told already."""
        if self._ladder is not None:
            self.world.signal(state, signal.SIGTERM)

    # The end.

    def _name_deaths(self) -> None:
        """Wait for torchrun's word on how ranks died that said nothing."""
        deadline = time.monotonic() + _AGENT_SECONDS
        while (
            # After an interrupt nobody asks how, and torchrun may wait for what hangs.
            self._cause == "failed"
            # Ranks that lose their agent are killed; that it is gone is the news.
            and (self.world.agent_is_gone or any(map(_nothing_is_known_of, self._ranks.states.values())))
            and not (self._ranks.agent_ended or self.world.launcher_ended)
            and time.monotonic() < deadline
        ):
            self.world.loop.step(min(deadline, self._ranks.due))
            self._ranks.tick()

    def _ending(self, stayed: bool) -> Ending:
        cause = self._cause
        if cause in ("done", "failed") and not self.world.complete and not self._ranks.failed:
            cause = "no ranks"
        failed = self._ranks.failed
        first = failed[0] if failed else None
        return Ending(
            cause,
            self._ranks.states,
            first,
            None,
            self._killed,
            stayed,
            self.world.agent_status,
            self.world.refusal,
            self.world.nodes,
            self._ranks.times,
        )


def _nothing_is_known_of(state: RankState) -> bool:
    return state.died is not None and state.outcome is None and not state.stopped and state.exitcode is None
