"""The generated script: what torchrun runs on every rank.

It is short enough to read: the cell as it was typed, what the notebook gave it, and two calls. With ``--keep-script``
it is the cell's export, and plain ``torchrun`` runs it anywhere that nbddp is installed.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from nbddp._snapshot import Snapshot

# The file name of the cell that `nbddp.launch` makes: one line, which calls the function.
CALLER = "<nbddp.launch>"

# Up to this many bytes the closure stands in the script itself; a larger one lies beside it.
EMBED_LIMIT = 1 << 20


@dataclass(frozen=True)
class Cell:
    """The cell as the ranks are to run it.

    Attributes:
        source: Its text, without the ``%%ddp`` line.
        filename: What tracebacks call it; the notebook's own name for the cell's code.
        number: The notebook's execution count, for "Cell In[5]".
        header: What stands above `source` in the notebook's cell: the magic line.
        is_python: Whether it is Python as it stands, without magics.
    """

    source: str
    filename: str
    number: int
    header: str = ""
    is_python: bool = False


@dataclass(frozen=True)
class Setup:
    """What the ranks do around the cell.

    Attributes:
        init: Whether to initialise the process group.
        backend: The process group's backend; None for nccl on GPUs and gloo without.
        gpus: Whether each rank has a GPU of its own.
        define: Which of rank, local_rank, world_size and device to define.
        out: Names to bring back from rank 0.
        gather: Names to bring back from every rank.
        colors: The notebook's traceback colours.
        keep: Whether the ranks wait for the notebook's cells, one after another.
    """

    init: bool = True
    backend: str | None = None
    gpus: bool = False
    define: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    gather: tuple[str, ...] = ()
    colors: str = ""
    keep: bool = False


@dataclass
class Script:
    """Everything that the text of the script is made from.

    Attributes:
        cell: The cell.
        setup: What happens around it.
        closure: The notebook's names.
        sources: By file name, the text and the execution count of the cells that code came from by value.
        search_path: Folders of the notebook's own to import from.
        ranks: How many ranks the cell was written for; only mentioned.
    """

    cell: Cell
    setup: Setup
    closure: Snapshot
    sources: Mapping[str, tuple[str, int | None]] = field(default_factory=dict)
    search_path: Sequence[str] = ()
    ranks: int = 1

    def without_cell(self, empty: Snapshot) -> Script:
        """Return the script of ranks that wait for their cells; `empty` is the snapshot of no names."""
        cell = replace(self.cell, source="", header="")
        return replace(
            self, cell=cell, setup=replace(self.setup, keep=True, out=(), gather=()), closure=empty, sources={}
        )

    def embeds_closure(self) -> bool:
        """Tell whether the closure stands in the text itself."""
        return self.closure.nbytes <= EMBED_LIMIT

    def text(self, closure_path: str | None = None) -> str:
        """Return the script.

        Args:
            closure_path: Where the closure lies if it is too large to embed; a bare name is looked for beside the
                script.
        """
        closure: bytes | str | None = closure_path
        if self.embeds_closure():
            closure = base64.b85encode(b"".join(self.closure.chunks()))
        arguments = {"path": list(self.search_path), **asdict(self.cell), **asdict(self.setup)}
        del arguments["source"]
        return _TEMPLATE.format(
            ranks=self.ranks,
            cell=_literal(self.cell.source),
            arguments="".join(f"    {name}={value!r},\n" for name, value in arguments.items()),
            sources="".join(
                f"        {name!r}: ({_literal(text)}, {n}),\n" for name, (text, n) in self.sources.items()
            ),
            closure=f"{closure!r}",
        )

    def write(self, path: str, closure_path: str | None = None) -> None:
        """Write the script, readable by its owner only.

        Raises:
            OSError: It could not be written.
        """
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(self.text(closure_path))

    def export(self, path: str) -> None:
        """Write the script to `path` for good, with the closure beside it if it is large.

        Raises:
            OSError: It could not be written.
        """
        beside = None
        if not self.embeds_closure():
            beside = f"{path}.closure"
            if os.path.exists(beside):
                os.unlink(beside)
            self.closure.write(beside)
        self.write(path, os.path.basename(beside) if beside else None)


# The names of the cell and of the notebook have this namespace to themselves, but for one that no one else would use.
_TEMPLATE = '''\
"""A notebook cell, made into a script by nbddp. Outside the notebook:

    torchrun --nproc-per-node {ranks} THIS_FILE
"""

import nbddp._rank as __nbddp__

# At module level, so that workers started by "spawn" or "forkserver", which import this file, find the names too.
__nbddp__.restore(
    globals(),
    # The cell, as it stands below its %%ddp line.
    cell={cell},
{arguments}    # The cells that defined what came along, for tracebacks and inspect.getsource.
    sources={{
{sources}    }},
    # What the cell uses of the notebook, names and values: pickled, or the file that holds it.
    closure={closure},
)

if __name__ == "__main__":
    __nbddp__.run(globals())
'''


def _literal(text: str) -> str:
    """Return a string literal that shows `text` as it is wherever that is possible."""
    plain = all(c.isprintable() or c in "\n\t" for c in text)
    if plain and "'''" not in text and not text.endswith(("'", "\\")):
        return f"r'''{text}'''"
    return repr(text)
