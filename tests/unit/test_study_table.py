from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from fake_runs import write_collapsing_run, write_healthy_run
from rich.console import Console

from stableopd.bootstrap import Estimate
from stableopd.errors import RunFolderError
from stableopd.runfolder import read_run
from stableopd.study.cells import Cell, cells_of
from stableopd.study.charts import _label
from stableopd.study.config import StudyConfig
from stableopd.study.jobs import Ended, Job
from stableopd.study.outcome import Outcome, append_outcome, outcome_of_run, read_folder, read_outcomes
from stableopd.study.report import headline, markdown, render_study, write_study
from stableopd.study.running import StudyRun
from stableopd.study.table import rows_by_pair, rows_of, score
from stableopd.study.view import by_benchmark, cells_of_row, columns, note, print_study, shown, to_json, warnings

NASTY = "</script><script>alert(1)</script>[bold]"


def outcome(arm: str, pair: str = "p", seed: int = 0, accuracy: float = 0.5, **more) -> Outcome:
    figures = {"late_accuracy": accuracy, "best_accuracy": accuracy, "collapsed": 0.0, **more.pop("figures", {})}
    curves = {"accuracy": [(0, 0.1), (10, accuracy)], "length": [(1, 9.0), (10, 10.0)]}
    return Outcome(
        arm=arm, pair=pair, seed=seed, digest="d", figures=figures, verdict=more.pop("verdict", "healthy"),
        headline=more.pop("headline", "Healthy."), curves=curves, **more,
    )  # fmt: skip


def a_run(outcomes, *, methods=("stableopd", "opd"), failures=(), **given) -> StudyRun:
    study = StudyConfig(
        base={"student": {"model_name_or_path": "s"}, "teacher": {"model_name_or_path": "t"}, "data": {"path": "d"}},
        methods={name: {} for name in methods}, output_dir="out", **given,
    )  # fmt: skip
    cells: list[Cell] = cells_of(study)
    return StudyRun(study=study, cells=cells, outcomes=outcomes, failures=failures)


def two_methods(difference: float) -> list[Outcome]:
    """Seeds differ much among each other, methods by the same amount everywhere."""
    levels = (0.2, 0.4, 0.6, 0.7)
    runs = [outcome("stableopd", seed=seed, accuracy=level) for seed, level in enumerate(levels)]
    return runs + [outcome("opd", seed=seed, accuracy=level + difference) for seed, level in enumerate(levels)]


def test_differences_are_taken_between_runs_of_the_same_pair_and_seed():
    stable, opd = rows_of(a_run(two_methods(-0.1)))
    assert stable.difference is None
    assert opd.difference.mean == pytest.approx(-0.1)
    assert opd.difference.high - opd.difference.low < 1e-6
    assert opd.accuracy.high - opd.accuracy.low > 0.2
    assert (opd.better, opd.paired) == (0, 4)


def test_a_run_without_a_twin_counts_for_the_mean_and_not_for_the_difference():
    lonely = outcome("opd", seed=9, accuracy=0.0)
    row = rows_of(a_run([*two_methods(0.05), lonely]))[1]
    assert row.num_runs == 5
    assert row.paired == 4
    assert row.difference.mean == pytest.approx(0.05)
    assert row.better == 4


def test_answers_to_the_same_prompts_are_what_is_compared_where_there_are_some():
    def answered(arm: str, seed: int, answers: list[float], digest: str = "x") -> Outcome:
        return outcome(arm, seed=seed, answers={"b": answers}, benchmarks={"b": digest})

    runs = [answered("stableopd", 0, [1, 1, 0, 0]), answered("opd", 0, [1, 0, 0, 0])]
    stable, opd = rows_of(a_run(runs))
    assert (stable.accuracy.mean, opd.accuracy.mean) == (0.5, 0.25)
    assert opd.difference.mean == -0.25
    assert opd.difference.low == -0.75  # prompts are resampled even where there is one run
    other = rows_of(a_run([runs[0], answered("opd", 0, [1, 0, 0, 0], digest="y")]))[1]
    assert other.difference.mean == -0.25
    assert other.difference.low is None  # prompts of another benchmark are not paired


