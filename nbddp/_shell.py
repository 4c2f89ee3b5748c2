"""The IPython shell that runs the cell inside a rank.

It is made in the launcher, before any fork, because making one takes a quarter of the time that a whole run may
take. What it would do to its process and to the user's home there is undone or switched off: it writes no history,
starts no thread, replaces no ``__main__``.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import inspect
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from IPython.core import interactiveshell
from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Type
from traitlets.config import Config

from nbddp._script import CALLER
from nbddp._uplink import flush

# Sends a mime bundle to the notebook: (data, metadata, transient, update, is it the cell's value).
Publish = Callable[[dict[str, Any], dict[str, Any], dict[str, Any], bool, bool], None]


# Folders of code whose frames tell the reader of a traceback nothing.
_FOLDED = tuple(os.path.join(os.path.dirname(m.__file__ or ""), "") for m in (torch, sys.modules["nbddp"]))


# Of a long traceback, how many frames are shown at its beginning, and at its end.
_ENDS_SHOWN = 10


# Seconds after which an interrupt is tried again that came to light where Python drops it.
_AGAIN_SECONDS = 0.02


def _print_plain(
    data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, Any], update: bool, value: bool
) -> None:
    """Show a bundle where there is no notebook; the cell's value is rank 0's."""
    if value and os.environ.get("RANK", "0") != "0":
        return
    print(data.get("text/plain", ""))  # noqa: T201  # it is what the user's display() prints


class _Compiler(CachingCompiler):
    """Compiles the cell under the notebook's name for it, with the notebook's line numbers."""

    cell_name = ""
    cell_header = ""

    def get_code_name(self, raw_code: str, transformed_code: str, number: int) -> str:
        return self.cell_name or str(super().get_code_name(raw_code, transformed_code, number))

    def cache(self, transformed_code: str, number: int = 0, raw_code: str | None = None) -> str:
        return str(super().cache(self.cell_header + transformed_code, number, raw_code))

    def ast_parse(self, source: str, filename: str = "<unknown>", symbol: str = "exec") -> Any:
        # Lines above are quicker than to count on in a whole tree.
        return super().ast_parse("\n" * self.cell_header.count("\n") + source, filename, symbol)


class _DisplayHook(DisplayHook):
    """Sends the value of the cell's last expression to the notebook."""

    def quiet(self) -> bool:
        return bool(self.shell.cell_is_quiet)

    def __call__(self, result: Any = None) -> None:
        if result is None or self.quiet():
            return
        data, metadata = self.compute_format_data(result)
        if data:
            self.shell.publish(_showable(data), metadata, {}, False, True)


class _DisplayPublisher(DisplayPublisher):
    """Sends what ``display()`` shows to the notebook."""

    def publish(
        self,
        data: dict[str, Any],
        metadata: dict[str, Any] | None = None,
        source: Any = None,
        *,
        transient: dict[str, Any] | None = None,
        update: bool = False,
        **_: Any,
    ) -> None:
        self.shell.publish(_showable(data), metadata or {}, transient or {}, update, False)

    def clear_output(self, wait: bool = False) -> None:
        """Take away what this rank has shown in the notebook; what the others have shown is theirs."""
        self.shell.clear(wait)


