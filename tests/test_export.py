"""``nbddp export`` and ``%ddp export``: the script runs under plain torchrun, without nbddp, and gives the same."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nbddp._command import main
from nbddp._errors import ExportError
from nbddp._export import from_file
from tests.kernel import Kernel
from tests.test_readme import README

ROOT = str(Path(__file__).parent.parent)
NOTEBOOKS = sorted(Path(ROOT, "notebooks").glob("*.ipynb"))


def notebook(path: Path, *cells: str, tags: Sequence[str] = (), numbers: Sequence[int | None] = ()) -> Path:
    """Write a notebook; the tags are those of its last cell."""
    made = [new_code_cell(text) for text in cells]
    for cell, number in zip(made, numbers, strict=False):
        cell.execution_count = number
    made[-1].metadata["tags"] = list(tags)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Title"), *made]), path)
    return path


def script(tmp_path: Path, *cells: str) -> str:
    """Return the script of the last cell of a notebook."""
    return from_file(str(notebook(tmp_path / "n.ipynb", *cells)), output="-").text


def body(text: str) -> str:
    """Return what follows the process group in a script, up to where it is left."""
    inside = text.partition('if __name__ == "__main__":\n')[2]
    inside = "\n".join(line.removeprefix("    ") for line in inside.split("\n"))
    inside = inside.partition('init_process_group("gloo")\n')[2]
    return inside.strip().removesuffix("dist.destroy_process_group()").strip()


def torchrun(path: Path) -> str:
    """Run a script by the command that it names, where nbddp cannot be imported; return what its ranks printed."""
    blocker = path.parent / "without"
    blocker.mkdir(exist_ok=True)
    (blocker / "nbddp.py").write_text("raise ImportError('this is a machine without nbddp')\n")
    command = next(line.strip() for line in path.read_text().split("\n") if "torchrun --standalone" in line)
    # In an environment that borrows torch from another, there is no command of that name.
    launcher = f"{shlex.quote(sys.executable)} -m torch.distributed.run"
    # Each rank's output to a file of its own: in a common pipe their lines are mixed.
    logs = tempfile.mkdtemp(prefix="logs", dir=path.parent)
    command = command.replace("torchrun ", f"{launcher} --redirects 1 --log-dir {shlex.quote(logs)} ", 1)
    done = subprocess.run(
        command,
        shell=True,
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(blocker), "OMP_NUM_THREADS": "1", "TMPDIR": str(path.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return "".join(log.read_text() for log in sorted(Path(logs).rglob("stdout.log")))


def printed(text: str) -> list[str]:
    """Return what ranks printed in a notebook, line by line, in sorted order."""
    return sorted(match[1] for match in re.finditer(r"^(?:\[rank \d+\]|\(rank \d+\)) ?(.*)$", text, re.MULTILINE))


def same(one: Any, other: Any) -> bool:
    """Tell whether a result of the notebook is the one of the script, to the last bit."""
    if hasattr(one, "state_dict"):
        one = one.state_dict()
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_makes_a_script(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and cell.source.startswith("%%ddp") and "--keep" not in cell.source:
            exported = from_file(str(path), str(cell.execution_count), "-")
            compile(exported.text, "train.py", "exec")
            # All else is in the file.
            assert all("brought back" in exported.text.partition(f"#   {name}: ")[2][:12] for name in exported.missing)


@pytest.mark.parametrize(
    "path",
    # The others, which train for longer, are run by `make long`.
    [path for path in NOTEBOOKS if path.stem == "01_quickstart" or "NBDDP_LONG" in os.environ],
    ids=lambda path: path.stem,
)
def test_every_cell_of_our_notebooks(path: Path, new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernel = new_kernel(load=False, env={"NBDDP_PLAIN": "1", "OMP_NUM_THREADS": "1"}, cwd=str(path.parent))
    exported = 0
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        reply = kernel.run(cell.source, timeout=120)
        if not cell.source.startswith("%%ddp") or reply.status == "error":
            continue
        exported += 1
        target = tmp_path / f"cell{exported}.py"
        assert f"{target.name} is written" in kernel.ok(f"%ddp export -o {target}").text
        if not target.with_suffix(".state.pt").exists():
            from_notebook = from_file(str(path), str(cell.execution_count), "-").text
            assert code_of(from_notebook) == code_of(target.read_text())
        assert sorted(torchrun(target).splitlines()) == printed(reply.text)
        assert_same_results(kernel, target)
        assert_formatted(target)
    assert exported


def code_of(text: str) -> str:
    """Return a script without its docstring."""
    return text.split('"""', 2)[2]


