"""``%ddp EXPRESSION``: one line for the ranks, told apart from nbddp's own commands and from their misspellings."""

from __future__ import annotations

import ast
import builtins
import difflib
import io
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbddp import _names
from nbddp._option_line import takes_value
from nbddp._options import OptionError
from nbddp._script import Cell

# The name that an expression's value gets in the ranks: what stands for the last result in a notebook, too.
VALUE = "_"

# What tracebacks call the line.
_FILENAME = "<%ddp>"


@dataclass(frozen=True)
class Expression:
    """An expression that ranks are to evaluate.

    Attributes:
        cell: The cell that assigns its value to `VALUE`.
        taken: The lines on which it takes each name.
    """

    cell: Cell
    taken: Mapping[str, Sequence[int]]


def read(
    text: str,
    known: Iterable[str],
    commands: Sequence[str],
    uses_of: Callable[[list[ast.stmt]], _names.Uses],
    number: int,
) -> Expression:
    """Read what stands behind the options of a ``%ddp`` line.

    Args:
        text: The text.
        known: The names that there are: the notebook's, and those that ranks have of their own.
        commands: nbddp's own commands, for which it may have been meant.
        uses_of: Reads statements.
        number: The execution count of the notebook's cell in which the line stands.

    Raises:
        OptionError: It is no expression, or takes a name that nobody has.
    """
    if not text:
        raise OptionError("there is nothing to evaluate: %ddp [options] EXPRESSION; a cell begins with %%ddp")
    # A comment must not swallow the bracket.
    source = f"{VALUE} = ({text}\n)" if "#" in text else f"{VALUE} = ({text})"
    try:
        body = ast.parse(source).body
        compile(source, _FILENAME, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST, dont_inherit=True)
    except SyntaxError as error:
        hint = _command_meant(text, commands) or "A cell that begins with %%ddp runs statements"
        raise OptionError(f"%ddp {text}: that is no expression ({error.msg}). {hint}") from None
    if len(body) != 1:
        raise OptionError(f"%ddp {text}: that is no expression. A cell that begins with %%ddp runs statements")
    uses = uses_of(body)
    there = {*known, *vars(builtins)}
    for name in uses.taken:
        if name not in there:
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = _command_meant(text, commands) or (
                f"Did you mean {close[0]}?" if close else "%ddp -h lists commands"
            )
            raise OptionError(f"%ddp {text}: the notebook has no variable {name!r}. {hint}")
    return Expression(Cell(source, _FILENAME, number), uses.taken)


def _command_meant(text: str, commands: Sequence[str]) -> str | None:
    """Return a hint if a text begins with what is almost a command."""
    first = re.match(r"\w+", text)
    close = difflib.get_close_matches(first[0], commands, 1, 0.7) if first is not None else []
    return f"Did you mean %ddp {close[0]}?" if close else None


def split(line: str) -> tuple[str, str]:
    """Divide a line into the options at its beginning and what follows them, which is left as it is.

    Raises:
        OptionError: A quotation in the options has no end.
    """
    valued = takes_value()
    at = 0
    while True:
        at += len(line[at:]) - len(line[at:].lstrip())
        if not line.startswith("-", at):
            break
        word, end = _word(line, at)
        name, equals, _ = word.partition("=")
        # Not a negative number, or minus something; but a mistyped option is one.
        if name not in valued and not re.match(r"--[A-Za-z]", name):
            break
        at = end
        if valued.get(name) and not equals:
            word, at = _word(line, at)
            while word.endswith(",") and at < len(line):
                word, at = _word(line, at)
    return line[:at].strip(), line[at:].strip()


def _word(line: str, at: int) -> tuple[str, int]:
    """Return the next word of a line, as a shell divides it, and where it ends."""
    stream = io.StringIO(line[at:])
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        return lexer.get_token() or "", at + stream.tell()
    except ValueError as error:
        raise OptionError(f"{error} in: {line}") from None


def names_of(expression: Expression, *spaces: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an expression takes of these namespaces; the last that has a name wins."""
    return {name: space[name] for space in spaces for name in expression.taken if name in space}
