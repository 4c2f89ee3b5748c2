"""What the names of a notebook stand for, as far as its text tells: which objects hold which, and what has made them.

Nothing here is about time: `nbddp._effects` follows the statements, and asks.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields

from nbddp import _idioms
from nbddp._cells import dotted, immediate

# What has made an object about which nothing is known.
UNKNOWN = frozenset({"?"})

# Before a name that a function's own variable of the same name hides.
HIDDEN = "^"


@dataclass(frozen=True, eq=False)
class Function:
    """A function of the notebook, or a lambda.

    Attributes:
        node: Its text.
        home: Where it finds what is neither its own nor the notebook's, if that is not where it is called.
        nested: Whether it stands in a function.
        owner: The class whose method it is.
        closed: Whether arguments have been given to it, or to what has made it, that a call does not show.
    """

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    home: Objects | None = None
    nested: bool = False
    owner: str = ""
    closed: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Its parameters that can be given by position, in order."""
        return tuple(a.arg for a in (*self.node.args.posonlyargs, *self.node.args.args))

    @property
    def all_parameters(self) -> tuple[str, ...]:
        """All its parameters."""
        arguments = self.node.args
        rest = [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
        return (*self.parameters, *(a.arg for a in arguments.kwonlyargs), *rest)

    def defaults(self) -> dict[str, ast.expr]:
        """Return what parameters are if a call does not give them."""
        arguments = self.node.args
        plain = [*arguments.posonlyargs, *arguments.args]
        found = {a.arg: value for a, value in zip(reversed(plain), reversed(arguments.defaults), strict=False)}
        pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        return found | {a.arg: value for a, value in pairs if value is not None}

    def bound(self, call: ast.Call, first: ast.expr | None = None) -> list[tuple[str, ast.expr]]:
        """Return (parameter, argument) for a call; ``*args`` may be any of them."""
        names, arguments = list(self.parameters), list(call.args)
        more = self.node.args.vararg.arg if self.node.args.vararg is not None else ""
        rest = self.node.args.kwarg.arg if self.node.args.kwarg is not None else ""
        found = []
        if first is not None and names:
            found.append((names.pop(0), first))
        while arguments:
            value = arguments.pop(0)
            if isinstance(value, ast.Starred):
                found += [(name, value) for name in (*names, more) if name]
                continue
            name = names.pop(0) if names else more
            if name:
                found.append((name, value))
        for keyword in call.keywords:
            if keyword.arg is None:
                found += [(name, keyword.value) for name in self.all_parameters]
            else:
                found.append((keyword.arg if keyword.arg in self.all_parameters else rest, keyword.value))
        return found


@dataclass(frozen=True, eq=False)
class Class:
    """A class of the notebook."""

    node: ast.ClassDef

    @property
    def methods(self) -> dict[str, Function]:
        """Its methods, those of its bases left out."""
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        return {part.name: Function(part, owner=self.node.name) for part in self.node.body if isinstance(part, kinds)}

    @property
    def bases(self) -> list[str]:
        """The names of its bases."""
        return [dotted(base) for base in self.node.bases]


@dataclass
class Objects:
    """What is known of the notebook's names at a point of it.

    Attributes:
        imports: What each imported name stands for, dotted.
        functions: The functions that a name may stand for.
        classes: The classes.
        holds: For each name, the names whose objects its own object may consist of.
        gradients: For each name, the models that it was computed by.
        late: For each name, the names that functions behind it read when they are called.
        made: For each name, and for each attribute as ``name.attribute``, what may have made its object: the dotted
            name of a library's function or class, or ``<Name>`` for a class of the notebook.
        constants: Names of numbers, strings and the like, which nothing can change.
        shown: Names of figures and the like, which leave what they are given as it is.
        records: Names of what consists of constants: a configuration, whose parts go anywhere and are changed nowhere.
        seeded: The global generators that have been seeded.
        local: The variables of the function that is read.
    """

    imports: dict[str, str] = field(default_factory=dict)
    functions: dict[str, tuple[Function, ...]] = field(default_factory=dict)
    classes: dict[str, Class] = field(default_factory=dict)
    holds: dict[str, frozenset[str]] = field(default_factory=dict)
    gradients: dict[str, frozenset[str]] = field(default_factory=dict)
    late: dict[str, frozenset[str]] = field(default_factory=dict)
    made: dict[str, frozenset[str]] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    shown: set[str] = field(default_factory=set)
    records: set[str] = field(default_factory=set)
    seeded: set[str] = field(default_factory=set)
    local: set[str] = field(default_factory=set)

    def forget(self, names: Iterable[str]) -> None:
        """Forget what names stood for."""
        for name in names:
            for table in (self.imports, self.functions, self.classes, self.holds, self.gradients, self.late):
                table.pop(name, None)
            for key in [key for key in self.made if key.partition(".")[0] == name]:
                del self.made[key]
            for names_of in (self.constants, self.shown, self.records):
                names_of.discard(name)

    def hide(self, names: Collection[str]) -> None:
        """Set names aside that variables of a function hide, with what is known of them."""

        def renamed(name: str) -> str:
            return HIDDEN + name if name.lstrip(HIDDEN) in names else name

        for table in (self.holds, self.gradients):
            inside = {renamed(name): frozenset(map(renamed, held)) for name, held in table.items()}
            table.clear()
            table.update(inside)
        self.forget(names)

    def join(self, others: Sequence[Objects]) -> None:
        """Go on as if any of several ways had been gone: this one, or one of the others."""
        ways = [self, *others]
        known = [{*way.holds, *way.imports, *way.functions, *way.classes} for way in ways]
        for claim in ("constants", "shown", "records"):
            # Of names that a way does not know it says nothing.
            claimed: set[str] = set().union(*(getattr(way, claim) for way in ways))
            setattr(
                self,
                claim,
                {
                    n
                    for n in claimed
                    if all(n in getattr(w, claim) or n not in k for w, k in zip(ways, known, strict=True))
                },
            )
        made: dict[str, frozenset[str]] = {}
        for name in set().union(*(way.made for way in ways)):
            knowing = [w for w, k in zip(ways, known, strict=True) if name in w.made or name in k]
            made[name] = frozenset().union(*(way.made.get(name, UNKNOWN) for way in knowing))
        self.made = made
        for name in ("holds", "gradients", "late"):
            tables = [getattr(way, name) for way in ways]
            joined = {key: frozenset().union(*(t.get(key, ()) for t in tables)) for key in set().union(*tables)}
            setattr(self, name, joined)
        functions: dict[str, tuple[Function, ...]] = {}
        for way in ways:
            for name, ones in way.functions.items():
                functions[name] = tuple(dict.fromkeys((*functions.get(name, ()), *ones)))
        self.functions = functions
        for way in others:
            self.imports = {**way.imports, **self.imports}
            self.classes = {**way.classes, **self.classes}
            self.seeded |= way.seeded

    def copied(self) -> dict[str, object]:
        """Return copies of all tables."""
        return {one.name: getattr(self, one.name).copy() for one in fields(Objects)}

    # What an expression is.

    def callee(self, call: ast.Call) -> str:
        """Return the dotted name of an imported function or class that is called; or an empty string."""
        name = dotted(call.func)
        first, dot, rest = name.partition(".")
        return f"{self.imports[first]}{dot}{rest}" if first in self.imports else ""

    def is_constant(self, value: ast.expr | None) -> bool:
        """Tell whether an expression is a number, a string or the like."""
        match value:
            case ast.Constant() | ast.JoinedStr() | ast.Compare():
                return True
            case ast.Name():
                return value.id in self.constants
            case ast.Tuple():
                return all(self.is_constant(part) for part in value.elts)
            case ast.BinOp():
                return self.is_constant(value.left) and self.is_constant(value.right)
            case ast.UnaryOp():
                return self.is_constant(value.operand)
            case ast.IfExp():
                return self.is_constant(value.body) and self.is_constant(value.orelse)
            case ast.Call():
                callee = self.callee(value) or dotted(value.func)
                return callee in _idioms.CONSTANTS or callee.endswith(".item")
        return False

    def is_record(self, value: ast.expr) -> bool:
        """Tell whether an expression is a configuration of constants."""
        match value:
            case ast.Dict():
                return all(self.is_constant(part) for part in (*value.keys, *value.values) if part is not None)
            case ast.Call():
                parts = [*value.args, *(keyword.value for keyword in value.keywords)]
                if not all(self.is_constant(part) for part in parts):
                    return False
                name = (self.callee(value) or dotted(value.func)).rpartition(".")[2]
                return name in self.records or name in ("SimpleNamespace", "Namespace", "parse_args", "dict")
        return False

    def kinds(self, value: ast.expr | None) -> frozenset[str]:
        """Return what may have made the value of an expression, and what is in it; `UNKNOWN` among it if need be."""
        match value:
            case ast.Constant() | ast.JoinedStr() | ast.Compare() | None:
                return frozenset()
            case ast.Name():
                return frozenset() if value.id in self.constants else self.made.get(value.id, UNKNOWN)
            case ast.Attribute():
                return self.kinds_of_attribute(value)
            case ast.Subscript():
                return self._kinds_of_element(value.value)
            case ast.Starred() | ast.Await() | ast.NamedExpr():
                return self.kinds(value.value)
            case ast.Tuple() | ast.List() | ast.Set():
                return self._all_kinds(value.elts)
            case ast.Dict():
                return self._all_kinds(value.values)
            case ast.BoolOp():
                return self._all_kinds(value.values)
            case ast.IfExp():
                return self.kinds(value.body) | self.kinds(value.orelse)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                own = {name for part in value.generators for name in stored(part.target)}
                if isinstance(value.elt, ast.Name) and value.elt.id in own:
                    return self._all_kinds([part.iter for part in value.generators])
                return self.kinds(value.elt)
            case ast.DictComp():
                return self.kinds(value.value)
            case ast.Call():
                return self._kinds_of_result(value)
        return UNKNOWN

    def _kinds_of_element(self, value: ast.expr) -> frozenset[str]:
        """Return what may have made an element; what a loader yields is no loader."""
        return frozenset("?" if _idioms.is_loader(kind) else kind for kind in self.kinds(value))

    def _all_kinds(self, values: Sequence[ast.expr]) -> frozenset[str]:
        return frozenset().union(*(self.kinds(value) for value in values))

    def kinds_of_attribute(self, node: ast.Attribute) -> frozenset[str]:
        """Return what may have made an attribute of an object."""
        return self.made.get(ast.unparse(node), UNKNOWN)

    def kinds_returned(self, call: ast.Call) -> frozenset[str]:
        """Return what may have made the result of a function of the notebook."""
        return UNKNOWN

    def _kinds_of_result(self, call: ast.Call) -> frozenset[str]:
        arguments = arguments_of(call)
        name, callee = dotted(call.func), self.callee(call)
        if callee:
            last = callee.rpartition(".")[2]
            if _idioms.CONTAINER_OF.match(last):
                return frozenset({callee}) | self._all_kinds(arguments)
            parts = [*call.args, *(k.value for k in call.keywords if k.arg not in _idioms.OWN_RANDOMNESS)]
            made = [part for part in parts if isinstance(part, ast.Call | ast.List | ast.ListComp)]
            return frozenset({callee}) | (self._all_kinds(made) - UNKNOWN)
        if name in self.classes:
            return frozenset({f"<{name}>"})
        if name in self.functions:
            return self.kinds_returned(call)
        if name == "next" and arguments:
            return self._kinds_of_element(arguments[0])
        if name in _idioms.KEEP:
            return self._all_kinds(arguments)
        if isinstance(call.func, ast.Attribute):
            if call.func.attr in _idioms.RETURN_THEMSELVES:
                return self.kinds(call.func.value)
            return self.kinds_returned(call)
        return UNKNOWN

    def held(self, value: ast.AST | None) -> frozenset[str]:
        """Return the names whose objects the value of an expression may be, or consist of."""
        match value:
            case ast.Name() if value.id in self.imports or value.id in self.constants:
                return frozenset()
            case ast.Name():
                return frozenset({value.id}) | self.holds.get(value.id, frozenset())
            case ast.Attribute() | ast.Subscript() if root_of(value) in self.records:
                return frozenset()
            case ast.Attribute() | ast.Subscript() | ast.Starred() | ast.Await() | ast.NamedExpr():
                return self.held(value.value)
            case ast.Tuple() | ast.List() | ast.Set():
                return self.all_held(value.elts)
            case ast.Dict():
                return self.all_held([part for part in (*value.keys, *value.values) if part is not None])
            case ast.BoolOp():
                return self.all_held(value.values)
            case ast.BinOp():
                # Of lists the sum holds what both hold.
                return self.all_held([p for p in (value.left, value.right) if isinstance(p, ast.List | ast.ListComp)])
            case ast.IfExp():
                return self.held(value.body) | self.held(value.orelse)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self.held(value.elt) | self.all_held([part.iter for part in value.generators])
            case ast.DictComp():
                return self.held(value.value) | self.all_held([part.iter for part in value.generators])
            case ast.Lambda():
                return self.held_by_function(value)
            case ast.Call():
                return self._held_by_result(value)
        return frozenset()

    def all_held(self, values: Iterable[ast.expr]) -> frozenset[str]:
        """Return the names whose objects the values of expressions may consist of."""
        return frozenset().union(*(self.held(value) for value in values))

    def held_by_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> frozenset[str]:
        """Return the names that a function takes from where it stands."""
        own = set(Function(node).all_parameters)
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
        return self.all_held([ast.Name(name, ast.Load()) for name in names - own if name in self.holds])

    def held_returned(self, call: ast.Call) -> frozenset[str] | None:
        """Return the names that the result of a function of the notebook may consist of; None if it is none."""
        return None

    def _held_by_result(self, call: ast.Call) -> frozenset[str]:
        arguments = arguments_of(call)
        name, callee = dotted(call.func), self.callee(call)
        if callee:
            top, _, _ = callee.partition(".")
            last = callee.rpartition(".")[2]
            fresh = top in _idioms.COMPUTE and not _idioms.CLASS.match(last) and last not in _idioms.KEEP_OF_LIBRARIES
            return frozenset() if fresh else self.all_held(arguments)
        if name in self.classes:
            return self.all_held(arguments)
        if (returned := self.held_returned(call)) is not None:
            return returned
        kinds = self.kinds(call.func)
        if name in _idioms.FRESH or name in _idioms.CONSTANTS or (kinds and all(map(_idioms.makes_new, kinds))):
            return frozenset()
        if isinstance(call.func, ast.Attribute):
            if call.func.attr in _idioms.FRESH_METHODS:
                return frozenset()
            return self.held(call.func.value) | self.all_held(arguments)
        own = name and name not in self.made and name not in self.holds
        return (frozenset() if own else self.held(call.func)) | self.all_held(arguments)

    def roots(self, node: ast.expr) -> frozenset[str]:
        """Return the names whose objects are changed if the value of an expression is."""
        match node:
            case ast.Name():
                return frozenset({node.id})
            case ast.Attribute() | ast.Subscript() | ast.Starred() | ast.Await() | ast.NamedExpr():
                return self.roots(node.value)
            case ast.Call() if isinstance(node.func, ast.Attribute) and root_of(node.func) not in self.imports:
                return self.roots(node.func.value) | self.held(node)
        return self.held(node)

    def gradients_of(self, value: ast.expr) -> frozenset[str]:
        """Return the models by which the value of an expression was computed, as far as that can be seen."""
        found: set[str] = set()
        for node in ast.walk(value):
            if isinstance(node, ast.Call) and not self.callee(node) and (root := root_of(node.func)) is not None:
                kinds = self.made.get(root, UNKNOWN)
                if kinds and all(kind.rstrip(">").endswith("Loss") for kind in kinds):
                    continue
                if root not in self.functions and root not in self.imports and root not in self.classes:
                    found |= {root} | self.holds.get(root, frozenset())
                elif isinstance(node.func, ast.Name) and root in self.functions:
                    found |= self.all_held(arguments_of(node)) | (self.held_returned(node) or frozenset())
            if isinstance(node, ast.Name):
                found |= self.gradients.get(node.id, frozenset())
        return frozenset(found)

    # Which objects change together.

    def parts(self, name: str) -> set[str]:
        """Return a name, and all that its object may consist of."""
        found, todo = {name}, [name]
        while todo:
            for part in self.holds.get(todo.pop(), ()):
                if part not in found:
                    found.add(part)
                    todo.append(part)
        return found

    def related(self, name: str) -> set[str]:
        """Return the names whose objects may change with that of a name."""
        changed = {
            part
            for part in self.parts(name)
            if part == name or (part not in self.functions and part not in self.classes)
        }
        return changed | {other for other, held in self.holds.items() if held & changed}

    def same(self, name: str) -> set[str]:
        """Return the names that may hold the object of a name."""
        return {other for other, held in self.holds.items() if name in held} | (
            set(self.holds.get(name, ())) if len(self.holds.get(name, ())) == 1 else set()
        )


def arguments_of(call: ast.Call) -> list[ast.expr]:
    """Return all arguments of a call."""
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def root_of(node: ast.AST) -> str | None:
    """Return the name at the left end of an expression such as ``a.b[0].c()``; None if there is none."""
    while True:
        match node:
            case ast.Name():
                return node.id
            case ast.Attribute() | ast.Subscript() | ast.Starred() | ast.Await():
                node = node.value
            case ast.Call():
                node = node.func
            case _:
                return None


def stored(node: ast.AST) -> frozenset[str]:
    """Return the names that a statement assigns to, functions inside it left out."""
    names = {n.id for n in immediate(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {n.name for n in immediate(node) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for part in immediate(node):
        if isinstance(part, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in part.names}
    return frozenset(names)
