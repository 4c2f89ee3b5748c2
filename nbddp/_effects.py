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
import builtins
import types
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from nbddp import _idioms
from nbddp._cells import Piece, Transform, dotted, immediate
from nbddp._names import MODULES_OWN, Uses, globals_of
from nbddp._objects import HIDDEN, UNKNOWN, Class, Function, Objects, arguments_of, root_of, stored

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


@dataclass(frozen=True)
class _Summary:
    """What a call of a function of the notebook does.

    Attributes:
        changed: Parameters whose arguments it changes.
        called: Parameters whose arguments it calls, knowing nothing of them.
        outside: Names outside it whose objects it changes.
        draws: Global generators that it draws from.
        seeds: Global generators that it seeds.
        settings: Whether it sets something for the whole process.
        returns: Parameters, and names outside it, that what it returns may hold.
        kinds: What may have made what it returns.
        functions: Functions that it returns.
        attributes: What may have made the attributes that it sets, by ``parameter.attribute``.
        generates: Whether it goes on when what it returns is iterated over.
    """

    changed: frozenset[str] = frozenset()
    called: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    draws: frozenset[str] = frozenset()
    seeds: frozenset[str] = frozenset()
    settings: bool = False
    returns: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    functions: tuple[Function, ...] = ()
    attributes: tuple[tuple[str, frozenset[str]], ...] = ()
    generates: bool = False


@dataclass
class _Known:
    """What functions and classes do that a statement uses: they are read anew for each.

    Attributes:
        summaries: For each function, and what is known of its arguments, what a call of it does.
        attributes: For each class what may have made the attributes of its objects.
        open: The functions that are being read, each called by another.
        again: Those of them that have been called again meanwhile.
    """

    summaries: dict[Hashable, _Summary] = field(default_factory=dict)
    attributes: dict[ast.ClassDef, dict[str, frozenset[str]]] = field(default_factory=dict)
    open: list[Hashable] = field(default_factory=list)
    again: set[Hashable] = field(default_factory=set)


