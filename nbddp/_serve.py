"""A kept rank: it runs the cells that the notebook sends, one after another, in one namespace.

What the rank holds wins: a name that comes with a cell is bound only where the rank has none, unless it was pushed.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from nbddp import _interrupts, _plots
from nbddp._names import GIVEN_NAMES
from nbddp._outcome import INTERRUPTED, outcome_of, show_sources
from nbddp._paths import RunDir
from nbddp._pickling import Target, load_file
from nbddp._uplink import Uplink


class Kept:
    """What a kept rank has besides its namespace.

    Args:
        namespace: The script's globals.
        device: The name of the rank's own device.
    """

    def __init__(self, namespace: dict[str, Any], device: str) -> None:
        self.namespace = namespace
        self._device = device
        # Classes and functions that came from the notebook, by the number that the notebook knows them by.
        self._received: dict[int, Any] = {}
        # What is here before the first cell is nobody's but nbddp's.
        self._own = frozenset(namespace)
        _interrupts.ignore()

    def next_request(self, notebook: Uplink) -> dict[str, Any] | None:
        """Wait for the next request; None if there are to be no more."""
        request = notebook.next_request()
        return None if request is None or request["kind"] == "leave" else request

    def run(
        self,
        request: Mapping[str, Any],
        state: Any,
        run_cell: Callable[..., dict[str, Any]],
        begin: Callable[[str], None],
    ) -> dict[str, Any]:
        """Bind what came with a cell, and run it; return the report on it. Raises nothing.

        Args:
            request: The notebook's message; see `nbddp._kept`.
            state: Where `target` and the shell's settings are left for `run_cell`.
            run_cell: Runs the cell, given its arguments.
            begin: Tells the notebook that the cell begins.
        """

        def whatever_happens() -> dict[str, Any]:
            try:
                # From here on an interrupt is the cell's to handle, though its names are not there yet.
                begin(request["arguments"]["filename"])
                return self._run(request, state, run_cell)
            except BaseException as error:
                return outcome_of(error, ())

        return _interrupts.interruptibly(whatever_happens) or dict(INTERRUPTED)

    def _run(self, request: Mapping[str, Any], state: Any, run_cell: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        target = Target(self.namespace, self.namespace, sender_has=self._received, device=self._device)
        self._forget_arguments()
        before = {name: value for name, value in self.namespace.items() if name not in request["push"]}
        try:
            if request["closure"] is not None:
                load_file(request["closure"], target)
        except BaseException as error:
            return outcome_of(error, ()) | ({"loading": target.reading} if target.reading else {})
        finally:
            self.namespace.update(before)
        state.shell_settings = _plots.take(self.namespace)
        numbered = {key + request["offset"]: obj for key, obj in target.received.items()}
        # Where not all ranks get the same, the notebook cannot refer to it later.
        received = self._received if request["everywhere"] else dict(self._received)
        received.update(numbered)
        target.received = received
        state.target = target
        arguments = dict(request["arguments"])
        show_sources(arguments.pop("sources"))
        arguments |= {name: tuple(arguments[name]) for name in ("out", "gather")}
        outcome = run_cell(**arguments)
        return outcome | {"loaded": True}

    def _forget_arguments(self) -> None:
        """Delete what `nbddp.launch` has called a function with before: no variable has such a name."""
        for name in [name for name in self.namespace if not name.isidentifier()]:
            del self.namespace[name]

    def held(self) -> dict[str, str]:
        """Return the types of the names that cells and the notebook have given to this rank."""
        return {
            name: _kind(value)
            for name, value in list(self.namespace.items())
            if name.isidentifier() and not name.startswith("_") and (name not in self._own or name in GIVEN_NAMES)
        }

    def regroup(self, run_dir: RunDir, backend: str, place: int) -> str:
        """Make the default process group anew, since its members may have broken off in the middle of a collective.

        Args:
            run_dir: The run's files.
            backend: Its backend.
            place: The number of the meeting place.

        Returns:
            What went wrong; an empty string if nothing did.
        """
        from nbddp import _group

        try:
            _group.make_anew(backend, self._device, run_dir, place)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def _kind(value: Any) -> str:
    kind = type(value).__name__
    shape = getattr(value, "shape", None) if not isinstance(value, type | types.ModuleType) else None
    return f"{kind} {tuple(shape)}" if isinstance(shape, tuple) else kind
