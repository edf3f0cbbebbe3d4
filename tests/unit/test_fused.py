"""The fused pass gives what the unfused losses and autograd give: values, gradients, whatever the head."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stableopd import losses
from stableopd.fused import DivergenceTerm, Projected, SampledTerm, SupportTerm, fused_loss
from stableopd.heads import IdentityHead, LinearHead

V, N, H = 13, 11, 6
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "mixed_kl")
SUPPORTS = ("teacher_topk", "student_topk", "intersection", "union", "symmetric_difference")


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head(seed: int, width: int, *, pad: int = 0, bias: bool = False, dtype=torch.float64, **options) -> LinearHead:
    return LinearHead(
        weight=randn(seed, V + pad, width, dtype=dtype).requires_grad_(),
        bias=randn(seed + 1, V + pad, dtype=dtype).requires_grad_() if bias else None,
        vocab_size=V,
        **options,
    )


def unfused(name: str, z: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    if name == "jsd":
        return losses.jsd(z, z_t, 0.3, temperature)
    if name == "mixed_kl":
        return losses.mixed_kl(z, z_t, 0.7, temperature)
    return getattr(losses, name)(z, z_t, temperature)


class Case:
    """Student, teacher and reference of different widths, weights with zeros among them, and every kind of term."""

    def __init__(self, *, dtype=torch.float64, temperature: float = 0.8, student=None, names=DIVERGENCES) -> None:
        self.temperature = temperature
        self.head = student or head(1, H, dtype=dtype)
        self.states = randn(2, N, H, dtype=dtype).requires_grad_()
        self.others = {
            "teacher": Projected(states=randn(3, N, 9, dtype=dtype), head=head(4, 9, pad=3, dtype=dtype)),
            "reference": Projected(states=randn(5, N, H, dtype=dtype), head=head(6, H, bias=True, dtype=dtype)),
        }
        self.ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(7))
        self.old, self.advantages = randn(8, N, dtype=dtype) * 0.1 - 2, randn(9, N, dtype=dtype)
        self.weights = [randn(20 + i, N, dtype=dtype).abs() for i in range(16)]
        for i, weight in enumerate(self.weights):
            weight[i % N] = 0
        self.names = names

    def terms(self) -> list:
        w = iter(self.weights)
        sampled = [
            SampledTerm(
                name="policy",
                weight=next(w),
                loss=lambda x, at, _: losses.clipped_policy_loss(x, self.old[at], self.advantages[at]),
            ),
            SampledTerm(name="gold", weight=next(w), loss=lambda x, at, _: -x),
            SampledTerm(
                name="penalty", weight=next(w), other="reference", loss=lambda x, at, y: losses.kl_penalty(x, y, "k2")
            ),
        ]
        dense = [
            DivergenceTerm(name=name, weight=next(w), other="teacher", divergence=name, beta=0.3, forward_weight=0.7)
            for name in self.names
        ]
        dense.append(DivergenceTerm(name="ref", weight=next(w), other="reference", divergence="reverse_kl"))
        few = [
            SupportTerm(name=kind, weight=next(w), other="teacher", kind=kind, k=3, divergence="reverse_kl")
            for kind in SUPPORTS
        ]
        return [*sampled, *dense, *few]

    def expected(self) -> dict[str, Tensor]:
        z = self.head.logits(self.states)
        z_t, z_r = (self.others[name].head.logits(self.others[name].states) for name in ("teacher", "reference"))
        logprobs = losses.token_logprobs(z, self.ids, self.temperature)
        ref = losses.token_logprobs(z_r, self.ids, self.temperature)
        values = {
            "policy": losses.clipped_policy_loss(logprobs, self.old, self.advantages),
            "gold": -logprobs,
            "penalty": losses.kl_penalty(logprobs, ref, "k2"),
        }
        values |= {name: unfused(name, z, z_t, self.temperature) for name in self.names}
        values["ref"] = losses.reverse_kl(z, z_r, self.temperature)
        values |= {kind: losses.topk_divergence(z, z_t, 3, kind, temperature=self.temperature) for kind in SUPPORTS}
        return values

    def fused(self, **options):
        return fused_loss(
            Projected(states=self.states, head=self.head), self.ids, self.terms(), others=self.others,
            temperature=self.temperature, entropy=True, **options,
        )  # fmt: skip

    def inputs(self) -> list[Tensor]:
        return [self.states, *self.head.parameters()]

    def compare(self, tolerance: float, **options) -> None:
        found, expected = self.fused(**options), self.expected()
        total = sum((w * expected[t.name]).sum() for t, w in zip(self.terms(), self.weights, strict=False))
        assert_close(found.loss, total, tolerance)
        for term, weight in zip(self.terms(), self.weights, strict=False):
            assert_close(found.values[term.name], expected[term.name].where(weight != 0, 0.0), tolerance, term.name)
        grads = torch.autograd.grad(3.0 * found.loss, self.inputs())
        naive = torch.autograd.grad(3.0 * total, self.inputs())
        for grad, other in zip(grads, naive, strict=True):
            assert_close(grad, other, tolerance)


def assert_close(found: Tensor, expected: Tensor, tolerance: float, message: str = "") -> None:
    """Relative to the largest entry."""
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale, msg=message or None)


@pytest.mark.parametrize("chunk_rows", [1, 4, N, 1000])
def test_all_terms_together_equal_the_unfused_losses_and_their_gradients_in_float64(chunk_rows):
    Case().compare(1e-11, chunk_rows=chunk_rows)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_alone_equals_the_unfused_one(name):
    Case(names=(name,)).compare(1e-11, chunk_rows=4)


def test_float32_is_within_a_hundred_thousandth_of_the_unfused_losses_gradients_too():
    Case(dtype=torch.float32).compare(1e-5, chunk_rows=4)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True}, {"pad": 5}, {"scale": 0.25}, {"softcap": 3.0},
        {"bias": True, "pad": 2, "scale": 2.0, "softcap": 5.0},
    ],
    ids=["bias", "padded vocabulary", "scale", "softcap", "all"],
)  # fmt: skip
def test_every_kind_of_linear_head_has_the_gradients_of_autograd(options):
    case = Case(student=head(1, H, **options))
    case.compare(1e-11, chunk_rows=3)
    if options.get("pad"):
        (grad,) = torch.autograd.grad(case.fused().loss, case.head.weight)
        assert grad[:V].abs().max() > 0
        assert grad[V:].abs().max() == 0, "padding of the vocabulary is trained"


def test_logits_take_the_place_of_states_where_the_head_is_no_linear_map():
    case = Case(student=IdentityHead(vocab_size=V))
    case.states = randn(2, N, V + 2).requires_grad_()
    case.compare(1e-11, chunk_rows=4)


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    embedding = randn(1, V, H).requires_grad_()
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    target = ids.roll(-1)

    def states() -> Tensor:
        return torch.tanh(embedding[ids])

    term = SampledTerm(name="gold", weight=torch.ones(N, dtype=torch.float64), loss=lambda x, at, _: -x)
    fused = fused_loss(Projected(states=states(), head=LinearHead(weight=embedding, vocab_size=V)), target, [term])
    naive = -losses.token_logprobs(states() @ embedding.T, target).sum()
    assert_close(*(torch.autograd.grad(loss, embedding)[0] for loss in (fused.loss, naive)), 1e-12)


def test_the_gradient_is_what_finite_differences_say():
    case = Case()

    def loss(states: Tensor, weight: Tensor) -> Tensor:
        student = Projected(states=states, head=LinearHead(weight=weight, vocab_size=V))
        terms = [term for term in case.terms() if term.name != "gold"]
        return fused_loss(student, case.ids, terms, others=case.others, temperature=0.8, chunk_rows=4).loss

    inputs = (case.states, case.head.weight)
    for grad, array in zip(torch.autograd.grad(loss(*inputs), inputs), inputs, strict=True):
        for place in torch.randperm(array.numel(), generator=torch.Generator().manual_seed(1))[:40].tolist():
            shift = torch.zeros(array.numel(), dtype=torch.float64)
            shift[place] = 1e-5
            ends = [
                float(loss(*(a + sign * shift.view_as(a) if a is array else a for a in inputs)).detach())
                for sign in (1, -1)
            ]
            assert grad.flatten()[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-7)


@given(seed=st.integers(0, 10_000), num_tokens=st.integers(1, 9), chunk_rows=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_log_probabilities_entropy_and_topk_are_those_of_the_softmax(seed, num_tokens, chunk_rows):
    states, projection = randn(seed, num_tokens, H), head(seed + 1, H, pad=2)
    ids = torch.randint(V, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = fused_loss(
            Projected(states=states, head=projection), ids, (), temperature=0.7, entropy=True, topk=4,
            chunk_rows=chunk_rows,
        )  # fmt: skip
        log_p = (projection.logits(states) / 0.7).log_softmax(-1)
    assert_close(found.logprobs, log_p.gather(-1, ids[:, None])[:, 0], 1e-12)
    assert_close(found.entropy, -(log_p.exp() * log_p).sum(-1), 1e-12)
    top = log_p.topk(4)
    assert torch.equal(found.topk[0], top.indices)
    assert_close(found.topk[1], top.values, 1e-12)


def test_a_teachers_own_topk_gives_what_its_whole_distribution_gives():
    case = Case()
    with torch.no_grad():
        top = fused_loss(case.others["teacher"], case.ids, (), temperature=case.temperature, topk=3).topk
    grads, values = [], []
    for known in ({"other": "teacher", "kind": "teacher_topk", "k": 3}, {"ids": top[0], "logprobs": top[1]}):
        term = SupportTerm(name="few", weight=case.weights[0], divergence="reverse_kl", tail="bucket", **known)
        found = fused_loss(
            Projected(states=case.states, head=case.head), case.ids, [term],
            others=case.others if "other" in known else {}, temperature=case.temperature, chunk_rows=4,
        )  # fmt: skip
        values.append(found.values["few"])
        grads.append(torch.autograd.grad(found.loss, case.states)[0])
    assert_close(*values, 1e-12)
    assert_close(*grads, 1e-12)


def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient():
    states, projection = randn(1, N, H).requires_grad_(), head(2, H)
    twin = Projected(states=states.detach(), head=projection)
    terms = [
        DivergenceTerm(name=name, weight=torch.ones(N, dtype=torch.float64), other="twin", divergence=name)
        for name in DIVERGENCES
    ]
    found = fused_loss(
        Projected(states=states, head=projection), torch.zeros(N, dtype=torch.long), terms, others={"twin": twin}
    )
    for value in found.values.values():
        assert value.abs().max() < 1e-14
    assert torch.autograd.grad(found.loss, states)[0].abs().max() < 1e-14


def test_tokens_without_weight_are_never_read_and_no_tokens_give_zero():
    case = Case()
    weight = torch.zeros(N, dtype=torch.float64)
    poison = SampledTerm(name="poison", weight=weight, loss=lambda x, at, _: x * torch.nan)
    found = fused_loss(Projected(states=case.states, head=case.head), case.ids, [poison])
    assert found.loss == 0
    assert torch.autograd.grad(found.loss, case.states)[0].abs().max() == 0
    none = case.states[:0]
    empty = fused_loss(
        Projected(states=none, head=case.head), case.ids[:0],
        [SampledTerm(name="gold", weight=weight[:0], loss=lambda x, at, _: -x)], entropy=True, topk=2,
    )  # fmt: skip
    assert empty.loss == 0
    assert empty.topk[0].shape == (0, 2)
    assert torch.autograd.grad(empty.loss, case.head.weight)[0].abs().max() == 0


def test_a_token_that_models_forbid_by_themselves_makes_no_nan():
    states = torch.tensor([[0.3, -0.2, -torch.inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.1, 0.4, -torch.inf]], dtype=torch.float64)
    identity = IdentityHead(vocab_size=3)
    one = torch.ones(1, dtype=torch.float64)
    terms = [DivergenceTerm(name=n, weight=one, other="t", divergence=n) for n in DIVERGENCES]
    found = fused_loss(
        Projected(states=states, head=identity), torch.zeros(1, dtype=torch.long), terms,
        others={"t": Projected(states=teacher, head=identity)}, entropy=True,
    )  # fmt: skip
    for name in DIVERGENCES:
        expected = {"jsd": losses.jsd, "mixed_kl": losses.mixed_kl}.get(name) or getattr(losses, name)
        assert_close(found.values[name], expected(states[..., :2], teacher[..., :2]), 1e-12, name)
    (grad,) = torch.autograd.grad(found.loss, states)
    assert torch.isfinite(grad).all()
    assert torch.isfinite(found.entropy).all()


def test_bfloat16_is_summed_in_float32_and_near_the_float32_result():
    exact, rounded = Case(dtype=torch.float32), Case(dtype=torch.bfloat16, student=None)
    found, expected = rounded.fused(chunk_rows=4), exact.fused(chunk_rows=4)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    for grad, other in zip(
        torch.autograd.grad(found.loss, rounded.inputs()), torch.autograd.grad(expected.loss, exact.inputs()),
        strict=True,
    ):  # fmt: skip
        assert grad.dtype == torch.bfloat16
        assert float((grad.float() - other).norm() / other.norm()) < 0.05


def test_many_chunks_in_bfloat16_lose_nothing_of_the_heads_gradient():
    """Summed in bfloat16, the gradient of 4,000 equal tokens would stop growing after a few hundred."""
    n = 4000
    states = torch.ones(n, 1, dtype=torch.bfloat16).requires_grad_()
    weight = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    term = SampledTerm(name="gold", weight=torch.ones(n), loss=lambda x, at, _: -x)
    found = fused_loss(
        Projected(states=states, head=LinearHead(weight=weight, vocab_size=2)), torch.zeros(n, dtype=torch.long),
        [term], chunk_rows=1,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(found.loss, weight)
    assert grad[:, 0].tolist() == pytest.approx([-0.5 * n, 0.5 * n], rel=0.01)


def test_under_autocast_the_head_works_in_bfloat16_and_its_gradient_stays_float32():
    case = Case(dtype=torch.float32, names=("reverse_kl",))
    expected = torch.autograd.grad(case.fused().loss, case.inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.fused()
    grads = torch.autograd.grad(found.loss, case.inputs())
    for grad, other in zip(grads, expected, strict=True):
        assert grad.dtype == torch.float32
        assert 1e-5 < float((grad - other).norm() / other.norm()) < 0.05, "bfloat16 rounds, a little"


def test_frozen_heads_get_no_gradient_and_the_states_the_same_one():
    case = Case()
    expected = torch.autograd.grad(case.fused().loss, case.states)[0]
    case.head.weight.requires_grad_(False)
    found = case.fused()
    assert_close(torch.autograd.grad(found.loss, case.states)[0], expected, 1e-12)


def test_without_gradients_only_values_are_computed():
    case = Case()
    with torch.no_grad():
        found = case.fused()
    assert not found.loss.requires_grad
    assert_close(found.loss, case.fused().loss.detach(), 1e-12)


def test_a_second_backward_pass_is_refused():
    case = Case()
    loss = case.fused().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_different_vocabularies_and_a_temperature_of_zero_are_refused():
    case = Case()
    other = Projected(states=randn(1, N, H), head=LinearHead(weight=randn(2, V - 1, H), vocab_size=V - 1))
    with pytest.raises(ValueError, match="common vocabulary"):
        fused_loss(Projected(states=case.states, head=case.head), case.ids, (), others={"teacher": other})
    with pytest.raises(ValueError, match="temperature"):
        fused_loss(Projected(states=case.states, head=case.head), case.ids, (), temperature=0.0)


def term(form=DivergenceTerm, /, **changes):
    known = {"name": "x", "weight": torch.ones(N), "other": "teacher", "divergence": "reverse_kl"}
    return form(**{**known, **changes})


BAD_TERMS = {
    "divergence": (term(divergence="foo"), r"divergence is 'foo'.*reverse_kl, forward_kl, jsd, mixed_kl"),
    "beta": (term(divergence="jsd", beta=2.0), r"beta is 2.0.*\[0, 1\]"),
    "beta that is no number": (term(divergence="jsd", beta=float("nan")), "beta is nan"),
    "forward_weight": (term(divergence="mixed_kl", forward_weight=5.0), "forward_weight is 5.0"),
    "a short weight": (term(weight=torch.ones(N - 1)), r"weight is \(10,\) and must be \(11,\)"),
    "a weight for all": (term(weight=torch.tensor(1.0)), r"weight is \(\)"),
    "a column of weights": (term(weight=torch.ones(N, 1)), r"weight is \(11, 1\)"),
    "ids alone": (term(SupportTerm, ids=torch.zeros(N, 3, dtype=torch.long)), "ids and logprobs belong together"),
    "logprobs alone": (term(SupportTerm, logprobs=torch.zeros(N, 3), k=2), "ids and logprobs belong together"),
    "ids of another number of tokens": (
        term(SupportTerm, ids=torch.zeros(N - 1, 3, dtype=torch.long), logprobs=torch.zeros(N - 1, 3)),
        r"ids is \(10, 3\) and must be \(11, 3\)",
    ),
    "more ids than logprobs": (
        term(SupportTerm, ids=torch.zeros(N, 3, dtype=torch.long), logprobs=torch.zeros(N, 2)),
        r"logprobs is \(11, 2\) and must be \(11, 3\)",
    ),
    "an id outside": (
        term(SupportTerm, ids=torch.full((N, 1), V), logprobs=torch.zeros(N, 1)),
        "ids go from 13 to 13, but the head has the ids 0 to 12",
    ),
    "tail": (term(SupportTerm, k=2, tail="foo"), "tail is 'foo'.*renormalise, bucket"),
    "kind": (term(SupportTerm, k=2, kind="foo"), "kind is 'foo'.*union"),
    "k": (term(SupportTerm), "k is 0; a support needs at least one candidate"),
    "a short weight of a sampled token's": (
        SampledTerm(name="x", weight=torch.ones(N + 1), loss=lambda x, at, _: x), r"weight is \(12,\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD_TERMS.values(), ids=BAD_TERMS)
def test_a_term_that_makes_no_sense_is_refused_by_name(bad, message):
    case = Case()
    with pytest.raises(ValueError, match=f"term x: {message}"):
        fused_loss(Projected(states=case.states, head=case.head), case.ids, [bad], others=case.others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": torch.zeros(N + 1, dtype=torch.long)}, r"token_ids is \(12,\) and must be \(11,\)"),
        ({"token_ids": torch.zeros(N, 1, dtype=torch.long)}, r"token_ids is \(11, 1\)"),
        ({"token_ids": torch.zeros(N, dtype=torch.int32)}, r"int32.*\.long\(\)"),
        ({"token_ids": torch.full((N,), V)}, "from 13 to 13, but the head has the ids 0 to 12"),
        ({"token_ids": torch.full((N,), -100)}, "from -100 to -100.*leave padding out"),
        ({"others": {"teacher": Projected(states=randn(1, 1, 9), head=head(4, 9))}}, r"teacher: states is \(1, 9\)"),
        ({"others": {"teacher": Projected(states=randn(1, N, 8), head=head(4, 9))}}, r"must be \(11, 9\)"),
        ({"chunk_rows": 0}, "chunk_rows 0"),
        ({"chunk_rows": -1}, "chunk_rows -1"),
        ({"topk": -1}, "topk is -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused_and_not_cut_or_repeated(changes, message):
    case = Case()
    arguments = {"token_ids": case.ids, "terms": (), "others": case.others, **changes}
    with pytest.raises(ValueError, match=message):
        fused_loss(Projected(states=case.states, head=case.head), **arguments)


def test_buffers_go_when_a_pass_ends_without_waiting_for_the_garbage_collector():
    case = Case()
    gc.collect()
    gc.disable()
    try:
        before = sum(torch.is_tensor(thing) for thing in gc.get_objects())
        for _ in range(5):
            case.fused().loss.backward()
        after = sum(torch.is_tensor(thing) for thing in gc.get_objects())
    finally:
        gc.enable()
    assert after - before < 5, "each pass leaves tensors behind"
