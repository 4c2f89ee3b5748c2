"""Pickling and capture: what arrives is what was sent, and what cannot go is named."""

from __future__ import annotations

import functools
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbddp._closure import capture, describe
from nbddp._errors import CaptureError
from nbddp._pickling import Pickler, Target, load, load_file
from nbddp._snapshot import Snapshot


def send(names: dict[str, Any], namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send names through bytes into a new namespace, as to a rank."""
    received: dict[str, Any] = {"__name__": "__main__"}
    load(
        memoryview(bytearray(content(Pickler(names if namespace is None else namespace).snapshot(names)))),
        Target(received, received),
    )
    return received


def content(snapshot: Snapshot) -> bytes:
    return b"".join(snapshot.chunks())


def run(source: str) -> dict[str, Any]:
    """Run source as a notebook would: in a namespace that is __main__."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "<cell>", "exec"), namespace)
    return namespace


def test_identity_holds_across_names() -> None:
    weight = torch.nn.Parameter(torch.arange(4.0))
    shared = [1]
    got = send(
        {"w": weight, "opt": torch.optim.SGD([weight], lr=1.0), "view": weight.detach()[1:3], "a": shared, "b": shared}
    )
    assert got["opt"].param_groups[0]["params"][0] is got["w"]
    assert got["a"] is got["b"]
    got["view"].fill_(7)
    assert got["w"].tolist() == [0.0, 7.0, 7.0, 3.0]


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.arange(12).reshape(3, 4).t(),
    "strided": lambda: torch.arange(12)[::2],
    "expanded": lambda: torch.zeros(1).expand(1000, 1000),
    "bfloat16": lambda: torch.tensor(3.5, dtype=torch.bfloat16),
    "float8": lambda: torch.ones(2, dtype=torch.float8_e4m3fn),
    "empty": lambda: torch.empty(0, 3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "conjugate": lambda: torch.ones(2, 2, dtype=torch.complex64).conj(),
    "requires grad": lambda: torch.ones(3, requires_grad=True),
    "large": lambda: torch.ones(300_000),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(5, device="meta"),
    "bool": lambda: torch.tensor([True, False]),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize", "ignore:.*TypedStorage")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors(kind: str) -> None:
    tensor = TENSORS[kind]()
    got = send({"t": tensor})["t"]
    assert got.dtype == tensor.dtype
    assert got.shape == tensor.shape
    assert got.layout == tensor.layout
    assert got.requires_grad == tensor.requires_grad
    assert got.device == tensor.device
    if tensor.device.type != "meta":
        if tensor.layout == torch.strided:
            assert got.stride() == tensor.stride()
        dense = [t.dequantize() if t.is_quantized else t.to_dense() for t in (got, tensor)]
        assert torch.equal(dense[0].to(torch.complex64), dense[1].to(torch.complex64))


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_arrays_are_writable_and_right(size: int) -> None:
    array = np.arange(size)
    got = send({"x": array})["x"]
    assert np.array_equal(got, array)
    got[0] = 5
    assert array[0] == 0


def test_read_only_arrays_stay_so() -> None:
    array = np.arange(100_000)
    array.flags.writeable = False
    assert not send({"x": array})["x"].flags.writeable


def test_an_expanded_tensor_costs_its_storage() -> None:
    assert Pickler({}).snapshot({"x": torch.zeros(1).expand(10_000, 10_000)}).nbytes < 2000


def test_large_buffers_are_not_in_the_stream() -> None:
    snapshot = Pickler({}).snapshot({"t": torch.zeros(1 << 18), "a": np.zeros(1 << 18), "again": None})
    assert snapshot.stream.nbytes < 2000
    assert [b.nbytes for b in snapshot.buffers] == [4 << 18, 8 << 18]


def test_a_file_is_mapped_privately(tmp_path: Path) -> None:
    path = str(tmp_path / "closure")
    snapshot = Pickler({}).snapshot({"t": torch.zeros(1 << 18), "a": np.zeros(1 << 18)})
    snapshot.write(path)
    assert os.path.getsize(path) == snapshot.nbytes
    assert os.stat(path).st_mode & 0o777 == 0o600
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    load_file(path, Target(first, first))
    load_file(path, Target(second, second))
    before = Path(path).read_bytes()
    os.unlink(path)
    first["t"].fill_(1)
    first["a"][:] = 1
    assert second["t"].sum() == 0
    assert second["a"].sum() == 0
    assert before == content(snapshot)


def test_functions_share_one_namespace() -> None:
    namespace = run(
        "counter = 0\ndef bump():\n    global counter\n    counter += 1\n    return other()\n"
        "def other(): return counter"
    )
    received: dict[str, Any] = {"__name__": "__main__"}
    load(
        memoryview(bytearray(content(Pickler(namespace).snapshot({"bump": namespace["bump"]})))),
        Target(received, received),
    )
    assert received["bump"].__globals__ is received
    assert received["bump"]() == 1
    received["other"] = lambda: "rebound"
    assert received["bump"]() == "rebound"
    assert namespace["counter"] == 0


def test_what_is_met_on_the_way_gets_its_name() -> None:
    namespace = run(
        "class Base: pass\nclass Net(Base): pass\ndef helper(): return Net\nnet = Net()\nalias = Net\nunused = 1"
    )
    received: dict[str, Any] = {"__name__": "__main__"}
    load(
        memoryview(bytearray(content(Pickler(namespace).snapshot({"net": namespace["net"]})))),
        Target(received, received),
    )
    assert {"net", "Net", "Base"} <= set(received)
    assert type(received["net"]) is received["Net"]
    assert "unused" not in received


@pytest.mark.parametrize("count", [1, 2, 998, 999, 1000, 1001, 2500])
def test_the_work_list_is_complete_whatever_the_batch(count: int) -> None:
    # pickle stores items in batches of 1000 and looks one ahead.
    namespace = run("\n".join(f"class C{i}: pass\nx{i} = C{i}()" for i in range(count)))
    received: dict[str, Any] = {"__name__": "__main__"}
    names = {f"x{i}": namespace[f"x{i}"] for i in range(count)}
    load(memoryview(bytearray(content(Pickler(namespace).snapshot(names)))), Target(received, received))
    assert {f"C{i}" for i in range(count)} <= set(received)


def test_classes_go_back_as_references() -> None:
    namespace = run("class Net:\n    def size(self): return 1\ndef make(): return Net()\nnet = Net()")
    sent = Pickler(namespace).snapshot({"net": namespace["net"], "make": namespace["make"]})
    rank: dict[str, Any] = {"__name__": "__main__"}
    target = Target(rank, rank)
    load(memoryview(bytearray(content(sent))), target)
    exec("class Own:\n    pass\nresult = (make(), Own(), make)", rank)
    back = Pickler(rank, target.received).snapshot({"result": rank["result"]})
    home: dict[str, Any] = {}
    load(memoryview(bytearray(content(back))), Target(home, {"__name__": "__main__"}, sender_has=sent.met))
    assert type(home["result"][0]) is namespace["Net"]
    assert home["result"][2] is namespace["make"]
    assert type(home["result"][1]).__name__ == "Own"
    assert list(home) == ["result", "Own"]


def test_a_function_that_comes_back_rebinds_nothing_in_the_notebook() -> None:
    rank = run("x = 'the rank\\'s'\ndef f(): return x")
    back = Pickler(rank, {}).snapshot({"f": rank["f"]})
    notebook: dict[str, Any] = {"x": "the notebook's"}
    results: dict[str, Any] = {}
    load(memoryview(bytearray(content(back))), Target(results, {"__name__": "__main__"}))
    assert results["f"]() == "the rank's"
    assert notebook == {"x": "the notebook's"}


def test_devices_become_the_ranks_own() -> None:
    names = {
        "cuda1": torch.device("cuda:1"),
        "cuda": torch.device("cuda"),
        "cpu": torch.device("cpu"),
        "meta": torch.device("meta"),
    }
    data = content(Pickler({}).snapshot(names))
    for own, cuda1, cuda in (("cpu", "cpu", "cpu"), ("cuda:3", "cuda:3", "cuda")):
        got: dict[str, Any] = {}
        load(memoryview(bytearray(data)), Target(got, got, device=own))
        assert {k: str(v) for k, v in got.items()} == {"cuda1": cuda1, "cuda": cuda, "cpu": "cpu", "meta": "meta"}


def test_code_keeps_its_file_name() -> None:
    namespace = run("def f():\n    return 1\n")
    snapshot = Pickler(namespace).snapshot({"f": namespace["f"]})
    assert snapshot.sources == {"<cell>"}
    received: dict[str, Any] = {}
    load(memoryview(bytearray(content(snapshot))), Target(received, received))
    assert received["f"].__code__.co_filename == "<cell>"


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="no nbddp snapshot"):
        load(memoryview(bytearray(100)), Target({}, {}))


class Holder:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


class Module(torch.nn.Module):
    def __init__(self, part: Any) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(1, 1))
        self.inner[0].extra = part


