"""An objective becomes terms: which are active, what each token weighs, which kind of loss each is.

That the terms then have the values and gradients of the pure losses is in tests/invariant/test_update.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stableopd.config import ObjectiveConfig
from stableopd.fused import DivergenceTerm, SampledTerm, SupportTerm
from stableopd.rows import TrainingRows
from stableopd.terms import (
    REFERENCE,
    TEACHER,
    coefficients,
    gold_terms,
    rollout_figures,
    rollout_terms,
    token_weights,
    weighted,
)

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")
LENGTHS = (4, 2, 3, 5)
"""Three rollouts and one golden solution."""


def rows(seed: int = 0) -> TrainingRows:
    generator = torch.Generator().manual_seed(seed)
    width = max(LENGTHS) + 1
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    gold = torch.tensor([False, False, False, True])[:, None]

    def values(kind: Tensor) -> Tensor:
        return (torch.rand(mask.shape, generator=generator) * mask * kind).float()

    rollout = mask & ~gold
    return TrainingRows(
        prompt_ids=torch.ones(4, 1, dtype=torch.long),
        prompt_mask=torch.ones(4, 1, dtype=torch.bool),
        completion_ids=torch.randint(9, mask.shape, generator=generator),
        completion_mask=mask,
        old_logprobs=-values(rollout),
        teacher_logprobs=-values(rollout),
        advantages=values(rollout) - 0.5,
        reward_advantages=values(rollout) - 0.5,
        distill_weight=rollout * torch.randint(3, mask.shape, generator=generator) / 2,
        reward_weight=rollout.float(),
        reference_weight=rollout.float(),
        gold_weight=values(gold),
        index=torch.tensor([0, 1, 2, -1]),
        group=(0, 0, 1, 1),
        topk_ids=torch.randint(9, (*mask.shape, 3), generator=generator),
        topk_logprobs=torch.rand(*mask.shape, 3, generator=generator),
    )


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({}, {"distill": 1.0}),
        ({"distill": {"coef": 0.0}, "gold": {"coef": 2.0}}, {"gold": 2.0}),
        ({"reward": {"coef": 0.5}}, {"distill": 1.0, "reward": 0.5}),
        ({"reward": {"coef": 0.5, "add_to_advantage": True}}, {"distill": 1.0}),
        ({"reference": {"coef": 0.1}, "gold": {"coef": 1.0}}, {"distill": 1.0, "reference": 0.1, "gold": 1.0}),
    ],
)
def test_only_terms_with_a_coefficient_are_active_and_an_added_reward_is_no_term(objective, expected):
    config = ObjectiveConfig(**objective)
    assert coefficients(config) == expected
    assert set(token_weights(rows(), config, 7)) == set(expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_what_a_weight_is_beyond_one_multiplies_the_loss_and_leaves_the_denominator_alone(aggregation):
    config = ObjectiveConfig(aggregation=aggregation)
    data = rows()
    ones = replace(data, distill_weight=(data.distill_weight > 0).float())
    weight, share = token_weights(data, config, 7)["distill"]
    counted, same = token_weights(ones, config, 7)["distill"]
    assert share == same > 0
    torch.testing.assert_close(weight, counted * data.distill_weight)
    per_row = counted.sum(dim=1)[:3]
    tokens = ones.distill_weight.sum(dim=1)[:3]
    assert (tokens > 0).all()
    expected = {"token_mean": tokens, "sequence_mean": torch.ones(3), "sequence_sum": tokens}[aggregation]
    torch.testing.assert_close(per_row, expected)
    assert share == {"token_mean": float(tokens.sum()), "sequence_mean": 3.0, "sequence_sum": 21.0}[aggregation]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gold_is_the_mean_over_its_weights_whatever_the_aggregation_of_the_rollouts(aggregation):
    config = ObjectiveConfig(gold={"coef": 1.0}, aggregation=aggregation)
    weight, share = token_weights(rows(), config, 7)["gold"]
    assert torch.equal(weight, rows().gold_weight)
    assert share == pytest.approx(float(rows().gold_weight.sum()))


@given(cut=st.integers(0, 4), aggregation=st.sampled_from(AGGREGATIONS), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_split_of_the_rows_has_the_same_weights_and_shares_that_add_up(cut, aggregation, seed):
    config = ObjectiveConfig(gold={"coef": 1.0}, reference={"coef": 1.0}, aggregation=aggregation)
    data = rows(seed)
    whole = token_weights(data, config, 7)
    parts = [token_weights(data.select(part), config, 7) for part in (range(cut), range(cut, 4))]
    for name, (weight, share) in whole.items():
        assert sum(part[name][1] for part in parts) == pytest.approx(share)
        pieces = [part[name][0] for part in parts]
        padded = [torch.nn.functional.pad(piece, (0, weight.shape[1] - piece.shape[1])) for piece in pieces]
        torch.testing.assert_close(torch.cat(padded), weight)


def test_final_weights_are_coefficient_times_weight_over_the_denominator_of_all_processes():
    config = ObjectiveConfig(distill={"coef": 0.5}, gold={"coef": 2.0})
    data = rows()
    weights = token_weights(data, config, 7)
    final = weighted(data, weights, {"distill": 10.0, "gold": 0.0}, coefficients(config))
    torch.testing.assert_close(final.distill_weight, data.distill_weight * 0.05)
    assert not final.gold_weight.any(), "nothing to divide by"
    assert torch.equal(final.reference_weight, data.reference_weight), "an inactive term is left alone"


VOCABULARY = ("reverse_kl", "forward_kl", "jsd", "mixed_kl")


def the_term(**distill):
    (term,) = rollout_terms(rows().select(range(3)), ObjectiveConfig(distill=distill))
    return term


@pytest.mark.parametrize("divergence", VOCABULARY)
def test_a_divergence_over_the_vocabulary_is_one_from_the_teachers_distribution(divergence):
    term = the_term(divergence=divergence, beta=0.2, forward_weight=0.9)
    assert isinstance(term, DivergenceTerm)
    assert (term.other, term.divergence, term.beta, term.forward_weight) == (TEACHER, divergence, 0.2, 0.9)


@pytest.mark.parametrize("divergence", VOCABULARY)
@pytest.mark.parametrize("support", ["student_topk", "intersection", "union", "symmetric_difference"])
def test_a_divergence_on_a_set_knows_its_kind_its_size_and_its_tail(divergence, support):
    term = the_term(divergence=divergence, support=support, topk=4, tail="bucket", beta=0.2, forward_weight=0.9)
    assert isinstance(term, SupportTerm)
    assert (term.other, term.kind, term.k, term.tail) == (TEACHER, support, 4, "bucket")
    assert (term.divergence, term.beta, term.forward_weight) == (divergence, 0.2, 0.9)
    assert term.ids is None


def test_the_teachers_own_topk_is_taken_from_its_scores():
    term = the_term(divergence="reverse_kl", support="teacher_topk")
    data = rows().select(range(3))
    assert (term.other, term.tail) == ("", "renormalise")
    assert torch.equal(term.ids, data.topk_ids[data.completion_mask])
    assert torch.equal(term.logprobs, data.topk_logprobs[data.completion_mask])


@pytest.mark.parametrize("estimator", ["exact", "k1", "k2", "k3"])
def test_the_reference_term_looks_at_the_reference_alone(estimator):
    config = ObjectiveConfig(distill={"coef": 0.0}, reference={"coef": 1.0, "estimator": estimator})
    (term,) = rollout_terms(rows().select(range(3)), config)
    assert isinstance(term, DivergenceTerm if estimator == "exact" else SampledTerm)
    assert (term.name, term.other) == ("reference", REFERENCE)


def test_terms_see_completion_tokens_row_after_row_without_padding():
    data = rows().select(range(3))
    config = ObjectiveConfig(reward={"coef": 1.0}, reference={"coef": 1.0})
    terms = {term.name: term for term in rollout_terms(data, config)}
    assert list(terms) == ["distill", "reward", "reference"]
    assert torch.equal(
        terms["distill"].weight, torch.cat([data.distill_weight[i, :n] for i, n in enumerate((4, 2, 3))])
    )
    at = slice(3, 6)  # a chunk that straddles rows
    logprobs = torch.zeros(3)
    old = data.old_logprobs[data.completion_mask][at]
    advantages = data.reward_advantages[data.completion_mask][at]
    ratio = (logprobs - old).exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    torch.testing.assert_close(terms["reward"].loss(logprobs, at, None), expected)


def test_the_gold_term_is_the_likelihood_weighed_by_the_golden_weights():
    data = rows().select([3])
    (term,) = gold_terms(data)
    assert torch.equal(term.weight, data.gold_weight[0, : LENGTHS[3]])
    assert term.loss(torch.tensor([-1.0, -2.0]), slice(0, 2), None).tolist() == [1.0, 2.0]


def test_figures_are_the_gap_to_the_old_policy_and_the_share_outside_the_clip():
    data = rows().select([0])
    ratio = torch.tensor([0.5, 0.95, 1.1, 1.5])
    logprobs = data.old_logprobs[0, :4] + ratio.log()
    settings = ObjectiveConfig(distill={"epsilon_low": 0.1, "epsilon_high": 0.2}).distill
    figures = rollout_figures(data, logprobs, torch.arange(4.0), settings)
    assert figures["clip_ratio/region_mean"].tolist() == [1, 0, 0, 1]
    torch.testing.assert_close(figures["sampling/logprob_gap"], ratio.log().abs())
    assert figures["entropy"].tolist() == [0, 1, 2, 3]
