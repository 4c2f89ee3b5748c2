"""``%load_ext nbddp`` and what undoes it."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from nbddp import _background, _completion, _kept
from nbddp._commands import COMMANDS
from nbddp._errors import LaunchError, NbddpError
from nbddp._function import client, refuse_in_rank
from nbddp._magic import DDPMagics

_MAGICS = ("%%ddp", "%ddp")


def _keep_empty_body(lines: list[str]) -> list[str]:
    """Give a %%ddp cell without a body an empty line, so that IPython runs it: ``%%ddp -h`` is all that one types."""
    if lines and lines[0].startswith("%%ddp") and not "".join(lines[1:]).strip():
        return [lines[0].rstrip("\n") + "\n", "\n"]
    return lines


def load(shell: Any) -> None:
    """Register the magics with a shell and start the launcher.

    Raises:
        LaunchError: On Windows: there is no fork, no torchrun with gloo to speak of, and nothing was tested. And in a
            rank.
    """
    if sys.platform == "win32":
        raise LaunchError("nbddp needs Linux or macOS; on Windows, use it inside WSL")
    refuse_in_rank("%load_ext nbddp")
    sys.stdout.write(_background.said_by_the_last_kernel())
    magics = DDPMagics(shell)
    shell.register_magics(magics)
    for event, listeners in magics.listeners.items():
        for listener in listeners:
            shell.events.register(event, listener)
    shell.input_transformers_cleanup.insert(0, _keep_empty_body)
    shell.input_transformers_cleanup.append(magics.kept.send_to_ranks)

    def own_names() -> list[str]:
        return [name for name in shell.user_ns if name not in shell.user_ns_hidden and not name.startswith("_")]

    complete = _completion.completer(COMMANDS, own_names)
    for key in _MAGICS:
        shell.set_hook("complete_command", complete, str_key=key)
    shell.set_hook("complete_command", complete, re_key=_completion.ASSIGNED.pattern)
    with contextlib.suppress(NbddpError):  # a full disk must not fail the import cell; the first run will say it
        client.start()


def unload(shell: Any) -> None:
    """Undo `load`."""
    manager = shell.magics_manager
    for kind in ("line", "cell"):
        manager.magics[kind].pop("ddp", None)
    magics = manager.registry.pop(DDPMagics.__name__, None)
    if magics is not None and magics in shell.configurables:
        shell.configurables.remove(magics)
    transformers = shell.input_transformers_cleanup
    with contextlib.suppress(ValueError):
        transformers.remove(_keep_empty_body)
    if magics is not None:
        with contextlib.suppress(ValueError):
            transformers.remove(magics.kept.send_to_ranks)
        for event, listeners in magics.listeners.items():
            for listener in listeners:
                with contextlib.suppress(ValueError):
                    shell.events.unregister(event, listener)
    sys.stdout.write(_background.end_all("nbddp")[1])
    _kept.drop()
    # IPython has no call that takes a hook away again.
    dispatcher = shell.strdispatchers["complete_command"]
    for key in _MAGICS:
        dispatcher.strs.pop(key, None)
    for regex in [regex for regex in dispatcher.regexs if regex.pattern == _completion.ASSIGNED.pattern]:
        del dispatcher.regexs[regex]
    client.close()
