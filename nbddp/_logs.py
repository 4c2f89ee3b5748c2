"""The logs of the last run, as ``%ddp log`` shows them."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from nbddp._errors import LaunchError

_BLOCK = 1 << 16

# More than this is not to be poured into a notebook, whose server would drop it.
_SHOWN = 1_000_000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"%ddp log: {message}. %ddp log [--rank K] [--tail N] [--save PATH]")


def show(words: Sequence[str], logs: str | None) -> None:
    """Show the logs of the last run, or save them.

    Args:
        words: What stands behind ``%ddp log``.
        logs: The directory of the logs; None if nothing has run.

    Raises:
        ValueError: The words are none that can be.
        LaunchError: There is no such log, or it cannot be saved.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("number", nargs="?", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--tail", type=int)
    parser.add_argument("--save")
    asked = parser.parse_args(words)
    if asked.tail is not None and asked.tail < 1:
        raise ValueError(f"%ddp log --tail {asked.tail}: a number of lines above 0")
    if asked.number is not None and asked.rank is not None:
        raise ValueError(f"%ddp log {asked.number} --rank {asked.rank}: which of them is it to be?")
    if logs is None:
        raise LaunchError("there is no log: nothing has run yet")
    paths = _paths(logs)
    rank = asked.rank if asked.rank is not None else asked.number
    if rank is not None and rank not in paths:
        raise LaunchError(f"%ddp log --rank {rank}: the last run had ranks {min(paths)} to {max(paths)}")
    chosen = paths if rank is None else {rank: paths[rank]}
    if asked.save is not None:
        _save(chosen, asked.save)
    elif rank is None and asked.tail is None:
        for path in chosen.values():
            sys.stdout.write(f"{path}  {os.path.getsize(path):,} bytes\n")
    else:
        for number, path in chosen.items():
            if len(chosen) > 1:
                sys.stdout.write(f"rank {number}, {path}\n")
            sys.stdout.write(_text(path, asked.tail))


def _paths(logs: str) -> dict[int, str]:
    names = [name for name in os.listdir(logs) if name.startswith("rank") and name.endswith(".log")]
    ranks = sorted(int(name.removeprefix("rank").removesuffix(".log")) for name in names)
    return {rank: os.path.join(logs, f"rank{rank}.log") for rank in ranks}


def _text(path: str, lines: int | None) -> str:
    """Return a log's text, or its last lines; of a huge one its end, with a line that says so."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        data = b""
        at = size
        while at > 0 and len(data) < _SHOWN and (lines is None or data.count(b"\n") <= lines):
            step = min(_BLOCK, at)
            at -= step
            file.seek(at)
            data = file.read(step) + data
    text = data.decode("utf-8", "replace")
    if lines is not None:
        end = text.endswith("\n")
        text = "\n".join(text.removesuffix("\n").split("\n")[-lines:]) + ("\n" if end else "")
    if at > 0 and (lines is None or text.count("\n") < lines):
        text = f"… the last {len(data):,} of {size:,} bytes; %ddp log --save PATH copies all of it\n" + text
    return text if not text or text.endswith("\n") else text + "\n"


def _save(paths: dict[int, str], target: str) -> None:
    """Copy logs: one to a file, several into a folder."""
    target = os.path.expanduser(target)
    try:
        if len(paths) > 1:
            os.makedirs(target, exist_ok=True)
        for path in paths.values():
            shutil.copyfile(path, os.path.join(target, os.path.basename(path)) if os.path.isdir(target) else target)
    except OSError as error:
        raise LaunchError(f"%ddp log --save {target}: it cannot be written: {error.strerror}") from error
    many = "1 log" if len(paths) == 1 else f"{len(paths)} logs"
    sys.stdout.write(f"{many} saved: {os.path.abspath(target)}\n")
