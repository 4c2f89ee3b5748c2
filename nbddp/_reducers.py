"""How types of Python's own go that pickle does not know, or takes for names, or must not copy.

Each reducer returns what ``__reduce__`` would, or NotImplemented to leave an object to cloudpickle, or raises
`CannotSend`. What builds the objects again stands beside it. Large memory goes as `pickle.PickleBuffer`, which the
pickler keeps out of its stream.
"""

from __future__ import annotations

import functools
import io
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

Reducer = Callable[[Any], Any]

# What objects are rebuilt for; see `nbddp._pickling.load`. The functions named in a pickle stream take no context.
loading = threading.local()


class CannotSend(TypeError):  # noqa: N818  # said to the pickler, which passes it on
    """An object cannot go to another process.

    Attributes:
        obj: The object.
        advice: What to do instead, with ``{place}`` for what the ranks run.
    """

    def __init__(self, obj: Any, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.obj = obj
        self.advice = advice


# Files, generators and other things that stay with their process.


def refuser(reason: str, advice: str) -> Reducer:
    """Return a reducer that refuses whatever it gets."""

    def refuse(obj: Any) -> Any:
        raise CannotSend(obj, reason, advice)

    return refuse


_OPEN_FILE = refuser("an open file stays with its process", "Open it inside {place}")
_GENERATOR = refuser("what a generator has yet to do cannot be copied", "Make it inside {place}, or send a list")


def _reduce_text_file(file: Any) -> Any:
    for name in ("stdin", "stdout", "stderr"):
        if file is getattr(sys, name):
            return getattr, (sys, name)
    # What else stands for a stream: a notebook's own, or a StringIO under redirect_stdout.
    return _OPEN_FILE(file) if isinstance(file, io.TextIOWrapper) else NotImplemented


def _reduce_cached_property(cached: Any) -> Any:
    # Before Python 3.12 it holds a lock.
    return _make_cached_property, (cached.func, cached.attrname)


def _make_cached_property(function: Callable[..., Any], name: str | None) -> Any:
    cached = functools.cached_property(function)
    cached.attrname = name
    return cached


def _reduce_weak_reference(reference: Any) -> Any:
    if reference.__callback__ is not None:
        raise CannotSend(reference, "what a weak reference calls is this process's", "Make it inside {place}")
    return _make_weak, (weakref.ref, reference())


class _Gone:
    """What a dead weak reference points to, for a moment."""


def _make_weak(kind: Callable[[Any], Any], content: Any) -> Any:
    if content is None:
        return weakref.ref(_Gone())
    # Nothing else need have come along that holds it.
    loading.target.held.append(content)
    return kind(content)


def plain() -> dict[type, Reducer]:
    """Return the reducers for types of Python's own."""
    return {
        functools.cached_property: _reduce_cached_property,
        # By themselves these are refused for the references that they are made of.
        weakref.ref: _reduce_weak_reference,
        weakref.WeakKeyDictionary: lambda weak: (_make_weak, (weakref.WeakKeyDictionary, dict(weak))),
        weakref.WeakValueDictionary: lambda weak: (_make_weak, (weakref.WeakValueDictionary, dict(weak))),
        weakref.WeakSet: lambda weak: (_make_weak, (weakref.WeakSet, list(weak))),
        types.MappingProxyType: lambda proxy: (types.MappingProxyType, (dict(proxy),)),
        type(sys.stdout): _reduce_text_file,
        io.TextIOWrapper: _reduce_text_file,
        io.BufferedReader: _OPEN_FILE,
        io.BufferedWriter: _OPEN_FILE,
        io.BufferedRandom: _OPEN_FILE,
        io.FileIO: _OPEN_FILE,
        types.GeneratorType: _GENERATOR,
        types.AsyncGeneratorType: _GENERATOR,
        types.CoroutineType: refuser("a coroutine that was begun cannot be copied", "Call it inside {place}"),
    }


def identity(obj: Any) -> Any:
    """Return `obj`: what a reducer names whose object goes as another."""
    return obj


def families_of(*entries: tuple[str, str, Reducer]) -> list[tuple[type, Reducer]]:
    """Return reducers for types and all their subclasses, as far as their modules are imported."""
    found = []
    for module, name, reducer in entries:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type):
            found.append((kind, reducer))
    return found


def families() -> list[tuple[type, Reducer]]:
    """Return the reducers for types of Python's own and all their subclasses."""
    return families_of(
        ("threading", "Thread", refuser("a thread runs in its process", "Start it inside {place}")),
        ("multiprocessing.process", "BaseProcess", refuser("a process is its parent's", "Start it inside {place}")),
    )
