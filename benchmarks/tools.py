"""The ways to run code on two ranks from a notebook that `peers` compares: what their users type.

Code for ranks says what it has to say with ``say(...)``; `rank`, `torch` and `dist` are there, the process group is.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

# What a notebook has before anything else.
NOTEBOOK = "import os, socket, time\nimport torch, torch.distributed as dist"

# The parts of a script, or of a function, that make it a rank.
_JOIN = "dist.init_process_group('gloo')\nrank = dist.get_rank()\n"
_LEAVE = "\ndist.destroy_process_group()"

_FREE_PORT = """
def free_port():
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]
"""


class CannotError(Exception):
    """The tool has no way to do this; the message says why."""


class Tool:
    """A way to run code on ranks.

    Attributes:
        name: What the table calls it.
        ranks: How many ranks it runs code on.
        alone: Whether it needs a kernel of its own: it changes what other cells do, or what other tools can do.
    """

    name = ""
    alone = False
    ranks = 2

    def load(self) -> Sequence[str]:
        """Return the cells that come before the first that runs on ranks."""
        return []

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        """Return the cells that run code on two ranks.

        Args:
            code: The code.
            takes: A variable of the notebook that it uses.
            gives: A variable of rank 0 that the notebook has afterwards.

        Raises:
            CannotError: There is no way.
        """
        raise NotImplementedError


def _printing(code: str) -> str:
    return code.replace("say(", "print(")


class Fresh(Tool):
    """``%%ddp``."""

    name = "%%ddp"

    def load(self) -> Sequence[str]:
        return ["%load_ext nbddp"]

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        out = f" --out {gives}" if gives else ""
        return [f"%%ddp --cpus 2{out}\n{_printing(code)}"]


class Kept(Fresh):
    """``%%ddp --keep``."""

    name = "%%ddp --keep"

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        out = f" --out {gives}" if gives else ""
        # The notebook's new value: kept ranks go on with their own.
        push = [f"%ddp push {takes}"] if takes else []
        return [*push, f"%%ddp --keep --cpus {self.ranks}{out}\n{_printing(code)}"]


class KeptOfEight(Kept):
    """The same with eight ranks."""

    name = "%%ddp --keep, 8 ranks"
    alone = True
    ranks = 8


class Launch(Fresh):
    """``nbddp.launch``."""

    name = "nbddp.launch"

    def load(self) -> Sequence[str]:
        return ["import nbddp\n%load_ext nbddp"]

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        body = _function("rank = dist.get_rank()\n" + code, takes, gives)
        given = f", {takes}" if takes else ""
        return [
            f"{body}for said, result in (results := nbddp.launch(work{given}, cpus=2)):\n    print(*said, sep='\\n')",
            *_first(gives),
        ]


def _function(code: str, takes: str, gives: str) -> str:
    """Return the definition of a function that returns what it has to say, and a result."""
    result = f"{gives} if rank == 0 else None" if gives else "None"
    lines = f"said = []\n{code.replace('say(', 'said.append(')}\nreturn said, {result}"
    return f"def work({takes}):\n    import torch, torch.distributed as dist\n{textwrap.indent(lines, '    ')}\n"


def _first(gives: str) -> list[str]:
    return [f"{gives} = results[0][1]"] if gives else []


class Px(Tool):
    """ipyparallel's ``%%px``, on engines of which the process group was made by hand."""

    name = "ipyparallel %%px"

    def load(self) -> Sequence[str]:
        return [
            "import ipyparallel\n"
            "cluster = ipyparallel.Cluster(n=2)\n"
            "client = cluster.start_and_connect_sync()\n"
            "view = client[:]\nview.block = True\nview.activate()\n"
            f"{_FREE_PORT}\n"
            "view.scatter('rank', range(2), flatten=True)\n"
            "view['port'] = free_port()",
            "%%px\n"
            "import torch, torch.distributed as dist\n"
            "dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)",
        ]

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        push = [f"view['{takes}'] = {takes}"] if takes else []
        pull = [f"{gives} = client[0]['{gives}']"] if gives else []
        return [*push, f"%%px\n{_printing(code)}", *pull]


