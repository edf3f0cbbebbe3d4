"""The objective's settings: which terms a run sums, which losses they are, and how tokens are weighed."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stableopd.sections import AtLeastOne, Fraction, NonNegative, Positive, PositiveInt, Section

SampledDivergence = Literal["sampled_reverse_kl"]
VocabularyDivergence = Literal["reverse_kl", "forward_kl", "jsd", "mixed_kl"]
Divergence = Literal[SampledDivergence, VocabularyDivergence]
Support = Literal["full", "teacher_topk", "student_topk", "intersection", "union", "symmetric_difference"]


class AdvantageConfig(Section):
    """What becomes of the token advantage A = log T − log S before the policy loss, in this order."""

    clamp: Positive | None = None
    """A is cut to [−clamp, clamp]."""
    log_compress: bool = False
    """A becomes sign(A) log(1 + |A|)."""
    gamma: Fraction = 0.0
    """Discount: A_t becomes Σ_{i ≥ t} γ^{i−t} A_i."""
    prefix_gamma: NonNegative = 0.0
    """Early tokens count more: A_t is multiplied by 1 + γ (1 − share of Σ|A| that lies before t)."""


class TokenConfig(Section):
    """Which rollout tokens the distillation term sees. What is left out also leaves the denominator."""

    mask_special: bool = False
    """Leave out special tokens other than end tokens."""
    mask_repeated: bool = False
    """Leave out tokens that lie in an exact loop."""
    entropy_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Keep the share of tokens at which the student is least certain; below 1 the student scores its rollouts."""
    truncated_weight: Fraction = 1.0
    """Weight of rollouts that ran into the length limit: 1 keeps, 0 drops them."""


class DistillConfig(Section):
    coef: NonNegative = 1.0
    divergence: Divergence = "sampled_reverse_kl"
    estimator: Literal["clipped", "reinforce", "k2", "k3"] = "clipped"
    """`sampled_reverse_kl`: PPO-clipped or gated policy gradient on A = log T − log S, or a direct loss."""
    epsilon_low: Positive = 0.2
    epsilon_high: Positive = 0.2
    gate_low: Fraction = 0.5
    gate_high: AtLeastOne = 2.0
    """`reinforce`: tokens whose ratio to the policy that drew them is outside are left out of the gradient."""
    beta: Fraction = 0.5
    """`jsd`: the teacher's share of the mixture, above 0 and below 1."""
    forward_weight: Fraction = 0.5
    """`mixed_kl`: weight of KL(teacher ‖ student); the rest is KL(student ‖ teacher)."""
    support: Support = "full"
    """Over which part of the vocabulary a divergence is taken."""
    topk: PositiveInt = 32
    """Size of each top-k set, where `support` is not `full`."""
    tail: Literal["renormalise", "bucket"] = "renormalise"
    """Both distributions renormalised on the set, or the mass outside kept as one more outcome."""
    advantage: AdvantageConfig = AdvantageConfig()
    tokens: TokenConfig = TokenConfig()

    @property
    def is_sampled(self) -> bool:
        return self.divergence == "sampled_reverse_kl"

    @property
    def is_policy_gradient(self) -> bool:
        """Whether the term works through advantages of sampled tokens."""
        return self.is_sampled and self.estimator in ("clipped", "reinforce")

    @property
    def needs_topk(self) -> bool:
        """Whether the teacher's own top-k, found while scoring, is all that the term needs of it."""
        return not self.is_sampled and self.support == "teacher_topk"

    @property
    def needs_states(self) -> bool:
        """Whether the teacher's whole distribution is needed."""
        return not self.is_sampled and not self.needs_topk

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        if self.is_sampled and self.support != "full":
            raise ValueError(
                f"support is {self.support!r}, but sampled_reverse_kl looks at the sampled token alone; set "
                "divergence=reverse_kl (local support matching with support=teacher_topk)"
            )
        if not self.is_policy_gradient and self.advantage.changed():
            name = self.divergence if not self.is_sampled else f"estimator {self.estimator}"
            raise ValueError(
                f"advantage.{self.advantage.changed()[0]} shapes the advantage of sampled tokens, which {name} does "
                "not use; set divergence=sampled_reverse_kl with estimator=clipped or reinforce, or leave it out"
            )
        if self.divergence == "jsd" and self.beta in (0.0, 1.0):
            limit = "forward_kl" if self.beta == 0.0 else "reverse_kl"
            raise ValueError(
                f"beta is {self.beta:g}, at which jsd is 0 whatever student and teacher do, so nothing would be "
                f"learnt; set divergence={limit} (what TRL means by this beta), or a beta between 0 and 1"
            )
        one_sided = self.support in ("teacher_topk", "student_topk", "intersection")
        if self.support != "full" and self.topk == 1 and one_sided and self.tail == "renormalise":
            raise ValueError("topk is 1: renormalised on one token every divergence is 0. Take more, or tail=bucket")
        return self


