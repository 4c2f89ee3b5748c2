"""Which names a cell takes from the notebook, and on which lines.

The cell is read in the order in which it runs: a name that it binds itself, on every way to the use, is not taken.
So re-running a cell that makes ``model`` anew does not ship the old one. Inside a statement the compiler decides what
is a global name; no scoping rule is repeated here.
"""

from __future__ import annotations

import ast
import dis
import itertools
import re
import types
from collections.abc import Callable, Iterable, Iterator

# Instructions that read a global name, in a module's or class's own code and in functions; and those that store one.
_LOADS = ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS", "DELETE_NAME", "DELETE_GLOBAL")
_STORES = ("STORE_NAME", "STORE_GLOBAL")
# Their opcodes, with whether they store, and how many bits of the argument are not the name's number.
_OPCODES = {
    dis.opmap[name]: (name in _STORES, int(name == "LOAD_GLOBAL")) for name in (*_LOADS, *_STORES) if name in dis.opmap
}
_LOAD_CONST = dis.opmap["LOAD_CONST"]
_STORE_NAME = dis.opmap["STORE_NAME"]

# What nbddp defines in the ranks where the notebook has no such name.
GIVEN_NAMES = ("rank", "local_rank", "world_size", "device")

# What every module has of its own: not the notebook's to give.
MODULES_OWN = frozenset(
    {"__annotations__", "__builtin__", "__builtins__", "__cached__", "__doc__", "__file__", "__loader__", "__name__"}
    | {"__package__", "__spec__"}
)

# Magics whose argument is Python code.
_CODE_MAGICS = frozenset({"time", "timeit", "prun", "lprun", "mprun", "memit", "pdb", "debug", "capture", "mprof"})

_IDENTIFIER = re.compile(r"[^\W\d]\w*")
# $name and {expression}, as IPython expands them in the line of a magic or a shell command.
_EXPANSION = re.compile(r"\$\{?([^\W\d]\w*)|\{([^{}]*)\}")

# What lets a cell bind names that its text does not show.
_DYNAMIC = frozenset({"exec", "eval", "globals", "locals", "vars", "get_ipython"})

# Context managers that end an exception, by their names: contextlib.suppress, pytest.raises, unittest's assertRaises.
_SWALLOWS = re.compile(r"suppress|raises|ignor|catch|swallow", re.IGNORECASE)


