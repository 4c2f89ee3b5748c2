"""A job from the notebook's side, from its options to its results: the one way through nbddp.

::

    devices ──> capture ──> script ──> launch, wait, relay ──> results
    _devices    _closure    _script    _run, _relay            _results

The magic and `nbddp.launch` both come through here; they differ in what they hand in and in what they do with the
results. The directory of the run is gone when this returns, whichever way it does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbddp import (
    _backends,
    _client,
    _closure,
    _devices,
    _limits,
    _plots,
    _process,
    _results,
    _settings,
    _where,
    _wire,
)
from nbddp._agent import Launch, torchrun_options
from nbddp._errors import LaunchError, NbddpError, RunLostError
from nbddp._memory import Meter
from nbddp._options import Options
from nbddp._paths import RunDir, cannot_write, format_size
from nbddp._relay import Relay, View
from nbddp._report import Circumstances, error_of, interrupted
from nbddp._results import Wanted
from nbddp._run import Ending, Run
from nbddp._screen import Screen
from nbddp._script import Cell, Script, Setup
from nbddp._snapshot import Snapshot
from nbddp._stop import GRACE_SECONDS, InterruptGate
from nbddp._where import Sources

# What nbddp defines in the ranks where the notebook has no such name.
GIVEN_NAMES = ("rank", "local_rank", "world_size", "device")

# Seconds that ranks have to write their stacks; they need microseconds.
_STACK_SECONDS = 0.5

MimeBundle = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class UnderWay:
    """A run that is under way in this process; may be asked from any thread."""

    run: Run
    run_dir: RunDir
    sources: Sources

    def stacks(self) -> list[str]:
        """Return where the ranks are at this moment, a line for each group that is at the same place."""
        states = self.run.states
        waited_for = [state for state in states.values() if not state.ended]
        for state in waited_for:
            self.run.take_stack(state)
        deadline = time.monotonic() + _STACK_SECONDS
        while waited_for and time.monotonic() < deadline:
            time.sleep(0.01)
            waited_for = [state for state in waited_for if not _where.has_answered(state, self.run_dir)]
        return _where.lines_of(states, self.run_dir, self.sources)


# The runs that are under way in this process, shown or not.
running: list[UnderWay] = []


@dataclass
class Job:
    """What is to run, and on what.

    Attributes:
        cell: The code.
        names: What it uses of the namespace.
        namespace: The whole namespace: ``__main__``'s.
        options: How to run it.
        lines: For each name, the lines of the cell that use it.
        wanted: What is to come back.
        known: The names of the namespace that its user gave.
        source_of: Returns the text and the execution count of the cell whose code has a file name; None for files.
        colors: The notebook's traceback colours.
        grace: Seconds that ranks have to end after an interrupt.
        large: Bytes above which a line says how much is sent; None for never.
        place: What messages call the code.
        own: Whether it is nbddp's own and not the user's, whose last logs then stay.
        view: How much of the output is shown, and how.
    """

    cell: Cell
    names: Mapping[str, Any]
    namespace: dict[str, Any]
    options: Options
    lines: Mapping[str, Sequence[int]] = field(default_factory=dict)
    wanted: Wanted = field(default_factory=Wanted)
    known: frozenset[str] = frozenset()
    source_of: Callable[[str], tuple[str, int | None] | None] = lambda _: None
    colors: str = ""
    grace: float = GRACE_SECONDS
    large: float | None = None
    place: str = "the cell"
    own: bool = False
    view: View = field(default_factory=View)


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


def perform(job: Job, client: _client.Client, screen: Screen) -> Finished:
    """Run a job to its end.

    Raises:
        NbddpError: It did not end well; see `nbddp._errors`.
        KeyboardInterrupt: The user stopped it.
    """
    _limits.check_files(0)
    try:
        return _perform(job, client, screen)
    except NbddpError:
        raise  # it may be an OSError as well: what a rank has raised
    except OSError as error:
        if not _limits.is_about_files(error):
            raise
        # Another thread has taken them meanwhile.
        raise LaunchError(_limits.no_more_files("cannot start a run")) from error


def _perform(job: Job, client: _client.Client, screen: Screen) -> Finished:
    with InterruptGate() as gate:
        attempt = _Attempt(job, client, screen, gate, start_method(job.options, client))
        launcher_died = False
        while True:
            try:
                return attempt.make()
            except _CannotFork as error:
                client.cannot_fork = True
                attempt.start_method = "spawn"
                screen.write(f"nbddp: CUDA does not work in a forked process here; starting new ones ({error})\n")
            except _LauncherDied:
                # Before the run began, so it can be begun again; but not for ever.
                if launcher_died:
                    raise client.launcher_died() from None
                launcher_died = True


def dry_run(job: Job, client: _client.Client) -> str:
    """Return what `perform` would launch and send, as text."""
    _limits.check_files(0)
    env = {**os.environ, **job.options.env}
    with InterruptGate() as gate:
        devices = _devices.choose(job.options, env, lambda: count_gpus(client, env, gate))
        _check_backend(job.options, devices, lambda: backends(client, env, gate))
        with gate.open():
            snapshot = _closure.capture(job.names, job.namespace, job.lines, job.place)
    if job.options.keep_script is not None:
        _export(_script(job, devices, snapshot), job.options.keep_script)
    options = torchrun_options(
        devices.ranks,
        job.options.max_restarts,
        start_method(job.options, client),
        job.options.nnodes,
        job.options.node_rank or 0,
        job.options.rdzv_endpoint,
    )
    lines = [devices.note] if devices.note else []
    lines.append("torchrun " + " ".join(options) + " <generated script>")
    return "\n".join([*lines, *_closure.explain(job.names, job.namespace, job.lines, snapshot)])


class _CannotFork(Exception):  # noqa: N818  # control flow
    """Forked ranks cannot use CUDA here; nothing of the cell has run."""


class _LauncherDied(Exception):  # noqa: N818  # control flow
    """The launcher ended before it started the run."""


@dataclass
class _Attempt:
    """One way through the stages; a new one is made only if nothing of the cell has run."""

    job: Job
    client: _client.Client
    screen: Screen
    gate: InterruptGate
    start_method: str
    said: str = ""

    def make(self) -> Finished:
        job, gate = self.job, self.gate
        times = {"began": time.monotonic()}
        env = {**os.environ, **job.options.env}
        # First, so that it imports while this process pickles.
        if changed := self.client.start(env):
            self.say(f"nbddp: {', '.join(changed)} changed, which torch reads when it loads; loading it anew")
        names = {**job.names, **_plots.settings()}
        with self._interruptible(f"what {job.place} uses was pickled; nothing was launched"):
            closure = _closure.capture(names, job.namespace, job.lines, job.place)
        times["captured"] = time.monotonic()
        devices = _devices.choose(job.options, env, lambda: count_gpus(self.client, env, gate))
        _check_backend(job.options, devices, lambda: backends(self.client, env, gate))
        if job.view.ranks is not None and max(job.view.ranks) >= devices.ranks and job.options.nnodes == 1:
            raise LaunchError(f"--ranks {max(job.view.ranks)}: this run has {_ranks_of(devices.ranks)}")
        if job.wanted.device is not None:
            _devices.check_out_device(job.wanted.device, lambda: count_gpus(self.client, os.environ, gate))
        if devices.note:
            self.say(devices.note)
        if job.large is not None and closure.nbytes > job.large:
            self.say(_closure.size_line(names, closure))
        if hidden := _hidden_names(job, devices):
            self.say(hidden)
        for wrapper in dict.fromkeys(closure.unwrapped):
            self.say(f"nbddp: {wrapper} was unwrapped: its .module is sent; wrap it again in the cell")
        script = _script(job, devices, closure)
        if (path := job.options.keep_script) is not None:
            _export(script, path)
            self.say(f"nbddp: kept as {path}: torchrun --nproc-per-node {devices.ranks} {path}")
        session = self.client.session
        run_dir = session.new_run()
        try:
            with self._interruptible("the script was written; nothing was launched"):
                _write(script, run_dir)
            # It lies in the run directory now; copies that it may hold are not to wait for the end of the run.
            closure.release()
            ending = self._run(devices, run_dir, closure.met)
            with self._interruptible("the results were loaded; nothing was assigned"):
                reports = {local: state.outcome or {} for local, state in ending.ranks.items()}
                results = _results.read(job.wanted, reports, closure.met, ending.ranks[0].rank)
            for wrapper in dict.fromkeys((ending.ranks[0].outcome or {}).get("unwrapped", ())):
                self.say(f"nbddp: {wrapper} was unwrapped: its .module came back")
            times |= ending.times | {"results loaded": time.monotonic()}
            return Finished(results, ending.value, times)
        finally:
            session.end_run(run_dir)

    @contextlib.contextmanager
    def _interruptible(self, what: str) -> Iterator[None]:
        """Let an interrupt tear the code inside; say then what that was."""
        torn = False
        try:
            with self.gate.open():
                yield
        except KeyboardInterrupt:
            torn = True
        if torn:
            # Not where the first is handled: it would go along, with all that its frames hold.
            raise interrupted((), f"interrupted while {what}")

    def say(self, line: str) -> None:
        """Show a line of nbddp's own."""
        self.said += line + "\n"
        self.screen.write(line + "\n")

    def _run(self, devices: _devices.Devices, run_dir: RunDir, sent: Sequence[Any]) -> Ending:
        """Run the script on the ranks.

        Raises:
            NbddpError: The run did not end well.
            KeyboardInterrupt: The user stopped it.
        """
        secret = secrets.token_hex(8)
        launch = self._what_to_launch(devices, run_dir, secret)
        session = self.client.session
        _limits.check_files(devices.ranks)
        _limits.check_processes(devices.ranks)
        with contextlib.ExitStack() as stack:
            try:
                server = stack.enter_context(_wire.listen(run_dir.socket))
                logs = session.new_logs()
                if self.job.own:
                    stack.callback(shutil.rmtree, logs, ignore_errors=True)
                else:
                    stack.callback(session.keep_logs, logs)
                relay = Relay(devices.ranks, logs, secret, self.screen, self.job.view, self.said)
            except OSError as error:
                raise cannot_write("prepare a run", run_dir.socket, error) from error
            stack.callback(relay.close)
            channel = self.client.open_channel(launch.env)
            # Without a word before it, this ends the run.
            stack.callback(channel.close)
            oom_kills = _process.oom_kills()
            run = Run(
                launch,
                server,
                channel,
                relay,
                None if self.job.view.plain or not self.screen.in_place else self.screen,
                Meter(_devices.gpus_of(devices, launch.env)),
                self.gate,
                timeout=self.job.options.timeout,
                grace=self.job.grace,
                wait_until_gone=devices.gpus or launch.nnodes > 1,
                wake=self.client.wake,
            )
            under_way = UnderWay(run, run_dir, self._sources(run_dir))
            running.append(under_way)
            stack.callback(running.remove, under_way)
            try:
                ending = run.wait()
            except OSError as error:
                if not (run.started and _limits.is_about_files(error)):
                    raise
                raise RunLostError(_limits.no_more_files("the run cannot be followed any more")) from error
        if run.launcher_died:
            self.client.give_up_launcher()
            if not run.started and ending.cause != "interrupted":
                raise _LauncherDied
        if ending.cause != "done":
            said = {output.rank: output.recent for output in relay.outputs}
            raise self._error(ending, run, run_dir, _process.oom_kills() - oom_kills, said, sent)
        return ending

    def _sources(self, run_dir: RunDir) -> Sources:
        return Sources(self.job.cell, run_dir.script, self.job.source_of)

    def _what_to_launch(self, devices: _devices.Devices, run_dir: RunDir, secret: str) -> Launch:
        env = _devices.environment(os.environ, self.job.options, devices)
        env |= {
            _settings.SESSION: self.client.session.name,
            _settings.RUN_DIR: run_dir.root,
            _settings.MARK: secret,
        }
        umask = os.umask(0o077)
        os.umask(umask)
        return Launch(
            run_dir=run_dir.root,
            ranks=devices.ranks,
            max_restarts=self.job.options.max_restarts,
            env=env,
            cwd=_client.working_directory() or None,
            umask=umask,
            path=_client.search_path(),
            start_method=self.start_method,
            nnodes=self.job.options.nnodes,
            node_rank=self.job.options.node_rank or 0,
            rdzv_endpoint=self.job.options.rdzv_endpoint,
        )

    def _error(
        self,
        ending: Ending,
        run: Run,
        run_dir: RunDir,
        oom_kills: int,
        said: Mapping[int, str],
        sent: Sequence[Any],
    ) -> BaseException:
        for state in ending.ranks.values():
            if state.outcome is not None and state.outcome["outcome"] == "cannot fork":
                return _CannotFork(state.outcome["message"])
        circumstances = Circumstances(
            run_dir,
            self._sources(run_dir),
            run.launch,
            self.job.options.timeout,
            self.gate,
            oom_kills,
            said,
            known=self.job.known - set(self.job.names),
            sent=sent,
            launcher=self.client.last_words() if run.launcher_died else None,
        )
        return error_of(ending, circumstances)


