"""Where a run's output is shown: a notebook's cell, a terminal, or something that only keeps what it gets."""

from __future__ import annotations

import os
import secrets
import sys
import time
from typing import Any, Protocol

MimeBundle = dict[str, Any]

# A Jupyter server drops the stream output of a kernel above 1 MB/s, counted over 3 seconds.
RATE = 500_000
_BURST = 1_000_000


# Seconds of silence after which a line is not kept for what comes behind it; and of a cell's first, in which it is:
# they may be all of it.
_SILENCE = 0.25
_QUICK = 0.05


class Screen(Protocol):
    """Where a run's output is shown.

    Attributes:
        in_place: Whether what is shown can be updated; else output is plain: no colours, no panel.
    """

    in_place: bool

    def write(self, text: str) -> None:
        """Show complete lines of text."""

    def publish(self, data: MimeBundle, metadata: MimeBundle, transient: MimeBundle, update: bool) -> None:
        """Show a mime bundle."""

    def panel(self, data: MimeBundle) -> None:
        """Show a mime bundle in the place of the last one that came this way."""

    def clear(self, *, wait: bool) -> None:
        """Take away all but the panel; with `wait`, when something else is shown."""

    def room(self) -> int:
        """Return how many bytes of text can be shown now without some being lost."""


class _Bucket:
    """How much a Jupyter server takes, over all cells of this process."""

    def __init__(self) -> None:
        self._level = float(_BURST)
        self._at = time.monotonic()

    def room(self) -> int:
        now = time.monotonic()
        self._level = min(_BURST, self._level + (now - self._at) * RATE)
        self._at = now
        return int(self._level)

    def take(self, text: str) -> None:
        self.room()
        # As the message has it: in JSON, an escape character takes six bytes.
        size = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        self._level -= size + text.count("\n") + 5 * text.count("\x1b")


_bucket = _Bucket()


