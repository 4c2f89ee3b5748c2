"""The command ``nbddp``, which is ``python -m nbddp`` as well: what can be done with a notebook from outside.

Exit status: 0; 1 if a cell of ``run`` failed, or a script of ``export`` still lacks values; 2 if nothing was done, for
a reason that stderr says in a sentence.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from nbddp._errors import ExportError

_EXPORT = """\
Write a %%ddp cell as a script that plain torchrun runs, without nbddp: the
statements of other cells that it needs, the process group written out, and the
cell under if __name__ == "__main__".
"""

_EXPORT_END = """\
NUMBER is the one in brackets beside the cell, as the notebook shows it; in a
notebook that was saved without numbers, the one that "run all" would give.
Without --cell, the only %%ddp cell is taken.

Names whose values only a running notebook has (what another %%ddp cell brought
back, what input() returned) are named in the script and on stderr, and the exit
status is 1; %ddp export, in the running notebook, saves them beside the script.
If nothing could be written, the exit status is 2.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what a command line asks for.

    Args:
        arguments: Its words; None for this process's own.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # As it was before there were other commands: python -m nbddp NOTEBOOK
    if any(word.endswith(".ipynb") or os.path.isfile(word) for word in words) and not _COMMANDS & set(words[:1]):
        words.insert(0, "run")
    parser = argparse.ArgumentParser(prog="nbddp", description="Multi-GPU PyTorch from a notebook.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | export")
    _add_run(commands)
    _add_export(commands)
    given = parser.parse_args(words)
    return int(given.perform(given, commands.choices[given.command]))


_COMMANDS = frozenset({"run", "export"})


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run", help="run a notebook and print what its cells print", description="Run a notebook; print its output."
    )
    run.add_argument("notebook", help="the .ipynb file; it is not changed")
    run.add_argument("--timeout", type=float, help="seconds that one cell may take")
    run.set_defaults(perform=_run)


def _run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from nbddp._runner import run_notebook

    if not os.path.isfile(given.notebook):
        parser.error(f"there is no file {given.notebook}")
    return run_notebook(given.notebook, timeout=given.timeout)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a %%%%ddp cell as a script for plain torchrun",
        description=_EXPORT,
        epilog=_EXPORT_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("notebook", help="the .ipynb file; it is not changed, and no cell of it is run")
    export.add_argument("--cell", metavar="NUMBER|TAG", help="which cell, if there are several")
    export.add_argument("-o", "--output", metavar="FILE", help="the script (default: NOTEBOOK.py); - for stdout")
    export.add_argument("--force", action="store_true", help="replace files that are there")
    export.set_defaults(perform=_export)


def _export(given: argparse.Namespace, _: argparse.ArgumentParser) -> int:
    from nbddp._export import from_file

    try:
        exported = from_file(given.notebook, given.cell, given.output, force=given.force)
    except ExportError as error:
        print(f"nbddp export: {error}", *error.details, sep="\n", file=sys.stderr)
        return 2
    for note in exported.notes:
        print(f"nbddp export: {note}", file=sys.stderr)
    if exported.path is None:
        print(exported.text, end="")
    else:
        print(f"{os.path.relpath(exported.path)} is written; {exported.command}")
    return 1 if exported.missing else 0
