"""The options of a run, and what of them contradicts itself or another."""

from __future__ import annotations

import keyword
import operator
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nbddp import _machines
from nbddp._errors import NbddpError

# What reaches nodes.
ENGINES = ("slurm", "ssh", "local")


class OptionError(NbddpError, ValueError):
    """An option is unknown, or its value cannot be; the message names both and says what can."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is made: what stands on a ``%%ddp`` line, and what `nbddp.launch` takes by keyword.

    Attributes:
        gpus: Number of ranks, one per GPU; where there is no GPU at all, ranks on the CPU. None: all GPUs.
        cpus: Number of ranks on the CPU.
        gpu_ids: GPUs to use, as ``torch.device("cuda:K")`` numbers them in the notebook. On nodes, those of each; with
            engine "local" they are shared out among the nodes.
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
        nnodes: Number of nodes. With `node_rank` and `rdzv_endpoint` the same is called by hand on each; without, an
            engine reaches them, and gpus and cpus are the ranks of each node.
        hosts: Machines that ssh reaches, each of them a node.
        slurm: Options for Slurm's srun, as in a terminal; may be empty.
        engine: What reaches the nodes: "slurm", "ssh", or "local" (nodes that are processes of this machine).
        python: The interpreter on the nodes; None for the notebook's own.
        node_rank: Which node this one is, from 0, where they are launched by hand.
        rdzv_endpoint: ``HOST:PORT`` at which these meet; HOST is an address of machine 0.

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
    hosts: Sequence[str] = ()
    slurm: str | None = None
    engine: str | None = None
    python: str | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None

    @property
    def by_hand(self) -> bool:
        """Whether each machine's part is launched by hand."""
        return self.node_rank is not None or self.rdzv_endpoint is not None

    @property
    def placed(self) -> bool:
        """Whether an engine places the ranks on nodes."""
        return not self.by_hand and (self.nnodes > 1 or self.engine_name is not None)

    @property
    def engine_name(self) -> str | None:
        """The engine, as far as the options say it."""
        return self.engine or ("ssh" if self.hosts else None) or ("slurm" if self.slurm is not None else None)

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
            keep(name, tuple(listed_names(value) if isinstance(value, str) else value))
        keep("hosts", tuple(listed_names(self.hosts) if isinstance(self.hosts, str) else self.hosts))
        for name in ("backend", "out_device", "keep_script", "rdzv_endpoint", "slurm", "engine", "python"):
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
        self._check_engine()
        if self.nnodes == 1:
            return
        if self.by_hand and (self.node_rank is None or self.rdzv_endpoint is None):
            raise OptionError(
                f"--nnodes {self.nnodes}: by hand, each machine says which it is and where all meet, as in --nnodes "
                f"{self.nnodes} --node-rank 0 --rdzv-endpoint HOST:29500, HOST being machine 0"
            )
        if self.max_restarts and self.by_hand:
            raise OptionError(
                f"--max-restarts {self.max_restarts}: on several machines nobody can start all ranks again; launch "
                "anew on each"
            )

    def _check_engine(self) -> None:
        """Check what says how nodes are reached."""
        given = [
            option
            for option, value in (("--hosts", self.hosts), ("--slurm", self.slurm), ("--engine", self.engine))
            if value not in (None, ())
        ]
        if given and self.by_hand:
            raise OptionError(
                f"{given[0]} has nbddp start every node; --node-rank and --rdzv-endpoint are for a launch by hand on "
                "each: give one or the other"
            )
        if self.engine is not None and self.engine not in ENGINES:
            raise OptionError(f"--engine {self.engine}: there are {', '.join(ENGINES)}")
        for host in self.hosts:
            if not isinstance(host, str) or not _HOST.fullmatch(host):
                raise OptionError(f"--hosts {host!r}: names of machines as ssh knows them, as in --hosts gpu1,gpu2")
        if self.hosts and self.engine not in (None, "ssh"):
            raise OptionError(f"--hosts are reached by ssh, not by --engine {self.engine}; give one of them")
        if self.slurm is not None and self.engine_name != "slurm":
            raise OptionError(f"--slurm {self.slurm!r} is for Slurm, and {given[0]} for another engine: give one")
        if self.engine == "ssh" and not self.hosts:
            raise OptionError("--engine ssh: say which machines, as in --hosts gpu1,gpu2")
        if self.slurm is not None:
            try:
                shlex.split(self.slurm)
            except ValueError as error:
                raise OptionError(f"--slurm {self.slurm!r}: {error}; write it as in a terminal") from None
        if self.hosts and self.nnodes not in (1, len(self.hosts)):
            raise OptionError(
                f"--nnodes {self.nnodes} and --hosts {','.join(self.hosts)} differ in number; --hosts is enough"
            )
        if self.hosts:
            object.__setattr__(self, "nnodes", len(self.hosts))
        if self.python is not None and not self.placed:
            raise OptionError(f"--python {self.python}: that is for nodes, as with --nnodes or --hosts")
        if self.placed and self.gpu_ids and self.engine_name not in ("ssh", "local"):
            raise OptionError("--gpu-ids: Slurm chooses the GPUs of a node, and numbers them from 0; say --gpus N")

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
            if self.by_hand:
                raise OptionError(
                    "--keep and --node-rank do not go together: ranks that are launched by hand on each machine do "
                    "not stay. --hosts, or Slurm, keeps them on several"
                )


# What modules of nbddp's own call it.
Options = RunOptions

# The fields of which one that is given takes the place of all that are in defaults.
DEVICES = frozenset({"gpus", "cpus", "gpu_ids"})

# The fields that say where an engine places ranks.
PLACES = frozenset({"nnodes", "hosts", "slurm", "engine", "python"})


# A name that ssh could take for an option, or hand to a shell with a ProxyCommand of the user's, is none of a machine.
_HOST = re.compile(r"""[^\s,\-;&|<>(){}$`'"\\!*?#~][^\s,;&|<>(){}$`'"\\!*?#~]*""")


def listed_names(text: str) -> list[str]:
    """Return the names in a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


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


# What torchrun sets in each rank, whatever it was.
_TORCHRUNS = frozenset(
    {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"}
    | {"ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)
