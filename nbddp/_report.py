"""What the user is told of a run that did not end well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbddp import _advice, _doctor, _limits, _machines, _palette, _raised, _where
from nbddp._agent import Launch
from nbddp._errors import LaunchError, RankError, RunLostError, RunTimeout
from nbddp._paths import RunDir
from nbddp._rank_state import RankState, how_it_died, in_short, in_short_of_other, rank_list
from nbddp._run import Ending
from nbddp._stop import InterruptGate
from nbddp._where import Sources

# How much of torchrun's log is shown when it could not start the ranks.
_LOG_LINES = 30


@dataclass(frozen=True)
class Circumstances:
    """What there is to know of a run besides how it ended.

    Attributes:
        run_dir: Its files, still there.
        sources: The code that ran.
        launch: What the launcher was asked for.
        timeout: The --timeout that it had.
        oom_kills: How many processes the system killed for want of memory during the run.
        said: The end of what each rank has printed.
        known: Names that the notebook has and the ranks were not given.
        sent: The objects that went to the ranks.
        gate: Tells of interrupts.
        launcher: What the launcher said last, if it ended before the run did.
        holders: For each name that some of the kept ranks hold, and not all, those that do.
    """

    run_dir: RunDir
    sources: Sources
    launch: Launch
    timeout: float | None
    gate: InterruptGate
    oom_kills: int
    said: Mapping[int, str]
    known: Iterable[str] = ()
    sent: Sequence[Any] = ()
    launcher: str | None = None
    holders: Mapping[str, Sequence[int]] = field(default_factory=dict)


def error_of(ending: Ending, run: Circumstances) -> BaseException:
    """Return the exception for a run that did not end well."""
    if ending.cause in ("interrupted", "timeout"):
        lines = _where.lines_of(ending.ranks, run.run_dir, run.sources)
        where = f": {_machines.waiting(run.launch)}" if run.launch.nnodes > 1 else ""
        lines = lines or [f"no rank had started yet{where}"]
        if not all(state.in_cell or state.outcome for state in ending.ranks.values()) or not ending.ranks:
            lines += _hindrances(run)
        if ending.cause == "interrupted":
            if ending.killed and ending.ranks:
                lines.append("nbddp: not every rank ended by itself; those that did not were killed")
            return interrupted(lines)
        return RunTimeout(f"the run was stopped after --timeout {run.timeout:g} seconds", where=tuple(lines))
    nodes = ending.nodes
    if nodes is not None and nodes.lost is not None and not _has_said_why(ending.first):
        return RunLostError(nodes.lost)
    if ending.refusal is not None:
        return LaunchError(f"no rank could be started: {ending.refusal}")
    if run.launcher is not None and nodes is not None:
        return RunLostError("nbddp's gateway to the nodes ended, and the run with it", notes=(run.launcher,))
    if run.launcher is not None:
        return RunLostError("nbddp's launcher ended, and the run with it", notes=(run.launcher,))
    first = ending.first if ending.cause != "no ranks" else None
    # Some ranks may be there already when there is no room for the next.
    if first is None or (first.outcome is None and not first.in_cell):
        words, what = (
            (nodes is not None and tuple(nodes.agent_words)) or _last_words(run.run_dir),
            "torchrun could not start the ranks",
        )
        if (explained := _limits.explanation(what, "\n".join(words))) is not None:
            return LaunchError(explained)
        if first is None and run.launch.nnodes > 1:
            return LaunchError(f"{what}: {_machines.explanation(run.launch, words)}")
        if first is None:
            if ending.agent_status is not None and ending.agent_status < 0:
                what += f": its agent {how_it_died(ending.agent_status)}"
            return LaunchError(what, notes=(*words, *_hindrances(run)))
    said_nothing = first.outcome is None and first.failing is None
    if ending.agent_status is not None and ending.agent_status < 0 and said_nothing:
        return RunLostError(f"torchrun's agent {how_it_died(ending.agent_status)}, and the ranks with it")
    return _rank_error(ending, _best_told(ending, first), run)


def _has_said_why(first: RankState | None) -> bool:
    """Tell whether a rank has failed by itself, before or beside what has ended the run."""
    return first is not None and (first.outcome or first.failing) is not None and not first.is_consequence


def _best_told(ending: Ending, first: RankState) -> RankState:
    """Return the rank whose failure is told: the first, or one that has failed alike and could say how.

    torchrun ends all ranks as soon as one is gone. Where ranks are new interpreters a traceback takes a second, and who
    begins with it first need not be done first.
    """
    if first.outcome is not None or first.failing is None:
        return first
    alike = (
        state
        for state in ending.ranks.values()
        if (state.outcome or {}).get("outcome") == "raised"
        and (in_short(state) == in_short(first) or (state.is_consequence and first.is_consequence))
    )
    return next(alike, first)


def _hindrances(run: Circumstances) -> list[str]:
    """Return what there is on this machine that keeps ranks from starting; a line each, as ``%ddp doctor`` has it."""
    if run.launch.placement is not None:
        return []
    return [finding.line() for finding in _doctor.quick(run.launch.env, run.launch.ranks)]


def interrupted(lines: Sequence[str], summary: str = "the run was interrupted") -> KeyboardInterrupt:
    """Return what an interrupt raises: it shows these lines and this summary, and none of nbddp's own frames."""
    error = KeyboardInterrupt("\n".join(lines) or summary)
    # IPython asks the exception itself for its traceback; a subclass would change its name.
    error._render_traceback_ = lambda: [*lines, f"KeyboardInterrupt: {summary}"]  # type: ignore[attr-defined]
    return error


