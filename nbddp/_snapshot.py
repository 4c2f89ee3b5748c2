"""A pickle stream and its large buffers, in one file that its readers map.

::

    magic, bytes of the stream, number of buffers
    offset and size of each buffer
    the stream
    the buffers, each aligned to a cache line

Only the stream is read; buffers stay in the file, and whoever writes to one gets pages of its own.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# A cache line: what vectorised kernels like their data aligned to.
_ALIGN = 64

_MAGIC = b"nbddp\x00\x00\x01"
_HEAD = struct.Struct("<8sQQ")
_SPAN = struct.Struct("<QQ")

_WRITE_AT_ONCE = 64 << 20  # between two writes an interrupt gets its chance


class Stream:
    """What a pickler writes to: the pieces, not joined, since a large string is one and need not be copied."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.nbytes = 0

    def write(self, data: bytes | bytearray) -> None:
        """Take the next piece."""
        # A bytearray is the user's own, and may change before it is written.
        self.pieces.append(bytes(data) if isinstance(data, bytearray) else data)
        self.nbytes += len(data)


@dataclass
class Snapshot:
    """A pickle stream and the buffers that belong to it.

    Attributes:
        stream: The pickle, in pieces.
        buffers: Out-of-band buffers in the order of the stream; they still share memory with the objects.
        met: Classes and functions that went by value, in the order in which they were met.
        sources: File names of the code objects that went by value.
        unwrapped: Types of wrappers, such as DDP, whose ``.module`` went in their place.
        keep: What must not be freed while `buffers` are read.
        sizes: About how many bytes each name added, to a few thousand; what names share is the first one's.
    """

    stream: Stream
    buffers: list[memoryview]
    met: list[Any]
    sources: set[str]
    unwrapped: list[str]
    keep: list[Any]
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_nothing(cls) -> Snapshot:
        """Return one without even a stream, where nothing is to be sent."""
        return cls(Stream(), [], [], set(), [], [])

    def release(self) -> None:
        """Let go of the data, once it is written; `met` and the rest stay."""
        self.stream.pieces.clear()
        self.buffers.clear()
        self.keep.clear()

    @property
    def nbytes(self) -> int:
        """The size of the file that `write` makes."""
        spans = self._spans()
        return spans[-1][0] + spans[-1][1] if spans else self._head_size() + self.stream.nbytes

    def _head_size(self) -> int:
        return _HEAD.size + _SPAN.size * len(self.buffers)

    def _spans(self) -> list[tuple[int, int]]:
        spans = []
        end = self._head_size() + self.stream.nbytes
        for buffer in self.buffers:
            start = -(-end // _ALIGN) * _ALIGN
            end = start + buffer.nbytes
            spans.append((start, buffer.nbytes))
        return spans

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the file's content piece by piece."""
        spans = self._spans()
        yield _HEAD.pack(_MAGIC, self.stream.nbytes, len(spans)) + b"".join(_SPAN.pack(*span) for span in spans)
        yield from self.stream.pieces
        end = self._head_size() + self.stream.nbytes
        for (start, size), buffer in zip(spans, self.buffers, strict=True):
            yield bytes(start - end)
            yield buffer
            end = start + size

    def write(self, path: str) -> None:
        """Write a new file that only its owner can read.

        Raises:
            OSError: It could not be written whole; what was written is gone again.
        """
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for batch in _batches(self.chunks()):
                _write(fd, batch)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)


# Small pieces are joined, so that ten thousand of them take few system calls.
_JOIN_BELOW = 1 << 16


def _batches(chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    small: list[bytes | memoryview] = []
    size = 0
    for chunk in chunks:
        if len(chunk) >= _JOIN_BELOW or size >= _JOIN_BELOW:
            yield b"".join(small)
            small, size = [], 0
        if len(chunk) >= _JOIN_BELOW:
            yield chunk
        else:
            small.append(chunk)
            size += len(chunk)
    yield b"".join(small)


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view[:_WRITE_AT_ONCE]) :]


# Bytes up to which a file is read instead of mapped.
_READ_UP_TO = 1 << 20


def map_file(path: str) -> memoryview:
    """Map the file of a snapshot privately; a small one is read. It may be deleted afterwards."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size <= _READ_UP_TO:
            # A map keeps a file open for as long as anything of it lives.
            return memoryview(bytearray(file.read()))
        # NORESERVE: eight ranks that map the same 100 GB will not write to all of it.
        flags = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)
        return memoryview(mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE))


def parts(data: memoryview) -> tuple[memoryview, list[memoryview]]:
    """Return the pickle stream of a snapshot and its buffers.

    Raises:
        ValueError: It is no snapshot.
    """
    magic, size, count = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("this is no nbddp snapshot, or one of another version")
    start = _HEAD.size + _SPAN.size * count
    spans = [_SPAN.unpack_from(data, _HEAD.size + _SPAN.size * i) for i in range(count)]
    return data[start : start + size], [data[at : at + length] for at, length in spans]


def unpickle(data: memoryview) -> None:
    """Unpickle a snapshot for what its objects do when they are built; see `nbddp._pickling.load`.

    Args:
        data: Its content; writable, since arrays and tensors share its memory.

    Raises:
        ValueError: It is no snapshot.
        Exception: Whatever unpickling raises.
    """
    stream, buffers = parts(data)
    pickle.loads(stream, buffers=buffers)
