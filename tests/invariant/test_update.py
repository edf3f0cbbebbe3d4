"""What must not matter to an update does not: micro-batches, padding, row order; what must matter does.

Every kind of loss that an objective can ask for is compared with the pure losses, in float64, row by row.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from stableopd import losses
from stableopd.advantages import rollout_signals
from stableopd.config import ObjectiveConfig, OptimizerConfig
from stableopd.heads import HeadlessModel
from stableopd.losses import clipped_policy_loss, reverse_kl, token_logprobs
from stableopd.models import frozen_copy
from stableopd.rollout.hf import HFEngine
from stableopd.rows import concat_rows, gold_rows, minibatches, rollout_rows
from stableopd.scoring import all_completion_states, completion_scores
from stableopd.step import Updater
from stableopd.toy.models import build_model
from stableopd.types import Example, Sampling, TokenScores

PAD, EOS, VOCAB = 16, 15, 17
TEMPERATURE, TOPK, LENGTH = 0.8, 4, 7
OBJECTIVE = ObjectiveConfig(distill={"coef": 0.7}, gold={"coef": 1.3}, reference={"coef": 0.4})


def model(tokenizer, seed, width=16):
    return build_model(num_layers=1, hidden_size=width, num_heads=2, tokenizer=tokenizer, seed=seed)


def teacher_of(tokenizer):
    return model(tokenizer, 2, width=20)


@pytest.fixture
def rows(tokenizer):
    """Rollouts of five prompts of different length, two each, and weighted gold for every prompt."""
    student, teacher = model(tokenizer, 1), teacher_of(tokenizer)
    examples = [
        Example(
            index=i, prompt="", prompt_ids=tuple(range(1, 3 + i)), gold_ids=(*range(2, 5 + 2 * i), EOS),
            gold_weights=tuple(0.5 + 0.25 * t for t in range(4 + 2 * i)),
        )
        for i in range(5)
    ]  # fmt: skip
    engine = HFEngine(model=student, end_token_ids={EOS}, pad_token_id=PAD, vocab_size=VOCAB)
    sampling = Sampling(max_new_tokens=9, temperature=TEMPERATURE, num_generations=2, seed=1)
    rollouts = engine.generate(examples, sampling, step=1)
    headless = HeadlessModel(teacher, VOCAB)
    found = completion_scores(
        headless, rollouts, temperature=TEMPERATURE, token_budget=64, autocast=torch.no_grad, topk=TOPK
    )
    scores = TokenScores(
        sampled_logprobs=found.logprobs, temperature=TEMPERATURE, model_id="", topk_ids=found.topk_ids,
        topk_logprobs=found.topk_logprobs,
        states=all_completion_states(headless, rollouts, token_budget=64, autocast=torch.no_grad),
    )  # fmt: skip
    scored = rollout_rows(rollouts, scores, rollout_signals(rollouts, scores, OBJECTIVE), range(5))
    return concat_rows([scored, gold_rows(examples, range(5), PAD)], PAD)


def update(
    tokenizer, rows, *, objective=OBJECTIVE, token_budget=10_000, max_grad_norm=1e9, attention="eager",
    teacher_logprobs=None,
):  # fmt: skip
    """Gradients and figures of one update; the optimizer's rate is 0, so that weights stay."""
    student = model(tokenizer, 1)
    student.set_attn_implementation(attention)
    reference = frozen_copy(model(tokenizer, 7))
    grads: dict[str, torch.Tensor] = {}

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            grads.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
            return super().step(closure)

    updater = Updater(
        HeadlessModel(student, VOCAB), Recording(student.parameters(), lr=0.0), objective, Accelerator(cpu=True),
        temperature=TEMPERATURE, max_grad_norm=max_grad_norm, token_budget=token_budget, sequence_length=LENGTH,
        reference=HeadlessModel(reference, VOCAB), teacher_head=HeadlessModel(teacher_of(tokenizer), VOCAB).head,
    )  # fmt: skip
    return updater.update(rows, 0.0, teacher_logprobs), grads


