"""The fused pass in float32 over large vocabularies, and where a model forbids tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stableopd import losses
from stableopd.fused import DivergenceTerm, FusedOutput, Projected, SampledTerm, SupportTerm, fused_loss
from stableopd.heads import IdentityHead, LinearHead

DIVERGENCES = {
    "reverse_kl": losses.reverse_kl,
    "forward_kl": losses.forward_kl,
    "jsd": losses.jsd,
    "mixed_kl": losses.mixed_kl,
}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compared(student: Tensor, teacher: Tensor, *terms: str, weight: Tensor | None = None) -> FusedOutput:
    """The divergences named, of logits [N, V]."""
    identity = IdentityHead(vocab_size=student.shape[-1])
    weight = torch.ones(len(student), dtype=student.dtype) if weight is None else weight
    return fused_loss(
        Projected(states=student, head=identity), torch.zeros(len(student), dtype=torch.long),
        [DivergenceTerm(name=name, weight=weight, other="teacher", divergence=name) for name in terms],
        others={"teacher": Projected(states=teacher, head=identity)}, entropy=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("offset", [0.0, -30.0], ids=["level", "teacher 30 lower"])
@pytest.mark.parametrize("distance", [3.0, 0.1, 1e-3], ids=["far", "near", "almost equal"])
def test_float32_over_a_large_vocabulary_is_near_float64(name, offset, distance):
    """A constant in the logits says nothing, however much larger it is than the divergence."""
    exact = (4 * randn(1, 6, 20_000)).float().double().requires_grad_()
    teacher = (exact.detach() + distance * randn(2, 6, 20_000)).float().double()
    expected = DIVERGENCES[name](exact, teacher)
    (slope,) = torch.autograd.grad(expected.sum(), exact)

    student = exact.detach().float().requires_grad_()
    found = compared(student, teacher.float() + offset, name)
    (grad,) = torch.autograd.grad(found.loss, student)
    torch.testing.assert_close(found.values[name].double(), expected.detach(), rtol=1e-5, atol=3e-6)
    rounding = 2e-6 / distance  # that of logits of this size, against what lies between them
    assert float((grad - slope).norm() / slope.norm()) < 1e-5 + rounding


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_entropy_in_float32_does_not_feel_a_constant_in_the_logits(shift):
    logits = (4 * randn(1, 6, 20_000)).float() + shift
    log_p = logits.double().log_softmax(-1)
    found = compared(logits, logits).entropy
    torch.testing.assert_close(found.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=0)


def test_equal_models_in_float32_have_next_to_no_divergence_and_no_gradient():
    student = (4 * randn(1, 6, 20_000)).float().requires_grad_()
    found = compared(student, student.detach().clone(), *DIVERGENCES)
    for name, value in found.values.items():
        assert value.abs().max() < 2e-6, name
    (grad,) = torch.autograd.grad(found.loss, student)
    assert grad.abs().sum(-1).max() < 1e-5


FORBIDDEN = {
    "to the teacher alone": ([0.0, 1.0, 0.5, -1.0], [0.3, -torch.inf, 0.1, 0.2]),
    "to the student alone": ([0.0, -torch.inf, 0.5, -1.0], [0.3, 0.4, 0.1, 0.2]),
    "to both": ([0.0, -torch.inf, 0.5, -1.0], [0.3, -torch.inf, 0.1, 0.2]),
    "all but one to the student": ([0.0, *[-torch.inf] * 3], [0.3, 0.4, 0.1, 0.2]),
}


@pytest.mark.parametrize("who", FORBIDDEN)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_forbidden_token_gives_the_value_of_the_unfused_divergence_infinite_where_that_is(name, who):
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in FORBIDDEN[who])
    student.requires_grad_()
    expected = DIVERGENCES[name](student, teacher)
    found = compared(student, teacher, name)
    torch.testing.assert_close(found.values[name], expected.detach())
    if expected.isfinite():
        grads = [torch.autograd.grad(loss, student)[0] for loss in (found.loss, expected.sum())]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("who", FORBIDDEN)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_forbidden_token_at_a_place_without_weight_costs_nothing(name, who):
    student, teacher = (torch.tensor([row, [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64) for row in FORBIDDEN[who])
    teacher[1] = teacher[1].flip(-1)
    student.requires_grad_()
    found = compared(student, teacher, name, weight=torch.tensor([0.0, 1.0], dtype=torch.float64))
    (grad,) = torch.autograd.grad(found.loss, student)
    assert found.loss.isfinite()
    assert grad[0].abs().max() == 0
    assert grad[1].isfinite().all()
    assert grad[1].abs().max() > 0


@pytest.mark.parametrize("who", FORBIDDEN)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("kind", ["teacher_topk", "student_topk", "intersection", "union", "symmetric_difference"])
def test_a_forbidden_candidate_gives_the_value_of_the_unfused_support_divergence(kind, tail, divergence, who):
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in FORBIDDEN[who])
    identity = IdentityHead(vocab_size=4)
    term = SupportTerm(
        name="few", weight=torch.ones(1, dtype=torch.float64), other="teacher", kind=kind, k=2, divergence=divergence,
        tail=tail,
    )  # fmt: skip
    found = fused_loss(
        Projected(states=student, head=identity), torch.zeros(1, dtype=torch.long), [term],
        others={"teacher": Projected(states=teacher, head=identity)},
    )  # fmt: skip
    expected = losses.topk_divergence(student, teacher, 2, kind, divergence, tail)
    torch.testing.assert_close(found.values["few"], expected)


def test_a_bias_that_forbids_a_token_makes_no_nan():
    """Some models mask ids they never say with a bias of −inf."""
    bias = torch.tensor([0.1, -torch.inf, 0.0, 0.3], dtype=torch.float64)
    states = randn(1, 5, 3).requires_grad_()
    head = LinearHead(weight=randn(2, 4, 3).requires_grad_(), bias=bias, vocab_size=4)
    teacher = Projected(states=randn(3, 5, 3), head=LinearHead(weight=randn(4, 4, 3), bias=bias, vocab_size=4))
    weight = torch.ones(5, dtype=torch.float64)
    terms = [DivergenceTerm(name=n, weight=weight, other="teacher", divergence=n) for n in DIVERGENCES]
    found = fused_loss(
        Projected(states=states, head=head), torch.zeros(5, dtype=torch.long), terms, others={"teacher": teacher},
        entropy=True,
    )  # fmt: skip
    allowed = [0, 2, 3]
    z, z_t = head.logits(states)[:, allowed], teacher.head.logits(teacher.states)[:, allowed]
    for name, divergence in DIVERGENCES.items():
        torch.testing.assert_close(found.values[name], divergence(z, z_t).detach(), msg=name)
    grads = torch.autograd.grad(found.loss, (states, head.weight))
    expected = torch.autograd.grad(sum(d(z, z_t).sum() for d in DIVERGENCES.values()), (states, head.weight))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)
    assert found.entropy.isfinite().all()


def gold(name: str = "gold", other: str = "") -> SampledTerm:
    return SampledTerm(name=name, weight=torch.ones(1), other=other, loss=lambda x, at, _: -x)


def test_a_term_about_a_model_that_is_not_there_is_refused():
    one = Projected(states=torch.zeros(1, 3), head=IdentityHead(vocab_size=3))
    ids = torch.zeros(1, dtype=torch.long)
    for term in (
        gold(other="reference"),
        DivergenceTerm(name="d", weight=torch.ones(1), other="reference", divergence="jsd"),
        SupportTerm(name="s", weight=torch.ones(1), other="reference", kind="union", k=2, divergence="jsd"),
    ):
        with pytest.raises(ValueError, match=r"'reference', which is not among \['teacher'\]"):
            fused_loss(one, ids, [term], others={"teacher": one})


def test_two_terms_of_one_name_are_refused():
    one = Projected(states=torch.zeros(1, 3), head=IdentityHead(vocab_size=3))
    with pytest.raises(ValueError, match="two terms are named gold"):
        fused_loss(one, torch.zeros(1, dtype=torch.long), [gold(), gold()])


def test_a_head_with_fewer_rows_than_ids_is_refused():
    with pytest.raises(ValueError, match="3 rows, fewer than the 4 ids"):
        LinearHead(weight=torch.zeros(3, 2), vocab_size=4)
