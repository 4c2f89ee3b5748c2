"""What the notebook has sent to a node: the script and what cells use of the notebook, where ranks look for it."""

from __future__ import annotations

import contextlib
import os

from nbddp._frames import check_name
from nbddp._incoming import Incoming
from nbddp._paths import RunDir


class SentFiles:
    """The files of one run that come from the notebook.

    Args:
        run_dir: The run's files.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
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
        self._paths[name] = self._run_dir.script if script else self._run_dir.place(name, size)
        self._incoming.begin(name, self._paths[name], size)
        if size == 0:
            self.piece(name, b"")

    def piece(self, name: str, data: bytes) -> None:
        """Write a file's next bytes. Raises OSError, with the path, if they cannot be written."""
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

    def path(self, name: str) -> str:
        """Return where a file is."""
        return self._paths[name]

    def close(self) -> None:
        """Wait for no more bytes."""
        self._incoming.close()