class RankShell(InteractiveShell):
    """Runs one cell in the script's own namespace and keeps its traceback instead of printing it.

    Attributes:
        publish: Where mime bundles go.
        clear: What ``clear_output`` calls.
        failing: Called with what the cell has raised, before its traceback is made.
        traceback: The lines of the last traceback, as the notebook would show them.
    """

    displayhook_class = Type(_DisplayHook)
    display_pub_class = Type(_DisplayPublisher)
    compiler_class = _Compiler

    publish: Publish = staticmethod(_print_plain)
    clear: Callable[[bool], None] = staticmethod(lambda _: None)
    failing: Callable[[BaseException], None] = staticmethod(lambda _: None)
    cell_is_quiet = False
    traceback: tuple[str, ...] = ()
    _cells: Mapping[str, int] = MappingProxyType({})
    _python: str | None = None
    _interrupted: bool | None = None

    def settings(self, traits: Mapping[str, Any]) -> None:
        """Set traits of classes that are made later, such as how figures are drawn inline."""
        if traits:
            self.update_config(Config(dict(traits)))

    def enable_gui(self, gui: str | None = None) -> None:
        """Accept what ``%matplotlib`` asks for; a rank has no event loop of a user interface."""

    def transform_cell(self, raw_cell: str) -> str:
        """Return a cell as Python; in what has no magics they need not be looked for again.

        One line alone may be a magic that only this process knows, and the cells may have their own transformers.
        """
        known = raw_cell == self._python and "\n" in raw_cell.strip() and not self.input_transformers_post
        if not known:
            return str(super().transform_cell(raw_cell))
        return raw_cell if raw_cell.endswith("\n") else f"{raw_cell}\n"

    def should_run_async(self, raw_cell: str, **given: Any) -> bool:
        """Tell whether a cell awaits something; IPython compiles it for that."""
        return ("await" in raw_cell or "async" in raw_cell) and bool(super().should_run_async(raw_cell, **given))

    def _tee(self, channel: str) -> contextlib.AbstractContextManager[None]:
        # IPython 9 would keep all that the cell prints in memory, for a history that nobody reads.
        return contextlib.nullcontext()

    def system(self, cmd: str) -> None:
        """Run a shell command on the rank's own stdout; IPython's way, through a pseudo-terminal, takes 0.1 s."""
        cmd = self.var_expand(cmd, depth=1)
        flush()
        code = subprocess.call(cmd, shell=True, executable=os.environ.get("SHELL"))
        self.user_ns["_exit_code"] = code
        if getattr(self, "system_raise_on_error", False) and code != 0:  # IPython 8.29 and later
            raise subprocess.CalledProcessError(code, cmd)

    def showtraceback(self, exc_tuple: Any = None, *_: Any, tb_offset: int | None = None, **__: Any) -> None:
        """Keep the traceback for the report to the notebook."""
        kind, value, tb = self._get_exc_info(exc_tuple)
        links = _links(tb)
        for before, link in pairwise(links):
            # The line in which `nbddp.launch` calls the function is nobody's; without it, the function's own are left.
            if link.tb_frame.f_code.co_filename == CALLER and link.tb_next is not None:
                before.tb_next = link.tb_next
        if not isinstance(value, SystemExit | KeyboardInterrupt):
            self.failing(value)
            left_out = _fold(value)
            self.traceback = self._rendered(kind, value, tb, tb_offset)
            if left_out:
                self.traceback += (f"({left_out} frames in between are not shown)",)
        # For a debugger, which a rank has not; and what fails in a rank that stays has the GPU's memory in its frames.
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            if hasattr(sys, name):
                delattr(sys, name)

    def showsyntaxerror(self, *_: Any, **__: Any) -> None:
        """Keep the traceback of a syntax error, such as of an imported module."""
        self.showtraceback()

    def _rendered(
        self, kind: type[BaseException], value: BaseException, tb: TracebackType | None, tb_offset: int | None
    ) -> tuple[str, ...]:
        # IPython 7 takes every frame of the cell to be in the script, whose file this is.
        file = self.user_ns.pop("__file__", None)
        try:
            lines = self._formatted(kind, value, tb, tb_offset)
        finally:
            if file is not None:
                self.user_ns["__file__"] = file
            self.InteractiveTB.tb = None
        for name, number in self._cells.items():
            lines = tuple(line.replace(name, f"In[{number}]") for line in lines)
        return lines

    def _formatted(
        self, kind: type[BaseException], value: BaseException, tb: TracebackType | None, tb_offset: int | None
    ) -> tuple[str, ...]:
        try:
            if hasattr(value, "_render_traceback_"):
                return tuple(value._render_traceback_())
            if isinstance(value, SyntaxError):
                return tuple(self.SyntaxTB.structured_traceback(kind, value, traceback.extract_tb(tb)))
            if not isinstance(value, BaseExceptionGroup):
                return tuple(self.InteractiveTB.structured_traceback(kind, value, tb, tb_offset=tb_offset))
        except Exception:  # a __str__ that raises, source that is gone
            pass
        if tb is not None and tb.tb_frame.f_code.co_filename == interactiveshell.__file__:
            tb = tb.tb_next
        return tuple(line.rstrip("\n") for line in traceback.format_exception(kind, value, tb))

    def _hold_interrupts(self) -> None:
        """Keep an interrupt for the cell: IPython, on its way there, would swallow it and go on."""
        self._interrupted = False

        def note(*_: Any) -> None:
            self._interrupted = True

        signal.signal(signal.SIGINT, note)

    async def run_code(self, *args: Any, **kwargs: Any) -> bool:
        """Run a statement of the cell; from the first on, an interrupt raises KeyboardInterrupt."""
        if self._interrupted is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            held, self._interrupted = self._interrupted, None
            if held:
                raise KeyboardInterrupt
        return bool(await super().run_code(*args, **kwargs))

    def _name_cells(self, cells: Mapping[str, int | None]) -> None:
        """Have tracebacks call the notebook's cells ``In[N]``, and find them."""
        for name in cells:
            # Or inspect looks for a file of that name through thousands of modules, for each frame.
            inspect.modulesbyfile[os.path.normcase(os.path.abspath(name))] = "__main__"
        self._cells = {name: number for name, number in cells.items() if number is not None}
        # Where IPython has this table it does so by itself; elsewhere (IPython 7) the text is replaced.
        getattr(self.compile, "_filename_map", {}).update(self._cells)

    def run(
        self,
        namespace: dict[str, Any],
        source: str,
        *,
        filename: str,
        number: int,
        header: str,
        is_python: bool,
        cells: Mapping[str, int | None],
        colors: str,
    ) -> BaseException | None:
        """Run the cell as the notebook would.

        Args:
            namespace: The script's globals.
            source: The cell's text below its magic line.
            filename: The name under which its code is compiled.
            number: The notebook's execution count.
            header: What stands above `source` in the notebook's cell.
            is_python: Whether the notebook has found no magic in it.
            cells: Execution counts of the notebook's other cells, by the file names of their code.
            colors: The notebook's traceback colours.

        Returns:
            What the cell raised, or None.
        """
        self.user_module = sys.modules["__main__"]
        self.user_ns = namespace
        self.execution_count = number
        self.traceback = ()
        if colors:
            with contextlib.suppress(Exception):  # a theme that this process does not have
                self.colors = colors
        self.compile.cell_name = filename
        self.compile.cell_header = header
        self._python = source if is_python else None
        self._hold_interrupts()
        self.cell_is_quiet = _ends_with_semicolon(source)
        self._name_cells({**cells, filename: number})
        # What IPython advises on SystemExit is for a person at a prompt.
        warnings.filterwarnings("ignore", message="To exit: use", category=UserWarning)
        with _no_interrupt_lost():
            result = self.run_cell(source, store_history=False)
        error: BaseException | None = result.error_before_exec or result.error_in_exec
        return error


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Raise a KeyboardInterrupt again where Python drops it.

    It does in code that it calls itself, such as ``__del__`` and what runs around a fork; and an interrupt that arrives
    during the fork of a DataLoader worker comes to light just there.
    """
    pid, main, before = os.getpid(), threading.get_ident(), sys.unraisablehook

    def again() -> None:
        time.sleep(_AGAIN_SECONDS)
        signal.pthread_kill(main, signal.SIGINT)

    def hook(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt and os.getpid() == pid:
            # Not at once: what is raised in here is dropped as well.
            threading.Thread(target=again, daemon=True).start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _fold(error: BaseException) -> int:
    """Shorten a traceback, and those of the exceptions behind it; return how many frames are left out.

    The frames inside torch and nbddp, but for the last one, are counted by IPython instead of shown. And of hundreds of
    frames, for which IPython would need seconds, the first and the last are enough.
    """
    left_out = 0
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        pending += [one.__cause__, one.__context__]
        links = _links(one.__traceback__)
        for tb in links[:-1]:
            if tb.tb_frame.f_code.co_filename.startswith(_FOLDED):
                # The name by which test frameworks mark such frames; IPython knows it, too.
                tb.tb_frame.f_locals["__tracebackhide__"] = True
        if len(links) > 2 * _ENDS_SHOWN:
            links[_ENDS_SHOWN - 1].tb_next = links[-_ENDS_SHOWN]
            left_out += len(links) - 2 * _ENDS_SHOWN
    return left_out


def _links(tb: TracebackType | None) -> list[TracebackType]:
    links = []
    while tb is not None:
        links.append(tb)
        tb = tb.tb_next
    return links


def _ends_with_semicolon(source: str) -> bool:
    """Tell whether the last token is a semicolon, by which a cell asks not to show its value."""
    last = ""
    if ";" not in source:
        return False
    with contextlib.suppress(tokenize.TokenError, SyntaxError):  # IPython syntax: what came before it counts
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.string.strip() and token.type != tokenize.COMMENT:
                last = token.string
    return last == ";"


def the_shell(directory: str | None) -> RankShell:
    """Return this process's shell; if it was not made before the fork, make it.

    Args:
        directory: Where to put its profile; None for a folder that is gone at once.
    """
    if RankShell.initialized():
        shell: RankShell = RankShell.instance()
        return shell
    if directory is not None:
        return make(directory)
    with tempfile.TemporaryDirectory(prefix="ipython-") as folder:
        return make(folder)


def make(directory: str) -> RankShell:
    """Make this process's one shell.

    Args:
        directory: For the profile that IPython insists on; the user's own stays untouched.
    """
    config = Config()
    config.HistoryManager.enabled = False  # no thread, no database in the user's home
    main = sys.modules["__main__"]
    shell: RankShell = RankShell.instance(config=config, ipython_dir=os.path.join(directory, "ipython"))
    sys.modules["__main__"] = main
    for name in ("ps1", "ps2", "ps3"):  # by these, libraries tell an interactive interpreter
        if hasattr(sys, name):
            delattr(sys, name)
    shell.register_magic_function(_refuse, "line_cell", "ddp")
    for name in ("exit", "quit"):  # a notebook's own are hidden from it; a script has those of the interpreter
        shell.builtin_trap.auto_builtins.pop(name, None)
    # It empties the namespace, which is the script's.
    atexit.unregister(shell.atexit_operations)
    return shell


def _refuse(line: str, cell: str | None = None) -> None:
    """Be ``%ddp`` and ``%%ddp`` in a rank."""
    from nbddp._function import refuse_in_rank

    refuse_in_rank(f"%ddp {line}".rstrip() if cell is None else f"%%ddp {line}".rstrip())


_WIDGET = "application/vnd.jupyter.widget-view+json"


def _showable(data: dict[str, Any]) -> dict[str, Any]:
    """Return a mime bundle as the notebook can show it: images as text, and a sentence instead of a widget."""
    if _WIDGET in data:
        said = str(data.get("text/plain", ""))
        if "tqdm.notebook" in sys.modules and "%|" in said:
            return {"text/plain": "nbddp: tqdm.notebook draws widgets, which work only in the notebook's own process; "
                    "from tqdm.auto import tqdm draws its bar as text"}  # fmt: skip
        what = said.split("(", maxsplit=1)[0].strip() or "this"
        return {"text/plain": f"nbddp: {what} is a widget, and works only in the notebook's own process"}
    return {k: base64.b64encode(v).decode("ascii") if isinstance(v, bytes) else v for k, v in data.items()}
