"""What bars say."""

from __future__ import annotations

import pytest

from nbddp._progress import Progress, parse


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        (" 45%|████▌     | 45/100 [00:10<00:12,  4.50it/s]", Progress(0.45, "", "45/100", "00:12")),
        ("outer:  33%|###3      | 1/3 [00:00<1:02:03, 1.89it/s]", Progress(1 / 3, "outer", "1/3", "1:02:03")),
        ("  0%|          | 0/100 [00:00<?, ?it/s]", Progress(0.0, "", "0/100", "")),
        ("data: 1.2k/3.4M [00:01<?, ?B/s]", Progress(1200 / 3.4e6, "data", "1.2k/3.4M", "")),
        ("\x1b[31mtrain\x1b[0m \x1b[90m━━━━━━╸━━━\x1b[0m \x1b[35m 40%\x1b[0m \x1b[36m0:00:12\x1b[0m",
         Progress(0.4, "train", "", "0:00:12")),
        ("5/10 [====>.....] - ETA: 10s - loss: 0.5", Progress(0.5, "", "5/10", "10s")),
        ("Epoch 0:  50%|█████     | 32/64 [00:01<00:01, 30.1it/s, v_num=0]",
         Progress(0.5, "Epoch 0", "32/64", "00:01")),
        ("Epoch 1/2 \x1b[35m━━━━━━╸\x1b[0m━━━━ 5/16 0:00:01 • 0:00:02 38.01it/s",
         Progress(5 / 16, "Epoch 1/2", "5/16", "0:00:02")),
        ("accuracy 45%", None),
        ("loss 3/4 of what it was", None),
        ("12it [00:03, 4.10it/s]", None),
        ("batch 3/2 |###|", None),
        ("2024/01/02 |###|", None),
        ("", None),
    ],
)  # fmt: skip
def test_bars(line: str, progress: Progress | None) -> None:
    assert parse(line) == progress
