"""Rollout files of every trainer come out as the same records; what is broken is named, not hidden."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_makers import slime_sample, write_json_lines, write_slime, write_trl, write_verl

from stableopd import rollout_files
from stableopd.errors import ConfigError, DataError
from stableopd.reading import Place
from stableopd.rollout_files import Broken, checked_format, find_sources, recognise
from stableopd.rollout_rows import (
    CORRECT_KEYS,
    COUNT_KEYS,
    IDS_KEYS,
    REASON_KEYS,
    REWARD_KEYS,
    STEP_KEYS,
    TEXT_KEYS,
    BadRowError,
    RolloutRecord,
    record_of,
)

HERE = Place("x.jsonl", "line", 1)


def read(path: Path, format=None) -> list[RolloutRecord | Broken]:
    return [item for source in find_sources([path], format) for file in source.files for item in file.read()]


def record(**row) -> RolloutRecord:
    return record_of(row, HERE)


# ------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("chat", [False, True])
def test_trl_completions_are_read_with_step_and_the_accuracy_among_several_rewards(tmp_path, chat):
    write_trl(tmp_path, [["one", "two"], ["three", "four"]], chat=chat)
    (tmp_path / "checkpoint-2").mkdir()
    torch.save({"state": {}}, tmp_path / "checkpoint-2" / "optimizer.pt")
    records = read(tmp_path)
    assert [(r.step, r.completion, r.reward) for r in records] == [
        (1, "one", 0.0), (1, "two", 1.0), (2, "three", 0.0), (2, "four", 1.0)
    ]  # fmt: skip
    assert recognise(next((tmp_path / "completions").iterdir())) == "trl"
    assert records[0].finish_reason is None
    assert records[0].prompt == "What is 3 + 4?"


def test_trl_distillation_has_no_rewards(tmp_path):
    write_trl(tmp_path, [["one"]], rewards=False)
    assert [r.reward for r in read(tmp_path)] == [None]


def test_a_choice_between_several_rewards_is_not_guessed(tmp_path):
    import pandas as pd

    pd.DataFrame({"step": [1], "completion": ["x"], "style": [1.0], "tone": [0.0]}).to_parquet(tmp_path / "a.parquet")
    assert [r.reward for r in read(tmp_path)] == [None]


def test_verl_dumps_are_read_in_the_order_of_their_steps(tmp_path):
    write_verl(tmp_path, [["text"]] * 11)
    records = read(tmp_path)
    assert [r.step for r in records] == list(range(1, 12))
    assert recognise(tmp_path / "10.jsonl") == "verl"
    assert (records[0].completion, records[0].answer, records[0].correct) == ("text", "7", False)


def test_slime_dumps_give_the_responses_tokens_and_why_they_ended(tmp_path):
    write_slime(tmp_path, [["fine", "Wait Wait"]])
    first, second = read(tmp_path)
    assert (first.step, first.completion, first.finish_reason, first.num_tokens) == (0, "fine", "stop", 4)
    assert first.token_ids.tolist() == [1 + ord(c) % 500 for c in "fine"]
    assert second.finish_reason == "length"
    assert recognise(tmp_path / "rollout_0.pt") == "slime"


def test_slimes_rewards_of_several_figures_and_tensors_of_tokens_are_understood(tmp_path):
    sample = slime_sample("abc", 0) | {"reward": {"score": 0.25, "acc": True}, "tokens": torch.tensor([5, 1, 2, 3])}
    torch.save({"rollout_id": 4, "samples": [sample]}, tmp_path / "r.pt")
    (only,) = read(tmp_path)
    assert (only.reward, only.correct, only.token_ids.tolist(), only.step) == (0.25, True, [1, 2, 3], 4)


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_dump_that_would_run_code_is_refused_and_runs_none(tmp_path, legacy):
    marker = tmp_path / "was here"
    path = tmp_path / "rollout_0.pt"
    dump = {"rollout_id": 0, "samples": [slime_sample("a", 0) | {"metadata": Payload(marker)}]}
    torch.save(dump, path, _use_new_zipfile_serialization=not legacy)
    (broken,) = read(path)
    assert "unpickling of objects" in broken.why
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"PK\x03\x04 no archive", b"\x80\x02 no pickle", pickle.dumps([1, 2])])
def test_what_only_begins_like_a_torch_file_is_broken_not_a_traceback(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    (broken,) = read(tmp_path / "x.pt")
    assert isinstance(broken, Broken)


def test_an_archive_of_something_else_is_broken(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "torch file" in read(tmp_path / "x.pt")[0].why


def test_a_torn_parquet_file_is_broken(tmp_path):
    write_trl(tmp_path, [["one"] * 50])
    path = next((tmp_path / "completions").iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    assert "Parquet" in read(path)[0].why


def test_slime_without_torch_says_what_to_install(tmp_path):
    write_slime(tmp_path, [["a"]])
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from stableopd.diagnose import diagnose\n"
        "from stableopd.errors import MissingDependencyError\n"
        f"try: diagnose([{str(tmp_path)!r}])\n"
        "except MissingDependencyError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" in done.stdout
    assert "pip install torch" in done.stdout


# ------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("key", ["completion", "text", "response", "output"])
def test_plain_json_lines_may_call_the_completion_by_any_usual_name(tmp_path, key):
    (only,) = read(write_json_lines(tmp_path / "a.jsonl", [{key: "hello", "finish_reason": "length"}]))
    assert (only.completion, only.finish_reason, only.step) == ("hello", "length", None)


def test_a_completion_may_be_chat_messages_or_token_ids():
    chat = [{"role": "user", "content": "no"}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    assert record(completion=chat).completion == "yes"
    assert record(completion={"role": "assistant", "content": "yes"}).completion == "yes"
    ids = record(output=[5, 6, 7])
    assert (ids.completion, ids.token_ids.tolist(), ids.num_tokens) == (None, [5, 6, 7], 3)
    both = record(text="ab", completion_ids=[5, 6])
    assert (both.completion, both.num_tokens) == ("ab", 2)


def test_a_prompt_that_cannot_be_shown_is_left_out():
    assert record(completion="x", prompt=[1, 2]).prompt is None
    assert record(completion="x", prompt=[{"role": "user", "content": "why"}]).prompt == "why"


def test_an_empty_completion_is_one():
    assert record(completion="").completion == ""
    assert record(completion=[]).num_tokens == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"finish_reason": "stop"}, "stop"), ({"finish_reason": "max_tokens"}, "length"),
        ({"finish_reason": {"type": "length", "length": 5}}, "length"), ({"status": "aborted"}, "abort"),
        ({"truncated": True}, "length"), ({"truncated": False}, "stop"), ({"finish_reason": "loop"}, "loop"),
        ({"finish_reason": "something new"}, None), ({}, None),
    ],
)  # fmt: skip
def test_why_a_completion_ended_is_translated_and_never_guessed(row, reason):
    assert record(completion="x", **row).finish_reason == reason


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([1], "not an object"), ({"prompt": "x"}, "no completion"), ({}, "no keys"), ({"completion": 5}, "a number"),
        ({"completion": [1.5]}, "token ids"), ({"completion": [[1]]}, "token ids"),
        ({"completion": [True]}, "token ids"), ({"completion": [2**70]}, "token ids"),
        ({"completion": [None, []]}, "token ids"), ({"completion": "x", "step": float("nan")}, "step"),
        ({"completion": "x", "step": "two"}, "step"), ({"completion": "x", "step": 1.5}, "step"),
        ({"completion": "x", "step": 10**400}, "step"), ({"completion": None}, "no completion"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_rollout_says_why(row, why):
    with pytest.raises(BadRowError, match=why):
        record_of(row, HERE)


def test_rewards_that_are_no_finite_numbers_are_unknown():
    for value in (float("nan"), float("inf"), "good", None, [1.0], 10**400):
        assert record(completion="x", reward=value).reward is None
    assert record(completion="x", score=True).reward == 1.0
    assert record(completion="x", score=np.float32(0.5)).reward == 0.5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from((*TEXT_KEYS, *STEP_KEYS, *REASON_KEYS, *REWARD_KEYS, *COUNT_KEYS, *IDS_KEYS, *CORRECT_KEYS))


@given(JSON | st.dictionaries(KEYS, JSON, max_size=8))
def test_any_row_gives_a_record_or_a_reason(row):
    with suppress(BadRowError):
        found = record_of(row, HERE)
        assert found.completion is not None or found.token_ids is not None
        assert found.step is None or -(2**63) < found.step < 2**63


# ------------------------------------------------------------------------------------ lines


def test_broken_lines_are_named_and_the_others_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": \n{"text": "\xff"}\nnull\n'
        + b"[" * 100_000 + b'\n{"text": NaN}\n{"text": "two", "reward": NaN}'
    )  # fmt: skip
    items = read(path)
    assert [item.completion for item in items if isinstance(item, RolloutRecord)] == ["one", "two"]
    broken = {item.place.number: item.why for item in items if isinstance(item, Broken)}
    assert sorted(broken) == [3, 4, 5, 6, 7]
    assert "not JSON" in broken[3]
    assert "not UTF-8 (byte 0xff at position 11)" in broken[4]
    assert "null" in broken[5]


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_beyond_all_bounds_is_skipped_without_being_kept(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(rollout_files, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    exact = b'{"text": "' + b"x" * 87 + b'"}\n'  # 100 bytes with the line's end
    path.write_bytes(exact + b'{"text": "' + b"y" * 950 + b'"}\n{"text": "z"}\n' + b"w" * 350 + ending)
    items = read(path, "jsonl")
    assert [getattr(item, "completion", None) for item in items] == ["x" * 87, None, "z", None]
    assert [item.place.number for item in items] == [1, 2, 3, 4]
    assert "longer than" in items[1].why


def test_the_bytes_announced_are_those_of_the_file(tmp_path):
    write_trl(tmp_path / "trl", [["one"] * 50])
    write_slime(tmp_path / "slime", [["a"]])
    write_json_lines(tmp_path / "lines" / "a.jsonl", [{"text": "x" * n} for n in range(50)])
    for folder in ("trl", "slime", "lines"):
        (file,) = find_sources([tmp_path / folder])[0].files
        told: list[int] = []
        list(file.read(told.append))
        assert sum(told) == file.size


def test_text_is_one_completion_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text('one\n\n[bold]two[/]\n"three"\n42\n', encoding="utf-8")
    assert [r.completion for r in read(path)] == ["one", "[bold]two[/]", '"three"', "42"]


def test_json_lines_are_known_by_their_content_not_their_name(tmp_path):
    assert recognise(write_json_lines(tmp_path / "rollouts.log", [{"text": "x"}])) == "jsonl"
    assert recognise(write_json_lines(tmp_path / "a.txt", [{"step": 1, "completion": "", "finish_reason": "stop",
                                                           "num_tokens": 1}])) == "run"  # fmt: skip


def test_a_format_can_be_forced(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    assert [r.completion for r in read(path, "text")] == ['{"text": "x"}']
    assert checked_format(None) is None
    with pytest.raises(ConfigError, match="slime"):
        checked_format("vrel")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[\n{"text": "x"}\n]', "jq -c"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0), "gunzip"),
    ],
)
def test_what_is_not_read_line_by_line_says_how_to_convert_it(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        find_sources([tmp_path / name])


# ------------------------------------------------------------------------------------ finding


def test_missing_paths_and_folders_without_rollouts_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_sources([tmp_path / "absent"])
    with pytest.raises(DataError, match="no rollout files"):
        find_sources([tmp_path])
    write_json_lines(tmp_path / "trainer_log.jsonl", [{"loss": 1.0, "step": 1}])
    with pytest.raises(DataError, match="none of completion"):
        find_sources([tmp_path])


def test_a_folder_of_mixed_files_gives_those_that_hold_rollouts_and_says_what_it_left_out(tmp_path):
    write_json_lines(tmp_path / "2.jsonl", [{"text": "b"}])
    write_json_lines(tmp_path / "10.jsonl", [{"text": "c"}])
    write_json_lines(tmp_path / "log.jsonl", [{"loss": 1.0}])
    write_slime(tmp_path, [["a"]])
    torch.save({"samples": []}, tmp_path / "eval_3.pt")
    (tmp_path / "README.txt").write_text("not a rollout")
    (tmp_path / ".hidden.jsonl").write_text('{"text": "no"}\n')
    (source,) = find_sources([tmp_path])
    assert [file.path.name for file in source.files] == ["2.jsonl", "10.jsonl", "rollout_0.pt"]
    assert any("log.jsonl" in why for why in source.left_out)
    assert any("eval_3.pt holds evaluations" in why for why in source.left_out)


def test_text_files_of_a_folder_count_where_there_is_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    assert [r.completion for r in read(tmp_path)] == ["one"]


def test_each_folder_is_a_run_and_all_files_together_are_one(tmp_path):
    for name in ("a", "b"):
        write_json_lines(tmp_path / name / "1.jsonl", [{"text": "x"}])
        write_json_lines(tmp_path / f"{name}.jsonl", [{"text": "y"}])
    sources = find_sources([tmp_path / "a.jsonl", tmp_path / "a", tmp_path / "b", tmp_path / "b.jsonl"])
    assert [len(source.files) for source in sources] == [1, 1, 2]


def test_the_number_in_a_files_name_is_its_step_where_rows_have_none(tmp_path):
    write_json_lines(tmp_path / "step-000030.jsonl", [{"text": "x"}, {"text": "y", "step": 7}])
    assert [r.step for r in read(tmp_path)] == [30, 7]


@settings(max_examples=60)
@given(content=st.binary(max_size=200), name=st.sampled_from(["a.jsonl", "a.txt", "a.pt", "a.parquet"]))
def test_any_bytes_give_records_or_reasons(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content)
    with suppress(DataError):
        assert all(isinstance(item, RolloutRecord | Broken) for item in read(path))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_json_lines_come_back_as_they_were_written(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8",
                    newline="")  # fmt: skip
    assert [r.completion for r in read(path)] == texts
