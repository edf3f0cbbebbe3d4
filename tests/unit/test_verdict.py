"""Verdicts on whole runs, from rows as they stand in metrics.jsonl."""

from __future__ import annotations

from typing import Any

import pytest

from stableopd.health import judge_run

Rows = list[dict[str, Any]]


def evals(accuracies: list[float], truncations: list[float], name: str = "test", greedy: bool = True) -> Rows:
    where = f"{name}_greedy" if greedy else name
    return [
        {"step": 10 * i, f"eval/{name}/accuracy": a, f"eval/{where}/truncation_rate": t}
        for i, (a, t) in enumerate(zip(accuracies, truncations, strict=True))
    ]


def training(truncations: list[float], loops: float = 0.0, key: str = "health/loop_token_fraction") -> Rows:
    start = truncations[0]
    return [
        {"step": step, "completions/clipped_ratio": rate, key: loops * (rate > start)}
        for step, rate in enumerate(truncations, 1)
    ]


class TestWithEvaluation:
    def test_collapse_is_lost_accuracy_with_truncated_greedy_answers(self) -> None:
        verdict = judge_run(evals([0.4, 0.7, 0.5, 0.3], [0.0, 0.1, 0.8, 1.0]))
        assert (verdict.status, verdict.step) == ("collapsed", 20)
        assert "did not recover" in verdict.headline
        assert "0.70 to 0.30" in verdict.headline
        assert not verdict.healthy

    def test_a_rising_run_is_healthy(self) -> None:
        verdict = judge_run(evals([0.4, 0.7, 0.65, 0.8], [0.3, 0.1, 0.0, 0.0]))
        assert (verdict.status, verdict.step) == ("healthy", None)
        assert verdict.healthy

    def test_a_collapse_that_was_overcome_is_a_warning_that_says_so(self) -> None:
        verdict = judge_run(evals([0.7, 0.4, 0.5, 0.68], [0.0, 0.9, 0.6, 0.1]))
        assert (verdict.status, verdict.step) == ("warning", 10)
        assert "recovered by step 30" in verdict.headline

    def test_accuracy_that_stays_lost_has_not_recovered_when_answers_get_shorter(self) -> None:
        assert judge_run(evals([0.7, 0.4, 0.4], [0.0, 0.9, 0.2])).status == "collapsed"

    def test_the_drop_must_exceed_the_bound_below_the_running_best(self) -> None:
        assert judge_run(evals([0.75, 0.625], [0.9, 0.9])).status == "healthy"
        assert judge_run(evals([0.75, 0.5], [0.9, 0.9])).status == "collapsed"
        assert judge_run(evals([0.5, 0.75], [0.9, 0.9])).status == "healthy"

    def test_lost_accuracy_without_truncation_is_a_warning(self) -> None:
        verdict = judge_run(evals([0.7, 0.4], [0.0, 0.5]))
        assert (verdict.status, verdict.step) == ("warning", 10)
        assert "answers still end" in verdict.headline

    def test_sampled_truncation_counts_where_nothing_is_decoded_greedily(self) -> None:
        assert judge_run(evals([0.7, 0.4], [0.0, 0.9], greedy=False)).status == "collapsed"

    def test_greedy_truncation_goes_before_sampled(self) -> None:
        rows = evals([0.7, 0.4], [0.0, 0.2])
        rows[1]["eval/test/truncation_rate"] = 0.9
        assert judge_run(rows).status == "warning"

    def test_greedy_collapse_behind_fine_sampled_accuracy_is_a_warning(self) -> None:
        rows = evals([0.7, 0.7], [0.0, 0.95])
        for line, accuracy in zip(rows, (0.6, 0.02), strict=True):
            line["eval/test_greedy/accuracy"] = accuracy
        verdict = judge_run(rows)
        assert (verdict.status, verdict.step) == ("warning", 10)
        assert "greedily" in verdict.headline

    def test_one_collapsed_benchmark_of_two_is_enough(self) -> None:
        rows = evals([0.7, 0.7], [0.0, 0.0], name="a") + evals([0.7, 0.2], [0.0, 1.0], name="b")
        verdict = judge_run(rows)
        assert verdict.status == "collapsed"
        assert verdict.headline.count("b accuracy") == 1
        assert len(verdict.reasons) == 2

    def test_held_out_accuracy_outranks_training_signals(self) -> None:
        inflated = training([0.0] * 10 + [0.9] * 10, loops=0.5)
        assert judge_run(inflated + evals([0.7, 0.7], [0.0, 0.0])).status == "warning"
        accuracy_only = [{"step": 0, "eval/t/accuracy": 0.7}, {"step": 20, "eval/t/accuracy": 0.2}]
        assert judge_run(inflated + accuracy_only).status == "collapsed"


