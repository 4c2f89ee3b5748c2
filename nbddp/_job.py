"""A job from the notebook's side, from its options to its results: the one way through nbddp.

::

    devices ──> capture ──> script ──> launch, wait, relay ──> results
    _devices    _closure    _script    _run, _relay            _results

The magic and `nbddp.launch` both come through here; they differ in what they hand in and in what they do with the
results. The directory of the run is gone when this returns, whichever way it does.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbddp import (
    _allocation,
    _backends,
    _client,
    _closure,
    _devices,
    _engines,
    _kept,
    _limits,
    _optimizers,
    _plots,
)
from nbddp._agent import torchrun_options
from nbddp._errors import LaunchError, NbddpError
from nbddp._names import GIVEN_NAMES
from nbddp._options import Options
from nbddp._prepared import Finished, Prepared, Said, interruptible
from nbddp._rank_state import rank_list
from nbddp._relay import View
from nbddp._results import Wanted
from nbddp._screen import Screen
from nbddp._script import Cell, Script, Setup
from nbddp._snapshot import Snapshot
from nbddp._stop import GRACE_SECONDS, InterruptGate


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
        push: Names that kept ranks get also where they have their own.
        idle: Seconds without a cell after which kept ranks end; 0 for never.
        last: Whether kept ranks are to end, in place of a cell.
        background: The name of a run during which other cells run, whose logs are not the last run's; else empty.
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
    push: Sequence[str] = ()
    idle: float = _kept.IDLE_SECONDS
    last: bool = False
    background: str = ""


def perform(job: Job, client: _client.Client, screen: Screen) -> Finished:
    """Run a job to its end.

    Raises:
        NbddpError: It did not end well; see `nbddp._errors`.
        KeyboardInterrupt: The user stopped it.
    """
    if not (job.options.keep and _kept.are_there()):  # which need next to none
        _limits.check_files(0)
    try:
        with InterruptGate() as gate:
            if not job.options.keep:
                return prepare(job, client, screen, gate).run(gate)
            with _kept.Borrowed(job.options.idle, job.idle, screen) as kept:
                return prepare(job, client, screen, gate, kept).run(gate)
    except NbddpError:
        raise  # it may be an OSError as well: what a rank has raised
    except OSError as error:
        if not _limits.is_about_files(error):
            raise
        # Another thread has taken them meanwhile.
        raise LaunchError(_limits.no_more_files("cannot start a run")) from error


def prepare_alone(job: Job, client: _client.Client, screen: Screen) -> Prepared:
    """Prepare a job that another thread will run.

    Raises:
        NbddpError: The job cannot be run.
        KeyboardInterrupt: The user stopped it.
    """
    _limits.check_files(0)
    with InterruptGate() as gate:
        return prepare(job, client, screen, gate)


def dry_run(job: Job, client: _client.Client) -> str:
    """Return what `perform` would launch and send, as text."""
    _limits.check_files(0)
    env = {**os.environ, **job.options.env}
    kept = _kept.current() if job.options.keep else None
    held: frozenset[str] = frozenset()
    with InterruptGate() as gate:
        if kept is not None and kept.devices is not None:
            kept.check(job.options)
            devices = kept.devices
            held = kept.held_by_all() | {*GIVEN_NAMES}
            job = replace(job, names={name: value for name, value in job.names.items() if name not in held})
        else:
            devices = _devices.choose(job.options, env, lambda: client.count_gpus(env, gate))
            _check_backend(job.options, devices, lambda: client.backends(env, gate))
        with gate.open():
            known = kept.definitions if kept is not None else ()
            snapshot = _closure.capture(job.names, job.namespace, job.lines, job.place, known=known, held=held)
    if job.options.keep_script is not None:
        _export(_script(job, devices, snapshot), job.options.keep_script)
    lines = [devices.note] if devices.note else []
    command = "torchrun " + " ".join(_torchrun_options(job, devices, client, env)) + " <generated script>"
    if devices.placement is not None:
        lines += (
            shlex.join(link.argv)
            for link in _engines.of(devices.placement).links(_engines.node_command(devices.placement))
        )
        command = f"and on each node, K being its number: {command}"
    lines.append(
        command if kept is None else f"on the kept {'rank' if devices.ranks == 1 else 'ranks'}; nothing is started"
    )
    return "\n".join([*lines, *_closure.explain(job.names, job.namespace, job.lines, snapshot, held)])


def _torchrun_options(job: Job, devices: _devices.Devices, client: _client.Client, env: Mapping[str, str]) -> list[str]:
    """Return what torchrun is called with."""
    options, placement = job.options, devices.placement
    if placement is None:
        start_method = client.start_method(env, options.nnodes)
        where = options.nnodes, options.node_rank or 0, options.rdzv_endpoint
        return torchrun_options(devices.ranks, options.max_restarts, start_method, *where)
    start_method = client.start_method(env, where=placement.machines)
    return torchrun_options(
        placement.ranks_per_node, options.max_restarts, start_method, placement.nnodes, "K", "NODE0:PORT", placed=True
    )


def prepare(
    job: Job, client: _client.Client, screen: Screen, gate: InterruptGate, kept: _kept.Kept | None = None
) -> Prepared:
    """Do all that concerns the notebook's own variables: afterwards these may change.

    Args:
        job: The job.
        client: The kernel's end of the launcher.
        screen: Where output is shown.
        gate: Tells of interrupts.
        kept: The kept ranks that it is for, or will be.

    Raises:
        NbddpError: The job cannot be run.
        KeyboardInterrupt: The user stopped it.
    """
    times = {"began": time.monotonic()}
    said = Said(screen)
    there = kept is not None and kept.world is not None
    # Ranks that are there have theirs.
    env = {} if there else {**os.environ, **job.options.env}
    # First, so that it imports while this process pickles.
    if not (there or job.options.placed) and (changed := client.start(env)):
        said(f"nbddp: {', '.join(changed)} changed, which torch reads when it loads; loading it anew")
    if kept is not None:
        kept.check(job.options)
    # What these ranks are called is theirs, for as long as they stay.
    held = (kept.held_by_all() | {*GIVEN_NAMES}) - frozenset(job.push) if kept is not None else frozenset()
    names = _names_to_send(job, kept, held, said)
    if there and not names and job.options.keep_script is None:
        # As of most cells on kept ranks: no file is made that all of them would have to read.
        closure = Snapshot.of_nothing()
    else:
        with interruptible(gate, f"what {job.place} uses was pickled; nothing was launched"):
            closure = _closure.capture(
                names,
                job.namespace,
                job.lines,
                job.place,
                known=kept.definitions if kept is not None else (),
                held=held,
            )
    times["captured"] = time.monotonic()
    if kept is not None and kept.devices is not None:
        devices = kept.devices
    else:
        devices = _devices.choose(job.options, env, lambda: client.count_gpus(env, gate), _allocation.in_use())
        _check_backend(job.options, devices, lambda: client.backends(env, gate))
        if devices.note:
            said(devices.note)
    _check_numbers(job, devices, lambda: client.count_gpus(os.environ, gate))
    if job.large is not None and closure.nbytes > job.large:
        said(_closure.size_line(names, closure))
    if not there and (hidden := _hidden_names(job, devices)):
        said(hidden)
    for wrapper in dict.fromkeys(closure.unwrapped):
        said(f"nbddp: {wrapper} was unwrapped: its .module is sent; wrap it again in the cell")
    script = _script(job, devices, closure)
    if (path := job.options.keep_script) is not None:
        _export(script, path)
        said(f"nbddp: kept as {path}: torchrun --nproc-per-node {devices.ranks} {path}")
    prepared = Prepared(job, client, screen, devices, kept, names, closure.met, times, said)
    prepared.make_room()
    try:
        with interruptible(gate, "the script was written; nothing was launched"):
            prepared.write(script)
    except BaseException:
        prepared.discard()
        raise
    # It lies in the run directory now; copies that it may hold are not to wait for the end of the run.
    closure.release()
    return prepared


def _names_to_send(
    job: Job, kept: _kept.Kept | None, held: Collection[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Return what the cell uses of the notebook; but for what kept ranks hold, and are to go on with."""
    if kept is not None and (newer := kept.newer(job.names, held)):
        listed = ", ".join(newer)
        say(f"nbddp: the ranks go on with their own {listed}; %ddp push {' '.join(newer)} sends the notebook's new")
    names = {name: value for name, value in job.names.items() if name not in held}
    if kept is not None and names:
        there = {name: job.namespace.get(name) for name in held}
        for name, model in _optimizers.of_models(names, there):
            say(
                f"nbddp: {name} steps the parameters of the notebook's {model}, and the ranks have a {model} of their "
                f"own; make {name} in a cell of theirs, or %ddp push {model} {name} sends both anew"
            )
    return names | _plots.settings()


