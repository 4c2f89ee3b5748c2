"""Files that arrive in pieces: on a node what the notebook sends, in the gateway what ranks have made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable
from dataclasses import dataclass
from io import FileIO
from typing import Generic, TypeVar

from nbddp._frames import FrameError

Key = TypeVar("Key", bound=Hashable)


@dataclass
class _File:
    file: FileIO
    path: str
    left: int


class Incoming(Generic[Key]):
    """The files that have begun and are not complete, by what their pieces call them."""

    def __init__(self) -> None:
        self._files: dict[Key, _File] = {}

    def begin(self, key: Key, path: str, size: int) -> None:
        """Make a file; one without bytes is complete with an empty piece.

        Args:
            key: What its pieces will call it; a file that was called so and is not complete is forgotten.
            path: Where it is to be. Nothing may be there: a link that somebody has put there is not followed.
            size: How many bytes are to come.

        Raises:
            OSError: It cannot be made.
        """
        self.forget(key)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._files[key] = _File(FileIO(fd, "w"), path, size)

    def piece(self, key: Key, data: bytes) -> bool:
        """Write the next bytes of a file; return whether these were the last.

        Raises:
            KeyError: No file of that name has begun.
            FrameError: There are more than were to come.
            OSError: They cannot be written; its `filename` is the path, and the file is forgotten.
        """
        one = self._files[key]
        if len(data) > one.left:
            raise FrameError(f"{os.path.basename(one.path)} has {len(data) - one.left} bytes more than were to come")
        try:
            view = memoryview(data)
            while view:
                view = view[one.file.write(view) :]
            one.left -= len(data)
            if one.left:
                return False
            one.file.close()
        except OSError as error:
            self.forget(key)
            error.filename = one.path
            raise
        del self._files[key]
        return True

    def forget(self, key: Key) -> None:
        """Wait no longer for a file's bytes; what has come of them stays where it is."""
        if (one := self._files.pop(key, None)) is not None:
            # Only what is written tells whether there is room.
            with contextlib.suppress(OSError):
                one.file.close()

    def close(self) -> None:
        """Forget all files."""
        for key in list(self._files):
            self.forget(key)
