"""Whatever nested structure is sent, what arrives is the same: values, types, and what is the same object as what."""

from __future__ import annotations

import cmath
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from nbddp._pickling import Pickler, Target, load

# Large enough to lie out of band, small enough for many examples.
SIZE = 20_000

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(), st.binary(max_size=40)
)
arrays = st.one_of(
    npst.arrays(npst.scalar_dtypes(), npst.array_shapes(max_dims=3, max_side=4)),
    st.sampled_from(["f8", "i2", "M8[s]", ">u4", "?", [("a", "i4"), ("b", "f4")]]).map(
        lambda dtype: np.zeros(SIZE, dtype)
    ),
    st.tuples(st.integers(1, 3), st.sampled_from([1, -1, 2])).map(
        lambda p: np.asfortranarray(np.arange(SIZE * p[0]).reshape(p[0], -1))[:, :: p[1]]
    ),
)
tensors = st.one_of(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]).map(lambda d: torch.zeros(3, dtype=d)),
    st.integers(0, 3).map(lambda n: torch.arange(SIZE * 2.0).reshape(2, -1)[:, n::2]),
    st.just(torch.zeros(0)),
)
leaves = st.one_of(scalars, arrays, tensors)


@st.composite
def graphs(draw: st.DrawFn) -> list[Any]:
    """Draw nodes of which later ones hold earlier ones, some in several places, and lists that hold themselves."""
    nodes: list[Any] = draw(st.lists(leaves, min_size=1, max_size=5))
    for _ in range(draw(st.integers(0, 6))):
        parts = draw(st.lists(st.sampled_from(range(len(nodes))), max_size=4))
        held = [nodes[i] for i in parts]
        kind = draw(st.sampled_from(["list", "tuple", "dict", "cycle"]))
        if kind == "dict":
            nodes.append({draw(st.text(max_size=3)): part for part in held})
        else:
            nodes.append(tuple(held) if kind == "tuple" else held)
            if kind == "cycle":
                nodes[-1].append(nodes[-1])
    return nodes


def same(a: Any, b: Any, seen: dict[int, int]) -> bool:
    """Tell whether two structures are equal, and the same objects are the same in both."""
    if id(a) in seen:
        return isinstance(a, ATOMS) or seen[id(a)] == id(b)
    if type(a) is not type(b):
        return False
    seen[id(a)] = id(b)
    match a:
        case list() | tuple():
            return len(a) == len(b) and all(same(x, y, seen) for x, y in zip(a, b, strict=True))
        case dict():
            return list(a) == list(b) and all(same(a[key], b[key], seen) for key in a)
        case np.ndarray():
            # NumPy itself makes the byte order of small arrays of dates this machine's.
            native = a.dtype.newbyteorder("=")
            equal = native == b.dtype.newbyteorder("=") and a.shape == b.shape
            return equal and a.astype(native).tobytes() == b.astype(native).tobytes()
        case torch.Tensor():
            return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
        case float() | complex():
            return a == b or (cmath.isnan(a) and repr(a) == repr(b))
    return bool(a == b)


# Of these Python and NumPy keep one object for several values, or several for one, as they please.
ATOMS = (int, float, complex, str, bytes, bool, type(None), tuple)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_what_arrives_is_what_was_sent(nodes: list[Any]) -> None:
    names = {f"n{i}": node for i, node in enumerate(nodes)}
    snapshot = Pickler(names).snapshot(names)
    data = bytearray(b"".join(bytes(chunk) for chunk in snapshot.chunks()))
    assert len(data) == snapshot.nbytes
    received: dict[str, Any] = {}
    load(memoryview(data), Target(received, received))
    assert received.keys() == names.keys()
    assert same(nodes, list(received.values()), {})


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=6))
def test_views_of_one_storage_stay_views_of_one_storage(spans: list[tuple[int, int]]) -> None:
    base = torch.zeros(100)
    names: dict[str, Any] = {f"v{i}": base[start : start + size] for i, (start, size) in enumerate(spans)}
    received: dict[str, Any] = {}
    snapshot = Pickler(names).snapshot(names)
    load(memoryview(bytearray(b"".join(bytes(c) for c in snapshot.chunks()))), Target(received, received))
    for i, name in enumerate(names, 1):
        received[name] += i
        names[name] += i
    assert all(torch.equal(received[name], names[name]) for name in names)