@pytest.mark.parametrize("token_budget", [20, 10_000])
def test_the_probe_is_the_mean_probability_of_the_end_and_of_the_last_four_tokens_of_each_golden_solution(
    tokenizer, rows, token_budget
):
    student = model(tokenizer, 1)
    ends, endings = [], []
    for row in rows.is_gold.nonzero().squeeze(1).tolist():
        prompt = rows.prompt_ids[row][rows.prompt_mask[row]]
        gold = rows.completion_ids[row][rows.completion_mask[row]]
        log_p = student(input_ids=torch.cat([prompt, gold])[None]).logits[0, len(prompt) - 1 : -1, :VOCAB].double()
        log_p = log_p.log_softmax(-1).gather(-1, gold[:, None])[:, 0]
        assert gold[-1] == EOS
        ends.append(log_p[-1].exp().item())
        endings.append(log_p[-4:].sum().exp().item())
    assert len(ends) == 5
    updater = Updater(
        HeadlessModel(student, VOCAB), torch.optim.SGD(student.parameters(), lr=0.0), OBJECTIVE, Accelerator(cpu=True),
        temperature=TEMPERATURE, max_grad_norm=1.0, token_budget=token_budget,
    )  # fmt: skip
    figures = updater.probe(rows.select(rows.is_gold.nonzero().squeeze(1).tolist()))
    assert figures == {
        "health/stop_probe": pytest.approx(sum(ends) / 5, rel=1e-5),
        "health/ending_probe": pytest.approx(sum(endings) / 5, rel=1e-5),
    }


WEIGHTS = ("distill_weight", "reward_weight", "reference_weight", "gold_weight")


def assert_trained_alike(left, right):
    """Losses and gradients; figures such as the entropy are about all tokens of the rollouts, whatever they weigh."""
    keep = [{name: value for name, value in figures.items() if "loss" in name} for figures, _ in (left, right)]
    assert_same((keep[0], left[1]), (keep[1], right[1]))


def naive_logits(module, one):
    """Logits [1, T, V] in float64 of a single row, its prompt and completion in one unpadded sequence."""
    ids = torch.cat([one.prompt_ids[one.prompt_mask], one.completion_ids[one.completion_mask]])
    start = int(one.prompt_mask.sum())
    return module(input_ids=ids[None]).logits[:, start - 1 : -1, :VOCAB].double()


def assert_same(left, right, tolerance=2e-5):
    for found, expected in ((left[0], right[0]), (left[1], right[1])):
        assert found.keys() == expected.keys()
    for name, value in left[0].items():
        assert value == pytest.approx(right[0][name], rel=1e-4, abs=1e-5), name
    for name, grad in left[1].items():
        torch.testing.assert_close(grad, right[1][name], rtol=1e-3, atol=tolerance, msg=name)


@pytest.mark.parametrize("token_budget", [1, 40, 100, 250])
def test_the_size_of_micro_batches_changes_nothing_but_rounding(tokenizer, rows, token_budget):
    assert len(list(rows.micro_batches(token_budget))) > 1
    assert_same(update(tokenizer, rows, token_budget=token_budget), update(tokenizer, rows))


def test_micro_batches_keep_to_the_budget_and_hold_each_row_once(rows):
    seen = 0
    for micro in rows.micro_batches(60):
        size = int((micro.prompt_mask.sum(1) + micro.completion_mask.sum(1)).max()) * len(micro)
        assert size <= 60 or len(micro) == 1
        assert micro.completion_mask.any(dim=0).all(), "a column of nothing but padding was left"
        seen += len(micro)
    assert seen == len(rows)


def test_the_order_of_rows_changes_nothing(tokenizer, rows):
    assert_same(update(tokenizer, rows.select(list(reversed(range(len(rows)))))), update(tokenizer, rows))


def test_what_stands_in_the_padding_changes_nothing(tokenizer, rows):
    dirty = replace(
        rows,
        completion_ids=rows.completion_ids.masked_fill(~rows.completion_mask, 3),
        prompt_ids=rows.prompt_ids.masked_fill(~rows.prompt_mask, 4),
        teacher_logprobs=rows.teacher_logprobs.masked_fill(~rows.completion_mask, float("nan")),
        old_logprobs=rows.old_logprobs.masked_fill(~rows.completion_mask, -float("inf")),
    )
    assert_same(update(tokenizer, dirty), update(tokenizer, rows))


