"""Which devices a run gets, decided before anything is launched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from nbddp import _machines, _nodes, _process
from nbddp._errors import LaunchError
from nbddp._options import Options
from nbddp._placement import Placement

LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Devices:
    """How many ranks there are and on what.

    Attributes:
        ranks: Number of ranks.
        gpus: Whether each has a GPU.
        placement: The nodes that have them; None for this machine.
        visible: CUDA_VISIBLE_DEVICES for the ranks; None to leave it as it is.
        note: A line for the user, if the run is not quite what was asked for.
    """

    ranks: int
    gpus: bool
    visible: str | None = None
    note: str | None = None
    placement: Placement | None = None


def choose(
    options: Options,
    env: Mapping[str, str],
    count_gpus: Callable[[], int],
    in_use: Mapping[str, str] = MappingProxyType({}),
) -> Devices:
    """Return the devices for a run.

    Args:
        options: What the user asks for.
        env: The ranks' environment.
        count_gpus: Returns how many GPUs a process with that environment sees; called only if it matters.
        in_use: GPUs that other runs of this kernel use, as the driver knows them, and whose they are.

    Raises:
        LaunchError: There are fewer GPUs than asked for, or none and no number of ranks was given.
    """
    placement = _nodes.place(options) if options.placed else None
    if placement is not None and not (placement.engine == "local" and placement.gpus):
        return Devices(placement.ranks, gpus=placement.gpus, placement=placement)
    if options.cpus is not None:
        return Devices(options.cpus, gpus=False)
    there = count_gpus()
    wanted = len(options.gpu_ids) or (options.gpus if placement is None else placement.ranks)
    if there == 0:
        return _without_gpus(options, wanted, placement)
    if options.gpu_ids:
        chosen = _listed_gpus(options, env, there, in_use)
    else:
        chosen = _first_gpus(options, env, there, in_use, wanted)
    if placement is not None:
        # Nodes that are processes of this machine; each is told which part of its GPUs it has.
        names = chosen or _seen(there, env)
        each = placement.ranks_per_node
        visible = [",".join(names[first : first + each]) for first in range(0, placement.ranks, each)]
        return Devices(placement.ranks, gpus=True, placement=replace(placement, visible=tuple(visible)))
    return Devices(wanted or there, gpus=True, visible=",".join(chosen) if chosen else None)


def _without_gpus(options: Options, wanted: int | None, placement: Placement | None) -> Devices:
    """Return the devices of ranks that are to have GPUs where there is none."""
    if options.gpu_ids:
        raise LaunchError(f"--gpu-ids {_listed(options)}: there is no GPU here. --cpus {wanted} runs on the CPU")
    if wanted is None:
        raise LaunchError("there is no GPU here. Say how many ranks run on the CPU: --cpus 2, or cpus=2 in launch")
    ranks = "1 rank" if wanted == 1 else f"{wanted} ranks"
    note = f"nbddp: there is no GPU here; {ranks} on the CPU, over gloo"
    return Devices(
        wanted, gpus=False, note=note, placement=None if placement is None else replace(placement, gpus=False)
    )


def _listed_gpus(options: Options, env: Mapping[str, str], there: int, in_use: Mapping[str, str]) -> list[str]:
    """Return the GPUs that are listed, as the driver knows them."""
    if max(options.gpu_ids) >= there:
        raise LaunchError(
            f"--gpu-ids {_listed(options)}: there {'is' if there == 1 else 'are'} {_gpus(there)} here, numbered from 0"
        )
    seen = _seen(there, env)
    if max(options.gpu_ids) >= len(seen) or not all(seen[i] for i in options.gpu_ids):
        listed = env.get("CUDA_VISIBLE_DEVICES")
        raise LaunchError(
            f"--gpu-ids {_listed(options)}: CUDA_VISIBLE_DEVICES={listed} does not say which GPUs these are"
        )
    chosen = [seen[i] for i in options.gpu_ids]
    if not options.share and (used := [gpu for gpu in chosen if gpu in in_use]):
        raise LaunchError(f"--gpu-ids {_listed(options)}: {_whose(used, in_use)}; or give --share")
    return chosen


def _first_gpus(
    options: Options, env: Mapping[str, str], there: int, in_use: Mapping[str, str], wanted: int | None
) -> list[str]:
    """Return the first GPUs that are free, as the driver knows them; none if they are the first that there are."""
    nodes = f" on each of --nnodes {options.nnodes} nodes" if options.nnodes > 1 and options.placed else ""
    asked = f"--gpus {options.gpus}{nodes}" if options.gpus is not None else "all GPUs"
    if wanted is not None and wanted > there:
        fits = there // options.nnodes if nodes else there
        instead = f"Ask for --gpus {fits}, or for" if fits else "Ask for"
        raise LaunchError(
            f"{asked}: there {'is' if there == 1 else 'are'} {_gpus(there)} here. "
            f"{instead} --cpus {options.gpus} to run on the CPU"
        )
    number = wanted or there
    seen = _seen(there, env)
    if options.share or not any(gpu in in_use for gpu in seen[:number]):
        return []
    free = [gpu for gpu in seen[:there] if gpu and gpu not in in_use]
    if len(free) < number:
        others = f", and {len(free)} more {'is' if len(free) == 1 else 'are'} free" if free else ""
        used = [gpu for gpu in seen if gpu in in_use]
        raise LaunchError(f"{asked}: {_whose(used, in_use)}{others}; or give --share")
    return free[:number]


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _seen(there: int, env: Mapping[str, str]) -> list[str]:
    """Return the GPUs as the driver knows them, in the order of the numbers that the notebook's torch gives them.

    The notebook may itself see only some of them. CUDA takes the list up to the first entry that it does not know.
    """
    listed = env.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(there)] if listed is None else [name.strip() for name in listed.split(",")]


def _whose(gpus: Sequence[str], in_use: Mapping[str, str]) -> str:
    holders = " and ".join(dict.fromkeys(in_use[gpu] for gpu in gpus))
    return (
        f"{'GPU' if len(gpus) == 1 else 'GPUs'} {', '.join(gpus)} {'is' if len(gpus) == 1 else 'are'} used by {holders}"
    )


def check_out_device(device: str, count_gpus: Callable[[], int]) -> None:
    """Refuse, before hours of training, a device that results cannot come back to.

    Raises:
        LaunchError: There is no such GPU here.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and (there := count_gpus()) <= int(index or 0):
        have = "is 1 GPU" if there == 1 else f"are {there or 'no'} GPUs"
        raise LaunchError(f"--out-device {device}: there {have} here")


