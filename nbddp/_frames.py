"""Messages between the notebook's machine and the nodes of a run, over whatever carries lines to and from them.

::

    to a node     length, JSON, and as many raw bytes behind it as the JSON's "raw" says      its stdin
    from a node   @node number, sequence number, "+" or ".", base64                            its stdout

What comes back may share a stream with other nodes' (``srun`` merges what its tasks print), in which only lines up to a
certain length stay whole. So a message is cut into lines that are short enough, each with the number of its node and a
number of its own: a line that was lost or torn is found out. A line that does not look like one is somebody else's: a
shell's greeting, a library's warning.

Nothing that crosses is unpickled on its way; the files among it are written to private directories, as they are.
"""

from __future__ import annotations

import base64
import binascii
import importlib.metadata
import json
import platform
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nbddp import __version__

Message = dict[str, Any]

# What both sides must agree on; a node tells its own with its first words.
PROTOCOL = 1

# Seconds between two signs of life, and without one until either side takes the other for gone.
BEAT_SECONDS = 1.0
LEASE_SECONDS = 15.0

# Bytes of a file or of output that travel in one message, so that what is urgent need not wait long.
CHUNK = 1 << 16

# Bytes of a line that ``srun`` passes on whole, its end included, whatever other nodes print at that moment: with 1100
# two nodes' lines were torn into one another. And of one where a node has a stream of its own.
SHORT_LINE = 900
LONG_LINE = 1 << 16

_LENGTH = struct.Struct("!I")
_NUMBER = struct.Struct("!I")
_LINE = re.compile(rb"@(\d{1,6}) (\d{1,18}) ([+.])([A-Za-z0-9+/=]*)")
_HEAD = len(b"@ 999999 999999999999 .\n")

# Characters of a line of somebody else's that are kept, to be told.
_STRANGE = 500

# No message is longer, in base64 or as JSON to a node; what says so is none.
_LONGEST = 1 << 26

# Bytes of JSON that a node sends in one message at most: what the other side takes, with room.
LONGEST_MESSAGE = 1 << 25

# A file that one side asks the other to write: a name, never a path. What else lies in a run's directory, its socket
# and its script above all, has other names.
_FILE_TO_NODE = re.compile(r"cell\.py|closure(?:\.[0-9]+)?")
_FILE_FROM_NODE = re.compile(r"(?:results|exception)\.[0-9]+")


class FrameError(Exception):
    """What came is not what was sent; the message says how that was seen."""


class TooLongError(FrameError):
    """A message is too long to be sent.

    Attributes:
        size: How long it would be, in bytes.
    """

    def __init__(self, kind: str, size: int) -> None:
        super().__init__(f"a message ({kind}) cannot have {size} bytes")
        self.size = size


def check_name(name: object, size: object, *, to_node: bool) -> None:
    """See that a file that the other side asks to be written lies in the run's directory, under a name of its kind.

    Args:
        name: What the other side calls it.
        size: How many bytes are to come.
        to_node: Whether this is the node's side.

    Raises:
        FrameError: It is none.
    """
    allowed = _FILE_TO_NODE if to_node else _FILE_FROM_NODE
    if not isinstance(name, str) or not allowed.fullmatch(name):
        raise FrameError(f"a file cannot be called {str(name)[:80]!r}")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise FrameError(f"{name} cannot have {str(size)[:80]} bytes")


class Frame(NamedTuple):
    """A message, or a piece of a rank's output or of a file.

    Attributes:
        kind: "J": `message`; "O": output of rank `number`; "F": a piece of file `number`.
        message: Of "J".
        number: Of the others.
        data: Their bytes.
    """

    kind: str
    message: Message
    number: int = 0
    data: bytes = b""


def versions() -> dict[str, str]:
    """Return this side's versions of what both must have alike."""
    return {
        "python": platform.python_version(),
        "torch": _torch_version(),
        "nbddp": __version__,
        "executable": sys.executable,
    }


def _torch_version() -> str:
    try:
        # Without importing it, which takes more than a second.
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


