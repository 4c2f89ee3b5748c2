"""`nbddp.launch`: a function on several ranks, from any notebook, script or prompt.

detectron2's ``engine.launch`` and torchrunx have shown how pleasant it is to have this as one call; what the call does
here is what ``%%ddp`` does, with the function's call in the place of the cell.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar, Unpack, overload

from nbddp import _client, _job, _settings
from nbddp._errors import LaunchError, NbddpError, ResultError, end_at_call
from nbddp._keywords import OptionKeywords, from_keywords, signature_with_options
from nbddp._options import RunOptions
from nbddp._relay import View
from nbddp._results import Wanted
from nbddp._screen import screen_of
from nbddp._script import CALLER, Cell

_Result = TypeVar("_Result")

# Names in the ranks' namespace that no variable can have, and that read well in messages.
_VALUE = "return value"

# One per process, shared with the magics: one launcher is enough.
client = _client.Client()


class _FunctionError(NbddpError, TypeError):
    """What was to be called cannot be, or not to any use."""


# What it is to who catches it, and in the message.
_FunctionError.__name__ = "TypeError"


@overload
def launch(
    fn: Callable[..., Coroutine[Any, Any, _Result]],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    options: RunOptions | None = None,
    **keywords: Unpack[OptionKeywords],
) -> list[_Result]: ...
@overload
def launch(
    fn: Callable[..., _Result],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    options: RunOptions | None = None,
    **keywords: Unpack[OptionKeywords],
) -> list[_Result]: ...
def launch(
    fn: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    options: RunOptions | None = None,
    **keywords: Unpack[OptionKeywords],
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` on several ranks and return what it returned on each, in the order of ranks.

    ::

        results = nbddp.launch(train, model, data, kwargs={"epochs": 3}, gpus=4, timeout=3600)
        results = nbddp.launch(train, model, data, options=nbddp.RunOptions(gpus=4))

    The function is sent as it is, with the variables, functions and classes of ``__main__`` that it uses; it need not
    be importable: lambdas, methods, classes and partial functions will do. Of a coroutine function the result is
    awaited. The ranks are new processes under torchrun, so it does not matter whether CUDA is in use here. Output,
    errors and interrupts are those of a ``%%ddp`` cell.

    With ``nnodes=2`` each of two machines calls this once, with its own ``node_rank`` and the same ``rdzv_endpoint``;
    ranks are numbered through all of them, and each call returns what its own machine's ranks have returned.

    Args:
        fn: What to call.
        *args: What to call it with; tensors are shared with the ranks copy-on-write, not copied to each.
        kwargs: What to call it with by keyword. A dictionary, so that the function's names and those of options
            cannot be taken for each other.
        options: Options, made beforehand.
        **keywords: Single options, by the names of the fields of `RunOptions`; they win. All but ``out`` and
            ``gather``, which are for cells.

    Returns:
        A list with one entry per rank of this machine. Tensors are on the CPU, or on `out_device`. With ``dry_run`` it
        is empty.

    Raises:
        TypeError: `fn` cannot be called, or is a generator function.
        OptionError: An option is unknown or cannot be, or two contradict each other; also a ``ValueError``.
        CaptureError: The function or an argument cannot be sent.
        LaunchError: The ranks could not be started; or this process is a rank itself.
        RankError: A rank raised, exited or died. If it raised, the error is what was raised, and a `RankError` besides.
        RunTimeout: `timeout` seconds passed; also a ``TimeoutError``.
        ResultError: A return value cannot be brought back; the others are in its `results`, by rank.
        KeyboardInterrupt: The user stopped it.
    """
    try:
        return _launch(fn, args, dict(kwargs or {}), options, keywords)
    except NbddpError as error:
        failure = error
    end_at_call(failure)
    raise failure  # what happened is in the message, and in what stands above and below it


launch.__signature__ = signature_with_options(launch)  # type: ignore[attr-defined]  # what help and Tab ask for


