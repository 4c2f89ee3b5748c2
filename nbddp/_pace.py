"""What the cell shows, brought to the screen at the pace that servers and browsers take; and taken away again.

Items wait in a queue until the screen has room. Clearing what one rank has shown clears the cell and shows the rest
anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from nbddp._screen import RATE, MimeBundle, Screen

# A browser renders all text of a cell anew whenever some is added: from so many characters on, seconds between.
_PACE = ((64_000, 0.0), (256_000, 0.5), (1 << 62, 1.0))

# Seconds between two updates of one display, between two clearings of the cell, and between two looks for room.
_UPDATE_EVERY = 0.1
_CLEAR_EVERY = 0.25
_LOOK_EVERY = 0.2

# Characters for which it is worth cutting a line in two.
_WORTH_CUTTING = 4_000

_NEVER = float("inf")


@dataclass(eq=False)
class Display:
    """A mime bundle on its way to the screen."""

    data: MimeBundle
    metadata: MimeBundle
    transient: MimeBundle = field(default_factory=dict)
    update: bool = False
    published: bool = False

    @property
    def key(self) -> str | None:
        """Its display id."""
        key = self.transient.get("display_id")
        return str(key) if key is not None else None

    @property
    def nbytes(self) -> int:
        """About the size of its content."""
        return sum(len(value) if isinstance(value, str) else len(str(value)) for value in self.data.values())


Item = str | Display


@dataclass
class Shown:
    """An item of the cell: whose it is, and what it was charged with."""

    rank: int
    item: Item
    chars: int = 0
    nbytes: int = 0
    displays: int = 0


class Pacer:
    """Brings items to a screen.

    Args:
        screen: The screen.
        in_place: Whether displays are updated as time goes by; else once, at the end.

    Attributes:
        chars: The length of the text that the cell shows.
        due: When `pump` is to be called (``time.monotonic``); infinity if there is no need.
    """

    def __init__(self, screen: Screen, *, in_place: bool) -> None:
        self._screen = screen
        self._in_place = in_place
        self._showing: list[Shown] = []
        self._queue: deque[Item] = deque()
        self._by_key: dict[str, list[Display]] = {}
        self._updates: dict[str, Display] = {}
        self._redraw = False
        self.chars = 0
        self._written = 0
        self._next = self._next_update = self._next_clear = 0.0
        self.due = _NEVER

    def add(self, shown: Shown) -> None:
        """Show an item behind the others."""
        self._showing.append(shown)
        item = shown.item
        self.chars += len(item) if isinstance(item, str) else 0
        if not self._redraw:
            self._queue.append(item)

    def add_shown(self, shown: Shown) -> None:
        """Take note of an item that is on the screen already."""
        self._showing.append(shown)

    def expect(self, display: Display) -> None:
        """Take note of a display that is to be shown, now or later: updates are for it, too."""
        if display.key is not None:
            self._by_key.setdefault(display.key, []).append(display)

    def update(self, display: Display, *, elsewhere: bool) -> None:
        """Update what has the same display id; with `elsewhere` it may be something that is not of this run."""
        key = display.key
        if key is None:
            return
        there = self._by_key.get(key, ())
        for shown in there:
            shown.data, shown.metadata = display.data, display.metadata
        if elsewhere or any(shown.published for shown in there):
            self._updates[key] = display

    def clear(self, rank: int) -> list[Shown]:
        """Take away what a rank has shown, and return it; the others' stays."""
        gone = [shown for shown in self._showing if shown.rank == rank]
        self._showing = [shown for shown in self._showing if shown.rank != rank]
        self.chars -= sum(len(shown.item) for shown in gone if isinstance(shown.item, str))
        for item in (shown.item for shown in gone):
            if isinstance(item, Display) and item.key is not None:
                self._by_key[item.key].remove(item)
                if not self._by_key[item.key]:
                    del self._by_key[item.key]
        self._redraw = True
        self._queue.clear()
        return gone

    def pump(self, *, all_of_it: bool = False) -> None:
        """Bring to the screen what may be brought now; or all of it, which may take a second or two."""
        now = time.monotonic()
        if self._redraw and (all_of_it or now >= self._next_clear):
            self._begin_anew(now)
        while self._queue:
            if isinstance(item := self._queue[0], Display):
                self._queue.popleft()
                self._publish(item, update=False)
                item.published = True
            elif now < self._next and not all_of_it:
                break
            elif text := self._take_text():
                self._screen.write(text)
                self._written += len(text)
                self._next = now + next(pause for limit, pause in _PACE if self._written <= limit)
            elif all_of_it:
                time.sleep(_LOOK_EVERY)
            else:
                self._next = now + _LOOK_EVERY
                break
        if self._updates and not self._redraw and (all_of_it or (self._in_place and now >= self._next_update)):
            self._next_update = now + _UPDATE_EVERY
            for display in self._updates.values():
                self._publish(display, update=True)
            self._updates.clear()
        self.due = min(
            self._next if self._queue else _NEVER,
            self._next_update if self._updates and self._in_place else _NEVER,
            self._next_clear if self._redraw else _NEVER,
        )

    def _begin_anew(self, now: float) -> None:
        """Clear the cell, and queue what is to stay."""
        self._redraw = False
        self._queue = deque(shown.item for shown in self._showing)
        size = sum(len(item) if isinstance(item, str) else item.nbytes for item in self._queue)
        # What is shown anew is to be there before it is cleared again.
        self._next_clear = now + max(_CLEAR_EVERY, 2 * size / RATE)
        self._written = 0
        self._next = 0.0
        self._screen.clear(wait=bool(self._queue))

    def _take_text(self) -> str:
        """Take as much text off the queue as the screen has room for; an empty one if it has none."""
        room = self._screen.room() // 2  # other than plain letters take more than a byte
        pieces: list[str] = []
        while self._queue and isinstance(item := self._queue[0], str):
            self._queue.popleft()
            if len(item) > room:
                cut = item.rfind("\n", 0, max(0, room)) + 1
                if not cut and not pieces and room > _WORTH_CUTTING:
                    cut = room
                self._queue.appendleft(item[cut:])
                pieces.append(item[:cut])
                break
            room -= len(item)
            pieces.append(item)
        return "".join(pieces)

    def _publish(self, display: Display, *, update: bool) -> None:
        try:
            self._screen.publish(display.data, display.metadata, display.transient, update)
        except Exception as error:  # what a rank sends is not to end the run
            self._screen.write(f"nbddp: a display could not be shown: {type(error).__name__}: {error}\n")


def charges(shown: Iterable[Shown]) -> tuple[int, int, int]:
    """Return what items were charged with together: characters, bytes, displays."""
    items = list(shown)
    return sum(i.chars for i in items), sum(i.nbytes for i in items), sum(i.displays for i in items)
