"""The cell's closure: the notebook's names that it uses, as a snapshot for the ranks, or a refusal that helps.

A refusal costs nothing but its message: nothing has been launched and the notebook's namespace is as it was. It says
which part of which variable cannot go, where the cell uses it, and what to do.
"""

from __future__ import annotations

import collections
import functools
import pickle
import sys
import time
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbddp import _torch_objects
from nbddp._errors import CaptureError
from nbddp._names import globals_of
from nbddp._paths import format_size
from nbddp._pickling import Pickler, goes_by_name
from nbddp._reducers import CannotSend
from nbddp._snapshot import Snapshot

# Looking for the culprit pickles part after part; a huge object must not turn a refusal into a wait.
_SEARCH_SECONDS = 3.0


@dataclass(frozen=True)
class Captured:
    """One captured name, as ``--dry-run`` lists it."""

    name: str
    kind: str
    nbytes: int


def capture(
    names: Mapping[str, Any],
    namespace: dict[str, Any],
    lines: Mapping[str, Sequence[int]],
    place: str = "the cell",
    *,
    known: Sequence[Any] = (),
    held: Collection[str] = (),
) -> Snapshot:
    """Return a snapshot of `names`.

    Args:
        names: What the cell uses of the notebook.
        namespace: The notebook's whole namespace.
        lines: For each name, the lines of the cell that use it.
        place: What the ranks run, for messages.
        known: Classes and functions that the ranks have got before, and get as references.
        held: Names that the ranks have, and of which functions need bring no value.

    Raises:
        CaptureError: A value cannot be pickled; names the part at fault.
    """
    try:
        return Pickler(namespace, dict(enumerate(known)), held).snapshot(names)
    except Exception as error:
        for name, value in names.items():
            culprit = _failure(value, namespace)
            if culprit is not None:
                raise _refusal(name, value, namespace, lines.get(name, ()), culprit, place) from error
        raise CaptureError(f"cannot send what {place} uses to the ranks: {_reason(error)}") from error


def explain_results(names: Mapping[str, Any], namespace: dict[str, Any]) -> dict[str, str]:
    """Return, for each result of a cell that cannot be pickled, why, naming the part at fault."""
    reasons = {}
    for name, value in names.items():
        error = _failure(value, namespace)
        if error is not None:
            path, _, culprit, reason = _culprit(name, value, namespace, error)
            reasons[name] = f"cannot bring back '{path}' ({_type_of(culprit)}): {_reason(reason)}"
    return reasons


