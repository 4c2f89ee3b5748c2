"""Names and their values as bytes, and back: what travels between the notebook and the ranks, both ways.

::

    notebook's names ──Pickler──> Snapshot ──write──> file ──mmap──> load ──> a rank's globals
    rank 0's results ──Pickler──> Snapshot ──write──> file ──mmap──> load ──> a dict in the notebook

The pickler is cloudpickle's with four additions:

- *One namespace.* Functions of the notebook keep sharing one ``globals()`` dictionary, the script's own, so that
  ``global counter`` works and a function sees a name that the cell rebinds.
- *Bound names.* A class or function met on the way that the notebook has under its own name gets that name in the rank
  too, or ``pickle``, ``torch.save`` and spawned workers there would not find it in ``__main__``.
- *Identity.* A class or function that came from the notebook goes back as a reference to the notebook's own, so that
  ``isinstance(model, Net)`` still holds of a model that comes back.
- *Buffers out of band.* Tensor storages, NumPy arrays and whatever else speaks pickle protocol 5 are not copied into
  the stream but written beside it, and mapped where they are read: one copy in memory for any number of ranks. The
  mapping is private, so a rank that writes gets a page of its own. (``torch.save`` does this for tensors alone, and
  the process that uses it must import torch.)
"""

from __future__ import annotations

import ctypes
import functools
import io
import mmap
import os
import pickle
import struct
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle

# Buffers below this many bytes stay in the stream, and so become ordinary memory of their own when loaded; from a
# few pages on, mapping costs less than copying.
_IN_BAND = 1 << 16

# A cache line: what vectorised kernels like their data aligned to.
_ALIGN = 64

_MAGIC = b"nbddp\x00\x00\x01"
_HEAD = struct.Struct("<8sQQ")  # magic, bytes of the stream, number of buffers
_SPAN = struct.Struct("<QQ")  # offset and size of a buffer

_WRITE_AT_ONCE = 64 << 20  # between two writes an interrupt gets its chance


@dataclass
class Snapshot:
    """A pickle stream and the buffers that belong to it.

    Attributes:
        stream: The pickle.
        buffers: Out-of-band buffers in the order of the stream; they still share memory with the objects.
        met: Classes and functions that went by value, in the order in which they were met.
        sources: File names of the code objects that went by value.
        unwrapped: Types of wrappers, such as DDP, whose ``.module`` went in their place.
        keep: What must not be freed while `buffers` are read.
    """

    stream: bytes
    buffers: list[memoryview]
    met: list[Any]
    sources: set[str]
    unwrapped: list[str]
    keep: list[Any]

    @property
    def nbytes(self) -> int:
        """The size of the file that `write` makes."""
        spans = self._spans()
        return spans[-1][0] + spans[-1][1] if spans else self._head_size() + len(self.stream)

    def _head_size(self) -> int:
        return _HEAD.size + _SPAN.size * len(self.buffers)

    def _spans(self) -> list[tuple[int, int]]:
        spans = []
        end = self._head_size() + len(self.stream)
        for buffer in self.buffers:
            start = -(-end // _ALIGN) * _ALIGN
            end = start + buffer.nbytes
            spans.append((start, buffer.nbytes))
        return spans

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the file's content piece by piece."""
        spans = self._spans()
        yield _HEAD.pack(_MAGIC, len(self.stream), len(spans)) + b"".join(_SPAN.pack(*span) for span in spans)
        yield self.stream
        end = self._head_size() + len(self.stream)
        for (start, size), buffer in zip(spans, self.buffers, strict=True):
            yield bytes(start - end)
            yield buffer
            end = start + size

    def write(self, path: str) -> None:
        """Write a new file that only its owner can read.

        Raises:
            OSError: It could not be written whole; what was written is gone again.
        """
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for chunk in self.chunks():
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[os.write(fd, view[:_WRITE_AT_ONCE]) :]
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)


def load_file(path: str, target: Target) -> None:
    """Load the snapshot at `path` into `target`; large buffers stay in the file, mapped privately.

    The file may be deleted afterwards. Raises whatever unpickling raises.
    """
    with open(path, "rb") as file:
        # NORESERVE: eight ranks that map the same 100 GB will not write to all of it.
        flags = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)
        mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    load(memoryview(mapped), target)


def load(data: memoryview, target: Target) -> None:
    """Load a snapshot into `target`. `data` must be writable: arrays and tensors share its memory."""
    magic, size, count = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("this is no nbddp snapshot, or one of another version")
    start = _HEAD.size + _SPAN.size * count
    spans = [_SPAN.unpack_from(data, _HEAD.size + _SPAN.size * i) for i in range(count)]
    previous = getattr(_loading, "target", None)
    _loading.target = target
    try:
        pickle.loads(data[start : start + size], buffers=[data[at : at + length] for at, length in spans])
    finally:
        _loading.target = previous


