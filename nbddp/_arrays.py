"""How NumPy arrays go: of any layout, as buffers beside the pickle stream, and memory-mapped ones as their file."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any

from nbddp._reducers import identity

if TYPE_CHECKING:
    import numpy as np

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