class TestWithoutEvaluation:
    @pytest.mark.parametrize("key", ["health/loop_token_fraction", "health/repetition_rate"])
    def test_collapse_is_risen_truncation_with_repetition(self, key: str) -> None:
        verdict = judge_run(training([0.5] * 20 + [0.95] * 20, loops=0.4, key=key))
        assert verdict.status == "collapsed"
        assert verdict.step is not None
        assert 21 <= verdict.step <= 25

    def test_a_high_start_leaves_room_to_rise(self) -> None:
        assert judge_run(training([0.8] * 20 + [1.0] * 20, loops=0.4)).status == "collapsed"

    def test_risen_truncation_alone_is_a_warning(self) -> None:
        verdict = judge_run(training([0.1] * 20 + [0.6] * 20))
        assert verdict.status == "warning"
        assert "no repetition" in verdict.headline

    def test_high_truncation_from_the_start_is_healthy(self) -> None:
        assert judge_run(training([0.5] * 40, loops=0.4)).status == "healthy"

    def test_a_single_bad_step_is_not_sustained(self) -> None:
        assert judge_run(training([0.0] * 20 + [1.0] + [0.0] * 20, loops=0.6)).status == "healthy"

    def test_recovery_is_told(self) -> None:
        verdict = judge_run(training([0.0] * 10 + [0.9] * 10 + [0.0] * 20, loops=0.5))
        assert verdict.status == "warning"
        assert "recovered" in verdict.headline

    def test_a_run_that_never_stops_is_a_warning_about_end_tokens(self) -> None:
        verdict = judge_run(training([1.0] * 10))
        assert (verdict.status, verdict.step) == ("warning", 1)
        assert "end tokens" in verdict.headline


class TestUpdates:
    @pytest.mark.parametrize("rest", [[], training([0.0] * 10), evals([0.4, 0.7], [0.1, 0.0])])
    def test_a_run_that_was_hardly_updated_is_not_healthy(self, rest: Rows) -> None:
        skipped = [{"step": step, "skipped_updates": float(step > 3)} for step in range(1, 11)]
        verdict = judge_run(rest + skipped)
        assert (verdict.status, verdict.step) == ("warning", 4)
        assert "70% of the updates were not made" in verdict.headline

    def test_a_few_skipped_updates_are_no_trouble(self) -> None:
        skipped = [{"step": step, "skipped_updates": float(step == 3)} for step in range(1, 11)]
        assert judge_run(training([0.0] * 10) + skipped).status == "healthy"

    def test_a_collapse_is_still_a_collapse(self) -> None:
        skipped = [{"step": step, "skipped_updates": 1.0} for step in range(1, 11)]
        assert judge_run(evals([0.7, 0.2], [0.0, 1.0]) + skipped).status == "collapsed"


class TestRobustness:
    @pytest.mark.parametrize("rows", [[], [{}], [{"step": 1, "loss": 0.1}], training([0.1] * 5), evals([0.5], [0.0])])
    def test_too_little_is_unknown(self, rows: Rows) -> None:
        verdict = judge_run(rows)
        assert (verdict.status, verdict.step) == ("unknown", None)

    def test_junk_does_not_change_the_verdict(self) -> None:
        rows = evals([0.4, 0.7, 0.5, 0.3], [0.0, 0.1, 0.8, 1.0])
        junk: Rows = [
            {},
            {"loss": 1.0},
            {"step": None, "eval/test/accuracy": 1.0},
            {"step": 25, "eval/test/accuracy": float("nan")},
            {"step": 26, "eval/test/accuracy": None, "note": "text"},
            {"step": 27, "completions/clipped_ratio": "high"},
        ]
        assert judge_run([*junk, *rows]) == judge_run(rows)

    def test_order_does_not_matter_and_a_repeated_step_is_overwritten(self) -> None:
        rows = evals([0.4, 0.7, 0.3], [0.0, 0.1, 0.9])
        assert judge_run(rows[::-1]) == judge_run(rows)
        redone = evals([0.4, 0.7, 0.75], [0.0, 0.1, 0.0])[2:]
        assert judge_run(rows + redone).status == "healthy"


def test_greedy_decoding_that_looped_for_a_while_is_said_to_have_recovered():
    rows = [
        {
            "step": step, "eval/math/accuracy": 0.7, "eval/math_greedy/accuracy": 0.1 if looped else 0.8,
            "eval/math_greedy/truncation_rate": 0.9 if looped else 0.0,
        }
        for step, looped in ((0, False), (10, True), (20, False))
    ]  # fmt: skip
    verdict = judge_run(rows)
    assert verdict.status == "warning"
    assert verdict.headline.startswith("Collapsed at step 10 and recovered by step 20: math answers decoded greedily")
