"""What a statement of a notebook reads, binds and changes, given all that ran before it.

The compiler says which names a statement reads and binds (`nbddp._names`). What it changes without binding it has to be
guessed from how Python is written: ``model.eval()`` changes the model, ``losses.append(x)`` the list,
``optimizer.step()`` the model behind the optimizer, ``print(model)`` nothing. Where a guess can be wrong it is meant to
be wrong on the safe side: a statement too many stands in a script where it can be seen, one too few changes a result in
silence.

What libraries keep for themselves has names here, too: `_idioms.SETTINGS` (environment variables, warning filters,
``torch.set_default_dtype``) and the state of each random number generator, which every draw changes.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nbddp import _idioms
from nbddp._calls import Calls
from nbddp._cells import Piece, Transform
from nbddp._names import MODULES_OWN, Uses, globals_of
from nbddp._objects import Class, Function, stored
from nbddp._reading import Done, Known

_COMPOUND = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.TryStar | ast.Match


@dataclass(frozen=True)
class Effects:
    """What a statement does.

    Attributes:
        reads: The names that it needs, those that the functions which it calls read included.
        binds: The names that it binds, so that what they were before does not matter any more.
        may_bind: The names that it binds perhaps, or in part.
        changes: The names whose values it changes.
        setting: Whether it sets something for the whole process.
        unseeded: Global generators that it draws from and that nothing has seeded.
        seeds: Global random number generators that it seeds.
    """

    reads: frozenset[str]
    binds: frozenset[str]
    may_bind: frozenset[str]
    changes: frozenset[str]
    setting: bool = False
    unseeded: frozenset[str] = frozenset()
    seeds: frozenset[str] = frozenset()


@dataclass
class Flow(Calls):
    """What is known of the notebook's names at a point of it, and how it goes on."""

    def follow(self, piece: Piece, transform: Transform) -> Effects:
        """Return what a statement does, and go on to behind it."""
        if not piece.text:
            bound = piece.binds | (stored(piece.node) if piece.magic else frozenset())
            self.forget(bound)
            return Effects(frozenset(), bound, bound, frozenset())
        uses = Uses([piece.node], transform)
        now, late = _reads(piece.node)
        deferred = frozenset(late) | self.behind(now & frozenset(uses.taken))
        definition = isinstance(piece.node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        reads = now & frozenset(uses.taken) if definition else frozenset(uses.taken)
        reads |= self.behind(reads)
        was_seeded = set(self.seeded)
        self._known = Known()
        done = Done()
        self._statement(piece.node, done)
        for name in uses.certain if definition else uses.bound:
            self.late[name] = (self.late.get(name, frozenset()) if name not in uses.certain else frozenset()) | deferred
        for name in done.changes & frozenset(self.late):
            self.late[name] |= deferred
        binds = set(uses.certain)
        changes = set(done.changes)
        drawn = done.draws
        reads |= done.reads
        linked = {generator for generator in drawn if generator in was_seeded and generator not in done.seeds}
        reads |= linked
        changes |= linked
        for generator in done.seeds:
            binds |= {generator, _idioms.SEEDS[generator]}
        if isinstance(piece.node, ast.Import):
            # `import a.b` adds to what `import a` has bound.
            added = {a.name.partition(".")[0] for a in piece.node.names if a.asname is None and "." in a.name}
            changes |= added
            binds -= added
        if isinstance(piece.node, ast.AugAssign) and isinstance(piece.node.target, ast.Name):
            binds.discard(piece.node.target.id)
            changes.add(piece.node.target.id)
        return Effects(
            reads=frozenset(reads),
            binds=frozenset(binds),
            may_bind=(frozenset(uses.certain) if definition else frozenset(uses.bound)) | piece.binds,
            changes=frozenset(changes),
            setting=_idioms.SETTINGS in changes,
            unseeded=frozenset(drawn - was_seeded - done.seeds),
            seeds=frozenset(done.seeds),
        )

    def behind(self, names: Iterable[str]) -> frozenset[str]:
        """Return the names that functions behind `names` read when they are called, and those behind these."""
        found: set[str] = set()
        todo = list(names)
        while todo:
            for name in self.late.get(todo.pop(), ()):
                if name not in found:
                    found.add(name)
                    todo.append(name)
        return frozenset(found)

    # Statements.

    def _statement(self, node: ast.stmt, done: Done) -> None:
        """Follow a statement, and those in it in the order in which they stand."""
        match node:
            case ast.Import() | ast.ImportFrom():
                self._import(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._calls(node, done)
                self._define(node)
            case ast.ClassDef():
                self._calls(node, done)
                self.forget({node.name})
                if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                    self.records.add(node.name)
                self.classes[node.name] = Class(node)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                self._calls(node, done)
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if node.value is not None:
                    for target in targets:
                        self._assign(target, node.value, done, again=isinstance(node, ast.AugAssign))
            case ast.Delete():
                for target in node.targets:
                    if not isinstance(target, ast.Name):
                        self._changed(target, done)
            case ast.Expr():
                self._calls(node, done, unused=node.value)
            case _ if isinstance(node, _COMPOUND):
                self._compound(node, done)
            case _:
                self._calls(node, done)

    def _define(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        held = self.held_by_function(node) if self.notebook is not None else frozenset()
        self.forget({node.name})
        self.functions[node.name] = (Function(node, nested=self.notebook is not None),)
        if held:
            self.holds[node.name] = held - {node.name}

    def _compound(self, node: ast.stmt, done: Done) -> None:
        for name, part in ast.iter_fields(node):
            match name, part:
                case (("test" | "iter" | "subject"), ast.expr()):
                    self._calls(part, done)
                case "items", list():
                    for item in part:
                        self._calls(item.context_expr, done)
                        self._special(item.context_expr, ("__enter__", "__exit__", "__aenter__", "__aexit__"), done)
                        if item.optional_vars is not None:
                            self._assign(item.optional_vars, item.context_expr, done)
        if isinstance(node, ast.For | ast.AsyncFor):
            self._iterate(node.iter, done)
        if isinstance(node, ast.If | ast.Match):
            ways = [case.body for case in node.cases] if isinstance(node, ast.Match) else [node.body, node.orelse]
            before = self.copy()
            after = []
            for way in ways:
                flow = before.copy()
                flow._block(way, done)
                after.append(flow)
            if isinstance(node, ast.If):
                vars(self).update(vars(after.pop()))
            self.join(after)
            return
        # What a round of a loop leaves behind, the next one finds.
        for _ in range(2 if isinstance(node, ast.For | ast.AsyncFor | ast.While) else 1):
            if isinstance(node, ast.For | ast.AsyncFor):
                self._assign(node.target, self._element(node.iter), done)
            for block in _blocks(node):
                before = self.copy()
                self._block(block, done)
                if isinstance(node, ast.Try | ast.TryStar):
                    self.join([before])

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            self.forget({name})
            if isinstance(node, ast.ImportFrom):
                self.imports[name] = f"{'.' * node.level}{node.module or ''}.{alias.name}"
            else:
                self.imports[name] = alias.name if alias.asname else name

    def _block(self, block: Iterable[ast.stmt], done: Done) -> None:
        for stmt in block:
            self._statement(stmt, done)


def _blocks(node: ast.stmt) -> Iterator[Sequence[ast.stmt]]:
    for name in ("body", "handlers", "cases", "orelse", "finalbody"):
        for part in getattr(node, name, ()):
            if isinstance(part, ast.stmt):
                yield [part]
            else:
                yield part.body


def _reads(node: ast.stmt) -> tuple[frozenset[str], frozenset[str]]:
    """Return the global names that a statement reads when it runs, and those that functions in it read when called."""
    code = compile(ast.Module([node], []), "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    now: set[str] = set()
    late: set[str] = set()
    lambdas = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    _collect(code, now, late, in_function=False, lambdas=lambdas)
    return frozenset(now) - MODULES_OWN, frozenset(late) - MODULES_OWN


def _collect(code: types.CodeType, now: set[str], late: set[str], *, in_function: bool, lambdas: bool) -> None:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    deep = {name for one in inner for _, name, stores, _ in globals_of(one, 1) if not stores}
    for depth, name, stores, _ in globals_of(code):
        if not stores and (depth == 0 or name not in deep):
            (late if in_function else now).add(name)
    for one in inner:
        runs_now = one.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>") or not one.co_flags & 0x02
        if one.co_name == "<lambda>" and lambdas:
            # Whoever gets it may call it now (map, apply) or keep it.
            _collect(one, now, late, in_function=in_function, lambdas=lambdas)
            _collect(one, now, late, in_function=True, lambdas=lambdas)
        else:
            _collect(one, now, late, in_function=in_function or not runs_now, lambdas=lambdas)
