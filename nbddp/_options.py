"""The options of a run, and the ``%%ddp`` line that they are read from."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import keyword
import operator
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from nbddp import _machines
from nbddp._errors import NbddpError


class OptionError(NbddpError, ValueError):
    """An option is unknown, or its value cannot be; the message names both and says what can."""


class HelpAsked(Exception):  # noqa: N818  # not an error
    """The line asks for help; the message is the help."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is made: what stands on a ``%%ddp`` line, and what `nbddp.launch` takes by keyword.

    Attributes:
        gpus: Number of ranks, one per GPU; where there is no GPU at all, ranks on the CPU. None: all GPUs.
        cpus: Number of ranks on the CPU.
        gpu_ids: GPUs to use, as ``torch.device("cuda:K")`` numbers them in the notebook.
        backend: Backend of the process group; None for nccl on GPUs and gloo without.
        out: Names to bring back from rank 0; on several machines, from each machine's first rank. For cells only.
        gather: Names to bring back from every rank, as lists. For cells only.
        out_device: The device that all tensors that come back are put on; None for the CPU.
        env: Environment variables for the ranks, besides the notebook's.
        timeout: Seconds after which the run is stopped.
        init: Whether the process group is initialised before the cell.
        max_restarts: How often torchrun may start the ranks again after a failure.
        keep_script: Where to leave the script.
        dry_run: Whether to show what would be launched, and launch nothing.
        ranks: The ranks whose output is shown; None for all. The logs keep everyone's.
        plain: Whether output is to be the same at every run: rank after rank, without colours and panel.
        keep: Whether the ranks stay, and the next cell that is given this goes on in them.
        on: The kept ranks that the cell runs on; None for all.
        idle: Seconds without a cell after which kept ranks end; 0 for never, None for the default.
        auto: Whether ``%ddp auto`` has sent the cell here.
        bg: What a run in the background is called, empty for a name of nbddp's; None to wait for it.
        share: Whether GPUs may be used that kept ranks or runs in the background use.
        nnodes: Number of machines, on each of which the same is called once.
        node_rank: Which of them this one is, from 0.
        rdzv_endpoint: ``HOST:PORT`` at which the machines meet; HOST is an address of machine 0.

    Raises:
        OptionError: A value cannot be, or two contradict each other. It is a ``ValueError``.
    """

    gpus: int | None = None
    cpus: int | None = None
    gpu_ids: Sequence[int] = ()
    backend: str | None = None
    out: Sequence[str] = ()
    gather: Sequence[str] = ()
    out_device: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
    init: bool = True
    max_restarts: int = 0
    keep_script: str | None = None
    dry_run: bool = False
    ranks: Sequence[int] | None = None
    plain: bool = False
    keep: bool = False
    on: tuple[int, ...] | None = None
    idle: float | None = None
    auto: bool = False
    bg: str | None = None
    share: bool = False
    nnodes: int = 1
    node_rank: int | None = None
    rdzv_endpoint: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the machine."""
        self._check_types()
        for name, value in (("--gpus", self.gpus), ("--cpus", self.cpus)):
            if value is not None and value < 1:
                raise OptionError(f"{name} {value}: a run has at least one rank")
        if self.cpus is not None and (self.gpus is not None or self.gpu_ids):
            raise OptionError("--cpus asks for ranks on the CPU, --gpus and --gpu-ids for GPUs: give one of them")
        if self.gpu_ids:
            listed = ",".join(map(str, self.gpu_ids))
            if min(self.gpu_ids) < 0 or len(set(self.gpu_ids)) < len(self.gpu_ids):
                raise OptionError(f"--gpu-ids {listed}: each GPU can be given once, by its number from 0")
            if self.gpus not in (None, len(self.gpu_ids)):
                raise OptionError(f"--gpus {self.gpus} and --gpu-ids {listed} differ in number; one of them is enough")
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 0):
            listed = ",".join(map(str, self.ranks)) or "''"
            raise OptionError(f"--ranks {listed}: ranks are numbered from 0, as in --ranks 0 or --ranks 0,2; or all")
        self._check_keeping()
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise OptionError(f"--timeout {self.timeout:g}: a number of seconds above 0")
        if self.max_restarts < 0:
            raise OptionError(f"--max-restarts {self.max_restarts}: 0 or more")
        for key, text in self.env.items():
            if not (isinstance(key, str) and isinstance(text, str)) or not key or "=" in key or "\0" in key + text:
                raise OptionError(f"--env {key}={text}: names and values are strings, as in --env NCCL_DEBUG=INFO")
            if key in _TORCHRUNS or key.startswith("TORCHELASTIC_"):
                raise OptionError(f"--env {key}={text}: torchrun sets {key} itself, for each rank")
        for option, names in (("--out", self.out), ("--gather", self.gather)):
            for name in names:
                if not name.isidentifier():
                    raise OptionError(
                        f"{option} {name}: that is no name; give names separated by commas, as in {option} model,losses"
                    )
        if both := set(self.out) & set(self.gather):
            raise OptionError(f"--out and --gather both bring back {', '.join(sorted(both))}; which is it to be?")
        if self.out_device is not None and not re.fullmatch(r"(cpu|cuda|mps|xpu|meta)(:\d+)?", self.out_device):
            raise OptionError(f"--out-device {self.out_device}: that is no device, such as cpu or cuda:0")
        if self.keep_script is not None:
            folder = os.path.dirname(os.path.abspath(self.keep_script))
            if os.path.isdir(self.keep_script):
                raise OptionError(f"--keep-script {self.keep_script}: that is a folder; give the name of a file")
            if not os.path.isdir(folder):
                raise OptionError(f"--keep-script {self.keep_script}: there is no folder {folder}; make it first")
        self._check_machines()

    def _check_types(self) -> None:
        """See that values are of the types that they are said to be, and that nobody changes them later."""

        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("gpus", "cpus", "max_restarts", "nnodes", "node_rank"):
            if (value := getattr(self, name)) is not None or name in ("max_restarts", "nnodes"):
                keep(name, _as_whole(name, value))
        for name in ("gpu_ids", "ranks", "on"):
            if (value := getattr(self, name)) is not None or name == "gpu_ids":
                if isinstance(value, str) or not isinstance(value, Iterable):
                    raise OptionError(f"{option_of(name)} {value!r}: a list of whole numbers, as in {name}=[0, 1]")
                keep(name, tuple(_as_whole(name, one) for one in value))
        for name in ("out", "gather"):
            value = getattr(self, name)
            keep(name, tuple(_names(value) if isinstance(value, str) else value))
        for name in ("backend", "out_device", "keep_script", "rdzv_endpoint"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                keep(name, value := os.fspath(value))
            if not isinstance(value, str | None):
                raise OptionError(f"{option_of(name)} {value!r}: that is no text")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float | None):
            raise OptionError(f"--timeout {self.timeout!r}: a number of seconds above 0")
        if isinstance(self.idle, bool) or not isinstance(self.idle, int | float | None):
            raise OptionError(f"--idle {self.idle!r}: a number of seconds")
        keep("env", dict(self.env or {}))

    def _check_machines(self) -> None:
        if self.nnodes < 1:
            raise OptionError(f"--nnodes {self.nnodes}: a run has at least one machine")
        if self.node_rank is not None and not 0 <= self.node_rank < self.nnodes:
            known = "there is one, 0" if self.nnodes == 1 else f"they are numbered from 0 to {self.nnodes - 1}"
            raise OptionError(f"--node-rank {self.node_rank}: of --nnodes {self.nnodes} machines {known}")
        if self.rdzv_endpoint is not None:
            try:
                _machines.parse_endpoint(self.rdzv_endpoint)
            except ValueError as error:
                raise OptionError(f"--rdzv-endpoint {self.rdzv_endpoint}: {error}") from None
        if self.nnodes == 1:
            return
        if self.node_rank is None or self.rdzv_endpoint is None:
            raise OptionError(
                f"--nnodes {self.nnodes}: each machine says which it is and where all meet, as in --nnodes "
                f"{self.nnodes} --node-rank 0 --rdzv-endpoint HOST:29500, HOST being machine 0"
            )
        if self.max_restarts:
            raise OptionError(
                f"--max-restarts {self.max_restarts}: on several machines nobody can start all ranks again; launch "
                "anew on each"
            )

    def _check_keeping(self) -> None:
        """Check what concerns ranks that stay, and runs in the background."""
        if self.on is not None and (not self.on or min(self.on) < 0):
            listed = ",".join(map(str, self.on)) or "''"
            raise OptionError(f"--on {listed}: ranks are numbered from 0, as in --on 0 or --on 0,2")
        for option, given in (("--on", self.on), ("--idle", self.idle)):
            if given is not None and not self.keep:
                raise OptionError(f"{option} is for kept ranks: give --keep as well")
        if self.idle is not None and not 0 <= self.idle < float("inf"):
            raise OptionError(f"--idle {self.idle:g}: a number of seconds; 0 keeps the ranks until %ddp stop")
        if self.bg is not None:
            if self.bg and (not self.bg.isidentifier() or keyword.iskeyword(self.bg)):
                raise OptionError(f"--bg {self.bg}: that is no name; the run's handle gets it, as in --bg train")
            if self.keep:
                raise OptionError("--bg and --keep do not go together: kept ranks run one cell after another")
        if self.keep:
            for option, contradicts in (("--max-restarts", self.max_restarts), ("--keep-script", self.keep_script)):
                if contradicts:
                    raise OptionError(f"--keep and {option} do not go together: kept ranks are not one script's run")
            if self.nnodes > 1:
                raise OptionError("--keep and --nnodes do not go together: ranks are kept on one machine")


