"""A job of which nothing depends on the notebook's variables any more: its run, on whichever thread, to its results."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nbddp import _client, _closure, _devices, _kept, _limits, _nodes, _process, _results, _settings, _wire
from nbddp._agent import Launch
from nbddp._errors import RunLostError
from nbddp._log_files import Logs
from nbddp._memory import Meter
from nbddp._paths import RunDir, cannot_write, format_size
from nbddp._relay import Relay
from nbddp._report import Circumstances, error_of, interrupted
from nbddp._run import Ending, Run
from nbddp._running import UnderWay, under_way
from nbddp._screen import Screen
from nbddp._script import Script
from nbddp._stop import InterruptGate
from nbddp._where import Sources
from nbddp._world import World

if TYPE_CHECKING:
    from nbddp._job import Job

MimeBundle = tuple[dict[str, Any], dict[str, Any]]


@dataclass
class Finished:
    """What a job brought.

    Attributes:
        results: What came back, by name.
        value: The mime bundle of the cell's value, with its metadata; None if it had none.
        times: When each stage was complete, for benchmarks (``time.monotonic``).
    """

    results: dict[str, Any]
    value: MimeBundle | None
    times: dict[str, float]


class _CannotFork(Exception):  # noqa: N818  # control flow
    """Forked ranks cannot use CUDA here; nothing of the cell has run."""


class _LauncherDied(Exception):  # noqa: N818  # control flow
    """The launcher ended before it started the run."""


class Said:
    """Shows lines of nbddp's own, and remembers them."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self.text = ""

    def __call__(self, line: str) -> None:
        self.text += line + "\n"
        self._screen.write(line + "\n")


@contextlib.contextmanager
def interruptible(gate: InterruptGate, what: str) -> Iterator[None]:
    """Let an interrupt tear the code inside; say then what that was."""
    torn = False
    try:
        with gate.open():
            yield
    except KeyboardInterrupt:
        torn = True
    if torn:
        # Not where the first is handled: it would go along, with all that its frames hold.
        raise interrupted((), f"interrupted while {what}")


