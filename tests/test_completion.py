"""Tab, in a kernel and in IPython itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel import Kernel

# What is offered must be among the matches; what is not must be missing.
CASES = [
    ("%%ddp --g", {"--gpus", "--gpu-ids", "--gather"}, {"--cpus"}),
    ("%%ddp --gpus 2 --ou", {"--out", "--out-device"}, {"--gpus"}),
    ("%%ddp --gpus 2 --backend ", {"gloo"}, {"--out", "loss"}),
    ("%%ddp --backend gl", {"gloo"}, {"nccl"}),
    ("%%ddp --backend=gl", {"gloo"}, {"nccl"}),
    ("%%ddp --out lo", {"loss", "loader"}, {"model"}),
    ("%%ddp --gather loss,lo", {"loader"}, {"model"}),
    ("%%ddp --gather loss,loader --gp", {"--gpus"}, {"loss"}),
    ("%%ddp --out-device c", {"cpu", "cuda:0"}, {"callable"}),
    ("%ddp st", {"status", "stacks"}, {"log"}),
    ("%ddp lo", {"log", "loss", "loader"}, {"status"}),
    ("%ddp --cp", {"--cpus"}, {"--gpus"}),
    ("%ddp log --ta", {"--tail"}, {"--rank"}),
    ("%ddp explain lo", {"loss", "loader"}, {"log"}),
    ("x = %ddp --cp", {"--cpus"}, {"--gpus"}),
    ("x = %ddp --cpus 2 --backend gl", {"gloo"}, {"nccl"}),
    # An expression is completed as Python is.
    ("%ddp --cpus 2 model.conju", {"conjugate"}, {"--cpus"}),
    ("y = 1\n%ddp --cp", {"--cpus"}, {"--gpus"}),
]
NAMES = "loss, loader, model = 1.0, 2.0, 3.0"


def last_parts(matches: list[str]) -> set[str]:
    """Return matches without what stands before the word: jedi and IPython differ in how much they repeat."""
    return {match.rpartition(".")[2] for match in matches}


@pytest.mark.parametrize(("line", "offered", "not_offered"), CASES)
def test_in_a_kernel(kernel: Kernel, line: str, offered: set[str], not_offered: set[str]) -> None:
    kernel.ok(NAMES)
    reply = kernel.client.complete(line, len(line), reply=True, timeout=30)
    matches = last_parts(reply["content"]["matches"])
    assert offered <= matches
    assert not not_offered & matches


def test_in_ipython_itself(tmp_path: Path) -> None:
    lines = [line for line, _, _ in CASES if "\n" not in line]
    path = tmp_path / "session.ipy"
    path.write_text(
        f"%load_ext nbddp\n{NAMES}\nimport json\nfrom IPython.core.completer import provisionalcompleter\n"
        "def complete(line):\n    with provisionalcompleter():\n"
        "        return [one.text for one in get_ipython().Completer.completions(line, len(line))]\n"
        f"print(json.dumps([complete(line) for line in {lines!r}]))\n"
        "%unload_ext nbddp\nprint(complete('%ddp sta'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        cwd=tmp_path,
    )
    shown, after = run.stdout.splitlines()[-2:]
    cases = [case for case in CASES if "\n" not in case[0]]
    # The terminal's title may stand before it.
    shown = shown[shown.index("[[") :]
    for matches, (line, offered, not_offered) in zip(json.loads(shown), cases, strict=True):
        assert offered <= last_parts(matches), line
        assert not not_offered & last_parts(matches), line
    assert "status" not in after


def test_keywords_of_launch(kernel: Kernel) -> None:
    kernel.ok("import nbddp")
    line = "nbddp.launch(print, cp"
    reply = kernel.client.complete(line, len(line), reply=True, timeout=30)
    assert "cpus=" in reply["content"]["matches"]