def test_a_row_without_weight_counts_as_if_it_were_not_there(tokenizer, rows):
    keep = [row for row in range(len(rows)) if row not in (2, 12)]
    weights = {name: getattr(rows, name).clone() for name in WEIGHTS}
    for weight in weights.values():
        weight[2] = weight[12] = 0
    assert_trained_alike(update(tokenizer, replace(rows, **weights)), update(tokenizer, rows.select(keep)))


def test_masking_the_end_of_a_rollout_is_the_same_as_cutting_it_off(tokenizer, rows):
    width = 4
    masked = {name: getattr(rows, name).clone() for name in ("distill_weight", "reference_weight")}
    for weight in masked.values():
        weight[:10, width:] = 0
    mask = rows.completion_mask.clone()
    mask[:10, width:] = False
    cut = replace(rows, completion_mask=mask, **masked)
    assert_trained_alike(update(tokenizer, replace(rows, **masked)), update(tokenizer, cut))


def test_the_loss_is_the_weighted_sum_of_terms_over_their_own_token_counts(tokenizer, rows):
    """The whole objective once more, naively, in one unpadded sequence after the other."""
    student, reference = model(tokenizer, 1), model(tokenizer, 7)
    sums = {"distill": 0.0, "gold": 0.0, "reference": 0.0}
    counts = {"rollout": 0.0, "gold": 0.0}
    for row in range(len(rows)):
        one = rows.select([row])
        logits, ref_logits = naive_logits(student, one), naive_logits(reference, one)
        if one.rollout_mask.any():
            logprobs = token_logprobs(logits, one.completion_ids, TEMPERATURE)
            advantages = one.teacher_logprobs - one.old_logprobs
            sums["distill"] += clipped_policy_loss(logprobs, one.old_logprobs.double(), advantages).sum()
            sums["reference"] += reverse_kl(logits, ref_logits, TEMPERATURE).sum()
            counts["rollout"] += one.completion_mask.sum()
        else:
            sums["gold"] -= (token_logprobs(logits, one.completion_ids) * one.gold_weight).sum()
            counts["gold"] += one.gold_weight.sum()
    terms = {
        "distill": sums["distill"] / counts["rollout"],
        "gold": sums["gold"] / counts["gold"],
        "reference": sums["reference"] / counts["rollout"],
    }
    loss = 0.7 * terms["distill"] + 1.3 * terms["gold"] + 0.4 * terms["reference"]
    loss.backward()
    figures, grads = update(tokenizer, rows, token_budget=70)
    for name, value in terms.items():
        assert figures[f"loss/{name}"] == pytest.approx(value.item(), rel=1e-4), name
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("term", ["distill", "gold", "reference"])
def test_a_term_without_coefficient_is_not_computed_and_not_trained(tokenizer, rows, term):
    changed = OBJECTIVE.model_copy(update={term: getattr(OBJECTIVE, term).model_copy(update={"coef": 0.0})})
    figures, grads = update(tokenizer, rows, objective=changed)
    whole, all_grads = update(tokenizer, rows)
    assert f"loss/{term}" not in figures
    assert f"loss/{term}" in whole
    assert any(not torch.allclose(grads[name], all_grads[name]) for name in grads)


def test_gold_never_enters_the_distillation_and_rollouts_never_the_gold_term(tokenizer, rows):
    figures, _ = update(tokenizer, rows)
    only_rollouts, _ = update(tokenizer, rows.select(range(10)))
    only_gold, _ = update(tokenizer, rows.select(range(10, 15)))
    assert figures["loss/distill"] == pytest.approx(only_rollouts["loss/distill"], rel=1e-5)
    assert figures["loss/gold"] == pytest.approx(only_gold["loss/gold"], rel=1e-5)
    assert "loss/gold" not in only_rollouts
    assert "loss/distill" not in only_gold


