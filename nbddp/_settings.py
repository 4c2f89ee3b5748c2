"""The environment variables that nbddp sets or reads, in one table, and others that it must treat specially."""

from __future__ import annotations

from collections.abc import Mapping

# Set by nbddp.

# In the launcher and in all that descends from it: which session it belongs to. What outlives even the launcher is
# found by this mark.
SESSION = "NBDDP_SESSION"
# In agent and ranks: the run directory; without it a script runs on its own, under plain torchrun.
RUN_DIR = "NBDDP_RUN_DIR"
# In the ranks: the secret by which the relay knows nbddp's own marks in a rank's output.
MARK = "NBDDP_MARK"
# In the ranks of several nodes: all that is kept of a rank is called by its number through all nodes, not by that on
# its own; and "1" or "0": whether it has a GPU, which is known only there.
BY_RANK = "NBDDP_BY_RANK"
GPUS = "NBDDP_GPUS"
# In the agents and ranks of several nodes: how often all of them have been started again, and may be: "1/3".
ATTEMPT = "NBDDP_ATTEMPT"

# Read by nbddp.

# "fork" (ranks are forked from the launcher, which has torch imported) or "spawn" (ranks are new interpreters, as
# under plain torchrun: slower to start). The default is fork where the platform allows it.
START_METHOD = "NBDDP_START_METHOD"

# Anything but "" and "0": output is plain, as with --plain.
PLAIN = "NBDDP_PLAIN"

# Read by OpenMP and BLAS libraries when they load. The launcher runs with one thread whatever these say, since a
# process that is to be forked must have no second one; each rank raises its own limit to what they say.
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS")

# Read while torch, NumPy and their libraries load: a rank forked from a process that loaded them under other values
# would silently ignore the new ones. A change to one of them takes a new launcher.
_READ_AT_LOAD = (
    "TORCH", "PYTORCH", "ATEN", "C10", "CUBLAS", "CUDNN", "OMP_", "GOMP_", "KMP_", "MKL", "DNNL", "ONEDNN",
    "OPENBLAS", "GOTO", "NPY_", "NUMPY", "LD_", "PYTHON", "TRITON", "MALLOC_", "LOGLEVEL",
)  # fmt: skip

# Of those, the ones that are read later than that, that a forked rank puts right itself, or that libraries set in the
# notebook's process on their own (torch at the first optimizer, scikit-learn and Lightning when they are imported).
_READ_LATER = (
    *THREAD_LIMITS, "TORCH_NCCL_", "TORCH_DISTRIBUTED_DEBUG", "TORCHELASTIC_", "TORCH_ELASTIC_", "TORCH_HOME",
    "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
)  # fmt: skip


def read_at_load(env: Mapping[str, str]) -> dict[str, str]:
    """Return the part of `env` that a launcher must have been started with for its forks to honour it."""
    return {k: v for k, v in env.items() if k.startswith(_READ_AT_LOAD) and not k.startswith(_READ_LATER)}


def rank_of(env: Mapping[str, str]) -> str | None:
    """Return the number of the rank that a process with this environment is, or descends from; None if it is none."""
    in_run = SESSION in env or "TORCHELASTIC_RUN_ID" in env
    return env.get("RANK", "?") if in_run else None


def number(env: Mapping[str, str]) -> int:
    """Return the number by which the files of the rank that has this environment are called."""
    return int(env["RANK" if BY_RANK in env else "LOCAL_RANK"])


def plain(env: Mapping[str, str]) -> bool:
    """Tell whether the user asks for plain output."""
    return env.get(PLAIN, "") not in ("", "0")


def start_method(env: Mapping[str, str]) -> str | None:
    """Return the start method that the user asks for, or None.

    Raises:
        ValueError: The variable holds another word.
    """
    value = env.get(START_METHOD)
    if value not in (None, "", "fork", "spawn"):
        raise ValueError(f"{START_METHOD}={value!r}: it can be 'fork' or 'spawn'")
    return value or None