def test_collapses_are_counted_on_the_way_and_at_the_end():
    runs = [
        outcome("stableopd"),
        outcome("opd", seed=0, figures={"collapsed": 1.0, "collapsed_at_end": 1.0}, verdict="collapsed"),
        outcome("opd", seed=1, figures={"collapsed": 1.0}, verdict="warning"),
        outcome("opd", seed=2),
    ]
    row = rows_of(a_run(runs))[1]
    assert (row.collapsed, row.collapsed_at_end) == (2, 1)
    assert cells_of_row(row)[-1] == "2 (1)"


def test_pairs_have_tables_of_their_own_only_where_there_are_several():
    assert rows_by_pair(a_run(two_methods(0.1))) == {}
    runs = [outcome("stableopd", "p", accuracy=0.3), outcome("opd", "q", accuracy=0.4)]
    tables = rows_by_pair(a_run(runs))
    assert {pair: [row.arm for row in rows] for pair, rows in tables.items()} == {"p": ["stableopd"], "q": ["opd"]}
    assert tables["q"][0].difference is None  # nothing to compare with


@pytest.mark.parametrize(("width", "interval"), [(80, "[-.050,-.050]"), (120, "-0.050 [-0.050, -0.050]")])
def test_the_table_fits_the_terminal_and_shows_intervals_whole(width, interval):
    console = Console(width=width, record=True, file=io.StringIO())
    print_study(console, a_run(two_methods(-0.05)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert interval in text


def test_figures_of_a_run_folder_tell_a_collapsed_run_from_a_healthy_one(tmp_path):
    sick = read_folder(
        write_collapsing_run(tmp_path / "opd"), arm="opd", pair="p", seed=0, digest="d", name="held_out"
    ).with_late(0.2)  # fmt: skip
    well, curves = outcome_of_run(read_run(write_healthy_run(tmp_path / "well")), "held_out")
    assert (sick.figures["collapsed"], sick.figures["collapsed_at_end"]) == (1.0, 1.0)
    assert well["collapsed"] == 0.0
    assert "collapse_step" not in well
    assert sick.verdict == "collapsed"
    assert sick.figures["best_accuracy"] > sick.figures["late_accuracy"] + 0.15
    assert curves["accuracy"][-1][1] == pytest.approx(well["end_accuracy"], abs=1e-4)


def test_figures_at_the_end_are_the_last_ones_and_the_accuracy_curve_is_kept_whole(tmp_path):
    run = read_run(write_collapsing_run(tmp_path / "opd"))
    figures, _ = outcome_of_run(run, "held_out")
    for figure, key in (
        ("greedy_accuracy", "eval/held_out_greedy/accuracy"), ("end_length", "completions/mean_length"),
        ("greedy_truncation", "eval/held_out_greedy/truncation_rate"), ("end_accuracy", "eval/held_out/accuracy"),
    ):  # fmt: skip
        values = [value for _, value in run.values(key)]
        assert values[0] != values[-1] == figures[figure]
    rows = [{"step": step, "eval/held_out/accuracy": 0.5, "completions/mean_length": 9.0} for step in range(350)]
    _, curves = outcome_of_run(replace(run, metrics=tuple(rows)), "held_out")
    assert len(curves["accuracy"]) == 350
    assert len(curves["length"]) <= 101


def test_greedy_columns_are_of_the_final_benchmark_where_it_was_answered_greedily():
    figures = {"greedy_accuracy": 0.1, "greedy_truncation": 0.2, "best_accuracy": 0.9}
    final = {"final_greedy_accuracy": 0.3, "final_greedy_truncation": 0.4}
    for given, told in ((figures, ["0.100", "0.200"]), ({**figures, **final}, ["0.300", "0.400"])):
        run = a_run([outcome("opd", figures=given)])
        (row,) = rows_of(run)
        cells = dict(zip(columns(run), cells_of_row(row), strict=True))
        assert [cells[name] for name in ("greedy", "cut off")] == told


def test_runs_that_answered_other_prompts_than_others_still_count_by_their_answers():
    def answered(arm: str, pair: str, answers: list[float]) -> Outcome:
        return outcome(arm, pair, accuracy=0.1, answers={"b": answers}, benchmarks={"b": pair})

    (row,) = rows_of(a_run([answered("stableopd", "p", [1, 1]), answered("stableopd", "q", [1, 0])]))
    assert row.accuracy.mean == 0.75


def test_answers_without_a_verdict_are_told_wherever_the_table_is():
    failing = outcome("opd", figures={"judge_failures": 15.0})
    run = a_run([outcome("stableopd"), failing])
    console = Console(width=100, record=True, file=io.StringIO())
    print_study(console, run)
    told = "the judge gave no verdict on some final answers, which count as wrong: opd 15"
    for text in (markdown(run), render_study(run), " ".join(console.export_text().split()), to_json(run)):
        assert told in text
    assert warnings(a_run(two_methods(0.1))) == []


def test_methods_keep_the_order_of_the_configuration_whichever_run_is_missing():
    run = a_run([outcome("opd", seed=0), outcome("stableopd", seed=1), outcome("opd", seed=1)])
    assert [row.arm for row in rows_of(run)] == ["stableopd", "opd"]


def test_a_report_on_a_part_of_a_study_says_so():
    run = a_run(two_methods(0.1))
    part = replace(run, study=run.study.only(["opd"]))
    assert headline(part, rows_of(part)).startswith("opd alone: ")
    assert "alone" not in headline(run, rows_of(run))


def test_a_tie_is_not_better():
    runs = [outcome("stableopd", accuracy=0.5), outcome("opd", accuracy=0.5)]
    assert rows_of(a_run(runs))[1].better == 0
    spread = [replace(runs[0], answers={"b": [1 / 3, 1 / 3, 1 / 3]}), replace(runs[1], answers={"b": [1.0, 0.0, 0.0]})]
    assert rows_of(a_run(spread))[1].better == 0
    assert rows_of(a_run(spread[::-1]))[1].better == 0


def test_greedy_answers_that_were_lost_on_the_way_are_told_of_beside_the_collapses():
    lost = {"accuracy": [(0, 0.4), (10, 0.5)], "greedy_truncation": [(0, 0.0), (5, 0.9), (10, 0.0)]}
    fell = replace(outcome("opd", seed=1, figures={"collapsed": 1.0}), curves=lost)
    runs = [outcome("stableopd"), outcome("stableopd", seed=1), replace(outcome("opd"), curves=lost), fell]
    run = a_run(runs, seeds=[0, 1])
    told = headline(run, rows_of(run))
    assert told.endswith("collapsed: opd 1 of 2; most greedy answers cut off for a while: opd 1 of 2")


def test_several_benchmarks_are_told_one_by_one_too():
    answers = {"math": [1.0, 0.0], "aime": [0.5, 0.0, 0.25, 0.25]}
    runs = [
        replace(outcome(arm, accuracy=0.5), answers=answers, benchmarks={"math": "1", "aime": "2"})
        for arm in ("stableopd", "opd")
    ]
    run = a_run(runs)
    names, lines = by_benchmark(rows_of(run))
    assert names == ["method", "math", "aime"]
    assert [line[0] for line in lines] == ["stableopd", "opd"]
    assert [cell.partition(" ")[0] for cell in lines[0][1:]] == ["0.500", "0.250"]
    assert "| opd | 0.500 [" in markdown(run)
    assert "Benchmark by benchmark" in render_study(run)
    console = Console(file=io.StringIO(), width=140)
    print_study(console, run)
    assert "benchmark by benchmark" in console.file.getvalue()
    one = a_run([replace(single, answers={"math": [1.0, 0.0]}) for single in runs])
    assert by_benchmark(rows_of(one)) is None
    assert "Benchmark by benchmark" not in render_study(one)


def test_the_name_of_a_method_is_never_cut_off_a_label():
    arm = "stableopd rollout.stop_strings=['END'] objective.distill.tokens.truncated_weight=0.25"
    lines = _label(arm)
    assert lines[0].startswith("stableopd")
    assert max(map(len, lines)) <= 36
    assert _label("opd") == ["opd"]


def test_a_difference_of_nothing_has_no_sign_of_a_loss():
    assert shown(Estimate(mean=-1e-17, low=-0.0001, high=0.0, num_runs=2), signed=True) == "+0.000 [+0.000, +0.000]"


def test_the_health_table_has_means_over_runs():
    runs = [outcome("opd", seed=seed, figures={"worst_truncation": share}) for seed, share in enumerate((0.2, 0.6))]
    assert '<td class="number">40%</td>' in render_study(a_run(runs))


def test_late_accuracy_is_the_mean_of_the_last_evaluations(tmp_path):
    run = read_run(write_healthy_run(tmp_path / "well"))
    points = run.values("eval/held_out/accuracy")
    last = points[-1][0]
    half = [value for step, value in points if step > last / 2]
    one = read_folder(tmp_path / "well", arm="opd", pair="p", seed=0, digest="d", name="held_out")
    assert one.with_late(0.5).figures["late_accuracy"] == pytest.approx(sum(half) / len(half), abs=1e-5)
    assert replace(one, curves={}).with_late(0.5).figures == one.figures


def test_results_are_read_as_they_were_written_and_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    runs = two_methods(0.1)
    for one in runs:
        append_outcome(path, one)
    append_outcome(path, replace(runs[0], verdict="warning"))
    read = read_outcomes(path)
    assert len(read) == len(runs)
    assert {one.key: one.figures for one in read} == {one.key: dict(one.figures) for one in runs}
    assert read[0].verdict == "warning"
    with path.open("a") as file:
        file.write('{"arm": "opd", "pa')
    assert len(read_outcomes(path)) == len(runs)
    append_outcome(path, outcome("sft"))
    assert len(read_outcomes(path)) == len(runs) + 1
    whole = path.read_bytes()
    path.write_bytes(whole + '{"arm": "ä'.encode()[:-1])  # torn within a letter
    assert len(read_outcomes(path)) == len(runs) + 1
    for bad in (
        {"arm": "x"}, {"figures": {"late_accuracy": "high"}}, {"figures": {"late_accuracy": float("nan")}},
        {"answers": {"b": ["right"]}}, {"answers": {"b": [7.0]}}, {"curves": {"accuracy": [1, 2]}}, {"seed": None},
        {"more": 1},
    ):  # fmt: skip
        line = bad if "arm" in bad else {**json.loads(whole.split(b"\n")[0]), **bad}
        path.write_bytes(json.dumps(line).encode() + b"\n" + whole)
        with pytest.raises(RunFolderError, match=r"line 1 is no result of a run: \w+"):
            read_outcomes(path)


def test_the_page_escapes_what_it_shows_and_names_every_failure(tmp_path):
    job = Job(name=NASTY, command=(), stem=tmp_path / "x")
    failed = Ended(job=job, status="failed", why=NASTY)
    page = render_study(a_run([*two_methods(0.1), outcome("stableopd", seed=8, headline=NASTY)], failures=[failed]))
    assert "<script>alert(1)" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 3
    assert "study.html.j2" not in page


def test_report_and_table_hold_the_figures_of_every_method(tmp_path):
    run = a_run(two_methods(-0.1), pairs={"p": {}}, seeds=[0, 1, 2, 3])
    page, table = render_study(run), markdown(run)
    for text in (page, table):
        assert "-0.100 [-0.100, -0.100]" in text
    assert table.count("\n| ") >= 4
    assert len(columns(run)) == len(cells_of_row(rows_of(run)[0]))
    document = json.loads(to_json(run))
    assert document["num_finished"] == 8
    assert document["all_pairs"][1]["difference"]["mean"] == pytest.approx(-0.1)
    assert document["by_pair"] == {}
    assert document["missing"] == []


def test_the_headline_names_the_best_and_the_collapsed():
    runs = [outcome("stableopd", accuracy=0.8), outcome("opd", accuracy=0.3, figures={"collapsed": 1.0})]
    run = a_run(runs, seeds=[0, 1])
    assert headline(run, rows_of(run)) == (
        "stableopd ends highest, at 0.800 over 1 run; collapsed: opd 1 of 1 (2 of 4 runs are missing)"
    )
    methods = ("stableopd", "opd", "sft")
    level = a_run([outcome("stableopd"), outcome("opd"), outcome("sft", accuracy=0.2)], methods=methods)
    assert headline(level, rows_of(level)) == "stableopd, opd end highest, at 0.500; no run collapsed"
    same = a_run([outcome("stableopd"), outcome("opd")])
    assert headline(same, rows_of(same)) == "all methods end at 0.500; no run collapsed"


def test_runs_without_any_measure_of_accuracy_are_shown_without_one(tmp_path):
    bare = [replace(one, figures={"steps": 3.0}, curves={}) for one in two_methods(0.1)]
    run = a_run(bare)
    assert "without a measure of accuracy" in render_study(run)
    assert "| opd | 4 |  |" in markdown(run)
    assert json.loads(to_json(run))["all_pairs"][0]["accuracy"] is None
    half = a_run([*bare, outcome("stableopd", "q"), outcome("opd", "q", accuracy=0.7)])
    assert rows_of(half)[1].difference.mean == pytest.approx(0.2)
    assert "nan" not in render_study(half).lower().split("<script")[0]


def test_another_point_of_a_grid_never_stands_in_for_the_one_compared_with():
    given = {"methods": ("stableopd", "opd"), "grid": {"lambda_gold": [0.1, 1.0]}, "grid_methods": ["stableopd"]}
    run = a_run([outcome("stableopd lambda_gold=1.0", accuracy=0.9), outcome("opd", accuracy=0.4)], **given)
    assert [row.difference for row in rows_of(run)] == [None, None]  # the first point has failed
    assert columns(run)[3] == "against stableopd, first point"
    assert "difference from stableopd lambda_gold=0.1 on" in note(run)


def test_runs_that_are_missing_are_named_in_the_terminal():
    console = Console(width=100, record=True, file=io.StringIO())
    print_study(console, a_run([outcome("opd", "pair")], pairs={"pair": {}}, seeds=[0]))
    assert "missing 1 of 2 runs: stableopd of pair, seed 0" in console.export_text()


def test_a_name_in_the_markdown_table_is_shown_and_not_obeyed():
    assert "<script>" not in markdown(a_run([outcome("opd", NASTY), outcome(f"a|b{NASTY}")]))


def test_a_grid_of_two_keys_is_drawn_as_a_map():
    given = {"methods": ("stableopd",), "grid": {"lambda_gold": [0.1, 1.0], "beta_kl": [0.0, 0.3]}}
    run = a_run([outcome("stableopd lambda_gold=1.0 beta_kl=0.3", accuracy=0.75)], **given)
    page = render_study(run)
    assert '"z":[[null,null],[null,0.75]]' in page
    assert "lambda_gold" in page


def test_nothing_is_written_before_a_run_has_finished(tmp_path):
    assert write_study(a_run([])) == []


def test_the_score_is_the_mean_over_benchmarks():
    answers = {"a": [1.0, 0.0], "b": [1.0]}
    assert score(outcome("opd", answers=answers, benchmarks={"a": "1", "b": "2"})) == 0.75
