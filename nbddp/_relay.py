"""From the bytes that ranks write to the text that the notebook shows.

::

    pipe ──bytes──> log file                      every byte, for %ddp log
             └────> lines ──labelled──> screen    the first part, live
             │         └──────────────> tail      the last part, at the end
             └────> unfinished lines ─> screen    of all ranks together, while they last

A line appears when it is complete, behind the label of its rank. What a carriage return takes back is not shown: of a
progress bar the last state remains. While it moves it is seen in a place of its own, one line a rank, which is empty
again at the end: in one stream, the bars of several ranks would overwrite each other.

A Jupyter server drops what comes faster than 1 MB/s, and its front ends slow to a crawl over a few MB in one cell. So a
cell shows a bounded amount: its beginning, a line that says what is left out, and its end.
"""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from nbddp._paths import format_size

# Characters that a cell shows as they come, and then of each rank's last lines (shared among the ranks).
HEAD_LIMIT = 600_000
TAIL_LIMIT = 200_000

# Seconds until an unfinished line is shown at all, so that a quick cell shows nothing but its lines; and from then on
# between two looks at it.
_LIVE_AFTER = 0.5
_LIVE_EVERY = 0.2

# Characters of an unfinished line that are shown while it moves.
_LIVE_WIDTH = 200

# A line that never ends must not grow for ever; it is broken here.
_LINE_LIMIT = 100_000


class Screen(Protocol):
    """Where a run's output is shown."""

    def write(self, text: str) -> None:
        """Show complete lines of text."""

    def publish(self, data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, Any], update: bool) -> None:
        """Show a mime bundle."""

    def live(self, text: str) -> None:
        """Show text in the place of what this showed before; an empty one takes it away."""


