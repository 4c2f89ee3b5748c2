"""What comes back from the ranks: written by each that was asked, loaded by the notebook, all of it or nothing.

When some of it cannot be had, the rest is not lost: it goes with the error, and ``%ddp results`` returns it.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbddp import _closure, _salvage
from nbddp._errors import ResultError
from nbddp._paths import RunDir
from nbddp._pickling import Pickler, Target, load_file


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        out: Names from rank 0.
        gather: Names from every rank, as lists by rank.
        device: The device that all tensors are put on; None for the CPU.
        asked: How the user of the magic has asked for it, for messages.
    """

    out: tuple[str, ...] = ()
    gather: tuple[str, ...] = ()
    device: str | None = None
    asked: str = ""

    def of_rank(self, rank: int) -> tuple[str, ...]:
        """Return the names that a rank is to send."""
        return tuple(dict.fromkeys((*self.out, *self.gather))) if rank == 0 else self.gather


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
    return report | {"results": path}


def read(wanted: Wanted, reports: Mapping[int, Mapping[str, Any]], sent: Sequence[Any]) -> dict[str, Any]:
    """Load what the ranks have written.

    Args:
        wanted: What was asked for.
        reports: What `write` returned, by rank.
        sent: The objects that went to the ranks (`Snapshot.met`), which come back as references.

    Returns:
        The names: of `Wanted.out` with their values, of `Wanted.gather` with a list by rank.

    Raises:
        ResultError: Some of it is not to be had; the rest is in its `results`, a gathered name that not all ranks
            have as a dictionary by rank.
    """
    ranks = [rank for rank in sorted(reports) if wanted.of_rank(rank)]
    problems: dict[str, None] = {}
    loaded: dict[int, dict[str, Any]] = {}
    for rank in ranks:
        report = reports[rank]
        if missing := report.get("missing_results"):
            problems[f"the cell did not bind {', '.join(map(repr, missing))} on rank {rank}"] = None
        problems |= dict.fromkeys(report.get("bad_results", {}).values())
        loaded[rank] = {}
        if "results" in report:
            loaded[rank], reasons = _load(report["results"], wanted.device, sent)
            for name, reason in reasons.items():
                problems[f"{name!r} came back, but cannot be loaded here: {reason}"] = None
    results = {name: loaded[0][name] for name in wanted.out if name in loaded[0]}
    for name in wanted.gather:
        by_rank = {rank: loaded[rank][name] for rank in ranks if name in loaded[rank]}
        if len(by_rank) == len(ranks):
            results[name] = list(by_rank.values())
        elif by_rank:
            results[name] = by_rank
    if problems:
        raise ResultError(_message(wanted, list(problems), list(results)), results=results)
    return results


def _load(path: str, device: str | None, sent: Sequence[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the results of a rank, and return them, and why there are not more."""

    def target() -> Target:
        target = Target({}, _own_globals(), sender_has=sent, all_to=device)
        if device is not None and device.startswith("cuda"):
            target.device = device
        return target

    try:
        load_file(path, whole := target())
    except Exception:
        reasons = _salvage.salvage(path, some := target())
        return some.namespace, reasons
    return whole.namespace, {}


def _message(wanted: Wanted, problems: Sequence[str], there: Sequence[str]) -> str:
    if not wanted.asked:
        return "; ".join(problems)
    rest = f"; %ddp results has the rest: {', '.join(there)}" if there else ""
    return f"{wanted.asked}: {'; '.join(problems)}. Nothing was assigned{rest}"


def _own_globals() -> dict[str, Any]:
    # A function that comes back must not rebind notebook variables.
    return {"__name__": "__main__", "__builtins__": builtins}