def environment(base: Mapping[str, str], options: Options, devices: Devices) -> dict[str, str]:
    """Return the environment of the ranks: the notebook's, what the user sets, and what must be set and is not."""
    if devices.placement is not None:
        return _nodes.environment(options, devices.placement)
    env = {**base, **options.env}
    if devices.visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = devices.visible
    # torchrun's own default of one thread would leave most of a large machine idle.
    env.setdefault("OMP_NUM_THREADS", str(threads_per_rank(devices.ranks)))
    if options.nnodes > 1:
        # NCCL leaves loopback out by itself, and may know of faster ways than the one to the meeting point.
        if (interface := _machines.interface_to(options.rdzv_endpoint or "")) is not None:
            env.setdefault("GLOO_SOCKET_IFNAME", interface)
        return env
    # On one machine nothing has to listen where another could reach it.
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        env.setdefault(name, LOOPBACK_INTERFACE)
    return env


def threads_per_rank(ranks: int, cores: int | None = None) -> int:
    """Return how many threads each of some ranks computes with, unless OMP_NUM_THREADS says otherwise.

    Args:
        ranks: How many ranks there are.
        cores: How many cores are theirs, if not all that this process may use.
    """
    usable = _process.usable_cores()
    return max(1, (usable if cores is None else min(usable, cores)) // ranks)


def gpus_of(devices: Devices, env: Mapping[str, str]) -> list[str]:
    """Return for each rank its GPU, as the driver knows it: by number or UUID; an empty list if they have none."""
    if not devices.gpus:
        return []
    if devices.placement is not None:
        # Those of other machines are none of this one's.
        return [name for part in devices.placement.visible for name in part.split(",")]
    visible = env.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(devices.ranks)]
    return names[: devices.ranks]


def _listed(options: Options) -> str:
    return ",".join(map(str, options.gpu_ids))
