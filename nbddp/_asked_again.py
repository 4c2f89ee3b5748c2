"""Whether a line with ``--keep`` can have the ranks that are there: what it asks for, and what they are.

A line that says how many ranks there are to be asks for a whole run, and means what it would mean if there were none:
``--cpus 2`` alone is this machine, ``--nnodes 2 --cpus 1`` is Slurm. One that does not is held to what it says.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping

from nbddp import _engines, _nodes
from nbddp._devices import Devices
from nbddp._options import Options
from nbddp._placement import Placement


def refusal(asked: Options, began: Options, kept: Devices, env: Mapping[str, str]) -> str | None:
    """Return why kept ranks are not what is asked for, and what to do; None if they are.

    Args:
        asked: What the line says, or what is in defaults and it has not left out.
        began: The options that they were started with.
        kept: What they run on.
        env: The environment that they were given.
    """
    if not _are_those(asked, began, kept):
        words = _words(asked)
        them, they = ("it", "it holds") if kept.ranks == 1 else ("them", "they hold")
        options = " and ".join(word.split()[0] for word in words)
        return (
            f"--keep {' '.join(words)}: {_what_there_is(kept)}. Without {options} the cell runs on {them}; "
            f"%ddp stop ends {them}, with all that {they}"
        )
    for name, value in asked.env.items():
        if began.env.get(name, env.get(name)) != value:
            return (
                f"--env {name}={value}: kept ranks have the environment that they began with. Set os.environ in a "
                "cell of theirs, or begin anew after %ddp stop"
            )
    if asked.backend not in (None, began.backend):
        return f"--backend {asked.backend}: kept ranks have their process group; %ddp stop ends them"
    return None


def _are_those(asked: Options, began: Options, kept: Devices) -> bool:
    ranks, placement = _nodes.ranks_per_node(asked), kept.placement
    if ranks is not None:
        if asked.cpus is not None and kept.gpus:
            return False
        # Nodes have their own GPUs; that the notebook's machine has none says nothing.
        if placement is not None and asked.cpus is None and began.cpus is not None:
            return False
        if asked.gpu_ids not in ((), began.gpu_ids):
            return False
    if placement is None:
        return not asked.placed and ranks in (None, kept.ranks)
    if ranks is not None and not (asked.placed and ranks == placement.ranks_per_node):
        return False
    return _are_its_nodes(asked, placement, whole=ranks is not None)


def _are_its_nodes(asked: Options, placement: Placement, *, whole: bool) -> bool:
    """Tell whether nodes are those asked for; `whole` if what is not said has the meaning that it has without them."""
    pairs = (
        (asked.nnodes if whole or asked.nnodes > 1 else None, placement.nnodes),
        (asked.engine_name or ("slurm" if whole else None), placement.engine),
        (tuple(asked.hosts) or (() if whole else None), tuple(placement.hosts)),
        (asked.slurm if asked.slurm is not None or not whole else "", placement.slurm),
        (asked.python or (sys.executable if whole else None), placement.python),
    )
    return all(wanted in (None, there) for wanted, there in pairs)


def _words(asked: Options) -> list[str]:
    """Return what of a line says which ranks it is to have, an option each."""
    given = [
        ("--nnodes", str(asked.nnodes) if asked.nnodes > 1 and not asked.hosts else ""),
        ("--hosts", ",".join(asked.hosts)),
        ("--engine", asked.engine or ""),
        ("--slurm", shlex.quote(asked.slurm) if asked.slurm is not None else ""),
        ("--python", asked.python or ""),
        ("--cpus", str(asked.cpus or "")),
        ("--gpus", str(asked.gpus or "") if not asked.gpu_ids else ""),
        ("--gpu-ids", ",".join(map(str, asked.gpu_ids))),
    ]
    return [f"{option} {value}" for option, value in given if value]


def _what_there_is(kept: Devices) -> str:
    """Return how many ranks are kept, and where, in words."""
    count = "1 rank is kept" if kept.ranks == 1 else f"{kept.ranks} ranks are kept"
    count += ", one a GPU" if kept.gpus else ", on the CPU"
    if (placement := kept.placement) is None:
        return count
    how = {"ssh": f"--hosts {','.join(placement.hosts)}", "local": "--engine local"}.get(placement.engine)
    how = how or _engines.kind(placement.engine).title
    how += f", --slurm {shlex.quote(placement.slurm)}" if placement.slurm else ""
    if placement.nnodes == 1:
        return f"{count}, on 1 node ({how})"
    return f"{count}, {placement.ranks_per_node} on each of {placement.nnodes} nodes ({how})"
