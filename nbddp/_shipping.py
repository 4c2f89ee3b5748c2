"""Files on their way to the nodes: each goes to each node once, and what needs it waits until it is there."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping

from nbddp._frames import CHUNK
from nbddp._paths import format_size
from nbddp._tasks import Tasks

# Seconds between two lines on how much has been sent.
_PROGRESS_SECONDS = 0.5


class Shipping:
    """What is sent to all nodes of a run.

    Args:
        send: Sends a message to nodes; see `nbddp._clients.Clients.send`.
        drain: Waits until what was sent is on its way.
        tasks: Where what goes on beside is kept.
        to: Where to, in words.
        state: Shows how far it is.
    """

    def __init__(
        self,
        send: Callable[..., None],
        drain: Callable[[], Awaitable[None]],
        tasks: Tasks,
        to: str,
        state: Callable[[str], None],
    ) -> None:
        self._send, self._drain, self._tasks, self._to, self._state = send, drain, tasks, to, state
        # The file that is on its way, the task that sends it, and by rank what is to be done when it is there.
        self._name = ""
        self._task: asyncio.Task[None] | None = None
        self._held: dict[int, Callable[[], None]] = {}

    def hold(self, rank: int, name: str, path: str, then: Callable[[], None]) -> None:
        """Do something for a rank when a file is on all nodes; the first that asks for it has it sent."""
        if name != self._name:
            self._name = name
            self._held = {rank: then}
            self._task = self._tasks.spawn(self._ship_and_let_go(name, path))
        elif self._task is not None:
            self._held[rank] = then
        else:
            then()

    def drop(self, rank: int) -> bool:
        """Forget what a rank waits for; tell whether it waited. Without any that waits the file is not sent on."""
        if self._held.pop(rank, None) is None:
            return False
        if not self._held and self._task is not None:
            self._task.cancel()
            self._send(-1, "drop", name=self._name)
            self._task, self._name = None, ""
        return True

    async def _ship_and_let_go(self, name: str, path: str) -> None:
        await self.ship({name: path})
        held, self._held, self._task = self._held, {}, None
        for then in held.values():
            then()

    async def ship(self, files: Mapping[str, str]) -> None:
        """Send files, given by their names there and their paths here, to all nodes.

        Raises:
            OSError: One cannot be read.
        """
        opened = [(name, open(path, "rb")) for name, path in files.items()]  # noqa: SIM115  # closed below
        try:
            sizes = [os.fstat(file.fileno()).st_size for _, file in opened]
            total, sent, told, began = sum(sizes), 0, time.monotonic(), time.monotonic()
            for (name, file), size in zip(opened, sizes, strict=True):
                self._send(-1, "file", name=name, size=size)
                while data := file.read(CHUNK):
                    self._send(-1, "piece", data, name=name)
                    await self._drain()
                    sent += len(data)
                    if (now := time.monotonic()) > told + _PROGRESS_SECONDS and now > began + 2 * _PROGRESS_SECONDS:
                        told = now
                        rate = format_size(int(sent / (now - began)))
                        self._state(f"{format_size(sent)} of {format_size(total)} sent to {self._to}, {rate}/s")
        finally:
            for _, file in opened:
                file.close()