# What modules of nbddp's own call it.
Options = RunOptions

# The fields of which one that is given takes the place of all that are in defaults.
DEVICES = frozenset({"gpus", "cpus", "gpu_ids"})


def option_of(field_name: str) -> str:
    """Return what a field is called on a line."""
    return "--" + field_name.replace("_", "-")


def _as_whole(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]  # it refuses what is none
    except TypeError:
        raise OptionError(f"{option_of(name)} {value!r}: a whole number, as in {name}=2") from None


EXAMPLES = """\
examples:
  %%ddp --gpus 4                         four ranks, one per GPU
  %%ddp --gpus 2 --out model,losses      ... and bring two names back from rank 0
  %%ddp --gpus 2 --gather losses         ... a name from every rank, as a list
  %%ddp --gpu-ids 4,5,6,7                these GPUs
  %%ddp --cpus 2                         two ranks on the CPU, over gloo
  %%ddp --gpus 2 --env NCCL_DEBUG=INFO --timeout 600
  %%ddp --gpus 2 --bg training           return at once: training.wait(), .status, .results, .log(rank), .stop()
  %%ddp --gpus 2 --dry-run               show what would run and what would be sent
  %%ddp --gpus 8 --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29500
                                         the first of two machines; on the other, the same with --node-rank 1
  %%ddp --gpus 2 --keep-script train.py  leave the script: torchrun --nproc-per-node 2 train.py

In the cell, rank, local_rank, world_size and device are defined (unless the notebook has names like that), the process
group is initialised, and every notebook variable, function, class and import that the cell uses is there. What a rank
changes stays in that rank; --out brings names back.
"""


