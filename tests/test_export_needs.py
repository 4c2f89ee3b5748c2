"""Which statements of a notebook a cell needs."""

from __future__ import annotations

import ast

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from nbddp._cells import Cell, pieces
from nbddp._names import Uses
from nbddp._needed import Needed, find

transform = TransformerManager().transform_cell


def needed(cell: str, *above: str) -> Needed:
    statements = [piece for i, text in enumerate(above) for piece in pieces(Cell(text, i + 1), transform, i)]
    uses = Uses(ast.parse(transform(cell)).body, transform)
    return find(statements, uses.taken, transform, given={"rank", "device", "world_size"})


def kept(cell: str, *above: str) -> list[str]:
    return [piece.text for _, piece in needed(cell, *above).pieces]


@pytest.mark.parametrize(
    ("cell", "above", "expected"),
    [
        # names
        ("x", "x = 1\ny = 2", "x = 1"),
        ("x", "x = 1\nx = 2", "x = 2"),
        ("x", "x = 1\ny = x\nx = 2", "x = 2"),
        ("x, y", "x = 1\ny = x\nx = 2", "x = 1\ny = x\nx = 2"),
        ("x", "x = 1\nx += 1", "x = 1\nx += 1"),
        ("x", "x = 1\nif y:\n    x = 2", "x = 1\nif y:\n    x = 2"),
        ("x", "try:\n    x = 1\nexcept OSError:\n    x = 2", "try:\n    x = 1\nexcept OSError:\n    x = 2"),
        ("a", "(a, b) = 1, 2\nc = 3", "(a, b) = 1, 2"),
        ("x = 1\nx", "x = 5", ""),
        ("rank", "rank = 3", ""),  # given
        # functions and classes, and what is behind them
        ("f()", "def f(): return y\ny = 1\nz = 2", "def f(): return y\ny = 1"),
        ("g()", "def f(): return y\ng = f\ny = 2", "def f(): return y\ng = f\ny = 2"),
        ("f()", "def f(): pass\ndef g(): pass\ndef f(): return g()", "def g(): pass\ndef f(): return g()"),
        ("C()", "k = 1\nclass C(B):\n    x = k\nclass D: pass", "k = 1\nclass C(B):\n    x = k"),
        ("m", "import t\nclass N:\n    def go(self): t.x()\nm = N()", "import t\nclass N:\n    def go(self): t.x()\nm = N()"),
        ("m()", "class N:\n    def __call__(self): h()\nm = N()\ndef h(): 1", "class N:\n    def __call__(self): h()\nm = N()\ndef h(): 1"),
        ("f()", "import functools\n@functools.cache\ndef f(): 1", "import functools\n@functools.cache\ndef f(): 1"),
        ("f()", "f = lambda: y\ny = 2", "f = lambda: y\ny = 2"),
        ("x", "def f(): return y\ny = 1\nx = f()", "def f(): return y\ny = 1\nx = f()"),
        # modules
        ("nn", "from torch import nn, optim\nimport os", "from torch import nn"),
        ("a", "import a, b", "import a"),
        ("x.y", "import x\nimport x.y as q\nimport x.y", "import x\nimport x.y"),
        ("z", "from m import *\nimport os", "from m import *"),
        ("x", "try:\n    import x\nexcept ImportError:\n    x = None", "try:\n    import x\nexcept ImportError:\n    x = None"),
        # what is changed without being bound
        ("x", "x = []\nx.append(1)\ny = []\ny.append(2)", "x = []\nx.append(1)"),
        ("cfg", "cfg = {}\ncfg['lr'] = 1\ndel cfg['b']", "cfg = {}\ncfg['lr'] = 1\ndel cfg['b']"),
        ("m", "m = M()\nm.eval()\nm.fc.bias = 1\nprint(m)\nm", "m = M()\nm.eval()\nm.fc.bias = 1"),
        ("x", "x = [1]\ny = x\ny.append(2)", "x = [1]\ny = x\ny.append(2)"),
        ("C", "class C: pass\ndef f(self): 1\nC.f = f", "class C: pass\ndef f(self): 1\nC.f = f"),
        ("d", "import random\nd = [1]\nrandom.shuffle(d)", "import random\nd = [1]\nrandom.shuffle(d)"),
        ("d", "import matplotlib.pyplot as plt\nd = [1]\nplt.plot(d)\nplt.show()", "d = [1]"),
        ("d", "d = f()\nd.head()\nd.describe()\nlen(d)", "d = f()"),
        ("d", "d = f()\nfor i in d:\n    print(i)", "d = f()"),
        ("d", "d = []\nfor i in range(3):\n    d.append(i)", "d = []\nfor i in range(3):\n    d.append(i)"),
        ("m", "m = M()\ndef init(x): x.fill_(0)\ninit(m)", "m = M()\ndef init(x): x.fill_(0)\ninit(m)"),
        ("m", "m = M()\ndef show(x): print(x)\nshow(m)", "m = M()"),
        ("n", "n = 0\ndef up():\n    global n\n    n += 1\nup()", "n = 0\ndef up():\n    global n\n    n += 1\nup()"),
        ("f()", "n = []\ndef f(): n.append(1)\nf()", "n = []\ndef f(): n.append(1)\nf()"),
        ("it", "it = iter([1, 2])\nfirst = next(it)", "it = iter([1, 2])\nfirst = next(it)"),
        ("g", "import numpy as np\ng = np.random.default_rng(0)\na = g.normal()", "import numpy as np\ng = np.random.default_rng(0)\na = g.normal()"),
        ("b", "import torch\ng = torch.Generator().manual_seed(0)\na = torch.randn(2, generator=g)\nb = torch.randn(2, generator=g)", "import torch\ng = torch.Generator().manual_seed(0)\na = torch.randn(2, generator=g)\nb = torch.randn(2, generator=g)"),
        ("d", "import numpy as np\nrng = np.random.default_rng(0)\nd = [1, 2]\nrng.shuffle(d)", "import numpy as np\nrng = np.random.default_rng(0)\nd = [1, 2]\nrng.shuffle(d)"),
        ("d", "import random\nd = [1, 2]\nrandom.Random(0).shuffle(d)", "import random\nd = [1, 2]\nrandom.Random(0).shuffle(d)"),
        # settings
        ("x", "import warnings\nwarnings.filterwarnings('ignore')\nx = 1", "import warnings\nwarnings.filterwarnings('ignore')\nx = 1"),
        ("x", "import os\nos.environ['A'] = '1'\nx = os.environ.get('B')", "import os\nos.environ['A'] = '1'\nx = os.environ.get('B')"),
        ("x", "%env A=1\nx = 1", 'import os\nos.environ["A"] = "1"\nx = 1'),
        ("plt", "import matplotlib.pyplot as plt\nplt.style.use('ggplot')", "import matplotlib.pyplot as plt\nplt.style.use('ggplot')"),
        ("x", "import matplotlib.pyplot as plt\nplt.style.use('ggplot')\nx = 1", "x = 1"),
        ("x", "import torch\ntorch.set_default_dtype(torch.float64)\nx = 1", "import torch\ntorch.set_default_dtype(torch.float64)\nx = 1"),
        ("x", "import torch\ntorch.backends.cudnn.benchmark = True\nx = 1", "import torch\ntorch.backends.cudnn.benchmark = True\nx = 1"),
        ("x", "import sys\nsys.path.insert(0, 'src')\nimport x", "import sys\nsys.path.insert(0, 'src')\nimport x"),
        ("x", "import os\nx = os.environ.get('A')\nos.getcwd()\nos.listdir()", "import os\nx = os.environ.get('A')"),
        # random numbers: what draws between the seed and what is needed is needed
        ("b", "import torch\na = torch.randn(2)\nb = torch.randn(2)", "import torch\nb = torch.randn(2)"),
        ("b", "import torch\ntorch.manual_seed(0)\na = torch.randn(2)\nb = torch.randn(2)\nc = torch.randn(2)", "import torch\ntorch.manual_seed(0)\na = torch.randn(2)\nb = torch.randn(2)"),
        ("b", "import torch\ntorch.manual_seed(0)\na = torch.randn(2)\ntorch.manual_seed(1)\nb = torch.randn(2)", "import torch\ntorch.manual_seed(1)\nb = torch.randn(2)"),
        ("b", "import torch\ntorch.manual_seed(0)\na = torch.nn.Linear(2, 2)\nl = torch.nn.MSELoss()\nb = torch.nn.Linear(2, 2)", "import torch\ntorch.manual_seed(0)\na = torch.nn.Linear(2, 2)\nb = torch.nn.Linear(2, 2)"),
        ("b", "import torch\ntorch.manual_seed(0)\ng = torch.Generator().manual_seed(1)\na = torch.randn(2, generator=g)\nb = torch.randn(2)", "import torch\ntorch.manual_seed(0)\nb = torch.randn(2)"),
        ("x", "import torch\ndef seed_all(): torch.manual_seed(0)\nseed_all()\nx = torch.rand(1)", "import torch\ndef seed_all(): torch.manual_seed(0)\nseed_all()\nx = torch.rand(1)"),
        ("x", "import numpy as np\nnp.random.seed(0)\nx = np.random.rand(2)", "import numpy as np\nnp.random.seed(0)\nx = np.random.rand(2)"),
        # magics
        ("x", "%matplotlib inline\n!pip install a\nx?\nx = 1", "x = 1"),
        ("x", "%time x = f()", "x = f()"),
        ("x", "%%time\nx = 1\ny = 2", "x = 1"),
        ("x", "%%bash\nx = 1", ""),
        ("x", "%load_ext nbddp\nimport nbddp\nx = 1", "x = 1"),
        # text
        ("x", "# why\n# it is so\nx = 1  # one\n\n# other\ny = 2", "# why\n# it is so\nx = 1  # one"),
        ("x", "x = 1; y = 2", "x = 1"),
        ("x", "x = (  # first\n    1,\n)\n", "x = (  # first\n    1,\n)"),
        ("é", "é = 'ü'; ö = 1", "é = 'ü'"),
    ],
)  # fmt: skip
def test_what_is_needed(cell: str, above: str, expected: str) -> None:
    assert "\n".join(kept(cell, above)) == expected


