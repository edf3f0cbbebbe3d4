"""Following real files while they grow, are cut, rewritten, replaced and removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.tailing import FileTail


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def replace(path: Path, data: bytes) -> None:
    """As the recorder does: written aside and renamed."""
    aside = path.with_name("aside")
    aside.write_bytes(data)
    aside.replace(path)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_only_what_was_appended_is_handed_out(path):
    tail = FileTail(path)
    path.write_bytes(b"one\ntwo\n")
    assert tail.read().lines == (b"one", b"two")
    assert tail.read().lines == ()
    append(path, b"three\n")
    assert tail.read().lines == (b"three",)


def test_only_what_was_appended_is_read_from_the_disk(path, monkeypatch):
    path.write_bytes(b"x" * 99 + b"\n" + b"y" * 1_000_000 + b"\n")
    tail = FileTail(path)
    tail.read()
    append(path, b"new\n")
    read_before = Path("/proc/self/io").read_text() if Path("/proc/self/io").exists() else pytest.skip("needs /proc")
    assert tail.read().lines == (b"new",)
    read_after = Path("/proc/self/io").read_text()
    before, after = (int(text.split("rchar: ")[1].split()[0]) for text in (read_before, read_after))
    assert after - before < 10_000


def test_a_torn_last_line_waits_until_it_is_whole(path):
    tail = FileTail(path)
    path.write_bytes(b'{"step": 1}\n{"ste')
    assert tail.read().lines == (b'{"step": 1}',)
    append(path, b'p": 2')
    assert tail.read().lines == ()
    append(path, b"}\n")
    assert tail.read().lines == (b'{"step": 2}',)


def test_a_file_that_is_not_there_yet_has_no_lines(path):
    tail = FileTail(path / "deeper")
    assert tail.read().lines == ()
    path.mkdir()
    (path / "deeper").write_bytes(b"one\n")
    piece = tail.read()
    assert (piece.lines, piece.restarted) == ((b"one",), False)


def test_a_shorter_file_begins_anew(path):
    tail = FileTail(path)
    path.write_bytes(b"one\ntwo\nthree\n")
    tail.read()
    os.truncate(path, 4)
    piece = tail.read()
    assert (piece.lines, piece.restarted) == ((b"one",), True)


def test_a_replaced_file_begins_anew_even_when_it_is_longer(path):
    tail = FileTail(path)
    path.write_bytes(b"one\n")
    tail.read()
    replace(path, b"one\nother\n")
    piece = tail.read()
    assert (piece.lines, piece.restarted) == ((b"one", b"other"), True)


def test_a_file_cut_and_grown_again_between_two_looks_begins_anew(path):
    tail = FileTail(path)
    path.write_bytes(b"one\ntwo\n")
    tail.read()
    path.write_bytes(b"uno\ndos\ntres\n")  # the same inode, longer than before
    piece = tail.read()
    assert (piece.lines, piece.restarted) == ((b"uno", b"dos", b"tres"), True)


def test_a_removed_file_takes_its_lines_with_it_once(path):
    tail = FileTail(path)
    path.write_bytes(b"one\n")
    tail.read()
    path.unlink()
    assert tail.read().restarted
    assert not tail.read().restarted
    path.write_bytes(b"two\n")
    assert tail.read().lines == (b"two",)


def test_a_torn_line_of_the_old_file_is_not_joined_to_the_new_one(path):
    tail = FileTail(path)
    path.write_bytes(b"one\ntorn")
    tail.read()
    replace(path, b"new\n")
    assert tail.read().lines == (b"new",)


def test_a_long_file_comes_in_pieces(path):
    path.write_bytes(b"".join(b"%d\n" % number for number in range(1000)))
    tail, lines = FileTail(path, max_bytes=100), []
    for _ in range(100):
        piece = tail.read()
        lines += piece.lines
        if not piece.more:
            break
    assert lines == [b"%d" % number for number in range(1000)]


def test_an_overlong_line_is_skipped_and_counted_and_what_follows_is_not(path):
    path.write_bytes(b"first\n" + b"x" * 500 + b"\nlast\n")
    tail, lines = FileTail(path, max_bytes=16, max_line_bytes=100), []
    while (piece := tail.read()).more:
        lines += piece.lines
    assert [*lines, *piece.lines] == [b"first", b"last"]
    assert tail.skipped_lines == 1


def test_a_pipe_in_place_of_the_file_is_an_error_and_does_not_block(path):
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        FileTail(path).read()


def test_after_a_failed_read_the_next_one_goes_on_where_it_would_have(path, tmp_path):
    tail = FileTail(path)
    path.write_bytes(b"one\n")
    tail.read()
    hidden = path.rename(tmp_path / "hidden")
    path.symlink_to(path.name)  # a link to itself: cannot be opened
    with pytest.raises(OSError):
        tail.read()
    path.unlink()
    hidden.rename(path)
    append(path, b"two\n")
    piece = tail.read()
    assert (piece.lines, piece.restarted) == ((b"two",), False)


def test_line_ends_of_windows_are_taken_off(path):
    path.write_bytes(b"one\r\ntwo\r\n")
    assert FileTail(path).read().lines == (b"one", b"two")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=12), st.integers(1, 9))
def test_however_a_file_is_written_the_lines_are_those_of_the_whole_file(tmp_path_factory, pieces, max_bytes):
    path = tmp_path_factory.mktemp("tail") / "file"
    path.touch()
    tail, lines = FileTail(path, max_bytes=max_bytes), []
    for piece in pieces:
        append(path, piece)
        more = True
        while more:
            read = tail.read()
            assert not read.restarted
            lines += read.lines
            more = read.more
    whole = [line.removesuffix(b"\r") for line in b"".join(pieces).split(b"\n")[:-1]]
    assert lines == whole
