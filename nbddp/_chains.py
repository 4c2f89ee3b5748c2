"""Cells that ran on kept ranks, one after the other: what the last of them goes on with, the others have made.

A script has them all in its main block. What stood between them in the notebook stands above: that gives the same
only if it leaves alone what earlier ones of them have taken.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace

from nbddp import _cells
from nbddp._cells import Cell, Piece, Transform
from nbddp._effects import Effects, Flow
from nbddp._errors import ExportError
from nbddp._names import Uses
from nbddp._option_line import HelpAsked, parse
from nbddp._options import OptionError, Options

_AUTO = re.compile(r"^%ddp +auto +(on|off)\b *([^\n]*)$", re.MULTILINE)

# What is said once for all cells on the same ranks, by the first.
_OF_THE_RANKS = ("gpus", "cpus", "gpu_ids", "backend", "init")


def options_of(cell: Cell) -> Options | None:
    """Return the options of a ``%%ddp`` cell that can have run; None for others."""
    try:
        return parse(cell.ddp[0]) if cell.ddp is not None else None
    except (OptionError, HelpAsked):
        return None


def sent(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of a file, with the options of those that ``%ddp auto on`` would send to the ranks."""
    line: str | None = None
    found = []
    for cell in cells:
        text = cell.source.lstrip()
        its_own = text.startswith(("%%", "?", "!")) or any(one.startswith("%ddp") for one in text.split("\n"))
        found.append(cell if line is None or its_own else replace(cell, options=line))
        for word, options in _AUTO.findall(cell.source):
            line = f"--keep {options} --auto".replace("  ", " ") if word == "on" else None
    return found


def before(cells: Sequence[Cell], chosen: int, above: Sequence[Piece]) -> list[int]:
    """Return the positions of the cells that made what the kept ranks of a cell held when it began.

    Args:
        cells: All cells.
        chosen: The position of the cell.
        above: The statements of the cells above that ran in the notebook.
    """
    stops = [piece.cell for piece in above if piece.magic.split()[:2] == ["%ddp", "stop"]]
    since = max(stops, default=-1)
    kept = [i for i in range(since + 1, chosen) if (one := options_of(cells[i])) is not None and one.keep]
    return [i for i in kept if not (one := options_of(cells[i])) or not one.dry_run]


def check(
    cells: Sequence[Cell], chosen: int, chain: Sequence[int], above: Sequence[Piece], transform: Transform
) -> list[Piece]:
    """Return the statements above, for a script with all cells of a chain in its main block.

    Raises:
        ExportError: It would not give what they gave, or nobody knows; the message says why, and what to do.
    """
    place = f"cell {cells[chosen].label}"
    again = "put what it needs into one cell, or run the cells anew after %ddp stop"
    for i in (*chain, chosen):
        options = options_of(cells[i])
        if options is not None and options.on is not None:
            raise ExportError(
                f"{place} goes on in kept ranks, and cell {cells[i].label} ran --on some of them; {again}"
            )
    for i in chain:
        if cells[i].stopped is not None:
            raise ExportError(
                f"{place} goes on in kept ranks with what cell {cells[i].label} has left there, which failed; {again}"
            )
    found: list[Piece] = []
    flow = Flow()
    taken: dict[str, str] = {}
    returned: set[str] = set()
    todo = list(chain)
    for piece in above:
        while todo and todo[0] <= piece.cell:
            taken = {**_taken(cells[todo[0]], flow, transform), **taken}
            todo.pop(0)
        if piece.magic.split()[:2] == ["%ddp", "push"] and chain and piece.cell > chain[0]:
            raise ExportError(f"{place} goes on in kept ranks that {piece.magic} has given something; {again}")
        effects = flow.follow(piece, transform)
        if piece.cell in chain or piece.magic.startswith("%ddp pull"):
            # The cells themselves have sent it back. They begin without.
            returned |= piece.binds & taken.keys()
            found.append(replace(piece, binds=piece.binds - taken.keys()))
            continue
        found.append(piece)
        changed = frozenset(name for name in _touched(effects) & taken.keys() if name not in flow.imports)
        if _touched(effects):
            changed |= effects.reads & returned
        if changed:
            name = min(changed)
            where = piece.place or f"cell {cells[piece.cell].label}"
            raise ExportError(
                f"{place} goes on in kept ranks: {taken[name]} has taken {name} there, which "
                f"{where} {'changes' if name in _touched(effects) else 'uses'} in the notebook since; {again}"
            )
    return found


def _touched(effects: Effects) -> frozenset[str]:
    """Return the names that a statement binds or changes."""
    return frozenset(n for n in effects.binds | effects.may_bind | effects.changes if n.isidentifier())


def _taken(cell: Cell, flow: Flow, transform: Transform) -> dict[str, str]:
    """Return the names that a cell has taken from the notebook."""
    try:
        uses = Uses([piece.node for piece in body(cell, transform) if piece.text], transform)
    except SyntaxError:
        return {}
    return dict.fromkeys({*uses.taken, *flow.behind(uses.taken)}, f"cell {cell.label}")


def body(cell: Cell, transform: Transform, *, later: bool = False) -> list[Piece]:
    """Return the statements of a ``%%ddp`` cell.

    Args:
        cell: The cell.
        transform: IPython's transformation of a cell into Python.
        later: Whether others stand above it.

    Raises:
        SyntaxError: It is no Python.
    """
    assert cell.ddp is not None
    found = [replace(piece, place=f"cell {cell.label}") for piece in _cells.python(cell.ddp[1], transform)]
    if later and found:
        found[0] = replace(found[0], gap=f"\n{found[0].gap}")
    return found


def joined(options: Options, first: Options) -> Options:
    """Return the options of a cell on ranks that another one has started."""
    own = {name: getattr(first, name) for name in _OF_THE_RANKS}
    return replace(options, **own, env={**first.env, **options.env})


def pulled(magic: str) -> frozenset[str]:
    """Return the names that ``%ddp pull`` binds."""
    words = shlex.split(magic)[2:]
    names = words[: words.index("--rank")] if "--rank" in words else words
    return frozenset(name for word in names for name in word.split(",") if name.isidentifier())
