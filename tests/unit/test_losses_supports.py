"""Top-k divergences: the sets, the two ways to treat what is outside them, and what they promise."""

from __future__ import annotations

import math
from itertools import product
from typing import get_args

import naive_losses as naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_losses import SEEDS, logits

from stableopd import losses
from stableopd.losses._numerics import log1mexp

KINDS = get_args(losses.SupportKind)
DIVERGENCES = get_args(losses.DivergenceKind)
TAILS = get_args(losses.TailKind)
every_way = pytest.mark.parametrize(("divergence", "tail"), list(product(DIVERGENCES, TAILS)))


def members(ids, member):
    return [i for i, counts in zip(ids.tolist(), member.tolist(), strict=True) if counts]


def some_logprobs(seed, *shape):
    """Log-probabilities of a few candidates, with mass left for what is not among them."""
    return logits(seed, *shape[:-1], shape[-1] + 3).log_softmax(-1)[..., : shape[-1]]


def full(divergence):
    return {
        "reverse_kl": losses.reverse_kl,
        "forward_kl": losses.forward_kl,
        "jsd": lambda s, t: losses.jsd(s, t, 0.3),
        "mixed_kl": lambda s, t: losses.mixed_kl(s, t, 0.3),
    }[divergence]


# ------------------------------------------------------------------------------------------ which candidates


@given(seed=SEEDS, kind=st.sampled_from(KINDS), k=st.integers(1, 9), vocab=st.integers(2, 7))
@settings(max_examples=150, deadline=None)
def test_the_members_are_the_naive_set_and_each_of_them_counts_once(seed, kind, k, vocab):
    student, teacher = logits(seed, 2, 2, vocab), logits(seed + 1, 2, 2, vocab)
    ids, member = losses.candidate_set(student, teacher, k, kind)
    width = min(k, vocab) * (2 if kind in ("union", "symmetric_difference") else 1)
    assert ids.shape == member.shape == (2, 2, width)
    assert (ids.dtype, member.dtype) == (torch.int64, torch.bool)
    assert ((ids >= 0) & (ids < vocab)).all()
    for b, t in product(range(2), range(2)):
        found = members(ids[b, t], member[b, t])
        assert len(found) == len(set(found))
        assert set(found) == naive.candidates(kind, student[b, t].tolist(), teacher[b, t].tolist(), k)


def test_the_intersection_lists_the_teachers_candidates():
    student, teacher = logits(1, 3, 9), logits(2, 3, 9)
    ids, _ = losses.candidate_set(student, teacher, 4, "intersection")
    assert torch.equal(ids, losses.candidate_set(student, teacher, 4, "teacher_topk")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_share_all_candidates_and_differ_in_none(kind):
    x = logits(3, 2, 8)
    ids, member = losses.candidate_set(x, x, 3, kind)
    expected = set() if kind == "symmetric_difference" else naive.top_ids(x[0].tolist(), 3)
    assert set(members(ids[0], member[0])) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_forbids_is_not_among_its_most_likely_ids(kind):
    student = torch.tensor([3.0, 2.0, 1.0, 0.0])
    teacher = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf])
    ids, member = losses.candidate_set(student, teacher, 3, kind)
    expected = {
        "teacher_topk": {1},
        "student_topk": {0, 1, 2},
        "intersection": {1},
        "union": {0, 1, 2},
        "symmetric_difference": {0, 2},
    }[kind]
    found = members(ids, member)
    assert set(found) == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_carry_no_gradient_and_do_not_depend_on_the_temperature(kind):
    student, teacher = logits(4, 2, 8).requires_grad_(), logits(5, 2, 8).requires_grad_()
    ids, member = losses.candidate_set(student, teacher, 3, kind)
    assert not ids.requires_grad
    again = losses.candidate_set(student / 0.3, teacher / 0.3, 3, kind)
    assert torch.equal(ids, again[0])
    assert torch.equal(member, again[1])


