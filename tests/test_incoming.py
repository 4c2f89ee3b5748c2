"""Files that arrive in pieces: whole, where they should be, and nowhere else."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from nbddp._frames import FrameError
from nbddp._incoming import Incoming


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_arrive_whole_however_their_pieces_are_mixed(tmp_path: Path) -> None:
    before = descriptors()
    incoming: Incoming[int] = Incoming()
    incoming.begin(1, str(tmp_path / "a"), 5)
    incoming.begin(2, str(tmp_path / "b"), 0)
    incoming.begin(3, str(tmp_path / "c"), 1 << 20)
    assert not incoming.piece(1, b"abc")
    assert incoming.piece(2, b"")
    assert incoming.piece(3, bytes(1 << 20))
    assert incoming.piece(1, b"de")
    assert (tmp_path / "a").read_bytes() == b"abcde"
    assert (tmp_path / "b").read_bytes() == b""
    assert (tmp_path / "c").stat().st_size == 1 << 20
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    with pytest.raises(KeyError):
        incoming.piece(1, b"")
    assert descriptors() == before


def test_what_is_there_is_not_followed_and_what_is_too_much_is_not_written(tmp_path: Path) -> None:
    before = descriptors()
    incoming: Incoming[str] = Incoming()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        incoming.begin("x", str(tmp_path / "link"), 3)
    assert not (tmp_path / "elsewhere").exists()
    incoming.begin("x", str(tmp_path / "x"), 3)
    with pytest.raises(FrameError, match="x has 2 bytes more than were to come"):
        incoming.piece("x", b"12345")
    incoming.forget("x")
    incoming.forget("x")
    incoming.begin("y", str(tmp_path / "y"), 3)
    incoming.begin("y", str(tmp_path / "y2"), 3)
    incoming.close()
    assert descriptors() == before


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    incoming: Incoming[str] = Incoming()
    incoming.begin("x", str(tmp_path / "x"), 9000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            incoming.piece("x", bytes(9000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(KeyError):
        incoming.piece("x", b"")
