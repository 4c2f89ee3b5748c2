"""What the driver says of the GPUs: their memory, and who holds it.

The kernel itself must not initialise CUDA, so the driver's own tool is asked, in a process that can be ended: a driver
in trouble answers late or never. NVIDIA's library, in this process, is the second choice.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbddp._findings import Finding
from nbddp._paths import format_size

# A driver that is not kept loaded (no persistence mode) takes some seconds to wake.
_DRIVER_SECONDS = 10.0

_GPU_FIELDS = "index,uuid,name,driver_version,memory.total,memory.free"
_HOLDER_FIELDS = "gpu_uuid,pid,process_name,used_memory"
_MIB = 1 << 20

# Less than this part of a GPU's memory free, and a run may not find what it needs.
_FREE_PART = 0.5


@dataclass
class Holder:
    """A process that has memory of a GPU; `used` in bytes, or None if the driver does not say."""

    pid: int
    command: str
    used: int | None


@dataclass
class Gpu:
    """A GPU, numbered as the driver does; sizes in bytes, or None if the driver does not say (of a part of a GPU)."""

    index: str
    uuid: str
    name: str
    driver: str
    total: int | None
    free: int | None
    holders: list[Holder] = field(default_factory=list)


def look() -> list[Gpu] | None:
    """Return the machine's GPUs; None if there is nothing that could be asked.

    Raises:
        TimeoutError: The driver does not answer.
        OSError: The driver is in trouble; the message is its own.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return _through_library()
    try:
        return parsed(
            *(_ask(tool, f"--query-{what}") for what in (f"gpu={_GPU_FIELDS}", f"compute-apps={_HOLDER_FIELDS}"))
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError from None


def _ask(tool: str, query: str) -> str:
    answer = subprocess.run(
        [tool, query, "--format=csv,noheader,nounits"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_DRIVER_SECONDS,
        check=False,
    )
    if answer.returncode:
        raise OSError(" ".join((answer.stdout + answer.stderr).split()) or f"status {answer.returncode}")
    return answer.stdout


def parsed(gpus: str, holders: str) -> list[Gpu]:
    """Return what nvidia-smi's answers say: lines of values with commas between them, memory in MiB."""
    found = []
    for row in csv.reader(gpus.splitlines(), skipinitialspace=True):
        index, uuid, name, driver, total, free = row
        found.append(Gpu(index, uuid, name, driver, _bytes(total), _bytes(free)))
    by_uuid = {gpu.uuid: gpu for gpu in found}
    for uuid, pid, command, used in csv.reader(holders.splitlines(), skipinitialspace=True):
        if uuid in by_uuid and pid.isdigit():
            by_uuid[uuid].holders.append(Holder(int(pid), command, _bytes(used)))
    return found


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) * _MIB if mebibytes.isdigit() else None  # "[N/A]"


def _through_library() -> list[Gpu] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver
        return None
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            uuid, name = _text(pynvml.nvmlDeviceGetUUID(handle)), _text(pynvml.nvmlDeviceGetName(handle))
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            holders = [Holder(process.pid, "", process.usedGpuMemory) for process in processes]
            found.append(Gpu(str(index), uuid, name, driver, memory.total, memory.free, holders))
    except pynvml.NVMLError as error:
        raise OSError(str(error)) from error
    finally:
        pynvml.nvmlShutdown()
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def findings(gpus: Iterable[Gpu], visible: str | None) -> list[Finding]:
    """Return a line for each GPU.

    Args:
        gpus: What `look` returned.
        visible: CUDA_VISIBLE_DEVICES, which says which of them ranks may use; None if it is not set.
    """
    return [_finding(gpu) for gpu in gpus if visible is None or _is_visible(gpu, visible)]


def _is_visible(gpu: Gpu, visible: str) -> bool:
    names = [name.strip() for name in visible.split(",") if name.strip()]
    # CUDA takes a UUID by its beginning. The parts of a GPU have UUIDs of their own, which are not in the list.
    return any(name == gpu.index or gpu.uuid.startswith(name) or name.startswith("MIG-") for name in names)


def _finding(gpu: Gpu) -> Finding:
    subject = f"GPU {gpu.index}"
    if gpu.total is None or gpu.free is None:
        return Finding("ok", subject, f"{gpu.name}; the driver does not say how much of its memory is free")
    text = f"{gpu.name}, {format_size(gpu.free)} free of {format_size(gpu.total)}"
    own = [holder for holder in gpu.holders if holder.pid == os.getpid()]
    others = [holder for holder in gpu.holders if holder.pid != os.getpid()]
    if held := [f"this notebook's kernel{_size(holder)}" for holder in own] + [_named(holder) for holder in others]:
        text += f"; held by {', '.join(held)}"
    if gpu.free >= gpu.total * _FREE_PART:
        return Finding("ok", subject, text)
    if own:
        return Finding(
            "warn", subject, text, "In the notebook: del its names, then torch.cuda.empty_cache(); or restart it"
        )
    return Finding("warn", subject, text, "End what is not needed, or choose others with --gpu-ids")


def _size(holder: Holder) -> str:
    return "" if holder.used is None else f" ({format_size(holder.used)})"


def _named(holder: Holder) -> str:
    """Return a process as a person would look for it."""
    try:
        with open(f"/proc/{holder.pid}/cmdline", "rb") as file:
            words = file.read().decode("utf-8", "replace").split("\0")
        command = " ".join([os.path.basename(words[0]), *words[1:4]]).strip()
    except OSError:
        # The driver counts processes as the machine does; a container has numbers of its own.
        command = os.path.basename(holder.command) if not holder.command.startswith("[") else ""
        command = command or "a process that cannot be seen from here"
    return f"{command[:50]} (pid {holder.pid}{_size(holder).replace(' (', ', ').rstrip(')')})"


def hidden(env: Mapping[str, str]) -> str:
    """Return what of the environment decides which GPUs a process sees, as text; empty if nothing does."""
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    return ", ".join(f"{name}={env[name]}" for name in names if name in env)
