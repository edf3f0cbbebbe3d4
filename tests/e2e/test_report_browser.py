"""The report in a real browser: curves are drawn, the console stays clean, the first screen answers the question."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from stableopd.report import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from fake_runs import write_collapsing_run, write_healthy_run, write_steered_run

WINDOW = (1280, 900)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=8000",
    "--window-size={},{}".format(*WINDOW),
)

PROBE = """<script>
const box = (node) => node.getBoundingClientRect();
const toggle = document.querySelector("button[data-run='0']");
const count = () => document.querySelectorAll("#first-0 .scatterlayer .trace").length;
const found = {
  width: document.documentElement.scrollWidth,
  bottoms: [...document.querySelectorAll("h1, .card, .first-screen .plot")].map((node) => box(node).bottom),
  traces: [...document.querySelectorAll(".plot")].map((plot) => [
    plot.id, plot.querySelectorAll(".js-line, .bars .point, .heatmaplayer image").length,
  ]),
  maps: document.querySelectorAll("#positions-0 .heatmaplayer image").length,
  bars: document.querySelectorAll("#timeline .bars .point").length,
  diamonds: document.querySelectorAll("#timeline .scatterlayer .textpoint").length,
  all: count(),
};
const plot = document.getElementById("timeline");
const bar = plot.data.findIndex((trace) => trace.type === "bar");
Plotly.Fx.hover(plot, [{ curveNumber: bar, pointNumber: 0 }], ["xy"]);
found.said = [...plot.querySelectorAll(".hoverlayer text")].map((node) => node.textContent).join(" ");
toggle.click();
found.hidden = count();
found.hiddenMaps = document.querySelector("[data-of-run='0']").getBoundingClientRect().height;
toggle.click();
found.again = count();
document.body.dataset.found = JSON.stringify(found);
</script>"""
"""Appended to a copy of the page: measures what is drawn, and presses a button."""


@pytest.fixture(scope="module")
def browser() -> str:
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no chromium, chromium-browser, google-chrome or $CHROMIUM"
        )
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [write_collapsing_run(folder / "opd"), write_healthy_run(folder / "stableopd")]
    return write_report(runs, folder / "report.html")


@pytest.fixture(scope="module")
def steered(browser: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """What the probe found on the page of a run that a controller brought back."""
    folder = tmp_path_factory.mktemp("steered")
    return probe(browser, write_report([write_steered_run(folder / "run")], folder / "report.html"), folder)


def visit(browser: str, page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page said on its console, errors that nobody caught included."""
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def probed(browser: str, report: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """What the probe found, and what the console said meanwhile."""
    return probe(browser, report, tmp_path_factory.mktemp("probe"))


def probe(browser: str, report: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    page = folder / "probed.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    done = visit(browser, page, folder / "profile", "--dump-dom")
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, "the script at the end of the page did not run"
    return json.loads(unescape(found[1])), console(done)


def test_curves_are_drawn_and_the_console_is_clean(probed: tuple[dict[str, Any], list[str]]) -> None:
    found, said = probed
    assert said == []
    assert len(found["traces"]) >= 15
    assert [name for name, traces in found["traces"] if traces == 0] == []
    assert dict(found["traces"])["first-0"] == 4  # two runs, sampled and greedy


def test_the_first_screen_holds_headline_cards_and_curves(probed: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = probed
    width, height = WINDOW
    assert len(found["bottoms"]) == 5
    assert max(found["bottoms"]) <= height
    assert found["width"] <= width


def test_a_run_can_be_hidden_and_shown_again(probed: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = probed
    assert (found["all"], found["hidden"], found["again"]) == (4, 2, 4)


def test_alerts_actions_and_maps_are_drawn(steered: tuple[dict[str, Any], list[str]]) -> None:
    found, said = steered
    assert said == []
    assert (found["bars"], found["diamonds"], found["maps"]) == (1, 1, 3)


def test_the_pointer_says_the_message_of_an_alert(steered: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = steered
    assert "warning, step 42" in found["said"]
    assert "length inflation; the student falls into repetition" in found["said"]


def test_what_is_about_one_run_is_hidden_with_it(probed: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = probed
    assert found["maps"] == 3
    assert found["hiddenMaps"] == 0


@pytest.mark.parametrize(
    "harm",
    [
        ("draw();\n})();", "drew();\n})();"),
        ('id="chart-data">{', 'id="chart-data">{{'),
        ("</body>", '<img src="https://example.invalid/x.png"></body>'),
    ],
    ids=["undefined function", "broken data", "network"],
)
def test_a_broken_page_is_noticed(browser: str, report: Path, tmp_path: Path, harm: tuple[str, str]) -> None:
    text = report.read_text(encoding="utf-8")
    assert text.count(harm[0]) == 1
    (tmp_path / "broken.html").write_text(text.replace(*harm), encoding="utf-8")
    assert console(visit(browser, tmp_path / "broken.html", tmp_path / "profile", "--dump-dom"))


def test_a_screenshot_of_the_first_screen_can_be_taken(browser: str, report: Path, tmp_path: Path) -> None:
    visit(browser, report, tmp_path / "profile", f"--screenshot={tmp_path / 'screen.png'}")
    png = (tmp_path / "screen.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == WINDOW
    assert len(png) > 40_000  # an empty page of this size is a tenth of that
