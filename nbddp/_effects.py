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
from dataclasses import dataclass, field

from nbddp import _idioms
from nbddp._cells import Piece, Transform, dotted, immediate
from nbddp._names import MODULES_OWN, Uses

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
class _Function:
    """What a call of a function of the notebook does.

    Attributes:
        parameters: Its parameters, in order.
        changed: Those of them whose arguments it changes.
        outside: Variables of the notebook that it changes, settings and generators included.
        returns: Parameters that what it returns may hold.
        seeds: Generators that it seeds.
        iterated: Parameters whose arguments it iterates over.
    """

    parameters: tuple[str, ...] = ()
    changed: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    returns: frozenset[str] = frozenset()
    seeds: frozenset[str] = frozenset()
    iterated: frozenset[str] = frozenset()


@dataclass
class Flow:
    """What is known of the notebook's names at a point of it.

    Attributes:
        imports: What each imported name stands for, dotted.
        functions: The functions, and as functions without parameters the classes.
        holds: For each name, the names whose objects its own object may consist of.
        gradients: For each name, the models that it was computed by.
        late: For each name, the names that functions behind it read when they are called.
        constants: Names of numbers, strings and the like, which nothing can change.
        generators: Names of random number generators.
        loaders: Names of what draws random numbers when it is iterated over.
        shown: Names of figures and the like, which leave what they are given as it is.
        records: Names of what consists of constants: a configuration, whose parts go anywhere and are changed nowhere.
        seeded: The global generators that have been seeded.
    """

    imports: dict[str, str] = field(default_factory=dict)
    functions: dict[str, _Function] = field(default_factory=dict)
    classes: set[str] = field(default_factory=set)
    holds: dict[str, frozenset[str]] = field(default_factory=dict)
    gradients: dict[str, frozenset[str]] = field(default_factory=dict)
    late: dict[str, frozenset[str]] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    generators: set[str] = field(default_factory=set)
    loaders: set[str] = field(default_factory=set)
    shown: set[str] = field(default_factory=set)
    records: set[str] = field(default_factory=set)
    seeded: set[str] = field(default_factory=set)

    def copy(self) -> Flow:
        """Return a copy that can go another way."""
        return Flow(**{name: value.copy() for name, value in vars(self).items()})

    def follow(self, piece: Piece, transform: Transform) -> Effects:
        """Return what a statement does, and go on to behind it."""
        if not piece.text:
            bound = piece.binds | (_stored(piece.node) if piece.magic else frozenset())
            self._forget(bound)
            return Effects(frozenset(), bound, bound, frozenset())
        uses = Uses([piece.node], transform)
        now, late = _reads(piece.node)
        deferred = frozenset(late) | self.behind(now & frozenset(uses.taken))
        definition = isinstance(piece.node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        reads = now & frozenset(uses.taken) if definition else frozenset(uses.taken)
        reads |= self.behind(reads)
        was_seeded = set(self.seeded)
        done = _Done()
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

    # From here on: what is changed.

    def _statement(self, node: ast.stmt, done: _Done) -> None:
        """Follow a statement, and those in it in the order in which they stand."""
        match node:
            case ast.Import() | ast.ImportFrom():
                self._import(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._forget({node.name})
                self.functions[node.name] = self._function(node)
            case ast.ClassDef():
                self._forget({node.name})
                self.classes.add(node.name)
                if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                    self.records.add(node.name)
                self.functions[node.name] = self._class(node)
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

    def _compound(self, node: ast.stmt, done: _Done) -> None:
        for name, part in ast.iter_fields(node):
            match name, part:
                case (("test" | "iter" | "subject"), ast.expr()):
                    self._calls(part, done)
                case "items", list():
                    for item in part:
                        self._calls(item.context_expr, done)
                        if item.optional_vars is not None:
                            self._assign(item.optional_vars, item.context_expr, done)
        if isinstance(node, ast.For | ast.AsyncFor):
            root = _root(node.iter.args[0] if isinstance(node.iter, ast.Call) and node.iter.args else node.iter)
            if root in self.loaders:
                done.draws.add(_idioms.GENERATORS[0])
            if root is not None:
                done.iterated.add(root)
            self._assign(node.target, node.iter, done)
        for block in _blocks(node):
            for stmt in block:
                self._statement(stmt, done)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            self._forget({name})
            if isinstance(node, ast.ImportFrom):
                self.imports[name] = f"{'.' * node.level}{node.module or ''}.{alias.name}"
            else:
                self.imports[name] = alias.name if alias.asname else name

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            for table in (self.imports, self.functions, self.holds, self.gradients, self.late):
                table.pop(name, None)
            for names_of in (self.classes, self.constants, self.generators, self.loaders, self.shown, self.records):
                names_of.discard(name)

    def _assign(self, target: ast.expr, value: ast.expr, done: _Done, *, again: bool = False) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            values: Sequence[ast.expr] = [value] * len(target.elts)
            if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
                values = value.elts
            for part, its in zip(target.elts, values, strict=True):
                self._assign(part.value if isinstance(part, ast.Starred) else part, its, done)
            return
        held, gradients = self._held(value), self._gradients(value)
        if not isinstance(target, ast.Name):
            self._changed(target, done)
            if (root := _root(target)) and root not in self.imports:
                self.holds[root] = self.holds.get(root, frozenset()) | held - {root}
            return
        name = target.id
        known = self._callee(value) if isinstance(value, ast.Call) else ""
        shown = known.partition(".")[0] in _idioms.SHOW
        if again:
            if name not in self.constants:
                self._changed(target, done)
            held |= self.holds.get(name, frozenset())
            gradients |= self.gradients.get(name, frozenset())
        constant = self._is_constant(value) and (not again or name in self.constants)
        record = self._is_record(value)
        function = self.functions.get(value.id) if isinstance(value, ast.Name) else None
        self._forget({name})
        self.holds[name] = held - {name}
        self.gradients[name] = gradients
        if constant:
            self.constants.add(name)
        if record:
            self.records.add(name)
        if function is not None:
            self.functions[name] = function
        if _idioms.MAKES_GENERATOR.search(known) and "random" in known + "torch" * known.startswith("torch."):
            self.generators.add(name)
        if known.endswith("Generator"):
            self.generators.add(name)
        if known.endswith("DataLoader"):
            self.loaders.add(name)
        if shown:
            self.shown.add(name)

    def _is_constant(self, value: ast.expr) -> bool:
        match value:
            case ast.Constant() | ast.JoinedStr() | ast.Compare():
                return True
            case ast.Name():
                return value.id in self.constants
            case ast.Tuple():
                return all(self._is_constant(part) for part in value.elts)
            case ast.BinOp():
                return self._is_constant(value.left) and self._is_constant(value.right)
            case ast.UnaryOp():
                return self._is_constant(value.operand)
            case ast.IfExp():
                return self._is_constant(value.body) and self._is_constant(value.orelse)
            case ast.Call():
                callee = self._callee(value) or dotted(value.func)
                return (
                    callee in _idioms.CONSTANTS
                    or callee.endswith(".item")
                    or callee in ("torch.device", "pathlib.Path")
                )
        return False

    def _is_record(self, value: ast.expr) -> bool:
        match value:
            case ast.Dict():
                return all(self._is_constant(part) for part in (*value.keys, *value.values) if part is not None)
            case ast.Call():
                parts = [*value.args, *(keyword.value for keyword in value.keywords)]
                if not all(self._is_constant(part) for part in parts):
                    return False
                name = (self._callee(value) or dotted(value.func)).rpartition(".")[2]
                return name in self.records or name in ("SimpleNamespace", "Namespace", "parse_args", "dict")
        return False

    def _held(self, value: ast.expr | None) -> frozenset[str]:
        """Return the names whose objects the value of an expression may be, or consist of."""
        match value:
            case ast.Name() if value.id in self.imports or value.id in self.constants or value.id in self.functions:
                return frozenset()
            case ast.Name():
                return frozenset({value.id}) | self.holds.get(value.id, frozenset())
            case ast.Attribute() | ast.Subscript() if _root(value) in self.records:
                return frozenset()
            case ast.Attribute() | ast.Subscript() | ast.Starred() | ast.Await() | ast.NamedExpr():
                return self._held(value.value)
            case ast.Tuple() | ast.List() | ast.Set():
                return self._all_held(value.elts)
            case ast.Dict():
                return self._all_held([part for part in (*value.keys, *value.values) if part is not None])
            case ast.BoolOp():
                return self._all_held(value.values)
            case ast.IfExp():
                return self._held(value.body) | self._held(value.orelse)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self._held(value.elt) | self._all_held([part.iter for part in value.generators])
            case ast.DictComp():
                return self._held(value.value) | self._all_held([part.iter for part in value.generators])
            case ast.Call():
                return self._held_by_result(value)
        return frozenset()

    def _all_held(self, values: Sequence[ast.expr]) -> frozenset[str]:
        return frozenset().union(*(self._held(value) for value in values))

    def _held_by_result(self, call: ast.Call) -> frozenset[str]:
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        callee = self._callee(call)
        if isinstance(call.func, ast.Name) and call.func.id in self.functions and call.func.id not in self.classes:
            bound = self._bound(self.functions[call.func.id], call)
            return self._all_held([value for name, value in bound if name in self.functions[call.func.id].returns])
        if callee:
            last = callee.rpartition(".")[2]
            fresh = callee.partition(".")[0] in _idioms.COMPUTE and not _idioms.CLASS.match(last)
            keeps = last in (
                "from_numpy",
                "as_tensor",
                "asarray",
                "compile",
                "zip",
                "iter",
                "partial",
                "chain",
                "cycle",
            )
            return frozenset() if fresh and not keeps else self._all_held(arguments)
        if isinstance(call.func, ast.Attribute):
            return self._held(call.func.value)
        name = dotted(call.func)
        if (
            name in self.classes
            or _idioms.CLASS.match(name)
            or name in ("list", "tuple", "dict", "set", "iter", "zip", "map")
        ):
            return self._all_held(arguments)
        return frozenset()

    def _gradients(self, value: ast.expr) -> frozenset[str]:
        """Return the models by which the value of an expression was computed, as far as that can be seen."""
        found: set[str] = set()
        for node in ast.walk(value):
            if isinstance(node, ast.Call) and not self._callee(node) and (root := _root(node.func)) is not None:
                if root not in self.functions and root not in self.imports:
                    found |= {root} | self.holds.get(root, frozenset())
                elif isinstance(node.func, ast.Name) and root in self.functions and root not in self.classes:
                    found |= self._all_held(node.args)
            if isinstance(node, ast.Name):
                found |= self.gradients.get(node.id, frozenset())
        return frozenset(found)

    def _callee(self, call: ast.Call) -> str:
        """Return the dotted name of an imported function or class that is called; or an empty string."""
        name = dotted(call.func)
        first, dot, rest = name.partition(".")
        if first in self.imports:
            return f"{self.imports[first]}{dot}{rest}"
        return ""

    def _calls(self, node: ast.AST, done: _Done, unused: ast.expr | None = None) -> None:
        """Follow the calls in a statement or an expression."""
        if isinstance(unused, ast.Await):
            unused = unused.value
        for part in immediate(node):
            match part:
                case ast.Call():
                    self._call(part, done, unused=part is unused)
                case ast.NamedExpr():
                    self._assign(part.target, part.value, done)
                case ast.comprehension() if _root(part.iter) in self.loaders:
                    done.draws.add(_idioms.GENERATORS[0])

    def _call(self, call: ast.Call, done: _Done, *, unused: bool) -> None:
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        for keyword in call.keywords:
            if _root(keyword.value) in self.generators:
                self._changed(keyword.value, done)
        name = dotted(call.func)
        callee = self._callee(call)
        if callee or _root(call.func) in self.imports:
            self._call_of_library(call, callee or f"{self.imports[_root(call.func) or '']}.?", arguments, done, unused)
        elif name in self.functions:
            self._call_of_function(self.functions[name], call, done)
        elif isinstance(call.func, ast.Attribute):
            self._call_of_method(call.func, arguments, done, unused)
        elif name in ("setattr", "delattr", "next") and call.args:
            self._changed(call.args[0], done)
        elif name == "exec":
            done.changes |= {_idioms.SETTINGS} if unused else set()
        elif unused and name in self.holds:
            self._changed(call.func, done)

    def _call_of_library(
        self, call: ast.Call, callee: str, arguments: Sequence[ast.expr], done: _Done, unused: bool
    ) -> None:
        top, last = callee.partition(".")[0], _last(call.func)
        own = bool(_idioms.OWN_RANDOMNESS & {keyword.arg for keyword in call.keywords})
        if _idioms.SEEDING.match(last) and not callee.endswith(".?"):
            done.seeds |= _idioms.generators_of(callee)
            self.seeded |= _idioms.generators_of(callee)
            return
        if not own:
            done.draws |= _idioms.drawn_by(callee, last)
        if callee.startswith("os.environ.") and last == "get":
            return
        if _idioms.SETTING.match(last) and unused:
            self._set(call.func, done)
        if top in _idioms.SHOW or last in ("save", "dump", "savetxt", "savez"):
            return
        changing = _idioms.CHANGING.match(last) or (
            unused and top not in _idioms.COMPUTE and not _idioms.CLASS.match(last)
        )
        if changing and not (last in ("next",) and not arguments):
            for argument in arguments:
                self._changed(argument, done)

    def _call_of_function(self, function: _Function, call: ast.Call, done: _Done) -> None:
        for name, value in self._bound(function, call):
            if name in function.changed:
                self._changed(value, done)
            if name in function.iterated and _root(value) in self.loaders:
                done.draws.add(_idioms.GENERATORS[0])
        for name in function.outside:
            if name in _idioms.GENERATORS:
                done.draws.add(name)
            elif name == _idioms.SETTINGS:
                done.changes.add(name)
            else:
                # It may be bound anew there, and then be no constant.
                self.constants.discard(name)
                done.changes |= self._related(name)
        done.seeds |= function.seeds
        self.seeded |= function.seeds

    @staticmethod
    def _bound(function: _Function, call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
        """Yield (parameter, argument) for a call."""
        yield from zip(function.parameters, call.args, strict=False)
        yield from ((keyword.arg or "", keyword.value) for keyword in call.keywords)

    def _call_of_method(self, func: ast.Attribute, arguments: Sequence[ast.expr], done: _Done, unused: bool) -> None:
        root, method = _root(func.value), func.attr
        if _idioms.METHOD_DRAWS.match(method):
            done.draws.add(_idioms.GENERATORS[0])
        if method == "sample" and unused is False:
            done.draws.add(_idioms.GENERATORS[1])
        if root is None or root in self.shown:
            return
        if method == "backward":
            done.changes |= {_gradient(name) for name in self.gradients.get(root, frozenset()) | {root}}
        elif method == "zero_grad":
            done.changes |= {_gradient(name) for name in self._related(root)}
        elif root in self.generators:
            self._changed(func.value, done)
        elif method in _idioms.CONTAINERS and (unused or _idioms.CHANGING_METHODS.match(method)):
            self._changed(func.value, done, deep=method in ("update", "add") and not unused)
            added = self._all_held(arguments) - {root}
            self.holds[root] = self.holds.get(root, frozenset()) | added
        elif _idioms.CHANGING_METHODS.match(method) or (unused and method not in _idioms.SHOWING_METHODS):
            self._changed(func.value, done)
            if method.startswith(("fit", "train", "tune", "finetune")):
                for argument in arguments:
                    self._changed(argument, done)
        if method == "step":
            done.reads |= {_gradient(name) for name in self._related(root)}

    def _changed(self, node: ast.expr, done: _Done, *, deep: bool = True) -> None:
        """Note that the object behind an expression is changed."""
        root = _root(node)
        if root is None or root in self.constants:
            return
        if root in self.imports:
            if not isinstance(node, ast.Name):
                self._set(node, done)
            return
        done.changes |= self._related(root) if deep else {root} | self._same(root)

    def _set(self, node: ast.expr, done: _Done) -> None:
        """Note that something is set in a module."""
        root = _root(node)
        if root is None:
            return
        done.changes.add(root)
        if self.imports.get(root, "").partition(".")[0] in _idioms.OF_THE_PROCESS:
            done.changes.add(_idioms.SETTINGS)

    def _related(self, name: str) -> set[str]:
        """Return the names whose objects may change with that of a name."""
        parts = {name} | self.holds.get(name, frozenset())
        return parts | {other for other, held in self.holds.items() if name in held}

    def _same(self, name: str) -> set[str]:
        """Return the names that may hold the object of a name."""
        return {other for other, held in self.holds.items() if name in held} | (
            self.holds.get(name, frozenset()) if len(self.holds.get(name, ())) == 1 else frozenset()
        )

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> _Function:
        """Read the body of a function for what a call of it does."""
        arguments = node.args
        parameters = tuple(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
        more = tuple(a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None)
        flow = self.copy()
        flow._forget((*parameters, *more))
        flow.functions.setdefault(node.name, _Function(parameters))
        done = _Done()
        for stmt in node.body:
            flow._statement(stmt, done)
        shared = {name for part in ast.walk(node) if isinstance(part, ast.Global) for name in part.names}
        local = (frozenset().union(*(_stored(stmt) for stmt in node.body)) - shared) | set(parameters) | set(more)
        returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return | ast.Yield) and n.value is not None]
        outside = {name for name in done.changes if name not in local and not name.startswith("<gradient")}
        return _Function(
            parameters,
            changed=frozenset(done.changes) & frozenset(parameters),
            outside=frozenset(outside | shared | done.draws),
            returns=flow._all_held(returned) & frozenset(parameters),
            seeds=frozenset(done.seeds),
            iterated=frozenset(done.iterated & set(parameters)),
        )

    def _class(self, node: ast.ClassDef) -> _Function:
        """Read a class for what making an object of it does: its layers draw their first weights."""
        done = _Done()
        flow = self.copy()
        for stmt in node.body:
            if isinstance(stmt, ast.FunctionDef) and stmt.name in ("__init__", "__post_init__", "reset_parameters"):
                flow.functions[stmt.name] = flow._function(stmt)
                done.draws |= flow.functions[stmt.name].outside & frozenset(_idioms.GENERATORS)
        for base in node.bases:
            inherited = self.functions.get(dotted(base))
            done.draws |= inherited.outside & frozenset(_idioms.GENERATORS) if inherited else frozenset()
        return _Function(outside=frozenset(done.draws))


@dataclass
class _Done:
    """What has been seen of a statement so far."""

    changes: set[str] = field(default_factory=set)
    reads: set[str] = field(default_factory=set)
    draws: set[str] = field(default_factory=set)
    seeds: set[str] = field(default_factory=set)
    iterated: set[str] = field(default_factory=set)


def _gradient(name: str) -> str:
    return f"<gradient of {name}>"


def _root(node: ast.AST) -> str | None:
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


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _stored(node: ast.AST) -> frozenset[str]:
    """Return the names that a statement assigns to, functions inside it left out."""
    names = {n.id for n in immediate(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names |= {n.name for n in immediate(node) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for part in immediate(node):
        if isinstance(part, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in part.names}
    return frozenset(names)


def _blocks(node: ast.stmt) -> Iterator[Sequence[ast.stmt]]:
    for name in ("body", "handlers", "cases", "orelse", "finalbody"):
        for part in getattr(node, name, ()):
            if isinstance(part, ast.stmt):
                yield [part]
            else:
                yield part.body


def _reads(node: ast.stmt) -> tuple[frozenset[str], frozenset[str]]:
    """Return the global names that a statement reads when it runs, and those that functions in it read when called."""
    code = compile(ast.Module([node], []), "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    now: set[str] = set()
    late: set[str] = set()
    lambdas = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    _collect(code, now, late, in_function=False, lambdas=lambdas)
    return frozenset(now) - MODULES_OWN, frozenset(late) - MODULES_OWN


def _collect(code: types.CodeType, now: set[str], late: set[str], *, in_function: bool, lambdas: bool) -> None:
    from nbddp._names import _globals_of

    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    deep = {name for one in inner for _, name, stores, _ in _globals_of(one, 1) if not stores}
    for depth, name, stores, _ in _globals_of(code):
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
