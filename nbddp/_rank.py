"""A rank's life: what the generated script calls.

::

    restore()   repair what the fork left, connect to the notebook, take the device, join the process group,
                bind the notebook's names
    run()       run the cell, write the results, run the exit handlers, report, leave the process group

A process that a rank starts by "spawn" or "forkserver" imports the script too; there, only the names are bound.
Without a notebook (plain ``torchrun``) the same two calls do the same, but for the report.

A forked rank must *return* from its script whatever happens: torchrun's agent waits for ever for one that leaves
another way. So the outcome travels to the notebook in a report, and leaving is the same for all outcomes. Only when
torchrun is to restart the ranks does a failed one raise.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from nbddp import (
    _interrupts,
    _palette,
    _plots,
    _process,
    _raised,
    _repair,
    _results,
    _serve,
    _settings,
    _uplink,
    _workers,
)
from nbddp._names import MODULES_OWN
from nbddp._outcome import INTERRUPTED, outcome_of, show_sources
from nbddp._paths import RunDir
from nbddp._pickling import Pickler, Target, load, load_file
from nbddp._results import Wanted


class _State:
    """What `restore` leaves for `run`.

    Attributes:
        times: When each stage was complete (``time.monotonic``, which all processes of a machine share).
    """

    times: dict[str, float]

    notebook: _uplink.Uplink | None = None
    run_dir: RunDir | None = None
    arguments: dict[str, Any]
    target: Target
    # Writes what the cell has raised; after the report, since it may take long.
    write_exception: Callable[[], str | None] = staticmethod(lambda: None)
    kept: _serve.Kept | None = None
    shell_settings: Mapping[str, Any]


_state = _State()
_state.times = {}


def _complete(stage: str) -> None:
    _state.times[stage] = time.monotonic()


def restore(
    namespace: dict[str, Any],
    *,
    cell: str,
    path: list[str],
    sources: Mapping[str, tuple[str, int | None]],
    closure: bytes | str,
    **arguments: Any,
) -> None:
    """Bind the notebook's names in `namespace`; in a rank, after all that must come before that.

    Args:
        namespace: The script's globals.
        cell: The cell's text.
        path: The notebook's own folders to import from.
        sources: The text of the notebook's cells by file name, and their execution counts.
        closure: A snapshot in base 85, or the name of the file that holds it, relative to the script.
        arguments: The fields of `nbddp._script.Cell` and `Setup`.
    """
    in_rank = namespace["__name__"] == "__main__"
    _complete("script started")
    keep = arguments.pop("keep", False)
    _state.arguments = {"cell": cell, "cells": {name: number for name, (_, number) in sources.items()}, **arguments}
    device = "cpu"
    try:
        if in_rank:
            device = _enter(**arguments)
        # Only now: a queue.py beside the notebook is not what torch is to import.
        sys.path[:0] = [folder for folder in path if folder not in sys.path]
        show_sources(sources)
        target = _state.target = Target(namespace, namespace, device=device)
        # A function that uses __name__ brings the notebook's along, and in a spawned worker that would be wrong.
        own = {name: namespace[name] for name in MODULES_OWN if name in namespace}
        if isinstance(closure, bytes):
            load(memoryview(bytearray(base64.b85decode(closure))), target)
        else:
            load_file(os.path.join(os.path.dirname(namespace["__file__"]), closure), target)
        namespace.update(own)
        _state.shell_settings = _plots.take(namespace)
        if in_rank:
            namespace.update(_given_names(arguments["define"], device))
            _workers.send_by_value(list(target.received.values()))
            if keep:
                _state.kept = _serve.Kept(namespace, device)
        else:
            # It is no rank of torchrun's: where it says that a group meets there is no store of the agent's, and torch
            # would wait for one until the group's timeout.
            os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
            _workers.send_back_by_value()
        _complete("names restored")
    except BaseException as error:
        if _state.notebook is None:
            raise
        # The script goes on to run(), which sees that all is over.
        _state.arguments = {}
        loading = getattr(getattr(_state, "target", None), "reading", None)
        _leave(outcome_of(error, ()) | ({"loading": loading} if loading else {}))


def _enter(*, init: bool, backend: str | None, gpus: bool, **_: Any) -> str:
    """Become a rank; return the name of its device."""
    if (attempts := os.environ.pop(_settings.ATTEMPT, None)) is not None:
        # An agent that was started again does not know of the times before.
        names = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"
        os.environ.update(zip(names, attempts.split("/"), strict=True))
    run_dir = os.environ.pop(_settings.RUN_DIR, None)
    secret = os.environ.pop(_settings.MARK, "")
    forked = _repair.is_forked_rank()
    if run_dir is not None:
        _state.run_dir = RunDir.adopt(run_dir)
    if forked:
        assert _state.run_dir is not None
        _repair.repair(_state.run_dir.workers_temp(_settings.number(os.environ)))
    if _state.run_dir is not None:
        if not forked:
            _process.die_with_parent(os.getppid())
        _state.notebook = _uplink.Uplink(_state.run_dir, secret)
        _state.notebook.listen()
        # Only now that there is whom to tell (see `nbddp._repair`). And a process that was started by one that ignores
        # SIGINT, as the launcher does, would never see a KeyboardInterrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    elif "RANK" not in os.environ:
        raise SystemExit(f"run this with torchrun: torchrun --nproc-per-node 2 {sys.argv[0]}")
    if (here := os.environ.pop(_settings.GPUS, None)) is not None:
        gpus = here == "1"
    _complete("connected")
    if "PYTHONBREAKPOINT" not in os.environ:
        sys.breakpointhook = _no_debugger
    import pdb

    pdb.set_trace = _no_debugger
    _repair.name_process(f"nbddp-rank{os.environ['RANK']}")
    import torch.distributed as dist

    from nbddp import _group

    dist.set_debug_level_from_env()
    device = _group.own_device(gpus, forked=forked)
    _group.let_user_take_over()
    _group.look_after_new_groups()
    if init:
        _group.init(backend, device, _state.run_dir)
    _complete("process group")
    return str(device)


def _no_debugger(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "a debugger in a rank has nobody to ask. Print in the cell, bring names back with --out or --gather, or run "
        "the code in the notebook itself"
    )


def _given_names(define: tuple[str, ...], device: str) -> dict[str, Any]:
    """Return the names that nbddp itself gives to the cell, where the notebook has none like them."""
    import torch

    given = {
        "rank": int(os.environ["RANK"]),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
        "device": torch.device(device),
    }
    return {name: given[name] for name in define}


def run(namespace: dict[str, Any]) -> None:
    """Run the cell, or those that come, and end the rank."""
    if not _state.arguments:
        return
    if _state.kept is not None and _state.notebook is not None:
        _serve_cells(_state.kept, _state.notebook)
        _leave({"outcome": "done"})
        return
    outcome = _interrupts.interruptibly(functools.partial(_whatever_happens, namespace))
    _leave(outcome or INTERRUPTED)


def _whatever_happens(namespace: dict[str, Any]) -> dict[str, Any]:
    try:
        return _run_cell(namespace, **_state.arguments)
    except BaseException as error:
        return outcome_of(error, ())


def _serve_cells(kept: _serve.Kept, notebook: _uplink.Uplink) -> None:
    """Run the cells that the notebook sends, until it sends no more."""
    from nbddp import _group

    assert _state.run_dir is not None
    notebook.ready()
    while (request := kept.next_request(notebook)) is not None:
        if request["kind"] == "regroup":
            notebook.regrouped(kept.regroup(_state.run_dir, request["backend"], request["place"]))
            continue
        _state.times = {}
        _state.write_exception = _State.write_exception
        outcome = kept.run(request, _state, functools.partial(_run_cell, kept.namespace), notebook.begin)
        report = {"times": _state.times, **outcome}
        if outcome["outcome"] == "done":
            notebook.idle(kept.held(), _group.backend(), report=report)
        else:
            # At once: to write the exception may take long.
            notebook.report(**report)
            pickled = _interrupts.interruptibly(_state.write_exception)
            notebook.idle(kept.held(), _group.backend(), pickled=pickled)


def _run_cell(
    namespace: dict[str, Any],
    *,
    cell: str,
    cells: Mapping[str, int | None],
    filename: str,
    number: int,
    header: str,
    colors: str,
    is_python: bool = False,
    out: tuple[str, ...],
    gather: tuple[str, ...],
    first: int = 0,
    **_: Any,
) -> dict[str, Any]:
    """Run the cell, and write the results if it went well."""
    from nbddp import _shell

    shell = _shell.the_shell(_state.run_dir.temp if _state.run_dir is not None else None)
    shell.settings(_state.shell_settings)
    if _state.notebook is not None:
        shell.publish = _state.notebook.publish
        shell.clear = _state.notebook.clear
        shell.failing = _state.notebook.failing
        if _state.kept is None:
            _state.notebook.begin(filename)
    error = shell.run(
        namespace,
        cell,
        filename=filename,
        number=number,
        header=header,
        is_python=is_python,
        cells=cells,
        colors=colors,
    )
    _complete("cell")
    outcome = outcome_of(error, shell.traceback)
    rank = _settings.number(os.environ)
    if outcome["outcome"] == "raised" and error is not None and _state.run_dir is not None:
        pickler = functools.partial(Pickler, namespace, _state.target.received)
        _state.write_exception = functools.partial(
            _raised.write, error, outcome["message"], pickler, rank, _state.run_dir
        )
    if outcome["outcome"] == "done":
        names = Wanted(out, gather, first=first).of_rank(rank)
        if names and _state.run_dir is not None:
            outcome |= _results.write(names, namespace, _state.target.received, rank, _state.run_dir)
    return outcome


def _leave(outcome: dict[str, Any]) -> None:
    """Do what a script does at its end, report, leave the process group and return to torchrun."""
    _interrupts.ignore()
    failed = outcome["outcome"] != "done"
    if not failed:
        from nbddp import _group
    notebook = _state.notebook
    pickled = None
    with contextlib.suppress(OSError):  # the kernel is gone; so will this process be
        if notebook is not None and failed:
            # At once: a thread that never ends must not keep a failure from being seen.
            notebook.report(times=_state.times, **outcome)
            pickled = _interrupts.interruptibly(_state.write_exception)
        elif failed:
            text = "\n".join(outcome.get("lines", ()))
            print(text if sys.stderr.isatty() else _palette.uncoloured(text), file=sys.stderr)  # noqa: T201
        _end_as_a_script()
        _complete("results and exit handlers")
        if not failed:
            _group.wait_for_who_joins()
        if notebook is not None and not failed:
            notebook.report(times=_state.times, **outcome)
        if notebook is not None:
            notebook.end(pickled)
    if not failed:
        with contextlib.suppress(Exception):
            _group.destroy()
    _process.hang_up()
    if not _repair.is_forked_rank():
        # A DDP object that is alive when the interpreter ends makes gloo abort now and then.
        _uplink.flush()
        os._exit(outcome.get("code", 1) if failed else 0)
    if failed and os.environ["TORCHELASTIC_RESTART_COUNT"] != os.environ["TORCHELASTIC_MAX_RESTARTS"]:
        raise RuntimeError("the cell failed on this rank; torchrun starts all of them again")


def _end_as_a_script() -> None:
    """Wait for threads, then run the exit handlers.

    multiprocessing, in whose child a forked rank runs, runs exit handlers only from Python 3.13 on, and then it would
    be too late to show what they print.
    """
    for stage in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        # An interrupt ends the wait for a thread, not what comes after it.
        _interrupts.interruptibly(functools.partial(_whatever_it_raises, stage))


def _whatever_it_raises(stage: Callable[[], object]) -> None:
    try:
        stage()
    except BaseException:
        traceback.print_exc()
