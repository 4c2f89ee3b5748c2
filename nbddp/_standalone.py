"""The exported script: what a cell needs, the process group written out, and the cell, as a person would write it."""

from __future__ import annotations

import ast
import io
import os
import re
import shlex
import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nbddp._cells import Piece, Transform, dotted, immediate, quoted
from nbddp._idioms import GENERATORS
from nbddp._imports import Imports
from nbddp._names import Uses
from nbddp._needed import Needed, State
from nbddp._options import Options

# Variables that have had their effect before a line of Python runs.
_BEFORE_PYTHON = ("LD_", "DYLD_", "PYTHON", "MALLOC_", "CUDA_VISIBLE_DEVICES")

# Calls at the end of a cell that have no value to show.
_WITHOUT_VALUE = re.compile(
    r"(print|display|barrier|all_reduce|all_gather|broadcast|destroy_process_group|init_process_group|append|extend|step"
    r"|zero_grad|backward|save|show|close|sleep|update|add_scalar|finish|set_\w+|main|manual_seed|empty_cache)$"
)

_TORCH, _NUMPY, _PYTHON = GENERATORS

_PORTABLE = '''\
def portable(value):
    """Return what torch.load reads anywhere: of models and optimizers their state."""
    if isinstance(value, {torch}.nn.parallel.DistributedDataParallel):
        value = value.module
    return value.state_dict() if hasattr(value, "state_dict") else value'''


class CannotExport(Exception):  # noqa: N818  # the caller says of which cell
    """A part of the cell has no counterpart in a script; the message says which, and the next step."""


@dataclass(frozen=True)
class Origin:
    """Where a script comes from.

    Attributes:
        notebook: What to call the notebook.
        label: What the notebook calls the cell.
        line: The text behind ``%%ddp``.
        ran: Shell and package commands of the cells above, as they were typed.
    """

    notebook: str
    label: str
    line: str
    ran: tuple[str, ...] = ()


@dataclass(frozen=True)
class Saved:
    """The values beside the script.

    Attributes:
        states: The names, and why only the notebook has them.
        missing: Those whose values are not there.
        plain: Whether they load as data that runs no code.
        gpus: Numbers of the GPUs that tensors among them are on.
    """

    states: tuple[State, ...] = ()
    missing: frozenset[str] = frozenset()
    plain: bool = False
    gpus: tuple[int, ...] = ()


def beside(path: str, what: str) -> str:
    """Return the name of a file that belongs to a script."""
    return f"{os.path.splitext(os.path.basename(path))[0]}.{what}.pt"


def command(options: Options, path: str) -> str:
    """Return the command line that runs a script as ``%%ddp`` ran the cell."""
    words = [f"CUDA_VISIBLE_DEVICES={','.join(map(str, options.gpu_ids))}"] if options.gpu_ids else []
    words += [f"{name}={shlex.quote(value)}" for name, value in options.env.items() if name.startswith(_BEFORE_PYTHON)]
    if options.timeout is not None:
        words.append(f"timeout {options.timeout:g}")
    ranks = options.cpus or len(options.gpu_ids) or options.gpus or "gpu"
    if options.placed and options.nnodes > 1:
        # Each node's torchrun meets the others' at the first; its name is the site's to know.
        words.append(_on_nodes(options))
        words.append(f"torchrun --nnodes {options.nnodes} --nproc-per-node {ranks} --rdzv-backend c10d")
        first = options.hosts[0] if options.hosts else "$FIRST_NODE"
        words.append(f"--rdzv-id {os.path.splitext(os.path.basename(path))[0]} --rdzv-endpoint {first}:29500")
    else:
        words.append(f"torchrun --standalone --nproc-per-node {ranks}")
    if options.max_restarts:
        words.append(f"--max-restarts {options.max_restarts}")
    return " ".join([*words, shlex.quote(os.path.basename(path))])


def _on_nodes(options: Options) -> str:
    """Return what runs a command once on each node."""
    if options.hosts:
        return "on each of " + ", ".join(options.hosts) + ":"
    asked = f" {options.slurm}" if options.slurm else ""
    return f"srun --nodes {options.nnodes} --ntasks-per-node 1{asked}"


