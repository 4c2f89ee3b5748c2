"""How far a progress bar says that it is, from the text that it draws: tqdm's, rich's, Keras's and their like."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbddp._palette import uncoloured

_PERCENT = re.compile(r"(?<![\d.])(\d{1,3}(?:\.\d+)?)\s?%")
_COUNT = re.compile(
    r"(?<![\d.,:/])(\d[\d,]{0,20}(?:\.\d{1,9})?[kKMGT]?)\s?/\s?(\d[\d,]{0,20}(?:\.\d{1,9})?[kKMGT]?)(?![\d/:.])"
)
_TQDM_LEFT = re.compile(r"\[(?:\d+:)?\d+:\d+<((?:\d+:)?\d+:\d+|\?)")
_ETA = re.compile(r"ETA:?\s*((?:\d+:)+\d+|\d+\s?m?s)\b")
_CLOCK = re.compile(r"(?<![\d:])(\d+:\d\d:\d\d|-:--:--)(?![\d:])")
# What a bar is drawn with.
_BAR = re.compile(r"[█▉▊▋▌▍▎▏░▒▓━╸╺─■□▰▱●○]{2,}|\|[ #\d=>.\-█▏▎▍▌▋▊▉]{3,}\||\[[=>.#\- ]{3,}\]")

# A line of more characters is looked at up to there.
_LONGEST = 1000

_FACTOR = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Progress:
    """What a bar says.

    Attributes:
        fraction: How much is done, from 0 to 1.
        name: What stands before the bar.
        count: How many of how many, as the bar has it; empty if it does not say.
        left: The time that is left, as the bar has it; empty if it does not say.
    """

    fraction: float
    name: str = ""
    count: str = ""
    left: str = ""


def parse(line: str) -> Progress | None:
    """Return what a line says of progress; None if it is no progress bar."""
    line = uncoloured(line[:_LONGEST]).strip()
    percent, bar = _PERCENT.search(line), _BAR.search(line)
    # Behind the bar, if there is one: "Epoch 1/3 ━━━━ 5/16". Keras has it before.
    count = (_COUNT.search(line, bar.end()) if bar else None) or _COUNT.search(line)
    # Of rich's two clocks, the second is the one for what is left.
    clocks = list(_CLOCK.finditer(line)) if bar else []
    left = _TQDM_LEFT.search(line) or _ETA.search(line) or (clocks[-1] if clocks else None)
    if count is not None and _number(count[2]) > 0 and _number(count[1]) <= _number(count[2]):
        fraction = _number(count[1]) / _number(count[2])
    elif percent is not None and float(percent[1]) <= 100:
        fraction, count = float(percent[1]) / 100, None
    else:
        return None
    if bar is None and left is None:
        return None  # "accuracy 45%", "step 3/4 of the recipe"
    begin = min(found.start() for found in (percent, count, bar) if found is not None)
    return Progress(
        fraction,
        line[:begin].strip(" :|[-"),
        f"{count[1]}/{count[2]}" if count is not None else "",
        "" if left is None or left[1] in ("?", "-:--:--") else left[1],
    )


def _number(text: str) -> float:
    text = text.replace(",", "")
    return float(text[:-1]) * _FACTOR[text[-1]] if text[-1] in _FACTOR else float(text)
