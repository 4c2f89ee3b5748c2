"""What the user is told of a run that did not end well."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nbddp import _limits
from nbddp._errors import LaunchError, NbddpError, RankError, RunLostError, RunTimeout
from nbddp._paths import RunDir
from nbddp._ranks import PEER_GONE, RankState, how_it_died, in_short, in_short_of_other
from nbddp._run import Ending
from nbddp._script import Cell

_FRAME = re.compile(r'File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')

# How much of torchrun's log is shown when it could not start the ranks.
_LOG_LINES = 30


def error_of(
    ending: Ending,
    *,
    run_dir: RunDir,
    cell: Cell,
    ranks: int,
    timeout: float | None,
    oom_kills: int,
    known: Iterable[str] = (),
    launcher: str | None = None,
    said: Mapping[int, str] | None = None,
) -> BaseException:
    """Return the exception for a run that did not end well.

    Args:
        ending: How it ended.
        run_dir: Its files, still there.
        cell: The cell that ran.
        ranks: How many ranks it had.
        timeout: The --timeout that it had.
        oom_kills: How many processes the system killed for want of memory during the run.
        known: Names that the notebook has and the ranks were not given.
        launcher: What the launcher said last, if it ended before the run did.
        said: The end of what each rank has printed.
    """
    where = [_where(state, run_dir, cell) for _, state in sorted(ending.ranks.items())]
    match ending.cause:
        case "interrupted":
            return _interrupt(where, ending.killed)
        case "timeout":
            message = f"the run was stopped after --timeout {timeout:g} seconds"
            return RunTimeout(message, notes=tuple(where))
    if ending.refusal is not None:
        return LaunchError(f"no rank could be started: {ending.refusal}")
    if launcher is not None:
        return RunLostError("nbddp's launcher ended, and the run with it", notes=(launcher,))
    if ending.cause == "no ranks" or ending.first is None:
        words = _last_words(run_dir)
        what = "torchrun could not start the ranks"
        if (explained := _limits.explanation(what, "\n".join(words))) is not None:
            return LaunchError(explained)
        return LaunchError(what, notes=words)
    if ending.agent_status is not None and ending.agent_status < 0 and ending.first.outcome is None:
        return RunLostError(f"torchrun's agent {how_it_died(ending.agent_status)}, and the ranks with it")
    output = (said or {}).get(ending.first.rank, "")
    return _rank_error(ending, ending.first, run_dir, cell, ranks, oom_kills, set(known), output)


def _interrupt(where: Sequence[str], killed: bool) -> KeyboardInterrupt:
    lines = list(where)
    if killed:
        lines.append("nbddp: not every rank ended by itself; those that did not were killed")
    error = KeyboardInterrupt("\n".join(lines))
    # IPython asks the exception itself for its traceback; a subclass would change its name.
    error._render_traceback_ = lambda: [*lines, "KeyboardInterrupt: the run was interrupted"]  # type: ignore[attr-defined]
    return error


def _rank_error(
    ending: Ending,
    first: RankState,
    run_dir: RunDir,
    cell: Cell,
    ranks: int,
    oom_kills: int,
    known: set[str],
    output: str,
) -> NbddpError:
    name = f"rank {first.rank} of {ranks}" if ranks > 1 else f"rank {first.rank}"
    outcome = first.outcome or {}
    details: list[str] = []
    notes: list[str] = []
    exception = exitcode = None
    match outcome.get("outcome"):
        case "raised":
            exception = outcome["exception"]
            details = [f"[rank {first.rank}]", *outcome["lines"]]
            message = f"{name} raised {in_short(first)}"
            if "loading" in outcome:
                message = f"{name} could not load {outcome['loading']!r}, which the cell uses: {in_short(first)}"
            if outcome.get("missing") in known:
                notes.append(
                    f"The notebook has a variable {outcome['missing']!r}, but the cell does not name it in a way that "
                    "nbddp can see; mention it in the cell"
                )
            if (explained := _limits.explanation_of_error(outcome["message"])) is not None:
                notes.append(explained)
            finished = [r for r, s in sorted(ending.ranks.items()) if (s.outcome or {}).get("outcome") == "done"]
            if finished and PEER_GONE.search(outcome["message"]):
                notes.append(
                    f"It waited for {_ranks(finished)}, which had finished: every rank must call the same collectives"
                )
        case "exited":
            exitcode = outcome["code"]
            message = f"{name} {in_short(first)} (sys.exit)"
        case "interrupted":
            message = f"{name} was interrupted, but not by this notebook"
        case _:
            exitcode = first.exitcode
            message = f"{name} {how_it_died(exitcode)}"
            notes += _last_stack(first, run_dir, cell)
            if (explained := _limits.explanation_of_death(ranks, output)) is not None:
                notes.append(explained)
            if exitcode == -9 and oom_kills:
                notes.append(
                    "The system killed a process for want of memory during this run. Less data per rank, a smaller "
                    "batch or fewer ranks would need less"
                )
    others = {rank: in_short_of_other(state, first) for rank, state in ending.ranks.items() if state is not first}
    folded = _folded(others)
    if folded:
        notes.append(folded)
    return RankError(
        message,
        rank=first.rank,
        exception=exception,
        exitcode=exitcode,
        others=others,
        details=tuple(details),
        notes=tuple(notes),
    )


def _folded(others: dict[int, str]) -> str:
    """Return one line for all ranks but the one that failed first."""
    by_text: dict[str, list[int]] = {}
    for rank, text in sorted(others.items()):
        by_text.setdefault(text, []).append(rank)
    return "; ".join(f"{_ranks(ranks)}: {text}" for text, ranks in by_text.items())


def _ranks(ranks: Sequence[int]) -> str:
    """Return rank numbers as a person writes them: ``rank 3``, ``ranks 0, 2-5``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def _where(state: RankState, run_dir: RunDir, cell: Cell) -> str:
    """Return a line that says where a rank was when its stack was taken."""
    frames = _frames(_stack_text(state, run_dir))
    if not state.in_cell:
        return f"rank {state.rank}: starting"
    if not frames:
        return f"rank {state.rank}: {in_short(state)}"
    return f"rank {state.rank}: {_place(frames, cell)}"


