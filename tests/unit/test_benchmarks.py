"""Benchmarks in the schemas that they have on the hub, as files that the tests write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stableopd.benchmarking.loading import benchmark_prompts, load_benchmark
from stableopd.benchmarking.registry import (
    ALIASES,
    INSTRUCTION,
    REGISTRY,
    answer_behind_hashes,
    canonical,
    listed_answers,
    plain_answer,
)
from stableopd.errors import ConfigError, DataError
from stableopd.judges import get_judge

ROWS = {
    "math500": [
        {
            "problem": "Convert $(0,3)$ to polar form.", "solution": "so $\\boxed{...}$",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "Precalculus", "level": 2,
            "unique_id": "test/precalculus/807.json",
        }
    ],
    "aime24": [
        {
            "id": 60, "problem": "Every morning Aya walks. Find the minutes.", "solution": "204", "answer": "204",
            "url": "https://example.org/1", "year": "2024",
        }
    ],
    "aime25": [{"problem": "Find the sum of all bases $b$.", "answer": "70", "id": "0"}],
    "amc": [{"id": 0, "question": "Cities A and B are 45 miles apart.", "answer": 27.0, "url": "https://example.org/2"}],
    "minerva": [{"question": "Find the density in $g/cm^3$.", "answer": "4.5e33"}],
    "olympiadbench": [
        {
            "id": 1606, "question": "Find all solutions.", "solution": ["..."], "final_answer": ["$2$", "$-3$"],
            "context": None, "modality": "Text-only", "answer_type": "Numerical", "is_multiple_answer": True,
            "subfield": "Algebra", "language": "English",
        },
        {"id": 1610, "question": "Find $k$.", "solution": ["..."], "final_answer": ["$\\frac{1}{2}$"],
         "context": None, "modality": "Text-only", "answer_type": "Numerical", "is_multiple_answer": False,
         "subfield": "Algebra", "language": "English"},
    ],
    "gsm8k": [{"question": "Ducks lay 16 eggs.", "answer": "She sells 9 * 2 = <<9*2=18>>18.\n#### 1,018"}],
}  # fmt: skip
ANSWERS = {
    "math500": ["\\left( 3, \\frac{\\pi}{2} \\right)"], "aime24": ["204"], "aime25": ["70"], "amc": ["27"],
    "minerva": ["4.5e33"], "olympiadbench": ["2, -3", "\\frac{1}{2}"], "gsm8k": ["1018"],
}  # fmt: skip


def parquet(folder: Path, rows: list[dict]) -> Path:
    datasets = pytest.importorskip("datasets")
    path = folder / "copy.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_benchmark_is_read_in_the_schema_of_the_hub(tmp_path, name):
    found = load_benchmark(f"{name}={parquet(tmp_path, ROWS[name])}")
    assert [problem.answer for problem in found.problems] == ANSWERS[name]
    assert all(isinstance(problem.prompt, str) and problem.prompt for problem in found.problems)
    assert found.name == name
    assert found.is_registered
    assert found.num_samples == (32 if name in ("aime24", "aime25", "amc") else 1)
    [row, *_] = found.rows(chat=False)
    assert row["prompt"] == f"{found.problems[0].prompt.strip()}\n{INSTRUCTION}"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_benchmark_asks_the_hub_for_its_dataset_and_split(monkeypatch, name):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, *configuration, split=None):
        asked.append((path, *configuration, split))
        return datasets.Dataset.from_list(ROWS[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_benchmark(name).problems) == len(ROWS[name])
    assert asked == [(*REGISTRY[name].hub_id.split(":"), REGISTRY[name].split)]


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_math_verify_takes_every_reference_answer_for_itself(tmp_path, name):
    pytest.importorskip("math_verify")
    judge = get_judge("math")
    for problem in load_benchmark(f"{name}={parquet(tmp_path, ROWS[name])}").problems:
        assert judge(f"So the answer is $\\boxed{{{problem.answer}}}$.", problem.answer)
        assert not judge("So the answer is $\\boxed{12345}$.", problem.answer)


def test_a_file_of_ones_own_may_name_its_columns_in_the_usual_ways(tmp_path):
    path = tmp_path / "own.jsonl"
    for question, answer in (("prompt", "answer"), ("problem", "final_answer"), ("question", "answer")):
        path.write_text(json.dumps({question: "1 + 1?", answer: 2}) + "\n" + json.dumps({question: "2?", answer: "2"}))
        found = load_benchmark(str(path))
        assert [problem.prompt for problem in found.problems] == ["1 + 1?", "2?"]
        assert [problem.answer for problem in found.problems] == ["2", "2"]
        assert (found.name, found.num_samples, found.is_registered) == ("own", 1, False)
    path.write_text(json.dumps({"task": "1 + 1?", "target": "2", "answer": "no"}))
    found = load_benchmark(str(path), question_column="task", answer_column="target")
    assert (found.problems[0].prompt, found.problems[0].answer) == ("1 + 1?", "2")


def test_a_question_may_be_a_conversation(tmp_path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    path.write_text(json.dumps({"prompt": messages, "answer": "2"}))
    assert load_benchmark(str(path)).problems[0].prompt == messages
    assert benchmark_prompts(str(path)) == ["1 + 1?"]


def test_the_digest_is_that_of_questions_and_answers_in_their_order(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]

    def digest(rows: list[dict]) -> str:
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_benchmark(str(path)).digest()

    assert digest(rows) == digest(rows)
    assert digest(rows) != digest(rows[::-1])
    assert digest(rows) != digest([rows[0], {"prompt": "b", "answer": "3"}])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("math50", "did you mean 'math500'"),
        ("nothing=copy.parquet", "no benchmark of the registry"),
        ("./absent.jsonl", "does not exist"),
    ],
)
def test_a_benchmark_that_is_not_there_is_told_with_the_nearest(given, words):
    with pytest.raises((ConfigError, DataError), match=words):
        load_benchmark(given)


@pytest.mark.parametrize(
    "row", [{"prompt": "a"}, {"prompt": "a", "answer": None}, {"answer": "1"}, {"prompt": 3, "answer": 1}]
)
def test_a_row_without_question_or_answer_is_refused_with_its_place(tmp_path, row):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "1"}) + "\n" + json.dumps(row))
    with pytest.raises(DataError, match="line 2"):
        load_benchmark(str(path))


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), ["2"], {"value": 2}, [["2"]], " "])
def test_an_answer_that_is_no_text_and_no_finite_number_is_refused_with_its_place(tmp_path, answer):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "1"}) + "\n" + json.dumps({"prompt": "b", "answer": answer}))
    with pytest.raises(DataError, match=r"line 2: .*answer"):
        load_benchmark(str(path))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gsm8k", "no hashes"),
        ("gsm8k", "none #### "),
        ("olympiadbench", ["2", None]),
        ("olympiadbench", [["2"]]),
        ("math500", ["2"]),
    ],
)
def test_a_copy_whose_answers_are_of_another_kind_is_refused_with_the_row(tmp_path, name, answer):
    spec, path = REGISTRY[name], tmp_path / "copy.json"
    path.write_text(json.dumps([{spec.question_column: "a", spec.answer_column: answer}]))
    with pytest.raises(DataError, match="row 1: "):
        load_benchmark(f"{name}={path}")


@pytest.mark.parametrize("question", [["What", "is"], " \n", 7, {"text": "a"}])
def test_a_copy_whose_questions_are_no_text_is_refused_with_the_row(tmp_path, question):
    spec, path = REGISTRY["math500"], tmp_path / "copy.json"
    path.write_text(json.dumps([{spec.question_column: question, spec.answer_column: "2"}]))
    with pytest.raises(DataError, match=r"row 1: .*question"):
        load_benchmark(f"math500={path}")


@pytest.mark.parametrize(
    ("listed", "reference", "right", "wrong"),
    [
        (["$2$"], "2", "2", "3"),
        (["2"], "2", "2", "3"),
        (["$\\frac{1}{2}$"], "\\frac{1}{2}", "0.5", "2"),
        (["$2$", "$-3$"], "2, -3", "2, -3", "2"),
        (["$$2$$"], "2", "2", "3"),
        (["$x=1$, $y=2$"], "$x=1$, $y=2$", "x=1, y=2", "y=2"),
        (["$x=1$ or $x=2$"], "$x=1$ or $x=2$", "x=1, x=2", "2"),
        (["$2$", "$x=1$ or $x=3$"], "$2$, $x=1$ or $x=3$", "2, x=1, x=3", "x=3"),
        (["(1,2)", "(3,4)"], "(1,2), (3,4)", "(1,2), (3,4)", "(1,2)"),
        (["$\\$5$"], "$\\$5$", "5", "6"),
    ],
)
def test_dollars_around_a_whole_text_alone_are_left_off_and_math_verify_reads_what_is_left(
    listed, reference, right, wrong
):
    pytest.importorskip("math_verify")
    assert listed_answers(listed) == reference
    judge = get_judge("math")
    assert judge(f"So it is $\\boxed{{{right}}}$.", reference)
    assert not judge(f"So it is $\\boxed{{{wrong}}}$.", reference)


def test_answers_are_taken_out_of_their_columns():
    assert answer_behind_hashes("a #### b #### -1,234,567.5") == "-1234567.5"
    with pytest.raises(DataError, match="####"):
        answer_behind_hashes("18")
    assert listed_answers("$3$") == "3"
    assert plain_answer(27.5) == "27.5"
    assert [canonical(name) for name in ("AIME2024", "Math500", "own.jsonl")] == ["aime24", "math500", "own.jsonl"]
    assert set(ALIASES.values()) <= set(REGISTRY)


def test_the_document_has_every_benchmark_as_it_is_in_the_registry():
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, spec in REGISTRY.items():
        row = (
            f"`{name}`", spec.title, f"`{spec.hub_id}`", spec.split, f"`{spec.question_column}`",
            f"`{spec.answer_column}`", f"{spec.num_problems:,}", str(spec.num_samples),
        )  # fmt: skip
        assert f"| {' | '.join(row)} |" in text
    assert all(f"`{alias}`" in text for alias in ALIASES)
