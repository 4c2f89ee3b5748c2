"""The panel of a run: a row for each rank while it lasts, one line with a fold for each rank when it is over.

It is one display that is updated in place. HTML without scripts and style sheets, with colours that read on light and
dark; as plain text it says the same. Whatever comes from a rank is escaped.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nbddp import _palette
from nbddp._memory import Meter, of_ranks
from nbddp._output import RankOutput
from nbddp._placement import Nodes
from nbddp._progress import Progress, parse
from nbddp._rank_state import RankState, in_short, in_short_of_other
from nbddp._ranks import Ranks
from nbddp._screen import MimeBundle, Screen

# Seconds after which a cell gets a panel: a quick one shows its lines and nothing else. It begins when the first rank
# begins it; ranks that take long to start are worth a panel, too.
_AFTER = 1.0
_AFTER_LAUNCH = 3.0

# Seconds between two looks at many ranks and at few: the size of an update grows with them.
_EVERY, _EVERY_OF_FEW, _FEW = 0.5, 0.25, 8

# Seconds between two questions to the ranks where they are, and between two looks at their memory.
_ASK_EVERY = 1.0

_ROWS = 64
_COLUMNS = 6
_LINE = 100  # characters of a rank's last line that are shown
_BAR = 20  # cells of a bar drawn as text
_FOLDS = 32_000  # characters of all folds of a finished run together

_NEVER = float("inf")


@dataclass(frozen=True)
class Row:
    """What the panel says of a rank.

    Attributes:
        rank: Its number.
        state: "starting", "running", "waiting in all_reduce", "done", "failed" or "stopped".
        where: The line of the cell that it is at; None if that is not known.
        bars: Its progress bars.
        memory: Of its GPU, or of its process; empty if it is not known.
        line: The last that it has printed.
        node: Its node, where there are several; rows of one stand together.
    """

    rank: int
    state: str
    where: int | None = None
    bars: Sequence[Progress] = ()
    memory: str = ""
    line: str = ""
    node: str = ""


class Fold(NamedTuple):
    """What is left of a rank when it is over: its number, how it ended, and the end of its output."""

    rank: int
    title: str
    tail: str


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
        text: How it ended.
        folds: A fold for each rank.
        open: The rank whose fold is open.
    """

    text: str
    folds: Sequence[Fold]
    open: int | None = None


