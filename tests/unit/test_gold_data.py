"""Golden solutions by rejection sampling, from a real, untrained teacher whose completions end now and then."""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openr1_rows import contents, killed_until_done
from stableopd.config_files import config_of
from stableopd.curation.gold import prepare_gold
from stableopd.curation.journal import Journal
from stableopd.curation.sampling import Rejection, samples_of
from stableopd.errors import ConfigError, DataError, RunFolderError
from stableopd.reading import read_rows


@pytest.fixture
def settings(checkpoints, dataset, tmp_path):
    def settings(*overrides: str, judge: str = "judge", rows: int = 12):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join((dataset / "train.jsonl").read_text().splitlines(keepends=True)[:rows]))
        given = {
            "teacher.model_name_or_path": str(checkpoints / "teacher"),
            "data.path": str(path),
            "rollout.max_completion_length": 10,
            "evaluation.judge": f"gold_judges:{judge}",
            "seed": 5,
        }
        return config_of(["method=opd", *(f"{key}={json.dumps(value)}" for key, value in given.items()), *overrides])

    return settings


SMALL = Rejection(num_samples=4, batch_prompts=5)


def make(config, out: Path, rejection: Rejection = SMALL, **options) -> dict:
    return prepare_gold(config, rejection, out, **options).run()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gold_is_complete_and_right_and_the_rest_of_the_row_is_kept(settings, tmp_path):
    card = make(settings(), tmp_path / "gold.jsonl")
    rows, prompts = lines(tmp_path / "gold.jsonl"), {row["prompt"]: row for row in read_rows(settings().data.path)}
    assert 0 < len(rows) < 12
    for row in rows:
        assert len(row["gold"]) % 2 == 1
        assert len(row["gold"]) < 10
        assert row["gold_tokens"] == len(row["gold"]) + 1
        assert row["answer"] == prompts[row["prompt"]]["answer"]
    completions = card["counts"]["Completions"]
    assert completions["all"] == sum(completions.values()) - completions["all"]
    assert completions["truncated"]
    assert completions["wrong"]
    assert completions["fit"] == len(rows) == card["counts"]["Prompts"]["with gold"]


def test_drawing_stops_at_a_prompts_first_fit_completion(settings, tmp_path):
    work = prepare_gold(settings(judge="fragile"), SMALL, tmp_path / "gold.jsonl")
    card = work.run()
    gold = {row["prompt"]: row["generation"] for row in lines(tmp_path / "gold.jsonl")}
    drawn = sum(gold.get(row["prompt"], 3) + 1 for row in work.result.prompts.rows)
    assert card["counts"]["Completions"]["all"] == drawn
    assert card["counts"]["Completions"]["judge_failed"]


def test_the_shortest_is_chosen_among_all_samples(settings, tmp_path):
    first = make(settings(), tmp_path / "first.jsonl", Rejection(num_samples=8))
    card = make(settings(), tmp_path / "shortest.jsonl", Rejection(num_samples=8, choose="shortest"))
    lengths = {row["prompt"]: row["gold_tokens"] for row in lines(tmp_path / "shortest.jsonl")}
    others = {row["prompt"]: row["gold_tokens"] for row in lines(tmp_path / "first.jsonl")}
    assert card["counts"]["Completions"]["all"] == 8 * 12 > first["counts"]["Completions"]["all"]
    assert lengths.keys() == others.keys()
    assert all(lengths[prompt] <= others[prompt] for prompt in lengths)
    assert sum(lengths.values()) < sum(others.values())


def test_a_completion_depends_on_seed_prompt_and_its_number_alone(settings, tmp_path):
    make(settings(), tmp_path / "all.jsonl")
    make(settings(rows=7), tmp_path / "some.jsonl", Rejection(num_samples=4, batch_prompts=3))
    every = {row["prompt"]: row["gold"] for row in lines(tmp_path / "all.jsonl")}
    some = {row["prompt"]: row["gold"] for row in lines(tmp_path / "some.jsonl")}
    assert some
    assert some.items() <= every.items()
    make(settings("seed=6"), tmp_path / "other.jsonl")
    assert every != {row["prompt"]: row["gold"] for row in lines(tmp_path / "other.jsonl")}


def test_killed_at_every_file_operation_it_goes_on_to_the_same_bytes(settings, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    make(settings(), tmp_path / "whole" / "gold.jsonl")
    work = prepare_gold(settings(), SMALL, tmp_path / "killed" / "gold.jsonl")
    assert killed_until_done(work.run) > 8
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert set(contents(tmp_path / "whole")) == {"gold.jsonl", "gold.card.json", "gold.card.md"}


def test_what_was_drawn_before_a_kill_is_not_drawn_again(settings, tmp_path, monkeypatch):
    work = prepare_gold(settings(), SMALL, tmp_path / "gold.jsonl")
    calls = []
    commit = Journal.commit

    def third_is_the_last(journal, state):
        commit(journal, state)
        calls.append(len(list(samples_of(journal))))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "commit", third_is_the_last)
    with pytest.raises(KeyboardInterrupt):
        work.run()
    drawn = calls[-1]
    card = work.run()
    assert calls[3] > drawn
    assert calls[-1] == card["counts"]["Completions"]["all"]