def test_a_support_that_is_none_is_refused():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="k is 0"):
        losses.candidate_set(x, x, 0, "union")
    with pytest.raises(ValueError, match=r"'both'.*teacher_topk, student_topk"):
        losses.candidate_set(x, x, 2, "both")
    with pytest.raises(ValueError, match="common vocabulary"):
        losses.candidate_set(x, torch.zeros(2, 5), 2, "union")


# ------------------------------------------------------------------------------------------ divergence on a set


@every_way
@given(seed=SEEDS, width=st.integers(1, 5), beta=st.floats(0.01, 0.99), weight=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_the_divergence_on_a_set_is_the_naive_one_of_its_members(divergence, tail, seed, width, beta, weight):
    log_s, log_t = some_logprobs(seed, 2, 3, width), some_logprobs(seed + 1, 2, 3, width)
    member = logits(seed + 2, 2, 3, width) > -1
    found = losses.support_divergence(log_s, log_t, member, divergence, tail, beta, weight)

    def expected(s, t, counts):
        s, t = ([v for v, c in zip(row, counts, strict=True) if c] for row in (s, t))
        return naive.on_a_support(divergence, tail, s, t, beta, weight)

    torch.testing.assert_close(found, naive.at_each_position(expected, log_s, log_t, member), rtol=1e-8, atol=1e-12)
    assert (found >= -1e-12).all()


@every_way
def test_the_gradient_on_a_set_passes_gradcheck(divergence, tail):
    log_s, log_t = some_logprobs(6, 2, 3, 4).requires_grad_(), some_logprobs(7, 2, 3, 4)
    member = torch.tensor([[True, True, True, True], [True, False, True, True], [False, False, False, False]])
    member = member.expand(2, 3, 4)
    assert torch.autograd.gradcheck(
        lambda s: losses.support_divergence(s, log_t, member, divergence, tail, 0.3, 0.3), (log_s,)
    )


@every_way
def test_an_empty_set_gives_zero_with_zero_gradient(divergence, tail):
    log_s, log_t = some_logprobs(8, 2, 3, 4).requires_grad_(), some_logprobs(9, 2, 3, 4)
    value = losses.support_divergence(log_s, log_t, torch.zeros(2, 3, 4, dtype=torch.bool), divergence, tail)
    assert value.abs().max() == 0
    with torch.autograd.set_detect_anomaly(True):
        value = losses.support_divergence(log_s, log_t, torch.zeros(2, 3, 4, dtype=torch.bool), divergence, tail)
        (gradient,) = torch.autograd.grad(value.sum(), log_s)
    assert gradient.abs().max() == 0


@every_way
@pytest.mark.parametrize("filling", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_member_is_never_read_not_even_its_gradient(divergence, tail, filling):
    log_s, log_t = some_logprobs(10, 2, 3), some_logprobs(11, 2, 3)
    member = torch.tensor([[True, True, False], [False, False, False]])
    dirty = log_s.masked_fill(~member, filling).requires_grad_()
    value = losses.support_divergence(dirty, log_t.masked_fill(~member, filling), member, divergence, tail)
    (gradient,) = torch.autograd.grad(value.sum(), dirty)
    clean = log_s.clone().requires_grad_()
    expected = losses.support_divergence(clean, log_t, member, divergence, tail)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), clean)[0])
    assert gradient[0, :2].abs().max() > 0


@every_way
def test_equal_distributions_have_no_divergence_and_no_gradient_on_any_set(divergence, tail):
    log_t = some_logprobs(12, 4, 5)
    log_s = log_t.clone().requires_grad_()
    value = losses.support_divergence(log_s, log_t, logits(13, 4, 5) > 0, divergence, tail)
    assert value.abs().max() < 1e-14
    assert torch.autograd.grad(value.sum(), log_s)[0].abs().max() < 1e-13


