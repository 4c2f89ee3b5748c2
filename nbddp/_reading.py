"""What calls of a notebook's functions and methods do: their text is read when they are called.

With what is known then, and of the arguments: a function that stands below its caller, a method of an object that
another function has made, a model that is a parameter.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from nbddp import _idioms
from nbddp._cells import dotted
from nbddp._objects import HIDDEN, UNKNOWN, Function, Objects, arguments_of, root_of, stored

# How many functions deep calls are followed, and how often a function is read that calls itself.
_DEEP = 20
_ROUNDS = 4


@dataclass(frozen=True)
class Summary:
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
class Known:
    """What functions and classes do that a statement uses: they are read anew for each.

    Attributes:
        summaries: For each function, and what is known of its arguments, what a call of it does.
        attributes: For each class what may have made the attributes of its objects.
        open: The functions that are being read, each called by another.
        again: Those of them that have been called again meanwhile.
    """

    summaries: dict[Hashable, Summary] = field(default_factory=dict)
    attributes: dict[ast.ClassDef, dict[str, frozenset[str]]] = field(default_factory=dict)
    open: list[Hashable] = field(default_factory=list)
    again: set[Hashable] = field(default_factory=set)


@dataclass
class Done:
    """What has been seen of a statement so far."""

    changes: set[str] = field(default_factory=set)
    reads: set[str] = field(default_factory=set)
    draws: set[str] = field(default_factory=set)
    seeds: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)


@dataclass
class Reading(Objects):
    """What is known of the notebook's names, its functions and classes included.

    Attributes:
        notebook: What is known outside of the function that is read; None outside of functions.
        inside: The class whose method is read, and what the method calls its object.
    """

    notebook: Reading | None = None
    inside: tuple[str, str] | None = None
    # Functions are read when they are called, with what is known then.
    _known: Known = field(default_factory=Known)

    def copy(self) -> Self:
        """Return a copy that can go another way."""
        return type(self)(**self.copied(), notebook=self.notebook, inside=self.inside, _known=self._known)  # type: ignore[arg-type]

    def _block(self, block: Iterable[ast.stmt], done: Done) -> None:
        """Follow statements that run one after the other."""
        raise NotImplementedError

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
        if dotted(call.func) in self.classes:
            return []
        found: list[tuple[Function, ast.expr | None]] = []
        if isinstance(call.func, ast.Attribute):
            found += [(function, call.func.value) for function in self._methods_of(call.func)]
        else:
            found += [(function, None) for function in self._functions_of(call.func)]
        # A model, say: all that is called may be such an object.
        kinds = self.kinds(call.func) if not found else frozenset()
        for kind in kinds:
            if kind.startswith("<"):
                found += [(function, call.func) for function in self._call_methods(kind[1:-1])]
            elif not _idioms.makes_new(kind):
                return []
        return found

    def _call_methods(self, name: str) -> list[Function]:
        """Return the methods of a class that a call of its objects calls."""
        return self._methods(name, "__call__") or self._methods(name, "forward")

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

    def _summary(self, function: Function, bound: Sequence[tuple[str, ast.expr]]) -> Summary:
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
            return Summary(changed=everything, called=everything, returns=everything, kinds=UNKNOWN)
        # A function that calls itself is read until what is known of it does not change any more.
        before, summary = known.summaries.copy(), Summary()
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
    ) -> Summary:
        """Read the body of a function once."""
        node, notebook = function.node, self.notebook or self
        body = [ast.Expr(node.body)] if isinstance(node, ast.Lambda) else node.body
        shared = {n for one in ast.walk(node) if isinstance(one, ast.Global | ast.Nonlocal) for n in one.names}
        parameters = frozenset(function.all_parameters)
        local = (frozenset().union(*map(stored, body)) - shared) | parameters
        base = function.home if isinstance(function.home, Reading) else self if function.nested else notebook
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
        done = Done()
        flow._block(body, done)
        returned = [
            n.value for n in ast.walk(node) if isinstance(n, ast.Return | ast.Yield | ast.YieldFrom) and n.value
        ]
        returned += [node.body] if isinstance(node, ast.Lambda) else []
        generates = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in ast.walk(node))
        changes = {_without_gradient(name) for name in done.changes} - {_idioms.SETTINGS}
        first = f"{function.parameters[0]}." if function.parameters else ""
        return Summary(
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


def _outside(names: Iterable[str], local: Collection[str]) -> frozenset[str]:
    """Return those of names that are not a function's own, as they are called outside of it."""
    return frozenset(name.removeprefix(HIDDEN) for name in names if name not in local)


def _without_gradient(name: str) -> str:
    return name.removeprefix("<gradient of ").removesuffix(">") if name.startswith("<gradient of ") else name