def assert_same_results(kernel: Kernel, target: Path) -> None:
    """Assert that the notebook has the results of a script, to the last bit."""
    found = str(target.with_suffix(".results.pt"))
    names = torch.load(found, weights_only=False).keys()
    kernel.ok(
        f"import sys as _sys, torch as _torch\n_sys.path.insert(0, {ROOT!r})\nfrom tests.test_export import same as _same"
    )
    for name in names:
        assert kernel.get(f"_same({name}, _torch.load({found!r}, weights_only=False)[{name!r}])") is True, name


def assert_formatted(target: Path) -> None:
    """Assert that ruff would leave a script as it is, and finds nothing in it."""
    options = ["--isolated", "--no-cache", str(target)]
    for words in (["format", "--check", "--line-length", "120"], ["check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, *options], capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode()


ABOVE = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x) * scale
scale = 3.0
torch.manual_seed(1)
data = torch.randn(8, 2)
"""
FIRST = """\
%%ddp --cpus 2 --out model,first
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(Net())
for parameter in model.parameters():
    parameter.data.fill_(0.5)
first = [rank]
"""
SECOND = """\
%%ddp --cpus 2 --out total --gather own --env GREETING=hello --timeout 100
import asyncio
import os

class Doubled:
    # a class of the cell's own
    def __init__(self, of):
        self.of = of

    def __repr__(self):
        return '''two
    lines of ''' + str(self.of)

# the model comes from another cell
own = model(data[rank::world_size]).sum() * count
total = own.clone()
!echo not in a script
await asyncio.sleep(0)
torch.distributed.all_reduce(total)
print(os.environ["GREETING"], typed, Doubled(rank), made, extra.tolist())
round(total.item(), 3), world_size
"""


def test_what_only_the_notebook_has_is_saved_beside_the_script(
    new_kernel: Callable[..., Kernel], tmp_path: Path
) -> None:
    kernel = new_kernel(env={"NBDDP_PLAIN": "1", "OMP_NUM_THREADS": "1"}, cwd=str(tmp_path))
    kernel.ok(ABOVE)
    kernel.ok(FIRST, timeout=120)
    kernel.ok("model.eval()\nmodel.layer.bias.data += 1")
    assert kernel.run("typed = input()", stdin=["words"]).status == "ok"
    kernel.ok("exec('made = {1, 2}')")
    kernel.run("extra = torch.ones(2)\nextra += 1\n1 / 0\nextra += 100")
    kernel.ok("count = 0")
    for _ in range(2):
        kernel.ok("count += 2")
    reply = kernel.ok(SECOND, timeout=120)
    shown = kernel.ok("%ddp export -o second.py").text
    assert "second.py is written, with second.state.pt; timeout 100 torchrun --standalone" in shown
    text = (tmp_path / "second.py").read_text()
    assert "#   model: brought back by the %%ddp cell [3]\n" in text
    assert "#   typed: typed by a person, at input()\n" in text
    assert "#   made: bound by no cell of this session\n" in text
    assert text.count("count += 2") == 2
    assert "model.eval()" not in text, "the value that is saved is in that state already"
    assert "# !echo not in a script" in text
    assert "    # a class of the cell's own\n" in text.partition("__main__")[0]
    lines = torchrun(tmp_path / "second.py").splitlines()
    value = (reply.value or {})["text/plain"]
    assert sorted(lines) == sorted([*(line for line in printed(reply.text) if line != "not in a script"), value])
    assert_same_results(kernel, tmp_path / "second.py")
    # Of the same cells, a file knows less.
    path = notebook(tmp_path / "n.ipynb", ABOVE, FIRST, "typed = input()", "count = 4\nextra = torch.ones(2)", SECOND)
    exported = from_file(str(path), "5", "-")
    assert exported.missing == ("made", "model", "typed")
    assert "#   model: brought back by the %%ddp cell [2]\n" in exported.text
    supply = '# In the notebook: torch.save({"made": made, "model": model, "typed": typed}, "train.state.pt")'
    assert supply in exported.text


MAGIC = """\
{magic}
before = 1

model = 'new'
def fail():
    return 1 / 0
fail()
model = 'never'
"""


def test_a_cell_that_failed_below_a_magic(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel(env={"NBDDP_PLAIN": "1"})
    for magic in ("# none", "%%time", "\n%%time", "%%capture", "%%capture\n%%time", "%%prun -q"):
        kernel.ok("model = 'old'")
        kernel.run(MAGIC.format(magic=magic))
        kernel.ok("%%ddp --cpus 1 --dry-run\nprint(model)")
        assert "\nmodel = 'new'\n" in kernel.ok("%ddp export -o -").text, magic


def test_refusals_in_a_session(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernel = new_kernel(cwd=str(tmp_path))
    assert kernel.run("%ddp export").message == "%ddp export: no %%ddp cell has run yet in this session"
    kernel.ok("import threading\nexec('lock = threading.Lock()')")
    kernel.run("%%ddp --cpus 1\nlock.acquire()")
    reply = kernel.run("%ddp export")
    assert reply.error == "ExportError"
    assert reply.message == (
        "cannot save 'lock' (lock) beside the script: cannot pickle '_thread.lock' object. Only the notebook has it "
        "(bound by no cell of this session); make it in the cell, or in one above"
    )
    assert os.listdir(tmp_path) == []
    assert "a live session knows cells by number" in kernel.run("%ddp export --cell train").message
    assert "cell [3] of this session is no %%ddp cell" in kernel.run("%ddp export --cell 3").message
    assert "UsageError: %ddp export: unrecognized arguments: --what" in kernel.run("%ddp export --what").text
    kernel.ok("%%ddp --cpus 1\nx = 1")
    assert "    x = 1\n" in kernel.ok("%ddp export -o -").text
    kernel.ok("%ddp export")
    assert "train.py is there already; --force replaces it" in kernel.run("%ddp export").message
    kernel.ok("%ddp export --force")
    assert os.listdir(tmp_path) == ["train.py"]
    # A cell that takes what it brings back, and is run again, begins where it did at first.
    kernel.ok("y = 1")
    for _ in range(2):
        kernel.ok("%%ddp --cpus 1 --out y\ny = y + 1")
    shown = kernel.ok("%ddp export -o -").text
    assert "ran before; the script begins as it did at first" in shown
    assert "\ny = 1\n" in shown
    kernel.ok("%%ddp --cpus 1 --out y\ny = y * 2")
    shown = kernel.ok("%ddp export -o again.py").text
    assert "y, which was brought back by the %%ddp cell" in shown
    assert "has been bound anew since; what is saved is what it is now" in shown


def test_the_readme_shows_what_one_gets(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernel = new_kernel()  # the cells of other tests are in the history of the shared one
    blocks = re.findall(r"^```(?:python|py)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    shown = next(block for block in blocks if "__main__" in block)
    for block in blocks[:2]:
        kernel.ok(block, timeout=120)
    kernel.ok(f"%ddp export -o {tmp_path}/train.py")
    assert re.sub(r"Cell \[\d+\]", "Cell [2]", (tmp_path / "train.py").read_text()) == shown
    assert_formatted(tmp_path / "train.py")


ITS_DEVICE = (
    "import torch\ndevice = torch.device('cuda' if torch.cuda.is_available() else 'cpu')\nx = torch.ones(1).to(device)"
)


@pytest.mark.parametrize(
    ("cells", "parts"),
    [
        (["%%ddp --cpus 3\n1"], ["torchrun --standalone --nproc-per-node 3 train.py\n", 'init_process_group("gloo")']),
        (["%%ddp\n1"], ["--nproc-per-node gpu train.py\n", 'init_process_group("nccl", device_id=device)']),
        (["%%ddp --gpu-ids 4,5\n1"], ["    CUDA_VISIBLE_DEVICES=4,5 torchrun --standalone --nproc-per-node 2 train.py\n"]),
        (["%%ddp --cpus 2 --timeout 60 --max-restarts 3\n1"], ["    timeout 60 torchrun --standalone", " --max-restarts 3 "]),
        (["%%ddp --cpus 2 --env 'A=b c' --env LD_PRELOAD=x.so\n1"], ['os.environ["A"] = "b c"\n', "    LD_PRELOAD=x.so torchrun"]),
        (["%%ddp --gpus 2 --backend gloo\n1"], ['    dist.init_process_group("gloo")\n', "torch.cuda.set_device(device)"]),
        (["n = 4", "%%ddp --cpus $n\nn"], ["--nproc-per-node 4 "]),
        (["dist = 3", "%%ddp --cpus 2\nprint(dist)"], ["import torch.distributed as dist_\n", "    dist_.init_process_group"]),
        (["device = 'cpu'", "%%ddp --gpus 2\nprint(device)"], ["device = 'cpu'\n", 'own_device = torch.device("cuda"']),
        ([ITS_DEVICE, "%%ddp --gpus 2\nprint(x, device)"], ['else:\n    device = torch.device("cpu")\n\nx = torch.ones(1).to(device)\n']),
        (
            ["import torch\nx = torch.randn(3)", "%%ddp --cpus 2\nx + torch.randn(3)"],
            ["torch.manual_seed(0)\n\nx = torch.randn(3)", "torch.manual_seed(torch.initial_seed() + rank)"],
        ),
        (
            ["import torch\ntorch.manual_seed(5)\nx = torch.randn(3)", "%%ddp --cpus 2\ntorch.manual_seed(1)\nprint(x)"],
            ["torch.manual_seed(5)\nx = torch.randn(3)\n\nif __name", '("gloo")\n\n    torch.manual_seed(1)\n    print(x)\n'],
        ),
        (
            ["!pip install einops\n%cd data\n%matplotlib inline", "%%ddp --cpus 2\n1"],
            ["The notebook also ran:\n\n    !pip install einops\n    %cd data\n"],
        ),
        (["%%ddp --cpus 2\ndisplay(rank)"], ["display = print  # outside a notebook\n"]),
        (
            ["async def f(): return 1\nx = await f()", "%%ddp --cpus 1\nprint(x)"],
            ["async def prepare():\n    global x\n    x = await f()\n", "asyncio.run(prepare())\n"],
        ),
        (["s = 1", "%%ddp --cpus 1\ntext = '''a\nb\n'''\nprint(text, s)"], ["    text = '''a\nb\n'''\n    print(text, s)\n"]),
        (["%%ddp --cpus 2 --no-init --gather a\na = 1"], ['torch.save({"a": a}, Path(__file__).with_suffix(f".results.']),
        (
            ["%%ddp --cpus 2 --out model,o,x\nimport torch\nmodel = f()\no = torch.optim.SGD([])\nx = [1]"],
            ['"model": portable(model), "o": o.state_dict(), "x": x', "def portable(value):\n"],
        ),
        (
            ["%%ddp --cpus 2\nimport torch.distributed as d\nd.init_process_group('gloo')\nprint(d.get_rank())"],
            ["    if d.is_initialized():\n        d.destroy_process_group()\n"],
        ),
        (
            ["import torch\nimport os\nos.environ['A'] = '1'\nimport torch.nn as nn\nx = nn", "%%ddp --cpus 2\nprint(x)"],
            ['"""\n\nimport os\n\nos.environ[\'A\'] = \'1\'\n\nimport torch.distributed as dist\nimport torch.nn as nn\n\nx = nn\n'],
        ),
        (
            ["%%ddp --cpus 2 --out n,m,h\nn = 0\nfor i in range(3): n += 1\nh, m = [], DDP(f())\nfrom torch.nn.parallel import DistributedDataParallel as DDP"],
            ['{"n": n, "m": m.module.state_dict(), "h": h}'],
        ),
        (["%%ddp --cpus 2 --no-init\n%cd x\n!ls"], ["(in the notebook)\n\n    pass\n"]),
        (["%%ddp --cpus 2\n%%time\nx = 1\n%time print(x)"], ["    x = 1\n    print(x)\n"]),
    ],
)  # fmt: skip
def test_what_the_script_says(cells: list[str], parts: list[str], tmp_path: Path) -> None:
    text = script(tmp_path, *cells)
    compile(text, "train.py", "exec")
    for part in parts:
        assert part in text, text
    assert "import nbddp" not in text


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("x = 1", "x = 1"),
        ("x", "if rank == 0:\n    print(x)"),
        ("x, 1", "if rank == 0:\n    print((x, 1))"),
        ("x;", "x"),
        ("f(x)", "value = f(x)\nif rank == 0 and value is not None:\n    print(value)"),
        ("print(x)", "print(x)"),
        ("model.zero_grad()", "model.zero_grad()"),
        ("# a\nx  # b\n# c", "# a\nif rank == 0:\n    print(x)\n# c"),
        ("y = 1\n\n\n\n# b\nz = 2", "y = 1\n\n# b\nz = 2"),
        ("for i in range(2):\n    f(i)\n", "for i in range(2):\n    f(i)"),
        ("def g(): return rank\n\ng()", "value = g()\nif rank == 0 and value is not None:\n    print(value)"),
        ("y = 1\ndef g(a=y): pass", "y = 1\ndef g(a=y): pass"),
    ],
)
def test_the_body(cell: str, expected: str, tmp_path: Path) -> None:
    assert body(script(tmp_path, "import m\nx = model = f = m", f"%%ddp --cpus 2\n{cell}")) == expected