class Uses:
    """The names that a cell takes and binds.

    Attributes:
        taken: Lines on which each name is taken that the cell did not bind before.
        bound: Names that the cell binds somewhere.
        certain: Names that are bound for certain when it has run to its end.
        dynamic: The cell may bind names that its text does not show (``exec``, ``from x import *``, magics).
    """

    def __init__(self, body: list[ast.stmt], transform: Callable[[str], str]) -> None:
        """Read a cell.

        Args:
            body: The parsed cell, after IPython's transformation.
            transform: IPython's transformation, for code inside magics.
        """
        self.taken: dict[str, list[int]] = {}
        self.bound: set[str] = set()
        self.dynamic = False
        self._transform = transform
        self.certain = self._block(body, frozenset())

    def _block(self, body: Iterable[ast.stmt], bound: frozenset[str]) -> frozenset[str]:
        """Read statements that run one after the other; return what is bound for certain afterwards."""
        for stmt in body:
            bound = self._statement(stmt, bound)
        return bound

    def _statement(self, stmt: ast.stmt, bound: frozenset[str]) -> frozenset[str]:
        match stmt:
            case ast.If():
                self._expression(stmt.test, bound)
                return self._block(stmt.body, bound) & self._block(stmt.orelse, bound)
            case ast.While():
                self._expression(stmt.test, bound)
                self._block(stmt.orelse, self._block(stmt.body, bound) & bound)
                return bound
            case ast.For() | ast.AsyncFor():
                self._expression(stmt.iter, bound)
                self._block(stmt.body, bound | self._target(stmt.target, bound))
                self._block(stmt.orelse, bound)
                return bound
            case ast.With() | ast.AsyncWith():
                for item in stmt.items:
                    self._expression(item.context_expr, bound)
                    if item.optional_vars is not None:
                        bound |= self._target(item.optional_vars, bound)
                inside = self._block(stmt.body, bound)
                # What goes on after an exception in the middle has bound what it has bound.
                return bound if any(_SWALLOWS.search(ast.unparse(item.context_expr)) for item in stmt.items) else inside
            case ast.Try() | ast.TryStar():
                inside = self._block(stmt.body, bound)
                for handler in stmt.handlers:
                    if handler.type is not None:
                        self._expression(handler.type, bound)
                    name = frozenset({handler.name}) if handler.name else frozenset()
                    self.bound |= name
                    inside &= self._block(handler.body, bound | name)
                self._block(stmt.orelse, inside)
                return self._block(stmt.finalbody, bound) | inside
            case ast.Match():
                # Alone, its `break` would be a syntax error.
                self._simple(ast.fix_missing_locations(ast.While(ast.Constant(True), [stmt], [])), bound)
                return bound
            case ast.Break() | ast.Continue() | ast.Pass():
                return bound
            case _:
                return self._simple(stmt, bound)

    def _simple(self, stmt: ast.stmt, bound: frozenset[str]) -> frozenset[str]:
        """Read a statement that runs whole or not at all."""
        if isinstance(stmt, ast.ImportFrom) and any(alias.name == "*" for alias in stmt.names):
            self.dynamic = True
        stored = self._code(ast.Module([stmt], []), bound)
        if "get_ipython" in self.taken or "get_ipython" in self.bound:
            for node in ast.walk(stmt):
                if isinstance(node, ast.Call):
                    self._magic(node, bound)
        if isinstance(stmt, ast.Delete):
            return bound - {node.id for node in stmt.targets if isinstance(node, ast.Name)}
        return bound | stored

    def _expression(self, node: ast.expr, bound: frozenset[str]) -> None:
        self._simple(ast.copy_location(ast.Expr(node), node), bound)

    def _target(self, node: ast.expr, bound: frozenset[str]) -> frozenset[str]:
        """Read what a loop or a `with` assigns to; return the names that it binds."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                self._expression(part, bound)
        names = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        self.bound |= names
        return names

    def _code(self, module: ast.Module, bound: frozenset[str]) -> frozenset[str]:
        """Record the global names of a piece of code; return those that it binds at its own top level."""
        # Without the future of this module, in which annotations are text.
        code = compile(module, "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        stored: set[str] = set()
        for depth, name, stores, line in globals_of(code):
            if stores:
                self.bound.add(name)
                if depth == 0:
                    stored.add(name)
            elif name in _DYNAMIC:
                self.dynamic = True
            # A statement's own code runs in order; what is nested in it may run before the statement has stored.
            if not stores and name not in MODULES_OWN and name not in bound and not (depth == 0 and name in stored):
                lines = self.taken.setdefault(name, [])
                if line not in lines:
                    lines.append(line)
        return frozenset(stored)

    def _magic(self, call: ast.Call, bound: frozenset[str]) -> None:
        """Record the names in the text that a magic or a shell command is given."""
        if not (isinstance(call.func, ast.Attribute) and _is_get_ipython(call.func.value)):
            return
        texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        names: set[str] = set()
        for text in texts:
            for name, expression in _EXPANSION.findall(text):
                names.update([name] if name else _IDENTIFIER.findall(expression))
        if texts and call.func.attr in ("run_line_magic", "run_cell_magic") and texts[0] in _CODE_MAGICS:
            if call.func.attr == "run_cell_magic" and len(texts) == 3:
                self._nested_cell(texts[2], call.lineno, bound)
            names.update(_IDENTIFIER.findall(texts[1]) if len(texts) > 1 else ())
        for name in names - bound:
            self.taken.setdefault(name, []).append(call.lineno)

    def _nested_cell(self, text: str, line: int, bound: frozenset[str]) -> None:
        """Read the body of a cell magic that runs it as Python."""
        try:
            body = ast.parse(self._transform(text)).body
        except SyntaxError:  # the magic will say so itself
            return
        for stmt in body:
            ast.increment_lineno(stmt, line)
        self._block(body, bound)


def globals_of(code: types.CodeType, depth: int = 0) -> Iterator[tuple[int, str, bool, int]]:
    """Yield (nesting depth, name, is it stored, line) for the global names of a code object, inner ones included."""
    # A class body reads its own names by the instruction that reads global ones; what it has stored is its own.
    own: set[str] = set()
    in_class = depth > 0 and not code.co_flags & 0x02  # CO_NEWLOCALS
    # What dis does for people takes six times as long, and each cell waits for this. A test holds both to agree.
    units, high = code.co_code, 0
    # Made by other programs, code may have no lines.
    positions = itertools.chain(code.co_positions(), itertools.repeat((None,)))
    for opcode, low, position in zip(units[::2], units[1::2], positions, strict=False):
        argument = high | low
        high = argument << 8 if opcode == dis.EXTENDED_ARG else 0
        if opcode in _OPCODES:
            stores, shift = _OPCODES[opcode]
            name, line = code.co_names[argument >> shift], position[0] or code.co_firstlineno
            if in_class and opcode == _STORE_NAME:
                own.add(name)
            elif stores or name not in own:
                yield depth, name, stores, line
        elif opcode == _LOAD_CONST and isinstance(inner := code.co_consts[argument], types.CodeType):
            yield from globals_of(inner, depth + 1)


def _is_get_ipython(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "get_ipython"