class NbDistributed(Tool):
    """nbdistributed's ``%%distributed``."""

    name = "nbdistributed"
    alone = True  # from then on every cell goes to its ranks

    def load(self) -> Sequence[str]:
        return ["%load_ext nbdistributed", "%dist_init -n 2"]

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        if takes:
            raise CannotError("it sends no variables to its ranks")
        if gives:
            raise CannotError("it brings no values back, only their names and types")
        return [f"%%distributed\n{_printing(code)}"]


class Torchrunx(Tool):
    """torchrunx's ``Launcher.run``."""

    name = "torchrunx"

    def load(self) -> Sequence[str]:
        return ["import torchrunx"]

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        body = _function("rank = dist.get_rank()\n" + code, takes, gives)
        given = f", {takes}" if takes else ""
        return [
            f"{body}launcher = torchrunx.Launcher(hostnames=['localhost'], workers_per_host=2, backend='gloo')\n"
            f"results = launcher.run(work{given}).results['localhost']\n"
            "for said, result in results:\n    print(*said, sep='\\n')",
            *_first(gives),
        ]


class NotebookLauncher(Tool):
    """accelerate's ``notebook_launcher``."""

    name = "accelerate"
    alone = True  # it forks the notebook's own process, with whatever threads that has by then

    def load(self) -> Sequence[str]:
        return [f"from accelerate import notebook_launcher\n{_FREE_PORT}"]

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        if gives:
            raise CannotError("what the function returns is dropped")
        body = textwrap.indent(_JOIN + _printing(code) + _LEAVE, "    ")
        call = "notebook_launcher(work, num_processes=2, use_port=str(free_port()))"
        return [f"def work():\n{body}\n{call}"]


class Spawn(Tool):
    """``torch.multiprocessing.spawn``, of a function in a file: it cannot find one of the notebook's."""

    name = "mp.spawn"

    def __init__(self) -> None:
        self._count = 0

    def load(self) -> Sequence[str]:
        return [f"import torch.multiprocessing as mp\n{_FREE_PORT}"]

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        self._count += 1
        names = "".join(f", {name}" for name in (takes, gives) if name)
        result = code.replace(f"{gives} = ", f"{gives}[:] = ") if gives else code
        join = "dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)\n"
        body = textwrap.indent(join + _printing(result) + _LEAVE, "    ")
        shared = f"{gives} = torch.empty(1 << 26).share_memory_()\n" if gives else ""
        return [
            f"%%writefile spawned{self._count}.py\nimport torch, time, torch.distributed as dist\n"
            f"def work(rank, port{names}):\n{body}\n",
            f"import spawned{self._count}\n{shared}"
            f"mp.spawn(spawned{self._count}.work, (free_port(),{names[1:]}), nprocs=2)",
        ]


class Torchrun(Tool):
    """torchrun on a file that the notebook has written; data goes through files as well."""

    name = "!torchrun"

    def cells(self, code: str, *, takes: str = "", gives: str = "") -> Sequence[str]:
        load = f"{takes} = torch.load('{takes}.pt', mmap=True)\n" if takes else ""
        save = f"\nif rank == 0: torch.save({gives}, '{gives}.pt')" if gives else ""
        script = f"import torch, time, torch.distributed as dist\n{_JOIN}{load}{_printing(code)}{save}{_LEAVE}\n"
        return [
            *([f"torch.save({takes}, '{takes}.pt')"] if takes else []),
            f"%%writefile script.py\n{script}",
            "!torchrun --standalone --nproc-per-node 2 script.py",
            *([f"{gives} = torch.load('{gives}.pt')"] if gives else []),
        ]


TOOLS = (Fresh(), Kept(), Px(), NbDistributed(), Torchrunx(), NotebookLauncher(), Spawn(), Torchrun())
