"""The health part of the report: alerts over the curves, the weight of loops, positions, and the loops themselves."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_runs import LOOP, write_collapsing_run, write_healthy_run, write_lines, write_steered_run
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs
from test_report import NASTY, Tags, chart_data, visible

from stableopd.errors import RunFolderError
from stableopd.health.loops import Loop
from stableopd.report import alerts, loops, positions, timeline, write_report
from stableopd.report.alerts import alert_rows, episodes, message_parts
from stableopd.report.charts import mechanism_charts
from stableopd.report.loops import least_rotation, loops_of, run_loops, shown_parts
from stableopd.report.positions import bands, position_charts
from stableopd.report.settings import method
from stableopd.report.text import remedy
from stableopd.runfolder import ROLLOUTS_SCANNED, RunRecord, read_run, read_runs, rollout_steps
from stableopd.types import Alert

WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters=":"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_collapsing_run(folder / "opd"),
        write_healthy_run(folder / "stableopd"),
        write_steered_run(folder / "steered"),
    ]


@pytest.fixture(scope="module")
def runs(folders: list[Path]) -> list[RunRecord]:
    return read_runs(folders)


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(folders, tmp_path_factory.mktemp("out") / "report.html").read_text(encoding="utf-8")


def an_alert(**changes: Any) -> Alert:
    usual: dict[str, Any] = {
        "rule": "loops",
        "severity": "warning",
        "signal": "health/loop_token_fraction",
        "value": 0.2,
        "threshold": 0.05,
        "step": 10,
        "since": 8,
        "message": "Loops.",
    }
    return Alert(**usual | changes)


def a_run(
    folder: Path, values: dict[int, float], *found: Alert, signal: str = "health/loop_token_fraction"
) -> RunRecord:
    write_lines(folder / "metrics.jsonl", [{"step": step, signal: value} for step, value in values.items()])
    write_lines(folder / "alerts.jsonl", [alert.to_json() for alert in found])
    (folder / "config.yaml").write_text("health: {window: 1}\n")
    return read_run(folder)


def level(from_step: int, to_step: int, *, last: int = 40) -> dict[int, float]:
    """A signal that is bad from one step to before another."""
    return {step: 0.3 if from_step <= step < to_step else 0.0 for step in range(last + 1)}


def stretches(run: RunRecord) -> list[tuple[int, int | None, bool]]:
    return [(episode.start, episode.end, episode.open) for episode in episodes(run)]


# ------------------------------------------------------------------------------------ how long an alert lasted


def test_an_alert_ends_where_its_signal_is_back(tmp_path: Path) -> None:
    assert stretches(a_run(tmp_path, level(8, 20), an_alert())) == [(8, 20, False)]


def test_a_single_good_step_does_not_end_an_alert(tmp_path: Path) -> None:
    values = level(8, 20) | {15: 0.0}
    assert stretches(a_run(tmp_path, values, an_alert())) == [(8, 20, False)]


def test_an_alert_whose_signal_never_came_back_lasts_to_the_end(tmp_path: Path) -> None:
    assert stretches(a_run(tmp_path, level(8, 99), an_alert())) == [(8, None, True)]


def test_an_alert_on_a_figure_that_is_not_logged_has_no_known_end(tmp_path: Path) -> None:
    run = a_run(tmp_path, level(8, 20), an_alert(signal="health/other"), an_alert(value=math.nan))
    assert stretches(run) == [(8, None, False), (8, None, False)]


def test_an_alert_on_a_fall_ends_where_its_signal_has_risen(tmp_path: Path) -> None:
    values = {step: 0.2 if 8 <= step < 20 else 0.9 for step in range(30)}
    alert = an_alert(signal="health/stop_probe", value=0.2, threshold=0.6)
    assert stretches(a_run(tmp_path, values, alert, signal="health/stop_probe")) == [(8, 20, False)]


def test_an_alert_had_ended_when_the_same_one_was_raised_again(tmp_path: Path) -> None:
    found = (an_alert(), an_alert(severity="critical", step=20, since=20), an_alert(step=30, since=28))
    assert stretches(a_run(tmp_path, level(8, 99), *found)) == [(8, 28, False), (20, None, True), (28, None, True)]


def test_the_signal_is_averaged_as_the_monitor_does(tmp_path: Path) -> None:
    run = a_run(tmp_path, level(8, 20), an_alert())
    smooth = replace(run, config={"health": {"window": 5}})
    assert stretches(smooth) == [(8, 24, False)]  # one of five steps beyond is 6%, so the last one has to go
    assert stretches(replace(run, config={"health": {"window": "5"}})) == stretches(replace(run, config={}))


# ------------------------------------------------------------------------------------ the table


def test_a_message_of_the_monitor_is_taken_apart(runs: list[RunRecord]) -> None:
    row = alert_rows(runs[2])[0]
    assert row.seen == "21.0% of all tokens lie in exact loops (mean of the last 5 steps; 0.3% in the first 5 steps)"
    assert row.against == "21.0%, above 5.0%"
    assert row.cause == "Length inflation; the student falls into repetition."
    assert row.remedy == "Turn on StableOPD."
    assert row.since == "since 39, until 51"
    assert row.action == ""


def test_a_cause_that_was_told_before_is_not_told_again(tmp_path: Path) -> None:
    causes = ["Likely cause: one.", "Likely cause: two.", "Likely cause: one.", "No cause."]
    found = [an_alert(step=10 + i, message=f"Seen {i}. {cause}") for i, cause in enumerate(causes)]
    rows = alert_rows(a_run(tmp_path / "run", level(8, 20), *found))
    assert [row.same_as for row in rows] == [None, None, 10, None]
    text = visible(write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert (text.count("One."), text.count("as at step 10")) == (1, 1)


def test_an_action_of_the_controller_is_a_row_of_its_own(runs: list[RunRecord], page: str) -> None:
    row = alert_rows(runs[2])[1]
    assert (row.step, row.action, row.by_controller, row.since, row.against) == (44, "raise", True, "", "")
    assert "because of the alert 'loops'; both decay by 2% a step. raise" in visible(page)


@given(WORDS, WORDS, WORDS)
def test_of_a_message_in_other_words_nothing_is_lost(seen: str, cause: str, remedy: str) -> None:
    message = f"{seen} Likely cause: {cause} What to do: {remedy}"
    kept = "".join(message_parts(message)).lower()
    for word in f"{seen} {cause} {remedy}".lower().split():
        assert word in kept


def test_a_long_message_is_cut_in_the_table_and_at_the_pointer(tmp_path: Path) -> None:
    run = a_run(tmp_path, level(8, 20), an_alert(message="x y " * 20_000, rule="r" * 5_000))
    (row,), (episode,) = alert_rows(run), episodes(run)
    assert len(row.seen) + len(row.rule) < 2 * alerts.MAX_MESSAGE
    assert len(timeline.hover_text("run", episode)) < 2 * alerts.MAX_MESSAGE


# ------------------------------------------------------------------------------------ the timeline


def traces(page: str, chart: str = "timeline") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = chart_data(page)[chart]["data"]
    return found


def strips(page: str) -> list[str]:
    return [note["text"].split(":")[0] for note in chart_data(page)["timeline"]["layout"]["annotations"]]


def test_the_timeline_has_a_lane_per_rule_and_a_strip_per_subject(page: str) -> None:
    assert strips(page) == [
        "actions taken",
        "length p90",
        "clipped ratio",
        "loop token fraction",
        "Length, tokens",
        "Truncated share",
        "Share of tokens in loops",
        "Accuracy",
        "Gold coefficient",
        "Reference coefficient",
    ]


def test_all_strips_share_one_axis_of_steps_and_do_not_overlap(page: str) -> None:
    layout = chart_data(page)["timeline"]["layout"]
    assert [name for name in layout if name.startswith("xaxis")] == ["xaxis"]
    domains = sorted(layout[name]["domain"] for name in layout if name.startswith("yaxis"))
    assert all(0 <= low < high <= 1 for low, high in domains)
    assert all(high <= low for (_, high), (low, _) in pairwise(domains))


def test_a_bar_runs_from_the_first_step_beyond_to_the_end_of_the_alert(page: str) -> None:
    bars = {(bar["meta"], bar["name"]): (bar["base"], bar["x"]) for bar in traces(page) if bar["type"] == "bar"}
    assert bars[2, "alerts-warning"] == ([39], [12])
    assert bars[0, "alerts-critical"] == ([54], [46])  # to the last step, 100


def test_bars_of_different_runs_and_rules_lie_apart(page: str) -> None:
    bars = [bar for bar in traces(page) if bar["type"] == "bar"]
    edges = sorted((y - w / 2, y + w / 2) for bar in bars for y, w in zip(bar["y"], bar["width"], strict=True))
    assert len(edges) == 3
    assert all(upper <= lower for (_, upper), (lower, _) in pairwise(edges))


def test_an_action_is_a_diamond_that_says_its_name_and_its_message(page: str) -> None:
    (actions,) = [trace for trace in traces(page) if trace["name"] == "actions"]
    assert (actions["x"], actions["text"], actions["marker"]["symbol"]) == ([44], ["\u00a0raise"], "diamond")
    assert "both decay by 2%" in actions["hovertext"][0].replace("<br>", " ")


def test_many_actions_are_told_by_the_pointer_alone(tmp_path: Path) -> None:
    acts = [an_alert(rule="controller", action="raise", step=step, since=step) for step in range(20)]
    chart = timeline.timeline_chart([a_run(tmp_path, level(8, 20), *acts)])
    assert chart is not None
    (actions,) = [trace for trace in chart.figure["data"] if trace["name"] == "actions"]
    assert (actions["mode"], set(actions["text"]), len(actions["hovertext"])) == ("markers", {""}, 20)


def test_an_action_on_an_alert_of_the_monitor_is_shown_as_both(tmp_path: Path) -> None:
    run = a_run(tmp_path, level(8, 20), an_alert(action="stop"))
    chart = timeline.timeline_chart([run])
    assert chart is not None
    assert [trace["name"] for trace in chart.figure["data"][:2]] == ["alerts-warning", "actions"]


def test_coefficients_are_drawn_as_steps(page: str) -> None:
    gold = next(trace for trace in traces(page) if trace["name"] == "steered · gold")
    assert gold["line"]["shape"] == "hv"
    assert dict(zip(gold["x"], gold["y"], strict=True))[44] == 0.5


def test_many_alerts_and_rules_stay_few_bars_and_lanes(tmp_path: Path) -> None:
    found = [an_alert(rule=f"rule {i % 50}", step=i, since=i) for i in range(2_000)]
    worst = an_alert(rule="late", severity="critical", step=2_000, since=2_000)
    chart = timeline.timeline_chart([a_run(tmp_path, level(8, 20), *found, worst)])
    assert chart is not None
    bars = [trace for trace in chart.figure["data"] if trace["type"] == "bar"]
    assert sum(len(bar["x"]) for bar in bars) == timeline.MAX_BARS
    assert any(bar["base"] == [2_000] for bar in bars)
    assert len(chart.figure["layout"]["annotations"]) == timeline.MAX_LANES + 1  # and the strip of loops
    assert max(-y for bar in bars for y in bar["y"]) < timeline.MAX_LANES


# ------------------------------------------------------------------------------------ weight and positions


def test_the_share_of_the_update_stands_beside_the_share_of_tokens(runs: list[RunRecord]) -> None:
    weight = next(chart for chart in mechanism_charts(runs) if chart.title == "Weight of loops in the update")
    update, tokens = weight.figure["data"][0], weight.figure["data"][len(runs)]
    assert list(zip(update["x"], update["y"], strict=True)) == runs[0].series("health/loop_update_share")
    assert list(zip(tokens["x"], tokens["y"], strict=True)) == runs[0].series("health/loop_token_fraction")


def test_bands_say_which_tokens_they_hold() -> None:
    assert bands((0, 16, 32)) == ["0–15", "16–31", "32+"]


def test_a_heat_map_holds_the_numbers_of_its_run(page: str, runs: list[RunRecord]) -> None:
    update, advantage, tokens = traces(page, "positions-0")
    assert update["y"] == advantage["y"] == tokens["y"] == ["0–15", "16–31", "32–63", "64+"]
    late = runs[0].values("health/advantage_from_64")
    drawn = [(x, z) for x, z in zip(advantage["x"], advantage["z"][3], strict=True) if z is not None]
    assert drawn == [(step, pytest.approx(value, rel=1e-3)) for step, value in late]


def test_where_no_rollout_got_its_share_is_nothing_and_its_advantage_unknown(page: str) -> None:
    update, advantage, tokens = traces(page, "positions-1")
    assert set(update["z"][3]) == set(tokens["z"][3]) == {0.0}
    assert set(advantage["z"][3]) == {None}


def test_colours_and_bands_mean_the_same_in_all_runs(page: str) -> None:
    figures = [traces(page, f"positions-{number}") for number in range(3)]
    for maps in zip(*figures, strict=True):
        assert len({(m["zmin"], m["zmax"], tuple(m["y"])) for m in maps}) == 1


def test_the_band_that_gained_most_is_named(runs: list[RunRecord]) -> None:
    opd, stable, _ = (chart.caption for chart in position_charts(runs))
    assert opd == "Tokens 64+ gained most: 0% of the update at the start (to step 5), 30% at the end (from step 96)."
    assert stable == "The update lies where it lay at the start: no band of positions gained 2 points or more."


def test_one_wild_value_does_not_bleach_the_others(tmp_path: Path) -> None:
    rows = [{"step": i, "health/advantage_from_0": -1e6 if i == 50 else -0.5 + i / 1000} for i in range(200)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (chart,) = position_charts([read_run(tmp_path)])
    assert -1 < chart.figure["data"][0]["zmin"] < chart.figure["data"][0]["zmax"] < 0


def test_steps_and_bands_beyond_number_are_gathered(tmp_path: Path) -> None:
    wide = {f"health/update_share_from_{16 * bound}": 0.01 for bound in range(90)}
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, **wide} for step in range(1, 3_001)])
    (chart,) = position_charts([read_run(tmp_path)])
    (drawn,) = chart.figure["data"]
    assert len(drawn["z"]) == positions.MAX_BANDS
    assert all(len(band) == len(drawn["x"]) <= positions.MAX_COLUMNS for band in drawn["z"])
    assert {z for band in drawn["z"] for z in band} == {0.01}


def test_of_many_runs_some_have_heat_maps_and_the_page_says_so(folders: list[Path], tmp_path: Path) -> None:
    page = write_report([folders[0]] * 8, tmp_path / "report.html").read_text(encoding="utf-8")
    assert sum(name.startswith("positions-") for name in chart_data(page)) == positions.MAX_RUNS
    assert "2 more runs are not drawn" in visible(page)


# ------------------------------------------------------------------------------------ the loops


def write_rollouts(folder: Path, texts: dict[int, list[str]]) -> RunRecord:
    write_lines(folder / "metrics.jsonl", [{"step": step} for step in texts])
    for step, found in texts.items():
        rows = [{"step": step, "prompt": "p", "completion": text, "finish_reason": "length"} for text in found]
        write_lines(folder / f"rollouts/step-{step:06d}.jsonl", rows)
    return read_run(folder)


def unmarked(markup: object) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", str(markup)))


def test_the_loop_is_marked_and_told_by_period_repeats_and_start(tmp_path: Path) -> None:
    run = write_rollouts(tmp_path, {5: ["It starts well. " + "again, " * 10]})
    found = run_loops(0, run)
    assert found is not None
    (example,) = found.examples
    assert example.facts == ("10.1 turns of 7 characters", "begins at character 15 of 86", "83% of the text")
    assert re.findall(r"<mark>(.*?)</mark>", str(example.completion)) == [" " + "again, " * 10]
    assert example.ending == "cut off at the length limit"


def test_a_long_loop_is_shortened_and_its_start_and_end_are_shown(tmp_path: Path) -> None:
    text = "a long beginning, " + " ".join(map(str, range(400))) + "HERE" + LOOP * 100 + "AFTER"
    found = run_loops(0, write_rollouts(tmp_path, {5: [text]}))
    assert found is not None
    shown = unmarked(found.examples[0].completion)
    assert len(shown) < 1_000
    assert "399HERE" + LOOP in shown
    assert shown.endswith(LOOP + "AFTER")
    assert shown.count("characters left out") == 2


@given(st.integers(0, 3_000), st.integers(16, 3_000), st.integers(0, 3_000))
def test_what_is_shown_is_in_order_apart_and_holds_the_ends_of_the_loop(before: int, loop: int, after: int) -> None:
    parts = shown_parts(before + loop + after, Loop(before, before + loop, 4))
    edges = [edge for part in parts for edge in part]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= before + loop + after
    assert edges[0] <= before
    assert edges[-1] >= before + loop
    assert sum(end - start for start, end in parts) < 1_200


def test_a_loop_longer_than_what_is_searched_is_followed_to_its_start() -> None:
    text = "no loop here: " + "ab cd " * 20_000
    assert loops_of(text) == [Loop(13, len(text), 6)]


def test_the_worst_rollout_of_a_few_steps_spread_over_the_run_is_shown(tmp_path: Path) -> None:
    texts = {step: ["fine.", "x " + "ab cd " * step, "y " + "ab cd " * 2 * step] for step in range(10, 310, 10)}
    found = run_loops(0, write_rollouts(tmp_path, texts))
    assert found is not None
    assert len(found.steps) == loops.STEPS_READ
    assert (found.looked_at, found.looping) == (24, 16)
    assert [example.step for example in found.examples] == [10, 90, 220, 300]
    assert found.examples[0].facts[0] == "20.2 turns of 6 characters"


def test_the_same_words_begun_elsewhere_in_the_turn_are_one_unit(tmp_path: Path) -> None:
    run = write_rollouts(tmp_path, {5: ["check it. " * 6, "k it. chec" * 5], 10: ["check it. " * 9, "other! " * 9]})
    found = run_loops(0, run)
    assert found is not None
    first, second = found.units
    assert (first.text, first.rollouts, first.repeats) == ("check it. ", 3, 6)
    assert (first.period, first.first_step, first.last_step) == (10, 5, 10)
    assert (second.text, second.rollouts) == ("other! ", 1)


@given(st.text("ab ", min_size=1, max_size=9), st.integers(0, 8))
def test_the_least_rotation_is_the_same_wherever_a_loop_is_entered(unit: str, shift: int) -> None:
    turned = unit[shift % len(unit) :] + unit[: shift % len(unit)]
    assert least_rotation(turned) == least_rotation(unit)


def test_rollout_files_that_are_read_are_few_and_the_worst_is_among_them(tmp_path: Path) -> None:
    run = write_rollouts(tmp_path, {step: ["text"] for step in range(1, 2_001)})
    rows = [dict(row) | {"completions/clipped_ratio": float(row["step"] == 777)} for row in run.metrics]
    steps = rollout_steps(replace(run, metrics=tuple(rows)), 8)
    assert len(steps) == 8
    assert {1, 777, 2_000} <= set(steps)


def test_a_broken_rollout_line_is_named(tmp_path: Path) -> None:
    write_rollouts(tmp_path, {step: ["text"] for step in range(1, 11)})
    run = read_run(tmp_path)
    (tmp_path / "rollouts/step-000002.jsonl").write_text('{"completion": 1\n{"completion": "text"}\n')
    with pytest.raises(RunFolderError, match=r"step-000002\.jsonl:1: broken line"):
        run_loops(0, run)


# ------------------------------------------------------------------------------------ what is missing


def test_a_run_without_any_of_this_has_no_health_part(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0, "eval/held_out/accuracy": 0.5} for step in range(9)]
    write_lines(tmp_path / "sft/metrics.jsonl", rows)
    page = write_report([tmp_path / "sft"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert not {"health", "loops"} & {attrs.get("id") for _, attrs in Tags(page).found}
    assert 'href="#health"' not in page
    assert "No run raised an alert." in visible(page)


@pytest.mark.parametrize(
    ("prefix", "gone"),
    [
        ("health/loop", "Weight of loops in the update"),
        ("health/advantage", "Advantage of tokens in loops"),
        ("controller/", "Gold coefficient"),
        ("completions/", "Truncated share"),
        ("eval/", "Accuracy"),
    ],
)
def test_what_was_not_logged_is_left_out_alone(tmp_path: Path, prefix: str, gone: str) -> None:
    folder = write_steered_run(tmp_path / "run", steps=30)
    full = write_report([folder], tmp_path / "full.html").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_lines(folder / "metrics.jsonl", [{k: v for k, v in row.items() if not k.startswith(prefix)} for row in rows])
    less = write_report([folder], tmp_path / "less.html").read_text(encoding="utf-8")
    assert gone in strips(full) or gone in visible(full)
    assert gone not in strips(less)
    assert gone not in visible(less).split("Sample rollouts")[0].split("Likely cause")[0]
    assert 'id="health"' in less


def test_an_old_run_beside_a_new_one_does_no_harm(folders: list[Path], tmp_path: Path) -> None:
    write_lines(tmp_path / "old/metrics.jsonl", [{"step": step, "loss": 1.0} for step in range(200)])
    page = write_report([tmp_path / "old", folders[0]], tmp_path / "report.html").read_text(encoding="utf-8")
    assert {"positions-1", "timeline"} <= set(chart_data(page))
    assert "positions-0" not in chart_data(page)
    assert {trace["meta"] for trace in traces(page)} == {1}


def test_figures_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    odd = [None, math.nan, math.inf, -math.inf, "0.5", True, [], {}]
    keys = ["loop_token_fraction", "loop_update_share", "advantage_loop", "update_share_from_16", "advantage_from_0"]
    rows = [{"step": i, **{f"health/{key}": value for key in keys}} for i, value in enumerate([0.1, *odd, 0.2])]
    write_lines(
        tmp_path / "run/metrics.jsonl",
        [row | {"controller/gold_coef": rows[i]["health/advantage_loop"]} for i, row in enumerate(rows)],
    )
    figures = [{"step": 3, "message": "m", "value": value, "threshold": value, "since": value} for value in odd]
    write_lines(tmp_path / "run/alerts.jsonl", figures)
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "NaN" not in Tags(page).data
    assert "Infinity" not in Tags(page).data
    gold = next(trace for trace in traces(page) if trace["name"].endswith("· gold"))
    assert [y for y in gold["y"] if y is not None] == [0.1, 0.2]
    update, advantage = traces(page, "positions-0")
    assert (update["z"], advantage["z"]) == ([[0.0, 0.0], [0.1, 0.2]], [[0.1, 0.2], [None, None]])


def test_rollouts_without_loops_are_counted(tmp_path: Path) -> None:
    run = write_rollouts(tmp_path / "run", {5: ["Each thing is said once.", ""]})
    page = write_report([run.path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "run: loops in 0 of 2 rollouts" in visible(page)


# ------------------------------------------------------------------------------------ hostile input and size


@pytest.fixture(scope="module")
def nasty_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("nasty")
    run = write_steered_run(folder / "<img src=x onerror=alert(3)>", steps=20)
    rollout = {"prompt": NASTY, "completion": NASTY + NASTY * 40, "finish_reason": NASTY}
    write_lines(run / "rollouts/step-000010.jsonl", [rollout])
    write_lines(run / "rollouts/step-000020.jsonl", [{"completion": "<b>x</b><script>" * 40}])
    harm = f"{NASTY} Likely cause: {NASTY} What to do: {NASTY} %{{x}} <a href='javascript:alert(4)'>here</a>"
    kinds = [{"rule": NASTY, "action": NASTY}, {"rule": "controller", "action": "<b>stop</b>"}]
    rows = [{"step": 9, "message": harm, "signal": NASTY, "value": 1.0, "threshold": 0.5} | kind for kind in kinds]
    write_lines(run / "alerts.jsonl", rows)
    return write_report([run, run], folder / "report.html").read_text(encoding="utf-8")


def test_texts_in_loops_and_messages_cannot_break_out(nasty_page: str, page: str) -> None:
    tags = Tags(nasty_page)
    assert tags.count("script") == Tags(page).count("script") == 3
    assert tags.count("img") == 0
    assert {attrs.get("href") for tag, attrs in tags.found if tag == "a"} <= {
        "#health",
        "#alerts",
        "#loops",
        "#curves",
        "#rollouts",
        "#configuration",
    }
    assert not any(name.startswith("on") for _, attrs in tags.found for name in attrs)


def test_hostile_loops_are_shown_as_they_are(nasty_page: str) -> None:
    part = nasty_page.split('id="loops"')[1].split("<section")[0]
    assert "<b>x</b><script><b>x</b><script>" in html.unescape(re.sub(r"</?mark>", "", part))
    assert "<b>x</b><script>" in html.unescape(part.split("<tbody>")[1].split("</tbody>")[0])


def test_the_pointer_says_messages_without_markup(nasty_page: str) -> None:
    spoken = [text for trace in traces(nasty_page) for text in trace.get("hovertext", [])]
    assert len(spoken) == 6  # per run two actions and a bar
    for text in spoken:
        assert set(re.findall(r"<[^>]*>", text)) <= {"<br>", "<b>", "</b>"}
        assert text.count("<b>") == 1
        assert "&lt;/script&gt;" in text
    lanes = chart_data(nasty_page)["timeline"]["layout"]["annotations"]
    assert not any("<" in note["text"] for note in lanes)
    assert not any("<" in text for trace in traces(nasty_page) for text in trace.get("text", []))


def test_a_run_of_thousands_of_steps_gives_a_page_of_bounded_size(tmp_path: Path) -> None:
    sizes = []
    for steps in (4_000, 8_000):
        run = write_collapsing_run(tmp_path / f"run-{steps}", steps=steps)
        text = "An answer. " + LOOP * 2_000
        rows = [{"completion": text, "prompt": text, "finish_reason": "length"}] * 2 * ROLLOUTS_SCANNED
        write_lines(run / "rollouts/step-000010.jsonl", rows)
        page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
        for trace in traces(page):
            assert len(trace["x"]) <= timeline.MAX_POINTS
        assert all(len(trace["x"]) <= positions.MAX_COLUMNS for trace in traces(page, "positions-0"))
        sizes.append(len(page) - len(get_plotlyjs()))
    assert max(sizes) < 2_500_000
    assert sizes[1] < 1.1 * sizes[0]


# ------------------------------------------------------------------------------------ words


def test_a_controller_that_may_change_the_run_is_named_with_the_method() -> None:
    assert method({"method": "opd", "health": {"actions": "stabilise"}}) == "opd · actions stabilise"
    assert method({"method": "opd", "health": {"actions": "warn"}}) == "opd"


def test_what_helped_names_the_controller_where_it_acted(runs: list[RunRecord]) -> None:
    collapsed, _, steered = runs
    assert (
        remedy([collapsed, steered]) == "steered stayed healthy: its controller acted once, first at step 44 (raise)."
    )