def test_the_sampled_reference_term_agrees_with_the_exact_one_on_average(tokenizer):
    """Many short rollouts of one prompt: the k3 value comes near the exact divergence."""
    student = model(tokenizer, 1)
    engine = HFEngine(model=student, end_token_ids={EOS}, pad_token_id=PAD, vocab_size=VOCAB, max_batch_size=2000)
    example = Example(index=0, prompt="", prompt_ids=(1, 2, 3))
    sampling = Sampling(max_new_tokens=2, temperature=TEMPERATURE, num_generations=2000)
    rollouts = engine.generate([example], sampling, step=0)
    many = rollout_rows(rollouts, None, rollout_signals(rollouts, None, OBJECTIVE), [0])
    value = {}
    for estimator in ("exact", "k3"):
        objective = ObjectiveConfig(distill={"coef": 0.0}, reference={"coef": 1.0, "estimator": estimator})
        value[estimator] = update(tokenizer, many, objective=objective)[0]["loss/reference"]
    assert value["k3"] == pytest.approx(value["exact"], rel=0.15)


def test_an_update_with_an_infinite_gradient_is_skipped_and_said(tokenizer, rows):
    student = model(tokenizer, 1)
    before = {name: p.clone() for name, p in student.named_parameters()}
    weight = rows.gold_weight.clone()
    weight[12, 0] = float("inf")
    poisoned = replace(rows, gold_weight=weight)
    updater = Updater(
        HeadlessModel(student, VOCAB), torch.optim.SGD(student.parameters(), lr=1.0),
        ObjectiveConfig(gold={"coef": 1.0}), Accelerator(cpu=True), temperature=1.0, max_grad_norm=1.0,
        token_budget=1000,
    )  # fmt: skip
    figures = updater.update(poisoned, 1.0)
    assert (figures["skipped_updates"], figures["skipped_updates/no_tokens"]) == (1.0, 0.0)
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())


def test_an_update_in_which_nothing_counts_is_skipped(tokenizer, rows):
    nothing = replace(rows, **{name: torch.zeros_like(getattr(rows, name)) for name in WEIGHTS})
    skipped = {"skipped_updates": 1.0, "skipped_updates/no_tokens": 1.0}
    assert update(tokenizer, nothing) == (skipped, {})
    assert update(tokenizer, rows.select([])) == (skipped, {})


def test_large_vocabularies_are_taken_in_chunks_with_the_same_result(tokenizer, rows, monkeypatch):
    whole = update(tokenizer, rows)
    monkeypatch.setattr("stableopd.fused.sweep.CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("stableopd.fused.sweep.MIN_ROWS", 3)
    assert_same(update(tokenizer, rows), whole)


def test_a_launchers_environment_does_not_rescale_the_gradient(tokenizer, rows, monkeypatch):
    figures, _ = update(tokenizer, rows)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert update(tokenizer, rows)[0]["grad_norm"] == pytest.approx(figures["grad_norm"])


def test_clipping_bounds_the_norm_of_the_whole_gradient(tokenizer, rows):
    figures, grads = update(tokenizer, rows, max_grad_norm=0.01)
    assert figures["grad_norm"] > 0.01, "the norm that is logged is the one before clipping"
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_minibatches_deal_out_whole_prompts_each_once_an_epoch(rows):
    settings = OptimizerConfig(num_minibatches=2, num_epochs=2)
    dealt = minibatches(rows, 5, settings, key=[1, 2])
    assert len(dealt) == 4
    for first, second in (dealt[:2], dealt[2:]):
        assert sorted(first.group + second.group) == sorted(rows.group)
        assert not set(first.group) & set(second.group)
        for part in (first, second):
            for prompt in set(part.group):
                assert part.group.count(prompt) == 3, "two rollouts and the golden solution stay together"
    assert dealt[0].group != dealt[2].group or dealt[1].group != dealt[3].group


def test_a_process_without_a_prompt_in_a_minibatch_brings_no_rows(rows):
    only_first = rows.select([row for row, prompt in enumerate(rows.group) if prompt == 0])
    dealt = minibatches(only_first, 5, OptimizerConfig(num_minibatches=5), key=[1])
    assert sorted(len(part) for part in dealt) == [0, 0, 0, 0, 3]


# ---------------------------------------------------------------- every loss against the pure ones


def sampled(**options):
    return {"divergence": "sampled_reverse_kl", **options}


SHAPES = {"jsd": {"beta": 0.3}, "mixed_kl": {"forward_weight": 0.7}}
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "mixed_kl")
SUPPORTS = ("teacher_topk", "student_topk", "intersection", "union", "symmetric_difference")
DISTILL = {
    **{estimator: sampled(estimator=estimator) for estimator in ("clipped", "reinforce", "k2", "k3")},
    "narrow clip": sampled(estimator="clipped", epsilon_low=0.05, epsilon_high=0.1),
    "narrow gate": sampled(estimator="reinforce", gate_low=0.95, gate_high=1.1),
    **{name: {"divergence": name, **SHAPES.get(name, {})} for name in DIVERGENCES},
    **{
        f"{name} {support} {tail}": {
            "divergence": name, "support": support, "tail": tail, "topk": TOPK, **SHAPES.get(name, {})
        }
        for name in DIVERGENCES
        for support in SUPPORTS
        for tail in ("renormalise", "bucket")
    },
}  # fmt: skip
SOME = ("clipped", "k2", "jsd", "reverse_kl teacher_topk renormalise", "forward_kl union bucket")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")


