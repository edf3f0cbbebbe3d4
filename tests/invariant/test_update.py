"""What must not matter to an update does not: micro-batches, padding, row order; what must matter does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

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
TEMPERATURE = 0.8
OBJECTIVE = ObjectiveConfig(distill={"coef": 0.7}, gold={"coef": 1.3}, reference={"coef": 0.4})


def model(tokenizer, seed, width=16):
    return build_model(num_layers=1, hidden_size=width, num_heads=2, tokenizer=tokenizer, seed=seed)


@pytest.fixture
def rows(tokenizer):
    """Rollouts of five prompts of different length, two each, and weighted gold for every prompt."""
    student, teacher = model(tokenizer, 1), model(tokenizer, 2)
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
        headless, rollouts, temperature=TEMPERATURE, token_budget=64, autocast=torch.no_grad, topk=5
    )
    scores = TokenScores(
        sampled_logprobs=found.logprobs, temperature=TEMPERATURE, model_id="", topk_ids=found.topk_ids,
        topk_logprobs=found.topk_logprobs,
        states=all_completion_states(headless, rollouts, token_budget=64, autocast=torch.no_grad),
    )  # fmt: skip
    scored = rollout_rows(rollouts, scores, rollout_signals(rollouts, scores, OBJECTIVE), range(5))
    return concat_rows([scored, gold_rows(examples, range(5), PAD)], PAD)


def update(tokenizer, rows, *, objective=OBJECTIVE, token_budget=10_000, max_grad_norm=1e9, seed=1):
    """Gradients and figures of one update; the optimizer's rate is 0, so that weights stay."""
    student = model(tokenizer, seed)
    reference = frozen_copy(model(tokenizer, 7))
    grads: dict[str, torch.Tensor] = {}

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            grads.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
            return super().step(closure)

    updater = Updater(
        HeadlessModel(student, VOCAB), Recording(student.parameters(), lr=0.0), objective, Accelerator(cpu=True),
        temperature=TEMPERATURE, max_grad_norm=max_grad_norm, token_budget=token_budget, sequence_length=7,
        reference=HeadlessModel(reference, VOCAB), teacher_head=HeadlessModel(model(tokenizer, 2), VOCAB).head,
    )  # fmt: skip
    return updater.update(rows, 0.0), grads


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
    assert updater.update(poisoned, 1.0)["skipped_updates"] == 1.0
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())


def test_an_update_in_which_nothing_counts_is_skipped(tokenizer, rows):
    nothing = replace(rows, **{name: torch.zeros_like(getattr(rows, name)) for name in WEIGHTS})
    assert update(tokenizer, nothing) == ({"skipped_updates": 1.0}, {})
    assert update(tokenizer, rows.select([])) == ({"skipped_updates": 1.0}, {})


def test_large_vocabularies_are_taken_in_chunks_with_the_same_result(tokenizer, rows, monkeypatch):
    whole = update(tokenizer, rows)
    monkeypatch.setattr("stableopd.fused._CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("stableopd.fused._MIN_ROWS", 3)
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
