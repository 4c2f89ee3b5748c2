"""The next step for what goes wrong most often: a sentence for each, found by what torch and Python say."""

from __future__ import annotations

import re
import sys

_NO_MODULE = re.compile(r"No module named '([^'.]+)")

# Of exception's type and message, and what to do. Tried in this order.
_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"Expected all tensors to be on the same device|is not on the expected device",
        "In a rank, `device` is the rank's own: make tensors there (device=device), and move the model and each batch "
        "with .to(device)",
    ),
    (
        r"Expected to have finished reduction in the prior iteration",
        "Parameters got no gradient in the last step, so the ranks waited for them: DDP(model, "
        "find_unused_parameters=True) looks for such parameters, or leave them out of the model",
    ),
    (
        r"shared memory segment|insufficient shared memory|out of shared memory|unable to (open|allocate|resize|mmap) "
        r"shared memory|No space left on device.*/dev/shm|/dev/shm.*No space left on device",
        "/dev/shm is full or too small. In a container give it more (docker run --shm-size=8g, or --ipc=host); or use "
        "fewer DataLoader workers, or --env NCCL_SHM_DISABLE=1. %ddp doctor shows what there is",
    ),
    (
        r"^Dist\w*Error: .*(Address already in use|EADDRINUSE)",
        "Something listens on that port already. nbddp gives every run a free one: init_process_group() without "
        "address and port, or with init_method='env://', uses it",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError.*CUDA|CUBLAS_STATUS_ALLOC_FAILED",
        "%ddp doctor shows which processes hold the GPUs' memory, this notebook's own first. `del` what the notebook "
        "has on a GPU and call torch.cuda.empty_cache(), or use a smaller batch",
    ),
    (
        r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|^MemoryError",
        "Less data per rank, a smaller batch or fewer ranks would need less memory",
    ),
    (
        r"An attempt has been made to start a new process before",
        "A module that starts processes is imported anew in each of them: what it runs belongs under "
        "if __name__ == '__main__'. The cell itself needs no such line",
    ),
    (
        r"Cannot re-initialize CUDA in forked subprocess",
        "A forked process, such as a DataLoader worker, cannot use CUDA: return CPU tensors from the dataset and move "
        "the batch in the loop, or use multiprocessing_context='spawn'",
    ),
    (
        r"Default process group has not been initialized",
        "With --no-init the cell calls torch.distributed.init_process_group() itself, before anything else that is "
        "distributed",
    ),
    (
        r"Unknown backend type|Unknown c10d backend|doesn't have (NCCL|MPI|Gloo|XCCL|UCC) built in",
        "This build of torch does not have that backend; without --backend, nbddp takes nccl on GPUs and gloo on the "
        "CPU",
    ),
    (
        r"Duplicate GPU detected",
        "Two ranks use one GPU, which NCCL does not do: in a rank, use `device`, not a number of your own",
    ),
    (
        r"DataLoader worker \(pid.*\) (is killed|exited unexpectedly)",
        "A worker process of a DataLoader died. With num_workers=0 its error appears here",
    ),
    (
        r"^(RuntimeError|Dist\w*Error): .*(Timed out waiting|Timed out after|Watchdog caught collective operation|"
        r"Socket Timeout|wait timeout after)",
        "A rank did not come to a collective that others waited in: an uneven number of batches, or a condition on "
        "`rank` around one. An interrupt, or %ddp stacks, shows where each rank is",
    ),
    (
        r"preamble\.length|op\.nbytes|Detected mismatch between collectives|collective mismatch",
        "The ranks were in different collectives, or gave tensors of different sizes to one: every rank must call the "
        "same ones, in the same order, as often",
    ),
)

_PATTERNS = [(re.compile(pattern, re.DOTALL), advice) for pattern, advice in _ADVICE]


def on_exception(kind: str, message: str) -> str | None:
    """Return what to do about an exception of a rank; None if nothing is known of it.

    Args:
        kind: The name of its type.
        message: Its message.
    """
    text = f"{kind}: {message}"
    return next((advice for pattern, advice in _PATTERNS if pattern.search(text)), None)


def on_end_elsewhere(*, finished: bool) -> str:
    """Return the advice for ranks that lost those of another machine.

    Args:
        finished: Whether some of this machine's have ended without an error, so that these may be the ones.
    """
    here = ", or ranks of this one that finished, " if finished else " "
    return (
        f"The ranks of another machine{here}ended first, and this rank was still to exchange something with them. What "
        "they raised is shown where they were launched"
    )


def on_early_end(finished: str) -> str:
    """Return what to do when a rank waited for others that had come to the end of the cell."""
    return (
        f"It waited for {finished}, which had finished: every rank must call the same collectives, as often. If "
        "the ranks have different numbers of batches: DistributedSampler, drop_last=True, or a "
        "torch.distributed.algorithms.Join around the loop"
    )


def on_module_missing(kind: str, message: str) -> str:
    """Return where a module is to be on a node that does not find it; nothing for other exceptions.

    Args:
        kind: The exception's type.
        message: Its message.
    """
    found = _NO_MODULE.match(message)
    if kind != "ModuleNotFoundError" or found is None:
        return ""
    module = sys.modules.get(found[1])
    file = getattr(module, "__file__", None)
    here = f"The notebook has it from {file}. " if file else ""
    return f"{here}Modules do not travel: install it on every node, or put it into a folder that all see under one path"