TRAINING = """\
import torch
from torch import nn
lr, epochs = 0.1, 2
data = torch.randn(8, 2)
loader = torch.utils.data.DataLoader(data)
criterion = nn.MSELoss()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=lr)
def train(model, loader, optimizer):
    for x in loader:
        optimizer.zero_grad()
        criterion(model(x), x).backward()
        optimizer.step()
"""
LOOP = """\
losses = []
for epoch in range(epochs):
    loss = criterion(model(data), data)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(losses[-1])
"""


@pytest.mark.parametrize("loop", [LOOP, "history = train(model, loader, optimizer)", "train(model, loader, optimizer)"])
def test_a_training_on_one_gpu_belongs_only_if_its_model_does(loop: str) -> None:
    everything = "Net(), lr, epochs, data, loader, criterion, train"
    assert loop.split("\n")[-2:] != kept(everything, TRAINING, loop)[-2:]
    assert not any("step()" in text for text in kept("Net(), lr, epochs, data, criterion", TRAINING, loop))
    with_model = kept("model", TRAINING, loop)
    assert any("step()" in text for text in with_model)
    assert not any("print" in text and "for" not in text for text in with_model)


EVALUATION = """\
print(sum(p.numel() for p in model.parameters()))
first, = next(iter(loader))
out = model(first)
predictions = [model(x).argmax() for x in loader]
"""