def test_spawned_workers_find_what_the_cell_defines(tmp_path: Path) -> None:
    text = script(tmp_path, "%%ddp --cpus 1\nimport torch\nclass D(torch.utils.data.Dataset):\n    pass\nd = D()")
    assert "\n\n\nclass D(torch.utils.data.Dataset):\n    pass\n\n\nif __name__" in text


KEPT = ("m = 2", "%%ddp --keep --cpus 2 --out m\nm = m * 3\nq = rank")
AUTO = ("m = 2", "%ddp auto on --cpus 2", "m = m * 3", "m += 1", "%ddp auto off")


@pytest.mark.parametrize(
    ("cells", "cell", "above", "expected"),
    [
        ([*KEPT, "%%ddp --keep\nprint(m, q)"], "3", "m = 2", "m = m * 3\nq = rank\n\nprint(m, q)"),
        ([*KEPT, "%ddp stop", "m = 5", "%%ddp --keep --cpus 2\nprint(m)"], "5", "m = 5", "print(m)"),
        ([*AUTO, "z = 1", "%%ddp --keep\nprint(m, z)"], "7", "m = 2\nz = 1", "m = m * 3\n\nm += 1\n\nprint(m, z)"),
        ([*AUTO, "%%ddp --cpus 2\nprint(m)"], "6", "m = 2", "print(m)"),
    ],
)
def test_a_cell_on_kept_ranks_takes_those_before_it_along(
    cells: list[str], cell: str, above: str, expected: str, tmp_path: Path
) -> None:
    text = from_file(str(notebook(tmp_path / "n.ipynb", *cells)), cell, "-").text
    assert body(text) == expected
    assert re.sub(r"\n+", "\n", text.partition('"""\n\n')[2].partition("\n\nif __name__")[0]).endswith(above)
    assert "--nproc-per-node 2 " in text


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (
            "m = 5",
            r"cell \[2\] has taken m there, which cell \[3\] changes in the notebook since; put what it needs into",
        ),
        ("k = m", r"cell \[2\] has taken m there, which cell \[3\] uses in the notebook since; "),
        ("%ddp push m", "goes on in kept ranks that %ddp push m has given something; "),
        ("%%ddp --keep --on 0\nm = 1", r"goes on in kept ranks, and cell \[3\] ran --on some of them; "),
    ],
)
def test_what_kept_ranks_had_that_no_script_has(between: str, message: str, tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", *KEPT, between, "%%ddp --keep\nprint(m)")
    with pytest.raises(ExportError, match=message):
        from_file(str(path), "4", "-")


def test_a_chain_of_kept_cells_gives_the_same(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    kernel = new_kernel(env={"NBDDP_PLAIN": "1", "OMP_NUM_THREADS": "1"}, cwd=str(tmp_path))
    kernel.ok("m = 2")
    kernel.ok("%%ddp --keep --cpus 2\nm = m * 3 + rank\nq = 0", timeout=120)
    kernel.ok("%ddp auto on")
    kernel.ok("q += m")
    kernel.ok("%ddp auto off")
    for _ in range(2):
        reply = kernel.ok("%%ddp --keep\nq += 1\nprint(m, q)")
    kernel.ok("%ddp export -o train.py")
    assert set(printed(reply.text)) <= set(torchrun(tmp_path / "train.py").splitlines())
    kernel.ok("%ddp stop")


TWO = ("%%ddp --cpus 1\na = 1", "%%ddp --cpus 2\nb = 2")


def test_which_cell(tmp_path: Path) -> None:
    unnumbered = str(notebook(tmp_path / "a.ipynb", "x = 1", *TWO, tags=["train", "long"]))
    assert "    b = 2\n" in from_file(unnumbered, "train", "-").text
    assert "    a = 1\n" in from_file(unnumbered, "2", "-").text
    numbered = str(notebook(tmp_path / "b.ipynb", "x = 1", *TWO, numbers=[4, 9, 7]))
    assert "    a = 1\n" in from_file(numbered, "9", "-").text
    assert from_file(numbered, "7", "-").command == "torchrun --standalone --nproc-per-node 2 train.py"


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        (["x = 1"], "", "n.ipynb has no %%ddp cell; nbddp exports cells that begin with %%ddp"),
        (TWO, "", "n.ipynb has 2 %%ddp cells; say which by --cell NUMBER or --cell TAG\n    [1]  %%ddp --cpus 1  a = 1\n"),
        (TWO, "--cell eval", "--cell eval: no %%ddp cell of n.ipynb has this tag\n    [1]  "),
        (TWO, "--cell 3", "--cell 3: cell [3] of n.ipynb is not there; these are\n    [1]  "),
        (["x = 1", TWO[0]], "--cell 1", "--cell 1: cell [1] of n.ipynb is no %%ddp cell; these are\n    [2]  "),
        (["%%ddp --cpus 2\nx = ("], "", "cell [1] has a syntax error on line 2: '(' was never closed"),
        (["%%ddp --gpu 2\nx"], "", "cell [1], %%ddp --gpu 2: unrecognized arguments: --gpu 2; did you mean --gpus?"),
        (["%%ddp -h\n"], "", "cell [1] only asks for help: %%ddp -h"),
        (["%%ddp --cpus 2\nx = 1\ny = !ls"], "", "cell [1], line 3: y = !ls has no counterpart in a script"),
        (["%%ddp --cpus 2\nif rank:\n    %cd x"], "", "cell [1], line 2 uses get_ipython(), or a magic inside a statement"),
        (["%%ddp --cpus 2\n%%bash\nls"], "", "cell [1] is no Python: it begins with %%bash"),
        (["%%ddp --cpus 2 --out y\nx = 1"], "", "cell [1]: --out or --gather asks for y, which the cell never binds"),
        (["import nbddp", "%%ddp --cpus 2\nnbddp.launch"], "", "cell [2] uses nbddp itself"),
        (TWO[:1], "-o no/where.py", "there is no folder"),
        (TWO[:1], "-o .", "that is a folder; give the name of a file in it"),
        (TWO[:1], "-o train", "the name of a script ends in .py"),
        (TWO[:1], "-o there.py", "there.py is there already; --force replaces it, -o gives the script another name"),
    ],
)  # fmt: skip
def test_refusals(
    cells: list[str], options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path / "n.ipynb", *cells)
    (tmp_path / "there.py").write_text("mine\n")
    assert main(["export", "n.ipynb", *options.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("nbddp export: ")
    assert message in shown.err
    assert sorted(os.listdir(tmp_path)) == ["n.ipynb", "there.py"]
    assert (tmp_path / "there.py").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no notebook n.ipynb"),
        ("x = 1", "n.ipynb is no notebook: "),
        ('{"cells": []}', "n.ipynb is no notebook: "),
        ('{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}', "n.ipynb is in nbformat 3"),
        (
            '{"nbformat": 4, "nbformat_minor": 5, "metadata": {"language_info": {"name": "R"}}, "cells": []}',
            "n.ipynb is a notebook of R",
        ),
    ],
)
def test_what_is_no_notebook(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("n.ipynb").write_text(content)
    assert main(["export", "n.ipynb"]) == 2
    assert capsys.readouterr().err.startswith(f"nbddp export: {message}")
    assert "n.py" not in os.listdir(tmp_path)


def test_exit_status_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path / "n.ipynb", "import helpers\nx = helpers.x", "%%ddp --cpus 2\nprint(x)")
    (tmp_path / "helpers.py").write_text("x = 1\n")
    (tmp_path / "elsewhere").mkdir()
    assert main(["export", "n.ipynb"]) == 0
    assert capsys.readouterr().out == "n.py is written; torchrun --standalone --nproc-per-node 2 n.py\n"
    assert os.stat("n.py").st_mode & 0o777 == 0o666 & ~_umask()
    assert main(["export", "n.ipynb", "--force", "-o", "elsewhere/n.py"]) == 0
    assert "it imports helpers from" in capsys.readouterr().err
    notebook(tmp_path / "m.ipynb", "%%ddp --cpus 2\nprint(x)", "x = 1")
    assert main(["export", "m.ipynb"]) == 1
    shown = capsys.readouterr()
    assert "only a running notebook has x (bound only below, by cell [2])" in shown.err
    assert "# What only the notebook had, and what is still to be supplied:\n" in Path("m.py").read_text()


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def test_a_disk_that_is_full(small_disk: Path, tmp_path: Path) -> None:
    path = str(notebook(tmp_path / "n.ipynb", f"%%ddp --cpus 1\nx = '{'x' * 100_000}'"))
    with pytest.raises(ExportError, match=r"train\.py cannot be written: No space left on device"):
        from_file(path, output=str(small_disk / "train.py"))
    assert os.listdir(small_disk) == []