@dataclass
class Flow(Objects):
    """What is known of the notebook's names at a point of it, and how it goes on.

    Attributes:
        notebook: What is known outside of the function that is read; None outside of functions.
        inside: The class whose method is read, and what the method calls its object.
    """

    notebook: Flow | None = None
    inside: tuple[str, str] | None = None
    # Functions are read when they are called, with what is known then.
    _known: _Known = field(default_factory=_Known)

    def copy(self) -> Flow:
        """Return a copy that can go another way."""
        return Flow(**self.copied(), notebook=self.notebook, inside=self.inside, _known=self._known)  # type: ignore[arg-type]

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
        self._known = _Known()
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

    # Statements.

    def _statement(self, node: ast.stmt, done: _Done) -> None:
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

    def _compound(self, node: ast.stmt, done: _Done) -> None:
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

    def _element(self, node: ast.expr) -> ast.expr:
        """Return an expression for an element of what is iterated over."""
        return node if self.is_constant(node) else ast.Subscript(node, ast.Constant(0), ast.Load())

    def _block(self, block: Iterable[ast.stmt], done: _Done) -> None:
        for stmt in block:
            self._statement(stmt, done)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            self.forget({name})
            if isinstance(node, ast.ImportFrom):
                self.imports[name] = f"{'.' * node.level}{node.module or ''}.{alias.name}"
            else:
                self.imports[name] = alias.name if alias.asname else name

    def _assign(self, target: ast.expr, value: ast.expr, done: _Done, *, again: bool = False) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            values: Sequence[ast.expr] = [value] * len(target.elts)
            if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
                values = value.elts
            for part, its in zip(target.elts, values, strict=True):
                self._assign(part.value if isinstance(part, ast.Starred) else part, its, done)
            return
        held, gradients, kinds = self.held(value), self.gradients_of(value), self.kinds(value)
        if not isinstance(target, ast.Name):
            self._changed(target, done)
            if (root := root_of(target)) and root not in self.imports:
                self.holds[root] = self.holds.get(root, frozenset()) | held - {root}
                key = ast.unparse(target) if isinstance(target, ast.Attribute) else root
                self.made[key] = self.made.get(key, frozenset()) | kinds
            return
        name = target.id
        known = self.callee(value) if isinstance(value, ast.Call) else ""
        shown = known.partition(".")[0] in _idioms.SHOW
        if again:
            if name not in self.constants:
                self._changed(target, done)
            held |= self.holds.get(name, frozenset())
            gradients |= self.gradients.get(name, frozenset())
            kinds |= self.made.get(name, UNKNOWN)
        constant = self.is_constant(value) and (not again or name in self.constants)
        record = self.is_record(value)
        functions = self._functions_of(value)
        self.forget({name})
        self.holds[name] = held - {name}
        self.gradients[name] = gradients
        self.made[name] = kinds
        if constant:
            self.constants.add(name)
        if record:
            self.records.add(name)
        if functions:
            self.functions[name] = functions
        if shown:
            self.shown.add(name)

    # Calls.

    def _calls(self, node: ast.AST, done: _Done, unused: ast.expr | None = None) -> None:
        """Follow the calls in a statement or an expression."""
        parts = immediate(node)
        nobodys = set(_unused(unused))
        comprehended = [part for part in parts if isinstance(part, ast.comprehension)]
        before = self.copy() if comprehended else None
        for _ in range(len(comprehended)):
            for clause in comprehended:
                self._iterate(clause.iter, done)
                self._assign(clause.target, self._element(clause.iter), _Done())
        for part in parts:
            match part:
                case ast.Call():
                    self._call(part, done, unused=part in nobodys)
                case ast.NamedExpr():
                    self._assign(part.target, part.value, done)
                case ast.Subscript(ctx=ast.Load()):
                    self._special(part.value, ("__getitem__",), done)
        if before is not None:
            # The variables of a comprehension are its own.
            self._restore({name for part in comprehended for name in stored(part.target)}, before)

    def _restore(self, names: Iterable[str], before: Flow) -> None:
        self.forget(names)
        for name in names:
            for table in ("imports", "functions", "classes", "holds", "gradients", "late"):
                if name in getattr(before, table):
                    getattr(self, table)[name] = getattr(before, table)[name]
            for claim in ("constants", "shown", "records"):
                if name in getattr(before, claim):
                    getattr(self, claim).add(name)
            self.made |= {key: kinds for key, kinds in before.made.items() if key.partition(".")[0] == name}

    def _call(self, call: ast.Call, done: _Done, *, unused: bool) -> None:
        arguments = arguments_of(call)
        for keyword in call.keywords:
            if self._is_generator(keyword.value):
                self._changed(keyword.value, done)
        name, callee, func = dotted(call.func), self.callee(call), call.func
        if name in self.classes:
            self._construct(name, call, done)
        elif functions := () if isinstance(func, ast.Attribute) else self._functions_of(func):
            for function in functions:
                summary = self._call_of_function(function, call, done)
                if function.closed and summary.changed | summary.called | summary.outside:
                    self._call_of_unknown(func, arguments, done)
            return
        elif callee:
            self._call_of_library(call, callee, arguments, done, unused)
        elif isinstance(func, ast.Attribute):
            self._call_of_method(call, func, arguments, done, unused)
        elif name in _BUILTIN and name not in self.holds:
            self._call_of_python(name, call, arguments, done, unused)
        elif name and name not in self.holds and name not in self.local and name not in self.made:
            # Nobody knows where it comes from: a class by its name, or else a function that may do anything.
            if not _idioms.CLASS.match(name):
                self._all_changed(arguments, done)
        else:
            self._call_of_object(func, call, arguments, done)
        self._call_back(call, arguments, done)

    def _call_of_python(
        self, name: str, call: ast.Call, arguments: Sequence[ast.expr], done: _Done, unused: bool
    ) -> None:
        """Follow a call of a function of Python's own."""
        if name in ("setattr", "delattr", "next") and call.args:
            self._changed(call.args[0], done)
            if len(call.args) == 3 and (root := root_of(call.args[0])):
                self.holds[root] = self.holds.get(root, frozenset()) | self.held(call.args[2]) - {root}
        elif name == "exec":
            done.changes |= {_idioms.SETTINGS} if unused else set()
        if name not in _idioms.LOOK:
            for argument in arguments:
                self._iterate(argument, done)

    def _construct(self, name: str, call: ast.Call, done: _Done) -> None:
        """Follow the making of an object of a class of the notebook."""
        for method in ("__new__", "__init__", "__post_init__", "reset_parameters"):
            for function in self._methods(name, method):
                self._call_of_function(function, call, done, first=call, fresh=True)
        for base in self._bases(name):
            done.draws |= _idioms.drawn_by(base, base.rpartition(".")[2])

    def _call_of_object(self, func: ast.expr, call: ast.Call, arguments: Sequence[ast.expr], done: _Done) -> None:
        """Follow a call of an object: of a model, as a rule."""
        kinds = self.kinds(func)
        for kind in kinds or UNKNOWN:
            if kind.startswith("<"):
                methods = self._methods(kind.strip("<>"), "__call__") or self._methods(kind.strip("<>"), "forward")
                for function in methods:
                    self._call_of_function(function, call, done, first=func)
                bases = self._bases(kind[1:-1])
                if methods or (bases and all(map(_idioms.leaves_all, bases))):
                    continue
            elif _idioms.leaves_all(kind):
                if _idioms.CALL_DRAWS.search(kind):
                    done.draws.add(_idioms.GENERATORS[0])
                continue
            self._call_of_unknown(func, arguments, done)
            if _idioms.CALL_DRAWS.search(kind):
                done.draws.add(_idioms.GENERATORS[0])

    def _call_of_unknown(self, func: ast.expr, arguments: Sequence[ast.expr], done: _Done) -> None:
        """Follow a call of what may do anything to itself, to what it holds, and to its arguments."""
        self._changed(func, done)
        self._all_changed(arguments, done)
        done.called |= self.roots(func)
        self._call_what_is_held(func, done)

    def _call_what_is_held(self, node: ast.expr, done: _Done) -> None:
        """Follow calls of the functions that an object holds, with arguments that nobody knows."""
        for root in self.roots(node):
            for part in self.parts(root):
                for function in self.functions.get(part, ()):
                    self._call_of_function(function, None, done)

    def _call_back(self, call: ast.Call, arguments: Sequence[ast.expr], done: _Done) -> None:
        """Follow the calls of functions that are arguments, which may be given the others."""
        for one in arguments:
            others = [other for other in arguments if other is not one]
            for function in self._functions_of(one):
                summary = self._call_of_function(function, None, done)
                if summary.changed or summary.called:
                    self._all_changed([one, *others] if function.closed else others, done)
                    if isinstance(call.func, ast.Attribute) and root_of(call.func) not in self.imports:
                        self._changed(call.func.value, done)
            if isinstance(one, ast.Attribute) and self._may_change(one):
                self._all_changed([one.value, *others], done)
        match arguments:
            case [ast.Name(name) as one, *others] if dotted(call.func) in ("map", "filter"):
                if not any(name in table for table in (self.functions, self.imports, self.classes, _BUILTIN)):
                    self._call_of_object(one, ast.Call(one, others, []), others, done)

    def _may_change(self, method: ast.Attribute) -> bool:
        """Tell whether a method of an object of which nobody knows what it is changes it, by its name."""
        known = self.kinds(method.value) != UNKNOWN or root_of(method) in self.imports
        return not known and _idioms.CHANGING_METHODS.match(method.attr) is not None

    def _call_of_library(
        self, call: ast.Call, callee: str, arguments: Sequence[ast.expr], done: _Done, unused: bool
    ) -> None:
        top, last = callee.partition(".")[0], callee.rpartition(".")[2]
        if _idioms.SEEDING.match(last):
            done.seeds |= _idioms.generators_of(callee)
            self.seeded |= _idioms.generators_of(callee)
            return
        if not self._has_own_randomness(call):
            done.draws |= _idioms.drawn_by(callee, last)
        if callee.startswith("os.environ.") and last == "get":
            return
        if _idioms.SETTING.match(last) and unused:
            self._set(call.func, done)
        if not _idioms.CLASS.match(last):
            # A progress bar, itertools: they go through what they are given.
            for argument in arguments:
                self._iterate(argument, done)
        elif top in _idioms.SHOW:
            for argument in arguments:
                self._iterate(argument, done)
        if top in _idioms.SHOW or last in ("save", "dump", "savetxt", "savez"):
            return
        changing = _idioms.CHANGING.match(last) or (
            top not in _idioms.COMPUTE and not _idioms.CLASS.match(last) and (unused or top not in _idioms.MAKE)
        )
        if changing and not (last in ("next",) and not arguments):
            self._all_changed(arguments, done)

    def _call_of_function(
        self,
        function: Function,
        call: ast.Call | None,
        done: _Done,
        first: ast.expr | None = None,
        *,
        fresh: bool = False,
    ) -> _Summary:
        """Follow a call of a function of the notebook.

        Args:
            function: The function.
            call: Its call; None if nobody knows what it is given.
            done: What has been done so far.
            first: What its first parameter is, if it is a method.
            fresh: Whether that is an object in the making.
        """
        static = any(dotted(decorator) == "staticmethod" for decorator in getattr(function.node, "decorator_list", ()))
        bound = function.bound(call, None if static else first) if call is not None else []
        summary = self._summary(function, bound)
        given = {name for name, _ in bound}
        if call is not None and not function.closed:
            bound += [(name, value) for name, value in function.defaults().items() if name not in given]
            for name, value in bound:
                if fresh and value is first:
                    continue
                if name in summary.changed:
                    self._changed(value, done)
                if name in summary.called:
                    self._call_what_is_held(value, done)
                    done.called |= self.roots(value)
        for name in summary.outside:
            # It may be bound anew there, and then be no constant.
            inside = self._as_seen_here(name, function)
            self.constants.discard(inside)
            done.changes |= self.related(inside)
        if summary.settings:
            done.changes.add(_idioms.SETTINGS)
        done.draws |= summary.draws
        done.seeds |= summary.seeds
        self.seeded |= summary.seeds
        return summary

    def _call_of_method(
        self, call: ast.Call, func: ast.Attribute, arguments: Sequence[ast.expr], done: _Done, unused: bool
    ) -> None:
        if isinstance(func.value, ast.Call) and dotted(func.value.func) == "super" and self.inside is not None:
            self._call_of_super(call, func.attr, done)
            return
        root, method = root_of(func.value), func.attr
        kinds = self.kinds(func.value)
        self._draws_of_method(method, kinds, call, done)
        if methods := self._methods_of(func):
            for function in methods:
                self._call_of_function(function, call, done, first=func.value)
            if all(kind.startswith("<") for kind in kinds):
                return
        if self._is_attribute(func):
            self._call_of_object(func, call, arguments, done)
            return
        if root is None or root in self.shown:
            return
        if root in self.imports and not self._is_generator(func.value):
            if _idioms.SETTING.match(method) and unused and not isinstance(func.value, ast.Call):
                self._set(func, done)
            if _idioms.CHANGING.match(method) or (unused and root_of(func) not in self.imports):
                self._changed(func.value, done)
                self._all_changed(arguments, done)
            return
        if method == "backward":
            models = self.gradients_of(func.value) | (set() if isinstance(func.value, ast.Call) else {root})
            done.changes |= {_gradient(name) for name in models}
        elif method == "zero_grad":
            done.changes |= {_gradient(name) for name in self.related(root)}
        elif self._is_generator(func.value):
            self._changed(func.value, done)
            if _idioms.CHANGING.match(method):
                self._all_changed(arguments, done)
        elif method in _idioms.CONTAINERS and (
            unused or method in _idioms.ALWAYS_CHANGING or _idioms.CHANGING_METHODS.match(method)
        ):
            self._changed(func.value, done, deep=method in ("update", "add") and not unused)
            added = self.all_held(arguments) - {root}
            self.holds[root] = self.holds.get(root, frozenset()) | added
            if root in self.made:
                self.made[root] |= self._all_kinds(arguments)
        elif _idioms.CHANGING_METHODS.match(method) or (unused and method not in _idioms.SHOWING_METHODS):
            self._changed(func.value, done)
            self._call_what_is_held(func.value, done)
            if method.startswith(("fit", "train", "tune", "finetune")):
                self._all_changed(arguments, done)
        elif self._may_do_anything(kinds, method):
            self._call_of_unknown(func.value, arguments, done)
        if method == "step":
            done.reads |= {_gradient(name) for name in self.related(root)}

    def _call_of_super(self, call: ast.Call, method: str, done: _Done) -> None:
        """Follow a call of a method of the bases of the class whose method is read."""
        assert self.inside is not None
        name, itself = self.inside
        known = self.classes.get(name)
        for base in known.bases if known is not None else []:
            for function in self._methods(base, method) if base != name else []:
                self._call_of_function(function, call, done, first=ast.Name(itself, ast.Load()))

    def _may_do_anything(self, kinds: frozenset[str], method: str) -> bool:
        """Tell whether a method whose value is used may change things: those of libraries that nobody here knows."""
        if method in _idioms.SHOWING_METHODS or _idioms.PURE_METHODS.match(method):
            return False
        known = _idioms.COMPUTE | _idioms.MAKE | _idioms.SHOW
        return any(kind[0] not in "<?" and kind.partition(".")[0] not in known for kind in kinds)

    def _draws_of_method(self, method: str, kinds: frozenset[str], call: ast.Call, done: _Done) -> None:
        """Note the generators that a method of a library draws from."""
        if self._has_own_randomness(call) or any(map(_idioms.is_generator, kinds)):
            return
        torch, numpy, _ = _idioms.GENERATORS
        if _idioms.METHOD_DRAWS.match(method):
            done.draws.add(torch)
        elif method == "sample":
            tops = {kind.partition(".")[0] for kind in kinds}
            done.draws |= {torch} if tops <= {"torch"} else {numpy} if tops <= {"pandas", "numpy"} else {torch, numpy}

    def _has_own_randomness(self, call: ast.Call) -> bool:
        """Tell whether a call says where its random numbers come from."""
        return any(
            keyword.arg in _idioms.OWN_RANDOMNESS and not self.kinds(keyword.value) & _idioms.DEFAULT_GENERATORS
            for keyword in call.keywords
        )

    def _is_generator(self, node: ast.expr) -> bool:
        return any(map(_idioms.is_generator, self.kinds(node)))

    def _iterate(self, node: ast.expr, done: _Done) -> None:
        """Follow what goes through an object."""
        if any(map(_idioms.is_loader, self.kinds(node))):
            done.draws.add(_idioms.GENERATORS[0])
        self._special(node, ("__iter__", "__next__", "__getitem__"), done)
        if isinstance(node, ast.Name):
            for function in self.functions.get(node.id, ()):
                if function.closed:
                    self._call_of_unknown(node, (), done)
                    self._call_of_function(function, None, done)
        if not any(map(_idioms.is_loader, self.kinds(node))):
            return
        for root in self.roots(node):
            for part in self.parts(root):
                # A loader goes through its data set, and may have a generator of its own.
                if any(map(_idioms.is_generator, self.made.get(part, ()))):
                    done.changes |= self.related(part)
                self._special(ast.Name(part, ast.Load()), ("__iter__", "__getitem__", "__call__"), done)

    def _special(self, node: ast.expr, names: Sequence[str], done: _Done) -> None:
        """Follow the methods that Python itself calls."""
        for kind in self.kinds(node):
            if kind.startswith("<"):
                for name in names:
                    for function in self._methods(kind[1:-1], name):
                        self._call_of_function(function, ast.Call(node, [], []), done, first=node)

    def _changed(self, node: ast.expr, done: _Done, *, deep: bool = True) -> None:
        """Note that the object behind an expression is changed."""
        if (root := root_of(node)) in self.imports and not any(isinstance(part, ast.Call) for part in ast.walk(node)):
            if not isinstance(node, ast.Name):
                self._set(node, done)
            return
        if isinstance(node, ast.Subscript | ast.Attribute) and root in self.constants:
            return
        for name in self.roots(node) - self.constants:
            done.changes |= self.related(name) if deep else {name} | self.same(name)

    def _all_changed(self, arguments: Iterable[ast.expr], done: _Done) -> None:
        """Note that the objects behind arguments are changed, functions and parts of configurations left out."""
        for argument in arguments:
            match argument:
                case ast.Lambda():
                    continue
                case ast.Name(name) if name in self.classes or (name in self.functions and name not in self.holds):
                    continue
                case ast.Attribute() | ast.Subscript() if root_of(argument) in self.records:
                    continue
                case ast.Attribute(attr="shape" | "dtype" | "device" | "ndim"):
                    continue
                case ast.Name(name) if name in self.imports:
                    continue
            self._changed(argument, done)

    def _set(self, node: ast.expr, done: _Done) -> None:
        """Note that something is set in a module."""
        root = root_of(node)
        if root is None:
            return
        done.changes.add(root)
        if self.imports.get(root, "").partition(".")[0] in _idioms.OF_THE_PROCESS:
            done.changes.add(_idioms.SETTINGS)

    # Functions and classes of the notebook.

    def _functions_of(self, value: ast.expr) -> tuple[Function, ...]:
        """Return the functions of the notebook that an expression may stand for."""
        match value:
            case ast.Name():
                return self.functions.get(value.id, ())
            case ast.Lambda():
                return (Function(value, nested=self.notebook is not None),)
            case ast.IfExp():
                return (*self._functions_of(value.body), *self._functions_of(value.orelse))
            case ast.Attribute() if not self._is_attribute(value):
                known = [k for k in self.kinds(value.value) if k.startswith("<")]
                return tuple(replace(one, closed=True) for k in known for one in self._methods(k[1:-1], value.attr))
            case ast.Call() if self.callee(value) == "functools.partial" and value.args:
                return tuple(replace(one, closed=True) for one in self._functions_of(value.args[0]))
            case ast.Call():
                found: list[Function] = []
                for function, first in self._called(value):
                    summary = self._summary(function, function.bound(value, first))
                    found += summary.functions
                    found += [replace(function, closed=True)] if summary.generates else []
                return tuple(found)
        return ()

    def _called(self, call: ast.Call) -> list[tuple[Function, ast.expr | None]]:
        """Return the functions of the notebook that a call may call, and for methods their object."""
        if isinstance(call.func, ast.Attribute):
            return [(function, call.func.value) for function in self._methods_of(call.func)]
        if dotted(call.func) in self.classes:
            return []
        return [(function, None) for function in self._functions_of(call.func)]

    def _methods_of(self, func: ast.Attribute) -> list[Function]:
        """Return the methods of the notebook's classes that an attribute may be."""
        found: list[Function] = []
        kinds = self.kinds(func.value)
        for kind in kinds:
            if kind.startswith("<"):
                found += self._methods(kind[1:-1], func.attr)
        if kinds & UNKNOWN and root_of(func) not in self.imports and not self._is_attribute(func):
            # Of whom nobody knows, any class may be.
            found += [one.methods[func.attr] for one in self.classes.values() if func.attr in one.methods]
        return list({one.node: one for one in found}.values())

    def _methods(self, name: str, method: str) -> list[Function]:
        """Return a method of a class of the notebook, of itself or of its bases."""
        known = self.classes.get(name)
        if known is None:
            return []
        if method in known.methods:
            return [known.methods[method]]
        return [one for base in known.bases if base != name for one in self._methods(base, method)]

    def _bases(self, name: str) -> list[str]:
        """Return the classes of libraries that a class is derived from."""
        found = []
        for base in self.classes[name].bases if name in self.classes else []:
            first, dot, rest = base.partition(".")
            if base in self.classes and base != name:
                found += self._bases(base)
            elif first in self.imports:
                found.append(f"{self.imports[first]}{dot}{rest}")
        return found

    def _is_attribute(self, node: ast.Attribute) -> bool:
        """Tell whether an attribute of an object of the notebook's classes has been assigned to, and is no method."""
        if ast.unparse(node) in self.made:
            return True
        return any(node.attr in self._attributes(kind[1:-1]) for kind in self.kinds(node.value) if kind[0] == "<")

    def kinds_of_attribute(self, node: ast.Attribute) -> frozenset[str]:
        """Return what may have made an attribute of an object."""
        found = self.made.get(ast.unparse(node), frozenset())
        for kind in self.kinds(node.value):
            if kind.startswith("<"):
                found |= self._attributes(kind[1:-1]).get(node.attr, frozenset())
        return found or UNKNOWN

    def _attributes(self, name: str) -> dict[str, frozenset[str]]:
        """Return what may have made the attributes of objects of a class."""
        known = self.classes.get(name)
        if known is None:
            return {}
        if known.node in self._known.attributes:
            return self._known.attributes[known.node]
        found: dict[str, frozenset[str]] = {}
        self._known.attributes[known.node] = {}
        before = self._known.summaries.copy()
        for base in known.bases:
            found |= self._attributes(base) if base != name else {}
        itself = ast.Call(ast.Name(name, ast.Load()), [], [])
        # What a method says of them may depend on what another one says.
        for _ in range(2):
            for function in known.methods.values():
                bound = [(function.parameters[0], itself)] if function.parameters else []
                for attribute, kinds in self._summary(function, bound).attributes:
                    found[attribute] = found.get(attribute, frozenset()) | kinds
            for part in known.node.body:
                if isinstance(part, ast.Assign):
                    for target in part.targets:
                        if isinstance(target, ast.Name):
                            found[target.id] = found.get(target.id, frozenset()) | self.kinds(part.value)
            self._known.attributes[known.node] = found
            # These have been read before all of it was known.
            self._known.summaries.clear()
            self._known.summaries.update(before)
        return found

    def kinds_returned(self, call: ast.Call) -> frozenset[str]:
        """Return what may have made the result of a function of the notebook."""
        called = self._called(call)
        found = (self._summary(one, one.bound(call, first)).kinds for one, first in called)
        return frozenset().union(*found) if called else UNKNOWN

    def held_returned(self, call: ast.Call) -> frozenset[str] | None:
        """Return the names that the result of a function of the notebook may consist of; None if it is none."""
        called = self._called(call)
        if not called:
            return None
        found: set[str] = set()
        for function, first in called:
            bound = [*function.bound(call, first)]
            returns = self._summary(function, bound).returns
            found |= self.all_held([value for name, value in bound if name in returns])
            for name in returns - set(function.all_parameters):
                inside = self._as_seen_here(name, function)
                found |= {inside} | self.holds.get(inside, frozenset())
            if function.closed:
                found |= self.held(call.func) | self.all_held(arguments_of(call))
        if isinstance(call.func, ast.Attribute) and self.kinds(call.func.value) & UNKNOWN:
            found |= self.held(call.func.value) | self.all_held(arguments_of(call))
        return frozenset(found)

    def _as_seen_here(self, name: str, function: Function) -> str:
        """Return what a name of the notebook is called here, where a variable of a function may hide it."""
        hidden = self.notebook is not None and not function.nested and function.home is None and name in self.local
        return HIDDEN + name if hidden else name

    def _summary(self, function: Function, bound: Sequence[tuple[str, ast.expr]]) -> _Summary:
        """Read a function for what a call of it does, given what is known now, here, and of its arguments."""
        kinds: dict[str, frozenset[str]] = {}
        functions: dict[str, tuple[Function, ...]] = {}
        for name, value in bound:
            kinds[name] = kinds.get(name, frozenset()) | self.kinds(value)
            functions[name] = (*functions.get(name, ()), *self._functions_of(value))
        given = {(name, kind) for name, ones in kinds.items() for kind in ones}
        key = function.node, frozenset(given), frozenset((n, one.node) for n, ones in functions.items() for one in ones)
        known = self._known
        if key in known.summaries:
            known.again |= {key} & set(known.open)
            return known.summaries[key]
        if len(known.open) >= _DEEP:
            everything = frozenset(function.all_parameters)
            return _Summary(changed=everything, called=everything, returns=everything, kinds=UNKNOWN)
        # A function that calls itself is read until what is known of it does not change any more.
        before, summary = known.summaries.copy(), _Summary()
        known.open.append(key)
        for _ in range(_ROUNDS):
            known.summaries.clear()
            known.summaries.update({**before, key: summary})
            last, summary = summary, self._body(function, kinds, functions)
            if summary == last or key not in known.again:
                break
        known.open.pop()
        known.again.discard(key)
        known.summaries[key] = summary
        return summary

    def _body(
        self, function: Function, kinds: dict[str, frozenset[str]], functions: dict[str, tuple[Function, ...]]
    ) -> _Summary:
        """Read the body of a function once."""
        node, notebook = function.node, self.notebook or self
        body = [ast.Expr(node.body)] if isinstance(node, ast.Lambda) else node.body
        shared = {n for one in ast.walk(node) if isinstance(one, ast.Global | ast.Nonlocal) for n in one.names}
        parameters = frozenset(function.all_parameters)
        local = (frozenset().union(*map(stored, body)) - shared) | parameters
        base = function.home if isinstance(function.home, Flow) else self if function.nested else notebook
        flow = base.copy()
        flow.notebook, flow._known, flow.local = notebook, self._known, set(local)
        flow.hide(local)
        if function.owner:
            flow.inside = function.owner, (function.parameters or ("",))[0]
        defaults = function.defaults()
        for name in parameters:
            flow.made[name] = kinds.get(name) or (notebook.kinds(defaults[name]) if name in defaults else UNKNOWN)
            if functions.get(name):
                flow.functions[name] = functions[name]
        done = _Done()
        flow._block(body, done)
        returned = [
            n.value for n in ast.walk(node) if isinstance(n, ast.Return | ast.Yield | ast.YieldFrom) and n.value
        ]
        returned += [node.body] if isinstance(node, ast.Lambda) else []
        generates = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(node))
        changes = {_without_gradient(name) for name in done.changes} - {_idioms.SETTINGS}
        first = f"{function.parameters[0]}." if function.parameters else ""
        return _Summary(
            changed=frozenset(changes & parameters),
            called=frozenset(done.called & parameters),
            outside=_outside(changes, local) | frozenset(shared),
            draws=frozenset(done.draws),
            seeds=frozenset(done.seeds),
            settings=_idioms.SETTINGS in done.changes,
            returns=_outside(flow.all_held(returned), local - parameters) | (parameters if generates else frozenset()),
            kinds=frozenset().union(*map(flow.kinds, returned)),
            functions=tuple(
                replace(one, closed=True, home=flow if one.nested else one.home)
                for value in returned
                for one in flow._functions_of(value)
            ),
            attributes=tuple(
                (key.removeprefix(first), ones) for key, ones in flow.made.items() if first and key.startswith(first)
            ),
            generates=generates,
        )