class LineWriter:
    """Makes the lines of one node.

    Args:
        node: Its number.
        limit: Bytes that a line may have, its end included.
    """

    def __init__(self, node: int, limit: int) -> None:
        self._node = node
        self._sequence = 0
        self._piece = (limit - _HEAD) // 4 * 3

    def message(self, kind: str, **fields: Any) -> bytes:
        """Return the lines of a message. Raises TooLongError, having used up no number, if nobody would take them."""
        body = json.dumps({"kind": kind, **fields}, separators=(",", ":"), default=str).encode()
        if len(body) > LONGEST_MESSAGE:
            raise TooLongError(kind, len(body))
        return self._lines(b"J" + body)

    def output(self, rank: int, data: bytes) -> bytes:
        """Return the lines of what a rank has written."""
        return self._lines(b"O" + _NUMBER.pack(rank) + data)

    def piece(self, file: int, data: bytes) -> bytes:
        """Return the lines of the next piece of a file."""
        return self._lines(b"F" + _NUMBER.pack(file) + data)

    def _lines(self, payload: bytes) -> bytes:
        lines = []
        for start in range(0, len(payload), self._piece):
            piece = payload[start : start + self._piece]
            more = "." if start + self._piece >= len(payload) else "+"
            lines.append(b"@%d %d %s%s\n" % (self._node, self._sequence, more.encode(), base64.b64encode(piece)))
            self._sequence += 1
        return b"".join(lines)


class LineReader:
    """Puts the messages of nodes that share a stream together again.

    Attributes:
        strange: The last lines that were no node's.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._pieces: dict[int, list[bytes]] = {}
        self._sizes: dict[int, int] = {}
        self._next: dict[int, int] = {}
        self.strange: list[str] = []

    def feed(self, data: bytes) -> Iterator[tuple[int, Frame]]:
        """Take what was read; yield node numbers and complete messages.

        Raises:
            FrameError: Something was lost or torn on its way.
        """
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > LONG_LINE:
            # No node's line is longer: what it was is told, and its end will be taken for a line of somebody else's.
            lines.append(self._buffer)
            self._buffer = b""
        for line in lines:
            found = _LINE.fullmatch(line)
            if found is None:
                if line.startswith(b"@") and self._next:
                    raise FrameError(f"a line is torn: {line[:80]!r}")
                if text := line[:_STRANGE].decode(errors="replace").strip():
                    self.strange = [*self.strange, text][-20:]
                continue
            node, sequence = int(found[1]), int(found[2])
            if sequence != self._next.get(node, 0):
                raise FrameError(f"line {self._next.get(node, 0)} of node {node} is missing; {sequence} came instead")
            self._next[node] = sequence + 1
            pieces = self._pieces.setdefault(node, [])
            pieces.append(found[4])
            self._sizes[node] = self._sizes.get(node, 0) + len(found[4])
            if self._sizes[node] > _LONGEST:
                raise FrameError(f"a message of node {node} cannot have {self._sizes[node]} bytes")
            if found[3] == b".":
                yield node, _frame(pieces)
                pieces.clear()
                self._sizes[node] = 0


def _frame(pieces: Sequence[bytes]) -> Frame:
    try:
        # Each piece is padded by itself.
        payload = b"".join(binascii.a2b_base64(piece) for piece in pieces)
        kind, body = payload[:1].decode(), payload[1:]
        if kind == "J":
            return Frame(kind, _object(body))
        if kind not in ("O", "F"):
            raise ValueError(f"there is no kind {kind!r}")
        return Frame(kind, {}, _NUMBER.unpack_from(body)[0], body[_NUMBER.size :])
    except (ValueError, RecursionError, struct.error) as error:
        raise FrameError(f"a message is damaged: {error}") from None


def _object(data: bytes) -> Message:
    """Return what JSON says, which is a message.

    Raises:
        ValueError: It is none.
        RecursionError: Nobody could have meant it.
    """
    message = json.loads(data)
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ValueError("it has no kind")
    return message


def encode(kind: str, raw: bytes = b"", **fields: Any) -> bytes:
    """Return a message to a node, with bytes behind it."""
    body = json.dumps({"kind": kind, "raw": len(raw), **fields}, separators=(",", ":"), default=str).encode()
    return _LENGTH.pack(len(body)) + body + raw


class Decoder:
    """Takes messages to a node apart."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Message, bytes]]:
        """Take what was read; yield complete messages and their bytes.

        Raises:
            FrameError: What came is no message.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            length = _LENGTH.unpack_from(self._buffer)[0]
            if length > _LONGEST:
                raise FrameError(f"a message cannot have {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            try:
                message = _object(bytes(self._buffer[_LENGTH.size : end]))
            except (ValueError, RecursionError) as error:
                raise FrameError(f"a message is damaged: {error}") from None
            size = message.get("raw", 0)
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _LONGEST:
                raise FrameError(f"a message cannot have {str(size)[:80]} bytes behind it")
            after = end + size
            if len(self._buffer) < after:
                return
            raw = bytes(self._buffer[end:after])
            del self._buffer[:after]
            yield message, raw
