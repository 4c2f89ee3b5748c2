"""The README's examples, run as a reader would run them: each block of text is what the code before it shows."""

from __future__ import annotations

import re
from pathlib import Path

from tests.kernel import Kernel

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[tuple[str, str | None]]:
    """Return each block of code with the text that follows it, if one does before the next code."""
    pairs: list[tuple[str, str | None]] = []
    for kind, text in BLOCK.findall(README):
        if kind == "python":
            pairs.append((text, None))
        elif pairs[-1][1] is None:
            pairs[-1] = pairs[-1][0], text
    return pairs


def comparable(text: str) -> list[str]:
    """Return the lines, without the number of the cell, the order of the ranks, and how long names of files are."""
    text = re.sub(r"\d+\.\d kB in all", "so many kB in all", text.strip())
    return sorted(re.sub(r"In\[\d+\]", "In[]", text).split("\n"))


def test_what_it_shows_is_what_one_gets(kernel: Kernel) -> None:
    pairs = examples()
    assert sum(expected is not None for _, expected in pairs) == 8
    for code, expected in pairs:
        reply = kernel.run(code)
        if expected is None:
            assert reply.status == "ok", reply.traceback
        else:
            shown = reply.traceback or (reply.value or {}).get("text/plain") or reply.text
            assert comparable(shown) == comparable(expected)
