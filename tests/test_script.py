"""The generated script, kept and run by plain torchrun."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nbddp._pickling import Pickler
from nbddp._script import EMBED_LIMIT, Cell, Script, Setup
from tests.kernel import Kernel


def torchrun(path: Path, *, ranks: int = 2, **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--rdzv-backend",
        "nbddp",
        "--rdzv-endpoint",
        "127.0.0.1:0",
    ]
    command += ["--log-dir", str(path.parent / "logs")]
    return subprocess.run(
        [*command, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("size", [10, EMBED_LIMIT])
def test_a_kept_script_runs_under_plain_torchrun(kernel: Kernel, tmp_path: Path, size: int) -> None:
    path = tmp_path / "kept script.py"
    (tmp_path / "near.py").write_text("VALUE = 'found'\n")
    kernel.ok(
        f"import torch, sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        f"import near, torch.distributed as dist\nw = torch.ones({size})\n"
        "class Net:\n    def total(self, w): return w.sum()"
    )
    cell = "t = Net().total(w) * (rank + 1)\ndist.all_reduce(t)\n"
    cell += "print(f'total {int(t)} {near.VALUE} {device}\\n', end='')\nt"
    reply = kernel.ok(f"%%ddp --cpus 2 --keep-script '{path}'\n{cell}")
    assert f"torchrun --nproc-per-node 2 {path}" in reply.text
    run = torchrun(path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"total {3 * size} found cpu") == 2
    assert run.stdout.count(f"tensor({3.0 * size:g}.)" if size < 1000 else "tensor(") == 1
    assert path.stat().st_mode & 0o777 == 0o600
    # Small, it is one file that shows the cell; large, the data lies beside it.
    assert (tmp_path / "kept script.py.closure").exists() is (size > 1000)
    text = path.read_text()
    assert cell in text
    assert len(text) < 20_000


def test_a_kept_script_fails_as_a_script_does(kernel: Kernel, tmp_path: Path) -> None:
    path = tmp_path / "kept.py"
    kernel.run(f"%%ddp --cpus 2 --keep-script {path}\nraise ValueError('in the cell')")
    run = torchrun(path)
    assert run.returncode == 1
    assert "ValueError: in the cell" in run.stderr
    assert "----> 2 raise ValueError('in the cell')" in run.stderr


def test_dry_run_can_keep_the_script(kernel: Kernel, tmp_path: Path) -> None:
    path = tmp_path / "kept.py"
    kernel.ok(f"%%ddp --cpus 2 --dry-run --keep-script {path}\nprint(f'from {{rank}}\\n', end='')")
    assert sorted(torchrun(path).stdout.split("\n")) == ["", "from 0", "from 1"]


def test_without_torchrun_it_says_how_to_run_it(kernel: Kernel, tmp_path: Path) -> None:
    path = tmp_path / "kept.py"
    kernel.ok(f"%%ddp --cpus 1 --dry-run --keep-script {path}\nprint(1)")
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"run this with torchrun: torchrun --nproc-per-node 2 {path}" in run.stderr


def test_a_missing_folder_is_said_before_launch(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 1 --keep-script /no/such/place/run.py\nprint('ran')")
    assert "--keep-script /no/such/place/run.py: there is no folder /no/such/place; make it first" in reply.stderr
    assert "ran\n" not in reply.text


CELLS = [
    "print('plain')",
    "x = '''triple'''\n",
    'x = """triple"""',
    "s = 'ends with a backslash\\\\'",
    "# ends with a quote '",
    "print('tab\\t', \"both\")\n\n\n",
    "naïve = 'ü ☃'",
    "{braces} = {1: 2}.items()",
    "%time x",
    "r'''raw'''",
    "",
    "'\\x00'",
    "a = '\r'",
]


@pytest.mark.parametrize("source", CELLS)
def test_any_cell_survives_the_script(source: str) -> None:
    script = Script(Cell(source, "<cell>", 1), Setup(), Pickler({}).snapshot({}))
    call = ast.parse(script.text()).body[2]
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    arguments = {k.arg: ast.literal_eval(k.value) for k in call.value.keywords}
    assert arguments["cell"] == source


def test_large_data_is_not_in_the_script(tmp_path: Path) -> None:
    script = Script(Cell("x", "<cell>", 1), Setup(), Pickler({}).snapshot({"x": torch.zeros(1 << 20)}))
    assert not script.embeds_closure()
    assert len(script.text("data")) < 2000


def test_the_script_of_a_run_is_deleted(kernel: Kernel) -> None:
    reply = kernel.ok(
        "%%ddp --cpus 1\nimport os, __main__\nfolder = os.path.dirname(__main__.__file__)\n"
        "print(__main__.__file__, oct(os.stat(folder).st_mode), oct(os.stat(__main__.__file__).st_mode))"
    )
    path, folder_mode, mode = reply.text.split()
    assert folder_mode.endswith("700")
    assert mode.endswith("600")
    assert not os.path.exists(path)


def test_it_is_deleted_after_a_failure_too(kernel: Kernel) -> None:
    reply = kernel.run("%%ddp --cpus 1\nimport __main__\nprint(__main__.__file__)\n1/0")
    assert not os.path.exists(reply.text.strip())


def test_hostile_names_of_the_temporary_directory(new_kernel: Callable[..., Kernel], private_folders: Path) -> None:
    folder = private_folders / ("with space % ' \" ü {x} " + "x" * 100)
    folder.mkdir()
    kernel = new_kernel(env={"TMPDIR": str(folder)}, cwd=str(private_folders))
    reply = kernel.ok(
        "%%ddp --cpus 2 --out path\nimport __main__\npath = __main__.__file__\nprint(path.count('x' * 100))"
    )
    assert reply.lines == ["[rank 0] 1", "[rank 1] 1"]
    assert kernel.get("path").startswith(str(folder))
    kernel.close()
    assert list(folder.iterdir()) == []
    folder.rmdir()