@pytest.fixture
def drifted(rows):
    """The rows after the policy has moved on, with rewards, and with weights of 0, 0.5 and 1; one row has none."""
    generator = torch.Generator().manual_seed(5)

    def noise(std: float) -> torch.Tensor:
        return torch.randn(rows.completion_ids.shape, generator=generator) * std * rows.rollout_mask

    weight = torch.randint(3, rows.completion_ids.shape, generator=generator) / 2 * rows.rollout_mask
    weight[4] = 0
    old = rows.old_logprobs + noise(0.2)
    return replace(
        rows, old_logprobs=old, advantages=rows.teacher_logprobs - old, reward_advantages=noise(1.0),
        distill_weight=weight,
    )  # fmt: skip


def naive_policy(settings, logprobs, old, advantages):
    if settings.estimator == "reinforce":
        return losses.reinforce_loss(logprobs, old, advantages, settings.gate_low, settings.gate_high)
    return losses.clipped_policy_loss(logprobs, old, advantages, settings.epsilon_low, settings.epsilon_high)


def naive_distill(settings, logits, teacher_logits, one):
    """Losses [1, T] of one rollout in float64."""
    logprobs = token_logprobs(logits, one.completion_ids, TEMPERATURE)
    if settings.divergence == "sampled_reverse_kl":
        if settings.estimator in ("k2", "k3"):
            return losses.kl_penalty(logprobs, one.teacher_logprobs.double(), settings.estimator)
        return naive_policy(settings, logprobs, one.old_logprobs.double(), one.advantages.double())
    if settings.support != "full":
        return losses.topk_divergence(
            logits, teacher_logits, TOPK, settings.support, settings.divergence, settings.tail, settings.beta,
            settings.forward_weight, TEMPERATURE,
        )  # fmt: skip
    if settings.divergence == "jsd":
        return losses.jsd(logits, teacher_logits, settings.beta, TEMPERATURE)
    if settings.divergence == "mixed_kl":
        return losses.mixed_kl(logits, teacher_logits, settings.forward_weight, TEMPERATURE)
    return getattr(losses, settings.divergence)(logits, teacher_logits, TEMPERATURE)


def naive_reference(kind, logits, ref_logits, ids):
    if kind == "exact":
        return reverse_kl(logits, ref_logits, TEMPERATURE)
    return losses.kl_penalty(*(token_logprobs(z, ids, TEMPERATURE) for z in (logits, ref_logits)), kind)


def naive_aggregate(aggregation, losses_and_weights):
    """Of (losses [1, T], weights [1, T]) of every row, as docs/losses.md has it."""
    counted = [(loss[w > 0] * w[w > 0], int((w > 0).sum())) for loss, w in losses_and_weights if bool((w > 0).any())]
    if aggregation == "token_mean":
        return sum(loss.sum() for loss, _ in counted) / sum(number for _, number in counted)
    if aggregation == "sequence_mean":
        return sum(loss.sum() / number for loss, number in counted) / len(counted)
    return sum(loss.sum() for loss, _ in counted) / (LENGTH * len(counted))


