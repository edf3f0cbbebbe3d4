"""Every YAML that ships parses, and what the documents say is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from stableopd.config import PRESETS, StableOPDConfig
from stableopd.config_files import load_config
from stableopd.study.cells import cells_of
from stableopd.study.config import load_study
from stableopd.study.made_with import settings_digest
from stableopd.study.outcome import read_outcomes
from stableopd.study.running import StudyRun
from stableopd.study.table import rows_by_pair, rows_of, score
from stableopd.study.view import cells_of_row, columns

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_names_its_models_and_data(path):
    config = load_config(path)
    assert config.student.model_name_or_path
    assert config.teacher.is_set == config.objective.needs_teacher
    assert config.data.path


def test_there_are_recipes_for_the_pairs_of_the_paper_and_for_every_baseline():
    assert len([path for path in RECIPES if path.parent.name == "recipes"]) >= 4
    terms = {path.stem: load_config(path).objective for path in RECIPES if path.parent.name == "baselines"}
    assert {name for name, term in terms.items() if term.needs_gold} == {"sft", "opd-mixture"}
    assert {name for name, term in terms.items() if term.needs_reference} == {"opd-kl"}
    assert {name for name, term in terms.items() if term.needs_rewards} == {"grpo"}
    assert {name for name, term in terms.items() if term.needs_teacher} == {
        "opd", "opd-kl", "opd-mixture", "local-support-matching",
    }  # fmt: skip


@pytest.mark.parametrize("document", ["README.md", "docs/watching.md"])
def test_the_configurations_in_the_documents_parse(document):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        StableOPDConfig(**yaml.safe_load(block))


def test_the_table_of_presets_in_the_documents_is_the_one_in_the_code():
    text = (ROOT / "docs" / "losses.md").read_text()
    for method, coefficients in PRESETS.items():
        row = " | ".join(f"{coefficients[name]:g}" for name in ("distill", "gold", "reference"))
        assert f"| `{method}` | {row} |" in text


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    ],
)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_studies_in_the_documents_parse_and_all_of_their_runs_are_possible(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL)
    cells = []
    for block in blocks:
        (tmp_path / "study.yaml").write_text(block)
        cells.append(cells_of(load_study(tmp_path / "study.yaml")))
    paper, toy = cells
    assert {"stableopd", "opd", "sft", "sweep lambda_gold=0.1 beta_kl=0.0"} <= {cell.arm for cell in paper}
    assert len(toy) == 8
    (world,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "words.md").read_text(), re.DOTALL)
    (tmp_path / "study.yaml").write_text(world + "methods: {opd: {}}\n")
    assert [cell.pair for cell in cells_of(load_study(tmp_path / "study.yaml"))] == ["mine"]


def test_the_stored_results_of_studies_are_those_of_their_settings():
    for path in sorted(RESULTS.glob("*.jsonl")):
        study = load_study(ROOT / "studies" / f"{path.stem}.yaml")
        digests = {cell.key: settings_digest(study, cell) for cell in cells_of(study)}
        outcomes = read_outcomes(path)
        assert outcomes
        for outcome in outcomes:
            assert outcome.digest == digests[outcome.key], outcome.key


def stored_run(name: str, **only: object) -> StudyRun:
    """The stored results of a study: those on a sample of the held-out prompts, else those on the first of them."""
    places = (RESULTS / f"{name}.jsonl", RESULTS / "first-digits" / f"{name}.jsonl")
    path = next(place for place in places if place.exists())
    study = load_study(ROOT / "studies" / f"{name}.yaml")
    found = {outcome.key: outcome.with_late(study.late_fraction) for outcome in read_outcomes(path)}
    cells = [cell for cell in cells_of(study) if all(getattr(cell, key) == value for key, value in only.items())]
    keys = [cell.key for cell in cells]
    return StudyRun(study=study, cells=cells, outcomes=[found[key] for key in keys if key in found])


def in_document(*cells: str) -> str:
    return re.sub(r"(?<![0-9])0[.]", ".", " | ".join(cells))


@pytest.mark.parametrize("name", ["toy-main", "toy-long", "toy-a", "toy-defaults"])
def test_the_tables_of_the_study_are_those_of_its_stored_results(name):
    told = (ROOT / "docs" / "study.md").read_text().replace("−", "-").replace(" |  | ", " | | ")
    run = stored_run(name)
    for row in rows_of(run):
        cells = dict(zip(columns(run), cells_of_row(row), strict=True))
        against = next(column for column in cells if column.startswith("against"))
        line = in_document(*(cells[column] for column in ("accuracy", against, "better", "greedy", "cut off")))
        assert line.replace(" |  |  | ", " | | | ") in told, row.arm


@pytest.mark.parametrize("name", ["toy-alternatives", "toy-controller"])
def test_tables_teacher_by_teacher_are_those_of_the_stored_results(name):
    """Each line of them holds the accuracy under every teacher, then greedy accuracy."""
    told = (ROOT / "docs" / "study.md").read_text()
    run = stored_run(name, seed=901)
    for row in rows_of(run):
        by_pair = {outcome.pair: outcome for outcome in run.arms[row.arm]}
        accuracies = " / ".join(f"{score(by_pair[pair]):.3f}" for pair in ("standard", "moderate", "clean"))
        greedy = cells_of_row(row)[columns(run).index("greedy")]
        assert in_document(accuracies.replace(" 0.", " .").removeprefix("0"), greedy) in told, row.arm


def test_the_table_of_the_words_world_is_that_of_its_stored_results():
    """Each line of it begins with accuracy, the difference and greedy accuracy."""
    told = (ROOT / "docs" / "words.md").read_text().replace("−", "-").replace(" | | ", " |  | ")
    run = stored_run("words")
    for pair, rows in rows_by_pair(run).items():
        for row in rows:
            cells = dict(zip(columns(run), cells_of_row(row), strict=True))
            against = next(column for column in cells if column.startswith("against"))
            line = in_document(*(cells[column] for column in ("accuracy", against, "greedy")))
            assert f"`{pair}` | {line} |" in told, (pair, row.arm)
