"""``%%ddp`` and ``%ddp``: what the notebook's user types, and nothing more.

Only this module knows the notebook's shell. It reads the line, prepares the cell or the expression, hands both to
`nbddp._job`, and puts what comes back into the notebook's namespace. What is typed to kept ranks alone is in
`nbddp._kept_commands`.
"""

from __future__ import annotations

import ast
import contextlib
import linecache
import os
import shlex
import sys
import traceback
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, needs_local_scope, no_var_expand
from IPython.utils.text import DollarFormatter
from traitlets import Bool, Float, Int, TraitError, Unicode, validate

from nbddp import (
    _background,
    _cells,
    _closure,
    _commands,
    _expression,
    _job,
    _kept,
    _logs,
    _names,
    _optimizers,
    _settings,
)
from nbddp._background import BackgroundRun, BackgroundScreen
from nbddp._errors import LaunchError, NbddpError, RankError, ResultError
from nbddp._function import client
from nbddp._kept_commands import KeptCommands
from nbddp._option_line import HelpAsked, help_text, parse, parse_for_kept
from nbddp._options import OptionError, Options
from nbddp._prepared import Finished
from nbddp._relay import DISPLAY_LIMIT, TEXT_LIMIT, View
from nbddp._results import Wanted
from nbddp._screen import screen_of
from nbddp._script import Cell
from nbddp._stop import GRACE_SECONDS


class CellValue:
    """The value of the cell's last expression, as it looks; the object itself stayed in its rank."""

    def __init__(self, data: dict[str, Any], metadata: dict[str, Any]) -> None:
        self._bundle = data, metadata

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._bundle

    def __repr__(self) -> str:
        return str(self._bundle[0].get("text/plain", "<value of the cell>"))


class _CellSyntaxError(NbddpError):
    """A syntax error in the body of the cell, shown as that of any cell, without the frames that found it."""

    @classmethod
    def of(cls, error: SyntaxError, number: int) -> _CellSyntaxError:
        """Return the error for one that the compiler has raised."""
        lines = "".join(traceback.format_exception_only(error)).rstrip("\n").split("\n")
        lines[0] = f"  Cell In[{number}], line {error.lineno}"
        return cls(str(error), details=tuple(lines))

    def _render_traceback_(self) -> list[str]:
        return list(self._details)


# What front ends show, and a notebook's reader expects.
_CellSyntaxError.__name__ = "SyntaxError"


def source_of(shell: Any) -> Callable[[str], tuple[str, int | None] | None]:
    """Return what finds a cell's text and execution count by the file name of its code; None for real files."""

    def find(filename: str) -> tuple[str, int | None] | None:
        lines = () if os.path.exists(filename) else linecache.getlines(filename)
        return ("".join(lines), getattr(shell.compile, "_filename_map", {}).get(filename)) if lines else None

    return find


def _cell_number(shell: Any) -> int:
    """Return the number of the cell that runs; newer IPython has counted on by then."""
    return max(len(shell.history_manager.input_hist_parsed) - 1, 0)