def naive_update(tokenizer, rows, objective):
    """Figures and gradients of the whole objective: float64, one unpadded sequence after the other, pure losses."""
    student = model(tokenizer, 1).double()
    teacher, reference = teacher_of(tokenizer).double(), model(tokenizer, 7).double()
    found = {"distill": [], "reward": [], "reference": [], "gold": []}
    for row in range(len(rows)):
        one = rows.select([row])
        logits = naive_logits(student, one)
        if not one.rollout_mask.any():
            found["gold"].append((-token_logprobs(logits, one.completion_ids), one.gold_weight.double()))
            continue
        with torch.no_grad():
            teacher_logits, ref_logits = naive_logits(teacher, one), naive_logits(reference, one)
        distill = naive_distill(objective.distill, logits, teacher_logits, one)
        reward = naive_policy(
            objective.distill, token_logprobs(logits, one.completion_ids, TEMPERATURE), one.old_logprobs.double(),
            one.reward_advantages.double(),
        )  # fmt: skip
        tie = naive_reference(objective.reference.estimator, logits, ref_logits, one.completion_ids)
        found["distill"].append((distill, one.distill_weight.double()))
        found["reward"].append((reward, one.reward_weight.double()))
        found["reference"].append((tie, one.reference_weight.double()))
    coefs = {name: getattr(objective, name).coef for name in found if getattr(objective, name).coef > 0}
    figures = {
        f"loss/{name}": naive_aggregate(objective.aggregation, found[name])
        if name != "gold"
        else sum((loss * w).sum() for loss, w in found[name]) / sum(w.sum() for _, w in found[name])
        for name in coefs
    }
    figures["loss"] = sum(coef * figures[f"loss/{name}"] for name, coef in coefs.items())
    figures["loss"].backward()
    grads = {name: p.grad.float() for name, p in student.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in figures.items()}, grads


def assert_equals_the_naive_one(tokenizer, rows, objective, **options):
    figures, grads = update(tokenizer, rows, objective=objective, **options)
    expected, naive = naive_update(tokenizer, rows, objective)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert grads.keys() == naive.keys()
    largest = max(float(grad.abs().max()) for grad in naive.values())
    assert largest > 1e-3, "a gradient so small that everything equals it"
    for name, grad in naive.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("name", DISTILL)
def test_every_distillation_loss_is_the_pure_one_with_its_gradient(tokenizer, drifted, name):
    objective = ObjectiveConfig(distill={"coef": 0.7, **DISTILL[name]})
    assert_equals_the_naive_one(tokenizer, drifted, objective, token_budget=70)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", SOME)
def test_every_aggregation_is_that_of_the_documents_for_all_terms_on_rollouts(tokenizer, drifted, name, aggregation):
    objective = ObjectiveConfig(
        distill={"coef": 0.7, **DISTILL[name]}, gold={"coef": 1.3}, reference={"coef": 0.4}, reward={"coef": 0.6},
        aggregation=aggregation,
    )  # fmt: skip
    assert_equals_the_naive_one(tokenizer, drifted, objective, token_budget=70)


@pytest.mark.parametrize("estimator", ["exact", "k1", "k2", "k3"])
def test_every_reference_estimator_is_the_pure_one_with_its_gradient(tokenizer, drifted, estimator):
    objective = ObjectiveConfig(distill={"coef": 0.0}, reference={"coef": 0.4, "estimator": estimator})
    assert_equals_the_naive_one(tokenizer, drifted, objective)


@pytest.mark.parametrize("estimator", ["clipped", "reinforce"])
def test_the_reward_term_is_the_policy_loss_of_the_distillations_estimator(tokenizer, drifted, estimator):
    objective = ObjectiveConfig(distill={"coef": 0.0, "estimator": estimator}, reward={"coef": 0.6})
    assert_equals_the_naive_one(tokenizer, drifted, objective)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", SOME)
def test_micro_batches_of_any_size_and_packing_change_nothing_but_rounding(tokenizer, drifted, name, aggregation):
    objective = ObjectiveConfig(
        distill={"coef": 0.7, **DISTILL[name]}, gold={"coef": 1.3}, reference={"coef": 0.4}, reward={"coef": 0.6},
        aggregation=aggregation,
    )  # fmt: skip
    whole = update(tokenizer, drifted, objective=objective)
    assert_same(update(tokenizer, drifted, objective=objective, token_budget=1), whole)
    assert_same(update(tokenizer, drifted, objective=objective, token_budget=60, attention="sdpa"), whole)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", SOME)
