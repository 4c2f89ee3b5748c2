"""How much memory ranks use: of their GPUs, if NVIDIA's library for that is there, else of their processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nbddp._paths import format_size
from nbddp._rank_state import RankState

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Meter:
    """Reads the memory of the ranks of a run.

    Args:
        gpus: For each rank its GPU, as CUDA_VISIBLE_DEVICES has them: numbers or UUIDs; empty if they have none.
    """

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        self._gpus = gpus
        self._nvml: Any = None
        if gpus:
            # nvidia-ml-py: nice to have, and not to be asked of everyone.
            with contextlib.suppress(Exception):
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml

    def read(self, pids: Mapping[int, int]) -> dict[int, str]:
        """Return for each rank, of which the process is given, what is to be said of its memory."""
        return {rank: text for rank, pid in pids.items() if (text := self._of_gpu(rank) or _of_process(pid))}

    def _of_gpu(self, rank: int) -> str:
        if self._nvml is None or rank >= len(self._gpus):
            return ""
        try:
            name = self._gpus[rank]
            if name.isdigit():
                handle = self._nvml.nvmlDeviceGetHandleByIndex(int(name))
            else:
                handle = self._nvml.nvmlDeviceGetHandleByUUID(name)
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        except Exception:  # a GPU that has fallen off the bus, a driver that does not say
            return ""
        text = f"{format_size(memory.used)} of {format_size(memory.total)}"
        with contextlib.suppress(Exception):  # not of a part of a GPU
            text += f", GPU {self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu} %"
        return text


def of_ranks(meter: Meter, states: Mapping[int, RankState]) -> dict[int, str]:
    """Return for each rank what is to be said of its memory; of one on another machine, what its node says."""
    here = {rank: state.pid for rank, state in states.items() if state.node is None}
    there = {rank: state.memory for rank, state in states.items() if state.node is not None}
    return meter.read(here) | there


def _of_process(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return format_size(int(file.read().split()[1]) * _PAGE)
    except (OSError, ValueError, IndexError):  # it has ended; or not Linux
        return ""