def _launch(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    options: RunOptions | None,
    keywords: Mapping[str, Any],
) -> list[Any]:
    refuse_in_rank("nbddp.launch")
    _check_function(fn)
    chosen = from_keywords(options, keywords, _parameters(fn))
    shell = _shell()
    job = _call(fn, args, kwargs, chosen, shell)
    if chosen.dry_run:
        sys.stdout.write(_job.dry_run(job, client) + "\n")
        return []
    try:
        results: list[Any] = _job.perform(job, client, screen_of(shell)).results[_VALUE]
    except ResultError as error:
        # By rank, those that could come.
        error.results = error.results.get(_VALUE, {})
        raise
    return results


def refuse_in_rank(what: str) -> None:
    """Refuse to launch ranks from a rank: each of them would, and their processes would be nobody's to end.

    Args:
        what: What was asked for.

    Raises:
        LaunchError: This process is a rank, or was started by one.
    """
    if (rank := _settings.rank_of(os.environ)) is not None:
        raise LaunchError(
            f"{what}: this process is rank {rank} of a run, or was started by it, and ranks cannot launch ranks. "
            "Launch from the notebook or the script itself; in a rank, call the function"
        )


def _check_function(fn: object) -> None:
    """Refuse what there is no use in calling, before it is called on each rank.

    Raises:
        TypeError: It cannot be called; or it would return something that stays with its process.
    """
    if not callable(fn):
        hint = ""
        if inspect.iscoroutine(fn) or inspect.isgenerator(fn):
            fn.close()  # or Python warns that nobody has awaited it
        elif isinstance(fn, str):
            hint = ". A command is no function: lambda: subprocess.run([...])"
        raise _FunctionError(
            f"nbddp.launch(fn): fn is {_shown(fn)}, which cannot be called. Pass the function itself and its arguments "
            f"after it: nbddp.launch(train, data), not nbddp.launch(train(data)){hint}"
        )
    if _is(inspect.isgeneratorfunction, fn) or _is(inspect.isasyncgenfunction, fn):
        raise _FunctionError(
            f"nbddp.launch(fn): fn is {_shown(fn)}, a generator function: to call it runs nothing, and the generator "
            "stays with its process. Pass a function that goes through it, such as lambda: list(fn())"
        )


def _is(kind: Callable[[Any], bool], fn: Any) -> bool:
    """Tell whether a function, or an object's ``__call__``, is of a kind."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return kind(fn) or (not isinstance(fn, type) and kind(getattr(fn, "__call__", None)))  # noqa: B004  # not callable()


def _parameters(fn: Callable[..., Any]) -> list[str]:
    """Return the names by which arguments of a function can be given."""
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    try:
        return [name for name, one in inspect.signature(fn).parameters.items() if one.kind in named]
    except (TypeError, ValueError):  # some builtins do not tell
        return []


def _call(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: RunOptions, shell: Any
) -> _job.Job:
    """Return the call of a function as a job: a cell of one line."""
    if shell is not None:
        from nbddp import _magic
    function = f"function {fn.__name__}" if isinstance(fn, types.FunctionType) else "fn"
    arguments = {f"argument {i}": argument for i, argument in enumerate(args)}
    by_keyword = {f"argument {name!r}": argument for name, argument in kwargs.items()}
    given = [_named(name) for name in arguments]
    if kwargs:
        # Not name=value: what is a keyword of Python's can be one of the function's.
        given.append(
            f"**{{{', '.join(f'{key!r}: {_named(name)}' for key, name in zip(kwargs, by_keyword, strict=True))}}}"
        )
    call = f"{_named(function)}({', '.join(given)})"
    if _is(inspect.iscoroutinefunction, fn):
        call = f"await {call}"
    return _job.Job(
        cell=Cell(f"{_named(_VALUE)} = {call}", filename=CALLER, number=0),
        names={function: fn, **arguments, **by_keyword},
        namespace=vars(sys.modules["__main__"]),
        options=options,
        wanted=Wanted(gather=(_VALUE,), device=options.out_device),
        source_of=_magic.source_of(shell) if shell is not None else lambda _: None,
        colors=str(shell.colors) if shell is not None else ("" if sys.stderr.isatty() else "nocolor"),
        place="the function",
        view=View(options.ranks, options.plain or _settings.plain({**os.environ, **options.env})),
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
