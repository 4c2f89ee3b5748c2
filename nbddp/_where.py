"""Where ranks are: from the stacks that they write themselves to one line for all that are at the same place."""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nbddp._paths import RunDir
from nbddp._rank_state import RankState, in_short, rank_list
from nbddp._script import Cell
from nbddp._uplink import COLLECTIVES

_FRAME = re.compile(r'File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')

# What a rank does before the cell begins, by the function of nbddp's that it is in.
_STAGES = {
    "init": "joining the process group",
    "own_device": "taking its device",
    "load": "loading what the cell uses",
    "load_file": "loading what the cell uses",
}

_FATAL = "Fatal Python error"

# How much of a line of code is shown.
_CODE_WIDTH = 60

_OWN = os.path.dirname(__file__)
_LIBRARIES = tuple({os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib")})


@dataclass(frozen=True)
class Frame:
    """One frame of a stack."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class Sources:
    """The code that a run's user has written.

    Attributes:
        cell: The cell that runs.
        script: The generated script, whose frames are not the user's.
        find: Returns the text and the execution count of the cell whose code has a file name; None for files.
    """

    cell: Cell
    script: str
    find: Callable[[str], tuple[str, int | None] | None] = lambda _: None

    def is_users(self, file: str) -> bool:
        """Tell whether code of this file is the user's, not a library's."""
        if file == self.cell.filename or self.find(file) is not None:
            return True
        library = file.startswith(("<", *_LIBRARIES)) or "-packages/" in file
        return not (library or file == self.script or os.path.dirname(file) == _OWN)

    def name(self, file: str) -> str:
        """Return what a reader knows the file by."""
        if file == self.cell.filename:
            return "the cell"
        found = self.find(file)
        if found is None:
            return os.path.basename(file)
        return "another cell" if found[1] is None else f"In [{found[1]}]"

    def code(self, frame: Frame) -> str:
        """Return the line of a cell that a frame is at; nothing for other files."""
        if frame.file == self.cell.filename:
            text = self.cell.header + self.cell.source
        else:
            text = (self.find(frame.file) or ("",))[0]
        lines = text.splitlines()
        code = lines[frame.line - 1].strip() if 0 < frame.line <= len(lines) else ""
        return code if len(code) <= _CODE_WIDTH else f"{code[: _CODE_WIDTH - 1]}…"


def lines_of(states: Mapping[int, RankState], run_dir: RunDir, sources: Sources) -> list[str]:
    """Return a line for each group of ranks that were at the same place when their stacks were taken."""
    return grouped({state.rank: _place_of(state, run_dir, sources) for state in states.values()})


def has_answered(state: RankState, run_dir: RunDir) -> bool:
    """Tell whether a rank has written the stack that it was last asked for."""
    # A whole one: it ends with a line, and faulthandler writes piece by piece.
    return re.search(r"File .*\n$", _stack_text(state, run_dir)) is not None


def grouped(texts: Mapping[int, str]) -> list[str]:
    """Return each text once, behind the ranks that it is about."""
    by_text: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        by_text.setdefault(text, []).append(rank)
    return [f"{rank_list(of)}: {text}" for text, of in by_text.items()]


def last_words(state: RankState, run_dir: RunDir, sources: Sources) -> list[str]:
    """Return what faulthandler wrote when a signal such as SIGSEGV ended the rank."""
    text = _stack_text(state, run_dir)
    at = text.rfind(_FATAL)
    if at < 0:
        return []
    frames = _frames(text[at:])
    place = [f"rank {state.rank}: {_place(frames, sources)}"] if frames else []
    return [text[at:].splitlines()[0], *place]


def _place_of(state: RankState, run_dir: RunDir, sources: Sources) -> str:
    if state.outcome is not None and not state.interrupted:
        return in_short(state)
    text = _stack_text(state, run_dir)
    frames = _frames(text)
    # One that nbddp has ended since was asked before.
    if not text and (not state.ended or state.interrupted or state.stopped):
        return "no answer: it is stopped, or the machine is very busy"
    if not state.in_cell:
        stage = next((_STAGES[f.function] for f in frames if f.function in _STAGES and _is_own(f.file)), "")
        return f"starting, {stage}" if stage else "starting"
    return _place(frames, sources) if frames else in_short(state)


def _place(frames: Sequence[Frame], sources: Sources) -> str:
    """Return where a stack, innermost frame first, is: in words of the user's own code."""
    at = next((i for i, frame in enumerate(frames) if sources.is_users(frame.file)), None)
    if at is None and any(frame.file == sources.script for frame in frames):
        return "about to begin the cell, or at its end"
    if at is None:
        return f"in {frames[0].function} ({_short(frames[0].file)}, line {frames[0].line})"
    spot, library = frames[at], frames[:at]
    collective = next((f.function for f in reversed(library) if f.file.endswith(COLLECTIVES)), None)
    doing = []
    if collective is not None:
        doing.append(f"waiting in {collective}")
    elif library and not _is_own(library[-1].file):
        doing.append(f"in {library[-1].function} ({_short(library[-1].file)})")
    if not spot.function.startswith("<"):
        doing.append(f"in {spot.function}")
    place = f"{', '.join(doing)} on line" if doing else "on line"
    place += f" {spot.line} of {sources.name(spot.file)}"
    if code := sources.code(spot):
        place += f": {code}"
    called = next((f for f in reversed(frames) if f.file == sources.cell.filename), spot)
    return place if called is spot else f"{place} (called on line {called.line} of the cell)"


def _is_own(file: str) -> bool:
    return os.path.dirname(file) == _OWN


def _short(file: str) -> str:
    _, found, inside = file.replace("\\", "/").rpartition("-packages/")
    return inside if found else os.path.basename(file)


def _frames(text: str) -> list[Frame]:
    """Return the frames of the last stack in what faulthandler wrote, innermost first."""
    frames: list[Frame] = []
    ended = True
    for line in text.splitlines():
        match = _FRAME.search(line)
        if match is None:
            ended = True
            continue
        if ended:
            frames, ended = [], False
        frames.append(Frame(match["file"], int(match["line"]), match["function"]))
    return frames


def _stack_text(state: RankState, run_dir: RunDir) -> str:
    """Return what a rank has written since its stack was last asked for."""
    with contextlib.suppress(OSError), open(run_dir.stacks(state.local), "rb") as file:
        file.seek(state.stack_at)
        return file.read().decode(errors="replace")
    return ""