def test_who_looks_at_a_model_changes_nothing() -> None:
    net = TRAINING.replace("model = Net()", "    def forward(self, x):\n        return self.layer(x)\nmodel = Net()")
    assert kept("model, loader", net, EVALUATION) == kept("model, loader", net)


@pytest.mark.parametrize("made", ['{"lr": 0.1}', "SimpleNamespace(lr=0.1)", "C()"])
def test_a_configuration_is_not_changed_by_who_reads_it(made: str) -> None:
    config = f"from types import SimpleNamespace\nimport dataclasses\n@dataclasses.dataclass\nclass C:\n    lr: int = 1\ncfg = {made}"
    read = 'cfg["lr"]' if made.startswith("{") else "cfg.lr"
    other = f"optimizer = torch.optim.Adam(model.parameters(), lr={read})"
    assert not any("step()" in text for text in kept("cfg, Net()", TRAINING, config, other, LOOP))
    assert any("step()" in text for text in kept("cfg, model", TRAINING, config, other, LOOP))


def test_steps_that_stand_alone() -> None:
    steps = "loss = criterion(model(data), data)\nloss.backward()\noptimizer.step()\noptimizer.zero_grad()"
    assert kept("model", TRAINING, steps)[-3:] == steps.split("\n")[:3]


def last(cell: str) -> str:
    """Return the last statement of a cell."""
    return pieces(Cell(cell, 1), transform)[-1].text


