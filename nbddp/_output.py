"""The output of one rank: its log, byte for byte, and its text, line by line.

::

    pipe ──bytes──> log                                   all of it, for %ddp log
             └────> stdout's lines ─┬─> blocks of lines   and, between them, where displays belong
             └────> stderr's lines ─┘

A rank's two streams share a pipe, so that what it writes keeps its order. What Python writes to stderr stands between
marks; so do the places of displays. (C++, NCCL and child processes write without marks, and count as stdout.)
"""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from nbddp._lines import Lines
from nbddp._log_files import Log
from nbddp._wire import mark

# Of the end of a rank's output, for the fold under a finished run: characters.
_RECENT = 4_000


class Text(NamedTuple):
    """Complete lines of one stream."""

    text: str
    stderr: bool


class RankOutput:
    """Takes the bytes of one rank.

    Attributes:
        rank: Its number on this machine.
        hidden_lines: How many lines were not shown.
        hidden_chars: Their length.
        lines: How many lines there were.
        recent: The end of its text.
        last_line: Its last line that is not empty.
    """

    def __init__(self, rank: int, log: Log, secret: str, tail_limit: int) -> None:
        self.rank = rank
        self._log = log
        self.hidden_lines = self.hidden_chars = self.lines = 0
        self.recent = self.last_line = ""
        self._mark = mark(secret, "")[:-1]
        self._marks = re.compile(re.escape(self._mark) + rb"(?:([eo])|([ud])(\d{1,9}))\0")
        self._back_and_forth = mark(secret, "o") + mark(secret, "e")
        self._bytes = b""
        self._begin()
        self._tail: deque[Text] = deque()
        self._tail_limit = tail_limit
        self._tail_size = 0

    def _begin(self) -> None:
        # A character may be split between two reads; what is no UTF-8 is shown as replacement characters.
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(2)]
        self._streams = [Lines(), Lines()]
        self._stderr = False

    def restart(self) -> Iterator[Text]:
        """Yield what the process has left unfinished; another one takes its place, and goes on in the same log."""
        yield from self._lines(self._bytes)
        self._bytes = b""
        yield from self._rest()
        self._begin()

    def feed(self, data: bytes) -> Iterator[Text | int]:
        """Take what the rank wrote; yield complete lines and the numbers of displays, in order."""
        self._bytes += data
        if b"\0" in self._bytes:
            self._bytes = self._bytes.replace(self._back_and_forth, b"")
            done = 0
            # What looks like a mark and is none, since two writes were torn into one another, is text.
            for found in self._marks.finditer(self._bytes):
                yield from self._lines(self._bytes[done : found.start()])
                done = found.end()
                if found[1]:
                    self._stderr = found[1] == b"e"
                    continue
                # An update changes what is elsewhere; what stands here, such as a bar, goes on.
                if found[2] == b"d":
                    yield from self._rest()
                yield int(found[3])
            self._bytes = self._bytes[done:]
        # A mark may still be incomplete at the end; only what cannot be one is text.
        start = self._bytes.rfind(b"\0", max(0, len(self._bytes) - len(self._mark) - 20))
        complete = len(self._bytes) if start < 0 or not _may_be(self._bytes[start:], self._mark) else start
        text, self._bytes = self._bytes[:complete], self._bytes[complete:]
        yield from self._lines(text)

    def settle(self) -> Iterator[Text]:
        """Yield lines that were held back in case they are drawn on, after a while without any."""
        for stderr, stream in enumerate(self._streams):
            yield from self._told(stream.settle(after_silence=True), bool(stderr))

    @property
    def waits(self) -> bool:
        """Whether `settle` would yield something."""
        return any(stream.waits for stream in self._streams)

    @property
    def patience(self) -> float:
        """Seconds of silence after which `settle` is to be called."""
        return min(stream.patience for stream in self._streams if stream.waits)

    def finish(self) -> Iterator[Text]:
        """Yield what is left at the end, as complete lines; the log is closed."""
        yield from self._lines(self._bytes)
        self._bytes = b""
        yield from self._rest()
        self.close()

    def close(self) -> None:
        """Close the log; safe to call twice."""
        self._log.close()

    @property
    def current(self) -> list[str]:
        """The lines that may still change, as they look now, such as progress bars."""
        return [line for stream in reversed(self._streams) for line in stream.current]

    def hide(self, text: Text) -> None:
        """Keep lines that are not shown now, in case they are the last."""
        self.hidden_lines += text.text.count("\n")
        self.hidden_chars += len(text.text)
        end = text.text
        if len(end) > self._tail_limit:
            end = end[end.find("\n", len(end) - self._tail_limit - 1) + 1 :]
        self._tail.append(text._replace(text=end))
        self._tail_size += len(self._tail[-1].text)
        while self._tail_size - len(self._tail[0].text) > self._tail_limit:
            self._tail_size -= len(self._tail.popleft().text)

    def forget_hidden(self) -> None:
        """Take what was hidden for gone: the rank has cleared what it had shown."""
        self._tail.clear()
        self._tail_size = self.hidden_lines = self.hidden_chars = 0

    def take_tail(self, label: int = 0) -> list[Text]:
        """Return the last of the hidden lines; they count as shown from here on.

        Args:
            label: The length of the label that each line will have.
        """
        kept: list[Text] = []
        room = self._tail_limit
        while self._tail and room > 0:
            text = self._tail.pop()
            start = len(text.text)
            while start > 0:
                # The beginning of the line before.
                begin = text.text.rfind("\n", 0, start - 1) + 1
                if (room := room - (start - begin) - label) < 0:
                    break
                start = begin
            if start < len(text.text):
                kept.append(text._replace(text=text.text[start:]))
        self._tail.clear()
        self._tail_size = 0
        kept.reverse()
        self.hidden_lines -= sum(text.text.count("\n") for text in kept)
        self.hidden_chars -= sum(len(text.text) for text in kept)
        return [text for text in kept if text.text]

    def _lines(self, data: bytes) -> Iterator[Text]:
        if not data:
            return
        broken = self._write_log(data)
        text = self._decoders[self._stderr].decode(data)
        lines = self._streams[self._stderr].feed(text)
        if lines:
            # What the other stream has finished comes before: a bar that is complete, before what is printed next.
            yield from self._told(self._streams[not self._stderr].settle(), not self._stderr)
        yield from self._told(broken + lines, self._stderr)

    def _rest(self) -> Iterator[Text]:
        """Yield unfinished lines as complete ones."""
        for stderr, stream in enumerate(self._streams):
            text = stream.feed(self._decoders[stderr].decode(b"", final=True)) + stream.finish()
            yield from self._told(text, bool(stderr))

    def _told(self, text: str, stderr: bool) -> Iterator[Text]:
        if not text:
            return
        self.lines += text.count("\n")
        self.recent = text[-_RECENT:] if len(text) >= _RECENT else (self.recent + text)[-_RECENT:]
        end = text[-_RECENT:].rstrip()
        self.last_line = end[end.rfind("\n") + 1 :] or self.last_line
        yield Text(text, stderr)

    def _write_log(self, data: bytes) -> str:
        """Write to the log; return a line to show if that is no longer possible."""
        try:
            self._log.write(data)
        except OSError as error:  # a full disk takes the log, not the run
            return f"(nbddp: the log of this rank ends here: {error.strerror})\n"
        return ""


def _may_be(piece: bytes, mark: bytes) -> bool:
    """Tell whether `piece`, at the end of the data, may be the beginning of a mark."""
    return mark.startswith(piece) or piece.startswith(mark)