class NotebookScreen:
    """The output of the running cell."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._panel_id = secrets.token_hex(8)
        self._panel: MimeBundle | None = None
        self._flushed = time.monotonic() + _QUICK - _SILENCE
        # %%capture and redirect_stdout take what is printed, and would record each update as an output of its own.
        self.in_place = type(sys.stdout).__module__.startswith("ipykernel")

    def write(self, text: str) -> None:
        """Show complete lines of text."""
        _bucket.take(text)
        # Looked up each time: %%capture replaces it. ipykernel collects what comes within a fifth of a second; what
        # comes after a silence need not wait for more, though this has to wait for ipykernel's thread then.
        sys.stdout.write(text)
        now = time.monotonic()
        if now > self._flushed + _SILENCE:
            sys.stdout.flush()
            self._flushed = now

    def publish(self, data: MimeBundle, metadata: MimeBundle, transient: MimeBundle, update: bool) -> None:
        """Show a mime bundle behind the text so far."""
        sys.stdout.flush()
        self._shell.display_pub.publish(data, metadata, transient=transient, update=update)

    def panel(self, data: MimeBundle) -> None:
        """Show a mime bundle in the place of the last one that came this way."""
        update = self._panel is not None
        self._panel = data
        self.publish(data, {}, {"display_id": self._panel_id}, update)

    def clear(self, *, wait: bool) -> None:
        """Take away all but the panel; with `wait`, when something else is shown."""
        sys.stdout.flush()
        self._shell.display_pub.clear_output(wait=wait or self._panel is not None)
        if self._panel is not None:
            self.publish(self._panel, {}, {"display_id": self._panel_id}, False)

    def room(self) -> int:
        """Return how many bytes of text can be shown now without some being lost."""
        return _bucket.room()

    def of_this_cell(self) -> Screen:
        """Return the output of the cell that runs now, also when others run."""
        return CellScreen(self._shell) if self.in_place else self


class CellScreen:
    """The output of the cell that runs when this is made, from any thread and for as long as the kernel lives.

    What is printed goes to the cell that happens to run; so messages are sent as the kernel itself sends them.
    """

    in_place = True

    def __init__(self, shell: Any) -> None:
        self._kernel = shell.kernel
        get_parent = getattr(shell.kernel, "get_parent", None)
        self._parent = get_parent("shell") if get_parent is not None else shell.parent_header
        self._panel_id = secrets.token_hex(8)
        self._panel: MimeBundle | None = None

    def is_cell_of(self, other: CellScreen) -> bool:
        """Tell whether this is the output of the same cell."""
        mine, others = (one._parent.get("header", {}).get("msg_id") for one in (self, other))
        return mine is not None and mine == others

    def _send(self, kind: str, content: dict[str, Any], topic: str | None = None) -> None:
        kernel = self._kernel
        # As the kernel names its own; who subscribes to all, as front ends do, does not see it.
        ident = f"stream.{topic}" if topic else f"kernel.{kernel.ident}.{kind}"
        kernel.session.send(kernel.iopub_socket, kind, content, parent=self._parent, ident=ident.encode())

    def write(self, text: str) -> None:
        """Show complete lines of text."""
        _bucket.take(text)
        self._send("stream", {"name": "stdout", "text": text}, "stdout")

    def publish(self, data: MimeBundle, metadata: MimeBundle, transient: MimeBundle, update: bool) -> None:
        """Show a mime bundle behind the text so far."""
        content = {"data": data, "metadata": metadata, "transient": transient}
        self._send("update_display_data" if update else "display_data", content)

    def panel(self, data: MimeBundle) -> None:
        """Show a mime bundle in the place of the last one that came this way."""
        update = self._panel is not None
        self._panel = data
        self.publish(data, {}, {"display_id": self._panel_id}, update)

    def clear(self, *, wait: bool) -> None:
        """Take away all but the panel; with `wait`, when something else is shown."""
        self._send("clear_output", {"wait": wait or self._panel is not None})
        if self._panel is not None:
            self.publish(self._panel, {}, {"display_id": self._panel_id}, False)

    def room(self) -> int:
        """Return how many bytes of text can be shown now without some being lost."""
        return _bucket.room()


class Terminal:
    """The screen where there is no notebook: ``sys.stdout``. The panel, if there is one, stays below the text."""

    def __init__(self) -> None:
        self.in_place = bool(sys.stdout.isatty())
        self._panel = ""

    def write(self, text: str) -> None:
        """Show complete lines of text."""
        self._write(self._taken_away() + text + self._panel)

    def publish(self, data: MimeBundle, metadata: MimeBundle, transient: MimeBundle, update: bool) -> None:
        """Show the plain text of a mime bundle."""
        if "text/plain" in data:
            self.write(f"{data['text/plain']}\n")

    def panel(self, data: MimeBundle) -> None:
        """Show the plain text of a mime bundle in the place of the last one that came this way."""
        before = self._taken_away()
        size = _size()
        lines = str(data.get("text/plain", "")).splitlines()
        if len(lines) > size.lines - 1:  # what is higher than the window cannot be taken away again
            lines = [*lines[: size.lines - 2], f"… and {len(lines) - size.lines + 2} more"]
        self._panel = "".join(line[: size.columns - 1] + "\n" for line in lines)
        self._write(before + self._panel)

    def clear(self, *, wait: bool) -> None:
        """Do nothing: what scrolled by cannot be taken back."""

    def room(self) -> int:
        """Return how many bytes of text can be shown now: any number."""
        return sys.maxsize

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:  # PYTHONIOENCODING=ascii, a C locale
            encoding = sys.stdout.encoding
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()

    def _taken_away(self) -> str:
        """Return what takes the panel off the terminal."""
        rows = self._panel.count("\n")
        return f"\x1b[{rows}F\x1b[J" if rows else ""


def _size() -> os.terminal_size:
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        size = os.terminal_size((0, 0))
    return os.terminal_size((size.columns or 80, size.lines or 24))


def screen_of(shell: Any) -> Screen:
    """Return where this shell shows output: under Jupyter the cell, else the terminal; None is no shell at all."""
    return NotebookScreen(shell) if hasattr(shell, "kernel") else Terminal()


def of_this_cell(screen: Screen) -> Screen:
    """Return a screen that goes on showing output where this one does when the cell is over."""
    return screen.of_this_cell() if isinstance(screen, NotebookScreen) else screen
