"""From what ranks write to what the notebook shows.

::

    RankOutput ──lines──> labelled, in order of arrival ──> Pacer ──> screen    the first part, live
         │                or, plainly, rank after rank
         └──hidden lines──> tail ───────────────────────────────────> screen    the last part, at the end

A Jupyter server drops what comes faster than 1 MB/s, and its front ends slow to a crawl over a few MB in one cell. So a
cell shows a bounded amount: its beginning, a line that says what is left out, and its end. The logs have it all.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nbddp import _palette
from nbddp._log_files import Logs
from nbddp._output import RankOutput, Text
from nbddp._pace import Display, Pacer, Shown, charges
from nbddp._paths import format_size
from nbddp._screen import MimeBundle, Screen

# Characters that a cell shows, and the part of them that is for the last lines (shared among the ranks).
TEXT_LIMIT = 800_000
_TAIL_PART = 0.25

# Bytes of images and other displays that a cell shows, and how many of them.
DISPLAY_LIMIT = 20_000_000
_DISPLAYS = 500

# Characters up to which labels are coloured: a browser takes ten times as long for coloured text, and a flood is not
# read.
_COLOURED = 200_000

# Characters of another rank's value that are shown.
_VALUE = 20_000

_NEVER = float("inf")

# Who shows what no rank shows; and whose budget all ranks share.
_NBDDP = -1

# What the last expression of a cell looks like: a mime bundle and its metadata.
Value = tuple[MimeBundle, MimeBundle]


@dataclass
class View:
    """How much of a run is shown, and how.

    Attributes:
        ranks: Whose lines are shown; None for all.
        plain: Whether to show them rank after rank and in no colour, the same at every run.
        text_limit: Characters that are shown.
        display_limit: Bytes of displays that are shown.
    """

    ranks: Collection[int] | None = None
    plain: bool = False
    text_limit: int = TEXT_LIMIT
    display_limit: int = DISPLAY_LIMIT


@dataclass
class _Budget:
    """What may still be shown."""

    chars: int
    nbytes: int
    displays: int


class Relay:
    """The output of all ranks on one screen.

    Args:
        ranks: How many there are.
        logs: Their logs.
        secret: Stands in the marks of this run.
        screen: Where output goes.
        view: How much of it, and how.
        said: What nbddp itself has shown in this cell so far.
        per_node: How many ranks each node has, where labels are to say it; None where there is one machine.

    Attributes:
        outputs: The ranks' output, by rank.
    """

    def __init__(
        self,
        ranks: int,
        logs: Logs,
        secret: str,
        screen: Screen,
        view: View | None = None,
        said: str = "",
        per_node: int | None = None,
    ) -> None:
        self._view = view = view or View()
        self._count = ranks
        self._offset = 0
        self._several = ranks > 1
        self._width = len(str(ranks - 1))
        # By their numbers on this machine, as everything here; what users see is another number, see `number_from`.
        self._shown = frozenset(range(ranks) if view.ranks is None else view.ranks)
        self._plain = view.plain or not screen.in_place
        self._coloured = not self._plain and not os.environ.get("NO_COLOR")
        tail = int(view.text_limit * _TAIL_PART)
        count = max(1, len(self._shown))
        # Where all ranks share it, who comes first gets most; what is to be the same at every run is shared out.
        whose, shares = (range(ranks), count) if self._plain else ([_NBDDP], 1)
        self._budgets = {
            key: _Budget((view.text_limit - tail) // shares, view.display_limit // shares, max(1, _DISPLAYS // shares))
            for key in whose
        }
        self._per_node = per_node
        self._label_size = len(f"[{self._name(ranks - 1)}] ")
        self._pacer = Pacer(screen, in_place=not self._plain)
        if said:
            self._pacer.add_shown(Shown(_NBDDP, said))
        self._logs = logs
        self.outputs = [RankOutput(rank, logs.new(rank), secret, tail // count) for rank in range(ranks)]
        self._secret = secret
        # Displays by rank and number that have come before their mark; and what ranks have written behind a mark whose
        # display is still on its way.
        self._displays: dict[tuple[int, int], dict[str, Any]] = {}
        self._held: dict[int, deque[Text | int]] = {rank: deque() for rank in range(ranks)}
        self._own_ids: set[str] = set()
        self._to_clear: set[int] = set()
        self._hidden_displays: dict[int, int] = {}
        # In a plain run, what the ranks after the first have to say waits here.
        self._first = min(self._shown, default=0)
        self._waiting: dict[int, list[Shown]] = {}
        self._settle_at: dict[int, float] = {}

    @property
    def due(self) -> float:
        """When `tick` is to be called (``time.monotonic``); infinity if there is no need."""
        return min(self._pacer.due, min(self._settle_at.values(), default=_NEVER))

    def number_from(self, first: int, world: int) -> None:
        """Take note of what the ranks are called where there are several machines; before any of them has said a word.

        Args:
            first: The number of this machine's first rank.
            world: How many ranks there are on all machines.
        """
        if world == self._count:
            return
        self._offset = first
        self._several, self._width = True, len(str(world - 1))
        self._label_size = len(f"[rank {world - 1}] ")
        if self._view.ranks is not None:
            self._shown = frozenset(rank - first for rank in self._view.ranks) & frozenset(range(self._count))
            # If none is shown here, none is the first.
            self._first = min(self._shown, default=-1)

    # What comes in.

    def feed(self, rank: int, data: bytes) -> None:
        """Show what a rank wrote, as far as it is complete."""
        output = self.outputs[rank]
        self._held[rank].extend(output.feed(data))
        self._let_pass(rank)
        if output.waits and not self._plain:
            self._settle_at[rank] = time.monotonic() + output.patience
        else:
            self._settle_at.pop(rank, None)
        self._pacer.pump()

    def display(self, rank: int, message: dict[str, Any]) -> None:
        """Take a display; it is shown where the rank's output has the mark for it."""
        self._displays[rank, message["number"]] = message
        self._let_pass(rank)
        self._pacer.pump()

    def say(self, line: str) -> None:
        """Show a line of nbddp's own."""
        self._pacer.add(Shown(_NBDDP, line + "\n"))
        self._pacer.pump()

    def restart(self, rank: int) -> None:
        """Take note that a rank is a new process: what the old one has left unfinished is finished."""
        self._held[rank].extend(self.outputs[rank].restart())
        self._let_pass(rank, all_of_it=True)
        for key in [key for key in self._displays if key[0] == rank]:
            del self._displays[key]
        self._to_clear.discard(rank)
        self._settle_at.pop(rank, None)

    def tick(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        for rank in [rank for rank, at in self._settle_at.items() if at <= now]:
            del self._settle_at[rank]
            self._held[rank].extend(self.outputs[rank].settle())
            self._let_pass(rank)
        self._pacer.pump()

    def close(self) -> None:
        """Close the logs, and name them by the numbers that are shown; safe to call twice."""
        for output in self.outputs:
            output.close()
        if self._offset:
            self._logs.number_from(self._offset)
        self._offset = 0

    def finish(self, values: Mapping[int, Value] | None = None) -> Value | None:
        """Show what is left, and say what was left out.

        Args:
            values: The values of the last expression, by rank.

        Returns:
            The value that is the whole cell's: of the first rank that is shown. Others are shown if they differ.
        """
        values = values or {}
        main = values.get(self._first)
        for output in self.outputs:
            self._held[output.rank].extend(output.finish())
            self._let_pass(output.rank, all_of_it=True)
        self._settle_at.clear()
        for key in sorted(self._displays):
            self._display(key[0], self._displays.pop(key))
        for rank in sorted(self._shown):
            for waiting in self._waiting.pop(rank, ()):
                self._pacer.add(waiting)
            self._show_tail(rank)
            if rank in values and rank != self._first and values[rank] != main:
                self._show_value(rank, *values[rank])
        if hidden := sum(self._hidden_displays.values()):
            self._pacer.add(Shown(_NBDDP, f"nbddp: {hidden:,} displays are not shown; %config DDPMagics.displays\n"))
        self._pacer.pump(all_of_it=True)
        return main

    # What of it is shown.

    def _let_pass(self, rank: int, *, all_of_it: bool = False) -> None:
        """Take what a rank has written, up to a mark whose display is still on its way."""
        held = self._held[rank]
        while held:
            item = held[0]
            if isinstance(item, Text):
                self._take(rank, item)
            elif (rank, item) in self._displays:
                self._display(rank, self._displays.pop((rank, item)))
            elif not all_of_it:
                return
            held.popleft()

    def _take(self, rank: int, text: Text) -> None:
        """Take lines of a rank: show them, or keep them in case they are the last."""
        if rank not in self._shown:
            return
        self._clear_if_due(rank)
        output, budget = self.outputs[rank], self._budget(rank)
        if budget.chars <= 0 or output.hidden_chars:
            output.hide(text)
            return
        # Line by line, or how a text was divided into reads would tell in what is shown.
        label = self._label_size if self._several else 0
        cost = len(text.text) + text.text.count("\n") * label
        if cost > budget.chars:
            cut = cost = 0
            while (end := text.text.find("\n", cut) + 1) and cost + end - cut + label <= budget.chars:
                cost += end - cut + label
                cut = end
            output.hide(text._replace(text=text.text[cut:]))
            text = text._replace(text=text.text[:cut])
        budget.chars -= cost
        if text.text:
            self._show(Shown(rank, self._labelled(rank, text), chars=cost))

    def _budget(self, rank: int) -> _Budget:
        return self._budgets[rank if self._plain else _NBDDP]

    def _display(self, rank: int, message: dict[str, Any]) -> None:
        """Take a display of a rank."""
        # A value has its own way; only its mark is here.
        if rank not in self._shown or message.get("value"):
            return
        if "clear" in message:
            if not self._plain:
                self._to_clear.add(rank)
                if message["clear"] != "wait":
                    self._clear_if_due(rank)
            return
        display = Display(message["data"], message["metadata"], message["transient"], message["update"])
        if display.key is not None:
            own = f"{self._secret[:8]}.{rank}.{display.key}"
            if not display.update:
                self._own_ids.add(own)
            # Ids are each rank's own; another is of something that the notebook showed before.
            display.transient = {**display.transient, "display_id": own if own in self._own_ids else display.key}
        if display.update:
            self._pacer.update(display, elsewhere=display.key not in self._own_ids)
        else:
            self._show_display(rank, display)

    def _show_display(self, rank: int, display: Display) -> None:
        self._clear_if_due(rank)
        if self._several and set(display.data) <= {"text/plain"} and display.key is None:
            self._take(rank, Text(f"{display.data.get('text/plain', '')}\n", False))
            return
        budget, nbytes = self._budget(rank), display.nbytes
        if budget.displays <= 0 or budget.nbytes < nbytes:
            self._hidden_displays[rank] = self._hidden_displays.get(rank, 0) + 1
            return
        budget.displays -= 1
        budget.nbytes -= nbytes
        self._pacer.expect(display)
        if self._several:
            self._show(Shown(rank, self._label(rank, stderr=False) + "\n"))
        self._show(Shown(rank, display, nbytes=nbytes, displays=1))

    def _show_value(self, rank: int, data: MimeBundle, metadata: MimeBundle) -> None:
        if set(data) <= {"text/plain"}:
            text = str(data.get("text/plain", ""))[:_VALUE]
            self._pacer.add(Shown(rank, self._labelled(rank, Text(f"{text}\n", False))))
        else:
            self._pacer.add(Shown(rank, self._label(rank, stderr=False) + "\n"))
            self._pacer.add(Shown(rank, Display(data, metadata)))

    def _clear_if_due(self, rank: int) -> None:
        """Take away what a rank has shown, if it has asked for that; the others' stays."""
        if rank not in self._to_clear:
            return
        self._to_clear.discard(rank)
        chars, nbytes, displays = charges(self._pacer.clear(rank))
        budget = self._budget(rank)
        budget.chars += chars
        budget.nbytes += nbytes
        budget.displays += displays
        self.outputs[rank].forget_hidden()
        self._hidden_displays.pop(rank, None)

    def _show_tail(self, rank: int) -> None:
        output = self.outputs[rank]
        tail = output.take_tail(self._label_size if self._several else 0)
        if output.hidden_lines:
            size = format_size(output.hidden_chars)
            number = rank + self._offset
            note = f"… {output.hidden_lines:,} lines ({size}) of rank {number} not shown; %ddp log --rank {number}\n"
            self._pacer.add(Shown(rank, note))
        for text in tail:
            self._pacer.add(Shown(rank, self._labelled(rank, text)))

    def _show(self, shown: Shown) -> None:
        """Show an item when it is its rank's turn."""
        if self._plain and shown.rank != self._first:
            self._waiting.setdefault(shown.rank, []).append(shown)
        else:
            self._pacer.add(shown)

    # Labels.

    def _label(self, rank: int, *, stderr: bool) -> str:
        left, right = "()" if stderr else "[]"
        number = rank + self._offset
        label = f"{left}{self._name(number)}{right}"
        coloured = self._coloured and self._pacer.chars < _COLOURED
        return _palette.coloured(label, number) if coloured else label

    def _name(self, number: int) -> str:
        node = f"node{number // self._per_node} " if self._per_node is not None else ""
        return f"{node}rank {number:>{self._width}}"

    def _labelled(self, rank: int, text: Text) -> str:
        if not self._several:
            return text.text
        label = self._label(rank, stderr=text.stderr) + " "
        return label + text.text[:-1].replace("\n", "\n" + label) + "\n"
