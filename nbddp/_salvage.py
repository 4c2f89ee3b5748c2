"""What can still be had of a snapshot of which a part cannot be loaded: the names that do not depend on that part.

The C unpickler stops at the first exception. This one, Python's own, goes on: a mark takes the place of what could not
be made. It also notes, as it goes, which object was made from which others, so that afterwards it is known which names
have a mark in them or anything that was computed from one. (The objects themselves do not tell: not every type lets
what it refers to be listed.) Slow, and what loads is built a second time; so only after a failure.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from nbddp._pickling import Store, Target, load
from nbddp._snapshot import map_file, parts


def salvage(path: str, target: Target) -> dict[str, str]:
    """Load into `target` the names of a snapshot that can be loaded.

    Args:
        path: The snapshot.
        target: Receives the names that are whole.

    Returns:
        For each other name, why it is not.
    """
    errors: dict[str, str] = {}

    def failed(error: Exception) -> None:
        errors.setdefault(target.reading or "", f"{type(error).__name__}: {error}")

    unpicklers = []

    def unpickle(data: memoryview) -> None:
        stream, buffers = parts(data)
        unpicklers.append(_Unpickler(bytes(stream), buffers, failed))
        unpicklers[0].load()

    load(map_file(path), target, unpickle)
    for name, made in unpicklers[0].names.items():
        if made.depends_on_broken():
            errors.setdefault(name, "it depends on what could not be loaded of another name")
    for name in errors:
        target.namespace.pop(name, None)
    return errors


class _Mark:
    """Stands where an object could not be made."""


class _Made:
    """An object of the stream: whether making it failed, and what it was made from."""

    __slots__ = ("broken", "parts")

    def __init__(self, parts: Iterable[_Made] = (), *, broken: bool = False) -> None:
        self.parts = [part for part in parts if part is not _SIMPLE]
        self.broken = broken

    def add(self, parts: Iterable[_Made]) -> None:
        self.parts += [part for part in parts if part is not _SIMPLE]

    def depends_on_broken(self) -> bool:
        seen: set[int] = set()
        todo = [self]
        while todo:
            made = todo.pop()
            if made.broken:
                return True
            if id(made) not in seen:
                seen.add(id(made))
                todo += made.parts
        return False


# Numbers, strings and other things that cannot fail.
_SIMPLE: _Made = _Made()

# Undocumented, both; in every CPython.
_STOP: Any = pickle._Stop  # type: ignore[attr-defined]
_Base: Any = pickle._Unpickler

# Opcodes by what they do to the stack.
_CHANGING = {pickle.BUILD, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS}
_FETCHING = {pickle.GET, pickle.BINGET, pickle.LONG_BINGET}
_KEEPING = {pickle.MEMOIZE, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT}
_DROPPING = {pickle.POP, pickle.POP_MARK}
# What they make can fail or be changed later.
_OWN = {
    *(pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST, pickle.GLOBAL, pickle.STACK_GLOBAL),
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.LIST, pickle.DICT, pickle.FROZENSET),
}
_LEAVING = {pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.READONLY_BUFFER, pickle.MARK}


class _Unpickler(_Base):  # type: ignore[misc]
    """Goes on after an exception, and notes what depends on what.

    Args:
        stream: The pickle.
        buffers: Its out-of-band buffers.
        failed: Called with each exception.

    Attributes:
        names: How the value of each name was made.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}

    def __init__(self, stream: bytes, buffers: Iterable[Any], failed: Callable[[Exception], None]) -> None:
        super().__init__(io.BytesIO(stream), buffers=buffers)
        self._failed = failed
        self.names: dict[str, _Made] = {}
        # In step with the stack: how each entry was made; below a mark, what lay there.
        self._made: list[_Made] = []
        self._below: list[list[_Made]] = []
        self._known: dict[int, _Made] = {}

    def step(self, code: bytes, run: Callable[[Any], None]) -> None:
        """Run an opcode."""
        height, depth = len(self.stack), len(self.metastack)
        broken = False
        if code in (pickle.SETITEM, pickle.SETITEMS):
            self._note_names(code)
        try:
            run(self)
        except _STOP:
            raise
        except Exception as error:
            self._failed(error)
            broken = True
            self._mend(code, height, depth)
        self._note(code, depth, broken)

    def _mend(self, code: bytes, height: int, depth: int) -> None:
        """Leave the stack as if the opcode had made something."""
        if code in _CHANGING:
            return
        if len(self.metastack) == depth:
            taken = {pickle.REDUCE: 2, pickle.NEWOBJ: 2, pickle.STACK_GLOBAL: 2, pickle.NEWOBJ_EX: 3}.get(code, 0)
            del self.stack[height - taken :]
        self.append(_Mark())

    def _note(self, code: bytes, depth: int, broken: bool) -> None:
        taken: list[_Made] = []
        if len(self.metastack) > depth:
            self._below.append(self._made)
            self._made = []
        elif len(self.metastack) < depth:
            taken, self._made = self._made, self._below.pop()
        height = len(self.stack)
        if code in _LEAVING:
            return
        if code in _KEEPING:
            self._known[id(self.stack[-1])] = self._made[-1]
        elif code in _FETCHING:
            self._made.append(self._known.get(id(self.stack[-1]), _SIMPLE))
        elif code in _DROPPING or code in _CHANGING:
            taken += self._made[height:]
            del self._made[height:]
            if height == 0:
                return
            # What a dropped call was given was for what lies below: it has set an object's state.
            if self._made[-1] is _SIMPLE:
                self._made[-1] = _Made()
            self._made[-1].add(taken)
            self._made[-1].broken |= broken
        else:
            taken += self._made[height - 1 :]
            del self._made[height - 1 :]
            simple = not broken and code not in _OWN and all(made is _SIMPLE for made in taken)
            self._made.append(_SIMPLE if simple else _Made(taken, broken=broken))

    def _note_names(self, code: bytes) -> None:
        """Take note of the names that are about to be stored."""
        entries = 2 if code == pickle.SETITEM else len(self.stack)
        below = self.stack[:-2] if code == pickle.SETITEM else self.metastack[-1]
        if entries and isinstance(below[-1], Store):
            keys, values = self.stack[-entries::2], self._made[-entries + 1 :: 2]
            self.names |= {key: made for key, made in zip(keys, values, strict=True) if isinstance(key, str)}


def _stepping(code: bytes, run: Callable[[Any], None]) -> Callable[[_Unpickler], None]:
    return lambda unpickler: unpickler.step(code, run)


_Unpickler.dispatch.update({code: _stepping(bytes([code]), run) for code, run in _Base.dispatch.items()})
