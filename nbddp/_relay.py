"""From what ranks write to what the notebook shows.

::

    RankOutput ──lines──> labelled, in order of arrival ──> queue ──> screen    the first part, live
         │                or, plainly, rank after rank        │
         │                                                    └─ at the pace that the server and the browser take
         └──hidden lines──> tail ─────────────────────────────────> screen    the last part, at the end

A Jupyter server drops what comes faster than 1 MB/s, and its front ends slow to a crawl over a few MB in one cell. So a
cell shows a bounded amount: its beginning, a line that says what is left out, and its end. The logs have it all.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbddp import _palette
from nbddp._output import RankOutput, Text
from nbddp._paths import format_size
from nbddp._screen import MimeBundle, Screen

# Characters that a cell shows, and the part of them that is for the last lines (shared among the ranks).
TEXT_LIMIT = 800_000
_TAIL_PART = 0.25

# Bytes of images and other displays that a cell shows, and how many of them.
DISPLAY_LIMIT = 20_000_000
_DISPLAYS = 500

# A browser renders all text of a cell anew whenever some is added: from so many characters on, seconds between.
_PACE = ((64_000, 0.0), (256_000, 0.5), (1 << 62, 1.0))

# Seconds between two updates of one display, and between two clearings of the cell.
_UPDATE_EVERY = 0.1
_CLEAR_EVERY = 0.25

# Seconds without output after which a line that may still be drawn on is shown.
_SETTLE_AFTER = 0.5

_NEVER = float("inf")

# Who shows what no rank shows; and whose the characters are that all ranks share.
_NBDDP = -1


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
class _Display:
    """A mime bundle on its way to the screen."""

    data: MimeBundle
    metadata: MimeBundle
    transient: MimeBundle = field(default_factory=dict)
    update: bool = False

    @property
    def key(self) -> str | None:
        key = self.transient.get("display_id")
        return str(key) if key is not None else None


_Item = str | _Display

# What the last expression of a cell looks like: a mime bundle and its metadata.
Value = tuple[MimeBundle, MimeBundle]


class Relay:
    """The output of all ranks on one screen.

    Args:
        ranks: How many there are.
        logs: The directory of their logs.
        secret: Stands in the marks of this run.
        screen: Where output goes.
        view: How much of it, and how.

    Attributes:
        due: When `tick` is to be called (``time.monotonic``); infinity if there is no need.
        outputs: The ranks' output, by rank.
    """

    def __init__(self, ranks: int, logs: str, secret: str, screen: Screen, view: View | None = None) -> None:
        view = view or View()
        self._screen = screen
        self._several = ranks > 1
        self._width = len(str(ranks - 1))
        self._shown = frozenset(range(ranks) if view.ranks is None else view.ranks)
        self._plain = view.plain or not screen.in_place
        self._coloured = not self._plain and not os.environ.get("NO_COLOR")
        tail = int(view.text_limit * _TAIL_PART)
        count = max(1, len(self._shown))
        head = view.text_limit - tail
        # Where all ranks share it, who comes first gets most; what is to be the same at every run is shared out.
        self._left = dict.fromkeys(range(ranks), head // count) if self._plain else {_NBDDP: head}
        self._displays_left = view.display_limit
        self._display_count = _DISPLAYS
        self._hidden_displays = 0
        self.outputs: list[RankOutput] = []
        try:
            for rank in range(ranks):
                log = os.path.join(logs, f"rank{rank}.log")
                self.outputs.append(RankOutput(rank, log, secret, tail // count))
        except OSError:
            self.close()
            raise
        self._secret = secret
        self._displays: dict[tuple[int, int], dict[str, Any]] = {}
        # What ranks have written behind a mark whose display is still on its way.
        self._held: dict[int, deque[Text | int]] = {}
        self._own_ids: set[str] = set()
        # In a plain run, what the ranks after the first have to say waits here.
        self._first = min(self._shown, default=0)
        self._waiting: dict[int, list[_Item]] = {}
        # What the cell shows, for clearing; what is not on the screen yet; and updates of what is.
        self._showing: list[tuple[int, _Item]] = []
        self._queue: deque[_Item] = deque()
        self._updates: dict[str, _Display] = {}
        self._to_clear: set[int] = set()
        self._redraw = False
        self._written = 0
        self._next = self._next_update = self._next_clear = 0.0
        self._settle_at: dict[int, float] = {}
        self.due = _NEVER

    # What comes in.

    def feed(self, rank: int, data: bytes) -> None:
        """Show what a rank wrote, as far as it is complete."""
        output = self.outputs[rank]
        self._held.setdefault(rank, deque()).extend(output.feed(data))
        self._let_pass(rank)
        if output.waits:
            self._settle_at[rank] = time.monotonic() + _SETTLE_AFTER
        else:
            self._settle_at.pop(rank, None)
        self._pump()

    def display(self, rank: int, message: dict[str, Any]) -> None:
        """Take a display; it is shown where the rank's output has the mark for it."""
        self._displays[rank, message["number"]] = message
        self._let_pass(rank)
        self._pump()

    def say(self, line: str) -> None:
        """Show a line of nbddp's own."""
        self._emit(_NBDDP, line + "\n")
        self._pump()

    def tick(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        for rank in [rank for rank, at in self._settle_at.items() if at <= now]:
            del self._settle_at[rank]
            self._held.setdefault(rank, deque()).extend(self.outputs[rank].settle())
            self._let_pass(rank)
        self._pump()

    def close(self) -> None:
        """Close the logs; safe to call twice."""
        for output in self.outputs:
            output.close()

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
            self._held.setdefault(output.rank, deque()).extend(output.finish())
            self._let_pass(output.rank, all_of_it=True)
        self._settle_at.clear()
        for key in sorted(self._displays):
            self._display(key[0], self._displays.pop(key))
        for rank in sorted(self._shown):
            for waiting in self._waiting.pop(rank, ()):
                self._show(rank, waiting)
            self._show_tail(rank)
            if rank in values and rank != self._first and values[rank] != main:
                self._show_bundle(rank, _Display(*values[rank]))
        if self._hidden_displays:
            self._show(_NBDDP, f"nbddp: {self._hidden_displays:,} displays are not shown; %config DDPMagics.displays\n")
        self._pump(all_of_it=True)
        return main

    # What of it is shown.

    def _let_pass(self, rank: int, *, all_of_it: bool = False) -> None:
        """Take what a rank has written, up to a mark whose display is still on its way."""
        held = self._held.setdefault(rank, deque())
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
        output = self.outputs[rank]
        budget = rank if self._plain else _NBDDP
        left = self._left[budget]
        if left <= 0 or output.hidden_chars:
            output.hide(text)
            return
        if len(text.text) > left:
            cut = text.text.rfind("\n", 0, left) + 1
            output.hide(text._replace(text=text.text[cut:]))
            text = text._replace(text=text.text[:cut])
            self._left[budget] = 0
        if text.text:
            labelled = self._labelled(rank, text)
            self._left[budget] = max(0, self._left[budget] - len(labelled))
            self._emit(rank, labelled)

    def _display(self, rank: int, message: dict[str, Any]) -> None:
        """Take a display of a rank."""
        if rank not in self._shown:
            return
        if "clear" in message:
            if self._plain:
                return
            if message["clear"] == "wait":
                self._to_clear.add(rank)
            else:
                self._clear(rank)
            return
        display = _Display(message["data"], message["metadata"], message["transient"], message["update"])
        key = display.key
        if key is not None:
            own = f"{self._secret[:8]}.{rank}.{key}"
            if not display.update:
                self._own_ids.add(own)
            # Ids are each rank's own; another is of something that the notebook showed before.
            display.transient = {**display.transient, "display_id": own if own in self._own_ids else key}
        if display.update:
            self._update(display)
        else:
            self._show_display(rank, display)

    def _show_display(self, rank: int, display: _Display) -> None:
        size = _size(display.data)
        if self._display_count <= 0 or self._displays_left < size:
            self._hidden_displays += 1
            return
        self._display_count -= 1
        self._displays_left -= size
        self._show_bundle(rank, display, self._emit)

    def _show_bundle(self, rank: int, display: _Display, emit: Callable[[int, _Item], None] | None = None) -> None:
        emit = emit or self._show
        data = display.data
        if self._several and set(data) <= {"text/plain"} and display.key is None:
            emit(rank, self._labelled(rank, Text(f"{data.get('text/plain', '')}\n", False)))
            return
        if self._several:
            emit(rank, self._label(rank, stderr=False) + "\n")
        emit(rank, display)

    def _update(self, display: _Display) -> None:
        key = display.key
        shown = False
        for _, item in [*self._showing, *((r, i) for r, items in self._waiting.items() for i in items)]:
            if isinstance(item, _Display) and item.key == key:
                item.data, item.metadata = display.data, display.metadata
                shown = True
        if key is not None and (shown or key not in self._own_ids):
            self._updates[key] = display

    def _show_tail(self, rank: int) -> None:
        output = self.outputs[rank]
        tail = output.take_tail()
        if output.hidden_lines:
            self._show(
                rank,
                f"… {output.hidden_lines:,} lines ({format_size(output.hidden_chars)}) of rank {rank} not shown; "
                f"%ddp log --rank {rank}\n",
            )
        for text in tail:
            self._show(rank, self._labelled(rank, text))

    # Labels.

    def _label(self, rank: int, *, stderr: bool) -> str:
        left, right = "()" if stderr else "[]"
        label = f"{left}rank {rank:>{self._width}}{right}"
        return _palette.coloured(label, rank) if self._coloured else label

    def _labelled(self, rank: int, text: Text) -> str:
        if not self._several:
            return text.text
        label = self._label(rank, stderr=text.stderr) + " "
        return label + text.text[:-1].replace("\n", "\n" + label) + "\n"

    # When it is shown.

    def _emit(self, rank: int, item: _Item) -> None:
        """Show an item when it is its turn."""
        if self._plain and rank not in (self._first, _NBDDP):
            self._waiting.setdefault(rank, []).append(item)
        else:
            self._show(rank, item)

    def _show(self, rank: int, item: _Item) -> None:
        if rank in self._to_clear:
            self._to_clear.discard(rank)
            self._clear(rank)
        self._showing.append((rank, item))
        if not self._redraw:
            self._queue.append(item)

    def _clear(self, rank: int) -> None:
        """Take away what a rank has shown; the others' stays."""
        for item in (item for r, item in self._showing if r == rank):
            if isinstance(item, str):
                self._left[_NBDDP] += len(item)
            else:
                self._display_count += 1
                self._displays_left += _size(item.data)
        self.outputs[rank].forget_hidden()
        self._showing = [(r, item) for r, item in self._showing if r != rank]
        self._redraw = True
        self._queue.clear()

    def _pump(self, *, all_of_it: bool = False) -> None:
        """Bring to the screen what may be brought now."""
        now = time.monotonic()
        if self._redraw and (all_of_it or now >= self._next_clear):
            self._redraw = False
            self._next_clear = now + _CLEAR_EVERY
            self._queue = deque(item for _, item in self._showing)
            self._written = 0
            self._screen.clear(wait=bool(self._queue))
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, _Display):
                self._screen.publish(item.data, item.metadata, item.transient, False)
                continue
            if now < self._next and not all_of_it:
                self._queue.appendleft(item)
                break
            room = self._screen.room() // 2  # labels and other than plain letters take more than a byte
            if len(item) > room:
                cut = item.rfind("\n", 0, max(0, room)) + 1
                self._queue.appendleft(item[cut:])
                item = item[:cut]
                if not item and not all_of_it:
                    self._next = now + _CLEAR_EVERY
                    break
                if not item:
                    time.sleep(_CLEAR_EVERY)
                    continue
            pieces, size = [item], len(item)
            while self._queue and isinstance(following := self._queue[0], str) and size + len(following) <= room:
                pieces.append(following)
                size += len(following)
                self._queue.popleft()
            item = "".join(pieces)
            self._screen.write(item)
            self._written += len(item)
            self._next = now + next(pause for size, pause in _PACE if self._written <= size)
        if self._updates and not self._redraw and (all_of_it or now >= self._next_update):
            self._next_update = now + _UPDATE_EVERY
            for display in self._updates.values():
                self._screen.publish(display.data, display.metadata, display.transient, True)
            self._updates.clear()
        self.due = min(
            min(self._settle_at.values(), default=_NEVER),
            self._next if self._queue else _NEVER,
            self._next_update if self._updates else _NEVER,
            self._next_clear if self._redraw else _NEVER,
        )


def _size(data: MimeBundle) -> int:
    return sum(len(value) if isinstance(value, str) else len(str(value)) for value in data.values())
