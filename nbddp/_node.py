"""A node's part of a run on several machines: ``python -m nbddp._node ENGINE NUMBER``, with the notebook at stdin.

It is to its node what the kernel is to the machine of an ordinary run. It has a session directory and a launcher,
starts one torchrun agent, hears the ranks over a Unix socket, and ends all of it. What ranks say and print it passes on
(`nbddp._frames`); what the notebook says to them it hands down. The messages:

==================  ================================================================================================
to the node
``launch``          what is to run, as far as this node must know beforehand; the launcher begins to import torch
``file``            a file is to come: its name and size; ``piece``: the next bytes of it
``count``           answered by ``gpus``
``meet``            the first node serves the store in which the agents and the ranks meet; answered by ``meet``
``reach``           whether it can be reached from there; answered by ``reached``
``start``           where they meet; starts the agent
``tell``            a message for a rank
``signal``          a signal for a rank
``stack``           a rank is to write its stack; answered by ``stack``
``restart``         ranks have failed, and all are to be started again
``finish, kill``    the run is over: by itself, or now; answered by ``ended``, the node's last word
``beat``            there is still somebody; answered by ``beat``
from the node
``hello``           who it is, and which versions it has
``refused``         why it cannot go on
``agent``           the agent has begun; ``agent end``: how it ended
``rank``            a rank has connected; ``from``: what it says; output and files have frames of their own
``died``            a rank is gone
``memory``          what the ranks use
==================  ================================================================================================

Its life is a lease: when nothing has come for a while, or stdin ends, it ends everything, and the job with it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from nbddp import _client, _devices, _engines, _machines, _process, _settings, _wire
from nbddp._agent import Launch
from nbddp._errors import NbddpError
from nbddp._frames import (
    BEAT_SECONDS,
    CHUNK,
    LEASE_SECONDS,
    PROTOCOL,
    Decoder,
    FrameError,
    LineWriter,
    Message,
    check_name,
    versions,
)
from nbddp._loop import Loop
from nbddp._memory import Meter
from nbddp._paths import RunDir
from nbddp._uplink import STACK_SIGNAL

# Seconds between two looks at the ranks' memory, and until the first.
_MEMORY_SECONDS = 2.0
_MEMORY_SOON = 0.5

# Seconds in which most ranks have written their stack, and how often is looked again.
_STACK_SECONDS = 0.01
_STACK_LOOKS = 200

# Seconds that the launcher has for its end before the node goes without waiting.
_END_SECONDS = 10.0

# Seconds in which the first node must be reached, and between two looks. Less than the lease: this is to be told. torch
# itself would try for a quarter of an hour.
_REACH_SECONDS = 10.0
_REACH_LOOK_SECONDS = 0.02

# Seconds that the notebook has to end this node's stdin after its last word, and between two looks.
_GOODBYE_SECONDS = 5.0
_LOOK_SECONDS = 0.5

# Bytes on their way to the notebook above which ranks are not read: their pipes fill, and they wait.
_BACKLOG = 4 << 20

_READ = 1 << 16


class _Writer:
    """Writes to stdout from a thread of its own: whoever reads it may have stopped, and the lease must run on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._wake = threading.Condition()
        self._closed = False
        self.broken = False
        self._thread = threading.Thread(target=self._write, name="nbddp-writer", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether so much waits to be written that no more should be made."""
        return self._size > _BACKLOG

    def put(self, lines: bytes) -> None:
        """Have lines written, after those before."""
        with self._wake:
            self._lines.append(lines)
            self._size += len(lines)
            self._wake.notify()

    def close(self, seconds: float) -> None:
        """Wait until all is written, but not for longer than this."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(seconds)

    def _write(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self._wake:
                while not self._lines and not self._closed:
                    self._wake.wait()
                if not self._lines:
                    return
                data = b"".join(self._lines)
                self._lines.clear()
            view = memoryview(data)
            try:
                while view:
                    view = view[os.write(self._fd, view) :]
            except OSError:
                self.broken = True
                return
            with self._wake:
                self._size -= len(data)


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
        self.stacks_sent = 0
        self.stack_asked = False

    def close(self) -> None:
        self.inbox.close()
        for fd in (self.output, self.pidfd):
            if fd is not None:
                os.close(fd)


class Node:
    """The event loop of one node.

    Args:
        here: What the engine knows.
        stdin: Where the notebook's messages come from.
        stdout: Where this node's lines go.
    """

    def __init__(self, here: _engines.Here, stdin: int, stdout: int) -> None:
        self._here = here
        self._stdin = stdin
        self._lines = LineWriter(here.number, here.line_limit)
        self._writer = _Writer(stdout)
        self._decoder = Decoder()
        self._loop = Loop()
        self._outputs = selectors.DefaultSelector()
        self._client = _client.Client()
        self._run_dir: RunDir | None = None
        self._setup: Message = {}
        self._how_to_start: Message = {}
        # How often all nodes' ranks are to have been started again, and the agent was.
        self._attempt = self._started = 0
        self._env: dict[str, str] = {}
        self._server: socket.socket | None = None
        self._channels: list[_wire.Inbox] = []
        self._run_channel: _wire.Inbox | None = None
        self._holder: socket.socket | None = None
        self._files: dict[str, Any] = {}
        self._paths: dict[str, str] = {}
        self._file_numbers = 0
        self._ranks: dict[int, _Rank] = {}
        self._meter = Meter()
        self._heard = time.monotonic()
        self._timers: list[tuple[float, Any]] = []
        self._memory: dict[int, str] = {}
        self._memory_at = float("inf")
        self._over = False
        self._why = ""
        self._told = ""
        # A signal wakes the loop, and tears nothing: neither what is being done, nor the end.
        self._wake, waker = socket.socketpair()
        for end in (self._wake, waker):
            end.setblocking(False)
        self._waker = waker
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self._loop.watch(self._wake, self._wake_up)
        self._oom_kills = _process.oom_kills()

    # Its life.

    def run(self) -> str:
        """Serve the notebook to the end; return why this node ended, if it was not the notebook's wish."""
        os.set_blocking(self._stdin, False)
        self._loop.watch(self._stdin, self._read)
        self._loop.watch(self._outputs, self._read_outputs)
        # A shell's greeting may not have ended its line.
        self._writer.put(b"\n")
        self._send(
            "hello",
            protocol=PROTOCOL,
            host=self._here.name or socket.gethostname(),
            **versions(),
            job=self._here.job,
            pid=os.getpid(),
        )
        try:
            while not self._over:
                self._loop.step(self._next())
                self._look_at_the_clock()
        except (NbddpError, OSError, FrameError) as error:
            # Of this node alone; the notebook ends the others.
            self._why = self._told or str(error)
            if self._told:
                # An engine ends what it ends one by one.
                self._send("told to end", by=self._told)
                return self._why
            # What is said of a notebook's own machine; here, it is told with the run.
            self._send("refused", reason=self._why.replace(" and restart the kernel", ": --env TMPDIR=..."))
        return self._why

    def close(self) -> None:
        """End all that runs here, delete all files, and say so last."""
        for rank in self._ranks.values():
            self._drain(rank)
        self._client.close()
        self._send("ended")
        # Slurm tears the last lines of a task that ends, and others' with them; so it stays until all has been read.
        deadline = time.monotonic() + _GOODBYE_SECONDS
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline and not self._writer.broken:
                if select.select([self._stdin], [], [], _LOOK_SECONDS)[0] and not os.read(self._stdin, _READ):
                    break
        self._writer.close(_END_SECONDS if not self._writer.broken else 0.0)

    def _send(self, kind: str, **fields: Any) -> None:
        self._writer.put(self._lines.message(kind, **fields))

    def _next(self) -> float:
        return min([time.monotonic() + BEAT_SECONDS, *(at for at, _ in self._timers)])

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._told and self._why != self._told:
            # Also if its agent, which has been told as well, was faster.
            self._send("told to end", by=self._told)
            self._end(self._told)
        elif self._writer.broken:
            self._end("the connection to the notebook is broken")
        elif now > self._heard + LEASE_SECONDS:
            # This process may itself have been stopped meanwhile: what has come is read first.
            self._read()
            if time.monotonic() > self._heard + LEASE_SECONDS:
                self._end(f"nothing has come from the notebook for {LEASE_SECONDS:g} s")
        for timer in [timer for timer in self._timers if timer[0] <= now]:
            self._timers.remove(timer)
            timer[1]()
        if self._ranks and now > self._memory_at:
            self._memory_at = now + _MEMORY_SECONDS
            self._tell_memory()

    def tell_to_end(self, signum: int, _: object = None) -> None:
        """Take note of a signal by which the engine ends this node."""
        self._told = signal.Signals(signum).name

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(_READ)

    def _end(self, why: str = "") -> None:
        self._why, self._over = why, True

    def _tell_memory(self) -> None:
        local = {rank.number - self._first: rank.pid for rank in self._ranks.values() if not rank.dead}
        memory = {self._first + key: text for key, text in self._meter.read(local).items()}
        if memory != self._memory:
            self._memory = memory
            self._send("memory", ranks=memory)

    @property
    def _restarts(self) -> int:
        """How often all nodes' ranks may be started again."""
        return int(self._setup["max_restarts"]) if self._setup["nnodes"] > 1 else 0

    @property
    def _first(self) -> int:
        """The number of this node's first rank."""
        return self._here.number * int(self._setup["ranks"])

    # What the notebook says.

    def _read(self) -> None:
        try:
            data = os.read(self._stdin, _READ)
        except BlockingIOError:
            return
        if not data:
            self._end("stdin has ended")
            return
        self._heard = time.monotonic()
        for message, raw in self._decoder.feed(data):
            if message.get("to", -1) in (-1, self._here.number):
                self._take(message, raw)

    def _take(self, message: Message, raw: bytes) -> None:
        match message["kind"]:
            case "beat":
                self._send("beat", t=message["t"], now=time.monotonic())
            case "launch":
                self._launch(message)
            case "file":
                self._begin_file(message["name"], message["size"])
            case "piece":
                self._write_file(message["name"], raw)
            case "count":
                self._ask("count gpus", self._counted, env=self._env)
            case "meet":
                self._meet()
            case "reach":
                self._reach(message["endpoint"])
            case "start":
                self._start(message)
            case "tell":
                self._tell(message["rank"], message["message"])
            case "signal":
                if (rank := self._alive(message["rank"])) is not None:
                    send = _process.signal_main_thread if message["main"] else _process.send_signal
                    send(rank.pid, rank.pidfd, message["signum"])
            case "stack":
                if (rank := self._alive(message["rank"])) is not None:
                    rank.stack_asked = True
                    _process.signal_main_thread(rank.pid, rank.pidfd, STACK_SIGNAL)
                    self._after(_STACK_SECONDS, functools.partial(self._send_stack_soon, rank, _STACK_LOOKS))
            case "restart":
                self._restart(message["attempt"], message["endpoint"])
            case "finish" | "kill":
                self._finish(message)

    def _after(self, seconds: float, action: Any) -> None:
        self._timers.append((time.monotonic() + seconds, action))

    def _alive(self, number: int) -> _Rank | None:
        rank = self._ranks.get(number)
        return None if rank is None or rank.dead else rank

    def _launch(self, message: Message) -> None:
        self._setup = message
        self._env = {**os.environ, **message["env"]}
        if "TMPDIR" in message["env"]:
            # Files of runs are kept there, too.
            os.environ["TMPDIR"] = message["env"]["TMPDIR"]
            tempfile.tempdir = None
        # What the notebook's own machine is called by is none of this one's business.
        for name in (_settings.SESSION, _settings.RUN_DIR):
            self._env.pop(name, None)
        self._env.setdefault("OMP_NUM_THREADS", str(_devices.threads_per_rank(message["ranks"])))
        # It imports torch while the files are on their way.
        self._client.start(self._env)
        self._run_dir = self._client.session.new_run()
        self._server = _wire.listen(self._run_dir.socket)
        self._loop.watch(self._server, self._accept)

    def _begin_file(self, name: str, size: int) -> None:
        assert self._run_dir is not None
        check_name(name, size, to_node=True)
        script = name == os.path.basename(self._run_dir.script)
        path = self._run_dir.script if script else self._run_dir.place(name, size)
        file = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")  # noqa: SIM115  # closed below
        self._files[name] = [file, size]
        self._paths[name] = path
        if size == 0:
            self._write_file(name, b"")

    def _write_file(self, name: str, data: bytes) -> None:
        assert self._run_dir is not None
        file, left = self._files[name]
        try:
            file.write(data)
            self._files[name][1] = left - len(data)
            if left > len(data):
                return
            file.close()
        except OSError as error:
            with contextlib.suppress(OSError):
                file.close()
            raise OSError(f"cannot write {self._paths[name]}: {error.strerror}") from error
        del self._files[name]
        path = self._paths[name]
        if os.path.dirname(path) != self._run_dir.root:
            # The script looks for it beside itself.
            link = os.path.join(self._run_dir.root, name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)
            os.symlink(path, link)

    # The launcher.

    def _ask(self, kind: str, answer: Any, *, fds: tuple[int, ...] = (), **fields: Any) -> _wire.Inbox:
        """Ask the launcher something on a channel of its own; `answer` is called with each message that comes."""
        channel = self._client.open_channel(self._env)
        _wire.send(channel.sock, kind, fds=fds, **fields)
        channel.sock.setblocking(False)
        self._channels.append(channel)
        self._loop.watch(channel.sock, functools.partial(self._hear_launcher, channel, answer))
        return channel

    def _hear_launcher(self, channel: _wire.Inbox, answer: Any) -> None:
        for message in channel.receive():
            if message["kind"] == "refused":
                raise OSError(message["reason"])
            answer(message)
        if channel.closed:
            self._loop.unwatch(channel.sock)
            self._channels.remove(channel)
            if channel is self._run_channel and not self._over:
                raise OSError(f"its launcher ended{_engines.said(self._client.last_words().splitlines()[-3:])}")
            channel.close()

    def _counted(self, message: Message) -> None:
        self._send("gpus", count=message["count"])

    def _meet(self) -> None:
        """Have a process of the launcher's serve the store, on this node's address alone."""
        address = self._here.address or "127.0.0.1"
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._holder = socket.create_server((address, 0), family=family, backlog=socket.SOMAXCONN)
        except OSError as error:
            raise OSError(f"cannot listen on {address}, by which the engine reaches it: {error.strerror}") from error
        port = self._holder.getsockname()[1]
        self._ask("serve store", lambda _: None, fds=(self._holder.fileno(),))
        self._holder.close()
        self._send("meet", endpoint=f"[{address}]:{port}" if ":" in address else f"{address}:{port}")

    def _reach(self, endpoint: str) -> None:
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
                self._after(_REACH_LOOK_SECONDS, look)
                return
        one.close()
        if failed:
            raise OSError(
                f"node0 cannot be reached from there at {endpoint}, by which the engine reaches it: "
                f"{os.strerror(failed)}. Ranks of all nodes talk to each other: node0 must have an address that leads "
                "to it from every node, and no firewall between them"
            )
        self._send("reached")

    def _start(self, message: Message) -> None:
        setup, run_dir = self._setup, self._run_dir
        assert run_dir is not None
        self._how_to_start, self._started = message, self._attempt
        endpoint = message["endpoint"]
        env = {
            **self._env,
            _settings.RUN_DIR: run_dir.root,
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
        start_method = setup["start_method"] or self._client.start_method(env)
        launch = Launch(
            run_dir=run_dir.root,
            ranks=setup["ranks"],
            # On several nodes an agent alone would start ranks for which the others' do not wait.
            max_restarts=setup["max_restarts"] if setup["nnodes"] == 1 else 0,
            env=env,
            cwd=self._working_directory(setup["cwd"]),
            umask=setup["umask"],
            path=_client.search_path(),
            start_method=start_method,
            nnodes=setup["nnodes"],
            node_rank=self._here.number,
            rdzv_endpoint=endpoint,
            placed=True,
        )
        if message["gpus"]:
            visible = env.get("CUDA_VISIBLE_DEVICES")
            self._meter = Meter(visible.split(",") if visible else [str(i) for i in range(setup["ranks"])])
        self._run_channel = self._ask("launch", self._launched, **vars(launch))

    def _working_directory(self, wanted: str | None) -> str:
        """Return the notebook's folder, where it is here, too; else the home directory."""
        if wanted and os.path.isdir(wanted) and os.access(wanted, os.R_OK | os.X_OK):
            return wanted
        home = os.path.expanduser("~")
        here = home if os.path.isdir(home) else "/"
        if wanted:
            self._send("note", text=f"has no folder {wanted}; its ranks run in {here}")
        return here

    def _launched(self, message: Message) -> None:
        if message["kind"] != "ended":
            return
        self._run_channel = None
        if self._attempt > self._started:
            self._start(self._how_to_start)
            return
        self._send("agent gone", status=message["status"], log=self._agent_log())
        if self._attempt == self._restarts:
            self._end()

    def _restart(self, attempt: int, endpoint: str) -> None:
        """Start the agent again; ranks of another node have failed, or this one's own, and none goes on alone."""
        self._attempt = attempt
        self._how_to_start = {**self._how_to_start, "endpoint": endpoint}
        if self._run_channel is None:
            self._start(self._how_to_start)
        else:
            with contextlib.suppress(OSError):
                _wire.send(self._run_channel.sock, "kill")

    def _agent_log(self) -> list[str]:
        assert self._run_dir is not None
        with contextlib.suppress(OSError), open(self._run_dir.agent_log, errors="replace") as log:
            return log.read()[-4000:].strip().splitlines()[-30:]
        return []

    def _finish(self, message: Message) -> None:
        if message["kind"] == "kill" or self._run_channel is None:
            self._end()
            return
        with contextlib.suppress(OSError):
            self._run_channel.sock.setblocking(True)
            _wire.send(self._run_channel.sock, "finish", seconds=message["seconds"])
            self._run_channel.sock.setblocking(False)

    # The ranks.

    def _accept(self) -> None:
        assert self._server is not None
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = self._server.accept()
                inbox = _wire.Inbox(connection)
                connection.setblocking(False)
                self._loop.watch(connection, functools.partial(self._greet, inbox))

    def _greet(self, inbox: _wire.Inbox) -> None:
        messages = inbox.receive()
        if messages and messages[0]["kind"] == "agent":
            self._send("agent", time=messages[0]["time"])
            self._loop.watch(inbox.sock, functools.partial(self._hear_agent, inbox))
            self._take_from_agent(messages[1:])
        elif messages and inbox.fds:
            self._add_rank(_Rank(inbox, messages[0]), messages)
        elif inbox.closed:
            self._loop.unwatch(inbox.sock)
            inbox.close()

    def _hear_agent(self, inbox: _wire.Inbox) -> None:
        self._take_from_agent(inbox.receive())
        if inbox.closed:
            self._loop.unwatch(inbox.sock)
            inbox.close()

    def _take_from_agent(self, messages: list[Message]) -> None:
        for message in messages:
            failures = [(self._first + local, code) for local, code in message["failures"]]
            self._send("agent end", attempt=self._started, failures=failures)

    def _add_rank(self, rank: _Rank, messages: list[Message]) -> None:
        old = self._ranks.get(rank.number)
        if old is not None:  # torchrun has started it again
            self._drain(old)
            self._forget(old)
            old.close()
        self._ranks[rank.number] = rank
        self._memory_at = min(self._memory_at, time.monotonic() + _MEMORY_SOON)
        self._send("rank", **{key: value for key, value in messages[0].items() if key != "kind"})
        self._loop.watch(rank.inbox.sock, functools.partial(self._hear, rank))
        self._outputs.register(rank.output, selectors.EVENT_READ, rank)
        if rank.pidfd is not None:
            self._loop.watch(rank.pidfd, functools.partial(self._see_death, rank))
        self._pass_on(rank, messages[1:])

    def _hear(self, rank: _Rank) -> None:
        self._pass_on(rank, rank.inbox.receive())
        if rank.inbox.closed:
            self._loop.unwatch(rank.inbox.sock)
            if rank.pidfd is None or rank.inbox.broken:
                self._see_death(rank)

    def _pass_on(self, rank: _Rank, messages: list[Message]) -> None:
        for message in messages:
            if message["kind"] in ("failing", "report", "idle", "end") and rank.stack_asked:
                # With its last word the run may be over, and what it was asked before be looked at.
                self._send_stack(rank)
            if message["kind"] in ("idle", "end"):
                # All that the rank has printed is in its pipe.
                self._drain(rank)
            for key in ("results", "pickled"):
                if message.get(key):
                    message[key] = self._send_file(message[key])
                    if message[key] is None and key == "results":
                        del message[key]
                        message["bad_results"][""] = "what was to come back could not be read on its node"
            self._send("from", rank=rank.number, message=message)

    def _send_file(self, path: str) -> str | None:
        """Send a file that a rank has written, and delete it here; return the name by which the other side has it."""
        name = os.path.basename(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._file_numbers += 1
                self._send("file", file=self._file_numbers, name=name, size=size)
                while data := file.read(CHUNK):
                    self._wait_for_room()
                    self._writer.put(self._lines.piece(self._file_numbers, data))
        except OSError as error:
            self._send("note", text=f"cannot send {path}: {error.strerror or error}")
            return None
        with contextlib.suppress(OSError):
            os.unlink(path)
        return name

    def _wait_for_room(self) -> None:
        """Wait until some of what is on its way has been taken; the lease and what is urgent go on meanwhile."""
        while self._writer.full and not (self._writer.broken or self._over):
            time.sleep(0.005)
            self._read()
            self._look_at_the_clock()
        if self._over:
            raise OSError("the notebook has ended the run")

    def _read_outputs(self) -> None:
        if self._writer.full:
            # Looked at again soon; the ranks' pipes hold what they print until then.
            self._loop.unwatch(self._outputs)
            self._after(0.01, lambda: self._loop.watch(self._outputs, self._read_outputs))
            return
        little = True
        for key, _ in self._outputs.select(0):
            if key.fd in self._outputs.get_map():
                little &= self._read_output(key.data) < _READ // 2
        if little:
            # Line by line would be a message for each; see `nbddp._ranks`.
            self._loop.unwatch(self._outputs)
            self._after(0.02, lambda: self._loop.watch(self._outputs, self._read_outputs))

    def _read_output(self, rank: _Rank) -> int:
        try:
            data = os.read(rank.output, _READ)
        except BlockingIOError:
            return 0
        if not data:
            with contextlib.suppress(KeyError, ValueError):
                self._outputs.unregister(rank.output)
            return 0
        self._writer.put(self._lines.output(rank.number, data))
        return len(data)

    def _drain(self, rank: _Rank) -> None:
        with contextlib.suppress(OSError):
            while not rank.dead and self._read_output(rank):
                pass

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
        # faulthandler's words on a fatal signal are in there.
        self._send_stack(rank)
        kills = _process.oom_kills()
        self._send("died", rank=rank.number, exitcode=_process.exit_status(rank.pid), oom_kills=kills - self._oom_kills)
        self._forget(rank)

    def _forget(self, rank: _Rank) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._outputs.unregister(rank.output)
        for source in (rank.inbox.sock, rank.pidfd):
            if source is not None:
                self._loop.unwatch(source)

    def _send_stack_soon(self, rank: _Rank, looks: int) -> None:
        if rank.stack_asked and not rank.dead:
            self._send_stack(rank)
            if rank.stack_asked and looks:
                self._after(_STACK_SECONDS, functools.partial(self._send_stack_soon, rank, looks - 1))

    def _send_stack(self, rank: _Rank) -> None:
        """Send what faulthandler has written since; paths as the notebook's machine would have them."""
        assert self._run_dir is not None
        with contextlib.suppress(OSError), open(self._run_dir.stacks(rank.number), "rb") as file:
            file.seek(rank.stacks_sent)
            text = file.read()
            if not text:
                return
            rank.stack_asked = False
            rank.stacks_sent += len(text)
            own = os.fsencode(os.path.dirname(os.path.abspath(__file__)))
            text = text.replace(os.fsencode(self._run_dir.root), os.fsencode(self._setup["run_dir"]))
            text = text.replace(own, os.fsencode(self._setup["package"]))
            self._send("stack", rank=rank.number, text=text.decode(errors="replace"))

    def _tell(self, number: int, message: Message) -> None:
        """Hand a message of the notebook's to a rank."""
        rank = self._alive(number)
        if rank is None:
            return
        if message.get("closure") is not None:
            message = {**message, "closure": self._paths[message["closure"]]}
        fields = {key: value for key, value in message.items() if key != "kind"}
        rank.inbox.sock.settimeout(5.0)
        with contextlib.suppress(OSError):  # it is gone, or does not listen
            _wire.send(rank.inbox.sock, message["kind"], **fields)
        rank.inbox.sock.setblocking(False)


def main(arguments: list[str], env: Mapping[str, str] = os.environ) -> int:
    """Be a node; the arguments are the engine's name and what it has put behind the command."""
    engine = _engines.kind(arguments[0])
    # What anything prints here must not get between the lines.
    stdin, stdout = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)
    # The ranks are told by the notebook; the hangup of a terminal is not the end of a lease.
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    here = engine.here(arguments[1] if len(arguments) > 1 else "", env)
    node = Node(here, stdin, stdout)
    signal.signal(signal.SIGTERM, node.tell_to_end)
    why = ""
    try:
        why = node.run()
    finally:
        node.close()
    if why and here.last and why not in ("", "SIGTERM"):
        # Nobody may be left who would end the job.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(here.last, stdin=subprocess.DEVNULL, timeout=5, check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