@dataclass
class Prepared:
    """A job of which everything that concerns the notebook's variables is done; to be run once, on any thread.

    Attributes:
        job: The job.
        client: The kernel's end of the launcher.
        screen: Where output is shown.
        devices: What it runs on.
        kept: The kept ranks that it is for.
        names: What is sent.
        met: The classes and functions that go along by value.
        run_dir: Its files.
        launch: What the launcher is to start, as things were when it was prepared.
        logs: Its logs, if these are its own.
        times: When each stage was complete.
        say: Shows a line of nbddp's own.
    """

    job: Job
    client: _client.Client
    screen: Screen
    devices: _devices.Devices
    kept: _kept.Kept | None
    names: Mapping[str, Any]
    met: Sequence[Any]
    times: dict[str, float]
    say: Said
    run_dir: RunDir = field(init=False)
    launch: Launch = field(init=False)
    logs: Logs | None = field(init=False, default=None)
    _closure_path: str | None = field(init=False, default=None)

    @property
    def _starts_ranks(self) -> bool:
        """Whether processes have to be started: those of kept ranks are there, after their first cell."""
        return self.kept is None or self.kept.world is None

    @property
    def _machines(self) -> tuple[object, ...] | None:
        """What its nodes are told from others by; None if they are this machine."""
        return self.devices.placement.machines if self.devices.placement is not None else None

    @property
    def sent(self) -> Sequence[Any]:
        """The classes and functions that the ranks have got, by number."""
        return self.met if self.kept is None else [*self.kept.definitions, *self.met]

    def make_room(self) -> None:
        """Make its directories; nothing may interrupt this, or they would stay.

        Raises:
            LaunchError: They cannot be made.
        """
        if self.kept is not None and self.kept.run_dir is not None:
            self.run_dir = self.kept.run_dir
            return
        self.run_dir = self.client.session.new_run()
        try:
            if self.job.background:
                self.logs = Logs(self.client.session.root)
            self.launch = self._what_to_launch()
        except BaseException:
            self.discard()
            raise

    def write(self, script: Script) -> None:
        """Write the script and what it needs into the run's directory, or get it ready for kept ranks.

        Raises:
            LaunchError: It cannot be written.
        """
        kept = self.kept
        if kept is None:
            self._closure_path = self._write(script)
            return
        new = kept.run_dir is None
        if new:
            kept.run_dir, kept.devices, kept.options = self.run_dir, self.devices, self.job.options
        if not self.job.last:
            kept.prepare(script.cell, self._arguments(script), script.closure, self.job.options.on, self.job.push)
        if new:
            self._closure_path = self._write(script.without_cell(_closure.capture({}, {}, {})))

    def _write(self, script: Script) -> str | None:
        """Write the script and its closure into the run directory; return the closure's path, if it has a file."""
        path = None
        size = script.closure.nbytes
        try:
            if not script.embeds_closure():
                path = self.run_dir.store("closure", size, script.closure.write)
            # On nodes it lies beside the script, wherever it lies here.
            script.write(self.run_dir.script, path if self.devices.placement is None else path and "closure")
        except OSError as error:
            what = f"write the script and {format_size(size)} of what the cell uses"
            raise cannot_write(what, self.run_dir.script, error) from error
        return path

    def discard(self) -> None:
        """Delete its files, if it is not to be run."""
        if self._starts_ranks:
            self.client.session.end_run(self.run_dir)
        if self.logs is not None:
            self.logs.delete()

    def _arguments(self, script: Script) -> dict[str, Any]:
        """Return what kept ranks need to know to run the cell."""
        return {
            "cells": {name: number for name, (_, number) in script.sources.items()},
            "sources": script.sources,
            "colors": script.setup.colors,
            "out": script.setup.out,
            "gather": script.setup.gather,
            "first": self.job.wanted.first,
        }

    def run(self, gate: InterruptGate) -> Finished:
        """Run it to its end; its directory is gone then.

        Raises:
            NbddpError: It did not end well.
            KeyboardInterrupt: The user stopped it.
        """
        try:
            ending = self._run(gate)
            with interruptible(gate, "the results were loaded; nothing was assigned"):
                reports = {rank: state.outcome or {} for rank, state in ending.ranks.items() if not state.spared}
                results = _results.read(self.job.wanted, reports, self.sent, ending.ranks[0].rank)
            for wrapper in dict.fromkeys(reports[min(reports)].get("unwrapped", ())):
                self.say(f"nbddp: {wrapper} was unwrapped: its .module came back")
            times = self.times | ending.times | {"results loaded": time.monotonic()}
            return Finished(results, ending.value, times)
        finally:
            if self._starts_ranks:  # or would have to, for another cell
                self.client.session.end_run(self.run_dir)
            else:
                self.run_dir.clear_cell()

    def _run(self, gate: InterruptGate) -> Ending:
        """Run the script on the ranks; again, if nothing of it has run and there is another way."""
        # The ranks of a kept world are there already.
        start_method = self.launch.start_method if self._starts_ranks else ""
        launcher_died = False
        while True:
            try:
                return self._attempt(gate, start_method)
            except _CannotFork as error:
                self.client.cannot_fork.add(self._machines)
                start_method = "spawn"
                place = "here" if self._machines is None else "there"
                self.say(f"nbddp: CUDA does not work in a forked process {place}; starting new ones ({error})")
            except _LauncherDied:
                # But not for ever.
                if launcher_died:
                    raise self.client.launcher_died() from None
                launcher_died = True
            self.run_dir.renew()

    def _attempt(self, gate: InterruptGate, start_method: str) -> Ending:
        kept = self.kept
        if kept is not None and kept.world is not None:
            with contextlib.ExitStack() as stack:
                relay = self._relay(kept.secret, stack)
                if not self.job.last:
                    # They begin while this process gets ready to follow them.
                    kept.ask()
                return self._follow(kept.world, relay, gate)
        secret = self.launch.env[_settings.MARK]
        launch = replace(self.launch, start_method=start_method)
        _limits.check_files(self.devices.ranks)
        if self.devices.placement is None:
            _limits.check_processes(self.devices.ranks)
        with contextlib.ExitStack() as stack:
            try:
                server = stack.enter_context(contextlib.ExitStack())
                listening = server.enter_context(_wire.listen(self.run_dir.socket))
                relay = self._relay(secret, stack)
            except OSError as error:
                raise cannot_write("prepare a run", self.run_dir.socket, error) from error
            world = self._world(launch, listening)
            server.pop_all()
            if kept is None:
                stack.callback(world.close)
            else:
                kept.open(world)
            return self._follow(world, relay, gate)

    def _world(self, launch: Launch, server: socket.socket) -> World:
        """Return the processes, which this machine's launcher is to start, or a gateway on nodes."""
        if self.devices.placement is None:
            channel = self.client.open_channel(launch.env)
            return World(launch, server, channel, self.client.wake, last_words=self.client.last_words)
        gateway = _nodes.Gateway(self.client.session, self.run_dir, _client.search_path())
        asked = _nodes.request(launch, self.run_dir, self._closure_path)
        return World(launch, server, gateway.channel, gateway.wake, asked, gateway.reap, gateway.last_words)

    def _relay(self, secret: str, stack: contextlib.ExitStack) -> Relay:
        """Return what shows the ranks' output; the stack closes it and puts the logs away."""
        session = self.client.session
        logs = self.logs or Logs(session.root)
        if self.job.background:
            pass
        elif self.job.own:
            stack.callback(logs.delete)
        else:
            stack.callback(session.keep_logs, logs)
        placement = self.devices.placement
        per_node = placement.ranks_per_node if placement is not None and placement.nnodes > 1 else None
        relay = Relay(self.devices.ranks, logs, secret, self.screen, self.job.view, self.say.text, per_node)
        stack.callback(relay.close)
        return relay

    def _follow(self, world: World, relay: Relay, gate: InterruptGate) -> Ending:
        """See the run to its end.

        Raises:
            NbddpError: It did not end well.
            KeyboardInterrupt: The user stopped it.
        """
        kept = self.kept
        oom_kills = 0

        def begin() -> None:
            nonlocal oom_kills
            there = world.started
            if there:  # and the ranks have begun
                oom_kills = _process.oom_kills()
            if kept is None:
                world.start()
            else:
                (kept.leave if self.job.last else kept.begin)(relay)
            if not there:  # it takes as long as the ranks take to begin
                oom_kills = _process.oom_kills()

        try:
            run = Run(
                world,
                relay,
                None if self.job.view.plain or not self.screen.in_place else self.screen,
                Meter(_devices.gpus_of(self.devices, world.launch.env)),
                gate,
                begin=begin,
                stay=kept is not None and not self.job.last,
                plain=self.job.view.plain,
                timeout=self.job.options.timeout,
                grace=self.job.grace,
                wait_until_gone=(
                    self.devices.gpus
                    or self.job.last
                    or world.launch.nnodes > 1
                    or self.devices.placement is not None  # and their allocation is given back
                ),
            )
            with under_way(UnderWay(run, self.run_dir, self._sources(), self.job.background)):
                ending = run.wait()
        except BaseException as error:
            if kept is not None:
                kept.close()
            if not (world.started and _limits.is_about_files(error)):
                raise
            raise RunLostError(_limits.no_more_files("the run cannot be followed any more")) from error
        failure = None
        if ending.cause != "done":
            said = {output.rank: output.recent for output in relay.outputs}
            failure = self._error(ending, run, gate, _process.oom_kills() - oom_kills, said)
        if kept is not None and (line := kept.settle(ending, self.names, self.met, gate)) is not None:
            self.say(line)
        if world.launcher_died and self.devices.placement is None:
            self.client.give_up_launcher()
            if not world.started and ending.cause != "interrupted":
                raise _LauncherDied
        if failure is not None:
            raise failure
        return ending

    def _sources(self) -> Sources:
        return Sources(self.job.cell, self.run_dir.script, self.job.source_of)

    def _what_to_launch(self) -> Launch:
        placement = self.devices.placement
        env = _devices.environment(os.environ, self.job.options, self.devices)
        machines = 1 if placement is not None else self.job.options.nnodes
        env |= {
            _settings.SESSION: self.client.session.name,
            _settings.RUN_DIR: self.run_dir.root,
            _settings.MARK: secrets.token_hex(8),
        }
        umask = os.umask(0o077)
        os.umask(umask)
        return Launch(
            run_dir=self.run_dir.root,
            ranks=self.devices.ranks,
            max_restarts=self.job.options.max_restarts,
            env=env,
            cwd=_client.working_directory() or None,
            umask=umask,
            path=_client.search_path(),
            start_method=self.client.start_method({**os.environ, **env}, machines, self._machines),
            nnodes=machines,
            node_rank=self.job.options.node_rank or 0,
            rdzv_endpoint=self.job.options.rdzv_endpoint,
            placement=None if placement is None else asdict(placement),
        )

    def _error(
        self, ending: Ending, run: Run, gate: InterruptGate, oom_kills: int, said: Mapping[int, str]
    ) -> BaseException:
        for state in ending.ranks.values():
            if state.outcome is not None and state.outcome["outcome"] == "cannot fork":
                return _CannotFork(state.outcome["message"])
        circumstances = Circumstances(
            self.run_dir,
            self._sources(),
            run.launch,
            self.job.options.timeout,
            gate,
            oom_kills,
            said,
            known=self.job.known - set(self.job.names),
            sent=self.sent,
            launcher=run.world.last_words() if run.world.launcher_died else None,
            holders=self.kept.holders() if self.kept is not None else {},
        )
        return error_of(ending, circumstances)
