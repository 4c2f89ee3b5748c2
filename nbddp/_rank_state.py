"""What is known of one rank, and how that is put in words."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nbddp import _wire

# What a collective raises, over gloo and NCCL, when another rank is gone: a consequence, never the cause.
PEER_GONE = re.compile(r"Connection closed by peer|Connection reset by peer|Broken pipe|ncclRemoteError")

# The types of such exceptions; a dataset whose download breaks off says the same with another.
_OF_TORCH = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistError", "DistStoreError")


@dataclass
class RankState:
    """What is known of one rank.

    Attributes:
        rank: Its number, through all machines of the run: what users see.
        pid: Its process.
        in_cell: Whether it has begun to run the cell.
        failing: That it has raised: what, and when. Comes before the report, which has the traceback.
        outcome: Its report, once there is one; see `nbddp._outcome`.
        pickled: The file with the exception that it raised, if there is one.
        ended: Whether it has said that nothing more comes, or is gone.
        ended_at: When that was.
        died: When it was seen to be gone without having said so.
        exitcode: How it ended, if it died.
        interrupted: Whether it was sent SIGINT.
        stack_at: Where in its file the stack begins that it was last asked for.
        stopped: Whether it was ended by nbddp.
        asked: Whether it has been asked where it is, and has not answered.
        where: Where it last said that it is; see `nbddp._uplink._where`.
        idle: Whether it waits for a cell.
        spared: Whether it has no part in the present cell.
        held: The types of the names that it holds, as it last said.
        backend: The backend of its default process group; empty if it has none.
        local: Its number on this machine, by which all that is kept of it is found.
        world: How many ranks the run has, on all machines.
        node: The number of its node, if an engine has placed it: it then is no process of this machine.
        memory: What its node says of its memory.
        oom_kills: How many processes its node's system had killed for want of memory when it died.
        regrouped: What has kept it out of the new process group, empty if nothing has; None if it has not said.
    """

    rank: int
    pid: int
    inbox: _wire.Inbox
    output: int
    pidfd: int | None
    in_cell: bool = False
    failing: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    pickled: str | None = None
    ended: bool = False
    ended_at: float = 0.0
    died: float | None = None
    exitcode: int | None = None
    interrupted: bool = False
    stack_at: int = 0
    stopped: bool = False
    where: dict[str, Any] = field(default_factory=dict)
    asked: bool = False
    idle: bool = False
    spared: bool = False
    held: dict[str, str] = field(default_factory=dict)
    backend: str = ""
    regrouped: str | None = None
    local: int = 0
    world: int = 1
    node: int | None = None
    memory: str = ""
    oom_kills: int = 0

    def renew(self, *, spared: bool) -> None:
        """Forget the last cell; a rank that is spared the next has ended it already."""
        self.in_cell = self.interrupted = self.asked = False
        self.failing = self.outcome = self.pickled = None
        self.where = {}
        self.spared, self.ended = spared, spared

    @property
    def is_consequence(self) -> bool:
        """Whether it only noticed that another rank was gone."""
        kind = str((self.outcome or self.failing or {}).get("exception", ""))
        return kind in _OF_TORCH and PEER_GONE.search(self.message) is not None

    @property
    def message(self) -> str:
        """The message of what it raised."""
        return str((self.outcome or self.failing or {}).get("message", ""))

    @property
    def failed_at(self) -> float | None:
        """When it failed, or None if it has not."""
        if self.failing is not None:
            return float(self.failing["time"])
        if self.outcome is not None:
            return None if self.outcome["outcome"] == "done" else float(self.outcome["time"])
        return self.died if not self.stopped else None


def in_short(state: RankState) -> str:
    """Return in a few words how a rank ended."""
    outcome = state.outcome
    if outcome is None:
        outcome = state.failing and {**state.failing, "outcome": "raised"}
    if not outcome:
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


def in_short_of_other(state: RankState, first: RankState) -> str:
    """Return in a few words how a rank ended that was not the first to fail."""
    if (state.outcome is None and state.failing is None) or state.is_consequence:
        # By nbddp, by torchrun, or by the loss of the one that failed.
        return "stopped"
    text = in_short(state)
    return "the same" if first.outcome is not None and text == in_short(first) else text


def rank_list(numbers: Sequence[int]) -> str:
    """Return rank numbers as a person writes them: ``rank 3``, ``ranks 0, 2-5``."""
    spans: list[list[int]] = []
    for rank in numbers:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {listed}" if len(numbers) == 1 else f"ranks {listed}"


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