@magics_class
class DDPMagics(Magics):
    """The magics; settings as in ``%config DDPMagics.grace = 10``."""

    idle = Float(_kept.IDLE_SECONDS, min=0, help="Seconds without a cell after which kept ranks end; 0: never.").tag(
        config=True
    )
    large = Float(
        1e9, min=0, allow_none=True, help="Bytes above which a line says how much a cell sends; None: never."
    ).tag(config=True)
    output = Int(TEXT_LIMIT, min=1000, help="Characters of output that a cell shows, its beginning and its end.").tag(
        config=True
    )
    displays = Int(DISPLAY_LIMIT, min=0, help="Bytes of images and other displays that a cell shows.").tag(config=True)
    plain = Bool(False, help="Show rank after rank, without colours and panel: the same at every run.").tag(config=True)
    grace = Float(GRACE_SECONDS, min=0, help="Seconds that ranks have to end after an interrupt.").tag(config=True)

    defaults = Unicode("", help="Options that hold where a line says nothing else, such as '--cpus 2 --plain'.").tag(
        config=True
    )

    @validate("defaults")
    def _check_defaults(self, proposal: Any) -> str:
        try:
            parse("", proposal["value"])
        except (HelpAsked, OptionError) as error:
            raise TraitError(f"DDPMagics.defaults = {proposal['value']!r}: {error}") from None
        return str(proposal["value"])

    # IPython itself would put the notebook's values in the place of what stands between braces, in expressions too.
    @needs_local_scope  # type: ignore[untyped-decorator]  # IPython's, all of them
    @no_var_expand  # type: ignore[untyped-decorator]
    @line_cell_magic  # type: ignore[untyped-decorator]
    def ddp(self, line: str, cell: str | None = None, local_ns: Mapping[str, Any] | None = None) -> Any:
        # The docstring is the help text; see below.
        scope = {**self.shell.user_ns, **(local_ns or {})}
        try:
            if cell is None:
                return self._line(line, scope)
            return self.kept.not_again(lambda: self._cell(_expanded(line, scope), cell))
        except HelpAsked as asked:
            sys.stdout.write(str(asked))
        except RankError:
            raise  # what a rank has raised may be an OptionError as well
        except OptionError as error:
            raise UsageError(str(error)) from None
        return None

    def _cell(self, line: str, cell: str) -> CellValue | BackgroundRun | None:
        options = parse(line, self.defaults)
        if options.keep and _kept.current() is not None:
            options = parse_for_kept(line, self.defaults)
        job = self._job_of_cell(line, cell, options)
        self._last_cell = line, cell
        self._expanded[_cell_number(self.shell)] = line
        if options.dry_run:
            sys.stdout.write(_job.dry_run(job, client) + "\n")
            return None
        if options.bg is not None:
            return self._begin(job, options.bg)
        if options.auto:
            sys.stdout.write("nbddp: this cell runs on the kept ranks, not in the notebook (%ddp auto off)\n")
        finished = self._perform(job)
        stale = _stale_optimizers(self.shell.user_ns, {"--out": options.out, "--gather": options.gather})
        # One call into C, which no interrupt can tear.
        self.shell.user_ns.update(finished.results)
        if (kept := _kept.current()) is not None and options.keep:
            kept.came_back(finished.results)
        if stale:
            sys.stdout.write(f"{stale}\n")
        return CellValue(*finished.value) if finished.value is not None else None

    def _begin(self, job: _job.Job, asked: str) -> BackgroundRun | None:
        """Start a run in the background, and bind its handle; return it if its user cannot know the name."""
        name = _background.name_for(asked, self.shell.user_ns)
        screen = BackgroundScreen(self.shell)
        run = BackgroundRun(name, _job.prepare_alone(replace(job, background=name), client, screen), screen)
        run.start()
        self.shell.user_ns[name] = run
        return run if not asked else None

    def _perform(self, job: _job.Job) -> Finished:
        self._left_over = {}
        try:
            return _job.perform(job, client, screen_of(self.shell))
        except ResultError as error:
            self._left_over = error.results
            raise
        except RankError as error:
            failure = error
        # What %debug stops at, and shows.
        raise failure.with_traceback(None)  # The rank has ended, its variables with it: print them in the cell

    def _job_of_cell(self, line: str, source: str, options: Options) -> _job.Job:
        """Prepare the cell.

        Raises:
            _CellSyntaxError: The cell has one, on the line that the notebook shows.
        """
        shell = self.shell
        transformed = shell.transform_cell(source)
        # A cell that was sent by %ddp auto has no such line.
        header = "" if options.auto else f"%%ddp {line}\n"
        # The notebook's own name for the cell's code: in tracebacks, and for what comes back from it.
        number = _cell_number(shell)
        filename = shell.compile.cache(header + transformed, number, raw_code=header + source)
        # A comment takes the place of the magic line, so that lines are numbered as the notebook numbers them.
        try:
            comment = "#\n" if header else ""
            tree = compile(
                comment + transformed,
                filename,
                "exec",
                ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
                dont_inherit=True,
            )
            compile(tree, filename, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        except SyntaxError as error:
            raise _CellSyntaxError.of(error, number) from None
        uses = _names.Uses(tree.body, shell.transform_cell)
        kept = _kept.current() if options.keep else None
        held = kept.holders().keys() | kept.held_by_all() if kept is not None else frozenset()
        self._check_bound("--out", [name for name in options.out if name not in held], uses)
        self._check_bound("--gather", [name for name in options.gather if name not in held], uses)
        own = self._own_names()
        return self._new_job(
            cell=Cell(source, filename, number, header, is_python=transformed.rstrip("\n") == source.rstrip("\n")),
            names={name: own[name] for name in uses.taken if name in own},
            options=options,
            lines=uses.taken,
            wanted=_wanted(options),
        )

    def _own_names(self) -> dict[str, Any]:
        """Return the variables of the notebook that are its user's, not IPython's."""
        hidden, nothing = self.shell.user_ns_hidden, object()
        return {name: value for name, value in self.shell.user_ns.items() if value is not hidden.get(name, nothing)}

    def _new_job(self, *, options: Options, **fields: Any) -> _job.Job:
        """Return a job with what is the same for all that this notebook asks for."""
        shell = self.shell
        return _job.Job(
            namespace=shell.user_ns,
            options=options,
            known=frozenset(shell.user_ns) - frozenset(shell.user_ns_hidden),
            source_of=source_of(shell),
            colors=str(shell.colors),
            grace=self.grace,
            large=self.large,
            idle=self.idle,
            view=View(
                options.ranks if options.on is None or options.ranks is not None else options.on,
                plain=options.plain or self.plain or _settings.plain(ChainMap(dict(options.env), os.environ)),
                text_limit=self.output,
                display_limit=self.displays,
            ),
            **fields,
        )

    def _evaluate(self, line: str, scope: Mapping[str, Any]) -> Any:
        """Evaluate an expression on fresh ranks; return its value on the first."""
        given, text = _expression.split(line)
        options = parse(_expanded(given, scope), self.defaults, without=("keep", "on", "idle", "bg", "out", "gather"))
        if options.out or options.gather:
            raise OptionError("--out and --gather are for cells; %ddp EXPRESSION returns the value of rank 0")
        if options.keep or options.bg is not None:
            raise OptionError("--keep and --bg are for cells; %ddp EXPRESSION runs on fresh ranks")
        own = {**self._own_names(), **{name: scope[name] for name in scope.keys() - self.shell.user_ns.keys()}}
        known = [*own, *self.shell.user_ns, *_names.GIVEN_NAMES]
        uses = partial(_names.Uses, transform=self.shell.transform_cell)
        expression = _expression.read(text, known, _commands.COMMANDS, uses, _cell_number(self.shell))
        job = self._new_job(
            cell=expression.cell,
            names=_expression.names_of(expression, own),
            options=options,
            lines=expression.taken,
            wanted=Wanted((_expression.VALUE,), device=options.out_device, asked="%ddp"),
            place="the line",
        )
        if options.dry_run:
            sys.stdout.write(_job.dry_run(job, client) + "\n")
            return None
        return self._perform(job).results[_expression.VALUE]

    def _check_bound(self, option: str, names: Sequence[str], uses: _names.Uses) -> None:
        """Refuse names that the cell cannot bind, before hours of training rather than after.

        Raises:
            UsageError: A name can be neither bound by the cell nor taken from the notebook.
        """
        if uses.dynamic:
            return
        for name in names:
            if name not in uses.bound and name not in uses.taken:
                import difflib

                close = difflib.get_close_matches(name, uses.bound, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                if name in self.shell.user_ns:
                    hint = f"; the notebook has it, and a line of the cell with just {name} would send it"
                raise UsageError(f"{option} {','.join(names)}: the cell never binds {name!r}{hint}")

    # What the last run brought back and could not assign, and the last cell that ran: its line and its text.
    _left_over: Mapping[str, Any] = MappingProxyType({})
    _last_cell: tuple[str, str] | None = None

    def __init__(self, shell: Any) -> None:
        super().__init__(shell)
        # By execution count: at which line a cell has failed; what its options were, with variables filled in.
        self._failed: dict[int, int] = {}
        self._expanded: dict[int, str] = {}
        self.kept = KeptCommands(shell.user_ns, self._between_cells)
        self.listeners: dict[str, list[Callable[..., None]]] = {
            "pre_run_cell": [self.kept.cell_begins],
            "post_run_cell": [self.kept.cell_ends, self.note_failure],
        }

    def _line(self, line: str, scope: Mapping[str, Any]) -> Any:
        first = (line.split(maxsplit=1) or [""])[0]
        if first not in ("", "-h", "--help", *_commands.COMMANDS):
            return self._evaluate(line, scope)
        line = _expanded(line, scope)
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"%ddp {line}: {error}") from None
        match words:
            case [] | ["-h"] | ["--help"]:
                sys.stdout.write(_commands.LINE_HELP)
            case ["log", *asked]:
                try:
                    _logs.show(asked, client.session.logs)
                except ValueError as error:
                    raise UsageError(str(error)) from None
            case ["status"]:
                sys.stdout.write(_commands.status() + "\n")
            case ["push", *names]:
                self.kept.push(names)
            case ["pull", *asked]:
                self.kept.pull(asked)
            case ["stop"]:
                self.kept.stop()
            case ["auto", *asked]:
                self.kept.auto(asked)
            case ["stacks"]:
                sys.stdout.write(_commands.stacks() + "\n")
            case ["results"]:
                if not self._left_over:
                    raise LaunchError("%ddp results: nothing is left over from the last run")
                return dict(self._left_over)
            case ["doctor"]:
                _commands.examine()
            case ["export", *asked]:
                self._export(asked)
            case ["explain", *names]:
                sys.stdout.write("\n".join(self._explain(names)) + "\n")
            case _:
                raise UsageError(
                    f"%ddp {line}: nothing follows %ddp {first} (%ddp -h). If that is an expression for the ranks, and "
                    f"{first} a variable: %ddp ({line.strip()})"
                )
        return None

    def _between_cells(self, **fields: Any) -> Mapping[str, Any]:
        """Have the kept ranks do something that is no cell of the notebook's; return what comes back.

        Args:
            fields: Fields of `nbddp._job.Job`; those that the notebook sets are filled in.
        """
        job = _job.Job(
            namespace=self.shell.user_ns,
            source_of=source_of(self.shell),
            grace=self.grace,
            large=self.large,
            idle=self.idle,
            view=View(plain=self.plain or _settings.plain(os.environ)),
            **fields,
        )
        try:
            results = _job.perform(job, client, screen_of(self.shell)).results
        except ResultError as error:
            self._left_over = error.results
            raise
        if stale := _stale_optimizers(self.shell.user_ns, {"%ddp pull": job.wanted.out}):
            sys.stdout.write(f"{stale}\n")
        return results

    def _export(self, words: Sequence[str]) -> None:
        """Write a cell of this session as a script."""
        from nbddp import _export

        parser = _commands.LineParser("%ddp export [--cell NUMBER] [-o FILE] [--force]")
        parser.add_argument("--cell")
        parser.add_argument("-o", "--output")
        parser.add_argument("--force", action="store_true")
        given = parser.parse_args(words)
        shell = self.shell
        exported = _export.from_session(
            self._cells_so_far(),
            _export.Session(shell.user_ns, shell.user_ns_hidden, self.defaults),
            shell.transform_cell,
            given.cell,
            given.output,
            force=given.force,
        )
        for note in exported.notes:
            sys.stdout.write(f"nbddp: {note}\n")
        if exported.path is None:
            sys.stdout.write(exported.text)
            return
        beside = f", with {os.path.relpath(exported.values)}" if exported.values else ""
        sys.stdout.write(f"{os.path.relpath(exported.path)} is written{beside}; {exported.command}\n")

    def _cells_so_far(self) -> list[_cells.Cell]:
        """Return the cells that have run in this session, in order, without the one that runs."""
        raw = self.shell.history_manager.input_hist_raw
        return [
            _cells.Cell(
                source,
                number,
                stopped=self._failed.get(number),
                options=self._expanded.get(number),
            )
            for number, source in enumerate(raw)
            if 0 < number < _cell_number(self.shell) and source.strip()
        ]

    def note_failure(self, result: Any) -> None:
        """Remember where a cell has failed: what stands below that line has not run."""
        error, number, above = result.error_in_exec, result.execution_count, 0
        if error is None:
            return
        history = self.shell.history_manager.input_hist_raw
        if number is None or not getattr(result.info, "store_history", True):
            # %%capture runs what is below it as a cell of its own, and keeps the error from the one around it.
            number, inside = _cell_number(self.shell), (getattr(result.info, "raw_cell", None) or "").rstrip()
            whole = history[number].rstrip()
            if not inside or not whole.lstrip().startswith("%%") or not whole.endswith(inside):
                return
            above = whole.removesuffix(inside).count("\n")
            magics = _cells.shifts(inside)
        else:
            magics = _cells.shifts(history[number] if number < len(history) else "")
        # The frames of the cell, and of what each magic around its statements has made of them.
        lines = [line for tb, line in traceback.walk_tb(error.__traceback__) if tb.f_globals is self.shell.user_ns]
        known = len(lines) > len(magics)
        self._failed[number] = lines[len(magics)] + sum(magics) + above if known else 0

    def _explain(self, names: Sequence[str]) -> list[str]:
        """Return lines on what the last cell, or these names, would send."""
        space = self.shell.user_ns
        if names:
            if missing := [name for name in names if name not in space]:
                raise UsageError(f"%ddp explain: the notebook has no variable {', '.join(missing)}")
            return _closure.explain({name: space[name] for name in names}, space, {})
        if self._last_cell is None:
            raise UsageError("%ddp explain: no %%ddp cell has run yet; give names, as in %ddp explain model")
        line, cell = self._last_cell
        job = self._job_of_cell(line, cell, parse(line, self.defaults))
        return [f"%%ddp {line}".rstrip(), *_closure.explain(job.names, job.namespace, job.lines)]


# "Docstring" of %%ddp? is what users read first.
DDPMagics.ddp.__doc__ = f"{help_text()}\n{_commands.LINE_HELP}"


def _stale_optimizers(space: Mapping[str, Any], asked: Mapping[str, Sequence[str]]) -> str:
    """Return a line on optimizers of the notebook whose parameters are about to be another model's; or none.

    Args:
        space: The notebook's names.
        asked: What comes back, by how it was asked for.

    A model that comes back is a new object. An optimizer that did not come with it would go on stepping the old one's
    parameters, without an error.
    """
    results = [name for names in asked.values() for name in names]
    if not results:
        return ""
    others = {name: value for name, value in list(space.items()) if name not in results}
    for name, model in _optimizers.of_models(others, {name: space.get(name) for name in results}):
        option, names = next((option, names) for option, names in asked.items() if model in names)
        listed = (" " if option.startswith("%") else ",").join([*names, name])
        return (
            f"nbddp: {name} still holds the parameters that {model} had before; what is to come back as one goes into "
            f"one {option}: {listed}"
        )
    return ""


def _wanted(options: Options) -> Wanted:
    asked = [f"--out {','.join(options.out)}"] if options.out else []
    asked += [f"--gather {','.join(options.gather)}"] if options.gather else []
    first = min(options.on or (0,))
    return Wanted(tuple(options.out), tuple(options.gather), options.out_device, " ".join(asked), first)


def _expanded(line: str, scope: Mapping[str, Any]) -> str:
    """Return a line with ``$name`` and ``{expression}`` expanded, as IPython does it for other magics."""
    if "$" in line or "{" in line:
        with contextlib.suppress(Exception):  # it is none of these, and stays as it is
            return str(DollarFormatter().vformat(line, (), dict(scope)))
    return line
