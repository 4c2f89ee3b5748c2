"""A ``%%ddp`` cell becomes a script: from a notebook's file, or from the session of a live kernel.

::

    cells ──> statements ──> those that are needed ──> script                  ──> files
    _notebook _cells         _effects, _needed         _standalone, _imports     _files

What a file cannot tell, the values that names have, a live kernel saves beside the script (`_values`).
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbddp import _cells, _chains, _needed, _notebook, _standalone
from nbddp._cells import Cell, Piece, Transform
from nbddp._errors import ExportError
from nbddp._files import Files, check_target
from nbddp._names import GIVEN_NAMES, Uses
from nbddp._needed import Needed, State
from nbddp._option_line import HelpAsked, parse
from nbddp._options import OptionError, Options
from nbddp._standalone import CannotExport, Origin, Saved, Script

# A magic that changes what the cells below find, and whose counterpart is a command that somebody has to run.
_COMMAND = re.compile(r"!|%(pip|conda|mamba|uv|cd|run|pylab|store)\b|%%(bash|sh|script|writefile|pylab)\b")

_EXPANSION = re.compile(r"\{(\w+)\}|\$(\w+)")

# IPython's names for what cells have shown or were.
_HISTORY = re.compile(r"_+$|_\d+$|_i+$|_i\d+$|_o?h$|_dh$|In$|Out$")


@dataclass(frozen=True)
class Exported:
    """A script that has been written.

    Attributes:
        path: Its file; None if it was only asked for as text.
        text: What is in it.
        command: The command line that runs it.
        values: The file beside it that holds values of the notebook; None if there is none.
        missing: Names whose values are still to be supplied.
        notes: What its user should know, a sentence each.
    """

    path: str | None
    text: str
    command: str
    values: str | None = None
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Session:
    """What a live kernel knows.

    Attributes:
        namespace: Its user's names, and their values.
        hidden: What of it is IPython's own.
        defaults: The options that hold where a ``%%ddp`` line says nothing else.
    """

    namespace: Mapping[str, Any]
    hidden: Mapping[str, Any]
    defaults: str = ""

    def has(self, name: str) -> bool:
        """Tell whether the user has given a name a value."""
        if name not in self.namespace:
            return False
        nothing = object()
        return _HISTORY.match(name) is not None or self.namespace[name] is not self.hidden.get(name, nothing)


@dataclass
class _Job:
    """One export.

    Attributes:
        cells: All cells.
        chosen: The position of the ``%%ddp`` cell among them.
        notebook: What to call the notebook.
        folder: Where it finds modules of its own.
        output: Where the script goes; ``-`` for nowhere.
        transform: IPython's transformation of a cell into Python.
        session: The live kernel; None if there is only a file.
        notes: What its user should know.
    """

    cells: Sequence[Cell]
    chosen: int
    notebook: str
    folder: str
    output: str
    transform: Transform
    session: Session | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        return f"cell {self.cells[self.chosen].label}"


def from_file(path: str, cell: str | None = None, output: str | None = None, *, force: bool = False) -> Exported:
    """Write a cell of a notebook's file as a script.

    Args:
        path: The notebook's file.
        cell: The number that the notebook shows beside the cell, or a tag of it; None for the only one.
        output: The script's file; None for the notebook's name, ending in ``.py``; ``-`` to write none.
        force: Whether to replace a file that is there.

    Raises:
        ExportError: The message says what failed; nothing has been written.
    """
    from IPython.core.inputtransformer2 import TransformerManager

    cells = _chains.sent(_notebook.read(path))
    if output is None:
        output = f"{os.path.splitext(path)[0]}.py"
    chosen = _notebook.chosen(cells, cell, path)
    folder = os.path.dirname(os.path.abspath(path))
    job = _Job(cells, chosen, os.path.basename(path), folder, output, TransformerManager().transform_cell)
    return _export(job, force=force)


def from_session(
    cells: Sequence[Cell],
    session: Session,
    transform: Transform,
    cell: str | None = None,
    output: str | None = None,
    *,
    force: bool = False,
) -> Exported:
    """Write a cell that a live kernel has run as a script.

    Args:
        cells: The cells in the order in which they ran.
        session: What the kernel knows.
        transform: IPython's transformation of a cell into Python.
        cell: The number that the notebook shows beside the cell; None for the last ``%%ddp`` cell.
        output: The script's file; None for ``train.py``; ``-`` to write none.
        force: Whether to replace a file that is there.

    Raises:
        ExportError: The message says what failed; nothing has been written.
    """
    found = [i for i, one in enumerate(cells) if one.ddp is not None]
    if not found:
        raise ExportError("%ddp export: no %%ddp cell has run yet in this session")
    if cell is None:
        chosen = found[-1]
    elif not cell.isdigit():
        raise ExportError(
            f"%ddp export --cell {cell}: a live session knows cells by number, as in --cell {cells[found[-1]].number}; "
            f"for a tag, save the notebook and run nbddp export NOTEBOOK.ipynb --cell {cell}"
        )
    else:
        chosen = _notebook.numbered(cells, int(cell), f"%ddp export --cell {cell}", "this session")
    # A cell that was run again starts again: what its own earlier runs have brought back is not where it began.
    source = cells[chosen].source
    options = _chains.options_of(cells[chosen])
    # Kept ranks go on where the runs before have left them.
    again = [] if options is not None and options.keep else [one for one in cells[:chosen] if one.source == source]
    kept = [one for i, one in enumerate(cells) if i == chosen or one.ddp is None or one not in again]
    job = _Job(kept, kept.index(cells[chosen]), "a notebook", os.getcwd(), output or "train.py", transform, session)
    if again:
        job.notes.append(f"{job.place} ran before; the script begins as it did at first")
    return _export(job, force=force)


def _export(job: _Job, *, force: bool) -> Exported:
    """Write the script, and what belongs beside it."""
    path = None if job.output == "-" else os.path.abspath(os.path.expanduser(job.output))
    if path is not None:
        check_target(path, force=force)
    found = job.cells[job.chosen].ddp
    assert found is not None
    line, _ = found
    above = _above(job)
    options = _options(job, line, above)
    body = _body(job)
    if options.keep:
        options, above, body = _with_kept(job, options, above, body)
    tree = [piece.node for piece in body if piece.text]
    uses = Uses(tree, job.transform)
    _check_wanted(job, options, uses)
    given = _given(job, above)
    needed, saved, values = _collect(job, above, uses, given)
    ran = dict.fromkeys(piece.magic.split("\n")[0] for piece in above if _COMMAND.match(piece.magic))
    script = Script(
        Origin(job.notebook, job.cells[job.chosen].label, line, tuple(ran)),
        path or "train.py",
        options,
        needed,
        body,
        uses,
        given,
        saved,
        job.transform,
        lambda name: _is_local(name, job.folder),
    )
    if values and path is None:
        raise ExportError(
            f"{', '.join(values)} would have to be saved beside the script; give it a file, by -o train.py"
        )
    written = Files(path, force=force)
    with written:
        if values:
            plain = written.values(values)
            script.saved = replace(saved, plain=plain)
        try:
            text = script.text()
            compile(text, "train.py", "exec", dont_inherit=True)
        except CannotExport as error:
            raise ExportError(str(error)) from None
        except SyntaxError as error:
            raise ExportError(
                f"{job.place} would become a script that is no Python ({error.msg}, line {error.lineno}); that is a "
                "fault of nbddp's, please report it with the cell"
            ) from None
        written.script(text)
    _note(job, script, saved, path)
    return Exported(
        path,
        text,
        _standalone.command(options, path or "train.py"),
        written.values_path if values else None,
        tuple(sorted(saved.missing)),
        tuple(job.notes),
    )


def _above(job: _Job) -> list[Piece]:
    """Return the statements of the cells above the chosen one; of other ``%%ddp`` cells, what they brought back."""
    found: list[Piece] = []
    for position, cell in enumerate(job.cells[: job.chosen]):
        if cell.ddp is not None:
            options = _chains.options_of(cell)
            if options is None:  # it has brought nothing back
                continue
            names = frozenset((*options.out, *options.gather))
            why = f"brought back by the %%ddp cell {cell.label}"
            found.append(Piece(_cells.nothing(), "", cell=position, state=why, binds=names))
            continue
        try:
            found += [_pulled(piece) for piece in _cells.pieces(cell, job.transform, position)]
        except SyntaxError as error:  # it has never run
            job.notes.append(f"cell {cell.label} was left out: {error.msg}, line {error.lineno}")
    return found


def _pulled(piece: Piece) -> Piece:
    """Return a statement; of ``%ddp pull``, with the names that it binds."""
    if piece.magic.split()[:2] != ["%ddp", "pull"]:
        return piece
    return replace(piece, state=f"brought back by {piece.magic}", binds=_chains.pulled(piece.magic))


def _options(job: _Job, line: str, above: Sequence[Piece]) -> Options:
    """Read the options of the cell."""
    if job.session is None:
        line = _EXPANSION.sub(lambda match: _constant(match[1] or match[2], above) or match[0], line)
    try:
        return parse(line, job.session.defaults if job.session is not None else "")
    except HelpAsked:
        raise ExportError(f"{job.place} only asks for help: %%ddp {line}") from None
    except OptionError as error:
        raise ExportError(f"{job.place}, %%ddp {line}: {error}") from None


def _constant(name: str, above: Sequence[Piece]) -> str | None:
    """Return what a name stands for in the options, if a cell above says it in so many words."""
    for piece in reversed(above):
        node = piece.node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return str(node.value.value) if isinstance(node.value, ast.Constant) else None
    return None


def _with_kept(
    job: _Job, options: Options, above: Sequence[Piece], body: list[Piece]
) -> tuple[Options, list[Piece], list[Piece]]:
    """Return the options of a cell that went on in kept ranks, the statements above, and all that ran there."""
    chain = _chains.before(job.cells, job.chosen, above)
    above = _chains.check(job.cells, job.chosen, chain, above, job.transform)
    ones: list[list[Piece]] = []
    for position in chain:
        with contextlib.suppress(SyntaxError):  # it has never run
            ones.append(_chains.body(job.cells[position], job.transform, later=bool(ones)))
    if not ones:
        return options, above, body
    first = _options(job, (job.cells[chain[0]].ddp or ("",))[0], above)
    labels = ", ".join(job.cells[position].label for position in chain)
    job.notes.append(f"{job.place} went on in kept ranks; the script begins with the cells that they ran: {labels}")
    last = [replace(piece, gap=f"\n{piece.gap}") if i == 0 else piece for i, piece in enumerate(body)]
    return _chains.joined(options, first), above, [*(piece for one in ones for piece in one), *last]


def _body(job: _Job) -> list[Piece]:
    try:
        body = _chains.body(job.cells[job.chosen], job.transform)
        compile(
            ast.Module([piece.node for piece in body], []),
            "<cell>",
            "exec",
            ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            dont_inherit=True,
        )
    except SyntaxError as error:
        raise ExportError(f"{job.place} has a syntax error on line {(error.lineno or 0) + 1}: {error.msg}") from None
    if any(piece.magic.startswith("%%") for piece in body):
        raise ExportError(f"{job.place} is no Python: it begins with {body[0].magic}")
    return body


def _check_wanted(job: _Job, options: Options, uses: Uses) -> None:
    for name in (*options.out, *options.gather):
        if name not in uses.bound and name not in uses.taken and not uses.dynamic:
            raise ExportError(f"{job.place}: --out or --gather asks for {name}, which the cell never binds")


def _given(job: _Job, above: Sequence[Piece]) -> frozenset[str]:
    """Return the names that the notebook leaves to nbddp."""
    given = set(GIVEN_NAMES)
    for name in GIVEN_NAMES:
        last = next((p for p in reversed(above) if name in (Uses([p.node], job.transform).certain | p.binds)), None)
        if last is None:
            if job.session is not None and job.session.has(name):
                given.discard(name)
        # "The" GPU of a notebook is each rank's own under %%ddp.
        elif name != "device" or "cuda" not in last.text or "device(" not in last.text:
            given.discard(name)
    return frozenset(given)


def _collect(
    job: _Job, above: Sequence[Piece], uses: Uses, given: frozenset[str]
) -> tuple[Needed, Saved, dict[str, Any]]:
    """Return what the cell needs: statements, and values."""
    session = job.session
    names = set(uses.taken)
    while True:
        needed = _needed.find(
            above, names, job.transform, given=given, alive=session.has if session is not None else lambda _: False
        )
        if any(module.partition(".")[0] == "nbddp" for name, module in needed.flow.imports.items() if name in names):
            raise ExportError(f"{job.place} uses nbddp itself, which its script is to do without")
        states = {one.name: one for one in needed.state}
        states |= {
            name: State(name, _unknown(job, name)) for name in needed.unknown if _is_wanted(job, name, needed, uses)
        }
        values = {n: session.namespace[n] for n in states if session is not None and session.has(n)}
        if not values:
            break
        from nbddp import _values

        contents = [_values.look(name, value, states[name].why) for name, value in values.items()]
        definitions = {name for one in contents for name in one.definitions}
        if definitions <= names:
            break
        names |= definitions
    gpus = sorted({index for one in contents for index in one.gpus}) if values else []
    for name in values:
        _note_if_replaced(job, states[name], above)
    order = sorted(states.values(), key=lambda one: (one.position, one.name))
    saved = Saved(tuple(order), frozenset(states) - frozenset(values), gpus=tuple(gpus))
    return needed, saved, values


def _is_wanted(job: _Job, name: str, needed: Needed, uses: Uses) -> bool:
    """Tell whether a name that no cell above binds has to be supplied."""
    # It binds it itself, in a loop or a branch: as far as a file tells, before it takes it.
    if job.session is None and name in uses.bound:
        return False
    if name == "display":  # has a counterpart
        return False
    if needed.stars and (job.session is None or not job.session.has(name)):
        return False
    # What a live kernel has not either, the cell ran without.
    return job.session is None or job.session.has(name)


def _unknown(job: _Job, name: str) -> str:
    if _HISTORY.match(name):
        return "what a cell has shown"
    for cell in job.cells[job.chosen + 1 :]:
        with contextlib.suppress(SyntaxError):
            text = cell.ddp[1] if cell.ddp is not None else cell.source
            if any(name in Uses([piece.node], job.transform).bound for piece in _cells.python(text, job.transform)):
                return f"bound only below, by cell {cell.label}"
    return "bound by no cell" + ("" if job.session is None else " of this session")


def _note_if_replaced(job: _Job, state: State, above: Sequence[Piece]) -> None:
    """Note a value that is no longer the one that the cell has been given."""
    after = [piece for i, piece in enumerate(above) if i > state.position >= 0]
    bound = any(state.name in Uses([p.node], job.transform).certain | p.binds for p in after)
    found = job.cells[job.chosen].ddp
    options = parse(found[0]) if found else Options()
    if bound or state.name in (*options.out, *options.gather):
        job.notes.append(
            f"{state.name}, which was {state.why}, has been bound anew since; what is saved is what it is now"
        )


def _is_local(name: str, folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, f"{name}.py")) or os.path.isfile(
        os.path.join(folder, name, "__init__.py")
    )


def _note(job: _Job, script: Script, saved: Saved, path: str | None) -> None:
    """Note what the script's user has to do."""
    if saved.missing:
        listed = ", ".join(f"{one.name} ({one.why})" for one in saved.states if one.name in saved.missing)
        job.notes.append(
            f"only a running notebook has {listed}; %ddp export there saves the values, or see the script for where "
            "to supply them"
        )
    modules = script.local_modules
    if modules and path is not None and os.path.dirname(path) != job.folder:
        job.notes.append(f"it imports {', '.join(modules)} from {job.folder}; copy that along")
    if "download=True" in script.source:
        job.notes.append("each rank downloads for itself what the notebook downloaded once; download it before the run")
