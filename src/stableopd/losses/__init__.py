"""Per-token losses of on-policy distillation: pure, unreduced, in nats.

Arrays are [B, T] (one value per completion token) or [B, T, V] (logits over the vocabulary); functions of logits and
log-probabilities take any leading axes. Nothing here knows about masks except what says so, and `reduce_tokens` is
the only place where tokens are summed; its denominator is fixed by the caller before any backward pass, so that
splitting a batch changes nothing.

Divergences are written KL(student ‖ teacher) with the direction in the name of the arguments.

    divergences   over the whole vocabulary
    supports      over a few candidates: top-k sets
    policy        of the sampled token: policy gradients, estimates of a divergence, importance weights
    shaping       of advantages and of the weights of tokens
    rewards       to advantages
    reduction     to one number
"""

from stableopd.losses.divergences import forward_kl, jsd, mixed_kl, reverse_kl, token_entropy, token_logprobs
from stableopd.losses.policy import (
    CorrectionKind,
    KlEstimator,
    clipped_policy_loss,
    importance_weights,
    kl_estimate,
    kl_penalty,
    reinforce_loss,
    sampled_reverse_kl,
)
from stableopd.losses.reduction import Aggregation, aggregation_weights, reduce_tokens
from stableopd.losses.rewards import RewardScale, group_advantages
from stableopd.losses.shaping import (
    clamp_advantages,
    compress_advantages,
    discounted_advantages,
    high_entropy_mask,
    prefix_weights,
    special_token_mask,
    truncation_weights,
)
from stableopd.losses.supports import (
    DivergenceKind,
    SupportKind,
    TailKind,
    candidate_set,
    support_divergence,
    topk_divergence,
    topk_reverse_kl,
)

__all__ = [
    "Aggregation",
    "CorrectionKind",
    "DivergenceKind",
    "KlEstimator",
    "RewardScale",
    "SupportKind",
    "TailKind",
    "aggregation_weights",
    "candidate_set",
    "clamp_advantages",
    "clipped_policy_loss",
    "compress_advantages",
    "discounted_advantages",
    "forward_kl",
    "group_advantages",
    "high_entropy_mask",
    "importance_weights",
    "jsd",
    "kl_estimate",
    "kl_penalty",
    "mixed_kl",
    "prefix_weights",
    "reduce_tokens",
    "reinforce_loss",
    "reverse_kl",
    "sampled_reverse_kl",
    "special_token_mask",
    "support_divergence",
    "token_entropy",
    "token_logprobs",
    "topk_divergence",
    "topk_reverse_kl",
    "truncation_weights",
]
