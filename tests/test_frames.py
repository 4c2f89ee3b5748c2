"""What carries messages between machines: what is sent arrives as it was, and what is no message does no harm."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbddp import _frames
from nbddp._frames import (
    LONG_LINE,
    LONGEST_MESSAGE,
    SHORT_LINE,
    Decoder,
    Frame,
    FrameError,
    LineReader,
    LineWriter,
    TooLongError,
    check_name,
    encode,
)
from tests.kernel import Kernel

# On a busy machine an example may take any time.
some, many = (settings(deadline=None, max_examples=examples) for examples in (100, 400))

jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.text("abcdefgh", min_size=1, max_size=6)
messages = st.tuples(st.just("J"), st.tuples(names, st.dictionaries(names.map(lambda n: f"x{n}"), jsons, max_size=4)))
pieces = st.tuples(
    st.sampled_from("OF"), st.tuples(st.integers(0, (1 << 32) - 1), st.binary(max_size=3000) | st.just(b"@0 0 .QQ==\n"))
)


def lines_of(writer: LineWriter, kind: str, content: tuple) -> bytes:  # type: ignore[type-arg]
    first, second = content
    if kind == "J":
        return writer.message(first, **second)
    return writer.output(first, second) if kind == "O" else writer.piece(first, second)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted(n % (len(data) + 1) for n in at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def taken(reader: LineReader | Decoder, parts: Sequence[bytes]) -> tuple[list[Any], str]:
    """Return what comes out before an error, and the error; nothing else is raised."""
    got: list[Any] = []
    try:
        for part in parts:
            for one in reader.feed(part):
                got.append(one)  # those before an error count
    except FrameError as error:
        return got, str(error)
    return got, ""


@some
@given(
    st.lists(st.tuples(st.integers(0, 3), messages | pieces), max_size=8),
    st.sampled_from([SHORT_LINE, LONG_LINE]),
    st.lists(st.integers(0, 1 << 20), max_size=6),
    st.lists(st.sampled_from([b"", b"hello", b"\xff\x00", b"*** Welcome @ this cluster ***"]), max_size=3),
)
def test_lines_of_several_nodes_arrive_however_they_are_cut_and_whatever_stands_between(
    sent: list, limit: int, at: list[int], strange: list[bytes]
) -> None:
    writers = {node: LineWriter(node, limit) for node in range(4)}
    blocks = [lines_of(writers[node], *what) for node, what in sent]
    assert all(len(line) <= limit for block in blocks for line in block.splitlines(keepends=True))
    stream = b"".join(b"\n".join([*strange, b""]) + block for block in blocks)
    reader = LineReader()
    got = [one for part in cut(stream, at) for one in reader.feed(part)]
    expected = [
        (node, Frame("J", {"kind": what[1][0], **what[1][1]}) if what[0] == "J" else Frame(what[0], {}, *what[1]))
        for node, what in sent
    ]
    assert got == expected
    assert set(reader.strange) <= {one.decode(errors="replace").strip() for one in strange}


@some
@given(st.lists(messages | pieces, min_size=1, max_size=5), st.data())
def test_a_line_that_is_lost_changed_or_doubled_is_found_out_or_was_nothing(sent: list, data: st.DataObject) -> None:
    """Never is a message taken for another: what comes out is a beginning of what was sent."""
    writer = LineWriter(0, SHORT_LINE)
    lines = b"".join(lines_of(writer, *what) for what in sent).splitlines(keepends=True)
    whole = list(LineReader().feed(b"".join(lines)))
    last = len(lines) - 1
    where = data.draw(st.integers(0, last))
    match data.draw(st.sampled_from(["lost", "doubled", "torn"])):
        case "lost":
            del lines[where]
        case "doubled":
            lines.insert(where, lines[where])
        case "torn":
            lines[where] = lines[where][: data.draw(st.integers(0, len(lines[where]) - 1))]
    got, error = taken(LineReader(), [b"".join(lines)])
    assert got == whole[: len(got)]
    # Torn, a line takes the next with it; that nothing more comes is for the lease to find out.
    assert error or where >= last - 1


@many
@given(st.lists(st.binary(max_size=200) | st.binary(max_size=40).map(lambda b: b"@0 0 ." + b + b"\n"), max_size=5))
def test_whatever_comes_from_a_node_is_a_frame_or_an_error(parts: list[bytes]) -> None:
    got, error = taken(LineReader(), parts)
    assert len(error) < 400
    for _, frame in got:
        assert frame.kind in "JOF"
        assert frame.kind != "J" or isinstance(frame.message["kind"], str)


@many
@given(
    st.lists(
        st.binary(max_size=60)
        | jsons.map(lambda j: json.dumps(j).encode()).map(lambda b: struct.pack("!I", len(b)) + b)
        | st.tuples(names, st.binary(max_size=50)).map(lambda pair: encode(pair[0], pair[1])),
        max_size=5,
    ),
    st.lists(st.integers(0, 1 << 20), max_size=6),
)
def test_whatever_comes_to_a_node_is_a_message_or_an_error(parts: list[bytes], at: list[int]) -> None:
    got, error = taken(Decoder(), cut(b"".join(parts), at))
    assert len(error) < 400
    for message, raw in got:
        assert isinstance(message["kind"], str)
        assert len(raw) == message.get("raw", 0)


@some
@given(st.lists(st.tuples(names, st.binary(max_size=5000)), max_size=5), st.lists(st.integers(0, 1 << 20), max_size=8))
def test_messages_to_a_node_arrive_however_they_are_cut(sent: list[tuple[str, bytes]], at: list[int]) -> None:
    decoder = Decoder()
    stream = b"".join(encode(kind, raw, more=1) for kind, raw in sent)
    got = [one for part in cut(stream, at) for one in decoder.feed(part)]
    assert got == [({"kind": kind, "raw": len(raw), "more": 1}, raw) for kind, raw in sent]


def test_what_is_too_long_is_not_kept() -> None:
    reader = LineReader()
    for _ in range(40):
        assert list(reader.feed(b"x" * LONG_LINE)) == []
    assert len(reader._buffer) <= 2 * LONG_LINE
    assert all(len(line) <= 500 for line in reader.strange)
    # And a node that is silent about the end of its message.
    writer = LineWriter(0, LONG_LINE)
    endless = b"".join(writer.output(0, bytes(48000)).replace(b" .", b" +", 1) for _ in range(1200))
    with pytest.raises(FrameError, match="a message of node 0 cannot have"):
        list(LineReader().feed(endless))
    with pytest.raises(FrameError, match="cannot have 4294967295 bytes"):
        list(Decoder().feed(b"\xff\xff\xff\xff"))
    for raw in (-1, 1 << 40, True, "1", None, 1.5):
        body = json.dumps({"kind": "piece", "raw": raw}).encode()
        with pytest.raises(FrameError, match="behind it"):
            list(Decoder().feed(struct.pack("!I", len(body)) + body))


@pytest.mark.parametrize("limit", [SHORT_LINE, LONG_LINE])
def test_what_a_node_may_send_the_other_side_takes(limit: int) -> None:
    writer, reader = LineWriter(3, limit), LineReader()
    empty = len(json.dumps({"kind": "x", "text": ""}, separators=(",", ":")))
    text = "x" * (LONGEST_MESSAGE - empty)
    with pytest.raises(TooLongError, match="cannot have 33554433 bytes") as caught:
        writer.message("x", text=text + "x")
    assert caught.value.size == LONGEST_MESSAGE + 1
    ((node, frame),) = reader.feed(writer.message("x", text=text))
    assert node == 3
    assert frame.message["text"] == text


@pytest.mark.parametrize(
    "name", ["../x", "results.0/../../x", "/etc/x", "socket", "cell.py", "stacks.0", "results.0\n"]
)
def test_what_comes_from_a_node_is_written_nowhere_else(name: str) -> None:
    check_name("results.17", 0, to_node=False)
    check_name("exception.3", 1 << 40, to_node=False)
    for bad in (name, f"results.{name}", "", ".", "..", None, 3, ["results.0"], "results.1.2", "closure"):
        with pytest.raises(FrameError, match="a file cannot be called"):
            check_name(bad, 1, to_node=False)


def test_what_goes_to_a_node_is_written_nowhere_else() -> None:
    for good in ("cell.py", "closure", "closure.12"):
        check_name(good, 5, to_node=True)
    for bad in ("results.0", "closure.x", "closure./x", "../cell.py", "socket", "sitecustomize.py"):
        with pytest.raises(FrameError, match="a file cannot be called"):
            check_name(bad, 5, to_node=True)
    for size in (-1, True, "5", None):
        with pytest.raises(FrameError, match="cannot have"):
            check_name("closure", size, to_node=True)


# A node that is not what it should be: it greets as the other would, and then says something else.
HOSTILE = """#!{python}
import os, sys
sys.path.insert(0, {package!r})
from nbddp._frames import LineWriter, versions, PROTOCOL
number = int(sys.argv[-1].partition('/')[0])
lines = LineWriter(number, 60000)
def say(kind, **fields):
    os.write(1, lines.message(kind, **fields))
