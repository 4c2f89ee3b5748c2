"""``%ddp doctor``: before a long run, what most often ends in a silent hang; and why a run does not start.

::

    _checks     the machine and the environment: room, limits, what is set     milliseconds
    _network    names, addresses, interfaces                                    a tenth of a second; with a deadline
    _gpus       what the driver says                                            a second; with a deadline
    _probe      the launcher, and a real all-reduce on each backend             seconds; with a deadline

A check that itself fails says so in its line and does not keep the others from theirs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import nbddp
from nbddp import _checks, _gpus, _network
from nbddp._findings import Check, Finding

if TYPE_CHECKING:
    from nbddp._client import Client

# How long a name server may take: a look-up of a healthy one takes milliseconds. And when nobody has asked for a
# check, but a run has failed and its user waits for the error.
_NAME_SECONDS = 2.0
_QUICK_NAME_SECONDS = 0.15

# What limits must at least do for, whatever the number of GPUs.
_RANKS = 2


def examine(client: Client) -> Iterator[Finding]:
    """Yield all that there is to find, each as soon as it is known.

    Args:
        client: The kernel's end of the launcher.

    Raises:
        KeyboardInterrupt: The user has stopped it; nothing runs any more.
    """
    # _job, which it goes through, reports with `quick` how a run failed.
    from nbddp import _probe

    env = dict(os.environ)
    yield from _guarded("versions", _versions)
    gpus: list[_gpus.Gpu] = []
    yield from _guarded("GPUs", lambda: _look_at_gpus(gpus, env))
    for subject, check in [
        *_of_machine(env, max(_RANKS, len(gpus)), _NAME_SECONDS),
        ("environment", lambda: _checks.left_over(env)),
        ("environment", lambda: _checks.behaviour(env)),
    ]:
        yield from _guarded(subject, check)
    began = time.monotonic()
    count = _probe.count_gpus(client, env)
    if isinstance(count, Finding):
        yield count
        return
    yield Finding("ok", "launcher", f"ready after {time.monotonic() - began:.1f} s; ranks see {_number(count)}")
    yield from _guarded("GPUs", lambda: _unseen(count, gpus, env))
    reduces = _probe.all_reduces(client, env, count)
    while True:
        try:
            yield next(reduces)
        except StopIteration:
            return
        except Exception as error:
            yield _failed("run", error)
            return


def quick(env: Mapping[str, str] | None = None, ranks: int = _RANKS) -> list[Finding]:
    """Return what is wrong that would keep ranks from starting; empty if it is none of what can be seen at once.

    Launches no run and takes a third of a second at most; longer on a machine that is slow to start a process. What
    cannot be looked at is left out.

    Args:
        env: The ranks' environment; this process's own by default.
        ranks: How many ranks were to start.
    """
    checks = _of_machine(dict(os.environ if env is None else env), ranks, _QUICK_NAME_SECONDS)
    return [finding for _, check in checks for finding in _unless_it_fails(check) if finding.level != "ok"]


def _of_machine(env: Mapping[str, str], ranks: int, seconds: float) -> list[tuple[str, Check]]:
    """Return the checks by subject, the most telling first; all of them together take a tenth of a second.

    Args:
        env: The environment that ranks will have.
        ranks: How many ranks the limits must do for.
        seconds: How long to wait for the answer of a name server.
    """
    return [
        ("/dev/shm", _checks.shared_memory),
        ("temp space", _checks.temp_space),
        ("memory", partial(_checks.memory, ranks)),
        ("open files", partial(_checks.open_files, ranks)),
        ("processes", partial(_checks.processes, ranks)),
        ("limits", _checks.other_limits),
        ("cores", partial(_checks.cores, env, ranks)),
        ("host name", partial(_network.host_name, seconds)),
        ("loopback", _network.loopback),
        ("interfaces", partial(_network.interfaces, env)),
    ]


def verdict(findings: Iterable[Finding]) -> str:
    """Return the last line."""
    levels = [finding.level for finding in findings]
    bad, warn = levels.count("bad"), levels.count("warn")
    if not bad and not warn:
        return "nothing found that would stop a run"
    things = f"{bad + warn} thing{'s' if bad + warn > 1 else ''} to look at"
    if not bad:
        return things
    return f"{things}, {f'{bad} of ' if warn else ''}which would stop a run"


def _guarded(subject: str, check: Check) -> Sequence[Finding]:
    """Return what a check finds, or that it failed."""
    try:
        return _several(check())
    except Exception as error:
        return [_failed(subject, error)]


def _unless_it_fails(check: Check) -> Sequence[Finding]:
    with contextlib.suppress(Exception):
        return _several(check())
    return ()


def _several(found: Finding | Sequence[Finding] | None) -> Sequence[Finding]:
    return [found] if isinstance(found, Finding) else found or ()


def _failed(subject: str, error: Exception) -> Finding:
    return Finding("warn", subject, f"could not be looked at: {type(error).__name__}: {error}")


# Versions.


def _versions() -> list[Finding]:
    """Return what is installed, and whether the notebook has imported the same torch as ranks would."""
    torch = _installed("torch")
    versions = [f"nbddp {nbddp.__version__}", f"Python {platform.python_version()}", f"torch {torch} ({_built_for()})"]
    versions += [f"{name} {_installed(name)}" for name in ("ipython", "ipykernel", "cloudpickle")]
    found = [Finding("ok", "versions", ", ".join(versions))]
    imported = getattr(sys.modules.get("torch"), "__version__", None)
    if imported is not None and str(imported).partition("+")[0] != torch.partition("+")[0]:
        found.append(
            Finding(
                "warn",
                "versions",
                f"the notebook has imported torch {imported}, and ranks would import {torch}",
                "Restart the kernel",
            )
        )
    return found


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _built_for() -> str:
    """Return what torch was built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "nowhere to be found"
    with open(os.path.join(os.path.dirname(spec.origin), "version.py"), encoding="utf-8") as file:
        text = file.read()
    built = re.search(r"^(cuda|hip)\b[^=]*= *['\"](.+)['\"]", text, re.MULTILINE)
    return (
        f"built for {built[1].upper() if built[1] == 'cuda' else 'ROCm'} {built[2]}" if built else "built for the CPU"
    )


