"""The logs of a run: in memory while they are short, in files for who asks."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

import pytest

from nbddp._log_files import Log, Logs


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(str(tmp_path))


def texts(logs: Logs) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(logs.saved()).iterdir())}


def test_a_short_log_is_no_file_until_somebody_asks(logs: Logs, tmp_path: Path) -> None:
    first, second = logs.new(0), logs.new(1)
    first.write(b"one\n")
    assert list(tmp_path.iterdir()) == []
    assert texts(logs) == {"rank0.log": b"one\n", "rank1.log": b""}
    first.write(b"two\n")
    second.write(b"three\n")
    assert texts(logs) == {"rank0.log": b"one\ntwo\n", "rank1.log": b"three\n"}


def test_a_long_log_is_a_file_and_keeps_its_order(logs: Logs, tmp_path: Path) -> None:
    log = logs.new(0)
    lines = [b"%d\n" % i for i in range(10_000)]
    for line in lines:
        log.write(line)
    (file,) = tmp_path.rglob("*.log")
    assert file.read_bytes() == b"".join(lines)
    log.close()
    assert texts(logs) == {"rank0.log": b"".join(lines)}


def test_only_their_owner_can_read_them(logs: Logs) -> None:
    logs.new(0).write(b"secret")
    folder = logs.saved()
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert os.stat(Path(folder, "rank0.log")).st_mode & 0o777 == 0o600


def test_nothing_comes_after_the_end_and_no_file_stays_open(logs: Logs) -> None:
    before = os.listdir("/proc/self/fd")
    log = logs.new(0)
    log.write(b"all\n")
    log.close()
    log.write(b"more\n")
    assert texts(logs) == {"rank0.log": b"all\n"}
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("asked_before", [False, True])
def test_ranks_of_a_second_machine_have_other_numbers(logs: Logs, asked_before: bool) -> None:
    for number in range(3):
        logs.new(number).write(b"%d" % number)
    if asked_before:
        logs.saved()
    logs.number_from(2)
    assert texts(logs) == {"rank2.log": b"0", "rank3.log": b"1", "rank4.log": b"2"}


def test_what_is_written_after_a_move_goes_along(logs: Logs, tmp_path: Path) -> None:
    log = logs.new(0)
    log.write(b"before\n")
    logs.move(str(tmp_path / "elsewhere"))
    log.write(b"after\n")
    assert (tmp_path / "elsewhere" / "rank0.log").read_bytes() == b"before\nafter\n"
    assert logs.saved() == str(tmp_path / "elsewhere")
    logs.delete()
    assert (tmp_path / "elsewhere" / "rank0.log").read_bytes() == b"before\nafter\n"


def test_deleted_logs_leave_nothing_and_are_gone_at_once(logs: Logs, tmp_path: Path) -> None:
    log = logs.new(0)
    log.write(b"x" * 100_000)
    gone = weakref.ref(log)
    logs.delete()
    log.write(b"y" * 100_000)
    assert list(tmp_path.iterdir()) == []
    del log
    assert gone() is None


def test_without_room_it_is_said_once_and_the_beginning_stays(logs: Logs) -> None:
    log = logs.new(0)
    log.write(b"a" * 1000)
    Path(logs.folder(), "rank0.log").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        log.write(b"b" * 100_000)
    log.write(b"c")
    with pytest.raises(OSError, match="No space left"):
        logs.saved()
    Path(logs.folder(), "rank0.log").unlink()
    assert texts(logs) == {"rank0.log": b"a" * 1000}


def test_a_run_that_begins_anew_has_a_log_of_its_own(logs: Logs) -> None:
    first = logs.new(0)
    first.write(b"cannot fork\n")
    second = logs.new(0)
    second.write(b"x" * 50_000)
    first.write(b"more")
    second.write(b"end")
    assert texts(logs) == {"rank0.log": b"x" * 50_000 + b"end"}
    logs.number_from(3)
    assert texts(logs) == {"rank3.log": b"x" * 50_000 + b"end"}


def test_one_that_finds_no_room_does_not_hide_the_others(logs: Logs) -> None:
    for number in range(3):
        logs.new(number).write(b"%d" % number)
    Path(logs.folder(), "rank1.log").symlink_to("/dev/full")
    assert Path(logs.saved(0), "rank0.log").read_bytes() == b"0"
    assert Path(logs.saved(2), "rank2.log").read_bytes() == b"2"
    with pytest.raises(OSError, match="No space left"):
        logs.saved(1)
    with pytest.raises(OSError, match="No space left"):
        logs.saved()


@pytest.mark.parametrize("made", [False, True])
def test_they_are_moved_to_where_there_is_room(tmp_path: Path, made: bool) -> None:
    (tmp_path / "here").mkdir()
    logs = Logs(str(tmp_path / "here"))
    logs.new(0).write(b"short")
    if made:
        logs.folder()
    logs.move(str(tmp_path / "there"))
    assert (tmp_path / "there" / "rank0.log").read_bytes() == b"short"
    assert list((tmp_path / "here").iterdir()) == []


def test_another_number_needs_no_room(tmp_path: Path) -> None:
    logs = Logs(str(tmp_path / "gone"))
    logs.new(0).write(b"a")
    logs.number_from(2)


def test_it_can_be_read_while_it_is_written(logs: Logs) -> None:
    log = logs.new(0)
    lines = [b"%d\n" % i for i in range(20_000)]

    def write(log: Log) -> None:
        for line in lines:
            log.write(line)

    thread = threading.Thread(target=write, args=(log,))
    thread.start()
    whole = b"".join(lines)
    while thread.is_alive():
        assert whole.startswith(texts(logs)["rank0.log"])
    assert texts(logs)["rank0.log"] == whole
