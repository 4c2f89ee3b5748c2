"""Ranks that stay between cells (``--keep``): what is known of them, what they are sent, and when they end.

One kernel keeps one world of ranks. While a cell runs, the thread that runs it has it; in between a thread of its own
(`nbddp._watcher`) has: it hears of deaths, takes what the ranks' threads print, and ends what has been idle for too
long.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nbddp import _allocation, _asked_again, _limits, _settings, _wire
from nbddp._devices import Devices, gpus_of
from nbddp._errors import LaunchError, RunLostError
from nbddp._log_files import Logs
from nbddp._memory import Meter, of_ranks
from nbddp._options import Options
from nbddp._paths import RunDir, cannot_write, format_size
from nbddp._rank_state import RankState, how_it_died
from nbddp._relay import Relay, View
from nbddp._run import Ending
from nbddp._screen import Screen, of_this_cell
from nbddp._script import Cell
from nbddp._snapshot import Snapshot
from nbddp._stop import InterruptGate
from nbddp._watcher import Watcher
from nbddp._world import World

# Seconds without a cell after which the ranks end.
IDLE_SECONDS = 3600.0

# Seconds that ranks have to make their process group anew.
_REGROUP_SECONDS = 30.0

# Seconds that idle ranks have for their exit handlers.
_LEAVE_SECONDS = 5.0

# Seconds that are waited for the word on what has ended ranks between two cells; Slurm's comes later than others'.
_WHY_SECONDS = 1.0
_NODES_WHY_SECONDS = 3.0

# Bytes that ranks may print between two cells, for the next to show; of more, the last.
_PENDING = 1 << 20


class Kept:
    """The ranks that a kernel keeps; not there until the first cell has begun.

    Attributes:
        options: The options that they were started with.
        devices: What they run on.
        run_dir: Their files.
        world: Their processes; None before the first cell, and after the end.
        definitions: Classes and functions that they have got, by number.
        since: When they were started (``time.time``).
        idle: Seconds without a cell after which they end.
        asked_idle: ... that the user has asked for.
        lost: What has ended them between two cells, if something has.
    """

    def __init__(self) -> None:
        self.options = Options()
        self.devices: Devices | None = None
        self.run_dir: RunDir | None = None
        self.world: World | None = None
        self.definitions: list[Any] = []
        self.since = time.time()
        self._cells = 0
        self._place = 0
        self._sent: dict[str, int] = {}
        self._request = b""
        self._everywhere = False
        self._on: frozenset[int] = frozenset()
        self._pending = _Pending()
        self.idle = IDLE_SECONDS
        self.asked_idle: float | None = None
        self._screen: Screen | None = None
        self._ends_at = float("inf")
        self._watcher: Watcher | None = None
        self.lost: str | None = None

    @property
    def secret(self) -> str:
        """What stands in the marks of their output."""
        assert self.world is not None
        return self.world.launch.env[_settings.MARK]

    # What they hold.

    @property
    def states(self) -> dict[int, RankState]:
        """What is known of each rank."""
        return dict(sorted(self.world.ranks.states.items())) if self.world is not None else {}

    def held_by_all(self) -> frozenset[str]:
        """Return the names that every rank holds."""
        held = [frozenset(state.held) for state in self.states.values()]
        return frozenset.intersection(*held) if held else frozenset()

    def holders(self) -> dict[str, list[int]]:
        """Return for each name that not all ranks hold those that do."""
        everywhere = self.held_by_all()
        holders: dict[str, list[int]] = {}
        for rank, state in self.states.items():
            for name in state.held.keys() - everywhere:
                holders.setdefault(name, []).append(rank)
        return holders

    def newer(self, names: Mapping[str, Any], held: Collection[str]) -> list[str]:
        """Return, once, the names among those held of which the notebook has another value now than it has sent."""
        newer = []
        for name in sorted(names.keys() & self._sent.keys() & set(held)):
            if self._sent[name] != id(names[name]):
                newer.append(name)
                self._sent[name] = id(names[name])
        return newer

    def came_back(self, results: Mapping[str, Any]) -> None:
        """Take note that the notebook has these values from the ranks, whose own are no older."""
        self._sent |= {name: id(value) for name, value in results.items()}

    # A cell.

    def check(self, options: Options) -> None:
        """Refuse options that these ranks cannot have.

        Raises:
            LaunchError: They were started with others.
        """
        if self.world is None or self.devices is None:
            return
        why = _asked_again.refusal(options, self.options, self.devices, self.world.launch.env)
        if why is not None:
            raise LaunchError(why)

    def open(self, world: World) -> None:
        """Take the processes, which are about to be started."""
        assert self.devices is not None
        self.world = world
        _allocation.take(self, gpus_of(self.devices, world.launch.env), "the kept ranks (%ddp stop ends them)")

    def prepare(
        self,
        cell: Cell,
        arguments: Mapping[str, Any],
        closure: Snapshot,
        on: Collection[int] | None,
        push: Collection[str],
    ) -> None:
        """Put what is to be sent to the ranks in a file, and the message about it together.

        What comes by a socket is never unpickled; see SECURITY.md.

        Args:
            cell: The cell.
            arguments: What else `nbddp._rank._run_cell` takes.
            closure: What it uses of the notebook.
            on: The ranks that it runs on; None for all.
            push: Names that are bound also where a rank holds them.

        Raises:
            LaunchError: There is no room for it.
        """
        assert self.run_dir is not None
        assert self.devices is not None
        self._cells += 1
        path = None
        try:
            if closure.stream.nbytes:
                path = self.run_dir.store(f"closure.{self._cells}", closure.nbytes, closure.write)
        except OSError as error:
            what = f"write {format_size(closure.nbytes)} of what the cell uses"
            raise cannot_write(what, self.run_dir.root, error) from error
        everyone = frozenset(range(self.devices.ranks))
        self._on = everyone if on is None else frozenset(on)
        self._everywhere = self._on == everyone
        self._request = _wire.encode(
            "cell",
            push=list(push),
            closure=path,
            offset=len(self.definitions),
            everywhere=self._everywhere,
            arguments={
                "cell": cell.source,
                "filename": cell.filename,
                "number": cell.number,
                "header": cell.header,
                "is_python": cell.is_python,
                **arguments,
            },
        )

    def ask(self) -> None:
        """Send the cell to the ranks, which are there."""
        assert self.world is not None
        ranks = self.world.ranks
        ranks.values.clear()
        ranks.times = {"asked": time.monotonic()}
        for state in ranks.states.values():
            self._ask(state)

    def begin(self, relay: Relay) -> None:
        """Show what they have printed since the last cell; where there was none, start the ranks, which then ask."""
        assert self.world is not None
        self._pending.replay(relay)
        if not self.world.started and not self.world.ranks.states:
            self.world.ranks.ready = self._ask
            self.world.start()

    def _ask(self, state: RankState) -> None:
        assert self.world is not None
        state.renew(spared=state.rank not in self._on)
        if not state.spared:
            self.world.ranks.ask(state, self._request)

    def leave(self, relay: Relay | None = None) -> None:
        """Have the ranks end as scripts do, with their exit handlers; show first what they have printed since."""
        assert self.world is not None
        if relay is not None:
            self._pending.replay(relay)
        for state in self.states.values():
            state.renew(spared=False)
            self.world.ranks.ask(state, _wire.encode("leave"))

    def settle(self, ending: Ending, names: Mapping[str, Any], met: Sequence[Any], gate: InterruptGate) -> str | None:
        """See to it that the next cell works; return a line on what has become of the ranks, if there is need.

        Args:
            ending: How the cell ended.
            names: What was sent with it.
            met: The classes and functions that went along.
            gate: Tells of interrupts.
        """
        asked = [state.outcome or {} for state in ending.ranks.values() if not state.spared]
        if self._everywhere and asked and all(outcome.get("loaded") for outcome in asked):
            self.definitions += met
            self._sent |= {name: id(value) for name, value in names.items()}
        # One that has caught the interrupt may have broken off in the middle of a collective all the same.
        if ending.stayed and ending.cause == "done" and not any(state.interrupted for state in ending.ranks.values()):
            return None
        if ending.stayed and not any(state.in_cell for state in ending.ranks.values()):
            return None  # it was taken back on its way to them
        if not ending.stayed and ending.cause == "done":  # they were told to leave
            self.close()
            return None
        grouped = any(state.backend for state in self.states.values())
        if ending.stayed and (not grouped or self._regroup(gate)):
            one = len(ending.ranks) == 1
            stay = (
                "the rank stays, with what it holds"
                if one
                else f"the {len(ending.ranks)} ranks stay, with what they hold"
            )
            anew = f"; {'its' if one else 'their'} process group was made anew" if grouped else ""
            return f"nbddp: {stay}{anew}" if grouped or ending.cause != "done" else None
        held = any(state.held for state in self.states.values())
        self.close()
        return "nbddp: the kept ranks are gone, and what they held with them" if held else None

    def _regroup(self, gate: InterruptGate) -> bool:
        """Have the ranks make their process group anew; tell whether they did."""
        assert self.world is not None
        states = self.states.values()
        backend = next(state.backend for state in states if state.backend)
        self._place += 1
        for state in states:
            state.regrouped = None
            self.world.ranks.ask(state, _wire.encode("regroup", backend=backend, place=self._place))
        deadline = time.monotonic() + _REGROUP_SECONDS
        presses = gate.presses
        while any(state.regrouped is None for state in states):
            if self.world.ranks.gone or self.world.launcher_ended or gate.presses > presses:
                return False
            if time.monotonic() > deadline:
                return False
            self.world.loop.step(min(deadline, time.monotonic() + 0.1))
        return not any(state.regrouped for state in states)

    def close(self) -> None:
        """End what is left of the ranks."""
        if self.world is not None:
            if not self.world.launcher_ended:
                self.world.let_go(done=False, wait=True)
            self.world.close()
            self.world = None
            _allocation.release(self)
            if self._watcher is not None:
                self._watcher.end()

    # Between two cells.

    def watch(self, idle: float, screen: Screen) -> None:
        """Watch the ranks from a thread, until they are taken; end them when they have been idle for so long."""
        assert self.world is not None
        self.idle, self._screen = idle or float("inf"), screen
        self._pending = _Pending()
        ranks = self.world.ranks
        ranks.attach(self._pending, quick=False)
        if self.world.nodes is not None:
            # The relay of the cell that has ended shows nothing any more.
            self.world.nodes.note = self._tell
        self._ends_at = time.monotonic() + self.idle
        try:
            if self._watcher is None:
                self._watcher = Watcher(self.world.loop, self._look, "nbddp-kept")
            self._watcher.give(0.0 if ranks.gone or self.world.launcher_ended else self._ends_at)
        except (OSError, RuntimeError) as error:
            # Nobody would hear of their death, or end them.
            self._close_for_good()
            raise _cannot_watch(error) from error

    def take(self) -> None:
        """Take them from the thread that watches."""
        if self._watcher is not None:
            self._watcher.take()

    def _look(self) -> float | None:
        """See what has become of the ranks; return when to look again, None if they are gone."""
        if self.world is None:
            return None
        ranks = self.world.ranks
        self.world.loop.step(0.0)
        ranks.tick()
        if ranks.gone or self.world.launcher_ended:
            self._lose()
            return None
        if time.monotonic() >= self._ends_at:
            self._end_idle()
            return None
        return min(self._ends_at, ranks.due)

    def _lose(self) -> None:
        """Take note that the ranks have ended, which nobody has asked for."""
        assert self.world is not None
        deadline = time.monotonic() + (_WHY_SECONDS if self.world.nodes is None else _NODES_WHY_SECONDS)
        while not self._knows_why() and time.monotonic() < deadline:
            self.world.loop.step(deadline)
        self._show_pending()
        self.lost = self._what_died()
        self._tell(f"nbddp: {self.lost}; the kept ranks are gone, and what they held with them")
        self._close_for_good()

    def _knows_why(self) -> bool:
        """Tell whether what has ended the ranks is known, as far as it ever will be."""
        assert self.world is not None
        if self.world.nodes is None or self.world.launcher_ended:
            return self.world.launcher_ended
        # Who ends nodes ends what runs there by signals; a rank that has left did so by itself.
        left = any(state.exitcode is not None and state.exitcode >= 0 for state in self.world.ranks.gone)
        return left or self.world.nodes.lost is not None

    def _what_died(self) -> str:
        """Return what has died first: with a node or the launcher goes the agent, and with the agent go the ranks."""
        assert self.world is not None
        nodes, status = self.world.nodes, self.world.agent_status
        if nodes is not None and nodes.lost is not None:
            # Often more than one sentence.
            return f"{nodes.lost} (between two cells)"
        if self.world.launcher_died:
            what = "nbddp's launcher ended" if nodes is None else "nbddp's gateway to the nodes ended"
        elif status is not None and status < 0:
            what = f"torchrun's agent {how_it_died(status)}"
        else:
            first = min(self.world.ranks.gone, key=lambda state: state.died or 0.0)
            on = f" on {nodes.called(first.node)}" if nodes is not None and first.node is not None else ""
            what = f"rank {first.rank}{on} {how_it_died(first.exitcode).removesuffix(' before the end of the cell')}"
        return f"{what} between two cells"

    def _close_for_good(self) -> None:
        """End what is left of the ranks, and of their files; nobody else is there to do it."""
        self.close()
        if self.run_dir is not None:
            self.run_dir.remove()

    def _end_idle(self) -> None:
        """End the ranks as scripts end."""
        assert self.world is not None
        self.leave()
        deadline = time.monotonic() + _LEAVE_SECONDS
        while not all(state.ended for state in self.states.values()) and time.monotonic() < deadline:
            self.world.loop.step(deadline)
        done = all(state.ended for state in self.states.values())
        self.world.let_go(done=done, wait=True)
        self._show_pending()
        self._close_for_good()
        self.lost = f"there was no cell for {self.idle:g} s (--idle)"
        self._tell(f"nbddp: the kept ranks have ended: {self.lost}")

    def _show_pending(self) -> None:
        """Show what the ranks have printed since the last cell, in its output: there will be no next one."""
        assert self.run_dir is not None
        assert self.devices is not None
        if self._screen is None or not self._pending:
            return
        with contextlib.suppress(Exception):  # the front end may be gone
            logs, view = Logs(self.run_dir.root), View(plain=self.options.plain)
            relay = Relay(self.devices.ranks, logs, self.secret, self._screen, view)
            self._pending.replay(relay)
            relay.close()

    def _tell(self, line: str) -> None:
        if self._screen is not None:
            with contextlib.suppress(Exception):  # the front end may be gone
                self._screen.write(line + "\n")


def _cannot_watch(error: Exception) -> RunLostError:
    what = "the kept ranks cannot be watched, and are gone"
    files = isinstance(error, OSError) and _limits.is_about_files(error)
    return RunLostError(_limits.no_more_files(what) if files else _limits.no_more_processes(what))


class _Pending:
    """What ranks print and show while nobody watches, for the next cell."""

    def __init__(self) -> None:
        self._items: deque[tuple[int, bytes | dict[str, Any]]] = deque()
        self._emptied: list[tuple[int, dict[str, Any]]] = []
        self._size = 0

    def feed(self, rank: int, data: bytes) -> None:
        """Take what a rank wrote."""
        self._add(rank, data)

    def display(self, rank: int, message: dict[str, Any]) -> None:
        """Take a display."""
        self._add(rank, message)

    def _add(self, rank: int, item: bytes | dict[str, Any]) -> None:
        self._items.append((rank, item))
        self._size += _size_of(item)
        while self._size > _PENDING and len(self._items) > 1:
            other, dropped = self._items.popleft()
            self._size -= _size_of(dropped)
            if isinstance(dropped, dict):
                # Where its mark stands in the output, the relay waits for it.
                self._emptied.append((other, {**dropped, "data": {}, "metadata": {}}))

    def __bool__(self) -> bool:
        return bool(self._items)

    def restart(self, rank: int) -> None:
        """Do nothing: kept ranks are not started again."""

    def number_from(self, first: int, world: int) -> None:
        """Do nothing: they are on one machine."""

    def replay(self, relay: Relay) -> None:
        """Hand over what there is."""
        for rank, item in (*self._emptied, *self._items):
            if isinstance(item, bytes):
                relay.feed(rank, item)
            else:
                relay.display(rank, item)
        self._items.clear()
        self._emptied.clear()
        self._size = 0


def _size_of(item: bytes | dict[str, Any]) -> int:
    return len(item) if isinstance(item, bytes) else sum(len(str(value)) for value in item.get("data", {}).values())


# The ranks that this process keeps.
_current: Kept | None = None
_busy = threading.Lock()


def current() -> Kept | None:
    """Return the ranks that this process keeps, if there are any."""
    return _current if _current is not None and _current.world is not None else None


def are_there() -> bool:
    """Tell whether ranks are kept, also while a cell has them."""
    return current() is not None or _busy.locked()


class Borrowed:
    """Has the kept ranks for a cell; if there are none, what they will be.

    Not made by ``contextlib.contextmanager``, which sets the traceback of what passes through: some exceptions refuse.

    Args:
        asked: Seconds without a cell after which they end, 0 for never; None to go on with what was asked for before.
        default: ... if nothing was.
        screen: Where the cell that has them shows its output, and they what happens later.
    """

    def __init__(self, asked: float | None, default: float, screen: Screen) -> None:
        self._asked, self._default, self._screen = asked, default, screen
        self._kept = Kept()

    def __enter__(self) -> Kept:
        """Take them.

        Raises:
            LaunchError: Another thread has them.
            RunLostError: They have ended since the last cell.
        """
        global _current
        if not _busy.acquire(blocking=False):
            raise LaunchError(
                "the kept ranks are busy with another cell. Wait for its end, or run this one without --keep"
            )
        try:
            if _current is not None:
                self._kept, _current = _current, None
            self._kept.take()
            if self._kept.lost is not None:
                raise RunLostError(
                    f"{self._kept.lost}, and the kept ranks are gone: what they held is lost. Run the cell again, and "
                    "those before it that it needs, for new ones"
                )
        except BaseException:
            _busy.release()
            raise
        return self._kept

    def __exit__(self, *_: object) -> None:
        """Give them back, to be watched until the next cell."""
        global _current
        try:
            if self._kept.world is not None:
                if self._asked is not None:
                    self._kept.asked_idle = self._asked
                idle = self._default if self._kept.asked_idle is None else self._kept.asked_idle
                self._kept.watch(idle, of_this_cell(self._screen))
                _current = self._kept
        finally:
            _busy.release()


def drop() -> None:
    """End the kept ranks at once, if there are any: when the extension is unloaded."""
    global _current
    kept, _current = _current, None
    if kept is not None:
        kept.take()
        kept.close()


def status(kept: Kept) -> list[str]:
    """Return lines on the kept ranks, for ``%ddp status``: since when, what memory they take, what they hold."""
    assert kept.world is not None
    assert kept.devices is not None
    since = time.strftime("%H:%M:%S", time.localtime(kept.since))
    ends = "until %ddp stop" if kept.idle == float("inf") else f"until there was no cell for {kept.idle:g} s"
    where = "one a GPU" if kept.devices.gpus else "on the CPU"
    count = "1 rank" if kept.devices.ranks == 1 else f"{kept.devices.ranks} ranks"
    lines = [f"nbddp: {count} kept since {since}, {where}, {ends}"]
    memory = of_ranks(Meter(gpus_of(kept.devices, kept.world.launch.env)), kept.states)
    for rank, state in kept.states.items():
        held = ", ".join(f"{name} ({kind})" for name, kind in sorted(state.held.items()) if kind != "module")
        nodes = kept.world.nodes
        node = f"  {nodes.called(nodes.placement.node_of(rank))}" if nodes is not None else ""
        lines.append(f"{node}  rank {rank}  pid {state.pid}  {memory.get(rank, '')}  {held or 'holds nothing'}")
    return lines
