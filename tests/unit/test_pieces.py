"""Text in pieces: nothing is lost, and a loop is a loop in every script."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopd.health.pieces import find_text_loops, piece_ids, split_pieces

TEXTS = st.text(st.characters(), max_size=60)


@given(TEXTS)
def test_joined_pieces_are_the_text(text):
    assert "".join(split_pieces(text)) == text


@given(TEXTS)
def test_ids_are_equal_exactly_where_pieces_are(text):
    pieces = split_pieces(text)
    ids = piece_ids(pieces).tolist()
    assert [[a == b for b in pieces] for a in pieces] == [[a == b for b in ids] for a in ids]


def test_a_piece_is_a_word_with_its_space_or_a_single_character():
    assert split_pieces("Wait, x1 = 42.\nÜber  день") == [
        "Wait", ",", " x", "1", " ", "=", " ", "4", "2", ".", "\n", "Über", " ", " день"
    ]  # fmt: skip


def test_characters_of_scripts_without_spaces_are_pieces_of_their_own():
    for text in ("我们检查", "もういちど", "ตรวจสอบ", "ကြည့်"):
        assert split_pieces(text) == list(text)


def test_words_of_vietnamese_arabic_and_hindi_stay_whole():
    assert split_pieces("kiểm tra") == ["kiểm", " tra"]
    assert split_pieces("تحقق مرة") == ["تحقق", " مرة"]


def test_letters_of_a_row_too_long_for_a_word_are_single():
    assert split_pieces("a" * 16) == ["a" * 16]
    assert split_pieces("a" * 17) == ["a"] * 17


@pytest.mark.parametrize(
    "cycle",
    [
        "so wait, let me check this again. ", "我们再检查一下", "ลองตรวจสอบอีกครั้ง", "проверим ещё раз, ", "🙂🙃",
        "1368;w", "ha", "0", "\n",
    ],
)  # fmt: skip
def test_a_loop_is_found_in_every_script_with_its_place_and_period(cycle):
    text = "The answer is 12." + cycle * 40 + "Done?"
    loops = find_text_loops(text)
    assert len(loops) == 1
    loop = loops[0]
    assert loop.period == len(cycle) or (len(set(cycle)) == 1 and loop.period == 1)
    repeats = (17 + len(cycle) * 40 - loop.start) // loop.period
    assert repeats >= 39
    assert all(text[at] == text[at + loop.period] for at in range(loop.start, loop.end - loop.period))


@given(TEXTS, st.text(st.characters(), min_size=1, max_size=12), st.integers(18, 30), TEXTS)
def test_a_named_stretch_repeats_character_by_character(head, cycle, times, tail):
    text = head + cycle * times + tail
    loops = find_text_loops(text)
    for loop in loops:
        assert 0 <= loop.start < loop.end <= len(text)
        assert text[loop.start : loop.end - loop.period] == text[loop.start + loop.period : loop.end]
        assert loop.num_repeats >= 3 - 1e-9 or loop.num_repeats > 2  # the last turn may be cut within a piece


def test_prose_and_empty_text_have_no_loops():
    assert find_text_loops("") == []
    assert find_text_loops("The quick brown fox jumps over the lazy dog, and then it sleeps for an hour or two.") == []
