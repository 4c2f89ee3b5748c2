"""What a check of `nbddp._doctor` comes to: a line for its reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        level: "ok"; "warn" for what can hurt a run; "bad" for what will stop one, or has.
        subject: What was looked at, in a few words.
        text: What is the case, with the values.
        advice: What to do about it, a sentence or more; empty if there is nothing to do.
    """

    level: Level
    subject: str
    text: str
    advice: str = ""

    def line(self) -> str:
        """Return the finding as one line, in columns."""
        text = " ".join(self.text.split())
        return f"{self.level:<4}  {self.subject:<13}  {text}{f'. {self.advice}' if self.advice else ''}"


Check = Callable[[], "Finding | Sequence[Finding] | None"]


def count(number: int, what: str) -> str:
    """Return a number of things as a person writes it: ``1 rank``, ``2 ranks``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
