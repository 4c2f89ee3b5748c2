"""What comes back from the ranks: written by each that was asked, loaded by the notebook, all of it or nothing.

When some of it cannot be had, the rest is not lost: it goes with the error, and ``%ddp results`` returns it.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbddp import _closure, _salvage
from nbddp._errors import ResultError
from nbddp._paths import RunDir
from nbddp._pickling import Pickler, Target, load_file
from nbddp._snapshot import map_file, parts


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        out: Names from one rank; of several machines, from the first of each.
        gather: Names from every rank, as lists by rank.
        device: The device that all tensors are put on; None for the CPU.
        asked: How the user of the magic has asked for it, for messages.
        first: The rank that `out` comes from.
    """

    out: tuple[str, ...] = ()
    gather: tuple[str, ...] = ()
    device: str | None = None
    asked: str = ""
    first: int = 0

    def of_rank(self, rank: int) -> tuple[str, ...]:
        """Return the names that a rank, by its number on its machine, is to send."""
        return tuple(dict.fromkeys((*self.out, *self.gather))) if rank == self.first else self.gather


def write(
    names: Sequence[str], namespace: dict[str, Any], received: Mapping[int, Any], rank: int, run_dir: RunDir
) -> dict[str, Any]:
    """Write what the notebook asked this rank for.

    Args:
        names: The names.
        namespace: The script's globals.
        received: What came from the notebook (`Target.received`).
        rank: This rank.
        run_dir: The run's files.

    Returns:
        What `read` needs to know: the file, what is missing, and what could not be pickled and why.
    """
    there = {name: namespace[name] for name in names if name in namespace}
    missing = [name for name in names if name not in namespace]
    bad: dict[str, str] = {}
    try:
        snapshot = Pickler(namespace, received).snapshot(there)
    except Exception as error:
        bad = _closure.explain_results(there, namespace) or dict.fromkeys(there, str(error))
        there = {name: value for name, value in there.items() if name not in bad}
        snapshot = Pickler(namespace, received).snapshot(there)
    report = {"missing_results": missing, "bad_results": bad, "unwrapped": snapshot.unwrapped}
    if not there:
        return report
    try:
        path = run_dir.store(f"results.{rank}", snapshot.nbytes, snapshot.write)
    except Exception as error:
        return report | {"bad_results": bad | dict.fromkeys(there, f"cannot bring back {', '.join(there)}: {error}")}
    finally:
        snapshot.release()
    return report | {"results": path}


def read(
    wanted: Wanted, reports: Mapping[int, Mapping[str, Any]], sent: Sequence[Any], first: int = 0
) -> dict[str, Any]:
    """Load what the ranks have written.

    Args:
        wanted: What was asked for.
        reports: What `write` returned, by the ranks' numbers on this machine.
        sent: The objects that went to the ranks (`Snapshot.met`), which come back as references.
        first: The number of this machine's first rank.

    Returns:
        The names: of `Wanted.out` with their values, of `Wanted.gather` with a list by rank.

    Raises:
        ResultError: Some of it is not to be had; the rest is in its `results`, a gathered name that not all ranks
            have as a dictionary by rank.
    """
    ranks = [rank for rank in sorted(reports) if wanted.of_rank(rank)]
    # What is the matter, and on which ranks.
    problems: dict[str, list[int]] = {}
    loaded: dict[int, dict[str, Any]] = {}
    for rank in ranks:
        report = reports[rank]
        told = [f"the cell did not bind {name!r}" for name in report.get("missing_results", ())]
        told += report.get("bad_results", {}).values()
        loaded[rank] = {}
        if "results" in report:
            absent = {*report["missing_results"], *report["bad_results"]}
            names = [name for name in wanted.of_rank(rank) if name not in absent]
            loaded[rank], reasons = load_parts(report["results"], names, wanted.device, sent)
            told += [f"{name!r} came back, but cannot be loaded here: {why}" for name, why in reasons.items()]
        for problem in dict.fromkeys(told):
            problems.setdefault(problem, []).append(rank)
    of_first = loaded.get(wanted.first, {})
    results = {name: of_first[name] for name in wanted.out if name in of_first}
    for name in wanted.gather:
        by_rank = {rank: loaded[rank][name] for rank in ranks if name in loaded[rank]}
        if len(by_rank) == len(ranks):
            results[name] = list(by_rank.values())
        elif by_rank:
            results[name] = {first + rank: value for rank, value in by_rank.items()}
    if problems:
        told = [f"{problem}{_where(of, ranks, first)}" for problem, of in problems.items()]
        raise ResultError(_message(wanted, told, list(results)), results=results)
    return results


def load_parts(
    path: str, names: Sequence[str], device: str | None, sent: Sequence[Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Load these names of what a rank has written; return those that there are, and for the others why not."""
    target = _target(device, sent)
    try:
        _import_torch_for(path)
        load_file(path, target)
        return target.namespace, {}
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    # Now nothing holds what was loaded so far; it is about to be loaded again.
    target = _target(device, sent)
    try:
        reasons = _salvage.salvage(path, target)
    except Exception:
        return {}, dict.fromkeys(names, why)
    return target.namespace, {name: reasons.get(name, why) for name in names if name not in target.namespace}


def _import_torch_for(path: str) -> None:
    """Import torch if this file of results needs it: the notebook may only have launched cells so far.

    That takes seconds, and must not be torn: torch that is half imported ends the process when it is imported again. On
    a thread of its own it is not, while here an interrupt is heard at once.
    """
    module = sys.modules.get("torch")
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        return
    stream, _ = parts(map_file(path))
    if re.search(b"torch", stream) is not None:
        thread = threading.Thread(target=_import_torch, name="nbddp-import", daemon=True)
        thread.start()
        thread.join()


def _import_torch() -> None:
    with contextlib.suppress(Exception):  # the loading says so
        importlib.import_module("torch")


def _target(device: str | None, sent: Sequence[Any]) -> Target:
    target = Target({}, _own_globals(), sender_has=sent, all_to=device)
    if device is not None and device.startswith("cuda"):
        target.device = device
    return target


def _where(of: Sequence[int], ranks: Sequence[int], first: int) -> str:
    if list(of) == list(ranks):
        return "" if len(of) == 1 else " on every rank"
    return f" on {'rank' if len(of) == 1 else 'ranks'} {', '.join(str(first + rank) for rank in of)}"


def _message(wanted: Wanted, problems: Sequence[str], there: Sequence[str]) -> str:
    if not wanted.asked:
        return "; ".join(problems) + ("; the error's results have the others" if there else "")
    rest = f"; %ddp results has the rest: {', '.join(there)}" if there else ""
    return f"{wanted.asked}: {'; '.join(problems)}. Nothing was assigned{rest}"


def _own_globals() -> dict[str, Any]:
    # A function that comes back must not rebind notebook variables.
    return {"__name__": "__main__", "__builtins__": builtins}
