"""The verdict on rollouts, its JSON and what the terminal shows of it."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import pytest
from fake_runs import write_collapsing_run, write_healthy_run, write_lines
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rollout_makers import looping, prose, texts_by_step, write_json_lines, write_slime, write_trl, write_verl

from stableopd.diagnose import diagnose
from stableopd.diagnose_view import MAX_ROWS, exit_code, print_diagnosis, printable
from stableopd.diagnosis import Diagnosis, to_json
from stableopd.errors import ConfigError, DataError

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]not markup[/] [/] \x9b31m \u202ebackwards \ud800 "


def only(*paths: Path, **options) -> Diagnosis:
    (diagnosis,) = diagnose(paths, **options)
    return diagnosis


def shown(diagnosis: Diagnosis, width: int = 200) -> str:
    out = io.StringIO()
    print_diagnosis(Console(file=out, width=width), diagnosis)
    return out.getvalue()


def write_plain(path: Path, *, steps: int = 30, onset: float = float("inf"), **known) -> Path:
    rows = [
        {"step": step, "completion": text, "finish_reason": "length" if "Wait" in text else "stop", **known}
        for step, texts in enumerate(texts_by_step(steps=steps, onset=onset), start=1)
        for text in texts
    ]
    return write_json_lines(path, rows)


# ------------------------------------------------------------------------------------ verdict


WRITERS = {
    "trl": lambda folder, texts: write_trl(folder, texts),
    "chat": lambda folder, texts: write_trl(folder, texts, chat=True),
    "verl": write_verl,
    "slime": write_slime,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rollouts_that_fall_into_loops_are_an_alert_in_every_format(tmp_path, name):
    sick = only(WRITERS[name](tmp_path / "sick", texts_by_step(steps=20, onset=11)))
    assert not sick.healthy
    assert sick.severity == "critical"
    assert "loops" in {alert.rule for alert in sick.alerts}
    assert 9 <= sick.step <= 15
    assert "repetition" in sick.cause
    assert "StableOPD" in sick.advice
    well = only(WRITERS[name](tmp_path / "well", texts_by_step(steps=20)))
    assert well.healthy
    assert (well.status, well.alerts, well.cause) == ("healthy", (), None)
    assert sick.num_rollouts == well.num_rollouts == 640


def test_the_order_of_rows_does_not_matter(tmp_path):
    path = write_plain(tmp_path / "a.jsonl", onset=15)
    lines = path.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (tmp_path / "b.jsonl").write_text("".join(lines))
    first, second = only(path), only(tmp_path / "b.jsonl")
    assert (first.headline, first.alerts, first.steps) == (second.headline, second.alerts, second.steps)
    assert first.status == "collapsed"
    assert [row.step for row in first.steps] == list(range(1, 31))


def test_one_batch_without_steps_is_judged_by_its_levels(tmp_path):
    rng = random.Random(0)
    for name, make, healthy in (("sick", looping, False), ("well", prose, True)):
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(make(rng) + "\n" for _ in range(40)))
        diagnosis = only(path)
        assert diagnosis.healthy == healthy
        assert diagnosis.step is None
        assert "step 0" not in shown(diagnosis)


def test_steps_of_few_rollouts_are_judged_together(tmp_path):
    rng = random.Random(0)
    rows = [{"step": s, "completion": looping(rng, 10) if s % 50 == 25 else prose(rng)} for s in range(400)]
    assert only(write_json_lines(tmp_path / "a.jsonl", rows)).healthy
    rows = [{"step": s, "completion": looping(rng) if s >= 200 and s % 2 else prose(rng)} for s in range(400)]
    sick = only(write_json_lines(tmp_path / "b.jsonl", rows))
    assert 190 <= sick.step <= 300


def test_a_few_steps_of_a_few_rollouts_are_judged_as_one(tmp_path):
    rows = [{"step": s, "text": "x", "truncated": s == 1} for s in (1, 2, 3) for _ in range(4)]
    diagnosis = only(write_json_lines(tmp_path / "a.jsonl", rows))
    assert diagnosis.healthy  # a third is truncated; of step 1, all
    assert any("growth is not" in note for note in diagnosis.notes)


def test_growth_in_characters_is_not_called_tokens(tmp_path):
    rng = random.Random(0)
    rows = [{"step": s, "text": prose(rng, 20 if s < 10 else 200)} for s in range(20) for _ in range(32)]
    diagnosis = only(write_json_lines(tmp_path / "a.jsonl", rows))
    (alert,) = [alert for alert in diagnosis.alerts if alert.rule == "length_growth" and alert.severity == "critical"]
    assert diagnosis.length_unit == "characters"
    assert "characters on average" in alert.message
    assert "tokens" not in alert.message


def test_growth_with_growing_accuracy_is_no_alarm(tmp_path):
    rng = random.Random(0)
    for name, right in (("grows", lambda s: s / 20), ("stays", lambda s: 0.5)):
        rows = [
            {"step": s, "text": prose(rng, 20 if s < 10 else 60), "reward": float(n < 32 * right(s)),
             "finish_reason": "stop"}
            for s in range(20) for n in range(32)
        ]  # fmt: skip
        assert only(write_json_lines(tmp_path / f"{name}.jsonl", rows)).healthy == (name == "grows")


# ------------------------------------------------------------------------------------ run folders


def test_a_run_folder_is_judged_by_its_own_figures_of_whole_batches(tmp_path):
    sick = only(write_collapsing_run(tmp_path / "opd"))
    assert sick.status == "collapsed"
    assert "held_out accuracy fell" in sick.headline
    assert len(sick.steps) == 101
    assert sick.samples
    assert sick.samples[0].loop
    assert any("metrics.jsonl" in note for note in sick.notes)
    assert "held-out accuracy" in shown(sick)


def test_a_dip_of_a_noisy_evaluation_does_not_make_a_healthy_run_sick(tmp_path):
    well = only(write_healthy_run(tmp_path / "stableopd"))
    assert any(alert.rule == "eval_accuracy" for alert in well.alerts)
    assert well.healthy


def test_greedy_answers_that_no_longer_end_are_an_alert_where_training_looks_well(tmp_path):
    rows = [{"step": s, "completions/clipped_ratio": 0.0, "eval/v/accuracy": 0.5, "eval/v/truncation_rate": 0.0,
             "eval/v_greedy/truncation_rate": s / 20} for s in range(20)]  # fmt: skip
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert not only(tmp_path).healthy


def test_the_rollouts_of_a_run_folder_can_be_judged_by_themselves(tmp_path):
    folder = write_collapsing_run(tmp_path / "opd")
    diagnosis = only(folder / "rollouts")
    assert not diagnosis.healthy
    assert diagnosis.length_unit == "tokens"
    assert "held-out" not in shown(diagnosis)


def test_a_run_folder_without_rollouts_is_judged_by_its_metrics(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "completions/clipped_ratio": 0.0} for s in range(10)])
    assert only(tmp_path).healthy


def test_a_run_is_held_against_the_thresholds_that_it_was_watched_with(tmp_path):
    rows = [{"step": s, "completions/mean_length": 10.0, "completions/max_length": 90.0} for s in range(10)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert only(tmp_path).healthy
    (tmp_path / "config.yaml").write_text("health: {max_expected_length: 80, thresholds: {window: 3}}")
    assert [alert.rule for alert in only(tmp_path).alerts] == ["length_over_expected"]


def test_steps_that_a_resumed_run_repeated_count_once(tmp_path):
    early = [{"step": s, "completions/clipped_ratio": 0.0} for s in range(10)]
    crashed = [{"step": s, "completions/clipped_ratio": 1.0} for s in range(5, 20)]
    again = [{"step": s, "completions/clipped_ratio": 0.0} for s in range(5, 20)]
    write_lines(tmp_path / "metrics.jsonl", [*early, *crashed, *again])
    assert only(tmp_path).healthy


def test_a_torn_line_of_the_metrics_is_named(tmp_path):
    folder = write_healthy_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "compl')
    diagnosis = only(folder)
    assert diagnosis.num_broken == 1
    assert "metrics.jsonl, line 102" in str(diagnosis.broken[0])


# ------------------------------------------------------------------------------------ what is not known


def test_unknown_truncation_is_left_out_and_said(tmp_path):
    rows = [{"step": s, "completion_ids": [s, n] * (8 if n < 3 else n)} for s in range(20) for n in range(3, 20)]
    rows += [{"step": s, "completion_ids": list(range(64))} for s in range(20) for _ in range(9)]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    diagnosis = only(path)
    assert "completions/clipped_ratio" not in diagnosis.figures.metrics
    assert any("truncation is left out" in note and "--max-length" in note for note in diagnosis.notes)
    assert any("exactly 64 tokens" in note for note in diagnosis.notes)
    told = only(path, max_length=64)
    assert told.figures.metrics["completions/clipped_ratio"] == pytest.approx(9 / 26)
    assert any("64 tokens or more count as truncated" in note for note in told.notes)


def test_growth_that_nothing_explains_yet_says_so(tmp_path):
    rng = random.Random(0)
    rows = [{"step": s, "text": prose(rng, 20 if s < 10 else 200)} for s in range(20) for _ in range(32)]
    diagnosis = only(write_json_lines(tmp_path / "a.jsonl", rows))
    assert diagnosis.cause.startswith("no truncation or repetition was seen")
    assert diagnosis.advice.startswith("turn on StableOPD")
    assert "No truncation" not in diagnosis.headline


def test_an_impossible_budget_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max-length"):
        diagnose([write_plain(tmp_path / "a.jsonl", steps=1)], max_length=0)


def test_broken_lines_are_counted_and_named_or_refused(tmp_path):
    path = write_plain(tmp_path / "a.jsonl", steps=10)
    with path.open("a") as file:
        file.write("{broken\n" * 30)
    diagnosis = only(path)
    assert (diagnosis.num_broken, diagnosis.num_rollouts) == (30, 320)
    assert f"{path}, line 321: it is not JSON" in shown(diagnosis)
    assert "skipped 30 in all" in shown(diagnosis)
    with pytest.raises(DataError, match="line 321"):
        diagnose([path], strict=True)


def test_nothing_but_broken_lines_or_nothing_at_all_is_bad_input(tmp_path):
    (tmp_path / "broken.jsonl").write_text("{\n{\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"2 broken, the first of them .*line 1"):
        diagnose([tmp_path / "broken.jsonl"])
    with pytest.raises(DataError, match="it is empty"):
        diagnose([tmp_path / "empty.jsonl"])


# ------------------------------------------------------------------------------------ JSON and terminal


def test_the_json_has_all_of_it_and_no_nan(tmp_path):
    path = write_plain(tmp_path / "a.jsonl", onset=15, reward=float("nan"))
    diagnosis = only(path)
    document = json.loads(to_json([diagnosis]), parse_constant=lambda name: pytest.fail(name))
    (run,) = document["runs"]
    assert document["healthy"] is False
    assert run["verdict"]["status"] == "collapsed"
    assert {"cause", "advice", "headline", "step", "severity", "reasons"} <= run["verdict"].keys()
    assert [row["step"] for row in run["steps"]] == list(range(1, 31))
    assert run["steps"][0]["completions/mean_length"] > 0
    sample = run["samples"][0]
    text = json.loads(path.read_text().splitlines()[sample["line"] - 1])["completion"]
    loop = sample["loop"]
    assert text[loop["start"] : loop["start"] + loop["period"]] == loop["text"]
    assert loop["num_repeats"] == pytest.approx((loop["end"] - loop["start"]) / loop["period"])


def test_what_a_model_wrote_is_shown_and_not_obeyed(tmp_path):
    text = HOSTILE + HOSTILE.join(["so again "] * 40)
    rows = [{"step": HOSTILE}, {"completion": text, "prompt": HOSTILE, "answer": HOSTILE}]
    path = write_json_lines(tmp_path / f"[bold]{chr(27)}[31m.jsonl", rows)
    diagnosis = only(path)
    for output in (shown(diagnosis), to_json([diagnosis])):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", output)
        assert "[bold red]not markup[/]" in output
    assert "[bold]␛[31m.jsonl" in shown(diagnosis)


@given(st.text(st.characters(), max_size=40))
def test_printable_text_has_one_line_and_no_control_characters(text):
    safe = printable(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", safe)
    safe.encode("utf-8")


def test_many_steps_are_shown_in_few_rows_and_all_of_them_are_counted(tmp_path):
    diagnosis = only(write_plain(tmp_path / "a.jsonl", steps=90))
    rows = diagnosis.rows(MAX_ROWS)
    assert len(rows) <= MAX_ROWS
    assert sum(row.num_rollouts for row in rows) == 90 * 32
    assert (rows[0].step, rows[-1].last_step) == (1, 90)
    text = shown(diagnosis, width=80)
    assert "1–5" in text
    assert max(len(line) for line in text.split("Healthy")[0].splitlines()[1:]) <= 80


def test_the_exit_code_is_that_of_the_sickest(tmp_path):
    well, sick = only(write_healthy_run(tmp_path / "a")), only(write_collapsing_run(tmp_path / "b"))
    assert [exit_code(found) for found in ([well], [well, sick])] == [0, 1]
