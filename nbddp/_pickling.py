"""Names and their values as bytes, and back: what travels between the notebook and the ranks, both ways.

::

    notebook's names ──Pickler──> Snapshot ──write──> file ──mmap──> load ──> a rank's globals
    a rank's results ──Pickler──> Snapshot ──write──> file ──mmap──> load ──> a dict in the notebook

The pickler is cloudpickle's with five additions:

- *One namespace.* Functions of the notebook keep sharing one ``globals()`` dictionary, the script's own, so that
  ``global counter`` works and a function sees a name that the cell rebinds.
- *Bound names.* A class or function met on the way that the notebook has under its own name gets that name in the rank
  too, or ``pickle``, ``torch.save`` and spawned workers there would not find it in ``__main__``.
- *Identity.* A class or function that came from the notebook goes back as a reference to the notebook's own, so that
  ``isinstance(model, Net)`` still holds of a model that comes back.
- *One variable.* Functions that share a variable of the function that defined them go on sharing it.
- *Buffers out of band.* Tensor storages, NumPy arrays and whatever else speaks pickle protocol 5 are not copied into
  the stream but written beside it, and mapped where they are read: one copy in memory for any number of ranks. The
  mapping is private, so a rank that writes gets a page of its own. (``torch.save`` does this for tensors alone, and
  the process that uses it must import torch.)
"""

from __future__ import annotations

import functools
import importlib
import pickle
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle

from nbddp import _arrays, _reducers, _tensors, _torch_objects
from nbddp._reducers import Reducer, loading
from nbddp._snapshot import Snapshot, Stream, map_file, unpickle
from nbddp._variables import Variables

# Buffers below this many bytes stay in the stream, and so become ordinary memory of their own when loaded; from a
# few pages on, mapping costs less than copying.
_IN_BAND = 1 << 16


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
        all_to: The device that every tensor is put on, wherever it was; None to leave them.
        reading: The name that is being loaded.
        held: What only weak references hold; it lives as long as this.
    """

    namespace: dict[str, Any]
    shared_globals: dict[str, Any]
    sender_has: Sequence[Any] | Mapping[int, Any] = ()
    received: dict[int, Any] = field(default_factory=dict)
    device: str = "cpu"
    all_to: str | None = None
    reading: str | None = None
    held: list[Any] = field(default_factory=list)


def load_file(path: str, target: Target) -> None:
    """Load the snapshot at `path` into `target`; large buffers stay in the file, mapped privately.

    The file may be deleted afterwards. Raises whatever unpickling raises; `Target.reading` is then the name at fault.
    """
    load(map_file(path), target)


def load(data: memoryview, target: Target, build: Callable[[memoryview], object] = unpickle) -> None:
    """Load a snapshot into `target`. `data` must be writable: arrays and tensors share its memory."""
    previous = getattr(loading, "target", None)
    loading.target = target
    try:
        build(data)
    finally:
        loading.target = previous
    target.reading = None


class _Names:
    """What is pickled: the names, and after each of them what it turned out to need."""

    def __init__(self, pickler: Pickler, names: Mapping[str, Any]) -> None:
        self._pickler = pickler
        self._names = names

    def __reduce__(self) -> tuple[Any, ...]:
        return _begin, (), None, None, self._items()

    def _items(self) -> Iterator[tuple[_Key | int | None, Any]]:
        """Yield what is to be stored; runs while the pickler works, which extends what is still to come."""
        for name, value in self._names.items():
            yield _Key(name, self._pickler.begin), value
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
            name = getattr(obj, "__qualname__", getattr(obj, "__name__", ""))
            if name not in self._names and pickler.namespace.get(name) is obj:
                yield _Key(name, _leave), obj
            done += 1


class _Key:
    """A name as it is pickled: loading it tells which one comes next, should that fail."""

    def __init__(self, name: str, begin: Callable[[str], object]) -> None:
        self._name = name
        self._begin = begin

    def __reduce__(self) -> tuple[Any, ...]:
        self._begin(self._name)
        return _reading, (self._name,)


def _reading(name: str) -> str:
    loading.target.reading = name
    return name


class Store:
    """Receives the items of a snapshot as it is loaded."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def __setitem__(self, key: str | int | None, value: Any) -> None:
        if isinstance(key, str):
            self._target.namespace[key] = value
        elif key is not None:
            self._target.received[key] = value


def _begin() -> Store:
    return Store(loading.target)