class Terminal:
    """The screen where there is no notebook: ``sys.stdout``."""

    def write(self, text: str) -> None:
        """Show complete lines of text."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def publish(self, data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, Any], update: bool) -> None:
        """Show the plain text of a mime bundle."""
        if "text/plain" in data:
            self.write(f"{data['text/plain']}\n")

    def live(self, text: str) -> None:
        """Show nothing: a terminal's one bar cannot be several ranks'."""


class RankOutput:
    """The output of one rank: its log, its unfinished line, and its tail.

    Attributes:
        hidden_lines: How many lines were not shown.
        hidden_chars: Their length.
    """

    def __init__(self, rank: int, log: str, secret: str, tail_limit: int) -> None:
        self.rank = rank
        self.label = f"[rank {rank}] "
        self.hidden_lines = 0
        self.hidden_chars = 0
        self._mark = f"\0nbddp:{secret}:".encode()
        self._bytes = b""
        # A character may be split between two reads; what is no UTF-8 is shown as replacement characters.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._tail: deque[str] = deque()
        self._tail_limit = tail_limit
        self._log_fd: int | None = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def feed(self, data: bytes) -> Iterator[str | int]:
        """Take what the rank wrote; yield complete lines (as one text) and the numbers of displays, in order."""
        self._bytes += data
        while (start := self._bytes.find(self._mark)) >= 0:
            end = self._bytes.find(b"\0", start + len(self._mark))
            if end < 0:
                break
            before, number = self._bytes[:start], self._bytes[start + len(self._mark) : end]
            self._bytes = self._bytes[end + 1 :]
            yield self._lines(before) + self._rest()
            yield int(number)
        # A mark may still be incomplete at the end; only what cannot be one is text.
        start = self._bytes.rfind(b"\0", max(0, len(self._bytes) - len(self._mark) - 20))
        complete = len(self._bytes) if start < 0 or not _may_be(self._bytes[start:], self._mark) else start
        text, self._bytes = self._bytes[:complete], self._bytes[complete:]
        yield self._lines(text)

    def close(self) -> None:
        """Close the log; safe to call twice."""
        if self._log_fd is not None:
            os.close(self._log_fd)
            self._log_fd = None

    def finish(self) -> str:
        """Return what is left at the end, as a complete line; the log is closed."""
        text = self._lines(self._bytes) + self._rest()
        self._bytes = b""
        self.close()
        return text

    @property
    def current(self) -> str:
        """The unfinished line as it looks now, such as a progress bar."""
        return _after_returns(self._line) if self._line else ""

    def hide(self, text: str) -> None:
        """Keep lines that are not shown now, in case they are the last."""
        self.hidden_lines += text.count("\n")
        self.hidden_chars += len(text)
        self._tail.append(text[-self._tail_limit :])
        size = sum(map(len, self._tail))
        while size > self._tail_limit and len(self._tail) > 1:
            size -= len(self._tail.popleft())

    def take_tail(self) -> str:
        """Return the last of the hidden lines; they count as shown from here on."""
        text = "".join(self._tail)[-self._tail_limit :]
        if len(text) < self.hidden_chars:  # it begins in the middle of a line
            text = text[text.find("\n") + 1 :]
        self.hidden_lines -= text.count("\n")
        self.hidden_chars -= len(text)
        self._tail.clear()
        return text

    def _lines(self, data: bytes) -> str:
        if not data:
            return ""
        self._write_log(data)
        text = self._line + self._decoder.decode(data)
        complete, newline, self._line = text.rpartition("\n")
        if len(self._line) > _LINE_LIMIT and "\r" in self._line:
            self._line = _after_returns(self._line)
        while len(self._line) > _LINE_LIMIT:
            complete += newline + self._line[:_LINE_LIMIT]
            newline = "\n"
            self._line = self._line[_LINE_LIMIT:]
        return self._labelled(complete) if newline else ""

    def _rest(self) -> str:
        """Return the unfinished line as a complete one."""
        line, self._line = self._line + self._decoder.decode(b"", final=True), ""
        return self._labelled(line) if line else ""

    def _labelled(self, lines: str) -> str:
        if "\r" in lines:
            lines = "\n".join(_after_returns(line) for line in lines.split("\n"))
        return self.label + lines.replace("\n", "\n" + self.label) + "\n"

    def _write_log(self, data: bytes) -> None:
        if self._log_fd is None:
            return
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._log_fd, view) :]
        except OSError as error:  # a full disk takes the log, not the run
            self.close()
            self._line = f"(nbddp: the log of this rank ends here: {error.strerror})\n" + self._line


class Relay:
    """The output of all ranks on one screen.

    Attributes:
        due: When `tick` is to be called (``time.monotonic``); infinity if there is no need.
    """

    def __init__(self, ranks: int, logs: str, secret: str, screen: Screen) -> None:
        self._screen = screen
        self._left = HEAD_LIMIT
        self._several = ranks > 1
        self.outputs: list[RankOutput] = []
        try:
            for rank in range(ranks):
                log = os.path.join(logs, f"rank{rank}.log")
                self.outputs.append(RankOutput(rank, log, secret, TAIL_LIMIT // ranks))
        except OSError:
            self.close()
            raise
        self._displays: dict[tuple[int, int], dict[str, Any]] = {}
        self._marks: list[tuple[int, int]] = []
        self._live = ""
        self._live_since = float("-inf")
        self.due = float("inf")

    def feed(self, rank: int, data: bytes) -> None:
        """Show what a rank wrote, as far as it is complete."""
        for item in self.outputs[rank].feed(data):
            if isinstance(item, str):
                self._show(rank, item)
            elif (rank, item) in self._displays:
                self._publish(rank, self._displays.pop((rank, item)))
            else:  # the message is still on its way
                self._marks.append((rank, item))
        if self.due == float("inf") and self._unfinished() != self._live:
            now = time.monotonic()
            self.due = max(now, self._live_since + _LIVE_EVERY) if self._live else now + _LIVE_AFTER

    def tick(self) -> None:
        """Show the unfinished lines as they are now."""
        self.due = float("inf")
        text = self._unfinished()
        if text != self._live:
            self._live, self._live_since = text, time.monotonic()
            self._screen.live(text)

    def _unfinished(self) -> str:
        return "\n".join(o.label + o.current[:_LIVE_WIDTH] for o in self.outputs if o.current)

    def display(self, rank: int, message: dict[str, Any]) -> None:
        """Take a display; it is shown where the rank's output has the mark for it."""
        key = (rank, message["number"])
        if key in self._marks:
            self._marks.remove(key)
            self._publish(rank, message)
        else:
            self._displays[key] = message

    def close(self) -> None:
        """Close the logs; safe to call twice."""
        for output in self.outputs:
            output.close()

    def finish(self) -> None:
        """Show what is left, and say what was left out."""
        for output in self.outputs:
            self._show(output.rank, output.finish())
        self.tick()
        for key in sorted(self._displays):
            self._publish(key[0], self._displays.pop(key))
        for output in self.outputs:
            tail = output.take_tail()
            if output.hidden_lines:
                self._screen.write(
                    f"nbddp: {output.hidden_lines:,} lines ({format_size(output.hidden_chars)}) of rank {output.rank} "
                    f"are left out here; %ddp log {output.rank} has them all\n"
                )
            if tail:
                self._screen.write(tail)

    def _show(self, rank: int, text: str) -> None:
        if not text:
            return
        output = self.outputs[rank]
        if self._left > 0 and not output.hidden_chars:
            shown = text
            if len(text) > self._left:
                cut = text.rfind("\n", 0, self._left) + 1
                shown = text[:cut]
                output.hide(text[cut:])
            self._left -= len(text)
            if shown:
                self._screen.write(shown)
        else:
            output.hide(text)

    def _publish(self, rank: int, message: dict[str, Any]) -> None:
        data, update = message["data"], message["update"]
        if self._several and not update:
            label = self.outputs[rank].label
            if set(data) <= {"text/plain"}:
                text = str(data.get("text/plain", ""))
                self._screen.write(label + text.replace("\n", "\n" + label) + "\n")
                return
            self._screen.write(label.rstrip() + "\n")
        self._screen.publish(data, message["metadata"], message["transient"], update)


def _after_returns(line: str) -> str:
    """Return what a terminal would show of a line with carriage returns."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown


def _may_be(piece: bytes, mark: bytes) -> bool:
    """Tell whether `piece`, at the end of the data, may be the beginning of a mark."""
    return mark.startswith(piece) or piece.startswith(mark)