def _check_backend(options: Options, devices: _devices.Devices, there: Callable[[], list[str]]) -> None:
    if options.backend is not None and options.init:
        _backends.check(options.backend, there(), gpus=devices.gpus)


def _ranks_of(count: int) -> str:
    return "one rank, 0" if count == 1 else f"ranks 0 to {count - 1}"


def start_method(options: Options, client: _client.Client) -> str:
    """Return how ranks are started: "fork" or "spawn".

    Raises:
        LaunchError: The user asks for another way.
    """
    try:
        wanted = _settings.start_method({**os.environ, **options.env})
    except ValueError as error:
        raise LaunchError(str(error)) from None
    # macOS frameworks abort in forked children.
    # Nor may an agent fork that serves torch's store, as the first of several machines' does: that has threads.
    can_fork = sys.platform == "linux" and not client.cannot_fork and options.nnodes == 1
    return wanted or ("fork" if can_fork else "spawn")


def count_gpus(
    client: _client.Client, env: Mapping[str, str], gate: InterruptGate, seconds: float | None = None
) -> int:
    """Ask the launcher how many GPUs there are: neither it nor the kernel may look for itself.

    Args:
        client: The kernel's end of the launcher, which is started if it does not run.
        env: The environment that ranks will have.
        gate: Tells of interrupts.
        seconds: How long to wait for the answer, which comes once torch is imported; None for as long as it takes.

    Raises:
        LaunchError: There is no launcher to be had, or it cannot count.
        TimeoutError: It has not answered in time.
    """
    return int(_ask("count gpus", "the GPUs could not be counted", client, env, gate, seconds, env=dict(env))["count"])