say("hello", protocol=PROTOCOL, host="liar", job="", pid=1, **versions())
if number == 1:
    {act}
while (data := os.read(0, 65536)) and b'"kill"' not in data:
    pass
say("ended")
"""


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("say('file', file=1, name='../../../owned', size=3); os.write(1, lines.piece(1, b'abc'))", "a file cannot be"),
        ("say('file', file=1, name='socket', size=3)", "a file cannot be called 'socket'"),
        ("say('file', file=1, name='results.0', size=3)", "it speaks of rank 0, which is another node's"),
        ("say('file', file=1, name='results.1', size=-3)", "results.1 cannot have -3 bytes"),
        ("os.write(1, LineWriter(0, 900).message('refused', reason='said by the other'))", "it is of node 0"),
        ("os.write(1, LineWriter(77, 900).message('ended'))", "it is of node 77"),
        ("say('rank', rank=0, local=0, attempt=0, pid=1, world=2)", "it speaks of rank 0"),
        ("os.write(1, lines.output(0, b'as if rank 0 had said it'))", "it speaks of rank 0"),
        ("os.write(1, lines.piece(9, b'of no file'))", "a message is not one that nodes send: KeyError"),
        ("say('stack', rank='../../x', text='x')", "it speaks of rank ../../x"),
        ("say('beat')", "a message is not one that nodes send"),
        ("say('beat', t='x', now=[])", "a message is not one that nodes send"),
        ("say(['beat'])", "it has no kind"),
        ("os.write(1, b'@1 1 .!!!!\\\\n')", "a line is torn"),
    ],
)
def test_a_node_that_lies_is_found_out(kernel: Kernel, tmp_path: Path, act: str, words: str) -> None:
    program = tmp_path / "python"
    package = str(Path(_frames.__file__).parent.parent)
    program.write_text(
        HOSTILE.format(
            python=kernel.get("__import__('sys').executable"), package=package, act=act.replace("\\\\", "\\")
        )
    )
    program.chmod(0o755)
    reply = kernel.run(f"%%ddp --engine local --nnodes 2 --cpus 1 --python {program}\nprint('ran')")
    assert reply.error == "LaunchError"
    assert words in reply.message
    assert "node1 (liar)" in reply.message
    assert not list(Path(kernel.get("__import__('os').environ['TMPDIR']")).rglob("owned"))