def _check_numbers(job: Job, devices: _devices.Devices, count_gpus: Callable[[], int]) -> None:
    """Refuse ranks and devices that there are not."""
    on = job.options.on
    if on is not None and max(on) >= devices.ranks:
        raise LaunchError(f"--on {max(on)}: the kept ranks are {rank_list(range(devices.ranks)).partition(' ')[2]}")
    if job.view.ranks is not None and max(job.view.ranks) >= devices.ranks and job.options.nnodes == 1:
        raise LaunchError(f"--ranks {max(job.view.ranks)}: this run has {_ranks_of(devices.ranks)}")
    if job.wanted.device is not None:
        _devices.check_out_device(job.wanted.device, count_gpus)


def _check_backend(options: Options, devices: _devices.Devices, there: Callable[[], list[str]]) -> None:
    if options.backend is not None and options.init and devices.placement is None:
        _backends.check(options.backend, there(), gpus=devices.gpus)


def _ranks_of(count: int) -> str:
    return "one rank, 0" if count == 1 else f"ranks 0 to {count - 1}"


def _script(job: Job, devices: _devices.Devices, closure: Snapshot) -> Script:
    sources = {name: source for name in sorted(closure.sources) if (source := job.source_of(name)) is not None}
    setup = Setup(
        init=job.options.init,
        backend=job.options.backend,
        gpus=devices.gpus,
        define=tuple(name for name in GIVEN_NAMES if job.options.keep or name not in job.namespace),
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
    if job.options.keep:
        return f"nbddp: each rank has its own {', '.join(own)}; the notebook's stays there: {listed}"
    return (
        f"nbddp: used as the notebook has it, on every rank: {listed}. After del {', '.join(own)} ranks have their own"
    )


def _export(script: Script, path: str) -> None:
    try:
        script.export(path)
    except OSError as error:
        raise LaunchError(f"--keep-script {path}: it cannot be written: {error.strerror}") from error
