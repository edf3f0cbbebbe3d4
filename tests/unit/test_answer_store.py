"""The answers that an evaluation keeps: what a line must hold to be one."""

from __future__ import annotations

import json

import pytest

from stableopd.benchmarking.cache import Answer, AnswerStore

GOOD = {"prompt": 0, "sample": 0, "text": "2", "num_tokens": 2, "finish_reason": "stop"}


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": "2"}, {"num_tokens": 0}, {"num_tokens": -3}, {"num_tokens": 2.0}, {"num_tokens": True},
        {"num_tokens": float("nan")}, {"num_tokens": None}, {"num_tokens": 1_001}, {"num_tokens": 10**400},
        {"finish_reason": "magic"},
        {"finish_reason": 1}, {"finish_reason": ["stop"]}, {"finish_reason": None}, {"text": 2}, {"text": None},
        {"prompt": "0"}, {"prompt": -1}, {"sample": 0.0}, {"sample": -1}, {"more": 1},
    ],
)  # fmt: skip
def test_a_line_with_what_no_answer_has_is_made_again(tmp_path, change):
    (tmp_path / "completions.jsonl").write_text(json.dumps({**GOOD, **change}) + "\n")
    store = AnswerStore(tmp_path, 1_000)
    assert store.missing(1, 1) == {0: [0]}
    store.add(Answer(**GOOD))
    assert AnswerStore(tmp_path, 1_000).answers == {(0, 0): Answer(**GOOD)}


def test_lines_of_another_kind_are_passed_over(tmp_path):
    lines = ["[1]", "1", "null", "{", "[" * 100_000, json.dumps(GOOD), '{"prompt": ']
    (tmp_path / "completions.jsonl").write_text("\n".join(lines))
    assert AnswerStore(tmp_path, 1_000).answers == {(0, 0): Answer(**GOOD)}
    assert (tmp_path / "completions.jsonl").read_text().endswith("\n")
