"""An objective that cannot work is refused with what to do; everything that the documents name is accepted."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from stableopd.config import PRESETS, StableOPDConfig
from stableopd.config_files import flatten, load_config
from stableopd.errors import ConfigError
from stableopd.objective import (
    AdvantageConfig,
    CorrectionConfig,
    DistillConfig,
    ObjectiveConfig,
    ReferenceConfig,
    RewardConfig,
)

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ONE_SIDED = ("teacher_topk", "student_topk", "intersection")
SUPPORTS = (*ONE_SIDED, "union", "symmetric_difference")
VOCABULARY = ("reverse_kl", "forward_kl", "jsd", "mixed_kl")
SHAPING: dict[str, Any] = {"clamp": 3.0, "log_compress": True, "gamma": 0.5, "prefix_gamma": 0.5}
NO_ADVANTAGE = [{"estimator": "k2"}, {"estimator": "k3"}, *({"divergence": name} for name in VOCABULARY)]


def refusal(objective: dict[str, Any], **others: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        StableOPDConfig(method="opd", objective=objective, **others)
    return str(caught.value)


def accept(objective: dict[str, Any], **others: Any) -> ObjectiveConfig:
    return StableOPDConfig(method="opd", objective=objective, **others).objective


# ---------------------------------------------------------------- refused, with what to do


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_support_needs_a_divergence_over_the_vocabulary(support):
    message = refusal({"distill": {"support": support}})
    assert f"objective.distill: support is '{support}'" in message
    assert "set divergence=reverse_kl" in message
    accept({"distill": {"support": support, "divergence": "reverse_kl"}})


@pytest.mark.parametrize(("beta", "remedy"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_a_mixture_of_one_model_alone_is_refused_with_the_divergence_that_is_meant(beta, remedy):
    message = refusal({"distill": {"divergence": "jsd", "beta": beta}})
    assert f"objective.distill: beta is {beta:g}" in message
    assert f"set divergence={remedy}" in message
    accept({"distill": {"divergence": "jsd", "beta": abs(beta - 0.001)}})
    accept({"distill": {"divergence": remedy, "beta": beta}})


@pytest.mark.parametrize("support", ONE_SIDED)
@pytest.mark.parametrize("divergence", VOCABULARY)
def test_one_renormalised_candidate_is_refused_and_in_a_bucket_or_a_larger_set_it_is_not(support, divergence):
    distill = {"divergence": divergence, "support": support, "topk": 1}
    message = refusal({"distill": distill})
    assert "topk is 1" in message
    assert "Take more, or tail=bucket" in message
    accept({"distill": {**distill, "tail": "bucket"}})
    accept({"distill": {**distill, "topk": 2}})


@pytest.mark.parametrize("support", ["full", "union", "symmetric_difference"])
def test_sets_that_can_hold_two_tokens_accept_a_topk_of_one(support):
    accept({"distill": {"divergence": "reverse_kl", "support": support, "topk": 1}})


@pytest.mark.parametrize(("distill", "shaping"), [*product(NO_ADVANTAGE, SHAPING)])
def test_what_has_no_advantage_cannot_shape_it(distill, shaping):
    message = refusal({"distill": {**distill, "advantage": {shaping: SHAPING[shaping]}}})
    assert f"advantage.{shaping} shapes the advantage" in message
    assert "set divergence=sampled_reverse_kl with estimator=clipped or reinforce, or leave it out" in message
    assert next(iter(distill.values())) in message, "which setting has no advantage"


@pytest.mark.parametrize("estimator", ["clipped", "reinforce"])
def test_policy_gradients_accept_all_shaping_together(estimator):
    assert accept({"distill": {"estimator": estimator, "advantage": SHAPING}}).distill.advantage.changed() == [*SHAPING]


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("distill", [*NO_ADVANTAGE, {"coef": 0.0}])
def test_a_correction_needs_a_policy_gradient_be_it_that_of_the_reward(kind, distill):
    objective = {"distill": distill, "gold": {"coef": 1.0}, "correction": {"kind": kind}}
    message = refusal(objective)
    assert "correction weighs policy gradients" in message
    assert "set correction.kind=none" in message
    assert accept({**objective, "reward": {"coef": 0.5}}).needs_student_scores


@pytest.mark.parametrize("distill", [*NO_ADVANTAGE, {"coef": 0.0}])
def test_a_reward_can_be_added_only_to_an_advantage_that_there_is(distill):
    objective = {"distill": distill, "reward": {"coef": 0.5, "add_to_advantage": True}}
    message = refusal(objective)
    assert "reward.add_to_advantage needs the advantage of a policy-gradient distillation" in message
    assert "divergence=sampled_reverse_kl with estimator=clipped or reinforce" in message
    assert accept({**objective, "reward": {"coef": 0.5}}).has_reward_term


def test_a_reward_that_has_no_other_rollout_to_be_compared_with_is_refused():
    message = refusal({"reward": {"coef": 0.5}}, rollout={"num_generations": 1})
    assert "rollout.num_generations is 1" in message
    assert "take 2 or more, or set objective.reward.coef=0" in message
    accept({"reward": {"coef": 0.5}}, rollout={"num_generations": 2})
    accept({}, rollout={"num_generations": 1})


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("distill.coef", -0.1, "greater than or equal to 0"),
        ("distill.epsilon_low", 0.0, "greater than 0"),
        ("distill.epsilon_high", -1.0, "greater than 0"),
        ("distill.gate_low", 1.1, "less than or equal to 1"),
        ("distill.gate_low", -0.1, "greater than or equal to 0"),
        ("distill.gate_high", 0.9, "greater than or equal to 1"),
        ("distill.beta", 1.5, "less than or equal to 1"),
        ("distill.forward_weight", -0.5, "greater than or equal to 0"),
        ("distill.topk", 0, "greater than or equal to 1"),
        ("distill.advantage.clamp", 0.0, "greater than 0"),
        ("distill.advantage.gamma", 1.1, "less than or equal to 1"),
        ("distill.advantage.prefix_gamma", -1.0, "greater than or equal to 0"),
        ("distill.tokens.entropy_fraction", 0.0, "greater than 0"),
        ("distill.tokens.entropy_fraction", 1.1, "less than or equal to 1"),
        ("distill.tokens.truncated_weight", 2.0, "less than or equal to 1"),
        ("gold.coef", float("nan"), "finite"),
        ("reference.coef", float("inf"), "finite"),
        ("reward.coef", -1.0, "greater than or equal to 0"),
        ("correction.cap", 0.9, "greater than or equal to 1"),
        ("correction.floor", 1.1, "less than or equal to 1"),
        ("sequence_sum_length", 0, "greater than or equal to 1"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_its_key_and_the_limit(key, value, limit):
    message = refusal(nested(key, value))
    assert f"objective.{key}: " in message
    assert limit in message


def nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("distil.coef", "objective.distill"),
        ("distill.divergance", "objective.distill.divergence"),
        ("distill.top_k", "objective.distill.topk"),
        ("distill.advantage.prefix_gama", "objective.distill.advantage.prefix_gamma"),
        ("distill.tokens.entropy_fracton", "objective.distill.tokens.entropy_fraction"),
        ("reward.functon", "objective.reward.function"),
        ("reward.add_to_advantages", "objective.reward.add_to_advantage"),
        ("correction.knd", "objective.correction.kind"),
        ("agregation", "objective.aggregation"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(key, meant):
    assert f"did you mean '{meant}'?" in refusal(nested(key, 1))


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("distill.divergence", "'sampled_reverse_kl', 'reverse_kl', 'forward_kl', 'jsd' or 'mixed_kl'"),
        ("distill.estimator", "'clipped', 'reinforce', 'k2' or 'k3'"),
        ("distill.support", "'intersection', 'union' or 'symmetric_difference'"),
        ("distill.tail", "'renormalise' or 'bucket'"),
        ("reference.estimator", "'exact', 'k1', 'k2' or 'k3'"),
        ("reward.scale", "'group' or 'none'"),
        ("correction.kind", "'none', 'truncate' or 'mask'"),
        ("aggregation", "'token_mean', 'sequence_mean' or 'sequence_sum'"),
    ],
)
def test_an_unknown_choice_is_refused_with_those_that_there_are(key, known):
    message = refusal(nested(key, "reverse"))
    assert f"objective.{key}: " in message
    assert known in message


# ---------------------------------------------------------------- accepted


def test_every_choice_is_accepted_in_every_combination_that_makes_sense():
    for divergence, support, tail in product(VOCABULARY, ("full", *SUPPORTS), ("renormalise", "bucket")):
        distill = accept({"distill": {"divergence": divergence, "support": support, "tail": tail}}).distill
        assert not distill.is_policy_gradient
        assert distill.needs_topk == (support == "teacher_topk")
        assert distill.needs_states != distill.needs_topk
    for estimator in get_args(DistillConfig.model_fields["estimator"].annotation):
        distill = accept({"distill": {"estimator": estimator}}).distill
        assert distill.is_policy_gradient == (estimator in ("clipped", "reinforce"))
        assert not distill.needs_topk
        assert not distill.needs_states


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (DistillConfig, "divergence"),
        (DistillConfig, "estimator"),
        (DistillConfig, "tail"),
        (ReferenceConfig, "estimator"),
        (RewardConfig, "scale"),
        (CorrectionConfig, "kind"),
        (ObjectiveConfig, "aggregation"),
    ],
)
def test_every_literal_of_a_setting_is_accepted(section, name):
    choices = get_args(section.model_fields[name].annotation)
    assert len(choices) > 1
    for choice in choices:
        assert getattr(section(**{name: choice}), name) == choice


def test_every_preset_says_what_it_needs():
    needs = {name: StableOPDConfig(method=name).objective for name in PRESETS}
    assert {name for name, objective in needs.items() if objective.needs_teacher} == {"opd", "stableopd"}
    assert {name for name, objective in needs.items() if objective.needs_gold} == {"sft", "stableopd"}
    assert {name for name, objective in needs.items() if objective.needs_reference} == {"stableopd"}
    assert {name for name, objective in needs.items() if objective.needs_rewards} == {"grpo"}
    assert {name for name, objective in needs.items() if objective.needs_rollouts} == {"opd", "stableopd", "grpo"}
    assert not any(objective.needs_student_scores for objective in needs.values())


def test_the_grpo_preset_is_the_reward_term_alone_and_can_be_given_any_other():
    objective = StableOPDConfig(method="grpo").objective
    assert (objective.reward.coef, objective.has_reward_term, objective.has_policy_gradient) == (1.0, True, True)
    mixed = StableOPDConfig(
        method="grpo", beta_kl=0.02, objective={"reward": {"coef": 0.5, "function": "math"}}
    ).objective
    assert (mixed.reward.coef, mixed.reward.function, mixed.reference.coef) == (0.5, "math", 0.02)


def test_a_low_entropy_fraction_and_a_correction_need_the_students_own_scores():
    assert accept({"distill": {"tokens": {"entropy_fraction": 0.5}}}).needs_student_scores
    assert accept({"correction": {"kind": "mask"}}).needs_student_scores
    off = {"distill": {"coef": 0.0, "tokens": {"entropy_fraction": 0.5}}, "gold": {"coef": 1.0}}
    assert not accept(off).needs_student_scores


def test_settings_are_frozen_and_their_changes_are_told_by_name():
    assert AdvantageConfig(gamma=0.5, clamp=2.0).changed() == ["clamp", "gamma"]
    with pytest.raises(ValidationError, match="frozen"):
        AdvantageConfig().gamma = 0.5


# ---------------------------------------------------------------- documents


def test_examples_in_the_documents_parse():
    runs = [one for one in DOCUMENTS if one.name not in ("studies.md", "words.md")]  # see test_shipped_files
    blocks = [(d.name, b) for d in runs for b in re.findall(r"```yaml\n(.*?)```", d.read_text(), re.DOTALL)]
    assert blocks
    for name, block in blocks:
        try:
            StableOPDConfig(**yaml.safe_load(block))
        except ConfigError as error:
            pytest.fail(f"{name}: {error}")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_ask_for_a_method_with_its_coefficients(recipe):
    config = load_config(recipe)
    assert any(getattr(config.objective, name).coef for name in PRESETS[config.method])


def test_every_objective_key_in_the_documents_exists():
    known = {f"objective.{key}" for key in flatten(ObjectiveConfig().model_dump())}
    sections = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    for document in DOCUMENTS:
        named = set(re.findall(r"`(objective(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", document.read_text()))
        assert named <= known | sections, f"{document.name}: {sorted(named - known - sections)}"
    assert "objective.distill.estimator" in known


def test_every_setting_of_the_objective_is_in_the_document_of_losses():
    text = (ROOT / "docs" / "losses.md").read_text()
    for key in flatten(ObjectiveConfig().model_dump()):
        leaf = key.rsplit(".", 1)[-1]
        symbol = {"epsilon_low": "ε_low", "epsilon_high": "ε_high"}.get(leaf, leaf)
        assert symbol in text, f"objective.{key} is not explained"


def test_the_table_of_presets_shows_all_four_coefficients():
    text = (ROOT / "docs" / "losses.md").read_text()
    for method, coefs in PRESETS.items():
        row = " | ".join(f"{coefs.get(name, 0.0):g}" for name in ("distill", "gold", "reference", "reward"))
        assert f"| `{method}` | {row} |" in text
