"""Cells as statements: each with its own text, as it was typed, and with what of it only a notebook can do.

Text is kept, not made anew from the syntax tree: comments, line breaks and quotes are the author's. Magics are not
Python; those whose argument is Python (``%time``, ``%%capture``) count as that argument, the others are named.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Transform = Callable[[str], str]

# Cell magics whose body is Python that binds the notebook's names, and line magics whose argument is.
_CELL_MAGICS = frozenset({"time", "capture", "prun", "memit", "mprun", "lprun", "debug"})
_LINE_MAGICS = frozenset({"time", "prun", "memit", "mprun", "lprun"})

_MAGIC_LINE = re.compile(r"%%(\w+)[^\S\n]*([^\n]*)(?:\n|$)")

# What asks a person: in a script it would ask on every rank, and nobody answers under torchrun.
_ASKING = frozenset({"input", "getpass", "getpass.getpass"})


@dataclass(frozen=True)
class Piece:
    """A statement of a cell.

    Attributes:
        node: Its syntax tree.
        text: Its source, with the comments right above it; empty if it is a magic.
        gap: What stands between the statement before it and `text`: blank lines, comments that stand alone.
        place: What the notebook calls its cell, for messages.
        cell: The position of its cell among all.
        lines: The first and the last line of the statement in the cell, counted from 1.
        magic: The magic or shell line that it is, as it was typed; or empty.
        state: Why the names that it binds are values that only the notebook has; or empty.
        binds: Names that it binds besides those that its tree shows.
        quiet: Whether a semicolon behind it keeps the notebook from showing its value.
    """

    node: ast.stmt
    text: str
    gap: str = ""
    place: str = ""
    cell: int = 0
    lines: tuple[int, int] = (0, 0)
    magic: str = ""
    state: str = ""
    binds: frozenset[str] = frozenset()
    quiet: bool = False


@dataclass(frozen=True)
class Cell:
    """A code cell of a notebook.

    Attributes:
        source: Its text, the magic line of a ``%%ddp`` cell included.
        number: The number that the notebook shows in brackets; None if it shows none.
        tags: Its tags.
        stopped: The line at which it has failed, 0 if that is not known; None if it has not.
        options: The text behind ``%%ddp``, if something else than the cell's first line is known to say it: with
            ``--auto`` the cell has no such line.
    """

    source: str
    number: int | None = None
    tags: tuple[str, ...] = ()
    stopped: int | None = None
    options: str | None = None

    @property
    def label(self) -> str:
        """What messages call the cell: as the notebook shows it."""
        return f"[{self.number if self.number is not None else ' '}]"

    @property
    def ddp(self) -> tuple[str, str] | None:
        """The text behind ``%%ddp``, and the cell below it; None for cells that ran in the notebook."""
        if self.options is not None and "--auto" in self.options.split():
            return self.options, self.source
        found = _MAGIC_LINE.match(self.source.lstrip("\n"))
        if found is None or found[1] != "ddp":
            return None
        return (found[2].strip() if self.options is None else self.options), self.source.lstrip("\n")[found.end() :]


def pieces(cell: Cell, transform: Transform, position: int = 0) -> list[Piece]:
    """Return the statements of a cell that is not a ``%%ddp`` cell.

    Args:
        cell: The cell.
        transform: IPython's transformation of a cell into Python.
        position: Its position among the cells.

    Raises:
        SyntaxError: It is no Python.
    """
    found = python(cell.source, transform)
    if cell.stopped is not None:
        # What comes after a failure has not run; of the statement that failed, nobody knows how much has.
        failed = f"cell {cell.label} failed while it was made"
        found = [
            replace(piece, state=piece.state or failed) if piece.lines[1] >= cell.stopped else piece
            for piece in found
            if piece.lines[0] <= cell.stopped or not cell.stopped
        ]
    return [replace(piece, place=f"cell {cell.label}", cell=position) for piece in found]


def python(source: str, transform: Transform) -> list[Piece]:
    """Return the statements of a cell's text.

    Raises:
        SyntaxError: It is no Python.
    """
    magic = _MAGIC_LINE.match(source.lstrip("\n"))
    if magic is None:
        return _split(transform(source), transform)
    line, body = magic[0].rstrip("\n"), _below(source)[1]
    if magic[1] not in _CELL_MAGICS:
        return [Piece(nothing(), "", magic=line)]
    above, _ = _below(source)
    inside = [replace(p, lines=(p.lines[0] + above, p.lines[1] + above)) for p in python(body, transform)]
    if magic[1] == "capture" and (words := [word for word in magic[2].split() if not word.startswith("-")]):
        inside.append(Piece(nothing(), "", magic=line, state=f"bound by {line}", binds=frozenset(words[:1])))
    return inside


def _below(source: str) -> tuple[int, str]:
    """Return how many lines a cell magic's line and those above it are, and what stands below."""
    text = source.lstrip("\n")
    _, _, body = text.partition("\n")
    return len(source) - len(text) + 1, body


def shifts(source: str) -> list[int]:
    """Return for each cell magic around a cell's statements by how many lines it shifts them, the outermost first."""
    found = []
    while (magic := _MAGIC_LINE.match(source.lstrip("\n"))) is not None and magic[1] in _CELL_MAGICS:
        above, source = _below(source)
        found.append(above)
    return found


