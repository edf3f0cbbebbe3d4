"""Losses against naive references in float64, their gradients, and the properties they promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stableopd import losses

SHAPES = {"num_rows": st.integers(1, 3), "num_tokens": st.integers(1, 4), "vocab": st.integers(2, 7)}
SEEDS = st.integers(0, 10_000)


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def naive_log_softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [value / temperature for value in row]
    top = max(scaled)
    total = math.log(math.fsum(math.exp(value - top) for value in scaled)) + top
    return [value - total for value in scaled]


def naive_reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    result = torch.zeros(student.shape[:-1], dtype=torch.float64)
    for b in range(student.shape[0]):
        for t in range(student.shape[1]):
            log_s = naive_log_softmax(student[b, t].tolist(), temperature)
            log_t = naive_log_softmax(teacher[b, t].tolist(), temperature)
            result[b, t] = math.fsum(math.exp(s) * (s - r) for s, r in zip(log_s, log_t, strict=True))
    return result


@given(seed=SEEDS, temperature=st.sampled_from([0.5, 1.0, 1.7]), **SHAPES)
@settings(max_examples=25, deadline=None)
def test_token_logprobs_equal_the_naive_log_softmax(seed, temperature, num_rows, num_tokens, vocab):
    x = logits(seed, num_rows, num_tokens, vocab)
    ids = torch.randint(vocab, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))
    expected = torch.tensor(
        [
            [naive_log_softmax(x[b, t].tolist(), temperature)[ids[b, t]] for t in range(num_tokens)]
            for b in range(num_rows)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(losses.token_logprobs(x, ids, temperature), expected, rtol=1e-12, atol=1e-12)


@given(seed=SEEDS, temperature=st.sampled_from([0.5, 1.0, 1.7]), **SHAPES)
@settings(max_examples=25, deadline=None)
def test_reverse_kl_is_the_naive_sum_over_the_vocabulary_and_not_negative(
    seed, temperature, num_rows, num_tokens, vocab
):
    student, teacher = logits(seed, num_rows, num_tokens, vocab), logits(seed + 1, num_rows, num_tokens, vocab)
    found = losses.reverse_kl(student, teacher, temperature)
    torch.testing.assert_close(found, naive_reverse_kl(student, teacher, temperature), rtol=1e-10, atol=1e-12)
    assert (found >= -1e-12).all()


@given(seed=SEEDS, temperature=st.sampled_from([0.5, 1.0, 1.7]), **SHAPES)
@settings(max_examples=25, deadline=None)
def test_forward_kl_is_the_naive_sum_weighed_with_the_teacher(seed, temperature, num_rows, num_tokens, vocab):
    student, teacher = logits(seed, num_rows, num_tokens, vocab), logits(seed + 1, num_rows, num_tokens, vocab)
    found = losses.forward_kl(student, teacher, temperature)
    torch.testing.assert_close(found, naive_reverse_kl(teacher, student, temperature), rtol=1e-10, atol=1e-12)


def naive_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    s, t = student.softmax(-1), teacher.softmax(-1)
    m = beta * t + (1 - beta) * s
    return (beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()).sum(-1)


@given(seed=SEEDS, beta=st.floats(0.001, 0.999), **SHAPES)
@settings(max_examples=40, deadline=None)
def test_jsd_is_the_naive_divergence_from_the_mixture(seed, beta, num_rows, num_tokens, vocab):
    student, teacher = logits(seed, num_rows, num_tokens, vocab), logits(seed + 1, num_rows, num_tokens, vocab)
    found = losses.jsd(student, teacher, beta)
    torch.testing.assert_close(found, naive_jsd(student, teacher, beta), rtol=1e-7, atol=1e-12)
    assert (found >= -1e-12).all()
    assert (found <= math.log(2) + 1e-12).all()


def test_jsd_has_no_jump_at_the_ends_of_beta_and_its_slopes_there_are_the_two_divergences():
    student, teacher = logits(1, 1, 2, 5), logits(2, 1, 2, 5)
    for end in (0.0, 1.0):
        assert losses.jsd(student, teacher, end).abs().max() == 0
    near = 1e-7
    torch.testing.assert_close(
        losses.jsd(student, teacher, near) / near, losses.forward_kl(student, teacher), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(
        losses.jsd(student, teacher, 1 - near) / near, losses.reverse_kl(student, teacher), rtol=1e-3, atol=1e-6
    )


def test_jsd_is_finite_with_a_finite_gradient_whatever_is_forbidden():
    student = torch.tensor([[[0.3, -math.inf, 0.1]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[-math.inf, 0.2, 0.4]]], dtype=torch.float64)
    for beta in (0.0, 0.3, 1.0):
        (grad,) = torch.autograd.grad(losses.jsd(student, teacher, beta).sum(), student)
        assert torch.isfinite(losses.jsd(student, teacher, beta)).all()
        assert torch.isfinite(grad).all()
    s, t = [0.5498339973124778, 0.0, 0.4501660026875221], [0.0, 0.4501660026875221, 0.549833997312478]
    m = [0.3 * b + 0.7 * a for a, b in zip(s, t, strict=True)]
    expected = sum(
        (0.3 * b * math.log(b / c) if b else 0.0) + (0.7 * a * math.log(a / c) if a else 0.0)
        for a, b, c in zip(s, t, m, strict=True)
    )
    assert losses.jsd(student, teacher, 0.3).item() == pytest.approx(expected, rel=1e-9)


def test_jsd_has_a_finite_gradient_where_both_forbid_a_token():
    student = torch.tensor([[[0.3, -math.inf, 0.1]]], requires_grad=True)
    teacher = torch.tensor([[[0.5, -math.inf, 0.4]]])
    value = losses.jsd(student, teacher, 0.3)
    torch.testing.assert_close(value, losses.jsd(student[..., [0, 2]], teacher[..., [0, 2]], 0.3))
    value.sum().backward()
    assert torch.isfinite(student.grad).all()


def test_jsd_refuses_a_mixture_that_is_none():
    with pytest.raises(ValueError, match=r"beta is 1\.5"):
        losses.jsd(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 1.5)


@given(seed=SEEDS, k=st.integers(1, 5), num_rows=st.integers(1, 3), num_tokens=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_topk_reverse_kl_is_the_reverse_kl_on_the_set_alone(seed, k, num_rows, num_tokens):
    student, teacher = logits(seed, num_rows, num_tokens, 6), logits(seed + 1, num_rows, num_tokens, 6)
    top = teacher.log_softmax(-1).topk(k, dim=-1)
    found = losses.topk_reverse_kl(student, top.indices, top.values)
    expected = losses.reverse_kl(student.gather(-1, top.indices), teacher.gather(-1, top.indices))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if k == 1:
        assert found.abs().max() == 0


def test_topk_reverse_kl_cannot_be_lowered_by_leaving_the_set():
    student, teacher = logits(3, 1, 1, 6), logits(4, 1, 1, 6)
    top = teacher.log_softmax(-1).topk(3, dim=-1)
    away = student.scatter_add(-1, top.indices, torch.full_like(top.values, -5.0))
    before = losses.topk_reverse_kl(student, top.indices, top.values)
    torch.testing.assert_close(losses.topk_reverse_kl(away, top.indices, top.values), before)


@given(seed=SEEDS, gamma=st.floats(0, 1), num_rows=st.integers(1, 3), width=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_discounted_advantages_are_the_naive_sum_over_what_follows(seed, gamma, num_rows, width):
    advantages = logits(seed, num_rows, width)
    lengths = torch.randint(0, width + 1, (num_rows,), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width) < lengths[:, None]
    expected = torch.zeros_like(advantages)
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            expected[row, t] = sum(gamma ** (i - t) * advantages[row, i].item() for i in range(t, length))
    dirty = advantages.masked_fill(~mask, math.nan)
    torch.testing.assert_close(losses.discounted_advantages(dirty, mask, gamma), expected, rtol=1e-9, atol=1e-9)


def test_a_discount_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="gamma"):
        losses.discounted_advantages(torch.zeros(1, 1), torch.ones(1, 1).bool(), 1.1)


def test_reverse_kl_weighs_with_the_student():
    student = torch.tensor([[[math.log(0.9), math.log(0.1)]]])
    teacher = torch.tensor([[[math.log(0.5), math.log(0.5)]]])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert losses.reverse_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_divergences_of_a_distribution_from_itself_are_zero():
    x = logits(1, 2, 3, 5)
    ids = torch.zeros(2, 3, dtype=torch.long)
    own = losses.token_logprobs(x, ids)
    for divergence in (losses.reverse_kl, losses.forward_kl, losses.jsd):
        assert divergence(x, x).abs().max() < 1e-14
    assert losses.sampled_reverse_kl(own, own).abs().max() == 0
    for kind in ("k1", "k2", "k3"):
        assert losses.kl_estimate(own, own, kind).abs().max() == 0


def test_reverse_kl_and_its_gradient_are_finite_where_both_forbid_a_token():
    student = torch.tensor([[[0.3, -0.2, -math.inf]]], requires_grad=True)
    teacher = torch.tensor([[[0.1, 0.4, -math.inf]]])
    value = losses.reverse_kl(student, teacher)
    expected = losses.reverse_kl(student[..., :2], teacher[..., :2])
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_reverse_kl_is_infinite_where_the_teacher_alone_forbids_a_token():
    assert losses.reverse_kl(torch.zeros(1, 1, 2), torch.tensor([[[0.0, -math.inf]]])).item() == math.inf


def test_reverse_kl_refuses_different_vocabularies():
    with pytest.raises(ValueError, match="common vocabulary"):
        losses.reverse_kl(torch.zeros(1, 1, 3), torch.zeros(1, 1, 4))


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        losses.token_logprobs(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.long), 0.0)


def test_entropy_of_a_uniform_distribution_is_the_log_of_its_size():
    assert losses.token_entropy(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_pass_gradcheck(temperature):
    student = logits(3, 2, 3, 4).requires_grad_()
    teacher = logits(4, 2, 3, 4).requires_grad_()
    ids = torch.tensor([[0, 1, 2], [3, 3, 0]])
    assert torch.autograd.gradcheck(lambda s: losses.token_logprobs(s, ids, temperature), (student,))
    assert torch.autograd.gradcheck(lambda s, t: losses.reverse_kl(s, t, temperature), (student, teacher))
    assert torch.autograd.gradcheck(lambda s, t: losses.forward_kl(s, t, temperature), (student, teacher))
    assert torch.autograd.gradcheck(lambda s, t: losses.jsd(s, t, 0.3, temperature), (student, teacher))
    top = teacher.detach().log_softmax(-1).topk(2, dim=-1)
    assert torch.autograd.gradcheck(
        lambda s: losses.topk_reverse_kl(s, top.indices, top.values, temperature), (student,)
    )
    assert torch.autograd.gradcheck(lambda s: losses.token_entropy(s, temperature), (student,))


def test_clipped_policy_loss_and_estimators_pass_gradcheck():
    new = logits(5, 2, 3).mul(0.05).requires_grad_()
    old, advantages = logits(6, 2, 3).mul(0.05), logits(7, 2, 3)
    assert torch.autograd.gradcheck(lambda x: losses.clipped_policy_loss(x, old, advantages), (new,))
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: losses.kl_estimate(x, old, kind), (new,))


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


def test_the_sampled_reverse_kl_and_k3_average_to_the_exact_divergence():
    student, teacher = logits(8, 1, 1, 5), logits(9, 1, 1, 5)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    exact = losses.reverse_kl(student, teacher).item()
    for value in (losses.sampled_reverse_kl(log_s, log_t), losses.kl_estimate(log_s, log_t, "k3")):
        assert (log_s.exp() * value).sum().item() == pytest.approx(exact, rel=1e-9)


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


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2, k3"):
        losses.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_masked_tokens_are_never_read_not_even_their_gradient():
    values = torch.tensor([[1.0, math.nan], [math.inf, 4.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, True]])
    total = losses.reduce_tokens(values, mask, 2.0)
    total.backward()
    assert total.item() == 2.5
    assert values.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]


def test_an_empty_mask_gives_zero():
    assert losses.reduce_tokens(torch.full((2, 3), math.nan), torch.zeros(2, 3), 5.0).item() == 0.0


@pytest.mark.parametrize("denominator", [0.0, -1.0, math.nan])
def test_a_denominator_that_is_not_positive_is_refused(denominator):
    with pytest.raises(ValueError, match="denominator"):
        losses.reduce_tokens(torch.ones(1, 1), torch.ones(1, 1), denominator)


@given(seed=SEEDS, num_rows=st.integers(2, 6), cut=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_any_split_of_the_rows_adds_up_to_the_whole(seed, num_rows, cut):
    values = logits(seed, num_rows, 4)
    weights = logits(seed + 1, num_rows, 4).abs()
    total = weights.sum().item()
    cut = min(cut, num_rows - 1)
    parts = [losses.reduce_tokens(v, w, total) for v, w in zip(values.split(cut), weights.split(cut), strict=True)]
    torch.testing.assert_close(sum(parts), losses.reduce_tokens(values, weights, total))


def test_bfloat16_logits_are_summed_in_float32():
    x = logits(12, 2, 3, 500).bfloat16()
    ids = torch.zeros(2, 3, dtype=torch.long)
    found = losses.token_logprobs(x, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), losses.token_logprobs(x.double(), ids), rtol=1e-5, atol=1e-5)
