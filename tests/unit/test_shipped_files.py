"""Every YAML that ships parses, and what the documents say is true."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

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
    """The stored results of a study, as far as it was run."""
    study = load_study(ROOT / "studies" / f"{name}.yaml")
    found = {
        outcome.key: outcome.with_late(study.late_fraction) for outcome in read_outcomes(RESULTS / f"{name}.jsonl")
    }
    cells = [cell for cell in cells_of(study) if all(getattr(cell, key) == value for key, value in only.items())]
    keys = [cell.key for cell in cells]
    return StudyRun(study=study, cells=cells, outcomes=[found[key] for key in keys if key in found])


def figures(text: str) -> str:
    """Figures as the documents write them: no zero before the point, a true minus."""
    return re.sub(r"(?<![0-9])0[.]", ".", text).replace("-", "−")


def tables_of(document: str, study: str) -> list[list[list[str]]]:
    """Cells of the tables in the section of a document that names the stored results of a study."""
    text = (ROOT / "docs" / document).read_text()
    (section,) = [part for part in re.split(r"\n#+ ", text) if f"docs/results/{study}.jsonl" in part]
    blocks = re.findall(r"(?:^[|].*\n)+", section, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()] for block in blocks
    ]


def row_called(tables: list[list[list[str]]], label: str) -> dict[str, str]:
    """The row whose first cell begins with a label, by the heads of its columns."""
    rows = [
        dict(zip(table[0], row, strict=True))
        for table in tables
        for row in table[2:]
        if re.match(rf"{re.escape(label)}(?![\w.-])", row[0])
    ]
    assert len(rows) == 1, (label, rows)
    return rows[0]


@pytest.mark.parametrize("name", ["toy-main", "toy-long", "toy-a", "toy-defaults"])
def test_the_tables_of_the_study_are_those_of_its_stored_results(name):
    run, tables = stored_run(name), tables_of("study.md", name)
    for row in rows_of(run):
        told = row_called(tables, row.arm)
        cells = {column: figures(cell) for column, cell in zip(columns(run), cells_of_row(row), strict=True)}
        against = next(column for column in cells if column.startswith("against"))
        assert told["accuracy [95%]"] == cells["accuracy"]
        assert told["against stableopd [95%]"] == cells[against]
        assert told["better"] == cells["better"]
        assert told["greedy"] == cells["greedy"]
        assert told["greedy cut off"] == cells["cut off"]
        assert told["collapsed on the way (at the end)"].replace(f" of {row.num_runs}", "") == cells["collapsed"]
        if name == "toy-long":
            outcomes = run.arms[row.arm]
            half = [[dict(one.curves[curve])[100] for one in outcomes] for curve in ("accuracy", "greedy_truncation")]
            assert told["half-way: accuracy, greedy cut off"] == figures(", ".join(f"{fmean(of):.3f}" for of in half))
            tokens = fmean(outcome.figures["num_tokens"] for outcome in outcomes)
            assert told["tokens"] == f"{round(tokens, -3):,.0f}"


ALTERNATIVES = {
    "opd": "none (opd)", "mask-repeated": "repeated tokens masked", "drop-truncated": "cut-off rollouts dropped",
    "top-4": "reverse KL over the teacher's 4", "reverse-kl": "reverse KL over the vocabulary",
    "forward-kl": "forward KL", "jsd": "JSD", "log-compress": "advantages compressed by log",
    "sequence-mean": "sequence mean", "clamp-1": "advantages clamped", "discount-0.9": "advantages summed",
    "kl": "the KL at β 0.1", "stableopd": "StableOPD", "stableopd-pool": "StableOPD, gold from a pool",
    "sft-pool": "SFT on that pool",
}  # fmt: skip
CONTROLLER = {
    "opd": "opd", "stabilise": "opd + stabilise", "rollback": "opd + rollback",
    "stableopd": "StableOPD, λ 1, β 0.1", "stableopd-3": "StableOPD, λ 3, β 0.1",
}  # fmt: skip


@pytest.mark.parametrize(("name", "labels"), [("toy-alternatives", ALTERNATIVES), ("toy-controller", CONTROLLER)])
def test_tables_teacher_by_teacher_are_those_of_the_stored_results(name, labels):
    told = {row[0]: row for table in tables_of("study.md", name) for row in table[2:]}
    run = stored_run(name, seed=901)
    for row in rows_of(run):
        label = labels[row.arm]
        exact = [first for first in told if first == label] or [first for first in told if first.startswith(label)]
        assert len(exact) == 1, (label, exact)
        cells = dict(zip(columns(run), cells_of_row(row), strict=True))
        by_pair = {outcome.pair: outcome for outcome in run.arms[row.arm]}
        accuracies = " / ".join(f"{score(by_pair[pair]):.3f}" for pair in ("standard", "moderate", "clean"))
        expected = [figures(accuracies), figures(cells["greedy"])]
        if name == "toy-alternatives":
            expected += [figures(cells["cut off"]), cells["collapsed"]]
        else:
            expected += [f"{row.collapsed} of 3"]
        assert told[exact[0]][1 : 1 + len(expected)] == expected, label


def test_the_table_of_coefficients_is_that_of_the_stored_results():
    """Accuracy / greedy answers cut off at the end, and C where the run collapsed on the way."""
    run = stored_run("toy-sweep")
    tables = {table[0][0]: table for table in tables_of("study.md", "toy-sweep")}
    seen = 0
    for outcome in run.outcomes:
        point = dict(re.findall(r"(lambda_gold|beta_kl)=([\d.]+)", outcome.arm))
        gold, kl = (f"{float(point[key]):g}" for key in ("lambda_gold", "beta_kl"))
        told = row_called([tables[f"{outcome.pair} teacher"]], f"λ {gold}")[f"β {kl}"]
        cut_off = outcome.figures["final_greedy_truncation"]
        mark = " **C**" if outcome.figures["collapsed"] else ""
        assert told == figures(f"{score(outcome):.3f} / {cut_off:.2f}").replace(" / 0.", " / .") + mark, outcome.arm
        seen += 1
    assert seen == 40


def test_the_table_of_the_words_world_is_that_of_its_stored_results():
    run, tables = stored_run("words"), tables_of("words.md", "words")
    rows = [row for pair in rows_by_pair(run).values() for row in pair]
    assert rows
    for pair, of_pair in rows_by_pair(run).items():
        for row in of_pair:
            cells = {column: figures(cell) for column, cell in zip(columns(run), cells_of_row(row), strict=True)}
            against = next(column for column in cells if column.startswith("against"))
            told = row_called(tables, f"{row.arm}, `{pair}`")
            expected = [cells["accuracy"], cells[against], cells["greedy"], cells["cut off"]]
            columns_told = ("accuracy [95%]", "against stableopd", "greedy", "greedy cut off")
            assert [told[column] for column in columns_told] == expected, (row.arm, pair)
            (outcome,) = [one for one in run.arms[row.arm] if one.pair == pair]
            worst = max(value for _, value in outcome.curves["greedy_truncation"])
            assert told["worst greedy cut off on the way"] == figures(f"{worst:.3f}")
            assert told["tokens"] == f"{round(outcome.figures['num_tokens'], -3):,.0f}"
