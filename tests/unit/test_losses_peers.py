"""The same numbers as the peers' own functions, where a peer is installed. None of them is a dependency."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from naive_losses import logits, rows_of_lengths

from stableopd import losses

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""The peers compute in float32."""
VERL, ASYNC = "verl.trainer.ppo.core_algos", "trl.experimental.async_distillation.async_distillation_trainer"
NUM_TOKENS, WIDTH, VOCAB, K = 12, 8, 50, 5


def of_peer(module, name):
    """A peer's function; skips the test where the peer, or this version of it, does not have it."""
    found = getattr(pytest.importorskip(module, exc_type=ImportError), name, None)
    return found or pytest.skip(f"{module} has no {name}")


@pytest.fixture(scope="module")
def heads():
    """Hidden states and weights of student and teacher, in float32."""
    shapes = ((NUM_TOKENS, WIDTH), (VOCAB, WIDTH), (NUM_TOKENS, WIDTH), (VOCAB, WIDTH))
    return [logits(seed, *shape).float() / 3 for seed, shape in enumerate(shapes)]


def ours(beta):
    """Our functions by TRL's convention: 0 is forward, 1 is reverse, between them the teacher's share of the JSD."""
    if beta == 0.0:
        return losses.forward_kl
    if beta == 1.0:
        return losses.reverse_kl
    return lambda s, t, temperature=1.0: losses.jsd(s, t, beta, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_trl_computes_the_same_divergence_gradient_and_entropy(heads, beta, temperature):
    function = of_peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    hidden, weight, teacher_hidden, teacher_weight = heads
    hidden = hidden.clone().requires_grad_()
    theirs, entropy = function.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, beta, temperature)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), hidden)
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    value = ours(beta)(student, teacher, temperature)
    torch.testing.assert_close(value, theirs, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), hidden, retain_graph=True)[0], their_gradient, **CLOSE)
    torch.testing.assert_close(losses.token_entropy(student, temperature), entropy, **CLOSE)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_trl_averages_tokens_over_the_same_global_count(heads, beta):
    chunked_loss = of_peer("trl.trainer.distillation_trainer", "_chunked_divergence_loss")
    hidden, weight, teacher_hidden, teacher_weight = heads
    mask, total = rows_of_lengths(5, 3, 4), 30
    theirs, _, number = chunked_loss(
        hidden.view(3, 4, -1), teacher_hidden.view(3, 4, -1), weight, teacher_weight, mask.long(), beta, total
    )
    values = ours(beta)((hidden @ weight.T).view(3, 4, -1), (teacher_hidden @ teacher_weight.T).view(3, 4, -1))
    torch.testing.assert_close(losses.reduce_tokens(values, mask, total), theirs, **CLOSE)
    assert losses.aggregation_weights(mask, "token_mean")[1] == number.item()


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_computes_the_same_divergence_on_a_set_of_candidates(beta, tail):
    add_tail_bucket, jsd_divergence = (of_peer(ASYNC, name) for name in ("_add_tail_bucket", "_jsd_divergence"))
    student, teacher = logits(6, NUM_TOKENS, VOCAB).float().requires_grad_(), logits(7, NUM_TOKENS, VOCAB).float()
    ids, member = losses.candidate_set(student, teacher, K, "union")
    log_s, log_t = (x.log_softmax(-1).gather(-1, ids) for x in (student, teacher))
    never = torch.tensor(-torch.inf)
    sides, support = [torch.where(member, x, never) for x in (log_s, log_t)], member
    if tail == "bucket":
        (s, support), (t, _) = (add_tail_bucket(x, member) for x in sides)
    else:
        s, t = (x - x.logsumexp(-1, keepdim=True) for x in sides)
    theirs = jsd_divergence(s, t, beta=beta, support_mask=support).sum(-1)
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    value = losses.support_divergence(log_s, log_t, member, kind, tail, beta)
    torch.testing.assert_close(value, theirs, **CLOSE)
    gradients = [torch.autograd.grad(v.sum(), student, retain_graph=True)[0] for v in (value, theirs)]
    torch.testing.assert_close(*gradients, **CLOSE)


@pytest.fixture(scope="module")
def sampled():
    """Log-probabilities of policy and reference, near enough that verl's clamp of k3 at 10 is not met."""
    return [logits(seed, 4, 6).mul(0.3).sub(2.0) for seed in (8, 9)]


@pytest.mark.parametrize(
    ("kind", "name"), [("k1", "kl"), ("k1", "k1"), ("k2", "mse"), ("k2", "k2"), ("k3", "low_var_kl"), ("k3", "k3")]
)
def test_verl_estimates_the_same_divergence_and_its_plus_has_our_gradient(sampled, kind, name):
    penalty = of_peer(VERL, "kl_penalty")
    policy, reference = sampled[0].clone().requires_grad_(), sampled[1]
    torch.testing.assert_close(losses.kl_estimate(policy, reference, kind), penalty(policy, reference, name), **CLOSE)
    value, theirs = losses.kl_penalty(policy, reference, kind), penalty(policy, reference, f"{name}+")
    torch.testing.assert_close(value, theirs, **CLOSE)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), policy)[0] for v in (value, theirs)), **CLOSE)


@pytest.mark.parametrize(
    ("aggregation", "name"),
    [
        ("token_mean", "token-mean"),
        ("sequence_mean", "seq-mean-token-mean"),
        ("sequence_sum", "seq-mean-token-sum-norm"),
    ],
)
def test_verl_aggregates_alike(aggregation, name):
    values, mask = logits(10, 5, 6), rows_of_lengths(11, 5, 6)
    weights, share = losses.aggregation_weights(mask, aggregation, 9.0)
    theirs = of_peer(VERL, "agg_loss")(values, mask.double(), name, loss_scale_factor=9.0)
    torch.testing.assert_close(losses.reduce_tokens(values, weights, share), theirs, **CLOSE)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_verl_has_the_same_group_advantages_but_for_the_denominator_of_the_deviation(scale):
    groups = np.repeat([3, 1, 2], 4)
    rewards, mask = logits(12, 12), torch.ones(12, 2, dtype=torch.float64)
    per_token = torch.stack([torch.zeros(12, dtype=torch.float64), rewards], dim=1)
    advantage = of_peer(VERL, "compute_grpo_outcome_advantage")
    theirs, _ = advantage(per_token, mask, groups, norm_adv_by_std_in_grpo=scale == "group")
    factor = (3 / 4) ** 0.5 if scale == "group" else 1.0  # theirs divides by n - 1, ours by n
    found = losses.group_advantages(rewards, groups.tolist(), scale) * factor
    torch.testing.assert_close(found, theirs[:, 0], **CLOSE)


@pytest.mark.parametrize(("kind", "threshold"), [("truncate", 1.3), ("mask", "0.6_1.3")])
def test_verl_corrects_the_engine_with_the_same_weights(sampled, kind, threshold):
    correction = of_peer("verl.trainer.ppo.rollout_corr_helper", "compute_rollout_correction_weights")
    trainer, engine = sampled
    theirs, _ = correction(trainer - engine, torch.ones(4, 6), rollout_is="token", rollout_is_threshold=threshold)
    torch.testing.assert_close(losses.importance_weights(trainer, engine, kind, 1.3, 0.6), theirs, **CLOSE)
    assert (theirs == {"truncate": 1.3, "mask": 0.0}[kind]).any()
