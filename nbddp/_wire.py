"""Messages between nbddp's own processes, over Unix sockets that no other user can open.

A message is a JSON object behind a length of four bytes. Only text crosses a socket; nothing that arrives on one is
ever unpickled. File descriptors may ride along with a message.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

Message = dict[str, Any]

_LENGTH = struct.Struct("!I")
_ENCODER = json.JSONEncoder(separators=(",", ":"), default=str)
# More at once costs more even where there is less: room for it is had first.
_CHUNK = 1 << 16
_MAX_FDS = 4

# sun_path holds 108 bytes on Linux and 104 on macOS, its terminating zero included.
_MAX_PATH = 100


def mark(secret: str, what: str) -> bytes:
    """Return what stands in a rank's output.

    "e" and "o" stand around what went to stderr; "d" and a number stand where a display belongs, "u" and a number where
    one is updated, or the output cleared.
    """
    return f"\0nbddp:{secret}:{what}\0".encode()


def encode(kind: str, **fields: Any) -> bytes:
    """Return the bytes of a message of this kind."""
    body = _ENCODER.encode({"kind": kind, **fields}).encode()
    return _LENGTH.pack(len(body)) + body


def send(sock: socket.socket, kind: str, *, fds: Sequence[int] = (), **fields: Any) -> None:
    """Send one message on a blocking socket, with file descriptors if any.

    Raises:
        OSError: The other end is gone.
    """
    data = encode(kind, **fields)
    if fds:
        # Descriptors belong to the first byte; what the buffer does not take at once follows without them.
        data = data[socket.send_fds(sock, [data], list(fds)) :]
    sock.sendall(data)


class Inbox:
    """The receiving end of a connection: complete messages, and the descriptors that came with them.

    Attributes:
        closed: True once the other end is gone and every message before that has been returned.
        idle: True if the last call of `receive` found nothing to read.
        broken: True if what came was no message; nothing more is read.
        fds: Descriptors received and not yet taken; the caller closes them.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.closed = False
        self.idle = False
        self.broken = False
        self.fds: list[int] = []
        self._buffer = bytearray()

    def receive(self) -> list[Message]:
        """Read once from the socket and return the messages that are complete.

        Never blocks on a non-blocking socket; a connection reset counts as its end, and so does what is no message.
        """
        self.idle = False
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, _CHUNK, _MAX_FDS, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        except BlockingIOError:
            self.idle = True
            return []
        except OSError:
            data, fds = b"", []
        self.fds += fds
        self.closed = not data
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            try:
                messages.append(json.loads(bytes(self._buffer[_LENGTH.size : end])))
            except ValueError:
                self.closed = self.broken = True
                self._buffer.clear()
                break
            del self._buffer[:end]
        return messages

    def close(self) -> None:
        """Close the socket, and the descriptors that nobody took."""
        self.closed = True
        self.sock.close()
        while self.fds:
            os.close(self.fds.pop())


@contextlib.contextmanager
def _short_path(path: str) -> Iterator[str]:
    """Give a name for `path` that fits into a socket address, however deep the temporary directory is."""
    if len(os.fsencode(path)) <= _MAX_PATH:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def listen(path: str) -> socket.socket:
    """Return a non-blocking Unix socket that listens at `path`."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(path) as short:
            server.bind(short)
        os.chmod(path, 0o600)
        server.listen(socket.SOMAXCONN)
        server.setblocking(False)
    except BaseException:
        server.close()
        raise
    return server


def connect(path: str) -> socket.socket:
    """Return a blocking socket connected to the one that listens at `path`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(path) as short:
            sock.connect(short)
    except BaseException:
        sock.close()
        raise
    return sock