@dataclass
class _Story:
    """What is told of the rank that failed first.

    Attributes:
        message: What happened, in a sentence that names the rank.
        headline: The same, for behind the traceback of the exception.
        details: The traceback.
        notes: What to do about it.
        exitcode: How its process ended, if the rank raised nothing.
    """

    message: str
    headline: str = ""
    details: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    exitcode: int | None = None


def _rank_error(ending: Ending, first: RankState, run: Circumstances) -> RankError:
    story = _story(ending, first, run)
    others = {state.rank: in_short_of_other(state, first) for state in ending.ranks.values() if state is not first}
    folded = "; ".join(_where.grouped(others))
    error = RankError(
        story.message,
        rank=first.rank,
        exception=(first.outcome or first.failing or {}).get("exception"),
        exitcode=story.exitcode,
        others=others,
        tracebacks={
            state.rank: _palette.uncoloured("\n".join(state.outcome["lines"]))
            for _, state in sorted(ending.ranks.items())
            if state.outcome is not None and "lines" in state.outcome
        },
        details=story.details,
        notes=tuple(filter(None, [folded, *story.notes])),
    )
    if first.pickled is not None:
        # What unpickling calls is the user's code: an interrupt ends it.
        with contextlib.suppress(KeyboardInterrupt), run.gate.open():
            return _raised.as_itself(error, first.pickled, story.headline, run.sent)
    return error


def _story(ending: Ending, first: RankState, run: Circumstances) -> _Story:
    name = f"rank {first.rank} of {first.world}" if first.world > 1 else f"rank {first.rank}"
    if ending.nodes is not None and first.node is not None:
        name += f" on {ending.nodes.called(first.node)}"
    outcome = first.outcome or {}
    match outcome.get("outcome"):
        case "raised":
            return _story_of_exception(name, ending, first, run)
        case "exited":
            return _Story(f"{name} {in_short(first)} (sys.exit)", exitcode=outcome["code"])
        case "interrupted":
            details = (f"[rank {first.rank}]", *outcome["lines"])
            return _Story(f"{name} was interrupted, but not by this notebook", details=details)
    if first.failing is not None:
        return _Story(
            f"{name} raised {in_short(first)}",
            notes=["nbddp ended it before it could send its traceback; %ddp log has what it printed"],
        )
    story = _Story(f"{name} {how_it_died(first.exitcode)}", exitcode=first.exitcode)
    story.notes += _where.last_words(first, run.run_dir, run.sources)
    said = run.said.get(first.local, "")
    if explained := _limits.explanation_of_death(run.launch.ranks, said) or _advice.on_exception("", said):
        story.notes.append(explained)
    if first.exitcode == -9 and (run.oom_kills if first.node is None else first.oom_kills):
        story.notes.append(
            "The system killed a process for want of memory during this run. Less data per rank, a smaller batch or "
            "fewer ranks would need less"
        )
    return story


def _story_of_exception(name: str, ending: Ending, first: RankState, run: Circumstances) -> _Story:
    outcome = first.outcome or {}
    message, headline = f"{name} raised {in_short(first)}", f"{name} raised this"
    if "loading" in outcome:
        what = f"{outcome['loading']!r}, which the cell uses"
        message, headline = f"{name} could not load {what}: {in_short(first)}", f"{name} could not load {what}"
    story = _Story(message, headline, (f"[rank {first.rank}]", *outcome["lines"]))
    if outcome.get("missing") in set(run.known):
        story.notes.append(
            f"The notebook has a variable {outcome['missing']!r}, but the cell does not name it in a way that nbddp "
            "can see; mention it in the cell"
        )
    if (holders := run.holders.get(outcome.get("missing") or "")) is not None:
        have = "holds" if len(holders) == 1 else "hold"
        story.notes.append(f"Only {rank_list(holders)} {have} {outcome['missing']!r}; a cell has bound it there alone")
    if ending.nodes is not None and (there := _advice.on_module_missing(outcome["exception"], outcome["message"])):
        story.notes.append(there)
    explained = _limits.explanation_of_error(outcome["message"], "\n".join(outcome["lines"]))
    finished = [s.rank for _, s in sorted(ending.ranks.items()) if (s.outcome or {}).get("outcome") == "done"]
    if first.is_consequence and first.world > run.launch.ranks:
        story.notes.append(_advice.on_end_elsewhere(finished=bool(finished)))
    elif finished and first.is_consequence:
        story.notes.append(_advice.on_early_end(rank_list(finished)))
    elif explained is not None:
        story.notes.append(explained)
    elif advice := _advice.on_exception(outcome["exception"], outcome["message"]):
        story.notes.append(advice)
    return story


def _last_words(run_dir: RunDir) -> tuple[str, ...]:
    """Return the end of the agent's log."""
    with contextlib.suppress(OSError), open(run_dir.agent_log, errors="replace") as file:
        return tuple(file.read().strip().splitlines()[-_LOG_LINES:])
    return ()
