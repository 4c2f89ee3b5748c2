r"""From the characters of a stream to its lines, as a terminal would have them.

Complete lines go out at once. What a program still draws on stays here: a line with a carriage return in it, such as a
progress bar, and the lines that it goes up to again, such as nested bars or rich's displays. That block goes out in its
last state, once it can be seen that nothing will return to it::

    "\r 10%|█"  "\n"  "\r  3%|▎"  "\x1b[A"      two bars; the cursor is back on the first: nothing goes out
    "\r100%|█"  "\n"  "epoch 1 done\n"          a bar, then a plain line under it: both go out

Ordinary text does not go through any of this: it is split at newlines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nbddp import _palette

# A line that never ends must not grow for ever; it is broken here.
LINE_LIMIT = 100_000

# Rows that a program can go up to; a terminal's window ends somewhere, too.
_ROWS = 60

# Plain lines after which a program that went up to lines is taken to be done with that.
_PLAIN_AGAIN = 2 * _ROWS

# Seconds without output after which a line that may still be drawn on is given out; longer for programs that were seen
# to go up to lines that had gone out.
_SILENCE = 0.5
_SILENCE_OF_MOVERS = 4.0

_TOKEN = re.compile(
    r"\x1b\[([0-9;:?<=>!]*)([ -/]*[@-~])"  # control sequences: parameters, final byte
    r"|(\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[^\[\]\x1b\r\n\b])"  # titles and links; other escapes
    r"|([\r\n\b\x07\x0b\x0c])"
    r"|([^\x1b\r\n\b\x07\x0b\x0c]+)"
    r"|(\x1b)"  # of nothing that is known
)
# What makes text more than lines: all controls but colours and tabs.
_CONTROL = re.compile(r"[\r\b\x07\x0b\x0c]|\x1b(?!\[[0-9;:]*m)")
# The beginning of a sequence, or of a Windows newline, whose rest has not been read yet.
_PARTIAL = re.compile(r"(?:\x1b(?:\[[0-9;:?<=>!]*[ -/]*|\][^\x07\x1b]*\x1b?)?|\r)\Z")
_LONGEST = 300


# A bar of tqdm's that is complete: counts, rates and times at its end.
_BAR = re.compile(r"\d+%?\|.*\| *\S+/\S+ \[\S+<\S+.*\] *\Z|\d+\S* \[\d+:\d+, .*/.*\] *\Z")


class _Row:
    """A line that may still change: its characters, and the colour codes in force at each."""

    def __init__(self) -> None:
        self.chars: list[str] = []
        self.styles: list[str] = []
        self.drawn_on = False

    def put(self, at: int, text: str, style: str) -> None:
        if at > len(self.chars):
            self.styles += [""] * (at - len(self.chars))
            self.chars += [" "] * (at - len(self.chars))
        if at < len(self.chars):
            self.drawn_on = True
        self.chars[at : at + len(text)] = text
        self.styles[at : at + len(text)] = [style] * len(text)

    def erase(self, start: int, end: int) -> None:
        self.drawn_on = True
        if end >= len(self.chars):
            del self.chars[start:], self.styles[start:]
        else:
            self.chars[start:end] = " " * (end - start)
            self.styles[start:end] = [""] * (end - start)

    def text(self) -> str:
        if not any(self.styles):
            return "".join(self.chars)
        out, style = [], ""
        for char, wanted in zip(self.chars, self.styles, strict=True):
            if wanted != style:
                out.append(("\x1b[0m" if style else "") + wanted)
                style = wanted
            out.append(char)
        return "".join(out) + ("\x1b[0m" if style else "")


class Lines:
    """Takes the characters of one stream and returns its lines."""

    def __init__(self) -> None:
        self._partial = ""
        # Ordinary text: the unfinished line. As soon as something is drawn on it, rows take its place.
        self._line = ""
        self._style = ""
        self._rows: list[_Row] = []
        self._row = self._column = 0
        # Where the cursor has gone up to since something was last written: the top of what is drawn.
        self._top: int | None = None
        self._held = False  # the cursor is hidden: rich and others draw
        self._keep = 0  # rows that are kept back, since a program went up to them after they had gone out
        self._plain_rows = 0  # since the cursor last went up
        # Since the cursor came to its row: whether that was written to, whether it is now written to from its left
        # again, and whether a carriage return said so.
        self._drawn = self._again = self._returned = False
        self._aside = ""  # what was written behind a bar, and is no part of it

    def feed(self, text: str) -> str:
        """Take characters; return the lines that are complete."""
        text, self._partial = self._partial + text, ""
        if not _any_control(text):
            return self._split(text) if not self._rows else _joined(self._draw(text))
        if (cut := _PARTIAL.search(text, max(0, len(text) - _LONGEST))) is not None:
            text, self._partial = text[: cut.start()], cut.group()
        text = text.replace("\r\n", "\n")
        if not self._rows and not (_any_control(text) and _CONTROL.search(text)):
            return self._split(text)
        return _joined(self._draw(text)) if text else ""

    def settle(self, *, after_silence: bool = False) -> str:
        """Return what is finished as far as can be seen: nothing has come for a while, or another stream goes on."""
        return _joined(self._release(self._row)) if self.waits and (after_silence or not self._keep) else ""

    def finish(self) -> str:
        """Return all that is left, as complete lines."""
        text, self._partial = "", ""
        if self._aside:
            text = _joined(iter([self._take_aside()]))
        if self._rows:
            self._held, self._keep = False, 0
            if not self._rows[-1].chars:  # where a next line would be
                self._rows.pop()
            text += _joined(self._release(len(self._rows)))
            self._rows = []
        if _palette.uncoloured(self._line):
            text += self._coloured(self._line + "\n")
        self._line = ""
        return text

    @property
    def waits(self) -> bool:
        """Whether `settle` would have something to say."""
        return bool(self._rows) and self._row > 0 and not self._held

    @property
    def patience(self) -> float:
        """Seconds of silence after which `settle` is to be called."""
        return _SILENCE_OF_MOVERS if self._keep else _SILENCE

    @property
    def current(self) -> list[str]:
        """The lines that may still change, as they look now; an unfinished one of ordinary text is the only one."""
        if not self._rows:
            return [self._line] if self._line else []
        return [text for row in self._rows if (text := row.text()).strip()]

    # Ordinary text.

    def _split(self, text: str) -> str:
        complete, newline, self._line = (self._line + text).rpartition("\n")
        while len(self._line) > LINE_LIMIT:
            complete += newline + self._line[:LINE_LIMIT]
            newline = "\n"
            self._line = self._line[LINE_LIMIT:]
        return self._coloured(complete + "\n") if newline else ""

    def _coloured(self, lines: str) -> str:
        """Have each line end the colours that it begins, and begin with those that the last one left."""
        if not self._style and "\x1b" not in lines:
            return lines
        out = []
        for line in lines[:-1].split("\n"):
            before = self._style
            for code in _palette.CODE.findall(line):
                self._style = _after(self._style, code)
            out.append(before + line + ("\x1b[0m" if self._style else ""))
        return "\n".join(out) + "\n"

    # What is drawn on.

    def _draw(self, text: str) -> Iterator[_Row]:
        if not self._rows:
            self._rows, self._row, self._column = [_Row()], 0, 0
            text, self._line = self._line + text, ""
        yield from self._tokens(text)
        if len(self._rows) == 1 and not (self._held or self._keep or self._column):
            row = self._rows[0]
            if not row.chars and not row.drawn_on:  # an empty line of ordinary text
                self._rows = []

    def _tokens(self, text: str) -> Iterator[_Row]:
        for parameters, final, _, control, plain, _ in _TOKEN.findall(text):
            if self._aside and (plain or control in ("\n", "\r")):
                self._aside += plain
                if control:
                    yield self._take_aside()
                if control != "\r":
                    continue
            if plain:
                if self._is_aside():
                    self._aside = plain
                    continue
                if self._again:
                    # Drawn anew where it stands, without a way up in between: what lies above is done.
                    self._again = False
                    yield from self._release(self._row)
                self._drawn = True
                if self._top is not None:
                    top, self._top = self._top, None
                    yield from self._release(top)
                row = self._rows[self._row]
                row.put(self._column, plain, self._style)
                self._column += len(plain)
                if len(row.chars) > LINE_LIMIT:
                    yield from self._newline()
            elif control == "\n":
                yield from self._newline()
            elif control == "\r":
                self._again = self._drawn and self._column > 0 and not (self._held or self._keep)
                self._column = 0
                self._returned = True
                self._rows[self._row].drawn_on = True
            elif control == "\b":
                self._column = max(0, self._column - 1)
                self._rows[self._row].drawn_on = True
            elif final:
                self._control(final, parameters)

    def _is_aside(self) -> bool:
        """Tell whether text does not belong to the cursor's line: a bar, which is always drawn from its left."""
        row = self._rows[self._row]
        if not row.drawn_on or self._held:
            return False
        text = "".join(row.chars).rstrip()
        elsewhere = self._column >= len(text) if self._column else not self._returned
        return elsewhere and _BAR.search(text) is not None

    def _take_aside(self) -> _Row:
        """Return the text that was written behind a bar, as a line of its own; the bar stays."""
        row = _Row()
        row.put(0, self._aside, self._style)
        self._aside = ""
        return row

    def _newline(self) -> Iterator[_Row]:
        self._drawn = self._again = self._returned = False
        done = self._rows[self._row]
        self._row += 1
        self._column = 0
        at_bottom = self._row == len(self._rows)
        if at_bottom:
            self._rows.append(_Row())
        if self._held or self._top is not None:
            yield from self._release(self._row - _ROWS)
        elif at_bottom and not done.drawn_on:
            self._plain_rows += 1
            if self._plain_rows > _PLAIN_AGAIN:
                self._keep = 0
            yield from self._release(self._row - self._keep)
        else:
            yield from self._release(self._row - _ROWS)

    def _release(self, count: int) -> Iterator[_Row]:
        """Give the first rows out."""
        count = min(count, len(self._rows))
        if count <= 0:
            return
        yield from self._rows[:count]
        del self._rows[:count]
        self._row = max(0, self._row - count)
        self._top = None if self._top is None else max(0, self._top - count)

    def _control(self, final: str, parameters: str) -> None:
        number = int(parameters) if parameters.isdigit() else 0
        row = self._rows[self._row]
        match final:
            case "m":
                self._style = _after(self._style, f"\x1b[{parameters}m")
            case "A" | "F":
                steps = max(1, number)
                self._plain_rows = 0
                self._drawn = self._again = False
                if steps > self._row:
                    self._keep = min(_ROWS, max(self._keep, steps))
                self._row = max(0, self._row - steps)
                self._top = self._row if self._top is None else min(self._top, self._row)
                self._rows[self._row].drawn_on = True
                self._column = 0 if final == "F" else self._column
            case "B" | "E":
                for _ in range(min(_ROWS, max(1, number))):
                    self._row += 1
                    if self._row == len(self._rows):
                        if self._row > 2 * _ROWS:
                            self._row -= 1
                            break
                        self._rows.append(_Row())
                self._column = 0 if final == "E" else self._column
            case "C":
                self._column = min(LINE_LIMIT, self._column + max(1, number))
            case "D":
                self._column = max(0, self._column - max(1, number))
                row.drawn_on = True
            case "G":
                self._column = min(LINE_LIMIT, max(1, number)) - 1
                row.drawn_on = True
            case "K":
                row.erase(0 if number else self._column, self._column if number == 1 else LINE_LIMIT)
            case "J":
                row.erase(0 if number else self._column, LINE_LIMIT)
                for below in self._rows[self._row + 1 :]:
                    below.erase(0, LINE_LIMIT)
            case "h" | "l" if parameters == "?25":
                self._held = final == "l"


def _any_control(text: str) -> bool:
    """Tell whether there may be controls, quickly: a flood has none."""
    return "\x1b" in text or "\r" in text or "\b" in text or "\x07" in text or "\x0b" in text or "\x0c" in text


def _joined(rows: Iterator[_Row]) -> str:
    text = ""
    for row in rows:
        line = row.text()
        # A line that was drawn on and is empty now is a bar that has gone, or the place under one.
        if line.strip() or not row.drawn_on:
            text += (line.rstrip(" ") if row.drawn_on else line) + "\n"
    return text


def _after(style: str, code: str) -> str:
    """Return the colour codes in force after one more."""
    inner = code[2:-1]
    if inner.strip("0;") == "":
        return ""
    if inner.startswith(("0;", "00;")):
        return code
    return style + code if len(style) < 200 else code
