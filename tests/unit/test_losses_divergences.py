"""Divergences over the vocabulary against naive references in float64, their gradients, and what they promise."""

from __future__ import annotations

import math

import naive_losses as naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_losses import SEEDS, SHAPES, at_each_position, logits

from stableopd import losses

TEMPERATURES = st.sampled_from([0.5, 1.0, 1.7])
DIVERGENCES = {
    "reverse_kl": losses.reverse_kl,
    "forward_kl": losses.forward_kl,
    "jsd": lambda s, t, temperature=1.0: losses.jsd(s, t, 0.3, temperature),
    "mixed_kl": lambda s, t, temperature=1.0: losses.mixed_kl(s, t, 0.3, temperature),
}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def naive_reverse_kl(student, teacher, temperature=1.0):
    return at_each_position(
        lambda s, t: naive.kl(naive.log_softmax(s, temperature), naive.log_softmax(t, temperature)), student, teacher
    )


def naive_jsd(student, teacher, beta):
    return at_each_position(
        lambda s, t: naive.jensen_shannon(naive.log_softmax(s), naive.log_softmax(t), beta), student, teacher
    )


@given(seed=SEEDS, temperature=TEMPERATURES, **SHAPES)
@settings(max_examples=25, deadline=None)
def test_token_logprobs_equal_the_naive_log_softmax(seed, temperature, num_rows, num_tokens, vocab):
    x = logits(seed, num_rows, num_tokens, vocab)
    ids = torch.randint(vocab, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))
    expected = torch.tensor(
        [
            [naive.log_softmax(x[b, t].tolist(), temperature)[ids[b, t]] for t in range(num_tokens)]
            for b in range(num_rows)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(losses.token_logprobs(x, ids, temperature), expected, rtol=1e-12, atol=1e-12)


@given(seed=SEEDS, temperature=TEMPERATURES, **SHAPES)
@settings(max_examples=25, deadline=None)
def test_token_entropy_is_the_naive_sum(seed, temperature, num_rows, num_tokens, vocab):
    x = logits(seed, num_rows, num_tokens, vocab)

    def entropy(row):
        return -math.fsum(math.exp(value) * value for value in naive.log_softmax(row, temperature))

    torch.testing.assert_close(
        losses.token_entropy(x, temperature), at_each_position(entropy, x), rtol=1e-10, atol=1e-12
    )


@given(seed=SEEDS, temperature=TEMPERATURES, **SHAPES)
@settings(max_examples=25, deadline=None)
def test_reverse_kl_is_the_naive_sum_over_the_vocabulary_and_not_negative(
    seed, temperature, num_rows, num_tokens, vocab
):
    student, teacher = logits(seed, num_rows, num_tokens, vocab), logits(seed + 1, num_rows, num_tokens, vocab)
    found = losses.reverse_kl(student, teacher, temperature)
    torch.testing.assert_close(found, naive_reverse_kl(student, teacher, temperature), rtol=1e-10, atol=1e-12)
    assert (found >= -1e-12).all()


@given(seed=SEEDS, temperature=TEMPERATURES, **SHAPES)
@settings(max_examples=25, deadline=None)
def test_forward_kl_is_the_naive_sum_weighed_with_the_teacher(seed, temperature, num_rows, num_tokens, vocab):
    student, teacher = logits(seed, num_rows, num_tokens, vocab), logits(seed + 1, num_rows, num_tokens, vocab)
    found = losses.forward_kl(student, teacher, temperature)
    torch.testing.assert_close(found, naive_reverse_kl(teacher, student, temperature), rtol=1e-10, atol=1e-12)


@given(seed=SEEDS, weight=st.floats(0, 1), temperature=TEMPERATURES, **SHAPES)
@settings(max_examples=25, deadline=None)
def test_mixed_kl_weighs_the_forward_direction_with_w(seed, weight, temperature, num_rows, num_tokens, vocab):
    student, teacher = logits(seed, num_rows, num_tokens, vocab), logits(seed + 1, num_rows, num_tokens, vocab)
    found = losses.mixed_kl(student, teacher, weight, temperature)
    forward, reverse = (naive_reverse_kl(*pair, temperature) for pair in ((teacher, student), (student, teacher)))
    torch.testing.assert_close(found, weight * forward + (1 - weight) * reverse, rtol=1e-10, atol=1e-12)


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


def test_jsd_with_its_sides_and_its_beta_exchanged_is_the_same():
    student, teacher = logits(1, 2, 2, 5), logits(2, 2, 2, 5)
    torch.testing.assert_close(losses.jsd(student, teacher, 0.2), losses.jsd(teacher, student, 0.8))
    assert (losses.jsd(student, teacher, 0.2) - losses.jsd(teacher, student, 0.2)).abs().max() > 1e-2


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


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_mixed_kl_refuses_a_weight_that_is_no_share(weight):
    with pytest.raises(ValueError, match="forward_weight"):
        losses.mixed_kl(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), weight)


def test_mixed_kl_at_its_ends_is_one_direction_even_where_the_other_is_infinite():
    student, teacher = logits(3, 1, 2, 5), logits(4, 1, 2, 5)
    teacher[..., 0] = -math.inf
    assert torch.equal(losses.mixed_kl(student, teacher, 1.0), losses.forward_kl(student, teacher))
    assert torch.isfinite(losses.mixed_kl(student, teacher, 1.0)).all()
    assert torch.equal(losses.mixed_kl(teacher, student, 0.0), losses.reverse_kl(teacher, student))
    assert torch.isfinite(losses.mixed_kl(teacher, student, 0.0)).all()
    assert losses.mixed_kl(student, teacher, 0.5).isposinf().all()


def test_reverse_kl_weighs_with_the_student():
    student = torch.tensor([[[math.log(0.9), math.log(0.1)]]])
    teacher = torch.tensor([[[math.log(0.5), math.log(0.5)]]])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert losses.reverse_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_forward_kl_weighs_with_the_teacher():
    student = torch.tensor([[[math.log(0.9), math.log(0.1)]]])
    teacher = torch.tensor([[[math.log(0.5), math.log(0.5)]]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert losses.forward_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_divergences_of_a_distribution_from_itself_are_zero():
    x = logits(1, 2, 3, 5)
    ids = torch.zeros(2, 3, dtype=torch.long)
    own = losses.token_logprobs(x, ids)
    for divergence in (losses.reverse_kl, losses.forward_kl, losses.jsd, losses.mixed_kl):
        assert divergence(x, x).abs().max() < 1e-14
    assert losses.sampled_reverse_kl(own, own).abs().max() == 0
    for kind in ("k1", "k2", "k3"):
        assert losses.kl_estimate(own, own, kind).abs().max() == 0


@every_divergence
def test_the_gradient_at_the_teacher_itself_is_zero(divergence):
    teacher = logits(5, 2, 3, 6)
    student = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(student, teacher).sum(), student)
    assert gradient.abs().max() < 1e-14


@every_divergence
@given(seed=SEEDS, shift=st.floats(-50, 50))
@settings(max_examples=15, deadline=None)
def test_a_constant_added_to_all_logits_and_the_order_of_the_vocabulary_change_nothing(divergence, seed, shift):
    student, teacher = logits(seed, 1, 2, 6), logits(seed + 1, 1, 2, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    moved = divergence((student + shift)[..., order], (teacher - shift)[..., order])
    torch.testing.assert_close(moved, divergence(student, teacher), rtol=1e-9, atol=1e-11)


def test_the_gradient_of_forward_kl_is_the_difference_of_the_probabilities():
    student, teacher = logits(6, 2, 2, 5).requires_grad_(), logits(7, 2, 2, 5)
    (gradient,) = torch.autograd.grad(losses.forward_kl(student, teacher, 0.7).sum(), student)
    expected = ((student / 0.7).softmax(-1) - (teacher / 0.7).softmax(-1)) / 0.7
    torch.testing.assert_close(gradient, expected.detach())


def test_reverse_kl_and_its_gradient_are_finite_where_both_forbid_a_token():
    student = torch.tensor([[[0.3, -0.2, -math.inf]]], requires_grad=True)
    teacher = torch.tensor([[[0.1, 0.4, -math.inf]]])
    value = losses.reverse_kl(student, teacher)
    expected = losses.reverse_kl(student[..., :2], teacher[..., :2])
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@every_divergence
def test_a_token_that_both_forbid_is_as_if_it_were_not_there(divergence):
    student, teacher = logits(8, 2, 2, 5), logits(9, 2, 2, 5)
    never = torch.full((2, 2, 1), -math.inf, dtype=torch.float64)
    wide = torch.cat([student, never], dim=-1).requires_grad_()
    value = divergence(wide, torch.cat([teacher, never], dim=-1))
    torch.testing.assert_close(value, divergence(student, teacher))
    (gradient,) = torch.autograd.grad(value.sum(), wide)
    narrow = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(divergence(narrow, teacher).sum(), narrow)
    torch.testing.assert_close(gradient, torch.cat([expected, torch.zeros_like(never)], dim=-1))


@every_divergence
def test_a_model_that_broke_is_not_taken_for_one_that_agrees(divergence):
    broken, fine = torch.tensor([[0.1, math.nan, 0.3]]), torch.zeros(1, 3)
    assert divergence(broken, fine).isnan().all()
    assert divergence(fine, broken).isnan().all()
    assert losses.token_entropy(broken).isnan().all()


def test_reverse_kl_is_infinite_where_the_teacher_alone_forbids_a_token():
    assert losses.reverse_kl(torch.zeros(1, 1, 2), torch.tensor([[[0.0, -math.inf]]])).item() == math.inf


def test_forward_kl_is_infinite_where_the_student_alone_forbids_a_token_and_finite_the_other_way():
    free, bound = torch.zeros(1, 1, 2), torch.tensor([[[0.0, -math.inf]]])
    assert losses.forward_kl(bound, free).item() == math.inf
    assert losses.forward_kl(free, bound).item() == pytest.approx(math.log(2))
    assert losses.reverse_kl(bound, free).item() == pytest.approx(math.log(2))


def test_reverse_kl_refuses_different_vocabularies():
    with pytest.raises(ValueError, match="common vocabulary"):
        losses.reverse_kl(torch.zeros(1, 1, 3), torch.zeros(1, 1, 4))


@every_divergence
def test_every_divergence_refuses_different_vocabularies(divergence):
    with pytest.raises(ValueError, match="common vocabulary"):
        divergence(torch.zeros(1, 1, 3), torch.zeros(1, 1, 4))


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        losses.token_logprobs(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.long), 0.0)


def test_entropy_of_a_uniform_distribution_is_the_log_of_its_size():
    assert losses.token_entropy(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))


def test_entropy_and_its_gradient_are_finite_where_a_token_is_forbidden():
    x = torch.tensor([[[0.3, -0.2, -math.inf]]], requires_grad=True)
    value = losses.token_entropy(x)
    torch.testing.assert_close(value, losses.token_entropy(x[..., :2]))
    value.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad[..., :2].abs().max() > 0


@pytest.mark.parametrize("shape", [(), (4,), (2, 2), (2, 1, 2)])
@every_divergence
def test_leading_axes_of_any_number_give_the_same_values(divergence, shape):
    student, teacher = logits(10, *shape, 5), logits(11, *shape, 5)
    found = divergence(student, teacher, 0.7)
    assert found.shape == shape
    flat = divergence(student.reshape(1, -1, 5), teacher.reshape(1, -1, 5), 0.7)
    torch.testing.assert_close(found.flatten(), flat.flatten(), rtol=1e-14, atol=1e-15)


def test_logprobs_and_entropy_of_one_row_of_logits_need_no_batch():
    x, ids = logits(12, 3, 5), torch.tensor([0, 4, 2])
    torch.testing.assert_close(losses.token_logprobs(x, ids), losses.token_logprobs(x[None], ids[None])[0])
    torch.testing.assert_close(losses.token_entropy(x[0]), losses.token_entropy(x)[0])


@pytest.mark.parametrize("shape", [(2, 3), (3,), (2, 1), (1, 3), ()])
@every_divergence
def test_a_tensor_of_temperatures_is_each_temperature_at_its_positions(divergence, shape):
    student, teacher = logits(13, 2, 3, 5), logits(14, 2, 3, 5)
    temperature = logits(15, *shape).abs() + 0.5
    found = divergence(student, teacher, temperature)
    each = temperature.expand(2, 3)
    for b in range(2):
        for t in range(3):
            torch.testing.assert_close(found[b, t], divergence(student[b, t], teacher[b, t], each[b, t].item()))


def test_a_tensor_of_temperatures_serves_logprobs_and_entropy_in_the_dtype_of_the_logits():
    x, ids = logits(16, 2, 5).float(), torch.tensor([1, 3])
    temperature = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for row in range(2):
        value = temperature[row].item()
        torch.testing.assert_close(
            losses.token_logprobs(x, ids, temperature)[row], losses.token_logprobs(x[row], ids[row], value)
        )
        torch.testing.assert_close(losses.token_entropy(x, temperature)[row], losses.token_entropy(x[row], value))
    assert losses.token_logprobs(x, ids, temperature).dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 3, 5), (5,), (1, 1, 3), (4, 3)])
