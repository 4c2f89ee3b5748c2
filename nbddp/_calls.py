"""What calls change and draw: of the notebook's functions, of libraries, of Python's own, of objects.

A call of what nobody knows counts as changing it, what it holds, and its arguments.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nbddp import _idioms
from nbddp._cells import dotted, immediate
from nbddp._objects import UNKNOWN, Function, arguments_of, root_of, stored
from nbddp._reading import Done, Reading, Summary

_BUILTIN = frozenset(dir(builtins)) | {"display"}


@dataclass
class Calls(Reading):
    """What is known of the notebook's names, and what calls make of it."""

    def _assign(self, target: ast.expr, value: ast.expr, done: Done, *, again: bool = False) -> None:
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

    def _element(self, node: ast.expr) -> ast.expr:
        """Return an expression for an element of what is iterated over."""
        return node if self.is_constant(node) else ast.Subscript(node, ast.Constant(0), ast.Load())

    def _calls(self, node: ast.AST, done: Done, unused: ast.expr | None = None) -> None:
        """Follow the calls in a statement or an expression."""
        parts = immediate(node)
        nobodys = set(_unused(unused))
        comprehended = [part for part in parts if isinstance(part, ast.comprehension)]
        before = self.copy() if comprehended else None
        for _ in range(len(comprehended)):
            for clause in comprehended:
                self._iterate(clause.iter, done)
                self._assign(clause.target, self._element(clause.iter), Done())
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

    def _restore(self, names: Iterable[str], before: Calls) -> None:
        self.forget(names)
        for name in names:
            for table in ("imports", "functions", "classes", "holds", "gradients", "late"):
                if name in getattr(before, table):
                    getattr(self, table)[name] = getattr(before, table)[name]
            for claim in ("constants", "shown", "records"):
                if name in getattr(before, claim):
                    getattr(self, claim).add(name)
            self.made |= {key: kinds for key, kinds in before.made.items() if key.partition(".")[0] == name}

    def _call(self, call: ast.Call, done: Done, *, unused: bool) -> None:
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
        self, name: str, call: ast.Call, arguments: Sequence[ast.expr], done: Done, unused: bool
    ) -> None:
        """Follow a call of a function of Python's own."""
        if name == "next" and call.args:
            # It is the iterator that goes on; what it goes through stays as it is.
            root = root_of(call.args[0]) if not isinstance(call.args[0], ast.Call) else None
            if root is not None and root not in self.constants:
                done.changes |= {root} | {other for other, held in self.holds.items() if root in held}
        elif name in ("setattr", "delattr") and call.args:
            self._changed(call.args[0], done)
            if len(call.args) == 3 and (root := root_of(call.args[0])):
                self.holds[root] = self.holds.get(root, frozenset()) | self.held(call.args[2]) - {root}
        elif name == "exec":
            done.changes |= {_idioms.SETTINGS} if unused else set()
        if name not in _idioms.LOOK:
            for argument in arguments:
                self._iterate(argument, done)

    def _construct(self, name: str, call: ast.Call, done: Done) -> None:
        """Follow the making of an object of a class of the notebook."""
        for method in ("__new__", "__init__", "__post_init__", "reset_parameters"):
            for function in self._methods(name, method):
                self._call_of_function(function, call, done, first=call, fresh=True)
        for base in self._bases(name):
            done.draws |= _idioms.drawn_by(base, base.rpartition(".")[2])

    def _call_of_object(self, func: ast.expr, call: ast.Call, arguments: Sequence[ast.expr], done: Done) -> None:
        """Follow a call of an object: of a model, as a rule."""
        kinds = self.kinds(func)
        for kind in kinds or UNKNOWN:
            if kind.startswith("<"):
                methods = self._call_methods(kind[1:-1])
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

    def _call_of_unknown(self, func: ast.expr, arguments: Sequence[ast.expr], done: Done) -> None:
        """Follow a call of what may do anything to itself, to what it holds, and to its arguments."""
        self._changed(func, done)
        self._all_changed(arguments, done)
        done.called |= self.roots(func)
        self._call_what_is_held(func, done)

    def _call_what_is_held(self, node: ast.expr, done: Done) -> None:
        """Follow calls of the functions that an object holds, with arguments that nobody knows."""
        for root in self.roots(node):
            for part in self.parts(root):
                for function in self.functions.get(part, ()):
                    self._call_of_function(function, None, done)

    def _call_back(self, call: ast.Call, arguments: Sequence[ast.expr], done: Done) -> None:
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
        self, call: ast.Call, callee: str, arguments: Sequence[ast.expr], done: Done, unused: bool
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
        done: Done,
        first: ast.expr | None = None,
        *,
        fresh: bool = False,
    ) -> Summary:
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
        self, call: ast.Call, func: ast.Attribute, arguments: Sequence[ast.expr], done: Done, unused: bool
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

    def _call_of_super(self, call: ast.Call, method: str, done: Done) -> None:
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

    def _draws_of_method(self, method: str, kinds: frozenset[str], call: ast.Call, done: Done) -> None:
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

    def _iterate(self, node: ast.expr, done: Done) -> None:
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

    def _special(self, node: ast.expr, names: Sequence[str], done: Done) -> None:
        """Follow the methods that Python itself calls."""
        for kind in self.kinds(node):
            if kind.startswith("<"):
                for name in names:
                    for function in self._methods(kind[1:-1], name):
                        self._call_of_function(function, ast.Call(node, [], []), done, first=node)

    def _changed(self, node: ast.expr, done: Done, *, deep: bool = True) -> None:
        """Note that the object behind an expression is changed."""
        if (root := root_of(node)) in self.imports and not any(isinstance(part, ast.Call) for part in ast.walk(node)):
            if not isinstance(node, ast.Name):
                self._set(node, done)
            return
        if isinstance(node, ast.Subscript | ast.Attribute) and root in self.constants:
            return
        for name in self.roots(node) - self.constants:
            done.changes |= self.related(name) if deep else {name} | self.same(name)

    def _all_changed(self, arguments: Iterable[ast.expr], done: Done) -> None:
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

    def _set(self, node: ast.expr, done: Done) -> None:
        """Note that something is set in a module."""
        root = root_of(node)
        if root is None:
            return
        done.changes.add(root)
        if self.imports.get(root, "").partition(".")[0] in _idioms.OF_THE_PROCESS:
            done.changes.add(_idioms.SETTINGS)


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
