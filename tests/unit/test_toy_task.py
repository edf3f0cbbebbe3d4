"""The toy world: its split and gold, what its samplers draw and how often, and how answers are judged."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from stableopd.toy.task import (
    ALPHABET,
    Sample,
    World,
    answer,
    chain,
    copying_example,
    gold,
    is_held_out,
    is_terse,
    judge,
    prompt_text,
    prompts,
    recheck_example,
    solution,
    teacher_trace,
    verification_example,
    wrong_attempt,
)

T4, A = World.t4(), World.a()
NUM_SAMPLES = 6_000
SAMPLERS = [teacher_trace, verification_example, copying_example, recheck_example]


def draw(sampler, world: World, seed: int = 0, num: int = NUM_SAMPLES) -> list[tuple[str, Sample]]:
    rng = np.random.default_rng(seed)
    drawn = rng.choice(prompts(world), size=num).tolist()
    return [(prompt, sampler(world, prompt, rng)) for prompt in drawn]


def attempts(text: str) -> list[str]:
    """The attempts of a completion, of which the last may lack its verdict."""
    return [part for part in re.split(r";w?(?:y=\d\$)?", text) if part]


def share(hits: list[bool]) -> float:
    assert len(hits) >= 100, "too few cases to speak of a share"
    return sum(hits) / len(hits)


def near(expected: float, num: int):
    """Within four standard errors of a share observed `num` times."""
    return pytest.approx(expected, abs=4 * (expected * (1 - expected) / num) ** 0.5)


class TestPromptsAndGold:
    def test_prompts_are_all_digit_strings(self):
        assert prompts(replace(A, num_digits=2)) == [f"{number:02d}" for number in range(100)]
        assert len(set(prompts(T4))) == 10_000

    def test_chain_holds_the_running_sums_and_ends_in_the_answer(self):
        assert chain("1234") == "1360"
        assert chain("9999") == "9876"
        assert answer("9999") == "6"

    def test_one_prompt_in_five_is_held_out(self):
        held_out = [is_held_out(prompt) for prompt in prompts(T4)]
        assert share(held_out) == near(0.2, 10_000)

    def test_split_never_changes(self):
        held_out = [prompt for prompt in prompts(T4) if is_held_out(prompt)]
        assert held_out[:8] == ["0003", "0005", "0012", "0014", "0021", "0024", "0029", "0031"]
        assert len(held_out) == 1967

    def test_style_of_gold_never_changes(self):
        terse = [prompt for prompt in prompts(T4) if is_terse(T4, prompt)]
        assert terse[:8] == ["0000", "0004", "0005", "0009", "0015", "0021", "0030", "0034"]
        assert len(terse) == 4042

    def test_style_of_gold_is_independent_of_the_split(self):
        held_out = [prompt for prompt in prompts(T4) if is_held_out(prompt)]
        assert share([is_terse(T4, prompt) for prompt in held_out]) == near(0.4, len(held_out))

    def test_gold_is_right_and_in_one_of_two_forms(self):
        for prompt in prompts(T4):
            sums = "" if is_terse(T4, prompt) else chain(prompt)
            assert gold(T4, prompt) == f"{sums};y={sum(map(int, prompt)) % 10}$"
            assert judge(gold(T4, prompt), answer(prompt))

    def test_world_a_has_chain_gold_only(self):
        assert {len(gold(A, prompt)) for prompt in prompts(A)} == {9}

    def test_all_text_stays_in_the_alphabet(self):
        samples = [sample.text for sampler in SAMPLERS for _, sample in draw(sampler, T4, num=300)]
        assert set("".join(samples) + prompt_text("0123")) <= set(ALPHABET)

    def test_task_module_needs_no_torch(self):
        program = "import sys, stableopd.toy.task; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


class TestJudge:
    @pytest.mark.parametrize("completion", ["1360;y=0", "1360;y=0$", "1360;y=0$__", ";y=0", "9;w1360;y=0$"])
    def test_an_answer_at_the_end_counts_with_or_without_special_tokens(self, completion):
        assert judge(completion, "0")

    @pytest.mark.parametrize(
        "completion",
        [
            "",
            "$",
            "1360;y=1$",
            "1360;w1360;w1360;w13",
            "1360;y=0;w",
            "y=01",
            "y=10",
            "1360",
            "0",
            "y=",
            "y=0\n",
            "y=0$$",
        ],
    )
    def test_anything_else_is_wrong(self, completion):
        assert not judge(completion, "0")

    def test_a_trace_cut_at_its_limit_is_wrong(self):
        cut = [(p, s.text) for p, s in draw(teacher_trace, A) if not s.text.endswith("$")]
        assert len(cut) > 100
        assert not any(judge(text, answer(prompt)) for prompt, text in cut)


class TestEverySampler:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_there_is_one_weight_per_character(self, sampler):
        assert all(len(s.text) == len(s.weights) for _, s in draw(sampler, T4, num=1_000))

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_the_same_seed_draws_the_same_samples(self, sampler):
        assert draw(sampler, T4, num=50) == draw(sampler, T4, num=50)
        assert draw(sampler, T4, num=50) != draw(sampler, T4, seed=1, num=50)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_finished_sample_is_right(self, sampler):
        finished = [(p, s.text) for p, s in draw(sampler, T4, num=1_000) if s.text.endswith("$")]
        assert len(finished) > 100
        assert all(judge(text, answer(prompt)) for prompt, text in finished)


class TestWrongAttempt:
    def slips(self, num: int = 20_000) -> list[int]:
        """Number of places where the step between successive sums is not the digit of the prompt."""
        rng, prompt = np.random.default_rng(0), "4071"
        digits = [int(digit) for digit in prompt]
        counts = []
        for _ in range(num):
            sums = [0, *map(int, wrong_attempt(A, prompt, rng))]
            counts.append(sum((b - a) % 10 != d for a, b, d in zip(sums, sums[1:], digits, strict=False)))
        return counts

    def test_it_is_never_the_right_one(self):
        rng = np.random.default_rng(0)
        assert all(wrong_attempt(A, "1234", rng) != chain("1234") for _ in range(5_000))

    def test_a_slip_propagates_to_all_later_sums(self):
        rng = np.random.default_rng(0)
        world = replace(A, single_slip_fraction=1.0)
        for _ in range(500):
            errors = [(int(x) - int(y)) % 10 for x, y in zip(wrong_attempt(world, "5555", rng), "5050", strict=True)]
            place = next(i for i, error in enumerate(errors) if error)
            assert errors == [0] * place + [errors[place]] * (4 - place)

    def test_half_have_one_slip_and_the_rest_one_to_four(self):
        slips = self.slips()
        counts = Counter(slips)
        assert set(counts) == {1, 2, 3, 4}
        assert counts[1] / len(slips) == near(0.625, len(slips))
        for k in (2, 3, 4):
            assert counts[k] / len(slips) == near(0.125, len(slips))


@pytest.fixture(scope="module")
def traces() -> list[tuple[str, str]]:
    return [(prompt, sample.text) for prompt, sample in draw(teacher_trace, A, num=12_000)]


@pytest.fixture(scope="module")
def transitions(traces) -> list[tuple[bool, int, str]]:
    """(right, copies in a row so far, what follows) of every attempt that is not the last of a cut trace."""
    found = []
    for prompt, text in traces:
        tries, run = attempts(text), 0
        for this, following in zip(tries, [*tries[1:], None], strict=True):
            if following is None and not text.endswith("$"):
                break
            if following is not None and len(following) < 4:
                break
            right = this == chain(prompt)
            outcome = "stop" if following is None else "copy" if following == this else "new"
            outcome = "right" if outcome == "new" and following == chain(prompt) else outcome
            found.append((right, run, outcome))
            run = run + 1 if outcome == "copy" else 0
    return found


class TestTeacherTrace:
    def test_two_in_five_first_attempts_are_wrong(self, traces):
        wrong = [attempts(text)[0] != chain(prompt) for prompt, text in traces]
        assert share(wrong) == near(0.4, len(wrong))

    @pytest.mark.parametrize("run", [0, 1, 2, 3])
    def test_rechecking_a_right_attempt_grows_with_its_copies(self, transitions, run):
        copied = [outcome == "copy" for right, r, outcome in transitions if right and r == run]
        assert share(copied) == near(0.2 + 0.79 * (1 - 0.6**run), len(copied))

    @pytest.mark.parametrize("run", [0, 1, 2, 3])
    def test_copying_a_wrong_attempt_grows_with_its_copies(self, transitions, run):
        copied = [outcome == "copy" for right, r, outcome in transitions if not right and r == run]
        assert share(copied) == near(0.45 + 0.55 * (1 - 0.6**run), len(copied))

    def test_four_in_five_new_attempts_after_a_wrong_one_are_right(self, transitions):
        right = [outcome == "right" for was_right, _, outcome in transitions if not was_right and outcome != "copy"]
        assert share(right) == near(0.8, len(right))

    def test_a_wrong_attempt_never_stops_and_a_right_one_is_never_changed(self, transitions):
        assert not any(outcome == "stop" for right, _, outcome in transitions if not right)
        assert not any(outcome in ("new", "right") for right, _, outcome in transitions if right)

    def test_a_trace_is_cut_at_its_cap_and_then_has_no_end(self, traces):
        lengths = [len(text) for _, text in traces]
        assert max(lengths) == 100
        cut = [text for _, text in traces if not text.endswith("$")]
        assert 0.08 < len(cut) / len(traces) < 0.18
        assert {len(text) for text in cut} == {100}

    def test_world_t4_thinks_better_of_a_direct_answer_in_1_5_percent(self):
        samples = [sample for _, sample in draw(teacher_trace, T4, num=30_000)]
        direct = [sample for sample in samples if sample.text.startswith(";")]
        assert len(direct) / len(samples) == near(0.015, len(samples))
        assert all(s.text.startswith(";w") and s.weights[:2] == (1, 3) for s in direct)

    def test_world_a_never_answers_directly(self, traces):
        assert not any(text.startswith(";") for _, text in traces)

    def test_new_slips_have_no_weight_copies_one_and_verdicts_three(self):
        world = replace(A, repair_fraction=1.0)  # no new slip can look like a copy of the one before
        for prompt, sample in draw(teacher_trace, world, num=2_000):
            expected, previous = [], None
            for part in re.findall(r"\d+(?=;|$)|;|w|y|=\d|\$", sample.text):
                fresh_slip = part.isdigit() and not chain(prompt).startswith(part) and part != previous
                if part.isdigit() and len(part) < 4:
                    break  # the stump of a cut trace could belong to a copy or not
                expected += [3.0 if part in ("y", "w") else 0.0 if fresh_slip else 1.0] * len(part)
                previous = part if part.isdigit() else previous
            assert list(sample.weights[: len(expected)]) == expected

    def test_a_clean_teacher_rechecks_less_and_a_moderate_one_lies_between(self):
        def mean_length(world: World) -> float:
            return float(np.mean([len(sample.text) for _, sample in draw(teacher_trace, world)]))

        clean, moderate = mean_length(T4.with_clean_teacher()), mean_length(T4.with_moderate_teacher())
        assert clean + 3 < moderate < mean_length(T4) - 1

    def test_habits_of_the_other_teachers(self):
        clean, moderate = T4.with_clean_teacher(), T4.with_moderate_teacher()
        assert clean.copy_probability(2) == pytest.approx(0.3 + 0.7 * (1 - 0.49))
        assert clean.recheck_probability(2) == pytest.approx(0.1 + 0.8 * (1 - 0.64))
        assert moderate.recheck_probability(2) == pytest.approx(0.15 + 0.8 * (1 - 0.49))
        assert moderate.terse_fraction == clean.terse_fraction == 0.4


class TestVerificationExample:
    def test_half_are_wrong_and_end_with_w(self):
        samples = draw(verification_example, T4)
        wrong = [sample.text.endswith(";w") for _, sample in samples]
        assert share(wrong) == near(0.5, len(wrong))

    def test_text_and_weights_follow_the_attempt(self):
        for prompt, (text, weights) in draw(verification_example, T4, num=500):
            if text.endswith("w"):
                assert re.fullmatch(r"\d{4};w", text)
                assert text[:4] != chain(prompt)
                assert weights == (0, 0, 0, 0, 1, 3)
            else:
                assert text == solution(prompt, terse=False)
                assert weights == (1, 1, 1, 1, 1, 3, 1, 1, 1)


class TestStudentColdStart:
    def test_copying_drill_is_one_attempt_copied_one_to_five_times_then_gold(self):
        drills = [(p, s.text) for p, s in draw(copying_example, T4) if "w" in s.text]
        copies = Counter()
        for prompt, text in drills:
            *drilled, final = attempts(text)
            assert len(set(drilled)) == 1
            assert final == chain(prompt)
            copies[len(drilled) - 1] += 1
        assert len(drills) / NUM_SAMPLES == near(0.4, NUM_SAMPLES)
        assert share([attempts(text)[0] != chain(prompt) for prompt, text in drills]) == near(0.7, len(drills))
        assert set(copies) == {1, 2, 3, 4, 5}
        assert min(copies.values()) / len(drills) > 0.15

    @pytest.mark.parametrize("sampler", [copying_example, recheck_example])
    def test_style_of_gold_is_drawn_anew_each_time(self, sampler):
        rng = np.random.default_rng(0)
        texts = [sampler(T4, "1234", rng).text for _ in range(NUM_SAMPLES)]
        terse = [text == ";y=0$" for text in texts if "w" not in text]
        assert share(terse) == near(0.4, len(terse))

    @pytest.mark.parametrize(("world", "direct_share"), [(T4, 0.4), (A, 0.0)])
    def test_one_in_a_hundred_is_a_single_recheck(self, world, direct_share):
        rng = np.random.default_rng(0)
        texts = [recheck_example(world, "1234", rng).text for _ in range(40_000)]
        rechecks = Counter(text for text in texts if "w" in text)
        assert rechecks.total() / len(texts) == near(0.01, len(texts))
        assert set(rechecks) <= {";w1360;y=0$", "1360;w1360;y=0$"}
        assert rechecks[";w1360;y=0$"] / rechecks.total() == near(direct_share, rechecks.total())

    @pytest.mark.parametrize("sampler", [copying_example, recheck_example])
    def test_all_characters_weigh_the_same(self, sampler):
        assert {weight for _, sample in draw(sampler, T4, num=500) for weight in sample.weights} == {1.0}