@dataclass
class Target:
    """Where a snapshot is loaded to, and what a loaded reference is looked up in.

    Attributes:
        namespace: The dictionary that receives the names.
        shared_globals: What functions that shared the sender's namespace share here; the same dictionary in a rank.
            The notebook gives an empty one: a function that comes back must not rebind notebook variables.
        sender_has: In the notebook: the objects of the snapshot it sent (`Snapshot.met`).
        received: In a rank, after loading: what `sender_has` will be when results go back.
        device: What ``torch.device("cuda:K")`` and CUDA tensors become: this process's own device, as a string.
    """

    namespace: dict[str, Any]
    shared_globals: dict[str, Any]
    sender_has: Sequence[Any] = ()
    received: dict[int, Any] = field(default_factory=dict)
    device: str = "cpu"


# The target of the load that this thread is in: the functions named in a pickle stream take no context.
_loading = threading.local()


class _Names:
    """What is pickled: the names, and after each of them what it turned out to need."""

    def __init__(self, pickler: Pickler, names: Mapping[str, Any]) -> None:
        self._pickler = pickler
        self._names = names

    def __reduce__(self) -> tuple[Any, ...]:
        return _begin, (), None, None, self._items()

    def _items(self) -> Iterator[tuple[str | int | None, Any]]:
        """Yield what is to be stored; runs while the pickler works, which extends what is still to come."""
        yield from self._names.items()
        pickler = self._pickler
        done = 0
        while True:
            if done == len(pickler.met):
                # Pickle fetches an item ahead of the one that it saves at the start of a batch. The empty ones make
                # sure that what a last item adds is not missed.
                yield None, None
                yield None, None
                if done == len(pickler.met):
                    return
            obj = pickler.met[done]
            yield done, obj
            name = getattr(obj, "__qualname__", "")
            if name not in self._names and pickler.namespace.get(name) is obj:
                yield name, obj
            done += 1


class _Store:
    """Receives the items of a snapshot as it is loaded."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __setitem__(self, key: str | int | None, value: Any) -> None:
        if isinstance(key, str):
            self._target.namespace[key] = value
        elif key is not None:
            self._target.received[key] = value


def _begin() -> _Store:
    return _Store(_loading.target)


class _SharedGlobals:
    """Stands for the sender's namespace in the ``__globals__`` of a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _shared_globals, ()


