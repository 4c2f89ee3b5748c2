"""`nbddp.launch`: a function on several ranks, from any notebook or script."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from nbddp import _client, _job, _settings
from nbddp._errors import ResultError
from nbddp._options import Options
from nbddp._relay import View
from nbddp._results import Wanted
from nbddp._screen import screen_of
from nbddp._script import CALLER, Cell

_Result = TypeVar("_Result")

# Names in the ranks' namespace that no variable can have, and that read well in messages.
_VALUE = "return value"

# One per process, shared with the magics: one launcher is enough.
client = _client.Client()


def launch(
    fn: Callable[..., _Result],
    *args: Any,
    gpus: int | None = None,
    cpus: int | None = None,
    gpu_ids: Sequence[int] = (),
    backend: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    init: bool = True,
    max_restarts: int = 0,
    ranks: Sequence[int] | None = None,
    plain: bool = False,
) -> list[_Result]:
    """Call ``fn(*args)`` on several ranks and return what it returned on each, in the order of ranks.

    The function is sent as it is, with the variables, functions and classes of ``__main__`` that it uses; it need not
    be importable. The ranks are new processes under torchrun, so it does not matter whether CUDA is in use here.

    Args:
        fn: What to call. For keyword arguments use ``functools.partial``.
        *args: What to call it with; tensors are shared with the ranks copy-on-write, not copied to each.
        gpus: Number of ranks, one per GPU; where there is no GPU at all, ranks on the CPU. Default: all GPUs.
        cpus: Number of ranks on the CPU.
        gpu_ids: GPUs to use, numbered as in ``torch.device("cuda:K")`` here.
        backend: Process group backend; by default nccl on GPUs and gloo on the CPU.
        env: Environment variables for the ranks, besides this process's own.
        timeout: Seconds after which the run is stopped.
        init: Whether the process group is initialised before the call.
        max_restarts: How often torchrun may start the ranks again after a failure.
        ranks: The ranks whose output is shown; None for all.
        plain: Whether to show output rank after rank, without colours and panel: the same at every run. Where output
            cannot be updated in place, as in a file, it always is.

    Returns:
        A list with one entry per rank. Tensors come back on the CPU.

    Raises:
        TypeError: `fn` cannot be called.
        ValueError: An argument cannot be.
        CaptureError: The function or an argument cannot be sent.
        LaunchError: The ranks could not be started.
        RankError: A rank raised, exited or died.
        RunTimeout: `timeout` passed.
        ResultError: A return value cannot be brought back; the others are in its `results`, by rank.
    """
    if not callable(fn):
        raise TypeError(
            f"nbddp.launch(fn): fn is {_shown(fn)}, which cannot be called. Pass the function itself and its arguments "
            "after it: nbddp.launch(train, data), not nbddp.launch(train(data))"
        )
    options = Options(
        gpus=gpus,
        cpus=cpus,
        gpu_ids=tuple(gpu_ids),
        backend=backend,
        env=dict(env or {}),
        timeout=timeout,
        init=init,
        max_restarts=max_restarts,
        ranks=None if ranks is None else tuple(ranks),
        plain=plain,
    )
    shell = _shell()
    try:
        results: list[_Result] = _job.perform(_call(fn, args, options, shell), client, screen_of(shell)).results[_VALUE]
    except ResultError as error:
        # By rank, those that could come.
        error.results = error.results.get(_VALUE, {})
        raise
    return results


def _call(fn: Callable[..., Any], args: Sequence[Any], options: Options, shell: Any) -> _job.Job:
    """Return the call of a function as a job: a cell of one line."""
    if shell is not None:
        from nbddp import _magic
    function = f"function {fn.__name__}" if isinstance(fn, types.FunctionType) else "fn"
    arguments = {f"argument {i}": argument for i, argument in enumerate(args)}
    call = f"{_named(function)}({', '.join(map(_named, arguments))})"
    return _job.Job(
        cell=Cell(f"{_named(_VALUE)} = {call}", filename=CALLER, number=0),
        names={function: fn, **arguments},
        namespace=vars(sys.modules["__main__"]),
        options=options,
        wanted=Wanted(gather=(_VALUE,)),
        source_of=_magic.source_of(shell) if shell is not None else lambda _: None,
        colors=str(shell.colors) if shell is not None else ("" if sys.stderr.isatty() else "nocolor"),
        place="the function",
        view=View(options.ranks, options.plain or _settings.plain(os.environ)),
    )


def _shown(obj: Any) -> str:
    """Return an object and its type in a few words."""
    try:
        text = " ".join(repr(obj).split())
    except Exception:
        return f"of type {type(obj).__name__}"
    return f"{text[:60]}{'…' if len(text) > 60 else ''} ({type(obj).__name__})"


def _named(name: str) -> str:
    return f"globals()[{name!r}]"


def _shell() -> Any:
    """Return the IPython shell that this runs in, or None."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    return get_ipython()
