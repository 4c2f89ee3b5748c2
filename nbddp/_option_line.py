"""The ``%%ddp`` line: what can stand on it, its faults, its help, its defaults."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from nbddp._options import DEVICES, OptionError, RunOptions, listed_names


class HelpAsked(Exception):  # noqa: N818  # not an error
    """The line asks for help; the message is the help."""


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
  %%ddp --nnodes 2 --gpus 8 --slurm "--partition=gpu --time=1:00:00"
                                         two nodes of a Slurm cluster, eight ranks on each
  %%ddp --hosts gpu1,gpu2 --gpus 2       two machines over ssh
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


def _nodes(text: str) -> int:
    if ":" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r}: ranks are numbered before they start, so the number of nodes is fixed, as in --nnodes 2"
        )
    return _number(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in text.split(",") if part.strip())


def _ranks(text: str) -> tuple[int, ...] | None:
    return None if text.strip() == "all" else _numbers(text)


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
        type=listed_names,
        action="extend",
        metavar="NAME,...",
        help="bring names back from rank 0, all or none",
    )
    add(
        "--gather",
        type=listed_names,
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
    add("--nnodes", type=_nodes, metavar="N", help="N nodes, of Slurm unless --hosts says otherwise; --gpus on each")
    add("--hosts", type=listed_names, metavar="HOST,...", help="machines that ssh reaches, each of them a node")
    add("--slurm", metavar="OPTIONS", help="options for srun, as in --slurm '--partition=gpu --time=1:00:00'")
    add("--engine", metavar="NAME", help="what reaches the nodes: slurm, ssh, or local (processes of this machine)")
    add("--python", metavar="PATH", help="the interpreter on the nodes (default: the notebook's own)")
    add("--node-rank", type=_number, metavar="K", help="by hand on each machine: which this one is, from 0")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="... and where they meet; HOST is machine 0")
    add("--dry-run", action="store_true", help="print the torchrun command and what would be sent; launch nothing")
    add("-h", "--help", nargs=0, action=_Help, help="show this")
    return parser


def parse(line: str, defaults: str = "", without: Collection[str] = ()) -> RunOptions:
    """Read the options from the text behind ``%%ddp``.

    Args:
        line: The text.
        defaults: Options that hold where the line says nothing else, written as on the line.
        without: The fields of which the defaults do not hold here.

    Raises:
        OptionError: The line has a fault; the message names it.
        HelpAsked: The line asks for help.
    """
    given = _given(line)
    before = {name: value for name, value in _given(defaults).items() if name not in without}
    if DEVICES & given.keys():
        before = {name: value for name, value in before.items() if name not in DEVICES}
    if not given.get("keep", True):
        before = {name: value for name, value in before.items() if name not in ("on", "idle")}
    env = {**before.get("env", {}), **given.get("env", {})}
    options = RunOptions(**{**before, **given, "env": env})
    if options.out_device is not None and not (options.out or options.gather) and "out_device" in given:
        raise OptionError("--out-device says where results are put; --out or --gather say which")
    return options


@functools.lru_cache(maxsize=32)
def _given(line: str) -> Mapping[str, Any]:
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
        if tidied and tidied[-1] == "--slurm" and word.startswith("-"):
            # argparse takes it for an option of its own, unless there is a space in it.
            tidied[-1] += f"={word}"
        elif tidied and (tidied[-1].endswith(",") or (word.startswith(",") and not tidied[-1].startswith("-"))):
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
