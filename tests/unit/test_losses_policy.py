"""Losses of the sampled token: published formulas, and which divergence's gradient they have in expectation."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_losses import logits

from stableopd import losses

KINDS = get_args(losses.KlEstimator)
LOGPROB, ADVANTAGE = st.floats(-5, 0), st.floats(-3, 3)
every_kind = pytest.mark.parametrize("kind", KINDS)


def column(*values):
    return [torch.tensor([[value]], dtype=torch.float64) for value in values]


def expected_gradient(token_loss, student):
    """Gradient of Σ_y S(y) · loss(y), S constant: what the loss of a token drawn from S has in expectation."""
    log_s = student.log_softmax(-1)
    (gradient,) = torch.autograd.grad((log_s.detach().exp() * token_loss(log_s)).sum(), student)
    return gradient


def exact_gradients(student, other):
    """Gradients of KL(student ‖ other) and of KL(other ‖ student)."""
    divergences = losses.reverse_kl(student, other).sum(), losses.forward_kl(student, other).sum()
    return [torch.autograd.grad(divergence, student)[0] for divergence in divergences]


def test_clipped_policy_loss_and_estimators_pass_gradcheck():
    new = logits(5, 2, 3).mul(0.05).requires_grad_()
    old, advantages = logits(6, 2, 3).mul(0.05), logits(7, 2, 3)
    assert torch.autograd.gradcheck(lambda x: losses.clipped_policy_loss(x, old, advantages), (new,))
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: losses.kl_estimate(x, old, kind), (new,))
    assert torch.autograd.gradcheck(lambda x: losses.sampled_reverse_kl(x, old), (new,))
    assert torch.autograd.gradcheck(lambda x: losses.kl_penalty(x, old, "k2"), (new,))
    ratio = logits(8, 2, 3).mul(0.2)  # held fixed: the weight is a constant of the loss
    assert torch.autograd.gradcheck(lambda x: losses.reinforce_loss(x, x.detach() - ratio, advantages), (new,))


@given(
    new=st.floats(-5, 0), old=st.floats(-5, 0), advantage=st.floats(-3, 3), low=st.floats(0.05, 0.5),
    high=st.floats(0.05, 0.5),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_clipped_policy_loss_is_the_published_formula(new, old, advantage, low, high):
    ratio = math.exp(new - old)
    expected = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    arguments = [torch.tensor([[value]], dtype=torch.float64) for value in (new, old, advantage)]
    assert losses.clipped_policy_loss(*arguments, low, high).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.2), (0.2, -0.1), (math.nan, 0.2), (0.2, math.nan)])
def test_a_clip_that_does_not_hold_the_unchanged_policy_is_refused(low, high):
    with pytest.raises(ValueError, match="must hold 1, so give numbers from 0 on"):
        losses.clipped_policy_loss(*column(-1.0, -1.0, 1.0), low, high)


def test_policy_gradient_on_policy_is_minus_advantage_times_score():
    new = torch.full((1, 3), -1.0, requires_grad=True)
    advantages = torch.tensor([[0.5, -2.0, 0.0]])
    losses.clipped_policy_loss(new, new.detach(), advantages).sum().backward()
    torch.testing.assert_close(new.grad, -advantages)


def test_clipping_stops_the_gradient_only_on_the_side_that_would_overshoot():
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.5, 0.5, -0.5, -0.5]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    losses.clipped_policy_loss(new, old, advantages).sum().backward()
    assert (new.grad != 0).tolist() == [[False, True, True, False]]


def test_a_huge_ratio_does_not_overflow():
    value = losses.clipped_policy_loss(torch.tensor([[0.0]]), torch.tensor([[-500.0]]), torch.tensor([[-1.0]]))
    assert torch.isfinite(value).all()


@pytest.mark.parametrize("loss", [losses.clipped_policy_loss, losses.reinforce_loss])
def test_the_tokens_own_advantages_and_old_policy_are_constants(loss):
    new, old, advantages = (logits(seed, 1, 3).mul(0.1).requires_grad_() for seed in (1, 2, 3))
    of_new, of_old, of_advantages = torch.autograd.grad(
        loss(new, old, advantages).sum(), (new, old, advantages), allow_unused=True
    )
    assert of_new.abs().max() > 0
    assert of_old is None
    assert of_advantages is None


@given(new=LOGPROB, old=LOGPROB, advantage=ADVANTAGE, low=st.floats(0, 1), high=st.floats(1, 4))
@settings(max_examples=200, deadline=None)
def test_reinforce_loss_is_the_gated_formula_and_so_is_its_gradient(new, old, advantage, low, high):
    ratio = math.exp(new - old)
    weight = ratio if low <= ratio <= high else 0.0
    x, y, a = column(new, old, advantage)
    x.requires_grad_()
    value = losses.reinforce_loss(x, y, a, low, high)
    assert value.item() == pytest.approx(-weight * advantage * new, rel=1e-9, abs=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert gradient.item() == pytest.approx(-weight * advantage, rel=1e-9, abs=1e-12)


def test_the_gate_leaves_a_token_out_on_both_sides_and_whatever_its_advantage():
    ratio = torch.tensor([[0.4, 0.5, 1.0, 2.0, 2.1]], dtype=torch.float64)
    for sign in (1.0, -1.0):
        new = ratio.log().requires_grad_()
        losses.reinforce_loss(new, torch.zeros(1, 5), torch.full((1, 5), sign), 0.49, 2.01).sum().backward()
        torch.testing.assert_close(new.grad, -sign * ratio * torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]))


def test_a_token_that_the_policy_no_longer_allows_is_left_out_without_a_trace():
    new = torch.tensor([[-math.inf, -1.0]], requires_grad=True)
    value = losses.reinforce_loss(new, torch.tensor([[-2.0, -1.0]]), torch.tensor([[1.0, 1.0]]))
    assert value.tolist() == [[0.0, 1.0]]
    value.sum().backward()
    assert new.grad.tolist() == [[0.0, -1.0]]


def test_a_log_probability_that_is_no_number_is_not_taken_for_a_token_outside_the_gate():
    broken, fine, one = torch.tensor([[math.nan]]), torch.tensor([[-1.0]]), torch.ones(1, 1)
    assert losses.reinforce_loss(broken, fine, one).isnan().all()
    assert losses.importance_weights(broken, fine, "mask").isnan().all()
    assert losses.importance_weights(broken, fine, "truncate").isnan().all()


@pytest.mark.parametrize(("low", "high"), [(-0.1, 2.0), (1.1, 2.0), (0.5, 0.9), (math.nan, 2.0), (0.5, math.nan)])
def test_a_gate_that_leaves_out_an_unchanged_policy_is_refused(low, high):
    with pytest.raises(ValueError, match="gate_low <= 1 <= gate_high"):
        losses.reinforce_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), low, high)


def test_an_open_gate_keeps_every_token_and_does_not_overflow():
    new = torch.tensor([[0.0, -500.0]], requires_grad=True)
    value = losses.reinforce_loss(new, torch.tensor([[-500.0, 0.0]]), torch.ones(1, 2), 0.0, math.inf)
    (gradient,) = torch.autograd.grad(value.sum(), new)
    assert torch.isfinite(gradient).all()
    assert (gradient < 0).all()


def test_the_policy_losses_of_the_teachers_advantage_have_the_gradient_of_reverse_kl_in_expectation():
    student, teacher = logits(12, 1, 1, 6).requires_grad_(), logits(13, 1, 1, 6)
    reverse, forward = exact_gradients(student, teacher)
    log_old, log_t = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    advantages = -losses.sampled_reverse_kl(log_old, log_t)
    for loss in (losses.clipped_policy_loss, losses.reinforce_loss):
        found = expected_gradient(lambda log_s, loss=loss: loss(log_s, log_old, advantages), student)
        torch.testing.assert_close(found, reverse, rtol=1e-9, atol=1e-12)
        assert (found - forward).abs().max() > 1e-2


def test_an_advantage_that_is_the_same_for_all_tokens_has_no_gradient_in_expectation():
    """A detached divergence over a set as the advantage of the sampled token is such a one: it teaches nothing."""
    student, teacher = logits(14, 1, 1, 6).requires_grad_(), logits(15, 1, 1, 6)
    log_old = student.detach().log_softmax(-1)
    advantage = -losses.topk_divergence(student, teacher, 3).detach()[..., None].expand(1, 1, 6)
    assert advantage.abs().min() > 1e-2
    found = expected_gradient(lambda log_s: losses.reinforce_loss(log_s, log_old, advantage), student)
    assert found.abs().max() < 1e-12


def test_the_sampled_reverse_kl_and_k3_average_to_the_exact_divergence():
    student, teacher = logits(8, 1, 1, 5), logits(9, 1, 1, 5)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    exact = losses.reverse_kl(student, teacher).item()
    for value in (losses.sampled_reverse_kl(log_s, log_t), losses.kl_estimate(log_s, log_t, "k3")):
        assert (log_s.exp() * value).sum().item() == pytest.approx(exact, rel=1e-9)


@given(new=LOGPROB, reference=LOGPROB)
@settings(max_examples=100, deadline=None)
def test_the_estimators_are_the_published_formulas(new, reference):
    d = new - reference
    expected = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}
    for kind, value in expected.items():
        found = losses.kl_estimate(*column(new, reference), kind).item()
        assert found == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert losses.kl_estimate(*column(new, reference), "k3").item() >= 0


def test_a_huge_difference_does_not_overflow_k3():
    assert torch.isfinite(losses.kl_estimate(torch.tensor([-500.0]), torch.tensor([0.0]), "k3")).all()


def test_the_gradient_of_k1_itself_is_zero_in_expectation():
    student, reference = logits(16, 1, 1, 6).requires_grad_(), logits(17, 1, 1, 6)
    log_r = reference.log_softmax(-1)
    found = expected_gradient(lambda log_s: losses.kl_estimate(log_s, log_r, "k1"), student)
    assert found.abs().max() < 1e-14
    assert exact_gradients(student, reference)[0].abs().max() > 1e-2


def test_the_gradient_of_k3_itself_is_that_of_the_other_direction():
    student, reference = logits(18, 1, 1, 6).requires_grad_(), logits(19, 1, 1, 6)
    log_r = reference.log_softmax(-1)
    reverse, forward = exact_gradients(student, reference)
    found = expected_gradient(lambda log_s: losses.kl_estimate(log_s, log_r, "k3"), student)
    torch.testing.assert_close(found, forward, rtol=1e-9, atol=1e-12)
    assert (found - reverse).abs().max() > 1e-2


def test_the_expected_gradient_of_the_penalty_is_that_of_the_exact_divergence():
    student = logits(10, 1, 1, 6).requires_grad_()
    reference = logits(11, 1, 1, 6)
    (exact,) = torch.autograd.grad(losses.reverse_kl(student, reference).sum(), student)
    log_s, log_r = student.log_softmax(-1), reference.log_softmax(-1)
    expected_penalty = (log_s.detach().exp() * losses.kl_penalty(log_s, log_r)).sum()
    (sampled,) = torch.autograd.grad(expected_penalty, student)
    torch.testing.assert_close(sampled, exact, rtol=1e-9, atol=1e-12)
    log_s = student.log_softmax(-1)
    k3 = (log_s.detach().exp() * losses.kl_estimate(log_s, log_r, "k3")).sum()
    (naive,) = torch.autograd.grad(k3, student)
    assert (naive - exact).abs().max() > 1e-3, "the plain gradient of k3 is another divergence's"


@every_kind
def test_every_penalty_has_the_value_of_its_estimate_and_the_gradient_of_k2(kind):
    new, reference = logits(20, 3, 4).requires_grad_(), logits(21, 3, 4)
    value = losses.kl_penalty(new, reference, kind)
    assert torch.equal(value, losses.kl_estimate(new, reference, kind))
    (gradient,) = torch.autograd.grad(value.sum(), new)
    (of_k2,) = torch.autograd.grad(losses.kl_estimate(new, reference, "k2").sum(), new)
    torch.testing.assert_close(gradient, of_k2)


@every_kind
def test_the_expected_gradient_of_every_penalty_is_that_of_reverse_kl(kind):
    student, reference = logits(22, 1, 1, 6).requires_grad_(), logits(23, 1, 1, 6)
    log_r = reference.log_softmax(-1)
    found = expected_gradient(lambda log_s: losses.kl_penalty(log_s, log_r, kind), student)
    torch.testing.assert_close(found, exact_gradients(student, reference)[0], rtol=1e-9, atol=1e-12)


@every_kind
def test_the_reference_of_a_penalty_is_a_constant(kind):
    new, reference = logits(24, 1, 3).requires_grad_(), logits(25, 1, 3).requires_grad_()
    of_new, of_reference = torch.autograd.grad(
        losses.kl_penalty(new, reference, kind).sum(), (new, reference), allow_unused=True
    )
    assert of_new.abs().max() > 0
    assert of_reference is None


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2, k3"):
        losses.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2, k3"):
        losses.kl_penalty(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


@given(trainer=LOGPROB, engine=LOGPROB, cap=st.floats(1, 5), floor=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_importance_weights_are_the_ratio_cut_or_left_out(trainer, engine, cap, floor):
    ratio = math.exp(trainer - engine)
    pair = column(trainer, engine)
    truncated = losses.importance_weights(*pair, "truncate", cap, floor)
    assert truncated.item() == pytest.approx(min(ratio, cap), rel=1e-9)
    masked = losses.importance_weights(*pair, "mask", cap, floor)
    assert masked.item() == pytest.approx(ratio if floor <= ratio <= cap else 0.0, rel=1e-9)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_engines_that_agree_have_weight_one_and_weights_carry_no_gradient(kind):
    trainer = logits(26, 2, 3).requires_grad_()
    weights = losses.importance_weights(trainer, trainer, kind)
    assert not weights.requires_grad
    assert (weights == 1).all()


def test_uncut_importance_weights_turn_the_engines_average_into_the_trainers():
    log_trainer, log_engine = logits(27, 6).log_softmax(-1), logits(28, 6).log_softmax(-1)
    value = logits(29, 6)
    weights = losses.importance_weights(log_trainer, log_engine, cap=math.inf)
    corrected = (log_engine.exp() * weights * value).sum()
    torch.testing.assert_close(corrected, (log_trainer.exp() * value).sum())
    assert (corrected - (log_engine.exp() * value).sum()).abs() > 1e-2


def test_importance_weights_do_not_overflow():
    trainer, engine = torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]])
    assert torch.isfinite(losses.importance_weights(trainer, engine, cap=math.inf)).all()
    assert losses.importance_weights(trainer, engine, "mask", 2.0, 0.5).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("cap", "floor"), [(0.9, 0.0), (math.nan, 0.0), (2.0, -0.1), (2.0, 1.1), (2.0, math.nan)])
def test_bounds_that_would_change_engines_that_agree_are_refused(cap, floor):
    with pytest.raises(ValueError, match="floor <= 1 <= cap"):
        losses.importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), "truncate", cap, floor)


def test_an_unknown_correction_is_named():
    with pytest.raises(ValueError, match=r"'clip'.*truncate, mask"):
        losses.importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), "clip")  # type: ignore[arg-type]
