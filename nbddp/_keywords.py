"""The options of a run as keyword arguments of `nbddp.launch`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict

from nbddp._option_line import meant_by
from nbddp._options import DEVICES, OptionError, RunOptions, option_of


class OptionKeywords(TypedDict, total=False):
    """The fields of `RunOptions`, as `nbddp.launch` takes them by keyword."""

    gpus: int | None
    cpus: int | None
    gpu_ids: Sequence[int]
    backend: str | None
    out_device: str | None
    env: Mapping[str, str] | None
    timeout: float | None
    init: bool
    max_restarts: int
    keep_script: str | os.PathLike[str] | None
    dry_run: bool
    ranks: Sequence[int] | None
    plain: bool
    nnodes: int
    hosts: Sequence[str]
    slurm: str | None
    engine: str | None
    python: str | None
    node_rank: int | None
    rdzv_endpoint: str | None
    keep: bool
    on: Sequence[int] | None
    idle: float | None
    share: bool


# What only a cell can have.
_FOR_CELLS = ("out", "gather", "bg", "auto")


def from_keywords(
    options: RunOptions | None, keywords: Mapping[str, Any], parameters: Iterable[str] = ()
) -> RunOptions:
    """Return options as `nbddp.launch` was given them.

    Args:
        options: Those that were made before, if any.
        keywords: Single ones, which win.
        parameters: The names of the parameters of the function that is to be called.

    Raises:
        OptionError: A keyword is no option, a value cannot be, or two contradict each other.
    """
    if not isinstance(options, RunOptions | None):
        raise OptionError(f"options={options!r:.60}: that is no nbddp.RunOptions, as in RunOptions(gpus=2)")
    known = {one.name for one in fields(RunOptions)}
    for name in keywords:
        if name in _FOR_CELLS:
            raise OptionError(f"{name}: that is for cells; launch returns what the function returns, on every rank")
        if name not in known:
            raise OptionError(_no_option(name, known, parameters))
    given = {name: value for name, value in keywords.items() if not (name == "env" and value is None)}
    before = {one.name: getattr(options, one.name) for one in fields(RunOptions)} if options is not None else {}
    if any(given.get(name) not in (None, ()) for name in DEVICES):
        before = {name: value for name, value in before.items() if name not in DEVICES}
    made = RunOptions(**{**before, **given})
    if made.out or made.gather or made.bg is not None:
        raise OptionError("RunOptions: out, gather and bg are for cells; launch returns what the function returns")
    return made


def _no_option(name: str, known: Iterable[str], parameters: Iterable[str]) -> str:
    if name in parameters:
        return (
            f"{name}: launch takes options by keyword; the function's own keyword arguments go into "
            f"kwargs={{{name!r}: ...}}"
        )
    if name == "args":
        return "args: the function's arguments stand behind it, as in nbddp.launch(fn, a, b, gpus=2)"
    meant = meant_by(option_of(name), map(option_of, known))
    hint = f"; did you mean {meant.removeprefix('--').replace('-', '_')}?" if meant else ""
    return (
        f"{name}: there is no such option{hint or '.'} help(nbddp.RunOptions) lists them; keyword arguments of the "
        f"function go into kwargs={{...}}"
    )


def signature_with_options(function: Any) -> inspect.Signature:
    """Return the signature of a function that takes `OptionKeywords`, with each of them by name: for help and Tab."""
    signature = inspect.signature(function)
    defaults = {one.name: getattr(RunOptions(), one.name) for one in fields(RunOptions)}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in OptionKeywords.__annotations__.items()
    ]
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*own, *options])
