"""What can still be had of a snapshot of which a part cannot be loaded: the names that do not hold that part.

The C unpickler stops at the first exception. This one, Python's own, goes on: what failed is replaced by a mark, and
afterwards each name is searched for marks. Slow, and what loads is built a second time; so only after a failure.
"""

from __future__ import annotations

import builtins
import gc
import io
import pickle
import types
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from nbddp._pickling import Target, goes_by_name, load
from nbddp._snapshot import map_file, parts


class _Broken:
    """The mark: stands where an object could not be made."""


def salvage(path: str, target: Target) -> dict[str, str]:
    """Load into `target` the names of a snapshot that can be loaded.

    Args:
        path: The snapshot.
        target: Receives the names that are whole.

    Returns:
        For each other name, why it is not.
    """
    errors: dict[str, str] = {}
    broken: list[Any] = []

    def failed(error: Exception) -> None:
        errors.setdefault(target.reading or "", f"{type(error).__name__}: {error}")

    def unpickle(data: memoryview) -> None:
        stream, buffers = parts(data)
        _Unpickler(bytes(stream), buffers, broken, failed).load()

    load(map_file(path), target, unpickle)
    marks = {id(obj) for obj in broken}
    for name in list(target.namespace):
        if _reaches(target.namespace[name], marks):
            del target.namespace[name]
            errors.setdefault(name, "it holds what could not be loaded of another name")
    return {name: error for name, error in errors.items() if name not in target.namespace}


_Base: Any = pickle._Unpickler  # undocumented; in every CPython


class _Unpickler(_Base):  # type: ignore[misc]
    """Goes on after an exception, with a mark on the stack in place of what could not be made.

    Args:
        stream: The pickle.
        buffers: Its out-of-band buffers.
        broken: Receives the marks and the objects that are only half made.
        failed: Called with each exception.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Base.dispatch)

    def __init__(
        self, stream: bytes, buffers: Iterable[Any], broken: list[Any], failed: Callable[[Exception], None]
    ) -> None:
        super().__init__(io.BytesIO(stream), buffers=buffers)
        self._broken = broken
        self._failed = failed
        self._setting: tuple[_Broken, Any] | None = None

    def mark(self, error: Exception) -> _Broken:
        """Return a new mark."""
        self._failed(error)
        mark = _Broken()
        self._broken.append(mark)
        return mark

    def make(self, code: int, count: int) -> None:
        """Run an opcode that puts a new object in the place of the last `count` on the stack."""
        height = len(self.stack)
        taken = self.stack[height - count :]
        try:
            _Base.dispatch[code](self)
        except Exception as error:
            mark = self.mark(error)
            self.stack[height - count :] = [mark]
            # A function that sets an object's state has the object as its first argument, and its result is dropped.
            if code == pickle.REDUCE[0] and isinstance(taken[1], tuple) and taken[1]:
                self._setting = mark, taken[1][0]

    def change(self, code: int) -> None:
        """Run an opcode that changes the object under its arguments."""
        try:
            _Base.dispatch[code](self)
        except Exception as error:
            self._failed(error)
            self._broken.append(self.stack[-1])

    def drop(self) -> None:
        """Run the opcode that drops the top of the stack."""
        if self._setting is not None and self.stack and self.stack[-1] is self._setting[0]:
            self._broken.append(self._setting[1])
        _Base.dispatch[pickle.POP[0]](self)


def _making(code: int, count: int) -> Callable[[_Unpickler], None]:
    return lambda unpickler: unpickler.make(code, count)


def _changing(code: int) -> Callable[[_Unpickler], None]:
    return lambda unpickler: unpickler.change(code)


_Unpickler.dispatch |= {
    # How many entries of the stack the new object takes the place of.
    **{
        code[0]: _making(code[0], count)
        for code, count in (
            (pickle.REDUCE, 2),
            (pickle.NEWOBJ, 2),
            (pickle.NEWOBJ_EX, 3),
            (pickle.STACK_GLOBAL, 2),
            (pickle.GLOBAL, 0),
        )
    },
    **{
        code[0]: _changing(code[0])
        for code in (pickle.BUILD, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS)
    },
    pickle.POP[0]: _Unpickler.drop,
}


def _reaches(obj: Any, marks: set[int]) -> bool:
    """Tell whether one of `marks`, as ids, is part of `obj`."""
    seen: set[int] = set()
    todo = [obj]
    while todo:
        part = todo.pop()
        if id(part) in marks:
            return True
        if id(part) in seen or isinstance(part, types.ModuleType) or part is vars(builtins) or goes_by_name(part):
            continue
        seen.add(id(part))
        todo += gc.get_referents(part)
    return False