MODEL = """\
import functools
import torch
from torch import nn
model = nn.Linear(2, 2)
opt = torch.optim.SGD(model.parameters(), lr=1)
x = torch.ones(2)
"""


@pytest.mark.parametrize(
    "cell",
    [
        "def train(): return train_one(model, x, opt)\ndef train_one(model, x, opt):\n    loss = model(x).sum()\n    loss.backward()\n    opt.step()\n    return loss\nloss = train()",
        "def train(model, x, opt): return train_one(model, x, opt)\ndef train_one(model, x, opt):\n    loss = model(x).sum()\n    loss.backward()\n    opt.step()\n    return loss\nloss = train(model, x, opt)",
        "class Trainer:\n    def __init__(self, m, o):\n        self.m, self.o = m, o\n    def run(self, x):\n        loss = self.m(x).sum()\n        loss.backward()\n        self.o.step()\n        return loss.item()\ntrainer = Trainer(model, opt)\nlosses = [trainer.run(x) for _ in range(3)]",
        "class Trainer:\n    def __init__(self, m, o):\n        self.m = m\n        self.o = o\n    def fit_one(self, x):\n        return self._go(x)\n    def _go(self, x):\n        self.m.weight.data.zero_()\n        return 1\ntrainer = Trainer(model, opt)\nloss = trainer.fit_one(x)",
        "def make_step(model, opt):\n    def step(x):\n        loss = model(x).sum(); loss.backward(); opt.step()\n        return loss\n    return step\nstep = make_step(model, opt)\nloss = step(x)",
        "def train(m, o, x):\n    m(x).sum().backward(); o.step()\n    return 1\ngo = functools.partial(train, model, opt)\nr = go(x)",
        "go = lambda: model.weight.data.zero_()\nr = go()",
        "list(map(lambda p: p.data.zero_(), model.parameters()))",
        "_ = list(map(lambda p: p.data.zero_(), model.parameters()))",
        "[p.data.zero_() for p in model.parameters()]",
        "opt = torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), lr=1)\nmodel(x).sum().backward()\nopt.step()",
        "for p in reversed(list(model.parameters())):\n    p.data.zero_()",
        "for i, p in enumerate(model.parameters()):\n    p.data.zero_()",
        "for n, p in sorted(model.named_parameters()):\n    p.data.zero_()",
        "if x.sum() > 1:\n    m = model\nelse:\n    m = nn.Linear(1, 1)\nm.weight.data.zero_()",
        "getattr(model, 'weight').data.zero_()",
        "import helpers\nr = helpers.run(model)",
        "import helpers\nt = helpers.Trainer(model)\nr = t.evaluate_and_go()",
        "def f(model): opt.step()\nmodel(x).sum().backward()\nf(None)",
        "def f():\n    with torch.no_grad():\n        model.weight.fill_(1)\nf()",
        "class A:\n    def __init__(self, m): self.m = m\n    def go(self): self.m.weight.data.zero_()\nclass B(A):\n    def __init__(self, m): super().__init__(m)\n    def go2(self): return super().go()\nb = B(model)\nr = b.go2()",
        "def g(m):\n    for i in range(3):\n        m.weight.data.zero_()\n        yield i\nit = g(model)\nr = next(it)",
        "class S:\n    def __init__(self, m): self.m = m\n    def __call__(self): self.m.weight.data.zero_()\ns = S(model)\nr = s()",
        "def z(m): m.weight.data.zero_()\nfs = {'a': z}\nr = fs['a'](model)",
        "def bw(): model(x).sum().backward()\nbw()\nopt.step()",
        "import threading\ndef z(): model.weight.data.zero_()\nt = threading.Thread(target=z)\nt.start()",
        "def z(m, n):\n    if n == 0: return m.weight.data.zero_()\n    return z(m, n-1)\nr = z(model, 3)",
        "def a(m, n): return b(m, n)\ndef b(m, n):\n    if n: return a(m, n-1)\n    m.weight.data.zero_()\nr = a(model, 3)",
        "def z(m=model): m.weight.data.zero_()\nr = z()",
        "def z(*ms):\n    for m in ms: m.weight.data.zero_()\nr = z(x, model)",
        "def z(**k): k['m'].weight.data.zero_()\nr = z(m=model)",
        "models = []\nmodels.append(model)\nfor m in models:\n    m.weight.data.zero_()",
        "class U:\n    @staticmethod\n    def z(m): m.weight.data.zero_()\nr = U.z(model)",
        "def init(m):\n    m.weight.data.zero_()\nm2 = model.apply(init)",
        "def get(): return model\nget().weight.data.zero_()",
        "class C:\n    def __enter__(self): model.weight.data.zero_()\n    def __exit__(self, *a): pass\nwith C():\n    pass",
    ],
)  # fmt: skip
def test_what_changes_a_model_behind_a_call(cell: str) -> None:
    assert last(cell) in kept("model", MODEL, cell)