def backends(client: _client.Client, env: Mapping[str, str], gate: InterruptGate) -> list[str]:
    """Ask the launcher which backends torch has for process groups.

    Raises:
        LaunchError: There is no launcher to be had.
    """
    return list(_ask("backends", "torch's backends could not be looked up", client, env, gate)["names"])


def _ask(
    kind: str,
    fault: str,
    client: _client.Client,
    with_env: Mapping[str, str],
    gate: InterruptGate,
    seconds: float | None = None,
    **fields: Any,
) -> _wire.Message:
    """Return the launcher's answer to a question with these fields; `fault` is what is said if it refuses."""
    channel = client.open_channel(with_env)
    answer = select.poll()
    answer.register(channel.sock, select.POLLIN)
    try:
        with gate.open():
            _wire.send(channel.sock, kind, **fields)
            while not channel.closed:
                if not answer.poll(None if seconds is None else seconds * 1000):
                    break
                for message in channel.receive():
                    if message["kind"] == "refused":
                        raise LaunchError(f"{fault}: {message['reason']}")
                    return message
            else:
                raise client.launcher_died()
    except OSError:
        raise client.launcher_died() from None
    finally:
        channel.close()
    raise TimeoutError


def _script(job: Job, devices: _devices.Devices, closure: Snapshot) -> Script:
    sources = {name: source for name in sorted(closure.sources) if (source := job.source_of(name)) is not None}
    setup = Setup(
        init=job.options.init,
        backend=job.options.backend,
        gpus=devices.gpus,
        define=tuple(name for name in GIVEN_NAMES if name not in job.namespace),
        out=job.wanted.out,
        gather=job.wanted.gather,
        colors=job.colors,
    )
    return Script(job.cell, setup, closure, sources, _client.own_folders(), devices.ranks)


