"""What a step's rollouts are worth, token by token, against loops over plain numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stableopd.advantages import RolloutSignals, corrected_tokens, rollout_signals
from stableopd.config import ObjectiveConfig
from stableopd.scoring import Scores
from stableopd.types import RolloutBatch, TokenScores

SPECIAL, END = 3, 4
"""Ids: a special token in the middle of an answer, and one that ends it."""


class Step:
    """Rollouts of `lengths` tokens, two to a prompt, and what engine, student and teacher say about them."""

    def __init__(self, seed: int, lengths: list[int], *, gap: float = 0.4) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), max(lengths) + 1)  # a column of padding everywhere
        self.mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

        def normal(mean: float, std: float) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean

        def masked(values: Tensor) -> Tensor:
            return values.float().masked_fill(~self.mask, 0.0)

        self.engine = masked(normal(-2, 1))
        self.student = masked(self.engine.double() + normal(0, gap))
        self.entropy = masked(normal(2, 0.5).abs())
        self.teacher = masked(normal(-2, 2))
        self.rewards = torch.randn(len(lengths), generator=generator)
        reasons = ("stop", "length", "loop", "abort")
        self.rollouts = RolloutBatch(
            prompt_ids=torch.ones(len(lengths), 1, dtype=torch.long),
            prompt_mask=torch.ones(len(lengths), 1, dtype=torch.bool),
            completion_ids=torch.randint(6, shape, generator=generator),
            completion_mask=self.mask,
            sampling_logprobs=self.engine,
            finish_reason=tuple(reasons[row % 4] for row in range(len(lengths))),
            prompt_index=tuple(row // 2 for row in range(len(lengths))),
        )

    def signals(self, objective: ObjectiveConfig, **options) -> RolloutSignals:
        return rollout_signals(
            self.rollouts,
            TokenScores(sampled_logprobs=self.teacher, temperature=1.0, model_id=""),
            objective,
            **{
                "rewards": self.rewards if objective.needs_rewards else None,
                "student_scores": Scores(logprobs=self.student, entropy=self.entropy),
                "special_ids": {SPECIAL},
                **options,
            },
        )

    def select(self, rows: list[int]) -> Step:
        part = Step.__new__(Step)
        for name in ("mask", "engine", "student", "entropy", "teacher", "rewards"):
            setattr(part, name, getattr(self, name)[rows])
        part.rollouts = replace(
            self.rollouts,
            finish_reason=tuple(self.rollouts.finish_reason[row] for row in rows),
            prompt_index=tuple(self.rollouts.prompt_index[row] for row in rows),
            **{
                name: getattr(self.rollouts, name)[rows]
                for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "sampling_logprobs")
            },
        )
        return part


STEPS = st.builds(Step, st.integers(0, 9_999), st.lists(st.integers(1, 9), min_size=1, max_size=6))


def naive_rewards(step: Step, scale: str) -> list[float]:
    rewards, groups, found = step.rewards.double().tolist(), step.rollouts.prompt_index, []
    for reward, group in zip(rewards, groups, strict=True):
        mine = [value for value, other in zip(rewards, groups, strict=True) if other == group]
        mean = math.fsum(mine) / len(mine)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in mine) / len(mine))
        found.append((reward - mean) / (std + 1e-6) if scale == "group" else reward - mean)
    return found


def naive_importance(trainer: float, engine: float, objective: ObjectiveConfig) -> float:
    settings = objective.correction
    ratio = math.exp(trainer - engine)
    if settings.kind == "none":
        return 1.0
    if settings.kind == "truncate":
        return min(ratio, settings.cap)
    return ratio if settings.floor <= ratio <= settings.cap else 0.0


def naive_advantages(step: Step, objective: ObjectiveConfig) -> list[list[float]]:
    """log T − log S_old; cut; logarithm; discount; prefix; reward; importance: in this order, number by number."""
    settings = objective.distill.advantage
    rewards = naive_rewards(step, objective.reward.scale)
    found = []
    for row, length in enumerate(step.mask.sum(dim=1).tolist()):
        engine, student, teacher = (
            array[row, :length].double().tolist() for array in (step.engine, step.student, step.teacher)
        )
        old = engine if objective.correction.kind == "none" else student
        values = [t - s for t, s in zip(teacher, old, strict=True)]
        if settings.clamp is not None:
            values = [max(-settings.clamp, min(settings.clamp, a)) for a in values]
        if settings.log_compress:
            values = [math.copysign(math.log(1 + abs(a)), a) for a in values]
        values = [math.fsum(settings.gamma ** (i - t) * values[i] for i in range(t, length)) for t in range(length)]
        total = math.fsum(map(abs, values)) or 1.0
        shares = [math.fsum(map(abs, values[:t])) / total for t in range(length)]
        values = [a * (1 + settings.prefix_gamma * (1 - share)) for a, share in zip(values, shares, strict=True)]
        if objective.needs_rewards and objective.reward.add_to_advantage:
            values = [a + objective.reward.coef / objective.distill.coef * rewards[row] for a in values]
        found.append([a * naive_importance(s, e, objective) for a, s, e in zip(values, student, engine, strict=True)])
    return found


def assert_rows(found: Tensor, expected: list[list[float]]) -> None:
    """Equal where the rows have tokens, and exactly 0 everywhere else."""
    for row, values in zip(found, expected, strict=True):
        assert row[: len(values)].tolist() == pytest.approx(values, rel=1e-4, abs=1e-5)
        assert not row[len(values) :].any()


OBJECTIVES = st.builds(
    ObjectiveConfig,
    distill=st.fixed_dictionaries(
        {
            "coef": st.sampled_from([0.5, 1.0]),
            "estimator": st.sampled_from(["clipped", "reinforce"]),
            "advantage": st.fixed_dictionaries(
                {
                    "clamp": st.sampled_from([None, 0.7, 3.0]),
                    "log_compress": st.booleans(),
                    "gamma": st.sampled_from([0.0, 0.6, 1.0]),
                    "prefix_gamma": st.sampled_from([0.0, 0.5, 2.0]),
                }
            ),
        }
    ),
    reward=st.fixed_dictionaries(
        {
            "coef": st.sampled_from([0.0, 0.3]),
            "scale": st.sampled_from(["group", "none"]),
            "add_to_advantage": st.booleans(),
        }
    ),
    correction=st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["none", "truncate", "mask"]),
            "cap": st.sampled_from([1.0, 1.3]),
            "floor": st.sampled_from([0.0, 0.8]),
        }
    ),
)


@given(step=STEPS, objective=OBJECTIVES)
@settings(max_examples=150, deadline=None)
def test_advantages_are_shaped_in_the_documented_order(step, objective):
    signals = step.signals(objective)
    assert_rows(signals.advantages, naive_advantages(step, objective))


@given(step=STEPS, objective=OBJECTIVES)
@settings(max_examples=60, deadline=None)
def test_reward_advantages_are_the_rollouts_own_at_each_of_its_tokens_times_the_importance(step, objective):
    signals = step.signals(objective)
    rewards = naive_rewards(step, objective.reward.scale)
    expected = []
    for row, length in enumerate(step.mask.sum(dim=1).tolist()):
        reward = rewards[row] if objective.needs_rewards else 0.0
        pairs = zip(step.student[row, :length].tolist(), step.engine[row, :length].tolist(), strict=True)
        expected.append([reward * naive_importance(s, e, objective) for s, e in pairs])
    assert_rows(signals.reward_advantages, expected)


@pytest.mark.parametrize("kind", ["none", "truncate", "mask"])
def test_the_old_policy_is_the_engines_or_where_that_is_corrected_the_students_own(kind):
    step = Step(1, [3, 5])
    signals = step.signals(ObjectiveConfig(correction={"kind": kind}))
    assert torch.equal(signals.old_logprobs, step.engine if kind == "none" else step.student)


@given(step=STEPS, kind=st.sampled_from(["none", "truncate", "mask"]))
def test_corrected_tokens_are_those_whose_ratio_is_outside_the_range(step, kind):
    objective = ObjectiveConfig(correction={"kind": kind, "cap": 1.05, "floor": 0.9})
    found = corrected_tokens(step.student, step.engine, objective.correction)
    ratio = (step.student - step.engine).exp()
    low, high = {"none": (0.0, math.inf), "truncate": (0.0, 1.05), "mask": (0.9, 1.05)}[kind]
    assert torch.equal(found, (ratio < low) | (ratio > high))


def test_a_correction_of_nothing_changes_nothing():
    """Engine and trainer agree: every importance is 1."""
    step = Step(1, [3, 5], gap=0.0)
    plain, corrected = (step.signals(ObjectiveConfig(correction={"kind": kind})) for kind in ("none", "truncate"))
    torch.testing.assert_close(corrected.advantages, plain.advantages)


@pytest.mark.parametrize(
    "distill",
    [
        {"estimator": "k2"},
        {"estimator": "k3"},
        {"divergence": "reverse_kl", "support": "teacher_topk"},
        {"divergence": "jsd"},
    ],
)
def test_losses_without_advantages_get_none_and_the_reward_keeps_its_own(distill):
    step = Step(2, [4, 4, 6])
    signals = step.signals(ObjectiveConfig(distill=distill, reward={"coef": 1.0, "scale": "none"}))
    assert not signals.advantages.any()
    assert_rows(
        signals.reward_advantages, [[a] * n for a, n in zip(naive_rewards(step, "none"), (4, 4, 6), strict=True)]
    )


def test_without_a_teacher_there_is_no_distillation_advantage():
    step = Step(2, [4, 4])
    objective = ObjectiveConfig(distill={"coef": 0.0}, reward={"coef": 1.0})
    signals = rollout_signals(step.rollouts, None, objective, rewards=step.rewards)
    assert not signals.advantages.any()
    assert signals.reward_advantages[:, 0].abs().min() > 0
    assert torch.equal(signals.old_logprobs, step.engine)


# ---------------------------------------------------------------- weights of tokens


def weights(step: Step, **tokens) -> Tensor:
    return step.signals(ObjectiveConfig(distill={"tokens": tokens})).distill_weight


def test_by_default_every_token_counts_and_padding_does_not():
    step = Step(1, [3, 7, 1])
    assert torch.equal(weights(step), step.mask.float())


def test_special_tokens_are_left_out_and_end_tokens_stay():
    step = Step(1, [6])
    ids = torch.tensor([[0, SPECIAL, 1, SPECIAL, SPECIAL, END, 0]])
    step.rollouts = replace(step.rollouts, completion_ids=ids)
    assert weights(step, mask_special=True).tolist() == [[1, 0, 1, 0, 0, 1, 0]]
    assert weights(step).tolist() == [[1, 1, 1, 1, 1, 1, 0]]


def test_tokens_in_a_loop_are_left_out_and_padding_makes_no_loop():
    loop = [0, 1, 2] * 6
    step = Step(1, [len(loop) + 2, 20, 3])
    ids = torch.full_like(step.rollouts.completion_ids, 5)  # a row of padding would be a loop
    ids[0, :20] = torch.tensor([4, *loop, 4])
    ids[1, :20] = torch.arange(20)
    step.rollouts = replace(step.rollouts, completion_ids=ids)
    found = weights(step, mask_repeated=True)
    assert found[0].tolist() == [1] + [0] * len(loop) + [1, 0]
    assert torch.equal(found[1:], step.mask[1:].float())


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_rollouts_that_did_not_end_by_themselves_count_by_their_weight(weight):
    step = Step(1, [2, 2, 2, 2])
    assert step.rollouts.finish_reason == ("stop", "length", "loop", "abort")
    assert weights(step, truncated_weight=weight)[:, 0].tolist() == [1, weight, weight, weight]
    assert not weights(step, truncated_weight=weight)[:, -1].any()


@given(step=STEPS, fraction=st.sampled_from([0.01, 0.2, 0.5, 0.99]))
@settings(max_examples=60, deadline=None)
def test_the_least_certain_tokens_are_kept(step, fraction):
    kept = weights(step, entropy_fraction=fraction) > 0
    number = int(step.mask.sum())
    assert int(kept.sum()) == max(1, math.ceil(round(fraction * number, 6)))
    if (step.mask & ~kept).any():
        assert step.entropy[kept].min() >= step.entropy[step.mask & ~kept].max()
    assert not (kept & ~step.mask).any()


def test_the_fraction_is_of_the_tokens_that_the_masks_leave_and_weights_multiply():
    step = Step(1, [4, 4])
    ids = torch.tensor([[0, SPECIAL, 1, END, 0], [SPECIAL, 0, 1, 2, 0]])
    entropy = torch.tensor([[0.1, 9.0, 0.5, 0.6, 9.0], [9.0, 0.2, 0.9, 0.3, 9.0]])
    step.rollouts, step.entropy = replace(step.rollouts, completion_ids=ids), entropy
    found = weights(step, mask_special=True, entropy_fraction=0.5, truncated_weight=0.25)
    assert found.tolist() == [[0, 0, 1, 1, 0], [0, 0, 0.25, 0, 0]]


@given(
    step=STEPS,
    cut=st.integers(0, 6),
    tokens=st.fixed_dictionaries({"entropy_fraction": st.sampled_from([0.1, 0.4, 0.8]), "mask_special": st.booleans()}),
)
@settings(max_examples=80, deadline=None)
def test_the_choice_of_several_processes_is_that_of_one_that_holds_all_rollouts(step, cut, tokens):
    """A process may hold nothing that the masks leave, or no rollout at all."""
    objective = ObjectiveConfig(distill={"tokens": tokens})
    rows = list(range(len(step.rollouts)))
    parts = [step.select(rows[:cut]), step.select(rows[cut:])]
    sent: list[Tensor] = []
    for part in parts:
        part.signals(objective, gather=lambda array: sent.append(array) or [array])
    found = [
        part.signals(objective, gather=lambda _: sent, rank=rank).distill_weight for rank, part in enumerate(parts)
    ]
    assert torch.equal(torch.cat(found), step.signals(objective).distill_weight)


def test_equal_entropies_are_chosen_alike_by_all_processes():
    """No process takes what another one has been given: exactly the fraction is kept, ties or not."""
    step = Step(1, [4, 4])
    step.entropy = torch.ones_like(step.entropy)
    objective = ObjectiveConfig(distill={"tokens": {"entropy_fraction": 0.5}})
    everyone = [torch.ones(4), torch.ones(4)]
    kept = [
        step.select([rank]).signals(objective, gather=lambda _: everyone, rank=rank).distill_weight.sum().item()
        for rank in (0, 1)
    ]
    assert kept == [4, 0]