LAZY = """\
import torch
from torch import nn
x = torch.ones(2)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(2)
    def forward(self, x):
        return self.layer(x)
def build(): return Net()
"""


@pytest.mark.parametrize(
    "made", ["nn.LazyLinear(3)", "nn.Sequential(nn.LazyLinear(3))", "Net()", "build()", "nn.BatchNorm1d(2)"]
)
def test_a_call_of_a_model_may_change_it(made: str) -> None:
    assert kept("model", LAZY, f"model = {made}\n_ = model(x)")[-1] == "_ = model(x)"
    assert kept("model", LAZY.replace("Lazy", ""), "model = Net()\n_ = model(x)")[-1] == "model = Net()"


RANDOM = """\
import torch
from tqdm import tqdm
data = torch.arange(3)
torch.manual_seed(0)
loader = torch.utils.data.DataLoader(data, shuffle=True)
"""


@pytest.mark.parametrize(
    "cell",
    [
        "xb, = next(iter(loader))",
        "for i, b in tqdm(enumerate(loader)):\n    pass",
        "for b in tqdm(loader):\n    pass",
        "w = torch.empty(3).normal_()",
        "s = torch.distributions.Normal(0., 1.).sample()",
        "d = torch.distributions.Normal(0., 1.)\ns = d.sample()",
        "s = torch.nn.Dropout(0.5)(data)",
        "go = lambda: torch.rand(1)\ns = go()",
        "b = list(loader)",
        "n = sum(1 for b in loader)",
        "def f(l):\n    for b in l: pass\nf(loader)",
        "def f(l):\n    for b in tqdm(l): pass\nr = f(loader)",
        "it = iter(loader)\nb = next(it)",
        "class D(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.d = torch.nn.Dropout(0.5)\n    def forward(self, x): return self.d(x)\nnet = D()\ny = net(data)",
        "def gen():\n    for b in loader: yield b\ng = gen()\nfor b in g:\n    pass",
        "def draw(): return helper()\ndef helper(): return torch.rand(1)\nq = draw()",
    ],
)  # fmt: skip
def test_what_draws_between_a_seed_and_what_is_needed(cell: str) -> None:
    assert last(cell) in kept("z", RANDOM, cell, "z = torch.randn(3)")


