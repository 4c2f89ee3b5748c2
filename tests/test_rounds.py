"""A few rounds of what ``benchmarks/stop.py rounds`` plays hundreds of, others every time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.kernel import Kernel
from tests.rounds import Plan, series

pytestmark = pytest.mark.slow

ROUNDS = 5


def test_whatever_is_hit_nothing_is_left_and_the_next_cell_works(
    private_folders: Path, open_kernels: list[Kernel]
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    rounds = series(private_folders, open_kernels)
    try:
        results = [rounds.play(Plan.draw(seed, number)) for number in range(ROUNDS)]
    finally:
        rounds.close()
    failed = [
        f"python benchmarks/stop.py rounds --seed {seed} --only {result.plan.number}\n{result}"
        for result in results
        if result.problems
    ]
    assert not failed, "\n".join(failed)


def test_a_round_is_drawn_from_its_seed_and_number_alone() -> None:
    assert Plan.draw(7, 3) == Plan.draw(7, 3)
    assert len({Plan.draw(7, number) for number in range(100)}) == 100
