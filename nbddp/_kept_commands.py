"""What the notebook's user types to ranks that stay: ``%ddp push``, ``pull``, ``stop`` and ``auto``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from IPython.core.error import UsageError

from nbddp import _kept
from nbddp._errors import LaunchError
from nbddp._option_line import parse
from nbddp._options import OptionError, Options
from nbddp._results import Wanted
from nbddp._script import Cell

_Result = TypeVar("_Result")


class KeptCommands:
    """The commands.

    Args:
        space: The notebook's namespace.
        perform: Has the kept ranks do something, given fields of `nbddp._job.Job`; returns what comes back, by name.
    """

    def __init__(self, space: dict[str, Any], perform: Callable[..., Mapping[str, Any]]) -> None:
        self._space = space
        self._perform_job = perform
        # The options of the cells that go to the kept ranks; None if they run in the notebook.
        self._auto_options: str | None = None
        # How many cells run within each other.
        self._depth = 0

    def push(self, names: Sequence[str]) -> None:
        """Give the kept ranks the notebook's variables of these names."""
        space = self._space
        names = [name for word in names for name in word.split(",") if name]
        if not names:
            raise UsageError("%ddp push NAME ...: which of the notebook's variables are the kept ranks to get?")
        if missing := [name for name in names if name not in space]:
            raise UsageError(f"%ddp push: the notebook has no variable {', '.join(missing)}")
        self._perform(f"%ddp push {' '.join(names)}", {name: space[name] for name in names}, push=names)

    def pull(self, asked: Sequence[str]) -> None:
        """Bring what a kept rank holds to the notebook."""
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
        self._perform(words, {}, Wanted(tuple(names), asked=words, first=rank), on=(rank,))

    def stop(self) -> None:
        """End the kept ranks as scripts end."""
        if not _kept.are_there():
            sys.stdout.write("nbddp: no ranks are kept\n")
            return
        self._perform("%ddp stop", {}, last=True)
        sys.stdout.write("nbddp: the kept ranks have ended\n")

    def _perform(
        self,
        words: str,
        names: Mapping[str, Any],
        wanted: Wanted | None = None,
        *,
        on: tuple[int, ...] | None = None,
        push: Sequence[str] = (),
        last: bool = False,
    ) -> None:
        """Have the kept ranks do something between two cells, and take what comes back.

        Args:
            words: What the user has typed, for messages.
            names: What is sent.
            wanted: What is to come back.
            on: The ranks that it concerns; None for all.
            push: Names that they get also where they have their own.
            last: Whether they are to end.
        """
        if not _kept.are_there():
            raise LaunchError(f"{words}: no ranks are kept. A cell with %%ddp --keep starts them")
        results = self._perform_job(
            cell=Cell("", f"<{words}>", 0),
            names=names,
            options=Options(keep=True, on=on),
            wanted=wanted or Wanted(),
            place=words,
            # What ranks print as they end is the last of what they have printed.
            own=not last,
            push=push,
            last=last,
        )
        self._space.update(results)
        if (kept := _kept.current()) is not None:
            kept.came_back(results)

    # Cells that go to the kept ranks without saying so.

    def auto(self, asked: Sequence[str]) -> None:
        """Send the cells that follow to the kept ranks, or no more."""
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
        magic = magic or (len(lines) == 1 and text.rstrip().endswith("?"))
        # What a magic of a cell runs, such as %%time, is a part of that cell.
        if self._auto_options is None or self._depth or not text or magic:
            return lines
        return [f"%%ddp {self._auto_options} --auto\n", *lines]

    def cell_begins(self, *_: object) -> None:
        """Take note that the shell runs a cell, or one within another."""
        self._depth += 1

    def cell_ends(self, *_: object) -> None:
        """Take note that it has ended."""
        self._depth = max(0, self._depth - 1)

    def not_again(self, run: Callable[[], _Result]) -> _Result:
        """Prepare and run a cell; what it consists of is not sent once more meanwhile."""
        # No context manager: it would set the traceback of exceptions that pass, which some classes do not allow.
        auto, self._auto_options = self._auto_options, None
        try:
            return run()
        finally:
            self._auto_options = self._auto_options or auto


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
