"""Colours: those of ranks, in labels and in the panel; and the codes for colours that ranks print."""

from __future__ import annotations

import re

# What sets colours and styles in text for a terminal.
CODE = re.compile(r"\x1b\[[0-9;:]*m")

# Numbers of the 256-colour table and what they look like. Each has a contrast of at least 3 both to white and to a dark
# theme's background; a test computes it.
COLOURS = (
    (32, "#0087d7"),  # blue
    (166, "#d75f00"),  # orange
    (28, "#008700"),  # green
    (127, "#af00af"),  # purple
    (30, "#008787"),  # teal
    (161, "#d7005f"),  # red
    (99, "#875fff"),  # violet
    (131, "#af5f5f"),  # brown
)


def coloured(text: str, rank: int) -> str:
    """Return text in the colour of a rank, for a terminal or a notebook's stream."""
    return f"\x1b[38;5;{COLOURS[rank % len(COLOURS)][0]}m{text}\x1b[0m"


def uncoloured(text: str) -> str:
    """Return text without codes for colours and styles."""
    return CODE.sub("", text)


def html_colour(rank: int) -> str:
    """Return the colour of a rank for HTML."""
    return COLOURS[rank % len(COLOURS)][1]