def test_tokens_without_weight_are_as_good_as_cut_off(tokenizer, rows, name, aggregation):
    """Means over tokens or rows; and the constant of a sum over sequences does not ask how many tokens there are."""
    width = 4
    weight = rows.distill_weight.clone()
    weight[:10, width:] = 0
    mask = rows.completion_mask.clone()
    mask[:10, width:] = False
    states = tuple(None if array is None else array[:width] for array in rows.teacher_states)
    objective = ObjectiveConfig(distill={"coef": 0.7, **DISTILL[name]}, gold={"coef": 1.3}, aggregation=aggregation)
    masked = update(tokenizer, replace(rows, distill_weight=weight), objective=objective)
    cut = replace(rows, completion_mask=mask, distill_weight=weight, teacher_states=states)
    assert_trained_alike(masked, update(tokenizer, cut, objective=objective))


def test_a_sum_over_sequences_is_divided_by_the_constant_of_the_objective_before_that_of_the_rollouts(tokenizer, rows):
    def loss(**options):
        objective = ObjectiveConfig(aggregation="sequence_sum", **options)
        return update(tokenizer, rows, objective=objective)[0]["loss/distill"]

    assert loss(sequence_sum_length=2 * LENGTH) == pytest.approx(loss() / 2)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "reverse_kl union renormalise", "mixed_kl student_topk bucket"])
@pytest.mark.parametrize("token_budget", [1, 60, 10_000])
def test_what_the_teacher_gives_the_sampled_tokens_is_told_where_its_states_pass_by(
    tokenizer, rows, name, token_budget
):
    shuffled = rows.select([11, 3, 0, 14, 9, 1, 2, 4, 10, 8, 7, 6, 5, 12, 13])
    teacher_logprobs = torch.full_like(rows.teacher_logprobs[:10], torch.nan)
    objective = ObjectiveConfig(distill=DISTILL[name], gold={"coef": 1.0})
    update(tokenizer, shuffled, objective=objective, token_budget=token_budget, teacher_logprobs=teacher_logprobs)
    mask = rows.completion_mask[:10]
    torch.testing.assert_close(teacher_logprobs[mask], rows.teacher_logprobs[:10][mask], rtol=1e-4, atol=1e-4)
    assert teacher_logprobs[~mask].isnan().all(), "padding is nobody's"


@pytest.mark.parametrize("name", ["clipped", "reverse_kl teacher_topk renormalise"])
def test_a_teacher_that_scored_the_tokens_itself_is_not_overruled(tokenizer, rows, name):
    teacher_logprobs = torch.full_like(rows.teacher_logprobs[:10], torch.nan)
    update(tokenizer, rows, objective=ObjectiveConfig(distill=DISTILL[name]), teacher_logprobs=teacher_logprobs)
    assert teacher_logprobs.isnan().all()


def test_the_teacher_is_heard_even_where_none_of_its_tokens_count(tokenizer, rows):
    """As when every rollout is cut off and `truncated_weight` is 0: just then people look at the figures."""
    nothing = replace(rows.select(range(10)), distill_weight=torch.zeros_like(rows.distill_weight[:10]))
    teacher_logprobs = torch.zeros_like(nothing.teacher_logprobs)
    objective = ObjectiveConfig(distill=DISTILL["reverse_kl"])
    figures, grads = update(tokenizer, nothing, objective=objective, teacher_logprobs=teacher_logprobs)
    assert figures["skipped_updates"] == 1.0
    assert grads == {}, "the optimizer was not asked"
    assert figures["entropy"] > 0
    assert "loss/distill" not in figures
    torch.testing.assert_close(teacher_logprobs, nothing.teacher_logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("term", ["distill", "reference", "gold"])
def test_a_term_of_which_no_token_counts_leaves_the_others_as_they_are(tokenizer, rows, term):
    weight = torch.zeros_like(getattr(rows, f"{term}_weight"))
    figures, grads = update(tokenizer, replace(rows, **{f"{term}_weight": weight}))
    off = OBJECTIVE.model_copy(update={term: getattr(OBJECTIVE, term).model_copy(update={"coef": 0.0})})
    expected, others = update(tokenizer, rows, objective=off)
    assert f"loss/{term}" not in figures
    assert_trained_alike((figures, grads), (expected, others))