# What the same thing is called by torchrun, accelerate, detectron2, torchrunx and others.
_ELSEWHERE = {
    **dict.fromkeys(("--nproc-per-node", "--num-gpus", "--ngpus", "--np", "-n", "-np", "--nprocs"), "--gpus"),
    **dict.fromkeys(("--num-processes", "--num-gpus-per-machine", "--workers-per-host", "--world-size"), "--gpus"),
    **dict.fromkeys(("--num-machines", "--num-nodes"), "--nnodes"),
    **dict.fromkeys(("--machine-rank",), "--node-rank"),
    **dict.fromkeys(("--master-addr", "--master-port", "--dist-url", "--init-method"), "--rdzv-endpoint"),
}

# What torchrun sets in each rank, whatever it was.
_TORCHRUNS = frozenset(
    {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"}
    | {"ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: -"):
            meant = meant_by(message.split()[2].partition("=")[0], [*self._option_string_actions])
            hint = f"; did you mean {meant}?" if meant else ""
        raise OptionError(f"{message}{hint or '.'} %%ddp -h lists the options")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise AssertionError("only help exits, and it raises HelpAsked")


def meant_by(word: str, options: Iterable[str]) -> str | None:
    """Return the option that a word that is none most likely stands for; None if there is no telling."""
    known = _ELSEWHERE.get(word.replace("_", "-"))
    return known or next(iter(difflib.get_close_matches(word, options, 1)), None)


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise HelpAsked(parser.format_help())


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in text.split(",") if part.strip())


def _ranks(text: str) -> tuple[int, ...] | None:
    return None if text.strip() == "all" else _numbers(text)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    return name, value


@functools.cache
def _make_parser() -> _Parser:
    # Making one takes longer than all else that a quick cell needs before it is sent.
    parser = _Parser(
        prog="%%ddp",
        add_help=False,
        allow_abbrev=False,
        # Who reads the line must know what stands on it: what does not comes from the defaults.
        argument_default=argparse.SUPPRESS,
        description="Run the cell on several ranks under torchrun, on the notebook's own variables.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gpus", "-g", type=_number, metavar="N", help="N ranks, one per GPU; on a machine without any, N CPU ranks")
    add("--gpu-ids", type=_numbers, metavar="K,K,...", help="one rank on each of these GPUs")
    add("--cpus", type=_number, metavar="N", help="N ranks on the CPU")
    add("--backend", metavar="NAME", help="process group backend (default: nccl on GPUs, gloo on the CPU)")
    add(
        "--out",
        "-o",
        type=_names,
        action="extend",
        metavar="NAME,...",
        help="bring names back from rank 0, all or none",
    )
    add(
        "--gather",
        type=_names,
        action="extend",
        metavar="NAME,...",
        help="bring names back from every rank, each as a list by rank",
    )
    add("--out-device", metavar="DEVICE", help="put tensors that come back on this device (default: the CPU)")
    add(
        "--env",
        type=_assignment,
        action="append",
        metavar="KEY=VALUE",
        help="set an environment variable in the ranks",
    )
    add("--timeout", type=_seconds, metavar="SECONDS", help="stop the run and raise TimeoutError after this long")
    add("--ranks", type=_ranks, metavar="K,K,...|all", help="whose output to show (default: all); logs keep everyone's")
    add("--plain", action="store_true", help="show rank after rank, without colours and panel: the same at every run")
    add("--no-init", dest="init", action="store_false", help="leave init_process_group to the cell")
    add("--max-restarts", type=_number, metavar="N", help="let torchrun restart all ranks up to N times")
    add("--keep", action="store_true", help="let the ranks stay, and go on in those that a cell before has kept")
    add("--on", type=_numbers, metavar="K,K,...", help="with --keep: run on these of the kept ranks")
    add("--idle", type=_seconds, metavar="SECONDS", help="with --keep: end ranks that get no cell for so long")
    add("--bg", nargs="?", const="", metavar="NAME", help="return at once, with a handle that is bound to NAME")
    add("--share", action="store_true", help="use GPUs also where kept ranks or background runs use them")
    add("--auto", action="store_true", help=argparse.SUPPRESS)
    # What a line says against the defaults.
    for name in ("plain", "keep", "share"):
        add(f"--no-{name}", dest=name, action="store_false", help=argparse.SUPPRESS)
    add("--no-bg", dest="bg", action="store_const", const=None, help=argparse.SUPPRESS)
    add("--init", action="store_true", help=argparse.SUPPRESS)
    add("--keep-script", metavar="PATH", help="leave the generated script at PATH; plain torchrun runs it")
    add("--nnodes", type=_number, metavar="N", help="N machines, on each of which the same cell is run by hand")
    add("--node-rank", type=_number, metavar="K", help="which of them this one is, from 0")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where the machines meet; HOST is machine 0")
    add("--dry-run", action="store_true", help="print the torchrun command and what would be sent; launch nothing")
    add("-h", "--help", nargs=0, action=_Help, help="show this")
    return parser


def parse(line: str, defaults: str = "") -> RunOptions:
    """Read the options from the text behind ``%%ddp``.

    Args:
        line: The text.
        defaults: Options that hold where the line says nothing else, written as on the line.

    Raises:
        OptionError: The line has a fault; the message names it.
        HelpAsked: The line asks for help.
    """
    given = _given(line)
    before = _given(defaults)
    if DEVICES & given.keys():
        before = {name: value for name, value in before.items() if name not in DEVICES}
    if not given.get("keep", True):
        before = {name: value for name, value in before.items() if name not in ("on", "idle")}
    env = {**before.get("env", {}), **given.get("env", {})}
    options = RunOptions(**{**before, **given, "env": env})
    if options.out_device is not None and not (options.out or options.gather) and "out_device" in given:
        raise OptionError("--out-device says where results are put; --out or --gather say which")
    return options


def _given(line: str) -> dict[str, Any]:
    """Return the options that stand on a line, by field."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise OptionError(f"{error} in: {line}") from None
    given = vars(_make_parser().parse_args(_tidied(words)))
    for option in {"out", "gather"} & given.keys():
        given[option] = tuple(dict.fromkeys(given[option]))
    if "env" in given:
        given["env"] = dict(given["env"])
    return given


def _tidied(words: Iterable[str]) -> list[str]:
    """Return the words as people mean them: without a comment, and ``a, b`` as one list."""
    tidied: list[str] = []
    for word in itertools.takewhile(lambda word: not word.startswith("#"), words):
        if tidied and (tidied[-1].endswith(",") or (word.startswith(",") and not tidied[-1].startswith("-"))):
            tidied[-1] += word
        else:
            tidied.append(word)
    return tidied


def help_text() -> str:
    """Return what ``%%ddp -h`` prints."""
    return _make_parser().format_help()


def takes_value() -> Mapping[str, bool]:
    """Return whether a value follows an option, for each way in which an option can be written."""
    return {name: action.nargs != 0 for action in _make_parser()._actions for name in action.option_strings}


def option_names() -> Sequence[str]:
    """Return the long options, for completion."""
    actions = [action for action in _make_parser()._actions if action.help is not argparse.SUPPRESS]
    return [s for action in actions for s in action.option_strings if s.startswith("--")]
