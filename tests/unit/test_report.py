from __future__ import annotations

import html
import json
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_runs import LOOP, write_collapsing_run, write_healthy_run, write_lines

from stableopd.errors import RunFolderError
from stableopd.plots import write_collapse_picture
from stableopd.report import write_report
from stableopd.report.charts import METHOD_COLOURS, PALETTE, colours, first_screen, sections, thin
from stableopd.report.samples import MAX_CHARS, mark_loops
from stableopd.report.settings import differences
from stableopd.report.text import answers, cards, headline
from stableopd.runfolder import RunRecord, read_run, read_runs

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\u2029 \ud800 \x00 & \"quoted\" 'so'"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_collapsing_run(folder / "opd"), write_healthy_run(folder / "stableopd")]


@pytest.fixture(scope="module")
def runs(folders: list[Path]) -> list[RunRecord]:
    return read_runs(folders)


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(folders, tmp_path_factory.mktemp("out") / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Start tags and the text of <script type=application/json>, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][1].get("type") == "application/json":
            self.data += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


def chart_data(page: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(Tags(page).data)
    return figures


def visible(page: str) -> str:
    """The page's text, without scripts, styles and tags."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


# ------------------------------------------------------------------------------------ what it says


def test_the_headline_tells_what_collapsed_when_and_what_held(runs: list[RunRecord]) -> None:
    assert re.fullmatch(
        r"opd collapsed at step 60: held-out accuracy fell from 0\.\d\d to 0\.\d\d while greedy answers ran into the "
        r"length limit; stableopd held at 0\.\d\d\.",
        headline(runs),
    )


def test_many_runs_are_counted_by_method(runs: list[RunRecord]) -> None:
    many = [replace(run, name=f"{run.name}-{seed}") for seed in range(3) for run in runs]
    assert headline(many).startswith("3 of 6 runs collapsed: opd 3 of 3, stableopd 0 of 3.")


def test_a_collapse_without_evaluation_is_told_from_training(tmp_path: Path) -> None:
    run = read_run(without(write_collapsing_run(tmp_path / "opd"), "eval/"))
    assert headline([run]).startswith("opd collapsed at step")
    assert "training truncation" in headline([run])


def test_the_cause_is_told_in_the_figures_of_the_run(runs: list[RunRecord]) -> None:
    why = answers(runs)[0]
    assert why.question == "Why"
    assert re.search(r"repeated tokens went from 1\.0% to 6\d%", why.text)


def test_the_cause_is_not_claimed_where_the_advantages_say_otherwise(runs: list[RunRecord]) -> None:
    swapped = [swap_advantages(row) for row in runs[0].metrics]
    why = answers([replace(runs[0], metrics=tuple(swapped))])[0]
    assert "repeating pays" not in why.text
    assert why.text == " ".join(runs[0].verdict.reasons)


def swap_advantages(row: Any) -> dict[str, Any]:
    turned = {key: -row[key] for key in row if key.startswith("health/advantage_")}
    return {**row, **turned}


def test_what_helped_names_the_settings_that_differ(runs: list[RunRecord]) -> None:
    helped = answers(runs)[1]
    assert helped.question == "What helped"
    assert "objective.gold.coef 0 → 1, objective.reference.coef 0 → 0.1" in helped.text


@pytest.mark.parametrize(("chosen", "questions"), [([0], ["Why", "What to try"]), ([1], ["In short"])])
def test_a_single_run_is_not_compared(runs: list[RunRecord], chosen: list[int], questions: list[str]) -> None:
    assert [answer.question for answer in answers([runs[i] for i in chosen])] == questions


def test_of_many_runs_the_troubled_ones_have_the_first_cards(runs: list[RunRecord]) -> None:
    collapsed, healthy = runs
    assert cards([healthy, healthy, collapsed])[0].name == collapsed.name


def test_a_card_says_the_status_in_words_and_gives_the_figures(runs: list[RunRecord]) -> None:
    collapsed, healthy = cards(runs)
    assert (collapsed.badge, healthy.badge) == ("✕ collapsed, step 60", "✓ healthy")
    assert dict(collapsed.facts)["greedy answers cut off"] == "98%"
    assert healthy.method == "stableopd · distill 1 · gold 1 · reference 0.1"


def test_differences_are_by_dotted_key(runs: list[RunRecord]) -> None:
    assert [row.key for row in differences(runs)] == ["method", "objective.gold.coef", "objective.reference.coef"]


def test_all_parts_are_on_the_page(page: str, runs: list[RunRecord]) -> None:
    text = visible(page)
    for part in (headline(runs), "Loss terms", "90% length quantile 31", "cut off at the length limit", "3.12.1"):
        assert part in text
    assert "max_completion_length: 80" in text


# ------------------------------------------------------------------------------------ curves


def test_every_chart_on_the_page_has_data_and_the_other_way_round(page: str) -> None:
    plots = {attrs["id"] for tag, attrs in Tags(page).found if tag == "div" and attrs.get("class") == "plot"}
    assert plots == set(chart_data(page))
    assert len(plots) >= 15


def test_a_curve_holds_the_numbers_of_its_run(page: str, runs: list[RunRecord]) -> None:
    accuracy = chart_data(page)["first-0"]["data"]
    sampled = next(trace for trace in accuracy if trace["name"] == "stableopd · sampled")
    assert list(zip(sampled["x"], sampled["y"], strict=True)) == runs[1].series("eval/held_out/accuracy")


def test_the_first_screen_shows_accuracy_and_truncation(runs: list[RunRecord]) -> None:
    assert [chart.title.split(" (")[0] for chart in first_screen(runs)] == [
        "Accuracy on held-out prompts",
        "Answers cut off at the length limit",
    ]


def test_without_evaluation_the_first_screen_shows_training(tmp_path: Path) -> None:
    run = read_run(without(write_healthy_run(tmp_path / "opd"), "eval/"))
    assert first_screen([run])[0].title == "Length of training rollouts"


def without(folder: Path, prefix: str) -> Path:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if not key.startswith(prefix)} for row in rows]
    write_lines(folder / "metrics.jsonl", kept)
    return folder


def test_a_chart_without_data_is_left_out(runs: list[RunRecord]) -> None:
    titles = [chart.title for section in sections(runs) for chart in section.charts]
    assert "Gold term" in titles
    assert "Reward term" not in titles


def test_nan_is_a_gap_and_not_a_broken_page(tmp_path: Path) -> None:
    rows = [{"step": step, "grad_norm": math.nan if step == 2 else 1.0} for step in range(4)]
    write_lines(tmp_path / "run/metrics.jsonl", rows)
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    (figure,) = chart_data(page).values()
    assert figure["data"][0]["y"] == [1.0, 1.0, None, 1.0]


def test_thinning_keeps_every_spike() -> None:
    points = [(step, 0.0) for step in range(10_000)]
    points[4321] = (4321, 9.0)
    points[7000] = (7000, math.nan)
    points[8765] = (8765, -9.0)
    thinned = thin(points, limit=100)
    assert len(thinned) <= 100
    assert {(4321, 9.0), (8765, -9.0)} <= set(thinned)
    assert thinned == sorted(thinned)


def test_colours_are_told_apart_and_follow_the_method(runs: list[RunRecord]) -> None:
    assert colours(runs) == [PALETTE[METHOD_COLOURS["opd"]], PALETTE[METHOD_COLOURS["stableopd"]]]
    assert colours(runs[::-1]) == colours(runs)[::-1]
    again = [replace(run, name=f"{run.name} again") for run in runs]
    assert len(set(colours([*runs, *again]))) == 4


def test_seeds_of_one_method_share_a_colour_when_runs_are_many(runs: list[RunRecord]) -> None:
    assert colours(runs * 6) == colours(runs) * 6


def test_many_different_runs_have_different_colours(runs: list[RunRecord]) -> None:
    sweep = [replace(runs[0], config={"method": "opd", "objective": {"gold": {"coef": i}}}) for i in range(20)]
    assert len(set(colours(sweep))) == 20


# ------------------------------------------------------------------------------------ hostile and broken input


@pytest.fixture(scope="module")
def nasty_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("nasty")
    run = write_collapsing_run(folder / "<script>alert(3)<", steps=20)
    rollout = {"step": 10, "prompt": NASTY, "completion": NASTY * 40, "finish_reason": NASTY, "answer": NASTY}
    write_lines(run / "rollouts/step-000010.jsonl", [rollout])
    write_lines(run / "alerts.jsonl", [{"step": 1, "severity": NASTY, "message": NASTY, "action": NASTY}])
    write_lines(run / "metrics.jsonl", [{"step": step, f"eval/{NASTY[:30]}/accuracy": 0.5} for step in range(3)])
    (run / "config.yaml").write_text("method: </script><b>\nname: '</pre><script>'\n")
    (run / "environment.json").write_text(json.dumps({NASTY: NASTY}))
    return write_report([run, run], folder / "report.html").read_text(encoding="utf-8")


def test_texts_of_a_run_cannot_break_out_of_the_page(nasty_page: str, page: str) -> None:
    tags = Tags(nasty_page)
    assert tags.count("script") == Tags(page).count("script") == 3
    assert tags.count("img") == 0
    assert not any(name.startswith("on") for _, attrs in tags.found for name in attrs)


def test_hostile_texts_are_shown_as_they_are(nasty_page: str) -> None:
    assert "</script><script>alert(1)</script><img src=x onerror=alert(2)>" in html.unescape(
        re.sub(r"</?mark>", "", nasty_page.split("<main>")[1])
    )


def test_characters_that_html_cannot_hold_are_replaced(nasty_page: str) -> None:
    text = nasty_page.split("<main>")[1].split("<script")[0]
    assert not re.search(r"[\x00-\x08\x0e-\x1f]|\\ud800", text)
    assert text.count("\ufffd") > 10


def test_chart_data_stays_json_whatever_the_names(nasty_page: str) -> None:
    assert chart_data(nasty_page)
    data = Tags(nasty_page).data
    assert not {"<", ">", "\u2028", "\u2029"} & set(data)


def test_a_run_folder_with_nothing_but_an_empty_metrics_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    text = visible(write_report([tmp_path / "run"], tmp_path / "report.html").read_text())
    assert "run has too little data for a verdict" in text
    assert "No metrics were recorded" in text


@pytest.mark.parametrize("text", ["", "plain", NASTY, "ab" * 50, "x<y" * 900 + "end", "é🙂" * 20, LOOP * 3 + "then"])
def test_marking_changes_nothing_but_the_marks(text: str) -> None:
    shown = html.unescape(re.sub(r"</?mark>", "", str(mark_loops(text))))
    if len(text) <= MAX_CHARS:
        assert shown == text.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")
    else:
        assert shown.startswith(text[: MAX_CHARS // 2])
        assert shown.endswith(text[-MAX_CHARS // 2 :])


def test_loops_are_marked_and_the_rest_is_not() -> None:
    marked = re.findall(r"<mark>(.*?)</mark>", str(mark_loops("It starts well. " + "round and " * 8 + "END")))
    assert len(marked) == 1
    assert marked[0].strip().startswith("round and round")
    assert "END" not in marked[0]
    assert "<mark>" not in mark_loops("A sentence that says each thing once.")


def test_the_middle_of_a_long_text_is_left_out_and_said_so() -> None:
    shown = mark_loops("a" * 100_000)
    assert "97,600 characters left out" in shown
    assert len(shown) < 2 * MAX_CHARS


# ------------------------------------------------------------------------------------ the file


def test_the_file_loads_nothing_from_elsewhere(page: str) -> None:
    outside = [
        attrs[name]
        for _, attrs in Tags(page).found
        for name in ("src", "href")
        if attrs.get(name) and not str(attrs[name]).startswith(("#", "data:"))
    ]
    assert outside == []
    assert "default-src 'none'" in page


def test_folders_on_the_way_to_the_output_are_made(folders: list[Path], tmp_path: Path) -> None:
    assert write_report(folders[:1], tmp_path / "new/folder/report.html").is_file()


def test_an_old_report_survives_a_failure_and_no_litter_stays(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(RunFolderError):
        write_report([*folders, tmp_path / "missing"], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "old"
    write_report(folders, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ValueError, match="at least one run"):
        write_collapse_picture([], tmp_path / "collapse.png")


def test_writing_a_report_needs_no_torch(folders: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys; from stableopd.report import write_report; "
        "write_report([sys.argv[1]], sys.argv[2]); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(folders[0]), str(tmp_path / "report.html")]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize("prefix", ["nothing", "eval/", "health/", "completions/"])
def test_the_picture_is_drawn_whatever_is_missing(tmp_path: Path, prefix: str) -> None:
    run = read_run(without(write_collapsing_run(tmp_path / "a_$x$_<b>", steps=20), prefix))
    png = write_collapse_picture([run], tmp_path / "collapse.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG")
    assert (width, height) == (1560, 990)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".png"]