def _shared_globals() -> dict[str, Any]:
    shared: dict[str, Any] = _loading.target.shared_globals
    return shared


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is untyped
    """Makes a Snapshot of names. One use each.

    Args:
        namespace: The dictionary that is ``__main__`` here: the notebook's, or in a rank the script's.
        received: In a rank: what came from the notebook (`Target.received`), to go back by reference.
    """

    def __init__(self, namespace: dict[str, Any], received: Mapping[int, Any] | None = None) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, protocol=5, buffer_callback=self._keep_in_band)
        self.namespace = namespace
        self.met: list[Any] = []
        self._received = {id(obj): key for key, obj in (received or {}).items()}
        self._buffers: list[memoryview] = []
        self._sources: set[str] = set()
        self._unwrapped: list[str] = []
        self._keep: list[Any] = []
        # cloudpickle pickles functions with the globals that this table has for theirs (undocumented; a test holds
        # it). It compares the entry with an empty dict, which an object of another type never equals.
        self.globals_ref[id(namespace)] = _SharedGlobals()
        self._reducers: dict[type, Callable[[Any], Any]] = {
            types.CodeType: self._reduce_code,
            functools._lru_cache_wrapper: self._reduce_cached_function,
            functools.cached_property: _reduce_cached_property,
            typing.NewType: self._reduce_new_type,
        }
        self._wrapper: type | None = None
        torch = sys.modules.get("torch")
        # Present but half imported, in another thread, is as good as absent: nothing can have made a tensor yet.
        if torch is not None and hasattr(torch, "UntypedStorage"):
            self._storages: dict[int, _Storage] = {}
            self._reducers[_Storage] = self._reduce_storage
            self._reducers[torch.storage.TypedStorage] = self._reduce_typed_storage
            self._reducers[torch.UntypedStorage] = self._reduce_untyped_storage
            self._reducers[torch.device] = self._reduce_device
            parallel = sys.modules.get("torch.nn.parallel")
            self._wrapper = getattr(parallel, "DistributedDataParallel", None)

    def snapshot(self, names: Mapping[str, Any]) -> Snapshot:
        """Pickle the names.

        Raises:
            Exception: Whatever the objects' own methods raise, most often TypeError or PicklingError.
        """
        self.dump(_Names(self, names))
        return Snapshot(self._file.getvalue(), self._buffers, self.met, self._sources, self._unwrapped, self._keep)

    def _keep_in_band(self, buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _IN_BAND:
            return True
        self._buffers.append(view)
        return False

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what cloudpickle would not, or would at a cost; called for all but the simplest built-in types."""
        kind = type(obj)
        reducer = self._reducers.get(kind)
        if reducer is not None:
            return reducer(obj)
        if kind is types.FunctionType or issubclass(kind, type):
            key = self._received.get(id(obj))
            if key is not None:
                return _senders_own, (key,)
            reduced = super().reducer_override(obj)
            # A tuple of two is a reference in disguise, such as that of NoneType; of six, the object by value.
            if reduced is not NotImplemented and len(reduced) > 2:
                self.met.append(obj)
                if "__slots__" in getattr(obj, "__dict__", ()) and kind is not types.FunctionType:
                    reduced = _with_slots(obj, reduced)
            return reduced
        if self._wrapper is not None and issubclass(kind, self._wrapper):
            self._unwrapped.append(kind.__name__)
            return _identity, (obj.module,)
        return NotImplemented

    def _reduce_cached_function(self, function: Any) -> Any:
        # By itself it is pickled as a name in its module.
        if not self._by_value(function):
            return NotImplemented
        if (key := self._received.get(id(function))) is not None:
            return _senders_own, (key,)
        self.met.append(function)
        parameters = function.cache_parameters()
        return _make_cached_function, (function.__wrapped__, parameters["maxsize"], parameters["typed"])

    def _reduce_new_type(self, kind: Any) -> Any:
        if not self._by_value(kind):
            return NotImplemented
        if (key := self._received.get(id(kind))) is not None:
            return _senders_own, (key,)
        self.met.append(kind)
        return typing.NewType, (kind.__name__, kind.__supertype__)

    def _by_value(self, obj: Any) -> bool:
        """Tell whether an object with a name and a module is the notebook's, as cloudpickle tells it of functions."""
        found = cloudpickle.cloudpickle._lookup_module_and_qualname(obj)
        return found is None or bool(cloudpickle.cloudpickle._is_registered_pickle_by_value(found[0]))

    def _reduce_code(self, code: types.CodeType) -> Any:
        # The file name is what tracebacks, inspect.getsource, torch.jit and Triton find the source by; a cloudpickle
        # later than 3.1.2 drops it.
        self._sources.add(code.co_filename)
        make, args = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
        return _make_code, (make, args, code.co_filename)

    def _reduce_typed_storage(self, storage: Any) -> Any:
        return _make_typed_storage, (self._the_storage(storage._untyped_storage), storage.dtype)

    def _reduce_untyped_storage(self, storage: Any) -> Any:
        # Tensors of dtypes that have no storage class of their own are pickled with this, and rebuilt from what
        # torch.load makes of it: bytes, typed.
        return _make_typed_storage, (self._the_storage(storage), sys.modules["torch"].uint8)

    def _the_storage(self, untyped: Any) -> _Storage:
        """Return one and the same object for one and the same memory, so that the pickler's memo knows it again."""
        return self._storages.setdefault(untyped._cdata, _Storage(untyped))

    def _reduce_storage(self, storage: _Storage) -> Any:
        untyped = storage.untyped
        kind = untyped.device.type
        if untyped.nbytes() == 0:
            return _make_storage, (None, kind)
        on_cpu = untyped if kind == "cpu" else untyped.cpu()
        self._keep.append(on_cpu)
        return _make_storage, (pickle.PickleBuffer(_view(on_cpu)), kind)

    def _reduce_device(self, device: Any) -> Any:
        return _make_device, (device.type, device.index)


class _Storage:
    """Stands for the memory of tensors in a pickle stream."""

    def __init__(self, untyped: Any) -> None:
        self.untyped = untyped


def _view(storage: Any) -> Any:
    """Return the memory of a CPU storage; it is the caller's to keep the storage alive as long as the view."""
    # No memoryview: where one exports its buffer to another in a reference cycle, the garbage collector may clear them
    # in an order in which CPython crashes.
    return (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())


def _with_slots(kind: type, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """Have the class made with its slots; cloudpickle only sets their names afterwards, which makes none."""
    make, (metaclass, name, bases, namespace, *rest), *others = reduced
    if make is not cloudpickle.cloudpickle._make_skeleton_class:
        return reduced
    slots = kind.__dict__["__slots__"]
    return make, (metaclass, name, bases, {**namespace, "__slots__": slots}, *rest), *others


def _reduce_cached_property(cached: Any) -> Any:
    # Before Python 3.12 it holds a lock.
    return _make_cached_property, (cached.func, cached.attrname)


def _make_cached_property(function: Callable[..., Any], name: str | None) -> Any:
    cached = functools.cached_property(function)
    cached.attrname = name
    return cached


def _make_cached_function(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _identity(obj: Any) -> Any:
    return obj


def _senders_own(key: int) -> Any:
    return _loading.target.sender_has[key]


def _make_code(make: Callable[..., types.CodeType], args: tuple[Any, ...], filename: str) -> types.CodeType:
    code = make(*args)
    return code if code.co_filename == filename else code.replace(co_filename=filename)


def _make_storage(buffer: Any, kind: str) -> Any:
    import torch

    if buffer is None:
        storage = torch.UntypedStorage(0)
    else:
        storage = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    device = _loading.target.device
    return storage if kind == "cpu" or device == "cpu" else storage.to(device=torch.device(device))


def _make_typed_storage(untyped: Any, dtype: Any) -> Any:
    import torch

    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)


def _make_device(kind: str, index: int | None) -> Any:
    import torch

    own = _loading.target.device
    if kind == "cuda" and (index is not None or own == "cpu"):
        return torch.device(own)
    return torch.device(kind) if index is None else torch.device(kind, index)