class _SharedGlobals:
    """Stands for the sender's namespace in the ``__globals__`` of a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _shared_globals, ()


def _shared_globals() -> dict[str, Any]:
    shared: dict[str, Any] = loading.target.shared_globals
    return shared


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is untyped
    """Makes a Snapshot of names. One use each.

    Args:
        namespace: The dictionary that is ``__main__`` here: the notebook's, or in a rank the script's.
        received: What the other side has, by its number there: goes by reference. In a rank, what came from the
            notebook (`Target.received`); in the notebook, what kept ranks have got before.
        held: Names that functions find where they go to: what the namespace has for them does not go along.
    """

    def __init__(
        self, namespace: dict[str, Any], received: Mapping[int, Any] | None = None, held: Collection[str] = ()
    ) -> None:
        self._stream = Stream()
        super().__init__(self._stream, protocol=5, buffer_callback=self._keep_in_band)
        self.namespace = namespace
        self.met: list[Any] = []
        self._received = {id(obj): key for key, obj in (received or {}).items()}
        self._held = frozenset(held)
        self._buffers: list[memoryview] = []
        self._variables = Variables()
        self._sources: set[str] = set()
        self._unwrapped: list[str] = []
        self._begun: list[tuple[str, int]] = []
        self._out_of_band = 0
        # cloudpickle pickles functions with the globals that this table has for theirs (undocumented; a test holds
        # it). It compares the entry with an empty dict, which an object of another type never equals.
        self.globals_ref[id(namespace)] = _SharedGlobals()
        self._reducers: dict[type, Reducer] = {
            **_reducers.plain(),
            types.CodeType: self._reduce_code,
            types.CellType: self._variables.reduce,
            functools._lru_cache_wrapper: self._reduce_cached_function,
            typing.NewType: self._reduce_new_type,
        }
        self._keep: list[Any] = []
        self._forget: Callable[[], None] = lambda: None
        self._families = [(types.ModuleType, _reduce_module), *_reducers.families(), *_torch_objects.families()]
        # Present but half imported, in another thread, is as good as absent: nothing can have made a tensor yet.
        torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
        if torch is not None and hasattr(torch, "UntypedStorage"):
            storages = _tensors.StorageReducers(torch)
            self._keep, self._forget = storages.keep, storages.forget
            self._families.append((torch.Tensor, _tensors.reduce_tensor))
            self._reducers.update(storages.table())
            wrapper = getattr(sys.modules.get("torch.nn.parallel"), "DistributedDataParallel", None)
            if wrapper is not None:
                self._families.append((wrapper, self._reduce_wrapper))
            if (module := getattr(sys.modules.get("torch.nn"), "Module", None)) is not None:
                # Last: wrappers and scripts are modules, too.
                self._families.append((module, _torch_objects.reduce_module))
        if numpy is not None and hasattr(numpy, "memmap"):
            arrays = _arrays.ArrayReducer(numpy)
            self._families.append((numpy.ndarray, lambda a: arrays(a) if arrays.handles(type(a)) else NotImplemented))

    def snapshot(self, names: Mapping[str, Any]) -> Snapshot:
        """Pickle the names.

        Raises:
            CannotSend: One of them holds what stays with its process.
            Exception: Whatever the objects' own methods raise, most often TypeError or PicklingError.
        """
        try:
            self.dump(_Names(self, names))
        finally:
            # It holds all that was pickled, and this object is part of a cycle: in a kept rank, or a notebook, what is
            # deleted would stay until the garbage collector comes.
            self.clear_memo()
            self._forget()
        ends = [at for _, at in self._begun[1:]] + [self._position()] * bool(self._begun)
        sizes = {name: end - at for (name, at), end in zip(self._begun, ends, strict=True)}
        return Snapshot(self._stream, self._buffers, self.met, self._sources, self._unwrapped, self._keep, sizes)

    def begin(self, name: str) -> None:
        """Take note of where a name's value begins."""
        self._begun.append((name, self._position()))

    def _position(self) -> int:
        return self._stream.nbytes + self._out_of_band

    def _keep_in_band(self, buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < _IN_BAND:
            return True
        self._buffers.append(view)
        self._out_of_band += view.nbytes
        return False

    def reducer_override(self, obj: Any) -> Any:
        """Reduce what cloudpickle would not, or would at a cost; called for all but the simplest built-in types."""
        kind = type(obj)
        if (reducer := self._reducers.get(kind)) is not None:
            return reducer(obj)
        if kind is types.FunctionType or issubclass(kind, type):
            return self._reduce_definition(obj)
        reducer = next((reduce for family, reduce in self._families if issubclass(kind, family)), None)
        # The next one of this type need not search.
        self._reducers[kind] = reducer or _leave
        return reducer(obj) if reducer is not None else NotImplemented

    def _reduce_definition(self, obj: Any) -> Any:
        """Reduce a function or a class."""
        kind = type(obj)
        key = self._received.get(id(obj))
        if key is not None:
            return _senders_own, (key,)
        again = _torch_objects.compiled_function(obj)
        if again is not None:
            return self._reduce_named(obj, again)
        if kind is type and (again := _torch_objects.parametrized_class(obj)) is not None:
            return again
        reduced = super().reducer_override(obj)
        # A tuple of two is a reference in disguise, such as that of NoneType; of six, the object by value.
        if reduced is not NotImplemented and len(reduced) > 2:
            self.met.append(obj)
            if self._held and kind is types.FunctionType and obj.__globals__ is self.namespace:
                reduced = self._without_held(reduced)
            if kind is types.FunctionType and obj.__closure__:
                reduced = self._variables.shared_by(obj, reduced)
            # Named tuples bring their own.
            if isinstance(obj, type) and "__slots__" in vars(obj) and not issubclass(obj, tuple):
                reduced = _with_slots(obj, reduced)
        return reduced

    def _without_held(self, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return how a function is made again without the global variables that it will find."""
        make, args, (state, slots), *rest = reduced
        found = {name: value for name, value in slots["__globals__"].items() if name not in self._held}
        return make, args, (state, {**slots, "__globals__": found}), *rest

    def _reduce_cached_function(self, function: Any) -> Any:
        parameters = function.cache_parameters()
        again = _make_cached_function, (function.__wrapped__, parameters["maxsize"], parameters["typed"])
        return self._reduce_named(function, again)

    def _reduce_new_type(self, kind: Any) -> Any:
        return self._reduce_named(kind, (_make_new_type, (kind.__name__, kind.__supertype__, kind.__module__)))

    def _reduce_named(self, obj: Any, again: tuple[Any, ...]) -> Any:
        """Reduce by value, if it is the notebook's, what pickles itself as a name in its module."""
        found = cloudpickle.cloudpickle._lookup_module_and_qualname(obj)
        if found is not None and not cloudpickle.cloudpickle._is_registered_pickle_by_value(found[0]):
            return NotImplemented
        key = self._received.get(id(obj))
        if key is not None:
            return _senders_own, (key,)
        self.met.append(obj)
        return again

    def _reduce_wrapper(self, wrapper: Any) -> Any:
        self._unwrapped.append(type(wrapper).__name__)
        return _reducers.identity, (wrapper.module,)

    def _reduce_code(self, code: types.CodeType) -> Any:
        # The file name is what tracebacks, inspect.getsource, torch.jit and Triton find the source by; a cloudpickle
        # later than 3.1.2 drops it.
        self._sources.add(code.co_filename)
        make, args = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
        return _make_code, (make, args, code.co_filename)


def goes_by_name(obj: Any) -> bool:
    """Tell whether a module, function or class is imported where it goes to, not sent."""
    definition = isinstance(obj, types.ModuleType | types.FunctionType | type)
    return definition and bool(cloudpickle.cloudpickle._should_pickle_by_reference(obj))


def _reduce_module(module: types.ModuleType) -> Any:
    """Reduce also what stands in a module's place, as torch.backends.cudnn does; cloudpickle knows plain ones only."""
    return (importlib.import_module, (module.__name__,)) if goes_by_name(module) else NotImplemented


def _leave(_: Any) -> Any:
    return NotImplemented


def _with_slots(kind: type, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """Have the class made with its slots; cloudpickle only sets their names afterwards, which makes none."""
    make, (metaclass, name, bases, namespace, *rest), *others = reduced
    if make is not cloudpickle.cloudpickle._make_skeleton_class:
        return reduced
    slots = kind.__dict__["__slots__"]
    return make, (metaclass, name, bases, {**namespace, "__slots__": slots}, *rest), *others


def _make_new_type(name: str, supertype: Any, module: str) -> Any:
    make: Any = typing.NewType  # a type checker wants a literal name
    kind = make(name, supertype)
    kind.__module__ = module
    return kind


def _make_cached_function(function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(function)


def _senders_own(key: int) -> Any:
    return loading.target.sender_has[key]


def _make_code(make: Callable[..., types.CodeType], args: tuple[Any, ...], filename: str) -> types.CodeType:
    code = make(*args)
    return code if code.co_filename == filename else code.replace(co_filename=filename)
