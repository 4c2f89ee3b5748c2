"""How objects of torch go that it cannot pickle itself, or of which it leaves a part behind."""

from __future__ import annotations

import io
import types
from collections.abc import Callable
from typing import Any

from nbddp._reducers import Reducer, families_of, loading, refuser


def families() -> list[tuple[type, Reducer]]:
    """Return the reducers for types of torch and all their subclasses, as far as their modules are imported."""
    return families_of(
        ("torch.utils.data.dataloader", "_BaseDataLoaderIter", _LOADER_ITERATOR),
        ("torch.utils.data.dataloader", "DataLoader", _reduce_loader),
        ("torch.jit", "ScriptModule", _reduce_script),
        ("torch.jit", "ScriptFunction", _reduce_script),
        ("torch._C._distributed_c10d", "ProcessGroup", _PROCESS_GROUP),
        ("torch.cuda", "CUDAGraph", _CUDA_CONTEXT),
        ("torch.cuda", "Stream", _CUDA_CONTEXT),
        ("torch.cuda", "Event", _CUDA_CONTEXT),
    )


_LOADER_ITERATOR = refuser(
    "an iterator over a DataLoader has workers and a position of its own",
    "Send the DataLoader, and call iter() inside the cell",
)


def _reduce_loader(loader: Any) -> Any:
    if vars(loader).get("_iterator") is None:
        return NotImplemented
    # With persistent workers it keeps its iterator; elsewhere it makes a new one when it is asked.
    make, args, state, *rest = loader.__reduce_ex__(5)
    return make, args, {**state, "_iterator": None}, *rest


_PROCESS_GROUP = refuser(
    "a process group is a set of connections between processes",
    "Ranks have one already; make others inside the cell, with torch.distributed.new_group()",
)
_CUDA_CONTEXT = refuser("it belongs to this process's work on its GPU", "Make it inside the cell")


def compiled_function(function: Any) -> Any:
    """Return what makes a function of ``torch.compile`` again, from its original; None for any other."""
    original = getattr(function, "_torchdynamo_orig_callable", None)
    if original is None or not isinstance(function, types.FunctionType):
        return None
    names = function.__code__.co_freevars
    cells = dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    # The context knows backend, mode and options, and makes the function when called.
    context = cells.get("self")
    return (_call, (context, original)) if callable(context) else None


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _reduce_script(module: Any) -> Any:
    import torch

    content = io.BytesIO()
    torch.jit.save(module, content)
    tensors = [*module.parameters(), *module.buffers()] if isinstance(module, torch.nn.Module) else []
    return _make_script, (content.getvalue(), any(tensor.device.type != "cpu" for tensor in tensors))


def _make_script(content: bytes, on_device: bool) -> Any:
    import torch

    target = loading.target
    return torch.jit.load(io.BytesIO(content), map_location=target.all_to or (target.device if on_device else "cpu"))