@every_way
def test_the_teacher_is_a_constant(divergence, tail):
    log_s, log_t = some_logprobs(14, 2, 3).requires_grad_(), some_logprobs(15, 2, 3).requires_grad_()
    value = losses.support_divergence(log_s, log_t, torch.ones(2, 3, dtype=torch.bool), divergence, tail).sum()
    _, of_teacher = torch.autograd.grad(value, (log_s, log_t), allow_unused=True)
    assert of_teacher is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_renormalised_set_of_one_says_nothing_and_a_bucket_does(divergence):
    student, teacher = logits(16, 3, 6).requires_grad_(), logits(17, 3, 6)
    alone = losses.topk_divergence(student, teacher, 1, divergence=divergence)
    assert alone.abs().max() == 0
    assert torch.autograd.grad(alone.sum(), student)[0].abs().max() == 0
    bucket = losses.topk_divergence(student, teacher, 1, divergence=divergence, tail="bucket")
    assert bucket.min() > 1e-6
    assert torch.autograd.grad(bucket.sum(), student)[0].abs().max() > 1e-6


@every_way
def test_a_set_of_the_whole_vocabulary_gives_the_divergence_over_the_vocabulary(divergence, tail):
    student, teacher = logits(18, 2, 3, 6).requires_grad_(), logits(19, 2, 3, 6)
    value = losses.topk_divergence(student, teacher, 6, "union", divergence, tail, 0.3, 0.3)
    exact = full(divergence)(student, teacher)
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-11)
    gradients = [torch.autograd.grad(v.sum(), student)[0] for v in (value, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bucket_stays_finite_when_the_set_holds_all_the_mass(divergence, dtype):
    sure, unsure = torch.tensor([90.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 0.5, 0.2, 0.0])
    for student, teacher in ((sure, unsure), (unsure, sure), (sure, sure + 1), (unsure, unsure)):
        for k in (1, 3, 4):
            student = student.to(dtype).requires_grad_()
            value = losses.topk_divergence(student, teacher.to(dtype), k, divergence=divergence, tail="bucket")
            (gradient,) = torch.autograd.grad(value, student)
            assert torch.isfinite(value)
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() <= 100


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bucket_is_never_above_the_whole_vocabulary_and_does_not_fall_as_the_set_grows(divergence):
    student, teacher = logits(20, 50, 8), logits(21, 50, 8)
    exact = full(divergence)(student, teacher)
    values = [losses.topk_divergence(student, teacher, k, "teacher_topk", divergence, "bucket", 0.3, 0.3)
              for k in range(1, 9)]  # fmt: skip
    for smaller, larger in zip(values, [*values[1:], exact], strict=True):
        assert (larger - smaller).min() > -1e-9
    assert (exact - values[2]).max() > 0.1


def test_the_mass_outside_is_exact_where_it_is_small():
    outside = 1e-4
    logprobs = torch.tensor([math.log(1 - outside)])
    found = losses.support_divergence(logprobs, torch.tensor([math.log(0.5)]), torch.tensor([True]), tail="bucket")
    expected = (1 - outside) * math.log((1 - outside) / 0.5) + outside * math.log(outside / 0.5)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_log_of_one_minus_a_probability_is_exact_at_both_ends():
    x = torch.tensor([-1e-12, -1e-3, -math.log(2), -3.0, -80.0], dtype=torch.float64, requires_grad=True)
    expected = [math.log(1e-12), math.log(-math.expm1(-1e-3)), -math.log(2), math.log1p(-math.exp(-3)), -math.exp(-80)]
    assert log1mexp(x).tolist() == pytest.approx(expected, rel=1e-11, abs=0)
    (gradient,) = torch.autograd.grad(log1mexp(x).sum(), x)
    assert gradient.tolist() == pytest.approx([-1 / math.expm1(-v) for v in x.tolist()], rel=1e-11, abs=0)


def test_a_sum_left_as_it_is_falls_below_zero_as_a_perfect_student_leaves_the_set_and_ours_do_not():
    teacher = logits(23, 6)
    top = teacher.log_softmax(-1).topk(3, dim=-1)
    away = teacher.scatter_add(-1, top.indices, torch.full_like(top.values, -3.0))

    def left_as_it_is(x):
        log_s = x.log_softmax(-1).gather(-1, top.indices)
        return (log_s.exp() * (log_s - top.values)).sum().item()

    assert left_as_it_is(teacher) == pytest.approx(0.0, abs=1e-12)
    assert left_as_it_is(away) < -0.1
    assert losses.topk_divergence(away, teacher, 3, tail="renormalise").item() == pytest.approx(0.0, abs=1e-12)
    assert losses.topk_divergence(away, teacher, 3, tail="bucket").item() > 0.1


@every_way
def test_a_candidate_that_both_forbid_is_as_if_it_were_none(divergence, tail):
    log_s, log_t = some_logprobs(24, 3, 4).requires_grad_(), some_logprobs(25, 3, 4)
    never = torch.full((3, 1), -math.inf, dtype=torch.float64)
    everyone = torch.ones(3, 5, dtype=torch.bool)
    wide = torch.cat([log_s, never], dim=-1)
    value = losses.support_divergence(wide, torch.cat([log_t, never], dim=-1), everyone, divergence, tail)
    expected = losses.support_divergence(log_s, log_t, everyone[:, 1:], divergence, tail)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(v.sum(), log_s)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tail", TAILS)
def test_a_candidate_that_one_forbids_is_finite_where_the_direction_does_not_weigh_it(tail):
    log_p, log_q = torch.tensor([math.log(0.6), -math.inf]), torch.tensor([math.log(0.3), math.log(0.4)])
    both = torch.ones(2, dtype=torch.bool)
    for divergence, student, teacher in (
        ("reverse_kl", log_p, log_q), ("forward_kl", log_q, log_p), ("jsd", log_p, log_q), ("jsd", log_q, log_p)
    ):  # fmt: skip
        student = student.clone().requires_grad_()
        value = losses.support_divergence(student, teacher, both, divergence, tail)
        expected = naive.on_a_support(divergence, tail, student.tolist(), teacher.tolist(), 0.5, 0.5)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()
    assert losses.support_divergence(log_q, log_p, both, "reverse_kl", tail).item() == math.inf


def test_a_side_without_any_mass_on_the_set_has_all_of_it_outside():
    none, some = torch.tensor([-math.inf, -math.inf]), torch.tensor([math.log(0.3), math.log(0.2)])
    both = torch.ones(2, dtype=torch.bool)
    for divergence, student, teacher in (("jsd", none, some), ("reverse_kl", none, some), ("forward_kl", some, none)):
        student = student.clone().requires_grad_()
        value = losses.support_divergence(student, teacher, both, divergence, "bucket")
        expected = naive.on_a_support(divergence, "bucket", student.tolist(), teacher.tolist(), 0.5, 0.5)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()


def test_impossible_arguments_of_a_divergence_on_a_set_are_refused():
    x, member = torch.full((2, 3), -2.0), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="same candidates"):
        losses.support_divergence(x, x[:, :2], member)
    with pytest.raises(ValueError, match=r"'kl'.*reverse_kl, forward_kl, jsd, mixed_kl"):
        losses.support_divergence(x, x, member, "kl")
    with pytest.raises(ValueError, match=r"'drop'.*renormalise, bucket"):
        losses.support_divergence(x, x, member, tail="drop")
    with pytest.raises(ValueError, match="beta is 2"):
        losses.support_divergence(x, x, member, "jsd", beta=2)
    with pytest.raises(ValueError, match="forward_weight is 2"):
        losses.support_divergence(x, x, member, "mixed_kl", forward_weight=2)


# ------------------------------------------------------------------------------------------ from logits


@given(seed=SEEDS, kind=st.sampled_from(KINDS), divergence=st.sampled_from(DIVERGENCES), tail=st.sampled_from(TAILS),
       k=st.integers(1, 6), temperature=st.sampled_from([0.5, 1.0, 1.7]))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_topk_divergence_is_the_naive_one_from_logits_on(seed, kind, divergence, tail, k, temperature):
    student, teacher = logits(seed, 2, 6), logits(seed + 1, 2, 6)
    found = losses.topk_divergence(student, teacher, k, kind, divergence, tail, 0.3, 0.2, temperature)

    def expected(s, t):
        chosen = sorted(naive.candidates(kind, s, t, k))
        s, t = ([naive.log_softmax(row, temperature)[i] for i in chosen] for row in (s, t))
        if len(chosen) == 6:  # nothing is outside but rounding
            return naive.divergence(divergence, s, t, 0.3, 0.2)
        return naive.on_a_support(divergence, tail, s, t, 0.3, 0.2)

    torch.testing.assert_close(found, naive.at_each_position(expected, student, teacher), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@every_way
def test_topk_divergence_passes_gradcheck(kind, divergence, tail):
    student, teacher = logits(26, 2, 7).requires_grad_(), logits(27, 2, 7)
    temperature = torch.tensor([0.7, 1.3])
    assert torch.autograd.gradcheck(
        lambda s: losses.topk_divergence(s, teacher, 3, kind, divergence, tail, 0.3, 0.3, temperature), (student,)
    )


@given(seed=SEEDS, k=st.integers(1, 5), num_rows=st.integers(1, 3), num_tokens=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_topk_reverse_kl_is_the_reverse_kl_on_the_set_alone(seed, k, num_rows, num_tokens):
    student, teacher = logits(seed, num_rows, num_tokens, 6), logits(seed + 1, num_rows, num_tokens, 6)
    top = teacher.log_softmax(-1).topk(k, dim=-1)
    found = losses.topk_reverse_kl(student, top.indices, top.values)
    expected = losses.reverse_kl(student.gather(-1, top.indices), teacher.gather(-1, top.indices))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, losses.topk_divergence(student, teacher, k), rtol=1e-9, atol=1e-12)
    if k == 1:
        assert found.abs().max() == 0


def test_topk_reverse_kl_cannot_be_lowered_by_leaving_the_set():
    student, teacher = logits(3, 1, 1, 6), logits(4, 1, 1, 6)
    top = teacher.log_softmax(-1).topk(3, dim=-1)
    away = student.scatter_add(-1, top.indices, torch.full_like(top.values, -5.0))
    before = losses.topk_reverse_kl(student, top.indices, top.values)
    torch.testing.assert_close(losses.topk_reverse_kl(away, top.indices, top.values), before)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_topk_reverse_kl_passes_gradcheck(temperature):
    student = logits(3, 2, 3, 4).requires_grad_()
    top = logits(4, 2, 3, 4).log_softmax(-1).topk(2, dim=-1)
    assert torch.autograd.gradcheck(
        lambda s: losses.topk_reverse_kl(s, top.indices, top.values, temperature), (student,)
    )


def test_the_gradient_of_a_renormalised_set_stays_on_the_set():
    student, teacher = logits(28, 1, 6).requires_grad_(), logits(29, 1, 6)
    ids, _ = losses.candidate_set(student, teacher, 3, "teacher_topk")
    (gradient,) = torch.autograd.grad(losses.topk_divergence(student, teacher, 3).sum(), student)
    outside = torch.ones_like(gradient).scatter(-1, ids, 0.0).bool()
    assert gradient[outside].abs().max() < 1e-15
    assert gradient.abs().max() > 1e-3


@every_way
def test_a_model_that_broke_is_not_taken_for_one_that_agrees(divergence, tail):
    broken, fine = torch.full((1, 4), math.nan), torch.tensor([[0.3, 0.1, 0.2, 0.0]])
    assert losses.topk_divergence(broken, fine, 2, "teacher_topk", divergence, tail).isnan().all()
    assert losses.topk_divergence(fine, broken, 2, "teacher_topk", divergence, tail).isnan().all()


@every_way
def test_bfloat16_logits_are_compared_in_float32(divergence, tail):
    student, teacher = logits(30, 5, 400).bfloat16(), logits(31, 5, 400).bfloat16()
    found = losses.topk_divergence(student, teacher, 8, "union", divergence, tail)
    assert found.dtype == torch.float32
    exact = losses.topk_divergence(student.double(), teacher.double(), 8, "union", divergence, tail)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