class GoldConfig(Section):
    coef: NonNegative = 0.0
    """λ_gold of the paper."""


class ReferenceConfig(Section):
    coef: NonNegative = 0.0
    """β_KL of the paper."""
    estimator: Literal["exact", "k1", "k2", "k3"] = "exact"
    """KL(student ‖ initial student) over the whole vocabulary, or from the sampled token: the value of that
    estimator, the gradient of k2 (which is the divergence's own)."""


class RewardConfig(Section):
    coef: NonNegative = 0.0
    function: str = "exact"
    """`exact`, `math` (Math-Verify), or `package.module:function` taking (completion, answer); a number or a bool."""
    scale: Literal["group", "none"] = "group"
    """Advantage of a rollout: its reward less its prompt's mean, divided by their standard deviation or not."""
    add_to_advantage: bool = False
    """Add coef · advantage to the distillation's advantage instead of being a term by itself."""


class CorrectionConfig(Section):
    """For rollouts of an engine whose log-probabilities are not the trainer's: importance weights on its tokens."""

    kind: Literal["none", "truncate", "mask"] = "none"
    """Ratio trainer/engine cut at `cap`; or tokens whose ratio is outside [floor, cap] left out."""
    cap: AtLeastOne = 2.0
    floor: Fraction = 0.0


class ObjectiveConfig(Section):
    distill: DistillConfig = DistillConfig()
    gold: GoldConfig = GoldConfig()
    reference: ReferenceConfig = ReferenceConfig()
    reward: RewardConfig = RewardConfig()
    correction: CorrectionConfig = CorrectionConfig()
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """How the tokens of the rollouts add up in the distillation, reward and reference terms."""
    sequence_sum_length: PositiveInt | None = None
    """`sequence_sum`: the constant that each sequence's sum is divided by; rollout.max_completion_length if not set."""

    def with_coefs(self, *, gold: float, reference: float) -> Self:
        """The same objective with other coefficients of these two terms; nothing is checked anew."""
        return self.model_copy(
            update={
                "gold": self.gold.model_copy(update={"coef": gold}),
                "reference": self.reference.model_copy(update={"coef": reference}),
            }
        )

    @property
    def needs_rollouts(self) -> bool:
        return self.distill.coef > 0 or self.reference.coef > 0 or self.reward.coef > 0

    @property
    def needs_teacher(self) -> bool:
        return self.distill.coef > 0

    @property
    def needs_gold(self) -> bool:
        return self.gold.coef > 0

    @property
    def needs_reference(self) -> bool:
        return self.reference.coef > 0

    @property
    def needs_rewards(self) -> bool:
        return self.reward.coef > 0

    @property
    def has_reward_term(self) -> bool:
        return self.needs_rewards and not self.reward.add_to_advantage

    @property
    def has_policy_gradient(self) -> bool:
        return self.has_reward_term or (self.distill.coef > 0 and self.distill.is_policy_gradient)

    @property
    def needs_student_scores(self) -> bool:
        """Whether the student has to score its own rollouts before the updates."""
        return self.correction.kind != "none" or (self.distill.coef > 0 and self.distill.tokens.entropy_fraction < 1)

    @model_validator(mode="after")
    def _terms_fit_together(self) -> Self:
        shapes_advantage = self.distill.coef > 0 and self.distill.is_policy_gradient
        if self.needs_rewards and self.reward.add_to_advantage and not shapes_advantage:
            raise ValueError(
                "reward.add_to_advantage needs the advantage of a policy-gradient distillation: distill.coef above "
                "0 and divergence=sampled_reverse_kl with estimator=clipped or reinforce"
            )
        if self.correction.kind != "none" and not self.has_policy_gradient:
            raise ValueError(
                "correction weighs policy gradients of sampled tokens, and no active term is one; set "
                "correction.kind=none"
            )
        return self