@pytest.mark.parametrize("drawn", ["torch.empty(3).normal_()", "torch.distributions.Normal(0.0, 1.0).sample()"])
def test_what_a_chained_call_draws_from(drawn: str) -> None:
    assert needed("w", f"import torch\nw = {drawn}").effects[1].unseeded == {"<random torch>"}


def test_functions_that_call_each_other_are_read_once_for_each_kind_of_arguments() -> None:
    functions = "".join(
        f"def f{i}(m, x):\n" + "".join(f"    f{j}(m, x)\n" for j in range(max(0, i - 3), i)) + "    return m(x)\n"
        for i in range(15)
    )
    methods = "".join(
        f"    def m{i}(self, x):\n        self.a{i} = self.m{(i + 1) % 9}(x)\n        return self.m{i * 7 % 9}(self.a{i})\n"
        for i in range(9)
    )
    use = "a = A()\na.m0(model)\nf14(model, x)"
    assert kept("a", MODEL, f"{functions}class A:\n{methods}", use)[-1] == "a.m0(model)"


@pytest.mark.parametrize(
    ("cell", "above", "state"),
    [
        ("n", "n = int(input('how many? '))", "typed by a person, at input()"),
        ("files", "files = !ls", "bound by files = !ls"),
        ("out", "%%capture out\nx = 1", "bound by %%capture out"),
        ("x", "import nbddp\nx = nbddp.launch(print)", "made by nbddp itself"),
    ],
)
def test_state(cell: str, above: str, state: str) -> None:
    found = needed(cell, above)
    assert [(one.name, one.why) for one in found.state] == [(cell, state)]
    assert not found.pieces


def test_what_a_statement_changes_that_cannot_run_again() -> None:
    found = needed("cfg, model", "model = M()\ncfg = {}", 'cfg["lr"] = float(input())')
    assert [(one.name, one.why) for one in found.state] == [("cfg", "typed by a person, at input()")]
    assert [piece.text for _, piece in found.pieces] == ["model = M()"]
    interrupted = Cell(f"{LOOP}print(1)", 2, stopped=6)
    statements = [*pieces(Cell(TRAINING, 1), transform), *pieces(interrupted, transform, 1)]
    found = find(statements, {"model", "optimizer", "lr"}, transform)
    assert {one.name: one.why for one in found.state} == dict.fromkeys(
        ("model", "optimizer"), "cell [2] failed while it was made"
    )
    assert "lr, epochs = 0.1, 2" in [piece.text for _, piece in found.pieces]


def test_what_nobody_binds() -> None:
    assert needed("x + y + len(z) + rank", "z = w").unknown == {"x", "y", "w"}
    assert needed("x", "from m import *").stars


def test_a_cell_that_failed_counts_up_to_where_it_did() -> None:
    cell = Cell("x = 1\ny = 1 / 0\nz = 2", 7, stopped=2)
    found = find(pieces(cell, transform), {"x", "y", "z"}, transform)
    assert [piece.text for _, piece in found.pieces] == ["x = 1"]
    assert [(one.name, one.why) for one in found.state] == [("y", "cell [7] failed while it was made")]
    assert found.unknown == {"z"}
