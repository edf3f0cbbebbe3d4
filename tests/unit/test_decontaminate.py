"""Prompts that a benchmark asks as well are found however they are dressed, and others are left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopd.curation.decontaminate import decontaminate
from stableopd.curation.overlap import OverlapIndex, words_of
from stableopd.errors import DataError, RunFolderError

BENCHMARK = [
    "Let $S$ be the set of all positive integers whose decimal digits add up to exactly seventeen; find its least one.",
    "Find the remainder when $2^{100}$ is divided by $101$ exactly.",
    "What is $2+3$?",
]
INDEX = OverlapIndex({"bench": BENCHMARK})

words = st.lists(st.sampled_from([f"w{n}" for n in range(40)]), min_size=1, max_size=40)
others = st.lists(st.sampled_from([f"o{n}" for n in range(40)]), max_size=30)
dressing = st.sampled_from([" ", "  ", "\n", ", ", " $", "$ ", " \\( ", "; "])


@given(words, others, others, st.data())
def test_every_planted_overlap_is_found(benchmark, before, after, data):
    index = OverlapIndex({"b": [" ".join(benchmark)]}, ngram=13, min_ngram=8)
    size = min(13, len(benchmark))
    start = data.draw(st.integers(0, len(benchmark) - size))
    planted = data.draw(dressing).join(word.upper() for word in benchmark[start : start + size])
    whole = planted if size < 8 else " ".join([*before, planted, *after])
    assert index.match(whole) is not None


@given(st.lists(words, min_size=1, max_size=5), st.lists(others, max_size=5))
def test_nothing_is_found_between_vocabularies_that_share_no_word(benchmark, prompts):
    index = OverlapIndex({"b": [" ".join(prompt) for prompt in benchmark]}, ngram=4, min_ngram=1)
    assert not any(index.match(" ".join(prompt)) for prompt in prompts)


@given(words, words)
def test_a_match_has_its_words_in_both_prompts(benchmark, prompt):
    match = OverlapIndex({"b": [" ".join(benchmark)]}, ngram=5, min_ngram=2).match(" ".join(prompt))
    if match is not None:
        assert f" {match.words} " in f" {' '.join(benchmark)} "
        assert f" {match.words} " in f" {' '.join(prompt)} "


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("Solve:  LET s be the set of all positive integers whose decimal digits add up to 17", "ngram"),
        ("Please find the remainder when 2^100 is divided by 101 exactly, and explain.", "contains"),
        ("Please find the remainder when 2^{100} is divided by 101 exactly, and explain.", "contains"),
        ("Whose decimal digits add up to exactly seventeen?", "contained"),
        ("what is 2 + 3", "exact"),
        ("What is $2-3$?", None),
        ("What is 2+3 and 4+5?", None),
        ("Whose decimal digits add up to 17?", None),
    ],
)
def test_what_counts_as_the_same(prompt, reason):
    match = INDEX.match(prompt)
    assert (match.reason if match else None) == reason


def test_words_are_free_of_dressing_and_han_characters_are_words():
    assert words_of("Find $x_{1}$,\n the ＲＯＯＴ!") == ("find", "x", "1", "the", "root")
    assert words_of("求所有整数x") == ("求", "所", "有", "整", "数", "x")


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="min_ngram"):
        OverlapIndex({}, ngram=3, min_ngram=4)


# ------------------------------------------------------------------------------------ files

ROWS = (
    '{"prompt": "Prove it.",   "gold": "\\u00e9", "n": 1.50}\n'
    '{"prompt": [{"role": "system", "content": "What is 2+3?"}, {"role": "user", "content": "what is $2+3$"}]}\n'
    "\n"
    '{"problem": "What is 2+3?", "prompt": "What is 2+3?\\nPlease reason step by step."}\n'
    '{"problem": "Is it so?", "prompt": "What is 2+3?"}'
)


def run(path: Path, out: Path, **options) -> dict:
    return decontaminate(path, out, INDEX, benchmarks={"bench": 3}, **options)


def test_kept_lines_are_unchanged_and_removed_ones_told_with_their_match(tmp_path):
    (tmp_path / "a.jsonl").write_text(ROWS)
    card = run(tmp_path / "a.jsonl", tmp_path / "clean.jsonl")
    lines = ROWS.split("\n")
    assert (tmp_path / "clean.jsonl").read_text() == f"{lines[0]}\n{lines[4]}\n"
    removed = [json.loads(line) for line in (tmp_path / "clean.removed.jsonl").read_text().splitlines()]
    assert [(one["row"], one["reason"], one["benchmark"]) for one in removed] == [
        (2, "exact", "bench"),
        (4, "exact", "bench"),
    ]
    assert removed[1]["benchmark_prompt"] == BENCHMARK[2]
    assert removed[1]["removed"] == json.loads(lines[3])
    assert card["counts"]["Rows"] == {
        "read": 4, "kept": 2, "removed": 2, "exact": 2, "ngram": 0, "contains": 0, "contained": 0
    }  # fmt: skip
    assert json.loads((tmp_path / "clean.card.json").read_text()) == card
    assert "| removed | 2 |" in (tmp_path / "clean.card.md").read_text()


def test_the_prompt_may_be_in_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "Is it so?", "q": "What is 2+3?"}\n')
    assert run(tmp_path / "a.jsonl", tmp_path / "b.jsonl", column="q")["counts"]["Rows"]["removed"] == 1


def test_parquet_keeps_its_schema_and_the_rows_that_stay(tmp_path):
    prompts = [f"prompt {n}" for n in range(600)]
    prompts[::7] = ["What is 2+3?"] * len(prompts[::7])
    table = pa.table({"prompt": prompts, "n": pa.array(range(600), pa.int16())})
    pq.write_table(table, tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "b.parquet")
    kept = pq.read_table(tmp_path / "b.parquet")
    assert kept.schema == table.schema
    assert kept["n"].to_pylist() == [n for n in range(600) if n % 7]


def test_a_folder_of_outputs_is_not_written_over_and_a_broken_row_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"}\n{"prompt": 3}\n')
    with pytest.raises(DataError, match="line 2: the column 'prompt' is a number"):
        run(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    (tmp_path / "b.removed.jsonl").write_text("mine")
    with pytest.raises(RunFolderError, match="not overwritten"):
        run(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("content", "out", "message"),
    [
        (b'{"prompt": "p"}', "b.parquet", "both must be .jsonl or both .parquet"),
        (b"{", "b.jsonl", "line 1 is not JSON"),
        (b"[1]", "b.jsonl", "line 1 is a list"),
        (b'{"q": "p"}', "b.jsonl", "columns are 'q'"),
    ],
)
def test_bad_input_is_named(tmp_path, content, out, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "a.jsonl", tmp_path / out)
