"""The notebook's plot settings, in the ranks: matplotlib's rcParams, and how its figures are drawn inline.

They live inside a library, so no variable of the cell leads to them; but a reader expects figures of the ranks to look
like the notebook's. A rank that never imports matplotlib does not pay for them.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import cloudpickle

# A name that no variable can have; under it the settings travel with the closure.
NAME = "plot settings"

# What is each process's own.
_NOT_SENT = frozenset({"backend", "backend_fallback", "interactive", "toolbar"})

_INLINE = ("figure_formats", "print_figure_kwargs", "close_figures")


def settings() -> dict[str, Any]:
    """Return what the notebook has changed, under `NAME`; nothing if it has not."""
    found: dict[str, Any] = {}
    matplotlib = sys.modules.get("matplotlib")
    defaults = getattr(matplotlib, "rcParamsDefault", None)
    if matplotlib is not None and defaults is not None:
        current = dict.items(matplotlib.rcParams)  # not its own, which resolves the backend
        params = {
            key: value for key, value in current if key not in _NOT_SENT and _differ(value, dict.get(defaults, key))
        }
        if params:
            found["rcParams"] = params
    inline = getattr(sys.modules.get("matplotlib_inline.config"), "InlineBackend", None)
    if inline is not None and inline.initialized():
        backend = inline.instance()
        fresh = inline()
        changed = {name: getattr(backend, name) for name in _INLINE if getattr(backend, name) != getattr(fresh, name)}
        if changed:
            found["InlineBackend"] = changed
    return {NAME: found} if found and _can_go(found) else {}


def _can_go(found: Mapping[str, Any]) -> bool:
    try:
        cloudpickle.dumps(found)
    except Exception:  # they are not the cell's, which is not to be refused for them
        return False
    return True


def _differ(value: Any, default: Any) -> bool:
    try:
        return bool(value != default)
    except Exception:  # arrays in them, of different lengths
        return True


def take(namespace: dict[str, Any]) -> Mapping[str, Any]:
    """Take the settings out of a rank's namespace; apply those of matplotlib now, or when it is imported.

    Returns:
        Settings of the shell: by class and trait.
    """
    found = namespace.pop(NAME, {})
    if params := found.get("rcParams"):
        if "matplotlib" in sys.modules:
            _apply(sys.modules["matplotlib"], params)
        else:
            sys.meta_path.insert(0, _WhenImported(params))
    return {"InlineBackend": found["InlineBackend"]} if "InlineBackend" in found else {}


def _apply(matplotlib: ModuleType, params: Mapping[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some names are deprecated and still there
        for name, value in params.items():
            with contextlib.suppress(KeyError, ValueError):  # another version's
                matplotlib.rcParams[name] = value


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds matplotlib as the others would, and has the settings applied as soon as it is loaded."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "matplotlib":
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _apply(module, self._params)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
