"""What a %%ddp cell is and does, in a real kernel."""

from __future__ import annotations

from collections.abc import Callable

import IPython
import pytest

from tests.kernel import Kernel


def test_ranks_run_the_cell_and_say_who_they_are(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 2\nprint('I am', rank, 'of', world_size, local_rank, device)")
    assert reply.lines == ["[rank 0] I am 0 of 2 0 cpu", "[rank 1] I am 1 of 2 1 cpu"]


def test_cell_sees_variables_functions_classes_and_imports(kernel: Kernel) -> None:
    kernel.ok(
        """
import math
from collections import OrderedDict
base = 10
def double(x):
    return 2 * x + base
class Point:
    def __init__(self, x): self.x = x
    def norm(self): return math.fabs(self.x)
p = Point(-3)
"""
    )
    reply = kernel.ok("%%ddp --cpus 1\nprint(double(4), p.norm(), type(p) is Point, list(OrderedDict(a=1)))")
    assert reply.text == "18 3.0 True ['a']\n"


def test_a_collective_works_without_any_setup(kernel: Kernel) -> None:
    kernel.ok("import torch, torch.distributed as dist")
    reply = kernel.ok("%%ddp --cpus 2\nt = torch.ones(2) * (rank + 1)\ndist.all_reduce(t)\nprint(t.tolist())")
    assert reply.lines == ["[rank 0] [3.0, 3.0]", "[rank 1] [3.0, 3.0]"]


def test_ranks_do_not_change_the_notebook(kernel: Kernel) -> None:
    kernel.ok("x = [1]")
    kernel.ok("%%ddp --cpus 1\nx.append(2)\ny = 3")
    assert kernel.get("x") == [1]
    assert kernel.get("'y' in globals()") is False


def test_out_brings_names_back_from_rank_0(kernel: Kernel) -> None:
    kernel.ok("import torch")
    kernel.ok("%%ddp --cpus 2 --out a,b -o c\na = torch.arange(3) + rank\nb = {'rank': rank}\nc = [a]")
    assert kernel.get("(a.tolist(), b, c[0] is a)") == ([0, 1, 2], {"rank": 0}, True)


def test_value_of_the_last_expression_is_shown(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 2\nrank + 41")
    assert reply.value is not None
    assert reply.value["text/plain"] == "41"
    assert reply.text == "[rank 1] 42\n"


def test_values_that_are_the_same_are_shown_once(kernel: Kernel) -> None:
    reply = kernel.ok("%%ddp --cpus 3\n'all the same'")
    assert reply.value == {"text/plain": "'all the same'"}
    assert reply.text == ""


def test_a_semicolon_hides_the_value(kernel: Kernel) -> None:
    assert kernel.ok("%%ddp --cpus 1\n1 + 1;").value is None


@pytest.mark.parametrize("name", ["rank", "device", "world_size", "local_rank"])
def test_the_notebooks_own_names_win(kernel: Kernel, name: str) -> None:
    kernel.ok(f"{name} = 'mine'")
    reply = kernel.ok(f"%%ddp --cpus 1\nprint({name})")
    assert reply.lines[0] == "mine"
    kernel.ok(f"del {name}")
    if name != "device":  # of which there is one on a machine without GPUs
        assert reply.lines[1:] == [
            f"nbddp: used as the notebook has it, on every rank: {name} = 'mine'. After del {name} ranks have their own"
        ]


def test_ipython_syntax_works_in_ranks(kernel: Kernel) -> None:
    kernel.ok("word = 'hi'")
    reply = kernel.ok(
        "%%ddp --cpus 1\n"
        "!echo shell $word {word}\n"
        "names = !echo captured\n"
        "print(names[0])\n"
        "import asyncio\n"
        "await asyncio.sleep(0)\n"
        "%time x = 5\n"
        "print(x)"
    )
    assert "shell hi hi" in reply.text
    assert "captured" in reply.text
    assert "5" in reply.text


def test_a_cell_magic_inside_the_cell(kernel: Kernel) -> None:
    kernel.ok("n = 3")
    assert "9" in kernel.ok("%%ddp --cpus 1\n%%time\nprint(n * n)").text


def test_globals_are_one_namespace(kernel: Kernel) -> None:
    kernel.ok("counter = 0\ndef bump():\n    global counter\n    counter += 1\n    return helper()")
    reply = kernel.ok("%%ddp --cpus 1\ndef helper():\n    return 'new'\nprint(bump(), bump(), counter)")
    assert reply.text == "new new 2\n"
    assert kernel.get("counter") == 0


def test_no_name_of_nbddps_own_is_in_the_way(kernel: Kernel) -> None:
    kernel.ok("CELL = CLOSURE = SOURCES = 'mine'")
    reply = kernel.ok("%%ddp --cpus 1\nprint(CELL, CLOSURE, SOURCES, [n for n in dir() if 'nbddp' in n])")
    assert reply.text == "mine mine mine ['__nbddp__']\n"


def test_a_cells_number_is_the_notebooks(new_kernel: Callable[..., Kernel]) -> None:
    kernel = new_kernel()  # whose first cell loads the extension
    assert "In[2]" in kernel.run("%%ddp --cpus 1\n1 / 0").traceback
    plain = kernel.run("1 / 0").traceback
    assert "In[3]" in plain or "In [3]" in plain or IPython.version_info < (8,)  # which tells no numbers
    assert kernel.run("%%ddp --cpus 1\nfor i in range(3").traceback.startswith("  Cell In[4], line 2\n    for i in")


def test_caches_slots_and_new_types_of_the_notebook(kernel: Kernel) -> None:
    kernel.ok(
        "import functools, dataclasses, typing\n"
        "@functools.lru_cache(maxsize=7)\ndef fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n"
        "@dataclasses.dataclass(slots=True)\nclass Point:\n    x: int = 1\n"
        "class Lazy:\n    @functools.cached_property\n    def value(self):\n        return 5\n"
        "    @functools.cache\n    def twice(self, n):\n        return 2 * n\n"
        "Id = typing.NewType('Id', int)\nlazy = Lazy()"
    )
    reply = kernel.ok(
        "%%ddp --cpus 1 --out p, back, l\np, back, l = Point(5), fib, lazy\n"
        "print(fib(30), fib.cache_parameters()['maxsize'], hasattr(p, '__dict__'), lazy.value, lazy.twice(4), Id(3))"
    )
    assert reply.text == "832040 7 False 5 8 3\n"
    assert kernel.get("p == Point(5), back is fib, type(l) is Lazy, l.value") == (True, True, True, 5)


def test_exit_ends_a_rank_as_it_ends_a_script(kernel: Kernel) -> None:
    assert kernel.ok("%%ddp --cpus 1\nprint('before')\nexit()\nprint('after')").text == "before\n"


@pytest.mark.parametrize("options", ["--cpus 1", "--cpus 1 --keep", "--cpus 1 --out y"])
def test_what_a_cell_took_is_freed_with_its_last_name(kernel: Kernel, options: str) -> None:
    # At once: a model on a GPU must not wait for the garbage collector.
    kernel.ok("import gc, weakref, torch\nx = torch.zeros(1000)\nleft = weakref.ref(x)\ngc.collect(); gc.disable()")
    try:
        kernel.ok(f"%%ddp {options}\ny = x.sum()")
        kernel.ok("del x")
        assert kernel.get("left() is None")
    finally:
        kernel.ok("gc.enable()\n%ddp stop")