def _closure_over(part: Any) -> Any:
    def function() -> Any:
        return part

    return function


def _generator() -> Iterator[int]:
    yield 1


LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        (LOCK, "x", "_thread.lock"),
        ({"a": [0, LOCK]}, "x['a'][1]", "_thread.lock"),
        (Holder(dataset=Holder(conn=LOCK)), "x.dataset.conn", "_thread.lock"),
        (Module(LOCK), "x.inner.0.extra", "_thread.lock"),
        (functools.partial(print, LOCK, sep=1), "x.args[0]", "_thread.lock"),
        (_closure_over({"k": LOCK}), "x.<closure>.part['k']", "_thread.lock"),
        (_generator(), "x", "generator"),
        ((1, _generator()), "x[1]", "generator"),
        (Holder(b=1).__init__.__func__.__get__(Holder(l=LOCK)), "x.__self__.l", "_thread.lock"),
    ],
)
def test_the_culprit_is_named(value: Any, path: str, kind: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture({"fine": 1, "x": value}, {}, {"x": [4, 7]})
    error = caught.value
    assert str(error).startswith(f"cannot send '{path}' ({kind}), used on lines 4, 7 of the cell, to the ranks: ")
    assert (error.name, error.path, error.lines) == ("x", path, (4, 7))


def test_the_culprit_behind_a_function_is_named_with_the_function() -> None:
    namespace = run("import threading\nlock = threading.Lock()\ndef train():\n    with lock: pass")
    with pytest.raises(CaptureError) as caught:
        capture({"train": namespace["train"]}, namespace, {"train": [2]})
    assert "cannot send 'lock' (_thread.lock), which train uses, to the ranks" in str(caught.value)


class Raises:
    def __reduce__(self) -> Any:
        raise OSError("no such luck")


def test_an_object_whose_pickling_raises_is_named_with_its_error() -> None:
    with pytest.raises(
        CaptureError, match=r"cannot send 'x\[0\]' \(tests.test_closure.Raises\).*OSError: no such luck"
    ):
        capture({"x": [Raises()]}, {}, {})


def test_a_refusal_leaves_everything_as_it_was() -> None:
    namespace = {"x": [Raises()], "y": 1}
    before = dict(namespace)
    with pytest.raises(CaptureError):
        capture(namespace, namespace, {})
    assert namespace == before


def test_descriptions() -> None:
    rows = {c.name: c for c in describe({"t": torch.zeros(10, 10), "m": os, "f": _closure_over(1), "k": Holder}, {})}
    assert rows["t"].kind == "torch.Tensor (10, 10) torch.float32"
    assert rows["m"].kind == "module os"
    assert rows["k"].kind == "class Holder"
    assert rows["t"].nbytes > 400


def test_a_broken_stream_raises_what_pickle_raises() -> None:
    data = bytearray(content(Pickler({}).snapshot({"x": 1})))
    data[-3] = 0xFF
    with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError)):
        load(memoryview(data), Target({}, {}))
