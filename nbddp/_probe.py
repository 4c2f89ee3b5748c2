"""A real all-reduce between ranks, with a deadline: the one check that launches something.

It goes the way of any cell, through `nbddp._job`, so that what would stop a cell stops it, too. If it fails, it is made
again with what is known to get around the usual causes, and the finding says with what it works.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nbddp import _devices, _job
from nbddp._client import Client
from nbddp._errors import LaunchError, NbddpError, RankError, RunTimeout
from nbddp._findings import Finding
from nbddp._options import Options
from nbddp._results import Wanted
from nbddp._script import Cell
from nbddp._stop import InterruptGate

# Long enough for torch to be imported from a cold network disk.
LAUNCHER_SECONDS = 60.0

# How long ranks have for all of it. Over gloo they need 0.1 s; over NCCL each first makes a CUDA context. Where ranks
# are new interpreters they have so much more, to import torch.
DEADLINES = {"gloo": 10.0, "nccl": 20.0}
_SPAWN_SECONDS = 20.0

# After the deadline: what hangs here has nothing to save.
_GRACE_SECONDS = 0.5

# What the ranks run once they have joined the process group. The tensor is large enough (4 MB) to go the way that
# gradients go.
_CELL = """\
import torch
import torch.distributed
total = torch.full((1 << 20,), rank + 1.0, device=device)
torch.distributed.all_reduce(total)
wrong = int((total != world_size * (world_size + 1) / 2).sum())
nccl = ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else ""
gpus = range(torch.cuda.device_count() if device.type == "cuda" else 0)
apart = [(a, b) for a in gpus for b in gpus if a < b and not torch.cuda.can_device_access_peer(a, b)]
"""
_SUBJECT = "all-reduce"
_LINE = re.compile(r"on line \d+ of the cell: ")


@dataclass(frozen=True)
class Remedy:
    """What gets around a usual cause.

    Attributes:
        env: What to set in the ranks.
        meaning: What it means if it helps.
    """

    env: Mapping[str, str]
    meaning: str


_REMEDIES = {
    "gloo": (
        Remedy(
            {"GLOO_SOCKET_IFNAME": _devices.LOOPBACK_INTERFACE},
            "the interface that the notebook's GLOO_SOCKET_IFNAME names does not work; "
            "del os.environ['GLOO_SOCKET_IFNAME']",
        ),
    ),
    "nccl": (
        Remedy(
            {"NCCL_SOCKET_IFNAME": _devices.LOOPBACK_INTERFACE},
            "the interface that the notebook's NCCL_SOCKET_IFNAME names does not work; "
            "del os.environ['NCCL_SOCKET_IFNAME']",
        ),
        Remedy(
            {"NCCL_P2P_DISABLE": "1"},
            "GPUs cannot reach each other directly although the driver says so, most often because of an IOMMU or of "
            "PCI access control (ACS), which the machine's administrator can turn off; with it, training is slower",
        ),
        Remedy(
            {"NCCL_SHM_DISABLE": "1"},
            "NCCL cannot use /dev/shm; with it, training is slower, and more room there is better",
        ),
    ),
}


class _Quiet:
    """A screen that shows nothing."""

    in_place = False

    def write(self, text: str) -> None:
        pass

    def publish(self, *_: Any, **__: Any) -> None:
        pass

    def panel(self, data: dict[str, Any]) -> None:
        pass

    def clear(self, *, wait: bool) -> None:
        pass

    def room(self) -> int:
        return 1 << 30


def count_gpus(client: Client, env: Mapping[str, str]) -> int | Finding:
    """Return how many GPUs a rank would see; or what is wrong with the launcher, which is to count them.

    Raises:
        KeyboardInterrupt: The user does not want to wait.
    """
    try:
        with InterruptGate() as gate:
            return client.count_gpus(env, gate, LAUNCHER_SECONDS)
    except TimeoutError:
        return Finding(
            "bad",
            "launcher",
            f"has not imported torch in {LAUNCHER_SECONDS:g} s; a run would wait for it",
            "In a terminal, python -X importtime -c 'import torch' shows what takes so long",
        )
    except NbddpError as error:
        return Finding("bad", "launcher", f"{error}")


def all_reduces(client: Client, env: Mapping[str, str], gpus: int) -> Iterator[Finding]:
    """Yield what comes of an all-reduce on each backend that is available: gloo, and nccl if there is a GPU.

    Args:
        client: The kernel's end of the launcher.
        env: The notebook's environment.
        gpus: How many GPUs a rank would see.

    Raises:
        KeyboardInterrupt: The user has stopped it; nothing runs any more.
    """
    yield _AllReduce(client, env, "gloo", Options(cpus=2)).find()
    if gpus:
        on_gpus = _AllReduce(client, env, "nccl", Options(gpus=min(2, gpus)))
        yield on_gpus.find()
        if gpus > 1:
            yield _peers(on_gpus.seen, gpus)


@dataclass
class _AllReduce:
    """An all-reduce on one backend.

    Attributes:
        seen: What rank 0 saw; empty if it failed.
    """

    client: Client
    env: Mapping[str, str]
    backend: str
    options: Options
    seen: Mapping[str, Any] = field(default_factory=dict)

    def find(self) -> Finding:
        """Run it; return what came of it."""
        ranks = self.options.gpus or self.options.cpus or 0
        place = "GPUs" if self.options.gpus else "the CPU"
        where = f"{self.backend}, {ranks} rank{'s' if ranks > 1 else ''} on {place}"
        began = time.monotonic()
        try:
            self.seen = self._perform({})
        except RunTimeout as error:
            at = _LINE.sub("at ", "; ".join(getattr(error, "__notes__", ())))
            said = f"not done at the deadline of {self._seconds():g} s; {at}"
        except LaunchError as error:
            # It says itself what to do.
            return Finding("bad", _SUBJECT, f"{where}: {error}")
        except NbddpError as error:
            said = _raised(error)
        else:
            if not (wrong := self.seen["wrong"]):
                version = f"NCCL {self.seen['nccl']}, " if self.seen["nccl"] else ""
                took = time.monotonic() - began
                return Finding("ok", _SUBJECT, f"{where}: {version}started, added up and ended in {took:.1f} s")
            said = f"a wrong sum in {wrong} of {1 << 20} elements, and gradients would be wrong, too"
        return Finding("bad", _SUBJECT, f"{where}: {said}", self._advice())

    def _perform(self, env: dict[str, str]) -> Mapping[str, Any]:
        """Run the cell, with this in its environment, and return what rank 0 saw.

        Raises:
            NbddpError: It failed, or the deadline passed.
            KeyboardInterrupt: The user has stopped it.
        """
        out = ("wrong", "nccl", "apart")
        job = _job.Job(
            cell=Cell(_CELL, filename="<nbddp doctor>", number=0),
            names={},
            namespace={},
            options=replace(self.options, env=env, out=out, timeout=self._seconds()),
            wanted=Wanted(out=out),
            colors="nocolor",
            grace=_GRACE_SECONDS,
            place="the check",
            own=True,
        )
        try:
            return _job.perform(job, self.client, _Quiet()).results
        except KeyboardInterrupt:
            # Where its ranks were is of no interest to who stops a check.
            raise KeyboardInterrupt from None

    def _seconds(self) -> float:
        """Return how long the ranks have.

        Raises:
            LaunchError: The user asks for a start method that there is not.
        """
        spawned = self.client.start_method({**os.environ, **self.options.env}) == "spawn"
        return DEADLINES[self.backend] + (_SPAWN_SECONDS if spawned else 0.0)

    def _advice(self) -> str:
        """Try what gets around the usual causes; return what to do."""
        # What nbddp itself sets where the user does not.
        as_it_is = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), _devices.LOOPBACK_INTERFACE)
        as_it_is |= self.env
        for remedy in _REMEDIES[self.backend]:
            if remedy.env.items() <= as_it_is.items():
                continue
            with contextlib.suppress(NbddpError):
                if not self._perform(dict(remedy.env))["wrong"]:
                    settings = " ".join(f"--env {name}={value}" for name, value in remedy.env.items())
                    return f"It works with {settings}: {remedy.meaning}"
        variable, whose = ("NCCL_DEBUG", "NCCL") if self.backend == "nccl" else ("TORCH_CPP_LOG_LEVEL", "torch")
        return f"Run a cell with --env {variable}=INFO --timeout 60; %ddp log then has {whose}'s own words"


def _raised(error: NbddpError) -> str:
    """Return what went wrong; what a rank has raised comes with that exception's own message alone."""
    text = f"{error}".rstrip(".")
    if isinstance(error, RankError) and error.exception is not None and error.exception not in text:
        return f"rank {error.rank} raised {error.exception}: {text}"
    return text


def _peers(seen: Mapping[str, Any], gpus: int) -> Finding:
    """Return which GPUs can reach each other's memory; asked by a rank, since the kernel must not touch them."""
    if not seen:
        return Finding("warn", "peer-to-peer", "not known, since the run on GPUs failed")
    if not (apart := seen["apart"]):
        return Finding("ok", "peer-to-peer", f"each of {gpus} GPUs can reach every other's memory")
    pairs = ", ".join(f"{a}-{b}" for a, b in apart[:6]) + (", …" if len(apart) > 6 else "")
    return Finding("ok", "peer-to-peer", f"not between {pairs}; NCCL goes through /dev/shm there, which is slower")
