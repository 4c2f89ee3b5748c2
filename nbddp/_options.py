"""The options of a run, and the ``%%ddp`` line that they are read from."""

from __future__ import annotations

import argparse
import difflib
import itertools
import keyword
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn


class OptionError(ValueError):
    """An option is unknown, or its value cannot be; the message names both and says what can."""


class HelpAsked(Exception):  # noqa: N818  # not an error
    """The line asks for help; the message is the help."""


@dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
        gpus: Number of ranks, one per GPU; None: not given.
        cpus: Number of ranks on the CPU.
        gpu_ids: GPUs to use, as ``torch.device("cuda:K")`` numbers them in the notebook.
        backend: Backend of the process group; None for nccl on GPUs and gloo without.
        out: Names to bring back from rank 0.
        gather: Names to bring back from every rank, as lists.
        out_device: The device that all tensors of both are put on; None for the CPU.
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
    """

    gpus: int | None = None
    cpus: int | None = None
    gpu_ids: tuple[int, ...] = ()
    backend: str | None = None
    out: tuple[str, ...] = ()
    gather: tuple[str, ...] = ()
    out_device: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    timeout: float | None = None
    init: bool = True
    max_restarts: int = 0
    keep_script: str | None = None
    dry_run: bool = False
    ranks: tuple[int, ...] | None = None
    plain: bool = False
    keep: bool = False
    on: tuple[int, ...] | None = None
    idle: float | None = None
    auto: bool = False
    bg: str | None = None
    share: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the machine.

        Raises:
            OptionError: A value cannot be, or two contradict each other.
        """
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
        if self.out_device is not None:
            if not re.fullmatch(r"(cpu|cuda|mps|xpu|meta)(:\d+)?", self.out_device):
                raise OptionError(f"--out-device {self.out_device}: that is no device, such as cpu or cuda:0")
            if not (self.out or self.gather):
                raise OptionError("--out-device says where results are put; --out or --gather say which")
        if self.keep_script is not None:
            folder = os.path.dirname(os.path.abspath(self.keep_script))
            if os.path.isdir(self.keep_script):
                raise OptionError(f"--keep-script {self.keep_script}: that is a folder; give the name of a file")
            if not os.path.isdir(folder):
                raise OptionError(f"--keep-script {self.keep_script}: there is no folder {folder}; make it first")

    def _check_keeping(self) -> None:
        """Check what concerns ranks that stay, and runs in the background."""
        if self.on is not None and (not self.on or min(self.on) < 0):
            raise OptionError(
                f"--on {','.join(map(str, self.on)) or repr('')}: ranks are numbered from 0, as in --on 0,2"
            )
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
  %%ddp --gpus 2 --keep-script train.py  leave the script: torchrun --nproc-per-node 2 train.py

In the cell, rank, local_rank, world_size and device are defined (unless the notebook has names like that), the process
group is initialised, and every notebook variable, function, class and import that the cell uses is there. What a rank
changes stays in that rank; --out brings names back.
"""


# What the same thing is called by torchrun and others.
_ELSEWHERE = dict.fromkeys(("--nproc-per-node", "--num-gpus", "--ngpus", "--np", "-n", "-np"), "--gpus")

# What torchrun sets in each rank, whatever it was.
_TORCHRUNS = frozenset(
    {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"}
    | {"ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: -"):
            word = message.split()[2].partition("=")[0]
            meant = _ELSEWHERE.get(word.replace("_", "-")) or next(
                iter(difflib.get_close_matches(word, [*self._option_string_actions], 1)), None
            )
            hint = f"; did you mean {meant}?" if meant else ""
        raise OptionError(f"{message}{hint or '.'} %%ddp -h lists the options")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise AssertionError("only help exits, and it raises HelpAsked")


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


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="%%ddp",
        add_help=False,
        allow_abbrev=False,
        description="Run the cell on several ranks under torchrun, on the notebook's own variables.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gpus", "-g", type=_number, metavar="N", help="N ranks, one per GPU; on a machine without any, N CPU ranks")
    add("--gpu-ids", type=_numbers, default=(), metavar="K,K,...", help="one rank on each of these GPUs")
    add("--cpus", type=_number, metavar="N", help="N ranks on the CPU")
    add("--backend", metavar="NAME", help="process group backend (default: nccl on GPUs, gloo on the CPU)")
    add(
        "--out",
        "-o",
        type=_names,
        action="extend",
        default=[],
        metavar="NAME,...",
        help="bring names back from rank 0, all or none",
    )
    add(
        "--gather",
        type=_names,
        action="extend",
        default=[],
        metavar="NAME,...",
        help="bring names back from every rank, each as a list by rank",
    )
    add("--out-device", metavar="DEVICE", help="put tensors that come back on this device (default: the CPU)")
    add(
        "--env",
        type=_assignment,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set an environment variable in the ranks",
    )
    add("--timeout", type=_seconds, metavar="SECONDS", help="stop the run and raise TimeoutError after this long")
    add("--ranks", type=_ranks, metavar="K,K,...|all", help="whose output to show (default: all); logs keep everyone's")
    add("--plain", action="store_true", help="show rank after rank, without colours and panel: the same at every run")
    add("--no-init", dest="init", action="store_false", help="leave init_process_group to the cell")
    add("--max-restarts", type=_number, default=0, metavar="N", help="let torchrun restart all ranks up to N times")
    add("--keep", action="store_true", help="let the ranks stay, and go on in those that a cell before has kept")
    add("--on", type=_numbers, metavar="K,K,...", help="with --keep: run on these of the kept ranks")
    add("--idle", type=_seconds, metavar="SECONDS", help="with --keep: end ranks that get no cell for so long")
    add("--bg", nargs="?", const="", metavar="NAME", help="return at once, with a handle that is bound to NAME")
    add("--share", action="store_true", help="use GPUs also where kept ranks or background runs use them")
    add("--auto", action="store_true", help=argparse.SUPPRESS)
    add("--keep-script", metavar="PATH", help="leave the generated script at PATH; plain torchrun runs it")
    add("--dry-run", action="store_true", help="print the torchrun command and what would be sent; launch nothing")
    add("-h", "--help", nargs=0, action=_Help, default=argparse.SUPPRESS, help="show this")
    return parser


def parse(line: str) -> Options:
    """Read the options from the text behind ``%%ddp``.

    Raises:
        OptionError: The line has a fault; the message names it.
        HelpAsked: The line asks for help.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise OptionError(f"{error} in: {line}") from None
    given = vars(_make_parser().parse_args(_tidied(words)))
    for option in ("out", "gather"):
        given[option] = tuple(dict.fromkeys(given[option]))
    given["env"] = dict(given["env"])
    return Options(**given)


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


def option_names() -> Sequence[str]:
    """Return the long options, for completion."""
    actions = [action for action in _make_parser()._actions if action.help is not argparse.SUPPRESS]
    return [s for action in actions for s in action.option_strings if s.startswith("--")]
