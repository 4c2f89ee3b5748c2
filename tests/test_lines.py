"""Lines as a terminal would have them: what bars leave behind, and that nothing else is changed."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from tqdm import tqdm, trange

from nbddp._lines import LINE_LIMIT, Lines


def read(text: str, pieces: random.Random | int = 7) -> tuple[str, int]:
    """Return what the text leaves, fed in pieces, and how many lines were alive at most."""
    lines, out, alive = Lines(), "", 0
    while text:
        size = pieces if isinstance(pieces, int) else pieces.randint(1, 40)
        out += lines.feed(text[:size])
        text = text[size:]
        alive = max(alive, len(lines.current))
    return out + lines.finish(), alive


def written(program: Callable[[io.StringIO], object]) -> str:
    buffer = io.StringIO()
    program(buffer)
    return buffer.getvalue()


def nested_bars(file: io.StringIO, *, leave: bool) -> None:
    for epoch in trange(3, file=file, mininterval=0, ncols=60, desc="epochs"):
        for _ in trange(5, file=file, mininterval=0, ncols=60, desc=f"batches {epoch}", leave=leave):
            pass
        tqdm.write(f"epoch {epoch} done", file=file)


@pytest.mark.parametrize("seed", range(5))
def test_nested_bars_leave_their_last_state(seed: int) -> None:
    text, alive = read(written(lambda file: nested_bars(file, leave=False)), random.Random(seed))
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 0 done", "epoch 1 done", "epoch 2 done", "epochs"]
    assert "100%" in lines[-1]
    assert 2 <= alive <= 4


def test_nested_bars_that_stay_are_there_once() -> None:
    lines = read(written(lambda file: nested_bars(file, leave=True)))[0].splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("batches 0", "epoch 0 done", "batches 1", "epoch 1 done", "batches 2", "epoch 2 done", "epochs")
    ]
    assert all("100%" in line for line in lines if "done" not in line)


def test_a_bar_goes_out_when_something_plain_follows() -> None:
    lines = Lines()
    assert lines.feed("\r 10%\r100%\n") == ""
    assert lines.current == ["100%"]
    assert lines.waits
    assert lines.feed("after\n") == "100%\nafter\n"
    assert lines.current == []


def test_a_bar_goes_out_after_a_while() -> None:
    lines = Lines()
    lines.feed("\r100%\n")
    assert lines.settle() == "100%\n"
    lines.feed("\r 10%")
    assert lines.settle() == ""
    assert lines.finish() == " 10%\n"


@pytest.mark.parametrize("seed", range(3))
def test_bars_one_after_the_other_go_out_as_they_end(seed: int) -> None:
    def program(file: io.StringIO) -> None:
        for epoch in range(5):
            for _ in trange(4, file=file, mininterval=0, ncols=60, desc=f"epoch {epoch}"):
                pass

    text = written(program)
    lines, out = Lines(), ""
    chance = random.Random(seed)
    while text:
        size = chance.randint(1, 40)
        out += lines.feed(text[:size])
        text = text[size:]
        assert len(lines.current) <= 2
    assert [line.split(":")[0] for line in out.splitlines()] == [f"epoch {i}" for i in range(4)]
    assert lines.settle(after_silence=True).startswith("epoch 4: 100%")


@pytest.mark.parametrize("leave", [True, False])
def test_what_is_written_behind_a_bar_has_a_line_of_its_own(leave: bool) -> None:
    def program(file: io.StringIO) -> None:
        for epoch in trange(2, file=file, mininterval=0, ncols=60, desc="epochs"):
            for i in trange(4, file=file, mininterval=0, ncols=60, desc="batches", leave=leave):
                if i == 2:
                    file.write(f"WARNING in epoch {epoch}\nand more\n")
            file.write(f"INFO epoch {epoch}\n")

    lines = read(written(program))[0].splitlines()
    bars = ["batches", "batches"] if leave else []
    said = [f"{text} {epoch}" for epoch in range(2) for text in ("WARNING in epoch", "INFO epoch")]
    assert [line for line in lines if line.startswith(("WARNING", "INFO"))] == said
    assert sum(line == "and more" for line in lines) == 2
    assert [line.split(":")[0] for line in lines if "%|" in line] == [*bars, "epochs"]


@pytest.mark.parametrize("seed", range(5))
def test_rich(seed: int) -> None:
    def program(file: io.StringIO) -> None:
        console = Console(file=file, force_terminal=True, width=70, color_system="standard")
        with Progress(console=console, auto_refresh=False) as progress:
            train, check = progress.add_task("train", total=5), progress.add_task("check", total=5)
            for i in range(5):
                progress.advance(train)
                progress.refresh()
                if i == 2:
                    progress.print("hello from rich")
            for _ in range(5):
                progress.advance(check)
                progress.refresh()
        console.print("then this")
        with Live(console=console, auto_refresh=False) as live:
            for i in range(4):
                table = Table("x")
                table.add_row(str(i))
                live.update(table, refresh=True)

    text, alive = read(written(program), random.Random(seed))
    plain = [line.split()[0] for line in text.replace("\x1b[1m", "").splitlines()]
    assert plain == ["hello", "train", "check", "then", "┏━━━┓", "┃", "┡━━━┩", "│", "└───┘"]
    assert text.count("100%") == 2
    assert alive >= 2


@pytest.mark.parametrize(("log", "most"), [("lightning", 31), ("transformers", 8)])
def test_what_trainers_write(log: str, most: int) -> None:
    """Recorded: rank 0 of Lightning 2.6 (rich's bars, three epochs) and of transformers 5.23 (tqdm's), both streams."""
    with (Path(__file__).parent / "data" / f"{log}.log").open(newline="") as file:
        text = file.read()
    screen = pyte.Screen(600, 100)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    shown = re.sub(r"\x1b\[[\d;]*m", "", read(text, random.Random(0))[0]).splitlines()
    visible = [line.rstrip() for line in screen.display if line.strip()]
    assert [line.rstrip() for line in shown if line.strip()] == visible
    assert len(shown) <= most < text.count("\r") + text.count("\x1b[")


def test_keras() -> None:
    frames = [f"{chr(8) * 30}\r{i}/5 [{'=' * i}>] - loss: 0.{i}" for i in range(1, 6)]
    assert read("".join(frames) + "\n")[0] == "5/5 [=====>] - loss: 0.5\n"


def test_rows_that_are_gone_up_to_again_and_again_stay_few() -> None:
    # A program that draws three plain lines and goes back up, without a word before.
    frame = "one {0}\ntwo {0}\nthree {0}\n\x1b[3A"
    lines = read("".join(frame.format(i) for i in range(100)) + "\x1b[3B")[0].splitlines()
    assert len(lines) <= 6
    assert lines[-3:] == ["one 99", "two 99", "three 99"]


def test_a_program_that_went_up_once_is_not_held_back_for_ever() -> None:
    lines = Lines()
    lines.feed("a\nb\n\x1b[2A")
    for i in range(200):
        out = lines.feed(f"{i}\n")
    assert out == "199\n"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\rb", "b"),
        ("abc\rx", "xbc"),
        ("100%\r", "100%"),
        ("x\r\r\r", "x"),
        ("\rstart", "start"),
        ("windows\r", "windows"),
        ("abc\x1b[2Dx", "axc"),
        ("abc\r\x1b[K", None),
        ("abc\x1b[1K\rd", "d"),
        ("ab\bc", "ac"),
        ("\x1b[5Gx", "    x"),
        ("bell\x07", "bell"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b[31mred\x1b[0m\rb", "b\x1b[31med\x1b[0m"),
        ("\x1b[?2004hx\x1b[2 q", "x"),
    ],
)
def test_controls_as_on_a_terminal(raw: str, shown: str | None) -> None:
    assert read(raw + "\nnext\n")[0] == (f"{shown}\n" if shown is not None else "") + "next\n"


def test_a_line_keeps_the_colour_that_the_last_one_left() -> None:
    assert read("\x1b[31mred\nstill\n\x1b[0mno\n")[0] == (
        "\x1b[31mred\x1b[0m\n\x1b[31mstill\x1b[0m\n\x1b[31m\x1b[0mno\n"
    )


def test_an_unfinished_sequence_at_the_end_is_dropped() -> None:
    assert read("text\x1b[3")[0] == "text\n"


def test_endless_lines_are_broken() -> None:
    assert read("x" * (3 * LINE_LIMIT), 10_000)[0].replace("\n", "") == "x" * (3 * LINE_LIMIT)
    drawn = read("\r" + "x" * (3 * LINE_LIMIT), 10_000)[0]
    assert max(map(len, drawn.splitlines())) <= LINE_LIMIT + 10_000


# No form feeds and the like: str.splitlines knows more ends of lines than terminals do.
PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=("C",)) | st.sampled_from("\n\t"))


@given(PLAIN, st.integers(1, 20))
def test_plain_text_is_not_changed(text: str, size: int) -> None:
    expected = text if text.endswith("\n") or not text else text + "\n"
    assert read(text, size)[0] == expected


# What a program does to the lines that it draws on, each time from the top of them.
FRAMES = st.lists(st.lists(st.text("ab%", min_size=1, max_size=5), min_size=1, max_size=4), min_size=1, max_size=6)


@given(FRAMES, st.integers(1, 9))
def test_a_terminal_shows_the_same(frames: list[list[str]], size: int) -> None:
    """Frames of lines, drawn one over the other as rich does; what is left is what another emulator has."""
    text, height = "\x1b[?25l", 0
    for frame in frames:
        text += ("\r\x1b[2K" + "\x1b[1A\x1b[2K" * (height - 1)) if height else ""
        text += "\n".join(frame)
        height = len(frame)
    text += "\n\x1b[?25hafter\n"
    screen = pyte.Screen(80, 60)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    # Cut off, a frame that was taller leaves empty lines on a terminal.
    assert read(text, size)[0].splitlines() == [line.rstrip() for line in screen.display if line.strip()]


CONTROLS = st.sampled_from(
    ["\r", "\n", "\b", "\x1b[A", "\x1b[2K", "\x1b[31m", "\x1b[0m", "\x1b[?25l", "\x1b[?25h", "\x1b"]
)


@given(st.lists(CONTROLS | st.text("ab%", max_size=3)).map("".join), st.integers(1, 5))
def test_any_division_gives_the_same(text: str, size: int) -> None:
    def seen(size: int) -> str:
        return re.sub(r"\x1b\[\d+m", "", read(text, size)[0])

    assert seen(size) == seen(len(text) + 1)
