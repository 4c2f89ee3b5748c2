"""The processes of a run, seen from the notebook: how they are started, told, stopped, and let go.

What becomes of a cell on them is `nbddp._run`'s to follow.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from nbddp import _machines, _process, _wire
from nbddp._agent import Launch
from nbddp._loop import Loop
from nbddp._paths import RunDir
from nbddp._placement import Nodes, Placement
from nbddp._rank_state import RankState
from nbddp._ranks import Ranks
from nbddp._uplink import STACK_SIGNAL

# Seconds to wait for the launcher's word that all is gone; it needs milliseconds.
_END_SECONDS = 15.0

# Seconds that processes have to end by themselves whose ranks have said their last: an agent that was signalled just
# then waits half a minute for ranks that wait for it.
_FINISH_SECONDS = 4.0


class World:
    """Ranks, the agent above them, and the channel to the launcher that started both.

    Args:
        launch: What the launcher is to start.
        server: The socket, at `RunDir.socket`, on which the run's processes report. Closed with this.
        channel: A channel to the launcher. Closed with this; without a word before it, that ends the processes.
        wake: Called when the launcher is needed; somebody may have stopped it.
        request: What else the launcher, or the gateway in its place, is to be told with the launch.
        closed: Called when all is closed.
        last_words: Returns what the launcher, or the gateway, has said last.

    Attributes:
        loop: Where all that concerns them is waited for.
        ranks: What is known of the ranks.
        launcher_ended: Whether nothing more is to be expected of the launcher: it has said that all is gone, or is.
        launcher_died: Whether it is gone.
        agent_status: The agent's exit status, if it ended without a word.
        refusal: Why the launcher started nothing, if it said so.
        nodes: What is known of the nodes that the ranks are on; None if they are on this machine.
        last_words: Returns what the launcher, or the gateway, has said last.
    """

    def __init__(
        self,
        launch: Launch,
        server: socket.socket,
        channel: _wire.Inbox,
        wake: Callable[[], None],
        request: Mapping[str, Any] = MappingProxyType({}),
        closed: Callable[[], None] = lambda: None,
        last_words: Callable[[], str] = lambda: "",
    ) -> None:
        self.launch = launch
        self.last_words = last_words
        self._request = request
        self._when_closed = closed
        self._server = server
        self._channel = channel
        self._wake = wake
        self.loop = Loop()
        try:
            self.ranks = Ranks(server, self.loop)
            channel.sock.setblocking(False)
            self.loop.watch(channel.sock, self._hear_launcher)
        except OSError:
            self.loop.close()
            raise
        self._agent: int | None = None
        self._kill_sent = False
        self._closing = threading.Lock()
        self._closed = False
        self.launcher_ended = False
        self.launcher_died = False
        self.agent_status: int | None = None
        self.refusal: str | None = None
        self.nodes = Nodes(Placement(**launch.placement)) if launch.placement is not None else None

    @property
    def started(self) -> bool:
        """Whether the launcher has started the agent."""
        return self._agent is not None

    @property
    def agent_is_gone(self) -> bool:
        """Whether the agent has just ended, as far as can be seen from here."""
        return self._agent is not None and _process.has_ended(self._agent)

    @property
    def complete(self) -> bool:
        """Whether all ranks have connected."""
        return len(self.ranks.states) == self.launch.ranks

    def start(self) -> None:
        """Have the launcher start the processes."""
        self.ranks.times["asked"] = time.monotonic()
        with contextlib.suppress(OSError):  # it has died just now; that will be heard
            self._send("launch", **vars(self.launch), **self._request)

    def close(self) -> None:
        """Close the connections; what still runs is the launcher's to end. Safe to call twice."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self.ranks.close()
            self.loop.close()
            self._channel.close()
            self._server.close()
            self._when_closed()

    # What ranks are told.

    def take_stack(self, state: RankState, signum: int = STACK_SIGNAL) -> None:
        """Have a rank write the Python stack of its main thread to its file in the run directory; from any thread.

        Args:
            state: The rank.
            signum: `nbddp._uplink.LOOK_SIGNAL` if it is to go on as if nothing had been.
        """
        path = RunDir.from_environment(self.launch.run_dir).stacks(state.local)
        with self._closing:
            if self._closed or self.ranks.states.get(state.local) is not state:
                return  # asked from another thread: its descriptor is closed, or another file's
            state.stack_at = os.stat(path).st_size if os.path.exists(path) else 0
            if state.node is not None:
                with contextlib.suppress(OSError):
                    self._send("stack", rank=state.rank)
            else:
                _process.signal_main_thread(state.pid, state.pidfd, signum)

    def interrupt(self, state: RankState) -> None:
        """Have Python raise KeyboardInterrupt in a rank."""
        state.interrupted = True
        self.ranks.tell(state, "interrupted")
        if state.node is not None:
            self._signal_there(state, signal.SIGINT, main=True)
        else:
            _process.signal_main_thread(state.pid, state.pidfd, signal.SIGINT)

    def signal(self, state: RankState, signum: int) -> None:
        """Send a rank a signal that ends it."""
        state.stopped = True
        if state.node is not None:
            self._signal_there(state, signum, main=False)
        else:
            _process.send_signal(state.pid, state.pidfd, signum)

    def unsend(self, state: RankState) -> None:
        """Have a rank on a node not get the cell that is still on its way to it; it then says that it is idle."""
        with contextlib.suppress(OSError):
            self._send("unsend", rank=state.rank)

    def _signal_there(self, state: RankState, signum: int, *, main: bool) -> None:
        """Have a rank's node signal it; on the one channel, so that what all are told first comes first."""
        with contextlib.suppress(OSError):  # the gateway is gone; that will be heard
            self._send("signal", rank=state.rank, signum=int(signum), main=main)

    # The launcher.

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
                    self._agent = message["pid"]
                case "ended":
                    self.launcher_ended = True
                    # If this process has had it killed, that is no news.
                    if not (self.ranks.agent_ended or self._kill_sent):
                        self.agent_status = message["status"]
                case "refused":
                    self.refusal = message["reason"]
                    # A gateway goes on to end what there is.
                    self.launcher_ended = self.nodes is None
                case _ if self.nodes is not None:
                    self.nodes.hear(message)
        if self._channel.closed and not self.launcher_ended:
            # Killed: the kernel takes its place.
            self.launcher_ended = self.launcher_died = True
        if self.launcher_ended:
            self.loop.unwatch(self._channel.sock)
            self.ranks.see_deaths()

    # The end.

    def let_go(
        self, *, done: bool, wait: bool, say: Callable[[str], None] = lambda _: None, until: float = float("inf")
    ) -> None:
        """Tell the launcher that the run is over; see to it that all of it is gone, where that matters.

        Args:
            done: Whether the ranks end by themselves; else they are killed.
            wait: Whether to wait in any case. If ranks were killed or leave processes of their own, it is waited for.
            say: Shows a line, if it takes long.
            until: When other machines are no longer waited for (``time.monotonic``).
        """
        if self.launcher_ended:
            return
        if done:
            self._wake()
            with contextlib.suppress(OSError):
                self._send("finish", seconds=_machines.END_SECONDS if self.launch.nnodes > 1 else None)
        else:
            self.kill()
        # A launcher that is still importing will find the request taken back.
        if self._agent is None or (done and not wait and not self._leaves_processes(self._agent)):
            return
        if done and self.launch.nnodes > 1:
            # The ranks of other machines may still need what this one's agent serves.
            self._wait_for_the_end(_machines.TELL_SECONDS)
            if not self.launcher_ended:
                say(f"nbddp: {_machines.WAITING_FOR_END}")
                self._wait_for_the_end(min(_machines.END_SECONDS, until - time.monotonic()))
        elif done:
            self._wait_for_the_end(_FINISH_SECONDS)
        if not self.launcher_ended:
            if done:
                self.kill()
            self._wait_for_the_end(_END_SECONDS)

    def _wait_for_the_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.launcher_ended and time.monotonic() < deadline:
            self.loop.step(min(deadline, self.ranks.due))
            self.ranks.tick()

    def kill(self) -> None:
        """Have the launcher kill all that the run has started."""
        self._wake()
        self._kill_sent = True
        with contextlib.suppress(OSError):
            self._send("kill")

    def _leaves_processes(self, agent: int) -> bool:
        """Tell whether there are others than the ranks: if the launcher died now, these alone would outlive it."""
        ranks = {state.pid for state in self.ranks.states.values()}
        return any(_process.children_of(pid) - ranks for pid in (agent, *ranks))