class Panel:
    """Follows a run, and shows the panel when it is due.

    Args:
        ranks: The ranks, as far as they have connected.
        count: How many there are to be.
        outputs: Their output.
        screen: Where to show it; None not to show any.
        meter: Reads their memory.
        nodes: The nodes that they are on; None if they are on this machine.

    Attributes:
        due: When `tick` is to be called (``time.monotonic``); infinity if there is no need.
    """

    def __init__(
        self,
        ranks: Ranks,
        count: int,
        outputs: Sequence[RankOutput],
        screen: Screen | None,
        meter: Meter,
        nodes: Nodes | None = None,
    ) -> None:
        self._ranks = ranks
        self._count = count
        self._nodes = nodes
        self._named = "1 rank" if count == 1 else f"{count} ranks"
        if nodes is not None and nodes.placement.nnodes > 1:
            self._named += f" on {nodes.placement.named()}"
        self._outputs = outputs
        self._screen = screen
        self._meter = meter
        self._began = time.monotonic()
        self._every = _EVERY_OF_FEW if count <= _FEW else _EVERY
        self._asked = 0.0
        self._shown: tuple[str, Sequence[Row]] | None = None
        self._memory: Mapping[int, str] = {}
        self.due = self._began + _AFTER_LAUNCH if screen is not None else _NEVER

    def begin(self) -> None:
        """Take note that a rank has begun the cell."""
        if self._screen is not None and self._shown is None:
            self.due = min(self.due, time.monotonic() + _AFTER)

    def tick(self) -> None:
        """Ask the ranks where they are, and show what is known."""
        now = time.monotonic()
        if self._screen is None or now < self.due:
            return
        # Not from now on: ticks come late by what the loop is doing.
        self.due = max(self.due + self._every, now)
        if now >= self._asked + _ASK_EVERY:
            self._asked = now
            self.look()
        self._show(self._bundle)

    def _bundle(self) -> MimeBundle | None:
        """Return the panel as it is now; None if it is shown like that already."""
        state = self._heading(), self.rows()
        if state == self._shown:
            return None
        self._shown = state
        return {"text/plain": as_text(*state), "text/html": as_html(*state)}

    def _last_bundle(self, cause: str) -> MimeBundle:
        summary = self.summary(cause)
        return {"text/plain": summary.text, "text/html": summary_as_html(summary)}

    def _show(self, make: Callable[[], MimeBundle | None]) -> None:
        """Show what a function returns; if that fails, no more is shown: what ranks print is not to end the run."""
        if self._screen is None:
            return
        try:
            if (bundle := make()) is not None:
                self._screen.panel(bundle)
        except Exception as error:
            self._screen.write(f"nbddp: the panel has failed ({type(error).__name__}: {error}); the run goes on\n")
            self._screen, self.due = None, _NEVER

    def look(self) -> None:
        """Ask the ranks where they are; the answers come as messages. Look at their memory."""
        for state in self._ranks.states.values():
            # One question at a time: to one that does not answer, what matters must still get through.
            if state.in_cell and not state.ended and state.outcome is None and not state.asked:
                state.asked = True
                self._ranks.tell(state, "look")
        self._memory = of_ranks(self._meter, self._ranks.states)

    def finish(self, cause: str) -> None:
        """Put the summary in the panel's place, if there is one; `cause` is that of the run's ending."""
        self.due = _NEVER
        if self._shown is not None:
            self._show(lambda: self._last_bundle(cause))
        self._screen = None

    def text(self) -> str:
        """Return the panel as text, for ``%ddp status``."""
        return as_text(self._heading(), self.rows())

    def rows(self) -> list[Row]:
        """Return what is known of each rank."""
        return [self._row(rank) for rank in range(min(self._count, _ROWS))]

    def summary(self, cause: str) -> Summary:
        """Return what is to be said of the run when it is over."""
        took = _duration(time.monotonic() - self._began)
        ranks = self._named
        failed = self._ranks.failed
        first = failed[0].rank if failed else None
        match cause:
            case "done":
                text = f"nbddp: {ranks} done in {took}"
            case "failed" if failed:
                text = f"nbddp: rank {first} failed after {took} ({_short(in_short(failed[0]))})"
            case "timeout":
                text = f"nbddp: {ranks} stopped by --timeout after {took}"
            case "interrupted":
                text = f"nbddp: {ranks} interrupted after {took}"
            case _:
                text = f"nbddp: {ranks} ended after {took}"
        each = min(_FOLDS // min(self._count, _ROWS), 4_000)
        folds = []
        for output in self._outputs[:_ROWS]:
            state = self._ranks.states.get(output.rank)
            number = output.rank + self._ranks.first
            how = "never started" if state is None else _short(self._how(state))
            lines = "1 line" if output.lines == 1 else f"{output.lines:,} lines"
            tail = output.recent[-each:]
            if len(tail) < len(output.recent) or output.lines > tail.count("\n"):
                tail = tail[tail.find("\n") + 1 :]
            folds.append(Fold(number, f"rank {number}: {how}, {lines}", tail))
        return Summary(text, folds, first if cause == "failed" else None)

    def _how(self, state: RankState) -> str:
        first = self._ranks.failed[:1]
        return in_short(state) if first in ([], [state]) else in_short_of_other(state, first[0])

    def _heading(self) -> str:
        first = f", the first {_ROWS} are shown" if self._count > _ROWS else ""
        stage = f"; {self._nodes.stage}" if self._nodes is not None and not self._ranks.states else ""
        return f"nbddp: {self._named}{first}, {_duration(time.monotonic() - self._began)}{stage}"

    def _row(self, rank: int) -> Row:
        state = self._ranks.states.get(rank)
        output = self._outputs[rank]
        current = output.current
        parsed = [(line, parse(line)) for line in current]
        bars = [bar for _, bar in parsed if bar is not None]
        last = next((line for line, bar in reversed(parsed) if bar is None), output.last_line)
        line = _palette.uncoloured(last[: 2 * _LINE]).strip()[:_LINE]
        name = _state_of(state)
        where = state.where if state is not None and name == "running" else {}
        if where.get("waits"):
            name = f"waiting in {where['waits']}"
        number = rank + self._ranks.first
        node = self._nodes.name_of(rank) if self._nodes is not None else ""
        return Row(number, name, where.get("line"), bars, self._memory.get(rank, ""), line, node)


def _state_of(state: RankState | None) -> str:
    if state is None or (not state.in_cell and state.outcome is None and not state.ended):
        return "starting"
    if state.failed_at is not None:
        return "failed"
    if state.stopped:
        return "stopped"
    return "done" if state.ended or state.outcome is not None else "running"


# As text.


def as_text(heading: str, rows: Sequence[Row]) -> str:
    """Return the panel as plain text."""
    table = [
        (
            node,
            f"rank {row.rank}",
            _with_line(row),
            "  ".join(filter(None, (_bar_as_text(bar) for bar in row.bars))),
            row.memory,
            row.line,
        )
        for node, row in _grouped(rows)
    ]
    widths = [max(len(entry[i]) for entry in table) for i in range(_COLUMNS)]
    lines = [
        "  ".join(f"{text:<{width}}" for text, width in zip(entry, widths, strict=True) if width) for entry in table
    ]
    return "\n".join([heading, *(line.rstrip() for line in lines)])


def _grouped(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """Yield each row with its node's name, where that differs from the row's before."""
    last = ""
    for row in rows:
        yield (row.node if row.node != last else ""), row
        last = row.node


def _with_line(row: Row) -> str:
    return f"{row.state}, line {row.where}" if row.where is not None else row.state


def _bar_as_text(bar: Progress) -> str:
    full = int(bar.fraction * _BAR)
    return f"{f'{bar.name} ' if bar.name else ''}{'█' * full}{'░' * (_BAR - full)} {_numbers(bar)}"


def _numbers(bar: Progress) -> str:
    percent = f"{bar.fraction:4.0%}"
    return ", ".join(filter(None, (percent, bar.count, f"{bar.left} left" if bar.left else "")))


# As HTML.

_TABLE = "border-collapse:collapse;font-family:monospace;font-size:90%;margin:0;width:100%;table-layout:auto"
_CELL = "text-align:left;padding:0 1em 0 0;white-space:nowrap;vertical-align:top;border:0;background:none"
# Takes the room that is left, and shows no more than fits.
_LAST_CELL = f"{_CELL};width:100%;max-width:0;overflow:hidden;text-overflow:ellipsis"
_FADED = "opacity:0.7"
_MARK = {"failed": "font-weight:bold;color:#d7005f", "done": _FADED, "stopped": _FADED, "starting": _FADED}


def as_html(heading: str, rows: Sequence[Row]) -> str:
    """Return the panel as HTML."""
    cells = [_cells(node, row) for node, row in _grouped(rows)]
    columns = [i for i in range(_COLUMNS) if i in (1, 2, _COLUMNS - 1) or any(row[i] for row in cells)]
    body = "".join(
        "<tr style='background:none'>"
        + "".join(f"<td style='{_LAST_CELL if i == _COLUMNS - 1 else _CELL}'>{row[i]}</td>" for i in columns)
        + "</tr>"
        for row in cells
    )
    return (
        f"<div style='{_FADED};font-family:monospace;font-size:90%'>{html.escape(heading)}</div>"
        f"<table style='{_TABLE}'>{body}</table>"
    )


def _cells(node: str, row: Row) -> tuple[str, ...]:
    label = f"<span style='color:{_palette.html_colour(row.rank)};font-weight:bold'>rank {row.rank}</span>"
    state = f"<span style='{_MARK.get(row.state, '')}'>{html.escape(_with_line(row))}</span>"
    bars = "<br>".join(map(_bar_as_html, row.bars))
    return html.escape(node), label, state, bars, html.escape(row.memory), html.escape(row.line)


def _bar_as_html(bar: Progress) -> str:
    name = f"{html.escape(bar.name)} " if bar.name else ""
    return (
        f"{name}<progress value='{bar.fraction:.4f}' max='1' style='width:8em;height:0.9em;vertical-align:middle'>"
        f"</progress> {html.escape(_numbers(bar))}"
    )


def summary_as_html(summary: Summary) -> str:
    """Return the line and the folds of a finished run as HTML."""
    folds = "".join(
        f"<details{' open' if fold.rank == summary.open else ''} style='margin:0 0 0 1em'>"
        f"<summary>{html.escape(fold.title)}</summary>"
        f"<pre style='margin:0 0 0 1em;background:none'>{html.escape(_palette.uncoloured(fold.tail))}</pre>"
        + (
            f"<div style='{_FADED};margin:0 0 0 1em'>all of it: <code>%ddp log --rank {fold.rank}</code></div>"
            if fold.tail
            else ""
        )
        + "</details>"
        for fold in summary.folds
    )
    return (
        f"<details{' open' if summary.open is not None else ''} style='font-family:monospace;font-size:90%'>"
        f"<summary>{html.escape(summary.text)}</summary>{folds}</details>"
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02} min"


def _short(text: str) -> str:
    return text if len(text) <= _LINE else text[: _LINE - 1] + "…"
