"""What ``%ddp`` knows besides expressions: its words, their help, and those of them that only look."""

from __future__ import annotations

import argparse
import sys
import time
from typing import NoReturn

from IPython.core.error import UsageError

from nbddp import _doctor, _kept, _running
from nbddp._function import client


class LineParser(argparse.ArgumentParser):
    """Reads what stands behind a word of ``%ddp``."""

    def __init__(self, usage: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self._usage = usage

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self._usage.partition(' [')[0]}: {message}. {self._usage}")


def status() -> str:
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


def stacks() -> str:
    """Return where the ranks are of the runs that are under way."""
    under_way = list(_running.running)
    return "\n".join(one.heading() + "\n".join(one.stacks() or [_NONE_YET]) for one in under_way) or _NOTHING


_ANSWER_SECONDS = 0.2
_NOTHING = "nbddp: nothing is running"
_NONE_YET = "nbddp: no rank has started yet"


def examine() -> None:
    """Print what may stop a run, line by line as it is found."""
    findings = []
    for finding in _doctor.examine(client):
        findings.append(finding)
        sys.stdout.write(f"{finding.line()}\n")
        sys.stdout.flush()
    sys.stdout.write(f"nbddp: {_doctor.verdict(findings)}\n")


# What wins over an expression that begins with the same word.
COMMANDS = (
    *("log", "status", "stacks", "results", "explain", "export", "doctor"),
    *("push", "pull", "stop", "auto"),
)

LINE_HELP = """\
%ddp [options] EXPRESSION
                 evaluate one line on fresh ranks and return what it is on rank 0, as in
                 x = %ddp --gpus 2 [rank, torch.cuda.get_device_name()]; the words below come first, so a variable
                 with one of these names goes in brackets: %ddp (log)
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