def _split(text: str, transform: Transform) -> list[Piece]:
    tree = compile(text, "<cell>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    assert isinstance(tree, ast.Module)
    lines = text.split("\n")
    found: list[Piece] = []
    done = 0  # lines that earlier statements have taken
    for i, node in enumerate(tree.body):
        first, last = _span(node)
        shares = [n for n in (*tree.body[max(i - 1, 0) : i], *tree.body[i + 1 : i + 2]) if _touch(n, node)]
        begin = first - 1
        while begin > done and lines[begin - 1].lstrip().startswith("#"):
            begin -= 1
        gap = "".join(f"{line}\n" for line in lines[done:begin])
        if shares:
            own = ast.get_source_segment(text, node) or ""
            comments = lines[begin : first - 1] if first > done else []
            typed = "\n".join([*comments, own])
        else:
            typed = "\n".join(lines[begin:last])
        quiet = _ends_in_semicolon("\n".join(lines[begin:last]))
        if quiet and not shares:
            typed = typed.rstrip()[:-1].rstrip()
        found += [replace(p, quiet=quiet) for p in _piece(node, typed, gap, (first, last), transform)]
        done = last
    if rest := "".join(f"{line}\n" for line in lines[done:]).rstrip():
        found.append(Piece(nothing(), "", f"{rest}\n", lines=(done + 1, len(lines))))
    return found


def _ends_in_semicolon(text: str) -> bool:
    """Tell whether a statement's text ends in a semicolon, by which a notebook is told not to show its value."""
    return text.rstrip().endswith(";") and "#" not in text.rsplit("\n", 1)[-1]


def _span(node: ast.stmt) -> tuple[int, int]:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)]), node.end_lineno or node.lineno


def _touch(one: ast.stmt, other: ast.stmt) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return a <= d and c <= b


def _piece(node: ast.stmt, text: str, gap: str, lines: tuple[int, int], transform: Transform) -> list[Piece]:
    typed = magic_of(node)
    if typed is None:
        asks = any(isinstance(n, ast.Call) and dotted(n.func) in _ASKING for n in immediate(node))
        other = any(_is_call_of_shell(n) for n in ast.walk(node))
        state = "typed by a person, at input()" if asks else "made by a magic" if other else ""
        return [Piece(node, text, gap, lines=lines, state=state)]
    name, _, argument = typed.removeprefix("%").partition(" ")
    if typed.startswith("%") and isinstance(node, ast.Expr):
        code = _as_python(name, argument)
        if code is not None:
            try:
                inside = _split(code, transform)
            except SyntaxError:  # an option of the magic
                inside = []
            if inside:
                return [replace(piece, lines=lines, gap="" if i else gap) for i, piece in enumerate(inside)]
    if isinstance(node, ast.Assign):
        names = " = ".join(ast.unparse(target) for target in node.targets)
        typed = f"{names} = {typed}"
        return [Piece(node, "", gap, lines=lines, magic=typed, state=f"bound by {typed}")]
    return [Piece(node, "", gap, lines=lines, magic=typed)]


def _as_python(name: str, argument: str) -> str | None:
    """Return the Python that a line magic comes to; None if it is none."""
    if name in _LINE_MAGICS:
        return argument
    variable, equals, value = argument.partition("=")
    if name == "env" and equals and "{" not in argument and "$" not in argument:
        return f"import os\nos.environ[{quoted(variable.strip())}] = {quoted(value.strip())}"
    return None


def nothing() -> ast.stmt:
    """Return a statement that does nothing, for what is no Python."""
    return ast.parse("pass").body[0]


def quoted(text: str) -> str:
    """Return a string literal, in double quotes where that is possible."""
    return f'"{text}"' if '"' not in text and repr(text)[1:-1] == text else repr(text)


def magic_of(node: ast.stmt) -> str | None:
    """Return the magic or shell line that a statement is, as it was typed; None for others."""
    value = node.value if isinstance(node, ast.Expr | ast.Assign) else None
    if not (isinstance(value, ast.Call) and _is_call_of_shell(value)):
        return None
    assert isinstance(value.func, ast.Attribute)
    words = [arg.value for arg in value.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if len(words) < len(value.args):
        return None
    match value.func.attr:
        case "run_line_magic" if words[0].startswith("pinfo") and len(words) == 2:
            return f"{words[1]}{'?' * len(words[0].removeprefix('pinfo') or '1')}"
        case "run_line_magic" | "magic":
            return f"%{' '.join(words)}".rstrip()
        case "system" | "getoutput":
            return f"!{' '.join(words)}"
        case "run_cell_magic":
            return f"%%{' '.join(words[:2])}".rstrip()
    return None


def _is_call_of_shell(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Call)
        and dotted(node.func.value.func) == "get_ipython"
    )


def dotted(node: ast.AST) -> str:
    """Return ``a.b.c`` for an expression that is that, else an empty string."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            inner = dotted(node.value)
            return f"{inner}.{node.attr}" if inner else ""
    return ""


def immediate(node: ast.AST) -> Sequence[ast.AST]:
    """Return the parts of a statement that run when it runs: all but the bodies of functions that it defines."""
    found: list[ast.AST] = []
    todo: list[ast.AST] = [node]
    while todo:
        one = todo.pop()
        found.append(one)
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [*one.decorator_list, one.args]
        elif isinstance(one, ast.Lambda):
            todo.append(one.args)
        else:
            todo += ast.iter_child_nodes(one)
    return found
