"""The thread that waits on a loop whenever nobody else works with it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbddp._loop import Loop
from nbddp._watcher import Watcher

NEVER = float("inf")


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


class Watched:
    """A loop on a pipe, and what the watcher has done with it."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.read, self.write = os.pipe()
        self.heard: list[bytes] = []
        self.looks = 0
        self.due: float | None = NEVER
        self.loop.watch(self.read, lambda: self.heard.append(os.read(self.read, 100)))
        self.watcher = Watcher(self.loop, self._look, "watcher-test")

    def _look(self) -> float | None:
        self.loop.step(0.0)
        self.looks += 1
        if self.due is None:
            self.watcher.end()
        return self.due

    def close(self) -> None:
        self.loop.close()
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    if watched.due is not None:
        watched.watcher.end()
    assert wait_for(lambda: "watcher-test" not in {thread.name for thread in threading.enumerate()})
    watched.close()


def test_it_hears_only_while_the_loop_is_given(watched: Watched) -> None:
    os.write(watched.write, b"before")
    time.sleep(0.1)
    assert watched.heard == []
    watched.watcher.give(NEVER)
    assert wait_for(lambda: watched.heard == [b"before"])
    watched.watcher.take()
    os.write(watched.write, b"meanwhile")
    time.sleep(0.1)
    assert watched.heard == [b"before"]
    watched.loop.step(time.monotonic())
    assert watched.heard == [b"before", b"meanwhile"]
    watched.watcher.give(NEVER)
    os.write(watched.write, b"after")
    assert wait_for(lambda: watched.heard == [b"before", b"meanwhile", b"after"])
    watched.watcher.take()


def test_it_looks_when_it_is_time_also_if_that_comes_sooner_than_before(watched: Watched) -> None:
    watched.watcher.give(time.monotonic())
    assert wait_for(lambda: watched.looks)
    watched.watcher.take()
    before = watched.looks
    watched.watcher.give(time.monotonic() + 0.2)
    assert wait_for(lambda: watched.looks > before)
    watched.watcher.take()


def test_a_time_that_passes_while_the_loop_is_taken_wakes_it_once(watched: Watched) -> None:
    watched.due = time.monotonic() + 0.1
    watched.watcher.give(watched.due)
    assert wait_for(lambda: watched.looks)
    watched.watcher.take()
    watched.due = NEVER
    cpu, looks = time.process_time(), watched.looks
    time.sleep(0.5)
    assert watched.looks == looks
    assert time.process_time() - cpu < 0.3
    watched.watcher.give(time.monotonic())
    assert wait_for(lambda: watched.looks > looks)
    watched.watcher.take()


def test_many_takes_lose_nothing(watched: Watched) -> None:
    watched.watcher.give(NEVER)
    for number in range(500):
        os.write(watched.write, b"x")
        watched.watcher.take()
        watched.watcher.give(time.monotonic() + number % 3)
    assert wait_for(lambda: len(b"".join(watched.heard)) == 500)
    watched.watcher.take()


def test_look_may_end_it(watched: Watched) -> None:
    files = len(os.listdir("/dev/fd"))
    watched.due = None
    watched.watcher.give(time.monotonic())
    # Its selector and its pipe are closed.
    assert wait_for(lambda: len(os.listdir("/dev/fd")) == files - 3)
    watched.watcher.take()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_to_take_and_give_wakes_nobody(watched: Watched) -> None:
    watched.watcher.give(time.monotonic())
    assert wait_for(lambda: watched.looks)
    time.sleep(0.1)
    looks = watched.looks
    thread = next(thread for thread in threading.enumerate() if thread.name == "watcher-test")
    status = Path(f"/proc/self/task/{thread.native_id}/status")

    def switches() -> str:
        return next(line for line in status.read_text().splitlines() if line.startswith("voluntary"))

    before = switches()
    for _ in range(100):
        watched.watcher.take()
        os.write(watched.write, b"x")
        watched.loop.step(time.monotonic())
        watched.watcher.give(NEVER)
    assert switches() == before
    assert watched.looks == looks
    watched.watcher.take()