def test_a_notebook_is_run_as_before(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", "print('it ran')")
    done = subprocess.run([sys.executable, "-m", "nbddp", str(path)], capture_output=True, text=True, check=True)
    assert "it ran\n" in done.stdout


def test_what_a_cell_binds_in_a_loop_is_its_own(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", "%%ddp --cpus 2\nfor i in range(3):\n    last = i\nprint(last)")
    assert from_file(str(path), "1", "-").missing == ()


def test_what_a_launch_was_given_is_as_it_was(tmp_path: Path) -> None:
    above = "import nbddp\nx = [1, 2]\ntotal = nbddp.launch(sum, x, cpus=2)"
    assert from_file(str(notebook(tmp_path / "n.ipynb", above, "%%ddp --cpus 2\nprint(x)")), "2", "-").missing == ()
    assert from_file(str(notebook(tmp_path / "m.ipynb", above, "%%ddp --cpus 2\nprint(total)")), "2", "-").missing == (
        "total",
    )


def test_the_defaults_of_a_session_are_its_options(kernel: Kernel) -> None:
    kernel.ok("%config DDPMagics.defaults = '--cpus 3'")
    try:
        kernel.ok("%%ddp\nprint(rank)")
        assert "--nproc-per-node 3" in kernel.ok("%ddp export -o -").text
    finally:
        kernel.ok("%config DDPMagics.defaults = ''")