@dataclass(frozen=True)
class _Part:
    """A statement or a paragraph of the script.

    Attributes:
        text: Its lines.
        tight: Whether no blank line stands above it.
    """

    text: str
    tight: bool = False

    @property
    def defines(self) -> bool:
        """Whether it is a function or a class, around which style wants two blank lines."""
        code = [line for line in self.text.split("\n") if not line.startswith("#")]
        return bool(code) and code[0].startswith(("def ", "class ", "async def ", "@"))


class Script:
    """A script in the making.

    Args:
        origin: Where it comes from.
        path: Where it will be.
        options: The options of the cell.
        needed: The statements of other cells that it needs.
        body: The statements of the cell.
        uses: The names that the cell takes and binds.
        given: The names that nbddp gives to the cell, so that the script has to make them.
        saved: The values beside it.
        transform: IPython's transformation of a cell into Python.
        is_local: Tells whether a module is a file of the user's own.

    Attributes:
        saved: The values beside it.
        source: The text of all statements that go into it.
    """

    def __init__(
        self,
        origin: Origin,
        path: str,
        options: Options,
        needed: Needed,
        body: Sequence[Piece],
        uses: Uses,
        given: frozenset[str],
        saved: Saved,
        transform: Transform,
        is_local: Callable[[str], bool],
    ) -> None:
        self._origin, self._path, self._options, self._needed = origin, path, options, needed
        self._body, self._uses, self._given, self.saved = body, uses, set(given), saved
        kept = [piece for _, piece in needed.pieces]
        nodes = [piece.node for piece in (*kept, *body)]
        bound = {name for node in nodes for name in _bound(node)} | {one.name for one in saved.states}
        self._names = bound | {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)}
        self.source = "\n".join(piece.text for piece in (*kept, *body))
        flow = needed.flow.copy()
        self._seeded_by_cell = frozenset().union(*(flow.follow(piece, transform).seeds for piece in body))
        code = {name for node in nodes if not isinstance(node, _IMPORTS) for name in _bound(node)}
        self._imports = Imports(code | self._given | {one.name for one in saved.states}, is_local)
        self._helper = False
        # Settings that stand above the imports, and the names that they use.
        self._first: list[str] = []
        self._first_names: set[str] = set()

    @property
    def local_modules(self) -> list[str]:
        """The modules of the user's own that the script imports."""
        return self._imports.local()

    def text(self) -> str:
        """Return the script.

        Raises:
            CannotExport: The cell has a part that only a notebook can run.
        """
        above = self._above()
        definitions, body = self._split_body()
        end = [*self._results(), self._leave()]
        set_up, main = self._set_up()
        same, own = self._same_numbers(), self._own_numbers()
        code = [*set_up, *same, *above, *self._shown_by_print(), *definitions]
        if self._helper:
            code.append(_Part(_PORTABLE.format(torch=self._imports.spell("torch"))))
        settings, first = self._environment()
        top = [self._docstring(), settings, self._imports.text(without=first), _joined(code)]
        text = "\n\n".join(part for part in top if part)
        last = [part for part in (*main, *own, body, *end) if part]
        if not any(line and not line.lstrip().startswith("#") for part in last for line in part.split("\n")):
            last.append("pass")
        blank = "\n\n\n" if not code or code[-1].defines else "\n\n"
        return f'{text}{blank}if __name__ == "__main__":\n' + _indented("\n\n".join(last)) + "\n"

    def _fresh(self, name: str) -> str:
        while name in self._names:
            name += "_"
        return name

    # The head.

    def _docstring(self) -> str:
        origin, options = self._origin, self._options
        line = f"%%ddp {origin.line}".rstrip()
        text = [f"Cell {origin.label} of {origin.notebook}, which ran under `{line}`, as a script.", ""]
        text += ["Run it with", "", f"    {command(options, self._path)}"]
        if options.out or options.gather:
            text += [
                "",
                f"Rank 0 leaves {', '.join((*options.out, *options.gather))} in {beside(self._path, 'results')}.",
            ]
        if origin.ran:
            text += ["", "The notebook also ran:", "", *(f"    {one}" for one in origin.ran)]
        escaped = "\n".join(text).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
        return f'"""{escaped}\n"""' if "\n" in escaped else f'"""{escaped}"""'

    def _environment(self) -> tuple[str, frozenset[str]]:
        """Return what libraries are to find when they are imported, with the imports that it takes, and their names."""
        values = {name: value for name, value in self._options.env.items() if not name.startswith(_BEFORE_PYTHON)}
        os_ = self._imports.spell("os") if values else ""
        lines = [f"{os_}.environ[{quoted(name)}] = {quoted(value)}" for name, value in values.items()]
        names = self._first_names | ({os_} if values else set())
        lines += self._first
        if not lines:
            return "", frozenset()
        return f"{self._imports.of(names)}\n\n" + "\n".join(lines), frozenset(names)

    # What stands above the cell.

    def _above(self) -> list[_Part]:
        """Return the statements of the other cells, imports left out that can stand at the top."""
        parts: list[_Part] = []
        moved = True  # whether imports may still be moved up over all that is above them
        cell = -1
        loads = self._load_before()
        for position, piece in self._needed.pieces:
            effects = self._needed.effects[position]
            if position == loads:
                parts += self._load()
            if moved and self._imports.take(piece.node, piece.text):
                continue
            # What is set before libraries are imported stays before them.
            early = effects.setting and self._imports.are_python(effects.reads & set(self._needed.flow.imports))
            if early and not parts and "\n" not in piece.text:
                self._first.append(piece.text)
                self._first_names |= effects.reads & set(self._needed.flow.imports)
                continue
            moved = moved and not early
            parts.append(_Part(self._run_async(piece), piece.cell == cell and not piece.gap))
            cell = piece.cell
        if loads == -1:
            parts += self._load()
        return parts

    def _load_before(self) -> int:
        """Return the position of the statement before which the notebook's values are needed; -1 for the end."""
        states = self.saved.states
        if not states:
            return -2
        # What stood above a value has read what was there before it.
        for i, _ in self._needed.pieces:
            if self._needed.effects[i].reads & {one.name for one in states if one.position < i}:
                return i
        return -1

    def _load(self) -> list[_Part]:
        """Return what loads the values that only the notebook had."""
        saved = self.saved
        torch, path = self._imports.spell("torch"), self._imports.member("pathlib", "Path")
        file = beside(self._path, "state")
        there = [one for one in saved.states if one.name not in saved.missing]
        lines = []
        if there:
            lines.append(f"# What only the notebook had. {file}, written with this script, holds:")
            lines += [f"#   {one.name}: {one.why}" for one in there]
        if saved.missing:
            lines.append("# What only the notebook had, and what is still to be supplied:")
            lines += [f"#   {one.name}: {one.why}" for one in saved.states if one.name in saved.missing]
            values = ", ".join(f'"{one.name}": {one.name}' for one in saved.states)
            lines.append(f"# In the notebook: torch.save({{{values}}}, {quoted(file)})")
        where = ""
        if saved.gpus:
            os_ = self._imports.spell("os")
            index = f"{{{os_}.environ['LOCAL_RANK']}}"
            where = ", map_location={" + ", ".join(f'"cuda:{i}": f"cuda:{index}"' for i in saved.gpus) + "}"
        name = self._fresh("state")
        plain = "" if saved.plain else ", weights_only=False"
        lines.append(f'{name} = {torch}.load({path}(__file__).with_suffix(".state.pt"){where}{plain})')
        lines += [f'{one.name} = {name}["{one.name}"]' for one in saved.states]
        return [_Part("\n".join(lines))]

    def _run_async(self, piece: Piece) -> str:
        """Return a statement of another cell, in a function of its own if it awaits."""
        if not _awaits([piece.node]):
            return piece.text
        name = self._fresh("prepare")
        self._names.add(name)
        run = f"{self._imports.spell('asyncio')}.run({name}())"
        return f"{self._coroutine(name, piece.text, _bound(piece.node))}\n\n\n{run}"

    @staticmethod
    def _coroutine(name: str, text: str, bound: Iterable[str]) -> str:
        shared = f"    global {', '.join(sorted(bound))}\n" if bound else ""
        return f"async def {name}():\n{shared}{_indented(text)}"

    def _shown_by_print(self) -> list[_Part]:
        """Return a ``display`` for a cell that calls the notebook's."""
        taken = {*self._uses.taken, *self._needed.unknown}
        return [_Part("display = print  # outside a notebook")] if "display" in taken else []

    # Devices and ranks.

    def _set_up(self) -> tuple[list[_Part], list[str]]:
        """Return what makes rank, device and process group: the part for the top, and the part for the main block."""
        given = self._names_of_rank()
        devices, device = self._device()
        group = self._group(device)
        kept = [self._needed.effects[position] for position, _ in self._needed.pieces]
        early = any(one.reads & self._given for one in kept) or (
            self._options.cpus is None and any("cuda" in piece.text for _, piece in self._needed.pieces)
        )
        if early:
            return [_Part("\n".join([*given, *devices]))], ["\n".join(group)] if group else []
        # One paragraph, with the group in the branches that choose the device.
        return [], ["\n".join([*given, *self._merged(devices, group)])]

    def _names_of_rank(self) -> list[str]:
        variables = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE"}
        wanted = {name for name in variables if self._is_used(name)}
        os_ = self._imports.spell("os") if wanted else ""
        return [f'{name} = int({os_}.environ["{variable}"])' for name, variable in variables.items() if name in wanted]

    def _is_used(self, name: str) -> bool:
        return name in self._given and (name in self._names or name in self._wanted)

    @property
    def _wanted(self) -> set[str]:
        """The names of ranks that the script itself uses."""
        mine: set[str] = set()
        if self._options.out or self._options.gather or self._value() or self._own_seeds():
            mine.add("rank")
        if self._options.gather:
            mine.add("world_size")
        return mine

    def _rank(self, name: str = "rank") -> str:
        """Return an expression for the rank, which the cell may call something else."""
        if name in self._given and name not in self._uses.bound:
            return name
        return f'int({self._imports.spell("os")}.environ["{name.upper()}"])'

    def _device(self) -> tuple[list[str], str]:
        """Return the lines that choose the device, and the name of the device."""
        used = self._is_used("device")
        name = "device" if "device" in self._given else self._fresh("own_device")
        if self._options.cpus is not None:
            return ([f'{name} = {self._imports.spell("torch")}.device("cpu")'] if used else []), name
        torch = self._imports.spell("torch")
        local = (
            "local_rank" if self._is_used("local_rank") else f'int({self._imports.spell("os")}.environ["LOCAL_RANK"])'
        )
        return [
            f"if {torch}.cuda.is_available():",
            f'    {name} = {torch}.device("cuda", {local})',
            f"    {torch}.cuda.set_device({name})",
            "else:",
            f'    {name} = {torch}.device("cpu")',
        ], name

    def _group(self, device: str) -> list[str]:
        """Return the lines that initialise the process group; none if the cell does it."""
        if not self._options.init or self._cell_has_group:
            return []
        init = f"{self._imports.spell('torch.distributed', 'dist')}.init_process_group"
        backend = self._options.backend
        if self._options.cpus is not None or (backend and "nccl" not in backend):
            return [f'{init}("{backend or "gloo"}")']
        return [
            f'if {device}.type == "cuda":',
            f'    {init}("{backend or "nccl"}", device_id={device})',
            "else:",
            f'    {init}("{backend or "gloo"}")',
        ]

    @staticmethod
    def _merged(devices: list[str], group: list[str]) -> list[str]:
        if len(devices) < 5 or len(group) < 4:
            return devices + group
        return [*devices[:3], group[1], *devices[3:], group[3]]

    @property
    def _cell_has_group(self) -> bool:
        return "init_process_group" in self.source

    def _leave(self) -> str:
        """Return the line that leaves the process group."""
        if "destroy_process_group" in "\n".join(piece.text for piece in self._body):
            return ""
        if not self._options.init and not self._cell_has_group:
            return ""
        dist = self._imports.spell("torch.distributed", "dist")
        if self._cell_has_group:
            return f"if {dist}.is_initialized():\n    {dist}.destroy_process_group()"
        return f"{dist}.destroy_process_group()"

    # Random numbers.

    def _same_numbers(self) -> list[_Part]:
        """Return a seed for what the notebook has drawn once for all ranks without one."""
        drawn = frozenset().union(*(self._needed.effects[i].unseeded for i, _ in self._needed.pieces))
        lines = []
        if _TORCH in drawn:
            lines.append(f"{self._imports.spell('torch')}.manual_seed(0)")
        if _NUMPY in drawn:
            lines.append(f"{self._imports.spell('numpy', 'np')}.random.seed(0)")
        if _PYTHON in drawn:
            lines.append(f"{self._imports.spell('random')}.seed(0)")
        if not lines:
            return []
        reason = "# The notebook drew its numbers once, for all ranks; with a seed, all of them draw the same."
        return [_Part("\n".join([reason, *lines]))]

    def _own_seeds(self) -> frozenset[str]:
        """Return the generators that give every rank the same numbers, other than under ``%%ddp``."""
        effects = [self._needed.effects[position] for position, _ in self._needed.pieces]
        seeded = frozenset().union(*(one.seeds | one.unseeded for one in effects))
        named = {_TORCH: "torch", _NUMPY: "numpy", _PYTHON: "random"}
        known = {module.partition(".")[0] for module in self._needed.flow.imports.values()}
        return frozenset(g for g in seeded - self._seeded_by_cell if named[g] in known)

    def _own_numbers(self) -> list[str]:
        """Return what gives each rank random numbers of its own, if they have been seeded alike."""
        seeds = self._own_seeds()
        if not seeds:
            return []
        rank = self._rank()
        lines = ["# From here on each rank draws numbers of its own."]
        if _TORCH in seeds:
            torch = self._imports.spell("torch")
            lines.append(f"{torch}.manual_seed({torch}.initial_seed() + {rank})")
        if _NUMPY in seeds:
            numpy = self._imports.spell("numpy", "np")
            lines.append(f"{numpy}.random.seed([{rank}, {numpy}.random.randint(2**31)])")
        if _PYTHON in seeds:
            random = self._imports.spell("random")
            lines.append(f"{random}.seed({random}.random() + {rank})")
        return ["\n".join(lines)]

    # The cell.

    def _split_body(self) -> tuple[list[_Part], str]:
        """Return the cell's definitions that can stand outside the main block, and the rest of it."""
        outside: list[_Part] = []
        lines = ""
        first = True
        inside = self._bound_in_main()
        bound: set[str] = set()
        rest: list[Piece] = []
        for piece in self._body:
            if piece.magic and isinstance(piece.node, ast.Assign):
                raise CannotExport(
                    f"{piece.place}, line {piece.lines[0] + 1}: {piece.magic} has no counterpart in a script; "
                    "write it in Python, as with subprocess.run"
                )
            if not piece.magic and piece.state == "made by a magic":
                raise CannotExport(
                    f"{piece.place}, line {piece.lines[0] + 1} uses get_ipython(), or a magic inside a statement, "
                    "which a script has not; leave it out, or write it in Python"
                )
            simple = isinstance(piece.node, ast.Import | ast.ImportFrom) and first
            if simple and self._imports.take(piece.node, piece.text):
                continue
            first = first and (
                bool(piece.magic) or not piece.text or isinstance(piece.node, ast.Import | ast.ImportFrom)
            )
            if self._can_stand_outside(piece.node, inside | bound):
                outside.append(_Part(piece.text))
                continue
            bound |= _bound(piece.node)
            rest.append(piece)
        for piece in rest:
            text = f"# {piece.magic}  (in the notebook)" if piece.magic else piece.text
            if piece is self._last():
                text = self._with_value(piece)
            lines += f"{piece.gap}{text}\n" if text else piece.gap
        body = re.sub(r"\n{3,}", "\n\n", lines.strip("\n"))
        if _awaits([piece.node for piece in rest]):
            name = self._fresh("main")
            names = frozenset().union(*(_bound(piece.node) for piece in rest))
            body = f"{self._coroutine(name, body, names)}\n\n{self._imports.spell('asyncio')}.run({name}())"
        return outside, body

    def _bound_in_main(self) -> frozenset[str]:
        """Return the names that are bound only in the main block, definitions left out."""
        simple = (piece.node for piece in self._body if not isinstance(piece.node, _DEFINITIONS))
        return frozenset(self._given).union(*(_bound(node) for node in simple if not isinstance(node, _IMPORTS)))

    def _can_stand_outside(self, node: ast.stmt, inside: frozenset[str] | set[str]) -> bool:
        """Tell whether a definition means the same above the main block, where spawned workers find it, too."""
        if not isinstance(node, _DEFINITIONS):
            return False
        name = node.name
        if name in inside or name in self._uses.taken or sum(name in _bound(p.node) for p in self._body) > 1:
            return False
        if any(name in _bound(piece.node) for _, piece in self._needed.pieces):
            return False
        read = {part.id for part in immediate(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
        return not read & set(inside)

    def _last(self) -> Piece | None:
        """Return the statement whose value the notebook shows, if the cell ends in one."""
        written = [piece for piece in self._body if piece.text or piece.magic]
        last = written[-1] if written else None
        if last is None or last.magic or last.quiet or not isinstance(last.node, ast.Expr):
            return None
        value = last.node.value
        if isinstance(value, ast.Await):
            value = value.value
        if isinstance(value, ast.Call) and _WITHOUT_VALUE.match(
            dotted(value.func).rpartition(".")[2] or _method(value)
        ):
            return None
        return last

    def _value(self) -> bool:
        return self._last() is not None

    def _with_value(self, piece: Piece) -> str:
        """Return the last expression of the cell, with what shows its value as the notebook does."""
        assert isinstance(piece.node, ast.Expr)
        lines = piece.text.split("\n")
        comments = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
        code = "\n".join(lines[len(comments) :])
        parsed = compile(code, "<cell>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        assert isinstance(parsed, ast.Module)
        assert isinstance(parsed.body[0], ast.Expr)
        expression = ast.get_source_segment(code, parsed.body[0].value) or code
        runs = any(isinstance(part, ast.Call | ast.Await) for part in ast.walk(piece.node.value))
        if runs:
            # On every rank, since it may communicate.
            name = self._fresh("value")
            shown = [f"{name} = {expression}", f"if {self._rank()} == 0 and {name} is not None:", f"    print({name})"]
        else:
            if isinstance(piece.node.value, ast.Tuple) and not expression.startswith("("):
                expression = f"({expression})"
            shown = [f"if {self._rank()} == 0:", f"    print({expression})"]
        return "\n".join([*comments, *shown])

    # What the notebook asked to have back.

    def _results(self) -> list[str]:
        options = self._options
        if not (options.out or options.gather):
            return []
        torch, path = self._imports.spell("torch"), self._imports.member("pathlib", "Path")
        asked = " and ".join(name for name, given in (("--out", options.out), ("--gather", options.gather)) if given)
        lines = [f"# What {asked} brought back to the notebook."]
        items = [f'"{name}": {self._portable(name)}' for name in options.out]
        suffix, only_first = '".results.pt"', True
        if options.gather:
            own = ", ".join(f'"{name}": {self._portable(name)}' for name in options.gather)
            if options.init and not self._cell_has_group:
                dist = self._imports.spell("torch.distributed", "dist")
                name = self._fresh("of_ranks")
                lines.append(f"{name} = [None] * {self._rank('world_size')}")
                lines.append(f"{dist}.all_gather_object({name}, {{{own}}})")
                items += [f'"{one}": [each["{one}"] for each in {name}]' for one in options.gather]
            else:
                # The cell has the group to itself, and may have left it.
                items += [f'"{name}": {self._portable(name)}' for name in options.gather if name not in options.out]
                suffix, only_first = f'f".results.{{{self._rank()}}}.pt"', False
        saving = f"{torch}.save({{{', '.join(items)}}}, {path}(__file__).with_suffix({suffix}))"
        if only_first:
            lines += [f"if {self._rank()} == 0:", *_wrapped(saving, items, torch, f"{path}(__file__)", suffix, 1)]
        else:
            lines += _wrapped(saving, items, torch, f"{path}(__file__)", suffix, 0)
        return ["\n".join(lines)]

    def _portable(self, name: str) -> str:
        """Return an expression for a result that loads anywhere."""
        match self._kind(name):
            case "ddp":
                return f"{name}.module.state_dict()"
            case "optimizer":
                return f"{name}.state_dict()"
            case "plain":
                return name
        self._helper = True
        return f"portable({name})"

    def _kind(self, name: str) -> str:
        """Return what a name is at the end of the cell, as far as its text tells."""
        bindings = [value for piece in self._body for value in _values_of(name, piece.node)]
        kinds = {self._kind_of(value) for value in bindings}
        if len(kinds) == 1:
            return kinds.pop()
        # Of several, the last one counts if it is made for certain.
        last = next((piece.node for piece in reversed(self._body) if _values_of(name, piece.node)), None)
        return self._kind_of(bindings[-1]) if isinstance(last, ast.Assign | ast.AnnAssign) else ""

    def _kind_of(self, value: ast.expr) -> str:
        if isinstance(value, ast.Call):
            called = dotted(value.func)
            meaning = self._meaning(called)
            if meaning.endswith(".DistributedDataParallel"):
                return "ddp"
            if meaning.startswith("torch.optim.") and "lr_scheduler" not in meaning:
                return "optimizer"
            return "plain" if called in _PLAIN or called.endswith(_PLAIN_METHODS) else ""
        kinds = (ast.List, ast.Dict, ast.Set, ast.Constant, ast.ListComp, ast.DictComp, ast.BinOp, ast.JoinedStr)
        return "plain" if isinstance(value, kinds) else ""

    def _meaning(self, name: str) -> str:
        """Return what a dotted name stands for, by the imports of the cell and of the cells above."""
        first, dot, rest = name.partition(".")
        for piece in self._body:
            if isinstance(piece.node, ast.Import | ast.ImportFrom):
                for alias in piece.node.names:
                    if (alias.asname or alias.name) == first:
                        module = f"{piece.node.module}." if isinstance(piece.node, ast.ImportFrom) else ""
                        return f"{module}{alias.name}{dot}{rest}"
        return f"{self._needed.flow.imports.get(first, '')}{dot}{rest}"


# Calls of what returns numbers, tensors and collections of them.
_PLAIN = frozenset(
    {"list", "dict", "tuple", "set", "float", "int", "str", "sum", "len", "sorted", "max", "min", "round"}
)
_PLAIN_METHODS = (".item", ".tolist", ".cpu", ".state_dict", ".clone")

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)


def _wrapped(saving: str, items: Sequence[str], torch: str, path: str, suffix: str, depth: int) -> list[str]:
    """Return a call of torch.save, on as many lines as ruff would put it."""
    indent = "    " * depth
    if len(saving) + 4 * (depth + 1) <= 88:
        return [f"{indent}{saving}"]
    lines = [f"{indent}{torch}.save("]
    dictionary = f"{indent}    {{{', '.join(items)}}},"
    if len(dictionary) + 4 <= 88:
        lines.append(dictionary)
    else:
        lines += [f"{indent}    {{", *(f"{indent}        {item}," for item in items), f"{indent}    }},"]
    return [*lines, f"{indent}    {path}.with_suffix({suffix}),", f"{indent})"]


def _method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _bound(node: ast.stmt) -> frozenset[str]:
    """Return the names that a statement binds."""
    return frozenset(Uses([node], lambda text: text).certain) | _assigned(node)


def _assigned(node: ast.stmt) -> frozenset[str]:
    if isinstance(node, _DEFINITIONS):
        return frozenset({node.name})
    return frozenset(
        part.id for part in immediate(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    )


def _values_of(name: str, node: ast.stmt) -> list[ast.expr]:
    """Return the expressions that a statement assigns to a name, those of augmented assignments left out."""
    found: list[ast.expr] = []
    for part in reversed(immediate(node)):
        if isinstance(part, ast.Assign | ast.AnnAssign) and part.value is not None:
            for target in part.targets if isinstance(part, ast.Assign) else [part.target]:
                if isinstance(target, ast.Name) and target.id == name:
                    found.append(part.value)
                elif isinstance(target, ast.Tuple) and name in {t.id for t in target.elts if isinstance(t, ast.Name)}:
                    values = part.value.elts if isinstance(part.value, ast.Tuple) else []
                    pairs = zip(target.elts, values, strict=False)
                    of_name = [value for one, value in pairs if isinstance(one, ast.Name) and one.id == name]
                    found += of_name or [part.value]
    return found


def _awaits(nodes: Sequence[ast.stmt]) -> bool:
    """Tell whether statements await at their top level."""
    code = compile(ast.Module(list(nodes), []), "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    return bool(code.co_flags & 0x80)  # CO_COROUTINE


def _joined(parts: Sequence[_Part]) -> str:
    """Return parts with the blank lines between them that style wants."""
    text = ""
    for before, part in zip([None, *parts], parts, strict=False):
        if before is None:
            blank = "\n" if part.defines else ""
        elif before.defines or part.defines:
            blank = "\n\n\n"
        else:
            blank = "\n" if part.tight else "\n\n"
        text += blank + part.text
    return text


def _indented(text: str) -> str:
    """Return code one level deeper; the inside of strings stays where it is."""
    kinds = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    fixed: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            fixed.update(range(token.start[0] + 1, token.end[0] + 1))
    lines = text.split("\n")
    return "\n".join(line if i in fixed or not line.strip() else f"    {line}" for i, line in enumerate(lines, 1))
