"""A rank's exception on its way to the notebook, where it is raised as what it was.

It travels as results do, in a file of the run directory. In the notebook ``except ValueError`` is to catch it, and so
is ``except RankError``: it gets a class of its own that is both, as Ray does for the errors of its tasks.
"""

from __future__ import annotations

import builtins
import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from nbddp import _results
from nbddp._errors import RankError
from nbddp._paths import RunDir
from nbddp._pickling import Pickler

_ARGS: Any = BaseException.__dict__["args"]

_Error = TypeVar("_Error", bound=Exception)

_classes: weakref.WeakKeyDictionary[type, type[RankError]] = weakref.WeakKeyDictionary()

# IPython shows these in ways of its own, and would not show what happened in the rank.
_SHOWN_OTHERWISE = ("SyntaxError", "UsageError", "BaseExceptionGroup", "BdbQuit")


def write(error: BaseException, text: str, pickler: Callable[[], Pickler], rank: int, run_dir: RunDir) -> str | None:
    """Write a rank's exception; return the file, or None if it cannot be pickled.

    Not the exception as such: it would be made anew by a call of its type, with arguments that this may not take.

    Args:
        error: The exception.
        text: Its message.
        pickler: Makes what pickles it.
        rank: This rank.
        run_dir: The run's files.
    """
    name = {"kind": type(error), "text": text}
    # Not by way of the class, which may have an `args` of its own.
    args = _ARGS.__get__(error)
    content: dict[str, Any] = {"args": args, "values": args}
    state: Any = object.__getattribute__(error, "__dict__")
    with contextlib.suppress(Exception):
        # An OSError knows more than its arguments; and a class may have a way of its own to be pickled.
        reduced = error.__reduce__()
        if isinstance(reduced, tuple) and reduced[0] is type(error):
            content["values"], *more = reduced[1:]
            state = {**state, **(more[0] if more and isinstance(more[0], dict) else {})}
    # As much of it as there can be.
    for parts in ({**name, **content, "state": state}, {**name, **content}, name):
        with contextlib.suppress(Exception):
            snapshot = pickler().snapshot(parts)
            return run_dir.store(f"exception.{rank}", snapshot.nbytes, snapshot.write)
    return None


def as_itself(error: RankError, path: str, where: str, sent: Sequence[Any]) -> RankError:
    """Return a rank's failure as an exception of the type that the rank raised.

    Args:
        error: The failure.
        path: What `write` returned.
        where: Which rank it was, in words that follow the exception's traceback.
        sent: The objects that went to the ranks (`Snapshot.met`): the notebook's own exception classes among them.

    Returns:
        An object that is both; `error` itself if there can be none.
    """
    parts = _results.load_parts(path, ("kind", "text", "args", "values", "state"), None, sent)[0]
    kind = parts.get("kind")
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return error
    args = parts.get("args", (parts["text"],))
    content = parts["text"], parts.get("values", args), args, parts.get("state", {})
    with contextlib.suppress(Exception):
        error.original = _make(kind, *content)
    if _is_shown_otherwise(kind):
        return error
    with contextlib.suppress(Exception):  # a class that must not have subclasses, or is made in a way of its own
        made = _make(class_of(kind), *content)
        vars(made).update(_kind=kind, _made_of=content[:2])
        own_notes = list(getattr(made, "__notes__", ()))
        vars(made).update(vars(error), _headline=where)
        # Outside IPython, the interpreter prints them below the traceback.
        vars(made)["__notes__"] = [*own_notes, *made._details, where, *made._below]
        return made
    return error


def _is_shown_otherwise(kind: type) -> bool:
    return any(base.__name__ in _SHOWN_OTHERWISE for base in kind.__mro__)


def class_of(kind: type[Exception]) -> type[RankError]:
    """Return a class with the name of `kind` that is a subclass of `RankError` and of `kind`."""
    if (known := _classes.get(kind)) is not None:
        return known
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    both: type[RankError] = type(kind.__name__, (RankError, kind), {**names, "__reduce__": _reduce})
    _classes[kind] = both
    return both


def _make(
    kind: type[_Error], text: str, values: tuple[Any, ...], args: tuple[Any, ...], state: Mapping[str, Any]
) -> _Error:
    """Make an exception without a call of its type's ``__init__``, whose arguments nobody knows any more."""
    # Of the built-in type that says how objects of this one are laid out: the first may be another.
    base: Any = kind
    while vars(builtins).get(base.__name__) is not base:
        base = base.__base__
    made: Any = base.__new__(kind, *values)
    # What an OSError or a UnicodeDecodeError knows is not in its dictionary.
    base.__init__(made, *values)  # type: ignore[misc]
    # Past a `__setattr__` of the class's own, as a frozen dataclass has.
    _ARGS.__set__(made, args)
    for key, value in state.items():
        try:
            object.__setattr__(made, key, value)
        except (AttributeError, TypeError):
            vars(made)[key] = value
    try:
        str(made)
    except Exception:  # front ends ask for it without a thought
        if issubclass(kind, RankError):
            kind.__str__ = lambda _: text  # type: ignore[method-assign]
    return cast(_Error, made)


def _remake(kind: type[Exception], *content: Any) -> RankError:
    return _make(class_of(kind), *content)


def _reduce(self: Any) -> tuple[Any, ...]:
    return _remake, (self._kind, *self._made_of, self.args, vars(self))
