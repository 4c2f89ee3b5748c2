"""Settings: %config, a profile's ipython_config.py, and loading by the first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbddp._option_line import parse
from nbddp._options import OptionError
from tests.kernel import Kernel


def test_what_stands_on_the_line_wins() -> None:
    assert parse("--gpus 3", "--cpus 2 --plain").gpus == 3
    assert parse("--gpus 3", "--cpus 2 --plain").cpus is None
    assert parse("--gpus 3", "--cpus 2 --plain").plain
    assert parse("--gpu-ids 0,1", "--gpus 4").gpus is None
    assert parse("--env A=2", "--env A=1 --env B=1").env == {"A": "2", "B": "1"}
    assert parse("--out a", "--out b").out == ("a",)
    assert parse("", "--timeout 5").timeout == 5
    everything = "--cpus 2 --plain --keep --idle 60 --share --no-init"
    undone = parse("--no-plain --no-keep --no-share --init", everything)
    assert undone == parse("--cpus 2")
    assert parse("--no-bg", "--cpus 2 --bg train").bg is None
    # It says where results are put if there are any.
    assert parse("", "--out-device cuda:0").out_device == "cuda:0"
    with pytest.raises(OptionError, match="--out or --gather say which"):
        parse("--out-device cuda:0")


@pytest.fixture
def defaults(kernel: Kernel) -> Iterator[Kernel]:
    kernel.ok("%config DDPMagics.defaults = '--cpus 2 --env MODE=a'")
    yield kernel
    kernel.ok("%config DDPMagics.defaults = ''")


def test_defaults_of_a_notebook(defaults: Kernel) -> None:
    cell = "import os\nprint(world_size, os.environ['MODE'])"
    assert defaults.ok(f"%%ddp\n{cell}").lines == ["[rank 0] 2 a", "[rank 1] 2 a"]
    assert defaults.ok(f"%%ddp --gpus 1 --env MODE=b\n{cell}").lines[0] == "1 b"
    assert defaults.ok("%ddp world_size").value == {"text/plain": "2"}
    assert defaults.ok("%ddp --cpus 1 world_size").value == {"text/plain": "1"}


def test_defaults_that_cannot_be(defaults: Kernel) -> None:
    reply = defaults.run("%config DDPMagics.defaults = '--cpu 2'")
    assert "DDPMagics.defaults = '--cpu 2': unrecognized arguments: --cpu 2; did you mean --cpus?" in reply.text
    assert defaults.get("get_ipython().magics_manager.registry['DDPMagics'].defaults") == "--cpus 2 --env MODE=a"


def profile(folder: Path, text: str) -> dict[str, str | None]:
    """Make a profile with this configuration; return the environment in which a kernel has it."""
    (folder / "profile_default").mkdir(parents=True)
    (folder / "profile_default" / "ipython_config.py").write_text(f"c = get_config()\n{text}")
    return {"IPYTHONDIR": str(folder)}


def test_a_profile_sets_them(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    env = profile(tmp_path / "ipython", "c.DDPMagics.grace = 10\nc.DDPMagics.defaults = '--cpus 2'\n")
    kernel = new_kernel(env=env)
    assert kernel.ok("%config DDPMagics.grace").value == {"text/plain": "10.0"}
    assert kernel.ok("%ddp world_size").value == {"text/plain": "2"}
    # What a notebook sets holds for that notebook.
    kernel.ok("%config DDPMagics.defaults = '--cpus 1'")
    assert kernel.ok("%ddp world_size").value == {"text/plain": "1"}


def test_a_profile_that_is_wrong_says_so(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    env = profile(tmp_path / "ipython", "c.DDPMagics.defaults = '--cpu 2'\n")
    kernel = new_kernel(load=False, env=env)
    reply = kernel.run("%load_ext nbddp")
    assert "did you mean --cpus?" in reply.message + reply.text


def test_it_is_loaded_by_its_first_use(new_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    env = profile(tmp_path / "ipython", 'c.MagicsManager.lazy_magics = {"ddp": "nbddp"}\n')
    kernel = new_kernel(load=False, env=env)
    assert kernel.get("'nbddp' in __import__('sys').modules") is False
    assert kernel.ok("%%ddp --cpus 1\nprint('loaded')").text == "loaded\n"
    kernel = new_kernel(load=False, env=env)
    assert kernel.ok("x = %ddp --cpus 1 rank + 1\nx").value == {"text/plain": "1"}
