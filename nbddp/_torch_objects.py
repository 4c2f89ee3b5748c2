"""How objects of torch go that it cannot pickle itself, or of which it leaves a part behind."""

from __future__ import annotations

import functools
import io
import types
import weakref
from collections.abc import Callable
from typing import Any

from nbddp._reducers import Reducer, families_of, loading, refuser


def families() -> list[tuple[type, Reducer]]:
    """Return the reducers for types of torch and all their subclasses, as far as their modules are imported."""
    return families_of(
        ("torch.utils.data.dataloader", "_BaseDataLoaderIter", _LOADER_ITERATOR),
        ("torch.utils.data.dataloader", "DataLoader", _reduce_loader),
        ("torch.optim.optimizer", "Optimizer", _reduce_optimizer),
        ("torch.jit", "ScriptModule", _reduce_script),
        ("torch.jit", "ScriptFunction", _reduce_script),
        ("torch._C._distributed_c10d", "ProcessGroup", _PROCESS_GROUP),
        ("torch.cuda", "CUDAGraph", _CUDA_CONTEXT),
        ("torch.cuda", "Stream", _CUDA_CONTEXT),
        ("torch.cuda", "Event", _CUDA_CONTEXT),
    )


_LOADER_ITERATOR = refuser(
    "an iterator over a DataLoader has workers and a position of its own",
    "Send the DataLoader, and call iter() inside {place}",
)


def _reduce_loader(loader: Any) -> Any:
    if vars(loader).get("_iterator") is None:
        return NotImplemented
    # With persistent workers it keeps its iterator; elsewhere it makes a new one when it is asked.
    make, args, state, *rest = loader.__reduce_ex__(5)
    return make, args, {**state, "_iterator": None}, *rest


# What an optimizer makes for itself; `step` is there when a learning-rate scheduler has wrapped it.
_OPTIMIZERS_OWN = ("step", "_zero_grad_profile_name")


def _reduce_optimizer(optimizer: Any) -> Any:
    import torch

    torchs: Any = torch.optim.Optimizer.__getstate__
    if type(optimizer).__getstate__ is not torchs:
        return NotImplemented
    # torch's own leaves out hooks, what a subclass has added, and that a scheduler counts its steps.
    make, args, state, *_ = optimizer.__reduce_ex__(5)
    attributes = {name: value for name, value in vars(optimizer).items() if name not in _OPTIMIZERS_OWN}
    counted = hasattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched")
    return make, args, ({**attributes, **state}, counted), None, None, _set_optimizer_state


def _set_optimizer_state(optimizer: Any, state: tuple[dict[str, Any], bool]) -> None:
    attributes, counted = state
    optimizer.__setstate__(attributes)
    if counted:
        _count_steps(optimizer)


def _count_steps(optimizer: Any) -> None:
    """Wrap `optimizer.step` as a learning-rate scheduler does, which warns when it does not find its wrapper."""
    step = type(optimizer).step
    reference = weakref.ref(optimizer)

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        own: Any = reference()
        own._opt_called = True
        return step(own, *args, **kwargs)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = counted


def parametrized_module(module: Any) -> Any:
    """Return what makes a module of ``torch.nn.utils.parametrize`` again, which refuses to be pickled itself.

    It has a class of its own, with a property for each parametrized tensor. NotImplemented for any other module.
    """
    if "parametrizations" not in vars(module).get("_modules", ()):
        return NotImplemented
    from torch.nn.utils import parametrize

    kind = type(module)
    if not parametrize.is_parametrized(module) or not _makes_classes(parametrize):
        return NotImplemented
    return _make_parametrized, (kind.__base__, tuple(module.parametrizations)), vars(module)


def _makes_classes(parametrize: Any) -> bool:
    return hasattr(parametrize, "_inject_new_class") and hasattr(parametrize, "_inject_property")


def _make_parametrized(kind: Any, names: tuple[str, ...]) -> Any:
    import torch
    from torch.nn.utils import parametrize

    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


_PROCESS_GROUP = refuser(
    "a process group is a set of connections between processes",
    "Ranks have one already; make others inside {place}, with torch.distributed.new_group()",
)
_CUDA_CONTEXT = refuser("it belongs to this process's work on its GPU", "Make it inside {place}")


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
