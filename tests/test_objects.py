"""What a notebook holds, as the ranks find it: real kernels, since class and function identity is between processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import Kernel

# Each case: cells of the notebook, and what a rank must find true, a line each. What it changes goes nowhere.
DEFINITIONS: dict[str, tuple[str, str]] = {
    "class with super": (
        "class A:\n    def f(self): return 1\nclass B(A):\n    def f(self): return super().f() + 1",
        "assert B().f() == 2 and B.__module__ == '__main__' and issubclass(B, A)",
    ),
    "hierarchy over cells": (
        "class A: pass\n---\nclass B(A): pass\n---\nclass C(B): pass\nc = C()",
        "assert isinstance(c, A) and C.__mro__[1:3] == (B, A)",
    ),
    "redefined class": (
        "class A:\n    x = 1\nold = A()\n---\nclass A:\n    x = 2\nnew = A()",
        "assert (old.x, new.x, A.x) == (1, 2, 2) and type(new) is A and type(old) is not A",
    ),
    "dataclasses": (
        "import dataclasses as dc\n@dc.dataclass(frozen=True, slots=True)\nclass P:\n    x: int\n    y: list\np = P(1, [2])",
        "assert p == P(1, [2]) and dc.replace(p, x=5).x == 5 and not hasattr(p, '__dict__')",
    ),
    "enums": (
        "import enum\nclass C(enum.Enum):\n    RED = 1\n    BLUE = 2\nclass F(enum.Flag):\n    A = 1\n    B = 2\nred, ab = C.RED, F.A | F.B",
        "assert red is C.RED and C(2) is C.BLUE and F.A in ab",
    ),
    "named tuples and typed dicts": (
        "import collections, typing\nN = collections.namedtuple('N', 'a b', defaults=[3])\n"
        "class T(typing.NamedTuple):\n    x: int = 4\nclass D(typing.TypedDict):\n    k: int\nn = N(1)",
        "assert n == (1, 3) and type(n) is N and T().x == 4 and D(k=1) == {'k': 1}",
    ),
    "generics and protocols": (
        "import typing\nV = typing.TypeVar('V')\nclass Box(typing.Generic[V]):\n    def __init__(self, v: V): self.v = v\n"
        "class Sized(typing.Protocol):\n    def size(self) -> int: ...\nbox = Box[int](3)",
        "assert box.v == 3 and Box[str].__origin__ is Box",
    ),
    "lambdas and closures": (
        "def adder(n):\n    total = [0]\n    def add(x):\n        total[0] += x + n\n        return total[0]\n    return add\n"
        "add, square = adder(10), lambda x: x * x",
        "assert (add(1), add(1), square(3)) == (11, 22, 9)",
    ),
    "closures that share a variable": (
        "def account():\n    total, calls = 0, []\n    def add(x):\n        nonlocal total\n        total += x\n        calls.append(read)\n"
        "        return read()\n    def read(): return total\n    def later(): return early\n    missing = later\n"
        "    return add, read, later\n    early = 1\nadd, read, later = account()\nadd(1)\ncell = read.__closure__[0]\n"
        "fact = (lambda: [f := lambda n: 1 if n < 2 else n * f(n - 1)][0])()",
        "assert (add(5), read(), read.__closure__[0] is cell, cell.cell_contents) == (6, 6, True, 6)\n"
        "assert fact(5) == 120 and add.__closure__[0].cell_contents[0] is read\n"
        "try:\n    later()\nexcept NameError as error:\n    assert 'early' in str(error)\nelse:\n    assert False",
    ),
    "decorators": (
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def g(*a):\n        return f(*a) * 2\n    return g\n"
        "@twice\ndef one(): return 1\n@functools.singledispatch\ndef kind(x): return 'any'\n@kind.register\n"
        "def _(x: int): return 'int'\n@functools.total_ordering\nclass O:\n    def __init__(s, v): s.v = v\n"
        "    def __eq__(s, o): return s.v == o.v\n    def __lt__(s, o): return s.v < o.v",
        "assert one() == 2 and one.__name__ == 'one' and kind(1) == 'int' and kind('') == 'any' and O(2) >= O(1)",
    ),
    "recursion": (
        "def fact(n): return 1 if n < 2 else n * fact(n - 1)\ndef even(n): return n == 0 or odd(n - 1)\n"
        "def odd(n): return n != 0 and even(n - 1)",
        "assert fact(5) == 120 and even(10) and not odd(10)",
    ),
    "global": (
        "counter = 0\ndef bump():\n    global counter\n    counter += 1\n    return counter",
        "bump(); bump(); assert counter == 2\ncounter = 10\nassert bump() == 11",
    ),
    "async": (
        "async def get(x): return x + 1\nasync def numbers(n):\n    for i in range(n): yield i",
        "assert await get(1) == 2 and [i async for i in numbers(3)] == [0, 1, 2]",
    ),
    "partials and bound methods": (
        "import functools\nclass M:\n    def __init__(self): self.n = 2\n    def mul(self, x): return self.n * x\n"
        "    @property\n    def half(self): return self.n / 2\n    @half.setter\n    def half(self, v): self.n = 2 * v\n"
        "    @classmethod\n    def make(cls): return cls()\n    @staticmethod\n    def s(): return 's'\n"
        "m = M()\nbound, part = m.mul, functools.partial(m.mul, 4)",
        "assert bound.__self__ is m and part() == 8\nm.half = 5\nassert bound(1) == 10 and M.make().n == 2 and M.s() == 's'",
    ),
    "metaclasses": (
        "class Meta(type):\n    def __new__(m, n, b, d):\n        d['tag'] = n.lower()\n        return super().__new__(m, n, b, d)\n"
        "    def __call__(cls, *a):\n        return super().__call__(*a)\nclass X(metaclass=Meta): pass\nimport abc\n"
        "class Base(abc.ABC):\n    @abc.abstractmethod\n    def f(self): ...\nclass Impl(Base):\n    def f(self): return 1\nBase.register(int)",
        "assert X.tag == 'x' and type(X) is Meta and Impl().f() == 1 and issubclass(int, Base)\n"
        "try:\n    Base()\nexcept TypeError: pass\nelse: raise AssertionError",
    ),
    "descriptors and init_subclass": (
        "class Typed:\n    def __set_name__(self, owner, name): self.name = '_' + name\n"
        "    def __get__(self, o, t): return getattr(o, self.name)\n    def __set__(self, o, v): setattr(o, self.name, int(v))\n"
        "class Reg:\n    kinds = []\n    def __init_subclass__(cls): Reg.kinds.append(cls.__name__)\nclass One(Reg):\n    v = Typed()",
        "o = One(); o.v = '3'; assert o.v == 3\nclass Two(Reg): pass\nassert Reg.kinds[-1] == 'Two'",
    ),
    "exceptions": (
        "class Bad(Exception):\n    def __init__(self, code): super().__init__(f'code {code}'); self.code = code\n"
        "    def __reduce__(self): return Bad, (self.code,)\nbad = Bad(3)",
        "try:\n    raise bad\nexcept Bad as e:\n    assert e.code == 3 and str(e) == 'code 3'",
    ),
    "identity": (
        "shared = [1]\na, b = shared, {'x': shared}\ncycle = []\ncycle.append(cycle)\nimport torch\n"
        "net = torch.nn.Linear(2, 2)\nnet2 = torch.nn.Sequential(net, net)\nopt = torch.optim.Adam(net.parameters())\n"
        "base = torch.arange(6.)\nview = base[2:4]\nsched = torch.optim.lr_scheduler.StepLR(opt, 1)",
        "assert a is b['x'] is shared and cycle[0] is cycle and net2[0] is net2[1] is net\n"
        "assert opt.param_groups[0]['params'][0] is net.weight and sched.optimizer is opt\nview.fill_(9)\n"
        "assert base.tolist() == [0, 1, 9, 9, 4, 5]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DEFINITIONS)
def test_definitions(kernel: Kernel, case: str) -> None:
    notebook, cell = DEFINITIONS[case]
    for source in notebook.split("\n---\n"):
        kernel.ok(source)
    kernel.ok(f"%%ddp --cpus 1\n{cell}")


# Each case: an expression for v, and what a rank must find true of v and of the notebook's, of which it has the repr.
VALUES: dict[str, tuple[str, str]] = {
    "tensor": ("torch.randn(300, 300)", "v.sum().item()"),
    "bfloat16": ("torch.randn(90000).bfloat16()", "v.dtype, v.float().sum().item()"),
    "float8": ("torch.randn(90000).to(torch.float8_e4m3fn)", "v.dtype, v.float().sum().item()"),
    "complex and conjugated": ("torch.randn(90000, dtype=torch.cfloat).conj()", "v.is_conj(), v.sum().item()"),
    "uint16": ("torch.arange(90000).to(torch.uint16)", "v.dtype, v.int().sum().item()"),
    "strided": ("torch.randn(300, 300).t()[::2]", "v.stride(), v.shape, v.sum().item()"),
    "expanded": ("torch.randn(300, 1).expand(300, 999)", "v.stride(), v.shape, v[7, 8].item()"),
    "channels last": ("torch.randn(2, 3, 90, 90).to(memory_format=torch.channels_last)", "v.stride(), v.sum().item()"),
    "requires grad": ("torch.randn(90000, requires_grad=True)", "v.requires_grad, v.is_leaf, v.sum().item()"),
    "parameter": ("torch.nn.Parameter(torch.randn(90000))", "type(v).__name__, v.requires_grad, v.sum().item()"),
    "buffer": ("torch.nn.Buffer(torch.ones(90000))", "type(v).__name__, v.sum().item()"),
    "meta": ("torch.empty(9, 9, device='meta')", "v.device.type, v.shape"),
    "sparse coo": ("torch.eye(300).to_sparse()", "v.layout, v.to_dense().sum().item()"),
    "sparse csr": ("torch.eye(300).to_sparse_csr()", "v.layout, v.to_dense().sum().item()"),
    "quantised": ("torch.quantize_per_tensor(torch.randn(90000), 0.1, 0, torch.qint8)", "v.dtype, v.dequantize().sum().item()"),
    "jagged": ("torch.nested.nested_tensor([torch.ones(3), torch.ones(5)], layout=torch.jagged)", "[t.shape for t in v.unbind()]"),
    "torch random state": ("torch.Generator().manual_seed(3)", "torch.rand(3, generator=v.clone_state()).tolist()"),
    "numpy random state": ("np.random.default_rng(3)", "__import__('copy').deepcopy(v).random(3).tolist()"),
    "structured": ("np.ones(9000, dtype=[('a', 'i4'), ('b', 'f8')])", "v.dtype, v['b'].sum()"),
    "fortran": ("np.asfortranarray(np.arange(90000.).reshape(300, 300))", "v.flags.f_contiguous, v.flags.c_contiguous, v.sum()"),
    "strided array": ("np.arange(90000).reshape(300, 300)[::2, ::3]", "v.shape, v.sum()"),
    "reversed array": ("np.arange(90000)[::-1]", "v[0], v.sum()"),
    "object array": ("np.array([{1: 2}, None] * 9, dtype=object)", "v.dtype, v[0], v[1]"),
    "empty array": ("np.zeros((0, 3))", "v.shape, v.dtype"),
    "scalar array": ("np.array(3.5)", "v.shape, v.item()"),
    "read-only": ("np.broadcast_to(np.arange(90000), (2, 90000))[0]", "v.flags.writeable, v.sum()"),
    "dates": ("np.arange(90000).astype('M8[s]')", "v.dtype, v[-1]"),
    "strings": ("np.array(['abc', 'd'] * 9000)", "v.dtype, v[1]"),
    "masked": ("np.ma.masked_greater(np.arange(90000), 10)", "v.sum(), v.mask.sum()"),
    "records": ("np.rec.array(np.ones(9000, dtype=[('a', 'i4'), ('b', 'f8')]))", "type(v).__name__, v.b.sum()"),
    "big-endian": ("np.arange(90000, dtype='>i4')", "v.dtype.str, v.sum()"),
    "frame": (
        "pd.DataFrame({'n': np.arange(9000), 's': ['x'] * 9000, 'c': pd.Categorical(['u', 'v'] * 4500),"
        " 'd': pd.date_range('2020', periods=9000, freq='s')}, index=pd.RangeIndex(5, 9005))",
        "v.dtypes.to_dict(), pd.util.hash_pandas_object(v).sum()",
    ),
    "frame on arrow": ("pd.DataFrame({'n': range(9000)}).convert_dtypes(dtype_backend='pyarrow')", "v.dtypes.to_dict(), v.n.sum()"),
    "multi-index": ("pd.Series(range(900), index=pd.MultiIndex.from_product([range(30), range(30)]))", "v.loc[(3, 4)]"),
    "image": ("PIL.Image.fromarray(np.arange(90000, dtype=np.uint8).reshape(300, 300))", "v.size, v.mode, np.asarray(v).sum()"),
    "scipy sparse": ("scipy.sparse.random(300, 300, 0.1, format='csr', random_state=0)", "v.format, v.sum()"),
    "data set": ("torch.utils.data.Subset(torch.utils.data.TensorDataset(torch.arange(90000.)), [5, 7])", "[x.item() for (x,) in v]"),
    "loader": (
        "torch.utils.data.DataLoader(range(9), 2, shuffle=True, generator=torch.Generator().manual_seed(1))",
        "[b.tolist() for b in __import__('copy').deepcopy(v)]",
    ),
    "sampler": ("torch.utils.data.DistributedSampler(range(9), 2, 1, seed=3)", "list(v)"),
    "script module": ("torch.jit.script(torch.nn.Linear(2, 2))", "v(torch.ones(2)).tolist()"),
    "compiled module": ("torch.compile(torch.nn.Linear(2, 2), backend='eager')", "v(torch.ones(2)).tolist()"),
    "memory format": ("{'f': torch.channels_last}", "v['f']"),
    "gradient": ("(lambda p: (p.sum().backward(), p)[1])(torch.ones(90000, requires_grad=True))", "v.grad.sum().item()"),
    "type info": ("torch.finfo(torch.bfloat16)", "v.max"),
    "small things": ("(1, 2.5, 1j, 'é', b'x', None, ..., range(3), slice(1), {1}, frozenset({2}))", "v"),
    "large bytes": ("b'ab' * 900_000", "len(v), v[-1]"),
    "large string": ("'aé' * 900_000", "len(v), v[-1]"),
    "paths, dates, decimals": (
        "(__import__('pathlib').Path('a/b'), __import__('datetime').date(2020, 1, 2), __import__('decimal').Decimal('1.10'),"
        " __import__('fractions').Fraction(1, 3), __import__('uuid').UUID(int=5), __import__('re').compile('a+'))",
        "v",
    ),
    "containers": (
        "(__import__('collections').OrderedDict(a=1), __import__('collections').Counter('aab'),"
        " __import__('collections').deque([1], 3), __import__('collections').defaultdict(list, {1: [2]}))",
        "v",
    ),
}  # fmt: skip

IMPORTS = (
    "import torch, numpy as np, pandas as pd, scipy.sparse, PIL.Image, warnings\nwarnings.simplefilter('ignore')\n"
)


@pytest.mark.parametrize("case", VALUES)
def test_values_go_and_come_back(kernel: Kernel, case: str) -> None:
    value, probe = VALUES[case]
    kernel.ok(f"{IMPORTS}v = {value}\nexpected = repr(({probe},))")
    kernel.ok(f"%%ddp --cpus 1 --out v\n{IMPORTS}found = repr(({probe},))\nassert found == expected, (found, expected)")
    if case != "compiled module":  # which would be compiled anew, in the notebook
        assert kernel.get(f"(repr(({probe},)) == expected) or repr(({probe},))") is True


def test_a_tensor_subclass_of_the_notebook(kernel: Kernel) -> None:
    kernel.ok(
        "import torch\nclass Tagged(torch.Tensor):\n    tag = 'none'\n"
        "v = torch.arange(90000.).as_subclass(Tagged)\nv.tag = 'mine'"
    )
    kernel.ok("%%ddp --cpus 1 --out v\nassert type(v) is Tagged and v.tag == 'mine'\nv += 1")
    assert kernel.get("type(v) is Tagged, v.tag, v[0].item()") == (True, "mine", 1.0)


def test_a_memory_mapped_array_is_mapped_again(kernel: Kernel, tmp_path: Path) -> None:
    kernel.ok(
        f"import numpy as np\npath = {str(tmp_path / 'a.npy')!r}\nnp.save(path, np.arange(1 << 20))\n"
        "m = np.load(path, mmap_mode='r')\npart = m[100:200:2]\nw = np.load(path, mmap_mode='r+')\n"
        "c = np.load(path, mmap_mode='c')\nc[0] = 77"
    )
    dry = kernel.ok("%%ddp --cpus 1 --dry-run\nprint(m, part, w)").text
    assert " B in all" in dry
    kernel.ok(
        "%%ddp --cpus 1\nassert isinstance(m, np.memmap) and not m.flags.writeable and m.sum() == sum(range(1 << 20))\n"
        "assert part.tolist() == list(range(100, 200, 2)) and c[0] == 77\nw[5] = -1\nw.flush()"
    )
    assert kernel.get("int(m[5])") == -1  # a file is a file: what a rank writes to it is written
    kernel.ok("import os\nos.replace(path, path + '.old')\nnp.save(path, np.zeros(1 << 20))")
    kernel.ok("%%ddp --cpus 1\nassert m[7] == 7, m[7]")  # not what has its name now


def test_a_write_protected_part_of_a_writable_file_stays_so(kernel: Kernel, tmp_path: Path) -> None:
    kernel.ok(
        f"import numpy as np\nm = np.memmap({str(tmp_path / 'm')!r}, 'f4', 'w+', shape=(1 << 20,))\n"
        "m.flags.writeable = False"
    )
    kernel.ok("%%ddp --cpus 1\nassert not m.flags.writeable and m.mode == 'r'")


def test_weak_references_and_streams(kernel: Kernel) -> None:
    kernel.ok(
        "import weakref, io, contextlib\nclass C: pass\nc = C()\nref, dead = weakref.ref(c), weakref.ref(C())\n"
        "keys = weakref.WeakKeyDictionary({c: 1})\ntext = io.StringIO('abc')"
    )
    kernel.ok("%%ddp --cpus 1\nassert type(ref()) is C and dead() is None and list(keys.values()) == [1]")
    kernel.ok(
        "import nbddp\nwith contextlib.redirect_stdout(io.StringIO()):\n    read = nbddp.launch(text.read, cpus=1)"
    )
    assert kernel.get("read") == ["abc"]


def test_an_optimizer_with_a_scheduler_and_hooks(kernel: Kernel) -> None:
    kernel.ok(
        "import torch\nclass Warm(torch.optim.SGD):\n    def __init__(self, *a, **k):\n        super().__init__(*a, **k)\n        self.warm = 3\n"
        "p = torch.nn.Parameter(torch.ones(2))\nopt = Warm([p], lr=0.5)\nseen = []\n"
        "_ = opt.register_step_post_hook(lambda *_: seen.append(1))\nsch = torch.optim.lr_scheduler.StepLR(opt, 1)"
    )
    kernel.ok(
        "%%ddp --cpus 2 --no-init --out opt,sch,p\n"
        "import warnings\nwarnings.simplefilter('error')\nfor _ in range(2):\n    p.grad = torch.ones(2)\n    opt.step()\n    sch.step()\n"
        "assert (opt.warm, seen, sch.optimizer is opt) == (3, [1, 1], True)\nassert abs(opt.param_groups[0]['lr'] - 0.005) < 1e-9"
    )
    kernel.ok(
        "opt.step()\nsch.step()\nassert (opt.warm, sch.optimizer is opt, opt.param_groups[0]['params'][0] is p) == (3, True, True)"
    )


def test_parametrized_modules(kernel: Kernel) -> None:
    kernel.ok(
        "import torch\nfrom torch.nn.utils import parametrize, parametrizations as ps\nclass Symmetric(torch.nn.Module):\n"
        "    def forward(self, x): return x.triu() + x.triu(1).T\n"
        "net = torch.nn.Sequential(ps.weight_norm(torch.nn.Linear(3, 3)), ps.orthogonal(torch.nn.Linear(3, 3)))\n"
        "parametrize.register_parametrization(net[1], 'bias', torch.nn.Identity())\n"
        "own = torch.nn.Linear(3, 3)\nparametrize.register_parametrization(own, 'weight', Symmetric())\n"
        "x = torch.ones(2, 3)\nwith torch.no_grad(): y = own(net(x))"
    )
    kernel.ok(
        "%%ddp --cpus 2 --out net\n"
        "z = own(net(x))\nassert torch.equal(y, z) and parametrize.is_parametrized(net[1], 'bias')\n"
        "ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(net, own))\n"
        "torch.optim.SGD(ddp.parameters(), lr=0.1).zero_grad()\nddp(x).sum().backward()\n"
        "assert net[0].parametrizations.weight.original0.grad is not None\n"
        "parametrize.remove_parametrizations(own, 'weight')\nassert type(own) is torch.nn.Linear"
    )
    kernel.ok(
        "with torch.no_grad(): assert torch.allclose(own(net(x)), y)\nassert type(net[0]).__name__ == 'ParametrizedLinear'"
    )


def test_an_optimizer_whose_class_knows_it(kernel: Kernel) -> None:
    kernel.ok(
        "import torch, types, threading\nclass Own(torch.optim.SGD):\n    made = []\n    def step(self, closure=None):\n"
        "        self.mine = getattr(self, 'mine', 0) + 1\n        return super().step(closure)\n"
        "p = torch.nn.Parameter(torch.ones(2))\no, plain = Own([p], lr=0.1), torch.optim.SGD([p], lr=0.1)\n"
        "Own.made.append(o)\ns = torch.optim.lr_scheduler.StepLR(o, 1)\n"
        "plain.step = types.MethodType(lambda self: 'set on it', plain)"
    )
    kernel.ok(
        "%%ddp --cpus 1 --no-init --out o,s\np.grad = torch.ones(2)\no.step()\ns.step()\n"
        "assert (o.mine, Own.made[0] is o, p[0].item() < 1, plain.step()) == (1, True, True, 'set on it')"
    )
    kernel.ok("o.step()\nassert o.mine == 2")
    kernel.ok("o.lock = threading.Lock()")
    assert "cannot send 'o.lock' (_thread.lock)" in kernel.run("%%ddp --cpus 1\no").message


def test_a_parametrized_module_with_a_state_of_its_own(kernel: Kernel) -> None:
    kernel.ok(
        "import copy, torch\nfrom torch.nn.utils import parametrize\nclass L(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.w, self.table = torch.nn.Parameter(torch.ones(2)), {(0, 1): 2}\n"
        "    def __getstate__(self): return {**vars(self), 'table': list(self.table.items())}\n"
        "    def __setstate__(self, state): super().__setstate__({**state, 'table': dict(state['table'])})\n"
        "m = L()\nparametrize.register_parametrization(m, 'w', torch.nn.Identity())\ntwin, kind = copy.deepcopy(m), type(m)"
    )
    kernel.ok(
        "%%ddp --cpus 1 --out m\nassert m.table == {(0, 1): 2} and m.w.tolist() == [1, 1]\n"
        "assert type(m) is type(twin) is kind and isinstance(m, L)"
    )
    assert kernel.get("m.table") == {(0, 1): 2}


def test_cells_by_themselves(kernel: Kernel) -> None:
    kernel.ok("import types\nnone, empty, full = types.CellType(None), types.CellType(), types.CellType(3)")
    kernel.ok(
        "%%ddp --cpus 1\nassert none.cell_contents is None and full.cell_contents == 3\ntry:\n    empty.cell_contents\n"
        "except ValueError: pass\nelse: assert False"
    )


def test_a_loader_with_persistent_workers_that_was_used(kernel: Kernel) -> None:
    kernel.ok(
        "import torch\nloader = torch.utils.data.DataLoader([1, 2], num_workers=1, persistent_workers=True)\nlist(loader)"
    )
    kernel.ok("%%ddp --cpus 2\nassert [b.item() for b in loader] == [1, 2]")
    kernel.ok("assert loader._iterator is not None\ndel loader._iterator")


def test_names_of_modules_stay_names(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    (tmp_path / "lib.py").write_text(
        "import torch\ncalls = []\n@torch.compile(backend='eager')\ndef step(x):\n    return x + 1\n"
        "@torch.compiler.disable\ndef log(x):\n    calls.append(x)\n"
    )
    kernel = new_kernel(cwd=str(tmp_path))
    kernel.ok("import typing, pickle, lib\nfrom lib import step, log\nId = typing.NewType('Id', int)")
    kernel.ok(
        "%%ddp --cpus 1\nassert step is lib.step\nlog(1)\nassert lib.calls == [1]\n"
        "assert pickle.loads(pickle.dumps(Id)) is Id"
    )


def test_modules_of_types_of_their_own(kernel: Kernel) -> None:
    # torch.classes is taken for used by a function that has an attribute of that name, and torch.
    kernel.ok(
        "import torch\nimport torch.backends.cudnn as cudnn\n"
        "class Head(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.classes = torch.nn.Linear(2, 3)\n"
        "def prepare():\n    cudnn.benchmark = True\n    return torch.backends.cudnn is cudnn and Head()"
    )
    kernel.ok("%%ddp --cpus 1 --out head\nhead = prepare()\nassert cudnn.benchmark and cudnn is torch.backends.cudnn")
    assert kernel.get("type(head) is Head, head.classes.out_features, cudnn.benchmark") == (True, 3, False)


def test_what_a_rank_writes_stays_there(kernel: Kernel) -> None:
    kernel.ok("import torch, numpy as np\nt, a = torch.zeros(1 << 20), np.zeros(1 << 20)")
    kernel.ok(
        "%%ddp --cpus 2\nimport torch.distributed as dist\nif rank == 0:\n    t += 1\n    a += 1\ndist.barrier()\n"
        "assert (t.sum() > 0, a.sum() > 0) == (rank == 0, rank == 0)"
    )
    assert kernel.get("t.sum().item(), float(a.sum())") == (0.0, 0.0)


LIBRARIES = """
import torch, pickle, inspect, torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset
class Squares(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return i * i
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def forward(self, x):
        return self.layer(x).relu()
def child(index, queue): queue.put((index, Net().layer.out_features))
model = Net()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_find_what_notebook_and_cell_define(kernel: Kernel, method: str) -> None:
    kernel.ok(LIBRARIES)
    kernel.ok(
        "%%ddp --cpus 1\n"
        f"assert list(DataLoader(Squares(), num_workers=1, multiprocessing_context={method!r}))[3].item() == 9\n"
        "import typing\nclass Item(typing.NamedTuple):\n    value: int\n"
        "class Pairs(Squares):\n    def __getitem__(self, i): return Item(i)\ndef first(batch): return batch\n"
        f"loader = DataLoader(Pairs(), num_workers=1, collate_fn=first, timeout=30, multiprocessing_context={method!r})\n"
        "assert [(type(b[0]) is Item, b[0].value) for b in loader] == [(True, i) for i in range(4)]\n"
        "class Cubes(Squares):\n    def __getitem__(self, i): return helper(i)\ndef helper(i): return i ** 3\n"
        f"assert list(DataLoader(Cubes(), num_workers=1, multiprocessing_context={method!r}))[3].item() == 27\n"
        f"queue = mp.get_context({method!r}).SimpleQueue()\n"
        "def own(index, queue): child(index, queue)\n"
        f"mp.start_processes(own, (queue,), nprocs=2, start_method={method!r})\n"
        "assert sorted([queue.get(), queue.get()]) == [(0, 1), (1, 1)]",
        timeout=120,
    )


def test_libraries_find_the_notebooks_classes(kernel: Kernel, tmp_path: Path) -> None:
    kernel.ok(LIBRARIES + f"path = {str(tmp_path / 'model.pt')!r}\nx = torch.ones(1, 2)")
    kernel.ok(
        "%%ddp --cpus 1\n"
        "torch.save(model, path)\nassert type(torch.load(path, weights_only=False)) is Net\n"
        "assert type(pickle.loads(pickle.dumps(model))) is Net\n"
        "assert inspect.getsource(Net.forward).strip().startswith('def forward')\n"
        "y = model(x)\nassert torch.equal(torch.jit.script(model)(x), y)\n"
        "assert torch.equal(torch.compile(model, backend='eager')(x), y)\n"
        "assert torch.equal(torch.export.export(model, (x,)).module()(x), y)",
        timeout=120,
    )
    assert kernel.get("type(torch.load(path, weights_only=False)) is Net") is True


def test_modules(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 1\ndef f(): return value\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("from . import inner\n")
    (tmp_path / "package" / "inner.py").write_text("class C:\n    x = 1\n")
    kernel = new_kernel(cwd=str(tmp_path))
    kernel.ok("import beside, package\nfrom beside import f\nfrom package.inner import C\nc = C()")
    kernel.ok("%%ddp --cpus 1\nassert f() == beside.value == c.x == 1 and package.inner.C is C")
    (tmp_path / "beside.py").write_text("value = 2222\ndef f(): return value\n")
    kernel.ok("%%ddp --cpus 1\nassert f() == beside.value == 2222")  # though the notebook has not reloaded it
    kernel.ok(
        "import sys, types, cloudpickle\nmade = types.ModuleType('made')\nmade.x = 5\n"
        "cloudpickle.register_pickle_by_value(beside)"
    )
    kernel.ok("%%ddp --cpus 1\nassert made.x == 5 and f() == 1")  # by value: as the notebook has it
