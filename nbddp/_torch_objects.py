"""How objects of torch go that it cannot pickle itself, or of which it leaves a part behind."""

from __future__ import annotations

import copyreg
import io
import sys
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
        ("torch.distributed.tensor", "DTensor", _SHARDED_TENSOR),
        ("torch.distributed.fsdp", "FSDPModule", _SHARDED_MODULE),
        ("torch.distributed.fsdp", "FullyShardedDataParallel", _SHARDED_MODULE),
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


def _reduce_optimizer(optimizer: Any) -> Any:
    kind = type(optimizer)
    if not _is_pickled_by_torch(kind):
        return NotImplemented
    # torch's own leaves out hooks, what a subclass or a user has added, and that a scheduler counts its steps.
    make, args, _, *_ = optimizer.__reduce_ex__(5)
    return make, args, (optimizer_state(optimizer), _is_counted(optimizer)), None, None, _set_optimizer_state


def _is_pickled_by_torch(kind: Any) -> bool:
    import torch

    torchs: Any = torch.optim.Optimizer
    own = next(base for base in kind.__mro__ if "__setstate__" in vars(base))
    return (
        kind.__getstate__ is torchs.__getstate__
        and own.__module__.partition(".")[0] == "torch"
        and kind.__reduce__ is torchs.__reduce__
        and kind.__reduce_ex__ is torchs.__reduce_ex__
    )


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return the attributes of an optimizer that go with it."""
    left = {"_zero_grad_profile_name"} | ({"step"} if _is_counted(optimizer) else set())
    attributes = {name: value for name, value in vars(optimizer).items() if name not in left}
    return {**attributes, **optimizer.__getstate__()}


def _is_counted(optimizer: Any) -> bool:
    """Tell whether a learning-rate scheduler has put its wrapper around the class's own ``step``."""
    step = vars(optimizer).get("step")
    # Its own, or the one that stands for it here.
    of_the_class = getattr(step, "__wrapped__", None) is type(optimizer).step or hasattr(step, "_counts")
    return hasattr(step, "_wrapped_by_lr_sched") and of_the_class


def _set_optimizer_state(optimizer: Any, state: tuple[dict[str, Any], bool]) -> None:
    attributes, counted = state
    optimizer.__setstate__(attributes)
    if counted:
        _count_steps(optimizer)


def _count_steps(optimizer: Any) -> None:
    """Wrap `optimizer.step` as a learning-rate scheduler does, which warns when it does not find its wrapper."""
    reference = weakref.ref(optimizer)

    def step(*args: Any, **kwargs: Any) -> Any:
        own: Any = reference()
        own._opt_called = True
        # Looked up only now: while the optimizer is loaded, its class may still be without its methods.
        return type(own).step(own, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    step._counts = True  # type: ignore[attr-defined]
    optimizer.step = step


# A parametrized module has a class of its own, which refuses to be pickled: its __getstate__ raises, and its properties
# compute the parametrized tensors.

_PARAMETRIZE = "torch.nn.utils.parametrize"


def _is_parametrized_class(kind: type) -> bool:
    return getattr(vars(kind).get("__getstate__"), "__module__", None) == _PARAMETRIZE


def parametrized_class(kind: type) -> Any:
    """Return what makes the class of a parametrized module again; None for any other class."""
    if not _is_parametrized_class(kind):
        return None
    import torch.nn.utils.parametrize as own

    if not (hasattr(own, "_inject_new_class") and hasattr(own, "_inject_property")):
        return None
    properties = [name for name, value in vars(kind).items() if isinstance(value, property)]
    names = tuple(name for name in properties if vars(kind)[name].fget.__module__ == _PARAMETRIZE)
    return _make_parametrized_class, (kind.__base__, names)


def _make_parametrized_class(kind: Any, names: tuple[str, ...]) -> type:
    import torch
    from torch.nn.utils import parametrize

    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return type(module)


def reduce_module(module: Any) -> Any:
    """Reduce a parametrized module; any other is left to pickle."""
    kind = type(module)
    if not _is_parametrized_class(kind):
        return NotImplemented
    base: Any = kind.__base__
    if base.__reduce__ is not object.__reduce__ or base.__reduce_ex__ is not object.__reduce_ex__:
        return NotImplemented
    return copyreg.__newobj__, (kind,), module_state(module)  # type: ignore[attr-defined]


def module_state(module: Any) -> Any:
    """Return what a parametrized module consists of, as the class under it has it pickled."""
    base: Any = type(module).__base__
    return base.__getstate__(module)


def state_of(obj: Any) -> Any:
    """Return the state that goes for an object of torch's whose own ``__getstate__`` does not tell; None for others."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "optim"):
        return None
    if isinstance(obj, torch.nn.Module) and _is_parametrized_class(type(obj)):
        return module_state(obj)
    if isinstance(obj, torch.optim.Optimizer) and _is_pickled_by_torch(type(obj)):
        return optimizer_state(obj)
    return None


_PROCESS_GROUP = refuser(
    "a process group is a set of connections between processes",
    "Ranks have one already; make others inside {place}, with torch.distributed.new_group()",
)
# By itself a DTensor goes with this rank's shard, as if that were all of it.
_SHARDED_TENSOR = refuser(
    "each rank has only its shard of it. Its full_tensor(), called on every rank, is the whole tensor",
    "Make it inside {place}",
)
_SHARDED_MODULE = refuser(
    "each rank has only its shards of the parameters. get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True, cpu_offload=True)) of torch.distributed.checkpoint.state_dict, called on every rank, "
    "gives rank 0 a dictionary of whole tensors",
    "Shard it inside {place}",
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
