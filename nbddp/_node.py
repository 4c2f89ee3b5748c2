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
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from nbddp import _engines
from nbddp._errors import NbddpError
from nbddp._frames import (
    BEAT_SECONDS,
    LEASE_SECONDS,
    PROTOCOL,
    Decoder,
    FrameError,
    LineWriter,
    Message,
    versions,
)
from nbddp._loop import Loop, Timers
from nbddp._memory import Meter
from nbddp._node_agent import Agent
from nbddp._node_files import SentFiles
from nbddp._node_ranks import Ranks
from nbddp._outflow import Outflow

# Seconds that what is on its way has to be written at the end.
_END_SECONDS = 10.0

# Seconds that the notebook has to end this node's stdin after its last word, and between two looks.
_GOODBYE_SECONDS = 5.0
_LOOK_SECONDS = 0.5

_READ = 1 << 16


@dataclass
class _Run:
    """What there is once the notebook has said what is to run."""

    files: SentFiles
    ranks: Ranks


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
        self._decoder = Decoder()
        self._loop = Loop()
        self._timers = Timers()
        self._out = Outflow(stdout, LineWriter(here.number, here.line_limit), self._go_on)
        self._agent = Agent(here, self._loop, self._timers, self._out, self._end)
        self._launched: _Run | None = None
        self._heard = time.monotonic()
        self._over = False
        self._why = ""
        self._told = ""
        # Whether its lease has run out.
        self._alone = False
        # A signal wakes the loop, and tears nothing: neither what is being done, nor the end.
        self._wake, self._waker = socket.socketpair()
        for end in (self._wake, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._loop.watch(self._wake, self._wake_up)

    # Its life.

    def run(self) -> str:
        """Serve the notebook to the end; return why this node ended, if it was not the notebook's wish."""
        os.set_blocking(self._stdin, False)
        self._loop.watch(self._stdin, self._read)
        host = self._here.name or socket.gethostname()
        self._out.send("hello", protocol=PROTOCOL, host=host, **versions(), job=self._here.job, pid=os.getpid())
        try:
            while not self._over:
                self._loop.step(min(time.monotonic() + BEAT_SECONDS, self._timers.next()))
                self._look_at_the_clock()
        except (NbddpError, OSError, FrameError) as error:
            if not self._over:  # else it goes wrong because all is ending
                # Of this node alone; the notebook ends the others.
                self._why = self._told or str(error)
                if self._told:
                    # An engine ends what it ends one by one.
                    self._out.send("told to end", by=self._told)
                    return self._why
                # What is said of a notebook's own machine; here, it is told with the run.
                self._out.send("refused", reason=self._why.replace(" and restart the kernel", ": --env TMPDIR=..."))
        return self._why

    def close(self) -> None:
        """End all that runs here, delete all files, and say so last."""
        if self._launched is not None:
            self._launched.ranks.close()
            self._launched.files.close()
        self._agent.close()
        self._out.send("ended")
        # Slurm tears the last lines of a task that ends, and others' with them; so it stays until all has been read.
        deadline = time.monotonic() + (0.0 if self._alone else _GOODBYE_SECONDS)
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline and not self._out.broken:
                if select.select([self._stdin], [], [], _LOOK_SECONDS)[0] and not os.read(self._stdin, _READ):
                    break
        self._out.close(_END_SECONDS)

    def tell_to_end(self, signum: int, _: object = None) -> None:
        """Take note of a signal by which the engine ends this node."""
        self._told = signal.Signals(signum).name

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(_READ)

    def _end(self, why: str = "") -> None:
        self._why, self._over = why, True

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        if self._told and self._why != self._told:
            # Also if its agent, which has been told as well, was faster.
            self._out.send("told to end", by=self._told)
            self._end(self._told)
        elif self._out.broken:
            self._end("the connection to the notebook is broken")
        elif now > self._heard + LEASE_SECONDS:
            # This process may itself have been stopped meanwhile: what has come is read first.
            self._read()
            if time.monotonic() > self._heard + LEASE_SECONDS:
                self._alone = True
                self._end(f"nothing has come from the notebook for {LEASE_SECONDS:g} s")
        self._timers.call_due()
        if self._launched is not None:
            self._launched.ranks.look_at_memory(now)

    def _go_on(self) -> bool:
        """See to what is urgent while something waits; return whether it may go on waiting."""
        self._read()
        self._look_at_the_clock()
        return not self._over

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
                self._out.send("beat", t=message["t"], now=time.monotonic())
            case "launch":
                self._launch(message)
            case "file":
                self._run.files.begin(message["name"], message["size"])
            case "piece":
                self._run.files.piece(message["name"], raw)
            case "drop":
                self._run.files.drop(message["name"])
            case "count":
                self._agent.count_gpus()
            case "meet":
                self._agent.meet()
            case "reach":
                self._agent.reach(message["endpoint"])
            case "start":
                if message["gpus"]:
                    self._run.ranks.meter = Meter(self._agent.gpus())
                self._agent.start(message)
            case "tell":
                self._run.ranks.tell(message["rank"], message["message"])
            case "signal":
                self._run.ranks.signal(message["rank"], message["signum"], main=message["main"])
            case "stack":
                self._run.ranks.ask_for_stack(message["rank"])
            case "restart":
                self._agent.restart(message["attempt"], message["endpoint"])
            case "finish" | "kill":
                self._agent.finish(message)

    def _launch(self, setup: Message) -> None:
        run_dir = self._agent.prepare(setup)
        first = self._here.number * int(setup["ranks"])
        files = SentFiles(run_dir, range(first, first + int(setup["ranks"])))
        agent = self._agent
        ranks = Ranks(
            run_dir,
            setup,
            first,
            self._loop,
            self._timers,
            self._out,
            files,
            greet_agent=agent.greet,
            have_begun=agent.ranks_have_begun,
        )
        self._launched = _Run(files, ranks)

    @property
    def _run(self) -> _Run:
        if self._launched is None:
            raise FrameError("the notebook speaks of a run before it has said what is to run")
        return self._launched


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
    if why and here.last and why != "SIGTERM":
        # Nobody may be left who would end the job.
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(here.last, stdin=subprocess.DEVNULL, timeout=5, check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
