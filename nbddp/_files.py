"""The files of an export: written beside their places first, so that all of them are there or none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from nbddp._errors import ExportError
from nbddp._standalone import beside


def check_target(path: str, *, force: bool) -> None:
    """See that a script can be written there.

    Raises:
        ExportError: It cannot; the message says why.
    """
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        raise ExportError(f"-o {path}: that is a folder; give the name of a file in it")
    if not os.path.isdir(folder):
        raise ExportError(f"-o {path}: there is no folder {folder}; make it first")
    if not path.endswith(".py"):
        raise ExportError(f"-o {path}: the name of a script ends in .py")
    if not force and os.path.lexists(path):
        raise ExportError(f"{path} is there already; --force replaces it, -o gives the script another name")


class Files:
    """The files of an export: all of them are written, or none.

    Args:
        path: The script's; None to write nothing.
        force: Whether to replace what is there.
    """

    def __init__(self, path: str | None, *, force: bool) -> None:
        self._path = path
        self._force = force
        self._made: list[tuple[str, str]] = []

    @property
    def values_path(self) -> str | None:
        """The file of the notebook's values."""
        return None if self._path is None else os.path.join(os.path.dirname(self._path), beside(self._path, "state"))

    def values(self, values: Mapping[str, Any]) -> bool:
        """Write the notebook's values; return whether they load as plain data."""
        from nbddp import _values

        path = self.values_path
        assert path is not None
        if not self._force and os.path.lexists(path):
            raise ExportError(f"{path} is there already; --force replaces it, -o gives the script another name")
        return self._write(path, lambda file: _values.write(values, file))

    def script(self, text: str) -> None:
        """Write the script."""
        if self._path is not None:
            self._write(self._path, lambda file: file.write(text.encode()) > 0)

    def _write(self, path: str, write: Callable[[Any], bool]) -> bool:
        try:
            descriptor, name = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".nbddp-export-")
            self._made.append((name, path))
            with os.fdopen(descriptor, "wb") as file:
                umask = os.umask(0o077)
                os.umask(umask)
                os.fchmod(file.fileno(), 0o666 & ~umask)
                return write(file)
        except OSError as error:
            raise ExportError(f"{path} cannot be written: {error.strerror or error}") from None

    def __enter__(self) -> Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, path in self._made:
            if kind is None:
                os.replace(name, path)
            else:
                os.unlink(name)