def explain(
    names: Mapping[str, Any],
    namespace: dict[str, Any],
    lines: Mapping[str, Sequence[int]],
    snapshot: Snapshot | None = None,
    held: Collection[str] = (),
) -> list[str]:
    """Return lines on what goes to the ranks: types, sizes, where it is used, what goes by value and by reference.

    Args:
        names: The names and their values.
        namespace: The notebook's whole namespace.
        lines: For each name, the lines of the cell that use it.
        snapshot: The snapshot of `names`, if there is one already.
        held: Names that the ranks have, and of which functions bring no value.

    Raises:
        CaptureError: A value cannot be pickled.
    """
    if not names:
        return ["the cell uses nothing of the notebook"]
    snapshot = snapshot or capture(names, namespace, lines)
    # Less than the sum, if some share memory, or are brought by others.
    text = [f"sent to each rank, {format_size(snapshot.nbytes)} in all:"]
    rows = [("name", "type", "size", "used on line")] if lines else []
    users = _brought({*names, *held}, namespace, snapshot.met)
    values = {**names, **{name: namespace[name] for name in users}}
    for item in describe(values, namespace):
        size = "by name" if goes_by_name(values[item.name]) else format_size(item.nbytes)
        where = f"by {users[item.name]}" if item.name in users else _listed(lines.get(item.name, ()))
        rows.append((item.name, item.kind, size, where))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    text += [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    definitions = dict.fromkeys(getattr(obj, "__qualname__", str(obj)) for obj in snapshot.met)
    if definitions:
        text.append(f"by value, since the notebook defines them: {', '.join(definitions)}")
    return text


def _brought(names: Collection[str], namespace: Mapping[str, Any], met: Sequence[Any]) -> dict[str, str]:
    """Return the notebook's other variables that what is sent by value uses, and for each the first that does."""
    users: dict[str, str] = {}
    for function in met:
        if not isinstance(function, types.FunctionType) or function.__globals__ is not namespace:
            continue
        for _, name, stores, _ in globals_of(function.__code__):
            value = namespace.get(name)
            definition = isinstance(value, types.FunctionType | type)  # they have a line of their own
            if not (stores or definition or name in names or name not in namespace or goes_by_name(value)):
                users.setdefault(name, function.__qualname__)
    return users


def size_line(names: Mapping[str, Any], snapshot: Snapshot) -> str:
    """Return a line that says how much goes to the ranks, and what most of it is."""
    largest = max(snapshot.sizes, key=snapshot.sizes.__getitem__)
    return (
        f"nbddp: {format_size(snapshot.nbytes)} go to the ranks; the largest is {largest} "
        f"({_kind(names[largest])}, {format_size(snapshot.sizes[largest])})"
    )


def describe(names: Mapping[str, Any], namespace: dict[str, Any]) -> list[Captured]:
    """Return each name with its type and its size when pickled on its own."""
    return [Captured(name, _kind(value), capture({name: value}, namespace, {}).nbytes) for name, value in names.items()]


def _kind(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    kind = type(value)
    text = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{text} {tuple(shape)} {getattr(value, 'dtype', '')}".rstrip()
    if isinstance(value, type):
        return f"class {value.__qualname__}"
    return text


def _failure(value: Any, namespace: dict[str, Any]) -> Exception | None:
    try:
        Pickler(namespace).snapshot({"value": value})
    except Exception as error:
        return error
    return None


def _refusal(
    name: str, value: Any, namespace: dict[str, Any], lines: Sequence[int], error: Exception, place: str
) -> CaptureError:
    """Return the error for a name whose value cannot be pickled."""
    path, user, culprit, error = _culprit(name, value, namespace, error)
    where = f", used on {_listed(lines, 'line')} of {place}," if lines and not user else ""
    if user:
        where = f", which {user} uses,"
    return CaptureError(
        f"cannot send '{path}' ({_type_of(culprit)}){where} to the ranks: {_reason(error)}. {_advice(error, place)}",
        name=name,
        path=path,
        lines=tuple(lines),
    )


def _culprit(name: str, value: Any, namespace: dict[str, Any], error: Exception) -> tuple[str, str, Any, Exception]:
    """Search what `value` consists of for the smallest part that cannot be pickled.

    Returns:
        The path to it; the function that uses it, if it is a global variable of one; it; and its own error.
    """
    path, user, culprit = name, "", value
    seen = {id(value)}
    deadline = time.monotonic() + _SEARCH_SECONDS
    found = True
    # What is refused as a whole is at fault itself, whatever it consists of.
    while found and not (isinstance(error, CannotSend) and error.obj is culprit) and time.monotonic() < deadline:
        found = False
        for step, child in _parts(culprit):
            if id(child) in seen:
                continue
            seen.add(id(child))
            inner = _failure(child, namespace)
            if inner is not None:
                if step.startswith("global "):
                    path, user = step.removeprefix("global "), path
                else:
                    path += step
                culprit, error, found = child, inner, True
                break
    return path, user, culprit, error


def _type_of(obj: Any) -> str:
    kind = type(obj)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.").removeprefix("__main__.")


def _listed(lines: Sequence[int], what: str = "") -> str:
    if what:
        return f"{what}{'s' if len(lines) > 1 else ''} {_listed(lines)}"
    return ", ".join(str(line) for line in lines[:3]) + (" and others" if len(lines) > 3 else "")


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory to pickle it"
    if isinstance(error, RecursionError | pickle.PicklingError) and "recursion" in str(error):
        return f"it is nested too deeply, or without end (the limit is {sys.getrecursionlimit()})"
    text = str(error).strip().splitlines()
    kind = type(error).__name__
    if not text:
        return f"pickling it raised {kind}"
    # "cannot pickle 'X' object" needs no exception's name beside it.
    return text[0] if kind in ("TypeError", "PicklingError", "CannotSend") else f"{kind}: {text[0]}"


def _advice(error: Exception, place: str) -> str:
    return (error.advice if isinstance(error, CannotSend) else "Make it inside {place}").format(place=place)


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """Yield (how it is reached from `obj`, part) for what pickling `obj` pickles."""
    match obj:
        case types.FunctionType():
            yield from _parts_of_function(obj)
        case types.MethodType():
            yield ".__self__", obj.__self__
            yield ".__func__", obj.__func__
        case functools.partial():
            yield ".func", obj.func
            yield from ((f".args[{i}]", arg) for i, arg in enumerate(obj.args))
            yield from ((f".keywords[{key!r}]", arg) for key, arg in obj.keywords.items())
        case type():
            yield from ((f".{name}", member) for name, member in vars(obj).items() if name not in _CLASS_OWN)
        case classmethod() | staticmethod():
            yield ".__func__", obj.__func__
        case property():
            yield from ((f".{n}", f) for n in ("fget", "fset", "fdel") if (f := getattr(obj, n)) is not None)
        case dict():
            yield from ((f"[{key!r}]", part) for key, part in list(obj.items()))
            yield from _attributes(obj)
        case list() | tuple() | collections.deque():
            yield from ((f"[{i}]", part) for i, part in enumerate(obj))
            yield from _attributes(obj)
        case set() | frozenset():
            yield from ((f"{{{part!r:.40}}}", part) for part in obj)
        case _:
            yield from _attributes(obj)


_CLASS_OWN = frozenset({"__dict__", "__weakref__", "__module__", "__doc__", "_abc_impl"})


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".<closure>.{name}", cell.cell_contents
        except ValueError:  # not bound yet
            continue
    yield from ((f".__defaults__[{i}]", value) for i, value in enumerate(function.__defaults__ or ()))
    yield from ((f".__kwdefaults__[{k!r}]", value) for k, value in (function.__kwdefaults__ or {}).items())
    yield from _attributes(function)
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            yield f"global {name}", function.__globals__[name]


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _attributes(obj: Any) -> Iterator[tuple[str, Any]]:
    state = None
    try:
        state = _torch_objects.state_of(obj)
        if state is None:
            state = obj.__getstate__() if hasattr(obj, "__getstate__") else vars(obj)
    except Exception:  # its own trouble: then it is itself the culprit
        return
    if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
        state = {**(state[0] or {}), **(state[1] or {})} if isinstance(state[1], dict) else None
    if not isinstance(state, dict):
        state = getattr(obj, "__dict__", {})
    for name, part in list(state.items()):
        # nn.Module keeps its parts in three dictionaries; a person knows them as attributes.
        if name in ("_modules", "_parameters", "_buffers") and isinstance(part, dict):
            yield from ((f".{key}", value) for key, value in part.items())
        else:
            yield f".{name}", part