@dataclass
class _Done:
    """What has been seen of a statement so far."""

    changes: set[str] = field(default_factory=set)
    reads: set[str] = field(default_factory=set)
    draws: set[str] = field(default_factory=set)
    seeds: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)


_BUILTIN = frozenset(dir(builtins)) | {"display"}

# How many functions deep calls are followed, and how often a function is read that calls itself.
_DEEP = 20
_ROUNDS = 4


def _outside(names: Iterable[str], local: Collection[str]) -> frozenset[str]:
    """Return those of names that are not a function's own, as they are called outside of it."""
    return frozenset(name.removeprefix(HIDDEN) for name in names if name not in local)


def _without_gradient(name: str) -> str:
    return name.removeprefix("<gradient of ").removesuffix(">") if name.startswith("<gradient of ") else name


def _unused(node: ast.expr | None) -> Iterator[ast.expr]:
    """Yield the parts of a statement that is an expression whose values nobody uses."""
    match node:
        case ast.Await():
            yield from _unused(node.value)
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
            yield from _unused(node.elt)
        case ast.Tuple() | ast.List():
            for part in node.elts:
                yield from _unused(part)
        case ast.BoolOp():
            yield from _unused(node.values[-1])
        case ast.IfExp():
            yield from _unused(node.body)
            yield from _unused(node.orelse)
        case ast.Call():
            yield node
            if dotted(node.func) in ("list", "tuple", "set", "any", "all", "sum", "deque"):
                for part in node.args:
                    yield from _unused(part)


def _gradient(name: str) -> str:
    return f"<gradient of {name}>"


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