def test_temperatures_that_do_not_fit_the_positions_are_refused(shape):
    with pytest.raises(ValueError, match="broadcasts to the logits without their last axis"):
        losses.token_entropy(torch.zeros(2, 3, 5), torch.ones(shape))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_one_temperature_among_many_that_is_not_positive_is_refused(value):
    with pytest.raises(ValueError, match="lowest temperature"):
        losses.token_entropy(torch.zeros(2, 3), torch.tensor([1.0, value]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_pass_gradcheck(temperature):
    student = logits(3, 2, 3, 4).requires_grad_()
    teacher = logits(4, 2, 3, 4).requires_grad_()
    ids = torch.tensor([[0, 1, 2], [3, 3, 0]])
    assert torch.autograd.gradcheck(lambda s: losses.token_logprobs(s, ids, temperature), (student,))
    assert torch.autograd.gradcheck(lambda s, t: losses.reverse_kl(s, t, temperature), (student, teacher))
    assert torch.autograd.gradcheck(lambda s, t: losses.forward_kl(s, t, temperature), (student, teacher))
    assert torch.autograd.gradcheck(lambda s, t: losses.mixed_kl(s, t, 0.3, temperature), (student, teacher))
    assert torch.autograd.gradcheck(lambda s, t: losses.jsd(s, t, 0.3, temperature), (student, teacher))
    assert torch.autograd.gradcheck(lambda s: losses.token_entropy(s, temperature), (student,))


def test_gradients_pass_gradcheck_with_a_temperature_at_each_position():
    student, teacher = logits(3, 3, 4).requires_grad_(), logits(4, 3, 4).requires_grad_()
    temperature = torch.tensor([0.5, 1.0, 2.0])
    assert torch.autograd.gradcheck(lambda s, t: losses.reverse_kl(s, t, temperature), (student, teacher))


def test_bfloat16_logits_are_summed_in_float32():
    x = logits(12, 2, 3, 500).bfloat16()
    ids = torch.zeros(2, 3, dtype=torch.long)
    found = losses.token_logprobs(x, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), losses.token_logprobs(x.double(), ids), rtol=1e-5, atol=1e-5)


@every_divergence
def test_divergences_of_bfloat16_logits_are_summed_in_float32(divergence):
    student, teacher = logits(17, 2, 3, 500).bfloat16(), logits(18, 2, 3, 500).bfloat16()
    found = divergence(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), divergence(student.double(), teacher.double()), rtol=1e-4, atol=1e-5)


def test_a_probability_that_underflows_counts_nothing_even_where_the_teacher_forbids_the_token():
    student = torch.tensor([[0.0, -200.0, 1.0]], requires_grad=True)
    found = losses.reverse_kl(student, torch.tensor([[0.0, -math.inf, 1.0]]))
    (grad,) = torch.autograd.grad(found.sum(), student)
    assert abs(found.item()) < 1e-6
    assert grad.isfinite().all()
