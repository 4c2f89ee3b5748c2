"""Which statements of a notebook a cell needs, read backwards from the cell.

A statement belongs if something that is needed behind it is bound or changed by it; what it reads is then needed before
it. Of definitions of one name the last one counts, unless something in between has read an earlier one. Names that
only the notebook's kernel has values for end the search, and are returned as state.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from nbddp._cells import Piece, Transform
from nbddp._effects import Effects, Flow
from nbddp._idioms import SEEDS
from nbddp._names import MODULES_OWN

_PYTHONS = frozenset(dir(builtins)) | MODULES_OWN


@dataclass(frozen=True)
class State:
    """A name whose value only the notebook has.

    Attributes:
        name: The name.
        why: Why no statement makes it.
        position: The position among all statements from which on it is there; -1 if nobody knows.
    """

    name: str
    why: str
    position: int = -1


@dataclass
class Needed:
    """What a cell needs.

    Attributes:
        pieces: The statements, with their positions among all, in order; imports cut down to what is used.
        state: Names whose values only the notebook has.
        unknown: Names that no statement binds, nor Python; maybe nobody ever uses them.
        effects: What each of `pieces` does, by position.
        flow: What is known of all names behind the last statement.
        stars: Whether a ``from x import *`` is among them.
    """

    pieces: list[tuple[int, Piece]]
    state: list[State]
    unknown: set[str]
    effects: dict[int, Effects]
    flow: Flow
    stars: bool = False


@dataclass(frozen=True)
class _Read:
    """A statement, what it does, and the names that hold state before it."""

    piece: Piece
    effects: Effects
    holding: frozenset[str]


@dataclass
class _Search:
    """The way back.

    Attributes:
        needed: What is needed behind the statement that is looked at next.
        alive: Tells whether the notebook's kernel has a value for a name.
        kept: The statements that belong, by position.
        state: The names that are found to be state.
        added: Names that imports add to.
        settings: The settings that are among them: of several that are the same the last is enough.
    """

    needed: set[str]
    alive: Callable[[str], bool]
    kept: dict[int, Piece] = field(default_factory=dict)
    state: dict[str, State] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    settings: set[str] = field(default_factory=set)

    def step(self, position: int, read: _Read, given: frozenset[str]) -> None:
        """Look at the statement before those that have been looked at."""
        piece, effects = read.piece, read.effects
        if piece.state:
            for name in self.needed & _made_by(effects):
                if name.isidentifier():
                    self.state[name] = State(name, piece.state, position)
                    self.needed.discard(name)
            return
        if not piece.text:
            return
        bound = effects.binds | effects.may_bind
        # The value that the kernel has of a name holds all that was done to it.
        changed = effects.changes - {name for name in read.holding if self.alive(name)}
        setting = effects.setting and self._is_new(piece.node)
        if not (self.needed & (bound | changed) or setting or _is_star(piece.node)):
            return
        if isinstance(piece.node, ast.Import | ast.ImportFrom):
            piece = _cut(piece, piece.node, self.needed)
            self.added |= effects.changes
        if effects.setting:
            self.settings.add(ast.dump(piece.node))
        self.kept[position] = piece
        self.needed -= effects.binds
        self.needed |= effects.reads - given

    def _is_new(self, node: ast.stmt) -> bool:
        return ast.dump(node) not in self.settings


def _made_by(effects: Effects) -> frozenset[str]:
    """Return the names whose values a statement leaves that no script can run again."""
    return effects.binds | effects.may_bind | effects.changes


def _cut(piece: Piece, node: ast.Import | ast.ImportFrom, needed: Collection[str]) -> Piece:
    """Return an import without the names that nobody uses."""
    used = [a for a in node.names if a.name == "*" or (a.asname or a.name.partition(".")[0]) in needed]
    if not used or len(used) == len(node.names):
        return piece
    cut = ast.Import(used) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, used, node.level)
    ast.copy_location(cut, node)
    return replace(piece, node=cut, text=ast.unparse(cut))


def find(
    pieces: Sequence[Piece],
    names: Collection[str],
    transform: Transform,
    *,
    given: Collection[str] = (),
    alive: Callable[[str], bool] = lambda _: False,
) -> Needed:
    """Return what a cell needs.

    Args:
        pieces: The statements that ran before it, in order.
        names: The names that the cell takes.
        transform: IPython's transformation of a cell into Python.
        given: Names that need no definition.
        alive: Tells whether the notebook's kernel has a value for a name. What has changed such a value is then part
            of it.
    """
    flow = Flow()
    read: list[_Read] = []
    holding: frozenset[str] = frozenset()
    for typed in pieces:
        piece = typed
        own = {name for name, module in flow.imports.items() if module.partition(".")[0] == "nbddp"}
        effects = flow.follow(piece, transform)
        if effects.reads & own and not piece.state:
            piece = replace(piece, state="made by nbddp itself")
            # What it calls works on copies.
            effects = replace(effects, changes=frozenset())
        read.append(_Read(piece, effects, holding))
        holding = holding | _made_by(effects) if piece.state else holding - effects.binds
    search = _Search({*names, *flow.behind(names), *SEEDS.values()} - set(given), alive)
    for position in range(len(read) - 1, -1, -1):
        search.step(position, read[position], frozenset(given))
    kept = sorted(search.kept.items())
    return Needed(
        kept,
        sorted(search.state.values(), key=lambda one: one.position),
        {name for name in search.needed if name.isidentifier()} - _PYTHONS - search.added,
        {i: read[i].effects for i, _ in kept},
        flow,
        any(_is_star(piece.node) for _, piece in kept),
    )


def _is_star(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
