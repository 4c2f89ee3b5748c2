"""``%%ddp`` and ``%ddp``: what the notebook's user types, and nothing more.

Only this module knows the notebook's shell. It reads the line, prepares the cell, hands both to `nbddp._job`, and puts
what comes back into the notebook's namespace.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import linecache
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class
from traitlets import Bool, Float, Int

from nbddp import _background, _cells, _closure, _doctor, _job, _kept, _logs, _names, _running, _settings
from nbddp._background import BackgroundRun, BackgroundScreen
from nbddp._errors import LaunchError, NbddpError, RankError, ResultError
from nbddp._function import client
from nbddp._options import HelpAsked, OptionError, Options, help_text, option_names, parse
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


class _LineParser(argparse.ArgumentParser):
    """Reads what stands behind a word of ``%ddp``."""

    def __init__(self, usage: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._usage = usage

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self._usage.partition(' [')[0]}: {message}. {self._usage}")


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

    @line_cell_magic  # type: ignore[untyped-decorator]  # IPython's
    def ddp(self, line: str, cell: str | None = None) -> CellValue | BackgroundRun | dict[str, Any] | None:
        # The docstring is the help text; see below.
        if cell is None:
            return self._line(line)
        # What the cell consists of is not to be sent once more.
        auto, self._auto_options = self._auto_options, None
        try:
            return self._run_cell(line, cell)
        finally:
            self._auto_options = self._auto_options or auto

    def _run_cell(self, line: str, cell: str) -> CellValue | BackgroundRun | None:
        try:
            options = parse(line)
        except HelpAsked as asked:
            sys.stdout.write(str(asked))
            return None
        except OptionError as error:
            raise UsageError(str(error)) from None
        job = self._job(line, cell, options)
        self._last_cell = line, cell
        self._expanded[_cell_number(self.shell)] = line
        if options.dry_run:
            sys.stdout.write(_job.dry_run(job, client) + "\n")
            return None
        if options.bg is not None:
            return self._begin(job, options.bg)
        self._left_over = {}
        if options.auto:
            sys.stdout.write("nbddp: this cell runs on the kept ranks, not in the notebook (%ddp auto off)\n")
        try:
            finished = _job.perform(job, client, screen_of(self.shell))
        except ResultError as error:
            self._left_over = error.results
            raise
        except RankError as error:
            failure: RankError | None = error
        else:
            failure = None
        if failure is not None:
            # What %debug stops at, and shows.
            raise failure.with_traceback(None)  # The rank has ended, its variables with it: print them in the cell
        stale = _stale_optimizers(self.shell.user_ns, finished.results)
        # One call into C, which no interrupt can tear.
        self.shell.user_ns.update(finished.results)
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

    def _job(self, line: str, source: str, options: Options) -> _job.Job:
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
            tree = compile(comment + transformed, filename, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            compile(tree, filename, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except SyntaxError as error:
            raise _CellSyntaxError.of(error, number) from None
        uses = _names.Uses(tree.body, shell.transform_cell)
        self._check_bound("--out", options.out, uses)
        self._check_bound("--gather", options.gather, uses)
        hidden = shell.user_ns_hidden
        nothing = object()
        names = {
            name: shell.user_ns[name]
            for name in uses.taken
            if name in shell.user_ns and shell.user_ns[name] is not hidden.get(name, nothing)
        }
        return _job.Job(
            cell=Cell(source, filename, number, header),
            names=names,
            namespace=shell.user_ns,
            options=options,
            lines=uses.taken,
            wanted=_wanted(options),
            known=frozenset(shell.user_ns) - frozenset(hidden),
            source_of=source_of(shell),
            colors=str(shell.colors),
            grace=self.grace,
            large=self.large,
            idle=self.idle,
            in_use=_gpus_in_use,
            view=View(
                options.ranks if options.on is None or options.ranks is not None else options.on,
                plain=options.plain or self.plain or _settings.plain({**os.environ, **options.env}),
                text_limit=self.output,
                display_limit=self.displays,
            ),
        )

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

    def _line(self, line: str) -> dict[str, Any] | None:
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"%ddp {line}: {error}") from None
        match words:
            case [] | ["-h"] | ["--help"]:
                sys.stdout.write(LINE_HELP)
            case ["log", *asked]:
                try:
                    _logs.show(asked, client.session.logs)
                except ValueError as error:
                    raise UsageError(str(error)) from None
            case ["status"]:
                sys.stdout.write(_status() + "\n")
            case ["push", *names]:
                self._push(names)
            case ["pull", *asked]:
                self._pull(asked)
            case ["stop"]:
                self._stop()
            case ["auto", *asked]:
                self._auto(asked)
            case ["stacks"]:
                sys.stdout.write(_stacks() + "\n")
            case ["results"]:
                if not self._left_over:
                    raise LaunchError("%ddp results: nothing is left over from the last run")
                return dict(self._left_over)
            case ["doctor"]:
                _examine()
            case ["export", *asked]:
                self._export(asked)
            case ["explain", *names]:
                sys.stdout.write("\n".join(self._explain(names)) + "\n")
            case _:
                raise UsageError(
                    f"%ddp {line}: there are only %ddp log, status, stacks, results, explain, export, doctor, push, "
                    "pull, stop and auto (%ddp -h); a cell that runs on ranks begins with %%ddp"
                )
        return None

    # Kept ranks.

    def _perform_kept(self, words: str, names: Mapping[str, Any], wanted: Wanted | None = None, **more: Any) -> None:
        """Have the kept ranks do something between two cells, and take what comes back.

        Args:
            words: What the user has typed, for messages.
            names: What is sent.
            wanted: What is to come back.
            more: Fields of `Options`, and `push` or `last`.
        """
        if _kept.current() is None:
            raise LaunchError(f"{words}: no ranks are kept. A cell with %%ddp --keep starts them")
        shell = self.shell
        job = _job.Job(
            cell=Cell("", f"<{words}>", 0),
            names=names,
            namespace=shell.user_ns,
            options=Options(keep=True, on=more.get("on")),
            wanted=wanted or Wanted(),
            source_of=source_of(shell),
            grace=self.grace,
            large=self.large,
            place=words,
            own=not more.get("last"),
            view=View(plain=self.plain or _settings.plain(os.environ)),
            push=more.get("push", ()),
            idle=self.idle,
            last=more.get("last", False),
        )
        shell.user_ns.update(_job.perform(job, client, screen_of(shell)).results)

    def _push(self, names: Sequence[str]) -> None:
        space = self.shell.user_ns
        if not names:
            raise UsageError("%ddp push NAME ...: which of the notebook's variables are the kept ranks to get?")
        if missing := [name for name in names if name not in space]:
            raise UsageError(f"%ddp push: the notebook has no variable {', '.join(missing)}")
        self._perform_kept(f"%ddp push {' '.join(names)}", {name: space[name] for name in names}, push=names)

    def _pull(self, asked: Sequence[str]) -> None:
        words = f"%ddp pull {' '.join(asked)}"
        names, rank = _names_and_rank(asked)
        if (kept := _kept.current()) is not None:
            if rank not in kept.states:
                raise UsageError(f"{words}: the kept ranks are {', '.join(map(str, kept.states))}")
            held = kept.states[rank].held
            if lacking := [name for name in names if name not in held and not name.startswith("_")]:
                others = kept.holders().get(lacking[0], [])
                hint = f"; --rank {others[0]} has it" if others else ""
                there = ", ".join(sorted(held)) or "nothing"
                raise LaunchError(f"{words}: rank {rank} holds no {', '.join(lacking)}{hint}. It holds {there}")
        self._perform_kept(words, {}, Wanted(tuple(names), asked=words, first=rank), on=(rank,))

    def _stop(self) -> None:
        if _kept.current() is None:
            sys.stdout.write("nbddp: no ranks are kept\n")
            return
        self._perform_kept("%ddp stop", {}, last=True)
        sys.stdout.write("nbddp: the kept ranks have ended\n")

    # The options of the cells that go to the kept ranks; None if they run in the notebook.
    _auto_options: str | None = None

    def _auto(self, asked: Sequence[str]) -> None:
        match asked:
            case ["off"]:
                self._auto_options = None
                sys.stdout.write("nbddp: cells run in the notebook again\n")
            case ["on", *options]:
                line = shlex.join(["--keep", *options])
                try:
                    parse(line)
                except OptionError as error:
                    raise UsageError(f"%ddp auto on: {error}") from None
                if not options and _kept.current() is None:
                    raise UsageError("%ddp auto on: no ranks are kept; say how many, as in %ddp auto on --gpus 2")
                self._auto_options = line
                sys.stdout.write("nbddp: from now on cells run on the kept ranks, until %ddp auto off\n")
            case _:
                raise UsageError("%ddp auto on [OPTIONS] or %ddp auto off")

    def send_to_ranks(self, lines: list[str]) -> list[str]:
        """Make a ``%%ddp --keep`` cell of a cell, while ``%ddp auto`` is on; what is a magic's stays its own."""
        text = "".join(lines).lstrip()
        magic = text.startswith(("%%", "?", "!")) or any(line.startswith("%ddp") for line in lines)
        if self._auto_options is None or not text or magic:
            return lines
        return [f"%%ddp {self._auto_options} --auto\n", *lines]

    def _export(self, words: Sequence[str]) -> None:
        """Write a cell of this session as a script."""
        from nbddp import _export

        parser = _LineParser("%ddp export [--cell NUMBER] [-o FILE] [--force]")
        parser.add_argument("--cell")
        parser.add_argument("-o", "--output")
        parser.add_argument("--force", action="store_true")
        given = parser.parse_args(words)
        shell = self.shell
        exported = _export.from_session(
            self._cells_so_far(),
            _export.Session(shell.user_ns, shell.user_ns_hidden),
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
        error, number = result.error_in_exec, result.execution_count
        if error is None or number is None:
            return
        tb = error.__traceback__
        while tb is not None and tb.tb_frame.f_globals is not self.shell.user_ns:
            tb = tb.tb_next
        self._failed[number] = tb.tb_lineno if tb is not None else 1

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
        job = self._job(line, cell, parse(line))
        return [f"%%ddp {line}".rstrip(), *_closure.explain(job.names, job.namespace, job.lines)]


class _Pull(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"%ddp pull: {message}. %ddp pull NAME ... [--rank K]")


def _names_and_rank(asked: Sequence[str]) -> tuple[list[str], int]:
    """Return the names behind ``%ddp pull``, and the rank that they are to come from."""
    parser = _Pull(add_help=False, allow_abbrev=False)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--rank", type=int, default=0)
    given = parser.parse_args(list(asked))
    return [name for word in given.names for name in word.split(",") if name], given.rank


def _status() -> str:
    """Return what is known of the runs that are under way, and of the ranks that are kept."""
    under_way = list(_running.running)
    kept = _kept.current()
    held = "\n".join(_kept.status(kept)) if kept is not None else _NOTHING
    if not under_way:
        return held
    for one in under_way:
        one.run.panel.look()
    # The answers come to the thread of the run.
    time.sleep(_ANSWER_SECONDS)
    text = "\n".join(one.heading() + one.run.panel.text() for one in under_way)
    return f"{text}\n{held}" if kept is not None and all(one.name for one in under_way) else text


def _stacks() -> str:
    """Return where the ranks are of the runs that are under way."""
    under_way = list(_running.running)
    return "\n".join(one.heading() + "\n".join(one.stacks() or [_NONE_YET]) for one in under_way) or _NOTHING


_ANSWER_SECONDS = 0.2
_NOTHING = "nbddp: nothing is running"
_NONE_YET = "nbddp: no rank has started yet"


def _examine() -> None:
    """Print what may stop a run, line by line as it is found."""
    findings = []
    for finding in _doctor.examine(client):
        findings.append(finding)
        sys.stdout.write(f"{finding.line()}\n")
        sys.stdout.flush()
    sys.stdout.write(f"nbddp: {_doctor.verdict(findings)}\n")


LINE_HELP = """\
%ddp log         where the logs of the last run are, one for each rank
%ddp log --rank K --tail N
                 what rank K printed, all of it or its last N lines; without --rank, of every rank
%ddp log --save PATH
                 copy the logs into a folder, or with --rank to a file
%ddp status      what runs now, rank by rank: from another thread or a subshell while a cell runs; what kept ranks hold
%ddp push A B    give the ranks that are kept the notebook's A and B, also where they have their own
%ddp pull A B --rank K
                 bring A and B back from the kept rank K (default: 0)
%ddp stop        end the ranks that are kept
%ddp auto on     run every cell that follows on the kept ranks, until %ddp auto off
%ddp stacks      where each rank is at this moment, likewise; an interrupt and --timeout say it, too
%ddp explain     what the last %%ddp cell takes from the notebook: types, sizes, by value or by reference
%ddp explain A B the same for variables
%ddp export [-o FILE] [--cell NUMBER] [--force]
                 write the last %%ddp cell, or the one with this number, as a script for plain torchrun, with all that
                 it needs of the other cells (default: train.py); values that only the notebook has go beside it
%ddp doctor      what may stop a run, or did, and what to do: GPUs, a real all-reduce, memory, limits, names
%ddp results     what the last run brought back and could not assign, since something else was missing
%%ddp -h         how to run a cell on several ranks
"""

# "Docstring" of %%ddp? is what users read first.
DDPMagics.ddp.__doc__ = f"{help_text()}\n{LINE_HELP}"


def _stale_optimizers(space: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return a line on optimizers of the notebook whose parameters are about to be another model's; or none.

    A model that comes back is a new object. An optimizer that did not come with it would go on stepping the old one's
    parameters, without an error.
    """
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "optim"):
        return ""
    models = {name: space.get(name) for name in results if isinstance(space.get(name), torch.nn.Module)}
    for name, optimizer in list(space.items()):
        if name.startswith("_") or name in results or not isinstance(optimizer, torch.optim.Optimizer):
            continue
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for model, module in models.items():
            if module is not None and any(id(parameter) in own for parameter in module.parameters()):
                return (
                    f"nbddp: {name} still holds the parameters that {model} had before; what is to come back as one "
                    f"goes into one --out: {','.join([*results, name])}"
                )
    return ""


def _what_else_runs() -> str | None:
    """Return what would end with the launcher; None if there is nothing."""
    others = list(_background.running)
    if _kept.current() is not None:
        others.append("the kept ranks (%ddp stop)")
    return " and ".join(others) or None


def _gpus_in_use() -> dict[str, str]:
    return _background.gpus_in_use() | _kept.gpus_in_use()


def _wanted(options: Options) -> Wanted:
    asked = [f"--out {','.join(options.out)}"] if options.out else []
    asked += [f"--gather {','.join(options.gather)}"] if options.gather else []
    return Wanted(options.out, options.gather, options.out_device, " ".join(asked))


def _complete(shell: Any, event: Any) -> Sequence[str]:
    """Offer the options on a %%ddp line."""
    del shell  # IPython's hooks are called as methods
    return [name for name in option_names() if name.startswith(event.symbol)] if event.symbol.startswith("-") else ()


def _keep_empty_body(lines: list[str]) -> list[str]:
    """Give a %%ddp cell without a body an empty line, so that IPython runs it: ``%%ddp -h`` is all that one types."""
    if lines and lines[0].startswith("%%ddp") and not "".join(lines[1:]).strip():
        return [lines[0].rstrip("\n") + "\n", "\n"]
    return lines


def load(shell: Any) -> None:
    """Register the magics with a shell and start the launcher.

    Raises:
        LaunchError: On Windows: there is no fork, no torchrun with gloo to speak of, and nothing was tested.
    """
    if sys.platform == "win32":
        raise LaunchError("nbddp needs Linux or macOS; on Windows, use it inside WSL")
    sys.stdout.write(_background.said_by_the_last_kernel())
    magics = DDPMagics(shell)
    client.in_use = _what_else_runs
    shell.register_magics(magics)

    shell.events.register("post_run_cell", magics.note_failure)
    shell.input_transformers_cleanup.insert(0, _keep_empty_body)
    shell.input_transformers_cleanup.append(magics.send_to_ranks)
    shell.set_hook("complete_command", _complete, str_key="%%ddp")
    with contextlib.suppress(NbddpError):  # a full disk must not fail the import cell; the first run will say it
        client.start()


def unload(shell: Any) -> None:
    """Undo `load`."""
    manager = shell.magics_manager
    for kind in ("line", "cell"):
        manager.magics[kind].pop("ddp", None)
    magics = manager.registry.pop(DDPMagics.__name__, None)
    if magics is not None and magics in shell.configurables:
        shell.configurables.remove(magics)
    transformers = shell.input_transformers_cleanup
    for ours in (_keep_empty_body, getattr(magics, "send_to_ranks", None)):
        with contextlib.suppress(ValueError):
            transformers.remove(ours)
    if magics is not None:
        with contextlib.suppress(ValueError):
            shell.events.unregister("post_run_cell", magics.note_failure)
    sys.stdout.write(_background.end_all("nbddp")[1])
    _kept.drop()
    # IPython has no call that takes a hook away again.
    shell.strdispatchers["complete_command"].strs.pop("%%ddp", None)
    client.close()
