"""How types go that pickle does not know, copies, or takes for names: tensors' memory, arrays, caches, devices.

Each reducer returns what ``__reduce__`` would, or NotImplemented to leave an object to cloudpickle, or raises
`CannotSend`. What builds the objects again stands beside it. Large memory goes as `pickle.PickleBuffer`, which the
pickler keeps out of its stream.
"""

from __future__ import annotations

import ctypes
import functools
import io
import os
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Reducer = Callable[[Any], Any]

# What objects are rebuilt for; see `nbddp._pickling.load`. The functions named in a pickle stream take no context.
loading = threading.local()


class CannotSend(TypeError):  # noqa: N818  # said to the pickler, which passes it on
    """An object cannot go to another process.

    Attributes:
        obj: The object.
        advice: What to do instead.
    """

    def __init__(self, obj: Any, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.obj = obj
        self.advice = advice


# Files, generators and other things that stay with their process.


def _refuser(reason: str, advice: str) -> Reducer:
    def refuse(obj: Any) -> Any:
        raise CannotSend(obj, reason, advice)

    return refuse


_OPEN_FILE = _refuser("an open file stays with its process", "Open it inside the cell")
_GENERATOR = _refuser("what a generator has yet to do cannot be copied", "Make it inside the cell, or send a list")


def _reduce_text_file(file: Any) -> Any:
    for name in ("stdin", "stdout", "stderr"):
        if file is getattr(sys, name):
            return getattr, (sys, name)
    # What else stands for a stream: a notebook's own, or a StringIO under redirect_stdout.
    return _OPEN_FILE(file) if isinstance(file, io.TextIOWrapper) else NotImplemented


def _reduce_cached_property(cached: Any) -> Any:
    # Before Python 3.12 it holds a lock.
    return _make_cached_property, (cached.func, cached.attrname)


def _make_cached_property(function: Callable[..., Any], name: str | None) -> Any:
    cached = functools.cached_property(function)
    cached.attrname = name
    return cached


def _reduce_weak_reference(reference: Any) -> Any:
    if reference.__callback__ is not None:
        raise CannotSend(reference, "what a weak reference calls is this process's", "Make it inside the cell")
    return _make_weak, (weakref.ref, reference())


class _Gone:
    """What a dead weak reference points to, for a moment."""


def _make_weak(kind: Callable[[Any], Any], content: Any) -> Any:
    if content is None:
        return weakref.ref(_Gone())
    # Nothing else need have come along that holds it.
    loading.target.held.append(content)
    return kind(content)


def plain() -> dict[type, Reducer]:
    """Return the reducers for types of Python's own."""
    return {
        functools.cached_property: _reduce_cached_property,
        # By themselves these are refused for the references that they are made of.
        weakref.ref: _reduce_weak_reference,
        weakref.WeakKeyDictionary: lambda weak: (_make_weak, (weakref.WeakKeyDictionary, dict(weak))),
        weakref.WeakValueDictionary: lambda weak: (_make_weak, (weakref.WeakValueDictionary, dict(weak))),
        weakref.WeakSet: lambda weak: (_make_weak, (weakref.WeakSet, list(weak))),
        types.MappingProxyType: lambda proxy: (types.MappingProxyType, (dict(proxy),)),
        type(sys.stdout): _reduce_text_file,
        io.TextIOWrapper: _reduce_text_file,
        io.BufferedReader: _OPEN_FILE,
        io.BufferedWriter: _OPEN_FILE,
        io.BufferedRandom: _OPEN_FILE,
        io.FileIO: _OPEN_FILE,
        types.GeneratorType: _GENERATOR,
        types.AsyncGeneratorType: _GENERATOR,
        types.CoroutineType: _refuser("a coroutine that was begun cannot be copied", "Call it inside the cell"),
    }


# NumPy.

# Arrays below this many bytes are left to NumPy; `nbddp._pickling` keeps small buffers in the stream anyway.
_SMALL_ARRAY = 1 << 14


class ArrayReducer:
    """Reduces NumPy arrays of any layout and any type without Python objects in it, without a copy where there can be.

    By itself NumPy copies arrays into the stream that are strided, memory-mapped, or of a type such as datetime64.
    """

    def __init__(self, np: Any) -> None:
        self._np = np

    def handles(self, kind: type) -> bool:
        """Tell whether arrays of this type are rebuilt by a view; others may have ways of their own."""
        return kind in (self._np.ndarray, self._np.memmap, self._np.matrix, self._np.recarray)

    def __call__(self, array: Any) -> Any:
        """Return what builds the array again."""
        np = self._np
        kind = type(array)
        if kind is np.memmap:
            kept = self._reduce_memmap(array)
            if kept is not None:
                return kept
            kind = np.ndarray
        if array.nbytes < _SMALL_ARRAY or array.dtype.hasobject:
            return NotImplemented if kind is type(array) else (identity, (np.array(array),))
        flat = np.asarray(array)
        order = "F" if flat.flags.f_contiguous and not flat.flags.c_contiguous else "C"
        flat = flat.T if order == "F" else np.ascontiguousarray(flat)
        buffer = pickle.PickleBuffer(flat.reshape(-1).view(np.uint8))
        writeable = bool(array.flags.writeable) or type(array) is not kind
        return _make_array, (buffer, kind, array.shape, array.dtype, order, writeable)

    def _reduce_memmap(self, array: Any) -> Any:
        """Have the other process map the same part of the same file, if it is certain which that is."""
        np = self._np
        mapped, path = getattr(array, "_mmap", None), getattr(array, "filename", None)
        if mapped is None or not isinstance(path, str | os.PathLike) or array.mode not in ("r", "r+", "w+"):
            return None  # "c": what was written to it is only here
        base = np.frombuffer(mapped, np.uint8).ctypes.data
        if array.size == 0 or not _is_mapped_from(base, os.fspath(path)):
            return None
        low, high = np.lib.array_utils.byte_bounds(array) if hasattr(np.lib, "array_utils") else np.byte_bounds(array)
        begin = array.offset - array.offset % _granularity() + (low - base)
        mode = "r" if array.mode == "r" or not array.flags.writeable else "r+"
        first = array.__array_interface__["data"][0] - low
        return _make_memmap, (
            os.path.abspath(path),
            mode,
            begin,
            high - low,
            first,
            array.shape,
            array.dtype,
            array.strides,
        )


def _granularity() -> int:
    import mmap

    return mmap.ALLOCATIONGRANULARITY


def _is_mapped_from(address: int, path: str) -> bool:
    """Tell whether the memory at `address` is the file that is now at `path`, not one that was there before."""
    try:
        inode = os.stat(path).st_ino
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                span, _, _, _, mapped, *_ = line.split()
                if span.startswith(f"{address:x}-") or span.startswith(f"{address:08x}-"):
                    return int(mapped) == inode
    except OSError:  # deleted; or not Linux
        pass
    return False


def _make_array(
    buffer: Any, kind: type, shape: tuple[int, ...], dtype: np.dtype[Any], order: Any, writeable: bool
) -> Any:
    import numpy as np

    array = np.ndarray(shape, dtype, buffer, order=order)
    if kind is not np.ndarray:
        array = array.view(kind)
    array.flags.writeable = writeable and array.flags.writeable
    return array


def _make_memmap(
    path: str,
    mode: Any,
    begin: int,
    size: int,
    first: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    strides: tuple[int, ...],
) -> Any:
    import numpy as np

    mapped = np.memmap(path, np.uint8, mode, offset=begin, shape=(size,))
    array: Any = np.ndarray(shape, dtype, mapped, offset=first, strides=strides).view(np.memmap)
    for name in ("_mmap", "filename", "mode", "offset"):
        setattr(array, name, getattr(mapped, name))
    return array


# torch.


class StorageReducers:
    """Reducers for the memory of tensors, for devices, and for what torch cannot pickle itself.

    Tensors themselves are torch's to reduce: to their storage, and how they lie in it.
    """

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


# Of subclasses, too: the thread, the iterator, the script.


def families() -> list[tuple[type, Reducer]]:
    """Return reducers for types and all their subclasses, as far as their modules are imported."""
    found = []
    for module, name, reducer in (
        ("threading", "Thread", _refuser("a thread runs in its process", "Start it inside the cell")),
        ("multiprocessing.process", "BaseProcess", _refuser("a process is its parent's", "Start it inside the cell")),
        ("torch.utils.data.dataloader", "_BaseDataLoaderIter", _LOADER_ITERATOR),
        ("torch.utils.data.dataloader", "DataLoader", _reduce_loader),
        ("torch.jit", "ScriptModule", _reduce_script),
        ("torch.jit", "ScriptFunction", _reduce_script),
        ("torch._C._distributed_c10d", "ProcessGroup", _PROCESS_GROUP),
        ("torch.cuda", "CUDAGraph", _CUDA_CONTEXT),
        ("torch.cuda", "Stream", _CUDA_CONTEXT),
        ("torch.cuda", "Event", _CUDA_CONTEXT),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type):
            found.append((kind, reducer))
    return found


_LOADER_ITERATOR = _refuser(
    "an iterator over a DataLoader has workers and a position of its own",
    "Send the DataLoader, and call iter() inside the cell",
)


def _reduce_loader(loader: Any) -> Any:
    if vars(loader).get("_iterator") is None:
        return NotImplemented
    # With persistent workers it keeps its iterator; elsewhere it makes a new one when it is asked.
    make, args, state, *rest = loader.__reduce_ex__(5)
    return make, args, {**state, "_iterator": None}, *rest


_PROCESS_GROUP = _refuser(
    "a process group is a set of connections between processes",
    "Ranks have one already; make others inside the cell, with torch.distributed.new_group()",
)
_CUDA_CONTEXT = _refuser("it belongs to this process's work on its GPU", "Make it inside the cell")


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


def identity(obj: Any) -> Any:
    """Return `obj`: what a reducer names whose object goes as another."""
    return obj
