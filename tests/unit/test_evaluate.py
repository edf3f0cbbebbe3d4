"""Evaluation counts what it should: accuracy over judged answers, truncation and repetition beside it."""

from __future__ import annotations

import pytest
import torch

from stableopd.benchmarking.timed import TimedJudge
from stableopd.errors import ConfigError
from stableopd.evaluate import decode, evaluate
from stableopd.judges import exact_match, get_judge
from stableopd.types import Example, RolloutBatch, Sampling


class ScriptedEngine:
    """Answers every request with the same texts, whatever the weights."""

    def __init__(self, tokenizer, texts, reasons):
        self.tokenizer, self.texts, self.reasons = tokenizer, texts, reasons

    def generate(self, examples, sampling, *, step):
        rows = [self.tokenizer(text)["input_ids"] for text in self.texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [16] * (width - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
        return RolloutBatch(
            prompt_ids=torch.ones(len(rows), 1, dtype=torch.long), prompt_mask=torch.ones(len(rows), 1).bool(),
            completion_ids=ids, completion_mask=mask, sampling_logprobs=torch.zeros(ids.shape),
            finish_reason=tuple(self.reasons),
            prompt_index=tuple(row // sampling.num_generations for row in range(len(rows))),
        )  # fmt: skip


EXAMPLES = [
    Example(index=0, prompt="1:", prompt_ids=(1,), answer="1"),
    Example(index=1, prompt="2:", prompt_ids=(2,), answer="2"),
]
TEXTS = ["1$", "2$", "2$", "1212121212121212"]
REASONS = ["stop", "stop", "stop", "length"]


def run(tokenizer, examples=EXAMPLES, judge=exact_match):
    return evaluate(
        ScriptedEngine(tokenizer, TEXTS, REASONS), examples, Sampling(max_new_tokens=16, num_generations=2),
        name="set", judge=judge, tokenizer=tokenizer, tail_chars=10, compression_threshold=0.5,
    )  # fmt: skip


def test_accuracy_truncation_repetition_and_length(tokenizer):
    metrics = run(tokenizer)
    assert metrics == {
        "eval/set/accuracy": 0.5,
        "eval/set/accuracy_low": 0.5,  # both prompts have one right answer of two
        "eval/set/accuracy_high": 0.5,
        "eval/set/avg_at_k": 0.5,
        "eval/set/pass_at_k": 1.0,
        "eval/set/truncation_rate": 0.25,
        "eval/set/repetition_rate": 0.25,
        "eval/set/mean_length": (2 + 2 + 2 + 16) / 4,
    }


def test_votes_are_counted_where_the_judge_tells_them(tokenizer):
    with TimedJudge("exact") as judge:
        assert run(tokenizer, judge=judge)["eval/set/maj_at_k"] == 0.5  # a tie for each prompt


def test_an_answer_that_the_judge_takes_too_long_for_is_wrong_and_told(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "slow_judge.py").write_text(
        "import time\n\ndef judge(completion, answer):\n    time.sleep(30 * (completion == '1'))\n    return True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with TimedJudge("slow_judge:judge", timeout_s=0.5) as judge:
        metrics = run(tokenizer, judge=judge)
    assert metrics["eval/set/accuracy"] == 0.75
    assert (metrics["eval/set/judge_failures"], metrics["eval/set/judge_timeouts"]) == (1, 1)


def test_prompts_without_an_answer_do_not_count_as_wrong(tokenizer):
    only_first = [EXAMPLES[0], Example(index=1, prompt="2:", prompt_ids=(2,))]
    assert run(tokenizer, only_first)["eval/set/accuracy"] == 0.5
    nobody = [Example(index=0, prompt="", prompt_ids=(1,)), Example(index=1, prompt="", prompt_ids=(2,))]
    assert "eval/set/accuracy" not in run(tokenizer, nobody)


def test_a_judge_that_raises_counts_as_wrong_and_is_told(tokenizer):
    def moody(completion, answer):
        if completion == "2":
            raise ZeroDivisionError
        return completion == answer

    metrics = run(tokenizer, judge=moody)
    assert metrics["eval/set/accuracy"] == 0.25
    assert metrics["eval/set/judge_failures"] == 2


def test_a_judge_that_does_not_say_yes_or_no_is_not_believed(tokenizer):
    metrics = run(tokenizer, judge=lambda completion, answer: "certainly")
    assert metrics["eval/set/accuracy"] == 0.0
    assert metrics["eval/set/judge_failures"] == 4


def test_text_is_without_its_end_token_but_shows_special_tokens_inside(tokenizer):
    engine = ScriptedEngine(tokenizer, ["1_2$", "12"], ["stop", "length"])
    rollouts = engine.generate(EXAMPLES, Sampling(max_new_tokens=4), step=0)
    assert [completion.text for completion in decode(rollouts, EXAMPLES, tokenizer)] == ["1_2", "12"]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", True),
        (r"so it is \boxed{3}", r"\boxed{4}", False),
        ("the answer is 12", "12", True),
        ("", "12", False),
    ],
)
def test_the_math_judge_compares_values_not_strings(completion, answer, right):
    assert get_judge("math")(completion, answer) is right


def test_the_exact_judge_forgives_white_space_only():
    assert exact_match(" 12\n", "12")
    assert not exact_match("12.", "12")


@pytest.mark.parametrize(
    "name", ["guess", "no.such.module:judge", "stableopd.judges:absent", "stableopd.config:PRESETS"]
)
def test_a_judge_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=r"evaluation\.judge"):
        get_judge(name)
