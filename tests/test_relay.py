"""The relay by itself: bytes in, text out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from nbddp import _relay
from nbddp._relay import Relay
from nbddp._uplink import mark

SECRET = "0123456789abcdef"


class Record:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def write(self, text: str) -> None:
        self.shown.append(text)

    def publish(self, data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, Any], update: bool) -> None:
        self.shown.append(data)

    def live(self, text: str) -> None:
        self.shown.append(("live", text))

    @property
    def text(self) -> str:
        return "".join(item for item in self.shown if isinstance(item, str))


@pytest.fixture
def record() -> Record:
    return Record()


def make(record: Record, tmp_path: Path, ranks: int = 1) -> Relay:
    return Relay(ranks, str(tmp_path), SECRET, record)


def display(number: int, **data: Any) -> dict[str, Any]:
    return {"number": number, "data": data, "metadata": {}, "transient": {}, "update": False}


def test_lines_appear_when_they_are_complete(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.feed(0, b"ab")
    assert record.shown == []
    relay.feed(0, b"c\nd")
    assert record.text == "[rank 0] abc\n"
    relay.finish()
    assert record.text == "[rank 0] abc\n[rank 0] d\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_any_division_into_reads_gives_the_same(record: Record, tmp_path: Path, size: int) -> None:
    data = "naïve\r\n50%\r100%\nlast \0 zero".encode() + mark(SECRET, 1) + b"after\n\xff\n"
    relay = make(record, tmp_path)
    relay.display(0, display(1, **{"text/html": "x"}))
    for start in range(0, len(data), size):
        relay.feed(0, data[start : start + size])
    relay.finish()
    whole = "".join(item if isinstance(item, str) else "<display>" for item in record.shown)
    assert whole == "[rank 0] naïve\n[rank 0] 100%\n[rank 0] last \0 zero\n<display>[rank 0] after\n[rank 0] \ufffd\n"


def test_a_mark_of_another_run_is_text(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.feed(0, mark("f" * 16, 1) + b"\n")
    relay.finish()
    assert "nbddp:ffff" in record.text


def test_a_display_whose_mark_never_comes_is_shown_at_the_end(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.display(0, display(1, **{"text/html": "x"}))
    relay.finish()
    assert record.shown == [{"text/html": "x"}]


def test_a_display_may_come_before_or_after_its_mark(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.display(0, display(1, **{"text/html": "1"}))
    relay.feed(0, b"a\n" + mark(SECRET, 1) + b"b\n" + mark(SECRET, 2))
    relay.display(0, display(2, **{"text/html": "2"}))
    assert record.shown == ["[rank 0] a\n", {"text/html": "1"}, "[rank 0] b\n", {"text/html": "2"}]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\rb", "b"),
        ("abc\rx", "xbc"),
        ("100%\r", "100%"),
        ("x\r\r\r", "x"),
        ("\rstart", "start"),
    ],
)
def test_carriage_returns_as_on_a_terminal(record: Record, tmp_path: Path, raw: str, shown: str) -> None:
    relay = make(record, tmp_path)
    relay.feed(0, raw.encode() + b"\n")
    assert record.text == f"[rank 0] {shown}\n"


def test_what_is_shown_is_bounded_and_what_is_left_out_is_said(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=2)
    total = 300_000
    for start in range(0, total, 1000):
        relay.feed(0, b"".join(b"%d\n" % i for i in range(start, start + 1000)))
    relay.feed(1, b"one line\n")
    relay.finish()
    lines = record.text.splitlines()
    assert lines[0] == "[rank 0] 0"
    assert f"[rank 0] {total - 1}" in lines
    assert "[rank 1] one line" in lines
    shown = sum(line.startswith("[rank 0]") for line in lines)
    notice = next(line for line in lines if "left out" in line)
    assert shown + int(notice.split()[1].replace(",", "")) == total
    assert len(record.text) <= _relay.HEAD_LIMIT + _relay.TAIL_LIMIT + 1000
    assert (tmp_path / "rank0.log").read_bytes().count(b"\n") == total


def test_an_endless_line_is_broken(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    for _ in range(30):
        relay.feed(0, b"x" * 10_000)
    relay.finish()
    assert record.text.replace("[rank 0] ", "").replace("\n", "") == "x" * 300_000
    assert max(map(len, record.text.splitlines())) < 110_000


def test_a_bar_that_never_ends_its_line_stays_small(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    for i in range(20_000):
        relay.feed(0, b"\r%05d of many" % i)
    relay.finish()
    assert record.text == "[rank 0] 19999 of many\n"


def test_unfinished_lines_are_shown_while_they_last(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=2)
    assert relay.due == float("inf")
    relay.feed(0, b"\r 10%")
    assert 0.3 < relay.due - time.monotonic() < 0.6
    relay.feed(1, b"\r 20%")
    relay.tick()
    assert record.shown == [("live", "[rank 0]  10%\n[rank 1]  20%")]
    relay.feed(0, b"\r 30%")
    assert relay.due - time.monotonic() < 0.3
    relay.tick()
    relay.feed(0, b"\r100%\n")
    relay.finish()
    assert record.shown[1:] == [
        ("live", "[rank 0]  30%\n[rank 1]  20%"),
        "[rank 0] 100%\n",
        "[rank 1]  20%\n",
        ("live", ""),
    ]


def test_quick_cells_show_nothing_live(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.feed(0, b"\r 10%\r100%")
    relay.finish()
    assert record.shown == ["[rank 0] 100%\n"]


def test_a_full_disk_takes_the_log_and_not_the_run(record: Record, tmp_path: Path) -> None:
    (tmp_path / "rank0.log").symlink_to("/dev/full")
    relay = make(record, tmp_path)
    relay.feed(0, b"a\n")
    relay.feed(0, b"b\n")
    relay.finish()
    lines = record.text.splitlines()
    assert "[rank 0] a" in lines
    assert "[rank 0] b" in lines
    assert any("the log of this rank ends here: No space left on device" in line for line in lines)


def test_logs_are_private(record: Record, tmp_path: Path) -> None:
    make(record, tmp_path).finish()
    assert os.stat(tmp_path / "rank0.log").st_mode & 0o777 == 0o600
