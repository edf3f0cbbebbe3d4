"""What the doctor sees in gold and prompts, and what it must not take for a fault."""

from __future__ import annotations

import time
from dataclasses import replace

import doctor_pairs
import numpy as np
import pytest

from stableopd.config import StableOPDConfig
from stableopd.doctor.data import gold_findings, presence_findings, prompt_findings
from stableopd.doctor.judging import judge_findings
from stableopd.judges import exact_match, get_judge
from stableopd.types import Example

CONFIG = StableOPDConfig(rollout={"num_prompts": 2})
TOKENIZER = doctor_pairs.bpe()


def examples(*golds: str, answer: str | None = None) -> list[Example]:
    return [
        Example(
            index=row,
            prompt=f"p{row}",
            prompt_ids=(row + 4, 9),
            gold_ids=(*TOKENIZER(gold)["input_ids"], TOKENIZER.eos_token_id),
            answer=answer,
        )
        for row, gold in enumerate(golds)
    ]


def of_lengths(lengths: list[int]) -> list[Example]:
    ids = np.random.default_rng(0).integers(4, 250, size=max(lengths)).tolist()
    return [replace(examples("x")[0], index=row, gold_ids=tuple(ids[:length])) for row, length in enumerate(lengths)]


def checks(findings) -> dict[str, str]:
    return {finding.check: finding.danger for finding in findings}


def test_gold_that_piles_up_at_its_greatest_length_was_cut():
    lengths = np.minimum(np.random.default_rng(1).lognormal(4.6, 0.5, 400).astype(int), 200).tolist()
    (found,) = gold_findings(CONFIG, TOKENIZER, of_lengths(lengths))
    assert (found.check, found.danger) == ("gold_truncated", "problem")
    assert found.figures["gold_truncated"] == pytest.approx(np.mean(np.array(lengths) == 200))


@pytest.mark.parametrize(
    "lengths",
    [
        np.random.default_rng(1).lognormal(4.6, 0.5, 400).astype(int).tolist(),
        np.random.default_rng(2).integers(90, 101, 400).tolist(),
        [100] * 400,
        [80] * 100 + [100] * 100,
        [12] * 30 + [20] * 40 + list(range(5, 12)),
    ],
    ids=["thinning out", "even", "all alike", "two kinds", "short"],
)
def test_lengths_without_a_limit_are_no_sign_of_cutting(lengths):
    assert checks(gold_findings(CONFIG, TOKENIZER, of_lengths(lengths))) == {}


@pytest.mark.parametrize(
    "gold",
    ["so we get \\boxed{\\frac{1}{2", "```python\nprint(1)\n", "then \\boxed{a \\} b", "x \\boxed{1} or \\boxed{"],
)
def test_gold_that_breaks_off_inside_a_formula_or_code_is_told(gold):
    assert checks(gold_findings(CONFIG, TOKENIZER, examples(gold))) == {"gold_truncated": "problem"}


@pytest.mark.parametrize(
    "gold",
    ["\\boxed{\\frac{1}{2}}", "```python\nprint(1)\n```", "a set {1, 2", "\\boxed 3", "\\{ 1 \\boxed{\\{2\\}} ."],
)
def test_finished_gold_with_braces_and_code_is_left_in_peace(gold):
    assert checks(gold_findings(CONFIG, TOKENIZER, examples(gold))) == {}


def test_gold_without_the_box_that_the_others_have_is_told_and_gold_without_any_box_is_not():
    boxed = [f"It is \\boxed{{{n}}}." for n in range(20)]
    assert checks(gold_findings(CONFIG, TOKENIZER, examples(*boxed, "It is"))) == {"gold_truncated": "problem"}
    assert checks(gold_findings(CONFIG, TOKENIZER, examples(*(f"It is {n}." for n in range(20))))) == {}


def test_gold_that_loops_is_told():
    (found,) = gold_findings(CONFIG, TOKENIZER, examples("It is four.", "wait, " * 30))
    assert (found.check, found.figures) == ("gold_repetitive", {"gold_repetitive": 0.5})


def test_gold_that_compresses_too_well_by_the_settings_of_health_is_told():
    gold = " ".join(f"step {n}: nothing new here;" for n in range(20))
    strict = StableOPDConfig(health={"tail_chars": 100, "compression_threshold": 2.0})
    assert checks(gold_findings(CONFIG, TOKENIZER, examples(gold))) == {}
    assert checks(gold_findings(strict, TOKENIZER, examples(gold))) == {"gold_repetitive": "problem"}


def test_duplicates_are_a_note_and_name_the_prompt():
    rows = examples("a", "b", "c")
    rows[2] = replace(rows[2], prompt_ids=rows[0].prompt_ids)
    (found,) = prompt_findings(CONFIG, rows, [])
    assert (found.check, found.danger) == ("duplicate_prompts", "note")
    assert found.evidence == "2 times: 'p0'"


def test_gold_that_this_objective_does_not_need_may_be_missing():
    rows = examples("a", "b")
    rows[1] = replace(rows[1], gold_ids=None)
    opd = StableOPDConfig(method="opd")
    assert checks(presence_findings(CONFIG, rows, has_pool=False)) == {"gold_missing": "fatal"}
    assert checks(presence_findings(CONFIG, rows, has_pool=True)) == {"gold_missing": "note"}
    assert checks(presence_findings(opd, rows, has_pool=False)) == {"gold_missing": "note"}
    assert checks(presence_findings(opd, rows[1:], has_pool=False)) == {}


# ------------------------------------------------------------------------------------ judges


def judged(judge, golds: list[str], answer: str, budget_s: float = 5.0):
    return list(judge_findings(judge, "the.judge", examples(*golds, answer=answer), golds, budget_s))


def test_exact_comparison_of_whole_solutions_is_no_judge_of_them():
    golds = ["2 + 2 = 4", "so it is 4"]
    assert judged(exact_match, golds, "4") == []
    (found,) = judged(exact_match, [*golds, "4"], "4")
    assert (found.check, found.figures["gold_fails"]) == ("gold_fails", 2 / 3)


def test_gold_in_mathematics_is_held_to_its_answer():
    judge = get_judge("math")
    assert judged(judge, ["hence \\boxed{\\frac{1}{2}}"], "0.5") == []
    (found,) = judged(judge, ["hence \\boxed{3}", "hence \\boxed{0.5}"], "0.5")
    assert (found.check, found.danger) == ("gold_fails", "problem")
    assert "row 1" in found.evidence


def test_a_judge_that_hangs_is_told_of_and_holds_up_nothing():
    began = time.monotonic()
    (found,) = judged(doctor_pairs.hangs, ["a", "b", "c"], "4", budget_s=0.3)
    assert time.monotonic() - began < 2.0
    assert (found.check, found.danger) == ("judge", "problem")
    assert "no verdict" in found.evidence


def test_a_judge_that_raises_is_told_of_and_the_others_count():
    def judge(completion: str, answer: str) -> bool:
        if completion == "b":
            raise ValueError("not b")
        return True

    (found,) = judged(judge, ["a", "b", "c"], "4")
    assert found.check == "judge"
    assert found.evidence == "row 2: ValueError: not b"
    assert found.figures["judge_failures"] == pytest.approx(1 / 3)
