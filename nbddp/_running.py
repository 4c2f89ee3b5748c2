"""The runs that are under way in this process, for who asks from another thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from nbddp import _where
from nbddp._paths import RunDir
from nbddp._run import Run
from nbddp._uplink import LOOK_SIGNAL
from nbddp._where import Sources

# Seconds that ranks have to write their stacks; they need microseconds.
_STACK_SECONDS = 0.5


@dataclass(frozen=True)
class UnderWay:
    """A run that is under way in this process; may be asked from any thread.

    Attributes:
        run: The run.
        run_dir: Its files.
        sources: The cells that its ranks may be in.
        name: Of a run in the background; else empty.
    """

    run: Run
    run_dir: RunDir
    sources: Sources
    name: str = ""

    def heading(self) -> str:
        """Return the line that stands over what is said of this run, if it is in the background."""
        return f"{self.name}:\n" if self.name else ""

    def stacks(self) -> list[str]:
        """Return where the ranks are at this moment, a line for each group that is at the same place."""
        states = self.run.states
        waited_for = [state for state in states.values() if not state.ended]
        for state in waited_for:
            self.run.world.take_stack(state, LOOK_SIGNAL)
        deadline = time.monotonic() + _STACK_SECONDS
        while waited_for and time.monotonic() < deadline:
            time.sleep(0.01)
            waited_for = [state for state in waited_for if not _where.has_answered(state, self.run_dir)]
        return _where.lines_of(states, self.run_dir, self.sources)


# Shown or not.
running: list[UnderWay] = []


@contextlib.contextmanager
def under_way(run: UnderWay) -> Iterator[None]:
    """Have others know of a run, as long as it is under way."""
    running.append(run)
    try:
        yield
    finally:
        running.remove(run)
