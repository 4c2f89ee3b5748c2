"""How the variables go that functions share: those of the function that made them, which Python keeps in cells.

cloudpickle gives each function cells of its own, with the same contents; ``nonlocal`` in one of them is then not seen
by the others. Here a cell goes once.
"""

from __future__ import annotations

import types
from typing import Any

import cloudpickle

from nbddp._reducers import identity


class Variables:
    """The cells that one pickler has met."""

    def __init__(self) -> None:
        self._cells: dict[int, _Cell] = {}

    def shared_by(self, function: types.FunctionType, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return cloudpickle's reduction of a function, changed so that the function shares its cells with others."""
        make, (code, space, name, defaults, _), (state, slots), *others, _ = reduced
        closure = function.__closure__ or ()
        cells = tuple(map(self._one, closure))
        # The cells are made before the function and filled after it: it may be in one of them.
        filled = cells, tuple(map(_content, closure)), (state, {**slots, "__closure__": None})
        return make, (code, space, name, defaults, cells), filled, *others, _set_function_state

    def reduce(self, cell: types.CellType) -> Any:
        """Reduce a cell that is no function's, or was met before its functions."""
        # In a tuple: pickle would take None for no state.
        return identity, (self._one(cell),), (_content(cell),), None, None, _fill_alone

    def _one(self, cell: types.CellType) -> _Cell:
        """Return one and the same object for one and the same cell, so that the pickler's memo knows it again."""
        return self._cells.setdefault(id(cell), _Cell(cell))


class _Cell:
    """Stands for a cell without its content."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell  # alive, or its id might become another's

    def __reduce__(self) -> tuple[Any, ...]:
        return types.CellType, ()


class _Unbound:
    """The content of an empty cell. Goes by name."""


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return _Unbound


def _fill(cell: types.CellType, content: Any) -> None:
    if content is not _Unbound:
        cell.cell_contents = content


def _fill_alone(cell: types.CellType, state: tuple[Any]) -> None:
    _fill(cell, *state)


def _set_function_state(function: types.FunctionType, state: tuple[Any, ...]) -> None:
    cells, contents, rest = state
    for cell, content in zip(cells, contents, strict=True):
        _fill(cell, content)
    cloudpickle.cloudpickle._function_setstate(function, rest)
