"""What a line says of nodes, and what of that cannot be."""

from __future__ import annotations

import pytest

from nbddp._option_line import parse
from nbddp._options import OptionError
from nbddp._standalone import command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--nnodes 1:4", "ranks are numbered before they start, so the number of nodes is fixed, as in --nnodes 2"),
        ("--engine ray", "--engine ray: there are slurm, ssh, local"),
        ("--engine ssh --nnodes 2", "--engine ssh: say which machines, as in --hosts gpu1,gpu2"),
        ("--hosts a,b --nnodes 3", "--nnodes 3 and --hosts a,b differ in number"),
        ("--hosts a --engine slurm", "--hosts are reached by ssh, not by --engine slurm"),
        ("--hosts a --slurm -N1", "--slurm '-N1' is for Slurm, and --hosts for another engine"),
        ("--hosts=-oProxyCommand=x", "--hosts '-oProxyCommand=x': names of machines as ssh knows them"),
        ('--slurm "--comment=\'x"', '--slurm "--comment=\'x": No closing quotation'),
        (
            "--nnodes 2 --node-rank 0 --rdzv-endpoint a:1 --hosts a,b",
            "--node-rank and --rdzv-endpoint are for a",
        ),
        ("--nnodes 2 --node-rank 0 --rdzv-endpoint a:1 --keep", "--keep and --node-rank do not go together"),
        ("--python /usr/bin/python3", "--python /usr/bin/python3: that is for nodes"),
        ("--nnodes 2 --gpu-ids 0,1", "Slurm chooses the GPUs of a node"),
    ],
)
def test_what_cannot_be(line: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(line)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["--export=NONE", "--partition=gpu --time=1:00:00", "-p gpu", ""])
def test_options_for_srun_are_written_as_in_a_terminal(value: str) -> None:
    assert parse(f'--nnodes 2 --slurm "{value}" --cpus 2').slurm == value


def test_hosts_say_how_many_there_are() -> None:
    options = parse("--hosts a, b --gpus 2")
    assert (options.nnodes, options.hosts, options.engine_name, options.placed) == (2, ("a", "b"), "ssh", True)


def test_a_script_is_run_on_as_many_nodes() -> None:
    words = command(parse('--nnodes 2 --gpus 4 --slurm "-p gpu"'), "train.py")
    assert words.startswith("srun --nodes 2 --ntasks-per-node 1 -p gpu torchrun --nnodes 2 --nproc-per-node 4 ")
    assert "--rdzv-endpoint a:29500 " in command(parse("--hosts a,b --gpus 4"), "train.py")
