"""Files that come from another machine in pieces."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable
from typing import BinaryIO, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Incoming(Generic[Key]):
    """The files that are on their way here, by what the sender calls each."""

    def __init__(self) -> None:
        self._open: dict[Key, tuple[BinaryIO, int]] = {}

    def begin(self, key: Key, path: str, size: int) -> bool:
        """Make a file of so many bytes, which are to come; tell whether it is complete, being empty.

        Raises:
            OSError: It cannot be made; or there is something of that name.
        """
        # What stands there now is not to be followed.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._open[key] = open(fd, "wb"), size  # noqa: SIM115  # closed when it is complete
        return self.piece(key, b"")

    def piece(self, key: Key, data: bytes) -> bool:
        """Write the next bytes; tell whether the file is complete.

        Raises:
            KeyError: No such file was begun.
            OSError: They cannot be written; the file is given up.
        """
        file, left = self._open.pop(key)
        try:
            file.write(data)
            if left > len(data):
                self._open[key] = file, left - len(data)
                return False
            file.close()
        except OSError:
            with contextlib.suppress(OSError):
                file.close()
            raise
        return True

    def forget(self, key: Key) -> None:
        """Close a file of which no more will come; nothing, if there is none."""
        if (entry := self._open.pop(key, None)) is not None:
            entry[0].close()

    def close(self) -> None:
        """Close all that is not complete."""
        for key in list(self._open):
            self.forget(key)