def test_the_prefix_of_the_template_is_put_before_gold(settings, tmp_path):
    make(settings(), tmp_path / "gold.jsonl", gold_prefix="<think>\n")
    assert all(row["gold"].startswith("<think>\n") for row in lines(tmp_path / "gold.jsonl"))


def test_a_finished_file_is_left_alone_and_others_are_not_overwritten(settings, tmp_path):
    out = tmp_path / "gold.jsonl"
    card = make(settings(), out)
    before = out.read_bytes()
    assert make(settings(), out) == card
    with pytest.raises(RunFolderError, match="seed: 5 -> 6"):
        make(settings("seed=6"), out)
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(RunFolderError, match="not overwritten"):
        make(settings(), tmp_path / "mine.jsonl")
    assert out.read_bytes() == before
    out.write_bytes(before[:-20])
    with pytest.raises(RunFolderError, match=r"gold.jsonl is not as it was written .*remove .*gold.card.json and"):
        make(settings(), out)
    out.unlink()
    with pytest.raises(RunFolderError, match=r"gold.jsonl is gone"):
        make(settings(), out)
    (tmp_path / "gold.card.json").unlink()
    assert make(settings(), out) == card
    assert out.read_bytes() == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("override", "named"),
    [("data.prompt_column=other", "asked_sha256"), ("data.gold_column=mine", "gold_column: 'gold' -> 'mine'")],
)
def test_gold_for_other_prompts_or_in_another_column_is_never_mixed_in(settings, tmp_path, finished, override, named):
    first, other = settings("rollout.max_batch_size=1"), settings(override)
    path = Path(first.data.path)
    rows = [{**row, "other": row["prompt"][::-1]} for row in read_rows(str(path))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "gold.jsonl"
    if finished:
        make(first, out)
    else:
        with pytest.raises(KeyboardInterrupt):
            prepare_gold(first, SMALL, out).run(_interrupt)
    with pytest.raises(RunFolderError, match=named):
        make(other, out)


def _interrupt(done: int) -> None:
    if done:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["rollout.max_completion_length=100000"], DataError, "more than the teacher's context"),
        (["data.path=null"], ConfigError, "no prompts: give --data"),
        (["data.answer_column=gold_answer"], DataError, "line 1: no answer in the column 'gold_answer'"),
        (["teacher={server_url: 'http://127.0.0.1:9'}"], ConfigError, "a server scores"),
        (["evaluation.judge=nowhere:judge"], ConfigError, "cannot be imported"),
    ],
)
def test_what_cannot_be_used_is_named(settings, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        make(settings(*overrides), tmp_path / "gold.jsonl")


def test_columns_of_parquet_that_json_lacks_are_written_in_its_forms(settings, dataset, tmp_path):
    rows = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()[:12]]
    odd = {
        "when": datetime(2026, 3, 1, 12, 30, tzinfo=UTC), "day": date(2026, 3, 1), "at": time(7, 5),
        "price": Decimal("1.50"), "inner": {"days": [date(2026, 3, 2), None], "score": [math.nan, 0.5]},
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([{**row, **odd} for row in rows]), tmp_path / "rows.parquet")
    make(settings(f"data.path={tmp_path / 'rows.parquet'}"), tmp_path / "gold.jsonl")
    for row in lines(tmp_path / "gold.jsonl"):
        assert {name: row[name] for name in odd} == {
            "when": "2026-03-01T12:30:00+00:00", "day": "2026-03-01", "at": "07:05:00",
            "price": "1.50", "inner": {"days": ["2026-03-02", None], "score": [None, 0.5]},
        }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "held"), [(b"png", "bytes"), ({"deep": [b"png"]}, "bytes"), (timedelta(1), "a timed")]
)
def test_a_column_that_cannot_be_written_is_named_before_anything_is_drawn(settings, tmp_path, value, held):
    rows = [{"prompt": "1234:", "answer": "7", "image": value}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=f"row 1: the column 'image' holds {held}"):
        prepare_gold(settings(f"data.path={tmp_path / 'rows.parquet'}"), SMALL, tmp_path / "gold.jsonl")


@pytest.mark.parametrize("answer", ["null", '" "', "NaN", "Infinity", '["7"]', '{"value": 7}'])
def test_a_row_without_an_answer_to_compare_with_is_refused(settings, tmp_path, answer):
    rows = [f'{{"prompt": "1234:", "answer": {one}}}\n' for one in ("7", answer)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    with pytest.raises(DataError, match="line 2: no answer in the column 'answer'"):
        make(settings(f"data.path={tmp_path / 'rows.jsonl'}"), tmp_path / "gold.jsonl")


def test_a_teacher_that_is_never_right_writes_nothing(settings, tmp_path):
    with pytest.raises(DataError, match=r"can be gold \(.*wrong \d+\)"):
        make(settings(judge="never"), tmp_path / "gold.jsonl")
    assert not (tmp_path / "gold.jsonl").exists()
    make(settings("seed=6"), tmp_path / "gold.jsonl")  # other settings, as the message says, are not refused
