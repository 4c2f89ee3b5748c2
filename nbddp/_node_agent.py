"""A node's torchrun agent: what it needs before it starts, its start, its start again, its end.

The launcher of the node does all that, asked over channels of its own (`nbddp._launcher`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import socket
import tempfile
import time
from collections.abc import Callable, Sequence

from nbddp import _client, _devices, _engines, _machines, _settings, _wire
from nbddp._agent import Launch
from nbddp._frames import Message
from nbddp._loop import Loop, Timers
from nbddp._outflow import Outflow
from nbddp._paths import RunDir

# Seconds in which the first node must be reached, and between two looks. Less than the lease: this is to be told. torch
# itself would try for a quarter of an hour.
_REACH_SECONDS = 10.0
_REACH_LOOK_SECONDS = 0.02

# Seconds between the end of the store and that of the run.
_STORE_SECONDS = 0.2

# After these the launcher closes a channel.
_LAST_WORDS = ("gpus", "ended")

# Characters and lines of the agent's log that are told.
_LOG_CHARACTERS, _LOG_LINES = 4000, 30


class Agent:
    """The agent of one node.

    Args:
        here: What the engine knows.
        loop: The node's loop.
        timers: Its timers.
        out: The way to the notebook.
        end: Called when there is nothing left to wait for.
    """

    def __init__(self, here: _engines.Here, loop: Loop, timers: Timers, out: Outflow, end: Callable[[], None]) -> None:
        self._here = here
        self._loop = loop
        self._timers = timers
        self._out = out
        self._end = end
        self._client = _client.Client()
        self._setup: Message = {}
        self._how_to_start: Message = {}
        self._run_root = ""
        self._agent_log = ""
        # How often all nodes' ranks are to have been started again, and the agent was.
        self._attempt = self._started = 0
        self._env: dict[str, str] = {}
        self._run_channel: _wire.Inbox | None = None
        # The channels behind which torch's store is: where agents meet, and where they have met before.
        self._store: _wire.Inbox | None = None
        self._former_stores: list[_wire.Inbox] = []

    def prepare(self, setup: Message) -> RunDir:
        """Have the launcher import torch, while the files are on their way; return the run's directory.

        Args:
            setup: What is to run, as far as this node must know beforehand.
        """
        self._setup = setup
        self._env = {**os.environ, **setup["env"]}
        if "TMPDIR" in setup["env"]:
            # Files of runs are kept there, too.
            os.environ["TMPDIR"] = setup["env"]["TMPDIR"]
            tempfile.tempdir = None
        # What the notebook's own machine is called by is none of this one's business.
        for name in (_settings.SESSION, _settings.RUN_DIR):
            self._env.pop(name, None)
        self._env.setdefault("OMP_NUM_THREADS", str(_devices.threads_per_rank(setup["ranks"], self._here.cores)))
        self._client.start(self._env)
        run_dir = self._client.session.new_run()
        self._run_root, self._agent_log = run_dir.root, run_dir.agent_log
        return run_dir

    def close(self) -> None:
        """End the launcher, and with it all that runs here."""
        self._client.close()

    # What the launcher is asked.

    def _ask(
        self, kind: str, answer: Callable[[Message], None], *, fds: tuple[int, ...] = (), **fields: object
    ) -> _wire.Inbox:
        """Ask the launcher something on a channel of its own; `answer` is called with each message that comes."""
        channel = self._client.open_channel(self._env)
        _wire.send(channel.sock, kind, fds=fds, **fields)
        channel.sock.setblocking(False)
        self._loop.watch(channel.sock, functools.partial(self._hear_launcher, channel, answer))
        return channel

    def _hear_launcher(self, channel: _wire.Inbox, answer: Callable[[Message], None]) -> None:
        for message in channel.receive():
            if message["kind"] == "refused":
                raise OSError(message["reason"])
            if message["kind"] in _LAST_WORDS:
                self._let_go(channel)
            answer(message)
        if channel.closed and channel.sock.fileno() >= 0:  # without a last word
            self._let_go(channel)
            raise OSError(f"its launcher ended{_engines.said(self._client.last_words().splitlines()[-3:])}")

    def _let_go(self, channel: _wire.Inbox) -> None:
        """Listen no more; whose channel it was ends what it has been asked to do."""
        self._loop.unwatch(channel.sock)
        channel.close()

    def count_gpus(self) -> None:
        """Tell how many GPUs there are, once the launcher knows."""
        self._ask("count gpus", lambda message: self._out.send("gpus", count=message["count"]), env=self._env)

    # Where the nodes meet.

    def meet(self) -> None:
        """Have a process of the launcher's serve the store, on this node's address alone."""
        address = self._here.address or "127.0.0.1"
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            holder = socket.create_server((address, 0), family=family, backlog=socket.SOMAXCONN)
        except OSError as error:
            raise OSError(f"cannot listen on {address}, by which the engine reaches it: {error.strerror}") from error
        with holder:
            port = holder.getsockname()[1]
            if self._store is not None:
                self._former_stores.append(self._store)
            self._store = self._ask("serve store", self._hear_store, fds=(holder.fileno(),))
        self._out.send("meet", endpoint=f"[{address}]:{port}" if ":" in address else f"{address}:{port}")

    def _hear_store(self, message: Message) -> None:
        if message["kind"] == "ended":
            # Who ends all processes of a job ends this one, too; that is told by the signal that this process gets.
            self._timers.after(_STORE_SECONDS, functools.partial(self._lose_store, message["status"]))

    def _lose_store(self, status: int) -> None:
        how = _engines.how_it_ended(status)
        raise OSError(f"the process that serves torch's store, in which the ranks of all nodes meet, {how}")

    def ranks_have_begun(self, attempt: int) -> None:
        """Take note that ranks run: all agents have met, and where they met before is of no use any more."""
        if attempt == self._started:
            while self._former_stores:
                self._let_go(self._former_stores.pop())

    def reach(self, endpoint: str) -> None:
        """See whether the store can be reached from here; torch would try that for a quarter of an hour."""
        address = _machines.parse_endpoint(endpoint)
        one = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        one.setblocking(False)
        failed = one.connect_ex(address)
        self._look_if_reached(one, failed, time.monotonic() + _REACH_SECONDS, endpoint)

    def _look_if_reached(self, one: socket.socket, failed: int, until: float, endpoint: str) -> None:
        if failed == errno.EINPROGRESS:
            if select.select([], [one], [], 0)[1]:
                failed = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            elif time.monotonic() > until:
                failed = errno.ETIMEDOUT
            else:
                look = functools.partial(self._look_if_reached, one, failed, until, endpoint)
                self._timers.after(_REACH_LOOK_SECONDS, look)
                return
        one.close()
        if failed:
            raise OSError(
                f"node0 cannot be reached from there at {endpoint}, by which the engine reaches it: "
                f"{os.strerror(failed)}. Ranks of all nodes talk to each other: node0 must have an address that leads "
                "to it from every node, and no firewall between them"
            )
        self._out.send("reached")

    # Its start and its end.

    def start(self, message: Message) -> None:
        """Start it; the message says where the nodes meet, and whether the ranks have GPUs."""
        setup = self._setup
        self._how_to_start, self._started = message, self._attempt
        endpoint = message["endpoint"]
        env = {
            **self._env,
            _settings.RUN_DIR: self._run_root,
            _settings.MARK: setup["mark"],
            _settings.SESSION: self._client.session.name,
            _settings.BY_RANK: "1",
            _settings.GPUS: str(int(message["gpus"])),
        }
        if setup["nnodes"] > 1:
            env[_settings.ATTEMPT] = f"{self._attempt}/{self._restarts}"
        interface = _machines.interface_to(endpoint) if endpoint else _devices.LOOPBACK_INTERFACE
        if interface is not None:
            env.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface == _devices.LOOPBACK_INTERFACE:
            # NCCL leaves it out by itself.
            env.setdefault("NCCL_SOCKET_IFNAME", interface)
        launch = Launch(
            run_dir=self._run_root,
            ranks=setup["ranks"],
            # On several nodes an agent alone would start ranks for which the others' do not wait.
            max_restarts=setup["max_restarts"] if setup["nnodes"] == 1 else 0,
            env=env,
            cwd=self._working_directory(setup["cwd"]),
            umask=setup["umask"],
            path=_client.search_path(),
            start_method=setup["start_method"] or self._client.start_method(env),
            nnodes=setup["nnodes"],
            node_rank=self._here.number,
            rdzv_endpoint=endpoint,
            placed=True,
        )
        self._run_channel = self._ask("launch", self._launched, **vars(launch))

    def gpus(self) -> Sequence[str]:
        """Return the GPUs of this node's ranks, if they have one each."""
        visible = self._env.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",") if visible else [str(number) for number in range(self._setup["ranks"])]

    @property
    def _restarts(self) -> int:
        """How often all nodes' ranks may be started again."""
        return int(self._setup["max_restarts"]) if self._setup["nnodes"] > 1 else 0

    def _working_directory(self, wanted: str | None) -> str:
        """Return the notebook's folder, where it is here, too; else the home directory."""
        if wanted and os.path.isdir(wanted) and os.access(wanted, os.R_OK | os.X_OK):
            return wanted
        home = os.path.expanduser("~")
        here = home if os.path.isdir(home) else "/"
        if wanted:
            self._out.send("note", text=f"has no folder {wanted}; its ranks run in {here}")
        return here

    def greet(self, inbox: _wire.Inbox, messages: Sequence[Message]) -> None:
        """Take the connection of an agent that has begun, and what it has said so far."""
        self._out.send("agent", time=messages[0]["time"])
        self._loop.watch(inbox.sock, functools.partial(self._hear, inbox))
        self._take(messages[1:])

    def _hear(self, inbox: _wire.Inbox) -> None:
        self._take(inbox.receive())
        if inbox.closed:
            self._loop.unwatch(inbox.sock)
            inbox.close()

    def _take(self, messages: Sequence[Message]) -> None:
        first = self._here.number * int(self._setup["ranks"])
        for message in messages:
            failures = [(first + local, code) for local, code in message["failures"]]
            self._out.send("agent end", attempt=self._started, failures=failures)

    def _launched(self, message: Message) -> None:
        if message["kind"] != "ended":
            return
        self._run_channel = None
        if self._attempt > self._started:
            self.start(self._how_to_start)
            return
        self._out.send("agent gone", status=message["status"], log=self._log())
        if self._attempt == self._restarts:
            self._end()

    def restart(self, attempt: int, endpoint: str) -> None:
        """Start it again; ranks of another node have failed, or this one's own, and none goes on alone."""
        self._attempt = attempt
        self._how_to_start = {**self._how_to_start, "endpoint": endpoint}
        if self._run_channel is None:
            self.start(self._how_to_start)
        else:
            with contextlib.suppress(OSError):
                _wire.send(self._run_channel.sock, "kill")

    def _log(self) -> list[str]:
        with contextlib.suppress(OSError), open(self._agent_log, errors="replace") as log:
            return log.read()[-_LOG_CHARACTERS:].strip().splitlines()[-_LOG_LINES:]
        return []

    def finish(self, message: Message) -> None:
        """Let it end by itself, within the seconds that the message says; at once if it says kill."""
        if message["kind"] == "kill" or self._run_channel is None:
            self._end()
            return
        with contextlib.suppress(OSError):
            self._run_channel.sock.setblocking(True)
            _wire.send(self._run_channel.sock, "finish", seconds=message["seconds"])
            self._run_channel.sock.setblocking(False)
