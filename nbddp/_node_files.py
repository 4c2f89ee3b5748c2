"""What the notebook has sent to a node: the script and what cells use of the notebook, where ranks look for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from nbddp._frames import check_name
from nbddp._incoming import Incoming
from nbddp._paths import RunDir


class SentFiles:
    """The files of one run that come from the notebook.

    What a cell of ranks that stay has used is deleted here once they have done with it. The notebook's own machine does
    that when the cell is over, of which a node is not told.

    Args:
        run_dir: The run's files.
        ranks: The numbers of the node's ranks.
    """

    def __init__(self, run_dir: RunDir, ranks: Sequence[int]) -> None:
        self._run_dir = run_dir
        self._ranks = frozenset(ranks)
        # For the file of each cell, the ranks that may still be told of it, or use it.
        self._users: dict[str, set[int]] = {}
        self._incoming: Incoming[str] = Incoming()
        self._paths: dict[str, str] = {}

    def begin(self, name: str, size: int) -> None:
        """Make a file of so many bytes.

        Raises:
            FrameError: The notebook may not have such a file written.
            OSError: It cannot be made.
            LaunchError: There is no room for it.
        """
        check_name(name, size, to_node=True)
        script = name == os.path.basename(self._run_dir.script)
        if _is_of_cell(name):
            # Of a cell before, which was not for all ranks, some may never have been told.
            for other in list(self._users):
                self._forget(other)
            self._users[name] = set(self._ranks)
        self._paths[name] = self._run_dir.script if script else self._run_dir.place(name, size)
        self._incoming.begin(name, self._paths[name], size)
        if size == 0:
            self.piece(name, b"")

    def piece(self, name: str, data: bytes) -> None:
        """Write a file's next bytes. Raises OSError, with the path, if they cannot be written."""
        if _is_of_cell(name) and name not in self._users:
            return  # nobody is left to use it
        try:
            complete = self._incoming.piece(name, data)
        except OSError as error:
            raise OSError(f"cannot write {error.filename}: {error.strerror}") from error
        if complete and os.path.dirname(self._paths[name]) != self._run_dir.root:
            # The script looks for it beside itself.
            link = os.path.join(self._run_dir.root, name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)
            os.symlink(self._paths[name], link)

    def drop(self, name: str) -> None:
        """Delete what has come of a file, of which no more is to come: its cell was taken back."""
        if name in self._users:
            self._forget(name)

    def path(self, name: str) -> str:
        """Return where a file is; where it would be, if a cell that has come to nothing is still told of."""
        return self._paths.get(name, os.path.join(self._run_dir.root, name))

    def done(self, rank: int, name: str | None = None) -> None:
        """Delete what a cell used, if this was the last rank to need it.

        Args:
            rank: The rank.
            name: The file of its cell; None for all, if the rank is gone.
        """
        for one in [one for one in self._users if name in (None, one)]:
            self._users[one].discard(rank)
            if not self._users[one]:
                self._forget(one)

    def _forget(self, name: str) -> None:
        del self._users[name]
        self._incoming.forget(name)
        # What ranks have mapped stays theirs.
        for path in (self._paths.pop(name), os.path.join(self._run_dir.root, name)):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def close(self) -> None:
        """Wait for no more bytes."""
        self._incoming.close()


def _is_of_cell(name: str) -> bool:
    """Tell whether a file is of one cell; others are there for ranks that are started again, too."""
    return name.startswith("closure.")