# GPUs.


def _look_at_gpus(gpus: list[_gpus.Gpu], env: Mapping[str, str]) -> Sequence[Finding]:
    """Return what the driver says; add the GPUs to `gpus`."""
    setting = _gpus.hidden(env)
    try:
        there = _gpus.look()
    except TimeoutError:
        return [
            Finding(
                "bad",
                "GPUs",
                "the driver does not answer; whatever uses a GPU will hang",
                "nvidia-smi in a terminal and dmesg may say why; most often the machine must be restarted",
            )
        ]
    except OSError as error:
        return [Finding("bad", "GPUs", f"the driver says: {error}", "Programs that use a GPU will say the same")]
    if there is None:
        text = "there is no nvidia-smi and no driver that pynvml finds, so they cannot be looked at"
        return [Finding("ok", "GPUs", f"{text}; {setting}" if setting else text)]
    gpus += there
    driver = f"driver {there[0].driver}" if there else "the driver is there"
    found = [Finding("ok", "GPUs", f"{driver}, {_number(len(there))}{f'; {setting}' if setting else ''}")]
    return found + _gpus.findings(there, env.get("CUDA_VISIBLE_DEVICES"))


def _unseen(count: int, gpus: Sequence[_gpus.Gpu], env: Mapping[str, str]) -> Finding | None:
    """Return a warning if the driver has GPUs and torch sees none."""
    if count or not gpus:
        return None
    if setting := _gpus.hidden(env):
        return Finding(
            "warn", "GPUs", f"{setting} hides all of them", "Set it to the numbers of those that may be used"
        )
    return Finding(
        "warn",
        "GPUs",
        f"the driver has {_number(len(gpus))}, and torch, {_built_for()}, sees none",
        "Install a build of torch for CUDA that this driver is new enough for, and restart the kernel",
    )


def _number(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus or 'no'} GPUs"