def _hidden_names(job: Job, devices: _devices.Devices) -> str | None:
    """Return a line on variables of the notebook that stand where a rank would have its own; None if there are none.

    A leftover ``rank = 0`` would have every rank train on everything, and save over the others.
    """
    own = {name: job.names[name] for name in GIVEN_NAMES if name in job.names}
    device = own.get("device")
    if "device" in own:
        kind, _, index = str(device).partition(":")
        # A torch.device becomes the rank's own; a string without a number is the current device.
        if not devices.gpus or (kind == "cuda" and (not index or not isinstance(device, str))):
            del own["device"]
    if not own:
        return None
    listed = ", ".join(f"{name} = {value!r:.40}" for name, value in own.items())
    return (
        f"nbddp: used as the notebook has it, on every rank: {listed}. After del {', '.join(own)} ranks have their own"
    )


def _export(script: Script, path: str) -> None:
    try:
        script.export(path)
    except OSError as error:
        raise LaunchError(f"--keep-script {path}: it cannot be written: {error.strerror}") from error


def _write(script: Script, run_dir: RunDir) -> None:
    """Write the script and its closure into the run directory."""
    path = None
    size = script.closure.nbytes
    try:
        if not script.embeds_closure():
            path = run_dir.store("closure", size, script.closure.write)
        script.write(run_dir.script, path)
    except OSError as error:
        what = f"write the script and {format_size(size)} of what the cell uses"
        raise cannot_write(what, run_dir.script, error) from error