def _place(frames: Sequence[dict[str, Any]], cell: Cell) -> str:
    innermost = frames[0]
    in_cell = next((frame for frame in frames if frame["file"] == cell.filename), None)
    if in_cell is None:
        return f"in {_named(innermost)}"
    if in_cell is innermost:
        return f"on line {in_cell['line']} of the cell"
    return f"on line {in_cell['line']} of the cell, in {_named(innermost)}"


def _named(frame: dict[str, Any]) -> str:
    file = frame["file"].replace("\\", "/")
    _, found, inside = file.rpartition("site-packages/")
    if not found:
        inside = os.path.basename(file)
    return f"{frame['function']} ({inside}, line {frame['line']})"


def _frames(text: str) -> list[dict[str, Any]]:
    """Return the frames of the first stack in what faulthandler wrote, innermost first."""
    frames = []
    for line in text.splitlines():
        match = _FRAME.search(line)
        if match:
            frames.append(match.groupdict())
        elif frames:
            break
    return frames


def _last_stack(state: RankState, run_dir: RunDir, cell: Cell) -> list[str]:
    """Return what faulthandler wrote when a signal such as SIGSEGV ended the rank."""
    text = _stack_text(state, run_dir)
    if not text.startswith("Fatal Python error"):
        return []
    frames = _frames(text)
    return [text.splitlines()[0], *([f"rank {state.rank} was {_place(frames, cell)}"] if frames else [])]


def _stack_text(state: RankState, run_dir: RunDir) -> str:
    with contextlib.suppress(OSError), open(run_dir.stacks(state.rank), errors="replace") as file:
        return file.read()
    return ""


def _last_words(run_dir: RunDir) -> tuple[str, ...]:
    """Return the end of the agent's log."""
    with contextlib.suppress(OSError), open(run_dir.agent_log, errors="replace") as file:
        return tuple(file.read().strip().splitlines()[-_LOG_LINES:])
    return ()
