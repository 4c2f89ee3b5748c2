"""The relay by itself: bytes in, text out."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbddp._log_files import Logs
from nbddp._relay import Relay, View
from nbddp._wire import mark

SECRET = "0123456789abcdef"
STDERR, STDOUT = mark(SECRET, "e"), mark(SECRET, "o")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Record:
    """A screen that remembers."""

    in_place = True
    takes = 1 << 40

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def write(self, text: str) -> None:
        self.takes -= len(text)
        self.shown.append(text)

    def publish(self, data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, Any], update: bool) -> None:
        self.shown.append((transient.get("display_id"), data) if update or transient else data)

    def panel(self, data: dict[str, Any]) -> None:
        raise AssertionError("the panel is not the relay's")

    def clear(self, *, wait: bool) -> None:
        self.shown.append("<clear>" if wait else "<clear now>")

    def room(self) -> int:
        return self.takes

    @property
    def text(self) -> str:
        return COLOUR.sub("", "".join(item for item in self.shown if isinstance(item, str)))


@pytest.fixture
def record() -> Record:
    return Record()


def make(record: Record, tmp_path: Path, ranks: int = 2, logs: Logs | None = None, **view: Any) -> Relay:
    return Relay(ranks, logs or Logs(str(tmp_path)), SECRET, record, View(**view))


def log(logs: Logs, rank: int) -> bytes:
    return Path(logs.saved(), f"rank{rank}.log").read_bytes()


def display(number: int, **data: Any) -> dict[str, Any]:
    return {"number": number, "data": data, "metadata": {}, "transient": {}, "update": False}


# Lines.


def test_lines_appear_when_they_are_complete(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.feed(0, b"ab")
    assert record.shown == []
    relay.feed(0, b"c\nd")
    assert record.text == "[rank 0] abc\n"
    relay.finish()
    assert record.text == "[rank 0] abc\n[rank 0] d\n"


def test_one_rank_needs_no_label(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1)
    relay.feed(0, b"ab\n")
    assert record.shown == ["ab\n"]


def test_labels_are_aligned_and_each_rank_has_its_colour(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=12)
    relay.feed(1, b"a\nb\n")
    relay.feed(11, b"c\n")
    assert record.text == "[rank  1] a\n[rank  1] b\n[rank 11] c\n"
    colours = [COLOUR.findall(line)[0] for line in "".join(record.shown).splitlines()]
    assert colours[0] == colours[1] != colours[2]
    assert all(line.count("\x1b[0m ") == 1 for line in "".join(record.shown).splitlines())


def test_stderr_is_marked_and_keeps_its_place(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, logs=(logs := Logs(str(tmp_path))))
    relay.feed(1, b"1 out\n" + STDERR + b"2 err\n" + STDOUT + STDERR + b"3 err\n" + STDOUT + b"4 out\n")
    assert record.text == "[rank 1] 1 out\n(rank 1) 2 err\n(rank 1) 3 err\n[rank 1] 4 out\n"
    relay.finish()
    assert log(logs, 1) == b"1 out\n2 err\n3 err\n4 out\n"


def test_a_bar_on_stderr_and_prints_do_not_mix(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1)
    for i in range(3):
        relay.feed(0, STDERR + b"\r%3d%%|###|" % (i * 50) + STDOUT + b"loss %d\n" % i)
    assert relay.outputs[0].current == ["100%|###|"]
    relay.feed(0, STDERR + b"\n" + STDOUT)
    relay.feed(0, b"done\n")
    assert record.text == "loss 0\nloss 1\nloss 2\n100%|###|\ndone\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_any_division_into_reads_gives_the_same(record: Record, tmp_path: Path, size: int) -> None:
    data = "naïve\r\n50%\r100%\nlast \0 zero".encode() + mark(SECRET, "d1") + b"after\n\xff\n" + STDERR + b"e" + STDOUT
    relay = make(record, tmp_path)
    relay.display(0, display(1, **{"text/html": "x"}))
    for start in range(0, len(data), size):
        relay.feed(0, data[start : start + size])
    relay.finish()
    whole = "".join(COLOUR.sub("", item) if isinstance(item, str) else "<display>" for item in record.shown)
    assert whole == (
        "[rank 0] naïve\n[rank 0] 100%\n[rank 0] last \0 zero\n[rank 0]\n<display>"
        "[rank 0] after\n[rank 0] \ufffd\n(rank 0) e\n"
    )


@given(
    st.lists(
        st.sampled_from(
            [
                b"a",
                b"\n",
                b"\0",
                b"\r",
                b"\xc3",
                STDERR,
                STDOUT,
                mark(SECRET, "d1"),
                mark(SECRET, "u")[:-4],
                mark(SECRET, "x"),
                STDERR[:9],
                STDERR[9:],
                mark(SECRET, "d"),
            ]
        )
    ),
    st.integers(1, 50),
)
def test_torn_marks_are_text_and_nothing_fails(pieces: list[bytes], size: int) -> None:
    data = b"".join(pieces)
    with tempfile.TemporaryDirectory() as folder:
        relay = Relay(1, Logs(folder), SECRET, Record())
        for start in range(0, len(data), size):
            relay.feed(0, data[start : start + size])
        relay.finish()


def test_a_restarted_rank_begins_anew(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.feed(
        0,
        b"\x1b[?25l" + b"half a line" + STDERR + b"half" + mark(SECRET, "d7") + b"behind a lost display\n" + STDERR[:8],
    )
    relay.restart(0)
    relay.feed(0, b"attempt 1\n" + mark(SECRET, "d1"))
    relay.display(0, display(1, **{"text/html": "x"}))
    assert record.text.splitlines()[-2:] == ["[rank 0] attempt 1", "[rank 0]"]
    assert "[rank 0] half a line" in record.text
    assert "(rank 0) behind a lost display" in record.text
    assert record.shown[-1] == {"text/html": "x"}


def test_a_mark_of_another_run_is_text(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.feed(0, mark("f" * 16, "d1") + b"\n")
    relay.finish()
    assert "nbddp:ffff" in record.text


def test_a_line_that_may_be_drawn_on_is_shown_after_a_while(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    assert relay.due == float("inf")
    relay.feed(0, b"\r100%\n")
    assert 0.3 < relay.due - time.monotonic() < 0.6
    relay.tick()
    assert record.shown == []
    time.sleep(max(0.0, relay.due - time.monotonic()))
    relay.tick()
    assert record.text == "[rank 0] 100%\n"
    assert relay.due == float("inf")


# Which ranks, and in which order.


def test_only_the_ranks_that_are_asked_for_are_shown(record: Record, tmp_path: Path) -> None:
    logs = Logs(str(tmp_path))
    relay = Relay(3, logs, SECRET, record, View(ranks=(0, 2)))
    for rank in range(3):
        relay.feed(rank, b"line\n")
        relay.feed(rank, mark(SECRET, "d1"))
        relay.display(rank, display(1, **{"text/html": str(rank)}))
    relay.finish()
    assert record.text.count("line") == 2
    assert "rank 1" not in record.text
    assert {"text/html": "1"} not in record.shown
    assert log(logs, 1) == b"line\n"


def test_plain_output_is_rank_after_rank_without_colours(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, 3, plain=True)
    relay.feed(2, b"c\n" + mark(SECRET, "d1"))
    relay.feed(0, b"a\n")
    relay.display(2, display(1, **{"text/html": "x"}))
    relay.feed(1, b"b\n")
    assert record.shown == ["[rank 0] a\n"]
    relay.feed(0, b"a2\n")
    relay.finish()
    assert record.shown == [
        "[rank 0] a\n",
        "[rank 0] a2\n",
        "[rank 1] b\n[rank 2] c\n[rank 2]\n",
        {"text/html": "x"},
    ]


def test_what_cannot_be_updated_in_place_is_plain(record: Record, tmp_path: Path) -> None:
    record.in_place = False
    relay = make(record, tmp_path)
    relay.feed(1, b"b\n")
    relay.feed(0, b"a\n")
    relay.finish()
    assert "".join(record.shown) == "[rank 0] a\n[rank 1] b\n"


def test_values_that_differ_are_shown(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=3)
    values = {rank: ({"text/plain": text}, {}) for rank, text in enumerate(("5", "5", "6"))}
    assert relay.finish(values) == ({"text/plain": "5"}, {})
    assert record.text == "[rank 2] 6\n"


# Displays.


def test_a_display_whose_mark_never_comes_is_shown_at_the_end(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1)
    relay.display(0, display(1, **{"text/html": "x"}))
    relay.finish()
    assert record.shown == [{"text/html": "x"}]


def test_a_display_may_come_before_or_after_its_mark(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1)
    relay.display(0, display(1, **{"text/html": "1"}))
    relay.feed(0, b"a\n" + mark(SECRET, "d1") + b"b\n" + mark(SECRET, "d2"))
    relay.display(0, display(2, **{"text/html": "2"}))
    assert record.shown == ["a\n", {"text/html": "1"}, "b\n", {"text/html": "2"}]


def shown_with_id(rank: int, number: int, text: str, *, update: bool, key: str = "x") -> dict[str, Any]:
    return display(number, **{"text/html": text}) | {"transient": {"display_id": key}, "update": update}


def test_ids_of_displays_are_each_ranks_own(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    for rank in range(2):
        relay.feed(rank, mark(SECRET, "d1") + mark(SECRET, "d2"))
        relay.display(rank, shown_with_id(rank, 1, f"{rank} old", update=False))
    relay.display(1, shown_with_id(1, 2, "1 new", update=True))
    relay.finish()
    ids = {data["text/html"]: key for key, data in (item for item in record.shown if isinstance(item, tuple))}
    assert ids["0 old"] != ids["1 new"]
    assert "1 new" in ids


def test_updates_of_what_the_notebook_showed_go_there(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.feed(0, mark(SECRET, "d1"))
    relay.display(0, shown_with_id(0, 1, "new", update=True, key="the notebook's"))
    relay.finish()
    assert record.shown == [("the notebook's", {"text/html": "new"})]


def test_in_plain_output_a_display_has_its_last_state(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, plain=True)
    for rank in range(2):
        relay.feed(rank, mark(SECRET, "d1") + mark(SECRET, "u2") + mark(SECRET, "u3"))
        relay.display(rank, shown_with_id(rank, 1, "first", update=False))
        relay.display(rank, shown_with_id(rank, 2, "second", update=True))
        relay.display(rank, shown_with_id(rank, 3, f"last of {rank}", update=True))
    relay.finish()
    states: dict[str, str] = {}
    for key, data in (item for item in record.shown if isinstance(item, tuple)):
        states[key] = data["text/html"]
    assert sorted(states.values()) == ["last of 0", "last of 1"]
    # The first rank's is shown at once and updated at the end; the other's is shown as it is by then.
    assert sum(isinstance(item, tuple) for item in record.shown) == 3


def test_a_cleared_display_is_forgotten(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1)
    relay.feed(0, mark(SECRET, "d1") + mark(SECRET, "u2") + mark(SECRET, "u3"))
    relay.display(0, shown_with_id(0, 1, "gone", update=False))
    relay.display(0, {"number": 2, "clear": "now"})
    relay.display(0, shown_with_id(0, 3, "too late", update=True))
    relay.finish()
    assert not any("too late" in str(item) for item in record.shown)


def test_many_updates_become_few(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1)
    relay.feed(0, mark(SECRET, "d1"))
    relay.display(0, shown_with_id(0, 1, "first", update=False))
    for number in range(2, 500):
        relay.feed(0, mark(SECRET, f"d{number}"))
        relay.display(0, shown_with_id(0, number, str(number), update=True))
    relay.finish()
    assert len(record.shown) < 20
    assert record.shown[-1][1] == {"text/html": "499"}


def test_clearing_takes_away_what_that_rank_has_shown(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.feed(0, b"old\n")
    relay.feed(1, b"other\n")
    relay.feed(0, mark(SECRET, "d1"))
    relay.display(0, {"number": 1, "clear": "wait"})
    assert "<clear>" not in record.shown
    relay.feed(0, b"new\n")
    assert record.shown[2] == "<clear>"
    assert COLOUR.sub("", "".join(record.shown[3:])) == "[rank 1] other\n[rank 0] new\n"


def test_clearing_without_waiting(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1)
    relay.feed(0, b"old\n" + mark(SECRET, "d1"))
    relay.display(0, {"number": 1, "clear": "now"})
    assert record.shown == ["old\n", "<clear now>"]


def test_clearing_in_a_loop_is_not_a_flood(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path)
    relay.feed(1, b"other\n")
    for number in range(1, 1000):
        relay.display(0, {"number": number, "clear": "wait"})
        relay.feed(0, mark(SECRET, f"d{number}") + b"%d\n" % number)
    relay.finish()
    assert len(record.shown) < 20
    last = max(i for i, item in enumerate(record.shown) if item == "<clear>")
    assert COLOUR.sub("", "".join(record.shown[last + 1 :])) == "[rank 1] other\n[rank 0] 999\n"


def test_what_is_cleared_makes_room(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1, text_limit=1000, display_limit=10_000)
    for number in range(1, 2001, 2):
        relay.display(0, {"number": number, "clear": "wait"})
        relay.display(0, display(number + 1, **{"image/png": "x" * 1000}))
        relay.feed(
            0, mark(SECRET, f"d{number}") + b"y" * 500 + b"\n" + mark(SECRET, f"d{number + 1}") + b"%d\n" % number
        )
    relay.finish()
    assert "not shown" not in record.text
    assert record.shown[-1] == "1999\n"


def test_displays_are_bounded(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1, display_limit=10_000)
    for number in range(1, 21):
        relay.feed(0, mark(SECRET, f"d{number}"))
        relay.display(0, display(number, **{"image/png": "x" * 1000}))
    relay.finish()
    assert sum(isinstance(item, dict) for item in record.shown) == 10
    assert "10 displays are not shown" in record.text


# Floods.


@pytest.mark.parametrize("plain", [False, True])
def test_what_is_shown_is_bounded_and_what_is_left_out_is_said(record: Record, tmp_path: Path, plain: bool) -> None:
    logs = Logs(str(tmp_path))
    relay = make(record, tmp_path, logs=logs, text_limit=200_000, plain=plain)
    total = 300_000
    for start in range(0, total, 1000):
        relay.feed(1, b"".join(b"%d\n" % i for i in range(start, start + 1000)))
    relay.feed(0, b"one line\n")
    relay.finish()
    lines = record.text.splitlines()
    assert "[rank 1] 0" in lines
    assert f"[rank 1] {total - 1}" in lines
    assert "[rank 0] one line" in lines
    shown = sum(line.startswith("[rank 1]") for line in lines)
    notice = next(line for line in lines if line.startswith("…"))
    assert re.fullmatch(r"… [\d,]+ lines \([\d.]+ [kM]B\) of rank 1 not shown; %ddp log --rank 1", notice)
    assert shown + int(notice.split()[1].replace(",", "")) == total
    assert 100_000 < len(record.text) <= 400_000
    assert log(logs, 1).count(b"\n") == total


def test_a_server_is_given_no_more_than_it_takes(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1)
    record.takes = 10_000
    relay.feed(0, b"x" * 99 + b"\n")
    relay.feed(0, (b"y" * 99 + b"\n") * 1000)
    assert 0 < len(record.text) <= 10_000
    assert relay.due < time.monotonic() + 1
    record.takes = 1 << 40
    relay.finish()
    assert len(record.text) == 100_100


def test_a_line_that_is_longer_than_the_room_is_cut(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1, text_limit=2_000_000)
    record.takes = 30_000
    relay.feed(0, b"x" * 90_000 + b"\n")
    threading.Timer(0.5, lambda: setattr(record, "takes", 1 << 40)).start()
    relay.finish()
    assert record.text.replace("\n", "") == "x" * 90_000


def test_plain_output_does_not_depend_on_how_it_was_read(tmp_path: Path) -> None:
    data = b"".join(b"%d: %s\n" % (i, b"x" * (i % 50)) for i in range(300))
    texts = set()
    for size in (1, 100, 3000, 100_000):
        record = Record()
        relay = make(record, tmp_path, plain=True, text_limit=5000)
        for start in range(0, len(data), size):
            relay.feed(1, data[start : start + size])
        relay.finish()
        texts.add(record.text)
    assert len(texts) == 1


def test_a_display_that_cannot_be_shown_is_not_the_end(record: Record, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise UnicodeEncodeError("utf-8", "", 0, 1, "surrogates not allowed")

    record.publish = fail  # type: ignore[method-assign]
    relay = make(record, tmp_path, ranks=1)
    relay.display(0, display(1, **{"text/html": "x"}))
    relay.feed(0, mark(SECRET, "d1") + b"after\n")
    assert "a display could not be shown: UnicodeEncodeError" in record.text
    assert record.text.endswith("after\n")


def test_clearing_comes_before_what_is_hidden(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, text_limit=1000)
    relay.feed(0, b"y" * 90 + b"\n" * 100)
    for number in range(1, 700):
        relay.display(0, {"number": number, "clear": "wait"})
        relay.feed(0, mark(SECRET, f"u{number}") + b"now %d\n" % number + mark(SECRET, f"d{number + 1000}"))
        relay.display(0, display(number + 1000, **{"text/plain": str(number)}))
    relay.finish()
    last = max(i for i, item in enumerate(record.shown) if item == "<clear>")
    assert COLOUR.sub("", "".join(record.shown[last + 1 :])) == "[rank 0] now 699\n[rank 0] 699\n"
    assert "not shown" not in record.text


def test_a_long_text_is_added_to_less_often(record: Record, tmp_path: Path) -> None:
    relay = make(record, tmp_path, ranks=1)
    for _ in range(1000):
        relay.feed(0, b"x" * 199 + b"\n")
    assert len(record.shown) < 500
    relay.finish()
    assert len(record.text) == 200_000


def test_a_full_disk_takes_the_log_and_not_the_run(record: Record, tmp_path: Path) -> None:
    logs = Logs(str(tmp_path))
    Path(logs.folder(), "rank0.log").symlink_to("/dev/full")
    relay = make(record, tmp_path, logs=logs)
    relay.feed(0, b"a\n" * 10_000)
    relay.feed(0, b"b\n")
    relay.finish()
    lines = record.text.splitlines()
    assert lines.count("[rank 0] a") == 10_000
    assert "[rank 0] b" in lines
    assert sum("the log of this rank ends here: No space left on device" in line for line in lines) == 1
