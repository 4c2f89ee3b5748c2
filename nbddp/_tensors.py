"""How the memory of tensors goes, and the devices that it is on.

Tensors themselves are torch's to reduce: to their storage, and how they lie in it.
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Mapping
from typing import Any

from nbddp._reducers import Reducer, loading


class StorageReducers:
    """Reducers for the memory of tensors, for devices, and for small types that torch cannot pickle itself."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._known: dict[int, _Storage] = {}
        # What must live as long as its buffers are read.
        self.keep: list[Any] = []

    def table(self) -> Mapping[type, Reducer]:
        """Return the reducers by type."""
        torch = self._torch
        return {
            _Storage: self._reduce_storage,
            torch.storage.TypedStorage: self._reduce_typed,
            torch.UntypedStorage: self._reduce_untyped,
            torch.device: _reduce_device,
            # By itself it goes as a name, of which pickle does not know the module.
            torch.memory_format: lambda kind: (_torchs, (str(kind).removeprefix("torch."),)),
            torch.finfo: _reduce_type_info,
            torch.iinfo: _reduce_type_info,
        }

    def forget(self) -> None:
        """Let go of the memory that is known, once all is pickled; what `keep` holds stays."""
        self._known.clear()

    def _reduce_typed(self, storage: Any) -> Any:
        return _make_typed_storage, (self._one(storage._untyped_storage), storage.dtype)

    def _reduce_untyped(self, storage: Any) -> Any:
        # Tensors of dtypes that have no storage class of their own are pickled with this, and rebuilt from what
        # torch.load makes of it: bytes, typed.
        return _make_typed_storage, (self._one(storage), self._torch.uint8)

    def _one(self, untyped: Any) -> _Storage:
        """Return one and the same object for one and the same memory, so that the pickler's memo knows it again."""
        return self._known.setdefault(untyped._cdata, _Storage(untyped))

    def _reduce_storage(self, storage: _Storage) -> Any:
        untyped = storage.untyped
        kind = untyped.device.type
        if untyped.nbytes() == 0:
            return _make_storage, (None, kind)
        on_cpu = untyped if kind == "cpu" else untyped.cpu()
        self.keep.append(on_cpu)
        return _make_storage, (pickle.PickleBuffer(_view(on_cpu)), kind)


class _Storage:
    """Stands for the memory of tensors in a pickle stream."""

    def __init__(self, untyped: Any) -> None:
        self.untyped = untyped


def _view(storage: Any) -> Any:
    """Return the memory of a CPU storage; it is the caller's to keep the storage alive as long as the view."""
    # No memoryview: where one exports its buffer to another in a reference cycle, the garbage collector may clear them
    # in an order in which CPython crashes.
    return (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())


def _make_storage(buffer: Any, kind: str) -> Any:
    import torch

    if buffer is None:
        storage = torch.UntypedStorage(0)
    else:
        storage = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    target = loading.target
    if target.all_to is not None:
        return _moved(storage, target.all_to)
    return storage if kind == "cpu" or target.device == "cpu" else _moved(storage, target.device)


def _moved(storage: Any, device: str) -> Any:
    import torch

    if device == "meta":
        return torch.UntypedStorage(storage.nbytes(), device="meta")
    return storage.to(device=torch.device(device))


def _make_typed_storage(untyped: Any, dtype: Any) -> Any:
    import torch

    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _reduce_device(device: Any) -> Any:
    return _make_device, (device.type, device.index)


def _make_device(kind: str, index: int | None) -> Any:
    import torch

    own = loading.target.device
    if kind == "cuda" and (index is not None or own == "cpu"):
        return torch.device(own)
    return torch.device(kind) if index is None else torch.device(kind, index)


def reduce_tensor(tensor: Any) -> Any:
    """Reduce a tensor with its gradient, which torch leaves behind."""
    if not tensor.is_leaf or tensor.grad is None:
        return NotImplemented
    reduced = tensor.__reduce_ex__(5)
    if len(reduced) > 2:
        return NotImplemented  # it has a state of its own kind
    return *reduced, tensor.grad, None, None, _set_gradient


def _set_gradient(tensor: Any, gradient: Any) -> None:
    tensor.grad = gradient


def _torchs(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _reduce_type_info(info: Any) -> Any:
    return _make_type_info, (type(info).__name__, info.dtype)


def _make_type_info(kind: str, dtype: str) -> Any:
    import torch

    return getattr(torch, kind)(getattr(torch, dtype))
